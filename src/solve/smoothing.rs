//! How far the ranges of an input's channels move to the weights that it is multiplied with: the exponent that leaves the
//! least error in the products, on rows of samples.
//!
//! The error is that of the products as they are planned, with rows and weights quantized. What was found is held to rows
//! that the search did not see.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::misplanned;
use super::weight::Solver;
use crate::algorithms::observers;
use crate::algorithms::smooth::{Channel, divisors, exponents};
use crate::error::{Error, Kind, Result};
use crate::ir::view::Gemm;
use crate::ir::{Model, Tensor};
use crate::numerics::{self, dequantize, fake_quantize};
use crate::plan::Weight;
use crate::plan::smoothing::Candidate;
use crate::quant::algorithm::{Algorithm, Method};
use crate::quant::{Granularity, Observer, Scheme};
use crate::reason::{Decibels, Reason};
use crate::statistics::{Range, SiteStatistics};

/// The step of the exponents.
const STEP: f64 = 0.05;
/// Fewer rows tell nothing.
const LEAST_ROWS: usize = 8;
/// Output channels of each product that errors are summed over, at even distances.
const OUTPUTS: usize = 256;
/// What a Mul in front of the products must gain, in dB; what costs nothing must gain anything.
const WORTH_A_NODE: f64 = 0.5;

/// What samples show of an input.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Rows to search on.
    pub rows: Array2<f32>,
    /// Rows to prove what was found.
    pub held_out: Array2<f32>,
    /// The range of each channel over all rows of all samples.
    pub ranges: Vec<Range>,
    /// The mean magnitude of each channel over all rows.
    pub means: Vec<f64>,
}

/// What was found for an input.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The exponent.
    pub alpha: f64,
    /// What channels are divided by.
    pub scales: Vec<f32>,
    /// The mean squared error of the products for each exponent that was tried, on the rows of the search.
    pub curve: Vec<(f64, f64)>,
    /// Signal to noise of the products on the rows that were held out, as it would be without, in dB.
    pub before_db: f64,
    /// The same with it.
    pub after_db: f64,
}

/// Searches, or takes the exponent that `algorithm` names. `free`: dividing costs no node.
///
/// # Errors
/// A plan for another model, weights that are not finite.
pub fn search(
    model: &Model,
    weights: &[Weight],
    candidate: &Candidate,
    seen: &Seen,
    algorithm: &Algorithm,
    free: bool,
) -> Result<std::result::Result<Found, Reason>> {
    let tensor = &candidate.tensor;
    let rows = seen.rows.nrows().min(seen.held_out.nrows());
    if rows < LEAST_ROWS {
        return Ok(Err(Reason::TooFewRows { tensor: tensor.clone(), rows, least: LEAST_ROWS }));
    }
    let problem = Problem::new(model, weights, candidate, seen)?;
    let plain = vec![1.0; seen.ranges.len()];
    let step = algorithm.alpha_step.unwrap_or(STEP);
    let tried = algorithm.alpha.map_or_else(|| exponents(step), |alpha| vec![alpha]);
    let tried: Vec<(f64, Vec<f32>)> =
        tried.into_iter().map(|alpha| (alpha, divisors(algorithm.method, alpha, &problem.channels))).collect();
    let errors: Vec<f64> =
        tried.par_iter().map(|(_, scales)| problem.error(scales, &problem.search)).collect::<Result<_>>()?;
    let least = errors.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).map(|(at, _)| at);
    let elements = problem.search.results.iter().map(Array2::len).sum::<usize>().max(1) as f64;
    let curve = tried.iter().zip(&errors).map(|((alpha, _), error)| (*alpha, error / elements)).collect();
    let Some((alpha, scales)) = least.and_then(|at| tried.into_iter().nth(at)) else {
        return Err(Error::new(Kind::Internal, "no exponent was tried"));
    };
    let db = |scales: &[f32]| Ok(problem.held_out.db(problem.error(scales, &problem.held_out)?));
    let (before_db, after_db) = (db(&plain)?, db(&scales)?);
    let gain = after_db - before_db;
    if gain.is_nan() || gain <= if free { 0.0 } else { WORTH_A_NODE } {
        let (before, after) = (Decibels(before_db), Decibels(after_db));
        return Ok(Err(Reason::SmoothedInVain { tensor: tensor.clone(), before, after }));
    }
    Ok(Ok(Found { alpha, scales, curve, before_db, after_db }))
}

/// The divisors of an input for an exponent that is known.
///
/// # Errors
/// A plan for another model.
pub fn scales(
    model: &Model,
    weights: &[Weight],
    candidate: &Candidate,
    seen: &Seen,
    (method, alpha): (Method, f64),
) -> Result<Vec<f32>> {
    Ok(divisors(method, alpha, &Problem::new(model, weights, candidate, seen)?.channels))
}

/// The products that read an input.
struct Problem<'a> {
    activation: Option<&'a Scheme>,
    ranges: &'a [Range],
    channels: Vec<Channel>,
    products: Vec<Product<'a>>,
    search: Part<'a>,
    held_out: Part<'a>,
}

/// Rows, and what the float products make of them.
struct Part<'a> {
    rows: &'a Array2<f32>,
    results: Vec<Array2<f32>>,
}

/// One product, or a share of its output channels.
struct Product<'a> {
    weight: &'a Weight,
    /// Whether the model has output channels first.
    transposed: bool,
    /// Input channels first.
    values: Array2<f32>,
}

impl<'a> Problem<'a> {
    fn new(model: &Model, weights: &'a [Weight], candidate: &'a Candidate, seen: &'a Seen) -> Result<Self> {
        let mut channels: Vec<Channel> = seen
            .ranges
            .iter()
            .zip(&seen.means)
            .map(|(range, &mean)| Channel { largest: f64::from(range.amax()), mean, ..Channel::default() })
            .collect();
        let mut products = Vec::new();
        let mut columns = 0;
        for weight in candidate.weights.iter().filter_map(|&index| weights.get(index)) {
            let whole = Product::new(model, weight, channels.len())?;
            let shares = whole.shares()?;
            for ((channel, row), shares) in channels.iter_mut().zip(whole.values.rows()).zip(shares.rows()) {
                channel.weight = row.iter().fold(channel.weight, |most, &w| most.max(f64::from(w.abs())));
                channel.share += shares.iter().map(|&share| f64::from(share)).sum::<f64>();
            }
            columns += whole.values.ncols();
            products.push(whole.some_outputs());
        }
        for channel in &mut channels {
            channel.share /= columns.max(1) as f64;
        }
        let part =
            |rows: &'a Array2<f32>| Part { rows, results: products.iter().map(|p| rows.dot(&p.values)).collect() };
        let (search, held_out) = (part(&seen.rows), part(&seen.held_out));
        Ok(Self {
            activation: candidate.activation.as_ref(),
            ranges: &seen.ranges,
            channels,
            products,
            search,
            held_out,
        })
    }

    /// The squared error of the quantized products where channels are divided.
    fn error(&self, scales: &[f32], part: &Part<'_>) -> Result<f64> {
        let mut rows = part.rows.clone();
        for mut row in rows.rows_mut() {
            row.iter_mut().zip(scales).for_each(|(x, s)| *x /= s);
        }
        if let Some(scheme) = self.activation {
            self.quantize(&mut rows, scales, scheme);
        }
        let mut error = 0.0;
        for (product, result) in self.products.iter().zip(&part.results) {
            let made = rows.dot(&product.quantized(scales)?);
            error += made.iter().zip(result).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        }
        Ok(error)
    }

    /// Quantizes rows with one scale, which the observer finds in them and in the ranges of all rows.
    fn quantize(&self, rows: &mut Array2<f32>, scales: &[f32], scheme: &Scheme) {
        let ends = self.ranges.iter().zip(scales).map(|(range, &s)| (range.min / s, range.max / s));
        let (low, high) = ends.clone().fold((0.0f32, 0.0f32), |(low, high), end| (low.min(end.0), high.max(end.1)));
        let seen = match scheme.observer() {
            Observer::MinMax => (low, high),
            observer => {
                let mut site = SiteStatistics::new();
                site.observe(0, rows.as_slice().unwrap_or_default());
                site.observe(1, &[low, high]);
                observers::range(&site, observer, scheme.range_spec())
            }
        };
        let (low, high) = scheme.postprocess.map_or(seen, |p| p.apply(seen));
        let found = numerics::qparams_from_range(low, high, &scheme.range_spec());
        if let Some(values) = rows.as_slice_mut() {
            fake_quantize(values, found.scale, found.zero_point, scheme.dtype);
        }
    }
}

impl Part<'_> {
    fn db(&self, error: f64) -> f64 {
        let signal: f64 = self.results.iter().flatten().map(|&y| f64::from(y).powi(2)).sum();
        10.0 * (signal / error).log10()
    }
}

impl<'a> Product<'a> {
    fn new(model: &Model, weight: &'a Weight, channels: usize) -> Result<Self> {
        let missing = || misplanned(&weight.tensor, "the plan names a product that the model does not have");
        let node = model.producer_named(&weight.at.node).ok_or_else(missing)?;
        // By its place: it may have got another name since.
        let tensor = model.constant_input(node, weight.at.input).ok_or_else(missing)?;
        let transposed = Gemm::of(model.node(node)).is_some_and(|gemm| gemm.trans_b);
        let wrong = || misplanned(&weight.tensor, "a planned weight has other channels than the input of its product");
        let values = tensor.to_f32().ok_or_else(wrong)?;
        let &[rows, columns] = tensor.dims().as_slice() else { return Err(wrong()) };
        let values = Array2::from_shape_vec((rows, columns), values).map_err(|_| wrong())?;
        let values = if transposed { values.reversed_axes() } else { values };
        if values.nrows() != channels {
            return Err(wrong());
        }
        Ok(Self { weight, transposed, values: values.as_standard_layout().into_owned() })
    }

    /// The magnitude of each element in shares of the largest that it has a scale with.
    fn shares(&self) -> Result<Array2<f32>> {
        let own = self.stored(&self.values);
        let granularity = self.weight.quantizer.granularity;
        let ranges = numerics::channel_ranges(own.as_slice().unwrap_or_default(), own.shape(), &granularity)?;
        let entries = granularity.entries(own.shape())?;
        let mut shares = own;
        for (value, entry) in shares.iter_mut().zip(entries) {
            let (low, high) = ranges[entry];
            let largest = high.max(-low);
            *value = if largest > 0.0 { value.abs() / largest } else { 0.0 };
        }
        Ok(self.restored(shares))
    }

    /// Some of the output channels, at even distances, where each has scales of its own.
    fn some_outputs(self) -> Self {
        let count = self.values.ncols();
        if count <= OUTPUTS || self.weight.quantizer.granularity == Granularity::PerTensor {
            return self;
        }
        let picks: Vec<usize> = (0..OUTPUTS).map(|at| at * count / OUTPUTS).collect();
        Self { values: self.values.select(Axis(1), &picks), ..self }
    }

    /// Whether what is quantized has output channels first.
    fn outputs_first(&self) -> bool {
        self.transposed && !self.weight.transpose
    }

    /// In the order in which it is quantized.
    fn stored(&self, values: &Array2<f32>) -> Array2<f32> {
        let view = if self.outputs_first() { values.t() } else { values.view() };
        view.as_standard_layout().into_owned()
    }

    fn restored(&self, stored: Array2<f32>) -> Array2<f32> {
        if self.outputs_first() { stored.reversed_axes().as_standard_layout().into_owned() } else { stored }
    }

    /// What the codes of the multiplied weight stand for.
    fn quantized(&self, scales: &[f32]) -> Result<Array2<f32>> {
        let mut values = self.values.clone();
        for (mut row, &scale) in values.rows_mut().into_iter().zip(scales) {
            row *= scale;
        }
        let stored = self.stored(&values);
        let dims = [stored.nrows(), stored.ncols()];
        let mut model = Model::new("", 10, 21);
        let tensor = Tensor::from_f32(&dims, stored.as_slice().unwrap_or_default());
        let value = model.add_initializer(model.main(), &self.weight.tensor, tensor);
        let tensor = model.value(value).name().to_owned();
        let weight = Weight { tensor, transpose: false, ..self.weight.clone() };
        let solved = Solver::new(&model, &weight)?.solve(&model, 0.0)?.tensor;
        let values = dequantize(&solved.codes, solved.format, &dims, &solved.granularity, &solved.qparams())?;
        let values = Array2::from_shape_vec(dims, values);
        Ok(self.restored(values.map_err(|_| misplanned(&self.weight.tensor, "a weight was solved in another shape"))?))
    }
}
