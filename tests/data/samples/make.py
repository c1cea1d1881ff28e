"""Writes the sample files beside this script, and cases.json: what numpy says is in them.

Needs numpy, onnx, ml_dtypes and Pillow 11 (13 resizes rows before columns in some cases). Run it in this folder; the files do not change from run to run.
"""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from PIL import Image

HERE = Path(__file__).parent

# Models by their inputs: name, type, shape (None: any rank), whether there is a default.
MODELS = {
    "rows": [["x", "float", ["n", 3], False]],
    "batch": [["x", "float", [1, 3], False]],
    "half": [["x", "float16", ["n", 3], False]],
    "brain": [["x", "bfloat16", ["n", 3], False]],
    "words": [["text", "string", ["n"], False]],
    "tokens": [
        ["ids", "int64", [1, "seq"], False],
        ["bias", "float", [2], True],
        ["mask", "int64", [1, "seq"], False],
        ["temperature", "float", [], False],
    ],
    "types": [
        [name, name, [2], False]
        for name in ["bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64", "float16", "double"]
    ],
    "unranked": [["x", "float", None, False], ["y", "float", [2], False]],
    "nchw": [["image", "float", ["n", 3, "h", "w"], False]],
    "nhwc": [["image", "float", [1, 6, 7, 3], False]],
    "gray": [["image", "float16", [1, 1, "h", "w"], False]],
    "pixels": [["image", "uint8", ["n", 3, "h", "w"], False]],
    "wide": [["image", "double", [3, "h", "w"], False]],
    "four": [["image", "float", [4, 3, 6, 7], False]],
    "pair": [["image", "float", [1, 3, 6, 7], False], ["size", "int64", [1, 2], False]],
    "bert": [
        ["input_ids", "int64", ["b", "s"], False],
        ["attention_mask", "int64", ["b", "s"], False],
        ["token_type_ids", "int32", ["b", "s"], False],
        ["position_ids", "int64", ["s"], False],
    ],
    "free": [["x", "float", ["n", "a", "b"], False]],
}

ONNX_NAME = {"float32": "float", "float64": "double"}
WANTED = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}

cases = []


def folder(name):
    path = HERE / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    """As numpy does, with a fixed date."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            if isinstance(content, np.ndarray):
                out = io.BytesIO()
                np.lib.format.write_array(out, content, allow_pickle=True)
                name, content = name + ".npy", out.getvalue()
            info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            info.compress_type = compression
            archive.writestr(info, content)


def good(path, model, samples, **options):
    """A set that opens with these options, and the samples in it by input."""
    listed = []
    for sample in samples:
        entry = {}
        for name, dtype, _, _ in MODELS[model]:
            if name in sample:
                value = np.asarray(sample[name])
                if dtype == "string":
                    entry[name] = [dtype, list(value.shape), [str(v) for v in value.flat]]
                    continue
                value = value.astype(WANTED.get(dtype, dtype))
                entry[name] = [dtype, list(value.shape), np.ascontiguousarray(value).tobytes().hex()]
        listed.append(entry)
    cases.append({"path": path, "model": model, "samples": listed, **options})


def bad(path, model, **options):
    """A set that does not open, or does not read; the error is in a snapshot."""
    cases.append({"path": path, "model": model, **options})


def tensor(path, value, name=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(onnx.numpy_helper.from_array(value, name).SerializeToString(deterministic=True))


for old in ("good", "bad"):
    shutil.rmtree(HERE / old, ignore_errors=True)
g, b = folder("good"), folder("bad")

# One input, in every form of storage.
x = (np.arange(24, dtype=np.float32).reshape(4, 2, 3) / 8) - 1
rows = [{"x": row} for row in x]
stored = zipfile.ZIP_STORED
deflated = zipfile.ZIP_DEFLATED
for name, array, compression in [
    ("rows", x, stored),
    ("deflated", x, deflated),
    ("float64", x.astype(np.float64) + 1e-12, stored),
    ("float16", x.astype(np.float16), stored),
    ("big_endian", x.astype(">f4"), stored),
    ("big_endian_deflated", x.astype(">f8"), deflated),
    ("fortran", np.asfortranarray(x), stored),
    ("fortran_deflated", np.asfortranarray(x), deflated),
]:
    write_zip(g / f"{name}.npz", [("x", array)], compression)
    want = array.astype(np.float32) if name == "float64" else x
    good(f"good/{name}.npz", "rows", [{"x": row} for row in want])
write_zip(g / "arr_0.npz", [("arr_0", x)])
good("good/arr_0.npz", "rows", rows)
for name, array in [("one", x[0]), ("one_fortran", np.asfortranarray(x[0]))]:
    write_zip(g / f"{name}.npz", [("x", array)], deflated)
    good(f"good/{name}.npz", "rows", [{"x": x[0]}])
special = np.array([[[np.nan, np.inf, -np.inf]], [[-0.0, 1e-45, 3.4e38]]], np.float32)
write_zip(g / "special.npz", [("x", special)])
good("good/special.npz", "rows", [{"x": row} for row in special])
write_zip(g / "extra.npz", [("x", x), ("readme.txt", b"how these were made"), ("folder/", b"")])
good("good/extra.npz", "rows", rows)
write_zip(g / "batch.npz", [("x", x.reshape(8, 1, 3))])
good("good/batch.npz", "batch", [{"x": row} for row in x.reshape(8, 1, 3)])
limit, zipfile.ZIP64_LIMIT, zipfile.ZIP_FILECOUNT_LIMIT = zipfile.ZIP64_LIMIT, 10, 0
write_zip(g / "zip64.npz", [("x", x)], deflated)
zipfile.ZIP64_LIMIT, zipfile.ZIP_FILECOUNT_LIMIT = limit, 65535
good("good/zip64.npz", "rows", rows)
commented = io.BytesIO((g / "rows.npz").read_bytes())
with zipfile.ZipFile(commented, "a") as archive:
    archive.comment = b"PK\x05\x06 is how an end starts"
(g / "commented.npz").write_bytes(commented.getvalue())
good("good/commented.npz", "rows", rows)
np.save(g / "rows.npy", x)
good("good/rows.npy", "rows", rows)
np.save(g / "fortran.npy", np.asfortranarray(x))
good("good/fortran.npy", "rows", rows)
for version in [(2, 0), (3, 0)]:
    with open(g / f"version{version[0]}.npy", "wb") as out:
        np.lib.format.write_array(out, x, version)
    good(f"good/version{version[0]}.npy", "rows", rows)
np.save(g / "half.npy", x.astype(np.float16))
good("good/half.npy", "half", rows)
np.save(g / "brain.npy", x.astype(ml_dtypes.bfloat16))
good("good/brain.npy", "brain", rows)

# Several inputs: narrower integers, one value shared by all rows, defaults left out or given.
ids = np.arange(12, dtype=np.int32).reshape(3, 1, 4) - 5
mask = (np.arange(12) % 3 > 0).astype(np.uint8).reshape(3, 1, 4)
warm = np.float32(0.5)
for name, compression in [("tokens", stored), ("tokens_deflated", deflated)]:
    write_zip(g / f"{name}.npz", [("mask", mask), ("temperature", np.array(warm)), ("ids", ids)], compression)
    good(f"good/{name}.npz", "tokens", [{"ids": i, "mask": m, "temperature": warm} for i, m in zip(ids, mask)])
bias = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
temperatures = np.array([1, 2, 3], np.float32)
write_zip(g / "defaults.npz", [("bias", bias), ("ids", ids), ("mask", mask), ("temperature", temperatures)])
good(
    "good/defaults.npz",
    "tokens",
    [{"ids": i, "mask": m, "temperature": t, "bias": c} for i, m, t, c in zip(ids, mask, temperatures, bias)],
)
samples = []
for name, length in [("a", 1), ("sample2", 2), ("sample10", 3), ("z", 0)]:
    part = {"ids": np.full((1, length), length), "mask": np.ones((1, length), bool).astype(np.int8), "temperature": warm}
    write_zip(folder("good/ragged") / f"{name}.npz", [(k, np.array(v)) for k, v in part.items()])
    samples.append(part)
(g / "ragged/.hidden.npz").write_bytes(b"not read")
(g / "ragged/notes.md").write_bytes(b"not read")
good("good/ragged", "tokens", samples)
write_zip(folder("good/many") / "1.npz", [("x", x)])
write_zip(g / "many/2.npz", [("x", x[:2, :1])], deflated)
np.save(g / "many/3.npy", x[3])
good("good/many", "rows", rows + [{"x": x[0, :1]}, {"x": x[1, :1]}, {"x": x[3]}])

types = {n: np.array([[0, 1], [1, 0], [1, 1]]).astype(WANTED.get(n, n)) for n, _, _, _ in MODELS["types"]}
for name in ["int8", "int16", "int32"]:
    types[name][1] = [-128, 127]
types["uint64"][1] = [2**64 - 1, 2**63]
write_zip(g / "types.npz", list(types.items()))
good("good/types.npz", "types", [{n: a[i] for n, a in types.items()} for i in range(3)])
narrow = {"int16": "int8", "int32": "uint16", "uint16": "uint8", "uint32": "uint16", "uint64": "uint32"}
narrow |= {"double": "float16"}
widened = {n: a.astype(narrow.get(n, a.dtype)) for n, a in types.items()}
write_zip(g / "narrow.npz", list(widened.items()))
good("good/narrow.npz", "types", [{n: a[i] for n, a in widened.items()} for i in range(3)])
y = np.arange(6, dtype=np.float32).reshape(3, 2)
u = np.arange(15, dtype=np.float32).reshape(3, 5)
write_zip(g / "unranked.npz", [("x", u), ("y", y)])
good("good/unranked.npz", "unranked", [{"x": p, "y": q} for p, q in zip(u, y)])
write_zip(g / "unranked_one.npz", [("x", u), ("y", y[0])])
good("good/unranked_one.npz", "unranked", [{"x": u, "y": y[0]}])

# ONNX test data: names, or positions among the inputs without defaults.
samples = []
for index, number in enumerate([0, 2, 10]):
    path = folder(f"good/onnx/test_data_set_{number}")
    part = {"ids": ids[index].astype(np.int64), "mask": mask[index].astype(np.int64), "temperature": np.array(warm)}
    names = [("", "", ""), ("temperature", "ids", "mask"), ("", "", "")][index]
    for position, name in enumerate(names):
        tensor(path / f"input_{position}.pb", part[name or list(part)[position]], name)
    tensor(path / "output_0.pb", np.zeros(1, np.float32))
    samples.append(part)
good("good/onnx", "tokens", samples)
good("good/onnx/test_data_set_2", "tokens", samples[1:2])
tensor(g / "double.pb", x[0].astype(np.float64), "x")
good("good/double.pb", "rows", [{"x": x[0]}])
words = np.array(["a", "bc"], object)
tensor(g / "words/input_0.pb", words)
good("good/words", "words", [{"text": words}])
typed = onnx.helper.make_tensor("x", onnx.TensorProto.FLOAT, [2, 3], x[0].flatten().tolist())
(g / "typed.pb").write_bytes(typed.SerializeToString(deterministic=True))
good("good/typed.pb", "rows", [{"x": x[0]}])


# What does not fit.
def bad_npz(name, members, model="rows", compression=stored):
    write_zip(b / f"{name}.npz", members, compression)
    bad(f"bad/{name}.npz", model)


bad_npz("unknown_key", [("mask", mask), ("temprature", np.array(warm)), ("ids", ids)], "tokens")
bad_npz("unknown_far", [("zzz", x)])
bad_npz("missing", [("mask", mask), ("ids", ids)], "tokens")
bad_npz("rank", [("x", x[0, 0])])
bad_npz("rank_high", [("x", x[None, None])])
bad_npz("shape", [("x", x[:, :, :2])])
bad_npz("batched", [("x", x[:, 0])], "batch")
bad_npz("type_int", [("ids", ids.astype(np.float32)), ("mask", mask), ("temperature", np.array(warm))], "tokens")
bad_npz("type_wide", [(n, a.astype(np.int64) if n == "int32" else a) for n, a in types.items()], "types")
bad_npz("type_sign", [(n, a.astype(np.int8) if n == "uint16" else a) for n, a in types.items()], "types")
bad_npz("type_half", [("x", x)], "half")
bad_npz("type_brain", [("x", x)], "brain")
bad_npz("type_bytes", [("x", (x * 8).astype(np.uint8))])
bad_npz("type_raw", [("x", x.astype(ml_dtypes.bfloat16))])
bad_npz("objects", [("x", np.array([x[0], x[0, :1]], object))])
bad_npz("structured", [("x", np.zeros(2, [("a", "f4"), ("b", "f4")]))])
bad_npz("strings", [("text", np.array(["a", "bc"]))], "words")
bad_npz("complex", [("x", x.astype(np.complex64))])
bad_npz("dates", [("x", np.zeros(3, "M8[s]"))])
bad_npz("counts", [("ids", ids), ("mask", mask[:2]), ("temperature", np.array(warm))], "tokens")
bad_npz("no_rows", [("x", x[:0])])
bad_npz("no_arrays", [("x.txt", b"1 2 3")])
bad_npz("not_npy", [("x.npy", b"1 2 3 4 5 6 7 8")])
bad_npz("cut_header", [("x.npy", (g / "rows.npy").read_bytes()[:50])])
bad_npz("cut_array", [("x.npy", (g / "rows.npy").read_bytes()[:-4])])
bad_npz("long_array", [("x.npy", (g / "rows.npy").read_bytes() + b"more")])
bad_npz("bzip2", [("x", x)], compression=zipfile.ZIP_BZIP2)
whole = (g / "rows.npz").read_bytes()
packed = (g / "deflated.npz").read_bytes()


def bad_bytes(name, content, model="rows"):
    (b / name).write_bytes(content)
    bad(f"bad/{name}", model)


bad_bytes("truncated.npz", whole[:200])
bad_bytes("empty.npz", b"")
bad_bytes("array.npz", (g / "rows.npy").read_bytes())
bad_bytes("text.npz", b"x: 1 2 3\n" * 20)
bad_bytes("directory.npz", whole[:-22] + whole[-22:-6] + b"\xf0\xff\xff\x7f" + whole[-2:])
flipped = bytearray(whole)
flipped[200] ^= 1
bad_bytes("flipped.npz", flipped)
flipped = bytearray(packed)
flipped[100] ^= 1
bad_bytes("flipped_deflated.npz", flipped)
duplicate = io.BytesIO()
with zipfile.ZipFile(duplicate, "w") as archive:
    for _ in range(2):
        archive.writestr(zipfile.ZipInfo("x.npy", (2020, 1, 1, 0, 0, 0)), (g / "rows.npy").read_bytes())
bad_bytes("duplicate.npz", duplicate.getvalue())
encrypted = bytearray(whole)
encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
bad_bytes("encrypted.npz", encrypted)
bomb = bytearray(packed)
at = bomb.index(b"PK\x01\x02") + 24
bomb[at : at + 4] = struct.pack("<I", 0xFFFFFF00)
bad_bytes("bomb.npz", bomb)


def npy(header, data=b""):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


bad_bytes("header.npy", npy("{'descr': '<f4', 'fortran_order': Maybe, 'shape': (2, 3), }"))
bad_bytes("header_keys.npy", npy("{'descr': '<f4', 'shape': (2, 3), }"))
bad_bytes("header_nested.npy", npy("{'shape': " + "(" * 5000))
bad_bytes("header_negative.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 3), }"))
bad_bytes("header_long.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{")
bad_bytes("header_version.npy", b"\x93NUMPY\x09\x00\x02\x00{}")
bad_bytes("overflow.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 3), }"))
bad_bytes("huge.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 1, 3), }"))
bad_bytes("cut.npy", (g / "rows.npy").read_bytes()[:-1])
np.save(b / "keyless.npy", ids)
bad("bad/keyless.npy", "tokens")
bad_bytes("samples.txt", b"1 2 3")
bad("bad/does_not_exist", "rows")
(folder("bad/images") / "1.png").write_bytes(b"\x89PNG")
bad("bad/images", "rows")
(folder("bad/nothing") / ".gitkeep").write_bytes(b"")
bad("bad/nothing", "rows")
shutil.copy(g / "rows.npy", folder("bad/mixed") / "rows.npy")
tensor(b / "mixed/input_0.pb", x[0])
bad("bad/mixed", "rows")
shutil.copy(g / "rows.npy", folder("bad/one_bad") / "1.npy")
np.save(b / "one_bad/2.npy", x[:, :, :1])
bad("bad/one_bad", "rows")
bad_bytes("garbage.pb", b"\xff\xfe\xfd")
external = onnx.numpy_helper.from_array(x[0], "x")
onnx.external_data_helper.set_external_data(external, "weights.bin")
external.ClearField("raw_data")
bad_bytes("external.pb", external.SerializeToString(deterministic=True))
short = onnx.numpy_helper.from_array(x[0], "x")
short.raw_data = short.raw_data[:-4]
bad_bytes("short.pb", short.SerializeToString(deterministic=True))
tensor(b / "rows.pb", x, "x")
bad("bad/rows.pb", "rows")
tensor(b / "strings.pb", words, "x")
bad("bad/strings.pb", "rows")
tensor(b / "int.pb", x[0].astype(np.int32), "x")
bad("bad/int.pb", "rows")
tensor(b / "two/input_0.pb", x[0], "x")
tensor(b / "two/input_1.pb", x[0], "x")
bad("bad/two", "rows")
tensor(b / "position/input_1.pb", x[0])
bad("bad/position", "rows")
tensor(b / "incomplete/input_0.pb", ids[0].astype(np.int64))
bad("bad/incomplete", "tokens")

# Images. Pillow decodes and resizes them.
random = np.random.default_rng(5)


def picture(height, width, channels=3):
    """Smooth enough to be a picture, with edges that overshoot."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 127 * np.sin(x / (2 + c) + y / (3 - c / 2)) for c in range(channels)]
    noise = random.integers(-40, 40, (height, width, channels))
    return np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


FILTERS = {
    name: getattr(Image.Resampling, name.upper()) for name in ["nearest", "box", "bilinear", "bicubic", "lanczos"]
}


def unfiltered(image, width, height, support, kernel):
    """Resizing without antialiasing, which Pillow does not have: a kernel of one size, in integers of 22 bits."""
    data = np.asarray(image).astype(np.int64)
    for axis, size in ((1, width), (0, height)):
        if data.shape[axis] == size:
            continue
        out = []
        for o in range(size):
            centre = (o + 0.5) * (data.shape[axis] / size)
            taps = range(max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), data.shape[axis]))
            weights = np.array([kernel(t - centre + 0.5) for t in taps])
            weights = weights / weights.sum() * (1 << 22)
            fixed = np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
            rows = np.moveaxis(data, axis, 0)[taps.start : taps.stop]
            out.append((np.tensordot(fixed, rows, (0, 0)) + (1 << 21)) >> 22)
        data = np.moveaxis(np.clip(np.stack(out), 0, 255), 0, axis)
    return Image.fromarray(data.astype(np.uint8))


def prepared(path, color="rgb", mode=None, size=None, crop=None, filter="bilinear", multiple=1, pad=114, kernel=None,
             scale=1 / 255, mean=0.0, std=1.0, layout="NCHW", dtype=np.float32):
    """What the spec makes of an image."""
    image = Image.open(path).convert("L" if color == "gray" else "RGB")
    w, h = image.size
    height, width = size if isinstance(size, tuple) else (size, size)
    if mode in ("shorter", "longer", "height"):
        by_height = {"shorter": h <= w, "longer": h >= w, "height": True}[mode]
        height, width = (size, int(size * w / h)) if by_height else (int(size * h / w), size)
        if multiple > 1:
            height, width = (max((n + multiple // 2) // multiple, 1) * multiple for n in (height, width))
    if mode == "letterbox":
        ratio = min(height / h, width / w)
        inner = image.resize((round(w * ratio), round(h * ratio)), FILTERS[filter])
        image = Image.new(image.mode, (width, height), pad if color == "gray" else (pad,) * 3)
        image.paste(inner, ((width - inner.size[0]) // 2, (height - inner.size[1]) // 2))
    elif kernel:
        image = unfiltered(image, width, height, *kernel)
    elif mode:
        image = image.resize((width, height), FILTERS[filter])
    if crop:
        left, top = round((image.size[0] - crop[1]) / 2), round((image.size[1] - crop[0]) / 2)
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    data = np.asarray(image)
    data = data[..., None] if data.ndim == 2 else data
    if color == "bgr":
        data = data[..., ::-1]
    if dtype != np.uint8:
        data = ((data.astype(np.float64) * scale - np.array(mean)) / np.array(std)).astype(dtype)
    data = data.transpose(2, 0, 1) if "CHW" in layout else data
    return data[None] if layout[0] == "N" else data


album = {
    "9x13.png": Image.fromarray(picture(9, 13)),
    "10.png": Image.fromarray(picture(12, 8)),
    "gray.png": Image.fromarray(picture(8, 8, 1)[..., 0]),
    "palette.png": Image.fromarray(picture(8, 9)).quantize(16),
    "transparent.png": Image.fromarray(picture(11, 8, 4), "RGBA"),
}


def save_album(path, names=tuple(album)):
    for name in names:
        album[name].save(folder(path) / name)


def album_case(name, model, toml, names=tuple(album), **spec):
    """A folder with a spec in it."""
    save_album(f"good/pictures/{name}", names)
    (g / "pictures" / name / "preprocess.toml").write_text(toml)
    ordered = sorted(names, key=lambda n: (not n[0].isdigit(), int(n.split("x")[0].split(".")[0]) if n[0].isdigit() else n))
    want = [{"image": prepared(g / "pictures" / name / n, **spec)} for n in ordered]
    good(f"good/pictures/{name}", model, want)


for name in FILTERS:
    album_case(
        name, "nchw", f'interpolation = "{name}"\nresize = {{ size = [6, 17], mode = "exact" }}\n',
        mode="exact", size=(6, 17), filter=name,
    )
two = ("9x13.png", "10.png")
for name, support, kernel in [
    ("bilinear", 1, lambda x: max(1 - abs(x), 0)),
    ("bicubic", 2, lambda x: (1.5 * abs(x) - 2.5) * x * x + 1 if abs(x) < 1
        else max(-0.5 * (((abs(x) - 5) * abs(x) + 8) * abs(x) - 4), -9) if abs(x) < 2 else 0),
]:
    album_case(
        f"plain_{name}", "nchw",
        f'antialias = false\ninterpolation = "{name}"\nresize = {{ size = [4, 5], mode = "exact" }}\n',
        names=two, mode="exact", size=(4, 5), kernel=(support, kernel),
    )
album_case(
    "imagenet", "nchw",
    'input = "image"\ncolor = "rgb"\ncrop = 6\nscale = "1/255"\nmean = [0.485, 0.456, 0.406]\n'
    'std = [0.229, 0.224, 0.225]\nlayout = "NCHW"\ndtype = "float32"\n[resize]\nsize = 7\nmode = "shorter"\n',
    mode="shorter", size=7, crop=(6, 6), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)
album_case(
    "bgr", "nhwc", 'color = "bgr"\nscale = 1\nmean = 127.5\nstd = [127.5, 64, 2.5]\nresize = { mode = "exact" }\n',
    color="bgr", mode="exact", size=(6, 7), scale=1, mean=127.5, std=(127.5, 64, 2.5), layout="NHWC",
)
album_case(
    "letterbox", "pixels", 'resize = { size = [8, 10], mode = "letterbox", pad = 7 }\n',
    mode="letterbox", size=(8, 10), pad=7, dtype=np.uint8,
)
album_case(
    "height", "gray", 'resize = { size = 5, mode = "height" }\n',
    mode="height", size=5, color="gray", dtype=np.float16,
)
album_case(
    "multiple", "wide", 'resize = { size = 12, mode = "longer", multiple = 4 }\ninterpolation = "bicubic"\n',
    mode="longer", size=12, multiple=4, filter="bicubic", layout="CHW", dtype=np.float64,
)
album_case("as_they_are", "pixels", "", names=two, dtype=np.uint8)
album_case("cut", "pixels", "crop = [8, 7]\n", names=two, crop=(8, 7), dtype=np.uint8)
# Folders in folders, and a spec that is named.
save_album("good/classes/cat", two[:1])
save_album("good/classes/dog", two[1:])
(g / "bytes.toml").write_text("crop = 8\n")
want = [{"image": prepared(g / "classes" / n, crop=(8, 8), dtype=np.uint8)} for n in ("cat/9x13.png", "dog/10.png")]
good("good/classes", "pixels", want, preprocess="good/bytes.toml")
good("good/classes/dog/10.png", "pixels", want[1:], preprocess="good/bytes.toml")
# 16 bits become 8 by rounding. Another decoder computes other pixels from a JPEG file: see the test of that name.
deep = random.integers(0, 65536, (6, 7)).astype(np.uint16)
Image.fromarray(deep).save(folder("good/deep") / "deep.png")
shallow = np.rint(deep / 257).astype(np.uint8)
good("good/deep", "pixels", [{"image": np.broadcast_to(shallow, (1, 3, 6, 7))}], preprocess="empty.toml")
(HERE / "empty.toml").write_text("")
photo = Image.fromarray(picture(64, 80)).resize((160, 120), FILTERS["bicubic"])
for name, options in [("444", {"subsampling": 0}), ("420", {"subsampling": 2}), ("progressive", {"progressive": True})]:
    photo.save(folder("good/jpeg") / f"{name}.jpg", quality=85, **options)
    decoded = Image.open(g / "jpeg" / f"{name}.jpg").convert("RGB")
    decoded.save(folder("good/jpeg_decoded") / f"{name}.png", optimize=True)

for name in ("cut_png", "spec_key", "spec_word", "spec_size", "spec_std", "spec_mean", "spec_uint8", "spec_gray", "spec_pad",
             "spec_input", "spec_crop", "spec_layout", "spec_shape", "no_spec", "spec_toml", "spec_multiple", "spec_dtype"):
    save_album(f"bad/{name}", two)
(b / "cut_png/10.png").write_bytes((b / "cut_png/10.png").read_bytes()[:200])
for name, model, toml in [
    ("cut_png", "pixels", ""),
    ("spec_key", "nchw", 'resize = { size = 8, mode = "exact" }\nmeen = 0.5\n'),
    ("spec_word", "nchw", 'resize = { size = 8, mode = "exakt" }\n'),
    ("spec_size", "nchw", 'resize = { mode = "shorter" }\n'),
    ("spec_std", "nchw", "crop = 8\nstd = [1, 0, 1]\n"),
    ("spec_mean", "nchw", "crop = 8\nmean = [1, 2]\n"),
    ("spec_uint8", "pixels", "crop = 8\n\nscale = 1\n"),
    ("spec_gray", "nchw", 'crop = 8\ncolor = "gray"\n'),
    ("spec_pad", "nchw", 'resize = { size = 8, mode = "exact", pad = 3 }\n'),
    ("spec_input", "nchw", 'input = "imgae"\n'),
    ("spec_crop", "nchw", "crop = 10\n"),
    ("spec_layout", "nchw", 'layout = "HWC"\n'),
    ("spec_shape", "nhwc", "crop = 8\n"),
    ("spec_toml", "nchw", "crop = \n"),
    ("spec_multiple", "nchw", 'resize = { size = 8, mode = "exact", multiple = 4 }\n'),
    ("spec_dtype", "nchw", 'dtype = "uint8"\n'),
]:
    (b / name / "preprocess.toml").write_text(toml)
    bad(f"bad/{name}", model)
bad("bad/no_spec", "nhwc")
bad("bad/no_spec", "rows", preprocess="empty.toml")
bad("bad/no_spec", "four", preprocess="good/bytes.toml")
bad("bad/no_spec", "pair", preprocess="good/bytes.toml")
bad("bad/no_spec", "pixels", preprocess="nowhere.toml")
bad("good/rows.npz", "rows", preprocess="empty.toml")
save_album("bad/both", two)
shutil.copy(g / "rows.npy", b / "both/rows.npy")
bad("bad/both", "rows")

# Lines of JSON.
sentences = [[101, 7592, 102], [101, 2088, 2003, 2307, 102]]


def filled(ids):
    length = len(ids)
    return {"input_ids": [ids], "attention_mask": np.ones((1, length)), "token_type_ids": np.zeros((1, length)),
            "position_ids": np.arange(length)}


def write_lines(path, lines, ending="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ending.join(l if isinstance(l, str) else json.dumps(l) for l in lines).encode())


def lines(name, model, content, want, ending="\n"):
    write_lines(g / name, content, ending)
    good(f"good/{name}", model, want)


lines("lists.jsonl", "bert", sentences, [filled(s) for s in sentences])
lines("objects.jsonl", "bert", [{"input_ids": s} for s in sentences] + ["", "  "], [filled(s) for s in sentences])
lines("windows.jsonl", "bert", ["\ufeff[5, 6]", "[7]", ""], [filled([5, 6]), filled([7])], "\r\n")
lines("batch.jsonl", "bert", [{"input_ids": [[1, 2], [3, 4]]}], [
    {"input_ids": [[1, 2], [3, 4]], "attention_mask": np.ones((2, 2)), "token_type_ids": np.zeros((2, 2)),
     "position_ids": [0, 1]}])
given = {"input_ids": [1, 2], "attention_mask": [1, 0], "token_type_ids": [[0, 1]], "position_ids": [4, 5]}
lines("given.jsonl", "bert", [given], [
    {"input_ids": [[1, 2]], "attention_mask": [[1, 0]], "token_type_ids": [[0, 1]], "position_ids": [4, 5]}])
lines("floats.jsonl", "rows", [[[0.1, 2, -3e-9]], [1, 2, 3], [[1, 2, 3], [4, 5, 6]]],
      [{"x": [[0.1, 2, -3e-9]]}, {"x": [[1, 2, 3]]}, {"x": [[1, 2, 3], [4, 5, 6]]}])
types = {"bool": [True, False], "int8": [-128, 127], "int16": [1, 2], "int32": [-5, 6], "uint8": [0, 255],
         "uint16": [0, 65535], "uint32": [1, 4294967295], "uint64": [1, 18446744073709551615], "float16": [0.1, 3],
         "double": [0.1, 1e300]}
lines("types.jsonl", "types", [types, {**types, "bool": [0, 1]}], [
    {k: np.array(v, dtype=k) for k, v in types.items()},
    {k: np.array(v, dtype=k) for k, v in {**types, "bool": [0, 1]}.items()}])
lines("many_lines/1.jsonl", "bert", [[1], [2, 3]], [filled([1]), filled([2, 3])])
write_lines(g / "many_lines/2.jsonl", [[4]])
good("good/many_lines", "bert", [filled([1]), filled([2, 3]), filled([4])])
for name, model, content in [
    ("not_json", "bert", [[1], "[1, 2"]),
    ("word", "bert", ["[1]", "hello"]),
    ("number", "bert", ["3"]),
    ("text", "bert", [["a", "b"]]),
    ("float", "bert", [[1.5]]),
    ("range", "types", [{**types, "int8": [1, 200]}]),
    ("key", "bert", [{"input_id": [1]}]),
    ("lacks", "pair", [{"size": [1, 2]}]),
    ("ambiguous", "pair", [[1, 2]]),
    ("ragged", "rows", [[[1, 2, 3], [1, 2]]]),
    ("depth", "rows", [[[1, 2, 3], 4]]),
    ("width", "rows", [[[1, 2, 3]], [[1, 2]]]),
    ("nothing", "bert", ["", ""]),
    ("empty_list", "bert", [[]]),
    ("untokened", "bert", [{"attention_mask": [1, 1]}]),
]:
    write_lines(b / f"{name}.jsonl", content)
    bad(f"bad/{name}.jsonl", model)

# Bare elements.
def raw(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.ascontiguousarray(array).tobytes())


three = np.arange(9, dtype=np.float32).reshape(3, 1, 3)
raw(g / "three.bin", three)
good("good/three.bin", "rows", [{"x": row} for row in three])
raw(g / "bins/2.bin", three[:1])
raw(g / "bins/10.bin", three[1:])
good("good/bins", "rows", [{"x": row} for row in three])
good("good/three.bin", "rows", [{"x": three[:, 0]}], dims={"n": 3})
good("good/three.bin", "free", [{"x": three.reshape(1, 3, 3)}], dims={"b": 3})
good("good/three.bin", "free", [{"x": three.reshape(1, 3, 3)}], dims={"x.1": 3})
good("good/three.bin", "free", [{"x": row.reshape(1, 3, 1)} for row in three], dims={"a": 3, "b": 1})
pixels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(1, 3, 4, 5)
raw(g / "pixels.bin", pixels)
good("good/pixels.bin", "pixels", [{"image": pixels}], dims={"w": 5})
fixed = np.arange(252, dtype=np.float32).reshape(2, 1, 3, 6, 7)
raw(g / "named/image.bin", fixed)
raw(g / "named/size.bin", np.array([[6, 7]], np.int64))
good("good/named", "pair", [{"image": f, "size": [[6, 7]]} for f in fixed])
for i in range(2):
    raw(g / f"folders/{i}/image.bin", fixed[i])
    raw(g / f"folders/{i}/size.bin", np.array([[6, i]], np.int64))
good("good/folders", "pair", [{"image": fixed[i], "size": [[6, i]]} for i in range(2)])
raw(b / "odd.bin", np.zeros(7, np.float32))
raw(b / "empty.bin", np.zeros(0, np.float32))
bad("bad/odd.bin", "rows")
bad("bad/empty.bin", "rows")
bad("good/three.bin", "free")
bad("good/three.bin", "free", dims={"c": 3})
bad("good/three.bin", "free", dims={"a": 5})
bad("good/three.bin", "rows", dims={"m": 3})
bad("good/three.bin", "unranked")
bad("good/three.bin", "pair")
bad("good/three.bin", "words")
raw(b / "misnamed/img.bin", fixed[0])
raw(b / "misnamed/size.bin", np.array([[6, 7]], np.int64))
bad("bad/misnamed", "pair")
raw(b / "uneven/image.bin", fixed)
raw(b / "uneven/size.bin", np.array([[6, 7]] * 3, np.int64))
bad("bad/uneven", "pair")
bad("good/rows.npz", "rows", dims={"n": 9})

with open(HERE / "cases.json", "w") as out:
    json.dump({"models": MODELS, "cases": cases}, out, indent=0)
    out.write("\n")
