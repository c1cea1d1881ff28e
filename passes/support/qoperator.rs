//! What the passes between Quantize/Dequantize pairs and operators on codes share.

use crate::ir::view::{Quantizer, axis_in};
use crate::ir::{GraphId, Model, NodeId, Tensor, User, ValueId};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// Codes and what they stand for: a tensor in front of a DequantizeLinear, or behind a QuantizeLinear.
#[derive(Clone, Debug)]
pub(crate) struct Coded {
    pub codes: ValueId,
    pub scale: ValueId,
    /// None where it is left out, and zero.
    pub zero: Option<ValueId>,
    pub dtype: DataType,
    /// Numbers of `scale`.
    pub scales: Vec<f32>,
    /// As many as scales.
    pub zeros: Vec<i64>,
    /// The axis that scales run along; none where there is one.
    pub axis: Option<usize>,
}

impl Coded {
    /// What a QuantizeLinear writes or a DequantizeLinear reads, or why that is no operand of an operator on codes.
    pub fn of(model: &Model, node: NodeId) -> Result<Self, Reason> {
        let at = model.node(node);
        let quantizes = at.is("QuantizeLinear");
        let codes = if quantizes { at.output(0) } else { at.input(0) }
            .ok_or(Reason::Missing { what: Operand::QuantizedData })?;
        let label = model.value(codes).name();
        let scale = at.input(1).ok_or(Reason::Missing { what: Operand::Scale })?;
        let tensor = model
            .constant(scale)
            .ok_or_else(|| Reason::TensorNotConstant { tensor: model.value(scale).name().into() })?;
        if tensor.dtype() != DataType::Float {
            let (tensor, found) = (model.value(scale).name().into(), tensor.dtype());
            return Err(Reason::WrongTensorType { tensor, found, wanted: "float".into() });
        }
        let scales = tensor.to_f32().unwrap_or_default();
        let zero = at.input(2);
        let zeros = match zero {
            None => vec![0; scales.len()],
            Some(zero) => {
                model.constant(zero).and_then(Tensor::to_i64).filter(|zeros| zeros.len() == scales.len()).ok_or_else(
                    || match model.constant(zero) {
                        Some(_) => Reason::WrongCount { what: "zero points".into(), per: "scale".into() },
                        None => Reason::TensorNotConstant { tensor: model.value(zero).name().into() },
                    },
                )?
            }
        };
        let attributes = Quantizer::of(at).ok_or_else(|| Reason::NotA { op: "quantizer".into() })?;
        let default = if quantizes && attributes.output_dtype.is_none() { Some(DataType::Uint8) } else { None };
        let dtype = zero.and_then(|z| model.constant(z)).map(Tensor::dtype);
        let dtype = dtype.or_else(|| model.constant(codes).map(Tensor::dtype)).or(default);
        let dtype = dtype.or_else(|| model.dtype(codes)).or_else(|| {
            let before = model.producer(codes).filter(|&p| p != node && model.node(p).is("QuantizeLinear"));
            before.and_then(|p| Self::of(model, p).ok()).map(|coded| coded.dtype)
        });
        let dtype = dtype.ok_or_else(|| Reason::UnknownType { tensor: label.into() })?;
        if attributes.block_size != 0 {
            return Err(Reason::WrongScales { tensor: label.into(), wanted: "one scale, or one per channel".into() });
        }
        let axis = match scales.len() {
            0 => return Err(Reason::Missing { what: Operand::Scale }),
            1 => None,
            _ => {
                let rank = model.constant(codes).map(|c| c.dims().len());
                let rank =
                    rank.ok_or_else(|| Reason::WrongScales { tensor: label.into(), wanted: "one scale".into() })?;
                let axis = attributes.axis;
                Some(axis_in(axis, rank).ok_or(Reason::AxisOutOfRange { axis, rank })?)
            }
        };
        Ok(Self { codes, scale, zero, dtype, scales, zeros, axis })
    }

    /// Whether codes of both stand for the same numbers.
    pub fn same(&self, other: &Self) -> bool {
        let bits = |coded: &Self| coded.scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
        self.dtype == other.dtype && self.zeros == other.zeros && bits(self) == bits(other)
    }

    /// The zero point, made where it is left out: operators on codes must be given it.
    pub fn zero(&self, model: &mut Model, graph: GraphId) -> ValueId {
        match self.zero {
            Some(zero) => zero,
            None => zero_like(model, graph, self.scale, self.dtype),
        }
    }

    /// Scale and zero point as operators on codes take them: one number is no list of one.
    pub fn params(&self, model: &mut Model, graph: GraphId) -> [ValueId; 2] {
        let both = [self.scale, self.zero(model, graph)];
        if self.axis.is_some() { both } else { both.map(|value| scalar(model, graph, value)) }
    }
}

/// The one number of a constant without axes.
fn scalar(model: &mut Model, graph: GraphId, value: ValueId) -> ValueId {
    let Some(tensor) = model.constant(value).filter(|t| !t.dims().is_empty() && t.len() == 1) else { return value };
    let tensor = tensor.clone().reshaped(&[]);
    let name = format!("{}_scalar", model.value(value).name());
    let before = model.value_named(&name).filter(|v| model.graph(graph).initializers().contains(v));
    let same = |v: &ValueId| {
        model
            .constant(*v)
            .is_some_and(|t| t.dtype() == tensor.dtype() && t.dims().is_empty() && t.raw() == tensor.raw())
    };
    match before.filter(same) {
        Some(before) => before,
        None => model.add_initializer(graph, &name, tensor),
    }
}

/// A new zero point of zeros, one for each number of `scale`.
pub(crate) fn zero_like(model: &mut Model, graph: GraphId, scale: ValueId, dtype: DataType) -> ValueId {
    let dims = model.constant(scale).map(Tensor::dims).unwrap_or_default();
    let bytes = dims.iter().product::<usize>() * dtype.bits().unwrap_or(8) / 8;
    let name = model.value(scale).name();
    let name = format!("{}_zero_point", name.strip_suffix("_scale").unwrap_or(name));
    if let Some(before) = model.value_named(&name).filter(|v| model.graph(graph).initializers().contains(v))
        && let Some(tensor) = model.constant(before)
        && tensor.dtype() == dtype
        && tensor.dims() == dims
        && tensor.raw().iter().all(|&byte| byte == 0)
    {
        return before;
    }
    model.add_initializer(graph, &name, Tensor::new(dtype, &dims, vec![0; bytes]))
}

/// Whether the codes that an operator writes are codes that it reads, so that it can run on either side of a quantizer.
/// Only what onnxruntime runs on 8-bit integers.
pub(crate) fn moves(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    let opset = at.graph().and_then(|g| model.opset_in(g)).unwrap_or(0);
    at.domain().is_empty()
        && match at.op_type() {
            "Reshape" | "Transpose" | "Flatten" | "Squeeze" | "Unsqueeze" | "Slice" | "Gather" | "DepthToSpace"
            | "Split" | "Expand" | "Tile" | "Concat" | "Identity" => true,
            "MaxPool" => opset >= 12 && at.output(1).is_none(),
            "Resize" => {
                at.string("mode").is_none_or(|mode| mode == "nearest")
                    && at.string("coordinate_transformation_mode").is_none_or(|m| m != "tf_crop_and_resize")
            }
            _ => false,
        }
}

/// How many inputs of such an operator are data: all of a Concat, else the first.
pub(crate) fn moved(model: &Model, node: NodeId) -> usize {
    if model.node(node).is("Concat") { model.node(node).inputs().len() } else { 1 }
}

/// Makes another operator of a node, with other inputs; attributes stay.
pub(crate) fn rewire(model: &mut Model, node: NodeId, domain: &str, op: &str, inputs: &[Option<ValueId>]) {
    model.truncate_inputs(node, 0);
    model.set_op(node, domain, op);
    for (index, &value) in inputs.iter().enumerate() {
        model.set_input(node, index, value);
    }
}

/// The one node that reads a value, in the same graph as `from`, or why there is none.
pub(crate) fn only_reader(model: &Model, from: NodeId, value: ValueId) -> Result<NodeId, Reason> {
    match *model.value(value).users() {
        [User::Node { node, .. }] if model.node(node).graph() == model.node(from).graph() => Ok(node),
        [] => Err(Reason::Unused { what: Operand::Output }),
        [User::Output { .. }] => Err(Reason::IsGraphOutput { what: Operand::Output }),
        [_] => Err(Reason::OtherGraph { what: Operand::Output }),
        _ => Err(Reason::UsedElsewhere { what: Operand::Output }),
    }
}

/// Whether a quantizer reads the result, directly or behind a clip.
pub(crate) fn is_quantized(model: &Model, node: NodeId) -> bool {
    let readers = |node: NodeId| {
        let users = model.node(node).output(0).map(|v| model.value(v).users()).unwrap_or_default();
        users.iter().filter_map(|user| match user {
            User::Node { node, .. } => Some(*node),
            User::Output { .. } => None,
        })
    };
    let quantizer = |n: NodeId| model.node(n).is("QuantizeLinear");
    let clip = |n: NodeId| model.node(n).is("Relu") || model.node(n).is("Clip");
    readers(node).any(|n| quantizer(n) || (clip(n) && readers(n).any(quantizer)))
}

/// The rank of a value, which is also that of what it was quantized from.
pub(crate) fn rank(model: &Model, value: ValueId) -> Option<usize> {
    if let Some(shape) = model.shape(value) {
        return Some(shape.len());
    }
    let node = model.producer(value)?;
    let quantizer = model.node(node).is("QuantizeLinear") || model.node(node).is("DequantizeLinear");
    rank(model, model.node(node).input(0).filter(|_| quantizer)?)
}
