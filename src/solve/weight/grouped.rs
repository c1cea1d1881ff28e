//! Scales and zero points that an algorithm chooses, group by group.

use super::{Banded, Improved, Solver};
use crate::algorithms::{self, Choice, Group, hqq, tinygemm};
use crate::error::{Error, Kind, Result};
use crate::numerics::blocks::{Bands, Between, Coded, quantize_between, quantize_by};
use crate::quant::algorithm::{Algorithm, Method};
use crate::quant::{QParam, ZeroPoints};
use crate::solve::SolvedWeight;

impl From<Choice> for Improved {
    fn from(choice: Choice) -> Self {
        let Choice { found: _, fell_back, rounding_noise } = choice;
        Self { groups: 1, fell_back: usize::from(fell_back), rounding_noise }
    }
}

impl Solver<'_> {
    /// Codes and scales as an algorithm chooses them.
    pub(super) fn grouped(&self, banded: &Banded<'_>, algorithm: &Algorithm) -> Result<(Coded, Option<Improved>)> {
        let encoding = self.encoding();
        let algorithm = algorithms::choose(algorithm)?;
        let choose = |values: &[f32]| algorithm(&Group { values, spec: &self.spec, encoding: &encoding });
        let coded = quantize_by(banded.values, &banded.bands, &encoding, |band, scales, zeros| {
            let mut values = Vec::new();
            let each = scales.iter_mut().zip(zeros).enumerate().map(|(at, (scale, zero))| {
                let choice = if band.columns == 1 { choose(band.values) } else { choose(band.column(at, &mut values)) };
                QParam { scale: *scale, zero_point: *zero } = choice.found;
                Improved::from(choice)
            });
            each.sum::<Improved>()
        })?;
        let Coded { codes, qparams, signal, noise, said } = coded;
        Ok((Coded { codes, qparams, signal, noise, said: Vec::new() }, Some(said.into_iter().sum())))
    }

    /// Codes, scales, and zero points between codes.
    pub(super) fn between(&self) -> Result<SolvedWeight> {
        let fail = |message: &str| Err(Error::new(Kind::Config, format!("{}: {message}", self.spec.format)));
        let Some(bands) = Bands::new(&self.dims, &self.scheme.granularity)? else {
            return fail("zero points between codes belong to groups of neighbours");
        };
        let encoding = self.encoding();
        let arithmetic = self.scheme.arithmetic;
        let hqq = self.scheme.algorithm.as_ref().filter(|a| a.method == Method::Hqq);
        if arithmetic.is_between() == hqq.is_some() {
            return fail("either hqq or the arithmetic of tinygemm or mslk gives zero points between codes");
        }
        let steps = hqq.and_then(|a| a.iterations).unwrap_or(hqq::ITERATIONS);
        let coded = quantize_between(&self.source, &bands, &encoding, |values, codes| {
            if arithmetic.is_between() {
                let Between { scale, zero_point, said: () } = tinygemm::choose(arithmetic, values, &self.spec, codes);
                return Between { scale, zero_point, said: None };
            }
            let group = Group { values, spec: &self.spec, encoding: &encoding };
            let Between { scale, zero_point, said } = hqq::choose_between(&group, steps, codes);
            Between { scale, zero_point, said: Some(Improved::from(said)) }
        })?;
        let zero_points = coded.said.iter().map(|found| found.zero_point).collect();
        let improved = hqq.map(|_| coded.said.iter().filter_map(|found| found.said).sum());
        let mut solved = self.stored(coded, improved);
        solved.tensor.zero_points = ZeroPoints::Floats(zero_points);
        Ok(solved)
    }
}
