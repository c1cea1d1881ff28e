//! A model that is too large for its memory limit: segment after segment, all samples through each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::memory::{Estimate, Share, UNLIMITED, largest, too_low};
use super::{Observation, Shared, Watch, lock, run};
use crate::error::{Error, Result};
use crate::ir::Model;
use crate::onnx::DataType;
use crate::runtime::segments::{self, Segment};
use crate::runtime::{Carried, Footprint, Observe, Sample, Session};
use crate::samples::SampleSet;
use crate::statistics::Statistics;

impl Observation<'_> {
    /// Runs the samples of `order` and gives back everything that `shared` has then.
    pub(super) fn run_segments(&self, shared: &Arc<Shared>, order: &[usize], share: Share) -> Result<Statistics> {
        let Self { model, sites, samples, threads, progress, memory, .. } = *self;
        let limit = memory.limit.unwrap_or(UNLIMITED);
        // Half for weights, a quarter for what is carried, the rest for samples.
        let segments = segments::cut(model, share.segment.unwrap_or(u64::MAX).min(share.available / 2));
        let heaviest = segments.iter().map(|s| s.weights).max().unwrap_or(0);
        if heaviest + heaviest / 16 >= share.available {
            let fixed = limit - share.available;
            return Err(too_low("the weights of one operator", fixed + heaviest + heaviest / 8, limit));
        }
        let temporary = std::env::temp_dir();
        let carried = Carried::new(share.available / 4, memory.folder.unwrap_or(&temporary));
        let mut types: BTreeMap<String, DataType> = BTreeMap::new();
        let mut silent = Vec::new();
        let most = threads.min(order.len()).max(1);
        progress.memory(&Estimate {
            weights: heaviest,
            sample: if memory.limit.is_some() { share.available / 4 / most as u64 } else { 0 },
            state: limit - share.available,
            threads: most,
            segments: segments.len(),
            limit: memory.limit,
        });
        let own = observed(model, &segments, &sites.iter().map(|s| s.name.as_str()).collect::<Vec<_>>());
        for (number, (segment, own)) in segments.iter().zip(&own).enumerate() {
            let made_for_later = segment.outputs.iter().any(|name| segment.live.contains(name));
            if own.is_empty() && !made_for_later {
                continue;
            }
            carried.turn();
            let part = segment.model(model, &types)?;
            let names: Vec<String> = own.iter().map(|&site| sites[site].name.clone()).collect();
            let session = Session::new(&part, &names)?;
            drop(part);
            let feed = Feed { samples, carried: &carried, segment };
            let Footprint { weights, mut sample } = session.footprint(&feed.get(order[0])?)?.unwrap_or_default();
            let largest = largest(samples, order);
            if samples.shape_key(largest) != samples.shape_key(order[0]) {
                sample = sample.max(session.footprint(&feed.get(largest)?)?.unwrap_or_default().sample);
            }
            let estimate = Estimate { weights: weights + share.available / 4, sample, ..Estimate::default() };
            let Some(threads) = share.threads(&estimate, most) else {
                let needed = limit - share.available + estimate.weights + estimate.weights / 8 + sample;
                return Err(too_low("the weights of one segment and the tensors of one sample", needed, limit));
            };
            let found: Mutex<BTreeMap<String, DataType>> = Mutex::default();
            let which: Arc<[usize]> = own.as_slice().into();
            progress.start(&format!("segment {}/{}", number + 1, segments.len()), order.len() as u64);
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
            progress.finish();
        }
        {
            let mut statistics = lock(&shared.rest);
            statistics.ran.extend(order.iter().map(|&index| index as u32));
            statistics.ran.sort_unstable();
        }
        shared.with_all(silent, |all| Ok(std::mem::take(all)))
    }
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
