//! Inputs across which onnxruntime moves or fuses what it then runs wrongly, slowly, or not at all.
//!
//! All of this was executed, and `tests/differential/sandwich.py` runs it again.

use std::collections::BTreeMap;

use crate::ir::{NodeId, User, ValueId};
use crate::numerics::Format;
use crate::ops::Form;
use crate::plan::planner::{Kindness, Planner};
use crate::plan::{Barrier, Mode, Plan, Readers, Slot, Stop};
use crate::reason::Reason;
use crate::targets::layout;

/// The barriers that a plan needs.
pub(super) fn of(planner: &Planner<'_>, nodes: &[NodeId], plan: &Plan) -> Vec<Barrier> {
    let mut found = Vec::new();
    let forms: BTreeMap<&Slot, Form> = plan.weights.iter().map(|weight| (&weight.at, weight.form)).collect();
    let last = |n: NodeId| planner.quantized.get(&n) == Some(&Kindness::Integer) && planner.model.node(n).is("Conv");
    let reached = layout::reached(planner.model, nodes.iter().copied(), &last);
    let mut add = |node: NodeId, stop: Stop, why: Reason| {
        found.push(Barrier { at: planner.slot(node, 0), stop, why });
    };
    for &node in nodes {
        let at = planner.model.node(node);
        let op = at.op_type().to_owned();
        if layout::breaks(planner.model, node) && reached.contains(&node) {
            add(node, Stop::Transposes, Reason::BreaksTransposed { op });
        } else if plan.opset >= 21 && layout::takes_dequantize(planner.model, node) && reads_int8(planner, plan, node) {
            add(node, Stop::Quantizers, Reason::BreaksInt8 { op });
        }
        if let Some(clip) = clip(planner, node)
            && runs_on_codes(planner, &forms, node)
        {
            let op = planner.model.node(clip).op_type().to_owned();
            add(clip, Stop::Quantizers, Reason::KeepsFromFusing { op, node: planner.model.node_name(node).to_owned() });
        }
    }
    found
}

/// The only reader of what a node makes, where that is a Relu or Clip that is taken for part of a pattern and does not
/// vanish into a quantizer.
pub(super) fn clip(planner: &Planner<'_>, node: NodeId) -> Option<NodeId> {
    let model = planner.model;
    let output = model.node(node).output(0).filter(|v| !planner.wants.contains_key(v))?;
    let &[User::Node { node: next, input: 0 }] = model.value(output).users() else { return None };
    let at = model.node(next);
    let same = at.graph() == model.node(node).graph();
    if !same || !at.domain().is_empty() || !planner.target.absorb.has(at.op_type()) {
        return None;
    }
    let clipped = at.output(0)?;
    let returned = model.value(clipped).users().iter().any(|user| matches!(user, User::Output { .. }));
    let vanishes = planner.wanted(clipped) && planner.vanishes(next, clipped);
    (!returned && !vanishes).then_some(next)
}

/// Whether a product reads the codes of a dequantized tensor, of which one kernel is made where nothing keeps it from that.
fn runs_on_codes(planner: &Planner<'_>, forms: &BTreeMap<&Slot, Form>, node: NodeId) -> bool {
    if !Form::Matmulnbits.serves(planner.model.node(node).op_type()) {
        return false;
    }
    let forms: Vec<Form> = [0, 1].iter().filter_map(|&at| forms.get(&planner.slot(node, at)).copied()).collect();
    let codes = match planner.quantized.get(&node) {
        Some(Kindness::Integer) => true,
        Some(Kindness::WeightOnly) => !forms.is_empty(),
        None => false,
    };
    codes && forms.iter().all(|&form| form == Form::Qdq)
}

/// Whether a node reads a dequantized int8 tensor, and has a result that is not quantized at once.
fn reads_int8(planner: &Planner<'_>, plan: &Plan, node: NodeId) -> bool {
    let at = planner.model.node(node);
    let Some(input) = at.input(0) else { return false };
    let pair = plan.activations.get(&planner.pair_read(node, input));
    let slot = planner.slot(node, 0);
    let int8 = pair.is_some_and(|pair| {
        let read = match &pair.readers {
            Readers::All => true,
            Readers::Listed(slots) => slots.contains(&slot),
        };
        read && pair.mode == Mode::Static && pair.quantizer.dtype == Format::Int8
    });
    let quantized = |v: &ValueId| plan.activations.get(planner.model.value(*v).name()).is_some_and(|pair| !pair.fence);
    int8 && !at.outputs().iter().flatten().all(quantized)
}
