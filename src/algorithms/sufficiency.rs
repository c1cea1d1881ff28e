//! Whether calibration saw enough: which samples each range depends on, and what it would be without any one sample.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::observers;
use crate::quant::{Observer, RangeSpec};
use crate::statistics::{Range, SiteStatistics, Statistics};

/// Below this many samples nothing can be said.
pub const FEW: usize = 8;
/// A range that gets narrower by more than this share without one sample depends on that sample.
pub const STEADY: f64 = 0.1;

/// How well samples support the ranges.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sufficiency {
    /// Whether the samples were enough: eight or more, and no range depends on one of them.
    pub enough: bool,
    /// The same in a sentence.
    pub verdict: String,
    /// Samples that were run.
    pub samples: u64,
    /// Samples in the set.
    pub samples_total: u64,
    /// Sites whose range depends on one sample, the worst first.
    pub unsteady: Vec<String>,
    /// Sites where every value is zero.
    pub dead: Vec<String>,
    /// Samples on which ranges of `unsteady` rest, with how many, the most first: more inputs like these are needed.
    pub decisive: Vec<(u32, usize)>,
    /// Each site.
    pub sites: BTreeMap<String, Site>,
    /// Tensors that cannot be observed, with the reason.
    pub unobserved: BTreeMap<String, String>,
}

/// How well samples support one range.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Site {
    /// The smallest value, and the first sample that has it; none before any finite value.
    pub min: Option<Extreme>,
    /// The largest value, and the first sample that has it.
    pub max: Option<Extreme>,
    /// The range chosen.
    pub range: (f32, f32),
    /// Share of the finite values outside it.
    pub clipped: f64,
    /// Share of its width, zero included, that the range loses without the sample whose loss matters most. Observers other
    /// than min-max and mean move by at least this: what they choose cannot be beyond the values that are left.
    pub moves: f64,
    /// That sample, where `moves` is not zero.
    pub moved_by: Option<u32>,
    /// The mean of such losses over all samples: what the next sample is expected to widen the range by.
    pub growth: f64,
    /// Whether every finite value is zero.
    pub dead: bool,
    /// Channels, where they are told apart and their number is always the same.
    pub channels: Option<usize>,
    /// Channels where every finite value is zero.
    pub dead_channels: Vec<usize>,
    /// NaN values.
    pub nan: u64,
    /// Infinite values.
    pub inf: u64,
}

/// An extreme value and whence it came.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Extreme {
    /// The value.
    pub value: f32,
    /// The index of the sample.
    pub sample: u32,
}

/// A range, and how it was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// By whom.
    pub observer: Observer,
    /// For which codes.
    pub spec: RangeSpec,
    /// The range.
    pub range: (f32, f32),
}

impl Choice {
    /// What an observer says of a site.
    #[must_use]
    pub fn new(site: &SiteStatistics, observer: Observer, spec: RangeSpec) -> Self {
        Self { observer, spec, range: observers::range(site, observer, spec) }
    }
}

/// Judges statistics; sites without a choice are left out.
#[must_use]
pub fn sufficiency(
    statistics: &Statistics,
    choose: impl Fn(&str, &SiteStatistics) -> Option<Choice> + Sync,
) -> Sufficiency {
    let judged = |(name, site): (&String, &SiteStatistics)| Some((name.clone(), judge(site, &choose(name, site)?)));
    let sites: BTreeMap<String, Site> = statistics.sites.par_iter().filter_map(judged).collect();
    let mut unsteady: Vec<(&String, &Site)> = sites.iter().filter(|(_, s)| s.moves > STEADY).collect();
    unsteady.sort_by(|a, b| b.1.moves.total_cmp(&a.1.moves).then_with(|| a.0.cmp(b.0)));
    let mut by_sample: BTreeMap<u32, usize> = BTreeMap::new();
    for sample in unsteady.iter().filter_map(|(_, s)| s.moved_by) {
        *by_sample.entry(sample).or_default() += 1;
    }
    let mut decisive: Vec<(u32, usize)> = by_sample.into_iter().collect();
    decisive.sort_by_key(|&(sample, sites)| (std::cmp::Reverse(sites), sample));
    let few = statistics.ran.len() < FEW;
    let verdict = verdict(statistics.ran.len(), &sites, &unsteady, &decisive);
    Sufficiency {
        enough: !few && unsteady.is_empty() && !sites.is_empty(),
        verdict,
        samples: statistics.sample_count,
        samples_total: statistics.sample_total,
        unsteady: unsteady.into_iter().map(|(name, _)| name.clone()).collect(),
        dead: sites.iter().filter(|(_, s)| s.dead).map(|(name, _)| name.clone()).collect(),
        decisive,
        unobserved: statistics.unobserved.clone(),
        sites,
    }
}

fn verdict(
    samples: usize,
    sites: &BTreeMap<String, Site>,
    unsteady: &[(&String, &Site)],
    decisive: &[(u32, usize)],
) -> String {
    let plural = if samples == 1 { "" } else { "s" };
    let most = sites.values().map(|s| s.moves).fold(0.0, f64::max) * 100.0;
    if sites.is_empty() {
        return "nothing was observed".to_owned();
    }
    if samples < FEW {
        return format!(
            "too few: {samples} sample{plural} cannot tell whether more would change the ranges; give 32 or more"
        );
    }
    let [(worst, site), ..] = unsteady else {
        return format!(
            "enough: leaving out any one of the {samples} samples makes no range more than {most:.1} % narrower"
        );
    };
    let few: Vec<String> = decisive.iter().take(5).map(|(sample, _)| sample.to_string()).collect();
    let rest = if decisive.len() > few.len() { ", …" } else { "" };
    format!(
        "not enough: {} of {} ranges depend on one sample; the worst, \"{worst}\", would be {:.0} % narrower without sample {}; add inputs like sample{} {}{rest}, or choose an observer that cuts outliers",
        unsteady.len(),
        sites.len(),
        site.moves * 100.0,
        site.moved_by.unwrap_or_default(),
        if decisive.len() == 1 { "" } else { "s" },
        few.join(", "),
    )
}

fn judge(site: &SiteStatistics, &Choice { observer, spec, range }: &Choice) -> Site {
    let first = |has: &dyn Fn(Range) -> bool| {
        site.samples().iter().find(|record| record.range().is_some_and(has)).map(|record| record.index)
    };
    let extreme = |value: f32, end: fn(Range) -> f32| {
        first(&|range| end(range).to_bits() == value.to_bits()).map(|sample| Extreme { value, sample })
    };
    let whole = width(range, spec);
    let (mut moves, mut moved_by, mut growth, mut count) = (0.0, None, 0.0, 0u32);
    for (index, left) in without_each(site, observer) {
        let kept = left.map_or((0.0, 0.0), |left| match observer {
            Observer::Mean => left,
            _ => (range.0.clamp(left.0, left.1), range.1.clamp(left.0, left.1)),
        });
        let lost = if whole > 0.0 { 1.0 - width(kept, spec) / whole } else { 0.0 };
        growth += lost;
        count += 1;
        if lost > moves {
            (moves, moved_by) = (lost, Some(index));
        }
    }
    let channels = site.channels().filter(|c| !c.is_ragged());
    let dead = |range: &Option<Range>| range.is_none_or(|r| r.amax() <= 0.0);
    Site {
        min: site.min().and_then(|value| extreme(value, |r| r.min)),
        max: site.max().and_then(|value| extreme(value, |r| r.max)),
        range,
        clipped: site.share_outside(range.0, range.1),
        moves,
        moved_by,
        growth: if count > 0 { growth.max(0.0) / f64::from(count) } else { 0.0 },
        dead: site.finite() > 0 && site.amax() <= 0.0,
        channels: channels.map(|c| c.ranges().len()),
        dead_channels: channels.map_or_else(Vec::new, |c| {
            c.ranges().iter().enumerate().filter(|(_, r)| dead(r)).map(|(channel, _)| channel).collect()
        }),
        nan: site.nan(),
        inf: site.inf(),
    }
}

/// The width of what a quantizer covers for a range.
fn width((low, high): (f32, f32), spec: RangeSpec) -> f64 {
    let (low, high) = (f64::from(low).min(0.0), f64::from(high).max(0.0));
    if spec.is_symmetric() || !spec.format.is_integer() { high.max(-low) } else { high - low }
}

/// For each sample with finite values, the range of the others: their extremes, or means of extremes.
fn without_each(site: &SiteStatistics, observer: Observer) -> Vec<(u32, Option<(f32, f32)>)> {
    let ranges: Vec<(u32, Range)> = site.samples().iter().filter_map(|r| Some((r.index, r.range()?))).collect();
    if observer == Observer::Mean {
        let sum = |end: fn(Range) -> f32| ranges.iter().map(|(_, r)| f64::from(end(*r))).sum::<f64>();
        let (low, high, others) = (sum(|r| r.min), sum(|r| r.max), ranges.len() as f64 - 1.0);
        let mean = |sum: f64, own: f32| ((sum - f64::from(own)) / others) as f32;
        let left = |r: &Range| (others > 0.0).then(|| (mean(low, r.min), mean(high, r.max)));
        return ranges.iter().map(|(index, r)| (*index, left(r))).collect();
    }
    // The union of those before and the union of those after.
    let mut after: Vec<Option<Range>> = vec![None; ranges.len() + 1];
    let join = |a: Option<Range>, b: Option<Range>| match (a, b) {
        (Some(a), Some(b)) => Some(a.union(b)),
        (one, None) | (None, one) => one,
    };
    for (at, (_, range)) in ranges.iter().enumerate().rev() {
        after[at] = join(after[at + 1], Some(*range));
    }
    let mut before = None;
    let mut left = Vec::with_capacity(ranges.len());
    for (at, (index, range)) in ranges.iter().enumerate() {
        left.push((*index, join(before, after[at + 1]).map(|r| (r.min, r.max))));
        before = join(before, Some(*range));
    }
    left
}
