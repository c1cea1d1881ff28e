//! The passes in the order in which they run, and the one function that runs them.

use std::ops::ControlFlow;

use super::{
    Context, Outcome, Pass,
    dequantize::Dequantize,
    drop_dead::DropDead,
    fold_clips::FoldClips,
    fold_constants::FoldConstants,
    fold_fake_quant::FoldFakeQuant,
    fold_weights::FoldWeights,
    freeze_inputs::FreezeInputs,
    fuse_batchnorm::FuseBatchnorm,
    fuse_scales::FuseScales,
    insert_qdq::InsertQdq,
    lift_constants::LiftConstants,
    lower_gather::LowerGather,
    lower_lstm::LowerLstm,
    lower_matmulinteger::LowerMatmulinteger,
    lower_matmulnbits::{ACCURACY_LEVEL, LowerMatmulnbits},
    lower_qoperator::LowerQoperator,
    name_quantizers::NameQuantizers,
    per_token::PerToken,
    raise_opset::RaiseOpset,
    raise_qdq::RaiseQdq,
    raise_qoperator::RaiseQoperator,
    recover_codes::RecoverCodes,
    settle_quantizers::SettleQuantizers,
    simulate::Simulate,
    standard_quantizers::StandardQuantizers,
    unfold_weights::UnfoldWeights,
};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Scratch, verify};
use crate::nearest::nearest;

/// Before planning: brings a float model into the form that the planner knows. Outputs stay as they were, but for the
/// rounding of fused weights.
pub const PREPARE: &[&dyn Pass] = &[&FreezeInputs, &LiftConstants, &FoldConstants, &FuseBatchnorm, &DropDead];

/// After solving: applies the plan.
pub const QUANTIZE: &[&dyn Pass] = &[
    &RaiseOpset,
    &InsertQdq,
    &FoldWeights,
    &PerToken,
    &Simulate,
    &LowerMatmulnbits { accuracy_level: ACCURACY_LEVEL },
    &LowerMatmulinteger,
    &LowerLstm,
    &LowerGather,
    &DropDead,
];

/// After solving, where weights are to stay floats: the plan as fake quantizers.
pub const FAKE: &[&dyn Pass] =
    &[&RaiseOpset, &InsertQdq, &FoldWeights, &UnfoldWeights, &PerToken, &Simulate, &DropDead];

/// Before conversions: reads what training frameworks export, and makes codes of what they quantize in fake.
pub const IMPORT: &[&dyn Pass] = &[
    &StandardQuantizers,
    &FoldFakeQuant,
    &SettleQuantizers,
    &FoldClips,
    &NameQuantizers,
    &RecoverCodes,
    &FuseScales { keep_scales: false },
];

/// Other forms of what is quantized, for conversions: each is right for any model, and they undo each other.
pub const FORMS: &[&dyn Pass] = &[
    &RaiseQoperator,
    &RaiseQdq,
    &Dequantize,
    &LowerQoperator,
    &LowerMatmulnbits { accuracy_level: ACCURACY_LEVEL },
    &LowerMatmulinteger,
    &LowerLstm,
    &LowerGather,
];

/// Every pass, each once, in run order.
#[must_use]
pub fn all() -> Vec<&'static dyn Pass> {
    let mut found: Vec<&'static dyn Pass> = Vec::new();
    for &pass in PREPARE.iter().chain(IMPORT).chain(FAKE).chain(QUANTIZE).chain(FORMS) {
        if found.iter().all(|known| known.name() != pass.name()) {
            found.push(pass);
        }
    }
    found
}

/// What is called after each pass, with the model, the name of the pass and what it did.
pub type After<'a> = &'a mut dyn FnMut(&Model, &str, &Outcome) -> Result<ControlFlow<()>>;

/// Runs `passes` in turn, verifies the model after each, and hands it to `after` with the pass's name and outcome;
/// `after` may stop the run.
///
/// # Errors
/// A pass or `after` fails, or a pass leaves an invalid model ([`Kind::Internal`]). The pass is named.
pub fn run(model: &mut Model, passes: &[&dyn Pass], context: &Context<'_>, after: After<'_>) -> Result<()> {
    for pass in passes {
        let name = pass.name();
        let outcome = pass.run(model, context).map_err(|e| e.in_pass(name))?;
        model.scratch().map_or(Ok(()), Scratch::check)?;
        verify::verify(model).map_err(|e| {
            Error::new(Kind::Internal, format!("the pass left an invalid model: {}", e.message())).in_pass(name)
        })?;
        if after(model, name, &outcome).map_err(|e| e.in_pass(name))?.is_break() {
            break;
        }
    }
    Ok(())
}

/// Reads a comma-separated list of pass names; blanks around names are ignored, and an empty list is no pass.
///
/// # Errors
/// [`Kind::Usage`] for a name that is no pass, with the nearest that is.
pub fn parse_pipeline(text: &str) -> Result<Vec<&'static dyn Pass>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let known = all();
    text.split(',').map(str::trim).map(|name| find(&known, name)).collect()
}

fn find(known: &[&'static dyn Pass], name: &str) -> Result<&'static dyn Pass> {
    if let Some(&pass) = known.iter().find(|pass| pass.name() == name) {
        return Ok(pass);
    }
    let names: Vec<&str> = known.iter().map(|pass| pass.name()).collect();
    let error = Error::new(Kind::Usage, format!("there is no pass \"{name}\""));
    Err(match nearest(name, names.iter().copied()) {
        Some(meant) => error.with_hint(format!("did you mean \"{meant}\"?")),
        None => error.with_hint(format!("the passes are {}", names.join(", "))),
    })
}

/// The list that [`parse_pipeline`] reads back as `passes`.
#[must_use]
pub fn print_pipeline(passes: &[&dyn Pass]) -> String {
    passes.iter().map(|pass| pass.name()).collect::<Vec<_>>().join(",")
}
