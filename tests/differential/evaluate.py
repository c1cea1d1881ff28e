#!/usr/bin/env python3
"""Scores a quantized model against its float model in onnxruntime, and prints one JSON object.

    evaluate.py MODEL.onnx QUANTIZED.onnx [--eval NPZ] [--limit N] [--precise] [--latency] [--brief]

The samples are MODEL.eval.npz or MODEL.test.npz beside the model unless --eval names them: an array with one axis more
than its input holds one run a row, another array is fed as it is. Keys that are no input are labels.

Each figure is given for onnxruntime with its optimizations on (as users run it, with fused integer kernels: "on") and
off (Q and DQ computed as written, the file's own numerics: "off"). --precise adds "precise": on, with
session.x64quantprecision=1. A large gap between on and off is a kernel that saturates, or a fusion that changes the result.

The task metric is chosen by the model's name (the file's stem): digits, ppocr_rec, ppocr_cls, ppocr_det, orientation,
minilm, silero_vad, magika; any other name gets SQNR and cosine alone.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

onnxruntime.set_default_logger_severity(4)

# What an operator of the optimized graph tells: computed on integers.
INTEGER = {
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger",
    "MatMulInteger16", "ConvInteger", "QLinearAdd", "QLinearMul", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearConcat", "QLinearWhere", "QLinearReduceMean", "MatMulNBits",
    "GatherBlockQuantized", "QAttention", "QOrderedMatMul", "DynamicQuantizeLSTM", "QEmbedLayerNormalization", "MatMulBnb4",
}
# The operators that quantization is about, where they are left in float.
HEAVY = {"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "TransposeMatMul"}
ORT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
             "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_}


def session(path, mode="on", threads=1, optimized=None):
    """A session of `path`; `mode` is "on", "off" or "precise". `optimized` is where the optimized graph is written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL if mode == "off"
                                        else onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    if mode == "precise":
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def load_samples(model_session, path, limit=None):
    """The feeds of each run, and the labels."""
    arrays = dict(np.load(path))
    inputs = {i.name: i for i in model_session.get_inputs()}
    missing = inputs.keys() - arrays.keys()
    if missing:
        raise ValueError(f"{path} has no array for the inputs {sorted(missing)}; it has {sorted(arrays)}")
    rows = {name: array if array.ndim == len(inputs[name].shape) + 1 else array[None]
            for name, array in arrays.items() if name in inputs}
    count = min(len(array) for array in rows.values())
    if limit:
        count = min(count, limit)
    feeds = [{name: array[i].astype(ORT_TYPES[inputs[name].type], copy=False) for name, array in rows.items()}
             for i in range(count)]
    return feeds, {name: array for name, array in arrays.items() if name not in inputs}


class Noise:
    """Accumulates one output's distance from the reference."""

    def __init__(self):
        self.signal = self.noise = self.dot = self.power = 0.0
        self.largest = 0.0

    def add(self, reference, found):
        if reference.shape != found.shape:
            raise ValueError(f"shape {list(found.shape)} instead of {list(reference.shape)}")
        r, f = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
        self.signal += r @ r
        self.noise += (r - f) @ (r - f)
        self.dot += r @ f
        self.power += f @ f
        self.largest = max(self.largest, float(np.abs(r - f).max(initial=0)))

    @property
    def sqnr_db(self):
        if not np.isfinite(self.noise):
            return -999.0
        return 10 * np.log10(self.signal / self.noise) if self.noise and self.signal else 999.0

    @property
    def cosine(self):
        product = np.sqrt(self.signal * self.power)
        return self.dot / product if product else 1.0


# ---- task metrics: each returns {name: value} from the float outputs, the quantized outputs and the labels

def edit_distance(a, b):
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


class Recognition:
    """Character error rate of greedy CTC decoding. Only the decoded classes are kept: the outputs are large."""
    output = 0

    def __init__(self, model, labels):
        characters = [entry.value for entry in model.metadata_props if entry.key == "character"][0].splitlines()
        self.characters = [""] + characters + [" "]
        self.texts = labels["text"]
        self.decoded = []

    def add(self, output):
        classes = output[0].argmax(-1)
        kept = [c for i, c in enumerate(classes) if c and (i == 0 or c != classes[i - 1])]
        # Blanks at the ends are no characters of the line.
        self.decoded.append("".join(self.characters[c] for c in kept).strip())

    def result(self, reference):
        pairs = list(zip(self.decoded, self.texts))
        errors = sum(min(edit_distance(found, str(text)), len(text)) for found, text in pairs)
        return {"cer": errors / sum(len(text) for _, text in pairs),
                "same_text": np.mean([a == b for a, b in zip(self.decoded, reference.decoded)])}


class Classification:
    output = 0

    def __init__(self, _model, labels):
        self.labels = labels.get("label")
        self.classes = []

    def add(self, output):
        self.classes.extend(output.reshape(-1, output.shape[-1]).argmax(-1))

    def result(self, reference):
        scores = {"agreement": np.mean(np.equal(self.classes, reference.classes))}
        if self.labels is not None:
            scores["accuracy"] = np.mean(np.equal(self.classes, self.labels[:len(self.classes)]))
        return scores


class Threshold:
    """Agreement and intersection over union of output > threshold."""
    output = 0

    def __init__(self, limit):
        self.limit = limit
        self.above = []

    def add(self, output):
        self.above.append((output > self.limit).ravel())

    def result(self, reference):
        a, b = np.concatenate(self.above), np.concatenate(reference.above)
        return {"agreement": np.mean(a == b), "iou": (a & b).sum() / max(1, (a | b).sum())}


class SentencePairs:
    """Correlation of the cosine similarities of sentence pairs (rows 2i and 2i+1) with those of the float model."""
    output = "461"

    def __init__(self, _model, _labels):
        self.vectors = []

    def add(self, output):
        self.vectors.append(output[0].astype(np.float64))

    def similarities(self):
        vectors = np.stack(self.vectors[:len(self.vectors) // 2 * 2])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors[0::2] * vectors[1::2]).sum(1)

    def result(self, reference):
        found, expected = self.similarities(), reference.similarities()
        ranks = [np.argsort(np.argsort(x)) for x in (found, expected)]
        own = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(self.vectors, reference.vectors)]
        return {"pearson": np.corrcoef(found, expected)[0, 1], "spearman": np.corrcoef(*ranks)[0, 1],
                "vector_cosine_mean": np.mean(own), "vector_cosine_min": np.min(own)}


METRICS = {
    "digits": Classification, "orientation": Classification, "ppocr_cls": Classification, "magika": Classification,
    "ppocr_rec": Recognition, "minilm": SentencePairs,
    "ppocr_det": lambda _model, _labels: Threshold(0.3),
    "silero_vad": lambda _model, _labels: Threshold(0.5),
}


# ---- the graphs

def model_bytes(path):
    """The file and its external data."""
    model = onnx.load(path, load_external_data=False)
    files = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return Path(path).stat().st_size + sum((Path(path).parent / file).stat().st_size for file in files)


def check(path):
    """None, or what onnx's checker (with shape inference) says against the file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - the checker raises several unrelated kinds
        return str(error)[:500]
    return None


def producers(graph):
    return {output: node for node in graph.node for output in node.output}


def output_steps(model):
    """The quantization step of each graph output that a DequantizeLinear with one scale makes."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = producers(model.graph)
    steps = {}
    for output in model.graph.output:
        node = made_by.get(output.name)
        if node is not None and node.op_type == "DequantizeLinear" and node.input[1] in constants:
            scale = onnx.numpy_helper.to_array(constants[node.input[1]])
            if scale.size == 1:
                steps[output.name] = float(scale.item())
    return steps


def optimized_graph(path):
    """What onnxruntime makes of the file: kernels by operator, and the heavy operators that it runs in float although
    the file has them quantized."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "optimized.onnx"
        session(path, "on", optimized=file)
        graph = onnx.load(file).graph
    made_by, constants = producers(graph), {tensor.name for tensor in graph.initializer}
    counts = Counter(node.op_type for node in graph.node)

    def unfused(node):
        # Data behind a DQ alone is a float operator that reads a quantized neighbour; a constant behind one is quantized.
        makers = [made_by.get(name) for name in node.input[:2]]
        dequantized = [maker for maker in makers if maker is not None and maker.op_type == "DequantizeLinear"]
        return len(dequantized) == 2 or any(maker.input[0] in constants for maker in dequantized)

    heavy = [node for node in graph.node if node.op_type in HEAVY]
    # MatMulNBits may hide in a QDQ file: level 4 also quantizes the activation, which is its own source of noise.
    return {
        "integer": {op: n for op, n in sorted(counts.items()) if op in INTEGER},
        "quantize_dequantize": {op: counts[op] for op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
                                if counts[op]},
        "heavy_float": dict(sorted(Counter(node.op_type for node in heavy).items())),
        "unfused": [f"{node.op_type} {node.name}" for node in heavy if unfused(node)],
    }


# ---- scores

def measure_latency(model, quantized, feed, seconds=3.0):
    """Median milliseconds of both, run in turn on one thread, so that a busy machine hits both alike."""
    pair = [session(model), session(quantized)]
    times = [[], []]
    for one in pair:
        one.run(None, feed)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 5:
        for one, spent in zip(pair, times):
            start = time.perf_counter()
            one.run(None, feed)
            spent.append((time.perf_counter() - start) * 1e3)
    medians = [float(np.median(spent)) for spent in times]
    return {"float_ms": medians[0], "quantized_ms": medians[1], "speedup_median": medians[0] / medians[1],
            "speedup_best": min(times[0]) / min(times[1]), "runs": len(times[0])}


def find_samples(model):
    for suffix in (".eval.npz", ".test.npz"):
        path = Path(model).with_suffix(suffix)
        if path.exists():
            return path
    raise FileNotFoundError(f"no {Path(model).stem}.eval.npz or .test.npz beside {model}")


def evaluate(model, quantized, samples=None, limit=None, precise=False, latency=False):
    """All figures for one pair of files; see the module's text. Raises what onnxruntime raises if a file does not load."""
    name = Path(model).stem
    float_session = session(model)
    feeds, labels = load_samples(float_session, samples or find_samples(model), limit)
    outputs = [o.name for o in float_session.get_outputs()]
    modes = ["on", "off"] + (["precise"] if precise else [])
    sessions = {mode: session(quantized, mode) for mode in modes}
    for mode, one in sessions.items():
        if [o.name for o in one.get_outputs()] != outputs:
            raise ValueError(f"outputs {[o.name for o in one.get_outputs()]} instead of {outputs}")

    float_model = onnx.load(model)
    metric = METRICS.get(name)
    tasks = {mode: metric(float_model, labels) for mode in ["float"] + modes} if metric else {}
    watched = 0
    if metric:
        watched = next(iter(tasks.values())).output
        watched = outputs.index(watched) if isinstance(watched, str) else watched
    noises = {mode: {} for mode in modes}
    gaps = {}
    for feed in feeds:
        reference = float_session.run(None, feed)
        found = {mode: one.run(None, feed) for mode, one in sessions.items()}
        for index, output in enumerate(outputs):
            if reference[index].dtype.kind != "f":
                continue
            for mode in modes:
                noises[mode].setdefault(output, Noise()).add(reference[index], found[mode][index])
            gaps.setdefault(output, Noise()).add(found["off"][index], found["on"][index])
        for mode, task in tasks.items():
            task.add((reference if mode == "float" else found[mode])[watched])

    steps = output_steps(onnx.load(quantized))
    float_bytes, bytes_ = model_bytes(model), model_bytes(quantized)
    result = {
        "model": name, "samples": len(feeds), "checker": check(quantized), "bytes": bytes_, "float_bytes": float_bytes,
        "size_ratio": bytes_ / float_bytes, "kernels": optimized_graph(quantized), "outputs": {},
        "task": {mode: task.result(tasks["float"]) for mode, task in tasks.items()},
    }
    for output in gaps:
        entry = {}
        for mode in modes:
            noise = noises[mode][output]
            entry[mode] = {"sqnr_db": noise.sqnr_db, "cosine": noise.cosine, "max_error": noise.largest}
        entry["on_off"] = {"sqnr_db": gaps[output].sqnr_db, "max": gaps[output].largest}
        if output in steps:
            entry["on_off"]["max_steps"] = gaps[output].largest / steps[output]
        result["outputs"][output] = entry
    result["output"] = outputs[watched]
    if latency:
        result["latency"] = measure_latency(model, quantized, feeds[0])
    return result


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}")
    return int(value) if isinstance(value, np.integer) else value


def brief(result):
    """One line of the figures that are compared most."""
    main = result["outputs"].get(result["output"]) or next(iter(result["outputs"].values()))
    task = "  ".join(f"{key} {result['task']['float'][key]:.4f} -> {result['task']['on'][key]:.4f} ({result['task']['off'][key]:.4f})"
                     for key in result["task"].get("float", {}))
    kernels = result["kernels"]
    return (f"{result['model']:12} SQNR on {main['on']['sqnr_db']:.2f} off {main['off']['sqnr_db']:.2f} dB  size {result['size_ratio']:.3f}  "
            f"{task}  integer {sum(kernels['integer'].values())} float {sum(kernels['heavy_float'].values())} "
            f"unfused {len(kernels['unfused'])}"
            + (f"  speed x{result['latency']['speedup_median']:.2f}" if "latency" in result else "")
            + ("" if result["checker"] is None else "  CHECKER FAILS"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--eval", type=Path, metavar="NPZ")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N runs")
    parser.add_argument("--precise", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--brief", action="store_true", help="one line instead of JSON")
    args = parser.parse_args()
    try:
        result = rounded(evaluate(args.model, args.quantized, args.eval, args.limit, args.precise, args.latency))
    except Exception as error:  # noqa: BLE001 - whatever a broken model makes the libraries raise
        sys.exit(f"error: {args.quantized}: {error}")
    print(brief(result) if args.brief else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
