//! Floats of 4 to 8 bits, and the powers of two that scale blocks of them.

use super::Format;

/// How the top of the range is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Special {
    /// The largest exponent holds infinities and NaN.
    Ieee,
    /// Only the all-ones code is NaN.
    Fn,
    /// Only the code of negative zero is NaN; there is no negative zero.
    Fnuz,
    /// Finite numbers only.
    None,
}

/// The layout of a small float.
#[derive(Clone, Copy)]
pub struct Minifloat {
    exponent_bits: u32,
    mantissa_bits: u32,
    bias: u32,
    special: Special,
    /// The code of a positive NaN, 0 where there is none.
    nan_code: u32,
    /// The sign bit if NaN has a sign.
    nan_sign: u32,
    pub(super) max: f32,
}

impl Format {
    /// The layout, for float formats.
    pub fn float(self) -> Option<Minifloat> {
        let (exponent_bits, mantissa_bits, bias, special, nan_code, max) = match self {
            Self::Float8e4m3fn => (4, 3, 7, Special::Fn, 0x7f, 448.0),
            Self::Float8e4m3fnuz => (4, 3, 8, Special::Fnuz, 0x80, 240.0),
            Self::Float8e5m2 => (5, 2, 15, Special::Ieee, 0x7f, 57344.0),
            Self::Float8e5m2fnuz => (5, 2, 16, Special::Fnuz, 0x80, 57344.0),
            Self::Float4e2m1 => (2, 1, 1, Special::None, 0, 6.0),
            Self::Float6e2m3 => (2, 3, 1, Special::None, 0, 7.5),
            Self::Float6e3m2 => (3, 2, 3, Special::None, 0, 28.0),
            _ => return None,
        };
        let nan_sign = if nan_code == 0x7f { 0x80 } else { 0 };
        Some(Minifloat { exponent_bits, mantissa_bits, bias, special, nan_code, nan_sign, max })
    }
}

/// The power of two that a `float8e8m0` code stands for: 2^(code − 127), NaN for 255.
pub fn decode_float8e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

impl Minifloat {
    /// Bits of the mantissa that are stored.
    pub fn mantissa_bits(self) -> u32 {
        self.mantissa_bits
    }

    /// The largest finite number.
    pub fn max(self) -> f32 {
        self.max
    }

    /// The smallest positive number, which is also the distance of its neighbours.
    pub fn min_positive(self) -> f32 {
        f32::from_bits((127 + 1 - self.bias - self.mantissa_bits) << 23)
    }

    fn sign_bit(self) -> u32 {
        1 << (self.exponent_bits + self.mantissa_bits)
    }

    /// Adding this power of two to a number below the smallest normal one rounds it to a multiple of the smallest
    /// subnormal, half to even, since that is then the last place of the sum.
    fn subnormal_magic(self) -> f32 {
        f32::from_bits((127 + 1 + 23 - self.bias - self.mantissa_bits) << 23)
    }

    /// The smallest number with a full mantissa.
    pub fn min_normal(self) -> f32 {
        f32::from_bits((127 + 1 - self.bias) << 23)
    }

    /// Nearest code, ties to even, saturating; see [`Format::encode`].
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "loops over it vectorize only when it is inlined")]
    pub fn encode(self, x: f32) -> i32 {
        let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
        let clamped = if magnitude < self.max { magnitude } else { self.max };
        let shift = 23 - self.mantissa_bits;
        let bits = clamped.to_bits();
        let rounded = bits.wrapping_add((1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift;
        let normal = rounded.wrapping_sub((127 - self.bias) << self.mantissa_bits);
        let magic = self.subnormal_magic();
        let subnormal = (clamped + magic).to_bits().wrapping_sub(magic.to_bits());
        let code = if clamped < self.min_normal() { subnormal } else { normal };
        let sign = x.to_bits() >> 31 << (self.exponent_bits + self.mantissa_bits);
        // Codes are below 2⁸, so that the difference has its high bits set exactly for zero.
        let is_zero = code.wrapping_sub(1) >> 31;
        let dropped_sign = (is_zero & u32::from(self.special == Special::Fnuz)) * sign;
        let signed = code | (sign ^ dropped_sign);
        let code = if x.is_nan() { self.nan_code | (sign & self.nan_sign) } else { signed };
        code as i32
    }

    /// `decode(encode(x))`, without the codes.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "loops over it vectorize only when it is inlined")]
    pub(super) fn round(self, x: f32) -> f32 {
        let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
        let clamped = if magnitude < self.max { magnitude } else { self.max };
        let shift = 23 - self.mantissa_bits;
        let bits = clamped.to_bits();
        let carried = bits.wrapping_add((1 << (shift - 1)) - 1 + ((bits >> shift) & 1));
        let normal = f32::from_bits(carried >> shift << shift);
        let magic = self.subnormal_magic();
        let subnormal = (clamped + magic) - magic;
        let rounded = if clamped < self.min_normal() { subnormal } else { normal };
        let sign = x.to_bits() & 0x8000_0000;
        let sign = if self.special == Special::Fnuz && rounded == 0.0 { 0 } else { sign };
        let signed = f32::from_bits(rounded.to_bits() | sign);
        let nan = if self.special == Special::None { 0.0 } else { f32::NAN };
        if x.is_nan() { nan } else { signed }
    }

    /// The number a code stands for; bits above those of the layout are ignored.
    pub fn decode(self, code: u8) -> f32 {
        let sign_bit = self.sign_bit();
        let code = u32::from(code) & (2 * sign_bit - 1);
        let magnitude = code & (sign_bit - 1);
        let exponent = magnitude >> self.mantissa_bits;
        let mantissa = magnitude & ((1 << self.mantissa_bits) - 1);
        let top = (1 << self.exponent_bits) - 1;
        let special = match self.special {
            Special::Ieee if exponent == top => Some(if mantissa == 0 { f32::INFINITY } else { f32::NAN }),
            Special::Fn if magnitude == sign_bit - 1 => Some(f32::NAN),
            Special::Fnuz if code == sign_bit => return f32::NAN,
            _ => None,
        };
        let value = special.unwrap_or_else(|| {
            if exponent == 0 {
                // Exact: a few bits times a power of two well inside the range of f32.
                mantissa as f32 * self.min_positive()
            } else {
                f32::from_bits((exponent + 127 - self.bias) << 23 | mantissa << (23 - self.mantissa_bits))
            }
        });
        if code & sign_bit == 0 { value } else { -value }
    }
}
