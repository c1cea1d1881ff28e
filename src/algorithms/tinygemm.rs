//! torchao's int4 weight-only quantization, made for the kernel tinygemm: groups need not contain zero.
//!
//! A group from `min` to `max` has the scale `(max − min) / 15` and, as its zero point, the float value of the middle code;
//! scale and value are rounded to the precision of the kernel, codes made from what was rounded. Only the quotient is
//! changed here: `MatMulNBits` counts its zero point in codes.

use crate::numerics::blocks::{self, Between};
use crate::numerics::{Precision, RangeSpec};

/// Chooses for one group of finite values, and writes its codes. torchao does so for 4 bits.
pub fn choose(values: &[f32], spec: &RangeSpec, codes: &mut [u8]) -> Between<()> {
    let (lowest, highest) = spec.codes();
    let (low, high) = blocks::extremes(values);
    let rounded = |x: f32| match spec.precision {
        Precision::Float32 => x,
        Precision::Float16 => half::f16::from_f32(x).to_f32(),
        Precision::Bfloat16 => half::bf16::from_f32(x).to_f32(),
    };
    let middle = ((lowest + highest + 1) / 2) as f32;
    let exact = ((high - low) / (highest - lowest) as f32).clamp(spec.eps.max(f32::MIN_POSITIVE), f32::MAX);
    let value = rounded(low + exact * middle);
    // What float16 rounds to nothing could not be divided by.
    let scale = Some(rounded(exact)).filter(|s| s.is_normal()).unwrap_or_else(|| spec.scale(f64::from(exact)));
    let least = rounded(value - scale * middle);
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = ((x - least) / scale).round_ties_even().clamp(lowest as f32, highest as f32) as u8;
    }
    let zero_point = (f64::from(middle) - f64::from(value) / f64::from(scale)) as f32;
    Between { scale, zero_point, said: () }
}
