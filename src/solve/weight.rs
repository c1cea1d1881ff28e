//! Scales and codes of weights.
//!
//! Integers of up to 8 bits are read, ranged, coded and packed in one pass over the stored bytes
//! ([`numerics::blocks`](crate::numerics::blocks)), and no copy of the weight is made. Other formats, and codes that depend on
//! their neighbours, are solved on all values at once.

use rayon::prelude::*;

use super::source::Source;
use super::{Fit, SolvedWeight, check_range, given_qparams, microscaled, range_spec};
use crate::algorithms::tinygemm::Kernel;
use crate::algorithms::{Group, hqq, kquant};
use crate::config::algorithm::{Algorithm, Method};
use crate::config::spec::{Arithmetic, ObserverKind, ScaleDtype, ScaleType};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::numerics::blocks::{self, Band, Bands, Between, Coded, Coding, Encoding, Values};
use crate::numerics::{
    self, Format, Granularity, QParams, RangeSpec, Round, Symmetry, metrics::Metrics, pack, pair_safe,
};
use crate::onnx::DataType;
use crate::ops::{Reduction, reduction_rows};
use crate::plan::{Given, Scheme, Weight};

/// Percent of the values that the percentile observer keeps where it is not told.
const PERCENTILE: f64 = 99.99;

/// By how much ranges are made longer for the sake of pairs.
const WIDER: [f32; 5] = [1.0, 1.125, 1.25, 1.5, 2.0];

/// One weight, as it will be stored.
pub(super) struct Solver<'a> {
    weight: &'a Weight,
    quantizer: &'a Scheme,
    spec: RangeSpec,
    dims: Vec<usize>,
    source: Source,
}

impl<'a> Solver<'a> {
    pub(super) fn new(model: &Model, weight: &'a Weight) -> Result<Self> {
        let tensor = super::constant(model, &weight.tensor)?;
        let source =
            Source::new(tensor).ok_or_else(|| super::misplanned(&weight.tensor, "a planned constant is not float"))?;
        let dims = tensor.dims();
        let (dims, source) = match (weight.transpose, dims.as_slice()) {
            (false, _) => (dims, source),
            (true, &[rows, columns]) => (vec![columns, rows], source.transposed(rows, columns)),
            (true, _) => {
                let message = format!("a tensor of shape {dims:?} is to be transposed, which only a matrix can be");
                return Err(Error::new(Kind::Config, message).at_value(&weight.tensor));
            }
        };
        let quantizer = &weight.quantizer;
        let spec = range_spec(quantizer).map_err(|e| e.at_value(&weight.tensor))?;
        let fail = |message: String| Err(Error::new(Kind::Config, message).at_value(&weight.tensor));
        if spec.format == Format::Int32 {
            return fail("int32 is the format of biases".to_owned());
        }
        if weight.pair_safe.is_some() && spec.format != Format::Int8 {
            return fail(format!(
                "pairs of {} are to be kept from saturating, which only those of int8 can do",
                spec.format
            ));
        }
        Ok(Self { weight, quantizer, spec, dims, source })
    }

    /// Scales whose magnitude is no smaller than `floor`, and the codes at these scales.
    pub(super) fn solve(&self, model: &Model, floor: f32) -> Result<SolvedWeight> {
        self.solved(floor).map_err(|e| {
            // What is not finite explains whatever went wrong.
            let at = model.producer_named(&self.weight.at.node);
            let e = match (self.source.check_finite(), at) {
                (Err(e), Some(node)) => e.at_node(model.node_name(node), model.node(node).op_type()),
                (Err(e), None) => e,
                (Ok(()), _) => e,
            };
            e.at_value(&self.weight.tensor)
        })
    }

    fn solved(&self, floor: f32) -> Result<SolvedWeight> {
        let granularity = &self.quantizer.granularity;
        granularity.check(&self.dims)?;
        let bytes = self.spec.format.is_integer() && self.spec.format.bits() <= 8;
        let scattered = self.weight.pair_safe.is_some() || self.quantizer.scale_dtype.is_block();
        if !bytes || scattered || self.source.count() == 0 {
            self.source.check_finite()?;
            return Whole { solver: self, values: self.source.all() }.solved(floor);
        }
        if let Some(bands) = Bands::new(&self.dims, granularity)? {
            if self.quantizer.float_zero_point {
                return self.between(&bands);
            }
            return Ok(self.stored(self.blocks(&self.source, &self.dims, granularity, &bands, floor)?));
        }
        // The elements of a scale are scattered: they are brought together, and their codes back.
        let Granularity::PerChannel { axis } = *granularity else {
            return Err(Error::model(format!("a tensor of shape {:?} has no groups like that", self.dims)));
        };
        let (outer, channels) = (self.dims[..axis].iter().product::<usize>(), self.dims[axis]);
        let inner: usize = self.dims[axis + 1..].iter().product();
        let dims = [channels, outer * inner];
        let near = Granularity::PerChannel { axis: 0 };
        let bands = Bands::new(&dims, &near)?.ok_or_else(|| Error::model("a row has no neighbours"))?;
        let values = swapped(&self.source.all(), outer, channels, inner);
        let mut coded = self.blocks(values.as_slice(), &dims, &near, &bands, floor)?;
        let codes = pack::unpack(&coded.codes, &self.spec.format, values.len());
        coded.codes = pack::pack(&swapped(&codes, channels, outer, inner), self.spec.format.bits());
        Ok(self.stored(coded))
    }

    /// Codes and scales of values whose bands are known.
    fn blocks<V: Values + ?Sized>(
        &self,
        values: &V,
        dims: &[usize],
        granularity: &Granularity,
        bands: &Bands,
        floor: f32,
    ) -> Result<Coded<Vec<Improved>>> {
        let plain = |coded: Coded| Coded {
            codes: coded.codes,
            qparams: coded.qparams,
            signal: coded.signal,
            noise: coded.noise,
            said: Vec::new(),
        };
        let encoding = self.encoding();
        let entries = granularity.scale_dims(dims).iter().product();
        if let Some(qparams) = self.given(entries, floor)? {
            return blocks::encode(values, bands, &self.encoding_with(&qparams), qparams).map(plain);
        }
        let params = |range: (f32, f32)| self.params(range, floor);
        if let Some(algorithm) = self.quantizer.algorithm.as_ref().filter(|a| !a.is_plain()) {
            return self.improved(values, bands, &encoding, algorithm);
        }
        if self.quantizer.observer == ObserverKind::Minmax && self.quantizer.postprocess.is_none() {
            let all = |low: &[f32], high: &[f32], scales: &mut [f32], zeros: &mut [i32]| {
                if floor <= 0.0 {
                    return blocks::params(&self.spec, low, high, scales, zeros);
                }
                for ((&low, &high), (scale, zero)) in low.iter().zip(high).zip(scales.iter_mut().zip(zeros)) {
                    (*scale, *zero) = params((low, high));
                }
            };
            return blocks::quantize_ranges(values, bands, &encoding, all).map(plain);
        }
        self.check_observer()?;
        // Groups of a band, as rows of a matrix that lies still.
        let choose = |band: Band<'_>, scales: &mut [f32], zeros: &mut [i32]| {
            let columns = band.columns;
            let dims = [band.values.len() / columns, columns];
            let ranges = self.ranges(band.values, &dims, &Granularity::PerChannel { axis: 1 })?;
            for ((scale, zero), range) in scales.iter_mut().zip(zeros).zip(ranges) {
                (*scale, *zero) = params(range);
            }
            Ok(())
        };
        let coded = blocks::quantize_by(values, bands, &encoding, choose)?;
        coded.said.into_iter().collect::<Result<Vec<()>>>()?;
        let Coded { codes, qparams, signal, noise, said: _ } = coded;
        Ok(Coded { codes, qparams, signal, noise, said: Vec::new() })
    }

    /// Codes and scales as an algorithm chooses them.
    fn improved<V: Values + ?Sized>(
        &self,
        values: &V,
        bands: &Bands,
        encoding: &Encoding,
        algorithm: &Algorithm,
    ) -> Result<Coded<Vec<Improved>>> {
        if !matches!(algorithm.method, Method::Hqq | Method::Kquant) {
            algorithm.refuse()?;
        }
        let steps = algorithm.iterations.unwrap_or(hqq::ITERATIONS);
        let column = |values: &[f32]| {
            let group = Group { values, spec: &self.spec, encoding };
            if algorithm.method == Method::Hqq { hqq::choose(&group, steps) } else { kquant::choose(&group) }
        };
        let coded = blocks::quantize_by(values, bands, encoding, |band, scales, zeros| {
            let mut values = Vec::new();
            let mut all = Improved::default();
            for (at, (scale, zero)) in scales.iter_mut().zip(zeros).enumerate() {
                let found = if band.columns == 1 { column(band.values) } else { column(band.column(at, &mut values)) };
                (*scale, *zero) = (found.scale, found.zero_point);
                all.groups += 1;
                all.fell_back += usize::from(found.fell_back);
                all.rounding_noise += found.rounding_noise;
            }
            all
        })?;
        let Coded { codes, qparams, signal, noise, said } = coded;
        Ok(Coded { codes, qparams, signal, noise, said: vec![said] })
    }

    /// Codes, scales, and zero points between codes.
    fn between(&self, bands: &Bands) -> Result<SolvedWeight> {
        let unsigned = !self.spec.format.is_signed() && !self.quantizer.symmetric && self.spec.format.bits() < 8;
        let fail = |message: &str| Error::new(Kind::Config, format!("{}: {message}", self.spec.format));
        if !unsigned || self.quantizer.given.is_some() {
            return Err(fail("zero points between codes belong to asymmetric uint2 and uint4"));
        }
        let encoding = self.encoding();
        let hqq = self.quantizer.algorithm.as_ref().filter(|a| a.method == Method::Hqq);
        let steps = hqq.and_then(|a| a.iterations).unwrap_or(hqq::ITERATIONS);
        let kernel = Kernel::of(self.quantizer.arithmetic);
        if kernel.is_some() == hqq.is_some() {
            return Err(fail("either hqq or the arithmetic of tinygemm or mslk gives zero points between codes"));
        }
        let coded = blocks::quantize_between(&self.source, bands, &encoding, |values, codes| {
            if let Some(kernel) = kernel {
                let Between { scale, zero_point, said: () } = kernel.choose(values, &self.spec, codes);
                return Between { scale, zero_point, said: None };
            }
            let group = Group { values, spec: &self.spec, encoding: &encoding };
            let Between { scale, zero_point, said } = hqq::choose_between(&group, steps, codes);
            Between { scale, zero_point, said: Some((said.fell_back, said.rounding_noise)) }
        })?;
        let Coded { codes, qparams, signal, noise, said } = coded;
        let zero_points = said.iter().map(|found| found.zero_point).collect();
        let improved =
            said.iter().filter_map(|found| found.said).fold(None, |all: Option<Improved>, (fell_back, noise)| {
                let mut all = all.unwrap_or_default();
                all.groups += 1;
                all.fell_back += usize::from(fell_back);
                all.rounding_noise += noise;
                Some(all)
            });
        let said = improved.map(|all| vec![all]).into_iter().collect();
        let solved = self.stored(Coded { codes, qparams, signal, noise, said });
        Ok(SolvedWeight { float_zero_points: Some(zero_points), ..solved })
    }

    fn stored(&self, coded: Coded<Vec<Improved>>) -> SolvedWeight {
        let sqnr_db = coded.sqnr_db();
        let fit = (!coded.said.is_empty()).then(|| {
            let all = coded.said.iter().flatten();
            let rounding: f64 = all.clone().map(|i| i.rounding_noise).sum();
            Fit {
                rounding_db: Coded::<()> {
                    codes: Vec::new(),
                    qparams: QParams::default(),
                    signal: coded.signal,
                    noise: rounding,
                    said: Vec::new(),
                }
                .sqnr_db(),
                groups: all.clone().map(|i| i.groups).sum(),
                fell_back: all.map(|i| i.fell_back).sum(),
            }
        });
        SolvedWeight {
            qparams: coded.qparams,
            tensor_scale: None,
            codes: self.tensor(coded.codes),
            float_zero_points: None,
            sqnr_db,
            fit,
        }
    }

    fn tensor(&self, codes: Vec<u8>) -> Tensor {
        Tensor::new(DataType::from(self.spec.format), &self.dims, codes)
    }

    /// How codes are made.
    fn encoding(&self) -> Encoding {
        let coding = match self.quantizer.arithmetic {
            Arithmetic::Onnx | Arithmetic::Tinygemm | Arithmetic::Mslk => Coding::Divided(self.quantizer.round),
            Arithmetic::Torch => Coding::Reciprocal,
            Arithmetic::Mlas => Coding::MlasSum,
            Arithmetic::MlasQdq => Coding::MlasQuotient,
        };
        Encoding { format: self.spec.format, codes: self.spec.codes(), coding }
    }

    /// The same, with zero points by hand that are no codes otherwise: zero stays exact.
    fn encoding_with(&self, qparams: &QParams) -> Encoding {
        let encoding = self.encoding();
        if self.quantizer.given.is_none() {
            return encoding;
        }
        let codes =
            qparams.zero_points.iter().fold(encoding.codes, |(low, high), &zero| (low.min(zero), high.max(zero)));
        Encoding { codes, ..encoding }
    }

    /// Scales and zero points by hand, or of a range by hand.
    fn given(&self, entries: usize, floor: f32) -> Result<Option<QParams>> {
        match &self.quantizer.given {
            Some(Given::Scales { scales, zero_points }) => {
                let found = given_qparams(self.quantizer, scales, zero_points, entries)?;
                match found.scales.iter().find(|s| **s < floor) {
                    None => Ok(Some(found)),
                    Some(scale) => Err(Error::new(
                        Kind::Config,
                        format!("the scale {scale} is given, at which the bias of the layer does not fit int32"),
                    )
                    .with_hint(format!("give at least {floor:e}, or keep the bias in float"))),
                }
            }
            Some(Given::Range(low, high)) => {
                check_range(*low, *high)?;
                Ok(Some(self.scaled(vec![(*low, *high); entries], floor)))
            }
            None => Ok(None),
        }
    }

    /// A scale no smaller than `floor`, and the zero point, of a range.
    fn params(&self, (low, high): (f32, f32), floor: f32) -> (f32, i32) {
        let found = numerics::qparams_from_range(low, high, &self.spec);
        if found.0.abs() >= floor {
            return found;
        }
        let raised = RangeSpec { eps: self.spec.eps.max(floor), ..self.spec };
        numerics::qparams_from_range(low, high, &raised)
    }

    /// Scales no smaller than `floor`, and zero points, of ranges.
    fn scaled(&self, ranges: impl IntoIterator<Item = (f32, f32)>, floor: f32) -> QParams {
        let (scales, zero_points) = ranges.into_iter().map(|range| self.params(range, floor)).unzip();
        QParams { scales, zero_points }
    }

    /// Refuses numbers of observers that are out of range, and observers that see no constants.
    fn check_observer(&self) -> Result<()> {
        let fail = |message: String| Err(Error::new(Kind::Config, message));
        let Scheme { observer, mse_p, percentile, .. } = self.quantizer;
        match observer {
            ObserverKind::Mse if mse_p.is_some_and(|p| !(p.is_finite() && p > 0.0)) => {
                fail(format!("mse_p is {}, which is not a positive number", mse_p.unwrap_or_default()))
            }
            ObserverKind::Percentile if percentile.is_some_and(|p| !(p > 0.0 && p <= 100.0)) => {
                fail(format!("percentile is {}, which is not in (0, 100]", percentile.unwrap_or_default()))
            }
            ObserverKind::Mean | ObserverKind::Entropy => {
                let name = serde_json::to_string(&observer).unwrap_or_default();
                let message = format!("the observer {name} has no meaning for a constant");
                Err(Error::new(Kind::Config, message).with_hint("use \"minmax\", \"percentile\" or \"mse\""))
            }
            _ => Ok(()),
        }
    }

    /// What the observer says of each entry of the scale tensor.
    fn ranges(&self, values: &[f32], dims: &[usize], granularity: &Granularity) -> Result<Vec<(f32, f32)>> {
        self.check_observer()?;
        let mut ranges = match self.quantizer.observer {
            ObserverKind::Mse => {
                let p = self.quantizer.mse_p.unwrap_or(2.0);
                numerics::mse_ranges(values, dims, granularity, &self.spec, self.quantizer.round, p)
            }
            ObserverKind::Percentile => {
                let percent = self.quantizer.percentile.unwrap_or(PERCENTILE);
                let both = matches!(self.spec.symmetry, Symmetry::Symmetric | Symmetry::NoClipping);
                let symmetric = both || !self.spec.format.is_integer();
                numerics::percentile_ranges(values, dims, granularity, percent, symmetric)
            }
            _ => numerics::channel_ranges(values, dims, granularity),
        }?;
        if let Some(postprocess) = self.quantizer.postprocess {
            for range in &mut ranges {
                *range = postprocess.apply(*range);
            }
        }
        Ok(ranges)
    }
}

/// What an algorithm did to the groups of a band.
#[derive(Clone, Copy, Debug, Default)]
struct Improved {
    groups: usize,
    fell_back: usize,
    rounding_noise: f64,
}

/// A weight with all its values at hand.
struct Whole<'s, 'a> {
    solver: &'s Solver<'a>,
    values: Vec<f32>,
}

impl Whole<'_, '_> {
    fn solved(&self, floor: f32) -> Result<SolvedWeight> {
        let Solver { weight, quantizer, spec, dims, .. } = self.solver;
        let (format, granularity) = (spec.format, &quantizer.granularity);
        let mut tensor_scale = None;
        let (qparams, raw) = match weight.pair_safe {
            Some(order) if self.has_searched_pairs(order) => {
                let (qparams, codes) = self.pair_safe(order, floor);
                (qparams, pack::pack(&codes, format.bits()))
            }
            Some(order) if quantizer.given.is_none() => {
                let (qparams, codes) = self.widened(order, floor)?;
                (qparams, pack::pack(&codes, format.bits()))
            }
            Some(order) => {
                let qparams = self.qparams(floor)?;
                let codes = self.safe_codes(&qparams, order)?;
                (qparams, pack::pack(&codes, format.bits()))
            }
            None => {
                let qparams = if quantizer.scale_dtype.is_block() {
                    let (qparams, whole) = self.microscaled()?;
                    tensor_scale = whole;
                    qparams
                } else {
                    self.qparams(floor)?
                };
                let used = self.solver.encoding_with(&qparams).codes;
                let raw = if format.is_integer() && (used != format.range() || quantizer.round != Round::HalfEven) {
                    let round = quantizer.round;
                    let codes =
                        numerics::quantize_within(&self.values, dims, granularity, &qparams, format, round, used)?;
                    pack::pack(&codes, format.bits())
                } else {
                    numerics::quantize(&self.values, dims, granularity, &qparams, format, Round::HalfEven)?
                };
                (qparams, raw)
            }
        };
        let back = numerics::dequantize(&raw, format, dims, granularity, &qparams)?;
        let mut metrics = Metrics::default();
        metrics.feed(&self.values, &back);
        let codes = self.solver.tensor(raw);
        Ok(SolvedWeight {
            qparams,
            tensor_scale,
            codes,
            float_zero_points: None,
            sqnr_db: metrics.sqnr_db(),
            fit: None,
        })
    }

    fn qparams(&self, floor: f32) -> Result<QParams> {
        let Solver { quantizer, dims, .. } = self.solver;
        let entries = quantizer.granularity.scale_dims(dims).iter().product();
        match self.solver.given(entries, floor)? {
            Some(found) => Ok(found),
            None => Ok(self.solver.scaled(self.ranges()?, floor)),
        }
    }

    /// Scales of 8 bits, and the one above them.
    fn microscaled(&self) -> Result<(QParams, Option<f32>)> {
        let Solver { quantizer, dims, spec, .. } = self.solver;
        let ranges = match &quantizer.given {
            Some(Given::Scales { .. }) => {
                let name = quantizer.scale_dtype.name();
                return Err(Error::new(Kind::Config, format!("{name} scales of groups cannot be given by hand"))
                    .with_hint("a range can be given, or another scale_dtype chosen"));
            }
            Some(Given::Range(low, high)) => {
                check_range(*low, *high)?;
                vec![(*low, *high); quantizer.granularity.scale_dims(dims).iter().product()]
            }
            None => self.ranges()?,
        };
        Ok(microscaled::scales(quantizer, spec, &ranges))
    }

    fn ranges(&self) -> Result<Vec<(f32, f32)>> {
        self.solver.ranges(&self.values, &self.solver.dims, &self.solver.quantizer.granularity)
    }

    /// Codes whose pairs cannot saturate, at given scales.
    fn safe_codes(&self, qparams: &QParams, order: Reduction) -> Result<Vec<i32>> {
        let (dims, granularity) = (&self.solver.dims, &self.solver.quantizer.granularity);
        let encoding = self.solver.encoding_with(qparams);
        let mut codes = blocks::encode_singly(&self.values, dims, granularity, &encoding, qparams)?;
        for row in reduction_rows(dims, order) {
            for &[first, second] in row.as_chunks::<2>().0 {
                if (codes[first] + codes[second]).abs() <= pair_safe::MAX_PAIR_SUM {
                    continue;
                }
                let exact = |at: usize| -> Result<f64> {
                    let entry = granularity.entry(dims, at)?;
                    let quotient = f64::from(self.values[at] / qparams.scales[entry]);
                    Ok(quotient + f64::from(qparams.zero_points[entry]))
                };
                let pair = pair_safe::project([exact(first)?, exact(second)?]);
                codes[first] = pair[0].into();
                codes[second] = pair[1].into();
            }
        }
        Ok(codes)
    }

    /// Safe pairs at the scale of least error between the one that the range asks for, at which pairs have to give way, and
    /// twice that, at which none does.
    fn widened(&self, order: Reduction, floor: f32) -> Result<(QParams, Vec<i32>)> {
        let (dims, granularity) = (&self.solver.dims, &self.solver.quantizer.granularity);
        let format = self.solver.spec.format;
        let ranges = self.ranges()?;
        let longer = |(low, high): (f32, f32), factor: f32| (low * factor, high * factor);
        let mut best = vec![(f64::INFINITY, 1.0); ranges.len()];
        for factor in WIDER {
            let qparams = self.solver.scaled(ranges.iter().map(|&range| longer(range, factor)), floor);
            let codes = self.safe_codes(&qparams, order)?;
            let seen = numerics::dequantize(&pack::pack(&codes, format.bits()), format, dims, granularity, &qparams)?;
            let mut errors = numerics::squared_errors(&self.values, &seen, dims, granularity)?;
            if !self.has_rows(order) {
                // The elements of a pair have different scales, or many pairs have one.
                let total = errors.iter().sum();
                errors.fill(total);
            }
            for (best, error) in best.iter_mut().zip(errors) {
                if error < best.0 {
                    *best = (error, factor);
                }
            }
        }
        let chosen = ranges.into_iter().zip(best).map(|(range, (_, factor))| longer(range, factor));
        let qparams = self.solver.scaled(chosen, floor);
        let codes = self.safe_codes(&qparams, order)?;
        Ok((qparams, codes))
    }

    /// Whether each scale is that of one row of pairs.
    fn has_rows(&self, order: Reduction) -> bool {
        match (self.solver.quantizer.granularity, order) {
            (Granularity::PerChannel { axis }, Reduction::Spatial) => axis == 0,
            (Granularity::PerChannel { axis }, Reduction::Along(depth)) => {
                let dims = &self.solver.dims;
                let alone = dims.len() == 3 && dims[0] == 1 && (axis, depth) == (1, 2);
                alone || (dims.len() == 2 && axis + depth == 1)
            }
            _ => false,
        }
    }

    /// Whether the scale may be chosen together with the codes of pairs: nothing else is asked of it.
    fn has_searched_pairs(&self, order: Reduction) -> bool {
        let Scheme { dtype, symmetric, narrow_range, reduce_range, observer, .. } = self.solver.quantizer;
        let Scheme { scale_type, scale_dtype, round, eps, arithmetic, postprocess, given, granularity, .. } =
            self.solver.quantizer;
        (self.has_rows(order) || *granularity == Granularity::PerTensor)
            && *dtype == Format::Int8
            && *symmetric
            && *narrow_range
            && !reduce_range
            && *observer == ObserverKind::Minmax
            && *scale_type == ScaleType::Float
            && *scale_dtype == ScaleDtype::Float32
            && *round == Round::HalfEven
            && *arithmetic == Arithmetic::Onnx
            && *eps <= 0.0
            && postprocess.is_none()
            && given.is_none()
    }

    /// Int8 codes whose adjacent pairs cannot saturate.
    fn pair_safe(&self, order: Reduction, floor: f32) -> (QParams, Vec<i32>) {
        let rows = reduction_rows(&self.solver.dims, order);
        let mut codes = vec![0; self.values.len()];
        let mut write = |row: &[usize], found: Vec<i8>| {
            row.iter().zip(found).for_each(|(&at, code)| codes[at] = code.into());
        };
        if let Granularity::PerChannel { .. } = self.solver.quantizer.granularity {
            let solved: Vec<(f32, Vec<i8>)> = rows.par_iter().map(|row| self.row(row, floor)).collect();
            let scales = solved.iter().map(|(s, _)| *s).collect();
            rows.iter().zip(solved).for_each(|(row, (_, found))| write(row, found));
            return (QParams::symmetric(scales), codes);
        }
        // One scale for all rows: the largest that any row needs, then each row is made safe at that scale.
        let scale = rows.par_iter().map(|row| self.row(row, floor).0).reduce(|| floor.max(f32::MIN_POSITIVE), f32::max);
        for row in &rows {
            write(row, pair_safe::quantize_row_at(&self.gather(row), scale));
        }
        (QParams::per_tensor(scale, 0), codes)
    }

    /// Scale and codes of one output channel, at no smaller a scale than `floor`.
    fn row(&self, row: &[usize], floor: f32) -> (f32, Vec<i8>) {
        let values = self.gather(row);
        let (scale, codes) = pair_safe::quantize_row(&values);
        if scale < floor { (floor, pair_safe::quantize_row_at(&values, floor)) } else { (scale, codes) }
    }

    fn gather(&self, row: &[usize]) -> Vec<f32> {
        row.iter().map(|&at| self.values[at]).collect()
    }
}

/// A row-major tensor with its first two axes exchanged.
fn swapped<T: Copy>(values: &[T], outer: usize, middle: usize, inner: usize) -> Vec<T> {
    let rows = (0..middle).flat_map(|m| (0..outer).map(move |o| (o * middle + m) * inner));
    rows.flat_map(|at| values[at..at + inner].iter().copied()).collect()
}
