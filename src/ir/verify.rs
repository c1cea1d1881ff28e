//! The verifier. It lists every violation of:
//!
//! 1. Each node lists as its graph the graph that lists it, once.
//! 2. Each output of a node is defined by that node at that index.
//! 3. Each use is recorded at its value exactly once, and each recorded use exists.
//! 4. No node or graph output uses a removed value.
//! 5. A value is used only where it is visible: in its own graph or in a body below it.
//! 6. Producers come before consumers; a cycle is named.
//! 7. Tensor names are unique within a graph and its enclosing graphs.
//! 8. Every node has an operator; every domain used is imported.
//!
//! It costs time linear in the size of the structure and never reads tensor data.

use std::collections::{HashMap, HashSet};

use super::{Def, GraphId, Model, NodeId, Owner, User, ValueId};
use crate::error::{Error, Result};

/// Checks the model.
///
/// # Errors
/// All violations, one a line.
pub fn verify(model: &Model) -> Result<()> {
    let found = violations(model);
    let Some(first) = found.first() else { return Ok(()) };
    if found.len() == 1 {
        return Err(Error::model(first.clone()));
    }
    let shown = found.iter().take(20).map(|v| format!("  - {v}")).collect::<Vec<_>>().join("\n");
    let more = if found.len() > 20 { format!("\n  … and {} more", found.len() - 20) } else { String::new() };
    Err(Error::model(format!("the model is not valid, {} problems:\n{shown}{more}", found.len())))
}

/// Every violation, as a sentence that names node and tensor.
#[must_use]
pub fn violations(model: &Model) -> Vec<String> {
    let mut check = Check { model, found: Vec::new() };
    let graphs = model.all_graphs();
    let mut uses: HashMap<ValueId, Vec<User>> = HashMap::new();
    for &graph in &graphs {
        check.structure(graph, &mut uses);
    }
    for &graph in &graphs {
        check.recorded(graph, &mut uses);
        check.order(graph);
        check.names(graph);
    }
    check.domains(&graphs);
    check.found
}

struct Check<'a> {
    model: &'a Model,
    found: Vec<String>,
}

impl Check<'_> {
    fn node(&self, id: NodeId) -> String {
        format!("node \"{}\" ({})", self.model.node_name(id), self.model.node(id).op_type())
    }

    fn structure(&mut self, graph: GraphId, uses: &mut HashMap<ValueId, Vec<User>>) {
        let mut seen = HashSet::new();
        for &id in self.model.graph(graph).nodes() {
            let node = self.model.node(id);
            if !seen.insert(id) || node.graph != Some(graph) {
                self.found.push(format!("{} is not in exactly one graph", self.node(id)));
            }
            if node.op_type().is_empty() {
                self.found.push(format!("{} has no operator", self.node(id)));
            }
            for (index, &value) in node.outputs.iter().enumerate() {
                let Some(value) = value else { continue };
                if !matches!(self.model.value(value).def, Def::Output { node, index: at } if node == id && at == index)
                {
                    self.found.push(format!(
                        "output {index} of {} is not defined by it: \"{}\"",
                        self.node(id),
                        self.model.value(value).name
                    ));
                }
            }
            for (input, &value) in node.inputs.iter().enumerate() {
                let Some(value) = value else { continue };
                uses.entry(value).or_default().push(User::Node { node: id, input });
                if let Some(why) = self.invisible(graph, value) {
                    self.found.push(format!("input {input} of {} {why}", self.node(id)));
                }
            }
        }
        for (index, port) in self.model.graph(graph).outputs.iter().enumerate() {
            let Some(value) = port.value else {
                self.found.push(format!("output {index} of graph \"{}\" has no value", self.model.graph(graph).name()));
                continue;
            };
            uses.entry(value).or_default().push(User::Output { graph, index });
            if let Some(why) = self.invisible(graph, value) {
                self.found.push(format!("output {index} of graph \"{}\" {why}", self.model.graph(graph).name()));
            }
        }
    }

    fn home(&self, value: ValueId) -> Option<GraphId> {
        match self.model.value(value).def {
            Def::Output { node, .. } => self.model.node(node).graph,
            _ => None,
        }
    }

    /// What is wrong with using `value` in `graph`, if anything.
    fn invisible(&self, graph: GraphId, value: ValueId) -> Option<String> {
        let name = &self.model.value(value).name;
        if matches!(self.model.value(value).def, Def::Removed) {
            return Some(format!("uses the removed tensor \"{name}\""));
        }
        let home = self.home(value)?;
        let mut at = graph;
        while at != home {
            match self.model.graph(at).owner {
                Owner::Node(node) if self.model.node(node).graph.is_some() => {
                    at = self.model.node(node).graph.expect("just checked");
                }
                _ => return Some(format!("uses \"{name}\", which is not visible there")),
            }
        }
        None
    }

    fn recorded(&mut self, graph: GraphId, uses: &mut HashMap<ValueId, Vec<User>>) {
        let graph = self.model.graph(graph);
        let outputs = graph.nodes().iter().flat_map(|&n| self.model.node(n).outputs.iter().flatten().copied());
        let defaults = graph.initializers().iter().copied();
        let mut values: Vec<ValueId> = graph.inputs().chain(defaults).chain(outputs).collect();
        values.sort_unstable();
        values.dedup();
        for value in values {
            let slot = self.model.value(value);
            let mut actual = uses.remove(&value).unwrap_or_default();
            let mut recorded = slot.users.clone();
            let key = |u: &User| match *u {
                User::Node { node, input } => (0, node.0, input),
                User::Output { graph, index } => (1, graph.0, index),
            };
            actual.sort_by_key(key);
            recorded.sort_by_key(key);
            if actual != recorded {
                self.found.push(format!("the uses recorded for \"{}\" are not those that exist", slot.name));
            }
        }
    }

    fn order(&mut self, graph: GraphId) {
        match self.model.topological_order(graph) {
            Err(cycle) => {
                let nodes: Vec<String> = cycle.iter().take(8).map(|&n| self.node(n)).collect();
                self.found.push(format!("a cycle runs through {}", nodes.join(", ")));
            }
            Ok(order) if order != self.model.graph(graph).nodes() => {
                let first = order.iter().zip(self.model.graph(graph).nodes()).find(|(a, b)| a != b);
                if let Some((_, &late)) = first {
                    self.found.push(format!("{} comes before a producer of its inputs", self.node(late)));
                }
            }
            Ok(_) => {}
        }
    }

    fn names(&mut self, graph: GraphId) {
        let slot = self.model.graph(graph);
        let outputs = slot.nodes().iter().flat_map(|&n| self.model.node(n).outputs.iter().flatten().copied());
        let mut values: Vec<ValueId> =
            slot.inputs().chain(slot.initializers().iter().copied()).chain(outputs).collect();
        values.sort_unstable();
        values.dedup();
        let mut seen = HashSet::new();
        for value in values {
            let name = &self.model.value(value).name;
            if !seen.insert(name) {
                self.found.push(format!("two tensors are named \"{name}\""));
            }
        }
    }

    fn domains(&mut self, graphs: &[GraphId]) {
        let mut missing = HashSet::new();
        for &graph in graphs {
            if self.model.opset_in(graph).is_none() && !self.model.graph(graph).nodes().is_empty() {
                let used = self.model.graph(graph).nodes().iter().any(|&n| self.model.node(n).domain().is_empty());
                if used && missing.insert(String::new()) {
                    self.found.push("the default operator set is used but not imported".to_owned());
                }
            }
            let in_function = matches!(self.model.graph(graph).owner, Owner::Function(_));
            for &id in self.model.graph(graph).nodes() {
                let domain = self.model.node(id).domain();
                if !domain.is_empty()
                    && !in_function
                    && self.model.domain_version(domain).is_none()
                    && missing.insert(domain.to_owned())
                {
                    self.found.push(format!("{} is of domain \"{domain}\", which is not imported", self.node(id)));
                }
            }
        }
    }
}
