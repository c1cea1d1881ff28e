//! Files that are written and have yet to get their names.

use std::fs::File;
use std::io;
use std::path::Path;

use tempfile::NamedTempFile;

use super::folder_of;
use crate::error::{Error, Kind, Result};

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
    /// A file with a name that begins with a dot.
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
        let prefix = prefix(path);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".tmp");
        // The default of temporary files is private; the kernel takes the umask off this.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        builder.tempfile_in(folder_of(path)).map(|file| Self(Kept::Named(file)))
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

    /// Moves it to `path`, in place of what is there.
    ///
    /// # Errors
    /// [`Kind::Output`]: there is a folder, or the folder cannot be written.
    pub fn keep(self, path: &Path) -> Result<()> {
        let fail = |e| Error::io(Kind::Output, "write", path, e);
        match self.0 {
            // A link does not replace a file, and a renamed file does.
            #[cfg(target_os = "linux")]
            Kept::Unnamed(file) => {
                let prefix = prefix(path);
                let mut builder = tempfile::Builder::new();
                builder.prefix(&prefix).suffix(".tmp");
                let named = builder.make_in(folder_of(path), |name| link(&file, name));
                let named = named.map_err(|e| fail(super::without_path(e)))?;
                named.persist(path).map_err(|e| fail(e.error))
            }
            Kept::Named(file) => file.persist(path).map(|_| ()).map_err(|e| fail(e.error)),
        }
    }
}

fn prefix(path: &Path) -> String {
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
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
