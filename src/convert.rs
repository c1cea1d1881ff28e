//! What is quantized already, in another form: quantizers of constants are folded, and codes and scales carried over.

use std::ops::ControlFlow;

use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::onnx::DataType;
use crate::ops::Form;
use crate::passes::pipeline::{self, After};
use crate::passes::recipes::{CONVERT, Conversion, Notes, READ, Recipe, To, When};
use crate::passes::switch_quantizers::Switch;
use crate::passes::{Change, Context, Evaluate, Note};
use crate::reason::Reason;
use crate::runtime::TractEvaluate;
use crate::targets::{self, Target, check};

/// Stores what is quantized already in another form, with the same codes and scales; quantizers of constants are folded.
#[derive(Clone, Copy)]
#[must_use = "nothing is done before `run`"]
pub struct Convert<'a> {
    model: &'a Model,
    conversion: Conversion<'a>,
    target: Option<&'a Target>,
    evaluate: &'a dyn Evaluate,
    after: Option<&'a After<'a>>,
}

impl<'a> Convert<'a> {
    /// A conversion of `model` that folds the quantizers of constants, and leaves forms as they are.
    pub fn new(model: &'a Model) -> Self {
        Self { model, conversion: Conversion::default(), target: None, evaluate: &TractEvaluate, after: None }
    }

    /// What quantized constants become. One for products and one for tables go together.
    pub fn to(mut self, forms: &'a [To]) -> Self {
        self.conversion.to = forms;
        self
    }

    /// Whether quantizers then become float operators with the same results: no unless this says otherwise.
    pub fn simulate(mut self, simulate: bool) -> Self {
        self.conversion.simulate = simulate;
        self
    }

    /// A float type of 16 bits, [`DataType::Float16`] or [`DataType::Bfloat16`], for what computes in float32: none unless this
    /// says otherwise.
    pub fn dtype(mut self, dtype: impl Into<Option<DataType>>) -> Self {
        self.conversion.dtype = dtype.into();
        self
    }

    /// Whether the scales of weights stay as they are where a `BatchNormalization` behind could be fused into them: no
    /// unless this says otherwise.
    pub fn keep_scales(mut self, keep: bool) -> Self {
        self.conversion.keep_scales = keep;
        self
    }

    /// `accuracy_level` of new `MatMulNBits`, 0 to 4: 4 unless this says otherwise, which lets the runtime quantize the other
    /// operand to int8.
    pub fn accuracy_level(mut self, level: u8) -> Self {
        self.conversion.accuracy_level = level;
        self
    }

    /// Sites whose quantizers are taken out first, and sites that keep theirs; the last to match decides.
    pub fn switches(mut self, switches: &'a [Switch]) -> Self {
        self.conversion.switches = switches;
        self
    }

    /// Where the result runs, [`targets::DEFAULT`] unless this says otherwise: what it would compute wrongly becomes a warning.
    pub fn target(mut self, target: &'a Target) -> Self {
        self.target = Some(target);
        self
    }

    /// What computes constant nodes that amax itself does not: tract, where it is built in.
    #[doc(hidden)]
    pub fn evaluate(mut self, evaluate: &'a dyn Evaluate) -> Self {
        self.evaluate = evaluate;
        self
    }

    /// Called after each pass; may stop the conversion.
    #[doc(hidden)]
    pub fn after(mut self, after: impl Into<Option<&'a After<'a>>>) -> Self {
        self.after = after.into();
        self
    }

    /// Converts the model, which itself stays as it is.
    ///
    /// # Errors
    /// Forms that exclude each other; switches that match nothing; a pass that fails: scales or zero points that do not fit
    /// their tensor, with the node.
    pub fn run(&self) -> Result<Converted> {
        let loaded;
        let target = if let Some(target) = self.target {
            target
        } else {
            loaded = Target::load(targets::DEFAULT)?;
            &loaded
        };
        check_forms(self.conversion.to)?;
        let already = check::violations(self.model, target);
        let context = Context { conversion: self.conversion, ..Context::new(self.evaluate) };
        let mut done = Converted::new(self.model);
        let mut served = Vec::new();
        let mut flow = done.follow(&READ, &context, self.after, &mut served)?;
        if flow.is_continue() {
            done.reference = (!self.conversion.switches.is_empty()).then(|| done.model.clone());
            flow = done.follow(&CONVERT, &context, self.after, &mut served)?;
        }
        if flow.is_continue() {
            for &to in self.conversion.to.iter().filter(|to| !served.contains(to)) {
                let what = Reason::NothingToStore { form: to.name().to_owned(), wanted: to.stores().to_owned() };
                done.kept.push(Note { at: "model".to_owned(), what });
            }
            done.model.set_metadata("amax.version", env!("CARGO_PKG_VERSION"));
        }
        done.warnings = check::violations(&done.model, target);
        done.warnings.retain(|w| !already.contains(w));
        Ok(done)
    }
}

/// The result of a conversion.
#[derive(Debug)]
#[non_exhaustive]
pub struct Converted {
    /// The model.
    pub model: Model,
    /// The original without the quantizers that were taken out, where some were: what the result is to be compared with.
    pub reference: Option<Model>,
    /// Constants that were a float tensor and its quantizer and are codes now.
    pub folded: Vec<Note<Change>>,
    /// Quantizers that are float operators now.
    pub simulated: Vec<Note<Change>>,
    /// Nodes that changed their form.
    pub changed: Vec<Note<Change>>,
    /// What was left as it is, and why.
    pub kept: Vec<Note<Reason>>,
    /// What the target would compute wrongly, and did not in the input.
    pub warnings: Vec<String>,
}

impl Converted {
    fn new(model: &Model) -> Self {
        Self {
            model: model.clone(),
            reference: None,
            folded: Vec::new(),
            simulated: Vec::new(),
            changed: Vec::new(),
            kept: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Runs a recipe on the model, and lists what its steps did where they say that it belongs, and the forms that something
    /// was or could not be stored in.
    fn follow(
        &mut self,
        recipe: &Recipe,
        context: &Context<'_>,
        after: Option<&After<'_>>,
        served: &mut Vec<To>,
    ) -> Result<ControlFlow<()>> {
        for step in recipe.steps(&context.conversion) {
            let outcome = pipeline::apply(&mut self.model, step.pass, context)?;
            if let Some(after) = after
                && after(&self.model, step.pass.name(), &outcome)?.is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
            if let When::To(forms) = step.when
                && !(outcome.changes.is_empty() && outcome.skips.is_empty())
            {
                served.extend(forms);
            }
            match step.notes {
                Notes::Nothing => continue,
                Notes::Kept => {}
                Notes::Changed => self.changed.extend(outcome.changes),
                Notes::Simulated => self.simulated.extend(outcome.changes),
                Notes::Folded => {
                    let (folded, changed): (Vec<_>, Vec<_>) =
                        outcome.changes.into_iter().partition(|note| note.what.stores());
                    self.folded.extend(folded);
                    self.changed.extend(changed);
                }
            }
            self.kept.extend(outcome.skips);
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Refuses forms of which one leaves nothing to another.
fn check_forms(to: &[To]) -> Result<()> {
    let alone = [To::Form(Form::Qdq), To::Float];
    match alone.into_iter().find(|only| to.contains(only) && to.iter().any(|other| other != only)) {
        None => Ok(()),
        Some(only) => {
            let message = format!("\"{}\" is for everything, and leaves nothing to another form", only.name());
            Err(Error::new(Kind::Usage, message).with_hint("give one of them"))
        }
    }
}
