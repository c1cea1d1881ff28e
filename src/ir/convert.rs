//! `ModelProto` to [`Model`] and back: the two directions mirror each other, and whatever is not modelled is carried.

use std::collections::HashMap;
use std::mem::take;

use bytes::Bytes;

use super::{Attr, Def, Function, GraphId, Model, Names, Node, NodeId, Owner, Port, Tensor, User, Value, ValueId};
use crate::error::{Error, Result};
use crate::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, TypeProto,
    ValueInfoProto,
};

/// Finds the bytes of a tensor that is stored in another file.
pub(super) type External<'a> = &'a mut dyn FnMut(&TensorProto) -> Result<Bytes>;

impl Model {
    /// Builds the model from its message; `external` supplies the bytes of tensors stored in other files.
    ///
    /// Tensors that are carried and not modelled (in attributes, sparse, of training) take in what they have outside.
    ///
    /// # Errors
    /// No graph, a name defined twice, a use of an undefined name, or a tensor that does not fit its shape.
    pub(super) fn from_proto(mut proto: ModelProto, external: External<'_>) -> Result<Self> {
        let Some(graph) = take(&mut proto.graph) else {
            return Err(Error::model("the model has no graph")
                .with_hint("this may not be an ONNX model, or its export was interrupted"));
        };
        let functions = take(&mut proto.functions);
        for training in &mut proto.training_info {
            for graph in training.initialization.iter_mut().chain(&mut training.algorithm) {
                inline_graph(graph, external)?;
            }
        }
        let model = Model {
            rest: proto,
            main: GraphId(0),
            functions: Vec::new(),
            graphs: Vec::new(),
            nodes: Vec::new(),
            values: Vec::new(),
            names: Names::default(),
            node_names: None,
            path: None,
            sources: Vec::new(),
            scratch: None,
            cursor: 0,
        };
        let mut reader = Reader { model, external, scopes: Vec::new() };
        reader.model.main = reader.graph(graph, Owner::Main)?;
        for (index, function) in functions.into_iter().enumerate() {
            reader.function(function, index)?;
        }
        Ok(reader.model)
    }

    /// The message of this model. Tensor bytes are shared, not copied; tensors whose data came from another file are
    /// listed with their bytes in `external`, in the order in which they appear.
    #[must_use]
    pub(crate) fn to_proto(&self, external: &mut dyn FnMut(&mut TensorProto, Bytes)) -> ModelProto {
        let mut proto = self.rest.clone();
        let mut writer = Writer { model: self, external };
        proto.graph = Some(writer.graph(self.main));
        proto.functions = self.functions.iter().map(|f| writer.function(f)).collect();
        proto
    }

    /// Whether a declaration is written: those of removed values are not.
    pub(super) fn port_alive(&self, port: &Port) -> bool {
        port.value.is_none_or(|v| !matches!(self.value(v).def, Def::Removed))
    }

    /// The message of a declaration.
    pub(super) fn port_proto(&self, port: &Port) -> ValueInfoProto {
        let mut info = port.info.clone();
        if let Some(value) = port.value {
            let value = self.value(value);
            if info.name.is_some() || !value.name.is_empty() {
                info.name = Some(value.name.clone());
            }
            if value.retyped {
                info.r#type.clone_from(&value.ty);
            }
        }
        info
    }
}

struct Reader<'a> {
    model: Model,
    external: External<'a>,
    scopes: Vec<(GraphId, HashMap<String, ValueId>)>,
}

impl Reader<'_> {
    fn lookup(&self, name: &str) -> Option<ValueId> {
        self.scopes.iter().rev().find_map(|(_, names)| names.get(name)).copied()
    }

    fn define(&mut self, name: String, ty: Option<TypeProto>, def: Def) -> Result<ValueId> {
        let id = ValueId(self.model.values.len() as u32);
        let (graph, names) = self.scopes.last_mut().expect("inside a graph");
        if names.insert(name.clone(), id).is_some() {
            return Err(Error::model("the name is defined twice in one graph")
                .at_value(&name)
                .with_hint("each tensor may have one producer only; the exporter has a bug"));
        }
        let in_main = *graph == self.model.main && !matches!(def, Def::Sparse);
        self.model.names.insert(name.clone(), id, in_main);
        self.model.values.push(Value { name, ty, retyped: false, def, users: Vec::new() });
        Ok(id)
    }

    fn tensor(&mut self, proto: TensorProto) -> Result<Tensor> {
        let external = if proto.data_location == Some(crate::onnx::DATA_LOCATION_EXTERNAL) {
            Some((self.external)(&proto)?)
        } else {
            None
        };
        Tensor::from_proto(proto, external)
    }

    fn graph(&mut self, mut proto: GraphProto, owner: Owner) -> Result<GraphId> {
        let id = self.open(owner);
        let inputs = take(&mut proto.input);
        let outputs = take(&mut proto.output);
        let infos = take(&mut proto.value_info);
        let nodes = take(&mut proto.node);
        let initializers = take(&mut proto.initializer);
        let graph_name = proto.name.clone().unwrap_or_default();
        for sparse in &mut proto.sparse_initializer {
            inline_sparse(sparse, self.external)?;
            if let Some(name) = sparse.values.as_ref().and_then(|v| v.name.clone()) {
                self.define(name, None, Def::Sparse)?;
            }
        }
        self.model.graphs[id.0 as usize].rest = proto;
        for info in inputs {
            let name = info.name.clone().unwrap_or_default();
            let value = self.define(name, info.r#type.clone(), Def::Input { default: None })?;
            self.model.graphs[id.0 as usize].inputs.push(Port { value: Some(value), info });
        }
        for proto in initializers {
            let name = proto.name.clone().unwrap_or_default();
            let tensor = self.tensor(proto).map_err(|e| e.in_graph(&graph_name))?;
            let value = match self.scopes.last().and_then(|(_, names)| names.get(&name)) {
                Some(&input) => match &mut self.model.values[input.0 as usize].def {
                    Def::Input { default } if default.is_none() => {
                        *default = Some(tensor);
                        input
                    }
                    _ => return Err(Error::model("two initializers have one name").at_value(&name)),
                },
                None => self.define(name, None, Def::Constant(tensor))?,
            };
            self.model.graphs[id.0 as usize].initializers.push(value);
        }
        self.nodes(id, nodes).map_err(|e| e.in_graph(&graph_name))?;
        for (index, info) in outputs.into_iter().enumerate() {
            let name = info.name.clone().unwrap_or_default();
            let Some(value) = self.lookup(&name) else {
                return Err(Error::model("the graph output is not computed by anything")
                    .at_value(&name)
                    .in_graph(&graph_name)
                    .with_hint("the model was cut or renamed; export it again"));
            };
            let slot = &mut self.model.values[value.0 as usize];
            slot.users.push(User::Output { graph: id, index });
            if slot.ty.is_none() {
                slot.ty.clone_from(&info.r#type);
            }
            self.model.graphs[id.0 as usize].outputs.push(Port { value: Some(value), info });
        }
        self.infos(id, infos);
        self.scopes.pop();
        Ok(id)
    }

    fn function(&mut self, mut proto: FunctionProto, index: usize) -> Result<()> {
        let id = self.open(Owner::Function(index));
        let inputs = take(&mut proto.input);
        let outputs = take(&mut proto.output);
        let infos = take(&mut proto.value_info);
        let nodes = take(&mut proto.node);
        let name = proto.name.clone().unwrap_or_default();
        for attribute in &mut proto.attribute_proto {
            inline_attribute(attribute, self.external).map_err(|e| e.in_graph(&name))?;
        }
        self.model.graphs[id.0 as usize].rest.name = Some(name.clone());
        for input in inputs {
            let value = self.define(input, None, Def::Input { default: None })?;
            self.model.graphs[id.0 as usize].inputs.push(Port { value: Some(value), info: ValueInfoProto::default() });
        }
        self.nodes(id, nodes).map_err(|e| e.in_graph(&name))?;
        for (index, output) in outputs.into_iter().enumerate() {
            let Some(value) = self.lookup(&output) else {
                return Err(Error::model("the function output is not computed by anything")
                    .at_value(&output)
                    .in_graph(&name));
            };
            self.model.values[value.0 as usize].users.push(User::Output { graph: id, index });
            self.model.graphs[id.0 as usize].outputs.push(Port { value: Some(value), info: ValueInfoProto::default() });
        }
        self.infos(id, infos);
        self.scopes.pop();
        self.model.functions.push(Function { graph: id, rest: proto });
        Ok(())
    }

    fn open(&mut self, owner: Owner) -> GraphId {
        let id = self.model.open(owner, GraphProto::default());
        self.scopes.push((id, HashMap::new()));
        id
    }

    fn infos(&mut self, graph: GraphId, infos: Vec<ValueInfoProto>) {
        for info in infos {
            let value =
                info.name.as_deref().and_then(|n| self.scopes.last().and_then(|(_, names)| names.get(n)).copied());
            if let Some(value) = value {
                let slot = &mut self.model.values[value.0 as usize];
                if slot.ty.is_none() {
                    slot.ty.clone_from(&info.r#type);
                }
            }
            self.model.graphs[graph.0 as usize].infos.push(Port { value, info });
        }
    }

    /// Defines every output first and links inputs after: nodes need not be sorted to be loaded.
    fn nodes(&mut self, graph: GraphId, protos: Vec<NodeProto>) -> Result<()> {
        let mut linked = Vec::with_capacity(protos.len());
        for mut proto in protos {
            let id = NodeId(self.model.nodes.len() as u32);
            let inputs = take(&mut proto.input);
            let outputs = take(&mut proto.output);
            let attributes = take(&mut proto.attribute);
            let label = label(&proto, &outputs);
            self.model.nodes.push(Node {
                graph: Some(graph),
                inputs: Vec::new(),
                outputs: Vec::new(),
                attrs: Vec::new(),
                rest: proto,
            });
            self.model.graphs[graph.0 as usize].nodes.push(id);
            for (index, name) in outputs.into_iter().enumerate() {
                let value = if name.is_empty() {
                    None
                } else {
                    let op = self.model.node(id).op_type().to_owned();
                    Some(self.define(name, None, Def::Output { node: id, index }).map_err(|e| e.at_node(&label, &op))?)
                };
                self.model.nodes[id.0 as usize].outputs.push(value);
            }
            linked.push((id, inputs, attributes, label));
        }
        for (id, inputs, attributes, label) in linked {
            let op = self.model.node(id).op_type().to_owned();
            for (index, name) in inputs.into_iter().enumerate() {
                let value = if name.is_empty() {
                    None
                } else {
                    let Some(value) = self.lookup(&name) else {
                        return Err(Error::model(format!("input {index} is not defined anywhere"))
                            .at_node(&label, &op)
                            .at_value(&name)
                            .with_hint("the model was cut or renamed; export it again"));
                    };
                    self.model.values[value.0 as usize].users.push(User::Node { node: id, input: index });
                    Some(value)
                };
                self.model.nodes[id.0 as usize].inputs.push(value);
            }
            for attribute in attributes {
                let attr = self.attribute(attribute, id).map_err(|e| e.at_node(&label, &op))?;
                self.model.nodes[id.0 as usize].attrs.push(attr);
            }
        }
        Ok(())
    }

    fn attribute(&mut self, mut proto: AttributeProto, node: NodeId) -> Result<Attr> {
        let mut graphs = Vec::new();
        // The shape of a graph's absence or presence in `g` is kept by leaving an empty message behind.
        if let Some(graph) = proto.g.as_mut() {
            graphs.push(self.graph(take(graph), Owner::Node(node))?);
        }
        for graph in take(&mut proto.graphs) {
            graphs.push(self.graph(graph, Owner::Node(node))?);
        }
        inline_attribute(&mut proto, self.external)?;
        Ok(Attr { proto, graphs })
    }
}

fn inline_tensor(tensor: &mut TensorProto, external: External<'_>) -> Result<()> {
    if tensor.data_location == Some(crate::onnx::DATA_LOCATION_EXTERNAL) {
        tensor.raw_data = Some(external(tensor)?);
        tensor.data_location = None;
        tensor.external_data.clear();
    }
    Ok(())
}

fn inline_sparse(sparse: &mut SparseTensorProto, external: External<'_>) -> Result<()> {
    sparse.values.iter_mut().chain(&mut sparse.indices).try_for_each(|t| inline_tensor(t, external))
}

fn inline_attribute(attribute: &mut AttributeProto, external: External<'_>) -> Result<()> {
    attribute.t.iter_mut().chain(&mut attribute.tensors).try_for_each(|t| inline_tensor(t, external))?;
    let mut sparse = attribute.sparse_tensor.iter_mut().chain(&mut attribute.sparse_tensors);
    sparse.try_for_each(|t| inline_sparse(t, external))?;
    attribute.g.iter_mut().chain(&mut attribute.graphs).try_for_each(|g| inline_graph(g, external))
}

fn inline_graph(graph: &mut GraphProto, external: External<'_>) -> Result<()> {
    graph.initializer.iter_mut().try_for_each(|t| inline_tensor(t, external))?;
    graph.sparse_initializer.iter_mut().try_for_each(|t| inline_sparse(t, external))?;
    graph.node.iter_mut().flat_map(|n| &mut n.attribute).try_for_each(|a| inline_attribute(a, external))
}

fn label(proto: &NodeProto, outputs: &[String]) -> String {
    match proto.name.as_deref() {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => outputs.iter().find(|o| !o.is_empty()).cloned().unwrap_or_default(),
    }
}

struct Writer<'a> {
    model: &'a Model,
    external: &'a mut dyn FnMut(&mut TensorProto, Bytes),
}

impl Writer<'_> {
    fn name(&self, value: ValueId) -> String {
        self.model.value(value).name.clone()
    }

    fn names(&self, values: &[Option<ValueId>]) -> Vec<String> {
        values.iter().map(|v| v.map(|v| self.name(v)).unwrap_or_default()).collect()
    }

    fn graph(&mut self, id: GraphId) -> GraphProto {
        let graph = self.model.graph(id);
        let mut proto = graph.rest.clone();
        proto.input = graph.inputs.iter().map(|p| self.model.port_proto(p)).collect();
        proto.output = graph.outputs.iter().map(|p| self.model.port_proto(p)).collect();
        proto.value_info =
            graph.infos.iter().filter(|p| self.model.port_alive(p)).map(|p| self.model.port_proto(p)).collect();
        proto.initializer = graph.initializers.iter().filter_map(|&v| self.tensor(v)).collect();
        proto.node = graph.nodes.iter().map(|&n| self.node(n)).collect();
        proto
    }

    fn function(&mut self, function: &Function) -> FunctionProto {
        let graph = self.model.graph(function.graph);
        let mut proto = function.rest.clone();
        proto.input = graph.inputs().map(|v| self.name(v)).collect();
        proto.output = graph.outputs().map(|v| self.name(v)).collect();
        proto.value_info =
            graph.infos.iter().filter(|p| self.model.port_alive(p)).map(|p| self.model.port_proto(p)).collect();
        proto.node = graph.nodes.iter().map(|&n| self.node(n)).collect();
        proto
    }

    fn tensor(&mut self, value: ValueId) -> Option<TensorProto> {
        let value = self.model.value(value);
        let (Def::Constant(tensor) | Def::Input { default: Some(tensor) }) = &value.def else { return None };
        let (mut proto, bytes) = tensor.clone().into_proto();
        if proto.name.is_some() || !value.name.is_empty() {
            proto.name = Some(value.name.clone());
        }
        if let Some(bytes) = bytes {
            (self.external)(&mut proto, bytes);
        }
        Some(proto)
    }

    fn node(&mut self, id: NodeId) -> NodeProto {
        let node = self.model.node(id);
        let mut proto = node.rest.clone();
        proto.input = self.names(&node.inputs);
        proto.output = self.names(&node.outputs);
        proto.attribute = node
            .attrs
            .iter()
            .map(|attr| {
                let mut proto = attr.proto.clone();
                let mut graphs = attr.graphs.iter();
                if proto.g.is_some() {
                    proto.g = graphs.next().map(|&g| self.graph(g));
                }
                proto.graphs = graphs.map(|&g| self.graph(g)).collect();
                proto
            })
            .collect();
        proto
    }
}
