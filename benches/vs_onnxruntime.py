#!/usr/bin/env python3
"""Whole processes side by side: `amax rewrite` and onnxruntime's quantize_static, same model, same samples, min-max.

    benches/vs_onnxruntime.py [DIR] [NAME...] [--rounds N] [--threads N]

DIR (models/fetched) holds NAME.onnx and NAME.calib.npz; the names are minilm and ppocr_rec unless given. Both run in
turn, so that a busy machine hits both alike; the first round warms the file cache and is not counted. Prints the median
and the least wall time, CPU time, and the largest resident memory of each, and how many times amax's figures those of
onnxruntime are: "amax" quantizes only, as onnxruntime does; "amax+" also runs both models on the held-out samples, as it
does by itself. The binary is $AMAX, else target/debug/amax, which the one profile optimizes. Run it in an environment with
tests/differential/requirements.txt and sympy.

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
    path = Path(os.environ.get("AMAX") or ROOT / "target/debug/amax")
    if not path.exists():
        sys.exit(f"error: no {path}\nhint: run cargo build first, or set AMAX")
    return path


def row(values, digits):
    *times, peak, written = values
    return " ".join(f"{value:8.2f}" for value in times) + f" {peak:8.{digits}f} {written:11.2f}"


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
            prepared = scratch / f"{name}.onnx"
            outputs = {tool: scratch / f"{name}.{tool}.onnx" for tool in ("amax", "amax+", "onnxruntime")}
            subprocess.run([sys.executable, "-c", PREPARE, model, prepared], check=True)
            rewrite = ["--calib", samples, *(["--threads", args.threads] if args.threads else [])]
            commands = {
                "amax": [amax, "rewrite", model, outputs["amax"], *rewrite, "--no-measure"],
                "amax+": [amax, "rewrite", model, outputs["amax+"], *rewrite],
                "onnxruntime": [sys.executable, "-c", QUANTIZE, prepared, outputs["onnxruntime"], samples],
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
            for tool, rows in figures.items():
                wall, cpu, peak = zip(*rows)
                columns[tool] = (statistics.median(wall), min(wall), statistics.median(cpu), max(peak), outputs[tool].stat().st_size / 1e6)
                print(f"  {tool:12} " + row(columns[tool], 0))
            for tool in ("amax", "amax+"):
                ratios = [theirs / ours for ours, theirs in zip(columns[tool], columns["onnxruntime"])]
                print(f"  {'times ' + tool:12} " + row(ratios, 2))
            print(flush=True)


if __name__ == "__main__":
    main()
