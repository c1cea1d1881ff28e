"""References for the ignored test `runtime::real_models`: every float tensor of a model, by onnxruntime.

    python tests/runtime/real_models.py OUT MODEL.onnx [name=dim ...] [--seed=N] [--npz=FILE]

Writes OUT/<stem>/{case.json,data.bin}. Inputs are the first row of each array of FILE, or else standard normal noise
(floats) or small integers. Symbolic dimensions take the value given for their name, else 1. Graph optimisations are off,
so that every tensor exists.
"""

import json
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime as ort

NUMPY = {
    1: np.float32, 2: np.uint8, 3: np.int8, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16,
    11: np.float64,
}


def main(out, path, *dims):
    seed = 0
    high = 20
    bound = {}
    given = {}
    for dim in dims:
        key, value = dim.split("=")
        if key == "--seed":
            seed = int(value)
        elif key == "--npz":
            given = dict(np.load(value))
        elif key == "--high":
            high = int(value)
        else:
            bound[key] = json.loads(value)
    rng = np.random.default_rng(seed)
    model = onnx.load(path)
    initialized = {t.name for t in model.graph.initializer}
    inputs = {}
    for info in model.graph.input:
        if info.name in initialized:
            continue
        tensor = info.type.tensor_type
        shape = [
            bound.get(f"{info.name}.{i}", d.dim_value or bound.get(d.dim_param, 1))
            for i, d in enumerate(tensor.shape.dim)
        ]
        kind = NUMPY[tensor.elem_type]
        if info.name in given:
            value = given[info.name]
            inputs[info.name] = np.asarray(value[0] if value.ndim > len(shape) else value, kind)
            continue
        if info.name in bound:
            value = np.full(shape, bound[info.name], kind)
        elif np.issubdtype(kind, np.floating):
            value = rng.standard_normal(shape).astype(kind)
        elif "mask" in info.name:
            value = np.ones(shape, kind)
        else:
            value = rng.integers(0, 2 if kind is np.bool_ else high, shape).astype(kind)
        inputs[info.name] = value

    # Ask for every output of every node; types are what shape inference finds, or what running tells.
    wanted = [o for n in model.graph.node if n.op_type != "Constant" for o in n.output if o]
    have = {o.name for o in model.graph.output}
    constants = {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
    keep = list(model.graph.output)
    model.graph.output.extend(onnx.ValueInfoProto(name=o) for o in wanted if o not in have)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs)))

    folder = pathlib.Path(out) / pathlib.Path(path).stem
    folder.mkdir(parents=True, exist_ok=True)
    data = bytearray()

    def put(value):
        entry = {"dtype": str(value.dtype), "shape": list(value.shape), "at": len(data)}
        data.extend(np.ascontiguousarray(value).tobytes())
        return entry

    case = {
        "model": str(pathlib.Path(path).resolve()),
        "inputs": {k: put(v) for k, v in inputs.items()},
        "outputs": {o.name: put(values[o.name]) for o in keep if o.name in values},
        "tensors": {
            k: put(v.astype(np.float32))
            for k, v in values.items()
            if k not in constants and isinstance(v, np.ndarray) and np.issubdtype(v.dtype, np.floating)
        },
    }
    (folder / "data.bin").write_bytes(data)
    (folder / "case.json").write_text(json.dumps(case))
    print(folder, {k: v.shape for k, v in inputs.items()}, len(case["tensors"]), "tensors")


main(*sys.argv[1:])
