//! An array in a file: the header is read at once, elements on demand.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::convert::{from_fortran, swap_bytes};
use super::npy::{Header, read_header};
use super::zip::{self, Member};
use crate::error::{Error, Kind, Result};

/// The hint for incomplete files.
pub(super) const INTERRUPTED: &str = "the file is damaged: was writing or copying it interrupted? write it again";

/// An array that was found, and checked to be complete.
#[derive(Debug)]
pub(super) struct Array {
    pub(super) path: PathBuf,
    /// The key in its archive; `None` for a file of its own.
    key: Option<String>,
    pub(super) header: Header,
    member: Option<Member>,
    /// Its offset in the spill file, once it was written there.
    spilled: Mutex<Option<u64>>,
}

/// An unnamed temporary file for arrays whose rows are not contiguous in their own file: compressed ones, and those in
/// Fortran order. Created on first use.
#[derive(Debug, Default)]
pub(super) struct Spill(Mutex<Option<File>>);

/// The array in a `.npy` file.
pub(super) fn open_npy(path: &Path) -> Result<Array> {
    let mut file = open(path)?;
    let length = file.metadata().map_err(|e| Error::io(Kind::Samples, "read", path, e))?.len();
    let header = read_header(&mut file).map_err(|e| in_file(e, path))?;
    let array = Array { path: path.to_owned(), key: None, header, member: None, spilled: Mutex::default() };
    array.check_length(length)?;
    Ok(array)
}

/// The arrays in a `.npz` file with their keys, in the order of the file.
pub(super) fn open_npz(path: &Path) -> Result<Vec<(String, Array)>> {
    let mut file = open(path)?;
    let members = zip::members(&mut file).map_err(|e| in_file(e, path))?;
    let mut arrays: Vec<(String, Array)> = Vec::new();
    for member in members {
        let Some(key) = member.name.strip_suffix(".npy").map(str::to_owned) else { continue };
        if arrays.iter().any(|(other, _)| *other == key) {
            let error = Error::new(Kind::Samples, "the archive holds two arrays of this name");
            return Err(in_file(error, path).at_value(&key));
        }
        let mut bytes = member.open(open(path)?).map_err(|e| Error::io(Kind::Samples, "read", path, e))?;
        let header = read_header(&mut bytes).map_err(|e| in_file(e, path).at_value(&key))?;
        let size = member.size;
        let array = Array {
            path: path.to_owned(),
            key: Some(key.clone()),
            header,
            member: Some(member),
            spilled: Mutex::default(),
        };
        array.check_length(size)?;
        arrays.push((key, array));
    }
    Ok(arrays)
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::io(Kind::Samples, "read", path, e))
}

pub(super) fn temporary(source: io::Error) -> Error {
    Error::io(Kind::Output, "use a temporary file in", &std::env::temp_dir(), source)
        .with_hint("set TMPDIR to a folder with room for the samples")
}

/// Adds the file to an error, and how to write such files if it has no hint.
fn in_file(error: Error, path: &Path) -> Error {
    error.in_file(path).with_hint("write samples with numpy: np.savez(path, input_name=array, ...)")
}

impl Array {
    fn error(&self, message: impl Into<String>) -> Error {
        let error = Error::new(Kind::Samples, message).in_file(&self.path);
        match &self.key {
            Some(key) => error.at_value(key),
            None => error,
        }
    }

    fn io(&self, source: io::Error) -> Error {
        let error = Error::io(Kind::Samples, "read", &self.path, source);
        match &self.key {
            Some(key) => error.at_value(key),
            None => error,
        }
    }

    /// Bytes of all elements; checked by [`Self::check_length`].
    fn byte_len(&self) -> usize {
        self.header.shape.iter().product::<usize>() * self.header.element.bytes()
    }

    fn check_length(&self, length: u64) -> Result<()> {
        let Header { element, shape, offset, .. } = &self.header;
        let count = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        let needed = count.and_then(|n| n.checked_mul(element.bytes() as u64)?.checked_add(*offset));
        match needed {
            Some(needed) if needed == length => Ok(()),
            Some(needed) if needed > length => Err(self
                .error(format!("the array is truncated: it needs {needed} bytes and has {length}"))
                .with_hint(INTERRUPTED)),
            Some(needed) => Err(self.error(format!("the array ends {} bytes before its file", length - needed))),
            None => Err(self.error(format!("the array has the impossible shape {shape:?}"))),
        }
    }

    /// Elements `first..first + count` in C order (last axis fastest), as little-endian bytes.
    ///
    /// Contiguous elements are read from the file. A compressed or Fortran-ordered array is unpacked each time if all of
    /// it is needed, otherwise once, to the spill file; only Fortran order needs the whole array in memory.
    pub(super) fn read(&self, first: usize, count: usize, spill: &Spill) -> Result<Vec<u8>> {
        let width = self.header.element.bytes();
        let (first, length) = (first * width, count * width);
        let deflated = self.member.as_ref().is_some_and(|m| m.deflated);
        let mut bytes = if !deflated && !self.header.fortran {
            let start = self.member.as_ref().map_or(0, |m| m.offset) + self.header.offset;
            let mut file = open(&self.path)?;
            let mut bytes = vec![0; length];
            file.seek(SeekFrom::Start(start + first as u64))
                .and_then(|_| file.read_exact(&mut bytes))
                .map_err(|e| self.io(e))?;
            bytes
        } else if length == self.byte_len() {
            let mut bytes = Vec::new();
            bytes
                .try_reserve_exact(length)
                .map_err(|e| self.error(format!("the array does not fit in memory: {e}")))?;
            self.unpack(&mut bytes)?;
            bytes
        } else {
            self.read_spilled(first, length, spill)?
        };
        if self.header.big_endian {
            swap_bytes(&mut bytes, width);
        }
        Ok(bytes)
    }

    fn read_spilled(&self, first: usize, length: usize, spill: &Spill) -> Result<Vec<u8>> {
        // The array's lock is taken before the file's, so that arrays are unpacked once each.
        let mut place = self.spilled.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = spill.0.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &mut *file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile().map_err(temporary)?),
        };
        let start = if let Some(start) = *place {
            start
        } else {
            let start = file.seek(SeekFrom::End(0)).map_err(temporary)?;
            let mut out = io::BufWriter::with_capacity(1 << 16, &mut *file);
            self.unpack(&mut out)?;
            out.flush().map_err(temporary)?;
            *place = Some(start);
            start
        };
        let mut bytes = vec![0; length];
        file.seek(SeekFrom::Start(start + first as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(temporary)?;
        Ok(bytes)
    }

    /// Writes all elements, last axis fastest.
    fn unpack(&self, out: &mut impl Write) -> Result<()> {
        let mut check = flate2::Crc::new();
        let file = open(&self.path)?;
        let mut from: Box<dyn Read> = match &self.member {
            Some(member) => member.open(file).map_err(|e| self.io(e))?,
            None => Box::new(file),
        };
        let mut header = vec![0; self.header.offset as usize];
        from.read_exact(&mut header).map_err(|e| self.io(e))?;
        check.update(&header);
        let mut whole = Vec::new();
        let mut left = self.byte_len();
        let mut buffer = vec![0; left.min(1 << 16)];
        while left > 0 {
            let part = &mut buffer[..left.min(1 << 16)];
            from.read_exact(part).map_err(|e| self.io(e))?;
            check.update(part);
            left -= part.len();
            if self.header.fortran {
                whole.extend_from_slice(part);
            } else {
                out.write_all(part).map_err(temporary)?;
            }
        }
        if self.member.as_ref().is_some_and(|m| m.crc != check.sum()) {
            return Err(self.damaged());
        }
        let elements = from_fortran(&whole, &self.header.shape, self.header.element.bytes());
        out.write_all(&elements).map_err(temporary)
    }

    /// Verifies the checksum of a stored member. Members that [`Self::read`] unpacks are verified there.
    pub(super) fn verify(&self) -> Result<()> {
        match &self.member {
            Some(member) if !member.deflated => {
                let mut bytes = member.open(open(&self.path)?).map_err(|e| self.io(e))?;
                let mut check = flate2::CrcWriter::new(io::sink());
                io::copy(&mut bytes, &mut check).map_err(|e| self.io(e))?;
                if check.crc().sum() == member.crc { Ok(()) } else { Err(self.damaged()) }
            }
            _ => Ok(()),
        }
    }

    fn damaged(&self) -> Error {
        self.error("the array does not match its checksum").with_hint(INTERRUPTED)
    }
}
