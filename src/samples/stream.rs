//! Samples from a stream, such as stdin: a program hands them over one by one, and none of them needs a file.
//!
//! An array is a line with the name of its input, followed by what numpy writes to a `.npy` file. An empty line ends a
//! sample, and the end of the stream, which may only come after one, ends the set.

use std::fs::File;
use std::io::{BufRead, Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, PoisonError};

use super::array::temporary;
use super::convert::{from_fortran, swap_bytes};
use super::inputs::{self, Input};
use super::npy::{Header, read_header};
use super::parts::{Part, Stored, array_part};
use crate::error::{Error, Kind, Result};

/// What a set may take in memory; an unnamed file holds what comes after that.
const MEMORY: usize = 1 << 28;

/// The longest name of an input.
const NAME: u64 = 1 << 16;

/// An array that came from a stream, little-endian and with its last axis fastest.
#[derive(Debug)]
pub(super) struct Streamed {
    pub(super) header: Header,
    bytes: Kept,
}

#[derive(Debug)]
enum Kept {
    Memory(Vec<u8>),
    File(Arc<Mutex<File>>, u64),
}

impl Streamed {
    /// The bytes of `count` elements from the one at `first` on.
    pub(super) fn read(&self, first: usize, count: usize) -> Result<Vec<u8>> {
        let width = self.header.element.bytes();
        match &self.bytes {
            Kept::Memory(bytes) => Ok(bytes[first * width..(first + count) * width].to_vec()),
            Kept::File(file, at) => {
                let mut bytes = vec![0; count * width];
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let start = SeekFrom::Start(at + (first * width) as u64);
                file.seek(start).and_then(|_| file.read_exact(&mut bytes)).map_err(temporary)?;
                Ok(bytes)
            }
        }
    }
}

/// Where arrays are kept until they are read, which may be several times.
#[derive(Default)]
struct Store {
    memory: usize,
    file: Option<Arc<Mutex<File>>>,
}

impl Store {
    fn keep(&mut self, bytes: Vec<u8>) -> Result<Kept> {
        if self.memory + bytes.len() <= MEMORY {
            self.memory += bytes.len();
            return Ok(Kept::Memory(bytes));
        }
        let file = match &self.file {
            Some(file) => file.clone(),
            None => self.file.insert(Arc::new(Mutex::new(tempfile::tempfile().map_err(temporary)?))).clone(),
        };
        let mut end = file.lock().unwrap_or_else(PoisonError::into_inner);
        let at = end.seek(SeekFrom::End(0)).map_err(temporary)?;
        end.write_all(&bytes).map_err(temporary)?;
        drop(end);
        Ok(Kept::File(file, at))
    }
}

/// Reads samples to the end of the stream.
pub(super) fn read(from: &mut impl BufRead, inputs: &[Input]) -> Result<Vec<Part>> {
    let mut store = Store::default();
    let mut parts = Vec::new();
    while !from.fill_buf().map_err(unreadable)?.is_empty() {
        let part = sample(from, inputs, &mut store).map_err(|e| e.at_sample(&parts.len().to_string()))?;
        parts.push(part);
    }
    if parts.is_empty() {
        return Err(Error::new(Kind::Samples, "the stream holds no samples").with_hint(FORM));
    }
    Ok(parts)
}

const FORM: &str = "for each sample, write a line with the name of an input and then its array with numpy.save, for all \
                    inputs, and then an empty line";

fn unreadable(source: std::io::Error) -> Error {
    Error::new(Kind::Samples, format!("cannot read the stream of samples: {source}")).with_source(source)
}

/// The arrays up to the next empty line.
fn sample(from: &mut impl BufRead, inputs: &[Input], store: &mut Store) -> Result<Part> {
    let mut arrays = Vec::new();
    loop {
        let mut name = Vec::new();
        from.by_ref().take(NAME).read_until(b'\n', &mut name).map_err(unreadable)?;
        if name.pop() != Some(b'\n') {
            let error = Error::new(Kind::Samples, "the stream ends within a sample, or is not one of samples");
            return Err(error.with_hint(FORM));
        }
        if name.is_empty() {
            return array_part(None, arrays, inputs);
        }
        let name = String::from_utf8_lossy(&name);
        let at = inputs::find(inputs, &name)?;
        let array = array(from, store).map_err(|e| e.at_value(&name).with_hint(FORM))?;
        arrays.push((at, Stored::Stream(with_batch(array, &inputs[at]))));
    }
}

fn array(from: &mut impl BufRead, store: &mut Store) -> Result<Streamed> {
    let mut header = read_header(from)?;
    let width = header.element.bytes();
    let size = header.shape.iter().try_fold(width, |size, &dim| size.checked_mul(dim));
    let impossible = || Error::new(Kind::Samples, format!("the array has the impossible shape {:?}", header.shape));
    let size = size.ok_or_else(impossible)?;
    // A size that is not true ends at the end of the stream, without memory for all of it.
    let mut bytes = Vec::new();
    from.take(size as u64).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() < size {
        let message = format!("the array is truncated: it needs {size} bytes and has {}", bytes.len());
        return Err(Error::new(Kind::Samples, message));
    }
    if header.fortran {
        bytes = from_fortran(&bytes, &header.shape, width).into_owned();
    }
    if header.big_endian {
        swap_bytes(&mut bytes, width);
    }
    (header.fortran, header.big_endian) = (false, false);
    Ok(Streamed { header, bytes: store.keep(bytes)? })
}

/// A first axis of 1 may be left out, so that rows of an array are samples of it.
fn with_batch(mut array: Streamed, input: &Input) -> Streamed {
    if input.dims.as_ref().is_some_and(|dims| dims.len() == array.header.shape.len() + 1) {
        array.header.shape.insert(0, 1);
    }
    array
}
