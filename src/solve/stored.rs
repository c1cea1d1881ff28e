//! Solved weights, as a solution holds them.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;

use super::{Fit, SolvedWeight};
use crate::error::Result;
use crate::ir::{Model, Scratch, Tensor, file};
use crate::numerics::dequantize;
use crate::onnx::DataType;
use crate::plan::Weight;
use crate::quant::{QuantizedTensor, ZeroPoints};

/// A solved weight, shared by all who have the same.
///
/// Groups of a large model have scales and zero points in such numbers that they are held in its
/// [`Scratch`], from which [`tensor`](Self::tensor) reads them.
#[derive(Clone, Debug)]
pub struct StoredWeight(Arc<Stored>);

#[derive(Debug)]
struct Stored {
    held: Held,
    sqnr_db: f64,
    fit: Option<Fit>,
}

#[derive(Debug)]
enum Held {
    InMemory(QuantizedTensor),
    Parked(Parked),
}

/// A tensor whose scales and zero points are held elsewhere.
#[derive(Debug)]
struct Parked {
    /// All but these.
    rest: QuantizedTensor,
    scales: Bytes,
    /// Of the type that the empty ones of `rest` have.
    zero_points: Bytes,
}

impl StoredWeight {
    /// A weight of `model`.
    #[must_use]
    pub fn new(model: &Model, weight: SolvedWeight) -> Self {
        let SolvedWeight { mut tensor, sqnr_db, fit } = weight;
        let held = match model.scratch() {
            None => Held::InMemory(tensor),
            Some(scratch) => {
                tensor.codes = scratch.keep(tensor.codes);
                if tensor.scales.len() < PARKED {
                    Held::InMemory(tensor)
                } else {
                    Held::Parked(Parked::new(tensor, scratch))
                }
            }
        };
        Self(Arc::new(Stored { held, sqnr_db, fit }))
    }

    /// Codes, scales and zero points.
    #[must_use]
    pub fn tensor(&self) -> Cow<'_, QuantizedTensor> {
        match &self.0.held {
            Held::InMemory(tensor) => Cow::Borrowed(tensor),
            Held::Parked(parked) => Cow::Owned(parked.read()),
        }
    }

    /// What the codes stand for, in the type and shape of the constant; `None` where that holds no floats.
    ///
    /// # Errors
    /// Codes that do not fit their scales.
    pub fn read_back(&self, weight: &Weight, constant: &Tensor) -> Result<Option<Tensor>> {
        let tensor = self.tensor();
        let mut numbers =
            dequantize(&tensor.codes, tensor.format, &tensor.dims, &tensor.granularity, &tensor.qparams())?;
        if let (true, &[rows, columns]) = (weight.transpose, tensor.dims.as_slice()) {
            numbers = (0..rows * columns).map(|at| numbers[at % rows * columns + at / rows]).collect();
        }
        Ok(Tensor::from_f64(constant.dtype(), &constant.dims(), numbers.into_iter().map(f64::from)))
    }

    /// What needs no scales.
    fn rest(&self) -> &QuantizedTensor {
        match &self.0.held {
            Held::InMemory(tensor) => tensor,
            Held::Parked(parked) => &parked.rest,
        }
    }

    /// The shape in which it is stored.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.rest().dims
    }

    /// The codes.
    #[must_use]
    pub fn codes(&self) -> Tensor {
        let QuantizedTensor { format, dims, codes, .. } = self.rest();
        Tensor::new(DataType::from(*format), dims, codes.clone())
    }

    /// Number of scales.
    #[must_use]
    pub fn scale_count(&self) -> usize {
        match &self.0.held {
            Held::InMemory(tensor) => tensor.scales.len(),
            Held::Parked(parked) => parked.scales.len() / size_of::<f32>(),
        }
    }

    /// Signal to quantization noise over the whole tensor, in dB.
    #[must_use]
    pub fn sqnr_db(&self) -> f64 {
        self.0.sqnr_db
    }

    /// What an algorithm made of it, where one was asked for.
    #[must_use]
    pub fn fit(&self) -> Option<Fit> {
        self.0.fit
    }
}

impl PartialEq for StoredWeight {
    /// Whether both give the same codes, scales and zero points.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.tensor() == other.tensor()
    }
}

impl Parked {
    fn new(mut tensor: QuantizedTensor, scratch: &Scratch) -> Self {
        let scales = scratch.keep(bytes_of(&std::mem::take(&mut tensor.scales), f32::to_le_bytes));
        let zero_points = scratch.keep(match &mut tensor.zero_points {
            ZeroPoints::Integers(zeros) => bytes_of(&std::mem::take(zeros), i32::to_le_bytes),
            ZeroPoints::Floats(zeros) => bytes_of(&std::mem::take(zeros), f32::to_le_bytes),
        });
        Self { rest: tensor, scales, zero_points }
    }

    fn read(&self) -> QuantizedTensor {
        QuantizedTensor {
            scales: numbers(&self.scales, f32::from_le_bytes),
            zero_points: match &self.rest.zero_points {
                ZeroPoints::Integers(_) => ZeroPoints::Integers(numbers(&self.zero_points, i32::from_le_bytes)),
                ZeroPoints::Floats(_) => ZeroPoints::Floats(numbers(&self.zero_points, f32::from_le_bytes)),
            },
            ..self.rest.clone()
        }
    }
}

fn bytes_of<T: Copy>(numbers: &[T], bytes: fn(T) -> [u8; 4]) -> Bytes {
    numbers.iter().flat_map(|&v| bytes(v)).collect()
}

/// Reads numbers, and lets go of the memory that they were mapped to.
fn numbers<T>(bytes: &Bytes, number: fn([u8; 4]) -> T) -> Vec<T> {
    let found = bytes.as_chunks().0.iter().map(|&b| number(b)).collect();
    file::release(bytes);
    found
}

/// Scales from which on they are held elsewhere.
const PARKED: usize = 1 << 16;
