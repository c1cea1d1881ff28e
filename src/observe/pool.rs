//! Samples through a model, in parallel, with progress.

use std::cmp::Reverse;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::memory::Estimate;
use super::run::Run;
use crate::error::{Error, Kind, Result};
use crate::runtime::{Observe, stoppable};
use crate::samples::SampleSet;

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
    /// What a run that is about to start will take.
    fn memory(&self, _estimate: &Estimate) {}
    /// A sample was told to stop, and one of its nodes does not end. Waits for it unless this ends the process.
    fn stuck(&self, _error: &Error) {}
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

/// Asks another whether to go on, and tells it nothing.
pub(super) struct Unseen<'a>(pub(super) &'a dyn Progress);

impl Progress for Unseen<'_> {
    fn start(&self, _step: &str, _total: u64) {}
    fn tick(&self) {}
    fn finish(&self) {}
    fn interrupted(&self) -> bool {
        self.0.interrupted()
    }
    fn stuck(&self, error: &Error) {
        self.0.stuck(error);
    }
}

/// Samples of one shape next to each other, so that a plan compiled for a shape serves all of them; the largest first, so
/// that they run while statistics are small, and threads end together.
pub(crate) fn by_shape(samples: &SampleSet, indices: &[usize]) -> Vec<usize> {
    let mut order = indices.to_vec();
    order.sort_by_cached_key(|&i| {
        let shapes = samples.shape_key(i);
        let elements: usize = shapes.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
        (Reverse(elements), shapes, i)
    });
    order
}

/// How often it is asked whether to stop.
const OFTEN: Duration = Duration::from_millis(50);

/// How long samples that are running may go on once the user has asked to stop; then they stop at the next node.
const GRACE: Duration = Duration::from_secs(2);

/// How long a node may go on once its sample was told to stop.
const STUCK: Duration = Duration::from_secs(10);

/// What one worker is doing.
#[derive(Default)]
struct Work {
    /// The sample that it runs, and since when.
    running: Mutex<Option<(usize, Instant)>>,
    stop: Arc<AtomicBool>,
    /// Whether it was told to stop because its sample takes too long.
    late: AtomicBool,
}

/// Feeds `order` to as many workers as `threads`, each with a state of its own; the first error in order of samples wins, and
/// says which sample it is of. A sample that takes longer than it may is an error.
pub(crate) fn run<S: Send>(
    how: &Run<'_>,
    order: &[usize],
    threads: usize,
    work: impl Fn(&S, usize) -> Result<()> + Sync,
    state: impl Fn() -> S + Sync,
) -> Result<Vec<S>> {
    let Run { samples, progress, timeout, .. } = *how;
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let threads = threads.clamp(1, order.len().max(1));
    let works: Vec<Work> = (0..threads).map(|_| Work::default()).collect();
    let worker = |own: &Work, _alive: Sender<()>| {
        let state = state();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(&index) = order.get(at) else { return state };
            let result = if progress.interrupted() {
                Err(Error::interrupted())
            } else {
                *lock(&own.running) = Some((index, Instant::now()));
                let result = stoppable(&own.stop, || work(&state, index));
                *lock(&own.running) = None;
                let result = match result {
                    Err(_) if own.late.load(Ordering::Relaxed) => Err(late(timeout)),
                    Err(_) if own.stop.load(Ordering::Relaxed) => Err(Error::interrupted()),
                    result => result,
                };
                result.map_err(|e| if e.kind() == Kind::Interrupted { e } else { e.at_sample(&samples.place(index)) })
            };
            if let Err(error) = result {
                next.store(order.len(), Ordering::Relaxed);
                let mut slot = lock(&failed);
                // What is wrong says more than that the user stopped.
                let stopped = |error: &Error| error.kind() == Kind::Interrupted;
                if slot.as_ref().is_none_or(|(first, old)| (stopped(&error), at) < (stopped(old), *first)) {
                    *slot = Some((at, error));
                }
                return state;
            }
            progress.tick();
        }
    };
    let states = std::thread::scope(|scope| {
        let (alive, ended) = channel();
        // Where the system has no more threads, those that there are do the work, or this one.
        let spawn = |own| {
            let (worker, alive) = (&worker, alive.clone());
            std::thread::Builder::new().spawn_scoped(scope, move || worker(own, alive)).ok()
        };
        let handles: Vec<_> = works.iter().map_while(spawn).collect();
        if handles.is_empty() {
            return vec![Ok(worker(&works[0], alive))];
        }
        drop(alive);
        overlook(how, &works, &ended);
        handles.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    if let Some((_, error)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    states.into_iter().map(|s| s.map_err(|_| Error::new(Kind::Internal, "a calibration thread panicked"))).collect()
}

/// Stops what the user does not want any more and what takes too long, until every worker has ended.
fn overlook(how: &Run<'_>, works: &[Work], ended: &Receiver<()>) {
    let mut asked: Option<Instant> = None;
    while ended.recv_timeout(OFTEN) == Err(RecvTimeoutError::Timeout) {
        if asked.is_none() && how.progress.interrupted() {
            asked = Some(Instant::now());
        }
        for work in works {
            let Some((index, since)) = *lock(&work.running) else { continue };
            let over = how.timeout.and_then(|timeout| since.elapsed().checked_sub(timeout));
            let unwanted = asked.and_then(|asked| asked.elapsed().checked_sub(GRACE));
            if over.is_some() {
                work.late.store(true, Ordering::Relaxed);
            }
            if over.is_some() || unwanted.is_some() {
                work.stop.store(true, Ordering::Relaxed);
            }
            if over.max(unwanted).is_some_and(|over| over > STUCK) {
                let error = if over.is_some() { late(how.timeout) } else { Error::interrupted() };
                how.progress.stuck(&error.at_sample(&how.samples.place(index)));
            }
        }
    }
}

fn late(timeout: Option<Duration>) -> Error {
    let seconds = timeout.unwrap_or_default().as_secs_f64();
    Error::new(Kind::Runtime, format!("the model runs longer than {seconds} s"))
        .with_hint("allow it more with --timeout, or leave the sample out")
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Observes nothing.
pub(super) struct Blind;

impl Observe for Blind {
    fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
}
