#!/usr/bin/env python3
"""Whole processes side by side: `amax calibrate` and the calibrators of onnxruntime.quantization, same model, same samples.

    benches/calibrators.py [DIR] [NAME[=COUNT]...] [--rounds N] [--threads N]

DIR (models/fetched) holds NAME.onnx and NAME.calib.npz; COUNT limits the samples, for both sides. Each process runs in turn,
so that a busy machine hits all alike. Prints the median wall time, CPU time, and the largest resident memory of each, and
how many times amax's figures those of onnxruntime are. The binary is $AMAX, else target/debug/amax, which the one profile
optimizes. Run it in an environment with tests/differential/requirements.txt and sympy.

- amax is one run, whose file serves every observer. "amax" observes every float activation; with what `--report` does
  besides, the ranges of the observer are computed and printed as JSON: "minmax", "entropy", "percentile".
- onnxruntime is one run a calibrator, as `quantize_static` makes it: its defaults, and those operators that quantize_static
  quantizes. The model that it is given is at opset 13 or later already, where quantize_static would need that.
- A baseline that only imports onnxruntime and opens the model is printed as "import"; it is part of the others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vs_onnxruntime import PREPARE, ROOT, binary, measure  # noqa: E402

# Imports happen inside the measured process, and never here: a child's peak memory starts at its parent's.
CALIBRATE = """
import sys, json, numpy
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
model, samples, augmented, method = sys.argv[1:5]
class Rows(CalibrationDataReader):
    def __init__(self, path):
        arrays = dict(numpy.load(path))
        self.feeds = iter([dict(zip(arrays, row)) for row in zip(*arrays.values())])
    def get_next(self):
        return next(self.feeds, None)
calibrator = create_calibrator(model, sorted(set(QLinearOpsRegistry) | set(QDQRegistry)), augmented, CalibrationMethod[method])
if method != "Distribution":
    calibrator.collect_data(Rows(samples))
    ranges = calibrator.compute_data()
    print(len(ranges.data))
"""
IMPORT = CALIBRATE.split("if method")[0].replace("CalibrationMethod[method]", "CalibrationMethod.MinMax")
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
TRIM = """
import sys, numpy
source, target, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
numpy.savez(target, **{name: rows[:count] for name, rows in numpy.load(source).items()})
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "models/fetched", metavar="DIR")
    parser.add_argument("names", nargs="*", default=["minilm", "ppocr_rec", "ppocr_det"], metavar="NAME[=COUNT]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", help="passed on to amax")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    amax, folder = binary().resolve(), args.folder.resolve()
    print(f"{amax} and onnxruntime's calibrators, {args.rounds} rounds, {os.cpu_count()} cores\n")
    everything = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for asked in args.names:
            name, _, count = asked.partition("=")
            model, samples = folder / f"{name}.onnx", folder / f"{name}.calib.npz"
            if not model.exists() or not samples.exists():
                sys.exit(f"error: no {model} with samples\nhint: run models/fetch and models/make_samples.py")
            if count:
                trimmed = scratch / f"{name}.calib.npz"
                subprocess.run([sys.executable, "-c", TRIM, samples, trimmed, count], check=True)
                samples = trimmed
            prepared, augmented = scratch / f"{name}.onnx", scratch / "augmented.onnx"
            subprocess.run([sys.executable, "-c", PREPARE, model, prepared], check=True)
            stats = scratch / f"{name}.safetensors"
            ours = [amax, "calibrate", model, "--calib", samples, "-o", stats, "--quiet"]
            ours += ["--threads", args.threads] if args.threads else []
            commands = {"amax": ours}
            for method in METHODS:
                commands[f"amax {method}"] = [*ours, "--report", "--json", "--observer", method]
            commands["import"] = [sys.executable, "-c", IMPORT, prepared, samples, augmented, "-"]
            for method, theirs in METHODS.items():
                commands[method] = [sys.executable, "-c", CALIBRATE, prepared, samples, augmented, theirs]
            figures = {tool: [] for tool in commands}
            for _ in range(args.rounds):
                for tool, command in list(commands.items()):
                    try:
                        figures[tool].append(measure(command, scratch))
                    except SystemExit as failure:
                        if tool.startswith("amax"):
                            raise
                        # It is what their users see as well.
                        print(f"{asked}: {tool} fails: {str(failure).strip().splitlines()[-1]}", flush=True)
                        del commands[tool], figures[tool]
            found = {tool: [f(column) for f, column in zip((statistics.median, statistics.median, max), zip(*rows))] for tool, rows in figures.items()}
            everything[name] = found
            print(f"{asked}: {model.stat().st_size / 1e6:.1f} MB")
            print(f"  {'':18} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}")
            for tool, (wall, cpu, peak) in found.items():
                print(f"  {tool:18} {wall:8.2f} {cpu:8.2f} {peak:8.0f}")
            for method in (m for m in METHODS if m in found):
                for tool in ("amax", f"amax {method}"):
                    wall, cpu, peak = (theirs / ours for ours, theirs in zip(found[tool], found[method]))
                    print(f"  {method + ' / ' + tool:28} {wall:6.2f} {cpu:8.2f} {peak:8.2f}")
            print(flush=True)
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
