//! How a range is chosen, and what becomes of it.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// How a range is chosen from what was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ObserverKind {
    /// The smallest and the largest value.
    #[default]
    Minmax,
    /// The mean of the samples' smallest and largest values.
    Mean,
    /// The range that holds a given share of the values.
    Percentile,
    /// The range of the least error.
    Mse,
    /// The range of the least Kullback–Leibler divergence.
    Entropy,
}

impl ObserverKind {
    /// As it is written: `minmax`, `mean`, `percentile`, `mse`, `entropy`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Minmax => "minmax",
            Self::Mean => "mean",
            Self::Percentile => "percentile",
            Self::Mse => "mse",
            Self::Entropy => "entropy",
        }
    }
}

/// How a range is chosen, with the number that belongs to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Observer {
    /// The smallest and the largest value.
    #[default]
    MinMax,
    /// The mean of the samples' smallest values, and the mean of their largest ones.
    Mean,
    /// What holds this share of the values, in percent: of magnitudes where the format is symmetric, with half of the rest
    /// beyond either end otherwise.
    Percentile(f64),
    /// The range of least error: the sum of `|x - y|^p`, where `y` is `x` after quantizing. 2 for the mean squared error;
    /// larger exponents weigh clipped values more.
    Mse(f64),
    /// The range over which the codes tell most about the values: the one of least Kullback–Leibler divergence between
    /// the values' distribution and the same distribution with each code's share spread out evenly.
    Entropy,
}

impl Observer {
    /// Percentile 99.999.
    pub const PERCENTILE: Self = Self::Percentile(Self::PERCENT);
    /// Least mean squared error.
    pub const MSE: Self = Self::Mse(Self::POWER);

    /// The share that a percentile keeps where it is not told, in percent.
    pub const PERCENT: f64 = 99.999;
    /// The exponent of an error where it is not told.
    pub const POWER: f64 = 2.0;

    /// An observer with the numbers of its keys, or their defaults.
    #[must_use]
    pub fn new(kind: ObserverKind, percentile: Option<f64>, mse_p: Option<f64>) -> Self {
        match kind {
            ObserverKind::Minmax => Self::MinMax,
            ObserverKind::Mean => Self::Mean,
            ObserverKind::Percentile => Self::Percentile(percentile.unwrap_or(Self::PERCENT)),
            ObserverKind::Mse => Self::Mse(mse_p.unwrap_or(Self::POWER)),
            ObserverKind::Entropy => Self::Entropy,
        }
    }

    /// Which it is.
    #[must_use]
    pub fn kind(self) -> ObserverKind {
        match self {
            Self::MinMax => ObserverKind::Minmax,
            Self::Mean => ObserverKind::Mean,
            Self::Percentile(_) => ObserverKind::Percentile,
            Self::Mse(_) => ObserverKind::Mse,
            Self::Entropy => ObserverKind::Entropy,
        }
    }

    /// Checks the number that an observer has, if any: a message and a way out.
    ///
    /// # Errors
    /// A percentile that is not above 50 and at most 100, an exponent that is not from 1 to 16.
    pub fn wrong(self) -> std::result::Result<(), (String, &'static str)> {
        match self {
            Self::Percentile(p) if !(p > 50.0 && p <= 100.0) => Err((
                format!("{p} is not a share of the values in percent, above 50 and up to 100"),
                "99.99 keeps all but one value in ten thousand",
            )),
            Self::Mse(p) if !(1.0..=16.0).contains(&p) => {
                Err((format!("{p} is not an exponent from 1 to 16"), "2 is the squared error"))
            }
            _ => Ok(()),
        }
    }

    /// The same, as an error.
    ///
    /// # Errors
    /// [`Kind::Config`], as [`wrong`](Self::wrong).
    pub fn check(self) -> Result<()> {
        let key = if self.kind() == ObserverKind::Mse { "mse_p" } else { "percentile" };
        self.wrong().map_err(|(message, hint)| Error::new(Kind::Config, format!("{key}: {message}")).with_hint(hint))
    }
}

/// What becomes of amax, the largest magnitude of a range, before its scale is computed: it is multiplied, then clamped, then
/// rounded. Both ends of the range move in proportion. Numbers given by hand stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Postprocess {
    /// What amax is multiplied by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// What it is at least. A range of only 0 becomes that of 0 to `min`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// What it is at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Whether it is rounded up to a power of two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub power_of_two: bool,
}

impl Postprocess {
    /// What is wrong with the numbers, and a way out.
    ///
    /// # Errors
    /// Nothing to do, a factor that is not positive, a clamp that nothing is in.
    pub fn check(&self) -> Result<(), (String, &'static str)> {
        let positive = |n: f64| n > 0.0 && n <= f64::from(f32::MAX);
        let wrong = |message: String, hint| Err((message, hint));
        match *self {
            Self { scale: None, min: None, max: None, power_of_two: false } => {
                wrong("nothing is to be done with amax".into(), "give scale, min, max or power_of_two = true")
            }
            Self { scale: Some(n), .. } if !positive(n) => {
                wrong(format!("amax cannot be multiplied by {n}"), "give a positive number")
            }
            Self { min: Some(n), .. } | Self { max: Some(n), .. } if !positive(n) => {
                wrong(format!("{n} is no bound of amax"), "give a positive number")
            }
            Self { min: Some(min), max: Some(max), .. } if min > max => {
                wrong(format!("amax cannot be at least {min} and at most {max}"), "min is the smaller number")
            }
            _ => Ok(()),
        }
    }

    /// The range that takes the place of `low..=high`.
    #[must_use]
    pub fn apply(&self, (low, high): (f32, f32)) -> (f32, f32) {
        let amax = f64::from(low.abs().max(high.abs()));
        let mut wanted = amax * self.scale.unwrap_or(1.0);
        wanted = wanted.max(self.min.unwrap_or(0.0)).min(self.max.unwrap_or(f64::INFINITY));
        if self.power_of_two && wanted > 0.0 {
            wanted = next_power_of_two(wanted);
        }
        let wanted = wanted.min(f64::from(f32::MAX));
        if amax > 0.0 {
            let factor = wanted / amax;
            ((f64::from(low) * factor) as f32, (f64::from(high) * factor) as f32)
        } else {
            (0.0, wanted as f32)
        }
    }
}

/// The least power of two that is not below a positive number.
fn next_power_of_two(x: f64) -> f64 {
    let floor = 2f64.powi(x.log2().floor() as i32);
    // The logarithm is rounded, so the power may be one off on either side.
    [floor / 2.0, floor, floor * 2.0].into_iter().find(|&power| power >= x).unwrap_or(floor * 4.0)
}
