//! The parts of [`insert_qdq`](crate::passes::insert_qdq) for groups with scales of 8 bits (MX and NVFP4).
//!
//! A weight is stored as codes and scales: the scale of one DequantizeLinear is `float8e8m0`, or the result of another
//! DequantizeLinear of float8 scales. An activation finds its scales each time the model runs, in float operators that are
//! exact wherever f32 is IEEE's and no two of them are contracted into one.

use super::float_ops::Ops;
use super::granularity::along;
use crate::error::{Error, Kind, Result};
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, ValueId, tensor_type};
use crate::numerics::{ElementRange, Format, Granularity, ScaleDtype, encode_float8e8m0};
use crate::onnx::DataType;
use crate::passes::insert_qdq::Insert;
use crate::plan::{Scheme, Weight};
use crate::solve::StoredWeight;

/// Group scales and tensor scale of a weight as initializers; where there is no tensor scale, its place has that of the
/// groups once more.
pub(crate) fn scales(model: &mut Model, weight: &Weight, solved: &StoredWeight) -> Result<[ValueId; 2]> {
    let Weight { tensor: name, quantizer, .. } = weight;
    let unfit = || Error::new(Kind::Internal, "a scale was solved that its format does not have").at_value(name);
    let solved = solved.tensor();
    let scales = &solved.scales;
    let (scale_type, scales): (DataType, Option<Vec<u8>>) = match solved.tensor_scale {
        None => (DataType::Float8e8m0, scales.iter().map(|&scale| encode_float8e8m0(scale)).collect()),
        Some(whole) => {
            let code = |&scale: &f32| {
                let code = Format::Float8e4m3fn.encode(scale / whole);
                (Format::Float8e4m3fn.decode(code) * whole).to_bits().eq(&scale.to_bits()).then_some(code as u8)
            };
            (DataType::Float8e4m3fn, scales.iter().map(code).collect())
        }
    };
    let graph = model.main();
    let dims = quantizer.granularity.scale_dims(&solved.dims);
    let scales = Tensor::new(scale_type, &dims, scales.ok_or_else(unfit)?);
    let scales = model.add_initializer(graph, &format!("{name}_scale"), scales);
    let whole = solved
        .tensor_scale
        .map(|scale| model.add_initializer(graph, &format!("{name}_tensor_scale"), Tensor::from_f32(&[], &[scale])));
    Ok([scales, whole.unwrap_or(scales)])
}

/// Dequantizes codes with what [`scales`] stored, for one reader.
pub(crate) fn dequantize(
    model: &mut Model,
    reader: NodeId,
    weight: &Weight,
    [codes, scale, whole]: [ValueId; 3],
) -> ValueId {
    let name = &weight.tensor;
    let mut insert = |what: &str, inputs: &[ValueId], attrs: &dyn Fn(NewNode) -> NewNode| {
        let node = NewNode::new(
            "DequantizeLinear",
            format!("{name}{what}_DequantizeLinear"),
            inputs,
            &[&format!("{name}{what}_dequantized")],
        );
        let id = model.insert(Place::Before(reader), attrs(node));
        model.node(id).output(0).expect("just made")
    };
    let groups = |node| along(node, &weight.quantizer.granularity);
    if whole == scale {
        let float = i64::from(weight.float.code());
        return insert("", &[codes, scale], &|node| groups(node).with(Attr::int("output_dtype", float)));
    }
    let scale = insert("_scale", &[scale, whole], &|node| node);
    let float = i64::from(weight.float.code());
    if weight.float.is_half() {
        return insert("", &[codes, scale], &|node| groups(node).with(Attr::int("output_dtype", float)));
    }
    insert("", &[codes, scale], &groups)
}

/// What was made for an activation.
pub(crate) struct Made {
    /// Nodes that read the float tensor.
    pub(crate) readers: [NodeId; 2],
    /// The dequantized tensor.
    pub(crate) back: ValueId,
}

/// Quantizes and dequantizes an activation in blocks along its last axis, which consists of whole ones, with scales found at
/// run time: as a matrix with a block a row.
pub(crate) fn activation(model: &mut Model, name: &str, quantizer: &Scheme, x: ValueId) -> Result<Made> {
    let Granularity::PerGroup { axis: _, size } = quantizer.granularity else {
        let message = "an activation with scales of 8 bits has no groups";
        return Err(Error::new(Kind::Config, message).at_value(name));
    };
    let place = Insert::place(model, x);
    let mut ops = Ops::new(model, name, place);
    let elements = ElementRange::new(quantizer.dtype);
    let shape = ops.op("Shape", &[x]);
    let first = ops.last();
    let rows = ops.integers("rows", &[-1, size as i64]);
    let blocks = ops.op("Reshape", &[x, rows]);
    let second = ops.last();
    ops.model.set_type(blocks, tensor_type(DataType::Float, Some(&[None, Some(size)])));
    let magnitudes = ops.op("Abs", &[blocks]);
    let amax = ops.largest(magnitudes, true);
    let scale = if quantizer.scale_dtype == ScaleDtype::Float8e4m3fn {
        ops.two_level(amax, elements, quantizer.eps)
    } else {
        ops.power_of_two(amax, elements, quantizer.mx_rounding)
    };
    let groups = || vec![Attr::int("axis", 1), Attr::int("block_size", size as i64)];
    let mut attrs = groups();
    attrs.push(Attr::int("output_dtype", DataType::from(quantizer.dtype).code().into()));
    let codes = ops.node("QuantizeLinear", &[blocks, scale], attrs, "quantized");
    let back = ops.node("DequantizeLinear", &[codes, scale], groups(), "dequantized");
    let back = ops.op("Reshape", &[back, shape]);
    Ok(Made { readers: [first, second], back })
}
