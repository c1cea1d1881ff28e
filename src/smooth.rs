//! Smoothing: inputs of products are divided channel by channel, where that makes one scale serve them better.
//!
//! One pass of samples keeps rows of every input in question; the exponent of each is searched on them, and proved on rows
//! that were held out. The model that comes out computes the same, and is planned and calibrated like any other.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::rules::Rules;
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::observe::rows::rows;
use crate::passes::smooth::{Smooth, divided};
use crate::passes::{Context, pipeline};
use crate::plan::smoothing::Candidate;
use crate::plan::{Divided, Plan, Smoothing};
use crate::quant::algorithm::{Algorithm, Method, Scope};
use crate::reason::Reason;
use crate::report::{Smoothed, SmoothingRow};
use crate::rewrite::{Job, Log, split};
use crate::solve::Solution;
use crate::solve::smoothing::{Found, Seen, scales, search};

/// Whether inputs are to be smoothed.
pub(crate) enum Asked {
    /// No.
    Not,
    /// Those that a range serves too badly.
    Poor(Algorithm),
    /// All of them, by name.
    All(Algorithm),
}

/// What a configuration asks for.
///
/// # Errors
/// A preset or pattern that is wrong.
pub(crate) fn asked(job: &Job<'_>, log: &mut Log) -> Result<Asked> {
    let rewrite = job.rewrite;
    if rewrite.plan.is_some() || !job.is_asked_for(&Smooth) {
        return Ok(Asked::Not);
    }
    let rules = Rules::new(job.target, job.config)?;
    let named = rules.pre_quant_opt().iter().chain(rules.algorithm()).find(|a| a.scope() == Scope::Inputs);
    if !rewrite.teaches() || rewrite.statistics.is_some() {
        if let Some(algorithm) = named {
            let name = algorithm.method.name();
            let why = match rewrite.statistics {
                Some(_) => "reads rows of samples, and statistics hold none; give --calib PATH without --stats",
                None => "needs samples; give --calib PATH",
            };
            log.report.warnings.push(format!("nothing is smoothed: {name} {why}"));
        }
        return Ok(Asked::Not);
    }
    Ok(match (named, rules.algorithm()) {
        (Some(algorithm), _) => Asked::All(algorithm.clone()),
        (None, other) if job.config.guard.enabled && other.is_none_or(|a| a.method == Method::Best) => {
            Asked::Poor(Algorithm::new(Method::SmoothQuant))
        }
        (None, _) => Asked::Not,
    })
}

/// Divisions that gain, with their divisors.
pub(crate) type Divisions = Vec<(Smoothing, Vec<f32>)>;

/// Searches for each candidate; says in the report what was found.
///
/// # Errors
/// Weights that are not finite, an interruption.
pub(crate) fn find(
    job: &Job<'_>,
    model: &Model,
    plan: &Plan,
    candidates: &[Candidate],
    algorithm: &Algorithm,
    log: &mut Log,
) -> Result<Divisions> {
    let tensors: Vec<String> = candidates.iter().map(|c| c.tensor.clone()).collect();
    let seen = match observed(job, model, &tensors) {
        Ok(seen) => seen,
        Err(error) if error.kind() == Kind::Interrupted => return Err(error),
        Err(error) => {
            log.report.warnings.push(format!("nothing is smoothed: {error}"));
            return Ok(Vec::new());
        }
    };
    let progress = job.rewrite.run.progress;
    progress.start("smooth", candidates.len() as u64);
    let mut gains = Vec::new();
    for candidate in candidates {
        let Candidate { tensor, readers, .. } = candidate;
        let (readers, method) = (readers.clone(), algorithm.method);
        let mut smoothing =
            Smoothing { tensor: tensor.clone(), readers, method, alpha: 0.0, divided: Divided::Producer };
        let free = divided(model, &smoothing)?.is_some();
        let found = match seen.get(tensor) {
            Some(seen) => search(model, &plan.weights, candidate, seen, algorithm, free)?,
            None => Err(Reason::NoRows { tensor: tensor.clone() }),
        };
        let (done, why) = match found {
            Ok(Found { alpha, scales, before_db, after_db, .. }) => {
                smoothing.alpha = alpha;
                smoothing.divided = if free { Divided::Producer } else { Divided::Mul };
                let (before_db, after_db) = (Some(before_db), Some(after_db));
                let done = Smoothed { alpha, divided: smoothing.divided, before_db, after_db };
                gains.push((smoothing, scales));
                (Some(done), None)
            }
            Err(why) => (None, Some(why)),
        };
        let products = candidate.readers.iter().map(|slot| slot.node.clone()).collect();
        log.report.smoothing.push(SmoothingRow { tensor: tensor.clone(), products, method: method.name(), done, why });
        if progress.interrupted() {
            return Err(Error::interrupted());
        }
        progress.tick();
    }
    progress.finish();
    log.lap("smooth");
    Ok(gains)
}

/// The divisors of what a plan says.
///
/// # Errors
/// No samples, a plan for another model.
pub(crate) fn planned(job: &Job<'_>, model: &Model, plan: &Plan, log: &mut Log) -> Result<Divisions> {
    if plan.smoothing.is_empty() {
        return Ok(Vec::new());
    }
    let tensors: Vec<String> = plan.smoothing.iter().map(|s| s.tensor.clone()).collect();
    let mut seen = observed(job, model, &tensors)?;
    let mut found = Vec::new();
    for smoothing in &plan.smoothing {
        let Smoothing { tensor, readers, method, alpha, divided } = smoothing;
        let wrong = |message: &str| Error::new(Kind::Config, message).at_value(tensor);
        let weight =
            |slot: &crate::plan::Slot| plan.weights.iter().position(|w| w.at.input == 1 && w.at.node == slot.node);
        let weights = readers.iter().map(weight).collect::<Option<Vec<usize>>>();
        let weights =
            weights.ok_or_else(|| wrong("it is to be smoothed for a product whose weight is not in the plan"))?;
        let candidate = Candidate { tensor: tensor.clone(), readers: readers.clone(), weights, activation: None };
        let seen = seen.remove(tensor).ok_or_else(|| wrong("it is to be smoothed, and the samples do not show it"))?;
        let divisors = scales(model, &plan.weights, &candidate, &seen, (*method, *alpha))?;
        let done = Some(Smoothed { alpha: *alpha, divided: *divided, before_db: None, after_db: None });
        let products = readers.iter().map(|slot| slot.node.clone()).collect();
        log.report.smoothing.push(SmoothingRow {
            tensor: tensor.clone(),
            products,
            method: method.name(),
            done,
            why: None,
        });
        found.push((smoothing.clone(), divisors));
    }
    log.lap("smooth");
    Ok(found)
}

/// What samples show of inputs.
fn observed(job: &Job<'_>, model: &Model, tensors: &[String]) -> Result<BTreeMap<String, Seen>> {
    let Some(samples) = job.rewrite.samples else {
        return Err(Error::new(Kind::Samples, "the plan smooths inputs, whose divisors only samples can tell")
            .with_hint("give --calib PATH"));
    };
    let indices = split(samples).0;
    rows(model, tensors, job.rewrite.run.over(samples, &indices))
}

/// A model whose inputs are divided.
pub(crate) struct Division {
    pub(crate) model: Model,
    /// What Muls make of inputs.
    pub(crate) made: BTreeSet<String>,
    /// Tensors whose values are others now.
    pub(crate) changed: BTreeSet<String>,
}

/// Divides inputs.
///
/// # Errors
/// A plan for another model.
pub(crate) fn divide(job: &Job<'_>, prepared: &Model, plan: &Plan, divisions: &Divisions) -> Result<Division> {
    let (smoothing, scales): (Vec<Smoothing>, Vec<Vec<f32>>) = divisions.iter().cloned().unzip();
    let mut changed = BTreeSet::new();
    for one in smoothing.iter().filter(|one| one.divided == Divided::Producer) {
        changed.extend(divided(prepared, one)?.into_iter().flatten());
    }
    let plan = Plan { smoothing, ..plan.without_sites() };
    let solution = Solution { smoothing: scales, ..Solution::default() };
    let mut model = prepared.clone();
    pipeline::apply(&mut model, &Smooth, &Context::planned(job.rewrite.evaluate, &plan, &solution))?;
    let made = plan.smoothing.iter().filter(|one| one.divided == Divided::Mul).filter_map(|one| read(&model, one));
    let made = made.collect();
    Ok(Division { model, made, changed })
}

/// What the products of a smoothed input read.
pub(crate) fn read(model: &Model, smoothing: &Smoothing) -> Option<String> {
    let slot = smoothing.readers.first()?;
    let value = model.node(model.producer_named(&slot.node)?).input(slot.input)?;
    Some(model.value(value).name().to_owned())
}
