//! Statistics of a model's activations, from a run over samples.

use std::path::Path;

use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, content_hash};
use crate::observe::calibrate::{Checkpoint, Observation, Site, prepare, sites};
use crate::observe::run::{How, memory_method, run_methods};
use crate::passes::Evaluate;
use crate::plan::{Knowledge, Mode, plan};
use crate::rewrite::split;
use crate::runtime::{Runtime, TractEvaluate};
use crate::samples::SampleSet;
use crate::statistics::Statistics;
use crate::targets::Target;

/// Runs a model on samples and keeps what its activations held, for [`Rewrite::statistics`](crate::Rewrite::statistics).
#[derive(Clone, Copy)]
#[must_use = "nothing is done before `run`"]
pub struct Calibrate<'a> {
    model: &'a Model,
    samples: &'a SampleSet,
    planned: Option<(&'a Config, &'a Target)>,
    hold_out: bool,
    shard: Option<(usize, usize)>,
    resume: Option<(&'a Statistics, &'a Path)>,
    checkpoint: Option<Checkpoint<'a>>,
    run: How<'a>,
    evaluate: &'a dyn Evaluate,
    keep_inputs: bool,
}

impl<'a> Calibrate<'a> {
    /// A run of `model` over all `samples` that observes every float activation which a plan for any configuration and
    /// target could ask for.
    pub fn new(model: &'a Model, samples: &'a SampleSet) -> Self {
        Self {
            model,
            samples,
            planned: None,
            hold_out: false,
            shard: None,
            resume: None,
            checkpoint: None,
            run: How::default(),
            evaluate: &TractEvaluate,
            keep_inputs: false,
        }
    }

    /// Observes only what the plan for this configuration and target asks for; the guard of a rewrite may ask for more.
    pub fn planned(mut self, config: &'a Config, target: &'a Target) -> Self {
        self.planned = Some((config, target));
        self
    }

    /// Whether to leave out the samples that a rewrite measures its result on: no unless this says otherwise.
    pub fn hold_out(mut self, hold_out: bool) -> Self {
        self.hold_out = hold_out;
        self
    }

    /// Runs one of several parts of the samples: every `parts`-th sample, from the `part`-th on, counted from 1. The parts'
    /// statistics merge to the bytes of one run.
    pub fn shard(mut self, shard: impl Into<Option<(usize, usize)>>) -> Self {
        self.shard = shard.into();
        self
    }

    /// Goes on from what a checkpoint of the same run saved; the path is that of its file, for messages.
    pub fn resume(mut self, state: impl Into<Option<(&'a Statistics, &'a Path)>>) -> Self {
        self.resume = state.into();
        self
    }

    /// Called with the state every so often, and on an interruption.
    pub fn checkpoint(mut self, checkpoint: Checkpoint<'a>) -> Self {
        self.checkpoint = Some(checkpoint);
        self
    }

    /// As [`Rewrite::keep_inputs`](crate::Rewrite::keep_inputs), which has to be told the same.
    pub fn keep_inputs(mut self, keep: bool) -> Self {
        self.keep_inputs = keep;
        self
    }

    run_methods!();
    memory_method!();

    /// Runs the samples.
    ///
    /// # Errors
    /// A model or a sample that the runtime cannot run, a model without float activations, a shard without samples, a state
    /// of another run, a checkpoint that fails, a limit that cannot be kept to, an interruption.
    pub fn run(&self) -> Result<Statistics> {
        let prepared =
            prepare(self.model, self.evaluate, !self.keep_inputs && !self.samples.give_defaults(self.model))?;
        let (sites, mut asked) = self.asked(&prepared)?;
        // Shards of two runtimes would differ in the last bits from those of one.
        if self.run.runtime != Runtime::Tract {
            asked.push_str(", in onnxruntime");
        }
        if sites.is_empty() {
            return Err(Error::model("the model has no float activation that could be quantized"));
        }
        let indices = self.indices();
        let fresh = Statistics {
            model_hash: content_hash(self.model),
            samples_hash: self.samples.content_hash()?,
            asked,
            sample_total: self.samples.len() as u64,
            ..Statistics::default()
        };
        let start = match self.resume {
            Some((state, path)) => {
                check_state(state, &fresh, &indices).map_err(|e| e.in_file(path))?;
                state.clone()
            }
            None => fresh,
        };
        let run = self.run.over(self.samples, &indices);
        Observation { model: &prepared, sites: &sites, run, checkpoint: self.checkpoint }.run(start)
    }

    /// Which samples run, in order; none in a shard beyond the last sample.
    #[doc(hidden)]
    pub fn indices(&self) -> Vec<usize> {
        let whole = if self.hold_out { split(self.samples).0 } else { (0..self.samples.len()).collect() };
        let Some((part, parts)) = self.shard else { return whole };
        whole.into_iter().skip(part.saturating_sub(1)).step_by(parts.max(1)).collect()
    }

    /// What to observe, and the same in words.
    fn asked(&self, prepared: &Model) -> Result<(Vec<Site>, String)> {
        let all = sites(prepared);
        let Some((config, target)) = self.planned else { return Ok((all, "every float activation".to_owned())) };
        let knowledge = Knowledge { calibrated: true, samples: true, ..Knowledge::default() };
        let plan = plan(prepared, config, target, &knowledge)?;
        let wanted = |name: &str| plan.activations.get(name).is_some_and(|a| a.mode == Mode::Static);
        let mut found: Vec<Site> = all.into_iter().filter(|site| wanted(&site.name)).collect();
        for name in plan.activations.keys().filter(|name| wanted(name)) {
            if found.iter().all(|site| site.name != *name) {
                found.push(Site::plain(name));
            }
        }
        Ok((found, format!("what a plan for {} asks for", target.name)))
    }
}

/// Refuses the state of a run over another model, other samples or other tensors.
fn check_state(state: &Statistics, fresh: &Statistics, indices: &[usize]) -> Result<()> {
    let differs = |what: &str| {
        let error = Error::new(Kind::Samples, format!("the interrupted run had {what}"));
        Err(error.with_hint("start again without --resume"))
    };
    if state.model_hash != fresh.model_hash {
        return differs("another model");
    }
    if state.samples_hash != fresh.samples_hash || state.sample_total != fresh.sample_total {
        return differs("other samples");
    }
    if state.asked != fresh.asked {
        return differs(&format!("to observe {}, this one {}", state.asked, fresh.asked));
    }
    if state.ran.iter().any(|&i| indices.binary_search(&(i as usize)).is_err()) {
        return differs("another --shard or --hold-out");
    }
    Ok(())
}
