//! Weights of a `com.microsoft::DynamicQuantizeLSTM`.

use super::{QuantizedTensor, ZeroPoints};
use crate::ir::{Model, NodeId, Tensor};
use crate::numerics::{Format, Granularity, pack, permuted};
use crate::onnx::DataType;
use crate::reason::{Kernel, Operand, Reason};

/// The initializers of one weight of a `DynamicQuantizeLSTM`.
#[derive(Clone, Debug)]
pub struct LstmWeight {
    /// Codes, `[directions, inputs, 4 * hidden]`.
    pub codes: Tensor,
    /// Scales, `[directions]` or `[directions, 4 * hidden]`.
    pub scales: Tensor,
    /// Zero points, of the shape of the scales.
    pub zero_points: Tensor,
}

impl QuantizedTensor {
    /// The weight of an LSTM, `[directions, 4 * hidden, inputs]`, as `DynamicQuantizeLSTM` has it.
    ///
    /// # Errors
    /// Codes that are no bytes, scales that are neither one for all nor one for each row, zero points that differ.
    pub fn to_lstm(&self) -> Result<LstmWeight, Reason> {
        let &[directions, rows, columns] = self.dims.as_slice() else {
            return Err(Reason::KernelShape { kernel: Kernel::DynamicQuantizeLSTM, dims: self.dims.clone() });
        };
        let kernel = Kernel::DynamicQuantizeLSTM;
        if self.format.bits() != 8 {
            return Err(Reason::KernelFormat { kernel, format: self.format, has: vec![Format::Int8, Format::Uint8] });
        }
        if self.scale_dtype != DataType::Float {
            return Err(Reason::KernelScaleType { kernel, scales: self.scale_dtype });
        }
        let ZeroPoints::Integers(zeros) = &self.zero_points else {
            return Err(Reason::FractionalZeroPoints { op: kernel.to_string() });
        };
        if zeros.windows(2).any(|two| two[0] != two[1]) {
            return Err(Reason::OneZeroPoint { kernel });
        }
        let dims = match self.granularity {
            Granularity::PerTensor => vec![directions],
            Granularity::PerChannel { axis: 1 } => vec![directions, rows],
            _ => return Err(Reason::KernelScales { kernel, granularity: self.granularity }),
        };
        let codes = permuted(&self.codes, &self.dims, &[0, 2, 1]);
        let dtype = DataType::from(self.format);
        Ok(LstmWeight {
            codes: Tensor::new(dtype, &[directions, columns, rows], codes),
            scales: Tensor::from_f32(&dims, &self.scales.repeat(directions)),
            zero_points: Tensor::new(dtype, &dims, pack::pack(&zeros.repeat(directions), 8)),
        })
    }

    /// Reads a weight of a `DynamicQuantizeLSTM`: its codes at input `codes`, its scales at input `scales`.
    ///
    /// # Errors
    /// What is not constant, and what one DequantizeLinear cannot say: directions that differ in their scales.
    pub fn from_lstm(model: &Model, node: NodeId, codes: usize, scales: usize) -> Result<Self, Reason> {
        let stored = model.constant_input(node, codes).ok_or(Reason::NotConstant { what: Operand::QuantizedData })?;
        let scale = model.constant_input(node, scales).ok_or(Reason::NotConstant { what: Operand::Scale })?;
        let zero = model.constant_input(node, scales + 1).ok_or(Reason::NotConstant { what: Operand::ZeroPoint })?;
        let format = stored.dtype().format().filter(|f| f.is_integer() && f.bits() == 8);
        let format =
            format.ok_or_else(|| Reason::wrong_type(Operand::QuantizedData, stored.dtype(), "int8 or uint8"))?;
        let [directions, columns, rows] = stored.dims()[..] else {
            return Err(Reason::WrongShape { what: Operand::Weight, dims: stored.dims() });
        };
        let granularity = match scale.dims()[..] {
            [d] if d == directions => Granularity::PerTensor,
            [d, r] if d == directions && r == rows => Granularity::PerChannel { axis: 1 },
            _ => return Err(Reason::WrongCount { what: "scales".into(), per: "direction or row".into() }),
        };
        let found = scale.to_f32().filter(|_| scale.dtype() == DataType::Float);
        let found = found.ok_or_else(|| Reason::wrong_type(Operand::Scale, scale.dtype(), "float"))?;
        if zero.dtype() != stored.dtype() || zero.len() != found.len() {
            return Err(Reason::WrongCount { what: "zero points".into(), per: "scale".into() });
        }
        let zeros = pack::unpack(&zero.raw(), &format, zero.len());
        let one = found.len() / directions.max(1);
        let alike = found.chunks(one.max(1)).all(|c| c == &found[..one])
            && zeros.chunks(one.max(1)).all(|c| c == &zeros[..one]);
        if !alike {
            return Err(Reason::Mismatch { what: "scale of one direction".into(), from: "that of the other".into() });
        }
        Ok(Self {
            format,
            dims: vec![directions, rows, columns],
            granularity,
            scales: found[..one].to_vec(),
            scale_dtype: DataType::Float,
            tensor_scale: None,
            zero_points: ZeroPoints::Integers(zeros[..one].to_vec()),
            codes: permuted(&stored.raw(), &stored.dims(), &[0, 2, 1]).into(),
        })
    }
}
