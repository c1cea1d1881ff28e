"""Converts quantized models between Q/DQ pairs and operators on codes, and lets onnxruntime run both.

    python tests/differential/qoperator.py [path/to/amax] [MODEL.onnx SAMPLES.npz]...

Models are what `amax rewrite` and onnxruntime's quantize_static (QuantFormat.QOperator) make of models/digits.onnx, of
a model that has every operator of this format, and of those named; products with random biases in floats, whose codes
must be those that onnxruntime gives them when it fuses; and the trained models of tests/qat/ that have such biases.
"""

import collections
import logging
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

ROOT = pathlib.Path(__file__).resolve().parents[2]
AMAX = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/debug/amax")
LEVELS = onnxruntime.GraphOptimizationLevel
QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}


def amax(*arguments):
    done = subprocess.run([AMAX, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"amax {' '.join(map(str, arguments))}\n{done.stderr}")
    return done.stderr


def run(path, samples, optimized):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_ENABLE_ALL if optimized else LEVELS.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # By default int8 becomes uint8 where it fuses, and the products of that and int8 saturate on some processors.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = [session.run(None, sample) for sample in samples]
    return [np.stack([one[i] for one in found]) for i in range(len(found[0]))]


def codes(path):
    """Numbers of every initializer that is codes, or a scale or zero point of some, but for zero points of zeros."""
    graph = onnx.load(path).graph
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    integers = {n: v for n, v in held.items() if v.dtype in (np.int8, np.uint8, np.int32) and v.size > 0}
    scales = {n: v for n, v in held.items() if n.endswith("_scale")}
    return {**integers, **scales}


def operators(path):
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    domains = {o.domain for o in model.opset_import}
    used = {n.domain for n in model.graph.node}
    assert used <= domains, f"{used} are used, {domains} imported"
    return collections.Counter(n.op_type for n in model.graph.node)


def compare(name, before, after, steps, allowed):
    """Whether outputs differ by at most a step each, in at most the share `allowed` of the elements."""
    good = True
    for index, (x, y, step) in enumerate(zip(before, after, steps, strict=True)):
        gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
        largest = gap.max() if gap.size else 0.0
        share = (gap > 0).mean()
        good &= bool(largest <= step and share <= allowed)
        print(f"{name:44} output {index}: {share:7.3%} differ, by {largest:.2e} (allowed {step:.2e})")
    return good


def last_steps(path, outputs, sizes):
    """What one code of the last quantizer is worth in each output; where there is none, a share of its largest number."""
    model = onnx.load(path)
    held = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    steps = []
    for output, values in zip(outputs, sizes, strict=True):
        node = makers[output]
        step = float(held[node.input[1]].max()) if node.op_type == "DequantizeLinear" else 0.0
        steps.append(step or float(np.abs(values).max()) * 1e-5)
    return steps


def there_and_back(name, quantized, samples, folder, most, share=1.0, worth=1.0):
    """QDQ to operators on codes and back. At most `most` quantizers may be left."""
    lowered, raised = folder / f"{name}.qoperator.onnx", folder / f"{name}.back.onnx"
    said = amax("convert", quantized, lowered, "--form", "qoperator")
    amax("convert", lowered, raised, "--form", "qdq")
    ops, was = operators(lowered), operators(quantized)
    operators(raised)
    left = sum(ops[q] for q in QUANTIZERS)
    print(f"{name}: {sum(was[q] for q in QUANTIZERS)} quantizers -> {left};", dict(sorted(ops.items())))
    for line in said.splitlines():
        if line.startswith("kept"):
            print("  ", line)
    good = left <= most
    first, second = codes(quantized), codes(raised)
    wrong = [n for n in second if n not in first or not np.array_equal(first[n], second[n])]
    missing = [n for n in first if n not in second and np.any(first[n])]
    print(f"{name}: {len(second)} constants after the way there and back, {len(wrong)} are others, {len(missing)} gone")
    good &= not wrong and not missing
    fused, plain = run(quantized, samples, True), run(quantized, samples, False)
    names = [o.name for o in onnx.load(quantized).graph.output]
    steps = last_steps(quantized, names, plain)
    steps = [step * worth for step in steps]
    good &= compare(f"{name}: as onnxruntime fuses it", fused, run(lowered, samples, True), steps, share)
    return good & compare(f"{name}: back again, not optimized", plain, run(raised, samples, False), steps, share)


class Reader(CalibrationDataReader):
    def __init__(self, samples):
        self.left = iter(samples)

    def get_next(self):
        return next(self.left, None)


def foreign(digits, samples, folder):
    """What quantize_static makes in this format becomes Q/DQ pairs with the same outputs."""
    good = True
    u, s = QuantType.QUInt8, QuantType.QInt8
    for left, right, channels in [(u, s, True), (u, s, False), (u, u, False), (s, s, True)]:
        name = f"onnxruntime {left.name}/{right.name}{' by channel' if channels else ''}"
        made, raised, again = folder / "made.onnx", folder / "raised.onnx", folder / "again.onnx"
        plain = folder / "plain.onnx"
        quantize_static(digits, made, Reader(samples[:16]), quant_format=QuantFormat.QOperator, per_channel=channels,
                        activation_type=left, weight_type=right)
        amax("convert", made, raised, "--form", "qdq")
        amax("convert", raised, again, "--form", "qoperator")
        amax("convert", made, plain, "--form", "float")
        signal, noise = run(digits, samples, False)[0], run(plain, samples, False)[0]
        ratio = 10 * np.log10((signal**2).sum() / ((signal - noise) ** 2).sum())
        print(f"{name}: {ratio:.1f} dB in floats")
        good &= bool(ratio > 25) and not QUANTIZERS & set(operators(plain))
        ops = operators(raised)
        good &= not any(op.startswith("QLinear") or op == "QGemm" for op in ops)
        first, second = codes(made), codes(again)
        wrong = [n for n in second if n not in first or not np.array_equal(first[n], second[n])]
        if operators(again) != operators(made):
            print(f"{name}: {operators(made) - operators(again)} became {operators(again) - operators(made)}")
            good = False
        good &= not wrong
        step = 0.0
        model = onnx.load(made)
        for i in model.graph.initializer:
            if i.name == "logits_scale":
                step = float(numpy_helper.to_array(i))
        # uint8 weights in full do not saturate; int8 ones do with onnxruntime's kernels on some processors.
        if right == u or left == s:
            before, after = run(made, samples, False), run(raised, samples, False)
            good &= compare(name, before, after, [step * 1.01], 0.1)
        else:
            run(raised, samples, False)
        print(f"{name}: {len(second)} constants after the way there and back, {len(wrong)} are others")
    return good


def everything(path):
    """Every operator that this format has, each between quantizers, with parameters that differ."""
    rng = np.random.default_rng(5)
    nodes, held, number = [], [], [0]

    def constant(value, name):
        held.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def quantizer(x, scale, zero):
        number[0] += 1
        tag = f"t{number[0]}"
        s, z = constant(np.float32(scale), f"{tag}_scale"), constant(np.uint8(zero), f"{tag}_zero_point")
        nodes.append(helper.make_node("QuantizeLinear", [x, s, z], [f"{tag}_quantized"], f"{tag}_q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{tag}_quantized", s, z], [f"{tag}_numbers"], f"{tag}_d"))
        return f"{tag}_numbers", scale

    def weight(shape, name, axis, kind):
        count = shape[axis]
        q = rng.integers(-60, 60, shape) + (128 if kind == np.uint8 else 0)
        scale = (rng.random(count) * 0.004 + 0.004).astype(np.float32)
        names = [constant(q.astype(kind), f"{name}_quantized"), constant(scale, f"{name}_scale"),
                 constant(np.full(count, 128 if kind == np.uint8 else 0, kind), f"{name}_zero_point")]
        nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}_numbers"], f"{name}_d", axis=axis))
        return f"{name}_numbers", scale

    def bias(scale, name):
        q = rng.integers(-4000, 4000, len(scale)).astype(np.int32)
        names = [constant(q, f"{name}_quantized"), constant(scale, f"{name}_scale")]
        nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}_numbers"], f"{name}_d", axis=0))
        return f"{name}_numbers"

    def op(kind, inputs, scale, zero, **attributes):
        number[0] += 1
        nodes.append(helper.make_node(kind, inputs, [f"{kind}_{number[0]}"], f"{kind}_{number[0]}", **attributes))
        return quantizer(f"{kind}_{number[0]}", scale, zero)

    x, s = quantizer("x", 0.03, 120)
    w, sw = weight((8, 4, 3, 3), "conv", 0, np.int8)
    y, _ = op("Conv", [x, w, bias(np.float32(s) * sw, "conv_bias")], 0.05, 118, pads=[1, 1, 1, 1])
    leaky, _ = op("LeakyRelu", [y], 0.04, 20, alpha=0.125)
    sigmoid, _ = op("Sigmoid", [y], 1 / 256, 0)
    product, _ = op("Mul", [leaky, sigmoid], 0.03, 10)
    added, _ = op("Add", [product, leaky], 0.06, 30)
    joined, _ = op("Concat", [added, product], 0.07, 25, axis=1)
    pooled, _ = op("AveragePool", [joined], 0.05, 22, kernel_shape=[2, 2], strides=[2, 2])
    chosen, _ = op("Where", ["mask", pooled, quantizer("z", 0.02, 100)[0]], 0.06, 40)
    mean, sm = op("GlobalAveragePool", [chosen], 0.04, 60)
    constant(np.array([0, -1], np.int64), "shape")
    flat, sm = op("Reshape", [mean, "shape"], sm, 60)
    g, sg = weight((6, 16), "gemm", 0, np.int8)
    gemm, s6 = op("Gemm", [flat, g, bias(np.float32(sm) * sg, "gemm_bias")], 0.06, 128, transB=1)
    m, _ = weight((6, 5), "matmul", 1, np.uint8)
    columns, _ = op("MatMul", [gemm, m], 0.05, 128)
    other, _ = weight((6, 3), "free", 1, np.uint8)
    nodes.append(helper.make_node("MatMul", [gemm, other], ["free"], "free"))
    soft, _ = op("Softmax", [columns], 1 / 256, 0, axis=-1)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "everything",
                              [value("x", 1, [2, 4, 8, 8]), value("z", 1, [2, 16, 4, 4]), value("mask", 9, [2, 16, 4, 4])],
                              [value(columns, 1, [2, 5]), value(soft, 1, [2, 5]), value(chosen, 1, [2, 16, 4, 4]),
                               value("free", 1, [2, 3])], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return [{"x": rng.normal(0, 1.2, (2, 4, 8, 8)).astype(np.float32), "mask": rng.random((2, 16, 4, 4)) < 0.5,
             "z": rng.normal(0, 0.8, (2, 16, 4, 4)).astype(np.float32)} for _ in range(20)]


def optimized(path, folder):
    """The graph that onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def biased(kind, rng, count, channels):
    """A product with biases in floats between quantizers; every second one is next to a tie."""
    attributes = {"transB": 1} if kind == "Gemm" else {}
    shape = {"Conv": (count, 2, 3, 3), "Gemm": (count, 8)}.get(kind, (8, count))
    sx = np.float32(10 ** rng.uniform(-3, -1))
    sw = (10 ** rng.uniform(-4, -1, count if channels else 1)).astype(np.float32)
    ties = (rng.integers(-100_000, 100_000, count) + 0.5) * (sx * sw).astype(np.float64)
    bias = np.where(np.arange(count) % 2, ties, rng.normal(0, 1, count) * 10 ** rng.uniform(-3, 1, count))
    held = {"sx": sx, "zx": np.uint8(120), "sy": np.float32(0.05), "zy": np.uint8(128), "b": bias.astype(np.float32),
            "w": rng.integers(-63, 64, shape).astype(np.int8), "sw": sw if channels else sw[0],
            "zw": np.zeros(count if channels else (), np.int8)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
             helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
             helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], axis=1 if kind == "MatMul" else 0)]
    if kind == "MatMul":
        nodes += [helper.make_node("MatMul", ["xd", "wd"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    else:
        nodes.append(helper.make_node(kind, ["xd", "wd", "b"], ["y"], **attributes))
    nodes += [helper.make_node("QuantizeLinear", ["y", "sy", "zy"], ["yq"]),
              helper.make_node("DequantizeLinear", ["yq", "sy", "zy"], ["out"])]
    value = helper.make_tensor_value_info
    x = [1, 2, 3, 3] if kind == "Conv" else [2, 8]
    graph = helper.make_graph(nodes, "biased", [value("x", 1, x)], [value("out", 1, None)],
                              [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), x


def biases(folder):
    """Codes of biases in floats are those of onnxruntime's fusion, and so are the outputs."""
    rng, good = np.random.default_rng(11), True
    for kind in ("Conv", "Gemm", "MatMul"):
        compared = wrong = differing = tied = 0
        for trial in range(12):
            model, shape = biased(kind, rng, 256, trial % 2 == 0)
            given, lowered = folder / "biased.onnx", folder / "lowered.onnx"
            onnx.save(model, given)
            amax("convert", given, lowered, "--form", "qoperator")
            ours = codes(lowered)["b_quantized"]
            found = [numpy_helper.to_array(i) for i in optimized(given, folder).initializer]
            (theirs,) = [v for v in found if v.dtype == np.int32 and v.size == ours.size]
            held = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
            double = np.rint(held["b"].astype(np.float64) / (held["sx"] * held["sw"]))
            compared, wrong = compared + ours.size, wrong + int((ours != theirs.ravel()).sum())
            tied += int((double != ours).sum())
            samples = [{"x": rng.normal(0, 5 * held["sx"] * 10, shape).astype(np.float32)} for _ in range(4)]
            differing += int((run(given, samples, True)[0] != run(lowered, samples, True)[0]).sum())
        print(f"{kind}: {wrong} of {compared} codes of biases are others than onnxruntime's ({tied} than in float64), "
              f"{differing} outputs differ")
        # That float64 gives others shows that there were ties to tell it by.
        good &= wrong == 0 and differing == 0 and tied > 0
    return good


def float_biases(quantized, samples, folder):
    """Biases that are made floats get their codes back, and outputs are those of onnxruntime's fusion."""
    model = onnx.load(quantized)
    held = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    gone = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and held.get(n.input[0], np.int8(0)).dtype == np.int32]
    wanted = {}
    for node in gone:
        numbers = (held[node.input[0]].astype(np.float32) * held[node.input[1]]).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(numbers, node.output[0]))
        wanted[f"{node.output[0]}_quantized"] = held[node.input[0]]
        model.graph.node.remove(node)
    given, lowered = folder / "float_biases.onnx", folder / "float_biases.qoperator.onnx"
    onnx.save(model, given)
    amax("convert", given, lowered, "--form", "qoperator")
    made = codes(lowered)
    wrong = [n for n, v in wanted.items() if n not in made or not np.array_equal(made[n], v)]
    print(f"{len(wanted)} biases in floats, {len(wrong)} have other codes than before: {wrong}")
    good = len(wanted) > 0 and not wrong
    # Only the last bias matters: onnxruntime leaves a product with a result in floats as it is.
    return good & compare("biases in floats", run(given, samples, True), run(lowered, samples, True), [5e-6], 1.0)


def trained(folder):
    """Trained models have biases in floats; where the result is quantized, outputs are those of onnxruntime's fusion."""
    good = True
    # Quantizers that may be left, and how far results in floats may be off: half a code of their bias.
    for name, most, gap in [("fx_qat_cnn", 4, 0.0), ("pt2e_qat_cnn", 3, 3e-6), ("modelopt_deep", 4, 1e-5)]:
        path = ROOT / f"tests/qat/{name}.onnx"
        pairs, lowered = folder / "pairs.onnx", folder / "lowered.onnx"
        amax("convert", path, pairs)
        said = amax("convert", path, lowered, "--form", "qoperator")
        ops = operators(lowered)
        held = np.load(path.with_suffix("").with_suffix(".calib.npz"))["x"]
        samples = [{"x": held[i]} for i in range(len(held))]
        left = sum(ops[q] for q in QUANTIZERS)
        print(f"{name}: {left} quantizers,", dict(sorted(ops.items())))
        good &= "its bias quantized to int32" in said and left <= most and ops["QLinearConv"] == 1
        good &= compare(f"{name}: as onnxruntime fuses it", run(pairs, samples, True), run(lowered, samples, True), [gap], 1.0)
    return good


def main():
    logging.disable(logging.WARNING)
    digits = ROOT / "models/digits.onnx"
    samples = [{"image": x.reshape(1, 1, 8, 8)} for x in np.load(ROOT / "models/digits.test.npz")["image"][:200]]
    good = True
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        amax("rewrite", digits, folder / "digits.onnx", "--preset", "int8", "--no-measure")
        good &= there_and_back("digits", folder / "digits.onnx", samples, folder, 1)
        inputs = everything(folder / "everything.onnx")
        good &= there_and_back("everything", folder / "everything.onnx", inputs, folder, 5, 0.1, 1.01)
        good &= foreign(digits, samples, folder)
        good &= float_biases(folder / "digits.onnx", samples, folder)
        good &= biases(folder)
        good &= trained(folder)
        for model, held in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
            held = np.load(held)
            chosen = [{name: held[name][i] for name in held.files} for i in range(min(8, len(held[held.files[0]])))]
            wanted = {i.name for i in onnx.load(model).graph.input}
            chosen = [{k: v for k, v in one.items() if k in wanted} for one in chosen]
            made = folder / "given.onnx"
            amax("rewrite", model, made, "--preset", "int8", "--no-measure")
            good &= there_and_back(pathlib.Path(model).stem, made, chosen, folder, 10**6, 1.0, 1e9)
    print("all right" if good else "WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
