//! Order statistics, read off the histogram.

use super::{Bin, SiteStatistics};

impl SiteStatistics {
    /// The `q`-quantile of the finite values, `0 <= q <= 1`, by linear interpolation between the two nearest order
    /// statistics as in `numpy.quantile`. Each of the two is known to within its bin (the smallest and the largest value
    /// exactly), so the result is off by no more than a bin is wide there: 1/1024 of the largest magnitude and 1/512 of
    /// the value itself. Zero if there are no values.
    #[must_use]
    pub fn quantile(&self, q: f64) -> f64 {
        quantile(&self.bins().collect::<Vec<_>>(), self.finite(), q)
    }

    /// The `q`-quantile of the magnitudes of the finite values; otherwise as [`Self::quantile`].
    #[must_use]
    pub fn magnitude_quantile(&self, q: f64) -> f64 {
        let bins = self.magnitudes();
        // The outermost bin is cut at the largest magnitude; in the lowest, the smallest one is not known.
        quantile(&bins, self.finite(), q)
    }

    /// The bins of the magnitudes in ascending order: those of either sign are the same ones.
    #[must_use]
    pub fn magnitudes(&self) -> Vec<Bin> {
        let amax = f64::from(self.amax());
        let fold = |Bin { low, high, count }| Bin { low: low.max(-high).max(0.0) + 0.0, high: high.max(-low), count };
        let mut folded: Vec<Bin> = self.histogram.bins().map(fold).collect();
        folded.sort_by(|a, b| a.low.total_cmp(&b.low).then(a.high.total_cmp(&b.high)));
        let mut merged: Vec<Bin> = Vec::with_capacity(folded.len());
        for bin in folded {
            match merged.last_mut() {
                Some(last) if last.low.total_cmp(&bin.low).is_eq() && last.high.total_cmp(&bin.high).is_eq() => {
                    last.count += bin.count;
                }
                _ => merged.push(bin),
            }
        }
        for bin in &mut merged {
            bin.high = bin.high.min(amax);
        }
        merged
    }

    /// The share of the finite values that lie outside `low..=high`, values taken to lie evenly within their bin. Exact
    /// if both ends are edges of bins or lie beyond every value; zero if there are no values.
    #[must_use]
    pub fn share_outside(&self, low: f32, high: f32) -> f64 {
        let (low, high) = (f64::from(low), f64::from(high));
        let outside = |bin: Bin| {
            let width = bin.high - bin.low;
            let share = if width > 0.0 {
                ((low.min(bin.high) - bin.low).max(0.0) + (bin.high - high.max(bin.low)).max(0.0)) / width
            } else {
                f64::from(u8::from(bin.low < low || bin.low > high))
            };
            share.min(1.0) * bin.count as f64
        };
        match self.finite() {
            0 => 0.0,
            count => self.bins().map(outside).sum::<f64>() / count as f64,
        }
    }
}

fn quantile(bins: &[Bin], count: u64, q: f64) -> f64 {
    if count == 0 {
        return 0.0;
    }
    let place = q.clamp(0.0, 1.0) * (count - 1) as f64;
    let (below, share) = (place.floor() as u64, place.fract());
    let (a, b) = ranked(bins, below, count);
    a + (b - a) * share
}

/// The values of rank `rank` and `rank + 1`, counted from 0, of `count` values.
fn ranked(bins: &[Bin], rank: u64, count: u64) -> (f64, f64) {
    let (mut found, mut before) = (None, 0);
    for bin in bins {
        for rank in [rank, (rank + 1).min(count - 1)].into_iter().skip(usize::from(found.is_some())) {
            if rank >= before + bin.count {
                break;
            }
            let value = match rank {
                0 => bins[0].low,
                _ if rank == count - 1 => bins[bins.len() - 1].high,
                _ => bin.low + (bin.high - bin.low) * ((rank - before) as f64 + 0.5) / bin.count as f64,
            };
            match found {
                None => found = Some(value),
                Some(first) => return (first, value),
            }
        }
        before += bin.count;
    }
    let last = bins.last().map_or(0.0, |b| b.high);
    (found.unwrap_or(last), last)
}
