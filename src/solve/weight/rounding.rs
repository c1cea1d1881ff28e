//! Scales of ranges, and the nearest codes.

use super::{Banded, Solver};
use crate::error::{Error, Kind, Result};
use crate::numerics::blocks::{self, Band, Coded};
use crate::numerics::{self, metrics::Metrics, pack};
use crate::quant::{Given, Granularity, Observer, ObserverKind, QParam, QParams, Round, Symmetry};
use crate::solve::{SolvedWeight, microscaled};

impl Solver<'_> {
    /// Codes and scales in one pass.
    pub(super) fn bands(&self, banded: &Banded<'_>, floor: f32) -> Result<Coded> {
        let Banded { values, bands, entries } = banded;
        let encoding = self.encoding();
        if let Some(qparams) = self.given(*entries, floor)? {
            return blocks::encode(*values, bands, &self.encoding_with(&qparams), qparams);
        }
        if self.scheme.observer == ObserverKind::Minmax && self.scheme.postprocess.is_none() {
            let all = |low: &[f32], high: &[f32], scales: &mut [f32], zeros: &mut [i32]| {
                if floor <= 0.0 {
                    return blocks::params(&self.spec, low, high, scales, zeros);
                }
                for ((&low, &high), (scale, zero)) in low.iter().zip(high).zip(scales.iter_mut().zip(zeros)) {
                    QParam { scale: *scale, zero_point: *zero } = self.params((low, high), floor);
                }
            };
            return blocks::quantize_ranges(*values, bands, &encoding, all);
        }
        // Groups of a band, as rows of a matrix that lies still.
        let choose = |band: Band<'_>, scales: &mut [f32], zeros: &mut [i32]| {
            let columns = band.columns;
            let dims = [band.values.len() / columns, columns];
            let ranges = self.ranges(band.values, &dims, &Granularity::PerChannel { axis: 1 })?;
            for ((scale, zero), range) in scales.iter_mut().zip(zeros).zip(ranges) {
                QParam { scale: *scale, zero_point: *zero } = self.params(range, floor);
            }
            Ok(())
        };
        let Coded { codes, qparams, signal, noise, said } = blocks::quantize_by(*values, bands, &encoding, choose)?;
        said.into_iter().collect::<Result<Vec<()>>>()?;
        Ok(Coded { codes, qparams, signal, noise, said: Vec::new() })
    }

    /// Codes and scales of all values at once.
    pub(super) fn whole(&self, values: &[f32], floor: f32) -> Result<SolvedWeight> {
        let qparams = match self.given(self.entries(), floor)? {
            Some(found) => found,
            None => self.scaled(self.all_ranges(values)?, floor),
        };
        self.rounded(values, qparams, None)
    }

    /// Codes, scales of 8 bits, and the one above them.
    pub(super) fn microscaled(&self, values: &[f32]) -> Result<SolvedWeight> {
        let ranges = match &self.scheme.given {
            Some(Given::Scales { .. }) => {
                let name = self.scheme.scale_dtype.name();
                return Err(Error::new(Kind::Config, format!("{name} scales of groups cannot be given by hand"))
                    .with_hint("a range can be given, or another scale_dtype chosen"));
            }
            Some(Given::Range(low, high)) => vec![(*low, *high); self.entries()],
            None => self.all_ranges(values)?,
        };
        let (qparams, tensor_scale) = microscaled::scales(self.scheme, &self.spec, &ranges);
        self.rounded(values, qparams, tensor_scale)
    }

    /// The nearest codes at these scales.
    fn rounded(&self, values: &[f32], qparams: QParams, tensor_scale: Option<f32>) -> Result<SolvedWeight> {
        let (format, granularity, round) = (self.spec.format, &self.scheme.granularity, self.scheme.round);
        let used = self.encoding_with(&qparams).codes;
        let raw = if format.is_integer() && (used != format.range() || round != Round::HalfEven) {
            let codes = numerics::quantize_within(values, &self.dims, granularity, &qparams, format, round, used)?;
            pack::pack(&codes, format.bits())
        } else {
            numerics::quantize(values, &self.dims, granularity, &qparams, format, Round::HalfEven)?
        };
        self.measured(values, qparams, tensor_scale, raw)
    }

    /// Packed codes, with the error that they leave.
    pub(super) fn measured(
        &self,
        values: &[f32],
        qparams: QParams,
        tensor_scale: Option<f32>,
        raw: Vec<u8>,
    ) -> Result<SolvedWeight> {
        let back = numerics::dequantize(&raw, self.spec.format, &self.dims, &self.scheme.granularity, &qparams)?;
        let mut metrics = Metrics::default();
        metrics.feed(values, &back);
        Ok(SolvedWeight { tensor: self.tensor(qparams, tensor_scale, raw), sqnr_db: metrics.sqnr_db(), fit: None })
    }

    /// What the observer says of each scale of the weight.
    pub(super) fn all_ranges(&self, values: &[f32]) -> Result<Vec<(f32, f32)>> {
        self.ranges(values, &self.dims, &self.scheme.granularity)
    }

    /// What the observer says of each entry of the scale tensor.
    fn ranges(&self, values: &[f32], dims: &[usize], granularity: &Granularity) -> Result<Vec<(f32, f32)>> {
        let mut ranges = match self.scheme.observer() {
            Observer::Mse(p) => numerics::mse_ranges(values, dims, granularity, &self.spec, self.scheme.round, p),
            Observer::Percentile(percent) => {
                let both = self.spec.symmetry == Symmetry::Symmetric || !self.spec.format.is_integer();
                numerics::percentile_ranges(values, dims, granularity, percent, both)
            }
            Observer::MinMax | Observer::Mean | Observer::Entropy => {
                numerics::channel_ranges(values, dims, granularity)
            }
        }?;
        if let Some(postprocess) = self.scheme.postprocess {
            for range in &mut ranges {
                *range = postprocess.apply(*range);
            }
        }
        Ok(ranges)
    }
}
