//! From observed ranges to scales and zero points.

use super::grid::{Grid, Run};
use super::{Format, Granularity, kernels};
use crate::error::{Error, Result};

/// The largest power of two that f32 and bfloat16 hold.
const LARGEST_POWER: f32 = f32::from_bits(254 << 23);

/// What [`qparams_from_range`] is to make of a range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RangeSpec {
    /// The format of the codes.
    pub format: Format,
    /// Where zero is. Without effect for floats, whose zero point is 0.
    pub symmetry: Symmetry,
    /// Whether the lowest integer code is left unused where there are more of them below the middle than above, so that
    /// −127…127 remain of `int8` and 1…255 of `uint8`.
    pub narrow: bool,
    /// Whether one bit of an integer format is left unused; see [`codes`](Self::codes).
    pub reduce: bool,
    /// Whether the scale is rounded up to a power of two.
    pub power_of_two: bool,
    /// What the scale is rounded to, half to even.
    pub precision: Precision,
    /// In which precision scale and zero point are computed.
    pub arithmetic: Arithmetic,
    /// The least scale, or its least magnitude. Where 0, a range whose scale would be below the smallest normal f32 gives
    /// scale 1 and zero point 0, or the code next to it that is used; but see [`Arithmetic::Mlas`].
    pub eps: f32,
    /// The least width of the range, which grows upwards: `max = max(max, min + width)` in f32.
    pub min_width: f32,
}

/// Where the zero of integer codes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Symmetry {
    /// Wherever the range has it.
    Asymmetric,
    /// At the middle code (0, or 128 of `uint8`); the range is `−amax…amax`, and where codes are not narrow, `amax` itself
    /// is half a step beyond the largest code.
    Symmetric,
    /// At the middle code, with a scale at which neither end of the range is beyond its code.
    NoClipping,
    /// At the middle code, with a scale of either sign: the end of the range that is further from zero has the lowest code,
    /// of which there is one more than of those above the middle. Equal ends count as the lower one.
    Signed,
}

/// What a scale is rounded to. It is an f32 all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 24 significant bits.
    Float32,
    /// 11 significant bits, from 2⁻²⁴ to 65504.
    Float16,
    /// 8 significant bits.
    Bfloat16,
}

/// The precision in which scale and zero point are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f64, and the scale rounded last: onnxruntime's.
    Double,
    /// f32, every step of it: torch's. Scales of asymmetric ranges may differ in the last bit.
    Single,
    /// As `Single`, zero points rounded half away from zero; a range without width has the scale 0, or −0 where its sign is
    /// free: that of MLAS, which onnxruntime quantizes `MatMulNBits` with.
    Mlas,
}

impl RangeSpec {
    /// A spec with nothing else asked for; symmetric codes are narrow.
    pub fn new(format: Format, symmetric: bool) -> Self {
        Self {
            format,
            symmetry: if symmetric { Symmetry::Symmetric } else { Symmetry::Asymmetric },
            narrow: symmetric,
            reduce: false,
            power_of_two: false,
            precision: Precision::Float32,
            arithmetic: Arithmetic::Double,
            eps: 0.0,
            min_width: 0.0,
        }
    }

    /// Whether the zero point is fixed.
    pub fn is_symmetric(&self) -> bool {
        self.symmetry != Symmetry::Asymmetric
    }

    /// Smallest and largest code that stand for numbers of the range; those of a float are its bit patterns.
    ///
    /// Reduced ranges are onnxruntime's: half of the codes, as −4…3 and 0…7, but −64…64 of `int8` and −16384…16384 of
    /// `int16`. In torch's arithmetic it is half of the codes of these as well.
    pub fn codes(&self) -> (i32, i32) {
        let (qmin, qmax) = self.format.range();
        if !self.format.is_integer() {
            return (qmin, qmax);
        }
        let (qmin, qmax) = match (self.reduce, self.format) {
            (false, _) => (qmin, qmax),
            (true, Format::Int8 | Format::Int16) if self.arithmetic != Arithmetic::Single => (qmin / 2, -(qmin / 2)),
            (true, _) => (qmin / 2, (qmax - 1) / 2),
        };
        // An even number of codes has one more below the middle.
        let uneven = qmin.wrapping_sub(qmax) % 2 != 0;
        (qmin + i32::from(self.narrow && uneven), qmax)
    }

    /// The largest scale not above what f32, the precision and the powers of two allow.
    fn largest_scale(&self) -> f32 {
        match (self.precision, self.power_of_two) {
            (Precision::Float16, false) => half::f16::MAX.to_f32(),
            (Precision::Float16, true) => 32768.0,
            (Precision::Bfloat16, false) => half::bf16::MAX.to_f32(),
            (Precision::Float32, false) => f32::MAX,
            (Precision::Float32 | Precision::Bfloat16, true) => LARGEST_POWER,
        }
    }

    /// The scale that is used where a positive `scale` would do: a power of two not below it, in the precision.
    pub fn scale(&self, scale: f64) -> f32 {
        let scale = if self.power_of_two { power_of_two_above(scale) } else { scale };
        let scale = (scale.min(f64::from(f32::MAX)) as f32).max(f32::MIN_POSITIVE);
        // Rounded to nothing, or below what is asked for at least: the next one.
        let scale = match self.precision {
            Precision::Float32 => scale,
            Precision::Float16 => {
                let near = half::f16::from_f32(scale);
                let short = near.to_f32() < self.eps.min(scale) || near == half::f16::ZERO;
                half::f16::from_bits(near.to_bits() + u16::from(short)).to_f32()
            }
            Precision::Bfloat16 => {
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
/// - Without clipping: the same `z`, `s = max(−min / (z − qmin), max / (qmax − z))`.
/// - Signed: the same `z`, `s = −v / (z − qmin)` with `v` the end of larger magnitude.
/// - Floats: `s = amax / MAX`, `z = 0`.
///
/// The magnitude of the scale is raised to `eps`, then to a power of two, then rounded to the precision; it stays within the normal numbers of
/// f32 and the finite ones of the precision. The zero point uses that scale where either rounds it, and otherwise, in f64,
/// the unrounded one. NaN bounds count as 0, infinite ones as the largest f32.
pub fn qparams_from_range(min: f32, max: f32, spec: &RangeSpec) -> (f32, i32) {
    let bound = |value: f32| value.clamp(f32::MIN, f32::MAX);
    // f32::min and max return the number where one side is NaN.
    let (min, max) = (bound(min).min(0.0), bound(max).max(0.0));
    let max = if spec.min_width > 0.0 { bound(max.max(min + spec.min_width)) } else { max };
    let (low, high) = (f64::from(min), f64::from(max));
    let amax = high.max(-low);
    let (qmin, qmax) = spec.codes();
    // The whole range of int32 does not fit the type.
    let steps = f64::from(qmax) - f64::from(qmin);
    let middle = ((i64::from(qmin) + i64::from(qmax) + 1).div_euclid(2)) as i32;
    let (below, above) = (f64::from(middle) - f64::from(qmin), f64::from(qmax) - f64::from(middle));
    let single = spec.arithmetic != Arithmetic::Double;
    let mlas = spec.arithmetic == Arithmetic::Mlas;
    let width = if single { f64::from(max - min) } else { high - low };
    let symmetry = if spec.format.is_integer() { Some(spec.symmetry) } else { None };
    let scale = match symmetry {
        None => amax / f64::from(spec.format.max_value()),
        Some(Symmetry::Asymmetric) => width / steps,
        Some(Symmetry::Symmetric) => amax / (steps / 2.0),
        // No code is above the middle of two bits that are reduced to one.
        Some(Symmetry::NoClipping) => {
            let up = if above > 0.0 { high / above } else { 0.0 };
            (-low / below).max(up)
        }
        Some(Symmetry::Signed) => amax / below,
    };
    let sign = if symmetry == Some(Symmetry::Signed) && high <= -low { 1.0 } else { -1.0 };
    let signed = |scale: f32| if symmetry == Some(Symmetry::Signed) { scale * sign } else { scale };
    if spec.eps <= 0.0 && scale < f64::from(f32::MIN_POSITIVE) {
        return match symmetry {
            Some(Symmetry::Asymmetric) if mlas => (0.0, qmin),
            Some(Symmetry::Signed) if mlas => (-0.0, middle),
            Some(_) if mlas => (0.0, middle),
            Some(_) => (1.0, 0.max(qmin)),
            None => (1.0, 0),
        };
    }
    let scale = scale.max(f64::from(spec.eps));
    let rounded = spec.scale(scale);
    let zero_point = match symmetry {
        None => 0,
        Some(Symmetry::Symmetric | Symmetry::NoClipping | Symmetry::Signed) => middle,
        Some(Symmetry::Asymmetric) if mlas => {
            (f64::from(qmin) + f64::from((-min / rounded).round())).clamp(f64::from(qmin), f64::from(qmax)) as i32
        }
        Some(Symmetry::Asymmetric) if single => (f64::from(qmin) - f64::from((min / rounded).round_ties_even()))
            .clamp(f64::from(qmin), f64::from(qmax)) as i32,
        Some(Symmetry::Asymmetric) => {
            let plain = !spec.power_of_two && spec.precision == Precision::Float32;
            let scale = if plain { scale } else { f64::from(rounded) };
            (f64::from(qmin) - low / scale).round_ties_even().clamp(f64::from(qmin), f64::from(qmax)) as i32
        }
    };
    (signed(rounded), zero_point)
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
