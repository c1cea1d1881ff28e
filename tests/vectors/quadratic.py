"""Writes quadratic.json: what algorithms that weigh errors by X'X must find, made from definitions in float64.

Run with numpy installed: python quadratic.py > quadratic.json

gptq      after each code the columns that are left are the exact least squares solution, solved anew every time
mismatch  the target for inputs that differ from the float model's: stacked least squares; then GPTQ on it
local     coordinate descent to the end, beside the best of all codes; then least squares scales
`tie` is the distance, in steps, of the closest rounding to its tie. Matrices `h` and `g` are base64 of float64.
"""
import base64
import itertools
import json

import numpy as np

rint = np.rint
ties = [np.inf]


def counted(t):
    ties[0] = min(ties[0], float(np.min(np.abs(np.abs(t - np.floor(t)) - 0.5))))
    return rint(t)


def correlated(rng, rows, k, spread=0.6, mix=0.35):
    x = rng.standard_normal((rows, k)) @ (rng.standard_normal((k, k)) * mix / np.sqrt(k) * 4 + np.eye(k))
    return x * np.exp(spread * rng.standard_normal(k))


def grid(bits, symmetric):
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)


def single(x):
    return x.astype(np.float32).astype(np.float64)


def qparams(w, group, bits, symmetric):
    n, k = w.shape
    count = -(-k // group)
    s, z = np.ones((n, count)), np.zeros((n, count))
    low, high = grid(bits, symmetric)
    for j in range(count):
        own = w[:, j * group:(j + 1) * group]
        if symmetric:
            scale = np.abs(own).max(1) / high
        else:
            a, b = np.minimum(own.min(1), 0), np.maximum(own.max(1), 0)
            scale = (b - a) / high
            safe = np.where(scale > 0, scale, 1)
            z[:, j] = np.where(scale > 0, np.clip(rint(-a / safe), low, high), 0)
        s[:, j] = np.where(scale > 0, scale, 1)
    return s, z


def values(q, s, z, group):
    at = np.arange(q.shape[1]) // group
    return (q - z[:, at]) * s[:, at]


def gptq(w, h, s, z, group, bits, symmetric, damp, order):
    k = w.shape[1]
    low, high = grid(bits, symmetric)
    columns = np.argsort(-np.diag(h), kind="stable") if order else np.arange(k)
    h = h + damp * np.mean(np.diag(h)) * np.eye(k)
    v, q, done, ties[0] = w.copy(), np.zeros_like(w), [], np.inf
    for c in columns:
        scale, zero = s[:, c // group], z[:, c // group]
        q[:, c] = np.clip(counted(v[:, c] / scale) + zero, low, high)
        v[:, c] = (q[:, c] - zero) * scale
        done.append(c)
        rest = [i for i in columns if i not in set(done)]
        if rest:
            right = h[np.ix_(rest, done)] @ (w[:, done] - v[:, done]).T
            v[:, rest] = w[:, rest] + np.linalg.solve(h[np.ix_(rest, rest)], right).T
    assert ties[0] > 1e-7
    return q


def loss(w, v, h):
    return float(np.sum(((w - v) @ h) * (w - v)))


def packed(a):
    return base64.b64encode(np.ascontiguousarray(a, "<f8").tobytes()).decode()


def lists(**arrays):
    return {key: a.tolist() for key, a in arrays.items()}


rng = np.random.default_rng(20261130)
out = {"gptq": [], "mismatch": [], "local": []}
for i, (n, k, group, bits, symmetric, damp, order, dead) in enumerate([
    (8, 64, 32, 4, True, 0.01, False, 0), (8, 64, 32, 4, True, 0.01, True, 0), (8, 64, 16, 4, False, 0.01, True, 0),
    (6, 48, 32, 3, True, 0.05, True, 0), (6, 40, 16, 2, False, 0.01, True, 1), (5, 96, 96, 8, True, 0.01, True, 0),
    (4, 72, 32, 4, True, 0.001, True, 2),
]):
    # The last has fewer rows than columns.
    x = correlated(rng, 3 * k if i != 6 else k // 2, k)
    if dead:
        x[:, rng.choice(k, dead, replace=False)] = 0
    x, w = single(x), single(rng.standard_normal((n, k)))
    s, z = qparams(w, group, bits, symmetric)
    h = x.T @ x / len(x)
    # Columns without any input, as GPTQ was published: they cost 1, and their weights are 0.
    none = np.diag(h) == 0
    plain_h, plain_w = h.copy(), w.copy()
    h[none, none], w[:, none] = 1, 0
    q = gptq(w, h, s, z, group, bits, symmetric, damp, order)
    at = np.arange(k) // group
    r = np.clip(rint(plain_w / s[:, at]) + z[:, at], *grid(bits, symmetric))
    out["gptq"].append(dict(
        group=group, bits=bits, symmetric=symmetric, damp=damp, act_order=order, tie=ties[0], h=packed(h),
        loss=loss(plain_w, values(q, s, z, group), plain_h), loss_rounding=loss(plain_w, values(r, s, z, group), plain_h),
        **lists(w=w, s=s, z=z, q=q),
    ))
for n, k, group, bits, damp, order, noise in [
    (8, 48, 16, 4, 0.01, True, 0.05), (6, 64, 32, 3, 0.01, True, 0.15), (6, 32, 32, 4, 0.1, False, 0.3),
]:
    float_x = single(correlated(rng, 4 * k, k))
    x = single(float_x * (1 + 0.02 * rng.standard_normal(k)) + noise * rng.standard_normal(float_x.shape) * float_x.std(0))
    w = single(rng.standard_normal((n, k)))
    h, g = x.T @ x / len(x), float_x.T @ x / len(x)
    ridge = damp * np.mean(np.diag(h))
    a = np.vstack([x / np.sqrt(len(x)), np.sqrt(ridge) * np.eye(k)])
    b = np.vstack([float_x @ w.T / np.sqrt(len(x)), np.sqrt(ridge) * w.T])
    target = np.linalg.lstsq(a, b, rcond=None)[0].T
    s, z = qparams(target, group, bits, True)
    q = gptq(target, h, s, z, group, bits, True, damp, order)
    out["mismatch"].append(dict(
        group=group, bits=bits, damp=damp, act_order=order, tie=ties[0], h=packed(h), g=packed(g),
        **lists(w=w, t=target, s=s, q=q),
    ))
for n, k, group, bits, symmetric in [(6, 6, 6, 2, True), (6, 6, 3, 2, False), (6, 5, 5, 3, True)]:
    x = single(correlated(rng, 40, k, mix=0.8))
    w = single(rng.standard_normal((n, k)))
    h = x.T @ x / len(x)
    s, z = qparams(w, group, bits, symmetric)
    low, high = grid(bits, symmetric)
    at = np.arange(k) // group
    every = np.array(list(itertools.product(range(low, high + 1), repeat=k)), float)
    least = []
    for row in range(n):
        e = w[row] - (every - z[row, at]) * s[row, at]
        least.append(float(np.einsum("ak,kl,al->a", e, h, e).min()))
    q = np.clip(rint(w / s[:, at]) + z[:, at], low, high)
    moved = True
    while moved:
        moved = False
        for c in np.argsort(-np.diag(h), kind="stable"):
            e = w - values(q, s, z, group)
            e[:, c] = w[:, c]
            found = np.clip(rint(e @ h[:, c] / h[c, c] / s[:, at[c]]) + z[:, at[c]], low, high)
            moved |= bool(np.any(found != q[:, c]))
            q[:, c] = found
    codes, refit = q - z[:, at], s.copy()
    for row in range(n):
        m = np.zeros((k, s.shape[1]))
        m[np.arange(k), at] = codes[row]
        refit[row] = np.linalg.lstsq(m.T @ h @ m, m.T @ h @ w[row], rcond=None)[0]
    out["local"].append(dict(
        group=group, bits=bits, symmetric=symmetric, h=packed(h), least=least, **lists(w=w, s=s, z=z, q=q, refit=refit),
    ))
print(json.dumps(out))
