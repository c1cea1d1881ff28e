//! Which elements share a scale.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How many elements share one scale and zero point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Granularity {
    /// All of them.
    PerTensor,
    /// Those with the same index along `axis`.
    PerChannel {
        /// Non-negative axis.
        axis: usize,
    },
    /// Those in the same run of `size` along `axis`, and at the same place in all others. The last run may be shorter.
    PerGroup {
        /// Non-negative axis.
        axis: usize,
        /// Elements in a run, at least 1.
        size: usize,
    },
}

impl std::fmt::Display for Granularity {
    /// As in `stored as int4, groups of 32 along axis 1`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PerTensor => f.write_str("one scale"),
            Self::PerChannel { axis } => write!(f, "one scale per index of axis {axis}"),
            Self::PerGroup { axis, size } => write!(f, "groups of {size} along axis {axis}"),
        }
    }
}

impl Granularity {
    /// The shape of the scale tensor for data of shape `dims`: `[]` per tensor, `[dims[axis]]` per channel, and per group
    /// `dims` with `axis` divided by the size, rounded up. As ONNX `QuantizeLinear-21`.
    ///
    /// An axis that `dims` does not have leaves the shape as it is; [`check`](Self::check) reports it.
    pub fn scale_dims(&self, dims: &[usize]) -> Vec<usize> {
        match *self {
            Self::PerTensor => Vec::new(),
            Self::PerChannel { axis } => dims.get(axis).map_or_else(|| dims.to_vec(), |&channels| vec![channels]),
            Self::PerGroup { axis, size } => {
                let mut dims = dims.to_vec();
                if let Some(extent) = dims.get_mut(axis) {
                    *extent = extent.div_ceil(size.max(1));
                }
                dims
            }
        }
    }

    /// Checks that the axis exists in `dims` and that a group is not empty.
    ///
    /// # Errors
    /// [`Kind::Model`](crate::error::Kind::Model), naming what does not fit.
    pub fn check(&self, dims: &[usize]) -> Result<()> {
        match *self {
            Self::PerChannel { axis } | Self::PerGroup { axis, size: _ } if axis >= dims.len() => {
                Err(Error::model(format!("quantization axis {axis} does not exist in a tensor of shape {dims:?}")))
            }
            Self::PerGroup { axis: _, size: 0 } => {
                Err(Error::model("a quantization group must hold at least 1 element"))
            }
            Self::PerTensor | Self::PerChannel { axis: _ } | Self::PerGroup { axis: _, size: _ } => Ok(()),
        }
    }
}

/// A scale and its zero point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QParam {
    /// The size of one step.
    pub scale: f32,
    /// The code of zero.
    pub zero_point: i32,
}

/// Scales and zero points, one each for every entry of the scale tensor, in row-major order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QParams {
    /// The size of one step.
    pub scales: Vec<f32>,
    /// The code of zero; as many as `scales`.
    pub zero_points: Vec<i32>,
}

impl FromIterator<QParam> for QParams {
    fn from_iter<I: IntoIterator<Item = QParam>>(each: I) -> Self {
        let (scales, zero_points) = each.into_iter().map(|q| (q.scale, q.zero_point)).unzip();
        Self { scales, zero_points }
    }
}

impl QParams {
    /// One scale and zero point for a whole tensor.
    pub fn per_tensor(scale: f32, zero_point: i32) -> Self {
        Self { scales: vec![scale], zero_points: vec![zero_point] }
    }

    /// These scales with every zero point 0.
    pub fn symmetric(scales: Vec<f32>) -> Self {
        let zero_points = vec![0; scales.len()];
        Self { scales, zero_points }
    }
}
