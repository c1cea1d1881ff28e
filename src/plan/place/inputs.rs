//! At the inputs of anchors only, as `TensorRT` wants them: it fuses what lies between by itself.

use std::collections::BTreeMap;

use super::Place;
use crate::config::SiteKind;
use crate::ir::{Model, NodeId, ValueId};
use crate::plan::Mode;
use crate::plan::planner::{Kindness, Planner, Read};
use crate::reason::Reason;
use crate::targets::Residual;

pub(super) struct Inputs;

impl Place for Inputs {
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

/// Residual sums of a target that fuses the sum into the convolution: only the other input is quantized.
fn shortcut(planner: &mut Planner<'_>, node: NodeId, depths: &BTreeMap<NodeId, usize>) {
    let at = planner.model.node(node);
    if !at.is("Add") || planner.untouchable(node).is_some() || planner.ask(node, SiteKind::Input).is_off() {
        return;
    }
    let (Some(a), Some(b)) = (at.input(0), at.input(1)) else { return };
    let fused = |value: ValueId| {
        let conv = planner.model.producer(value)?;
        let single = planner.model.value(value).users().len() == 1;
        let integer = planner.quantized.get(&conv) == Some(&Kindness::Integer);
        (single && planner.model.node(conv).is("Conv") && integer).then_some(conv)
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
