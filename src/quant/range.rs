//! What of a scheme matters where a range becomes a scale.

use serde::{Deserialize, Serialize};

use super::{Format, Precision, ScaleDtype};

/// What [`qparams_from_range`](crate::numerics::qparams_from_range) is to make of a range.
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
    /// What the scale is rounded to, half to even. Those of 8 bits, which are made of ranges in their own way, count as
    /// float32 here.
    pub scale_dtype: ScaleDtype,
    /// In which precision scale and zero point are computed.
    pub precision: Precision,
    /// The least scale, or its least magnitude. Where 0, a range whose scale would be below the smallest normal f32 gives
    /// scale 1 and zero point 0, or the code next to it that is used; but see [`Precision::Mlas`].
    pub eps: f32,
}

/// Where the zero of integer codes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Symmetry {
    /// Wherever the range has it.
    Asymmetric,
    /// At the middle code (0, or 128 of `uint8`); the range is `−amax…amax`, and where codes are not narrow, `amax` itself
    /// is half a step beyond the largest code.
    Symmetric,
    /// At the middle code, with a scale of either sign: the end of the range that is further from zero has the lowest code,
    /// of which there is one more than of those above the middle. Equal ends count as the lower one.
    Signed,
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
            scale_dtype: ScaleDtype::Float32,
            precision: Precision::Double,
            eps: 0.0,
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
            (true, Format::Int8 | Format::Int16) if self.precision != Precision::Single => (qmin / 2, -(qmin / 2)),
            (true, _) => (qmin / 2, (qmax - 1) / 2),
        };
        // An even number of codes has one more below the middle.
        let uneven = qmin.wrapping_sub(qmax) % 2 != 0;
        (qmin + i32::from(self.narrow && uneven), qmax)
    }
}

/// Which scales are allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ScaleType {
    /// Any.
    #[default]
    Float,
    /// Powers of two, rounded up, so that nothing is clipped that was in range.
    PowerOfTwo,
}
