//! What a plan can be about inside If, Loop and Scan bodies gets names of its own: weights, and what their nodes make.
//!
//! Bodies may use names that others use as well, and the branches of a merged decoder do; plans and reports name things by them.

use super::support::graphs::graphs_outside_functions;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Model, ValueId};
use crate::ops;

/// See the module.
#[derive(Debug)]
pub struct NameBodies;

impl Pass for NameBodies {
    fn name(&self) -> &'static str {
        "name-bodies"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let main = model.main();
        for graph in graphs_outside_functions(model).into_iter().filter(|&graph| graph != main) {
            let mut named: Vec<ValueId> = model.graph(graph).initializers().to_vec();
            for &node in model.graph(graph).nodes() {
                let at = model.node(node);
                if (0..at.inputs().len()).any(|index| ops::constant_weight(model, node, index).is_some()) {
                    named.extend(at.outputs().iter().flatten());
                }
            }
            for value in named {
                let name = model.value(value).name().to_owned();
                if model.value_named(&name) != Some(value) {
                    model.rename(value, &name);
                    outcome.changed(&name, Change::Renamed { name: model.value(value).name().to_owned() });
                }
            }
        }
        Ok(outcome)
    }
}
