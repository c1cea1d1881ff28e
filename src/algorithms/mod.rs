//! Algorithms that choose ranges, scales and zero points from statistics and values, without a graph.

pub mod hqq;
pub mod knapsack;
pub mod kquant;
pub mod observers;
pub mod quadratic;
pub mod smooth;
pub mod sufficiency;
pub mod tinygemm;

use crate::error::{Error, Kind, Result};
use crate::numerics::blocks::{self, Encoding};
use crate::numerics::qparams_from_range;
use crate::quant::algorithm::{Algorithm, Method};
use crate::quant::{QParam, RangeSpec};

/// Values that share a scale, and the rules for that scale.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// Finite.
    pub values: &'a [f32],
    /// How a range becomes a scale.
    pub spec: &'a RangeSpec,
    /// How a value becomes a code.
    pub encoding: &'a Encoding,
}

/// What an algorithm chose for a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Scale and zero point.
    pub found: QParam,
    /// Whether this is what the range alone gives, since nothing that was tried is better.
    pub fell_back: bool,
    /// `Σ (x − y)²` of what the range alone gives.
    pub rounding_noise: f64,
}

/// What chooses for a group.
type Choose = fn(&Group<'_>, &Algorithm) -> Choice;

/// What chooses for each method that works group by group.
const CHOOSE: &[(Method, Choose)] = &[
    (Method::Hqq, |group, asked| hqq::choose(group, asked.iterations.unwrap_or(hqq::ITERATIONS))),
    (Method::Kquant, |group, _| kquant::choose(group)),
];

/// What an algorithm that works group by group chooses for one.
///
/// # Errors
/// Another algorithm.
pub fn choose(algorithm: &Algorithm) -> Result<impl Fn(&Group<'_>) -> Choice> {
    let row = CHOOSE.iter().find(|(method, _)| *method == algorithm.method);
    let (_, choose) = row
        .ok_or_else(|| Error::new(Kind::Config, format!("{} does not work group by group", algorithm.method.name())))?;
    Ok(|group: &Group<'_>| choose(group, algorithm))
}

impl Group<'_> {
    /// Smallest and largest value, and zero.
    fn range(&self) -> (f32, f32) {
        let (low, high) = blocks::extremes(self.values);
        (low.min(0.0), high.max(0.0))
    }

    /// What the range alone gives.
    fn rounded(&self) -> QParam {
        let (low, high) = self.range();
        qparams_from_range(low, high, self.spec)
    }

    /// How many steps each value is from zero.
    fn levels(&self, at: QParam, out: &mut [f32]) {
        blocks::levels(out, self.values, self.encoding, at.scale, at.zero_point);
    }

    /// A scale as it would be stored, with the sign of another; `None` if it cannot be.
    fn usable(&self, scale: f64, like: f32) -> Option<f32> {
        let magnitude = scale.abs();
        let least = f64::from(self.spec.eps.max(f32::MIN_POSITIVE));
        (magnitude >= least && magnitude <= f64::from(f32::MAX)).then(|| self.spec.scale(magnitude).copysign(like))
    }
}

impl Choice {
    fn new(group: &Group<'_>, rounding: QParam, found: QParam, fell_back: bool) -> Self {
        let mut levels = vec![0.0; group.values.len()];
        group.levels(rounding, &mut levels);
        let errors = group.values.iter().zip(&levels).map(|(&x, &l)| f64::from(x) - f64::from(l * rounding.scale));
        Self { found, fell_back, rounding_noise: errors.map(|error| error * error).sum() }
    }

    /// What the range alone gives.
    fn rounding(group: &Group<'_>, rounding: QParam) -> Self {
        Self::new(group, rounding, rounding, true)
    }

    fn better(group: &Group<'_>, rounding: QParam, found: QParam) -> Self {
        Self::new(group, rounding, found, false)
    }
}
