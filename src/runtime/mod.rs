//! Running a model and watching its tensors.
//!
//! A [`Session`] takes a model apart once and runs it over many samples. Each run hands every observed tensor to an
//! [`Observe`] as soon as it is computed, in the layout the ONNX graph gives it, and forgets it.
//!
//! The runtime is tract, in float32: half and bfloat16 are widened, quantized operators run as float operators between
//! quantize and dequantize steps, packed weights are decoded. Integer kernels are never used. Tensors of smaller floats are
//! float32 tensors of numbers that those can hold. Branches, loops and sequences are resolved before the run, where the shapes
//! of the sample and its switches tell how. What tract does not have, or computes wrongly, is expressed by other operators,
//! computed here, or refused by name.
//!
//! Without the feature `tract` everything here compiles and [`Session::new`] fails.

#[cfg(not(feature = "tract"))]
mod absent;
#[cfg(feature = "tract")]
mod branches;
#[cfg(feature = "tract")]
mod constant;
#[cfg(feature = "tract")]
mod engine;
#[cfg(feature = "tract")]
mod functions;
#[cfg(feature = "tract")]
mod kernel;
#[cfg(feature = "tract")]
mod program;
#[cfg(feature = "tract")]
mod quantized;
#[cfg(feature = "tract")]
mod rephrase;
#[cfg(feature = "tract")]
mod sequences;
#[cfg(feature = "tract")]
mod session;
#[cfg(feature = "tract")]
mod support;
#[cfg(feature = "tract")]
mod widen;

#[cfg(not(feature = "tract"))]
pub use absent::{Session, TractEvaluate};
#[cfg(feature = "tract")]
pub use engine::TractEvaluate;
#[cfg(feature = "tract")]
pub use session::Session;

pub use crate::samples::Sample;

/// Called for each observed tensor of a run.
pub trait Observe: Send + Sync {
    /// Sees the tensor of site `site`, an index into the list that [`Session::new`] was given. `values` are in row-major
    /// order of `shape`, the shape the tensor has in the ONNX graph. Called at most once per site and run, on the thread
    /// that called [`Session::run`].
    fn see(&self, site: usize, values: &[f32], shape: &[usize]);
}

/// How a [`Session`] runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether the first sample is also run without any of tract's optimisations, and the two runs compared.
    pub check: bool,
    /// Compiled plans kept, one for each distinct set of input shapes; at least one. Each holds its own packed weights.
    pub plans: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { check: true, plans: 1 }
    }
}
