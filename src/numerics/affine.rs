//! Quantize and dequantize.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::grid::{Grid, Run};
use super::kernels::{self, Code};
use super::minifloat::Minifloat;
use super::{Format, Granularity, QParams, Round, pack};
use crate::error::{Error, Result};

/// Elements that one thread takes at a time: a multiple of every packing.
pub(super) const CHUNK: usize = 1 << 16;
/// Elements that are worked on while they stay in the first-level cache.
const BLOCK: usize = 1 << 12;

/// The code of one element, as the specification has it: `round(clamp(x / scale, qmin − z, qmax − z)) + z` with the division
/// and clamp in f32, or for floats [`Format::encode`] of the quotient (`zero_point` and `round` then have no effect).
///
/// Total: ±∞ saturate, NaN becomes the smallest code of an integer format, as in onnxruntime. `scale` is positive and
/// `zero_point` in the range of `format`.
pub fn quantize_value(x: f32, scale: f32, zero_point: i32, format: Format, round: Round) -> i32 {
    match format.float() {
        Some(float) => float.encode(x / scale),
        None => integer_value(x, scale, zero_point, format.range(), round),
    }
}

/// [`quantize_value`] of an integer format of which only the codes `qmin..=qmax` are used.
fn integer_value(x: f32, scale: f32, zero_point: i32, (qmin, qmax): (i32, i32), round: Round) -> i32 {
    let quotient = x / scale;
    // In f64 for int32, whose range f32 does not hold; the same numbers for all others.
    let (low, high) = (f64::from(qmin) - f64::from(zero_point), f64::from(qmax) - f64::from(zero_point));
    let clamped = if quotient.is_nan() { low } else { f64::from(quotient).clamp(low, high) };
    let rounded = match round {
        Round::HalfEven => clamped.round_ties_even(),
        Round::HalfAway => clamped.round(),
        Round::Floor => clamped.floor(),
    };
    (rounded + f64::from(zero_point)) as i32
}

/// Quantizes `x` to packed bytes, in the layout of ONNX `raw_data`.
///
/// Bit exact with ONNX `QuantizeLinear-25` for [`Round::HalfEven`], floats as without a zero point (adding one of 0 would lose
/// negative zero in `float4e2m1`); see [`quantize_value`] for the formula and
/// [`Granularity::scale_dims`] for the order of `qparams`.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if the sizes do not fit together, `x` holds NaN or infinities, a scale is not a positive
/// number, a zero point is outside the format, or `round` is not [`Round::HalfEven`] for a float format.
pub fn quantize(
    x: &[f32],
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
    format: Format,
    round: Round,
) -> Result<Vec<u8>> {
    let quantizer = Quantizer::new(x, dims, granularity, qparams, format, round)?;
    let bits = format.bits();
    let mut out = vec![0; pack::packed_len(x.len(), bits)];
    quantizer.for_each_chunk(x, &mut out, pack::packed_len(CHUNK, bits), |start, x, out| match bits {
        32 => quantizer.fill_packed(start, x, out, |codes: &[i32], out| write_le(codes, out, i32::to_le_bytes)),
        16 => quantizer.fill_packed(start, x, out, |codes: &[u16], out| write_le(codes, out, u16::to_le_bytes)),
        _ => quantizer.fill_packed(start, x, out, |codes: &[u8], out| pack::pack_bytes_into(codes, bits, out)),
    })?;
    Ok(out)
}

/// Quantizes `x` to one integer per element: the value for integer formats, the bit pattern for floats.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_codes(
    x: &[f32],
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
    format: Format,
    round: Round,
) -> Result<Vec<i32>> {
    quantize_within(x, dims, granularity, qparams, format, round, format.range())
}

/// [`quantize_codes`] with the codes of an integer format clamped to `codes.0..=codes.1`, which the format has. The zero
/// point need not be one of them. Floats are not clamped.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_within(
    x: &[f32],
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
    format: Format,
    round: Round,
    codes: (i32, i32),
) -> Result<Vec<i32>> {
    let quantizer = Quantizer { codes, ..Quantizer::new(x, dims, granularity, qparams, format, round)? };
    let mut out = vec![0; x.len()];
    quantizer.for_each_chunk(x, &mut out, CHUNK, |start, x, out| quantizer.fill(start, x, out))?;
    Ok(out)
}

/// [`quantize_codes`] half to even, on the calling thread alone and of anything: see [`quantize_value`] for infinities and NaN,
/// and scales are not looked at. For runtimes, which have threads of their own and compute what the model says.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if the sizes do not fit together or a zero point is outside the format.
pub fn quantize_serial(
    x: &[f32],
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
    format: Format,
) -> Result<Vec<i32>> {
    let grid = Grid::new(dims, granularity)?;
    grid.check(x.len(), dims, format, qparams)?;
    let mut out = vec![0; x.len()];
    Quantizer { grid, qparams, format, round: Round::HalfEven, codes: format.range() }.fill(0, x, &mut out);
    Ok(out)
}

/// Turns packed bytes back into numbers: `f32(q − z) · s`, or `decode(q) · s` for floats.
///
/// Bit exact with ONNX `DequantizeLinear-25` for f32 output. Any scale is accepted, as that operator does.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if the sizes do not fit together or a zero point is outside the format.
pub fn dequantize(
    raw: &[u8],
    format: Format,
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
) -> Result<Vec<f32>> {
    dequantize_by(Workers::All, raw, format, dims, granularity, qparams)
}

/// [`dequantize`] on the calling thread alone.
///
/// # Errors
/// As [`dequantize`].
pub fn dequantize_serial(
    raw: &[u8],
    format: Format,
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
) -> Result<Vec<f32>> {
    dequantize_by(Workers::Caller, raw, format, dims, granularity, qparams)
}

/// Who does the work.
#[derive(Clone, Copy)]
enum Workers {
    All,
    Caller,
}

fn dequantize_by(
    workers: Workers,
    raw: &[u8],
    format: Format,
    dims: &[usize],
    granularity: &Granularity,
    qparams: &QParams,
) -> Result<Vec<f32>> {
    let grid = Grid::new(dims, granularity)?;
    grid.check(grid.len, dims, format, qparams)?;
    let bits = format.bits();
    if raw.len() != pack::packed_len(grid.len, bits) {
        return Err(Error::model(format!("{} bytes do not fill a {format} tensor of shape {dims:?}", raw.len())));
    }
    let mut out = vec![0.0; grid.len];
    if let Some(float) = format.float() {
        let table: [f32; 256] = std::array::from_fn(|code| float.decode(code as u8));
        scale_all(workers, raw, format, &grid, qparams, &mut out, |code, _| table[usize::from(code as u8)]);
    } else if format == Format::Int32 {
        scale_all(workers, raw, format, &grid, qparams, &mut out, |code, zero_point| {
            (i64::from(code) - i64::from(zero_point)) as f32
        });
    } else {
        scale_all(workers, raw, format, &grid, qparams, &mut out, |code, zero_point| {
            code.wrapping_sub(zero_point) as f32
        });
    }
    Ok(out)
}

/// Fills `out` with `number(code, zero_point) * scale`.
fn scale_all(
    workers: Workers,
    raw: &[u8],
    format: Format,
    grid: &Grid,
    QParams { scales, zero_points }: &QParams,
    out: &mut [f32],
    number: impl Fn(i32, i32) -> f32 + Sync,
) {
    let packed = |elements| pack::packed_len(elements, format.bits());
    let block = |start: usize, raw: &[u8], out: &mut [f32]| {
        let mut codes = [0; BLOCK];
        let codes = &mut codes[..out.len()];
        pack::unpack_into(raw, format, codes);
        let mut at = 0;
        for run in grid.runs(start, out.len()) {
            let now = at..at + run.len();
            at = now.end;
            let (out, codes) = (&mut out[now.clone()], &codes[now]);
            match run {
                Run::Same { len: _, entry } => {
                    kernels::scale_numbers(out, codes, scales[entry], zero_points[entry], &number);
                }
                Run::Each { len, first } => {
                    let (scales, zero_points) = (&scales[first..first + len], &zero_points[first..first + len]);
                    kernels::scale_numbers_each(out, codes, scales, zero_points, &number);
                }
            }
        }
    };
    let chunk = |start: usize, raw: &[u8], out: &mut [f32]| {
        let blocks = out.chunks_mut(BLOCK).zip(raw.chunks(packed(BLOCK))).enumerate();
        blocks.for_each(|(idx, (out, raw))| block(start + idx * BLOCK, raw, out));
    };
    match workers {
        Workers::Caller => chunk(0, raw, out),
        Workers::All => {
            let chunks = out.par_chunks_mut(CHUNK).zip(raw.par_chunks(packed(CHUNK))).enumerate();
            chunks.for_each(|(idx, (out, raw))| chunk(idx * CHUNK, raw, out));
        }
    }
}

fn write_le<T: Copy, const N: usize>(codes: &[T], out: &mut [u8], bytes: impl Fn(T) -> [u8; N]) {
    for (out, &code) in out.as_chunks_mut::<N>().0.iter_mut().zip(codes) {
        *out = bytes(code);
    }
}

struct Quantizer<'a> {
    grid: Grid,
    qparams: &'a QParams,
    format: Format,
    round: Round,
    /// Smallest and largest code, for integers.
    codes: (i32, i32),
}

impl<'a> Quantizer<'a> {
    fn new(
        x: &[f32],
        dims: &[usize],
        granularity: &Granularity,
        qparams: &'a QParams,
        format: Format,
        round: Round,
    ) -> Result<Self> {
        let grid = Grid::new(dims, granularity)?;
        grid.check(x.len(), dims, format, qparams)?;
        check_scales(&qparams.scales)?;
        if !format.is_integer() && round != Round::HalfEven {
            return Err(Error::model(format!("{format} has no other rounding than half to even")));
        }
        Ok(Self { grid, qparams, format, round, codes: format.range() })
    }

    /// Runs `fill` over chunks of `x` and of `out`, in parallel; it says whether its chunk was finite.
    fn for_each_chunk<T: Send>(
        &self,
        x: &[f32],
        out: &mut [T],
        out_chunk: usize,
        fill: impl Fn(usize, &[f32], &mut [T]) -> bool + Sync,
    ) -> Result<()> {
        let finite = AtomicBool::new(true);
        x.par_chunks(CHUNK).zip(out.par_chunks_mut(out_chunk)).enumerate().for_each(|(idx, (x, out))| {
            if !fill(idx * CHUNK, x, out) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        if finite.into_inner() {
            return Ok(());
        }
        let at = x.iter().position(|value| !value.is_finite()).unwrap_or_default();
        Err(Error::model(format!("element {at} is {}, which cannot be quantized to {}", x[at], self.format)))
    }

    /// Fills and packs block by block.
    fn fill_packed<T: Code>(&self, start: usize, x: &[f32], out: &mut [u8], pack: impl Fn(&[T], &mut [u8])) -> bool {
        let mut codes = [T::default(); BLOCK];
        let bytes = pack::packed_len(BLOCK, self.format.bits());
        let mut finite = true;
        for (idx, (x, out)) in x.chunks(BLOCK).zip(out.chunks_mut(bytes)).enumerate() {
            let codes = &mut codes[..x.len()];
            finite &= self.fill_block(start + idx * BLOCK, x, codes);
            pack(codes, out);
        }
        finite
    }

    fn fill<T: Code>(&self, start: usize, x: &[f32], out: &mut [T]) -> bool {
        let blocks = x.chunks(BLOCK).zip(out.chunks_mut(BLOCK)).enumerate();
        blocks.fold(true, |finite, (idx, (x, out))| finite & self.fill_block(start + idx * BLOCK, x, out))
    }

    /// Writes the codes of `x`, which begins at element `start`, and says whether all of it was finite.
    fn fill_block<T: Code>(&self, start: usize, x: &[f32], out: &mut [T]) -> bool {
        match (self.format.float(), self.round) {
            (Some(float), _) => self.fill_float(start, x, out, float),
            (None, Round::HalfEven) if self.format != Format::Int32 => self.fill_int(start, x, out),
            (None, _) => self.fill_scalar(start, x, out),
        }
        kernels::is_finite(x)
    }

    fn fill_int<T: Code>(&self, start: usize, x: &[f32], out: &mut [T]) {
        let range = self.codes;
        self.for_each_run(
            start,
            x,
            out,
            |x, out, scale, zero_point| kernels::int_codes(out, x, scale, zero_point, range),
            |x, out, scales, zero_points| kernels::int_codes_each(out, x, scales, zero_points, range),
        );
    }

    fn fill_float<T: Code>(&self, start: usize, x: &[f32], out: &mut [T], float: Minifloat) {
        self.for_each_run(
            start,
            x,
            out,
            |x, out, scale, _| kernels::float_codes(out, x, scale, float),
            |x, out, scales, _| kernels::float_codes_each(out, x, scales, float),
        );
    }

    fn fill_scalar<T: Code>(&self, start: usize, x: &[f32], out: &mut [T]) {
        let code = |x, scale, zero_point| T::from_code(integer_value(x, scale, zero_point, self.codes, self.round));
        self.for_each_run(
            start,
            x,
            out,
            |x, out, scale, zero_point| {
                out.iter_mut().zip(x).for_each(|(out, &x)| *out = code(x, scale, zero_point));
            },
            |x, out, scales, zero_points| {
                let all = out.iter_mut().zip(x).zip(scales).zip(zero_points);
                all.for_each(|(((out, &x), &scale), &zero_point)| *out = code(x, scale, zero_point));
            },
        );
    }

    fn for_each_run<T>(
        &self,
        start: usize,
        x: &[f32],
        out: &mut [T],
        same: impl Fn(&[f32], &mut [T], f32, i32),
        each: impl Fn(&[f32], &mut [T], &[f32], &[i32]),
    ) {
        let QParams { scales, zero_points } = self.qparams;
        let mut at = 0;
        for run in self.grid.runs(start, x.len()) {
            let now = at..at + run.len();
            at = now.end;
            let (x, out) = (&x[now.clone()], &mut out[now]);
            match run {
                Run::Same { len: _, entry } => same(x, out, scales[entry], zero_points[entry]),
                Run::Each { len, first } => {
                    each(x, out, &scales[first..first + len], &zero_points[first..first + len]);
                }
            }
        }
    }
}

/// Checks that every scale can divide.
pub(super) fn check_scales(scales: &[f32]) -> Result<()> {
    match scales.iter().find(|scale| !(scale.is_finite() && **scale > 0.0)) {
        Some(scale) => Err(Error::model(format!("scale {scale} is not a positive number"))),
        None => Ok(()),
    }
}
