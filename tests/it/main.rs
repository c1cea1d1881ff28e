//! The integration tests, in one binary.
// The lint configuration excuses functions marked as tests, but not what they call.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and measurements are printed")]

mod backend;
mod blocks;
mod calibration;
mod check;
mod cli;
mod compare;
mod config;
mod configured;
mod file;
mod formats;
mod forms;
mod large;
mod library;
mod numerics;
mod observers;
mod onnxruntime;
mod opset;
mod passes;
mod pipeline;
mod plan;
mod postprocess;
mod qat;
mod roundtrip;
mod runtime;
mod samples;
mod scales;
#[cfg(feature = "tract")]
mod segments;
mod snapshot;
mod solve;
mod statistics_file;
mod text;
mod tidy;
