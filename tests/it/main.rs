//! The integration tests, in one binary.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and measurements are printed")]

mod calibration;
mod cli;
mod file;
mod numerics;
mod opset;
mod passes;
mod pipeline;
mod roundtrip;
mod runtime;
mod samples;
mod snapshot;
mod text;
mod tidy;
