//! Scales and codes of weights.

use rayon::prelude::*;

use super::{SolvedWeight, check_range, float_constant, given_qparams, microscaled, range_spec};
use crate::config::spec::{ObserverKind, ScaleDtype, ScaleType};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::numerics::{
    self, Format, Granularity, Precision, QParams, RangeSpec, Round, Symmetry, metrics::Metrics, pack, pair_safe,
};
use crate::ops::{Reduction, reduction_rows};
use crate::plan::{Given, Quantizer, Weight};

/// Percent of the values that the percentile observer keeps where it is not told.
const PERCENTILE: f64 = 99.99;

/// By how much ranges are made longer for the sake of pairs.
const WIDER: [f32; 5] = [1.0, 1.125, 1.25, 1.5, 2.0];

/// One weight, as it will be stored.
pub(super) struct Solver<'a> {
    weight: &'a Weight,
    quantizer: &'a Quantizer,
    spec: RangeSpec,
    dims: Vec<usize>,
    values: Vec<f32>,
}

impl<'a> Solver<'a> {
    pub(super) fn new(model: &Model, weight: &'a Weight) -> Result<Self> {
        let values = float_constant(model, &weight.tensor, &weight.at.node)?;
        let dims = model.value_named(&weight.tensor).and_then(|v| model.constant(v)).map(Tensor::dims);
        let dims = dims.unwrap_or_default();
        let (dims, values) = match (weight.transpose, dims.as_slice()) {
            (false, _) => (dims, values),
            (true, &[rows, columns]) => (vec![columns, rows], transposed(&values, rows, columns)),
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
        Ok(Self { weight, quantizer, spec, dims, values })
    }

    /// Scales no smaller than `floor`, and the codes at these scales.
    pub(super) fn solve(&self, floor: f32) -> Result<SolvedWeight> {
        self.solved(floor).map_err(|e| e.at_value(&self.weight.tensor))
    }

    fn solved(&self, floor: f32) -> Result<SolvedWeight> {
        let (format, granularity) = (self.spec.format, &self.quantizer.granularity);
        let mut tensor_scale = None;
        let (qparams, changed) = match self.weight.pair_safe {
            _ if self.quantizer.scale_dtype.is_block() => {
                let (qparams, whole) = self.microscaled()?;
                tensor_scale = whole;
                let changed = self.changed(&qparams, None)?;
                (qparams, changed)
            }
            Some(order) if self.has_searched_pairs(order) => self.pair_safe(order, floor),
            Some(order) if self.quantizer.given.is_none() => self.widened(order, floor)?,
            order => {
                let qparams = self.qparams(floor)?;
                let changed = self.changed(&qparams, order)?;
                (qparams, changed)
            }
        };
        let seen = changed.as_deref().unwrap_or(&self.values);
        let raw = numerics::quantize(seen, &self.dims, granularity, &qparams, format, Round::HalfEven)?;
        let back = numerics::dequantize(&raw, format, &self.dims, granularity, &qparams)?;
        let mut metrics = Metrics::default();
        metrics.feed(&self.values, &back);
        let changed = changed.map(|values| Tensor::from_f32(&self.dims, &values));
        Ok(SolvedWeight { qparams, tensor_scale, changed, sqnr_db: metrics.sqnr_db() })
    }

    /// Scales of 8 bits, and the one above them.
    fn microscaled(&self) -> Result<(QParams, Option<f32>)> {
        let granularity = &self.quantizer.granularity;
        granularity.check(&self.dims)?;
        let ranges = match &self.quantizer.given {
            Some(Given::Scales { .. }) => {
                let name = self.quantizer.scale_dtype.name();
                return Err(Error::new(Kind::Config, format!("{name} scales of groups cannot be given by hand"))
                    .with_hint("a range can be given, or another scale_dtype chosen"));
            }
            Some(Given::Range(low, high)) => {
                check_range(*low, *high)?;
                vec![(*low, *high); granularity.scale_dims(&self.dims).iter().product()]
            }
            None => self.ranges()?,
        };
        Ok(microscaled::scales(self.quantizer, &self.spec, &ranges))
    }

    fn qparams(&self, floor: f32) -> Result<QParams> {
        let granularity = &self.quantizer.granularity;
        granularity.check(&self.dims)?;
        let entries = granularity.scale_dims(&self.dims).iter().product();
        match &self.quantizer.given {
            Some(Given::Scales { scales, zero_points }) => {
                let found = given_qparams(self.quantizer, scales, zero_points, entries)?;
                match found.scales.iter().find(|s| **s < floor) {
                    None => Ok(found),
                    Some(scale) => Err(Error::new(
                        Kind::Config,
                        format!("the scale {scale} is given, at which the bias of the layer does not fit int32"),
                    )
                    .with_hint(format!("give at least {floor:e}, or keep the bias in float"))),
                }
            }
            Some(Given::Range(low, high)) => {
                check_range(*low, *high)?;
                Ok(self.scaled(vec![(*low, *high); entries], floor))
            }
            None => Ok(self.scaled(self.ranges()?, floor)),
        }
    }

    /// Scales no smaller than `floor`, and zero points, of ranges.
    fn scaled(&self, ranges: impl IntoIterator<Item = (f32, f32)>, floor: f32) -> QParams {
        let raised = RangeSpec { eps: self.spec.eps.max(floor), ..self.spec };
        let (scales, zero_points) = ranges
            .into_iter()
            .map(|(low, high)| {
                let found = numerics::qparams_from_range(low, high, &self.spec);
                if found.0 < floor { numerics::qparams_from_range(low, high, &raised) } else { found }
            })
            .unzip();
        QParams { scales, zero_points }
    }

    /// The range of each entry of the scale tensor.
    fn ranges(&self) -> Result<Vec<(f32, f32)>> {
        let mut ranges = self.observed()?;
        if let Some(postprocess) = self.quantizer.postprocess {
            for range in &mut ranges {
                *range = postprocess.apply(*range);
            }
        }
        Ok(ranges)
    }

    /// What the observer says of each.
    fn observed(&self) -> Result<Vec<(f32, f32)>> {
        let granularity = &self.quantizer.granularity;
        let fail = |message: String| Err(Error::new(Kind::Config, message));
        match self.quantizer.observer {
            ObserverKind::Minmax => numerics::channel_ranges(&self.values, &self.dims, granularity),
            ObserverKind::Mse => {
                let p = self.quantizer.mse_p.unwrap_or(2.0);
                if !(p.is_finite() && p > 0.0) {
                    return fail(format!("mse_p is {p}, which is not a positive number"));
                }
                numerics::mse_ranges(&self.values, &self.dims, granularity, &self.spec, self.quantizer.round, p)
            }
            ObserverKind::Percentile => {
                let percent = self.quantizer.percentile.unwrap_or(PERCENTILE);
                if !(percent > 0.0 && percent <= 100.0) {
                    return fail(format!("percentile is {percent}, which is not in (0, 100]"));
                }
                let symmetric = self.spec.symmetry != Symmetry::Asymmetric || !self.spec.format.is_integer();
                numerics::percentile_ranges(&self.values, &self.dims, granularity, percent, symmetric)
            }
            other @ (ObserverKind::Mean | ObserverKind::Entropy) => {
                let name = serde_json::to_string(&other).unwrap_or_default();
                let message = format!("the observer {name} has no meaning for a constant");
                Err(Error::new(Kind::Config, message).with_hint("use \"minmax\", \"percentile\" or \"mse\""))
            }
        }
    }

    /// Whether codes may differ from those of QuantizeLinear.
    fn has_own_codes(&self) -> bool {
        let format = self.spec.format;
        if !format.is_integer() {
            return false;
        }
        let (low, high) = self.spec.codes();
        // amax divided by its own scale, which was rounded once, is the largest code.
        let covered = (high - low) % 2 == 0
            && self.spec.symmetry == Symmetry::Symmetric
            && self.spec.precision == Precision::Float32
            && !self.quantizer.scale_dtype.is_block()
            && self.quantizer.observer == ObserverKind::Minmax
            && self.quantizer.postprocess.is_none()
            && self.quantizer.given.is_none();
        self.quantizer.round != Round::HalfEven || ((low, high) != format.range() && !covered)
    }

    /// Values that QuantizeLinear turns into the wanted codes, where it does not do so with the weight's own.
    fn changed(&self, qparams: &QParams, pairs: Option<Reduction>) -> Result<Option<Vec<f32>>> {
        if !self.has_own_codes() && pairs.is_none() {
            return Ok(None);
        }
        let Self { weight: _, quantizer, spec, dims, values } = self;
        let (format, granularity) = (spec.format, &quantizer.granularity);
        let mut used = spec.codes();
        if quantizer.given.is_some() {
            // Zero stays exact, also with a zero point by hand that is no code otherwise.
            used = qparams.zero_points.iter().fold(used, |(low, high), &zero| (low.min(zero), high.max(zero)));
        }
        let mut codes = numerics::quantize_within(values, dims, granularity, qparams, format, quantizer.round, used)?;
        if let Some(order) = pairs {
            self.make_safe(&mut codes, qparams, order)?;
        }
        let wanted = pack::pack(&codes, format.bits());
        drop(codes);
        let round = |values: &[f32]| numerics::quantize(values, dims, granularity, qparams, format, Round::HalfEven);
        if round(values)? == wanted {
            return Ok(None);
        }
        let mut changed = numerics::dequantize(&wanted, format, dims, granularity, qparams)?;
        for value in &mut changed {
            *value = value.clamp(f32::MIN, f32::MAX);
        }
        // `(q − z) · s` has an error of half a unit in the last place, and so has its quotient by `s`: together less than a
        // hundredth of a step. Only near the end of f32 is there another error.
        if round(&changed)? == wanted {
            return Ok(Some(changed));
        }
        Err(Error::model("its values are too large to be quantized to these codes"))
    }

    /// Safe pairs at the scale of least error between the one that the range asks for, at which pairs have to give way, and
    /// twice that, at which none does.
    fn widened(&self, order: Reduction, floor: f32) -> Result<(QParams, Option<Vec<f32>>)> {
        let (format, granularity) = (self.spec.format, &self.quantizer.granularity);
        let ranges = self.ranges()?;
        let longer = |(low, high): (f32, f32), factor: f32| (low * factor, high * factor);
        let mut best = vec![(f64::INFINITY, 1.0); ranges.len()];
        for factor in WIDER {
            let qparams = self.scaled(ranges.iter().map(|&range| longer(range, factor)), floor);
            let changed = self.changed(&qparams, Some(order))?;
            let mut seen = changed.unwrap_or_else(|| self.values.clone());
            numerics::fake_quantize_nd(&mut seen, &self.dims, granularity, &qparams, format)?;
            let mut errors = numerics::squared_errors(&self.values, &seen, &self.dims, granularity)?;
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
        let qparams = self.scaled(chosen, floor);
        let changed = self.changed(&qparams, Some(order))?;
        Ok((qparams, changed))
    }

    /// Whether each scale is that of one row of pairs.
    fn has_rows(&self, order: Reduction) -> bool {
        match (self.quantizer.granularity, order) {
            (Granularity::PerChannel { axis }, Reduction::Spatial) => axis == 0,
            (Granularity::PerChannel { axis }, Reduction::Along(depth)) => self.dims.len() == 2 && axis + depth == 1,
            _ => false,
        }
    }

    /// Moves the codes of pairs that could saturate.
    fn make_safe(&self, codes: &mut [i32], qparams: &QParams, order: Reduction) -> Result<()> {
        let granularity = &self.quantizer.granularity;
        for row in reduction_rows(&self.dims, order) {
            for &[first, second] in row.as_chunks::<2>().0 {
                if (codes[first] + codes[second]).abs() <= pair_safe::MAX_PAIR_SUM {
                    continue;
                }
                let exact = |at: usize| -> Result<f64> {
                    let entry = granularity.entry(&self.dims, at)?;
                    let quotient = f64::from(self.values[at] / qparams.scales[entry]);
                    Ok(quotient + f64::from(qparams.zero_points[entry]))
                };
                let pair = pair_safe::project([exact(first)?, exact(second)?]);
                codes[first] = pair[0].into();
                codes[second] = pair[1].into();
            }
        }
        Ok(())
    }

    /// Whether the scale may be chosen together with the codes of pairs: nothing else is asked of it.
    fn has_searched_pairs(&self, order: Reduction) -> bool {
        let Quantizer { dtype, symmetric, narrow_range, reduce_range, observer, .. } = self.quantizer;
        let Quantizer { scale_type, scale_dtype, round, eps, postprocess, given, .. } = self.quantizer;
        (self.has_rows(order) || self.quantizer.granularity == Granularity::PerTensor)
            && *dtype == Format::Int8
            && *symmetric
            && *narrow_range
            && !reduce_range
            && *observer == ObserverKind::Minmax
            && *scale_type == ScaleType::Float
            && *scale_dtype == ScaleDtype::Float32
            && *round == Round::HalfEven
            && *eps <= 0.0
            && postprocess.is_none()
            && given.is_none()
    }

    /// Int8 codes whose adjacent pairs cannot saturate; returns the values that round to exactly these codes.
    fn pair_safe(&self, order: Reduction, floor: f32) -> (QParams, Option<Vec<f32>>) {
        let rows = reduction_rows(&self.dims, order);
        if let Granularity::PerChannel { .. } = self.quantizer.granularity {
            let solved: Vec<(f32, Vec<i8>)> = rows.par_iter().map(|row| self.row(row, floor)).collect();
            let mut changed = vec![0.0f32; self.values.len()];
            for (row, (scale, codes)) in rows.iter().zip(&solved) {
                for (&at, &code) in row.iter().zip(codes) {
                    changed[at] = f32::from(code) * scale;
                }
            }
            let scales: Vec<f32> = solved.iter().map(|(s, _)| *s).collect();
            let zero_points = vec![0; scales.len()];
            return (QParams { scales, zero_points }, Some(changed));
        }
        // One scale for all rows: the largest that any row needs, then each row is made safe at that scale.
        let scale = rows.par_iter().map(|row| self.row(row, floor).0).reduce(|| floor.max(f32::MIN_POSITIVE), f32::max);
        let mut changed = vec![0.0f32; self.values.len()];
        for row in &rows {
            let codes = pair_safe::quantize_row_at(&self.gather(row), scale);
            for (&at, &code) in row.iter().zip(&codes) {
                changed[at] = f32::from(code) * scale;
            }
        }
        (QParams { scales: vec![scale], zero_points: vec![0] }, Some(changed))
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

/// The transpose of a row-major matrix.
#[must_use]
pub fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    // Squares of a few cache lines, so that neither side is walked in long strides.
    const TILE: usize = 32;
    let mut out = vec![0.0; values.len()];
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for row in top..rows.min(top + TILE) {
                for column in left..columns.min(left + TILE) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}
