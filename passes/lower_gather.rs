//! `Gather` of a dequantized table becomes onnxruntime's `GatherBlockQuantized`, codes and scales as they were.
//!
//! With a plan, the tables that it gives that form; without one, all that can have it. A table that a `MatMulNBits` has as
//! its weight, an embedding tied to the head, is the same bytes in another shape: the file holds them once, with a Reshape
//! that the runtime does away with when it loads the model.

use std::collections::BTreeMap;

use super::forms::{MICROSOFT, Packed, QuantizedTensor, block_of, find_dequantized};
use super::lower_matmulnbits::base_name;
use super::support::nodes::carry_out;
use super::{Change, Context, Outcome, Pass};
use crate::config::spec::Form;
use crate::error::Result;
use crate::ir::view::{Gather, MatMulNBits, Quantizer, axis_in};
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, Tensor, ValueId};
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct LowerGather;

impl Pass for LowerGather {
    fn name(&self) -> &'static str {
        "lower-gather"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut lower = Lower::default();
        if let Some((plan, _)) = context.quantization {
            carry_out(model, plan, Form::GatherBlockQuantized, |model, node, _| lower.node(model, node))?;
            return Ok(lower.outcome);
        }
        for node in gathers(model) {
            if let Err(why) = lower.node(model, node) {
                lower.outcome.skipped(model.node_name(node), why);
            }
        }
        Ok(lower.outcome)
    }
}

/// The Gathers of a model that read a dequantized constant.
fn gathers(model: &Model) -> Vec<NodeId> {
    let mut found = model.nodes_outside_functions();
    found.retain(|&n| model.node(n).is("Gather") && table(model, n).is_some());
    found
}

/// The DequantizeLinear whose result a Gather takes from.
fn table(model: &Model, node: NodeId) -> Option<NodeId> {
    let found = model.node(node).input(0).and_then(|v| find_dequantized(model, v));
    found.filter(|(_, exchanged)| !exchanged).map(|(dequantize, _)| dequantize)
}

/// The codes of a `GatherBlockQuantized`, also where they are another tensor's in another shape.
pub(super) fn table_codes(model: &Model, node: NodeId) -> Option<Tensor> {
    let value = model.node(node).input(0)?;
    if let Some(codes) = model.constant(value) {
        return Some(codes.clone());
    }
    let reshape = model.producer(value).filter(|&p| model.node(p).is("Reshape"))?;
    let codes = model.constant_input(reshape, 0)?;
    let shape = model.constant_input(reshape, 1)?.to_i64()?;
    let dims: Vec<usize> = shape.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
    let fits = dims.iter().try_fold(1usize, |all, &d| all.checked_mul(d)) == Some(codes.len());
    fits.then(|| codes.clone().reshaped(&dims))
}

/// The inputs and attributes of a table.
#[derive(Clone)]
struct Stored {
    codes: ValueId,
    scales: ValueId,
    zero_points: Option<ValueId>,
    attributes: Vec<(&'static str, usize)>,
}

/// A table in a graph, read along an axis.
type Key = (GraphId, [Option<ValueId>; 3], Option<[i64; 2]>, usize);

#[derive(Default)]
struct Lower {
    made: BTreeMap<Key, Stored>,
    outcome: Outcome,
}

impl Lower {
    fn node(&mut self, model: &mut Model, node: NodeId) -> Result<(), Reason> {
        let at = model.node(node);
        let Some(graph) = at.graph().filter(|_| at.is("Gather")) else {
            return Err(Reason::NotItsForm { form: Form::GatherBlockQuantized, op: at.op_type().into() });
        };
        let dequantize = table(model, node).ok_or(Reason::NotDequantizedConstant { what: Operand::Weight })?;
        let indices = at.input(1).ok_or(Reason::Missing { what: Operand::Indices })?;
        let rank = model.constant_input(dequantize, 0).map_or(0, |codes| codes.dims().len());
        let axis = Gather::of(at).map_or(0, |gather| gather.axis);
        let axis = axis_in(axis, rank).ok_or(Reason::AxisOutside { axis })?;
        // Where the quantized values are, every graph that reads them finds what becomes of them.
        let graph = model.node(dequantize).input(0).and_then(|codes| model.home(codes)).unwrap_or(graph);
        let stored = self.stored(model, graph, node, dequantize, axis)?;
        model.set_op(node, MICROSOFT, "GatherBlockQuantized");
        model.remove_attr(node, "axis");
        for (input, value) in [Some(stored.codes), Some(indices), Some(stored.scales)].into_iter().enumerate() {
            model.set_input(node, input, value);
        }
        if let Some(zero_points) = stored.zero_points {
            model.set_input(node, 3, Some(zero_points));
        }
        model.set_attr(node, Attr::int("gather_axis", axis as i64));
        for (name, value) in stored.attributes {
            model.set_attr(node, Attr::int(name, value as i64));
        }
        if model.domain_version(MICROSOFT).is_none() {
            model.set_domain_version(MICROSOFT, 1);
        }
        self.outcome.changed(model.node_name(node), Change::WrittenAs { op: "GatherBlockQuantized".to_owned() });
        Ok(())
    }

    fn stored(
        &mut self,
        model: &mut Model,
        graph: GraphId,
        node: NodeId,
        dequantize: NodeId,
        axis: usize,
    ) -> Result<Stored, Reason> {
        let at = model.node(dequantize);
        let inputs = [0, 1, 2].map(|i| at.input(i));
        let key = (graph, inputs, Quantizer::of(at).map(|q| [q.axis, q.block_size]), axis);
        if let Some(found) = self.made.get(&key) {
            return Ok(found.clone());
        }
        let constant = QuantizedTensor::from_qdq(model, dequantize)?;
        let mut packed = constant.to_gather(axis)?;
        let mut twin = tied(model, graph, &packed);
        if twin.is_none()
            && let Some(blocks) = constant.in_groups(block_of(&constant.granularity))
        {
            let blocks = blocks.to_gather(axis)?;
            twin = tied(model, graph, &blocks);
            packed = if twin.is_some() { blocks } else { packed };
        }
        let mut attributes = vec![("quantize_axis", packed.axis), ("block_size", packed.block)];
        attributes.extend(packed.bits.map(|bits| ("bits", bits)));
        let name = base_name(model, inputs[0]);
        let stored = if let Some((product, [codes, scales], zero_points)) = twin {
            let shape: Vec<i64> = packed.codes.dims().iter().map(|&d| d as i64).collect();
            let shape = Tensor::from_i64(&[shape.len()], &shape);
            let shape = model.add_initializer(graph, &format!("{name}_blocks_shape"), shape);
            let reshape =
                NewNode::new("Reshape", format!("{name}_Reshape"), &[codes, shape], &[&format!("{name}_blocks")]);
            let reshape = model.insert(Place::Before(node), reshape);
            let codes = model.node(reshape).output(0).ok_or(Reason::NoOutput)?;
            self.outcome.changed(&name, Change::Tied { node: product });
            Stored { codes, scales, zero_points, attributes }
        } else {
            let mut add =
                |suffix: &str, tensor: Tensor| model.add_initializer(graph, &format!("{name}{suffix}"), tensor);
            Stored {
                codes: add("_blocks", packed.codes),
                scales: add("_blocks_scale", packed.scales),
                zero_points: packed.zero_points.map(|zeros| add("_blocks_zero_point", zeros)),
                attributes,
            }
        };
        // A Reshape stands before one reader; others may come earlier in the graph and make their own.
        if model.constant(stored.codes).is_some() {
            self.made.insert(key, stored.clone());
        }
        Ok(stored)
    }
}

/// A `MatMulNBits` whose weight, in this graph, is this table: its name, codes and scales, and zero points.
fn tied(model: &Model, graph: GraphId, packed: &Packed) -> Option<(String, [ValueId; 2], Option<ValueId>)> {
    let bits = packed.bits?;
    let dims = packed.scales.dims();
    let same = |value: Option<ValueId>, tensor: Option<&Tensor>| {
        let stored = value.and_then(|v| model.constant(v));
        match (stored, tensor) {
            (Some(a), Some(b)) => a.dtype() == b.dtype() && a.len() == b.len() && a.raw() == b.raw(),
            (None, None) => true,
            _ => false,
        }
    };
    model.nodes_outside_functions().into_iter().find_map(|node| {
        let at = model.node(node);
        let fits = MatMulNBits::of(at).is_some_and(|m| m.bits == bits as i64 && m.block_size == Some(packed.block))
            && at.input(2).and_then(|v| model.constant(v)).is_some_and(|scales| scales.dims() == dims)
            && same(at.input(2), Some(&packed.scales))
            && same(at.input(3), packed.zero_points.as_ref())
            && same(at.input(1), Some(&packed.codes));
        let (codes, scales) = (at.input(1)?, at.input(2)?);
        let fits = fits && model.home(codes) == Some(graph);
        fits.then(|| (model.node_name(node).to_owned(), [codes, scales], at.input(3)))
    })
}
