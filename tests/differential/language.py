#!/usr/bin/env python3
"""Language models with 4-bit weights: what amax makes of them beside onnxruntime's own tool, run by onnxruntime.

    python3 tests/differential/language.py [--models DIR] [--only NAME]

DIR (models/fetched) is what models/make_language.py filled. For each model and recipe it prints the size, the seconds and
the largest resident memory of the whole quantizing process, and how good the model still is: the perplexity of SmolLM2
on prose, and for both models how often its most likely token is that of the float model (top-1) and the mean divergence
of its tokens' probabilities from those of the float model (KL, in thousandths of a nat). It exits with 1 where a recipe
of amax does worse than the one that it is held to, or not exactly the same where it has the same arithmetic. The binary is $AMAX, else target/debug/amax. Run it in
an environment with tests/differential/requirements.txt and onnx-ir, which onnxruntime's tool imports; its HQQ wants torch too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import onnxruntime

ROOT = Path(__file__).resolve().parents[2]
AMAX = os.environ.get("AMAX", str(ROOT / "target/debug/amax"))

# onnxruntime's recipes: algorithm and options.
TOOL = """
import sys, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import *
source, target, recipe = sys.argv[1:]
form = dict(quant_format=QuantFormat.QDQ) if "qdq" in recipe else {}
if "hqq" in recipe:
    config = HQQWeightOnlyQuantConfig(block_size=32, bits=4, **form)
elif "k-quant" in recipe:
    config = KQuantWeightOnlyQuantConfig(**form)
else:
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric="sym" in recipe.split(), accuracy_level=0, **form)
tool = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False, algo_config=config)
tool.process()
tool.model.save_model_to_file(target, True)
"""

SET = ["--calib", "none", "--set", "op_type.Gather.enable=false"]
# Run by the same kernel as what onnxruntime's tool makes, which leaves the accuracy to the runtime.
NBITS = ["--form", "matmulnbits", "--set", "default.weight.accuracy_level=0"]
W4 = ["--preset", "w4", *SET]
ASYMMETRIC = ["--set", "op_type.MatMul.weight.dtype=uint4", "--set", "op_type.MatMul.weight.symmetric=false"]
MLAS = [*NBITS, "--set", "op_type.MatMul.weight.arithmetic=mlas"]
HQQ = ["--preset", "w4-hqq", *SET, "--set", "op_type.MatMul.weight.group_size=32"]

# Recipe: command, and the recipe that it is held to: by how much of its divergence it may be above, or "equal".
RECIPES = {
    "onnxruntime sym": (["sym"], None, 0),
    "onnxruntime asym": (["asym"], None, 0),
    "onnxruntime hqq": (["hqq"], None, 0),
    "onnxruntime k-quant": (["k-quant"], None, 0),
    "amax w4, arithmetic mlas": ([*W4, *MLAS], "onnxruntime sym", "equal"),
    "amax w4 asymmetric, arithmetic mlas": ([*W4, *ASYMMETRIC, *MLAS], "onnxruntime asym", "equal"),
    "amax w4": (W4, "onnxruntime sym", 0.05),
    "amax w4, amax / 7": ([*W4, "--set", "op_type.MatMul.weight.signed_scale=false"], None, 0),
    "amax w4 asymmetric": ([*W4, *ASYMMETRIC], "onnxruntime asym", 0.05),
    "amax w4-hqq": (HQQ, "amax w4 asymmetric", 0),
    "amax w4-hqq matmulnbits": ([*HQQ, *NBITS], "onnxruntime asym", 0),
    "amax w4-kquant": (["--preset", "w4-kquant", *SET], "onnxruntime k-quant", 0.1),
    "amax int4-weight-only": (["--preset", "int4-weight-only", *SET, "--set", "op_type.MatMul.weight.group_size=32"], None, 0),
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


def log_probabilities(path, data):
    """Of each token but the first, given those before it; and the tokens."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    key = "input_ids" if "input_ids" in data else "tokens"
    lengths = data.get("__lengths__", numpy.full(len(data[key]), data[key].shape[-1]))
    logs, targets = [], []
    for row, length in enumerate(lengths):
        feed = {k: v[row] for k, v in data.items() if not k.startswith("__")}
        feed[key] = feed[key][:, :length]
        logits = session.run(None, feed)[0][0, :-1].astype(numpy.float64)
        logits -= logits.max(1, keepdims=True)
        logits -= numpy.log(numpy.exp(logits).sum(1, keepdims=True))
        logs.append(logits.astype(numpy.float32))
        targets.append(feed[key][0, 1:])
    return numpy.concatenate(logs), numpy.concatenate(targets)


def judge(logs, float_logs, tokens):
    perplexity = float(numpy.exp(-logs[numpy.arange(len(tokens)), tokens].astype(numpy.float64).mean()))
    agreement = float((logs.argmax(1) == float_logs.argmax(1)).mean())
    divergence = float((numpy.exp(float_logs) * (float_logs - logs)).sum(1).mean())
    return perplexity, agreement, divergence


def evaluate(name, folder):
    source = folder / f"{name}.onnx"
    data = dict(numpy.load(folder / f"{name}.eval.npz"))
    float_logs, tokens = log_probabilities(source, data)
    print(f"\n{name}: {len(tokens)} tokens\n")
    print("| recipe | perplexity | top-1 | KL | MB | seconds | peak MB |\n|---|---|---|---|---|---|---|")
    perplexity = judge(float_logs, float_logs, tokens)[0]
    print(f"| float | {perplexity:.3f} | | | {source.stat().st_size / 1e6:.1f} | | |")
    found, failures = {}, []
    for recipe, (arguments, rival, limit) in RECIPES.items():
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
            target = Path(scratch) / "q.onnx"
            if recipe.startswith("amax"):
                command = [AMAX, "--quiet", "rewrite", source, target, *arguments]
            else:
                command = [sys.executable, "-c", TOOL, source, target, *arguments]
            try:
                seconds, _, peak = measure(command)
                size = sum(f.stat().st_size for f in Path(scratch).iterdir())
                logs, _ = log_probabilities(target, data)
            except Exception as error:
                print(f"| {recipe} | failed: {str(error).strip().splitlines()[-1][:150]} |")
                if recipe.startswith("amax"):
                    failures.append(recipe)
                continue
        perplexity, agreement, divergence = found[recipe] = judge(logs, float_logs, tokens)
        print(f"| {recipe} | {perplexity:.3f} | {agreement:.2%} | {divergence * 1000:.2f} | {size / 1e6:.1f} | {seconds:.1f} | {peak:.0f} |", flush=True)
        if rival in found and limit == "equal":
            if found[recipe] != found[rival]:
                failures.append(f"{recipe}: perplexity {perplexity!r}, {rival} {found[rival][0]!r}")
        elif rival in found and divergence > found[rival][2] * (1 + limit):
            failures.append(f"{recipe}: divergence {divergence:.5f}, {rival} {found[rival][2]:.5f}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=ROOT / "models/fetched")
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    failures = []
    for name in args.only or ["smollm2", "whisper_decoder"]:
        failures += [f"{name}: {failure}" for failure in evaluate(name, args.models)]
    print()
    for failure in failures:
        print(f"worse: {failure}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
