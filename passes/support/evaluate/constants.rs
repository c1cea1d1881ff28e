//! The values of a graph that depend on constants alone.

use std::collections::{HashMap, HashSet};

use super::{evaluate, is_known};
use crate::ir::{GraphId, Model, NodeId, Tensor, ValueId};

/// Nodes that one constant may be computed by.
const MAX_NODES: usize = 4096;

/// The values of a graph that depend on constants alone, computed when asked for.
pub(crate) struct Constants {
    /// Values that are computed from constants by operators that are known.
    derived: HashSet<ValueId>,
    memo: HashMap<ValueId, Option<Tensor>>,
}

impl Constants {
    /// Finds what depends on constants alone in `graph`.
    pub fn new(model: &Model, graph: GraphId) -> Self {
        let mut derived = HashSet::new();
        let known = |derived: &HashSet<ValueId>, v: ValueId| derived.contains(&v) || model.constant(v).is_some();
        for node in model.topological_order(graph).unwrap_or_default() {
            let slot = model.node(node);
            // Of the second input of CastLike only the type matters.
            let read = slot.inputs().iter().flatten().take(if slot.is("CastLike") { 1 } else { usize::MAX });
            let mut read = read.peekable();
            if is_known(slot) && read.peek().is_some() && read.all(|&v| known(&derived, v)) {
                derived.extend(slot.outputs().iter().flatten());
            }
        }
        Self { derived, memo: HashMap::new() }
    }

    /// Whether `value` is constant, or computed from constants.
    pub fn holds(&self, model: &Model, value: ValueId) -> bool {
        model.constant(value).is_some() || self.derived.contains(&value)
    }

    /// Whether `value` is computed from constants, by some node.
    pub fn derives(&self, value: ValueId) -> bool {
        self.derived.contains(&value)
    }

    /// Forgets the tensors that were computed.
    pub fn forget(&mut self) {
        self.memo.clear();
    }

    /// The nodes that compute `value` from constants, those that come first last; `None` if they are too many.
    pub fn slice(&self, model: &Model, value: ValueId) -> Option<Vec<NodeId>> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        let mut stack = vec![value];
        while let Some(value) = stack.pop() {
            if !self.derived.contains(&value) {
                continue;
            }
            let Some(node) = model.producer(value) else { continue };
            if seen.insert(node) {
                found.push(node);
                stack.extend(model.node(node).inputs().iter().flatten());
            }
        }
        (found.len() <= MAX_NODES).then_some(found)
    }

    /// The tensor of `value`, or `None` where it depends on more than constants or cannot be computed exactly.
    pub fn value(&mut self, model: &Model, value: ValueId) -> Option<Tensor> {
        if let Some(tensor) = model.constant(value) {
            return Some(tensor.clone());
        }
        if let Some(found) = self.memo.get(&value) {
            return found.clone();
        }
        if !self.derived.contains(&value) {
            return None;
        }
        // Producers before consumers: nothing recurses, however long the chain is.
        let mut stack = vec![value];
        let mut steps = 0;
        while let Some(&top) = stack.last() {
            steps += 1;
            let node = model.producer(top).filter(|_| steps < 4 * MAX_NODES);
            let Some(node) = node else {
                self.memo.insert(top, None);
                stack.pop();
                continue;
            };
            let slot = model.node(node);
            let read = slot.inputs().iter().take(if slot.is("CastLike") { 1 } else { usize::MAX });
            let missing: Vec<ValueId> = read
                .flatten()
                .copied()
                .filter(|v| model.constant(*v).is_none() && !self.memo.contains_key(v))
                .collect();
            if !missing.is_empty() {
                stack.extend(missing);
                continue;
            }
            stack.pop();
            let read = slot.inputs().iter().take(if slot.is("CastLike") { 1 } else { usize::MAX });
            let inputs: Option<Vec<Option<Tensor>>> = read
                .map(|input| match input {
                    None => Some(None),
                    Some(v) => model.constant(*v).cloned().or_else(|| self.memo.get(v).cloned().flatten()).map(Some),
                })
                .collect();
            let result = inputs.and_then(|inputs| evaluate(model, node, &inputs));
            self.memo.insert(top, result);
        }
        self.memo.get(&value).cloned().flatten()
    }
}
