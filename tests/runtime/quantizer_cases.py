"""Packs ONNX's own tests of the quantizers into one file, for the test `backend::quantizers`.

    python tests/runtime/quantizer_cases.py        (onnx 1.23)

tests/runtime/quantizers.bin: for each case, its name, tolerances, model, inputs and outputs, each part behind its length as
a little-endian u32, the lists behind their count.
"""

import pathlib
import struct
import warnings

import numpy as np
from onnx import TensorProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

warnings.simplefilter("ignore")
out = bytearray()
count = 0


def part(data):
    out.extend(struct.pack("<I", len(data)) + data)


PREFIXES = ("test_quantizelinear", "test_dequantizelinear", "test_dynamicquantizelinear")
for case in sorted(collect_testcases(), key=lambda case: case.name):
    if not case.name.startswith(PREFIXES) or "_expanded" in case.name:
        continue
    part(case.name.encode())
    part(f"{case.rtol} {case.atol}".encode())
    part(case.model.SerializeToString())
    graph = case.model.graph
    (inputs, outputs), *more = case.data_sets
    assert not more
    for infos, values in ((graph.input, inputs), (graph.output, outputs)):
        out.extend(struct.pack("<I", len(values)))
        for info, value in zip(infos, values):
            tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), info.name)
            tensor.name = info.name
            part(tensor.SerializeToString())
    count += 1
pathlib.Path(__file__).with_name("quantizers.bin").write_bytes(out)
print(f"{count} cases, {len(out)} bytes")
