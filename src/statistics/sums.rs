//! Sums of floats whose bits depend neither on the order of what is added nor on how it is grouped.
//!
//! Floats add up to other last bits in another order. So the line of numbers is cut at fixed places, every 40 bits, and a sum
//! keeps two digits as integers: the one in which the largest number that was added begins, and the one below it. What a
//! number adds to a digit depends on that number alone, and integers add up exactly. A number keeps at least 41 bits
//! relative to the largest one of the sum.

/// Bits of a digit.
const WIDTH: i32 = 40;

/// Most numbers that a sum may be made of: digits of so many fit into 63 bits.
pub const MOST: u64 = 1 << 22;

/// The place of the upper digit of a sum to which nothing was added.
const NOWHERE: i8 = i8::MIN;

/// Many sums beside each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    high: Vec<i64>,
    low: Vec<i64>,
    /// Which digit `high` is: it counts in units of 2^(40 · place).
    place: Vec<i8>,
}

/// One number, or one sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Digits {
    high: i64,
    low: i64,
    place: i8,
}

impl Digits {
    const ZERO: Self = Self { high: 0, low: 0, place: NOWHERE };

    /// The digits of a finite number.
    fn of(value: f64) -> Self {
        let bits = value.abs().to_bits();
        let exponent = (bits >> 52) as i32;
        let fraction = bits & ((1 << 52) - 1);
        // value = mantissa · 2^scale
        let (mantissa, scale) = if exponent == 0 { (fraction, -1074) } else { (fraction | 1 << 52, exponent - 1075) };
        if mantissa == 0 {
            return Self::ZERO;
        }
        let place = (scale + mantissa.ilog2() as i32).div_euclid(WIDTH);
        // In units of the lower digit, towards zero; below 2^80.
        let shift = scale - WIDTH * (place - 1);
        let whole = u128::from(mantissa);
        let whole = if shift >= 0 { whole << shift } else { whole >> -shift };
        let (high, low) = ((whole >> WIDTH) as i64, (whole & ((1 << WIDTH) - 1)) as i64);
        let sign = if value < 0.0 { -1 } else { 1 };
        Self { high: sign * high, low: sign * low, place: place as i8 }
    }

    /// The sum, which loses what lies below the digits of the larger one.
    fn plus(self, other: Self) -> Self {
        let (upper, lower) = if self.place >= other.place { (self, other) } else { (other, self) };
        let (high, low) = match i32::from(upper.place) - i32::from(lower.place) {
            0 => (lower.high, lower.low),
            1 => (0, lower.high),
            _ => (0, 0),
        };
        Self { high: upper.high + high, low: upper.low + low, place: upper.place }
    }

    /// The nearest float, ties to even.
    fn value(self) -> f64 {
        if self.place == NOWHERE {
            return 0.0;
        }
        let whole = (i128::from(self.high) << WIDTH) + i128::from(self.low);
        // Powers of two in two steps: one would be out of range at both ends.
        let exponent = WIDTH * (i32::from(self.place) - 1);
        let half = exponent / 2;
        whole as f64 * 2f64.powi(half) * 2f64.powi(exponent - half)
    }
}

impl Sums {
    /// So many sums of nothing.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self { high: vec![0; len], low: vec![0; len], place: vec![NOWHERE; len] }
    }

    /// One number each.
    ///
    /// # Panics
    /// In debug builds, if a number is not finite.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let mut made = Self::new(values.len());
        for (at, &value) in values.iter().enumerate() {
            debug_assert!(value.is_finite(), "{value}");
            made.set(at, Digits::of(value));
        }
        made
    }

    /// Adds sums to as many others. Together they must be made of no more than [`MOST`] numbers each.
    ///
    /// # Panics
    /// If they are not as many.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.len(), other.len(), "as many sums");
        for at in 0..self.len() {
            self.set(at, self.digits(at).plus(other.digits(at)));
        }
    }

    /// How many sums there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.place.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.place.is_empty()
    }

    /// The sum at a position, to the nearest float.
    ///
    /// # Panics
    /// If there is none at this position.
    #[must_use]
    pub fn value(&self, at: usize) -> f64 {
        self.digits(at).value()
    }

    fn digits(&self, at: usize) -> Digits {
        Digits { high: self.high[at], low: self.low[at], place: self.place[at] }
    }

    fn set(&mut self, at: usize, Digits { high, low, place }: Digits) {
        (self.high[at], self.low[at], self.place[at]) = (high, low, place);
    }
}
