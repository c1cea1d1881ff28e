//! Types and tensors, read.

use bytes::Bytes;

use super::elements::{encode, entries_per_element, entry_bits, fill, is_signed, is_small_float, pack};
use super::tokens::{Literal, Parser, dtype_code, is_type_word};
use crate::error::Result;
use crate::ir::element_count;
use crate::onnx::{
    DATA_LOCATION_EXTERNAL, DataType, SparseTensorProto, TensorProto, TensorShapeProto, TypeProto, tensor_shape_proto,
    type_proto,
};

/// Most elements that are filled in for one tensor.
const MAX_FILL: usize = 1 << 26;

impl Parser<'_> {
    pub(super) fn nan32(&self, from: usize, bits: u64) -> Result<f32> {
        u32::try_from(bits)
            .ok()
            .map(f32::from_bits)
            .filter(|v| v.is_nan())
            .ok_or_else(|| self.error(from, "not the bits of a NaN of 32 bits"))
    }

    pub(super) fn ty(&mut self) -> Result<TypeProto> {
        self.deeper(|p| {
            p.blank();
            let from = p.at;
            let word = p.word();
            let value = if let Some(code) = dtype_code(word) {
                type_proto::Value::TensorType(type_proto::Tensor { elem_type: Some(code), shape: p.shape()? })
            } else {
                p.expect("(")?;
                let value = match word {
                    "seq" => type_proto::Value::SequenceType(type_proto::Sequence { elem_type: p.inner()? }),
                    "optional" => type_proto::Value::OptionalType(type_proto::Optional { elem_type: p.inner()? }),
                    "map" => {
                        let key_type = Some(p.dtype()?);
                        let value_type = if p.accept(",") { p.inner()? } else { None };
                        type_proto::Value::MapType(type_proto::Map { key_type, value_type })
                    }
                    "sparse_tensor" => {
                        let elem_type = Some(p.dtype()?);
                        type_proto::Value::SparseTensorType(type_proto::SparseTensor { elem_type, shape: p.shape()? })
                    }
                    "opaque" => type_proto::Value::OpaqueType(p.opaque()?),
                    _ => return Err(p.error(from, "not a type")),
                };
                p.expect(")")?;
                value
            };
            Ok(TypeProto { value: Some(value), denotation: None })
        })
    }

    fn dtype(&mut self) -> Result<i32> {
        self.blank();
        let from = self.at;
        dtype_code(self.word()).ok_or_else(|| self.error(from, "not an element type"))
    }

    fn inner(&mut self) -> Result<Option<Box<TypeProto>>> {
        if self.peek() == Some(b')') {
            return Ok(None);
        }
        if !is_type_word(self.peek_word()) {
            return self.expected("a type");
        }
        Ok(Some(Box::new(self.ty()?)))
    }

    fn opaque(&mut self) -> Result<type_proto::Opaque> {
        if self.peek() == Some(b')') {
            return Ok(type_proto::Opaque::default());
        }
        let mut first = self.name("a name")?;
        while self.accept(".") {
            first = format!("{first}.{}", self.name("a name")?);
        }
        Ok(if self.accept(",") {
            type_proto::Opaque { domain: Some(first), name: Some(self.name("a name")?) }
        } else {
            type_proto::Opaque { domain: None, name: Some(first) }
        })
    }

    /// Dimensions: none is a scalar, `[]` an unknown rank.
    fn shape(&mut self) -> Result<Option<TensorShapeProto>> {
        let mut shape = TensorShapeProto::default();
        if self.accept("[") {
            if self.accept("]") {
                return Ok(None);
            }
            self.list("]", |p| {
                let value = match p.peek() {
                    Some(b'?') => {
                        p.at += 1;
                        None
                    }
                    Some(b) if b == b'-' || b.is_ascii_digit() => {
                        Some(tensor_shape_proto::dimension::Value::DimValue(p.int()?))
                    }
                    _ => Some(tensor_shape_proto::dimension::Value::DimParam(p.name("a dimension")?)),
                };
                shape.dim.push(tensor_shape_proto::Dimension { value, denotation: None });
                Ok(())
            })?;
        }
        Ok(Some(shape))
    }

    /// A tensor of an attribute or a sparse tensor, after its type.
    pub(super) fn named_tensor(&mut self, at: usize, ty: &TypeProto) -> Result<TensorProto> {
        let name = match self.peek() {
            Some(b'"') => Some(self.quoted()?),
            _ => Some(self.word()).filter(|w| !w.is_empty()).map(str::to_owned),
        };
        self.accept("=");
        self.tensor(at, ty, name)
    }

    pub(super) fn sparse(&mut self, at: usize, ty: &type_proto::SparseTensor) -> Result<SparseTensorProto> {
        let dims = self.fixed(at, ty.shape.as_ref())?;
        let part = |p: &mut Self| {
            p.blank();
            let at = p.at;
            if !is_type_word(p.peek_word()) {
                return p.expected("a tensor");
            }
            let ty = p.ty()?;
            p.named_tensor(at, &ty)
        };
        self.expect("{")?;
        let values = Some(part(self)?);
        self.expect(",")?;
        let indices = Some(part(self)?);
        self.expect("}")?;
        Ok(SparseTensorProto { values, indices, dims })
    }

    /// The dimensions of a tensor's type, which started at `at`.
    fn fixed(&self, at: usize, shape: Option<&TensorShapeProto>) -> Result<Vec<i64>> {
        let Some(shape) = shape else {
            return Err(self.error(at, "a tensor with elements needs a shape; `[]` is an unknown one"));
        };
        let dim = |d: &tensor_shape_proto::Dimension| match d.value {
            Some(tensor_shape_proto::dimension::Value::DimValue(n)) if n >= 0 => Some(n),
            _ => None,
        };
        shape
            .dim
            .iter()
            .map(dim)
            .collect::<Option<_>>()
            .ok_or_else(|| self.error(at, "a tensor with elements needs dimensions that are numbers"))
    }

    /// The elements of a tensor of type `ty`, which started at `at`.
    pub(super) fn tensor(&mut self, at: usize, ty: &TypeProto, name: Option<String>) -> Result<TensorProto> {
        let Some(type_proto::Value::TensorType(type_proto::Tensor { elem_type, shape })) = &ty.value else {
            return Err(self.error(at, "only a tensor has elements"));
        };
        let Some(dtype) = elem_type.and_then(DataType::from_code) else {
            return Err(self.error(at, "a tensor with elements needs an element type"));
        };
        let dims = self.fixed(at, shape.as_ref())?;
        let count = element_count(&dims)
            .filter(|n| n.checked_mul(16).is_some())
            .ok_or_else(|| self.error(at, "the tensor is too large"))?;
        let mut tensor = TensorProto { data_type: Some(dtype.code()), dims, name, ..TensorProto::default() };
        self.blank();
        let from = self.at;
        if self.peek() == Some(b'[') {
            tensor.data_location = Some(DATA_LOCATION_EXTERNAL);
            tensor.external_data = self.pairs()?;
            return Ok(tensor);
        }
        if self.accept("...") {
            self.filled(from, &mut tensor, dtype, count)?;
            return Ok(tensor);
        }
        if !self.accept("{") {
            return self.expected("the elements of a tensor: `{`, `...` or `[`");
        }
        if self.accept("...") {
            self.expect("}")?;
            self.filled(from, &mut tensor, dtype, count)?;
            return Ok(tensor);
        }
        let Some(bits) = entry_bits(dtype) else {
            self.list("}", |p| {
                p.blank();
                let from = p.at;
                match p.literal()? {
                    Literal::Text(text) => tensor.string_data.push(Bytes::from(text)),
                    _ => return Err(p.error(from, "expected a string")),
                }
                Ok(())
            })?;
            self.check_count(from, dtype, &tensor.dims, tensor.string_data.len(), count)?;
            return Ok(tensor);
        };
        let mut codes = Vec::new();
        let mut widest = None;
        self.list("}", |p| {
            p.blank();
            let from = p.at;
            let code = p.element(dtype, bits)?;
            if bits < 8 && code >= 1 << bits {
                widest.get_or_insert((from, code));
            }
            codes.push(code);
            Ok(())
        })?;
        let packed = bits < 8 && codes.len() == (count * bits).div_ceil(8);
        if packed && (codes.len() != count || widest.is_some()) {
            tensor.raw_data = Some(codes.iter().map(|&c| c as u8).collect::<Vec<_>>().into());
            return Ok(tensor);
        }
        if let Some((at, code)) = widest {
            return Err(self.error(at, format!("{code} does not fit into {dtype}")));
        }
        self.check_count(from, dtype, &tensor.dims, codes.len(), count * entries_per_element(dtype))?;
        tensor.raw_data = Some(pack(bits, &codes).into());
        Ok(tensor)
    }

    fn check_count(&self, from: usize, dtype: DataType, dims: &[i64], found: usize, wanted: usize) -> Result<()> {
        if found == wanted {
            return Ok(());
        }
        Err(self.error(from, format!("{dtype} {dims:?} takes {wanted} elements, found {found}")))
    }

    /// An entry of a tensor, as a code. Entries of less than a byte may also be whole bytes.
    fn element(&mut self, dtype: DataType, bits: usize) -> Result<u64> {
        let from = self.at;
        let literal = self.literal()?;
        let misfit = |p: &Self, text: &str| p.error(from, format!("{text} does not fit into {dtype}"));
        match (dtype, literal) {
            (_, Literal::Text(_)) => Err(self.error(from, "expected a number")),
            (DataType::Float | DataType::Complex64, Literal::Int(text) | Literal::Float(text)) => {
                Ok(self.f32(from, text)?.to_bits().into())
            }
            (DataType::Float | DataType::Complex64, Literal::Nan(nan)) => Ok(self.nan32(from, nan)?.to_bits().into()),
            (DataType::Double | DataType::Complex128, Literal::Int(text) | Literal::Float(text)) => {
                Ok(self.f64(from, text)?.to_bits())
            }
            (DataType::Double | DataType::Complex128, Literal::Nan(nan)) if f64::from_bits(nan).is_nan() => Ok(nan),
            (_, Literal::Float(text)) if is_small_float(dtype) => {
                encode(dtype, self.f64(from, text)?).ok_or_else(|| {
                    misfit(self, text).with_hint("floats of 8 bits and less must be exact; integers are codes")
                })
            }
            (_, Literal::Float(_) | Literal::Nan(_)) => Err(self.error(from, format!("not a value of {dtype}"))),
            (_, Literal::Int(text)) => {
                let value: i128 = text.parse().map_err(|_| misfit(self, text))?;
                let low = if is_signed(dtype) { -(1i128 << (bits - 1)) } else { 0 };
                let high = match (bits < 8, is_signed(dtype)) {
                    (true, _) => 256,
                    (false, true) => 1i128 << (bits - 1),
                    (false, false) => 1i128 << bits,
                };
                if (low..high).contains(&value) {
                    let mask = if value < 0 { (1i128 << bits) - 1 } else { i128::from(u64::MAX) };
                    Ok((value & mask) as u64)
                } else {
                    Err(misfit(self, text))
                }
            }
        }
    }

    fn filled(&self, from: usize, tensor: &mut TensorProto, dtype: DataType, count: usize) -> Result<()> {
        if !self.fill {
            return Err(self.error(from, "the elements of this tensor were left out when it was printed").with_hint(
                "print with a higher limit, or read with a reader that fills elided tensors with made-up numbers",
            ));
        }
        if count > MAX_FILL {
            return Err(self.error(from, "the tensor is too large to be filled"));
        }
        let entries = count * entries_per_element(dtype);
        let codes = fill(dtype, tensor.name.as_deref().unwrap_or(""), &tensor.dims, entries);
        match entry_bits(dtype) {
            Some(bits) => tensor.raw_data = Some(pack(bits, &codes).into()),
            None => tensor.string_data = codes.iter().map(|c| Bytes::from(c.to_string())).collect(),
        }
        Ok(())
    }
}
