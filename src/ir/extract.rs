//! A part of a model as a model, and back into its place.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;

use super::{Def, Model, NodeId, Tensor, ValueId, canonical_domain, verify};
use crate::error::{Error, Result};
use crate::onnx::{GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto};

impl Model {
    /// The values that a node reads, and those of outer graphs that bodies in it read, in the order of their making.
    #[must_use]
    pub fn reads(&self, node: NodeId) -> BTreeSet<ValueId> {
        let mut found: BTreeSet<ValueId> = self.node(node).inputs().iter().copied().flatten().collect();
        for body in self.node(node).bodies() {
            found.extend(self.graph(body).outputs());
            for &inner in self.graph(body).nodes() {
                found.extend(self.reads(inner));
            }
        }
        found
    }

    /// The nodes at positions `nodes` of the main graph as a model of their own: its inputs and outputs are those given,
    /// its initializers those that the nodes read. Weights are shared with this model, not copied.
    ///
    /// # Errors
    /// Inputs or outputs with which the part is not a valid model.
    pub fn extract(&self, nodes: Range<usize>, inputs: &[(String, TypeProto)], outputs: &[String]) -> Result<Self> {
        let mut proto = self.whole_proto();
        let main = self.graph(self.main());
        let inside = main.nodes().get(nodes.clone()).unwrap_or_default();
        let read: BTreeSet<&str> = inside.iter().flat_map(|&n| self.reads(n)).map(|v| self.value(v).name()).collect();
        let made: BTreeSet<&str> = inside
            .iter()
            .flat_map(|&n| self.node(n).outputs().iter().flatten())
            .map(|&v| self.value(v).name())
            .collect();
        let typed = |name: &String| {
            let value = self.value_named(name);
            let ty = value.and_then(|v| self.value(v).ty()).cloned();
            ValueInfoProto { name: Some(name.clone()), r#type: ty, ..ValueInfoProto::default() }
        };
        if let Some(graph) = &mut proto.graph {
            let all = std::mem::take(&mut graph.node);
            graph.node = all.into_iter().skip(nodes.start).take(nodes.len()).collect();
            graph.initializer.retain(|t| t.name.as_deref().is_some_and(|n| read.contains(n)));
            graph
                .value_info
                .retain(|i| i.name.as_deref().is_some_and(|n| made.contains(n) && !outputs.iter().any(|o| o == n)));
            graph.quantization_annotation.clear();
            graph.input = inputs
                .iter()
                .map(|(name, ty)| ValueInfoProto {
                    name: Some(name.clone()),
                    r#type: Some(ty.clone()),
                    ..ValueInfoProto::default()
                })
                .collect();
            graph.output = outputs.iter().map(typed).collect();
        }
        proto.training_info.clear();
        let mut part = Self::from_proto(proto, &mut |_| Ok(bytes::Bytes::new()))?;
        part.path.clone_from(&self.path);
        part.scratch.clone_from(&self.scratch);
        verify::verify(&part)?;
        Ok(part)
    }

    /// This model with other nodes and initializers in the place of some. Each part stands for the nodes of the main graph at
    /// these positions, which do not overlap: it is what [`extract`](Self::extract) gave for them, changed. What it still has
    /// keeps its name; what is new in it gets another where the name is taken. An initializer that it changed and that nodes
    /// elsewhere read as well is there twice. Initializers that nobody reads any more are gone.
    ///
    /// # Errors
    /// A part of another opset than the model, or with which it is not valid.
    pub fn with_parts(&self, mut parts: Vec<(Range<usize>, Self)>) -> Result<Self> {
        if parts.is_empty() {
            return Ok(self.clone());
        }
        parts.sort_by_key(|(nodes, _)| nodes.start);
        let mut proto = self.whole_proto();
        let mut joined = Joined::new(self, &mut proto);
        for (nodes, part) in &parts {
            joined.replace(nodes, part)?;
        }
        joined.finish();
        let mut model = Self::from_proto(proto, &mut |_| Ok(bytes::Bytes::new()))?;
        model.path.clone_from(&self.path);
        model.sources.clone_from(&self.sources);
        model.scratch.clone_from(&self.scratch);
        verify::verify(&model)?;
        Ok(model)
    }

    /// The message of this model with all tensors in it.
    fn whole_proto(&self) -> ModelProto {
        self.to_proto(&mut |tensor, bytes| {
            tensor.data_location = None;
            tensor.external_data.clear();
            tensor.raw_data = Some(bytes);
        })
    }
}

/// A model whose parts are being replaced.
struct Joined<'a> {
    model: &'a Model,
    proto: &'a mut ModelProto,
    /// The nodes of the main graph, those of the model that were not reached yet at the end.
    nodes: Vec<NodeProto>,
    left: std::iter::Enumerate<std::vec::IntoIter<NodeProto>>,
    /// Names of all tensors and of all nodes.
    tensors: HashSet<String>,
    node_names: HashSet<String>,
    /// Positions of initializers in the message, by name.
    initializers: HashMap<String, usize>,
    /// What has a declaration there.
    infos: HashSet<String>,
    /// Where in the main graph each tensor is read first and last; past the end by the graph's outputs.
    readers: BTreeMap<ValueId, (usize, usize)>,
    /// What the replaced nodes read or made.
    touched: HashSet<String>,
}

impl<'a> Joined<'a> {
    fn new(model: &'a Model, proto: &'a mut ModelProto) -> Self {
        let main = model.graph(model.main());
        let mut readers: BTreeMap<ValueId, (usize, usize)> = BTreeMap::new();
        let reads =
            main.nodes().iter().enumerate().flat_map(|(at, &node)| model.reads(node).into_iter().map(move |v| (at, v)));
        for (at, value) in reads.chain(main.outputs().map(|value| (usize::MAX, value))) {
            readers.entry(value).or_insert((at, at)).1 = at;
        }
        let (mut nodes, mut initializers, mut infos) = (Vec::new(), HashMap::new(), HashSet::new());
        if let Some(graph) = &mut proto.graph {
            nodes = std::mem::take(&mut graph.node);
            let constants = graph.initializer.iter().enumerate();
            initializers.extend(constants.map(|(at, tensor)| (tensor.name().to_owned(), at)));
            infos.extend(graph.value_info.iter().map(|info| info.name().to_owned()));
        }
        Self {
            initializers,
            infos,
            model,
            tensors: names_of(model).map(str::to_owned).collect(),
            node_names: model
                .nodes
                .iter()
                .filter(|node| node.graph.is_some())
                .map(|node| node.name().to_owned())
                .collect(),
            nodes: Vec::with_capacity(nodes.len()),
            left: nodes.into_iter().enumerate(),
            proto,
            readers,
            touched: HashSet::new(),
        }
    }

    fn replace(&mut self, nodes: &Range<usize>, part: &Model) -> Result<()> {
        self.import(part)?;
        let start = nodes.start.saturating_sub(self.position());
        self.nodes.extend(self.left.by_ref().take(start).map(|(_, node)| node));
        let gone: Vec<NodeProto> = self.left.by_ref().take(nodes.len()).map(|(_, node)| node).collect();
        let (mut known, mut known_nodes) = (HashSet::new(), HashSet::new());
        for node in &gone {
            visit_names(
                node,
                &mut |name| {
                    known.insert(name.to_owned());
                },
                &mut |name| {
                    known_nodes.insert(name.to_owned());
                },
            );
        }
        let mut renamed: HashMap<String, String> = HashMap::new();
        for name in names_of(part) {
            if (!known.contains(name) && self.tensors.contains(name)) || self.differs_elsewhere(nodes, part, name) {
                let fresh = unique(&mut self.tensors, name);
                renamed.insert(name.to_owned(), fresh);
            } else {
                self.tensors.insert(name.to_owned());
            }
        }
        let mut made = part.whole_proto().graph.unwrap_or_default();
        for node in &mut made.node {
            rename(node, &renamed, &mut |name| {
                if known_nodes.contains(name) || name.is_empty() {
                    return None;
                }
                Some(unique(&mut self.node_names, name))
            });
        }
        self.touched.extend(known);
        self.nodes.append(&mut made.node);
        let Some(graph) = &mut self.proto.graph else { return Ok(()) };
        for mut tensor in made.initializer {
            let name = tensor.name.get_or_insert_default();
            if let Some(fresh) = renamed.get(name) {
                name.clone_from(fresh);
            }
            if let Some(&at) = self.initializers.get(name) {
                graph.initializer[at] = tensor;
            } else {
                self.initializers.insert(name.clone(), graph.initializer.len());
                graph.initializer.push(tensor);
            }
        }
        for mut info in made.value_info {
            let name = info.name.get_or_insert_default();
            if let Some(fresh) = renamed.get(name) {
                name.clone_from(fresh);
            }
            if self.infos.insert(name.clone()) {
                graph.value_info.push(info);
            }
        }
        Ok(())
    }

    /// How many nodes of the model were passed.
    fn position(&self) -> usize {
        self.model.graph(self.model.main()).nodes().len() - self.left.len()
    }

    /// Whether a part has another initializer of this name than the model, where nodes outside of `nodes` read it too.
    fn differs_elsewhere(&self, nodes: &Range<usize>, part: &Model, name: &str) -> bool {
        let constant = |model: &Model| model.value_named(name).and_then(|v| model.constant(v).cloned());
        let (Some(old), Some(new)) = (constant(self.model), constant(part)) else { return false };
        let read = self.model.value_named(name).and_then(|value| self.readers.get(&value));
        read.is_some_and(|(first, last)| *first < nodes.start || *last >= nodes.end) && !same(&old, &new)
    }

    /// Brings in the opsets of a part.
    fn import(&mut self, part: &Model) -> Result<()> {
        for import in &part.rest.opset_import {
            match self
                .proto
                .opset_import
                .iter()
                .find(|own| canonical_domain(own.domain()) == canonical_domain(import.domain()))
            {
                None => self.proto.opset_import.push(import.clone()),
                Some(own) if own.version == import.version => {}
                Some(own) => {
                    let version = |of: Option<i64>| of.map_or_else(|| "none".to_owned(), |v| v.to_string());
                    let message = format!(
                        "a part of the model needs opset {}, and the model has {}",
                        version(import.version),
                        version(own.version)
                    );
                    return Err(Error::model(message).with_hint("raise the opset of the whole model first"));
                }
            }
        }
        self.proto.ir_version = self.proto.ir_version.max(part.rest.ir_version);
        Ok(())
    }

    /// Puts the nodes into the message, and drops what belonged to those that are gone.
    fn finish(mut self) {
        self.nodes.extend(self.left.by_ref().map(|(_, node)| node));
        let Some(graph) = &mut self.proto.graph else { return };
        let mut used: HashSet<String> = HashSet::new();
        for node in &self.nodes {
            visit_names(
                node,
                &mut |name| {
                    used.insert(name.to_owned());
                },
                &mut |_| {},
            );
        }
        used.extend(graph.input.iter().chain(&graph.output).filter_map(|port| port.name.clone()));
        let stays = |name: Option<&String>| name.is_none_or(|name| used.contains(name) || !self.touched.contains(name));
        graph.initializer.retain(|tensor| stays(tensor.name.as_ref()));
        graph.value_info.retain(|info| stays(info.name.as_ref()));
        graph.quantization_annotation.retain(|annotation| stays(annotation.tensor_name.as_ref()));
        graph.node = self.nodes;
    }
}

/// The names of all tensors that are there.
fn names_of(model: &Model) -> impl Iterator<Item = &str> {
    let there = model.values.iter().filter(|value| !matches!(value.def, Def::Removed));
    there.map(|value| value.name.as_str()).filter(|name| !name.is_empty())
}

/// `base`, or the first of `base_1`, `base_2`, … that is not taken; it is then.
fn unique(taken: &mut HashSet<String>, base: &str) -> String {
    let mut name = base.to_owned();
    let mut number = 0;
    while !taken.insert(name.clone()) {
        number += 1;
        name = format!("{base}_{number}");
    }
    name
}

/// Whether two tensors are the same to the byte.
fn same(a: &Tensor, b: &Tensor) -> bool {
    let (x, y) = (a.raw(), b.raw());
    let shared = x.as_ptr() == y.as_ptr() && x.len() == y.len();
    a.dtype() == b.dtype() && a.dims() == b.dims() && (shared || x == y)
}

/// Graphs in the attributes of a node.
fn bodies(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute.iter().flat_map(|attr| attr.g.iter().chain(&attr.graphs))
}

/// Calls `tensor` with the names of all tensors that a node, and the nodes in it, read or make, and `own` with the names of
/// these nodes.
fn visit_names(node: &NodeProto, tensor: &mut dyn FnMut(&str), own: &mut dyn FnMut(&str)) {
    own(node.name());
    node.input.iter().chain(&node.output).for_each(|name| tensor(name));
    for body in bodies(node) {
        body.input.iter().chain(&body.output).for_each(|port| tensor(port.name()));
        body.initializer.iter().for_each(|constant| tensor(constant.name()));
        body.node.iter().for_each(|node| visit_names(node, tensor, own));
    }
}

/// Gives tensors their other names, also in bodies, and nodes those that `own` says.
fn rename(node: &mut NodeProto, renamed: &HashMap<String, String>, own: &mut dyn FnMut(&str) -> Option<String>) {
    let change = |name: &mut String| {
        if let Some(fresh) = renamed.get(name) {
            name.clone_from(fresh);
        }
    };
    if let Some(name) = own(node.name()) {
        node.name = Some(name);
    }
    node.input.iter_mut().chain(&mut node.output).for_each(change);
    for body in node.attribute.iter_mut().flat_map(|attr| attr.g.iter_mut().chain(&mut attr.graphs)) {
        let ports = body.input.iter_mut().chain(&mut body.output).chain(&mut body.value_info);
        ports.filter_map(|port| port.name.as_mut()).for_each(change);
        body.initializer.iter_mut().filter_map(|constant| constant.name.as_mut()).for_each(change);
        body.quantization_annotation.iter_mut().filter_map(|of| of.tensor_name.as_mut()).for_each(change);
        body.node.iter_mut().for_each(|node| rename(node, renamed, own));
    }
}
