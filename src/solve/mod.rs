//! Numbers for the plan: scales, zero points, and weights that must change to be representable.

mod activation;
mod guard;
mod microscaled;
mod source;
mod stored;
mod weight;

use std::collections::BTreeMap;

use rayon::prelude::*;

pub use activation::judge;
pub use guard::guard;
pub use stored::StoredWeight;

use crate::config::spec::{self, ScaleDtype, ScaleType};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Scratch, Tensor};
use crate::numerics::{self, Arithmetic, Granularity, Precision, QParams, RangeSpec, Round, Symmetry};
use crate::plan::{Bias, Plan, Scheme, Weight};
use crate::statistics::Statistics;
use source::Source;
use weight::Solver;

/// The numbers of a plan.
#[derive(Clone, Debug, Default)]
pub struct Solution {
    /// Scale and zero point of each static activation, by the name of its pair.
    pub activations: BTreeMap<String, (f32, i32)>,
    /// One entry for each of [`Plan::weights`].
    pub weights: Vec<StoredWeight>,
    /// The int32 values of each of [`Plan::biases`].
    pub biases: Vec<SolvedBias>,
}

/// The numbers of a weight.
#[derive(Clone, Debug)]
pub struct SolvedWeight {
    /// Scales and zero points.
    pub qparams: QParams,
    /// The codes, packed, in the shape in which they are stored: transposed where the weight is to be.
    pub codes: Tensor,
    /// The scale of the whole tensor, where its groups have float8 scales beneath it; [`qparams`](Self::qparams) has the
    /// products of both.
    pub tensor_scale: Option<f32>,
    /// The zero points themselves where they lie between codes, counted in unsigned codes; those of `qparams` are the nearest codes.
    pub float_zero_points: Option<Vec<f32>>,
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

/// The numbers of a bias.
#[derive(Clone, Debug)]
pub struct SolvedBias {
    /// Product of input scale and weight scale, one a channel or one for all.
    pub scales: Vec<f32>,
    /// Codes.
    pub codes: Vec<i32>,
}

/// Weights that were solved already: a plan is made several times, and layers share weights.
#[derive(Debug, Default)]
pub struct Solved(BTreeMap<String, StoredWeight>);

/// What the numbers of a weight depend on, besides the model.
fn key(weight: &Weight) -> String {
    let Weight {
        site: _,
        at: _,
        tensor,
        quantizer,
        transpose,
        pair_safe,
        form: _,
        accuracy_level: _,
        why: _,
        gave_way: _,
    } = weight;
    format!("{tensor} {quantizer:?} {transpose} {pair_safe:?}")
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
    let nothing = Statistics::default();
    let activations = activation::solve(plan, statistics.unwrap_or(&nothing))?;
    let mut solution = Solution { activations, ..Solution::default() };
    let keys: Vec<String> = plan.weights.iter().map(key).collect();
    let missing: BTreeMap<&str, &Weight> = keys
        .iter()
        .zip(&plan.weights)
        .filter(|(k, _)| !solved.0.contains_key(*k))
        .map(|(k, w)| (k.as_str(), w))
        .collect();
    let missing: Vec<_> = missing.into_iter().collect();
    for window in windows(&missing, |(_, weight)| constant(model, &weight.tensor).map_or(0, Tensor::byte_len)) {
        go_on()?;
        let fresh: Vec<_> = window
            .par_iter()
            .map(|&(key, weight)| Ok((key.to_owned(), solve_weight(model, weight)?)))
            .collect::<Result<_>>()?;
        solved.0.extend(fresh);
        model.scratch().map_or(Ok(()), Scratch::check)?;
    }
    let mut weights: Vec<StoredWeight> = keys.iter().map(|k| solved.0[k].clone()).collect();
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
    activations: &BTreeMap<String, (f32, i32)>,
    weights: &mut [StoredWeight],
) -> Result<SolvedBias> {
    let fail = |message: &str| Error::new(Kind::Config, message).at_value(&bias.tensor);
    let Some(&(input, _)) = activations.get(&bias.activation) else {
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
    if solved.qparams().scales.iter().any(|&s| s < floor) {
        *solved = StoredWeight::new(model, Solver::new(model, weight)?.solve(model, floor)?);
    }
    let scales: Vec<f32> = solved.qparams().scales.iter().map(|s| s * input).collect();
    let spread: Vec<f32> = if scales.len() == 1 { vec![scales[0]; values.len()] } else { scales.clone() };
    let codes = numerics::quantize_bias(&values, &spread).map_err(|e| e.at_value(&bias.tensor))?;
    Ok(SolvedBias { scales, codes })
}

/// The least weight scale at which a bias still fits int32, with the margin of onnxruntime's own guard.
fn weight_floor(bias: &[f32], input_scale: f32) -> f32 {
    let largest = bias.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    numerics::weight_scale_floor(largest, input_scale)
}

/// What a quantizer makes of a range.
///
/// With a least scale the arithmetic is that of torch, whose scales always have one.
///
/// # Errors
/// Fields that have no meaning together.
pub(crate) fn range_spec(quantizer: &Scheme) -> Result<RangeSpec> {
    let Scheme { dtype, symmetric, granularity, narrow_range, reduce_range, .. } = quantizer;
    let Scheme { scale_type, scale_dtype, round, eps, .. } = quantizer;
    let Scheme { signed_scale, arithmetic, .. } = quantizer;
    let fail = |message: String| Err(Error::new(Kind::Config, message));
    let precision = match scale_dtype {
        // Scales of 8 bits are made of ranges in their own way.
        ScaleDtype::Float32 | ScaleDtype::Float8e4m3fn | ScaleDtype::Float8e8m0 => Precision::Float32,
        ScaleDtype::Float16 => Precision::Float16,
        ScaleDtype::Bfloat16 => Precision::Bfloat16,
    };
    if scale_dtype.is_block() && !matches!(granularity, Granularity::PerGroup { .. }) {
        return fail(format!("scales of {dtype} cannot be 8-bit floats: those belong to groups"));
    }
    if scale_dtype.is_block() && !(*symmetric && dtype.is_signed()) {
        return fail(format!("beside {} scales there are no zero points", scale_dtype.name()));
    }
    let least = if scale_dtype.is_block() { 0.0 } else { *eps };
    if *reduce_range && dtype.bits() == 2 {
        return fail(format!("reduce_range leaves {dtype} a single bit"));
    }
    if *round != Round::HalfEven && !dtype.is_integer() {
        return fail(format!("{dtype} has no other rounding than half to even"));
    }
    let bytes = dtype.is_integer() && dtype.bits() <= 8;
    if (*signed_scale || *arithmetic != spec::Arithmetic::Onnx) && !bytes {
        return fail(format!("{dtype} has scales and codes as ONNX has them"));
    }
    if *signed_scale && (!symmetric || *narrow_range) {
        return fail("scales of either sign belong to symmetric codes of which none is left unused".to_owned());
    }
    if !(eps.is_finite() && *eps >= 0.0) {
        return fail(format!("the least scale is {eps}, which is not a positive number"));
    }
    Ok(RangeSpec {
        format: *dtype,
        symmetry: match (*symmetric, *signed_scale) {
            (true, true) => Symmetry::Signed,
            (true, false) => Symmetry::Symmetric,
            (false, _) => Symmetry::Asymmetric,
        },
        narrow: *narrow_range,
        reduce: *reduce_range,
        power_of_two: *scale_type == ScaleType::PowerOfTwo,
        precision,
        arithmetic: match arithmetic {
            spec::Arithmetic::Onnx if least > 0.0 => Arithmetic::Single,
            spec::Arithmetic::Onnx => Arithmetic::Double,
            spec::Arithmetic::Torch | spec::Arithmetic::Tinygemm | spec::Arithmetic::Mslk => Arithmetic::Single,
            spec::Arithmetic::Mlas | spec::Arithmetic::MlasQdq => Arithmetic::Mlas,
        },
        // torch has a least scale always.
        eps: if *arithmetic == spec::Arithmetic::Torch { eps.max(f32::MIN_POSITIVE) } else { least },
        min_width: 0.0,
    })
}

/// Scales and zero points that were given by hand, for a tensor with so many.
///
/// # Errors
/// Neither one of each nor as many as there are, a scale that is not a positive normal number, or a zero point that is not
/// a code.
fn given_qparams(quantizer: &Scheme, scales: &[f32], zero_points: &[i32], entries: usize) -> Result<QParams> {
    let fail = |message: String| Err(Error::new(Kind::Config, message));
    let dtype = quantizer.dtype;
    if scales.len() != zero_points.len() || (scales.len() != 1 && scales.len() != entries) {
        let (scales, zeros) = (scales.len(), zero_points.len());
        let need = if entries == 1 { "1".to_owned() } else { format!("1 or {entries}") };
        return fail(format!("{scales} scales and {zeros} zero points are given where {need} of each are needed"));
    }
    if let Some(scale) = scales.iter().find(|s| !s.is_normal() || **s < 0.0) {
        return fail(format!("the scale {scale} is given, which is not a positive number"));
    }
    let (low, high) = if dtype.is_integer() { dtype.range() } else { (0, 0) };
    if let Some(zero) = zero_points.iter().find(|z| !(low..=high).contains(*z)) {
        return fail(format!("the zero point {zero} is given, which is not in {low}..={high} of {dtype}"));
    }
    Ok(if scales.len() == entries {
        QParams { scales: scales.to_vec(), zero_points: zero_points.to_vec() }
    } else {
        QParams { scales: vec![scales[0]; entries], zero_points: vec![zero_points[0]; entries] }
    })
}

/// Refuses a range given by hand that is none.
fn check_range(low: f32, high: f32) -> Result<()> {
    if low.is_finite() && high.is_finite() && low <= high {
        return Ok(());
    }
    Err(Error::new(Kind::Config, format!("the range {low} to {high} is given, which holds nothing")))
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
        match model.value_named(node).and_then(|v| model.producer(v)) {
            Some(id) => e.at_node(model.node_name(id), model.node(id).op_type()),
            None => e,
        }
    })?;
    Ok(source.all())
}
