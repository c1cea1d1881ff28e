//! `amax`: an ONNX quantization compiler.

pub mod error;
pub mod ir;
pub mod onnx;

pub use error::{Error, Result};
