"""Writes minifloat.json: what ml_dtypes makes of each code of each float format, and of every float16 as a code.

Run with numpy and ml_dtypes installed: python minifloat.py > minifloat.json
"""
import hashlib
import json

import ml_dtypes
import numpy as np

FORMATS = {
    "float8e4m3fn": (ml_dtypes.float8_e4m3fn, 448),
    "float8e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, 240),
    "float8e5m2": (ml_dtypes.float8_e5m2, 57344),
    "float8e5m2fnuz": (ml_dtypes.float8_e5m2fnuz, 57344),
    "float4e2m1": (ml_dtypes.float4_e2m1fn, 6),
    "float6e2m3": (ml_dtypes.float6_e2m3fn, 7.5),
    "float6e3m2": (ml_dtypes.float6_e3m2fn, 28),
}


def number(value):
    if np.isnan(value):
        return None
    if np.isinf(value):
        return "inf" if value > 0 else "-inf"
    return "-0.0" if value == 0 and np.signbit(value) else float(value)


out = {}
for name, (dtype, largest) in FORMATS.items():
    codes = np.arange({"float4": 16, "float6": 64}.get(name[:6], 256), dtype=np.uint8)
    decoded = codes.view(dtype).astype(np.float32)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = ~np.isnan(halves)
    clipped = np.clip(np.where(finite, halves, 0), -largest, largest)
    encoded = np.where(finite, clipped.astype(dtype).view(np.uint8), 0).astype(np.uint8)
    out[name] = {
        "decoded": [number(value) for value in decoded],
        # Codes of all 65536 float16 bit patterns in order, saturated; 0 in place of NaN.
        "sha256_of_encoded_float16": hashlib.sha256(encoded.tobytes()).hexdigest(),
    }
print(json.dumps(out, separators=(",", ":")).replace("},", "},\n"))
