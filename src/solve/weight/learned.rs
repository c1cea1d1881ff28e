//! Codes and scales for which a product's output is least wrong on samples.

use std::time::Instant;

use ndarray::{Array2, s};
use rayon::prelude::*;

use super::Solver;
use crate::algorithms::quadratic::factor::{Damped, damped};
use crate::algorithms::quadratic::scales::Freedom;
use crate::algorithms::quadratic::{Coded, Levels, Problem, clip, gptq, local, loss, scales};
use crate::error::Result;
use crate::ir::Model;
use crate::numerics::{dequantize, metrics::Metrics, pack};
use crate::ops::{self, Channel, reduction_rows};
use crate::plan::Weight;
use crate::quant::algorithm::{Algorithm, Method};
use crate::quant::{Granularity, QuantizedTensor, ScaleType, ZeroPoints};
use crate::reason::Reason;
use crate::solve::{Learned, SolvedWeight};
use crate::statistics::MatrixStatistics;

/// What samples show of the rows that a weight is multiplied with.
#[derive(Clone, Copy)]
pub struct Evidence<'a> {
    /// Of the samples that it is solved with.
    pub own: &'a MatrixStatistics,
    /// Of those that the result is judged by.
    pub held_out: &'a MatrixStatistics,
    /// Whether a bias takes up the mean of what is lost.
    pub free_bias: bool,
}

/// The least number of rows that say anything.
pub const FEW: u64 = 8;

/// A weight as rows of a matrix, one for each output.
struct Layout {
    outputs: usize,
    columns: usize,
    /// Blocks of outputs that read columns of their own.
    blocks: usize,
    /// How far apart two outputs lie, and two columns.
    strides: (usize, usize),
    /// The axes of a matrix that these are; of a convolution the first one alone.
    axes: (usize, Option<usize>),
}

impl Layout {
    fn of(model: &Model, weight: &Weight, dims: &[usize]) -> Option<Self> {
        let node = model.producer_named(&weight.at.node)?;
        let channel = ops::constant_weight(model, node, weight.at.input)?;
        match (channel, dims) {
            (Channel::Right, &[first, second]) => {
                let turned = ops::is_transposed(model, node) && !weight.transpose;
                let (outputs, columns) = if turned { (first, second) } else { (second, first) };
                let strides = if turned { (columns, 1) } else { (1, outputs) };
                let axes = if turned { (0, Some(1)) } else { (1, Some(0)) };
                Some(Self { outputs, columns, blocks: 1, strides, axes })
            }
            (Channel::Conv, &[outputs, ref kernel @ ..]) => {
                let columns = kernel.iter().product();
                let blocks = usize::try_from(model.node(node).int("group").unwrap_or(1)).ok()?;
                Some(Self { outputs, columns, blocks, strides: (columns, 1), axes: (0, None) })
            }
            _ => None,
        }
    }

    fn position(&self, output: usize, column: usize) -> usize {
        output * self.strides.0 + column * self.strides.1
    }

    fn matrix(&self, values: &[f32]) -> Array2<f64> {
        let at = |(output, column)| f64::from(values[self.position(output, column)]);
        Array2::from_shape_fn((self.outputs, self.columns), at)
    }

    /// Columns that share a scale with no other row, and whether there are such.
    fn group(&self, granularity: Granularity) -> (usize, bool) {
        match granularity {
            Granularity::PerChannel { axis } if axis == self.axes.0 => (self.columns, true),
            Granularity::PerGroup { axis, size } if Some(axis) == self.axes.1 => (size, true),
            _ => (1, false),
        }
    }
}

impl Solver<'_> {
    /// A weight as an algorithm makes it that weighs errors by samples, beginning with what rounding made of it; what
    /// rounding made if that is no worse on the samples that were held out. With `fixed`, its scales stay.
    pub(in crate::solve) fn learned(
        &self,
        model: &Model,
        plain: &QuantizedTensor,
        algorithm: &Algorithm,
        evidence: Evidence<'_>,
        fixed: bool,
    ) -> Result<(Option<SolvedWeight>, Learned)> {
        let begun = Instant::now();
        let Evidence { own, held_out, free_bias } = evidence;
        let mut learned = Learned::new(algorithm.method, own.rows(), own.columns());
        let unfit = |learned: Learned, why: Reason| Ok((None, learned.unchanged(why)));
        let Some(layout) = Layout::of(model, self.weight, &self.dims) else {
            return unfit(learned, Reason::NoRowsKnown);
        };
        let fits = |of: &MatrixStatistics| {
            of.blocks() == layout.blocks && of.columns() == layout.columns && layout.outputs.is_multiple_of(of.blocks())
        };
        if !(fits(own) && fits(held_out)) {
            return unfit(learned, Reason::NoRowsKnown);
        }
        if own.rows() < FEW || held_out.rows() == 0 {
            return unfit(learned, Reason::FewRows { rows: own.rows() });
        }
        let values = self.all()?;
        let weights = layout.matrix(&values);
        let damp = algorithm.damp.unwrap_or_else(|| (0.2 * layout.columns as f64 / own.rows() as f64).clamp(0.01, 1.0));
        let centre = own.mean();
        // `E (x − c)(x − c)ᵀ` of rows `x`, with the mean `c` of those that it is solved with.
        let hessian = |of: &MatrixStatistics, block: usize| {
            let mut gram = of.gram(block);
            if free_bias {
                let columns = s![block * layout.columns..(block + 1) * layout.columns];
                let (centre, mean) = (centre.slice(columns), of.mean());
                let mean = mean.slice(columns);
                for ((row, column), cost) in gram.indexed_iter_mut() {
                    *cost += centre[row] * centre[column] - centre[row] * mean[column] - mean[row] * centre[column];
                }
            }
            gram
        };
        let hessians: Vec<Array2<f64>> = (0..layout.blocks).map(|block| hessian(own, block)).collect();
        let factors =
            hessians.par_iter().map(|hessian| damped(hessian.clone(), damp, algorithm.act_order != Some(false)));
        let Some(factors) = factors.collect::<Option<Vec<Damped>>>() else {
            return unfit(learned, Reason::NotDefinite);
        };
        learned.damp = factors.iter().map(|damped| damped.damp).fold(0.0, f64::max);
        let solved = self.coded(plain, algorithm, &layout, &weights, &factors, fixed)?;
        // As it will be read back.
        let back = |tensor: &QuantizedTensor| {
            let numbers =
                dequantize(&tensor.codes, tensor.format, &tensor.dims, &tensor.granularity, &tensor.qparams())?;
            Ok::<_, crate::error::Error>((layout.matrix(&numbers), numbers))
        };
        let ((rounded, _), (found, numbers)) = (back(plain)?, back(&solved)?);
        let held: Vec<Array2<f64>> = (0..layout.blocks).map(|block| hessian(held_out, block)).collect();
        let db = |errors: &Array2<f64>, hessians: &[Array2<f64>]| {
            let rows = layout.outputs / layout.blocks;
            let sum = |of: &Array2<f64>| -> f64 {
                let part = |(at, hessian): (usize, &Array2<f64>)| {
                    loss(of.slice(s![at * rows..(at + 1) * rows, ..]), hessian.view())
                };
                hessians.iter().enumerate().map(part).sum()
            };
            Metrics { signal: sum(&weights), noise: sum(errors), ..Metrics::default() }.sqnr_db()
        };
        let (before, after) = (&weights - &rounded, &weights - &found);
        (learned.rounding_db, learned.db) = (db(&before, &hessians), db(&after, &hessians));
        (learned.held_out_rounding_db, learned.held_out_db) = (db(&before, &held), db(&after, &held));
        learned.seconds = begun.elapsed().as_secs_f64();
        if learned.held_out_db.is_nan() || learned.held_out_db <= learned.held_out_rounding_db {
            return unfit(learned, Reason::NoGain);
        }
        let sqnr_db = Metrics::of(&values, &numbers).sqnr_db();
        Ok((Some(SolvedWeight { tensor: solved, sqnr_db, fit: None }), learned))
    }

    /// Codes and scales.
    fn coded(
        &self,
        plain: &QuantizedTensor,
        algorithm: &Algorithm,
        layout: &Layout,
        weights: &Array2<f64>,
        factors: &[Damped],
        fixed: bool,
    ) -> Result<QuantizedTensor> {
        let (spec, scheme) = (&self.spec, self.scheme);
        let qparams = plain.qparams();
        let entries = plain.granularity.entries(&plain.dims)?;
        let entry = |output: usize, column: usize| entries[layout.position(output, column)];
        let (size, alone) = layout.group(plain.granularity);
        let free = alone
            && !fixed
            && spec.format.is_integer()
            && scheme.given.is_none()
            && scheme.scale_type == ScaleType::Float
            && !scheme.scale_dtype.is_block()
            && scheme.postprocess.is_none();
        let groups = layout.columns.div_ceil(size.max(1));
        let of = |values: &dyn Fn(usize) -> f64| {
            Array2::from_shape_fn((layout.outputs, groups), |(output, group)| values(entry(output, group * size)))
        };
        let scales = of(&|at| f64::from(qparams.scales[at]));
        let zeros = of(&|at| f64::from(qparams.zero_points[at]));
        let levels = Levels::new(spec.format, self.encoding_with(&qparams).codes);
        let partners = self.partners(layout);
        let stored = |scale: f64| {
            let least = f64::from(spec.eps.max(f32::MIN_POSITIVE));
            let fits = scale.abs() >= least && scale.abs() <= f64::from(f32::MAX);
            fits.then(|| f64::from(spec.scale(scale.abs())).copysign(scale))
        };
        let shares = clip::Shares {
            least: algorithm.min_clip_ratio.unwrap_or(clip::USUAL.least),
            step: algorithm.shrink_step.unwrap_or(clip::USUAL.step),
        };
        let freedom = Freedom { signed: scheme.signed_scale, zeros: !spec.is_symmetric() };
        let rows = layout.outputs / layout.blocks;
        let solve = |(block, damped): (usize, &Damped)| {
            let own = s![block * rows..(block + 1) * rows, ..];
            let (target, hessian) = (weights.slice(own), damped.hessian.view());
            let problem = Problem { target, hessian, levels: &levels, partners: &partners };
            let (scales, zeros) = (scales.slice(own).to_owned(), zeros.slice(own).to_owned());
            let mut coded = Coded { size, scales, zeros, levels: Array2::zeros(target.dim()) };
            if algorithm.method == Method::AwqClip {
                if free {
                    clip::search(&problem, &mut coded, shares, &stored);
                }
                local::round(&problem, &mut coded);
                return coded;
            }
            if free {
                scales::search(&problem, &mut coded, freedom, &stored);
            }
            gptq::solve(&problem, &mut coded, damped);
            if algorithm.method == Method::Best {
                let effort = local::Effort { scales: free, ..local::USUAL };
                local::improve(&problem, &mut coded, damped, effort, &stored);
            }
            coded
        };
        let solved: Vec<Coded> = factors.par_iter().enumerate().map(solve).collect();
        let (mut codes, mut qparams) = (vec![0; entries.len()], qparams);
        for (block, coded) in solved.iter().enumerate() {
            for ((row, column), &level) in coded.levels.indexed_iter() {
                let (output, group) = (block * rows + row, column / size);
                let (scale, zero) = (coded.scales[[row, group]], coded.zeros[[row, group]]);
                let at = entry(output, column);
                qparams.scales[at] = scale as f32;
                qparams.zero_points[at] = zero as i32;
                codes[layout.position(output, column)] = levels.code(level, zero);
            }
        }
        Ok(QuantizedTensor {
            scales: qparams.scales,
            zero_points: ZeroPoints::Integers(qparams.zero_points),
            codes: pack::pack(&codes, spec.format.bits()).into(),
            ..plain.clone()
        })
    }

    /// For each column the one that is multiplied with it at once, where their sum must not saturate.
    fn partners(&self, layout: &Layout) -> Vec<usize> {
        let mut partners: Vec<usize> = (0..layout.columns).collect();
        let Some(order) = self.weight.pair_safe else { return partners };
        let rows = reduction_rows(&self.dims, order);
        let mut columns = rows.positions(0).map(|at| at / layout.strides.1.max(1));
        while let (Some(first), Some(second)) = (columns.next(), columns.next()) {
            if let [Some(_), Some(_)] = [first, second].map(|column| partners.get(column)) {
                (partners[first], partners[second]) = (second, first);
            }
        }
        partners
    }
}
