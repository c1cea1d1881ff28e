//! onnxruntime's `EmbedLayerNormalization` becomes the lookups in its tables and a `SkipLayerNormalization` of their sum: the
//! tables are then found like all others.
//!
//! The mask index, where something reads it, is the number of ones in each row of the mask.

use super::support::nodes::replace_fused;
use super::{Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::MICROSOFT;
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, Tensor, ValueId};
use crate::reason::{Operand, Reason};

/// See the [module](self).
#[derive(Debug)]
pub struct SplitEmbedding;

impl Pass for SplitEmbedding {
    fn name(&self) -> &'static str {
        "split-embedding"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        Ok(replace_fused(model, "EmbedLayerNormalization", "Gather and SkipLayerNormalization", |model, node, name| {
            parts(model, node)?.split(model, node, name);
            Ok(())
        }))
    }
}

/// What a node reads.
struct Parts {
    graph: GraphId,
    ids: ValueId,
    segments: ValueId,
    /// Of words, positions and segments.
    tables: [ValueId; 3],
    scale: ValueId,
    bias: ValueId,
    mask: Option<ValueId>,
    positions: Option<ValueId>,
    /// Whether something reads the mask index.
    counted: bool,
}

/// What a node reads, or why it stays as it is.
fn parts(model: &Model, node: NodeId) -> Result<Parts, Reason> {
    let at = model.node(node);
    let input = |input: usize| at.input(input).ok_or(Reason::MissingInput { input });
    let graph = at.graph().ok_or(Reason::NoOutput)?;
    let tables = [input(2)?, input(3)?, input(4)?];
    for table in tables {
        let what = Operand::Weight;
        let dims = model.constant(table).ok_or(Reason::NotConstant { what })?.dims();
        if dims.len() != 2 {
            return Err(Reason::WrongShape { what, dims });
        }
    }
    let counted = at.output(1).is_some_and(|v| !model.value(v).users().is_empty());
    let mask = at.input(7);
    // A Range needs opset 11; without a mask the index is of no use.
    if model.opset_in(graph).is_none_or(|opset| opset < 11) || counted && mask.is_none() {
        return Err(Reason::Unsupported { what: "a mask index without a mask, or an opset below 11,".to_owned() });
    }
    Ok(Parts {
        graph,
        ids: input(0)?,
        segments: input(1)?,
        tables,
        scale: input(5)?,
        bias: input(6)?,
        mask,
        positions: at.input(8),
        counted,
    })
}

impl Parts {
    fn split(&self, model: &mut Model, node: NodeId, name: &str) {
        let add = |model: &mut Model, op: &str, inputs: &[ValueId], what: &str, attrs: Vec<_>| {
            let mut new = NewNode::new(op, format!("{name}_{what}_{op}"), inputs, &[&format!("{name}_{what}")]);
            new.attrs = attrs;
            let made = model.insert(Place::Before(node), new);
            model.node(made).output(0)
        };
        let constant = |model: &mut Model, what: &str, dims: &[usize], value: i64| {
            model.add_initializer(
                self.graph,
                &format!("{name}_{what}"),
                Tensor::from_i64(dims, &vec![value; dims.len().max(1)]),
            )
        };
        let [words, places, kinds] = self.tables;
        let positions = self.positions.or_else(|| {
            // One for each token of the longest row.
            let shape = add(model, "Shape", &[self.ids], "shape", Vec::new())?;
            let (zero, one) = (constant(model, "zero", &[], 0), constant(model, "one", &[], 1));
            let tokens = add(model, "Gather", &[shape, one], "tokens", Vec::new())?;
            add(model, "Range", &[zero, tokens, one], "range", Vec::new())
        });
        let Some(positions) = positions else { return };
        let looked_up = |model: &mut Model| {
            let word = add(model, "Gather", &[words, self.ids], "word", Vec::new())?;
            let place = add(model, "Gather", &[places, positions], "position", Vec::new())?;
            let kind = add(model, "Gather", &[kinds, self.segments], "segment", Vec::new())?;
            Some((add(model, "Add", &[word, place], "placed", Vec::new())?, kind))
        };
        let Some((placed, kind)) = looked_up(model) else { return };
        if let (true, Some(mask)) = (self.counted, self.mask) {
            let axes = [Attr::ints("axes", &[1]), Attr::int("keepdims", 0)];
            let newer = model.opset_in(self.graph).is_some_and(|opset| opset >= 13);
            let counts = if newer {
                let axis = constant(model, "axis", &[1], 1);
                add(model, "ReduceSum", &[mask, axis], "count", vec![Attr::int("keepdims", 0)])
            } else {
                add(model, "ReduceSum", &[mask], "count", axes.to_vec())
            };
            hand_over(model, node, 1, counts);
        }
        if model.node(node).output(2).is_some_and(|v| !model.value(v).users().is_empty()) {
            let sum = add(model, "Add", &[placed, kind], "sum", Vec::new());
            hand_over(model, node, 2, sum);
        }
        model.truncate_inputs(node, 0);
        model.truncate_outputs(node, 1);
        for (index, value) in [placed, kind, self.scale, self.bias].into_iter().enumerate() {
            model.set_input(node, index, Some(value));
        }
        model.remove_attr(node, "mask_index_type");
        model.set_op(node, MICROSOFT, "SkipLayerNormalization");
    }
}

/// Has what reads an output of a node read another value, which takes over its name.
fn hand_over(model: &mut Model, node: NodeId, output: usize, to: Option<ValueId>) {
    if let (Some(from), Some(to)) = (model.node(node).output(output), to) {
        let old = format!("{}_unread", model.value(from).name());
        model.replace_uses(from, to, |_| true);
        model.take_name(from, to, &old);
    }
}
