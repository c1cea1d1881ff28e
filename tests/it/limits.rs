//! Limits and refusals through the program: each key reaches what it limits, exactly as it was set, and what must not happen
//! is refused.
#![cfg(feature = "tract")]

use std::collections::BTreeSet;
use std::path::Path;

use amax::statistics::Statistics;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{fail, noise, npy, parsed, root, succeed};

/// Decibels between a limit and a quality that keeps it, or misses it.
const NEAR: f64 = 0.02;

/// A folder with the digits model and a product whose input has outliers in single samples.
fn folder() -> TempDir {
    let folder = crate::support::folder();
    for name in ["digits.onnx", "digits.calib.npz"] {
        std::fs::copy(root("models").join(name), folder.path().join(name)).unwrap();
    }
    let text = std::fs::read_to_string(root("tests/cli/models/mlp.onnxtxt")).unwrap();
    let mlp = amax::ir::text::parse_with_fill(&text).unwrap();
    amax::ir::file::save(&mlp, &folder.path().join("mlp.onnx")).unwrap();
    // Samples 16 and 17 dwarf the others, so that one range for all keeps little of them, and a range for each keeps all.
    let mut values = noise(320);
    values[256..288].iter_mut().for_each(|v| *v *= 50.0);
    std::fs::write(folder.path().join("mlp.calib.npy"), npy(&[20, 1, 16], &values)).unwrap();
    folder
}

/// The report of a rewrite with these words.
fn report(folder: &Path, words: &str) -> Value {
    succeed(folder, &format!("-q rewrite {words} --report report.json"));
    serde_json::from_slice(&std::fs::read(folder.join("report.json")).unwrap()).unwrap()
}

/// The row of a list whose `key` is `name`.
fn row<'a>(list: &'a Value, key: &str, name: &str) -> Option<&'a Value> {
    list.as_array().unwrap().iter().find(|row| row[key] == name)
}

/// A limit just below a quality lets it pass, one just above does not.
fn exact(folder: &Path, words: &str, key: &str, quality: f64, passes: impl Fn(&Value) -> bool) {
    for (limit, expected) in [(quality - NEAR, true), (quality + NEAR, false)] {
        let found = report(folder, &format!("{words} --set guard.{key}={limit}"));
        assert_eq!(passes(&found), expected, "guard.{key} = {limit}, {words}");
    }
}

#[test]
fn limits_hold_as_they_were_set() {
    let folder = folder();
    let at = folder.path();
    let digits = "digits.onnx out.onnx";
    let plain = report(at, digits);
    for name in ["pointwise_norm_out", "image", "residual_relu_out"] {
        let quality = row(&plain["activations"], "tensor", name).unwrap()["sqnr_db"].as_f64().unwrap();
        let kept = |found: &Value| found["guarded"].get(name).is_none();
        exact(at, digits, "static_db", quality, kept);
        let off = report(at, &format!("{digits} --no-guard --set guard.static_db={}", quality + NEAR));
        assert!(kept(&off) && row(&off["activations"], "tensor", name).is_some(), "--no-guard");
    }
    for name in ["wide.weight", "classifier.weight"] {
        let quality = row(&plain["weights"], "site", name).unwrap()["sqnr_db"].as_f64().unwrap();
        exact(at, digits, "weight_db", quality, |found| row(&found["weights"], "site", name).is_some());
    }
    let quality = plain["quality"][0]["sqnr_db"].as_f64().unwrap();
    exact(at, digits, "output_db", quality, |found| found["weights"].as_array().unwrap().len() == 5);
}

/// A tensor that one range serves badly gets a range of its own in each sample where that is good enough, else it stays float.
#[test]
fn the_limit_of_ranges_found_at_run_time_holds_as_it_was_set() {
    let folder = folder();
    let at = folder.path();
    succeed(at, "-q calibrate mlp.onnx --calib mlp.calib.npy -o stats");
    let statistics = Statistics::load(at.join("stats")).unwrap();
    let quality = statistics.sites["x"].dynamic_sqnr_db();
    let words = "mlp.onnx out.onnx --stats stats --set guard.output_db=-inf";
    let row_of_x = |found: &Value| row(&found["activations"], "tensor", "x").cloned();
    let one = row_of_x(&report(at, &format!("{words} --no-guard"))).unwrap()["sqnr_db"].as_f64().unwrap();
    assert!(one + 5.0 < quality, "one range: {one} dB, one for each sample: {quality} dB");
    let words = format!("{words} --set guard.static_db={}", one + NEAR);
    exact(at, &words, "dynamic_db", quality, |found| row_of_x(found).is_some_and(|x| x["mode"] == "dynamic"));
}

/// Where every tensor is good and the output is not, the layers that cost the most go back until it is.
#[test]
fn outputs_are_held_to_their_limit() {
    let folder = folder();
    let at = folder.path();
    let quality = |found: &Value| found["quality"][0]["sqnr_db"].as_f64().unwrap();
    let plain = quality(&report(at, "digits.onnx out.onnx"));
    let mut layers = 5;
    for more in [1.0, 14.0] {
        let limit = plain + more;
        let found = report(at, &format!("digits.onnx out.onnx --set guard.output_db={limit}"));
        let left = found["weights"].as_array().unwrap().len();
        assert!(left < layers, "{limit} dB: {left} layers of {layers}");
        assert!(left == 0 || quality(&found) >= limit, "{limit} dB: {:?}", found["quality"]);
        // Every layer that went is named, with what it costs.
        let guarded = found["guarded"].as_object().unwrap();
        assert_eq!(guarded.keys().filter(|site| site.ends_with(".weight")).count(), 5 - left, "{limit} dB");
        layers = left;
    }
    // The one that costs the most alone goes first.
    let found = report(at, &format!("digits.onnx out.onnx --set guard.output_db={}", plain + 1.0));
    assert!(found["guarded"].get("pointwise.weight").is_some(), "{}", found["guarded"]);
    // Without measuring there is nothing to hold.
    let found = report(at, "digits.onnx out.onnx --no-guard --set guard.output_db=90");
    assert_eq!(found["weights"].as_array().unwrap().len(), 5);
}

/// The scale of a tensor with these words.
fn scale(folder: &Path, words: &str, tensor: &str) -> f64 {
    let found = report(folder, &format!("{words} --no-guard"));
    row(&found["activations"], "tensor", tensor).unwrap()["scale"].as_f64().unwrap()
}

/// What an observer's key says reaches the range: less of a percentile is narrower, a higher power keeps more of the tails.
#[test]
fn keys_of_observers_reach_the_ranges() {
    let folder = folder();
    let at = folder.path();
    let check = |observer: &str, key: &str, values: &[f64]| {
        let slot = |slot: &str, value: f64| {
            format!("--set default.{slot}.observer={observer} --set default.{slot}.{key}={value}")
        };
        let words = |value: f64| format!("digits.onnx out.onnx {} {}", slot("input", value), slot("output", value));
        let scales: Vec<f64> = values.iter().map(|&value| scale(at, &words(value), "pool_out")).collect();
        assert!(scales.is_sorted_by(|a, b| a < b), "{observer}, {key} = {values:?}: {scales:?}");
    };
    check("percentile", "percentile", &[90.0, 98.0, 99.5, 100.0]);
    check("mse", "mse_p", &[1.0, 1.2, 1.8]);
    let of = |observer: &str| {
        let words = format!("--set default.input.observer={observer} --set default.output.observer={observer}");
        scale(at, &format!("digits.onnx out.onnx {words}"), "pool_out")
    };
    let found: BTreeSet<String> =
        ["minmax", "mean", "percentile", "mse", "entropy"].map(|observer| of(observer).to_string()).into();
    assert_eq!(found.len(), 5, "two observers find one range: {found:?}");
}

/// A plan that names an observer without its key has the default that a configuration has.
#[test]
fn plans_and_configurations_have_the_same_defaults() {
    let folder = folder();
    let at = folder.path();
    for (observer, key) in [("percentile", "percentile"), ("mse", "mse_p")] {
        let words =
            format!("--set default.input.observer={observer} --set default.output.observer={observer} --no-guard");
        succeed(at, &format!("-q rewrite digits.onnx wanted.onnx {words}"));
        succeed(at, &format!("-q plan digits.onnx -o plan.json {words}"));
        let mut plan: Value = serde_json::from_slice(&std::fs::read(at.join("plan.json")).unwrap()).unwrap();
        let mut observed = 0;
        for activation in plan["activations"].as_object_mut().unwrap().values_mut() {
            let quantizer = activation["quantizer"].as_object_mut().unwrap();
            observed += usize::from(quantizer.get("observer").is_some_and(|o| o == observer));
            quantizer.remove(key);
        }
        assert!(observed > 5, "{observed} with {observer}");
        std::fs::write(at.join("plan.json"), plan.to_string()).unwrap();
        succeed(at, "-q rewrite digits.onnx out.onnx --plan plan.json --no-guard");
        assert!(std::fs::read(at.join("out.onnx")).unwrap() == std::fs::read(at.join("wanted.onnx")).unwrap(), "{key}");
    }
}

/// A result that its target would compute wrongly is not written, unless the input was wrong already.
#[test]
fn what_a_target_would_compute_wrongly_is_not_written() {
    let folder = folder();
    let at = folder.path();
    succeed(at, "-q plan digits.onnx -o plan.json");
    let mut plan: Value = serde_json::from_slice(&std::fs::read(at.join("plan.json")).unwrap()).unwrap();
    let mut safe = 0;
    for weight in plan["weights"].as_array_mut().unwrap() {
        safe += usize::from(weight.as_object_mut().unwrap().remove("pair_safe").is_some());
    }
    assert_eq!(safe, 4);
    std::fs::write(at.join("unsafe.json"), plan.to_string()).unwrap();
    fail(at, "rewrite digits.onnx out.onnx --plan unsafe.json", 2, "ort-cpu would run the result of this plan wrongly");
    assert!(!at.join("out.onnx").exists());

    // For another target that is right, and what it wrote is not ours to refuse.
    succeed(at, "-q rewrite digits.onnx fast.onnx --target ort-cpu-vnni");
    succeed(at, "-q rewrite fast.onnx out.onnx --calib none --target ort-cpu");
}

/// Sums of pairs stay within 16 bits for the target that adds so, and only for that.
#[test]
fn pairs_are_safe_where_they_are_added_in_16_bits() {
    let folder = folder();
    let at = folder.path();
    for (target, expected) in [("ort-cpu", 4), ("ort-cpu-vnni", 0), ("tensorrt", 0)] {
        let found = report(at, &format!("digits.onnx out.onnx --target {target}"));
        let weights = found["weights"].as_array().unwrap();
        let safe = weights.iter().filter(|w| w["pair_safe"] == true);
        assert_eq!(safe.count(), expected, "{target}");
        let model = amax::ir::file::load(&at.join("out.onnx")).unwrap();
        let strict = amax::targets::Target::load("ort-cpu").unwrap();
        let saturates = amax::targets::check::violations(&model, &strict).iter().any(|v| v.contains("saturate"));
        // With free codes some pair of digits' weights does overflow.
        assert_eq!(saturates, expected == 0 && target != "tensorrt", "{target}");
    }
}

/// A symmetric quantizer does not clip below zero, so a Relu in front of it is not one with it.
#[test]
fn a_relu_vanishes_only_into_a_quantizer_that_clips() {
    let text = r#"<ir_version: 8, opset_import: ["" : 17]>
net (float[1,1,4,4] x) => (float[1,1,2,2] y) <float[1,1,2,2] w = {1, -2, 3, -4}, float[1,1,2,2] v = {1, 2, 3, -4}> {
  [first] c = Conv (x, w)
  [relu] r = Relu (c)
  [second] y = Conv (r, v)
}"#;
    let model = parsed(text);
    let folder = crate::support::folder();
    let at = folder.path();
    amax::ir::file::save(&model, &at.join("net.onnx")).unwrap();
    let check = |words: &str, expected: [&str; 2]| {
        let words = format!("plan net.onnx --json {words}");
        let plan: Value = serde_json::from_str(&succeed(at, &words)).unwrap();
        let of_first = |name: &&str| plan["activations"].get(*name).is_some();
        let found: Vec<&str> = ["c", "r"].into_iter().filter(of_first).collect();
        assert_eq!(found, expected.into_iter().filter(|e| !e.is_empty()).collect::<Vec<_>>(), "{words}");
    };
    check("", ["", "r"]);
    check("--set default.output.dtype=int8", ["", "r"]);
    check("--set default.output.symmetric=true", ["c", "r"]);
    check("--set default.output.dtype=int8 --set default.output.symmetric=true", ["c", "r"]);
}

/// Where the error does not come from layers with weights, these are not thrown away for it.
#[test]
fn a_limit_that_no_choice_reaches_leaves_everything_quantized() {
    let folder = crate::support::folder();
    let at = folder.path();
    let text = "<ir_version: 8, opset_import: [\"\" : 17]>
        g (float[16, 16] x) => (float[16, 16] y) <float[16, 16] w = ...> { a = MatMul (x, w) s = Softmax (a) y = MatMul (s, a) }";
    amax::ir::file::save(&amax::ir::text::parse_with_fill(text).unwrap(), &at.join("m.onnx")).unwrap();
    std::fs::write(at.join("m.calib.npy"), npy(&[16, 16, 16], &noise(4096))).unwrap();
    let words = "m.onnx out.onnx --calib m.calib.npy --target tensorrt --set guard.output_db=";
    let (easy, hard) = (report(at, &format!("{words}1")), report(at, &format!("{words}200")));
    let said = |found: &Value| {
        found["warnings"].as_array().unwrap().iter().any(|w| w.as_str().unwrap().starts_with("no choice of layers"))
    };
    for (found, told) in [(&easy, false), (&hard, true)] {
        assert_eq!(found["weights"].as_array().unwrap().len(), 1, "{found}");
        assert_eq!(found["activations"].as_array().unwrap().len(), 3, "{found}");
        assert_eq!(said(found), told, "{}", found["warnings"]);
    }
    assert_eq!(easy["quality"], hard["quality"]);
}
