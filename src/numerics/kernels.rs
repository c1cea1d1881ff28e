//! The inner loops, written so that they vectorize for any CPU: no calls, no branches, not even those of overflow checks
//! (every sum here is far from overflowing), no shared slices.
//!
//! They are not inlined, because only as parameters of a function are slices known not to overlap.

use super::minifloat::Minifloat;

/// Adding 1.5 · 2²³ to a number below 2²² leaves its nearest integer, half to even, in the low bits of the sum.
const MAGIC: f32 = 12_582_912.0;

/// What a code is written as before it is packed.
pub(super) trait Code: Copy + Default + Send {
    fn from_code(code: i32) -> Self;
}

impl Code for u8 {
    #[inline]
    fn from_code(code: i32) -> Self {
        code as Self
    }
}

impl Code for i8 {
    #[inline]
    fn from_code(code: i32) -> Self {
        code as Self
    }
}

impl Code for u16 {
    #[inline]
    fn from_code(code: i32) -> Self {
        code as Self
    }
}

impl Code for i32 {
    #[inline]
    fn from_code(code: i32) -> Self {
        code
    }
}

/// What the quotient is clamped to.
#[inline]
fn bounds((qmin, qmax): (i32, i32), zero_point: i32) -> (f32, f32) {
    (qmin.wrapping_sub(zero_point) as f32, qmax.wrapping_sub(zero_point) as f32)
}

/// `clamp(x / scale, low, high)`, NaN becoming `low`; compiles to one `max` and one `min`.
#[inline]
fn clamped(x: f32, scale: f32, low: f32, high: f32) -> f32 {
    let quotient = x / scale;
    let quotient = if quotient > low { quotient } else { low };
    if quotient < high { quotient } else { high }
}

/// `rne(clamp(x / scale, low, high))` as an integer.
#[inline]
fn code(x: f32, scale: f32, low: f32, high: f32) -> i32 {
    (clamped(x, scale, low, high) + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

/// `rne(clamp(x / scale, low, high))` as a number, never negative zero.
#[inline]
fn rounded(x: f32, scale: f32, low: f32, high: f32) -> f32 {
    (clamped(x, scale, low, high) + MAGIC) - MAGIC
}

/// Codes of an integer format of at most 16 bits, with one scale.
#[inline(never)]
pub(super) fn int_codes<T: Code>(out: &mut [T], x: &[f32], scale: f32, zero_point: i32, range: (i32, i32)) {
    let (low, high) = bounds(range, zero_point);
    for (out, &x) in out.iter_mut().zip(x) {
        *out = T::from_code(code(x, scale, low, high).wrapping_add(zero_point));
    }
}

/// [`int_codes`] with a scale for each element.
#[inline(never)]
pub(super) fn int_codes_each<T: Code>(
    out: &mut [T],
    x: &[f32],
    scales: &[f32],
    zero_points: &[i32],
    range: (i32, i32),
) {
    for (((out, &x), &scale), &zero_point) in out.iter_mut().zip(x).zip(scales).zip(zero_points) {
        let (low, high) = bounds(range, zero_point);
        *out = T::from_code(code(x, scale, low, high).wrapping_add(zero_point));
    }
}

/// Codes of a float format, with one scale.
#[inline(never)]
pub(super) fn float_codes<T: Code>(out: &mut [T], x: &[f32], scale: f32, float: Minifloat) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = T::from_code(float.encode(x / scale));
    }
}

/// [`float_codes`] with a scale for each element.
#[inline(never)]
pub(super) fn float_codes_each<T: Code>(out: &mut [T], x: &[f32], scales: &[f32], float: Minifloat) {
    for ((out, &x), &scale) in out.iter_mut().zip(x).zip(scales) {
        *out = T::from_code(float.encode(x / scale));
    }
}

/// Quantize and dequantize in an integer format of at most 16 bits.
#[inline(never)]
pub(super) fn int_fake(x: &mut [f32], scale: f32, zero_point: i32, range: (i32, i32)) {
    let (low, high) = bounds(range, zero_point);
    for x in x {
        *x = rounded(*x, scale, low, high) * scale;
    }
}

/// [`int_fake`] with a scale for each element.
#[inline(never)]
pub(super) fn int_fake_each(x: &mut [f32], scales: &[f32], zero_points: &[i32], range: (i32, i32)) {
    for ((x, &scale), &zero_point) in x.iter_mut().zip(scales).zip(zero_points) {
        let (low, high) = bounds(range, zero_point);
        *x = rounded(*x, scale, low, high) * scale;
    }
}

/// Quantize and dequantize in a float format.
#[inline(never)]
pub(super) fn float_fake(x: &mut [f32], scale: f32, float: Minifloat) {
    for x in x {
        *x = float.round(*x / scale) * scale;
    }
}

/// [`float_fake`] with a scale for each element.
#[inline(never)]
pub(super) fn float_fake_each(x: &mut [f32], scales: &[f32], float: Minifloat) {
    for (x, &scale) in x.iter_mut().zip(scales) {
        *x = float.round(*x / scale) * scale;
    }
}

/// `number(code, zero_point) * scale` with one scale.
#[inline(never)]
pub(super) fn scale_numbers(
    out: &mut [f32],
    codes: &[i32],
    scale: f32,
    zero_point: i32,
    number: impl Fn(i32, i32) -> f32,
) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = number(code, zero_point) * scale;
    }
}

/// [`scale_numbers`] with a scale for each element.
#[inline(never)]
pub(super) fn scale_numbers_each(
    out: &mut [f32],
    codes: &[i32],
    scales: &[f32],
    zero_points: &[i32],
    number: impl Fn(i32, i32) -> f32,
) {
    for (((out, &code), &scale), &zero_point) in out.iter_mut().zip(codes).zip(scales).zip(zero_points) {
        *out = number(code, zero_point) * scale;
    }
}

/// A number whose highest bit says whether `value` is NaN or infinite: an exponent of all ones carries into it.
#[inline]
fn exponent_carry(value: f32) -> u32 {
    (value.to_bits() & 0x7fff_ffff).wrapping_add(0x0080_0000)
}

/// Whether no element is NaN or infinite.
#[inline(never)]
pub(super) fn is_finite(x: &[f32]) -> bool {
    let carries = x.iter().fold(0, |carries, value| carries | exponent_carry(*value));
    carries >> 31 == 0
}

/// Lowers and raises the bounds at the same index to each finite element.
#[inline(never)]
pub(super) fn widen(low: &mut [f32], high: &mut [f32], x: &[f32]) {
    for ((low, high), &value) in low.iter_mut().zip(high).zip(x) {
        let special = value.to_bits() & 0x7fff_ffff >= 0x7f80_0000;
        let below = if special { f32::INFINITY } else { value };
        let above = if special { f32::NEG_INFINITY } else { value };
        *low = if below < *low { below } else { *low };
        *high = if above > *high { above } else { *high };
    }
}

/// How many elements are NaN or infinite.
#[inline(never)]
pub(super) fn count_special(x: &[f32]) -> usize {
    let count = |x: &[f32]| x.iter().map(|value| exponent_carry(*value) >> 31).sum::<u32>() as usize;
    x.chunks(1 << 30).map(count).sum()
}
