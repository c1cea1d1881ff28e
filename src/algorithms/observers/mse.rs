//! The range of least error, by search.

use super::{cut, total_error};
use crate::numerics::RangeSpec;
use crate::statistics::{Bin, SiteStatistics};

/// Candidates to an octave in the first search, and in the one around the best of them.
const COARSE: f64 = 16.0;
const FINE: f64 = 128.0;
/// Octaves below the root mean square that a magnitude is tried down to: beyond, most of the signal would be clipped.
const BELOW_RMS: f64 = 4.0;
/// Passes over the two ends of a range.
const ROUNDS: usize = 3;

/// The range, its two ends searched for where they count one by one.
pub(super) fn range(site: &SiteStatistics, p: f64, spec: RangeSpec) -> (f64, f64) {
    let amax = f64::from(site.amax());
    let floor = site.mean_square().sqrt() / BELOW_RMS;
    if amax <= 0.0 || floor <= 0.0 {
        return cut(site, amax);
    }
    let bins = condensed(site, floor / 4096.0);
    let error = |range: (f64, f64)| total_error(bins.iter().copied(), range, spec, p);
    let magnitude = search(amax, floor, |amax| error(cut(site, amax)));
    let mut best = cut(site, magnitude);
    if spec.is_symmetric() || !spec.format.is_integer() || best.0 >= 0.0 || best.1 <= 0.0 {
        return best;
    }
    let whole = cut(site, amax);
    let mut least = error(best);
    // From the range of all values as well: the two ends may have to be cut by very different shares.
    for mut start in [best, whole] {
        let mut reached = error(start);
        for _ in 0..ROUNDS {
            let before = reached;
            let high = search(whole.1, floor.min(whole.1), |high| error((start.0, high)));
            start.1 = keep_better(start.1, high, &mut reached, |high| error((start.0, high)));
            let low = -search(-whole.0, floor.min(-whole.0), |low| error((-low, start.1)));
            start.0 = keep_better(start.0, low, &mut reached, |low| error((low, start.1)));
            if reached >= before * (1.0 - 1e-6) {
                break;
            }
        }
        if reached < least {
            (best, least) = (start, reached);
        }
    }
    best
}

fn keep_better(old: f64, new: f64, reached: &mut f64, error: impl Fn(f64) -> f64) -> f64 {
    let found = error(new);
    if found < *reached {
        *reached = found;
        new
    } else {
        old
    }
}

/// The magnitude from `floor` to `amax` of least error, on a logarithmic grid that starts at `amax`; the largest of equals.
fn search(amax: f64, floor: f64, error: impl Fn(f64) -> f64) -> f64 {
    let octaves = (amax / floor).log2().max(0.0);
    let at = |octave: f64| amax * (-octave).exp2();
    let mut best = (f64::INFINITY, 0.0);
    let mut try_at = |octave: f64| {
        let found = error(at(octave));
        if found < best.0 {
            best = (found, octave);
        }
    };
    let steps = (octaves * COARSE).ceil() as usize;
    for step in 0..=steps {
        try_at(step as f64 / COARSE);
    }
    let middle = best.1;
    let mut try_at = |octave: f64| {
        let found = error(at(octave));
        if found < best.0 || (found <= best.0 && octave < best.1) {
            best = (found, octave);
        }
    };
    let around = (FINE / COARSE) as i32;
    for step in (1 - around)..around {
        let octave = middle + f64::from(step) / FINE;
        if step != 0 && octave > 0.0 {
            try_at(octave);
        }
    }
    at(best.1)
}

/// The bins of a site in ascending order, neighbours on one side of zero put together while they are less than `width`
/// wide: far below every step that is tried, how values spread makes no difference.
fn condensed(site: &SiteStatistics, width: f64) -> Vec<Bin> {
    let mut bins: Vec<Bin> = Vec::new();
    for bin in site.bins() {
        match bins.last_mut() {
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
