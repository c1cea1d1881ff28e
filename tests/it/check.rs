//! What a target would compute wrongly, built by hand.

use crate::plan::prepared;
use amax::ir::text::parse;
use amax::targets::{Target, check::violations};

fn check(target: &str, text: &str, expected: &[&str]) {
    let model = parse(text).unwrap_or_else(|e| panic!("{e}:\n{text}"));
    let found = violations(&model, &Target::load(target).unwrap());
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, part) in found.iter().zip(expected) {
        assert!(found.contains(part), "\"{found}\" does not say \"{part}\"");
    }
}

const HEAD: &str = r#"<ir_version: 8, opset_import: ["" : 17]>"#;

/// An integer product of a 2x2 weight; `op` reads `d`, `v` and maybe `e`.
fn product(axis: &str, codes: &str, zero: &str, op: &str) -> String {
    format!(
        "{HEAD}
g (float[2,2] x) => (float[2,2] y) <float s = {{0.5}}, {zero}, int8[2,2] w = {codes}, float[2] ws = {{0.25, 0.125}},
    int8[2] wz = {{0, 0}}, int32[2] b = {{1, 2}}, float[2] bs = {{0.125, 0.0625}}, float[2] wrong = {{0.125, 0.125}}> {{
  q = QuantizeLinear (x, s, z)
  d = DequantizeLinear (q, s, z)
  v = DequantizeLinear <axis = {axis}> (w, ws, wz)
  {op}
}}"
    )
}

const UNSIGNED: &str = "uint8 z = {3}";
const SIGNED: &str = "int8 z = {0}";
const SMALL: &str = "{1, 2, 3, 4}";
const LARGE: &str = "{100, 1, 100, 1}";

#[test]
fn scales_of_a_weight_lie_on_the_axis_that_the_kernel_takes() {
    let axis = "has its scales on axis";
    let case =
        |axis: &str, op: &str, expected: &[&str]| check("ort-cpu", &product(axis, SMALL, UNSIGNED, op), expected);
    case("1", "y = MatMul (d, v)", &[]);
    case("-1", "y = MatMul (d, v)", &[]);
    case("0", "y = MatMul (d, v)", &[axis]);
    case("-2", "y = MatMul (d, v)", &[axis]);
    case("0", "y = MatMul (v, d)", &[axis]);
    case("1", "y = Gemm (d, v)", &[]);
    case("0", "y = Gemm (d, v)", &[axis]);
    case("0", "y = Gemm <transB = 1> (d, v)", &[]);
    case("1", "y = Gemm <transB = 1> (d, v)", &[axis]);
    case("0", "y = Exp (v)", &[]);
}

#[test]
fn biases_are_at_the_product_of_the_scales() {
    let bias = "is not the product of the scales";
    let case = |op: &str, expected: &[&str]| check("ort-cpu", &product("1", SMALL, UNSIGNED, op), expected);
    case("e = DequantizeLinear <axis = 0> (b, bs)\n  y = Gemm (d, v, e)", &[]);
    case("e = DequantizeLinear <axis = 0> (b, wrong)\n  y = Gemm (d, v, e)", &[bias]);
    case("e = DequantizeLinear (b, s)\n  y = Gemm (d, v, e)", &[bias]);
    case("e = DequantizeLinear <axis = 0> (b, bs)\n  y = Gemm <alpha = 0.5> (d, v, e)", &[bias]);
    case("e = DequantizeLinear <axis = 0> (b, bs)\n  y = Gemm (x, v, e)", &["an int32 bias beside a float input"]);
    // Made a Gemm of.
    case("e = DequantizeLinear <axis = 0> (b, bs)\n  m = MatMul (d, v)\n  y = Add (m, e)", &[]);
    case("e = DequantizeLinear <axis = 0> (b, wrong)\n  m = MatMul (d, v)\n  y = Add (e, m)", &[bias]);
    case("e = DequantizeLinear <axis = 0> (b, wrong)\n  m = Exp (d)\n  y = Add (m, e)", &[]);
}

#[test]
fn pairs_of_weights_fit_sixteen_bits_where_that_matters() {
    let pairs = "can saturate 16-bit pair sums";
    let op = "y = MatMul (d, v)";
    check("ort-cpu", &product("1", LARGE, UNSIGNED, op), &[pairs]);
    check("ort-cpu-vnni", &product("1", LARGE, UNSIGNED, op), &[]);
    check("ort-cpu", &product("1", LARGE, SIGNED, op), &[]);
    // Pairs run along the reduction: here along rows.
    check("ort-cpu", &product("0", LARGE, UNSIGNED, "y = Gemm <transB = 1> (d, v)"), &[]);
    check("ort-cpu", &product("0", "{100, 100, 1, 1}", UNSIGNED, "y = Gemm <transB = 1> (d, v)"), &[pairs]);
    check("ort-cpu", &product("1", "{64, 64, 64, 64}", UNSIGNED, op), &[]);
    check("ort-cpu", &product("1", "{65, 0, 64, 0}", UNSIGNED, op), &[pairs]);
    check("ort-cpu", &product("1", "{-100, 1, 100, 1}", UNSIGNED, op), &[]);
}

fn conv(codes: &str, group: usize) -> String {
    format!(
        "{HEAD}
g (float[1,2,2,2] x) => (float[1,2,1,1] y) <float s = {{0.5}}, uint8 z = {{3}}, int8[2,{},1,2] w = {codes}, int8 wz = {{0}}> {{
  q = QuantizeLinear (x, s, z)
  d = DequantizeLinear (q, s, z)
  v = DequantizeLinear (w, s, wz)
  y = Conv <group = {group}> (d, v)
}}",
        2 / group
    )
}

#[test]
fn pairs_of_a_convolution_run_over_channels_first() {
    let pairs = "can saturate 16-bit pair sums";
    // [out][in][position]: neighbours in the kernel's order are the two input channels of one position.
    check("ort-cpu", &conv("{100, 0, 100, 0, 0, 0, 0, 0}", 1), &[pairs]);
    check("ort-cpu", &conv("{100, 100, 0, 0, 0, 0, 0, 0}", 1), &[]);
    check("ort-cpu", &conv("{100, 100, 100, 100}", 2), &[]);
}

fn moved(op: &str, outputs: &str, second: &str) -> String {
    format!(
        "{HEAD}
g (float[1,1,4,4] x) => (float y) <float s = {{0.5}}, uint8 z = {{3}}, float s2 = {{0.25}}, uint8 z2 = {{4}}, float[4] k = {{1, 1, 2, 2}}> {{
  q = QuantizeLinear (x, s, z)
  d = DequantizeLinear (q, s, z)
  {outputs} = {op}
  r = QuantizeLinear (p, {second})
  y = DequantizeLinear (r, {second})
}}"
    )
}

#[test]
fn codes_are_moved_at_one_scale() {
    let scales = "has different scales on its two sides";
    let case = |op: &str, second: &str, expected: &[&str]| check("ort-cpu", &moved(op, "p", second), expected);
    case("Transpose (d)", "s, z", &[]);
    case("Transpose (d)", "s2, z", &[scales]);
    case("Transpose (d)", "s, z2", &[scales]);
    case("MaxPool <kernel_shape = [2, 2]> (d)", "s2, z", &[scales]);
    case("Resize <mode = \"nearest\"> (d, , k)", "s2, z", &[scales]);
    case("Resize <mode = \"linear\"> (d, , k)", "s2, z", &[]);
    case("AveragePool <kernel_shape = [2, 2]> (d)", "s2, z", &[]);
    check("ort-cpu", &moved("MaxPool <kernel_shape = [2, 2]> (d)", "p, i", "s2, z"), &[]);
}

#[test]
fn scales_are_positive_normal_numbers() {
    for (scale, bad) in [("1e-38", true), ("0", true), ("-0.5", true), ("1.2e-38", false), ("0.5", false)] {
        let text = format!(
            "{HEAD}\ng (float[2] x) => (uint8[2] q) <float s = {{{scale}}}, uint8 z = {{0}}> {{\n  q = QuantizeLinear (x, s, z)\n}}"
        );
        check("ort-cpu", &text, if bad { &["has the scale"] } else { &[] });
    }
    let text = format!(
        "{HEAD}\ng (float[2] x) => (uint8[2] q) <float[2] s = {{1, 2}}, uint8[2] z = {{0, 0}}> {{\n  q = QuantizeLinear <axis = 0> (x, s, z)\n}}"
    );
    check("ort-cpu", &text, &["zero points"]);
}

#[test]
fn versions_fit_the_target_and_the_types() {
    let text = |ir: i64, opset: i64, dtype: &str| {
        format!(
            "<ir_version: {ir}, opset_import: [\"\" : {opset}]>\ng (float[2] x) => (float[2] y) <{dtype}[2] w = {{1, 2}}, float s = {{1}}> {{\n  v = DequantizeLinear (w, s)\n  y = Add (x, v)\n}}"
        )
    };
    check("ort-cpu", &text(10, 21, "int8"), &[]);
    check("ort-cpu", &text(10, 21, "int4"), &[]);
    check("ort-cpu", &text(9, 21, "int4"), &["IR version 10"]);
    check("ort-cpu", &text(10, 20, "uint4"), &["opset 21"]);
    check("tensorrt", &text(10, 22, "int8"), &["opset 22 is newer"]);
    check("tensorrt", &text(11, 21, "int8"), &["IR version 11 is newer"]);
    check("ort-cpu", &text(99, 99, "int8"), &["opset 99", "IR version 99"]);
}

#[test]
fn models_without_quantizers_have_no_hazards() {
    let model = prepared(&format!("{HEAD}\ng (float[2] x) => (float[2] y) {{\n  y = Exp (x)\n}}"));
    for name in amax::targets::names() {
        assert_eq!(violations(&model, &Target::load(name).unwrap()), Vec::<String>::new());
    }
}
