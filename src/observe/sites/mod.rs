//! Where a quantized model loses accuracy: each site's own error, and what has accumulated there.
//!
//! A site is a pair of `QuantizeLinear` and `DequantizeLinear` around an activation, or a node with a quantized constant.
//! Its *own* error is that of this site alone, fed by the float model: an activation of the float model through the pair,
//! or the node with its quantized constants on the float model's activations. Its *accumulated* error is that of the same
//! tensor in the quantized model as a whole, against the float model.
//!
//! Sites are matched to the float model by the names of tensors, so preparation and quantization must have kept them; the
//! suffixes that amax and onnxruntime's quantizer give to tensors beside an original are known. What cannot be matched is
//! listed with the reason.
//!
//! Samples stream: what is kept is a few sums for each site, and for each sample that runs the float tensors that the
//! quantized model is still to be compared with, in a temporary file where they are large.

mod find;
mod store;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::pool::{by_shape, run};
use super::run::Run;
use crate::error::Result;
use crate::ir::Model;
use crate::numerics::metrics::Metrics;
use crate::runtime::{Observe, Session};
pub(crate) use find::SUFFIXES;
use find::{Found, Planned};
use store::Store;

/// What is quantized at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An activation, by a pair of `QuantizeLinear` and `DequantizeLinear`.
    Activation,
    /// A constant that a node reads; the error is that of the node's output.
    Weight,
}

/// The error of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quality {
    /// Signal to quantization noise, in dB; infinite where nothing differs, which JSON shows as `null`.
    pub sqnr_db: f64,
    /// Cosine similarity.
    pub cosine: f64,
    /// Largest absolute difference.
    pub max_abs_error: f32,
}

/// A site and its errors.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Site {
    /// `<node>.output`, `<node>.input` for an input of the model, `<node>.weight`.
    pub site: String,
    /// What is quantized.
    pub kind: Kind,
    /// The node that the tensor comes from or, at an input of the model, goes to.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// The tensor of the quantized model that is compared.
    pub tensor: String,
    /// Element format.
    pub format: String,
    /// `tensor`, `channel`, `group of N`, or `tensor, at run time`.
    pub granularity: String,
    /// The error of this site alone; absent where it could not be measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own: Option<Quality>,
    /// The error of the quantized model up to here; absent where it could not be measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulated: Option<Quality>,
    /// Why an error is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Quality {
    fn new(metrics: &Metrics) -> Self {
        Self { sqnr_db: metrics.sqnr_db(), cosine: metrics.cosine(), max_abs_error: metrics.max_abs_error() }
    }
}

/// The sums of one site: its own error, and the accumulated one.
type Sums = [Option<Metrics>; 2];

/// The errors of each quantized site of `test` against the float model `reference`, those of the worst own SQNR first. The
/// result does not depend on the number of threads. tract runs the samples, whatever runtime is given.
///
/// # Errors
/// A model that the runtime cannot run, samples that do not fit, or an interruption.
pub fn sites(reference: &Model, test: &Model, how: &Run<'_>) -> Result<Vec<Site>> {
    let Run { samples, indices, threads, progress, .. } = *how;
    let Found { float, shown, tested, planned, mut sites } = find::find(reference, test)?;
    let (first, second) = (Session::new(&float, &shown)?, Session::new(test, &tested)?);
    drop(float);
    let order = by_shape(samples, indices);
    let places: BTreeMap<usize, usize> = order.iter().enumerate().map(|(place, &index)| (index, place)).collect();
    let totals = Mutex::new(Totals { next: 0, waiting: BTreeMap::new(), sums: vec![[None; 2]; planned.len()] });
    let planned = Arc::new(planned);
    progress.start("compare", order.len() as u64);
    run(
        how,
        &order,
        threads,
        |(), index| {
            let sample = samples.get(index)?;
            let watch = Arc::new(Watch::new(planned.clone(), shown.len()));
            let seen: Arc<dyn Observe> = Arc::new(Float(watch.clone()));
            first.run(&sample, &seen)?;
            let seen: Arc<dyn Observe> = Arc::new(Quantized(watch.clone()));
            second.run(&sample, &seen)?;
            let sums = watch.finish()?;
            totals.lock().unwrap_or_else(PoisonError::into_inner).add(places[&index], sums);
            Ok(())
        },
        || (),
    )?;
    progress.finish();
    let totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    let silent: BTreeMap<String, String> = first.unobserved().into_iter().chain(second.unobserved()).collect();
    for (plan, [own, accumulated]) in planned.iter().zip(totals.sums) {
        let site = &mut sites[plan.site];
        site.own = own.as_ref().map(Quality::new);
        site.accumulated = accumulated.as_ref().map(Quality::new);
        if site.own.is_none() || site.accumulated.is_none() {
            let names = [Some(plan.reference), plan.twin].into_iter().flatten().map(|i| &shown[i]);
            let names = names.chain(plan.test.map(|i| &tested[i]));
            let reason = names.into_iter().find_map(|name| Some(format!("\"{name}\": {}", silent.get(name)?)));
            site.why.get_or_insert_with(|| {
                reason.unwrap_or_else(|| "its tensors have other shapes in the float model".to_owned())
            });
        }
    }
    sites.sort_by(|a, b| rank(a).total_cmp(&rank(b)));
    Ok(sites)
}

/// Where a site stands: by its own SQNR, without one by the accumulated one behind all others.
fn rank(site: &Site) -> f64 {
    match site.own {
        // What is no number is worst of all.
        Some(own) if own.sqnr_db.is_nan() => f64::NEG_INFINITY,
        Some(own) => own.sqnr_db,
        None => f64::NAN,
    }
}

/// Sums over samples, added in the order of samples whatever the order they come in.
struct Totals {
    next: usize,
    waiting: BTreeMap<usize, Vec<Sums>>,
    sums: Vec<Sums>,
}

impl Totals {
    fn add(&mut self, place: usize, sums: Vec<Sums>) {
        self.waiting.insert(place, sums);
        while let Some(sums) = self.waiting.remove(&self.next) {
            self.next += 1;
            for (total, part) in self.sums.iter_mut().flatten().zip(sums.into_iter().flatten()) {
                if let Some(part) = part {
                    total.get_or_insert_default().merge(&part);
                }
            }
        }
    }
}

/// What is known of one sample while it runs.
struct Watch {
    planned: Arc<Vec<Planned>>,
    state: Mutex<State>,
}

struct State {
    /// Float tensors, by their place in the list of those shown.
    kept: Store,
    sums: Vec<Sums>,
}

/// Sees the float model, with the sites that are quantized alone beside it.
struct Float(Arc<Watch>);

/// Sees the quantized model.
struct Quantized(Arc<Watch>);

impl Watch {
    fn new(planned: Arc<Vec<Planned>>, shown: usize) -> Self {
        let sums = vec![[None; 2]; planned.len()];
        Self { planned, state: Mutex::new(State { kept: Store::new(shown), sums }) }
    }

    fn finish(&self) -> Result<Vec<Sums>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.kept.check()?;
        Ok(std::mem::take(&mut state.sums))
    }
}

impl State {
    fn compare(&mut self, site: usize, which: usize, reference: usize, values: &[f32]) {
        if let Some(float) = self.kept.get(reference)
            && float.len() == values.len()
        {
            self.sums[site][which] = Some(Metrics::of(&float, values));
        }
    }
}

impl Observe for Float {
    fn see(&self, shown: usize, values: &[f32], _shape: &[usize]) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let planned = self.0.planned.iter().enumerate();
        let mut keep = false;
        for (at, plan) in planned.filter(|(_, plan)| plan.reference == shown || plan.twin == Some(shown)) {
            if plan.reference == shown {
                keep = true;
                // The site alone may have been computed before the float tensor was.
                if let Some(alone) = plan.twin.and_then(|twin| state.kept.take(twin))
                    && alone.len() == values.len()
                {
                    state.sums[at][0] = Some(Metrics::of(values, &alone));
                }
            } else if state.kept.has(plan.reference) {
                state.compare(at, 0, plan.reference, values);
            } else {
                keep = true;
            }
        }
        if keep {
            state.kept.put(shown, values);
        }
    }
}

impl Observe for Quantized {
    fn see(&self, tested: usize, values: &[f32], _shape: &[usize]) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let planned = self.0.planned.iter().enumerate();
        for (at, plan) in planned.filter(|(_, plan)| plan.test == Some(tested)) {
            state.compare(at, 1, plan.reference, values);
        }
    }
}
