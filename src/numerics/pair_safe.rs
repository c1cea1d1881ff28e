//! 8-bit weights that cannot saturate the 16-bit pair sums of x86 without VNNI.
//!
//! `vpmaddubsw` multiplies unsigned activations by signed weights and adds neighbours, `a[2p]·w[2p] + a[2p+1]·w[2p+1]`, in 16 bits
//! with saturation. With activations up to 255 that is exact exactly if `|w[2p] + w[2p+1]| ≤ 128` in every pair of equal
//! sign: `255 · 128 = 32640`. Limiting each weight to ±64 also suffices, but costs a bit; limiting the pairs
//! costs a fraction of one.
//!
//! Per output channel there is a trade: the scale `amax / 127` leaves some pairs too large, which must then be projected onto
//! `|q₀ + q₁| = 128`, and the scale at which no pair is too large makes every other weight coarser. Between both lies
//! the scale of least squared error; it is found from the convex model `K s² / 12 + Σ max(|w₀ + w₁| − 128 s, 0)² / 2` (rounding noise plus
//! projection loss, solved exactly over its sorted breakpoints), and then the real error decides between it and the ends.
//!
//! Pairs are `(0, 1), (2, 3), …` from the start of the reduction: along K for MatMul and Gemm, along kernel height, kernel
//! width, input channel for Conv. Depthwise Conv has its own kernel, which does not saturate.

use rayon::prelude::*;

use super::{Format, kernels};
use crate::error::{Error, Result};

/// The largest magnitude of the sum of a pair.
pub const MAX_PAIR_SUM: i32 = 128;

const MAX_CODE: i32 = 127;

/// How a weight tensor is reduced: which elements make an output channel, and in which order they are multiplied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    channels: usize,
    /// Storage position of each element of channel 0, in kernel order.
    order: Vec<usize>,
    /// Distance in storage from one channel to the next.
    stride: usize,
    /// Pairs do not reach from one run of this many elements into the next.
    segment: usize,
}

impl Layout {
    /// A Conv weight, `[out, in / group, kernel…]`.
    ///
    /// # Errors
    /// [`Kind::Model`](crate::error::Kind::Model) if there are fewer than 3 extents, or more elements than can be addressed.
    pub fn conv(dims: &[usize]) -> Result<Self> {
        if dims.len() < 3 {
            return Err(Error::model(format!("a convolution weight has at least 3 dimensions, not shape {dims:?}")));
        }
        let order = if is_empty(dims)? { Vec::new() } else { conv_row_order(dims) };
        Ok(Self { channels: dims[0], stride: order.len(), segment: order.len(), order })
    }

    /// A right-hand side of MatMul or Gemm, `[…, K, N]`, with a channel for each of the N columns. Leading extents are
    /// separate products that share it.
    ///
    /// # Errors
    /// [`Kind::Model`](crate::error::Kind::Model) if there are fewer than 2 extents, or more elements than can be addressed.
    pub fn matmul(dims: &[usize]) -> Result<Self> {
        let [batch @ .., depth, columns] = dims else {
            return Err(Error::model(format!("a matrix has at least 2 dimensions, not shape {dims:?}")));
        };
        let rows = if is_empty(dims)? { 0 } else { batch.iter().product::<usize>() * depth };
        let order = (0..rows).map(|row| row * columns).collect();
        Ok(Self { channels: *columns, order, stride: 1, segment: *depth })
    }

    /// A Gemm weight with `transB = 1`, `[N, K]`, with a channel for each of the N rows.
    ///
    /// # Errors
    /// [`Kind::Model`](crate::error::Kind::Model) if there are not 2 extents, or more elements than can be addressed.
    pub fn transposed(dims: &[usize]) -> Result<Self> {
        let &[channels, depth] = dims else {
            return Err(Error::model(format!("a transposed matrix has 2 dimensions, not shape {dims:?}")));
        };
        let order = if is_empty(dims)? { Vec::new() } else { (0..depth).collect() };
        Ok(Self { channels, stride: depth, segment: depth, order })
    }

    /// Output channels: the number of scales.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// One channel of `weight` in kernel order; `channel` is below [`channels`](Self::channels) and `weight` has the shape that the
    /// layout was made for.
    pub fn row<T: Copy>(&self, weight: &[T], channel: usize) -> Vec<T> {
        self.order.iter().map(|position| weight[channel * self.stride + position]).collect()
    }

    /// [`row`](Self::row) for every channel.
    fn rows(&self, weight: &[f32]) -> Vec<Vec<f32>> {
        let mut rows = vec![vec![0.0; self.order.len()]; self.channels];
        self.for_each_element(|channel, at, position| rows[channel][at] = weight[position]);
        rows
    }

    /// Calls `visit` with channel, place in the channel and storage position, nearby positions together.
    fn for_each_element(&self, mut visit: impl FnMut(usize, usize, usize)) {
        // Where neighbours in storage belong to different channels, so many channels go side by side.
        let tile = if self.stride == 1 { 16 } else { 1 };
        for first in (0..self.channels).step_by(tile) {
            let channels = first..self.channels.min(first + tile);
            for (at, position) in self.order.iter().enumerate() {
                for channel in channels.clone() {
                    visit(channel, at, channel * self.stride + position);
                }
            }
        }
    }

    fn check(&self, elements: usize) -> Result<()> {
        if Some(elements) == self.channels.checked_mul(self.order.len()) {
            return Ok(());
        }
        let (channels, len) = (self.channels, self.order.len());
        Err(Error::model(format!("{elements} elements do not fill {channels} channels of {len}")))
    }
}

/// Whether a tensor of this shape has no elements.
fn is_empty(dims: &[usize]) -> Result<bool> {
    let elements = dims.iter().try_fold(1_usize, |product, &extent| product.checked_mul(extent));
    match elements {
        _ if dims.contains(&0) && dims.iter().all(|&extent| extent <= super::grid::MAX_EMPTY_ENTRIES) => Ok(true),
        Some(0) => Err(Error::model(format!("a tensor of shape {dims:?} has no elements but very many channels"))),
        Some(_) => Ok(false),
        None => Err(Error::model(format!("a tensor of shape {dims:?} has more elements than can be addressed"))),
    }
}

/// For one output channel of a Conv weight `[out, in, kernel…]`: the position of each element, stored as `[in, kernel…]`, in the
/// order of the reduction, which has the input channel innermost.
pub fn conv_row_order(dims: &[usize]) -> Vec<usize> {
    let inputs = dims.get(1).copied().unwrap_or(1);
    let kernel: usize = dims.iter().skip(2).product();
    (0..kernel).flat_map(|at| (0..inputs).map(move |input| input * kernel + at)).collect()
}

/// The smallest scale of each row at which plain rounding keeps every pair safe: `max(amax, max |w₀ + w₁| over pairs of equal sign) / 127`.
///
/// Rows are in kernel order, one for each output channel, finite. An all-zero row gets scale 1.
pub fn channel_scales<'a>(rows: impl IntoIterator<Item = &'a [f32]>) -> Vec<f32> {
    rows.into_iter().map(|row| scale_of(amax(row).max(max_pair_sum(row, row.len())))).collect()
}

/// The scale and the codes (−127…127) of one row in kernel order that are [safe](is_safe) and have the least squared error known here.
///
/// Where no pair is too large these are `amax / 127` and plain rounding. `row` is finite; an all-zero row gets scale 1.
pub fn quantize_row(row: &[f32]) -> (f32, Vec<i8>) {
    quantize_segments(row, row.len())
}

/// The [safe](is_safe) codes of one row in kernel order at a given scale: plain rounding, the pairs that are too large projected.
pub fn quantize_row_at(row: &[f32], scale: f32) -> Vec<i8> {
    Candidate::new(row, row.len(), scale).codes
}

/// Whether no pair of adjacent codes, aligned to the start, can saturate.
pub fn is_safe(codes: &[i8]) -> bool {
    codes.chunks(2).all(|pair| pair.iter().map(|&code| i32::from(code)).sum::<i32>().abs() <= MAX_PAIR_SUM)
}

/// [`quantize_row`] for every channel of a weight tensor: the scales, and the codes at the positions of their weights.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if `weight` does not have as many elements as the layout, or holds NaN or infinities.
pub fn quantize(weight: &[f32], layout: &Layout) -> Result<(Vec<f32>, Vec<i8>)> {
    layout.check(weight.len())?;
    if let Some(at) = weight.iter().position(|value| !value.is_finite()) {
        return Err(Error::model(format!(
            "element {at} is {}, which cannot be quantized to {}",
            weight[at],
            Format::Int8
        )));
    }
    let rows = layout.rows(weight);
    let channels: Vec<(f32, Vec<i8>)> = rows.par_iter().map(|row| quantize_segments(row, layout.segment)).collect();
    let mut codes = vec![0; weight.len()];
    layout.for_each_element(|channel, at, position| codes[position] = channels[channel].1[at]);
    Ok((channels.into_iter().map(|(scale, _)| scale).collect(), codes))
}

/// Whether the codes of a weight tensor are [safe](is_safe) in every channel.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model) if `codes` does not have as many elements as the layout.
pub fn is_safe_tensor(codes: &[i8], layout: &Layout) -> Result<bool> {
    layout.check(codes.len())?;
    let is_safe_row = |row: &[i8]| row.chunks(layout.segment.max(1)).all(is_safe);
    Ok((0..layout.channels).all(|channel| is_safe_row(&layout.row(codes, channel))))
}

fn quantize_segments(row: &[f32], segment: usize) -> (f32, Vec<i8>) {
    let (amax, pair_sum) = (amax(row), max_pair_sum(row, segment));
    let (finest, coarsest) = (scale_of(amax), scale_of(amax.max(pair_sum)));
    let mut best = Candidate::new(row, segment, finest);
    if coarsest <= finest {
        return (best.scale, best.codes);
    }
    let bounded = |scale: f64| (scale as f32).clamp(finest, coarsest);
    let model = bounded(least_modelled_error(row, segment, finest));
    let unprojected = bounded(pair_sum / f64::from(MAX_PAIR_SUM));
    for scale in [model, unprojected, coarsest] {
        let candidate = Candidate::new(row, segment, scale);
        if candidate.error < best.error {
            best = candidate;
        }
    }
    (best.scale, best.codes)
}

/// A row quantized with one scale.
struct Candidate {
    scale: f32,
    codes: Vec<i8>,
    /// Squared error.
    error: f64,
}

impl Candidate {
    fn new(row: &[f32], segment: usize, scale: f32) -> Self {
        let mut codes = vec![0_i8; row.len()];
        kernels::int_codes(&mut codes, row, scale, 0, (-MAX_CODE, MAX_CODE));
        for (codes, weights) in codes.chunks_mut(segment.max(1)).zip(row.chunks(segment.max(1))) {
            let (pairs, weights) = (codes.as_chunks_mut::<2>().0, weights.as_chunks::<2>().0);
            for (pair, weights) in pairs.iter_mut().zip(weights) {
                let sum = i16::from(pair[0]).wrapping_add(i16::from(pair[1]));
                if i32::from(sum.wrapping_abs()) > MAX_PAIR_SUM {
                    *pair = project(weights.map(|weight| f64::from(weight / scale)));
                }
            }
        }
        let error = squared_error(row, &codes, scale);
        Self { scale, codes, error }
    }
}

/// The codes nearest to a pair of equal sign among those with `|q₀ + q₁| = 128`.
pub(crate) fn project([first, second]: [f64; 2]) -> [i8; 2] {
    let sign = if first < 0.0 { -1 } else { 1 };
    let difference = f64::from(sign) * (first - second);
    // Half the sum plus a half: the cast, towards zero, then rounds a positive number to the nearest.
    let code = ((64.5 + difference / 2.0) as i32).clamp(MAX_PAIR_SUM - MAX_CODE, MAX_CODE);
    [(sign * code) as i8, (sign * (MAX_PAIR_SUM - code)) as i8]
}

/// The scale at which `K s² / 12 + Σ max(S − 128 s, 0)² / 2` is least, `S` being the sums of pairs of equal sign that are too large
/// for `finest`.
fn least_modelled_error(row: &[f32], segment: usize, finest: f32) -> f64 {
    let limit = f64::from(MAX_PAIR_SUM);
    let rounding = row.len() as f64 / 6.0;
    let mut scale = f64::from(finest);
    let mut sums: Vec<f64> = pair_sums(row, segment).filter(|&sum| sum > limit * scale).collect();
    // Newton's method: the slope is linear between breakpoints, so that it ends once no sum leaves.
    while !sums.is_empty() {
        let before = sums.len();
        scale = limit * sums.iter().sum::<f64>() / (rounding + limit * limit * before as f64);
        sums.retain(|&sum| sum > limit * scale);
        if sums.len() == before {
            break;
        }
    }
    scale
}

/// `Σ (w − s q)²`.
fn squared_error(row: &[f32], codes: &[i8], scale: f32) -> f64 {
    // Independent sums, so that the loop over them vectorizes.
    let mut sums = [0.0; 32];
    for (row, codes) in row.chunks(sums.len()).zip(codes.chunks(sums.len())) {
        for ((sum, &weight), &code) in sums.iter_mut().zip(row).zip(codes) {
            let error = f64::from(weight) - f64::from(scale) * f64::from(code);
            *sum += error * error;
        }
    }
    sums.iter().sum()
}

/// Magnitudes of the sums of pairs of equal sign.
fn pair_sums(row: &[f32], segment: usize) -> impl Iterator<Item = f64> {
    row.chunks(segment.max(1)).flat_map(|segment| segment.as_chunks::<2>().0).map(|&[first, second]| {
        let same_sign = (first > 0.0 && second > 0.0) || (first < 0.0 && second < 0.0);
        if same_sign { (f64::from(first) + f64::from(second)).abs() } else { 0.0 }
    })
}

fn max_pair_sum(row: &[f32], segment: usize) -> f64 {
    pair_sums(row, segment).fold(0.0, f64::max)
}

fn amax(row: &[f32]) -> f64 {
    let extremes = super::min_max(row);
    if extremes.inf > 0 { f64::INFINITY } else { f64::from(extremes.max.max(-extremes.min)) }
}

/// `largest / 127`, or 1 where that is not a normal number.
fn scale_of(largest: f64) -> f32 {
    let scale = largest / f64::from(MAX_CODE);
    if scale < f64::from(f32::MIN_POSITIVE) { 1.0 } else { scale.min(f64::from(f32::MAX)) as f32 }
}
