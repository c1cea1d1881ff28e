//! What stays float, and why.

use std::collections::BTreeSet;

use super::planner::Planner;
use super::{Bias, Skip, Slot, Weight};
use crate::config::rules::Rule;
use crate::ir::{Def, GraphId, NodeId};
use crate::ops;
use crate::reason::Reason;

/// What a rule that switches something off says of it.
pub(super) fn switched_off(by: Option<&Rule>) -> Reason {
    let rule = by.map_or_else(String::new, |by| by.label.clone());
    if by.is_some_and(Rule::is_named) { Reason::Excluded { rule } } else { Reason::SwitchedOff { rule } }
}

impl Planner<'_> {
    /// Every node and constant that stays as it is.
    pub(super) fn skipped(&self, nodes: &[NodeId], weights: &[Weight], biases: &[Bias]) -> Vec<Skip> {
        let done: BTreeSet<&Slot> =
            weights.iter().map(|w| &w.at).chain(biases.iter().filter(|b| !b.float).map(|b| &b.at)).collect();
        let mut skips = Vec::new();
        for &node in nodes {
            let at = self.model.node(node);
            let bytes: u64 = at
                .inputs()
                .iter()
                .enumerate()
                .filter_map(|(i, v)| Some((i, self.model.constant((*v)?)?)))
                .filter(|(i, t)| t.dtype().is_float() && !done.contains(&self.slot(node, *i)))
                .map(|(_, t)| t.byte_len() as u64)
                .sum();
            let carried = self.quantized.contains_key(&node) || self.reads_or_makes_codes(node);
            if carried && bytes == 0 {
                continue;
            }
            let why = match self.reasons.get(&node) {
                _ if carried => Reason::BesideKernel,
                Some(why) => why.clone(),
                None if ops::is_quantized(at.op_type()) => Reason::QuantizedAlready,
                None if !at.domain().is_empty() => Reason::UnknownDomain { domain: at.domain().to_owned() },
                None if ops::of(self.model, node).is_none() => Reason::UnknownOperator,
                None if !self.knowledge.calibrated => Reason::WithoutSamples,
                None if self.target.join.has(at.op_type()) || self.target.carry.has(at.op_type()) => Reason::NotBetween,
                None if self.target.absorb.has(at.op_type()) => Reason::NotFollowed,
                None => Reason::NoKernel { target: self.target.name.clone() },
            };
            skips.push(Skip { node: self.model.node_name(node).to_owned(), op: at.op_type().to_owned(), bytes, why });
            for body in at.bodies() {
                let inner = self.model.graph(body).nodes().len();
                if inner > 0 {
                    skips.push(Skip {
                        node: self.model.node_name(node).to_owned(),
                        op: format!("{} body", at.op_type()),
                        bytes: self.body_bytes(body),
                        why: Reason::Body { nodes: inner },
                    });
                }
            }
        }
        skips
    }

    fn body_bytes(&self, body: GraphId) -> u64 {
        let graph = self.model.graph(body);
        let own: usize = graph
            .initializers()
            .iter()
            .filter_map(|&v| match self.model.value(v).def() {
                Def::Constant(t) if t.dtype().is_float() => Some(t.byte_len()),
                _ => None,
            })
            .sum();
        let inner: u64 =
            graph.nodes().iter().flat_map(|&n| self.model.node(n).bodies()).map(|b| self.body_bytes(b)).sum();
        own as u64 + inner
    }

    /// Whether a node works on codes: a carrier between quantized values, or a Relu that vanishes.
    fn reads_or_makes_codes(&self, node: NodeId) -> bool {
        let outputs = self.outputs(node);
        outputs.iter().any(|v| self.wants.get(v).is_some_and(|w| w.made.is_some()))
    }
}
