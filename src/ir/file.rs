//! Model files: mapped on load, written whole or not at all.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use super::{Model, verify};
use crate::error::{Error, Kind, Result};
use crate::onnx::{ModelProto, TensorProto};

/// Loads a model. The file is mapped; tensors are slices of it.
///
/// # Errors
/// A missing or unreadable file, bytes that are not an ONNX model, or a model that is not valid.
pub fn load(path: &Path) -> Result<Model> {
    let bytes = map(path)?;
    let proto = ModelProto::decode(bytes).map_err(|e| {
        Error::model(format!("not an ONNX model: {e}")).in_file(path).with_hint("is the download complete?")
    })?;
    let folder = path.parent().map(Path::to_owned).unwrap_or_default();
    let mut files: HashMap<String, Bytes> = HashMap::new();
    let mut external = |tensor: &TensorProto| external_bytes(&folder, tensor, &mut files);
    let mut model = Model::from_proto(proto, &mut external).map_err(|e| e.in_file(path))?;
    model.path = Some(path.to_owned());
    verify::verify(&model).map_err(|e| e.in_file(path))?;
    Ok(model)
}

/// Maps a file.
#[allow(unsafe_code, reason = "a mapped file")]
fn map(path: &Path) -> Result<Bytes> {
    let file = File::open(path).map_err(|e| Error::io(Kind::Model, "read", path, e))?;
    // SAFETY: the mapping is private and read-only. A file that another process truncates while it is mapped raises
    // SIGBUS, as with any mapped input; models are not edited while they are compiled.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(Kind::Model, "map", path, e))?;
    Ok(Bytes::from_owner(map))
}

fn external_bytes(folder: &Path, tensor: &TensorProto, files: &mut HashMap<String, Bytes>) -> Result<Bytes> {
    let entry =
        |key: &str| tensor.external_data.iter().find(|e| e.key.as_deref() == Some(key)).and_then(|e| e.value.clone());
    let name = tensor.name.clone().unwrap_or_default();
    let fail = |message: String| Error::model(message).at_value(&name);
    let location = entry("location").ok_or_else(|| fail("external data without a location".into()))?;
    let whole = match files.get(&location) {
        Some(bytes) => bytes.clone(),
        None => {
            let bytes = map(&folder.join(PathBuf::from(&location)))?;
            files.insert(location.clone(), bytes.clone());
            bytes
        }
    };
    let offset: usize = entry("offset").unwrap_or_default().parse().unwrap_or(0);
    let length: usize = entry("length").and_then(|l| l.parse().ok()).unwrap_or(whole.len().saturating_sub(offset));
    if offset.checked_add(length).is_none_or(|end| end > whole.len()) {
        return Err(fail(format!("external data file \"{location}\" is too short")));
    }
    Ok(whole.slice(offset..offset + length))
}

/// Writes a model to `path`: complete, or not at all.
///
/// # Errors
/// A folder that cannot be written.
pub fn save(model: &Model, path: &Path) -> Result<()> {
    let mut keep = |proto: &mut TensorProto, bytes: Bytes| {
        proto.data_location = None;
        proto.external_data.clear();
        proto.raw_data = Some(bytes);
    };
    let bytes = model.to_proto(&mut keep).encode_to_vec();
    std::fs::write(path, bytes).map_err(|e| Error::io(Kind::Output, "write", path, e))
}
