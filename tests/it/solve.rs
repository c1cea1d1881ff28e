//! Numbers for plans: scales, zero points and codes of constants, and of the pairs on activations, from the plan document to
//! the tensors of the finished model.

#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    clippy::needless_pass_by_value,
    reason = "a test that cannot go on has failed, bits are compared, and JSON is written in place"
)]

use amax::config::Guard;
use amax::error::{Kind, Result};
use amax::ir::text::parse;
use amax::ir::{Model, Tensor};
use amax::numerics::{Format, Granularity, QParam, QParams, dequantize, pack};
use amax::onnx::DataType;
use amax::passes::recipes::QUANTIZE;
use amax::plan::Plan;
use amax::solve::{Solution, Solved, guard, solve};
use amax::statistics::{SiteStatistics, Statistics};
use amax::targets::{Target, check};
use serde_json::{Value, json};

use crate::support::{numbers, pass, root, vectors};

/// The model that a plan makes.
fn applied(model: &Model, plan: &Plan, solution: &Solution) -> Result<Model> {
    let mut model = model.clone();
    pass(&mut model, &QUANTIZE.passes(), Some((plan, solution)))?;
    Ok(model)
}

fn integers(value: &Value) -> Vec<i32> {
    value.as_array().unwrap().iter().map(|v| i32::try_from(v.as_i64().unwrap()).unwrap()).collect()
}

fn extents(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|v| usize::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

fn list<T: std::fmt::Display>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A plan of some activations, weights and biases.
fn planned(opset: i64, activations: &Value, weights: &Value, biases: &Value) -> Plan {
    let plan = json!({
        "schema": amax::plan::SCHEMA, "target": "ort-cpu", "opset": opset, "activations": activations,
        "weights": weights, "biases": biases, "skipped": [],
    });
    serde_json::from_value(plan).unwrap_or_else(|e| panic!("{e}"))
}

/// The opset and IR version that a format and granularity need.
fn need(format: Format, granularity: Granularity) -> (i64, i64) {
    let types = match format {
        Format::Int2 | Format::Uint2 => (25, 13),
        Format::Float4e2m1 => (23, 11),
        Format::Int4 | Format::Uint4 | Format::Int16 | Format::Uint16 => (21, 10),
        Format::Float8e4m3fn | Format::Float8e5m2 => (19, 9),
        _ => (13, 7),
    };
    if matches!(granularity, Granularity::PerGroup { .. }) { types.max((21, 10)) } else { types }
}

/// A weight through the whole line.
struct Stored {
    solution: Solution,
    codes: Vec<i32>,
}

/// Solves and stores one constant, and checks everything about how it is stored.
fn stored(dims: &[usize], values: &[f32], weight: &Value) -> Result<Stored> {
    let transpose = weight["transpose"] == true;
    let op = if transpose { "Gemm <transB = 1> (x, w)" } else { "Add (x, w)" };
    let text = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[n,m] x) => (float[n,m] y) <float[{}] w = {{{}}}> {{\n  y = {op}\n}}",
        list(dims),
        list(values)
    );
    let model = parse(&text).unwrap_or_else(|e| panic!("{e}:\n{text}"));
    let mut weight = weight.clone();
    let fields = weight.as_object_mut().unwrap();
    for (key, value) in [("site", json!("y.weight")), ("tensor", json!("w")), ("why", json!({"code": "not-asked"}))] {
        fields.insert(key.to_owned(), value);
    }
    fields.insert("at".to_owned(), json!({"node": "y", "input": 1}));
    let mut plan = planned(17, &json!({}), &json!([weight]), &json!([]));
    let quantizer = plan.weights[0].quantizer.clone();
    let (format, granularity) = (quantizer.dtype, quantizer.granularity);
    let (opset, ir) = need(format, granularity);
    plan.opset = opset.max(17);
    let solution = solve(&model, &plan, None, &mut Solved::default())?;
    let made = applied(&model, &plan, &solution)?;
    assert!(made.ir_version() >= ir);
    // The planner would not have asked for 2 bits in so few columns.
    let mut target = Target::load("ort-cpu").unwrap();
    target.two_bit_columns = 1;
    assert_eq!(check::violations(&made, &target), Vec::<String>::new());

    let reader = made.producer(made.value_named("y").unwrap()).unwrap();
    assert_eq!(made.node(reader).int("transB"), None);
    let dequantize_node = made.producer(made.node(reader).input(1).unwrap()).unwrap();
    let [codes, scale, zero] = [0, 1, 2].map(|i| made.constant_input(dequantize_node, i).unwrap());
    let dims: Vec<usize> = if transpose { dims.iter().rev().copied().collect() } else { dims.to_vec() };
    let attributes = ["axis", "block_size"].map(|name| made.node(dequantize_node).int(name));
    let expected = match granularity {
        Granularity::PerTensor => [None, None],
        Granularity::PerChannel { axis } => [Some(axis as i64), None],
        Granularity::PerGroup { axis, size } => [Some(axis as i64), Some(size as i64)],
    };
    assert_eq!(attributes, expected);
    assert_eq!((codes.dims(), codes.dtype()), (dims.clone(), DataType::from(format)));
    assert_eq!((scale.dims(), scale.dtype()), (granularity.scale_dims(&dims), DataType::Float));
    assert_eq!((zero.dims(), zero.dtype()), (scale.dims(), DataType::from(format)));
    let QParams { scales, zero_points } = &solution.weights[0].tensor().qparams();
    assert_eq!(scale.to_f32().as_ref(), Some(scales));
    assert_eq!(&pack::unpack(&zero.raw(), &format, zero.len()), zero_points);
    let found = pack::unpack(&codes.raw(), &format, codes.len());

    // The reported quality is that of what is stored.
    let back = dequantize(&codes.raw(), format, &dims, &granularity, &solution.weights[0].tensor().qparams()).unwrap();
    let source: Vec<f32> = if transpose {
        let columns = dims[0];
        (0..values.len()).map(|at| values[at % dims[1] * columns + at / dims[1]]).collect()
    } else {
        values.to_vec()
    };
    let db = amax::numerics::metrics::sqnr_db(&source, &back);
    assert!(db == solution.weights[0].sqnr_db() || (db - solution.weights[0].sqnr_db()).abs() < 1e-9);
    Ok(Stored { solution, codes: found })
}

#[test]
fn constants_become_what_numpy_makes_of_them() {
    let file = vectors("solve.json");
    for case in file["cases"].as_array().unwrap() {
        let input = &file["inputs"][case["x"].as_str().unwrap()];
        let (dims, values) = (extents(&input["dims"]), numbers(&input["values"]));
        let weight = json!({"quantizer": case["quantizer"], "transpose": case["transpose"] == true});
        let stored = stored(&dims, &values, &weight).unwrap_or_else(|e| panic!("{e}: {case}"));
        let QParams { scales, zero_points } = &stored.solution.weights[0].tensor().qparams();
        assert_eq!(scales, &numbers(&case["scales"]), "{case}");
        assert_eq!(zero_points, &integers(&case["zero_points"]), "{case}");
        assert_eq!(stored.codes, integers(&case["q"]), "{case}");
    }
}

/// Counts the codes that differ; each must come from a quotient on the edge between the two.
fn near_ties(found: &[i32], expected: &[i32], quotient: impl Fn(usize) -> f32, case: &Value) -> usize {
    let differs = (0..found.len()).filter(|&at| found[at] != expected[at]);
    differs
        .inspect(|&at| {
            let exact = f64::from(quotient(at));
            let edge = (exact - exact.floor() - 0.5).abs();
            assert!((found[at] - expected[at]).abs() == 1 && edge < 1e-5, "{at}: {exact} {case}");
        })
        .count()
}

fn entry(dims: &[usize], case: &Value, at: usize) -> usize {
    let granularity: Granularity = serde_json::from_value(case["granularity"].clone()).unwrap();
    granularity.entry(dims, at).unwrap()
}

#[test]
fn torchao_chooses_the_same() {
    let file = vectors("torchao.json");
    let (mut cases, mut ties) = (0, 0);
    for case in file["cases"].as_array().unwrap() {
        let symmetric = match case["mapping"].as_str().unwrap() {
            "SYMMETRIC" => true,
            "ASYMMETRIC" => false,
            // A convention that no scheme has.
            _ => continue,
        };
        let (dims, values) = (extents(&case["dims"]), numbers(&file["inputs"][case["x"].as_str().unwrap()]));
        let quantizer = json!({
            "dtype": case["format"], "symmetric": symmetric, "granularity": case["granularity"],
            "eps": f32::MIN_POSITIVE,
        });
        let stored = stored(&dims, &values, &json!({"quantizer": quantizer})).unwrap_or_else(|e| panic!("{e}: {case}"));
        let QParams { scales, zero_points } = &stored.solution.weights[0].tensor().qparams();
        assert_eq!(scales, &numbers(&case["scales"]), "{case}");
        assert_eq!(zero_points, &integers(&case["zero_points"]), "{case}");
        // It multiplies by the reciprocal.
        let quotient = |at: usize| values[at] / scales[entry(&dims, case, at)];
        ties += near_ties(&stored.codes, &integers(&case["q"]), quotient, case);
        cases += 1;
    }
    assert_eq!((cases, ties), (25, 10));
}

/// With its own arithmetic every code is the same, also those that are almost between two.
#[test]
fn torchao_makes_the_same_codes() {
    let file = vectors("torchao.json");
    let mut cases = 0;
    for case in file["cases"].as_array().unwrap() {
        let symmetric = match case["mapping"].as_str().unwrap() {
            "SYMMETRIC" => true,
            "ASYMMETRIC" => false,
            _ => continue,
        };
        let (dims, values) = (extents(&case["dims"]), numbers(&file["inputs"][case["x"].as_str().unwrap()]));
        let quantizer = json!({
            "dtype": case["format"], "symmetric": symmetric, "granularity": case["granularity"], "arithmetic": "torch",
        });
        let stored = stored(&dims, &values, &json!({"quantizer": quantizer})).unwrap_or_else(|e| panic!("{e}: {case}"));
        let QParams { scales, zero_points } = &stored.solution.weights[0].tensor().qparams();
        assert_eq!(scales, &numbers(&case["scales"]), "{case}");
        assert_eq!(zero_points, &integers(&case["zero_points"]), "{case}");
        assert_eq!(stored.codes, integers(&case["q"]), "{case}");
        cases += 1;
    }
    assert_eq!(cases, 25);
}

/// What its fake quantizers and its tensors of whole layers hold: least scales, reduced ranges, floats of 8 bits.
#[test]
fn torchao_makes_the_same_numbers() {
    let cases = vectors("torchao_fake.json");
    for case in cases.as_array().unwrap() {
        let (name, dims, values) = (&case["name"], extents(&case["dims"]), numbers(&case["x"]));
        let quantizer = &case["quantizer"];
        let stored = stored(&dims, &values, &json!({"quantizer": quantizer})).unwrap_or_else(|e| panic!("{e}: {name}"));
        let qparams = &stored.solution.weights[0].tensor().qparams();
        let mut held = 0;
        let mut held_to = |key: &str, check: &dyn Fn(&Value)| {
            if let Some(expected) = case.get(key) {
                check(expected);
                held += 1;
            }
        };
        held_to("scales", &|expected| assert_eq!(qparams.scales, numbers(expected), "{name}"));
        held_to("zero_points", &|expected| assert_eq!(qparams.zero_points, integers(expected), "{name}"));
        held_to("q", &|expected| assert_eq!(stored.codes, integers(expected), "{name}"));
        held_to("fq", &|expected| {
            let granularity = serde_json::from_value(quantizer["granularity"].clone()).unwrap();
            let format = Format::parse(quantizer["dtype"].as_str().unwrap()).unwrap();
            let codes = pack::pack(&stored.codes, format.bits());
            assert_eq!(dequantize(&codes, format, &dims, &granularity, qparams).unwrap(), numbers(expected), "{name}");
        });
        assert!(held > 0, "{name}");
    }
    assert_eq!(cases.as_array().unwrap().len(), 19);
}

/// onnxruntime's kernels that quantize for `MatMulNBits`, bit for bit, with their negative scales and those of zero.
#[test]
fn onnxruntime_makes_the_same_codes() {
    let file = vectors("blocks.json");
    for case in file["cases"].as_array().unwrap() {
        let input = &file["inputs"][case["x"].as_str().unwrap()];
        let (dims, values) = (extents(&input["dims"]), numbers(&input["values"]));
        let quantizer = json!({
            "dtype": case["dtype"], "symmetric": case["symmetric"], "signed_scale": case["symmetric"],
            "arithmetic": case["arithmetic"], "granularity": {"per-group": {"axis": 0, "size": case["size"]}},
        });
        let stored = stored(&dims, &values, &json!({"quantizer": quantizer})).unwrap_or_else(|e| panic!("{e}: {case}"));
        let QParams { scales, zero_points } = &stored.solution.weights[0].tensor().qparams();
        let bits = |scales: &[f32]| scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(scales), bits(&numbers(&case["scales"])), "{case}");
        assert_eq!(zero_points, &integers(&case["zero_points"]), "{case}");
        assert_eq!(stored.codes, integers(&case["q"]), "{case}");
    }
}

/// Groups far from zero, whose zero points no code could be: what the finished operator multiplies with is half a step from
/// the weight at most, where the plan has such zero points, and the signs of all this survive the transpose of the weight.
#[test]
fn zero_points_between_codes_reach_the_operator() {
    let check = |quantizer: Value, floats: bool| {
        let (rows, columns) = (64, 3);
        let value = |at: usize| ((at * 37 % 64) as f32) / 64.0 + 3.0 - 2.5 * (at % columns) as f32;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[n,64] x) => (float[n,3] y) <float[64,3] w = {{{}}}> {{\n  y = MatMul (x, w)\n}}",
            list(&values)
        );
        let model = parse(&text).unwrap_or_else(|e| panic!("{e}"));
        let weight = json!({
            "site": "y.weight", "tensor": "w", "why": {"code": "not-asked"}, "at": {"node": "y", "input": 1}, "form": "matmulnbits",
            "quantizer": quantizer,
        });
        let plan = planned(21, &json!({}), &json!([weight]), &json!([]));
        let solution = solve(&model, &plan, None, &mut Solved::default()).unwrap();
        let made = applied(&model, &plan, &solution).unwrap();
        assert_eq!(check::violations(&made, &Target::load("ort-cpu").unwrap()), Vec::<String>::new());
        let node = made.producer(made.value_named("y").unwrap()).unwrap();
        assert_eq!(made.constant_input(node, 3).unwrap().dtype() == DataType::Float, floats);
        let stored = amax::passes::forms::QuantizedTensor::from_nbits(&made, node).unwrap().transposed().unwrap();
        let (back, step) = (stored.values().unwrap(), 1.0 / 15.0);
        let worst = values.iter().zip(&back).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert_eq!(worst < step * 0.6, floats, "{worst}");
        let db = amax::numerics::metrics::sqnr_db(&values, &back);
        assert!((db - solution.weights[0].sqnr_db()).abs() < 1e-3, "{db} {}", solution.weights[0].sqnr_db());
    };
    let with = |more: Value| {
        let mut quantizer = json!({
            "dtype": "uint4", "symmetric": false, "granularity": {"per-group": {"axis": 0, "size": 32}},
        });
        quantizer.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        quantizer
    };
    check(with(json!({"arithmetic": "tinygemm", "eps": 1e-6, "float_zero_point": true})), true);
    check(with(json!({"algorithm": {"method": "hqq"}, "float_zero_point": true})), true);
    check(with(json!({"algorithm": {"method": "hqq"}})), false);
    check(with(json!({})), false);
}

#[test]
fn modelopt_chooses_the_same() {
    let file = vectors("modelopt.json");
    let (mut cases, mut ties) = (0, 0);
    for case in file["cases"].as_array().unwrap() {
        let (dims, values) = (extents(&case["dims"]), numbers(&file["inputs"][case["x"].as_str().unwrap()]));
        let of_onnx = case["source"] == "onnx rtn";
        let mut quantizer = json!({
            "dtype": case["format"], "symmetric": true, "granularity": case["granularity"], "narrow_range": true,
        });
        if of_onnx {
            quantizer["eps"] = json!(1e-5);
        }
        let stored = stored(&dims, &values, &json!({"quantizer": quantizer})).unwrap_or_else(|e| panic!("{e}: {case}"));
        let scales = &stored.solution.weights[0].tensor().qparams().scales;
        assert!(stored.solution.weights[0].tensor().qparams().zero_points.iter().all(|&z| z == 0));
        let quotient = |at: usize| values[at] / scales[entry(&dims, case, at)];
        if of_onnx {
            assert_eq!(scales, &numbers(&case["scales"]), "{case}");
            ties += near_ties(&stored.codes, &integers(&case["q"]), quotient, case);
        } else {
            // It multiplies by bound / amax and divides by that again; with amax / bound no code is below -bound anyway.
            let bound = Format::parse(case["format"].as_str().unwrap()).unwrap().range().1 as f32;
            let amax = numbers(&case["amax"]);
            for (scale, amax) in scales.iter().zip(&amax) {
                assert_eq!(*scale, if *amax == 0.0 { 1.0 } else { amax / bound }, "{case}");
            }
            let fake = numbers(&case["fq"]).into_iter().enumerate();
            let codes: Vec<i32> = fake.map(|(at, y)| (y / scales[entry(&dims, case, at)]).round() as i32).collect();
            ties += near_ties(&stored.codes, &codes, quotient, case);
        }
        cases += 1;
    }
    assert_eq!((cases, ties), (13, 0));
}

/// The way from `output` back to a node that is no quantizer.
fn chain(model: &Model, output: &str) -> String {
    let mut node = model.producer(model.value_named(output).unwrap()).unwrap();
    let mut out = model.node(node).op_type().to_owned();
    loop {
        let Some(before) = model.node(node).input(0).and_then(|v| model.producer(v)) else { return out + " < input" };
        node = before;
        let op = model.node(node).op_type();
        let zero = model.constant_input(node, 2).map_or(String::new(), |z| format!(" {}", z.dtype()));
        out += &match op {
            "QuantizeLinear" => format!(" < Q{zero}"),
            "DequantizeLinear" => format!(" < DQ{zero}"),
            op => return format!("{out} < {op}"),
        };
    }
}

const THREE: &str = r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,4] x) => (float[2,4] y, float[2,4] z, float[2,4] t) {
  a = Abs (x)
  y = Relu (a)
  z = Neg (a)
  t = Exp (a)
}"#;

/// A pair; `fields` come on top.
fn pair(name: &str, dtype: &str, readers: Value, fields: Value) -> Value {
    let mut pair = json!({
        "quantizer": {"dtype": dtype, "symmetric": false}, "mode": "static", "scale_of": name, "readers": readers, "why": {"code": "not-asked"},
    });
    let Value::Object(fields) = fields else { panic!("fields are an object") };
    for (key, value) in fields {
        match (&mut pair[&key], value) {
            (Value::Object(old), Value::Object(new)) => old.extend(new),
            (slot, value) => *slot = value,
        }
    }
    pair
}

fn listed(nodes: &[&str]) -> Value {
    json!({"listed": nodes.iter().map(|node| json!({"node": node, "input": 0})).collect::<Vec<_>>()})
}

/// Statistics of `a` alone.
fn of_a(site: SiteStatistics) -> Statistics {
    let mut statistics = Statistics::default();
    statistics.sites.insert("a".to_owned(), site);
    statistics
}

/// What was seen of `a`: -1 to 3.
fn seen() -> Statistics {
    let mut site = SiteStatistics::new();
    site.observe(0, &[-1.0, 3.0, 0.5]);
    of_a(site)
}

#[test]
fn several_pairs_on_one_tensor_give_one_graph_in_any_order() {
    let model = parse(THREE).unwrap();
    let u8s = || pair("a", "uint8", json!("all"), json!({}));
    let u16s = |fields: Value| pair("a16", "uint16", listed(&["z"]), fields);
    let narrow = "Relu < DQ uint8 < Q uint8 < Abs";
    let check = |activations: Value, expected: [&str; 3]| {
        let plan = planned(21, &activations, &json!([]), &json!([]));
        let solution = solve(&model, &plan, Some(&seen()), &mut Solved::default()).unwrap_or_else(|e| panic!("{e}"));
        let made = applied(&model, &plan, &solution).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(["y", "z", "t"].map(|output| chain(&made, output)), expected, "{activations}");
        assert_eq!(check::violations(&made, &Target::load("ort-cpu").unwrap()), Vec::<String>::new());
        solution
    };
    let wide = |before: &str| format!("Neg < DQ uint16 < Q uint16 < {before}Abs");
    let converted = wide("DQ uint8 < Q uint8 < ");
    let exp = "Exp < DQ uint8 < Q uint8 < Abs";
    let both = json!({"tensor": "a", "converts": "a"});
    let solution = check(json!({"a": u8s(), "a16": u16s(both.clone())}), [narrow, &converted, exp]);
    assert_eq!(solution.activations["a"], QParam { scale: 4.0 / 255.0, zero_point: 64 });
    assert_eq!(solution.activations["a16"], QParam { scale: (4.0 / 65535.0_f64) as f32, zero_point: 16384 });
    // The same where the names sort the other way round.
    let first = pair("z8", "uint8", json!("all"), json!({"tensor": "a"}));
    let second = pair("a16", "uint16", listed(&["z"]), json!({"tensor": "a", "converts": "z8"}));
    check(json!({"z8": first, "a16": second}), [narrow, &converted, exp]);
    // Both read the float tensor.
    let float = wide("");
    check(json!({"a": u8s(), "a16": u16s(json!({"tensor": "a"}))}), [narrow, &float, exp]);
    let some = pair("a", "uint8", listed(&["y"]), json!({}));
    check(json!({"a": some, "a16": u16s(both)}), [narrow, &converted, "Exp < Abs"]);
    let last = json!({"tensor": "a", "converts": "a16"});
    let third = pair("a4", "uint4", listed(&["t"]), last);
    let exp = "Exp < DQ uint4 < Q uint4 < DQ uint16 < Q uint16 < DQ uint8 < Q uint8 < Abs";
    let both = json!({"tensor": "a", "converts": "a"});
    check(json!({"a": u8s(), "a16": u16s(both), "a4": third}), [narrow, &converted, exp]);
    let relu = json!({"quantizer": {"observer": "minmax", "given": {"range": [0, 6]}}});
    let solution = check(
        json!({"a": pair("a", "uint8", json!("all"), relu)}),
        [narrow, "Neg < DQ uint8 < Q uint8 < Abs", "Exp < DQ uint8 < Q uint8 < Abs"],
    );
    assert_eq!(solution.activations["a"], QParam { scale: 6.0 / 255.0, zero_point: 0 });
}

#[test]
fn activations_take_every_field() {
    let model = parse(THREE).unwrap();
    let check = |quantizer: Value, (scale, zero_point): (f32, i32)| {
        let expected = QParam { scale, zero_point };
        let activations = json!({"a": pair("a", "uint8", json!("all"), json!({"quantizer": quantizer}))});
        let plan = planned(25, &activations, &json!([]), &json!([]));
        let solution = solve(&model, &plan, Some(&seen()), &mut Solved::default()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(solution.activations["a"], expected, "{quantizer}");
        let made = applied(&model, &plan, &solution).unwrap_or_else(|e| panic!("{e}"));
        let format = plan.activations["a"].quantizer.dtype;
        let zero = made.constant(made.value_named("a_zero_point").unwrap()).unwrap();
        assert_eq!(zero.dtype(), DataType::from(format));
        assert_eq!(pack::unpack(&zero.raw(), &format, 1), [zero_point]);
    };
    check(json!({}), (4.0 / 255.0, 64));
    check(json!({"symmetric": true}), (3.0 / 127.5, 128));
    check(json!({"symmetric": true, "narrow_range": true}), (3.0 / 127.0, 128));
    check(json!({"narrow_range": true}), (4.0 / 254.0, 64));
    check(json!({"reduce_range": true}), (4.0 / 127.0, 32));
    check(json!({"dtype": "int8", "reduce_range": true}), (4.0 / 128.0, -32));
    check(json!({"dtype": "int16", "symmetric": true, "narrow_range": true}), (3.0 / 32767.0, 0));
    check(json!({"dtype": "uint2"}), (4.0 / 3.0, 1));
    check(json!({"dtype": "float8e4m3fn"}), (3.0 / 448.0, 0));
    check(json!({"scale_type": "power-of-two"}), (1.0 / 32.0, 32));
    check(json!({"scale_dtype": "float16"}), (half::f16::from_f32(4.0 / 255.0).to_f32(), 64));
    check(json!({"scale_dtype": "bfloat16"}), (half::bf16::from_f32(4.0 / 255.0).to_f32(), 64));
    check(json!({"eps": 0.5}), (0.5, 2));
    check(json!({"given": {"range": [-2, 2]}}), (4.0 / 255.0, 128));
    check(json!({"given": {"range": [1, 2]}, "scale_type": "power-of-two"}), (1.0 / 64.0, 0));
    check(json!({"given": {"scales": {"scales": [0.3], "zero_points": [7]}}, "scale_type": "power-of-two"}), (0.3, 7));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let model = parse(
        r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,3] x) => (float[2,2] y, float[2,3] z) <float[3,2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {1, 2}> {
  a = Abs (x)
  y = Gemm (a, w, b)
  z = Neg (a)
}"#,
    )
    .unwrap();
    let refuse = |activations: Value, weights: Value, biases: Value, kind: Kind, part: &str| {
        let plan = planned(21, &activations, &weights, &biases);
        let made = solve(&model, &plan, Some(&seen()), &mut Solved::default())
            .and_then(|solution| applied(&model, &plan, &solution));
        let error = made.map(drop).expect_err(part);
        assert!(error.message().contains(part), "\"{error}\" does not say \"{part}\"");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains('a') || error.to_string().contains('w'), "{error}");
    };
    let activation = |quantizer: Value, part: &str| {
        let pair = pair("a", "uint8", json!("all"), json!({"quantizer": quantizer}));
        refuse(json!({"a": pair}), json!([]), json!([]), Kind::Config, part);
    };
    activation(json!({"granularity": {"per-channel": {"axis": 0}}}), "one scale for the whole tensor");
    activation(json!({"given": {"range": [2, 1]}}), "2 to 1");
    activation(
        json!({"given": {"scales": {"scales": [1, 2], "zero_points": [0, 0]}}}),
        "2 scales and 2 zero points are given, but 1",
    );
    activation(json!({"given": {"scales": {"scales": [0], "zero_points": [0]}}}), "the scale 0");
    activation(json!({"given": {"scales": {"scales": [1], "zero_points": [256]}}}), "zero point 256");
    activation(json!({"scale_dtype": "float8e8m0"}), "float8e8m0 scales belong to groups");
    activation(
        json!({"dtype": "float8e5m2", "given": {"scales": {"scales": [1], "zero_points": [1]}}}),
        "zero point 1",
    );
    activation(json!({"dtype": "uint2"}), "needs opset 25");

    let pairs = |activations: Value, part: &str| refuse(activations, json!([]), json!([]), Kind::Config, part);
    let given = |range: Value| json!({"quantizer": {"given": {"range": range}}, "scale_of": "a"});
    let shared = |first: Value, second: Value| {
        let second = pair("z", "uint8", json!("all"), second);
        json!({"a": pair("a", "uint8", json!("all"), first), "z": second})
    };
    pairs(shared(given(json!([0, 1])), given(json!([0, 2]))), "has another range or scale in the configuration");
    pairs(shared(json!({}), json!({"scale_of": "a", "quantizer": {"symmetric": true}})), "is not quantized alike");
    pairs(json!({"a": pair("a", "uint8", json!("all"), json!({"converts": "b"}))}), "converts the pair \"b\"");
    pairs(json!({"a": pair("a", "uint8", json!("all"), json!({"converts": "a"}))}), "in a circle");
    let twice = json!({"a": pair("a", "uint8", json!("all"), json!({})), "b": pair("b", "uint8", json!("all"), json!({"tensor": "a"}))});
    pairs(twice, "lets every reader have the pair");
    let slot = json!({"a": pair("a", "uint8", listed(&["y", "y"]), json!({}))});
    pairs(slot, "input 0 of the node is not this tensor");
    refuse(
        json!({"x": pair("x", "uint8", json!("all"), json!({}))}),
        json!([]),
        json!([]),
        Kind::Samples,
        "do not cover",
    );

    let weighed = |quantizer: &Value, fields: Value| {
        let mut weight = json!({
            "site": "y.weight", "at": {"node": "y", "input": 1}, "tensor": "w", "why": {"code": "not-asked"},
            "quantizer": {"dtype": "int8", "symmetric": true, "granularity": {"per-channel": {"axis": 1}}},
        });
        weight["quantizer"].as_object_mut().unwrap().extend(quantizer.as_object().unwrap().clone());
        weight.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        json!([weight])
    };
    let weight = |quantizer: Value, fields: Value, part: &str| {
        refuse(json!({}), weighed(&quantizer, fields), json!([]), Kind::Config, part);
    };
    weight(json!({"observer": "entropy"}), json!({}), "\"entropy\" has no meaning for a constant");
    weight(json!({"observer": "mean"}), json!({}), "\"mean\" has no meaning for a constant");
    weight(json!({"observer": "percentile", "percentile": 0}), json!({}), "percentile: 0 is not a share");
    weight(json!({"observer": "mse", "mse_p": 0}), json!({}), "mse_p: 0 is not an exponent from 1 to 16");
    weight(json!({"eps": -1}), json!({}), "the least scale is -1");
    weight(json!({"dtype": "int2", "reduce_range": true}), json!({}), "a single bit");
    weight(json!({"dtype": "float8e4m3fn", "round": "floor"}), json!({}), "no other rounding");
    weight(json!({"dtype": "int32"}), json!({}), "format of biases");
    weight(json!({"dtype": "int16"}), json!({"pair_safe": {"along": 0}}), "only those of int8");
    weight(json!({}), json!({"transpose": true}), "not the right operand of a Gemm with transB");
    let three = |count: usize| json!({"given": {"scales": {"scales": vec![1; count], "zero_points": vec![0; count]}}});
    weight(three(3), json!({}), "3 scales and 3 zero points are given, but 1 or 2");
    let uneven = json!({"given": {"scales": {"scales": [1, 1], "zero_points": [0]}}});
    weight(uneven, json!({}), "2 scales and 1 zero points");
    let group = json!({"granularity": {"per-group": {"axis": 0, "size": 2}}});
    weight(
        json!({"granularity": {"per-group": {"axis": 0, "size": 2}}, "given": {"range": [1, 0]}}),
        json!({}),
        "1 to 0",
    );

    let bias = json!([{
        "site": "y.bias", "at": {"node": "y", "input": 2}, "tensor": "b", "channels": 2, "activation": "a", "weight": 0,
    }]);
    let a = json!({"a": pair("a", "uint8", json!("all"), json!({}))});
    refuse(a.clone(), weighed(&group, json!({})), bias.clone(), Kind::Config, "which have no accumulator");
    let fp8 = json!({"dtype": "float8e4m3fn"});
    refuse(a.clone(), weighed(&fp8, json!({})), bias.clone(), Kind::Config, "which have no accumulator");
    let small = json!({"given": {"scales": {"scales": [1e-9], "zero_points": [0]}}});
    refuse(
        a.clone(),
        weighed(&small, json!({})),
        bias.clone(),
        Kind::Config,
        "the bias of the layer does not fit int32",
    );
    refuse(json!({}), weighed(&json!({}), json!({})), bias.clone(), Kind::Config, "without a fixed scale");
    refuse(a, json!([]), bias, Kind::Config, "not in the plan");
}

#[test]
fn biases_are_at_the_product_of_scales_of_any_integers() {
    let model = parse(
        r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,3] x) => (float[2,2] y) <float[3,2] w = {1, 2, -3, 4, 5, -6}, float[2] b = {0.5, -20}, float[2] huge = {3e9, 1}> {
  a = Abs (x)
  y = Gemm (a, w, b)
}"#,
    )
    .unwrap();
    let check = |activation: Value, weight: Value, bias: &str| {
        let mut weight = json!({"quantizer": weight, "site": "y.weight", "at": {"node": "y", "input": 1}, "tensor": "w", "why": {"code": "not-asked"}});
        weight["pair_safe"] = Value::Null;
        let biases = json!([{
            "site": "y.bias", "at": {"node": "y", "input": 2}, "tensor": bias, "channels": 2, "activation": "a", "weight": 0,
        }]);
        let activations = json!({"a": pair("a", "uint8", json!("all"), json!({"quantizer": activation}))});
        let plan = planned(25, &activations, &json!([weight]), &biases);
        let solution = solve(&model, &plan, Some(&seen()), &mut Solved::default()).unwrap_or_else(|e| panic!("{e}"));
        let made = applied(&model, &plan, &solution).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(check::violations(&made, &Target::load("generic").unwrap()), Vec::<String>::new());
        let weights = &solution.weights[0].tensor().qparams().scales;
        let input = solution.activations["a"].scale;
        let products: Vec<f32> = weights.iter().map(|s| s * input).collect();
        assert_eq!(solution.biases[0].scales, products);
        let values = if bias == "b" { [0.5_f32, -20.0] } else { [3e9, 1.0] };
        for (at, value) in values.into_iter().enumerate() {
            let exact = f64::from(value) / f64::from(products[at % products.len()]);
            let code = i32::from_le_bytes(solution.biases[0].codes.as_chunks().0[at]);
            assert_eq!(f64::from(code), exact.round_ties_even());
        }
        (weights.clone(), solution.weights[0].tensor().qparams().zero_points.clone())
    };
    let channel = json!({"per-channel": {"axis": 1}});
    for activation in ["uint8", "int8", "uint16", "int16", "uint4"] {
        for weight in ["int8", "uint8", "int16", "int4", "uint2"] {
            for granularity in [json!("per-tensor"), channel.clone()] {
                for symmetric in [true, false] {
                    let weight = json!({"dtype": weight, "symmetric": symmetric, "granularity": granularity});
                    check(json!({"dtype": activation}), weight, "b");
                }
            }
        }
    }
    // A bias too large for 32 bits raises the scale of its weight, and moves the zero point with it.
    let power = json!({"dtype": "int8", "symmetric": true, "granularity": channel, "scale_type": "power-of-two"});
    let (scales, _) = check(json!({}), power, "huge");
    assert!(scales.iter().all(|s| s.log2().fract() == 0.0 && *s > 80.0), "{scales:?}");
    let half = json!({"dtype": "int8", "symmetric": true, "granularity": "per-tensor", "scale_dtype": "float16"});
    let (scales, _) = check(json!({}), half, "huge");
    assert!(half::f16::from_f32(scales[0]).to_f32() == scales[0] && scales[0] > 80.0, "{scales:?}");
    let uneven = json!({"dtype": "uint8", "symmetric": false, "granularity": "per-tensor"});
    assert_eq!(check(json!({}), uneven, "huge").1, [0]);
}

#[test]
fn pairs_stay_safe_whatever_else_is_asked() {
    let values: Vec<f32> = (0..64).map(|at| ((at * 37 % 29) as f32 - 9.0) / 4.0).collect();
    let check = |least: f64, fields: Value| {
        let mut quantizer = json!({"dtype": "int8", "symmetric": true, "granularity": {"per-channel": {"axis": 1}}});
        quantizer.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let weight = json!({"quantizer": quantizer, "pair_safe": {"along": 0}});
        let stored = stored(&[16, 4], &values, &weight).unwrap_or_else(|e| panic!("{e}"));
        for column in 0..4 {
            for pair in 0..8 {
                let [a, b] = [0, 1].map(|k| stored.codes[(2 * pair + k) * 4 + column]);
                assert!((a + b).abs() <= 128, "{a} {b} {fields}");
                if fields["symmetric"] == json!(false) {
                    // No safe pair is nearer to the values.
                    let QParams { scales, zero_points } = &stored.solution.weights[0].tensor().qparams();
                    let exact = [0, 1].map(|k| {
                        f64::from(values[(2 * pair + k) * 4 + column] / scales[column]) + f64::from(zero_points[column])
                    });
                    let far = |a: i32, b: i32| (f64::from(a) - exact[0]).powi(2) + (f64::from(b) - exact[1]).powi(2);
                    let safe = |a: i32| (-128..128).filter(move |b| (a + b).abs() <= 128).map(move |b| (a, b));
                    let least = (-128..128).flat_map(safe).map(|(a, b)| far(a, b)).fold(f64::INFINITY, f64::min);
                    assert!(far(a, b) <= least + 1e-9, "{a} {b} for {exact:?}");
                }
            }
        }
        assert!(stored.solution.weights[0].sqnr_db() > least, "{} {fields}", stored.solution.weights[0].sqnr_db());
    };
    check(35.0, json!({"narrow_range": true}));
    check(35.0, json!({}));
    // Codes around a zero point of their own have little room.
    check(15.0, json!({"symmetric": false}));
    check(35.0, json!({"reduce_range": true, "narrow_range": true}));
    check(35.0, json!({"round": "half-away"}));
    check(35.0, json!({"scale_dtype": "float16"}));
    check(35.0, json!({"observer": "mse"}));
    check(35.0, json!({"granularity": "per-tensor"}));
    check(35.0, json!({"granularity": {"per-channel": {"axis": 0}}, "narrow_range": true}));
    check(35.0, json!({"granularity": {"per-group": {"axis": 0, "size": 3}}}));
    // The scale of the largest value leaves the pairs no room, and is not to be changed.
    check(10.0, json!({"given": {"scales": {"scales": [0.04], "zero_points": [0]}}}));
    check(5.0, json!({"symmetric": false, "given": {"scales": {"scales": [0.04], "zero_points": [-20]}}}));
}

/// The kernel of an LSTM adds up along the last axis, one scale a row.
#[test]
fn pairs_of_recurrent_weights_stay_safe() {
    let values: Vec<f32> = (0..64).map(|at| ((at * 37 % 29) as f32 - 9.0) / 4.0).collect();
    let quantizer = json!({
        "dtype": "int8", "symmetric": true, "narrow_range": true, "granularity": {"per-channel": {"axis": 1}},
    });
    let stored = stored(&[1, 16, 4], &values, &json!({"quantizer": quantizer, "pair_safe": {"along": 2}})).unwrap();
    assert!(stored.codes.chunks(2).all(|pair| (pair[0] + pair[1]).abs() <= 128), "{:?}", stored.codes);
    assert!(stored.codes.iter().any(|code| code.abs() > 100), "each row has a scale of its own");
    assert!(stored.solution.weights[0].sqnr_db() > 35.0, "{}", stored.solution.weights[0].sqnr_db());
}

/// An observer that leaves out the largest values makes smaller steps, in bytes and in formats of fewer bits.
#[test]
fn weights_follow_their_observer() {
    let values: Vec<f32> = (0..256).map(|at| if at == 77 { 50.0 } else { (at as f32 * 0.7).sin() }).collect();
    for dtype in ["int8", "int4", "int16"] {
        let scale = |fields: Value| {
            let mut quantizer = json!({"dtype": dtype, "symmetric": true, "narrow_range": true});
            quantizer.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let stored = stored(&[16, 16], &values, &json!({"quantizer": quantizer})).unwrap_or_else(|e| panic!("{e}"));
            stored.solution.weights[0].tensor().qparams().scales[0]
        };
        let all = scale(json!({}));
        assert!(scale(json!({"observer": "percentile", "percentile": 98.0})) < all / 10.0, "{dtype}");
        assert!((scale(json!({"postprocess": {"scale": 0.5}})) - all / 2.0).abs() < all * 1e-6, "{dtype}");
        assert_eq!(scale(json!({"observer": "percentile", "percentile": 100.0})), all, "{dtype}");
    }
}

/// What an algorithm reports is about the groups that there are, and about rounding as it would have been.
#[test]
fn what_an_algorithm_did_is_reported() {
    let values: Vec<f32> = (0..192).map(|at| (at as f32 * 1.7).sin() * (1 + at % 5) as f32).collect();
    let solved = |algorithm: Value| {
        let mut quantizer =
            json!({"dtype": "uint4", "symmetric": false, "granularity": {"per-group": {"axis": 0, "size": 32}}});
        quantizer.as_object_mut().unwrap().extend(algorithm.as_object().unwrap().clone());
        let mut solution = stored(&[64, 3], &values, &json!({"quantizer": quantizer})).unwrap().solution;
        solution.weights.remove(0)
    };
    let plain = solved(json!({}));
    assert_eq!(plain.fit(), None);
    for method in ["hqq", "kquant"] {
        let fit = solved(json!({"algorithm": {"method": method}})).fit().unwrap();
        assert_eq!(fit.groups, 6, "{method}");
        assert!(fit.fell_back < 6, "{method}");
        assert!((fit.rounding_db - plain.sqnr_db()).abs() < 1e-3, "{method}: {} {}", fit.rounding_db, plain.sqnr_db());
    }
}

/// Channels in the middle have their elements here and there.
#[test]
fn scales_may_lie_on_any_axis() {
    let (outer, channels, inner) = (3, 4, 5);
    let value = |o: usize, c: usize, i: usize| (((o * 7 + c * 11 + i * 13) % 17) as f32 - 8.0) * (c + 1) as f32 / 8.0;
    let mut values = Vec::new();
    for o in 0..outer {
        for c in 0..channels {
            values.extend((0..inner).map(|i| value(o, c, i)));
        }
    }
    let quantizer = json!({
        "dtype": "int8", "symmetric": true, "narrow_range": true, "granularity": {"per-channel": {"axis": 1}},
    });
    let stored = stored(&[outer, channels, inner], &values, &json!({"quantizer": quantizer})).unwrap();
    for c in 0..channels {
        let all = || (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i)));
        let largest = all().map(|(o, i)| value(o, c, i).abs()).fold(0.0, f32::max);
        let scale = stored.solution.weights[0].tensor().qparams().scales[c];
        assert_eq!(scale, (f64::from(largest) / 127.0) as f32);
        for (o, i) in all() {
            let code = stored.codes[(o * channels + c) * inner + i];
            assert_eq!(code, (value(o, c, i) / scale).round_ties_even() as i32, "{o} {c} {i}");
        }
    }
}

/// A weight of any float type is what its values are.
#[test]
fn weights_of_other_floats_have_the_same_codes() {
    let values = [0.5f32, -2.0, 1.75, 3.0, -0.125, 0.0];
    let weights = json!([{
        "site": "y.weight", "at": {"node": "y", "input": 1}, "tensor": "w", "why": {"code": "not-asked"},
        "quantizer": {"dtype": "int8", "symmetric": true, "narrow_range": true},
    }]);
    let plan = planned(17, &json!({}), &weights, &json!([]));
    let check = |dtype: DataType, bytes: Vec<u8>| {
        let mut model = parse(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (x) => (y) <float[2,3] w = {0, 0, 0, 0, 0, 0}> { y = Add (x, w) }",
        )
        .unwrap();
        let weight = model.value_named("w").unwrap();
        model.set_constant(weight, Tensor::new(dtype, &[2, 3], bytes));
        let solution = solve(&model, &plan, None, &mut Solved::default()).unwrap_or_else(|e| panic!("{dtype}: {e}"));
        let codes = solution.weights[0].codes();
        // 3 is 127 steps.
        assert_eq!(pack::unpack(&codes.raw(), &Format::Int8, codes.len()), [21, -85, 74, 127, -5, 0], "{dtype}");
    };
    check(DataType::Float, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    check(DataType::Double, values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect());
    check(DataType::Float16, values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect());
    check(DataType::Bfloat16, values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect());
}

/// Readers that ask for safe pairs and readers that do not share codes that are the same for both.
#[test]
fn readers_share_what_comes_to_the_same() {
    let check = |values: &str, expected: usize| {
        let model = parse(&format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {{{values}}}> {{\n  y = MatMul (x, w)\n  z = MatMul (x, w)\n}}"
        ))
        .unwrap();
        let weight = |node: &str| {
            json!({
                "site": format!("{node}.weight"), "at": {"node": node, "input": 1}, "tensor": "w",
                "why": {"code": "not-asked"}, "quantizer": {
                    "dtype": "int8", "symmetric": true, "given": {"scales": {"scales": [0.5], "zero_points": [0]}},
                },
            })
        };
        let mut safe = weight("z");
        safe["pair_safe"] = json!({"along": 0});
        let plan = planned(21, &json!({}), &json!([weight("y"), safe]), &json!([]));
        let solution = solve(&model, &plan, None, &mut Solved::default()).unwrap_or_else(|e| panic!("{e}"));
        let made = applied(&model, &plan, &solution).unwrap_or_else(|e| panic!("{e}"));
        let initializers = made.graph(made.main()).initializers();
        let stored = initializers.iter().filter(|&&v| made.value(v).name().contains("quantized")).count();
        assert_eq!(stored, expected, "{values}");
    };
    check("1, -4, 3, 2", 1);
    check("60, -4, 60, 2", 2);
}

#[test]
fn readers_share_what_is_stored_only_where_they_agree() {
    let model = parse(
        r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,2] x) => (float[2,2] y, float[2,2] z, float[2,2] t) <float[2,2] w = {1, 2, 3, 4}> {
  y = Gemm <transB = 1> (x, w)
  z = Gemm <transB = 1> (x, w)
  t = MatMul (x, w)
}"#,
    )
    .unwrap();
    let codes = |transposes: [bool; 3], sizes: [usize; 3]| {
        let weights: Vec<Value> = ["y", "z", "t"]
            .iter()
            .zip(transposes)
            .zip(sizes)
            .map(|((node, transpose), size)| {
                let granularity = json!({"per-group": {"axis": 0, "size": size}});
                json!({
                    "site": format!("{node}.weight"), "at": {"node": node, "input": 1}, "tensor": "w", "why": {"code": "not-asked"},
                    "quantizer": {"dtype": "int4", "symmetric": true, "granularity": granularity}, "transpose": transpose,
                })
            })
            .collect();
        let plan = planned(21, &json!({}), &json!(weights), &json!([]));
        let solution = solve(&model, &plan, None, &mut Solved::default()).unwrap_or_else(|e| panic!("{e}"));
        let made = applied(&model, &plan, &solution).unwrap_or_else(|e| panic!("{e}"));
        let transposed =
            ["y", "z"].map(|node| made.node(made.producer(made.value_named(node).unwrap()).unwrap()).int("transB"));
        assert_eq!(transposed, [0, 1].map(|at| (!transposes[at]).then_some(1)));
        let initializers = made.graph(made.main()).initializers();
        initializers.iter().filter(|&&v| made.value(v).name().contains("quantized")).count()
    };
    assert_eq!(codes([true, true, false], [1, 1, 1]), 2);
    assert_eq!(codes([false, false, false], [1, 1, 1]), 1);
    assert_eq!(codes([true, false, false], [1, 1, 1]), 2);
    assert_eq!(codes([true, true, false], [1, 2, 1]), 3);
}

/// Codes of one bit less are safe as well.
#[test]
fn safe_pairs_are_no_worse_than_a_bit_less() {
    let solved = |values: &[f32], symmetric: bool, granularity: &Value, fields: Value| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[2,16] x) => (float[2,4] y) <float[16,4] w = {{{}}}> {{\n  y = MatMul (x, w)\n}}",
            list(values)
        );
        let mut weight = json!({
            "site": "y.weight", "at": {"node": "y", "input": 1}, "tensor": "w", "why": {"code": "not-asked"},
            "quantizer": {"dtype": "int8", "symmetric": symmetric, "granularity": granularity},
        });
        weight["pair_safe"] = fields["pair_safe"].clone();
        if fields["reduce_range"] == json!(true) {
            weight["quantizer"]["reduce_range"] = json!(true);
        }
        let plan = planned(17, &json!({}), &json!([weight]), &json!([]));
        let solution = solve(&parse(&text).unwrap(), &plan, None, &mut Solved::default()).unwrap();
        solution.weights[0].sqnr_db()
    };
    for granularity in [json!("per-tensor"), json!({"per-channel": {"axis": 1}})] {
        for offset in [-2.0f32, -1.0, -0.4, 0.0, 0.3, 1.0, 2.0] {
            for symmetric in [true, false] {
                let values: Vec<f32> =
                    (0..64).map(|at| (at as f32 * 1.7).sin() * (1.0 + (at % 4) as f32) + offset).collect();
                let pairs = solved(&values, symmetric, &granularity, json!({"pair_safe": {"along": 0}}));
                let less = solved(&values, symmetric, &granularity, json!({"reduce_range": true}));
                assert!(pairs >= less - 1e-9, "{granularity} {offset} {symmetric}: {pairs} dB, {less} dB");
            }
        }
    }
}

#[test]
fn the_guard_judges_eight_bits_and_more() {
    let model = parse(THREE).unwrap();
    let mut site = SiteStatistics::new();
    site.observe(0, &[vec![0.01; 5000], vec![100.0, -1.0]].concat());
    let statistics = of_a(site);
    let vetoed = |dtype: &str, fields: Value| {
        let mut fields = fields;
        fields["tensor"] = json!("a");
        let activations = json!({"p": pair("p", dtype, json!("all"), fields)});
        let plan = planned(25, &activations, &json!([]), &json!([]));
        let solution =
            solve(&model, &plan, Some(&statistics), &mut Solved::default()).unwrap_or_else(|e| panic!("{e}"));
        let vetoes = guard(&plan, &solution, &statistics, &Guard { static_db: 60.0, ..Guard::default() });
        vetoes.into_iter().map(|(name, veto)| format!("{name}: {}", veto.why)).collect::<Vec<_>>()
    };
    let found = vetoed("uint8", json!({}));
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("a: \"a\" keeps only ") && found[0].contains(" dB in uint8 over [-1.0000, 100.0000]"),
        "{found:?}"
    );
    assert!(vetoed("uint16", json!({})).is_empty());
    assert!(vetoed("uint4", json!({})).is_empty());
    assert!(vetoed("float8e4m3fn", json!({})).is_empty());

    let values: Vec<f32> = (0..64).map(|at| if at == 0 { 1000.0 } else { (at as f32 * 0.7).sin() }).collect();
    let weight = |dtype: &str| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[8,8] x) => (float[8,8] y) <float[8,8] w = {{{}}}> {{\n  y = Add (x, w)\n}}",
            list(&values)
        );
        let model = parse(&text).unwrap();
        let weights = json!([{
            "site": "y.weight", "at": {"node": "y", "input": 1}, "tensor": "w", "why": {"code": "not-asked"},
            "quantizer": {"dtype": dtype, "symmetric": true},
        }]);
        let plan = planned(25, &json!({}), &weights, &json!([]));
        let solution = solve(&model, &plan, None, &mut Solved::default()).unwrap();
        let strict = Guard { weight_db: 500.0, ..Guard::default() };
        guard(&plan, &solution, &Statistics::default(), &strict)
            .into_values()
            .map(|veto| veto.why.to_string())
            .collect::<Vec<_>>()
    };
    for dtype in ["int8", "uint16", "float8e4m3fn"] {
        assert!(weight(dtype)[0].contains(&format!("dB in {dtype}, below 500 dB")), "{dtype}");
    }
    for dtype in ["int4", "uint2", "float4e2m1"] {
        assert!(weight(dtype).is_empty(), "{dtype}");
    }
}

#[test]
fn versions_rise_by_need() {
    let check = |opset: i64, ir: i64, dtype: &str, expected: i64| {
        let text = format!(
            "<ir_version: {ir}, opset_import: [\"\" : {opset}]>\ng (float[2] x) => (float[2] y) <float[2] w = {{1, 2}}> {{\n  y = Add (x, w)\n}}"
        );
        let model = parse(&text).unwrap();
        let weights = json!([{
            "site": "y.weight", "at": {"node": "y", "input": 1}, "tensor": "w", "why": {"code": "not-asked"},
            "quantizer": {"dtype": dtype, "symmetric": true},
        }]);
        let plan = planned(opset, &json!({}), &weights, &json!([]));
        let solution = solve(&model, &plan, None, &mut Solved::default()).unwrap();
        assert_eq!(applied(&model, &plan, &solution).unwrap().ir_version(), expected, "{opset} {ir} {dtype}");
    };
    check(25, 8, "int8", 8);
    check(25, 8, "float8e5m2", 9);
    check(25, 8, "uint16", 10);
    check(25, 8, "int4", 10);
    check(25, 8, "float4e2m1", 11);
    check(25, 8, "uint2", 13);
    check(25, 13, "int4", 13);
}

/// Numbers that look random, the same each time.
fn noise(count: usize, seed: usize) -> String {
    let value = |at: usize| {
        let bits = (at + seed * 7919).wrapping_mul(2_654_435_761) >> 7;
        (bits % 2003) as f32 / 1001.0 - 1.0
    };
    list(&(0..count).map(value).collect::<Vec<_>>())
}

/// Models of `tests/solve`, made from plans; `tests/differential/solve.py` runs them in onnxruntime.
#[test]
fn models_for_onnxruntime_are_these() {
    let weight = |quantizer: Value, fields: Value| {
        let mut weight = json!({"quantizer": quantizer, "site": "y.weight", "at": {"node": "y", "input": 1}, "tensor": "w", "why": {"code": "not-asked"}});
        weight.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        weight
    };
    let group = |dtype: &str, symmetric: bool, size: usize| {
        let narrow = symmetric && !dtype.starts_with("float");
        json!({"dtype": dtype, "symmetric": symmetric, "narrow_range": narrow, "granularity": {"per-group": {"axis": 0, "size": size}}})
    };
    let matmul = |depth: usize| {
        format!(
            "g (float[3,{depth}] x) => (float[3,8] y) <float[{depth},8] w = {{{}}}> {{\n  y = MatMul (x, w)\n}}",
            noise(depth * 8, 1)
        )
    };
    let gemm = format!(
        "g (float[3,64] x) => (float[3,8] y) <float[8,64] w = {{{}}}, float[8] b = {{{}}}> {{\n  y = Gemm <transB = 1> (x, w, b)\n}}",
        noise(512, 1),
        noise(8, 2)
    );
    let save = |name: &str, graph: &str, opset: i64, activations: Value, weights: Value, biases: Value| {
        let text = format!("<ir_version: 8, opset_import: [\"\" : 17]>\n{graph}");
        let model = parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        let plan = planned(opset, &activations, &weights, &biases);
        let mut statistics = Statistics::default();
        for (name, pair) in &plan.activations {
            let mut site = SiteStatistics::new();
            site.observe(0, &[-1.0, 1.0]);
            statistics.sites.insert(pair.tensor.clone().unwrap_or_else(|| name.clone()), site);
        }
        let solution =
            solve(&model, &plan, Some(&statistics), &mut Solved::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let made = applied(&model, &plan, &solution).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(check::violations(&made, &Target::load("generic").unwrap()), Vec::<String>::new(), "{name}");
        let bytes = amax::ir::file::to_bytes(&made).unwrap();
        let path = root("tests/solve").join(format!("{name}.onnx"));
        if std::env::var_os("AMAX_BLESS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(std::fs::read(&path).unwrap_or_default() == bytes, "{name} differs; AMAX_BLESS=1 accepts it");
    };
    let weights = |name: &str, graph: &str, opset: i64, quantizer: Value, fields: Value| {
        save(name, graph, opset, json!({}), json!([weight(quantizer, fields)]), json!([]));
    };
    let none = || json!({});
    weights("int4_groups", &matmul(64), 21, group("int4", true, 32), none());
    weights("int4_groups_ragged", &matmul(70), 21, group("int4", true, 32), none());
    weights("int4_group_of_all", &matmul(64), 21, group("int4", true, 128), none());
    weights("uint4_groups", &matmul(64), 21, group("uint4", false, 16), none());
    weights("int8_groups", &matmul(64), 21, group("int8", true, 32), none());
    weights("uint8_groups", &matmul(64), 21, group("uint8", false, 64), none());
    weights("int2_groups", &matmul(64), 25, group("int2", false, 32), none());
    weights("uint2_groups", &matmul(64), 25, group("uint2", false, 32), none());
    weights("gemm_int4_groups", &gemm, 21, group("int4", true, 32), json!({"transpose": true}));
    weights(
        "gemm_int4_channels",
        &gemm,
        21,
        json!({"dtype": "int4", "symmetric": true, "granularity": {"per-channel": {"axis": 0}}}),
        none(),
    );
    weights(
        "float8_channels",
        &matmul(64),
        19,
        json!({"dtype": "float8e4m3fn", "symmetric": true, "granularity": {"per-channel": {"axis": 1}}}),
        none(),
    );
    weights("float8_groups", &matmul(64), 21, group("float8e5m2", true, 32), none());
    weights("float4_groups", &matmul(64), 23, group("float4e2m1", true, 16), none());
    weights(
        "int16_channels",
        &matmul(64),
        21,
        json!({"dtype": "int16", "symmetric": true, "narrow_range": true, "granularity": {"per-channel": {"axis": 1}}}),
        none(),
    );

    let int8 = |axis: usize| json!({"dtype": "int8", "symmetric": true, "narrow_range": true, "granularity": {"per-channel": {"axis": axis}}});
    let bias = json!([{
        "site": "y.bias", "at": {"node": "y", "input": 2}, "tensor": "b", "channels": 8, "activation": "x", "weight": 0,
    }]);
    let ends = |input: &str, output: &str| {
        json!({
            "x": pair("x", input, listed(&["y"]), json!({})),
            "y": pair("y", output, json!("all"), json!({"quantizer": {"given": {"range": [-12, 12]}}})),
        })
    };
    let conv = format!(
        "g (float[1,3,6,6] x) => (float[1,8,4,4] y) <float[8,3,3,3] w = {{{}}}, float[8] b = {{{}}}> {{\n  y = Conv (x, w, b)\n}}",
        noise(216, 1),
        noise(8, 2)
    );
    for dtype in ["uint16", "int16"] {
        save(
            &format!("{dtype}_matmul"),
            &matmul(64),
            21,
            ends(dtype, dtype),
            json!([weight(int8(1), none())]),
            json!([]),
        );
        save(&format!("{dtype}_gemm"), &gemm, 21, ends(dtype, dtype), json!([weight(int8(0), none())]), bias.clone());
        save(&format!("{dtype}_conv"), &conv, 21, ends(dtype, dtype), json!([weight(int8(0), none())]), bias.clone());
    }
    let float8 = json!({"dtype": "float8e4m3fn", "symmetric": true, "granularity": {"per-channel": {"axis": 1}}});
    save(
        "float8_matmul",
        &matmul(64),
        19,
        ends("float8e4m3fn", "float8e4m3fn"),
        json!([weight(float8, none())]),
        json!([]),
    );
    // The product runs on 8 bits, what is added to it on 16.
    let border = format!(
        "g (float[3,64] x) => (float[3,8] s) <float[64,8] w = {{{}}}, float[3,8] c = {{{}}}> {{\n  y = MatMul (x, w)\n  s = Add (y, c)\n}}",
        noise(512, 1),
        noise(24, 2)
    );
    let converted = json!({
        "x": pair("x", "uint8", listed(&["y"]), json!({})),
        "y": pair("y", "uint8", json!("all"), json!({"quantizer": {"given": {"range": [-12, 12]}}})),
        "y_uint16": pair("y_uint16", "uint16", listed(&["s"]), json!({
            "tensor": "y", "converts": "y", "quantizer": {"given": {"range": [-12, 12]}},
        })),
        "s": pair("s", "uint16", json!("all"), json!({"quantizer": {"given": {"range": [-12, 12]}}})),
    });
    save("uint8_to_uint16", &border, 21, converted, json!([weight(int8(1), none())]), json!([]));
}
