//! What stands in for the decoding of images in builds without it.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::preprocess::Preprocess;
use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;

/// Extensions of files that other builds decode.
pub(super) const EXTENSIONS: &[&str] = &["png", "jpg", "jpeg"];

/// An image; cannot be made in this build.
#[derive(Debug)]
pub(super) struct Picture {
    never: Infallible,
    pub(super) shape: Vec<usize>,
}

impl Picture {
    /// Fails: this build decodes no images.
    pub(super) fn open(path: &Path, _preprocess: &Arc<Preprocess>) -> Result<Self> {
        Err(Error::new(Kind::Samples, "amax was built without images, so they cannot be decoded")
            .in_file(path)
            .with_hint("build it with the feature \"images\", or save what the model is fed with numpy.savez"))
    }

    /// Never called.
    pub(super) fn read(&self) -> Result<Tensor> {
        match self.never {}
    }

    /// Never called.
    pub(super) fn files(&self) -> [&PathBuf; 2] {
        match self.never {}
    }
}
