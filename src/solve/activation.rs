//! Scales of activations: one for all that share it.

use std::collections::BTreeMap;

use super::Solution;
use crate::algorithms::observers;
use crate::algorithms::sufficiency::{Choice, Sufficiency, sufficiency};
use crate::error::{Error, Kind, Result};
use crate::numerics;
use crate::plan::{Activation, Mode, Plan};
use crate::quant::{Given, Granularity, QParam, QParams, Scheme, check_range};
use crate::statistics::{SiteStatistics, Statistics};

/// Pairs that share a scale.
struct Group<'a> {
    /// The first of them.
    name: &'a str,
    quantizer: &'a Scheme,
    given: Option<(&'a str, &'a Given)>,
}

/// Scale and zero point of each static pair, by its name.
pub(super) fn solve(plan: &Plan, statistics: &Statistics) -> Result<BTreeMap<String, QParam>> {
    let fixed = || plan.activations.iter().filter(|(_, a)| a.mode == Mode::Static);
    let mut groups: BTreeMap<&str, Group<'_>> = BTreeMap::new();
    for (name, activation) in fixed() {
        join(&mut groups, name, activation)?;
    }
    let mut ranges: BTreeMap<&str, (f32, f32)> = BTreeMap::new();
    for (name, activation) in fixed() {
        let leader = activation.scale_of.as_str();
        if groups[leader].given.is_none() {
            let (low, high) = range(name, activation, statistics)?;
            let slot = ranges.entry(leader).or_insert((low, high));
            *slot = (slot.0.min(low), slot.1.max(high));
        }
    }
    let mut found: BTreeMap<&str, QParam> = BTreeMap::new();
    for (leader, group) in &groups {
        let seen = ranges.get(leader).copied().unwrap_or_default();
        found.insert(leader, numbers(group, seen).map_err(|e| e.at_value(group.name))?);
    }
    Ok(fixed().map(|(name, activation)| (name.clone(), found[activation.scale_of.as_str()])).collect())
}

/// Adds a pair to the group whose scale it has.
fn join<'a>(groups: &mut BTreeMap<&'a str, Group<'a>>, name: &'a str, activation: &'a Activation) -> Result<()> {
    let quantizer = &activation.quantizer;
    let group = groups.entry(&activation.scale_of).or_insert_with(|| Group { name, quantizer, given: None });
    let fail = |other: &str, what: &str| {
        Error::new(Kind::Config, format!("it shares its scale with \"{other}\", but {what}")).at_value(name)
    };
    if group.quantizer.whatever_the_range() != quantizer.whatever_the_range() {
        return Err(fail(group.name, "is not quantized alike"));
    }
    match (&quantizer.given, group.given) {
        (Some(ours), Some((other, theirs))) if ours != theirs => {
            Err(fail(other, "has another range or scale in the configuration")
                .with_hint("set the same for both tensors, or only for one of them"))
        }
        (Some(ours), None) => {
            group.given = Some((name, ours));
            Ok(())
        }
        _ => Ok(()),
    }
}

fn numbers(group: &Group<'_>, seen: (f32, f32)) -> Result<QParam> {
    let quantizer = group.quantizer;
    if quantizer.granularity != Granularity::PerTensor {
        return Err(Error::new(Kind::Config, "a static activation has one scale for the whole tensor"));
    }
    let (low, high) = match group.given {
        Some((_, Given::Scales { scales, zero_points })) => {
            let found = QParams::given(scales, zero_points, 1)?;
            return Ok(QParam { scale: found.scales[0], zero_point: found.zero_points[0] });
        }
        Some((_, &Given::Range(low, high))) => (low, high),
        None => quantizer.postprocess.map_or(seen, |p| p.apply(seen)),
    };
    Ok(numerics::qparams_from_range(low, high, &quantizer.range_spec()))
}

/// The range of one tensor.
fn range(name: &str, activation: &Activation, statistics: &Statistics) -> Result<(f32, f32)> {
    if let Some((low, high)) = activation.range {
        check_range(low, high).map_err(|e| e.at_value(name))?;
        return Ok((low, high));
    }
    let tensor = tensor(name, activation);
    let site = statistics.sites.get(tensor).ok_or_else(|| {
        Error::new(Kind::Samples, "the statistics do not cover this tensor")
            .at_value(tensor)
            .with_hint("calibrate again with this configuration")
    })?;
    Ok(observed(site, &activation.quantizer))
}

/// The float tensor of a pair.
pub(super) fn tensor<'a>(name: &'a str, activation: &'a Activation) -> &'a str {
    activation.tensor.as_deref().unwrap_or(name)
}

/// The range that an observer makes of what was seen; empty, all-NaN and never reached tensors count as zero.
fn observed(site: &SiteStatistics, quantizer: &Scheme) -> (f32, f32) {
    observers::range(site, quantizer.observer(), quantizer.range_spec())
}

/// Whether the samples were enough for the ranges of a plan that were not known before: what is less than half a step
/// outside of the codes is not clipped.
#[must_use]
pub fn judge(plan: &Plan, solution: &Solution, statistics: &Statistics) -> Sufficiency {
    let mut choices: BTreeMap<&str, Choice> = BTreeMap::new();
    for (name, activation) in &plan.activations {
        let quantizer = &activation.quantizer;
        let known = activation.range.is_some() || quantizer.given.is_some();
        let (Some(&QParam { scale, zero_point }), false) = (solution.activations.get(name), known) else { continue };
        let spec = quantizer.range_spec();
        let (low, high) = match quantizer.dtype.float() {
            None => {
                let (low, high) = spec.codes();
                ((low - zero_point) as f32 - 0.5, (high - zero_point) as f32 + 0.5)
            }
            Some(_) => (-quantizer.dtype.max_value(), quantizer.dtype.max_value()),
        };
        let choice = Choice { observer: quantizer.observer(), spec, range: (low * scale, high * scale) };
        choices.entry(tensor(name, activation)).or_insert(choice);
    }
    sufficiency(statistics, |name, _| choices.get(name).copied())
}

/// The finite range seen.
pub(super) fn seen(site: &SiteStatistics) -> (f32, f32) {
    site.range().map_or((0.0, 0.0), |r| (r.min, r.max))
}
