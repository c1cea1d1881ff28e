//! What stands in for a runtime that the program was built without.

use std::convert::Infallible;
use std::sync::Arc;
#[cfg(not(feature = "ort"))]
use std::time::Duration;

#[cfg(not(feature = "tract"))]
use super::Footprint;
#[cfg(not(feature = "ort"))]
use super::deployed::Kernels;
use super::{Observe, Options, Runtime, Sample};
use crate::error::{Error, Kind, Result};
#[cfg(not(feature = "tract"))]
use crate::ir::NodeId;
use crate::ir::{Model, Tensor};
#[cfg(not(feature = "tract"))]
use crate::passes::Evaluate;

/// A model prepared for running; cannot be made in this build.
#[derive(Debug)]
pub struct Session(Infallible);

/// The error for a runtime that this build does not have.
pub(super) fn error(runtime: Runtime) -> Error {
    let (message, hint) = match runtime {
        Runtime::Tract => (
            "built without tract, so models cannot be run in it",
            "build with the feature \"tract\", pass --runtime ort in a build with the feature \"ort\", or use weight-only \
             quantization, which needs no samples",
        ),
        Runtime::Ort => (
            "built without onnxruntime, so models cannot be run in it",
            "build with `cargo build --features ort`, and have onnxruntime installed for Python or ORT_DYLIB_PATH set",
        ),
    };
    Error::new(Kind::Runtime, message).with_hint(hint)
}

impl Session {
    /// Fails: this build does not have the runtime.
    ///
    /// # Errors
    /// Always [`Kind::Runtime`].
    pub fn with_options(_model: &Model, _observed: &[String], options: Options) -> Result<Self> {
        Err(error(options.runtime))
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn run(&self, _sample: &Sample, _observe: &Arc<dyn Observe>) -> Result<Vec<(String, Tensor)>> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    #[cfg(not(feature = "tract"))]
    pub fn footprint(&self, _sample: &Sample) -> Result<Footprint> {
        match self.0 {}
    }

    /// Fails: this build does not have the runtime.
    ///
    /// # Errors
    /// Always [`Kind::Runtime`].
    #[cfg(not(feature = "ort"))]
    pub fn deployed(_model: &Model) -> Result<Self> {
        Err(error(Runtime::Ort))
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    #[cfg(not(feature = "ort"))]
    pub fn timed(&self, _sample: &Sample, _observe: &Arc<dyn Observe>) -> Result<(Vec<(String, Tensor)>, Duration)> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    #[cfg(not(feature = "ort"))]
    pub fn kernels(&self) -> Result<Kernels> {
        match self.0 {}
    }

    /// Never called.
    #[must_use]
    pub fn unobserved(&self) -> Vec<(String, String)> {
        match self.0 {}
    }

    /// Never called.
    #[must_use]
    pub fn method(&self) -> &'static str {
        match self.0 {}
    }
}

/// Evaluates nothing in this build.
#[cfg(not(feature = "tract"))]
#[derive(Clone, Copy, Debug, Default)]
pub struct TractEvaluate;

#[cfg(not(feature = "tract"))]
impl Evaluate for TractEvaluate {
    fn evaluate(&self, _model: &Model, _node: NodeId, _inputs: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        None
    }
}
