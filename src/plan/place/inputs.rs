//! At the inputs of anchors only, as `TensorRT` wants them: it fuses what lies between by itself.

use std::collections::BTreeMap;

use super::Place;
use crate::config::SiteKind;
use crate::ir::view::Gemm;
use crate::ir::{Model, NodeId, ValueId};
use crate::plan::Mode;
use crate::plan::planner::{Kindness, Planner, Read};
use crate::reason::Reason;
use crate::targets::Residual;

pub(super) struct Inputs;

impl Place for Inputs {
    /// `TensorRT` fuses attention with quantizers at the inputs of its two products.
    fn multiplies_activations(&self) -> bool {
        true
    }

    /// A product with a vector is bound by memory, and `TensorRT` has no faster kernel for it in 8 bits.
    fn unfit_product(&self, model: &Model, node: NodeId) -> Option<Reason> {
        (model.node(node).is("MatMul") || model.node(node).is("Gemm")).then_some(())?;
        let result = model.node(node).output(0).and_then(|v| model.shape(v));
        let result = result.unwrap_or_else(|| product_shape(model, node));
        let vector = result.len() < 2 || result.iter().rev().take(2).any(|&n| n == Some(1));
        vector.then_some(Reason::ProductWithVector)
    }

    fn spread(&self, planner: &mut Planner<'_>, nodes: &[NodeId]) {
        if planner.target.residual != Residual::Shortcut {
            return;
        }
        let depths = depths(planner.model, nodes);
        for &node in nodes {
            shortcut(planner, node, &depths);
        }
    }
}

/// The last two sizes of a product, as far as the shapes of its operands tell.
fn product_shape(model: &Model, node: NodeId) -> Vec<Option<usize>> {
    let gemm = Gemm::of(model.node(node)).unwrap_or_default();
    let size = |input: usize, from_end: usize| {
        let dims = model.shape(model.node(node).input(input)?)?;
        // A list is a row on the left and a column on the right.
        if dims.len() == 1 { Some(1) } else { dims.iter().rev().nth(from_end).copied().flatten() }
    };
    vec![size(0, usize::from(!gemm.trans_a)), size(1, usize::from(gemm.trans_b))]
}

/// Residual sums of a target that fuses the sum into the convolution: only the other input is quantized.
fn shortcut(planner: &mut Planner<'_>, node: NodeId, depths: &BTreeMap<NodeId, usize>) {
    let at = planner.model.node(node);
    if !at.is("Add") || planner.untouchable(node).is_some() || planner.ask(node, SiteKind::Input).is_off() {
        return;
    }
    let (Some(a), Some(b)) = (at.input(0), at.input(1)) else { return };
    let fused = |value: ValueId| {
        let conv = branch_end(planner.model, value)?;
        (planner.quantized.get(&conv) == Some(&Kindness::Integer)).then_some(conv)
    };
    // Of two convolutions the one with more behind it ends the main branch, wherever the file lists it.
    let other = match (fused(a), fused(b)) {
        (Some(x), Some(y)) if depths[&x] < depths[&y] => (0, a),
        (Some(_), _) => (1, b),
        (None, Some(_)) => (0, a),
        (None, None) => return,
    };
    if planner.model.constant(other.1).is_some() || planner.unquantizable(other.1).is_some() {
        return;
    }
    let ask = planner.ask(node, SiteKind::Input).clone();
    let why = Reason::ShortcutInto { node: planner.model.node_name(node).to_owned() };
    planner.read(other.1, (node, other.0), Read { ask, adopts: false, mode: Mode::Static, why });
}

/// The convolution whose result a value is, also behind a `SiLU` or its like; nothing else reads what lies in between.
fn branch_end(model: &Model, value: ValueId) -> Option<NodeId> {
    let node = model.producer(value)?;
    let at = model.node(node);
    if model.value(value).users().len() != 1 {
        return None;
    }
    if at.is("Conv") {
        return Some(node);
    }
    let gate =
        |v: ValueId| model.producer(v).filter(|&g| ["Sigmoid", "HardSigmoid"].iter().any(|op| model.node(g).is(op)));
    let before = match at.op_type() {
        "HardSwish" | "Mish" | "Swish" if at.domain().is_empty() => at.input(0)?,
        "Mul" if at.domain().is_empty() => {
            let (a, b) = (at.input(0)?, at.input(1)?);
            let opens = |v: ValueId, other: ValueId| {
                gate(v).is_some_and(|g| model.node(g).input(0) == Some(other) && model.value(v).users().len() == 1)
            };
            let gated = if opens(b, a) {
                a
            } else if opens(a, b) {
                b
            } else {
                return None;
            };
            let conv = model.producer(gated).filter(|&p| model.node(p).is("Conv"));
            return conv.filter(|_| model.value(gated).users().len() == 2);
        }
        _ => return None,
    };
    let conv = model.producer(before).filter(|&p| model.node(p).is("Conv"));
    conv.filter(|_| model.value(before).users().len() == 1)
}

/// For each node of a sorted graph, the length of the longest path that leads to it.
fn depths(model: &Model, nodes: &[NodeId]) -> BTreeMap<NodeId, usize> {
    let mut depths = BTreeMap::new();
    for &node in nodes {
        let producers = model.node(node).inputs().iter().flatten().filter_map(|&v| model.producer(v));
        let depth = producers.filter_map(|p| depths.get(&p)).max().map_or(0, |d: &usize| d + 1);
        depths.insert(node, depth);
    }
    depths
}
