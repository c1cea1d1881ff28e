//! A model that is too large for its memory limit: segment after segment, all samples through each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::calibrate::{Checkpoint, Observation, Shared, Watch};
use super::memory::{Estimate, Share, UNLIMITED, too_low};
use super::pool::{lock, run};
use crate::error::{Error, Result};
use crate::ir::{Model, ValueId};
use crate::onnx::DataType;
use crate::runtime::segments::{self, Segment};
use crate::runtime::{Carried, Footprint, Observe, Sample, Session};
use crate::samples::SampleSet;
use crate::statistics::Statistics;

/// Samples that go through all segments before the next ones do. What is carried is bounded by them, and what they showed can
/// be saved; making the segments again for so many costs little.
const TOGETHER: usize = 64;

impl Observation<'_> {
    /// Runs the samples of `order` and gives back everything that `shared` has then. The state is saved after every
    /// [`TOGETHER`] of them.
    pub(super) fn run_segments(&self, shared: &Arc<Shared>, order: &[usize], share: Share) -> Result<Statistics> {
        let Self { model, sites, threads, progress, memory, checkpoint, .. } = *self;
        let limit = memory.limit.unwrap_or(UNLIMITED);
        // Half for weights, a quarter for what is carried, the rest for samples.
        let segments = segments::cut(model, share.segment.unwrap_or(u64::MAX).min(share.available / 2));
        let heaviest = segments.iter().map(|s| s.weights).max().unwrap_or(0);
        let fixed = limit - share.available;
        if heaviest + heaviest / 16 >= share.available {
            return Err(too_low("the weights of one operator", fixed + heaviest + heaviest / 8, limit));
        }
        let most = threads.min(order.len()).max(1);
        progress.memory(&Estimate {
            weights: heaviest,
            sample: if memory.limit.is_some() { share.available / 4 / most as u64 } else { 0 },
            state: fixed,
            threads: most,
            segments: segments.len(),
            limit: memory.limit,
        });
        let own = observed(model, &segments, &sites.iter().map(|s| s.name.as_str()).collect::<Vec<_>>());
        let constant = constant(model);
        let mut types: BTreeMap<String, DataType> = BTreeMap::new();
        let mut silent: BTreeMap<String, String> = BTreeMap::new();
        let together = order.chunks(TOGETHER);
        for (part, some) in together.clone().enumerate() {
            let temporary = std::env::temp_dir();
            let carried = Carried::new(share.carried, memory.folder.unwrap_or(&temporary));
            for (number, (segment, own)) in segments.iter().zip(&own).enumerate() {
                let made_for_later = segment.outputs.iter().any(|name| segment.live.contains(name));
                if own.is_empty() && !made_for_later {
                    continue;
                }
                let mut step = format!("segment {}/{}", number + 1, segments.len());
                if together.len() > 1 {
                    step = format!("part {}/{}, {step}", part + 1, together.len());
                }
                let stage = Stage { segment, own, constant: &constant, carried: &carried, share, fixed, step };
                self.run_segment(shared, some, &stage, &mut types, &mut silent)?;
            }
            {
                let mut statistics = lock(&shared.rest);
                statistics.ran.extend(some.iter().map(|&index| index as u32));
                statistics.ran.sort_unstable();
            }
            if let (Some(Checkpoint { save, .. }), true) = (checkpoint, part + 1 < together.len()) {
                shared.with_all(silent.clone().into_iter().collect(), |all| save(all))?;
            }
        }
        shared.with_all(silent.into_iter().collect(), |all| Ok(std::mem::take(all)))
    }

    /// Runs samples through one segment.
    fn run_segment(
        &self,
        shared: &Arc<Shared>,
        order: &[usize],
        stage: &Stage<'_>,
        types: &mut BTreeMap<String, DataType>,
        silent: &mut BTreeMap<String, String>,
    ) -> Result<()> {
        let Self { model, sites, samples, threads, progress, memory, .. } = *self;
        let Stage { segment, carried, share, .. } = *stage;
        carried.turn();
        let part = segment.model(model, types)?;
        let names: Vec<String> = stage.own.iter().map(|&site| sites[site].name.clone()).collect();
        let session = Session::new(&part, &names)?;
        drop(part);
        let feed = Feed { samples, carried, segment };
        // The first sample is the largest.
        let Footprint { weights, sample } = session.footprint(&feed.get(order[0])?)?.unwrap_or_default();
        let estimate = Estimate { weights: weights + share.carried, sample, ..Estimate::default() };
        let Some(threads) = share.threads(&estimate, threads.min(order.len()).max(1)) else {
            let needed = stage.fixed + estimate.weights + estimate.weights / 8 + sample;
            let limit = memory.limit.unwrap_or(UNLIMITED);
            return Err(too_low("the weights of one segment and the tensors of one sample", needed, limit));
        };
        let found: Mutex<BTreeMap<String, DataType>> = Mutex::default();
        let shown = |&site: &usize| (!stage.constant.contains(sites[site].name.as_str())).then_some(site);
        let which: Arc<[Option<usize>]> = stage.own.iter().map(shown).collect();
        progress.start(&stage.step, order.len() as u64);
        run(
            order,
            threads,
            progress,
            |watch: &Arc<Watch>, index| {
                let sample = feed.get(index)?;
                watch.sample.store(index, Ordering::Relaxed);
                let observe: Arc<dyn Observe> = watch.clone();
                let outputs = session.run(&sample, &observe)?;
                drop(sample);
                // What is not needed any more makes room first.
                carried.retain(index, |name| segment.live.contains(name));
                for (name, tensor) in outputs.into_iter().filter(|(name, _)| segment.live.contains(name)) {
                    same_type(&mut lock(&found), &name, tensor.dtype())?;
                    carried.put(index, &name, tensor)?;
                }
                Ok(())
            },
            || Arc::new(Watch::new(shared, &which)),
        )?;
        types.append(&mut lock(&found));
        silent.extend(session.unobserved());
        for name in names.into_iter().filter(|name| stage.constant.contains(name.as_str())) {
            silent.entry(name).or_insert_with(|| "it is constant".to_owned());
        }
        progress.finish();
        Ok(())
    }
}

/// A segment that is about to run.
struct Stage<'a> {
    segment: &'a Segment,
    /// The sites that it shows.
    own: &'a [usize],
    /// What the model as a whole does not show, because shapes decide it.
    constant: &'a BTreeSet<&'a str>,
    carried: &'a Carried,
    share: Share,
    /// Bytes of everything but weights and samples.
    fixed: u64,
    /// What progress calls it.
    step: String,
}

/// What a segment is fed.
struct Feed<'a> {
    samples: &'a SampleSet,
    carried: &'a Carried,
    segment: &'a Segment,
}

impl Feed<'_> {
    fn get(&self, index: usize) -> Result<Sample> {
        let mut sample = Sample::new();
        if !self.segment.inputs.is_empty() {
            sample = self.samples.get(index)?;
            sample.retain(|name, _| self.segment.inputs.contains(name));
        }
        for name in &self.segment.carried {
            if let Some(tensor) = self.carried.get(index, name)? {
                sample.insert(name.clone(), tensor);
            }
        }
        Ok(sample)
    }
}

/// Notes the type of a tensor, which is that of every sample.
fn same_type(types: &mut BTreeMap<String, DataType>, name: &str, dtype: DataType) -> Result<()> {
    match types.insert(name.to_owned(), dtype) {
        Some(other) if other != dtype => {
            Err(Error::model(format!("the tensor is {dtype} in one sample and {other} in another")).at_value(name))
        }
        _ => Ok(()),
    }
}

/// Tensors that are the same in all samples of one shape. Beyond a cut the runtime cannot see that.
fn constant(model: &Model) -> BTreeSet<&str> {
    let mut found: BTreeSet<ValueId> = BTreeSet::new();
    let mut names = BTreeSet::new();
    for &id in model.graph(model.main()).nodes() {
        let (node, reads) = (model.node(id), model.reads(id));
        let random = ["Random", "Multinomial", "Bernoulli"].iter().any(|op| node.op_type().starts_with(op));
        let known = |value| model.constant(value).is_some() || found.contains(&value);
        let shape = matches!(node.op_type(), "Shape" | "Size");
        if shape || !random && !reads.is_empty() && reads.into_iter().all(known) {
            found.extend(node.outputs().iter().flatten());
            names.extend(node.outputs().iter().flatten().map(|&value| model.value(value).name()));
        }
    }
    names
}

/// For each segment, which of the sites it shows: what it makes, and what goes into it that no earlier one shows.
fn observed(model: &Model, segments: &[Segment], sites: &[&str]) -> Vec<Vec<usize>> {
    let nodes = model.graph(model.main()).nodes();
    let mut owner: BTreeMap<&str, usize> = BTreeMap::new();
    for (number, segment) in segments.iter().enumerate() {
        for &node in nodes.get(segment.nodes.clone()).unwrap_or_default() {
            let values: BTreeSet<_> =
                model.reads(node).into_iter().chain(model.node(node).outputs().iter().copied().flatten()).collect();
            for value in values {
                owner.entry(model.value(value).name()).or_insert(number);
            }
        }
    }
    let mut found = vec![Vec::new(); segments.len()];
    for (index, site) in sites.iter().enumerate() {
        // What is not in the graph is for any session to refuse.
        if let Some(list) = found.get_mut(owner.get(site).copied().unwrap_or(0)) {
            list.push(index);
        }
    }
    found
}
