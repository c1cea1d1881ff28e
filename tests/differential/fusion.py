#!/usr/bin/env python3
"""Quantizes many small graphs and looks at what onnxruntime makes of each.

    python3 tests/differential/fusion.py [PATTERN...] [--target NAME] [--bless] [--keep DIR] [--verbose]

A PATTERN selects cases whose name contains it. Every case is rewritten for each target, with and without the guard, and
must load, pass onnx.checker and stay close to the float model. For the ort-cpu targets no Conv, Gemm or MatMul behind a
DequantizeLinear may stay float, no quantizer may stand between two operators that have integer kernels, and fusions must
give the same numbers as the file. For ort-cpu without the guard, the operators of the optimized graph must be those of fusion.json, which --bless writes.
The binary is $AMAX, else target/debug/amax. Closes with the line "N passed, N failed".
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run import enter_environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGETS = ["ort-cpu", "ort-cpu-vnni", "generic", "tensorrt"]
SAMPLES = 16

if __name__ == "__main__":
    enter_environment()

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from evaluate import HEAVY, INTEGER, check, load_samples, session  # noqa: E402


class Graph:
    """A model while it grows; weights and samples are random, but the same each time."""

    def __init__(self, opset=17, dtype=np.float32, named=True):
        self.opset, self.dtype, self.named = opset, dtype, named
        self.rng = np.random.default_rng(7)
        self.nodes, self.inputs, self.outputs, self.initializers, self.samples = [], [], [], [], {}
        self.functions, self.count = [], 0
        self.floor_db, self.domains = 25, []
        self.float_allowed, self.options = False, []

    def fresh(self, stem):
        self.count += 1
        return f"{stem}{self.count}"

    def input(self, shape, low=None, high=None, values=None):
        name = self.fresh("x")
        full = [SAMPLES, *shape]
        if values is not None:
            data = values(self.rng, full)
        elif low is not None:
            data = self.rng.uniform(low, high, full)
        else:
            data = np.clip(self.rng.standard_normal(full), -3.5, 3.5)
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, element, list(shape)))
        self.samples[name] = data.astype(self.dtype)
        return name

    def integers(self, shape, high):
        name = self.fresh("ids")
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, list(shape)))
        self.samples[name] = self.rng.integers(0, high, [SAMPLES, *shape])
        return name

    def constant(self, array, node=False):
        name = self.fresh("w")
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        if node:
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"const_{name}", value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def weight(self, *shape, scale=None, node=False):
        fan = np.prod(shape[1:]) if len(shape) > 1 else 1
        array = self.rng.standard_normal(shape) * (scale or 1 / np.sqrt(max(fan, 1)))
        return self.constant(array.astype(self.dtype), node)

    def scalar(self, value, dtype=None):
        return self.constant(np.array(value, dtype or self.dtype))

    def ints(self, *values):
        return self.constant(np.array(values, np.int64))

    def op(self, op, *inputs, outputs=1, domain="", name=None, **attributes):
        made = [self.fresh("t") for _ in range(outputs)]
        label = name if name is not None else (f"{op}_{self.count}" if self.named else "")
        self.nodes.append(helper.make_node(op, list(inputs), made, name=label, domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def conv(self, x, inputs, outputs, kernel=3, dims=2, group=1, bias=True, **attributes):
        weight = self.weight(outputs, inputs // group, *[kernel] * dims)
        args = [x, weight] + ([self.weight(outputs, scale=0.1)] if bias else [])
        attributes.setdefault("pads", [kernel // 2] * 2 * dims)
        return self.op("Conv", *args, kernel_shape=[kernel] * dims, group=group, **attributes)

    def clip(self, x, low, high):
        if self.opset < 11:
            bounds = {key: value for key, value in (("min", low), ("max", high)) if value is not None}
            return self.op("Clip", x, **bounds)
        args = ["" if low is None else self.scalar(low), "" if high is None else self.scalar(high)]
        return self.op("Clip", x, *args[:2 if high is not None else 1])

    def output(self, *names, element=None):
        element = element or helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.outputs += [helper.make_tensor_value_info(name, element, None) for name in names]

    def model(self):
        graph = helper.make_graph(self.nodes, "case", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset)] + [helper.make_opsetid(d, 1) for d in self.domains]
        return helper.make_model(graph, opset_imports=opsets, functions=self.functions,
                                 ir_version=8 if self.opset < 19 else 10)


CASES = {}


def case(name, **graph):
    def add(build):
        def make():
            g = Graph(**graph)
            build(g)
            return g
        assert name not in CASES, name
        CASES[name] = make
        return build
    return add


IMAGE = (1, 8, 10, 10)

# ---- convolutions
for dims in (1, 2, 3):
    for group, label in ((1, ""), (2, "_group"), (8, "_depthwise")):
        for bias in (True, False):
            @case(f"conv{dims}d{label}{'' if bias else '_nobias'}")
            def _(g, dims=dims, group=group, bias=bias):
                x = g.input((1, 8) + (6,) * dims)
                g.output(g.conv(x, 8, 8, dims=dims, group=group, bias=bias))

for opset in (7, 9, 11, 12, 13, 16, 18, 19, 21, 22, 23):
    @case(f"conv_relu_conv_opset{opset}", opset=opset)
    def _(g):
        g.output(g.conv(g.op("Relu", g.conv(g.input(IMAGE), 8, 8)), 8, 8))


def activated(name, function, **options):
    @case(f"conv_{name}_conv", **options)
    def _(g):
        g.float_allowed = name == "clip_max"
        g.output(g.conv(function(g, g.conv(g.input(IMAGE), 8, 8)), 8, 8))

    @case(f"conv_{name}_end", **options)
    def _(g):
        g.output(function(g, g.conv(g.input(IMAGE), 8, 8)))


activated("relu", lambda g, c: g.op("Relu", c))
activated("relu6", lambda g, c: g.clip(c, 0, 6))
activated("clip_half", lambda g, c: g.clip(c, 0, 0.5))
activated("relu6_opset9", lambda g, c: g.clip(c, 0.0, 6.0), opset=9)
activated("clip_symmetric", lambda g, c: g.clip(c, -1, 1))
activated("clip_max", lambda g, c: g.clip(c, None, 0.5))
activated("clip_low", lambda g, c: g.clip(c, 0, None))
activated("clip_above_zero", lambda g, c: g.clip(c, 0.25, 1))
activated("leaky", lambda g, c: g.op("LeakyRelu", c, alpha=0.1))
activated("sigmoid", lambda g, c: g.op("Sigmoid", c))
activated("tanh", lambda g, c: g.op("Tanh", c))
activated("hardswish", lambda g, c: g.op("HardSwish", c))
activated("hardsigmoid", lambda g, c: g.op("HardSigmoid", c, alpha=0.2, beta=0.5))
activated("silu", lambda g, c: g.op("Mul", c, g.op("Sigmoid", c)))
activated("gelu", lambda g, c: g.op("Gelu", c), opset=20)
activated("prelu", lambda g, c: g.op("PRelu", c, g.weight(8, 1, 1)))
activated("relu_relu", lambda g, c: g.op("Relu", g.op("Relu", c)))
activated("softmax", lambda g, c: g.op("Softmax", c, axis=1))


def gelu_parts(g, c):
    erf = g.op("Erf", g.op("Div", c, g.scalar(2 ** 0.5)))
    return g.op("Mul", g.op("Mul", c, g.op("Add", erf, g.scalar(1))), g.scalar(0.5))


activated("gelu_parts", gelu_parts)


def hardswish_parts(g, c):
    return g.op("Mul", c, g.op("Div", g.clip(g.op("Add", c, g.scalar(3)), 0, 6), g.scalar(6)))


activated("hardswish_parts", hardswish_parts)


@case("conv_relu_and_other")
def _(g):
    g.float_allowed = True
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("Relu", c), 8, 8), g.op("Tanh", c))


@case("conv_relu_and_conv")
def _(g):
    g.float_allowed = True
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("Relu", c), 8, 8), g.conv(c, 8, 8))


@case("conv_output_twice")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(c, g.conv(c, 8, 8))


@case("conv_relu_output_and_conv")
def _(g):
    c = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    g.output(c, g.conv(c, 8, 8))


@case("conv_preact_output_relu_conv")
def _(g):
    g.float_allowed = True
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(c, g.conv(g.op("Relu", c), 8, 8))


@case("conv_shared_weight")
def _(g):
    x, w = g.input(IMAGE), g.weight(8, 8, 3, 3)
    a = g.op("Conv", x, w, pads=[1] * 4)
    g.output(g.op("Conv", g.op("Relu", a), w, pads=[1] * 4))


@case("conv_shared_weight_and_bias")
def _(g):
    x, w, b = g.input(IMAGE), g.weight(8, 8, 3, 3), g.weight(8)
    a = g.op("Conv", x, w, b, pads=[1] * 4)
    g.output(g.op("Conv", g.op("Relu", a), w, b, pads=[1] * 4))


@case("conv_weight_also_read_in_float")
def _(g):
    w = g.weight(8, 8, 1, 1)
    c = g.op("Conv", g.input(IMAGE), w)
    g.output(c, g.op("Exp", w))


@case("conv_weight_is_output")
def _(g):
    w = g.weight(8, 8, 1, 1)
    g.output(g.op("Conv", g.input(IMAGE), w), w)


@case("conv_weight_constant_nodes")
def _(g):
    w, b = g.weight(8, 8, 3, 3, node=True), g.weight(8, node=True)
    g.output(g.op("Conv", g.input(IMAGE), w, b))


@case("conv_empty_bias_name")
def _(g):
    g.output(g.op("Conv", g.input(IMAGE), g.weight(8, 8, 3, 3), ""))


@case("conv_anonymous", named=False)
def _(g):
    x = g.input(IMAGE)
    g.output(g.conv(g.op("Relu", g.conv(g.op("Relu", g.conv(x, 8, 8)), 8, 8)), 8, 8))


@case("conv_batchnorm_relu")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    scale, mean = g.weight(8, scale=1), g.weight(8, scale=0.1)
    g.output(g.op("Relu", g.op("BatchNormalization", c, scale, g.weight(8, scale=0.1), mean,
                               g.constant(np.linspace(0.5, 2, 8, dtype=np.float32)))))


@case("conv_auto_pad")
def _(g):
    g.output(g.op("Conv", g.input(IMAGE), g.weight(8, 8, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]))


@case("conv_dynamic_weight")
def _(g):
    x = g.input(IMAGE)
    g.output(g.conv(g.op("Conv", x, g.input((8, 8, 3, 3))), 8, 8))


@case("conv_transpose")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("ConvTranspose", c, g.weight(8, 8, 2, 2), strides=[2, 2]), 8, 8))


@case("conv_transpose_group")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("ConvTranspose", c, g.weight(8, 4, 2, 2), group=2, strides=[2, 2]), 8, 8))


@case("pad_conv")
def _(g):
    x = g.input(IMAGE)
    p = g.op("Pad", x, g.ints(0, 0, 1, 1, 0, 0, 1, 1))
    g.output(g.conv(p, 8, 8, pads=[0] * 4))


@case("conv_pad_conv")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    p = g.op("Pad", x, g.ints(0, 0, 1, 1, 0, 0, 1, 1))
    g.output(g.conv(p, 8, 8, pads=[0] * 4))


@case("input_to_two_convs")
def _(g):
    x = g.input(IMAGE)
    g.output(g.conv(x, 8, 8), g.conv(x, 8, 8, kernel=1))


@case("input_to_conv_and_float")
def _(g):
    x = g.input(IMAGE)
    g.output(g.conv(x, 8, 8), g.op("Exp", x))


@case("input_is_output")
def _(g):
    x = g.input(IMAGE)
    g.output(g.conv(x, 8, 8), x)


# ---- residuals, squeeze and excitation
@case("residual_identity")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    y = g.conv(g.op("Relu", g.conv(x, 8, 8)), 8, 8)
    g.output(g.conv(g.op("Relu", g.op("Add", y, x)), 8, 8))


@case("residual_downsample")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    y = g.conv(g.op("Relu", g.conv(x, 8, 8, strides=[2, 2])), 8, 8)
    s = g.conv(x, 8, 8, kernel=1, strides=[2, 2])
    g.output(g.conv(g.op("Relu", g.op("Add", y, s)), 8, 8))


@case("residual_end")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    g.output(g.op("Relu", g.op("Add", g.conv(x, 8, 8), x)))


@case("residual_of_input")
def _(g):
    x = g.input(IMAGE)
    g.output(g.op("Add", g.conv(x, 8, 8), x))


@case("residual_linear_bottleneck")
def _(g):
    x = g.conv(g.input(IMAGE), 8, 8)
    for _ in range(2):
        y = g.clip(g.conv(x, 8, 16, kernel=1), 0, 6)
        y = g.clip(g.conv(y, 16, 16, group=16), 0, 6)
        x = g.op("Add", x, g.conv(y, 16, 8, kernel=1))
    g.output(x)


@case("add_same_twice")
def _(g):
    x = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("Add", x, x), 8, 8))


@case("add_float_branch")
def _(g):
    x = g.input(IMAGE)
    c = g.conv(x, 8, 8)
    g.output(g.conv(g.op("Add", c, g.op("Tanh", x)), 8, 8))


@case("add_constant")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("Add", c, g.weight(1, 8, 1, 1)), 8, 8))


@case("mul_scalar")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("Mul", c, g.scalar(0.3)), 8, 8))


@case("sub_div")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    g.output(g.conv(g.op("Div", g.op("Sub", c, g.scalar(0.5)), g.scalar(0.5)), 8, 8))


for gate in ("Sigmoid", "HardSigmoid"):
    @case(f"se_{gate.lower()}")
    def _(g, gate=gate):
        x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
        s = g.op("GlobalAveragePool", x)
        s = g.op("Relu", g.conv(s, 8, 4, kernel=1))
        s = g.op(gate, g.conv(s, 4, 8, kernel=1))
        g.output(g.conv(g.op("Mul", x, s), 8, 8))


@case("se_reducemean")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    s = g.op("ReduceMean", x, axes=[2, 3], keepdims=1)
    s = g.op("Sigmoid", g.conv(g.op("Relu", g.conv(s, 8, 4, kernel=1)), 4, 8, kernel=1))
    g.output(g.conv(g.op("Mul", x, s), 8, 8))


# ---- concatenations, pools, things that move codes
@case("concat")
def _(g):
    x = g.input(IMAGE)
    c = g.op("Concat", g.op("Relu", g.conv(x, 8, 8)), g.conv(x, 8, 4), axis=1)
    g.output(g.conv(c, 12, 8))


@case("concat_float_branch")
def _(g):
    x = g.input(IMAGE)
    c = g.op("Concat", g.op("Relu", g.conv(x, 8, 8)), g.op("Tanh", x), axis=1)
    g.output(g.conv(c, 16, 8))


@case("concat_with_input")
def _(g):
    x = g.input(IMAGE)
    c = g.op("Concat", g.op("Relu", g.conv(x, 8, 8)), x, axis=1)
    g.output(g.conv(c, 16, 8))


@case("concat_end")
def _(g):
    x = g.input(IMAGE)
    g.output(g.op("Concat", g.op("Relu", g.conv(x, 8, 8)), g.conv(x, 8, 4), axis=1))


@case("densenet")
def _(g):
    x = g.conv(g.input(IMAGE), 8, 8)
    for i in range(3):
        y = g.op("Relu", g.conv(x, 8 + 4 * i, 4))
        x = g.op("Concat", x, y, axis=1)
    g.output(g.conv(x, 20, 4))


def between(name, function, channels=8, **options):
    @case(f"between_{name}", **options)
    def _(g):
        g.float_allowed = name == "resize_linear"
        x = function(g, g.op("Relu", g.conv(g.input(IMAGE), 8, 8)))
        g.output(g.conv(x, channels, 8))


between("maxpool", lambda g, x: g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
between("maxpool_opset11", lambda g, x: g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), opset=11)
between("averagepool", lambda g, x: g.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]))
between("averagepool_pad", lambda g, x: g.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4))
between("averagepool_count_pad", lambda g, x: g.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1))
between("averagepool_ceil", lambda g, x: g.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1))
between("globalpool", lambda g, x: g.op("GlobalAveragePool", x))
between("globalmaxpool", lambda g, x: g.op("GlobalMaxPool", x))
between("resize_nearest", lambda g, x: g.op("Resize", x, "", g.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest"))
between("resize_nearest_sizes", lambda g, x: g.op("Resize", x, "", "", g.ints(1, 8, 15, 15), mode="nearest"))
between("resize_linear", lambda g, x: g.op("Resize", x, "", g.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear"))
between("transpose", lambda g, x: g.op("Transpose", x, perm=[0, 1, 3, 2]))
between("reshape", lambda g, x: g.op("Reshape", x, g.ints(1, 8, 20, 5)))
between("squeeze", lambda g, x: g.op("Unsqueeze", g.op("Squeeze", x, g.ints(0)), g.ints(0)))
between("slice", lambda g, x: g.op("Slice", x, g.ints(1), g.ints(9), g.ints(3)))
between("slice_opset9", lambda g, x: g.op("Slice", x, starts=[1], ends=[9], axes=[3]), opset=9)
between("split", lambda g, x: g.op("Concat", *reversed(g.op("Split", x, outputs=2, axis=1)), axis=1))
between("split_sizes", lambda g, x: g.op("Concat", *reversed(g.op("Split", x, g.ints(3, 5), outputs=2, axis=1)), axis=1))
between("split_one_float", lambda g, x: (lambda p: g.op("Concat", p[0], g.op("Tanh", p[1]), axis=1))(g.op("Split", x, outputs=2, axis=1)))
between("depth_to_space", lambda g, x: g.op("DepthToSpace", x, blocksize=2), channels=2)
between("space_to_depth", lambda g, x: g.op("SpaceToDepth", x, blocksize=2), channels=32)
between("maxpool_transpose", lambda g, x: g.op("Transpose", g.op("MaxPool", x, kernel_shape=[2, 2]), perm=[0, 1, 3, 2]))
between("shuffle", lambda g, x: g.op("Reshape", g.op("Transpose", g.op("Reshape", x, g.ints(1, 2, 4, 10, 10)), perm=[0, 2, 1, 3, 4]), g.ints(1, 8, 10, 10)))
between("gather", lambda g, x: g.op("Gather", x, g.ints(3, 1, 2, 0, 7, 5, 6, 4), axis=1))
between("expand", lambda g, x: g.op("Expand", x, g.ints(1, 8, 10, 10)))
between("where", lambda g, x: g.op("Where", g.constant(np.arange(10) % 2 == 0), x, g.scalar(0.0)))
between("dropout_identity", lambda g, x: g.op("Identity", x))
between("cast", lambda g, x: g.op("Cast", x, to=TensorProto.FLOAT))
between("max", lambda g, x: g.op("Max", x, g.scalar(0.2)))
between("reducemax", lambda g, x: g.op("ReduceMax", x, axes=[3], keepdims=1))
between("lrn", lambda g, x: g.op("LRN", x, size=3))
between("instancenorm", lambda g, x: g.op("InstanceNormalization", x, g.weight(8, scale=1), g.weight(8)))
between("concat_maxpool_spp", lambda g, x: g.op("Concat", x, *[g.op("MaxPool", x, kernel_shape=[k, k], pads=[k // 2] * 4) for k in (3, 5)], axis=1), channels=24)
between("resize_add", lambda g, x: g.op("Add", g.op("Resize", g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), "", g.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest"), x))


@case("maxpool_indices")
def _(g):
    g.float_allowed = True
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    y, i = g.op("MaxPool", x, kernel_shape=[2, 2], outputs=2)
    g.output(g.conv(y, 8, 8))
    g.output(i, element=TensorProto.INT64)


@case("input_maxpool_conv")
def _(g):
    g.output(g.conv(g.op("MaxPool", g.input(IMAGE), kernel_shape=[2, 2]), 8, 8))


@case("input_transpose_conv")
def _(g):
    g.output(g.conv(g.op("Transpose", g.input((1, 10, 10, 8)), perm=[0, 3, 1, 2]), 8, 8))


@case("conv_transpose_output")
def _(g):
    g.output(g.op("Transpose", g.conv(g.input(IMAGE), 8, 8), perm=[0, 2, 3, 1]))


@case("cnn_classifier")
def _(g):
    x = g.op("MaxPool", g.op("Relu", g.conv(g.input(IMAGE), 8, 8)), kernel_shape=[2, 2], strides=[2, 2])
    x = g.op("GlobalAveragePool", g.op("Relu", g.conv(x, 8, 16)))
    x = g.op("Gemm", g.op("Flatten", x), g.weight(10, 16), g.weight(10, scale=0.1), transB=1)
    g.output(g.op("Softmax", x))


@case("split_branch_in_float")
def _(g):
    c = g.conv(g.input(IMAGE), 8, 8)
    a, b = g.op("Split", c, outputs=2, axis=1)
    g.output(g.conv(a, 4, 8), g.op("Exp", b))


@case("slice_two_readers")
def _(g):
    c = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    g.output(g.conv(g.op("Slice", c, g.ints(0), g.ints(4), g.ints(1)), 4, 4), g.op("Tanh", c))


# ---- products
ROWS = (4, 16)
for name, options in {
    "plain": {}, "transb": {"transB": 1}, "alpha": {"alpha": 0.5}, "alpha_transb": {"alpha": 0.5, "transB": 1},
    "beta": {"beta": 0.5}, "transa": {"transA": 1},
}.items():
    for bias in ("vector", "row", "scalar", "none", "matrix", "one"):
        @case(f"gemm_{name}_bias_{bias}")
        def _(g, options=options, bias=bias):
            x = g.input((16, 4) if "transA" in options else ROWS)
            w = g.weight(12, 16) if "transB" in options else g.weight(16, 12, scale=0.25)
            shapes = {"vector": [12], "row": [1, 12], "scalar": [], "matrix": [4, 12], "one": [1]}
            b = [g.weight(*shapes[bias], scale=0.1)] if bias != "none" else []
            g.output(g.op("Gemm", x, w, *b, **options))


@case("gemm_relu_gemm")
def _(g):
    h = g.op("Relu", g.op("Gemm", g.input(ROWS), g.weight(16, 16), g.weight(16), transB=1))
    g.output(g.op("Gemm", h, g.weight(16, 8, scale=0.25), g.weight(8)))


@case("gemm_gemm")
def _(g):
    h = g.op("Gemm", g.input(ROWS), g.weight(16, 16), g.weight(16), transB=1)
    g.output(g.op("Gemm", h, g.weight(16, 8, scale=0.25), g.weight(8)))


@case("gemm_tanh_gemm")
def _(g):
    h = g.op("Tanh", g.op("Gemm", g.input(ROWS), g.weight(16, 16), g.weight(16), transB=1))
    g.output(g.op("Gemm", h, g.weight(16, 8, scale=0.25), g.weight(8)))


@case("gemm_two_activations")
def _(g):
    g.output(g.op("Gemm", g.input(ROWS), g.input((16, 4))))


@case("gemm_shared_bias_and_weight")
def _(g):
    w, b = g.weight(16, 16), g.weight(16)
    h = g.op("Relu", g.op("Gemm", g.input(ROWS), w, b, transB=1))
    g.output(g.op("Gemm", h, w, b, transB=1))


@case("weight_of_matmul_and_gemm")
def _(g):
    x, w = g.input(ROWS), g.weight(16, 16)
    g.output(g.op("MatMul", x, w), g.op("Gemm", x, w, transB=1), g.op("Gemm", x, w))


for name, left, right in (("right", [4, 16], 16), ("square", [16, 16], 16), ("batched_input", [2, 4, 16], 16), ("rank4_input", [2, 2, 4, 16], 16)):
    @case(f"matmul_{name}")
    def _(g, left=left, right=right):
        g.output(g.op("MatMul", g.input(left), g.weight(16, right, scale=0.25)))


@case("matmul_batched_weight")
def _(g):
    g.output(g.op("MatMul", g.input((2, 4, 16)), g.weight(2, 16, 8, scale=0.25)))


@case("matmul_broadcast_weight")
def _(g):
    g.output(g.op("MatMul", g.input((4, 16)), g.weight(2, 16, 8, scale=0.25)))


@case("matmul_left_weight")
def _(g):
    g.output(g.op("MatMul", g.weight(8, 16), g.input((16, 4))))


@case("matmul_left_weight_square")
def _(g):
    g.output(g.op("MatMul", g.weight(16, 16), g.input((16, 16))))


@case("matmul_left_weight_batched")
def _(g):
    g.output(g.op("MatMul", g.weight(8, 16), g.input((2, 16, 4))))


@case("matmul_vector_weight")
def _(g):
    g.output(g.op("MatMul", g.input(ROWS), g.weight(16, scale=0.25)))


@case("matmul_vector_input")
def _(g):
    g.floor_db = 20
    g.output(g.op("MatMul", g.input((16,)), g.weight(16, 8, scale=0.25)))


@case("matmul_column")
def _(g):
    g.output(g.op("MatMul", g.input(ROWS), g.weight(16, 1, scale=0.25)))


@case("matmul_odd_depth")
def _(g):
    g.output(g.op("MatMul", g.input((4, 17)), g.weight(17, 9, scale=0.25)))


for bias in ("vector", "row", "scalar", "matrix"):
    for relu in (False, True):
        @case(f"matmul_add_{bias}{'_relu' if relu else ''}")
        def _(g, bias=bias, relu=relu):
            shape = {"vector": [16], "row": [1, 16], "scalar": [], "matrix": [4, 16]}[bias]
            y = g.op("Add", g.op("MatMul", g.input(ROWS), g.weight(16, 16)), g.weight(*shape, scale=0.3))
            g.output(g.op("Relu", y) if relu else y)


@case("mlp_of_matmuls")
def _(g):
    x = g.input((2, 4, 16))
    for _ in range(3):
        x = g.op("Relu", g.op("Add", g.op("MatMul", x, g.weight(16, 16)), g.weight(16, scale=0.3)))
    g.output(x)


@case("mlp_bias_first")
def _(g):
    x = g.input((2, 4, 16))
    for _ in range(2):
        x = g.op("Relu", g.op("Add", g.weight(16, scale=0.3), g.op("MatMul", x, g.weight(16, 16))))
    g.output(x)


@case("matmul_chain")
def _(g):
    x = g.input(ROWS)
    for _ in range(3):
        x = g.op("MatMul", x, g.weight(16, 16))
    g.output(x)


@case("matmul_of_activations")
def _(g):
    g.output(g.op("MatMul", g.input((4, 16)), g.input((16, 4))))


def attention(g, x, width, heads):
    def part():
        h = g.op("Add", g.op("MatMul", x, g.weight(width, width)), g.weight(width, scale=0.1))
        return g.op("Transpose", g.op("Reshape", h, g.ints(1, -1, heads, width // heads)), perm=[0, 2, 1, 3])
    q, k, v = part(), part(), part()
    s = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    p = g.op("Softmax", g.op("Mul", s, g.scalar((width // heads) ** -0.5)), axis=-1)
    c = g.op("Transpose", g.op("MatMul", p, v), perm=[0, 2, 1, 3])
    c = g.op("Reshape", c, g.ints(1, -1, width))
    return g.op("Add", g.op("MatMul", c, g.weight(width, width)), g.weight(width, scale=0.1))


def layer_norm(g, x, width):
    return g.op("LayerNormalization", x, g.constant(np.ones(width, np.float32)), g.weight(width, scale=0.1), axis=-1)


@case("matmul_residual")
def _(g):
    x = g.input(ROWS)
    g.output(g.op("Add", g.op("MatMul", x, g.weight(16, 16)), x))


@case("matmul_residual_batched")
def _(g):
    x = g.input((2, 4, 16))
    g.output(g.op("Add", x, g.op("MatMul", x, g.weight(16, 16))))


@case("matmul_add_and_output")
def _(g):
    m = g.op("MatMul", g.input(ROWS), g.weight(16, 16))
    g.output(m, g.op("Add", m, g.weight(16)))


@case("matmul_left_add")
def _(g):
    g.output(g.op("Add", g.op("MatMul", g.weight(8, 16), g.input((16, 4))), g.weight(4)))


@case("matmul_add_shared_bias")
def _(g):
    x, b = g.input(ROWS), g.weight(16)
    g.output(*[g.op("Add", b, g.op("MatMul", x, g.weight(16, 16))) for _ in range(2)])


# Excluded from quantization, but between quantized values: onnxruntime must not quantize it by itself.
for op, shape in (("Conv", (8, 8, 1, 1)), ("ConvTranspose", (8, 8, 1, 1))):
    for after in ("", "Relu"):
        @case(f"excluded_{op.lower()}{after}")
        def _(g, op=op, shape=shape, after=after):
            g.options, g.float_allowed = ["--exclude", "left"], True
            x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
            x = g.op(op, x, g.weight(*shape), name="left")
            g.output(g.conv(g.op(after, x) if after else x, 8, 8))


@case("excluded_gemm")
def _(g):
    g.options, g.float_allowed = ["--exclude", "left"], True
    h = g.op("Reshape", g.op("Relu", g.conv(g.input((4, 4, 2, 2)), 4, 4)), g.ints(4, 16))
    h = g.op("Gemm", h, g.weight(16, 16), g.weight(16), transB=1, name="left")
    g.output(g.op("Gemm", h, g.weight(16, 16), transB=1))


@case("excluded_matmul_add")
def _(g):
    g.options, g.float_allowed = ["--exclude", "left*"], True
    h = g.op("Reshape", g.op("Relu", g.conv(g.input((4, 4, 2, 2)), 4, 4)), g.ints(4, 16))
    h = g.op("Add", g.op("MatMul", h, g.weight(16, 16), name="left"), g.weight(16), name="left_bias")
    g.output(g.op("Gemm", h, g.weight(16, 16), transB=1))


@case("attention")
def _(g):
    g.output(attention(g, g.input((1, 6, 16)), 16, 2))


@case("transformer_block")
def _(g):
    x = g.input((1, 6, 16))
    x = g.op("Add", x, attention(g, layer_norm(g, x, 16), 16, 2))
    h = g.op("Add", g.op("MatMul", layer_norm(g, x, 16), g.weight(16, 32)), g.weight(32, scale=0.1))
    h = g.op("Add", g.op("MatMul", gelu_parts(g, h), g.weight(32, 16)), g.weight(16, scale=0.1))
    g.output(g.op("Add", x, h))


@case("layernorm_three_matmuls")
def _(g):
    n = layer_norm(g, g.input((1, 6, 16)), 16)
    g.output(*[g.op("MatMul", n, g.weight(16, 16)) for _ in range(3)])


def outliers(rng, shape):
    """One value of one sample that no range for all samples serves."""
    data = rng.standard_normal(shape)
    data[3].flat[0] = 6 * np.sqrt(data.size)
    return data


@case("dynamic_matmul")
def _(g):
    g.floor_db = 8
    g.output(g.op("MatMul", g.input((16, 16), values=outliers), g.weight(16, 16)))


@case("dynamic_three_matmuls")
def _(g):
    g.floor_db = 8
    x = g.op("Abs", g.input((16, 16), values=outliers))
    g.output(*[g.op("MatMul", x, g.weight(16, 16)) for _ in range(3)])


@case("dynamic_gemm")
def _(g):
    g.floor_db = 8
    x = g.op("Abs", g.input((16, 16), values=outliers))
    g.output(g.op("Gemm", x, g.weight(16, 16), g.weight(16), transB=1), g.op("Gemm", x, g.weight(16, 16), g.weight(16)))


@case("dynamic_matmul_add")
def _(g):
    g.floor_db = 8
    x = g.op("Abs", g.input((16, 16), values=outliers))
    g.output(g.op("Relu", g.op("Add", g.op("MatMul", x, g.weight(16, 16)), g.weight(16))))


@case("dynamic_conv")
def _(g):
    g.floor_db = 8
    x = g.op("Abs", g.input(IMAGE, values=outliers))
    g.output(g.conv(x, 8, 8))


@case("embedding")
def _(g):
    x = g.op("Gather", g.weight(100, 16, scale=0.3), g.integers((1, 6), 100))
    g.output(g.op("MatMul", x, g.weight(16, 16)))


@case("embedding_layernorm")
def _(g):
    x = g.op("Gather", g.weight(100, 16, scale=0.3), g.integers((1, 6), 100))
    x = g.op("Add", x, g.weight(1, 6, 16, scale=0.3))
    g.output(g.op("MatMul", layer_norm(g, x, 16), g.weight(16, 16)))


@case("lstm")
def _(g):
    y = g.op("LSTM", g.input((6, 1, 8)), g.weight(1, 32, 8, scale=0.3), g.weight(1, 32, 8, scale=0.3), hidden_size=8, outputs=1)
    y = g.op("Squeeze", y, g.ints(1))
    g.output(g.op("MatMul", y, g.weight(8, 8)))


# ---- graphs of unusual make
@case("outputs_many")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    y = g.conv(x, 8, 8)
    g.output(x, y, g.op("Sigmoid", y), g.op("Reshape", y, g.ints(1, -1)))


@case("initializer_output")
def _(g):
    w = g.weight(3, 4)
    g.output(g.conv(g.input(IMAGE), 8, 8), w)


@case("initializer_input")
def _(g):
    w = g.weight(8, 8, 3, 3)
    g.inputs.append(helper.make_tensor_value_info(w, TensorProto.FLOAT, [8, 8, 3, 3]))
    g.samples[w] = np.stack([numpy_helper.to_array(g.initializers[-1])] * SAMPLES)
    g.output(g.op("Conv", g.input(IMAGE), w))


@case("if_captures_quantized")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    condition = g.op("Greater", g.op("ReduceSum", x, keepdims=0), g.scalar(0.0))
    branches = {}
    for branch, op in (("then_branch", "Exp"), ("else_branch", "Neg")):
        out = helper.make_tensor_value_info(f"{branch}_out", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([helper.make_node(op, [x], [out.name], name=branch)], branch, [], [out])
    g.output(g.op("If", condition, **branches), g.conv(x, 8, 8))


@case("if_body_with_conv")
def _(g):
    x = g.op("Relu", g.conv(g.input(IMAGE), 8, 8))
    w = g.weight(8, 8, 1, 1)
    condition = g.op("Greater", g.op("ReduceSum", x, keepdims=0), g.scalar(0.0))
    branches = {}
    for branch, op in (("then_branch", "Conv"), ("else_branch", "Mul")):
        out = helper.make_tensor_value_info(f"{branch}_out", TensorProto.FLOAT, None)
        args = [x, w] if op == "Conv" else [x, x]
        branches[branch] = helper.make_graph([helper.make_node(op, args, [out.name], name=branch)], branch, [], [out])
    g.output(g.op("If", condition, **branches))


@case("function_with_conv")
def _(g):
    body = [helper.make_node("Conv", ["a", "w"], ["c"], pads=[1] * 4), helper.make_node("Relu", ["c"], ["r"])]
    g.functions.append(helper.make_function("local", "ConvRelu", ["a", "w"], ["r"], body, [helper.make_opsetid("", 17)]))
    g.domains.append("local")
    x = g.op("ConvRelu", g.input(IMAGE), g.weight(8, 8, 3, 3), domain="local")
    g.output(g.conv(x, 8, 8))


@case("already_quantized_part")
def _(g):
    x = g.input(IMAGE)
    scale, zero = g.scalar(0.03), g.constant(np.array(120, np.uint8))
    q = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)
    w = g.constant(g.rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8))
    c = g.op("Conv", q, g.op("DequantizeLinear", w, g.scalar(0.001), g.constant(np.array(0, np.int8))), pads=[1] * 4)
    g.output(g.conv(g.op("Relu", c), 8, 8))


@case("float16_conv", dtype=np.float16)
def _(g):
    g.output(g.conv(g.op("Relu", g.conv(g.input(IMAGE), 8, 8)), 8, 8))


@case("float16_matmul", dtype=np.float16)
def _(g):
    g.output(g.op("MatMul", g.input(ROWS), g.weight(16, 16)))


@case("double_matmul", dtype=np.float64)
def _(g):
    g.output(g.op("MatMul", g.input(ROWS), g.weight(16, 16)))


# ---- ranges at the edge
@case("range_positive_without_zero")
def _(g):
    g.output(g.conv(g.input(IMAGE, 2, 3), 8, 8))


@case("range_negative")
def _(g):
    x = g.op("Neg", g.op("Relu", g.input(IMAGE)))
    g.output(g.conv(x, 8, 8))


@case("range_negative_far")
def _(g):
    g.output(g.conv(g.input(IMAGE, -5, -4), 8, 8))


@case("range_constant_activation")
def _(g):
    x = g.input(IMAGE)
    flat = g.op("Add", g.op("Mul", x, g.scalar(0.0)), g.scalar(0.7))
    g.output(g.conv(flat, 8, 8))


@case("range_zero_activation")
def _(g):
    x = g.op("Mul", g.input(IMAGE), g.scalar(0.0))
    g.output(g.conv(x, 8, 8))


@case("range_tiny")
def _(g):
    g.output(g.conv(g.input(IMAGE, -1e-20, 1e-20), 8, 8, bias=False))


@case("range_huge")
def _(g):
    g.output(g.conv(g.input(IMAGE, -1e20, 1e20), 8, 8, bias=False))


@case("relu_dead")
def _(g):
    c = g.op("Conv", g.input(IMAGE), g.weight(8, 8, 3, 3, scale=1e-3), g.constant(np.full(8, -9, np.float32)))
    g.output(g.conv(g.op("Relu", c), 8, 8))


@case("weight_zero_channel")
def _(g):
    w = g.rng.standard_normal((8, 8, 3, 3)).astype(np.float32) * 0.1
    w[3] = 0
    g.output(g.op("Conv", g.input(IMAGE), g.constant(w), g.weight(8)))


@case("weight_tiny_channel_large_bias")
def _(g):
    w = g.rng.standard_normal((8, 8, 3, 3)).astype(np.float32) * 0.1
    w[3] *= 1e-9
    g.output(g.op("Conv", g.input(IMAGE), g.constant(w), g.constant(np.full(8, 5, np.float32))))


@case("weight_all_zero")
def _(g):
    g.output(g.op("MatMul", g.input(ROWS), g.constant(np.zeros((16, 16), np.float32))))


# ---- judging

# Operators without an integer kernel in onnxruntime: between two integer ones they stay float.
NO_KERNEL = {"Tanh", "HardSigmoid", "HardSwish", "Gelu", "Erf", "PRelu", "Clip", "Pad", "ReduceMean", "GlobalMaxPool", "SpaceToDepth",
             "LRN", "InstanceNormalization", "LayerNormalization", "Max", "ConvTranspose", "Where", "Sum"}


def behind(made_by, name, op):
    maker = made_by.get(name)
    return maker is not None and maker.op_type == op


def look(path, folder, float_allowed=False):
    """The operators of onnxruntime's optimized graph, and what is wrong with it."""
    file = folder / "optimized.onnx"
    session(path, "on", optimized=file)
    graph = onnx.load(file).graph
    made_by = {output: node for node in graph.node for output in node.output if output}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    counts = Counter(node.op_type for node in graph.node)
    wrong = []
    for node in graph.node:
        data = [name for name in node.input if name]
        constant = [n for n in data if behind(made_by, n, "DequantizeLinear") and made_by[n].input[0] not in made_by]
        if node.op_type in HEAVY and constant:
            wrong.append(f"float {node.op_type} whose weight is dequantized at each run")
        elif node.op_type in HEAVY - {"ConvTranspose"} and any(behind(made_by, n, "DequantizeLinear") for n in data) and not float_allowed:
            wrong.append(f"float {node.op_type} behind DequantizeLinear")
        if node.op_type == "QuantizeLinear" and node.input[0] in made_by:
            maker = made_by[node.input[0]]
            sources = [name for name in maker.input if name in made_by]
            if maker.op_type == "DequantizeLinear" and not float_allowed:
                wrong.append("DequantizeLinear straight into QuantizeLinear")
            elif maker.op_type not in INTEGER | NO_KERNEL and not float_allowed and sources and all(behind(made_by, s, "DequantizeLinear") for s in sources):
                after = {reader.op_type for reader in readers.get(node.output[0], [])}
                before = {made_by[made_by[s].input[0]].op_type for s in sources if made_by[s].input[0] in made_by}
                wrong.append(f"{'/'.join(sorted(before))} -> float {maker.op_type} -> {'/'.join(sorted(after))}")
    return counts, wrong


def decibels(reference, noise):
    signal, noise = float((reference ** 2).sum()), float((noise ** 2).sum())
    if not np.isfinite(noise):
        return -999.0
    return 999.0 if noise == 0 else (-999.0 if signal == 0 else 10 * np.log10(signal / noise))


def steps_of(path):
    """The largest scale of each quantizer of activations."""
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] in constants and node.input[0] not in constants:
            found[node.output[0]] = float(np.max(constants[node.input[1]]))
    return found


def run_one(amax, name, target, guarded, folder):
    """Rewrites and judges one case; the row of figures and the complaints."""
    g = CASES[name]()
    if target == "tensorrt" and g.opset > 21:
        return {}, []
    folder.mkdir(parents=True, exist_ok=True)
    source, output, samples = folder / "in.onnx", folder / "out.onnx", folder / "in.calib.npz"
    onnx.save(g.model(), source)
    np.savez(samples, **g.samples)
    command = [amax, "rewrite", source, output, "--calib", samples, "--target", target, "--threads", "1",
               "--report", folder / "report.json", *g.options] + ([] if guarded else ["--no-guard"])
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode or not output.exists():
        return {}, [f"amax fails: {' | '.join(process.stderr.strip().splitlines()[-3:])}"]
    complaints = []
    said = check(output)
    if said and check(source) is None:
        complaints.append(f"onnx.checker: {said[:200]}")
    try:
        float_session = session(source)
        feeds, _ = load_samples(float_session, samples)
        on, off = session(output, "on"), session(output, "off")
        counts, wrong = look(output, folder, g.float_allowed)
        runs = [(float_session.run(None, f), on.run(None, f), off.run(None, f)) for f in feeds]
    except Exception as error:  # noqa: BLE001 - whatever onnxruntime says
        return {}, complaints + [f"onnxruntime: {str(error)[:300]}"]
    # Other targets only have to load, and to be right as they are written.
    ort = target.startswith("ort-cpu")
    if ort:
        complaints += wrong
    if target == "tensorrt":
        complaints += tensorrt(output, source)
    steps = steps_of(output)
    row = {"counts": dict(sorted(counts.items())), "on_db": 999.0, "off_db": 999.0, "on_off_db": 999.0}
    names = [o.name for o in float_session.get_outputs()]
    if [o.name for o in on.get_outputs()] != names:
        complaints.append("the outputs have other names")
    for i, output_name in enumerate(names):
        stacks = [np.stack([run[k][i] for run in runs]) for k in range(3)]
        if stacks[0].dtype.kind != "f":
            continue
        f, n, o = [s.astype(np.float64) for s in stacks]
        if f.shape != n.shape or f.shape != o.shape:
            complaints.append(f"{output_name} has another shape")
            continue
        off_db, gap_db = decibels(f, o - f), decibels(o, o - n)
        row["off_db"], row["on_off_db"] = min(row["off_db"], off_db), min(row["on_off_db"], gap_db)
        on_db = decibels(f, n - f)
        row["on_db"] = min(row["on_db"], on_db)
        if ort and min(on_db, 40) < min(off_db, 40) - 0.5:
            complaints.append(f"{output_name}: {off_db:.1f} dB as written, {on_db:.1f} dB as run")
        largest = np.abs(o - n).max(initial=0)
        # A step of one layer may become two of the next.
        near = gap_db >= 38 or (output_name in steps and largest <= 1.01 * steps[output_name])
        if ort and not near:
            complaints.append(f"{output_name}: fused and unfused differ by {largest:.4g}"
                              f" ({largest / steps[output_name]:.1f} steps)" * (output_name in steps) + f", {gap_db:.1f} dB")
    if row["off_db"] < g.floor_db - (8 if target == "generic" else 0):
        complaints.append(f"only {row['off_db']:.1f} dB against float")
    return row, complaints


def tensorrt(path, source):
    """TensorRT's rules: symmetric int8, pairs at inputs of heavy operators and shortcuts only, float biases."""
    model, given = onnx.load(path), onnx.load(source)
    old = {node.op_type for node in given.graph.node}
    if "QuantizeLinear" in old or "DequantizeLinear" in old:
        return []
    wrong = []
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    allowed = {"Conv", "ConvTranspose", "Gemm", "MatMul", "AveragePool", "GlobalAveragePool", "Add"}
    readers = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = constants[node.input[2]]
        if zero.dtype != np.int8 or zero.any():
            wrong.append(f"{node.name}: {zero.dtype} with zero point {zero.ravel()[0]}")
        if node.op_type == "DequantizeLinear":
            for reader, index in readers.get(node.output[0], []):
                if reader.op_type not in allowed or (index == 2):
                    wrong.append(f"DequantizeLinear at input {index} of {reader.op_type}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--bless", action="store_true", help="write fusion.json")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    args = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    amax = str(os.environ.get("AMAX") or ROOT / "target/debug/amax")
    if not Path(amax).exists():
        sys.exit(f"error: no {amax}\nhint: run cargo build first, or set AMAX")
    names = [name for name in CASES if not args.patterns or any(p in name for p in args.patterns)]
    kernels = HERE / "fusion.json"
    expected = json.loads(kernels.read_text()) if kernels.exists() else {}
    jobs = [(name, target, guarded) for name in names for target in args.target or TARGETS
            for guarded in ((False, True) if target == "ort-cpu" else (False,))]
    passed, failures = 0, []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        root = args.keep or Path(scratch)

        def work(job):
            name, target, guarded = job
            return run_one(amax, name, target, guarded, root / name / f"{target}{'-guard' if guarded else ''}")

        for (name, target, guarded), (row, complaints) in zip(jobs, pool.map(work, jobs)):
            if target == "ort-cpu" and not guarded and row:
                if args.bless:
                    expected[name] = row["counts"]
                elif row["counts"] != expected.get(name):
                    complaints.append(f"kernels {row['counts']} instead of {expected.get(name)}")
            if args.verbose:
                counts = " ".join(f"{op}:{n}" for op, n in row.get("counts", {}).items())
                print(f"{name} [{target}{' guard' if guarded else ''}] {row.get('off_db', 0):.1f} dB, on {row.get('on_db', 0):.1f}, on-off {row.get('on_off_db', 0):.1f}: {counts}", flush=True)
            passed += not complaints
            failures += [f"{name} [{target}{', guard' if guarded else ''}]: {c}" for c in complaints]
    for failure in failures:
        print(f"FAILED {failure}")
    if args.bless:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(expected[name])}" for name in CASES if name in expected)
        kernels.write_text("{\n" + lines + "\n}\n")
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
