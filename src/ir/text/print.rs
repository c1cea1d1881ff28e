//! The printer.

use std::fmt::Write;

use super::PrintOptions;
use super::elements::{
    decode, encode, entries_per_element, entry_bits, is_signed, is_small_float, sign_extend, unpack,
};
use super::tokens::{is_float_word, is_identifier, is_type_word};
use crate::ir::Tensor;
use crate::onnx::{
    AttributeProto, DATA_LOCATION_EXTERNAL, DataType, FunctionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, SparseTensorProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_type, tensor_shape_proto, type_proto,
};

/// Lists of inputs and outputs that do not fit into this many columns are printed one per line.
const WIDTH: usize = 100;

pub(super) fn model(model: &ModelProto, options: &PrintOptions) -> String {
    let mut printer = Printer { out: String::new(), indent: 0, options: *options };
    printer.model(model);
    printer.out
}

struct Printer {
    out: String,
    indent: usize,
    options: PrintOptions,
}

impl Printer {
    fn put(&mut self, text: impl AsRef<str>) {
        self.out.push_str(text.as_ref());
    }

    fn line(&mut self) {
        self.out.push('\n');
        self.out.extend(std::iter::repeat_n("  ", self.indent));
    }

    /// One item a line between brackets, the closing one on a line of its own.
    fn block<T>(&mut self, open: &str, items: impl IntoIterator<Item = T>, close: &str, item: fn(&mut Self, T)) {
        self.put(open);
        self.indent += 1;
        for (index, value) in items.into_iter().enumerate() {
            if index > 0 {
                self.put(",");
            }
            self.line();
            item(self, value);
        }
        self.indent -= 1;
        self.line();
        self.put(close);
    }

    fn list<T>(&mut self, items: impl IntoIterator<Item = T>, mut item: impl FnMut(&mut Self, T)) {
        for (index, value) in items.into_iter().enumerate() {
            if index > 0 {
                self.put(", ");
            }
            item(self, value);
        }
    }

    /// A list in parentheses, on one line where it fits.
    fn ports<T: Copy>(&mut self, items: &[T], item: fn(&mut Self, T)) {
        let before = self.out.len();
        let start = self.out.rfind('\n').map_or(0, |at| at + 1);
        self.put("(");
        self.list(items.iter().copied(), item);
        self.put(")");
        if items.len() > 1 && self.out[start..].chars().count() > WIDTH {
            self.out.truncate(before);
            self.block("(", items.iter().copied(), ")", item);
        }
    }

    fn model(&mut self, model: &ModelProto) {
        let mut keys: Vec<String> = Vec::new();
        let number = |name: &str, value: Option<i64>| value.map(|v| format!("{name}: {v}"));
        let text = |name: &str, value: &Option<String>| value.as_ref().map(|v| format!("{name}: {}", quoted(v)));
        keys.extend(number("ir_version", model.ir_version));
        keys.push(format!("opset_import: {}", imports(&model.opset_import)));
        keys.extend(text("producer_name", &model.producer_name));
        keys.extend(text("producer_version", &model.producer_version));
        keys.extend(text("domain", &model.domain));
        keys.extend(number("model_version", model.model_version));
        keys.extend(text("doc_string", &model.doc_string));
        if !model.metadata_props.is_empty() {
            keys.push(format!("metadata_props: {}", pairs(&model.metadata_props)));
        }
        self.block("<", keys, ">", Self::put);
        self.line();
        if let Some(graph) = &model.graph {
            self.graph(graph);
        }
        for function in &model.functions {
            self.line();
            self.function(function);
        }
        self.put("\n");
    }

    fn graph(&mut self, graph: &GraphProto) {
        let name = graph.name.as_deref().unwrap_or("");
        self.put(if is_float_word(name) { quoted(name) } else { identifier(name) });
        self.put(" ");
        let inputs: Vec<_> = graph.input.iter().collect();
        self.ports(&inputs, Self::value_info);
        self.put(" => ");
        let outputs: Vec<_> = graph.output.iter().collect();
        self.ports(&outputs, Self::value_info);
        self.put(" ");
        let mut entries: Vec<Entry> = graph.sparse_initializer.iter().map(Entry::Sparse).collect();
        entries.extend(graph.initializer.iter().map(Entry::Tensor));
        entries.extend(graph.value_info.iter().map(Entry::Info));
        if !entries.is_empty() {
            self.block("<", entries, "> ", Self::entry);
        }
        self.nodes(&graph.node);
    }

    fn entry(&mut self, entry: Entry<'_>) {
        match entry {
            Entry::Sparse(sparse) => {
                let name = sparse.values.as_ref().and_then(|v| v.name.as_deref()).unwrap_or("");
                self.sparse_type(sparse);
                self.put(format!(" {} = ", identifier(name)));
                self.sparse_data(sparse);
            }
            Entry::Tensor(tensor) => {
                self.tensor_type(tensor);
                self.put(format!(" {} = ", identifier(tensor.name.as_deref().unwrap_or(""))));
                self.tensor_data(tensor);
            }
            Entry::Info(info) => self.value_info(info),
        }
    }

    fn function(&mut self, function: &FunctionProto) {
        let mut keys: Vec<String> = Vec::new();
        keys.push(format!("domain: {}", quoted(function.domain.as_deref().unwrap_or(""))));
        keys.extend(function.overload.as_ref().map(|o| format!("overload: {}", quoted(o))));
        keys.push(format!("opset_import: {}", imports(&function.opset_import)));
        keys.extend(function.doc_string.as_ref().map(|d| format!("doc_string: {}", quoted(d))));
        self.block("<", keys, ">", Self::put);
        self.line();
        self.put(identifier(function.name.as_deref().unwrap_or("")));
        self.put(" ");
        if !function.attribute.is_empty() || !function.attribute_proto.is_empty() {
            self.put("<");
            self.list(&function.attribute, |p, name| p.put(identifier(name)));
            if !function.attribute.is_empty() && !function.attribute_proto.is_empty() {
                self.put(", ");
            }
            self.list(&function.attribute_proto, Self::attribute);
            self.put("> ");
        }
        let inputs: Vec<_> = function.input.iter().map(String::as_str).collect();
        self.ports(&inputs, |p, name| p.put(identifier(name)));
        self.put(" => ");
        let outputs: Vec<_> = function.output.iter().map(String::as_str).collect();
        self.ports(&outputs, |p, name| p.put(identifier(name)));
        self.put(" ");
        if !function.value_info.is_empty() {
            self.block("<", &function.value_info, "> ", Self::value_info);
        }
        self.nodes(&function.node);
    }

    fn nodes(&mut self, nodes: &[NodeProto]) {
        self.put("{");
        self.indent += 1;
        for node in nodes {
            self.line();
            self.node(node);
        }
        self.indent -= 1;
        self.line();
        self.put("}");
    }

    fn node(&mut self, node: &NodeProto) {
        if let Some(name) = &node.name {
            self.put(format!("[{}] ", identifier(name)));
        }
        self.list(&node.output, |p, name| p.put(identifier(name)));
        self.put(if node.output.is_empty() { "= " } else { " = " });
        if let Some(domain) = node.domain.as_deref().filter(|d| !d.is_empty()) {
            let plain = domain.split('.').all(is_identifier);
            self.put(if plain { domain.to_owned() } else { quoted(domain) });
            self.put(".");
        }
        self.put(plain_identifier(node.op_type.as_deref().unwrap_or("")));
        if let Some(overload) = node.overload.as_deref().filter(|o| !o.is_empty()) {
            self.put(format!(":{}", plain_identifier(overload)));
        }
        let nested = node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
        if !nested && !node.attribute.is_empty() {
            self.put(" <");
            self.list(&node.attribute, Self::attribute);
            self.put(">");
        }
        self.put(" (");
        self.list(&node.input, |p, name| p.put(identifier(name)));
        self.put(")");
        if nested {
            self.block(" <", &node.attribute, ">", Self::attribute);
        }
    }

    fn attribute(&mut self, attr: &AttributeProto) {
        self.put(plain_identifier(attr.name.as_deref().unwrap_or("")));
        let kind = attr.r#type.filter(|&k| k != 0).or_else(|| kind_of(attr));
        if let Some(name) = &attr.ref_attr_name {
            if let Some(kind) = kind.and_then(kind_name) {
                self.put(format!(": {kind}"));
            }
            self.put(format!(" = @{}", identifier(name)));
            return;
        }
        let kind = kind.unwrap_or(0);
        let empty = match kind {
            attribute_type::FLOATS => attr.floats.is_empty(),
            attribute_type::INTS => attr.ints.is_empty(),
            attribute_type::STRINGS => attr.strings.is_empty(),
            attribute_type::TENSORS => attr.tensors.is_empty(),
            attribute_type::GRAPHS => attr.graphs.is_empty(),
            attribute_type::SPARSE_TENSORS => attr.sparse_tensors.is_empty(),
            attribute_type::TYPE_PROTOS => attr.type_protos.is_empty(),
            _ => false,
        };
        if empty {
            self.put(format!(": {} = []", kind_name(kind).unwrap_or("undefined")));
            return;
        }
        self.put(" = ");
        let is_list = (attribute_type::FLOATS..=attribute_type::GRAPHS).contains(&kind)
            || matches!(kind, attribute_type::SPARSE_TENSORS | attribute_type::TYPE_PROTOS);
        if is_list {
            self.put("[");
        }
        match kind {
            attribute_type::FLOAT => self.put(f32_text(attr.f.unwrap_or(0.0))),
            attribute_type::INT => self.put(attr.i.unwrap_or(0).to_string()),
            attribute_type::STRING => self.put(bytes_text(attr.s.as_deref().unwrap_or_default())),
            attribute_type::TENSOR => self.tensor(&attr.t.clone().unwrap_or_default()),
            attribute_type::GRAPH => self.graph(&attr.g.clone().unwrap_or_default()),
            attribute_type::SPARSE_TENSOR => self.sparse(&attr.sparse_tensor.clone().unwrap_or_default()),
            attribute_type::TYPE_PROTO => self.ty(&attr.tp.clone().unwrap_or_default()),
            attribute_type::FLOATS => self.list(&attr.floats, |p, &v| p.put(f32_text(v))),
            attribute_type::INTS => self.list(&attr.ints, |p, v| p.put(v.to_string())),
            attribute_type::STRINGS => self.list(&attr.strings, |p, v| p.put(bytes_text(v))),
            attribute_type::TENSORS => self.list(&attr.tensors, Self::tensor),
            attribute_type::GRAPHS => self.list(&attr.graphs, Self::graph),
            attribute_type::SPARSE_TENSORS => self.list(&attr.sparse_tensors, Self::sparse),
            attribute_type::TYPE_PROTOS => self.list(&attr.type_protos, Self::ty),
            _ => self.put("undefined"),
        }
        if is_list {
            self.put("]");
        }
    }

    fn value_info(&mut self, info: &ValueInfoProto) {
        if let Some(ty) = info.r#type.as_ref().filter(|t| t.value.is_some()) {
            self.ty(ty);
            self.put(" ");
        }
        self.put(identifier(info.name.as_deref().unwrap_or("")));
    }

    fn ty(&mut self, ty: &TypeProto) {
        match &ty.value {
            None => {}
            Some(type_proto::Value::TensorType(type_proto::Tensor { elem_type, shape })) => {
                self.shaped(*elem_type, shape.as_ref());
            }
            Some(type_proto::Value::SparseTensorType(type_proto::SparseTensor { elem_type, shape })) => {
                self.put("sparse_tensor(");
                self.shaped(*elem_type, shape.as_ref());
                self.put(")");
            }
            Some(type_proto::Value::SequenceType(type_proto::Sequence { elem_type })) => {
                self.put("seq(");
                self.inner(elem_type.as_deref());
                self.put(")");
            }
            Some(type_proto::Value::OptionalType(type_proto::Optional { elem_type })) => {
                self.put("optional(");
                self.inner(elem_type.as_deref());
                self.put(")");
            }
            Some(type_proto::Value::MapType(type_proto::Map { key_type, value_type })) => {
                self.put(format!("map({}", dtype_name(*key_type)));
                if let Some(value) = value_type.as_deref().filter(|v| v.value.is_some()) {
                    self.put(", ");
                    self.ty(value);
                }
                self.put(")");
            }
            Some(type_proto::Value::OpaqueType(type_proto::Opaque { domain, name })) => {
                let (domain, name) = (domain.as_deref().unwrap_or(""), name.as_deref().unwrap_or(""));
                let part = |s: &str| if s.split('.').all(is_identifier) { s.to_owned() } else { quoted(s) };
                self.put("opaque(");
                if !domain.is_empty() {
                    self.put(format!("{}, {}", part(domain), plain_identifier(name)));
                } else if !name.is_empty() {
                    self.put(part(name));
                }
                self.put(")");
            }
        }
    }

    fn inner(&mut self, ty: Option<&TypeProto>) {
        if let Some(ty) = ty {
            self.ty(ty);
        }
    }

    fn shaped(&mut self, elem_type: Option<i32>, shape: Option<&TensorShapeProto>) {
        self.put(dtype_name(elem_type));
        let Some(shape) = shape else {
            self.put("[]");
            return;
        };
        if shape.dim.is_empty() {
            return;
        }
        let dims: Vec<String> = shape
            .dim
            .iter()
            .map(|d| match &d.value {
                Some(tensor_shape_proto::dimension::Value::DimValue(n)) => n.to_string(),
                Some(tensor_shape_proto::dimension::Value::DimParam(name)) => plain_identifier(name),
                None => "?".to_owned(),
            })
            .collect();
        self.put(format!("[{}]", dims.join(",")));
    }

    fn tensor(&mut self, tensor: &TensorProto) {
        self.tensor_type(tensor);
        self.put(" ");
        let portable = self.options.portable;
        if let Some(name) = tensor.name.as_deref().filter(|n| !n.is_empty() && (!portable || is_identifier(n))) {
            self.put(format!("{} ", plain_identifier(name)));
        }
        self.tensor_data(tensor);
    }

    fn tensor_type(&mut self, tensor: &TensorProto) {
        self.put(dtype_name(tensor.data_type));
        self.dims(&tensor.dims);
    }

    fn dims(&mut self, dims: &[i64]) {
        if !dims.is_empty() {
            let dims: Vec<String> = dims.iter().map(i64::to_string).collect();
            self.put(format!("[{}]", dims.join(",")));
        }
    }

    fn tensor_data(&mut self, proto: &TensorProto) {
        if proto.data_location == Some(DATA_LOCATION_EXTERNAL) {
            self.put(pairs(&proto.external_data));
            return;
        }
        // An attribute's tensor is not checked on load, so it may not be one.
        let count = crate::ir::element_count(&proto.dims);
        if count.is_none_or(|n| n > self.options.limit) {
            self.put("...");
            return;
        }
        let Ok(tensor) = Tensor::from_proto(proto.clone(), None) else {
            self.put("...");
            return;
        };
        self.put("{");
        self.elements(&tensor);
        self.put("}");
    }

    fn elements(&mut self, tensor: &Tensor) {
        let dtype = tensor.dtype();
        let Some(bits) = entry_bits(dtype) else {
            self.list(tensor.strings().iter(), |p, s| p.put(bytes_text(s)));
            return;
        };
        let raw = tensor.raw();
        if bits < 8 && self.options.portable {
            self.list(raw.iter(), Self::number);
            return;
        }
        let values = self.options.values && !self.options.portable && is_small_float(dtype);
        let codes = unpack(bits, &raw, tensor.len() * entries_per_element(dtype));
        self.list(codes, |p, code| match dtype {
            DataType::Float | DataType::Complex64 => p.put(short(&f32_text(f32::from_bits(code as u32)))),
            DataType::Double | DataType::Complex128 => p.put(short(&f64_text(f64::from_bits(code)))),
            _ if is_signed(dtype) => p.number(sign_extend(bits, code)),
            _ if values => match decode(dtype, code) {
                Some(v) if !is_odd_nan(v) && encode(dtype, v.into()) == Some(code) => p.put(f32_text(v)),
                _ => p.number(code),
            },
            _ => p.number(code),
        });
    }

    fn number(&mut self, value: impl std::fmt::Display) {
        write!(self.out, "{value}").expect("a string takes all that is written to it");
    }

    fn sparse(&mut self, sparse: &SparseTensorProto) {
        self.sparse_type(sparse);
        self.put(" ");
        self.sparse_data(sparse);
    }

    fn sparse_type(&mut self, sparse: &SparseTensorProto) {
        self.put("sparse_tensor(");
        self.put(dtype_name(sparse.values.as_ref().and_then(|v| v.data_type)));
        self.dims(&sparse.dims);
        self.put(")");
    }

    fn sparse_data(&mut self, sparse: &SparseTensorProto) {
        self.put("{");
        self.list([&sparse.values, &sparse.indices].into_iter().flatten(), Self::tensor);
        self.put("}");
    }
}

/// What stands between `<` and `>` before a graph's nodes.
#[derive(Clone, Copy)]
enum Entry<'a> {
    Sparse(&'a SparseTensorProto),
    Tensor(&'a TensorProto),
    Info(&'a ValueInfoProto),
}

fn dtype_name(code: Option<i32>) -> &'static str {
    code.and_then(DataType::from_code).map_or("undefined", DataType::name)
}

/// A name where a type may stand as well: quoted also where it reads as a type.
fn identifier(name: &str) -> String {
    if is_type_word(name) { quoted(name) } else { plain_identifier(name) }
}

fn plain_identifier(name: &str) -> String {
    if is_identifier(name) { name.to_owned() } else { quoted(name) }
}

fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        if matches!(c, '\\' | '"') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
    out
}

fn bytes_text(bytes: &[u8]) -> String {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return quoted(text);
    }
    let digits: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("hex\"{}\"", digits.concat())
}

fn imports(imports: &[OperatorSetIdProto]) -> String {
    let entry = |OperatorSetIdProto { domain, version }: &OperatorSetIdProto| {
        format!("{}: {}", quoted(domain.as_deref().unwrap_or("")), version.unwrap_or(0))
    };
    format!("[{}]", imports.iter().map(entry).collect::<Vec<_>>().join(", "))
}

fn pairs(pairs: &[StringStringEntryProto]) -> String {
    let entry = |StringStringEntryProto { key, value }: &StringStringEntryProto| {
        format!("{}: {}", quoted(key.as_deref().unwrap_or("")), quoted(value.as_deref().unwrap_or("")))
    };
    format!("[{}]", pairs.iter().map(entry).collect::<Vec<_>>().join(", "))
}

/// The shortest text that reads back as `value`; reads as a float even where it is whole.
fn f32_text(value: f32) -> String {
    match value.to_bits() {
        0x7fc0_0000 => "nan".to_owned(),
        0xffc0_0000 => "-nan".to_owned(),
        bits if value.is_nan() => format!("nan({bits:#x})"),
        _ => format!("{value:?}"),
    }
}

fn f64_text(value: f64) -> String {
    match value.to_bits() {
        0x7ff8_0000_0000_0000 => "nan".to_owned(),
        0xfff8_0000_0000_0000 => "-nan".to_owned(),
        bits if value.is_nan() => format!("nan({bits:#x})"),
        _ => format!("{value:?}"),
    }
}

/// Whether `value` is a NaN other than those that `nan` and `-nan` stand for.
fn is_odd_nan(value: f32) -> bool {
    value.is_nan() && value.to_bits() & 0x7fff_ffff != 0x7fc0_0000
}

/// Without the `.0` that a float tensor does not need.
fn short(text: &str) -> &str {
    text.strip_suffix(".0").unwrap_or(text)
}

/// The kind of an attribute of a file older than the `type` field.
fn kind_of(attr: &AttributeProto) -> Option<i32> {
    let has = [
        (attr.f.is_some(), attribute_type::FLOAT),
        (attr.i.is_some(), attribute_type::INT),
        (attr.s.is_some(), attribute_type::STRING),
        (attr.t.is_some(), attribute_type::TENSOR),
        (attr.g.is_some(), attribute_type::GRAPH),
        (attr.sparse_tensor.is_some(), attribute_type::SPARSE_TENSOR),
        (attr.tp.is_some(), attribute_type::TYPE_PROTO),
        (!attr.floats.is_empty(), attribute_type::FLOATS),
        (!attr.ints.is_empty(), attribute_type::INTS),
        (!attr.strings.is_empty(), attribute_type::STRINGS),
        (!attr.tensors.is_empty(), attribute_type::TENSORS),
        (!attr.graphs.is_empty(), attribute_type::GRAPHS),
        (!attr.sparse_tensors.is_empty(), attribute_type::SPARSE_TENSORS),
        (!attr.type_protos.is_empty(), attribute_type::TYPE_PROTOS),
    ];
    has.into_iter().find(|(set, _)| *set).map(|(_, kind)| kind)
}

/// The name of a kind of attribute in the syntax.
pub(super) fn kind_name(kind: i32) -> Option<&'static str> {
    super::attributes::KINDS.iter().find(|(_, k)| *k == kind).map(|(name, _)| *name)
}
