//! Quantized tensors, as they are solved, stored in one form or another, and read back.

use bytes::Bytes;

use super::{Format, Granularity, QParams};
use crate::onnx::DataType;

/// A constant in codes, with the scales and zero points that say what they stand for.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedTensor {
    /// What a code is.
    pub format: Format,
    /// Shape of the constant, in elements.
    pub dims: Vec<usize>,
    /// Which codes share a scale.
    pub granularity: Granularity,
    /// One for each entry of `granularity.scale_dims(&dims)`, in row-major order; where there is a tensor scale, its products.
    pub scales: Vec<f32>,
    /// The type that scales are stored in; the numbers are exact in it, but for the tensor scale.
    pub scale_dtype: DataType,
    /// The scale of the whole tensor, where its groups have float8 scales beneath it.
    pub tensor_scale: Option<f32>,
    /// As many as scales.
    pub zero_points: ZeroPoints,
    /// Packed, in the layout of ONNX `raw_data`, without anything in the bits behind the last.
    pub codes: Bytes,
}

/// What stands for zero.
#[derive(Clone, Debug, PartialEq)]
pub enum ZeroPoints {
    /// Codes of the format.
    Integers(Vec<i32>),
    /// Between codes, counted in codes of the unsigned format of the same width.
    Floats(Vec<f32>),
}

impl ZeroPoints {
    /// Whether all of them are the code 0.
    #[must_use]
    pub fn all_zero(&self) -> bool {
        matches!(self, Self::Integers(zeros) if zeros.iter().all(|&z| z == 0))
    }

    /// The nearest codes of a format.
    #[must_use]
    pub fn nearest(&self, format: Format) -> Vec<i32> {
        let (low, high) = format.range();
        match self {
            Self::Integers(zeros) => zeros.clone(),
            Self::Floats(zeros) => zeros.iter().map(|z| (z.round_ties_even() as i32).clamp(low, high)).collect(),
        }
    }
}

impl QuantizedTensor {
    /// Scales, and zero points as codes: the nearest ones where they lie between.
    #[must_use]
    pub fn qparams(&self) -> QParams {
        QParams { scales: self.scales.clone(), zero_points: self.zero_points.nearest(self.format) }
    }

    /// Zero points between codes, if they are.
    #[must_use]
    pub fn float_zero_points(&self) -> Option<&[f32]> {
        match &self.zero_points {
            ZeroPoints::Floats(zeros) => Some(zeros),
            ZeroPoints::Integers(_) => None,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
