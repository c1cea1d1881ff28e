//! Quantize, dequantize and fake quant on float32 slices, as ONNX `QuantizeLinear` and `DequantizeLinear` define them.

use crate::onnx::DataType;

/// The numbers that a format represents, before scaling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Grid {
    /// All integers from `low` to `high`.
    Integer { low: f32, high: f32 },
    /// Floats of `mantissa` stored bits, subnormal below 2^`exponent`, of magnitude at most `max`.
    Float { mantissa: i32, exponent: i32, max: f32 },
}

impl Grid {
    /// The grid of a format; `None` if graphs do not quantize to it.
    pub fn of(dtype: DataType) -> Option<Self> {
        let integer = |low: f32, high: f32| Some(Self::Integer { low, high });
        let float = |mantissa, exponent, max| Some(Self::Float { mantissa, exponent, max });
        match dtype {
            DataType::Uint8 => integer(0., 255.),
            DataType::Int8 => integer(-128., 127.),
            DataType::Uint16 => integer(0., 65535.),
            DataType::Int16 => integer(-32768., 32767.),
            DataType::Uint4 => integer(0., 15.),
            DataType::Int4 => integer(-8., 7.),
            DataType::Uint2 => integer(0., 3.),
            DataType::Int2 => integer(-2., 1.),
            DataType::Float8e4m3fn => float(3, -6, 448.),
            DataType::Float8e4m3fnuz => float(3, -7, 240.),
            DataType::Float8e5m2 => float(2, -14, 57344.),
            DataType::Float8e5m2fnuz => float(2, -15, 57344.),
            DataType::Float4e2m1 => float(1, 0, 6.),
            DataType::Float6e2m3 => float(3, 0, 7.5),
            DataType::Float6e3m2 => float(2, -2, 28.),
            _ => None,
        }
    }
}

/// How scales and zero points spread over the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// One for all.
    One,
    /// One for each of `len` positions of an axis with `inner` elements below each.
    Axis { inner: usize, len: usize },
    /// One for each run of `block` positions, and each of the `inner` elements below.
    Block { inner: usize, len: usize, block: usize },
}

impl Spread {
    /// How `count` parameters spread over a tensor of `shape`. `axis` may be negative; `block` is 0 unless blocked.
    ///
    /// # Errors
    /// A count that does not fit, as a clause.
    pub fn new(shape: &[usize], count: usize, axis: i64, block: i64) -> Result<Self, String> {
        if count == 1 {
            return Ok(Self::One);
        }
        let rank = shape.len() as i64;
        let at = if axis < 0 { axis + rank } else { axis };
        let Some(&len) = usize::try_from(at).ok().and_then(|a| shape.get(a)) else {
            return Err(format!("axis {axis} is outside of a tensor of shape {shape:?}"));
        };
        let at = at as usize;
        let inner: usize = shape[at + 1..].iter().product();
        let block = usize::try_from(block).map_err(|_| format!("block size {block} is negative"))?;
        let (spread, want) = if block == 0 {
            (Self::Axis { inner, len }, len)
        } else {
            let outer: usize = shape[..at].iter().product();
            (Self::Block { inner, len, block }, outer * len.div_ceil(block) * inner)
        };
        if want == count {
            return Ok(spread);
        }
        Err(format!("{count} scales do not fit axis {axis} of shape {shape:?} (block size {block})"))
    }

    /// Calls `apply` with each run of `values` that shares parameters, and the index of those.
    pub fn each(self, values: &mut [f32], mut apply: impl FnMut(&mut [f32], usize)) {
        match self {
            Self::One => apply(values, 0),
            Self::Axis { inner, len } => {
                if inner == 0 {
                    return;
                }
                for (run, chunk) in values.chunks_mut(inner).enumerate() {
                    apply(chunk, run % len);
                }
            }
            Self::Block { inner, len, block } => {
                if inner == 0 || len == 0 {
                    return;
                }
                let blocks = len.div_ceil(block);
                for (outer, slab) in values.chunks_mut(inner * len).enumerate() {
                    if inner == 1 {
                        for (b, chunk) in slab.chunks_mut(block).enumerate() {
                            apply(chunk, outer * blocks + b);
                        }
                        continue;
                    }
                    for (k, value) in slab.iter_mut().enumerate() {
                        let b = k / inner / block;
                        apply(std::slice::from_mut(value), (outer * blocks + b) * inner + k % inner);
                    }
                }
            }
        }
    }
}

/// Scales and zero points; zero points are empty where they are all 0. Either may have one entry for all.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Params {
    pub scale: Vec<f32>,
    pub zero: Vec<f32>,
}

impl Params {
    /// Number of distinct parameters.
    pub fn count(&self) -> usize {
        self.scale.len().max(self.zero.len())
    }

    fn at(&self, index: usize) -> (f32, f32) {
        let scale = if self.scale.len() == 1 { self.scale[0] } else { self.scale[index] };
        let zero = match self.zero.len() {
            0 => 0.,
            1 => self.zero[0],
            _ => self.zero[index],
        };
        (scale, zero)
    }
}

/// Quantizes and dequantizes in place: division in f32, half to even, saturating; NaN becomes the lowest code of an
/// integer grid and stays NaN on a float one.
pub(super) fn fake_quant(values: &mut [f32], spread: Spread, params: &Params, grid: Grid) {
    spread.each(values, |chunk, index| {
        let (scale, zero) = params.at(index);
        match grid {
            Grid::Integer { low, high } => {
                let (low, high) = (low - zero, high - zero);
                for v in chunk {
                    *v = round(clamp(*v / scale, low, high)) * scale;
                }
            }
            Grid::Float { mantissa, exponent, max } => {
                for v in chunk {
                    *v = to_float_grid(*v / scale, mantissa, exponent, max) * scale;
                }
            }
        }
    });
}

/// Quantizes in place to integer codes, held as floats; rounding and saturation as [`fake_quant`].
pub(super) fn quantize(values: &mut [f32], spread: Spread, params: &Params, low: f32, high: f32) {
    spread.each(values, |chunk, index| {
        let (scale, zero) = params.at(index);
        for v in chunk {
            *v = round(clamp(*v / scale, low - zero, high - zero)) + zero;
        }
    });
}

/// Dequantizes codes in place: `(code - zero point) * scale`, the difference exact for codes of up to 16 bits.
pub(super) fn dequantize(values: &mut [f32], spread: Spread, params: &Params) {
    spread.each(values, |chunk, index| {
        let (scale, zero) = params.at(index);
        for v in chunk {
            *v = (*v - zero) * scale;
        }
    });
}

/// Clamps; NaN becomes `low`.
#[allow(clippy::manual_clamp, reason = "clamp keeps NaN")]
fn clamp(value: f32, low: f32, high: f32) -> f32 {
    value.max(low).min(high)
}

/// Rounds half to even where |value| < 2^22. Adding and subtracting 1.5·2^23 does it in two vector instructions, where
/// `round_ties_even` is a library call on baseline x86-64.
fn round(value: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.;
    (value + MAGIC) - MAGIC
}

fn to_float_grid(value: f32, mantissa: i32, exponent: i32, max: f32) -> f32 {
    if value.is_nan() || value == 0. {
        return value;
    }
    let value = value.clamp(-max, max);
    let biased = ((value.to_bits() >> 23) & 0xff) as i32;
    let step = 2f32.powi((biased - 127).max(exponent) - mantissa);
    (value / step).round_ties_even() * step
}
