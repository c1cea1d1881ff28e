//! Counts of values in bins whose edges are floats of few mantissa bits.
//!
//! A bin is a sign, an exponent and the leading bits of the mantissa, so its width is a power of two and finding it
//! is a shift. An octave `[2^e, 2^(e+1))` has 1024 bins where it is one of the two highest that were seen, half as
//! many in each one below, and never fewer than 128: a bin is at most 1/1024 of the largest magnitude wide, and at
//! most 1/128 of its own values. One huge outlier, or the constant of an attention mask, therefore costs nothing.
//!
//! When a larger magnitude arrives, lower octaves merge their bins in pairs, which is exact. The result is a function
//! of the multiset of values alone, whatever their order, their grouping, or how parts were merged.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use super::scan::Scan;

/// Mantissa bits that tell bins apart in the two highest octaves.
const FINE: u32 = 10;
/// Mantissa bits in every octave, at least.
const COARSE: u32 = 7;
/// Bins that a thread counts in: a sign, eight bits of exponent, and [`FINE`].
const SCRATCH: usize = 1 << (9 + FINE);
/// Below this many values, searching for each one's octave is cheaper than clearing the scratch bins.
const FEW: usize = 4096;

thread_local! {
    static COUNTS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// How often values occurred, by sign and magnitude. NaN and infinities never enter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Histogram {
    zeros: u64,
    /// Octaves of the magnitudes of negative values, ascending by exponent.
    negative: Vec<Octave>,
    /// Octaves of positive values, ascending by exponent.
    positive: Vec<Octave>,
}

/// The bins of `[2^(exponent - 127), 2^(exponent - 126))`, in equal parts; exponent 0 holds the subnormals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Octave {
    exponent: u8,
    counts: Vec<u64>,
}

/// A range of values and how many fell into it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bin {
    /// Smallest value the bin can hold.
    pub low: f64,
    /// Supremum of the values it can hold; equal to `low` where every value in it is that one.
    pub high: f64,
    /// Values seen, at least one.
    pub count: u64,
}

impl Histogram {
    /// Exact zeros, of either sign.
    #[must_use]
    pub fn zeros(&self) -> u64 {
        self.zeros
    }

    /// Every value counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.zeros + self.negative.iter().chain(&self.positive).flat_map(|o| &o.counts).sum::<u64>()
    }

    /// The bins that are not empty, in ascending order. Zeros are one of them, of no width.
    pub fn bins(&self) -> impl Iterator<Item = Bin> + '_ {
        let negative = self.negative.iter().rev().flat_map(|octave| {
            octave.bins().rev().map(|Bin { low, high, count }| Bin { low: -high, high: -low, count })
        });
        let zero = Bin { low: 0.0, high: 0.0, count: self.zeros };
        let positive = self.positive.iter().flat_map(Octave::bins);
        negative.chain(std::iter::once(zero)).chain(positive).filter(|bin| bin.count > 0)
    }

    /// Counts `values`, which `scan` describes and found finite.
    pub(super) fn add(&mut self, values: &[f32], scan: &Scan) {
        self.zeros += scan.zeros;
        if scan.largest == 0 {
            return;
        }
        self.refit((scan.largest >> 23) as u8);
        if values.len() < FEW {
            self.add_few(values);
        } else {
            self.add_many(values, scan);
        }
    }

    fn add_few(&mut self, values: &[f32]) {
        let top = self.top();
        for value in values.iter().filter(|v| **v != 0.0) {
            let bits = value.to_bits();
            let exponent = (bits >> 23) as u8;
            let octave = self.octave(bits >> 31 == 1, exponent, top);
            octave.counts[(bits & 0x007f_ffff) as usize >> (23 - resolution(exponent, top))] += 1;
        }
    }

    fn add_many(&mut self, values: &[f32], scan: &Scan) {
        let top = self.top();
        COUNTS.with_borrow_mut(|counts| {
            counts.resize(SCRATCH, 0);
            let Ok(counts) = <&mut [u32; SCRATCH]>::try_from(counts.as_mut_slice()) else { return };
            for part in values.chunks(1 << 31) {
                for value in part {
                    counts[(value.to_bits() >> (23 - FINE)) as usize] += 1;
                }
                if part.len() < values.len() {
                    self.drain(counts, 0, 254, top);
                }
            }
            // Zeros share a bin with the smallest subnormals.
            let sign = SCRATCH / 2;
            let (positive, negative) = (scan.zeros - scan.negative_zeros, scan.negative_zeros);
            if values.len() <= 1 << 31 {
                counts[0] -= positive as u32;
                counts[sign] -= negative as u32;
                self.drain(counts, (scan.smallest >> 23) as u8, (scan.largest >> 23) as u8, top);
            } else {
                self.octave(false, 0, top).counts[0] -= positive;
                self.octave(true, 0, top).counts[0] -= negative;
            }
        });
    }

    /// Moves the scratch counts of these exponents into the octaves.
    fn drain(&mut self, counts: &mut [u32; SCRATCH], first: u8, last: u8, top: u8) {
        for negative in [false, true] {
            for exponent in first..=last {
                let start = (usize::from(negative) << (8 + FINE)) + (usize::from(exponent) << FINE);
                let fine = &mut counts[start..start + (1 << FINE)];
                if fine.iter().fold(0, |any, &c| any | c) == 0 {
                    continue;
                }
                let octave = self.octave(negative, exponent, top);
                let group = (1 << FINE) / octave.counts.len();
                for (count, parts) in octave.counts.iter_mut().zip(fine.chunks_exact(group)) {
                    *count += parts.iter().map(|&c| u64::from(c)).sum::<u64>();
                }
                fine.fill(0);
            }
        }
    }

    /// Adds what another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        self.zeros += other.zeros;
        self.refit(other.top());
        let top = self.top().max(other.top());
        for (negative, octaves) in [(false, &other.positive), (true, &other.negative)] {
            for from in octaves {
                let to = self.octave(negative, from.exponent, top);
                let group = from.counts.len() / to.counts.len();
                for (count, parts) in to.counts.iter_mut().zip(from.counts.chunks_exact(group)) {
                    *count += parts.iter().sum::<u64>();
                }
            }
        }
    }

    /// The highest exponent seen.
    fn top(&self) -> u8 {
        let last = |octaves: &[Octave]| octaves.last().map_or(0, |o| o.exponent);
        last(&self.negative).max(last(&self.positive))
    }

    /// Merges bins as far as values of exponent `top` ask for it.
    fn refit(&mut self, top: u8) {
        if top <= self.top() {
            return;
        }
        for octave in self.negative.iter_mut().chain(&mut self.positive) {
            let bins = 1 << resolution(octave.exponent, top);
            let group = octave.counts.len() / bins;
            if group > 1 {
                octave.counts = octave.counts.chunks_exact(group).map(|parts| parts.iter().sum()).collect();
            }
        }
    }

    fn octave(&mut self, negative: bool, exponent: u8, top: u8) -> &mut Octave {
        let octaves = if negative { &mut self.negative } else { &mut self.positive };
        let at = octaves.binary_search_by_key(&exponent, |o| o.exponent).unwrap_or_else(|at| {
            octaves.insert(at, Octave { exponent, counts: vec![0; 1 << resolution(exponent, top)] });
            at
        });
        &mut octaves[at]
    }
}

impl Octave {
    fn bins(&self) -> impl DoubleEndedIterator<Item = Bin> + '_ {
        let (start, unit) = match self.exponent {
            0 => (0.0, power_of_two(-126)),
            e => (power_of_two(i32::from(e) - 127), power_of_two(i32::from(e) - 127)),
        };
        let width = unit / self.counts.len() as f64;
        self.counts.iter().enumerate().map(move |(i, &count)| {
            let low = start + width * i as f64;
            Bin { low, high: low + width, count }
        })
    }
}

/// Mantissa bits that tell bins apart in the octave of `exponent`, when `top` is the highest.
fn resolution(exponent: u8, top: u8) -> u32 {
    let below = u32::from(top.saturating_sub(exponent)).saturating_sub(1);
    FINE.saturating_sub(below).max(COARSE)
}

/// 2^exponent, for the exponents of normal doubles.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent) as u64) << 52)
}

#[derive(Deserialize)]
struct Unchecked {
    zeros: u64,
    negative: Vec<Octave>,
    positive: Vec<Octave>,
}

impl TryFrom<Unchecked> for Histogram {
    type Error = String;

    fn try_from(raw: Unchecked) -> Result<Self, String> {
        let Unchecked { zeros, negative, positive } = raw;
        let histogram = Self { zeros, negative, positive };
        let top = histogram.top();
        for octaves in [&histogram.negative, &histogram.positive] {
            if !octaves.is_sorted_by(|a, b| a.exponent < b.exponent) {
                return Err("histogram octaves are not in order".to_owned());
            }
            for Octave { exponent, counts } in octaves {
                if *exponent == 255 || counts.len() != 1 << resolution(*exponent, top) {
                    return Err(format!("histogram octave {exponent} cannot have {} bins", counts.len()));
                }
            }
        }
        Ok(histogram)
    }
}
