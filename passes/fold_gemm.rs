//! What a `Gemm` with a constant weight multiplies by becomes part of its constants, and its left operand is transposed in
//! front of it: integer products have neither `alpha`, `beta` nor `transA`.
//!
//! `alpha·A·B + beta·C` is `A·(alpha·B) + beta·C`, each element rounded once to its type. A weight that other nodes read as well
//! keeps its `alpha`, since it would be stored twice.

use super::support::channels::{rounded, store};
use super::support::graphs::{allow_plain_initializers, graphs_outside_functions};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Gemm;
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, tensor_type};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the [module](self).
pub struct FoldGemm;

impl Pass for FoldGemm {
    fn name(&self) -> &'static str {
        "fold-gemm"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for graph in graphs_outside_functions(model) {
            for node in model.graph(graph).nodes().to_vec() {
                let Some(gemm) = Gemm::of(model.node(node)).filter(|_| model.node(node).domain().is_empty()) else {
                    continue;
                };
                if model.constant_input(node, 1).is_some_and(|weight| weight.dtype() == DataType::Float) {
                    fold(model, node, &gemm, &mut outcome);
                }
            }
        }
        if !outcome.changes.is_empty() {
            allow_plain_initializers(model, &mut outcome);
        }
        Ok(outcome)
    }
}

fn fold(model: &mut Model, node: NodeId, gemm: &Gemm, outcome: &mut Outcome) {
    let name = model.node_name(node).to_owned();
    let one = |factor: f32| factor.to_bits() == 1f32.to_bits();
    for (attribute, factor, input, what) in
        [("alpha", gemm.alpha, 1, Operand::Weight), ("beta", gemm.beta, 2, Operand::Bias)]
    {
        if one(factor) || model.node(node).input(input).is_none() {
            continue;
        }
        match scaled(model, node, input, factor, what) {
            Ok(Some(tensor)) => store(model, node, input, &format!("{name}_{attribute}"), tensor),
            Ok(None) => model.truncate_inputs(node, input),
            Err(why) => {
                outcome.skipped(&name, why);
                continue;
            }
        }
        model.remove_attr(node, attribute);
        outcome.changed(&name, Change::FactorFolded { attribute: attribute.to_owned() });
    }
    if gemm.trans_a && transpose_left(model, node, &name) {
        outcome.changed(&name, Change::LeftTransposed);
    }
}

/// A constant operand times a factor; nothing where the factor takes it away.
fn scaled(model: &Model, node: NodeId, input: usize, factor: f32, what: Operand) -> Result<Option<Tensor>, Reason> {
    let value = model.node(node).input(input).ok_or(Reason::Missing { what })?;
    if what == Operand::Bias && factor.to_bits() << 1 == 0 {
        return Ok(None);
    }
    let tensor = model.constant(value).ok_or(Reason::NotConstant { what })?;
    if what == Operand::Weight && model.value(value).users().len() > 1 {
        return Err(Reason::UsedElsewhere { what });
    }
    let dtype = tensor.dtype();
    let overflows = || Reason::Overflows { what: what.to_string(), dtype };
    let values = tensor.to_f64().ok_or_else(overflows)?;
    tensor.release();
    let products = values.into_iter().map(|v| v * f64::from(factor));
    rounded(dtype, &tensor.dims(), products).map(Some).ok_or_else(overflows)
}

/// Has a node of its own transpose the left operand, unless that is a constant.
fn transpose_left(model: &mut Model, node: NodeId, name: &str) -> bool {
    let Some(left) = model.node(node).input(0).filter(|&v| model.constant(v).is_none()) else { return false };
    let output = model.unique_name(&format!("{}_transposed", model.value(left).name()));
    let transpose = NewNode::new("Transpose", format!("{name}_transA"), &[left], &[&output]);
    let transpose = model.insert(Place::Before(node), transpose.with(Attr::ints("perm", &[1, 0])));
    let Some(transposed) = model.node(transpose).output(0) else { return false };
    if let Some(dtype) = model.dtype(left) {
        let shape = model.shape(left).map(|dims| dims.into_iter().rev().collect::<Vec<_>>());
        model.set_type(transposed, tensor_type(dtype, shape.as_deref()));
    }
    model.set_input(node, 0, Some(transposed));
    model.remove_attr(node, "transA");
    true
}
