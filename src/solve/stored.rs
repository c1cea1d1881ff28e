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
/// [`Scratch`](crate::ir::Scratch). The field [`qparams`](SolvedWeight::qparams) is empty then: ask [`qparams`](Self::qparams).
#[derive(Clone, Debug)]
pub struct StoredWeight(Arc<Stored>);

#[derive(Debug)]
struct Stored {
    weight: SolvedWeight,
    /// Scales and zero points, where they are held elsewhere.
    parked: Option<[Bytes; 2]>,
}

impl StoredWeight {
    /// A weight of `model`.
    #[must_use]
    pub fn new(model: &Model, mut weight: SolvedWeight) -> Self {
        weight.codes = model.keep(weight.codes);
        let parked = model.scratch().filter(|_| weight.qparams.scales.len() >= PARKED).map(|scratch| {
            let QParams { scales, zero_points } = std::mem::replace(&mut weight.qparams, EMPTY);
            let scales: Vec<u8> = scales.iter().flat_map(|v| v.to_le_bytes()).collect();
            let zero_points: Vec<u8> = zero_points.iter().flat_map(|v| v.to_le_bytes()).collect();
            [scales, zero_points].map(|bytes| scratch.keep(bytes.into()))
        });
        Self(Arc::new(Stored { weight, parked }))
    }

    /// Scales and zero points.
    #[must_use]
    pub fn qparams(&self) -> Cow<'_, QParams> {
        let Some([scales, zero_points]) = &self.0.parked else { return Cow::Borrowed(&self.0.weight.qparams) };
        let found = QParams {
            scales: scales.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            zero_points: zero_points.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect(),
        };
        file::release(scales);
        file::release(zero_points);
        Cow::Owned(found)
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
        Arc::ptr_eq(&self.0, &other.0) || self.qparams() == other.qparams() && self.codes == other.codes
    }
}

/// Scales from which on they are held elsewhere.
const PARKED: usize = 1 << 16;

const EMPTY: QParams = QParams { scales: Vec::new(), zero_points: Vec::new() };
