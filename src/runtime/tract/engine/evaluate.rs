//! Evaluation of one node whose inputs are constants.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::constant::Constant;
use super::super::program::{Output, Program, Step};
use super::{Arrays, Rung, build, compile, from_array, run, to_array};
use crate::ir::{Model, NodeId, Tensor};
use crate::onnx::{DataType, NodeProto};
use crate::passes::Evaluate;
use crate::runtime::inputs::{Axis, Input};

/// Evaluates nodes with tract, where the result is exact: data movement, integer arithmetic, comparisons, and the float
/// operators that IEEE 754 defines to the last bit.
///
/// It knows more operators than [`Exact`](crate::passes::support::evaluate::Exact), which needs no runtime and is asked first.
///
/// It declines (`None`) whatever is in doubt: other operators, sub-byte and 8-bit float types, NaN in arithmetic, numbers
/// that do not fit the type they are cast to, results above 64 Mi elements, and anything tract refuses.
#[derive(Clone, Copy, Debug, Default)]
pub struct TractEvaluate;

/// Elements a result may have.
const MAX_RESULT: usize = 1 << 26;

/// Bytes of a result times elements of its smaller operand, where each element is a sum of products.
const MOST_PRODUCTS: usize = 1 << 42;

/// Operators whose output is made of elements of the input of this index, unchanged.
const MOVEMENT: [(&str, usize); 17] = [
    ("Concat", 0),
    ("DepthToSpace", 0),
    ("Expand", 0),
    ("Flatten", 0),
    ("Gather", 0),
    ("GatherElements", 0),
    ("GatherND", 0),
    ("Identity", 0),
    ("Reshape", 0),
    ("Slice", 0),
    ("SpaceToDepth", 0),
    ("Split", 0),
    ("Squeeze", 0),
    ("Tile", 0),
    ("Transpose", 0),
    ("Unsqueeze", 0),
    ("Where", 1),
];

/// Operators that do not look at the elements of their input.
const SHAPES: [&str; 4] = ["ConstantOfShape", "Range", "Shape", "Size"];

/// Operators that compute, and whose result has one right value.
const ARITHMETIC: [&str; 24] = [
    "Abs",
    "Add",
    "And",
    "Ceil",
    "Div",
    "Equal",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "NonZero",
    "Not",
    "Or",
    "Reciprocal",
    "Relu",
    "Sign",
    "Sqrt",
    "Sub",
    "Xor",
];

/// Operators that are exact on integers only.
const INTEGER: [&str; 6] = ["CumSum", "Mod", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"];

impl Evaluate for TractEvaluate {
    fn evaluate(&self, model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        let call = model.node(node);
        if !call.domain().is_empty() || call.bodies().next().is_some() || call.outputs().iter().any(Option::is_none) {
            return None;
        }
        let given: Vec<&Tensor> = inputs.iter().flatten().collect();
        let kind = Kind::of(call.op_type(), &given)?;
        let target = match kind {
            Kind::Cast => DataType::from_code(i32::try_from(call.int("to")?).ok()?),
            _ => None,
        };
        if let Some(target) = target
            && !castable(given.first()?, target)
        {
            return None;
        }
        if promised(call.op_type(), &given).is_none_or(|count| count > MAX_RESULT) {
            return None;
        }
        let outputs = call_with(model, node, inputs, |_| true, None)?;
        let half = target.or_else(|| kind.carried(&given)).filter(|d| is_half(*d));
        // The bits of a new NaN are anyone's choice.
        let computed = |tensor: Tensor| if kind == Kind::Compute { without_nan(tensor) } else { Some(tensor) };
        outputs.into_iter().map(computed).map(|t| narrowed(t?, half)).collect()
    }

    fn approximate(&self, model: &Model, node: NodeId, inputs: &[Option<Tensor>], limit: usize) -> Option<Vec<Tensor>> {
        let call = model.node(node);
        let given: Vec<&Tensor> = inputs.iter().flatten().collect();
        if call.outputs().iter().any(Option::is_none) || !given.iter().all(|t| is_plain(t) || is_half(t.dtype())) {
            return None;
        }
        // What tract knows the values of it computes while it builds, whatever the size: it is told those only that it
        // needs to find the shape of the result.
        let told = |index: usize| {
            let few = inputs.get(index).and_then(Option::as_ref).is_some_and(|t| t.len() <= 64);
            few && (index > 0 || call.is("Range") || call.is("MelWeightMatrix"))
        };
        let half = given.iter().map(|t| t.dtype()).find(|&d| d.is_float()).filter(|&d| is_half(d));
        let outputs = call_with(model, node, inputs, told, Some(limit))?;
        outputs.into_iter().map(without_nan).map(|t| narrowed(t?, half)).collect()
    }
}

/// Runs one node; `told` says which inputs tract may know while it builds. `None` for whatever tract refuses, and, with a
/// limit, if shapes cannot be told beforehand, tensors would take more than that many bytes, or computing them too long.
fn call_with(
    model: &Model,
    node: NodeId,
    inputs: &[Option<Tensor>],
    told: impl Fn(usize) -> bool,
    limit: Option<usize>,
) -> Option<Vec<Tensor>> {
    let call = model.node(node);
    let mut types = inputs.iter().flatten().map(Tensor::dtype);
    let first = types.next();
    // tract reads all of them as the type of the first, which no panic stops it from.
    if call.is("BatchNormalization") && types.any(|dtype| Some(dtype) != first) {
        return None;
    }
    let name = |index: usize| format!("in {index}");
    let proto = NodeProto {
        op_type: Some(call.op_type().to_owned()),
        input: inputs.iter().enumerate().map(|(i, t)| t.as_ref().map_or(String::new(), |_| name(i))).collect(),
        output: (0..call.outputs().len()).map(|i| format!("out {i}")).collect(),
        attribute: call.attrs().iter().map(|a| a.proto().clone()).collect(),
        ..NodeProto::default()
    };
    let (mut constants, mut fed, mut feed) = (BTreeMap::new(), Vec::new(), Vec::new());
    for (index, tensor) in inputs.iter().enumerate().filter_map(|(i, t)| Some((i, t.clone()?))) {
        if told(index) {
            constants.insert(name(index), Constant::Plain(tensor));
        } else {
            let dims = Some(tensor.dims().into_iter().map(Axis::Fixed).collect());
            fed.push(Input { name: name(index), dtype: tensor.dtype(), dims, default: None });
            feed.push(Arc::new(to_array(&Constant::Plain(tensor)).ok()?));
        }
    }
    let outputs = proto.output.iter().map(|name| Output { name: name.clone(), dtype: None }).collect();
    let opset = model.opset_in(call.graph()?)?;
    let step = Step { node: proto, opset, origin: (String::new(), call.op_type().to_owned()) };
    let mut program = Program::of_step(step, fed, constants, outputs);
    program.lower().ok()?;
    let blueprint = build(&program, &feed, &[], &Arrays::default()).ok()?;
    if let Some(limit) = limit {
        let facts = blueprint.model.nodes().iter().flat_map(|node| &node.outputs).map(|output| &output.fact);
        let sizes: Option<Vec<i64>> = facts.map(|fact| fact.mem_size().to_i64().ok()).collect();
        let most = sizes?.into_iter().map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)).max()?;
        let least = inputs.iter().flatten().map(Tensor::len).filter(|&n| n > 1).min().unwrap_or(1);
        let known = inputs.iter().flatten().map(Tensor::byte_len).max().unwrap_or(0);
        if most > limit.max(known)
            || ["Conv", "ConvTranspose", "Einsum"].contains(&call.op_type()) && most.checked_mul(least)? > MOST_PRODUCTS
        {
            return None;
        }
    }
    let plan = compile(blueprint.model, Rung::Raw).ok()?;
    run(&plan, &feed).ok()?.iter().map(|array| from_array(array, None).ok()).collect()
}

fn without_nan(tensor: Tensor) -> Option<Tensor> {
    let nan = tensor.to_f32().is_some_and(|values| values.iter().any(|v| v.is_nan()));
    (!nan).then_some(tensor)
}

/// Floats in half the width again, where they had it.
fn narrowed(tensor: Tensor, half: Option<DataType>) -> Option<Tensor> {
    match half.filter(|_| tensor.dtype() == DataType::Float) {
        Some(half) => narrow(&tensor, half),
        None => Some(tensor),
    }
}

fn is_plain(tensor: &Tensor) -> bool {
    matches!(tensor.dtype(), DataType::Float | DataType::Double | DataType::Bool)
        || tensor.dtype().bits().is_some_and(|b| b >= 8) && tensor.to_i64().is_some()
}

/// How exactness is judged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Elements of this input come out unchanged.
    Movement(usize),
    Shape,
    Cast,
    Compute,
}

impl Kind {
    fn of(op: &str, inputs: &[&Tensor]) -> Option<Self> {
        let plain = |t: &&Tensor| is_plain(t);
        let integer = |t: &&Tensor| plain(t) && !t.dtype().is_float();
        if let Some(&(_, at)) = MOVEMENT.iter().find(|(name, _)| *name == op) {
            let half = inputs.get(at).is_some_and(|t| is_half(t.dtype()));
            let fit = inputs.iter().all(|t| plain(t) || half && is_half(t.dtype()));
            return fit.then_some(Self::Movement(at));
        }
        if SHAPES.contains(&op) {
            let whole = op != "Range" || inputs.iter().all(integer);
            return whole.then_some(Self::Shape);
        }
        if op == "Cast" {
            return inputs.iter().all(|t| plain(t) || is_half(t.dtype())).then_some(Self::Cast);
        }
        let computes =
            ARITHMETIC.contains(&op) && inputs.iter().all(plain) || INTEGER.contains(&op) && inputs.iter().all(integer);
        let numbers = || inputs.iter().all(|t| t.to_f32().is_none_or(|v| !v.iter().any(|v| v.is_nan())));
        (computes && numbers()).then_some(Self::Compute)
    }

    /// Type of the elements that come out, where they are those of an input.
    fn carried(self, inputs: &[&Tensor]) -> Option<DataType> {
        match self {
            Self::Movement(at) => inputs.get(at).map(|t| t.dtype()),
            _ => None,
        }
    }
}

fn is_half(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float16 | DataType::Bfloat16)
}

/// Whether a cast has one right result: floats to integers only where they fit, integers only to types that hold them.
fn castable(tensor: &Tensor, to: DataType) -> bool {
    let from = tensor.dtype();
    if is_half(to) {
        return from == DataType::Float || is_half(from);
    }
    if to.is_float() {
        return true;
    }
    if to == DataType::Bool {
        return !from.is_float();
    }
    let (low, high) = match to {
        DataType::Int8 => (-128., 127.),
        DataType::Uint8 => (0., 255.),
        DataType::Int16 => (-32_768., 32_767.),
        DataType::Uint16 => (0., 65_535.),
        DataType::Int32 => (-2_147_483_648., 2_147_483_647.),
        DataType::Uint32 => (0., 4_294_967_295.),
        DataType::Int64 => (-9.2e18, 9.2e18),
        _ => return false,
    };
    let fits = |v: f64| (low..=high).contains(&v);
    match (from, tensor.to_i64()) {
        (DataType::Uint64, _) => false,
        (_, Some(values)) => values.into_iter().all(|v| fits(v as f64)),
        (DataType::Double, None) => tensor.to_f64().is_some_and(|values| values.into_iter().all(fits)),
        _ => tensor.to_f32().is_some_and(|v| v.into_iter().all(|v| fits(f64::from(v)))),
    }
}

/// Elements that the first output will have, where an input says so; `None` if that cannot be told or overflows.
fn promised(op: &str, inputs: &[&Tensor]) -> Option<usize> {
    let sizes = |index: usize| -> Option<Vec<i64>> { inputs.get(index)?.to_i64() };
    let product = |sizes: Vec<i64>| sizes.into_iter().try_fold(1usize, |n, s| n.checked_mul(usize::try_from(s).ok()?));
    match op {
        "ConstantOfShape" => product(sizes(0)?),
        "Expand" | "Tile" => product(sizes(1)?)?.checked_mul(inputs.first()?.len()),
        "Range" => {
            let bound = |index: usize| sizes(index).and_then(|v| v.first().copied());
            let (start, limit, delta) = (bound(0)?, bound(1)?, bound(2)?);
            let span = limit.checked_sub(start)?;
            usize::try_from(span.checked_div(delta)?.max(0)).ok()
        }
        _ if ARITHMETIC.contains(&op) || op == "Where" => {
            let rank = inputs.iter().map(|t| t.dims().len()).max()?;
            let extent =
                |axis: usize| inputs.iter().filter_map(|t| t.dims().iter().rev().nth(axis).copied()).max().unwrap_or(1);
            (0..rank).try_fold(1usize, |n, axis| n.checked_mul(extent(axis)))
        }
        _ => Some(inputs.iter().map(|t| t.len()).sum()),
    }
}

/// Half-width elements again, from the float32 they were widened to; rounds to nearest even.
fn narrow(tensor: &Tensor, half: DataType) -> Option<Tensor> {
    Tensor::from_f64(half, &tensor.dims(), tensor.to_f64()?)
}
