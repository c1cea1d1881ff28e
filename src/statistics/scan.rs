//! Measures of a slice of floats in one pass, in loops that compilers vectorize.

/// Measures of a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scan {
    /// Number of values that are NaN or infinite. If there are any, all fields but the counts are meaningless.
    pub(super) non_finite: u64,
    /// Zeros of either sign.
    pub(super) zeros: u64,
    /// Negative zeros.
    pub(super) negative_zeros: u64,
    /// Infinity for an empty slice.
    pub(super) min: f32,
    /// Negative infinity for an empty slice.
    pub(super) max: f32,
    /// Bits of the smallest magnitude that is not zero.
    pub(super) smallest: u32,
    /// Bits of the largest magnitude.
    pub(super) largest: u32,
    /// Sum, in a fixed order of additions.
    pub(super) sum: f64,
    /// Sum of squares, likewise.
    pub(super) squares: f64,
}

/// The range of a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Whether a value is NaN or infinite. The ends are meaningless then.
    pub(super) non_finite: bool,
    /// Infinity for an empty slice.
    pub(super) min: f32,
    /// Negative infinity for an empty slice.
    pub(super) max: f32,
}

const LANES: usize = 8;

/// Measures `values`, fewer than 2³¹, in one pass.
pub(super) fn scan(values: &[f32]) -> Scan {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function was compiled for.
        #[allow(unsafe_code, reason = "wider vectors where there are any")]
        return unsafe { scan_avx2(values) };
    }
    scan_any(values)
}

/// The same additions in the same order, with wider vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn scan_avx2(values: &[f32]) -> Scan {
    scan_any(values)
}

/// The range of `values`.
pub(super) fn extent(values: &[f32]) -> Extent {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function was compiled for.
        #[allow(unsafe_code, reason = "wider vectors where there are any")]
        return unsafe { extent_avx2(values) };
    }
    extent_any(values)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn extent_avx2(values: &[f32]) -> Extent {
    extent_any(values)
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "each caller compiles it for its own processors")]
fn extent_any(values: &[f32]) -> Extent {
    let mut non_finite = [false; LANES];
    let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let mut look = |lane: usize, value: f32| {
        non_finite[lane] |= value.to_bits() & 0x7f80_0000 == 0x7f80_0000;
        min[lane] = if value < min[lane] { value } else { min[lane] };
        max[lane] = if value > max[lane] { value } else { max[lane] };
    };
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &value) in chunk.iter().enumerate() {
            look(lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        look(lane, value);
    }
    Extent {
        non_finite: non_finite.contains(&true),
        // As in [`Scan`], zero has no sign.
        min: min.into_iter().fold(f32::INFINITY, f32::min) + 0.0,
        max: max.into_iter().fold(f32::NEG_INFINITY, f32::max) + 0.0,
    }
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "each caller compiles it for its own processors")]
fn scan_any(values: &[f32]) -> Scan {
    let mut lanes = Lanes {
        non_finite: [0; LANES],
        zeros: [0; LANES],
        negative_zeros: [0; LANES],
        min: [f32::INFINITY; LANES],
        max: [f32::NEG_INFINITY; LANES],
        smallest: [i32::MAX; LANES],
    };
    let mut sums = Sums { sum: [0.0; LANES], squares: [0.0; LANES] };
    let (whole, rest) = values.as_chunks::<LANES>();
    // What the first loop has read the second one finds near: together they would not fit into registers.
    for block in whole.chunks(512) {
        for chunk in block {
            lanes.update(chunk);
        }
        for chunk in block {
            sums.update(chunk);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        lanes.look(lane, value);
        sums.add(lane, value);
    }
    let sum = |counts: [u32; LANES]| counts.iter().map(|&c| u64::from(c)).sum();
    let min = lanes.min.iter().copied().fold(f32::INFINITY, f32::min);
    let max = lanes.max.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let smallest = lanes.smallest.iter().copied().fold(i32::MAX, i32::min);
    Scan {
        non_finite: sum(lanes.non_finite),
        zeros: sum(lanes.zeros),
        negative_zeros: sum(lanes.negative_zeros),
        // A range never starts or ends at negative zero, so that it does not depend on which zero came first.
        min: min + 0.0,
        max: max + 0.0,
        smallest: smallest.wrapping_add(1) as u32,
        largest: if values.is_empty() { 0 } else { min.abs().max(max.abs()).to_bits() },
        sum: sums.sum.iter().sum(),
        squares: sums.squares.iter().sum(),
    }
}

/// What eight interleaved parts of a slice hold. Counters wrap, because checked additions cannot be vectorized; they
/// are wide enough.
struct Lanes {
    non_finite: [u32; LANES],
    zeros: [u32; LANES],
    negative_zeros: [u32; LANES],
    min: [f32; LANES],
    max: [f32; LANES],
    smallest: [i32; LANES],
}

impl Lanes {
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled for the caller's processors")]
    fn update(&mut self, chunk: &[f32; LANES]) {
        for (lane, &value) in chunk.iter().enumerate() {
            self.look(lane, value);
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled for the caller's processors")]
    fn look(&mut self, lane: usize, value: f32) {
        let bits = value.to_bits() as i32;
        let magnitude = bits & i32::MAX;
        let count = |counter: &mut u32, yes: bool| *counter = counter.wrapping_add(u32::from(yes));
        count(&mut self.non_finite[lane], magnitude >= 0x7f80_0000);
        count(&mut self.zeros[lane], magnitude == 0);
        count(&mut self.negative_zeros[lane], bits == i32::MIN);
        // Comparisons rather than f32::min, which would treat NaN with care at a third of the speed.
        self.min[lane] = if value < self.min[lane] { value } else { self.min[lane] };
        self.max[lane] = if value > self.max[lane] { value } else { self.max[lane] };
        // Zero becomes the largest number.
        let nonzero = magnitude.wrapping_sub(1) & i32::MAX;
        self.smallest[lane] = if nonzero < self.smallest[lane] { nonzero } else { self.smallest[lane] };
    }
}

/// Sums and sums of squares of the eight parts, in doubles.
struct Sums {
    sum: [f64; LANES],
    squares: [f64; LANES],
}

impl Sums {
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled for the caller's processors")]
    fn update(&mut self, chunk: &[f32; LANES]) {
        for (lane, &value) in chunk.iter().enumerate() {
            self.add(lane, value);
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled for the caller's processors")]
    fn add(&mut self, lane: usize, value: f32) {
        let value = f64::from(value);
        self.sum[lane] += value;
        self.squares[lane] += value * value;
    }
}
