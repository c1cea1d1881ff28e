//! Writing models: the structure is encoded in memory, weights are streamed.
//!
//! An encoded model is a list of [`Part`]s: bytes of the structure, slices of mapped or new weights, and tensors whose
//! typed data is encoded when its turn comes. Lengths are known before anything is written, so the parts are exactly
//! what prost's `encode_to_vec` gives for the message, which a test holds them to. Messages that hold weights are put
//! together here field by field, in the order of field numbers; all others are prost's.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::staged::Staged;
use super::{EXTERNAL_THRESHOLD, External, MAX_PROTOBUF, SaveOptions, folder_of, inputs, release};
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
struct Encoding<'a> {
    parts: Vec<Part<'a>>,
    len: u64,
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

    fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
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
struct DataFile<'a> {
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

    fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
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

struct Encoder<'a> {
    model: &'a Model,
    /// Where large initializers go, if not into the model.
    data: Option<DataFile<'a>>,
}

impl<'a> Encoder<'a> {
    fn inline(model: &'a Model) -> Encoding<'a> {
        Self { model, data: None }.model()
    }

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
    Encoder::inline(model).len
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

fn too_large(len: u64, max: u64) -> Error {
    Error::new(Kind::Output, format!("the model takes {len} bytes, but one protobuf holds at most {max}"))
}

/// See [`super::save_with`].
pub(super) fn save(model: &Model, path: &Path, options: &SaveOptions, interrupted: &dyn Fn() -> bool) -> Result<()> {
    let in_file = |e: Error| e.in_file(path);
    let target = Target::new(model, path)?;
    let inline = Encoder::inline(model);
    let external = match options.external {
        External::Always => true,
        External::Auto => !model.sources.is_empty() || inline.len > options.max_protobuf,
        External::Never => false,
    };
    if !external {
        if inline.len > options.max_protobuf {
            return Err(in_file(too_large(inline.len, options.max_protobuf)).with_hint("allow external data"));
        }
        return target.stage(interrupted, |file| inline.write(file))?.keep(path);
    }
    drop(inline);
    let data_path = data_path(path)?;
    let location = data_path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut encoder = Encoder { model, data: Some(DataFile::new(location)) };
    let encoding = encoder.model();
    if encoding.len > options.max_protobuf {
        return Err(in_file(too_large(encoding.len, options.max_protobuf))
            .with_hint("what is left are weights in attributes: make them initializers with the pass lift-constants"));
    }
    let data = encoder.data.filter(|data| !data.tensors.is_empty());
    let Some(data) = data else {
        return target.stage(interrupted, |file| encoding.write(file))?.keep(path);
    };
    let data_target = Target::new(model, &data_path)?;
    let data_file = data_target.stage(interrupted, |file| data.write(file))?;
    let model_file = target.stage(interrupted, |file| encoding.write(file))?;
    let former = Former::of(&data_path);
    data_file.keep(&data_path)?;
    match model_file.keep(path) {
        Ok(()) => Ok(()),
        Err(error) => {
            former.restore(&data_path);
            Err(error)
        }
    }
}

/// See [`super::check_output`].
pub(super) fn check_output(model: &Model, path: &Path) -> Result<()> {
    Target::new(model, path).map(|_| ())
}

/// `<file name>.data`, beside the model.
fn data_path(path: &Path) -> Result<PathBuf> {
    match path.file_name().and_then(|n| n.to_str()) {
        Some(name) => Ok(path.with_file_name(format!("{name}.data"))),
        None => Err(Error::new(Kind::Output, "external data needs a file name that is UTF-8").in_file(path)),
    }
}

/// A file that is being written, unless the user would rather not.
struct Watched<'a> {
    file: BufWriter<&'a File>,
    interrupted: &'a dyn Fn() -> bool,
}

impl Write for Watched<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if (self.interrupted)() {
            return Err(std::io::Error::other("interrupted"));
        }
        self.file.write_all(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// A file to be written, checked.
struct Target<'a> {
    path: &'a Path,
    /// Of the file that it replaces.
    permissions: Option<std::fs::Permissions>,
}

impl<'a> Target<'a> {
    fn new(model: &Model, path: &'a Path) -> Result<Self> {
        let fail = |message: String| Error::new(Kind::Output, message);
        if path.file_name().is_none() || path.as_os_str().to_string_lossy().ends_with(std::path::is_separator) {
            return Err(fail(format!("cannot write {}: it names a folder", path.display())).with_hint("name a file"));
        }
        let folder = folder_of(path);
        if !folder.is_dir() {
            return Err(fail(format!("cannot write {}: there is no folder {}", path.display(), folder.display()))
                .with_hint("create the folder first"));
        }
        if let Some(input) = inputs(model).find(|input| same_file(input, path)) {
            let message = format!("cannot write {}: the model is read from this file", path.display());
            let error = fail(message).with_hint("write to another file, and rename it afterwards");
            return Err(if input == path { error } else { error.in_file(input) });
        }
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => Ok(Self { path, permissions: Some(metadata.permissions()) }),
            Ok(metadata) => {
                let what = if metadata.is_dir() { "a folder" } else { "not a regular file" };
                Err(fail(format!("cannot write {}: it is {what}", path.display())).with_hint("name a file"))
            }
            Err(_) => Ok(Self { path, permissions: None }),
        }
    }

    /// Writes the content to a temporary file beside the target.
    fn stage(
        self,
        interrupted: &dyn Fn() -> bool,
        content: impl FnOnce(&mut Watched<'_>) -> std::io::Result<()>,
    ) -> Result<Staged> {
        let fail = |e| Error::io(Kind::Output, "write", self.path, e);
        let staged = Staged::beside(self.path).map_err(|e| fail(super::without_path(e)))?;
        let mut writer = Watched { file: BufWriter::with_capacity(1 << 18, staged.file()), interrupted };
        match content(&mut writer).and_then(|()| writer.flush()) {
            Ok(()) => {}
            Err(_) if interrupted() => {
                return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
            }
            Err(error) => return Err(fail(error)),
        }
        drop(writer);
        if let Some(permissions) = self.permissions {
            staged.file().set_permissions(permissions).map_err(fail)?;
        }
        Ok(staged)
    }
}

/// What stood at a path before it was replaced.
enum Former {
    /// Nothing.
    Nothing,
    /// A second link to it, in a folder that is removed with this.
    Linked(tempfile::TempDir),
    /// Something that cannot be linked, on a file system without links.
    Lost,
}

impl Former {
    fn of(path: &Path) -> Self {
        if path.symlink_metadata().is_err() {
            return Self::Nothing;
        }
        let linked = tempfile::Builder::new().prefix(".amax-").tempdir_in(folder_of(path)).and_then(|folder| {
            std::fs::hard_link(path, folder.path().join("former"))?;
            Ok(folder)
        });
        linked.map_or(Self::Lost, Self::Linked)
    }

    fn restore(self, path: &Path) {
        // The error that is being reported matters more than one in here.
        let _ = match self {
            Self::Nothing => std::fs::remove_file(path),
            Self::Linked(folder) => std::fs::rename(folder.path().join("former"), path),
            Self::Lost => Ok(()),
        };
    }
}

/// Whether two paths lead to one file.
fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        id(a).is_some_and(|a| id(b) == Some(a))
    }
    #[cfg(not(unix))]
    {
        a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;

    #[test]
    fn what_was_replaced_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.onnx.data");
        let files = || std::fs::read_dir(folder.path()).unwrap().count();

        let former = Former::of(&path);
        std::fs::write(&path, "new").unwrap();
        former.restore(&path);
        assert_eq!(files(), 0);

        std::fs::write(&path, "old").unwrap();
        let former = Former::of(&path);
        let new = folder.path().join("new");
        std::fs::write(&new, "new").unwrap();
        std::fs::rename(&new, &path).unwrap();
        former.restore(&path);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(files(), 1);

        drop(Former::of(&path));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(files(), 1);
    }
}
