//! Constant tensors: the proto message as it was read, with its bytes in memory or in a mapped file.

use std::borrow::Cow;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::onnx::{DATA_LOCATION_EXTERNAL, DataType, TensorProto};

/// A constant tensor.
///
/// The message is kept as it was read, whichever of its storage forms it uses, so that an untouched tensor is written
/// back unchanged. Data in another file is held as a slice of that mapped file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    proto: TensorProto,
    external: Option<Bytes>,
}

impl Tensor {
    /// A tensor over raw little-endian `data`, packed as ONNX packs `dtype` (sub-byte elements low bits first).
    ///
    /// # Panics
    /// If `data` does not have the length of `dtype` and `dims`: a bug of the caller, not of the input.
    #[must_use]
    pub fn new(dtype: DataType, dims: &[usize], data: impl Into<Bytes>) -> Self {
        let data = data.into();
        let count: usize = dims.iter().product();
        assert_eq!(dtype.bits().map(|b| (b * count).div_ceil(8)), Some(data.len()), "{dtype} {dims:?}");
        let proto = TensorProto {
            dims: dims.iter().map(|&d| d as i64).collect(),
            data_type: Some(dtype.code()),
            raw_data: Some(data),
            ..TensorProto::default()
        };
        Self { proto, external: None }
    }

    /// A float32 tensor.
    #[must_use]
    pub fn from_f32(dims: &[usize], values: &[f32]) -> Self {
        Self::new(DataType::Float, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    /// An int64 tensor.
    #[must_use]
    pub fn from_i64(dims: &[usize], values: &[i64]) -> Self {
        Self::new(DataType::Int64, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    /// An int32 tensor.
    #[must_use]
    pub fn from_i32(dims: &[usize], values: &[i32]) -> Self {
        Self::new(DataType::Int32, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    /// The numbers nearest to `values`, ties to even, as a tensor of one of the float types graphs compute in; `None` for
    /// other types.
    ///
    /// # Panics
    /// If the number of values does not fit `dims`.
    #[must_use]
    pub fn from_f64(dtype: DataType, dims: &[usize], values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values = values.into_iter();
        let data: Vec<u8> = match dtype {
            DataType::Float => values.flat_map(|v| (v as f32).to_le_bytes()).collect(),
            DataType::Double => values.flat_map(f64::to_le_bytes).collect(),
            DataType::Float16 => values.flat_map(|v| half::f16::from_f64(v).to_le_bytes()).collect(),
            DataType::Bfloat16 => values.flat_map(|v| half::bf16::from_f64(v).to_le_bytes()).collect(),
            _ => return None,
        };
        Some(Self::new(dtype, dims, data))
    }

    /// Checks a message and wraps it. `external` is the tensor's slice of its data file, if it has one.
    ///
    /// # Errors
    /// An unknown element type, a negative or overflowing dimension, or data whose length does not fit the shape.
    pub fn from_proto(proto: TensorProto, external: Option<Bytes>) -> Result<Self> {
        let code = proto.data_type.unwrap_or(0);
        let fail = |message: String| Error::model(message).at_value(proto.name.as_deref().unwrap_or(""));
        let Some(dtype) = DataType::from_code(code) else {
            return Err(fail(format!("tensor has unknown element type {code}"))
                .with_hint("the file may be newer than ONNX 1.23, or damaged"));
        };
        let count = element_count(&proto.dims)
            .ok_or_else(|| fail(format!("tensor has impossible dimensions {:?}", proto.dims)))?;
        let tensor = Self { proto, external };
        let (have, unit) = tensor.stored(dtype).ok_or_else(|| {
            Error::model(format!("tensor of type {dtype} holds data of another type"))
                .at_value(tensor.proto.name.as_deref().unwrap_or(""))
                .with_hint("the file was edited by hand, or damaged; export it again")
        })?;
        let want = match (unit, dtype.bits()) {
            ("bytes", Some(bits)) => count.checked_mul(bits).map(|b| b.div_ceil(8)),
            _ => typed_entries(dtype, count),
        };
        if want != Some(have) {
            let name = tensor.proto.name.clone().unwrap_or_default();
            return Err(Error::model(format!(
                "tensor of type {dtype} and shape {:?} holds {have} {unit} instead of {}",
                tensor.proto.dims,
                want.map_or("a representable number".to_owned(), |w| w.to_string())
            ))
            .at_value(&name)
            .with_hint("the file is truncated or was edited by hand; export it again"));
        }
        Ok(tensor)
    }

    /// How many entries are stored and their unit; `None` if they are in a field of another element type.
    fn stored(&self, dtype: DataType) -> Option<(usize, &'static str)> {
        let p = &self.proto;
        let bytes = self.external.as_ref().or(p.raw_data.as_ref());
        match bytes {
            Some(_) if dtype == DataType::String => return None,
            Some(bytes) => return Some((bytes.len(), "bytes")),
            None => {}
        }
        let fields = [
            p.float_data.len(),
            p.int32_data.len(),
            p.int64_data.len(),
            p.double_data.len(),
            p.uint64_data.len(),
            p.string_data.len(),
        ];
        let own = match dtype {
            DataType::Float | DataType::Complex64 => fields[0],
            DataType::Int64 => fields[2],
            DataType::Double | DataType::Complex128 => fields[3],
            DataType::Uint32 | DataType::Uint64 => fields[4],
            DataType::String => fields[5],
            _ => fields[1],
        };
        (own == fields.iter().sum::<usize>()).then_some((own, "entries"))
    }

    /// The bytes that hold the elements, where they are stored as such.
    pub(super) fn slice(&self) -> Option<&Bytes> {
        self.external.as_ref().or(self.proto.raw_data.as_ref())
    }

    /// The tensor with its raw bytes held elsewhere; typed data and external bytes stay.
    pub(super) fn map_raw(mut self, hold: impl FnOnce(Bytes) -> Bytes) -> Self {
        self.proto.raw_data = self.proto.raw_data.map(hold);
        self
    }

    /// Element type.
    ///
    /// # Panics
    /// Never: the type was checked when the tensor was made.
    #[must_use]
    pub fn dtype(&self) -> DataType {
        DataType::from_code(self.proto.data_type.unwrap_or(0)).expect("checked by from_proto")
    }

    /// Shape.
    #[must_use]
    pub fn dims(&self) -> Vec<usize> {
        self.proto.dims.iter().map(|&d| d as usize).collect()
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.proto.dims.iter().map(|&d| d as usize).product()
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The message, with the `name` and external location that it was read with.
    #[must_use]
    pub fn proto(&self) -> &TensorProto {
        &self.proto
    }

    /// Gives back the message and the external bytes.
    #[must_use]
    pub fn into_proto(self) -> (TensorProto, Option<Bytes>) {
        (self.proto, self.external)
    }

    /// Whether the data came from another file.
    #[must_use]
    pub fn is_external(&self) -> bool {
        self.proto.data_location == Some(DATA_LOCATION_EXTERNAL)
    }

    /// Bytes the elements take in raw form; zero for strings.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.dtype().bits().map_or(0, |b| (b * self.len()).div_ceil(8))
    }

    /// The elements as raw little-endian bytes, whatever form they are stored in. Copies only typed data fields.
    /// Empty for strings. The slice may be unaligned.
    #[must_use]
    pub fn raw(&self) -> Bytes {
        if let Some(bytes) = &self.external {
            return bytes.clone();
        }
        let p = &self.proto;
        if let Some(raw) = &p.raw_data {
            return raw.clone();
        }
        let narrow = |width: usize| -> Bytes {
            p.int32_data.iter().flat_map(|v| v.to_le_bytes().into_iter().take(width)).collect::<Vec<u8>>().into()
        };
        match self.dtype() {
            DataType::Float | DataType::Complex64 => {
                p.float_data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
            }
            DataType::Double | DataType::Complex128 => {
                p.double_data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
            }
            DataType::Int64 => p.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into(),
            DataType::Uint64 => p.uint64_data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into(),
            DataType::Uint32 => {
                p.uint64_data.iter().flat_map(|v| (*v as u32).to_le_bytes()).collect::<Vec<u8>>().into()
            }
            DataType::Int32 => narrow(4),
            DataType::Uint16 | DataType::Int16 | DataType::Float16 | DataType::Bfloat16 => narrow(2),
            DataType::Float6e2m3 | DataType::Float6e3m2 => pack_six_bits(&p.int32_data).into(),
            DataType::String => Bytes::new(),
            _ => narrow(1),
        }
    }

    /// The elements as f32, where the type is a float graphs compute in. Doubles are rounded to nearest even.
    #[must_use]
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let raw = self.raw();
        Some(match self.dtype() {
            DataType::Float => elements(&raw, f32::from_le_bytes),
            DataType::Float16 => elements(&raw, |c| half::f16::from_le_bytes(c).to_f32()),
            DataType::Bfloat16 => elements(&raw, |c| half::bf16::from_le_bytes(c).to_f32()),
            DataType::Double => elements(&raw, |c| f64::from_le_bytes(c) as f32),
            _ => return None,
        })
    }

    /// The elements as f64, where the type is a float graphs compute in; exact.
    #[must_use]
    pub fn to_f64(&self) -> Option<Vec<f64>> {
        if self.dtype() == DataType::Double {
            return Some(elements(&self.raw(), f64::from_le_bytes));
        }
        Some(self.to_f32()?.into_iter().map(f64::from).collect())
    }

    /// The elements as i64, where the type is an integer of at least 8 bits or a bool.
    #[must_use]
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        let raw = self.raw();
        Some(match self.dtype() {
            DataType::Int64 => elements(&raw, i64::from_le_bytes),
            DataType::Uint64 => elements(&raw, |c| u64::from_le_bytes(c) as i64),
            DataType::Int32 => elements(&raw, |c| i32::from_le_bytes(c).into()),
            DataType::Uint32 => elements(&raw, |c| u32::from_le_bytes(c).into()),
            DataType::Int16 => elements(&raw, |c| i16::from_le_bytes(c).into()),
            DataType::Uint16 => elements(&raw, |c| u16::from_le_bytes(c).into()),
            DataType::Int8 => elements(&raw, |c| i8::from_le_bytes(c).into()),
            DataType::Uint8 | DataType::Bool => elements(&raw, |c| u8::from_le_bytes(c).into()),
            _ => return None,
        })
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// If the element counts differ.
    #[must_use]
    pub fn reshaped(mut self, dims: &[usize]) -> Self {
        assert_eq!(dims.iter().product::<usize>(), self.len());
        self.proto.dims = dims.iter().map(|&d| d as i64).collect();
        self
    }

    /// Strings, for string tensors.
    #[must_use]
    pub fn strings(&self) -> Cow<'_, [Bytes]> {
        Cow::Borrowed(&self.proto.string_data)
    }
}

fn elements<T, const N: usize>(raw: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    raw.as_chunks().0.iter().map(|&bytes| read(bytes)).collect()
}

/// Entries that the typed data field of `dtype` has for `count` elements.
fn typed_entries(dtype: DataType, count: usize) -> Option<usize> {
    match dtype {
        DataType::Uint4 | DataType::Int4 | DataType::Float4e2m1 => Some(count.div_ceil(2)),
        DataType::Uint2 | DataType::Int2 => Some(count.div_ceil(4)),
        DataType::Complex64 | DataType::Complex128 => count.checked_mul(2),
        _ => Some(count),
    }
}

/// The product of `dims`, unless one is negative or the product overflows, also where a zero among them would hide it.
#[must_use]
pub fn element_count(dims: &[i64]) -> Option<usize> {
    let most = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?.max(1)))?;
    Some(if dims.contains(&0) { 0 } else { most })
}

/// Four 6-bit codes in three bytes, low bits first.
fn pack_six_bits(codes: &[i32]) -> Vec<u8> {
    let mut out = vec![0u8; (codes.len() * 6).div_ceil(8)];
    for (i, &code) in codes.iter().enumerate() {
        let (byte, shift) = (i * 6 / 8, i * 6 % 8);
        let wide = ((code & 0x3f) as u16) << shift;
        out[byte] |= wide as u8;
        if wide > 0xff {
            out[byte + 1] |= (wide >> 8) as u8;
        }
    }
    out
}
