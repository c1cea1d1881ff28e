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

use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Scratch, Tensor};
use crate::numerics;
use crate::onnx::DataType;
use crate::ops::Reduction;
use crate::plan::{Bias, Plan, Weight};
use crate::quant::{Format, Granularity, QParam, QuantizedTensor, Scheme, ZeroPoints};
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
fn solve_weight(model: &Model, weight: &Weight) -> Result<StoredWeight> {
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
