//! Runs samples and watches tensors: the only step that runs inference for its numbers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::numerics::metrics::Metrics;
use crate::runtime::{Observe, Options, Session};
use crate::samples::SampleSet;
use crate::statistics::{SiteStatistics, Statistics};

/// Told how far a long step is, and asked whether to go on.
pub trait Progress: Sync {
    /// A step of `total` parts begins.
    fn start(&self, step: &str, total: u64);
    /// One part is done.
    fn tick(&self);
    /// The step is over.
    fn finish(&self);
    /// Whether the user asked to stop.
    fn interrupted(&self) -> bool;
}

/// Reports nothing and never stops.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _step: &str, _total: u64) {}
    fn tick(&self) {}
    fn finish(&self) {}
    fn interrupted(&self) -> bool {
        false
    }
}

/// What calibration found.
#[derive(Clone, Debug, Default)]
pub struct Calibrated {
    /// What was seen at each tensor.
    pub statistics: Statistics,
    /// Tensors that could not be observed, with the reason.
    pub unobserved: BTreeMap<String, String>,
    /// How the runtime runs the model.
    pub method: &'static str,
}

/// Runs the samples at `indices` and observes the tensors named `sites`.
///
/// Each sample runs on one thread; the result does not depend on how many there are. Memory is the runtime's copy of
/// the model, one sample's tensors a thread, and one bounded state a site and thread.
///
/// # Errors
/// A model that the runtime cannot run, a sample that does not fit, or an interruption.
pub fn calibrate(
    model: &Model,
    sites: &[String],
    samples: &SampleSet,
    indices: &[usize],
    threads: usize,
    progress: &dyn Progress,
) -> Result<Calibrated> {
    let session = Session::new(model, sites)?;
    let order = by_shape(samples, indices);
    progress.start("calibrate", order.len() as u64);
    let states = run(
        &order,
        threads,
        progress,
        |state: &Arc<Sites>, index| {
            let sample = samples.get(index)?;
            state.begin(index);
            let observe: Arc<dyn Observe> = state.clone();
            session.run(&sample, &observe).map(|_| ())
        },
        || Arc::new(Sites::new(sites.len())),
    )?;
    progress.finish();
    let mut unobserved: BTreeMap<String, String> = session.unobserved().into_iter().collect();
    if states.iter().all(|s| !s.seen.load(Ordering::Relaxed)) && sites.iter().any(|s| !unobserved.contains_key(s)) {
        return Err(Error::new(Kind::Runtime, "the runtime ran the samples and showed none of the tensors to observe")
            .with_hint("pass --calib none to quantize weights only, and please report this with the model"));
    }
    let mut merged: Vec<SiteStatistics> = vec![SiteStatistics::new(); sites.len()];
    for state in states {
        for (total, part) in merged.iter_mut().zip(state.take()) {
            total.merge(&part);
        }
    }
    for (name, site) in sites.iter().zip(&merged) {
        if site.finite() > 0 || unobserved.contains_key(name) {
            continue;
        }
        if site.count() > 0 && is_input(model, name) {
            return Err(Error::new(Kind::Samples, "this input is NaN or infinite in every sample")
                .at_value(name)
                .with_hint("look at how the samples are preprocessed"));
        }
        let what = if site.count() == 0 { "had no values" } else { "was NaN or infinite" };
        unobserved.insert(name.clone(), format!("\"{name}\" {what} in every sample"));
    }
    let mut statistics = Statistics { sample_count: order.len() as u64, ..Statistics::default() };
    for (name, site) in sites.iter().zip(merged) {
        if !unobserved.contains_key(name) {
            statistics.sites.insert(name.clone(), site);
        }
    }
    Ok(Calibrated { statistics, unobserved, method: session.method() })
}

/// Whether a tensor is an input of the main graph.
fn is_input(model: &Model, name: &str) -> bool {
    model.graph(model.main()).inputs().any(|v| model.value(v).name() == name)
}

/// How close the outputs of two models are, by output name, over the samples at `indices`.
///
/// # Errors
/// Outputs that do not match, or as [`calibrate`].
pub fn compare(
    reference: &Model,
    test: &Model,
    samples: &SampleSet,
    indices: &[usize],
    threads: usize,
    progress: &dyn Progress,
) -> Result<Vec<(String, Metrics)>> {
    let names =
        |m: &Model| -> Vec<String> { m.graph(m.main()).outputs().map(|v| m.value(v).name().to_owned()).collect() };
    let (outputs, others) = (names(reference), names(test));
    let lacking = outputs.iter().find(|o| !others.contains(o)).map(|o| (o, "second", &others));
    if let Some((output, which, has)) =
        lacking.or_else(|| others.iter().find(|o| !outputs.contains(o)).map(|o| (o, "first", &outputs)))
    {
        return Err(Error::model(format!("the {which} model has no such output"))
            .at_value(output)
            .with_hint(format!("its outputs are {}: are these the same model?", has.join(", "))));
    }
    let (first, second) = (Session::new(reference, &[])?, Session::new(test, &[])?);
    let order = by_shape(samples, indices);
    progress.start("compare", order.len() as u64);
    let found: Mutex<BTreeMap<usize, Vec<(String, Metrics)>>> = Mutex::new(BTreeMap::new());
    run(
        &order,
        threads,
        progress,
        |(), index| {
            let sample = samples.get(index)?;
            let nothing: Arc<dyn Observe> = Arc::new(Blind);
            let (a, b) = (first.run(&sample, &nothing)?, second.run(&sample, &nothing)?);
            let mut row = Vec::new();
            for (name, a) in &a {
                let Some((_, b)) = b.iter().find(|(n, _)| n == name) else { continue };
                let (Some(x), Some(y)) = (a.to_f32().or_else(|| integers(a)), b.to_f32().or_else(|| integers(b)))
                else {
                    continue;
                };
                if x.len() != y.len() {
                    return Err(Error::new(Kind::Model, format!("shapes differ: {:?} and {:?}", a.dims(), b.dims()))
                        .at_value(name));
                }
                row.push((name.clone(), Metrics::of(&x, &y)));
            }
            found.lock().unwrap_or_else(PoisonError::into_inner).insert(index, row);
            Ok(())
        },
        || (),
    )?;
    progress.finish();
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut total: Vec<(String, Metrics)> = Vec::new();
    for row in found.into_values() {
        for (name, metrics) in row {
            match total.iter_mut().find(|(n, _)| *n == name) {
                Some((_, sum)) => sum.merge(&metrics),
                None => total.push((name, metrics)),
            }
        }
    }
    Ok(total)
}

/// The outputs of a model for each of the samples at `indices`, in that order.
///
/// # Errors
/// As [`calibrate`].
pub fn outputs(
    model: &Model,
    samples: &SampleSet,
    indices: &[usize],
    progress: &dyn Progress,
) -> Result<Vec<Vec<(String, Tensor)>>> {
    // The float model was checked against the plain plan already; what is compared here differs in its quantizers only.
    let session = Session::with_options(model, &[], Options { check: false, ..Options::default() })?;
    let nothing: Arc<dyn Observe> = Arc::new(Blind);
    indices
        .iter()
        .map(|&index| {
            if progress.interrupted() {
                return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
            }
            session.run(&samples.get(index)?, &nothing)
        })
        .collect()
}

fn integers(tensor: &Tensor) -> Option<Vec<f32>> {
    Some(tensor.to_i64()?.into_iter().map(|v| v as f32).collect())
}

/// Samples of one shape next to each other, so that a plan compiled for a shape serves all of them.
pub(crate) fn by_shape(samples: &SampleSet, indices: &[usize]) -> Vec<usize> {
    let mut order = indices.to_vec();
    order.sort_by_cached_key(|&i| (samples.shape_key(i), i));
    order
}

/// Feeds `order` to `threads` workers, each with a state of its own; the first error in order of samples wins.
pub(crate) fn run<S: Send>(
    order: &[usize],
    threads: usize,
    progress: &dyn Progress,
    work: impl Fn(&S, usize) -> Result<()> + Sync,
    state: impl Fn() -> S + Sync,
) -> Result<Vec<S>> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let threads = threads.clamp(1, order.len().max(1));
    let worker = || {
        let state = state();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(&index) = order.get(at) else { return state };
            let result = if progress.interrupted() {
                Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"))
            } else {
                work(&state, index)
            };
            if let Err(error) = result {
                next.store(order.len(), Ordering::Relaxed);
                let mut slot = failed.lock().expect("no panic while held");
                if slot.as_ref().is_none_or(|(first, _)| at < *first) {
                    *slot = Some((at, error));
                }
                return state;
            }
            progress.tick();
        }
    };
    let states = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    if let Some((_, error)) = failed.into_inner().expect("no panic while held") {
        return Err(error);
    }
    states.into_iter().map(|s| s.map_err(|_| Error::new(Kind::Internal, "a calibration thread panicked"))).collect()
}

/// The sites of one thread.
struct Sites {
    /// Whether any tensor was shown.
    seen: AtomicBool,
    sample: AtomicUsize,
    states: Vec<Mutex<SiteStatistics>>,
}

impl Sites {
    fn new(count: usize) -> Self {
        let states = (0..count).map(|_| Mutex::new(SiteStatistics::new())).collect();
        Self { seen: AtomicBool::new(false), sample: AtomicUsize::new(0), states }
    }

    fn begin(&self, index: usize) {
        self.sample.store(index, Ordering::Relaxed);
    }

    fn take(&self) -> Vec<SiteStatistics> {
        self.states.iter().map(|s| std::mem::take(&mut *s.lock().expect("no panic while held"))).collect()
    }
}

impl Observe for Sites {
    fn see(&self, site: usize, values: &[f32], _shape: &[usize]) {
        self.seen.store(true, Ordering::Relaxed);
        let index = self.sample.load(Ordering::Relaxed) as u32;
        self.states[site].lock().expect("no panic while held").observe(index, values);
    }
}

/// Observes nothing.
struct Blind;

impl Observe for Blind {
    fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
}
