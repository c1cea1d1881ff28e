//! What can be said about a value without running shape inference: element type, rank, content.

use std::collections::HashSet;

use crate::ir::{Def, Model, NodeId, Owner, Tensor, ValueId};
use crate::onnx::DataType;

/// How far producers are followed to find a rank.
const RANK_DEPTH: usize = 32;

/// The content of a value that is an initializer, or the output of a `Constant` node.
pub(super) fn known(model: &Model, value: ValueId) -> Option<Tensor> {
    if let Some(tensor) = model.constant(value) {
        return Some(tensor.clone());
    }
    let node = model.node(model.producer(value)?);
    if !node.is("Constant") {
        return None;
    }
    let proto = node.attr("value")?.proto().t.clone()?;
    Tensor::from_proto(proto, None).ok()
}

/// Element type of a value: as declared, or that of the values it is computed from where the operators between keep it.
pub(super) fn element_type(model: &Model, value: ValueId) -> Option<DataType> {
    let mut queue = vec![value];
    let mut seen = HashSet::new();
    while let Some(value) = queue.pop() {
        if !seen.insert(value) {
            continue;
        }
        if let Some(dtype) = model.dtype(value) {
            return Some(dtype);
        }
        match *model.value(value).def() {
            Def::Output { node, index } => {
                if let Some(dtype) = fixed_type(model, node, index) {
                    return Some(dtype);
                }
                queue.extend(same_type(model, node, index));
            }
            Def::Input { .. } => queue.extend(body_argument(model, value)),
            Def::Constant(_) | Def::Sparse | Def::Removed => {}
        }
    }
    None
}

/// Element type of an output that does not depend on the inputs.
fn fixed_type(model: &Model, id: NodeId, index: usize) -> Option<DataType> {
    let node = model.node(id);
    if !node.domain().is_empty() {
        return None;
    }
    let code = |name: &str| node.int(name).and_then(|c| DataType::from_code(i32::try_from(c).ok()?));
    match (node.op_type(), index) {
        ("Cast", 0) => code("to"),
        ("RandomNormal" | "RandomUniform", 0) => code("dtype").or(Some(DataType::Float)),
        ("Constant" | "ConstantOfShape", 0) => match node.attr("value") {
            Some(value) => DataType::from_code(value.proto().t.as_ref()?.data_type?),
            None => (node.op_type() == "ConstantOfShape").then_some(DataType::Float),
        },
        ("Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin", 0) | ("TopK" | "MaxPool", 1) => Some(DataType::Int64),
        _ => None,
    }
}

/// Values of the same element type as output `index` of a node.
fn same_type(model: &Model, id: NodeId, index: usize) -> Vec<ValueId> {
    let node = model.node(id);
    if !node.domain().is_empty() {
        return Vec::new();
    }
    let inputs = |which: &[usize]| which.iter().filter_map(|&i| node.input(i)).collect::<Vec<_>>();
    let body_outputs = |skip: usize| node.bodies().filter_map(|b| model.graph(b).outputs().nth(index + skip)).collect();
    match node.op_type() {
        "If" => body_outputs(0),
        "Loop" => body_outputs(1),
        "Where" | "CastLike" | "DequantizeLinear" => inputs(&[1]),
        "OneHot" => inputs(&[2]),
        "Conv"
        | "ConvTranspose"
        | "MatMul"
        | "Gemm"
        | "Add"
        | "Sub"
        | "Mul"
        | "Div"
        | "PRelu"
        | "InstanceNormalization"
        | "BatchNormalization"
        | "LSTM"
        | "GRU"
        | "RNN"
        | "Concat"
        | "Sum"
        | "Max"
        | "Min"
        | "Mean" => inputs(&[0, 1]),
        "Abs"
        | "AveragePool"
        | "Ceil"
        | "Clip"
        | "Compress"
        | "CumSum"
        | "DepthToSpace"
        | "Dropout"
        | "Elu"
        | "Erf"
        | "Exp"
        | "Expand"
        | "Flatten"
        | "Floor"
        | "Gather"
        | "GatherElements"
        | "GatherND"
        | "GlobalAveragePool"
        | "GlobalLpPool"
        | "GlobalMaxPool"
        | "HardSigmoid"
        | "Hardmax"
        | "Identity"
        | "LRN"
        | "LeakyRelu"
        | "Log"
        | "LogSoftmax"
        | "LpNormalization"
        | "LpPool"
        | "MaxPool"
        | "MaxRoiPool"
        | "MeanVarianceNormalization"
        | "Mod"
        | "Neg"
        | "Pad"
        | "Pow"
        | "Range"
        | "Reciprocal"
        | "ReduceL1"
        | "ReduceL2"
        | "ReduceLogSum"
        | "ReduceLogSumExp"
        | "ReduceMax"
        | "ReduceMean"
        | "ReduceMin"
        | "ReduceProd"
        | "ReduceSum"
        | "ReduceSumSquare"
        | "Relu"
        | "Reshape"
        | "Resize"
        | "ReverseSequence"
        | "RoiAlign"
        | "Round"
        | "Scatter"
        | "ScatterElements"
        | "ScatterND"
        | "Selu"
        | "Shrink"
        | "Sigmoid"
        | "Sign"
        | "Sin"
        | "Cos"
        | "Slice"
        | "Softmax"
        | "Softplus"
        | "Softsign"
        | "SpaceToDepth"
        | "Split"
        | "Sqrt"
        | "Squeeze"
        | "Tan"
        | "Tanh"
        | "ThresholdedRelu"
        | "Tile"
        | "TopK"
        | "Transpose"
        | "Unsqueeze"
        | "Upsample" => inputs(&[0]),
        _ => Vec::new(),
    }
}

/// What a `Loop` passes to this input of its body.
fn body_argument(model: &Model, value: ValueId) -> Option<ValueId> {
    let (graph, position) = model.all_graphs().into_iter().find_map(|g| {
        let position = model.graph(g).inputs().position(|v| v == value)?;
        Some((g, position))
    })?;
    let Owner::Node(owner) = model.graph(graph).owner() else { return None };
    if model.node(owner).is("Loop") && position >= 2 { model.node(owner).input(position) } else { None }
}

/// Number of dimensions of a value, where that follows from declarations and from the operators that compute it.
pub(super) fn rank(model: &Model, value: ValueId) -> Option<usize> {
    rank_within(model, value, RANK_DEPTH)
}

fn rank_within(model: &Model, value: ValueId, depth: usize) -> Option<usize> {
    if let Some(shape) = model.shape(value) {
        return Some(shape.len());
    }
    let depth = depth.checked_sub(1)?;
    let node = model.node(model.producer(value)?);
    if !node.domain().is_empty() {
        return None;
    }
    let of = |index: usize| rank_within(model, node.input(index)?, depth);
    match node.op_type() {
        "Flatten" | "Gemm" => Some(2),
        "Conv" | "ConvTranspose" => of(1).or_else(|| of(0)),
        "Reshape" => match model.shape(node.input(1)?)?.as_slice() {
            [Some(length)] => Some(*length),
            _ => None,
        },
        "Transpose" => node.ints("perm").map(<[i64]>::len).or_else(|| of(0)),
        "Add" | "Sub" | "Mul" | "Div" => Some(of(0)?.max(of(1)?)),
        "MatMul" => match (of(0)?, of(1)?) {
            (a, b) if a >= 2 && b >= 2 => Some(a.max(b)),
            _ => None,
        },
        "Relu"
        | "LeakyRelu"
        | "PRelu"
        | "Sigmoid"
        | "Tanh"
        | "Elu"
        | "Selu"
        | "Clip"
        | "Dropout"
        | "Identity"
        | "Cast"
        | "BatchNormalization"
        | "InstanceNormalization"
        | "MaxPool"
        | "AveragePool"
        | "GlobalAveragePool"
        | "GlobalMaxPool"
        | "Exp"
        | "Log"
        | "Neg"
        | "Softmax"
        | "LogSoftmax"
        | "Hardmax"
        | "Pad" => of(0),
        _ => None,
    }
}
