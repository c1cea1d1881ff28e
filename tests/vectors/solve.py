"""Writes solve.json: quantizers and constants, with the scales, zero points and codes that numpy makes of them.

Independent of amax: formulas from the ONNX specification and the documentation of the configuration, written out entry by
entry. Needs numpy and ml_dtypes.
"""

import json
import os

import ml_dtypes
import numpy as np

f32, f64 = np.float32, np.float64
TINY = float(np.finfo(f32).tiny)
INTEGERS = {f"{sign}int{bits}": (bits, sign == "") for bits in (2, 4, 8, 16) for sign in ("", "u")}
FLOATS = {"float8e4m3fn": ml_dtypes.float8_e4m3fn, "float8e5m2": ml_dtypes.float8_e5m2, "float4e2m1": ml_dtypes.float4_e2m1fn}


def code_range(q):
    bits, signed = INTEGERS[q["dtype"]]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if q.get("reduce_range"):
        if q["dtype"] in ("int8", "int16"):
            return -(2 ** (bits - 2)), 2 ** (bits - 2)
        low, high = (-(2 ** (bits - 2)), 2 ** (bits - 2) - 1) if signed else (0, 2 ** (bits - 1) - 1)
    if q.get("narrow_range"):
        low += 1
    return low, high


def parameters(q, low, high):
    """Scale and zero point of a range."""
    single = q.get("eps", 0) > 0
    low, high = min(f32(low), f32(0)), max(f32(high), f32(0))
    amax = f64(max(high, -low))
    width = f64(f32(high - low)) if single else f64(high) - f64(low)
    if q["dtype"] in FLOATS:
        scale = amax / f64(ml_dtypes.finfo(FLOATS[q["dtype"]]).max)
    else:
        qmin, qmax = code_range(q)
        scale = amax / ((qmax - qmin) / 2) if q["symmetric"] else width / (qmax - qmin)
    if not single and scale < TINY:
        return f32(1), 0 if q["dtype"] in FLOATS else max(0, qmin)
    scale = max(scale, f64(f32(q.get("eps", 0))))
    plain = scale
    if q.get("scale_type") == "power-of-two":
        plain = scale = f64(2.0) ** np.ceil(np.log2(scale))
    scale = f32(scale)
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(q.get("scale_dtype"))
    if kind:
        near = kind(scale)
        if f32(near) < f32(q.get("eps", 0)) or near == 0:
            near = np.nextafter(near, kind(1))
        plain = scale = min(f32(near), f32(ml_dtypes.finfo(kind).max))
    if q["dtype"] in FLOATS:
        return f32(scale), 0
    if q["symmetric"]:
        return f32(scale), (qmin + qmax + 1) // 2
    divided = f64(f32(low) / f32(scale)) if single else f64(low) / f64(plain)
    zero = qmin - np.rint(divided) if single else np.rint(qmin - divided)
    return f32(scale), int(np.clip(zero, qmin, qmax))


def codes(q, x, scale, zero, lowest=1 << 20):
    quotient = (x / scale).astype(f32)
    if q["dtype"] in FLOATS:
        kind = FLOATS[q["dtype"]]
        largest = f32(ml_dtypes.finfo(kind).max)
        return np.clip(quotient, -largest, largest).astype(kind).view(np.uint8).astype(int)
    qmin, qmax = code_range(q)
    qmin = min(qmin, lowest) if "given" in q else qmin
    half_away = lambda v: np.sign(v) * np.floor(np.abs(v.astype(f64)) + 0.5)
    rounded = {"half-even": np.rint, "half-away": half_away, "floor": np.floor}[q.get("round", "half-even")](quotient)
    return np.clip(rounded.astype(f64) + zero, qmin, qmax).astype(int)


def back(q, c, scale, zero):
    if q["dtype"] in FLOATS:
        return c.astype(np.uint8).view(FLOATS[q["dtype"]]).astype(f32) * scale
    return (c - zero).astype(f32) * scale


def observed(q, x):
    low, high = f32(x.min()), f32(x.max())
    if q.get("observer") == "mse":
        low, high = min(low, f32(0)), max(high, f32(0))
        best = None
        for step in range(80):
            ratio = f32(1) - f32(step) / f32(100)
            scale, zero = parameters(q, low * ratio, high * ratio)
            difference = np.abs(x.astype(f64) - back(q, codes(q, x, scale, zero), scale, zero).astype(f64))
            error = (difference ** q.get("mse_p", 2.0)).sum()
            if best is None or error < best[0]:
                best = (error, low * ratio, high * ratio)
        return best[1:]
    if q.get("observer") == "percentile":
        # Counting, not sorting: the least value that enough others do not exceed.
        share = q["percentile"] if q["symmetric"] else 50 + q["percentile"] / 2
        enough = lambda values, v: (values <= v).sum() >= round(share * len(values) / 100, 9)
        if q["symmetric"]:
            end = min(v for v in np.abs(x) if enough(np.abs(x), v))
            return -end, end
        return -min(v for v in -x if enough(-x, v)), min(v for v in x if enough(x, v))
    return low, high


def entries(granularity, shape):
    """For each scale, in row-major order, the index of what shares it."""
    if granularity == "per-tensor":
        return [np.indices(shape).reshape(len(shape), -1)]
    (kind, at), = granularity.items()
    axis, size = at["axis"], at.get("size", 1)
    index = np.indices(shape).reshape(len(shape), -1)
    if kind == "per-channel":
        return [index[:, index[axis] == c] for c in range(shape[axis])]
    key = index.copy()
    key[axis] //= size
    blocks = list(shape)
    blocks[axis] = -(-shape[axis] // size)
    flat = np.ravel_multi_index(key, blocks)
    return [index[:, flat == block] for block in range(int(np.prod(blocks)))]


def solved(q, x):
    out, scales, zeros = np.zeros(x.shape, int), [], []
    given = q.get("given", {})
    lowest = min(given["scales"]["zero_points"]) if "scales" in given else 1 << 20
    for number, index in enumerate(entries(q["granularity"], x.shape)):
        at = tuple(index)
        if "scales" in given:
            pick = lambda values: values[number] if len(values) > 1 else values[0]
            scale, zero = f32(pick(given["scales"]["scales"])), pick(given["scales"]["zero_points"])
        else:
            scale, zero = parameters(q, *(given["range"] if "range" in given else observed(q, x[at])))
        scales.append(scale)
        zeros.append(zero)
        out[at] = codes(q, x[at], scale, zero, lowest)
    return scales, zeros, out


def number(value):
    """The shortest decimal that is this f32."""
    return float(str(f32(value)))


def main():
    rng = np.random.default_rng(7)
    normal = (rng.standard_normal((6, 10)) * rng.uniform(0.1, 4, (6, 1))).astype(f32)
    normal[2] = 0
    normal[3] = np.abs(normal[3])
    # Ties at a scale of a half, and an outlier.
    ties = (rng.integers(-40, 40, (4, 8)) / 4).astype(f32)
    ties[0, 0] = 31.5
    cube = rng.uniform(-1, 3, (3, 5, 4)).astype(f32)
    tiny = (rng.standard_normal((2, 6)) * 1e-7).astype(f32)
    inputs = {"normal": normal, "ties": ties, "cube": cube, "tiny": tiny}
    tensor, channel = "per-tensor", lambda axis: {"per-channel": {"axis": axis}}
    group = lambda axis, size: {"per-group": {"axis": axis, "size": size}}
    shares = [tensor, channel(0), channel(1), group(0, 4), group(1, 4), group(1, 16)]
    cases = []

    def add(name, dtype, symmetric, granularity, transpose=False, **fields):
        q = {"dtype": dtype, "symmetric": symmetric, "granularity": granularity, **fields}
        x = inputs[name].T if transpose else inputs[name]
        scales, zeros, found = solved(q, x)
        case = {"x": name, "quantizer": q, "scales": [number(s) for s in scales], "zero_points": zeros, "q": found.ravel().tolist()}
        cases.append({"transpose": True, **case} if transpose else case)

    for dtype in INTEGERS:
        for symmetric in (True, False):
            for share in shares:
                add("normal", dtype, symmetric, share, narrow_range=symmetric)
        add("cube", dtype, False, group(1, 2))
        add("cube", dtype, True, channel(2))
        for symmetric in (True, False):
            for narrow in (True, False):
                if not dtype.endswith("2"):
                    add("normal", dtype, symmetric, channel(0), narrow_range=narrow, reduce_range=True)
                add("normal", dtype, symmetric, channel(0), narrow_range=narrow)
                add("normal", dtype, symmetric, group(0, 3), narrow_range=narrow, scale_type="power-of-two")
                for precision in ("float16", "bfloat16"):
                    add("normal", dtype, symmetric, channel(1), narrow_range=narrow, scale_dtype=precision)
            for round in ("half-away", "floor"):
                given = {"scales": {"scales": [0.5], "zero_points": [code_range({"dtype": dtype})[0] // 2 + 1]}}
                add("ties", dtype, symmetric, channel(0), round=round)
                add("ties", dtype, symmetric, tensor, round=round, given=given)
    for dtype in FLOATS:
        for share in shares:
            add("normal", dtype, True, share)
        add("normal", dtype, True, channel(0), scale_type="power-of-two")
        add("normal", dtype, True, channel(0), scale_dtype="float16")
        add("normal", dtype, True, channel(0), observer="mse")
        add("normal", dtype, False, channel(0), given={"range": [-3, 1]})
    for dtype in ("int4", "uint8", "int8"):
        for symmetric in (True, False):
            for eps in (0.25, float(np.finfo(f32).eps), 1e-5):
                add("normal", dtype, symmetric, group(1, 5), eps=number(eps))
            add("normal", dtype, symmetric, channel(0), eps=0.25, scale_type="power-of-two")
            for share in (tensor, channel(0), group(1, 10)):
                add("normal", dtype, symmetric, share, observer="mse")
                add("normal", dtype, symmetric, share, observer="mse", mse_p=2.4, narrow_range=True)
                for percentile in (100, 99, 90, 60.5):
                    add("normal", dtype, symmetric, share, observer="percentile", percentile=percentile)
            add("ties", dtype, symmetric, tensor, observer="mse", round="floor")
            add("ties", dtype, symmetric, group(0, 2), given={"range": [-2.5, 4]})
            add("ties", dtype, symmetric, group(0, 2), given={"range": [1, 4]}, scale_type="power-of-two")
            for precision in ("float16", "bfloat16"):
                add("tiny", dtype, symmetric, channel(0), scale_dtype=precision)
                add("tiny", dtype, symmetric, channel(0), scale_dtype=precision, eps=1e-6)
        low = code_range({"dtype": dtype})[0]
        each = {"scales": {"scales": [0.5, 0.25, 0.125, 2], "zero_points": [low, low + 3, low + 8, low + 1]}}
        add("ties", dtype, False, channel(0), given=each)
        add("ties", dtype, False, channel(0), given=each, narrow_range=True)
    for dtype in ("int4", "uint4", "int8", "int2", "float4e2m1"):
        # A Gemm has its channels on axis 1.
        for share in [s for s in shares if s != channel(0)]:
            add("normal", dtype, True, share, transpose=True, narrow_range=dtype != "float4e2m1")
    add("ties", "int8", False, group(0, 3), transpose=True, round="floor")

    line = lambda value: json.dumps(value, separators=(",", ":"))
    tensors = [f'{line(k)}: {{"dims":{line(list(v.shape))},"values":{line([number(e) for e in v.ravel()])}}}' for k, v in inputs.items()]
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "solve.json"), "w") as out:
        out.write('{"inputs": {\n' + ",\n".join(tensors) + '\n},\n"cases": [\n' + ",\n".join(map(line, cases)) + "\n]}\n")
    print(len(cases))


main()
