"""Activations of real models, and the ranges that a search over the values themselves finds for them.

    python tests/data/observers/make.py models/fetched

Writes NAME.f32 (little-endian values) and expected.json beside this script.
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

HERE = Path(__file__).parent
COUNT = 8192
LAYER = "/model/model.0/auto_model/encoder/"
TENSORS = {
    "minilm": {
        "attention": LAYER + "layer.0/attention/self/Softmax_output_0",
        "scores": LAYER + "layer.1/attention/self/Add_output_0",
        "residual": LAYER + "layer.0/attention/output/Add_output_0",
        "gelu": LAYER + "layer.1/intermediate/intermediate_act_fn/Mul_1_output_0",
    },
    "ppocr_rec": {"hardswish": "p2o.Mul.171", "convolution": "p2o.Mul.7"},
}
# Name, first code, last code, whether zero is fixed at 0.
FORMATS = [("int8", -128, 127, True), ("int4", -8, 7, True), ("uint8", 0, 255, False)]


def activations(folder):
    for model_name, tensors in TENSORS.items():
        model = onnx.load(folder / f"{model_name}.onnx")
        data = np.load(folder / f"{model_name}.calib.npz")
        del model.graph.output[:]
        model.graph.output.extend(helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in tensors.values())
        session = ort.InferenceSession(model.SerializeToString())
        feed = {i.name: data[i.name][0] if data[i.name].ndim > len(i.shape) else data[i.name] for i in session.get_inputs()}
        for name, values in zip(tensors, session.run(None, feed)):
            values = values.ravel()
            yield name, values[:: max(1, values.size // COUNT)][:COUNT]
    random = np.random.default_rng(5)
    outlier = random.normal(size=COUNT)
    outlier[777] = 1000
    yield "outlier", outlier
    yield "normal", random.normal(size=COUNT)


def qparams(low, high, first, last, symmetric):
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return np.float32(max(high, -low) / last), 0
    scale = (high - low) / (last - first)
    return np.float32(scale), int(np.clip(np.rint(first - low / scale), first, last))


def error(x, low, high, format, p):
    _, first, last, symmetric = format
    scale, zero = qparams(low, high, first, last, symmetric)
    q = np.clip(np.rint(x / np.float64(scale)) + zero, first, last)
    return np.mean(np.abs(x - (q - zero) * np.float64(scale)) ** p)


def cut(x, amax):
    return max(x.min(), -amax), min(x.max(), amax)


def least_error(x, format, p):
    """The least error over every pair of ends on a grid of hundredths (a line of thousandths where symmetric)."""
    if format[3]:
        amax = np.abs(x).max()
        return min(error(x, *cut(x, amax * i / 1000), format, p) for i in range(1, 1001))
    ends = lambda end: [end * i / 80 for i in range(0, 81)] if end else [0.0]
    pairs = [(l, h) for l in ends(min(x.min(), 0)) for h in ends(max(x.max(), 0)) if h > l]
    return min(error(x, l, h, format, p) for l, h in pairs)


def feigned(mean):
    k = np.arange(1, 101)
    chance = np.exp(-mean) * np.cumprod(mean / k)
    return np.sum(chance * k * np.log(k)) - mean * np.log(mean / (1 - np.exp(-mean))) if mean else 0.0


TABLE = np.array([feigned(i / 16) for i in range(257)])


def divergence(x, low, high, format):
    """See src/algorithms/observers/entropy.rs."""
    _, first, last, symmetric = format
    scale, zero = qparams(low, high, first, last, symmetric)
    x = x[x != 0]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric and low < 0:
        low, high = -max(high, -low), max(high, -low)
    counts = np.histogram(np.clip(x, low, high), bins=2048, range=(low, high))[0]
    middles = low + (np.arange(2048) + 0.5) * (high - low) / 2048
    codes = np.clip(np.rint(middles / np.float64(scale)) + zero, first, last)
    used = counts > 0
    lost = 0.0
    for code in np.unique(codes[used]):
        cell = counts[used & (codes == code)]
        even = cell.mean()
        feigned = np.interp(even * 16, np.arange(257), TABLE) if even < 16 else 0.5 + 1 / (12 * even)
        lost += np.sum(cell * np.log(cell / even)) - (len(cell) - 1) * feigned
    return lost / len(x)


def least_divergence(x, format):
    magnitudes = np.abs(x[x != 0])
    found = None
    for i in range(0, 64 * 20):
        amax = magnitudes.max() * 2 ** (-i / 64)
        if np.mean(magnitudes > amax) > 0.01:
            break
        this = divergence(x, *cut(x, amax), format)
        if found is None or this < found[0]:
            found = (this, amax)
    return found


def main(folder):
    expected = {}
    for name, values in activations(folder):
        values.astype("<f4").tofile(HERE / f"{name}.f32")
        x = values.astype(np.float32).astype(np.float64)
        entry = expected[name] = {
            "quantiles": {str(p): [*np.quantile(x, [(1 - p / 100) / 2, 1 - (1 - p / 100) / 2]), np.quantile(np.abs(x), p / 100)]
                          for p in (50, 90, 99, 99.9, 99.99, 99.999, 100)},
            "error": {}, "divergence": {},
        }
        for format in FORMATS:
            entry["error"][format[0]] = {str(p): least_error(x, format, p) for p in (2.0, 2.4)}
            least, amax = least_divergence(x, format)
            whole = divergence(x, *cut(x, np.abs(x).max()), format)
            entry["divergence"][format[0]] = {"least": least, "amax": amax, "whole": whole}
        print(name, x.min(), x.max(), entry["divergence"], flush=True)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


main(Path(sys.argv[1]))
