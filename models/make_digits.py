#!/usr/bin/env python3
"""Trains the digits classifier and writes digits.onnx, digits.calib.npz and digits.test.npz beside this script.

Needs models/requirements.txt. Trains with numpy alone, in about a minute on one core; the seed is fixed, so one
machine gives the same bytes every time (another BLAS may round differently).
"""

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

SEED = 7
EPOCHS = 40
BATCH = 40
TRAIN = 1000


class Conv:
    """A 2-D convolution, stride 1, same padding, without bias. `groups` is 1, or the channel count (depthwise)."""

    def __init__(self, rng, in_channels, out_channels, size, depthwise=False):
        fan_in = size * size * (1 if depthwise else in_channels)
        self.weight = rng.normal(0, np.sqrt(2 / fan_in), (out_channels, 1 if depthwise else in_channels, size, size))
        self.depthwise = depthwise
        self.names = ["weight"]

    def patches(self, x):
        half = self.weight.shape[2] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)))
        return np.lib.stride_tricks.sliding_window_view(padded, self.weight.shape[2:], (2, 3))

    def forward(self, x, training):
        self.seen = self.patches(x)
        if self.depthwise:
            return np.einsum("nchwij,cij->nchw", self.seen, self.weight[:, 0])
        return np.tensordot(self.seen, self.weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)

    def backward(self, grad):
        flipped = self.weight[:, :, ::-1, ::-1]
        if self.depthwise:
            self.weight_grad = np.einsum("nchwij,nchw->cij", self.seen, grad)[:, None]
            return np.einsum("nchwij,cij->nchw", self.patches(grad), flipped[:, 0])
        self.weight_grad = np.tensordot(grad, self.seen, ((0, 2, 3), (0, 2, 3)))
        return np.tensordot(self.patches(grad), flipped, ((1, 4, 5), (0, 2, 3))).transpose(0, 3, 1, 2)


class BatchNorm:
    EPSILON = 1e-5

    def __init__(self, channels):
        self.scale, self.bias = np.ones(channels), np.zeros(channels)
        self.mean, self.var = np.zeros(channels), np.ones(channels)
        self.names = ["scale", "bias"]

    def forward(self, x, training):
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.mean += 0.1 * (mean - self.mean)
            self.var += 0.1 * (var - self.var)
        else:
            mean, var = self.mean, self.var
        self.factor = 1 / np.sqrt(var + self.EPSILON)
        self.normal = (x - mean[:, None, None]) * self.factor[:, None, None]
        return self.normal * self.scale[:, None, None] + self.bias[:, None, None]

    def backward(self, grad):
        self.scale_grad, self.bias_grad = (grad * self.normal).sum((0, 2, 3)), grad.sum((0, 2, 3))
        count = grad.size // grad.shape[1]
        centred = grad - (self.bias_grad[:, None, None] + self.normal * self.scale_grad[:, None, None]) / count
        return centred * (self.scale * self.factor)[:, None, None]


class Relu:
    names = []

    def forward(self, x, training):
        self.open = x > 0
        return x * self.open

    def backward(self, grad):
        return grad * self.open


class MaxPool:
    """2x2, stride 2."""
    names = []

    def forward(self, x, training):
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // 2, 2, w // 2, 2)
        pooled = blocks.max((3, 5))
        self.chosen = blocks == pooled[:, :, :, None, :, None]
        return pooled

    def backward(self, grad):
        spread = self.chosen * (grad[:, :, :, None, :, None] / self.chosen.sum((3, 5), keepdims=True))
        n, c, h, _, w, _ = spread.shape
        return spread.reshape(n, c, h * 2, w * 2)


class GlobalAveragePool:
    names = []

    def forward(self, x, training):
        self.shape = x.shape
        return x.mean((2, 3))

    def backward(self, grad):
        n, c, h, w = self.shape
        return np.broadcast_to(grad[:, :, None, None] / (h * w), self.shape)


class Gemm:
    def __init__(self, rng, in_features, out_features):
        self.weight = rng.normal(0, np.sqrt(1 / in_features), (out_features, in_features))
        self.bias = np.zeros(out_features)
        self.names = ["weight", "bias"]

    def forward(self, x, training):
        self.seen = x
        return x @ self.weight.T + self.bias

    def backward(self, grad):
        self.weight_grad, self.bias_grad = grad.T @ self.seen, grad.sum(0)
        return grad @ self.weight


class Residual:
    """x + inner(x)"""

    def __init__(self, inner):
        self.inner = inner

    def forward(self, x, training):
        return x + run(self.inner, x, training)

    def backward(self, grad):
        return grad + back(self.inner, grad)


def run(layers, x, training=False):
    for layer in layers:
        x = layer.forward(x, training)
    return x


def back(layers, grad):
    for layer in reversed(layers):
        grad = layer.backward(grad)
    return grad


def flat(layers):
    for layer in layers:
        yield from flat(layer.inner) if isinstance(layer, Residual) else [layer]


def network(rng):
    return [
        Conv(rng, 1, 16, 3), BatchNorm(16), Relu(),
        Residual([Conv(rng, 16, 16, 3, depthwise=True), BatchNorm(16), Relu(), Conv(rng, 16, 16, 1), BatchNorm(16)]),
        Relu(), MaxPool(),
        Conv(rng, 16, 32, 3), BatchNorm(32), Relu(),
        GlobalAveragePool(), Gemm(rng, 32, 10),
    ]


def train(layers, images, labels, rng):
    parameters = [(layer, name) for layer in flat(layers) for name in layer.names]
    first = [np.zeros_like(getattr(layer, name)) for layer, name in parameters]
    second = [np.zeros_like(moment) for moment in first]
    step, steps = 0, EPOCHS * (len(images) // BATCH)
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for start in range(0, len(order), BATCH):
            chosen = order[start:start + BATCH]
            logits = run(layers, images[chosen], training=True)
            odds = np.exp(logits - logits.max(1, keepdims=True))
            grad = odds / odds.sum(1, keepdims=True)
            grad[np.arange(len(chosen)), labels[chosen]] -= 1
            back(layers, grad / len(chosen))
            step += 1
            # Adam, with the rate on half a cosine.
            rate = 0.004 * (1 + np.cos(np.pi * step / steps)) / 2
            for (layer, name), m, v in zip(parameters, first, second):
                slope = getattr(layer, f"{name}_grad")
                m += 0.1 * (slope - m)
                v += 0.001 * (slope * slope - v)
                correction = np.sqrt(1 - 0.999 ** step) / (1 - 0.9 ** step)
                setattr(layer, name, getattr(layer, name) - rate * correction * m / (np.sqrt(v) + 1e-8))


def to_onnx(layers):
    """The model with one node a layer; the depthwise convolution's normalization is folded, the others are kept."""
    nodes, initializers = [], []

    def constant(name, array):
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        return name

    def node(op, inputs, name, **attributes):
        output = "logits" if name == "classifier" else f"{name}_out"
        nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def conv(x, name, layer, folded=None):
        size, channels = layer.weight.shape[2], layer.weight.shape[0]
        weight, inputs = layer.weight, [x]
        if folded:
            factor = folded.scale / np.sqrt(folded.var + folded.EPSILON)
            weight = weight * factor[:, None, None, None]
        inputs.append(constant(f"{name}.weight", weight))
        if folded:
            inputs.append(constant(f"{name}.bias", folded.bias - folded.mean * factor))
        return node("Conv", inputs, name, kernel_shape=[size, size], pads=[size // 2] * 4, strides=[1, 1],
                    dilations=[1, 1], group=channels if layer.depthwise else 1)

    def norm(x, name, layer):
        return node("BatchNormalization", [x] + [constant(f"{name}.{part}", getattr(layer, part))
                                                 for part in ("scale", "bias", "mean", "var")],
                    name, epsilon=layer.EPSILON)

    stem, stem_norm, _, block, _, _, wide, wide_norm, _, _, classifier = layers
    depthwise, depthwise_norm, _, pointwise, pointwise_norm = block.inner
    x = node("Relu", [norm(conv("image", "stem", stem), "stem_norm", stem_norm)], "stem_relu")
    y = node("Relu", [conv(x, "depthwise", depthwise, depthwise_norm)], "depthwise_relu")
    y = norm(conv(y, "pointwise", pointwise), "pointwise_norm", pointwise_norm)
    x = node("Relu", [node("Add", [x, y], "residual")], "residual_relu")
    x = node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = node("Relu", [norm(conv(x, "wide", wide), "wide_norm", wide_norm)], "wide_relu")
    x = node("Flatten", [node("GlobalAveragePool", [x], "average")], "flatten", axis=1)
    node("Gemm", [x, constant("classifier.weight", classifier.weight), constant("classifier.bias", classifier.bias)],
         "classifier", transB=1)
    graph = helper.make_graph(
        nodes, "digits", [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="make_digits")
    checker.check_model(model, full_check=True)
    return model


def main():
    import onnxruntime
    from sklearn.datasets import load_digits

    from make_samples import save as save_samples

    rng = np.random.default_rng(SEED)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    images = (images[order] / 16).reshape(-1, 1, 8, 8)
    labels = labels[order]
    layers = network(rng)
    train(layers, images[:TRAIN], labels[:TRAIN], rng)

    here = Path(__file__).parent
    model = to_onnx(layers)
    save(model, here / "digits.onnx")
    images = images.astype(np.float32)
    save_samples(here / "digits.calib.npz", {"image": images[:64, None]})
    save_samples(here / "digits.test.npz", {"image": images[TRAIN:], "label": labels[TRAIN:].astype(np.int64)})
    session = onnxruntime.InferenceSession(here / "digits.onnx", providers=["CPUExecutionProvider"])
    logits, = session.run(None, {"image": images[TRAIN:]})
    difference = np.abs(logits - run(layers, images[TRAIN:].astype(np.float64))).max()
    print(f"test accuracy {np.mean(logits.argmax(1) == labels[TRAIN:]):.4f} on {len(logits)} images, "
          f"{difference:.1e} from the trainer's own logits")


if __name__ == "__main__":
    main()
