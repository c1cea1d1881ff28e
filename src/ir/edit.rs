//! The edits of topology. Nothing else changes inputs, outputs or users, so they cannot disagree.

use std::collections::HashMap;

use super::{Attr, Def, Function, Graph, GraphId, Model, Node, NodeId, Owner, Port, Tensor, User, Value, ValueId};
use crate::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto};

/// A node to be inserted.
#[derive(Clone, Debug, Default)]
pub struct NewNode {
    /// Operator.
    pub op_type: String,
    /// Domain; empty for the default one.
    pub domain: String,
    /// Name; made unique when it is inserted.
    pub name: String,
    /// Inputs.
    pub inputs: Vec<Option<ValueId>>,
    /// Names of the outputs; made unique when it is inserted.
    pub outputs: Vec<String>,
    /// Attributes without graphs.
    pub attrs: Vec<AttributeProto>,
}

impl NewNode {
    /// A node of the default domain whose inputs are all present.
    #[must_use]
    pub fn new(op_type: &str, name: impl Into<String>, inputs: &[ValueId], outputs: &[&str]) -> Self {
        Self {
            op_type: op_type.to_owned(),
            domain: String::new(),
            name: name.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: outputs.iter().map(|&o| o.to_owned()).collect(),
            attrs: Vec::new(),
        }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, attr: AttributeProto) -> Self {
        self.attrs.push(attr);
        self
    }
}

/// Where in its graph's node list a new node goes.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// Right before this node.
    Before(NodeId),
    /// Right after this node.
    After(NodeId),
    /// First in this graph.
    First(GraphId),
    /// Last in this graph.
    Last(GraphId),
}

impl Model {
    /// A model whose main graph, named `name`, is empty; it imports the default opset at `opset`.
    #[must_use]
    pub fn new(name: &str, ir_version: i64, opset: i64) -> Self {
        let mut model = Self {
            rest: ModelProto { ir_version: Some(ir_version), ..ModelProto::default() },
            main: GraphId(0),
            functions: Vec::new(),
            graphs: Vec::new(),
            nodes: Vec::new(),
            values: Vec::new(),
            names: super::names::Names::default(),
            node_names: None,
            path: None,
            sources: Vec::new(),
            scratch: None,
            cursor: 0,
        };
        model.open(Owner::Main, GraphProto { name: Some(name.to_owned()), ..GraphProto::default() });
        model.set_domain_version("", opset);
        model
    }

    /// Adds an empty graph.
    pub(crate) fn open(&mut self, owner: Owner, rest: GraphProto) -> GraphId {
        let id = GraphId(self.graphs.len() as u32);
        self.graphs.push(Graph {
            owner,
            inputs: Vec::new(),
            outputs: Vec::new(),
            nodes: Vec::new(),
            initializers: Vec::new(),
            infos: Vec::new(),
            rest,
        });
        id
    }

    /// Adds an input at the end of a graph's; its name is made unique.
    pub fn add_input(&mut self, graph: GraphId, name: &str, ty: TypeProto) -> ValueId {
        let value = self.new_value(graph, name, Def::Input { default: None });
        let name = self.value(value).name.clone();
        self.values[value.0 as usize].ty = Some(ty.clone());
        let info = ValueInfoProto { name: Some(name), r#type: Some(ty), ..ValueInfoProto::default() };
        self.graphs[graph.0 as usize].inputs.push(Port { value: Some(value), info });
        value
    }

    /// Adds an output at the end of a graph's, of the type that the value has.
    pub fn add_output(&mut self, graph: GraphId, value: ValueId) {
        let index = self.graph(graph).outputs.len();
        let slot = &mut self.values[value.0 as usize];
        slot.users.push(User::Output { graph, index });
        let info =
            ValueInfoProto { name: Some(slot.name.clone()), r#type: slot.ty.clone(), ..ValueInfoProto::default() };
        self.graphs[graph.0 as usize].outputs.push(Port { value: Some(value), info });
    }

    /// `base`, or `base_1`, `base_2`, … : one that no tensor of the model bears, the first where there are no gaps.
    #[must_use]
    pub fn unique_name(&self, base: &str) -> String {
        if !self.names.contains(base) {
            return base.to_owned();
        }
        // Doubles, then halves: suffixes are handed out in order, and a scan over them would be quadratic.
        let taken = |suffix: usize| self.names.contains(&format!("{base}_{suffix}"));
        let mut free = 1;
        while taken(free) {
            free *= 2;
        }
        let mut last_taken = free / 2;
        while last_taken + 1 < free {
            let middle = usize::midpoint(last_taken, free);
            if taken(middle) {
                last_taken = middle;
            } else {
                free = middle;
            }
        }
        format!("{base}_{free}")
    }

    /// Inserts a node and makes its outputs. Their names are made unique.
    ///
    /// # Panics
    /// If `place` names a removed node.
    pub fn insert(&mut self, place: Place, new: NewNode) -> NodeId {
        let (graph, position) = match place {
            Place::Before(anchor) | Place::After(anchor) => {
                let graph = self.node(anchor).graph.expect("anchor is in a graph");
                let at = self.position(graph, anchor);
                (graph, if matches!(place, Place::After(_)) { at + 1 } else { at })
            }
            Place::First(graph) => (graph, 0),
            Place::Last(graph) => (graph, self.graph(graph).nodes.len()),
        };
        let id = NodeId(self.nodes.len() as u32);
        let NewNode { op_type, domain, name, inputs, outputs, attrs } = new;
        let name = self.unique_node_name(name);
        let rest = NodeProto {
            name: Some(name),
            op_type: Some(op_type),
            domain: (!domain.is_empty()).then_some(domain),
            ..NodeProto::default()
        };
        let attrs = attrs.into_iter().map(|proto| Attr { proto, graphs: Vec::new() }).collect();
        self.nodes.push(Node { graph: Some(graph), inputs: Vec::new(), outputs: Vec::new(), attrs, rest });
        self.graphs[graph.0 as usize].nodes.insert(position, id);
        for (input, value) in inputs.into_iter().enumerate() {
            self.nodes[id.0 as usize].inputs.push(value);
            if let Some(value) = value {
                self.values[value.0 as usize].users.push(User::Node { node: id, input });
            }
        }
        for (index, name) in outputs.iter().enumerate() {
            let value = self.new_value(graph, name, Def::Output { node: id, index });
            self.nodes[id.0 as usize].outputs.push(Some(value));
        }
        id
    }

    /// `base`, or `base_1`, `base_2`, … : the first that no node of the model bears. Runtimes refuse a name twice.
    fn unique_node_name(&mut self, base: String) -> String {
        if base.is_empty() {
            return base;
        }
        let nodes = &self.nodes;
        let taken = self.node_names.get_or_insert_with(|| nodes.iter().map(|n| (n.name().to_owned(), 1)).collect());
        let Some(&tried) = taken.get(&base) else {
            taken.insert(base.clone(), 1);
            return base;
        };
        let mut number = tried;
        let mut name = format!("{base}_{number}");
        while taken.contains_key(&name) {
            number += 1;
            name = format!("{base}_{number}");
        }
        taken.insert(base, number + 1);
        taken.insert(name.clone(), 1);
        name
    }

    /// Position of a node in its graph's list. Looks around where the last one was found first: passes go in order.
    fn position(&mut self, graph: GraphId, node: NodeId) -> usize {
        let nodes = &self.graph(graph).nodes;
        let start = self.cursor.min(nodes.len());
        let (before, after) = nodes.split_at(start);
        let near = 64.min(after.len());
        let found = after[..near].iter().position(|&n| n == node).map(|at| start + at);
        let found = found.or_else(|| before.iter().rposition(|&n| n == node));
        let found = found.or_else(|| after[near..].iter().position(|&n| n == node).map(|at| start + near + at));
        self.cursor = found.expect("node is in its graph");
        self.cursor
    }

    /// Removes nodes whose outputs nobody uses, except each other; bodies in their attributes go with them.
    ///
    /// # Panics
    /// If an output is still used: callers redirect uses first.
    pub fn remove(&mut self, nodes: &[NodeId]) {
        let doomed: std::collections::HashSet<NodeId> = nodes.iter().copied().collect();
        let mut used: Vec<ValueId> =
            nodes.iter().flat_map(|&n| self.node(n).inputs.iter().copied().flatten()).collect();
        used.sort_unstable();
        used.dedup();
        for value in used {
            let gone = |user: &User| matches!(user, User::Node { node, .. } if doomed.contains(node));
            self.values[value.0 as usize].users.retain(|user| !gone(user));
        }
        for &id in nodes {
            self.nodes[id.0 as usize].inputs.fill(None);
            let bodies: Vec<GraphId> = self.node(id).bodies().collect();
            for body in bodies {
                self.clear(body);
            }
        }
        let mut touched = Vec::new();
        for &id in nodes {
            let outputs: Vec<ValueId> = self.node(id).outputs.iter().flatten().copied().collect();
            for value in outputs {
                self.drop_value(value);
            }
            if let Some(graph) = self.nodes[id.0 as usize].graph.take() {
                touched.push(graph);
            }
        }
        touched.sort_unstable();
        touched.dedup();
        for graph in touched {
            // Passes remove nodes one by one where they are: a scan of the whole list for each would be quadratic.
            if let [node] = *nodes {
                let at = self.position(graph, node);
                self.graphs[graph.0 as usize].nodes.remove(at);
            } else {
                self.graphs[graph.0 as usize].nodes.retain(|n| !doomed.contains(n));
            }
        }
    }

    /// Empties a body: drops the uses its nodes and outputs make of outer values.
    fn clear(&mut self, graph: GraphId) {
        let outputs = std::mem::take(&mut self.graphs[graph.0 as usize].outputs);
        for (index, port) in outputs.iter().enumerate() {
            if let Some(value) = port.value {
                self.drop_user(value, User::Output { graph, index });
            }
        }
        let nodes = self.graph(graph).nodes.clone();
        self.remove(&nodes);
    }

    fn drop_value(&mut self, value: ValueId) {
        let slot = &mut self.values[value.0 as usize];
        assert!(slot.users.is_empty(), "\"{}\" is still used", slot.name);
        slot.def = Def::Removed;
        self.names.remove(&slot.name, value);
    }

    fn drop_user(&mut self, value: ValueId, user: User) {
        let users = &mut self.values[value.0 as usize].users;
        if let Some(at) = users.iter().position(|&u| u == user) {
            users.remove(at);
        }
    }

    /// Points input `input` of a node at `value`; `None` leaves it out. The input list grows as needed.
    pub fn set_input(&mut self, node: NodeId, input: usize, value: Option<ValueId>) {
        let slots = &mut self.nodes[node.0 as usize].inputs;
        if slots.len() <= input {
            slots.resize(input + 1, None);
        }
        let old = std::mem::replace(&mut slots[input], value);
        if let Some(old) = old {
            self.drop_user(old, User::Node { node, input });
        }
        if let Some(value) = value {
            self.values[value.0 as usize].users.push(User::Node { node, input });
        }
    }

    /// Drops inputs from `len` on.
    pub fn truncate_inputs(&mut self, node: NodeId, len: usize) {
        for input in len..self.node(node).inputs.len() {
            self.set_input(node, input, None);
        }
        self.nodes[node.0 as usize].inputs.truncate(len);
    }

    /// Drops outputs from `len` on.
    ///
    /// # Panics
    /// If one of them is used.
    pub fn truncate_outputs(&mut self, node: NodeId, len: usize) {
        let len = len.min(self.node(node).outputs.len());
        let dropped = self.nodes[node.0 as usize].outputs.split_off(len);
        for value in dropped.into_iter().flatten() {
            self.drop_value(value);
        }
    }

    /// Points one use at another value.
    pub fn set_user(&mut self, user: User, value: ValueId) {
        match user {
            User::Node { node, input } => self.set_input(node, input, Some(value)),
            User::Output { graph, index } => {
                let old = self.graphs[graph.0 as usize].outputs[index].value.replace(value);
                if let Some(old) = old {
                    self.drop_user(old, user);
                }
                self.values[value.0 as usize].users.push(user);
            }
        }
    }

    /// Points the uses of `from` that `which` accepts at `to`.
    ///
    /// A redirected graph output takes the name of `to`: to keep the name of an output, use [`Model::take_name`].
    pub fn replace_uses(&mut self, from: ValueId, to: ValueId, which: impl Fn(User) -> bool) {
        if from == to {
            return;
        }
        let users = std::mem::take(&mut self.values[from.0 as usize].users);
        let (moved, kept): (Vec<User>, Vec<User>) = users.into_iter().partition(|&u| which(u));
        self.values[from.0 as usize].users = kept;
        for &user in &moved {
            match user {
                User::Node { node, input } => self.nodes[node.0 as usize].inputs[input] = Some(to),
                User::Output { graph, index } => self.graphs[graph.0 as usize].outputs[index].value = Some(to),
            }
        }
        self.values[to.0 as usize].users.extend(moved);
    }

    /// Gives `to` the name of `from`, and `from` a fresh one made from `fresh`.
    pub fn take_name(&mut self, from: ValueId, to: ValueId, fresh: &str) {
        let wanted = self.value(from).name.clone();
        let spare = self.unique_name(fresh);
        self.set_name(from, spare);
        self.set_name(to, wanted);
    }

    /// Renames a value; the name is made unique.
    pub fn rename(&mut self, value: ValueId, base: &str) {
        let name = self.unique_name(base);
        self.set_name(value, name);
    }

    fn set_name(&mut self, value: ValueId, name: String) {
        let slot = &mut self.values[value.0 as usize];
        let in_main = self.names.in_main(&slot.name) == Some(value);
        self.names.remove(&slot.name, value);
        self.names.insert(name.clone(), value, in_main);
        slot.name = name;
    }

    /// Adds an initializer; its name is made unique.
    pub fn add_initializer(&mut self, graph: GraphId, name: &str, tensor: Tensor) -> ValueId {
        let value = self.new_value(graph, name, Def::Constant(self.keep(tensor)));
        self.graphs[graph.0 as usize].initializers.push(value);
        value
    }

    /// Replaces the tensor of an initializer.
    ///
    /// # Panics
    /// If `value` is not an initializer.
    pub fn set_constant(&mut self, value: ValueId, tensor: Tensor) {
        let tensor = self.keep(tensor);
        match &mut self.values[value.0 as usize].def {
            Def::Constant(slot) | Def::Input { default: Some(slot) } => *slot = tensor,
            other => panic!("not an initializer: {other:?}"),
        }
    }

    /// Makes the output of a node an initializer of the same name. The node keeps a nameless output.
    ///
    /// # Panics
    /// If `value` is neither an output of a node that is in a graph, nor an initializer.
    pub fn make_constant(&mut self, value: ValueId, tensor: Tensor) {
        let Def::Output { node, index } = self.value(value).def else {
            return self.set_constant(value, tensor);
        };
        let graph = self.node(node).graph.expect("producer is in a graph");
        self.nodes[node.0 as usize].outputs[index] = None;
        self.values[value.0 as usize].def = Def::Constant(self.keep(tensor));
        self.graphs[graph.0 as usize].initializers.push(value);
    }

    /// Drops initializers that `keep` refuses.
    ///
    /// # Panics
    /// If one of them is used.
    pub fn retain_initializers(&mut self, graph: GraphId, keep: impl Fn(&Self, ValueId) -> bool) {
        let (kept, dropped): (Vec<_>, Vec<_>) =
            self.graph(graph).initializers.iter().copied().partition(|&v| keep(self, v));
        for value in dropped {
            self.drop_value(value);
        }
        self.graphs[graph.0 as usize].initializers = kept;
    }

    /// Turns the inputs of a graph that have a default into constants; which they were.
    pub fn freeze_inputs(&mut self, graph: GraphId) -> Vec<ValueId> {
        let mut frozen = Vec::new();
        let values = &mut self.values;
        self.graphs[graph.0 as usize].inputs.retain(|port| {
            let Some(value) = port.value else { return true };
            let def = &mut values[value.0 as usize].def;
            let Def::Input { default } = def else { return true };
            let Some(tensor) = default.take() else { return true };
            *def = Def::Constant(tensor);
            frozen.push(value);
            false
        });
        frozen
    }

    /// Gives a graph input the default `tensor`, in place of one that it has.
    pub fn set_default(&mut self, graph: GraphId, value: ValueId, tensor: Tensor) {
        let Def::Input { default } = &mut self.values[value.0 as usize].def else { return };
        if default.replace(tensor).is_none() {
            self.graphs[graph.0 as usize].initializers.push(value);
        }
    }

    /// Turns a graph input into the constant `tensor`, whether or not it has a default.
    pub fn bind_input(&mut self, graph: GraphId, value: ValueId, tensor: Tensor) {
        let Def::Input { default } = &self.value(value).def else { return };
        // An initializer that is an input as well is listed as both.
        if default.is_none() {
            self.graphs[graph.0 as usize].initializers.push(value);
        }
        self.values[value.0 as usize].def = Def::Constant(tensor);
        self.graphs[graph.0 as usize].inputs.retain(|p| p.value != Some(value));
    }

    /// Declares the type of a value, in place of what the file said.
    pub fn set_type(&mut self, value: ValueId, ty: TypeProto) {
        let slot = &mut self.values[value.0 as usize];
        slot.ty = Some(ty);
        slot.retyped = true;
    }

    /// Sets an attribute, replacing one of the same name.
    pub fn set_attr(&mut self, node: NodeId, proto: AttributeProto) {
        let attrs = &mut self.nodes[node.0 as usize].attrs;
        match attrs.iter_mut().find(|a| a.proto.name == proto.name) {
            Some(attr) => attr.proto = proto,
            None => attrs.push(Attr { proto, graphs: Vec::new() }),
        }
    }

    /// Drops an attribute.
    pub fn remove_attr(&mut self, node: NodeId, name: &str) {
        self.nodes[node.0 as usize].attrs.retain(|a| a.name() != name);
    }

    /// Changes the operator of a node.
    pub fn set_op(&mut self, node: NodeId, domain: &str, op_type: &str) {
        let rest = &mut self.nodes[node.0 as usize].rest;
        rest.op_type = Some(op_type.to_owned());
        rest.domain = (!domain.is_empty()).then(|| domain.to_owned());
    }

    /// Puts the nodes of a graph in another order.
    ///
    /// # Panics
    /// If `order` is not a permutation of the graph's nodes.
    pub fn reorder(&mut self, graph: GraphId, order: Vec<NodeId>) {
        let mut before = self.graph(graph).nodes.clone();
        let mut after = order.clone();
        before.sort_unstable();
        after.sort_unstable();
        assert_eq!(before, after);
        self.graphs[graph.0 as usize].nodes = order;
    }

    /// Moves the nodes and initializers of a body without inputs right before the node that owns it, and points the uses
    /// of that node's outputs at the body's outputs. The node itself stays, unused, with an empty body.
    ///
    /// Names that are borne elsewhere too are made unique. A graph output among the uses takes its name from the body.
    ///
    /// # Panics
    /// If `body` is not a body of `node`, has inputs or sparse initializers, or has fewer outputs than the node.
    pub fn inline_body(&mut self, node: NodeId, body: GraphId) {
        let parent = self.node(node).graph.expect("the node is in a graph");
        assert_eq!(self.graph(body).owner, Owner::Node(node));
        assert!(self.graph(body).inputs.is_empty() && self.graph(body).rest.sparse_initializer.is_empty());
        let at = self.position(parent, node);
        let slot = &mut self.graphs[body.0 as usize];
        let outputs = std::mem::take(&mut slot.outputs);
        let nodes = std::mem::take(&mut slot.nodes);
        let initializers = std::mem::take(&mut slot.initializers);
        let infos = std::mem::take(&mut slot.infos);
        let mut annotations = std::mem::take(&mut slot.rest.quantization_annotation);
        for (index, port) in outputs.iter().enumerate() {
            if let Some(value) = port.value {
                self.drop_user(value, User::Output { graph: body, index });
            }
        }
        let mut moved = initializers.clone();
        for &id in &nodes {
            self.nodes[id.0 as usize].graph = Some(parent);
            moved.extend(self.node(id).outputs.iter().flatten());
        }
        let mut renamed = HashMap::new();
        for value in moved {
            let old = self.value(value).name.clone();
            if self.names.count(&old) > 1 {
                self.rename(value, &old);
                renamed.insert(old, self.value(value).name.clone());
            }
            if parent == self.main {
                self.names.enter_main(&self.values[value.0 as usize].name, value);
            }
        }
        for annotation in &mut annotations {
            let parameters = annotation.quant_parameter_tensor_names.iter_mut().filter_map(|p| p.value.as_mut());
            for name in annotation.tensor_name.iter_mut().chain(parameters) {
                if let Some(new) = renamed.get(name.as_str()) {
                    name.clone_from(new);
                }
            }
        }
        let slot = &mut self.graphs[parent.0 as usize];
        slot.nodes.splice(at..at, nodes);
        slot.initializers.extend(initializers);
        slot.infos.extend(infos);
        slot.rest.quantization_annotation.extend(annotations);
        let results = self.node(node).outputs.clone();
        for (result, port) in results.into_iter().zip(outputs) {
            if let (Some(from), Some(to)) = (result, port.value) {
                self.replace_uses(from, to, |_| true);
            }
        }
    }

    /// Drops functions that `keep` refuses, with everything in them.
    pub fn retain_functions(&mut self, keep: impl Fn(&Function) -> bool) {
        for function in std::mem::take(&mut self.functions) {
            if keep(&function) {
                self.graphs[function.graph.0 as usize].owner = Owner::Function(self.functions.len());
                self.functions.push(function);
            } else {
                self.clear(function.graph);
            }
        }
    }

    /// Drops imports of opsets whose domain `keep` refuses.
    pub fn retain_domains(&mut self, keep: impl Fn(&str) -> bool) {
        self.rest.opset_import.retain(|o| keep(super::canonical_domain(o.domain.as_deref().unwrap_or(""))));
    }

    /// Drops declarations in `value_info` that `keep` refuses; it is given the value, `None` where the name is nobody's.
    pub fn retain_infos(&mut self, graph: GraphId, mut keep: impl FnMut(&Self, Option<ValueId>) -> bool) {
        let mut infos = std::mem::take(&mut self.graphs[graph.0 as usize].infos);
        infos.retain(|port| keep(self, port.value));
        self.graphs[graph.0 as usize].infos = infos;
    }

    /// Drops quantization annotations of tensors whose name `keep` refuses.
    pub fn retain_annotations(&mut self, graph: GraphId, keep: impl Fn(&str) -> bool) {
        let annotations = &mut self.graphs[graph.0 as usize].rest.quantization_annotation;
        annotations.retain(|a| keep(a.tensor_name.as_deref().unwrap_or("")));
    }

    /// Adds a value that `graph` defines; its name is made unique.
    pub(crate) fn new_value(&mut self, graph: GraphId, name: &str, def: Def) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        let name = self.unique_name(name);
        self.names.insert(name.clone(), id, graph == self.main);
        self.values.push(Value { name, ty: None, retyped: false, def, users: Vec::new() });
        id
    }
}
