//! Clipping of ranges by the error of a group's share of the output, as in AWQ (Lin et al., 2023) and ModelOpt's `awq_clip`
//! (`modelopt/torch/quantization/model_calib.py`).

use ndarray::{Array2, s};

use super::{Coded, Levels, Problem, by_rows};

/// Shares of the range that are tried: all of it, and from `least` to below it in steps.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    /// The least of them.
    pub least: f64,
    /// Their distance.
    pub step: f64,
}

/// ModelOpt's.
pub const USUAL: Shares = Shares { least: 0.5, step: 0.05 };

impl Shares {
    /// Ascending; of those with one error the first counts.
    fn all(self) -> Vec<f64> {
        let below = (0..).map(|at| self.least + f64::from(at) * self.step).take_while(|share| *share < 1.0 - 1e-9);
        below.chain([1.0]).collect()
    }
}

/// Shortens the ranges of integers, so that rounding the groups of each row costs the least, each for itself. `stored` is
/// what a scale becomes when it is stored, if it can be.
pub fn search(problem: &Problem<'_>, coded: &mut Coded, shares: Shares, stored: &(dyn Fn(f64) -> Option<f64> + Sync)) {
    let Levels::Integers { .. } = problem.levels else { return };
    let shares = shares.all();
    by_rows(problem, coded, |problem, coded| {
        let (rows, columns) = problem.target.dim();
        for group in 0..coded.scales.ncols() {
            let from = group * coded.size;
            let to = columns.min(from + coded.size);
            let (costs, target) =
                (problem.hessian.slice(s![from..to, from..to]), problem.target.slice(s![.., from..to]));
            let mut best: Vec<(f64, f64)> = (0..rows).map(|row| (f64::INFINITY, coded.scales[[row, group]])).collect();
            let first: Vec<f64> = best.iter().map(|(_, scale)| *scale).collect();
            for share in &shares {
                let scales: Vec<Option<f64>> = first.iter().map(|scale| stored(scale * share)).collect();
                let errors = Array2::from_shape_fn(target.dim(), |(row, column)| {
                    let (weight, zero) = (target[[row, column]], coded.zeros[[row, group]]);
                    let Some(scale) = scales[row] else { return weight };
                    weight - problem.levels.nearest(weight / scale, zero, None) * scale
                });
                let weighed = errors.dot(&costs);
                for (row, (least, scale)) in best.iter_mut().enumerate() {
                    let Some(found) = scales[row] else { continue };
                    let error = errors.row(row).dot(&weighed.row(row));
                    if error < *least {
                        (*least, *scale) = (error, found);
                    }
                }
            }
            for (row, (_, scale)) in best.into_iter().enumerate() {
                coded.scales[[row, group]] = scale;
            }
        }
    });
}
