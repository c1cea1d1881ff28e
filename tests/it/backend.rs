//! The runtime on ONNX's own operator tests, which are too many to keep.
#![cfg(feature = "tract")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use amax::ir::{self, Model, Tensor};
use amax::numerics::{Format, pack};
use amax::onnx::TensorProto;
use amax::runtime::{Observe, Options, Sample, Session};
use prost::Message;

struct Nobody;

impl Observe for Nobody {
    fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
}

/// How a case ends.
enum End {
    Passed,
    /// Not run, and said so.
    Refused(String),
    /// Run, with another result than is due.
    Wrong(String),
}

/// Runs the cases that `tests/runtime/node_cases.py` wrote, each as it is and, where that is refused, with all inputs but
/// the first as constants. No result may be wrong; refusals are counted.
/// `AMAX_NODE_CASES=folder cargo test --test it backend:: -- --ignored --nocapture`
#[test]
#[ignore = "needs cases that are too many to keep"]
fn node_cases() {
    let root = PathBuf::from(std::env::var("AMAX_NODE_CASES").expect("a folder of cases"));
    let only = std::env::var("AMAX_ONLY").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    folders.retain(|f| f.to_string_lossy().contains(&only));
    folders.sort();
    let (mut as_is, mut frozen, mut refused) = (0, 0, 0);
    let mut wrong = Vec::new();
    for folder in &folders {
        let name = folder.file_name().unwrap().to_string_lossy();
        let end = match run(folder, false) {
            End::Passed => {
                as_is += 1;
                continue;
            }
            End::Refused(_) => run(folder, true),
            end @ End::Wrong(_) => end,
        };
        match end {
            End::Passed => {
                frozen += 1;
                println!("constant {name}");
            }
            End::Refused(why) => {
                refused += 1;
                println!("refused {name}: {why}");
            }
            End::Wrong(why) => {
                println!("WRONG {name}: {why}");
                wrong.push(name.into_owned());
            }
        }
    }
    println!(
        "{} cases: {as_is} pass, {frozen} pass with constant inputs, {refused} are refused, {} are wrong",
        folders.len(),
        wrong.len()
    );
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// ONNX's tests of the quantizers, from `tests/runtime/quantizer_cases.py`: every type, per tensor, along an axis and in
/// blocks. Each runs as it is and with all inputs but the first as constants, and none is refused.
#[test]
fn quantizers() {
    let path = crate::support::root("tests/runtime/quantizers.bin");
    let bytes = std::fs::read(path).unwrap();
    let mut rest = bytes.as_slice();
    let mut cases = Vec::new();
    while !rest.is_empty() {
        let [name, tolerance, model] = [(); 3].map(|()| part(&mut rest));
        let mut list =
            || -> Vec<(String, Tensor)> { (0..number(&mut rest)).map(|_| tensor(part(&mut rest))).collect() };
        let (inputs, want) = (list(), list());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        cases.push((
            text(name),
            Case {
                model: ir::file::from_bytes(model.to_vec()).unwrap(),
                tolerance: parsed(&text(tolerance)),
                inputs,
                want,
            },
        ));
    }
    assert!(cases.len() >= 30, "{}", cases.len());
    for (name, case) in &cases {
        for freeze in [false, true] {
            match case.run(freeze) {
                End::Passed => {}
                End::Refused(why) | End::Wrong(why) => panic!("{name}, constants {freeze}: {why}"),
            }
        }
    }
}

fn number(rest: &mut &[u8]) -> usize {
    let (number, behind) = rest.split_at(4);
    *rest = behind;
    u32::from_le_bytes(number.try_into().unwrap()) as usize
}

fn part<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let len = number(rest);
    let (part, behind) = rest.split_at(len);
    *rest = behind;
    part
}

/// One of ONNX's tests.
struct Case {
    model: Model,
    inputs: Vec<(String, Tensor)>,
    want: Vec<(String, Tensor)>,
    tolerance: (f32, f32),
}

impl Case {
    fn run(&self, freeze: bool) -> End {
        let mut model = self.model.clone();
        let mut sample: Sample = BTreeMap::new();
        for (index, (name, tensor)) in self.inputs.iter().enumerate() {
            if freeze && index > 0 {
                freeze_input(&mut model, name, tensor.clone());
            } else {
                sample.insert(name.clone(), tensor.clone());
            }
        }
        let observe: Arc<dyn Observe> = Arc::new(Nobody);
        let result = Session::with_options(&model, &[], Options::default()).and_then(|s| s.run(&sample, &observe));
        let outputs = match result {
            Ok(outputs) => outputs,
            Err(error) => return End::Refused(error.to_string().replace('\n', " ")),
        };
        if outputs.len() != self.want.len() {
            return End::Wrong(format!("{} outputs instead of {}", outputs.len(), self.want.len()));
        }
        for ((name, got), (_, want)) in outputs.iter().zip(&self.want) {
            if let Err(why) = same(got, want, self.tolerance) {
                return End::Wrong(format!("{name} {why}"));
            }
        }
        End::Passed
    }
}

fn run(folder: &Path, freeze: bool) -> End {
    let model = match ir::file::load(&folder.join("model.onnx")) {
        Ok(model) => model,
        Err(error) => return End::Refused(format!("cannot load: {error}")),
    };
    let tolerance = parsed(&std::fs::read_to_string(folder.join("tolerance")).unwrap());
    Case { model, inputs: tensors(folder, "input"), want: tensors(folder, "output"), tolerance }.run(freeze)
}

fn parsed(tolerance: &str) -> (f32, f32) {
    let (relative, absolute) = tolerance.trim().split_once(' ').unwrap();
    (relative.parse().unwrap(), absolute.parse().unwrap())
}

fn freeze_input(model: &mut Model, name: &str, tensor: Tensor) {
    let main = model.main();
    let value = model.graph(main).inputs().find(|&v| model.value(v).name() == name).unwrap();
    model.bind_input(main, value, tensor);
}

fn tensors(folder: &Path, kind: &str) -> Vec<(String, Tensor)> {
    (0..)
        .map_while(|i| std::fs::read(folder.join("test_data_set_0").join(format!("{kind}_{i}.pb"))).ok())
        .map(|bytes| tensor(&bytes))
        .collect()
}

fn tensor(bytes: &[u8]) -> (String, Tensor) {
    let proto = TensorProto::decode(bytes).unwrap();
    (proto.name.clone().unwrap_or_default(), Tensor::from_proto(proto, None).unwrap())
}

/// Elements of a float type; which NaN it is, and the sign of zero, do not count.
fn floats(tensor: &Tensor) -> Option<Vec<f32>> {
    let small = tensor.dtype().format().filter(|format| !format.is_integer());
    let decode = |format: Format| {
        pack::unpack(&tensor.raw(), &format, tensor.len()).into_iter().map(|code| format.decode(code)).collect()
    };
    tensor.to_f32().or_else(|| small.map(decode))
}

/// Equality as ONNX's runner has it; floats of 16 bits are computed in 32, and are held to what they can tell apart.
#[allow(clippy::float_cmp, reason = "infinities are equal or they are not")]
fn same(got: &Tensor, want: &Tensor, (relative, absolute): (f32, f32)) -> Result<(), String> {
    if got.dims() != want.dims() {
        return Err(format!("has shape {:?} instead of {:?}", got.dims(), want.dims()));
    }
    let (Some(a), Some(b), true) = (floats(got), floats(want), got.dtype().bits() >= want.dtype().bits()) else {
        let equal = got.dtype() == want.dtype() && got.raw() == want.raw();
        return if equal { Ok(()) } else { Err(format!("is {got:?} instead of {want:?}").chars().take(300).collect()) };
    };
    let half = want.dtype().bits() == Some(16);
    let (relative, absolute) =
        if half { (relative.max(8e-3), absolute.max(1e-2)) } else { (relative, absolute.max(1e-5)) };
    for (at, (&a, &b)) in a.iter().zip(&b).enumerate() {
        let equal = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= absolute + relative * b.abs();
        if !equal {
            return Err(format!("is {a} instead of {b} at {at} of {:?}", want.dims()));
        }
    }
    Ok(())
}
