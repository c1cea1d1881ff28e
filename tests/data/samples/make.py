"""Writes the sample files beside this script, and cases.json: what numpy says is in them.

Needs numpy, onnx and ml_dtypes. Run it in this folder; the files do not change from run to run.
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


def good(path, model, samples):
    """A set that opens, and the samples in it by input."""
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
    cases.append({"path": path, "model": model, "samples": listed})


def bad(path, model):
    """A set that does not open, or does not read; the error is in a snapshot."""
    cases.append({"path": path, "model": model})


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

with open(HERE / "cases.json", "w") as out:
    json.dump({"models": MODELS, "cases": cases}, out, indent=0)
    out.write("\n")
