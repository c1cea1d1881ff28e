//! What runs, and how.

use super::memory::Memory;
use super::pool::{Progress, Silent};
use crate::runtime::Runtime;
use crate::samples::SampleSet;

/// Samples, and how they are run.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// The samples.
    pub samples: &'a SampleSet,
    /// Which of them to run.
    pub indices: &'a [usize],
    /// What runs them.
    pub runtime: Runtime,
    /// How many run at once, at most.
    pub threads: usize,
    /// What it may take in memory.
    pub memory: Memory<'a>,
    /// Told how far things are.
    pub progress: &'a dyn Progress,
}

impl<'a> Run<'a> {
    /// One sample at a time in the default runtime, without a limit and without a word.
    #[must_use]
    pub fn new(samples: &'a SampleSet, indices: &'a [usize]) -> Self {
        let (runtime, memory) = (Runtime::default(), Memory::default());
        Self { samples, indices, runtime, threads: 1, memory, progress: &Silent }
    }
}
