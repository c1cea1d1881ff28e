//! Rows that products read, kept: some of every sample, and what all of them have in common.
//!
//! Rows that an attention mask takes out are none: padding says nothing about what a model is for.

use std::collections::BTreeMap;
use std::sync::Mutex;

use ndarray::{Array2, ArrayD};

use super::blocks::{Blocks, Cut};
use super::pool::lock;
use super::run::Run;
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::onnx::DataType;
use crate::samples::Sample;
use crate::solve::smoothing::Seen;
use crate::statistics::Range;

/// Rows of a tensor that are kept at most, of all samples together.
const ROWS: usize = 2048;
/// One sample in so many proves what the others are searched for; with fewer samples, one row in so many.
const HELD_OUT: usize = 4;

/// What one sample shows of a tensor.
struct Part {
    rows: Vec<f32>,
    ranges: Vec<Range>,
    sums: Vec<f64>,
    count: usize,
}

/// What samples show of tensors, by name. Those that are not shown, or have other channels from sample to sample, are left
/// out. Neither threads nor the order of samples matter.
///
/// # Errors
/// No samples; a model that the runtime cannot run; a memory limit that cannot be kept to; a row with NaN or infinity; an
/// interruption.
pub fn rows(model: &Model, tensors: &[String], run: Run<'_>) -> Result<BTreeMap<String, Seen>> {
    let quota = (ROWS / run.indices.len().max(1)).max(1);
    let mut sorted = run.indices.to_vec();
    sorted.sort_unstable();
    let found: Mutex<BTreeMap<(usize, usize), Part>> = Mutex::default();
    let mut left: Vec<usize> = (0..tensors.len()).collect();
    Blocks { model, cut: Cut::Weights(u64::MAX), run }.walk(|block| {
        let here: Vec<usize> =
            left.iter().copied().filter(|&at| block.model.value_named(&tensors[at]).is_some()).collect();
        left.retain(|at| !here.contains(at));
        let names: Vec<String> = here.iter().map(|&at| tensors[at].clone()).collect();
        if !names.is_empty() {
            block.observe(None, &names, &|seen| {
                let mask = mask(&run.samples.get(seen.sample)?);
                for (&at, tensor) in here.iter().zip(seen.float) {
                    let Some(tensor) = tensor else { continue };
                    let part = Part::of(tensor, mask.as_deref(), quota).map_err(|e| e.at_value(&tensors[at]))?;
                    lock(&found).insert((at, seen.sample), part);
                }
                Ok(())
            })?;
        }
        Ok(None)
    })?;
    let mut found = std::mem::take(&mut *lock(&found));
    let mut all = BTreeMap::new();
    for (at, tensor) in tensors.iter().enumerate() {
        let parts: Vec<Part> = sorted.iter().filter_map(|&sample| found.remove(&(at, sample))).collect();
        all.extend(together(&parts).map(|seen| (tensor.clone(), seen)));
    }
    Ok(all)
}

/// The positions that the mask of a sample keeps: an input with "mask" in its name, of two axes at least, that is 0 or 1
/// everywhere.
fn mask(sample: &Sample) -> Option<Vec<bool>> {
    let (_, tensor) =
        sample.iter().find(|(name, tensor)| name.to_lowercase().contains("mask") && tensor.dims().len() >= 2)?;
    let values: Vec<f64> = if tensor.dtype() == DataType::Bool {
        tensor.raw().iter().map(|&byte| f64::from(byte)).collect()
    } else {
        tensor.to_f64().or_else(|| Some(tensor.to_i64()?.into_iter().map(|v| v as f64).collect()))?
    };
    let kept: Vec<bool> = values.iter().map(|&v| v > 0.5).collect();
    let plain = values.iter().all(|&v| v.abs() < 1e-9 || (v - 1.0).abs() < 1e-9);
    (plain && kept.contains(&true)).then_some(kept)
}

impl Part {
    fn of(tensor: &ArrayD<f32>, mask: Option<&[bool]>, quota: usize) -> Result<Self> {
        let channels = tensor.shape().last().copied().unwrap_or(0);
        let whole = tensor.as_standard_layout();
        let values = whole.as_slice().unwrap_or_default();
        let total = values.len().checked_div(channels).unwrap_or(0);
        let mask = mask.filter(|mask| mask.len() == total);
        let kept: Vec<&[f32]> = values
            .chunks_exact(channels.max(1))
            .enumerate()
            .filter(|(row, _)| mask.is_none_or(|mask| mask[*row]))
            .map(|(_, row)| row)
            .collect();
        let mut ranges = vec![Range { min: f32::INFINITY, max: f32::NEG_INFINITY }; channels];
        let mut sums = vec![0f64; channels];
        for row in &kept {
            if row.iter().any(|x| !x.is_finite()) {
                return Err(Error::new(Kind::Samples, "a row is NaN or infinite")
                    .with_hint("look at how this sample is preprocessed, or leave it out"));
            }
            for ((&x, range), sum) in row.iter().zip(&mut ranges).zip(&mut sums) {
                // Zero has no sign in a range.
                *range = range.union(Range { min: x + 0.0, max: x + 0.0 });
                *sum += f64::from(x.abs());
            }
        }
        let taken = kept.len().min(quota);
        let rows = (0..taken).flat_map(|at| kept[at * kept.len() / taken]).copied().collect();
        Ok(Self { rows, ranges, sums, count: kept.len() })
    }
}

/// All samples, in their order.
fn together(parts: &[Part]) -> Option<Seen> {
    let channels = parts.first()?.ranges.len();
    if channels == 0 || parts.iter().any(|part| part.ranges.len() != channels) {
        return None;
    }
    let mut ranges: Vec<Range> = parts[0].ranges.clone();
    let mut sums = vec![0f64; channels];
    let (mut search, mut held_out) = (Vec::new(), Vec::new());
    let (mut count, by_sample) = (0usize, parts.len() >= HELD_OUT);
    for (number, part) in parts.iter().enumerate() {
        ranges.iter_mut().zip(&part.ranges).for_each(|(all, own)| *all = all.union(*own));
        sums.iter_mut().zip(&part.sums).for_each(|(all, own)| *all += own);
        count += part.count;
        for (at, row) in part.rows.chunks_exact(channels).enumerate() {
            let turn = if by_sample { number } else { at };
            if turn % HELD_OUT == HELD_OUT - 1 { held_out.extend(row) } else { search.extend(row) }
        }
    }
    let matrix = |values: Vec<f32>| Array2::from_shape_vec((values.len() / channels, channels), values).ok();
    let means = sums.iter().map(|sum| sum / count.max(1) as f64).collect();
    Some(Seen { rows: matrix(search)?, held_out: matrix(held_out)?, ranges, means })
}
