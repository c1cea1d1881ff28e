//! Saving: a model and its data file appear together, or not at all.
//!
//! The name of a data file carries a hash of its content, so that no model ever finds another model's data under the name
//! that it knows. Both files are complete and on the disk before either is named; the data file is named first, the model
//! last. A process that is killed in between leaves the older pair, and a data file that the next run removes.

use std::fs::{File, Permissions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::encode::{self, too_large};
use super::staged::{Staged, resolve, sync_folder};
use super::{External, SaveOptions, folder_of, inputs, strays};
use crate::error::{Error, Kind, Result};
use crate::ir::Model;

/// Hexadecimal digits of the hash in the name of a data file.
const DIGITS: usize = 16;

/// The longest file name that common file systems have, in bytes.
const LONGEST_NAME: usize = 255;

/// See [`super::save_with`].
pub(super) fn save(model: &Model, path: &Path, options: &SaveOptions, interrupted: &dyn Fn() -> bool) -> Result<()> {
    let in_file = |e: Error| e.in_file(path);
    let target = Target::new(model, path)?;
    let inline = encode::inline(model);
    let external = match options.external {
        External::Always => true,
        External::Auto => !model.sources.is_empty() || inline.len > options.max_protobuf,
        External::Never => false,
    };
    if !external {
        if inline.len > options.max_protobuf {
            return Err(in_file(too_large(inline.len, options.max_protobuf)).with_hint("allow external data"));
        }
        return target.commit(target.stage(interrupted, |file| inline.write(file))?, None);
    }
    drop(inline);
    // The name is not known before the content, but its length is, and lengths are all that a first encoding is for.
    let (draft, data) = encode::external(model, data_name(&target.path, &"0".repeat(DIGITS)));
    if draft.len > options.max_protobuf {
        return Err(in_file(too_large(draft.len, options.max_protobuf))
            .with_hint("what is left are weights in attributes: make them initializers with the pass lift-constants"));
    }
    if data.is_empty() {
        return target.commit(target.stage(interrupted, |file| draft.write(file))?, None);
    }
    drop(draft);
    let mut hash = Sha256::new();
    let data_file = target.stage(interrupted, |file| data.write(&mut Hashed { file, hash: &mut hash }))?;
    drop(data);
    let digest = format!("{:x}", hash.finalize());
    let name = data_name(&target.path, &digest[..DIGITS]);
    let data_path = target.path.with_file_name(&name);
    Target::new(model, &data_path)?;
    let (encoding, _) = encode::external(model, name);
    let model_file = target.stage(interrupted, |file| encoding.write(file))?;
    target.commit(model_file, Some((data_file, data_path)))
}

/// See [`super::check_output`].
pub(super) fn check_output(model: &Model, path: &Path) -> Result<()> {
    Target::new(model, path).map(|_| ())
}

/// `<file name>.<hash>.data`; a file name that leaves no room for the rest is cut.
fn data_name(path: &Path, hash: &str) -> String {
    let mut name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let room = LONGEST_NAME - ".".len() - DIGITS - ".data".len();
    while name.len() > room {
        name.pop();
    }
    format!("{name}.{hash}.data")
}

/// Whether a file is called as a data file of the model at `path` would be.
pub(super) fn is_data_name(path: &Path, name: &str) -> bool {
    let hash = name.strip_suffix(".data").and_then(|rest| rest.get(rest.len().checked_sub(DIGITS)?..));
    hash.is_some_and(|hash| {
        hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) && name == data_name(path, hash)
    })
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

/// A file that is hashed while it is written.
struct Hashed<'a, W> {
    file: &'a mut W,
    hash: &'a mut Sha256,
}

impl<W: Write> Write for Hashed<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.write_all(bytes).map(|()| bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// A file to be written, checked.
struct Target {
    /// Where it is, links resolved.
    path: PathBuf,
    /// Of the file that it replaces.
    permissions: Option<Permissions>,
}

impl Target {
    fn new(model: &Model, path: &Path) -> Result<Self> {
        let resolved = resolve(path)?;
        if let Some(input) = inputs(model).find(|input| same_file(input, &resolved)) {
            let message = format!("cannot write {}: the model is read from this file", path.display());
            let error = Error::new(Kind::Output, message).with_hint("write to another file, and rename it afterwards");
            return Err(if input == path { error } else { error.in_file(input) });
        }
        let permissions = std::fs::metadata(&resolved).ok().map(|metadata| metadata.permissions());
        Ok(Self { path: resolved, permissions })
    }

    /// Writes the content to a temporary file beside the target, and to the disk.
    fn stage(
        &self,
        interrupted: &dyn Fn() -> bool,
        content: impl FnOnce(&mut Watched<'_>) -> std::io::Result<()>,
    ) -> Result<Staged> {
        let fail = |e| Error::io(Kind::Output, "write", &self.path, e);
        let staged = Staged::beside(&self.path).map_err(|e| fail(super::without_path(e)))?;
        let mut writer = Watched { file: BufWriter::with_capacity(1 << 18, staged.file()), interrupted };
        match content(&mut writer).and_then(|()| writer.flush()) {
            Ok(()) => {}
            Err(_) if interrupted() => {
                return Err(Error::interrupted());
            }
            Err(error) => return Err(fail(error)),
        }
        drop(writer);
        if let Some(permissions) = &self.permissions {
            staged.file().set_permissions(permissions.clone()).map_err(fail)?;
        }
        staged.file().sync_data().map_err(fail)?;
        Ok(staged)
    }

    /// Gives the files their names, the model's last, and removes what earlier runs left.
    fn commit(&self, model: Staged, data: Option<(Staged, PathBuf)>) -> Result<()> {
        let folder = folder_of(&self.path);
        // Runs that write to one folder name their files one after the other, so that none removes what another is about
        // to refer to.
        let _lock = strays::lock(folder);
        let mut fresh = None;
        let mut own = None;
        if let Some((staged, path)) = data {
            let known = path.symlink_metadata().is_ok();
            staged.keep(&path)?;
            sync_folder(folder);
            fresh = (!known).then(|| path.clone());
            own = Some(path);
        }
        if let Err(error) = model.keep(&self.path) {
            // The error that is being reported matters more than one in here.
            let _ = fresh.map(std::fs::remove_file);
            return Err(error);
        }
        sync_folder(folder);
        strays::remove(&self.path, own.as_deref());
        Ok(())
    }
}

/// Whether two paths lead to one file.
pub(super) fn same_file(a: &Path, b: &Path) -> bool {
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
mod tests {
    use super::*;

    #[test]
    fn data_files_are_named_after_their_model_and_content() {
        let hash = "0123456789abcdef";
        let long = "m".repeat(250) + "onnx";
        for model in ["out.onnx", "ä b", long.as_str()] {
            let path = Path::new("some/folder").join(model);
            let name = data_name(&path, hash);
            assert!(name.len() <= LONGEST_NAME && is_data_name(&path, &name), "{name}");
        }
        let path = Path::new("out.onnx");
        for other in [
            "out.onnx",
            "out.onnx.data",
            "out.onnx.0123456789abcdeF.data",
            "out.onnx.0123456789abcde.data",
            "in.onnx.0123456789abcdef.data",
            "out.onnx.0123456789abcdef.dat",
            ".data",
        ] {
            assert!(!is_data_name(path, other), "{other}");
        }
    }
}
