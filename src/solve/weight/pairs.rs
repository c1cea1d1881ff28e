//! Int8 codes whose adjacent pairs do not saturate 16 bits.

use rayon::prelude::*;

use super::{Solver, scaled};
use crate::error::Result;
use crate::numerics::blocks::encode_singly;
use crate::numerics::pair_safe::{self, MAX_PAIR_SUM, Rows};
use crate::numerics::{dequantize, pack, squared_errors};
use crate::ops::{Reduction, reduction_rows};
use crate::quant::{Granularity, QParams, RangeSpec};
use crate::solve::SolvedWeight;

/// By how much ranges are made longer for the sake of pairs.
const WIDER: [f32; 5] = [1.0, 1.125, 1.25, 1.5, 2.0];

impl Solver<'_> {
    /// Safe pairs at given scales.
    pub(super) fn given_pairs(&self, values: &[f32], order: Reduction, floor: f32) -> Result<SolvedWeight> {
        let qparams = self.given(self.entries(), floor)?.unwrap_or_default();
        let codes = self.safe_codes(values, &qparams, order)?;
        self.measured(values, qparams, None, self.packed(&codes))
    }

    /// Safe pairs at the scale of least error between the one that the range asks for, at which pairs have to give way, and
    /// twice that, or half of the codes, at which none does: where zero is far from the middle, a longer range is no way out.
    pub(super) fn widened_pairs(&self, values: &[f32], order: Reduction, floor: f32) -> Result<SolvedWeight> {
        let (dims, granularity) = (&self.dims, &self.scheme.granularity);
        let ranges = self.all_ranges(values)?;
        let longer = |(low, high): (f32, f32), factor: f32| (low * factor, high * factor);
        let half = RangeSpec { reduce: true, ..self.spec };
        let candidates = WIDER
            .iter()
            .map(|&factor| self.scaled(ranges.iter().map(|&range| longer(range, factor)), floor))
            .chain([scaled(&half, ranges.iter().copied(), floor)]);
        let mut best = vec![(f64::INFINITY, (1.0, 0)); ranges.len()];
        for qparams in candidates {
            let codes = self.safe_codes(values, &qparams, order)?;
            let seen = dequantize(&self.packed(&codes), self.spec.format, dims, granularity, &qparams)?;
            let mut errors = squared_errors(values, &seen, dims, granularity)?;
            if !self.has_rows(order) {
                // The elements of a pair have different scales, or many pairs have one.
                let total = errors.iter().sum();
                errors.fill(total);
            }
            let found = qparams.scales.iter().copied().zip(qparams.zero_points.iter().copied());
            for ((best, error), found) in best.iter_mut().zip(errors).zip(found) {
                if error < best.0 {
                    *best = (error, found);
                }
            }
        }
        let (scales, zero_points) = best.into_iter().map(|(_, found)| found).unzip();
        let qparams = QParams { scales, zero_points };
        let codes = self.safe_codes(values, &qparams, order)?;
        self.measured(values, qparams, None, self.packed(&codes))
    }

    /// Scales and safe pairs of least error, chosen together.
    pub(super) fn searched_pairs(&self, values: &[f32], order: Reduction, floor: f32) -> Result<SolvedWeight> {
        let rows = reduction_rows(&self.dims, order);
        let mut codes = vec![0_u8; values.len()];
        let mut write = |row: usize, found: Vec<i8>| {
            rows.positions(row).zip(found).for_each(|(at, code)| codes[at] = code.cast_unsigned());
        };
        let all = 0..rows.count();
        let qparams = if let Granularity::PerChannel { .. } = self.scheme.granularity {
            let solved: Vec<_> = all.clone().into_par_iter().map(|row| searched(&rows, row, values, floor)).collect();
            let scales = solved.iter().map(|(scale, _)| *scale).collect();
            all.zip(solved).for_each(|(row, (_, found))| write(row, found));
            QParams::symmetric(scales)
        } else {
            // One scale for all rows: the largest that any row needs, then each row is made safe at that scale.
            let least = floor.max(f32::MIN_POSITIVE);
            let scales = all.clone().into_par_iter().map(|row| searched(&rows, row, values, floor).0);
            let scale = scales.reduce(|| least, f32::max);
            for row in all {
                write(row, pair_safe::quantize_row_at(&rows.gather(row, values), scale));
            }
            QParams::per_tensor(scale, 0)
        };
        self.measured(values, qparams, None, codes)
    }

    /// Whether each scale is that of one row of pairs.
    pub(super) fn has_rows(&self, order: Reduction) -> bool {
        match (self.scheme.granularity, order) {
            (Granularity::PerChannel { axis }, Reduction::Spatial) => axis == 0,
            (Granularity::PerChannel { axis }, Reduction::Along(depth)) => {
                let dims = &self.dims;
                let alone = dims.len() == 3 && dims[0] == 1 && (axis, depth) == (1, 2);
                alone || (dims.len() == 2 && axis + depth == 1)
            }
            _ => false,
        }
    }

    /// Codes whose pairs cannot saturate, at these scales.
    fn safe_codes(&self, values: &[f32], qparams: &QParams, order: Reduction) -> Result<Vec<i32>> {
        let (dims, granularity) = (&self.dims, &self.scheme.granularity);
        let encoding = self.encoding_with(qparams);
        let mut codes = encode_singly(values, dims, granularity, &encoding, qparams)?;
        let rows = reduction_rows(dims, order);
        for row in 0..rows.count() {
            let mut positions = rows.positions(row);
            while let (Some(first), Some(second)) = (positions.next(), positions.next()) {
                if (codes[first] + codes[second]).abs() <= MAX_PAIR_SUM {
                    continue;
                }
                let exact = |at: usize| -> Result<f64> {
                    let entry = granularity.entry(dims, at)?;
                    let quotient = f64::from(values[at] / qparams.scales[entry]);
                    Ok(quotient + f64::from(qparams.zero_points[entry]))
                };
                let pair = pair_safe::project([exact(first)?, exact(second)?]);
                codes[first] = pair[0].into();
                codes[second] = pair[1].into();
            }
        }
        Ok(codes)
    }

    fn packed(&self, codes: &[i32]) -> Vec<u8> {
        pack::pack(codes, self.spec.format.bits())
    }
}

/// Scale and codes of one row, at no smaller a scale than `floor`.
fn searched(rows: &Rows, row: usize, values: &[f32], floor: f32) -> (f32, Vec<i8>) {
    let values = rows.gather(row, values);
    let (scale, codes) = pair_safe::quantize_row(&values);
    if scale < floor { (floor, pair_safe::quantize_row_at(&values, floor)) } else { (scale, codes) }
}
