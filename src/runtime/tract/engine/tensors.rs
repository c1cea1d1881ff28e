//! Tensors to tract's arrays and back.

use tract_core::internal::{Datum, DatumType, Tensor as Array, TractResult};
use tract_hir::tract_num_traits::Zero;

use super::super::constant::{Constant, values};
use crate::ir::Tensor;
use crate::ir::file::release;
use crate::numerics::pack;
use crate::onnx::DataType;

/// A constant as tract computes with it: floats of 4 to 16 bits as float32, sub-byte integers one to a byte.
///
/// # Errors
/// A type tract does not have, as a clause.
pub(crate) fn to_array(constant: &Constant) -> Result<Array, String> {
    let (made, stored) = match constant {
        Constant::Plain(tensor) => (plain(tensor), tensor),
        Constant::Dequantized(packed) => (array(&constant.dims(), &constant.values()?), &packed.data),
        Constant::Blocks(blocks) => (array(&constant.dims(), &constant.values()?), &blocks.data),
    };
    if stored.proto().raw_data.is_some() || stored.is_external() {
        release(&stored.raw());
    }
    made
}

fn plain(tensor: &Tensor) -> Result<Array, String> {
    let (dims, raw) = (tensor.dims(), tensor.raw());
    let made = match tensor.dtype() {
        DataType::Float => fill(&dims, &raw, f32::from_le_bytes),
        DataType::Double => fill(&dims, &raw, f64::from_le_bytes),
        DataType::Int64 => fill(&dims, &raw, i64::from_le_bytes),
        DataType::Uint64 => fill(&dims, &raw, u64::from_le_bytes),
        DataType::Int32 => fill(&dims, &raw, i32::from_le_bytes),
        DataType::Uint32 => fill(&dims, &raw, u32::from_le_bytes),
        DataType::Int16 => fill(&dims, &raw, i16::from_le_bytes),
        DataType::Uint16 => fill(&dims, &raw, u16::from_le_bytes),
        DataType::Int8 => fill(&dims, &raw, i8::from_le_bytes),
        DataType::Uint8 => fill(&dims, &raw, u8::from_le_bytes),
        DataType::Bool => {
            let values: Vec<bool> = raw.iter().map(|&b| b != 0).collect();
            Array::from_shape(&dims, &values)
        }
        dtype if is_small_float(dtype) || matches!(dtype, DataType::Float16 | DataType::Bfloat16) => {
            return array(&dims, &values(tensor)?);
        }
        DataType::Uint4 | DataType::Uint2 => {
            let codes: Vec<u8> = values(tensor)?.into_iter().map(|v| v as u8).collect();
            Array::from_shape(&dims, &codes)
        }
        DataType::Int4 | DataType::Int2 => {
            let codes: Vec<i8> = values(tensor)?.into_iter().map(|v| v as i8).collect();
            Array::from_shape(&dims, &codes)
        }
        other => return Err(format!("tensors of type {other} are not implemented")),
    };
    made.map_err(|e| e.to_string())
}

fn array(dims: &[usize], values: &[f32]) -> Result<Array, String> {
    Array::from_shape(dims, values).map_err(|e| e.to_string())
}

/// One allocation, filled in place: weights are large.
fn fill<T: Datum + Copy + Zero, const N: usize>(
    dims: &[usize],
    raw: &[u8],
    read: impl Fn([u8; N]) -> T,
) -> TractResult<Array> {
    let mut array = Array::zero::<T>(dims)?;
    let mut view = array.try_as_plain_ram_mut()?;
    for (slot, chunk) in view.as_slice_mut::<T>()?.iter_mut().zip(raw.chunks_exact(N)) {
        *slot = read(chunk.try_into()?);
    }
    Ok(array)
}

/// Whether tensors of this type are float32 tensors here, of numbers that the type can hold.
fn is_small_float(dtype: DataType) -> bool {
    dtype == DataType::Float8e8m0 || dtype.format().is_some_and(|format| !format.is_integer())
}

/// The type tract is given for tensors of `dtype`.
pub(crate) fn datum_type(dtype: DataType) -> Option<DatumType> {
    Some(match dtype {
        DataType::Float | DataType::Float16 | DataType::Bfloat16 => DatumType::F32,
        DataType::Double => DatumType::F64,
        DataType::Int64 => DatumType::I64,
        DataType::Uint64 => DatumType::U64,
        DataType::Int32 => DatumType::I32,
        DataType::Uint32 => DatumType::U32,
        DataType::Int16 => DatumType::I16,
        DataType::Uint16 => DatumType::U16,
        DataType::Int8 | DataType::Int4 | DataType::Int2 => DatumType::I8,
        DataType::Uint8 | DataType::Uint4 | DataType::Uint2 => DatumType::U8,
        DataType::Bool => DatumType::Bool,
        dtype if is_small_float(dtype) => DatumType::F32,
        _ => return None,
    })
}

/// A result of tract. `declared` tells integers below a byte from bytes, and floats of up to eight bits from float32; half
/// and bfloat16 come back as float32.
///
/// # Errors
/// A type that ONNX does not have, as a clause.
pub(crate) fn from_array(array: &Array, declared: Option<DataType>) -> Result<Tensor, String> {
    let array = if array.datum_type().is_tdim() {
        array.cast_to::<i64>().map_err(|e| e.to_string())?
    } else {
        std::borrow::Cow::Borrowed(array)
    };
    let dtype = match array.datum_type().unquantized() {
        DatumType::F32 => DataType::Float,
        DatumType::F16 => DataType::Float16,
        DatumType::F64 => DataType::Double,
        DatumType::I64 => DataType::Int64,
        DatumType::U64 => DataType::Uint64,
        DatumType::I32 => DataType::Int32,
        DatumType::U32 => DataType::Uint32,
        DatumType::I16 => DataType::Int16,
        DatumType::U16 => DataType::Uint16,
        DatumType::I8 => DataType::Int8,
        DatumType::U8 => DataType::Uint8,
        DatumType::Bool => DataType::Bool,
        other => return Err(format!("a result of type {other:?} has no ONNX type")),
    };
    let plain = array.try_as_plain_ram().map_err(|e| e.to_string())?;
    let bytes = plain.as_bytes();
    let small = declared.and_then(|d| Some((d, d.format().filter(|f| !f.is_integer())?)));
    if let (DataType::Float, Some((narrow, format))) = (dtype, small) {
        let values = plain.as_slice::<f32>().map_err(|e| e.to_string())?;
        let codes: Vec<u8> = values.iter().map(|&v| format.encode(v) as u8).collect();
        return Ok(Tensor::new(narrow, array.shape(), pack::pack_bytes(&codes, format.bits())));
    }
    if declared == Some(DataType::Float8e8m0) {
        return Err("outputs of type float8e8m0 are not implemented".to_owned());
    }
    Ok(match (dtype, declared) {
        (DataType::Int8 | DataType::Uint8, Some(narrow)) if matches!(narrow.bits(), Some(2 | 4)) => {
            Tensor::new(narrow, array.shape(), pack::pack_bytes(bytes, narrow.bits().unwrap_or(8)))
        }
        _ => Tensor::new(dtype, array.shape(), bytes.to_vec()),
    })
}
