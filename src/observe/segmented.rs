//! A model that is too large for its memory limit: segment after segment, all samples through each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::calibrate::{Checkpoint, Observation, Shared, Watch};
use super::memory::{Estimate, Share, UNLIMITED, too_low};
use super::pool::{lock, run};
use super::run::Run;
use super::stream::Stream;
use crate::error::Result;
use crate::ir::{Model, ValueId};
use crate::runtime::segments::{self, Segment};
use crate::runtime::{Footprint, Observe, Session};
use crate::statistics::Statistics;

/// Samples that go through all segments before the next ones do. What is carried is bounded by them, and what they showed can
/// be saved; making the segments again for so many costs little.
const TOGETHER: usize = 64;

impl Observation<'_> {
    /// Runs the samples of `order` and gives back everything that `shared` has then. The state is saved after every
    /// [`TOGETHER`] of them.
    pub(super) fn run_segments(&self, shared: &Arc<Shared>, order: &[usize], share: Share) -> Result<Statistics> {
        let Self { model, sites, checkpoint, .. } = *self;
        let Run { samples, threads, progress, memory, .. } = self.run;
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
        let mut silent: BTreeMap<String, String> = BTreeMap::new();
        let together = order.chunks(TOGETHER);
        for (part, some) in together.clone().enumerate() {
            let temporary = std::env::temp_dir();
            let stream = Stream::new(samples, share.carried, memory.folder.unwrap_or(&temporary));
            for (number, (segment, own)) in segments.iter().zip(&own).enumerate() {
                let made_for_later = segment.outputs.iter().any(|name| segment.live.contains(name));
                if own.is_empty() && !made_for_later {
                    continue;
                }
                let mut step = format!("segment {}/{}", number + 1, segments.len());
                if together.len() > 1 {
                    step = format!("part {}/{}, {step}", part + 1, together.len());
                }
                let stage = Stage { segment, own, constant: &constant, stream: &stream, share, fixed, step };
                self.run_segment(shared, some, &stage, &mut silent)?;
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
        silent: &mut BTreeMap<String, String>,
    ) -> Result<()> {
        let Self { model, sites, .. } = *self;
        let Run { threads, progress, memory, .. } = self.run;
        let Stage { segment, stream, share, .. } = *stage;
        stream.turn();
        let part = segment.model(model, &stream.types())?;
        let names: Vec<String> = stage.own.iter().map(|&site| sites[site].name.clone()).collect();
        let session = Session::new(&part, &names)?;
        drop(part);
        // The first sample is the largest.
        let Footprint { weights, sample } = session.footprint(&stream.feed(segment, order[0])?)?.unwrap_or_default();
        let estimate = Estimate { weights: weights + share.carried, sample, ..Estimate::default() };
        let Some(threads) = share.threads(&estimate, threads.min(order.len()).max(1)) else {
            let needed = stage.fixed + estimate.weights + estimate.weights / 8 + sample;
            let limit = memory.limit.unwrap_or(UNLIMITED);
            return Err(too_low("the weights of one segment and the tensors of one sample", needed, limit));
        };
        let shown = |&site: &usize| (!stage.constant.contains(sites[site].name.as_str())).then_some(site);
        let which: Arc<[Option<usize>]> = stage.own.iter().map(shown).collect();
        progress.start(&stage.step, order.len() as u64);
        run(
            &self.run,
            order,
            threads,
            |watch: &Arc<Watch>, index| {
                let sample = stream.feed(segment, index)?;
                watch.sample.store(index, Ordering::Relaxed);
                let observe: Arc<dyn Observe> = watch.clone();
                let outputs = session.run(&sample, &observe)?;
                drop(sample);
                // What is not needed any more makes room first.
                stream.release(segment, index);
                stream.keep(segment, index, outputs)
            },
            || Arc::new(Watch::new(shared, &which)),
        )?;
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
    stream: &'a Stream<'a>,
    share: Share,
    /// Bytes of everything but weights and samples.
    fixed: u64,
    /// What progress calls it.
    step: String,
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
