//! From file to file, for build scripts.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::ir::{Model, file};
use crate::observe::Memory;
use crate::report::Report;
use crate::rewrite::Rewrite;
use crate::samples::{self, SampleSet};

/// Loads a model. Weights are slices of the mapped file.
///
/// # Errors
/// [`Kind::Model`]: a file that is missing, unreadable, damaged, of another kind or not a valid model; external data that is
/// missing, too short or outside of the model's folder.
pub fn load(path: impl AsRef<Path>) -> Result<Model> {
    file::load(path.as_ref())
}

/// Writes a model, complete or not at all; weights go to `<path>.<hash>.data` beside it where the model was loaded with such a
/// file, or does not fit into one protobuf.
///
/// # Errors
/// [`Kind::Output`]: the file cannot be written, or is one that the model is read from.
pub fn save(model: &Model, path: impl AsRef<Path>) -> Result<()> {
    file::save(model, path.as_ref())
}

/// Quantizes a model file by the defaults of `amax rewrite`, and says what was done. Samples are those of
/// `<stem>.calib.npz` beside the model; without that file activations stay float.
///
/// A build script gives [`Report::files`] to Cargo:
///
/// ```no_run
/// fn main() -> amax::Result<()> {
///     let report = amax::quantize("model.onnx", "model.int8.onnx")?;
///     for file in &report.files {
///         println!("cargo:rerun-if-changed={}", file.display());
///     }
///     Ok(())
/// }
/// ```
///
/// # Errors
/// As [`load`], [`SampleSet::open`], [`Rewrite::run`] and [`save`]; nothing has been written then.
pub fn quantize(input: impl AsRef<Path>, output: impl AsRef<Path>) -> Result<Report> {
    let (input, output) = (input.as_ref(), output.as_ref());
    let mut model = file::load(input)?;
    file::check_output(&model, output)?;
    model.spill_beside(output);
    let samples = samples::default_path(input).map(|path| SampleSet::open(&path, &model)).transpose()?;
    let read = samples.iter().flat_map(SampleSet::files).map(|path| ("the samples", path));
    file::check_outputs(read, &[("the model", output)])?;
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let rewrite =
        Rewrite::new(&model).samples(samples.as_ref()).memory(Memory { folder: Some(folder), ..Memory::default() });
    let done = rewrite.run().map_err(|e: Error| match e.kind() {
        Kind::Model | Kind::Runtime => e.in_file(input),
        _ => e,
    })?;
    file::save(&done.model, output)?;
    Ok(done.report)
}
