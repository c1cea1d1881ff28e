//! torchao's int4 weight-only quantization, made for kernels that count zero points in float: groups need not contain zero.
//!
//! A group from `min` to `max` has the scale `(max − min) / 15` and, as its zero point, the float value of the middle code;
//! scale and value are rounded to the precision of the kernel, codes made from what was rounded. Only the quotient is
//! changed here: `MatMulNBits` counts its zero point in codes.

use crate::numerics::blocks::{self, Between};
use crate::quant::{Arithmetic, RangeSpec, ScaleDtype};

/// What the codes of a group stand for: `x = (code − middle) * scale + value`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// The distance of two codes.
    pub scale: f32,
    /// What the middle code stands for.
    pub value: f32,
    /// What code 0 stands for when codes are made.
    pub least: f32,
}

/// The grid of a group of finite values, in the arithmetic of mslk or, as all others are taken, tinygemm.
#[must_use]
pub fn grid(arithmetic: Arithmetic, values: &[f32], spec: &RangeSpec) -> Grid {
    let (lowest, highest) = spec.codes();
    let (low, high) = blocks::extremes(values);
    let mslk = arithmetic == Arithmetic::Mslk;
    let rounded = |x: f32| match spec.scale_dtype {
        ScaleDtype::Float16 => half::f16::from_f32(x).to_f32(),
        ScaleDtype::Bfloat16 => half::bf16::from_f32(x).to_f32(),
        ScaleDtype::Float32 | ScaleDtype::Float8e4m3fn | ScaleDtype::Float8e8m0 => x,
    };
    let (width, steps) = ((high - low).min(f32::MAX), (highest - lowest) as f32);
    let exact = if mslk { width.max(spec.eps) / steps } else { (width / steps).max(spec.eps) };
    let exact = exact.max(f32::MIN_POSITIVE);
    let value = rounded(low + exact * middle(spec));
    // What float16 rounds to nothing could not be divided by.
    let scale = Some(rounded(exact)).filter(|s| s.is_normal()).unwrap_or_else(|| spec.scale(f64::from(exact)));
    // Mslk has code 0 stand for the minimum, tinygemm for what the zero point makes of it.
    let least = if mslk { low } else { rounded(value - scale * middle(spec)) };
    Grid { scale, value, least }
}

/// Chooses for a group of finite values, and writes its codes. torchao does so for 4 bits.
pub fn choose(arithmetic: Arithmetic, values: &[f32], spec: &RangeSpec, codes: &mut [u8]) -> Between<()> {
    let (lowest, highest) = spec.codes();
    let Grid { scale, value, least } = grid(arithmetic, values, spec);
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = ((x - least) / scale).round_ties_even().clamp(lowest as f32, highest as f32) as u8;
    }
    Between { scale, zero_point: zero_point(middle(spec), value, scale), said: () }
}

/// The code in the middle of a format.
#[must_use]
pub fn middle(spec: &RangeSpec) -> f32 {
    let (lowest, highest) = spec.codes();
    ((lowest + highest + 1) / 2) as f32
}

/// The zero point of a group as `MatMulNBits` counts it, in codes.
#[must_use]
pub fn zero_point(middle: f32, value: f32, scale: f32) -> f32 {
    (f64::from(middle) - f64::from(value) / f64::from(scale)) as f32
}
