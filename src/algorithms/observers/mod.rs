//! Observers: which range a tensor is quantized over, given what was seen of it.
//!
//! Every observer reads the same statistics, so one calibration run serves all of them. None of them ever returns a range
//! beyond the values that were seen, nor one that contains NaN or infinity.

mod entropy;
mod mse;

use crate::numerics::qparams_from_range;
use crate::quant::{Format, Observer, QParam, RangeSpec};
use crate::statistics::{Bin, Power, SampleRecord, SiteStatistics, integer_error, nearest_error};

/// The range to quantize a tensor over, within the range of the values seen; `(0, 0)` where no finite value was.
///
/// `spec` says what the range is for: [`qparams_from_range`] makes scale and zero point of it, which widens it to hold
/// zero, and to both sides where `spec` is symmetric. Min-max and mean do not depend on it.
/// Error and entropy are minimized over the finite values; formats of 16 and more bits have more codes than histograms have
/// bins, so for them entropy is min-max.
///
/// Shares outside 0 to 100 and exponents outside 1 to 16 count as the nearest within.
///
/// Precision: percentiles are those of the values to within one bin of the histogram, which is at most 1/1024 of the
/// largest magnitude and 1/512 of the percentile wide. Error and entropy have no sharp minimum; what is guaranteed is that
/// the range found is as good as the best one: on the values themselves, its error is at most 1 % above the least, and its
/// divergence at most 0.01 nats a value (the tests compare with searches over 8192 values of real tensors). A constant that
/// makes up much of a tensor, such as a mask's, is taken to lie anywhere in its bin; with one, a range of least error may
/// miss it by a sixty-fourth of the range.
#[must_use]
pub fn range(site: &SiteStatistics, observer: Observer, spec: RangeSpec) -> (f32, f32) {
    let Some(seen) = site.range() else { return (0.0, 0.0) };
    let (low, high) = match observer {
        Observer::MinMax => (f64::from(seen.min), f64::from(seen.max)),
        Observer::Mean => mean(site),
        Observer::Percentile(percent) => percentile(site, percent, spec),
        Observer::Mse(p) => mse::range(site, if p >= 1.0 { p.min(16.0) } else { 1.0 }, spec),
        Observer::Entropy => entropy::range(site, spec),
    };
    let within = |value: f64| (value as f32).clamp(seen.min, seen.max);
    (within(low), within(high))
}

/// The mean error of quantizing over a range, `|x - y|^p`; zero where nothing was seen.
#[must_use]
pub fn error(site: &SiteStatistics, (low, high): (f32, f32), spec: RangeSpec, p: f64) -> f64 {
    match site.finite() {
        0 => 0.0,
        count => total_error(site.bins(), (f64::from(low), f64::from(high)), spec, &Power::new(p)) / count as f64,
    }
}

fn total_error(bins: impl IntoIterator<Item = Bin>, (low, high): (f64, f64), spec: RangeSpec, power: &Power) -> f64 {
    let QParam { scale, zero_point } = qparams_from_range(low as f32, high as f32, &spec);
    if spec.format.is_integer() {
        return integer_error(bins, scale, zero_point, spec.format.range(), power);
    }
    let levels: Vec<f64> = values(spec.format).into_iter().map(|v| v * f64::from(scale)).collect();
    nearest_error(bins, &levels, power)
}

/// The finite numbers of a float format, ascending.
fn values(format: Format) -> Vec<f64> {
    let (first, last) = format.range();
    let mut values: Vec<f64> = (first..=last).map(|code| f64::from(format.decode(code))).collect();
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    values.dedup();
    values
}

fn mean(site: &SiteStatistics) -> (f64, f64) {
    let (mut low, mut high, mut count) = (0.0, 0.0, 0.0);
    for range in site.samples().iter().filter_map(SampleRecord::range) {
        low += f64::from(range.min);
        high += f64::from(range.max);
        count += 1.0;
    }
    (low / count, high / count)
}

fn percentile(site: &SiteStatistics, percent: f64, spec: RangeSpec) -> (f64, f64) {
    let share = if percent > 0.0 { percent.min(100.0) / 100.0 } else { 0.0 };
    if spec.is_symmetric() || !spec.format.is_integer() {
        let amax = site.magnitude_quantile(share);
        (-amax, amax)
    } else {
        let cut = (1.0 - share) / 2.0;
        (site.quantile(cut), site.quantile(1.0 - cut))
    }
}

/// Both ends of a range, cut at a magnitude.
fn cut(site: &SiteStatistics, amax: f64) -> (f64, f64) {
    let (low, high) = (site.min().unwrap_or(0.0), site.max().unwrap_or(0.0));
    (f64::from(low).max(-amax), f64::from(high).min(amax))
}
