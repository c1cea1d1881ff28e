//! Forms of quantized constants: the same codes and scales, there and back.

use amax::convert::{Convert, Converted};
use amax::ir::text::parse;
use amax::ir::{Model, Tensor};
use amax::numerics::{Format, Granularity, QParams, Round, dequantize, pack, quantize};
use amax::onnx::DataType;
use amax::ops::Form;
use amax::passes::forms::{QuantizedTensor, ZeroPoints, find_dequantized};
use amax::passes::recipes::To;
use amax::passes::support::evaluate::Exact;
use amax::reason::Reason;
use amax::targets::Target;
use proptest::prelude::*;

fn converted(model: &Model, into: &[To]) -> amax::Result<Converted> {
    Convert::new(model).to(into).evaluate(&Exact).run()
}

const BITS: [(Format, usize); 6] = [
    (Format::Int2, 2),
    (Format::Uint2, 2),
    (Format::Int4, 4),
    (Format::Uint4, 4),
    (Format::Int8, 8),
    (Format::Uint8, 8),
];

/// A matrix with codes that are anything; of a granularity along or across its rows.
fn matrix() -> impl Strategy<Value = QuantizedTensor> {
    let share = prop_oneof![
        Just(Granularity::PerTensor),
        Just(Granularity::PerChannel { axis: 0 }),
        (4u32..9).prop_map(|log| Granularity::PerGroup { axis: 1, size: 1 << log }),
    ];
    (0usize..6, 1usize..9, 1usize..70, share, any::<bool>(), any::<u64>()).prop_map(
        |(at, rows, columns, share, zero, seed)| {
            let (format, bits) = BITS[at];
            let mut state = seed | 1;
            let mut random = move || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as u32
            };
            let dims = vec![rows, columns];
            let entries: usize = share.scale_dims(&dims).iter().product();
            let codes: Vec<u8> = (0..rows * columns).map(|_| (random() & ((1 << bits) - 1)) as u8).collect();
            let (low, high) = format.range();
            let signed_zero = zero && !format.is_signed();
            let zeros = (0..entries)
                .map(|_| if signed_zero { low + (random() % (high - low + 1) as u32) as i32 } else { 0 })
                .collect();
            QuantizedTensor {
                format,
                dims,
                granularity: share,
                scales: (0..entries).map(|_| f32::from_bits(0x3c00_0000 + random() % 0x0100_0000)).collect(),
                scale_dtype: DataType::Float,
                zero_points: ZeroPoints::Integers(zeros),
                tensor_scale: None,
                codes: pack::pack_bytes(&codes, bits).into(),
            }
        },
    )
}

/// A model that reads a matrix `[K, N]` in a product and `[V, D]` in a table.
fn model(constant: &QuantizedTensor, op: &str) -> Model {
    let pair = constant.to_qdq().unwrap();
    let text = match op {
        "MatMul" => {
            "<ir_version: 13, opset_import: [\"\" : 25]>\nm (float[2,K] x) => (float[2,N] y) {\n  y = MatMul (x, x)\n}"
        }
        _ => "<ir_version: 13, opset_import: [\"\" : 25]>\nm (int64[2] x) => (float[2,N] y) {\n  y = Gather (x, x)\n}",
    };
    let mut model = parse(text).unwrap();
    let (graph, node) = (model.main(), model.graph(model.main()).nodes()[0]);
    let codes = model.add_initializer(graph, "w_quantized", pair.codes.clone());
    let scale = model.add_initializer(graph, "w_scale", pair.scale.clone());
    let zero = model.add_initializer(graph, "w_zero_point", pair.zero_point.clone());
    let new = amax::ir::NewNode::new("DequantizeLinear", "dq", &[codes, scale, zero], &["w"]);
    let dq = model.insert(amax::ir::Place::Before(node), pair.describe(new));
    let weight = model.node(dq).output(0);
    model.set_input(node, usize::from(op == "MatMul"), weight);
    model
}

/// What the only product or Gather of a model reads.
fn constant_of(model: &Model, input: usize) -> QuantizedTensor {
    let nodes = model.graph(model.main()).nodes();
    let node = *nodes.iter().find(|&&n| !model.node(n).is("DequantizeLinear")).unwrap();
    let (dq, exchanged) = find_dequantized(model, model.node(node).input(input).unwrap()).unwrap();
    assert!(!exchanged);
    QuantizedTensor::from_qdq(model, dq).unwrap()
}

/// With the scales of a granularity written out for each element, so that two of them can be held against each other.
fn spread(constant: &QuantizedTensor) -> (Vec<i32>, Vec<u32>, Vec<i32>) {
    let middle = if constant.format.is_signed() { 0 } else { 1 << (constant.format.bits() - 1) };
    let codes = pack::unpack(&constant.codes, &constant.format, constant.len());
    let ZeroPoints::Integers(zeros) = &constant.zero_points else { panic!("floats") };
    let entry = |at| constant.granularity.entry(&constant.dims, at).unwrap();
    let all = 0..codes.len();
    let scales = all.clone().map(|at| constant.scales[entry(at)].to_bits()).collect();
    (codes.iter().map(|c| c - middle).collect(), scales, all.map(|at| zeros[entry(at)] - middle).collect())
}

proptest! {
    #![proptest_config(crate::random_cases(300))]

    #[test]
    fn products_come_back_as_they_were(constant in matrix()) {
        let stored = constant.transposed().unwrap();
        let there = converted(&model(&stored, "MatMul"), &[To::Form(Form::Matmulnbits)]).unwrap();
        prop_assert_eq!((there.changed.len(), there.kept.len()), (1, 0));
        let back = converted(&there.model, &[To::Form(Form::Qdq)]).unwrap();
        let back = constant_of(&back.model, 1);
        prop_assert_eq!(&back.format, &stored.format);
        prop_assert_eq!(spread(&back), spread(&stored));
        if matches!(stored.granularity, Granularity::PerGroup { .. }) && back.granularity == stored.granularity {
            prop_assert_eq!(back, stored);
        }
    }

    #[test]
    fn tables_come_back_as_they_were(constant in matrix()) {
        let there = converted(&model(&constant, "Gather"), &[To::Form(Form::GatherBlockQuantized)]).unwrap();
        let whole = (constant.dims[1] * constant.format.bits()).is_multiple_of(8);
        prop_assert_eq!(there.changed.len(), usize::from(whole || constant.format.bits() == 4));
        let back = converted(&there.model, &[To::Form(Form::Qdq)]).unwrap();
        let back = constant_of(&back.model, 0);
        prop_assert_eq!(&back.format, &constant.format);
        prop_assert_eq!(spread(&back), spread(&constant));
    }

    #[test]
    fn numbers_are_those_of_the_codes(constant in matrix()) {
        let ZeroPoints::Integers(zero_points) = constant.zero_points.clone() else { unreachable!() };
        let qparams = QParams { scales: constant.scales.clone(), zero_points };
        let expected = dequantize(&constant.codes, constant.format, &constant.dims, &constant.granularity, &qparams).unwrap();
        prop_assert_eq!(constant.values().unwrap(), expected.clone());
        let float = converted(&model(&constant, "Gather"), &[To::Float]).unwrap().model;
        let node = float.graph(float.main()).nodes()[0];
        prop_assert_eq!(float.constant_input(node, 0).and_then(Tensor::to_f32), Some(expected));
    }
}

#[test]
fn zero_points_between_codes_are_for_matmulnbits_alone() {
    let mut constant = QuantizedTensor {
        format: Format::Uint4,
        dims: vec![2, 16],
        granularity: Granularity::PerGroup { axis: 1, size: 16 },
        scales: vec![0.5, 0.25],
        scale_dtype: DataType::Float,
        zero_points: ZeroPoints::Floats(vec![7.5, 0.25]),
        tensor_scale: None,
        codes: pack::pack_bytes(&(0..32).map(|i| i % 16).collect::<Vec<_>>(), 4).into(),
    };
    let blocks = constant.to_nbits().unwrap();
    assert_eq!(blocks.zero_points.unwrap().to_f32(), Some(vec![7.5, 0.25]));
    let fractional = |op: &str| Reason::FractionalZeroPoints { op: op.to_owned() };
    assert_eq!(constant.to_qdq().unwrap_err(), fractional("DequantizeLinear"));
    assert_eq!(constant.to_gather(0).unwrap_err(), fractional("GatherBlockQuantized"));
    let values = constant.values().unwrap();
    assert_eq!((values[0], values[15], values[17]), (-3.75, 3.75, 0.1875));
    constant.format = Format::Uint8;
    constant.codes = vec![0; 32].into();
    assert_eq!(constant.to_nbits().unwrap_err(), fractional("MatMulNBits of 8 bits"));
}

#[test]
fn scales_keep_their_type() {
    let values: Vec<f32> = (0..64).map(|i| (i * 37 % 64) as f32 / 32.0 - 1.0).collect();
    let granularity = Granularity::PerGroup { axis: 1, size: 16 };
    let qparams = QParams::symmetric(vec![0.125, 0.25, 0.5, 1.0]);
    let raw = quantize(&values, &[2, 32], &granularity, &qparams, Format::Int4, Round::HalfEven).unwrap();
    let constant = QuantizedTensor {
        format: Format::Int4,
        dims: vec![2, 32],
        granularity,
        scales: qparams.scales,
        scale_dtype: DataType::Float16,
        zero_points: ZeroPoints::Integers(qparams.zero_points),
        tensor_scale: None,
        codes: raw.into(),
    };
    assert_eq!(constant.to_nbits().unwrap().scales.dtype(), DataType::Float16);
    assert_eq!(constant.to_gather(0).unwrap().scales.dtype(), DataType::Float16);
    assert_eq!(constant.to_qdq().unwrap().scale.dtype(), DataType::Float16);
}

#[test]
fn forms_that_exclude_each_other_are_refused() {
    let model = parse("<ir_version: 8, opset_import: [\"\" : 17]>\nm (float x) => (float y) { y = Abs (x) }").unwrap();
    let check = |into: &[To], fine: bool| assert_eq!(converted(&model, into).is_ok(), fine, "{into:?}");
    let [qdq, nbits, gather, integer, lstm] = Form::ALL.map(To::Form);
    check(&[], true);
    check(&[nbits, gather], true);
    check(&[integer, nbits, lstm, gather], true);
    check(&[qdq, integer], false);
    check(&[qdq], true);
    check(&[To::Float], true);
    check(&[qdq, nbits], false);
    check(&[To::Float, gather], false);
    check(&[To::Qoperator, nbits, gather], true);
    check(&[To::Qoperator, qdq], false);
    check(&[To::Float, To::Qoperator], false);
}

/// An embedding, a product, a transposed Gemm, and a convolution, none of them with more than the columns it needs.
const NET: &str = r#"<ir_version: 8, opset_import: ["" : 17]>
net (int64[2] i, float[1,2,8] x) => (float[2,6] y, float[1,2,8] z) <
  float[5,32] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2},
  float[8,32] even = {EVEN},
  float[32,6] odd = {ODD},
  float[2,2,1] kernel = {1, 2, 3, 4}
> {
  [embed] e = Gather (table, i)
  [fc1] m = Gemm <transB = 1> (e, even)
  [fc2] y = MatMul (e, odd)
  [conv] z = Conv (x, kernel)
}"#;

/// The plan of [`NET`] under a configuration: what each weight is stored as.
fn planned(target: &str, text: &str) -> Result<String, String> {
    let row = |n: usize| (0..n).map(|i| format!("{}", (i * 7 % 13) as i32 - 6)).collect::<Vec<_>>().join(", ");
    let model = parse(&NET.replace("EVEN", &row(256)).replace("ODD", &row(192))).unwrap();
    let config = amax::config::Config::parse(text).map_err(|e| e.to_string())?;
    let target = Target::load(target).unwrap();
    let knowledge = amax::plan::Knowledge::default();
    let plan = amax::plan::plan(&model, &config, &target, &knowledge).map_err(|e| e.message().to_owned())?;
    let line = |w: &amax::plan::Weight| {
        let level = w.accuracy_level.map(|l| format!(" {l}")).unwrap_or_default();
        format!("{} {}{level}", w.site.trim_end_matches(".weight"), w.form)
    };
    let mut lines: Vec<String> = plan.weights.iter().map(line).collect();
    lines.push(format!("set {}", plan.opset));
    Ok(lines.join(", "))
}

#[test]
fn the_planner_takes_the_form_that_fits() {
    let check = |target: &str, text: &str, expected: &str| {
        let found = planned(target, text).unwrap_or_else(|e| format!("error: {e}"));
        assert!(
            found == expected || (expected.ends_with('…') && found.starts_with(expected.trim_end_matches('…'))),
            "{text}\n  {found}"
        );
    };
    let ort = |text: &str, expected: &str| check("ort-cpu", text, expected);
    let groups = |bits: &str| {
        format!("[op_type.{{}}.weight]\ndtype = \"{bits}\"\ngranularity = \"per-group\"\ngroup_size = 16\n")
    };
    let [int2, int4] = ["int2", "int4"].map(|bits| {
        ["MatMul", "Gemm"].map(|op| groups(bits).replace("{}", op)).concat() + "[default.input]\nenable = false\n"
    });
    ort("", "fc1 qdq, fc2 qdq, conv qdq, set 17");
    ort("preset = \"w8\"", "embed gather-block-quantized, fc1 qdq, fc2 qdq, conv qdq, set 17");
    ort("preset = \"w4\"", "embed gather-block-quantized, fc1 qdq, fc2 qdq, conv qdq, set 21");
    check("generic", "preset = \"w8\"", "fc1 qdq, fc2 qdq, conv qdq, set 17");
    ort(&int4, "fc1 qdq, fc2 qdq, conv qdq, set 21");
    // Six columns of 2 bits are what onnxruntime fuses wrongly; eight are not.
    ort(&int2, "fc1 qdq, fc2 matmulnbits, conv qdq, set 25");
    ort(
        &format!("{int2}[[layer]]\nmatch = \"fc2\"\nweight.form = \"qdq\""),
        "error: [[layer]] \"fc2\", weight.form: ort-cpu computes…",
    );
    ort(&format!("{int2}[default.weight]\nform = \"qdq\""), "fc1 qdq, fc2 matmulnbits, conv qdq, set 25");
    // As bytes, no opset need know them.
    ort(
        &format!("{int4}[default.weight]\nform = \"matmulnbits\"\naccuracy_level = 1"),
        "fc1 matmulnbits 1, fc2 matmulnbits 1, conv qdq, set 17",
    );
    ort(
        "default.weight.form = \"gather-block-quantized\"",
        "embed gather-block-quantized, fc1 qdq, fc2 qdq, conv qdq, set 17",
    );
    ort("op_type.Gather.weight.enable = true", "embed gather-block-quantized, fc1 qdq, fc2 qdq, conv qdq, set 17");
    ort("op_type.Gather.weight = { enable = true, form = \"qdq\" }", "embed qdq, fc1 qdq, fc2 qdq, conv qdq, set 17");
    // What fits nothing: an error where it was asked for by name, else another form.
    let small = "weight = { granularity = \"per-group\", group_size = 8";
    ort(
        &format!("[op_type.MatMul]\n{small} }}\n[default.weight]\nform = \"matmulnbits\""),
        "fc1 matmulnbits, fc2 qdq, conv qdq, set 21",
    );
    ort(
        &format!("[op_type.MatMul]\n{small}, form = \"matmulnbits\" }}"),
        "error: [op_type.MatMul], weight.form: MatMulNBits has groups of…",
    );
    ort(
        "[op_type.Conv.weight]\nform = \"matmulnbits\"",
        "error: [op_type.Conv], weight.form: matmulnbits is not a form for Conv",
    );
    check(
        "generic",
        "[op_type.MatMul.weight]\nform = \"matmulnbits\"",
        "error: [op_type.MatMul], weight.form: generic has no matmulnbits",
    );
    ort(
        "[default.weight]\naccuracy_level = 1",
        "error: [default], weight.accuracy_level: only form = \"matmulnbits\" has accuracy levels",
    );
    ort("[default.weight]\nform = \"matmulnbit\"", "error: …");
    // Integer operators read what is quantized at run time, whatever is added behind them.
    ort("preset = \"int8-dynamic\"", "fc1 qdq, fc2 qdq, conv qdq, set 17");
    let dynamic = "preset = \"int8-dynamic\"\n";
    ort(
        &format!("{dynamic}default.weight.form = \"matmulinteger\""),
        "fc1 matmulinteger, fc2 matmulinteger, conv matmulinteger, set 17",
    );
    ort("default.weight.form = \"matmulinteger\"", "fc1 qdq, fc2 qdq, conv qdq, set 17");
    ort(
        "[op_type.MatMul.weight]\nform = \"matmulinteger\"",
        "error: [op_type.MatMul], weight.form: its input is not quantized at run time",
    );
    check(
        "generic",
        "[op_type.MatMul.weight]\nform = \"matmulinteger\"",
        "error: [op_type.MatMul], weight.form: generic has no matmulinteger",
    );
}

/// Two recurrent layers, one of them with weights that are not constant.
fn recurrent() -> Model {
    let row = |n: usize| (0..n).map(|i| format!("{}", (i * 7 % 13) as i32 - 6)).collect::<Vec<_>>().join(", ");
    parse(&format!(
        r#"<ir_version: 8, opset_import: ["" : 17]>
net (float[s,1,3] x, float[1,6,2] own) => (float[s,1,1,2] y, float[s,1,1,2] z, float[s,1,1,2] u) <
  float[1,8,3] w = {{{}}}, float[1,8,2] r = {{{}}}, float[1,6,3] v = {{{}}}, float[1,6,2] q = {{{}}}
> {{
  [lstm] y = LSTM <hidden_size = 2> (x, w, r)
  [gru] z = GRU <hidden_size = 2> (x, v, q)
  [loose] u = GRU <hidden_size = 2> (x, v, own)
}}"#,
        row(24),
        row(16),
        row(18),
        row(12)
    ))
    .unwrap()
}

#[test]
fn gates_are_stored_where_asked_for() {
    let model = recurrent();
    let check = |target: &str, text: &str, expected: &[&str]| {
        let config = amax::config::Config::parse(text).unwrap();
        let knowledge = amax::plan::Knowledge::default();
        let found = match amax::plan::plan(&model, &config, &Target::load(target).unwrap(), &knowledge) {
            Ok(plan) => plan.weights.iter().map(|w| format!("{} {} {}", w.site, w.tensor, w.form)).collect(),
            Err(error) => vec![error.message().to_owned()],
        };
        assert_eq!(found, expected, "{text}");
    };
    let gru = ["gru.weight v qdq", "gru.weight q qdq"];
    check("ort-cpu", "preset = \"w8\"", &gru);
    check("ort-cpu", "preset = \"w4\"", &gru);
    check("generic", "preset = \"int8-dynamic\"", &gru);
    check(
        "ort-cpu",
        "[op_type.LSTM.weight]\nenable = true\n[op_type.GRU.weight]\nenable = true",
        &["lstm.weight w qdq", "lstm.weight r qdq", "gru.weight v qdq", "gru.weight q qdq"],
    );
    let lowered = "default.weight.form = \"dynamic-quantize-lstm\"";
    let both = ["lstm.weight w dynamic-quantize-lstm", "lstm.weight r dynamic-quantize-lstm"];
    check("ort-cpu", lowered, &both);
    check("ort-cpu", "preset = \"int8-dynamic\"", &[both, gru].concat());
    check("generic", lowered, &[]);
    check(
        "ort-cpu",
        "[op_type.LSTM.weight]\nform = \"dynamic-quantize-lstm\"\ndtype = \"int4\"",
        &["[op_type.LSTM] sets how weights are quantized, but no matching weight is quantized"],
    );
    check(
        "ort-cpu",
        "[op_type.GRU.weight]\nform = \"dynamic-quantize-lstm\"\nenable = true",
        &["[op_type.GRU], weight.form: dynamic-quantize-lstm is not a form for GRU"],
    );
}

/// Without samples, a kernel that rounds its input takes no gates that this would move far.
#[test]
fn steep_gates_stay_float() {
    let target = Target::load("ort-cpu").unwrap();
    let check = |largest: f32, text: &str, calibrated: bool, quantized: bool| {
        let model = parse(&format!(
            r#"<ir_version: 8, opset_import: ["" : 17]>
net (float[s,1,2] x) => (float[s,1,1,1] y) <float[1,4,2] w = {{1, 2, 3, {largest}, 5, 6, 7, 8}}, float[1,4,1] r = {{1, 2, 3, 4}}> {{
  [lstm] y = LSTM <hidden_size = 1> (x, w, r)
}}"#
        ))
        .unwrap();
        let config = amax::config::Config::parse(text).unwrap();
        let knowledge = amax::plan::Knowledge { calibrated, ..amax::plan::Knowledge::default() };
        let plan = amax::plan::plan(&model, &config, &target, &knowledge).unwrap();
        assert_eq!(plan.weights.len(), if quantized { 2 } else { 0 }, "{largest}, {text}");
        let steep = plan.skipped.iter().any(|skip| matches!(skip.why, Reason::SteepGates { .. }));
        assert_eq!(steep, !quantized, "{:?}", plan.skipped);
    };
    let dynamic = "preset = \"int8-dynamic\"";
    check(43.0, dynamic, false, true);
    check(-44.0, dynamic, false, false);
    check(44.0, dynamic, true, true);
    check(44.0, &format!("{dynamic}\n[op_type.LSTM.weight]\nenable = true"), false, true);
}

/// Codes and scales of two directions, to the lowered form and back.
#[test]
fn gates_come_back_as_they_were() {
    for granularity in [Granularity::PerTensor, Granularity::PerChannel { axis: 1 }] {
        let entries = granularity.scale_dims(&[2, 8, 3]).iter().product::<usize>();
        let constant = QuantizedTensor {
            format: Format::Int8,
            dims: vec![2, 8, 3],
            granularity,
            scales: (0..entries).map(|i| 0.5 + i as f32).collect(),
            scale_dtype: DataType::Float,
            zero_points: ZeroPoints::Integers(vec![0; entries]),
            tensor_scale: None,
            codes: (0..48).collect(),
        };
        let there = constant.to_lstm().unwrap();
        assert_eq!(there.codes.dims(), [2, 3, 8]);
        assert_eq!(there.codes.raw()[..9], [0, 3, 6, 9, 12, 15, 18, 21, 1]);
        let mut mixed = constant.clone();
        mixed.zero_points = ZeroPoints::Integers((0..entries as i32).map(|i| i % 2).collect());
        assert_eq!(mixed.to_lstm().is_err(), entries > 1);
    }
}

/// Both weights of a recurrent operator are stored where that is asked for, a scale for each row of its gates.
#[test]
fn weights_of_recurrent_operators_are_stored_when_asked_for() {
    let row = |n: usize| (0..n).map(|i| format!("{}", (i * 7 % 13) as i32 - 6)).collect::<Vec<_>>().join(", ");
    let text = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\nnet (float[3,1,2] x) => (float[3,1,1,2] y) <float[1,6,2] w = {{{}}}, float[1,6,2] r = {{{}}}> {{\n  [gru] y = GRU <hidden_size = 2> (x, w, r)\n}}",
        row(12),
        row(12)
    );
    let model = parse(&text).unwrap();
    let planned = |text: &str| {
        let config = amax::config::Config::parse(text).unwrap();
        let knowledge = amax::plan::Knowledge::default();
        amax::plan::plan(&model, &config, &Target::load("ort-cpu").unwrap(), &knowledge).unwrap().weights
    };
    assert_eq!(planned("").len(), 0);
    for asked in ["[op_type.GRU]\nweight.enable = true", "preset = \"w8\""] {
        let weights = planned(asked);
        let found: Vec<_> = weights.iter().map(|w| (w.tensor.as_str(), w.quantizer.granularity, w.form)).collect();
        let rows = Granularity::PerChannel { axis: 1 };
        assert_eq!(found, [("w", rows, Form::Qdq), ("r", rows, Form::Qdq)], "{asked}");
    }
}

/// Inputs that DynamicQuantizeLinear keeps exactly give the same bits in both forms.
#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn the_runtime_reads_gates_in_both_forms() {
    struct Nothing;
    impl amax::runtime::Observe for Nothing {
        fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
    }
    let lowered = parse(
        r#"<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
net (float[3,1,2] x) => (float[3,2,1,1] y, float[2,1,1] last) <
  int8[2,2,4] w = {1, -2, 3, 4, -5, 6, 7, -8, 9, 10, -11, 12, 13, 14, 15, -16}, float[2,4] ws = {0.5, 0.25, 0.125, 1, 0.5, 0.25, 0.125, 1},
  int8[2,4] wz = {0, 0, 0, 0, 0, 0, 0, 0}, int8[2,1,4] r = {1, 2, -3, 4, 5, 6, 7, -8}, float[2] rs = {0.25, 0.25}, int8[2] rz = {0, 0}
> {
  y, last = com.microsoft.DynamicQuantizeLSTM <direction = "bidirectional", hidden_size = 1> (x, w, r, "", "", "", "", "", ws, wz, rs, rz)
}"#,
    )
    .unwrap();
    let raised = converted(&lowered, &[To::Form(Form::Qdq)]).unwrap().model;
    assert_eq!(raised.graph(raised.main()).nodes().len(), 3);
    let x = [0.0, 255.0, 1.0, 17.0, 128.0, 3.0].map(|code| code / 1024.0);
    let sample = std::collections::BTreeMap::from([("x".to_owned(), Tensor::from_f32(&[3, 1, 2], &x))]);
    let [first, second] = [&lowered, &raised].map(|model| {
        let observe: std::sync::Arc<dyn amax::runtime::Observe> = std::sync::Arc::new(Nothing);
        let outputs = amax::runtime::Session::new(model, &[]).unwrap().run(&sample, &observe).unwrap();
        outputs.iter().map(|(name, t)| (name.clone(), t.to_f32().unwrap())).collect::<Vec<_>>()
    });
    assert_eq!(first, second);
    assert!(first.iter().flat_map(|(_, values)| values).any(|v| v.abs() > 0.01));
}

/// A Relu or Clip goes where every number gets the code that it gets without, and only there.
#[test]
fn clips_go_where_their_quantizer_clips_alike() {
    let check = |clip: &str, bounds: (f32, f32), dtype: &str, scale: f32, zero: i32, goes: bool| {
        let text = format!(
            r#"<ir_version: 8, opset_import: ["" : 17]>
m ({dtype}[1,1,2] x) => ({dtype}[1,1,2] y) <
  float s = {{0.5}}, float t = {{{scale}}}, {dtype} z = {{{zero}}}, int8[1,1,1] w = {{3}}, int8 n = {{0}}, float low = {{{}}}, float high = {{{}}}
> {{
  a = DequantizeLinear (x, s, z)
  b = DequantizeLinear (w, s, n)
  c = Conv (a, b)
  d = {clip}
  y = QuantizeLinear (d, t, z)
}}"#,
            bounds.0, bounds.1
        );
        let (least, most) = if dtype == "int8" { (-128.0, 127.0) } else { (0.0, 255.0) };
        let code = |number: f32| ((number / scale).round_ties_even() + zero as f32).clamp(least, most);
        let mut numbers = (-40_000..40_000).map(|at| at as f32 * scale / 64.0);
        let alike = numbers.all(|x| code(x).to_bits() == code(x.max(bounds.0).min(bounds.1)).to_bits());
        assert_eq!(alike, goes, "{clip} {bounds:?} {dtype} {scale} {zero}");
        let done = converted(&parse(&text).unwrap(), &[To::Qoperator]).unwrap();
        let ops: Vec<_> = done.model.graph(done.model.main()).nodes().to_vec();
        let ops: Vec<&str> = ops.into_iter().map(|n| done.model.node(n).op_type()).collect();
        assert_eq!(ops == ["QLinearConv"], goes, "{clip} {bounds:?} {dtype} {scale} {zero}: {ops:?}");
        assert_eq!(done.kept.is_empty(), goes);
    };
    let (relu, clip) = ("Relu (c)", "Clip (c, low, high)");
    let all = f32::MAX;
    check(relu, (0.0, all), "uint8", 0.5, 0, true);
    check(relu, (0.0, all), "uint8", 0.5, 1, false);
    check(relu, (0.0, all), "int8", 0.5, -128, true);
    check(relu, (0.0, all), "int8", 0.5, 0, false);
    check(clip, (0.0, 6.0), "uint8", 6.0 / 255.0, 0, true);
    check(clip, (0.0, 6.0), "uint8", 6.0 / 250.0, 0, false);
    check(clip, (0.0, 6.0), "uint8", 6.0 / 300.0, 0, true);
    check(clip, (-1.0, 6.0), "uint8", 7.0 / 255.0, 36, true);
    check(clip, (0.0, 6.0), "int8", 6.0 / 255.0, -128, true);
    check(clip, (6.0, 6.0), "uint8", 6.0 / 255.0, 0, false);
    check(clip, (1.0, 6.0), "uint8", 6.0 / 255.0, 0, false);
}

/// A bias in floats gets the codes that onnxruntime 1.31 gives it where it fuses: one division in float32, ties to even.
/// `tests/differential/qoperator.py` compares many more.
#[test]
fn biases_in_floats_are_quantized_as_onnxruntime_does() {
    let check = |kind: &str, bias: f32, (sx, sw): (f32, f32), code: Option<i64>| {
        let (shape, node) = match kind {
            "Conv" => ("1,1,2", "Conv (a, b, c)"),
            "Gemm" => ("2,1", "Gemm (a, b, c)"),
            _ => ("2,1", "Add (c, m)"),
        };
        let weight = if kind == "Conv" { "1,1,1" } else { "1,1" };
        let product = if kind == "Add" { "m = MatMul (a, b)" } else { "" };
        let text = format!(
            r#"<ir_version: 8, opset_import: ["" : 17]>
m (uint8[{shape}] x) => (uint8[{shape}] y) <
  float s = {{{sx:?}}}, float t = {{{sw:?}}}, uint8 z = {{128}}, int8[{weight}] w = {{3}}, float[1] c = {{{bias:?}}}
> {{
  a = DequantizeLinear (x, s, z)
  b = DequantizeLinear (w, t)
  {product}
  d = {node}
  y = QuantizeLinear (d, s, z)
}}"#
        );
        let done = converted(&parse(&text).unwrap(), &[To::Qoperator]).unwrap();
        let codes = done.model.value_named("c_quantized").and_then(|v| done.model.constant(v));
        let found = codes.filter(|c| c.dtype() == amax::onnx::DataType::Int32).and_then(Tensor::to_i64);
        assert_eq!(found, code.map(|code| vec![code]), "{kind} {bias} {sx} {sw}");
        let changes = done.changed.iter().map(|n| n.what.to_string());
        let texts: Vec<String> = changes.chain(done.kept.iter().map(|n| n.what.to_string())).collect();
        let op = if kind == "Conv" { "QLinearConv" } else { "QGemm" };
        let said = match code {
            Some(_) => format!("written as {op}, with its bias quantized to int32"),
            None => "its bias \"c\" at the scale of the products overflows int32".to_owned(),
        };
        assert_eq!(texts, [said], "{kind} {bias} {sx} {sw}");
    };
    for kind in ["Conv", "Gemm", "Add"] {
        check(kind, 1.25, (0.5, 0.25), Some(10));
        // Ties.
        check(kind, 0.3125, (0.5, 0.25), Some(2));
        check(kind, -0.4375, (0.5, 0.25), Some(-4));
        // In float64 these are 2643, 2527, -141 and -1765: the quotient in float32 is a tie.
        check(kind, 0.017_714_806, (0.0371, 0.000_180_695_57), Some(2642));
        check(kind, 0.048_119_9, (0.0371, 0.000_513_371_2), Some(2526));
        check(kind, -0.133_031_26, (0.0371, 0.025_340_98), Some(-142));
        check(kind, -0.365_365_62, (0.0371, 0.005_578_097_4), Some(-1766));
        // The ends of int32.
        check(kind, -268_435_456.0, (0.5, 0.25), Some(-2_147_483_648));
        check(kind, 268_435_440.0, (0.5, 0.25), Some(2_147_483_520));
        check(kind, 268_435_456.0, (0.5, 0.25), None);
        check(kind, -268_435_490.0, (0.5, 0.25), None);
        check(kind, 1.0, (1e-30, 1e-30), None);
    }
    let scales = r#"<ir_version: 8, opset_import: ["" : 17]>
m (uint8[1,1,2] x) => (uint8[1,2,2] y) <
  float s = {0.5}, float[3] t = {0.5, 0.5, 0.5}, uint8 z = {128}, int8[2,1,1] w = {3, 4}, float[2] c = {1, 2}
> {
  a = DequantizeLinear (x, s, z)
  b = DequantizeLinear <axis = 0> (w, t)
  d = Conv (a, b, c)
  y = QuantizeLinear (d, s, z)
}"#;
    let refused = parse(scales).unwrap_err();
    assert!(refused.message().contains("the scales \"t\" of shape [3] for axis 0, which has length 2"), "{refused}");
}

/// Operators on codes become what they were made of, with the same codes and scales.
#[test]
fn operators_on_codes_come_back() {
    let model = parse(
        r#"<ir_version: 8, opset_import: ["" : 17]>
m (float[2,3] x) => (float[2,2] y) <
  float s = {0.5}, uint8 z = {128}, float t = {0.25}, int8[2,3] w = {1, -2, 3, -4, 5, -6}, float[2] ws = {0.5, 0.25}, int8[2] wz = {0, 0},
  int32[2] q = {8, 16}, float[2] qs = {0.25, 0.125}
> {
  a = QuantizeLinear (x, s, z)
  b = DequantizeLinear (a, s, z)
  c = DequantizeLinear <axis = 0> (w, ws, wz)
  d = DequantizeLinear <axis = 0> (q, qs)
  e = Gemm <transB = 1> (b, c, d)
  f = QuantizeLinear (e, t, z)
  y = DequantizeLinear (f, t, z)
}"#,
    )
    .unwrap();
    let operators = |model: &Model| -> Vec<String> {
        let nodes = model.graph(model.main()).nodes();
        nodes.iter().map(|&n| model.node(n).op_type().to_owned()).collect()
    };
    let constants = |model: &Model| -> std::collections::BTreeMap<String, Vec<u8>> {
        let names = model.graph(model.main()).initializers().iter();
        names.map(|&v| (model.value(v).name().to_owned(), model.constant(v).unwrap().raw().to_vec())).collect()
    };
    let there = converted(&model, &[To::Qoperator]).unwrap();
    assert_eq!(operators(&there.model), ["QuantizeLinear", "QGemm", "DequantizeLinear"]);
    assert_eq!(there.model.domain_version("com.microsoft"), Some(1));
    assert!(there.kept.is_empty(), "{:?}", there.kept);
    let back = converted(&there.model, &[To::Form(Form::Qdq)]).unwrap().model;
    assert_eq!(operators(&back).len(), operators(&model).len());
    let mut held = constants(&back);
    // The scale of the bias was not in the file on the way.
    let scale = held.remove("q_scale").unwrap();
    held.insert("qs".to_owned(), scale);
    assert_eq!(held, constants(&model));
    let float = converted(&there.model, &[To::Float]).unwrap().model;
    assert_eq!(operators(&float), ["Gemm"]);
}

/// A form that nothing can have is answered with what is missing.
#[test]
fn a_form_that_nothing_can_have_is_said() {
    let check = |body: &str, form: Form, served: bool| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[4, 4] x, int64[2] i) => (float y) <
                int8[4, 4] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}}, float s = {{0.5}}, uint8 z = {{128}}> {{ {body} }}"
        );
        let done = converted(&parse(&text).unwrap(), &[To::Form(form)]).unwrap();
        let missing = |note: &amax::passes::Note<Reason>| matches!(&note.what, Reason::NothingToStore { form: named, .. } if named == form.name());
        assert_eq!(
            done.kept.iter().filter(|note| missing(note)).count(),
            usize::from(!served),
            "{body}: {:?}",
            done.kept
        );
    };
    let float = "y = Relu (x)";
    let product = "d = DequantizeLinear (w, s) y = MatMul (x, d)";
    let table = "d = DequantizeLinear (w, s) y = Gather (d, i)";
    for form in Form::ALL {
        check(float, form, false);
    }
    check(product, Form::Matmulnbits, true);
    check(product, Form::GatherBlockQuantized, false);
    check(product, Form::Matmulinteger, false);
    check(product, Form::DynamicQuantizeLstm, false);
    check(table, Form::GatherBlockQuantized, true);
    check(table, Form::Matmulnbits, false);
    let both =
        "q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) d = DequantizeLinear (w, s) y = MatMul (a, d)";
    check(both, Form::Matmulnbits, false);
}
