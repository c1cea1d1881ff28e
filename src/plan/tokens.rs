//! Inputs with a scale for each token: fake quantizers in operators, in front of nodes that compute in float.

use super::planner::Planner;
use crate::config::SiteKind;
use crate::config::spec::Share;
use crate::ir::NodeId;

impl Planner<'_> {
    /// Whether an input is to get a scale for each token.
    pub(super) fn per_token(&self, node: NodeId, kind: SiteKind) -> bool {
        let spec = &self.ask(node, kind).spec;
        let asked = spec.granularity == Some(Share::PerToken) && spec.dynamic == Some(true);
        kind == SiteKind::Input && asked
    }
}
