//! Tensors to onnxruntime and back.

use half::{bf16, f16};
use ort::tensor::{PrimitiveTensorElementType, TensorElementType};
use ort::value::{DynValue, Tensor as Array, ValueType};

use crate::ir::Tensor;
use crate::onnx::DataType;

/// Whether tensors of this type can be given to onnxruntime and taken from it.
pub(super) fn is_known(dtype: DataType) -> bool {
    is_float(dtype) || Tensor::new(dtype, &[0], Vec::new()).to_i64().is_some() || dtype == DataType::String
}

/// Whether it is a type of floats that graphs compute in.
pub(super) fn is_float(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16)
}

/// A tensor as onnxruntime's.
///
/// # Errors
/// A type that there is no way for.
pub(super) fn to_value(tensor: &Tensor) -> Result<DynValue, String> {
    fn plain<T, const N: usize>(tensor: &Tensor, read: impl Fn([u8; N]) -> T) -> Result<DynValue, String>
    where
        T: PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static,
    {
        let elements: Vec<T> = tensor.raw().as_chunks().0.iter().map(|&bytes| read(bytes)).collect();
        Array::from_array((tensor.dims(), elements)).map(Array::into_dyn).map_err(|e| e.message().to_owned())
    }
    match tensor.dtype() {
        DataType::Float => plain(tensor, f32::from_le_bytes),
        DataType::Double => plain(tensor, f64::from_le_bytes),
        DataType::Float16 => plain(tensor, f16::from_le_bytes),
        DataType::Bfloat16 => plain(tensor, bf16::from_le_bytes),
        DataType::Int64 => plain(tensor, i64::from_le_bytes),
        DataType::Int32 => plain(tensor, i32::from_le_bytes),
        DataType::Int16 => plain(tensor, i16::from_le_bytes),
        DataType::Int8 => plain(tensor, i8::from_le_bytes),
        DataType::Uint64 => plain(tensor, u64::from_le_bytes),
        DataType::Uint32 => plain(tensor, u32::from_le_bytes),
        DataType::Uint16 => plain(tensor, u16::from_le_bytes),
        DataType::Uint8 => plain(tensor, u8::from_le_bytes),
        DataType::Bool => plain(tensor, |[byte]: [u8; 1]| byte != 0),
        DataType::String => {
            let strings: Vec<String> =
                tensor.strings().iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect();
            let array = Array::from_string_array((tensor.dims(), strings.as_slice()));
            array.map(Array::into_dyn).map_err(|e| e.message().to_owned())
        }
        dtype => Err(format!("tensors of type {dtype} cannot be given to it")),
    }
}

/// A tensor from onnxruntime's, half and bfloat16 widened to float32.
///
/// # Errors
/// Something else than a tensor of numbers.
pub(super) fn from_value(value: &DynValue) -> Result<Tensor, String> {
    fn plain<T, const N: usize>(
        value: &DynValue,
        dtype: DataType,
        write: impl Fn(T) -> [u8; N],
    ) -> Result<Tensor, String>
    where
        T: PrimitiveTensorElementType + Copy,
    {
        let (shape, elements) = extract::<T>(value)?;
        Ok(Tensor::new(dtype, &shape, elements.iter().flat_map(|&v| write(v)).collect::<Vec<u8>>()))
    }
    let ValueType::Tensor { ty, .. } = value.dtype() else { return Err("an output is not a tensor".to_owned()) };
    match ty {
        TensorElementType::Float32 => plain(value, DataType::Float, f32::to_le_bytes),
        TensorElementType::Float64 => plain(value, DataType::Double, f64::to_le_bytes),
        TensorElementType::Float16 => plain(value, DataType::Float, |v: f16| v.to_f32().to_le_bytes()),
        TensorElementType::Bfloat16 => plain(value, DataType::Float, |v: bf16| v.to_f32().to_le_bytes()),
        TensorElementType::Int64 => plain(value, DataType::Int64, i64::to_le_bytes),
        TensorElementType::Int32 => plain(value, DataType::Int32, i32::to_le_bytes),
        TensorElementType::Int16 => plain(value, DataType::Int16, i16::to_le_bytes),
        TensorElementType::Int8 => plain(value, DataType::Int8, i8::to_le_bytes),
        TensorElementType::Uint64 => plain(value, DataType::Uint64, u64::to_le_bytes),
        TensorElementType::Uint32 => plain(value, DataType::Uint32, u32::to_le_bytes),
        TensorElementType::Uint16 => plain(value, DataType::Uint16, u16::to_le_bytes),
        TensorElementType::Uint8 => plain(value, DataType::Uint8, u8::to_le_bytes),
        TensorElementType::Bool => plain(value, DataType::Bool, |v: bool| [u8::from(v)]),
        ty => Err(format!("an output is a tensor of type {ty}")),
    }
}

/// Shows the numbers of a float tensor and its shape; `false` if it is something else.
///
/// # Errors
/// A tensor that cannot be read.
pub(super) fn floats(value: &DynValue, see: &mut dyn FnMut(&[f32], &[usize])) -> Result<bool, String> {
    let ValueType::Tensor { ty, .. } = value.dtype() else { return Ok(false) };
    match ty {
        // Not copied.
        TensorElementType::Float32 => {
            let (shape, elements) = extract::<f32>(value)?;
            see(elements, &shape);
        }
        TensorElementType::Float16 | TensorElementType::Bfloat16 | TensorElementType::Float64 => {
            let tensor = from_value(value)?;
            see(&tensor.to_f32().unwrap_or_default(), &tensor.dims());
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn extract<T: PrimitiveTensorElementType>(value: &DynValue) -> Result<(Vec<usize>, &[T]), String> {
    let (shape, elements) = value.try_extract_tensor::<T>().map_err(|e| e.message().to_owned())?;
    Ok((shape.iter().map(|&d| d as usize).collect(), elements))
}
