//! Around every operator of the table: the file says all, and the runtime takes what it has kernels for.

use super::Place;
use crate::ir::NodeId;
use crate::plan::planner::Planner;

pub(super) struct Everywhere;

impl Place for Everywhere {
    fn everywhere(&self) -> bool {
        true
    }

    fn spread(&self, planner: &mut Planner<'_>, nodes: &[NodeId]) {
        planner.spread(nodes);
    }
}
