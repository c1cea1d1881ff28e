//! Weights for which a product's output is least wrong on the rows that samples show.
//!
//! With `X` the rows, the output of weights `V` instead of `W` is off by `tr (W − V) H (W − V)ᵀ` with `H = XᵀX / n`. So
//! everything that samples say of a weight is in `H`, and what is to be solved is one quadratic form over codes. Rows of a
//! weight, its outputs, have nothing to do with each other.

#![allow(clippy::needless_pass_by_value, reason = "views of arrays are passed as slices are")]
#![allow(clippy::float_cmp, reason = "levels are whole numbers, or those of a table")]

pub mod clip;
pub mod factor;
pub mod gptq;
pub mod local;
pub mod scales;

use ndarray::{Array2, ArrayView2, Zip, s};
use rayon::prelude::*;

use crate::numerics::pair_safe::MAX_PAIR_SUM;
use crate::quant::Format;

/// Rows that are solved together: enough for products of matrices, few enough for all processors.
const TOGETHER: usize = 64;

/// What a code may stand for, in steps of the scale: its *level*.
#[derive(Clone, Debug)]
pub enum Levels {
    /// Codes from one to another, less the zero point.
    Integers {
        /// The lowest code.
        low: f64,
        /// The highest.
        high: f64,
    },
    /// The numbers of a small float format in rising order, with their codes.
    Floats(Vec<(f64, i32)>),
}

impl Levels {
    /// Those of a format; `codes` are the integers that are used.
    #[must_use]
    pub fn new(format: Format, (low, high): (i32, i32)) -> Self {
        let Some(float) = format.float() else {
            return Self::Integers { low: f64::from(low), high: f64::from(high) };
        };
        let codes = 0..1_i32 << format.bits().min(8);
        let known =
            codes.map(|code| (f64::from(float.decode(code as u8)), code)).filter(|(level, _)| level.is_finite());
        let mut all: Vec<(f64, i32)> = known.collect();
        // Of two zeros the positive one is kept.
        all.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        all.dedup_by(|later, first| {
            later.0 == first.0 && {
                first.1 = first.1.min(later.1);
                true
            }
        });
        Self::Floats(all)
    }

    /// The level nearest to a number of steps, ties to even codes. `beside` is the code of the neighbour with which this
    /// one must not saturate.
    fn nearest(&self, steps: f64, zero: f64, beside: Option<f64>) -> f64 {
        match self {
            Self::Integers { low, high } => {
                let most = f64::from(MAX_PAIR_SUM);
                let (low, high) = match beside {
                    Some(beside) => (low.max(-most - beside), high.min(most - beside)),
                    None => (*low, *high),
                };
                (rounded(steps) + zero).clamp(low, high) - zero
            }
            Self::Floats(all) => {
                let above = all.partition_point(|(level, _)| *level < steps);
                let Some(&(below, code)) = all.get(above.saturating_sub(1)) else { return 0.0 };
                let Some(&(next, _)) = all.get(above) else { return below };
                let (down, up) = (steps - below, next - steps);
                if down < up || (down == up && code % 2 == 0) { below } else { next }
            }
        }
    }

    /// The code of a level.
    #[must_use]
    pub fn code(&self, level: f64, zero: f64) -> i32 {
        match self {
            Self::Integers { .. } => (level + zero) as i32,
            Self::Floats(all) => {
                let at = all.partition_point(|(other, _)| *other < level);
                all.get(at.min(all.len().saturating_sub(1))).map_or(0, |(_, code)| *code)
            }
        }
    }
}

/// Half to even, of numbers that a code may have.
fn rounded(x: f64) -> f64 {
    const MIDDLE: f64 = 6_755_399_441_055_744.0;
    let x = x.clamp(-1e9, 1e9);
    (x + MIDDLE) - MIDDLE
}

/// What is to be coded.
#[derive(Clone, Copy)]
pub struct Problem<'a> {
    /// Weights, a row for each output.
    pub target: ArrayView2<'a, f64>,
    /// What a pair of errors costs.
    pub hessian: ArrayView2<'a, f64>,
    /// What a code may stand for.
    pub levels: &'a Levels,
    /// For each column, the one whose code added to its own must not saturate; itself if there is none.
    pub partners: &'a [usize],
}

/// A weight in codes.
#[derive(Clone, Debug, PartialEq)]
pub struct Coded {
    /// Columns that share a scale; the last ones may be fewer.
    pub size: usize,
    /// A scale for each row and group of columns.
    pub scales: Array2<f64>,
    /// As many zero points.
    pub zeros: Array2<f64>,
    /// For each weight, how many steps it is from zero.
    pub levels: Array2<f64>,
}

impl Coded {
    /// What it stands for.
    #[must_use]
    pub fn values(&self) -> Array2<f64> {
        let mut values = self.levels.clone();
        for (mut row, scales) in values.rows_mut().into_iter().zip(self.scales.rows()) {
            for (mut group, scale) in row.exact_or_rest(self.size).zip(scales) {
                group.iter_mut().for_each(|value| *value *= scale);
            }
        }
        values
    }

    /// Some rows of it.
    fn part(&self, from: usize, to: usize) -> Self {
        let part = |of: &Array2<f64>| of.slice(s![from..to, ..]).to_owned();
        Self { size: self.size, scales: part(&self.scales), zeros: part(&self.zeros), levels: part(&self.levels) }
    }
}

/// Groups of a row.
trait Groups {
    fn exact_or_rest(&mut self, size: usize) -> impl Iterator<Item = ndarray::ArrayViewMut1<'_, f64>>;
}

impl<S: ndarray::DataMut<Elem = f64>> Groups for ndarray::ArrayBase<S, ndarray::Ix1> {
    fn exact_or_rest(&mut self, size: usize) -> impl Iterator<Item = ndarray::ArrayViewMut1<'_, f64>> {
        self.axis_chunks_iter_mut(ndarray::Axis(0), size.max(1))
    }
}

/// `tr E H Eᵀ`.
#[must_use]
pub fn loss(errors: ArrayView2<'_, f64>, hessian: ArrayView2<'_, f64>) -> f64 {
    let starts: Vec<usize> = (0..errors.nrows()).step_by(TOGETHER).collect();
    let part = |&from: &usize| {
        let some = errors.slice(s![from..errors.nrows().min(from + TOGETHER), ..]);
        let mut sum = 0.0;
        Zip::from(&some).and(&some.dot(&hessian)).for_each(|error, cost| sum += error * cost);
        sum
    };
    let parts: Vec<f64> = starts.par_iter().map(part).collect();
    parts.iter().sum()
}

/// Solves rows in parallel, so many at a time.
fn by_rows(problem: &Problem<'_>, coded: &mut Coded, solve: impl Fn(&Problem<'_>, &mut Coded) + Sync) {
    let rows = problem.target.nrows();
    let starts: Vec<usize> = (0..rows).step_by(TOGETHER).collect();
    let solved: Vec<Coded> = starts
        .par_iter()
        .map(|&from| {
            let to = rows.min(from + TOGETHER);
            let mut part = coded.part(from, to);
            solve(&Problem { target: problem.target.slice(s![from..to, ..]), ..*problem }, &mut part);
            part
        })
        .collect();
    for (from, part) in starts.into_iter().zip(solved) {
        let to = rows.min(from + TOGETHER);
        coded.scales.slice_mut(s![from..to, ..]).assign(&part.scales);
        coded.zeros.slice_mut(s![from..to, ..]).assign(&part.zeros);
        coded.levels.slice_mut(s![from..to, ..]).assign(&part.levels);
    }
}
