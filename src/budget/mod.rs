//! A result for a budget: each group of weights gets the format for which the outputs lose least, or the whole is smallest.
//!
//! The noise of groups adds up well enough to choose from: that of each is measured alone, in one format, and follows for the
//! others from the errors of their products. What is chosen becomes `[[layer]]` rules, and the pipeline runs as for rules of the
//! user. The result is measured on samples that were held out, and chosen again where it is not as was predicted.

mod check;
mod prices;
mod study;

use std::collections::BTreeMap;

use crate::algorithms::knapsack::{Item, choose, lightest};
use crate::config::Config;
use crate::config::budget::{Choice, Goal};
use crate::error::{Error, Kind, Result};
use crate::ir::{content_hash, file};
use crate::report::{BudgetReport, CheckRow, CurvePoint, GroupRow, QualityRow, Step, layout};
use crate::rewrite::{Rewrite, Rewritten};
use crate::samples::SampleSet;
use crate::targets::Target;

pub use check::{Check, Least};
use prices::decibels;
pub use prices::{Price, PricedGroup, Prices};
use study::Study;

/// How far a prediction may be from what is measured, in dB.
const CLOSE: f64 = 1.0;

/// How often a choice is made anew for a limit that the result missed.
const ROUNDS: usize = 6;

/// How far from the choice its neighbours are, in bits.
const STEP: f64 = 0.5;

/// What each format costs each group.
///
/// # Errors
/// As [`Rewrite::sensitivity`].
pub(crate) fn prices(rewrite: &Rewrite<'_>, config: &Config, target: &Target) -> Result<Prices> {
    priced(rewrite, &Study::new(rewrite, config, target)?)
}

/// The prices that are given, or measured.
fn priced(rewrite: &Rewrite<'_>, study: &Study<'_>) -> Result<Prices> {
    let Some(given) = rewrite.prices else { return study.measure(samples(rewrite)?) };
    let groups: Vec<Vec<String>> = study.groups.iter().map(study::Choosable::weights).collect();
    given.check(&content_hash(rewrite.model), &groups, &study.choices)?;
    Ok(given.clone())
}

/// The rules that prices suggest for a budget.
///
/// # Errors
/// As [`Rewrite::suggestion`].
pub(crate) fn suggestion(rewrite: &Rewrite<'_>, config: &Config, target: &Target) -> Result<Config> {
    let goal = config.budget.goal().map_err(|(_, e)| e)?.ok_or_else(|| {
        Error::new(Kind::Usage, "there is no limit to suggest formats for").with_hint("add --effective-bits 4.8")
    })?;
    let search = Search::new(rewrite, config, target, false)?;
    let pick = search.choose(goal).ok_or_else(|| search.unreachable(goal))?;
    Ok(search.study.config(&pick.formats))
}

/// Rewrites for a budget.
///
/// # Errors
/// As [`Rewrite::run`]; no samples; a limit that nothing keeps.
pub(crate) fn rewrite(
    rewrite: &Rewrite<'_>,
    config: &Config,
    target: &Target,
    limit: Limit<'_>,
    fake: bool,
) -> Result<Rewritten> {
    if rewrite.plan.is_some() {
        let error = Error::new(Kind::Usage, "a plan and a budget both decide formats");
        return Err(error.with_hint("leave one of them out"));
    }
    samples(rewrite)?;
    Search::new(rewrite, config, target, fake)?.run(limit)
}

/// What the result must keep.
#[derive(Clone, Copy)]
pub(crate) enum Limit<'a> {
    /// What the configuration says.
    Goal(Goal),
    /// What a metric says.
    Check(&'a Check<'a>),
}

fn samples<'a>(rewrite: &Rewrite<'a>) -> Result<&'a SampleSet> {
    rewrite.samples.ok_or_else(|| {
        Error::new(Kind::Samples, "what formats cost at the outputs is measured on samples, and there are none")
            .with_hint("pass --calib PATH")
    })
}

/// A format for each group.
#[derive(Clone, PartialEq)]
struct Pick {
    /// By their places among the choices.
    formats: Vec<usize>,
    /// Noise-to-signal ratio at the outputs, as predicted.
    noise: f64,
    /// Bits of the codes, on average.
    bits: f64,
    /// Of the whole model.
    bytes: u64,
}

struct Search<'a> {
    rewrite: &'a Rewrite<'a>,
    study: Study<'a>,
    prices: Prices,
    target: &'a Target,
    fake: bool,
    /// Of the float model.
    size: u64,
    /// Bytes of the result beside the weights that are chosen for.
    beside: u64,
    /// What was made, by the formats of the groups.
    made: BTreeMap<Vec<usize>, (u64, f64)>,
    /// What was judged by a metric.
    checks: Vec<CheckRow>,
}

impl<'a> Search<'a> {
    fn new(rewrite: &'a Rewrite<'a>, config: &Config, target: &'a Target, fake: bool) -> Result<Self> {
        let study = Study::new(rewrite, config, target)?;
        let prices = priced(rewrite, &study)?;
        let size = file::estimated_size(rewrite.model);
        let beside = size.saturating_sub(study.groups.iter().map(|group| group.bytes).sum());
        let (made, checks) = (BTreeMap::new(), Vec::new());
        Ok(Self { rewrite, study, prices, target, fake, size, beside, made, checks })
    }

    fn run(&mut self, limit: Limit<'_>) -> Result<Rewritten> {
        let (pick, mut done) = match limit {
            Limit::Check(check) => self.reach_check(check)?,
            Limit::Goal(Goal::Sqnr(db)) => self.reach_sqnr(db)?,
            Limit::Goal(goal) => self.reach(goal)?,
        };
        let chosen = CurvePoint {
            effective_bits: pick.bits,
            bytes: done.report.bytes.1,
            predicted_db: decibels(pick.noise),
            measured_db: measured(&done),
            chosen: true,
        };
        let mut curve = vec![chosen];
        for step in [-STEP, STEP] {
            let Some(other) = self.choose(Goal::Bits(pick.bits + step)).filter(|other| other.formats != pick.formats)
            else {
                continue;
            };
            let (bytes, measured_db) = self.measured(&other)?;
            let (effective_bits, predicted_db) = (other.bits, decibels(other.noise));
            curve.push(CurvePoint { effective_bits, bytes, predicted_db, measured_db, chosen: false });
        }
        curve.sort_by(|a, b| a.effective_bits.total_cmp(&b.effective_bits));
        let report = BudgetReport {
            limit: words(limit),
            effective_bits: pick.bits,
            predicted_db: decibels(pick.noise),
            measured_db: measured(&done),
            curve,
            checks: std::mem::take(&mut self.checks),
            groups: self.rows(&pick),
        };
        if self.rewrite.looks() {
            let config = self.study.config(&pick.formats);
            done = self.rewrite.check(None).config(&config).target(self.target).carry_out(self.fake)?;
        }
        done.report.budget = Some(report);
        Ok(done)
    }

    /// The best choice that keeps a limit of bits or bytes. Where the noise of all is not the sum of its parts, groups are
    /// measured again among the others; of what is chosen then, the best on the samples of the sensitivity is made.
    fn reach(&mut self, goal: Goal) -> Result<(Pick, Rewritten)> {
        for _ in 0..ROUNDS {
            let mut best: Option<(f64, Pick)> = None;
            let prices = self.prices.clone();
            let mut next = vec![self.choose(goal).ok_or_else(|| self.unreachable(goal))?];
            next.extend(self.uniform(goal));
            for _ in 0..ROUNDS {
                for pick in std::mem::take(&mut next) {
                    let noise = self.study.noise(samples(self.rewrite)?, &pick.formats)?;
                    let apart = (decibels(noise) - decibels(pick.noise)).abs() > CLOSE;
                    if best.as_ref().is_some_and(|(least, _)| noise >= *least) {
                        continue;
                    }
                    best = Some((noise, pick.clone()));
                    if apart && noise > 0.0 {
                        self.reprice(&pick)?;
                        next = self.choose(goal).into_iter().filter(|other| other.formats != pick.formats).collect();
                    }
                }
            }
            self.prices = prices;
            let (_, pick) = best.ok_or_else(|| self.unreachable(goal))?;
            let done = self.make(&pick)?;
            let bytes = done.report.bytes.1;
            if self.most_bytes(goal).is_none_or(|most| bytes <= most) {
                return Ok((pick, done));
            }
            // There is more beside the weights than was known.
            self.beside += bytes.saturating_sub(pick.bytes).max(1);
        }
        Err(self.unreachable(goal))
    }

    /// The best single format for all groups within a limit.
    fn uniform(&self, goal: Goal) -> Option<Pick> {
        let all = |choice: &Choice| {
            let place = |group: &PricedGroup| group.prices.iter().position(|price| price.format == choice.name);
            self.prices.groups.iter().map(place).collect::<Option<Vec<usize>>>()
        };
        let fits = |pick: &Pick| match self.most_bytes(goal) {
            Some(most) => pick.bytes <= most,
            None => matches!(goal, Goal::Bits(bits) if pick.bits <= bits),
        };
        let picks = self.study.choices.iter().filter_map(all).map(|items| self.pick(&items)).filter(fits);
        picks.min_by(|a, b| a.noise.total_cmp(&b.noise))
    }

    /// The smallest result found that keeps `db` at the outputs.
    fn reach_sqnr(&mut self, db: f64) -> Result<(Pick, Rewritten)> {
        let mut best: Option<(Pick, Rewritten)> = None;
        let mut tried: Vec<Vec<usize>> = Vec::new();
        let mut reached = f64::NEG_INFINITY;
        let mut ask = db;
        for _ in 0..ROUNDS {
            let pick = self.choose(Goal::Sqnr(ask)).unwrap_or_else(|| self.most_accurate());
            if tried.contains(&pick.formats) {
                break;
            }
            tried.push(pick.formats.clone());
            let done = self.make(&pick)?;
            let found = measured(&done);
            reached = reached.max(found);
            if found < db {
                ask += db - found + 0.1;
                continue;
            }
            let smaller = best.as_ref().is_none_or(|(_, other)| done.report.bytes.1 < other.report.bytes.1);
            if smaller {
                best = Some((pick, done));
            }
            if found - db <= CLOSE {
                break;
            }
            ask -= (found - db) * 0.9;
        }
        best.ok_or_else(|| {
            let message = format!("no choice of formats was found that keeps {db} dB at the outputs: the best keeps {reached:.1} dB");
            Error::new(Kind::Check, message).with_hint(
                "ask for less, or allow formats of more bits: [budget] formats or --formats, such as int4-g32,int8,float",
            )
        })
    }

    /// The best choice within a limit, as predicted.
    fn choose(&self, goal: Goal) -> Option<Pick> {
        let classes = self.classes(goal);
        let limit = match goal {
            Goal::Bits(bits) => bits * self.elements(),
            Goal::Share(_) | Goal::Bytes(_) => self.most_bytes(goal)? as f64 - self.beside as f64,
            Goal::Sqnr(db) => 10f64.powf(-db / 10.0),
        };
        Some(self.pick(&choose(&classes, limit)?.items))
    }

    /// The choice that is predicted to lose least.
    fn most_accurate(&self) -> Pick {
        let least = |group: &PricedGroup| {
            let by_noise = |(_, a): &(usize, &Price), (_, b): &(usize, &Price)| a.noise.total_cmp(&b.noise);
            group.prices.iter().enumerate().min_by(by_noise).map_or(0, |(at, _)| at)
        };
        self.pick(&self.prices.groups.iter().map(least).collect::<Vec<_>>())
    }

    fn classes(&self, goal: Goal) -> Vec<Vec<Item>> {
        let item = |group: &PricedGroup, price: &Price| match goal {
            Goal::Bits(_) => Item { value: price.noise, weight: price.bits as f64 * group.elements as f64 },
            Goal::Share(_) | Goal::Bytes(_) => Item { value: price.noise, weight: price.bytes as f64 },
            Goal::Sqnr(_) => Item { value: price.bytes as f64, weight: price.noise },
        };
        self.prices.groups.iter().map(|group| group.prices.iter().map(|price| item(group, price)).collect()).collect()
    }

    /// What the prices of these places make.
    fn pick(&self, items: &[usize]) -> Pick {
        let prices: Vec<&Price> = items.iter().zip(&self.prices.groups).map(|(&at, group)| &group.prices[at]).collect();
        let bits =
            prices.iter().zip(&self.prices.groups).map(|(price, group)| price.bits as f64 * group.elements as f64);
        let place =
            |price: &&Price| self.study.choices.iter().position(|choice| choice.name == price.format).unwrap_or(0);
        Pick {
            formats: prices.iter().map(place).collect(),
            noise: prices.iter().map(|price| price.noise).sum(),
            bits: bits.sum::<f64>() / self.elements(),
            bytes: self.beside + prices.iter().map(|price| price.bytes).sum::<u64>(),
        }
    }

    fn elements(&self) -> f64 {
        self.prices.groups.iter().map(|group| group.elements as f64).sum()
    }

    /// Bits of the smallest choice.
    fn least_bits(&self) -> f64 {
        lightest(&self.classes(Goal::Bits(0.0))) / self.elements()
    }

    fn most_bytes(&self, goal: Goal) -> Option<u64> {
        match goal {
            Goal::Share(share) => Some((self.size as f64 * share) as u64),
            Goal::Bytes(bytes) => Some(bytes),
            Goal::Bits(_) | Goal::Sqnr(_) => None,
        }
    }

    /// Makes and measures the model.
    fn make(&mut self, pick: &Pick) -> Result<Rewritten> {
        let config = self.study.config(&pick.formats);
        let done = self.rewrite.candidate().config(&config).target(self.target).carry_out(self.fake)?;
        self.made.insert(pick.formats.clone(), (done.report.bytes.1, measured(&done)));
        Ok(done)
    }

    /// Bytes and quality of a result.
    fn measured(&mut self, pick: &Pick) -> Result<(u64, f64)> {
        if let Some(&known) = self.made.get(&pick.formats) {
            return Ok(known);
        }
        let done = self.make(pick)?;
        Ok((done.report.bytes.1, measured(&done)))
    }

    /// Has each group cost what it costs among the others.
    fn reprice(&mut self, pick: &Pick) -> Result<()> {
        let found = self.study.in_place(samples(self.rewrite)?, &pick.formats)?;
        for ((group, &format), noise) in self.prices.groups.iter_mut().zip(&pick.formats).zip(found) {
            let name = &self.study.choices[format].name;
            let before = group.prices.iter().find(|price| price.format == *name).map_or(0.0, |price| price.noise);
            if before > 0.0 {
                group.prices.iter_mut().for_each(|price| price.noise *= noise / before);
            }
        }
        Ok(())
    }

    /// Each group with what it costs, and what the next formats would.
    fn rows(&self, pick: &Pick) -> Vec<GroupRow> {
        let row = |(group, &format): (&PricedGroup, &usize)| {
            let name = &self.study.choices[format].name;
            let mut prices: Vec<&Price> = group.prices.iter().collect();
            prices.sort_by_key(|price| price.bytes);
            let at = prices.iter().position(|price| price.format == *name)?;
            let step = |price: &&Price| Step { format: price.format.clone(), bytes: price.bytes, noise_db: price.db() };
            let down = at.checked_sub(1).and_then(|at| prices.get(at)).map(step);
            Some(GroupRow {
                weights: group.weights.clone(),
                format: name.clone(),
                bytes: prices[at].bytes,
                noise_db: prices[at].db(),
                down,
                up: prices.get(at + 1).map(step),
            })
        };
        self.prices.groups.iter().zip(&pick.formats).filter_map(row).collect()
    }

    /// The limit is below everything that the formats allow.
    fn unreachable(&self, goal: Goal) -> Error {
        let (asked, least) = match self.most_bytes(goal) {
            None => (words(Limit::Goal(goal)), format!("{:.2} bits", self.least_bits())),
            Some(most) => {
                let bytes = self.beside + lightest(&self.classes(goal)) as u64;
                let share = bytes as f64 / self.size as f64 * 100.0;
                let beside = layout::bytes(self.beside);
                let least =
                    format!("{} ({share:.0} % of the model), {beside} of it not chosen for", layout::bytes(bytes));
                (format!("at most {}", layout::bytes(most)), least)
            }
        };
        Error::new(Kind::Check, format!("no choice of formats takes {asked}: the least is {least}")).with_hint(
            "ask for more, or allow formats of fewer bits: [budget] formats or --formats, such as int2-g32,int4-g32,int8",
        )
    }
}

/// The quality of the worst output.
fn measured(done: &Rewritten) -> f64 {
    done.report.quality.iter().filter_map(QualityRow::sqnr_db).fold(f64::INFINITY, f64::min)
}

fn words(limit: Limit<'_>) -> String {
    match limit {
        Limit::Goal(Goal::Bits(bits)) => format!("at most {bits} bits"),
        Limit::Goal(Goal::Share(share)) => format!("at most {} % of the size", share * 100.0),
        Limit::Goal(Goal::Bytes(bytes)) => format!("at most {}", layout::bytes(bytes)),
        Limit::Goal(Goal::Sqnr(db)) => format!("at least {db} dB"),
        Limit::Check(check) => match check.least {
            Least::Score(score) => format!("a check of at least {score}"),
            Least::Share(share) => format!("a check at most {} % below float", share * 100.0),
            Least::Below(below) => format!("a check at most {below} below float"),
        },
    }
}
