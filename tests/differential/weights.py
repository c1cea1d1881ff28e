"""Weights as exporters write them: computed from constants, listed among the inputs, in a Gemm with factors.

    python3 tests/differential/weights.py [AMAX]

`amax rewrite` must quantize each of these weights, or leave it with the reason that the table says, and onnxruntime must load
and run the result and give what it gives of the float model, but for the noise of 8 bits. Needs onnx, onnxruntime and numpy;
writes "N passed, N failed" and ends with 1 if anything failed.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
onnxruntime.set_default_logger_severity(4)
passed, failures = 0, []
# What 8 bits keep of a single layer with random weights.
LEAST_DB = 24


def noise(*dims, seed=0, scale=0.3):
    return (np.random.default_rng(seed + sum(dims)).standard_normal(dims) * scale).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def case(name, nodes, constants, x=(4, 16), *, opset=17, ir=8, inputs=(), options=(), quantized=1, why=None, data=np.float32, result=None,
         scales=None):
    """Rewrites a model from x to y; `quantized` weights are to be stored in few bits, or none for the reason `why`, with `scales` each."""
    return locals()


def model_of(c):
    info = helper.make_tensor_value_info
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(c["data"]))
    graph_inputs = [info("x", kind, list(c["x"]))]
    graph_inputs += [info(n, helper.np_dtype_to_tensor_dtype(c["constants"][n].dtype), list(c["constants"][n].shape)) for n in c["inputs"]]
    nodes = [helper.make_node(op, i, o, name=o[0], **a) for op, i, o, a in c["nodes"]]
    result = kind if c["result"] is None else helper.np_dtype_to_tensor_dtype(np.dtype(c["result"]))
    graph = helper.make_graph(nodes, "g", graph_inputs, [info("y", result, None)],
                              [numpy_helper.from_array(v, n) for n, v in c["constants"].items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", c["opset"])], ir_version=c["ir"])


def n(op, inputs, output, **attributes):
    return op, inputs.split(" "), output.split(), attributes


# -- Weights that constants compute. `w` has shape `dims`.


def computed(dims):
    """Expressions in the operators of the standard, each with its constants; the result is the weight."""
    size = int(np.prod(dims))
    a, b = noise(*dims, seed=1), noise(*dims, seed=2) + 1.5
    one = {"a": a}
    two = {"a": a, "b": b}
    for op in ["Abs", "Atan", "Ceil", "Cos", "Elu", "Erf", "Exp", "Identity", "LeakyRelu", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin",
               "Softplus", "Softsign", "Tanh", "Softmax", "LogSoftmax", "HardSigmoid", "Sinh", "Cosh", "Asinh", "Celu", "HardSwish"]:
        scale = {"Ceil": 5, "Round": 5}.get(op, 1)
        yield op, [n(op, "a", "w")], {"a": a * np.float32(scale)}
    for op in ["Sqrt", "Log", "Reciprocal"]:
        yield op, [n(op, "b", "w")], {"b": np.abs(b) + np.float32(0.5)}
    for op in ["Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum"]:
        yield op, [n(op, "a b", "w")], two
    yield "Pow", [n("Pow", "b e", "w")], {"b": np.abs(b), "e": np.array(1.5, np.float32)}
    yield "Clip", [n("Clip", "a lo hi", "w")], {**one, "lo": np.float32(-.2).reshape(()), "hi": np.float32(.4).reshape(())}
    yield "CumSum", [n("CumSum", "a i", "w")], {**one, "i": np.array(0, np.int64)}
    yield "Expand", [n("Expand", "s d", "w0"), n("Mul", "w0 a", "w")], {**one, "s": noise(dims[-1], seed=5), "d": ints(*dims)}
    yield "Tile", [n("Tile", "s d", "w")], {"s": noise(1, *dims[1:], seed=5), "d": ints(dims[0], *[1] * (len(dims) - 1))}
    yield "Pad", [n("Pad", "s p", "w")], {"s": noise(*dims[:-1], dims[-1] - 1, seed=5), "p": ints(*[0] * (2 * len(dims) - 1), 1)}
    yield "Where", [n("Where", "m a b", "w")], {**two, "m": a > 0}
    yield "Concat", [n("Concat", "s t", "w", axis=0)], {"s": noise(dims[0] // 2, *dims[1:], seed=5), "t": noise(dims[0] - dims[0] // 2, *dims[1:], seed=6)}
    yield "Gather", [n("Gather", "s i", "w", axis=0)], {"s": noise(2 * dims[0], *dims[1:]), "i": ints(*range(dims[0]))}
    yield "ScatterND", [n("ScatterND", "a i u", "w")], {**one, "i": ints(0).reshape(1, 1), "u": noise(1, *dims[1:], seed=9)}
    yield "GatherND", [n("GatherND", "s i", "w")], {"s": noise(2 * dims[0], *dims[1:]), "i": ints(*range(dims[0])).reshape(-1, 1)}
    yield "GatherElements", [n("GatherElements", "a i", "w", axis=0)], {**one, "i": np.zeros(dims, np.int64) + np.arange(dims[0]).reshape(-1, *[1] * (len(dims) - 1))}
    yield "Trilu", [n("Trilu", "a", "w")], one
    yield "Reshape", [n("Reshape", "f d", "w")], {"f": noise(size), "d": ints(*dims)}
    yield "Transpose", [n("Transpose", "t", "w")], {"t": noise(*dims[::-1])}
    yield "Slice", [n("Slice", "s lo hi", "w")], {"s": noise(2 * dims[0], *dims[1:]), "lo": ints(0), "hi": ints(dims[0])}
    yield "Split", [n("Split", "s", "w w_other", axis=0)], {"s": noise(2 * dims[0], *dims[1:])}
    yield "TopK", [n("TopK", "s k", "w w_index", axis=0)], {"s": noise(2 * dims[0], *dims[1:]), "k": ints(dims[0])}
    yield "LayerNormalization", [n("LayerNormalization", "a g", "w")], {**one, "g": noise(dims[-1], seed=8) + 1}
    letters = "abcd"[: len(dims)]
    yield "Einsum", [n("Einsum", "a g", "w", equation=f"{letters},a->{letters}")], {**one, "g": noise(dims[0], seed=8)}
    yield "OneHot", [n("OneHot", "i d v", "w0", axis=-1), n("Add", "w0 a", "w")], {**one, "i": np.zeros(dims[:-1], np.int64), "d": ints(dims[-1]), "v": np.float32([0, 1])}
    yield "Cast", [n("Cast", "d", "w", to=TensorProto.FLOAT)], {"d": a.astype(np.float64)}
    yield "Cast of float16", [n("Cast", "d", "w", to=TensorProto.FLOAT)], {"d": a.astype(np.float16)}
    for op in ["ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceLogSumExp"]:
        yield "norm by " + op, [n(op, "b", "r", keepdims=1, **({} if op == "ReduceSum" else {"axes": [0]})), n("Div", "b r", "w0"), n("Mul", "w0 b", "w")], {"b": np.abs(b)}
    yield "weight norm", [n("ReduceL2", "a", "r", keepdims=1, axes=list(range(1, len(dims)))), n("Div", "a r", "q"), n("Mul", "q g", "w")], {
        **one, "g": noise(dims[0], *[1] * (len(dims) - 1), seed=4) + 1}
    yield "Clip, Expand and Reshape", [n("Clip", "a lo", "q"), n("Shape", "b", "d"), n("Expand", "q d", "e"), n("Div", "e b", "u"), n("Reshape", "u d", "w")], {
        **two, "lo": np.float32(-.3).reshape(())}
    if len(dims) == 2:
        yield "low rank", [n("MatMul", "l r", "d"), n("Add", "d a", "w")], {**one, "l": noise(dims[0], 3, seed=3), "r": noise(3, dims[1], seed=4)}
        yield "Gemm", [n("Gemm", "l r", "d", alpha=.5), n("Add", "d a", "w")], {**one, "l": noise(dims[0], 3, seed=3), "r": noise(3, dims[1], seed=4)}
        yield "MatMul of rank 4", [n("MatMul", "l r", "d"), n("Reshape", "d s", "w")], {
            "l": noise(1, 1, dims[0], 3, seed=3), "r": noise(1, 1, 3, dims[1], seed=4), "s": ints(*dims)}
    if len(dims) == 4:
        yield "Conv", [n("Conv", "t k", "u"), n("Transpose", "u", "w", perm=[1, 0, 2, 3])], {"t": noise(dims[1], dims[0], *dims[2:], seed=3), "k": noise(dims[0], dims[0], 1, 1, seed=4)}
        yield "Resize", [n("Resize", "s  f", "w", mode="nearest")], {"s": noise(*dims[:2], 1, 1), "f": np.float32([1, 1, 3, 3])}
        yield "GlobalAveragePool", [n("GlobalAveragePool", "a", "r"), n("Sub", "a r", "w")], one


def computed_cases():
    for name, nodes, constants in computed((16, 8)):
        yield case(f"{name} -> MatMul", [*nodes, n("MatMul", "x w", "y")], constants)
        yield case(f"{name} -> Gemm", [*nodes, n("Gemm", "x w c", "y")], {**constants, "c": noise(8)})
    for name, nodes, constants in computed((8, 4, 3, 3)):
        yield case(f"{name} -> Conv", [*nodes, n("Conv", "x w", "z"), n("Relu", "z", "y")], constants, (1, 4, 6, 6))
    # A bias, both weights of one layer, and one that two layers share.
    yield case("computed bias", [n("Exp", "e", "c"), n("Gemm", "x w c", "y")], {"e": noise(8), "w": noise(16, 8)})
    yield case("shared", [n("Tanh", "a", "w"), n("MatMul", "x w", "z"), n("MatMul", "z w", "y")], {"a": noise(16, 16)}, quantized=2)
    # What is computed from inputs, at random or beyond the limit stays.
    yield case("from the input", [n("ReduceMean", "x", "r", axes=[0, 1]), n("Mul", "a r", "w"), n("MatMul", "x w", "y")], {"a": noise(16, 8)},
               quantized=0, why="both-activations")
    yield case("random", [n("RandomNormalLike", "a", "w", seed=1.0), n("MatMul", "x w", "z"), n("Sub", "z z", "y")], {"a": noise(16, 8)}, quantized=0, why="both-activations")
    yield case("too large", [n("Expand", "s d", "e"), n("Exp", "e", "w"), n("MatMul", "x w", "y")], {"s": noise(16, 1), "d": ints(16, 1 << 18)}, quantized=0, why="both-activations")


# -- Weights that are inputs of the model, too.


def input_cases():
    w, c = noise(16, 8), noise(8)
    product = [n("MatMul", "x w", "y")]
    linear = [n("MatMul", "x w", "z"), n("Add", "z c", "y")]
    kept = {"options": ["--keep-inputs"], "quantized": 0, "why": "input-with-default"}
    for ir, more in itertools.product([4, 7, 8, 10], [{}, kept]):
        yield case(f"product, IR {ir}", product, {"w": w}, ir=ir, inputs=["w"], **more)
        yield case(f"linear, IR {ir}", linear, {"w": w, "c": c}, ir=ir, inputs=["w", "c"], **more)
        yield case(f"Gemm, IR {ir}", [n("Gemm", "x w c", "y")], {"w": w, "c": c}, ir=ir, inputs=["w", "c"], **more)
    yield case("IR 3 has no choice", product, {"w": w}, ir=3, opset=8, inputs=["w"])
    yield case("only the bias", linear, {"w": w, "c": c}, inputs=["c"])
    image = {"k": noise(8, 4, 3, 3), "s": noise(8) + 1, "b": noise(8), "m": noise(8), "v": np.abs(noise(8)) + 1}
    norm = [n("Conv", "x k", "z"), n("BatchNormalization", "z s b m v", "u"), n("Relu", "u", "y")]
    yield case("Conv and BatchNormalization", norm, image, (1, 4, 6, 6), inputs=list(image))
    flat = {"k": noise(8, 4, 3, 3), "shape": ints(1, -1), "w": noise(128, 8), "p": np.float32([.1]).reshape(1, 1, 1)}
    yield case("shapes and slopes", [n("Conv", "x k", "z"), n("PRelu", "z p", "u"), n("Reshape", "u shape", "f"), n("MatMul", "f w", "y")], flat,
               (1, 4, 6, 6), inputs=list(flat), quantized=2)
    gates = {"w": noise(1, 32, 16), "r": noise(1, 32, 8)}
    yield case("LSTM", [n("LSTM", "x w r", "y", hidden_size=8)], gates, (5, 1, 16), inputs=["w", "r"], quantized=2, options=["--preset", "int8-dynamic"])
    gates = {"w": noise(1, 24, 16), "r": noise(1, 24, 8)}
    for preset in ["w8", "int8-dynamic"]:
        yield case(f"GRU in {preset}", [n("GRU", "x w r", "y", hidden_size=8)], gates, (5, 1, 16), quantized=2, options=["--preset", preset])
    table = {"t": noise(64, 16), "w": w}
    yield case("table", [n("Cast", "x", "i", to=TensorProto.INT64), n("Gather", "t i", "e"), n("MatMul", "e w", "z"), n("ReduceSum", "z", "y", keepdims=0)], table, (3,),
               inputs=["t", "w"], quantized=2, options=["--preset", "w8"])
    # One that may be meant to be given, and all stay.
    left = {"quantized": 0, "why": "input-with-default"}
    one = np.float32(1).reshape(())
    yield case("a factor", [n("MatMul", "x w", "z"), n("Mul", "z f", "y")], {"w": w, "f": one}, inputs=["w", "f"], **left)
    yield case("a factor that is set", [n("MatMul", "x w", "z"), n("Mul", "z f", "y")], {"w": w, "f": one}, inputs=["w", "f"], options=["--set-input", "f=1"])
    state = {"w": noise(1, 32, 16), "r": noise(1, 32, 8), "h": np.zeros((1, 1, 8), np.float32)}
    yield case("a state", [n("LSTM", "x w r   h", "y", hidden_size=8)], state, (5, 1, 16), inputs=["w", "r", "h"], options=["--preset", "int8-dynamic"], **left)


# -- Gemm.


def gemm_cases():
    biases = {"none": None, "row": (8,), "matrix": (1, 8), "number": (), "column": (4, 1)}
    for alpha, beta, left, right, (form, dims) in itertools.product([1.0, 0.5, 1.7], [1.0, 2.0, 0.0], [0, 1], [0, 1], biases.items()):
        if dims is None and beta != 1.0:
            continue
        constants = {"w": noise(*((8, 16) if right else (16, 8)))}
        if dims is not None:
            constants["c"] = noise(*dims, seed=4)
        # An integer Gemm of onnxruntime takes one number for each column, or for all.
        odd = form == "column" and beta != 0.0
        yield case(f"Gemm alpha {alpha} beta {beta} transA {left} transB {right} bias {form}",
                   [n("Gemm", "x w" + (" c" if dims is not None else ""), "y", alpha=alpha, beta=beta, transA=left, transB=right)], constants,
                   (16, 4) if left else (4, 16), quantized=0 if odd else 1, why="bias-per-channel" if odd else None)
    w, c = noise(16, 8), noise(8)
    for target in ["generic", "tensorrt", "ort-cpu-vnni"]:
        yield case(f"Gemm on {target}", [n("Gemm", "x w c", "y", alpha=.5, beta=2.0, transA=1)], {"w": w, "c": c}, (16, 4), options=["--target", target])
    for preset in ["w8", "w4", "int8-dynamic"]:
        yield case(f"Gemm in {preset}", [n("Gemm", "x w c", "y", alpha=.5, beta=2.0, transA=1)], {"w": noise(64, 32), "c": noise(32)}, (64, 4), options=["--preset", preset])
    square = noise(16, 16)
    yield case("a weight of two Gemms", [n("Gemm", "x w", "z", alpha=.5), n("Gemm", "z w", "y", alpha=2.0)], {"w": square}, quantized=2)
    yield case("a weight behind two Gemms", [n("Gemm", "x w", "z", transA=1), n("Gemm", "z w", "y", transA=1)], {"w": square}, (16, 16), quantized=2)


# -- Products of positions, and float16.


def product_cases():
    for name, nodes, constants, x in [
        ("frequencies on the left", [n("MatMul", "f x", "z"), n("Cos", "z", "y")], {"f": np.abs(noise(1, 16, 1))}, (1, 1, 40)),
        ("frequencies on the right", [n("MatMul", "x f", "z"), n("Sin", "z", "y")], {"f": np.abs(noise(1, 16))}, (40, 1)),
        ("a Gemm of frequencies", [n("Gemm", "x f", "z"), n("Sin", "z", "y")], {"f": np.abs(noise(16, 1))}, (1, 40)),
        ("expanded frequencies", [n("Expand", "g d", "f"), n("MatMul", "f x", "z"), n("Cos", "z", "y")], {"g": np.abs(noise(1, 16, 1)), "d": ints(2, 16, 1)}, (2, 1, 40)),
    ]:
        attributes = {"transA": 1, "transB": 1} if "Gemm" in name else {}
        nodes = [(op, i, o, {**a, **(attributes if op == "Gemm" else {})}) for op, i, o, a in nodes]
        for options in [[], ["--preset", "w8"], ["--preset", "int8-dynamic"], ["--preset", "8da4w"], ["--target", "generic"]]:
            yield case(f"{name} {options}", nodes, constants, x, quantized=0, why="no-sum", options=options)
    half = [n("Transpose", "x", "a"), n("Transpose", "x", "b"), n("MatMul", "a b", "m"), n("Add", "m x", "y")]
    for target in ["ort-cpu", "tensorrt", "generic"]:
        yield case(f"undeclared float16 for {target}", half, {}, (8, 8), data=np.float16, quantized=0, options=["--target", target])
    chain = [n("Transpose", "x", "a"), n("Softmax", "a", "s"), n("Unsqueeze", "s u", "v"), n("Squeeze", "v u", "q"), n("MatMul", "q x", "y")]
    yield case("float16 through a chain", chain, {"u": ints(0)}, (8, 8), data=np.float16, quantized=0, options=["--target", "generic"])
    back = [n("Cast", "x", "a", to=TensorProto.FLOAT), n("MatMul", "a w", "b"), n("Cast", "b", "y", to=TensorProto.FLOAT16)]
    yield case("float32 between float16", back, {"w": noise(16, 8)}, data=np.float16)


# -- Batches of matrices, and inputs that the model dequantizes.


def layout_cases():
    for rank, preset in itertools.product([3, 4], ["w8", "w4", "fp8"]):
        dims = (2, 3, 16, 8)[4 - rank:]
        x = (*dims[:-2], 4, 16)
        grouped = preset == "w4"
        options = ["--preset", preset] + (["--target", "generic", "--set", "default.input.enable=false", "--set", "default.output.enable=false"] if preset == "fp8" else [])
        yield case(f"a batch of rank {rank} in {preset}", [n("MatMul", "x w", "y")], {"w": noise(*dims)}, x, options=options, scales=None if grouped or preset == "fp8" else 8)
    yield case("a batch on tensorrt", [n("MatMul", "x w", "y")], {"w": noise(2, 16, 8)}, (2, 4, 16), scales=8,
               options=["--target", "tensorrt", "--set", "default.input.enable=false"])
    yield case("a batch that runs on integers", [n("MatMul", "x w", "y")], {"w": noise(2, 16, 8)}, (2, 4, 16), scales=1)
    for kind, zero in [(np.uint8, 128), (np.uint8, 0), (np.uint8, 7), (np.int8, 0), (np.int8, -3)]:
        scale = {"s": np.float32(1 / 64), "z": np.array(zero, kind)}
        for target in ["ort-cpu", "ort-cpu-vnni", "generic", "tensorrt"]:
            more = {"data": kind, "result": np.float32, "options": ["--target", target]}
            label = f"{np.dtype(kind)} with zero point {zero} on {target}"
            yield case(f"Conv of {label}", [n("DequantizeLinear", "x s z", "a"), n("Conv", "a w c", "b"), n("Relu", "b", "y")],
                       {**scale, "w": noise(8, 4, 3, 3), "c": noise(8)}, (1, 4, 6, 6), **more)
            yield case(f"MatMul of {label}", [n("DequantizeLinear", "x s z", "a"), n("MatMul", "a w", "y")], {**scale, "w": noise(16, 8)}, **more)
            yield case(f"Gemm of {label}", [n("DequantizeLinear", "x s z", "a"), n("Gemm", "a w c", "y")], {**scale, "w": noise(16, 8), "c": noise(8)}, **more)


# -- Operators that a runtime for samples seldom has, and outputs that are left out.


def runtime_cases():
    image, filters = (1, 4, 6, 6), {"k": noise(8, 4, 3, 3)}
    for axis, count in [(1, 8), (2, 4), (3, 4), (None, 128)]:
        over = {} if axis is None else {"axis": axis}
        nodes = [n("Conv", "x k", "z"), n("Reshape", "x flat", "f"), n("Slice", "f lo hi", "g"), n("Greater", "g zero", "c"), n("Compress", "z c", "y", **over)]
        constants = {**filters, "flat": ints(-1), "lo": ints(0), "hi": ints(count), "zero": np.zeros(1, np.float32)}
        yield case(f"Compress along {axis}", nodes, constants, image)
    yield case("Compress by constants", [n("Conv", "x k", "z"), n("Compress", "z c", "y", axis=1)], {**filters, "c": np.array([True, False, True])}, image)
    for label, pool, shape in [("even", {"strides": [2, 2]}, (1, 4, 6, 6)), ("to a shape", {"strides": [2, 2]}, (1, 4, 7, 7)), ("overlapping", {}, (1, 4, 5, 5)),
                               ("padded", {"strides": [2, 2], "pads": [1, 1, 1, 1]}, (1, 4, 6, 6)), ("in a batch", {"strides": [2, 2]}, (2, 4, 6, 6))]:
        given = {"d": ints(*shape)} if label == "to a shape" else {}
        nodes = [n("MaxPool", "x", "p i", kernel_shape=[2, 2], **pool), n("MaxUnpool", "p i" + (" d" if given else ""), "u", kernel_shape=[2, 2], **pool), n("Conv", "u k", "y")]
        yield case(f"MaxUnpool {label}", nodes, {**filters, **given}, shape)
    for outputs in [["p", ""], ["p"]]:
        nodes = [n("Conv", "x k", "z"), ("MaxPool", ["z"], outputs, {"kernel_shape": [2, 2]}), n("Conv", "p q", "y")]
        yield case(f"MaxPool with outputs {outputs}", nodes, {**filters, "q": noise(4, 8, 1, 1)}, image, quantized=2)
    yield case("Dropout with a nameless mask", [n("Conv", "x k", "z"), ("Dropout", ["z"], ["p", ""], {}), n("Relu", "p", "y")], filters, image)


# -- Conversions: dead channels, and quantizers in the branches of an If.


def quantizers(inputs, output, axis):
    return [n("QuantizeLinear", inputs, output + "_q", axis=axis), n("DequantizeLinear", output + "_q " + " ".join(inputs.split()[1:]), output, axis=axis)]


def convert_cases():
    scale = lambda w, axis: (np.abs(w).max(axis=tuple(i for i in range(w.ndim) if i != axis)) / 127).astype(np.float32)
    for dead, axis, op in itertools.product([(0,), (3,), (0, 1, 2), tuple(range(8))], [0, 1], ["Conv", "Gemm"]):
        w = noise(8, 4, 3, 3) if op == "Conv" else noise(*((8, 16) if axis == 0 else (16, 8)))
        axis = 0 if op == "Conv" else axis
        np.moveaxis(w, axis, 0)[list(dead)] = 0
        constants = {"w": w, "s": scale(w, axis), "z": np.zeros(8, np.int8), "c": noise(8)}
        nodes = [*quantizers("w s z", "d", axis), n(op, "x d c", "y", **({"transB": int(axis == 0)} if op == "Gemm" else {}))]
        yield case(f"{op} with dead channels {dead} on axis {axis}", nodes, constants, (1, 4, 6, 6) if op == "Conv" else (4, 16))
    w = noise(8, 4, 3, 3)
    w[2] = 0
    live = {"w": w + np.float32(1e-3), "s": scale(w, 0), "z": np.zeros(8, np.int8)}
    yield case("a scale of 0 with weights", [*quantizers("w s z", "d", 0), n("Conv", "x d", "y")], live, (1, 4, 6, 6), why="--disable")


def branches(form):
    """An If whose branches quantize one weight of the graph around it, or dequantize its codes."""
    w = noise(64, 64)
    s = (np.abs(w).max(axis=0) / 127).astype(np.float32)
    z = np.zeros(64, np.int8)
    codes = np.round(w / s).astype(np.int8)
    graphs = []
    for name in "te":
        steps = quantizers("w s z", f"{name}d", 1) if form == "fake" else [n("DequantizeLinear", "q s z", f"{name}d", axis=1)]
        nodes = [helper.make_node(op, i, o, name=o[0], **a) for op, i, o, a in [*steps, n("MatMul", f"x {name}d", f"{name}m"), n("Relu" if name == "t" else "Neg", f"{name}m", f"{name}y")]]
        graphs.append(helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}y", TensorProto.FLOAT, None)]))
    choice = helper.make_node("If", ["b"], ["y"], name="y", then_branch=graphs[0], else_branch=graphs[1])
    info = helper.make_tensor_value_info
    weight = {"w": w} if form == "fake" else {"q": codes}
    graph = helper.make_graph([choice], "g", [info("x", TensorProto.FLOAT, [4, 64]), info("b", TensorProto.BOOL, [])], [info("y", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(v, k) for k, v in {**weight, "s": s, "z": z}.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def convert(c, amax, folder):
    source, result = folder / "m.onnx", folder / "o.onnx"
    result.unlink(missing_ok=True)
    onnx.save(model_of(c), source)
    process = subprocess.run([amax, "convert", source, result], capture_output=True, text=True)
    if c["why"]:
        return None if process.returncode == 3 and c["why"] in process.stderr else f"exit {process.returncode}: {process.stderr}"
    if process.returncode:
        return process.stderr.strip().replace("\n", " | ")
    x = np.random.default_rng(3).standard_normal(c["x"]).astype(np.float32)
    before, after = run(source, x, True), run(result, x, True)
    stored = [i for i in onnx.load(result).graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) > 1]
    if len(stored) != 1 or not np.isfinite(after).all() or np.abs(before - after).max() > 1e-6:
        return f"{len(stored)} stored, {np.abs(before - after).max()} apart"
    return None


def convert_branches(form, to, amax, folder):
    source, result = folder / "m.onnx", folder / "o.onnx"
    onnx.save(branches(form), source)
    process = subprocess.run([amax, "convert", source, result, *to], capture_output=True, text=True)
    if process.returncode:
        return process.stderr.strip().replace("\n", " | ")
    size = result.stat().st_size
    if size > 64 * 64 * 1.6:
        return f"{size} bytes: the codes are there twice"
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    for flag in [True, False]:
        outputs = []
        for model in (source, result):
            # Its optimizer takes scales for those of the branch, and fails where they are not.
            plain = onnxruntime.SessionOptions()
            plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(str(model), plain, providers=["CPUExecutionProvider"])
            outputs.append(session.run(["y"], {"x": x, "b": np.array(flag)})[0])
        if np.abs(outputs[0] - outputs[1]).max() > (0.2 if to else 1e-5):
            return f"{np.abs(outputs[0] - outputs[1]).max()} apart"
    return None


def run(model, x, plain):
    options = onnxruntime.SessionOptions()
    if plain:
        # Some of these constants it folds wrongly: a Pad of a Conv's weight.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0].astype(np.float64)


def judge(c, amax, folder):
    source, result, report = (folder / f for f in ("m.onnx", "o.onnx", "r.json"))
    result.unlink(missing_ok=True)
    onnx.save(model_of(c), source)
    process = subprocess.run([amax, "rewrite", source, result, "--calib", "random", "--report", report, "--no-guard", *c["options"]], capture_output=True, text=True)
    if process.returncode:
        return process.stderr.strip().replace("\n", " | ")
    found = json.loads(report.read_text())
    weights = [w for w in found["weights"] if not w["tensor"] == "c"]
    if len(weights) != c["quantized"]:
        left = [f'{s["node"]}: {s["why"]["text"]}' for s in found["skipped"]]
        return f"{len(weights)} weights are quantized, not {c['quantized']}; {left}"
    if c["scales"] and any(w["scales"] != c["scales"] for w in weights):
        return f"{[w['scales'] for w in weights]} scales, not {c['scales']}"
    if c["why"] and c["why"] not in (codes := {s["why"]["code"] for s in found["skipped"]}):
        return f"left for {codes}, not {c['why']}"
    x = np.random.default_rng(3).standard_normal(c["x"])
    if np.dtype(c["data"]).kind in "iu":
        # What random samples of integers hold.
        x = np.random.default_rng(3).integers(0, 8, c["x"])
    x = np.abs(x * 9) if "table" in c["name"] else x
    # Within what random samples hold: a product of activations has no weight to hide what is clipped.
    x = np.tanh(x) if "undeclared" in c["name"] else x
    # Weights for other targets may saturate where onnxruntime adds pairs of products in 16 bits.
    other = "--target" in c["options"]
    try:
        before, after = (run(m, x.astype(c["data"]), m == source or other) for m in (source, result))
    except Exception as error:
        return f"onnxruntime: {error}"
    error, signal = ((before - after) ** 2).sum(), (before**2).sum()
    options = str(c["options"])
    least = 10 if "w4" in options else 18 if "generic" in options else LEAST_DB
    if before.shape != after.shape or 10 * np.log10(max(signal, 1e-12) / max(error, 1e-30)) < least:
        return f"{10 * np.log10(max(signal, 1e-12) / max(error, 1e-30)):.1f} dB"
    return None


def main():
    global passed
    amax = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("AMAX", ROOT / "target/debug/amax")
    with tempfile.TemporaryDirectory() as folder:
        rewritten = itertools.chain(computed_cases(), input_cases(), gemm_cases(), product_cases(), layout_cases(), runtime_cases())
        found = [(c["name"], judge(c, amax, Path(folder))) for c in rewritten]
        found += [(c["name"], convert(c, amax, Path(folder))) for c in convert_cases()]
        for form, to in itertools.product(["fake", "stored"], [[], ["--form", "matmulnbits"]]):
            found.append((f"an If of {form} weights {to}", convert_branches(form, to, amax, Path(folder))))
        passed = sum(wrong is None for _, wrong in found)
        failures.extend(f"{name}: {wrong}" for name, wrong in found if wrong is not None)
    for failure in failures:
        print("FAIL", failure)
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
