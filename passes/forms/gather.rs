//! `com.microsoft::GatherBlockQuantized`: a table whose rows are dequantized as they are taken.
//!
//! Codes of 4 bits are stored as they are (`int4`, `uint4`), in blocks along any axis; codes of 2, 4 and 8 bits as bytes,
//! unsigned, in blocks along the last axis, packed without padding, where rows are whole bytes. Bytes without zero points
//! have the middle code for zero, `int4` and `uint4` have 0.

use super::{QuantizedTensor, ZeroPoints, integer, pack_rows, packed, unpack_rows};
use crate::ir::view::{GatherBlockQuantized, axis_in};
use crate::ir::{Model, NodeId, Tensor};
use crate::numerics::{Granularity, pack};
use crate::onnx::DataType;
use crate::plan::form::{gather_blocks, gather_fits};
use crate::reason::{Operand, Reason};

/// The initializers and attributes of a `GatherBlockQuantized`.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Codes.
    pub codes: Tensor,
    /// Scales, of the rank of the table.
    pub scales: Tensor,
    /// Zero points, in the type of the codes.
    pub zero_points: Option<Tensor>,
    /// The axis that blocks cut.
    pub axis: usize,
    /// Elements in a block.
    pub block: usize,
    /// Bits of a code, where codes are stored as bytes.
    pub bits: Option<usize>,
}

impl QuantizedTensor {
    /// Reads the table of a `GatherBlockQuantized`, whose codes are `codes`, or says why that is not possible.
    ///
    /// # Errors
    /// Inputs that are not constant or do not fit the attributes.
    pub fn from_gather(model: &Model, node: NodeId, codes: &Tensor) -> Result<Self, Reason> {
        let at = model.node(node);
        let scale = model.constant_input(node, 2).ok_or(Reason::NotConstant { what: Operand::Scale })?;
        let zero = match at.input(3) {
            Some(_) => Some(model.constant_input(node, 3).ok_or(Reason::NotConstant { what: Operand::ZeroPoint })?),
            None => None,
        };
        let bytes = codes.dtype() == DataType::Uint8;
        let attributes =
            GatherBlockQuantized::of(at).ok_or_else(|| Reason::NotA { op: "GatherBlockQuantized".into() })?;
        let bits = if bytes { attributes.bits as usize } else { 4 };
        let signed = if bytes { zero.is_none() } else { codes.dtype() == DataType::Int4 };
        let format = integer(bits, signed).filter(|&f| bytes || DataType::from(f) == codes.dtype());
        let format = format
            .ok_or_else(|| Reason::wrong_type(Operand::QuantizedData, codes.dtype(), "an integer of 2, 4 or 8 bits"))?;
        let mut dims = codes.dims();
        let last =
            dims.len().checked_sub(1).ok_or_else(|| Reason::WrongShape { what: Operand::Weight, dims: Vec::new() })?;
        let stored = dims[last];
        if bytes {
            dims[last] = stored * 8 / bits;
        }
        let axis = axis_in(attributes.quantize_axis, dims.len())
            .ok_or(Reason::AxisOutside { axis: attributes.quantize_axis })?;
        if bytes && axis != last {
            return Err(Reason::NoGranularity);
        }
        let size = usize::try_from(attributes.block_size)
            .ok()
            .filter(|&b| b > 0)
            .ok_or_else(|| Reason::NotPositive { name: "block_size".into() })?;
        let granularity = Granularity::PerGroup { axis, size };
        let scale_dims = granularity.scale_dims(&dims);
        let scales = scale.to_f32().filter(|_| scale.dims() == scale_dims && scale.dtype() != DataType::Double);
        let scales = scales.ok_or_else(|| Reason::WrongCount { what: "scales".into(), per: "block".into() })?;
        let zeros = match zero {
            None => vec![0; scales.len()],
            Some(zero) if zero.dtype() != codes.dtype() => {
                return Err(Reason::wrong_type(Operand::ZeroPoint, zero.dtype(), "that of the quantized data"));
            }
            Some(zero) if bytes => {
                let (columns, row) = (scale_dims[last], (scale_dims[last] * bits).div_ceil(8));
                if zero.len() * columns.max(1) != scales.len() * row {
                    return Err(Reason::NotPacked);
                }
                unpack_rows(&zero.raw(), columns, bits, row).into_iter().map(i32::from).collect()
            }
            Some(zero) if zero.len() == scales.len() => pack::unpack(&zero.raw(), &format, zero.len()),
            Some(_) => return Err(Reason::WrongCount { what: "zero points".into(), per: "block".into() }),
        };
        let rows = last == 1 && axis == 1 && scale_dims[1] == 1;
        let mut table = Self {
            format,
            granularity: if rows { Granularity::PerChannel { axis: 0 } } else { granularity },
            scales,
            scale_dtype: scale.dtype(),
            zero_points: ZeroPoints::Integers(zeros),
            tensor_scale: None,
            codes: packed(codes.raw(), bits, dims.iter().product()),
            dims,
        };
        if bytes {
            table.codes = table.unsigned();
        }
        Ok(table)
    }

    /// The initializers of a `GatherBlockQuantized` that takes slices along `gather_axis`.
    ///
    /// # Errors
    /// What [`gather_fits`] refuses, and zero points between codes.
    pub fn to_gather(&self, gather_axis: usize) -> Result<Packed, Reason> {
        let bytes = gather_fits(self.format, &self.dims, &self.granularity, gather_axis)?;
        let ZeroPoints::Integers(zeros) = &self.zero_points else {
            return Err(Reason::FractionalZeroPoints { op: "GatherBlockQuantized".into() });
        };
        let (axis, block) = gather_blocks(&self.dims, &self.granularity)?;
        let bits = self.format.bits();
        let scale_dims = Granularity::PerGroup { axis, size: block }.scale_dims(&self.dims);
        let entries: usize = scale_dims.iter().product();
        let each = |at: usize| if self.granularity == Granularity::PerTensor { 0 } else { at };
        let scales: Vec<f32> = (0..entries).map(|at| self.scales[each(at)]).collect();
        let last = self.dims.len() - 1;
        let (codes, zero_points) = if bytes {
            let mut dims = self.dims.clone();
            dims[last] = dims[last] * bits / 8;
            let zero_points = self.unsigned_zeros().filter(|_| !self.is_centred()).map(|zeros| {
                let zeros: Vec<u8> = (0..entries).map(|at| zeros[each(at)]).collect();
                let mut dims = scale_dims.clone();
                dims[last] = (dims[last] * bits).div_ceil(8);
                Tensor::new(DataType::Uint8, &dims, pack_rows(&zeros, scale_dims[last], bits, dims[last]))
            });
            (Tensor::new(DataType::Uint8, &dims, self.unsigned()), zero_points)
        } else {
            let dtype = DataType::from(self.format);
            let zeros: Vec<i32> = (0..entries).map(|at| zeros[each(at)]).collect();
            let zero_points =
                (!self.zero_points.all_zero()).then(|| Tensor::new(dtype, &scale_dims, pack::pack(&zeros, bits)));
            (Tensor::new(dtype, &self.dims, self.codes.clone()), zero_points)
        };
        Ok(Packed {
            codes,
            scales: self.scale_tensor(&scale_dims, &scales),
            zero_points,
            axis,
            block,
            bits: bytes.then_some(bits),
        })
    }
}
