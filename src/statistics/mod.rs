//! Statistics of each observed site: bounded state, updated value by value and mergeable.
//!
//! A state does not depend on the order of samples, on how many ran at once, or on which thread or machine
//! ran them. Counts and ranges are exact, the histogram's bins do not depend on the order of values, and sums, which
//! are not exact in floats, are kept for each sample and added in the order of the samples.
//!
//! Statistics see slices of floats and know nothing of tensors and graphs.

mod file;
mod histogram;
mod matrix;
mod noise;
mod quantile;
mod scan;
mod sums;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use histogram::{Bin, Histogram};
pub use matrix::MatrixStatistics;
pub use noise::{Power, integer_error, nearest_error};
pub use sums::Sums;

use crate::error::{Error, Kind, Result};

/// A closed range of finite values; zero has no sign in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// Smallest value.
    pub min: f32,
    /// Largest value.
    pub max: f32,
}

impl Range {
    /// The largest magnitude in the range.
    #[must_use]
    pub fn amax(self) -> f32 {
        self.min.abs().max(self.max.abs())
    }

    /// The smallest range that holds both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self { min: self.min.min(other.min), max: self.max.max(other.max) }
    }
}

/// The union of two ranges, either of which may be missing.
fn union(a: Option<Range>, b: Option<Range>) -> Option<Range> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.union(b)),
        (one, None) | (None, one) => one,
    }
}

/// What one sample contributed. There is one for each site and sample, so it is small.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// Values seen.
    pub count: u64,
    /// Sum of the finite ones.
    pub sum: f64,
    /// Sum of their squares.
    pub sum_squares: f64,
    /// Which sample of the set.
    pub index: u32,
    /// Number of values that are NaN or infinite; saturates at the type's maximum.
    pub non_finite: u32,
    /// Ends of the range, reversed if there is none.
    ends: [f32; 2],
}

impl SampleRecord {
    const NONE: [f32; 2] = [f32::INFINITY, f32::NEG_INFINITY];

    fn new(index: u32) -> Self {
        Self { count: 0, sum: 0.0, sum_squares: 0.0, index, non_finite: 0, ends: Self::NONE }
    }

    /// Range of the finite values, if there are any.
    #[must_use]
    pub fn range(&self) -> Option<Range> {
        let [min, max] = self.ends;
        (min <= max).then_some(Range { min, max })
    }

    fn set_range(&mut self, range: Option<Range>) {
        self.ends = range.map_or(Self::NONE, |r| [r.min, r.max]);
    }
}

/// Ranges along one axis of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Channels {
    axis: isize,
    ragged: bool,
    ranges: Vec<Option<Range>>,
}

impl Channels {
    /// The channel axis; negative ones count from the end, -1 is the last.
    #[must_use]
    pub fn axis(&self) -> isize {
        self.axis
    }

    /// Whether tensors differed in their number of channels, or had no such axis. There are no ranges then.
    #[must_use]
    pub fn is_ragged(&self) -> bool {
        self.ragged
    }

    /// Each channel's range; `None` for a channel that held no finite value. Empty before anything was observed.
    #[must_use]
    pub fn ranges(&self) -> &[Option<Range>] {
        &self.ranges
    }

    /// Each channel's largest magnitude, zero where it held no finite value.
    #[must_use]
    pub fn amax(&self) -> Vec<f32> {
        self.ranges.iter().map(|r| r.map_or(0.0, Range::amax)).collect()
    }

    fn observe(&mut self, dims: &[usize], values: &[f32]) {
        let axis = if self.axis < 0 { dims.len().checked_add_signed(self.axis) } else { Some(self.axis as usize) };
        let axis = axis.filter(|&axis| axis < dims.len());
        let count = axis.map_or(0, |axis| dims[axis]);
        if values.is_empty() || !self.fit(count, axis.is_some()) {
            return;
        }
        let inner: usize = axis.map_or(1, |axis| dims[axis + 1..].iter().product());
        if inner == 1 {
            let (mut min, mut max) = (vec![f32::INFINITY; count], vec![f32::NEG_INFINITY; count]);
            for row in values.chunks_exact(count) {
                for ((&value, min), max) in row.iter().zip(&mut min).zip(&mut max) {
                    *min = if value < *min && value.is_finite() { value } else { *min };
                    *max = if value > *max && value.is_finite() { value } else { *max };
                }
            }
            for ((range, min), max) in self.ranges.iter_mut().zip(min).zip(max) {
                let seen = (min <= max).then_some(Range { min: min + 0.0, max: max + 0.0 });
                *range = union(*range, seen);
            }
        } else {
            for (row, channel) in values.chunks_exact(inner).zip((0..count).cycle()) {
                self.ranges[channel] = union(self.ranges[channel], finite_range(row));
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        let known = !other.ranges.is_empty() || other.ragged;
        if known && self.fit(other.ranges.len(), !other.ragged && other.axis == self.axis) {
            for (range, &seen) in self.ranges.iter_mut().zip(&other.ranges) {
                *range = union(*range, seen);
            }
        }
    }

    /// Whether `count` channels can be added; forgets everything if not.
    fn fit(&mut self, count: usize, valid: bool) -> bool {
        if self.ranges.is_empty() && !self.ragged && valid {
            self.ranges = vec![None; count];
        }
        if !valid || self.ranges.len() != count {
            self.ragged = true;
            self.ranges.clear();
        }
        !self.ragged
    }
}

/// The range of the finite ones among `values`.
fn finite_range(values: &[f32]) -> Option<Range> {
    let extent = scan::extent(values);
    if !extent.non_finite {
        return (extent.min <= extent.max).then_some(Range { min: extent.min, max: extent.max });
    }
    let finite = values.iter().copied().filter(|v| v.is_finite());
    finite.map(|v| Range { min: v + 0.0, max: v + 0.0 }).reduce(Range::union)
}

/// The statistics of one site.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SiteStatistics {
    count: u64,
    nan: u64,
    inf: u64,
    range: Option<Range>,
    histogram: Histogram,
    /// Ascending by index.
    samples: Vec<SampleRecord>,
    channels: Option<Channels>,
}

impl SiteStatistics {
    /// A site without values so far.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A site that also keeps a range for each index along `axis`; -1 is the last axis.
    #[must_use]
    pub fn per_channel(axis: isize) -> Self {
        let channels = Channels { axis, ragged: false, ranges: Vec::new() };
        Self { channels: Some(channels), ..Self::default() }
    }

    /// Reserves room for the records of `samples` samples, so that adding them one by one does not fragment memory.
    pub fn reserve(&mut self, samples: usize) {
        self.samples.reserve_exact(samples.saturating_sub(self.samples.len()));
    }

    /// Adds values that sample `index` gave. A sample may give several slices; its sums then depend, in their last
    /// bits, on where it was cut, and nothing else does.
    pub fn observe(&mut self, index: u32, values: &[f32]) {
        // Counters of one slice are 32 bits wide.
        for part in values.chunks(1 << 30) {
            self.observe_part(index, part);
        }
    }

    fn observe_part(&mut self, index: u32, values: &[f32]) {
        let scan = scan::scan(values);
        if scan.non_finite == 0 {
            return self.add(index, values, &scan);
        }
        let finite: Vec<f32> = values.iter().copied().filter(|v| v.is_finite()).collect();
        let nan = values.iter().filter(|v| v.is_nan()).count() as u64;
        self.count += scan.non_finite;
        self.nan += nan;
        self.inf += scan.non_finite - nan;
        let record = self.record(index);
        record.count += scan.non_finite;
        let bad = u32::try_from(scan.non_finite).unwrap_or(u32::MAX);
        record.non_finite = record.non_finite.saturating_add(bad);
        self.add(index, &finite, &scan::scan(&finite));
    }

    /// As [`Self::observe`], for a tensor of shape `dims`; also updates the ranges of channels, if the site
    /// keeps them.
    pub fn observe_tensor(&mut self, index: u32, dims: &[usize], values: &[f32]) {
        self.observe(index, values);
        if let Some(channels) = &mut self.channels {
            debug_assert_eq!(dims.iter().product::<usize>(), values.len());
            channels.observe(dims, values);
        }
    }

    fn add(&mut self, index: u32, finite: &[f32], scan: &scan::Scan) {
        let range = (!finite.is_empty()).then_some(Range { min: scan.min, max: scan.max });
        self.count += finite.len() as u64;
        self.range = union(self.range, range);
        self.histogram.add(finite, scan);
        let record = self.record(index);
        record.count += finite.len() as u64;
        record.set_range(union(record.range(), range));
        record.sum += scan.sum;
        record.sum_squares += scan.squares;
    }

    fn record(&mut self, index: u32) -> &mut SampleRecord {
        let at = match self.samples.last() {
            Some(last) if last.index < index => Err(self.samples.len()),
            _ => self.samples.binary_search_by_key(&index, |r| r.index),
        };
        let at = at.unwrap_or_else(|at| {
            self.samples.insert(at, SampleRecord::new(index));
            at
        });
        &mut self.samples[at]
    }

    /// Adds another state of the same site. The result is that of one state that saw the values of both.
    pub fn merge(&mut self, other: &Self) {
        let Self { count, nan, inf, range, histogram, samples, channels } = other;
        self.count += count;
        self.nan += nan;
        self.inf += inf;
        self.range = union(self.range, *range);
        self.histogram.merge(histogram);
        for theirs in samples {
            let record = self.record(theirs.index);
            record.count += theirs.count;
            record.non_finite = record.non_finite.saturating_add(theirs.non_finite);
            record.set_range(union(record.range(), theirs.range()));
            record.sum += theirs.sum;
            record.sum_squares += theirs.sum_squares;
        }
        match (&mut self.channels, channels) {
            (Some(ours), Some(theirs)) => ours.merge(theirs),
            (None, Some(theirs)) => self.channels = Some(theirs.clone()),
            (_, None) => {}
        }
    }

    /// Values seen, NaN and infinite ones included.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// NaN values seen. They count nowhere else.
    #[must_use]
    pub fn nan(&self) -> u64 {
        self.nan
    }

    /// Infinite values seen. They count nowhere else.
    #[must_use]
    pub fn inf(&self) -> u64 {
        self.inf
    }

    /// Zeros seen, of either sign.
    #[must_use]
    pub fn zeros(&self) -> u64 {
        self.histogram.zeros()
    }

    /// Finite values seen.
    #[must_use]
    pub fn finite(&self) -> u64 {
        self.count - self.nan - self.inf
    }

    /// Range of the finite values; `None` before the first one.
    #[must_use]
    pub fn range(&self) -> Option<Range> {
        self.range
    }

    /// Smallest finite value.
    #[must_use]
    pub fn min(&self) -> Option<f32> {
        self.range.map(|r| r.min)
    }

    /// Largest finite value.
    #[must_use]
    pub fn max(&self) -> Option<f32> {
        self.range.map(|r| r.max)
    }

    /// Largest finite magnitude; zero before the first value.
    #[must_use]
    pub fn amax(&self) -> f32 {
        self.range.map_or(0.0, Range::amax)
    }

    /// Mean of the finite values; zero if there are none.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.average(|r| r.sum)
    }

    /// Mean of the squares of the finite values; zero if there are none.
    #[must_use]
    pub fn mean_square(&self) -> f64 {
        self.average(|r| r.sum_squares)
    }

    fn average(&self, part: impl Fn(&SampleRecord) -> f64) -> f64 {
        match self.finite() {
            0 => 0.0,
            count => self.samples.iter().map(part).sum::<f64>() / count as f64,
        }
    }

    /// What each sample contributed, in the order of the samples.
    #[must_use]
    pub fn samples(&self) -> &[SampleRecord] {
        &self.samples
    }

    /// Ranges of channels, if the site keeps them.
    #[must_use]
    pub fn channels(&self) -> Option<&Channels> {
        self.channels.as_ref()
    }

    /// How often values occurred.
    #[must_use]
    pub fn histogram(&self) -> &Histogram {
        &self.histogram
    }

    /// The histogram's bins in ascending order, the outermost ones cut at the smallest and the largest value.
    pub fn bins(&self) -> impl Iterator<Item = Bin> + '_ {
        let range = self.range.unwrap_or(Range { min: 0.0, max: 0.0 });
        let (min, max) = (f64::from(range.min), f64::from(range.max));
        self.histogram.bins().map(move |Bin { low, high, count }| Bin { low: low.max(min), high: high.min(max), count })
    }
}

/// The statistics of a calibration run, or of a part of one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Statistics {
    /// Hash of the model that ran, as it was read: [`content_hash`](crate::ir::content_hash).
    pub model_hash: String,
    /// Hash of the whole set of samples, of which a shard runs a part.
    pub samples_hash: String,
    /// Which tensors the run was asked to observe, in words.
    pub asked: String,
    /// Samples that were run.
    pub sample_count: u64,
    /// Samples in the whole set.
    pub sample_total: u64,
    /// Which samples were run, ascending.
    pub ran: Vec<u32>,
    /// Tensors that cannot be observed, with the reason.
    pub unobserved: BTreeMap<String, String>,
    /// The statistics by site, including sites without values in any sample.
    pub sites: BTreeMap<String, SiteStatistics>,
}

impl Statistics {
    /// How many samples no part ran; none where those alone are missing that `rewrite` would measure its result on.
    #[must_use]
    pub fn missing(&self) -> usize {
        let ran = |index: &usize| self.ran.binary_search(&(*index as u32)).is_ok();
        let (calibrated, _) = split(self.sample_total as usize);
        if calibrated.iter().all(ran) { 0 } else { (self.sample_total as usize).saturating_sub(self.ran.len()) }
    }

    /// Adds another part of the same run. Parts may be merged in any order.
    ///
    /// # Errors
    /// Parts of different models or sample sets, parts that observed different tensors, and parts that ran the same
    /// sample, which would count twice. The statistics are unchanged then.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        let fail = |message: String| Error::new(Kind::Samples, message);
        let Self { model_hash, samples_hash, asked, sample_count, sample_total, ran, unobserved, sites } = other;
        if self.model_hash != *model_hash {
            return Err(Error::model("the statistics are of different models")
                .with_hint("merge parts of one calibration run; every part must start from the same model file"));
        }
        if self.samples_hash != *samples_hash || self.sample_total != *sample_total {
            return Err(fail("the statistics are of different sample sets".to_owned())
                .with_hint("give every part the whole set; --shard chooses its share"));
        }
        if self.asked != *asked {
            return Err(fail(format!("one part observed {}, the other {asked}", self.asked))
                .with_hint("give every part the same options"));
        }
        if let Some(name) = self.tensors().symmetric_difference(&other.tensors()).next() {
            return Err(fail("one of the parts did not observe this tensor".to_owned())
                .at_value(name)
                .with_hint("make every part with the same version of amax and the same options"));
        }
        if let Some(twice) = ran.iter().find(|index| self.ran.binary_search(index).is_ok()) {
            return Err(fail(format!("both parts ran sample {twice}")).with_hint("give every part its own --shard"));
        }
        self.sample_count += sample_count;
        self.ran.extend(ran);
        self.ran.sort_unstable();
        for (name, site) in sites {
            self.sites.entry(name.clone()).or_default().merge(site);
        }
        for (name, why) in unobserved {
            let known = self.unobserved.entry(name.clone()).or_insert_with(|| why.clone());
            if why < known {
                known.clone_from(why);
            }
        }
        // What one part could show was observed.
        self.unobserved.retain(|name, _| !self.sites.contains_key(name));
        Ok(())
    }

    /// Checks that these are statistics of a model, given its [`content_hash`](crate::ir::content_hash).
    ///
    /// # Errors
    /// [`Kind::Samples`] if they are of another one.
    pub fn check_model(&self, hash: &str) -> Result<()> {
        if self.model_hash == hash {
            return Ok(());
        }
        Err(Error::new(Kind::Samples, "these statistics are of another model")
            .with_hint("calibrate this one; a new export is another model if any weight or name differs"))
    }

    /// The tensors that the run was asked to observe.
    fn tensors(&self) -> BTreeSet<&str> {
        self.sites.keys().chain(self.unobserved.keys()).map(String::as_str).collect()
    }
}

/// Of so many samples, the indices for statistics, and those held out for measuring: one of eight, eight at most; all of them for
/// both where there are too few to hold any out.
#[must_use]
pub fn split(count: usize) -> (Vec<usize>, Vec<usize>) {
    if count < 8 {
        return ((0..count).collect(), (0..count).collect());
    }
    let every = (count / 8).max(8);
    (0..count).partition(|i| i % every != every - 1)
}
