//! Plans that were edited by hand: what does not fit the model or the target is refused, by its place.
#![cfg(feature = "tract")]

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::snapshot;
use crate::support::{amax, fail, folder, root, succeed};

/// Puts a value at a pointer; null takes away what is there.
fn edit(document: &mut Value, pointer: &str, value: &Value) {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match document.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}")) {
        Value::Object(fields) if value.is_null() => {
            fields.remove(key).unwrap_or_else(|| panic!("no {pointer}"));
        }
        Value::Object(fields) => {
            fields.insert(key.to_owned(), value.clone());
        }
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = value.clone(),
        other => panic!("{pointer} is in {other}"),
    }
}

#[test]
fn edited_plans_are_checked() {
    let block = json!({"per-group": {"axis": 1, "size": 32}});
    let token = |node: &str, input, eps| json!({"site": "", "at": {"node": node, "input": input}, "eps": eps});
    let cases = [
        ("/schema", json!(99)),
        ("/extra", json!(1)),
        ("/opset", json!(3)),
        ("/opset", json!(27)),
        ("/simulate", json!(true)),
        (
            "/activations/nowhere",
            json!({"quantizer": {"dtype": "uint8", "symmetric": false}, "mode": "static", "scale_of": "nowhere", "readers": "all", "why": {"code": "not-asked"}}),
        ),
        (
            "/activations/stem.weight",
            json!({"quantizer": {"dtype": "uint8", "symmetric": false}, "mode": "static", "scale_of": "stem.weight", "readers": "all", "why": {"code": "not-asked"}}),
        ),
        ("/activations/pool_out/scale_of", json!("nowhere")),
        ("/activations/pool_out/scale_of", json!("flatten_out")),
        ("/activations/pool_out/quantizer/dtype", json!("uint16")),
        ("/activations/pool_out/mode", json!("dynamic")),
        ("/activations/pool_out/converts", json!("nowhere")),
        ("/activations/pool_out/converts", json!("image")),
        ("/activations/pool_out/quantizer/symmetric", json!(true)),
        ("/activations/image/scale_of", json!("pool_out")),
        ("/activations/image/quantizer/granularity", json!({"per-group": {"axis": 1, "size": 32}})),
        ("/activations/image/quantizer/dtype", json!("float8e4m3fn")),
        ("/activations/image/quantizer/granularity", json!({"per-channel": {"axis": 0}})),
        ("/activations/image/quantizer/eps", json!(-1.0)),
        ("/activations/image/readers/listed/0/node", json!("nowhere")),
        ("/activations/image/readers/listed/0/input", json!(1)),
        ("/activations/image/readers/listed/0/input", json!(9)),
        ("/activations/image/range", json!([3.0, 1.0])),
        ("/weights/0/tensor", json!("stem.bias")),
        ("/weights/0/tensor", json!("image")),
        ("/weights/0/transpose", json!(true)),
        ("/weights/0/quantizer/granularity/per-channel/axis", json!(7)),
        ("/weights/0/quantizer/granularity", json!({"per-group": {"axis": 1, "size": 0}})),
        ("/weights/0/quantizer/dtype", json!("float8e5m2")),
        ("/weights/0/quantizer/scale_dtype", json!("float8e8m0")),
        ("/weights/0/at/input", json!(0)),
        ("/biases/0/weight", json!(9)),
        ("/biases/0/activation", json!("nowhere")),
        ("/biases/0/tensor", json!("wide.bias")),
        ("/sums", json!(["pool_out"])),
        ("/sums", json!(["image"])),
        ("/tokens", json!([token("nowhere", 0, 1.0)])),
        ("/tokens", json!([token("logits", 3, 1.0)])),
        ("/tokens", json!([token("logits", 0, 0.0)])),
        ("/tokens", json!([token("logits", 0, -1.0)])),
        ("/tokens", json!([token("logits", 0, 1e-40)])),
        ("/weights/4/quantizer/granularity", block),
        // What the target would compute wrongly: codes at another scale than they were made for, pairs that overflow 16 bits.
        (
            "/activations/pool_out",
            json!({"quantizer": {"dtype": "uint8", "symmetric": false}, "mode": "static", "scale_of": "pool_out", "readers": "all", "range": [0, 100], "why": {"code": "not-asked"}}),
        ),
        ("/weights/4/pair_safe", Value::Null),
    ];
    let folder = folder();
    let at = folder.path();
    for name in ["digits.onnx", "digits.calib.npz"] {
        std::fs::copy(root("models").join(name), at.join(name)).unwrap();
    }
    succeed(at, "-q plan digits.onnx -o plan.json");
    let plan: Value = serde_json::from_slice(&std::fs::read(at.join("plan.json")).unwrap()).unwrap();
    succeed(at, "-q rewrite digits.onnx out.onnx --plan plan.json");
    std::fs::remove_file(at.join("out.onnx")).unwrap();
    let mut out = String::new();
    for (pointer, value) in cases {
        let mut plan = plan.clone();
        edit(&mut plan, pointer, &value);
        std::fs::write(at.join("edited.json"), plan.to_string()).unwrap();
        let answer = amax(at, "-q rewrite digits.onnx out.onnx --plan edited.json");
        let said = String::from_utf8(answer.stderr).unwrap();
        let code = answer.status.code().unwrap();
        assert!(code != 0 && !at.join("out.onnx").exists(), "{pointer} = {value} was carried out");
        let read = !said.contains("in file edited.json");
        assert!(read || ["/schema", "/extra"].contains(&pointer), "{pointer} = {value} is no plan: {said}");
        writeln!(out, "{pointer} = {value}\n  -> {}\n  [exit {code}]\n", said.trim_end().replace('\n', "\n     "))
            .unwrap();
    }
    snapshot::check("data/plans/mistakes.txt", &out);
}

#[test]
fn plans_ask_for_what_they_need() {
    let folder = folder();
    let at = folder.path();
    for name in ["digits.onnx", "digits.calib.npz"] {
        std::fs::copy(root("models").join(name), at.join(name)).unwrap();
    }
    succeed(at, "-q plan digits.onnx -o plan.json");
    fail(at, "rewrite digits.onnx out.onnx --plan plan.json --calib none", 4, "\"average_out\"");
    fail(at, "rewrite digits.onnx out.onnx --plan plan.json --target tensorrt", 2, "made for target ort-cpu");
    succeed(at, "-q calibrate digits.onnx --planned --exclude classifier -o stats");
    fail(at, "rewrite digits.onnx out.onnx --stats stats", 4, "the statistics do not cover this tensor");
    // What a plan says is done, and what the guard thinks of it is said.
    let answer = amax(at, "rewrite digits.onnx out.onnx --plan plan.json --set guard.static_db=40");
    let said = String::from_utf8(answer.stderr).unwrap() + &String::from_utf8(answer.stdout).unwrap();
    assert!(answer.status.success() && said.contains("warning: as planned, although \"pointwise_norm_out\""), "{said}");
}
