//! Fake-quantized models in and out: exports of frameworks (`tests/qat/`, made by `make_exports.py`) are folded and proven,
//! and what `prepare` writes is what `rewrite` stores.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use amax::compare::Compare;
use amax::config::spec::Form;
use amax::config::{Config, Pattern, presets};
use amax::convert::{Convert, Converted};
use amax::error::{Kind, Result};
use amax::ir::{Model, Tensor, file, text};
use amax::observe::Run;
use amax::observe::compare::outputs;
use amax::observe::prove::Proof;
use amax::onnx::DataType;
use amax::passes::recipes::To;
use amax::passes::support::evaluate::Exact;
use amax::passes::support::operands::Comparison;
use amax::passes::switch_quantizers::Switch;
use amax::reason::Reason;
use amax::rewrite::Rewrite;
use amax::samples::SampleSet;
use amax::targets::Target;
use serde_json::Value;

use crate::support::{digits, models_below, root};

fn folder() -> PathBuf {
    root("tests/qat")
}

fn load(name: &str) -> Model {
    file::load(&folder().join(format!("{name}.onnx"))).unwrap()
}

fn samples(name: &str, model: &Model) -> SampleSet {
    SampleSet::open(&folder().join(format!("{name}.calib.npz")), model).unwrap()
}

fn target(name: &str) -> Target {
    Target::load(name).unwrap()
}

fn converted_as(model: &Model, into: &[To], switches: &[Switch], keep_scales: bool) -> Result<Converted> {
    let target = target("generic");
    let conversion = Convert::new(model).to(into).switches(switches).keep_scales(keep_scales).accuracy_level(0);
    conversion.target(&target).evaluate(&Exact).run()
}

fn converted_with(model: &Model, switches: &[Switch]) -> Result<Converted> {
    converted_as(model, &[], switches, false)
}

fn converted(model: &Model) -> Converted {
    converted_with(model, &[]).unwrap()
}

fn in_nbits(model: &Model) -> Converted {
    converted_as(model, &[To::Form(Form::Matmulnbits)], &[], false).unwrap()
}

fn parsed(text: &str) -> Model {
    text::parse(text).unwrap()
}

fn proof(original: &Model, test: &Model, samples: Option<&SampleSet>) -> Proof {
    Compare::new(original, test).samples(samples).evaluate(&Exact).prove().unwrap()
}

/// Each initializer's type and shape, sorted, but for scales and zero points.
fn stored(model: &Model) -> Vec<String> {
    let parameter = |name: &str| name.contains("zero_point") || name.ends_with("_scale");
    let codes = |v: &amax::ir::ValueId| !parameter(model.value(*v).name());
    let all = model.graph(model.main()).initializers().iter().copied().filter(codes);
    let tensors = all.filter_map(|v| model.constant(v));
    let large = tensors.filter(|t| t.dims().len() > 1 && t.dtype() != DataType::Float);
    let mut found: Vec<String> = large.map(|t| format!("{}{:?}", t.dtype(), t.dims())).collect();
    found.sort();
    found
}

fn count(model: &Model, op: &str) -> usize {
    model.graph(model.main()).nodes().iter().filter(|&&n| model.node(n).is(op)).count()
}

/// What becomes of each export: the codes that are stored, float tensors of more than one axis that are left, and the
/// places that are listed as kept.
#[test]
fn exports_of_frameworks_fold() {
    #[allow(clippy::type_complexity, reason = "a table")]
    let cases: &[(&str, &[&str], usize, &[&str])] = &[
        ("torchao_8da4w", &["int4[16, 32]", "int4[32, 64]"], 1, &["mul_11", "mul_2"]),
        ("torchao_8da4w_optimized", &["int4[16, 32]", "int4[32, 64]"], 1, &["mul_11", "mul_2"]),
        ("torchao_int4", &["uint4[16, 32]", "uint4[32, 64]"], 3, &[]),
        ("torchao_int4_weight_only", &["uint4[16, 32]", "uint4[32, 64]"], 3, &[]),
        ("torch_fake_quantize", &["int8[8, 3, 3, 3]"], 0, &[]),
        ("spelled_out", &["int8[8, 3, 3, 3]"], 0, &["y"]),
        (
            "fx_qat_cnn",
            &["int8[4, 8]", "int8[8, 3, 3, 3]"],
            0,
            &[
                "/activation_post_process_0/Clip",
                "/activation_post_process_1/Clip",
                "/activation_post_process_1_1/Clip",
                "/activation_post_process_3/Clip",
            ],
        ),
        ("pt2e_qat_cnn", &["int8[4, 8]", "int8[8, 3, 3, 3]"], 0, &[]),
        ("brevitas_qcdq", &["int8[4, 288]", "int8[8, 3, 3, 3]"], 0, &["/2/act_quant/export_handler/Clip"]),
        ("qcdq_float_weights", &["int8[8, 3, 3, 3]"], 0, &["c"]),
        ("modelopt_int8", &["int8[4, 8]", "int8[8, 3, 3, 3]"], 0, &["/norm/BatchNormalization"]),
        (
            "modelopt_deep",
            &["int8[4, 6]", "int8[6, 8, 3, 3]", "int8[8, 3, 3, 3]"],
            0,
            &["/blocks/blocks.3/BatchNormalization"],
        ),
        ("modelopt_fp8", &["float8e4m3fn[32, 16]", "float8e4m3fn[32, 64]"], 0, &[]),
        ("grouped_pair", &["int8[64, 16]"], 1, &[]),
        ("ort_static", &["int8[4, 8]", "int8[8, 3, 3, 3]"], 0, &[]),
        ("float_linear", &[], 2, &[]),
    ];
    for (name, codes, floats, kept) in cases {
        let model = load(name);
        let done = converted(&model);
        assert_eq!(stored(&done.model), *codes, "{name}");
        let main = done.model.graph(done.model.main());
        let tensors = main.initializers().iter().filter_map(|&v| done.model.constant(v));
        let left = tensors.filter(|t| t.dtype() == DataType::Float && t.dims().len() > 1).count();
        assert_eq!(left, *floats, "{name}");
        let places: BTreeSet<&str> = done.kept.iter().map(|n| n.at.as_str()).collect();
        assert_eq!(places, kept.iter().copied().collect(), "{name}");
        // What is folded stays folded, and a second run finds nothing to do.
        let again = converted(&done.model);
        assert_eq!((again.folded, again.changed), (vec![], vec![]), "{name}");
        assert_eq!(text::print(&again.model), text::print(&done.model), "{name}");
    }
    let listed: BTreeSet<String> = cases.iter().map(|(name, ..)| format!("{name}.onnx")).collect();
    let there: BTreeSet<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.rsplit('.').next() == Some("onnx"))
        .collect();
    assert_eq!(listed, there);
}

#[test]
fn exports_are_the_same_after_folding() {
    let expected: BTreeMap<String, Value> =
        serde_json::from_str(&std::fs::read_to_string(folder().join("expected.json")).unwrap()).unwrap();
    for (name, expected) in expected {
        let model = load(&name);
        let done = converted(&model);
        let set = samples(&name, &model);
        let proof = proof(&model, &done.model, cfg!(feature = "tract").then_some(&set));
        proof.verdict().unwrap_or_else(|e| panic!("{name}: {e}"));
        let others: Vec<&str> =
            proof.operands.iter().filter(|o| o.found != Comparison::Equal).map(|o| o.node.as_str()).collect();
        let scaled: &[&str] = if name == "modelopt_deep" { &["/blocks/blocks.0/Conv"] } else { &[] };
        assert_eq!(others, scaled, "{name}: {proof}");
        assert!(!scaled.is_empty() || proof.outputs.iter().all(|o| o.differing == 0), "{name}: {proof}");
        let weights = usize::from(name != "float_linear");
        assert!(proof.operands.len() >= weights, "{name}: {proof}");
        if !cfg!(feature = "tract") || name == "float_linear" {
            continue;
        }
        // What the framework, or onnxruntime, computed.
        let outputs = outputs(&done.model, &Run::new(&set, &[0])).unwrap();
        let ours = outputs[0][0].1.to_f32().unwrap();
        let theirs: Vec<f32> = expected["y"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let largest = theirs.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() <= largest * 1e-5, "{name}: {a} instead of {b}");
        }
    }
}

#[test]
fn scales_keep_their_bits() {
    let model = load("torch_fake_quantize");
    let done = converted(&model);
    let scale = |m: &Model| m.constant(m.value_named("scale").unwrap()).unwrap().raw();
    assert_eq!(scale(&model), scale(&done.model));
}

/// What stands between a product of codes and the next quantizer after a conversion, for
/// `Conv(x, weight) -> behind -> quantizer`: operators, scales of the weight and bias; or why it stays.
fn fused(behind: &str, keep_scales: bool) -> std::result::Result<(Vec<f32>, Vec<f32>), String> {
    let model = parsed(&format!(
        "<ir_version: 8, opset_import: [\"\" : 17]> g (float[1, 2, 3] x) => (float[1, 2, 3] y) <
            float s = {{0.5}}, uint8 z = {{128}}, int8[2, 2, 1] w = {{3, -1, 5, 2}}, float one = {{0.25}},
            float[2] each = {{0.5, 0.125}}, float[2] c = {{1.5, -2.0}}, float[1, 2, 1] div = {{2.0, 4.0}},
            float[2] gamma = {{2.0, 4.0}}, float[2] beta = {{0.5, 0.75}}, float[2] mean = {{1.0, -1.0}},
            float[2] unit = {{1.0, 1.0}}, float[2] quarter = {{0.25, 0.25}}, float[2] turned = {{2.0, -4.0}},
            float[1, 2, 1] turn = {{2.0, -4.0}}, float[2] none = {{2.0, 0.0}}, float[2] huge = {{2.0, 3e38}},
            float[1, 2, 1] tenth = {{0.1, 0.7}}, float[1, 2, 1] ten = {{10.0, 1.4285715}}, float eight = {{8.0}}, float tiny = {{1e-45}},
            float[2] squares = {{4.0, 16.0}}, int64[3] column = {{1, 2, 1}}> {{
            xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z) {behind}
            q = QuantizeLinear (last, s, z) y = DequantizeLinear (q, s, z) }}"
    ));
    let done = converted_as(&model, &[], &[], keep_scales).unwrap();
    let found = &done.model;
    let named = |v: &str| found.producer_named(v);
    let conv = named("last").filter(|&n| found.node(n).is("Conv"));
    let Some(conv) = conv else {
        return Err(done.kept.iter().map(|n| n.what.to_string()).collect::<Vec<_>>().join("; "));
    };
    assert_eq!((done.kept.len(), done.changed.len()), (0, 1), "{behind}: {:?} {:?}", done.kept, done.changed);
    assert_eq!(found.graph(found.main()).nodes().len(), 6, "{behind}: nothing is left of it");
    let dequantize = found.producer(found.node(conv).input(1).unwrap()).unwrap();
    let floats = |node, input| found.constant_input(node, input).and_then(Tensor::to_f32).unwrap_or_default();
    let codes = found.constant_input(dequantize, 0).unwrap();
    assert_eq!(codes.to_i64().unwrap(), [3, -1, 5, 2], "{behind}");
    Ok((floats(dequantize, 1), floats(conv, 2)))
}

#[test]
fn channels_behind_codes_are_fused_into_scales_and_bias() {
    let each = "wd = DequantizeLinear <axis = 0> (w, each)\n";
    let one = "wd = DequantizeLinear (w, one)\n";
    let norm = |gamma: &str, data: &str| {
        format!("last = BatchNormalization <epsilon = 0.0> ({data}, {gamma}, beta, mean, unit)\n")
    };
    let check = |behind: String, scales: &[f32], bias: &[f32]| {
        assert_eq!(fused(&behind, false), Ok((scales.to_vec(), bias.to_vec())), "{behind}");
    };
    // The factors cancel: (y + c) / d - 1 or + 1, times 2 or 4, plus 0.5 or 0.75.
    let cancelling = format!("{each} a = Conv (xd, wd, c) b = Div (a, div) {}", norm("gamma", "b"));
    check(cancelling.clone(), &[0.5, 0.125], &[0.0, 2.75]);
    assert_eq!(fused(&cancelling, true), Ok((vec![0.5, 0.125], vec![0.0, 2.75])));
    check(format!("{each} a = Conv (xd, wd) b = Div (a, turn) {}", norm("turned", "b")), &[0.5, 0.125], &[-1.5, -3.25]);
    // The divisor is computed from the statistics, as an export without constant folding has it; 2 and 4.
    let derived = "r = Sqrt (squares) d = Reshape (r, column) b = Div (a, d)";
    check(format!("{each} a = Conv (xd, wd, c) {derived} {}", norm("gamma", "b")), &[0.5, 0.125], &[0.0, 2.75]);
    // They do not: 2·(y + c - 1) + 0.5 and 4·(y + c + 1) + 0.75.
    check(format!("{each} a = Conv (xd, wd, c) {}", norm("gamma", "a")), &[1.0, 0.5], &[1.5, -3.25]);
    check(format!("{one} a = Conv (xd, wd) {}", norm("gamma", "a")), &[0.5, 1.0], &[-1.5, 4.75]);
    // Variances of a quarter and one number for both channels; 8·c.
    let quarter = "last = BatchNormalization <epsilon = 0.0> (a, unit, beta, mean, quarter)";
    check(format!("{each} a = Conv (xd, wd) {quarter}"), &[1.0, 0.25], &[-1.5, 2.75]);
    check(format!("{one} a = Conv (xd, wd, c) last = Mul (eight, a)"), &[2.0], &[12.0, -16.0]);
    check(format!("{one} a = Conv (xd, wd, c) last = Sub (a, div)"), &[0.25], &[-0.5, -6.0]);
    // 0.1 and 0.7 in float32 times numbers near their reciprocals are 1 but for the rounding.
    check(format!("{each} a = Conv (xd, wd) b = Mul (tenth, a) last = Mul (b, ten)"), &[0.5, 0.125], &[]);
    let kept = |behind: &str, keep_scales: bool, why: &str| {
        assert_eq!(fused(behind, keep_scales), Err(why.to_owned()), "{behind}");
    };
    let bare = format!("{each} a = Conv (xd, wd)");
    kept(&format!("{bare} {}", norm("gamma", "a")), true, &Reason::KeepsScales.to_string());
    kept(&format!("{bare} {}", norm("turned", "a")), false, "its factor is -4, not a positive number");
    kept(&format!("{bare} {}", norm("none", "a")), false, "its factor is 0, not a positive number");
    kept(
        &format!("{one} a = Conv (xd, wd, c) b = Mul (a, eight) {}", norm("huge", "b")),
        false,
        "its new bias overflows float",
    );
    let range = "its scale times a factor overflows float";
    kept(&format!("{one} a = Conv (xd, wd) last = Mul (a, tiny)"), false, range);
    let float = "it scales channels, and the product is not between quantizers";
    kept(&format!("{each} a = Conv (x, wd) {}", norm("gamma", "a")), false, float);
    kept(
        &format!("{bare} b = {} l = Tanh (b) last = Identity (l)", norm("gamma", "a").replace("last = ", "")),
        false,
        float,
    );
    // Arithmetic in floats is left without a word; so is a product that is read elsewhere, too.
    kept(&format!("{bare} b = Mul (a, eight) last = Tanh (b)"), false, "");
    kept(&format!("{bare} b = Mul (a, eight) last = Add (a, b)"), false, "");
}

#[test]
fn learned_scales_keep_their_bits_where_factors_cancel() {
    let model = load("fx_qat_cnn");
    let done = converted(&model).model;
    let learned = "conv.weight_fake_quant.scale";
    let scale = |m: &Model| m.constant(m.value_named(learned).unwrap()).unwrap().raw();
    assert_eq!(scale(&model), scale(&done));
    assert_eq!((count(&done, "Div"), count(&done, "BatchNormalization")), (0, 0));
    let same = proof(&model, &done, None);
    let conv = same.operands.iter().find(|o| o.node == "/conv/Conv" && o.input == 1).unwrap();
    assert_eq!((conv.elements, &conv.found), (216, &Comparison::Equal));
}

#[test]
fn a_wrong_factor_is_found() {
    let model = load("modelopt_deep");
    let right = converted(&model).model;
    let conv = right.graph(right.main()).nodes().iter().copied().find(|&n| right.node(n).is("Conv")).unwrap();
    let dequantize = right.producer(right.node(conv).input(1).unwrap()).unwrap();
    let found = |wrong: &Model, set| {
        let proof = proof(&model, wrong, set);
        let weight = proof.operands.iter().find(|o| o.node == "/blocks/blocks.0/Conv" && o.input == 1).unwrap();
        (weight.found.clone(), proof.verdict().map_err(|e| e.kind()))
    };
    assert!(matches!(found(&right, None), (Comparison::Scaled { .. }, Ok(()))));
    // Another code is no factor.
    let mut wrong = right.clone();
    let codes = wrong.node(dequantize).input(0).unwrap();
    let tensor = wrong.constant(codes).unwrap().clone();
    let mut bytes = tensor.raw().to_vec();
    bytes[5] = bytes[5].wrapping_add(1);
    wrong.set_constant(codes, Tensor::new(DataType::Int8, &tensor.dims(), bytes));
    assert!(matches!(found(&wrong, None), (Comparison::Differing(_), Err(Kind::Check))));
    // Another scale is, and the outputs tell.
    let mut wrong = right.clone();
    let scale = wrong.node(dequantize).input(1).unwrap();
    let mut numbers = wrong.constant(scale).unwrap().to_f32().unwrap();
    numbers[2] *= 1.25;
    wrong.set_constant(scale, Tensor::from_f32(&[numbers.len()], &numbers));
    let set = samples("modelopt_deep", &model);
    let set = cfg!(feature = "tract").then_some(&set);
    let wanted = if set.is_some() { Err(Kind::Check) } else { Ok(()) };
    let (weight, verdict) = found(&wrong, set);
    assert!(matches!(weight, Comparison::Scaled { .. }) && verdict == wanted);
}

#[test]
fn a_wrong_conversion_is_found() {
    let model = load("spelled_out");
    let mut wrong = converted(&model).model;
    let codes = wrong
        .graph(wrong.main())
        .initializers()
        .iter()
        .copied()
        .find(|&v| wrong.constant(v).is_some_and(|t| t.dtype() == DataType::Int8 && t.len() > 8))
        .unwrap();
    let tensor = wrong.constant(codes).unwrap().clone();
    let mut bytes = tensor.raw().to_vec();
    bytes[5] = u8::from(bytes[5] == 0);
    wrong.set_constant(codes, Tensor::new(DataType::Int8, &tensor.dims(), bytes));
    let found = proof(&model, &wrong, None);
    let error = found.verdict().unwrap_err();
    assert_eq!(error.kind(), Kind::Check);
    assert!(error.to_string().contains("1 of 216 elements"), "{error}");
}

/// A spelled-out quantizer of `x`; `None` if it stays, else what is in its place.
fn named(body: &str) -> Option<String> {
    let text = format!("<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 4] x) => (float[n, 4] y) {{ {body} }}");
    let done = converted(&parsed(&text)).model;
    if count(&done, "Round") > 0 {
        return None;
    }
    let q = done.graph(done.main()).nodes().iter().copied().find(|&n| done.node(n).is("QuantizeLinear"))?;
    let zero = done.constant_input(q, 2).unwrap();
    let clip = if count(&done, "Clip") > 0 { " clip" } else { "" };
    Some(format!("{}{}", zero.dtype(), clip))
}

#[test]
fn activations_become_pairs_only_where_that_is_the_same() {
    let check = |body: &str, wanted: Option<&str>| assert_eq!(named(body).as_deref(), wanted, "{body}");
    let constant = |name: &str, value: f32| format!("{name} = Constant <value_float = {value:?}> ()\n");
    let numbers = |scale: f32, zero: f32, low: f32, high: f32| {
        [("s", scale), ("z", zero), ("lo", low), ("hi", high)].map(|(n, v)| constant(n, v)).concat()
    };
    let full = "d = Div(x, s) r = Round(d) a = Add(r, z) c = Clip(a, lo, hi) m = Sub(c, z) y = Mul(m, s)";
    check(&(numbers(0.02, 128.0, 0.0, 255.0) + full), Some("uint8"));
    check(&(numbers(0.02, 3.0, -128.0, 127.0) + full), Some("int8"));
    check(&(numbers(0.02, 0.0, -127.0, 127.0) + full), Some("int8 clip"));
    check(&(numbers(0.02, 0.0, 0.0, 127.0) + full), Some("int8 clip"));
    // No format has these codes, and nothing bounds those.
    check(&(numbers(0.02, 0.0, -300.0, 300.0) + full), None);
    check(&(numbers(0.02, 0.0, 0.0, 255.0) + "d = Div(x, s) r = Round(d) y = Mul(r, s)"), None);
    // A zero point that is no whole number, and a scale that is none.
    check(&(numbers(0.02, 0.5, 0.0, 255.0) + full), None);
    check(&(numbers(-0.02, 0.0, -128.0, 127.0) + full), None);
    // Multiplied by the reciprocal: the same where that is exact.
    let inverse = "d = Mul(x, i) r = Round(d) a = Add(r, z) c = Clip(a, lo, hi) m = Sub(c, z) y = Mul(m, s)";
    check(&(numbers(0.125, 5.0, -128.0, 127.0) + &constant("i", 8.0) + inverse), Some("int8"));
    check(&(numbers(0.02, 5.0, -128.0, 127.0) + &constant("i", 50.0) + inverse), None);
    // The zero point is added before rounding: ties go elsewhere where it is odd.
    let before = "d = Div(x, s) a = Add(d, z) r = Round(a) c = Clip(r, lo, hi) m = Sub(c, z) y = Mul(m, s)";
    check(&(numbers(0.125, 5.0, -128.0, 127.0) + before), None);
    check(&(numbers(0.125, 0.0, -128.0, 127.0) + before), Some("int8"));
    // Clipped before rounding; with Min and Max; scaled back by another scale.
    let clipped = "d = Div(x, s) c = Clip(d, lo, hi) r = Round(c) y = Mul(r, s)";
    check(&(numbers(0.02, 0.0, -128.0, 127.0) + clipped), Some("int8"));
    let extremes = "d = Div(x, s) r = Round(d) n = Min(r, hi) c = Max(lo, n) y = Mul(s, c)";
    check(&(numbers(0.02, 0.0, -128.0, 127.0) + extremes), Some("int8"));
    let other = "d = Div(x, s) r = Round(d) c = Clip(r, lo, hi) y = Mul(c, t)";
    check(&(numbers(0.02, 0.0, -128.0, 127.0) + &constant("t", 0.03) + other), None);
}

#[test]
fn weights_fold_in_many_spellings() {
    let check = |body: &str, wanted: &[&str]| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 2] x) => (float[n, 4] y) <
                float[2, 4] w = {{0.5, -0.3, 0.1, 0.77, -0.5, 0.25, 0.0, -0.8}},
                float[4] s = {{0.1, 0.05, 0.01, 0.2}}, float one = {{0.1}}, float z = {{1.0}},
                float lo = {{-8.0}}, float hi = {{7.0}}, int64[2] wide = {{4, 2}}, int64[2] tall = {{2, 4}},
                float[4, 1] g = {{0.1, 0.05, 0.01, 0.2}}> {{ {body} y = MatMul(x, f) }}"
        );
        let model = parsed(&text);
        let done = converted(&model);
        assert_eq!(stored(&done.model), wanted, "{body} {:?}", done.kept);
        let found = proof(&model, &done.model, None);
        assert!(
            found.operands.iter().all(|o| o.found == Comparison::Equal) && found.operands.len() == 1,
            "{body} {found}"
        );
    };
    check("d = Div(w, s) r = Round(d) c = Clip(r, lo, hi) f = Mul(c, s)", &["int4[2, 4]"]);
    check("d = Div(w, s) r = Round(d) c = Clip(r, lo, hi) f = Mul(s, c)", &["int4[2, 4]"]);
    check("i = Reciprocal(s) d = Mul(w, i) r = Round(d) c = Clip(r, lo, hi) f = Mul(c, s)", &["int4[2, 4]"]);
    check(
        "d = Div(w, one) r = Round(d) a = Add(r, z) c = Clip(a, lo, hi) m = Sub(c, z) f = Mul(m, one)",
        &["int4[2, 4]"],
    );
    check("d = Div(w, s) r = Round(d) f = Mul(r, s)", &["int8[2, 4]"]);
    // A float is added: to all, to each channel, to each group; nothing, in effect; to each element, which is no zero point.
    check("d = Div(w, one) r = Round(d) m = Mul(r, one) f = Add(m, z)", &["int8[2, 4]"]);
    check("d = Div(w, s) r = Round(d) c = Clip(r, lo, hi) m = Mul(c, s) f = Add(s, m)", &["int4[2, 4]"]);
    check(
        "v = Reshape(w, wide) d = Div(v, g) r = Round(d) c = Clip(r, lo, hi) m = Mul(c, g) a = Add(m, g) f = Reshape(a, tall)",
        &["int4[2, 4]"],
    );
    check("d = Div(w, s) r = Round(d) m = Mul(r, s) o = Sub(z, z) f = Add(m, o)", &["int8[2, 4]"]);
    check("d = Div(w, s) r = Round(d) m = Mul(r, s) f = Add(m, w)", &[]);
    check("d = Div(w, s) r = Round(d) k = Cast <to = 3> (r) b = Cast <to = 1> (k) f = Mul(b, s)", &["int8[2, 4]"]);
    // Groups of 2 between reshapes, on the last axis.
    check(
        "v = Reshape(w, wide) d = Div(v, g) r = Round(d) c = Clip(r, lo, hi) m = Mul(c, g) f = Reshape(m, tall)",
        &["int4[2, 4]"],
    );
    // The scale is computed from the weight.
    check(
        "b = Abs(w) a = ReduceMax <axes = [0]> (b) q = Div(a, hi) d = Div(w, q) r = Round(d) c = Clip(r, lo, hi) f = Mul(c, q)",
        &["int4[2, 4]"],
    );
    // Divided by the inverse of the scale, as ModelOpt does; a zero point that is no whole number; nothing that rounds.
    check("i = Reciprocal(one) d = Mul(w, i) r = Round(d) f = Div(r, i)", &["int8[2, 4]"]);
    check("d = Div(w, s) r = Round(d) a = Add(r, one) f = Mul(a, s)", &[]);
    check("d = Div(w, s) f = Mul(d, s)", &[]);
}

#[test]
fn a_weight_between_reshapes_keeps_its_groups() {
    let done = converted(&load("grouped_pair")).model;
    let node = done.graph(done.main()).nodes().iter().copied().find(|&n| done.node(n).is("DequantizeLinear")).unwrap();
    assert_eq!((done.node(node).int("axis"), done.node(node).int("block_size")), (Some(0), Some(32)));
    assert_eq!(done.opset(), Some(21));
}

#[test]
fn floats_on_a_grid_are_found_and_others_left() {
    let model = |values: &[f32]| {
        let mut model = parsed(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 32] x) => (float[n, 8] y) <float[1] w = {0.0}> { y = MatMul(x, w) }",
        );
        let w = model.value_named("w").unwrap();
        model.set_constant(w, Tensor::from_f32(&[32, 8], values));
        model
    };
    let grid = |steps: i32| -> Vec<f32> {
        // The last row holds the ends of the range, so that every column uses all of it.
        let code = |i: i32| if i >= 248 { steps } else { i * 7919 % (2 * steps + 1) - steps };
        (0..256).map(|i| code(i) as f32 * (0.013 + (i % 8) as f32 * 0.001)).collect()
    };
    assert_eq!(stored(&converted(&model(&grid(7))).model), ["int4[32, 8]"]);
    assert_eq!(stored(&converted(&model(&grid(100))).model), ["int8[32, 8]"]);
    let mut off = grid(7);
    off[100] = off[100].next_up() + 1e-6;
    assert!(stored(&converted(&model(&off)).model).is_empty());
    assert!(stored(&converted(&model(&[0.0; 256])).model).is_empty());
    assert!(stored(&converted(&model(&grid(1))).model).is_empty(), "three values are no sign of a quantizer");
}

#[test]
fn a_file_cannot_ask_for_endless_constants() {
    let done = converted(&parsed(
        "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n] x) => (float[n] y) <
            int64[3] huge = {1000000, 1000000, 1000000}, float one = {1.0}> {
            e = Expand(one, huge) r = Round(e) f = Mul(r, one) y = Add(x, f) }",
    ));
    assert_eq!(count(&done.model, "Expand"), 1);
}

#[test]
fn quantizers_are_switched_off_by_name() {
    let switch = |pattern: &str, on: bool| Switch { pattern: Pattern::new(pattern).unwrap(), on };
    let check = |name: &str, switches: &[Switch], pairs: usize, codes: &[&str]| {
        let model = load(name);
        let done = converted_with(&model, switches).unwrap();
        assert_eq!(
            (count(&done.model, "DequantizeLinear"), stored(&done.model)),
            (pairs, codes.iter().map(|c| (*c).to_owned()).collect())
        );
        let reference = done.reference.as_ref().unwrap_or(&model);
        let found = proof(reference, &done.model, None);
        assert!(found.operands.iter().all(|o| o.found == Comparison::Equal), "{found}");
    };
    let (conv, linear) = ("int8[8, 3, 3, 3]", "int8[4, 8]");
    check("modelopt_int8", &[], 4, &[linear, conv]);
    check("modelopt_int8", &[switch("*.weight", false)], 2, &[]);
    check("modelopt_int8", &[switch("*.input", false)], 2, &[linear, conv]);
    check("modelopt_int8", &[switch("/linear/*", false)], 2, &[conv]);
    check("modelopt_int8", &[switch("*", false), switch("/conv/Conv.weight", true)], 1, &[conv]);
    // Codes that are there already become the floats that they stand for.
    check("brevitas_qcdq", &[switch("*.weight", false)], 4, &[]);
    let error = converted_with(&load("modelopt_int8"), &[switch("/cov/Conv.weight", false)]).unwrap_err();
    assert_eq!((error.kind(), error.hint()), (Kind::Usage, Some("did you mean \"/conv/Conv.weight\"?")));
}

#[derive(Clone, Copy)]
enum Line {
    Rewrite,
    Prepare,
}

fn quantized(model: &Model, config: &Config, line: Line, samples: Option<&SampleSet>) -> Result<Model> {
    quantized_for(model, config, line, samples, &target(config.target.as_deref().unwrap_or("ort-cpu")))
}

fn quantized_for(
    model: &Model,
    config: &Config,
    line: Line,
    samples: Option<&SampleSet>,
    target: &Target,
) -> Result<Model> {
    let rewrite = Rewrite::new(model).config(config).target(target).samples(samples).threads(1).measure(false);
    Ok(match line {
        Line::Rewrite => rewrite.run()?,
        Line::Prepare => rewrite.prepare()?,
    }
    .model)
}

/// Every initializer by name, as bytes.
fn initializers(model: &Model) -> BTreeMap<String, (DataType, Vec<usize>, Vec<u8>)> {
    let main = model.graph(model.main());
    let read = |v: &amax::ir::ValueId| {
        let tensor = model.constant(*v)?;
        Some((model.value(*v).name().to_owned(), (tensor.dtype(), tensor.dims(), tensor.raw().to_vec())))
    };
    main.initializers().iter().filter_map(read).collect()
}

#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn what_prepare_makes_converts_to_what_rewrite_makes() {
    let (model, set) = digits();
    let settings: &[&[&str]] = &[
        &[],
        &["default.weight.round=half-away"],
        &["default.weight.reduce_range=true"],
        &["default.weight.dtype=uint8", "default.weight.symmetric=false"],
        &[
            "op_type.Gemm.weight.dtype=int4",
            "op_type.Gemm.weight.granularity=per-group",
            "op_type.Gemm.weight.group_size=16",
        ],
        &["preset=w4", "op_type.Gemm.weight.signed_scale=false"],
        &["preset=fp8"],
        &["preset=mxfp8"],
        &["preset=mxfp4"],
        &["preset=mxint8"],
        &["preset=nvfp4"],
    ];
    let targets = ["ort-cpu", "ort-cpu", "generic", "ort-cpu-vnni", "ort-cpu", "ort-cpu"];
    for (settings, target) in settings.iter().zip(targets.into_iter().chain(std::iter::repeat("generic"))) {
        for samples in [None, Some(&set)] {
            let mut config = Config::parse(&format!("target = \"{target}\"")).unwrap();
            for setting in *settings {
                config.set(setting).unwrap();
            }
            let wanted = quantized(&model, &config, Line::Rewrite, samples).unwrap();
            let fake = quantized(&model, &config, Line::Prepare, samples).unwrap();
            let weights = stored(&wanted);
            assert!(!weights.is_empty() && stored(&fake).is_empty(), "{settings:?}");
            let back = converted(&fake);
            assert_eq!(initializers(&back.model), initializers(&wanted), "{settings:?}");
            let found = proof(&fake, &back.model, Some(&set));
            assert!(found.operands.iter().all(|o| o.found == Comparison::Equal), "{settings:?} {found}");
            assert!(found.outputs.iter().all(|o| o.differing == 0), "{settings:?} {found}");
        }
    }
}

/// What is prepared in float operators gives the bits of the quantizers.
#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn what_is_prepared_in_operators_computes_the_same() {
    let (model, set) = digits();
    for name in ["int8", "fp8", "mxfp8", "mxfp4", "nvfp4", "a16w8"] {
        let config = presets::load(name).unwrap();
        let made = [target("generic"), target("generic").simulated()].map(|target| {
            let made = quantized_for(&model, &config, Line::Prepare, Some(&set), &target).unwrap();
            let outputs = outputs(&made, &Run::new(&set, &[0, 1, 2, 3])).unwrap();
            let bits = |t: &Tensor| t.to_f32().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let bits: Vec<Vec<u32>> = outputs.iter().map(|outputs| bits(&outputs[0].1)).collect();
            (count(&made, "QuantizeLinear"), bits)
        });
        assert!(made[0].0 > 0 && made[1].0 == 0, "{name}");
        assert_eq!(made[0].1, made[1].1, "{name}");
    }
}

#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn the_preset_8da4w_computes_what_torchao_does() {
    let model = load("float_linear");
    let set = samples("float_linear", &model);
    let config = presets::load("8da4w").unwrap();
    let fake = quantized(&model, &config, Line::Prepare, None).unwrap();
    let folded = converted(&fake);
    assert_eq!(stored(&folded.model), ["int4[32, 16]", "int4[64, 32]"].map(str::to_owned));
    let expected: Value =
        serde_json::from_str(&std::fs::read_to_string(folder().join("expected.json")).unwrap()).unwrap();
    let theirs: Vec<f32> =
        expected["float_linear"]["y"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    for model in [&fake, &folded.model] {
        let outputs = outputs(model, &Run::new(&set, &[0])).unwrap();
        let ours = outputs[0][0].1.to_f32().unwrap();
        let noise = |test: &[f32]| amax::numerics::metrics::sqnr_db(&theirs, test);
        assert!(noise(&ours) > 100.0, "{}", noise(&ours));
    }
    // What is written at once is what prepare and convert make of it.
    let direct = quantized(&model, &config, Line::Rewrite, None).unwrap();
    assert_eq!(stored(&direct), stored(&folded.model));
    assert_eq!(count(&direct, "ReduceMin"), 2);
    let bits = |model: &Model| -> Vec<u32> {
        let outputs = outputs(model, &Run::new(&set, &[0])).unwrap();
        outputs[0][0].1.to_f32().unwrap().iter().map(|v| v.to_bits()).collect()
    };
    assert_eq!(bits(&direct), bits(&folded.model));
    // The codes are those of torchao's own export, but for the layout.
    let theirs = initializers(&converted(&load("torchao_8da4w")).model);
    let ours = initializers(&folded.model);
    let codes = |all: &BTreeMap<String, (DataType, Vec<usize>, Vec<u8>)>, columns: usize| -> Vec<u8> {
        let (_, dims, bytes) =
            all.values().find(|(d, dims, _)| *d == DataType::Int4 && dims[1] == columns && dims[0] != 2).unwrap();
        let nibbles: Vec<u8> = bytes.iter().flat_map(|b| [b & 15, b >> 4]).collect();
        let (rows, columns) = (dims[0], dims[1]);
        if rows > columns {
            (0..columns).flat_map(|c| (0..rows).map(move |r| (r, c))).map(|(r, c)| nibbles[r * columns + c]).collect()
        } else {
            nibbles
        }
    };
    for (ours, theirs) in [(codes(&ours, 32), codes(&theirs, 64)), (codes(&ours, 16), codes(&theirs, 32))] {
        let differing = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        assert!(ours.len() == theirs.len() && differing == 0, "{differing} of {}", ours.len());
    }
}

#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn tokens_are_quantized_as_by_torchao() {
    let vectors: Value =
        serde_json::from_str(&std::fs::read_to_string(folder().join("per_token.json")).unwrap()).unwrap();
    let floats = |v: &Value| -> Vec<f32> { v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect() };
    for opset in [17, 18, 21] {
        for case in vectors["cases"].as_array().unwrap() {
            let mut model = parsed(&format!(
                "<ir_version: 8, opset_import: [\"\" : {opset}]> g (float[6, 16] x) => (float[6, 16] y) {{ y = Identity(x) }}"
            ));
            let x = model.value_named("x").unwrap();
            let eps = case["eps"].as_f64().unwrap() as f32;
            let result = amax::passes::per_token::fake_quantize(&mut model, x, eps);
            let identity = model.producer(model.value_named("y").unwrap()).unwrap();
            model.set_input(identity, 0, Some(result));
            let session = amax::runtime::Session::new(&model, &[]).unwrap();
            let sample = BTreeMap::from([("x".to_owned(), Tensor::from_f32(&[6, 16], &floats(&case["x"])))]);
            let nothing: std::sync::Arc<dyn amax::runtime::Observe> = std::sync::Arc::new(Nothing);
            let found = session.run(&sample, &nothing).unwrap();
            let ours: Vec<u32> = found[0].1.to_f32().unwrap().iter().map(|v| (v + 0.0).to_bits()).collect();
            let theirs: Vec<u32> = floats(&case["fq"]).iter().map(|v| (v + 0.0).to_bits()).collect();
            assert_eq!(ours, theirs, "opset {opset}, eps {eps:e}");
        }
    }
}

struct Nothing;

impl amax::runtime::Observe for Nothing {
    fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
}

#[test]
fn what_torchao_refuses_is_refused() {
    let model = parsed(
        "<ir_version: 8, opset_import: [\"\" : 18]> g (float[n, 30] x) => (float[n, 4] y) <float[1] w = {0.0}> { y = MatMul(x, w) }",
    );
    let mut model = model;
    let w = model.value_named("w").unwrap();
    model.set_constant(w, Tensor::from_f32(&[30, 4], &(0..120).map(|i| i as f32 * 0.01 - 0.5).collect::<Vec<_>>()));
    let check = |settings: &[&str], line: Line, message: &str| {
        let mut config = presets::load("8da4w").unwrap();
        let set = settings.iter().try_for_each(|setting| config.set(setting));
        let error = set.and_then(|()| quantized(&model, &config, line, None).map(drop)).unwrap_err();
        assert!(error.to_string().contains(message), "{settings:?}: {error}");
    };
    let fits = "op_type.MatMul.weight.group_size=15";
    check(&[], Line::Prepare, "its 30 input channels cannot be cut into groups of 32");
    check(
        &[fits, "op_type.MatMul.input.symmetric=true"],
        Line::Prepare,
        "symmetric scales per token are not implemented",
    );
    check(&[fits, "op_type.MatMul.input.dtype=uint8"], Line::Prepare, "scales per token are for int8");
    check(&[fits, "op_type.MatMul.input.dynamic=false"], Line::Prepare, "scales per token are computed at run time");
    check(&[fits, "op_type.MatMul.weight.granularity=per-token"], Line::Prepare, "no tokens");
    check(
        &["op_type.MatMul.weight.granularity=per-channel", fits],
        Line::Prepare,
        "only per-group scales have a group size",
    );
    check(&[fits, "default.output={enable=true,granularity=\"per-token\",dynamic=true}"], Line::Rewrite, "only inputs");
}

#[test]
fn embeddings_have_weights_and_no_inputs() {
    let mut model = parsed(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (int64[n] ids) => (float[n, 4] y) <float[1] w = {0.0}, float[1] table = {0.0}> {
            x = Gather(table, ids) y = MatMul(x, w) }",
    );
    for (name, rows, columns) in [("table", 5, 32), ("w", 32, 4)] {
        let values: Vec<f32> = (0..rows * columns).map(|i| (i * 37 % 101) as f32 * 0.01 - 0.5).collect();
        let value = model.value_named(name).unwrap();
        model.set_constant(value, Tensor::from_f32(&[rows, columns], &values));
    }
    let with = |settings: &[String]| {
        let mut config = presets::load("8da4w").unwrap();
        for setting in settings {
            config.set(setting).unwrap();
        }
        quantized(&model, &config, Line::Prepare, None)
    };
    let table = ["enable=true", "dtype=int4", "granularity=per-group", "ch_axis=1", "group_size=32"];
    let mut settings: Vec<String> = table.iter().map(|key| format!("op_type.Gather.weight.{key}")).collect();
    assert_eq!(count(&with(&[]).unwrap(), "QuantizeLinear"), 1);
    assert_eq!(count(&with(&settings).unwrap(), "QuantizeLinear"), 2);
    settings.extend(["granularity=per-token", "dynamic=true"].map(|key| format!("op_type.Gather.input.{key}")));
    let error = with(&settings).unwrap_err();
    assert!(error.to_string().contains("it matches only embedding lookups, whose inputs are indices"), "{error}");
}

/// The fake quantizers of torchao's int4 weight-only: what an export of it folds to, and what `prepare` writes for the
/// same float weights.
#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn float_zero_points_are_those_of_torchao() {
    let exported = load("torchao_int4");
    let set = samples("torchao_int4", &exported);
    let model = load("float_linear");
    let mut config = presets::load("int4-weight-only").unwrap();
    for op in ["Gemm", "MatMul"] {
        config.set(&format!("op_type.{op}.weight.group_size=32")).unwrap();
        config.set(&format!("op_type.{op}.weight.scale_dtype=float32")).unwrap();
    }
    let fake = quantized(&model, &config, Line::Prepare, None).unwrap();
    assert!(stored(&fake).is_empty() && count(&fake, "DequantizeLinear") == 0 && count(&fake, "Round") == 2);
    let folded = converted(&fake);
    assert_eq!(stored(&folded.model), ["uint4[32, 16]", "uint4[64, 32]"].map(str::to_owned));
    let found = proof(&fake, &folded.model, Some(&set));
    assert!(found.operands.len() == 2 && found.operands.iter().all(|o| o.found == Comparison::Equal), "{found}");
    assert!(found.outputs.iter().all(|o| o.differing == 0), "{found}");
    // torchao's export has the same numbers; products are added up in another order.
    let run = |model: &Model| {
        let outputs = outputs(model, &Run::new(&set, &[0])).unwrap();
        outputs[0][0].1.to_f32().unwrap()
    };
    let theirs = run(&exported);
    for model in [&fake, &folded.model] {
        let sqnr = amax::numerics::metrics::sqnr_db(&theirs, &run(model));
        assert!(sqnr > 120.0, "{sqnr}");
    }
    let numbers = |model: &Model, what: &str| -> Vec<Vec<u32>> {
        let constants = initializers(model);
        let named = constants.iter().filter(|(name, (dtype, ..))| *dtype == DataType::Float && name.contains(what));
        let mut found: Vec<Vec<u32>> = named
            .map(|(_, (.., bytes))| {
                let mut bits: Vec<u32> = bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
                bits.sort_unstable();
                bits
            })
            .collect();
        found.sort();
        found
    };
    let theirs = converted(&exported).model;
    for what in ["_offset", "_scale"] {
        assert_eq!(numbers(&folded.model, what), numbers(&theirs, what), "{what}");
        assert_eq!(numbers(&theirs, what).len(), 2, "{what}");
    }
    let sites = amax::observe::sites::sites(&model, &folded.model, &Run::new(&set, &[0])).unwrap();
    let named: Vec<&str> = sites.iter().map(|site| site.site.as_str()).collect();
    assert!(named.len() == 2 && named.iter().all(|name| name.starts_with("node_linear")), "{named:?}");
    assert!(sites.iter().all(|site| site.own.is_some_and(|own| own.sqnr_db > 15.0) && site.why.is_none()), "{sites:?}");
    // In MatMulNBits, the numbers that `rewrite` puts there.
    let direct = quantized(&model, &config, Line::Rewrite, None).unwrap();
    let blocks = |model: &Model| -> Vec<(DataType, Vec<usize>, Vec<u8>)> {
        initializers(model).into_iter().filter(|(name, _)| name.contains("_nbits")).map(|(_, tensor)| tensor).collect()
    };
    let from_fake = in_nbits(&fake).model;
    assert_eq!((count_in(&direct, "MatMulNBits"), blocks(&direct).len()), (2, 6));
    assert_eq!(blocks(&from_fake), blocks(&direct));
    assert_eq!(blocks(&in_nbits(&folded.model).model), blocks(&direct));
}

/// Codes with a float added to each group are found behind a Transpose too, and behind any number of them.
#[test]
fn shifted_codes_are_found_behind_transposes() {
    let model = |transposes: usize| {
        let turns: Vec<String> = (0..transposes).map(|i| format!("t{} = Transpose(t{i})", i + 1)).collect();
        let turns = turns.join(" ");
        parsed(&format!(
            "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n, 32] x) => (float[n, 32] y) <
                uint4[1, 1] q = {{0}}, float[1, 1] s = {{0.0}}, float[1] o = {{0.0}},
                int64[3] cut = {{32, 2, 16}}, int64[2] whole = {{32, 32}}> {{
                d = DequantizeLinear <axis = 1, block_size = 16> (q, s) g = Reshape(d, cut) a = Add(g, o)
                t0 = Reshape(a, whole) {turns} y = MatMul(x, t{transposes}) }}"
        ))
    };
    for (transposes, lowered) in [(1, 1), (0, 0), (20_001, 1)] {
        let mut model = model(transposes);
        for (name, tensor) in [
            ("q", Tensor::new(DataType::Uint4, &[32, 32], (0..512).map(|i| (i * 37) as u8).collect::<Vec<u8>>())),
            ("s", Tensor::from_f32(&[32, 2], &[0.5; 64])),
            ("o", Tensor::from_f32(&[32, 2, 1], &[0.25; 64])),
        ] {
            let value = model.value_named(name).unwrap();
            model.set_constant(value, tensor);
        }
        let done = in_nbits(&model);
        // Without a Transpose the groups do not run along what is summed over.
        assert_eq!(count_in(&done.model, "MatMulNBits"), lowered, "{transposes}: {:?}", done.kept);
    }
}

fn count_in(model: &Model, op: &str) -> usize {
    model.graph(model.main()).nodes().iter().filter(|&&n| model.node(n).op_type() == op).count()
}

/// Quantizers that are there are kept, also where the target runs them wrongly, which is said.
#[test]
fn exports_are_rewritten_as_they_are() {
    let said = |name: &str| Rewrite::new(&load(name)).run().unwrap_or_else(|e| panic!("{name}: {e}")).report.warnings;
    for path in models_below(&folder()) {
        said(path.file_stem().unwrap().to_str().unwrap());
    }
    let warnings = said("fx_qat_cnn");
    let expected =
        "as the model is, ort-cpu runs it wrongly: the weight of \"/conv/Conv\" (Conv) can saturate 16-bit pair sums";
    assert!(warnings.iter().any(|w| w == expected), "{warnings:?}");
}
