//! The smallest result that the user's own metric accepts.

use super::{Pick, Search};
use crate::config::budget::Goal;
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::report::CheckRow;
use crate::rewrite::Rewritten;

/// Sizes between the smallest and the largest choice that are looked at.
const SIZES: u32 = 32;

/// A metric that decides, and what it must reach.
#[derive(Clone, Copy)]
pub struct Check<'a> {
    /// The score of a model; more is better.
    pub judge: &'a dyn Fn(&Model) -> Result<f64>,
    /// The least score.
    pub least: Least,
    /// How often models are judged at most, the float model included.
    pub most: usize,
}

/// The least score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Least {
    /// So much.
    Score(f64),
    /// That of the float model without this share of it.
    Share(f64),
    /// That of the float model without so much.
    Below(f64),
}

impl Search<'_> {
    /// The smallest choice that a metric accepts, as far as so many checks find it: by bisection of the sizes.
    pub(super) fn reach_check(&mut self, check: &Check<'_>) -> Result<(Pick, Rewritten)> {
        let mut left = check.most;
        let score = |model: &Model, left: &mut usize| {
            *left -= 1;
            let found = (check.judge)(model)?;
            if found.is_nan() { Err(Error::new(Kind::Check, "the check gives no number")) } else { Ok(found) }
        };
        if left == 0 {
            return Err(Error::new(Kind::Usage, "no check is allowed").with_hint("allow some: --max-checks 10"));
        }
        let least = match check.least {
            Least::Score(least) => least,
            relative => {
                let float = score(self.rewrite.model, &mut left)?;
                self.checks.push(CheckRow { effective_bits: None, bytes: self.size, score: float, passed: true });
                match relative {
                    Least::Share(share) => float - share * float.abs(),
                    Least::Below(below) => float - below,
                    Least::Score(least) => least,
                }
            }
        };
        let picks = self.ladder();
        let mut best: Option<(Pick, Rewritten)> = None;
        // Those below `from` fail, and the one at `to` passes where there is one.
        let (mut from, mut to) = (0, picks.len());
        while from < to && left > 0 {
            // Where none has passed yet, the last check is for the one that is most likely to.
            let at = if left == 1 && best.is_none() { to - 1 } else { usize::midpoint(from, to - 1) };
            let done = self.make(&picks[at])?;
            let found = score(&done.model, &mut left)?;
            let (bytes, passed) = (done.report.bytes.1, found >= least);
            self.checks.push(CheckRow { effective_bits: Some(picks[at].bits), bytes, score: found, passed });
            if passed {
                best = Some((picks[at].clone(), done));
                to = at;
            } else {
                from = at + 1;
            }
        }
        best.ok_or_else(|| {
            let best = self.checks.iter().filter(|row| row.effective_bits.is_some()).map(|row| row.score);
            let best = best.fold(f64::NEG_INFINITY, f64::max);
            let message = format!("the check asks for {least}, and no choice of formats reached it: the best gave {best}");
            Error::new(Kind::Check, message).with_hint(
                "ask for less, allow more checks (--max-checks), or formats of more bits: --formats int4-g32,int8,float",
            )
        })
    }

    /// Choices from the smallest to the most accurate one, each for so many bits as lie on a geometric scale.
    fn ladder(&self) -> Vec<Pick> {
        let most = self.most_accurate();
        let least = self.least_bits();
        let mut picks: Vec<Pick> = Vec::new();
        for step in 0..=SIZES {
            let bits = least * (most.bits / least).powf(f64::from(step) / f64::from(SIZES));
            if let Some(pick) = self.choose(Goal::Bits(bits)).filter(|pick| !picks.contains(pick)) {
                picks.push(pick);
            }
        }
        picks
    }
}
