//! Model files: mapped on load, written whole or not at all.
//!
//! **Load.** The file is mapped and tensors are slices of the map, so loading costs time and memory by the structure and
//! not by the weights; files above 2 GB are read too. `wire` checks the bytes first. A field that the schema does not
//! have is an error, because a save would lose it. For the same reason load → save gives the same bytes, provided the
//! file is in the form that protobuf libraries write (fields in the order of their numbers, lengths and numbers in their
//! shortest form) and its nodes are sorted; otherwise it gives the same content. Nodes that are not sorted, which the
//! ONNX standard forbids and runtimes accept, are sorted stably.
//!
//! **External data** (`external`) is read from the model's folder only, and its offsets and lengths are checked. It is
//! written when the model came with external data, or does not fit into one protobuf.
//!
//! **Save** encodes the structure (`encode`) and streams the weights to temporary files beside the output (`staged`), which
//! get their names once everything is written and on the disk (`save`): a model and its data file are always a pair.
//! What a killed run left is removed by the next (`strays`). What was written is released from memory.

mod encode;
mod external;
mod mapped;
mod outputs;
mod save;
mod staged;
mod strays;
mod wire;

use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

pub use external::allow_hard_links;
pub use mapped::release;
pub(super) use mapped::{is_mapped, share};
pub use outputs::{STDOUT, check_outputs};
pub use staged::Staged;

use super::{Model, verify};
use crate::error::{Error, Kind, Result};
use crate::onnx::{MAX_IR_VERSION, MAX_OPSET, ModelProto};

/// Oldest default-domain opset that is read. Operators before it broadcast by attribute.
pub const MIN_OPSET: i64 = 7;

/// The largest protobuf that other ONNX tools read: one byte less than 2 GiB.
pub const MAX_PROTOBUF: u64 = i32::MAX as u64;

/// Smallest tensor in bytes that is written to an external file; ONNX's own tools use the same.
pub const EXTERNAL_THRESHOLD: usize = 1024;

/// Whether weights are written to a file beside the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum External {
    /// If the model was loaded with external data, or would not fit into one protobuf.
    #[default]
    Auto,
    /// All tensors of at least [`EXTERNAL_THRESHOLD`] bytes.
    Always,
    /// None; a model that does not fit into one protobuf is an error.
    Never,
}

/// Files up to this size are read at once, so that nothing can happen to them later.
const SMALL: u64 = 1 << 20;

/// How a model is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveOptions {
    /// Whether weights go to a file beside the model: `<file name>.<hash of the data>.data`.
    pub external: External,
    /// The largest protobuf to write, in bytes; [`MAX_PROTOBUF`] unless the reader has another limit.
    pub max_protobuf: u64,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { external: External::Auto, max_protobuf: MAX_PROTOBUF }
    }
}

/// Loads a model. The file is mapped; tensors are slices of it, and may be unaligned.
///
/// A file that another process cuts while it is mapped raises SIGBUS, as with any mapped input; files up to 1 MB are not
/// mapped.
///
/// # Errors
/// [`Kind::Model`]: a file that is missing, unreadable, cut, of another kind, newer than IR version
/// [`MAX_IR_VERSION`], outside of opsets [`MIN_OPSET`] to [`MAX_OPSET`], or not valid
/// ([`verify`]); external data that is missing, too short or outside of the model's folder.
pub fn load(path: &Path) -> Result<Model> {
    let bytes = open(path)?;
    let mut model = decode(bytes, external::Folder::of(path)).map_err(|e| e.in_file(path))?;
    model.path = Some(path.to_owned());
    Ok(model)
}

/// Reads a model from the bytes of its file. External data is an error: there is no folder to find it in.
///
/// # Errors
/// As [`load`].
pub fn from_bytes(bytes: impl Into<Bytes>) -> Result<Model> {
    decode(bytes.into(), external::Folder::none())
}

/// The model as one protobuf, external data included. Copies every weight.
///
/// # Errors
/// [`Kind::Output`]: the result passes [`MAX_PROTOBUF`].
pub fn to_bytes(model: &Model) -> Result<Vec<u8>> {
    encode::to_bytes(model)
}

/// Size in bytes of the model as one protobuf, all weights included. Exact; costs time by the structure.
#[must_use]
pub fn estimated_size(model: &Model) -> u64 {
    encode::inline_size(model)
}

/// Whether a model loaded from its file may be written to `path`: what can be known before the work is done.
///
/// # Errors
/// As [`save_with`].
pub fn check_output(model: &Model, path: &Path) -> Result<()> {
    save::check_output(model, path)
}

/// Writes a model in one piece, weights included, where no file can be: to a pipe.
///
/// # Errors
/// [`Kind::Output`]: a model above [`MAX_PROTOBUF`], and errors of `out`. The error of [`verify`] for an invalid model.
pub fn write(model: &Model, out: &mut impl std::io::Write) -> Result<()> {
    verify::verify(model)?;
    let encoding = encode::inline(model);
    if encoding.len > MAX_PROTOBUF {
        return Err(encode::too_large(encoding.len, MAX_PROTOBUF)
            .with_hint("write to a file: weights then go to another file beside it"));
    }
    let fail = |e| Error::new(Kind::Output, format!("cannot write the model: {e}"));
    encoding.write(out).and_then(|()| out.flush()).map_err(fail)
}

/// What a temporary file could not be made for, without its path, which is not one that the user asked for.
#[must_use]
pub fn without_path(error: std::io::Error) -> std::io::Error {
    let text = error.to_string();
    match text.split_once(" at path ") {
        Some((reason, _)) => std::io::Error::new(error.kind(), reason),
        None => error,
    }
}

/// Writes a model to `path` with the default [`SaveOptions`].
///
/// # Errors
/// As [`save_with`].
pub fn save(model: &Model, path: &Path) -> Result<()> {
    save_with(model, path, &SaveOptions::default())
}

/// Writes a model to `path`, and its external data to `<path>.<hash>.data`: complete, or not at all.
///
/// Weights are streamed, one tensor at a time at most is copied. A file that stands at `path` is replaced, its
/// permissions are kept; where `path` is a link, the file that it leads to is. The data file that an older output had
/// is removed, unless another model of the folder refers to it. The same model and options give the same bytes.
///
/// # Errors
/// [`Kind::Output`]: a folder that is missing or cannot be written, an output that is a file the model was loaded from,
/// or is a folder or device, a model that does not fit. The error of [`verify`] for an invalid model.
pub fn save_with(model: &Model, path: &Path, options: &SaveOptions) -> Result<()> {
    save_unless(model, path, options, &|| false)
}

/// As [`save_with`], but stops when `interrupted` says so, which is asked after every few megabytes.
///
/// # Errors
/// As [`save_with`], and [`Kind::Interrupted`]; nothing was written then.
pub fn save_unless(model: &Model, path: &Path, options: &SaveOptions, interrupted: &dyn Fn() -> bool) -> Result<()> {
    verify::verify(model).map_err(|e| e.in_file(path))?;
    save::save(model, path, options, interrupted)
}

fn decode(bytes: Bytes, mut folder: external::Folder) -> Result<Model> {
    refuse_other_formats(&bytes)?;
    wire::scan(&bytes)?;
    let proto = ModelProto::decode(bytes).map_err(|e| {
        Error::model(format!("not an ONNX model: {e}")).with_hint("the file is of another kind, or damaged")
    })?;
    refuse_other_versions(&proto)?;
    let mut model = Model::from_proto(proto, &mut |tensor| folder.bytes(tensor))?;
    model.sources = folder.into_sources();
    sort_nodes(&mut model);
    verify::verify(&model)?;
    Ok(model)
}

/// Opens a model file and maps it.
fn open(path: &Path) -> Result<Bytes> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(missing(path)),
        Err(e) => return Err(Error::io(Kind::Model, "read", path, e)),
    };
    if metadata.is_dir() {
        let error = Error::model(format!("{} is a folder", path.display()));
        return Err(match files_in(path).into_iter().find(|f| Path::new(f).extension().is_some_and(|e| e == "onnx")) {
            Some(name) => error.with_hint(format!("did you mean {}?", path.join(name).display())),
            None => error.with_hint("name the .onnx file"),
        });
    }
    read(path, &metadata, File::options().read(true))
}

/// The bytes of a regular file: in memory where it is small, and else mapped.
#[allow(unsafe_code, reason = "a mapped file")]
fn read(path: &Path, metadata: &Metadata, options: &OpenOptions) -> Result<Bytes> {
    let fail = |e| Error::io(Kind::Model, "read", path, e);
    // Asked before opening, since opening a pipe waits for its writer.
    if !metadata.is_file() {
        return Err(Error::model(format!("{} is not a regular file", path.display()))
            .with_hint("models are mapped: write the stream to a file first"));
    }
    let mut file = options.open(path).map_err(fail)?;
    let opened = file.metadata().map_err(fail)?;
    if !is_same(metadata, &opened) {
        return Err(Error::model(format!("{} was replaced while it was opened", path.display()))
            .with_hint("let whatever writes it end first"));
    }
    if opened.len() <= SMALL {
        let mut bytes = Vec::with_capacity(opened.len() as usize);
        file.read_to_end(&mut bytes).map_err(fail)?;
        return Ok(bytes.into());
    }
    // A failing disk shows as an error here, and as SIGBUS once mapped.
    file.read_exact(&mut [0]).map_err(fail)?;
    // SAFETY: the mapping is private and read-only. A file that another process truncates while it is mapped raises
    // SIGBUS, as with any mapped input; the program says so and ends.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?;
    Ok(share(map))
}

/// Whether what was opened is the file that was looked at.
fn is_same(looked_at: &Metadata, opened: &Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        (looked_at.dev(), looked_at.ino()) == (opened.dev(), opened.ino())
    }
    #[cfg(not(unix))]
    {
        opened.is_file() && looked_at.is_file()
    }
}

fn missing(path: &Path) -> Error {
    let error = Error::model(format!("{} does not exist", path.display()));
    if path == Path::new(STDOUT) {
        return error.with_hint("models are mapped and not read from stdin: write the stream to a file first");
    }
    let folder = folder_of(path);
    if !folder.is_dir() {
        return error.with_hint(format!("there is no folder {}", folder.display()));
    }
    let wanted = path.file_name().unwrap_or_default().to_string_lossy();
    match nearest_file(&wanted, files_in(folder)) {
        Some(name) => error.with_hint(format!("did you mean {}?", path.with_file_name(name).display())),
        None => error.with_hint(format!("no file of a similar name is in {}", folder.display())),
    }
}

/// The folder a file is in; `.` where the path does not say.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Names of the files in a folder, sorted; empty if it cannot be read.
fn files_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter(|e| e.path().is_file()).filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The name most like `wanted`, if one is.
fn nearest_file(wanted: &str, names: Vec<String>) -> Option<String> {
    let wanted = wanted.to_lowercase();
    // Stems are compared, since an ending that all the names share would make any two of them alike.
    let parts = |name: &str| {
        let path = Path::new(name);
        let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        (part(path.file_stem()), part(path.extension()))
    };
    let (stem, ending) = parts(&wanted);
    let likeness = |name: &str| {
        let (s, e) = parts(&name.to_lowercase());
        let stems = strsim::normalized_damerau_levenshtein(&stem, &s);
        if e == ending { stems } else { stems - 0.2 }
    };
    names
        .into_iter()
        .map(|name| (likeness(&name), name))
        .filter(|(likeness, _)| *likeness >= 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// Files that users take for ONNX models: where their mark is, the mark, what they are, and the way out.
const OTHER_FORMATS: &[(usize, &[u8], &str, &str)] = &[
    (0, b"version https://git-lfs", "a git-lfs pointer, not the model itself", "run `git lfs pull`"),
    (0, b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint", "export the model with torch.onnx.export"),
    (0, b"\x80\x02", "a Python pickle, such as a PyTorch checkpoint", "export the model with torch.onnx.export"),
    (0, b"\x89HDF", "an HDF5 file, such as a Keras model", "convert it with tf2onnx"),
    (4, b"TFL3", "a TensorFlow Lite model", "convert it with tf2onnx"),
    (4, b"ORTM", "an onnxruntime .ort file", "use the .onnx file it was made from"),
    (4, b"\0\0\0\0{\"", "a safetensors file: weights without a graph", "export the model to ONNX"),
    (0, b"GGUF", "a GGUF file", "export the model to ONNX"),
    (0, b"\x1f\x8b", "gzip-compressed", "unpack it with gunzip"),
    (0, b"\x93NUMPY", "a NumPy array", "name the .onnx file"),
    (0, b"<!DOCTYPE", "a web page, not the model itself", "download the raw file"),
    (0, b"<html", "a web page, not the model itself", "download the raw file"),
];

/// Whether the first file of a zip archive is an array of numpy.
fn holds_arrays(archive: &[u8]) -> bool {
    let length = archive.get(26..28).map_or(0, |bytes| usize::from(bytes[0]) | usize::from(bytes[1]) << 8);
    archive.get(30..30 + length).is_some_and(|name| name.ends_with(b".npy"))
}

fn refuse_other_formats(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Err(Error::model("the file is empty").with_hint("the download or export was interrupted"));
    }
    for (at, mark, what, hint) in OTHER_FORMATS {
        if bytes.get(*at..).is_some_and(|tail| tail.starts_with(mark)) {
            if *mark == b"PK\x03\x04" && holds_arrays(bytes) {
                let error = Error::model("this is a .npz archive of arrays, not a model");
                return Err(error.with_hint("samples go with a model: amax rewrite MODEL OUTPUT --calib FILE"));
            }
            return Err(Error::model(format!("this is {what}")).with_hint(*hint));
        }
    }
    // A model begins with its IR version or another field key, none of which is followed by plain text for long.
    let head = &bytes[..bytes.len().min(256)];
    let is_text = |b: &u8| matches!(b, b'\t' | b'\n' | b'\r' | b' '..=b'~');
    if head.iter().all(is_text) {
        return Err(Error::model("this is a text file, not an ONNX model").with_hint("name the .onnx file"));
    }
    Ok(())
}

fn refuse_other_versions(proto: &ModelProto) -> Result<()> {
    if proto.graph.is_none() {
        return Err(Error::model("the model has no graph")
            .with_hint("this may not be an ONNX model, or its export was interrupted"));
    }
    match proto.ir_version {
        Some(1..=MAX_IR_VERSION) => {}
        Some(version) => {
            return Err(Error::model(format!("IR version {version} is not supported: 1 to {MAX_IR_VERSION} are"))
                .with_hint("export with an older onnx package, or update amax"));
        }
        None => {
            return Err(
                Error::model("the model has no IR version").with_hint("the file is of another kind, or damaged")
            );
        }
    }
    let imports = proto.opset_import.iter().chain(proto.functions.iter().flat_map(|f| &f.opset_import));
    for import in imports {
        let version = import.version.unwrap_or(0);
        let domain = import.domain.as_deref().unwrap_or("");
        if super::canonical_domain(domain).is_empty() && !(MIN_OPSET..=MAX_OPSET).contains(&version) {
            let error = Error::model(format!("opset {version} is not supported: {MIN_OPSET} to {MAX_OPSET} are"));
            return Err(if version < MIN_OPSET {
                error.with_hint("raise it with onnx.version_converter, or export the model again")
            } else {
                error.with_hint("export with a lower opset, or update amax")
            });
        }
    }
    Ok(())
}

/// Sorts the nodes of graphs in which a producer comes after a consumer. Cycles are left to the verifier.
fn sort_nodes(model: &mut Model) {
    for graph in model.all_graphs() {
        if let Ok(order) = model.topological_order(graph)
            && order != model.graph(graph).nodes()
        {
            model.reorder(graph, order);
        }
    }
}

/// The files a model was read from: the model itself, and its external data.
pub fn inputs(model: &Model) -> impl Iterator<Item = &PathBuf> {
    model.path.iter().chain(&model.sources)
}
