//! `LSTM` with dequantized weights of 8 bits becomes onnxruntime's `DynamicQuantizeLSTM`, codes and scales as they were.
//!
//! It quantizes its input and its hidden state to uint8 at run time. Its weights are the transposes of those of `LSTM`,
//! `[directions, inputs, 4 * hidden]`, with one scale for each direction or for each of its columns. With a plan, the nodes
//! whose weights it gives that form; without one, all that can have it.

use super::forms::{LstmWeight, MICROSOFT, QuantizedTensor, find_dequantized};
use super::lower_matmulnbits::base_name;
use super::support::nodes::carry_out;
use super::{Change, Context, Outcome, Pass};
use crate::config::spec::Form;
use crate::error::Result;
use crate::ir::view::Lstm;
use crate::ir::{Model, NodeId, ValueId};
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct LowerLstm;

impl Pass for LowerLstm {
    fn name(&self) -> &'static str {
        "lower-lstm"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if let Some((plan, _)) = context.quantization {
            carry_out(model, plan, Form::DynamicQuantizeLstm, |model, node, _| {
                // It is planned once for each of its two weights.
                if model.node(node).op_type() == LOWERED { Ok(()) } else { lower(model, node, &mut outcome) }
            })?;
            return Ok(outcome);
        }
        let mut candidates = model.nodes_outside_functions();
        candidates.retain(|&n| {
            let at = model.node(n);
            let constant = |i: usize| at.input(i).and_then(|v| find_dequantized(model, v)).is_some();
            at.is("LSTM") && (constant(1) || constant(2))
        });
        for node in candidates {
            if let Err(why) = lower(model, node, &mut outcome) {
                outcome.skipped(model.node_name(node), why);
            }
        }
        Ok(outcome)
    }
}

/// What an LSTM becomes.
const LOWERED: &str = "DynamicQuantizeLSTM";
/// Inputs of an LSTM; scales and zero points follow them.
const INPUTS: usize = 8;

fn lower(model: &mut Model, node: NodeId, outcome: &mut Outcome) -> Result<(), Reason> {
    let at = model.node(node);
    let graph = at.graph().ok_or(Reason::Missing { what: Operand::Graph })?;
    if !at.is("LSTM") {
        return Err(Reason::NotItsForm { form: Form::DynamicQuantizeLstm, op: at.op_type().into() });
    }
    if Lstm::of(at).is_some_and(|lstm| lstm.batch_first) {
        return Err(Reason::BatchFirst);
    }
    let mut found: Vec<(Option<ValueId>, LstmWeight)> = Vec::new();
    for input in [1, 2] {
        let (dequantize, _) = at
            .input(input)
            .and_then(|v| find_dequantized(model, v))
            .filter(|(_, exchanged)| !exchanged)
            .ok_or(Reason::NotDequantizedConstant { what: Operand::Weight })?;
        let codes = model.node(dequantize).input(0);
        found.push((codes, QuantizedTensor::from_qdq(model, dequantize)?.to_lstm()?));
    }
    if found[0].1.codes.dtype() != found[1].1.codes.dtype() {
        return Err(Reason::Mismatch { what: "first weight type".into(), from: "that of the second".into() });
    }
    let label = model.node_name(node).to_owned();
    model.set_op(node, MICROSOFT, LOWERED);
    for (index, (codes, weight)) in found.into_iter().enumerate() {
        let name = base_name(model, codes);
        let LstmWeight { codes, scales, zero_points } = weight;
        let parts = [("_lstm", codes), ("_lstm_scale", scales), ("_lstm_zero_point", zero_points)];
        let [codes, scales, zero_points] =
            parts.map(|(suffix, tensor)| model.add_initializer(graph, &format!("{name}{suffix}"), tensor));
        model.set_input(node, 1 + index, Some(codes));
        model.set_input(node, INPUTS + 2 * index, Some(scales));
        model.set_input(node, INPUTS + 2 * index + 1, Some(zero_points));
    }
    model.remove_attr(node, "layout");
    if model.domain_version(MICROSOFT).is_none() {
        model.set_domain_version(MICROSOFT, 1);
    }
    outcome.changed(label, Change::WrittenAs { op: LOWERED.to_owned() });
    Ok(())
}
