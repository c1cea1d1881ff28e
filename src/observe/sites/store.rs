//! Tensors of one sample that wait to be compared: in memory, or in a temporary file beyond a limit.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use crate::error::{Error, Kind, Result};

/// Bytes that wait in memory; what is more goes to a file.
const LIMIT: usize = 256 << 20;

pub(super) struct Store {
    slots: Vec<Slot>,
    held: usize,
    limit: usize,
    file: Option<File>,
    end: u64,
    failed: Option<std::io::Error>,
}

#[derive(Clone, Default)]
enum Slot {
    #[default]
    Empty,
    Memory(Vec<f32>),
    File {
        offset: u64,
        len: usize,
    },
}

impl Store {
    pub(super) fn new(slots: usize) -> Self {
        Self { slots: vec![Slot::Empty; slots], held: 0, limit: LIMIT, file: None, end: 0, failed: None }
    }

    pub(super) fn has(&self, at: usize) -> bool {
        !matches!(self.slots[at], Slot::Empty)
    }

    /// Keeps a copy.
    pub(super) fn put(&mut self, at: usize, values: &[f32]) {
        let bytes = size_of_val(values);
        self.slots[at] = if self.held + bytes <= self.limit {
            self.held += bytes;
            Slot::Memory(values.to_vec())
        } else {
            match self.write(values) {
                Ok(slot) => slot,
                Err(error) => {
                    self.failed.get_or_insert(error);
                    Slot::Empty
                }
            }
        };
    }

    /// A copy of what is kept.
    pub(super) fn get(&mut self, at: usize) -> Option<Vec<f32>> {
        match self.slots[at].clone() {
            Slot::Empty => None,
            Slot::Memory(values) => Some(values),
            Slot::File { offset, len } => match self.read(offset, len) {
                Ok(values) => Some(values),
                Err(error) => {
                    self.failed.get_or_insert(error);
                    None
                }
            },
        }
    }

    /// What is kept, which is kept no longer.
    pub(super) fn take(&mut self, at: usize) -> Option<Vec<f32>> {
        let values = self.get(at)?;
        if let Slot::Memory(values) = std::mem::take(&mut self.slots[at]) {
            self.held -= size_of_val(values.as_slice());
        }
        Some(values)
    }

    /// The first thing that went wrong with the file.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.failed.take() {
            None => Ok(()),
            Some(error) => Err(Error::io(Kind::Output, "use a temporary file in", &std::env::temp_dir(), error)),
        }
    }

    fn write(&mut self, values: &[f32]) -> std::io::Result<Slot> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile()?),
        };
        let offset = self.end;
        file.seek(SeekFrom::Start(offset))?;
        let mut out = std::io::BufWriter::with_capacity(1 << 16, file);
        for value in values {
            out.write_all(&value.to_le_bytes())?;
        }
        out.flush()?;
        self.end += size_of_val(values) as u64;
        Ok(Slot::File { offset, len: values.len() })
    }

    fn read(&mut self, offset: u64, len: usize) -> std::io::Result<Vec<f32>> {
        let Some(file) = &mut self.file else { return Ok(Vec::new()) };
        let mut bytes = vec![0; len * size_of::<f32>()];
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::Store;

    #[test]
    fn tensors_beyond_the_limit_come_back_from_a_file() {
        let mut store = Store { limit: 40, ..Store::new(4) };
        let large: Vec<f32> = (0..8).map(|i| i as f32).collect();
        store.put(0, &large);
        store.put(1, &[1.5, f32::NAN, -0.0]);
        store.put(2, &[2.5]);
        assert_eq!(store.end, 12, "three numbers are in the file");
        let back: Vec<u32> = store.get(1).into_iter().flatten().map(f32::to_bits).collect();
        assert_eq!(back, [1.5, f32::NAN, -0.0].map(f32::to_bits));
        assert_eq!(store.take(2), Some(vec![2.5]));
        assert!(!store.has(2) && !store.has(3) && store.get(3).is_none());
        assert_eq!(store.take(0), Some(large));
        assert_eq!(store.held, 0);
        assert!(store.check().is_ok());
    }
}
