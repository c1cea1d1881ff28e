"""Runs each fixture and the model in its snapshot in onnxruntime, on random inputs; the outputs must be equal.

    python tests/passes/equivalence.py

Integers must be the same. Floats may differ in rounding: onnxruntime sums in another order where a weight is constant.
"""

import pathlib
import sys

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import onnxruntime as ort

ort.set_default_logger_severity(4)
HERE = pathlib.Path(__file__).parent
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}
# A DynamicQuantizeLSTM approximates its activations otherwise than an LSTM does.
LIMITS = {"raise_qdq_lstm": 1e-4, "lower_lstm": 1e-4}
NARROW = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT2: 2, onnx.TensorProto.UINT2: 2}
# An opset that onnxruntime no longer takes, 4 GB, an int4 Reshape, a division by zero, float4, quantizers of
# activations that are gone, groups out of order, and operators that onnxruntime refuses as the passes do.
NOT_RUN = {
    "lift_old_ir",
    "fold_refuses_growth",
    "fold_small_types",
    "fold_refuses_undefined",
    "simulate_constants",
    "dequantize_all",
    "dequantize_block_scales",
    "raise_qdq_foreign",
    "raise_qoperator_refuses",
    "split_attention",
    # onnxruntime would make the nodes that the pass does not.
    "inline_functions_long",
    "standard_quantizers_refuses",
}
# What passes refuse because it is no valid model.
INVALID = {"dequantize_refuses", "fuse_refuses_parameters", "lift_refuses"}


def in_float32(graph):
    """Has MatMulNBits compute in float32: at other levels it quantizes its other operand as well."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
            if attribute.HasField("g"):
                in_float32(attribute.g)


def parse(text):
    """A model; onnx's parser leaves an element of few bits in an entry of its own, where runtimes expect them packed."""
    model = onnx.parser.parse_model(text)
    for tensor in model.graph.initializer:
        bits = NARROW.get(tensor.data_type)
        if bits and len(tensor.int32_data) == np.prod(tensor.dims, dtype=int):
            codes = np.array(tensor.int32_data) & ((1 << bits) - 1)
            codes = np.append(codes, np.zeros(-len(codes) % (8 // bits), int)).reshape(-1, 8 // bits)
            tensor.raw_data = np.bitwise_or.reduce(codes << (bits * np.arange(8 // bits)), axis=1).astype(np.uint8).tobytes()
            del tensor.int32_data[:]
    in_float32(model.graph)
    return model


def session(model):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(session, variant):
    rng = np.random.default_rng(variant)
    found = {}
    for port in session.get_inputs():
        shape = [d if isinstance(d, int) else 2 for d in port.shape]
        if port.type == "tensor(bool)":
            value = np.full(shape, variant % 2 == 0)
        elif "int" in port.type:
            value = rng.integers(0, 2, shape)
        elif port.type == "tensor(string)":
            value = np.full(shape, "s", object)
        else:
            value = rng.standard_normal(shape)
        found[port.name] = value.astype(TYPES[port.type]) if port.type in TYPES else value
    return found


def check(fixture):
    if fixture.stem in INVALID:
        return "not valid, as meant"
    before = parse("".join(l for l in fixture.open() if not l.startswith("#")))
    snapshot = HERE / "snapshots" / f"{fixture.stem}.txt"
    text = snapshot.read_text()
    after = parse(text[text.index("\n\n") :])
    onnx.checker.check_model(after, full_check=True)
    assert [o.name for o in before.graph.output] == [o.name for o in after.graph.output]
    if fixture.stem in NOT_RUN:
        return "checked only"
    a, b = session(before), session(after)
    worst = 0.0
    for variant in range(4):
        inputs = feeds(a, variant)
        for x, y in zip(a.run(None, inputs), b.run(None, inputs), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype, fixture.name
            if x.dtype.kind != "f":
                assert np.array_equal(x, y), (fixture.name, x, y)
                continue
            assert np.array_equal(np.isfinite(x), np.isfinite(y)), (fixture.name, x, y)
            half = x.dtype == np.float16
            finite = np.isfinite(x)
            x, y = x[finite].astype(np.float64), y[finite].astype(np.float64)
            error = np.max(np.abs(x - y), initial=0) / max(1e-6, np.max(np.abs(x), initial=0))
            worst = max(worst, float(error))
            assert error <= (2e-3 if half else LIMITS.get(fixture.stem, 1e-5)), (fixture.name, error)
    return f"largest relative difference {worst:.1e}"


failed = 0
for fixture in sorted(HERE.glob("*.onnxtxt")):
    try:
        print(f"{fixture.stem}: {check(fixture)}")
    except Exception as error:
        failed += 1
        print(f"{fixture.stem}: FAILED {type(error).__name__}: {str(error)[:400]}")
sys.exit(failed > 0)
