//! Plans, as text in and text out: `tests/plan/*.onnxtxt`.
//!
//! The snapshot of a fixture holds the plan for each target, and the model that onnxruntime's profile makes of it. What
//! onnxruntime fuses of such graphs is measured by `tests/differential/fusion.py`.

use std::fmt::Write as _;

use crate::snapshot;
use crate::support::{parsed, pass, root};
use amax::config::Config;
use amax::error::{Kind, Result};
use amax::ir::Model;
use amax::ir::text::{PrintOptions, print_with};
use amax::numerics::{Format, Granularity};
use amax::onnx::DataType;
use amax::ops::Form;
use amax::passes::recipes::{PREPARE, QUANTIZE};
use amax::plan::form::{gather_blocks, gather_fits, nbits_fits};
use amax::plan::{Knowledge, Mode, Plan, Readers, Slot, Veto, plan};
use amax::reason::Reason;
use amax::solve::{Solved, solve};
use amax::statistics::{SiteStatistics, Statistics};
use amax::targets::{Target, check};

/// The model of a fixture, ready to be planned.
pub fn prepared(text: &str) -> Model {
    ready(parsed(text))
}

/// A model as it is planned.
pub fn ready(mut model: Model) -> Model {
    pass(&mut model, &PREPARE.passes(), None).unwrap_or_else(|e| panic!("{e}"));
    model
}

fn knowledge(calibrated: bool) -> Knowledge {
    Knowledge { calibrated, samples: calibrated, ..Knowledge::default() }
}

/// Plans `model` and carries the plan out; all activations were seen between -1 and 3, or from 0 behind a Relu.
pub fn rewritten(mut model: Model, target: &Target, knowledge: &Knowledge) -> (Plan, Model) {
    let made = plan(&model, &Config::default(), target, knowledge).unwrap();
    let mut statistics = Statistics::default();
    for (name, activation) in &made.activations {
        if activation.mode == Mode::Static {
            let producer = model.producer_named(name);
            let relu = producer.is_some_and(|p| matches!(model.node(p).op_type(), "Relu" | "Clip"));
            let mut site = SiteStatistics::new();
            site.observe(0, &[if relu { 0.0 } else { -1.0 }, 3.0]);
            statistics.sites.insert(name.clone(), site);
        }
    }
    let solution = solve(&model, &made, Some(&statistics), &mut Solved::default()).unwrap_or_else(|e| panic!("{e}"));
    pass(&mut model, &QUANTIZE.passes(), Some((&made, &solution))).unwrap_or_else(|e| panic!("{e}"));
    (made, model)
}

fn slots(slots: &[Slot]) -> String {
    slots.iter().map(|s| format!("{}.{}", s.node, s.input)).collect::<Vec<_>>().join(" ")
}

/// The code of a reason and what people read.
fn said(why: &Reason) -> String {
    let document = serde_json::to_value(why).unwrap();
    assert_eq!(document["text"], why.to_string());
    format!("[{}] {why}", document["code"].as_str().unwrap())
}

/// A plan in few words: `name <scale of> format, readers`.
pub fn print(plan: &Plan) -> String {
    let mut out = String::new();
    for (name, a) in &plan.activations {
        let shared = if a.scale_of == *name { String::new() } else { format!(" at the scale of {}", a.scale_of) };
        let mode = if a.mode == Mode::Dynamic { " at run time" } else { "" };
        let fence = if a.fence { " behind a fence" } else { "" };
        let range = a.range.map_or(String::new(), |(low, high)| format!(" in [{low}, {high}]"));
        let symmetric = if a.quantizer.symmetric { " symmetric" } else { "" };
        let from = a.converts.as_ref().map_or(String::new(), |first| format!(" from {first}"));
        let readers = match &a.readers {
            Readers::All => "all".to_owned(),
            Readers::Listed(list) => slots(list),
        };
        let dtype = a.quantizer.dtype.name();
        writeln!(out, "  {name}: {dtype}{symmetric}{from}{mode}{shared}{range}{fence} -> {readers}: {}", said(&a.why))
            .unwrap();
    }
    for w in &plan.weights {
        let axis = match w.quantizer.granularity {
            Granularity::PerChannel { axis } => format!(" axis {axis}"),
            Granularity::PerGroup { axis, size } => {
                let turned = if w.transpose { " transposed" } else { "" };
                format!(" groups of {size} on axis {axis}{turned}")
            }
            Granularity::PerTensor => String::new(),
        };
        let gave_way = w.gave_way.as_ref().map_or(String::new(), |why| format!("; {}", said(why)));
        let pairs = w.pair_safe.map_or(String::new(), |order| format!(" pairs {order:?}"));
        writeln!(
            out,
            "  weight {} of {}: {}{axis}{pairs}: {}{gave_way}",
            w.tensor,
            slots(std::slice::from_ref(&w.at)),
            w.quantizer.dtype.name(),
            said(&w.why)
        )
        .unwrap();
    }
    for b in &plan.biases {
        let weight = &plan.weights[b.weight].site;
        let float = if b.float { ", stored as float" } else { "" };
        let at = slots(std::slice::from_ref(&b.at));
        writeln!(out, "  bias {} of {at}: {} x {weight}{float}", b.tensor, b.activation).unwrap();
    }
    for b in &plan.barriers {
        let at = slots(std::slice::from_ref(&b.at));
        writeln!(out, "  barrier for {:?} at {at}: {}", b.stop, said(&b.why)).unwrap();
    }
    if !plan.sums.is_empty() {
        writeln!(out, "  sums {}", plan.sums.join(" ")).unwrap();
    }
    for s in &plan.splits {
        writeln!(out, "  {} twice: {}", s.tensor, said(&s.why)).unwrap();
    }
    for s in &plan.skipped {
        let bytes = if s.bytes > 0 { format!(" ({} bytes)", s.bytes) } else { String::new() };
        writeln!(out, "  float {}{bytes}: {}", s.op, said(&s.why)).unwrap();
    }
    out
}

#[test]
fn fixtures_give_their_plans_and_what_is_made_of_them_is_right() {
    let folder = root("tests/plan");
    let mut fixtures: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    fixtures.retain(|path| path.extension().is_some_and(|e| e == "onnxtxt"));
    fixtures.sort();
    assert!(fixtures.len() > 25);
    for path in &fixtures {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(path).unwrap();
        let mut out = String::new();
        let mut first = None;
        for target in ["ort-cpu", "ort-cpu-vnni", "generic", "tensorrt", "ort-cpu without samples"] {
            let calibrated = !target.ends_with("samples");
            let profile = Target::load(target.split(' ').next().unwrap()).unwrap();
            let (plan, model) = rewritten(prepared(&text), &profile, &knowledge(calibrated));
            let mut found = check::violations(&model, &profile);
            found.retain(|violation| !check::violations(&prepared(&text), &profile).contains(violation));
            assert_eq!(found, Vec::<String>::new(), "{name} for {target}");
            let json = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan, "{name}: a plan survives being saved");
            if target == "ort-cpu-vnni" {
                // The two differ in nothing but the pairs.
                let pairs = |w: &&amax::plan::Weight| w.pair_safe.is_some();
                assert!(plan.weights.iter().find(pairs).is_none(), "{name}");
                assert_eq!(Some(&print(&plan)), first.as_ref().map(without_pairs).as_ref(), "{name}");
                continue;
            }
            writeln!(out, "{target}\n{}", print(&plan)).unwrap();
            if target == "ort-cpu" {
                out += &print_with(&model, &PrintOptions::portable());
                out.push('\n');
                first = Some(plan);
            }
        }
        snapshot::check(&format!("plan/snapshots/{name}.txt"), &out);
    }
}

/// The plan of ort-cpu as that of ort-cpu-vnni.
fn without_pairs(plan: &Plan) -> String {
    let json = serde_json::to_string(plan).unwrap().replace("\"ort-cpu\"", "\"ort-cpu-vnni\"");
    let mut plan: Plan = serde_json::from_str(&json).unwrap();
    plan.weights.iter_mut().for_each(|w| w.pair_safe = None);
    for split in &mut plan.splits {
        if let Reason::Differs { differences } = &mut split.why {
            differences.retain(|d| d.key != "pair_safe");
        }
    }
    print(&plan)
}

/// Zero points for a target that takes none, and pairs that lists of operators ask for.
#[test]
fn what_is_asked_of_operators_is_quantized_or_refused() {
    let model = prepared(include_str!("../plan/conv_relu_conv.onnxtxt"));
    let check = |target: &str, config: &str, wanted: std::result::Result<usize, &str>| {
        let target = Target::load(target).unwrap();
        let found = plan(&model, &Config::parse(config).unwrap(), &target, &knowledge(true));
        let pairs = found.as_ref().map(|plan| plan.activations.len()).map_err(|e| e.message().to_owned());
        match wanted {
            Ok(count) => assert_eq!(pairs, Ok(count), "{config}"),
            Err(why) => assert!(pairs.as_ref().is_err_and(|e| e.contains(why)), "{config}: {pairs:?}"),
        }
    };
    let zero = Err("tensorrt takes zero points of 0 only");
    check("tensorrt", "[default.input]\nsymmetric = false", zero);
    check("tensorrt", "[default.weight]\nsymmetric = false", zero);
    check("tensorrt", "[op_type.Conv.weight]\nsymmetric = false", zero);
    check("tensorrt", "[[layer]]\nmatch = \"*.input\"\ninput.symmetric = false", zero);
    check("tensorrt", "[tensor.x]\nscale = 0.5\nzero_point = 3", zero);
    check("tensorrt", "[tensor.x]\nscale = 0.5\nzero_point = 0", Ok(2));
    check("tensorrt", "[default.input]\nsymmetric = true", Ok(2));
    check("generic", "[default.input]\nsymmetric = false", Ok(3));
    let off = "[default]\noutput.enable = false\n";
    check("generic", &format!("{off}[[layer]]\nmatch = \"*\"\nop_type = [\"Conv\"]\ninput.enable = true"), Ok(2));
    check("generic", &format!("{off}[op_type.Conv]\ninput.enable = true"), Ok(2));
    check("generic", "preset = \"INT8_DEFAULT_CFG\"", Ok(2));
    check("generic", "preset = \"FP8_DEFAULT_CFG\"", Ok(2));
    check("ort-cpu", "preset = \"INT8_DEFAULT_CFG\"", Ok(0));
}

const TWO: &str = r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}> {
  a = Abs (x)
  m = MatMul (a, w)
  y = Add (m, b)
  z = Gemm (a, w, b)
}"#;

#[test]
fn a_badly_served_activation_is_quantized_at_run_time_where_that_fuses() {
    let model = prepared(TWO);
    let veto = |dynamic| Veto { why: Reason::LeftOut, dynamic };
    let check = |target: &str, dynamic: bool, expected: &str| {
        let mut known = knowledge(true);
        known.vetoes.insert("a".to_owned(), veto(dynamic));
        let profile = Target::load(target).unwrap();
        let (plan, quantized) = rewritten(model.clone(), &profile, &known);
        assert_eq!(print(&plan), expected);
        assert_eq!(check::violations(&quantized, &profile), Vec::<String>::new());
    };
    let float = "  float Abs: [unknown-operator] the operator is never quantized\n";
    // DynamicQuantizeLinear and a Gemm with a bias do not fuse, nor do they with a MatMul whose sum becomes a Gemm.
    let left = "[left-out] left out to measure others";
    let dynamic = format!(
        "  a: uint8 at run time -> m.0: {left}\n  weight w of m.1: int8 axis 1 pairs Along(0): \
         [integer-weight] weight of an integer MatMul\n  sums y\n"
    );
    let rest = format!(
        "  float Add (8 bytes): [not-between] not between quantized operators\n  float Gemm (24 bytes): {left}\n"
    );
    check("ort-cpu", true, &format!("{dynamic}{float}{rest}"));
    check("ort-cpu", false, &format!("{float}  float MatMul (16 bytes): {left}\n{rest}"));
}

/// A quantizer clips at zero only where zero is its least value, so a Relu stays in front of a symmetric one.
#[test]
fn a_relu_vanishes_only_into_an_asymmetric_quantizer() {
    let model = prepared(include_str!("../plan/conv_relu_conv.onnxtxt"));
    let check = |config: &str, before_relu: bool| {
        let config = Config::parse(config).unwrap();
        let plan = plan(&model, &config, &Target::load("ort-cpu").unwrap(), &knowledge(true)).unwrap();
        assert_eq!(plan.activations.contains_key("c"), before_relu, "{}", print(&plan));
    };
    check("", false);
    check("[default.output]\nsymmetric = false", false);
    check("[default.input]\nsymmetric = true\n[default.output]\nsymmetric = true", true);
}

/// Bodies are left alone: their floats are counted, at any depth, and nothing else of theirs.
#[test]
fn bodies_are_listed_with_the_bytes_of_their_floats() {
    let model = ready(parsed(
        r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x, bool c) => (float[2] y) {
  y = If (c) <
    then_branch = t () => (float[2] a) <float[2] w = {1, 2}, int64[1] k = {1}> {
      b = Add (x, w)
      a = If (c) <
        then_branch = u () => (float[2] d) <float[2] v = {3, 4}> { d = Mul (b, v) },
        else_branch = n () => (float[2] e) { e = Identity (b) }
      >
      f = Unsqueeze (b, k)
    },
    else_branch = o () => (float[2] h) <float[2] h = {5, 6}> { }
  >
}"#,
    ));
    let made = plan(&model, &Config::default(), &Target::load("ort-cpu").unwrap(), &knowledge(true)).unwrap();
    let found: Vec<(&str, u64)> = made.skipped.iter().map(|s| (s.op.as_str(), s.bytes)).collect();
    assert_eq!(found, [("If", 16)], "once, with all that its bodies read");
}

/// A further pair on a tensor gets a name that nothing has.
#[test]
fn names_of_pairs_are_free() {
    let text = |first: &str, second: &str| {
        format!(
            r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,2] x) => (float[2,2] y, float[2,2] z, float[2,2] u) <float[2,2] w = {{1, 2, 3, 4}}> {{
  [p] a = MatMul (x, w)
  [q] y = MatMul (a, w)
  [r] z = MatMul (a, w)
  [s] {first} = Abs (y)
  [t] {second} = Abs ({first})
  u = Neg ({second})
}}"#
        )
    };
    let config = Config::parse("[[layer]]\nmatch = \"r\"\ninput.dtype = \"uint16\"").unwrap();
    let check = |first: &str, second: &str, expected: &str| {
        let model = prepared(&text(first, second));
        let made = plan(&model, &config, &Target::load("ort-cpu").unwrap(), &knowledge(true)).unwrap();
        let pairs: Vec<&String> =
            made.activations.iter().filter(|(_, a)| a.tensor.as_deref() == Some("a")).map(|(name, _)| name).collect();
        assert_eq!(pairs, [expected], "{}", print(&made));
    };
    check("b", "c", "a_as_uint16");
    check("a_as_uint16", "c", "a_as_uint16_2");
    check("a_as_uint16", "a_as_uint16_2", "a_as_uint16_3");
}

/// What the model is given has no first pair that a second could start from.
#[test]
fn pairs_of_an_input_stand_side_by_side() {
    let model = prepared(
        r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {1, 2, 3, 4}> {
  [q] y = MatMul (x, w)
  [r] z = MatMul (x, w)
}"#,
    );
    let config = Config::parse("[[layer]]\nmatch = \"r\"\ninput.dtype = \"uint16\"").unwrap();
    let made = plan(&model, &config, &Target::load("ort-cpu").unwrap(), &knowledge(true)).unwrap();
    assert_eq!(made.activations["x_as_uint16"].tensor.as_deref(), Some("x"));
    assert!(made.activations.values().all(|a| a.converts.is_none()), "{}", print(&made));
}

/// Only what is added to a product joins its accumulator.
#[test]
fn only_an_add_gives_a_product_its_bias() {
    let check = |op: &str, biases: usize| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}, float[2] b = {{1, 2}}> {{\n  m = MatMul (x, w)\n  y = {op}\n}}"
        );
        let target = Target::load("ort-cpu").unwrap();
        let made = plan(&prepared(&text), &Config::default(), &target, &knowledge(true)).unwrap();
        assert_eq!((made.biases.len(), made.sums.len()), (biases, 0), "{op}: {}", print(&made));
        assert_eq!(made.weights.len(), 1, "{op}: {}", print(&made));
    };
    check("Add (m, b)", 1);
    check("Add (b, m)", 1);
    check("Sub (m, b)", 0);
    check("Mul (m, b)", 0);
    // What a body computes is its own.
    let body = "t () => (float[2,2] s) { s = Add (m, b) }";
    check(&format!("If (c) < then_branch = {body}, else_branch = e () => (float[2,2] r) {{ r = Identity (x) }} >"), 0);
}

/// A float product with its sum in front of a quantizer is kept from becoming an integer one by a fence.
#[test]
fn float_products_with_a_sum_are_fenced() {
    let text = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[1,2,2,2] x) => (float[1,8] y) <float[2,2,1,1] cw = {{1, 2, 3, 4}}, int64[2] shape = {{1, 8}}, float[8,8] w = {{{}}}, float[8] b = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{
  [conv] c = Conv (x, cw)
  f = Reshape (c, shape)
  [mid] m = MatMul (f, w)
  s = Add (m, b)
  [last] y = MatMul (s, w)
}}",
        (0..64).map(|at| (at % 7).to_string()).collect::<Vec<_>>().join(", ")
    );
    let model = prepared(&text);
    let check = |exclude: &str, fenced: bool| {
        let config = Config::parse(&format!("exclude = [{exclude}]")).unwrap();
        let made = plan(&model, &config, &Target::load("ort-cpu").unwrap(), &knowledge(true)).unwrap();
        assert_eq!(made.activations["s"].fence, fenced, "{exclude}: {}", print(&made));
    };
    check("", false);
    check("\"mid\"", true);
    check("\"mid\", \"conv\"", false);
}

/// Blocks of an input run along the sum, and fill it.
#[test]
fn blocks_of_an_input_fill_its_rows() {
    let config = Config::parse("[default.input]\ndtype = \"mxfp8\"\n[default.weight]\ndtype = \"mxfp8\"").unwrap();
    let check = |depth: usize, columns: usize, op: &str, why: Option<&str>| {
        let dims = if op.contains("transB = 1") { [columns, depth] } else { [depth, columns] };
        let input = if op.contains("transA = 1") { [depth, 2] } else { [2, depth] };
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[{}] x) => (float y) <float[{}] w = {{{}}}> {{\n  y = {op}\n}}",
            input.map(|d| d.to_string()).join(", "),
            dims.map(|d| d.to_string()).join(", "),
            vec!["1"; depth * columns].join(", ")
        );
        let target = Target::load("generic").unwrap();
        let made = plan(&prepared(&text), &config, &target, &knowledge(true)).unwrap();
        let said = made.skipped.iter().map(|s| said(&s.why)).chain(made.weights.iter().map(|w| said(&w.why)));
        let said = said.collect::<Vec<_>>().join("; ");
        assert_eq!(made.activations.len(), usize::from(why.is_none()), "{op} over {depth}: {}", print(&made));
        assert!(why.is_none_or(|why| said.contains(why)), "{op} over {depth}: {said}");
        // Edited, it is no plan any more.
        let edited = |edit: &dyn Fn(&mut amax::plan::Activation)| {
            let mut edited = made.clone();
            edited.activations.values_mut().for_each(edit);
            edited.check(&prepared(&text), &target).map_err(|e| e.message().to_owned())
        };
        let refused = "8-bit scales of activations require a dynamic range and groups along axis 1".to_owned();
        let expected = if why.is_none() { Err(refused) } else { Ok(()) };
        assert_eq!(edited(&|_| ()), Ok(()));
        assert_eq!(edited(&|a| a.mode = Mode::Static), expected);
        let across = Granularity::PerGroup { axis: 0, size: 32 };
        assert_eq!(edited(&|a| a.quantizer.granularity = across), expected);
    };
    check(64, 3, "MatMul (x, w)", None);
    check(33, 32, "MatMul (x, w)", Some("33"));
    check(64, 3, "Gemm <transB = 1> (x, w)", None);
    check(33, 32, "Gemm <transB = 1> (x, w)", Some("33"));
}

/// A table that an embedding and a product share is one where both read the same groups.
#[test]
fn a_tied_table_is_stored_once_where_its_groups_are_one() {
    let text = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (int64[2] i, float[2,64] x) => (float[2,64] e, float[2,4] y) <float[4,64] w = {{{}}}> {{\n  [table] e = Gather (w, i)\n  [head] y = Gemm <transB = 1> (x, w)\n}}",
        (0..256).map(|at| (at % 13).to_string()).collect::<Vec<_>>().join(", ")
    );
    let model = prepared(&text);
    let check = |more: &str, splits: usize| {
        let config = Config::parse(&format!("preset = \"w4\"\n{more}")).unwrap();
        let made = plan(&model, &config, &Target::load("ort-cpu").unwrap(), &knowledge(false)).unwrap();
        assert_eq!((made.weights.len(), made.splits.len()), (2, splits), "{more}: {}", print(&made));
    };
    let forms = "[op_type.Gather]\nweight = { dtype = \"int4\", signed_scale = true, form = \"gather-block-quantized\", granularity = \"per-group\", group_size = GATHER }\n\
                 [op_type.Gemm]\nweight = { form = \"matmulnbits\", granularity = \"per-group\", group_size = GEMM }";
    let sizes = |gather: &str, gemm: &str| forms.replace("GATHER", gather).replace("GEMM", gemm);
    check(&sizes("32", "32"), 0);
    check(&sizes("16", "32"), 1);
    check(&sizes("32", "32, signed_scale = false"), 1);
}

/// Rows of a table are slices along its first axis, however that is written.
#[test]
fn tables_are_stored_for_the_axis_that_is_read() {
    let check = |axis: i64, config: &str, expected: Option<Form>| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (int64[2] i) => (float y) <float[2,32] w = {{{}}}> {{\n  y = Gather <axis = {axis}> (w, i)\n}}",
            vec!["1"; 64].join(", ")
        );
        let config = Config::parse(config).unwrap();
        let made = plan(&prepared(&text), &config, &Target::load("ort-cpu").unwrap(), &knowledge(false)).unwrap();
        assert_eq!(made.weights.first().map(|w| w.form), expected, "axis {axis}: {}", print(&made));
    };
    let eight = "preset = \"w8\"\n[default]\nweight.form = \"gather-block-quantized\"";
    check(0, eight, Some(Form::GatherBlockQuantized));
    check(-2, eight, Some(Form::GatherBlockQuantized));
    check(1, eight, None);
    check(-1, eight, None);
}

#[test]
fn matrices_fit_the_kernels_of_their_forms() {
    let group = |axis, size| Granularity::PerGroup { axis, size };
    let channel = |axis| Granularity::PerChannel { axis };
    let all = Granularity::PerTensor;

    let product = |format, dims: &[usize], granularity, code: Option<&str>| {
        let found = nbits_fits(format, dims, &granularity, 0).err().map(|why| said(&why));
        let wanted = code.map(|code| format!("[{code}]"));
        let same = found.as_ref().map(|f| f.split(' ').next().unwrap()) == wanted.as_deref();
        assert!(same, "{format} {dims:?} {granularity:?}: {found:?}");
    };
    for format in [Format::Uint2, Format::Int4, Format::Uint4, Format::Int8, Format::Uint8] {
        product(format, &[64, 3], group(0, 32), None);
    }
    for format in [Format::Int16, Format::Uint16, Format::Int32, Format::Float8e4m3fn, Format::Float4e2m1] {
        product(format, &[64, 3], group(0, 32), Some("kernel-format"));
    }
    product(Format::Int4, &[64], all, Some("kernel-shape"));
    product(Format::Int4, &[1, 64, 3], all, Some("kernel-shape"));
    product(Format::Int4, &[64, 3], all, None);
    product(Format::Int4, &[64, 3], channel(1), None);
    product(Format::Int4, &[64, 3], channel(0), Some("kernel-scales"));
    product(Format::Int4, &[64, 3], group(1, 32), Some("kernel-scales"));
    for size in [16, 32, 64, 128, 256] {
        product(Format::Int4, &[64, 3], group(0, size), None);
    }
    for size in [8, 24, 48, 512] {
        product(Format::Int4, &[64, 3], group(0, size), Some("kernel-groups"));
    }

    let blocks = |dims: &[usize], granularity| gather_blocks(dims, &granularity).ok();
    assert_eq!(blocks(&[10], all), None);
    assert_eq!(blocks(&[10, 20], all), Some((1, 32)));
    assert_eq!(blocks(&[10, 3], all), Some((1, 16)));
    assert_eq!(blocks(&[10, 64], channel(0)), Some((1, 64)));
    assert_eq!(blocks(&[10, 64], channel(1)), None);
    assert_eq!(blocks(&[2, 10, 64], channel(0)), None);
    assert_eq!(blocks(&[10, 64], group(1, 16)), Some((1, 16)));
    assert_eq!(blocks(&[32, 64], group(0, 32)), Some((0, 32)));
    assert_eq!(blocks(&[10, 64], group(1, 8)), None);
    assert_eq!(blocks(&[10, 64], group(1, 24)), None);

    let bytes = |format, dims: &[usize], granularity, axis| gather_fits(format, dims, &granularity, axis).ok();
    assert_eq!(bytes(Format::Uint8, &[10, 33], all, 0), Some(true));
    assert_eq!(bytes(Format::Int4, &[10, 64], group(1, 16), 0), Some(true));
    assert_eq!(bytes(Format::Int4, &[10, 33], all, 0), Some(false));
    assert_eq!(bytes(Format::Int4, &[32, 64], group(0, 32), 0), Some(false));
    assert_eq!(bytes(Format::Uint4, &[10, 64], all, 1), Some(false));
    assert_eq!(bytes(Format::Uint8, &[10, 64], all, 1), None);
    assert_eq!(bytes(Format::Int2, &[10, 64], all, 0), Some(true));
    assert_eq!(bytes(Format::Int2, &[10, 33], all, 0), None);
    assert_eq!(bytes(Format::Int16, &[10, 64], all, 0), None);
}

#[test]
fn exclusions_are_kept_and_must_match() {
    let model = prepared(TWO);
    let target = Target::load("ort-cpu").unwrap();
    let config = |text: &str| Config::parse(&format!("exclude = [\"{text}\"]")).unwrap();
    let made = plan(&model, &config("*"), &target, &knowledge(true)).unwrap();
    assert!(made.activations.is_empty() && made.weights.is_empty() && made.sums.is_empty());
    let fails = |text: &str| -> Result<Plan> { plan(&model, &config(text), &target, &knowledge(true)) };
    assert_eq!(fails("nothing*").unwrap_err().kind(), Kind::Config);
}

/// Numbers that look random, the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// Roughly normal.
    fn normal(&mut self) -> f32 {
        (0..6).map(|_| (self.next() % 2001) as f32 / 1000.0 - 1.0).sum::<f32>()
    }

    fn list(&mut self, count: usize) -> String {
        (0..count).map(|_| format!("{:.4}", self.normal())).collect::<Vec<_>>().join(", ")
    }
}

/// How often the int16 sums of a u8 x s8 kernel of AVX2 saturate, over random activations and the worst ones.
fn saturations(rows: &[Vec<i8>], random: &mut Random) -> usize {
    let mut count = 0;
    for trial in 0..64 {
        let depth = rows[0].len();
        let x: Vec<i32> = (0..depth).map(|_| if trial == 0 { 255 } else { (random.next() % 256) as i32 }).collect();
        for row in rows {
            let pairs = row.chunks(2).zip(x.chunks(2));
            let sums = pairs.map(|(w, x)| w.iter().zip(x).map(|(&w, &x)| i32::from(w) * x).sum::<i32>());
            count += sums.filter(|&s| i16::try_from(s).is_err()).count();
        }
    }
    count
}

#[test]
fn integer_weights_do_not_saturate_pair_sums_by_brute_force() {
    let mut random = Random(1);
    let (depth, width) = (37, 12);
    let product = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[4,{depth}] x) => (float[4,{width}] y) <float[{depth},{width}] w = {{{}}}> {{\n  y = MatMul (x, w)\n}}",
        random.list(depth * width)
    );
    let conv = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[1,5,4,4] x) => (float[1,6,2,2] y) <float[6,5,3,3] w = {{{}}}> {{\n  y = Conv (x, w)\n}}",
        random.list(6 * 5 * 9)
    );
    for (text, dims) in [(product, [depth, width, 1, 1]), (conv, [6, 5, 3, 3])] {
        let rows_for = |target: &str| {
            let (_, model) = rewritten(prepared(&text), &Target::load(target).unwrap(), &knowledge(true));
            let codes = model.graph(model.main()).initializers().iter().find_map(|&v| {
                let tensor = model.constant(v)?;
                (tensor.dtype() == DataType::Int8 && tensor.len() > 64).then(|| tensor.raw().to_vec())
            });
            let codes: Vec<i8> = codes.expect("a weight is int8").iter().map(|&b| b as i8).collect();
            if dims[2] == 1 {
                (0..dims[1]).map(|n| (0..dims[0]).map(|k| codes[k * dims[1] + n]).collect()).collect::<Vec<Vec<i8>>>()
            } else {
                // Kernel positions outside, channels inside.
                let at = |o: usize, i: usize, k: usize| codes[(o * dims[1] + i) * 9 + k];
                (0..dims[0])
                    .map(|o| (0..9).flat_map(|k| (0..dims[1]).map(move |i| (k, i))).map(|(k, i)| at(o, i, k)).collect())
                    .collect()
            }
        };
        assert_eq!(saturations(&rows_for("ort-cpu"), &mut random), 0);
        assert!(saturations(&rows_for("ort-cpu-vnni"), &mut random) > 0, "the test can fail");
        let largest = |rows: &[Vec<i8>]| rows.iter().flatten().map(|w| w.unsigned_abs()).max();
        assert!(largest(&rows_for("ort-cpu")) > Some(64), "more than seven bits are used");
    }
}

#[test]
fn what_is_dequantized_keeps_its_scale_where_the_format_is_the_same() {
    let symmetric = "default.input = { dtype = \"int8\", symmetric = true }";
    let cases =
        [("uint8", 3, "", true), ("int8", 0, "", false), ("int8", 0, symmetric, true), ("int8", 3, symmetric, false)];
    for (format, zero, config, kept) in cases {
        let model = prepared(&format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>
            g ({format}[1,2,4,4] x) => (float[1,2,4,4] y)
            <float s = {{0.5}}, {format} z = {{{zero}}}, float[2,2,1,1] w = {{1, 2, 3, 4}}> {{
              f = DequantizeLinear (x, s, z)
              c = Conv (f, w)
              y = Relu (c)
            }}"
        ));
        let target = Target::load("ort-cpu").unwrap();
        let made = plan(&model, &Config::parse(config).unwrap(), &target, &knowledge(true)).unwrap();
        let given = made.activations.get("f").map(|f| f.quantizer.given.is_some());
        assert_eq!(given, Some(kept), "{format} {zero} {config}");
    }
}
