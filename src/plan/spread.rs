//! What runs quantized because its neighbours do: joins and carriers.

use std::collections::BTreeSet;

use super::planner::{Kindness, Made, Planner, Read};
use super::site::Refusal;
use super::{Mode, kernels};
use crate::config::SiteKind;
use crate::config::rules::Resolved;
use crate::ir::{NodeId, ValueId};
use crate::ops::{self, Role};
use crate::reason::{Operand, Reason};

/// The inputs of a join that run in codes, with their index.
struct Joinable {
    data: Vec<(usize, ValueId)>,
    output: (ValueId, Resolved),
}

impl Planner<'_> {
    /// Joins and carriers, until nothing changes.
    pub(super) fn spread(&mut self, nodes: &[NodeId]) {
        loop {
            let before = self.size();
            // A value is wanted in integers if some chain of carriers and joins leads from it to a wanted one.
            let mut ahead: BTreeSet<ValueId> = self.wants.keys().copied().filter(|&v| self.wanted(v)).collect();
            for &node in nodes.iter().rev() {
                if self.carries(node) {
                    if self.outputs(node).iter().any(|v| ahead.contains(v)) {
                        ahead.extend(self.model.node(node).input(0));
                    }
                } else if self.joins(node)
                    && self.output_site(node).is_some_and(|(v, _)| ahead.contains(&v))
                    && let Ok(join) = self.joinable(node)
                {
                    ahead.extend(join.data.iter().map(|&(_, v)| v));
                }
            }
            // A value is at hand in integers if it is wanted, or carried from one that is.
            let mut behind: BTreeSet<ValueId> = self.wants.keys().copied().filter(|&v| self.wanted(v)).collect();
            let everywhere = self.place.everywhere();
            for &node in nodes {
                if self.carries(node) {
                    let Some(input) = self.model.node(node).input(0) else { continue };
                    let outputs = self.outputs(node);
                    let useful = everywhere || outputs.iter().any(|v| ahead.contains(v));
                    if useful && (behind.contains(&input) || everywhere) {
                        self.carry(node, input, &outputs);
                        behind.extend(outputs);
                        behind.insert(input);
                    }
                } else if self.joins(node) {
                    self.join(node, &ahead, &mut behind);
                }
            }
            if before == self.size() {
                return;
            }
        }
    }

    fn size(&self) -> (usize, usize) {
        (self.quantized.len(), self.wants.values().map(|w| w.reads.len() + usize::from(w.made.is_some())).sum())
    }

    /// Whether a node moves codes: one scale on both sides, nothing computed.
    pub(super) fn carries(&self, node: NodeId) -> bool {
        let at = self.model.node(node);
        if !at.domain().is_empty() || !self.target.carry.has(at.op_type()) || self.untouchable(node).is_some() {
            return false;
        }
        let Some(input) = at.input(0) else { return false };
        ops::moves_codes(self.model, node)
            && !self.ask(node, SiteKind::Input).is_off()
            && !self.ask(node, SiteKind::Output).is_off()
            && self.model.constant(input).is_none()
            && self.unquantizable(input).is_none()
            && self.outputs(node).iter().all(|&v| self.unquantizable(v).is_none())
    }

    pub(super) fn carry(&mut self, node: NodeId, input: ValueId, outputs: &BTreeSet<ValueId>) {
        let op = self.model.node(node).op_type().to_owned();
        let name = self.model.node_name(node).to_owned();
        let ask = self.ask(node, SiteKind::Input).clone();
        let why = Reason::InputOf { op: op.clone(), node: name.clone() };
        self.read(input, (node, 0), Read { ask, adopts: true, mode: Mode::Static, why });
        for &output in outputs {
            let ask = self.ask(node, SiteKind::Output).clone();
            let why = Reason::CarriedBy { op: op.clone(), node: name.clone() };
            self.make(output, Made { ask, keeps: Some(input), why });
        }
    }

    /// Whether a node runs in integers between quantized neighbours, and is not planned yet.
    fn joins(&self, node: NodeId) -> bool {
        let at = self.model.node(node);
        // One scale for a tensor is what its division is to do without.
        let divides = || at.output(0).is_some_and(|v| self.knowledge.divided.contains(self.model.value(v).name()));
        at.domain().is_empty()
            && self.target.join.has(at.op_type())
            && !self.quantized.contains_key(&node)
            && !divides()
    }

    /// What a join reads and makes in codes; or why it cannot be one.
    fn joinable(&self, node: NodeId) -> Result<Joinable, Reason> {
        if let Some(why) = self.untouchable(node) {
            return Err(why);
        }
        let (Some(output), Some(row)) = (self.output_site(node), ops::of(self.model, node)) else {
            return Err(Reason::NoOutput);
        };
        kernels::attributes(self.model, node)?;
        let ask = self.ask(node, SiteKind::Input);
        if ask.is_off() {
            return Err(self.off_by(ask, SiteKind::Input));
        }
        if output.1.is_off() {
            return Err(self.off_by(&output.1, SiteKind::Output));
        }
        match self.activation(node, SiteKind::Input, ask) {
            Ok((_, true)) => return Err(Reason::ProductsAtRunTime),
            Err(Refusal::Unfit(why)) => return Err(why),
            // Refused before, or fine.
            Ok(_) | Err(Refusal::Wrong(_)) => {}
        }
        let inputs = self.model.node(node).inputs().iter().enumerate();
        let (constants, data): (Vec<_>, Vec<_>) = inputs
            .filter(|(i, _)| row.role(*i) == Role::Data)
            .filter_map(|(i, v)| v.map(|v| (i, v)))
            .partition(|&(_, v)| self.model.constant(v).is_some());
        for value in data.iter().map(|&(_, v)| v).chain([output.0]) {
            if let Some(why) = self.unquantizable(value) {
                return Err(why);
            }
        }
        for tensor in constants.iter().filter_map(|&(_, v)| self.model.constant(v)) {
            kernels::float(tensor, Operand::ConstantOperand)?;
        }
        match self.knowledge.vetoes.get(&self.site(node, SiteKind::Input)) {
            Some(veto) => Err(veto.why.clone()),
            None => Ok(Joinable { data, output }),
        }
    }

    fn join(&mut self, node: NodeId, ahead: &BTreeSet<ValueId>, behind: &mut BTreeSet<ValueId>) {
        let Joinable { data, output: (output, output_ask) } = match self.joinable(node) {
            Ok(join) => join,
            Err(why) => return self.refuse(node, why),
        };
        if data.is_empty() {
            return;
        }
        let everywhere = self.place.everywhere();
        if !(everywhere || ahead.contains(&output) && data.iter().any(|(_, v)| behind.contains(v))) {
            return;
        }
        for value in data.iter().map(|&(_, v)| v).chain([output]) {
            if everywhere && self.dtype(value).is_none() && !behind.contains(&value) {
                return self.refuse(node, Reason::UnknownType { tensor: self.name(value) });
            }
        }
        let op = self.model.node(node).op_type().to_owned();
        let name = self.model.node_name(node).to_owned();
        self.quantized.insert(node, Kindness::Integer);
        for (index, value) in data {
            let ask = self.ask(node, SiteKind::Input).clone();
            let why = Reason::InputOf { op: op.clone(), node: name.clone() };
            self.read(value, (node, index), Read { ask, adopts: false, mode: Mode::Static, why });
            behind.insert(value);
        }
        self.make(output, Made { ask: output_ask, keeps: None, why: Reason::OutputOf { op, node: name } });
        behind.insert(output);
    }
}
