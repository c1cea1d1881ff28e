//! Activations in blocks.

use super::Scheme;
use super::planner::Planner;
use crate::ir::{NodeId, Tensor};
use crate::numerics::Granularity;
use crate::reason::Reason;

impl Planner<'_> {
    /// Why an input cannot be cut into blocks.
    pub(super) fn unfit_blocks(&self, node: NodeId, asked: &Scheme) -> Option<Reason> {
        let Granularity::PerGroup { size, .. } = asked.granularity else { return None };
        let at = self.model.node(node);
        let last = at.is("MatMul") || at.is("Gemm") && at.int("transA").unwrap_or(0) == 0;
        if !last || at.input(1).is_none_or(|w| self.model.constant(w).is_none()) {
            return Some(Reason::BlocksAcross);
        }
        let dims = self.model.constant_input(node, 1).map(Tensor::dims).unwrap_or_default();
        let transposed = at.is("Gemm") && at.int("transB").unwrap_or(0) != 0;
        let depth = if transposed { dims.last() } else { dims.iter().rev().nth(usize::from(dims.len() > 1)) };
        match depth {
            Some(depth) if depth.is_multiple_of(size) => None,
            _ => Some(Reason::RaggedBlocks { length: depth.copied().unwrap_or(0), size }),
        }
    }
}
