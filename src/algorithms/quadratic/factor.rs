//! Factors of positive definite matrices, block by block, so that nearly all of the work is products of matrices.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis, s};

/// Columns of a block.
const BLOCK: usize = 64;

/// How many times a Hessian that is not positive definite gets ten times more on its diagonal.
const RETRIES: u32 = 5;

/// A Hessian as the solvers take it.
#[derive(Clone, Debug)]
pub struct Damped {
    /// With something added to its diagonal.
    pub hessian: Array2<f64>,
    /// How much was added, of the mean of the diagonal.
    pub damp: f64,
    /// Columns in the order in which they are coded.
    pub order: Vec<usize>,
    /// `U` with `UᵀU = H⁻¹` in that order, upper triangular.
    pub upper: Array2<f64>,
}

impl Damped {
    /// The weights whose product with the rows that are comes closest to that of `weights` with the float model's.
    /// `cross` is `X̂ᵀX / n` with these on the left, `hessian` is `XᵀX / n`, both without anything added.
    #[must_use]
    pub fn target(
        &self,
        weights: ArrayView2<'_, f64>,
        hessian: ArrayView2<'_, f64>,
        cross: ArrayView2<'_, f64>,
    ) -> Array2<f64> {
        let moved = weights.dot(&(&cross - &hessian)).select(Axis(1), &self.order);
        let moved = moved.dot(&self.upper.t()).dot(&self.upper);
        let mut target = weights.to_owned();
        for (at, &column) in self.order.iter().enumerate() {
            target.column_mut(column).zip_mut_with(&moved.column(at), |weight, by| *weight += by);
        }
        target
    }
}

/// Makes a Hessian positive definite and factors its inverse. `None` if that takes more than 10⁵ times `damp`.
///
/// A column that no row has anything in costs as much as an average one: it is rounded. With `by_size`, the columns of the
/// largest diagonal come first, ties in their order.
#[must_use]
pub fn damped(mut hessian: Array2<f64>, damp: f64, by_size: bool) -> Option<Damped> {
    let size = hessian.nrows();
    let diagonal = hessian.diag().to_owned();
    let alive = diagonal.iter().filter(|d| **d > 0.0).count();
    let mean = diagonal.iter().filter(|d| **d > 0.0).sum::<f64>() / alive.max(1) as f64;
    if alive == 0 || !mean.is_finite() {
        return None;
    }
    for column in 0..size {
        if diagonal[column] <= 0.0 {
            hessian[[column, column]] = mean;
        }
    }
    let mut order: Vec<usize> = (0..size).collect();
    if by_size {
        order.sort_by(|&a, &b| hessian[[b, b]].total_cmp(&hessian[[a, a]]));
    }
    let mean = hessian.diag().sum() / size as f64;
    (0..=RETRIES).find_map(|retry| {
        let damp = damp * 10f64.powi(retry as i32);
        let mut with = hessian.clone();
        with.diag_mut().iter_mut().for_each(|d| *d += damp * mean);
        let upper = inverse_factor(with.view(), &order)?;
        Some(Damped { hessian: with, damp, order: order.clone(), upper })
    })
}

/// `U` with `UᵀU = A⁻¹`, the rows and columns of `A` taken in this order.
fn inverse_factor(matrix: ArrayView2<'_, f64>, order: &[usize]) -> Option<Array2<f64>> {
    // With the order reversed, `A = LLᵀ`, and `U` is `L⁻¹` reversed.
    let size = order.len();
    let at = |i: usize| order[size - 1 - i];
    let mut lower = Array2::from_shape_fn((size, size), |(i, j)| matrix[[at(i), at(j)]]);
    cholesky(&mut lower)?;
    let inverse = inverse(&lower);
    Some(inverse.slice_move(s![..;-1, ..;-1]).as_standard_layout().into_owned())
}

/// Replaces the lower triangle of a positive definite matrix by `L` with `LLᵀ` equal to it.
pub fn cholesky(matrix: &mut Array2<f64>) -> Option<()> {
    let size = matrix.nrows();
    for from in (0..size).step_by(BLOCK) {
        let to = size.min(from + BLOCK);
        for column in from..to {
            for row in column..size {
                let (done, own) = (s![row, from..column], s![column, from..column]);
                let known = matrix.slice(done).iter().zip(matrix.slice(own)).map(|(a, b)| a * b).sum::<f64>();
                let rest = matrix[[row, column]] - known;
                if row == column {
                    if rest.is_nan() || rest <= 0.0 {
                        return None;
                    }
                    matrix[[row, column]] = rest.sqrt();
                } else {
                    matrix[[row, column]] = rest / matrix[[column, column]];
                }
            }
        }
        let panel = matrix.slice(s![to.., from..to]).to_owned();
        for start in (to..size).step_by(BLOCK) {
            let end = size.min(start + BLOCK);
            let (left, right) = (panel.slice(s![start - to.., ..]), panel.slice(s![start - to..end - to, ..]));
            general_mat_mul(-1.0, &left, &right.t(), 1.0, &mut matrix.slice_mut(s![start.., start..end]));
        }
    }
    Some(())
}

/// The inverse of a lower triangular matrix; what is above its diagonal is not read.
fn inverse(lower: &Array2<f64>) -> Array2<f64> {
    let size = lower.nrows();
    let mut made = Array2::zeros((size, size));
    for from in (0..size).step_by(BLOCK) {
        let to = size.min(from + BLOCK);
        for column in from..to {
            made[[column, column]] = 1.0 / lower[[column, column]];
            for row in column + 1..to {
                let known: f64 = (column..row).map(|k| lower[[row, k]] * made[[k, column]]).sum();
                made[[row, column]] = -known / lower[[row, row]];
            }
        }
        let known = lower.slice(s![from..to, ..from]).dot(&made.slice(s![..from, ..from]));
        let own = made.slice(s![from..to, from..to]).dot(&known);
        made.slice_mut(s![from..to, ..from]).assign(&-own);
    }
    made
}

/// Solves `A x = b` for a positive definite `A`.
#[must_use]
pub fn solve(mut matrix: Array2<f64>, right: &[f64]) -> Option<Vec<f64>> {
    cholesky(&mut matrix)?;
    let mut x = right.to_vec();
    for row in 0..x.len() {
        let known: f64 = (0..row).map(|k| matrix[[row, k]] * x[k]).sum();
        x[row] = (x[row] - known) / matrix[[row, row]];
    }
    for row in (0..x.len()).rev() {
        let known: f64 = (row + 1..x.len()).map(|k| matrix[[k, row]] * x[k]).sum();
        x[row] = (x[row] - known) / matrix[[row, row]];
    }
    Some(x)
}
