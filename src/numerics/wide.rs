//! The loops of [`blocks`](super::blocks), compiled twice: for every CPU of the architecture, and for the wider vectors that
//! most have. The arithmetic is the same, operation by operation, and so are the bits: nothing is fused or reordered.

use super::blocks::{Encoding, Sums};
use super::{Coding, RangeSpec, Round, Symmetry};

/// Independent sums, enough for the loop over them to vectorize.
pub(super) const LANES: usize = 16;

/// Adding 1.5 · 2²³ to a number below 2²² leaves its nearest integer, half to even, in the low bits of the sum.
const MAGIC: f32 = 12_582_912.0;
/// The same for f64 and numbers below 2⁵¹: 1.5 · 2⁵².
const WIDE_MAGIC: f64 = 6_755_399_441_055_744.0;

/// Declares functions that are compiled for AVX2 as well, and choose by the CPU they run on.
macro_rules! multiversion {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block)*) => {
        $($(#[$doc])*
        #[inline]
        pub(super) fn $name($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            #[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
            fn body($($arg: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $out)? {
                    body($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    #[allow(unsafe_code, reason = "the CPU has the feature")]
                    // SAFETY: just looked.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        })*
    };
}

/// What the columns of a band are coded with.
#[derive(Default)]
pub(super) struct Steps {
    /// The scale, or its reciprocal.
    factor: Vec<f32>,
    /// What is added before rounding.
    add: Vec<f32>,
    low: Vec<f32>,
    high: Vec<f32>,
    /// What is added after rounding.
    offset: Vec<i32>,
    scale: Vec<f32>,
}

/// [`Steps`] of one column.
#[derive(Clone, Copy)]
struct Step {
    factor: f32,
    add: f32,
    low: f32,
    high: f32,
    offset: i32,
    scale: f32,
}

impl Step {
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
    fn new(encoding: &Encoding, scale: f32, zero_point: i32) -> Self {
        let (qmin, qmax) = encoding.codes;
        let (factor, offset) = match encoding.coding {
            Coding::Divided(_) => (scale, zero_point),
            Coding::Reciprocal | Coding::MlasQuotient => (reciprocal(scale), zero_point),
            Coding::MlasSum => (reciprocal(scale), encoding.format.range().0),
        };
        Self {
            factor,
            add: (zero_point - offset) as f32,
            low: (qmin - offset) as f32,
            high: (qmax - offset) as f32,
            offset,
            scale,
        }
    }
}

fn reciprocal(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

impl Steps {
    pub(super) fn set(&mut self, encoding: &Encoding, scales: &[f32], zero_points: &[i32]) {
        let Self { factor, add, low, high, offset, scale } = self;
        for column in [&mut *factor, &mut *add, &mut *low, &mut *high, &mut *scale] {
            column.resize(scales.len(), 0.0);
        }
        offset.resize(scales.len(), 0);
        for (at, (&own, &zero)) in scales.iter().zip(zero_points).enumerate() {
            let step = Step::new(encoding, own, zero);
            (factor[at], add[at], low[at], high[at]) = (step.factor, step.add, step.low, step.high);
            (offset[at], scale[at]) = (step.offset, step.scale);
        }
    }
}

/// `x` clamped, as one `max` and one `min`; there is no NaN.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn clamped(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn rne(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

/// Half away from zero: to even, and one further where that went towards zero from exactly between two.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
#[allow(clippy::float_cmp, reason = "exactly between two")]
fn away(x: f32) -> f32 {
    let near = rne(x);
    let rest = x - near;
    let up = if rest == 0.5 && x > 0.0 { 1.0 } else { 0.0 };
    let down = if rest == -0.5 && x < 0.0 { 1.0 } else { 0.0 };
    near + up - down
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn floor(x: f32) -> f32 {
    let near = rne(x);
    near - if near > x { 1.0 } else { 0.0 }
}

/// The code of a rounded number of small magnitude.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn whole(x: f32) -> i32 {
    (x + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

/// Columns that have their own steps, side by side.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn each(codes: &mut [u8], y: &mut [f32], x: &[f32], steps: &Steps, quotient: impl Fn(f32, f32, f32, f32, f32) -> f32) {
    let Steps { factor, add, low, high, offset, scale } = steps;
    let count = x.len();
    let (codes, y) = (&mut codes[..count], &mut y[..count]);
    let (factor, add, low, high) = (&factor[..count], &add[..count], &low[..count], &high[..count]);
    let (offset, scale) = (&offset[..count], &scale[..count]);
    for at in 0..count {
        let rounded = quotient(x[at], factor[at], add[at], low[at], high[at]);
        codes[at] = whole(rounded).wrapping_add(offset[at]) as u8;
        y[at] = (rounded - add[at]) * scale[at];
    }
}

/// One step for all.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn same(codes: &mut [u8], y: &mut [f32], x: &[f32], step: Step, quotient: impl Fn(f32, f32, f32, f32, f32) -> f32) {
    let Step { factor, add, low, high, offset, scale } = step;
    for ((code, y), &x) in codes.iter_mut().zip(y).zip(x) {
        let rounded = quotient(x, factor, add, low, high);
        *code = whole(rounded).wrapping_add(offset) as u8;
        *y = (rounded - add) * scale;
    }
}

/// Groups with a step for each.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn groups(
    codes: &mut [u8],
    x: &[f32],
    (size, encoding, scales, zero_points): (usize, &Encoding, &[f32], &[i32]),
    sums: &mut Sums,
    quotient: impl Fn(f32, f32, f32, f32, f32) -> f32,
) {
    let mut y = [0.0; 256];
    let groups = codes.chunks_mut(size).zip(x.chunks(size));
    for ((codes, x), (&scale, &zero)) in groups.zip(scales.iter().zip(zero_points)) {
        let step = Step::new(encoding, scale, zero);
        for (codes, x) in codes.chunks_mut(y.len()).zip(x.chunks(y.len())) {
            let y = &mut y[..x.len()];
            same(codes, y, x, step, &quotient);
            squares(x, y, sums);
        }
    }
}

/// Smallest and largest of finite elements.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn bounds(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let mut add = |x: &[f32]| {
        for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(x) {
            *low = if x < *low { x } else { *low };
            *high = if x > *high { x } else { *high };
        }
    };
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        add(x);
    }
    add(rest);
    let least = |a: f32, b: f32| if b < a { b } else { a };
    let most = |a: f32, b: f32| if b > a { b } else { a };
    (low.into_iter().fold(f32::INFINITY, least), high.into_iter().fold(f32::NEG_INFINITY, most))
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn steps_from_zero(out: &mut [f32], x: &[f32], step: Step, quotient: impl Fn(f32, f32, f32, f32, f32) -> f32) {
    let Step { factor, add, low, high, offset: _, scale: _ } = step;
    for (out, &x) in out.iter_mut().zip(x) {
        *out = quotient(x, factor, add, low, high) - add;
    }
}

/// Adds up squares of `x` and of `x − y`.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it has to be compiled with the caller's vectors")]
fn squares(x: &[f32], y: &[f32], sums: &mut Sums) {
    let Sums { signal, noise } = sums;
    let mut add = |x: &[f32], y: &[f32]| {
        for (((signal, noise), &x), &y) in signal.iter_mut().zip(&mut *noise).zip(x).zip(y) {
            let (x, y) = (f64::from(x), f64::from(y));
            *signal += x * x;
            *noise += (x - y) * (x - y);
        }
    };
    let (whole, rest) = x.as_chunks::<LANES>();
    let (whole_y, rest_y) = y.as_chunks::<LANES>();
    for (x, y) in whole.iter().zip(whole_y) {
        add(x, y);
    }
    add(rest, rest_y);
}

/// Calls a loop with the quotient of a coding.
macro_rules! by_coding {
    ($coding:expr, $loop:ident($($arg:expr),*)) => {
        match $coding {
            Coding::Divided(Round::HalfEven) => $loop($($arg),*, |x, s, _, low, high| rne(clamped(x / s, low, high))),
            Coding::Divided(Round::HalfAway) => $loop($($arg),*, |x, s, _, low, high| away(clamped(x / s, low, high))),
            Coding::Divided(Round::Floor) => $loop($($arg),*, |x, s, _, low, high| floor(clamped(x / s, low, high))),
            Coding::Reciprocal => $loop($($arg),*, |x, r, _, low, high| rne(clamped(x * r, low, high))),
            Coding::MlasQuotient => $loop($($arg),*, |x, r, _, low, high| away(clamped(x * r, low, high))),
            Coding::MlasSum => $loop($($arg),*, |x, r, z, low, high| away(clamped(x * r + z, low, high))),
        }
    };
}

multiversion! {
    /// Codes of elements with one scale.
    fn encode(codes: &mut [u8], x: &[f32], encoding: &Encoding, scale: f32, zero_point: i32, sums: &mut Sums) {
        let step = Step::new(encoding, scale, zero_point);
        let mut y = [0.0; 256];
        for (codes, x) in codes.chunks_mut(y.len()).zip(x.chunks(y.len())) {
            let y = &mut y[..x.len()];
            by_coding!(encoding.coding, same(codes, y, x, step));
            squares(x, y, sums);
        }
    }

    /// Codes of groups of `size` elements, the last of which may be shorter, with a scale for each.
    fn encode_groups(
        codes: &mut [u8],
        x: &[f32],
        size: usize,
        encoding: &Encoding,
        scales: &[f32],
        zero_points: &[i32],
        sums: &mut Sums,
    ) {
        by_coding!(encoding.coding, groups(codes, x, (size, encoding, scales, zero_points), sums));
    }

    /// Smallest and largest of finite elements in groups of `size`, the last of which may be shorter.
    fn group_extremes(low: &mut [f32], high: &mut [f32], x: &[f32], size: usize) {
        for ((low, high), x) in low.iter_mut().zip(high).zip(x.chunks(size)) {
            (*low, *high) = bounds(x);
        }
    }

    /// What [`qparams_from_range`](super::qparams_from_range) makes of bounds, of integers in f64 and of f32 scales, with
    /// nothing asked of these.
    fn plain_params(spec: &RangeSpec, low: &[f32], high: &[f32], scales: &mut [f32], zero_points: &mut [i32]) {
        let (qmin, qmax) = spec.codes();
        let (first, last) = (f64::from(qmin), f64::from(qmax));
        let middle = (qmin + qmax + 1).div_euclid(2);
        let none = 0.max(qmin);
        let steps = last - first;
        let (half, below) = (steps / 2.0, f64::from(middle - qmin));
        let normal = f64::from(f32::MIN_POSITIVE);
        let all = low.iter().zip(high).zip(scales.iter_mut().zip(zero_points));
        // The largest f32 over one of its halves has a quotient that f32 still holds.
        match spec.symmetry {
            Symmetry::Symmetric => {
                for ((&low, &high), (scale, zero)) in all {
                    let amax = f64::from(high.max(0.0)).max(-f64::from(low.min(0.0)));
                    let exact = amax / half;
                    let rounded = exact as f32;
                    *scale = if exact < normal { 1.0 } else { rounded };
                    *zero = if exact < normal { none } else { middle };
                }
            }
            Symmetry::Signed => {
                for ((&low, &high), (scale, zero)) in all {
                    let (low, high) = (f64::from(low.min(0.0)), f64::from(high.max(0.0)));
                    let exact = high.max(-low) / below;
                    let rounded = exact as f32;
                    let signed = if high <= -low { rounded } else { -rounded };
                    *scale = if exact < normal { 1.0 } else { signed };
                    *zero = if exact < normal { none } else { middle };
                }
            }
            Symmetry::Asymmetric => {
                for ((&low, &high), (scale, zero)) in all {
                    let (low, high) = (f64::from(low.min(0.0)), f64::from(high.max(0.0)));
                    let exact = (high - low) / steps;
                    let rounded = (exact.min(f64::from(f32::MAX))) as f32;
                    let near = first - low / exact;
                    let near = if near > first { near } else { first };
                    let near = if near < last { near } else { last };
                    *scale = if exact < normal { 1.0 } else { rounded };
                    // As `whole`, of f64.
                    let code = (near + WIDE_MAGIC).to_bits().wrapping_sub(WIDE_MAGIC.to_bits()) as i32;
                    *zero = if exact < normal { none } else { code };
                }
            }
        }
    }

    /// How many steps elements are from zero.
    fn levels(out: &mut [f32], x: &[f32], encoding: &Encoding, scale: f32, zero_point: i32) {
        let step = Step::new(encoding, scale, zero_point);
        by_coding!(encoding.coding, steps_from_zero(out, x, step));
    }

    /// Codes of elements with a scale for each.
    fn encode_each(codes: &mut [u8], x: &[f32], coding: Coding, steps: &Steps, sums: &mut Sums) {
        let mut y = [0.0; super::blocks::COLUMNS];
        let y = &mut y[..x.len()];
        by_coding!(coding, each(codes, y, x, steps));
        squares(x, y, sums);
    }

    /// Lowers and raises bounds to the finite element at the same index.
    fn widen(low: &mut [f32], high: &mut [f32], x: &[f32]) {
        for ((low, high), &x) in low.iter_mut().zip(high).zip(x) {
            *low = if x < *low { x } else { *low };
            *high = if x > *high { x } else { *high };
        }
    }

    /// `Σ (x − y)²`.
    fn squared_error(x: &[f32], y: &[f32]) -> f64 {
        let mut sums = Sums::default();
        squares(x, y, &mut sums);
        sums.noise.iter().sum()
    }

    /// Smallest and largest of finite elements.
    fn extremes(x: &[f32]) -> (f32, f32) {
        bounds(x)
    }
}
