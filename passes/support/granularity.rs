//! How a Quantize or Dequantize node says which elements share a scale.

use crate::ir::view::{Quantizer, axis_in};
use crate::ir::{Attr, Model, NewNode, NodeId, Tensor};
use crate::numerics::{self, Granularity, QParams, decode_float8e8m0};
use crate::onnx::DataType;
use crate::reason::Reason;

/// The scales of a Quantize or Dequantize node as f32, and their shape, where they are constant, or codes that another
/// Dequantize node makes scales of, as `NVFP4` has them.
pub(crate) fn scales(model: &Model, node: NodeId) -> Option<(Vec<f32>, Vec<usize>)> {
    if let Some(scale) = model.constant_input(node, 1) {
        return Some((scale_values(scale)?, scale.dims()));
    }
    let inner = model.producer(model.node(node).input(1)?).filter(|&n| model.node(n).is("DequantizeLinear"))?;
    let (codes, scale) = (model.constant_input(inner, 0)?, model.constant_input(inner, 1)?);
    let format = codes.dtype().format().filter(|f| !f.is_integer())?;
    let (dims, whole) = (codes.dims(), scale.to_f32()?);
    let granularity = granularity(model, inner, &dims, &scale.dims()).ok()?;
    let qparams = QParams { zero_points: vec![0; whole.len()], scales: whole };
    let values = numerics::dequantize(&codes.raw(), format, &dims, &granularity, &qparams).ok()?;
    Some((values, dims))
}

/// Scales as f32.
pub(crate) fn scale_values(scale: &Tensor) -> Option<Vec<f32>> {
    if scale.dtype() == DataType::Float8e8m0 {
        return Some(scale.raw().iter().map(|&code| decode_float8e8m0(code)).collect());
    }
    scale.to_f32()
}

/// Scales as f32, and the type that a result has by default.
pub(crate) fn typed_scales(scale: &Tensor) -> Option<(Vec<f32>, DataType)> {
    let own = scale.dtype();
    Some((scale_values(scale)?, if own == DataType::Float8e8m0 { DataType::Float } else { own }))
}

/// Says along which axis a quantizer has its scales.
pub(crate) fn along(node: NewNode, granularity: &Granularity) -> NewNode {
    match *granularity {
        Granularity::PerTensor => node,
        Granularity::PerChannel { axis } => node.with(Attr::int("axis", axis as i64)),
        Granularity::PerGroup { axis, size } => {
            node.with(Attr::int("axis", axis as i64)).with(Attr::int("block_size", size as i64))
        }
    }
}

/// The granularity that a Quantize or Dequantize node has (ONNX QuantizeLinear, "axis" and "`block_size`"), or what is
/// wrong with it.
///
/// # Errors
/// A scale shape that does not fit.
pub(crate) fn granularity(model: &Model, node: NodeId, dims: &[usize], scale: &[usize]) -> Result<Granularity, Reason> {
    let count: usize = scale.iter().product();
    let Quantizer { axis, block_size: block, .. } =
        Quantizer::of(model.node(node)).ok_or_else(|| Reason::NotA { op: "quantizer".into() })?;
    if scale.len() <= 1 && count == 1 && block == 0 && (dims.len() != 1 || dims[0] == 1 || scale.is_empty()) {
        return Ok(Granularity::PerTensor);
    }
    let Some(axis) = axis_in(axis, dims.len()) else {
        if count == 1 {
            return Ok(Granularity::PerTensor);
        }
        return Err(Reason::AxisOutOfRange { axis, rank: dims.len() });
    };
    let found = if block > 0 {
        Granularity::PerGroup { axis, size: block as usize }
    } else if scale.len() == dims.len() && scale.len() > 1 {
        return Err(Reason::NotPositive { name: "block_size".into() });
    } else if count == 1 && dims[axis] != 1 {
        Granularity::PerTensor
    } else {
        Granularity::PerChannel { axis }
    };
    let wanted = found.scale_dims(dims);
    if matches!(found, Granularity::PerTensor) || wanted == scale {
        Ok(found)
    } else {
        Err(Reason::ScaleShape { dims: scale.to_vec(), wanted })
    }
}
