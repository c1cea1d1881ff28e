//! The hash of what a model computes, which ties plans and statistics to their model.
//!
//! It covers opsets, functions, graphs (inputs and outputs with their types, nodes with their names and
//! attributes) and every tensor by name, type, shape and elements. It does not depend on how tensors are stored (raw,
//! typed, external), nor on anything without influence on results: producer, documentation, metadata, `value_info`, IR
//! version, training information.

use std::fmt::Write;

use prost::Message;
use sha2::{Digest, Sha256};

use super::file::release;
use super::{Attr, Def, GraphId, Model, NodeId, Port, Tensor, ValueId, canonical_domain};
use crate::onnx::{AttributeProto, OperatorSetIdProto, SparseTensorProto, TensorProto, ValueInfoProto};

/// SHA-256 of the model's content, as 64 hexadecimal digits. Reads every weight once and copies one tensor at most.
#[must_use]
pub fn content_hash(model: &Model) -> String {
    let mut hash = ContentHash { model, state: Sha256::new() };
    hash.text("amax model 1");
    hash.imports(&model.rest.opset_import);
    hash.graph(model.main);
    hash.count(model.functions.len());
    for function in &model.functions {
        let rest = &function.rest;
        for text in [&rest.domain, &rest.name, &rest.overload] {
            hash.text(text.as_deref().unwrap_or(""));
        }
        hash.imports(&rest.opset_import);
        hash.count(rest.attribute.len());
        for name in &rest.attribute {
            hash.text(name);
        }
        hash.count(rest.attribute_proto.len());
        for attribute in &rest.attribute_proto {
            hash.attribute(attribute, &[]);
        }
        hash.graph(function.graph);
    }
    let mut digits = String::with_capacity(64);
    for byte in hash.state.finalize() {
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

/// Each item is preceded by its length, so that no two models feed the same bytes.
struct ContentHash<'a> {
    model: &'a Model,
    state: Sha256,
}

impl ContentHash<'_> {
    fn count(&mut self, count: usize) {
        self.state.update((count as u64).to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.state.update(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn message(&mut self, message: &impl Message) {
        self.bytes(&message.encode_to_vec());
    }

    /// In the order of domains, which the order of imports does not change.
    fn imports(&mut self, imports: &[OperatorSetIdProto]) {
        let mut imports: Vec<_> =
            imports.iter().map(|o| (canonical_domain(o.domain.as_deref().unwrap_or("")), o.version)).collect();
        imports.sort_unstable();
        self.count(imports.len());
        for (domain, version) in imports {
            self.text(domain);
            self.bytes(&version.unwrap_or(0).to_le_bytes());
        }
    }

    fn graph(&mut self, id: GraphId) {
        let graph = self.model.graph(id);
        for ports in [&graph.inputs, &graph.outputs] {
            self.count(ports.len());
            for port in ports {
                self.port(port);
            }
        }
        let mut initializers = graph.initializers.clone();
        initializers.sort_by_key(|&v| &self.model.value(v).name);
        self.count(initializers.len());
        for value in initializers {
            self.text(&self.model.value(value).name);
            if let Def::Constant(tensor) | Def::Input { default: Some(tensor) } = &self.model.value(value).def {
                self.tensor(tensor);
            }
        }
        self.count(graph.rest.sparse_initializer.len());
        for sparse in &graph.rest.sparse_initializer {
            self.sparse(sparse);
        }
        self.count(graph.nodes.len());
        for &node in &graph.nodes {
            self.node(node);
        }
    }

    fn port(&mut self, port: &Port) {
        let ValueInfoProto { name, r#type, .. } = self.model.port_proto(port);
        self.text(name.as_deref().unwrap_or(""));
        self.message(&r#type.unwrap_or_default());
    }

    fn node(&mut self, id: NodeId) {
        let node = self.model.node(id);
        for text in [node.name(), node.domain(), node.op_type(), node.rest.overload.as_deref().unwrap_or("")] {
            self.text(text);
        }
        for values in [&node.inputs, &node.outputs] {
            self.count(values.len());
            for &value in values {
                self.name(value);
            }
        }
        let mut attrs: Vec<&Attr> = node.attrs.iter().collect();
        attrs.sort_by_key(|a| a.name());
        self.count(attrs.len());
        for attr in &attrs {
            self.attribute(&attr.proto, &attr.graphs);
        }
    }

    fn name(&mut self, value: Option<ValueId>) {
        self.text(value.map_or("", |v| &self.model.value(v).name));
    }

    fn attribute(&mut self, proto: &AttributeProto, graphs: &[GraphId]) {
        let AttributeProto { t, sparse_tensor, tensors, sparse_tensors, .. } = proto;
        let tensors: Vec<&TensorProto> = t.iter().chain(tensors).collect();
        let sparse: Vec<&SparseTensorProto> = sparse_tensor.iter().chain(sparse_tensors).collect();
        if tensors.is_empty() && sparse.is_empty() && proto.doc_string.is_none() {
            self.message(proto);
        } else {
            let AttributeProto { name, ref_attr_name, r#type, f, i, s, g, tp, floats, ints, strings, .. } = proto;
            self.message(&AttributeProto {
                name: name.clone(),
                ref_attr_name: ref_attr_name.clone(),
                r#type: *r#type,
                f: *f,
                i: *i,
                s: s.clone(),
                g: g.clone(),
                tp: tp.clone(),
                floats: floats.clone(),
                ints: ints.clone(),
                strings: strings.clone(),
                type_protos: proto.type_protos.clone(),
                ..AttributeProto::default()
            });
        }
        self.count(tensors.len());
        for tensor in &tensors {
            self.carried(tensor);
        }
        self.count(sparse.len());
        for sparse in &sparse {
            self.sparse(sparse);
        }
        self.count(graphs.len());
        for &graph in graphs {
            self.graph(graph);
        }
    }

    fn sparse(&mut self, sparse: &SparseTensorProto) {
        let SparseTensorProto { values, indices, dims } = sparse;
        for tensor in [values, indices] {
            self.carried(&tensor.clone().unwrap_or_default());
        }
        self.count(dims.len());
        for d in dims {
            self.bytes(&d.to_le_bytes());
        }
    }

    /// A tensor that was not checked when the model was read.
    fn carried(&mut self, proto: &TensorProto) {
        match Tensor::from_proto(proto.clone(), None) {
            Ok(tensor) => {
                self.text(proto.name.as_deref().unwrap_or(""));
                self.tensor(&tensor);
            }
            Err(_) => self.message(proto),
        }
    }

    fn tensor(&mut self, tensor: &Tensor) {
        self.text(tensor.dtype().name());
        let dims = tensor.dims();
        self.count(dims.len());
        for &d in &dims {
            self.count(d);
        }
        let raw = tensor.raw();
        self.bytes(&raw);
        release(&raw);
        self.count(tensor.strings().len());
        for s in tensor.strings().iter() {
            self.bytes(s);
        }
    }
}
