//! The integration tests, in one binary.
// The lint configuration excuses functions marked as tests, but not what they call.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and measurements are printed")]

use proptest::test_runner::{Config, RngSeed};

/// So many random cases, the same ones in every run: seeds are inputs.
fn random_cases(cases: u32) -> Config {
    Config { cases, rng_seed: RngSeed::Fixed(0), ..Config::default() }
}

mod backend;
mod blocks;
#[cfg(feature = "tract")]
mod budget;
mod calibration;
mod check;
mod cli;
mod compare;
mod config;
mod configured;
mod crossed;
mod documents;
mod edits;
mod endless;
mod file;
mod formats;
mod forms;
#[cfg(feature = "tract")]
mod halves;
mod hostile;
#[cfg(feature = "tract")]
mod improve;
mod large;
mod library;
mod limits;
#[cfg(feature = "tract")]
mod matrices;
mod numerics;
mod observers;
mod onnxruntime;
mod opset;
mod passes;
mod pipeline;
mod plan;
mod postprocess;
mod qat;
mod quadratic;
mod reference;
mod roundtrip;
mod runtime;
mod samples;
mod scales;
#[cfg(feature = "tract")]
mod segments;
#[cfg(feature = "tract")]
mod smooth;
mod snapshot;
mod solve;
mod statistics_file;
mod support;
mod text;
mod tidy;
mod verify;
#[cfg(feature = "tract")]
mod walk;
