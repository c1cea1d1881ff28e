//! Numbers for the plan: scales, zero points, and weights that must change to be representable.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::config::Guard;
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::numerics::{self, Format, Granularity, QParams, RangeSpec, Round, metrics::Metrics, pair_safe};
use crate::ops::{Reduction, reduction_rows};
use crate::plan::{Mode, Plan, Veto, Weight};
use crate::statistics::{SiteStatistics, Statistics};

/// The numbers of a plan.
#[derive(Clone, Debug, Default)]
pub struct Solution {
    /// Scale and zero point of each static activation, by tensor name.
    pub activations: BTreeMap<String, (f32, i32)>,
    /// One entry for each of [`Plan::weights`].
    pub weights: Vec<SolvedWeight>,
    /// The int32 values of each of [`Plan::biases`].
    pub biases: Vec<SolvedBias>,
}

/// The numbers of a weight.
#[derive(Clone, Debug)]
pub struct SolvedWeight {
    /// Scales and zero points.
    pub qparams: QParams,
    /// The values to quantize in place of the initializer's, where plain rounding would not give the wanted codes.
    pub changed: Option<Tensor>,
    /// Signal to quantization noise over the whole tensor, in dB.
    pub sqnr_db: f64,
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
pub struct Solved(BTreeMap<String, SolvedWeight>);

/// What the numbers of a weight depend on, besides the model.
fn key(weight: &Weight) -> String {
    let Weight { site: _, at: _, tensor, quantizer, transpose, pair_safe, why: _ } = weight;
    format!("{tensor} {quantizer:?} {transpose} {pair_safe:?}")
}

/// Solves a plan. Without statistics only weights are solved. `solved` remembers weights of the same model.
///
/// # Errors
/// A weight with NaN or infinity, or statistics that lack a planned tensor.
pub fn solve(model: &Model, plan: &Plan, statistics: Option<&Statistics>, solved: &mut Solved) -> Result<Solution> {
    let mut solution = Solution::default();
    if let Some(statistics) = statistics {
        solution.activations = activations(plan, statistics)?;
    }
    let keys: Vec<String> = plan.weights.iter().map(key).collect();
    let missing: BTreeMap<&str, &Weight> = keys
        .iter()
        .zip(&plan.weights)
        .filter(|(k, _)| !solved.0.contains_key(*k))
        .map(|(k, w)| (k.as_str(), w))
        .collect();
    let missing: Vec<_> = missing.into_iter().collect();
    let fresh: Vec<_> = missing
        .par_iter()
        .map(|&(key, weight)| Ok((key.to_owned(), Solver::new(model, weight)?.solve(0.0)?)))
        .collect::<Result<_>>()?;
    solved.0.extend(fresh);
    let mut weights: Vec<SolvedWeight> = keys.iter().map(|k| solved.0[k].clone()).collect();
    for bias in &plan.biases {
        let Some(&(input, _)) = solution.activations.get(&bias.activation) else {
            return Err(Error::new(Kind::Internal, "a bias is planned beside a float input").at_value(&bias.tensor));
        };
        let mut values = float_constant(model, &bias.tensor, &bias.at.node)?;
        if values.len() == 1 {
            values.resize(bias.channels, values[0]);
        }
        let floor = weight_floor(&values, input);
        let weight = &plan.weights[bias.weight];
        if weights[bias.weight].qparams.scales.iter().any(|&s| s < floor) {
            weights[bias.weight] = Solver::new(model, weight)?.solve(floor)?;
        }
        let scales: Vec<f32> = weights[bias.weight].qparams.scales.iter().map(|s| s * input).collect();
        let spread: Vec<f32> = if scales.len() == 1 { vec![scales[0]; values.len()] } else { scales.clone() };
        let codes = numerics::quantize_bias(&values, &spread)?;
        solution.biases.push(SolvedBias { scales, codes });
    }
    solution.weights = weights;
    Ok(solution)
}

/// The least weight scale at which a bias still fits int32, with the margin of onnxruntime's own guard.
fn weight_floor(bias: &[f32], input_scale: f32) -> f32 {
    let largest = bias.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    numerics::weight_scale_floor(largest, input_scale)
}

fn activations(plan: &Plan, statistics: &Statistics) -> Result<BTreeMap<String, (f32, i32)>> {
    let mut ranges: BTreeMap<&str, (f32, f32)> = BTreeMap::new();
    for (name, activation) in &plan.activations {
        if activation.mode == Mode::Dynamic {
            continue;
        }
        let site = site(statistics, name)?;
        let (low, high) = activation.range.unwrap_or_else(|| seen_range(site));
        let slot = ranges.entry(activation.scale_of.as_str()).or_insert((low, high));
        *slot = (slot.0.min(low), slot.1.max(high));
    }
    let mut found = BTreeMap::new();
    for (name, activation) in &plan.activations {
        if let Some(&(low, high)) = ranges.get(activation.scale_of.as_str()) {
            let spec = RangeSpec {
                format: activation.quantizer.dtype,
                symmetric: activation.quantizer.symmetric,
                narrow: false,
            };
            found.insert(name.clone(), numerics::qparams_from_range(low, high, &spec));
        }
    }
    Ok(found)
}

/// The finite range seen; empty, all-NaN and never reached tensors count as zero.
fn seen_range(site: &SiteStatistics) -> (f32, f32) {
    site.range().map_or((0.0, 0.0), |r| (r.min, r.max))
}

fn site<'a>(statistics: &'a Statistics, name: &str) -> Result<&'a SiteStatistics> {
    statistics.sites.get(name).ok_or_else(|| {
        Error::new(Kind::Samples, "the statistics do not cover this tensor")
            .at_value(name)
            .with_hint("calibrate again with this configuration")
    })
}

fn float_constant(model: &Model, tensor: &str, node: &str) -> Result<Vec<f32>> {
    let fail = |message: &str| Error::new(Kind::Internal, message).at_value(tensor);
    let value = model.value_named(tensor).ok_or_else(|| fail("a planned constant is not in the model"))?;
    let constant = model.constant(value).ok_or_else(|| fail("a planned constant is not constant"))?;
    let values = constant.to_f32().ok_or_else(|| fail("a planned constant is not float"))?;
    let op = model.value_named(node).and_then(|v| model.producer(v));
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        let error = Error::model(format!("element {at} of the constant is {}", values[at])).at_value(tensor).with_hint(
            "a tensor with NaN or infinity cannot be quantized; repair the checkpoint or --exclude the node",
        );
        return Err(match op {
            Some(id) => error.at_node(model.node_name(id), model.node(id).op_type()),
            None => error,
        });
    }
    Ok(values)
}

struct Solver<'a> {
    weight: &'a Weight,
    dims: Vec<usize>,
    values: Vec<f32>,
}

impl<'a> Solver<'a> {
    fn new(model: &Model, weight: &'a Weight) -> Result<Self> {
        let values = float_constant(model, &weight.tensor, &weight.at.node)?;
        let dims = model.value_named(&weight.tensor).and_then(|v| model.constant(v)).map(Tensor::dims);
        Ok(Self { weight, dims: dims.unwrap_or_default(), values })
    }

    /// Scales no smaller than `floor`.
    fn solve(&self, floor: f32) -> Result<SolvedWeight> {
        let (qparams, changed) = match self.weight.pair_safe {
            Some(order) => self.pair_safe(order, floor),
            None => (self.plain(floor)?, None),
        };
        let seen = changed.as_deref().unwrap_or(&self.values);
        let granularity = &self.weight.quantizer.granularity;
        let format = self.weight.quantizer.dtype;
        let raw = numerics::quantize(seen, &self.dims, granularity, &qparams, format, Round::HalfEven)?;
        let back = numerics::dequantize(&raw, format, &self.dims, granularity, &qparams)?;
        let mut metrics = Metrics::default();
        metrics.feed(&self.values, &back);
        let changed = changed.map(|values| Tensor::from_f32(&self.dims, &values));
        Ok(SolvedWeight { qparams, changed, sqnr_db: metrics.sqnr_db() })
    }

    fn plain(&self, floor: f32) -> Result<QParams> {
        let spec = RangeSpec {
            format: self.weight.quantizer.dtype,
            symmetric: self.weight.quantizer.symmetric,
            narrow: false,
        };
        let ranges = numerics::channel_ranges(&self.values, &self.dims, &self.weight.quantizer.granularity)?;
        let (scales, zero_points) = ranges
            .into_iter()
            .map(|(low, high)| {
                let (scale, zero_point) = numerics::qparams_from_range(low, high, &spec);
                (scale.max(floor), zero_point)
            })
            .unzip();
        Ok(QParams { scales, zero_points })
    }

    /// Int8 codes whose adjacent pairs cannot saturate; returns the values that round to exactly these codes.
    fn pair_safe(&self, order: Reduction, floor: f32) -> (QParams, Option<Vec<f32>>) {
        debug_assert_eq!(self.weight.quantizer.dtype, Format::Int8);
        let rows = reduction_rows(&self.dims, order);
        if let Granularity::PerChannel { .. } = self.weight.quantizer.granularity {
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

/// The sites that their ranges serve too badly, with the reason.
#[must_use]
pub fn guard(plan: &Plan, solution: &Solution, statistics: &Statistics, guard: &Guard) -> BTreeMap<String, Veto> {
    let mut vetoes = BTreeMap::new();
    if !guard.enabled {
        return vetoes;
    }
    for (name, activation) in &plan.activations {
        let Some(&(scale, zero_point)) = solution.activations.get(name) else { continue };
        let Some(site) = statistics.sites.get(name) else { continue };
        let (low, high) = activation.quantizer.dtype.range();
        let quality = site.sqnr_db(scale, zero_point, low, high);
        if quality < guard.static_db {
            let why = format!(
                "\"{name}\" keeps only {quality:.1} dB in {} over [{:.4}, {:.4}], below {} dB",
                activation.quantizer.dtype.name(),
                seen_range(site).0,
                seen_range(site).1,
                guard.static_db
            );
            vetoes.insert(name.clone(), Veto { why, dynamic: site.dynamic_sqnr_db() >= guard.dynamic_db });
        }
    }
    for (weight, solved) in plan.weights.iter().zip(&solution.weights) {
        if solved.sqnr_db < guard.weight_db {
            let why = format!(
                "\"{}\" keeps only {:.1} dB in {}, below {} dB",
                weight.tensor,
                solved.sqnr_db,
                weight.quantizer.dtype.name(),
                guard.weight_db
            );
            vetoes.insert(weight.site.clone(), Veto { why, dynamic: false });
        }
    }
    vetoes
}
