//! Folds the Clips that exporters of PyTorch and Brevitas write behind quantizers.
//!
//! Over constant codes a Clip becomes the codes within its bounds. Over those of an activation it is dropped where its
//! bounds are the ends of the codes' own type, so that it does nothing; one that leaves codes unused (a narrow range, or
//! fewer bits than the type has) is kept and listed.

use super::support::evaluate::Constants;
use super::support::graphs::{graphs_outside_functions, is_graph_output};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Quantizer;
use crate::ir::{Model, NodeId, Tensor};
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct FoldClips;

impl Pass for FoldClips {
    fn name(&self) -> &'static str {
        "fold-clips"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut dropped = Vec::new();
        for graph in graphs_outside_functions(model) {
            let mut constants = Constants::new(model, graph);
            for node in model.graph(graph).nodes().to_vec() {
                let slot = model.node(node);
                let (true, Some(value)) = (slot.is("Clip"), slot.output(0)) else { continue };
                let Some(codes) = slot.input(0).and_then(|v| model.dtype(v)).filter(|d| d.format().is_some()) else {
                    continue;
                };
                if !constants.derives(value) || is_graph_output(model, value) {
                    continue;
                }
                let name = model.value(value).name().to_owned();
                match constants.value(model, value) {
                    Some(tensor) => {
                        model.make_constant(value, tensor);
                        dropped.push(node);
                        outcome.changed(name, Change::Clipped { dtype: codes });
                    }
                    None => outcome.skipped(name, Reason::NotComputable { what: Operand::Output }),
                }
            }
            for node in model.graph(graph).nodes().to_vec() {
                let Some(found) = clip(model, node) else { continue };
                let name = model.node_name(node).to_owned();
                match found {
                    Ok((from, to)) => {
                        model.replace_uses(to, from, |_| true);
                        dropped.push(node);
                        outcome.changed(name, Change::Bypassed { op: "Clip".to_owned() });
                    }
                    Err(why) => outcome.skipped(name, why),
                }
            }
        }
        model.remove(&dropped);
        Ok(outcome)
    }
}

/// What a Clip of codes reads and gives, if it does nothing; or why it stays. `None` where the node is something else.
#[allow(clippy::type_complexity, reason = "two values, or a reason")]
fn clip(model: &Model, node: NodeId) -> Option<Result<(crate::ir::ValueId, crate::ir::ValueId), Reason>> {
    let slot = model.node(node);
    let (from, to) = (slot.input(0)?, slot.output(0)?);
    let producer = model.producer(from)?;
    if !slot.is("Clip") || !model.node(producer).is("QuantizeLinear") || is_graph_output(model, to) {
        return None;
    }
    let declared = Quantizer::of(model.node(producer)).and_then(|q| q.output_dtype);
    let dtype = match model.node(producer).input(2) {
        Some(zero) => model.dtype(zero)?,
        None => declared.unwrap_or(crate::onnx::DataType::Uint8),
    };
    let (least, most) = dtype.format().filter(|f| f.is_integer())?.range();
    let bound = |index: usize, open: i32| -> Option<i64> {
        match slot.input(index) {
            None => Some(i64::from(open)),
            Some(_) => model.constant_input(node, index).and_then(Tensor::to_i64)?.first().copied(),
        }
    };
    Some(match (bound(1, least), bound(2, most)) {
        (Some(low), Some(high)) if low <= i64::from(least) && high >= i64::from(most) => Ok((from, to)),
        (Some(low), Some(high)) => Err(Reason::NarrowRange { dtype, low, high }),
        _ => Err(Reason::NotConstant { what: Operand::Bounds }),
    })
}
