"""Runs fake-quantized models and what `amax convert` makes of them in onnxruntime: outputs must be the same bits.

    python tests/differential/qat.py [path/to/amax]

Models are those of tests/qat/, and what `amax prepare` makes of models/digits.onnx and of a linear model. Where a
BatchNormalization was fused, onnxruntime must run the product in front of it on integers, and did not before.
"""

import collections
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime

ROOT = pathlib.Path(__file__).resolve().parents[2]
AMAX = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/debug/amax")


def amax(*arguments):
    done = subprocess.run([AMAX, "-q", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"amax {' '.join(map(str, arguments))}\n{done.stderr}")


def run(path, inputs):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def kernels(path, inputs):
    """Operators of the optimized graph, and the output."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # By default int8 becomes uint8 where it fuses, and the products of that and int8 saturate on some processors.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    with tempfile.NamedTemporaryFile(suffix=".onnx") as optimized:
        options.optimized_model_filepath = optimized.name
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimized.name).graph
        return collections.Counter(node.op_type for node in graph.node), session.run(None, inputs)[0]


def fused(name, original, folded, inputs):
    """Whether a convolution runs on integers in `folded` and none in `original`, with the same outputs but for rounding."""
    (before, expected), (after, output) = kernels(original, inputs), kernels(folded, inputs)
    worst = float(np.abs(expected - output).max())
    print(f"{name:32} {before['QLinearConv']} -> {after['QLinearConv']} QLinearConv, outputs within {worst:.1e}")
    return (before["QLinearConv"], after["QLinearConv"]) == (0, 1) and worst <= 1e-6 * np.abs(expected).max()


# Trained with a BatchNormalization between quantizers.
NORMALIZED = ["fx_qat_cnn", "modelopt_deep"]


def check(name, original, folded, inputs, expected=None):
    onnx.checker.check_model(onnx.load(folded), full_check=True)
    after = run(folded, inputs)
    before = run(original, inputs) if expected is None else expected
    differing = int((before != after).sum())
    worst = float(np.abs(before - after).max() / np.abs(before).max())
    print(f"{name:32} {differing:4} of {after.size:4} elements differ, by {worst:.1e} of the largest")
    return worst <= (1e-6 if expected is not None or name == "modelopt_deep" else 0)


def main():
    good = True
    expected = json.loads((ROOT / "tests/qat/expected.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        folded = folder / "folded.onnx"
        for path in sorted((ROOT / "tests/qat").glob("*.onnx")):
            amax("convert", path, folded, "--check", "--target", "generic")
            inputs = {"x": np.load(path.with_suffix("").with_suffix(".calib.npz"))["x"][0]}
            foreign = any(node.domain == "trt" for node in onnx.load(path).graph.node)
            known = np.array(expected[path.stem]["y"], np.float32).reshape(expected[path.stem]["shape"])
            good &= check(path.stem, path, folded, inputs, known if foreign else None)
            if path.stem in NORMALIZED:
                good &= fused(path.stem, path, folded, inputs)
        prepared = folder / "prepared.onnx"
        linear = ROOT / "tests/qat/float_linear.onnx"
        inputs = {"x": np.load(linear.with_suffix("").with_suffix(".calib.npz"))["x"][0]}
        amax("prepare", linear, prepared, "--preset", "8da4w", "--no-measure")
        amax("convert", prepared, folded, "--check")
        good &= check("prepare 8da4w", prepared, folded, inputs)
        digits = ROOT / "models/digits.onnx"
        samples = np.load(digits.with_suffix("").with_suffix(".calib.npz"))
        inputs = {name: values[0] for name, values in samples.items()}
        for options in ([], ["--preset", "w4"], ["--target", "tensorrt"], ["--target", "generic"]):
            amax("prepare", digits, prepared, "--no-measure", *options)
            amax("convert", prepared, folded, "--check")
            good &= check(f"prepare {' '.join(options)}", prepared, folded, inputs)
    sys.exit(not good)


main()
