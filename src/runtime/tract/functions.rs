//! Inlining of model-local functions.

use std::collections::{BTreeMap, BTreeSet};

use super::program::{MAX_STEPS, Program, Step, is_default, refusal};
use crate::error::Result;
use crate::onnx::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto};

/// Calls nested deeper than this are taken for a recursion.
const MAX_DEPTH: usize = 64;

/// The functions of a model by domain, name and overload.
pub(super) struct Functions(BTreeMap<(String, String, String), FunctionProto>);

impl Functions {
    /// Collects the functions of a model.
    pub fn new(model: &ModelProto) -> Self {
        let key = |f: &FunctionProto| {
            (canonical(f.domain.as_deref()), f.name.clone().unwrap_or_default(), f.overload.clone().unwrap_or_default())
        };
        Self(model.functions.iter().map(|f| (key(f), f.clone())).collect())
    }

    fn find(&self, node: &NodeProto) -> Option<&FunctionProto> {
        if self.0.is_empty() {
            return None;
        }
        self.0.get(&(canonical(node.domain.as_deref()), node.op_type().to_owned(), node.overload().to_owned()))
    }

    /// Appends `node`, or in place of a call the nodes of the function, to `steps`.
    ///
    /// # Errors
    /// Functions that call themselves, or are called inside a body under another opset.
    pub fn expand(&self, node: NodeProto, opset: i64, program: &mut Program, steps: &mut Vec<Step>) -> Result<()> {
        let name = match node.name() {
            "" => node.output.iter().find(|o| !o.is_empty()).cloned().unwrap_or_default(),
            name => name.to_owned(),
        };
        let origin = (name, node.op_type().to_owned());
        let mut flat = Vec::new();
        let mut fresh = |base: &str| program.fresh(base);
        self.inline(node, opset, 0, &mut fresh, &mut flat).map_err(|e| e.at_node(&origin.0, &origin.1))?;
        steps.extend(flat.into_iter().map(|(node, opset)| Step { node, opset, origin: origin.clone() }));
        Ok(())
    }

    fn inline(
        &self,
        mut node: NodeProto,
        opset: i64,
        depth: usize,
        fresh: &mut dyn FnMut(&str) -> String,
        out: &mut Vec<(NodeProto, i64)>,
    ) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(refusal("a function calls itself"));
        }
        if out.len() > MAX_STEPS {
            return Err(refusal(format!("its functions come to more than {MAX_STEPS} nodes")));
        }
        let Some(function) = self.find(&node) else {
            for attribute in &mut node.attribute {
                for body in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                    self.inline_body(body, opset, depth, fresh)?;
                }
            }
            out.push((node, opset));
            return Ok(());
        };
        let version = function
            .opset_import
            .iter()
            .find(|o| is_default(o.domain.as_deref().unwrap_or("")))
            .and_then(|o| o.version)
            .unwrap_or(opset);
        let mut names = BTreeMap::new();
        for (index, formal) in function.input.iter().enumerate() {
            names.insert(formal.clone(), node.input.get(index).cloned().unwrap_or_default());
        }
        let mut tails = Vec::new();
        for (index, formal) in function.output.iter().enumerate() {
            let Some(actual) = node.output.get(index).filter(|o| !o.is_empty()) else { continue };
            // An output that is an input, or that is named twice, needs a node of its own.
            if names.contains_key(formal) {
                tails.push((names[formal].clone(), actual.clone()));
            } else {
                names.insert(formal.clone(), actual.clone());
            }
        }
        let prefix = node.output.iter().find(|o| !o.is_empty()).cloned().unwrap_or_default();
        for inner in &function.node {
            for output in inner.output.iter().filter(|o| !o.is_empty()) {
                if !names.contains_key(output) {
                    names.insert(output.clone(), fresh(&format!("{prefix}/{output}")));
                }
            }
        }
        for inner in &function.node {
            let mut inner = inner.clone();
            bind_attributes(&mut inner, &node, function);
            rename(&mut inner, &names);
            self.inline(inner, version, depth + 1, fresh, out)?;
        }
        for (from, to) in tails {
            out.push((super::program::node("Identity", &[&from], &[&to], Vec::new()), version));
        }
        Ok(())
    }

    fn inline_body(
        &self,
        body: &mut GraphProto,
        opset: i64,
        depth: usize,
        fresh: &mut dyn FnMut(&str) -> String,
    ) -> Result<()> {
        let mut flat = Vec::new();
        for node in std::mem::take(&mut body.node) {
            self.inline(node, opset, depth, fresh, &mut flat)?;
        }
        if flat.iter().any(|(_, version)| *version != opset) {
            return Err(refusal("a function of another opset version is called inside a branch or loop"));
        }
        body.node = flat.into_iter().map(|(node, _)| node).collect();
        Ok(())
    }
}

fn canonical(domain: Option<&str>) -> String {
    crate::ir::canonical_domain(domain.unwrap_or("")).to_owned()
}

/// Replaces references to attributes of the function by those of the call, or by their defaults.
fn bind_attributes(node: &mut NodeProto, call: &NodeProto, function: &FunctionProto) {
    let mut bound = Vec::with_capacity(node.attribute.len());
    for attribute in std::mem::take(&mut node.attribute) {
        let Some(wanted) = attribute.ref_attr_name.as_deref().filter(|n| !n.is_empty()) else {
            bound.push(attribute);
            continue;
        };
        let is = |a: &&AttributeProto| a.name.as_deref() == Some(wanted);
        let given = call.attribute.iter().find(is).or_else(|| function.attribute_proto.iter().find(is));
        if let Some(given) = given {
            bound.push(AttributeProto { name: attribute.name.clone(), ..given.clone() });
        }
    }
    for attribute in &mut bound {
        for body in attribute.g.iter_mut().chain(&mut attribute.graphs) {
            for node in &mut body.node {
                bind_attributes(node, call, function);
            }
        }
    }
    node.attribute = bound;
}

/// Renames what a node reads and writes, and what bodies in it read from outside.
pub(super) fn rename(node: &mut NodeProto, names: &BTreeMap<String, String>) {
    let swap = |name: &mut String| {
        if let Some(new) = names.get(name.as_str()) {
            name.clone_from(new);
        }
    };
    node.input.iter_mut().for_each(swap);
    node.output.iter_mut().for_each(swap);
    for attribute in &mut node.attribute {
        for body in attribute.g.iter_mut().chain(&mut attribute.graphs) {
            rename_captures(body, names);
        }
    }
}

/// Renames what a body reads from outside; what it defines itself hides an outer name.
fn rename_captures(body: &mut GraphProto, names: &BTreeMap<String, String>) {
    let mut own: BTreeSet<&str> = BTreeSet::new();
    own.extend(body.input.iter().filter_map(|i| i.name.as_deref()));
    own.extend(body.initializer.iter().filter_map(|i| i.name.as_deref()));
    own.extend(body.node.iter().flat_map(|n| n.output.iter().map(String::as_str)));
    let visible: BTreeMap<String, String> =
        names.iter().filter(|(old, _)| !own.contains(old.as_str())).map(|(a, b)| (a.clone(), b.clone())).collect();
    if visible.is_empty() {
        return;
    }
    for node in &mut body.node {
        rename(node, &visible);
    }
    for output in &mut body.output {
        if let Some(new) = output.name.as_deref().and_then(|n| visible.get(n)) {
            output.name = Some(new.clone());
        }
    }
}
