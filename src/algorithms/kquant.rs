//! Scale and zero point of a group by weighted least squares, as llama.cpp's k-quants find them.
//!
//! The error is `Σ (σ + |x|) (x − y)²`, `σ` being the root mean square of the group: large weights count for more, small ones
//! not for nothing. Ranges from somewhat longer than the group's to somewhat shorter are tried; at the codes of each, scale
//! and least value follow in closed form. The zero point is then rounded to a code, so that zero is exact, the scale fitted
//! to that. Candidates are compared by sums in f64; what is found is then compared with rounding by the error of what will be
//! stored, whose products of code and scale are rounded to f32, so that nothing is taken that is not better than rounding.

use super::{Choice, Group};
use crate::quant::QParam;

/// Ranges that are tried.
const RANGES: i32 = 21;

/// Chooses for one group of finite values.
#[must_use]
pub fn choose(group: &Group<'_>) -> Choice {
    let Group { values: x, spec, .. } = *group;
    let rounding = group.rounded();
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    if squares == 0.0 {
        return Choice::rounding(group, rounding);
    }
    let mean = (squares / x.len() as f64).sqrt() as f32;
    let weights: Vec<f32> = x.iter().map(|x| mean + x.abs()).collect();
    let mut levels = vec![0.0; x.len()];
    // Sums of what the levels at a scale and zero point weigh.
    let mut sums = |at: QParam| {
        group.levels(at, &mut levels);
        Sums::of(&weights, x, &levels)
    };
    let mut best = (sums(rounding).error(rounding.scale), rounding);
    let limit = best.0;
    let (low, high) = group.range();
    let (qmin, qmax) = spec.codes();
    let steps = f64::from(qmax) - f64::from(qmin);
    let mut consider = |scale: f64, zero: i32| -> Option<(Sums, f32)> {
        let scale = group.usable(scale, rounding.scale)?;
        let at = QParam { scale, zero_point: zero };
        let found = sums(at);
        let error = found.error(scale);
        if error < best.0 {
            best = (error, at);
        }
        Some((found, scale))
    };
    for step in 0..RANGES {
        let shift = f64::from(step) / 10.0 - 1.0;
        if spec.is_symmetric() {
            // As many steps as the end of the range has, half of them each side.
            let exact = f64::from(rounding.scale.abs()) * (steps / 2.0) / (steps / 2.0 + shift);
            let Some((found, _)) = consider(exact, rounding.zero_point) else { continue };
            if let Some(scale) = found.scale() {
                consider(scale, rounding.zero_point);
            }
            continue;
        }
        let exact = (f64::from(high) - f64::from(low)) / (steps + shift);
        let zero = |low: f64, scale: f64| {
            (f64::from(qmin) - low / scale).round_ties_even().clamp(f64::from(qmin), f64::from(qmax)) as i32
        };
        let first = zero(f64::from(low), exact);
        let Some((found, _)) = consider(exact, first) else { continue };
        // Scale and offset together, which moves the zero point; then the scale at that one.
        let (scale, offset) = found.line().unwrap_or((exact, 0.0));
        let second = (f64::from(first) - offset / scale).round_ties_even();
        let second = second.clamp(f64::from(qmin), f64::from(qmax)) as i32;
        let found = if second == first { Some(found) } else { consider(scale, second).map(|(found, _)| found) };
        if let Some(scale) = found.and_then(|found| found.scale()) {
            consider(scale, second);
        }
    }
    let mut stored = |at: QParam| {
        group.levels(at, &mut levels);
        let each = weights.iter().zip(x).zip(&levels);
        each.map(|((&w, &x), &l)| f64::from(w) * (f64::from(x) - f64::from(l * at.scale)).powi(2)).sum::<f64>()
    };
    if best.0 < limit && stored(best.1) < stored(rounding) {
        Choice::better(group, rounding, best.1)
    } else {
        Choice::rounding(group, rounding)
    }
}

/// Weighted sums over a group: of weights, values `x` and levels `l`.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    w: f64,
    wx: f64,
    wxx: f64,
    wl: f64,
    wll: f64,
    wlx: f64,
}

impl Sums {
    fn of(weights: &[f32], x: &[f32], levels: &[f32]) -> Self {
        const LANES: usize = 8;
        let mut lanes = [[0.0_f64; LANES]; 6];
        let mut add = |weights: &[f32], x: &[f32], levels: &[f32]| {
            for (lane, ((&w, &x), &l)) in weights.iter().zip(x).zip(levels).enumerate() {
                let (w, x, l) = (f64::from(w), f64::from(x), f64::from(l));
                let terms = [w, w * x, w * x * x, w * l, w * l * l, w * l * x];
                for (sum, term) in lanes.iter_mut().zip(terms) {
                    sum[lane] += term;
                }
            }
        };
        for ((weights, x), levels) in weights.chunks(LANES).zip(x.chunks(LANES)).zip(levels.chunks(LANES)) {
            add(weights, x, levels);
        }
        let [w, wx, wxx, wl, wll, wlx] = lanes.map(|lane| lane.iter().sum());
        Self { w, wx, wxx, wl, wll, wlx }
    }

    /// `Σ w (x − s l)²`.
    fn error(&self, scale: f32) -> f64 {
        let scale = f64::from(scale);
        self.wxx - 2.0 * scale * self.wlx + scale * scale * self.wll
    }

    /// The scale of least error at these levels.
    fn scale(&self) -> Option<f64> {
        (self.wll > 0.0).then(|| self.wlx / self.wll)
    }

    /// Scale and offset of least error at these levels.
    fn line(&self) -> Option<(f64, f64)> {
        let det = self.w * self.wll - self.wl * self.wl;
        let scale = (self.w * self.wlx - self.wx * self.wl) / det;
        let offset = (self.wll * self.wx - self.wl * self.wlx) / det;
        (det > 0.0 && scale > 0.0).then_some((scale, offset))
    }
}
