"""Models as exporters of transformers write them: floats of 16 bits, bodies, functions, onnxruntime's own operators.

    python3 tests/differential/exports.py [AMAX]

Each kind is made here, small and with random weights, beside the float32 model in standard operators that computes the same.
`amax rewrite` must quantize as many weights of it as of that model, in every recipe, and what onnxruntime makes of the result
must be within half a decibel of what it makes of the float32 one, or better. Needs onnx, onnxruntime, numpy and ml_dtypes;
writes the table, then "N passed, N failed", and ends with 1 if anything failed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
onnxruntime.set_default_logger_severity(4)
D, HIDDEN, WORDS = 64, 128, 96
# What 4 bits of random weights are off by between two summation orders and roundings of scales.
SLACK_DB = 0.5
RECIPES = ["w4", "w8", "int8-dynamic", "8da4w", "int8"]
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Build:
    """A graph of one float type, node by node."""

    def __init__(self, dtype):
        self.dtype, self.nodes, self.constants = TYPES[dtype], [], []
        self.type = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.noise = np.random.default_rng(1)

    def constant(self, name, value, dtype=None):
        self.constants.append(numpy_helper.from_array(np.asarray(value).astype(dtype or self.dtype), name))
        return name

    def weight(self, name, *dims):
        return self.constant(name, self.noise.standard_normal(dims) / np.sqrt(dims[0]))

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_node", **attributes))
        return output

    def norm(self, x, output):
        scale = self.constant(f"{output}_scale", 1 + 0.1 * self.noise.standard_normal(D))
        bias = self.constant(f"{output}_bias", 0.1 * self.noise.standard_normal(D))
        return self.node("LayerNormalization", [x, scale, bias], output, axis=-1, epsilon=1e-5)

    def model(self, inputs, output, opset=18):
        graph = helper.make_graph(self.nodes, "g", inputs, [output], self.constants)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=9)


def block(dtype, result=None):
    """A table, norms, attention, two linear layers and a head; `result` is the type of the output."""
    b = Build(dtype)
    b.node("Gather", [b.constant("table", b.noise.standard_normal((WORDS, D))), "ids"], "x0")
    h = b.norm("x0", "h1")
    for part in "qkv":
        b.node("MatMul", [h, b.weight(f"w{part}", D, D)], f"{part}0")
        b.node("Add", [f"{part}0", b.constant(f"b{part}", 0.1 * b.noise.standard_normal(D))], part)
    b.node("Transpose", ["k"], "kt", perm=[0, 2, 1])
    b.node("MatMul", ["q", "kt"], "s0")
    b.node("Mul", ["s0", b.constant("factor", D ** -0.5)], "s1")
    b.node("Softmax", ["s1"], "p", axis=-1)
    b.node("MatMul", ["p", "v"], "a0")
    b.node("MatMul", ["a0", b.weight("wo", D, D)], "a1")
    b.node("Add", ["x0", "a1"], "x1")
    h = b.norm("x1", "h2")
    b.node("MatMul", [h, b.weight("w1", D, HIDDEN)], "m0")
    b.node("Relu", ["m0"], "m1")
    b.node("MatMul", ["m1", b.weight("w2", HIDDEN, D)], "m2")
    b.node("Add", ["x1", "m2"], "x2")
    h = b.norm("x2", "h3")
    b.node("Reshape", [h, b.constant("flat", [-1, D], np.int64)], "h4")
    last = "y" if result is None else "y0"
    b.node("Gemm", ["h4", b.constant("head", 2 * b.noise.standard_normal((WORDS, D)) / 8), b.constant("hb", np.zeros(WORDS))], last, transB=1)
    kind = b.type
    if result is not None:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[result]))
        b.node("Cast", [last], "y", to=kind)
    info = helper.make_tensor_value_info
    return b.model([info("ids", TensorProto.INT64, ["b", "s"])], info("y", kind, ["n", WORDS]))


def merged(dtype, result=None):
    """Two branches with the same names, and the weights outside, as optimum merges decoders."""
    model = block(dtype, result)
    graph, info = model.graph, helper.make_tensor_value_info
    first, second = [helper.make_graph(list(graph.node), name, [], list(graph.output)) for name in ("then", "other")]
    for node in second.node:
        node.op_type = node.op_type.replace("Relu", "Sigmoid")
    choose = helper.make_node("If", ["use_cache_branch"], ["y_chosen"], name="choose", then_branch=first, else_branch=second)
    output = helper.make_tensor_value_info("y_chosen", graph.output[0].type.tensor_type.elem_type, ["n", WORDS])
    inputs = [*graph.input, info("use_cache_branch", TensorProto.BOOL, [])]
    outer = helper.make_graph([choose], "g", inputs, [output], list(graph.initializer))
    return helper.make_model(outer, opset_imports=model.opset_import, ir_version=9)


def fused(operator):
    """onnxruntime's own attention, with the projections inside or in front."""
    b = Build("float32")
    weight, bias = b.weight("wqkv", D, 3 * D), b.constant("bqkv", 0.1 * b.noise.standard_normal(3 * D))
    own = {"num_heads": 4, "domain": "com.microsoft"}
    if operator == "Attention":
        b.node("Attention", ["x", weight, bias], "a", **own)
    else:
        b.node("MatMul", ["x", weight], "p")
        b.node("Add", ["p", bias], "s")
        b.nodes.append(helper.make_node("Split", ["s", b.constant("sizes", [D] * 3, np.int64)], ["q", "k", "v"], name="split", axis=2))
        b.node("MultiHeadAttention", ["q", "k", "v"], "a", **own)
    b.node("MatMul", ["a", b.weight("wo", D, D)], "y")
    info = helper.make_tensor_value_info
    return b.model([info("x", TensorProto.FLOAT, ["b", "s", D])], info("y", TensorProto.FLOAT, ["b", "s", D]))


def products(operator):
    """Two products, the second scaled and with its weight transposed where the operator has that."""
    b = Build("float32")
    first, second = b.weight("w1", D, HIDDEN), b.noise.standard_normal((HIDDEN, D)) / 8
    if operator == "FusedMatMul":
        own = {"domain": "com.microsoft"}
        b.node("FusedMatMul", ["x", first], "h", **own)
        b.node("FusedMatMul", ["h", b.constant("w2", second.T)], "y", alpha=0.25, transB=1, **own)
    else:
        b.node("MatMul", ["x", first], "h")
        b.node("MatMul", ["h", b.constant("w2", second / 4)], "y")
    info = helper.make_tensor_value_info
    return b.model([info("x", TensorProto.FLOAT, ["b", "s", D])], info("y", TensorProto.FLOAT, ["b", "s", D]))


def embedding(operator):
    """Tables of words, positions and segments, the norm of their sum, and a product."""
    b = Build("float32")
    tables = [b.constant(name, b.noise.standard_normal((rows, D))) for name, rows in (("words", WORDS), ("places", 32), ("kinds", 2))]
    scale, bias = b.constant("scale", 1 + 0.1 * b.noise.standard_normal(D)), b.constant("bias", 0.1 * b.noise.standard_normal(D))
    if operator == "EmbedLayerNormalization":
        outputs = ["e", "counted", "summed"]
        own = {"domain": "com.microsoft", "epsilon": 1e-5}
        b.nodes.append(helper.make_node(operator, ["ids", "segments", *tables, scale, bias, "mask"], outputs, name="embedding", **own))
    else:
        b.node("Gather", [tables[0], "ids"], "word")
        b.node("Shape", ["ids"], "shape")
        b.node("Gather", ["shape", b.constant("one", 1, np.int64)], "tokens")
        b.node("Range", [b.constant("zero", 0, np.int64), "tokens", "one"], "range")
        b.node("Gather", [tables[1], "range"], "place")
        b.node("Gather", [tables[2], "segments"], "kind")
        b.node("Add", ["word", "place"], "placed")
        b.node("Add", ["placed", "kind"], "summed")
        b.node("LayerNormalization", ["summed", scale, bias], "e", axis=-1, epsilon=1e-5)
        b.node("ReduceSum", ["mask", b.constant("axis", [1], np.int64)], "counted", keepdims=0)
    b.node("Add", ["e", "summed"], "r")
    b.node("Cast", ["counted"], "share", to=TensorProto.FLOAT)
    b.node("Reshape", ["share", b.constant("column", [-1, 1, 1], np.int64)], "weighing")
    b.node("Mul", ["r", "weighing"], "weighed")
    b.node("MatMul", ["weighed", b.weight("w", D, D)], "y")
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.INT32, ["b", "s"]) for name in ("ids", "segments", "mask")]
    return b.model(inputs, info("y", TensorProto.FLOAT, ["b", "s", D]))


def sentences():
    noise = np.random.default_rng(7)
    draw = lambda most: noise.integers(0, most, (2, 12)).astype(np.int32)
    return [{"ids": draw(WORDS), "segments": draw(2), "mask": draw(2)} for _ in range(12)]


def features():
    noise = np.random.default_rng(7)
    return [{"x": noise.standard_normal((2, 12, D)).astype(np.float32)} for _ in range(12)]


def functions():
    """The two linear layers behind each other as calls of one function."""
    model = block("float32")
    node = helper.make_node
    linear = helper.make_function("torch.nn", "Linear", ["x", "w"], ["y"], [node("MatMul", ["x", "w"], ["y"])], [helper.make_opsetid("", 18)])
    for product in model.graph.node:
        if product.op_type == "MatMul" and product.input[1].startswith("w"):
            product.op_type, product.domain = "Linear", "torch.nn"
    model.functions.append(linear)
    model.opset_import.append(helper.make_opsetid("torch.nn", 1))
    return model


def ids():
    noise = np.random.default_rng(7)
    return [{"ids": noise.integers(0, WORDS, (2, 12)), "use_cache_branch": np.array(True)} for _ in range(12)]


# By name: the model, the float32 model of the same, and samples.
KINDS = {
    "float16": (lambda: block("float16"), lambda: block("float32"), ids),
    "float16, float32 outside": (lambda: block("float16", "float32"), lambda: block("float32"), ids),
    "bfloat16, float32 outside": (lambda: block("bfloat16", "float32"), lambda: block("float32"), ids),
    "Attention": (lambda: fused("Attention"), lambda: fused("MultiHeadAttention"), features),
    "FusedMatMul": (lambda: products("FusedMatMul"), lambda: products("MatMul"), features),
    "EmbedLayerNormalization": (lambda: embedding("EmbedLayerNormalization"), lambda: embedding("Gather"), sentences),
    "float32, --dtype float16": (lambda: block("float32"), lambda: block("float32"), ids, "--dtype", "float16"),
    "functions": (functions, lambda: block("float32"), ids),
    "merged decoder": (lambda: merged("float32"), lambda: block("float32"), ids),
    "merged decoder, float16": (lambda: merged("float16"), lambda: block("float32"), ids),
}


def run(path, samples):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}
    feeds = [{name: value for name, value in sample.items() if name in names} for sample in samples]
    return np.concatenate([session.run(None, feed)[0].astype(np.float64).ravel() for feed in feeds])


def rewrite(amax, source, target, recipe, folder, *more):
    # Biases of 8 bits of mantissa do not hold what samples would add to them.
    options = ["--preset", recipe] + (["--calib", folder, "--algorithm", "none"] if recipe == "int8" else [])
    report = f"{target}.json"
    done = subprocess.run([amax, "-q", "rewrite", source, target, "--report", report, *options, *more], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    onnx.checker.check_model(onnx.load(target), full_check=True)
    return len(json.loads(Path(report).read_text())["weights"])


def figures(amax):
    """What `amax compare` says of logits, beside what follows from onnxruntime's outputs in float64."""
    model = block("float32")
    head = next(node for node in model.graph.node if node.name == "y_node")
    head.op_type, head.input[0] = "MatMul", "h3"
    del head.attribute[:], head.input[2:]
    table = next(t for t in model.graph.initializer if t.name == "head")
    table.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(table).T), "head"))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for size in ("b", "s", WORDS):
        model.graph.output[0].type.tensor_type.shape.dim.add(**{"dim_value" if size == WORDS else "dim_param": size})
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "s"]))
    noise = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: os.path.join(folder, name)
        onnx.save(model, at("m.onnx"))
        os.mkdir(at("samples"))
        given = []
        for index in range(6):
            mask = np.ones((2, 12), np.int64)
            mask[1, 12 - index:] = 0
            given.append({"ids": noise.integers(0, WORDS, (2, 12)), "attention_mask": mask})
            np.savez(at(f"samples/{index}.npz"), **given[-1])
        rewrite(amax, at("m.onnx"), at("q.onnx"), "w4", None)
        words = [amax, "compare", at("m.onnx"), at("q.onnx"), "--calib", at("samples"), "--json"]
        said = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)[0]["logits"]
        rows, following = [[], []], []
        for sample in given:
            kept = sample["attention_mask"] != 0
            for side, name in enumerate(["m.onnx", "q.onnx"]):
                logits = run(at(name), [sample]).reshape(2, 12, WORDS)
                rows[side].append((logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[kept])
            next_kept = np.concatenate([kept[:, 1:], np.zeros((2, 1), bool)], 1)
            following.append(np.where(next_kept, np.roll(sample["ids"], -1, 1), -1)[kept])
        (first, second), following = map(np.concatenate, rows), np.concatenate(following)
    known = np.flatnonzero(following >= 0)
    perplexity = [np.exp(-side[known, following[known]].mean()) for side in (first, second)]
    wanted = {"kl": (np.exp(first) * (first - second)).sum(-1).mean(), "top1": (first.argmax(-1) == second.argmax(-1)).mean(), "perplexity": perplexity}
    print(f"logits: {said}")
    return [f"logits, {name}: {said[name]}, not {wanted[name]}" for name in wanted if not np.allclose(said[name], wanted[name], rtol=0.01)]


def decibels(wanted, found):
    return 10 * np.log10((wanted ** 2).sum() / max(((wanted - found) ** 2).sum(), 1e-300))


def main():
    amax = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else str(ROOT / "target/debug/amax")
    passed, failures = 0, []
    print(f"{'kind':<28}" + "".join(f"{recipe:>22}" for recipe in RECIPES))
    for kind, (make, plain, samples, *more) in KINDS.items():
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            at = lambda name: os.path.join(folder, name)
            onnx.save(make(), at("m.onnx"))
            onnx.save(plain(), at("plain.onnx"))
            given = samples()
            for name in ["m", "plain"]:
                os.mkdir(at(name))
                inputs = {value.name for value in onnx.load(at(f"{name}.onnx")).graph.input}
                for index, sample in enumerate(given):
                    np.savez(at(f"{name}/{index}.npz"), **{key: sample[key] for key in sample if key in inputs})
            wanted = run(at("plain.onnx"), given)
            for recipe in RECIPES:
                try:
                    count = rewrite(amax, at("plain.onnx"), at("plain.q.onnx"), recipe, at("plain"))
                    found = rewrite(amax, at("m.onnx"), at("q.onnx"), recipe, at("m"), *more)
                    least = decibels(wanted, run(at("plain.q.onnx"), given)) - SLACK_DB
                    quality = decibels(wanted, run(at("q.onnx"), given))
                    size = os.path.getsize(at("q.onnx")) / os.path.getsize(at("m.onnx"))
                    cells.append(f"{found} w, {size:.2f}, {quality:.1f} dB")
                    if found < count:
                        failures.append(f"{kind}, {recipe}: {found} weights are quantized, not {count}")
                    elif quality < least:
                        failures.append(f"{kind}, {recipe}: {quality:.2f} dB, below {least:.2f}")
                    else:
                        passed += 1
                except Exception as error:  # noqa: BLE001
                    cells.append("failed")
                    failures.append(f"{kind}, {recipe}: {error}")
        print(f"{kind:<28}" + "".join(f"{cell:>22}" for cell in cells))
    wrong = figures(amax)
    passed, failures = passed + 3 - len(wrong), failures + wrong
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
