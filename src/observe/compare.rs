//! The outputs of models on samples, and how far those of two models are apart.
//!
//! Where the size of an output follows from values (the boxes that a `NonMaxSuppression` keeps), rows of two models do not belong
//! together. Such an output is not compared; what goes into the operator that decides is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::calibrate::channel_axis;
use super::pool::{Blind, Unseen, by_shape, lock, run};
use super::run::Run;
use super::vocabulary::{Vocabulary, logits, vocabularies};
use crate::error::{Error, Result};
use crate::ir::{Model, Tensor, ValueId};
use crate::numerics::logits::Logits;
use crate::numerics::metrics::Metrics;
use crate::onnx::DataType;
use crate::runtime::{Observe, Options, Session};
use crate::samples::Sample;

/// Operators whose results have as many elements as their values say.
const DECIDING: [&str; 4] = ["Compress", "NonMaxSuppression", "NonZero", "Unique"];

/// Outputs with more channels are not told apart by channel.
const MOST_CHANNELS: usize = 4096;

/// How close one tensor of two models is, over all samples.
#[derive(Clone, Debug, Default)]
pub struct Closeness {
    /// Tensor.
    pub name: String,
    /// The operator that it goes into, where it is no output but decides the size of one.
    pub into: Option<String>,
    /// How far floats are apart.
    pub metrics: Metrics,
    /// The same for each channel, where there are some.
    pub channels: Vec<Metrics>,
    /// The same as distributions over a vocabulary, where they are logits.
    pub logits: Option<Logits>,
    /// Whether the elements are floats; of others only those count that are the same.
    pub float: bool,
    /// Elements that are the same in both models.
    pub equal: u64,
    /// Samples in which the shapes differ, and the shapes in the first of them.
    pub unlike: Option<(usize, [Vec<usize>; 2])>,
}

/// How close the outputs of two models are, in the order of the outputs.
///
/// # Errors
/// Outputs that do not match, a model that the runtime cannot run, a sample that does not fit, or an interruption.
pub fn compare(reference: &Model, test: &Model, how: &Run<'_>) -> Result<Vec<Closeness>> {
    let Run { samples, indices, runtime, threads, progress, .. } = *how;
    let mut deciding = deciding(reference);
    deciding.retain(|name, _| test.value_named(name).is_some());
    let pairs = Pairs::of(reference, test, deciding)?;
    let (first, second) = (showing(reference, &pairs.deciding), showing(test, &pairs.deciding));
    let session = |model| Session::with_options(model, &[], Options { runtime, ..Options::default() });
    let (first, second) = (session(&first)?, session(&second)?);
    let order = by_shape(samples, indices);
    progress.start("compare", order.len() as u64);
    let found: Mutex<BTreeMap<usize, Vec<Closeness>>> = Mutex::new(BTreeMap::new());
    run(
        how,
        &order,
        threads,
        |(), index| {
            let sample = samples.get(index)?;
            let nothing: Arc<dyn Observe> = Arc::new(Blind);
            let rows = pairs.rows(&sample, &first.run(&sample, &nothing)?, &second.run(&sample, &nothing)?);
            lock(&found).insert(index, rows);
            Ok(())
        },
        || (),
    )?;
    progress.finish();
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(pairs.total(found.into_values().flatten()))
}

/// The tensors of two models that belong together.
pub(super) struct Pairs {
    /// The outputs and what decides their sizes, with the axis of their channels.
    axes: BTreeMap<String, Option<isize>>,
    /// The tensors that decide how large outputs are, each with the operator that it goes into.
    deciding: BTreeMap<String, String>,
    /// The outputs that may be logits.
    vocabularies: BTreeMap<String, Vec<Vocabulary>>,
}

impl Pairs {
    /// Pairs the outputs.
    ///
    /// # Errors
    /// An output that one of the models does not have.
    pub(super) fn of(reference: &Model, test: &Model, deciding: BTreeMap<String, String>) -> Result<Self> {
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
        let axis = |name: &str| reference.value_named(name).and_then(|value| channel_axis(reference, value));
        let axes = outputs.iter().chain(deciding.keys()).map(|name| (name.clone(), axis(name))).collect();
        Ok(Self { axes, deciding, vocabularies: vocabularies(reference) })
    }

    /// How close the tensors of one sample are.
    pub(super) fn rows(&self, sample: &Sample, a: &[(String, Tensor)], b: &[(String, Tensor)]) -> Vec<Closeness> {
        let row = |(name, a): &(String, Tensor)| {
            let (_, b) = b.iter().find(|(n, _)| n == name)?;
            let logits = |x: &[f32], y: &[f32]| logits(self.vocabularies.get(name)?, sample, &a.dims(), x, y);
            let mut row = Closeness::of(a, b, self.axes.get(name).copied().flatten(), logits)?;
            row.name.clone_from(name);
            row.into = self.deciding.get(name).cloned();
            Some(row)
        };
        a.iter().filter_map(row).collect()
    }

    /// How close they are over all samples, from the rows of each in the order of the samples.
    pub(super) fn total(&self, found: impl IntoIterator<Item = Closeness>) -> Vec<Closeness> {
        let mut total: Vec<Closeness> = Vec::new();
        for row in found {
            match total.iter_mut().find(|sum| sum.name == row.name) {
                Some(sum) => sum.merge(row),
                None => total.push(row),
            }
        }
        // What decides a size matters only where the sizes came out differently.
        let differ = total.iter().any(|row| row.unlike.is_some());
        total.retain(|row| !self.deciding.contains_key(&row.name) || differ);
        total
    }
}

impl Closeness {
    fn of(
        a: &Tensor,
        b: &Tensor,
        axis: Option<isize>,
        logits: impl Fn(&[f32], &[f32]) -> Option<Logits>,
    ) -> Option<Self> {
        let mut found = Self { float: a.dtype().is_float(), ..Self::default() };
        if a.dims() != b.dims() {
            found.unlike = Some((1, [a.dims(), b.dims()]));
        } else if a.dtype() == DataType::String {
            found.metrics.count = a.len() as u64;
            found.equal = a.strings().iter().zip(b.strings().iter()).filter(|(x, y)| x == y).count() as u64;
        } else if let (false, Some(x), Some(y)) = (found.float, a.to_i64(), b.to_i64()) {
            found.metrics.count = a.len() as u64;
            found.equal = x.iter().zip(&y).filter(|(x, y)| x == y).count() as u64;
        } else {
            let (x, y) = (a.to_f32()?, b.to_f32()?);
            found.metrics = Metrics::of(&x, &y);
            found.equal = x.iter().zip(&y).filter(|(x, y)| x.to_bits() == y.to_bits()).count() as u64;
            found.channels = by_channel(&x, &y, &a.dims(), axis);
            found.logits = logits(&x, &y);
        }
        Some(found)
    }

    fn merge(&mut self, other: Self) {
        self.metrics.merge(&other.metrics);
        self.equal += other.equal;
        if let Some(more) = &other.logits {
            self.logits.get_or_insert_default().merge(more);
        }
        if self.channels.len() == other.channels.len() {
            self.channels.iter_mut().zip(&other.channels).for_each(|(sum, channel)| sum.merge(channel));
        } else {
            self.channels.clear();
        }
        if let Some((samples, shapes)) = other.unlike {
            self.unlike.get_or_insert((0, shapes)).0 += samples;
        }
    }

    /// The SQNR of the channel in the middle, of those that have a signal; `None` where there are fewer than four.
    #[must_use]
    pub fn median_channel_db(&self) -> Option<f64> {
        let mut found: Vec<f64> = self.channels.iter().filter(|c| c.signal > 0.0).map(Metrics::sqnr_db).collect();
        found.sort_by(f64::total_cmp);
        (found.len() >= 4).then(|| found[(found.len() - 1) / 2])
    }
}

/// The metrics of each channel; where nothing tells the axis, it is the second of images and volumes and else the last.
fn by_channel(x: &[f32], y: &[f32], dims: &[usize], axis: Option<isize>) -> Vec<Metrics> {
    let rank = dims.len();
    let axis = axis.unwrap_or(if rank > 3 { 1 } else { -1 });
    let Some(axis) = rank.checked_add_signed(if axis < 0 { axis } else { axis - rank.cast_signed() }) else {
        return Vec::new();
    };
    let Some(&channels) = dims.get(axis).filter(|&&n| rank > 1 && (2..=MOST_CHANNELS).contains(&n)) else {
        return Vec::new();
    };
    let inner: usize = dims[axis + 1..].iter().product();
    let mut found = vec![Metrics::default(); channels];
    if inner == 0 {
        return found;
    }
    for (at, (x, y)) in x.chunks(inner).zip(y.chunks(inner)).enumerate() {
        found[at % channels].feed(x, y);
    }
    found
}

/// The float tensors that decide how large outputs are, each with the operator that it goes into.
fn deciding(model: &Model) -> BTreeMap<String, String> {
    let graph = model.graph(model.main());
    let outputs: BTreeSet<ValueId> = graph.outputs().collect();
    let mut seen = BTreeSet::new();
    let mut waiting: Vec<ValueId> = outputs.iter().copied().collect();
    let mut found = BTreeMap::new();
    while let Some(value) = waiting.pop() {
        let Some(node) = model.producer(value).filter(|&node| seen.insert(node)) else { continue };
        let at = model.node(node);
        let inputs = at.inputs().iter().flatten().copied();
        if !DECIDING.contains(&at.op_type()) {
            waiting.extend(inputs);
            continue;
        }
        let shown = inputs.filter(|&v| {
            let float = model.dtype(v).is_none_or(DataType::is_float);
            let computed = model.producer(v).is_some_and(|p| model.node(p).graph() == Some(model.main()));
            float && computed && !outputs.contains(&v)
        });
        found.extend(shown.map(|v| (model.value(v).name().to_owned(), at.op_type().to_owned())));
    }
    found
}

/// The model with what decides the size of its outputs among them.
pub(super) fn with_deciding(model: &Model) -> Model {
    showing(model, &deciding(model))
}

/// The model with these tensors among its outputs.
fn showing(model: &Model, tensors: &BTreeMap<String, String>) -> Model {
    let mut model = model.clone();
    let main = model.main();
    for value in tensors.keys().filter_map(|name| model.value_named(name)).collect::<Vec<_>>() {
        model.add_output(main, value);
    }
    model
}

/// The outputs of a model for each sample, in the order of the indices.
///
/// # Errors
/// As [`compare`].
pub fn outputs(model: &Model, how: &Run<'_>) -> Result<Vec<Vec<(String, Tensor)>>> {
    let Run { samples, indices, runtime, .. } = *how;
    // The float model was checked against the plain plan already; what is compared here differs in its quantizers only.
    let session = Session::with_options(model, &[], Options { runtime, check: false, ..Options::default() })?;
    let found: Mutex<BTreeMap<usize, Vec<(String, Tensor)>>> = Mutex::default();
    run(
        &Run { progress: &Unseen(how.progress), ..*how },
        indices,
        1,
        |(), index| {
            let nothing: Arc<dyn Observe> = Arc::new(Blind);
            let outputs = session.run(&samples.get(index)?, &nothing)?;
            lock(&found).insert(index, outputs);
            Ok(())
        },
        || (),
    )?;
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(indices.iter().filter_map(|index| found.remove(index)).collect())
}
