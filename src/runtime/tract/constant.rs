//! Constants: tensors as they are stored, or packed weights that are decoded when a plan is made.

use super::kernel::{granularity, qparams};
use crate::ir::Tensor;
use crate::numerics::{Format, Granularity, QParams, decode_float8e8m0, dequantize_serial, pack};
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
    pub default_zero: i32,
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
            Self::Plain(tensor) => values(tensor),
            Self::Dequantized(packed) => packed.decode(),
            Self::Blocks(blocks) => blocks.decode(),
        }
    }
}

impl Dequantized {
    fn decode(&self) -> Result<Vec<f32>, String> {
        let dtype = self.data.dtype();
        let format = dtype.format().ok_or_else(|| undecodable(dtype))?;
        let zero_points = match &self.zero {
            Some(zero) => values(zero)?.into_iter().map(|v| v as i32).collect(),
            None => vec![self.default_zero],
        };
        let qparams = qparams(self.scale.values()?, zero_points);
        let dims = self.data.dims();
        let granularity = granularity(&dims, qparams.scales.len(), self.axis, self.block)?;
        dequantize_serial(&self.data.raw(), format, &dims, &granularity, &qparams).map_err(|e| e.message().to_owned())
    }
}

impl Blocks {
    fn decode(&self) -> Result<Vec<f32>, String> {
        let Self { data, scale, zero, shape: [depth, rows], block, bits } = self;
        let (depth, rows, block, bits) = (*depth, *rows, *block, *bits);
        let blocks = depth.div_ceil(block);
        let format = match bits {
            2 => Format::Uint2,
            4 => Format::Uint4,
            _ => Format::Uint8,
        };
        let (data, scale) = (data.raw(), values(scale)?);
        let block_len = block.checked_mul(bits).map_or(usize::MAX, |bits| bits.div_ceil(8));
        let all = rows.checked_mul(blocks);
        if all.and_then(|all| all.checked_mul(block_len)) != Some(data.len()) || all != Some(scale.len()) {
            return Err(format!("{} weight bytes and {} scales do not fit {depth}x{rows}", data.len(), scale.len()));
        }
        let zero_row = pack::packed_len(blocks, bits);
        let packed = zero.as_ref().filter(|z| z.dtype() == DataType::Uint8).map(Tensor::raw);
        let float = zero.as_ref().filter(|z| z.dtype() != DataType::Uint8).map(values).transpose()?;
        if packed.as_ref().is_some_and(|z| z.len() != rows * zero_row)
            || float.as_ref().is_some_and(|z| z.len() != rows * blocks)
        {
            return Err(format!("zero points do not fit {depth}x{rows}"));
        }
        let mut out = vec![0f32; depth * rows];
        for n in 0..rows {
            let zeros: Vec<f32> = match (&packed, &float) {
                (Some(packed), _) => {
                    pack::unpack(&packed[n * zero_row..], &format, blocks).into_iter().map(|zero| zero as f32).collect()
                }
                (_, Some(float)) => float[n * blocks..(n + 1) * blocks].to_vec(),
                _ => vec![f32::from(1u8 << (bits - 1)); blocks],
            };
            for (b, zero) in zeros.into_iter().enumerate() {
                let at = n * blocks + b;
                let codes = pack::unpack(&data[at * block_len..], &format, block.min(depth - b * block));
                for (k, code) in codes.into_iter().enumerate() {
                    out[(b * block + k) * rows + n] = (code as f32 - zero) * scale[at];
                }
            }
        }
        Ok(out)
    }
}

/// Elements as float32, sub-byte and small-float formats included.
pub(super) fn values(tensor: &Tensor) -> Result<Vec<f32>, String> {
    if let Some(values) = tensor.to_f32() {
        return Ok(values);
    }
    let dtype = tensor.dtype();
    if let Some(format) = dtype.format() {
        let unscaled = QParams::per_tensor(1., 0);
        return dequantize_serial(&tensor.raw(), format, &tensor.dims(), &Granularity::PerTensor, &unscaled)
            .map_err(|e| e.message().to_owned());
    }
    match (dtype, tensor.to_i64()) {
        (DataType::Int64 | DataType::Uint32, Some(values)) => Ok(values.into_iter().map(|v| v as f32).collect()),
        (DataType::Float8e8m0, _) => Ok(tensor.raw().iter().map(|&code| decode_float8e8m0(code)).collect()),
        _ => Err(undecodable(dtype)),
    }
}

fn undecodable(dtype: DataType) -> String {
    format!("constants of type {dtype} cannot be decoded")
}
