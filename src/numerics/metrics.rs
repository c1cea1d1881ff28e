//! Measures of the distance between a quantized tensor and the original.
//!
//! Sums are f64. Pieces of a tensor may be fed separately and accumulators merged; feed and merge in a fixed order to get the
//! same last bits. Empty input has SQNR +∞ and cosine 1; NaN in either tensor makes every measure NaN.

/// Signal-to-quantization-noise ratio in dB: `10 log10(Σ r² / Σ (r − t)²)`; +∞ where both are equal.
///
/// # Panics
/// If the lengths differ.
pub fn sqnr_db(reference: &[f32], test: &[f32]) -> f64 {
    Metrics::of(reference, test).sqnr_db()
}

/// Cosine of the angle between both: `Σ r t / √(Σ r² Σ t²)`; 1 if both are zero, 0 if one is.
///
/// # Panics
/// If the lengths differ.
pub fn cosine(reference: &[f32], test: &[f32]) -> f64 {
    Metrics::of(reference, test).cosine()
}

/// `max |r − t|`, 0 for empty input.
///
/// # Panics
/// If the lengths differ.
pub fn max_abs_error(reference: &[f32], test: &[f32]) -> f32 {
    Metrics::of(reference, test).max_abs_error()
}

/// The sums that every measure follows from.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Metrics {
    /// Elements seen.
    pub count: u64,
    /// `Σ r²`.
    pub signal: f64,
    /// `Σ t²`.
    pub energy: f64,
    /// `Σ (r − t)²`.
    pub noise: f64,
    /// `Σ r t`.
    pub dot: f64,
    /// `max |r − t|`.
    pub max_abs_error: f32,
}

/// Independent sums, enough for the loop over them to vectorize.
const LANES: usize = 32;

impl Metrics {
    /// The measures of one pair of tensors.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn of(reference: &[f32], test: &[f32]) -> Self {
        let mut metrics = Self::default();
        metrics.feed(reference, test);
        metrics
    }

    /// Adds one piece.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn feed(&mut self, reference: &[f32], test: &[f32]) {
        assert_eq!(reference.len(), test.len(), "both tensors have the same number of elements");
        let mut lanes = Lanes::default();
        for (reference, test) in reference.chunks(LANES).zip(test.chunks(LANES)) {
            lanes.add(reference, test);
        }
        let Lanes { signal, energy, noise, dot, max_abs_error } = lanes;
        self.signal += signal.iter().sum::<f64>();
        self.energy += energy.iter().sum::<f64>();
        self.noise += noise.iter().sum::<f64>();
        self.dot += dot.iter().sum::<f64>();
        self.max_abs_error = max_abs_error.iter().copied().fold(self.max_abs_error, larger);
        self.count += reference.len() as u64;
    }

    /// Adds what another accumulator saw.
    pub fn merge(&mut self, other: &Self) {
        let Self { count, signal, energy, noise, dot, max_abs_error } = *other;
        self.count += count;
        self.signal += signal;
        self.energy += energy;
        self.noise += noise;
        self.dot += dot;
        self.max_abs_error = larger(self.max_abs_error, max_abs_error);
    }

    /// See [`sqnr_db`].
    pub fn sqnr_db(&self) -> f64 {
        if self.noise == 0.0 { f64::INFINITY } else { 10.0 * (self.signal / self.noise).log10() }
    }

    /// See [`cosine`].
    pub fn cosine(&self) -> f64 {
        match (self.signal == 0.0, self.energy == 0.0) {
            (true, true) => 1.0,
            (true, false) | (false, true) => 0.0,
            (false, false) => (self.dot / (self.signal.sqrt() * self.energy.sqrt())).clamp(-1.0, 1.0),
        }
    }

    /// Mean squared error; 0 for empty input.
    pub fn mse(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.noise / self.count as f64 }
    }

    /// See [`max_abs_error`].
    pub fn max_abs_error(&self) -> f32 {
        self.max_abs_error
    }
}

#[derive(Default)]
struct Lanes {
    signal: [f64; LANES],
    energy: [f64; LANES],
    noise: [f64; LANES],
    dot: [f64; LANES],
    max_abs_error: [f32; LANES],
}

impl Lanes {
    #[inline]
    fn add(&mut self, reference: &[f32], test: &[f32]) {
        let sums = self.signal.iter_mut().zip(&mut self.energy).zip(&mut self.noise).zip(&mut self.dot);
        let elements = reference.iter().zip(test);
        for (((((signal, energy), noise), dot), max), (&reference, &test)) in
            sums.zip(&mut self.max_abs_error).zip(elements)
        {
            let (r, t) = (f64::from(reference), f64::from(test));
            let error = r - t;
            *signal += r * r;
            *energy += t * t;
            *noise += error * error;
            *dot += r * t;
            *max = larger(*max, (reference - test).abs());
        }
    }
}

/// The larger, or NaN if one is.
#[inline]
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}
