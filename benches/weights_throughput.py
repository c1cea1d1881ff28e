#!/usr/bin/env python3
"""4-bit weights of a large model, as whole processes: amax, `cp` of the same bytes, and onnxruntime's own tool.

    benches/weights_throughput.py [--gigabytes 1] [--rounds 5] [--folder DIR] [--only cp,amax,...]

Makes a model of that many 2^30 bytes of float weights with benches/large_model.py in DIR (the system's folder for
temporary files), and deletes it in the end. All run in turn, so that a busy machine hits all alike; the first round
warms the file cache and is not counted. Prints the median and the least wall time, CPU time and the largest resident
memory of each, and the ratios of the medians. The binary is $AMAX, else target/debug/amax. The Python that runs this
needs numpy, onnx, onnxruntime and onnx-ir.

onnxruntime's tool writes MatMulNBits, in blocks of 32, symmetric, as does amax's preset w4 (blocked DequantizeLinear).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import large_model

ROOT = Path(__file__).resolve().parents[1]
AMAX = os.environ.get("AMAX", str(ROOT / "target/debug/amax"))

TOOL = """
import sys, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, DefaultWeightOnlyQuantConfig
config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=0)
tool = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), algo_config=config)
tool.process()
tool.model.save_model_to_file(sys.argv[2], True)
"""


def commands(source, folder):
    out = folder / "out.onnx"
    data = Path(f"{source}.data")
    rewrite = [AMAX, "--quiet", "rewrite", source, out, "--calib", "none", "--preset", "w4"]
    return {
        "cp": ["cp", data, folder / "out.data"],
        "amax": rewrite,
        "amax asym": [*rewrite, "--set", "op_type.MatMul.weight.dtype=uint4", "--set", "op_type.MatMul.weight.symmetric=false"],
        "onnxruntime": [sys.executable, "-c", TOOL, source, out],
    }


# A process begins at the peak memory of the one that starts it, so a small one starts those that are measured.
STARTER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - start
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), wall, cpu, usage.ru_maxrss / 1024]))
"""


def measure(command):
    """Wall seconds, CPU seconds and peak MB of a process."""
    starter = [sys.executable, "-S", "-c", STARTER, *(str(part) for part in command)]
    done = subprocess.run(starter, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status, *figures = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))[:200]}\n{done.stderr[-2000:]}")
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--single", action="store_true", help="weights in the model file itself (not for onnxruntime above 2 GB)")
    parser.add_argument("--only", help="names, separated by commas")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="amax-bench-") as folder:
        folder = Path(folder)
        source = folder / "model.onnx"
        large_model.write(str(source), int(args.gigabytes * 2**30), args.single)
        if args.single:
            (folder / "model.onnx.data").symlink_to(source)
        names = args.only.split(",") if args.only else ["cp", "amax", "amax asym", "onnxruntime"]
        results = {name: [] for name in names}
        for round_number in range(args.rounds + 1):
            for name in names:
                inner = folder / "out"
                inner.mkdir()
                figures = measure(commands(source, inner)[name])
                shutil.rmtree(inner)
                if round_number:
                    results[name].append(figures)
        print(f"{args.gigabytes:g} GiB of float weights, {args.rounds} rounds\n")
        print("| | median s | least s | CPU s | peak MB | of cp |\n|---|---|---|---|---|---|")
        median = {name: statistics.median(wall for wall, _, _ in rows) for name, rows in results.items()}
        for name, rows in results.items():
            walls, cpu, peaks = zip(*rows)
            ratio = f"{median[name] / median['cp']:.2f}" if "cp" in median else ""
            print(f"| {name} | {median[name]:.2f} | {min(walls):.2f} | {statistics.median(cpu):.2f} | {max(peaks):.0f} | {ratio} |")
        if "amax" in median and "onnxruntime" in median:
            print(f"\namax is {median['onnxruntime'] / median['amax']:.1f} times as fast as onnxruntime's tool")


if __name__ == "__main__":
    main()
