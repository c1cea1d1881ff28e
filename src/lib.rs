//! `amax`: an ONNX quantization compiler.
//!
//! [`Rewrite`] is the whole pipeline: it reads a float [`Model`], decides what the [`Target`] can run on integers, watches the
//! samples, and returns the quantized model with a [`Report`]. [`Calibrate`], [`Compare`] and [`Convert`] are what the other
//! commands do, and [`quantize`] goes from file to file. Nothing here prints, exits, or writes a file that it was not told
//! to write.
//!
//! ```
//! # fn main() -> amax::Result<()> {
//! let model = amax::load("models/digits.onnx")?;
//! let samples = amax::SampleSet::open("models/digits.calib.npz", &model)?;
//! let done = amax::Rewrite::new(&model).samples(&samples).run()?;
//! assert!(done.report.quality[0].sqnr_db() > Some(25.0));
//! # let folder = tempfile::tempdir().expect("a temporary folder");
//! # let output = folder.path().join("digits.int8.onnx");
//! amax::save(&done.model, output)?;
//! # Ok(())
//! # }
//! ```
//!
//! The names below are the interface; the modules that they come from are open for amax's own program and tests, and change
//! without notice.
//!
//! # Features
//! All but `ort` are on by default. A function whose feature is off gives an error that names it.
//! - `tract`: runs models in tract. Work on weights alone does without.
//! - `ort`: runs models in an installed onnxruntime.
//! - `images`: samples that are PNG or JPEG files.
//! - `schema`: the JSON Schema of configurations.
//! - `cli`: the program.

#[doc(hidden)]
pub mod algorithms;
mod budget;
#[doc(hidden)]
pub mod calibrate;
#[doc(hidden)]
pub mod compare;
#[doc(hidden)]
pub mod config;
#[doc(hidden)]
pub mod convert;
mod decide;
#[doc(hidden)]
pub mod document;
#[doc(hidden)]
pub mod error;
mod improve;
#[doc(hidden)]
pub mod ir;
#[doc(hidden)]
pub mod machine;
#[doc(hidden)]
pub mod nearest;
#[doc(hidden)]
pub mod numerics;
#[doc(hidden)]
pub mod observe;
#[doc(hidden)]
pub mod onnx;
#[doc(hidden)]
pub mod ops;
#[doc(hidden)]
#[path = "../passes/mod.rs"]
pub mod passes;
#[doc(hidden)]
pub mod plan;
#[doc(hidden)]
pub mod quant;
mod quantize;
#[doc(hidden)]
pub mod reason;
#[doc(hidden)]
pub mod reopen;
#[doc(hidden)]
pub mod report;
#[doc(hidden)]
pub mod rewrite;
#[doc(hidden)]
pub mod runtime;
#[doc(hidden)]
pub mod samples;
#[doc(hidden)]
pub mod scales;
mod smooth;
#[doc(hidden)]
pub mod solve;
#[doc(hidden)]
pub mod statistics;
#[doc(hidden)]
pub mod targets;

pub use budget::{Check, Least, Price, PricedGroup, Prices};
pub use calibrate::Calibrate;
pub use compare::Compare;
pub use config::{Config, Pattern, presets, schema};
pub use convert::{Convert, Converted};
pub use error::{At, Error, Kind, Result};
pub use ir::{Model, Tensor};
pub use observe::calibrate::Checkpoint;
pub use observe::prove::Proof;
pub use observe::sites::{Quality, Site};
pub use observe::{Estimate, Memory, Progress, Silent};
pub use onnx::DataType;
pub use ops::Form;
pub use passes::Note;
pub use passes::recipes::To;
pub use passes::switch_quantizers::Switch;
pub use plan::Plan;
pub use quantize::{load, quantize, save};
pub use report::{
    ActivationRow, AlgorithmRow, BudgetReport, CheckRow, CurvePoint, Deployment, FloatQuality, GroupRow, Inspection,
    LogitsQuality, PassRow, QualityRow, Report, Step, Unlike, WeightRow, inspect,
};
pub use rewrite::{Rewrite, Rewritten, Verify};
pub use runtime::{Kernels, Runtime};
pub use samples::{Options as SampleOptions, Sample, SampleSet, Values};
pub use scales::{Scales, scales};
pub use statistics::Statistics;
pub use targets::Target;

/// The examples of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../docs/src/library.md")]
struct Readme;
