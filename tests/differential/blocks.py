"""Compares weights that amax quantizes with those of onnxruntime's MatMulNBitsQuantizer, bit for bit.

Codes, scales and zero points of both its formats, symmetric and not, in 4 and 8 bits and groups of 32 and 128, for a random
matrix and the weights of models/digits.onnx, or a model that is given. Needs onnx, onnx_ir, onnxruntime
and numpy.
"""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

ROOT = Path(__file__).resolve().parents[2]


def matrices(path):
    rng = np.random.default_rng(0)
    found = {"random": (rng.standard_normal((200, 96)) * rng.uniform(0.01, 2, 96)).astype(np.float32)}
    found["random"][:, 0] = 0
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) > 4096:
            x = numpy_helper.to_array(tensor)
            x = x.reshape(x.shape[0], -1).T if x.ndim > 2 else x
            found[tensor.name] = np.ascontiguousarray(x[:4096, : min(x.shape[1], 512) // 2 * 2])
        if len(found) > 4:
            break
    return found


def product(x):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", x.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", x.shape[1]])], [numpy_helper.from_array(x, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def raw(model):
    """The initializers by the input of the one node that reads them, and that node."""
    tensors = {t.name: t for t in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type in ("DequantizeLinear", "MatMulNBits"))
    return node, [tensors.get(name) for name in node.input]


def content(tensor):
    return np.frombuffer(tensor.raw_data, np.uint8) if tensor.raw_data else np.array(tensor.int32_data, np.uint8)


def unpacked(raw, bits):
    return np.stack([raw >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1).reshape(*raw.shape[:-1], -1)


def ours(amax, path, folder, bits, size, symmetric, qdq):
    dtype = "int4" if symmetric and qdq else f"uint{bits}"
    keys = {"dtype": dtype, "group_size": size, "symmetric": str(symmetric).lower(), "signed_scale": str(symmetric).lower(),
            "arithmetic": "mlas-qdq" if qdq else "mlas"}
    sets = [part for key, value in keys.items() for part in ("--set", f"op_type.MatMul.weight.{key}={value}")]
    out = folder / "ours.onnx"
    subprocess.run([amax, "rewrite", path, out, "--preset", "w4-mlas", *sets], check=True, capture_output=True, text=True)
    return raw(onnx.load(out))[1]


def differences(amax, name, x, bits, size, symmetric, qdq, folder):
    path = folder / "float.onnx"
    onnx.save(product(x), path)
    config = DefaultWeightOnlyQuantConfig(
        block_size=size, is_symmetric=symmetric, bits=bits, quant_format=QuantFormat.QDQ if qdq else QuantFormat.QOperator)
    tool = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    tool.process()
    node, theirs = raw(tool.model.model)
    codes, scales, zeros = ours(amax, path, folder, bits, size, symmetric, qdq)
    depth, columns = x.shape
    groups = -(-depth // size)
    if qdq:
        pairs = [(content(codes), content(theirs[0])), (content(scales), content(theirs[1]))]
        if len(theirs) > 2 and theirs[2] is not None:
            pairs.append((content(zeros), content(theirs[2])))
    else:
        shape = (columns, groups * size)
        found = unpacked(content(codes), bits)[: depth * columns].reshape(depth, columns).T
        expected = unpacked(numpy_helper.to_array(theirs[1]), bits).reshape(shape)[:, :depth]
        their_scales = numpy_helper.to_array(theirs[2]).reshape(columns, groups).T
        pairs = [(found, expected), (numpy_helper.to_array(scales).view(np.uint32), their_scales.view(np.uint32))]
        if not symmetric:
            packed = numpy_helper.to_array(theirs[3]).reshape(columns, -1)
            found = unpacked(content(zeros), bits)[: groups * columns].reshape(groups, columns)
            pairs.append((found, unpacked(packed, bits)[:, :groups].T))
    labels = ("codes", "scales", "zero points")
    case = f"{name} {bits} bits, groups of {size}, {'symmetric' if symmetric else 'asymmetric'}, {'QDQ' if qdq else 'QOperator'}"
    return [f"{case}: {np.sum(a != b)} of {a.size} {label} differ" for label, (a, b) in zip(labels, pairs)
            if a.shape != b.shape or np.any(a != b)]


def main():
    logging.disable(logging.INFO)
    amax = os.environ.get("AMAX") or ROOT / "target/debug/amax"
    model = next((a for a in sys.argv[1:] if a.endswith(".onnx")), ROOT / "models/digits.onnx")
    failures, cases = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, x in matrices(model).items():
            for size in (32, 128):
                for symmetric in (True, False):
                    for bits, qdq in ((4, False), (8, False), (4, True)):
                        failures += differences(amax, name, x, bits, size, symmetric, qdq, Path(scratch))
                        cases += 1
    print("\n".join(failures) or f"{cases} cases alike")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
