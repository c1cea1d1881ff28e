//! Constants: tensors as they are stored, or packed weights that are decoded when a plan is made.

use super::kernel::{Params, Spread, dequantize};
use crate::ir::Tensor;
use crate::onnx::DataType;

/// A constant of a program. Cloning shares the bytes.
#[allow(clippy::large_enum_variant, reason = "nearly all are plain")]
#[derive(Clone, Debug)]
pub(super) enum Constant {
    /// As it is stored.
    Plain(Tensor),
    /// The result of `DequantizeLinear`.
    Dequantized(Box<Dequantized>),
    /// The weight of a `MatMulNBits`.
    Blocks(Box<Blocks>),
}

/// Packed data with its parameters.
#[derive(Clone, Debug)]
pub(super) struct Dequantized {
    pub data: Tensor,
    pub scale: Constant,
    pub zero: Option<Tensor>,
    /// What the zero point is where there is no tensor for it.
    pub default_zero: f32,
    pub axis: i64,
    pub block: i64,
}

/// A weight as `MatMulNBits` stores it: rows of blocks of `bits`-wide codes, low bits first.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub data: Tensor,
    pub scale: Tensor,
    pub zero: Option<Tensor>,
    /// K and N of the K×N matrix it stands for.
    pub shape: [usize; 2],
    pub block: usize,
    pub bits: usize,
}

impl Constant {
    /// Shape once decoded.
    pub fn dims(&self) -> Vec<usize> {
        match self {
            Self::Plain(tensor) => tensor.dims(),
            Self::Dequantized(packed) => packed.data.dims(),
            Self::Blocks(blocks) => blocks.shape.to_vec(),
        }
    }

    /// The elements as float32; doubles and 32-bit integers are rounded to nearest even.
    ///
    /// # Errors
    /// A type without numbers, or parameters that do not fit, as a clause.
    pub fn values(&self) -> Result<Vec<f32>, String> {
        match self {
            Self::Plain(tensor) => codes(tensor),
            Self::Dequantized(packed) => packed.decode(),
            Self::Blocks(blocks) => blocks.decode(),
        }
    }
}

impl Dequantized {
    fn decode(&self) -> Result<Vec<f32>, String> {
        let zero = match &self.zero {
            Some(zero) => codes(zero)?,
            None if self.default_zero == 0. => Vec::new(),
            None => vec![self.default_zero],
        };
        let params = Params { scale: self.scale.values()?, zero };
        let spread = Spread::new(&self.data.dims(), params.count(), self.axis, self.block)?;
        let mut values = codes(&self.data)?;
        dequantize(&mut values, spread, &params);
        Ok(values)
    }
}

impl Blocks {
    fn decode(&self) -> Result<Vec<f32>, String> {
        let Self { data, scale, zero, shape: [depth, rows], block, bits } = self;
        let (depth, rows, block, bits) = (*depth, *rows, *block, *bits);
        let blocks = depth.div_ceil(block);
        let row = blocks * (block * bits).div_ceil(8);
        let (data, scale) = (data.raw(), codes(scale)?);
        if data.len() != rows * row || scale.len() != rows * blocks {
            return Err(format!("{} weight bytes and {} scales do not fit {depth}x{rows}", data.len(), scale.len()));
        }
        let code = |bytes: &[u8], at: usize| {
            f32::from((bytes[at * bits / 8] >> (at * bits % 8)) & (((1u16 << bits) - 1) as u8))
        };
        let zero_row = (blocks * bits).div_ceil(8);
        let packed = zero.as_ref().filter(|z| z.dtype() == DataType::Uint8).map(Tensor::raw);
        let float = zero.as_ref().filter(|z| z.dtype() != DataType::Uint8).map(codes).transpose()?;
        if packed.as_ref().is_some_and(|z| z.len() != rows * zero_row)
            || float.as_ref().is_some_and(|z| z.len() != rows * blocks)
        {
            return Err(format!("zero points do not fit {depth}x{rows}"));
        }
        let mut out = vec![0f32; depth * rows];
        for n in 0..rows {
            for b in 0..blocks {
                let zero = match (&packed, &float) {
                    (Some(packed), _) => code(&packed[n * zero_row..], b),
                    (_, Some(float)) => float[n * blocks + b],
                    _ => f32::from(1u8 << (bits - 1)),
                };
                let codes = &data[n * row + b * row / blocks..];
                let scale = scale[n * blocks + b];
                for k in b * block..depth.min((b + 1) * block) {
                    out[k * rows + n] = (code(codes, k - b * block) - zero) * scale;
                }
            }
        }
        Ok(out)
    }
}

/// Elements as float32, sub-byte and small-float formats included.
pub(super) fn codes(tensor: &Tensor) -> Result<Vec<f32>, String> {
    if let Some(values) = tensor.to_f32() {
        return Ok(values);
    }
    let raw = tensor.raw();
    let count = tensor.len();
    let unpack = |bits: usize, value: &dyn Fn(u8) -> f32| -> Vec<f32> {
        let table: Vec<f32> = (0..1u16 << bits).map(|c| value(c as u8)).collect();
        let mask = ((1u16 << bits) - 1) as u8;
        (0..count).map(|k| table[usize::from((raw[k * bits / 8] >> (k * bits % 8)) & mask)]).collect()
    };
    let signed = |bits: u32| move |code: u8| f32::from(((code << (8 - bits)) as i8) >> (8 - bits));
    Ok(match tensor.dtype() {
        DataType::Uint8 => raw.iter().map(|&b| f32::from(b)).collect(),
        DataType::Int8 => raw.iter().map(|&b| f32::from(b as i8)).collect(),
        DataType::Uint16 => pairs(&raw, |b| f32::from(u16::from_le_bytes(b))),
        DataType::Int16 => pairs(&raw, |b| f32::from(i16::from_le_bytes(b))),
        DataType::Int32 | DataType::Int64 | DataType::Uint32 => {
            tensor.to_i64().unwrap_or_default().into_iter().map(|v| v as f32).collect()
        }
        DataType::Uint4 => unpack(4, &f32::from),
        DataType::Int4 => unpack(4, &signed(4)),
        DataType::Uint2 => unpack(2, &f32::from),
        DataType::Int2 => unpack(2, &signed(2)),
        DataType::Float4e2m1 => unpack(4, &|c| small_float(c, 2, 1, 1, Special::None)),
        DataType::Float8e4m3fn => unpack(8, &|c| small_float(c, 4, 3, 7, Special::NanAtTop)),
        DataType::Float8e4m3fnuz => unpack(8, &|c| small_float(c, 4, 3, 8, Special::NanAtMinusZero)),
        DataType::Float8e5m2 => unpack(8, &|c| small_float(c, 5, 2, 15, Special::Ieee)),
        DataType::Float8e5m2fnuz => unpack(8, &|c| small_float(c, 5, 2, 16, Special::NanAtMinusZero)),
        DataType::Float8e8m0 => unpack(8, &|c| if c == 255 { f32::NAN } else { 2f64.powi(i32::from(c) - 127) as f32 }),
        other => return Err(format!("constants of type {other} cannot be decoded")),
    })
}

fn pairs(raw: &[u8], value: impl Fn([u8; 2]) -> f32) -> Vec<f32> {
    raw.chunks_exact(2).map(|c| value([c[0], c[1]])).collect()
}

/// Codes that a small float format gives away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Special {
    None,
    /// All ones is NaN; no infinities.
    NanAtTop,
    /// The code of -0 is the one NaN; no infinities.
    NanAtMinusZero,
    /// As IEEE 754: the top exponent is infinity and NaN.
    Ieee,
}

fn small_float(code: u8, exponent_bits: i32, mantissa_bits: i32, bias: i32, special: Special) -> f32 {
    let magnitude = i32::from(code) & ((1 << (exponent_bits + mantissa_bits)) - 1);
    let negative = i32::from(code) >> (exponent_bits + mantissa_bits) & 1 == 1;
    let (exponent, mantissa) = (magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1));
    let top = (1 << exponent_bits) - 1;
    let value = match special {
        Special::NanAtTop if magnitude == (1 << (exponent_bits + mantissa_bits)) - 1 => f32::NAN,
        Special::NanAtMinusZero if negative && magnitude == 0 => f32::NAN,
        Special::Ieee if exponent == top && mantissa == 0 => f32::INFINITY,
        Special::Ieee if exponent == top => f32::NAN,
        _ if exponent == 0 => mantissa as f32 * 2f32.powi(1 - bias - mantissa_bits),
        _ => ((1 << mantissa_bits) + mantissa) as f32 * 2f32.powi(exponent - bias - mantissa_bits),
    };
    if negative { -value } else { value }
}
