//! Files of raw little-endian elements, last axis fastest. Type and shape come from the model.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::inputs::{Dim, Input};
use crate::error::{Error, Kind, Result};
use crate::onnx::DataType;

/// A file with one sample, or several in a row.
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) path: PathBuf,
    pub(super) dtype: DataType,
    /// Of one sample.
    pub(super) shape: Vec<usize>,
    /// Samples in the file.
    pub(super) count: usize,
    size: usize,
}

impl Raw {
    /// Checks the file's length. A free first axis is 1. If one other axis is free, the file is one sample, and its
    /// length determines that axis; otherwise it may hold several samples.
    pub(super) fn open(path: &Path, input: &Input) -> Result<Self> {
        let fail = |message: String| Error::new(Kind::Samples, message).at_value(&input.name).in_file(path);
        let length = std::fs::metadata(path).map_err(|e| Error::io(Kind::Samples, "read", path, e))?.len();
        let npy = "save the samples as .npy or .npz, which have types and shapes";
        let Some(dtype) = input.dtype else {
            return Err(fail("the model does not declare the type of this input".to_owned()).with_hint(npy));
        };
        let Some(width) = dtype.bits().filter(|b| b % 8 == 0).map(|b| b as u64 / 8) else {
            return Err(fail(format!("elements of type {dtype} are not whole bytes")).with_hint(npy));
        };
        let Some(dims) = &input.dims else {
            return Err(fail("the model does not declare how many axes this input has".to_owned()).with_hint(npy));
        };
        let mut free = Vec::new();
        let mut shape = Vec::new();
        for (axis, dim) in dims.iter().enumerate() {
            shape.push(match dim {
                Dim::Fixed(size) => *size,
                Dim::Free(_) if axis == 0 => 1,
                Dim::Free(name) => {
                    let name = if name.is_empty() { format!("{}.{axis}", input.name) } else { name.clone() };
                    free.push((axis, name));
                    1
                }
            });
        }
        let size = shape.iter().try_fold(width, |n, &d| n.checked_mul(d as u64)).filter(|n| *n > 0);
        let Some(size) = size else {
            return Err(fail(format!("the input has the impossible shape {}", input.shape_text(None))));
        };
        if free.len() > 1 {
            let dims: Vec<String> = free.iter().map(|(_, name)| format!("--dim {name}=SIZE")).collect();
            let message =
                format!("the input takes {}, but the file does not say how large that is", input.shape_text(None));
            return Err(fail(message).with_hint(format!("pass {}", dims.join(" "))));
        }
        if length == 0 || length % size != 0 {
            let what = if free.is_empty() { "one sample" } else { "a row" };
            let message = format!(
                "the input takes {} of {dtype}, {size} bytes for {what}, but the file has {length}, which is not a multiple",
                input.shape_text(None)
            );
            return Err(fail(message).with_hint("is the file complete, and of this type? it has no header"));
        }
        let times = (length / size) as usize;
        let (count, size) = match free.first() {
            Some(&(axis, _)) => {
                shape[axis] = times;
                (1, length as usize)
            }
            None => (times, size as usize),
        };
        Ok(Self { path: path.to_owned(), dtype, shape, count, size })
    }

    /// The bytes of one sample.
    pub(super) fn read(&self, row: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.size];
        let io = |e| Error::io(Kind::Samples, "read", &self.path, e);
        let mut file = File::open(&self.path).map_err(io)?;
        file.seek(SeekFrom::Start((row * self.size) as u64)).and_then(|_| file.read_exact(&mut bytes)).map_err(io)?;
        Ok(bytes)
    }
}
