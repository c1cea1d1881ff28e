//! The whole line: prepare, plan, calibrate, solve, rewrite, check, measure.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use crate::calibrate::{self, Calibrated, Progress};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::passes::pipeline;
use crate::passes::{Context, Evaluate, Outcome, Pass};
use crate::plan::{Knowledge, Mode, Plan, Veto, plan};
use crate::report::{PassRow, QualityRow, Report};
use crate::samples::SampleSet;
use crate::solve::{Solution, guard, solve};
use crate::statistics::Statistics;
use crate::targets::{Target, check};

/// What to do.
pub struct Request<'a> {
    /// What the user asks for.
    pub config: &'a Config,
    /// Where the result runs.
    pub target: &'a Target,
    /// Samples; without, activations stay float.
    pub samples: Option<&'a SampleSet>,
    /// Threads for samples.
    pub threads: usize,
    /// Told how far things are.
    pub progress: &'a dyn Progress,
    /// Runs constant nodes.
    pub evaluate: &'a dyn Evaluate,
    /// Run only these passes; without one of the quantizing passes nothing is planned.
    pub passes: Option<&'a [&'static dyn Pass]>,
    /// Called with the model after each pass; may stop the line.
    pub after: &'a dyn Fn(&Model, &str, &Outcome) -> Result<ControlFlow<()>>,
    /// Whether to measure the result on samples.
    pub measure: bool,
}

/// The result of a rewrite.
#[derive(Debug)]
pub struct Rewritten {
    /// The quantized model; as far as the line ran, if it was stopped.
    pub model: Model,
    /// What was done.
    pub report: Report,
    /// The plan.
    pub plan: Option<Plan>,
    /// Whether `after` stopped the line.
    pub stopped: bool,
}

/// Quantizes a model.
///
/// # Errors
/// Anything on the line that fails; nothing has been written then.
pub fn rewrite(original: &Model, request: &Request<'_>) -> Result<Rewritten> {
    let mut clock = Clock::default();
    let mut report = Report {
        schema: 1,
        target: request.target.name.clone(),
        opset: (original.opset().unwrap_or(0), original.opset().unwrap_or(0)),
        ..Report::default()
    };
    let already: Vec<String> = check::violations(original, request.target);
    let mut model = original.clone();
    let prepare = Context { evaluate: request.evaluate, quantization: None };
    if passes(&mut model, pipeline::PREPARE, &prepare, request, &mut report)? {
        return Ok(Rewritten { model, report, plan: None, stopped: true });
    }
    clock.lap(&mut report, "prepare");
    let quantizes = |p: &&'static dyn Pass| matches!(p.name(), "insert-qdq" | "fold-weights" | "raise-opset");
    if request.passes.is_some_and(|list| !list.iter().any(quantizes)) {
        return Ok(Rewritten { model, report, plan: None, stopped: true });
    }

    let (plan, solution, statistics) = decide(&model, request, &mut report, &mut clock)?;
    report.describe(&plan, &solution, statistics.as_ref());
    if plan.weights.is_empty() && plan.activations.is_empty() {
        report.warnings.push("nothing was quantized; see what was left float and why".to_owned());
    }
    let prepared = model.clone();
    let quantize = Context { evaluate: request.evaluate, quantization: Some((&plan, &solution)) };
    if passes(&mut model, pipeline::QUANTIZE, &quantize, request, &mut report)? {
        return Ok(Rewritten { model, report, plan: Some(plan), stopped: true });
    }
    report.opset.1 = model.opset().unwrap_or(0);
    model.set_metadata("amax.version", env!("CARGO_PKG_VERSION"));
    model.set_metadata("amax.target", &request.target.name);
    refuse_hazards(&model, request.target, &already)?;
    report.count_operators(&model);
    clock.lap(&mut report, "rewrite");

    if let Some(samples) = request.samples.filter(|_| request.measure) {
        let held_out = split(samples).1;
        let found = calibrate::compare(&prepared, &model, samples, &held_out, request.threads, request.progress)?;
        report.quality = found.iter().map(|(name, m)| QualityRow::new(name, m)).collect();
        clock.lap(&mut report, "measure");
    }
    Ok(Rewritten { model, report, plan: Some(plan), stopped: false })
}

/// Indices for statistics, and indices held out for measuring; the same ones where there are too few to hold any out.
#[must_use]
pub fn split(samples: &SampleSet) -> (Vec<usize>, Vec<usize>) {
    let count = samples.len();
    if count < 8 {
        return ((0..count).collect(), (0..count).collect());
    }
    let every = (count / 8).max(8);
    (0..count).partition(|i| i % every != every - 1)
}

/// Runs passes; true if the line was stopped.
fn passes(
    model: &mut Model,
    list: &[&'static dyn Pass],
    context: &Context<'_>,
    request: &Request<'_>,
    report: &mut Report,
) -> Result<bool> {
    let list: Vec<&dyn Pass> = list
        .iter()
        .copied()
        .filter(|p| request.passes.is_none_or(|only| only.iter().any(|o| o.name() == p.name())))
        .collect();
    let mut stopped = false;
    let mut after = |model: &Model, name: &str, outcome: &Outcome| {
        report.passes.push(PassRow {
            pass: name.to_owned(),
            changes: outcome.changes.len(),
            skips: outcome.skips.iter().map(|s| (s.at.clone(), s.text.clone())).collect(),
        });
        if request.progress.interrupted() {
            return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
        }
        let flow = (request.after)(model, name, outcome)?;
        stopped |= flow.is_break();
        Ok(flow)
    };
    pipeline::run(model, &list, context, &mut after)?;
    Ok(stopped)
}

/// Plans, calibrates what is planned, and plans again without the sites that turn out badly served, until none is left.
fn decide(
    model: &Model,
    request: &Request<'_>,
    report: &mut Report,
    clock: &mut Clock,
) -> Result<(Plan, Solution, Option<Statistics>)> {
    let mut knowledge = Knowledge { calibrated: request.samples.is_some(), vetoes: BTreeMap::new() };
    let mut made = plan(model, request.config, request.target, &knowledge)?;
    clock.lap(report, "plan");
    let Some(samples) = request.samples else {
        loop {
            let solution = solve(model, &made, None)?;
            let vetoes = guard(&made, &solution, &Statistics::default(), &request.config.guard);
            if vetoes.is_empty() {
                clock.lap(report, "solve");
                return Ok((made, solution, None));
            }
            remember(report, &mut knowledge, vetoes);
            made = plan(model, request.config, request.target, &knowledge)?;
        }
    };
    let (indices, held_out) = split(samples);
    report.samples = Some(samples.describe());
    report.sample_counts = (indices.len(), held_out.len());
    let mut statistics = Statistics::default();
    loop {
        let missing: Vec<String> = made
            .activations
            .iter()
            .filter(|(name, a)| a.mode == Mode::Static && !statistics.sites.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        if !missing.is_empty() {
            let found = calibrate::calibrate(model, &missing, samples, &indices, request.threads, request.progress)?;
            let Calibrated { statistics: seen, unobserved, method: _ } = found;
            statistics.sample_count = seen.sample_count;
            statistics.sites.extend(seen.sites);
            clock.lap(report, "calibrate");
            warn_about_values(&statistics, report);
            if !unobserved.is_empty() {
                let vetoes = unobserved.into_iter().map(|(name, why)| (name, Veto { why, dynamic: false })).collect();
                remember(report, &mut knowledge, vetoes);
                made = plan(model, request.config, request.target, &knowledge)?;
                continue;
            }
        }
        let solution = solve(model, &made, Some(&statistics))?;
        let vetoes = guard(&made, &solution, &statistics, &request.config.guard);
        if vetoes.is_empty() {
            clock.lap(report, "solve");
            return Ok((made, solution, Some(statistics)));
        }
        remember(report, &mut knowledge, vetoes);
        made = plan(model, request.config, request.target, &knowledge)?;
    }
}

fn warn_about_values(statistics: &Statistics, report: &mut Report) {
    for (name, site) in &statistics.sites {
        let (nan, inf) = (site.nan(), site.inf());
        if nan + inf > 0 {
            let line = format!(
                "\"{name}\" was NaN {nan} times and infinite {inf} times in the samples; its range ignores them"
            );
            if !report.warnings.contains(&line) {
                report.warnings.push(line);
            }
        }
    }
}

fn remember(report: &mut Report, knowledge: &mut Knowledge, vetoes: BTreeMap<String, Veto>) {
    for (site, veto) in &vetoes {
        report.guarded.insert(site.clone(), veto.why.clone());
    }
    knowledge.vetoes.extend(vetoes);
}

/// A finished model that the target would run wrongly is a mistake of ours, unless the input was like that already.
fn refuse_hazards(model: &Model, target: &Target, already: &[String]) -> Result<()> {
    let found: Vec<String> = check::violations(model, target).into_iter().filter(|v| !already.contains(v)).collect();
    if found.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::Internal, format!("{} would run the result wrongly: {}", target.name, found.join("; ")))
        .with_hint("this is a mistake in amax; please report it with the model"))
}

/// Seconds between laps.
struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    fn lap(&mut self, report: &mut Report, stage: &str) {
        let seconds = self.0.elapsed().as_secs_f64();
        match report.seconds.iter_mut().find(|(s, _)| s == stage) {
            Some((_, total)) => *total += seconds,
            None => report.seconds.push((stage.to_owned(), seconds)),
        }
        self.0 = Instant::now();
    }
}
