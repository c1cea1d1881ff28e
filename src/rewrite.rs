//! The whole pipeline: prepare, decide, rewrite, check, measure.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use crate::budget::{self, Check, Limit, Prices};
use crate::compare::Compare;
use crate::config::Config;
use crate::decide::{Decided, Made, decide};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, file};
use crate::numerics::Granularity;
use crate::observe::run::{How, memory_method, run_methods};
use crate::observe::{compare, fits_twice};
use crate::onnx::DataType;
use crate::passes::freeze_inputs::FreezeInputs;
use crate::passes::pipeline::{self, After};
use crate::passes::recipes::{Conversion, FAKE, PREPARE, QUANTIZE, Recipe};
use crate::passes::{Context, Evaluate, Pass};
use crate::plan::{Knowledge, Plan, Weight};
use crate::reason::Reason;
use crate::reopen::{self, reopen};
use crate::report::{self, PassRow, QualityRow, Report};
use crate::runtime::{TractEvaluate, onnxruntime};
use crate::samples::SampleSet;
use crate::solve::{Solution, judge};
use crate::statistics::{self, Statistics};
use crate::targets::{self, Target, check};

/// Quantizes a model: [`run`](Self::run) is the whole pipeline.
#[derive(Clone, Copy)]
#[must_use = "nothing is done before `run`"]
pub struct Rewrite<'a> {
    pub(crate) model: &'a Model,
    config: Option<&'a Config>,
    target: Option<&'a Target>,
    pub(crate) prices: Option<&'a Prices>,
    check: Option<Check<'a>>,
    pub(crate) plan: Option<&'a Plan>,
    pub(crate) samples: Option<&'a SampleSet>,
    pub(crate) statistics: Option<&'a Statistics>,
    pub(crate) run: How<'a>,
    pub(crate) evaluate: &'a dyn Evaluate,
    passes: Option<&'a [&'static dyn Pass]>,
    after: Option<&'a After<'a>>,
    measure: bool,
    verify: Verify,
    keep_inputs: bool,
    dtype: Option<DataType>,
}

/// Whether the result is run as deployed, beside the float model, on the samples that it is measured on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verify {
    /// Never.
    #[default]
    Off,
    /// Where onnxruntime is what runs the target's models, and one is found.
    Auto,
    /// Always; where that cannot be, the rewrite fails.
    On,
}

impl<'a> Rewrite<'a> {
    /// A rewrite of `model` by the default configuration for the default target, without samples: activations stay float.
    pub fn new(model: &'a Model) -> Self {
        Self {
            model,
            config: None,
            target: None,
            prices: None,
            check: None,
            plan: None,
            samples: None,
            statistics: None,
            run: How::default(),
            evaluate: &TractEvaluate,
            passes: None,
            after: None,
            measure: true,
            verify: Verify::Off,
            keep_inputs: false,
            dtype: None,
        }
    }

    /// What is asked for, beyond the defaults.
    pub fn config(mut self, config: &'a Config) -> Self {
        self.config = Some(config);
        self
    }

    /// Where the result runs. Without it, the target that the configuration names, or [`targets::DEFAULT`].
    pub fn target(mut self, target: &'a Target) -> Self {
        self.target = Some(target);
        self
    }

    /// What each format costs each group of weights, where the configuration has a budget: measured unless given here.
    pub fn prices(mut self, prices: impl Into<Option<&'a Prices>>) -> Self {
        self.prices = prices.into();
        self
    }

    /// A metric that decides: the result is the smallest that it accepts.
    pub fn check(mut self, check: impl Into<Option<Check<'a>>>) -> Self {
        self.check = check.into();
        self
    }

    /// A plan to apply as it is, instead of making one.
    pub fn plan(mut self, plan: impl Into<Option<&'a Plan>>) -> Self {
        self.plan = plan.into();
        self
    }

    /// Samples that ranges are taken from, and, of 8 or more, each eighth that the result is measured on.
    pub fn samples(mut self, samples: impl Into<Option<&'a SampleSet>>) -> Self {
        self.samples = samples.into();
        self
    }

    /// What a calibration saw. Ranges come from it, not from the samples.
    pub fn statistics(mut self, statistics: impl Into<Option<&'a Statistics>>) -> Self {
        self.statistics = statistics.into();
        self
    }

    /// Whether to measure the result on the samples, and to hold it to the configuration's `guard.output_db`: yes unless
    /// this says otherwise.
    pub fn measure(mut self, measure: bool) -> Self {
        self.measure = measure;
        self
    }

    /// Whether to run the result as deployed (see [`Verify`]), which takes samples: no unless this says otherwise.
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }

    /// Whether weights that are inputs of the model, too, stay as they are, so that callers can still give others: no unless
    /// this says otherwise. They are constants then, where all inputs with a default are such weights and no sample gives one.
    pub fn keep_inputs(mut self, keep: bool) -> Self {
        self.keep_inputs = keep;
        self
    }

    /// A float type of 16 bits, [`DataType::Float16`] or [`DataType::Bfloat16`], for what stays float: none unless this says
    /// otherwise.
    pub fn dtype(mut self, dtype: impl Into<Option<DataType>>) -> Self {
        self.dtype = dtype.into();
        self
    }

    /// Runs only these passes; without one of the quantizing passes nothing is planned.
    #[doc(hidden)]
    pub fn passes(mut self, passes: impl Into<Option<&'a [&'static dyn Pass]>>) -> Self {
        self.passes = passes.into();
        self
    }

    /// Called after each pass; may stop the pipeline.
    #[doc(hidden)]
    pub fn after(mut self, after: impl Into<Option<&'a After<'a>>>) -> Self {
        self.after = after.into();
        self
    }

    run_methods!();
    memory_method!();

    /// Quantizes the model.
    ///
    /// # Errors
    /// A configuration, plan or target that does not fit the model, a model or a sample that the runtime cannot run,
    /// statistics that lack a tensor, a limit that cannot be kept to, an interruption.
    pub fn run(&self) -> Result<Rewritten> {
        self.carry_out(false)
    }

    /// Quantizes the model in fake: what [`run`](Self::run) would store as codes stays float, behind a quantizer that gives
    /// these codes.
    ///
    /// # Errors
    /// As [`run`](Self::run), and groups that do not divide the axis that they cut.
    pub fn prepare(&self) -> Result<Rewritten> {
        self.carry_out(true)
    }

    /// Whether there are samples that something can be learned from.
    pub(crate) fn teaches(&self) -> bool {
        self.samples.is_some_and(|samples| !samples.is_noise())
    }

    /// What each format costs each group of weights at the outputs, measured unless it is given.
    ///
    /// # Errors
    /// As [`run`](Self::run), and no samples to measure on.
    pub fn sensitivity(&self) -> Result<Prices> {
        let (config, target) = (self.config.cloned().unwrap_or_default(), self.loaded_target()?);
        budget::prices(self, &config, &target)
    }

    /// The configuration with a rule for each weight in the place of its budget, as the sensitivity suggests it.
    ///
    /// # Errors
    /// As [`sensitivity`](Self::sensitivity), and a limit that no choice keeps, or none.
    pub fn suggestion(&self) -> Result<Config> {
        let (config, target) = (self.config.cloned().unwrap_or_default(), self.loaded_target()?);
        budget::suggestion(self, &config, &target)
    }

    /// The same without what looks at the model on the way, for results that are only compared.
    pub(crate) fn candidate(self) -> Self {
        Self { after: None, passes: None, check: None, verify: Verify::Off, measure: true, ..self }
    }

    /// Whether something looks at the model on the way.
    pub(crate) fn looks(&self) -> bool {
        self.after.is_some() || self.passes.is_some() || self.verify != Verify::Off
    }

    /// Whether weights that are inputs, too, become constants.
    pub(crate) fn freezes(&self) -> bool {
        !self.keep_inputs && !self.samples.is_some_and(|samples| samples.give_defaults(self.model))
    }

    fn loaded_target(&self) -> Result<Cow<'a, Target>> {
        let named = self.config.and_then(|config| config.target.as_deref());
        match self.target {
            Some(target) => Ok(Cow::Borrowed(target)),
            None => Target::load(named.unwrap_or(targets::DEFAULT)).map(Cow::Owned),
        }
    }

    pub(crate) fn carry_out(&self, fake: bool) -> Result<Rewritten> {
        if self.verify == Verify::On && self.samples.is_none() {
            let error = Error::new(Kind::Usage, "the result can be verified on samples only");
            return Err(error.with_hint("pass --calib PATH"));
        }
        let default;
        let config = if let Some(config) = self.config {
            config
        } else {
            default = Config::default();
            &default
        };
        let mut target = self.loaded_target()?;
        let limit = match (config.budget.goal().map_err(|(_, e)| e)?, &self.check) {
            (None, None) if !config.budget.formats.is_empty() => {
                let error = config.error("budget.formats", "formats to choose from, but no limit to choose them for");
                return Err(
                    error.with_hint("add --effective-bits 4.8, --max-size 40%, --min-sqnr 30 or --check COMMAND")
                );
            }
            (None, None) => None,
            (Some(goal), None) => Some(Limit::Goal(goal)),
            (None, Some(check)) => Some(Limit::Check(check)),
            (Some(_), Some(_)) => {
                let error = Error::new(Kind::Usage, "a budget and a check both decide how small the result is");
                return Err(error.with_hint("leave the limit out of the budget"));
            }
        };
        if let Some(limit) = limit {
            return budget::rewrite(self, config, &target, limit, fake);
        }
        if fake {
            // QuantizeLinear divides by positive scales.
            let floats = vec![DataType::Float];
            target = Cow::Owned(Target { signed_scales: false, floats, ..target.into_owned() });
        }
        let target = &*target;
        Job { rewrite: self, config, target, fake }.run()
    }
}

/// The result of a rewrite.
#[derive(Debug)]
#[non_exhaustive]
pub struct Rewritten {
    /// The quantized model; as far as the pipeline ran, if it was stopped.
    pub model: Model,
    /// What was done.
    pub report: Report,
    /// The plan.
    pub plan: Option<Plan>,
    /// Whether the pipeline was stopped after a pass.
    pub stopped: bool,
}

/// A rewrite with its defaults filled in.
pub(crate) struct Job<'a> {
    pub(crate) rewrite: &'a Rewrite<'a>,
    pub(crate) config: &'a Config,
    pub(crate) target: &'a Target,
    /// Whether weights stay float, behind quantizers.
    fake: bool,
}

impl Job<'_> {
    fn run(&self) -> Result<Rewritten> {
        let original = self.rewrite.model;
        let mut log = Log::new(self);
        let hazards = check::violations(original, self.target);
        let mut prepared = original.clone();
        let context = Context { freeze_weights: self.rewrite.freezes(), ..Context::new(self.rewrite.evaluate) };
        let context = Context { conversion: Conversion { dtype: self.rewrite.dtype, ..context.conversion }, ..context };
        if self.follow(&PREPARE, &mut prepared, &context, &mut log)?.is_break() {
            return Ok(log.stopped(self, prepared, None));
        }
        let kept = log.report.passes.iter().filter(|row| row.pass == FreezeInputs.name()).flat_map(|row| &row.skips);
        let kept: Vec<String> = kept.map(|note| format!("\"{}\" {}", note.at, note.what)).collect();
        log.report.warnings.extend(kept);
        let inputs = |model: &Model| model.graph(model.main()).inputs().len();
        if original.ir_version() >= 4 {
            log.report.frozen_inputs = inputs(original) - inputs(&prepared);
        }
        log.lap("prepare");
        let recipe = if self.fake { &FAKE } else { &QUANTIZE };
        if !recipe.steps.iter().any(|step| step.planned && self.is_asked_for(step.pass)) {
            return Ok(log.stopped(self, prepared, None));
        }

        let calibrated = self.rewrite.samples.is_some() || self.rewrite.statistics.is_some();
        let knowledge = Knowledge { calibrated, samples: self.rewrite.teaches(), ..Knowledge::default() };
        let opened = reopen(&mut prepared, self.config, self.target, &knowledge, self.rewrite.plan)?;
        if !opened.changes.is_empty() {
            log.report.passes.push(PassRow::new(reopen::PASS, &opened));
        }
        let measure = self.can_measure(&prepared, &mut log);
        let Decided { plan, solution, statistics, made, smoothed } = decide(self, &prepared, measure, &mut log)?;
        let planned = smoothed.as_ref().unwrap_or(&prepared);
        if self.fake {
            check_groups(planned, &plan)?;
        }
        self.describe(planned, &plan, &solution, &statistics, &mut log);
        let (made, measured) = match made {
            Some(Made { model, passes, quality }) => (Some((model, passes)), Some(quality)),
            None => (None, None),
        };
        // Whoever looks at the model after each pass, or wants some of them only, has them run again.
        let as_it_is = !self.fake && self.rewrite.after.is_none() && self.rewrite.passes.is_none();
        let mut model = if let Some((model, passes)) = made.filter(|_| as_it_is) {
            log.report.passes.extend(passes);
            model
        } else {
            let mut model = solution.corrected(&prepared);
            let context = Context::planned(self.rewrite.evaluate, &plan, &solution);
            if self.follow(recipe, &mut model, &context, &mut log)?.is_break() {
                return Ok(log.stopped(self, model, Some(plan)));
            }
            model
        };
        log.report.opset.1 = model.opset().unwrap_or(0);
        model.set_metadata("amax.version", env!("CARGO_PKG_VERSION"));
        model.set_metadata("amax.target", &self.target.name);
        let found = check::violations(&model, self.target).into_iter().filter(|found| !hazards.contains(found));
        let warnings = self.settle(found.collect(), &prepared, &plan, recipe)?;
        log.report.warnings.extend(warnings);
        log.report.count_operators(&model);
        log.lap("rewrite");
        let changed = !plan.weights.is_empty() || !plan.activations.is_empty();
        if let Some(samples) = self.rewrite.samples.filter(|_| measure && changed) {
            log.report.quality = match measured {
                Some(found) => found,
                None => quality(&prepared, &model, samples, self)?,
            };
            log.lap("measure");
        }
        self.verify(original, &model, measure && changed, &mut log)?;
        log.report.bytes = (file::estimated_size(original), file::estimated_size(&model));
        Ok(Rewritten { model, report: log.report, plan: Some(plan), stopped: false })
    }

    /// What the target would run wrongly: as a warning where the model is like that without the plan, since its own quantizers
    /// are kept as they are; otherwise as an error of whoever made the plan.
    fn settle(&self, found: Vec<String>, prepared: &Model, plan: &Plan, recipe: &Recipe) -> Result<Vec<String>> {
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let (plan, solution) = (plan.without_sites(), Solution::default());
        let mut unplanned = prepared.clone();
        let context = Context::planned(self.rewrite.evaluate, &plan, &solution);
        for pass in recipe.passes() {
            pipeline::apply(&mut unplanned, pass, &context)?;
        }
        let own = check::violations(&unplanned, self.target);
        let (own, planned): (Vec<String>, Vec<String>) = found.into_iter().partition(|found| own.contains(found));
        let target = &self.target.name;
        if planned.is_empty() {
            return Ok(own
                .into_iter()
                .map(|own| format!("as the model is, {target} runs it wrongly: {own}"))
                .collect());
        }
        let planned = planned.join("; ");
        Err(if self.rewrite.plan.is_some() {
            Error::new(Kind::Config, format!("{target} would run the result of this plan wrongly: {planned}"))
                .with_hint("correct the plan, or make it again with amax plan")
        } else {
            Error::new(Kind::Internal, format!("{target} would run the result wrongly: {planned}"))
                .with_hint("this is a mistake in amax; please report it with the model")
        })
    }

    /// The files that what this works on was read from.
    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = file::inputs(self.rewrite.model).cloned().collect();
        files.extend(self.rewrite.samples.map(SampleSet::files).unwrap_or_default());
        files.extend(self.config.source.file.clone());
        files
    }

    /// Whether a pass is among those that were asked for.
    pub(crate) fn is_asked_for(&self, pass: &dyn Pass) -> bool {
        self.rewrite.passes.is_none_or(|only| only.iter().any(|asked| asked.name() == pass.name()))
    }

    /// Runs a recipe, as far as it is asked for.
    fn follow(
        &self,
        recipe: &Recipe,
        model: &mut Model,
        context: &Context<'_>,
        log: &mut Log,
    ) -> Result<ControlFlow<()>> {
        let mut passes = recipe.passes();
        passes.retain(|pass| self.is_asked_for(*pass));
        pipeline::run(model, &passes, context, &mut |model, name, outcome| {
            log.report.passes.push(PassRow::new(name, outcome));
            if self.rewrite.run.progress.interrupted() {
                return Err(Error::interrupted());
            }
            self.rewrite.after.map_or(Ok(ControlFlow::Continue(())), |after| after(model, name, outcome))
        })
    }

    /// Whether the result can be measured within the memory limit, as far as that is asked for.
    fn can_measure(&self, prepared: &Model, log: &mut Log) -> bool {
        let fits = fits_twice(prepared, self.rewrite.run.memory.limit);
        if self.rewrite.measure && !fits && self.rewrite.samples.is_some() {
            log.report.warnings.push(
                "the result is not measured, nor held to guard.output_db: the model and its quantized form together do \
                 not fit into the memory limit; `amax compare` measures without one"
                    .to_owned(),
            );
        }
        self.rewrite.measure && fits
    }

    /// Runs the result as deployed, as far as that is asked for and possible.
    fn verify(&self, original: &Model, model: &Model, measured: bool, log: &mut Log) -> Result<()> {
        let rewrite = self.rewrite;
        let asked = match rewrite.verify {
            Verify::Off => false,
            Verify::Auto => measured && !self.fake && self.target.is_onnxruntime() && onnxruntime().is_some(),
            Verify::On => true,
        };
        let Some(samples) = rewrite.samples.filter(|_| asked) else { return Ok(()) };
        let held = split(samples).1;
        let found = Compare::new(original, model).samples(samples).indices(&*held).how(rewrite.run).deployed();
        match found {
            Ok(found) => {
                log.report.warnings.extend(found.worse_than(&log.report.quality));
                log.report.deployed = Some(found);
            }
            Err(e) if rewrite.verify == Verify::Auto && e.kind() == Kind::Runtime => {
                let version = onnxruntime().unwrap_or_default();
                log.report.warnings.push(format!("not verified in onnxruntime {version}: {}", e.message()));
            }
            Err(e) => return Err(e),
        }
        log.lap("verify");
        Ok(())
    }

    /// Reports what was decided.
    fn describe(&self, model: &Model, plan: &Plan, solution: &Solution, statistics: &Statistics, log: &mut Log) {
        let seen = self.rewrite.samples.is_some() || self.rewrite.statistics.is_some();
        let report = &mut log.report;
        report.describe(model, plan, solution, seen.then_some(statistics));
        report.sufficiency = seen.then(|| judge(plan, solution, statistics)).filter(|found| !found.sites.is_empty());
        let refused = |w: &Weight| match &w.why {
            Reason::FloatWeight { because: Some(why), .. } if matches!(**why, Reason::NoKernelAtRunTime { .. }) => {
                Some(why.to_string())
            }
            _ => None,
        };
        if plan.activations.is_empty()
            && let Some(why) = plan.weights.iter().find_map(refused)
        {
            report.warnings.push(format!(
                "no input is quantized at run time: {why}; --form matmulinteger stores products and convolutions so that \
                 it can be"
            ));
        }
        if plan.weights.is_empty() && plan.activations.is_empty() {
            let already = plan.skipped.iter().any(|s| s.why == Reason::QuantizedAlready);
            let why = if already { ": the model is quantized already" } else { "; see what was left float and why" };
            report.warnings.push(format!("nothing was quantized{why}"));
        }
    }
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
pub(crate) fn quality(float: &Model, quantized: &Model, samples: &SampleSet, job: &Job<'_>) -> Result<Vec<QualityRow>> {
    let found = compare::compare(float, quantized, &job.rewrite.run.over(samples, &split(samples).1))?;
    Ok(found.iter().map(QualityRow::new).collect())
}

/// Indices for statistics, and indices held out for measuring: as [`statistics::split`].
#[must_use]
pub fn split(samples: &SampleSet) -> (Vec<usize>, Vec<usize>) {
    statistics::split(samples.len())
}

/// The report of a rewrite that is under way.
pub(crate) struct Log {
    pub(crate) report: Report,
    /// When the stage began that is under way.
    since: Instant,
}

impl Log {
    fn new(job: &Job<'_>) -> Self {
        let opset = job.rewrite.model.opset().unwrap_or(0);
        let report = Report {
            schema: report::SCHEMA,
            target: job.target.name.clone(),
            opset: (opset, opset),
            files: job.files(),
            ..Report::default()
        };
        Self { report, since: Instant::now() }
    }

    /// Ends a stage; the time of stages of one name adds up.
    pub(crate) fn lap(&mut self, stage: &str) {
        let seconds = self.since.elapsed().as_secs_f64();
        match self.report.seconds.iter_mut().find(|(s, _)| s == stage) {
            Some((_, total)) => *total += seconds,
            None => self.report.seconds.push((stage.to_owned(), seconds)),
        }
        self.since = Instant::now();
    }

    /// Warns of something, once.
    pub(crate) fn warn(&mut self, line: String) {
        if !self.report.warnings.contains(&line) {
            self.report.warnings.push(line);
        }
    }

    /// Warns of tensors that were NaN or infinite, once of each.
    pub(crate) fn warn_about_values(&mut self, statistics: &Statistics) {
        for (name, site) in &statistics.sites {
            let times = |count: u64| if count == 1 { "once".to_owned() } else { format!("{count} times") };
            let seen: Vec<String> = [("NaN", site.nan()), ("infinite", site.inf())]
                .into_iter()
                .filter(|&(_, count)| count > 0)
                .map(|(what, count)| format!("{what} {}", times(count)))
                .collect();
            if seen.is_empty() {
                continue;
            }
            self.warn(format!("\"{name}\" was {} in the samples; its range ignores them", seen.join(" and ")));
        }
    }

    /// The result of a rewrite that ended early.
    fn stopped(self, job: &Job<'_>, model: Model, plan: Option<Plan>) -> Rewritten {
        let mut report = self.report;
        report.bytes = (file::estimated_size(job.rewrite.model), file::estimated_size(&model));
        Rewritten { model, report, plan, stopped: true }
    }
}
