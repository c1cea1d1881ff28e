#!/usr/bin/env python3
"""Rewrites models with random configurations: none may end in a mistake of amax, and onnxruntime runs what is written for it.

    python3 tests/differential/configurations.py [AMAX] [--count N] [--seed N]

Models are models/digits.onnx and random choices of the sandwiches of sandwich.py. A configuration that amax refuses, with
a reason, is fine (exit codes 2 to 5); exit code 1 is a mistake in amax. What is written for the ort-cpu targets must load
and run in onnxruntime with its default optimizations. Closes with the line "N passed, N failed".
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from run import enter_environment

if __name__ == "__main__":
    enter_environment()

import numpy as np  # noqa: E402
import onnx  # noqa: E402

from sandwich import RECIPES, ROOT, SAMPLES, TARGETS, Sandwich, model_of, run, session  # noqa: E402

PRESETS = ["int8", "w8", "w4", "int8-dynamic", "a16w8", "8da4w", "fp8", "w4-hqq", "INT8_DEFAULT_CFG"]
ACTIVATION = {
    "enable": ["true", "false"],
    "dtype": ["int8", "uint8", "uint16"],
    "symmetric": ["true", "false"],
    "observer": ["minmax", "percentile", "mse"],
    "reduce_range": ["true"],
}
WEIGHT = {
    "enable": ["true", "false"],
    "dtype": ["int8", "uint8", "int4", "uint4", "int16"],
    "symmetric": ["true", "false"],
    "granularity": ["per-tensor", "per-channel"],
    "ch_axis": ["0", "1"],
    "reduce_range": ["true"],
    "scale_type": ["power-of-two"],
    "form": ["qdq", "matmulnbits", "matmulinteger"],
}
KEYS = {"input": ACTIVATION | {"dynamic": ["true"]}, "output": ACTIVATION, "weight": WEIGHT, "bias": {"enable": ["true", "false"]}}
# Shapes of their results depend on values.
VALUES_DECIDE = {"NonZero", "Compress"}
OPSETS = [13, 17, 18, 21, 23, 25, 26]


def some_model(draw, samples):
    """A few sandwiches that onnxruntime runs in float, side by side."""
    opset, chosen = draw.choice(OPSETS), []
    while len(chosen) < 6:
        op = draw.choice(sorted(RECIPES.keys() - VALUES_DECIDE))
        number = draw.randrange(len(RECIPES[op]))
        if not RECIPES[op][number].since <= opset <= RECIPES[op][number].until:
            continue
        sandwich = Sandwich(op, opset, number, draw.choice(["conv", "matmul"]))
        if any(other.name == sandwich.name for other in chosen):
            continue
        try:
            result = next(iter(run(session(model_of([sandwich]).SerializeToString()), samples).values()))[0]
            sandwich.middle = (result.shape, result.dtype.type)
            run(session(model_of([sandwich]).SerializeToString()), samples)
        except Exception:  # noqa: BLE001 - not every operator is there at every opset
            continue
        chosen.append(sandwich)
    return model_of(chosen)


def some_options(draw, model):
    """Options that each make sense, if not together."""
    options = []
    if draw.random() < 0.3:
        options += ["--preset", draw.choice(PRESETS)]
    operators = sorted({node.op_type for node in model.graph.node})
    names = [node.name for node in model.graph.node if node.name]
    for _ in range(draw.randrange(3)):
        place = draw.choice(["default", "default", f"op_type.{draw.choice(operators)}", f"layer.{draw.choice(names)}"])
        kind = draw.choice(sorted(KEYS))
        key = draw.choice(sorted(KEYS[kind]))
        options += ["--set", f"{place}.{kind}.{key}={draw.choice(KEYS[kind][key])}"]
    for _ in range(draw.randrange(3)):
        site = draw.choice(["", ".input", ".output", ".weight", ".bias"])
        options += [draw.choice(["--enable", "--disable"]), draw.choice(names) + site]
    return options


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("amax", nargs="?", default=os.environ.get("AMAX") or ROOT / "target/debug/amax")
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = np.random.default_rng(3)
    samples = {"image": rng.standard_normal((SAMPLES, 1, 4, 8, 8)).astype(np.float32),
               "rows": rng.standard_normal((SAMPLES, 4, 16)).astype(np.float32)}
    digits = onnx.load(ROOT / "models/digits.onnx")
    passed, refused, failures = 0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "float.onnx", Path(scratch) / "quantized.onnx"
        for number in range(args.seed, args.seed + args.count):
            draw = random.Random(number)
            model = digits if draw.random() < 0.2 else some_model(draw, samples)
            onnx.save(model, path)
            options = ["--target", draw.choice(TARGETS), "--calib", draw.choice(["random", "random", "random", "none"]), *some_options(draw, model)]
            out.unlink(missing_ok=True)
            done = subprocess.run([args.amax, "rewrite", path, out, "--no-guard", "-q", *options], capture_output=True, text=True)
            name = f"seed {number}: {' '.join(options)}"
            if done.returncode not in (0, 2, 3, 4, 5):
                failures.append(f"{name}: exit code {done.returncode}: {done.stderr.strip()[:400]}")
                continue
            if done.returncode != 0:
                refused += 1
            elif options[1].startswith("ort-cpu"):
                try:
                    loaded = session(str(out))
                    feeds = {i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], np.float32) for i in loaded.get_inputs()}
                    loaded.run(None, feeds)
                except Exception as error:  # noqa: BLE001 - onnxruntime refusing the file is what is looked for
                    failures.append(f"{name}: onnxruntime refuses it: {str(error)[:300]}")
                    continue
            passed += 1
    for line in failures:
        print(f"FAILED {line}")
    print(f"{refused} of {args.count} configurations are refused with a reason")
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
