"""Makes the models of tests/data/roundtrip.

    python make_roundtrip.py              the committed selection
    python make_roundtrip.py --all DIR    every model that the onnx package makes or ships, for AMAX_ROUNDTRIP_DIR

Written with onnx 1.23. Files are written as SerializeToString gives them: fields in the order of their numbers.
"""

import pathlib
import shutil
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = pathlib.Path(__file__).parent / "roundtrip"

# Node cases of the ONNX backend tests, for what their name says.
CASES = [
    "test_if", "test_if_seq", "test_if_opt", "test_loop11", "test_loop13_seq", "test_loop16_seq_none", "test_scan_sum",
    "test_scan9_sum", "test_optional_has_element_empty_no_input_name_optional_input", "test_optional_get_element_sequence",
    "test_identity_opt", "test_identity_sequence", "test_sequence_map_add_2_sequences_expanded",
    "test_sequence_insert_at_front", "test_constant", "test_constantofshape_int_zeros", "test_clip_default_max",
    "test_quantizelinear_blocked_symmetric", "test_quantizelinear_int4", "test_quantizelinear_uint2",
    "test_quantizelinear_float4e2m1", "test_quantizelinear_e4m3fn", "test_dequantizelinear_float4e2m1",
    "test_dequantizelinear_uint16", "test_qlinearconv", "test_matmulinteger", "test_layer_normalization_default_axis",
    "test_layer_normalization_default_axis_expanded_ver18", "test_group_normalization_example_expanded",
    "test_string_concat", "test_ai_onnx_ml_label_encoder_string_int",
    "test_ai_onnx_ml_tree_ensemble_set_membership", "test_adam", "test_momentum", "test_training_dropout_default_mask", "test_lstm_with_peepholes",
    "test_attention_4d_causal_expanded",
]  # fmt: skip


def every(folder):
    """All models of the backend tests and of the package's folders."""
    from onnx.backend.test.case.model import collect_testcases as model_cases
    from onnx.backend.test.case.node import collect_testcases as node_cases

    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for kind, cases in [("node", node_cases(None)), ("model", model_cases())]:
        for case in cases:
            if case.model is not None:
                (folder / f"{kind}_{case.name}.onnx").write_bytes(case.model.SerializeToString())
                count += 1
    package = pathlib.Path(onnx.__file__).parent
    for path in sorted(package.rglob("*.onnx")):
        shutil.copy(path, folder / ("package_" + "__".join(path.relative_to(package).parts)))
        count += 1
    print(count, "models")


def model(graph, **kwargs):
    kwargs.setdefault("opset_imports", [helper.make_opsetid("", 21)])
    kwargs.setdefault("ir_version", 10)
    return helper.make_model(graph, **kwargs)


def value(name, dtype=TensorProto.FLOAT, shape=("n",)):
    return helper.make_tensor_value_info(name, dtype, shape)


def element_types():
    """An initializer of every element type as raw data and as typed fields."""
    tensors = []
    narrow = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
    for name, code in TensorProto.DataType.items():
        if name == "UNDEFINED":
            continue
        if name == "STRING":
            tensors.append(helper.make_tensor("strings", code, [3], [b"", b"x", b"\xff\x00"]))
            continue
        width = narrow.get(name) or 8 * helper.tensor_dtype_to_np_dtype(code).itemsize
        raw = TensorProto(name=f"raw_{name}", data_type=code, dims=[5])
        raw.raw_data = bytes(range(1, (5 * width + 7) // 8 + 1))
        tensors.append(raw)
        typed = TensorProto(name=f"typed_{name}", data_type=code, dims=[5])
        if name in ("FLOAT", "COMPLEX64"):
            typed.float_data.extend([0.0, -0.0, 1.5, float("inf"), 2.0] * (2 if name == "COMPLEX64" else 1))
        elif name in ("DOUBLE", "COMPLEX128"):
            typed.double_data.extend([0.0, -0.0, 1.5, -1e300, 2.0] * (2 if name == "COMPLEX128" else 1))
        elif name == "INT64":
            typed.int64_data.extend([0, -1, 2**62, -(2**63), 7])
        elif name in ("UINT32", "UINT64"):
            typed.uint64_data.extend([0, 1, 2**31, 2**32 - 1, 7])
        else:
            entries = {4: 3, 2: 2}.get(width, 5)
            signed = name in ("INT8", "INT16", "INT32")
            typed.int32_data.extend([0, -1 if signed else 255, 1, 2, 3][:entries])
        tensors.append(typed)
    tensors.append(TensorProto(name="scalar", data_type=1, raw_data=b"\0\0\x80\x3f"))
    tensors.append(TensorProto(name="empty", data_type=1, dims=[0, 3], raw_data=b""))
    tensors.append(TensorProto(name="empty_typed", data_type=7, dims=[0]))
    node = helper.make_node("Identity", ["scalar"], ["y"])
    return model(helper.make_graph([node], "g", [], [value("y", shape=[])], tensors), ir_version=14)


def presence():
    """Fields that are present and empty, or zero."""
    nodes = [
        helper.make_node("Clip", ["x", "", "high"], ["c"], name="", domain="", doc_string=""),
        helper.make_node("Dropout", ["c"], ["d", ""], domain="ai.onnx", overload=""),
        helper.make_node("Identity", ["d"], ["y"], zero=0, none=0.0, text="", numbers=[0, 0], floats=[-0.0]),
    ]
    nodes[2].attribute.add(name="absent", type=onnx.AttributeProto.INTS)
    nodes[2].attribute.add(name="", type=0, ref_attr_name="")
    high = TensorProto(name="high", data_type=1, raw_data=b"\0\0\0\0", doc_string="", data_location=0)
    high.external_data.add(key="unused", value="")
    x = value("x")
    x.doc_string = ""
    x.type.denotation = ""
    x.type.tensor_type.shape.dim.add(denotation="DATA_BATCH")
    x.type.tensor_type.shape.dim.add(dim_value=0)
    x.type.tensor_type.shape.dim.add(dim_param="")
    graph = helper.make_graph(nodes, "", [x], [value("y")], [high], doc_string="")
    graph.value_info.add(name="c")
    graph.value_info.add(name="nothing has this name")
    graph.metadata_props.add(key="", value="")
    whole = model(graph, producer_name="", producer_version="", domain="", model_version=0, doc_string="")
    whole.opset_import[0].domain = ""
    whole.metadata_props.add(key="only a key")
    return whole


def kitchen_sink():
    """What is carried and not interpreted, and what is nested."""
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "inner"], ["sum"]), helper.make_node("Mul", ["sum", "w"], ["out"])],
        "then", [], [value("out")], [helper.make_tensor("inner", 1, [1], [2.0])],
    )  # fmt: skip
    nested = helper.make_graph(
        [helper.make_node("If", ["flag"], ["deep"], then_branch=body, else_branch=body)], "else", [], [value("deep")]
    )
    function_body = [
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("LeakyRelu", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["r"]),
    ]
    function_body[1].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="alpha")
    function = helper.make_function(
        "custom", "Act", ["a"], ["r"], function_body, [helper.make_opsetid("", 21)], ["alpha"],
        [helper.make_attribute("beta", 0.5)], doc_string="a function", overload="v2",
    )  # fmt: skip
    function.value_info.append(value("b"))
    function.metadata_props.add(key="k", value="v")
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", 1, [2], [1.0, 2.0]), helper.make_tensor("si", 7, [2], [0, 2]), [3]
    )
    nodes = [
        helper.make_node("If", ["flag"], ["i"], name="choose", then_branch=body, else_branch=nested),
        helper.make_node("Act", ["i"], ["f"], domain="custom", overload="v2", alpha=0.1),
        helper.make_node("Add", ["f", "s"], ["t"]),
        helper.make_node("Constant", [], ["k"], sparse_value=sparse),
        helper.make_node("Constant", [], ["big"], value=helper.make_tensor("", 1, [2], [3.0, 4.0])),
        helper.make_node("Call", ["t", "k"], ["y"], domain="custom.more", types=[value("z").type], one=value("z").type,
                         tensors=[helper.make_tensor("t0", 6, [1], [1]), helper.make_tensor("t1", 7, [1], [2])],
                         graphs=[body, nested], sparse_many=[sparse]),
    ]  # fmt: skip
    nodes[0].metadata_props.add(key="namespace", value="root/choose")
    device = nodes[2].device_configurations.add(configuration_id="two", pipeline_stage=1)
    spec = device.sharding_spec.add(tensor_name="f", device=[0, 1])
    spec.index_to_device_group_map.add(key=0, value=[0, 1])
    spec.sharded_dim.add(axis=0).simple_sharding.add(dim_value=4, num_shards=2)
    spec.sharded_dim[0].simple_sharding.add(dim_param="n", num_shards=2)
    w = helper.make_tensor("w", 1, [1], [3.0])
    inputs = [value("x"), value("flag", TensorProto.BOOL, []), value("w", shape=[1])]
    inputs[0].metadata_props.add(key="k", value="v")
    graph = helper.make_graph(nodes, "main", inputs, [value("y"), value("big"), value("i")], [w])
    graph.sparse_initializer.append(sparse)
    annotation = graph.quantization_annotation.add(tensor_name="x")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    for ty in [
        helper.make_sequence_type_proto(helper.make_map_type_proto(8, helper.make_tensor_type_proto(1, [2]))),
        helper.make_optional_type_proto(helper.make_sparse_tensor_type_proto(1, [None, 3])),
        onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(domain="d", name="n")),
    ]:
        graph.value_info.append(onnx.ValueInfoProto(name=f"type{len(graph.value_info)}", type=ty))
    whole = model(
        graph, functions=[function], ir_version=13, producer_name="make_roundtrip",
        opset_imports=[helper.make_opsetid(d, v) for d, v in [("custom", 1), ("", 21), ("custom.more", 2)]],
    )  # fmt: skip
    helper.set_model_props(whole, {"author": "ünïcode ✓", "empty": ""})
    whole.configuration.add(name="two", num_devices=2, device=["a", "b"])
    training = whole.training_info.add()
    training.initialization.CopyFrom(
        helper.make_graph([helper.make_node("Constant", [], ["w0"], value_float=0.0)], "init", [], [value("w0", shape=[])])
    )
    training.algorithm.CopyFrom(helper.make_graph([], "step", [], [], [helper.make_tensor("lr", 1, [1], [0.1])]))
    training.initialization_binding.add(key="w", value="w0")
    training.update_binding.add(key="w", value="w0")
    return whole


def shadowing():
    """Two bodies with the same names, which also hide an outer name that they do not use."""
    bodies = [
        helper.make_graph([helper.make_node(op, ["x"], ["h"]), helper.make_node("Neg", ["h"], ["o"])], "b", [], [value("o")])
        for op in ("Relu", "Abs")
    ]
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["h"]),
        helper.make_node("If", ["flag"], ["r"], then_branch=bodies[0], else_branch=bodies[1]),
        helper.make_node("Add", ["r", "h"], ["y"]),
    ]
    return model(helper.make_graph(nodes, "g", [value("x"), value("flag", TensorProto.BOOL, [])], [value("y")]))


def weights():
    """Layers with weights of a few kilobytes, one of them as typed data."""
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.standard_normal((24, 24)).astype(np.float32), "w")
    b = numpy_helper.from_array(rng.standard_normal(24).astype(np.float32), "b")
    typed = helper.make_tensor("typed", 1, [24, 24], rng.standard_normal(576).astype(np.float32).tolist())
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b"], ["hb"], name="bias"),
        helper.make_node("MatMul", ["hb", "w"], ["h2"], name="second"),
        helper.make_node("MatMul", ["h2", "typed"], ["y"], name="third"),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", shape=["n", 24])], [value("y", shape=["n", 24])], [w, b, typed])
    return model(graph)


def main():
    if sys.argv[1:2] == ["--all"]:
        return every(pathlib.Path(sys.argv[2]))
    from onnx.backend.test.case.node import collect_testcases

    HERE.mkdir(exist_ok=True)
    cases = {case.name: case.model for case in collect_testcases(None)}
    missing = [name for name in CASES if name not in cases]
    if missing:
        raise SystemExit(f"no such cases: {missing}")
    made = {name.removeprefix("test_"): cases[name] for name in CASES}
    made |= {f.__name__: f() for f in (element_types, presence, kitchen_sink, shadowing, weights)}
    for name, proto in made.items():
        (HERE / f"{name}.onnx").write_bytes(proto.SerializeToString())
    print(len(made), "models")


if __name__ == "__main__":
    main()
