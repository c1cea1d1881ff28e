//! The errors of sites are those that onnxruntime and numpy compute from their definition.
//!
//! `tests/data/compare/make.py` made the models and kept every tensor to get `expected.json`.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::Command;

use amax::ir::{Model, file};
use amax::observe::Run;
use amax::observe::sites::{Kind, Quality, Site, sites};
use amax::samples::SampleSet;
use serde_json::Value;

/// In dB. Both runtimes compute in float32, and a value on the edge between two codes falls to either side.
const TOLERANCE: f64 = 0.25;

fn data(name: &str) -> PathBuf {
    Path::new("tests/data/compare").join(name)
}

/// The float model, the quantized one and the samples of a case.
fn case(name: &str) -> (Model, Model, SampleSet) {
    let digits = name.starts_with("digits");
    let float = if digits { "models/digits.onnx".into() } else { data("mlp.onnx") };
    let float = file::load(&float).unwrap();
    let samples = SampleSet::open(&data(if digits { "digits.npz" } else { "mlp" }), &float).unwrap();
    (float, file::load(&data(&format!("{name}.onnx"))).unwrap(), samples)
}

fn measured(name: &str, threads: usize) -> Vec<Site> {
    let (float, quantized, samples) = case(name);
    let indices: Vec<usize> = (0..samples.len()).collect();
    sites(&float, &quantized, &Run { threads, ..Run::new(&samples, &indices) }).unwrap()
}

fn near(what: &str, got: Option<Quality>, want: &Value) {
    let got = got.unwrap_or_else(|| panic!("{what} was not measured")).sqnr_db;
    // No noise at all is null.
    let fits = want.as_f64().map_or(got > 100.0, |want| (got - want).abs() < TOLERANCE);
    assert!(fits, "{what}: {got} dB, expected {want}");
}

fn check(name: &str, count: usize) {
    let text = std::fs::read_to_string(data("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let expected = expected[name].as_array().unwrap();
    let found = measured(name, 2);
    assert_eq!((found.len(), expected.len()), (count, count), "{name}");
    for want in expected {
        let tensor = want["tensor"].as_str().unwrap();
        let kind = if want["kind"] == "weight" { Kind::Weight } else { Kind::Activation };
        let site = found.iter().find(|s| s.tensor == tensor && s.kind == kind);
        let site = site.unwrap_or_else(|| panic!("{name}: {kind:?} {tensor} was not found"));
        assert_eq!(site.format, want["format"].as_str().unwrap(), "{name} {tensor}");
        assert_eq!(site.why, None, "{name} {tensor}");
        near(&format!("{name}, {kind:?} {tensor} alone"), site.own, &want["own"]);
        near(&format!("{name}, {kind:?} {tensor} accumulated"), site.accumulated, &want["accumulated"]);
    }
    let order: Vec<f64> = found.iter().map(|s| s.own.unwrap().sqnr_db).collect();
    assert!(order.is_sorted(), "{name}: {order:?}");
    assert_eq!(found, measured(name, 1), "{name}: another number of threads");
}

#[test]
fn sites_of_our_own_models() {
    check("digits.amax", 14);
}

#[test]
fn sites_of_onnxruntime_s_quantizer() {
    check("digits.ort", 21);
    check("mlp.ort", 8);
}

/// Where a Relu had been left to a quantizer, the tensor has the name in front of the Relu.
#[test]
fn sites_of_operators_on_codes_that_were_made_pairs() {
    check("digits.qoperator", 16);
}

#[test]
fn products_of_integers_are_compared_where_floats_come_back() {
    check("mlp.dynamic", 2);
}

#[test]
fn a_model_is_exact_against_itself_and_strangers_are_listed() {
    let (float, quantized, samples) = case("mlp.ort");
    assert!(sites(&float, &float, &Run::new(&samples, &[0])).unwrap().is_empty());
    // Against itself every pair meets its own input, and has nothing to add.
    let same = sites(&quantized, &quantized, &Run::new(&samples, &[0, 1])).unwrap();
    assert!(same.iter().all(|s| s.accumulated.is_some_and(|q| q.sqnr_db > 20.0)), "{same:?}");
    let (_, stranger, _) = case("digits.ort");
    let found = amax::observe::sites::sites(&float, &stranger, &Run::new(&samples, &[0]));
    assert!(found.is_err(), "samples of another model");
}

#[test]
fn the_command_prints_tables_json_and_csv() {
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_amax"));
        command.args(["compare", "tests/data/compare/mlp.onnx", "tests/data/compare/mlp.ort.onnx"]);
        let answer = command.args(["--calib", "tests/data/compare/mlp"]).args(args).output().unwrap();
        (answer.status.code(), String::from_utf8(answer.stdout).unwrap(), String::from_utf8(answer.stderr).unwrap())
    };
    let found = measured("mlp.ort", 1);
    let (code, table, _) = run(&["--sites", "--top", "2"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(code, Some(0));
    assert!(
        lines[1].split_whitespace().eq(["site", "operator", "format", "granularity", "own", "accumulated"]),
        "{table}"
    );
    assert!(lines[2].trim().starts_with(&found[0].site) && lines[3].trim().starts_with(&found[1].site), "{table}");
    assert_eq!(lines[4].trim(), format!("and {} more", found.len() - 2));
    let (_, json, _) = run(&["--sites", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json.as_array().unwrap().len(), found.len());
    assert_eq!(json[0]["site"], Value::from(found[0].site.clone()));
    assert_eq!(json[0]["own"]["sqnr_db"].as_f64(), found[0].own.map(|q| q.sqnr_db));
    let (_, csv, _) = run(&["--sites", "--csv"]);
    assert_eq!(csv.lines().count(), found.len() + 1);
    assert!(csv.starts_with("site,kind,node,op,tensor,format,granularity,own_sqnr_db,"), "{csv}");
    let (_, csv, _) = run(&["--csv"]);
    assert!(
        csv.starts_with(
            "output,sqnr_db,cosine,max_abs_error,median_channel_db,agreement,unlike_samples,into,kl,top1,perplexity_reference,perplexity\ny,"
        ),
        "{csv}"
    );
    assert_eq!(run(&["--top", "2"]).0, Some(2));
    assert_eq!(run(&["--csv", "--json"]).0, Some(2));
}

/// The only row of the outputs of two models of one text, in which `@` is another number in each.
fn output(text: &str, numbers: [&str; 2], samples: usize) -> Vec<amax::QualityRow> {
    let model = |number: &str| crate::support::parsed(&text.replace('@', number));
    let (reference, test) = (model(numbers[0]), model(numbers[1]));
    let samples = SampleSet::random(&reference, samples, 3).unwrap();
    amax::compare::Compare::new(&reference, &test).samples(&samples).outputs().unwrap()
}

/// What means nothing as a ratio of noise to signal is told otherwise.
#[test]
fn outputs_are_told_by_what_they_hold() {
    let head = "<ir_version: 8, opset_import: [\"\" : 17]>\n";
    // Indices and truth values agree or do not; floats around them are measured.
    let check = |graph: &str, numbers: [&str; 2], share: f64| {
        let rows = output(&format!("{head}{graph}"), numbers, 2);
        assert!((rows[0].agreement.unwrap() - share).abs() < 1e-9 && rows[0].floats.is_none(), "{graph}: {rows:?}");
        assert_eq!(rows[0].sqnr_db(), None);
    };
    let add = "<float[4] s = {4, 0, @, -4}> { a = Mul (x, z) b = Add (a, s)";
    let of = |last: &str, ty: &str| {
        let zero = add.replace("float[4] s", "float[4] z = {0, 0, 0, 0}, float[4] s");
        format!("g (float[4] x) => ({ty} y) {zero} {last} }}")
    };
    check(&of("k = Abs (b) y = Cast <to = 7> (k)", "int64[4]"), ["2", "3"], 0.75);
    check(&of("y = Cast <to = 6> (b)", "int32[4]"), ["1.1", "1.2"], 1.0);
    check(&of("y = Greater (b, z)", "bool[4]"), ["2", "-2"], 0.75);
    check(&of("y = ArgMax <axis = 0, keepdims = 1> (b)", "int64[1]"), ["2", "9"], 0.0);
    check(&of("y = Cast <to = 2> (b)", "uint8[4]").replace("-4", "5"), ["2", "7"], 0.75);

    // A size that follows from values: what decides it is compared instead.
    let check = |graph: &str, numbers: [&str; 2], unlike: bool| {
        let rows = output(&format!("{head}{graph}"), numbers, 2);
        assert_eq!(rows[0].unlike.is_some(), unlike, "{graph}: {rows:?}");
        assert_eq!(rows.iter().filter(|row| row.into.is_some()).count(), usize::from(unlike), "{rows:?}");
        if let Some(row) = rows.iter().find(|row| row.into.is_some()) {
            assert!(row.sqnr_db().is_some_and(|db| db > 0.0 && db < 20.0) && row.output == "b", "{row:?}");
        }
    };
    check(&of("y = NonZero (b)", "int64[1, N]"), ["2", "0"], true);
    check(&of("y = NonZero (b)", "int64[1, N]"), ["2", "3"], false);
    check(&of("n = NonZero (b) y = Transpose <perm = [1, 0]> (n)", "int64[N, 1]"), ["2", "0"], true);

    // Two loud channels hide the others; alike channels need no word.
    let check = |dims: &str, scale: [&str; 2], hidden: bool| {
        let shape = dims.rsplit_once(':').unwrap();
        let graph = format!(
            "{head}g (float[{0}] x) => (float[{0}] y) <float[{1}] s = {{{2}}}> {{ y = Mul (x, s) }}",
            shape.0, shape.1, "@"
        );
        let rows = output(&graph, scale, 2);
        let floats = rows[0].floats.as_ref().unwrap();
        let median = floats.median_channel_db;
        assert_eq!(median.is_some_and(|db| db < floats.sqnr_db - 6.0), hidden, "{dims}: {floats:?}");
    };
    let loud = ["80, 80, 1, 1, 1, 1", "80, 80, 1.1, 1.1, 1.1, 1.1"];
    let alike = ["1, 1, 1, 1, 1, 1", "1.1, 1.1, 1.1, 1.1, 1.1, 1.1"];
    for dims in ["5, 6:6", "1, 5, 6:6", "2, 6, 3, 3:6, 1, 1", "1, 6, 2, 3, 3:6, 1, 1, 1"] {
        check(dims, loud, true);
        check(dims, alike, false);
    }
}
