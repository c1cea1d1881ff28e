//! tract, behind four verbs: build a program for given shapes, compile it, run it, evaluate one node.
//!
//! Every call into tract is guarded: its errors and its panics both come back as text.

mod arrays;
mod attention;
mod build;
mod divide;
mod evaluate;
mod footprint;
mod images;
mod narrow;
mod native;
mod operator;
mod operators;
mod recurrent;
mod structural;
mod tap;
mod tensors;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Once};

use tract_core::internal::{
    IntoRunnable, TValue, TVec, Tensor as Array, TractResult, TypedModel, TypedSimplePlan, TypedSimpleState, ensure,
};
use tract_core::plan::eval;

pub(super) use arrays::Arrays;
pub(super) use build::{Blueprint, Feed, Origins, build, check, evaluate_constant, locate, origin};
pub(super) use divide::DIVIDE;
pub use evaluate::TractEvaluate;
pub(super) use footprint::{largest, tensors, weights};
pub(super) use narrow::NARROW;
pub(super) use operators::{knows, without_fake_quant};
pub(super) use tap::{Listener, watch};
pub(super) use tensors::{from_array, to_array};

use crate::runtime::stop::is_stopped;

/// How far tract may go in rewriting a model; each rung is slower and safer than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rung {
    /// Rewrites and specialised kernels.
    Optimized,
    /// Specialised kernels only.
    Codegen,
    /// The operators as they come.
    Raw,
}

impl Rung {
    /// The next safer rung.
    pub fn below(self) -> Option<Self> {
        match self {
            Self::Optimized => Some(Self::Codegen),
            Self::Codegen => Some(Self::Raw),
            Self::Raw => None,
        }
    }

    /// What reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Optimized => "optimized",
            Self::Codegen => "codegen only",
            Self::Raw => "raw",
        }
    }
}

/// A compiled model; running it from several threads shares the weights.
pub(super) type Plan = Arc<TypedSimplePlan>;

/// Compiles for one rung.
///
/// # Errors
/// tract's message.
pub(super) fn compile(model: TypedModel, rung: Rung) -> Result<Plan, String> {
    guarded(move || {
        let model = match rung {
            Rung::Optimized => model.into_optimized()?,
            Rung::Codegen => {
                let mut model = model;
                model.optimize()?;
                model
            }
            Rung::Raw => model,
        };
        model.into_runnable()
    })
}

/// Runs once, with fresh state, calling the thread's listener for every tap.
///
/// # Errors
/// tract's message.
pub(super) fn run(plan: &Plan, inputs: &[Arc<Array>]) -> Result<Vec<TValue>, String> {
    let inputs: TVec<TValue> = inputs.iter().map(|a| TValue::from_const(a.clone())).collect();
    guarded(|| {
        let outputs = TypedSimpleState::new(plan)?.run_plan_with_eval(inputs, |context, state, node, inputs| {
            ensure!(!is_stopped(), "stopped");
            eval(context, state, node, inputs)
        })?;
        Ok(outputs.into_iter().collect())
    })
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Calls into tract; a panic is an error like any other, and prints nothing.
///
/// # Errors
/// The error chain, or the message of the panic.
fn guarded<T>(call: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    QUIET.set(outer);
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            Err(format!("tract panicked: {}", text.unwrap_or("no message")))
        }
    }
}
