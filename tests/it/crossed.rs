//! Features together that are tested alone elsewhere: results must not depend on the way to them.
#![cfg(feature = "tract")]

use std::path::Path;

use amax::config::Config;
use amax::ir::{Scratch, file};
use serde_json::Value;
use tempfile::TempDir;

use crate::large::layers;
use crate::support::{folder, names_in, root, succeed};

fn digits() -> TempDir {
    let folder = folder();
    for name in ["digits.onnx", "digits.calib.npz"] {
        std::fs::copy(root("models").join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

/// A plan that was written and read is carried out as if it had just been made, in every form, and what it makes converts back
/// to what computes the same.
#[test]
fn plans_from_documents_convert_as_others_do() {
    let folder = digits();
    let at = folder.path();
    let difference = |a: &str, b: &str| {
        let rows = succeed(at, &format!("compare {a} {b} --calib digits.calib.npz --json"));
        let rows: Value = serde_json::from_str(&rows).unwrap();
        rows[0]["max_abs_error"].as_f64().unwrap()
    };
    // A sum that is off by its last bit may be rounded to the next code at run time, so the numbers are those without samples.
    let dynamic = "--preset int8-dynamic --algorithm none";
    for (words, form, op) in
        [("--preset w4", "matmulnbits", "MatMulNBits"), (dynamic, "matmulinteger", "MatMulInteger")]
    {
        for (name, form) in [("plain", "qdq"), ("formed", form)] {
            let words = format!("{words} --form {form}");
            succeed(at, &format!("-q plan digits.onnx -o {name}.json {words}"));
            succeed(at, &format!("-q rewrite digits.onnx {name}.onnx --plan {name}.json"));
            succeed(at, &format!("-q rewrite digits.onnx direct.onnx {words} --no-guard"));
            assert!(read(at, &format!("{name}.onnx")) == read(at, "direct.onnx"), "{words}");
        }
        assert!(succeed(at, "inspect formed.onnx").contains(op), "{form}: no {op}");
        succeed(at, "-q convert formed.onnx back.onnx --form qdq");
        assert!(!succeed(at, "inspect back.onnx").contains(op), "{form}: {op} is left");
        assert!(difference("formed.onnx", "back.onnx") < 1e-5, "{form}");
        // What can be ranged at run time depends on the form; what weights alone become does not.
        assert_eq!(difference("plain.onnx", "back.onnx") == 0.0, form == "matmulnbits", "{form}");
    }
}

/// Tensors that lie in the scratch file become other forms as those in memory do.
#[test]
fn forms_of_large_models_are_those_of_small_ones() {
    let folder = folder();
    let model = layers(1, 1500);
    for (preset, form, op) in [("w4", "matmulnbits", "MatMulNBits"), ("int8-dynamic", "matmulinteger", "MatMulInteger")]
    {
        let mut config = Config::parse(&format!("preset = \"{preset}\"")).unwrap();
        config.set(&format!("default.weight.form={form}")).unwrap();
        let run = |model: &_| crate::pipeline::run(model, None, &config, "ort-cpu", 2).model;
        let in_memory = run(&model);
        let main = in_memory.graph(in_memory.main());
        assert!(main.nodes().iter().any(|&n| in_memory.node(n).op_type() == op), "{preset}: no {op}");
        let mut spilled = model.clone();
        spilled.set_scratch(Scratch::beside(&folder.path().join("out.onnx")));
        let spilled = run(&spilled);
        assert!(spilled.scratch().unwrap().size() > 1 << 20, "{preset}: nothing was kept there");
        assert!(names_in(folder.path()).is_empty());
        assert!(file::to_bytes(&in_memory).unwrap() == file::to_bytes(&spilled).unwrap(), "{preset}, {form}");
    }
}

/// Whatever runs on several threads (samples, observers, algorithms, the measuring of layers) gives the same bytes on any number.
#[test]
fn results_do_not_depend_on_threads() {
    let folder = digits();
    let at = folder.path();
    for words in [
        "--set guard.output_db=36",
        "--preset w4",
        "--preset w4-hqq",
        "--preset mxfp8 --target generic",
        "--preset a16w8 --set default.input.observer=mse",
        "--set default.input.observer=entropy --set default.output.observer=percentile --target tensorrt",
    ] {
        let made = [1, 2, 5].map(|threads| {
            succeed(at, &format!("-q rewrite digits.onnx out.onnx --report report.json --threads {threads} {words}"));
            let mut report: Value = serde_json::from_slice(&read(at, "report.json")).unwrap();
            report["seconds"].take();
            report.as_object_mut().unwrap().remove("weight_seconds");
            (read(at, "out.onnx"), report)
        });
        assert!(made[0] == made[1] && made[0] == made[2], "{words}");
    }
}
