#!/usr/bin/env python3
"""Makes smooth.json: how the error of a quantized product depends on the exponent of its divisors. From the definitions of
SmoothQuant (arXiv 2211.10438) and of ModelOpt's awq_lite, in float64, with plain loops over exponents."""

import json
from pathlib import Path

import numpy as np

rng = np.random.default_rng(20221118)


def rows(count, columns, spread):
    mixed = rng.standard_normal((count, columns)) @ (rng.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns))
    x = mixed * np.exp(spread * rng.standard_normal(columns))
    x[:, 3] *= 25
    x[:, 5] = 0
    return x.astype(np.float32).astype(np.float64)


def weight(outputs, columns):
    w = rng.standard_normal((outputs, columns)) * np.exp(0.5 * rng.standard_normal(columns))
    return w.astype(np.float32).astype(np.float64)


def uint8(x):
    """Per tensor, asymmetric; zero is a code."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def symmetric(w, group, largest):
    """One scale for each row and group of columns."""
    grouped = w.reshape(len(w), -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / largest
    return (np.rint(grouped / scale) * scale).reshape(w.shape)


def smoothquant(x, w, alpha):
    largest, heaviest = np.abs(x).max(0), np.abs(w).max(0)
    known = np.where(largest > 0, largest, 1)
    return np.where(largest > 0, np.maximum(known**alpha / np.maximum(heaviest, 1e-5) ** (1 - alpha), 1e-5), 1)


def awq_lite(x, w, group, alpha):
    grouped = np.abs(w).reshape(len(w), -1, group)
    share = (grouped / grouped.max(-1, keepdims=True)).reshape(w.shape).mean(0)
    s = np.clip(np.abs(x).mean(0) ** alpha / share ** (1 - alpha), 1e-4, 1e4)
    return s / np.sqrt(s.max() * s.min())


def case(name, method, x, w, divisors, quantized, steps):
    exact, curve = x @ w.T, []
    for step in range(steps + 1):
        s = divisors(step / steps)
        curve.append(float(np.mean((quantized(x / s, w * s) - exact) ** 2)))
    best = int(np.argmin(curve))
    flat = lambda a: [float(str(np.float32(v))) for v in np.ravel(a)]
    return {"name": name, "method": method, "rows": flat(x), "columns": x.shape[1], "weight": flat(w), "outputs": len(w),
            "curve": curve, "plain": float(np.mean((quantized(x, w) - exact) ** 2)), "alpha": best / steps,
            "divisors": flat(divisors(best / steps))}


cases = []
for outputs, columns in [(24, 32), (16, 48)]:
    x, w = rows(64, columns, 1.2), weight(outputs, columns)
    cases.append(case(f"int8, {outputs} of {columns}", "smoothquant", x, w, lambda a: smoothquant(x, w, a),
                      lambda x, w: uint8(x) @ symmetric(w, w.shape[1], 127).T, 20))
for outputs, columns, group in [(16, 64, 32), (8, 64, 16)]:
    x, w = rows(64, columns, 1.0), weight(outputs, columns)
    made = case(f"int4 in groups of {group}, {outputs} of {columns}", "awq_lite", x, w, lambda a: awq_lite(x, w, group, a),
                lambda x, w: x @ symmetric(w, group, 7).T, 10)
    cases.append(made | {"group": group})
text = ",\n".join(json.dumps(c) for c in cases)
(Path(__file__).parent / "smooth.json").write_text(f"[\n{text}\n]\n")
for c in cases:
    print(c["name"], "plain", round(c["plain"], 4), "best", c["alpha"], round(min(c["curve"]), 4))
