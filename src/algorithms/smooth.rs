//! By how much an input of products is divided, channel by channel, so that one scale serves it and its weights well.

use crate::quant::algorithm::Method;

/// The least divisor of smoothquant, and the least and largest of AWQ, as in their sources.
const LEAST: f64 = 1e-5;
const AWQ: (f64, f64) = (1e-4, 1e4);

/// What is known of one channel of an input, over the rows of all samples and the weights of all products.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Channel {
    /// The largest magnitude of the input.
    pub largest: f64,
    /// The mean magnitude of the input.
    pub mean: f64,
    /// The largest magnitude of the weights.
    pub weight: f64,
    /// The mean magnitude of the weights, each in shares of the largest that it has a scale with.
    pub share: f64,
}

/// The divisors, one for each channel, for an exponent from 0 to 1.
///
/// - `smoothquant`: `max|x|^α / max|w|^(1 − α)`, no smaller than 1e-5, and 1 for a channel that is always 0
///   (<https://arxiv.org/abs/2211.10438>).
/// - AWQ: `mean|x|^α / share^(1 − α)` between 1e-4 and 1e4, over the root of the product of the largest and the least, as
///   ModelOpt computes it (`awq_lite` in `modelopt/torch/quantization/model_calib.py`).
#[must_use]
pub fn divisors(method: Method, alpha: f64, channels: &[Channel]) -> Vec<f32> {
    if method == Method::SmoothQuant {
        let divisor = |c: &Channel| {
            if c.largest > 0.0 {
                (c.largest.powf(alpha) / c.weight.max(LEAST).powf(1.0 - alpha)).max(LEAST)
            } else {
                1.0
            }
        };
        return channels.iter().map(|c| divisor(c) as f32).collect();
    }
    let (least, most) = AWQ;
    let raw: Vec<f64> = channels
        .iter()
        .map(|c| c.mean.powf(alpha) / c.share.powf(1.0 - alpha))
        .map(|divisor| if divisor.is_nan() { 1.0 } else { divisor.clamp(least, most) })
        .collect();
    let (low, high) = raw.iter().fold((f64::INFINITY, 0.0f64), |(low, high), &d| (low.min(d), high.max(d)));
    let middle = (low * high).sqrt();
    raw.iter().map(|divisor| (divisor / middle) as f32).collect()
}

/// The exponents that are tried: from 0 to 1 in steps.
#[must_use]
pub fn exponents(step: f64) -> Vec<f64> {
    let count = (1.0 / step + 1e-9).floor();
    // The nearest numbers to the tenths that people read.
    let even = (count * step - 1.0).abs() < 1e-9;
    (0..=count as usize).map(|at| if even { at as f64 / count } else { at as f64 * step }).collect()
}
