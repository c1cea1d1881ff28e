//! How numbers become codes, with nothing left open.

use std::collections::BTreeSet;
use std::fmt::Display;

use serde::{Deserialize, Serialize};

use super::algorithm::Algorithm;
use super::{
    Arithmetic, Format, Granularity, MxRounding, Observer, ObserverKind, Postprocess, QParams, RangeSpec, Round,
    ScaleDtype, ScaleType, Symmetry,
};
use crate::error::{Error, Kind, Result};
use crate::onnx::DataType;

/// How numbers become codes: a spec with nothing left open.
#[allow(clippy::struct_excessive_bools, reason = "the document's own keys")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Element format.
    pub dtype: Format,
    /// Whether the zero point is fixed in the middle of the format's range.
    pub symmetric: bool,
    /// How many values share a scale.
    #[serde(default = "per_tensor", skip_serializing_if = "is_per_tensor")]
    pub granularity: Granularity,
    /// Whether the lowest code is left unused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub narrow_range: bool,
    /// Whether one bit of the range is left unused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reduce_range: bool,
    /// How the range is chosen.
    #[serde(default, skip_serializing_if = "is_default")]
    pub observer: ObserverKind,
    /// Percent of the values that the percentile observer keeps in range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percentile: Option<f64>,
    /// The power of the error that the mse observer makes least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mse_p: Option<f64>,
    /// Which scales are allowed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_type: ScaleType,
    /// The precision that scales are rounded to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_dtype: ScaleDtype,
    /// How the power of two of a block follows from its largest magnitude.
    #[serde(default, skip_serializing_if = "is_default")]
    pub mx_rounding: MxRounding,
    /// How quotients become codes; half to even for everything but constants.
    #[serde(default, skip_serializing_if = "is_default")]
    pub round: Round,
    /// The least scale, 0 for none; of two-level scales the least scale of a block, in the arithmetic of mslk the least
    /// range. Above 0, ONNX's arithmetic computes scales in float32 ([`Arithmetic::precision`]).
    #[serde(default, skip_serializing_if = "is_default")]
    pub eps: f32,
    /// What becomes of the range that the observer chose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postprocess: Option<Postprocess>,
    /// Whether the scale may be negative, for the sake of the lowest code.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub signed_scale: bool,
    /// Whose arithmetic makes scales and codes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub arithmetic: Arithmetic,
    /// Whether zero points may be fractional.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub float_zero_point: bool,
    /// What improves scale and zero point of a weight beyond its range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Box<Algorithm>>,
    /// Ranges and scales fixed by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<Given>,
}

/// Ranges and scales fixed by the user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Given {
    /// The smallest and the largest value.
    Range(f32, f32),
    /// Scales and zero points: one, or as many as the granularity has.
    Scales {
        /// Sizes of a step.
        scales: Vec<f32>,
        /// Codes of zero, as many.
        zero_points: Vec<i32>,
    },
}

fn per_tensor() -> Granularity {
    Granularity::PerTensor
}

fn is_per_tensor(granularity: &Granularity) -> bool {
    *granularity == Granularity::PerTensor
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What is wrong with a least scale.
///
/// # Errors
/// It is neither 0 nor a positive normal f32.
pub fn check_least_scale<T: Copy + Display + Into<f64>>(eps: T) -> std::result::Result<(), String> {
    let least = eps.into();
    if least == 0.0 || (least > 0.0 && (least as f32).is_normal()) {
        return Ok(());
    }
    Err(format!("the least scale is {eps}, which is neither 0 for none nor a positive number such as 1e-6"))
}

impl Scheme {
    /// A scheme of a format with nothing else asked for; the lowest code is left unused where symmetric.
    #[must_use]
    pub fn new(dtype: Format, symmetric: bool, granularity: Granularity) -> Self {
        Self {
            dtype,
            symmetric,
            granularity,
            narrow_range: symmetric && dtype.is_integer(),
            reduce_range: false,
            observer: ObserverKind::Minmax,
            percentile: None,
            mse_p: None,
            scale_type: ScaleType::Float,
            scale_dtype: ScaleDtype::Float32,
            mx_rounding: MxRounding::default(),
            round: Round::HalfEven,
            eps: 0.0,
            postprocess: None,
            signed_scale: false,
            arithmetic: Arithmetic::Onnx,
            float_zero_point: false,
            algorithm: None,
            given: None,
        }
    }

    /// The opset and the IR version from which on Quantize and Dequantize have this, and the name of what needs them.
    #[must_use]
    pub fn since(&self) -> (i64, i64, &'static str) {
        let (opset, ir) = DataType::from(self.dtype).quantizers_since().unwrap_or_default();
        let opset = opset.max(13);
        let groups =
            matches!(self.granularity, Granularity::PerGroup { .. }).then_some((21, 10, "one scale per group"));
        let scale = self.scale_dtype.stored().and_then(DataType::quantizers_since);
        let scale = scale.map(|(opset, ir)| (opset, ir, self.scale_dtype.name()));
        [groups, scale]
            .into_iter()
            .flatten()
            .fold((opset, ir, self.dtype.name()), |most, need| if need.0 > most.0 { need } else { most })
    }

    /// In words: `int4, groups of 32 on axis 0`.
    #[must_use]
    pub fn describe(&self) -> String {
        let plain = Self::new(self.dtype, self.symmetric, self.granularity);
        let mut words = vec![self.dtype.name().to_owned()];
        if self.dtype.is_integer() {
            words.push(if self.symmetric { "symmetric" } else { "asymmetric" }.to_owned());
        }
        match self.granularity {
            Granularity::PerTensor => words.push("one scale".to_owned()),
            Granularity::PerChannel { axis } => words.push(format!("a scale for each index of axis {axis}")),
            Granularity::PerGroup { axis, size } => words.push(format!("groups of {size} on axis {axis}")),
        }
        // What is not as usual, under the names that the plan has for it.
        if let (Ok(serde_json::Value::Object(own)), Ok(serde_json::Value::Object(usual))) =
            (serde_json::to_value(self), serde_json::to_value(&plain))
        {
            let differing: BTreeSet<&String> =
                own.keys().chain(usual.keys()).filter(|k| own.get(*k) != usual.get(*k)).collect();
            for key in differing {
                words.push(format!(
                    "{key} {}",
                    own.get(key).map_or("off".to_owned(), |v| v.to_string().replace('"', ""))
                ));
            }
        }
        words.join(", ")
    }

    /// How the range is chosen.
    #[must_use]
    pub fn observer(&self) -> Observer {
        Observer::new(self.observer, self.percentile, self.mse_p)
    }

    /// The same without what its range follows from, which tensors that share a scale need not have in common.
    #[must_use]
    pub fn whatever_the_range(&self) -> Self {
        Self { observer: ObserverKind::Minmax, percentile: None, mse_p: None, given: None, ..self.clone() }
    }

    /// Checks that the keys have a meaning together.
    ///
    /// # Errors
    /// [`Kind::Config`]: the first mistake.
    pub fn check(&self) -> Result<()> {
        let Self {
            dtype,
            symmetric,
            granularity,
            narrow_range,
            reduce_range,
            observer: _,
            percentile: _,
            mse_p: _,
            scale_type: _,
            scale_dtype,
            mx_rounding: _,
            round,
            eps,
            postprocess,
            signed_scale,
            arithmetic,
            float_zero_point,
            algorithm,
            given,
        } = self;
        let fail = |message: String| Err(Error::new(Kind::Config, message));
        if scale_dtype.is_block() {
            let name = scale_dtype.name();
            if !matches!(granularity, Granularity::PerGroup { .. }) {
                return fail(format!("{name} scales belong to groups"));
            }
            if !(*symmetric && dtype.is_signed()) {
                return fail(format!("{name} scales do not allow zero points"));
            }
        }
        if *reduce_range && dtype.bits() == 2 {
            return fail(format!("reduce_range leaves {dtype} a single bit"));
        }
        if *round != Round::HalfEven && !dtype.is_integer() {
            return fail(format!("{dtype} has no other rounding than half to even"));
        }
        if (*signed_scale || *arithmetic != Arithmetic::Onnx) && !dtype.is_byte() {
            return fail(format!("{dtype} is computed as ONNX defines it"));
        }
        if *signed_scale && (!symmetric || *narrow_range) {
            return fail("signed scales require a symmetric format that uses its lowest integer".to_owned());
        }
        let unsigned = dtype.is_byte() && dtype.bits() < 8 && !dtype.is_signed() && !symmetric;
        if *float_zero_point && (!unsigned || given.is_some()) {
            return fail(format!("{dtype}: fractional zero points require asymmetric uint2 or uint4"));
        }
        check_least_scale(*eps).or_else(fail)?;
        if let Some(Err((message, hint))) = postprocess.map(|p| p.check()) {
            return Err(Error::new(Kind::Config, message).with_hint(hint));
        }
        self.observer().check()?;
        if let Some(algorithm) = algorithm {
            algorithm.validate()?;
        }
        given.as_ref().map_or(Ok(()), |given| given.check(*dtype))
    }

    /// What of it matters where a range becomes a scale.
    #[must_use]
    pub fn range_spec(&self) -> RangeSpec {
        // Scales of 8 bits are made of ranges in their own way.
        let least = if self.scale_dtype.is_block() { 0.0 } else { self.eps };
        RangeSpec {
            format: self.dtype,
            symmetry: match (self.symmetric, self.signed_scale) {
                (true, true) => Symmetry::Signed,
                (true, false) => Symmetry::Symmetric,
                (false, _) => Symmetry::Asymmetric,
            },
            narrow: self.narrow_range,
            reduce: self.reduce_range,
            power_of_two: self.scale_type == ScaleType::PowerOfTwo,
            scale_dtype: self.scale_dtype,
            precision: self.arithmetic.precision(least),
            // torch has a least scale always.
            eps: if self.arithmetic == Arithmetic::Torch { self.eps.max(f32::MIN_POSITIVE) } else { least },
        }
    }
}

impl Given {
    fn check(&self, dtype: Format) -> Result<()> {
        let fail = |message: String| Err(Error::new(Kind::Config, message));
        match self {
            Self::Range(low, high) => check_range(*low, *high),
            Self::Scales { scales, zero_points } => {
                if let Some(scale) = scales.iter().find(|s| !s.is_normal() || **s < 0.0) {
                    return fail(format!("the scale {scale} is given, which is not a positive number"));
                }
                let (low, high) = if dtype.is_integer() { dtype.range() } else { (0, 0) };
                match zero_points.iter().find(|z| !(low..=high).contains(*z)) {
                    Some(zero) => {
                        fail(format!("the zero point {zero} is given, which is not in {low}..={high} of {dtype}"))
                    }
                    None => Ok(()),
                }
            }
        }
    }
}

/// Refuses a range that a user gave and that holds nothing.
///
/// # Errors
/// Bounds that are not finite, or in the wrong order.
pub fn check_range(low: f32, high: f32) -> Result<()> {
    if low.is_finite() && high.is_finite() && low <= high {
        return Ok(());
    }
    Err(Error::new(Kind::Config, format!("the range {low} to {high} is given, which is empty")))
}

impl QParams {
    /// Scales and zero points that the user fixed, for a tensor with `entries` of each.
    ///
    /// # Errors
    /// Neither one of each nor as many as there are.
    pub fn given(scales: &[f32], zero_points: &[i32], entries: usize) -> Result<Self> {
        if scales.len() != zero_points.len() || (scales.len() != 1 && scales.len() != entries) {
            let (scales, zeros) = (scales.len(), zero_points.len());
            let need = if entries == 1 { "1".to_owned() } else { format!("1 or {entries}") };
            let message = format!("{scales} scales and {zeros} zero points are given, but {need} of each are needed");
            return Err(Error::new(Kind::Config, message));
        }
        let repeat = entries / scales.len().max(1);
        Ok(Self { scales: scales.repeat(repeat), zero_points: zero_points.repeat(repeat) })
    }
}
