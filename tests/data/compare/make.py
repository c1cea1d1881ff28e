"""Writes the models beside this script and expected.json: what onnxruntime and numpy say of every quantized site.

Needs numpy, onnx, onnxruntime 1.31, and the program itself: `make.py target/debug/amax`. Run it from the root of the
repository. Every tensor of every sample is kept, and errors are computed from their definition:

- own error of a pair of QuantizeLinear and DequantizeLinear: the float model's tensor through numpy's version of the pair;
- own error of a node with a quantized constant: a model of that node alone, fed with the float model's tensors;
- accumulated error: the tensor of the quantized model, run with all optimizations off, against the float model's.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
SAMPLES = 12


def session(model):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def every_tensor(model, samples):
    """Values of all float tensors by name, a list with an entry for each sample."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    known = {o.name for o in model.graph.output}
    inferred = onnx.shape_inference.infer_shapes(model)
    integers = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type != TensorProto.FLOAT}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known and name not in integers:
                model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    run = session(model)
    names = [o.name for o in run.get_outputs()]
    values = {name: [] for name in names}
    for sample in samples:
        for name, value in zip(names, run.run(None, sample)):
            values[name].append(value)
        for name, value in sample.items():
            values.setdefault(name, []).append(value)
    return values


def sqnr(reference, test):
    signal = sum(float((r.astype(np.float64) ** 2).sum()) for r in reference)
    noise = sum(float(((r.astype(np.float64) - t.astype(np.float64)) ** 2).sum()) for r, t in zip(reference, test))
    return None if noise == 0 else 10 * np.log10(signal / noise)


def sites(float_model, quantized, samples):
    original, changed = every_tensor(float_model, samples), every_tensor(quantized, samples)
    graph = quantized.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    producer = {o: n for n in graph.node for o in n.output}
    float_producer = {o: n for n in float_model.graph.node for o in n.output}
    found = []

    def behind_relu(name, node):
        """What a Relu of the quantized model gives has the name in front of the Relu where onnxruntime had dropped that."""
        readers = [n for n in float_model.graph.node if name in n.input]
        given = node is None or node.op_type != "Relu" or float_producer[name].op_type == "Relu"
        return name if given or [n.op_type for n in readers] != ["Relu"] else readers[0].output[0]

    def original_name(name):
        node = producer.get(name)
        for candidate in (name, name.removesuffix("_float"), name.removesuffix("_QuantizeLinear_Input")):
            if candidate in original:
                return behind_relu(candidate, node)
        if node is not None and node.op_type == "DequantizeLinear" and node.input[0] in producer:
            return original_name(producer[node.input[0]].input[0])
        # The pair behind it may have the name.
        codes = [n.output[0] for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name]
        pairs = [n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in codes]
        return next((behind_relu(p, node) for p in pairs if p in original), None)

    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            back = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] == node.output[0]]
            if not back:
                continue
            scale, zero = (constants[i] for i in node.input[1:3])
            limits = np.iinfo(zero.dtype)
            name = original_name(node.input[0])

            def pair(x):
                codes = np.clip(np.rint(x / scale) + zero.astype(np.float32), limits.min, limits.max)
                return ((codes - zero.astype(np.float32)) * scale).astype(np.float32)

            own = sqnr(original[name], [pair(x) for x in original[name]])
            tensor = back[0].output[0]
            found.append({"kind": "activation", "tensor": tensor, "format": zero.dtype.name, "own": own,
                          "accumulated": sqnr(original[name], changed[tensor])})
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            weights = [i for i in node.input if i in producer and producer[i].op_type == "DequantizeLinear"
                       and producer[i].input[0] in constants]
            integer = node.op_type == "MatMulInteger"
            kinds = [constants[producer[i].input[0]].dtype.name for i in weights]
            if not integer and not set(kinds) - {"int32"}:
                continue
            # The node with what belongs to it: constants before it, and behind it what leads to a tensor of the float model.
            inside, output = [node], node.output[0]
            while original_name(output) is None:
                inside.append(next(n for n in graph.node if output in n.input))
                output = inside[-1].output[0]
            pending = [i for n in inside for i in n.input]
            feeds = {}
            nodes = list(inside)
            while pending:
                name = pending.pop()
                if not name or name in constants or name in feeds or any(name in n.output for n in inside):
                    continue
                if (float_name := original_name(name)) is not None and name not in [o for n in nodes for o in n.output]:
                    feeds[name] = float_name
                elif producer[name] not in nodes:
                    nodes.insert(0, producer[name])
                    pending += producer[name].input
            ordered = [n for n in graph.node if n in nodes]
            alone = helper.make_model(
                helper.make_graph(
                    ordered, "alone",
                    [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in feeds],
                    [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
                    [t for t in graph.initializer if any(t.name in n.input for n in ordered)],
                ),
                opset_imports=quantized.opset_import, ir_version=quantized.ir_version,
            )
            run = session(alone)
            name = original_name(output)
            before = float_producer[name]
            if before.op_type in ("Relu", "Clip") and inside[-1].op_type != before.op_type:
                # The quantizer has dropped the node that clips, and given its tensor's name to the one before it.
                name = before.input[0]
            results = [run.run(None, {f: original[o][i] for f, o in feeds.items()})[0] for i in range(len(samples))]
            found.append({"kind": "weight", "tensor": output, "format": "int8", "own": sqnr(original[name], results),
                          "accumulated": sqnr(original[name], changed[output])})
    return found


class Reader(CalibrationDataReader):
    def __init__(self, samples):
        self.samples = iter(samples)

    def get_next(self):
        return next(self.samples, None)


def mlp():
    """Two products and what is between them; the second one's weight has a few large rows."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 0.4, (24, 32)), rng.normal(0, 0.3, (32, 10))
    second[:3] *= 8
    bias = rng.normal(0, 0.2, 32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], name="first"),
        helper.make_node("Add", ["m", "b1"], ["a"], name="shift"),
        helper.make_node("Tanh", ["a"], ["t"], name="tanh"),
        helper.make_node("MatMul", ["t", "w2"], ["y"], name="second"),
    ]
    constants = {"w1": first, "b1": bias, "w2": second}
    graph = helper.make_graph(
        nodes, "mlp", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    samples = [{"x": rng.normal(0, 1 + i / 4, (1 + i % 3, 24)).astype(np.float32)} for i in range(SAMPLES)]
    return model, samples


def main():
    amax = Path(sys.argv[1]).resolve()
    expected = {}

    def case(name, float_model, quantized, samples):
        expected[name] = sites(onnx.load(float_model), onnx.load(quantized), samples)

    digits = ROOT / "models/digits.onnx"
    rows = np.load(ROOT / "models/digits.calib.npz")["image"][:SAMPLES]
    samples = [{"image": row} for row in rows]
    np.savez(HERE / "digits.npz", image=rows)
    subprocess.run([amax, "-q", "rewrite", digits, HERE / "digits.amax.onnx", "--calib", HERE / "digits.npz"], check=True)
    case("digits.amax", digits, HERE / "digits.amax.onnx", samples)
    quantize_static(digits, HERE / "digits.ort.onnx", Reader(samples), quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    case("digits.ort", digits, HERE / "digits.ort.onnx", samples)
    quantize_static(digits, HERE / "coded.onnx", Reader(samples), quant_format=QuantFormat.QOperator,
                    activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True)
    subprocess.run([amax, "-q", "convert", HERE / "coded.onnx", HERE / "digits.qoperator.onnx", "--form", "qdq"], check=True)
    (HERE / "coded.onnx").unlink()
    case("digits.qoperator", digits, HERE / "digits.qoperator.onnx", samples)
    model, samples = mlp()
    onnx.save(model, HERE / "mlp.onnx")
    for i, sample in enumerate(samples):
        (HERE / "mlp").mkdir(exist_ok=True)
        np.save(HERE / f"mlp/{i}.npy", sample["x"])
    quantize_static(HERE / "mlp.onnx", HERE / "mlp.ort.onnx", Reader(samples), quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
    case("mlp.ort", HERE / "mlp.onnx", HERE / "mlp.ort.onnx", samples)
    quantize_dynamic(HERE / "mlp.onnx", HERE / "mlp.dynamic.onnx", weight_type=QuantType.QInt8)
    case("mlp.dynamic", HERE / "mlp.onnx", HERE / "mlp.dynamic.onnx", samples)
    with open(HERE / "expected.json", "w") as out:
        json.dump(expected, out, indent=1)
        out.write("\n")


main()
