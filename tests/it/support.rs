//! What tests share: places in the repository, folders of their own, the program, passes without a runtime.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use amax::error::Result;
use amax::ir::{Model, file, text};
use amax::passes::support::evaluate::Exact;
use amax::passes::{Context, Pass, pipeline};
use amax::plan::Plan;
use amax::samples::SampleSet;
use amax::solve::Solution;
use serde_json::Value;
use tempfile::TempDir;

/// A path from the root of the repository.
pub fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A file of `tests/vectors`.
pub fn vectors(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root("tests/vectors").join(name)).unwrap()).unwrap()
}

/// A JSON list of numbers.
pub fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// An empty folder, gone with the handle.
pub fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

pub fn names_in(folder: &Path) -> BTreeSet<String> {
    std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// The `.onnx` files below a folder, sorted.
pub fn models_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(models_below(&path));
        } else if path.extension().is_some_and(|e| e == "onnx") {
            found.push(path);
        }
    }
    found.sort();
    found
}

pub fn digits() -> (Model, SampleSet) {
    let model = file::load(&root("models/digits.onnx")).unwrap();
    let samples = SampleSet::open(&root("models/digits.calib.npz"), &model).unwrap();
    (model, samples)
}

/// The model of a text, in which lines that begin with `#` are comments.
pub fn parsed(text: &str) -> Model {
    let graph: String = text.lines().filter(|l| !l.starts_with('#')).fold(String::new(), |s, l| s + l + "\n");
    text::parse(&graph).unwrap_or_else(|e| panic!("{e}:\n{graph}"))
}

/// Runs passes without a runtime.
pub fn pass(model: &mut Model, passes: &[&dyn Pass], quantization: Option<(&Plan, &Solution)>) -> Result<()> {
    let context = Context { quantization, ..Context::new(&Exact) };
    pipeline::run(model, passes, &context, &mut |_, _, _| Ok(ControlFlow::Continue(()))).map(drop)
}

/// The program in a folder.
pub fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_amax"));
    command.current_dir(folder).stdin(Stdio::null()).env("RUST_BACKTRACE", "1").env_remove("COLUMNS");
    command
}

/// Runs the program in a folder; words are separated by spaces.
pub fn amax(folder: &Path, words: &str) -> Output {
    program(folder).args(words.split_whitespace()).output().unwrap()
}

/// What the program prints on its standard output.
#[track_caller]
pub fn succeed(folder: &Path, words: &str) -> String {
    let output = amax(folder, words);
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The program ends with `code` and says why.
#[track_caller]
pub fn fail(folder: &Path, words: &str, code: i32, why: &str) {
    let output = amax(folder, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words}: {error}");
    assert!(error.contains(why), "{words}: {error}");
}

/// Values in [-1, 1) that look random.
pub fn noise(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + 13) % 2001) as f32 / 1000.0 - 1.0).collect()
}

/// An array of float32, as `numpy.save` writes it.
pub fn npy(shape: &[usize], values: &[f32]) -> Vec<u8> {
    assert_eq!(shape.iter().product::<usize>(), values.len());
    let dims = shape.iter().fold(String::new(), |text, d| text + &d.to_string() + ", ");
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({dims}), }}");
    let header = format!("{header:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}
