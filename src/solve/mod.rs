//! Numbers for the plan: scales, zero points, and weights that must change to be representable.

mod activation;
mod guard;
mod microscaled;
pub mod smoothing;
mod source;
mod stored;
mod weight;

use std::collections::BTreeMap;

use rayon::prelude::*;

pub use activation::judge;
pub use guard::guard;
pub use stored::StoredWeight;
pub use weight::{Evidence, FEW};

use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Scratch, Tensor};
use crate::numerics;
use crate::onnx::DataType;
use crate::ops::Reduction;
use crate::plan::{Bias, Plan, Weight};
use crate::quant::algorithm::{Algorithm, Method};
use crate::quant::{Format, Granularity, QParam, QuantizedTensor, Scheme, ZeroPoints};
use crate::reason::Reason;
use crate::statistics::Statistics;
use source::Source;
use weight::Solver;

/// The numbers of a plan.
#[derive(Clone, Debug, Default)]
pub struct Solution {
    /// What the channels of each of [`Plan::smoothing`] are divided by.
    pub smoothing: Vec<Vec<f32>>,
    /// Scale and zero point of each static activation, by the name of its pair.
    pub activations: BTreeMap<String, QParam>,
    /// One entry for each of [`Plan::weights`].
    pub weights: Vec<StoredWeight>,
    /// What samples made of weights, by their place in [`Plan::weights`].
    pub learned: BTreeMap<usize, Learned>,
    /// Float biases that take the place of the model's, by their tensors.
    pub constants: BTreeMap<String, Tensor>,
    /// What became of each of [`Plan::corrections`] that was tried.
    pub corrected: Vec<Corrected>,
    /// The int32 values of each of [`Plan::biases`], whose scales are products of input scale and weight scale.
    pub biases: Vec<QuantizedTensor>,
}

/// The numbers of a weight.
#[derive(Clone, Debug)]
pub struct SolvedWeight {
    /// In the shape in which it is stored: transposed where the weight is to be.
    pub tensor: QuantizedTensor,
    /// Signal to quantization noise over the whole tensor, in dB.
    pub sqnr_db: f64,
    /// What an algorithm made of it, where one was asked for.
    pub fit: Option<Fit>,
}

/// How an algorithm compares with rounding to the nearest code.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Fit {
    /// Signal to quantization noise of plain rounding, in dB.
    pub rounding_db: f64,
    /// Groups of elements that share a scale.
    pub groups: usize,
    /// How many of them are rounded plainly, since the algorithm does not lower the error that it minimizes.
    pub fell_back: usize,
}

/// What an algorithm that weighs errors by samples made of a weight. Qualities are those of the product's output, in dB.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Learned {
    /// The method.
    pub method: Method,
    /// Rows that the samples have of what the weight is multiplied with.
    pub rows: u64,
    /// Columns of the weight.
    pub columns: usize,
    /// What was added to the diagonal of the Hessian, of its mean.
    pub damp: f64,
    /// On the samples that it was solved with, by plain rounding.
    pub rounding_db: f64,
    /// On these as solved.
    pub db: f64,
    /// On the samples that were held out, by plain rounding.
    pub held_out_rounding_db: f64,
    /// On these as solved.
    pub held_out_db: f64,
    /// How long it took; documents keep times apart, so that the rest of them is the same each time.
    #[serde(skip)]
    pub seconds: f64,
    /// Why it is rounded plainly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fell_back: Option<Reason>,
}

impl Learned {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(method: Method, rows: u64, columns: usize) -> Self {
        let (damp, seconds) = (0.0, 0.0);
        let [rounding_db, db, held_out_rounding_db, held_out_db] = [0.0; 4];
        let fell_back = None;
        Self { method, rows, columns, damp, rounding_db, db, held_out_rounding_db, held_out_db, seconds, fell_back }
    }

    /// The weight is rounded.
    #[must_use]
    pub fn unchanged(self, why: Reason) -> Self {
        Self { fell_back: Some(why), ..self }
    }

    fn unless(self, why: &Reason) -> Self {
        Self { fell_back: self.fell_back.or_else(|| Some(why.clone())), ..self }
    }
}

/// What a bias makes up for. Qualities are those of the product's output on samples that were held out, in dB.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Corrected {
    /// `<node>.bias`.
    pub site: String,
    /// As it was.
    pub before_db: f64,
    /// Corrected.
    pub after_db: f64,
    /// Why it stays as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fell_back: Option<Reason>,
}

impl Corrected {
    /// What was tried, and what became of it.
    #[must_use]
    pub fn new(site: String, (before_db, after_db): (f64, f64), fell_back: Option<Reason>) -> Self {
        Self { site, before_db, after_db, fell_back }
    }

    fn unless(self, why: &Reason) -> Self {
        Self { fell_back: self.fell_back.or_else(|| Some(why.clone())), ..self }
    }
}

impl Solution {
    /// Whether samples changed anything.
    #[must_use]
    pub fn is_improved(&self) -> bool {
        let (mut learned, mut corrected) = (self.learned.values(), self.corrected.iter());
        learned.any(|one| one.fell_back.is_none()) || corrected.any(|one| one.fell_back.is_none())
    }

    /// Becomes again what it was before samples improved it.
    pub fn take_back(&mut self, before: Self, why: &Reason) {
        let Self { learned, corrected, .. } = std::mem::replace(self, before);
        self.learned = learned.into_iter().map(|(at, one)| (at, one.unless(why))).collect();
        self.corrected = corrected.into_iter().map(|one| one.unless(why)).collect();
    }

    /// The model with the biases that take the place of its own.
    #[must_use]
    pub fn corrected(&self, model: &Model) -> Model {
        let mut made = model.clone();
        for (name, tensor) in &self.constants {
            if let Some(value) = made.value_named(name).filter(|&value| made.constant(value).is_some()) {
                made.set_constant(value, tensor.clone());
            }
        }
        made
    }
}

/// Solves the biases of a plan once more, for weights and biases that were changed since.
///
/// # Errors
/// As [`solve`].
pub fn solve_biases(model: &Model, plan: &Plan, solution: &mut Solution) -> Result<()> {
    let model = solution.corrected(model);
    let mut biases = Vec::with_capacity(plan.biases.len());
    for bias in &plan.biases {
        biases.push(solve_bias(&model, plan, bias, &solution.activations, &mut solution.weights)?);
    }
    solution.biases = biases;
    Ok(())
}

/// Solves a weight with what samples show of its input, beginning with what plain rounding made of it. `None` where that
/// stays. With `fixed`, its scales are not changed.
///
/// # Errors
/// A weight that the plan does not fit.
pub fn learn(
    model: &Model,
    weight: &Weight,
    plain: &StoredWeight,
    algorithm: &Algorithm,
    evidence: Evidence<'_>,
    fixed: bool,
) -> Result<(Option<StoredWeight>, Learned)> {
    let solver = Solver::new(model, weight)?;
    let (solved, learned) = solver.learned(model, &plain.tensor(), algorithm, evidence, fixed)?;
    Ok((solved.map(|solved| StoredWeight::new(model, solved)), learned))
}

/// Weights that were solved already, by their tensor: a plan is made several times, and layers share weights.
#[derive(Debug, Default)]
pub struct Solved(BTreeMap<String, Vec<(Key, StoredWeight)>>);

/// What the numbers of a weight depend on, besides its tensor.
#[derive(Clone, Debug, PartialEq)]
struct Key {
    scheme: Scheme,
    float: DataType,
    transpose: bool,
    pair_safe: Option<Reduction>,
}

impl Key {
    fn of(weight: &Weight) -> Self {
        let Weight {
            site: _,
            at: _,
            tensor: _,
            quantizer,
            float,
            transpose,
            pair_safe,
            form: _,
            accuracy_level: _,
            why: _,
            gave_way: _,
        } = weight;
        Self { scheme: quantizer.clone(), float: *float, transpose: *transpose, pair_safe: *pair_safe }
    }
}

impl Solved {
    fn get(&self, tensor: &str, key: &Key) -> Option<&StoredWeight> {
        self.0.get(tensor)?.iter().find(|(other, _)| other == key).map(|(_, weight)| weight)
    }
}

/// Solves a plan. `statistics` must cover the static activations whose numbers are not given by hand. `solved` remembers
/// weights of the same model.
///
/// # Errors
/// A weight with NaN or infinity, statistics that lack a planned tensor, numbers given by hand that do not fit or
/// contradict each other, and fields of a quantizer that have no meaning together.
pub fn solve(model: &Model, plan: &Plan, statistics: Option<&Statistics>, solved: &mut Solved) -> Result<Solution> {
    solve_while(model, plan, statistics, solved, &|| Ok(()))
}

/// As [`solve`], as long as `go_on` has no objection, which is asked before every few hundred megabytes of weights.
///
/// # Errors
/// As [`solve`], and that of `go_on`.
pub fn solve_while(
    model: &Model,
    plan: &Plan,
    statistics: Option<&Statistics>,
    solved: &mut Solved,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Solution> {
    for (name, activation) in &plan.activations {
        activation.quantizer.check().map_err(|e| e.at_value(activation::tensor(name, activation)))?;
    }
    for weight in &plan.weights {
        weight.quantizer.check().map_err(|e| e.at_value(&weight.tensor))?;
    }
    let nothing = Statistics::default();
    let activations = activation::solve(plan, statistics.unwrap_or(&nothing))?;
    let mut solution = Solution { activations, ..Solution::default() };
    let keys: Vec<Key> = plan.weights.iter().map(Key::of).collect();
    let mut missing: BTreeMap<&str, Vec<(&Key, &Weight)>> = BTreeMap::new();
    for (key, weight) in keys.iter().zip(&plan.weights) {
        if solved.get(&weight.tensor, key).is_none() {
            let alike = missing.entry(&weight.tensor).or_default();
            if alike.iter().all(|(other, _)| *other != key) {
                alike.push((key, weight));
            }
        }
    }
    let missing: Vec<_> = missing.into_values().flatten().collect();
    for window in windows(&missing, |(_, weight)| constant(model, &weight.tensor).map_or(0, Tensor::byte_len)) {
        go_on()?;
        let fresh: Vec<_> = window.par_iter().map(|&(_, weight)| solve_weight(model, weight)).collect::<Result<_>>()?;
        for (&(key, weight), found) in window.iter().zip(fresh) {
            solved.0.entry(weight.tensor.clone()).or_default().push((key.clone(), found));
        }
        model.scratch().map_or(Ok(()), Scratch::check)?;
    }
    let found = |(key, weight): (&Key, &Weight)| {
        let found = solved.get(&weight.tensor, key).cloned();
        found.ok_or_else(|| Error::new(Kind::Internal, "a planned weight was not solved").at_value(&weight.tensor))
    };
    let mut weights: Vec<StoredWeight> = keys.iter().zip(&plan.weights).map(found).collect::<Result<_>>()?;
    for bias in &plan.biases {
        let bias = solve_bias(model, plan, bias, &solution.activations, &mut weights)?;
        solution.biases.push(bias);
    }
    solution.weights = weights;
    Ok(solution)
}

/// Bytes of weights that are solved at the same time, or one weight that is larger.
const WINDOW: usize = 1 << 28;

/// Cuts a list into runs whose sizes sum up to [`WINDOW`] at most.
fn windows<T>(items: &[T], size: impl Fn(&T) -> usize) -> impl Iterator<Item = &[T]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut sum = 0usize;
        let fits = rest.iter().take_while(|item| {
            sum = sum.saturating_add(size(item));
            sum <= WINDOW
        });
        let (window, tail) = rest.split_at(fits.count().max(1).min(rest.len()));
        rest = tail;
        (!window.is_empty()).then_some(window)
    })
}

/// Solves one weight, and leaves no more of it in memory than its numbers.
///
/// # Errors
/// As [`solve`].
pub fn solve_weight(model: &Model, weight: &Weight) -> Result<StoredWeight> {
    let solved = StoredWeight::new(model, Solver::new(model, weight)?.solve(model, 0.0)?);
    constant(model, &weight.tensor)?.release();
    Ok(solved)
}

/// Solves a bias, and its weight again where the weight's scale is too small for it.
fn solve_bias(
    model: &Model,
    plan: &Plan,
    bias: &Bias,
    activations: &BTreeMap<String, QParam>,
    weights: &mut [StoredWeight],
) -> Result<QuantizedTensor> {
    let fail = |message: &str| Error::new(Kind::Config, message).at_value(&bias.tensor);
    let Some(&QParam { scale: input, .. }) = activations.get(&bias.activation) else {
        return Err(fail("an int32 bias is planned beside an input without a fixed scale"));
    };
    let (Some(weight), Some(solved)) = (plan.weights.get(bias.weight), weights.get_mut(bias.weight)) else {
        return Err(fail("an int32 bias is planned beside a weight that is not in the plan"));
    };
    let integers = plan.activations.get(&bias.activation).is_none_or(|a| a.quantizer.dtype.is_integer())
        && weight.quantizer.dtype.is_integer();
    if !integers || matches!(weight.quantizer.granularity, Granularity::PerGroup { .. }) {
        return Err(fail(
            "an int32 bias is planned beside floats or a weight in groups, which have no accumulator for it",
        ));
    }
    let mut values = float_constant(model, &bias.tensor, &bias.at.node)?;
    if values.len() == 1 {
        values.resize(bias.channels, values[0]);
    }
    let floor = weight_floor(&values, input);
    if solved.tensor().scales.iter().any(|&s| s < floor) {
        *solved = StoredWeight::new(model, Solver::new(model, weight)?.solve(model, floor)?);
    }
    let scales: Vec<f32> = solved.tensor().scales.iter().map(|s| s * input).collect();
    let codes = numerics::quantize_bias(&values, &scales).map_err(|e| e.at_value(&bias.tensor))?;
    Ok(QuantizedTensor {
        format: Format::Int32,
        dims: vec![codes.len()],
        granularity: if scales.len() == 1 { Granularity::PerTensor } else { Granularity::PerChannel { axis: 0 } },
        zero_points: ZeroPoints::Integers(vec![0; scales.len()]),
        scales,
        scale_dtype: DataType::Float,
        tensor_scale: None,
        codes: numerics::pack::pack(&codes, Format::Int32.bits()).into(),
    })
}

/// The least weight scale at which a bias still fits int32, with the margin of onnxruntime's own guard.
fn weight_floor(bias: &[f32], input_scale: f32) -> f32 {
    let largest = bias.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    numerics::weight_scale_floor(largest, input_scale)
}

/// A constant that a plan names.
fn constant<'m>(model: &'m Model, tensor: &str) -> Result<&'m Tensor> {
    let value = model
        .value_named(tensor)
        .ok_or_else(|| misplanned(tensor, "the plan names a constant that the model does not have"))?;
    model.constant(value).ok_or_else(|| misplanned(tensor, "a planned constant is not constant"))
}

fn misplanned(tensor: &str, message: &str) -> Error {
    Error::new(Kind::Config, message).at_value(tensor).with_hint("the plan was made for another model; make it again")
}

fn float_constant(model: &Model, tensor: &str, node: &str) -> Result<Vec<f32>> {
    let constant = constant(model, tensor)?;
    let source = Source::new(constant).ok_or_else(|| misplanned(tensor, "a planned constant is not float"))?;
    source.check_finite().map_err(|e| {
        let e = e.at_value(tensor);
        match model.producer_named(node) {
            Some(id) => e.at_node(model.node_name(id), model.node(id).op_type()),
            None => e,
        }
    })?;
    Ok(source.all())
}
