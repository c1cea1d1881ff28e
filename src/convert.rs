//! What is quantized already, in another form: quantizers of constants are folded, and codes and scales carried over.

use std::ops::ControlFlow;

use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::ops::Form;
use crate::passes::dequantize::Dequantize;
use crate::passes::drop_dead::DropDead;
use crate::passes::fold_clips::FoldClips;
use crate::passes::fold_fake_quant::FoldFakeQuant;
use crate::passes::fold_weights::FoldWeights;
use crate::passes::freeze_inputs::FreezeInputs;
use crate::passes::fuse_scales::FuseScales;
use crate::passes::lift_constants::LiftConstants;
use crate::passes::lower_gather::LowerGather;
use crate::passes::lower_lstm::LowerLstm;
use crate::passes::lower_matmulinteger::LowerMatmulinteger;
use crate::passes::lower_matmulnbits::{ACCURACY_LEVEL, LowerMatmulnbits};
use crate::passes::lower_qoperator::LowerQoperator;
use crate::passes::name_quantizers::NameQuantizers;
use crate::passes::pipeline::FORMS;
use crate::passes::raise_qdq::RaiseQdq;
use crate::passes::raise_qoperator::RaiseQoperator;
use crate::passes::recover_codes::RecoverCodes;
use crate::passes::settle_quantizers::SettleQuantizers;
use crate::passes::simulate::Simulate;
use crate::passes::standard_quantizers::StandardQuantizers;
use crate::passes::support::switch_quantizers::{Switch, switch};
use crate::passes::{Context, Evaluate, Note, Outcome, Pass, pipeline};
use crate::rewrite::After;
use crate::runtime::TractEvaluate;
use crate::targets::{self, Target, check};

/// What every conversion begins with: constants where passes look for them, and quantizers of constants folded.
pub const FOLD: &[&dyn Pass] = &[
    &FreezeInputs,
    &LiftConstants,
    &StandardQuantizers,
    &FoldFakeQuant,
    &DropDead,
    &SettleQuantizers,
    &FoldWeights,
    &FoldClips,
    &NameQuantizers,
    &RecoverCodes,
];

/// What the step that takes quantizers out is called where passes are.
const SWITCH: &str = "switch-quantizers";

/// What quantized constants become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// Codes in a form; operators that it is not for stay as they are.
    Form(Form),
    /// The numbers that the codes stand for; the quantizers of activations go too.
    Float,
    /// Operands of operators on codes, those of onnxruntime's `QOperator` format; activations too.
    Qoperator,
}

impl To {
    /// Every word.
    pub const ALL: [Self; 7] = [
        Self::Form(Form::Qdq),
        Self::Form(Form::Matmulnbits),
        Self::Form(Form::GatherBlockQuantized),
        Self::Form(Form::Matmulinteger),
        Self::Form(Form::DynamicQuantizeLstm),
        Self::Qoperator,
        Self::Float,
    ];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Form(form) => form.name(),
            Self::Float => "float",
            Self::Qoperator => "qoperator",
        }
    }
}

/// Stores what is quantized already in another form, with the same codes and scales; quantizers of constants are folded.
#[derive(Clone, Copy)]
#[must_use = "nothing is done before `run`"]
pub struct Convert<'a> {
    model: &'a Model,
    to: &'a [To],
    simulate: bool,
    keep_scales: bool,
    accuracy_level: u8,
    switches: &'a [Switch],
    target: Option<&'a Target>,
    evaluate: &'a dyn Evaluate,
    after: Option<&'a After<'a>>,
}

impl<'a> Convert<'a> {
    /// A conversion of `model` that folds the quantizers of constants, and leaves forms as they are.
    pub fn new(model: &'a Model) -> Self {
        Self {
            model,
            to: &[],
            simulate: false,
            keep_scales: false,
            accuracy_level: ACCURACY_LEVEL as u8,
            switches: &[],
            target: None,
            evaluate: &TractEvaluate,
            after: None,
        }
    }

    /// What quantized constants become. One for products and one for tables go together.
    pub fn to(mut self, forms: &'a [To]) -> Self {
        self.to = forms;
        self
    }

    /// Whether quantizers then become float operators with the same results: no unless this says otherwise.
    pub fn simulate(mut self, simulate: bool) -> Self {
        self.simulate = simulate;
        self
    }

    /// Whether the scales of weights stay as they are where a `BatchNormalization` behind could be fused into them: no
    /// unless this says otherwise.
    pub fn keep_scales(mut self, keep: bool) -> Self {
        self.keep_scales = keep;
        self
    }

    /// `accuracy_level` of new `MatMulNBits`, 0 to 4: 4 unless this says otherwise, which lets the runtime quantize the other
    /// operand to int8.
    pub fn accuracy_level(mut self, level: u8) -> Self {
        self.accuracy_level = level;
        self
    }

    /// Sites whose quantizers are taken out first, and sites that keep theirs; the last to match decides.
    pub fn switches(mut self, switches: &'a [Switch]) -> Self {
        self.switches = switches;
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
        let target = match self.target {
            Some(target) => target,
            None => {
                loaded = Target::load(targets::DEFAULT)?;
                &loaded
            }
        };
        convert(self.model, self, target)
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
    pub folded: Vec<Note>,
    /// Quantizers that are float operators now.
    pub simulated: Vec<Note>,
    /// Nodes that changed their form.
    pub changed: Vec<Note>,
    /// What was left as it is, and why.
    pub kept: Vec<Note>,
    /// What the target would compute wrongly, and did not in the input.
    pub warnings: Vec<String>,
}

fn convert(original: &Model, request: &Convert<'_>, target: &Target) -> Result<Converted> {
    let lower = LowerMatmulnbits { accuracy_level: i64::from(request.accuracy_level) };
    let fuse = FuseScales { keep_scales: request.keep_scales };
    let mut passes = passes(request.to, &fuse, &lower)?;
    if !request.switches.is_empty() {
        // The floats of codes that were taken out lie on a grid.
        passes.retain(|pass| pass.name() != RecoverCodes.name());
    }
    let already = check::violations(original, target);
    let mut model = original.clone();
    let (mut folded, mut changed, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    let mut simulated = Vec::new();
    let context = Context { evaluate: request.evaluate, quantization: None };
    let mut after = |model: &Model, name: &str, outcome: &Outcome| {
        if name == Simulate.name() {
            simulated.extend(outcome.changes.iter().cloned());
        }
        if [FoldWeights.name(), FoldFakeQuant.name(), RecoverCodes.name()].contains(&name) {
            let made = |note: &&Note| note.text.contains("stored as");
            folded.extend(outcome.changes.iter().filter(made).cloned());
            changed.extend(outcome.changes.iter().filter(|n| !made(n)).cloned());
        } else if [StandardQuantizers.name(), NameQuantizers.name(), FoldClips.name(), fuse.name(), SWITCH]
            .contains(&name)
            || FORMS.iter().any(|pass| pass.name() == name)
        {
            changed.extend(outcome.changes.iter().cloned());
        }
        if ![FreezeInputs.name(), LiftConstants.name(), DropDead.name()].contains(&name) {
            kept.extend(outcome.skips.iter().cloned());
        }
        request.after.map_or(Ok(ControlFlow::Continue(())), |after| after(model, name, outcome))
    };
    let mut reference = None;
    if !request.switches.is_empty() {
        let first: [&dyn Pass; 3] = [&FreezeInputs, &LiftConstants, &StandardQuantizers];
        pipeline::run(&mut model, &first, &context, &mut after)?;
        let outcome = switch(&mut model, request.switches)?;
        let _ = after(&model, SWITCH, &outcome)?;
        reference = Some(model.clone());
    }
    pipeline::run(&mut model, &passes, &context, &mut after)?;
    if request.simulate {
        pipeline::run(&mut model, &[&Simulate, &DropDead], &context, &mut after)?;
    }
    model.set_metadata("amax.version", env!("CARGO_PKG_VERSION"));
    let mut warnings = check::violations(&model, target);
    warnings.retain(|w| !already.contains(w));
    Ok(Converted { model, reference, folded, simulated, changed, kept, warnings })
}

/// The passes that make these of a model.
fn passes<'a>(into: &[To], fuse: &'a FuseScales, lower: &'a LowerMatmulnbits) -> Result<Vec<&'a dyn Pass>> {
    let has = |what: To| into.contains(&what);
    let alone = [To::Form(Form::Qdq), To::Float];
    if let Some(only) = alone.into_iter().find(|&only| has(only) && into.iter().any(|&other| other != only)) {
        let message = format!("\"{}\" is for everything, and leaves nothing to another form", only.name());
        return Err(Error::new(Kind::Usage, message).with_hint("give one of them"));
    }
    let mut passes: Vec<&dyn Pass> = FOLD.to_vec();
    passes.extend([fuse as &dyn Pass, &DropDead]);
    if has(To::Form(Form::Qdq)) || has(To::Float) {
        passes.push(&RaiseQoperator);
    }
    if has(To::Form(Form::Qdq)) {
        passes.push(&RaiseQdq);
    }
    if has(To::Float) {
        passes.push(&Dequantize);
    }
    if has(To::Qoperator) {
        passes.push(&LowerQoperator);
    }
    // Tables look for products with the same weight.
    if has(To::Form(Form::Matmulnbits)) {
        passes.push(lower);
    }
    if has(To::Form(Form::Matmulinteger)) {
        passes.push(&LowerMatmulinteger);
    }
    if has(To::Form(Form::DynamicQuantizeLstm)) {
        passes.push(&LowerLstm);
    }
    if has(To::Form(Form::GatherBlockQuantized)) {
        passes.push(&LowerGather);
    }
    if !into.is_empty() {
        passes.push(&DropDead);
    }
    Ok(passes)
}
