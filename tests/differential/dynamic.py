"""What is quantized while the model runs: integer products, DynamicQuantizeLSTM and scales for each token, in onnxruntime.

    python3 tests/differential/dynamic.py [AMAX]

Small networks are written by `amax rewrite` without samples. Products and convolutions must be what numpy computes from the
codes in the file, as exact as float32, there and back in both forms; the kernels that onnxruntime makes of them are counted in
its optimized graph. An LSTM must be near a float64 LSTM that quantizes input and hidden state at every step, weights of
recurrent layers stored in 8 bits exactly the layer of the dequantized numbers, and scales for each token torchao's
arithmetic. Models of onnxruntime's quantize_dynamic go to QDQ and back. Needs onnx, onnxruntime and numpy; writes "N passed, N failed" and ends with 1 if anything failed.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(11)
# What float32 may lose to another order of the same operations.
FLOAT32 = 3e-6

passed, failures = 0, []


def check(name, holds, figure=""):
    global passed
    if holds:
        passed += 1
    else:
        failures.append(f"{name}: {figure}".rstrip(": "))


def near(name, found, expected, limit=FLOAT32):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    check(name, error <= limit, f"{error:.2g}")


def sqnr(found, expected):
    return 10 * np.log10(np.square(expected, dtype="f8").sum() / max(np.square(found.astype("f8") - expected).sum(), 1e-300))


def amax(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments), "--quiet"], capture_output=True, text=True)
    check(" ".join(map(str, arguments[:1])), done.returncode == 0, done.stderr)
    return done.returncode == 0


def run(path, feeds, level="ORT_ENABLE_ALL", **settings):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(Path(path).with_suffix(".optimized.onnx"))
    for key, value in settings.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds)))
    return outputs, Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def normal(*shape):
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def save(path, nodes, inputs, outputs, opset=17, **constants):
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "dynamic", [value(*i) for i in inputs.items()], [value(o, None) for o in outputs], stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(made, path)


def at_run_time(x):
    """Codes less their zero point, and the scale, of DynamicQuantizeLinear."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype("f8") - zero, np.float64(scale)


def constants(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def integer_weights(path):
    """Codes less zero points and scales of each integer product, by node name."""
    model = onnx.load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    readers = {i: n for n in model.graph.node for i in n.input}
    makers = {o: n for n in model.graph.node for o in n.output}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            product = readers[readers[node.output[0]].output[0]]
            both = next(makers[i] for i in product.input if makers[i].op_type == "Mul")
            scale = next(stored[i] for i in both.input if i in stored)
            found[node.name] = (stored[node.input[1]].astype("f8") - stored[node.input[3]].astype("f8"), scale.astype("f8"))
    return found


def convolve(x, w):
    """A 2-D convolution with a padding of 1."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))
    return np.einsum("nchwij,mcij->nmhw", windows, w)


def check_products(binary, folder):
    # Large neighbours of one sign would saturate 16 bits on processors without VNNI.
    w = {"w1": normal(64, 24), "w2": np.abs(normal(32, 64)), "w3": normal(2, 64, 8), "k": normal(6, 4, 3, 3), "b1": normal(24),
         "b2": normal(32), "kb": normal(6)}
    nodes = [
        helper.make_node("MatMul", ["x1", "w1"], ["plain"], name="plain"),
        helper.make_node("MatMul", ["x2", "w1"], ["m"], name="biased"),
        helper.make_node("Add", ["m", "b1"], ["biased"]),
        helper.make_node("Gemm", ["x3", "w2", "b2"], ["gemm"], name="gemm", transB=1),
        helper.make_node("MatMul", ["x4", "w3"], ["batch"], name="batch"),
        helper.make_node("Conv", ["i", "k", "kb"], ["conv"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["x1", "w2t"], ["shared"], name="shared"),
    ]
    w["w2t"] = np.ascontiguousarray(w["w2"].T)
    inputs = {"x1": [2, 3, 64], "x2": [5, 64], "x3": [5, 64], "x4": [2, 5, 64], "i": [1, 4, 9, 9]}
    outputs = ["plain", "biased", "gemm", "batch", "conv", "shared"]
    source, lowered, back, again, plain = (folder / f"{n}.onnx" for n in ("products", "lowered", "back", "again", "qdq"))
    save(source, nodes, inputs, outputs, **w)
    feeds = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in inputs.items()}
    feeds["x3"] = np.abs(feeds["x3"])
    preset = ["--calib", "none", "--preset", "int8-dynamic"]
    if not (amax(binary, "rewrite", source, lowered, *preset, "--form", "matmulinteger") and amax(binary, "rewrite", source, plain, *preset)):
        return
    stored = integer_weights(lowered)
    check("integer products", len(stored) == 6, f"{sorted(stored)}")
    expected = {}
    for output, x, bias in (("plain", "x1", None), ("biased", "x2", "b1"), ("gemm", "x3", "b2"), ("batch", "x4", None),
                            ("conv", "i", "kb"), ("shared", "x1", None)):
        codes, scale = at_run_time(feeds[x])
        weight, steps = stored[output]
        sums = convolve(codes, weight) if output == "conv" else codes @ weight
        bias = 0 if bias is None else w[bias].reshape(-1, 1, 1) if output == "conv" else w[bias]
        expected[output] = sums * (scale * steps) + bias
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        found, kernels = run(lowered, feeds, level)
        for output in outputs:
            near(f"{output} at {level}", found[output], expected[output])
    fused = kernels["DynamicQuantizeMatMul"] + kernels["MatMulIntegerToFloat"]
    check("fused", fused == 5 and kernels["DynamicQuantizeMatMul"] >= 3 and kernels["MatMulInteger"] == 0, f"{dict(kernels)}")
    check("convolution", kernels["ConvInteger"] == 1, f"{dict(kernels)}")
    print(f"matmulinteger: {dict(kernels)}")
    if amax(binary, "convert", lowered, back, "--form", "qdq"):
        found, kernels = run(back, feeds)
        for output in outputs:
            near(f"{output} as QDQ", found[output], expected[output])
        check("as QDQ", not kernels["MatMulInteger"] and Counter(n.op_type for n in onnx.load(back).graph.node)["MatMulInteger"] == 0)
        print(f"the same as QDQ: {dict(kernels)}")
        if amax(binary, "convert", back, again, "--form", "matmulinteger"):
            same = integer_weights(again)
            check("codes there and back", sorted(same) == sorted(stored) and all(
                np.array_equal(same[n][0], stored[n][0]) and np.array_equal(same[n][1], stored[n][1]) for n in stored))
            found, _ = run(again, feeds)
            for output in outputs:
                near(f"{output} again", found[output], expected[output])
    # Of what rewrite has in QDQ, the form can be had later.
    if amax(binary, "convert", plain, again, "--form", "matmulinteger"):
        found, _ = run(again, feeds)
        for output in ("plain", "biased", "batch", "shared"):
            near(f"{output} converted", found[output], expected[output])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def emulated(x, w, r, b, hidden):
    """An LSTM in float64 whose input, as a whole, and hidden state, at every step, are quantized at run time."""
    directions, out = w.shape[0], np.zeros((len(x), w.shape[0], x.shape[1], hidden))
    codes, scale = at_run_time(x)
    for d in range(directions):
        h, c = np.zeros((x.shape[1], hidden)), np.zeros((x.shape[1], hidden))
        for t in range(len(x)) if d == 0 else reversed(range(len(x))):
            state, step = at_run_time(h.astype(np.float32)) if h.any() else (h, 1.0)
            gates = codes[t] @ w[d].T * scale + state @ r[d].T * step + b[d, :4 * hidden] + b[d, 4 * hidden:]
            i, o, f, g = np.split(gates, 4, 1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = out[t, d] = sigmoid(o) * np.tanh(c)
    return out


def check_recurrent(binary, folder):
    hidden, width = 48, 32
    for directions, direction in ((1, "forward"), (2, "bidirectional")):
        w = {"w": normal(directions, 4 * hidden, width), "r": normal(directions, 4 * hidden, hidden), "b": normal(directions, 8 * hidden)}
        node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], name="lstm", hidden_size=hidden, direction=direction)
        source, lowered, back, again = (folder / f"{n}_{direction}.onnx" for n in ("lstm", "lowered", "back", "again"))
        save(source, [node], {"x": [9, 2, width]}, ["y"], **w)
        feeds = {"x": RNG.standard_normal((9, 2, width)).astype(np.float32)}
        reference = run(source, feeds)[0]["y"]
        if not amax(binary, "rewrite", source, lowered, "--calib", "none", "--preset", "int8-dynamic", "--form", "dynamic-quantize-lstm"):
            continue
        found, kernels = run(lowered, feeds)
        check(f"{direction}: kernel", kernels["DynamicQuantizeLSTM"] == 1 and not kernels["LSTM"], f"{dict(kernels)}")
        if amax(binary, "convert", lowered, back, "--form", "qdq"):
            stored = constants(back)
            values = [stored[f"{n}_quantized"].astype("f8") * stored[f"{n}_scale"][:, None] for n in "wr"]
            expected = emulated(feeds["x"], *values, w["b"], hidden)
            ratio = sqnr(found["y"], expected)
            check(f"{direction}: near numpy", ratio >= 40, f"{ratio:.1f} dB")
            kept, kernels = run(back, feeds)
            plain = folder / "plain.onnx"
            save(plain, [node], {"x": [9, 2, width]}, ["y"], b=w["b"], w=values[0].astype("f4"), r=values[1].astype("f4"))
            near(f"{direction}: as QDQ", kept["y"], run(plain, feeds)[0]["y"])
            smaller = os.path.getsize(back) / os.path.getsize(source)
            check(f"{direction}: size", smaller < 0.35, f"{smaller:.2f}")
            print(f"{direction} LSTM: {sqnr(found['y'], reference):.1f} dB as DynamicQuantizeLSTM, {sqnr(kept['y'], reference):.1f} dB as QDQ")
            if amax(binary, "convert", back, again, "--form", "dynamic-quantize-lstm"):
                one, two = constants(lowered), constants(again)
                check(f"{direction}: there and back", one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one))
    w = {"w": normal(1, 3 * hidden, width), "r": normal(1, 3 * hidden, hidden)}
    node = helper.make_node("GRU", ["x", "w", "r"], ["y"], name="gru", hidden_size=hidden)
    source, written, plain = (folder / f"{n}.onnx" for n in ("gru", "gru_8", "gru_float"))
    save(source, [node], {"x": [9, 2, width]}, ["y"], **w)
    feeds = {"x": RNG.standard_normal((9, 2, width)).astype(np.float32)}
    if amax(binary, "rewrite", source, written, "--calib", "none", "--preset", "w8", "--set", "op_type.GRU.weight.enable=true"):
        stored = constants(written)
        values = {n: (stored[f"{n}_quantized"].astype("f4") * stored[f"{n}_scale"][:, None]) for n in "wr"}
        save(plain, [node], {"x": [9, 2, width]}, ["y"], **values)
        found = run(written, feeds)[0]["y"]
        near("GRU", found, run(plain, feeds)[0]["y"])
        ratio = sqnr(found, run(source, feeds)[0]["y"])
        check("GRU: near float", ratio > 30, f"{ratio:.1f} dB")
        check("GRU: size", os.path.getsize(written) < 0.35 * os.path.getsize(source))


def check_foreign(binary, folder):
    """Models of onnxruntime's own quantize_dynamic, to QDQ and back."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    w = {"w1": normal(64, 24), "w2": normal(32, 64), "b2": normal(32), "k": normal(6, 4, 3, 3), "kb": normal(6), "w": normal(1, 64, 16),
         "r": normal(1, 64, 16)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="a"),
        helper.make_node("Gemm", ["x", "w2", "b2"], ["b"], name="b", transB=1),
        helper.make_node("Conv", ["i", "k", "kb"], ["c"], name="c", pads=[1, 1, 1, 1]),
        helper.make_node("LSTM", ["s", "w", "r"], ["l"], name="l", hidden_size=16),
    ]
    inputs = {"x": [5, 64], "i": [1, 4, 9, 9], "s": [7, 1, 16]}
    source, theirs, back, again = (folder / f"{n}_foreign.onnx" for n in ("float", "theirs", "back", "again"))
    save(source, nodes, inputs, ["a", "b", "c", "l"], **w)
    feeds = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in inputs.items()}
    for per_channel in (False, True):
        for kind in (QuantType.QInt8, QuantType.QUInt8):
            # Half of the range, so that no processor saturates.
            quantize_dynamic(source, theirs, per_channel=per_channel, weight_type=kind, reduce_range=True,
                             op_types_to_quantize=["MatMul", "Gemm", "Conv", "LSTM"])
            label = f"quantize_dynamic, {kind}{', channels' if per_channel else ''}"
            if not (amax(binary, "convert", theirs, back, "--form", "qdq")
                    and amax(binary, "convert", back, again, "--form", "matmulinteger,dynamic-quantize-lstm")):
                continue
            (first, _), (second, kernels), (third, fused) = run(theirs, feeds), run(back, feeds), run(again, feeds)
            check(f"{label}: to QDQ", not any(kernels[op] for op in ("ConvInteger", "DynamicQuantizeLSTM")), f"{dict(kernels)}")
            check(f"{label}: and back", fused["ConvInteger"] == fused["DynamicQuantizeLSTM"] == 1, f"{dict(fused)}")
            for output in "abc":
                near(f"{label}: {output} to QDQ", second[output], first[output])
            for output in "abcl":
                near(f"{label}: {output} and back", third[output], first[output], 1e-6)


def token(x):
    """torchao's int8 scales for each token: all of it float32."""
    f = np.float32
    low, high = np.minimum(x.min(-1, keepdims=True), f(0)), np.maximum(x.max(-1, keepdims=True), f(0))
    scale = np.maximum((high - low) / f(255), np.finfo(f).eps).astype(f)
    zero = np.clip(f(-128) - np.rint(low / scale), -128, 127).astype(f)
    return (np.clip(np.rint(x * (f(1) / scale)) + zero, -128, 127) - zero) * scale


def check_tokens(binary, folder):
    w = {"w1": normal(64, 32), "w2": normal(48, 64), "b2": normal(48)}
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"], name="fc1"), helper.make_node("Gemm", ["y", "w2", "b2"], ["b"], name="fc2", transB=1)]
    source, direct, fake, folded = (folder / f"{n}.onnx" for n in ("tokens", "direct", "fake", "folded"))
    save(source, nodes, {"x": [2, 5, 64], "y": [4, 64]}, ["a", "b"], opset=18, **w)
    feeds = {"x": RNG.standard_normal((2, 5, 64)).astype(np.float32), "y": RNG.standard_normal((4, 64)).astype(np.float32)}
    preset = ["--calib", "none", "--preset", "8da4w"]
    if not (amax(binary, "rewrite", source, direct, *preset) and amax(binary, "prepare", source, fake, *preset)
            and amax(binary, "convert", fake, folded)):
        return
    exact = {"qdq_matmulnbits_accuracy_level": "0"}
    one, kernels = run(direct, feeds, **exact)
    two, _ = run(folded, feeds, **exact)
    check("tokens: kernels", kernels["MatMulNBits"] == 2 and kernels["ReduceMin"] == 2, f"{dict(kernels)}")
    for output in one:
        check(f"tokens: {output} as prepared and converted", np.array_equal(one[output], two[output]))
    values = {}
    for name, made in w.items():
        if name != "b2":
            groups = (made if name == "w1" else made.T).reshape(2, 32, -1)
            scale = np.abs(groups).max(1, keepdims=True) / np.float32(7.5)
            values[name] = (np.clip(np.rint(groups * (np.float32(1) / scale)), -8, 7) * scale).reshape(64, -1).astype("f8")
    near("tokens: product", one["a"], token(feeds["x"]).astype("f8") @ values["w1"])
    near("tokens: Gemm", one["b"], token(feeds["y"]).astype("f8") @ values["w2"] + w["b2"])
    fast, _ = run(direct, feeds)
    print(f"8da4w: {sqnr(fast['a'], one['a']):.1f} dB where MatMulNBits quantizes once more (accuracy_level 4)")


def main():
    binary = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("AMAX", ROOT / "target/debug/amax")
    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        check_products(binary, folder)
        check_recurrent(binary, folder)
        check_foreign(binary, folder)
        check_tokens(binary, folder)
    print("\n".join(failures[:40]))
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
