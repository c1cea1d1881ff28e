//! What samples show of a model's tensors, as statistics.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::memory::{self, Estimate};
use super::pool::{by_shape, lock, run};
use super::run::Run;
use crate::error::{Error, Kind, Result};
use crate::ir::view::Gemm;
use crate::ir::{Model, NodeId, User, ValueId};
use crate::onnx::DataType;
use crate::ops::{self, Role};
use crate::passes::recipes::PREPARE;
use crate::passes::{Context, Evaluate, pipeline};
use crate::reason::Reason;
use crate::runtime::{Observe, Options, Runtime, Session};
use crate::statistics::{SiteStatistics, Statistics};

/// What calibration found.
#[derive(Clone, Debug, Default)]
pub struct Calibrated {
    /// What was seen at each tensor.
    pub statistics: Statistics,
    /// Tensors that could not be observed, with the reason.
    pub unobserved: BTreeMap<String, Reason>,
}

/// The model as calibration and planning see it: after the passes that come before planning.
///
/// # Errors
/// A pass that fails.
pub fn prepare(model: &Model, evaluate: &dyn Evaluate, freeze_weights: bool) -> Result<Model> {
    let mut model = model.clone();
    let context = Context { freeze_weights, ..Context::new(evaluate) };
    for pass in PREPARE.passes() {
        pipeline::apply(&mut model, pass, &context)?;
    }
    Ok(model)
}

/// A tensor to observe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its name in the main graph.
    pub name: String,
    /// The axis whose channels are told apart, if any; negative ones count from the last, which is -1.
    pub channels: Option<isize>,
}

impl Site {
    /// A tensor without channels.
    #[must_use]
    pub fn plain(name: &str) -> Self {
        Self { name: name.to_owned(), channels: None }
    }
}

/// Every float activation that a plan for this model could ask for: what goes in and out of the operators of the
/// [table](crate::ops), in the order of the graph. `model` went through [`prepare`]. Channels are those that a convolution or a product with a constant sums over or makes.
#[must_use]
pub fn sites(model: &Model) -> Vec<Site> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for &node in model.graph(model.main()).nodes() {
        let Some(row) = ops::of(model, node) else { continue };
        let node = model.node(node);
        let data = |(index, value): (usize, &Option<ValueId>)| match row.role(index) {
            Role::Data | Role::Weight(_) => *value,
            Role::Bias | Role::Other => None,
        };
        let inputs = node.inputs().iter().enumerate().filter_map(data);
        for value in inputs.chain(node.outputs().iter().flatten().copied()) {
            let float = model.dtype(value).is_none_or(DataType::is_float);
            if float && model.constant(value).is_none() && seen.insert(value) {
                found.push(Site { name: model.value(value).name().to_owned(), channels: channel_axis(model, value) });
            }
        }
    }
    found
}

/// The axis of the channels of an activation, by who reads or makes it.
pub(super) fn channel_axis(model: &Model, value: ValueId) -> Option<isize> {
    let heavy = |node: NodeId| {
        let node = model.node(node);
        let constant = |input: usize| node.input(input).is_some_and(|v| model.constant(v).is_some());
        match node.op_type() {
            _ if !node.domain().is_empty() => None,
            "Conv" | "ConvTranspose" => Some(1),
            "MatMul" if constant(1) => Some(-1),
            "Gemm" if constant(1) && Gemm::of(node).is_some_and(|gemm| !gemm.trans_a) => Some(-1),
            _ => None,
        }
    };
    let readers = model.value(value).users().iter().filter_map(|user| match user {
        User::Node { node, input: 0 } => heavy(*node),
        _ => None,
    });
    let made_by = model.producer(value).and_then(heavy);
    readers.into_iter().next().or(made_by)
}

/// A run over samples whose state can be saved on the way.
#[derive(Clone, Copy)]
pub struct Observation<'a> {
    /// The prepared model.
    pub model: &'a Model,
    /// What to observe.
    pub sites: &'a [Site],
    /// The samples and how they are run.
    pub run: Run<'a>,
    /// Called with the state every so often, and on an interruption.
    pub checkpoint: Option<Checkpoint<'a>>,
}

/// When and how the state of a run is saved.
#[derive(Clone, Copy)]
pub struct Checkpoint<'a> {
    /// Time between two savings.
    pub every: Duration,
    /// Saves it.
    pub save: &'a (dyn Fn(&Statistics) -> Result<()> + Sync),
}

impl Observation<'_> {
    /// Runs those samples that `start` does not have yet, and adds to it what they show. `start` is empty, or what a
    /// checkpoint of the same observation saved; its hashes are kept as they are. Every site ends up in
    /// [`Statistics::sites`], or in [`Statistics::unobserved`] with the reason.
    ///
    /// Each sample runs on one thread. The result depends neither on how many there are, nor on which samples `start` had
    /// already. Memory is the runtime's copy of the model, one sample's tensors a thread, and one bounded state a site.
    ///
    /// With a limit in [`Run::memory`], fewer samples run at once where that keeps to it. A model that is too
    /// large for it runs in [segments](crate::runtime::segments): the same operators on the same values. What is observed
    /// is the same bytes wherever the runtime computes an operator alike with and without its neighbours beyond the cut,
    /// and else differs as another order of summation does. Such a run cannot be saved on the way: an interruption leaves
    /// what `start` had.
    ///
    /// # Errors
    /// A model that the runtime cannot run, a sample that does not fit, a `start` that observed other tensors, a
    /// checkpoint that fails, a limit that nothing can be kept to or in a runtime other than tract, or an interruption.
    pub fn run(&self, start: Statistics) -> Result<Statistics> {
        let Self { model, sites, checkpoint, .. } = *self;
        let Run { samples, indices, runtime, threads, progress, memory, .. } = self.run;
        if runtime != Runtime::Tract && (memory.limit.is_some() || memory.segment.is_some()) {
            return Err(Error::new(Kind::Usage, format!("the runtime {} keeps to no memory limit", runtime.name()))
                .with_hint("drop the limit, or run in tract"));
        }
        let shared = Arc::new(Shared::new(sites, start, indices.len())?);
        let left: Vec<usize> = {
            let statistics = lock(&shared.rest);
            indices.iter().copied().filter(|&i| statistics.ran.binary_search(&(i as u32)).is_err()).collect()
        };
        let order = by_shape(samples, &left);
        let share = memory.share(model, sites.len(), order.len())?;
        if share.as_ref().is_some_and(|share| !share.holds_model()) {
            return self.run_segments(&shared, &order, share.unwrap_or_default());
        }
        let names: Vec<String> = sites.iter().map(|s| s.name.clone()).collect();
        let session = Session::with_options(model, &names, Options { runtime, ..Options::default() })?;
        let mut threads = threads.min(order.len()).max(1);
        if let Some(estimate) = memory::estimate(&session, samples, &order)? {
            if let Some(share) = share {
                let Some(some) = share.threads(&estimate, threads) else {
                    drop(session);
                    return self.run_segments(&shared, &order, share);
                };
                threads = some;
            }
            progress.memory(&Estimate {
                threads,
                state: memory::state(sites.len(), order.len()),
                limit: memory.limit,
                ..estimate
            });
        }
        let every_site: Arc<[Option<usize>]> = (0..sites.len()).map(Some).collect();
        let saved = Mutex::new(Instant::now());
        progress.start("calibrate", order.len() as u64);
        let torn = AtomicBool::new(false);
        let ran = run(
            &self.run,
            &order,
            threads,
            |watch: &Arc<Watch>, index| {
                let sample = samples.get(index)?;
                {
                    // While any sample is half seen, nothing is saved.
                    let _open = shared.gate.read().unwrap_or_else(PoisonError::into_inner);
                    watch.sample.store(index, Ordering::Relaxed);
                    let observe: Arc<dyn Observe> = watch.clone();
                    session.run(&sample, &observe).inspect_err(|_| torn.store(true, Ordering::Relaxed))?;
                    let mut statistics = lock(&shared.rest);
                    let at = statistics.ran.partition_point(|&i| i < index as u32);
                    statistics.ran.insert(at, index as u32);
                }
                let Some(Checkpoint { every, save }) = checkpoint else { return Ok(()) };
                // Where another thread is saving already, this one goes on.
                let Ok(mut saved) = saved.try_lock() else { return Ok(()) };
                if saved.elapsed() >= every {
                    shared.with_all(session.unobserved(), |all| save(all))?;
                    *saved = Instant::now();
                }
                Ok(())
            },
            || Arc::new(Watch::new(&shared, &every_site)),
        );
        match (ran, checkpoint) {
            (Ok(_), _) => {}
            // What a sample showed until it was stopped cannot be taken back.
            (Err(error), Some(Checkpoint { save, .. }))
                if error.kind() == Kind::Interrupted && !torn.load(Ordering::Relaxed) =>
            {
                shared.with_all(session.unobserved(), |all| save(all))?;
                return Err(error);
            }
            (Err(error), _) => return Err(error),
        }
        progress.finish();
        shared.with_all(session.unobserved(), |all| Ok(std::mem::take(all)))
    }
}

/// Statistics from which ranges can be taken: sites that never had a finite value count as not observed.
///
/// # Errors
/// An input of the model that was NaN or infinite in every sample.
pub fn usable(model: &Model, mut statistics: Statistics) -> Result<Calibrated> {
    let unobserved = std::mem::take(&mut statistics.unobserved).into_iter();
    let mut unobserved: BTreeMap<String, Reason> =
        unobserved.map(|(tensor, cause)| (tensor.clone(), Reason::Unobserved { tensor, cause })).collect();
    for (name, site) in &statistics.sites {
        if site.finite() > 0 {
            continue;
        }
        if site.count() > 0 && is_input(model, name) {
            return Err(Error::new(Kind::Samples, "this input is NaN or infinite in every sample")
                .at_value(name)
                .with_hint("look at how the samples are preprocessed"));
        }
        let tensor = name.clone();
        let why = if site.count() == 0 { Reason::NoValues { tensor } } else { Reason::NeverFinite { tensor } };
        unobserved.insert(name.clone(), why);
    }
    statistics.sites.retain(|name, _| !unobserved.contains_key(name));
    Ok(Calibrated { statistics, unobserved })
}

/// Whether a tensor is an input of the main graph.
fn is_input(model: &Model, name: &str) -> bool {
    model.graph(model.main()).inputs().any(|v| model.value(v).name() == name)
}

/// What all threads add to: states do not depend on the order in which samples come.
pub(super) struct Shared {
    states: Vec<(String, Mutex<SiteStatistics>)>,
    /// Everything but the sites.
    pub(super) rest: Mutex<Statistics>,
    /// Held for reading while a sample runs.
    gate: RwLock<()>,
}

impl Shared {
    /// States for `samples` samples, those of `start` among them.
    fn new(sites: &[Site], mut start: Statistics, samples: usize) -> Result<Self> {
        let known: BTreeSet<&str> = start.sites.keys().chain(start.unobserved.keys()).map(String::as_str).collect();
        let asked: BTreeSet<&str> = sites.iter().map(|s| s.name.as_str()).collect();
        if !start.ran.is_empty() && known != asked {
            return Err(Error::new(Kind::Samples, "the state to continue from observed other tensors")
                .with_hint("start from the beginning, or give the options of the run that was interrupted"));
        }
        let mut found = std::mem::take(&mut start.sites);
        let mut state = |site: &Site| {
            let fresh = || site.channels.map_or_else(SiteStatistics::new, SiteStatistics::per_channel);
            let mut state = found.remove(&site.name).unwrap_or_else(fresh);
            state.reserve(samples);
            (site.name.clone(), Mutex::new(state))
        };
        Ok(Self { states: sites.iter().map(&mut state).collect(), rest: Mutex::new(start), gate: RwLock::default() })
    }

    /// Calls `use_all` with everything seen so far, between two samples.
    /// `unobserved` has the sites that the runtime does not show, with the reason.
    pub(super) fn with_all<T>(
        &self,
        unobserved: Vec<(String, String)>,
        use_all: impl FnOnce(&mut Statistics) -> Result<T>,
    ) -> Result<T> {
        let _closed = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut statistics = lock(&self.rest);
        statistics.sample_count = statistics.ran.len() as u64;
        let mut reasons: BTreeMap<String, String> = unobserved.into_iter().collect();
        for (name, state) in &self.states {
            let mut state = lock(state);
            if !state.samples().is_empty() {
                statistics.unobserved.remove(name);
                statistics.sites.insert(name.clone(), std::mem::take(&mut *state));
            } else if let Some(why) = reasons.remove(name) {
                statistics.unobserved.insert(name.clone(), why);
            } else if !statistics.unobserved.contains_key(name) {
                let why = format!("\"{name}\" was not computed in any sample");
                statistics.unobserved.insert(name.clone(), why);
            }
        }
        let result = use_all(&mut statistics);
        for (name, state) in &self.states {
            if let Some(site) = statistics.sites.remove(name) {
                *lock(state) = site;
            }
        }
        result
    }
}

/// One thread's view of the sites.
pub(super) struct Watch {
    shared: Arc<Shared>,
    /// Which of the shared sites each observed one is, if any.
    sites: Arc<[Option<usize>]>,
    pub(super) sample: AtomicUsize,
}

impl Watch {
    pub(super) fn new(shared: &Arc<Shared>, sites: &Arc<[Option<usize>]>) -> Self {
        Self { shared: shared.clone(), sites: sites.clone(), sample: AtomicUsize::new(0) }
    }
}

impl Observe for Watch {
    fn see(&self, site: usize, values: &[f32], shape: &[usize]) {
        let index = self.sample.load(Ordering::Relaxed) as u32;
        if let Some(site) = self.sites[site] {
            lock(&self.shared.states[site].1).observe_tensor(index, shape, values);
        }
    }
}
