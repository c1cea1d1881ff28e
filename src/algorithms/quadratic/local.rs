//! Local search: each code in turn becomes the best one beside the others, then each scale the best one at the codes.
//!
//! Neither can make the loss larger, and where no code moves any more, no single code can be improved.

use ndarray::{Array2, Axis, Zip, s};

use super::factor::Damped;
use super::{Coded, Problem, by_rows, factor};

/// How long is searched.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds of sweeps and scales.
    pub rounds: usize,
    /// Sweeps over the codes in each.
    pub sweeps: usize,
    /// Whether scales may change.
    pub scales: bool,
}

/// What is enough in practice.
pub const USUAL: Effort = Effort { rounds: 2, sweeps: 2, scales: true };

/// A scale may become so many times larger or smaller.
const MOST: f64 = 3.0;

/// Improves codes and scales. `stored` is what a scale becomes when it is stored, if it can be.
pub fn improve(
    problem: &Problem<'_>,
    coded: &mut Coded,
    damped: &Damped,
    effort: Effort,
    stored: &(dyn Fn(f64) -> Option<f64> + Sync),
) {
    by_rows(problem, coded, |problem, coded| {
        let mut rows = Rows::new(problem, coded.clone(), damped);
        for _ in 0..effort.rounds {
            rows.descend(effort.sweeps);
            rows.keep();
            if effort.scales {
                rows.refit(stored);
                rows.keep();
            }
        }
        *coded = rows.best;
    });
}

/// Rows under way.
struct Rows<'a, 'p> {
    problem: &'a Problem<'p>,
    damped: &'a Damped,
    now: Coded,
    /// `(T − V) H`.
    residual: Array2<f64>,
    best: Coded,
    losses: Vec<f64>,
}

impl<'a, 'p> Rows<'a, 'p> {
    fn new(problem: &'a Problem<'p>, coded: Coded, damped: &'a Damped) -> Self {
        let errors = &problem.target - &coded.values();
        let residual = errors.dot(&damped.hessian);
        let mut made = Self {
            problem,
            damped,
            best: coded.clone(),
            now: coded,
            residual,
            losses: vec![f64::INFINITY; errors.nrows()],
        };
        made.keep();
        made
    }

    /// Remembers rows that are better than before.
    fn keep(&mut self) {
        let errors = &self.problem.target - &self.now.values();
        for (row, least) in self.losses.iter_mut().enumerate() {
            let loss = errors.row(row).dot(&self.residual.row(row));
            if loss < *least {
                *least = loss;
                self.best.levels.row_mut(row).assign(&self.now.levels.row(row));
                self.best.scales.row_mut(row).assign(&self.now.scales.row(row));
            }
        }
    }

    /// Moves codes, the costliest columns first, until hardly any does.
    fn descend(&mut self, sweeps: usize) {
        let Self { problem, damped, now, residual, .. } = self;
        let hessian = &damped.hessian;
        let mut order: Vec<usize> = (0..hessian.nrows()).collect();
        order.sort_by(|&a, &b| hessian[[b, b]].total_cmp(&hessian[[a, a]]));
        for row in 0..now.levels.nrows() {
            let mut left = residual.row_mut(row);
            let Some(left) = left.as_slice_mut() else { continue };
            for _ in 0..sweeps {
                let mut moved = 0;
                for &column in &order {
                    let group = column / now.size;
                    let (scale, zero) = (now.scales[[row, group]], now.zeros[[row, group]]);
                    let level = now.levels[[row, column]];
                    if scale == 0.0 {
                        continue;
                    }
                    let partner = problem.partners[column];
                    let beside = (partner != column).then(|| now.levels[[row, partner]] + zero);
                    let steps = level + left[column] / (hessian[[column, column]] * scale);
                    let found = problem.levels.nearest(steps, zero, beside);
                    if found != level {
                        moved += 1;
                        now.levels[[row, column]] = found;
                        let change = (found - level) * scale;
                        let costs = hessian.row(column);
                        let costs = costs.as_slice().unwrap_or_default();
                        left.iter_mut().zip(costs).for_each(|(left, cost)| *left -= change * cost);
                    }
                }
                if moved * 1000 < order.len() {
                    break;
                }
            }
        }
    }

    /// The scales of each row that are best at its codes, all groups at once.
    fn refit(&mut self, stored: &(dyn Fn(f64) -> Option<f64> + Sync)) {
        let Self { problem, damped, now, residual, .. } = self;
        let (count, groups) = now.scales.dim();
        // For each group, what its codes at scale 1 cost beside each column.
        let costs: Vec<Array2<f64>> = now
            .levels
            .axis_chunks_iter(Axis(1), now.size)
            .zip(damped.hessian.axis_chunks_iter(Axis(0), now.size))
            .map(|(levels, hessian)| levels.dot(&hessian))
            .collect();
        for row in 0..count {
            let (levels, target) = (now.levels.row(row), problem.target.row(row));
            let chunk = |group: usize| s![group * now.size..levels.len().min((group + 1) * now.size)];
            let mut matrix = Array2::zeros((groups, groups));
            for (first, costs) in costs.iter().enumerate() {
                let costs = costs.row(row);
                for second in 0..groups {
                    matrix[[first, second]] = costs.slice(chunk(second)).dot(&levels.slice(chunk(second)));
                }
            }
            // Groups of zeros have no scale to find.
            let ridge = 1e-6 * matrix.diag().sum() / groups as f64;
            matrix.diag_mut().iter_mut().for_each(|d| *d += if *d > 0.0 { ridge } else { ridge.max(1e-30) });
            let right: Vec<f64> = costs.iter().map(|costs| costs.row(row).dot(&target)).collect();
            let Some(found) = factor::solve(matrix, &right) else { continue };
            for (group, scale) in found.into_iter().enumerate() {
                let before = now.scales[[row, group]];
                let ratio = scale / before;
                let Some(scale) = stored(scale).filter(|_| (1.0 / MOST..=MOST).contains(&ratio)) else { continue };
                now.scales[[row, group]] = scale;
                let change = scale - before;
                Zip::from(residual.row_mut(row))
                    .and(costs[group].row(row))
                    .for_each(|left, cost| *left -= change * cost);
            }
        }
    }
}

/// The nearest codes at the scales of `coded`, column after column.
pub fn round(problem: &Problem<'_>, coded: &mut Coded) {
    by_rows(problem, coded, |problem, coded| {
        for row in 0..coded.levels.nrows() {
            for (column, &partner) in problem.partners.iter().enumerate() {
                let group = column / coded.size;
                let (scale, zero) = (coded.scales[[row, group]], coded.zeros[[row, group]]);
                let beside = (partner < column).then(|| coded.levels[[row, partner]] + zero);
                let steps = problem.target[[row, column]] / scale;
                coded.levels[[row, column]] =
                    if scale == 0.0 { 0.0 } else { problem.levels.nearest(steps, zero, beside) };
            }
        }
    });
}
