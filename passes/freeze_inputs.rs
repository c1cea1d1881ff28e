//! Turns graph inputs that carry defaults into constants, in models of IR version below 4, and raises those to 4.
//!
//! Those versions required every initializer to be listed as an input too, so nearly all of them are weights that nobody
//! overrides. Models of IR version 4 and above list only what is meant to be overridden and are left alone.

use super::{Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Def, Model, ValueId};

/// See the module.
#[derive(Debug)]
pub struct FreezeInputs;

impl Pass for FreezeInputs {
    fn name(&self) -> &'static str {
        "freeze-inputs"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if model.ir_version() >= 4 {
            return Ok(outcome);
        }
        let main = model.main();
        let with_default = |&v: &ValueId| matches!(model.value(v).def(), Def::Input { default: Some(_) });
        let frozen: Vec<ValueId> = model.graph(main).inputs().filter(with_default).collect();
        for value in frozen {
            model.freeze_input(main, value);
            outcome
                .changed(model.value(value).name(), "no longer an input: IR versions below 4 list every initializer");
        }
        outcome.changed("model", format!("IR version {} raised to 4", model.ir_version()));
        model.set_ir_version(4);
        Ok(outcome)
    }
}
