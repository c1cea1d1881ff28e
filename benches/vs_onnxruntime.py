#!/usr/bin/env python3
"""Whole processes side by side: `amax rewrite` and onnxruntime's quantize_static, same model, same samples, min-max.

    benches/vs_onnxruntime.py [DIR] [NAME...] [--rounds N] [--threads N]

DIR (models/fetched) holds NAME.onnx and NAME.calib.npz; the names are minilm and ppocr_rec unless given. Both run in
turn, so that a busy machine hits both alike; the first round warms the file cache and is not counted. Prints the median
and the least wall time, CPU time, and the largest resident memory of each, and their ratios. The binary is $AMAX, else
target/release/amax, else target/debug/amax. Run it in an environment with tests/differential/requirements.txt and sympy.

onnxruntime gets a model that is already at opset 13 or later, where its per-channel scales need that; amax gets the file.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Imports happen inside the measured process, and never here: a child's peak memory starts at its parent's.
PREPARE = """
import sys, onnx, onnx.version_converter
model = onnx.load(sys.argv[1])
if model.opset_import[0].version < 13:
    model = onnx.version_converter.convert_version(model, 13)
onnx.save(model, sys.argv[2])
"""
QUANTIZE = """
import sys, numpy
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
class Rows(CalibrationDataReader):
    def __init__(self, path):
        arrays = dict(numpy.load(path))
        self.feeds = iter([dict(zip(arrays, row)) for row in zip(*arrays.values())])
    def get_next(self):
        return next(self.feeds, None)
quantize_static(sys.argv[1], sys.argv[2], Rows(sys.argv[3]), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True)
"""


def measure(command, folder):
    """Wall seconds, CPU seconds and peak MB of a process and what it waited for."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(map(str, command))[:200]}\n{said[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def binary():
    if "AMAX" in os.environ:
        return Path(os.environ["AMAX"])
    for profile in ("release", "debug"):
        path = ROOT / "target" / profile / "amax"
        if path.exists():
            return path
    sys.exit("error: no amax binary\nhint: run cargo build --release, or set AMAX")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "models/fetched", metavar="DIR")
    parser.add_argument("names", nargs="*", default=["minilm", "ppocr_rec"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", help="passed on to amax")
    args = parser.parse_args()
    amax, folder = binary().resolve(), args.folder.resolve()
    print(f"{amax} and onnxruntime's quantize_static, {args.rounds} rounds, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for name in args.names:
            model, samples = folder / f"{name}.onnx", folder / f"{name}.calib.npz"
            if not model.exists() or not samples.exists():
                sys.exit(f"error: no {model} with samples\nhint: run models/fetch and models/make_samples.py")
            prepared, outputs = scratch / f"{name}.onnx", [scratch / f"{name}.{tool}.onnx" for tool in ("amax", "ort")]
            subprocess.run([sys.executable, "-c", PREPARE, model, prepared], check=True)
            commands = {
                "amax": [amax, "rewrite", model, outputs[0], "--calib", samples, *(["--threads", args.threads] if args.threads else [])],
                "onnxruntime": [sys.executable, "-c", QUANTIZE, prepared, outputs[1], samples],
            }
            figures = {tool: [] for tool in commands}
            for turn in range(args.rounds + 1):
                for tool, command in commands.items():
                    figure = measure(command, scratch)
                    if turn:
                        figures[tool].append(figure)
            print(f"{name}: {model.stat().st_size / 1e6:.1f} MB")
            print(f"  {'':12} {'wall s':>8} {'least':>8} {'CPU s':>8} {'peak MB':>8} {'MB written':>11}")
            columns = {}
            for (tool, rows), output in zip(figures.items(), outputs):
                wall, cpu, peak = zip(*rows)
                columns[tool] = (statistics.median(wall), min(wall), statistics.median(cpu), max(peak), output.stat().st_size / 1e6)
                print(f"  {tool:12} " + " ".join(f"{value:8.2f}" for value in columns[tool][:3])
                      + f" {columns[tool][3]:8.0f} {columns[tool][4]:11.2f}")
            ratios = [b / a for a, b in zip(columns["amax"], columns["onnxruntime"])]
            print(f"  {'ratio':12} " + " ".join(f"{value:8.2f}" for value in ratios[:3]) + f" {ratios[3]:8.2f} {ratios[4]:11.2f}\n", flush=True)


if __name__ == "__main__":
    main()
