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
use crate::passes::lower_matmulnbits::LowerMatmulnbits;
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
use crate::passes::{Change, Context, Evaluate, Note, Outcome, Pass, pipeline};
use crate::reason::Reason;
use crate::targets::{Target, check};

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

/// What to do.
pub struct Request<'a> {
    /// Whether quantizers then become float operators; see [`simulate`](crate::passes::simulate).
    pub simulate: bool,
    /// What quantized constants become; empty to leave them as they are. One for products and one for tables go together.
    pub into: &'a [To],
    /// Whether the scales of weights stay as they are where a `BatchNormalization` behind could be fused into them.
    pub keep_scales: bool,
    /// `accuracy_level` of new `MatMulNBits`.
    pub accuracy_level: u8,
    /// Sites whose quantizers are taken out, and sites that keep theirs; the last to match decides.
    pub switches: &'a [Switch],
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

/// Folds the quantizers of constants, and stores what is quantized in other forms, with the same codes and scales.
///
/// # Errors
/// Forms that exclude each other; switches that match nothing; a pass fails: scales or zero points that do not fit their tensor, with the node. The input is unchanged.
pub fn convert(original: &Model, request: &Request<'_>) -> Result<Converted> {
    let lower = LowerMatmulnbits { accuracy_level: i64::from(request.accuracy_level) };
    let fuse = FuseScales { keep_scales: request.keep_scales };
    let mut passes = passes(request.into, &fuse, &lower)?;
    if !request.switches.is_empty() {
        // The floats of codes that were taken out lie on a grid.
        passes.retain(|pass| pass.name() != RecoverCodes.name());
    }
    let already = check::violations(original, request.target);
    let mut model = original.clone();
    let (mut folded, mut changed, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    let mut simulated = Vec::new();
    let context = Context { evaluate: request.evaluate, quantization: None };
    let mut after = |model: &Model, name: &str, outcome: &Outcome| {
        if name == Simulate.name() {
            simulated.extend(outcome.changes.iter().cloned());
        }
        if [FoldWeights.name(), FoldFakeQuant.name(), RecoverCodes.name()].contains(&name) {
            let made = |note: &&Note<Change>| note.what.stores();
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
        (request.after)(model, name, outcome)
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
    let mut warnings = check::violations(&model, request.target);
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
