//! Fake quantization: quantize and dequantize in one step, on float data.

use rayon::prelude::*;

use super::affine::{CHUNK, check_scales, quantize_value};
use super::grid::{Grid, Run};
use super::{Format, Granularity, QParams, Round, kernels};
use crate::error::Result;

/// Replaces each element by what it would be after ONNX `QuantizeLinear` and `DequantizeLinear` with one scale.
///
/// Bit equal to [`dequantize`](super::dequantize) of [`quantize`](super::quantize), and total besides: ±∞ saturate, NaN
/// becomes the smallest code of an integer format and stays NaN in a float format that has one. `scale` is positive and
/// finite, `zero_point` in the range of `format` and 0 for floats.
pub fn fake_quantize(x: &mut [f32], scale: f32, zero_point: i32, format: Format) {
    if x.len() <= CHUNK {
        same(x, scale, zero_point, format);
    } else {
        x.par_chunks_mut(CHUNK).for_each(|x| same(x, scale, zero_point, format));
    }
}

/// [`fake_quantize`] with a scale for each channel or group.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if the sizes do not fit together, a scale is not a positive number, or a zero point is
/// outside the format. `x` is then unchanged.
pub fn fake_quantize_nd(
    x: &mut [f32],
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
    format: Format,
) -> Result<()> {
    let grid = Grid::new(dims, granularity)?;
    grid.check(x.len(), dims, format, qparams)?;
    check_scales(&qparams.scales)?;
    x.par_chunks_mut(CHUNK).enumerate().for_each(|(idx, x)| runs(x, idx * CHUNK, &grid, qparams, format));
    Ok(())
}

/// [`fake_quantize_nd`] on the calling thread alone, with scales that are not looked at. For runtimes, which have threads of
/// their own and compute what the model says.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if the sizes do not fit together or a zero point is outside the format. `x` is then
/// unchanged.
pub fn fake_quantize_serial(
    x: &mut [f32],
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
    format: Format,
) -> Result<()> {
    let grid = Grid::new(dims, granularity)?;
    grid.check(x.len(), dims, format, qparams)?;
    runs(x, 0, &grid, qparams, format);
    Ok(())
}

/// Fake quantizes `x`, which begins at element `start`.
fn runs(x: &mut [f32], start: usize, grid: &Grid, QParams { scales, zero_points }: &QParams, format: Format) {
    let mut rest = x;
    for run in grid.runs(start, rest.len()) {
        let (now, later) = rest.split_at_mut(run.len());
        rest = later;
        match run {
            Run::Same { len: _, entry } => same(now, scales[entry], zero_points[entry], format),
            Run::Each { len, first } => {
                each(now, &scales[first..first + len], &zero_points[first..first + len], format);
            }
        }
    }
}

fn same(x: &mut [f32], scale: f32, zero_point: i32, format: Format) {
    if let Some(float) = format.float() {
        kernels::float_fake(x, scale, float);
    } else if format == Format::Int32 {
        for x in x {
            *x = slow(*x, scale, zero_point);
        }
    } else {
        kernels::int_fake(x, scale, zero_point, format.range());
    }
}

fn each(x: &mut [f32], scales: &[f32], zero_points: &[i32], format: Format) {
    if let Some(float) = format.float() {
        kernels::float_fake_each(x, scales, float);
    } else if format == Format::Int32 {
        for ((x, &scale), &zero_point) in x.iter_mut().zip(scales).zip(zero_points) {
            *x = slow(*x, scale, zero_point);
        }
    } else {
        kernels::int_fake_each(x, scales, zero_points, format.range());
    }
}

fn slow(x: f32, scale: f32, zero_point: i32) -> f32 {
    let code = quantize_value(x, scale, zero_point, Format::Int32, Round::HalfEven);
    (i64::from(code) - i64::from(zero_point)) as f32 * scale
}
