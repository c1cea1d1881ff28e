//! What stands in for the runtime in a build without tract.

use std::convert::Infallible;
use std::sync::Arc;

use super::{Observe, Options, Sample};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NodeId, Tensor};
use crate::passes::Evaluate;

/// A model prepared for running; cannot be made in this build.
#[derive(Debug)]
pub struct Session(Infallible);

impl Session {
    /// Fails: this build has no runtime.
    ///
    /// # Errors
    /// Always [`Kind::Runtime`].
    pub fn new(model: &Model, observed: &[String]) -> Result<Self> {
        Self::with_options(model, observed, Options::default())
    }

    /// Fails: this build has no runtime.
    ///
    /// # Errors
    /// Always [`Kind::Runtime`].
    pub fn with_options(_model: &Model, _observed: &[String], _options: Options) -> Result<Self> {
        Err(Error::new(Kind::Runtime, "built without tract, so models cannot be run")
            .with_hint("build with the feature \"tract\", or use weight-only quantization, which needs no samples"))
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn run(&self, _sample: &Sample, _observe: &Arc<dyn Observe>) -> Result<Vec<(String, Tensor)>> {
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
#[derive(Clone, Copy, Debug, Default)]
pub struct TractEvaluate;

impl Evaluate for TractEvaluate {
    fn evaluate(&self, _model: &Model, _node: NodeId, _inputs: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        None
    }
}
