//! Floats of 16 bits become float32, where a plan says so: there is no kernel otherwise.
//!
//! Large constants stay as they are stored, behind a Cast that runtimes fold when they load the model, and so do tables, of
//! which rows are taken first.

use std::collections::BTreeMap;

use super::support::retype::{float_types, is_last, retype};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::Model;
use crate::ir::view::MICROSOFT;
use crate::onnx::DataType;

/// See the module.
#[derive(Debug)]
pub struct WidenFloats;

impl Pass for WidenFloats {
    fn name(&self) -> &'static str {
        "widen-floats"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let Some((plan, _)) = context.quantization.filter(|(plan, _)| plan.float32) else { return Ok(outcome) };
        let types = float_types(model);
        let mut computes = BTreeMap::new();
        for node in model.nodes_outside_functions() {
            let at = model.node(node);
            let known = at.domain().is_empty() || at.domain() == MICROSOFT;
            let table = at.input(0).filter(|&v| at.is("Gather") && model.constant(v).is_some());
            let rows = table.is_some_and(|v| plan.weights.iter().all(|w| w.tensor != model.value(v).name()));
            let values = || at.inputs().iter().chain(at.outputs()).flatten();
            let bodies = at.bodies().next().is_some();
            // The last Cast gives a graph output its type.
            let last = at.is("Cast") && at.output(0).is_some_and(|v| is_last(model, v));
            if known && !rows && !last && (bodies || values().any(|v| types.contains_key(v))) {
                computes.insert(node, DataType::Float);
            }
        }
        retype(model, types, &computes);
        outcome.changed("model", Change::ComputesIn { dtype: DataType::Float });
        Ok(outcome)
    }
}
