//! The integration tests, in one binary.

mod calibration;
mod check;
mod cli;
mod file;
mod numerics;
mod opset;
mod passes;
mod pipeline;
mod plan;
mod roundtrip;
mod runtime;
mod samples;
mod snapshot;
mod text;
mod tidy;
