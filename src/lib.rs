//! `amax`: an ONNX quantization compiler.

pub mod calibrate;
pub mod config;
pub mod error;
pub mod ir;
pub mod nearest;
pub mod numerics;
pub mod onnx;
pub mod ops;
#[path = "../passes/mod.rs"]
pub mod passes;
pub mod plan;
pub mod report;
pub mod rewrite;
pub mod runtime;
pub mod samples;
pub mod sensitivity;
pub mod solve;
pub mod statistics;
pub mod targets;

pub use error::{Error, Result};
