//! The whole line on the digits model: library and program, twice and on several threads.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use amax::compare::Compare;
use amax::config::Config;
use amax::ir::{Def, Model, file, verify};
use amax::onnx::DataType;
use amax::quant::algorithm::{Algorithm, Method};
use amax::reason::Reason;
use amax::report::Report;
use amax::rewrite::{Rewrite, Rewritten, split};
use amax::samples::SampleSet;
use amax::targets::{self, Target};
use ndarray::Array2;
use tempfile::TempDir;

use crate::support::{digits, folder, parsed, root, succeed};

pub fn run(model: &Model, samples: Option<&SampleSet>, config: &Config, target: &str, threads: usize) -> Rewritten {
    let target = Target::load(target).unwrap();
    let rewrite = Rewrite::new(model).config(config).target(&target).samples(samples).threads(threads);
    rewrite.run().unwrap_or_else(|e| panic!("{e}"))
}

fn saved(model: &Model) -> (TempDir, PathBuf, Vec<u8>) {
    let folder = folder();
    let path = folder.path().join("out.onnx");
    file::save(model, &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (folder, path, bytes)
}

/// Element types of the main graph's initializers that some node of `op` reads as its input `index`.
fn types(model: &Model, op: &str, index: usize) -> Vec<DataType> {
    let graph = model.graph(model.main());
    let nodes = graph.nodes().iter().filter(|&&n| model.node(n).op_type() == op);
    let read = nodes.filter_map(|&n| model.constant((*model.node(n).inputs().get(index)?)?));
    read.map(amax::ir::Tensor::dtype).collect()
}

fn stable(report: &Report) -> serde_json::Value {
    let mut value = serde_json::to_value(report).unwrap();
    value["seconds"].take();
    value.as_object_mut().unwrap().remove("weight_seconds");
    value
}

#[test]
fn digits_become_integers() {
    let (model, samples) = digits();
    let done = run(&model, Some(&samples), &Config::default(), targets::DEFAULT, 2);
    let report = &done.report;
    let counts: BTreeMap<&str, (usize, usize)> = report.operators.iter().map(|(o, c)| (o.as_str(), *c)).collect();
    assert_eq!(counts["Conv"], (4, 4));
    assert_eq!(counts["Gemm"], (1, 1));
    assert_eq!(report.weights.len(), 5);
    assert_eq!(report.sample_counts, (56, 8));
    assert!(report.weights.iter().all(|w| w.dtype == "int8" && w.sqnr_db > 30.0), "{:?}", report.weights);
    for a in &report.activations {
        let (low, high) = a.range.unwrap();
        assert!(low < high && a.scale.unwrap() > 0.0, "{a:?}");
        // A range of 255 steps holds what was seen, but for the half step that rounding takes.
        assert!(a.scale.unwrap() * 255.5 >= high - low, "{a:?}");
        assert!((0..=255).contains(&a.zero_point.unwrap()), "{a:?}");
        assert!(a.sqnr_db.unwrap() > 28.0, "{a:?}");
    }
    let [quality] = report.quality.as_slice() else { panic!("{:?}", report.quality) };
    assert_eq!(quality.output, "logits");
    let floats = quality.floats.as_ref().unwrap();
    assert!(floats.sqnr_db > 25.0 && floats.cosine > 0.999 && floats.max_abs_error < 1.0, "{quality:?}");
    assert!(report.warnings.is_empty() && !done.stopped);

    // No weight is left in float: what convolutions read comes from int8 codes and int32 biases.
    assert!(types(&done.model, "Conv", 1).is_empty() && types(&done.model, "Conv", 2).is_empty());
    let codes = types(&done.model, "DequantizeLinear", 0);
    assert_eq!(codes.iter().filter(|t| **t == DataType::Int8).count(), 5);
    assert_eq!(codes.iter().filter(|t| **t == DataType::Int32).count(), 5);
    assert_eq!(codes.len(), 10);
    let graph = done.model.graph(done.model.main());
    let largest = graph.initializers().iter().filter_map(|&v| match done.model.value(v).def() {
        Def::Constant(t) if t.dtype() == DataType::Float => Some(t.dims().iter().product::<usize>()),
        _ => None,
    });
    assert!(largest.max().unwrap() <= 32, "a float constant is larger than one scale a channel");

    let (_folder, path, bytes) = saved(&done.model);
    assert!(bytes.len() < 15_000, "{} bytes of 25296", bytes.len());
    let back = file::load(&path).unwrap();
    verify::verify(&back).unwrap();
    let metadata: BTreeMap<_, _> = back
        .header()
        .metadata_props
        .iter()
        .map(|p| (p.key.clone().unwrap_or_default(), p.value.clone().unwrap_or_default()))
        .collect();
    assert_eq!(metadata["amax.target"], targets::DEFAULT);
    assert_eq!(metadata["amax.version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn the_same_bytes_on_any_thread_count_and_every_time() {
    let (model, samples) = digits();
    let config = Config::default();
    let first = run(&model, Some(&samples), &config, targets::DEFAULT, 1);
    let (_folder, _, bytes) = saved(&first.model);
    for threads in [1, 2, 7] {
        let again = run(&model, Some(&samples), &config, targets::DEFAULT, threads);
        assert_eq!(saved(&again.model).2, bytes, "{threads} threads");
        assert_eq!(stable(&again.report), stable(&first.report), "{threads} threads");
    }
    let folder = folder();
    let model = root("models/digits.onnx");
    for threads in ["1", "2"] {
        succeed(folder.path(), &format!("-q rewrite --threads {threads} {} {threads}", model.display()));
        let written = std::fs::read(folder.path().join(threads)).unwrap();
        assert_eq!(written, bytes, "the program on {threads} threads");
    }
}

/// What the report says of quality is what `compare` finds between the two files.
#[test]
fn reported_quality_is_what_compare_finds() {
    let (model, samples) = digits();
    let done = run(&model, Some(&samples), &Config::default(), targets::DEFAULT, 2);
    let held_out = split(&samples).1;
    let found = Compare::new(&model, &done.model).samples(&samples).indices(held_out.as_slice()).outputs().unwrap();
    let reported = done.report.quality[0].sqnr_db().unwrap();
    // The report compares with the prepared model, in which batch normalizations are fused.
    assert!((found[0].sqnr_db().unwrap() - reported).abs() < 0.01, "{} and {reported}", found[0].sqnr_db().unwrap());
}

/// One sample in eight measures the result, or fewer of many; too few to hold any out do both.
#[test]
fn the_result_is_measured_on_samples_of_its_own() {
    let model = parsed("<ir_version: 8, opset_import: [\"\" : 17]> g (float[2] x) => (float[2] y) { y = Relu (x) }");
    let check = |count: usize, expected: &[usize]| {
        let rows = Array2::<f32>::zeros((count, 2));
        let (used, held_out) = split(&SampleSet::from_arrays(&model, [("x", rows.into())]).unwrap());
        assert_eq!(held_out, expected, "of {count}");
        let rest = |i: &usize| count < 8 || !expected.contains(i);
        assert_eq!(used, (0..count).filter(rest).collect::<Vec<_>>(), "of {count}");
    };
    check(1, &[0]);
    check(7, &[0, 1, 2, 3, 4, 5, 6]);
    check(8, &[7]);
    check(24, &[7, 15, 23]);
    check(64, &[7, 15, 23, 31, 39, 47, 55, 63]);
    check(130, &[15, 31, 47, 63, 79, 95, 111, 127]);
}

#[test]
fn with_everything_excluded_the_float_model_is_left() {
    let (model, samples) = digits();
    for target in targets::names() {
        let config = Config::parse("exclude = [\"*\"]").unwrap();
        let done = run(&model, Some(&samples), &config, target, 2);
        assert!(done.report.weights.is_empty() && done.report.activations.is_empty(), "{target}");
        assert!(done.report.operators.is_empty(), "{target}: {:?}", done.report.operators);
        assert!(done.report.warnings.iter().any(|w| w.starts_with("nothing was quantized")), "{target}");
        assert!(types(&done.model, "QuantizeLinear", 1).is_empty(), "{target}");
        let found = Compare::new(&model, &done.model).samples(&samples).outputs().unwrap();
        // Only fused batch normalizations round differently.
        assert!(found[0].sqnr_db().unwrap() > 110.0, "{target}: {}", found[0].sqnr_db().unwrap());
    }
}

#[test]
fn without_samples_weights_alone_are_quantized() {
    let (model, samples) = digits();
    let done = run(&model, None, &Config::default(), targets::DEFAULT, 2);
    assert!(done.report.activations.is_empty() && done.report.quality.is_empty() && done.report.samples.is_none());
    assert_eq!(done.report.weights.len(), 5);
    assert!(types(&done.model, "QuantizeLinear", 1).is_empty());
    let indices: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7];
    let found = Compare::new(&model, &done.model).samples(&samples).indices(indices).outputs().unwrap();
    assert!(found[0].sqnr_db().unwrap() > 30.0, "{}", found[0].sqnr_db().unwrap());
    assert!(saved(&done.model).2.len() < 12_000);
}

#[test]
fn every_target_gives_a_model_that_loads_and_is_close() {
    let (model, samples) = digits();
    for target in targets::names() {
        let done = run(&model, Some(&samples), &Config::default(), target, 2);
        let (_folder, path, _) = saved(&done.model);
        verify::verify(&file::load(&path).unwrap()).unwrap();
        assert!(done.report.quality[0].sqnr_db().unwrap() > 25.0, "{target}: {:?}", done.report.quality);
        assert_eq!(done.report.operators["Conv"], (4, 4), "{target}");
    }
}

/// What is quantized stays as it is: nothing is quantized twice, and the second output computes the same.
#[test]
fn a_quantized_model_is_kept() {
    let (model, samples) = digits();
    let once = run(&model, Some(&samples), &Config::default(), targets::DEFAULT, 2).model;
    let twice = run(&once, Some(&samples), &Config::default(), targets::DEFAULT, 2);
    assert!(twice.report.weights.is_empty() && twice.report.activations.is_empty());
    assert!(twice.report.operators.is_empty(), "{:?}", twice.report.operators);
    let first: &[usize] = &[0, 1];
    let found = Compare::new(&once, &twice.model).samples(&samples).indices(first).outputs().unwrap();
    assert_eq!(found[0].floats.as_ref().unwrap().max_abs_error, 0.0);
    let quantizers = |m: &Model| types(m, "QuantizeLinear", 1).len() + types(m, "DequantizeLinear", 1).len();
    assert_eq!(quantizers(&twice.model), quantizers(&once));
}

/// Every node that does not run in integers is listed, with a reason.
#[test]
fn refusals_have_reasons() {
    let (model, samples) = digits();
    let config = Config::parse("exclude = [\"wide\"]").unwrap();
    let done = run(&model, Some(&samples), &config, targets::DEFAULT, 2);
    let wide: Vec<_> = done.report.skipped.iter().filter(|s| s.node == "wide").collect();
    assert_eq!(wide.len(), 1);
    let excluded = Reason::Excluded { rule: "exclude \"wide\"".to_owned() };
    assert_eq!((wide[0].op.as_str(), &wide[0].why), ("Conv", &excluded));
    // 32 filters of 16x3x3 and their biases.
    assert_eq!(wide[0].bytes, 4 * (32 * 16 * 3 * 3 + 32));
    assert_eq!(done.report.operators["Conv"], (3, 4));
}

/// The report says what the ranges rest on, and a percentile clips what it was told to.
#[test]
fn the_report_says_whether_the_samples_were_enough() {
    let (model, samples) = digits();
    let done = run(&model, Some(&samples), &Config::default(), targets::DEFAULT, 2);
    let found = done.report.sufficiency.unwrap();
    assert_eq!(found.samples, 56);
    let planned = done.report.activations.iter().filter(|a| a.mode == "static").count();
    assert_eq!(found.sites.len(), planned);
    assert!(found.sites.values().all(|s| s.clipped < 1e-9), "min-max clips nothing");
    let text = "guard.enabled = false\n[default]\ninput = { observer = \"percentile\", percentile = 98.0 }\n\
                output = { observer = \"percentile\", percentile = 98.0 }";
    let done = run(&model, Some(&samples), &Config::parse(text).unwrap(), targets::DEFAULT, 2);
    let found = done.report.sufficiency.unwrap();
    let clipped = found.sites.values().map(|s| s.clipped).fold(0.0, f64::max);
    assert!((0.002..0.03).contains(&clipped), "{clipped}");
}

/// What quantizes weights alone leaves can be quantized further: the weights are the codes that they were, nearly.
#[test]
fn weights_in_8_bits_are_quantized_with_their_inputs() {
    let (model, samples) = digits();
    let preset = |name: &str| amax::config::presets::load(name).unwrap();
    let (w8, mut int8) = (preset("w8"), preset("int8"));
    // Biases would be corrected towards weights that were rounded already.
    int8.algorithm = Some(Algorithm::new(Method::None));
    let stored = Rewrite::new(&model).config(&w8).run().unwrap().model;
    let check = |config: &Config, samples: Option<&SampleSet>, opened: usize| {
        let done = Rewrite::new(&stored).config(config).samples(samples).run().unwrap();
        let row = done.report.passes.iter().find(|row| row.pass == "dequantize");
        assert_eq!(row.map_or(0, |row| row.changes), opened);
        done
    };
    let done = check(&int8, Some(&samples), 5);
    assert_eq!(done.report.operators["Conv"], (4, 4));
    assert!(done.report.summary().contains("5 weights in 8 bits quantized again"), "{}", done.report.summary());
    // The noise of weights that were rounded twice.
    let quality = |quantized: &Model| {
        let rows = Compare::new(&model, quantized).samples(&samples).outputs().unwrap();
        rows[0].sqnr_db().unwrap()
    };
    let direct = Rewrite::new(&model).config(&int8).samples(&samples).run().unwrap().model;
    assert!(quality(&done.model) > quality(&direct) - 3.0);
    check(&int8, None, 0);
    check(&w8, Some(&samples), 0);
    let mut excluded = int8.clone();
    excluded.exclude.push("stem".to_owned());
    check(&excluded, Some(&samples), 4);
}
