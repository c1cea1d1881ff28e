//! Stopping a run from another thread.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

thread_local! {
    static OWN: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
}

/// Calls `run`, in which tract stops at the next node, and the unrolling of loops at the next round, once `stop` is set.
pub(crate) fn stoppable<T>(stop: &Arc<AtomicBool>, run: impl FnOnce() -> T) -> T {
    let outer = OWN.replace(Some(stop.clone()));
    let result = run();
    OWN.set(outer);
    result
}

/// Whether the run of this thread is to stop.
#[cfg(feature = "tract")]
pub(super) fn is_stopped() -> bool {
    OWN.with_borrow(|own| own.as_ref().is_some_and(|stop| stop.load(std::sync::atomic::Ordering::Relaxed)))
}
