//! Scales that come from other tools, and go from one model to another.

use std::path::PathBuf;

use amax::config::spec::{Dtype, Format, Share};
use amax::config::{Config, Numbers, Tensor, import};
use amax::ir::file;
use amax::plan::{Given, Knowledge, plan};
use amax::targets::Target;

use crate::pipeline::run;
use crate::support::{digits, root};

fn data(name: &str) -> PathBuf {
    root("tests/data/scales").join(name)
}

fn imported(name: &str) -> Config {
    let imported = import::load(&data(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    // What is written must be read as the same.
    Config::parse(&imported.to_toml().unwrap()).unwrap()
}

/// The numbers of calibration.json, read as plain JSON.
fn ranges() -> Vec<(String, f32, f32)> {
    let text = std::fs::read_to_string(data("calibration.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let end = |at: &serde_json::Value, key: &str| at[key]["data"][0].as_f64().unwrap() as f32;
    let tensors = json["data"].as_object().unwrap();
    tensors.iter().map(|(name, at)| (name.clone(), end(at, "lowest"), end(at, "highest"))).collect()
}

#[test]
fn tables_of_other_tools_are_read_exactly() {
    let ranges = ranges();
    assert!(ranges.len() > 10);
    let json = imported("calibration.json");
    let cache = imported("calibration.cache");
    let trt = imported("digits.trt.cache");
    for (name, low, high) in &ranges {
        assert_eq!(json.tensor[name].range, Some([*low, *high]), "{name}");
        let largest = low.max(*high).abs();
        assert_eq!(cache.tensor[name].range, Some([-largest, largest]), "{name}");
        let scale = (f64::from(-low).max(f64::from(*high)) / 127.0) as f32;
        assert_eq!(trt.tensor[name].scale, Some(Numbers::One(scale)), "{name}");
        assert_eq!(
            (trt.tensor[name].dtype, trt.tensor[name].symmetric),
            (Some(Dtype::Element(Format::Int8)), Some(true))
        );
    }
    assert_eq!([json.tensor.len(), cache.tensor.len(), trt.tensor.len()], [ranges.len(); 3]);
}

#[test]
fn the_versions_of_encodings_say_the_same() {
    let [old, new, newest] = ["0.6.1", "1.0.0", "2.0.0"].map(|v| imported(&format!("digits.{v}.encodings.json")));
    for (name, low, high) in &ranges() {
        let bits = if name == "logits" { 16 } else { 8 };
        let (low, high) = (f64::from(*low).min(0.0), f64::from(*high).max(0.0));
        let scale = ((high - low) / f64::from((1 << bits) - 1)) as f32;
        let zero = (-low / f64::from(scale)).round_ties_even() as i32;
        let dtype = if bits == 16 { Dtype::Element(Format::Uint16) } else { Dtype::Element(Format::Uint8) };
        let expected = Tensor {
            optional: true,
            dtype: Some(dtype),
            symmetric: Some(false),
            scale: Some(Numbers::One(scale)),
            zero_point: Some(Numbers::One(zero)),
            ..Tensor::default()
        };
        assert_eq!(old.tensor[name], expected, "{name}");
    }
    let weight = &old.tensor["some.weight"];
    assert_eq!(weight.scale, Some(Numbers::Many(vec![0.01, 0.0125, 0.02])));
    assert_eq!((weight.granularity, weight.symmetric), (Some(Share::PerChannel), Some(true)));
    assert_eq!(old.tensor["kept"].enable, Some(false));
    assert!(old.tensor == new.tensor);
    // The newest one names the axis.
    let mut newest = newest;
    assert_eq!(newest.tensor["some.weight"].ch_axis, Some(0));
    newest.tensor.get_mut("some.weight").unwrap().ch_axis = None;
    assert!(old.tensor == newest.tensor);
}

/// What is said of a tensor has the last word at all of its sites, and no samples are needed for it.
#[test]
fn imported_scales_are_those_of_the_plan() {
    let prepared = crate::plan::ready(digits().0);
    let planned = |config: &Config| {
        let target = Target::load("ort-cpu").unwrap();
        plan(&prepared, config, &target, &Knowledge { calibrated: false, ..Knowledge::default() }).unwrap()
    };
    let encodings = imported("digits.1.0.0.encodings.json");
    let found = planned(&encodings);
    assert!(found.activations.len() >= 8, "{:?}", found.activations.keys());
    for (name, activation) in &found.activations {
        let asked = &encodings.tensor[activation.tensor.as_ref().unwrap_or(name)];
        let (Some(Numbers::One(scale)), Some(Numbers::One(zero))) = (&asked.scale, &asked.zero_point) else { panic!() };
        let group = &found.activations[&activation.scale_of];
        let expected = Given::Scales { scales: vec![*scale], zero_points: vec![*zero] };
        assert!(group.quantizer.given.is_some());
        if activation.scale_of == *name {
            assert_eq!(activation.quantizer.given, Some(expected), "{name}");
        }
        assert_eq!(Some(Dtype::from(activation.quantizer.dtype)), asked.dtype, "{name}");
    }
    let overrides = imported("overrides.json");
    let found = planned(&overrides);
    let stem = found.weights.iter().find(|w| w.tensor == "stem.weight").unwrap();
    let Some(Given::Scales { scales, .. }) = &stem.quantizer.given else { panic!("{stem:?}") };
    assert_eq!((scales.len(), scales[0], scales[1]), (16, 0.01, 0.02));
}

/// The scales of a finished model make the same model again, without a sample.
#[test]
fn scales_go_from_model_to_model() {
    let (model, samples) = digits();
    for (text, target, skipped) in [
        ("guard.enabled = false", "ort-cpu", 0),
        ("guard.enabled = false", "ort-cpu-vnni", 0),
        ("guard.enabled = false", "tensorrt", 0),
        ("guard.enabled = false\npreset = \"a16w8\"", "ort-cpu", 0),
        (
            "guard.enabled = false\n[op_type.Gemm]\nweight = { dtype = \"int4\", granularity = \"per-group\", group_size = 16 }",
            "ort-cpu",
            1,
        ),
    ] {
        // Biases that samples correct are no scales.
        let config = Config::parse(&format!("algorithm = \"none\"\n{text}")).unwrap();
        let first = run(&model, Some(&samples), &config, target, 2).model;
        let found = amax::scales::scales(&first);
        assert_eq!(found.skipped.len(), skipped, "{:?}", found.skipped);
        if skipped > 0 {
            continue;
        }
        let json = serde_json::to_string(&found.config).unwrap();
        let mut again = Config::parse(&json).unwrap();
        again.guard = config.guard;
        let second = run(&model, None, &again, target, 2).model;
        let twice = amax::scales::scales(&second);
        assert_eq!(found, twice, "{text}");
        let [first, second] = [first, second].map(|m| file::to_bytes(&m).unwrap());
        // Pairs that could saturate are moved to the nearest codes at a given scale, not to those of the search for one.
        assert!(first == second || target == "ort-cpu" && first.len() == second.len(), "{text}, {target}: other bytes");
    }
}

#[test]
fn mistakes_in_tables_are_named() {
    let cases = [
        "TRT-8601-EntropyCalibration2\nx 3c010a14\n",
        "TRT-8601-EntropyCalibration2\nx: 3c010a1g\n",
        "TRT-8601-EntropyCalibration2\nx: bc010a14\n",
        "TRT-8601-EntropyCalibration2\nx: 3c010a14\nx: 3c010a14\n",
        "x 1.0\ny inf\n",
        "{\"activation_encodings\": {\"x\": [{\"bitwidth\": 7, \"scale\": 0.1, \"offset\": 0}]}}",
        "{\"activation_encodings\": {\"x\": [{\"bitwidth\": 8, \"scale\": 0.1, \"offset\": 3}]}}",
        "{\"activation_encodings\": {\"x\": [{\"bitwidth\": 8, \"scale\": 0.0, \"offset\": -3}]}}",
        "{\"activation_encodings\": {\"x\": [{\"bitwidth\": 8, \"scales\": 0.1}]}}",
        "{\"activation_encodings\": {\"x\": []}}",
        "{\"version\": \"1.0.0\", \"activation_encodings\": [{\"enc_type\": \"PER_TENSOR\"}]}",
        "{\"x\": [{\"quant_type\": \"QInt9\"}]}",
        "{\"x\": [{\"quant_type\": \"QInt8\", \"convert\": {\"quant_type\": \"QUInt16\"}}]}",
        "{\"x\": [{\"rmin\": 0.0}]}",
        "{\"x\": {\"lowest\": {\"data\": [0.0, 1.0]}, \"highest\": 2.0, \"CLS\": \"TensorData\"}}",
        "{\"hello\": 1}",
        "hello",
    ];
    let mut out = String::new();
    for text in cases {
        let error = import::convert(text).expect_err(text);
        out.push_str(&format!("{text}\n  -> {}\n\n", error.to_string().replace('\n', "\n     ")));
    }
    crate::snapshot::check("data/scales/mistakes.txt", &out);
}
