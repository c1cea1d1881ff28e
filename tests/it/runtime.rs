//! The runtime against onnxruntime.
#![cfg(feature = "tract")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use amax::error::Kind;
use amax::ir::{self, Tensor};
use amax::numerics::pack;
use amax::onnx::DataType;
use amax::passes::Evaluate;
use amax::runtime::{Observe, Options, Sample, Session, TractEvaluate};
use serde_json::Value;

/// Shapes and values by name.
type Seen = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Keeps every tensor it sees.
struct Keep {
    names: Vec<String>,
    seen: Mutex<Seen>,
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
        "uint32" => DataType::Uint32,
        "uint64" => DataType::Uint64,
        "bool" => DataType::Bool,
        "int4" => DataType::Int4,
        "uint4" => DataType::Uint4,
        "int2" => DataType::Int2,
        "uint2" => DataType::Uint2,
        "float8_e4m3fn" => DataType::Float8e4m3fn,
        "float8_e5m2" => DataType::Float8e5m2,
        "float4_e2m1fn" => DataType::Float4e2m1,
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

#[allow(clippy::float_cmp, reason = "infinities are equal or they are not")]
/// Largest difference, and largest magnitude of `want`.
fn difference(got: &[f32], want: &[f32]) -> (f32, f32) {
    assert_eq!(got.len(), want.len());
    let pairs = got.iter().zip(want);
    let gap = |(a, b): (&f32, &f32)| if a == b || (a.is_nan() && b.is_nan()) { 0. } else { (a - b).abs() };
    let worst = pairs.map(gap).fold(0f32, |a, b| if b.is_nan() { f32::INFINITY } else { a.max(b) });
    (worst, want.iter().filter(|v| v.is_finite()).fold(0f32, |a, b| a.max(b.abs())))
}

/// A tensor of `cases.json`: values in row-major order, NaN as null.
fn listed(entry: &Value) -> Tensor {
    let dims: Vec<usize> = entry["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
    let dtype = dtype(entry["dtype"].as_str().unwrap());
    let values = entry["values"].as_array().unwrap();
    let float = |v: &Value| match v {
        Value::Null => f64::NAN,
        Value::String(text) => text.parse().unwrap(),
        v => v.as_f64().unwrap(),
    };
    if let Some(format) = dtype.format().filter(|f| f.bits() < 8 || !f.is_integer()) {
        let codes: Vec<i32> = values.iter().map(|v| format.encode(float(v) as f32)).collect();
        return Tensor::new(dtype, &dims, pack::pack(&codes, format.bits()));
    }
    let int = |v: &Value| v.as_i64().unwrap_or_else(|| i64::from(v.as_bool().unwrap_or(false)));
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|v| match dtype {
            DataType::Float => (float(v) as f32).to_le_bytes().to_vec(),
            DataType::Float16 => half::f16::from_f64(float(v)).to_le_bytes().to_vec(),
            DataType::Double => float(v).to_le_bytes().to_vec(),
            _ => int(v).to_le_bytes()[..dtype.bits().unwrap() / 8].to_vec(),
        })
        .collect();
    Tensor::new(dtype, &dims, bytes)
}

fn listed_all(entries: &Value) -> BTreeMap<String, Tensor> {
    entries.as_object().unwrap().iter().map(|(name, entry)| (name.clone(), listed(entry))).collect()
}

fn folder() -> PathBuf {
    crate::support::root("tests/runtime")
}

/// Every small model: outputs and observed tensors are those of the oracle, or it is refused with the words that are due.
#[test]
fn cases() {
    let cases: Value = serde_json::from_slice(&std::fs::read(folder().join("cases.json")).unwrap()).unwrap();
    let cases = cases.as_object().unwrap();
    assert!(cases.len() > 165);
    let failed: Vec<String> =
        cases.iter().filter_map(|(name, case)| check(name, case).err().map(|why| format!("{name}: {why}"))).collect();
    assert!(failed.is_empty(), "{} of {} fail:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

fn check(name: &str, case: &Value) -> Result<(), String> {
    let model = ir::file::load(&folder().join(format!("{name}.onnx"))).map_err(|e| e.to_string())?;
    if let Some(words) = case["refused"].as_array() {
        let Err(error) = Session::new(&model, &[]) else { return Err("it is not refused".to_owned()) };
        let text = error.to_string();
        let said = words.iter().all(|w| text.contains(w.as_str().unwrap()));
        let clear = error.kind() == Kind::Runtime && error.hint().is_some() && said;
        return if clear { Ok(()) } else { Err(format!("it is refused with: {text}")) };
    }
    let runs = case["runs"].as_array().unwrap();
    let tolerance = case["tolerance"].as_f64().unwrap() as f32;
    let silent: Vec<String> =
        case["silent"].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_owned()).collect();
    let mut names: Vec<String> = runs[0]["observed"].as_object().unwrap().keys().cloned().collect();
    names.extend(silent.iter().cloned());
    check_runs(&Session::new(&model, &names).map_err(|e| e.to_string())?, &names, &silent, runs, tolerance)?;
    let unchecked = Options { check: false, plans: 4, ..Options::default() };
    let session = Session::with_options(&model, &names, unchecked).map_err(|e| e.to_string())?;
    check_runs(&session, &names, &silent, runs, tolerance)
}

fn check_runs(
    session: &Session,
    names: &[String],
    silent: &[String],
    runs: &[Value],
    tolerance: f32,
) -> Result<(), String> {
    for run in runs {
        let keep = Keep::new(names);
        let observe: Arc<dyn Observe> = keep.clone();
        let outputs = session.run(&listed_all(&run["inputs"]), &observe).map_err(|e| e.to_string())?;
        let want = listed_all(&run["outputs"]);
        if outputs.len() != want.len() {
            return Err(format!("{} outputs", outputs.len()));
        }
        for (name, got) in &outputs {
            compare(name, got, &want[name], tolerance)?;
        }
        let want = listed_all(&run["observed"]);
        let seen = keep.seen.lock().unwrap();
        for (name, want) in &want {
            let Some((dims, values)) = seen.get(name) else { return Err(format!("{name} was not shown")) };
            compare(name, &Tensor::from_f32(dims, values), want, tolerance)?;
        }
        if seen.len() != want.len() {
            return Err(format!("{} tensors were shown instead of {}", seen.len(), want.len()));
        }
    }
    let mut reported: Vec<String> = session.unobserved().into_iter().map(|(name, _)| name).collect();
    let mut silent = silent.to_vec();
    reported.sort();
    silent.sort();
    if reported != silent {
        return Err(format!("unobserved are {:?}", session.unobserved()));
    }
    if session.method() == "optimized" { Ok(()) } else { Err(format!("it runs {}", session.method())) }
}

fn compare(name: &str, got: &Tensor, want: &Tensor, tolerance: f32) -> Result<(), String> {
    if got.dims() != want.dims() || got.dtype() != want.dtype() {
        return Err(format!(
            "{name} is {} {:?} instead of {} {:?}",
            got.dtype(),
            got.dims(),
            want.dtype(),
            want.dims()
        ));
    }
    let (Some(a), Some(b)) = (got.to_f32(), want.to_f32()) else {
        return if got.raw() == want.raw() { Ok(()) } else { Err(format!("{name} differs")) };
    };
    let (gap, magnitude) = difference(&a, &b);
    if gap <= tolerance * magnitude.max(1.) {
        return Ok(());
    }
    Err(format!(
        "{name} is off by {gap} of {magnitude}: {:?} instead of {:?}",
        &a[..a.len().min(40)],
        &b[..b.len().min(40)]
    ))
}

/// Nodes over constants: evaluated to the last bit, or declined.
#[test]
fn folds() {
    let model = ir::file::load(&folder().join("fold.onnx")).unwrap();
    let answers: Value = serde_json::from_slice(&std::fs::read(folder().join("fold.json")).unwrap()).unwrap();
    let mut failed = Vec::new();
    for &node in model.graph(model.main()).nodes() {
        let name = model.node_name(node);
        let inputs: Vec<Option<Tensor>> =
            model.node(node).inputs().iter().map(|v| v.and_then(|v| model.constant(v)).cloned()).collect();
        let got = TractEvaluate.evaluate(&model, node, &inputs);
        let want = (!answers[name].is_null()).then(|| listed(&answers[name]));
        let same = match (&got, &want) {
            (None, None) => true,
            (Some(got), Some(want)) => {
                got.len() == 1
                    && got[0].dtype() == want.dtype()
                    && got[0].dims() == want.dims()
                    && got[0].raw() == want.raw()
            }
            _ => false,
        };
        if !same {
            failed.push(format!("{name}: {got:?} instead of {want:?}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

struct Nobody;

impl Observe for Nobody {
    fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
}

/// A sample, and words of the error it gets.
type Case<'a> = (&'a [(&'a str, Tensor)], &'a [&'a str]);

/// Samples that do not fit are refused by input, with what is expected and what was given.
#[test]
fn samples_that_do_not_fit() {
    let model = ir::file::load(&folder().join("conv_net.onnx")).unwrap();
    let session = Session::new(&model, &[]).unwrap();
    let good = Tensor::from_f32(&[1, 3, 8, 8], &[0.5; 192]);
    let cases: [Case<'_>; 5] = [
        (&[], &["\"x\"", "lacks", "float", "[batch, 3, h, w]"]),
        (&[("x", good.clone()), ("extra", good.clone())], &["\"extra\"", "does not have", "x"]),
        (&[("x", Tensor::from_i64(&[1, 3, 8, 8], &[0; 192]))], &["\"x\"", "int64", "float"]),
        (&[("x", Tensor::from_f32(&[1, 4, 8, 8], &[0.; 256]))], &["\"x\"", "[1, 4, 8, 8]", "[batch, 3, h, w]"]),
        (&[("x", Tensor::from_f32(&[3, 8, 8], &[0.; 192]))], &["\"x\"", "[3, 8, 8]", "[batch, 3, h, w]"]),
    ];
    let observe: Arc<dyn Observe> = Arc::new(Nobody);
    for (sample, words) in cases {
        let sample: Sample = sample.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
        let error = session.run(&sample, &observe).unwrap_err();
        assert_eq!(error.kind(), Kind::Samples, "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{word} is not in: {error}");
        }
    }
    let fine: Sample = [("x".to_owned(), good)].into();
    assert_eq!(session.run(&fine, &observe).unwrap().len(), 1);
}

/// A sample that fits the declared shape may still not fit the model: the error names the node.
#[test]
fn a_node_that_cannot_run_is_named() {
    let model = ir::file::load(&folder().join("mismatch.onnx")).unwrap();
    let session = Session::new(&model, &[]).unwrap();
    let observe: Arc<dyn Observe> = Arc::new(Nobody);
    let sample: Sample = [("x".to_owned(), Tensor::from_f32(&[2, 5], &[0.; 10]))].into();
    let error = session.run(&sample, &observe).unwrap_err();
    assert_eq!(error.kind(), Kind::Runtime);
    assert!(error.to_string().contains("\"product\" (MatMul)"), "{error}");
}

/// A loop that goes on for as long as the data says.
#[test]
fn a_loop_of_unknown_length_is_named() {
    let model = ir::file::load(&folder().join("data_loop.onnx")).unwrap();
    let session = Session::new(&model, &[]).unwrap();
    let observe: Arc<dyn Observe> = Arc::new(Nobody);
    let sample: Sample = [("x".to_owned(), Tensor::from_f32(&[2, 4], &[1.; 8]))].into();
    let error = session.run(&sample, &observe).unwrap_err();
    assert_eq!(error.kind(), Kind::Runtime);
    assert!(error.hint().is_some());
    assert!(error.to_string().contains("how many rounds it has depends on the data"), "{error}");
    assert!(error.to_string().contains("\"until\" (Loop)"), "{error}");
}

/// One session, several threads and shapes: every thread gets the bytes that one thread alone gets.
#[test]
fn threads_share_a_session() {
    let model = ir::file::load(&folder().join("conv_net.onnx")).unwrap();
    let names: Vec<String> = ["c", "p", "g"].map(str::to_owned).into();
    let sample = |seed: usize| -> Sample {
        let dims = [1 + seed % 2, 3, 8, 10];
        let values: Vec<f32> =
            (0..dims.iter().product()).map(|k: usize| ((k * 37 + seed * 11) % 101) as f32 - 50.).collect();
        [("x".to_owned(), Tensor::from_f32(&dims, &values))].into()
    };
    let run = |session: &Session, seed: usize| {
        let keep = Keep::new(&names);
        let observe: Arc<dyn Observe> = keep.clone();
        let outputs = session.run(&sample(seed), &observe).unwrap();
        let seen = std::mem::take(&mut *keep.seen.lock().unwrap());
        assert_eq!(seen.len(), names.len());
        (outputs, seen)
    };
    let alone = Session::new(&model, &names).unwrap();
    let want: Vec<_> = (0..12).map(|seed| run(&alone, seed)).collect();
    let shared = Session::with_options(&model, &names, Options { plans: 2, ..Options::default() }).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (want, run, shared) = (&want, &run, &shared);
            scope.spawn(move || {
                for seed in (thread..12).step_by(2) {
                    assert!(run(shared, seed) == want[seed], "sample {seed} differs");
                }
            });
        }
    });
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

/// Memory of the process: the most it ever had, and what it has of its own now.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let wanted = |line: &&str| line.starts_with("VmHWM") || line.starts_with("RssAnon");
    status
        .lines()
        .filter(wanted)
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join(", ")
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
        if std::env::var_os("AMAX_EACH").is_some() {
            println!("   each {name} {gap} {magnitude}");
        }
        if gap / (magnitude + 0.01) > worst.0 || worst.1.is_empty() {
            worst = (gap / (magnitude + 0.01), name.clone(), gap, magnitude);
        }
    }
    let expected = entries("outputs");
    let (mut output_worst, mut off) = (0f32, None);
    for (name, got) in &outputs {
        let want = &expected[name];
        if got.dims() != want.dims() {
            return Err(format!("output {name}: shape {:?}, not {:?}", got.dims(), want.dims()));
        }
        if let (Some(got), Some(want)) = (got.to_f32(), want.to_f32()) {
            let (gap, magnitude) = difference(&got, &want);
            output_worst = output_worst.max(gap);
            if gap > 2e-3 * (magnitude + 0.01) {
                off = Some(name.clone());
            }
        } else if got.raw() != want.raw() {
            off = Some(name.clone());
        }
    }
    println!(
        "{}: {} of {} tensors, worst {:.1e} of {:.1e} at {}, outputs {:.1e}, {} | first {:.0} ms, then {:.1} ms | {}",
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
        memory(),
    );
    let silent = session.unobserved();
    if !silent.is_empty() {
        println!("   unobserved: {:?}", silent.iter().take(5).collect::<Vec<_>>());
    }
    if silent.len() + seen.len() != names.len() {
        return Err(format!("{} seen, {} reported", seen.len(), silent.len()));
    }
    if let Some(name) = off {
        return Err(format!("output {name} is wrong"));
    }
    if worst.0 > 1e-3 { Err("too far off".to_owned()) } else { Ok(()) }
}
