//! Constants in one pass over their bytes: ranges, scales, packed codes and the error, piece by piece and in parallel.
//!
//! [`Encoding::code`] is the specification of a code; everything else here is bit equal to it, and to
//! [`qparams_from_range`](super::qparams_from_range) of each group's extremes.

use rayon::prelude::*;

use super::affine::check_scales;
use super::grid::{Grid, Run};
use super::wide::{self, Steps};
use super::{Coding, Format, Granularity, Precision, QParam, QParams, RangeSpec, Round, ScaleDtype, kernels, pack};
use crate::error::{Error, Result};

/// Elements that one thread takes at a time, where bands are shorter: they stay in the second-level cache.
const PIECE: usize = 1 << 16;
/// Columns that are worked on at a time, so that what belongs to them stays in the first-level cache.
pub(super) const COLUMNS: usize = 1 << 10;

/// An integer format of at most 8 bits, the codes of it that are used, and how they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// The format.
    pub format: Format,
    /// Smallest and largest code.
    pub codes: (i32, i32),
    /// How they are made.
    pub coding: Coding,
}

impl Encoding {
    /// The code of one finite element. With a `scale` of 0, which some codings of MLAS have, it is the zero point; a negative
    /// one is as good as any.
    pub fn code(&self, x: f32, scale: f32, zero_point: i32) -> i32 {
        let (low, high) = self.codes;
        let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let lowest = self.format.range().0;
        let (quotient, zero) = match self.coding {
            Coding::Divided(Round::HalfEven) => ((x / scale).round_ties_even(), zero_point),
            Coding::Divided(Round::HalfAway) => ((x / scale).round(), zero_point),
            Coding::Divided(Round::Floor) => ((x / scale).floor(), zero_point),
            Coding::Reciprocal => ((x * reciprocal).round_ties_even(), zero_point),
            Coding::MlasQuotient => ((x * reciprocal).round(), zero_point),
            Coding::MlasSum => ((x * reciprocal + (zero_point - lowest) as f32).round(), lowest),
        };
        let bound = |code: i32| f64::from(code) - f64::from(zero);
        let clamped = f64::from(quotient).clamp(bound(low), bound(high));
        clamped as i32 + zero
    }
}

/// Numbers that are read piece by piece.
pub trait Values: Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Fills `out` with those from `start` on.
    fn read(&self, start: usize, out: &mut [f32]);

    /// `len` of them from `start` on, where they lie in memory like that.
    fn slice(&self, _start: usize, _len: usize) -> Option<&[f32]> {
        None
    }
}

impl<V: Values + ?Sized> Values for &V {
    fn count(&self) -> usize {
        (**self).count()
    }

    fn read(&self, start: usize, out: &mut [f32]) {
        (**self).read(start, out);
    }

    fn slice(&self, start: usize, len: usize) -> Option<&[f32]> {
        (**self).slice(start, len)
    }
}

impl Values for [f32] {
    fn count(&self) -> usize {
        self.len()
    }

    fn read(&self, start: usize, out: &mut [f32]) {
        out.copy_from_slice(&self[start..start + out.len()]);
    }

    fn slice(&self, start: usize, len: usize) -> Option<&[f32]> {
        Some(&self[start..start + len])
    }
}

/// A tensor as a sequence of bands that lie one after another: so many rows of `columns` neighbours each, every column of
/// which has its own scale. Groups along the last axis are bands of one column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bands {
    /// Bands in a stretch of `extent` rows, the last of which may be shorter.
    groups: usize,
    stretches: usize,
    extent: usize,
    size: usize,
    columns: usize,
}

/// One group of elements that share a scale, or several that lie side by side.
#[derive(Clone, Copy, Debug)]
pub struct Band<'a> {
    /// Row by row.
    pub values: &'a [f32],
    /// Elements in a row: one per group.
    pub columns: usize,
}

impl Band<'_> {
    /// The values of one of its groups, in `out`.
    pub fn column<'o>(&self, column: usize, out: &'o mut Vec<f32>) -> &'o [f32] {
        out.clear();
        out.extend(self.values.iter().skip(column).step_by(self.columns));
        out
    }
}

impl Bands {
    /// The bands of a tensor; `None` where the elements of a scale are neither neighbours nor rows of them, as those of the
    /// middle axis of three.
    ///
    /// # Errors
    /// [`Kind::Model`](crate::error::Kind::Model) if the granularity does not fit the shape.
    pub fn new(dims: &[usize], granularity: &Granularity) -> Result<Option<Self>> {
        let len = Grid::new(dims, granularity)?.len;
        let product = |dims: &[usize]| dims.iter().product::<usize>();
        let (stretches, extent, columns, size) = match *granularity {
            _ if len == 0 => return Ok(None),
            Granularity::PerTensor => (1, len, 1, len),
            Granularity::PerChannel { axis } => match (product(&dims[..axis]), product(&dims[axis + 1..])) {
                (1, inner) => (dims[axis], inner, 1, inner),
                (outer, 1) => (1, outer, dims[axis], outer),
                _ => return Ok(None),
            },
            Granularity::PerGroup { axis, size } => {
                (product(&dims[..axis]), dims[axis], product(&dims[axis + 1..]), size)
            }
        };
        let size = size.min(extent);
        Ok(Some(Self { groups: extent.div_ceil(size), stretches, extent, size, columns }))
    }

    /// How many there are.
    fn count(&self) -> usize {
        self.stretches * self.groups
    }

    fn len(&self) -> usize {
        self.stretches * self.extent * self.columns
    }

    /// Scales of all of them.
    fn entries(&self) -> usize {
        self.count() * self.columns
    }

    /// Where a band begins.
    fn start(&self, band: usize) -> usize {
        let (stretch, group) = (band / self.groups, band % self.groups);
        (stretch * self.extent + group * self.size) * self.columns
    }

    /// Elements of the longest.
    fn longest(&self) -> usize {
        self.size * self.columns
    }

    /// Runs of bands of one stretch, counted from the first of `range`, with the places of their values from its start. All
    /// bands of a run are of the same size, but the last.
    fn stretches(
        &self,
        range: std::ops::Range<usize>,
    ) -> impl Iterator<Item = (std::ops::Range<usize>, std::ops::Range<usize>)> {
        let from = self.start(range.start);
        let mut next = range.start;
        std::iter::from_fn(move || {
            let first = next;
            next = ((first / self.groups + 1) * self.groups).min(range.end);
            let own = first - range.start..next - range.start;
            (first < range.end).then(|| (own, self.start(first) - from..self.start(next) - from))
        })
    }

    /// Runs of whole bands of about [`PIECE`] elements whose codes begin at whole bytes.
    fn pieces(&self, bits: usize) -> Vec<std::ops::Range<usize>> {
        let mut pieces = Vec::new();
        let mut first = 0;
        for band in 1..=self.count() {
            let end = self.start(band);
            let whole = (end * bits).is_multiple_of(8);
            if band == self.count() || (whole && end - self.start(first) >= PIECE) {
                pieces.push(first..band);
                first = band;
            }
        }
        pieces
    }
}

/// What became of a tensor.
#[derive(Clone, Debug)]
pub struct Coded<T = ()> {
    /// Packed codes, as in ONNX `raw_data`.
    pub codes: Vec<u8>,
    /// Scales and zero points.
    pub qparams: QParams,
    /// `Σ x²`.
    pub signal: f64,
    /// `Σ (x − y)²`, `y` being what the codes stand for.
    pub noise: f64,
    /// What the choice of scales said of each piece, in order.
    pub said: Vec<T>,
}

impl<T> Coded<T> {
    /// Signal to quantization noise, in dB.
    pub fn sqnr_db(&self) -> f64 {
        super::metrics::Metrics { signal: self.signal, noise: self.noise, ..Default::default() }.sqnr_db()
    }
}

/// Smallest and largest element for each scale, in the order of the scale tensor.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if there are not as many values as the bands hold, or one is NaN or infinite.
pub fn ranges<V: Values + ?Sized>(values: &V, bands: &Bands) -> Result<Vec<(f32, f32)>> {
    check_count(values, bands)?;
    let columns = bands.columns;
    // Rows of one band, so many that a thread has something to do.
    let rows = (PIECE / columns).max(1);
    let of_band = |band: usize| -> Result<(Vec<f32>, Vec<f32>)> {
        let (start, end) = (bands.start(band), bands.start(band + 1));
        let pieces: Vec<usize> = (start..end).step_by(rows * columns).collect();
        let fresh = || (vec![f32::INFINITY; columns], vec![f32::NEG_INFINITY; columns]);
        let found = pieces.into_par_iter().map(|from| {
            let mut bounds = fresh();
            with(values, from, (end - from).min(rows * columns), &mut Vec::new(), |x| {
                widen(&mut bounds.0, &mut bounds.1, x, columns);
            })?;
            Ok(bounds)
        });
        found.try_reduce(fresh, |mut a, b| {
            a.0.iter_mut().zip(b.0).for_each(|(a, b)| *a = a.min(b));
            a.1.iter_mut().zip(b.1).for_each(|(a, b)| *a = a.max(b));
            Ok(a)
        })
    };
    let bounds: Vec<_> = (0..bands.count()).into_par_iter().map(of_band).collect::<Result<_>>()?;
    Ok(bounds.into_iter().flat_map(|(low, high)| low.into_iter().zip(high)).collect())
}

/// Codes at given scales and zero points.
///
/// # Errors
/// As [`ranges`], and if there is not one of each for each scale, or one is out of range.
pub fn encode<V: Values + ?Sized>(values: &V, bands: &Bands, encoding: &Encoding, qparams: QParams) -> Result<Coded> {
    check_count(values, bands)?;
    let QParams { scales, zero_points } = &qparams;
    let entries = bands.entries();
    if scales.len() != entries || zero_points.len() != entries {
        return Err(Error::model(format!("{entries} scales and zero points are needed, not {}", scales.len())));
    }
    check_magnitudes(scales, encoding)?;
    let (low, high) = encoding.format.range();
    if let Some(zero) = zero_points.iter().find(|&&zero| zero < low || zero > high) {
        return Err(Error::model(format!(
            "zero point {zero} is not in {low}..={high}, the range of {}",
            encoding.format
        )));
    }
    // Pieces need not be whole bands here, but whole rows.
    let bits = encoding.format.bits();
    let (columns, per_byte) = (bands.columns, 8 / bits);
    let rows = (PIECE / columns).max(1).next_multiple_of(per_byte);
    let mut out = vec![0; pack::packed_len(bands.len(), bits)];
    let parts = out.par_chunks_mut(pack::packed_len(rows * columns, bits)).enumerate();
    let errors: Vec<Result<(f64, f64)>> = parts
        .map_init(Scratch::default, |scratch, (piece, out)| {
            let first = piece * rows;
            let len = (bands.len() - first * columns).min(rows * columns);
            let mut sums = Sums::default();
            scratch.codes.resize(len, 0);
            let Scratch { codes, buffer, steps, .. } = scratch;
            with(values, first * columns, len, buffer, |x| {
                let mut at = 0;
                while at < len {
                    let row = first + at / columns;
                    let (stretch, inside) = (row / bands.extent, row % bands.extent);
                    let group = inside / bands.size;
                    let left = ((group + 1) * bands.size).min(bands.extent) - inside;
                    let now = at..len.min(at + left * columns);
                    let entry = (stretch * bands.groups + group) * columns;
                    let (scales, zeros) = (&scales[entry..entry + columns], &zero_points[entry..entry + columns]);
                    at = now.end;
                    band(&mut codes[now.clone()], &x[now], encoding, scales, zeros, steps, &mut sums);
                }
            })?;
            pack::pack_bytes_into(codes, bits, out);
            Ok(sums.total())
        })
        .collect();
    let (mut signal, mut noise) = (0.0, 0.0);
    for sums in errors {
        let sums = sums?;
        signal += sums.0;
        noise += sums.1;
    }
    Ok(Coded { codes: out, qparams, signal, noise, said: Vec::new() })
}

/// Codes at the scales and zero points that `params` writes for the smallest and the largest values of groups: it is given as
/// many of the one as of the other, and as much room, any number at a time.
///
/// # Errors
/// As [`ranges`].
pub fn quantize_ranges<V: Values + ?Sized>(
    values: &V,
    bands: &Bands,
    encoding: &Encoding,
    params: impl Fn(&[f32], &[f32], &mut [f32], &mut [i32]) + Sync,
) -> Result<Coded> {
    if bands.longest() > PIECE * 64 {
        // Too long to be one thread's: once for the ranges, once for the codes.
        let (lows, highs): (Vec<f32>, Vec<f32>) = ranges(values, bands)?.into_iter().unzip();
        let mut qparams = QParams { scales: vec![0.0; lows.len()], zero_points: vec![0; lows.len()] };
        params(&lows, &highs, &mut qparams.scales, &mut qparams.zero_points);
        return encode(values, bands, encoding, qparams);
    }
    let columns = bands.columns;
    let coded = pieces(values, bands, encoding, |piece, scratch| {
        let Piece { bands: range, x, scales, zeros, codes } = piece;
        let Scratch { steps, low, high, .. } = scratch;
        let mut sums = Sums::default();
        if columns == 1 {
            low.resize(range.len(), 0.0);
            high.resize(range.len(), 0.0);
            let parts: Vec<_> = bands.stretches(range.clone()).collect();
            for (own, values) in &parts {
                wide::group_extremes(&mut low[own.clone()], &mut high[own.clone()], &x[values.clone()], bands.size);
            }
            params(low, high, scales, zeros);
            for (own, values) in parts {
                let (scales, zeros) = (&scales[own.clone()], &zeros[own]);
                let x = &x[values.clone()];
                wide::encode_groups(&mut codes[values], x, bands.size, encoding, scales, zeros, &mut sums);
            }
            return (Vec::<()>::new(), sums);
        }
        low.resize(COLUMNS.min(columns), 0.0);
        high.resize(COLUMNS.min(columns), 0.0);
        let from = bands.start(range.start);
        let each = scales.chunks_exact_mut(columns).zip(zeros.chunks_exact_mut(columns));
        for ((scales, zeros), at) in each.zip(range) {
            let now = bands.start(at) - from..bands.start(at + 1) - from;
            let (x, codes) = (&x[now.clone()], &mut codes[now]);
            for first in (0..columns).step_by(COLUMNS) {
                let now = first..columns.min(first + COLUMNS);
                let (low, high) = (&mut low[..now.len()], &mut high[..now.len()]);
                low.fill(f32::INFINITY);
                high.fill(f32::NEG_INFINITY);
                x.chunks_exact(columns).for_each(|row| wide::widen(low, high, &row[now.clone()]));
                params(low, high, &mut scales[now.clone()], &mut zeros[now.clone()]);
                part(codes, x, encoding, &scales[now.clone()], &zeros[now.clone()], (columns, now), steps, &mut sums);
            }
        }
        (Vec::new(), sums)
    })?;
    Ok(coded)
}

/// [`qparams_from_range`](super::qparams_from_range) of pairs of finite bounds, bit for bit.
///
/// # Panics
/// If there are not as many of each.
pub fn params(spec: &RangeSpec, low: &[f32], high: &[f32], scales: &mut [f32], zero_points: &mut [i32]) {
    let plain = spec.format.is_integer()
        && spec.format != Format::Int32
        && !spec.power_of_two
        && spec.scale_dtype == ScaleDtype::Float32
        && spec.precision == Precision::Double
        && spec.eps <= 0.0;
    if plain {
        return wide::plain_params(spec, low, high, scales, zero_points);
    }
    let bounds = low.iter().zip(high);
    for ((&low, &high), (scale, zero)) in bounds.zip(scales.iter_mut().zip(zero_points)) {
        QParam { scale: *scale, zero_point: *zero } = super::qparams_from_range(low, high, spec);
    }
}

/// Codes at the scales and zero points that `choose` writes for each band, one each for every column of it. Bands are given in
/// any order, whole.
///
/// # Errors
/// As [`ranges`], and if a scale that was chosen cannot be divided by.
pub fn quantize_by<V: Values + ?Sized, T: Send>(
    values: &V,
    bands: &Bands,
    encoding: &Encoding,
    choose: impl Fn(Band<'_>, &mut [f32], &mut [i32]) -> T + Sync,
) -> Result<Coded<T>> {
    let columns = bands.columns;
    pieces(values, bands, encoding, |piece, scratch| {
        let Piece { bands: range, x, scales, zeros, codes } = piece;
        let mut sums = Sums::default();
        let mut said = Vec::with_capacity(range.len());
        let from = bands.start(range.start);
        let each = scales.chunks_exact_mut(columns).zip(zeros.chunks_exact_mut(columns));
        for ((scales, zeros), at) in each.zip(range) {
            let now = bands.start(at) - from..bands.start(at + 1) - from;
            said.push(choose(Band { values: &x[now.clone()], columns }, scales, zeros));
            band(&mut codes[now.clone()], &x[now], encoding, scales, zeros, &mut scratch.steps, &mut sums);
        }
        (said, sums)
    })
}

/// What was chosen for a group whose zero point may be fractional.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Between<T> {
    /// Size of a step; positive.
    pub scale: f32,
    /// What stands for zero, in codes.
    pub zero_point: f32,
    /// Anything else.
    pub said: T,
}

/// Codes that `choose` writes for the values of each group, a byte each, beside scale and zero point. What it chose is in
/// [`Coded::said`], in the order of the scales; the zero points of [`Coded::qparams`] are the nearest codes.
///
/// # Errors
/// As [`quantize_by`].
pub fn quantize_between<V: Values + ?Sized, T: Send>(
    values: &V,
    bands: &Bands,
    encoding: &Encoding,
    choose: impl Fn(&[f32], &mut [u8]) -> Between<T> + Sync,
) -> Result<Coded<Between<T>>> {
    let columns = bands.columns;
    let (low, high) = encoding.format.range();
    pieces(values, bands, encoding, |piece, _| {
        let Piece { bands: range, x, scales, zeros, codes } = piece;
        let mut said = Vec::with_capacity(scales.len());
        let (mut signal, mut noise) = (0.0, 0.0);
        let (mut buffer, mut group) = (Vec::new(), Vec::new());
        let from = bands.start(range.start);
        for at in range {
            let now = bands.start(at) - from..bands.start(at + 1) - from;
            let band = Band { values: &x[now.clone()], columns };
            let codes = &mut codes[now];
            for column in 0..columns {
                let values = if columns == 1 { band.values } else { band.column(column, &mut buffer) };
                group.clear();
                group.resize(values.len(), 0);
                let found = choose(values, &mut group);
                let of_column = codes.iter_mut().skip(column).step_by(columns);
                for ((out, &code), &x) in of_column.zip(&group).zip(values) {
                    *out = code;
                    let error = f64::from(x) - f64::from((f32::from(code) - found.zero_point) * found.scale);
                    signal += f64::from(x) * f64::from(x);
                    noise += error * error;
                }
                scales[said.len()] = found.scale;
                zeros[said.len()] = (found.zero_point.round_ties_even() as i32).clamp(low, high);
                said.push(found);
            }
        }
        let mut sums = Sums::default();
        (sums.signal[0], sums.noise[0]) = (signal, noise);
        (said, sums)
    })
}

/// Some bands, with what becomes of them.
struct Piece<'a> {
    /// Which.
    bands: std::ops::Range<usize>,
    x: &'a [f32],
    scales: &'a mut [f32],
    zeros: &'a mut [i32],
    /// Codes, a byte each.
    codes: &'a mut [u8],
}

/// Works on pieces in parallel, packs their codes, and adds up what they say in their order.
fn pieces<V: Values + ?Sized, T: Send>(
    values: &V,
    bands: &Bands,
    encoding: &Encoding,
    work: impl Fn(Piece<'_>, &mut Scratch) -> (Vec<T>, Sums) + Sync,
) -> Result<Coded<T>> {
    check_count(values, bands)?;
    let (bits, columns) = (encoding.format.bits(), bands.columns);
    let mut codes = vec![0; pack::packed_len(bands.len(), bits)];
    let (mut scales, mut zero_points) = (vec![0.0; bands.entries()], vec![0; bands.entries()]);
    let mut parts = Vec::new();
    let (mut codes_left, mut scales_left, mut zeros_left) = (&mut *codes, &mut *scales, &mut *zero_points);
    for piece in bands.pieces(bits) {
        let len = bands.start(piece.end) - bands.start(piece.start);
        let entries = piece.len() * columns;
        let (codes, more) = codes_left.split_at_mut(pack::packed_len(len, bits));
        codes_left = more;
        let (scales, more) = scales_left.split_at_mut(entries);
        scales_left = more;
        let (zeros, more) = zeros_left.split_at_mut(entries);
        zeros_left = more;
        parts.push((piece, codes, scales, zeros));
    }
    let found: Vec<Result<_>> = parts
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (range, out, scales, zeros)| {
            let from = bands.start(range.start);
            let len = bands.start(range.end) - from;
            let (mut codes, mut buffer) = (std::mem::take(&mut scratch.codes), std::mem::take(&mut scratch.buffer));
            codes.resize(len, 0);
            let found = with(values, from, len, &mut buffer, |x| {
                let piece = Piece { bands: range, x, scales: &mut *scales, zeros: &mut *zeros, codes: &mut codes };
                work(piece, scratch)
            });
            pack::pack_bytes_into(&codes, bits, out);
            (scratch.codes, scratch.buffer) = (codes, buffer);
            let (said, sums) = found?;
            check_magnitudes(scales, encoding)?;
            Ok((said, sums.total()))
        })
        .collect();
    let (mut signal, mut noise, mut said) = (0.0, 0.0, Vec::new());
    for found in found {
        let (more, sums) = found?;
        said.extend(more);
        signal += sums.0;
        noise += sums.1;
    }
    Ok(Coded { codes, qparams: QParams { scales, zero_points }, signal, noise, said })
}

/// The codes of finite values one by one, as [`Encoding::code`] has them, of any granularity.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if the sizes do not fit together.
pub fn encode_singly(
    values: &[f32],
    dims: &[usize],
    granularity: &Granularity,
    encoding: &Encoding,
    qparams: &QParams,
) -> Result<Vec<i32>> {
    let grid = Grid::new(dims, granularity)?;
    grid.check(values.len(), dims, encoding.format, qparams)?;
    let QParams { scales, zero_points } = qparams;
    let mut codes = Vec::with_capacity(values.len());
    for run in grid.runs(0, values.len()) {
        for at in 0..run.len() {
            let entry = match run {
                Run::Same { len: _, entry } => entry,
                Run::Each { len: _, first } => first + at,
            };
            codes.push(encoding.code(values[codes.len()], scales[entry], zero_points[entry]));
        }
    }
    Ok(codes)
}

/// Smallest and largest of finite values, infinities the wrong way round where there is none.
pub fn extremes(x: &[f32]) -> (f32, f32) {
    wide::extremes(x)
}

/// Writes `code − zero_point` of each finite value.
pub fn levels(out: &mut [f32], x: &[f32], encoding: &Encoding, scale: f32, zero_point: i32) {
    wide::levels(out, x, encoding, scale, zero_point);
}

/// What a thread works in.
#[derive(Default)]
struct Scratch {
    codes: Vec<u8>,
    buffer: Vec<f32>,
    steps: Steps,
    low: Vec<f32>,
    high: Vec<f32>,
}

/// Sums of squares: of the values, and of their errors.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) signal: [f64; wide::LANES],
    pub(super) noise: [f64; wide::LANES],
}

impl Sums {
    fn total(&self) -> (f64, f64) {
        (self.signal.iter().sum(), self.noise.iter().sum())
    }
}

/// Writes the codes of one band, or of some rows of it, and adds up their errors.
fn band(
    codes: &mut [u8],
    x: &[f32],
    encoding: &Encoding,
    scales: &[f32],
    zero_points: &[i32],
    steps: &mut Steps,
    sums: &mut Sums,
) {
    let columns = scales.len();
    if columns == 1 {
        wide::encode(codes, x, encoding, scales[0], zero_points[0], sums);
        return;
    }
    for first in (0..columns).step_by(COLUMNS) {
        let now = first..columns.min(first + COLUMNS);
        let (scales, zeros) = (&scales[now.clone()], &zero_points[now.clone()]);
        part(codes, x, encoding, scales, zeros, (columns, now), steps, sums);
    }
}

/// Writes the codes of some columns of rows that have more.
#[allow(clippy::too_many_arguments, reason = "each is another thing")]
fn part(
    codes: &mut [u8],
    x: &[f32],
    encoding: &Encoding,
    scales: &[f32],
    zero_points: &[i32],
    (columns, now): (usize, std::ops::Range<usize>),
    steps: &mut Steps,
    sums: &mut Sums,
) {
    steps.set(encoding, scales, zero_points);
    for (codes, x) in codes.chunks_exact_mut(columns).zip(x.chunks_exact(columns)) {
        wide::encode_each(&mut codes[now.clone()], &x[now.clone()], encoding.coding, steps, sums);
    }
}

/// Widens bounds, one per column, by rows.
fn widen(low: &mut [f32], high: &mut [f32], x: &[f32], columns: usize) {
    if let ([low], [high]) = (&mut *low, &mut *high) {
        (*low, *high) = wide::extremes(x);
        return;
    }
    x.chunks_exact(columns).for_each(|row| wide::widen(low, high, row));
}

/// Shows `see` the values of a piece.
fn with<V: Values + ?Sized, T>(
    values: &V,
    start: usize,
    len: usize,
    buffer: &mut Vec<f32>,
    see: impl FnOnce(&[f32]) -> T,
) -> Result<T> {
    let x = if let Some(slice) = values.slice(start, len) {
        slice
    } else {
        buffer.resize(len, 0.0);
        values.read(start, buffer);
        &*buffer
    };
    if !kernels::is_finite(x) {
        let at = x.iter().position(|value| !value.is_finite()).unwrap_or_default();
        return Err(Error::model(format!("element {} is {}, which cannot be quantized", start + at, x[at])));
    }
    Ok(see(x))
}

fn check_count<V: Values + ?Sized>(values: &V, bands: &Bands) -> Result<()> {
    if values.count() == bands.len() {
        return Ok(());
    }
    Err(Error::model(format!("{} elements where the shape has {}", values.count(), bands.len())))
}

/// Checks that scales are numbers that can divide: positive, except where a coding knows others.
fn check_magnitudes(scales: &[f32], encoding: &Encoding) -> Result<()> {
    let zero = matches!(encoding.coding, Coding::MlasSum | Coding::MlasQuotient);
    match scales.iter().find(|scale| !(scale.is_normal() || (zero && **scale == 0.0))) {
        Some(&scale) => check_scales(&[scale.abs()])
            .and_then(|()| Err(Error::model(format!("scale {scale} is too small to divide by")))),
        None => Ok(()),
    }
}
