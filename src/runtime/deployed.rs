//! A model as users of onnxruntime have it: rewritten by its optimizer, on as many threads as it takes by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::{Observe, OrtSession, Sample};
use crate::error::Result;
use crate::ir::{Model, Tensor};

/// A model that is ready to run as deployed. Needs the feature `ort`.
#[derive(Debug)]
pub struct Deployed(OrtSession);

impl Deployed {
    /// Hands a model over.
    ///
    /// # Errors
    /// [`Kind::Runtime`](crate::error::Kind::Runtime) where onnxruntime is not there or does not take the model.
    pub fn new(model: &Model) -> Result<Self> {
        OrtSession::deployed(model).map(Self)
    }

    /// Runs one sample; gives the graph outputs, in graph order, and the time that it took.
    ///
    /// # Errors
    /// [`Kind::Samples`](crate::error::Kind::Samples) for inputs that do not fit;
    /// [`Kind::Runtime`](crate::error::Kind::Runtime) where onnxruntime fails.
    pub fn run(&self, sample: &Sample) -> Result<(Vec<(String, Tensor)>, Duration)> {
        let nothing: Arc<dyn Observe> = Arc::new(Nobody);
        self.0.timed(sample, &nothing)
    }

    /// What the optimizer made of the model.
    ///
    /// # Errors
    /// [`Kind::Runtime`](crate::error::Kind::Runtime) where onnxruntime does not tell.
    pub fn kernels(&self) -> Result<Kernels> {
        self.0.kernels()
    }
}

/// Observes nothing.
struct Nobody;

impl Observe for Nobody {
    fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
}

/// How many nodes of a model compute how, by operator, after the optimizer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Kernels {
    /// On integers.
    pub integer: BTreeMap<String, usize>,
    /// In float, from weights that they unpack themselves.
    pub packed: BTreeMap<String, usize>,
    /// In float: products, convolutions and recurrent layers only.
    pub float: BTreeMap<String, usize>,
    /// Constants that are dequantized at every run.
    pub dequantized: Vec<String>,
}
