//! Files that are written and have yet to get their names.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::folder_of;
use crate::error::{Error, Kind, Result};

/// What temporary files begin and end with. It does not depend on the name that the file is to get, which may be as long
/// as names can be.
const TEMPORARY: (&str, &str) = (".amax-", ".tmp");

/// The way out where a device or pipe is named.
const NOT_REGULAR: &str = "name a file, or - for stdout";

/// A file in the folder of its later place. Dropped, it is removed.
///
/// Where the system can, it has no name at first, so that a process that is killed leaves nothing behind.
#[derive(Debug)]
pub struct Staged(Kept);

#[derive(Debug)]
enum Kept {
    /// A file without a name.
    #[cfg(target_os = "linux")]
    Unnamed(File),
    /// A file with a temporary name, locked as long as it has that name.
    Named(NamedTempFile),
}

impl Staged {
    /// An empty file in the folder of `path`.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn beside(path: &Path) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Ok(file) = unnamed(folder_of(path)) {
            return Ok(Self(Kept::Unnamed(file)));
        }
        let mut builder = temporary();
        // The default of temporary files is private; the kernel takes the umask off this.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder_of(path))?;
        // A file system without locks has no strays removed either.
        let _ = file.as_file().try_lock();
        Ok(Self(Kept::Named(file)))
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Kept::Unnamed(file) => file,
            Kept::Named(file) => file.as_file(),
        }
    }

    /// Writes it to the disk and moves it to `path`, in place of the file there; where that is a link, in place of what it
    /// leads to.
    ///
    /// # Errors
    /// [`Kind::Output`]: there is a folder or a device, or the folder cannot be written.
    pub fn keep(self, path: &Path) -> Result<()> {
        let fail = |e| Error::io(Kind::Output, "write", path, e);
        let path = &*resolve(path)?;
        self.file().sync_data().map_err(fail)?;
        match self.0 {
            // A link does not replace a file, and a renamed file does.
            #[cfg(target_os = "linux")]
            Kept::Unnamed(file) => {
                let _ = file.try_lock();
                let named = temporary().make_in(folder_of(path), |name| link(&file, name));
                let named = named.map_err(|e| fail(super::without_path(e)))?;
                named.persist(path).map_err(|e| fail(e.error))
            }
            Kept::Named(file) => file.persist(path).map(|_| ()).map_err(|e| fail(e.error)),
        }
    }
}

/// Where a file that is to be written to `path` goes: links are followed, and what is there must be a regular file.
///
/// # Errors
/// [`Kind::Output`]: a folder, a device, a missing folder, a link that leads nowhere.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let fail = |why: &str| Error::new(Kind::Output, format!("cannot write {}: {why}", path.display()));
    if path.file_name().is_none() || path.as_os_str().to_string_lossy().ends_with(std::path::is_separator) {
        return Err(fail("it names a folder").with_hint("name a file"));
    }
    let folder = folder_of(path);
    if !folder.is_dir() {
        return Err(fail(&format!("there is no folder {}", folder.display())).with_hint("create the folder first"));
    }
    if !path.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        return match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Err(fail("it is a folder").with_hint("name a file")),
            Ok(metadata) if !metadata.is_file() => Err(fail("it is not a regular file").with_hint(NOT_REGULAR)),
            _ => Ok(path.to_owned()),
        };
    }
    match path.canonicalize() {
        Ok(real) if real.is_file() => Ok(real),
        Ok(real) => {
            let (what, hint) =
                if real.is_dir() { ("a folder", "name a file") } else { ("not a regular file", NOT_REGULAR) };
            Err(fail(&format!("it is a link to {}, which is {what}", real.display())).with_hint(hint))
        }
        Err(_) => Err(fail("it is a link that leads nowhere").with_hint("remove the link, or name another file")),
    }
}

/// Makes renamed files survive a loss of power, where the system can.
pub(super) fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

fn temporary() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1);
    builder
}

/// Whether a file is called as temporary files are.
pub(super) fn is_temporary(name: &str) -> bool {
    name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1)
}

/// A file in `folder` that has no name, and can be given one.
#[cfg(target_os = "linux")]
fn unnamed(folder: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    let file = File::options().read(true).write(true).mode(0o666).custom_flags(libc::O_TMPFILE).open(folder)?;
    // Where it cannot be named later, it is of no use.
    std::fs::metadata(handle(&file))?;
    Ok(file)
}

/// Where the system shows an open file.
#[cfg(target_os = "linux")]
fn handle(file: &File) -> String {
    use std::os::fd::AsRawFd;

    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Gives an unnamed file a name that nothing has.
#[cfg(target_os = "linux")]
fn link(file: &File, path: &Path) -> io::Result<()> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    let from = CString::new(handle(file))?;
    let to = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both are strings that live until it returns.
    #[allow(unsafe_code, reason = "the standard library links the link and not the file")]
    let status =
        unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
