"""Writes the small models of the runtime tests, and what onnxruntime or onnx.reference computes for them.

    python tests/runtime/make.py        (onnx 1.23, onnxruntime 1.31)

Each case is NAME.onnx; cases.json holds inputs, graph outputs and other float tensors, or the refusal that is due.
"""

import json
import pathlib

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx import parser
from onnx.reference import ReferenceEvaluator

HERE = pathlib.Path(__file__).parent
MS = "com.microsoft"
rng = np.random.default_rng(7)
cases = {}
# Types that numpy knows through ml_dtypes.
SMALL = ("int4", "uint4", "int2", "uint2", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")


def pack(value):
    value = np.asarray(value)
    if value.dtype.name in SMALL:
        kind = value.dtype.name
        return {"dtype": kind, "shape": list(value.shape), "values": value.astype(np.float32).ravel().tolist()}
    flat = [None if isinstance(v, float) and v != v else v for v in value.astype(np.float64 if value.dtype.kind == "f" else value.dtype).ravel().tolist()]
    flat = ["inf" if v == float("inf") else "-inf" if v == float("-inf") else v for v in flat]
    return {"dtype": str(value.dtype), "shape": list(value.shape), "values": flat}


def ort_run(model, inputs, wanted):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    have = {o.name for o in model.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=o) for o in wanted if o not in have)
    session = ort.InferenceSession(extended.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs)))


def reference_run(model, inputs, wanted):
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    have = {o.name for o in model.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=o) for o in wanted if o not in have)
    evaluator = ReferenceEvaluator(extended)
    return dict(zip([o.name for o in extended.graph.output], evaluator.run(None, inputs)))


def case(name, model, inputs, observe=(), oracle="ort", tolerance=1e-5, silent=(), samples=None):
    """`samples`: several sets of inputs, run through one session in this order."""
    onnx.save(model, HERE / f"{name}.onnx")
    runner = ort_run if oracle == "ort" else reference_run
    runs = []
    for sample in samples or [inputs]:
        values = runner(model, sample, observe)
        outputs = {o.name: values[o.name] for o in model.graph.output}
        for tensors in (outputs, values):
            for key, value in tensors.items():
                if value.dtype in (np.float16, ) or value.dtype.name == "bfloat16":
                    tensors[key] = value.astype(np.float32)
        runs.append({
            "inputs": {k: pack(v) for k, v in sample.items()},
            "outputs": {k: pack(v) for k, v in outputs.items()},
            "observed": {k: pack(values[k].astype(np.float32)) for k in observe},
        })
    cases[name] = {"runs": runs, "tolerance": tolerance, "silent": list(silent)}
    print(name)


def refusal(name, model, *words):
    onnx.save(model, HERE / f"{name}.onnx")
    cases[name] = {"refused": list(words)}
    print(name)


def model(nodes, inputs, outputs, initializers=None, opset=21, extra=(), functions=(), ir=10, domains=()):
    """`initializers`: name -> array, or TensorProto."""
    tensors = []
    for key, value in (initializers or {}).items():
        tensors.append(value if isinstance(value, onnx.TensorProto) else nh.from_array(np.asarray(value), key))
    graph = h.make_graph(nodes, "g", inputs, outputs, tensors)
    imports = [h.make_opsetid("", opset)] + [h.make_opsetid(d, v) for d, v in domains]
    return h.make_model(graph, opset_imports=imports, ir_version=ir, functions=list(functions))


def info(name, shape, dtype=T.FLOAT):
    return h.make_tensor_value_info(name, dtype, shape)


def f32(*shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


N = h.make_node
HARD = np.array(
    [0.25, 0.75, 1.25, -0.25, -0.75, -1.25, 126.75, 127.25, 200, -200, 1e30, -1e30, np.inf, -np.inf, 0.0, -0.0, 63.4, 3.3],
    np.float32,
)

# --- fake quant on activations


def qdq(name, dtype, scale, zero, x, axis=None, block=None, opset=21, shape=None, oracle="ort"):
    attrs = {}
    if axis is not None:
        attrs["axis"] = axis
    if block is not None:
        attrs["block_size"] = block
    zero = np.asarray(zero)
    zp = h.make_tensor("z", dtype, zero.shape, zero.ravel().tolist())
    nodes = [N("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs), N("DequantizeLinear", ["q", "s", "z"], ["d"], **attrs),
             N("Relu", ["d"], ["y"])]
    m = model(nodes, [info("x", [None] * x.ndim)], [info("y", None)], {"s": np.asarray(scale, np.float32), "z": zp}, opset)
    case(name, m, {"x": x}, ["d"], tolerance=0, oracle=oracle)


ramp = np.concatenate([HARD, f32(14, scale=60)]).reshape(2, 16)
qdq("qdq_uint8", T.UINT8, 0.5, 3, np.concatenate([ramp.ravel(), [np.nan]]).astype(np.float32))
qdq("qdq_int8", T.INT8, 0.5, -3, ramp)
qdq("qdq_int8_near_ties", T.INT8, 0.0123, 0, (np.arange(-90, 90) * 0.5 * np.float32(0.0123)).astype(np.float32))
qdq("qdq_int16", T.INT16, 0.01, 5, ramp)
qdq("qdq_uint16", T.UINT16, 0.003, 32768, ramp)
qdq("qdq_int4", T.INT4, 0.5, 1, ramp)
qdq("qdq_uint4", T.UINT4, 0.5, 7, ramp)
qdq("qdq_axis", T.INT8, [0.5, 0.25, 0.1], [0, 5, -7], f32(2, 3, 4, scale=20))
qdq("qdq_last_axis", T.UINT8, [0.5, 0.25, 0.1, 1.0], [0, 5, 128, 255], f32(2, 3, 4, scale=20), axis=-1)
qdq("qdq_blocked", T.INT8, np.abs(f32(2, 3, 4)) + 0.1, np.arange(24).reshape(2, 3, 4) - 12, f32(2, 7, 4, scale=20), axis=1, block=3)
qdq("qdq_blocked_last", T.UINT8, np.abs(f32(2, 3)) + 0.1, np.arange(6).reshape(2, 3) * 40, f32(2, 10, scale=20), axis=-1, block=4)
for kind in ("E4M3FN", "E4M3FNUZ", "E5M2", "E5M2FNUZ"):
    finite = f32(64, scale=100) * np.float32(2.0) ** rng.integers(-12, 12, 64).astype(np.float32)
    qdq(f"qdq_{kind.lower()}", getattr(T, f"FLOAT8{kind}"), 0.5, 0.0, finite)

zero_point = {"s": np.float32(0.5), "z": np.uint8(3), "s2": np.float32(0.5), "z2": np.uint8(3)}
case("qdq_shared", model(
    [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s2", "z2"], ["d1"]),
     N("DequantizeLinear", ["q", "s", "z"], ["d2"]), N("Add", ["d1", "d2"], ["y"])],
    [info("x", [None, 16])], [info("y", None), info("q", None, T.UINT8)], zero_point), {"x": ramp}, ["d1", "d2"], tolerance=0)
case("qdq_other_scale", model(
    [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s2", "z"], ["y"])],
    [info("x", [None, 16])], [info("y", None)], {**zero_point, "s2": np.float32(0.25)}), {"x": ramp}, tolerance=0)
case("q_output_dtype", model(
    [N("QuantizeLinear", ["x", "s"], ["q"], output_dtype=T.INT8), N("DequantizeLinear", ["q", "s"], ["y"])],
    [info("x", [None, 16])], [info("y", None), info("q", None, T.INT8)], {"s": np.float32(0.5)}), {"x": ramp}, tolerance=0)
case("q_int4_output", model(
    [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["y"])],
    [info("x", [None, 16])], [info("y", None)],
    {"s": np.float32(0.5), "z": h.make_tensor("z", T.INT4, [], [2])}), {"x": ramp}, tolerance=0)
case("q_pool_dq", model(
    [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("MaxPool", ["q"], ["p"], kernel_shape=[2, 2]),
     N("Transpose", ["p"], ["t"], perm=[0, 2, 3, 1]), N("DequantizeLinear", ["t", "s", "z"], ["y"])],
    [info("x", [1, 2, 4, 4])], [info("y", None)], zero_point), {"x": f32(1, 2, 4, 4, scale=20)}, tolerance=0)
case("dq_runtime_scale", model(
    [N("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), N("DequantizeLinear", ["q", "s", "z"], ["y"])],
    [info("x", [None, 16])], [info("y", None)]), {"x": f32(2, 16)}, tolerance=1e-6)

# --- packed weights


def weight(name, dtype, values, scale, zero=None, axis=0, block=0, oracle="ort", opset=21, tolerance=1e-6, ir=10):
    values = np.asarray(values)
    attrs = {"axis": axis}
    if block:
        attrs["block_size"] = block
    names = ["w", "s"]
    tensors = {"w": h.make_tensor("w", dtype, values.shape, values.ravel().tolist()), "s": np.asarray(scale, np.float32)}
    if zero is not None:
        names.append("z")
        zero = np.asarray(zero)
        tensors["z"] = h.make_tensor("z", dtype, zero.shape, zero.ravel().tolist())
    nodes = [N("DequantizeLinear", names, ["f"], **attrs), N("MatMul", ["x", "f"], ["y"]), N("Relu", ["y"], ["r"])]
    m = model(nodes, [info("x", [None, values.shape[0]])], [info("r", None)], tensors, opset, ir=ir)
    case(name, m, {"x": f32(3, values.shape[0])}, ["y"], oracle=oracle, tolerance=tolerance)


weight("dq_int8_axis", T.INT8, rng.integers(-128, 128, (6, 5)), np.abs(f32(5)), [1, -2, 3, 0, 7], axis=1)
weight("dq_int4", T.INT4, rng.integers(-8, 8, (7, 5)), 0.25, 1)
weight("dq_uint4_blocked", T.UINT4, rng.integers(0, 16, (8, 5)), np.abs(f32(4, 5)), rng.integers(0, 16, (4, 5)), axis=0, block=2)
weight("dq_int4_ragged", T.INT4, rng.integers(-8, 8, (5, 7)), np.abs(f32(5, 3)), rng.integers(-8, 8, (5, 3)), axis=1, block=3)
weight("dq_int32", T.INT32, rng.integers(-1000, 1000, (4, 3)), np.abs(f32(3)), axis=1)
weight("dq_e4m3", T.FLOAT8E4M3FN, f32(6, 5, scale=30), 0.25)
weight("dq_e5m2", T.FLOAT8E5M2, f32(6, 5, scale=30), 0.25)
weight("dq_e2m1", T.FLOAT4E2M1, rng.choice([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], (6, 5)), 0.25, oracle="reference", opset=23, ir=11)

# NVFP4: the scale is dequantized itself.
nv = {"w": h.make_tensor("w", T.FLOAT4E2M1, (4, 32), rng.choice([-6.0, -1.5, 0.5, 0, 3], 128).tolist()),
      "s8": h.make_tensor("s8", T.FLOAT8E4M3FN, (4, 2), np.abs(f32(8)).tolist()), "g": np.float32(0.3)}
case("dq_nvfp4", model(
    [N("DequantizeLinear", ["s8", "g"], ["s"]), N("DequantizeLinear", ["w", "s"], ["f"], axis=-1, block_size=16),
     N("Transpose", ["f"], ["t"], perm=[1, 0]), N("MatMul", ["x", "t"], ["y"])],
    [info("x", [None, 32])], [info("y", None)], nv, opset=23, ir=11), {"x": f32(3, 32)}, oracle="reference", tolerance=1e-5)


def nbits(name, bits, k, n, block, zero, bias=False):
    per_row = -(-k // block)
    data = rng.integers(0, 256, (n, per_row, block * bits // 8)).astype(np.uint8)
    names = ["x", "w", "s"]
    tensors = {"w": data, "s": np.abs(f32(n * per_row))}
    if zero == "packed":
        names.append("z")
        tensors["z"] = rng.integers(0, 256, n * -(-per_row * bits // 8)).astype(np.uint8)
    if bias:
        names += [""] * (5 - len(names)) + ["b"]
        tensors["b"] = f32(n)
    node = N("MatMulNBits", names, ["y"], domain=MS, K=k, N=n, bits=bits, block_size=block)
    m = model([node], [info("x", [None, k])], [info("y", None)], tensors, domains=[(MS, 1)])
    case(name, m, {"x": f32(3, k)}, tolerance=1e-4)


nbits("nbits_4", 4, 64, 5, 32, None)
nbits("nbits_4_zero", 4, 96, 5, 32, "packed")
nbits("nbits_4_bias", 4, 40, 6, 16, "packed", bias=True)
nbits("nbits_8", 8, 64, 5, 32, "packed")

data = h.make_tensor("w", T.UINT4, (6, 32), rng.integers(0, 16, 192).tolist())
case("gather_blocks", model(
    [N("GatherBlockQuantized", ["w", "i", "s"], ["y"], domain=MS, gather_axis=0, quantize_axis=1, block_size=16)],
    [info("i", [None], T.INT64)], [info("y", None)], {"w": data, "s": np.abs(f32(6, 2))}, domains=[(MS, 1)]),
    {"i": np.array([5, 0, 2])}, tolerance=1e-6)

# --- quantized operators; onnxruntime saturates u8×s8 sums on some machines, so the reference is the oracle

qconv = {"xs": np.float32(0.1), "xz": np.uint8(128), "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
         "ws": np.abs(f32(4)) * np.float32(0.01), "wz": np.zeros(4, np.int8), "ys": np.float32(0.05), "yz": np.uint8(120),
         "b": rng.integers(-2000, 2000, 4).astype(np.int32), "z": np.float32(0.05)}
case("qlinear_conv", model(
    [N("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
     N("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
     N("DequantizeLinear", ["c", "ys", "yz"], ["y"])],
    [info("x", [1, 3, 5, 5])], [info("y", None)], qconv), {"x": f32(1, 3, 5, 5, scale=3)}, oracle="reference", tolerance=1e-6)
qmm = {"as": np.float32(0.1), "az": np.uint8(128), "b": rng.integers(-127, 128, (6, 4)).astype(np.int8),
       "bs": np.abs(f32(4)) * np.float32(0.01), "bz": np.zeros(4, np.int8), "ys": np.float32(0.05), "yz": np.uint8(120)}
case("qlinear_matmul", model(
    [N("QuantizeLinear", ["x", "as", "az"], ["q"]), N("QLinearMatMul", ["q", "as", "az", "b", "bs", "bz", "ys", "yz"], ["c"]),
     N("DequantizeLinear", ["c", "ys", "yz"], ["y"])],
    [info("x", [3, 6])], [info("y", None)], {**qmm, "bs": np.float32(0.02), "bz": np.int8(3)}), {"x": f32(3, 6, scale=3)}, oracle="reference", tolerance=1e-6)
case("matmul_integer", model(
    [N("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), N("MatMulInteger", ["q", "b", "z", "bz"], ["i"]),
     N("Cast", ["i"], ["f"], to=T.FLOAT), N("Mul", ["s", "bs"], ["ss"]), N("Mul", ["f", "ss"], ["y"])],
    [info("x", [3, 6])], [info("y", None), info("i", None, T.INT32)], {**qmm, "bz": np.int8(5)}), {"x": f32(3, 6, scale=3)}, ["f"], oracle="reference", tolerance=1e-6)
case("conv_integer", model(
    [N("ConvInteger", ["x", "w", "xz"], ["i"], kernel_shape=[3, 3]), N("Cast", ["i"], ["y"], to=T.FLOAT)],
    [info("x", [1, 3, 5, 5], T.UINT8)], [info("y", None)], qconv), {"x": rng.integers(0, 256, (1, 3, 5, 5)).astype(np.uint8)}, oracle="reference", tolerance=0)

ms = {"as": np.float32(0.1), "az": np.uint8(128), "bs": np.float32(0.07), "bz": np.uint8(100), "ys": np.float32(0.15), "yz": np.uint8(110)}
q2 = [N("QuantizeLinear", ["x", "as", "az"], ["qa"]), N("QuantizeLinear", ["x2", "bs", "bz"], ["qb"])]
end = [N("DequantizeLinear", ["c", "ys", "yz"], ["y"])]
two = [info("x", [1, 3, 4, 4]), info("x2", [1, 3, 4, 4])]
pair = {"x": f32(1, 3, 4, 4, scale=3), "x2": f32(1, 3, 4, 4, scale=3)}
for name, node in {
    "qlinear_add": N("QLinearAdd", ["qa", "as", "az", "qb", "bs", "bz", "ys", "yz"], ["c"], domain=MS),
    "qlinear_mul": N("QLinearMul", ["qa", "as", "az", "qb", "bs", "bz", "ys", "yz"], ["c"], domain=MS),
    "qlinear_concat": N("QLinearConcat", ["ys", "yz", "qa", "as", "az", "qb", "bs", "bz"], ["c"], domain=MS, axis=1),
}.items():
    case(name, model(q2 + [node] + end, two, [info("y", None)], ms, domains=[(MS, 1)]), pair, tolerance=0.151)
for name, node in {
    "qlinear_sigmoid": N("QLinearSigmoid", ["qa", "as", "az", "ys", "yz"], ["c"], domain=MS),
    "qlinear_leaky": N("QLinearLeakyRelu", ["qa", "as", "az", "ys", "yz"], ["c"], domain=MS, alpha=0.2),
    "qlinear_pool": N("QLinearGlobalAveragePool", ["qa", "as", "az", "ys", "yz"], ["c"], domain=MS, channels_last=0),
}.items():
    case(name, model(q2[:1] + [node] + end, two[:1], [info("y", None)], ms, domains=[(MS, 1)]), {"x": pair["x"]}, tolerance=0.151)
case("dynamic_matmul", model(
    [N("DynamicQuantizeMatMul", ["x", "b", "bs", "bz", "bias"], ["y"], domain=MS)], [info("x", [3, 6])], [info("y", None)],
    {"b": rng.integers(0, 255, (6, 4)).astype(np.uint8), "bs": np.float32(0.02), "bz": np.uint8(120), "bias": f32(4)}, domains=[(MS, 1)]),
    {"x": f32(3, 6)}, tolerance=1e-4)

# --- recurrent operators


def recurrent(name, op, direction, batch=2, states=False, **attrs):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    hidden, width, steps = 3, 4, 5
    count = 2 if direction == "bidirectional" else 1
    tensors = {"w": f32(count, gates * hidden, width), "r": f32(count, gates * hidden, hidden), "b": f32(count, 2 * gates * hidden)}
    names = ["x", "w", "r", "b"]
    if states:
        tensors["h"] = f32(count, batch, hidden)
        names += ["", "h"]
        if op == "LSTM":
            tensors["c"] = f32(count, batch, hidden)
            names.append("c")
    outputs = ["y", "yh"] + (["yc"] if op == "LSTM" else [])
    node = N(op, names, outputs, hidden_size=hidden, direction=direction, **attrs)
    m = model([node, N("Relu", ["y"], ["z"])], [info("x", [steps, None, width])], [info(o, None) for o in ["z", *outputs[1:]]], tensors, opset=14, ir=8)
    case(name, m, {"x": f32(steps, batch, width)}, ["y"])


for op in ("LSTM", "GRU", "RNN"):
    for direction in ("forward", "reverse", "bidirectional"):
        extra = {"linear_before_reset": 1} if op == "GRU" and direction == "reverse" else {}
        recurrent(f"{op.lower()}_{direction}", op, direction, states=direction != "forward", **extra)
recurrent("lstm_reverse_stateless", "LSTM", "reverse", batch=3)
recurrent("lstm_one", "LSTM", "reverse", batch=1)
recurrent("gru_reverse_reset_first", "GRU", "reverse")

# --- control flow, functions, defaults


def branch(name, nodes, output, initializers=()):
    return h.make_graph(nodes, name, [], [info(output, None)], list(initializers))


constant_if = [
    N("Shape", ["x"], ["shape"]), N("Gather", ["shape", "zero"], ["n"]), N("Equal", ["n", "two"], ["c"]),
    N("If", ["c"], ["y"],
      then_branch=branch("t", [N("Mul", ["x", "k"], ["o"])], "o", [nh.from_array(np.float32(3), "k")]),
      else_branch=branch("e", [N("Squeeze", ["x"], ["s"]), N("Neg", ["s"], ["o"])], "o")),
    N("Abs", ["y"], ["a"]),
]
case("if_shape", model(constant_if, [info("x", [None, 4])], [info("a", None)], {"zero": np.int64(0), "two": np.int64(2)}, opset=13, ir=8),
     None, ["y"], samples=[{"x": f32(2, 4)}, {"x": f32(1, 4)}, {"x": f32(2, 4)}], tolerance=0)
nested = [
    N("Equal", ["sr", "rate"], ["c"]),
    N("If", ["c"], ["y"],
      then_branch=branch("t", [N("If", ["yes"], ["o1"], then_branch=branch("tt", [N("Exp", ["x"], ["o"])], "o"),
                                 else_branch=branch("te", [N("Neg", ["x"], ["o"])], "o")), N("Identity", ["o1"], ["o"])], "o"),
      else_branch=branch("e", [N("Neg", ["x"], ["o"])], "o")),
]
case("if_input", model(nested, [info("x", [2, 4]), info("sr", [], T.INT64)], [info("y", None)], {"rate": np.int64(16000), "yes": np.array(True)}, opset=13, ir=8),
     None, samples=[{"x": f32(2, 4), "sr": np.array(16000)}, {"x": f32(2, 4), "sr": np.array(8000)}])
case("if_computed", model(
    [N("ReduceSum", ["x"], ["s"], keepdims=0), N("Greater", ["s", "zero"], ["c"]),
     N("If", ["c"], ["y"], then_branch=branch("t", [N("Exp", ["x"], ["o"])], "o"), else_branch=branch("e", [N("Neg", ["x"], ["o"])], "o"))],
    [info("x", [2, 4])], [info("y", None)], {"zero": np.float32(0)}, opset=13, ir=8),
    None, samples=[{"x": np.ones((2, 4), np.float32)}, {"x": -np.ones((2, 4), np.float32)}])

functions = parser.parse_model("""
<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z)
{
    a = local.scaled <alpha: float = 2.0> (x)
    y, b = local.twice (a, x)
    z = local.twice (b, a)
}
<domain: "local", opset_import: ["": 17]>
scaled <alpha> (v) => (o)
{
    k = Constant <value_float: float = @alpha> ()
    o = Mul (v, k)
}
<domain: "local", opset_import: ["": 17, "local": 1]>
twice (v, w) => (o, u)
{
    k = local.scaled <alpha: float = 0.5> (v)
    o = Add (k, w)
    u = Neg (v)
}
""")
case("functions", functions, {"x": f32(3, 4)}, ["a"], oracle="reference")

defaulted = model([N("MatMul", ["x", "w"], ["m"]), N("Add", ["m", "b"], ["y"])],
                  [info("x", [None, 4]), info("w", [4, 3]), info("b", [3])], [info("y", None)], {"w": f32(4, 3), "b": f32(3)}, opset=11, ir=6)
case("defaults", defaulted, None, ["m"], samples=[{"x": f32(2, 4)}, {"x": f32(2, 4), "b": f32(3)}, {"x": f32(2, 4), "w": f32(4, 3)}])

# --- types and small things

case("float16", model(
    [N("Cast", ["x"], ["h"], to=T.FLOAT16), N("Conv", ["h", "w"], ["c"]), N("Relu", ["c"], ["r"]), N("Cast", ["r"], ["y"], to=T.FLOAT)],
    [info("x", [1, 2, 5, 5])], [info("y", None), info("r", None, T.FLOAT16)], {"w": f32(3, 2, 3, 3).astype(np.float16)}, opset=17, ir=8),
    {"x": f32(1, 2, 5, 5)}, ["c"], tolerance=1e-2)
case("float16_input", model([N("Add", ["x", "w"], ["y"])], [info("x", [2, 3], T.FLOAT16)], [info("y", [2, 3], T.FLOAT16)],
                            {"w": f32(3).astype(np.float16)}, opset=17, ir=8), {"x": f32(2, 3).astype(np.float16)}, tolerance=2e-3)
bf16 = h.make_tensor("w", T.BFLOAT16, (4, 3), [0.5, 1, -2, 3, 0.25, -1, 1.5, 2, 4, -0.125, 0, 8])
case("bfloat16", model([N("Cast", ["w"], ["f"], to=T.FLOAT), N("MatMul", ["x", "f"], ["y"])], [info("x", [2, 4])], [info("y", None)], {"w": bf16}, opset=17, ir=8),
     {"x": f32(2, 4)}, oracle="reference")
case("squeeze_all", model([N("Squeeze", ["x"], ["s"]), N("Relu", ["s"], ["y"])], [info("x", [1, None, 1, 4])], [info("y", None)], opset=11, ir=6),
     {"x": f32(1, 3, 1, 4)}, ["s"], tolerance=0)
case("fused_matmul", model([N("FusedMatMul", ["a", "b"], ["y"], domain=MS, alpha=0.5, transB=1)],
                           [info("a", [2, 3, 4]), info("b", [2, 5, 4])], [info("y", None)], opset=17, ir=8, domains=[(MS, 1)]),
     {"a": f32(2, 3, 4), "b": f32(2, 5, 4)})
case("observed_kinds", model(
    [N("Shape", ["x"], ["n"]), N("Add", ["k", "k"], ["kk"]), N("Mul", ["x", "kk"], ["m"]), N("Identity", ["m"], ["i"]), N("Relu", ["i"], ["y"])],
    [info("x", [2, 3])], [info("y", None), info("x", [2, 3])], {"k": np.float32(1.5)}, opset=17, ir=8),
    {"x": f32(2, 3)}, ["x", "m", "i", "y"], silent=["n", "kk", "k", "nothing"], tolerance=0)
conv_net = [
    N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), N("Relu", ["c"], ["r"]), N("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
    N("Transpose", ["p"], ["t"], perm=[0, 2, 3, 1]), N("Reshape", ["t", "flat"], ["f"]), N("MatMul", ["f", "m"], ["g"]), N("Softmax", ["g"], ["y"], axis=-1),
]
case("conv_net", model(conv_net, [info("x", ["batch", 3, "h", "w"])], [info("y", None)],
                       {"w": f32(8, 3, 3, 3), "flat": np.array([0, -1, 8]), "m": f32(8, 5)}, opset=17, ir=8),
     None, ["x", "c", "r", "p", "t", "f", "g"], samples=[{"x": f32(1, 3, 8, 8)}, {"x": f32(2, 3, 6, 10)}, {"x": f32(1, 3, 8, 8)}])

# --- refusals

x4 = [info("x", [2, 4])]
refusal("refuse_foreign", model([N("Relu", ["x"], ["y"], domain="acme", name="odd")], x4, [info("y", None)], domains=[("acme", 1)]), "odd", "acme::Relu")
refusal("refuse_foreign_ms", model([N("Attention", ["x", "w", "b"], ["y"], domain=MS, num_heads=2)], [info("x", [1, 2, 4])], [info("y", None)],
                                   {"w": f32(4, 12), "b": f32(12)}, domains=[(MS, 1)]), "com.microsoft::Attention")
refusal("refuse_op", model([N("Det", ["x"], ["y"], name="det")], [info("x", [4, 4])], [info("y", None)]), "det", "Det")
rnn = {"w": f32(1, 3, 4), "r": f32(1, 3, 3)}
seq = [info("x", [5, 1, 4])]
refusal("refuse_activation", model([N("RNN", ["x", "w", "r"], ["y"], hidden_size=3, activations=["Swirl"])], seq, [info("y", None)], rnn, 14), "Swirl")
refusal("refuse_float8_exponents", model([N("Cast", ["x"], ["y"], to=T.FLOAT8E8M0)], x4, [info("y", None, T.FLOAT8E8M0)], opset=24), "float8e8m0")
recursive = parser.parse_model("""
<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (float[N, 4] x) => (float[N, 4] y) { y = local.f (x) }
<domain: "local", opset_import: ["": 17, "local": 1]>
f (v) => (o) { o = local.f (v) }
""")
refusal("refuse_recursion", recursive, "calls itself")

mismatch = model([N("MatMul", ["x", "w"], ["y"], name="product")], [info("x", [None, "width"])], [info("y", None)], {"w": f32(4, 3)})
onnx.save(mismatch, HERE / "mismatch.onnx")

# What is far beyond a format overflows in onnx.reference.
low_ramp = np.clip(ramp, -1e4, 1e4)

# --- types below eight bits, as weights, between operators, and as outputs

for kind, low, high in (("int2", -2, 2), ("uint2", 0, 4)):
    code = getattr(T, kind.upper())
    weight(f"dq_{kind}", code, rng.integers(low, high, (8, 5)), np.abs(f32(4, 5)), rng.integers(low, high, (4, 5)), axis=0, block=2, oracle="reference", opset=25, ir=13)
    qdq(f"qdq_{kind}", code, 0.5, 1, low_ramp, opset=25, oracle="reference")
weight("dq_int16_axis", T.INT16, rng.integers(-30000, 30000, (6, 5)), np.abs(f32(5)) * 1e-4, [1, -2, 3, 0, 7], axis=1)
weight("dq_uint16_blocked", T.UINT16, rng.integers(0, 65536, (8, 5)), np.abs(f32(4, 5)) * 1e-4, rng.integers(0, 65536, (4, 5)), axis=0, block=2)
weight("dq_int4_no_zero_opset25", T.INT4, rng.integers(-8, 8, (8, 5)), np.abs(f32(2, 5)), axis=0, block=4, oracle="reference", opset=25, ir=13)
for kind in (T.INT4, T.UINT4, T.INT16, T.UINT16):
    name = T.DataType.Name(kind).lower()
    case(f"q_{name}_output_dtype", model(
        [N("QuantizeLinear", ["x", "s"], ["q"], output_dtype=kind, axis=1, block_size=8), N("DequantizeLinear", ["q", "s"], ["y"], axis=1, block_size=8)],
        [info("x", [2, 16])], [info("y", None), info("q", [2, 16], kind)], {"s": np.array([[0.5, 0.25], [0.1, 2]], np.float32)}), {"x": low_ramp}, oracle="reference", tolerance=0)
spread = np.array([0.3, -0.3, 500, -500, 1e9, 464, 465, 0.0019, 1e-9, 61440, 61439, 6.9, 0.25, 0.74, -5, 2.5], np.float32)
for kind in ("FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT4E2M1"):
    code = getattr(T, kind)
    zero = h.make_tensor("z", code, [], [0.0])
    case(f"q_{kind.lower()}_output", model(
        [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("Reshape", ["q", "flat"], ["r"]), N("DequantizeLinear", ["r", "s"], ["d"]), N("Relu", ["d"], ["y"])],
        [info("x", [16])], [info("y", None), info("q", [16], code), info("r", [4, 4], code)], {"s": np.float32(2), "z": zero, "flat": np.array([4, 4])}, opset=23, ir=11),
        {"x": np.where(spread < 0, 0, spread)}, ["d"], oracle="reference", tolerance=0)
    if kind != "FLOAT4E2M1":
        case(f"cast_{kind.lower()}", model(
            [N("Cast", ["x"], ["c"], to=code), N("Cast", ["c"], ["y"], to=T.FLOAT), N("Cast", ["x"], ["n"], to=code, saturate=0), N("Cast", ["n"], ["m"], to=T.FLOAT),
             N("CastLike", ["x", "n"], ["l"]), N("Cast", ["l"], ["k"], to=T.FLOAT)],
            [info("x", [16])], [info("y", None), info("m", None), info("c", [16], code), info("k", None)], opset=23, ir=11), {"x": spread}, ["y", "m"], oracle="reference", tolerance=0)
case("cast_int4", model([N("Cast", ["x"], ["c"], to=T.INT4), N("Cast", ["c"], ["y"], to=T.FLOAT)], [info("x", [5])], [info("y", None), info("c", [5], T.INT4)], opset=23, ir=11),
     {"x": np.array([-8, -1.5, 0, 3.7, 7], np.float32)}, oracle="reference", tolerance=0)
case("float8_input", model([N("DequantizeLinear", ["x", "s"], ["y"])], [info("x", [4], T.FLOAT8E4M3FN)], [info("y", None)], {"s": np.float32(0.5)}, opset=23, ir=11),
     {"x": nh.to_array(h.make_tensor("x", T.FLOAT8E4M3FN, [4], [0.5, -448, 3, 0]))}, oracle="reference", tolerance=0)

# --- recurrent operators as tract lacks them


def unusual(name, op, direction, lengths=None, oracle="ort", **attrs):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    hidden, width, steps, batch = 3, 4, 5, 3
    count = 2 if direction == "bidirectional" else 1
    tensors = {"w": f32(count, gates * hidden, width), "r": f32(count, gates * hidden, hidden), "b": f32(count, 2 * gates * hidden), "h": f32(count, batch, hidden)}
    names = ["x", "w", "r", "b", "", "h"]
    inputs = [info("x", [steps, None, width])]
    sample = {"x": f32(steps, batch, width, scale=2)}
    if op == "LSTM":
        tensors["c"], tensors["p"] = f32(count, batch, hidden), f32(count, 3 * hidden)
        names += ["c", "p"]
    if lengths is not None:
        names[4] = "l"
        inputs.append(info("l", [None], T.INT32))
        sample["l"] = np.array(lengths, np.int32)
    outputs = ["y", "yh"] + (["yc"] if op == "LSTM" else [])
    node = N(op, names, outputs, hidden_size=hidden, direction=direction, **attrs)
    case(name, model([node], inputs, [info(o, None) for o in outputs], tensors, opset=14, ir=8), sample, ["y"], oracle=oracle)


unusual("lstm_clip", "LSTM", "forward", clip=0.5)
unusual("lstm_activations", "LSTM", "bidirectional", activations=["HardSigmoid", "Softsign", "Relu", "Sigmoid", "LeakyRelu", "Elu"], activation_alpha=[0.3, 0.2, 0.7], activation_beta=[0.4])
unusual("lstm_lengths", "LSTM", "bidirectional", lengths=[5, 2, 3])
unusual("lstm_coupled", "LSTM", "reverse", input_forget=1)
unusual("gru_clip", "GRU", "reverse", clip=0.3, linear_before_reset=1)
unusual("gru_lengths", "GRU", "bidirectional", lengths=[3, 5, 1])
unusual("gru_activations", "GRU", "forward", activations=["HardSigmoid", "Relu"])
unusual("rnn_relu", "RNN", "bidirectional", activations=["Relu", "Affine"], activation_alpha=[0.5], activation_beta=[0.1])
unusual("rnn_lengths", "RNN", "reverse", lengths=[4, 5, 2], clip=0.7)
unusual("rnn_thresholded", "RNN", "forward", activations=["ThresholdedRelu"], activation_alpha=[0.4])
unusual("rnn_softplus", "RNN", "forward", activations=["Softplus"])
unusual("rnn_scaled_tanh", "RNN", "forward", activations=["ScaledTanh"], activation_alpha=[0.8], activation_beta=[1.3])

# --- attention as tract lacks it


def attention(name, q, k, v, mask=None, past=None, lengths=None, outputs=1, opset=23, oracle="ort", tolerance=1e-5, **attrs):
    values = {"q": f32(*q), "k": f32(*k), "v": f32(*v)}
    names = list(values)
    if mask is not None:
        values["m"] = mask
    if past:
        values["pk"], values["pv"] = f32(*past), f32(*past)
    if lengths is not None:
        values["l"] = np.array(lengths)
    names = [n if n in values else "" for n in ("q", "k", "v", "m", "pk", "pv", "l")]
    while names[-1] == "":
        names.pop()
    inputs = [info(n, x.shape, h.np_dtype_to_tensor_dtype(x.dtype)) for n, x in values.items()]
    out = ["y", "k2", "v2", "s"][:outputs]
    m = model([N("Attention", names, out, **attrs)], inputs, [info(o, None) for o in out], opset=opset, ir=10 if opset == 23 else 13)
    case(f"attention_{name}", m, values, ["y"], oracle=oracle, tolerance=tolerance)


four = ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6))
attention("bool_mask", *four, mask=rng.random((3, 5)) > 0.3)
attention("float_mask", *four, mask=f32(2, 1, 3, 5))
attention("head_mask", *four, mask=f32(4, 3, 5))
attention("short_mask", *four, mask=f32(2, 4, 3, 4), oracle="reference")
attention("hidden_row", *four, mask=np.array([[True] * 5, [False] * 5, [True, False] * 2 + [False]]), oracle="reference")
attention("causal_mask", *four, mask=rng.random((2, 4, 3, 5)) > 0.2, is_causal=1)
attention("causal_cache", (2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8), past=(2, 2, 4, 8), outputs=3, is_causal=1, oracle="reference")
attention("softcap", *four, softcap=2.0, oracle="reference")
attention("three", (2, 3, 32), (2, 5, 16), (2, 5, 12), mask=f32(3, 5), q_num_heads=4, kv_num_heads=2)
for mode in (0, 2, 3):
    attention(f"scores_{mode}", (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8), mask=f32(3, 5), outputs=4, qk_matmul_output_mode=mode, oracle="reference")
attention("scores_1", (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8), mask=f32(3, 5), outputs=4, qk_matmul_output_mode=1, softcap=1.5, oracle="reference")
attention("lengths", (2, 4, 3, 8), (2, 2, 7, 8), (2, 2, 7, 8), lengths=[4, 7], opset=24, is_causal=1, oracle="reference")
attention("window", (1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4), opset=25, left_window_size=2, right_window_size=1, oracle="reference")

# --- loops and sequences


def loop(name, nodes, body_outputs, trips, carried, scans=0, condition=None, body_tensors=(), tail=(), outputs=("z", ), tolerance=1e-6, tensors=None, samples=None, opset=17):
    """A loop over `carried`, which its body reads as in_NAME; `nodes` make `body_outputs`."""
    inputs = [info("i", [], T.INT64), info("go", [], T.BOOL)] + [info(f"in_{c}", None) for c in carried]
    body = h.make_graph(nodes, "body", inputs, [info(body_outputs[0], [], T.BOOL)] + [info(o, None) for o in body_outputs[1:]], list(body_tensors))
    loop = N("Loop", [trips, condition or "", *carried], [f"out_{n}" for n in range(len(carried) + scans)], body=body)
    m = model([loop, *tail], [info("x", [None, 4])], [info(o, None) for o in outputs], tensors, opset=opset, ir=8)
    case(name, m, None, samples=samples or [{"x": f32(2, 4)}], tolerance=tolerance)


keep_on = N("Identity", ["go"], ["again"])
k2 = nh.from_array(np.float32(1.5), "k")
loop("loop_for", [keep_on, N("Mul", ["in_x", "k"], ["m"]), N("Cast", ["i"], ["f"], to=T.FLOAT), N("Add", ["m", "f"], ["a"]), N("ReduceSum", ["a"], ["s"])],
     ["again", "a", "s"], "n", ["x"], scans=1, body_tensors=[k2], outputs=("out_0", "out_1"), tensors={"n": np.int64(4)})
loop("loop_while", [N("Less", ["i", "limit"], ["again"]), N("Exp", ["in_x"], ["e"]), N("Neg", ["e"], ["a"])], ["again", "a"], "", ["x"], condition="yes",
     outputs=("out_0", ), tensors={"yes": np.array(True), "limit": np.int64(2)})
loop("loop_branch", [keep_on, N("Equal", ["i", "one"], ["odd"]),
                     N("If", ["odd"], ["a"], then_branch=branch("t", [N("Neg", ["in_x"], ["o"])], "o"), else_branch=branch("e", [N("Sin", ["in_x"], ["o"])], "o"))],
     ["again", "a"], "n", ["x"], outputs=("out_0", ), tensors={"n": np.int64(3), "one": np.int64(1)})
loop("loop_none", [keep_on, N("Neg", ["in_x"], ["a"])], ["again", "a"], "n", ["x"], outputs=("out_0", ), tensors={"n": np.int64(0)})
rows = [N("Shape", ["x"], ["shape"]), N("Gather", ["shape", "zero"], ["rows"])]
row_body = h.make_graph([keep_on, N("Gather", ["x", "i"], ["row"], axis=0), N("Add", ["in_s", "row"], ["a"]), N("Softmax", ["a"], ["p"], axis=0)], "body",
                        [info("i", [], T.INT64), info("go", [], T.BOOL), info("in_s", [4])], [info("again", [], T.BOOL), info("a", [4]), info("p", [4])])
case("loop_rows", model([*rows, N("Loop", ["rows", "", "start"], ["sum", "all"], body=row_body)], [info("x", [None, 4])], [info("sum", None), info("all", None)],
                        {"zero": np.int64(0), "start": f32(4)}, opset=17, ir=8), None, samples=[{"x": f32(3, 4)}, {"x": f32(1, 4)}, {"x": f32(3, 4)}])
trips = h.make_graph([keep_on, N("Neg", ["in_x"], ["a"])], "body", [info("i", [], T.INT64), info("go", [], T.BOOL), info("in_x", None)], [info("again", [], T.BOOL), info("a", None)])
case("loop_input", model([N("Loop", ["n", "", "x"], ["y"], body=trips)], [info("x", [2, 4]), info("n", [], T.INT64)], [info("y", None)], opset=17, ir=8),
     None, samples=[{"x": f32(2, 4), "n": np.array(3)}, {"x": f32(2, 4), "n": np.array(2)}])
sequence_body = h.make_graph(
    [keep_on, N("Gather", ["x", "i"], ["row"], axis=0), N("Neg", ["row"], ["r"]), N("SequenceInsert", ["in_s", "r"], ["a"])], "body",
    [info("i", [], T.INT64), info("go", [], T.BOOL), h.make_tensor_sequence_value_info("in_s", T.FLOAT, None)],
    [info("again", [], T.BOOL), h.make_tensor_sequence_value_info("a", T.FLOAT, None)])
case("loop_sequence", model(
    [*rows, N("SequenceEmpty", [], ["empty"]), N("Loop", ["rows", "", "empty"], ["list"], body=sequence_body), N("ConcatFromSequence", ["list"], ["y"], axis=0, new_axis=1),
     N("SequenceAt", ["list", "last"], ["z"]), N("SequenceLength", ["list"], ["n"])],
    [info("x", [None, 4])], [info("y", None), info("z", None), info("n", None, T.INT64)], {"zero": np.int64(0), "last": np.int64(-1)}, opset=17, ir=8),
    None, samples=[{"x": f32(3, 4)}, {"x": f32(2, 4)}])
case("sequences", model(
    [N("SplitToSequence", ["x", "two"], ["parts"], axis=1), N("SplitToSequence", ["x"], ["rows"], axis=0, keepdims=0), N("SplitToSequence", ["x", "sizes"], ["uneven"], axis=1),
     N("SequenceAt", ["parts", "one"], ["p"]), N("SequenceErase", ["rows", "zero"], ["fewer"]), N("SequenceAt", ["fewer", "zero"], ["r"]),
     N("SequenceConstruct", ["p", "p"], ["pair"]), N("SequenceInsert", ["pair", "p", "zero"], ["three"]), N("ConcatFromSequence", ["three"], ["t"], axis=1),
     N("SequenceAt", ["uneven", "one"], ["u"])],
    [info("x", [3, 5])], [info(n, None) for n in "prtu"], {"two": np.int64(2), "sizes": np.array([1, 4]), "one": np.int64(1), "zero": np.int64(0)}, opset=17, ir=8), {"x": f32(3, 5)}, tolerance=0)
moving = h.make_graph([N("ReduceSum", ["in_x"], ["s"], keepdims=0), N("Less", ["s", "limit"], ["again"]), N("Add", ["in_x", "in_x"], ["a"])], "body",
                      [info("i", [], T.INT64), info("go", [], T.BOOL), info("in_x", None)], [info("again", [], T.BOOL), info("a", None)])
data_loop = model([N("Loop", ["", "yes", "x"], ["y"], body=moving, name="until")], x4, [info("y", None)], {"yes": np.array(True), "limit": np.float32(9)}, opset=17, ir=8)
onnx.save(data_loop, HERE / "data_loop.onnx")

# --- operators that tract lacks or computes wrongly


def single(name, op, values, constants=None, opset=21, oracle="ort", tolerance=1e-5, domain="", outputs=1, ir=10, order=None, **attrs):
    names = order or [*values, *(constants or {})]
    inputs = [info(n, x.shape, h.np_dtype_to_tensor_dtype(x.dtype)) for n, x in values.items()]
    node = N(op, names, [f"y{n}" for n in range(outputs)], domain=domain, **attrs)
    m = model([node], inputs, [info(o, None, h.np_dtype_to_tensor_dtype(values[names[0]].dtype)) for o in node.output], constants, opset, ir=ir, domains=[(domain, 1)] if domain else ())
    case(name, m, values, oracle=oracle, tolerance=tolerance)


image = f32(2, 3, 4, 6)
single("celu", "Celu", {"x": f32(2, 9, scale=3)}, alpha=0.7)
for mode in ("nearest", "linear"):
    scales = np.array([1, 1, 2, 3] if mode == "nearest" else [1, 1, 1.5, 2], np.float32)
    single(f"upsample_{mode}", "Upsample", {"x": image}, {"scales": scales}, opset=9, ir=4, mode=mode)
    single(f"resize_10_{mode}", "Resize", {"x": image}, {"scales": scales}, opset=10, ir=5, mode=mode)
single("lp_pool", "LpPool", {"x": image}, kernel_shape=[2, 3], strides=[1, 2], pads=[0, 1, 1, 1], p=3, opset=18, ir=8)
wide = np.array([[1000, 1, -1000, 0.5, 2, -30], [-3, 90, 200, 0, 1e-4, 5]], np.float32)
for opset in (11, 13):
    single(f"log_softmax_{opset}", "LogSoftmax", {"x": wide.reshape(2, 3, 2)}, opset=opset, ir=7, axis=1)
single("softplus", "Softplus", {"x": wide})
single("log_sum_exp", "ReduceLogSumExp", {"x": wide}, {"a": np.array([1])}, opset=18, ir=8, keepdims=0)
single("log_sum_exp_11", "ReduceLogSumExp", {"x": wide.reshape(2, 3, 2)}, opset=11, ir=6, axes=[0, 2])
for p in (1, 2, 3):
    single(f"global_lp_pool_{p}", "GlobalLpPool", {"x": image}, p=p)
case("top_k_1", model([N("TopK", ["x"], ["y", "n"], axis=1, k=2)], [info("x", [2, 3, 6])], [info("y", None), info("n", None, T.INT64)], opset=7, ir=3),
     {"x": image[:, :, 0]}, tolerance=0)
single("pad_negative", "Pad", {"x": image}, {"p": np.array([-1, 2, 1, -2]), "v": np.float32(0.5), "a": np.array([2, -1])}, opset=18, ir=8, tolerance=0)
case("range", model([N("Range", ["a", "b", "c"], ["r"]), N("Add", ["r", "x"], ["y"]), N("Range", ["i", "j", "k"], ["n"])], [info("x", [4])], [info("y", None), info("n", None, T.INT32)],
                    {"a": np.float32(0), "b": np.float32(1), "c": np.float32(0.3), "i": np.int32(5), "j": np.int32(-4), "k": np.int32(-2)}, opset=11, ir=6), {"x": f32(4)})
case("cast_long", model([N("Cast", ["x"], ["y"], to=T.INT64)], [info("x", [4])], [info("y", None, T.INT64)], opset=13, ir=7), {"x": np.array([3e9, -1.5, 0.5, -4e12], np.float32)}, tolerance=0)
case("dynamic_zeros", model([N("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), N("DequantizeLinear", ["q", "s", "z"], ["y"])], [info("x", [None, 4])],
                            [info("y", None), info("q", None, T.UINT8), info("s", None), info("z", None, T.UINT8)], opset=13, ir=7),
     None, samples=[{"x": np.zeros((2, 4), np.float32)}, {"x": -np.abs(f32(2, 4))}, {"x": f32(3, 4)}], tolerance=1e-6)
single("swiglu", "SwiGLU", {"a": f32(2, 5), "b": f32(2, 5)}, opset=28, ir=13, oracle="reference", alpha=1.3)
single("compress", "Compress", {"x": f32(2, 4)}, {"c": np.array([False, True, True, False])}, axis=1, tolerance=0)
single("compress_flat", "Compress", {"x": f32(2, 4)}, {"c": np.array([False, True, True, False, True])}, tolerance=0)
single("reverse_sequence", "ReverseSequence", {"x": f32(5, 3, 2), "l": np.array([5, 1, 3])}, batch_axis=1, time_axis=0, tolerance=0)
boxes = np.array([[0, 0, 3, 3], [1.2, 0.5, 5.5, 3.7], [-2, -1, 9, 9]], np.float32)
regions = {"x": image, "r": boxes, "b": np.array([0, 1, 1])}
single("roi_align", "RoiAlign", regions, output_height=2, output_width=3, spatial_scale=0.9, sampling_ratio=2)
single("roi_align_adaptive", "RoiAlign", regions, output_height=2, output_width=2, coordinate_transformation_mode="output_half_pixel")
single("roi_align_10", "RoiAlign", regions, opset=10, ir=5, output_height=2, output_width=2)
single("roi_align_max", "RoiAlign", regions, output_height=2, output_width=2, mode="max", sampling_ratio=2)
single("col2im", "Col2Im", {"x": f32(2, 12, 15)}, {"i": np.array([4, 6]), "k": np.array([2, 2])})
single("col2im_attributes", "Col2Im", {"x": f32(1, 12, 9)}, {"i": np.array([6, 7]), "k": np.array([3, 2])}, strides=[2, 3], pads=[1, 1, 1, 2], dilations=[1, 2], oracle="reference")
single("center_crop_pad", "CenterCropPad", {"x": f32(3, 5, 4)}, {"s": np.array([6, 3])}, axes=[0, -2], tolerance=0, oracle="reference")
single("cum_prod", "CumProd", {"x": f32(3, 4)}, {"a": np.int64(1)}, exclusive=1, reverse=1, opset=27, ir=13, oracle="reference")
single("affine_grid", "AffineGrid", {"t": f32(2, 2, 3)}, {"s": np.array([2, 3, 4, 5])}, opset=20, ir=9)
single("affine_grid_corners", "AffineGrid", {"t": f32(1, 3, 4)}, {"s": np.array([1, 2, 3, 4, 2])}, opset=20, ir=9, align_corners=1)
deformed = {"x": f32(2, 4, 5, 6), "o": f32(2, 2 * 2 * 4, 4, 5)}
single("deform_conv", "DeformConv", deformed, {"w": f32(6, 2, 2, 2)}, order=["x", "w", "o"], group=2, offset_group=2, opset=19, ir=9, oracle="reference")
single("deform_conv_mask", "DeformConv", {**deformed, "m": f32(2, 8, 4, 5)}, {"w": f32(6, 2, 2, 2), "b": f32(6)}, order=["x", "w", "o", "b", "m"], group=2, offset_group=2, opset=19, ir=9, oracle="reference")
single("tensor_scatter", "TensorScatter", {"p": f32(2, 2, 6, 3), "u": f32(2, 2, 3, 3), "i": np.array([1, 3])}, opset=24, ir=12, oracle="reference", tolerance=0)
single("tensor_scatter_circular", "TensorScatter", {"p": f32(2, 6, 3), "u": f32(2, 3, 3), "i": np.array([1, 5])}, opset=24, ir=12, oracle="reference", tolerance=0, mode="circular")
single("fused_conv", "FusedConv", {"x": image}, {"w": f32(4, 3, 3, 3), "b": f32(4)}, domain=MS, activation="LeakyRelu", activation_params=[0.2], pads=[1, 1, 1, 1])
single("fused_conv_clip", "FusedConv", {"x": image, "z": f32(2, 4, 2, 4)}, {"w": f32(4, 3, 3, 3), "b": f32(4)}, domain=MS, order=["x", "w", "b", "z"], activation="Clip", activation_params=[-0.5, 1.5])
single("fused_gemm", "FusedGemm", {"x": f32(2, 5)}, {"w": f32(5, 4), "b": f32(4)}, domain=MS, activation="Relu", alpha=0.5)
single("matmul_nbits_scales", "MatMulNBits", {"x": f32(3, 64)}, {"w": rng.integers(0, 256, (5, 2, 16)).astype(np.uint8), "s": (np.abs(f32(10)) + 1) * np.float32(1.0001)}, domain=MS, K=64, N=5, bits=4, block_size=32, tolerance=2e-6)

(HERE / "cases.json").write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in cases.items()) + "\n}\n")

# --- nodes over constants, for folding: each output is what onnxruntime computes, or null where folding is declined

k = {
    "i": np.array([7, -7, 3, 0]), "j": np.array([2, 2, -2, 5]), "f": np.array([1.5, -2.5, 0.1, 1e10], np.float32),
    "g": np.array([0.3, 7, -0.7, 3], np.float32), "m": np.arange(6).reshape(2, 3), "axes": np.array([0]), "two": np.int64(2),
    "half": np.array([1.5, -2.25], np.float16), "shape": np.array([3, -1]), "reps": np.array([2, 2]), "c": np.array([True, False, True, False]),
    "nan": np.array([np.nan, 1], np.float32), "big": np.array([3e9, 1], np.float32), "starts": np.array([2]), "ends": np.array([-9]),
    "steps": np.array([-1]), "long": np.array([2**40, 1]), "wide": np.array([2**20, 2**20]), "frac": np.array([2.7, -2.7, 2.5, -0.3], np.float32),
    "p": np.array([0.3, 7, 2], np.float32), "d": np.array([0.1, 2.0]), "b8": np.array([200, 3], np.uint8), "zero": np.int64(0), "ten": np.int64(10), "three": np.int64(3), "empty": np.array([], np.int64),
}
value = h.make_tensor("value", T.INT64, [1], [9])
folds = {
    "add_int": N("Add", ["i", "j"], [""]), "div_int": N("Div", ["i", "j"], [""]), "mod_int": N("Mod", ["i", "j"], [""]), "mul": N("Mul", ["f", "g"], [""]),
    "div": N("Div", ["f", "g"], [""]), "sqrt": N("Sqrt", ["p"], [""]), "neg": N("Neg", ["f"], [""]), "floor": N("Floor", ["f"], [""]),
    "min": N("Min", ["f", "g"], [""]), "where": N("Where", ["c", "i", "j"], [""]), "less": N("Less", ["i", "j"], [""]),
    "gather": N("Gather", ["i", "two"], [""]), "slice": N("Slice", ["i", "starts", "ends", "axes", "steps"], [""]), "concat": N("Concat", ["i", "j"], [""], axis=0),
    "unsqueeze": N("Unsqueeze", ["i", "axes"], [""]), "reshape": N("Reshape", ["m", "shape"], [""]), "transpose": N("Transpose", ["m"], [""]),
    "tile": N("Tile", ["m", "reps"], [""]), "expand_half": N("Unsqueeze", ["half", "axes"], [""]), "shape_of": N("Shape", ["m"], [""]),
    "range": N("Range", ["zero", "ten", "three"], [""]), "fill": N("ConstantOfShape", ["reps"], [""], value=value),
    "sum": N("ReduceSum", ["m"], [""]), "to_int": N("Cast", ["frac"], [""], to=T.INT64), "to_half": N("Cast", ["g"], [""], to=T.FLOAT16),
    "from_half": N("Cast", ["half"], [""], to=T.FLOAT), "to_float": N("Cast", ["long"], [""], to=T.FLOAT), "to_double": N("Cast", ["f"], [""], to=T.DOUBLE),
    "double": N("Cast", ["d"], [""], to=T.FLOAT), "to_bool": N("Cast", ["i"], [""], to=T.BOOL), "bytes": N("Cast", ["b8"], [""], to=T.INT32),
    "fill_empty": N("ConstantOfShape", ["empty"], [""], value=value), "equal": N("Equal", ["i", "j"], [""]), "not": N("Not", ["c"], [""]),
}
declined = {
    "sqrt_negative": N("Sqrt", ["g"], [""]),
    "exp": N("Exp", ["f"], [""]), "matmul": N("MatMul", ["f", "g"], [""]), "nan_max": N("Max", ["nan", "nan"], [""]), "cast_big": N("Cast", ["big"], [""], to=T.INT32),
    "cast_long": N("Cast", ["long"], [""], to=T.INT32), "cast_nan": N("Cast", ["nan"], [""], to=T.INT64), "huge": N("ConstantOfShape", ["wide"], [""], value=value),
    "by_zero": N("Div", ["i", "zero"], [""]), "random": N("RandomNormalLike", ["f"], [""]), "sum_float": N("ReduceSum", ["f"], [""]), "add_half": N("Add", ["half", "half"], [""]),
    "to_string": N("Cast", ["i"], [""], to=T.STRING),
}
for name, node in {**folds, **declined}.items():
    node.name = node.output[0] = name
fold = model(list(folds.values()), [], [], k, opset=17, ir=8)
answers = {name: pack(value) for name, value in ort_run(fold, {}, folds).items()}
answers.update(dict.fromkeys(declined))
fold = model([*folds.values(), *declined.values()], [], [onnx.ValueInfoProto(name=n) for n in [*folds, *declined]], k, opset=17, ir=8)
onnx.save(fold, HERE / "fold.onnx")
(HERE / "fold.json").write_text(json.dumps(answers, indent=0) + "\n")
