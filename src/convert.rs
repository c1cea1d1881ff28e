//! What is quantized already, in another form: quantizers of constants are folded, and codes and scales carried over.

use std::ops::ControlFlow;

use crate::error::Result;
use crate::ir::Model;
use crate::passes::drop_dead::DropDead;
use crate::passes::fold_weights::FoldWeights;
use crate::passes::freeze_inputs::FreezeInputs;
use crate::passes::lift_constants::LiftConstants;
use crate::passes::simulate::Simulate;
use crate::passes::{Context, Evaluate, Note, Outcome, Pass, pipeline};
use crate::targets::{Target, check};

/// What every conversion begins with: constants where passes look for them, and quantizers of constants folded.
pub const FOLD: &[&dyn Pass] = &[&FreezeInputs, &LiftConstants, &FoldWeights, &DropDead];

/// What to do.
pub struct Request<'a> {
    /// Whether quantizers then become float operators; see [`simulate`](crate::passes::simulate).
    pub simulate: bool,
    /// Where the result runs; what it would compute wrongly becomes a warning.
    pub target: &'a Target,
    /// Runs constant nodes.
    pub evaluate: &'a dyn Evaluate,
    /// Called with the model after each pass; may stop the line.
    #[allow(clippy::type_complexity, reason = "its parts are what the caller has to write")]
    pub after: &'a dyn Fn(&Model, &str, &Outcome) -> Result<ControlFlow<()>>,
}

/// The result of a conversion.
#[derive(Debug)]
pub struct Converted {
    /// The model.
    pub model: Model,
    /// Constants that were a float tensor and its quantizer and are codes now.
    pub folded: Vec<Note>,
    /// Quantizers that are float operators now.
    pub simulated: Vec<Note>,
    /// What was left as it is, and why.
    pub kept: Vec<Note>,
    /// What the target would compute wrongly, and did not in the input.
    pub warnings: Vec<String>,
}

/// Folds the quantizers of constants.
///
/// # Errors
/// A pass fails: scales or zero points that do not fit their tensor, with the node. The input is unchanged.
pub fn convert(original: &Model, request: &Request<'_>) -> Result<Converted> {
    let already = check::violations(original, request.target);
    let mut model = original.clone();
    let (mut folded, mut simulated, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    let context = Context { evaluate: request.evaluate, quantization: None };
    let mut after = |model: &Model, name: &str, outcome: &Outcome| {
        if name == Simulate.name() {
            simulated.extend(outcome.changes.iter().cloned());
            kept.extend(outcome.skips.iter().cloned());
        }
        if name == FoldWeights.name() {
            folded.extend(outcome.changes.iter().cloned());
            kept.extend(outcome.skips.iter().cloned());
        }
        (request.after)(model, name, outcome)
    };
    pipeline::run(&mut model, FOLD, &context, &mut after)?;
    if request.simulate {
        pipeline::run(&mut model, &[&Simulate, &DropDead], &context, &mut after)?;
    }
    model.set_metadata("amax.version", env!("CARGO_PKG_VERSION"));
    let mut warnings = check::violations(&model, request.target);
    warnings.retain(|w| !already.contains(w));
    Ok(Converted { model, folded, simulated, kept, warnings })
}
