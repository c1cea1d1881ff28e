"""Scales of models/digits.onnx as other tools save them.

calibration.json and calibration.cache are written by onnxruntime itself; the others follow the formats of TensorRT 8.6 (scale
of int8, big-endian), AIMET 0.6.1, 1.0.0 and 2.0.0, and onnxruntime's TensorQuantOverrides.
Needs numpy and onnxruntime 1.31.1; writes beside itself.
"""

import json
import pathlib
import shutil
import struct
import tempfile

import numpy
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator, write_calibration_table

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parents[2] / "models"


class Reader(CalibrationDataReader):
    def __init__(self):
        samples = numpy.load(MODELS / "digits.calib.npz")
        (name,) = samples.files
        self.samples = iter([{name: sample} for sample in samples[name][:8]])

    def get_next(self):
        return next(self.samples, None)


with tempfile.TemporaryDirectory() as folder:
    calibrator = create_calibrator(
        str(MODELS / "digits.onnx"),
        None,
        calibrate_method=CalibrationMethod.MinMax,
        augmented_model_path=f"{folder}/augmented.onnx",
    )
    calibrator.collect_data(Reader())
    table = calibrator.compute_data()
    write_calibration_table(table, folder)
    for name in ["calibration.json", "calibration.cache"]:
        shutil.copy(f"{folder}/{name}", HERE / name)
ranges = {name: [float(end.item()) for end in data.range_value] for name, data in table.items()}


def asymmetric(low, high, bits=8):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = numpy.float32((high - low) / (2**bits - 1))
    return scale, -round(-low / float(scale))


with open(HERE / "digits.trt.cache", "w") as out:
    print("TRT-8601-EntropyCalibration2", file=out)
    for name, (low, high) in ranges.items():
        scale = numpy.float32(max(-low, high) / 127)
        print(f"{name}: {struct.pack('>f', scale).hex()}", file=out)
    print("(Unnamed Layer* 7) [Constant]_output: 00000000", file=out)

weight = numpy.float32([0.01, 0.0125, 0.02])
encodings = {name: asymmetric(*ends, bits=16 if name == "logits" else 8) for name, ends in ranges.items()}
bits = {name: 16 if name == "logits" else 8 for name in ranges}


def write(name, document):
    (HERE / name).write_text(json.dumps(document, indent=1) + "\n")


write(
    "digits.0.6.1.encodings.json",
    {
        "version": "0.6.1",
        "activation_encodings": {
            name: [
                {
                    "bitwidth": bits[name],
                    "dtype": "int",
                    "is_symmetric": "False",
                    "max": float(scale) * (2 ** bits[name] - 1 + offset),
                    "min": float(scale) * offset,
                    "offset": offset,
                    "scale": float(scale),
                }
            ]
            for name, (scale, offset) in encodings.items()
        }
        | {"kept": [{"bitwidth": 16, "dtype": "float"}]},
        "param_encodings": {
            "some.weight": [
                {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "offset": -128, "scale": float(s)} for s in weight
            ]
        },
    },
)
write(
    "digits.1.0.0.encodings.json",
    {
        "version": "1.0.0",
        "activation_encodings": [
            {
                "name": name,
                "enc_type": "PER_TENSOR",
                "dtype": "INT",
                "bw": bits[name],
                "is_sym": False,
                "offset": [offset],
                "scale": [float(scale)],
            }
            for name, (scale, offset) in encodings.items()
        ]
        + [{"name": "kept", "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}],
        "param_encodings": [
            {
                "name": "some.weight",
                "enc_type": "PER_CHANNEL",
                "dtype": "INT",
                "bw": 8,
                "is_sym": True,
                "offset": [-128] * 3,
                "scale": weight.astype(float).tolist(),
            }
        ],
    },
)
write(
    "digits.2.0.0.encodings.json",
    {
        "version": "2.0.0",
        "encodings": [
            {
                "name": name,
                "output_dtype": f"uint{bits[name]}",
                "y_scale": float(scale),
                "y_zero_point": -offset,
            }
            for name, (scale, offset) in encodings.items()
        ]
        + [
            {"name": "kept", "output_dtype": "float16"},
            {"name": "some.weight", "output_dtype": "int8", "y_scale": weight.astype(float).tolist(), "axis": 0},
        ],
    },
)
write(
    "overrides.json",
    {
        "stem_relu_out": [{"quant_type": "QUInt16", "rmin": 0.0, "rmax": 4.5}],
        "image": [{"quant_type": "QuantType.QUInt8", "scale": 0.25, "zero_point": 3}],
        "stem.weight": [{"quant_type": "QInt8", "axis": 0, "symmetric": True, "scale": 0.01, "zero_point": 0}]
        + [{"quant_type": "QInt8", "scale": 0.02 + i / 128, "zero_point": 0} for i in range(15)],
    },
)
