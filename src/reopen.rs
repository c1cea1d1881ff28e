//! Weights that a model has as codes, read by operators in float: float again where the plan now has integers for both.

use std::collections::BTreeSet;

use crate::config::Config;
use crate::error::Result;
use crate::ir::{Model, NodeId};
use crate::ops;
use crate::passes::dequantize::constant;
use crate::passes::{Note, Outcome};
use crate::plan::{Knowledge, Plan, plan};
use crate::reason::Reason;
use crate::targets::Target;

/// What is reported as having made them float.
pub(crate) const PASS: &str = "dequantize";

/// Dequantizes the 8-bit weights of a prepared model that the plan for it wants beside quantized inputs, or that a given plan
/// names. They are quantized again from these floats. All others stay the codes that they are.
///
/// # Errors
/// As [`plan`].
pub fn reopen(
    model: &mut Model,
    config: &Config,
    target: &Target,
    knowledge: &Knowledge,
    given: Option<&Plan>,
) -> Result<Outcome> {
    let found = candidates(model);
    if found.is_empty() {
        return Ok(Outcome::default());
    }
    let mut trial = model.clone();
    open(&mut trial, &found);
    let made;
    let planned = if let Some(given) = given {
        given
    } else {
        made = plan(&trial, config, target, knowledge)?;
        &made
    };
    let wanted: BTreeSet<&str> = planned
        .weights
        .iter()
        .filter(|weight| !matches!(weight.why, Reason::FloatWeight { .. }))
        .map(|weight| weight.tensor.as_str())
        .collect();
    let is_wanted = |&dequantize: &NodeId| {
        let output = model.node(dequantize).output(0);
        output.is_some_and(|value| wanted.contains(model.value(value).name()))
    };
    let found: Vec<NodeId> = found.into_iter().filter(is_wanted).collect();
    Ok(open(model, &found))
}

/// The nodes that dequantize 8-bit weights of operators with inputs in float.
fn candidates(model: &Model) -> Vec<NodeId> {
    let dequantizes = |value| model.producer(value).filter(|&node| model.node(node).is("DequantizeLinear"));
    let is_byte = |node| model.constant_input(node, 0).and_then(|t| t.dtype().bits()).is_some_and(|bits| bits == 8);
    let found = model.graph(model.main()).nodes().iter().filter_map(|&node| {
        let at = model.node(node);
        let row = ops::of(model, node)?;
        let weight = (0..at.inputs().len()).find(|&index| matches!(row.role(index), ops::Role::Weight(_)))?;
        let dequantize = at.input(weight).and_then(dequantizes).filter(|&node| is_byte(node))?;
        let float = (0..weight).filter_map(|index| at.input(index)).all(|value| dequantizes(value).is_none());
        float.then_some(dequantize)
    });
    found.collect::<BTreeSet<NodeId>>().into_iter().collect()
}

/// Makes constants of what these nodes compute.
fn open(model: &mut Model, nodes: &[NodeId]) -> Outcome {
    let mut outcome = Outcome::default();
    for &node in nodes {
        let at = model.node_name(node).to_owned();
        match constant(model, node) {
            Ok(what) => {
                model.remove(&[node]);
                outcome.changes.push(Note { at, what });
            }
            Err(what) => outcome.skips.push(Note { at, what }),
        }
    }
    outcome
}
