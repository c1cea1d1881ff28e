//! `amax`: an ONNX quantization compiler.
//!
//! [`rewrite`](rewrite::rewrite) is the whole line: it reads a float [`Model`](ir::Model), decides what the
//! [`Target`](targets::Target) can run on integers, watches the samples, and returns the quantized model with a
//! [`Report`](report::Report). Nothing here prints, exits, or writes a file that it was not told to write.
//!
//! ```
//! use std::ops::ControlFlow;
//! use amax::{config::Config, ir::file, observe::Silent, rewrite, samples::SampleSet, targets::Target};
//!
//! # fn main() -> amax::Result<()> {
//! # let folder = tempfile::tempdir().expect("a temporary folder");
//! # let output = folder.path().join("digits.int8.onnx");
//! let model = file::load("models/digits.onnx".as_ref())?;
//! let samples = SampleSet::open("models/digits.calib.npz".as_ref(), &model)?;
//! let request = rewrite::Request {
//!     config: &Config::default(),
//!     target: &Target::load("ort-cpu")?,
//!     plan: None,
//!     samples: Some(&samples),
//!     statistics: None,
//!     runtime: amax::runtime::Runtime::Tract,
//!     threads: 2,
//!     memory: amax::observe::Memory::default(),
//!     progress: &Silent,
//!     evaluate: &amax::runtime::TractEvaluate,
//!     passes: None,
//!     after: &|_, _, _| Ok(ControlFlow::Continue(())),
//!     measure: true,
//! };
//! let done = rewrite::rewrite(&model, &request)?;
//! assert!(done.report.quality[0].sqnr_db > 25.0);
//! file::save(&done.model, &output)?;
//! # Ok(())
//! # }
//! ```

pub mod algorithms;
pub mod calibrate;
pub mod compare;
pub mod config;
pub mod convert;
pub mod document;
pub mod error;
pub mod ir;
pub mod nearest;
pub mod numerics;
pub mod observe;
pub mod onnx;
pub mod ops;
#[path = "../passes/mod.rs"]
pub mod passes;
pub mod plan;
pub mod reason;
pub mod report;
pub mod rewrite;
pub mod runtime;
pub mod samples;
pub mod scales;
pub mod solve;
pub mod statistics;
pub mod targets;

pub use error::{Error, Result};
