//! What is asked of values while a plan is made.

use std::collections::BTreeSet;

use super::Mode;
use super::planner::{Made, Planner, Read};
use crate::ir::{NodeId, ValueId};

impl Planner<'_> {
    pub(super) fn read(&mut self, value: ValueId, slot: (NodeId, usize), mut read: Read) {
        read.ask = self.ask_of(value, &read.ask);
        let reads = &mut self.wants.entry(value).or_default().reads;
        if reads.iter().all(|(s, _)| *s != slot) {
            reads.push((slot, read));
        }
    }

    pub(super) fn make(&mut self, value: ValueId, mut made: Made) {
        made.ask = self.ask_of(value, &made.ask);
        self.wants.entry(value).or_default().made.get_or_insert(made);
    }

    /// Whether a value has a pair with a fixed scale.
    pub(super) fn wanted(&self, value: ValueId) -> bool {
        self.wants.get(&value).is_some_and(|w| w.made.is_some() || w.reads.iter().any(|(_, r)| r.mode == Mode::Static))
    }

    pub(super) fn outputs(&self, node: NodeId) -> BTreeSet<ValueId> {
        self.model.node(node).outputs().iter().flatten().copied().collect()
    }
}
