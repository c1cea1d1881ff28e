"""Writes the models of this folder: cases of onnx's backend test suite, and models with one of everything.

Run with onnx 1.23: python make.py
"""

import pathlib
import warnings

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx.backend.test.case.node import collect_testcases

warnings.filterwarnings("ignore")
HERE = pathlib.Path(__file__).parent

CASES = """
test_abs test_ai_onnx_ml_label_encoder_string_int test_ai_onnx_ml_tree_ensemble_set_membership
test_cast_e8m0_FLOAT_to_FLOAT8E8M0 test_conv_with_strides_padding test_dequantizelinear_e4m3fn
test_dequantizelinear_float4e2m1 test_dequantizelinear_int2 test_dequantizelinear_uint4 test_if_opt test_if_seq
test_loop13_seq test_loop16_seq_none test_optional_get_element_optional_sequence
test_optional_has_element_empty_no_input_name_optional_input test_quantizelinear_int4 test_scan9_multi_state
test_scan_sum test_sequence_map_add_2_sequences_expanded test_string_concat_utf8 test_gelu_tanh_1_expanded
test_sce_mean_weight_log_prob_expanded test_resize_tf_crop_and_resize test_lstm_with_peepholes
""".split()


def info(name, dtype=T.FLOAT, shape=(1,)):
    return h.make_tensor_value_info(name, dtype, shape)


def model(graph, functions=(), extra=(), **fields):
    imports = [h.make_opsetid("", 21), h.make_opsetid("test", 1), *extra]
    return h.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10, **fields)


def node(op="Op", inputs=("x",), outputs=("y",), domain="test", **attributes):
    return h.make_node(op, list(inputs), list(outputs), domain=domain, **attributes)


def one(name, nodes, initializers=(), inputs=None, **graph):
    g = h.make_graph(nodes, name, inputs or [info("x")], [info("y")], list(initializers), **graph)
    return model(g)


BITS = {
    T.UINT2: 2, T.INT2: 2, T.UINT4: 4, T.INT4: 4, T.FLOAT4E2M1: 4, T.UINT8: 8, T.INT8: 8, T.BOOL: 8, T.FLOAT8E4M3FN: 8,
    T.FLOAT8E4M3FNUZ: 8, T.FLOAT8E5M2: 8, T.FLOAT8E5M2FNUZ: 8, T.FLOAT8E8M0: 8, T.UINT16: 16, T.INT16: 16,
    T.FLOAT16: 16, T.BFLOAT16: 16, T.FLOAT: 32, T.INT32: 32, T.UINT32: 32, T.INT64: 64, T.UINT64: 64, T.DOUBLE: 64,
    T.COMPLEX64: 64, T.COMPLEX128: 128,
}


def dtypes():
    """Every element type as raw data; small ones with every code."""
    rng = np.random.default_rng(7)
    tensors = []
    for dtype, bits in BITS.items():
        count = 2**bits if bits <= 8 else 37
        if bits <= 8 and dtype != T.BOOL:
            values = np.arange(count)
            raw = np.zeros((count * bits + 7) // 8, dtype=np.uint8)
            for i, v in enumerate(values):
                raw[i * bits // 8] |= v << (i * bits % 8)
        elif dtype == T.BOOL:
            count, raw = 2, np.array([0, 1], dtype=np.uint8)
        else:
            raw = rng.integers(0, 256, count * bits // 8, dtype=np.uint8)
        name = T.DataType.Name(dtype).lower()
        tensors.append(h.make_tensor(name, dtype, [count], raw.tobytes(), raw=True))
        odd = 1 if dtype == T.BOOL else 3
        part = np.zeros((odd * bits + 7) // 8, dtype=np.uint8)
        tensors.append(h.make_tensor(f"{name}_odd", dtype, [odd, 1], part.tobytes(), raw=True))
    return one("dtypes", [node()], tensors)


def typed():
    """Every element type in its typed field, scalars and empty tensors."""
    tensors = []
    for dtype in [t for t in BITS if t not in (T.COMPLEX64, T.COMPLEX128)] + [T.STRING]:
        name = T.DataType.Name(dtype).lower()
        values = ["a", "b \"c\" \\d\n", "\u00e9"] if dtype == T.STRING else [0, 1, 1]
        tensors.append(h.make_tensor(f"{name}_three", dtype, [3], values))
        tensors.append(h.make_tensor(f"{name}_scalar", dtype, [], values[1:2]))
        tensors.append(h.make_tensor(f"{name}_empty", dtype, [2, 0], []))
    tensors.append(h.make_tensor("c64", T.COMPLEX64, [2], [1 + 2j, -0.5j]))
    tensors.append(h.make_tensor("c128", T.COMPLEX128, [2], [1 + 2j, 1e300 - 0.5j]))
    binary = onnx.TensorProto(name="binary", data_type=T.STRING, dims=[2], string_data=[b"\xff\x00", b""])
    return one("typed", [node()], [*tensors, binary])


def floats():
    """Numbers that are hard to print."""
    f = [0.0, -0.0, 1e-45, 1.1754944e-38, 3.4028235e38, 0.1, 1 / 3, 1e16, 123456.7, 1e-7, np.inf, -np.inf, np.nan]
    bits = np.array([0xFFC00000, 0x7F800001, 0x7FC00001, 0xFFFFFFFF], dtype=np.uint32)
    single = np.concatenate([np.array(f, dtype=np.float32), bits.view(np.float32)])
    wide = np.concatenate([np.array([*f, 5e-324, 1.7976931348623157e308]), bits.astype(np.uint64).view(np.float64)])
    wide = np.concatenate([wide, np.array([0xFFF8000000000000, 0x7FF0000000000001], dtype=np.uint64).view(np.float64)])
    tensors = [onnx.numpy_helper.from_array(single, "single"), onnx.numpy_helper.from_array(wide, "wide")]
    return one("floats", [node(list=[float(v) for v in f], one=1.0, tiny=1e-45)], tensors)


def attributes():
    """Every kind of attribute, as one and as list, lists also empty."""
    t = h.make_tensor("inner", T.FLOAT, [2], [1, 2])
    unnamed = h.make_tensor("", T.INT64, [], [7])
    quoted = h.make_tensor("in/ner", T.FLOAT, [2], [1, 2])
    g = h.make_graph([node(inputs=["x"], outputs=["z"], alpha=0.5)], "body", [], [info("z")], [])
    sub = h.make_graph([h.make_node("Identity", ["w"], ["z"])], "sub graph", [info("w")], [info("z")], [t])
    sparse = h.make_sparse_tensor(t, h.make_tensor("at", T.INT64, [2], [0, 3]), [9])
    types = [
        h.make_tensor_type_proto(T.FLOAT, [1, "N", None, "2*N"]),
        h.make_tensor_type_proto(T.INT4, None),
        h.make_sequence_type_proto(h.make_tensor_type_proto(T.BFLOAT16, [])),
        h.make_optional_type_proto(h.make_sequence_type_proto(h.make_tensor_type_proto(T.STRING, [2]))),
        h.make_map_type_proto(T.INT64, h.make_tensor_type_proto(T.FLOAT, [])),
        h.make_sparse_tensor_type_proto(T.DOUBLE, [3, 4]),
        onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(domain="some.where", name="thing")),
        onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(name="a.b")),
        onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque()),
    ]
    attrs = [
        h.make_attribute("f", 2.0), h.make_attribute("i", -7), h.make_attribute("s", 'a "b" \\ \n c'),
        h.make_attribute("bytes", b"\xff\x00a"), h.make_attribute("t", t), h.make_attribute("unnamed", unnamed),
        h.make_attribute("quoted", quoted), h.make_attribute("g", g), h.make_attribute("named", sub),
        h.make_attribute("sparse", sparse), h.make_attribute("fs", [1.0, 2.5]), h.make_attribute("is", [1, 2, 3]),
        h.make_attribute("ss", ["a", "b"]), h.make_attribute("ts", [t, quoted]), h.make_attribute("gs", [g, sub]),
        h.make_attribute("sps", [sparse, sparse]), h.make_attribute("tps", types), h.make_attribute("odd name", 1),
        h.make_attribute("hex", "hex"), h.make_attribute("empty", ""),
    ]
    attrs += [h.make_attribute(f"type{i}", t) for i, t in enumerate(types)]
    for name in ["FLOATS", "INTS", "STRINGS", "TENSORS", "GRAPHS", "SPARSE_TENSORS", "TYPE_PROTOS"]:
        attrs.append(onnx.AttributeProto(name=f"no_{name.lower()}", type=onnx.AttributeProto.AttributeType.Value(name)))
    n = node()
    n.attribute.extend(attrs)
    ports = [onnx.ValueInfoProto(name=f"p{i}", type=t) for i, t in enumerate(types)]
    return one("attributes", [n], inputs=[info("x"), *ports])


def names():
    """Names that need quotes."""
    odd = ["/encoder/MatMul_output_0", "onnx::Shape_422", "float", "seq", "nan", "undefined", "1x", "a b", 'q"uo\\te',
           "\u00e4", "#no", "_ok9", "x.y", "line\nbreak"]
    nodes = [h.make_node("Op", [name, "", name], [name + "!", "", f"second {i}"], name=name, domain="test")
             for i, name in enumerate(odd)]
    nodes += [h.make_node("Op", [], [], domain="test"), h.make_node("Op", [""], ["", ""], name="", domain="test"),
              h.make_node("odd-op", ["_ok9"], ["y"], domain="pkg.torch.2.9+cpu", overload="ov-1"),
              h.make_node("FusedMatMul", ["_ok9"], ["fused"], domain="com.microsoft", overload="plain"),
              h.make_node("Relu", ["_ok9"], ["relu"], domain="ai.onnx")]
    weight = h.make_tensor("w/eight", T.INT4, [3], [-8, 7, 1])
    infos = [info(name + "!", T.FLOAT, ["dim/1", "N", "float", None, 3]) for name in odd]
    infos += [onnx.ValueInfoProto(name="relu"), onnx.ValueInfoProto(name="seq")]
    g = h.make_graph(nodes, "graph/1", [info(name) for name in odd], [info("y"), onnx.ValueInfoProto(name="relu")],
                     [weight], value_info=infos)
    extra = [h.make_opsetid("pkg.torch.2.9+cpu", 1), h.make_opsetid("com.microsoft", 1)]
    return model(g, extra=extra)


def functions():
    """Functions with attributes, defaults, overloads and types; a header with everything."""
    body = [h.make_node("Constant", [], ["c"]), h.make_node("Elu", ["x"], ["e"]), h.make_node("Add", ["c", "e"], ["z"])]
    for n, attr, ref, kind in [(body[0], "value_float", "shift", 1), (body[1], "alpha", "al pha", 1)]:
        n.attribute.append(onnx.AttributeProto(name=attr, ref_attr_name=ref, type=kind))
    f = h.make_function("test", "f", ["x"], ["z"], body, [h.make_opsetid("", 21)], ["shift"],
                        [h.make_attribute("al pha", 1.0)], overload="one", value_info=[info("e", T.FLOAT, ["N"])])
    f.doc_string = "a function"
    g2 = h.make_function("test", "plain-name", ["float", "b"], ["z"], [h.make_node("Add", ["float", "b"], ["z"])],
                         [h.make_opsetid("", 21)])
    nodes = [node("f", shift=1.5, overload="one"), node("plain-name", ["x", "x"], ["u"])]
    m = model(h.make_graph(nodes, "main", [info("x")], [info("y")]), [f, g2], producer_name='pro"ducer',
              producer_version="1.0", domain="do.main", model_version=3, doc_string="doc\nstring")
    h.set_model_props(m, {"key": "va\"lue", "empty": "", "a:b": "[x]"})
    return m


def initializers():
    """Defaults of inputs, sparse initializers, and nested bodies that capture values."""
    inner = h.make_graph([h.make_node("Add", ["x", "w"], ["t"]), h.make_node("Relu", ["t"], ["z"])], "inner", [],
                         [info("z")], [h.make_tensor("w", T.FLOAT, [1], [2])], value_info=[info("t")])
    outer = h.make_graph([h.make_node("If", ["flag"], ["o"], then_branch=inner, else_branch=inner)], "outer", [],
                         [info("o")])
    nodes = [h.make_node("If", ["flag"], ["y"], name="choose", then_branch=outer, else_branch=inner),
             node(inputs=["sparse", "big"], outputs=["v"])]
    default = h.make_tensor("x", T.FLOAT, [1], [0.5])
    first = h.make_tensor("first", T.FLOAT, [1], [0.25])
    big = onnx.numpy_helper.from_array(np.arange(32, dtype=np.int8).reshape(2, 16), "big")
    sparse = h.make_sparse_tensor(h.make_tensor("sparse", T.FLOAT, [2], [1, 2]),
                                  h.make_tensor("", T.INT64, [2], [0, 3]), [3, 4])
    g = h.make_graph(nodes, "main", [info("x", T.FLOAT, ["N"]), info("flag", T.BOOL, [])], [info("y")],
                     [first, default, big], sparse_initializer=[sparse])
    return model(g)


def main():
    cases = {c.name: c.model for c in collect_testcases(None) if c.model is not None}
    for name in CASES:
        onnx.save(cases[name], HERE / f"{name}.onnx")
    for make in [dtypes, typed, floats, attributes, names, functions, initializers]:
        onnx.save(make(), HERE / f"{make.__name__}.onnx")


main()
