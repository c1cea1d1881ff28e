//! What runs, and how: the same for everything that runs samples.

use std::time::Duration;

use super::memory::Memory;
use super::pool::{Progress, Silent};
use crate::runtime::Runtime;
use crate::samples::SampleSet;

/// How samples are run. Results do not depend on any of it, but for the last bits that two runtimes differ in.
#[derive(Clone, Copy)]
pub struct How<'a> {
    /// What runs them.
    pub runtime: Runtime,
    /// How many run at once; at least one.
    pub threads: usize,
    /// What running them may take in memory.
    pub memory: Memory<'a>,
    /// How long one of them may run; `None` for as long as it takes.
    pub timeout: Option<Duration>,
    /// Told how far things are, and asked whether to go on.
    pub progress: &'a dyn Progress,
}

impl Default for How<'_> {
    /// In the default runtime, on as many threads as there are processors, silently and without a limit.
    fn default() -> Self {
        Self {
            runtime: Runtime::default(),
            threads: crate::machine::processors(),
            memory: Memory::default(),
            timeout: None,
            progress: &Silent,
        }
    }
}

impl<'a> How<'a> {
    /// The samples at `indices`, run like this.
    #[must_use]
    pub fn over(&self, samples: &'a SampleSet, indices: &'a [usize]) -> Run<'a> {
        let Self { runtime, threads, memory, timeout, progress } = *self;
        Run { samples, indices, runtime, threads, memory, timeout, progress }
    }
}

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
    /// How long one of them may run; `None` for as long as it takes.
    pub timeout: Option<Duration>,
    /// Told how far things are.
    pub progress: &'a dyn Progress,
}

impl<'a> Run<'a> {
    /// One sample at a time in the default runtime, without a limit and without a word.
    #[must_use]
    pub fn new(samples: &'a SampleSet, indices: &'a [usize]) -> Self {
        let (runtime, memory) = (Runtime::default(), Memory::default());
        Self { samples, indices, runtime, threads: 1, memory, timeout: None, progress: &Silent }
    }
}

/// The methods of a builder that has a field `run`.
macro_rules! run_methods {
    () => {
        /// What runs samples: tract unless this says otherwise.
        pub fn runtime(mut self, runtime: crate::runtime::Runtime) -> Self {
            self.run.runtime = runtime;
            self
        }

        /// How many samples run at once, at least one: as many as there are processors unless this says otherwise. Results
        /// do not depend on it.
        pub fn threads(mut self, threads: usize) -> Self {
            self.run.threads = threads.max(1);
            self
        }

        /// How long one sample may run, which is an error beyond: as long as it takes unless this says otherwise. A run stops
        /// between two nodes.
        pub fn timeout(mut self, timeout: impl Into<Option<std::time::Duration>>) -> Self {
            self.run.timeout = timeout.into();
            self
        }

        /// What computes constant nodes that amax itself does not: tract, where it is built in.
        #[doc(hidden)]
        pub fn evaluate(mut self, evaluate: &'a dyn crate::passes::Evaluate) -> Self {
            self.evaluate = evaluate;
            self
        }

        /// Told how far things are, and asked whether to go on.
        pub fn progress(mut self, progress: &'a dyn crate::observe::Progress) -> Self {
            self.run.progress = progress;
            self
        }
    };
}

/// The method of a builder whose runs keep to a limit.
macro_rules! memory_method {
    () => {
        /// What running samples may take in memory: as much as it needs unless this says otherwise.
        pub fn memory(mut self, memory: crate::observe::Memory<'a>) -> Self {
            self.run.memory = memory;
            self
        }
    };
}

pub(crate) use {memory_method, run_methods};
