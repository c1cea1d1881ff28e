//! What schemas demand of nodes, one broken model a case.

use amax::ir::text::parse;

const HEAD: &str = r#"<ir_version: 13, opset_import: ["": 25, "com.microsoft": 1]>
g (float[2, 4] x, float16[2, 4] h, int64[2] i, uint8[2, 4] q, int8[2, 4] k, bool b) => (y)
<float s = {1}, float[1] s1 = {1}, float[4] s4 = {1, 1, 1, 1}, float[3] s3 = {1, 1, 1}, float[2, 2] s22 = {1, 1, 1, 1},
 float[2, 1] s21 = {1, 1}, double d = {1}, int32 n = {1}, uint8 zu = {0}, uint8[0] none = {}, int8 zi = {0}, uint8[4] zu4 = {0, 0, 0, 0}, uint4 z4 = {0},
 float w = {1}, float[4, 4] m = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, uint8[4, 1, 16] packed = {
 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}>
"#;

/// Whether a graph with this node alone is refused for `wanted`; an empty one is a valid model.
fn check(cases: &[(&str, &str)]) {
    for (node, wanted) in cases {
        let found = parse(&format!("{HEAD}{{ {node} }}"));
        match found {
            Ok(_) => assert!(wanted.is_empty(), "{node} is accepted"),
            Err(e) => {
                let message = e.to_string();
                assert!(!wanted.is_empty() && message.contains(wanted), "{node}\nfound:  {message}\nwanted: {wanted}");
                assert!(message.contains("node \"y\" ("), "{node}: {message}");
            }
        }
    }
}

#[test]
fn operators_have_as_many_inputs_and_outputs_as_they_take_and_give() {
    check(&[
        ("y = Add(x, x)", ""),
        ("y = Add(x)", "has 1 input, but takes 2 inputs"),
        ("y = Add(x, x, x)", "has 3 inputs, but takes 2 inputs"),
        ("y = Relu()", "has 0 inputs, but takes 1 input"),
        ("y = Relu(x, x)", "has 2 inputs, but takes 1 input"),
        ("y = Conv(x)", "has 1 input, but takes 2 to 3 inputs"),
        ("y = Concat<axis=0>()", "has 0 inputs, but takes at least 1 input"),
        ("y = MatMul(\"\", m)", "lacks its input 0"),
        ("y = Gemm(x, m, \"\")", ""),
        ("y = Clip(x, \"\", s)", ""),
        ("y, o = Relu(x)", "has 2 outputs, but gives 1 output"),
        ("y, o = MaxPool<kernel_shape=[1]>(x)", ""),
        ("y, o, p = MaxPool<kernel_shape=[1]>(x)", "has 3 outputs, but gives 1 to 2 outputs"),
        ("y = QuantizeLinear(x)", "has 1 input, but takes 2 to 3 inputs"),
        ("y, o = DynamicQuantizeLinear(x)", "has 2 outputs, but gives 3 outputs"),
        ("y = com.microsoft.MatMulNBits<K=4, N=4, block_size=16>(x, packed)", "has 2 inputs, but takes 3 to 6 inputs"),
        ("y = com.microsoft.QLinearAdd(q, s, zu, q, s, zu)", "has 6 inputs, but takes 7 to 8 inputs"),
        ("y = com.microsoft.QLinearAdd(q, s, \"\", q, s, \"\", s)", ""),
        ("y = com.microsoft.QLinearAdd(q, \"\", zu, q, s, zu, s)", "lacks its input 1"),
        ("y = com.microsoft.DynamicQuantizeLSTM(x, q, q)", "has 3 inputs, but takes 12 inputs"),
        ("y = com.microsoft.Unheard()", ""),
        ("y, o = Identity(x)", "has 2 outputs, but gives 1 output"),
        ("y = TopK(x, i)", "has 1 output, but gives 2 outputs"),
        ("y, o = TopK(x, i)", ""),
        ("y = Sum()", "has 0 inputs, but takes at least 1 input"),
        ("y = Pow(x)", "has 1 input, but takes 2 inputs"),
        ("y = Unheard()", ""),
    ]);
}

#[test]
fn inputs_have_the_types_that_operators_take() {
    check(&[
        ("y = Add(x, h)", "reads \"x\" of float beside \"h\" of float16: they have one type"),
        ("y = MatMul(x, q)", "reads \"x\" of float beside \"q\" of uint8"),
        ("y = Gather(x, i)", ""),
        ("y = Gather(x, s)", "reads \"s\" of float at input 1: an index is int32 or int64"),
        ("y = Where(b, x, x)", ""),
        ("y = Where(i, x, x)", "reads \"i\" of int64 at input 0: a condition is bool"),
        ("y = Where(b, x, h)", "reads \"x\" of float beside \"h\" of float16"),
        ("y = MatMulInteger(q, k, zu, zi)", ""),
        ("y = MatMulInteger(x, k)", "reads \"x\" of float at input 0: it takes quantized values"),
        ("y = MatMulInteger(q, k, zi, zi)", "has the zero point \"zi\" of int8 for \"q\" of uint8: they have one type"),
        ("y = com.microsoft.QLinearSigmoid(q, s, none, s, zu)", "has the zero point \"none\", which is empty"),
        ("y = DequantizeLinear(q, s, none)", "none"),
        (
            "y = com.microsoft.QLinearSigmoid(q, n, zu, s, zu)",
            "reads \"n\" of int32 at input 1: it takes a float there",
        ),
        ("y = com.microsoft.GatherBlockQuantized(packed, s, s)", "reads \"s\" of float at input 1: an index is"),
        ("y = com.microsoft.GatherBlockQuantized(x, i, s)", "its table is uint8, int4 or uint4"),
        ("y = com.microsoft.GatherBlockQuantized<block_size=0>(packed, i, s)", "has no attribute block_size above 0"),
        ("y = com.microsoft.MatMulNBits<K=4, N=4, block_size=16>(x, packed, s4)", ""),
        ("y = com.microsoft.MatMulNBits<K=4, block_size=16>(x, packed, s4)", "has no attribute N above 0"),
        ("y = com.microsoft.MatMulNBits<K=4, N=4, block_size=16>(q, packed, s4)", "it takes a float there"),
        ("y = com.microsoft.MatMulNBits<K=4, N=4, block_size=16>(x, m, s4)", "its weight is packed into bytes"),
        ("y = com.microsoft.MatMulNBits<K=4, N=4, block_size=16>(x, packed, zu4)", "scales are floats"),
    ]);
}

#[test]
fn quantizers_have_the_types_scales_and_zero_points_that_their_data_need() {
    check(&[
        ("y = QuantizeLinear(x, s, zu)", ""),
        ("y = QuantizeLinear(x, s1, zu)", ""),
        ("y = QuantizeLinear(q, s, zu)", "quantizes \"q\" of uint8, which is not float"),
        ("y = QuantizeLinear(x, n, zu)", "has the scale \"n\" of int32, which is not one of floats"),
        ("y = QuantizeLinear(x, d, zu)", "has the scale \"d\" of double"),
        ("y = QuantizeLinear(x, s, w)", "has the zero point \"w\" of float, which is not quantized"),
        (
            "y = QuantizeLinear<output_dtype=3>(x, s, zu)",
            "has an output_dtype that is not that of its zero point \"zu\" of uint8",
        ),
        ("y = QuantizeLinear<output_dtype=2>(x, s, zu)", ""),
        ("y = QuantizeLinear(x, s4, zu)", "has 4 scales in \"s4\" and 1 zero points in \"zu\""),
        ("y = QuantizeLinear<axis=1>(x, s4, zu4)", ""),
        ("y = QuantizeLinear<axis=-1>(x, s4, zu4)", ""),
        ("y = QuantizeLinear<axis=0>(x, s4, zu4)", "has the scales \"s4\" of shape [4] for axis 0, which has length 2"),
        ("y = QuantizeLinear<axis=2>(x, s4, zu4)", "has its scales along axis 2 of a tensor of rank 2"),
        ("y = DequantizeLinear(q, s, zu)", ""),
        ("y = DequantizeLinear(n, s)", ""),
        ("y = DequantizeLinear(x, s)", "dequantizes \"x\" of float, which is not quantized"),
        ("y = DequantizeLinear(q, s, zi)", "has the zero point \"zi\" of int8 for \"q\" of uint8"),
        ("y = DequantizeLinear(q, s3)", "has the scales \"s3\" of shape [3] for axis 1, which has length 4"),
        ("y = DequantizeLinear<axis=1, block_size=2>(q, s22)", ""),
        (
            "y = DequantizeLinear<axis=1, block_size=4>(q, s22)",
            "has the scales \"s22\" of shape [2, 2] where blocks of 4 need [2, 1]",
        ),
        ("y = DequantizeLinear<axis=1, block_size=3>(q, s22)", ""),
        ("y = DequantizeLinear<axis=5, block_size=2>(q, s22)", "has its blocks along axis 5 of a tensor of rank 2"),
        (
            "y = DequantizeLinear<axis=1, block_size=2>(q, s4)",
            "has the scales \"s4\" of shape [4] where blocks of 2 need [2, 2]",
        ),
        ("y = com.microsoft.DequantizeLinear(x, s)", "dequantizes \"x\" of float"),
    ]);
}
