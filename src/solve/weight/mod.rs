//! Scales and codes of weights.
//!
//! [`Solver::pick`] says which algorithm finds them. Integers of up to 8 bits are read, ranged, coded and packed in one pass over
//! the stored bytes ([`numerics::blocks`](crate::numerics::blocks)), and no copy of the weight is made. Other formats, and
//! codes that depend on their neighbours, are solved on all values at once.

mod grouped;
mod learned;
mod pairs;
mod rounding;

pub use learned::{Evidence, FEW};

use super::source::Source;
use super::{Fit, SolvedWeight};
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::numerics::blocks::{Bands, Coded, Encoding, Values};
use crate::numerics::{metrics::Metrics, pack, permuted, qparams_from_range};
use crate::onnx::DataType;
use crate::ops::Reduction;
use crate::plan::Weight;
use crate::quant::algorithm::{Algorithm, Scope};
use crate::quant::{
    Arithmetic, Format, Given, Granularity, ObserverKind, QParam, QParams, QuantizedTensor, RangeSpec, Round,
    ScaleDtype, ScaleType, Scheme, ZeroPoints,
};

/// One weight, as it will be stored.
pub(super) struct Solver<'a> {
    weight: &'a Weight,
    scheme: &'a Scheme,
    spec: RangeSpec,
    dims: Vec<usize>,
    source: Source,
}

/// Which algorithm finds the numbers of a weight.
enum Picked<'a> {
    /// Scale and codes together, so that pairs do not saturate (`pairs`).
    SearchedPairs(Reduction),
    /// Scales of longer ranges, and codes whose pairs do not saturate (`pairs`).
    WidenedPairs(Reduction),
    /// Given scales, and codes whose pairs do not saturate (`pairs`).
    GivenPairs(Reduction),
    /// Scales of 8 bits, and rounding (`rounding`).
    Microscaled,
    /// Rounding of all values at once (`rounding`).
    Whole,
    /// Rounding in one pass (`rounding`).
    Bands,
    /// Scales that an algorithm chooses group by group (`grouped`).
    Grouped(&'a Algorithm),
    /// Zero points between codes (`grouped`).
    Between,
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
        let scheme = &weight.quantizer;
        let spec = scheme.range_spec();
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
        if matches!(scheme.observer, ObserverKind::Mean | ObserverKind::Entropy) {
            let message = format!("the observer \"{}\" has no meaning for a constant", scheme.observer.name());
            return Err(Error::new(Kind::Config, message)
                .at_value(&weight.tensor)
                .with_hint("use \"minmax\", \"percentile\" or \"mse\""));
        }
        Ok(Self { weight, scheme, spec, dims, source })
    }

    /// The algorithm for this weight, as long as no sample says anything of it.
    fn pick(&self) -> Picked<'a> {
        // Without `..`: whoever adds a key decides here which algorithms may overlook it.
        let Scheme {
            dtype,
            symmetric,
            granularity,
            narrow_range,
            reduce_range,
            observer,
            percentile: _,
            mse_p: _,
            scale_type,
            scale_dtype,
            mx_rounding: _,
            round,
            eps,
            postprocess,
            signed_scale,
            arithmetic,
            float_zero_point,
            algorithm,
            given,
        } = self.scheme;
        if let Some(order) = self.weight.pair_safe {
            // The scale may be chosen together with the codes where nothing else is asked of it.
            let free = (self.has_rows(order) || *granularity == Granularity::PerTensor)
                && *symmetric
                && *narrow_range
                && !reduce_range
                && *observer == ObserverKind::Minmax
                && *scale_type == ScaleType::Float
                && *scale_dtype == ScaleDtype::Float32
                && *round == Round::HalfEven
                && *eps <= 0.0
                && postprocess.is_none()
                && !signed_scale
                && *arithmetic == Arithmetic::Onnx;
            return match given {
                Some(_) => Picked::GivenPairs(order),
                None if free => Picked::SearchedPairs(order),
                None => Picked::WidenedPairs(order),
            };
        }
        match algorithm.as_deref().filter(|a| a.scope() == Scope::Groups) {
            _ if scale_dtype.is_block() => Picked::Microscaled,
            _ if !dtype.is_byte() || self.source.count() == 0 => Picked::Whole,
            _ if *float_zero_point => Picked::Between,
            Some(algorithm) if given.is_none() => Picked::Grouped(algorithm),
            _ => Picked::Bands,
        }
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
        self.scheme.granularity.check(&self.dims)?;
        match self.pick() {
            Picked::SearchedPairs(order) => self.searched_pairs(&self.all()?, order, floor),
            Picked::WidenedPairs(order) => self.widened_pairs(&self.all()?, order, floor),
            Picked::GivenPairs(order) => self.given_pairs(&self.all()?, order, floor),
            Picked::Microscaled => self.microscaled(&self.all()?),
            Picked::Whole => self.whole(&self.all()?, floor),
            Picked::Bands => self.by_bands(|bands| Ok((self.bands(bands, floor)?, None))),
            Picked::Grouped(algorithm) => self.by_bands(|bands| self.grouped(bands, algorithm)),
            Picked::Between => self.between(),
        }
    }

    /// All values, if they are finite.
    fn all(&self) -> Result<Vec<f32>> {
        self.source.check_finite()?;
        Ok(self.source.all())
    }

    /// Solves a weight whose elements of a scale are neighbours, or are made to be.
    fn by_bands(&self, solve: impl Fn(&Banded<'_>) -> Result<(Coded, Option<Improved>)>) -> Result<SolvedWeight> {
        let granularity = &self.scheme.granularity;
        if let Some(bands) = Bands::new(&self.dims, granularity)? {
            let (coded, improved) = solve(&Banded { values: &self.source, bands, entries: self.entries() })?;
            return Ok(self.stored(coded, improved));
        }
        // The elements of a scale are scattered: they are brought together, and their codes back.
        let Granularity::PerChannel { axis } = *granularity else {
            return Err(Error::model(format!("a tensor of shape {:?} has no groups like that", self.dims)));
        };
        let (outer, channels) = (self.dims[..axis].iter().product::<usize>(), self.dims[axis]);
        let inner: usize = self.dims[axis + 1..].iter().product();
        let bands = Bands::new(&[channels, outer * inner], &Granularity::PerChannel { axis: 0 })?
            .ok_or_else(|| Error::model("a row has no neighbours"))?;
        let values = permuted(&self.source.all(), &[outer, channels, inner], &[1, 0, 2]);
        let near = values.as_slice();
        let (mut coded, improved) = solve(&Banded { values: &near, bands, entries: channels })?;
        let codes = pack::unpack(&coded.codes, &self.spec.format, values.len());
        coded.codes = pack::pack(&permuted(&codes, &[channels, outer, inner], &[1, 0, 2]), self.spec.format.bits());
        Ok(self.stored(coded, improved))
    }

    /// Number of scales.
    fn entries(&self) -> usize {
        self.scheme.granularity.scale_dims(&self.dims).iter().product()
    }

    /// What one pass found.
    fn stored<T>(&self, coded: Coded<T>, improved: Option<Improved>) -> SolvedWeight {
        let db = |noise: f64| Metrics { signal: coded.signal, noise, ..Metrics::default() }.sqnr_db();
        let fit = improved.map(|Improved { groups, fell_back, rounding_noise }| Fit {
            rounding_db: db(rounding_noise),
            groups,
            fell_back,
        });
        let sqnr_db = db(coded.noise);
        SolvedWeight { tensor: self.tensor(coded.qparams, None, coded.codes), sqnr_db, fit }
    }

    fn tensor(&self, qparams: QParams, tensor_scale: Option<f32>, codes: Vec<u8>) -> QuantizedTensor {
        QuantizedTensor {
            format: self.spec.format,
            dims: self.dims.clone(),
            granularity: self.scheme.granularity,
            scales: qparams.scales,
            scale_dtype: self.scale_type(),
            tensor_scale,
            zero_points: ZeroPoints::Integers(qparams.zero_points),
            codes: codes.into(),
        }
    }

    /// The type that scales are stored in.
    fn scale_type(&self) -> DataType {
        let own = if self.weight.has_float_scales() { DataType::Float } else { self.weight.float };
        self.scheme.scale_dtype.stored().unwrap_or(own)
    }

    /// How codes are made.
    fn encoding(&self) -> Encoding {
        let coding = self.scheme.arithmetic.coding(self.scheme.round);
        Encoding { format: self.spec.format, codes: self.spec.codes(), coding }
    }

    /// The same, with zero points by hand that are no codes otherwise: zero stays exact.
    fn encoding_with(&self, qparams: &QParams) -> Encoding {
        let encoding = self.encoding();
        if self.scheme.given.is_none() {
            return encoding;
        }
        let codes =
            qparams.zero_points.iter().fold(encoding.codes, |(low, high), &zero| (low.min(zero), high.max(zero)));
        Encoding { codes, ..encoding }
    }

    /// Scales and zero points by hand, or of a range by hand.
    fn given(&self, entries: usize, floor: f32) -> Result<Option<QParams>> {
        match &self.scheme.given {
            Some(Given::Scales { scales, zero_points }) => {
                let found = QParams::given(scales, zero_points, entries)?;
                match found.scales.iter().find(|s| **s < floor) {
                    None => Ok(Some(found)),
                    Some(scale) => Err(Error::new(
                        Kind::Config,
                        format!("the scale {scale} is given, at which the bias of the layer does not fit int32"),
                    )
                    .with_hint(format!("give at least {floor:e}, or keep the bias in float"))),
                }
            }
            Some(Given::Range(low, high)) => Ok(Some(self.scaled(vec![(*low, *high); entries], floor))),
            None => Ok(None),
        }
    }

    /// A scale no smaller than `floor`, and the zero point, of a range.
    fn params(&self, range: (f32, f32), floor: f32) -> QParam {
        params(&self.spec, range, floor)
    }

    /// Scales no smaller than `floor`, and zero points, of ranges.
    fn scaled(&self, ranges: impl IntoIterator<Item = (f32, f32)>, floor: f32) -> QParams {
        scaled(&self.spec, ranges, floor)
    }
}

fn params(spec: &RangeSpec, (low, high): (f32, f32), floor: f32) -> QParam {
    let found = qparams_from_range(low, high, spec);
    if found.scale.abs() >= floor {
        return found;
    }
    qparams_from_range(low, high, &RangeSpec { eps: spec.eps.max(floor), ..*spec })
}

fn scaled(spec: &RangeSpec, ranges: impl IntoIterator<Item = (f32, f32)>, floor: f32) -> QParams {
    ranges.into_iter().map(|range| params(spec, range, floor)).collect()
}

/// Values whose elements of a scale are neighbours.
struct Banded<'v> {
    values: &'v dyn Values,
    bands: Bands,
    /// Number of scales.
    entries: usize,
}

/// What an algorithm did to groups.
#[derive(Clone, Copy, Debug, Default)]
struct Improved {
    groups: usize,
    fell_back: usize,
    /// What rounding would have left.
    rounding_noise: f64,
}

impl std::iter::Sum for Improved {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self {
            groups: a.groups + b.groups,
            fell_back: a.fell_back + b.fell_back,
            rounding_noise: a.rounding_noise + b.rounding_noise,
        })
    }
}
