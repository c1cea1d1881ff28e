#!/usr/bin/env python3
"""Quantizes real models with the amax binary and lets onnx and onnxruntime judge the result.

    python3 tests/differential/run.py [NAME...] [--fetched] [--models DIR] [--keep DIR]

Without names: digits; with --fetched also every model that models/fetch and models/make_samples.py put in
models/fetched (or --models DIR). The binary is $AMAX, else target/debug/amax. Where the pinned packages of
requirements.txt are not installed, they are put into target/differential-venv, and the script goes on there.
Closes with the line "N passed, N failed"; the exit code is 1 if anything failed.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"


def installed():
    for line in REQUIREMENTS.read_text().split():
        package, version = line.split("==")
        try:
            if importlib.metadata.version(package) != version:
                return False
        except importlib.metadata.PackageNotFoundError:
            return False
    return True


def enter_environment():
    """Goes on in the pinned environment, which it makes if there is none."""
    if installed():
        return
    folder = ROOT / "target/differential-venv"
    python = folder / "bin/python"
    if Path(sys.prefix).resolve() == folder.resolve():
        sys.exit(f"error: {folder} does not have what {REQUIREMENTS} asks for\nhint: remove it and run again")
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != REQUIREMENTS.read_text():
        print(f"making {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", REQUIREMENTS], check=True)
        done.write_text(REQUIREMENTS.read_text())
    os.execv(python, [python, *sys.argv])


# name: {figure: (relation, limit)}. A figure is of `task`, as onnxruntime runs it, `..._drop` is float minus quantized, and
# sqnr_db is that of the watched output. Limits leave room for processors that round differently.
LIMITS = {
    "digits": {"accuracy_drop": ("<=", 0.005), "sqnr_db": (">=", 30)},
    "minilm": {"pearson": (">=", 0.998), "spearman": (">=", 0.998), "sqnr_db": (">=", 27)},
    "ppocr_rec": {"cer_drop": (">=", -0.005), "sqnr_db": (">=", 12)},
    "ppocr_cls": {"agreement": (">=", 0.99)},
    "ppocr_det": {"agreement": (">=", 0.99), "iou": (">=", 0.95), "sqnr_db": (">=", 16)},
    "orientation": {"agreement": (">=", 0.99)},
    "silero_vad": {"agreement": (">=", 0.995), "iou": (">=", 0.99), "sqnr_db": (">=", 35)},
    "magika": {"agreement": (">=", 0.985), "sqnr_db": (">=", 38)},
    "basic_pitch": {"sqnr_db": (">=", 12)},
}
# How much worse onnxruntime's fused kernels may be than the file's own numerics. More means that a kernel saturates
# or that a fusion reads the file differently. On AVX2 and AVX-512 without VNNI this proves that pair-safe weights do not
# saturate; with VNNI no kernel can, so there it shows only that fusions keep the meaning of the file.
# How much worse onnxruntime's fused kernels may be than the file's own numerics. More means that a kernel saturates
# or that a fusion reads the file differently.
LARGEST_GAP_DB = 0.5
# Above this SQNR the difference between two correct roundings counts more than the noise that is compared.
GAP_CEILING_DB = 40


# Models small enough to run once more with everything excluded, and through `amax compare`.
SMALL = {"digits", "ppocr_cls"}
# Excluding everything still lets passes over the float graph fuse what changes a last bit.
FLOAT_DB = 100
# How far `amax compare` may be from onnxruntime about the same two files and samples.
COMPARE_DB = 0.5


class Checks:
    def __init__(self):
        self.passed, self.failures = 0, []

    def check(self, model, name, holds, figure=""):
        if holds:
            self.passed += 1
        else:
            self.failures.append(f"{model}: {name} {figure}".rstrip())
        return holds


def rewrite(amax, model, output, *options):
    start = time.monotonic()
    process = subprocess.run([amax, "rewrite", model, output, *options], capture_output=True, text=True)
    said = " | ".join(process.stderr.strip().splitlines()[-3:])
    return process.returncode == 0 and output.exists(), f"exit code {process.returncode}: {said}", time.monotonic() - start


def holds(value, relation, limit):
    return value >= limit if relation == ">=" else value <= limit


def judge(checks, name, result):
    """Checks one evaluation's figures; returns the cells of its row."""
    main = result["outputs"][result["output"]]
    on, off = main["on"]["sqnr_db"], main["off"]["sqnr_db"]
    kernels, task = result["kernels"], result["task"]
    checks.check(name, "onnx.checker", result["checker"] is None, result["checker"] or "")
    for output, entry in result["outputs"].items():
        gap = min(entry["off"]["sqnr_db"], GAP_CEILING_DB) - min(entry["on"]["sqnr_db"], GAP_CEILING_DB)
        checks.check(name, f"onnxruntime's kernels agree with the file ({output})", gap <= LARGEST_GAP_DB,
                     f"{entry['off']['sqnr_db']:.2f} dB as written, {entry['on']['sqnr_db']:.2f} dB as run")
    checks.check(name, "some kernels are integer", sum(kernels["integer"].values()) > 0)
    checks.check(name, "what is quantized is fused", not kernels["unfused"], "; ".join(kernels["unfused"][:8]))
    for figure, (relation, limit) in LIMITS.get(name, {}).items():
        if figure == "sqnr_db":
            value = on
        elif figure.endswith("_drop"):
            value = task["float"][figure[:-5]] - task["on"][figure[:-5]]
        else:
            value = task["on"][figure]
        checks.check(name, f"{figure} {relation} {limit}", holds(value, relation, limit), f"is {value:.4f}")
    steps = main["on_off"].get("max_steps")
    return [f"{on:.1f}", f"{off:.1f}", "-" if steps is None else f"{steps:.1f}", f"{main['on']['cosine']:.5f}",
            f"{result['size_ratio']:.2f}", str(sum(kernels["integer"].values())), str(sum(kernels["heavy_float"].values())),
            str(len(kernels["unfused"])),
            " ".join(f"{key} {value:.4f}->{task['on'][key]:.4f}" for key, value in task.get("float", {}).items()) or "-"]


def run_small(checks, amax, model, output, folder):
    """Two checks against the binary's own claims."""
    from evaluate import evaluate

    name, samples = model.stem, model.with_suffix(".calib.npz")
    excluded = folder / f"{name}.excluded.onnx"
    fine, said, _ = rewrite(amax, model, excluded, "--exclude", "*")
    if checks.check(name, "amax rewrite --exclude '*'", fine, said):
        result = evaluate(model, excluded, samples)
        worst = min(entry["off"]["sqnr_db"] for entry in result["outputs"].values())
        checks.check(name, "excluding everything keeps the outputs", worst >= FLOAT_DB, f"{worst:.1f} dB")
        checks.check(name, "excluding everything quantizes nothing", not result["kernels"]["quantize_dequantize"])
    process = subprocess.run([amax, "compare", model, output, "--json"], capture_output=True, text=True)
    try:
        rows = json.loads(process.stdout)
    except ValueError:
        rows = []
    if checks.check(name, "amax compare", process.returncode == 0 and rows, process.stderr.strip()[-300:] or process.stdout[:300]):
        outputs = evaluate(model, output, samples)["outputs"]
        for row in rows:
            # JSON has no infinity: equal outputs come as null.
            ours, theirs = row["sqnr_db"] or 999, outputs[row["output"]]["off"]["sqnr_db"]
            gap = min(ours, GAP_CEILING_DB) - min(theirs, GAP_CEILING_DB)
            checks.check(name, f"amax compare agrees with onnxruntime ({row['output']})", abs(gap) <= COMPARE_DB,
                         f"{ours:.2f} dB, onnxruntime {theirs:.2f} dB")


# What configurations make of models: options, and the least SQNR of the first output.
CONFIGURED = {
    "digits": {
        "int8-dynamic": (["--preset", "int8-dynamic"], 30.0),
        "w8": (["--preset", "w8"], 30.0),
        "w4": (["--preset", "w4"], 20.0),
        "a16w8": (["--preset", "a16w8"], 30.0),
        "uint8 weights": (["--set", "default.weight.dtype=uint8"], 28.0),
        "groups": (["--set", "default.weight.granularity=per-group", "--set", "default.weight.group_size=4"], 35.0),
        "least error": (["--set", "default.input.observer=mse", "--set", "default.output.observer=mse"], 25.0),
        "percentile": (["--set", "default.input.observer=percentile", "--set", "default.output.observer=percentile"], 25.0),
        "entropy": (["--set", "default.input.observer=entropy", "--set", "default.output.observer=entropy"], 20.0),
        "powers of two": (["--set", "default.weight.scale_type=power-of-two"], 25.0),
        "16-bit products": (["--set", "op_type.Gemm.input.dtype=uint16"], 28.0),
    },
    # Two levels: int8, 16 bits at one operator, three layers excluded by name, one layer in groups.
    "ppocr_rec": {
        "two levels": ([
            "--preset", "int8", "--set", "op_type.MatMul.input.dtype=uint16",
            "--set", "layer.p2o.MatMul.24.input.enable=false", "--set", "layer.p2o.MatMul.24.weight.dtype=int4",
            "--set", "layer.p2o.MatMul.24.weight.granularity=per-group", "--set", "layer.p2o.MatMul.24.weight.group_size=24",
            "--exclude", "p2o.Conv.[0-2]",
        ], 10.0),
    },
}


def run_configured(checks, amax, model, folder):
    """Models that were configured load in onnxruntime and are near the float ones; `explain` tells of every site."""
    from evaluate import evaluate

    name = model.stem
    for number, (what, (options, least)) in enumerate(CONFIGURED.get(name, {}).items()):
        output = folder / f"{name}.configured{number}.onnx"
        fine, said, _ = rewrite(amax, model, output, *options)
        if not checks.check(name, f"amax rewrite, {what}", fine, said):
            continue
        try:
            result = evaluate(model, output)
        except Exception as error:  # noqa: BLE001 - onnxruntime refusing the file is what is looked for
            checks.check(name, f"onnxruntime runs it, {what}", False, str(error)[:300])
            continue
        quality = result["outputs"][result["output"]]["on"]["sqnr_db"]
        checks.check(name, f"quality, {what}", quality >= least, f"{quality:.1f} dB, {least} dB are wanted")
        process = subprocess.run([amax, "explain", model, "*", "--json", *options], capture_output=True, text=True)
        sites = json.loads(process.stdout) if process.returncode == 0 else []
        told = sites and all(site["why"] and site["rules"] for site in sites)
        checks.check(name, f"amax explain tells of every site, {what}", told, process.stderr.strip()[-300:])
        output.unlink()


def run_model(checks, amax, model, folder):
    """All checks of one model; returns its row of the table."""
    from evaluate import evaluate

    name = model.stem
    output = folder / f"{name}.int8.onnx"
    fine, said, seconds = rewrite(amax, model, output)
    if not checks.check(name, "amax rewrite", fine, said):
        return [name, f"{seconds:.1f}", "rewrite fails"]
    for threads in ("1", "2"):
        again = folder / f"{name}.threads{threads}.onnx"
        fine, said, _ = rewrite(amax, model, again, "--calib", model.with_suffix(".calib.npz"), "--threads", threads)
        checks.check(name, f"same bytes with --threads {threads}", fine and again.read_bytes() == output.read_bytes(),
                     "the bytes differ" if fine else said)
        again.unlink(missing_ok=True)
    inspected = subprocess.run([amax, "inspect", output], capture_output=True, text=True)
    checks.check(name, "amax inspect", inspected.returncode == 0, inspected.stderr.strip()[-300:])
    try:
        result = evaluate(model, output)
    except Exception as error:  # noqa: BLE001 - onnxruntime refusing the file is what is looked for
        checks.check(name, "onnxruntime loads and runs it", False, str(error)[:300])
        return [name, f"{seconds:.1f}", "onnxruntime refuses it"]
    checks.check(name, "onnxruntime loads and runs it", True)
    if name in SMALL:
        run_small(checks, amax, model, output, folder)
    run_configured(checks, amax, model, folder)
    (folder / f"{name}.json").write_text(json.dumps(result, default=float, indent=1))
    return [name, f"{seconds:.1f}", *judge(checks, name, result)]


def print_table(rows):
    header = ["model", "s", "SQNR on", "off", "steps", "cosine", "size", "integer", "float", "unfused", "task, float->quantized"]
    rows = [header, *(row + [""] * (len(header) - len(row)) for row in rows)]
    widths = [max(len(row[i]) for row in rows if i != 2 or len(row[3])) for i in range(len(header) - 1)]
    for row in rows:
        print("  ".join([cell.ljust(width) for cell, width in zip(row, widths)] + [row[-1]]).rstrip())


# Scripts that end with an error where something is wrong.
OTHERS = {
    "solve": "models made from plans",
    "forms": "every form of weights",
    "blocks": "weights are those of MatMulNBitsQuantizer",
    "formats": "every number format",
    "dynamic": "what is quantized at run time",
    "qoperator": "operators on codes and back",
    "qat": "fake quantizers, before and after",
    "weights": "weights as exporters write them",
    "exports": "models as exporters of transformers write them",
    "sandwich": "every operator between two quantized ones",
    "configurations": "random configurations",
    "clipped": "products in front of a Relu or Clip",
    "../passes/equivalence": "passes, before and after",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--fetched", action="store_true", help="also the models of models/fetched")
    parser.add_argument("--models", type=Path, default=ROOT / "models/fetched", metavar="DIR", help="where the fetched models are")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the quantized models and all figures here")
    args = parser.parse_args()
    enter_environment()

    amax = os.environ.get("AMAX") or ROOT / "target/debug/amax"
    if not Path(amax).exists():
        sys.exit(f"error: no {amax}\nhint: run cargo build first, or set AMAX")
    available = {"digits": ROOT / "models/digits.onnx"}
    available.update((path.stem, path) for path in sorted(args.models.glob("*.onnx")) if path.with_suffix(".eval.npz").exists()
                     and path.stem not in available)
    names = args.names or (list(available) if args.fetched else ["digits"])
    checks, rows = Checks(), []
    for script, what in OTHERS.items():
        done = subprocess.run([sys.executable, ROOT / f"tests/differential/{script}.py", amax],
                              env={**os.environ, "AMAX": str(amax)}, capture_output=True, text=True)
        checks.check(script, what, done.returncode == 0, (done.stdout + done.stderr).strip()[-800:])
    for name in names:
        if name not in available:
            sys.exit(f"error: no model {name!r} with samples\nhint: there are {', '.join(available)}; "
                     "models/fetch and models/make_samples.py make more")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            rows.append(run_model(checks, str(amax), available[name], folder))
            if len(names) > 1:
                print(f"{name} done", file=sys.stderr, flush=True)
    print_table(rows)
    print('SQNR in dB against the float model: "on" as onnxruntime runs the file, "off" as the file is written; "steps": their'
          "\nlargest difference in steps of a quantized output; kernels: integer, float Conv/MatMul/Gemm, and those of them"
          "\nthat are quantized in the file, but not fused.")
    for failure in checks.failures:
        print(f"FAILED {failure}")
    print(f"{checks.passed} passed, {len(checks.failures)} failed")
    sys.exit(bool(checks.failures))


if __name__ == "__main__":
    main()
