//! Scales by the error of rounding, each column's error weighed by what it costs: the diagonal of the Hessian.
//!
//! Ranges from 0.7 of a group's to somewhat longer are tried (with 2 bits from half), of either sign where scales may be
//! negative, and zero points next to that of the range. At the codes of each, the best scale is known in closed form.

use super::{Coded, Levels, Problem, by_rows, rounded};

/// What may be tried.
#[derive(Clone, Copy, Debug)]
pub struct Freedom {
    /// Whether a scale may be negative.
    pub signed: bool,
    /// Whether the zero point may change.
    pub zeros: bool,
}

/// Replaces the scales and zero points of integers by those of the least weighed error of rounding. `stored` is what a
/// scale becomes when it is stored, if it can be.
pub fn search(
    problem: &Problem<'_>,
    coded: &mut Coded,
    freedom: Freedom,
    stored: &(dyn Fn(f64) -> Option<f64> + Sync),
) {
    let Levels::Integers { low, high } = *problem.levels else { return };
    let first = if high - low < 4.0 { 10 } else { 14 };
    let costs = problem.hessian.diag().to_owned();
    let costs = costs.as_slice().unwrap_or_default();
    by_rows(problem, coded, |problem, coded| {
        let mut weights = Vec::with_capacity(coded.size);
        for row in 0..coded.scales.nrows() {
            for group in 0..coded.scales.ncols() {
                let (scale, zero) = (coded.scales[[row, group]], coded.zeros[[row, group]]);
                let from = group * coded.size;
                let to = costs.len().min(from + coded.size);
                weights.clear();
                weights.extend((from..to).map(|column| problem.target[[row, column]]));
                if scale == 0.0 || weights.iter().all(|w| *w == 0.0) {
                    continue;
                }
                let weighed = Weighed { weights: &weights, costs: &costs[from..to], low, high };
                let plain = weighed.sums(scale, zero).error(scale);
                let mut best = (plain, scale, zero);
                let moves: &[f64] = if freedom.zeros { &[0.0, -1.0, 1.0] } else { &[0.0] };
                let signs: &[f64] = if freedom.signed { &[1.0, -1.0] } else { &[1.0] };
                for zero in moves.iter().map(|by| zero + by).filter(|zero| (low..=high).contains(zero)) {
                    for sign in signs {
                        for step in first..=21 {
                            let sums = weighed.sums(scale * sign * f64::from(step) / 20.0, zero);
                            let Some(found) = sums.scale().and_then(stored) else { continue };
                            let error = sums.error(found);
                            if error < best.0 {
                                best = (error, found, zero);
                            }
                        }
                    }
                }
                (_, coded.scales[[row, group]], coded.zeros[[row, group]]) = best;
            }
        }
    });
}

/// A group with what its errors cost.
struct Weighed<'a> {
    weights: &'a [f64],
    costs: &'a [f64],
    low: f64,
    high: f64,
}

/// Weighed sums over a group of squares and products of weights `w` and levels `l`.
struct Sums {
    ww: f64,
    wl: f64,
    ll: f64,
}

impl Weighed<'_> {
    fn sums(&self, scale: f64, zero: f64) -> Sums {
        let (inverse, low, high) = (1.0 / scale, self.low - zero, self.high - zero);
        let mut sums = Sums { ww: 0.0, wl: 0.0, ll: 0.0 };
        for (&weight, &cost) in self.weights.iter().zip(self.costs) {
            let level = rounded(weight * inverse).clamp(low, high);
            sums.ww += cost * weight * weight;
            sums.wl += cost * weight * level;
            sums.ll += cost * level * level;
        }
        sums
    }
}

impl Sums {
    fn error(&self, scale: f64) -> f64 {
        self.ww - 2.0 * scale * self.wl + scale * scale * self.ll
    }

    fn scale(&self) -> Option<f64> {
        (self.ll > 0.0).then(|| self.wl / self.ll)
    }
}
