//! 32-bit biases.

use crate::error::{Error, Result};

/// The scale of a bias: that of the accumulator it is added to, `f32(input) · f32(weight)`.
pub fn bias_scale(input: f32, weight: f32) -> f32 {
    input * weight
}

/// `clamp(rne(f64(bias) / f64(scale)))` in the range of `i32`; zero point 0.
///
/// `scales` holds [`bias_scale`] once, or once per element.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if there are neither one nor as many scales as elements, a scale is not a positive number,
/// or `bias` holds NaN or infinities.
pub fn quantize_bias(bias: &[f32], scales: &[f32]) -> Result<Vec<i32>> {
    if scales.len() != 1 && scales.len() != bias.len() {
        return Err(Error::model(format!("{} scales for a bias of {} elements", scales.len(), bias.len())));
    }
    super::affine::check_scales(scales)?;
    if let Some(value) = bias.iter().find(|value| !value.is_finite()) {
        return Err(Error::model(format!("a bias of {value} cannot be quantized")));
    }
    let scale = |idx: usize| f64::from(if scales.len() == 1 { scales[0] } else { scales[idx] });
    // The cast saturates.
    Ok(bias.iter().enumerate().map(|(idx, &value)| (f64::from(value) / scale(idx)).round_ties_even() as i32).collect())
}

/// The smallest weight scale with which a bias of magnitude `bias_absmax` fits 32 bits, for input scale `input_scale`:
/// `1.0001 · 2 · bias_absmax / (2³² − 2) / input_scale`, in f64, cast last.
///
/// A smaller weight scale must be raised to it before the weight is quantized.
pub fn weight_scale_floor(bias_absmax: f32, input_scale: f32) -> f32 {
    (1.0001 * 2.0 * f64::from(bias_absmax) / (f64::from(u32::MAX) - 1.0) / f64::from(input_scale)) as f32
}
