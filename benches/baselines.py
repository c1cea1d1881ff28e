#!/usr/bin/env python3
"""What onnxruntime's own quantizer reaches on the same models, samples and measures: one Markdown table.

    benches/baselines.py DIR [NAME...] [--limit N] [--keep DIR]

DIR holds NAME.onnx, NAME.calib.npz and NAME.eval.npz, as models/fetch and models/make_samples.py leave them.
Needs tests/differential/requirements.txt and sympy (onnxruntime's symbolic shape inference).
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/differential"))
import evaluate  # noqa: E402

from onnxruntime.quantization import (  # noqa: E402
    CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static)
from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: E402

NAMES = ["digits", "ppocr_cls", "orientation", "silero_vad", "magika", "basic_pitch", "minilm", "ppocr_det", "ppocr_rec"]


class Rows(CalibrationDataReader):
    def __init__(self, path):
        arrays = dict(np.load(path))
        count = min(len(array) for array in arrays.values())
        self.feeds = iter([{name: array[i] for name, array in arrays.items()} for i in range(count)])

    def get_next(self):
        return next(self.feeds, None)


def static(source, target, samples, reduce_range=False, operators=None):
    quantize_static(source, target, Rows(samples), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=reduce_range,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=operators)


RECIPES = {
    "static": lambda s, t, c: static(s, t, c),
    "static, reduced range": lambda s, t, c: static(s, t, c, reduce_range=True),
    "static, reduced range, MatMul/Gemm/Conv": lambda s, t, c: static(s, t, c, True, ["MatMul", "Gemm", "Conv"]),
    "dynamic, reduced range": lambda s, t, c: quantize_dynamic(s, t, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8),
}


def prepare(model, prepared):
    """The documented first step, after raising the opset to 13 where the model's is lower: per-channel scales need it."""
    source = onnx.load(model)
    if source.opset_import[0].version < 13:
        source = onnx.version_converter.convert_version(source, 13)
    onnx.save(source, prepared)
    for symbolic in (True, False):
        try:
            quant_pre_process(prepared, prepared, skip_symbolic_shape=not symbolic)
            return
        except Exception as error:  # noqa: BLE001 - skipping the symbolic shapes is its own documented way out
            print(f"{model}: symbolic shapes {symbolic}: {type(error).__name__} {error}"[:200], file=sys.stderr)


def row(name, recipe, result):
    main = result["outputs"][result["output"]]
    task = "; ".join(f"{key} {result['task']['float'][key]:.4f} → {result['task']['on'][key]:.4f} ({result['task']['off'][key]:.4f})"
                     for key in result["task"].get("float", {}))
    kernels, latency = result["kernels"], result["latency"]
    return (f"| {name} | {recipe} | {main['on']['sqnr_db']:.1f} | {main['off']['sqnr_db']:.1f} | {task} | {result['size_ratio']:.2f} | "
            f"{latency['speedup_median']:.2f} | {sum(kernels['integer'].values())} | {sum(kernels['heavy_float'].values())} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--keep", type=Path, help="keep the quantized models here")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print("| model | onnxruntime quantizer | SQNR dB on | off | task: float → on (off) | size | speed-up | integer kernels | float heavy |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        models = args.folder.resolve()
        # The pre-processing leaves files in the working folder.
        os.chdir(scratch)
        for name in args.names:
            model, samples = models / f"{name}.onnx", models / f"{name}.calib.npz"
            prepared = folder / f"{name}.prepared.onnx"
            prepare(model, prepared)
            for recipe, quantize in RECIPES.items():
                target = folder / f"{name}.{recipe.replace(', ', '-').replace('/', '').replace(' ', '-')}.onnx"
                try:
                    quantize(prepared, target, samples)
                    print(row(name, recipe, evaluate.evaluate(model, target, limit=args.limit, latency=True)), flush=True)
                except Exception as error:  # noqa: BLE001 - that a recipe fails is a result
                    print(f"| {name} | {recipe} | fails: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''} ||||||||", flush=True)


if __name__ == "__main__":
    main()
