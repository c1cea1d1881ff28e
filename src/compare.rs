//! How far two models are apart, on samples.

use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::observe::compare::compare;
use crate::observe::prove::{Proof, prove};
use crate::observe::run::{How, run_methods};
use crate::observe::sites::{Site, sites};
use crate::observe::verify::verify;
use crate::passes::Evaluate;
use crate::report::{Deployment, QualityRow};
use crate::runtime::{Runtime, TractEvaluate};
use crate::samples::SampleSet;

/// Compares a model with a reference: output by output, site by site, or as a proof that they are the same.
#[derive(Clone, Copy)]
#[must_use = "nothing is done before `outputs`, `sites` or `prove`"]
pub struct Compare<'a> {
    reference: &'a Model,
    test: &'a Model,
    samples: Option<&'a SampleSet>,
    indices: Option<&'a [usize]>,
    run: How<'a>,
    evaluate: &'a dyn Evaluate,
}

impl<'a> Compare<'a> {
    /// A comparison of `test` with `reference`.
    pub fn new(reference: &'a Model, test: &'a Model) -> Self {
        Self { reference, test, samples: None, indices: None, run: How::default(), evaluate: &TractEvaluate }
    }

    /// The samples that both models run on.
    pub fn samples(mut self, samples: impl Into<Option<&'a SampleSet>>) -> Self {
        self.samples = samples.into();
        self
    }

    /// Only the samples at these indices.
    pub fn indices(mut self, indices: impl Into<Option<&'a [usize]>>) -> Self {
        self.indices = indices.into();
        self
    }

    run_methods!();

    /// As another step runs samples.
    pub(crate) fn how(mut self, run: How<'a>) -> Self {
        self.run = run;
        self
    }

    /// How close each output is, over all samples.
    ///
    /// # Errors
    /// No samples, outputs that do not match, a model or a sample that the runtime cannot run, an interruption.
    pub fn outputs(&self) -> Result<Vec<QualityRow>> {
        let (samples, indices) = self.needed()?;
        let found = compare(self.reference, self.test, &self.run.over(samples, &indices))?;
        Ok(found.iter().map(QualityRow::new).collect())
    }

    /// Both models as deployed: run by onnxruntime with everything that its optimizer does, one sample at a time on as many
    /// threads as it takes by itself. Times, and the last bits of outputs, differ from run to run.
    ///
    /// # Errors
    /// As [`outputs`](Self::outputs), and where the program was built without the feature `ort` or no onnxruntime is found.
    pub fn deployed(&self) -> Result<Deployment> {
        let (samples, indices) = self.needed()?;
        let found = verify(self.reference, self.test, &self.run.over(samples, &indices))?;
        Ok(Deployment::new(found, [self.reference, self.test]))
    }

    /// The errors of each quantized site of `test` against the float model `reference`, the worst first.
    ///
    /// # Errors
    /// As [`outputs`](Self::outputs), and a runtime other than tract.
    pub fn sites(&self) -> Result<Vec<Site>> {
        if self.run.runtime != Runtime::Tract {
            return Err(Error::new(Kind::Usage, "--sites requires the runtime tract")
                .with_hint("leave --runtime out, or compare outputs without --sites"));
        }
        let (samples, indices) = self.needed()?;
        sites(self.reference, self.test, &self.run.over(samples, &indices))
    }

    /// Whether `test` computes what `reference` does: its constants exactly, and, where samples are given, its outputs.
    ///
    /// # Errors
    /// A model or a sample that the runtime cannot run, outputs that do not match, an interruption.
    pub fn prove(&self) -> Result<Proof> {
        let How { runtime, progress, .. } = self.run;
        prove(self.reference, self.test, self.samples, self.evaluate, runtime, progress)
    }

    fn needed(&self) -> Result<(&'a SampleSet, Vec<usize>)> {
        let samples = self.samples.ok_or_else(|| Error::new(Kind::Usage, "there are no samples to compare on"))?;
        let indices = self.indices.map_or_else(|| (0..samples.len()).collect(), <[usize]>::to_vec);
        Ok((samples, indices))
    }
}
