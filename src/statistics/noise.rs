//! The error that quantization would cause, computed from the histogram.

use super::{Bin, SiteStatistics};

impl SiteStatistics {
    /// Mean squared error of fake-quantizing the finite values: `q = clamp(round(x / scale) + zero_point, qmin, qmax)`,
    /// ties to even, `y = (q - zero_point) · scale`. Rounding and clipping errors are both in it.
    ///
    /// Values are taken to lie evenly within their bin, over which the error is integrated exactly; zeros, and
    /// tensors that hold one value only, are exact. An error changes by no more than its value moves, so the root of
    /// the result is within the root mean square of the bins' widths of the true one, whatever the values, and that is
    /// at most `amax / 1024`. Where values do not sit at steps of their own, it is far closer.
    ///
    /// NaN if `scale` is not a positive number or `qmin > qmax`; zero if there are no values.
    #[must_use]
    pub fn quantization_noise(&self, scale: f32, zero_point: i32, qmin: i32, qmax: i32) -> f64 {
        match self.finite() {
            0 if scale.is_finite() && scale > 0.0 && qmin <= qmax => 0.0,
            count => integer_error(self.bins(), scale, zero_point, (qmin, qmax), &Power::new(2.0)) / count as f64,
        }
    }

    /// Signal to quantization noise ratio in decibels: the mean square of the values over
    /// [`Self::quantization_noise`]. Infinite where nothing is lost.
    #[must_use]
    pub fn sqnr_db(&self, scale: f32, zero_point: i32, qmin: i32, qmax: i32) -> f64 {
        match self.quantization_noise(scale, zero_point, qmin, qmax) {
            0.0 => f64::INFINITY,
            noise => 10.0 * (self.mean_square() / noise).log10(),
        }
    }

    /// Signal to quantization noise ratio in decibels if each sample were quantized to eight bits over its own range,
    /// as ONNX DynamicQuantizeLinear does. Rounding errors are taken to be spread evenly within a step, and never to
    /// exceed the signal of their sample.
    #[must_use]
    pub fn dynamic_sqnr_db(&self) -> f64 {
        let (mut signal, mut noise) = (0.0, 0.0);
        for record in self.samples() {
            let Some(range) = record.range() else { continue };
            let step = f64::from(range.max.max(0.0) - range.min.min(0.0)) / 255.0;
            let spread = (record.count - u64::from(record.non_finite)) as f64 * step * step / 12.0;
            signal += record.sum_squares;
            noise += spread.min(record.sum_squares);
        }
        if noise > 0.0 { 10.0 * (signal / noise).log10() } else { f64::INFINITY }
    }
}

/// How much an error counts: its magnitude to a power.
#[derive(Clone, Debug)]
pub struct Power {
    exponent: f64,
    /// The integral of the error from 0 to [`REACH`], at equal steps; empty for squares, which need none.
    table: Vec<f64>,
}

/// Steps of [`Power::table`], which reaches beyond half a step of a quantizer.
const STEPS: usize = 2048;
const REACH: f64 = 0.501;

impl Power {
    /// Errors to the power `exponent`, a positive number.
    #[must_use]
    #[allow(clippy::float_cmp, reason = "any other exponent goes the general way")]
    pub fn new(exponent: f64) -> Self {
        let entry = |step: usize| antiderivative(step as f64 * REACH / STEPS as f64, exponent);
        let table = if exponent == 2.0 { Vec::new() } else { (0..=STEPS).map(entry).collect() };
        Self { exponent, table }
    }

    fn of(&self, magnitude: f64) -> f64 {
        if self.table.is_empty() { magnitude * magnitude } else { magnitude.powf(self.exponent) }
    }

    /// The integral of `|x - center|^exponent` over an interval; zero if it is empty.
    fn integral(&self, (low, high): (f64, f64), center: f64) -> f64 {
        if low >= high {
            return 0.0;
        }
        let (a, b) = (low - center, high - center);
        if self.table.is_empty() {
            return (high - low) * (a * a + a * b + b * b) / 3.0;
        }
        let largest = a.abs().max(b.abs());
        if a * b >= 0.0 && b - a < largest / 16.0 {
            // The value at the middle, and what the curvature adds to it: the difference of integrals would cancel.
            let (middle, p) = (f64::midpoint(a, b).abs(), self.exponent);
            return (b - a) * self.of(middle) * (1.0 + p * (p - 1.0) / 24.0 * ((b - a) / middle).powi(2));
        }
        let up_to = |x: f64| self.up_to(x.abs()).copysign(x);
        up_to(b) - up_to(a)
    }

    /// The integral from 0 to `x`.
    fn up_to(&self, x: f64) -> f64 {
        let place = x / REACH * STEPS as f64;
        let below = place as usize;
        // Near zero a straight line is no good.
        match self.table.get(below..below.saturating_add(2)) {
            Some(&[a, b]) if below > STEPS / 64 => a + (b - a) * place.fract(),
            _ => antiderivative(x, self.exponent),
        }
    }
}

fn antiderivative(x: f64, exponent: f64) -> f64 {
    x.powf(exponent + 1.0) / (exponent + 1.0)
}

/// Sum of `|x - y|` to a power over the values in `bins`, where `y` is `x` after
/// `q = clamp(round(x / scale) + zero_point, qmin, qmax)`, `y = (q - zero_point) · scale`. Values are taken to lie evenly
/// within their bin. NaN if `scale` is not a positive number or `qmin > qmax`.
#[must_use]
pub fn integer_error(
    bins: impl IntoIterator<Item = Bin>,
    scale: f32,
    zero_point: i32,
    (qmin, qmax): (i32, i32),
    power: &Power,
) -> f64 {
    if !(scale.is_finite() && scale > 0.0 && qmin <= qmax) {
        return f64::NAN;
    }
    let scale = f64::from(scale);
    let (first, last) = (f64::from(qmin) - f64::from(zero_point), f64::from(qmax) - f64::from(zero_point));
    let grid = Grid { first, last, whole_step: power.integral((-0.5, 0.5), 0.0), power };
    let in_steps = |Bin { low, high, count }: Bin| count as f64 * grid.mean(low / scale, high / scale);
    let sum: f64 = bins.into_iter().map(in_steps).sum();
    sum * power.of(scale)
}

/// Sum of `|x - y|` to a power over the values in `bins`, ascending, where `y` is the one of `levels`, ascending and not
/// empty, that is nearest to `x`. Values are taken to lie evenly within their bin.
#[must_use]
pub fn nearest_error(bins: impl IntoIterator<Item = Bin>, levels: &[f64], power: &Power) -> f64 {
    let mut at = 0;
    let mut sum = 0.0;
    for Bin { low, high, count } in bins {
        let end = |at: usize| levels.get(at + 1).map_or(f64::INFINITY, |next| f64::midpoint(levels[at], *next));
        while end(at) <= low {
            at += 1;
        }
        if high <= low {
            sum += count as f64 * power.of((low - levels[at]).abs());
            continue;
        }
        let (mut from, mut area) = (low, 0.0);
        while from < high {
            let to = high.min(end(at));
            area += power.integral((from, to), levels[at]);
            from = to;
            if end(at) <= from {
                at += 1;
            }
        }
        sum += count as f64 * area / (high - low);
    }
    sum
}

/// The integers from `first` to `last`, to which numbers are rounded.
struct Grid<'a> {
    first: f64,
    last: f64,
    /// The integral of the error over a step.
    whole_step: f64,
    power: &'a Power,
}

impl Grid<'_> {
    /// Mean distance of the numbers in `[low, high]` to the grid, to the power.
    fn mean(&self, low: f64, high: f64) -> f64 {
        if high <= low {
            return self.power.of(self.error(low).abs());
        }
        let error = |part, center| self.power.integral(part, center);
        let below = (low, high.min(self.first));
        let within = (low.max(self.first), high.min(self.last));
        let above = (low.max(self.last), high);
        let mut sum = error(below, self.first) + error(above, self.last);
        if within.0 < within.1 {
            let (first, last) = (within.0.round(), within.1.round());
            if first >= last {
                sum += error(within, first);
            } else {
                let whole_steps = last - first - 1.0;
                sum += error((within.0, first + 0.5), first)
                    + whole_steps * self.whole_step
                    + error((last - 0.5, within.1), last);
            }
        }
        sum / (high - low)
    }

    fn error(&self, at: f64) -> f64 {
        at - at.round_ties_even().clamp(self.first, self.last)
    }
}
