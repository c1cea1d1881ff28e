//! Weights of a `com.microsoft::DynamicQuantizeLSTM`.

use super::{Quantized, ZeroPoints, transpose};
use crate::ir::{Model, NodeId, Tensor};
use crate::numerics::{Granularity, pack};
use crate::onnx::DataType;

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

impl Quantized {
    /// The weight of an LSTM, `[directions, 4 * hidden, inputs]`, as `DynamicQuantizeLSTM` has it.
    ///
    /// # Errors
    /// Codes that are no bytes, scales that are neither one for all nor one for each row, zero points that differ.
    pub fn to_lstm(&self) -> Result<LstmWeight, String> {
        let &[directions, rows, columns] = self.dims.as_slice() else {
            return Err(format!("a constant of shape {:?} is no weight of an LSTM", self.dims));
        };
        if self.format.bits() != 8 || self.scale_dtype != DataType::Float {
            return Err(format!("DynamicQuantizeLSTM has int8 or uint8 and float scales, not {}", self.format));
        }
        let ZeroPoints::Integers(zeros) = &self.zero_points else {
            return Err("its zero points are no codes".to_owned());
        };
        if zeros.windows(2).any(|two| two[0] != two[1]) {
            return Err("DynamicQuantizeLSTM has one zero point for a weight".to_owned());
        }
        let dims = match self.granularity {
            Granularity::PerTensor => vec![directions],
            Granularity::PerChannel { axis: 1 } => vec![directions, rows],
            _ => return Err("DynamicQuantizeLSTM has one scale for a weight, or one for each row".to_owned()),
        };
        let codes: Vec<u8> =
            self.codes.chunks((rows * columns).max(1)).flat_map(|one| transpose(one, &[rows, columns])).collect();
        let dtype = DataType::from(self.format);
        Ok(LstmWeight {
            codes: Tensor::new(dtype, &[directions, columns, rows], pack::pack_bytes(&codes, 8)),
            scales: Tensor::from_f32(&dims, &self.scales.repeat(directions)),
            zero_points: Tensor::new(dtype, &dims, pack::pack(&zeros.repeat(directions), 8)),
        })
    }

    /// Reads a weight of a `DynamicQuantizeLSTM`: its codes at input `codes`, its scales at input `scales`.
    ///
    /// # Errors
    /// What is not constant, and what one DequantizeLinear cannot say: directions that differ in their scales.
    pub fn from_lstm(model: &Model, node: NodeId, codes: usize, scales: usize) -> Result<Self, String> {
        let stored = model.constant_input(node, codes).ok_or("its codes are not constant")?;
        let scale = model.constant_input(node, scales).ok_or("its scales are not constant")?;
        let zero = model.constant_input(node, scales + 1).ok_or("its zero points are not constant")?;
        let format = stored.dtype().format().filter(|f| f.is_integer() && f.bits() == 8);
        let format = format.ok_or_else(|| format!("codes of type {} are not supported", stored.dtype()))?;
        let [directions, columns, rows] = stored.dims()[..] else { return Err("its weight has no 3 axes".to_owned()) };
        let granularity = match scale.dims()[..] {
            [d] if d == directions => Granularity::PerTensor,
            [d, r] if d == directions && r == rows => Granularity::PerChannel { axis: 1 },
            _ => return Err("its scales do not fit its weight".to_owned()),
        };
        let found = scale.to_f32().filter(|_| scale.dtype() == DataType::Float).ok_or("its scales are not float")?;
        if zero.dtype() != stored.dtype() || zero.len() != found.len() {
            return Err("its zero points do not fit its scales".to_owned());
        }
        let zeros = pack::unpack(&zero.raw(), &format, zero.len());
        let one = found.len() / directions.max(1);
        let alike = found.chunks(one.max(1)).all(|c| c == &found[..one])
            && zeros.chunks(one.max(1)).all(|c| c == &zeros[..one]);
        if !alike {
            return Err("its directions have scales of their own".to_owned());
        }
        let all = pack::unpack_bytes(&stored.raw(), 8, stored.len());
        Ok(Self {
            format,
            dims: vec![directions, rows, columns],
            granularity,
            scales: found[..one].to_vec(),
            scale_dtype: DataType::Float,
            zero_points: ZeroPoints::Integers(zeros[..one].to_vec()),
            codes: all.chunks((rows * columns).max(1)).flat_map(|one| transpose(one, &[columns, rows])).collect(),
        })
    }
}
