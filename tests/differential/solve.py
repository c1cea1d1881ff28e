"""Runs the models of tests/solve, which amax made from plans, in onnxruntime and in onnx's reference implementation.

Checks that each passes onnx's checker, that onnxruntime computes what the reference does, with and without its graph
optimizations, and that weights in groups become MatMulNBits. Needs onnx, onnxruntime and numpy.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

MODELS = Path(__file__).resolve().parents[1] / "solve"
# Formats for which onnxruntime's CPU provider has no kernel.
WITHOUT_KERNEL = ("float4_groups",)
# onnxruntime makes a QLinearMatMul of 8-bit floats, and then has none: these run without its optimizations only.
UNOPTIMIZED = ("float8_matmul",)
FUSED = {
    "int4_groups", "int4_groups_ragged", "int4_group_of_all", "uint4_groups", "int8_groups", "uint8_groups", "int2_groups",
    "uint2_groups", "gemm_int4_groups",
}


def session(path, level, optimized=None, accuracy=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    # These weights use all codes, and products of bytes saturate on processors without VNNI: another test's business.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    if accuracy is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def failures_of(paths, scratch):
    levels = onnxruntime.GraphOptimizationLevel
    failures = []
    for path in paths:
        name = path.stem
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        x = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
        expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
        if name in WITHOUT_KERNEL:
            print(f"{name}: reference only")
            continue
        plain = session(path, levels.ORT_DISABLE_ALL).run(None, {"x": x})[0]
        if name in UNOPTIMIZED:
            worst = float(np.abs(plain - expected).max())
            if worst > 1e-5:
                failures.append(f"{name}: off by {worst:.3g}")
            print(f"{name}: runs unoptimized")
            continue
        saved = Path(scratch) / f"{name}.onnx"
        exact = session(path, levels.ORT_ENABLE_ALL, saved, accuracy=0).run(None, {"x": x})[0]
        fast = session(path, levels.ORT_ENABLE_ALL).run(None, {"x": x})[0]
        ops = Counter(node.op_type for node in onnx.load(saved).graph.node)
        # One step of the output's own quantizer may turn with the order of a sum.
        steps = [t for t in model.graph.initializer if t.name in ("y_scale", "s_scale")]
        step = 1.01 * max((float(onnx.numpy_helper.to_array(t)) for t in steps), default=0.0)
        limits = (("plain", plain, step + 1e-5), ("exact", exact, step + 1e-5), ("default", fast, step + 0.05))
        for label, found, limit in limits:
            worst = float(np.abs(found - expected).max())
            if not worst <= limit:
                failures.append(f"{name} {label}: off by {worst:.3g} of {np.abs(expected).max():.3g}, allowed {limit:.3g}")
        if ("MatMulNBits" in ops) != (name in FUSED):
            failures.append(f"{name}: fused to {dict(ops)}")
        off = np.abs(fast - expected).max()
        counts = " ".join(f"{op}:{n}" for op, n in sorted(ops.items()))
        print(f"{name}: {counts}; off by {off:.2g} of {np.abs(expected).max():.2g}", flush=True)
    return failures


def main():
    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as scratch:
        failures = failures_of(sorted(MODELS.glob("*.onnx")), scratch)
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
