//! Makes constants of what quantizers read and constants derive: scales and zero points behind a Cast, bounds of a Clip,
//! and a float weight that is scaled before it is quantized; and of what then scales or shifts the channels of a product.
//!
//! Only what every runtime computes to the same bits is computed.

use super::support::channels::has_channels;
use super::support::evaluate::Constants;
use super::support::graphs::{graphs_outside_functions, is_graph_output};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Model, NodeId, ValueId};
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct SettleQuantizers;

impl Pass for SettleQuantizers {
    fn name(&self) -> &'static str {
        "settle-quantizers"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut settled: Vec<NodeId> = Vec::new();
        for graph in graphs_outside_functions(model) {
            let mut constants = Constants::new(model, graph);
            for node in model.graph(graph).nodes().to_vec() {
                for value in parameters(model, &constants, node) {
                    let Some(producer) = model.producer(value) else { continue };
                    if model.node(producer).outputs().len() != 1 || is_graph_output(model, value) {
                        continue;
                    }
                    let name = model.value(value).name().to_owned();
                    match constants.value(model, value) {
                        Some(tensor) => {
                            model.make_constant(value, tensor);
                            settled.push(producer);
                            outcome.changed(name, Change::ComputedFromConstants);
                        }
                        None => outcome.skipped(name, Reason::NotComputable { what: Operand::Output }),
                    }
                }
            }
        }
        model.remove(&settled);
        Ok(outcome)
    }
}

/// What a node reads that constants derive and a quantizer wants constant.
fn parameters(model: &Model, constants: &Constants, node: NodeId) -> Vec<ValueId> {
    let slot = model.node(node);
    let first = match slot.op_type() {
        _ if !slot.domain().is_empty() => return Vec::new(),
        "QuantizeLinear" => 0,
        "DequantizeLinear" | "Clip" => 1,
        "Add" | "Sub" | "Mul" | "Div" if is_behind_product(model, constants, node) => 0,
        _ => return Vec::new(),
    };
    // Scales that are codes themselves, as in NVFP4, are stored as such.
    let coded = |v: ValueId| {
        model.producer(v).is_some_and(|p| model.node(p).is("DequantizeLinear") && model.constant_input(p, 0).is_some())
    };
    let derived = |v: &ValueId| constants.derives(*v) && model.constant(*v).is_none() && !coded(*v);
    slot.inputs().iter().skip(first).flatten().copied().filter(derived).collect()
}

/// Whether only arithmetic with constants lies between a product with channels and a node.
fn is_behind_product(model: &Model, constants: &Constants, node: NodeId) -> bool {
    let mut at = node;
    // Frameworks put a division, a bias and a normalization there.
    for _ in 0..4 {
        let slot = model.node(at);
        let data = slot.inputs().iter().flatten().find(|&&v| !constants.holds(model, v));
        let Some(before) = data.and_then(|&v| model.producer(v)) else { return false };
        if has_channels(model, before) {
            return true;
        }
        if !["Add", "Sub", "Mul", "Div", "BatchNormalization"].iter().any(|op| model.node(before).is(op)) {
            return false;
        }
        at = before;
    }
    false
}
