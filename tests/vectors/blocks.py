"""Writes blocks.json: what other tools make of matrices in groups, and the least errors that a search finds.

Independent of amax: onnxruntime's own kernels and Python functions, and numpy. `hqq` is as torchao 0.18.0 and onnxruntime
1.31.1 have it; their results for these matrices were compared with it once. Needs numpy and onnxruntime 1.31.1.
"""

import json
import os

import numpy as np
import sys
import types

# The module of k-quant imports it for other functions.
sys.modules.setdefault("onnx_ir", types.ModuleType("onnx_ir"))

from onnxruntime.capi import _pybind_state as ort
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

f32 = np.float32
rng = np.random.default_rng(7)


def matrix(rows, columns):
    """Normal numbers, with what is special: zeros, groups of one sign, values that fall between two codes."""
    x = (rng.standard_normal((rows, columns)) * rng.uniform(0.05, 2, columns)).astype(f32)
    x[:, 0] = 0
    x[:, 1] = np.abs(x[:, 1]) + 1
    x[:, 2] = -np.abs(x[:, 2])
    x[:, 3] = np.arange(rows) % 16 / 2 - 4
    x[:, 4] = np.arange(rows) % 31 - 15
    return x


def unpacked(raw, bits):
    raw = np.asarray(raw, np.uint8)
    parts = [raw >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*raw.shape[:-1], -1)


def nbits(x, bits, size, symmetric):
    """Codes, scales and zero points of MatMulNBits, as those of a [K, N] matrix with groups along K."""
    depth, columns = x.shape
    groups = -(-depth // size)
    codes = np.zeros((columns, groups, size * bits // 8), np.uint8)
    scales = np.zeros(columns * groups, f32)
    zeros = np.zeros(columns * -(-groups * bits // 8), np.uint8)
    kernel = {2: ort.quantize_matmul_2bits, 4: ort.quantize_matmul_4bits, 8: ort.quantize_matmul_8bits}[bits]
    kernel(codes, x, scales, zeros, size, columns, depth, symmetric)
    q = unpacked(codes, bits).reshape(columns, -1)[:, :depth].T
    zeros = unpacked(zeros.reshape(columns, -1), bits)[:, :groups].T
    zeros = np.full((groups, columns), 1 << bits - 1) if symmetric else zeros
    return q, scales.reshape(columns, groups).T, zeros


def qdq(x, size, symmetric):
    """The same of the kernel for DequantizeLinear; int4 where symmetric."""
    depth, columns = x.shape
    groups = -(-depth // size)
    codes = np.zeros(-(-depth * columns // 2), np.uint8)
    scales = np.zeros((groups, columns), f32)
    zeros = np.zeros(-(-groups * columns // 2), np.uint8)
    ort.quantize_qdq_matmul_4bits(codes, x, scales, zeros, size, columns, depth, symmetric)
    q = unpacked(codes, 4)[: depth * columns].reshape(depth, columns).astype(int)
    zeros = unpacked(zeros, 4)[: groups * columns].reshape(groups, columns).astype(int)
    if symmetric:
        q, zeros = (q ^ 8) - 8, zeros * 0
    return q, scales, zeros


def hqq(x, highest, steps=20):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    inverse = np.minimum(highest / (high - low), f32(2e4)).astype(f32)
    first = zero = np.rint(-low * inverse).astype(f32)
    beta, best = 10.0, np.inf
    for _ in range(steps):
        q = np.clip(np.rint(x * inverse + zero), 0, highest).astype(f32)
        error = x - (q - zero) / inverse
        shrunk = np.abs(error) - f32(1 / beta) * np.power(np.abs(error) + f32(1e-8), f32(-0.3))
        zero = np.mean(q - (x - np.sign(error) * np.maximum(shrunk, 0)) * inverse, axis=1, keepdims=True).astype(f32)
        beta *= 1.01
        if np.abs(error).mean() >= best:
            break
        best = np.abs(error).mean()
    return inverse.ravel(), first.ravel(), zero.ravel()


def weighted(x, y):
    weights = np.sqrt(np.mean(np.square(x, dtype=float), 1, keepdims=True)) + np.abs(x)
    return np.sum(weights * (x - y).astype(float) ** 2, 1)


def searched(x, highest, least):
    """The least weighted error of any of many scales and all zero points."""
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    best = np.full(len(x), np.inf)
    for ratio in np.linspace(0.5, 1.15, 400):
        scale = ((high - low) / highest * ratio).astype(f32)[:, None]
        for zero in range(highest + 1) if least else [8]:
            q = np.clip(np.rint(x / scale) + zero, 0, highest) if least else np.clip(np.rint(x / scale), -8, 7) + 8
            best = np.minimum(best, weighted(x, (q - zero) * scale))
    return best


def flat(values):
    return [int(v) if isinstance(v, np.integer) else float(v) for v in np.asarray(values).ravel()]


matrices = {"even": matrix(64, 8), "ragged": matrix(40, 7)}
cases = []
for name, x in matrices.items():
    for size in (16, 32, 128):
        for symmetric in (True, False):
            for bits in (2, 4, 8):
                q, scales, zeros = nbits(x, bits, size, symmetric)
                cases.append({"x": name, "arithmetic": "mlas", "dtype": f"uint{bits}", "symmetric": symmetric, "size": size,
                              "q": flat(q), "scales": flat(scales), "zero_points": flat(zeros)})
            q, scales, zeros = qdq(x, size, symmetric)
            cases.append({"x": name, "arithmetic": "mlas-qdq", "dtype": "int4" if symmetric else "uint4",
                          "symmetric": symmetric, "size": size, "q": flat(q), "scales": flat(scales), "zero_points": flat(zeros)})

groups = (rng.standard_normal((24, 32)) * rng.uniform(0.01, 3, (24, 1)) + rng.uniform(-1, 1, (24, 1))).astype(f32)
groups[:4] = rng.standard_t(3, (4, 32)).astype(f32)
inverse, first, zero = hqq(groups, 15)
# Groups whose range has zero in it, which is where k-quant keeps it exact.
around = groups[(groups.min(1) < 0) & (groups.max(1) > 0)]
_, scale, offset = quant_tensor_k_quant_cpu(around.copy(), 4, 32)
codes = np.clip(np.rint(around / scale + offset), 0, 15)
out = {
    "inputs": {k: {"dims": v.shape, "values": flat(v)} for k, v in matrices.items()},
    "cases": cases,
    "hqq": {"size": 32, "values": flat(groups), "inverse": flat(inverse), "first": flat(first), "zeros": flat(zero)},
    "kquant": {"size": 32, "values": flat(around), "onnxruntime": flat(weighted(around, (codes - offset) * scale)),
               "searched": flat(searched(around, 15, True))},
}
with open(os.path.join(os.path.dirname(__file__), "blocks.json"), "w") as f:
    text = json.dumps(out)
    f.write(text + "\n")
