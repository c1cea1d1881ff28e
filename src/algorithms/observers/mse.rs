//! The range of least error, by search.

use super::{cut, total_error};
use crate::numerics::RangeSpec;
use crate::statistics::{Bin, Power, SiteStatistics};

/// Candidates to an octave: in the first search, around the best of it, and in the last one over all bins.
const COARSE: f64 = 8.0;
const FINE: f64 = 64.0;
const LAST: f64 = 256.0;
/// Octaves below the root mean square that a magnitude is tried down to: beyond, most of the signal would be clipped.
const BELOW_RMS: f64 = 4.0;
/// Passes over the two ends of a range.
const ROUNDS: usize = 2;
/// Bins are put together up to this part of the root mean square for the search, and of it for its end. A good range of 256
/// codes has steps of a sixtieth of it or more, and what is within a step may be taken to lie evenly.
const ROUGH: f64 = 128.0;
const SMOOTH: f64 = 1024.0;

/// The range, its two ends searched for where they count one by one.
pub(super) fn range(site: &SiteStatistics, p: f64, spec: RangeSpec) -> (f64, f64) {
    let amax = f64::from(site.amax());
    let rms = site.mean_square().sqrt();
    let floor = rms / BELOW_RMS;
    if amax <= 0.0 || floor <= 0.0 {
        return cut(site, amax);
    }
    let power = Power::new(p);
    let (rough, smooth) = (condensed(site, rms / ROUGH), condensed(site, rms / SMOOTH));
    let error = |bins: &[Bin], range: (f64, f64)| total_error(bins.iter().copied(), range, spec, &power);
    let whole = cut(site, amax);
    let magnitude = search(amax, floor, |amax| error(&rough, cut(site, amax)));
    let polished = polish(amax, magnitude, |amax| error(&smooth, cut(site, amax)));
    if spec.is_symmetric() || !spec.format.is_integer() || whole.0 >= 0.0 || whole.1 <= 0.0 {
        return cut(site, polished);
    }
    let (low_floor, high_floor) = (floor.min(-whole.0), floor.min(whole.1));
    let mut best = cut(site, magnitude);
    let mut least = error(&rough, best);
    // From the range of all values as well: the two ends may have to be cut by very different shares.
    for mut now in [best, whole] {
        let mut reached = error(&rough, now);
        for _ in 0..ROUNDS {
            let before = reached;
            let high = search(whole.1, high_floor, |high| error(&rough, (now.0, high)));
            let new = (now.0, high);
            take_better(&mut now, new, &mut reached, |range| error(&rough, range));
            let low = -search(-whole.0, low_floor, |low| error(&rough, (-low, now.1)));
            let new = (low, now.1);
            take_better(&mut now, new, &mut reached, |range| error(&rough, range));
            if reached >= before * (1.0 - 1e-3) {
                break;
            }
        }
        if reached < least {
            (best, least) = (now, reached);
        }
    }
    best.1 = polish(whole.1, best.1, |high| error(&smooth, (best.0, high)));
    best.0 = -polish(-whole.0, -best.0, |low| error(&smooth, (-low, best.1)));
    let mut least = error(&smooth, best);
    for other in [cut(site, polished), whole] {
        take_better(&mut best, other, &mut least, |range| error(&smooth, range));
    }
    best
}

fn take_better(now: &mut (f64, f64), new: (f64, f64), reached: &mut f64, error: impl Fn((f64, f64)) -> f64) {
    let found = error(new);
    if found < *reached {
        (*now, *reached) = (new, found);
    }
}

/// The magnitude from `floor` to `amax` of least error, on a logarithmic grid that starts at `amax`; the largest of equals.
fn search(amax: f64, floor: f64, error: impl Fn(f64) -> f64) -> f64 {
    let octaves = (amax / floor).log2().max(0.0);
    let steps = (octaves * COARSE).ceil() as usize;
    let middle = least((0..=steps).map(|step| amax * (-(step as f64) / COARSE).exp2()), &error);
    around(amax, middle, FINE, (FINE / COARSE) as i32, error)
}

/// The best of the magnitudes close to `middle`.
fn polish(amax: f64, middle: f64, error: impl Fn(f64) -> f64) -> f64 {
    around(amax, middle, LAST, (LAST / FINE) as i32 * 2, error)
}

fn around(amax: f64, middle: f64, to_an_octave: f64, reach: i32, error: impl Fn(f64) -> f64) -> f64 {
    let near = (-reach..=reach).map(|step| middle * (-f64::from(step) / to_an_octave).exp2());
    least(near.filter(|&magnitude| magnitude < amax).chain([amax.min(middle)]), error)
}

/// The candidate of least error; the first of equals.
fn least(candidates: impl Iterator<Item = f64>, error: impl Fn(f64) -> f64) -> f64 {
    let mut best = (f64::INFINITY, 0.0);
    for magnitude in candidates {
        let found = error(magnitude);
        if found < best.0 || best.1 <= 0.0 {
            best = (found, magnitude);
        }
    }
    best.1
}

/// The bins of a site in ascending order, neighbours on one side of zero put together up to `width`.
fn condensed(site: &SiteStatistics, width: f64) -> Vec<Bin> {
    let mut bins: Vec<Bin> = Vec::new();
    for bin in site.bins() {
        match bins.last_mut() {
            // Zeros, and the only value of a tensor, have no width and stay exact.
            Some(last)
                if bin.high - last.low <= width
                    && last.low.is_sign_negative() == bin.low.is_sign_negative()
                    && last.high > last.low
                    && bin.high > bin.low =>
            {
                last.high = bin.high;
                last.count += bin.count;
            }
            _ => bins.push(bin),
        }
    }
    bins
}
