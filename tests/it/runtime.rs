//! The runtime against onnxruntime.
#![cfg(feature = "tract")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use amax::ir::{self, Tensor};
use amax::onnx::DataType;
use amax::runtime::{Observe, Sample, Session};
use serde_json::Value;

/// Keeps every tensor it sees.
struct Keep {
    names: Vec<String>,
    seen: Mutex<BTreeMap<String, (Vec<usize>, Vec<f32>)>>,
}

impl Keep {
    fn new(names: &[String]) -> Arc<Self> {
        Arc::new(Self { names: names.to_vec(), seen: Mutex::default() })
    }
}

impl Observe for Keep {
    fn see(&self, site: usize, values: &[f32], shape: &[usize]) {
        let before = self.seen.lock().unwrap().insert(self.names[site].clone(), (shape.to_vec(), values.to_vec()));
        assert!(before.is_none(), "{} was shown twice", self.names[site]);
    }
}

fn dtype(name: &str) -> DataType {
    match name {
        "float32" => DataType::Float,
        "float64" => DataType::Double,
        "float16" => DataType::Float16,
        "int64" => DataType::Int64,
        "int32" => DataType::Int32,
        "int16" => DataType::Int16,
        "uint16" => DataType::Uint16,
        "int8" => DataType::Int8,
        "uint8" => DataType::Uint8,
        "bool" => DataType::Bool,
        other => panic!("{other}"),
    }
}

/// A tensor of `data.bin`.
fn stored(entry: &Value, data: &[u8]) -> Tensor {
    let dims: Vec<usize> = entry["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
    let dtype = dtype(entry["dtype"].as_str().unwrap());
    let at = entry["at"].as_u64().unwrap() as usize;
    let len = dtype.bits().unwrap() / 8 * dims.iter().product::<usize>();
    Tensor::new(dtype, &dims, data[at..at + len].to_vec())
}

/// Largest difference, and largest magnitude of `want`.
fn difference(got: &[f32], want: &[f32]) -> (f32, f32) {
    assert_eq!(got.len(), want.len());
    let pairs = got.iter().zip(want);
    let gap = |(a, b): (&f32, &f32)| if a == b || (a.is_nan() && b.is_nan()) { 0. } else { (a - b).abs() };
    let worst = pairs.map(gap).fold(0f32, |a, b| if b.is_nan() { f32::INFINITY } else { a.max(b) });
    (worst, want.iter().filter(|v| v.is_finite()).fold(0f32, |a, b| a.max(b.abs())))
}

/// Runs the models that `tests/runtime/real_models.py` made references for, and compares every float tensor.
/// `AMAX_REFERENCES=folder cargo test --test it runtime::real_models -- --ignored --nocapture`
#[test]
#[ignore = "needs references that are too large to keep"]
fn real_models() {
    let root = PathBuf::from(std::env::var("AMAX_REFERENCES").expect("a folder of references"));
    let only = std::env::var("AMAX_ONLY").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    let mut failed = Vec::new();
    for folder in folders.iter().filter(|f| f.to_string_lossy().contains(&only)) {
        if let Err(why) = real_model(folder) {
            println!("{}: {why}", folder.display());
            failed.push(folder.clone());
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

fn real_model(folder: &Path) -> Result<(), String> {
    let case: Value = serde_json::from_slice(&std::fs::read(folder.join("case.json")).unwrap()).unwrap();
    let data = std::fs::read(folder.join("data.bin")).unwrap();
    let model = ir::file::load(Path::new(case["model"].as_str().unwrap())).unwrap();
    let entries = |key: &str| -> BTreeMap<String, Tensor> {
        case[key].as_object().unwrap().iter().map(|(k, v)| (k.clone(), stored(v, &data))).collect()
    };
    let tensors = entries("tensors");
    let names: Vec<String> = tensors.keys().cloned().collect();
    let sample: Sample = entries("inputs");
    let start = Instant::now();
    let session = Session::new(&model, &names).map_err(|e| e.to_string())?;
    let keep = Keep::new(&names);
    let observe: Arc<dyn Observe> = keep.clone();
    let outputs = session.run(&sample, &observe).map_err(|e| e.to_string())?;
    let first = start.elapsed();
    let seen = std::mem::take(&mut *keep.seen.lock().unwrap());
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        keep.seen.lock().unwrap().clear();
        let start = Instant::now();
        session.run(&sample, &observe).map_err(|e| e.to_string())?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    let mut worst = (0f32, String::new(), 0f32, 0f32);
    for (name, (shape, values)) in &seen {
        let want = &tensors[name];
        if *shape != want.dims() {
            return Err(format!("{name}: shape {shape:?}, not {:?}", want.dims()));
        }
        let (gap, magnitude) = difference(values, &want.to_f32().unwrap());
        if gap / (magnitude + 0.01) > worst.0 || worst.1.is_empty() {
            worst = (gap / (magnitude + 0.01), name.clone(), gap, magnitude);
        }
    }
    let expected = entries("outputs");
    let mut output_worst = 0f32;
    for (name, got) in &outputs {
        let want = &expected[name];
        if got.dims() != want.dims() {
            return Err(format!("output {name}: shape {:?}, not {:?}", got.dims(), want.dims()));
        }
        if let (Some(got), Some(want)) = (got.to_f32(), want.to_f32()) {
            output_worst = output_worst.max(difference(&got, &want).0);
        }
    }
    println!(
        "{}: {} of {} tensors, worst {:.1e} of {:.1e} at {}, outputs {:.1e}, {} | first {:.0} ms, then {:.1} ms",
        folder.file_name().unwrap().to_string_lossy(),
        seen.len(),
        names.len(),
        worst.2,
        worst.3,
        worst.1,
        output_worst,
        session.method(),
        first.as_secs_f64() * 1e3,
        best * 1e3,
    );
    let silent = session.unobserved();
    if !silent.is_empty() {
        println!("   unobserved: {:?}", silent.iter().take(5).collect::<Vec<_>>());
    }
    if silent.len() + seen.len() != names.len() {
        return Err(format!("{} seen, {} reported", seen.len(), silent.len()));
    }
    if worst.0 > 1e-3 { Err("too far off".to_owned()) } else { Ok(()) }
}
