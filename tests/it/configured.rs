//! What a configuration makes of a plan.

use std::fmt::Write;

use amax::config::spec::{Field, SiteKind};
use amax::config::{Config, Pattern};
use amax::error::Error;
use amax::plan::explain::{Outcome, explain};
use amax::plan::{Knowledge, Plan, plan};
use amax::targets::Target;

use crate::plan::{prepared, print};

/// A convolution with a Relu behind it, a shape change, two products with biases, a residual sum.
const NET: &str = r#"<ir_version: 8, opset_import: ["" : 17]>
net (float[1,2,4,4] x) => (float[1,32] out) <
  float[2,2,3,3] cw = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9},
  float[2] cb = {1, 2},
  int64[2] shape = {1, 32},
  float[32,32] w1 = {WEIGHTS},
  float[32,32] w2 = {WEIGHTS},
  float[32] b2 = {ROW}
> {
  [conv] c = Conv <pads = [1, 1, 1, 1]> (x, cw, cb)
  [relu] r = Relu (c)
  [flat] f = Reshape (r, shape)
  [fc1] m = MatMul (f, w1)
  [fc2] g = Gemm <transB = 1> (m, w2, b2)
  [sum] s = Add (g, f)
  [act] t = Sigmoid (s)
  [fc3] out = MatMul (t, w1)
}"#;

fn net() -> String {
    let row = |n: usize| (0..n).map(|i| format!("{}", (i * 7 % 13) as i32 - 6)).collect::<Vec<_>>().join(",");
    NET.replace("WEIGHTS", &row(1024)).replace("ROW", &row(32))
}

fn planned_for(target: &str, config: &Config, calibrated: bool) -> Result<Plan, Error> {
    let model = prepared(&net());
    let target = Target::load(target).unwrap();
    plan(&model, config, &target, &Knowledge { calibrated, samples: calibrated, ..Knowledge::default() })
}

fn planned(text: &str) -> Result<Plan, Error> {
    planned_for("ort-cpu", &Config::parse(text)?, true)
}

#[test]
#[allow(clippy::match_same_arms, reason = "a row a key")]
fn no_key_is_decoration() {
    let values = |field: Field, kind: SiteKind| -> &'static [&'static str] {
        let weight = kind == SiteKind::Weight;
        match field {
            Field::Enable => &["false"],
            Field::Dtype if weight => &["\"int4\"", "\"uint8\"", "\"int16\"", "\"float8e4m3fn\"", "\"mxfp8\""],
            Field::Dtype => &["\"int8\"", "\"uint16\"", "\"float8e5m2\"", "\"nvfp4\""],
            Field::Granularity if weight => &["\"per-tensor\"", "\"per-group\"", "\"per-token\""],
            Field::Granularity => &["\"per-channel\"", "\"per-token\""],
            Field::ChAxis => &["1", "-9"],
            Field::GroupSize => &["2"],
            Field::Symmetric if weight => &["false"],
            Field::Symmetric => &["true"],
            Field::Dynamic => &["true"],
            Field::Observer => &["\"mse\"", "\"percentile\"", "\"entropy\"", "\"mean\""],
            Field::Percentile => &["99.9"],
            Field::MseP => &["2.4"],
            Field::ScaleType => &["\"power-of-two\""],
            Field::ScaleDtype => &["\"float16\"", "\"bfloat16\"", "\"float8e8m0\""],
            Field::MxRounding => &["\"floor\"", "\"even\""],
            Field::Round => &["\"half-away\"", "\"floor\""],
            Field::NarrowRange if weight => &["false"],
            Field::NarrowRange => &["true"],
            Field::ReduceRange => &["true"],
            Field::Eps => &["1e-3", "-1.0"],
            Field::Postprocess => {
                &["{ scale = 0.5 }", "{ max = 6.0, power_of_two = true }", "{ min = 2.0, max = 1.0 }"]
            }
            Field::Form => &["\"matmulnbits\""],
            Field::AccuracyLevel => &["1"],
            Field::SignedScale => &["true"],
            Field::Arithmetic => &["\"torch\"", "\"mlas\"", "\"mlas-qdq\"", "\"tinygemm\"", "\"mslk\""],
        }
    };
    let plain = planned("").unwrap();
    let mut tried = 0;
    for &field in Field::ALL {
        for kind in SiteKind::ALL {
            for value in values(field, kind) {
                let (kind, field) = (kind.name(), field.name());
                let written = format!("{kind} = {{ {field} = {value} }}");
                let documents = [
                    format!("[default]\n{written}"),
                    format!("[op_type.Conv]\n{written}"),
                    format!("[[layer]]\nmatch = \"conv\"\n{written}"),
                    format!("[[layer]]\nmatch = \"co*.{kind}\"\n{written}"),
                ];
                for text in &documents {
                    let changed = planned(text).map_or(true, |plan| plan != plain);
                    assert!(changed, "nothing follows from\n{text}");
                    tried += 1;
                }
                for level in ["default", "op_type.Conv", "layer.conv"] {
                    let mut config = Config::default();
                    let set = config.set(&format!("{level}.{kind}.{field}={}", value.trim_matches('"')));
                    let planned = set.and_then(|()| planned_for("ort-cpu", &config, true));
                    let changed = planned.map_or(true, |plan| plan != plain);
                    assert!(changed, "nothing follows from --set {level}.{kind}.{field}={value}");
                }
            }
        }
    }
    assert!(tried > 400, "{tried}");
}

#[test]
fn configurations_give_their_plans() {
    let cases = [
        ("nothing", ""),
        ("inputs switched off", "[default]\ninput.enable = false"),
        (
            "one layer in groups",
            "[[layer]]\nmatch = \"fc1\"\nweight = { dtype = \"int4\", granularity = \"per-group\", group_size = 16 }",
        ),
        (
            "a transposed Gemm in groups",
            "[[layer]]\nmatch = \"fc2\"\nweight = { dtype = \"uint4\", symmetric = false, granularity = \"per-group\", group_size = 16 }",
        ),
        ("16-bit products", "[op_type.MatMul]\ninput.dtype = \"uint16\""),
        ("16 bits everywhere", "preset = \"a16w8\""),
        ("a 16-bit convolution", "[[layer]]\nmatch = \"conv\"\ninput.dtype = \"uint16\"\noutput.dtype = \"uint16\""),
        ("a forced output", "[[layer]]\nmatch = \"fc3\"\noutput.enable = true"),
        ("ranges at run time", "preset = \"int8-dynamic\""),
        ("int4 weights", "preset = \"w4\"\n[op_type.Gemm]\nweight.group_size = 16"),
        ("float8 weights", "[default]\nweight.dtype = \"float8e4m3fn\""),
        ("a range by hand", "[tensor.f]\nrange = [0.0, 6.0]"),
        ("a scale by hand", "[tensor.x]\nscale = 0.5\nzero_point = 3\n[tensor.w2]\nenable = false"),
        ("excluded sites", "exclude = [\"fc3\", \"*.bias\"]"),
        (
            "ranges that are changed",
            "[[postprocess]]\nmatch = \"fc*.{input,weight}\"\nscale = 0.9\n[[postprocess]]\nmatch = \"fc1\"\nmax = 6.0\npower_of_two = true",
        ),
        ("tied weights that differ", "[[layer]]\nmatch = \"fc3\"\nweight.symmetric = false"),
    ];
    let mut out = String::new();
    for (name, text) in cases {
        let plan = planned(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        writeln!(out, "{name}\n{}", print(&plan)).unwrap();
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(Plan::parse(&json).unwrap(), plan, "{name}: a plan survives being saved");
        plan.check(&prepared(&net()), &Target::load("ort-cpu").unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    crate::snapshot::check("data/configured/plans.txt", &out);
}

#[test]
fn mistakes_are_named_with_their_place() {
    let cases = [
        "[default]\n\nweight.group_size = 32",
        "[default.weight]\ngranularity = \"per-group\"",
        "[[layer]]\nmatch = \"fc1\"\nweight = { granularity = \"per-group\", group_size = 24 }",
        "[[layer]]\nmatch = \"fc4\"\nenable = false",
        "[op_type.Cnv]\nenable = false",
        "[op_type.Conv]\nweight.ch_axis = 1",
        "[op_type.Conv]\ninput.dynamic = true",
        "[op_type.MatMul]\noutput.dtype = \"uint16\"",
        "[op_type.Reshape]\ninput.dtype = \"uint16\"",
        "[default.input]\ngranularity = \"per-token\"\ndynamic = true",
        "[default.input]\nround = \"floor\"",
        "[default.weight]\ndtype = \"mxfp4\"",
        "[default.weight]\ndtype = \"float4e2m1\"",
        "[default.weight]\ndtype = \"float8e4m3fn\"\nsymmetric = false",
        "[default.weight]\nobserver = \"entropy\"",
        "[default.input]\npercentile = 99.9",
        "[default.input]\nobserver = \"percentile\"\npercentile = 4",
        "[default.bias]\nsymmetric = true",
        "[default]\ninput.dtype = \"float8e4m3fn\"",
        "[op_type.MatMul]\nweight.granularity = \"per-group\"\nweight.group_size = 0",
        "[tensor.nowhere]\nrange = [0, 1]",
        "[tensor.c]\nrange = [0, 1]",
        "[tensor.cb]\nscale = 0.5",
        "[tensor.x]\nzero_point = 3",
        "[tensor.x]\nscale = 0.5\nzero_point = 300",
        "[algorithm]\nmethod = \"max\"\nalpha = 0.5",
        "preset = \"int9\"",
        "[[postprocess]]\nmatch = \"fc9\"\nscale = 2.0",
        "[[postprocess]]\nmatch = \"fc1\"",
        "[[postprocess]]\nmatch = \"fc1\"\nscale = 0.0",
        "[[postprocess]]\nmatch = \"fc1\"\nmin = 4\nmax = 2.0",
        "[[postprocess]]\nmatch = \"flat.weight\"\nscale = 0.5",
        "[default.input]\ndynamic = true\npostprocess = { scale = 0.5 }",
        "[default.input]\nobserver = \"mse\"\nmse_p = 0",
        "[default.input]\nmse_p = 2",
        "[default.input]\ngranularity = \"per-channel\"",
        "[default.input]\ngranularity = \"per-group\"\ngroup_size = 32",
        "[default.input]\nch_axis = 1",
        "[default.input]\ngroup_size = 32",
        "[default.input]\ngranularity = \"per-token\"",
        "[default.input]\nsigned_scale = true",
        "[default.input]\narithmetic = \"torch\"",
        "[default.input]\ndtype = \"int32\"",
        "[default.input]\ndtype = \"float4e2m1\"",
        "[default.output]\ndynamic = true",
        "[default.output]\ngranularity = \"per-token\"\ndynamic = true",
        "[default.input]\ndynamic = true\ndtype = \"int8\"",
        "[default.input]\ndynamic = true\nsymmetric = true",
        "[default.input]\ndynamic = true\nobserver = \"mse\"",
        "[default.input]\ndynamic = true\nscale_type = \"power-of-two\"",
        "[default.input]\ndynamic = true\nscale_dtype = \"float16\"",
        "[default.input]\ndynamic = true\nnarrow_range = true",
        "[default.input]\ndynamic = true\nreduce_range = true",
        "[default.input]\ndynamic = true\neps = 1e-3",
        "[default.input]\ngranularity = \"per-token\"\ndynamic = true\ndtype = \"int8\"\nsymmetric = true",
        "[default.input]\ngranularity = \"per-token\"\ndynamic = true\ndtype = \"int8\"\nsymmetric = false\nobserver = \"mse\"",
        "[default.input]\ngranularity = \"per-token\"\ndynamic = true\ndtype = \"int8\"\nsymmetric = false\nnarrow_range = true",
        "[default.input]\ngranularity = \"per-token\"\ndynamic = true\ndtype = \"int8\"\nsymmetric = false\nround = \"floor\"",
        "[default.weight]\ndynamic = true",
        "[default.weight]\ngranularity = \"per-token\"",
        "[op_type.MatMul]\nweight.ch_axis = 9",
        "[default.weight]\ndtype = \"float8e4m3fn\"\nnarrow_range = true",
        "[default.weight]\ndtype = \"float8e4m3fn\"\nround = \"floor\"",
        "[default.weight]\ndtype = \"int2\"\nreduce_range = true",
        "[default.weight]\ndtype = \"int16\"\nsigned_scale = true",
        "[default.weight]\ndtype = \"int4\"\nsymmetric = false\nsigned_scale = true",
        "[default.weight]\nsigned_scale = true\nnarrow_range = true",
        "[default.weight]\nsigned_scale = true",
        "[default.weight]\ndtype = \"int16\"\narithmetic = \"torch\"",
        "[default.weight]\narithmetic = \"torch\"\nround = \"floor\"",
        "[default.weight]\naccuracy_level = 4\nform = \"qdq\"",
        "[default.weight]\nmx_rounding = \"even\"",
        "preset = \"w4\"\n[default.weight]\ndtype = \"uint4\"\nsymmetric = false\narithmetic = \"tinygemm\"\nform = \"qdq\"",
        "preset = \"w4\"\n[default.weight]\ndtype = \"uint4\"\nsymmetric = false\narithmetic = \"tinygemm\"\n[algorithm]\nmethod = \"hqq\"",
        // What only two levels together get wrong.
        "[default.weight]\ndtype = \"float8e4m3fn\"\n[op_type.MatMul]\nweight.round = \"floor\"",
        "[default.weight]\ndtype = \"float8e4m3fn\"\n[op_type.MatMul]\nweight.narrow_range = true",
        "[default.weight]\ndtype = \"float8e4m3fn\"\n[op_type.MatMul]\nweight.symmetric = false",
        "[default.weight]\narithmetic = \"torch\"\n[op_type.MatMul]\nweight.round = \"floor\"",
        "[default.input]\ndynamic = true\n[op_type.MatMul]\ninput.observer = \"mse\"",
        "preset = \"w4\"\n[op_type.MatMul]\nweight.narrow_range = true",
        "preset = \"w4\"\n[algorithm]\nmethod = \"hqq\"\n[[postprocess]]\nmatch = \"fc1.weight\"\nscale = 0.5",
        "[algorithm]\nmethod = \"hqq\"",
        "[default.bias]\ndtype = \"int8\"",
        "[tensor.w2]\nscale = [0.5, 0.25]\nzero_point = [1, 2, 3]",
    ];
    // Formats of blocks are those of another target.
    let of_blocks = [
        "[default.input]\ndtype = \"mxfp8\"\ndynamic = false",
        "[default.input]\ndtype = \"mxfp8\"\ngranularity = \"per-tensor\"",
        "[default.input]\ndtype = \"mxfp8\"\nch_axis = 1",
        "[default.input]\ndtype = \"mxfp8\"\ngroup_size = 64",
        "[default.input]\ndtype = \"mxfp8\"\nobserver = \"mse\"",
        "[default.input]\ndtype = \"mxfp8\"\npostprocess = { scale = 0.5 }",
        "[default.input]\ndtype = \"mxfp8\"\nround = \"floor\"",
        "[default.input]\ndtype = \"mxfp8\"\nnarrow_range = true",
        "[default.input]\ndtype = \"mxfp8\"\nreduce_range = true",
        "[default.input]\ndtype = \"mxfp8\"\nsigned_scale = true",
        "[default.input]\ndtype = \"mxfp8\"\narithmetic = \"torch\"",
        "[op_type.MatMul]\noutput.dtype = \"mxfp8\"",
        "[default.input]\ndtype = \"mxfp8\"\n[op_type.MatMul]\ninput.granularity = \"per-tensor\"",
        "[default.input]\ndtype = \"mxfp8\"\n[op_type.MatMul]\ninput.group_size = 64",
        "[default.input]\ndtype = \"mxfp8\"\n[op_type.MatMul]\ninput.round = \"floor\"",
        "[default.input]\ndtype = \"mxfp8\"\n[op_type.MatMul]\ninput.narrow_range = true",
        "[default.input]\ndtype = \"mxfp8\"\n[op_type.MatMul]\ninput.reduce_range = true",
        "[default.weight]\ndtype = \"mxfp4\"\n[op_type.MatMul]\nweight.scale_dtype = \"float16\"",
        "[default.weight]\ndtype = \"mxfp4\"\n[op_type.MatMul]\nweight.group_size = 64",
        "[default.weight]\ndtype = \"mxfp4\"\n[op_type.MatMul]\nweight.symmetric = false",
        "[default.weight]\ndtype = \"mxint8\"\n[op_type.MatMul]\nweight.symmetric = false",
        "[default.weight]\ndtype = \"nvfp4\"\n[op_type.MatMul]\nweight.scale_type = \"power-of-two\"",
        "[default.weight]\ndtype = \"mxfp4\"\nscale_dtype = \"float16\"",
        "[default.weight]\ndtype = \"mxfp4\"\ngroup_size = 64",
        "[default.weight]\ndtype = \"mxfp4\"\nsymmetric = false",
        "[default.weight]\ndtype = \"mxfp4\"\neps = 1e-3",
        "[default.weight]\ndtype = \"nvfp4\"\nscale_type = \"power-of-two\"",
        "[default.weight]\ndtype = \"uint4\"\nscale_dtype = \"float8e8m0\"\ngranularity = \"per-group\"\ngroup_size = 16",
    ];
    let cases = cases.map(|text| ("ort-cpu", text)).into_iter().chain(of_blocks.map(|text| ("generic", text)));
    let mut out = String::new();
    for (target, text) in cases {
        let planned = Config::parse(text).and_then(|config| planned_for(target, &config, true));
        let error = planned.expect_err(text);
        writeln!(out, "{text}\n  -> {}\n", error.to_string().replace('\n', "\n     ")).unwrap();
    }
    crate::snapshot::check("data/configured/mistakes.txt", &out);
}

/// What was said of all formats is dropped where a later format has no use for it.
#[test]
fn a_later_format_drops_what_it_has_no_use_for() {
    let scheme = |target: &str, default: &str, dtype: &str| {
        let text = format!("{default}\n[op_type.MatMul]\nweight.dtype = \"{dtype}\"");
        let plan = Config::parse(&text).and_then(|config| planned_for(target, &config, true));
        let plan = plan.unwrap_or_else(|e| panic!("{text}: {e}"));
        plan.weights.iter().find(|w| w.site == "fc1.weight").unwrap().quantizer.clone()
    };
    let check = |target: &str, dtype: &str, defaults: &[&str]| {
        let plain = scheme(target, "", dtype);
        for default in defaults {
            assert_eq!(scheme(target, &format!("[default.weight]\n{default}"), dtype), plain, "{dtype}: {default}");
        }
    };
    let of_integers = ["round = \"floor\"", "narrow_range = true", "symmetric = false", "reduce_range = true"];
    check("ort-cpu", "float8e4m3fn", &of_integers);
    check("generic", "mxfp4", &of_integers);
    check("generic", "mxfp4", &["scale_dtype = \"float16\"", "scale_type = \"power-of-two\"", "eps = 1e-3"]);
    check("generic", "nvfp4", &["scale_type = \"power-of-two\""]);
    check("ort-cpu", "int2", &["reduce_range = true"]);
    check("ort-cpu", "int16", &["arithmetic = \"torch\""]);
}

/// A scale by hand without a zero point has that of its format.
#[test]
fn scales_by_hand_have_the_zero_point_of_their_format() {
    let check = |weight: &str, by_hand: &str, expected: i64| {
        let text =
            format!("[op_type.Gemm]\nweight = {{ granularity = \"per-tensor\", {weight} }}\n[tensor.w2]\n{by_hand}");
        let plan = planned(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let weight = plan.weights.iter().find(|w| w.tensor == "w2").unwrap();
        let given = serde_json::to_value(&weight.quantizer.given).unwrap();
        assert_eq!(given["scales"]["zero_points"][0], expected, "{text}: {given}");
    };
    check("dtype = \"uint8\", symmetric = true", "scale = 0.5", 128);
    check("dtype = \"uint4\", symmetric = true", "scale = 0.5", 8);
    check("dtype = \"uint8\", symmetric = false", "scale = 0.5", 0);
    check("dtype = \"int8\", symmetric = true", "scale = 0.5", 0);
    check("dtype = \"uint8\", symmetric = false", "scale = 0.5\nzero_point = 7", 7);
}

/// Zero points lie between codes where the form has room for such and something makes them.
#[test]
fn zero_points_are_fractional_where_they_can_be() {
    let check = |weight: &str, more: &str, expected: bool| {
        let text = format!("preset = \"w4\"\n[op_type.MatMul]\nweight = {{ {weight} }}\n{more}");
        let plan = planned(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let weight = plan.weights.iter().find(|w| w.site == "fc1.weight").unwrap();
        assert_eq!(weight.quantizer.float_zero_point, expected, "{text}");
    };
    let (hqq, asymmetric) =
        ("[algorithm]\nmethod = \"hqq\"", "dtype = \"uint4\", symmetric = false, signed_scale = false");
    let nbits = format!("{asymmetric}, form = \"matmulnbits\"");
    check(&nbits, hqq, true);
    check(&nbits, "", false);
    check(&nbits, "[algorithm]\nmethod = \"kquant\"", false);
    check(&format!("{nbits}, arithmetic = \"tinygemm\""), "", true);
    check(&format!("{asymmetric}, form = \"qdq\""), hqq, false);
    check("dtype = \"uint8\", symmetric = false, signed_scale = false, form = \"matmulnbits\"", hqq, false);
    check("dtype = \"uint4\", symmetric = true, signed_scale = false, form = \"matmulnbits\"", hqq, false);
    check("dtype = \"int4\", symmetric = false, signed_scale = false, form = \"matmulnbits\"", hqq, false);
}

#[test]
fn every_site_has_a_story() {
    let text = "preset = \"int8\"\nexclude = [\"fc3\"]\n\n[op_type.MatMul]\nweight.symmetric = false\n\n[[layer]]\nmatch = \"fc1\"\nweight = { dtype = \"int4\",\n  granularity = \"per-group\", group_size = 16 }\n";
    let config = Config::parse(text).unwrap();
    let target = Target::load("ort-cpu").unwrap();
    let model = prepared(&net());
    let plan = planned(text).unwrap();
    let found = explain(&model, &config, &target, &plan, &Pattern::new("*").unwrap()).unwrap();
    let mut out = String::new();
    for site in &found {
        writeln!(out, "{} ({}) {}", site.site, site.op, site.tensor).unwrap();
        for said in &site.rules {
            let keys: Vec<String> = said
                .changes
                .iter()
                .map(|c| format!("{} {} -> {}", c.key, c.from.as_deref().unwrap_or("unset"), c.to))
                .collect();
            writeln!(out, "  {}: {}", said.rule, keys.join(", ")).unwrap();
        }
        let outcome = match &site.outcome {
            Outcome::Float => "float".to_owned(),
            Outcome::Quantized { quantizer, dynamic, scale_of, .. } => {
                format!(
                    "{} {:?} dynamic {dynamic} scale of {scale_of:?}",
                    quantizer.dtype.name(),
                    quantizer.granularity
                )
            }
            Outcome::Bias { activation, weight } => format!("int32 at {activation} x {weight}"),
        };
        writeln!(out, "  = {outcome}: {}\n", site.why).unwrap();
    }
    crate::snapshot::check("data/configured/stories.txt", &out);
    // Nothing is quantized that no story tells of.
    let quantized = found.iter().filter(|s| matches!(s.outcome, Outcome::Quantized { .. })).count();
    assert!(quantized >= plan.activations.len() + plan.weights.len());
}

/// Levels with random keys: whatever is asked for is refused with a reason or becomes a plan that is sound.
#[test]
fn random_configurations_are_refused_or_planned() {
    let mut random = crate::plan::Random(7);
    let mut pick = |list: &[&str]| list[random.next() as usize % list.len()].to_owned();
    let model = prepared(&net());
    let (mut planned, mut refused) = (0, 0);
    for trial in 0..500 {
        let mut text = String::new();
        for _ in 0..=(trial % 4) {
            text += &pick(&[
                "[[layer]]\nmatch = \"*\"\n",
                "[[layer]]\nmatch = \"fc*\"\n",
                "[[layer]]\nmatch = \"conv\"\n",
                "[[layer]]\nmatch = \"sum\"\n",
                "[[layer]]\nmatch = \"re:act|flat|relu\"\n",
                "[[layer]]\nmatch = \"*.weight\"\n",
            ]);
            let kind = pick(&["input", "output", "weight", "weight", "bias"]);
            let dtype = pick(&["int4", "uint4", "int8", "uint8", "int16", "uint16", "float8e4m3fn", "int2"]);
            let keys = [
                format!("dtype = \"{dtype}\""),
                pick(&["symmetric = true", "symmetric = false"]),
                pick(&["enable = true", "enable = false"]),
                pick(&[
                    "granularity = \"per-tensor\"",
                    "granularity = \"per-group\", group_size = 16",
                    "granularity = \"per-channel\"",
                ]),
                pick(&[
                    "dynamic = true",
                    "narrow_range = true",
                    "reduce_range = true",
                    "round = \"floor\"",
                    "eps = 1e-5",
                ]),
            ];
            let wanted: Vec<String> = keys.into_iter().filter(|_| pick(&["", "x"]) == "x").collect();
            text += &format!("{kind} = {{ {} }}\n", wanted.join(", "));
        }
        for (target, calibrated) in [("ort-cpu", true), ("generic", true), ("tensorrt", true), ("ort-cpu", false)] {
            let profile = Target::load(target).unwrap();
            let known = Knowledge { calibrated, samples: calibrated, ..Knowledge::default() };
            match Config::parse(&text).and_then(|config| plan(&model, &config, &profile, &known)) {
                Ok(plan) => {
                    plan.check(&model, &profile).unwrap_or_else(|e| panic!("{target}\n{text}\n{e}"));
                    planned += 1;
                }
                Err(error) => {
                    assert!(
                        !error.message().is_empty() && error.kind() != amax::error::Kind::Internal,
                        "{text}{error}"
                    );
                    refused += 1;
                }
            }
        }
    }
    assert!(planned > 300 && refused > 300, "{planned} planned, {refused} refused");
}
