//! Nodes whose inputs are all constant become constants; an `If` whose condition is constant becomes the branch taken.
//!
//! Shape arithmetic is followed through symbolic dimensions: `Gather(Shape(x), 1)` is a constant where dimension 1 of `x`
//! is declared, whatever the others are. Moves and simple arithmetic are computed here, to the same bits as in any
//! runtime; other operators are left to [`Context::evaluate`].
//!
//! - A result is kept if it takes no more bytes than the constants it is made from, each counted once, or than the largest
//!   constant of the model, or at most 4 MiB: weights may be transposed, but not blown up. All results together may take as
//!   many bytes as the model's constants did, or 64 MiB, beyond those that they replace.
//! - Only operators listed here are evaluated, those that are pure and whose result size is known beforehand. Random
//!   ones, quantization (`QuantizeLinear`, `DequantizeLinear` and kin) and foreign domains are not among them.
//! - Weights and biases are computed whichever pure operator they come from, and rounded as the runtime does it
//!   ([`Evaluate::approximate`]): left to be computed at run time, they could not be quantized.
//! - The output of a graph stays the output of a node: not every runtime returns an initializer.
//! - Nothing is folded in functions, since they cannot hold initializers. An initializer that is a graph input, too, is
//!   no constant.

use std::collections::{HashMap, HashSet, VecDeque};

use super::lift_constants::lift;
use super::support::evaluate::{Exact, broadcast};
use super::support::graphs::{allow_plain_initializers, graphs_outside_functions, is_graph_output};
use super::{Change, Context, Evaluate, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::{Gather, axis_in};
use crate::ir::{Def, GraphId, Model, NewNode, NodeId, Place, Tensor, User, ValueId};
use crate::ops::{self, Role};
use crate::reason::{Operand, Reason};

/// Bytes a result may take even if the constants it is made from take less.
const ALWAYS: usize = 4 << 20;

/// Bytes that all results may take beyond what they replace, even if the model has fewer.
const ALL: usize = 64 << 20;

/// Products that a `MatMul` of constants may take.
const PRODUCTS: usize = 1 << 34;

/// See the [module](self).
pub struct FoldConstants;

impl Pass for FoldConstants {
    fn name(&self) -> &'static str {
        "fold-constants"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let main = model.main();
        let constants = model.all_graphs().into_iter().flat_map(|g| model.graph(g).initializers());
        let sizes: Vec<usize> = constants.filter_map(|&v| model.constant(v)).map(Tensor::byte_len).collect();
        let mut fold = Fold {
            outcome: Outcome::default(),
            shapes: HashMap::new(),
            done: Vec::new(),
            weights: behind_weights(model),
            largest: sizes.iter().copied().max().unwrap_or(0),
            room: sizes.iter().sum::<usize>().max(ALL),
            folded_readers: HashMap::new(),
            model,
            context,
        };
        fold.graph(main)?;
        let Fold { mut outcome, done, .. } = fold;
        model.remove(&done);
        if !outcome.changes.is_empty() {
            allow_plain_initializers(model, &mut outcome);
        }
        Ok(outcome)
    }
}

struct Fold<'a> {
    model: &'a mut Model,
    context: &'a Context<'a>,
    outcome: Outcome,
    /// Lists of integers of which some elements are known: what becomes of `Shape`.
    shapes: HashMap<ValueId, Vec<Option<i64>>>,
    /// Folded nodes, removed together at the end.
    done: Vec<NodeId>,
    /// Nodes that compute weights and biases from constants.
    weights: HashSet<NodeId>,
    /// Bytes of the largest constant.
    largest: usize,
    /// Bytes that results may still take.
    room: usize,
    /// How many of the readers of a constant are folded.
    folded_readers: HashMap<ValueId, usize>,
}

impl Fold<'_> {
    fn graph(&mut self, graph: GraphId) -> Result<()> {
        let mut queue: VecDeque<NodeId> = self.model.graph(graph).nodes().iter().copied().collect();
        while let Some(node) = queue.pop_front() {
            if let Some(body) = self.branch_taken(node) {
                let inlined = self.inline(node, body);
                for node in inlined.into_iter().rev() {
                    queue.push_front(node);
                }
            } else if !self.fold(node)? {
                for body in self.model.node(node).bodies().collect::<Vec<_>>() {
                    self.graph(body)?;
                }
            }
        }
        Ok(())
    }

    /// The body that an `If` with a constant condition runs.
    fn branch_taken(&self, node: NodeId) -> Option<GraphId> {
        let slot = self.model.node(node);
        if !slot.is("If") {
            return None;
        }
        let condition = self.model.constant_input(node, 0)?.to_i64()?;
        let &[condition] = condition.as_slice() else { return None };
        let &[body] = slot.attr(if condition == 0 { "else_branch" } else { "then_branch" })?.graphs() else {
            return None;
        };
        let graph = self.model.graph(body);
        let fits = graph.inputs().len() == 0 && !graph.has_sparse() && graph.outputs().len() == slot.outputs().len();
        fits.then_some(body)
    }

    /// Replaces an `If` by one of its bodies; the nodes that took its place.
    fn inline(&mut self, node: NodeId, body: GraphId) -> Vec<NodeId> {
        let name = self.model.node_name(node).to_owned();
        let results: Vec<_> =
            self.model.node(node).outputs().iter().copied().zip(self.model.graph(body).outputs()).collect();
        let mut nodes = self.model.graph(body).nodes().to_vec();
        let results: Vec<(ValueId, ValueId)> = results.into_iter().filter_map(|(to, from)| Some((to?, from))).collect();
        for (index, (result, inner)) in results.into_iter().enumerate() {
            if let (None, Some(ty)) = (self.model.value(inner).ty(), self.model.value(result).ty()) {
                let ty = ty.clone();
                self.model.set_type(inner, ty);
            }
            if is_graph_output(self.model, result) {
                // The name of a graph output stays with a node of this graph.
                let output = self.model.value(result).name().to_owned();
                let copy = NewNode::new("Identity", format!("{name}_output_{index}"), &[inner], &[&output]);
                let copy = self.model.insert(Place::After(node), copy);
                if let Some(output) = self.model.node(copy).output(0) {
                    if let Some(ty) = self.model.value(result).ty().cloned() {
                        self.model.set_type(output, ty);
                    }
                    self.model.take_name(result, output, &name);
                    self.model.replace_uses(result, output, |_| true);
                }
                nodes.push(copy);
            }
        }
        self.model.inline_body(node, body);
        self.outcome.changed(name, Change::BecameBranch);
        self.model.remove(&[node]);
        nodes
    }

    /// Makes the outputs of a node constants, if that is possible; whether it was.
    fn fold(&mut self, id: NodeId) -> Result<bool> {
        let node = self.model.node(id);
        if !node.domain().is_empty() || node.bodies().next().is_some() {
            return Ok(false);
        }
        if node.is("Constant") {
            let lifted = lift(self.model, id)?;
            if let Ok(value) = lifted {
                let name = self.model.value(value).name().to_owned();
                self.outcome.changed(name, Change::BecameInitializer);
                self.done.push(id);
            }
            return Ok(lifted.is_ok());
        }
        // A copy would be stored once more for each Identity.
        if let (true, Some(from), Some(to)) = (node.is("Identity"), node.input(0), node.output(0))
            && self.model.constant(from).is_some()
            && !is_graph_output(self.model, to)
        {
            self.model.replace_uses(to, from, |_| true);
            self.outcome.changed(self.model.node_name(id), Change::Bypassed { op: "Identity".to_owned() });
            self.done.push(id);
            return Ok(true);
        }
        if let Some(known) = self.shape_arithmetic(id) {
            let whole: Option<Vec<i64>> = known.values.iter().copied().collect();
            let output = self.model.node(id).output(0);
            if let (Some(values), Some(output)) = (whole, output)
                && !is_graph_output(self.model, output)
            {
                let dims = if known.scalar { vec![] } else { vec![values.len()] };
                self.replace(id, &[Tensor::from_i64(&dims, &values)], "a known shape");
                return Ok(true);
            }
            if let (Some(output), false) = (output, known.scalar) {
                self.shapes.insert(output, known.values);
            }
        }
        match self.evaluated(id) {
            Ok(Some(tensors)) => {
                self.replace(id, &tensors, "constants");
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(why) => {
                self.outcome.skipped(self.model.node_name(id), why);
                Ok(false)
            }
        }
    }

    fn replace(&mut self, id: NodeId, tensors: &[Tensor], of: &str) {
        let op = self.model.node(id).op_type().to_owned();
        self.room = (self.room + self.freed(id)).saturating_sub(tensors.iter().map(Tensor::byte_len).sum());
        for &value in self.model.node(id).inputs().iter().flatten() {
            *self.folded_readers.entry(value).or_default() += 1;
        }
        self.outcome.changed(self.model.node_name(id), Change::BecameConstant { op, of: of.to_owned() });
        let outputs: Vec<_> = self.model.node(id).outputs().iter().copied().zip(tensors).collect();
        for (output, tensor) in outputs {
            if let Some(output) = output {
                self.model.make_constant(output, tensor.clone());
            }
        }
        self.done.push(id);
    }

    /// Bytes of the constants that nobody reads any more once a node is gone.
    fn freed(&self, id: NodeId) -> usize {
        let inputs = self.model.node(id).inputs();
        let distinct: HashSet<ValueId> = inputs.iter().flatten().copied().collect();
        let last = |value: &ValueId| {
            let own = inputs.iter().filter(|input| **input == Some(*value)).count();
            let others = self.folded_readers.get(value).copied().unwrap_or(0);
            others + own == self.model.value(*value).users().len()
        };
        distinct.into_iter().filter(last).filter_map(|v| self.model.constant(v)).map(Tensor::byte_len).sum()
    }

    /// The outputs of a node of constants; `None` if it is none, or one that is not evaluated.
    fn evaluated(&self, id: NodeId) -> Result<Option<Vec<Tensor>>, Reason> {
        let node = self.model.node(id);
        let mut inputs = Vec::with_capacity(node.inputs().len());
        for input in node.inputs() {
            let tensor = input.map(|value| self.model.constant(value).cloned());
            match tensor {
                Some(None) => return Ok(None),
                Some(tensor) => inputs.push(tensor),
                None => inputs.push(None),
            }
        }
        let weight = self.weights.contains(&id);
        if !inputs.iter().any(Option::is_some) || !(weight || is_evaluated(node.op_type())) {
            return Ok(None);
        }
        if node.outputs().iter().flatten().any(|&v| is_graph_output(self.model, v)) {
            return Err(Reason::IsGraphOutput { what: Operand::Output });
        }
        let distinct: HashSet<ValueId> = node.inputs().iter().flatten().copied().collect();
        let made_from: usize = distinct.iter().filter_map(|&v| self.model.constant(v)).map(Tensor::byte_len).sum();
        let limit = made_from.max(self.largest).max(ALWAYS).min(self.room + self.freed(id));
        let too_large = || Reason::TooLarge { what: Operand::Output, limit };
        let known = elements(node, &inputs);
        if known.is_none() && !weight {
            return Err(Reason::UnknownShape { what: Operand::Output });
        }
        if known.is_some_and(|elements| elements > limit) {
            return Err(too_large());
        }
        let model = &*self.model;
        let exact =
            || Exact.evaluate(model, id, &inputs).or_else(|| self.context.evaluate.evaluate(model, id, &inputs));
        let near = || self.context.evaluate.approximate(model, id, &inputs, limit);
        let tensors = known.and_then(|_| exact()).or_else(|| weight.then(near).flatten());
        let tensors = tensors.ok_or(Reason::NotComputable { what: Operand::Output })?;
        inputs.iter().flatten().for_each(Tensor::release);
        if tensors.len() < node.outputs().len() {
            return Err(Reason::NotComputable { what: Operand::Output });
        }
        if tensors.iter().map(Tensor::byte_len).sum::<usize>() > limit {
            return Err(too_large());
        }
        for (output, tensor) in node.outputs().iter().zip(&tensors) {
            let declared = output.and_then(|v| model.dtype(v)).unwrap_or(tensor.dtype());
            if declared != tensor.dtype() {
                let wanted = declared.to_string();
                return Err(Reason::WrongType { what: Operand::Output, found: tensor.dtype(), wanted });
            }
        }
        Ok(Some(tensors))
    }

    /// What is known of the result of shape arithmetic.
    fn shape_arithmetic(&self, id: NodeId) -> Option<Known> {
        let node = self.model.node(id);
        let from = node.input(0)?;
        let list = |values: Vec<Option<i64>>| Some(Known { values, scalar: false });
        match node.op_type() {
            "Shape" => {
                let dims = self.declared_dims(from)?;
                let rank = dims.len() as i64;
                let bound = |name: &str, default: i64| {
                    let at = node.int(name).unwrap_or(default);
                    (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize
                };
                let (start, end) = (bound("start", 0), bound("end", rank));
                list(dims.get(start..end).unwrap_or_default().to_vec())
            }
            "Size" => {
                let size = if let Some(known) = self.shapes.get(&from) {
                    known.len() as i64
                } else {
                    let dims: Option<Vec<i64>> = self.declared_dims(from)?.into_iter().collect();
                    dims?.into_iter().try_fold(1i64, i64::checked_mul)?
                };
                Some(Known { values: vec![Some(size)], scalar: true })
            }
            "Gather" => {
                let known = self.shapes.get(&from)?;
                let indices = self.model.constant_input(id, 1)?;
                let scalar = indices.dims().is_empty();
                if indices.dims().len() > 1 || !matches!(Gather::of(node)?.axis, 0 | -1) {
                    return None;
                }
                let at = |i: i64| usize::try_from(if i < 0 { i + known.len() as i64 } else { i }).ok();
                let values =
                    indices.to_i64()?.into_iter().map(|i| known.get(at(i)?).copied()).collect::<Option<_>>()?;
                Some(Known { values, scalar })
            }
            "Slice" => {
                let known = self.shapes.get(&from)?;
                let one = |name: &str, index: usize, default: Option<i64>| match (node.ints(name), node.input(index)) {
                    (Some(&[value]), None) => Some(value),
                    (None, Some(_)) => match self.model.constant_input(id, index)?.to_i64()?.as_slice() {
                        &[value] => Some(value),
                        _ => None,
                    },
                    (None, None) => default,
                    _ => None,
                };
                let rank = known.len() as i64;
                if !matches!(one("axes", 3, Some(0))?, 0 | -1) || one("steps", 4, Some(1))? != 1 {
                    return None;
                }
                let bound = |at: i64| (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize;
                let (start, end) = (bound(one("starts", 1, None)?), bound(one("ends", 2, None)?));
                list(known.get(start..end).unwrap_or_default().to_vec())
            }
            _ => None,
        }
    }

    /// Declared dimensions of what is not a constant. A declared zero is unknown: exporters write it for that.
    fn declared_dims(&self, value: ValueId) -> Option<Vec<Option<i64>>> {
        let dims = self.model.shape(value).or_else(|| self.shape_of_copy(value))?;
        let constant = matches!(self.model.value(value).def(), Def::Constant(_));
        Some(dims.into_iter().map(|d| d.filter(|&n| constant || n > 0).and_then(|n| i64::try_from(n).ok())).collect())
    }
}

impl Fold<'_> {
    /// The shape that is declared of what `value` is an `Identity` of, or of an `Identity` of it.
    fn shape_of_copy(&self, value: ValueId) -> Option<Vec<Option<usize>>> {
        let copies = |node: &NodeId| self.model.node(*node).is("Identity");
        let mut source = value;
        while let Some(node) = self.model.producer(source).filter(copies) {
            source = self.model.node(node).input(0)?;
            if let Some(shape) = self.model.shape(source) {
                return Some(shape);
            }
        }
        self.model.value(value).users().iter().find_map(|user| match user {
            User::Node { node, .. } if copies(node) => self.model.shape(self.model.node(*node).output(0)?),
            _ => None,
        })
    }
}

struct Known {
    values: Vec<Option<i64>>,
    scalar: bool,
}

/// The nodes that compute weights and biases from nothing but constants, by operators whose result is always the same.
fn behind_weights(model: &Model) -> HashSet<NodeId> {
    let mut constant = HashSet::new();
    let mut wanted = Vec::new();
    for graph in graphs_outside_functions(model) {
        for &id in model.graph(graph).nodes() {
            let node = model.node(id);
            let mut inputs = node.inputs().iter().flatten();
            let known = |v: &ValueId| {
                model.constant(*v).is_some() || model.producer(*v).is_some_and(|producer| constant.contains(&producer))
            };
            // A shape may be declared.
            if is_pure(node) && (node.is("Shape") || inputs.all(known)) {
                constant.insert(id);
            }
            let Some(row) = ops::of(model, id) else { continue };
            let weighs = |index: &usize| matches!(row.role(*index), Role::Weight(_) | Role::Bias);
            wanted.extend((0..node.inputs().len()).filter(weighs).filter_map(|i| model.producer(node.input(i)?)));
        }
    }
    let mut found = HashSet::new();
    while let Some(id) = wanted.pop() {
        if constant.contains(&id) && found.insert(id) {
            wanted.extend(model.node(id).inputs().iter().flatten().filter_map(|&v| model.producer(v)));
        }
    }
    found
}

/// Whether a node computes the same of the same inputs, and no quantized values.
fn is_pure(node: &crate::ir::Node) -> bool {
    let op = node.op_type();
    let random = op.starts_with("Random") || matches!(op, "Bernoulli" | "Multinomial" | "Dropout");
    node.domain().is_empty() && node.bodies().next().is_none() && !random && !ops::is_quantized(op)
}

/// What decides how many elements the result of an operator has.
#[derive(Clone, Copy)]
enum Extent {
    /// As many as the first input, at most.
    First,
    /// As many as all inputs together, at most.
    Total,
    /// All inputs broadcast against each other.
    Broadcast,
    /// Something of its own.
    Own,
}

/// The operators that are evaluated.
#[rustfmt::skip]
const EVALUATED: &[(Extent, &[&str])] = &[
    (Extent::First, &[
        "Abs", "Acos", "Acosh", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu",
        "Clip", "Cos", "Cosh", "CumSum", "Elu", "Erf", "Exp", "Flatten", "Floor", "Gelu", "HardSigmoid", "HardSwish",
        "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "LogSoftmax", "Neg", "Not", "Reciprocal", "ReduceL1", "ReduceL2",
        "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
        "ReduceSumSquare", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Selu", "Sigmoid", "Sign",
        "Sin", "Sinh", "Slice", "Softmax", "Softplus", "Softsign", "Split", "Sqrt", "Squeeze", "Tan", "Tanh",
        "Transpose", "Trilu", "Unsqueeze",
    ]),
    (Extent::Total, &["Concat"]),
    (Extent::Broadcast, &[
        "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
        "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
    ]),
    (Extent::Own, &["ConstantOfShape", "Expand", "Gather", "MatMul", "Range", "Tile"]),
];

fn extent(op: &str) -> Option<Extent> {
    EVALUATED.iter().find(|(_, ops)| ops.contains(&op)).map(|(extent, _)| *extent)
}

fn is_evaluated(op: &str) -> bool {
    extent(op).is_some()
}

/// How many elements the result has at most; `None` if that cannot be told, or overflows.
fn elements(node: &crate::ir::Node, inputs: &[Option<Tensor>]) -> Option<usize> {
    let input = |index: usize| inputs.get(index).and_then(Option::as_ref);
    let product = |dims: &[usize]| dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let list = |index: usize| -> Option<Vec<usize>> {
        input(index)?.to_i64()?.into_iter().map(|d| usize::try_from(d).ok()).collect()
    };
    match extent(node.op_type())? {
        // A reduction of nothing can still have any number of elements.
        Extent::First => Some(input(0)?.len()).filter(|&n| n > 0),
        Extent::Total => Some(inputs.iter().flatten().map(Tensor::len).sum()),
        Extent::Broadcast => {
            let dims = inputs.iter().flatten().try_fold(vec![], |dims, t| broadcast(&dims, &t.dims()))?;
            product(&dims)
        }
        Extent::Own => match node.op_type() {
            "ConstantOfShape" => product(&list(0)?),
            "Expand" => product(&broadcast(&input(0)?.dims(), &list(1)?)?),
            "Tile" => input(0)?.len().checked_mul(product(&list(1)?)?),
            "Gather" => {
                let dims = input(0)?.dims();
                let axis = axis_in(Gather::of(node)?.axis, dims.len())?;
                let row = input(0)?.len().checked_div(dims[axis])?;
                row.checked_mul(input(1)?.len())
            }
            "MatMul" => {
                let (a, b) = (input(0)?.dims(), input(1)?.dims());
                // The inner dimension is at least one, so this is no less than the result has.
                let rows = product(&a)?.checked_div(*a.last()?)?;
                let columns = product(&b)?.checked_div(if b.len() > 1 { b[b.len() - 2] } else { *b.last()? })?;
                // Computing it takes the inner dimension times that.
                product(&a)?.checked_mul(columns).filter(|&products| products <= PRODUCTS)?;
                rows.checked_mul(columns)
            }
            "Range" => {
                let number = |index: usize| -> Option<f64> {
                    let tensor = input(index)?;
                    let ints = tensor.to_i64().and_then(|v| v.first().map(|&i| i as f64));
                    ints.or_else(|| tensor.to_f32().and_then(|v| v.first().map(|&f| f.into())))
                };
                let count = ((number(1)? - number(0)?) / number(2)?).ceil();
                (count < 1e15).then_some(count.max(0.0) as usize)
            }
            _ => None,
        },
    }
}
