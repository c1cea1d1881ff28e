//! One look at a slice of floats, in loops that compilers turn into vector code.

/// What a slice holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scan {
    /// Values that are NaN or infinite. Where there are any, `min`, `max` and `largest` mean nothing.
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
}

const LANES: usize = 8;

/// Looks at `values`, fewer than 2³¹, once.
pub(super) fn scan(values: &[f32]) -> Scan {
    let mut lanes = Lanes {
        non_finite: [0; LANES],
        zeros: [0; LANES],
        negative_zeros: [0; LANES],
        min: [f32::INFINITY; LANES],
        max: [f32::NEG_INFINITY; LANES],
        smallest: [i32::MAX; LANES],
    };
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        lanes.update(chunk);
    }
    for (lane, &value) in rest.iter().enumerate() {
        lanes.look(lane, value);
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
    #[inline]
    fn update(&mut self, chunk: &[f32; LANES]) {
        for (lane, &value) in chunk.iter().enumerate() {
            self.look(lane, value);
        }
    }

    #[inline]
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

/// Sum and sum of squares, in doubles, in a fixed order of additions.
pub(super) fn sums(values: &[f32]) -> (f64, f64) {
    let (mut sum, mut squares) = ([0f64; LANES], [0f64; LANES]);
    let mut add = |lane: usize, value: f32| {
        let value = f64::from(value);
        sum[lane] += value;
        squares[lane] += value * value;
    };
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &value) in chunk.iter().enumerate() {
            add(lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        add(lane, value);
    }
    (sum.iter().sum(), squares.iter().sum())
}
