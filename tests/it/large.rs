//! Models larger than memory: the scratch file, outputs that appear whole or not at all.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use amax::config::Config;
use amax::error::Kind;
use amax::ir::file::{self, External, SaveOptions};
use amax::ir::{LARGE_MODEL, Model, NewNode, Place, Scratch, Tensor, tensor_type};
use amax::onnx::{
    Bytes, DATA_LOCATION_EXTERNAL, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, ValueInfoProto,
};
use amax::quant::Block;
use amax::rewrite::{Rewrite, Rewritten};
use amax::targets::{self, Target};
use prost::Message;

use crate::support::{folder, names_in};

/// Noise from -1 to 1, of a generator that has nothing to do with amax.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (f64::from(state) / f64::from(u32::MAX) * 2.0 - 1.0) as f32
    };
    (0..len).map(step).collect()
}

/// `y = x·wᵀ·w·…`, for matrices of `width` × `width` floats, one of them behind a Transpose that is folded.
pub fn layers(count: usize, width: usize) -> Model {
    let mut model = Model::new("layers", 10, 21);
    let main = model.main();
    let mut at = model.add_input(main, "x", tensor_type(DataType::Float, Some(&[None, Some(width)])));
    for layer in 0..count {
        let values = noise(width * width, layer as u32 + 1);
        let w = Tensor::from_f32(&[width, width], &values);
        let mut w = model.add_initializer(main, &format!("w{layer}"), w);
        if layer == 0 {
            let turn = NewNode::new("Transpose", "turn", &[w], &["turned"]);
            let turn = model.insert(Place::Last(main), turn);
            w = model.node(turn).output(0).unwrap();
        }
        let node = NewNode::new("MatMul", format!("layer{layer}"), &[at, w], &[&format!("h{layer}")]);
        let node = model.insert(Place::Last(main), node);
        at = model.node(node).output(0).unwrap();
    }
    model.add_output(main, at);
    model
}

fn quantized(model: &Model, preset: &str, target: &str) -> amax::Result<Rewritten> {
    quantized_by(model, &Config::parse(&format!("preset = \"{preset}\"")).unwrap(), target)
}

fn quantized_by(model: &Model, config: &Config, target: &str) -> amax::Result<Rewritten> {
    let target = Target::load(target).unwrap();
    Rewrite::new(model).config(config).target(&target).measure(false).run()
}

#[test]
fn the_scratch_file_holds_large_tensors_and_has_no_name() {
    let folder = folder();
    let scratch = Scratch::beside(&folder.path().join("out.onnx"));
    let tensors: Vec<Vec<u8>> = (0..4).map(|i| vec![i; (1 << 20) + usize::from(i)]).collect();
    let held: Vec<Bytes> = tensors.iter().map(|t| scratch.keep(t.clone().into())).collect();
    for (held, tensor) in held.iter().zip(&tensors) {
        assert!(held[..] == tensor[..]);
        file::release(held);
        assert!(held[..] == tensor[..]);
    }
    let size = scratch.size();
    assert!(size >= 4 << 20);
    assert!(names_in(folder.path()).is_empty());
    let small = Bytes::from(vec![1; 1000]);
    assert_eq!(scratch.keep(small.clone()).as_ptr(), small.as_ptr());
    assert_eq!(scratch.keep(held[0].clone()).as_ptr(), held[0].as_ptr());
    assert_eq!(scratch.size(), size, "what is mapped already was kept again");
    scratch.check().unwrap();
    drop(scratch);
    assert!(held[3][..] == tensors[3][..], "a tensor outlives the scratch file");
}

#[test]
fn a_scratch_file_that_cannot_be_made_is_an_error_of_the_output() {
    let scratch = Scratch::beside(Path::new("/proc/self/fd/out.onnx"));
    let tensor = Bytes::from(vec![7; 1 << 20]);
    assert_eq!(scratch.keep(tensor.clone()), tensor);
    let error = scratch.check().unwrap_err();
    assert_eq!(error.kind(), Kind::Output);
    assert!(error.to_string().contains("out.onnx"), "{error}");

    let mut model = layers(2, 600);
    model.set_scratch(Scratch::beside(Path::new("/proc/self/fd/out.onnx")));
    let error = quantized(&model, "w4", targets::DEFAULT).unwrap_err();
    assert_eq!(error.kind(), Kind::Output, "{error}");
}

#[test]
fn only_large_models_have_a_scratch_file() {
    let mut model = layers(1, 8);
    model.spill_beside(Path::new("out.onnx"));
    assert!(model.scratch().is_none());
    let main = model.main();
    // Zeros that are never looked at take no memory.
    let zeros = vec![0u8; LARGE_MODEL as usize];
    model.add_initializer(main, "w", Tensor::new(DataType::Uint8, &[zeros.len()], zeros));
    model.spill_beside(Path::new("out.onnx"));
    assert!(model.scratch().is_some());
}

#[test]
fn the_scratch_file_changes_no_byte_of_the_result() {
    let folder = folder();
    let model = layers(3, 1536);
    let check = |text: &str, target: &str, least: u64| {
        let config = Config::parse(text).unwrap();
        let written = |model: &Model| quantized_by(model, &config, target).unwrap_or_else(|e| panic!("{text}: {e}"));
        let in_memory = written(&model);
        let mut spilled = model.clone();
        spilled.set_scratch(Scratch::beside(&folder.path().join("out.onnx")));
        let spilled = written(&spilled);
        assert!(spilled.model.scratch().unwrap().size() > least, "{text}: nothing was kept there");
        assert!(names_in(folder.path()).is_empty());
        assert!(file::to_bytes(&in_memory.model).unwrap() == file::to_bytes(&spilled.model).unwrap(), "{text}");
    };
    check("preset = \"w4\"", targets::DEFAULT, 3 << 20);
    check("preset = \"w8\"", "generic", 2 << 20);
    // Every block format, and other scales in groups, in each form.
    let weights =
        |keys: &str| format!("default.input.enable = false\ndefault.output.enable = false\n[default.weight]\n{keys}");
    for block in Block::ALL {
        check(&weights(&format!("dtype = \"{block}\"")), "generic", 3 << 20);
    }
    let groups = |keys: &str| weights(&format!("granularity = \"per-group\"\ngroup_size = 32\n{keys}"));
    let float_zeros = "dtype = \"uint4\"\nsymmetric = false\narithmetic = \"tinygemm\"\nform = \"matmulnbits\"";
    for (keys, target) in [
        ("dtype = \"int8\"\nsymmetric = true\nscale_dtype = \"float8e4m3fn\"", "generic"),
        ("dtype = \"uint8\"\nsymmetric = false\nscale_dtype = \"float16\"", "generic"),
        ("dtype = \"int4\"\nsymmetric = true\nform = \"matmulnbits\"", targets::DEFAULT),
        (float_zeros, targets::DEFAULT),
    ] {
        check(&groups(keys), target, 3 << 20);
    }
}

#[test]
fn what_is_being_written_has_no_name_and_can_be_given_up() {
    let folder = folder();
    let path = folder.path().join("out.onnx");
    let model = layers(2, 700);
    for external in [External::Never, External::Always] {
        let options = SaveOptions { external, ..SaveOptions::default() };
        let asked = Cell::new(0);
        let watch = || {
            asked.set(asked.get() + 1);
            #[cfg(target_os = "linux")]
            assert!(names_in(folder.path()).is_empty(), "a process that is killed now leaves a file");
            false
        };
        file::save_unless(&model, &path, &options, &watch).unwrap();
        let files = names_in(folder.path());
        assert_eq!(files.len(), if external == External::Always { 2 } else { 1 });
        for name in files {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
        for last in 1..asked.get() {
            let left = Cell::new(last);
            let watch = || {
                left.set(left.get() - 1);
                left.get() <= 0
            };
            let error = file::save_unless(&model, &path, &options, &watch).unwrap_err();
            assert_eq!(error.kind(), Kind::Interrupted, "{error}");
            assert!(names_in(folder.path()).is_empty());
        }
    }
}

#[test]
fn a_former_output_stays_when_writing_is_given_up() {
    let folder = folder();
    let path = folder.path().join("out.onnx");
    let options = SaveOptions { external: External::Always, ..SaveOptions::default() };
    file::save_with(&layers(1, 40), &path, &options).unwrap();
    let former = || {
        names_in(folder.path()).into_iter().map(|name| fs::read(folder.path().join(name)).unwrap()).collect::<Vec<_>>()
    };
    let before = former();
    file::save_unless(&layers(2, 50), &path, &options, &|| true).unwrap_err();
    assert!(former() == before);
    assert_eq!(names_in(folder.path()).len(), 2);
}

/// `amax` in a shell with a limit, in `folder`.
#[cfg(unix)]
fn limited(limit: &str, arguments: &[&str], folder: &Path) -> Output {
    let script = format!("{limit} && exec \"$0\" \"$@\"");
    let program = env!("CARGO_BIN_EXE_amax");
    Command::new("sh").args(["-c", &script, program]).args(arguments).current_dir(folder).output().unwrap()
}

#[test]
#[cfg(unix)]
fn a_file_that_grows_too_large_is_an_error_that_leaves_nothing() {
    let folder = folder();
    let model = layers(2, 700);
    file::save(&model, &folder.path().join("in.onnx")).unwrap();
    let before = names_in(folder.path());
    for extra in [&[][..], &["--external-data"]] {
        let arguments = [&["rewrite", "in.onnx", "out.onnx", "--preset", "w4", "--calib", "none"], extra].concat();
        let output = limited("ulimit -f 100", &arguments, folder.path());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(6), "{said}");
        assert!(said.contains("cannot write out.onnx") && said.contains("too large"), "{said}");
        assert_eq!(names_in(folder.path()), before);
        let output = limited("ulimit -f unlimited", &arguments, folder.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(names_in(folder.path()).len(), before.len() + 1 + extra.len());
        for name in names_in(folder.path()).difference(&before) {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
    }
}

/// A model of `count` weights of 32 MB, each behind a Transpose, all of which are the same bytes of one small file.
fn transposed_layers(count: usize, folder: &Path) {
    let name = |text: String| Some(text);
    let entry = |key: &str, value: &str| StringStringEntryProto { key: Some(key.into()), value: Some(value.into()) };
    let node = |op: &str, inputs: Vec<String>, output: String| NodeProto {
        op_type: Some(op.into()),
        input: inputs,
        name: name(format!("make_{output}")),
        output: vec![output],
        ..NodeProto::default()
    };
    let mut graph = GraphProto { name: Some("layers".into()), ..GraphProto::default() };
    for layer in 0..count {
        let dims = if layer % 2 == 0 { vec![4096, 2048] } else { vec![2048, 4096] };
        graph.initializer.push(TensorProto {
            name: name(format!("w{layer}")),
            data_type: Some(DataType::Float.code()),
            dims,
            data_location: Some(DATA_LOCATION_EXTERNAL),
            external_data: vec![entry("location", "shared.bin")],
            ..TensorProto::default()
        });
        graph.node.push(node("Transpose", vec![format!("w{layer}")], format!("t{layer}")));
        graph.node.push(node("MatMul", vec![format!("h{layer}"), format!("t{layer}")], format!("h{}", layer + 1)));
    }
    let port = |name: String, width: usize| ValueInfoProto {
        name: Some(name),
        r#type: Some(tensor_type(DataType::Float, Some(&[None, Some(width)]))),
        ..ValueInfoProto::default()
    };
    graph.input.push(port("h0".into(), 2048));
    graph.output.push(port(format!("h{count}"), if count.is_multiple_of(2) { 2048 } else { 4096 }));
    let model = ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(21) }],
        graph: Some(graph),
        ..ModelProto::default()
    };
    fs::write(folder.join("in.onnx"), model.encode_to_vec()).unwrap();
    fs::File::create(folder.join("shared.bin")).unwrap().set_len(32 << 20).unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_the_model() {
    let folder = folder();
    let rewritten = |count: usize| {
        transposed_layers(count, folder.path());
        let limit = format!("ulimit -d {} && export RAYON_NUM_THREADS=2", 450 << 10);
        limited(&limit, &["rewrite", "in.onnx", "out.onnx", "--preset", "w4", "--calib", "none"], folder.path())
    };
    // Too little to be large: what is folded stays in memory, for which the limit leaves no room.
    assert!(!rewritten(15).status.success(), "the limit does not hold");
    for name in names_in(folder.path()) {
        assert!(!name.starts_with("out"), "{name}");
    }
    let output = rewritten(20);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = names_in(folder.path());
    let data = names.iter().find(|name| name.starts_with("out.onnx.")).unwrap();
    let written = fs::metadata(folder.path().join(data)).unwrap().len();
    assert!((90 << 20..130 << 20).contains(&written), "{written}");
}
