//! What samples show of the rows that a product reads: second moments, means and extremes of its columns.
//!
//! An algorithm that solves for weights needs no more of the samples than this: with `X` the rows, it needs `XᵀX`, and where
//! the rows of the float model differ from those of the model as changed so far, `X̂ᵀX` of both. The columns are those of the
//! product's weight; a convolution in groups has as many blocks of columns, and a matrix for each.
//!
//! Like all statistics a state depends neither on the order of samples nor on how they were grouped. Rows that are given
//! together are added in float64 by one product of matrices; beyond these, [`Sums`] are exact in that sense.
//!
//! A state takes 17 bytes an element of one triangle of each matrix, and as much for each element of `X̂ᵀX`, whatever the
//! number of rows.

#![allow(clippy::needless_pass_by_value, reason = "views of arrays are passed as slices are")]

use ndarray::{Array1, Array2, ArrayView2, Axis, s};

use super::Range;
use super::sums::{MOST, Sums};
use crate::error::{Error, Kind, Result};

/// Sums over the rows of one input of products.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixStatistics {
    /// Blocks of columns that have a matrix each.
    blocks: usize,
    /// Columns of each.
    columns: usize,
    /// Rows seen.
    rows: u64,
    /// The samples that they are from, in order.
    samples: Vec<u32>,
    /// Of the model as changed so far.
    moments: Moments,
    /// One triangle of `XᵀX` for each block, row after row from the diagonal on.
    gram: Sums,
    /// Of the float model, where it differs.
    float: Option<Float>,
}

/// What the float model has at the same place.
#[derive(Clone, Debug, PartialEq)]
struct Float {
    moments: Moments,
    /// `X̂ᵀX` for each block, with the rows of the float model on the left.
    cross: Sums,
}

/// What is known of each column by itself.
#[derive(Clone, Debug, PartialEq)]
struct Moments {
    sum: Sums,
    /// Of magnitudes.
    absolute: Sums,
    ranges: Vec<Option<Range>>,
}

impl MatrixStatistics {
    /// Nothing seen yet of `blocks` blocks of `columns` columns; with `paired`, of two models.
    #[must_use]
    pub fn new(blocks: usize, columns: usize, paired: bool) -> Self {
        let float = || Float { moments: Moments::new(blocks * columns), cross: Sums::new(blocks * columns * columns) };
        Self {
            blocks,
            columns,
            rows: 0,
            samples: Vec::new(),
            moments: Moments::new(blocks * columns),
            gram: Sums::new(blocks * columns * (columns + 1) / 2),
            float: paired.then(float),
        }
    }

    /// What one sample shows. `rows` has the columns of all blocks; `float` the same rows in the float model, where they
    /// differ.
    ///
    /// # Errors
    /// [`Kind::Samples`] for numbers that are NaN or infinite; [`Kind::Internal`] for rows of other shapes.
    pub fn of(
        sample: u32,
        blocks: usize,
        rows: ArrayView2<'_, f32>,
        float: Option<ArrayView2<'_, f32>>,
    ) -> Result<Self> {
        Self::of_samples(vec![sample], blocks, rows, float)
    }

    /// As [`of`](Self::of), of several samples, in order, whose rows are one after the other. Which samples are taken
    /// together decides the last bits.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn of_samples(
        samples: Vec<u32>,
        blocks: usize,
        rows: ArrayView2<'_, f32>,
        float: Option<ArrayView2<'_, f32>>,
    ) -> Result<Self> {
        let width = rows.ncols();
        if blocks == 0 || !width.is_multiple_of(blocks) || float.is_some_and(|float| float.dim() != rows.dim()) {
            let other = float.map(|float| format!(" and {:?}", float.dim())).unwrap_or_default();
            return Err(Error::new(Kind::Internal, format!("rows of shape {:?}{other}", rows.dim())));
        }
        for rows in [Some(rows), float].into_iter().flatten() {
            if let Some(at) = rows.rows().into_iter().position(|row| row.iter().any(|x| !x.is_finite())) {
                let place = match samples.as_slice() {
                    [first, .., last] => format!("one of samples {first} to {last}"),
                    [only] => format!("sample {only}"),
                    [] => "no sample".to_owned(),
                };
                return Err(Error::new(Kind::Samples, format!("row {at} is NaN or infinite in {place}"))
                    .with_hint("look at how this sample is preprocessed, or leave it out"));
            }
        }
        let columns = width / blocks;
        Ok(Self {
            blocks,
            columns,
            rows: rows.nrows() as u64,
            samples,
            moments: Moments::of(rows),
            gram: Sums::of(&gram(rows, columns)),
            float: float
                .map(|float| Float { moments: Moments::of(float), cross: Sums::of(&cross(float, rows, columns)) }),
        })
    }

    /// Adds what other samples showed.
    ///
    /// # Errors
    /// [`Kind::Samples`] if both saw the same sample, or there are too many; [`Kind::Internal`] if they are of other columns.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        let shape = |of: &Self| (of.blocks, of.columns, of.float.is_some());
        if shape(self) != shape(other) {
            return Err(Error::new(
                Kind::Internal,
                format!("statistics of {:?} columns beside {:?}", shape(self), shape(other)),
            ));
        }
        if let Some(sample) = other.samples.iter().find(|sample| self.samples.binary_search(sample).is_ok()) {
            return Err(Error::new(Kind::Samples, format!("sample {sample} was counted already")));
        }
        if (self.samples.len() + other.samples.len()) as u64 > MOST {
            return Err(Error::new(Kind::Samples, format!("more than {MOST} samples")));
        }
        self.samples.extend(&other.samples);
        self.samples.sort_unstable();
        self.rows += other.rows;
        self.moments.merge(&other.moments);
        self.gram.merge(&other.gram);
        if let (Some(float), Some(other)) = (&mut self.float, &other.float) {
            float.moments.merge(&other.moments);
            float.cross.merge(&other.cross);
        }
        Ok(())
    }

    /// Blocks of columns, each with a matrix of its own: the groups of a convolution.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Columns of each block.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows seen.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The samples that were seen, in order.
    #[must_use]
    pub fn samples(&self) -> &[u32] {
        &self.samples
    }

    /// Whether rows of the float model were seen beside the others.
    #[must_use]
    pub fn is_paired(&self) -> bool {
        self.float.is_some()
    }

    /// `XᵀX / n` of a block.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn gram(&self, block: usize) -> Array2<f64> {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        let size = self.columns;
        let start = block * size * (size + 1) / 2;
        Array2::from_shape_fn((size, size), |(i, j)| {
            let (row, column) = (i.min(j), i.max(j));
            self.mean_of(&self.gram, start + row * (2 * size - row + 1) / 2 + column - row)
        })
    }

    /// `X̂ᵀX / n` of a block, with the rows of the float model on the left; [`gram`](Self::gram) where nothing was changed.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn cross(&self, block: usize) -> Array2<f64> {
        let Some(float) = &self.float else { return self.gram(block) };
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        let size = self.columns;
        let start = block * size * size;
        Array2::from_shape_fn((size, size), |(i, j)| self.mean_of(&float.cross, start + i * size + j))
    }

    /// The mean of each column, those of all blocks one after the other.
    #[must_use]
    pub fn mean(&self) -> Array1<f64> {
        self.means(&self.moments.sum)
    }

    /// The mean of each column in the float model.
    #[must_use]
    pub fn float_mean(&self) -> Array1<f64> {
        self.means(self.float.as_ref().map_or(&self.moments.sum, |float| &float.moments.sum))
    }

    /// The mean magnitude of each column.
    #[must_use]
    pub fn mean_absolute(&self) -> Array1<f64> {
        self.means(&self.moments.absolute)
    }

    /// The range of each column; `None` where no row was seen.
    #[must_use]
    pub fn ranges(&self) -> &[Option<Range>] {
        &self.moments.ranges
    }

    fn means(&self, sums: &Sums) -> Array1<f64> {
        (0..sums.len()).map(|at| self.mean_of(sums, at)).collect()
    }

    fn mean_of(&self, sums: &Sums, at: usize) -> f64 {
        sums.value(at) / self.rows.max(1) as f64
    }
}

impl Moments {
    fn new(columns: usize) -> Self {
        Self { sum: Sums::new(columns), absolute: Sums::new(columns), ranges: vec![None; columns] }
    }

    fn of(rows: ArrayView2<'_, f32>) -> Self {
        let mut sum = vec![0f64; rows.ncols()];
        let mut absolute = sum.clone();
        let mut ranges: Vec<Option<Range>> = vec![None; rows.ncols()];
        for row in rows.rows() {
            for (((&x, sum), absolute), range) in row.iter().zip(&mut sum).zip(&mut absolute).zip(&mut ranges) {
                *sum += f64::from(x);
                *absolute += f64::from(x.abs());
                // Zero has no sign in a range.
                let own = Range { min: x + 0.0, max: x + 0.0 };
                *range = Some(range.map_or(own, |range| range.union(own)));
            }
        }
        Self { sum: Sums::of(&sum), absolute: Sums::of(&absolute), ranges }
    }

    fn merge(&mut self, other: &Self) {
        self.sum.merge(&other.sum);
        self.absolute.merge(&other.absolute);
        for (range, other) in self.ranges.iter_mut().zip(&other.ranges) {
            *range = super::union(*range, *other);
        }
    }
}

/// Columns of one product of matrices: above the diagonal there is nothing to compute.
const PANEL: usize = 128;

/// One triangle of `XᵀX` for each block of `columns` columns.
fn gram(rows: ArrayView2<'_, f32>, columns: usize) -> Vec<f64> {
    let wide = rows.mapv(f64::from);
    let mut sums = Vec::with_capacity(rows.ncols() * (columns + 1) / 2);
    for block in wide.axis_chunks_iter(Axis(1), columns.max(1)) {
        for start in (0..columns).step_by(PANEL) {
            let panel = block.slice(s![.., start..columns.min(start + PANEL)]);
            let products = panel.t().dot(&block.slice(s![.., start..]));
            for (at, row) in products.rows().into_iter().enumerate() {
                sums.extend(row.iter().skip(at));
            }
        }
    }
    sums
}

/// `X̂ᵀX` for each block of `columns` columns.
fn cross(left: ArrayView2<'_, f32>, right: ArrayView2<'_, f32>, columns: usize) -> Vec<f64> {
    let [left, right] = [left, right].map(|rows| rows.mapv(f64::from));
    let blocks = |of: &'_ Array2<f64>| {
        of.axis_chunks_iter(Axis(1), columns.max(1)).map(|block| block.to_owned()).collect::<Vec<_>>()
    };
    let products = blocks(&left).into_iter().zip(blocks(&right)).map(|(left, right)| left.t().dot(&right));
    products.flat_map(|products| products.iter().copied().collect::<Vec<_>>()).collect()
}
