//! The tap: an operator that shows its input to the observer of the running thread.
//!
//! Taps are graph outputs, so no rewrite of tract's drops them, and as they refuse to have their axes changed, what they
//! see has the layout of the ONNX graph. A plan is shared by threads; each thread sets its own listener for a run.

use std::cell::RefCell;
use std::sync::Arc;

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_core::internal::*;

use super::operator::Compute;
use crate::runtime::Observe;

/// Who listens to the taps of a run.
pub(crate) struct Listener {
    observe: Arc<dyn Observe>,
    seen: Vec<bool>,
}

impl Listener {
    /// A listener for `sites` sites, none of which was seen yet.
    pub(crate) fn new(observe: Arc<dyn Observe>, sites: usize) -> Self {
        Self { observe, seen: vec![false; sites] }
    }

    fn hear(&mut self, site: usize, array: &Tensor) -> TractResult<()> {
        // A run that is repeated on a safer rung shows only what the broken one had not shown.
        if std::mem::replace(&mut self.seen[site], true) {
            return Ok(());
        }
        let floats = array.cast_to::<f32>()?;
        let plain = floats.try_as_plain_ram()?;
        self.observe.see(site, plain.as_slice::<f32>()?, array.shape());
        Ok(())
    }
}

thread_local! {
    static LISTENER: RefCell<Option<Listener>> = const { RefCell::new(None) };
}

/// Calls `run` with `listener` as the one of this thread, and gives it back.
pub(crate) fn watch<T>(listener: Listener, run: impl FnOnce() -> T) -> (T, Listener) {
    let outer = LISTENER.replace(Some(listener));
    let result = run();
    let listener = LISTENER.replace(outer).expect("taps put the listener back");
    (result, listener)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tap(pub usize);

impl Compute for Tap {
    const FOLDS: bool = false;

    fn name(&self) -> StaticName {
        "Tap".into()
    }

    fn facts(&self, _inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(u8::fact([0usize; 0])))
    }

    fn compute(&self, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        // Taken out while it is called: an observer that runs another session must find no borrow.
        if let Some(mut listener) = LISTENER.take() {
            let heard = listener.hear(self.0, &input);
            LISTENER.set(Some(listener));
            heard?;
        }
        Ok(tvec!(tensor0(0u8).into_tvalue()))
    }
}
