//! Inputs with a scale for each token: fake quantizers in operators, in front of nodes that compute in float.

use super::planner::Planner;
use super::site::Refusal;
use crate::config::SiteKind;
use crate::config::spec::Share;
use crate::error::Result;
use crate::ir::NodeId;
use crate::reason::Reason;

impl Planner<'_> {
    /// Whether an input is to get a scale for each token.
    pub(super) fn per_token(&self, node: NodeId, kind: SiteKind) -> bool {
        let spec = &self.ask(node, kind).spec;
        let asked = spec.granularity == Some(Share::PerToken) && spec.dynamic == Some(true);
        kind == SiteKind::Input && asked
    }

    /// Notes the input of a linear layer; says why the layer computes in float.
    pub(super) fn token(&mut self, node: NodeId, data: &[usize], weight: Option<usize>) -> Result<Reason> {
        let site = self.site(node, SiteKind::Input);
        let eps = match self.reader(&site, SiteKind::Input, self.ask(node, SiteKind::Input)).per_token() {
            Ok(eps) => eps,
            Err(Refusal::Wrong(error)) => return Err(error),
            Err(Refusal::Unfit(why)) => return Ok(why),
        };
        if let (&[index], Some(1)) = (data, weight) {
            self.tokens.insert(node, (index, eps));
            return Ok(Reason::PerToken);
        }
        Ok(Reason::NoTokens)
    }
}
