//! Solved weights, as a solution holds them.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;

use super::{Fit, SolvedWeight};
use crate::ir::{Model, Tensor, file};
use crate::quant::QParams;

/// A solved weight, shared by all who have the same.
///
/// Groups of a large model have scales and zero points in such numbers that they are held in its
/// [`Scratch`](crate::ir::Scratch), from which [`qparams`](Self::qparams) and
/// [`float_zero_points`](Self::float_zero_points) read them.
#[derive(Clone, Debug)]
pub struct StoredWeight(Arc<Stored>);

#[derive(Debug)]
struct Stored {
    codes: Tensor,
    numbers: Numbers,
    tensor_scale: Option<f32>,
    sqnr_db: f64,
    fit: Option<Fit>,
}

/// Scales and zero points, and zero points between codes where there are some.
#[derive(Debug)]
enum Numbers {
    InMemory(QParams, Option<Vec<f32>>),
    Parked { scales: Bytes, zero_points: Bytes, floats: Option<Bytes> },
}

impl StoredWeight {
    /// A weight of `model`.
    #[must_use]
    pub fn new(model: &Model, weight: SolvedWeight) -> Self {
        let SolvedWeight { qparams, codes, tensor_scale, float_zero_points, sqnr_db, fit } = weight;
        let numbers = match model.scratch().filter(|_| qparams.scales.len() >= PARKED) {
            None => Numbers::InMemory(qparams, float_zero_points),
            Some(scratch) => Numbers::Parked {
                scales: scratch.keep(bytes_of(&qparams.scales, f32::to_le_bytes)),
                zero_points: scratch.keep(bytes_of(&qparams.zero_points, i32::to_le_bytes)),
                floats: float_zero_points.map(|zeros| scratch.keep(bytes_of(&zeros, f32::to_le_bytes))),
            },
        };
        Self(Arc::new(Stored { codes: model.keep(codes), numbers, tensor_scale, sqnr_db, fit }))
    }

    /// The codes, packed, in the shape in which they are stored: transposed where the weight is to be.
    #[must_use]
    pub fn codes(&self) -> &Tensor {
        &self.0.codes
    }

    /// Scales and zero points.
    #[must_use]
    pub fn qparams(&self) -> Cow<'_, QParams> {
        match &self.0.numbers {
            Numbers::InMemory(qparams, _) => Cow::Borrowed(qparams),
            Numbers::Parked { scales, zero_points, floats: _ } => Cow::Owned(QParams {
                scales: read(scales, f32::from_le_bytes),
                zero_points: read(zero_points, i32::from_le_bytes),
            }),
        }
    }

    /// Zero points between codes, where there are some, counted in unsigned codes; those of [`qparams`](Self::qparams) are
    /// the nearest codes.
    #[must_use]
    pub fn float_zero_points(&self) -> Option<Cow<'_, [f32]>> {
        match &self.0.numbers {
            Numbers::InMemory(_, floats) => floats.as_deref().map(Cow::Borrowed),
            Numbers::Parked { scales: _, zero_points: _, floats } => {
                floats.as_ref().map(|floats| Cow::Owned(read(floats, f32::from_le_bytes)))
            }
        }
    }

    /// Number of scales.
    #[must_use]
    pub fn scale_count(&self) -> usize {
        match &self.0.numbers {
            Numbers::InMemory(qparams, _) => qparams.scales.len(),
            Numbers::Parked { scales, zero_points: _, floats: _ } => scales.len() / size_of::<f32>(),
        }
    }

    /// The scale of the whole tensor, where its groups have float8 scales beneath it; [`qparams`](Self::qparams) has the
    /// products of both.
    #[must_use]
    pub fn tensor_scale(&self) -> Option<f32> {
        self.0.tensor_scale
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
        Arc::ptr_eq(&self.0, &other.0)
            || self.qparams() == other.qparams()
                && self.codes() == other.codes()
                && self.tensor_scale() == other.tensor_scale()
                && self.float_zero_points() == other.float_zero_points()
    }
}

fn bytes_of<T: Copy>(numbers: &[T], bytes: fn(T) -> [u8; 4]) -> Bytes {
    numbers.iter().flat_map(|&v| bytes(v)).collect()
}

/// Reads numbers, and lets go of the memory that they were mapped to.
fn read<T>(bytes: &Bytes, number: fn([u8; 4]) -> T) -> Vec<T> {
    let found = bytes.as_chunks().0.iter().map(|&b| number(b)).collect();
    file::release(bytes);
    found
}

/// Scales from which on they are held elsewhere.
const PARKED: usize = 1 << 16;
