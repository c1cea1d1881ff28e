//! Drops what no output depends on: nodes, initializers, functions, declarations and imports; bypasses `Identity` and
//! the `Dropout` of inference.
//!
//! Names and order of graph outputs stay. An `Identity` that gives a graph output its name stays where the value behind
//! it cannot take that name: a graph input, an initializer, a value of another graph, or another output.

use std::collections::{HashMap, HashSet};

use super::support::graphs::is_graph_output;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Def, GraphId, Model, NodeId, Tensor, User, ValueId};
use crate::reason::{Operand, Reason};

/// See the [module](self).
pub struct DropDead;

impl Pass for DropDead {
    fn name(&self) -> &'static str {
        "drop-dead"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for graph in model.all_graphs() {
            bypass_copies(model, graph, &mut outcome);
        }
        drop_functions(model, &mut outcome);
        // A node that a body keeps alive may be dead only once the body's own dead nodes are gone: bodies come first.
        for graph in model.all_graphs().into_iter().rev() {
            drop_nodes(model, graph, &mut outcome);
            drop_nameless(model, graph);
        }
        for graph in model.all_graphs() {
            drop_annotations(model, graph, &mut outcome);
            drop_initializers(model, graph, &mut outcome);
            drop_infos(model, graph, &mut outcome);
        }
        drop_imports(model, &mut outcome);
        Ok(outcome)
    }
}

/// Bypasses nodes that return their first input as it is.
fn bypass_copies(model: &mut Model, graph: GraphId, outcome: &mut Outcome) {
    let mut bypassed = Vec::new();
    for node in model.graph(graph).nodes().to_vec() {
        let copies = match copies(model, node) {
            Ok(copies) => copies,
            Err(why) => {
                outcome.skipped(model.node_name(node), why);
                continue;
            }
        };
        let (Some(from), Some(to)) = (model.node(node).input(0), model.node(node).output(0)) else { continue };
        if !copies || model.value(to).users().is_empty() {
            continue;
        }
        let name = model.node_name(node).to_owned();
        if is_graph_output(model, to) {
            let local = model.producer(from).is_some_and(|p| model.node(p).graph() == Some(graph));
            if !local || is_graph_output(model, from) {
                continue;
            }
            let fresh = model.value(from).name().to_owned();
            model.take_name(to, from, &fresh);
        }
        if let (None, Some(ty)) = (model.value(from).ty(), model.value(to).ty()) {
            let ty = ty.clone();
            model.set_type(from, ty);
        }
        model.replace_uses(to, from, |_| true);
        outcome.changed(name, Change::Bypassed { op: model.node(node).op_type().to_owned() });
        bypassed.push(node);
    }
    model.remove(&bypassed);
}

/// Whether a node returns its first input as it is, and nothing else that is used.
fn copies(model: &Model, id: NodeId) -> Result<bool, Reason> {
    let node = model.node(id);
    if node.is("Identity") {
        return Ok(true);
    }
    if !node.is("Dropout") {
        return Ok(false);
    }
    if node.output(1).is_some_and(|mask| !model.value(mask).users().is_empty()) {
        return Err(Reason::UsedElsewhere { what: Operand::Mask });
    }
    let opset = node.graph().and_then(|graph| model.opset_in(graph)).unwrap_or(1);
    if opset < 7 && node.int("is_test").unwrap_or(0) == 0 {
        return Err(Reason::Training);
    }
    match node.input(2) {
        None => Ok(true),
        Some(training) => match model.constant(training).and_then(Tensor::to_i64).as_deref() {
            Some([0]) => Ok(true),
            Some(_) => Err(Reason::Training),
            None => Err(Reason::NotConstant { what: Operand::TrainingMode }),
        },
    }
}

/// Drops outputs without a name from the end of lists: onnxruntime takes them for tensors once it has fused the node.
fn drop_nameless(model: &mut Model, graph: GraphId) {
    for node in model.graph(graph).nodes().to_vec() {
        let outputs = model.node(node).outputs();
        let named = outputs.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        if (1..outputs.len()).contains(&named) {
            model.truncate_outputs(node, named);
        }
    }
}

/// Removes nodes that no output of `graph` depends on. Nodes without any output are kept: they are there for something.
fn drop_nodes(model: &mut Model, graph: GraphId, outcome: &mut Outcome) {
    let mut left: HashMap<ValueId, usize> = HashMap::new();
    let mut dead = HashSet::new();
    let nodes = model.graph(graph).nodes().to_vec();
    let unused = |left: &HashMap<ValueId, usize>, id: NodeId| {
        let outputs = model.node(id).outputs();
        let uses = |v: &ValueId| left.get(v).copied().unwrap_or(model.value(*v).users().len());
        !outputs.is_empty() && outputs.iter().flatten().all(|v| uses(v) == 0)
    };
    let mut queue: Vec<NodeId> = nodes.iter().copied().filter(|&n| unused(&left, n)).collect();
    while let Some(id) = queue.pop() {
        if !dead.insert(id) {
            continue;
        }
        for value in values_used(model, id) {
            let uses = left.entry(value).or_insert_with(|| model.value(value).users().len());
            *uses = uses.saturating_sub(1);
            if let Some(producer) = model.producer(value)
                && model.node(producer).graph() == Some(graph)
                && unused(&left, producer)
            {
                queue.push(producer);
            }
        }
    }
    let doomed: Vec<NodeId> = nodes.into_iter().filter(|n| dead.contains(n)).collect();
    for &id in &doomed {
        outcome.changed(model.node_name(id), Change::Unused { what: model.node(id).op_type().to_owned() });
    }
    model.remove(&doomed);
}

/// Every use a node makes of a value, those in its bodies included; as often as it is used.
fn values_used(model: &Model, id: NodeId) -> Vec<ValueId> {
    let mut used = Vec::new();
    let mut queue = vec![id];
    while let Some(id) = queue.pop() {
        let node = model.node(id);
        used.extend(node.inputs().iter().flatten());
        for body in node.bodies() {
            used.extend(model.graph(body).outputs());
            queue.extend(model.graph(body).nodes());
        }
    }
    used
}

/// Removes functions that are not called, directly or through others, from the main graph.
fn drop_functions(model: &mut Model, outcome: &mut Outcome) {
    if model.functions().is_empty() {
        return;
    }
    let mut called = vec![false; model.functions().len()];
    let by_key: HashMap<_, _> = model.functions().iter().enumerate().map(|(i, f)| (f.key(), i)).collect();
    let mut queue = vec![model.main()];
    while let Some(graph) = queue.pop() {
        for &id in model.graph(graph).nodes() {
            let node = model.node(id);
            queue.extend(node.bodies());
            if let Some(&index) = by_key.get(&(node.domain(), node.op_type(), node.overload()))
                && !std::mem::replace(&mut called[index], true)
            {
                queue.push(model.functions()[index].graph);
            }
        }
    }
    let mut dropped = HashSet::new();
    for (function, _) in model.functions().iter().zip(&called).filter(|(_, called)| !**called) {
        let (domain, name, _) = function.key();
        outcome.changed(format!("{domain}::{name}"), Change::Unused { what: "function".to_owned() });
        dropped.insert(function.graph);
    }
    model.retain_functions(|function| !dropped.contains(&function.graph));
}

/// Removes quantization annotations of tensors that the graph no longer has.
fn drop_annotations(model: &mut Model, graph: GraphId, outcome: &mut Outcome) {
    if model.graph(graph).annotations().is_empty() {
        return;
    }
    let names = defined(model, graph);
    let tensors = model.graph(graph).annotations().iter().map(|a| a.tensor_name.clone().unwrap_or_default());
    for gone in tensors.filter(|name| !names.contains(name)) {
        outcome.changed(gone, Change::StaleAnnotation);
    }
    model.retain_annotations(graph, |name| names.contains(name));
}

/// Names of the values that a graph defines.
fn defined(model: &Model, graph: GraphId) -> HashSet<String> {
    let graph = model.graph(graph);
    let outputs = graph.nodes().iter().flat_map(|&n| model.node(n).outputs().iter().flatten().copied());
    let values = graph.inputs().chain(graph.initializers().iter().copied()).chain(outputs);
    values.map(|v| model.value(v).name().to_owned()).collect()
}

/// Removes initializers without uses. Defaults of graph inputs, and parameters that an annotation names, are in use.
fn drop_initializers(model: &mut Model, graph: GraphId, outcome: &mut Outcome) {
    let annotations = model.graph(graph).annotations().iter().flat_map(|a| &a.quant_parameter_tensor_names);
    let named: HashSet<String> = annotations.filter_map(|p| p.value.clone()).collect();
    let keep = |model: &Model, id: ValueId| {
        let value = model.value(id);
        !value.users().is_empty() || matches!(value.def(), Def::Input { .. }) || named.contains(value.name())
    };
    for &id in model.graph(graph).initializers() {
        if !keep(model, id) {
            outcome.changed(model.value(id).name(), Change::Unused { what: "initializer".to_owned() });
        }
    }
    model.retain_initializers(graph, keep);
}

/// Removes declarations of values that are gone, or that are declared as graph outputs already.
fn drop_infos(model: &mut Model, graph: GraphId, outcome: &mut Outcome) {
    // A main graph may declare values inside functions, under names that nothing in the graph bears.
    let foreign = !model.functions().is_empty();
    let mut seen = HashSet::new();
    let mut stale = vec![];
    for value in model.graph(graph).infos() {
        let returned = |v: ValueId| {
            let here = |user: &User| matches!(user, User::Output { graph: at, .. } if *at == graph);
            model.value(v).users().iter().any(here)
        };
        stale.push(match value {
            None => !foreign,
            Some(v) => matches!(model.value(v).def(), Def::Removed) || returned(v) || !seen.insert(v),
        });
    }
    let count = stale.iter().filter(|s| **s).count();
    if count > 0 {
        outcome.changed(model.graph(graph).name(), Change::StaleTypes { count });
        let mut stale = stale.into_iter();
        model.retain_infos(graph, move |_, _| !stale.next().unwrap_or(false));
    }
}

/// Removes imports of opsets that no node uses.
fn drop_imports(model: &mut Model, outcome: &mut Outcome) {
    if !model.header().training_info.is_empty() {
        return;
    }
    let graphs = model.all_graphs();
    let nodes = graphs.iter().flat_map(|&g| model.graph(g).nodes());
    let used: HashSet<String> = nodes.map(|&n| model.node(n).domain().to_owned()).collect();
    let keep = |domain: &str| domain.is_empty() || used.contains(domain);
    for import in &model.header().opset_import {
        let domain = import.domain.as_deref().unwrap_or("");
        if !keep(crate::ir::canonical_domain(domain)) {
            outcome.changed(domain, Change::Unused { what: "domain".to_owned() });
        }
    }
    model.retain_domains(keep);
}
