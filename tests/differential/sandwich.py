#!/usr/bin/env python3
"""Puts every operator of the standard between two quantized operators and lets onnxruntime run the result.

    python3 tests/differential/sandwich.py [AMAX] [--all] [--target NAME] [--only OPERATOR] [--keep DIR]

Each operator stands between two Convs and between two MatMuls, at every opset from 7 on that changed it and that onnxruntime
takes, with several attributes and inputs where kernels differ. Wherever onnxruntime runs the float model, it must load and run
the file that `amax rewrite` makes with its defaults, with its own default optimizations, and the error at the output must be
within 1 dB of what amax reports. Without --all only the default target, and opsets from 13 on.

Of the other targets, whose kernels this machine may not have, onnxruntime runs the file as it is written, without optimizations;
what is for a processor with VNNI must also load and run with them.

Sandwiches do not touch each other, so many of them stand side by side in one model; one that fails is looked for alone.
An operator without a recipe here is a failure. Closes with the line "N passed, N failed".
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from run import enter_environment

if __name__ == "__main__":
    enter_environment()

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

onnxruntime.set_default_logger_severity(4)
ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["ort-cpu", "ort-cpu-vnni", "generic", "tensorrt"]
# Those whose kernels are the ones of this machine.
EXECUTED = {"ort-cpu"} | ({"ort-cpu-vnni"} if "vnni" in Path("/proc/cpuinfo").read_text() else set())
NEWEST = 26
# So few samples are used for ranges and for the measure alike.
SAMPLES = 6
TOGETHER = 24
LARGEST_GAP_DB = 1.0
# Above this SQNR the difference between two correct roundings counts more than the noise that is compared.
CEILING_DB = 45
FLOAT, INT64, INT32, BOOL, STRING = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING)

IR = {8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 14: 7, 15: 8, 18: 8, 20: 9, 22: 10, 23: 11, 24: 12, 25: 13}


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float32)


def noise(*shape):
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(np.float32)


class Recipe:
    """How an operator is called: its inputs, where DATA stands for what the first Conv or MatMul made, and attributes."""

    def __init__(self, *inputs, since=7, until=99, shape=None, domain="any", cast=None, outputs=1, take=0, added=False, wraps=None,
                 chaotic=False, **attributes):
        # `shape`: what the data is reshaped to; `cast`: the type it is cast to; `take`: which output goes on;
        # `added`: the operator has no data, and its result is added to it.
        self.inputs, self.since, self.until, self.shape, self.domain = inputs, since, until, shape, domain
        self.cast, self.outputs, self.take, self.added, self.wraps = cast, outputs, take, added, wraps
        self.chaotic, self.attributes = chaotic, attributes


DATA = object()
IMAGE = {"conv": None, "matmul": (1, 4, 4, 4)}
FLAT = {"conv": (16, 16), "matmul": None}
SEQUENCE = {"conv": (8, 4, 8), "matmul": (4, 2, 8)}
HEADS = {"conv": (1, 4, 8, 8), "matmul": (1, 2, 4, 8)}


def same(make):
    """An input with the shape of the data."""
    return lambda dims: make(*dims)


def last(make):
    return lambda dims: make(dims[-1])


def channels(make):
    return lambda dims: make(dims[1])


def plain(**keys):
    return [Recipe(DATA, **keys)]


def reduction(**keys):
    axis = [Recipe(DATA, axes=[1], until=17, **keys), Recipe(DATA, axes=[-1], keepdims=0, until=17, **keys)]
    given = [Recipe(DATA, ints(1), since=18, **keys), Recipe(DATA, ints(-1), since=18, keepdims=0, **keys), Recipe(DATA, **keys)]
    return axis + given


def binary(**keys):
    return [Recipe(DATA, same(noise), **keys), Recipe(DATA, last(noise), **keys), Recipe(DATA, floats(0.7), **keys), Recipe(DATA, DATA, **keys)]


def comparison(**keys):
    return [Recipe(DATA, same(noise), chaotic=True, **keys)]


def resizes():
    for mode in ("nearest", "linear", "cubic"):
        for scale in (2.0, 1.5, 1.3, 0.75):
            scales = floats(1, 1, scale, scale)
            yield Recipe(DATA, scales, shape=IMAGE, mode=mode, until=10)
            yield Recipe(DATA, "", scales, shape=IMAGE, mode=mode, since=11)
            for frame in ("align_corners", "asymmetric", "pytorch_half_pixel"):
                yield Recipe(DATA, "", scales, shape=IMAGE, mode=mode, coordinate_transformation_mode=frame, since=11)
            yield Recipe(DATA, "", floats(scale, scale), shape=IMAGE, mode=mode, axes=[2, 3], since=18)
        sizes = lambda dims: ints(*dims[:2], 7, 9)
        yield Recipe(DATA, "", "", sizes, shape=IMAGE, mode=mode, since=11, until=12)
        yield Recipe(DATA, "", "", sizes, shape=IMAGE, mode=mode, since=13)
        for policy in ("stretch", "not_larger", "not_smaller"):
            yield Recipe(DATA, "", "", ints(7, 9), shape=IMAGE, mode=mode, axes=[2, 3], keep_aspect_ratio_policy=policy, since=18)
    for nearest in ("floor", "ceil", "round_prefer_ceil"):
        yield Recipe(DATA, "", floats(1, 1, 1.5, 1.5), shape=IMAGE, nearest_mode=nearest, since=11)
    for mode in ("linear", "cubic"):
        yield Recipe(DATA, "", floats(1, 1, 0.6, 0.6), shape=IMAGE, mode=mode, antialias=1, since=18)
    for scale in (1.5, 0.6):
        yield Recipe(DATA, floats(0, 0, 0.1, 0.2, 1, 1, 0.9, 0.8), floats(1, 1, scale, scale), shape=IMAGE, mode="linear",
                     coordinate_transformation_mode="tf_crop_and_resize", since=11)
    yield Recipe(DATA, "", floats(1, 1, 1.5), shape={"conv": (1, 16, 16), "matmul": (1, 8, 8)}, mode="linear", since=11)
    yield Recipe(DATA, "", floats(1, 1, 2, 2, 2), shape={"conv": (1, 4, 4, 4, 4), "matmul": (1, 1, 4, 4, 4)}, mode="nearest", since=11)


def pads():
    for mode in ("constant", "edge", "reflect"):
        yield Recipe(DATA, shape=IMAGE, mode=mode, pads=[0, 0, 1, 2, 0, 0, 2, 1], until=10)
        yield Recipe(DATA, ints(0, 0, 1, 2, 0, 0, 2, 1), shape=IMAGE, mode=mode, since=11)
        yield Recipe(DATA, ints(1, 2, 2, 1), "", ints(2, 3), shape=IMAGE, mode=mode, since=18)
        yield Recipe(DATA, ints(1, 1), "", ints(-1), shape=IMAGE, mode=mode, since=18)
    yield Recipe(DATA, ints(1, 1, 1, 1), "", ints(2, 3), shape=IMAGE, mode="wrap", since=19)
    yield Recipe(DATA, ints(0, 0, 1, 1, 0, 0, 1, 1), np.float32(0.5), shape=IMAGE, since=11)
    yield Recipe(DATA, ints(0, 1, 1, 1, 0, 1, 1, 1), shape=IMAGE, since=11)
    yield Recipe(DATA, ints(0, 0, -1, -1, 0, 0, -1, 0), shape=IMAGE, since=11)


def pools(op):
    least = {"kernel_shape": [2, 2], "shape": IMAGE}
    yield Recipe(DATA, **least)
    yield Recipe(DATA, **least, strides=[2, 2])
    yield Recipe(DATA, **least, auto_pad="SAME_UPPER")
    yield Recipe(DATA, kernel_shape=[3, 3], shape=IMAGE, pads=[1, 1, 1, 1])
    yield Recipe(DATA, kernel_shape=[2], shape={"conv": (1, 16, 16), "matmul": (1, 8, 8)})
    yield Recipe(DATA, kernel_shape=[2, 2, 2], shape={"conv": (1, 4, 4, 4, 4), "matmul": (1, 1, 4, 4, 4)})
    dilated = {"MaxPool": 10, "AveragePool": 19, "LpPool": 18}[op]
    yield Recipe(DATA, **least, dilations=[2, 2], since=dilated)
    yield Recipe(DATA, kernel_shape=[3, 3], shape=IMAGE, strides=[2, 2], ceil_mode=1, since={"LpPool": 18}.get(op, 10))
    if op == "AveragePool":
        yield Recipe(DATA, kernel_shape=[3, 3], shape=IMAGE, pads=[1, 1, 1, 1], count_include_pad=1)
    if op == "MaxPool":
        yield Recipe(DATA, **least, outputs=2)
        yield Recipe(DATA, **least, outputs=2, take=1)
        yield Recipe(DATA, **least, storage_order=1, since=8)


def recurrent(gates):
    w, r = noise(1, 8 * gates, 8) * 0.3, noise(1, 8 * gates, 8) * 0.3
    yield Recipe(DATA, w, r, shape=SEQUENCE, hidden_size=8)
    yield Recipe(DATA, w, r, noise(1, 16 * gates) * 0.1, shape=SEQUENCE, hidden_size=8, outputs=2, take=1)


def branch(*outputs):
    """A body that needs no input: it hands out what it captures."""
    def make(data):
        value = [helper.make_tensor_value_info(f"{data}_{o}", FLOAT, None) for o in outputs]
        nodes = [helper.make_node("Relu", [data], [f"{data}_{o}"]) for o in outputs]
        return helper.make_graph(nodes, f"{data}_body", [], value)
    return make


RECIPES = {
    "AffineGrid": [Recipe(lambda dims: noise(dims[0], 2, 3), ints(1, 1, 8, 8), added=True, shape={"conv": (1, 8, 8, 4), "matmul": (1, 8, 8, 1)})],
    "Attention": [Recipe(DATA, DATA, DATA, shape=HEADS), Recipe(DATA, same(noise), same(noise), shape=HEADS, is_causal=1)],
    "BatchNormalization": [Recipe(DATA, channels(noise), channels(noise), channels(noise), lambda d: np.abs(noise(d[1])) + 0.5, shape=IMAGE)],
    "BitCast": [Recipe(DATA, to=INT32, chaotic=True)],
    "BitShift": [Recipe(DATA, np.uint8(1), cast=TensorProto.UINT8, direction="LEFT", domain="positive", chaotic=True)],
    "Cast": [Recipe(DATA, to=FLOAT), Recipe(DATA, to=TensorProto.FLOAT16), Recipe(DATA, to=INT32, domain="large", chaotic=True)],
    "CastLike": [Recipe(DATA, floats(1)), Recipe(DATA, np.array([1], np.float16))],
    "CenterCropPad": [Recipe(DATA, ints(6, 10), shape=IMAGE, axes=[2, 3])],
    "Clip": [Recipe(DATA, until=10, min=0.0, max=6.0), Recipe(DATA, until=10, min=-1.0, max=1.0), Recipe(DATA, np.float32(0), np.float32(6), since=11),
             Recipe(DATA, np.float32(-1), np.float32(1), since=11), Recipe(DATA, np.float32(0), since=11), Recipe(DATA)],
    "Col2Im": [Recipe(DATA, ints(5, 5), ints(2, 2), shape={"conv": (1, 16, 16), "matmul": (1, 4, 16)})],
    "Compress": [Recipe(DATA, lambda d: np.arange(d[1]) % 2 == 0, shape=IMAGE, axis=1)],
    "Concat": [Recipe(DATA, DATA, axis=1), Recipe(DATA, same(noise), axis=-1), Recipe(DATA, axis=0)],
    "Constant": [Recipe(added=True, value=numpy_helper.from_array(floats(0.3)))],
    "ConstantOfShape": [Recipe(ints(1), added=True, value=numpy_helper.from_array(floats(0.3)))],
    "Conv": [Recipe(DATA, lambda d: noise(6, d[1], 1, 1), shape=IMAGE), Recipe(DATA, lambda d: noise(d[1], 1, 3, 3), lambda d: noise(d[1]), shape=IMAGE, group=4,
                                                                                 since=11)],
    "ConvInteger": [Recipe(DATA, lambda d: (noise(4, d[1], 1, 1) * 20).astype(np.int8), cast=TensorProto.UINT8, domain="positive", shape=IMAGE)],
    "ConvTranspose": [Recipe(DATA, lambda d: noise(d[1], 3, 2, 2), shape=IMAGE, strides=[2, 2]), Recipe(DATA, lambda d: noise(d[1], 3, 2, 2), noise(3), shape=IMAGE)],
    "CumProd": [Recipe(DATA, np.int64(1), domain="unit")],
    "CumSum": [Recipe(DATA, np.int64(1)), Recipe(DATA, np.int64(-1), reverse=1)],
    "DFT": [Recipe(DATA, since=17, until=19, axis=1, shape={"conv": (1, 8, 32, 1), "matmul": (1, 8, 8, 1)}),
            Recipe(DATA, "", np.int64(1), since=20, shape={"conv": (1, 8, 32, 1), "matmul": (1, 8, 8, 1)})],
    "DeformConv": [Recipe(DATA, lambda d: noise(4, d[1], 2, 2), lambda d: noise(1, 8, d[2] - 1, d[3] - 1), shape=IMAGE)],
    "DepthToSpace": [Recipe(DATA, shape=IMAGE, blocksize=2), Recipe(DATA, shape=IMAGE, blocksize=2, mode="CRD", since=11)],
    "DequantizeLinear": [Recipe(DATA, np.float32(0.1), cast=TensorProto.UINT8, domain="positive")],
    "Det": [Recipe(DATA, shape={"conv": (1, 64, 2, 2), "matmul": (1, 16, 2, 2)})],
    "Dropout": [Recipe(DATA), Recipe(DATA, np.float32(0.4), since=12), Recipe(DATA, outputs=2)],
    "DynamicQuantizeLinear": [Recipe(DATA, outputs=3, chaotic=True)],
    "Einsum": [Recipe(DATA, equation="...ij->...ji"), Recipe(DATA, last(lambda n: noise(n, 6)), equation="...i,ij->...j"), Recipe(DATA, DATA, equation="...ij,...ij->...i")],
    "Expand": [Recipe(DATA, lambda d: ints(2, *d[1:]) if len(d) > 2 else ints(1, *d))],
    "EyeLike": [Recipe(DATA, shape={"conv": (16, 16), "matmul": (8, 8)}, chaotic=True)],
    "Flatten": [Recipe(DATA), Recipe(DATA, axis=0), Recipe(DATA, axis=-1, since=11)],
    "GRU": list(recurrent(3)),
    "Gather": [Recipe(DATA, ints(2, 0, 1), axis=1), Recipe(DATA, ints(1, 3, 3, 0), axis=-1), Recipe(DATA, np.int64(1), axis=1)],
    "GatherElements": [Recipe(DATA, lambda d: np.zeros(d, np.int64), axis=-1)],
    "GatherND": [Recipe(DATA, ints(0)[None], shape={"conv": (4, 8, 8), "matmul": (4, 4, 4)})],
    "Gelu": [Recipe(DATA), Recipe(DATA, approximate="tanh")],
    "Gemm": [Recipe(DATA, last(lambda n: noise(n, 8)), last(lambda n: noise(8)), shape={"conv": (4, 64), "matmul": None}),
             Recipe(DATA, last(lambda n: noise(8, n)), last(lambda n: noise(8)), shape={"conv": (4, 64), "matmul": None}, transB=1),
             Recipe(DATA, last(lambda n: noise(n, 8)), last(lambda n: noise(8)), shape={"conv": (4, 64), "matmul": None}, alpha=0.5, beta=2.0)],
    "GridSample": [Recipe(DATA, np.clip(noise(1, 5, 5, 2), -1, 1), shape=IMAGE)],
    "GroupNormalization": [Recipe(DATA, channels(noise), channels(noise), shape=IMAGE, num_groups=2)],
    "Identity": plain(),
    "If": [Recipe(np.array(True), wraps={"then_branch": branch("then"), "else_branch": branch("else")})],
    "InstanceNormalization": [Recipe(DATA, channels(noise), channels(noise), shape=IMAGE)],
    "LRN": [Recipe(DATA, shape=IMAGE, size=3)],
    "LSTM": list(recurrent(4)),
    "LayerNormalization": [Recipe(DATA, last(noise)), Recipe(DATA, last(noise), last(noise)), Recipe(DATA, same(lambda *d: noise(*d[1:])), axis=1)],
    "LpNormalization": [Recipe(DATA), Recipe(DATA, axis=1, p=1)],
    "LpPool": list(pools("LpPool")),
    "AveragePool": list(pools("AveragePool")),
    "MaxPool": list(pools("MaxPool")),
    "MatMul": [Recipe(DATA, last(lambda n: noise(n, 8))), Recipe(DATA, lambda d: noise(*d[:-2], d[-1], 6)), Recipe(lambda d: noise(6, d[-2]), DATA)],
    "MatMulInteger": [Recipe(DATA, last(lambda n: (noise(n, 8) * 20).astype(np.int8)), cast=TensorProto.UINT8, domain="positive")],
    "MaxRoiPool": [Recipe(DATA, floats(0, 0, 0, 3, 3).reshape(1, 5), shape=IMAGE, pooled_shape=[2, 2])],
    "Mod": [Recipe(DATA, floats(1), fmod=1, chaotic=True)],
    "NonZero": [Recipe(DATA, domain="positive", chaotic=True)],
    "OneHot": [Recipe(DATA, np.int64(8), floats(0, 1), cast=INT64, domain="positive", shape={"conv": (4, 64), "matmul": None}, chaotic=True)],
    "PRelu": [Recipe(DATA, floats(0.2)), Recipe(DATA, lambda d: noise(*[d[1]] + [1] * (len(d) - 2)))],
    "Pad": list(pads()),
    "Pow": [Recipe(DATA, floats(2)), Recipe(DATA, floats(0.5), domain="positive"), Recipe(DATA, ints(2), since=12)],
    "QLinearConv": [Recipe(DATA, np.float32(0.02), np.uint8(0), lambda d: (noise(4, d[1], 1, 1) * 20).astype(np.int8), np.float32(0.02), np.int8(0), np.float32(0.05),
                           np.uint8(120), cast=TensorProto.UINT8, domain="positive", shape=IMAGE)],
    "QLinearMatMul": [Recipe(DATA, np.float32(0.02), np.uint8(0), last(lambda n: (noise(n, 8) * 20).astype(np.int8)), np.float32(0.02), np.int8(0), np.float32(0.05),
                             np.uint8(120), cast=TensorProto.UINT8, domain="positive")],
    "QuantizeLinear": [Recipe(DATA, np.float32(0.05), np.uint8(128), chaotic=True)],
    "RMSNormalization": [Recipe(DATA, last(noise))],
    "RNN": list(recurrent(1)),
    "Range": [Recipe(np.float32(0), np.float32(4), np.float32(1), added=True, shape=IMAGE)],
    "Resize": list(resizes()),
    "Reshape": [Recipe(DATA, ints(1, -1)), Recipe(DATA, ints(0, 2, -1)), Recipe(DATA, ints(1, 4, 2, -1))],
    "ReverseSequence": [Recipe(DATA, lambda d: np.full(d[1], 2, np.int64), shape=SEQUENCE)],
    "RoiAlign": [Recipe(DATA, floats(0, 0, 3, 3).reshape(1, 4), ints(0), shape=IMAGE, output_height=2, output_width=2)],
    "RotaryEmbedding": [Recipe(DATA, lambda d: noise(1, d[2], d[3] // 2), lambda d: noise(1, d[2], d[3] // 2), shape=HEADS)],
    "ScatterElements": [Recipe(DATA, lambda d: np.zeros((1,) * len(d), np.int64), lambda d: noise(*(1,) * len(d)))],
    "ScatterND": [Recipe(DATA, lambda d: np.zeros((1, len(d)), np.int64), floats(0.5))],
    "Scatter": [Recipe(DATA, lambda d: np.zeros((1,) * len(d), np.int64), lambda d: noise(*(1,) * len(d)))],
    "Shape": [Recipe(DATA)],
    "Slice": [Recipe(DATA, starts=[1], ends=[3], axes=[1], until=9), Recipe(DATA, ints(1), ints(3), ints(1), since=10),
              Recipe(DATA, ints(-1), ints(-9), ints(-1), ints(-2), since=10), Recipe(DATA, ints(0), ints(2), since=10)],
    "SpaceToDepth": [Recipe(DATA, shape=IMAGE, blocksize=2)],
    "Split": [Recipe(DATA, axis=1, split=[2, 2], outputs=2, until=12, shape=IMAGE), Recipe(DATA, ints(1, 3), axis=1, outputs=2, since=13, shape=IMAGE),
              Recipe(DATA, axis=-1, outputs=2, num_outputs=2, since=18), Recipe(DATA, axis=1, outputs=2, until=17, shape=IMAGE)],
    "Squeeze": [Recipe(DATA, axes=[0], until=12, shape=IMAGE), Recipe(DATA, ints(0), since=13, shape=IMAGE), Recipe(DATA, shape=IMAGE)],
    "STFT": [Recipe(DATA, np.int64(8), noise(16), shape={"conv": (1, 256, 1), "matmul": (1, 64, 1)})],
    "SwiGLU": [Recipe(DATA)],
    "TensorScatter": [Recipe(DATA, lambda d: noise(*d[:2], 1, d[3]), shape=HEADS)],
    "Tile": [Recipe(DATA, lambda d: ints(*[1] * (len(d) - 1), 2))],
    "TopK": [Recipe(DATA, ints(3), outputs=2, since=10), Recipe(DATA, ints(3), outputs=2, take=1, since=10, chaotic=True)],
    "Transpose": [Recipe(DATA), Recipe(DATA, perm=[0, 2, 3, 1], shape=IMAGE)],
    "Trilu": [Recipe(DATA), Recipe(DATA, np.int64(1), upper=0)],
    "Unsqueeze": [Recipe(DATA, axes=[0], until=12), Recipe(DATA, ints(0), since=13), Recipe(DATA, ints(-1), since=13)],
    "Upsample": [Recipe(DATA, scales=[1.0, 1.0, 2.0, 2.0], shape=IMAGE, until=8), Recipe(DATA, floats(1, 1, 2, 2), shape=IMAGE, since=9)],
    "Where": [Recipe(lambda d: np.arange(d[-1]) % 2 == 0, DATA, same(noise)), Recipe(lambda d: np.arange(d[-1]) % 2 == 0, DATA, floats(0))],
}
RECIPES |= {op: reduction() for op in ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSumSquare", "ReduceLogSumExp")}
RECIPES["ReduceProd"] = [r for r in reduction() if "axes" in r.attributes or len(r.inputs) > 1]
RECIPES["ReduceLogSum"] = reduction(domain="positive")
RECIPES["ReduceSum"] = [Recipe(DATA, axes=[1], until=12), Recipe(DATA, ints(1), since=13), Recipe(DATA, ints(-1), since=13, keepdims=0), Recipe(DATA)]
RECIPES |= {op: binary() for op in ("Add", "Mul", "Sub", "Max", "Min", "Mean", "Sum")}
RECIPES["Div"] = [Recipe(DATA, floats(0.7)), Recipe(same(noise), DATA, domain="positive")]
RECIPES |= {op: comparison() for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")}
RECIPES |= {op: [Recipe(DATA, DATA, cast=BOOL, chaotic=True)] for op in ("And", "Or", "Xor")}
RECIPES |= {op: [Recipe(DATA, DATA, cast=INT32, domain="large", chaotic=True)] for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")}
RECIPES |= {"BitwiseNot": plain(cast=INT32, domain="large", chaotic=True), "Not": plain(cast=BOOL, chaotic=True), "Size": plain()}
RECIPES |= {op: plain(domain="positive") for op in ("Log", "Sqrt", "Acosh", "Reciprocal")}
RECIPES |= {op: plain(domain="unit") for op in ("Acos", "Asin", "Atanh", "Tan")}
RECIPES |= {op: [Recipe(DATA, axis=1), Recipe(DATA, axis=-1)] for op in ("Softmax", "LogSoftmax")}
RECIPES |= {op: [Recipe(DATA, axis=1, chaotic=True)] for op in ("Hardmax", "ArgMax", "ArgMin")}
RECIPES |= {op: plain(chaotic=True) for op in ("Ceil", "Floor", "Round", "Sign", "IsInf", "IsNaN", "Shrink")}
RECIPES |= {op: plain(shape=IMAGE) for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "MeanVarianceNormalization")}
RECIPES |= {op: plain() for op in ("Abs", "Asinh", "Atan", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish",
                                   "Neg", "Relu", "Selu", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu")}
RECIPES["LeakyRelu"] = [Recipe(DATA), Recipe(DATA, alpha=0.2)]
RECIPES |= {op: [Recipe(np.int64(4), added=True, shape=IMAGE)] for op in ("BlackmanWindow", "HammingWindow", "HannWindow")}
# Operators that have no place between two products, and why.
LEFT_OUT = dict.fromkeys(["Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"], "another result at each run")
LEFT_OUT |= dict.fromkeys(["ImageDecoder", "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"], "no float result")
LEFT_OUT |= dict.fromkeys(["ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
                           "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence"], "sequences")
LEFT_OUT |= dict.fromkeys(["Loop", "Scan", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "NonMaxSuppression", "Unique", "MaxUnpool", "MelWeightMatrix"],
                          "needs more than one recipe line says")
LEFT_OUT |= dict.fromkeys(["CausalConvWithState", "LinearAttention", "SwiGLU"], "newer than onnxruntime")


class Sandwich:
    """Nodes and constants of an operator between two Convs or MatMuls; every name begins with its own."""

    def __init__(self, op, opset, number, bread):
        self.op, self.opset, self.bread = op, opset, bread
        self.recipe = RECIPES[op][number]
        self.name = f"{op}_{opset}_{number}_{bread}"
        self.seed = [opset, number, *op.encode()]
        self.middle = None

    def parts(self, middle):
        """Nodes and constants; `middle` is the shape of the operator's result, where it is known."""
        rng = np.random.default_rng(self.seed)
        nodes, constants, recipe = [], [], self.recipe

        def add(op, inputs, count=1, **attributes):
            outputs = [f"{self.name}_{len(nodes)}_{i}" for i in range(count)]
            nodes.append(helper.make_node(op, inputs, outputs, name=f"{self.name}_{op}{len(nodes)}", **attributes))
            return outputs

        def store(array):
            constants.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), f"{self.name}_c{len(constants)}"))
            return constants[-1].name

        def weight(*shape):
            return store((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

        spread, offset = {"any": (1.5, 0), "positive": (0.3, 3), "unit": (0.2, 0), "large": (20, 0)}[recipe.domain]
        if self.bread == "conv":
            shape = (1, 4, 8, 8)
            first = store((rng.standard_normal((4, 4, 3, 3)) / 6 * spread).astype(np.float32))
            at = add("Conv", ["image", first, store(np.full(4, offset, np.float32))], pads=[1, 1, 1, 1])[0]
        else:
            shape = (4, 16)
            at = add("MatMul", ["rows", store((rng.standard_normal((16, 16)) / 4 * spread).astype(np.float32))])[0]
            if offset:
                at = add("Add", [at, store(np.full(16, offset, np.float32))])[0]
        wanted = recipe.shape and recipe.shape[self.bread]
        if wanted:
            at, shape = add("Reshape", [at, store(ints(*wanted))])[0], wanted
        if recipe.cast:
            at = add("Cast", [at], to=recipe.cast)[0]
        inputs = [at if i is DATA else i if isinstance(i, str) else store(i(shape) if callable(i) else i) for i in recipe.inputs]
        attributes = dict(recipe.attributes)
        for key, make in (recipe.wraps or {}).items():
            attributes[key] = make(at)
        result = add(self.op, inputs, recipe.outputs, **attributes)[recipe.take]
        if recipe.added:
            result = add("Add", [at, result])[0]
        if middle is None:
            return nodes, constants, result
        dims, kind = middle
        if kind != np.float32:
            result = add("Cast", [result], to=FLOAT)[0]
        if self.bread == "conv":
            if len(dims) < 3:
                dims = (1, 1, int(np.prod(dims)))
                result = add("Reshape", [result, store(ints(*dims))])[0]
            kernel = [3 if d > 4 else 1 for d in dims[2:]]
            result = add("Conv", [result, weight(4, dims[1], *kernel)])[0]
        else:
            if len(dims) < 2:
                dims = (1, int(np.prod(dims)))
                result = add("Reshape", [result, store(ints(*dims))])[0]
            result = add("MatMul", [result, store((rng.standard_normal((dims[-1], 8)) / np.sqrt(dims[-1])).astype(np.float32))])[0]
        nodes[-1].output[0] = self.name
        return nodes, constants, self.name


def model_of(sandwiches):
    nodes, constants, results = [], [], []
    for sandwich in sandwiches:
        more, stored, result = sandwich.parts(sandwich.middle)
        nodes += more
        constants += stored
        # onnxruntime finds out the type of a result in the middle.
        results.append(helper.make_tensor_value_info(result, FLOAT, None) if sandwich.middle else onnx.ValueInfoProto(name=result))
    breads = {s.bread for s in sandwiches}
    inputs = [helper.make_tensor_value_info("image", FLOAT, [1, 4, 8, 8])] * ("conv" in breads)
    inputs += [helper.make_tensor_value_info("rows", FLOAT, [4, 16])] * ("matmul" in breads)
    graph = helper.make_graph(nodes, "sandwiches", inputs, results, constants)
    opset = sandwiches[0].opset
    version = max(v for o, v in IR.items() if o <= max(opset, 8))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)


def session(model, optimized=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, samples):
    names = {i.name for i in session.get_inputs()}
    runs = [session.run(None, {k: v[i] for k, v in samples.items() if k in names}) for i in range(SAMPLES)]
    return {o.name: [r[at] for r in runs] for at, o in enumerate(session.get_outputs())}


def sqnr(float_runs, found):
    noise = sum(np.square(a.astype("f8") - b).sum() for a, b in zip(float_runs, found))
    signal = sum(np.square(a.astype("f8")).sum() for a in float_runs)
    return 10 * np.log10(signal / noise) if noise > 0 else np.inf


def all_sandwiches(samples, only, oldest):
    """Those that onnxruntime runs in float, and how many it does not."""
    found, refused, missing = [], Counter(), []
    history = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and not schema.deprecated and schema.since_version <= NEWEST:
            history.setdefault(schema.name, set()).add(max(schema.since_version, 7))
    for op, versions in sorted(history.items()):
        if only and op not in only or op in LEFT_OUT:
            continue
        if op not in RECIPES:
            missing.append(op)
            continue
        versions = {v for v in versions if v >= oldest} | {max(min(versions), oldest)}
        for opset in sorted(versions):
            for number, recipe in enumerate(RECIPES[op]):
                if not recipe.since <= opset <= recipe.until:
                    continue
                for bread in ("conv", "matmul"):
                    sandwich = Sandwich(op, opset, number, bread)
                    try:
                        runs = run(session(model_of([sandwich]).SerializeToString()), samples)
                        first = next(iter(runs.values()))[0]
                        if first.size == 0 or any(r.shape != first.shape for r in next(iter(runs.values()))):
                            raise ValueError("its shape depends on values")
                        sandwich.middle = (first.shape, first.dtype.type)
                        float_runs = run(session(model_of([sandwich]).SerializeToString()), samples)
                        sandwich.float = float_runs[sandwich.name]
                        if not all(np.isfinite(r).all() for r in sandwich.float):
                            raise ValueError("its result is not finite")
                        found.append(sandwich)
                    except Exception as error:  # noqa: BLE001 - onnxruntime has its own reasons
                        refused[f"{op}: {str(error)[:140]}"] += 1
    return found, refused, missing


class Bench:
    def __init__(self, amax, target, samples, folder):
        self.amax, self.target, self.samples, self.folder = amax, target, samples, folder
        self.passed, self.failures, self.unrun = 0, [], []

    def judge(self, sandwiches):
        """Rewrites sandwiches side by side; those that fail are looked at in halves."""
        opset = sandwiches[0].opset
        path, out, report = (self.folder / f"{n}.onnx" for n in ("float", "quantized", "report"))
        onnx.save(model_of(sandwiches), path)
        calib = self.folder / "samples.npz"
        breads = {"conv": "image", "matmul": "rows"}
        np.savez(calib, **{breads[b]: self.samples[breads[b]] for b in {s.bread for s in sandwiches}})
        command = [self.amax, "rewrite", path, out, "--calib", calib, "--target", self.target, "--report", report, "--no-guard", "-q"]
        done = subprocess.run(command, capture_output=True, text=True)
        alone = len(sandwiches) == 1
        name = f"{self.target}: {sandwiches[0].name}"
        if done.returncode != 0:
            if not alone:
                return self.halves(sandwiches)
            said = " | ".join(done.stderr.strip().splitlines()[:2])
            # Exit code 5: the runtime that calibrates has no such operator, and says so.
            return (self.unrun if done.returncode == 5 else self.failures).append(f"{name}: exit code {done.returncode}: {said}")
        try:
            found = None
            if self.target.startswith("ort-cpu"):
                found = run(session(str(out)), self.samples)
            if self.target not in EXECUTED:
                found = run(session(str(out), optimized=False), self.samples)
        except Exception as error:  # noqa: BLE001 - onnxruntime refusing the file is what is looked for
            if not alone:
                return self.halves(sandwiches)
            return self.failures.append(f"{name}: onnxruntime refuses it: {str(error)[:300]}")
        rows = {row["output"]: row for row in json.loads(report.read_text())["quality"]}
        for sandwich in sandwiches:
            deployed, reported = sqnr(sandwich.float, found[sandwich.name]), rows[sandwich.name]["sqnr_db"]
            reported = np.inf if reported is None else reported
            gap = min(reported, CEILING_DB) - min(deployed, CEILING_DB)
            if abs(gap) > LARGEST_GAP_DB and not sandwich.recipe.chaotic:
                self.failures.append(f"{self.target}: {sandwich.name}: {reported:.1f} dB reported, {deployed:.1f} dB deployed")
            else:
                self.passed += 1

    def halves(self, sandwiches):
        middle = len(sandwiches) // 2
        self.judge(sandwiches[:middle])
        self.judge(sandwiches[middle:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("amax", nargs="?", default=os.environ.get("AMAX") or ROOT / "target/debug/amax")
    parser.add_argument("--all", action="store_true", help="every target, and opsets from 7 on")
    parser.add_argument("--target", help="one target")
    parser.add_argument("--only", action="append", metavar="OPERATOR")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(3)
    samples = {"image": rng.standard_normal((SAMPLES, 1, 4, 8, 8)).astype(np.float32),
               "rows": rng.standard_normal((SAMPLES, 4, 16)).astype(np.float32)}
    sandwiches, refused, missing = all_sandwiches(samples, args.only, 7 if args.all else 13)
    passed, failures, unrun = 0, [f"no recipe for {op}" for op in missing], []
    targets = [args.target] if args.target else TARGETS if args.all else TARGETS[:1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for target in targets:
            bench = Bench(str(args.amax), target, samples, folder)
            newest = 23 if target == "tensorrt" else NEWEST
            for opset in sorted({s.opset for s in sandwiches if s.opset <= newest}):
                alike = [s for s in sandwiches if s.opset == opset]
                for at in range(0, len(alike), TOGETHER):
                    bench.judge(alike[at:at + TOGETHER])
            passed += bench.passed
            failures += bench.failures
            unrun += bench.unrun
    if args.verbose:
        for line in [*refused, *unrun]:
            print(f"not run: {line}")
    for line in failures:
        print(f"FAILED {line}")
    print(f"{len(sandwiches)} sandwiches of {len({s.op for s in sandwiches})} operators; onnxruntime does not run {refused.total()} in float; "
          f"{len(LEFT_OUT)} operators are left out, and {len(unrun)} are beyond the runtime that calibrates")
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
