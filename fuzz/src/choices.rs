//! Where the decisions of a mutator come from: a number of a case, or the bytes of a fuzzer.

/// Sizes, axes, counts and codes that are where arithmetic ends.
pub const EXTREMES: [i64; 16] = [
    -1,
    0,
    1,
    2,
    3,
    7,
    -2,
    255,
    1 << 20,
    i32::MAX as i64,
    i32::MIN as i64,
    1 << 40,
    1 << 62,
    i64::MAX,
    i64::MIN,
    i64::MIN + 1,
];

/// A source of decisions.
pub trait Choose {
    /// Any number.
    fn next(&mut self) -> u64;

    /// A number below `limit`; 0 if there is none.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// One of the items, if there are any.
    fn one_of<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len()))
    }

    /// One of [`EXTREMES`].
    fn extreme(&mut self) -> i64 {
        EXTREMES[self.below(EXTREMES.len())]
    }
}

/// The generator `SplitMix64`: <https://prng.di.unimi.it/splitmix64.c>.
#[derive(Debug)]
pub struct SplitMix(pub u64);

impl Choose for SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
