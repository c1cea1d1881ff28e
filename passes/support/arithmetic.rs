//! Evaluation of what fake quantizers of constants are made of: rounding, clipping, extremes, and quantizers themselves.
//!
//! Like [`Exact`], which is asked first, this computes only what every runtime computes to the same bits: single IEEE
//! operations in float32, rounding half to even, and comparisons. Sums over elements, whose order is open, are not among
//! them; neither is anything that meets NaN.

use std::collections::{HashMap, HashSet};

use super::exact::{Exact, broadcast, sources};
use super::granularity::{granularity, scale_values};
use crate::ir::view::Quantizer;
use crate::ir::{GraphId, Model, Node, NodeId, Tensor, ValueId};
use crate::numerics::{self, QParams, Round, pack};
use crate::onnx::DataType;
use crate::passes::Evaluate;

/// Nodes that one constant may be computed by.
const MAX_NODES: usize = 4096;

/// Whether a node's operator is one that [`Constants`] may evaluate.
fn is_known(node: &Node) -> bool {
    node.domain().is_empty()
        && matches!(
            node.op_type(),
            "Identity"
                | "Cast"
                | "CastLike"
                | "Reshape"
                | "Squeeze"
                | "Unsqueeze"
                | "Flatten"
                | "Transpose"
                | "Gather"
                | "Slice"
                | "Concat"
                | "Constant"
                | "ConstantOfShape"
                | "Add"
                | "Sub"
                | "Mul"
                | "Div"
                | "Equal"
                | "Not"
                | "Round"
                | "Floor"
                | "Ceil"
                | "Abs"
                | "Neg"
                | "Reciprocal"
                | "Sqrt"
                | "Relu"
                | "Min"
                | "Max"
                | "Clip"
                | "ReduceMin"
                | "ReduceMax"
                | "Shape"
                | "Size"
                | "Expand"
                | "QuantizeLinear"
                | "DequantizeLinear"
        )
}

/// The values of a graph that depend on constants alone, computed when asked for.
pub(crate) struct Constants {
    /// Values that are computed from constants by operators that are known.
    derived: HashSet<ValueId>,
    memo: HashMap<ValueId, Option<Tensor>>,
}

impl Constants {
    /// Finds what depends on constants alone in `graph`.
    pub fn new(model: &Model, graph: GraphId) -> Self {
        let mut derived = HashSet::new();
        let known = |derived: &HashSet<ValueId>, v: ValueId| derived.contains(&v) || model.constant(v).is_some();
        for node in model.topological_order(graph).unwrap_or_default() {
            let slot = model.node(node);
            // Of the second input of CastLike only the type matters.
            let read = slot.inputs().iter().flatten().take(if slot.is("CastLike") { 1 } else { usize::MAX });
            let mut read = read.peekable();
            if is_known(slot) && read.peek().is_some() && read.all(|&v| known(&derived, v)) {
                derived.extend(slot.outputs().iter().flatten());
            }
        }
        Self { derived, memo: HashMap::new() }
    }

    /// Whether `value` is constant, or computed from constants.
    pub fn holds(&self, model: &Model, value: ValueId) -> bool {
        model.constant(value).is_some() || self.derived.contains(&value)
    }

    /// Whether `value` is computed from constants, by some node.
    pub fn derives(&self, value: ValueId) -> bool {
        self.derived.contains(&value)
    }

    /// Forgets the tensors that were computed.
    pub fn forget(&mut self) {
        self.memo.clear();
    }

    /// The nodes that compute `value` from constants, those that come first last; `None` if they are too many.
    pub fn slice(&self, model: &Model, value: ValueId) -> Option<Vec<NodeId>> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        let mut stack = vec![value];
        while let Some(value) = stack.pop() {
            if !self.derived.contains(&value) {
                continue;
            }
            let Some(node) = model.producer(value) else { continue };
            if seen.insert(node) {
                found.push(node);
                stack.extend(model.node(node).inputs().iter().flatten());
            }
        }
        (found.len() <= MAX_NODES).then_some(found)
    }

    /// The tensor of `value`, or `None` where it depends on more than constants or cannot be computed exactly.
    pub fn value(&mut self, model: &Model, value: ValueId) -> Option<Tensor> {
        if let Some(tensor) = model.constant(value) {
            return Some(tensor.clone());
        }
        if let Some(found) = self.memo.get(&value) {
            return found.clone();
        }
        if !self.derived.contains(&value) {
            return None;
        }
        // Producers before consumers: nothing recurses, however long the chain is.
        let mut stack = vec![value];
        let mut steps = 0;
        while let Some(&top) = stack.last() {
            steps += 1;
            let node = model.producer(top).filter(|_| steps < 4 * MAX_NODES);
            let Some(node) = node else {
                self.memo.insert(top, None);
                stack.pop();
                continue;
            };
            let slot = model.node(node);
            let read = slot.inputs().iter().take(if slot.is("CastLike") { 1 } else { usize::MAX });
            let missing: Vec<ValueId> = read
                .flatten()
                .copied()
                .filter(|v| model.constant(*v).is_none() && !self.memo.contains_key(v))
                .collect();
            if !missing.is_empty() {
                stack.extend(missing);
                continue;
            }
            stack.pop();
            let read = slot.inputs().iter().take(if slot.is("CastLike") { 1 } else { usize::MAX });
            let inputs: Option<Vec<Option<Tensor>>> = read
                .map(|input| match input {
                    None => Some(None),
                    Some(v) => model.constant(*v).cloned().or_else(|| self.memo.get(v).cloned().flatten()).map(Some),
                })
                .collect();
            let result = inputs.and_then(|inputs| evaluate(model, node, &inputs));
            self.memo.insert(top, result);
        }
        self.memo.get(&value).cloned().flatten()
    }
}

/// The output of a node, for an operator with one output.
pub(crate) fn evaluate(model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Tensor> {
    let slot = model.node(node);
    if !is_known(slot) || !is_bounded(slot, inputs) {
        return None;
    }
    if let Some(found) = Exact.evaluate(model, node, inputs) {
        return found.into_iter().next();
    }
    let opset = model.opset_in(slot.graph()?)?;
    let first = inputs.first()?.as_ref()?;
    let second = || inputs.get(1)?.as_ref();
    match slot.op_type() {
        "Cast" => cast(first, DataType::from_code(i32::try_from(slot.int("to")?).ok()?)?),
        "CastLike" => cast(first, element_type(model, slot.input(1)?, 0)?),
        "Round" => unary(first, f32::round_ties_even),
        "Floor" => unary(first, f32::floor),
        "Ceil" => unary(first, f32::ceil),
        "Abs" => unary(first, f32::abs),
        "Neg" => unary(first, |x| -x),
        "Reciprocal" => unary(first, |x| 1.0 / x),
        "Sqrt" => unary(first, f32::sqrt),
        "Relu" => unary(first, |x| x.max(0.0)),
        "Min" | "Max" => {
            let mut result = first.clone();
            for input in inputs.get(1..)? {
                result = extreme(&result, input.as_ref()?, slot.op_type() == "Min")?;
            }
            Some(result)
        }
        "Clip" => clip(slot, first, inputs),
        "ReduceMin" | "ReduceMax" => reduce(slot, first, inputs.get(1).and_then(Option::as_ref), opset),
        "Shape" => {
            let dims: Vec<i64> = first.dims().iter().map(|&d| d as i64).collect();
            let rank = dims.len() as i64;
            let bound = |at: i64| (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize;
            let (start, end) = (bound(slot.int("start").unwrap_or(0)), bound(slot.int("end").unwrap_or(rank)));
            let part = dims.get(start..end.max(start))?;
            Some(Tensor::from_i64(&[part.len()], part))
        }
        "Size" => Some(Tensor::from_i64(&[], &[first.len() as i64])),
        "Expand" => {
            let dims: Vec<usize> =
                second()?.to_i64()?.into_iter().map(|d| usize::try_from(d).ok()).collect::<Option<_>>()?;
            expand(first, &broadcast(&first.dims(), &dims)?)
        }
        "QuantizeLinear" => quantize(model, node, inputs),
        "DequantizeLinear" => dequantize(model, node, inputs),
        _ => None,
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

fn unary(x: &Tensor, f: impl Fn(f32) -> f32) -> Option<Tensor> {
    if x.dtype() != DataType::Float {
        return None;
    }
    let values: Vec<f32> = x.to_f32()?.into_iter().map(f).collect();
    values.iter().all(|v| !v.is_nan()).then(|| Tensor::from_f32(&x.dims(), &values))
}

fn cast(x: &Tensor, to: DataType) -> Option<Tensor> {
    if x.dtype() == to {
        return Some(x.clone());
    }
    let dims = x.dims();
    if let Some(values) = x.to_i64() {
        return match to {
            // Every integer that a quantizer has is exact in f32.
            DataType::Float => {
                let exact = values.iter().all(|v| v.unsigned_abs() <= 1 << 24);
                exact.then(|| Tensor::from_f32(&dims, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()))
            }
            _ => integers(to, &dims, &values),
        };
    }
    if x.dtype() != DataType::Float {
        return None;
    }
    let values = x.to_f32()?;
    // Beyond these the standard leaves the result open.
    if values.iter().any(|v| v.abs() > 2e9 || v.is_nan()) {
        return None;
    }
    integers(to, &dims, &values.iter().map(|&v| v as i64).collect::<Vec<_>>())
}

/// A tensor of an integer type; `None` where it cannot hold the values.
fn integers(dtype: DataType, dims: &[usize], values: &[i64]) -> Option<Tensor> {
    let data: Vec<u8> = match dtype {
        DataType::Int64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DataType::Int32 => bytes(values, |v| i32::try_from(v).ok().map(i32::to_le_bytes))?,
        DataType::Int16 => bytes(values, |v| i16::try_from(v).ok().map(i16::to_le_bytes))?,
        DataType::Uint16 => bytes(values, |v| u16::try_from(v).ok().map(u16::to_le_bytes))?,
        DataType::Int8 => bytes(values, |v| i8::try_from(v).ok().map(i8::to_le_bytes))?,
        DataType::Uint8 => bytes(values, |v| u8::try_from(v).ok().map(u8::to_le_bytes))?,
        DataType::Int4 | DataType::Uint4 => {
            let format = dtype.format()?;
            let (low, high) = format.range();
            let codes: Vec<i32> = values.iter().map(|&v| i32::try_from(v).ok()).collect::<Option<_>>()?;
            if codes.iter().any(|c| !(low..=high).contains(c)) {
                return None;
            }
            pack::pack(&codes, format.bits())
        }
        _ => return None,
    };
    Some(Tensor::new(dtype, dims, data))
}

fn bytes<const N: usize>(values: &[i64], narrow: impl Fn(i64) -> Option<[u8; N]>) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(values.len() * N);
    for &value in values {
        out.extend(narrow(value)?);
    }
    Some(out)
}

/// A tensor repeated to a shape that it is broadcast to.
fn expand(x: &Tensor, dims: &[usize]) -> Option<Tensor> {
    let bits = x.dtype().bits()?;
    if !bits.is_multiple_of(8) {
        return None;
    }
    let width = bits / 8;
    let raw = x.raw();
    let mut out = Vec::new();
    for at in sources(&x.dims(), dims) {
        out.extend_from_slice(raw.get(at * width..(at + 1) * width)?);
    }
    Some(Tensor::new(x.dtype(), dims, out))
}

fn extreme(a: &Tensor, b: &Tensor, least: bool) -> Option<Tensor> {
    if a.dtype() != b.dtype() {
        return None;
    }
    let dims = broadcast(&a.dims(), &b.dims())?;
    let (at, bt) = (sources(&a.dims(), &dims), sources(&b.dims(), &dims));
    if a.dtype() == DataType::Float {
        let (x, y) = (a.to_f32()?, b.to_f32()?);
        if x.iter().chain(&y).any(|v| v.is_nan()) {
            return None;
        }
        let pick = |x: f32, y: f32| if least { x.min(y) } else { x.max(y) };
        let values: Vec<f32> = at.iter().zip(&bt).map(|(&i, &j)| pick(x[i], y[j])).collect();
        return Some(Tensor::from_f32(&dims, &values));
    }
    let (x, y) = (a.to_i64()?, b.to_i64()?);
    let pick = |x: i64, y: i64| if least { x.min(y) } else { x.max(y) };
    integers(a.dtype(), &dims, &at.iter().zip(&bt).map(|(&i, &j)| pick(x[i], y[j])).collect::<Vec<_>>())
}

fn clip(node: &Node, x: &Tensor, inputs: &[Option<Tensor>]) -> Option<Tensor> {
    let mut result = x.clone();
    for (index, name, least) in [(1, "min", false), (2, "max", true)] {
        let bound = match inputs.get(index) {
            Some(Some(bound)) if bound.len() == 1 => Some(bound.clone().reshaped(&[])),
            Some(Some(_)) => return None,
            _ => node.float(name).map(|value| Tensor::from_f32(&[], &[value])),
        };
        if let Some(bound) = bound {
            result = extreme(&result, &bound, least)?;
        }
    }
    Some(result)
}

fn reduce(node: &Node, x: &Tensor, axes: Option<&Tensor>, opset: i64) -> Option<Tensor> {
    if x.dtype() != DataType::Float || opset < 7 {
        return None;
    }
    let dims = x.dims();
    let given = match axes {
        Some(tensor) => Some(tensor.to_i64()?),
        None => node.ints("axes").map(<[i64]>::to_vec),
    };
    let rank = dims.len() as i64;
    let reduced: Vec<usize> = match given {
        Some(axes) if !axes.is_empty() => axes
            .into_iter()
            .map(|a| usize::try_from(if a < 0 { a + rank } else { a }).ok().filter(|&a| a < dims.len()))
            .collect::<Option<_>>()?,
        _ if node.int("noop_with_empty_axes").unwrap_or(0) != 0 => return Some(x.clone()),
        _ => (0..dims.len()).collect(),
    };
    let kept: Vec<usize> = dims.iter().enumerate().map(|(at, &d)| if reduced.contains(&at) { 1 } else { d }).collect();
    let values = x.to_f32()?;
    if values.is_empty() || values.iter().any(|v| v.is_nan()) {
        return None;
    }
    let least = node.op_type() == "ReduceMin";
    let mut out = vec![if least { f32::INFINITY } else { f32::NEG_INFINITY }; kept.iter().product()];
    for (value, to) in values.iter().zip(sources(&kept, &dims)) {
        out[to] = if least { out[to].min(*value) } else { out[to].max(*value) };
    }
    let keep = node.int("keepdims").unwrap_or(1) != 0;
    let shape: Vec<usize> = if keep {
        kept
    } else {
        dims.iter().enumerate().filter(|(at, _)| !reduced.contains(at)).map(|(_, &d)| d).collect()
    };
    Some(Tensor::from_f32(&shape, &out))
}

/// Format, granularity and parameters of a Quantize or Dequantize node whose inputs are these.
struct Parameters {
    dtype: DataType,
    granularity: numerics::Granularity,
    qparams: QParams,
}

fn parameters(model: &Model, node: NodeId, inputs: &[Option<Tensor>], dtype: Option<DataType>) -> Option<Parameters> {
    let (x, scale) = (inputs.first()?.as_ref()?, inputs.get(1)?.as_ref()?);
    let zero = inputs.get(2).and_then(Option::as_ref);
    let declared = Quantizer::of(model.node(node)).and_then(|q| q.output_dtype);
    let dtype = dtype.or(zero.map(Tensor::dtype)).or(declared).unwrap_or(DataType::Uint8);
    let format = dtype.format()?;
    if !matches!(scale.dtype(), DataType::Float | DataType::Float8e8m0) {
        return None;
    }
    let scales = scale_values(scale)?;
    let zero_points = match zero {
        Some(zero) if format.is_integer() => pack::unpack(&zero.raw(), &format, zero.len()),
        _ => vec![0; scales.len()],
    };
    let granularity = granularity(model, node, &x.dims(), &scale.dims()).ok()?;
    Some(Parameters { dtype, granularity, qparams: QParams { scales, zero_points } })
}

fn quantize(model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Tensor> {
    let x = inputs.first()?.as_ref().filter(|x| x.dtype() == DataType::Float)?;
    let Parameters { dtype, granularity, qparams } = parameters(model, node, inputs, None)?;
    let (values, format) = (x.to_f32()?, dtype.format()?);
    let raw = numerics::quantize(&values, &x.dims(), &granularity, &qparams, format, Round::HalfEven).ok()?;
    Some(Tensor::new(dtype, &x.dims(), raw))
}

fn dequantize(model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Tensor> {
    let x = inputs.first()?.as_ref()?;
    let Parameters { dtype, granularity, qparams } = parameters(model, node, inputs, Some(x.dtype()))?;
    let values = numerics::dequantize(&x.raw(), dtype.format()?, &x.dims(), &granularity, &qparams).ok()?;
    Some(Tensor::from_f32(&x.dims(), &values))
}
