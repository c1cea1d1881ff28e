//! Tensors on their way from one segment of a model to a later one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::ir::{Tensor, file};
use crate::onnx::DataType;

/// Tensors by sample and name: in memory up to a limit, beyond it in files that have no names, so that they are gone
/// with the process, however that ends.
#[derive(Debug)]
pub struct Carried {
    limit: u64,
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    values: BTreeMap<(usize, String), Value>,
    in_memory: u64,
    /// What is written to now. Files of earlier segments live as long as a value in them.
    spool: Option<Arc<Spool>>,
    spooled: u64,
}

#[derive(Debug)]
enum Value {
    Memory(Box<Tensor>),
    Disk { dtype: DataType, dims: Vec<usize>, spool: Arc<Spool>, offset: u64, len: usize },
}

#[derive(Debug)]
struct Spool(Mutex<(File, u64)>);

impl Carried {
    /// Keeps up to `limit` bytes in memory, and the rest in files in `folder`.
    #[must_use]
    pub fn new(limit: u64, folder: &Path) -> Self {
        Self { limit, folder: folder.to_owned(), state: Mutex::default() }
    }

    /// Keeps a tensor of a sample.
    ///
    /// # Errors
    /// [`Kind::Output`] where the temporary file cannot be made or written.
    pub fn put(&self, sample: usize, name: &str, tensor: Tensor) -> Result<()> {
        let bytes = tensor.raw();
        let spool = {
            let mut state = self.lock();
            if state.in_memory + bytes.len() as u64 <= self.limit {
                state.in_memory += bytes.len() as u64;
                state.values.insert((sample, name.to_owned()), Value::Memory(Box::new(tensor)));
                return Ok(());
            }
            state.spooled += bytes.len() as u64;
            match &state.spool {
                Some(spool) => spool.clone(),
                None => state.spool.insert(Arc::new(Spool::new(&self.folder)?)).clone(),
            }
        };
        let offset = spool.write(&bytes).map_err(|e| Error::io(Kind::Output, "write", &self.folder, e))?;
        let (dtype, dims) = (tensor.dtype(), tensor.dims());
        let value = Value::Disk { dtype, dims, spool, offset, len: bytes.len() };
        self.lock().values.insert((sample, name.to_owned()), value);
        Ok(())
    }

    /// A tensor of a sample, which stays; `None` where it was not kept.
    ///
    /// # Errors
    /// [`Kind::Output`] where the temporary file cannot be read.
    pub fn get(&self, sample: usize, name: &str) -> Result<Option<Tensor>> {
        let (dtype, dims, spool, offset, len) = match self.lock().values.get(&(sample, name.to_owned())) {
            None => return Ok(None),
            Some(Value::Memory(tensor)) => return Ok(Some(Tensor::clone(tensor))),
            Some(Value::Disk { dtype, dims, spool, offset, len }) => {
                (*dtype, dims.clone(), spool.clone(), *offset, *len)
            }
        };
        let bytes = spool.read(offset, len).map_err(|e| Error::io(Kind::Output, "read from", &self.folder, e))?;
        Ok(Some(Tensor::new(dtype, &dims, bytes)))
    }

    /// Drops those tensors of a sample that `keep` refuses by name.
    pub fn retain(&self, sample: usize, keep: impl Fn(&str) -> bool) {
        let mut state = self.lock();
        let own = (sample, String::new())..(sample + 1, String::new());
        let gone: Vec<_> =
            state.values.range(own).filter(|(key, _)| !keep(&key.1)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            if let Some(Value::Memory(tensor)) = state.values.remove(&key) {
                state.in_memory -= tensor.raw().len() as u64;
            }
        }
    }

    /// From here on, what does not fit goes to another file, so that the space of the last one can be freed.
    pub fn turn(&self) {
        self.lock().spool = None;
    }

    /// Bytes that are in memory now.
    #[must_use]
    pub fn in_memory(&self) -> u64 {
        self.lock().in_memory
    }

    /// Bytes that went to files so far.
    #[must_use]
    pub fn spooled(&self) -> u64 {
        self.lock().spooled
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spool {
    fn new(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder)
            .map_err(|e| Error::io(Kind::Output, "write temporary files to", folder, file::without_path(e)))?;
        Ok(Self(Mutex::new((file, 0))))
    }

    fn write(&self, bytes: &[u8]) -> std::io::Result<u64> {
        let (file, end) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(*end))?;
        file.write_all(bytes)?;
        let offset = *end;
        *end += bytes.len() as u64;
        Ok(offset)
    }

    fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let (file, _) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_from_memory_and_from_disk() {
        let folder = tempfile::tempdir().unwrap();
        let names = |sample: usize| format!("t{sample}");
        for limit in [0, 50, u64::MAX] {
            let carried = Carried::new(limit, folder.path());
            let tensor = |sample: usize| Tensor::from_f32(&[2, 3], &[sample as f32 + 0.5; 6]);
            for sample in 0..5 {
                carried.put(sample, &names(sample), tensor(sample)).unwrap();
                carried.put(sample, "other", Tensor::from_i64(&[1], &[sample as i64])).unwrap();
            }
            assert!(carried.in_memory() <= limit);
            assert_eq!(carried.in_memory() + carried.spooled(), 5 * 32, "limit {limit}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "files have no names");
            carried.turn();
            for sample in 0..5 {
                assert_eq!(carried.get(sample, &names(sample)).unwrap(), Some(tensor(sample)));
                assert_eq!(carried.get(sample, "none").unwrap(), None);
                carried.retain(sample, |name| name == "other");
                assert_eq!(carried.get(sample, &names(sample)).unwrap(), None);
                assert_eq!(carried.get(sample, "other").unwrap(), Some(Tensor::from_i64(&[1], &[sample as i64])));
                carried.retain(sample, |_| false);
            }
            assert_eq!(carried.in_memory(), 0);
        }
    }
}
