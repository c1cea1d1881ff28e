//! From observed ranges to scales and zero points.

use super::grid::{Grid, Run};
use super::{Format, Granularity, kernels};
use crate::error::{Error, Result};

/// What [`qparams_from_range`] is to make of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct RangeSpec {
    /// The format of the codes.
    pub format: Format,
    /// Whether zero gets the middle code (0, or 128 for `uint8`). Floats always are.
    pub symmetric: bool,
    /// Whether the smallest integer code is left unused, so that −127…127 remain of `int8`. Without effect where
    /// `symmetric`, which never needs that code.
    pub narrow: bool,
}

/// The scale and zero point that cover `min..=max` and 0.
///
/// - Asymmetric integers: `s = (max − min) / (qmax − qmin)`, `z = clamp(rne(qmin − min / s), qmin, qmax)`.
/// - Symmetric signed: `s = amax / qmax`, `z = 0`; `qmax` is 127 for `int8`, 7 for `int4`, 1 for `int2`, 32767 for `int16`.
/// - Symmetric unsigned: `z = 2^(bits − 1)`, `s = amax / (qmax − z)`: 128 and `amax / 127` for `uint8`, 8 and `amax / 7` for `uint4`.
/// - Floats: `s = amax / MAX`, `z = 0`.
///
/// Computed in f64 and cast last; the zero point uses the f64 scale. A range whose scale would be below the smallest normal
/// f32, such as that of an all-zero tensor, gives scale 1 and zero point 0. NaN bounds count as 0, infinite ones as the
/// largest f32.
pub fn qparams_from_range(min: f32, max: f32, spec: &RangeSpec) -> (f32, i32) {
    let RangeSpec { format, symmetric, narrow } = *spec;
    let bound = |value: f32| f64::from(value).clamp(f64::from(f32::MIN), f64::from(f32::MAX));
    // f64::min and max return the number where one side is NaN.
    let (min, max) = (bound(min).min(0.0), bound(max).max(0.0));
    let amax = max.max(-min);
    let (qmin, qmax) = format.range();
    let (scale, zero_point) = if !format.is_integer() {
        (amax / f64::from(format.max_value()), 0)
    } else if symmetric {
        let middle = if format.is_signed() { 0 } else { 1 << (format.bits() - 1) };
        (amax / f64::from(qmax - middle), middle)
    } else {
        let (qmin, qmax) = (f64::from(qmin) + f64::from(u8::from(narrow)), f64::from(qmax));
        let scale = (max - min) / (qmax - qmin);
        let zero_point = (qmin - min / scale).round_ties_even().clamp(qmin, qmax);
        (scale, zero_point as i32)
    };
    if scale < f64::from(f32::MIN_POSITIVE) { (1.0, 0) } else { (scale as f32, zero_point) }
}

/// The extremes of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MinMax {
    /// Smallest finite element; 0 if there is none.
    pub min: f32,
    /// Largest finite element; 0 if there is none.
    pub max: f32,
    /// How many elements are NaN.
    pub nan: usize,
    /// How many elements are infinite.
    pub inf: usize,
}

/// Enough independent bounds for the loop over them to vectorize.
const LANES: usize = 128;

/// The extremes of `x`, and how many elements are not numbers.
pub fn min_max(x: &[f32]) -> MinMax {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for row in x.chunks(LANES) {
        kernels::widen(&mut low, &mut high, row);
    }
    let min = low.into_iter().fold(f32::INFINITY, f32::min);
    let max = high.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let (min, max) = if min > max { (0.0, 0.0) } else { (min, max) };
    let special = if kernels::is_finite(x) { 0 } else { kernels::count_special(x) };
    let nan = if special == 0 { 0 } else { x.iter().filter(|value| value.is_nan()).count() };
    MinMax { min, max, nan, inf: special - nan }
}

/// Smallest and largest finite element for each entry of the scale tensor, in row-major order; `(0, 0)` where there is none.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if `x` does not fill `dims` or the granularity does not fit it.
pub fn channel_ranges(x: &[f32], dims: &[usize], granularity: &Granularity) -> Result<Vec<(f32, f32)>> {
    let grid = Grid::new(dims, granularity)?;
    if x.len() != grid.len {
        return Err(Error::model(format!("{} elements do not fill a tensor of shape {dims:?}", x.len())));
    }
    let (mut low, mut high) = (vec![f32::INFINITY; grid.entries], vec![f32::NEG_INFINITY; grid.entries]);
    let mut rest = x;
    for run in grid.runs(0, x.len()) {
        let (now, later) = rest.split_at(run.len());
        rest = later;
        match run {
            Run::Same { len: _, entry } if now.len() < LANES => {
                for &value in now.iter().filter(|value| value.is_finite()) {
                    low[entry] = low[entry].min(value);
                    high[entry] = high[entry].max(value);
                }
            }
            Run::Same { len, entry } => {
                let MinMax { min, max, nan, inf } = min_max(now);
                if nan + inf < len {
                    low[entry] = low[entry].min(min);
                    high[entry] = high[entry].max(max);
                }
            }
            Run::Each { len, first } => {
                kernels::widen(&mut low[first..first + len], &mut high[first..first + len], now);
            }
        }
    }
    Ok(low.into_iter().zip(high).map(|(low, high)| if low > high { (0.0, 0.0) } else { (low, high) }).collect())
}
