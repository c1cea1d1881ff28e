//! Models as bytes: the structure is encoded in memory, weights are streamed.
//!
//! An encoded model is a list of [`Part`]s: bytes of the structure, slices of mapped or new weights, and tensors whose
//! typed data is encoded when its turn comes. Lengths are known before anything is written, so the parts are exactly
//! what prost's `encode_to_vec` gives for the message, which a test holds them to. Messages that hold weights are put
//! together here field by field, in the order of field numbers; all others are prost's.

use std::collections::HashMap;
use std::io::Write;

use bytes::Bytes;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::{EXTERNAL_THRESHOLD, MAX_PROTOBUF, release};
use crate::error::{Error, Kind, Result};
use crate::ir::{Attr, Def, Function, GraphId, Model, NodeId, Tensor, ValueId};
use crate::onnx::{
    AttributeProto, DATA_LOCATION_EXTERNAL, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto,
    StringStringEntryProto, TensorProto,
};

/// Where tensors begin in a data file: readers map them, and pages are the unit of that.
const ALIGNMENT: u64 = 4096;

/// A piece of an encoded model.
enum Part<'a> {
    /// Encoded structure.
    Encoded(Vec<u8>),
    /// Weights.
    Slice(Bytes),
    /// A message that is encoded when it is written, since it holds its weights as typed fields. The name stands in for
    /// the message's own where the tensor was renamed.
    Late(&'a TensorProto, Option<&'a str>),
}

/// An encoded message.
#[derive(Default)]
pub(super) struct Encoding<'a> {
    parts: Vec<Part<'a>>,
    pub(super) len: u64,
}

impl<'a> Encoding<'a> {
    fn tail(&mut self) -> &mut Vec<u8> {
        if !matches!(self.parts.last(), Some(Part::Encoded(_))) {
            self.parts.push(Part::Encoded(Vec::new()));
        }
        match self.parts.last_mut() {
            Some(Part::Encoded(tail)) => tail,
            _ => unreachable!("it was just pushed"),
        }
    }

    /// Appends fields.
    fn fields(&mut self, message: &impl Message) {
        let before = self.tail().len();
        message.encode(self.tail()).expect("a vector grows");
        self.len += (self.tail().len() - before) as u64;
    }

    fn header(&mut self, number: u32, len: u64) {
        let tail = self.tail();
        let before = tail.len();
        encode_key(number, WireType::LengthDelimited, tail);
        encode_varint(len, tail);
        self.len += (self.tail().len() - before) as u64;
    }

    /// Appends a field that is a message.
    fn message(&mut self, number: u32, message: Encoding<'a>) {
        self.header(number, message.len);
        self.len += message.len;
        for part in message.parts {
            match part {
                Part::Encoded(bytes) => self.tail().extend(bytes),
                part => self.parts.push(part),
            }
        }
    }

    fn leaf(&mut self, number: u32, message: &impl Message) {
        self.header(number, message.encoded_len() as u64);
        self.fields(message);
    }

    /// Appends a field of raw bytes.
    fn bytes(&mut self, number: u32, bytes: &Bytes) {
        self.header(number, bytes.len() as u64);
        self.len += bytes.len() as u64;
        self.parts.push(Part::Slice(bytes.clone()));
    }

    pub(super) fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        for part in &self.parts {
            match part {
                Part::Encoded(bytes) => to.write_all(bytes)?,
                Part::Slice(bytes) => write_released(to, bytes)?,
                Part::Late(tensor, None) => to.write_all(&tensor.encode_to_vec())?,
                Part::Late(tensor, Some(name)) => to.write_all(&renamed(tensor, name).encode_to_vec())?,
            }
        }
        Ok(())
    }
}

/// Writes weights piece by piece, so that no more than a piece of a mapped file is in memory.
fn write_released(to: &mut impl Write, bytes: &[u8]) -> std::io::Result<()> {
    const PIECE: usize = 1 << 23;
    for piece in bytes.chunks(PIECE) {
        to.write_all(piece)?;
        release(piece);
    }
    Ok(())
}

fn renamed(tensor: &TensorProto, name: &str) -> TensorProto {
    TensorProto { name: Some(name.to_owned()), ..tensor.clone() }
}

/// The data file of a model: tensors, each from a multiple of [`ALIGNMENT`] on.
pub(super) struct DataFile<'a> {
    /// What the model calls it.
    location: String,
    tensors: Vec<(u64, &'a Tensor)>,
    len: u64,
    /// Where slices were put that more than one tensor shares, by address and length.
    placed: HashMap<(usize, usize), u64>,
}

impl<'a> DataFile<'a> {
    fn new(location: String) -> Self {
        Self { location, tensors: Vec::new(), len: 0, placed: HashMap::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Plans where a tensor goes.
    fn place(&mut self, tensor: &'a Tensor) -> u64 {
        let key = tensor.slice().map(|slice| (slice.as_ptr() as usize, slice.len()));
        if let Some(&offset) = key.and_then(|key| self.placed.get(&key)) {
            return offset;
        }
        let offset = self.len.next_multiple_of(ALIGNMENT);
        self.tensors.push((offset, tensor));
        self.len = offset + tensor.byte_len() as u64;
        if let Some(key) = key {
            self.placed.insert(key, offset);
        }
        offset
    }

    pub(super) fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        let mut at = 0;
        for (offset, tensor) in &self.tensors {
            let gap = usize::try_from(offset - at).expect("less than the alignment");
            to.write_all(&[0; ALIGNMENT as usize][..gap])?;
            let bytes = tensor.raw();
            write_released(to, &bytes)?;
            at = offset + bytes.len() as u64;
        }
        Ok(())
    }
}

struct Encoder<'a, 'd> {
    model: &'a Model,
    /// Where large initializers go, if not into the model.
    data: Option<&'d mut DataFile<'a>>,
}

/// The model with all its weights.
pub(super) fn inline(model: &Model) -> Encoding<'_> {
    Encoder { model, data: None }.model()
}

/// The model with its large initializers in a data file that it calls `location`, and that data file.
pub(super) fn external(model: &Model, location: String) -> (Encoding<'_>, DataFile<'_>) {
    let mut data = DataFile::new(location);
    let mut encoder = Encoder { model, data: Some(&mut data) };
    let encoding = encoder.model();
    (encoding, data)
}

impl<'a> Encoder<'a, '_> {
    fn model(&mut self) -> Encoding<'a> {
        let model = self.model;
        let ModelProto {
            ir_version,
            opset_import,
            producer_name,
            producer_version,
            domain,
            model_version,
            doc_string,
            graph: _,
            metadata_props,
            training_info,
            functions: _,
            configuration,
        } = model.rest.clone();
        let mut out = Encoding::default();
        let head = ModelProto {
            ir_version,
            producer_name,
            producer_version,
            domain,
            model_version,
            doc_string,
            ..ModelProto::default()
        };
        out.fields(&head);
        out.message(7, self.graph(model.main));
        out.fields(&ModelProto { opset_import, metadata_props, training_info, ..ModelProto::default() });
        for function in &model.functions {
            out.message(25, self.function(function));
        }
        out.fields(&ModelProto { configuration, ..ModelProto::default() });
        out
    }

    fn graph(&mut self, id: GraphId) -> Encoding<'a> {
        let model = self.model;
        let graph = model.graph(id);
        let GraphProto {
            node: _,
            name,
            initializer: _,
            sparse_initializer,
            doc_string,
            input: _,
            output: _,
            value_info: _,
            quantization_annotation,
            metadata_props,
        } = &graph.rest;
        let mut out = Encoding::default();
        for &node in &graph.nodes {
            out.message(1, self.node(node));
        }
        out.fields(&GraphProto { name: name.clone(), ..GraphProto::default() });
        for &value in &graph.initializers {
            self.initializer(value, &mut out);
        }
        out.fields(&GraphProto { doc_string: doc_string.clone(), ..GraphProto::default() });
        for (number, ports) in [(11, &graph.inputs), (12, &graph.outputs), (13, &graph.infos)] {
            for port in ports.iter().filter(|p| number != 13 || model.port_alive(p)) {
                out.leaf(number, &model.port_proto(port));
            }
        }
        for annotation in quantization_annotation {
            out.leaf(14, annotation);
        }
        for sparse in sparse_initializer {
            out.message(15, Self::sparse(sparse));
        }
        out.fields(&GraphProto { metadata_props: metadata_props.clone(), ..GraphProto::default() });
        out
    }

    fn function(&mut self, function: &'a Function) -> Encoding<'a> {
        let model = self.model;
        let graph = model.graph(function.graph);
        let FunctionProto {
            name,
            input: _,
            output: _,
            attribute,
            attribute_proto,
            node: _,
            doc_string,
            opset_import,
            domain,
            overload,
            value_info: _,
            metadata_props,
        } = function.rest.clone();
        let names = |values: &mut dyn Iterator<Item = ValueId>| values.map(|v| model.value(v).name.clone()).collect();
        let mut out = Encoding::default();
        out.fields(&FunctionProto {
            name,
            input: names(&mut graph.inputs()),
            output: names(&mut graph.outputs()),
            attribute,
            ..FunctionProto::default()
        });
        for &node in &graph.nodes {
            out.message(7, self.node(node));
        }
        let value_info = graph.infos.iter().filter(|p| model.port_alive(p)).map(|p| model.port_proto(p)).collect();
        out.fields(&FunctionProto {
            attribute_proto,
            doc_string,
            opset_import,
            domain,
            overload,
            value_info,
            metadata_props,
            ..FunctionProto::default()
        });
        out
    }

    fn node(&mut self, id: NodeId) -> Encoding<'a> {
        let node = self.model.node(id);
        let NodeProto {
            input: _,
            output: _,
            name,
            op_type,
            domain,
            overload,
            attribute: _,
            doc_string,
            metadata_props,
            device_configurations,
        } = node.rest.clone();
        let names = |values: &[Option<ValueId>]| {
            values.iter().map(|v| v.map(|v| self.model.value(v).name.clone()).unwrap_or_default()).collect()
        };
        let mut out = Encoding::default();
        out.fields(&NodeProto {
            input: names(&node.inputs),
            output: names(&node.outputs),
            name,
            op_type,
            ..NodeProto::default()
        });
        for attr in &node.attrs {
            out.message(5, self.attribute(attr));
        }
        out.fields(&NodeProto {
            domain,
            overload,
            doc_string,
            metadata_props,
            device_configurations,
            ..NodeProto::default()
        });
        out
    }

    fn attribute(&mut self, attr: &'a Attr) -> Encoding<'a> {
        let mut out = Encoding::default();
        let AttributeProto {
            name,
            ref_attr_name,
            doc_string,
            r#type,
            f,
            i,
            s,
            t,
            g,
            sparse_tensor,
            tp,
            floats,
            ints,
            strings,
            tensors,
            graphs: _,
            sparse_tensors,
            type_protos,
        } = &attr.proto;
        let sparse = sparse_tensor.is_some() || !sparse_tensors.is_empty();
        if t.is_none() && tensors.is_empty() && attr.graphs.is_empty() && !sparse {
            out.fields(&attr.proto);
            return out;
        }
        let mut graphs = attr.graphs.iter();
        out.fields(&AttributeProto { name: name.clone(), f: *f, i: *i, s: s.clone(), ..AttributeProto::default() });
        if let Some(tensor) = t {
            out.message(5, Self::tensor(tensor, None));
        }
        if g.is_some()
            && let Some(&graph) = graphs.next()
        {
            out.message(6, self.graph(graph));
        }
        out.fields(&AttributeProto {
            floats: floats.clone(),
            ints: ints.clone(),
            strings: strings.clone(),
            ..AttributeProto::default()
        });
        for tensor in tensors {
            out.message(10, Self::tensor(tensor, None));
        }
        for &graph in graphs {
            out.message(11, self.graph(graph));
        }
        out.fields(&AttributeProto {
            doc_string: doc_string.clone(),
            tp: tp.clone(),
            type_protos: type_protos.clone(),
            r#type: *r#type,
            ref_attr_name: ref_attr_name.clone(),
            ..AttributeProto::default()
        });
        if let Some(tensor) = sparse_tensor {
            out.message(22, Self::sparse(tensor));
        }
        for tensor in sparse_tensors {
            out.message(23, Self::sparse(tensor));
        }
        out
    }

    fn sparse(sparse: &'a SparseTensorProto) -> Encoding<'a> {
        let SparseTensorProto { values, indices, dims } = sparse;
        let mut out = Encoding::default();
        for (number, tensor) in [(1, values), (2, indices)] {
            if let Some(tensor) = tensor {
                out.message(number, Self::tensor(tensor, None));
            }
        }
        out.fields(&SparseTensorProto { dims: dims.clone(), ..SparseTensorProto::default() });
        out
    }

    fn initializer(&mut self, value: ValueId, out: &mut Encoding<'a>) {
        let value = self.model.value(value);
        let (Def::Constant(tensor) | Def::Input { default: Some(tensor) }) = &value.def else { return };
        let proto = tensor.proto();
        let name = (proto.name.as_deref().unwrap_or("") != value.name).then_some(&*value.name);
        let external = self.data.as_mut().filter(|_| tensor.byte_len() >= EXTERNAL_THRESHOLD);
        if external.is_none() && !tensor.is_external() {
            out.message(5, Self::tensor(proto, name));
            return;
        }
        // Without its data, and with what may be said about external data replaced.
        let mut bare = TensorProto {
            dims: proto.dims.clone(),
            data_type: proto.data_type,
            segment: proto.segment.clone(),
            name: name.map(str::to_owned).or_else(|| proto.name.clone()),
            doc_string: proto.doc_string.clone(),
            metadata_props: proto.metadata_props.clone(),
            ..TensorProto::default()
        };
        let Some(data) = external else {
            let (head, tail) = around_raw_data(bare);
            let mut message = Encoding::default();
            message.fields(&head);
            message.bytes(9, &tensor.raw());
            message.fields(&tail);
            out.message(5, message);
            return;
        };
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
        let offset = data.place(tensor);
        bare.data_location = Some(DATA_LOCATION_EXTERNAL);
        bare.external_data = vec![
            entry("location", data.location.clone()),
            entry("offset", offset.to_string()),
            entry("length", tensor.byte_len().to_string()),
        ];
        out.leaf(5, &bare);
    }

    fn tensor(proto: &'a TensorProto, name: Option<&'a str>) -> Encoding<'a> {
        let mut out = Encoding::default();
        let TensorProto {
            dims: _,
            data_type: _,
            segment: _,
            float_data,
            int32_data,
            string_data,
            int64_data,
            name: own_name,
            doc_string: _,
            raw_data,
            external_data: _,
            data_location: _,
            double_data,
            uint64_data,
            metadata_props: _,
        } = proto;
        let typed = !(float_data.is_empty()
            && int32_data.is_empty()
            && string_data.is_empty()
            && int64_data.is_empty()
            && double_data.is_empty()
            && uint64_data.is_empty());
        if let (false, Some(raw)) = (typed, raw_data) {
            let bare = TensorProto { raw_data: None, ..proto.clone() };
            let bare = name.map(|name| renamed(&bare, name)).unwrap_or(bare);
            let (head, tail) = around_raw_data(bare);
            out.fields(&head);
            out.bytes(9, raw);
            out.fields(&tail);
        } else {
            let with_own_name = proto.encoded_len() as u64;
            out.len = match name {
                None => with_own_name,
                Some(name) => with_own_name - name_len(own_name.as_deref()) + name_len(Some(name)),
            };
            out.parts.push(Part::Late(proto, name));
        }
        out
    }
}

/// Encoded length of a tensor's name field.
fn name_len(name: Option<&str>) -> u64 {
    let name = name.map(str::to_owned);
    TensorProto { name, ..TensorProto::default() }.encoded_len() as u64
}

/// The fields of a tensor without data that come before and after its raw data.
fn around_raw_data(bare: TensorProto) -> (TensorProto, TensorProto) {
    let TensorProto {
        dims, data_type, segment, name, doc_string, external_data, data_location, metadata_props, ..
    } = bare;
    let head = TensorProto { dims, data_type, segment, name, ..TensorProto::default() };
    let tail = TensorProto { doc_string, external_data, data_location, metadata_props, ..TensorProto::default() };
    (head, tail)
}

/// See [`super::estimated_size`].
pub(super) fn inline_size(model: &Model) -> u64 {
    inline(model).len
}

/// See [`super::to_bytes`].
pub(super) fn to_bytes(model: &Model) -> Result<Vec<u8>> {
    let mut inline = |proto: &mut TensorProto, bytes: Bytes| {
        proto.data_location = None;
        proto.external_data.clear();
        proto.raw_data = Some(bytes);
    };
    let proto = model.to_proto(&mut inline);
    match proto.encoded_len() as u64 {
        len if len > MAX_PROTOBUF => Err(too_large(len, MAX_PROTOBUF)),
        _ => Ok(proto.encode_to_vec()),
    }
}

pub(super) fn too_large(len: u64, max: u64) -> Error {
    Error::new(Kind::Output, format!("the model takes {len} bytes, but one protobuf holds at most {max}"))
}
