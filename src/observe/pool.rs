//! Samples through a model, in parallel, with progress.

use std::cmp::Reverse;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::memory::Estimate;
use crate::error::{Error, Kind, Result};
use crate::runtime::Observe;
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

/// Feeds `order` to `threads` workers, each with a state of its own; the first error in order of samples wins, and says which
/// sample it is of.
pub(crate) fn run<S: Send>(
    samples: &SampleSet,
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
                work(&state, index).map_err(|e| e.at_sample(&samples.place(index)))
            };
            if let Err(error) = result {
                next.store(order.len(), Ordering::Relaxed);
                let mut slot = failed.lock().expect("no panic while held");
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
        // Where the system has no more threads, those that there are do the work, or this one.
        let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, worker).ok();
        let handles: Vec<_> = (0..threads).map_while(spawn).collect();
        if handles.is_empty() {
            return vec![Ok(worker())];
        }
        handles.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    if let Some((_, error)) = failed.into_inner().expect("no panic while held") {
        return Err(error);
    }
    states.into_iter().map(|s| s.map_err(|_| Error::new(Kind::Internal, "a calibration thread panicked"))).collect()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Observes nothing.
pub(super) struct Blind;

impl Observe for Blind {
    fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
}
