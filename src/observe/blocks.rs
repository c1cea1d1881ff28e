//! Block after block: an algorithm changes a part of the model before the next part sees what comes out of it.
//!
//! Two streams of samples go through the model side by side: one through the float model, one through the model as changed so
//! far. What crosses from block to block is kept, in memory up to a limit and beyond it on disk, so that the whole model takes
//! one pass of each, however deep it is. As long as nothing was changed in front of a tensor it is the same in both streams,
//! and is neither computed nor kept twice.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ndarray::{ArrayD, IxDyn};

use super::memory::{Share, UNLIMITED, too_low};
use super::pool::{Blind, by_shape, lock, run};
use super::run::Run;
use super::stream::Stream;
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::runtime::segments::{self, Segment};
use crate::runtime::{Observe, Options, Sample, Session};

/// Where a model is cut into blocks.
#[derive(Clone, Copy, Debug)]
pub enum Cut<'a> {
    /// By weights: up to so many bytes each, where the fewest tensors cross. A memory limit may ask for less.
    Weights(u64),
    /// In front of the nodes at these positions of the main graph.
    Before(&'a [usize]),
}

/// A walk through a model, block after block.
#[derive(Clone, Copy)]
pub struct Blocks<'a> {
    /// The prepared model, its nodes sorted.
    pub model: &'a Model,
    /// Where it is cut.
    pub cut: Cut<'a>,
    /// The samples and how they are run. Of the memory limit, half is for the weights of a block, in both streams, and a
    /// quarter for what crosses to the next; what the algorithm keeps is its own affair.
    pub run: Run<'a>,
}

impl Blocks<'_> {
    /// Shows each block to `visit`, in order. A model that this gives back takes the place of the block in the stream of the
    /// changed model: it has the same inputs and outputs. The result is the whole model with all of them in their places.
    ///
    /// Neither the result nor what is shown depends on the number of threads. Where the model is cut changes what is shown
    /// only as far as the runtime computes an operator otherwise without its neighbours.
    ///
    /// # Errors
    /// What `visit` fails with; no samples; a block that the runtime cannot run; a memory limit that cannot be kept to; a
    /// changed block with other inputs or outputs, or that does not fit into the model; an interruption.
    pub fn walk(&self, visit: impl FnMut(&Block<'_>) -> Result<Option<Model>>) -> Result<Model> {
        self.model.with_parts(self.parts(visit)?)
    }

    /// As [`walk`](Self::walk), with the changed blocks as the result, and the nodes that they stand for.
    ///
    /// # Errors
    /// As [`walk`](Self::walk), but for parts that do not fit into the model.
    pub fn parts(
        &self,
        mut visit: impl FnMut(&Block<'_>) -> Result<Option<Model>>,
    ) -> Result<Vec<(Range<usize>, Model)>> {
        let Run { samples, indices, memory, .. } = self.run;
        let order = by_shape(samples, indices);
        if order.is_empty() {
            return Err(Error::new(Kind::Samples, "going block by block takes samples"));
        }
        let share = memory.divide(self.model, 0, order.len())?;
        let segments = match self.cut {
            Cut::Weights(limit) => segments::cut(self.model, limit.min(share.available / 4)),
            Cut::Before(bounds) => segments::cut_before(self.model, bounds),
        };
        let temporary = std::env::temp_dir();
        let folder = memory.folder.unwrap_or(&temporary);
        let float = Arc::new(Stream::new(samples, share.carried / 2, folder));
        let changed = Stream::over(&float, share.carried / 2, folder);
        let mut parts: Vec<(Range<usize>, Model)> = Vec::new();
        for (number, segment) in segments.iter().enumerate() {
            let model = segment.model(self.model, &float.types())?;
            let step = format!("block {}/{}", number + 1, segments.len());
            float.turn();
            changed.turn();
            let (streams, moved) = (Streams { float: &float, changed: &changed }, AtomicBool::new(false));
            let block = Block {
                number,
                count: segments.len(),
                model,
                segment,
                streams,
                order: &order,
                share,
                step,
                moved,
                run: self.run,
            };
            let made = visit(&block)?;
            if let Some(made) = &made {
                same_ports(&block.model, made)?;
            }
            block.finish(made.as_ref())?;
            parts.extend(made.map(|made| (segment.nodes.clone(), made)));
        }
        Ok(parts)
    }
}

/// Refuses a changed block that does not connect as the block did.
fn same_ports(block: &Model, made: &Model) -> Result<()> {
    let names = |model: &Model| {
        let graph = model.graph(model.main());
        let of = |values: Vec<_>| values.into_iter().map(|v| model.value(v).name().to_owned()).collect::<Vec<_>>();
        (of(graph.inputs().collect()), of(graph.outputs().collect()))
    };
    if names(block) == names(made) {
        return Ok(());
    }
    Err(Error::new(Kind::Internal, "a block was changed to one with other inputs or outputs"))
}

#[derive(Clone, Copy)]
struct Streams<'a> {
    float: &'a Stream<'a>,
    changed: &'a Stream<'a>,
}

/// A block that both streams have come to.
pub struct Block<'a> {
    /// Which one, from 0 on.
    pub number: usize,
    /// How many there are.
    pub count: usize,
    /// The block in the float model, as a model of its own: its inputs and outputs cross to other blocks.
    pub model: Model,
    segment: &'a Segment,
    streams: Streams<'a>,
    pub(super) order: &'a [usize],
    share: Share,
    step: String,
    /// Whether the float stream has gone through it.
    moved: AtomicBool,
    pub(super) run: Run<'a>,
}

/// Tensors of one sample, in the order in which they were asked for; `None` for one that holds no floats, is constant, or is
/// not computed in this sample.
pub struct Seen<'a> {
    /// Which sample.
    pub sample: usize,
    /// In the float model.
    pub float: &'a [Option<ArrayD<f32>>],
    /// In the model as changed so far; `None` where nothing was changed in front, so that they are the same.
    pub changed: Option<&'a [Option<ArrayD<f32>>]>,
}

impl Block<'_> {
    /// Shows tensors of the block for each sample: its inputs, its outputs, or what it computes in between.
    ///
    /// In the stream of the changed model they are those of `test`, which takes the place of the block; without it, of the
    /// block as it is in the float model, whose inputs are the changed ones. `see` is called on several threads, in any order
    /// of samples.
    ///
    /// Inputs cost nothing. For others both streams run through the block, of which only the first run of the float stream
    /// would have been needed anyway.
    ///
    /// # Errors
    /// What `see` fails with; a model that the runtime cannot run; a memory limit that cannot be kept to; an interruption.
    pub fn observe(
        &self,
        test: Option<&Model>,
        tensors: &[String],
        see: &(dyn Fn(&Seen<'_>) -> Result<()> + Sync),
    ) -> Result<()> {
        let two = test.is_some() || self.streams.changed.differs(self.segment);
        let crosses = |name: &String| self.segment.inputs.contains(name) || self.segment.carried.contains(name);
        if tensors.iter().all(crosses) && test.is_none() {
            let read = |sample: &Sample| tensors.iter().map(|name| floats(sample.get(name)?)).collect::<Vec<_>>();
            return self.each("observe", self.run.threads, &|index| {
                let float = read(&self.streams.float.feed(self.segment, index)?);
                let changed = if two { Some(read(&self.streams.changed.feed(self.segment, index)?)) } else { None };
                see(&Seen { sample: index, float: &float, changed: changed.as_deref() })
            });
        }
        let float = self.session(&self.model, tensors, true)?;
        let changed = if two { Some(self.session(test.unwrap_or(&self.model), tensors, false)?) } else { None };
        let threads = self.threads(&[Some(&float), changed.as_ref()])?;
        let moved = self.moved.swap(true, Ordering::Relaxed);
        self.each("observe", threads, &|index| {
            let collect = Collect::new(tensors.len());
            let observe: Arc<dyn Observe> = collect.clone();
            let outputs = self.pass(&float, self.streams.float, index, &observe)?;
            if !moved {
                self.streams.float.keep(self.segment, index, outputs)?;
            }
            let seen = collect.take();
            let seen_changed = match &changed {
                Some(session) => {
                    let collect = Collect::new(tensors.len());
                    let observe: Arc<dyn Observe> = collect.clone();
                    self.pass(session, self.streams.changed, index, &observe)?;
                    Some(collect.take())
                }
                None => None,
            };
            see(&Seen { sample: index, float: &seen, changed: seen_changed.as_deref() })
        })
    }

    /// Brings both streams behind the block, which `made` may have taken the place of.
    fn finish(&self, made: Option<&Model>) -> Result<()> {
        let Streams { float, changed } = self.streams;
        let needed = self.segment.outputs.iter().any(|name| self.segment.live.contains(name));
        if needed && !self.moved.swap(true, Ordering::Relaxed) {
            self.advance(&self.model, float)?;
        }
        if needed && (made.is_some() || changed.differs(self.segment)) {
            self.advance(made.unwrap_or(&self.model), changed)?;
        }
        for &index in self.order {
            float.release(self.segment, index);
            changed.release(self.segment, index);
        }
        Ok(())
    }

    /// Runs a stream through `model`, which is the block or what it was changed to.
    fn advance(&self, model: &Model, stream: &Stream<'_>) -> Result<()> {
        let session = self.session(model, &[], std::ptr::eq(stream, self.streams.float))?;
        let threads = self.threads(&[Some(&session)])?;
        let nothing: Arc<dyn Observe> = Arc::new(Blind);
        self.each("run", threads, &|index| {
            let outputs = self.pass(&session, stream, index, &nothing)?;
            stream.keep(self.segment, index, outputs)
        })
    }

    /// The changed model is float operators and quantizers, so what is checked for the float model holds for it as well.
    fn session(&self, model: &Model, tensors: &[String], check: bool) -> Result<Session> {
        Session::with_options(model, tensors, Options { runtime: self.run.runtime, check, ..Options::default() })
    }

    /// Runs a sample.
    fn pass(
        &self,
        session: &Session,
        stream: &Stream<'_>,
        index: usize,
        observe: &Arc<dyn Observe>,
    ) -> Result<Vec<(String, Tensor)>> {
        let sample = stream.feed(self.segment, index)?;
        session.run(&sample, observe)
    }

    /// How many samples may run at once in sessions that are open together.
    fn threads(&self, sessions: &[Option<&Session>]) -> Result<usize> {
        let mut all = super::Estimate { weights: self.share.carried, ..super::Estimate::default() };
        for session in sessions.iter().copied().flatten() {
            // The first sample is the largest.
            let first = self.streams.float.feed(self.segment, self.order[0])?;
            let footprint = session.footprint(&first)?.unwrap_or_default();
            all.weights += footprint.weights;
            all.sample += footprint.sample;
        }
        let most = self.run.threads.min(self.order.len()).max(1);
        self.share.threads(&all, most).ok_or_else(|| {
            let limit = self.run.memory.limit.unwrap_or(UNLIMITED);
            let needed = limit - self.share.available + all.weights + all.weights / 8 + all.sample;
            too_low("the weights of one block and the tensors of one sample", needed, limit)
        })
    }

    /// Calls `work` with each sample.
    fn each(&self, what: &str, threads: usize, work: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<()> {
        let progress = self.run.progress;
        progress.start(&format!("{}, {what}", self.step), self.order.len() as u64);
        run(&self.run, self.order, threads, |(), index| work(index), || ())?;
        progress.finish();
        Ok(())
    }
}

/// Keeps what a run shows.
struct Collect(Mutex<Vec<Option<ArrayD<f32>>>>);

impl Collect {
    fn new(len: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![None; len])))
    }

    fn take(&self) -> Vec<Option<ArrayD<f32>>> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl Observe for Collect {
    fn see(&self, site: usize, values: &[f32], shape: &[usize]) {
        lock(&self.0)[site] = ArrayD::from_shape_vec(IxDyn(shape), values.to_vec()).ok();
    }
}

/// A tensor of floats as an array.
fn floats(tensor: &Tensor) -> Option<ArrayD<f32>> {
    let values = tensor.to_f32().filter(|_| tensor.dtype().is_float())?;
    ArrayD::from_shape_vec(IxDyn(&tensor.dims()), values).ok()
}
