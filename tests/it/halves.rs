//! Models of 16-bit floats: what is quantized, in which types, and how close the result is to that of the float32 model.
#![cfg(feature = "tract")]

use amax::config::Config;
use amax::ir::{Model, Tensor, file, text};
use amax::onnx::DataType;
use amax::samples::SampleSet;
use amax::targets::Target;
use amax::{Compare, Convert, Rewrite};

use crate::support::{folder, noise, npy};

/// A table, a product with a bias behind it, one that is added to, a Gemm; the table and one weight have a reader more.
fn model(float: &str) -> Model {
    let code =
        [("float", 1), ("float16", 10), ("bfloat16", 16)].into_iter().find(|(name, _)| *name == float).unwrap().1;
    let text = format!(
        r#"<ir_version: 9, opset_import: ["": 18]>
        halves (float[N,32] x32) => ({float}[N,24] y, {float}[N,32] s)
        <{float}[32,32] table = ..., {float}[32,64] a = ..., {float}[64] ab = ..., {float}[64,32] b = ..., {float}[24,32] c = ..., {float}[24] cb = ...> {{
            [cast] x = Cast <to = {code}> (x32)
            [index] ids = ArgMax <axis = 1, keepdims = 0> (x)
            [rows] t = Gather (table, ids)
            [sum] x1 = Add (x, t)
            [first] a0 = MatMul (x1, a)
            [bias] a1 = Add (a0, ab)
            [act] a2 = Sigmoid (a1)
            [second] s = MatMul (a2, b)
            [third] y = Gemm <transB = 1> (s, c, cb)
        }}"#
    );
    let mut model = text::parse_with_fill(&text).unwrap();
    if float != "float" {
        // The numbers of the float32 model, rounded.
        let plain = self::model("float");
        for value in model.graph(model.main()).initializers().to_vec() {
            let own = plain.constant(plain.value_named(model.value(value).name()).unwrap()).unwrap();
            let values = own.to_f64().unwrap();
            let dtype = model.dtype(value).unwrap();
            model.set_constant(value, Tensor::from_f64(dtype, &own.dims(), values).unwrap());
        }
    }
    model
}

/// Signal to noise of each output against the float32 model.
fn quality(samples: &SampleSet, test: &Model) -> Vec<f64> {
    let rows = Compare::new(&model("float"), test).samples(samples).outputs().unwrap();
    rows.iter().map(|row| row.sqnr_db().unwrap()).collect()
}

#[test]
fn results_are_as_close_as_those_of_float32() {
    let folder = folder();
    std::fs::write(folder.path().join("x.npy"), npy(&[8, 1, 32], &noise(256))).unwrap();
    for (preset, half) in
        [("w4", true), ("w8", true), ("w4-kquant", true), ("8da4w", false), ("int8-dynamic", false), ("int8", false)]
    {
        for (target, float) in [("ort-cpu", "float16"), ("ort-cpu", "bfloat16"), ("generic", "bfloat16")] {
            let what = format!("{preset}, {target}, {float}");
            let config = Config::parse(&format!("preset = \"{preset}\"")).unwrap();
            let target = Target::load(target).unwrap();
            let rewritten = |float: &str| {
                let model = model(float);
                let samples = SampleSet::open(&folder.path().join("x.npy"), &model).unwrap();
                let given = (preset == "int8").then_some(&samples);
                let done =
                    Rewrite::new(&model).config(&config).target(&target).samples(given).measure(false).run().unwrap();
                (quality(&samples, &done.model), done)
            };
            let (least, plain) = rewritten("float");
            let (found, done) = rewritten(float);
            let own = done.plan.unwrap();
            assert_eq!(own.weights.len(), plain.plan.unwrap().weights.len(), "{what}");
            for (found, least) in found.iter().zip(least) {
                assert!(*found > least - 1.5, "{what}: {found} dB, {least} dB of float32");
            }
            let native = half && target.floats.contains(&own.weights[0].float);
            let dtype =
                if native && own.weights[0].float != DataType::Float { own.weights[0].float } else { DataType::Float };
            let scales = done.model.graph(done.model.main()).initializers().iter().filter(|&&v| {
                let name = done.model.value(v).name();
                name.ends_with("_scale") && !name.contains("token")
            });
            for &scale in scales {
                assert_eq!(done.model.dtype(scale), Some(dtype), "{what}: {}", done.model.value(scale).name());
            }
            assert_eq!(half && (float == "float16" || target.name == "generic"), !own.float32, "{what}");
            // Inputs and outputs are what callers know.
            let before = model(float);
            let types = |model: &Model| -> Vec<Option<DataType>> {
                let main = model.graph(model.main());
                main.inputs().chain(main.outputs()).map(|v| model.dtype(v)).collect()
            };
            assert_eq!(types(&done.model), types(&before), "{what}");
            let path = folder.path().join("out.onnx");
            file::save(&done.model, &path).unwrap();
            file::load(&path).unwrap();
        }
    }
}

#[test]
fn what_stays_float_is_stored_in_16_bits() {
    let folder = folder();
    std::fs::write(folder.path().join("x.npy"), npy(&[8, 1, 32], &noise(256))).unwrap();
    let plain = model("float");
    let samples = SampleSet::open(&folder.path().join("x.npy"), &plain).unwrap();
    let types = |model: &Model| -> Vec<Option<DataType>> {
        let main = model.graph(model.main());
        main.inputs().chain(main.outputs()).map(|v| model.dtype(v)).collect()
    };
    for (dtype, least) in [(DataType::Float16, 50.0), (DataType::Bfloat16, 30.0)] {
        let done = Convert::new(&plain).dtype(dtype).run().unwrap().model;
        assert_eq!(types(&done), types(&plain), "{dtype}");
        let main = done.graph(done.main());
        for &value in main.initializers().iter().filter(|&&v| done.dtype(v) != Some(DataType::Int64)) {
            assert_eq!(done.dtype(value), Some(dtype), "{}", done.value(value).name());
        }
        assert!(quality(&samples, &done).iter().all(|db| *db > least), "{dtype}: {:?}", quality(&samples, &done));
        file::save(&done, &folder.path().join("out.onnx")).unwrap();
        file::load(&folder.path().join("out.onnx")).unwrap();
    }
    // Four bits and the rest in 16, in one call.
    let config = Config::parse("preset = \"w4\"").unwrap();
    let done = Rewrite::new(&plain).config(&config).dtype(DataType::Float16).run().unwrap();
    let own = done.plan.unwrap();
    assert!(own.weights.len() == 4 && own.weights.iter().all(|weight| weight.float == DataType::Float16));
    assert_eq!(types(&done.model), types(&plain));
}

/// QuantizeLinear takes a weight and its scales in one type.
#[test]
fn fake_quantizers_have_the_type_of_their_scales() {
    for (float, preset) in [("float16", "w8"), ("float16", "8da4w"), ("bfloat16", "w8"), ("float", "w8")] {
        let config = amax::config::presets::load(preset).unwrap();
        let fake = Rewrite::new(&model(float)).config(&config).prepare().unwrap().model;
        let quantizers = fake.graph(fake.main()).nodes().iter().filter(|&&node| fake.node(node).is("QuantizeLinear"));
        let dtype = |node, index| fake.constant_input(node, index).map(Tensor::dtype);
        let types: Vec<_> = quantizers.filter_map(|&node| Some([dtype(node, 0)?, dtype(node, 1)?])).collect();
        assert!(
            types.len() >= 3 && types.iter().all(|[weight, scale]| weight == scale),
            "{float}, {preset}: {types:?}"
        );
    }
}
