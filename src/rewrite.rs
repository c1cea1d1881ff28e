//! The whole line: prepare, plan, calibrate, solve, rewrite, check, measure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::Instant;

use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::numerics::Granularity;
use crate::observe::calibrate::{self, Calibrated, Observation, Site};
use crate::observe::sensitivity::{self, Reference, Sensitivity};
use crate::observe::{Memory, Progress, compare, fits_twice};
use crate::passes::pipeline;
use crate::passes::{Context, Evaluate, Outcome, Pass};
use crate::plan::{Knowledge, Mode, Plan, Veto, plan};
use crate::report::{PassRow, QualityRow, Report};
use crate::runtime::Runtime;
use crate::samples::SampleSet;
use crate::solve::{Solution, Solved, guard, judge, solve, solve_while};
use crate::statistics::Statistics;
use crate::targets::{Target, check};

/// What to do.
pub struct Request<'a> {
    /// What the user asks for.
    pub config: &'a Config,
    /// Where the result runs.
    pub target: &'a Target,
    /// A plan to carry out as it is, instead of making one.
    pub plan: Option<&'a Plan>,
    /// Samples; without, activations stay float.
    pub samples: Option<&'a SampleSet>,
    /// What calibration saw, in place of running samples for it; they only measure the result then.
    pub statistics: Option<&'a Statistics>,
    /// What runs samples.
    pub runtime: Runtime,
    /// Threads for samples.
    pub threads: usize,
    /// What running samples may take in memory.
    pub memory: Memory<'a>,
    /// Told how far things are.
    pub progress: &'a dyn Progress,
    /// Runs constant nodes.
    pub evaluate: &'a dyn Evaluate,
    /// Run only these passes; without one of the quantizing passes nothing is planned.
    pub passes: Option<&'a [&'static dyn Pass]>,
    /// Called with the model after each pass; may stop the line.
    #[allow(clippy::type_complexity, reason = "its parts are what the caller has to write")]
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
    line(original, request, false)
}

/// Quantizes a model in fake: what [`rewrite`] would store as codes stays float, behind a quantizer that gives these codes.
///
/// # Errors
/// As [`rewrite`], and groups that do not divide the axis that they cut.
pub fn prepare(original: &Model, request: &Request<'_>) -> Result<Rewritten> {
    // QuantizeLinear divides by positive scales.
    let target = Target { signed_scales: false, ..request.target.clone() };
    line(original, &Request { target: &target, ..*request }, true)
}

fn line(original: &Model, request: &Request<'_>, fake: bool) -> Result<Rewritten> {
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

    let prepared = model;
    let measure = request.measure && fits_twice(&prepared, request.memory.limit);
    if request.measure && !measure && request.samples.is_some() {
        report.warnings.push(
            "the result is not measured, nor held to guard.output_db: the model and its quantized form together do not \
             fit into the memory limit; `amax compare` measures without one"
                .to_owned(),
        );
    }
    let mut decided = Decided::new(&prepared, request, &mut report, &mut clock)?;
    let mut measured = None;
    if measure && request.config.guard.enabled && request.plan.is_none() {
        measured = decided.hold_outputs(&mut report, &mut clock)?;
    }
    let Decided { plan, solution, statistics, .. } = decided;
    if fake {
        check_groups(&prepared, &plan)?;
    }
    let seen = request.samples.is_some() || request.statistics.is_some();
    report.describe(&plan, &solution, seen.then_some(&statistics));
    report.sufficiency = seen.then(|| judge(&plan, &solution, &statistics)).filter(|found| !found.sites.is_empty());
    if plan.weights.is_empty() && plan.activations.is_empty() {
        report.warnings.push("nothing was quantized; see what was left float and why".to_owned());
    }
    let mut model = prepared.clone();
    let quantize = Context { evaluate: request.evaluate, quantization: Some((&plan, &solution)) };
    let list = if fake { pipeline::FAKE } else { pipeline::QUANTIZE };
    if passes(&mut model, list, &quantize, request, &mut report)? {
        return Ok(Rewritten { model, report, plan: Some(plan), stopped: true });
    }
    report.opset.1 = model.opset().unwrap_or(0);
    model.set_metadata("amax.version", env!("CARGO_PKG_VERSION"));
    model.set_metadata("amax.target", &request.target.name);
    refuse_hazards(&model, request.target, &already)?;
    report.count_operators(&model);
    clock.lap(&mut report, "rewrite");
    let unchanged = plan.weights.is_empty() && plan.activations.is_empty();
    if let Some(samples) = request.samples.filter(|_| measure && !unchanged) {
        report.quality = match measured {
            Some(found) => found,
            None => quality(&prepared, &model, samples, request)?,
        };
        clock.lap(&mut report, "measure");
    }
    Ok(Rewritten { model, report, plan: Some(plan), stopped: false })
}

/// Refuses groups that leave a rest: frameworks that train with groups have none, so that their kernels need none.
fn check_groups(model: &Model, plan: &Plan) -> Result<()> {
    for weight in &plan.weights {
        let Granularity::PerGroup { axis, size } = weight.quantizer.granularity else { continue };
        let Some(tensor) = model.value_named(&weight.tensor).and_then(|v| model.constant(v)) else { continue };
        let mut dims = tensor.dims();
        if weight.transpose {
            dims.reverse();
        }
        let length = dims.get(axis).copied().unwrap_or(0);
        if length % size != 0 {
            let message = format!("its {length} input channels cannot be cut into groups of {size}");
            return Err(Error::new(Kind::Config, message)
                .at_value(&weight.site)
                .with_hint("set another group_size for it, or --disable it"));
        }
    }
    Ok(())
}

/// Quality of each output on the held-out samples.
fn quality(float: &Model, quantized: &Model, samples: &SampleSet, request: &Request<'_>) -> Result<Vec<QualityRow>> {
    let held_out = split(samples).1;
    let found =
        compare::compare(float, quantized, samples, &held_out, request.runtime, request.threads, request.progress)?;
    Ok(found.iter().map(|(name, m)| QualityRow::new(name, m)).collect())
}

/// Indices for statistics, and indices held out for measuring; the same ones where there are too few to hold any out.
#[must_use]
pub fn split(samples: &SampleSet) -> (Vec<usize>, Vec<usize>) {
    let count = samples.len();
    if count < 8 {
        return ((0..count).collect(), (0..count).collect());
    }
    samples.split_held_out((count / 8).max(8))
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
            skips: outcome.skips.clone(),
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

/// A plan whose every site is served well enough, with its numbers.
struct Decided<'a> {
    model: &'a Model,
    request: &'a Request<'a>,
    knowledge: Knowledge,
    plan: Plan,
    solution: Solution,
    solved: Solved,
    statistics: Statistics,
}

impl<'a> Decided<'a> {
    fn new(model: &'a Model, request: &'a Request<'a>, report: &mut Report, clock: &mut Clock) -> Result<Self> {
        let calibrated = request.samples.is_some() || request.statistics.is_some();
        let knowledge = Knowledge { calibrated, vetoes: BTreeMap::new() };
        let plan = match request.plan {
            None => plan(model, request.config, request.target, &knowledge)?,
            Some(given) => {
                given.check(model, request.target)?;
                given.clone()
            }
        };
        clock.lap(report, "plan");
        let (solution, statistics) = (Solution::default(), Statistics::default());
        let solved = Solved::default();
        let mut decided = Self { model, request, knowledge, plan, solution, solved, statistics };
        if let Some(samples) = request.samples {
            let (indices, held_out) = split(samples);
            report.samples = Some(samples.describe());
            let calibrated = request.statistics.map_or(indices.len(), |given| given.sample_count as usize);
            report.sample_counts = (calibrated, held_out.len());
        }
        decided.settle(report, clock)?;
        Ok(decided)
    }

    /// Plans again without the sites that turn out badly served, until there is none; calibrates what is not yet.
    fn settle(&mut self, report: &mut Report, clock: &mut Clock) -> Result<()> {
        loop {
            let unobserved = self.observe(report, clock)?;
            let vetoes = if unobserved.is_empty() {
                let go_on = || {
                    if self.request.progress.interrupted() {
                        return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
                    }
                    Ok(())
                };
                let statistics = Some(&self.statistics);
                self.solution = solve_while(self.model, &self.plan, statistics, &mut self.solved, &go_on)?;
                guard(&self.plan, &self.solution, &self.statistics, &self.request.config.guard)
            } else {
                unobserved
            };
            clock.lap(report, "solve");
            if vetoes.is_empty() {
                return Ok(());
            }
            if self.request.plan.is_some() {
                return self.keep(vetoes, report);
            }
            self.forbid(vetoes, report)?;
        }
    }

    /// Calibrates planned tensors that were not seen yet; what cannot be seen is returned.
    fn observe(&mut self, report: &mut Report, clock: &mut Clock) -> Result<BTreeMap<String, Veto>> {
        let missing: Vec<String> = self
            .plan
            .activations
            .iter()
            .filter(|(_, a)| a.mode == Mode::Static && a.quantizer.given.is_none())
            .map(|(name, a)| a.tensor.as_ref().unwrap_or(name))
            .filter(|name| !self.statistics.sites.contains_key(*name))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .cloned()
            .collect();
        if missing.is_empty() {
            return Ok(BTreeMap::new());
        }
        if let Some(given) = self.request.statistics {
            return self.take(given, missing, report);
        }
        let Some(samples) = self.request.samples else {
            return Err(Error::new(Kind::Samples, "the plan has ranges that only samples can tell")
                .at_value(&missing[0])
                .with_hint("give --calib PATH or --stats FILE, or make the plan without samples"));
        };
        let Request { runtime, threads, memory, progress, .. } = *self.request;
        let (model, indices) = (self.model, split(samples).0);
        let sites: Vec<Site> = missing.iter().map(|name| Site::plain(name)).collect();
        let observation = Observation {
            model,
            sites: &sites,
            samples,
            indices: &indices,
            runtime,
            threads,
            memory,
            progress,
            checkpoint: None,
        };
        let Calibrated { statistics: seen, unobserved } =
            calibrate::usable(model, observation.run(Statistics::default())?)?;
        let Statistics { sample_count, sample_total, ran, sites, .. } = seen;
        self.statistics = Statistics { sample_count, sample_total, ran, ..std::mem::take(&mut self.statistics) };
        self.statistics.sites.extend(sites);
        warn_about_values(&self.statistics, report);
        clock.lap(report, "calibrate");
        Ok(unobserved.into_iter().map(|(name, why)| (name, Veto { why, dynamic: false })).collect())
    }

    /// A plan that was handed in stays as it is: what the guard finds is said, what cannot be observed is an error.
    fn keep(&self, vetoes: BTreeMap<String, Veto>, report: &mut Report) -> Result<()> {
        for (site, veto) in vetoes {
            if self.solution.activations.is_empty() && self.plan.activations.contains_key(&site) {
                return Err(Error::new(Kind::Runtime, veto.why)
                    .at_value(&site)
                    .with_hint("take it out of the plan, or give its numbers there by hand"));
            }
            report.warnings.push(format!("as planned, although {}", veto.why));
        }
        Ok(())
    }

    /// Takes planned tensors from statistics that were given; what was not observed is returned.
    fn take(
        &mut self,
        given: &Statistics,
        missing: Vec<String>,
        report: &mut Report,
    ) -> Result<BTreeMap<String, Veto>> {
        let Calibrated { mut statistics, unobserved } = calibrate::usable(self.model, given.clone())?;
        let Statistics { sample_count, sample_total, .. } = statistics;
        let ran = std::mem::take(&mut statistics.ran);
        self.statistics = Statistics { sample_count, sample_total, ran, ..std::mem::take(&mut self.statistics) };
        let mut vetoes = BTreeMap::new();
        for name in missing {
            if let Some(site) = statistics.sites.remove(&name) {
                self.statistics.sites.insert(name, site);
            } else if let Some(why) = unobserved.get(&name) {
                vetoes.insert(name, Veto { why: why.clone(), dynamic: false });
            } else {
                return Err(Error::new(Kind::Samples, "the statistics do not cover this tensor")
                    .at_value(&name)
                    .with_hint("calibrate again, without --planned or with this configuration and target"));
            }
        }
        warn_about_values(&self.statistics, report);
        Ok(vetoes)
    }

    fn forbid(&mut self, vetoes: BTreeMap<String, Veto>, report: &mut Report) -> Result<()> {
        for (site, veto) in &vetoes {
            report.guarded.insert(site.clone(), veto.why.clone());
        }
        self.knowledge.vetoes.extend(vetoes);
        self.plan = plan(self.model, self.request.config, self.request.target, &self.knowledge)?;
        Ok(())
    }

    /// The model that the plan makes.
    fn apply(&self, plan: &Plan, solution: &Solution) -> Result<Model> {
        let mut model = self.model.clone();
        let context = Context { evaluate: self.request.evaluate, quantization: Some((plan, solution)) };
        let mut go_on = |_: &Model, _: &str, _: &Outcome| Ok(ControlFlow::Continue(()));
        pipeline::run(&mut model, pipeline::QUANTIZE, &context, &mut go_on)?;
        Ok(model)
    }

    /// Takes the layers that cost the most back to float until the outputs are good enough; their quality then.
    fn hold_outputs(&mut self, report: &mut Report, clock: &mut Clock) -> Result<Option<Vec<QualityRow>>> {
        let Some(samples) = self.request.samples else { return Ok(None) };
        let floor = self.request.config.guard.output_db;
        let progress = self.request.progress;
        let held_out = split(samples).1;
        let mut sensitivity: Option<Sensitivity> = None;
        let mut target = floor;
        loop {
            if self.plan.weights.is_empty() {
                return Ok(None);
            }
            let quality = quality(self.model, &self.apply(&self.plan, &self.solution)?, samples, self.request)?;
            let float = |name: &str| {
                let value = self.model.value_named(name);
                value.and_then(|v| self.model.dtype(v)).is_none_or(crate::onnx::DataType::is_float)
            };
            let worst = quality.iter().filter(|q| float(&q.output)).map(|q| q.sqnr_db).fold(f64::INFINITY, f64::min);
            clock.lap(report, "measure");
            if worst >= floor {
                return Ok(Some(quality));
            }
            let sensitivity = match &mut sensitivity {
                Some(found) => found,
                slot => {
                    let reference = Reference::new(self.model, samples, &held_out, self.request.runtime, progress)?;
                    let mut solved = std::mem::take(&mut self.solved);
                    let found = sensitivity::measure(&self.plan, &reference, progress, |vetoes| {
                        let mut knowledge = self.knowledge.clone();
                        knowledge.vetoes.extend(vetoes.clone());
                        let plan = plan(self.model, self.request.config, self.request.target, &knowledge)?;
                        let solution = solve(self.model, &plan, Some(&self.statistics), &mut solved)?;
                        self.apply(&plan, &solution)
                    })?;
                    self.solved = solved;
                    slot.insert(found)
                }
            };
            let mut vetoes = sensitivity.take_worst(target);
            while vetoes.is_empty() {
                // The groups promised more than the whole keeps: ask for more.
                target += 1.0;
                if target > floor + 60.0 {
                    return Ok(Some(quality));
                }
                vetoes = sensitivity.take_worst(target);
            }
            clock.lap(report, "measure");
            self.forbid(vetoes, report)?;
            self.settle(report, clock)?;
        }
    }
}

fn warn_about_values(statistics: &Statistics, report: &mut Report) {
    for (name, site) in &statistics.sites {
        let (nan, inf) = (site.nan(), site.inf());
        if nan + inf > 0 {
            let times = |count: u64| if count == 1 { "once".to_owned() } else { format!("{count} times") };
            let seen: Vec<String> = [("NaN", nan), ("infinite", inf)]
                .into_iter()
                .filter(|&(_, count)| count > 0)
                .map(|(what, count)| format!("{what} {}", times(count)))
                .collect();
            let line = format!("\"{name}\" was {} in the samples; its range ignores them", seen.join(" and "));
            if !report.warnings.contains(&line) {
                report.warnings.push(line);
            }
        }
    }
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
