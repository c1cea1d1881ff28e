//! A part of the float model as it will be quantized, in float.

use super::Walk;
use crate::error::Result;
use crate::ir::{Model, User};
use crate::passes::insert_qdq::InsertQdq;
use crate::passes::raise_opset::RaiseOpset;
use crate::passes::{Context, pipeline};
use crate::plan::{Activation, Mode, Plan, Readers, Slot};

impl Walk<'_> {
    /// A block with the numbers that it will have: weights as they are read back, and quantizers around activations.
    /// There are none around the tensors in `bare`.
    pub(super) fn quantized(&self, block: &Model, bare: &[String]) -> Result<Model> {
        let mut made = self.solution.corrected(block);
        for (weight, solved) in self.plan.weights.iter().zip(&self.solution.weights) {
            let Some(value) = made.value_named(&weight.tensor) else { continue };
            let Some(float) = made.constant(value) else { continue };
            if let Some(tensor) = solved.read_back(weight, float)? {
                made.set_constant(value, tensor);
            }
        }
        let activations = self.plan.activations.iter();
        let activations = activations.filter(|(name, a)| !bare.contains(a.tensor.as_ref().unwrap_or(name)));
        let here = activations.filter_map(|(name, activation)| Some((name.clone(), part_of(&made, name, activation)?)));
        let plan = Plan { activations: here.collect(), ..self.plan.without_sites() };
        if !plan.activations.is_empty() {
            let context = Context::planned(self.job.rewrite.evaluate, &plan, self.solution);
            pipeline::apply(&mut made, &RaiseOpset, &context)?;
            pipeline::apply(&mut made, &InsertQdq, &context)?;
        }
        Ok(made)
    }
}

/// What a quantizer is in a part of the model, if it is there.
fn part_of(model: &Model, name: &str, activation: &Activation) -> Option<Activation> {
    if activation.mode != Mode::Static {
        return None;
    }
    let value = model.value_named(activation.tensor.as_deref().unwrap_or(name))?;
    let users = model.value(value).users();
    let readers = match &activation.readers {
        Readers::All => {
            users.iter().any(|user| matches!(user, User::Node { .. } | User::Output { .. })).then_some(Readers::All)
        }
        Readers::Listed(slots) => {
            let here = slots.iter().filter(|slot| model.producer_named(&slot.node).is_some());
            let here: Vec<Slot> = here.cloned().collect();
            (!here.is_empty()).then_some(Readers::Listed(here))
        }
    }?;
    Some(Activation { readers, converts: None, scale_of: name.to_owned(), fence: false, ..activation.clone() })
}
