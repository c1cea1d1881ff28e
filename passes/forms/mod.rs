//! Quantized constants in integer codes of 2, 4 or 8 bits, and the forms they are read from and written to.
//!
//! A [`QuantizedTensor`] holds codes, scales and zero points as they are in the file; nothing here rounds, but for offsets that
//! are to be counted in codes. What a form cannot hold is refused with the reason.

mod gather;
mod lstm;
mod nbits;
mod qdq;
mod shifted;

pub use gather::Packed;
pub use lstm::LstmWeight;
pub use nbits::{Blocks, block_of};
pub use qdq::{Pair, find_dequantized};
pub use shifted::{Shift, Shifted, find_shifted, shapes};

use bytes::Bytes;

use crate::algorithms::tinygemm;
use crate::error::Result;
use crate::ir::Tensor;
use crate::numerics::{self, pack};
use crate::onnx::DataType;
use crate::quant::{Format, Granularity};
use crate::reason::{Operand, Reason};

pub use crate::ir::view::MICROSOFT;
pub use crate::quant::{QuantizedTensor, ZeroPoints};

/// The integer format of `bits` bits.
#[must_use]
pub fn integer(bits: usize, signed: bool) -> Option<Format> {
    Some(match (bits, signed) {
        (2, true) => Format::Int2,
        (2, false) => Format::Uint2,
        (4, true) => Format::Int4,
        (4, false) => Format::Uint4,
        (8, true) => Format::Int8,
        (8, false) => Format::Uint8,
        _ => return None,
    })
}

/// Packed codes, with nothing in the bits behind the last.
fn packed(raw: Bytes, bits: usize, count: usize) -> Bytes {
    if (count * bits).is_multiple_of(8) {
        raw
    } else {
        pack::pack_bytes(&pack::unpack_bytes(&raw, bits, count), bits).into()
    }
}

impl QuantizedTensor {
    /// The same matrix with its axes exchanged, or why there is none.
    ///
    /// # Errors
    /// The constant is not a matrix.
    pub fn transposed(&self) -> Result<Self, Reason> {
        let &[rows, columns] = self.dims.as_slice() else {
            return Err(Reason::WrongShape { what: Operand::Weight, dims: self.dims.clone() });
        };
        let granularity = match self.granularity {
            Granularity::PerTensor => Granularity::PerTensor,
            Granularity::PerChannel { axis } => Granularity::PerChannel { axis: 1 - axis },
            Granularity::PerGroup { axis, size } => Granularity::PerGroup { axis: 1 - axis, size },
        };
        let scale_dims = self.granularity.scale_dims(&self.dims);
        Ok(Self {
            format: self.format,
            dims: vec![columns, rows],
            granularity,
            scales: transpose(&self.scales, &scale_dims),
            scale_dtype: self.scale_dtype,
            tensor_scale: self.tensor_scale,
            zero_points: match &self.zero_points {
                ZeroPoints::Integers(zeros) => ZeroPoints::Integers(transpose(zeros, &scale_dims)),
                ZeroPoints::Floats(zeros) => ZeroPoints::Floats(transpose(zeros, &scale_dims)),
            },
            codes: pack::pack_bytes(&transpose(&self.code_bytes(), &self.dims), self.format.bits()).into(),
        })
    }

    /// The same matrix with its scales written out for groups of `size` along axis 1, where each row has one scale or all
    /// have; `None` for others.
    #[must_use]
    pub fn in_groups(&self, size: usize) -> Option<Self> {
        let &[rows, columns] = self.dims.as_slice() else { return None };
        let groups = columns.div_ceil(size.max(1));
        let row = |at: usize| match self.granularity {
            Granularity::PerTensor => Some(0),
            Granularity::PerChannel { axis: 0 } => Some(at / groups),
            _ => None,
        };
        let entries: Vec<usize> = (0..rows * groups).map(row).collect::<Option<_>>()?;
        Some(Self {
            granularity: Granularity::PerGroup { axis: 1, size },
            scales: entries.iter().map(|&e| self.scales[e]).collect(),
            zero_points: match &self.zero_points {
                ZeroPoints::Integers(zeros) => ZeroPoints::Integers(entries.iter().map(|&e| zeros[e]).collect()),
                ZeroPoints::Floats(zeros) => ZeroPoints::Floats(entries.iter().map(|&e| zeros[e]).collect()),
            },
            ..self.clone()
        })
    }

    /// One byte an element, in row-major order: the code in the low bits, two's complement where the format is signed.
    fn code_bytes(&self) -> Vec<u8> {
        pack::unpack_bytes(&self.codes, self.format.bits(), self.len())
    }

    /// Codes as numbers of the unsigned format of the same width, packed; and back, where a form had them so.
    fn unsigned(&self) -> Bytes {
        if !self.format.is_signed() {
            return self.codes.clone();
        }
        let bits = self.format.bits();
        let middles = (0..8 / bits).fold(0, |byte, at| byte | (self.middle() as u8) << (at * bits));
        packed(self.codes.iter().map(|byte| byte ^ middles).collect(), bits, self.len())
    }

    /// The unsigned code that stands for 0 of the signed format.
    fn middle(&self) -> i32 {
        1 << (self.format.bits() - 1)
    }

    /// The zero point of each entry as a code of the unsigned format, where it is one.
    fn unsigned_zeros(&self) -> Option<Vec<u8>> {
        let ZeroPoints::Integers(zeros) = &self.zero_points else { return None };
        let shift = if self.format.is_signed() { self.middle() } else { 0 };
        Some(zeros.iter().map(|z| (z + shift) as u8).collect())
    }

    /// Zero points between codes that stand for adding `offsets`, one for each scale: to the nearest float.
    ///
    /// # Errors
    /// Another number of offsets than of scales, or zero points between codes already.
    pub fn zero_points_with(&self, offsets: &[f32]) -> Result<Vec<f32>, Reason> {
        let zeros = self
            .unsigned_zeros()
            .ok_or_else(|| Reason::FractionalZeroPoints { op: "a quantizer with offsets".into() })?;
        if offsets.len() != self.scales.len() {
            return Err(Reason::WrongCount { what: "offsets".into(), per: "scale".into() });
        }
        let each = zeros.iter().zip(offsets).zip(&self.scales);
        Ok(each.map(|((&zero, &offset), &scale)| tinygemm::zero_point(f32::from(zero), offset, scale)).collect())
    }

    /// Whether a form that takes the middle of the unsigned codes for zero needs no zero points.
    fn is_centred(&self) -> bool {
        self.format.is_signed() && self.zero_points.all_zero()
    }

    /// The numbers that the codes stand for.
    ///
    /// # Errors
    /// Sizes that do not fit together.
    pub fn values(&self) -> Result<Vec<f32>> {
        let (dims, granularity) = (&self.dims, &self.granularity);
        let ZeroPoints::Floats(zeros) = &self.zero_points else {
            return numerics::dequantize(&self.codes, self.format, dims, granularity, &self.qparams());
        };
        let value = |(code, entry): (u8, usize)| (f32::from(code) - zeros[entry]) * self.scales[entry];
        let codes = pack::unpack_bytes(&self.unsigned(), self.format.bits(), self.len());
        Ok(codes.into_iter().zip(granularity.entries(dims)?).map(value).collect())
    }

    /// Scales as a tensor of their own type.
    fn scale_tensor(&self, dims: &[usize], scales: &[f32]) -> Tensor {
        float_tensor(self.scale_dtype, dims, scales)
    }
}

/// Numbers that are exact in `dtype`, as a tensor of it.
fn float_tensor(dtype: DataType, dims: &[usize], values: &[f32]) -> Tensor {
    match dtype {
        DataType::Float16 | DataType::Bfloat16 => {
            Tensor::from_f64(dtype, dims, values.iter().map(|&v| f64::from(v))).expect("a float type of graphs")
        }
        _ => Tensor::from_f32(dims, values),
    }
}

/// A matrix with its axes exchanged; what has another rank stays as it is.
fn transpose<T: Copy>(values: &[T], dims: &[usize]) -> Vec<T> {
    numerics::permuted(values, dims, &[1, 0])
}

/// Rows of `columns` codes each, every row packed from its own first byte and padded with zeros to `bytes` bytes.
fn pack_rows(codes: &[u8], columns: usize, bits: usize, bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(codes.len() / columns.max(1) * bytes);
    for row in codes.chunks(columns.max(1)) {
        let end = out.len() + bytes;
        out.extend(pack::pack_bytes(row, bits));
        out.resize(end, 0);
    }
    out
}

/// Undoes [`pack_rows`].
fn unpack_rows(raw: &[u8], columns: usize, bits: usize, bytes: usize) -> Vec<u8> {
    raw.chunks(bytes.max(1)).flat_map(|row| pack::unpack_bytes(row, bits, columns)).collect()
}
