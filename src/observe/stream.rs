//! Samples on their way through the segments of a model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::pool::lock;
use crate::error::{Error, Result};
use crate::ir::Tensor;
use crate::onnx::DataType;
use crate::runtime::segments::Segment;
use crate::runtime::{Carried, Sample};
use crate::samples::SampleSet;

/// The tensors that cross from segment to segment, of each sample.
pub(super) struct Stream<'a> {
    samples: &'a SampleSet,
    carried: Carried,
    /// Element types of what was kept. They come from the runtime: models rarely declare them.
    types: Mutex<BTreeMap<String, DataType>>,
    /// Where tensors are looked for that this one does not have.
    under: Option<Arc<Stream<'a>>>,
}

impl<'a> Stream<'a> {
    /// In front of the first segment. Keeps up to `limit` bytes in memory, and the rest in files in `folder`.
    pub fn new(samples: &'a SampleSet, limit: u64, folder: &Path) -> Self {
        Self { samples, carried: Carried::new(limit, folder), types: Mutex::default(), under: None }
    }

    /// A stream that has what differs from another one.
    pub fn over(under: &Arc<Self>, limit: u64, folder: &Path) -> Self {
        Self { under: Some(under.clone()), ..Self::new(under.samples, limit, folder) }
    }

    /// Whether a segment reads something that differs from the stream below.
    pub fn differs(&self, segment: &Segment) -> bool {
        let own = lock(&self.types);
        segment.carried.iter().any(|name| own.contains_key(name))
    }

    /// Element types of the tensors that were kept so far.
    pub fn types(&self) -> BTreeMap<String, DataType> {
        lock(&self.types).clone()
    }

    /// A new segment begins.
    pub fn turn(&self) {
        self.carried.turn();
    }

    /// What a segment reads of a sample.
    pub fn feed(&self, segment: &Segment, index: usize) -> Result<Sample> {
        let mut sample = Sample::new();
        if !segment.inputs.is_empty() {
            sample = self.samples.get(index)?;
            sample.retain(|name, _| segment.inputs.contains(name));
        }
        for name in &segment.carried {
            if let Some(tensor) = self.get(index, name)? {
                sample.insert(name.clone(), tensor);
            }
        }
        Ok(sample)
    }

    fn get(&self, index: usize, name: &str) -> Result<Option<Tensor>> {
        match (self.carried.get(index, name)?, &self.under) {
            (None, Some(under)) => under.get(index, name),
            (found, _) => Ok(found),
        }
    }

    /// Keeps those outputs of a segment that later ones read.
    pub fn keep(&self, segment: &Segment, index: usize, outputs: Vec<(String, Tensor)>) -> Result<()> {
        for (name, tensor) in outputs.into_iter().filter(|(name, _)| segment.live.contains(name)) {
            let dtype = tensor.dtype();
            let known = *lock(&self.types).entry(name.clone()).or_insert(dtype);
            if known != dtype {
                let message = format!("the tensor is {known} in one sample and {dtype} in another");
                return Err(Error::model(message).at_value(&name));
            }
            self.carried.put(index, &name, tensor)?;
        }
        Ok(())
    }

    /// Drops what no later segment reads.
    pub fn release(&self, segment: &Segment, index: usize) {
        self.carried.retain(index, |name| segment.live.contains(name));
    }
}
