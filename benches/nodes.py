#!/usr/bin/env python3
"""CPU time of `amax rewrite` over chains of ever more small products: it is to grow as the number of nodes does.

    benches/nodes.py [--most N] [--limit RATIO]

Rewrites chains of 1,000, 4,000 and 16,000 products of 32 by 32 (up to --most) without samples, with each of the options in
CASES. Prints the least CPU time of three runs, and how many times that of a quarter of the nodes it is. Exits with 1 where that
is above RATIO (4.5). The binary is $AMAX, else target/debug/amax. Needs onnx and numpy.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 32
CASES = {
    "w8": ["--preset", "w8"],
    "w8 matmulnbits": ["--preset", "w8", "--form", "matmulnbits"],
    "w4": ["--preset", "w4"],
    "int8-dynamic": ["--preset", "int8-dynamic"],
}


def chain(count, path):
    """A chain of `count` products, each with a weight of its own."""
    random = np.random.default_rng(count)
    names = ["x", *(f"y{i}" for i in range(count))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"product{i}") for i in range(count)]
    weights = [
        numpy_helper.from_array((random.standard_normal((WIDTH, WIDTH)) * 0.05).astype(np.float32), f"w{i}")
        for i in range(count)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", WIDTH]) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def seconds(command):
    """CPU seconds of a process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}\n{said}")
    return usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=16000)
    parser.add_argument("--limit", type=float, default=4.5)
    options = parser.parse_args()
    binary = os.environ.get("AMAX", ROOT / "target/debug/amax")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        model, result = Path(folder, "model.onnx"), Path(folder, "result.onnx")
        before = {}
        for count in (n for n in (1000, 4000, 16000) if n <= options.most):
            chain(count, model)
            for case, flags in CASES.items():
                command = [binary, "rewrite", model, result, *flags, "--calib", "none", "--quiet"]
                least = min(seconds(command) for _ in range(3))
                ratio = least / before[case] if case in before else float("nan")
                before[case] = least
                # A thousand nodes are done before the process has settled.
                worst = max(worst, ratio) if count > 4000 else worst
                print(f"{case:16} {count:6} nodes  {least:7.2f} s  {ratio:5.2f} times", flush=True)
    if worst > options.limit:
        sys.exit(f"error: {worst:.2f} times the CPU time for four times the nodes; at most {options.limit} are allowed")


if __name__ == "__main__":
    main()
