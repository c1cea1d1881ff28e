//! Measures of the distance between two models' distributions over a vocabulary, and of each from the token that follows.
//!
//! A row of logits `z` is the distribution `p = exp(z − log Σ exp z)`, computed in f64. Sums are over positions, and are merged.

/// Sums over positions. Without positions the divergence is 0 and the agreement 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Logits {
    /// Rows seen.
    pub positions: u64,
    /// `Σ KL(reference ‖ test)`, in nats.
    pub divergence: f64,
    /// Rows whose largest logit is at the same token.
    pub same_first: u64,
    /// Rows of which the token that follows is known.
    pub followed: u64,
    /// `−Σ log p(the token that follows)` of the reference and of the test.
    pub surprise: [f64; 2],
}

impl Logits {
    /// Adds one position; `next` is the token that follows, if it is known and in the vocabulary.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn feed(&mut self, reference: &[f32], test: &[f32], next: Option<usize>) {
        assert_eq!(reference.len(), test.len(), "both vocabularies have the same size");
        let (r, t) = (normalizer(reference), normalizer(test));
        let each = reference.iter().zip(test).map(|(&a, &b)| (f64::from(a) - r, f64::from(b) - t));
        // What has no probability adds nothing, whatever the other model thinks of it.
        self.divergence += each.filter(|(a, _)| *a > f64::NEG_INFINITY).map(|(a, b)| a.exp() * (a - b)).sum::<f64>();
        self.positions += 1;
        self.same_first += u64::from(first(reference) == first(test));
        if let Some(next) = next.filter(|&next| next < reference.len()) {
            self.followed += 1;
            self.surprise[0] += r - f64::from(reference[next]);
            self.surprise[1] += t - f64::from(test[next]);
        }
    }

    /// Adds what another accumulator saw.
    pub fn merge(&mut self, other: &Self) {
        self.positions += other.positions;
        self.divergence += other.divergence;
        self.same_first += other.same_first;
        self.followed += other.followed;
        self.surprise.iter_mut().zip(other.surprise).for_each(|(sum, more)| *sum += more);
    }

    /// The mean divergence of a position, in nats.
    #[must_use]
    pub fn kl(&self) -> f64 {
        if self.positions == 0 { 0.0 } else { self.divergence / self.positions as f64 }
    }

    /// The share of positions at which both would go on with the same token.
    #[must_use]
    pub fn top1(&self) -> f64 {
        if self.positions == 0 { 1.0 } else { self.same_first as f64 / self.positions as f64 }
    }

    /// `exp` of the mean surprise of the reference and of the test; `None` where no token is known that follows.
    #[must_use]
    pub fn perplexity(&self) -> Option<[f64; 2]> {
        (self.followed > 0).then(|| self.surprise.map(|sum| (sum / self.followed as f64).exp()))
    }
}

/// `log Σ exp z`.
fn normalizer(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return 0.0;
    }
    let largest = f64::from(largest);
    largest + logits.iter().map(|&z| (f64::from(z) - largest).exp()).sum::<f64>().ln()
}

/// Where the largest is, the first of several.
fn first(logits: &[f32]) -> Option<usize> {
    let place = |best: Option<(usize, f32)>, (at, &z): (usize, &f32)| match best {
        Some((_, most)) if most >= z => best,
        _ => Some((at, z)),
    };
    logits.iter().enumerate().fold(None, place).map(|(at, _)| at)
}
