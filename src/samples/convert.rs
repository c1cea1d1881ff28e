//! Element types: their numpy names, and the conversions between them.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::onnx::DataType;

/// numpy's name of a type, or ONNX's if there is none.
pub(super) fn numpy_name(dtype: DataType) -> &'static str {
    match dtype {
        DataType::Float => "float32",
        DataType::Double => "float64",
        other => other.name(),
    }
}

/// Elements of type `from` as `to`, in little-endian bytes: lossless widening, and float64 rounded to float32, since
/// numpy computes in float64 by default. `None` for every other pair.
pub(super) fn convert(bytes: Vec<u8>, from: DataType, to: DataType) -> Option<Vec<u8>> {
    if from == to {
        return Some(bytes);
    }
    if !converts(from, to) {
        return None;
    }
    let floats: Option<Box<dyn Iterator<Item = f64> + '_>> = match from {
        DataType::Float16 => Some(Box::new(elements(&bytes).map(|b| f16::from_le_bytes(b).to_f64()))),
        DataType::Float => Some(Box::new(elements(&bytes).map(|b| f64::from(f32::from_le_bytes(b))))),
        DataType::Double => Some(Box::new(elements(&bytes).map(f64::from_le_bytes))),
        _ => None,
    };
    if let Some(floats) = floats {
        return Some(match to {
            DataType::Float => floats.flat_map(|v| (v as f32).to_le_bytes()).collect(),
            _ => floats.flat_map(f64::to_le_bytes).collect(),
        });
    }
    let (width, wide) = (from.bits()? / 8, to.bits()? / 8);
    let signed = is_signed(from)?;
    let mut out = Vec::with_capacity(bytes.len() / width * wide);
    for element in bytes.chunks_exact(width) {
        let negative = signed && element.last().is_some_and(|b| b & 0x80 != 0);
        out.extend_from_slice(element);
        out.extend(std::iter::repeat_n(if negative { 0xff } else { 0 }, wide - width));
    }
    Some(out)
}

/// Appends the number of a float type that is nearest to `value`, ties to even; whether the type is one.
pub(super) fn push_float(value: f64, dtype: DataType, out: &mut Vec<u8>) -> bool {
    match dtype {
        DataType::Float => out.extend_from_slice(&(value as f32).to_le_bytes()),
        DataType::Double => out.extend_from_slice(&value.to_le_bytes()),
        DataType::Float16 => out.extend_from_slice(&f16::from_f64(value).to_le_bytes()),
        DataType::Bfloat16 => out.extend_from_slice(&bf16::from_f64(value).to_le_bytes()),
        _ => return false,
    }
    true
}

/// Whether [`convert`] goes from one type to the other.
pub(super) fn converts(from: DataType, to: DataType) -> bool {
    use DataType::{Double, Float, Float16};
    if from == to || matches!((from, to), (Double | Float16, Float) | (Float | Float16, Double)) {
        return true;
    }
    match (is_signed(from), is_signed(to)) {
        (Some(a), Some(b)) => from.bits() < to.bits() && (b || !a),
        _ => false,
    }
}

/// Whether an integer type of whole bytes has a sign.
fn is_signed(dtype: DataType) -> Option<bool> {
    match dtype {
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => Some(true),
        DataType::Uint8 | DataType::Uint16 | DataType::Uint32 | DataType::Uint64 => Some(false),
        _ => None,
    }
}

fn elements<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks::<N>().0.iter().copied()
}

/// Reverses the bytes of each element.
pub(super) fn swap_bytes(bytes: &mut [u8], width: usize) {
    if width > 1 {
        bytes.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
}

/// Elements stored first axis fastest, in the order last axis fastest.
pub(super) fn from_fortran<'a>(bytes: &'a [u8], shape: &[usize], width: usize) -> Cow<'a, [u8]> {
    if shape.len() < 2 || bytes.is_empty() {
        return Cow::Borrowed(bytes);
    }
    let mut strides = Vec::with_capacity(shape.len());
    let mut stride = width;
    for &dim in shape {
        strides.push(stride);
        stride *= dim;
    }
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    loop {
        out.extend_from_slice(&bytes[at..at + width]);
        let mut axis = shape.len();
        loop {
            if axis == 0 {
                return Cow::Owned(out);
            }
            axis -= 1;
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
}
