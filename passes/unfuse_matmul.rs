//! onnxruntime's `FusedMatMul` with a constant weight becomes a `MatMul`, whose weight is found like all others.
//!
//! `transA` and `transB` swap the last two axes, in the constant itself or by a Transpose in front; `alpha` becomes part of the
//! weight, each element rounded once to its type. A product of two activations stays.

use super::support::channels::{rounded, store};
use super::support::evaluate::transposed;
use super::support::nodes::replace_fused;
use super::{Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, tensor_type};
use crate::reason::{Operand, Reason};

/// See the [module](self).
#[derive(Debug)]
pub struct UnfuseMatmul;

impl Pass for UnfuseMatmul {
    fn name(&self) -> &'static str {
        "unfuse-matmul"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        Ok(replace_fused(model, "FusedMatMul", "MatMul", |model, node, name| {
            let operands = operands(model, node)?;
            unfuse(model, node, name, operands);
            Ok(())
        }))
    }
}

/// What becomes of an operand.
enum Operation {
    Stays,
    Constant(Box<Tensor>),
    /// By a node of its own.
    Transposed(Vec<i64>),
}

/// What becomes of both operands, or why the node stays as it is.
fn operands(model: &Model, node: NodeId) -> Result<[Operation; 2], Reason> {
    let at = model.node(node);
    if let Some(batched) = ["transBatchA", "transBatchB"].into_iter().find(|name| at.int(name).unwrap_or(0) != 0) {
        return Err(Reason::Attribute { name: batched.to_owned(), wanted: 0 });
    }
    let weight = usize::from(model.constant_input(node, 0).is_none());
    let what = Operand::Weight;
    let tensor = model.constant_input(node, weight).ok_or(Reason::NotConstant { what })?;
    if !tensor.dtype().has_quantizers() {
        return Err(Reason::WrongType { what, found: tensor.dtype(), wanted: "a float".to_owned() });
    }
    if at.graph().and_then(|graph| model.opset_in(graph)).is_none() || at.inputs().len() > 2 || at.outputs().len() != 1
    {
        let what = "a model without operators of the standard, or a third operand or second output,";
        return Err(Reason::Unsupported { what: what.to_owned() });
    }
    let operation = |index: usize| -> Result<Operation, Reason> {
        let turned = at.int(["transA", "transB"][index]).unwrap_or(0) != 0;
        let factor = at.float("alpha").filter(|alpha| index == weight && alpha.to_bits() != 1f32.to_bits());
        let value = at.input(index).ok_or(Reason::MissingInput { input: index })?;
        let constant = model.constant(value);
        let rank = constant.map(|t| t.dims().len()).or_else(|| Some(model.shape(value)?.len()));
        let axes = turned.then(|| swapped(rank)).transpose()?;
        let Some(constant) = constant.filter(|_| axes.is_some() || factor.is_some()) else {
            return Ok(
                axes.map_or(Operation::Stays, |axes| Operation::Transposed(axes.iter().map(|&a| a as i64).collect()))
            );
        };
        if model.value(value).users().len() > 1 {
            return Err(Reason::UsedElsewhere { what });
        }
        let computed = || Reason::NotComputable { what };
        let moved =
            axes.map_or_else(|| Some(constant.clone()), |axes| transposed(constant, &axes)).ok_or_else(computed)?;
        let Some(factor) = factor else { return Ok(Operation::Constant(Box::new(moved))) };
        let overflows = || Reason::Overflows { what: what.to_string(), dtype: moved.dtype() };
        let products = moved.to_f64().ok_or_else(overflows)?.into_iter().map(|v| v * f64::from(factor));
        rounded(moved.dtype(), &moved.dims(), products)
            .map(|tensor| Operation::Constant(Box::new(tensor)))
            .ok_or_else(overflows)
    };
    Ok([operation(0)?, operation(1)?])
}

/// All axes, the last two the other way round.
fn swapped(rank: Option<usize>) -> Result<Vec<usize>, Reason> {
    let rank = rank.filter(|&rank| rank >= 2).ok_or(Reason::UnknownShape { what: Operand::Input })?;
    Ok((0..rank - 2).chain([rank - 1, rank - 2]).collect())
}

fn unfuse(model: &mut Model, node: NodeId, name: &str, operands: [Operation; 2]) {
    for (index, operation) in operands.into_iter().enumerate() {
        match operation {
            Operation::Stays => {}
            Operation::Constant(tensor) => store(model, node, index, &format!("{name}_weight"), *tensor),
            Operation::Transposed(axes) => transpose(model, node, index, &axes),
        }
    }
    for attribute in ["alpha", "transA", "transB", "transBatchA", "transBatchB"] {
        model.remove_attr(node, attribute);
    }
    model.set_op(node, "", "MatMul");
}

fn transpose(model: &mut Model, node: NodeId, index: usize, axes: &[i64]) {
    let Some(value) = model.node(node).input(index) else { return };
    let name = format!("{}_transposed", model.value(value).name());
    let new = NewNode::new("Transpose", format!("{name}_Transpose"), &[value], &[&name]).with(Attr::ints("perm", axes));
    let made = model.insert(Place::Before(node), new);
    let Some(turned) = model.node(made).output(0) else { return };
    if let (Some(dtype), Some(shape)) = (model.dtype(value), model.shape(value)) {
        let shape: Vec<_> = axes.iter().filter_map(|&axis| shape.get(axis as usize).copied()).collect();
        model.set_type(turned, tensor_type(dtype, Some(&shape)));
    }
    model.set_input(node, index, Some(turned));
}
