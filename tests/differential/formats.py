"""Checks every number format that `amax rewrite` writes against onnx.reference and definitions in numpy and ml_dtypes.

    python tests/differential/formats.py target/debug/amax        (onnx 1.23, onnxruntime 1.31, ml_dtypes)

For each format: the model for `--target generic` runs in onnx.reference, that of `--simulate` in onnx.reference and in
onnxruntime, and in each of them the dequantized weights and activations are those of the definition, bit for bit.
"""

import itertools
import pathlib
import subprocess
import sys
import tempfile

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx.reference import ReferenceEvaluator

f32 = np.float32
ELEMENTS = {  # numpy type, largest, exponent of the largest power of two, bits of the mantissa
    "e4m3": (ml_dtypes.float8_e4m3fn, 448, 8, 3),
    "e5m2": (ml_dtypes.float8_e5m2, 57344, 15, 2),
    "e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, 240, 7, 3),
    "e5m2fnuz": (ml_dtypes.float8_e5m2fnuz, 57344, 15, 2),
    "e2m3": (ml_dtypes.float6_e2m3fn, 7.5, 2, 3),
    "e3m2": (ml_dtypes.float6_e3m2fn, 28, 4, 2),
    "e2m1": (ml_dtypes.float4_e2m1fn, 6, 2, 1),
    "int8": (None, 127, 6, 6),
}


def element(x, name, low=-128):
    dtype, most, _, _ = ELEMENTS[name]
    if dtype is None:
        return np.clip(np.rint(x), low, 127).astype(f32)
    return np.clip(x, -most, most).astype(dtype).astype(f32)


def mx(x, name, mode, low=-128):
    """Blocks of 32 along the last axis."""
    _, most, exponent, bits = ELEMENTS[name]
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True).astype(np.float64)
    with np.errstate(divide="ignore"):
        if mode == "rceil":
            e = np.ceil(np.log2(amax / most))
        elif mode == "ceil":
            e = np.ceil(np.log2(amax)) - exponent
        elif mode == "floor":
            e = np.floor(np.log2(amax)) - exponent
        else:
            raised = (amax.astype(f32).view(np.int32) + (1 << (22 - bits))).view(f32)
            e = np.floor(np.log2(raised.astype(np.float64))) - exponent
    scale = np.exp2(np.clip(e, -127, 127)).astype(f32)
    return (element(blocks / scale, name, low) * scale).reshape(x.shape)


def nvfp4(x, least):
    blocks = x.reshape(-1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    whole = amax.max() / f32(2688)
    scale = np.clip(amax / (f32(6) * whole), f32(least), f32(448)).astype(ml_dtypes.float8_e4m3fn).astype(f32) * whole
    return (element(blocks / scale, "e2m1") * scale).reshape(x.shape)


def tensor(x, name):
    scale = np.abs(x).max() / f32(ELEMENTS[name][1])
    return element(x / scale, name) * scale


def model(path, x):
    r = np.random.default_rng(3)
    weight = (r.standard_normal((96, 64)) * 0.2).astype(f32)
    weight[3] = 0
    weight[5, 7] = 9
    weight[7] *= 1e-5
    graph = h.make_graph(
        [h.make_node("Gemm", ["x", "w"], ["y"], name="fc", transB=1)],
        "net",
        [h.make_tensor_value_info("x", T.FLOAT, ["n", 64])],
        [h.make_tensor_value_info("y", T.FLOAT, ["n", 96])],
        [nh.from_array(weight, "w")],
    )
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, path)
    np.savez(path.with_suffix(".npz"), x=x[:, None])
    return weight


def operands(path, run):
    """Both operands of the product, as `run` computes them."""
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    gemm = next(n for n in made.graph.node if n.op_type == "Gemm")
    constants = {i.name: nh.to_array(i) for i in made.graph.initializer}
    del made.graph.output[:]
    wanted = [n for n in gemm.input[:2] if n not in constants and n != "x"]
    made.graph.output.extend(h.make_tensor_value_info(n, T.FLOAT, None) for n in wanted)
    found = dict(zip(wanted, run(made))) if wanted else {}
    return [found.get(n, constants.get(n)) for n in gemm.input[:2]]  # None for x itself


def main():
    amax = pathlib.Path(sys.argv[1]).resolve()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="amax-formats-"))
    r = np.random.default_rng(5)
    x = (r.standard_normal((40, 64)) * np.exp2(r.integers(-12, 12, (40, 64)))).astype(f32)
    x[3] = 0
    x[4] = np.exp2(r.integers(-6, 6, 64))
    x[5] = 448 * np.exp2(r.integers(-6, 1, 64))
    weight = model(folder / "net.onnx", x)

    # Every finite float16, at a scale of 1.
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)].astype(f32).reshape(-1, 64)
    cases = []
    names = {"mxfp8": "e4m3", "mxfp8e5m2": "e5m2", "mxfp6e2m3": "e2m3", "mxfp6e3m2": "e3m2", "mxfp4": "e2m1"}
    names["mxint8"] = "int8"
    for (dtype, name), mode in itertools.product(names.items(), ("rceil", "floor", "ceil", "even")):
        rounding = [f"{kind}.mx_rounding={mode}" for kind in ("weight", "input")]
        cases.append((dtype, rounding, lambda v, low, n=name, m=mode: mx(v, n, m, low)))
    cases.append(("nvfp4", [], lambda v, _: nvfp4(v, 2.0**-9)))
    torchao = [f"{kind}.eps=0.015625" for kind in ("weight", "input")]
    cases.append(("nvfp4", torchao, lambda v, _: nvfp4(v, 2.0**-6)))
    floats = {"float8e4m3fn": "e4m3", "float8e5m2": "e5m2", "float8e4m3fnuz": "e4m3fnuz", "float8e5m2fnuz": "e5m2fnuz"}
    floats |= {"float6e2m3": "e2m3", "float6e3m2": "e3m2", "float4e2m1": "e2m1"}
    for dtype, name in floats.items():
        plain = ["weight.granularity=per-tensor"]  # The range of x is given: samples that are held out do not count.
        cases.append((dtype, plain, lambda v, _, n=name: tensor(v, n)))

    def reference(feeds):
        return lambda made: ReferenceEvaluator(made).run(None, feeds)

    def onnxruntime(feeds):
        def run(made):
            options = ort.SessionOptions()
            options.log_severity_level = 3
            return ort.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, feeds)

        return run

    for dtype, name in floats.items():
        cases.append((dtype, ["every float16"], lambda v, low, n=name: element(v, n)))
    wrong = 0
    for dtype, more, define in cases:
        every = more == ["every float16"]
        given = half if every else x
        kinds = ["input"] if every else ["weight", "input"]
        sets = [f"default.{kind}.dtype={dtype}" for kind in kinds] + [f"default.{m}" for m in more if not every]
        sets += ["guard.enabled=false", f"default.output.enable={'true' if dtype in floats else 'false'}"]
        if every:
            sets += ["default.weight.dtype=float8e4m3fn", "tensor.x.scale=1.0"]
        elif dtype in floats:
            sets.append(f"tensor.x.range=[{-np.abs(x).max()!r}, {np.abs(x).max()!r}]".replace("np.float32(", "").replace(")", ""))
        runs = [("generic", ["--target", "generic"], reference), ("simulated", ["--simulate"], reference)]
        runs.append(("simulated", ["--simulate"], onnxruntime))
        for what, flags, runtime in runs:
            out = folder / "out.onnx"
            command = [amax, "rewrite", folder / "net.onnx", out, "--calib", folder / "net.npz", *flags]
            command += [word for key in sets for word in ("--set", key)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            label = f"{dtype} {' '.join(more)} {what} {runtime.__name__}"
            if done.returncode:
                print(f"WRONG {label}: {done.stderr}")
                wrong += 1
                continue
            got = operands(out, runtime({"x": given}))
            if any(g is None for g in got):
                print(f"WRONG {label}: an operand stayed float")
                wrong += 1
                continue
            # Zero has a sign in some formats only, and onnx.reference drops it here and there.
            due = [define(given, -128)] + ([] if every else [define(weight, -127)])
            equal = [np.array_equal(g + 0.0, d + 0.0) for g, d in zip(got, due)]
            wrong += not all(equal)
            off = [int((g != d).sum()) for g, d in zip(got, due)]
            print(f"{'ok   ' if all(equal) else 'WRONG'} {label}" + ("" if all(equal) else f" {off} differ"))
    print(f"{len(cases)} formats, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
