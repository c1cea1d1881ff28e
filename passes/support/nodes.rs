//! Which nodes a pass works on: those that a plan means, or all but those of functions.

use super::retype::widened;
use crate::config::spec::Form;
use crate::error::{Error, Kind, Result};
use crate::ir::view::{Gemm, MICROSOFT};
use crate::ir::{Model, NodeId, ValueId};
use crate::passes::{Change, Outcome};
use crate::plan::Plan;
use crate::reason::Reason;

/// The tensor that a plan names; where floats of 16 bits became float32, that which they became.
///
/// # Errors
/// The plan is for another model.
pub(crate) fn named(model: &Model, name: &str) -> Result<ValueId> {
    model.value_named(name).map(|value| widened(model, value)).ok_or_else(|| unknown("tensor", name))
}

/// The node that gives a tensor, or that gave it before a pair took the tensor's name.
///
/// # Errors
/// The plan is for another model.
pub(crate) fn planned(model: &Model, name: &str) -> Result<NodeId> {
    let unknown = || unknown("node", name);
    let value = model.value_named(name).ok_or_else(unknown)?;
    let mut node = model.producer(value).ok_or_else(unknown)?;
    loop {
        let slot = model.node(node);
        let fence = slot.is("Sum") && slot.inputs().len() == 1;
        // No plan is about a Cast: it stands where a graph output keeps its type.
        let pair = ["DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "Cast"].iter().any(|op| slot.is(op));
        if !pair && !fence {
            return Ok(node);
        }
        node = slot.input(0).and_then(|v| model.producer(v)).ok_or_else(unknown)?;
    }
}

fn unknown(what: &str, name: &str) -> Error {
    Error::new(Kind::Config, format!("the plan names a {what} that the model does not have"))
        .at_value(name)
        .with_hint("the plan was made for another model; make it again")
}

/// Refuses a Gemm that does more than a product and a bias.
pub(crate) fn plain_gemm(model: &Model, node: NodeId) -> std::result::Result<(), Reason> {
    let at = model.node(node);
    let Some(gemm) = Gemm::of(at) else { return Ok(()) };
    let wanted = [
        ("transA", 0, !gemm.trans_a),
        ("alpha", 1, gemm.is_plain(false)),
        ("beta", 1, gemm.is_plain(at.input(2).is_some())),
    ];
    match wanted.into_iter().find(|(.., fine)| !fine) {
        Some((name, wanted, _)) => Err(Reason::Attribute { name: name.to_owned(), wanted }),
        None => Ok(()),
    }
}

/// Has `replace` turn each node of an operator of onnxruntime, outside functions, into what is `written` instead, or say why it
/// stays.
pub(crate) fn replace_fused(
    model: &mut Model,
    op: &str,
    written: &str,
    replace: impl Fn(&mut Model, NodeId, &str) -> Result<(), Reason>,
) -> Outcome {
    let mut outcome = Outcome::default();
    for node in model.nodes_outside_functions() {
        let at = model.node(node);
        if at.op_type() != op || at.domain() != MICROSOFT {
            continue;
        }
        let name = model.node_name(node).to_owned();
        match replace(model, node, &name) {
            Ok(()) => outcome.changed(name, Change::WrittenAs { op: written.to_owned() }),
            Err(why) => outcome.skipped(name, why),
        }
    }
    outcome
}

/// Calls `lower` with the node of each weight that a plan gives a form, and the weight's index in the plan.
///
/// # Errors
/// What `lower` says, at the node: the plan asks for what cannot be.
pub(crate) fn carry_out(
    model: &mut Model,
    plan: &Plan,
    form: Form,
    mut lower: impl FnMut(&mut Model, NodeId, usize) -> Result<(), Reason>,
) -> Result<()> {
    for (index, weight) in plan.weights.iter().enumerate().filter(|(_, w)| w.form == form) {
        let node = planned(model, &weight.at.node)?;
        lower(model, node, index).map_err(|why| {
            Error::new(Kind::Config, format!("the plan asks for {}: {why}", form.name()))
                .at_node(model.node_name(node), model.node(node).op_type())
                .at_value(&weight.tensor)
        })?;
    }
    Ok(())
}
