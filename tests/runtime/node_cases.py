"""Writes ONNX's own operator tests for the ignored test `backend::node_cases`, in the folder format of the onnx repository.

    python tests/runtime/node_cases.py OUT        (onnx 1.23)

OUT/NAME/model.onnx, OUT/NAME/test_data_set_0/{input,output}_N.pb, and OUT/NAME/tolerance (relative, absolute). Cases with
strings, sequences, optionals or maps are left out, as are expanded functions, which test operators a second time, and two
that take a length before it is rounded, where the text of Resize and onnxruntime take that of the result.
"""

import pathlib
import sys
import warnings

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

UNROUNDED = {f"test_resize_downsample_scales_{mode}_align_corners" for mode in ("linear", "cubic")}

warnings.simplefilter("ignore")
out = pathlib.Path(sys.argv[1])
left_out = 0
written = 0
for case in collect_testcases():
    graph = case.model.graph
    infos = [*graph.input, *graph.output]
    tensors = all(i.type.WhichOneof("value") == "tensor_type" for i in infos)
    strings = any(i.type.tensor_type.elem_type == onnx.TensorProto.STRING for i in infos)
    if case.name in UNROUNDED or "_expanded" in case.name or not tensors or strings or len(case.data_sets) != 1:
        left_out += 1
        continue
    folder = out / case.name / "test_data_set_0"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(case.model, folder.parent / "model.onnx")
    (folder.parent / "tolerance").write_text(f"{case.rtol} {case.atol}\n")
    for kind, infos, values in zip(("input", "output"), (graph.input, graph.output), case.data_sets[0]):
        for index, (info, value) in enumerate(zip(infos, values)):
            tensor = value
            if not isinstance(value, onnx.TensorProto):
                tensor = numpy_helper.from_array(np.asarray(value), info.name)
            tensor.name = info.name
            (folder / f"{kind}_{index}.pb").write_bytes(tensor.SerializeToString())
    written += 1
print(f"{written} cases, {left_out} left out")
