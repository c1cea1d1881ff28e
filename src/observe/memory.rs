//! What a run takes in memory, and what it may take.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::runtime::{Footprint, Session, segments};
use crate::samples::SampleSet;

/// The process without models and samples: code, tables, buffers.
const BASE: u64 = 40 << 20;
/// A site's state, as large as it usually gets, without its record of each sample: values over twenty octaves on both sides
/// of zero.
const STATE: u64 = 100 << 10;
/// A site's record of a sample.
const RECORD: u64 = 64;

/// A limit that nothing reaches.
pub(super) const UNLIMITED: u64 = 1 << 60;

/// What a run may take in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory<'a> {
    /// Bytes that the process should stay below.
    pub limit: Option<u64>,
    /// Where temporary files are made for what does not fit; the system's folder for them where none is named, which may
    /// be kept in memory itself.
    pub folder: Option<&'a Path>,
    /// Bytes of weights that a segment may have. Where this is given the model runs in segments, whether or not a limit
    /// asks for it.
    pub segment: Option<u64>,
    /// Bytes of tensors between two segments that stay in memory; a quarter of what the limit leaves unless this is given.
    pub carried: Option<u64>,
}

/// What a run is expected to take in memory: an estimate by the shapes of tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of weights that are held at once.
    pub weights: u64,
    /// Bytes of tensors of one sample, the largest.
    pub sample: u64,
    /// Bytes of everything else: the program, and the states of sites.
    pub state: u64,
    /// Samples that run at once.
    pub threads: usize,
    /// Parts that the model runs in; zero where it runs as a whole.
    pub segments: usize,
    /// The limit, if one was given.
    pub limit: Option<u64>,
}

impl Estimate {
    /// All of it, in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.sample * self.threads as u64 + self.state
    }
}

/// A limit, divided.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    /// For weights and samples.
    pub available: u64,
    /// All weights of the model.
    pub weights: u64,
    /// For the weights of a segment, where that was asked for.
    pub segment: Option<u64>,
    /// For tensors between segments.
    pub carried: u64,
}

impl Memory<'_> {
    /// What the limit leaves for the model, if there is a limit.
    ///
    /// # Errors
    /// A limit below what a process takes that does nothing.
    pub(super) fn share(&self, model: &Model, sites: usize, samples: usize) -> Result<Option<Share>> {
        if samples == 0 || self.limit.is_none() && self.segment.is_none() {
            return Ok(None);
        }
        self.divide(model, sites, samples).map(Some)
    }

    /// The limit divided, or as much as there may be where there is none.
    ///
    /// # Errors
    /// As [`share`](Self::share).
    pub(super) fn divide(&self, model: &Model, sites: usize, samples: usize) -> Result<Share> {
        let limit = self.limit.unwrap_or(UNLIMITED);
        let fixed = state(sites, samples);
        let Some(available) = limit.checked_sub(fixed).filter(|&left| left > 0) else {
            return Err(too_low("the program and its statistics alone", fixed, limit));
        };
        let carried = self.carried.unwrap_or(available / 4).min(available / 4);
        Ok(Share { available, weights: segments::weights(model), segment: self.segment, carried })
    }
}

impl Share {
    /// Whether the model could be held as a whole, with a sixteenth for what the runtime adds to weights.
    pub fn holds_model(&self) -> bool {
        self.segment.is_none() && self.weights + self.weights / 16 < self.available
    }

    /// How many samples may run at once, up to `most`; `None` where not even one may.
    pub fn threads(&self, estimate: &Estimate, most: usize) -> Option<usize> {
        let left = self.available.checked_sub(estimate.weights + estimate.weights / 16)?;
        let count = left.checked_div(estimate.sample).map_or(most, |count| count.min(most as u64) as usize);
        (count > 0).then_some(count)
    }
}

/// The program and the states of sites, in bytes.
pub(super) fn state(sites: usize, samples: usize) -> u64 {
    BASE + sites as u64 * (STATE + samples as u64 * RECORD)
}

/// What weights and the first sample of an order take, which is the largest; `None` where there is no sample, or the runtime
/// does not tell.
pub(super) fn estimate(session: &Session, samples: &SampleSet, order: &[usize]) -> Result<Option<Estimate>> {
    let Some(&first) = order.first() else { return Ok(None) };
    let found = session.footprint(&samples.get(first)?)?;
    Ok(found.map(|Footprint { weights, sample }| Estimate { weights, sample, ..Estimate::default() }))
}

/// Whether two such models, and nothing else of size, stay below the limit: a model and its quantized form are compared
/// in the same run.
#[must_use]
pub fn fits_twice(model: &Model, limit: Option<u64>) -> bool {
    limit.is_none_or(|limit| BASE + segments::weights(model) * 17 / 8 < limit)
}

/// The error of a limit that cannot be kept to.
pub(super) fn too_low(what: &str, needed: u64, limit: u64) -> Error {
    let mega = |bytes: u64| bytes.div_ceil(1_000_000);
    let limit = match limit {
        0..1_000 => format!("{limit} B"),
        1_000..1_000_000 => format!("{} kB", limit.div_ceil(1_000)),
        _ => format!("{} MB", mega(limit)),
    };
    Error::new(Kind::Usage, format!("the memory limit of {limit} is too low: {what} take about {} MB", mega(needed)))
        .with_hint(format!("allow {} MB or more", mega(needed + needed / 8)))
}
