//! External data of a model that is read: tensors in other files of its folder.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use sha1::{Digest, Sha1};

use super::{files_in, folder_of, read};
use crate::error::{Error, Kind, Result};
use crate::ir::element_count;
use crate::nearest::nearest;
use crate::onnx::{DataType, TensorProto};

/// The folder that external data may come from, with the files opened so far.
///
/// A location is a relative path without `..`. Where it leads over links, it must end in the folder of the model, or in
/// that of the file which the model's own path links to: download caches keep a model and its data as links to files
/// that lie side by side.
pub(super) struct Folder {
    /// `None` for a model that is not a file.
    path: Option<PathBuf>,
    /// Where files may really be.
    roots: Vec<PathBuf>,
    files: HashMap<String, Bytes>,
    /// SHA-1 of those files that a tensor gives a checksum of.
    checksums: HashMap<String, String>,
    sources: Vec<PathBuf>,
}

impl Folder {
    /// The folder of the model at `path`.
    pub(super) fn of(path: &Path) -> Self {
        let real_folder = folder_of(path).canonicalize().ok();
        let real_model = path.canonicalize().ok().and_then(|p| p.parent().map(Path::to_owned));
        let roots = real_folder.into_iter().chain(real_model).collect();
        Self {
            path: Some(folder_of(path).to_owned()),
            roots,
            files: HashMap::new(),
            checksums: HashMap::new(),
            sources: Vec::new(),
        }
    }

    /// For a model that is not a file.
    pub(super) fn none() -> Self {
        Self { path: None, roots: Vec::new(), files: HashMap::new(), checksums: HashMap::new(), sources: Vec::new() }
    }

    /// The files that were read, in the order in which tensors asked for them.
    pub(super) fn into_sources(self) -> Vec<PathBuf> {
        self.sources
    }

    /// The bytes of a tensor that is stored in another file.
    ///
    /// # Errors
    /// A location outside of the folder, a file that is missing or too short, or entries that make no sense.
    pub(super) fn bytes(&mut self, tensor: &TensorProto) -> Result<Bytes> {
        self.find(tensor).map_err(|e| e.at_value(tensor.name.as_deref().unwrap_or("")))
    }

    fn find(&mut self, tensor: &TensorProto) -> Result<Bytes> {
        let location = entry(tensor, "location")?
            .ok_or_else(|| Error::model("external data without a location").with_hint("export the model again"))?;
        let offset = number(tensor, "offset")?.unwrap_or(0);
        let length = match number(tensor, "length")? {
            Some(length) => length,
            None => expected_len(tensor)?,
        };
        if let Some(key) = tensor.external_data.iter().filter_map(|e| e.key.as_deref()).find(|key| !is_known(key)) {
            return Err(Error::model(format!("external data has an entry \"{key}\" that ONNX does not have"))
                .with_hint("saving the model would lose it; remove it"));
        }
        let file = self.file(location)?;
        if let Some(checksum) = entry(tensor, "checksum")?.filter(|c| !c.is_empty()) {
            self.check(location, &file, checksum)?;
        }
        if let Ok(expected) = expected_len(tensor)
            && expected != length
        {
            return Err(Error::model(format!(
                "external data file \"{location}\" is said to hold {length} bytes of the tensor, whose type and shape ask for {expected}"
            ))
            .with_hint("the model was edited by hand, or damaged; export it again"));
        }
        match offset.checked_add(length) {
            Some(end) if end <= file.len() => Ok(file.slice(offset..end)),
            _ => Err(Error::model(format!(
                "external data file \"{location}\" has {} bytes, but {length} are to be read at {offset}",
                file.len()
            ))
            .with_hint("the data file was cut, or belongs to another model; get both files again")),
        }
    }

    fn file(&mut self, location: &str) -> Result<Bytes> {
        if let Some(bytes) = self.files.get(location) {
            return Ok(bytes.clone());
        }
        let (path, real) = self.resolve(location)?;
        let metadata = std::fs::symlink_metadata(&real).map_err(|e| Error::io(Kind::Model, "read", &path, e))?;
        if is_hard_linked(&metadata) && !HARD_LINKS.load(Ordering::Relaxed) {
            return Err(Error::model(format!(
                "external data \"{location}\" is a hard link, and may be a file of elsewhere"
            ))
            .with_hint("copy the file, or pass --allow-hard-links if you trust the model"));
        }
        let mut options = File::options();
        options.read(true);
        // Links were followed, to where they may lead.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW);
        let bytes = read(&real, &metadata, &options)?;
        self.files.insert(location.to_owned(), bytes.clone());
        self.sources.push(path);
        Ok(bytes)
    }

    /// Compares a file with the checksum that a tensor gives of it: "SHA1 digest of file" (ONNX, External Data).
    fn check(&mut self, location: &str, file: &Bytes, checksum: &str) -> Result<()> {
        let found = self.checksums.entry(location.to_owned()).or_insert_with(|| format!("{:x}", Sha1::digest(file)));
        if found.eq_ignore_ascii_case(checksum) {
            return Ok(());
        }
        Err(Error::model(format!(
            "external data file \"{location}\" has the SHA-1 {found}, and the model wants {checksum}"
        ))
        .with_hint("the data file belongs to another model, or is damaged; get both files again"))
    }

    /// Where a location leads, as it is written and with its links followed.
    fn resolve(&self, location: &str) -> Result<(PathBuf, PathBuf)> {
        let Some(folder) = &self.path else {
            return Err(Error::model(format!("the tensor is in the file \"{location}\", but the model is not a file"))
                .with_hint("load the model by its path"));
        };
        let relative = Path::new(location);
        let plain = |c: Component<'_>| matches!(c, Component::Normal(_) | Component::CurDir);
        let on_windows = location.starts_with('\\') || location.as_bytes().get(1) == Some(&b':');
        if location.is_empty() || on_windows || location.contains('\0') || !relative.components().all(plain) {
            return Err(outside(location));
        }
        let path = folder.join(relative);
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(missing(location, &path)),
            Err(e) => return Err(Error::io(Kind::Model, "read", &path, e)),
        };
        if !self.roots.iter().any(|root| real.starts_with(root)) {
            return Err(outside(location));
        }
        Ok((path, real))
    }
}

/// Whether external data may have several names.
static HARD_LINKS: AtomicBool = AtomicBool::new(false);

/// Takes external data also from files that have several names (hard links), from here on and in the whole process. They are
/// refused otherwise, as by the Python package of ONNX: a model that was unpacked from an archive could name any file so.
pub fn allow_hard_links() {
    HARD_LINKS.store(true, Ordering::Relaxed);
}

fn is_hard_linked(metadata: &Metadata) -> bool {
    #[cfg(unix)]
    return metadata.is_file() && std::os::unix::fs::MetadataExt::nlink(metadata) > 1;
    #[cfg(not(unix))]
    {
        let _ = metadata;
        false
    }
}

/// Keys of external data: ONNX's, an old one of its Python package, and onnxruntime's, whose packed copies are for one
/// machine and are made again where they are missing.
fn is_known(key: &str) -> bool {
    matches!(key, "location" | "offset" | "length" | "checksum" | "basepath") || key.starts_with("prepacked")
}

fn outside(location: &str) -> Error {
    Error::model(format!("external data \"{location}\" is not in the model's folder")).with_hint(
        "data is read from the folder of the model only: move it there, and save the model with a plain name",
    )
}

fn missing(location: &str, path: &Path) -> Error {
    let folder = folder_of(path);
    let error = Error::model(format!("external data file \"{location}\" is missing from {}", folder.display()));
    let wanted = path.file_name().unwrap_or_default().to_string_lossy();
    match nearest(&wanted, files_in(folder).iter().map(String::as_str)) {
        Some(name) => error.with_hint(format!("was \"{name}\" renamed? models name their data files")),
        None => error.with_hint("copy it beside the model"),
    }
}

/// The value of an entry, which may stand once only.
fn entry<'a>(tensor: &'a TensorProto, key: &str) -> Result<Option<&'a str>> {
    let mut found = tensor.external_data.iter().filter(|e| e.key.as_deref() == Some(key));
    let value = found.next().map(|e| e.value.as_deref().unwrap_or(""));
    if found.next().is_some() {
        return Err(Error::model(format!("external data has two entries \"{key}\"")));
    }
    Ok(value)
}

fn number(tensor: &TensorProto, key: &str) -> Result<Option<usize>> {
    let Some(text) = entry(tensor, key)? else { return Ok(None) };
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(number) if digits => Ok(Some(number)),
        _ => Err(Error::model(format!("external data has the {key} \"{text}\", which is not a number of bytes"))
            .with_hint("the file was edited by hand, or damaged; export it again")),
    }
}

/// Bytes that a tensor's type and shape ask for.
fn expected_len(tensor: &TensorProto) -> Result<usize> {
    let bits = DataType::from_code(tensor.data_type.unwrap_or(0)).and_then(DataType::bits);
    let len = bits.zip(element_count(&tensor.dims)).and_then(|(bits, count)| bits.checked_mul(count));
    len.map(|bits| bits.div_ceil(8))
        .ok_or_else(|| Error::model("a tensor of this type and shape cannot be external data"))
}
