//! Scales of 8 bits for the groups of a weight.

use crate::numerics::{self, TwoLevel, decode_float8e8m0, e8m0_scale};
use crate::quant::{QParams, RangeSpec, ScaleDtype, Scheme};

/// Scales of groups with these ranges, as elements are divided by them, and the scale of the whole tensor where they have two
/// levels. Zero points are 0.
pub(super) fn scales(quantizer: &Scheme, spec: &RangeSpec, ranges: &[(f32, f32)]) -> (QParams, Option<f32>) {
    let (amax, elements) = (numerics::amax(ranges), spec.elements());
    let (scales, tensor_scale) = if quantizer.scale_dtype == ScaleDtype::Float8e4m3fn {
        let least = (quantizer.eps > 0.0).then_some(quantizer.eps);
        let found = TwoLevel::new(&amax, elements, least);
        (found.effective(), Some(found.tensor_scale))
    } else {
        let scale = |&amax: &f32| decode_float8e8m0(e8m0_scale(amax, elements, quantizer.mx_rounding));
        (amax.iter().map(scale).collect(), None)
    };
    let zero_points = vec![0; scales.len()];
    (QParams { scales, zero_points }, tensor_scale)
}
