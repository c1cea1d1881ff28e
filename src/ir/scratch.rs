//! Storage for new tensors of large models: a file instead of memory.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::file::{is_mapped, release, share};
use super::{Def, Model};
use crate::error::{Error, Kind, Result};

/// From this many bytes of constants on, a model is large: its new tensors do not stay in memory.
pub const LARGE_MODEL: u64 = 1 << 29;

/// From this many bytes on, a tensor is moved to the file.
const LEAST: usize = 1 << 18;

/// Alignment of tensors in the file, so that no two share a page of memory on most processors.
const ALIGNMENT: usize = 1 << 12;

/// The file grows and is mapped in parts of this size, since the number of maps per process is limited.
const EXTENT: usize = 1 << 28;

/// An unnamed file for tensors that are made before they are written.
///
/// Its content is mapped, so the system holds as much of it in memory as there is room, and
/// [`release`] takes it out of this process. The file is created for the first tensor, in the
/// folder of the output, where there has to be room anyway. The system removes it however the process ends.
///
/// If the disk fails, tensors stay in memory, and [`check`](Self::check) reports the error.
#[derive(Debug)]
pub struct Scratch {
    /// The output that it belongs to.
    output: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    file: Option<Arc<File>>,
    /// The last part of the file, and how much of it is taken.
    extent: Bytes,
    taken: usize,
    /// Where that part begins.
    start: u64,
    kept: u64,
    failure: Option<io::Error>,
}

impl State {
    /// Takes `len` bytes of the file: their place in it, and in memory.
    fn take(&mut self, len: usize, folder: &Path) -> io::Result<(Arc<File>, u64, Bytes)> {
        let file = match &self.file {
            Some(file) => file.clone(),
            None => self.file.insert(tempfile::tempfile_in(folder)?.into()).clone(),
        };
        let mut at = self.taken.next_multiple_of(ALIGNMENT);
        if self.extent.len().saturating_sub(at) < len {
            let start = self.start + self.extent.len() as u64;
            let size = len.next_multiple_of(EXTENT);
            file.set_len(start + size as u64)?;
            // SAFETY: the file has no name and no other user. Each range of it is written once, by its own call of `store`,
            // which hands it out afterwards.
            #[allow(unsafe_code, reason = "a mapped file")]
            let map = unsafe { memmap2::MmapOptions::new().offset(start).len(size).map(&*file) }?;
            (self.extent, self.start, at) = (share(map), start, 0);
        }
        self.taken = at + len;
        self.kept += len as u64;
        Ok((file, self.start + at as u64, self.extent.slice(at..at + len)))
    }
}

impl Scratch {
    /// A scratch file in the folder of `output`. Nothing is created yet.
    #[must_use]
    pub fn beside(output: &Path) -> Self {
        Self { output: output.to_owned(), state: Mutex::default() }
    }

    /// The same bytes, in the file. Small ones and slices of mapped files are returned as they are, and so are those that
    /// cannot be written.
    #[must_use]
    pub fn keep(&self, bytes: Bytes) -> Bytes {
        if bytes.len() < LEAST || is_mapped(&bytes) {
            return bytes;
        }
        match self.store(&bytes) {
            Ok(stored) => stored,
            Err(error) => {
                self.state().failure.get_or_insert(error);
                bytes
            }
        }
    }

    /// Checks that every tensor could be moved to the file.
    ///
    /// # Errors
    /// [`Kind::Output`]: the disk is full, or the file cannot be made.
    pub fn check(&self) -> Result<()> {
        match self.state().failure.take() {
            None => Ok(()),
            Some(error) => {
                let error = super::file::without_path(error);
                Err(Error::io(Kind::Output, "write", &self.output, error)
                    .with_hint("its folder also has to hold the new tensors while they are made"))
            }
        }
    }

    /// Bytes that were moved to the file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.state().kept
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self, bytes: &[u8]) -> io::Result<Bytes> {
        let folder = self.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (file, offset, place) = self.state().take(bytes.len(), folder)?;
        write_at(&file, bytes, offset)?;
        Ok(place)
    }
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

impl Model {
    /// Keeps new tensors in a scratch file beside `output`, if the model is large: [`LARGE_MODEL`].
    pub fn spill_beside(&mut self, output: &Path) {
        if self.constant_bytes() >= LARGE_MODEL {
            self.set_scratch(Scratch::beside(output));
        }
    }

    /// Keeps new tensors in `scratch`, from now on and in clones of this model.
    pub fn set_scratch(&mut self, scratch: Scratch) {
        self.scratch = Some(scratch.into());
    }

    /// Where new tensors are kept, if not in memory.
    #[must_use]
    pub fn scratch(&self) -> Option<&Scratch> {
        self.scratch.as_deref()
    }

    /// Bytes of all constants.
    fn constant_bytes(&self) -> u64 {
        let sizes = self.values.iter().map(|value| match &value.def {
            Def::Constant(tensor) | Def::Input { default: Some(tensor) } => tensor.byte_len() as u64,
            _ => 0,
        });
        let attributes = self.nodes.iter().flat_map(|n| &n.attrs).filter_map(|a| a.proto.t.as_ref());
        sizes.chain(attributes.map(|t| t.raw_data.as_ref().map_or(0, Bytes::len) as u64)).sum()
    }

    /// The same tensor, in the scratch file if the model has one. Call this for large tensors that do not go into the
    /// model at once; the functions that put tensors into the model do it themselves.
    #[must_use]
    pub fn keep(&self, tensor: super::Tensor) -> super::Tensor {
        match &self.scratch {
            Some(scratch) => tensor.map_raw(|bytes| scratch.keep(bytes)),
            None => tensor,
        }
    }

    /// Gives the memory of all constants that are slices of files back to the system.
    pub fn release(&self) {
        for value in &self.values {
            if let Def::Constant(tensor) | Def::Input { default: Some(tensor) } = &value.def {
                tensor.release();
            }
        }
    }
}

impl super::Tensor {
    /// Gives the memory of the tensor back to the system if it is a slice of a mapped file; see [`release`].
    pub fn release(&self) {
        if let Some(bytes) = self.slice() {
            release(bytes);
        }
    }
}
