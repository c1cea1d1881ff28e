"""Makes the models of this folder with the frameworks that users train in, and says which versions made them.

    python -m venv env
    env/bin/pip install torch==2.15.0 torchao==0.18.0 brevitas==0.13.4 nvidia-modelopt==0.47.0 \
        onnx==1.23.2 onnxruntime==1.31.1 onnxscript==0.7.2 onnxoptimizer
    env/bin/python tests/qat/make_exports.py [NAME...]

Each NAME.onnx has samples beside it (NAME.calib.npz) and what the model computes for them (in expected.json), by
onnxruntime without optimizations where it runs the model, otherwise by PyTorch. Everything is seeded.
"""

import contextlib
import io
import json
import logging
import os
import pathlib
import sys
import warnings

import numpy as np
import onnx
import torch
from torch import nn

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
HERE = pathlib.Path(__file__).parent
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.relu(self.norm(self.conv(x))).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self, sizes=(64, 32, 16), bias=True):
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1], bias=bias)
        self.second = nn.Linear(sizes[1], sizes[2], bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


IMAGE = (2, 3, 8, 8)


def dynamo(model, sample, path, **options):
    with torch.no_grad():
        torch.onnx.export(
            model, (sample,), dynamo=True, opset_version=18, verbose=False, input_names=["x"], output_names=["y"], **options
        ).save(path)


def legacy(model, sample, path, opset=17):
    with torch.no_grad():
        torch.onnx.export(
            model, (sample,), path, dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"]
        )


def torchao_linear():
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = Mlp()
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return model.eval()


@case
def torchao_8da4w(path):
    """torchao's 8da4w after `prepare`, as exported without optimizations: every operator of both fake quantizers."""
    sample = torch.randn(5, 64)
    model = torchao_linear()
    dynamo(model, sample, path, optimize=False, dynamic_shapes=({0: torch.export.Dim("tokens")},))
    return model, [sample]


@case
def torchao_8da4w_optimized(path):
    """The same, optimized, which is the exporter's default: the weights' fake quantizers are folded to floats."""
    sample = torch.randn(5, 64)
    model = torchao_linear()
    dynamo(model, sample, path, dynamic_shapes=({0: torch.export.Dim("tokens")},))
    return model, [sample]


@case
def float_linear(path):
    """The network of `torchao_8da4w` before torchao prepared it; what is expected is what torchao's prepared one gives."""
    sample = torch.randn(5, 64)
    model = torchao_linear()
    plain = Mlp()
    plain.load_state_dict(model.state_dict(), strict=False)
    dynamo(plain.eval(), sample, path, dynamic_shapes=({0: torch.export.Dim("tokens")},))
    return model, [sample]


@case
def torchao_int4(path):
    """torchao's int4 weight-only, whose zero points are floats, of the network of `float_linear`."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.quant_primitives import ZeroPointDomain

    sample = torch.randn(5, 64)
    model = Mlp()
    weight = IntxFakeQuantizeConfig(
        torch.uint4,
        group_size=32,
        is_symmetric=False,
        zero_point_domain=ZeroPointDomain.FLOAT,
        zero_point_precision=torch.float32,
        eps=1e-6,
    )
    quantize_(model, QATConfig(weight_config=weight, step="prepare"))
    model.eval()
    dynamo(model, sample, path, optimize=False, dynamic_shapes=({0: torch.export.Dim("tokens")},))
    return model, [sample]


@case
def torchao_int4_weight_only(path):
    """torchao's `Int4WeightOnlyConfig` after `prepare`: the arithmetic of its newer kernels."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.qat import QATConfig

    sample = torch.randn(5, 64)
    model = Mlp()
    quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=32), step="prepare"))
    model.eval()
    dynamo(model, sample, path, optimize=False, dynamic_shapes=({0: torch.export.Dim("tokens")},))
    return model, [sample]


@case
def torch_fake_quantize(path):
    """`fake_quantize_per_tensor_affine` and `_per_channel_affine`, unoptimized: parameters behind Casts."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
            self.register_buffer("scale", torch.rand(8) * 0.01 + 0.001)
            self.register_buffer("zero", torch.zeros(8, dtype=torch.int32))

        def forward(self, x):
            x = torch.fake_quantize_per_tensor_affine(x, 0.02, 124, 0, 255)
            w = torch.fake_quantize_per_channel_affine(self.conv.weight, self.scale, self.zero, 0, -128, 127)
            return torch.relu(torch.nn.functional.conv2d(x, w, self.conv.bias))

    model = Model()
    sample = torch.randn(*IMAGE)
    dynamo(model, sample, path, optimize=False)
    return model, [sample]


@case
def spelled_out(path):
    """Fake quantizers written as plain arithmetic, as research code does: one that divides by its scale, one whose
    scale is a power of two and multiplied by its reciprocal, one multiplied by a reciprocal that is inexact, a narrow
    one of 4 bits for a weight in channels, and a bias at 32 bits."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
            self.register_buffer("scale", (torch.rand(8) * 0.01 + 0.02).reshape(8, 1, 1, 1))

        def forward(self, x):
            x = (torch.clamp(torch.round(x / 0.0213) + 120, 0, 255) - 120) * 0.0213
            w = torch.clamp(torch.round(self.conv.weight / self.scale), -7, 7) * self.scale
            step = self.scale.reshape(8) * 0.0213
            b = torch.round(self.conv.bias / step) * step
            y = torch.relu(torch.nn.functional.conv2d(x, w, b))
            y = torch.clamp(torch.round(y * 64.0), 0, 255) * 0.015625
            return torch.clamp(torch.round(y * (1 / 0.0123)), -128, 127) * 0.0123

    model = Model()
    sample = torch.randn(*IMAGE)
    dynamo(model, sample, path, optimize=False)
    return model, [sample]


def trained(model, shape):
    for _ in range(3):
        model(torch.randn(*shape))


@case
def fx_qat_cnn(path):
    """Conv, BatchNorm and ReLU prepared by FX graph mode for training, with activations of 7 bits (a Clip each)."""
    from torch.ao.quantization import (
        FakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        QConfig,
        QConfigMapping,
        disable_observer,
    )
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    activation = FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=127, dtype=torch.quint8
    )
    weight = FakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    sample = torch.randn(*IMAGE)
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    model = prepare_qat_fx(Cnn().train(), mapping, (sample,))
    trained(model, IMAGE)
    model.apply(disable_observer)
    model.eval()
    legacy(model, sample, path)
    return model, [sample]


@case
def pt2e_qat_cnn(path):
    """The same network through torchao's PT2E, converted without folding weights: Quantize, Clip, Dequantize."""
    import torchao.quantization.pt2e as pt2e
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    sample = torch.randn(*IMAGE)
    graph = torch.export.export(Cnn().eval(), (sample,)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    model = prepare_qat_pt2e(graph, quantizer)
    trained(model, IMAGE)
    pt2e.move_exported_model_to_eval(model)
    model = convert_pt2e(model, fold_quantize=False)
    with torch.no_grad():
        program = torch.export.export(model, (sample,))
        torch.onnx.export(
            program, (sample,), dynamo=True, opset_version=18, verbose=False, input_names=["x"], output_names=["y"]
        ).save(path)
    return None, [sample]


@case
def brevitas_qcdq(path):
    """Brevitas: 4-bit weights in channels, 8-bit ones, 4-bit activations, int32 biases; Clips for the narrow ranges."""
    import brevitas.nn as qnn
    from brevitas.export import export_onnx_qcdq
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat, Int32Bias

    model = nn.Sequential(
        qnn.QuantIdentity(bit_width=8, return_quant_tensor=True),
        qnn.QuantConv2d(
            3, 8, 3, weight_bit_width=4, weight_quant=Int8WeightPerChannelFloat, bias_quant=Int32Bias, return_quant_tensor=True
        ),
        qnn.QuantReLU(bit_width=4, return_quant_tensor=True),
        nn.Flatten(),
        qnn.QuantLinear(288, 4, bias=True, weight_quant=Int8WeightPerTensorFloat, bias_quant=Int32Bias),
    )
    sample = torch.randn(*IMAGE)
    model.train()
    trained(model, IMAGE)
    model.eval()
    model(sample)
    export_onnx_qcdq(model, args=sample, export_path=path, opset_version=17, dynamo=False, input_names=["x"], output_names=["y"])
    return None, [sample]


@case
def qcdq_float_weights(path):
    """Brevitas' form before it stored codes: float weights behind Quantize, Clip (narrow), Dequantize. Made by hand."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.1, (8, 3, 3, 3)).astype(np.float32)
    scale = (np.abs(weight).max((1, 2, 3)) / 10).astype(np.float32)
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3, 8, 8] x) => (float[n, 8, 6, 6] y) <
        float one = {0.021}, int8 z = {0}, int8 low = {-7}, int8 high = {7}, int8 nlow = {-127}, int8 nhigh = {127}> {
        q = QuantizeLinear(x, one, z)  c = Clip(q, nlow, nhigh)  d = DequantizeLinear(c, one, z)
        wq = QuantizeLinear <axis = 0> (w, s, zs)  wc = Clip(wq, low, high)  wd = DequantizeLinear <axis = 0> (wc, s, zs)
        y = Conv(d, wd)
    }"""
    model = onnx.parser.parse_model(text)
    for name, value in (("w", weight), ("s", scale), ("zs", np.zeros(8, np.int8))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, path)
    return None, [torch.randn(*IMAGE)]


def modelopt(model, config, sample, path, opset):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.utils import export_torch_mode

    model = mtq.quantize(model.eval(), config, lambda m: trained(m, sample.shape))
    for quantizer in model.modules():
        # This exporter wants ranges as constants; PyTorch 2.15 traces buffers as parameters.
        if isinstance(quantizer, TensorQuantizer) and "_amax" in quantizer._buffers:
            quantizer.__dict__["_amax"] = quantizer._buffers.pop("_amax")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with export_torch_mode(), torch.inference_mode():
        torch.onnx.export(
            model, (sample,), path, dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"]
        )
    return model, [sample]


@case
def modelopt_int8(path):
    """ModelOpt's INT8_DEFAULT_CFG: Quantize and Dequantize around float weights, BatchNorm not yet folded."""
    import modelopt.torch.quantization as mtq

    return modelopt(Cnn(), mtq.INT8_DEFAULT_CFG, torch.randn(*IMAGE), path, 17)


class Deep(nn.Module):
    """Two convolutions, the first a linear bottleneck, with statistics that training could have left."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.linear = nn.Linear(6, 4)
        for norm in (self.blocks[1], self.blocks[3]):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.1, 2.0)

    def forward(self, x):
        return self.linear(self.blocks(x).mean((2, 3)))


@case
def modelopt_deep(path):
    """INT8_DEFAULT_CFG of two convolutions: a BatchNorm between quantizers, and one with a result in floats."""
    import modelopt.torch.quantization as mtq

    return modelopt(Deep(), mtq.INT8_DEFAULT_CFG, torch.randn(*IMAGE), path, 17)


@case
def modelopt_fp8(path):
    """ModelOpt's FP8_DEFAULT_CFG: operators of the domain trt."""
    import modelopt.torch.quantization as mtq

    return modelopt(Mlp(), mtq.FP8_DEFAULT_CFG, torch.randn(4, 64), path, 20)


@case
def grouped_pair(path):
    """A weight in groups between reshapes, around QuantizeLinear and DequantizeLinear along axis 0. Made by hand."""
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 0.1, (16, 64)).astype(np.float32)
    scale = (np.abs(weight.reshape(-1, 32)).max(1) / 127).astype(np.float32)
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 64] x) => (float[n, 16] y)
        <int64[2] rows = {32, 32}, int64[2] back = {16, 64}> {
        r = Reshape(w, rows)  q = QuantizeLinear <axis = 0> (r, s, zs)  d = DequantizeLinear <axis = 0> (q, s, zs)
        f = Reshape(d, back)  t = Transpose <perm = [1, 0]> (f)  y = MatMul(x, t)
    }"""
    model = onnx.parser.parse_model(text)
    for name, value in (("w", weight), ("s", scale), ("zs", np.zeros(32, np.int8))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, path)
    return None, [torch.randn(4, 64)]


@case
def ort_static(path):
    """onnxruntime's quantize_static: codes already, to be left as they are."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    sample = torch.randn(*IMAGE)
    float_path = str(path) + ".float"
    legacy(Cnn().eval(), sample, float_path)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.data = iter([{"x": sample.numpy()}])

        def get_next(self):
            return next(self.data, None)

    quantize_static(float_path, path, Reader(), activation_type=QuantType.QUInt8, per_channel=True)
    os.remove(float_path)
    return None, [sample]


def outputs(path, model, samples):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:
        with torch.no_grad():
            return "torch", [model(sample).numpy() for sample in samples]
    return "onnxruntime", [session.run(None, {"x": sample.numpy()})[0] for sample in samples]


def main():
    names = sys.argv[1:] or list(CASES)
    record = HERE / "expected.json"
    expected = json.loads(record.read_text()) if record.exists() else {}
    for name in names:
        torch.manual_seed(0)
        path = str(HERE / f"{name}.onnx")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model, samples = CASES[name](path)
        exported = onnx.load(path)
        exported.graph.ClearField("value_info")
        exported.doc_string = ""
        for node in exported.graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in [*exported.graph.input, *exported.graph.output, *exported.graph.initializer]:
            if hasattr(value, "metadata_props"):
                del value.metadata_props[:]
        del exported.metadata_props[:]
        del exported.graph.metadata_props[:]
        onnx.save(exported, path)
        pathlib.Path(path + ".data").unlink(missing_ok=True)
        np.savez(HERE / f"{name}.calib.npz", x=np.stack([s.numpy() for s in samples]))
        if name == "float_linear":
            by, values = "torch", [model(sample).detach().numpy() for sample in samples]
        else:
            by, values = outputs(path, model, samples)
        shape = list(values[0].shape)
        expected[name] = {"by": by, "shape": shape, "y": [float(v) for v in np.concatenate(values).ravel()]}
        print(f"{name}: {os.path.getsize(path)} bytes, {len(exported.graph.node)} nodes, outputs by {by}")
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(expected.items())]
    record.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    import brevitas
    import modelopt as mo
    import onnxruntime
    import torchao

    versions = {m.__name__: m.__version__ for m in (torch, torchao, brevitas, mo, onnx, onnxruntime, np)}
    print(json.dumps(versions))


main()
