//! GPTQ (Frantar et al., 2022): after each code, the columns that are left make up for its error as well as they can.
//!
//! Scales are fixed before, so that columns may come in any order while groups stay where they are.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, s};

use super::factor::Damped;
use super::{Coded, Problem, by_rows};

/// Columns after which the others learn of their errors; what comes out does not depend on it but for rounding.
const BLOCK: usize = 64;

/// Codes a weight at the scales of `coded`.
pub fn solve(problem: &Problem<'_>, coded: &mut Coded, damped: &Damped) {
    let mut rank = vec![0; damped.order.len()];
    damped.order.iter().enumerate().for_each(|(at, &column)| rank[column] = at);
    by_rows(problem, coded, |problem, coded| rows(problem, coded, damped, &rank));
}

fn rows(problem: &Problem<'_>, coded: &mut Coded, Damped { order, upper, .. }: &Damped, rank: &[usize]) {
    let (count, size) = problem.target.dim();
    // In the order of coding.
    let mut rest = Array2::from_shape_fn((count, size), |(row, at)| problem.target[[row, order[at]]]);
    for from in (0..size).step_by(BLOCK) {
        let to = size.min(from + BLOCK);
        let mut errors = Array2::zeros((count, to - from));
        for row in 0..count {
            for at in from..to {
                let (column, now) = (order[at], rest[[row, at]]);
                let group = column / coded.size;
                let (scale, zero) = (coded.scales[[row, group]], coded.zeros[[row, group]]);
                let partner = problem.partners[column];
                let beside = (rank[partner] < at).then(|| coded.levels[[row, partner]] + zero);
                let level = if scale == 0.0 { 0.0 } else { problem.levels.nearest(now / scale, zero, beside) };
                coded.levels[[row, column]] = level;
                let error = (now - level * scale) / upper[[at, at]];
                errors[[row, at - from]] = error;
                let later = upper.slice(s![at, at + 1..to]);
                let mut own = rest.slice_mut(s![row, at + 1..to]);
                if let (Some(own), Some(later)) = (own.as_slice_mut(), later.as_slice()) {
                    own.iter_mut().zip(later).for_each(|(own, later)| *own -= error * later);
                }
            }
        }
        let later = upper.slice(s![from..to, to..]);
        general_mat_mul(-1.0, &errors, &later, 1.0, &mut rest.slice_mut(s![.., to..]));
    }
}
