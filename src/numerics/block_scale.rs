//! Scales of 8 bits, for blocks: powers of two as the OCP Microscaling formats (MX) 1.0 have them, and float8 scales over one
//! float scale for the whole tensor, as NVFP4 has them.
//!
//! An element is quantized and dequantized with the effective scale as any other: [`quantize`](super::quantize) and
//! [`dequantize`](super::dequantize) see plain f32 scales.
//!
//! | format | elements | block | scale |
//! |---|---|---|---|
//! | MXFP8 | float8e4m3fn or float8e5m2 | 32 | float8e8m0 |
//! | MXFP6 | float6e2m3 or float6e3m2 | 32 | float8e8m0 |
//! | MXFP4 | float4e2m1 | 32 | float8e8m0 |
//! | MXINT8 | int8; the format's 2^−6 is part of the scale | 32 | float8e8m0 |
//! | NVFP4 | float4e2m1 | 16 | float8e4m3fn, times one f32 |

use super::minifloat::decode_float8e8m0;
use super::{Format, MxRounding, RangeSpec};

/// What elements of a format can be, as far as it matters for their scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ElementRange {
    /// The largest element: 448 for float8e4m3fn, 127 for int8.
    pub max: f32,
    /// Exponent of the largest power of two among the elements: 8 for float8e4m3fn, 6 for int8.
    pub exponent: i32,
    /// Bits of an element behind the leading one.
    pub mantissa_bits: u32,
}

impl ElementRange {
    /// The range of a format; for integers that of the codes above zero.
    pub fn new(format: Format) -> Self {
        let (max, mantissa_bits) = format.float().map_or_else(
            || {
                let (_, high) = format.range();
                (high as f32, i32::BITS - 1 - high.max(1).leading_zeros())
            },
            |float| (float.max(), float.mantissa_bits()),
        );
        Self { max, exponent: exponent(max), mantissa_bits }
    }
}

/// ⌊log2 x⌋ of a positive normal number; −127 for what is smaller.
fn exponent(x: f32) -> i32 {
    (x.to_bits() >> 23 & 0xff) as i32 - 127
}

/// ⌈log2 (x / y)⌉ of numbers that are not negative, at least −1023. The quotient is rounded to 53 bits, which cannot hide that it
/// is above a power of two.
fn exponent_above(x: f32, y: f32) -> i32 {
    let bits = (f64::from(x) / f64::from(y)).to_bits();
    (bits >> 52 & 0x7ff) as i32 - 1023 + i32::from(bits & 0xf_ffff_ffff_ffff != 0)
}

/// The `float8e8m0` code of the scale of a block with this largest magnitude. 0 (2^−127) for a block of zeros, 255 for NaN.
///
/// Codes are those of torchao's `to_mx` for all four ways, and for `Rceil` those of the conversion that hardware has
/// (`cvt.rp.satfinite.ue8m0x2`). Exponents saturate at −127 and 127.
pub fn e8m0_scale(amax: f32, elements: ElementRange, rounding: MxRounding) -> u8 {
    if amax.is_nan() {
        return 255;
    }
    let exponent = match rounding {
        MxRounding::Floor => exponent(amax) - elements.exponent,
        MxRounding::Ceil => {
            let above = amax.to_bits() & 0x7f_ffff != 0;
            exponent(amax) + i32::from(above) - elements.exponent
        }
        MxRounding::Even => {
            let half = 1 << (23 - elements.mantissa_bits - 1);
            exponent(f32::from_bits(amax.to_bits() + half)) - elements.exponent
        }
        MxRounding::Rceil => exponent_above(amax, elements.max),
    };
    (exponent.clamp(-127, 127) + 127) as u8
}

/// The `float8e8m0` code that stands for exactly this scale, if there is one.
pub fn encode_float8e8m0(scale: f32) -> Option<u8> {
    (0..255).find(|&code| decode_float8e8m0(code).to_bits() == scale.to_bits())
}

/// float8e4m3fn scales of blocks, over one float scale of the tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TwoLevel {
    /// What every block scale is multiplied by.
    pub tensor_scale: f32,
    /// Block scales, as float8e4m3fn codes.
    pub codes: Vec<u8>,
}

/// The smallest float8e4m3fn, and as such the smallest block scale that ModelOpt makes. torchao stops at 2^−6, the smallest
/// with a full mantissa.
pub const MIN_BLOCK_SCALE: f32 = 1.0 / 512.0;

impl TwoLevel {
    /// Scales for blocks with these largest magnitudes: the tensor's is `amax / (448 · MAX)`, that of a block
    /// `rne(clamp(amax / (MAX · tensor scale), least, 448))`.
    ///
    /// Without `least` block scales go down to [`MIN_BLOCK_SCALE`] and blocks of zeros get 1, as in ModelOpt 0.47. With
    /// `least` at 2^−6 codes are those of torchao 0.18, blocks of zeros included.
    pub fn new(amax: &[f32], elements: ElementRange, least: Option<f32>) -> Self {
        let whole = amax.iter().fold(0f32, |most, &amax| most.max(amax));
        let tensor_scale = Self::tensor_scale(whole, elements);
        let scale = |&amax: &f32| match least {
            None if amax == 0.0 => 1.0,
            _ => (amax / (elements.max * tensor_scale)).clamp(least.unwrap_or(MIN_BLOCK_SCALE), 448.0),
        };
        let codes = amax.iter().map(|amax| Format::Float8e4m3fn.encode(scale(amax)) as u8).collect();
        Self { tensor_scale, codes }
    }

    /// The scale of a tensor with this largest magnitude. So large that the least block scale times it is a normal number.
    pub fn tensor_scale(amax: f32, elements: ElementRange) -> f32 {
        let scale = amax / (448.0 * elements.max);
        if scale == 0.0 { 1.0 } else { scale.max(512.0 * f32::MIN_POSITIVE) }
    }

    /// What elements are divided by: block scale times tensor scale.
    pub fn effective(&self) -> Vec<f32> {
        self.codes.iter().map(|&code| Format::Float8e4m3fn.decode(code.into()) * self.tensor_scale).collect()
    }
}

/// The largest magnitude of each range, and never less than 0.
pub fn amax(ranges: &[(f32, f32)]) -> Vec<f32> {
    ranges.iter().map(|&(low, high)| low.abs().max(high.abs())).collect()
}

impl RangeSpec {
    /// The range of the elements under this spec, without the codes that it leaves unused.
    pub fn elements(&self) -> ElementRange {
        let whole = ElementRange::new(self.format);
        if !self.format.is_integer() {
            return whole;
        }
        let (_, high) = self.codes();
        ElementRange { max: high as f32, exponent: exponent(high.max(1) as f32), ..whole }
    }
}
