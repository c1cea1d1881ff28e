//! From observed ranges to scales and zero points.

use super::grid::{Grid, Run};
use super::{Granularity, Precision, QParam, RangeSpec, ScaleDtype, Symmetry, kernels};
use crate::error::{Error, Result};

/// The largest power of two that f32 and bfloat16 hold.
const LARGEST_POWER: f32 = f32::from_bits(254 << 23);

impl RangeSpec {
    /// The largest scale not above what f32, the precision and the powers of two allow.
    fn largest_scale(&self) -> f32 {
        match (self.scale_dtype, self.power_of_two) {
            (ScaleDtype::Float16, false) => half::f16::MAX.to_f32(),
            (ScaleDtype::Float16, true) => 32768.0,
            (ScaleDtype::Bfloat16, false) => half::bf16::MAX.to_f32(),
            (_, false) => f32::MAX,
            (_, true) => LARGEST_POWER,
        }
    }

    /// The scale that is used where a positive `scale` would do: a power of two not below it, in the precision.
    pub fn scale(&self, scale: f64) -> f32 {
        let scale = if self.power_of_two { power_of_two_above(scale) } else { scale };
        let scale = (scale.min(f64::from(f32::MAX)) as f32).max(f32::MIN_POSITIVE);
        // Rounded to nothing, or below what is asked for at least: the next one.
        let scale = match self.scale_dtype {
            ScaleDtype::Float32 | ScaleDtype::Float8e4m3fn | ScaleDtype::Float8e8m0 => scale,
            ScaleDtype::Float16 => {
                let near = half::f16::from_f32(scale);
                let short = near.to_f32() < self.eps.min(scale) || near == half::f16::ZERO;
                half::f16::from_bits(near.to_bits() + u16::from(short)).to_f32()
            }
            ScaleDtype::Bfloat16 => {
                let near = half::bf16::from_f32(scale);
                let short = near.to_f32() < self.eps.min(scale);
                half::bf16::from_bits(near.to_bits() + u16::from(short)).to_f32()
            }
        };
        scale.min(self.largest_scale())
    }
}

/// The least power of two that is not below a positive number.
fn power_of_two_above(x: f64) -> f64 {
    let bits = x.to_bits();
    let below = f64::from_bits(bits >> 52 << 52);
    // Subnormal f64 are far below every scale.
    if x.is_finite() && below < x { below * 2.0 } else { x }
}

/// The scale and zero point that cover `min..=max` and 0, with `qmin..=qmax` the [codes](RangeSpec::codes) of the spec.
///
/// - Asymmetric integers: `s = (max − min) / (qmax − qmin)`, `z = clamp(rne(qmin − min / s), qmin, qmax)`.
/// - Symmetric integers: `z = ⌊(qmin + qmax + 1) / 2⌋`, `s = amax / ((qmax − qmin) / 2)`: `amax / 127` for narrow `int8` and
///   `uint8`, `amax / 127.5` otherwise.
/// - Signed: the same `z`, `s = −v / (z − qmin)` with `v` the end of larger magnitude.
/// - Floats: `s = amax / MAX`, `z = 0`.
///
/// The magnitude of the scale is raised to `eps`, then to a power of two, then rounded to the precision; it stays within the normal numbers of
/// f32 and the finite ones of the precision. The zero point uses that scale where either rounds it, and otherwise, in f64,
/// the unrounded one. NaN bounds count as 0, infinite ones as the largest f32.
pub fn qparams_from_range(min: f32, max: f32, spec: &RangeSpec) -> QParam {
    let bound = |value: f32| value.clamp(f32::MIN, f32::MAX);
    // f32::min and max return the number where one side is NaN.
    let (min, max) = (bound(min).min(0.0), bound(max).max(0.0));
    let (low, high) = (f64::from(min), f64::from(max));
    let amax = high.max(-low);
    let (qmin, qmax) = spec.codes();
    // The whole range of int32 does not fit the type.
    let steps = f64::from(qmax) - f64::from(qmin);
    let middle = ((i64::from(qmin) + i64::from(qmax) + 1).div_euclid(2)) as i32;
    let below = f64::from(middle) - f64::from(qmin);
    let single = spec.precision != Precision::Double;
    let mlas = spec.precision == Precision::Mlas;
    let width = if single { f64::from(max - min) } else { high - low };
    let symmetry = if spec.format.is_integer() { Some(spec.symmetry) } else { None };
    let scale = match symmetry {
        None => amax / f64::from(spec.format.max_value()),
        Some(Symmetry::Asymmetric) => width / steps,
        Some(Symmetry::Symmetric) => amax / (steps / 2.0),
        Some(Symmetry::Signed) => amax / below,
    };
    let sign = if symmetry == Some(Symmetry::Signed) && high <= -low { 1.0 } else { -1.0 };
    let signed = |scale: f32| if symmetry == Some(Symmetry::Signed) { scale * sign } else { scale };
    if spec.eps <= 0.0 && scale < f64::from(f32::MIN_POSITIVE) {
        let (scale, zero_point) = match symmetry {
            Some(Symmetry::Asymmetric) if mlas => (0.0, qmin),
            Some(Symmetry::Signed) if mlas => (-0.0, middle),
            Some(_) if mlas => (0.0, middle),
            Some(_) => (1.0, 0.max(qmin)),
            None => (1.0, 0),
        };
        return QParam { scale, zero_point };
    }
    let scale = scale.max(f64::from(spec.eps));
    let rounded = spec.scale(scale);
    let zero_point = match symmetry {
        None => 0,
        Some(Symmetry::Symmetric | Symmetry::Signed) => middle,
        Some(Symmetry::Asymmetric) if mlas => {
            (f64::from(qmin) + f64::from((-min / rounded).round())).clamp(f64::from(qmin), f64::from(qmax)) as i32
        }
        Some(Symmetry::Asymmetric) if single => (f64::from(qmin) - f64::from((min / rounded).round_ties_even()))
            .clamp(f64::from(qmin), f64::from(qmax)) as i32,
        Some(Symmetry::Asymmetric) => {
            let plain = !spec.power_of_two && !matches!(spec.scale_dtype, ScaleDtype::Float16 | ScaleDtype::Bfloat16);
            let scale = if plain { scale } else { f64::from(rounded) };
            (f64::from(qmin) - low / scale).round_ties_even().clamp(f64::from(qmin), f64::from(qmax)) as i32
        }
    };
    QParam { scale: signed(rounded), zero_point }
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
