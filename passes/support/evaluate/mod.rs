//! Evaluation of constant nodes without a runtime: what moves elements, or computes what every runtime computes to the same bits.
//!
//! Whatever the ONNX standard leaves open (integer overflow, float to integer out of range, division by zero) is not
//! evaluated. Neither are operators in the form they had before opset 7, when broadcasting was an attribute.
//!
//! What fake quantizers of constants are made of besides (rounding, clipping, extremes, and quantizers themselves) is computed
//! where they are looked for, and not folded elsewhere: single IEEE operations in float32, rounding half to even, and
//! comparisons. Sums over elements, whose order is open, are not among them; neither is anything that meets NaN.

mod constants;
mod moves;
mod numbers;
mod quantizers;
mod views;

use crate::ir::{Model, Node, NodeId, Tensor, ValueId};
use crate::onnx::DataType;
use crate::passes::Evaluate;

pub(crate) use constants::Constants;
pub(crate) use moves::transposed;
pub(crate) use views::{broadcast, sources};

/// An operator, and what computes it.
struct Operator {
    name: &'static str,
    /// Wherever its inputs are constant.
    exact: Option<Rule>,
    /// In fake quantizers, where `exact` does not.
    quantizer: Option<Rule>,
}

type Rule = fn(&Call<'_>) -> Option<Tensor>;

const fn exact(name: &'static str, rule: Rule) -> Operator {
    Operator { name, exact: Some(rule), quantizer: None }
}

const fn quantizer(name: &'static str, rule: Rule) -> Operator {
    Operator { name, exact: None, quantizer: Some(rule) }
}

/// What is evaluated.
#[allow(clippy::redundant_closure_for_method_calls, reason = "methods by name are of one lifetime, and rules of any")]
const OPERATORS: &[Operator] = &[
    exact("Add", |call| call.arithmetic()),
    exact("Concat", |call| call.concat()),
    exact("ConstantOfShape", |call| call.constant_of_shape()),
    exact("Div", |call| call.arithmetic()),
    exact("Equal", |call| call.equal()),
    exact("Flatten", |call| call.flatten()),
    exact("Gather", |call| call.gather()),
    exact("Identity", |call| call.input(0).cloned()),
    exact("Mul", |call| call.arithmetic()),
    exact("Not", |call| call.not()),
    exact("Reshape", |call| call.reshape()),
    exact("Slice", |call| call.slice()),
    exact("Squeeze", |call| call.squeeze()),
    exact("Sub", |call| call.arithmetic()),
    exact("Transpose", |call| call.transpose()),
    exact("Unsqueeze", |call| call.unsqueeze()),
    Operator {
        name: "Cast",
        exact: Some(|call| call.cast()),
        quantizer: Some(|call| numbers::cast_rounded(call.input(0)?, call.cast_type()?)),
    },
    quantizer("Abs", |call| call.each(f32::abs)),
    quantizer("CastLike", |call| {
        numbers::cast_rounded(call.input(0)?, element_type(call.model, call.node.input(1)?, 0)?)
    }),
    quantizer("Ceil", |call| call.each(f32::ceil)),
    quantizer("Clip", |call| call.clip()),
    quantizer("DequantizeLinear", quantizers::dequantize),
    quantizer("Expand", |call| call.expand()),
    quantizer("Floor", |call| call.each(f32::floor)),
    quantizer("Max", |call| call.extremes(false)),
    quantizer("Min", |call| call.extremes(true)),
    quantizer("Neg", |call| call.each(|x| -x)),
    quantizer("QuantizeLinear", quantizers::quantize),
    quantizer("Reciprocal", |call| call.each(|x| 1.0 / x)),
    quantizer("ReduceMax", |call| call.reduce(false)),
    quantizer("ReduceMin", |call| call.reduce(true)),
    quantizer("Relu", |call| call.each(|x| x.max(0.0))),
    quantizer("Round", |call| call.each(f32::round_ties_even)),
    quantizer("Shape", |call| call.shape()),
    quantizer("Size", |call| Some(Tensor::from_i64(&[], &[call.input(0)?.len() as i64]))),
    quantizer("Sqrt", |call| call.each(f32::sqrt)),
];

/// The row of a node's operator.
fn operator(node: &Node) -> Option<&'static Operator> {
    OPERATORS.iter().find(|row| node.is(row.name))
}

/// Whether a node's operator is one that [`Constants`] may evaluate.
fn is_known(node: &Node) -> bool {
    operator(node).is_some()
}

/// See the [module](self). Asked before the runtime's evaluator, which knows more operators and is not in every build; alone it
/// serves as [`Context::evaluate`](crate::passes::Context::evaluate).
///
/// The caller bounds the size of the result.
pub struct Exact;

impl Evaluate for Exact {
    fn evaluate(&self, model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        let rule = operator(model.node(node))?.exact?;
        Some(vec![rule(&Call::new(model, node, inputs)?)?])
    }
}

/// The output of a node in what may be a fake quantizer, for an operator with one output.
pub(crate) fn evaluate(model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Tensor> {
    let row = operator(model.node(node)).filter(|_| is_bounded(model.node(node), inputs))?;
    let call = Call::new(model, node, inputs)?;
    row.exact.and_then(|rule| rule(&call)).or_else(|| row.quantizer?(&call))
}

/// A node and the tensors that it reads.
struct Call<'a> {
    model: &'a Model,
    id: NodeId,
    node: &'a Node,
    inputs: &'a [Option<Tensor>],
    opset: i64,
}

impl<'a> Call<'a> {
    fn new(model: &'a Model, id: NodeId, inputs: &'a [Option<Tensor>]) -> Option<Self> {
        let node = model.node(id);
        Some(Self { model, id, node, inputs, opset: model.opset_in(node.graph()?)? })
    }

    fn input(&self, index: usize) -> Option<&Tensor> {
        self.inputs.get(index)?.as_ref()
    }
}

/// Whether the result of a node is not much larger than what it is made from: a file can ask for any number of elements.
fn is_bounded(node: &Node, inputs: &[Option<Tensor>]) -> bool {
    let given = || inputs.iter().flatten();
    let most = given().map(Tensor::len).max().unwrap_or(0).saturating_mul(4).max(1 << 20);
    let dims = |index: usize| inputs.get(index).and_then(Option::as_ref).map(Tensor::dims);
    let shape = |index: usize| -> Option<Vec<usize>> {
        let list = inputs.get(index)?.as_ref()?.to_i64()?;
        list.into_iter().map(|d| usize::try_from(d).ok()).collect()
    };
    let result = match node.op_type() {
        "Add" | "Sub" | "Mul" | "Div" | "Equal" | "Min" | "Max" => {
            given().try_fold(Vec::new(), |dims, tensor| broadcast(&dims, &tensor.dims()))
        }
        "Expand" => dims(0).and_then(|own| broadcast(&own, &shape(1)?)),
        "ConstantOfShape" => shape(0),
        "Gather" => dims(0).and_then(|own| Some([own, dims(1)?].concat())),
        _ => return true,
    };
    let count = result.and_then(|dims| dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)));
    count.is_some_and(|count| count <= most)
}

/// The element type of a value, where the file says it or the operators behind the value do.
fn element_type(model: &Model, value: ValueId, depth: usize) -> Option<DataType> {
    if let Some(known) = model.dtype(value) {
        return Some(known);
    }
    let slot = model.node(model.producer(value).filter(|_| depth < 64)?);
    match slot.op_type() {
        _ if !slot.domain().is_empty() => None,
        "Cast" => DataType::from_code(i32::try_from(slot.int("to")?).ok()?),
        "Shape" | "Size" => Some(DataType::Int64),
        "CastLike" | "DequantizeLinear" => element_type(model, slot.input(1)?, depth + 1),
        "Add" | "Sub" | "Mul" | "Div" | "Round" | "Min" | "Max" | "Clip" | "ReduceMin" | "ReduceMax" | "Reshape"
        | "Neg" | "Abs" | "Reciprocal" | "Identity" | "Expand" | "Transpose" | "Relu" | "Conv" | "Gemm" | "MatMul" => {
            element_type(model, slot.input(0)?, depth + 1)
        }
        _ => None,
    }
}

/// Whether two floats are the same number; zeros of both signs are.
pub(crate) fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a == 0.0 && b == 0.0)
}

/// A tensor, unless its dimensions overflow (which an empty one can be made to do).
fn tensor(dtype: DataType, dims: &[usize], data: Vec<u8>) -> Option<Tensor> {
    product(dims)?;
    Some(Tensor::new(dtype, dims, data))
}

fn product(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// Bytes of one element, for types whose elements are whole bytes.
fn element_bytes(tensor: &Tensor) -> Option<usize> {
    let bits = tensor.dtype().bits()?;
    bits.is_multiple_of(8).then_some(bits / 8)
}
