//! Half-quadratic quantization (Badri and Shaji, 2023): the zero point of a group that leaves the sparsest error.
//!
//! The error is `Σ |x − y|^0.7`, for which few large errors are better than many small ones. It is split in two: an error `e`
//! that shrinks what rounding leaves, and a zero point in closed form that has the rest; both by turns, with a growing weight
//! on their agreement.
//!
//! A zero point that is a code rarely moves by that: the step to the next is too large. So the scale is found by turns with
//! `e` in the same way, at the codes on both sides of the zero point and at the one that the range gives.

use super::{Choice, Group};
use crate::numerics::blocks::{self, Between};
use crate::quant::QParam;

/// The power of the error.
const POWER: f32 = 0.7;
/// The first weight on agreement.
const BETA: f32 = 10.0;
/// By how much it grows at each step.
const GROWTH: f32 = 1.01;
/// Default number of steps.
pub const ITERATIONS: u32 = 20;

/// Chooses for one group of finite values. Nothing is taken that is not better than rounding.
#[must_use]
pub fn choose(group: &Group<'_>, iterations: u32) -> Choice {
    let rounding = group.rounded();
    let QParam { scale, zero_point: zero } = rounding;
    if !(scale.is_normal() && group.values.iter().any(|x| *x != 0.0)) {
        return Choice::rounding(group, rounding);
    }
    let mut zeros = vec![zero];
    if !group.spec.is_symmetric() {
        let (qmin, qmax) = group.spec.codes();
        let mut exact = [(zero - qmin) as f32];
        fit_zeros(group.values, group.values.len(), &[1.0 / scale], &mut exact, (qmax - qmin) as f32, iterations);
        let near = [exact[0].floor(), exact[0].ceil()].map(|zero| (zero as i32).clamp(0, qmax - qmin) + qmin);
        zeros.extend(near.into_iter().filter(|near| *near != zero));
        zeros.dedup();
    }
    let candidates = zeros.into_iter().flat_map(|zero| {
        let at = |scale| QParam { scale, zero_point: zero };
        [Some(at(scale)), fitted_scale(group, scale, zero, iterations).map(at)]
    });
    let limit = error(group, rounding);
    let mut best = (limit, rounding);
    for found in candidates.flatten().filter(|&found| found != rounding) {
        let error = error(group, found);
        if error < best.0 {
            best = (error, found);
        }
    }
    if best.0 < limit { Choice::better(group, rounding, best.1) } else { Choice::rounding(group, rounding) }
}

/// As [`choose`] for unsigned codes, with a zero point that may lie between them, as the method was published: the scale is
/// that of the range, which need not contain zero, and the zero point is fitted. Writes the codes. Nothing is taken that is
/// not better than rounding with a zero point that is a code.
pub fn choose_between(group: &Group<'_>, iterations: u32, codes: &mut [u8]) -> Between<Choice> {
    let rounding = group.rounded();
    let highest = group.spec.codes().1 as f32;
    let (low, high) = blocks::extremes(group.values);
    let scale = group.usable((f64::from(high) - f64::from(low)) / f64::from(highest), 1.0).filter(|_| high > low);
    let found = scale.and_then(|scale| {
        let inverse = 1.0 / scale;
        let first = (-low * inverse).round_ties_even();
        let mut fitted = [first];
        fit_zeros(group.values, group.values.len(), &[inverse], &mut fitted, highest, iterations);
        let code = |x: f32, zero: f32| (x * inverse + zero).round_ties_even().clamp(0.0, highest);
        let between = |zero: f32| -> f64 {
            let one = |x: &f32| f64::from(power((x - (code(*x, zero) - zero) * scale).abs(), POWER));
            group.values.iter().map(one).sum()
        };
        let mut best = (error(group, rounding), None);
        for zero in [first, fitted[0]].into_iter().filter(|zero| zero.is_finite()) {
            let now = between(zero);
            if now < best.0 {
                best = (now, Some(zero));
            }
        }
        let zero = best.1?;
        codes.iter_mut().zip(group.values).for_each(|(out, &x)| *out = code(x, zero) as u8);
        Some((scale, zero))
    });
    if let Some((scale, zero_point)) = found {
        return Between { scale, zero_point, said: Choice::better(group, rounding, rounding) };
    }
    let mut levels = vec![0.0; codes.len()];
    group.levels(rounding, &mut levels);
    let QParam { scale, zero_point } = rounding;
    codes.iter_mut().zip(&levels).for_each(|(out, &level)| *out = (level as i32 + zero_point) as u8);
    Between { scale, zero_point: zero_point as f32, said: Choice::rounding(group, rounding) }
}

/// `Σ |x − y|^0.7`.
fn error(group: &Group<'_>, at: QParam) -> f64 {
    let mut levels = vec![0.0; group.values.len()];
    group.levels(at, &mut levels);
    let errors = group.values.iter().zip(&levels).map(|(x, l)| power((x - l * at.scale).abs(), POWER));
    errors.map(f64::from).sum()
}

/// Moves the zero points of groups of `size` values each, the last of which may be shorter; a value `x` has the code
/// `rne(x · inverse + zero)` from 0 to `highest`. Stops where the mean error of all groups does not become less, so that
/// groups that are to stand alone are given alone.
pub fn fit_zeros(values: &[f32], size: usize, inverse: &[f32], zeros: &mut [f32], highest: f32, iterations: u32) {
    let mut beta = BETA;
    let mut least = f64::INFINITY;
    for _ in 0..iterations {
        let mut sum = 0.0;
        for ((x, &inverse), zero) in values.chunks(size).zip(inverse).zip(&mut *zeros) {
            let (error, mean) = step(x, inverse, *zero, highest, beta);
            sum += error;
            *zero = mean;
        }
        beta *= GROWTH;
        if sum >= least {
            break;
        }
        least = sum;
    }
}

/// The absolute error at a zero point, and the next zero point.
fn step(x: &[f32], inverse: f32, zero: f32, highest: f32, beta: f32) -> (f64, f32) {
    const LANES: usize = 8;
    let (mut errors, mut means) = ([0.0_f64; LANES], [0.0_f64; LANES]);
    for x in x.chunks(LANES) {
        for ((&x, sum), mean) in x.iter().zip(&mut errors).zip(&mut means) {
            // Half to even, as adding 1.5 · 2²³ rounds.
            let code = ((x * inverse + zero).clamp(0.0, highest) + 12_582_912.0) - 12_582_912.0;
            let error = x - (code - zero) / inverse;
            *sum += f64::from(error.abs());
            *mean += f64::from(code - (x - shrunk(error, beta)) * inverse);
        }
    }
    (errors.iter().sum(), (means.iter().sum::<f64>() / x.len() as f64) as f32)
}

/// What is left of an error where the rest is to be made up for.
#[inline]
fn shrunk(error: f32, beta: f32) -> f32 {
    let magnitude = error.abs();
    (magnitude - power(magnitude + 1e-8, POWER - 1.0) / beta).max(0.0).copysign(error)
}

/// The scale that fits the codes it makes, but for sparse errors.
fn fitted_scale(group: &Group<'_>, first: f32, zero: i32, iterations: u32) -> Option<f32> {
    let mut levels = vec![0.0; group.values.len()];
    let (mut scale, mut beta) = (first, BETA);
    for _ in 0..iterations {
        group.levels(QParam { scale, zero_point: zero }, &mut levels);
        let (mut product, mut square) = (0.0, 0.0);
        for (&x, &l) in group.values.iter().zip(&levels) {
            product += f64::from(x - shrunk(x - l * scale, beta)) * f64::from(l);
            square += f64::from(l) * f64::from(l);
        }
        let exact = product / square * f64::from(first.signum());
        let next = group.usable(if exact > 0.0 { exact } else { return None }, first)?;
        let change = ((next - scale) / scale).abs();
        scale = next;
        beta *= GROWTH;
        if change < 1e-5 {
            break;
        }
    }
    Some(scale)
}

/// `x^p` of a positive number, to six digits, by the same operations on every machine; that of zero is next to it.
fn power(x: f32, p: f32) -> f32 {
    let bits = x.max(f32::MIN_POSITIVE).to_bits();
    // Around 1, from the root of a half to the root of 2.
    let exponent = ((bits.wrapping_sub(0x3f35_04f3) as i32) >> 23) as f32;
    let mantissa = f32::from_bits(bits.wrapping_sub(((exponent as i32) << 23) as u32));
    // ln m = 2 artanh((m − 1) / (m + 1)).
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let tt = t * t;
    let ln = 2.0 * t * (1.0 + tt * (1.0 / 3.0 + tt * (1.0 / 5.0 + tt * (1.0 / 7.0))));
    let log2 = exponent + ln * std::f32::consts::LOG2_E;
    let y = (p * log2).clamp(-126.0, 126.0);
    let whole = y.round_ties_even();
    let rest = (y - whole) * std::f32::consts::LN_2;
    let series = 1.0
        + rest
            * (1.0
                + rest * (1.0 / 2.0 + rest * (1.0 / 6.0 + rest * (1.0 / 24.0 + rest * (1.0 / 120.0 + rest / 720.0)))));
    series * f32::from_bits(((whole as i32 + 127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::power;

    #[test]
    fn powers_have_six_digits() {
        for p in [0.7, -0.3, 1.0] {
            for step in 0..4000 {
                let x = 10f64.powf(f64::from(step) / 200.0 - 12.0) as f32;
                let exact = f64::from(x).powf(f64::from(p));
                assert!((f64::from(power(x, p)) / exact - 1.0).abs() < 3e-6, "{x} {p}");
            }
        }
        assert!(power(0.0, 0.7) < 1e-20);
    }
}
