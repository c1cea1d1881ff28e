//! The range of least Kullback–Leibler divergence, by search.
//!
//! For each candidate range the values are clipped to it and counted in 2048 equal bins over it. What codes keep of this
//! distribution is each code's share, spread evenly over those of its bins that hold anything. The divergence of the two
//! is what is minimized, in nats a value. Bins relative to the candidate rather than to the largest value are what
//! makes an outlier of any size harmless. Two things would otherwise decide more than the data:
//!
//! - exact zeros, which padding and rectifiers make in masses, are left out: every code keeps them;
//! - a finite sample never fills bins evenly, which feigns a divergence that depends on how many bins are in use and would
//!   pull the range of a small sample to either end. What it is on average for values that do fall evenly is subtracted:
//!   for a code with `c` values in `k` bins, `(k - 1) · f(c / k)` nats, see [`feigned`]. For many values `f` is 1/2, which
//!   is Miller's and Madow's correction of 1955.
//!
//! The divergence does not know how far a value is moved by clipping it, so no more than 1 % of the values may be clipped.

use std::sync::LazyLock;

use super::{cut, values};
use crate::numerics::{QParam, RangeSpec, qparams_from_range};
use crate::statistics::{Bin, SiteStatistics};

/// Bins over each candidate range.
const BINS: usize = 2048;
/// Candidates to an octave in the first search, and in the one around the best of them.
const COARSE: i32 = 16;
const FINE: i32 = 64;
/// No candidate clips more than this share of the values that are not zero.
const CLIPPED: f64 = 0.01;

/// Both ends are cut at one magnitude.
pub(super) fn range(site: &SiteStatistics, spec: RangeSpec) -> (f64, f64) {
    let amax = f64::from(site.amax());
    let bins: Vec<Bin> = site.bins().filter(|b| b.low < b.high || b.low.abs() > 0.0).collect();
    let count: u64 = bins.iter().map(|b| b.count).sum();
    if amax <= 0.0 || count == 0 || spec.format.bits() > 8 {
        return cut(site, amax);
    }
    let magnitudes = site.magnitudes();
    let least = {
        let mut clipped = 0;
        let kept = magnitudes.iter().rev().find(|bin| {
            clipped += bin.count;
            clipped as f64 > CLIPPED * count as f64
        });
        kept.map_or(amax, |bin| bin.low.max(amax * f64::from(f32::EPSILON).powi(4)))
    };
    let at = |step: i32| amax * (-f64::from(step) / f64::from(FINE)).exp2();
    let levels = (!spec.format.is_integer()).then(|| values(spec.format));
    let divergence = |step: i32| divergence(&bins, count, cut(site, at(step)), spec, levels.as_deref());
    let mut best = (divergence(0), 0);
    let mut consider = |step: i32| {
        let found = divergence(step);
        if found < best.0 {
            best = (found, step);
        }
        best.1
    };
    let coarse = FINE / COARSE;
    let mut middle = 0;
    for step in (1..).map(|i| i * coarse).take_while(|&step| at(step) >= least) {
        middle = consider(step);
    }
    for step in middle - coarse + 1..middle + coarse {
        if step > 0 && step != middle && at(step) >= least {
            consider(step);
        }
    }
    cut(site, at(best.1))
}

/// Nats a value that codes over a range lose of the distribution of `bins`, which hold `count` values and no zeros.
fn divergence(bins: &[Bin], count: u64, range: (f64, f64), spec: RangeSpec, levels: Option<&[f64]>) -> f64 {
    let QParam { scale, zero_point } = qparams_from_range(range.0 as f32, range.1 as f32, &spec);
    let (scale, zero_point) = (f64::from(scale), f64::from(zero_point));
    let (low, high) = (range.0.min(0.0), range.1.max(0.0));
    let (low, high) = if spec.is_symmetric() && low < 0.0 { (-high.max(-low), high.max(-low)) } else { (low, high) };
    let width = (high - low) / BINS as f64;
    let mut counts = [0u64; BINS];
    for bin in bins {
        // A bin that is wider than these counts at its middle; bins between that stay empty are not in use.
        let middle = f64::midpoint(bin.low.max(low), bin.high.min(high)).clamp(low, high);
        counts[(((middle - low) / width) as usize).min(BINS - 1)] += bin.count;
    }
    let (first, last) = spec.format.range();
    let code = |bin: usize| -> i64 {
        let middle = (low + (bin as f64 + 0.5) * width) / scale;
        match levels {
            None => (middle.round_ties_even() + zero_point).clamp(f64::from(first), f64::from(last)) as i64,
            Some(levels) => {
                let above = levels.partition_point(|&l| l < middle);
                let below = above.saturating_sub(1);
                let nearer = above < levels.len() && levels[above] - middle < middle - levels[below];
                if nearer { above as i64 } else { below as i64 }
            }
        }
    };
    let mut lost = 0.0;
    let mut at = 0;
    while at < BINS {
        let start = at;
        let this = code(at);
        while at < BINS && code(at) == this {
            at += 1;
        }
        let cell = &counts[start..at];
        let in_use = cell.iter().filter(|&&c| c > 0).count() as u64;
        if in_use == 0 {
            continue;
        }
        let even = cell.iter().sum::<u64>() as f64 / in_use as f64;
        lost -= (in_use - 1) as f64 * feigned(even);
        lost += cell.iter().filter(|&&c| c > 0).map(|&c| c as f64 * (c as f64 / even).ln()).sum::<f64>();
    }
    lost / count as f64
}

/// Steps to one of the table of [`feigned`], and where it ends.
const STEPS: usize = 16;
const END: usize = 16;

/// Nats that `even` values a bin on average, thrown at random, seem to lose for each bin when they are spread evenly over
/// the bins that they hit: `E[k ln k] - m ln(m / (1 - e^-m))`, where `k` is Poisson with mean `m`. Interpolated linearly
/// between sixteenths; above 16 the first two terms of its expansion.
fn feigned(even: f64) -> f64 {
    static TABLE: LazyLock<Vec<f64>> = LazyLock::new(|| {
        let entry = |step: usize| {
            let mean = step as f64 / STEPS as f64;
            let (mut chance, mut sum) = ((-mean).exp(), 0.0);
            for k in 1..=100u32 {
                let k = f64::from(k);
                chance *= mean / k;
                sum += chance * k * k.ln();
            }
            if step == 0 { 0.0 } else { sum - mean * (mean / (1.0 - (-mean).exp())).ln() }
        };
        (0..=END * STEPS).map(entry).collect()
    });
    let place = even * STEPS as f64;
    let below = place as usize;
    match TABLE.get(below..below + 2) {
        Some(&[a, b]) => a + (b - a) * place.fract(),
        _ => 0.5 + 1.0 / (12.0 * even),
    }
}
