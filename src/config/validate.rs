//! What is wrong within one spec, whatever the other levels, the model and the target.
//!
//! Only keys that stand in the same spec are held against each other: what is inherited may be replaced. Keys that do not
//! fit what is inherited are found where a site is planned.

use super::spec::{Arithmetic, Dtype, Field, Form, ObserverKind, ScaleDtype, ScaleType, Share};
use super::{Level, SiteKind, Spec};
use crate::error::{Error, Kind};
use crate::quant::{Format, Observer, Round, check_least_scale};

/// A key, what is wrong with it, and a way out.
type Wrong = (Field, String, &'static str);

impl Level {
    /// Contradictions within one of its specs.
    ///
    /// # Errors
    /// The first of them, with its key: `weight.group_size`.
    pub fn validate(&self) -> Result<(), (String, Error)> {
        if let Some(algorithm) = &self.algorithm {
            algorithm.validate().map_err(|e| ("algorithm".to_owned(), e))?;
        }
        for kind in SiteKind::ALL {
            let Some(spec) = self.spec(kind) else { continue };
            if let Some((field, message, hint)) = contradiction(spec, kind) {
                let key = format!("{}.{}", kind.name(), field.name());
                let error = Error::new(Kind::Config, format!("{key}: {message}"));
                return Err((key, if hint.is_empty() { error } else { error.with_hint(hint) }));
            }
        }
        Ok(())
    }
}

fn contradiction(spec: &Spec, kind: SiteKind) -> Option<Wrong> {
    numbers(spec).or_else(|| roles(spec, kind)).or_else(|| pairs(spec)).or_else(|| formats(spec))
}

/// Numbers out of range.
fn numbers(spec: &Spec) -> Option<Wrong> {
    for (field, observer) in
        [(Field::Percentile, spec.percentile.map(Observer::Percentile)), (Field::MseP, spec.mse_p.map(Observer::Mse))]
    {
        if let Some(Err((message, hint))) = observer.map(Observer::wrong) {
            return Some((field, message, hint));
        }
    }
    if let Some(Err(message)) = spec.eps.map(check_least_scale) {
        return Some((Field::Eps, message, ""));
    }
    let wrong = |field, message: String, hint| Some((field, message, hint));
    match *spec {
        Spec { group_size: Some(0), .. } => {
            wrong(Field::GroupSize, "a group has at least one element".into(), "give 32 or 128")
        }
        Spec { postprocess: Some(p), .. } => {
            p.check().err().and_then(|(message, hint)| wrong(Field::Postprocess, message, hint))
        }
        Spec { accuracy_level: Some(level), .. } if level > 4 => {
            let hint = "4 is fastest, 1 computes in float32";
            wrong(Field::AccuracyLevel, format!("{level} is not a level from 0 to 4"), hint)
        }
        _ => None,
    }
}

/// Keys that make no sense for a kind of site.
fn roles(spec: &Spec, kind: SiteKind) -> Option<Wrong> {
    let constant = matches!(kind, SiteKind::Weight | SiteKind::Bias);
    if spec.dtype == Some(Dtype::Element(Format::Int32)) && kind != SiteKind::Bias {
        return Some((Field::Dtype, "int32 is for biases".into(), "int16 is the widest that others can have"));
    }
    if kind != SiteKind::Weight {
        for (field, said) in [(Field::Form, spec.form.is_some()), (Field::AccuracyLevel, spec.accuracy_level.is_some())]
        {
            if said {
                let message = "only weights have a storage format";
                return Some((field, message.into(), "set it for weight"));
            }
        }
    }
    if constant && spec.dynamic == Some(true) {
        return Some((Field::Dynamic, format!("a {} is the same at every run", kind.name()), "set it for input"));
    }
    if constant && spec.granularity == Some(Share::PerToken) {
        let hint = "per-channel is the nearest";
        return Some((Field::Granularity, format!("a {} has no tokens", kind.name()), hint));
    }
    if kind != SiteKind::Weight {
        let message = "it is for weights, which are quantized before the model runs";
        let plain = spec.arithmetic.is_none_or(|a| a == Arithmetic::Onnx);
        for (field, on) in [(Field::SignedScale, spec.signed_scale == Some(true)), (Field::Arithmetic, !plain)] {
            if on {
                return Some((field, message.into(), "leave it out"));
            }
        }
    }
    if kind == SiteKind::Output && spec.dynamic == Some(true) {
        return Some((Field::Dynamic, "only inputs are quantized at run time".into(), "set it for input"));
    }
    None
}

/// Keys that contradict each other.
fn pairs(spec: &Spec) -> Option<Wrong> {
    if spec.signed_scale == Some(true) {
        let message = "signed scales require a symmetric format and use its lowest integer";
        if spec.symmetric == Some(false) {
            return Some((Field::SignedScale, message.into(), "symmetric = true, or leave it out"));
        }
        if spec.narrow_range == Some(true) {
            return Some((Field::SignedScale, message.into(), "narrow_range = false, or leave it out"));
        }
    }
    if let (Some(_), Some(arithmetic)) = (spec.round, spec.arithmetic)
        && arithmetic != Arithmetic::Onnx
    {
        return Some((Field::Round, "the chosen arithmetic has its own rounding".into(), "leave it out"));
    }
    if let Some(share) = spec.granularity {
        if spec.group_size.is_some() && share != Share::PerGroup {
            let hint = "leave it out, or granularity = \"per-group\"";
            return Some((Field::GroupSize, format!("{} scales have no group size", share.name()), hint));
        }
        if spec.ch_axis.is_some() && matches!(share, Share::PerTensor | Share::PerToken) {
            let hint = "leave it out, or granularity = \"per-channel\"";
            return Some((Field::ChAxis, format!("{} scales have no axis to choose", share.name()), hint));
        }
        if share == Share::PerToken && spec.dynamic == Some(false) {
            let hint = "dynamic = true, or granularity = \"per-tensor\"";
            return Some((Field::Dynamic, "scales per token are computed each time the model runs".into(), hint));
        }
    }
    if let (Some(form), Some(_)) = (spec.form, spec.accuracy_level)
        && form != Form::Matmulnbits
    {
        let hint = "leave it out, or form = \"matmulnbits\"";
        return Some((Field::AccuracyLevel, format!("{form} has no accuracy levels"), hint));
    }
    if let Some(observer) = spec.observer {
        if spec.percentile.is_some() && observer != ObserverKind::Percentile {
            return Some((Field::Percentile, "it is for another observer".into(), "observer = \"percentile\""));
        }
        if spec.mse_p.is_some() && observer != ObserverKind::Mse {
            return Some((Field::MseP, "it is for another observer".into(), "observer = \"mse\""));
        }
        if spec.dynamic == Some(true) && observer != ObserverKind::Minmax {
            let message = "dynamic ranges are always minimum to maximum";
            return Some((Field::Observer, message.into(), "leave it out, or dynamic = false"));
        }
    }
    None
}

/// Keys that the number format cannot use.
fn formats(spec: &Spec) -> Option<Wrong> {
    if spec.scale_dtype.is_some_and(ScaleDtype::is_block) {
        if let Some(share) = spec.granularity.filter(|&share| share != Share::PerGroup) {
            let message = format!("{} scales do not have 8 bits", share.name());
            return Some((Field::ScaleDtype, message, "8-bit scales require granularity = \"per-group\""));
        }
        if spec.symmetric == Some(false) {
            let message = "8-bit scales do not allow zero points";
            return Some((Field::Symmetric, message.into(), "leave it out, or set it to true"));
        }
    }
    let dtype = spec.dtype?;
    let block = dtype.block();
    let integer = dtype.format().is_integer();
    if (block.is_some() || !integer) && spec.symmetric == Some(false) {
        return Some((Field::Symmetric, format!("{dtype} has no zero point"), "leave it out, or set it to true"));
    }
    if !integer {
        for (field, on) in [(Field::NarrowRange, spec.narrow_range), (Field::ReduceRange, spec.reduce_range)] {
            if on == Some(true) {
                return Some((field, format!("{dtype} has no integers to leave unused"), "it is for integers"));
            }
        }
        if spec.round.is_some_and(|round| round != Round::HalfEven) {
            return Some((Field::Round, format!("{dtype} is rounded half to even"), "leave it out"));
        }
        if spec.signed_scale == Some(true) {
            return Some((
                Field::SignedScale,
                format!("{dtype} has as many values below zero as above"),
                "leave it out",
            ));
        }
        if spec.arithmetic.is_some_and(|a| a != Arithmetic::Onnx) {
            return Some((Field::Arithmetic, format!("{dtype} is computed as ONNX defines it"), "it is for integers"));
        }
    } else if dtype == Dtype::Element(Format::Int32) && spec.symmetric == Some(false) {
        return Some((Field::Symmetric, "an int32 bias has no zero point".into(), "leave it out"));
    }
    let block = block?;
    let fixed = "leave it out: it follows from the format";
    if spec.granularity.is_some_and(|share| share != Share::PerGroup) {
        return Some((Field::Granularity, format!("{dtype} has one scale per block"), fixed));
    }
    if spec.group_size.is_some_and(|given| given != block.size()) {
        return Some((Field::GroupSize, format!("{dtype} has blocks of {}", block.size()), fixed));
    }
    if spec.scale_dtype.is_some_and(|given| given != block.scale()) {
        return Some((Field::ScaleDtype, format!("{dtype} has other scales"), fixed));
    }
    let powers = block.scale() == ScaleDtype::Float8e8m0;
    if spec.scale_type.is_some_and(|given| (given == ScaleType::PowerOfTwo) != powers) {
        return Some((Field::ScaleType, format!("{dtype} has other scales"), fixed));
    }
    if spec.mx_rounding.is_some() && !powers {
        return Some((Field::MxRounding, format!("{dtype} has no power-of-two scales"), "it is for the mx formats"));
    }
    None
}
