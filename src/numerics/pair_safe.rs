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

use super::kernels;

/// The largest magnitude of the sum of a pair.
pub const MAX_PAIR_SUM: i32 = 128;

const MAX_CODE: i32 = 127;

/// Where the weights of each output channel lie, in the order in which the kernel multiplies them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Positions in the first row, from its start.
    order: Vec<usize>,
    /// Rows that lie side by side: each starts one element after the one before.
    beside: usize,
    /// Such bundles of rows, and their distance.
    bundles: usize,
    distance: usize,
}

impl Rows {
    /// Those of a Conv weight, `[out, in / group, kernel…]`.
    pub fn conv(dims: &[usize]) -> Self {
        let distance = dims.iter().skip(1).product();
        Self { order: conv_row_order(dims), beside: 1, bundles: dims.first().copied().unwrap_or(0), distance }
    }

    /// Those of a weight that is summed over an axis: a row for each place in all others.
    pub fn along(dims: &[usize], axis: usize) -> Self {
        let product = |dims: &[usize]| dims.iter().product::<usize>();
        let (depth, beside) = (dims[axis], product(&dims[axis + 1..]));
        let order = (0..depth).map(|k| k * beside).collect();
        Self { order, beside, bundles: product(&dims[..axis]), distance: depth * beside }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.bundles * self.beside
    }

    /// The positions of one of them, in order.
    pub fn positions(&self, row: usize) -> impl ExactSizeIterator<Item = usize> {
        let start = row / self.beside.max(1) * self.distance + row % self.beside.max(1);
        self.order.iter().map(move |at| start + at)
    }

    /// The elements of one of them.
    pub fn gather<T: Copy>(&self, row: usize, elements: &[T]) -> Vec<T> {
        self.positions(row).map(|at| elements[at]).collect()
    }
}

/// For one output channel of a Conv weight `[out, in, kernel…]`: the position of each element, stored as `[in, kernel…]`, in the
/// order of the reduction, which has the input channel innermost.
fn conv_row_order(dims: &[usize]) -> Vec<usize> {
    let inputs = dims.get(1).copied().unwrap_or(1);
    let kernel: usize = dims.iter().skip(2).product();
    (0..kernel).flat_map(|at| (0..inputs).map(move |input| input * kernel + at)).collect()
}

/// The scale and the codes (−127…127) of one row in kernel order that are [safe](is_safe) and have the least squared error known here.
///
/// Where no pair is too large these are `amax / 127` and plain rounding. `row` is finite; an all-zero row gets scale 1.
pub fn quantize_row(row: &[f32]) -> (f32, Vec<i8>) {
    let (amax, pair_sum) = (amax(row), max_pair_sum(row));
    let (finest, coarsest) = (scale_of(amax), scale_of(amax.max(pair_sum)));
    let mut best = Candidate::new(row, finest);
    if coarsest <= finest {
        return (best.scale, best.codes);
    }
    let bounded = |scale: f64| (scale as f32).clamp(finest, coarsest);
    let model = bounded(least_modelled_error(row, finest));
    let unprojected = bounded(pair_sum / f64::from(MAX_PAIR_SUM));
    for scale in [model, unprojected, coarsest] {
        let candidate = Candidate::new(row, scale);
        if candidate.error < best.error {
            best = candidate;
        }
    }
    (best.scale, best.codes)
}

/// The [safe](is_safe) codes of one row in kernel order at a given scale: plain rounding, the pairs that are too large projected.
pub fn quantize_row_at(row: &[f32], scale: f32) -> Vec<i8> {
    Candidate::new(row, scale).codes
}

/// Whether no pair of adjacent codes, aligned to the start, can saturate.
pub fn is_safe(codes: &[i8]) -> bool {
    codes.chunks(2).all(|pair| pair.iter().map(|&code| i32::from(code)).sum::<i32>().abs() <= MAX_PAIR_SUM)
}

/// A row quantized with one scale.
struct Candidate {
    scale: f32,
    codes: Vec<i8>,
    /// Squared error.
    error: f64,
}

impl Candidate {
    fn new(row: &[f32], scale: f32) -> Self {
        let mut codes = vec![0_i8; row.len()];
        kernels::int_codes(&mut codes, row, scale, 0, (-MAX_CODE, MAX_CODE));
        let (pairs, weights) = (codes.as_chunks_mut::<2>().0, row.as_chunks::<2>().0);
        for (pair, weights) in pairs.iter_mut().zip(weights) {
            let sum = i16::from(pair[0]).wrapping_add(i16::from(pair[1]));
            if i32::from(sum.wrapping_abs()) > MAX_PAIR_SUM {
                *pair = project(weights.map(|weight| f64::from(weight / scale)));
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
fn least_modelled_error(row: &[f32], finest: f32) -> f64 {
    let limit = f64::from(MAX_PAIR_SUM);
    let rounding = row.len() as f64 / 6.0;
    let mut scale = f64::from(finest);
    let mut sums: Vec<f64> = pair_sums(row).filter(|&sum| sum > limit * scale).collect();
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
fn pair_sums(row: &[f32]) -> impl Iterator<Item = f64> {
    row.as_chunks::<2>().0.iter().map(|&[first, second]| {
        let same_sign = (first > 0.0 && second > 0.0) || (first < 0.0 && second < 0.0);
        if same_sign { (f64::from(first) + f64::from(second)).abs() } else { 0.0 }
    })
}

fn max_pair_sum(row: &[f32]) -> f64 {
    pair_sums(row).fold(0.0, f64::max)
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
