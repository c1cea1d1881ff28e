#!/usr/bin/env python3
"""Products with a Relu or Clip behind them: onnxruntime must leave no DequantizeLinear in front of any.

    python3 tests/differential/clipped.py [AMAX] [--time]

Small networks of two products are rewritten with each preset for weights or dynamic ranges, and with samples. --time also
prints the median time of a run, as a share of the float model's, of networks that are wide enough for that. Closes with
the line "N passed, N failed".
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from run import ROOT, enter_environment

if __name__ == "__main__":
    enter_environment()

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

PRESETS = {"w4": ["--preset", "w4", "--calib", "none"], "w8": ["--preset", "w8", "--calib", "none"],
           "int8-dynamic": ["--preset", "int8-dynamic", "--calib", "none"], "int8": ["--calib", "random", "--no-guard"]}
CLIPS = ("Relu", "Clip", "Add, Relu", "shared")


def network(product, clip, last, width):
    """Two products with something between them, and something behind."""
    rng = np.random.default_rng(5)
    normal = lambda *shape: (rng.standard_normal(shape) / np.sqrt(width)).astype(np.float32)
    stored = {"w1": normal(width, width), "b1": normal(width), "low": np.float32(0), "high": np.float32(6)}
    stored |= {} if clip == "shared" else {"w2": normal(width, width)}
    weights = ["w1", "w1"] if clip == "shared" else ["w1", "w2"]
    bias = ["b1"] if product == "Gemm" else []
    nodes = [helper.make_node(product, ["x", weights[0], *bias], ["a"], name="first")]
    at = "a"
    if clip == "Add, Relu":
        nodes.append(helper.make_node("Add", [at, "b1"], ["s"]))
        at = "s"
    nodes.append(helper.make_node("Clip", [at, "low", "high"], ["r"]) if clip == "Clip" else helper.make_node("Relu", [at], ["r"]))
    nodes.append(helper.make_node(product, ["r", weights[1], *bias], ["c"], name="second"))
    nodes.append(helper.make_node(last, ["c"], ["d"]))
    nodes.append(helper.make_node("Tanh", ["d"], ["y"]))
    tensors = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, width])
    graph = helper.make_graph(nodes, "clipped", [value("x")], [value("y")], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def session(path, optimized):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.optimized_model_filepath = 1, 3, str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def medians(sessions, feeds):
    """Median seconds of a run of each, taken in turns."""
    times = {name: [] for name in sessions}
    for _ in range(40):
        for name, one in sessions.items():
            start = time.perf_counter()
            one.run(None, feeds)
            times[name].append(time.perf_counter() - start)
    return {name: np.median(all_times) for name, all_times in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("amax", nargs="?", default=os.environ.get("AMAX") or ROOT / "target/debug/amax")
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    width = 512 if args.time else 64
    passed, failures = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        source, optimized = Path(scratch) / "float.onnx", Path(scratch) / "optimized.onnx"
        for product in ("MatMul", "Gemm"):
            for clip in CLIPS:
                for last in ("Relu", "Softmax"):
                    onnx.save(network(product, clip, last, width), source)
                    sessions = {"float": session(source, optimized)}
                    for preset, options in PRESETS.items():
                        name, path = f"{product}, {clip}, {last}, {preset}", Path(scratch) / f"{preset}.onnx"
                        done = subprocess.run([args.amax, "rewrite", source, path, "-q", *options], capture_output=True, text=True)
                        if done.returncode != 0:
                            failures.append(f"{name}: {done.stderr.strip()[:300]}")
                            continue
                        sessions[preset] = session(path, optimized)
                        counts = Counter(node.op_type for node in onnx.load(optimized).graph.node)
                        left = sum(counts[op] for op in ("MatMul", "Gemm", "FusedGemm"))
                        if left:
                            failures.append(f"{name}: {dict(counts)}")
                        else:
                            passed += 1
                    if args.time:
                        found = medians(sessions, {"x": np.random.default_rng(1).standard_normal((4, width)).astype(np.float32)})
                        shares = ", ".join(f"{preset} {found[preset] / found['float']:.2f}" for preset in found if preset != "float")
                        print(f"{product}, {clip}, {last}: {shares}")
    for line in failures:
        print(f"FAILED {line}")
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
