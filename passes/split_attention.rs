//! onnxruntime's `Attention` becomes a product with its weight, and `MultiHeadAttention` of what comes out: the weight is then
//! found like all others.
//!
//! Without a past and without rotation inside. The same to the last bits in onnxruntime 1.31, with masks of one and of two axes.

use super::support::nodes::replace_fused;
use super::{Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::MICROSOFT;
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, ValueId};
use crate::reason::{Operand, Reason};

/// Attributes that `MultiHeadAttention` has as well.
const SHARED: &[&str] = &["mask_filter_value", "num_heads", "scale", "unidirectional"];

/// See the module.
#[derive(Debug)]
pub struct SplitAttention;

impl Pass for SplitAttention {
    fn name(&self) -> &'static str {
        "split-attention"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        Ok(replace_fused(model, "Attention", "MatMul and MultiHeadAttention", |model, node, name| {
            let size = size(model, node)?;
            split(model, node, name, size);
            Ok(())
        }))
    }
}

/// How many columns each of the three has, or why a node stays as it is.
fn size(model: &Model, node: NodeId) -> Result<usize, Reason> {
    let at = model.node(node);
    let what = Operand::Weight;
    let weight = model.constant_input(node, 1).ok_or(Reason::NotConstant { what })?;
    let dims = weight.dims();
    let &[_, columns] = dims.as_slice() else { return Err(Reason::WrongShape { what, dims }) };
    let other =
        |index: usize| at.input(index).and_then(|v| model.dtype(v)).is_some_and(|found| found != weight.dtype());
    if other(0) || other(2) {
        return Err(Reason::Mismatch { what: "type".into(), from: "that of its weight".into() });
    }
    let mask = at.input(3).is_none_or(|v| model.shape(v).is_some_and(|shape| (1..=2).contains(&shape.len())));
    let present = at.output(1).is_some_and(|v| !model.value(v).users().is_empty());
    let other = at.attrs().iter().any(|attr| !SHARED.contains(&attr.name()) && attr.proto().i.unwrap_or(1) != 0);
    let old = at.graph().and_then(|graph| model.opset_in(graph)).is_none_or(|opset| opset < 13);
    let more = at.input(4).is_some() || at.input(6).is_some();
    if !columns.is_multiple_of(3) || !weight.dtype().has_quantizers() || !mask || present || other || old || more {
        return Err(Reason::AttentionWithMore);
    }
    Ok(columns / 3)
}

fn split(model: &mut Model, node: NodeId, name: &str, size: usize) {
    let at = model.node(node);
    let (Some(x), Some(weight), Some(graph)) = (at.input(0), at.input(1), at.graph()) else { return };
    let (bias, mask, added) = (at.input(2), at.input(3), at.input(5));
    let add = |model: &mut Model, op: &str, inputs: &[ValueId], outputs: &[&str], attrs: Vec<_>| {
        let outputs: Vec<String> = outputs.iter().map(|what| format!("{name}_{what}")).collect();
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let mut new = NewNode::new(op, format!("{}_{op}", outputs[0]), inputs, &outputs);
        new.attrs = attrs;
        let made = model.insert(Place::Before(node), new);
        model.node(made).outputs().to_vec()
    };
    let product = add(model, "MatMul", &[x, weight], &["qkv"], Vec::new())[0];
    let sum = match (product, bias) {
        (Some(product), Some(bias)) => add(model, "Add", &[product, bias], &["qkv_sum"], Vec::new())[0],
        (product, _) => product,
    };
    let sizes = model.add_initializer(graph, &format!("{name}_sizes"), Tensor::from_i64(&[3], &[size as i64; 3]));
    let Some(sum) = sum else { return };
    let parts = add(model, "Split", &[sum, sizes], &["query", "key", "value"], vec![Attr::int("axis", 2)]);
    let others: Vec<String> = model.node(node).attrs().iter().map(|a| a.name().to_owned()).collect();
    for other in others.iter().filter(|other| !SHARED.contains(&other.as_str())) {
        model.remove_attr(node, other);
    }
    model.truncate_inputs(node, 0);
    model.truncate_outputs(node, 1);
    model.set_op(node, MICROSOFT, "MultiHeadAttention");
    for (index, value) in parts.into_iter().chain([None, mask, added]).enumerate() {
        if value.is_some() {
            model.set_input(node, index, value);
        }
    }
}
