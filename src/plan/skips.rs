//! What stays float, and why.

use std::collections::BTreeSet;

use super::planner::Planner;
use super::{Bias, Skip, Slot, Weight};
use crate::config::rules::Rule;
use crate::ir::{GraphId, NodeId, ValueId};
use crate::ops::{self, Channel, Form};
use crate::reason::Reason;

/// What a rule that switches something off says of it.
pub(super) fn switched_off(by: Option<&Rule>) -> Reason {
    let rule = by.map_or_else(String::new, |by| by.label.clone());
    if by.is_some_and(Rule::is_named) { Reason::Excluded { rule } } else { Reason::SwitchedOff { rule } }
}

impl Planner<'_> {
    /// Every node and constant that stays as it is.
    pub(super) fn skipped(&self, nodes: &[NodeId], all: &[NodeId], weights: &[Weight], biases: &[Bias]) -> Vec<Skip> {
        let done: BTreeSet<&Slot> =
            weights.iter().map(|w| &w.at).chain(biases.iter().filter(|b| !b.float).map(|b| &b.at)).collect();
        let tensors: BTreeSet<&str> = weights.iter().map(|w| w.tensor.as_str()).collect();
        let mut skips = Vec::new();
        // In bodies, only what might have been quantized has a row of its own.
        let main: BTreeSet<&NodeId> = nodes.iter().collect();
        let inside = all.iter().filter(|node| !main.contains(node) && self.reasons.contains_key(node));
        for &node in nodes.iter().chain(inside) {
            let at = self.model.node(node);
            let mut bytes: u64 = at
                .inputs()
                .iter()
                .enumerate()
                .filter_map(|(i, v)| Some((i, self.model.constant((*v)?)?)))
                .filter(|(i, t)| t.dtype().is_float() && !done.contains(&self.slot(node, *i)))
                .map(|(_, t)| t.byte_len() as u64)
                .sum();
            let mut read = BTreeSet::new();
            let inner: usize = at.bodies().map(|body| self.read_in(body, &mut read)).sum();
            let floats = read.into_iter().filter(|&v| !tensors.contains(self.model.value(v).name()));
            bytes += floats.filter_map(|v| self.model.constant(v)).map(|t| t.byte_len() as u64).sum::<u64>();
            let carried = self.quantized.contains_key(&node) || self.reads_or_makes_codes(node);
            if carried && bytes == 0 {
                continue;
            }
            let why = match self.reasons.get(&node) {
                _ if carried => Reason::BesideKernel,
                Some(why) => why.clone(),
                None => self.left(node, inner),
            };
            skips.push(Skip { node: self.model.node_name(node).to_owned(), op: at.op_type().to_owned(), bytes, why });
        }
        skips
    }

    /// Why a node that nothing was planned for stays as it is; `inner` nodes are in its bodies.
    fn left(&self, node: NodeId, inner: usize) -> Reason {
        let at = self.model.node(node);
        let op = at.op_type();
        match self.untouchable(node) {
            Some(why @ Reason::Excluded { .. }) => why,
            _ if inner > 0 => Reason::Body { nodes: inner },
            _ if ops::is_quantized(op) => Reason::QuantizedAlready,
            _ if !at.domain().is_empty() => Reason::UnknownDomain { domain: at.domain().to_owned() },
            _ if ops::of(self.model, node).is_none() => Reason::UnknownOperator,
            _ if self.stores_weight(node) => {
                let forms = [Form::DynamicQuantizeLstm, Form::GatherBlockQuantized];
                let form = forms.into_iter().find(|form| form.serves(op) && self.target.forms.contains(form));
                Reason::WeightNotAsked { op: op.to_owned(), form }
            }
            _ if !self.knowledge.calibrated => Reason::WithoutSamples,
            _ if self.target.join.has(op) || self.target.carry.has(op) => Reason::NotBetween,
            _ if self.target.absorb.has(op) => Reason::NotFollowed,
            _ => Reason::NoKernel { target: self.target.name.clone() },
        }
    }

    /// Whether a node has a float weight that it could read from few bits, though nothing runs it on integers.
    fn stores_weight(&self, node: NodeId) -> bool {
        let float = |index: usize| self.model.constant_input(node, index).is_some_and(|t| t.dtype().has_quantizers());
        let weighs = |index: usize| {
            matches!(ops::constant_weight(self.model, node, index), Some(Channel::Rows | Channel::Gates))
                && float(index)
        };
        self.target.anchor(self.model.node(node).op_type()).is_none() && (0..2).any(weighs)
    }

    /// How many nodes a body has, and the float constants that they read, wherever those are.
    fn read_in(&self, body: GraphId, read: &mut BTreeSet<ValueId>) -> usize {
        let nodes = self.model.graph(body).nodes();
        let mut count = nodes.len();
        for &node in nodes {
            if self.reasons.contains_key(&node) || self.quantized.contains_key(&node) {
                continue;
            }
            let at = self.model.node(node);
            let float = |v: &ValueId| self.model.constant(*v).is_some_and(|t| t.dtype().is_float());
            read.extend(at.inputs().iter().flatten().copied().filter(float));
            count += at.bodies().map(|inner| self.read_in(inner, read)).sum::<usize>();
        }
        count
    }

    /// Whether a node works on codes: a carrier between quantized values, or a Relu that vanishes.
    fn reads_or_makes_codes(&self, node: NodeId) -> bool {
        let outputs = self.outputs(node);
        outputs.iter().any(|v| self.wants.get(v).is_some_and(|w| w.made.is_some()))
    }
}
