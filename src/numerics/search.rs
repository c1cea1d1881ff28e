//! Searches for ranges that clip, over the values themselves.

use rayon::prelude::*;

use super::affine::{CHUNK, quantize_value};
use super::grid::{Grid, Run};
use super::{Format, Granularity, QParam, RangeSpec, Round, kernels, min_max, qparams_from_range, wide};
use crate::error::{Error, Result};

/// How many ranges [`mse_ranges`] tries: the whole one, and each a hundredth of it shorter.
const STEPS: u16 = 80;

/// For each entry of the scale tensor, in row-major order, the range with the least `Σ |x − y|^p`, `y` being what `x` becomes
/// in the format.
///
/// Tried are `min · r..=max · r` for `r` = 1, 0.99, … 0.21; of equals the longest is taken. An entry without values has the
/// range `(0, 0)`.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if `x` does not fill `dims`, holds NaN or infinities, or the granularity does not fit.
pub fn mse_ranges(
    x: &[f32],
    dims: &[usize],
    granularity: &Granularity,
    spec: &RangeSpec,
    round: Round,
    p: f64,
) -> Result<Vec<(f32, f32)>> {
    let mut groups = Groups::new(x, dims, granularity)?;
    Ok(groups.map(|values| {
        let whole = min_max(values);
        let (low, high) = (whole.min.min(0.0), whole.max.max(0.0));
        let range = |step: u16| {
            let ratio = 1.0 - f32::from(step) / 100.0;
            (low * ratio, high * ratio)
        };
        let tried = |step: u16| error(values, range(step), spec, round, p);
        let errors: Vec<f64> = if values.len() > CHUNK {
            (0..STEPS).into_par_iter().map(tried).collect()
        } else {
            (0..STEPS).map(tried).collect()
        };
        let least = errors.iter().copied().fold(f64::INFINITY, f64::min);
        range((0..STEPS).zip(errors).find(|(_, error)| *error <= least).map_or(0, |(step, _)| step))
    }))
}

/// `Σ |x − y|^p` for the scale and zero point of a range.
fn error(values: &[f32], (low, high): (f32, f32), spec: &RangeSpec, round: Round, p: f64) -> f64 {
    let QParam { scale, zero_point } = qparams_from_range(low, high, spec);
    let mut sum = 0.0;
    let mut block = [0.0f32; 1024];
    for values in values.chunks(block.len()) {
        let block = &mut block[..values.len()];
        block.copy_from_slice(values);
        fake(block, scale, zero_point, spec, round);
        sum += if (p - 2.0).abs() < f64::EPSILON {
            wide::squared_error(values, block)
        } else {
            let errors = values.iter().zip(&*block).map(|(x, y)| (f64::from(*x) - f64::from(*y)).abs());
            errors.map(|error| error.powf(p)).sum::<f64>()
        };
    }
    sum
}

fn fake(values: &mut [f32], scale: f32, zero_point: i32, spec: &RangeSpec, round: Round) {
    let (low, high) = spec.codes();
    match spec.format.float() {
        Some(float) => kernels::float_fake(values, scale, float),
        None if round == Round::HalfEven && spec.format != Format::Int32 => {
            kernels::int_fake(values, scale, zero_point, (low, high));
        }
        None => {
            for value in values {
                let code = quantize_value(*value, scale, zero_point, spec.format, round).clamp(low, high);
                *value = (i64::from(code) - i64::from(zero_point)) as f32 * scale;
            }
        }
    }
}

/// For each entry of the scale tensor, in row-major order, `Σ (x − y)²`.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if `x` and `y` do not fill `dims`, or the granularity does not fit.
pub fn squared_errors(x: &[f32], y: &[f32], dims: &[usize], granularity: &Granularity) -> Result<Vec<f64>> {
    let grid = Grid::new(dims, granularity)?;
    if x.len() != grid.len || y.len() != grid.len {
        return Err(Error::model(format!("{} and {} elements do not fill {dims:?}", x.len(), y.len())));
    }
    let mut errors = vec![0.0; grid.entries];
    let mut at = 0;
    for run in grid.runs(0, x.len()) {
        let now = at..at + run.len();
        at = now.end;
        let squares = x[now.clone()].iter().zip(&y[now]).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2));
        match run {
            Run::Same { len: _, entry } => errors[entry] += squares.sum::<f64>(),
            Run::Each { len, first } => {
                errors[first..first + len].iter_mut().zip(squares).for_each(|(error, square)| *error += square);
            }
        }
    }
    Ok(errors)
}

/// For each entry of the scale tensor, in row-major order, the range that keeps `percent` of the values: `−v..=v` with `v` the
/// least magnitude that at least so many do not exceed, or, where not `symmetric`, without half of the rest at each end.
///
/// Exact: the ends are values of `x`. An entry without values has the range `(0, 0)`.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if `x` does not fill `dims`, holds NaN or infinities, or the granularity does not fit.
pub fn percentile_ranges(
    x: &[f32],
    dims: &[usize],
    granularity: &Granularity,
    percent: f64,
    symmetric: bool,
) -> Result<Vec<(f32, f32)>> {
    let mut groups = Groups::new(x, dims, granularity)?;
    Ok(groups.map(|values| {
        if values.is_empty() {
            return (0.0, 0.0);
        }
        if symmetric {
            for value in values.iter_mut() {
                *value = value.abs();
            }
            let end = *values.select_nth_unstable_by(kept(values.len(), percent) - 1, f32::total_cmp).1;
            return (-end, end);
        }
        let kept = kept(values.len(), 50.0 + percent / 2.0);
        let high = *values.select_nth_unstable_by(kept - 1, f32::total_cmp).1;
        let low = *values.select_nth_unstable_by(values.len() - kept, f32::total_cmp).1;
        (low, high)
    }))
}

/// The least number of `count` values that are at least `percent` of them, and at least one.
fn kept(count: usize, percent: f64) -> usize {
    // The product of a decimal fraction may come out just above the whole number it is.
    let exact = percent * count as f64 / 100.0;
    ((exact - exact * 1e-12).ceil() as usize).clamp(1, count)
}

/// Values, those of one entry of the scale tensor after those of another.
struct Groups {
    values: Vec<f32>,
    /// How many each entry has.
    lens: Vec<usize>,
}

impl Groups {
    fn new(x: &[f32], dims: &[usize], granularity: &Granularity) -> Result<Self> {
        let grid = Grid::new(dims, granularity)?;
        if x.len() != grid.len {
            return Err(Error::model(format!("{} elements do not fill a tensor of shape {dims:?}", x.len())));
        }
        if let Some(at) = x.iter().position(|value| !value.is_finite()) {
            return Err(Error::model(format!("element {at} is {}, which has no place in a range", x[at])));
        }
        let mut lens = vec![0_usize; grid.entries];
        for run in grid.runs(0, x.len()) {
            match run {
                Run::Same { len, entry } => lens[entry] += len,
                Run::Each { len, first } => lens[first..first + len].iter_mut().for_each(|count| *count += 1),
            }
        }
        let mut next: Vec<usize> = lens
            .iter()
            .scan(0, |start, &len| {
                let at = *start;
                *start += len;
                Some(at)
            })
            .collect();
        let mut values = vec![0.0; x.len()];
        let mut rest = x;
        for run in grid.runs(0, x.len()) {
            let (now, later) = rest.split_at(run.len());
            rest = later;
            match run {
                Run::Same { len, entry } => {
                    values[next[entry]..next[entry] + len].copy_from_slice(now);
                    next[entry] += len;
                }
                Run::Each { len, first } => {
                    for (next, &value) in next[first..first + len].iter_mut().zip(now) {
                        values[*next] = value;
                        *next += 1;
                    }
                }
            }
        }
        Ok(Self { values, lens })
    }

    /// Calls `range` with the values of each entry, in parallel.
    fn map(&mut self, range: impl Fn(&mut [f32]) -> (f32, f32) + Send + Sync) -> Vec<(f32, f32)> {
        let mut rest = self.values.as_mut_slice();
        let mut groups = Vec::with_capacity(self.lens.len());
        for &len in &self.lens {
            let (now, later) = rest.split_at_mut(len);
            rest = later;
            groups.push(now);
        }
        groups.into_par_iter().map(range).collect()
    }
}
