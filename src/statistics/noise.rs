//! What quantizing would cost, computed from the histogram.

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
    /// NaN if `scale` is not a positive number or `qmin > qmax`; zero where nothing was seen.
    #[must_use]
    pub fn quantization_noise(&self, scale: f32, zero_point: i32, qmin: i32, qmax: i32) -> f64 {
        match self.finite() {
            0 if scale.is_finite() && scale > 0.0 && qmin <= qmax => 0.0,
            count => integer_error(self.bins(), scale, zero_point, qmin, qmax, 2.0) / count as f64,
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
            let Some(range) = record.range else { continue };
            let step = f64::from(range.max.max(0.0) - range.min.min(0.0)) / 255.0;
            let spread = (record.count - record.non_finite) as f64 * step * step / 12.0;
            signal += record.sum_squares;
            noise += spread.min(record.sum_squares);
        }
        if noise > 0.0 { 10.0 * (signal / noise).log10() } else { f64::INFINITY }
    }
}

/// Sum of `|x - y|^power` over the values in `bins`, where `y` is `x` after
/// `q = clamp(round(x / scale) + zero_point, qmin, qmax)`, `y = (q - zero_point) · scale`. Values are taken to lie evenly
/// within their bin. NaN if `scale` is not a positive number or `qmin > qmax`.
#[must_use]
pub fn integer_error(
    bins: impl IntoIterator<Item = Bin>,
    scale: f32,
    zero_point: i32,
    qmin: i32,
    qmax: i32,
    power: f64,
) -> f64 {
    if !(scale.is_finite() && scale > 0.0 && qmin <= qmax) {
        return f64::NAN;
    }
    let scale = f64::from(scale);
    let (first, last) = (f64::from(qmin) - f64::from(zero_point), f64::from(qmax) - f64::from(zero_point));
    let grid = Grid { first, last, power: Power::new(power) };
    let in_steps = |Bin { low, high, count }: Bin| {
        if count == 0 { 0.0 } else { count as f64 * grid.mean(low / scale, high / scale) }
    };
    let sum: f64 = bins.into_iter().map(in_steps).sum();
    sum * grid.power.of(scale)
}

/// Sum of `|x - y|^power` over the values in `bins`, where `y` is the one of `levels`, ascending and not empty, that is
/// nearest to `x`. Values are taken to lie evenly within their bin.
#[must_use]
pub fn nearest_error(bins: impl IntoIterator<Item = Bin>, levels: &[f64], power: f64) -> f64 {
    let power = Power::new(power);
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

/// The exponent of an error; squares are computed without `powf`.
#[derive(Clone, Copy)]
enum Power {
    Two,
    Other(f64),
}

impl Power {
    #[allow(clippy::float_cmp, reason = "any other exponent goes the general way")]
    fn new(power: f64) -> Self {
        if power == 2.0 { Self::Two } else { Self::Other(power) }
    }

    fn of(self, magnitude: f64) -> f64 {
        match self {
            Self::Two => magnitude * magnitude,
            Self::Other(power) => magnitude.powf(power),
        }
    }

    /// The integral of `|x - center|^power` over an interval; zero if it is empty.
    fn integral(self, (low, high): (f64, f64), center: f64) -> f64 {
        if low >= high {
            return 0.0;
        }
        let (a, b) = (low - center, high - center);
        match self {
            Self::Two => (high - low) * (a * a + a * b + b * b) / 3.0,
            // Simpson's rule is exact enough for a narrow interval, where the difference of integrals cancels.
            Self::Other(power) if (b - a) < 0.05 * a.abs().max(b.abs()) && a * b > 0.0 => {
                let middle = f64::midpoint(a, b).abs().powf(power);
                (b - a) / 6.0 * (a.abs().powf(power) + 4.0 * middle + b.abs().powf(power))
            }
            Self::Other(power) => {
                let up_to = |x: f64| x.signum() * x.abs().powf(power + 1.0) / (power + 1.0);
                up_to(b) - up_to(a)
            }
        }
    }
}

/// The integers from `first` to `last`, to which numbers are rounded.
struct Grid {
    first: f64,
    last: f64,
    power: Power,
}

impl Grid {
    /// Mean distance of the numbers in `[low, high]` to the grid, to the power.
    fn mean(&self, low: f64, high: f64) -> f64 {
        if high <= low {
            return self.power.of(self.error(low).abs());
        }
        let squares = |part, center| self.power.integral(part, center);
        let below = (low, high.min(self.first));
        let within = (low.max(self.first), high.min(self.last));
        let above = (low.max(self.last), high);
        let mut sum = squares(below, self.first) + squares(above, self.last);
        if within.0 < within.1 {
            let (first, last) = (within.0.round(), within.1.round());
            if first >= last {
                sum += squares(within, first);
            } else {
                let whole_steps = last - first - 1.0;
                sum += squares((within.0, first + 0.5), first)
                    + whole_steps * squares((-0.5, 0.5), 0.0)
                    + squares((last - 0.5, within.1), last);
            }
        }
        sum / (high - low)
    }

    fn error(&self, at: f64) -> f64 {
        at - at.round_ties_even().clamp(self.first, self.last)
    }
}
