//! Counts of values in bins whose edges are floats of few mantissa bits.
//!
//! A bin is a sign, an exponent and the leading bits of the mantissa, so its width is a power of two and finding it
//! is a shift. An octave `[2^e, 2^(e+1))` has 1024 bins if it is one of the two highest that were seen, otherwise 512: a bin is at most 1/1024 of the largest magnitude wide, and at most 1/512 of its own values (of the
//! smallest normal number, for subnormal ones). So whatever range is chosen, an 8-bit step in it has at least
//! four bins: one huge outlier, or the constant of an attention mask, costs nothing. Values that span twenty
//! octaves on both sides of zero take 20 to 90 kB.
//!
//! When a larger magnitude arrives, lower octaves merge their bins in pairs, which is exact. The result is a function
//! of the multiset of values alone, whatever their order, their grouping, or how parts were merged.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use super::scan::Scan;

/// Mantissa bits that tell bins apart in the two highest octaves.
const FINE: u32 = 10;
/// Mantissa bits in every octave, at least.
const COARSE: u32 = 9;
/// The sign bit of a prefix.
const SIGN: u16 = 1 << 8;
/// Bins that a thread counts in: a sign, eight bits of exponent, and [`FINE`], each of them twice. Neighbouring values
/// use different copies, because incrementing what was just incremented makes a processor wait.
const SCRATCH: usize = 1 << (9 + FINE + 1);
/// Below this many values for each octave they span, finding each one's octave is cheaper than clearing the scratch
/// bins.
const FEW: usize = 1024;

thread_local! {
    static COUNTS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// How often values occurred, by sign and magnitude. NaN and infinities never enter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Histogram {
    zeros: u64,
    /// Ascending by prefix; each holds a count that is not zero.
    octaves: Vec<Octave>,
}

/// The bins of the values that start with the same nine bits, in equal parts and ascending by magnitude.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Octave {
    /// The sign bit, set for negative values, and the exponent as floats store it; exponent 0 is that of subnormals.
    prefix: u16,
    counts: Counts,
}

/// Counts, as wide as the largest of them needs: they only ever grow, so that equal counts have one form. Most octaves are
/// low ones, where few values are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<u64>", into = "Vec<u64>")]
enum Counts {
    Bits8(Vec<u8>),
    Bits16(Vec<u16>),
    Bits32(Vec<u32>),
    Bits64(Vec<u64>),
}

/// A range of values and how many fell into it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bin {
    /// Smallest value the bin can hold.
    pub low: f64,
    /// Supremum of the values it can hold; equal to `low` if all its values are that one.
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
        self.zeros + self.octaves.iter().flat_map(|o| o.counts.iter()).sum::<u64>()
    }

    /// The bins that are not empty, in ascending order. Zeros are one of them, of no width.
    pub fn bins(&self) -> impl Iterator<Item = Bin> + '_ {
        let (positive, negative) = self.octaves.split_at(self.octaves.partition_point(|o| o.prefix < SIGN));
        let negative = negative.iter().rev().flat_map(|octave| {
            octave.bins().rev().map(|Bin { low, high, count }| Bin { low: -high, high: -low, count })
        });
        let zero = Bin { low: 0.0, high: 0.0, count: self.zeros };
        let positive = positive.iter().flat_map(Octave::bins);
        negative.chain(std::iter::once(zero)).chain(positive).filter(|bin| bin.count > 0)
    }

    /// The prefixes of its octaves, and the counts of all of them one after the other.
    pub(super) fn parts(&self) -> (Vec<u16>, Vec<u64>) {
        let counts = self.octaves.iter().flat_map(|o| o.counts.iter());
        (self.octaves.iter().map(|o| o.prefix).collect(), counts.collect())
    }

    /// The inverse of [`Self::parts`]; the error describes parts that no histogram has.
    pub(super) fn from_parts(zeros: u64, prefixes: &[u16], mut counts: &[u64]) -> Result<Self, String> {
        let top = prefixes.iter().map(|p| p & !SIGN).max().unwrap_or(0);
        let mut octaves = Vec::with_capacity(prefixes.len());
        for &prefix in prefixes {
            let Some((own, rest)) = counts.split_at_checked(1 << resolution(prefix, top)) else {
                return Err("its histogram lacks bins".to_owned());
            };
            if own.iter().all(|&c| c == 0) {
                return Err(format!("histogram octave {prefix} is empty"));
            }
            octaves.push(Octave { prefix, counts: own.iter().copied().collect() });
            counts = rest;
        }
        if !counts.is_empty() {
            return Err("its histogram has bins of no octave".to_owned());
        }
        Self::try_from(Unchecked { zeros, octaves })
    }

    /// Counts `values`, fewer than 2³¹, which `scan` describes and found finite.
    pub(super) fn add(&mut self, values: &[f32], scan: &Scan) {
        self.zeros += scan.zeros;
        if scan.largest == 0 {
            return;
        }
        let top = self.top().max((scan.largest >> 23) as u16);
        self.refit(top);
        let octaves = (scan.largest >> 23) - (scan.smallest >> 23) + 1;
        if values.len() >= FEW * octaves as usize {
            self.add_many(values, scan, top);
        } else if scan.zeros == 0 {
            self.add_few(values, top);
        } else {
            let mut nonzero = vec![0.0; values.len()];
            let mut count = 0;
            // Without a branch, which half of a ReLU's values would mislead.
            for &value in values {
                nonzero[count] = value;
                count += usize::from(value != 0.0);
            }
            self.add_few(&nonzero[..count], top);
        }
    }

    fn add_few(&mut self, nonzero: &[f32], top: u16) {
        const UNKNOWN: u16 = u16::MAX;
        let mut places = [UNKNOWN; 512];
        for (place, octave) in self.octaves.iter().enumerate() {
            places[usize::from(octave.prefix)] = place as u16;
        }
        for value in nonzero {
            let bits = value.to_bits();
            let prefix = (bits >> 23) as u16;
            if places[usize::from(prefix)] == UNKNOWN {
                self.octave(prefix, top);
                for (place, octave) in self.octaves.iter().enumerate() {
                    places[usize::from(octave.prefix)] = place as u16;
                }
            }
            let counts = &mut self.octaves[usize::from(places[usize::from(prefix)])].counts;
            // The mantissa's leading bits, as many as tell this octave's bins apart.
            let bin = (u64::from(bits & 0x007f_ffff) * counts.len() as u64) >> 23;
            counts.add(bin as usize, 1);
        }
    }

    fn add_many(&mut self, values: &[f32], scan: &Scan, top: u16) {
        COUNTS.with_borrow_mut(|counts| {
            counts.resize(SCRATCH, 0);
            let Ok(counts) = <&mut [u32; SCRATCH]>::try_from(counts.as_mut_slice()) else { return };
            let mut count = |value: f32, copy: usize| {
                let bin = &mut counts[(value.to_bits() >> (23 - FINE)) as usize * 2 + copy];
                // Checked additions would cost as much as the rest.
                *bin = bin.wrapping_add(1);
            };
            let (pairs, last) = values.as_chunks::<2>();
            for &[a, b] in pairs {
                count(a, 0);
                count(b, 1);
            }
            for &value in last {
                count(value, 0);
            }
            // Zeros are counted elsewhere, and share a bin with the smallest subnormals.
            for (bin, zeros) in [(0, scan.zeros - scan.negative_zeros), (SCRATCH / 2, scan.negative_zeros)] {
                let both = counts[bin] + counts[bin + 1];
                counts[bin] = both - zeros as u32;
                counts[bin + 1] = 0;
            }
            let exponents = (scan.smallest >> 23) as u16..=(scan.largest >> 23) as u16;
            for prefix in exponents.clone().chain(exponents.map(|e| e | SIGN)) {
                let start = usize::from(prefix) << (FINE + 1);
                let fine = &mut counts[start..start + (2 << FINE)];
                if fine.iter().fold(0, |any, &c| any | c) != 0 {
                    let octave = self.octave(prefix, top);
                    let group = (2 << FINE) / octave.counts.len();
                    for (bin, parts) in fine.chunks_exact(group).enumerate() {
                        octave.counts.add(bin, parts.iter().map(|&c| u64::from(c)).sum());
                    }
                    fine.fill(0);
                }
            }
        });
    }

    /// Adds what another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        self.zeros += other.zeros;
        let top = self.top().max(other.top());
        self.refit(top);
        for from in &other.octaves {
            let to = self.octave(from.prefix, top);
            let group = from.counts.len() / to.counts.len();
            for (at, count) in from.counts.iter().enumerate() {
                to.counts.add(at / group, count);
            }
        }
    }

    /// The highest exponent seen.
    fn top(&self) -> u16 {
        self.octaves.iter().map(|o| o.prefix & !SIGN).max().unwrap_or(0)
    }

    /// Merges bins as far as values of exponent `top` ask for it.
    fn refit(&mut self, top: u16) {
        for octave in &mut self.octaves {
            let group = octave.counts.len() >> resolution(octave.prefix, top);
            if group > 1 {
                let mut merged = Counts::zeros(octave.counts.len() / group);
                for (at, count) in octave.counts.iter().enumerate() {
                    merged.add(at / group, count);
                }
                octave.counts = merged;
            }
        }
    }

    fn octave(&mut self, prefix: u16, top: u16) -> &mut Octave {
        let place = self.octaves.binary_search_by_key(&prefix, |o| o.prefix).unwrap_or_else(|place| {
            self.octaves.insert(place, Octave { prefix, counts: Counts::zeros(1 << resolution(prefix, top)) });
            place
        });
        &mut self.octaves[place]
    }
}

impl Counts {
    fn zeros(len: usize) -> Self {
        Self::Bits8(vec![0; len])
    }

    fn len(&self) -> usize {
        match self {
            Self::Bits8(counts) => counts.len(),
            Self::Bits16(counts) => counts.len(),
            Self::Bits32(counts) => counts.len(),
            Self::Bits64(counts) => counts.len(),
        }
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = u64> + ExactSizeIterator + '_ {
        (0..self.len()).map(|bin| match self {
            Self::Bits8(counts) => counts[bin].into(),
            Self::Bits16(counts) => counts[bin].into(),
            Self::Bits32(counts) => counts[bin].into(),
            Self::Bits64(counts) => counts[bin],
        })
    }

    #[inline]
    fn add(&mut self, bin: usize, more: u64) {
        let fits = match self {
            Self::Bits8(counts) => grow(&mut counts[bin], more),
            Self::Bits16(counts) => grow(&mut counts[bin], more),
            Self::Bits32(counts) => grow(&mut counts[bin], more),
            Self::Bits64(counts) => grow(&mut counts[bin], more),
        };
        if !fits {
            self.widen(bin, more);
        }
    }

    #[cold]
    fn widen(&mut self, bin: usize, more: u64) {
        let mut counts: Vec<u64> = self.iter().collect();
        counts[bin] = counts[bin].saturating_add(more);
        *self = Self::from(counts);
    }
}

/// Adds to a count, unless it is too narrow for the sum.
#[inline]
fn grow<T: Copy + Into<u64> + TryFrom<u64>>(count: &mut T, more: u64) -> bool {
    let sum = T::try_from((*count).into().saturating_add(more));
    sum.map(|sum| *count = sum).is_ok()
}

impl FromIterator<u64> for Counts {
    fn from_iter<I: IntoIterator<Item = u64>>(counts: I) -> Self {
        Self::from(counts.into_iter().collect::<Vec<u64>>())
    }
}

impl From<Vec<u64>> for Counts {
    fn from(counts: Vec<u64>) -> Self {
        let narrow = counts.iter();
        match counts.iter().max() {
            Some(0x1_0000_0000..) => Self::Bits64(counts),
            Some(0x1_0000..) => Self::Bits32(narrow.map(|&c| c as u32).collect()),
            Some(0x100..) => Self::Bits16(narrow.map(|&c| c as u16).collect()),
            _ => Self::Bits8(narrow.map(|&c| c as u8).collect()),
        }
    }
}

impl From<Counts> for Vec<u64> {
    fn from(counts: Counts) -> Self {
        counts.iter().collect()
    }
}

impl Octave {
    /// Its bins, as if the values were positive.
    fn bins(&self) -> impl DoubleEndedIterator<Item = Bin> + '_ {
        let (start, unit) = match i32::from(self.prefix & !SIGN) {
            0 => (0.0, power_of_two(-126)),
            exponent => (power_of_two(exponent - 127), power_of_two(exponent - 127)),
        };
        let width = unit / self.counts.len() as f64;
        self.counts.iter().enumerate().map(move |(i, count)| {
            let low = start + width * i as f64;
            Bin { low, high: low + width, count }
        })
    }
}

/// The sum of counts, unless it is beyond what any run could count.
pub(super) fn total(counts: &[u64], zeros: u64) -> Option<u64> {
    counts.iter().try_fold(zeros, |sum, &c| sum.checked_add(c))
}

/// Mantissa bits that tell bins apart in the octave of `prefix`, when `top` is the highest exponent.
fn resolution(prefix: u16, top: u16) -> u32 {
    let below = u32::from(top.saturating_sub(prefix & !SIGN)).saturating_sub(1);
    FINE.saturating_sub(below).max(COARSE)
}

/// 2^exponent, for the exponents of normal doubles.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent) as u64) << 52)
}

#[derive(Deserialize)]
struct Unchecked {
    zeros: u64,
    octaves: Vec<Octave>,
}

impl TryFrom<Unchecked> for Histogram {
    type Error = String;

    fn try_from(raw: Unchecked) -> Result<Self, String> {
        let Unchecked { zeros, octaves } = raw;
        let histogram = Self { zeros, octaves };
        let top = histogram.top();
        if !histogram.octaves.is_sorted_by(|a, b| a.prefix < b.prefix) {
            return Err("histogram octaves are not in order".to_owned());
        }
        for Octave { prefix, counts } in &histogram.octaves {
            let finite = *prefix < 2 * SIGN && prefix & !SIGN < SIGN - 1;
            if !finite || counts.len() != 1 << resolution(*prefix, top) {
                return Err(format!("histogram octave {prefix} cannot have {} bins", counts.len()));
            }
        }
        Ok(histogram)
    }
}
