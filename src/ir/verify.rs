//! The verifier. It lists every violation of:
//!
//! 1. Each node lists as its graph the graph that lists it, once; each body is owned by the node whose attribute holds it.
//! 2. Each value is defined at one place, and its definition says so: an output of a node at its index, an input of a
//!    graph, an initializer.
//! 3. Each use is recorded at its value exactly once, and each recorded use exists. Names of the main graph find its values.
//! 4. No node or graph output uses a removed value, or one that no graph defines.
//! 5. A value is used only where it is visible: in its own graph or in a body below it.
//! 6. Producers come before consumers; a cycle is named.
//! 7. Names say what is meant: those that a graph defines are unique in it, what is used has a name, and what a body
//!    captures is not hidden by a tensor of the same name in between. (A body may reuse outer names that it does not use:
//!    runtimes accept it, and exporters do it.)
//! 8. Every node has an operator; every domain used is imported, by the model or by the function it is used in.
//! 9. Nodes of known operators have the inputs, outputs and types that their schemas demand, and quantizers the scales.
//!
//! Files whose nodes are not sorted pass rule 6 because loading sorts them. What tensors hold is checked when they are
//! made ([`Tensor::from_proto`](super::Tensor::from_proto)).
//!
//! It costs time linear in the size of the structure and never reads tensor data.

mod operators;

use std::collections::{HashMap, HashSet};

use super::{Def, GraphId, Model, NodeId, Owner, User, ValueId, canonical_domain};
use crate::error::{Error, Kind, Result};

/// Checks the model.
///
/// # Errors
/// All violations, one per line.
pub fn verify(model: &Model) -> Result<()> {
    listed(&violations(model))
}

/// An error that lists what is wrong, if anything is.
fn listed(found: &[String]) -> Result<()> {
    let Some(first) = found.first() else { return Ok(()) };
    if found.len() == 1 {
        return Err(Error::model(first.clone()));
    }
    let shown = found.iter().take(20).map(|v| format!("  - {v}")).collect::<Vec<_>>().join("\n");
    let more = if found.len() > 20 { format!("\n  … and {} more", found.len() - 20) } else { String::new() };
    Err(Error::model(format!("the model is not valid, {} problems:\n{shown}{more}", found.len())))
}

/// Nodes with an input whose type or shape the model does not tell: what they violate may show only once it is known.
#[must_use]
pub(crate) fn undeclared(model: &Model) -> HashSet<NodeId> {
    let graphs = model.all_graphs();
    let nodes = graphs.iter().flat_map(|&graph| model.graph(graph).nodes()).copied();
    nodes.filter(|&id| model.node(id).inputs().iter().flatten().any(|&v| !model.is_declared(v))).collect()
}

/// As [`verify`], after a change to a model in which these nodes were [`undeclared`].
///
/// # Errors
/// [`Kind::Internal`] where the change is to blame, [`Kind::Model`] where it only showed what was wrong with the model.
pub(crate) fn verify_change(model: &Model, undeclared: &HashSet<NodeId>) -> Result<()> {
    let mut found = structure(model);
    let schema = schema_violations(model);
    let of_the_model = found.is_empty() && schema.iter().all(|(id, _)| undeclared.contains(id));
    found.extend(schema.into_iter().map(|(_, violation)| violation));
    listed(&found).map_err(|e| {
        if of_the_model {
            e.with_hint("the model does not declare the types of these tensors: run onnx.shape_inference on it")
        } else {
            Error::new(Kind::Internal, format!("the pass left an invalid model: {}", e.message()))
        }
    })
}

/// Every violation, as a sentence that names node and tensor.
#[must_use]
pub fn violations(model: &Model) -> Vec<String> {
    let mut found = structure(model);
    found.extend(schema_violations(model).into_iter().map(|(_, violation)| violation));
    found
}

/// The violations of the last rule, each with its node.
#[must_use]
pub fn schema_violations(model: &Model) -> Vec<(NodeId, String)> {
    let mut found = Vec::new();
    for graph in model.all_graphs() {
        for &id in model.graph(graph).nodes() {
            let node = model.node(id);
            // A function of the model may have the name of an operator.
            let own = || model.functions.iter().any(|f| f.key() == (node.domain(), node.op_type(), node.overload()));
            let clauses = operators::violations(model, id);
            if !clauses.is_empty() && !own() {
                found.extend(clauses.into_iter().map(|clause| (id, format!("{} {clause}", label(model, id)))));
            }
        }
    }
    found
}

/// The violations of all rules but the last.
#[must_use]
pub fn structure(model: &Model) -> Vec<String> {
    let graphs = model.all_graphs();
    let mut check = Check {
        model,
        found: Vec::new(),
        homes: vec![None; model.values.len()],
        scopes: vec![HashMap::new(); model.graphs.len()],
        uses: vec![Vec::new(); model.values.len()],
        passed: vec![false; model.nodes.len()],
    };
    for &graph in &graphs {
        check.definitions(graph);
    }
    for &graph in &graphs {
        check.uses(graph);
        check.order(graph);
        check.domains(graph);
    }
    check.recorded();
    if check.found.is_empty() {
        check.named();
    }
    check.found
}

fn label(model: &Model, id: NodeId) -> String {
    format!("node \"{}\" ({})", model.node_name(id), model.node(id).op_type())
}

struct Check<'a> {
    model: &'a Model,
    found: Vec<String>,
    /// The graph that defines each value.
    homes: Vec<Option<GraphId>>,
    /// What each graph defines, by name.
    scopes: Vec<HashMap<&'a str, ValueId>>,
    /// The uses that exist.
    uses: Vec<Vec<User>>,
    /// The nodes whose outputs are there for those behind them.
    passed: Vec<bool>,
}

impl Check<'_> {
    fn node(&self, id: NodeId) -> String {
        label(self.model, id)
    }

    fn graph(&self, id: GraphId) -> String {
        format!("graph \"{}\"", self.model.graph(id).name())
    }

    fn definitions(&mut self, id: GraphId) {
        let model = self.model;
        let graph = model.graph(id);
        for port in &graph.inputs {
            match port.value {
                Some(value) if matches!(model.value(value).def, Def::Input { .. }) => self.define(id, value),
                Some(value) => {
                    let name = &model.value(value).name;
                    self.found.push(format!("\"{name}\" is listed as an input of {} but is none", self.graph(id)));
                }
                None => self.found.push(format!("an input of {} has no value", self.graph(id))),
            }
        }
        for &value in &graph.initializers {
            match model.value(value).def {
                Def::Constant(_) => self.define(id, value),
                // Listed a second time: its home is the graph it is an input of.
                Def::Input { default: Some(_) } if self.homes[value.0 as usize] == Some(id) => {}
                _ => {
                    let name = &model.value(value).name;
                    self.found.push(format!("\"{name}\" is listed as an initializer but is none"));
                }
            }
        }
        let mut seen = HashSet::new();
        for &node_id in &graph.nodes {
            let node = model.node(node_id);
            if !seen.insert(node_id) || node.graph != Some(id) {
                self.found.push(format!("{} is not in exactly one graph", self.node(node_id)));
            }
            if node.op_type().is_empty() {
                self.found.push(format!("{} has no operator", self.node(node_id)));
            }
            for body in node.bodies() {
                if model.graph(body).owner != Owner::Node(node_id) {
                    self.found.push(format!("{} is not owned by {}", self.graph(body), self.node(node_id)));
                }
            }
            for (index, &value) in node.outputs.iter().enumerate() {
                let Some(value) = value else { continue };
                let def = &model.value(value).def;
                if matches!(*def, Def::Output { node, index: at } if node == node_id && at == index) {
                    self.define(id, value);
                } else {
                    self.found.push(format!(
                        "output {index} of {} is not defined by it: \"{}\"",
                        self.node(node_id),
                        model.value(value).name
                    ));
                }
            }
        }
    }

    fn define(&mut self, graph: GraphId, value: ValueId) {
        let name = &*self.model.value(value).name;
        if self.homes[value.0 as usize].replace(graph).is_some() {
            self.found.push(format!("\"{name}\" is defined at two places"));
        } else if self.scopes[graph.0 as usize].insert(name, value).is_some() {
            self.found.push(format!("two tensors are named \"{name}\""));
        }
    }

    fn uses(&mut self, id: GraphId) {
        let model = self.model;
        let graph = model.graph(id);
        for &node in &graph.nodes {
            for (input, &value) in model.node(node).inputs.iter().enumerate() {
                let Some(value) = value else { continue };
                self.uses[value.0 as usize].push(User::Node { node, input });
                if let Some(why) = self.unusable(id, value) {
                    self.found.push(format!("input {input} of {} uses {why}", self.node(node)));
                }
            }
        }
        for (index, port) in graph.outputs.iter().enumerate() {
            let Some(value) = port.value else {
                self.found.push(format!("output {index} of {} has no value", self.graph(id)));
                continue;
            };
            self.uses[value.0 as usize].push(User::Output { graph: id, index });
            if let Some(why) = self.unusable(id, value) {
                self.found.push(format!("output {index} of {} uses {why}", self.graph(id)));
            }
        }
    }

    /// What is wrong with using `value` in `graph`, if anything.
    fn unusable(&self, graph: GraphId, value: ValueId) -> Option<String> {
        let slot = self.model.value(value);
        let name = &*slot.name;
        match slot.def {
            Def::Removed => return Some(format!("the removed tensor \"{name}\"")),
            // Its definition stays in the message that is carried, under the name it has there.
            Def::Sparse => return None,
            _ if name.is_empty() => return Some("a tensor without a name".to_owned()),
            _ => {}
        }
        let Some(home) = self.homes[value.0 as usize] else {
            return Some(format!("\"{name}\", which no graph defines"));
        };
        let mut at = graph;
        while at != home {
            if self.scopes[at.0 as usize].contains_key(name) {
                return Some(format!("\"{name}\" of an outer graph, which is hidden by a tensor of the same name"));
            }
            match self.model.graph(at).owner {
                Owner::Node(node) if self.model.node(node).graph.is_some() => {
                    at = self.model.node(node).graph.expect("just checked");
                }
                _ => return Some(format!("\"{name}\", which is not visible there")),
            }
        }
        None
    }

    fn recorded(&mut self) {
        let key = |u: &User| match *u {
            User::Node { node, input } => (0, node.0, input),
            User::Output { graph, index } => (1, graph.0, index),
        };
        for (slot, actual) in self.model.values.iter().zip(&mut self.uses) {
            let mut recorded = slot.users.clone();
            actual.sort_by_key(key);
            recorded.sort_by_key(key);
            if *actual != recorded {
                self.found.push(format!("the uses recorded for \"{}\" are not those that exist", slot.name));
            }
        }
    }

    /// Whether the names that are kept are those of a scan.
    fn named(&mut self) {
        let main = self.model.main;
        let values = self.model.values.iter().enumerate().filter(|&(at, _)| self.homes[at] == Some(main));
        let mut count = 0;
        for (at, value) in values {
            count += 1;
            if self.model.value_named(&value.name) != Some(ValueId(at as u32)) {
                self.found.push(format!("\"{}\" is not found by its name", value.name));
            }
        }
        if count != self.model.names.count_in_main() {
            self.found.push("names are kept of tensors that the main graph does not define".to_owned());
        }
    }

    fn order(&mut self, graph: GraphId) {
        let Some(late) = self.late(graph) else { return };
        match self.model.topological_order(graph) {
            Err(cycle) => {
                let named: Vec<String> = cycle.iter().take(8).map(|&n| self.node(n)).collect();
                let more = if cycle.len() > 8 { format!(" and {} more", cycle.len() - 8) } else { String::new() };
                self.found.push(format!("a cycle runs through {}{more}", named.join(", ")));
            }
            Ok(_) => self.found.push(format!("{} comes before a producer of its inputs", self.node(late))),
        }
    }

    /// The first node of a graph that comes before a producer of what it, or a body in it, reads.
    fn late(&mut self, graph: GraphId) -> Option<NodeId> {
        let model = self.model;
        for &id in model.graph(graph).nodes() {
            let unmade = |&value: &ValueId| {
                let producer = model.producer(value).filter(|&p| model.node(p).graph == Some(graph));
                producer.is_some_and(|p| !self.passed[p.0 as usize])
            };
            let node = model.node(id);
            let is_late = if node.bodies().next().is_some() {
                model.reads(id).iter().any(unmade)
            } else {
                node.inputs.iter().flatten().any(unmade)
            };
            if is_late {
                return Some(id);
            }
            self.passed[id.0 as usize] = true;
        }
        None
    }

    fn domains(&mut self, graph: GraphId) {
        let model = self.model;
        let mut function = graph;
        while let Owner::Node(node) = model.graph(function).owner {
            match model.node(node).graph {
                Some(outer) => function = outer,
                None => return,
            }
        }
        let own = match model.graph(function).owner {
            Owner::Function(index) => &*model.functions[index].rest.opset_import,
            _ => &[],
        };
        let imported: HashSet<&str> = own
            .iter()
            .chain(&model.rest.opset_import)
            .filter(|o| o.version.is_some())
            .map(|o| canonical_domain(o.domain.as_deref().unwrap_or("")))
            .collect();
        let mut missing = HashSet::new();
        for &id in model.graph(graph).nodes() {
            let domain = model.node(id).domain();
            if !imported.contains(domain) && missing.insert(domain) {
                let domain =
                    if domain.is_empty() { "the default domain".into() } else { format!("domain \"{domain}\"") };
                self.found.push(format!("{} is of {domain}, which is not imported", self.node(id)));
            }
        }
    }
}
