//! Calls of functions of the model become the nodes of these, so that their weights are found like all others.
//!
//! Functions without bodies of their own, under the opset of the graph that calls them; others stay calls.

use std::collections::{HashMap, HashSet};

use super::support::graphs::graphs_outside_functions;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, ValueId, canonical_domain};
use crate::onnx::AttributeProto;
use crate::reason::Reason;

/// Nodes that all calls together may become.
const MOST: usize = 100_000;

/// See the module.
#[derive(Debug)]
pub struct InlineFunctions;

impl Pass for InlineFunctions {
    fn name(&self) -> &'static str {
        "inline-functions"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if model.functions().is_empty() {
            return Ok(outcome);
        }
        let functions = Functions::of(model);
        let mut left = MOST;
        let mut kept: HashSet<NodeId> = HashSet::new();
        loop {
            let calls: Vec<(NodeId, usize)> = graphs_outside_functions(model)
                .into_iter()
                .flat_map(|graph| model.graph(graph).nodes())
                .filter(|node| !kept.contains(node))
                .filter_map(|&node| Some((node, functions.called(model, node)?)))
                .collect();
            if calls.is_empty() {
                return Ok(outcome);
            }
            for (node, function) in calls {
                let (name, op) = (model.node_name(node).to_owned(), model.node(node).op_type().to_owned());
                let long = (functions.sizes[function] > left).then_some(Reason::LongFunction { most: MOST });
                if let Some(why) = long.or_else(|| unfit(model, node, function)) {
                    outcome.skipped(name, why);
                    kept.insert(node);
                    continue;
                }
                left -= model.graph(model.functions()[function].graph).nodes().len();
                inline(model, node, function);
                outcome.changed(name, Change::Inlined { function: op });
            }
        }
    }
}

/// The functions of a model by what calls them, and the nodes that each comes to with all that it calls.
struct Functions {
    by_key: HashMap<(String, String, String), usize>,
    sizes: Vec<usize>,
}

impl Functions {
    fn of(model: &Model) -> Self {
        let key =
            |(domain, name, overload): (&str, &str, &str)| (domain.to_owned(), name.to_owned(), overload.to_owned());
        let by_key = model.functions().iter().enumerate().map(|(at, function)| (key(function.key()), at)).collect();
        let mut found = Self { by_key, sizes: vec![usize::MAX; model.functions().len()] };
        // Each round settles those that call only settled ones; what calls itself never is.
        let calls: Vec<Vec<usize>> = (model.functions().iter())
            .map(|function| {
                model.graph(function.graph).nodes().iter().filter_map(|&n| found.called(model, n)).collect()
            })
            .collect();
        let mut settled = true;
        while std::mem::take(&mut settled) {
            for (at, calls) in calls.iter().enumerate() {
                if found.sizes[at] == usize::MAX && calls.iter().all(|&other| found.sizes[other] < usize::MAX) {
                    let own = model.graph(model.functions()[at].graph).nodes().len();
                    let all = calls.iter().fold(own, |sum, &other| sum.saturating_add(found.sizes[other]));
                    found.sizes[at] = all.min(usize::MAX - 1);
                    settled = true;
                }
            }
        }
        found
    }

    /// The function that a node calls, by its position.
    fn called(&self, model: &Model, node: NodeId) -> Option<usize> {
        let at = model.node(node);
        let key = (at.domain().to_owned(), at.op_type().to_owned(), at.overload().to_owned());
        self.by_key.get(&key).copied()
    }
}

/// Why a call stays one.
fn unfit(model: &Model, node: NodeId, function: usize) -> Option<Reason> {
    let body = model.functions()[function].graph;
    let graph = model.node(node).graph()?;
    let (own, outer) = (model.opset_in(body), model.opset_in(graph));
    if own.is_some() && own != outer {
        return Some(Reason::OtherOpset { own: own.unwrap_or(0), outer: outer.unwrap_or(0) });
    }
    let nested = model.graph(body).nodes().iter().any(|&n| model.node(n).bodies().next().is_some());
    let returned: Vec<ValueId> = model.graph(body).outputs().collect();
    let passed = returned.iter().any(|&v| model.producer(v).is_none());
    // An operator may need what the call leaves out.
    let lacking: Vec<ValueId> = model
        .graph(body)
        .inputs()
        .enumerate()
        .filter_map(|(index, formal)| model.node(node).input(index).is_none().then_some(formal))
        .collect();
    let read =
        |value: &ValueId| model.graph(body).nodes().iter().any(|&n| model.node(n).inputs().contains(&Some(*value)));
    (nested || passed || lacking.iter().any(read) || !model.graph(body).initializers().is_empty())
        .then_some(Reason::NotInlined)
}

fn inline(model: &mut Model, call: NodeId, function: usize) {
    let body: GraphId = model.functions()[function].graph;
    let defaults = model.functions()[function].defaults().to_vec();
    let at = model.node(call);
    let given: Vec<AttributeProto> = at.attrs().iter().map(|attr| attr.proto().clone()).collect();
    let (name, domain) = (model.node_name(call).to_owned(), |node: NodeId| model.node(node).domain().to_owned());
    let mut values: HashMap<ValueId, Option<ValueId>> = HashMap::new();
    for (index, formal) in model.graph(body).inputs().enumerate() {
        values.insert(formal, at.input(index));
    }
    let mut inner: Vec<(NodeId, String)> = Vec::new();
    for &node in model.graph(body).nodes() {
        inner.push((node, domain(node)));
    }
    for (node, domain) in inner {
        let at = model.node(node);
        let attrs = at.attrs().iter().filter_map(|attr| bound(attr, &given, &defaults)).collect();
        let new = NewNode {
            op_type: at.op_type().to_owned(),
            domain: canonical_domain(&domain).to_owned(),
            name: format!("{name}/{}", model.node_name(node)),
            inputs: at.inputs().iter().map(|input| input.and_then(|v| values.get(&v).copied().flatten())).collect(),
            outputs: at.outputs().iter().flatten().map(|&v| format!("{name}/{}", model.value(v).name())).collect(),
            attrs,
        };
        if model.domain_version(&domain).is_none() {
            model.set_domain_version(&domain, 1);
        }
        let at = model.node(node);
        let outputs: Vec<ValueId> = at.outputs().iter().flatten().copied().collect();
        let made = model.insert(Place::Before(call), new);
        for (formal, actual) in outputs.into_iter().zip(model.node(made).outputs().to_vec()) {
            values.insert(formal, actual);
        }
    }
    let results: Vec<ValueId> = model.graph(body).outputs().collect();
    let outputs = model.node(call).outputs().to_vec();
    for (actual, formal) in outputs.into_iter().zip(results) {
        let (Some(actual), Some(made)) = (actual, values.get(&formal).copied().flatten()) else { continue };
        if let Some(ty) = model.value(actual).ty().cloned() {
            model.set_type(made, ty);
        }
        model.replace_uses(actual, made, |_| true);
        let fresh = format!("{}_called", model.value(actual).name());
        model.take_name(actual, made, &fresh);
    }
    model.remove(&[call]);
}

/// An attribute, or what the call gives where it refers to one of the function.
fn bound(attr: &Attr, given: &[AttributeProto], defaults: &[AttributeProto]) -> Option<AttributeProto> {
    let proto = attr.proto();
    let Some(wanted) = proto.ref_attr_name.as_deref().filter(|name| !name.is_empty()) else {
        return Some(proto.clone());
    };
    let found = given.iter().chain(defaults).find(|other| other.name.as_deref() == Some(wanted))?;
    Some(AttributeProto { name: proto.name.clone(), ..found.clone() })
}
