//! The model: graphs, nodes and values in model-wide arenas.
//!
//! A graph is a `GraphProto` whose names became ids. Because the arenas span the whole model, a value that an
//! `If`/`Loop`/`Scan` body captures is simply an outer [`ValueId`], and uses are exact across scopes.
//!
//! - A graph output is a [`User`] of its value, so "is it used elsewhere" needs no special case.
//! - An initializer that is also a graph input can be overridden at run time: it is [`Def::Input`] with a default,
//!   never [`Def::Constant`].
//! - Whatever a message says that is not modelled here stays in its `rest`, and is written back as it was.
//! - Topology is changed only by the functions in [`edit`](self); everything else reads.
//!
//! Ids of removed nodes stay valid but belong to no graph.

mod convert;
mod dtype;
mod edit;
mod extract;
pub mod file;
pub mod hash;
mod names;
mod scratch;
mod tensor;
pub mod text;
pub mod verify;
pub mod view;
pub mod walk;

use std::collections::HashMap;
use std::path::PathBuf;

use bytes::Bytes;

pub use edit::{NewNode, Place};
pub use hash::content_hash;
use names::Names;
pub use scratch::{LARGE_MODEL, Scratch};
pub use tensor::{Tensor, element_count};

use crate::onnx::{
    AttributeProto, DataType, FunctionProto, GraphProto, ModelProto, NodeProto, TensorAnnotation, TensorShapeProto,
    TypeProto, ValueInfoProto, attribute_type, tensor_shape_proto, type_proto,
};

/// A graph of the model: the main one, the body of a node's attribute, or the body of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GraphId(pub(crate) u32);

/// A node of some graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

/// A value: a graph input, an initializer, or the output of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(crate) u32);

/// A loaded model.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) rest: ModelProto,
    pub(crate) main: GraphId,
    pub(crate) functions: Vec<Function>,
    pub(crate) graphs: Vec<Graph>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) values: Vec<Value>,
    names: Names,
    /// Names that nodes bore, once a node was inserted, with the least number behind them that may be free.
    pub(crate) node_names: Option<HashMap<String, usize>>,
    pub(crate) path: Option<PathBuf>,
    /// Files its external data came from.
    pub(crate) sources: Vec<PathBuf>,
    /// Where new tensors are held, if not in memory.
    pub(crate) scratch: Option<std::sync::Arc<Scratch>>,
    /// Where the last node was found in its graph's list.
    pub(crate) cursor: usize,
}

/// A model-local function: a graph without captures.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its body.
    pub graph: GraphId,
    pub(crate) rest: FunctionProto,
}

/// Where a graph hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The model's main graph.
    Main,
    /// An attribute of this node.
    Node(NodeId),
    /// A function, by its position.
    Function(usize),
}

/// A graph. Its nodes are listed in the order of the file.
#[derive(Clone, Debug)]
pub struct Graph {
    pub(crate) owner: Owner,
    pub(crate) inputs: Vec<Port>,
    pub(crate) outputs: Vec<Port>,
    pub(crate) nodes: Vec<NodeId>,
    pub(crate) initializers: Vec<ValueId>,
    pub(crate) infos: Vec<Port>,
    pub(crate) rest: GraphProto,
}

/// A value with the declaration it has as an input, an output or in `value_info`.
#[derive(Clone, Debug)]
pub struct Port {
    /// The value; `None` for a `value_info` entry that names nothing.
    pub(crate) value: Option<ValueId>,
    pub(crate) info: ValueInfoProto,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    pub(crate) graph: Option<GraphId>,
    pub(crate) inputs: Vec<Option<ValueId>>,
    pub(crate) outputs: Vec<Option<ValueId>>,
    pub(crate) attrs: Vec<Attr>,
    pub(crate) rest: NodeProto,
}

/// An attribute; graphs in it live in the model's arena.
#[derive(Clone, Debug)]
pub struct Attr {
    pub(crate) proto: AttributeProto,
    pub(crate) graphs: Vec<GraphId>,
}

/// A value.
#[derive(Clone, Debug)]
pub struct Value {
    pub(crate) name: String,
    pub(crate) ty: Option<TypeProto>,
    pub(crate) retyped: bool,
    pub(crate) def: Def,
    pub(crate) users: Vec<User>,
}

/// What gives a value its content.
#[derive(Clone, Debug)]
pub enum Def {
    /// A graph input, with the default that an initializer of the same name gives it.
    Input {
        /// Used when the caller gives nothing; not a constant.
        default: Option<Tensor>,
    },
    /// An initializer.
    Constant(Tensor),
    /// A sparse initializer; carried, never interpreted.
    Sparse,
    /// An output of a node.
    Output {
        /// The producer.
        node: NodeId,
        /// Which of its outputs.
        index: usize,
    },
    /// Removed from its graph.
    Removed,
}

/// A use of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// Input `input` of a node.
    Node {
        /// The consumer.
        node: NodeId,
        /// Which of its inputs.
        input: usize,
    },
    /// Output `index` of a graph.
    Output {
        /// The graph.
        graph: GraphId,
        /// Which of its outputs.
        index: usize,
    },
}

impl Model {
    /// The main graph.
    #[must_use]
    pub fn main(&self) -> GraphId {
        self.main
    }

    /// The model-local functions.
    #[must_use]
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// The file the model was loaded from.
    #[must_use]
    pub fn path(&self) -> Option<&std::path::Path> {
        self.path.as_deref()
    }

    /// A graph.
    #[must_use]
    pub fn graph(&self, id: GraphId) -> &Graph {
        &self.graphs[id.0 as usize]
    }

    /// A node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// A value.
    #[must_use]
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// IR version of the file.
    #[must_use]
    pub fn ir_version(&self) -> i64 {
        self.rest.ir_version.unwrap_or(0)
    }

    /// Sets the IR version.
    pub fn set_ir_version(&mut self, version: i64) {
        self.rest.ir_version = Some(version);
    }

    /// Version of the default opset (`ai.onnx`), if the model imports it.
    #[must_use]
    pub fn opset(&self) -> Option<i64> {
        self.domain_version("")
    }

    /// Version of a domain's opset; `""` and `"ai.onnx"` are one domain.
    #[must_use]
    pub fn domain_version(&self, domain: &str) -> Option<i64> {
        let domain = canonical_domain(domain);
        self.rest
            .opset_import
            .iter()
            .find(|o| canonical_domain(o.domain.as_deref().unwrap_or("")) == domain)
            .and_then(|o| o.version)
    }

    /// Version of the default opset that holds inside `graph`: a function imports its own.
    #[must_use]
    pub fn opset_in(&self, graph: GraphId) -> Option<i64> {
        let mut at = graph;
        loop {
            match self.graph(at).owner {
                Owner::Main => return self.opset(),
                Owner::Function(index) => {
                    let imports = &self.functions[index].rest.opset_import;
                    return imports
                        .iter()
                        .find(|o| canonical_domain(o.domain.as_deref().unwrap_or("")).is_empty())
                        .and_then(|o| o.version)
                        .or_else(|| self.opset());
                }
                Owner::Node(node) => at = self.node(node).graph?,
            }
        }
    }

    /// Imports `domain` at `version`, or changes the version it is imported at.
    pub fn set_domain_version(&mut self, domain: &str, version: i64) {
        let wanted = canonical_domain(domain);
        let found =
            self.rest.opset_import.iter_mut().find(|o| canonical_domain(o.domain.as_deref().unwrap_or("")) == wanted);
        match found {
            Some(import) => import.version = Some(version),
            None => self
                .rest
                .opset_import
                .push(crate::onnx::OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(version) }),
        }
    }

    /// Everything of the model message that is not a graph or a function.
    #[must_use]
    pub fn header(&self) -> &ModelProto {
        &self.rest
    }

    /// Sets a metadata entry, replacing one of the same key.
    pub fn set_metadata(&mut self, key: &str, value: &str) {
        let props = &mut self.rest.metadata_props;
        match props.iter_mut().find(|p| p.key.as_deref() == Some(key)) {
            Some(entry) => entry.value = Some(value.to_owned()),
            None => props
                .push(crate::onnx::StringStringEntryProto { key: Some(key.to_owned()), value: Some(value.to_owned()) }),
        }
    }

    /// A constant's tensor: an initializer that nobody can override.
    #[must_use]
    pub fn constant(&self, value: ValueId) -> Option<&Tensor> {
        match &self.value(value).def {
            Def::Constant(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The tensor at input `index` of a node, where that input is present and constant.
    #[must_use]
    pub fn constant_input(&self, node: NodeId, index: usize) -> Option<&Tensor> {
        self.constant(self.node(node).input(index)?)
    }

    /// The node that produces a value.
    #[must_use]
    pub fn producer(&self, value: ValueId) -> Option<NodeId> {
        match self.value(value).def {
            Def::Output { node, .. } => Some(node),
            _ => None,
        }
    }

    /// The node's name, or its first output's where it has none. Names nodes in patterns and messages.
    #[must_use]
    pub fn node_name(&self, id: NodeId) -> &str {
        let node = self.node(id);
        match node.rest.name.as_deref() {
            Some(name) if !name.is_empty() => name,
            _ => node.outputs.iter().flatten().next().map_or("", |&v| self.value(v).name()),
        }
    }

    /// Element type of a value, where it is known and a tensor.
    #[must_use]
    pub fn dtype(&self, value: ValueId) -> Option<DataType> {
        let value = self.value(value);
        if let Def::Constant(tensor) | Def::Input { default: Some(tensor) } = &value.def {
            return Some(tensor.dtype());
        }
        DataType::from_code(value.tensor_type()?.elem_type?)
    }

    /// Shape of a value, where its rank is known; `None` for dimensions that are symbolic or unknown.
    #[must_use]
    pub fn shape(&self, value: ValueId) -> Option<Vec<Option<usize>>> {
        let value = self.value(value);
        if let Def::Constant(tensor) = &value.def {
            return Some(tensor.dims().into_iter().map(Some).collect());
        }
        let shape = value.tensor_type()?.shape.as_ref()?;
        Some(
            shape
                .dim
                .iter()
                .map(|d| match d.value {
                    Some(tensor_shape_proto::dimension::Value::DimValue(n)) => usize::try_from(n).ok(),
                    _ => None,
                })
                .collect(),
        )
    }

    /// Whether the element type of a tensor and all its dimensions are known.
    pub(crate) fn is_declared(&self, value: ValueId) -> bool {
        let value = self.value(value);
        let known = |d: &tensor_shape_proto::Dimension| {
            matches!(d.value, Some(tensor_shape_proto::dimension::Value::DimValue(0..)))
        };
        matches!(value.def, Def::Constant(_))
            || value.tensor_type().is_some_and(|t| {
                t.elem_type.is_some_and(|code| code > 0) && t.shape.as_ref().is_some_and(|s| s.dim.iter().all(known))
            })
    }

    /// The value of this name that the main graph defines, unless it is sparse, or the only one of the model, in a body.
    #[must_use]
    pub fn value_named(&self, name: &str) -> Option<ValueId> {
        self.names.meant(name)
    }

    /// The node that gives the value of this name.
    #[must_use]
    pub fn producer_named(&self, name: &str) -> Option<NodeId> {
        self.producer(self.value_named(name)?)
    }
}

impl Function {
    /// Attributes that it has where a call gives none.
    #[must_use]
    pub fn defaults(&self) -> &[AttributeProto] {
        &self.rest.attribute_proto
    }

    /// What a node of this domain, operator and overload calls.
    #[must_use]
    pub fn key(&self) -> (&str, &str, &str) {
        let FunctionProto { domain, name, overload, .. } = &self.rest;
        let [domain, name, overload] = [domain, name, overload].map(|field| field.as_deref().unwrap_or(""));
        (canonical_domain(domain), name, overload)
    }
}

impl Graph {
    /// Where this graph hangs.
    #[must_use]
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Name of the graph.
    #[must_use]
    pub fn name(&self) -> &str {
        self.rest.name.as_deref().unwrap_or("")
    }

    /// Nodes in the order of the file.
    #[must_use]
    pub fn nodes(&self) -> &[NodeId] {
        &self.nodes
    }

    /// Inputs, those with defaults included.
    ///
    /// # Panics
    /// Never: every input defines a value.
    pub fn inputs(&self) -> impl ExactSizeIterator<Item = ValueId> + '_ {
        self.inputs.iter().map(|p| p.value.expect("inputs define their values"))
    }

    /// Outputs.
    ///
    /// # Panics
    /// If the graph belongs to a removed node.
    pub fn outputs(&self) -> impl ExactSizeIterator<Item = ValueId> + '_ {
        self.outputs.iter().map(|p| p.value.expect("outputs were resolved"))
    }

    /// Quantization parameters attached to tensors by name.
    #[must_use]
    pub fn annotations(&self) -> &[TensorAnnotation] {
        &self.rest.quantization_annotation
    }

    /// Values declared in `value_info`; `None` where an entry names nothing.
    pub fn infos(&self) -> impl ExactSizeIterator<Item = Option<ValueId>> + '_ {
        self.infos.iter().map(|p| p.value)
    }

    /// Whether it has sparse initializers.
    #[must_use]
    pub fn has_sparse(&self) -> bool {
        !self.rest.sparse_initializer.is_empty()
    }

    /// Initializers, those that are defaults of inputs included.
    #[must_use]
    pub fn initializers(&self) -> &[ValueId] {
        &self.initializers
    }
}

impl Node {
    /// The graph it is in; `None` once removed.
    #[must_use]
    pub fn graph(&self) -> Option<GraphId> {
        self.graph
    }

    /// Name; often empty (see [`Model::node_name`]).
    #[must_use]
    pub fn name(&self) -> &str {
        self.rest.name.as_deref().unwrap_or("")
    }

    /// Operator.
    #[must_use]
    pub fn op_type(&self) -> &str {
        self.rest.op_type.as_deref().unwrap_or("")
    }

    /// Domain; empty for the default one, however the file spells that.
    #[must_use]
    pub fn domain(&self) -> &str {
        canonical_domain(self.rest.domain.as_deref().unwrap_or(""))
    }

    /// Which of several functions of the same domain and name it calls; mostly empty.
    #[must_use]
    pub fn overload(&self) -> &str {
        self.rest.overload.as_deref().unwrap_or("")
    }

    /// Whether it is `op` of the default domain.
    #[must_use]
    pub fn is(&self, op: &str) -> bool {
        self.op_type() == op && self.domain().is_empty()
    }

    /// Input `index`; `None` where it is left out or beyond the last.
    #[must_use]
    pub fn input(&self, index: usize) -> Option<ValueId> {
        self.inputs.get(index).copied().flatten()
    }

    /// All inputs, left-out ones as `None`.
    #[must_use]
    pub fn inputs(&self) -> &[Option<ValueId>] {
        &self.inputs
    }

    /// Output `index`; `None` where it is left out or beyond the last.
    #[must_use]
    pub fn output(&self, index: usize) -> Option<ValueId> {
        self.outputs.get(index).copied().flatten()
    }

    /// All outputs, left-out ones as `None`.
    #[must_use]
    pub fn outputs(&self) -> &[Option<ValueId>] {
        &self.outputs
    }

    /// Attributes.
    #[must_use]
    pub fn attrs(&self) -> &[Attr] {
        &self.attrs
    }

    /// The attribute of this name.
    #[must_use]
    pub fn attr(&self, name: &str) -> Option<&Attr> {
        self.attrs.iter().find(|a| a.name() == name)
    }

    /// An integer attribute.
    #[must_use]
    pub fn int(&self, name: &str) -> Option<i64> {
        self.attr(name)?.proto.i
    }

    /// A float attribute.
    #[must_use]
    pub fn float(&self, name: &str) -> Option<f32> {
        self.attr(name)?.proto.f
    }

    /// An integer list attribute.
    #[must_use]
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        self.attr(name).map(|a| a.proto.ints.as_slice())
    }

    /// A string attribute, where it is UTF-8.
    #[must_use]
    pub fn string(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.attr(name)?.proto.s.as_ref()?).ok()
    }

    /// Bodies in its attributes, in attribute order.
    pub fn bodies(&self) -> impl Iterator<Item = GraphId> + '_ {
        self.attrs.iter().flat_map(|a| a.graphs.iter().copied())
    }
}

impl Attr {
    /// Name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.proto.name.as_deref().unwrap_or("")
    }

    /// The message, without graphs.
    #[must_use]
    pub fn proto(&self) -> &AttributeProto {
        &self.proto
    }

    /// The graphs.
    #[must_use]
    pub fn graphs(&self) -> &[GraphId] {
        &self.graphs
    }

    fn with(name: &str, kind: i32, fill: impl FnOnce(&mut AttributeProto)) -> AttributeProto {
        let mut proto = AttributeProto { name: Some(name.to_owned()), r#type: Some(kind), ..AttributeProto::default() };
        fill(&mut proto);
        proto
    }

    /// An integer attribute.
    #[must_use]
    pub fn int(name: &str, value: i64) -> AttributeProto {
        Self::with(name, attribute_type::INT, |p| p.i = Some(value))
    }

    /// A float attribute.
    #[must_use]
    pub fn float(name: &str, value: f32) -> AttributeProto {
        Self::with(name, attribute_type::FLOAT, |p| p.f = Some(value))
    }

    /// An integer list attribute.
    #[must_use]
    pub fn ints(name: &str, values: &[i64]) -> AttributeProto {
        Self::with(name, attribute_type::INTS, |p| p.ints = values.to_vec())
    }

    /// A string attribute.
    #[must_use]
    pub fn string(name: &str, value: &str) -> AttributeProto {
        Self::with(name, attribute_type::STRING, |p| p.s = Some(Bytes::copy_from_slice(value.as_bytes())))
    }
}

impl Value {
    /// Name, unique in the scopes where it is visible.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Declared type.
    #[must_use]
    pub fn ty(&self) -> Option<&TypeProto> {
        self.ty.as_ref()
    }

    /// What defines it.
    #[must_use]
    pub fn def(&self) -> &Def {
        &self.def
    }

    /// Every use, in no particular order of meaning.
    #[must_use]
    pub fn users(&self) -> &[User] {
        &self.users
    }

    /// Declared shape, where it is a tensor of known rank.
    #[must_use]
    pub fn shape_proto(&self) -> Option<&TensorShapeProto> {
        self.tensor_type()?.shape.as_ref()
    }

    fn tensor_type(&self) -> Option<&type_proto::Tensor> {
        match self.ty.as_ref()?.value.as_ref()? {
            type_proto::Value::TensorType(t) => Some(t),
            _ => None,
        }
    }
}

/// A tensor type of fixed or unknown dimensions.
#[must_use]
pub fn tensor_type(dtype: DataType, shape: Option<&[Option<usize>]>) -> TypeProto {
    let shape = shape.map(|dims| TensorShapeProto {
        dim: dims
            .iter()
            .map(|d| tensor_shape_proto::Dimension {
                value: d.map(|n| tensor_shape_proto::dimension::Value::DimValue(n as i64)),
                denotation: None,
            })
            .collect(),
    });
    TypeProto {
        value: Some(type_proto::Value::TensorType(type_proto::Tensor { elem_type: Some(dtype.code()), shape })),
        denotation: None,
    }
}

/// `"ai.onnx"` and `""` are the same domain.
#[must_use]
pub fn canonical_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}
