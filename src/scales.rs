//! The scales of a quantized model, as a configuration that gives them by hand.

use std::collections::BTreeMap;

use crate::config::spec::{Dtype, Share};
use crate::config::{Config, Numbers, Tensor};
use crate::ir::view::Quantizer;
use crate::ir::{Model, Node, NodeId, User, ValueId};
use crate::numerics::{Granularity, pack};
use crate::observe::sites::SUFFIXES;
use crate::onnx::DataType;
use crate::passes::support::granularity::granularity;
use crate::reason::{Operand, Reason};

/// What was read off a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scales {
    /// Each quantized tensor, by its name in the float model, optional.
    pub config: Config,
    /// Quantizers that are left out, with the reason.
    pub skipped: BTreeMap<String, Reason>,
}

/// Reads the scales and zero points of every `QuantizeLinear` of a computed tensor, and of every `DequantizeLinear` of a
/// constant but int32, whose scales follow from those of its layer.
#[must_use]
pub fn scales(model: &Model) -> Scales {
    let mut found = Scales::default();
    for &node in model.graph(model.main()).nodes() {
        let at = model.node(node);
        let name = match at.op_type() {
            "QuantizeLinear" => activation(model, at),
            "DequantizeLinear" => weight(model, at),
            _ => None,
        };
        let Some(name) = name else { continue };
        match numbers(model, node, at).and_then(|tensor| as_it_was(model, at, tensor)) {
            Ok(tensor) => match found.config.tensor.get(&name) {
                Some(first) if *first != tensor => {
                    found.skipped.insert(name, Reason::TwoPairs);
                }
                _ => {
                    found.config.tensor.insert(name, tensor);
                }
            },
            Err(why) => {
                found.skipped.insert(name, why);
            }
        }
    }
    found
}

/// The name of the computed tensor that a node quantizes.
fn activation(model: &Model, node: &Node) -> Option<String> {
    let input = node.input(0).filter(|&v| model.constant(v).is_none())?;
    let name = model.value(input).name();
    let taken = |base: &&str| model.value_named(base).is_some_and(|v| v != input);
    let base = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix)).filter(taken);
    Some(base.unwrap_or(name).to_owned())
}

/// The name of the constant whose codes a node dequantizes, or that is quantized before it.
fn weight(model: &Model, node: &Node) -> Option<String> {
    let codes = node.input(0)?;
    if let Some(tensor) = model.constant(codes) {
        let name = model.value(codes).name();
        return (tensor.dtype() != DataType::Int32).then(|| name.strip_suffix("_quantized").unwrap_or(name).to_owned());
    }
    let quantizer = model.producer(codes).filter(|&p| model.node(p).is("QuantizeLinear"))?;
    let values: ValueId = model.node(quantizer).input(0).filter(|&v| model.constant(v).is_some())?;
    Some(model.value(values).name().to_owned())
}

fn numbers(model: &Model, id: NodeId, node: &Node) -> Result<Tensor, Reason> {
    let constant = |index: usize| node.input(index).and_then(|v| model.constant(v));
    let scale = constant(1).ok_or(Reason::NotConstant { what: Operand::Scale })?;
    let scales = scale.to_f32().ok_or_else(|| Reason::wrong_type(Operand::Scale, scale.dtype(), "a float"))?;
    let quantizer = Quantizer::of(node).ok_or_else(|| Reason::NotA { op: "quantizer".into() })?;
    let declared = quantizer.output_dtype;
    let codes = constant(0).map(crate::ir::Tensor::dtype).filter(|_| node.is("DequantizeLinear"));
    let zero = constant(2);
    if node.input(2).is_some() && zero.is_none() {
        return Err(Reason::NotConstant { what: Operand::ZeroPoint });
    }
    let dtype = codes.or(zero.map(crate::ir::Tensor::dtype)).or(declared).unwrap_or(DataType::Uint8);
    let format = dtype.format().ok_or(Reason::NotQuantizedType { what: Operand::QuantizedData, found: dtype })?;
    let zeros = match zero {
        Some(zero) if format.is_integer() => pack::unpack(&zero.raw(), &format, zero.len()),
        _ => vec![0; scales.len()],
    };
    let (granularity, axis, size) = match model.shape(node.input(0).ok_or(Reason::Missing { what: Operand::Input })?) {
        _ if scales.len() == 1 => (None, None, None),
        None => (Some(Share::PerChannel), Some(quantizer.axis), None),
        Some(shape) => {
            let dims: Vec<usize> = shape.iter().map(|d| d.unwrap_or(0)).collect();
            match granularity(model, id, &dims, &scale.dims())? {
                Granularity::PerTensor => (None, None, None),
                Granularity::PerChannel { axis } => (Some(Share::PerChannel), Some(axis as i64), None),
                Granularity::PerGroup { axis, size } => {
                    (Some(Share::PerGroup), Some(axis as i64), u32::try_from(size).ok())
                }
            }
        }
    };
    let middle = if format.is_signed() { 0 } else { 1 << (format.bits() - 1) };
    let symmetric = !format.is_integer() || zeros.iter().all(|&z| z == middle);
    Ok(Tensor {
        optional: true,
        dtype: Some(Dtype::from(format)),
        symmetric: Some(symmetric),
        granularity,
        ch_axis: axis,
        group_size: size,
        scale: Some(Numbers::new(scales)),
        zero_point: (format.is_integer() && !symmetric).then(|| Numbers::new(zeros)),
        ..Tensor::default()
    })
}

/// Refuses groups that a Gemm reads: amax transposes those, and the file does not say whether it did.
fn as_it_was(model: &Model, node: &Node, tensor: Tensor) -> Result<Tensor, Reason> {
    let readers = node.output(0).map_or(&[][..], |v| model.value(v).users());
    let gemm = readers.iter().any(|user| matches!(user, User::Node { node, .. } if model.node(*node).is("Gemm")));
    if gemm && tensor.granularity == Some(Share::PerGroup) {
        return Err(Reason::GroupsOfGemm);
    }
    Ok(tensor)
}
