//! Solved weights, as a solution holds them.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;

use super::SolvedWeight;
use crate::ir::{Model, file};
use crate::numerics::QParams;

/// A solved weight, shared by all who have the same.
///
/// Groups of a large model have scales and zero points in such numbers that they are held in its
/// [`Scratch`](crate::ir::Scratch). The fields of [`SolvedWeight`] are empty then: ask [`qparams`](Self::qparams)
/// and [`float_zero_points`](Self::float_zero_points).
#[derive(Clone, Debug)]
pub struct StoredWeight(Arc<Stored>);

#[derive(Debug)]
struct Stored {
    weight: SolvedWeight,
    /// Scales and zero points, where they are held elsewhere.
    parked: Option<[Bytes; 2]>,
    /// Zero points between codes, likewise.
    parked_floats: Option<Bytes>,
}

impl StoredWeight {
    /// A weight of `model`.
    #[must_use]
    pub fn new(model: &Model, mut weight: SolvedWeight) -> Self {
        weight.codes = model.keep(weight.codes);
        let parked = model.scratch().filter(|_| weight.qparams.scales.len() >= PARKED).map(|scratch| {
            let QParams { scales, zero_points } = std::mem::replace(&mut weight.qparams, EMPTY);
            let zero_points: Vec<u8> = zero_points.iter().flat_map(|v| v.to_le_bytes()).collect();
            [bytes_of(&scales), zero_points].map(|bytes| scratch.keep(bytes.into()))
        });
        let floats = model.scratch().zip(weight.float_zero_points.take_if(|_| parked.is_some()));
        let parked_floats = floats.map(|(scratch, floats)| scratch.keep(bytes_of(&floats).into()));
        Self(Arc::new(Stored { weight, parked, parked_floats }))
    }

    /// Scales and zero points.
    #[must_use]
    pub fn qparams(&self) -> Cow<'_, QParams> {
        let Some([scales, zero_points]) = &self.0.parked else { return Cow::Borrowed(&self.0.weight.qparams) };
        let found = QParams {
            scales: floats_of(scales),
            zero_points: zero_points.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect(),
        };
        file::release(scales);
        file::release(zero_points);
        Cow::Owned(found)
    }

    /// Zero points between codes, where there are some.
    #[must_use]
    pub fn float_zero_points(&self) -> Option<Cow<'_, [f32]>> {
        let Some(parked) = &self.0.parked_floats else {
            return self.0.weight.float_zero_points.as_deref().map(Cow::Borrowed);
        };
        let found = floats_of(parked);
        file::release(parked);
        Some(Cow::Owned(found))
    }

    /// Number of scales.
    #[must_use]
    pub fn scale_count(&self) -> usize {
        self.0.parked.as_ref().map_or(self.0.weight.qparams.scales.len(), |[scales, _]| scales.len() / size_of::<f32>())
    }
}

impl Deref for StoredWeight {
    type Target = SolvedWeight;

    fn deref(&self) -> &SolvedWeight {
        &self.0.weight
    }
}

impl PartialEq for StoredWeight {
    /// Whether both give the same codes, scales and zero points.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || self.qparams() == other.qparams()
                && self.codes == other.codes
                && self.float_zero_points() == other.float_zero_points()
    }
}

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// Scales from which on they are held elsewhere.
const PARKED: usize = 1 << 16;

const EMPTY: QParams = QParams { scales: Vec::new(), zero_points: Vec::new() };
