//! The loop that decides: plan, observe, solve, and plan again without what turns out badly served.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Kind, Result};
use crate::improve::{improve, is_asked};
use crate::ir::Model;
use crate::observe::calibrate::{self, Calibrated, Observation, Site};
use crate::observe::sensitivity::{self, Reference, Sensitivity};
use crate::passes::recipes::QUANTIZE;
use crate::passes::{Context, pipeline};
use crate::plan::{Activation, Knowledge, Mode, Plan, Veto, plan, smoothing};
use crate::quant::algorithm::Method;
use crate::reason::{Decibels, Reason};
use crate::report::{PassRow, QualityRow};
use crate::rewrite::{Job, Log, quality, split};
use crate::samples::SampleSet;
use crate::smooth::{self, Asked, Division, Divisions};
use crate::solve::{Solution, Solved, guard, solve, solve_while};
use crate::statistics::Statistics;

/// How many dB beyond the limit the groups of layers are asked to promise before the search is given up.
const MOST_ASKED: f64 = 60.0;

/// On fewer held-out samples, outputs that are worse are chance: what changed is proven layer by layer already.
const PROOF: usize = 8;

/// A plan whose every tensor is served well enough, with what was solved for it.
pub(crate) struct Decided {
    pub(crate) plan: Plan,
    pub(crate) solution: Solution,
    pub(crate) statistics: Statistics,
    /// The model that the plan makes, where it was made to measure it.
    pub(crate) made: Option<Made>,
    /// The prepared model, with inputs divided, where some are.
    pub(crate) smoothed: Option<Model>,
}

/// A quantized model, and how good it is.
pub(crate) struct Made {
    pub(crate) model: Model,
    pub(crate) passes: Vec<PassRow>,
    pub(crate) quality: Vec<QualityRow>,
}

impl Made {
    /// The quality of the worst output.
    fn worst(&self) -> f64 {
        self.quality.iter().filter_map(QualityRow::sqnr_db).fold(f64::INFINITY, f64::min)
    }
}

/// Decides everything about a prepared model. With `measure`, its outputs are held to the configuration's limit too.
///
/// # Errors
/// As [`Rewrite::run`](crate::Rewrite::run).
pub(crate) fn decide(job: &Job<'_>, model: &Model, measure: bool, log: &mut Log) -> Result<Decided> {
    let mut search = Search::begin(job, model, log)?;
    search.solve_until_served(log)?;
    let mut search = search.smoothed(measure, log)?;
    search.improve(measure, log)?;
    if measure && job.config.guard.enabled && job.rewrite.plan.is_none() {
        search.reach_output_db(log)?;
    }
    if let Cow::Owned(model) = search.model {
        search.decided.smoothed = Some(model);
    }
    Ok(search.decided)
}

struct Search<'a> {
    job: &'a Job<'a>,
    /// What the passes begin with.
    prepared: &'a Model,
    /// What is planned: the same, or with inputs divided.
    model: Cow<'a, Model>,
    /// By what.
    divisions: Divisions,
    knowledge: Knowledge,
    solved: Solved,
    decided: Decided,
}

impl<'a> Search<'a> {
    /// The first plan, made or given.
    fn begin(job: &'a Job<'a>, model: &'a Model, log: &mut Log) -> Result<Self> {
        let rewrite = job.rewrite;
        let calibrated = rewrite.samples.is_some() || rewrite.statistics.is_some();
        let knowledge = Knowledge { calibrated, samples: rewrite.teaches(), ..Knowledge::default() };
        let (mut smoothed, mut divisions) = (Cow::Borrowed(model), Divisions::new());
        let plan = match rewrite.plan {
            None => plan(model, job.config, job.target, &knowledge)?,
            Some(given) => {
                divisions = smooth::planned(job, model, given, log)?;
                if !divisions.is_empty() {
                    smoothed = Cow::Owned(smooth::divide(job, model, given, &divisions)?.model);
                }
                given.check(&smoothed, job.target)?;
                given.clone()
            }
        };
        log.lap("plan");
        if let Some(samples) = rewrite.samples {
            let (indices, held_out) = split(samples);
            log.report.samples = Some(samples.describe());
            let calibrated = rewrite.statistics.map_or(indices.len(), |given| given.sample_count as usize);
            log.report.sample_counts = (calibrated, held_out.len());
        }
        let (solution, statistics) = (Solution::default(), Statistics::default());
        let decided = Decided { plan, solution, statistics, made: None, smoothed: None };
        let (prepared, model, solved) = (model, smoothed, Solved::default());
        Ok(Self { job, prepared, model, divisions, knowledge, solved, decided })
    }

    /// The same search with inputs divided, where that is asked for or helps inputs that were taken out, and the outputs are
    /// no worse for it.
    fn smoothed(mut self, measure: bool, log: &mut Log) -> Result<Self> {
        let job = self.job;
        let (algorithm, all) = match smooth::asked(job, log)? {
            Asked::Not => return Ok(self),
            Asked::All(algorithm) => (algorithm, true),
            Asked::Poor(algorithm) => (algorithm, false),
        };
        let vetoes = &self.knowledge.vetoes;
        if !all && vetoes.is_empty() {
            return Ok(self);
        }
        let knowledge = Knowledge { calibrated: true, ..Knowledge::default() };
        let first = plan(self.prepared, job.config, job.target, &knowledge)?;
        let mut candidates = smoothing::candidates(self.prepared, &first, false);
        if algorithm.method != Method::SmoothQuant {
            candidates.extend(smoothing::candidates(self.prepared, &first, true));
        }
        candidates.retain(|candidate| match vetoes.get(&candidate.tensor) {
            // What a runtime does not show cannot be kept either.
            Some(veto) => !veto.why.is_unobserved(),
            None => all,
        });
        if candidates.is_empty() {
            return Ok(self);
        }
        let mut divisions = smooth::find(job, self.prepared, &first, &candidates, &algorithm, log)?;
        while !divisions.is_empty() {
            let guarded = log.report.guarded.clone();
            let mut other = self.divided(&divisions, log)?;
            other.solve_until_served(log)?;
            let count = divisions.len();
            divisions.retain(|(one, _)| {
                let veto = smooth::read(&other.model, one).and_then(|tensor| other.knowledge.vetoes.get(&tensor));
                let Some(veto) = veto else { return true };
                log.report.unsmooth(&one.tensor, &veto.why);
                false
            });
            if divisions.len() < count {
                log.report.guarded = guarded;
                continue;
            }
            if let Some(samples) = job.rewrite.samples.filter(|_| measure) {
                let (before, after) = (self.measured(samples)?, other.measured(samples)?);
                log.lap("measure");
                let (worst, better) = (before.worst(), after.worst());
                self.decided.made = Some(before);
                if better < worst {
                    log.report.guarded = guarded;
                    let why = Reason::OutputsWorse { before: Decibels(worst), after: Decibels(better) };
                    for (one, _) in &divisions {
                        log.report.unsmooth(&one.tensor, &why);
                    }
                    log.report.warnings.push(format!("nothing is smoothed: {why}"));
                    break;
                }
                other.decided.made = Some(after);
            }
            return Ok(other);
        }
        Ok(self)
    }

    /// A search for the model whose inputs are divided. What is known of other tensors still holds.
    fn divided(&self, divisions: &Divisions, log: &mut Log) -> Result<Self> {
        let job = self.job;
        let Division { model, made, changed } = smooth::divide(job, self.prepared, &self.decided.plan, divisions)?;
        let mut knowledge = self.knowledge.clone();
        knowledge.smoothing = divisions.iter().map(|(one, _)| one.clone()).collect();
        knowledge.divided = made;
        for (one, _) in divisions {
            knowledge.vetoes.remove(&one.tensor);
            log.report.guarded.remove(&one.tensor);
        }
        let plan = plan(&model, job.config, job.target, &knowledge)?;
        let mut statistics = self.decided.statistics.clone();
        statistics.sites.retain(|tensor, _| !changed.contains(tensor));
        let (solution, solved) = (Solution::default(), Solved::default());
        Ok(Self {
            job,
            prepared: self.prepared,
            model: Cow::Owned(model),
            divisions: divisions.clone(),
            knowledge,
            solved,
            decided: Decided { plan, solution, statistics, made: None, smoothed: None },
        })
    }

    /// Solves the plan, and plans again without the tensors that turn out badly served, until there is none.
    fn solve_until_served(&mut self, log: &mut Log) -> Result<()> {
        loop {
            let unobserved = self.observe_missing(log)?;
            let vetoes = if unobserved.is_empty() {
                let progress = self.job.rewrite.run.progress;
                let go_on = || if progress.interrupted() { Err(Error::interrupted()) } else { Ok(()) };
                let Decided { plan, statistics, solution, .. } = &mut self.decided;
                *solution = solve_while(&self.model, plan, Some(statistics), &mut self.solved, &go_on)?;
                solution.smoothing = self.divisions.iter().map(|(_, scales)| scales.clone()).collect();
                guard(plan, solution, statistics, &self.job.config.guard)
            } else {
                unobserved
            };
            log.lap("solve");
            if vetoes.is_empty() {
                return Ok(());
            }
            if self.job.rewrite.plan.is_some() {
                return self.warn_of(vetoes, log);
            }
            self.plan_without(vetoes, log)?;
        }
    }

    /// Solves weights and biases again with what samples show of their inputs. Where a part of the model does not run by
    /// itself, or the outputs are worse for it, what was solved without stays.
    fn improve(&mut self, measure: bool, log: &mut Log) -> Result<()> {
        if !is_asked(&self.decided.plan) {
            return Ok(());
        }
        let before = self.decided.solution.clone();
        let done = improve(self.job, &self.model, &self.decided.plan, &mut self.decided.solution);
        log.lap("improve");
        if let Err(e) = done {
            self.decided.solution = before;
            if e.kind() == Kind::Interrupted {
                return Err(e);
            }
            log.warn(format!("samples improve neither weights nor biases: {e}"));
            return Ok(());
        }
        let proves = |samples: &&SampleSet| split(samples).1.len() >= PROOF;
        let measure = measure && self.decided.solution.is_improved();
        let Some(samples) = self.job.rewrite.samples.filter(|_| measure).filter(proves) else { return Ok(()) };
        let improved = std::mem::replace(&mut self.decided.solution, before);
        let plain = match self.decided.made.take() {
            Some(made) => made,
            None => self.measured(samples)?,
        };
        let before = std::mem::replace(&mut self.decided.solution, improved);
        let made = self.measured(samples)?;
        log.lap("measure");
        let (worst, better) = (plain.worst(), made.worst());
        if better >= worst {
            self.decided.made = Some(made);
            return Ok(());
        }
        let why = Reason::OutputsWorse { before: Decibels(worst), after: Decibels(better) };
        self.decided.solution.take_back(before, &why);
        self.decided.made = Some(plain);
        log.warn(format!("samples improve neither weights nor biases: {why}"));
        Ok(())
    }

    /// Observes the planned tensors that no statistics are known of yet; those that cannot be observed are returned.
    fn observe_missing(&mut self, log: &mut Log) -> Result<BTreeMap<String, Veto>> {
        let known = &self.decided.statistics.sites;
        let missing: BTreeSet<&String> = self
            .decided
            .plan
            .activations
            .iter()
            .filter(|(_, a)| is_ranged(a))
            .map(|(name, a)| a.tensor.as_ref().unwrap_or(name))
            .filter(|name| !known.contains_key(*name))
            .collect();
        let missing: Vec<String> = missing.into_iter().cloned().collect();
        let Some(first) = missing.first() else { return Ok(BTreeMap::new()) };
        let unobserved = if let Some(given) = self.job.rewrite.statistics {
            self.look_up(given, missing)?
        } else if let Some(samples) = self.job.rewrite.samples {
            self.run_samples(samples, &missing)?
        } else {
            return Err(Error::new(Kind::Samples, "the plan has ranges that only samples can tell")
                .at_value(first)
                .with_hint("give --calib PATH or --stats FILE, or make the plan without samples"));
        };
        log.warn_about_values(&self.decided.statistics);
        log.lap("calibrate");
        Ok(unobserved.into_iter().map(|(name, why)| (name, Veto { why, dynamic: false })).collect())
    }

    /// Runs samples to observe tensors.
    fn run_samples(&mut self, samples: &SampleSet, missing: &[String]) -> Result<BTreeMap<String, Reason>> {
        let (model, indices) = (&*self.model, split(samples).0);
        let sites: Vec<Site> = missing.iter().map(|name| Site::plain(name)).collect();
        let run = self.job.rewrite.run.over(samples, &indices);
        let observation = Observation { model, sites: &sites, run, checkpoint: None };
        let found = calibrate::usable(model, observation.run(Statistics::default())?)?;
        let Calibrated { statistics: Statistics { sample_count, sample_total, ran, sites, .. }, unobserved } = found;
        let mut known = std::mem::take(&mut self.decided.statistics);
        known.sites.extend(sites);
        self.decided.statistics = Statistics { sample_count, sample_total, ran, ..known };
        Ok(unobserved)
    }

    /// Takes tensors from statistics that were given.
    fn look_up(&mut self, given: &Statistics, missing: Vec<String>) -> Result<BTreeMap<String, Reason>> {
        let Calibrated { statistics: mut found, unobserved: unusable } = calibrate::usable(&self.model, given.clone())?;
        let mut known = std::mem::take(&mut self.decided.statistics);
        let mut unobserved = BTreeMap::new();
        for name in missing {
            if let Some(site) = found.sites.remove(&name) {
                known.sites.insert(name, site);
            } else if let Some(why) = unusable.get(&name) {
                unobserved.insert(name, why.clone());
            } else {
                return Err(Error::new(Kind::Samples, "the statistics do not cover this tensor")
                    .at_value(&name)
                    .with_hint("calibrate again, without --planned or with this configuration and target"));
            }
        }
        let Statistics { sample_count, sample_total, ran, .. } = found;
        self.decided.statistics = Statistics { sample_count, sample_total, ran, ..known };
        Ok(unobserved)
    }

    /// A plan that was given stays as it is: what the guard finds is a warning, what cannot be observed an error.
    fn warn_of(&self, vetoes: BTreeMap<String, Veto>, log: &mut Log) -> Result<()> {
        for (site, veto) in vetoes {
            if self.decided.solution.activations.is_empty() && self.decided.plan.activations.contains_key(&site) {
                return Err(Error::new(Kind::Runtime, veto.why.to_string())
                    .at_value(&site)
                    .with_hint("take it out of the plan, or give its numbers there by hand"));
            }
            log.report.warnings.push(format!("as planned, although {}", veto.why));
        }
        Ok(())
    }

    /// Plans again, without these sites and those that were taken out before.
    fn plan_without(&mut self, vetoes: BTreeMap<String, Veto>, log: &mut Log) -> Result<()> {
        for (site, veto) in &vetoes {
            log.report.guarded.insert(site.clone(), veto.why.clone());
        }
        self.knowledge.vetoes.extend(vetoes);
        self.decided.plan = plan(&self.model, self.job.config, self.job.target, &self.knowledge)?;
        Ok(())
    }

    /// Takes the layers that cost the most back to float until the outputs are good enough. Where no choice makes them so, all
    /// stays as it was: what would be left is no better for being larger.
    fn reach_output_db(&mut self, log: &mut Log) -> Result<()> {
        let Some(samples) = self.job.rewrite.samples else { return Ok(()) };
        let floor = self.job.config.guard.output_db;
        let (knowledge, plan) = (self.knowledge.clone(), self.decided.plan.clone());
        let (solution, guarded) = (self.decided.solution.clone(), log.report.guarded.clone());
        let mut first: Option<Made> = None;
        let mut sensitivity: Option<Sensitivity> = None;
        let mut target = floor;
        let mut best = f64::NEG_INFINITY;
        loop {
            let plan = &self.decided.plan;
            if plan.weights.is_empty() && plan.activations.is_empty() {
                return Ok(());
            }
            let made = match self.decided.made.take() {
                Some(made) => made,
                None => self.measured(samples)?,
            };
            let worst = made.worst();
            log.lap("measure");
            if worst >= floor {
                self.decided.made = Some(made);
                return Ok(());
            }
            best = best.max(worst);
            first.get_or_insert(made);
            let groups = match &mut sensitivity {
                Some(groups) => groups,
                slot => slot.insert(self.measure_groups(samples)?),
            };
            let mut vetoes = groups.take_worst(target);
            // The groups promised more than the whole keeps: ask for more.
            while vetoes.is_empty() && target < floor + MOST_ASKED {
                target += 1.0;
                vetoes = groups.take_worst(target);
            }
            log.lap("measure");
            if vetoes.is_empty() {
                break;
            }
            self.plan_without(vetoes, log)?;
            self.solve_until_served(log)?;
            self.improve(true, log)?;
        }
        let Some(first) = first else { return Ok(()) };
        let layers = log.report.guarded.keys().filter(|site| !guarded.contains_key(*site)).count();
        let rest = self.still_quantized();
        let costly = sensitivity.and_then(Sensitivity::worst);
        (self.knowledge, log.report.guarded) = (knowledge, guarded);
        (self.decided.plan, self.decided.solution) = (plan, solution);
        self.decided.made = Some(first);
        let from = match (rest, costly) {
            (Some(rest), _) => format!("the error comes from what is quantized beside them: {rest}"),
            (None, Some(costly)) => format!("quantized alone, \"{}\" costs the most", costly.join("\", \"")),
            (None, None) => "no single layer is to blame".to_owned(),
        };
        log.report.warnings.push(format!(
            "no choice of layers keeps {floor} dB at the outputs: with {layers} of them left float it is {best:.1} dB, so all \
             stay quantized; {from}"
        ));
        Ok(())
    }

    /// What is quantized though its layers are taken out, by operator.
    fn still_quantized(&self) -> Option<String> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for activation in self.decided.plan.activations.values() {
            let (Reason::InputOf { op, .. } | Reason::OutputOf { op, .. }) = &activation.why else { continue };
            *counts.entry(op.clone()).or_default() += 1;
        }
        let words: Vec<String> = counts.iter().map(|(op, count)| format!("{count} tensors around {op}")).collect();
        (!words.is_empty()).then(|| words.join(", "))
    }

    /// What each group of layers costs at the outputs, quantized alone.
    fn measure_groups(&mut self, samples: &SampleSet) -> Result<Sensitivity> {
        let held_out = split(samples).1;
        let few = &held_out[..held_out.len().min(sensitivity::SAMPLES)];
        let reference = Reference::new(self.prepared, self.job.rewrite.run.over(samples, few))?;
        let mut solved = std::mem::take(&mut self.solved);
        let found = sensitivity::measure(&self.decided.plan, &reference, |vetoes| {
            let mut knowledge = self.knowledge.clone();
            knowledge.vetoes.extend(vetoes.clone());
            let plan = plan(&self.model, self.job.config, self.job.target, &knowledge)?;
            let mut solution = solve(&self.model, &plan, Some(&self.decided.statistics), &mut solved)?;
            solution.smoothing.clone_from(&self.decided.solution.smoothing);
            Ok(self.make(&plan, &solution)?.0)
        })?;
        self.solved = solved;
        Ok(found)
    }

    /// The model that the plan makes, measured.
    fn measured(&self, samples: &SampleSet) -> Result<Made> {
        let (model, passes) = self.make(&self.decided.plan, &self.decided.solution)?;
        let quality = quality(self.prepared, &model, samples, self.job)?;
        Ok(Made { model, passes, quality })
    }

    /// The model that a plan makes, and what its passes did.
    fn make(&self, plan: &Plan, solution: &Solution) -> Result<(Model, Vec<PassRow>)> {
        let mut model = solution.corrected(self.prepared);
        let context = Context::planned(self.job.rewrite.evaluate, plan, solution);
        let mut rows = Vec::new();
        for pass in QUANTIZE.passes() {
            let outcome = pipeline::apply(&mut model, pass, &context)?;
            rows.push(PassRow::new(pass.name(), &outcome));
            if self.job.rewrite.run.progress.interrupted() {
                return Err(Error::interrupted());
            }
        }
        Ok((model, rows))
    }
}

/// Whether the range of an activation comes from samples.
fn is_ranged(activation: &Activation) -> bool {
    activation.mode == Mode::Static && activation.quantizer.given.is_none()
}
