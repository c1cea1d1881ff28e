//! Scales and zero points of ONNX operators, converted for [`numerics`](crate::numerics).

use crate::numerics::{Format, Granularity, QParams};
use crate::onnx::DataType;

/// The format of tensors of this type, if graphs quantize to it.
pub(super) fn quantized_format(dtype: DataType) -> Option<Format> {
    dtype.format().filter(|&format| format != Format::Int32)
}

/// As many scales as zero points: either may be one for all, and zero points may be left out.
pub(super) fn qparams(mut scales: Vec<f32>, mut zero_points: Vec<i32>) -> QParams {
    let count = scales.len().max(zero_points.len());
    if let [scale] = *scales {
        scales.resize(count, scale);
    }
    match *zero_points {
        [] => zero_points.resize(count, 0),
        [zero_point] => zero_points.resize(count, zero_point),
        _ => {}
    }
    QParams { scales, zero_points }
}

/// How `count` parameters spread over a tensor of `shape`. `axis` may be negative; `block` is 0 unless blocked.
///
/// # Errors
/// An axis that is not there or a negative block size, as a clause.
pub(super) fn granularity(shape: &[usize], count: usize, axis: i64, block: i64) -> Result<Granularity, String> {
    if count == 1 {
        return Ok(Granularity::PerTensor);
    }
    let at = if axis < 0 { axis.saturating_add(shape.len() as i64) } else { axis };
    let Some(axis) = usize::try_from(at).ok().filter(|&at| at < shape.len()) else {
        return Err(format!("axis {axis} is outside of a tensor of shape {shape:?}"));
    };
    let size = usize::try_from(block).map_err(|_| format!("block size {block} is negative"))?;
    Ok(if size == 0 { Granularity::PerChannel { axis } } else { Granularity::PerGroup { axis, size } })
}
