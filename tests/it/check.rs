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
    case("e = DequantizeLinear <axis = 0> (b, wrong)\n  m = MatMul (d, v)\n  y = Add (m, e)", &[bias]);
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

/// `made` gives the codes `q` of `x`, which an integer product reads beside `w`.
fn integer(made: &str, weight: &str) -> String {
    format!(
        "{HEAD}
g (float[2,2] x, int8[2,2] q0) => (int32[2,2] y) <float s = {{0.5}}, uint8 u = {{3}}, int8 i = {{0}}, {weight}> {{
  {made}
  y = MatMulInteger (q, w)
}}"
    )
}

#[test]
fn pairs_of_integer_operators_fit_too() {
    let pairs = "can saturate 16-bit pair sums";
    let (down, across) = ("int8[2,2] w = {100, 1, 100, 1}", "int8[2,2] w = {100, 100, 1, 1}");
    let at_run_time = "q, qs, qz = DynamicQuantizeLinear (x)";
    let case = |made: &str, weight: &str, expected: &[&str]| check("ort-cpu", &integer(made, weight), expected);
    case(at_run_time, down, &[pairs]);
    case(at_run_time, across, &[]);
    case(at_run_time, "uint8[2,2] w = {100, 1, 100, 1}", &[]);
    case("q = QuantizeLinear (x, s, u)", down, &[pairs]);
    case("q = QuantizeLinear (x, s, i)", down, &[]);
    case("q = Identity (q0)", down, &[]);
    check("ort-cpu-vnni", &integer(at_run_time, down), &[]);

    // One that quantizes its input itself; codes run along inputs and along the state.
    let lstm = |of_inputs: &str, of_state: &str| {
        format!(
            "<ir_version: 8, opset_import: [\"\" : 17, \"com.microsoft\" : 1]>
g (float[1,1,2] x) => (float[1,1,1,2] y) <int8[1,2,8] w = {{{of_inputs}}}, int8[1,2,8] r = {{{of_state}}}, float s = {{0.5}}, int8 z = {{0}}> {{
  y = com.microsoft.DynamicQuantizeLSTM <hidden_size = 2> (x, w, r, , , , , , s, z, s, z)
}}"
        )
    };
    let safe = "100, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1";
    let unsafe_pair = "100, 1, 1, 1, 1, 1, 1, 1, 100, 1, 1, 1, 1, 1, 1, 1";
    check("ort-cpu", &lstm(safe, safe), &[]);
    check("ort-cpu", &lstm(unsafe_pair, safe), &[pairs]);
    check("ort-cpu", &lstm(safe, unsafe_pair), &[pairs]);
    check("ort-cpu", &lstm(unsafe_pair, unsafe_pair), &[pairs, pairs]);
}

/// A fusion reads 2-bit columns of `[K, N]` four at a time.
#[test]
fn two_bit_weights_have_whole_columns() {
    let columns = "columns, and only multiples of 4 are computed correctly";
    let text = |dims: [usize; 2], dtype: &str, block: usize, op: &str| {
        let [rows, width] = dims;
        let codes = vec!["1"; rows * width].join(", ");
        let (attributes, scale) = if block == 0 {
            (String::new(), "float s = {1}".to_owned())
        } else {
            let scales = rows.div_ceil(block) * width;
            let list = vec!["1"; scales].join(", ");
            (format!("<axis = 0, block_size = {block}>"), format!("float[{}, {width}] s = {{{list}}}", scales / width))
        };
        format!(
            "<ir_version: 13, opset_import: [\"\" : 25]>
g (float[n,m] x) => (float y) <{dtype}[{rows}, {width}] w = {{{codes}}}, {scale}> {{
  v = DequantizeLinear {attributes} (w, s)
  {op}
}}"
        )
    };
    let case = |dims, dtype: &str, block, op: &str, expected: &[&str]| {
        check("ort-cpu", &text(dims, dtype, block, op), expected);
    };
    case([2, 4], "int2", 0, "y = MatMul (x, v)", &[]);
    case([2, 6], "int2", 0, "y = MatMul (x, v)", &[columns]);
    case([2, 6], "uint2", 0, "y = Gemm (x, v)", &[columns]);
    case([2, 6], "int4", 0, "y = MatMul (x, v)", &[]);
    case([2, 6], "int2", 0, "y = MatMul (v, x)", &[]);
    case([2, 6], "int2", 0, "y = Gemm <transB = 1> (x, v)", &[]);
    // Groups of sizes that the fusion has.
    case([32, 3], "int2", 16, "y = MatMul (x, v)", &[columns]);
    case([32, 3], "int2", 8, "y = MatMul (x, v)", &[]);
    let everywhere = text([2, 6], "int2", 0, "y = MatMul (x, v)");
    check("generic", &everywhere, &[]);
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
    // Each output on its own; what others read as well stays float.
    check("ort-cpu", &moved("Split <axis = 3, num_outputs = 2> (d)", "o, p", "s2, z"), &[scales]);
    check("ort-cpu", &moved("Transpose (d)\n  t = Abs (p)", "p", "s2, z"), &[]);
    check("ort-cpu", &moved("Transpose (x)", "p", "s2, z"), &[]);
}

#[test]
fn scales_are_positive_normal_numbers() {
    for (scale, bad) in [("1e-38", true), ("0", true), ("-0.5", true), ("1.2e-38", false), ("0.5", false)] {
        let text = format!(
            "{HEAD}\ng (float[2] x) => (uint8[2] q) <float s = {{{scale}}}, uint8 z = {{0}}> {{\n  q = QuantizeLinear (x, s, z)\n}}"
        );
        check("ort-cpu", &text, if bad { &["has the scale"] } else { &[] });
    }
    // Codes that are stored may be multiplied by a number of either sign, or all by zero.
    let stored = |scale: &str, codes: &str| {
        format!(
            "{HEAD}\ng (float[2] x, int8[2] c) => (float[2] y) <int8[2] w = {{1, 2}}, float s = {{{scale}}}> {{\n  v = DequantizeLinear ({codes}, s)\n  y = Mul (x, v)\n}}"
        )
    };
    for (scale, codes, bad) in
        [("-0.5", "w", false), ("0", "w", false), ("1e-38", "w", true), ("-0.5", "c", true), ("0", "c", true)]
    {
        check("ort-cpu", &stored(scale, codes), if bad { &["has the scale"] } else { &[] });
    }
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
    check("tensorrt", &text(10, 24, "int8"), &["opset 24 is newer"]);
    check("tensorrt", &text(12, 21, "int8"), &["IR version 12 is newer"]);
    check("ort-cpu", &text(99, 99, "int8"), &["opset 99", "IR version 99"]);
    check("ort-cpu", &text(13, 25, "int8"), &[]);
    // 16 bits are old, only quantizers of them are not.
    let wide = "needs opset 21 and IR version 10";
    check("ort-cpu", &text(10, 21, "int16"), &[]);
    check("ort-cpu", &text(10, 20, "int16"), &[wide]);
    check("ort-cpu", &text(9, 21, "uint16"), &[wide]);
    let old = |body: &str| {
        format!(
            "{HEAD}\ng (float[2,2] x) => (y) <int16[2,2] w = {{1, 2, 3, 4}}, int8[2,2] c = {{1, 2, 3, 4}}, float s = {{1}}, uint16 z = {{0}}, float[1,2] gs = {{1, 1}}> {{\n  {body}\n}}"
        )
    };
    check("ort-cpu", &old("y = Cast <to = 1> (w)"), &[]);
    check("ort-cpu", &old("y = QuantizeLinear (x, s, z)"), &[wide]);
    check("ort-cpu", &old("y = DequantizeLinear <axis = 0, block_size = 2> (c, gs)"), &[wide]);
    // A type is named once.
    let twice = text(10, 20, "int4").replace(", float s", ", int4[2] w2 = {1, 2}, float s");
    check("ort-cpu", &twice, &["opset 21"]);
}

#[test]
fn models_without_quantizers_have_no_hazards() {
    let model = prepared(&format!("{HEAD}\ng (float[2] x) => (float[2] y) {{\n  y = Exp (x)\n}}"));
    for name in amax::targets::names() {
        assert_eq!(violations(&model, &Target::load(name).unwrap()), Vec::<String>::new());
    }
}
