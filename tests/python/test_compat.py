"""Scripts written for other tools, with one changed import; onnxruntime judges what they make."""

import logging
import tempfile
import unittest
from pathlib import Path

import amax
import numpy as np
import onnx
import onnxruntime
import onnxruntime.quantization as theirs
from amax.compat import UnsupportedOption, modelopt
from amax.compat import onnxruntime as ours
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer as TheirNBits

# What the other tools tell is not ours to judge.
logging.disable(logging.WARNING)
onnxruntime.set_default_logger_severity(3)

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "models/digits.onnx"
IMAGES = np.load(ROOT / "models/digits.calib.npz")["image"].reshape(64, 1, 8, 8)


class Reader(ours.CalibrationDataReader):
    def __init__(self):
        self.left = iter([{"image": row[None]} for row in IMAGES])

    def get_next(self):
        return next(self.left, None)


def run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def sqnr(float_model, model, feeds):
    want, got = run(float_model, feeds), run(model, feeds)
    return 10 * np.log10((want**2).sum() / ((want - got) ** 2).sum())


def encoder(width=64, hidden=128):
    """Two products with a Gelu-like middle and a normalization, as in a transformer's block."""
    rng = np.random.default_rng(3)
    weights = {
        "w1": rng.normal(0, width**-0.5, (width, hidden)),
        "b1": rng.normal(0, 0.1, hidden),
        "w2": rng.normal(0, hidden**-0.5, (hidden, width)),
        "scale": np.ones(width),
        "bias": np.zeros(width),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"], "/block/fc1"),
        helper.make_node("Add", ["h1", "b1"], ["h2"], "/block/add"),
        helper.make_node("Relu", ["h2"], ["h3"], "/block/relu"),
        helper.make_node("MatMul", ["h3", "w2"], ["h4"], "/block/fc2"),
        helper.make_node("Add", ["h4", "x"], ["h5"], "/block/residual"),
        helper.make_node("LayerNormalization", ["h5", "scale", "bias"], ["y"], "/block/norm"),
        helper.make_node("Transpose", ["y"], ["yt"], "/block/transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["y", "yt"], ["z"], "/block/scores"),
    ]
    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", ["b", "t", width]), ("z", ["b", "t", "t"]))
    ]
    constants = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "encoder", info[:1], info[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


ENCODER = encoder()
TOKENS = np.random.default_rng(5).normal(size=(24, 6, 64)).astype(np.float32)


def tokens():
    return [{"x": row[None]} for row in TOKENS[:16]]


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.out = self.folder / "out.onnx"

    def operators(self):
        model = onnx.load(self.out)
        onnx.checker.check_model(model)
        found = {}
        for node in model.graph.node:
            found.setdefault(node.op_type, []).append(node)
        return found, {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


class Static(Folder):
    def test_a_tutorial_runs_and_is_better(self):
        feeds = {"image": IMAGES}
        prepared, their_out = self.folder / "prepared.onnx", self.folder / "theirs.onnx"
        ours.quant_pre_process(DIGITS, prepared)
        self.assertNotIn("BatchNormalization", {n.op_type for n in onnx.load(prepared).graph.node})
        self.assertGreater(sqnr(DIGITS, prepared, feeds), 90)
        arguments = dict(quant_format=ours.QuantFormat.QDQ, weight_type=ours.QuantType.QInt8, reduce_range=False)
        ours.quantize_static(prepared, self.out, Reader(), **arguments)
        theirs.quantize_static(
            prepared, their_out, Reader(), quant_format=theirs.QuantFormat.QDQ, weight_type=theirs.QuantType.QInt8
        )
        self.assertGreater(sqnr(DIGITS, self.out, feeds), sqnr(DIGITS, their_out, feeds))

    def test_what_is_asked_for_is_done(self):
        """Each case: arguments, and what the zero points and scales of the model must be like."""

        def kinds(**arguments):
            ours.quantize_static(DIGITS, self.out, Reader(), **arguments)
            found, constants = self.operators()
            activations = {constants[n.input[2]].dtype.name for n in found["QuantizeLinear"]}
            weights = {constants[n.input[0]].dtype.name for n in found["DequantizeLinear"] if n.input[0] in constants}
            shapes = {
                constants[n.input[1]].ndim
                for n in found["DequantizeLinear"]
                if n.input[0] in constants and constants[n.input[0]].ndim == 4
            }
            return activations, weights - {"int32"}, shapes, found, constants

        q = ours.QuantType
        for module in (ours, theirs):
            q = module.QuantType
            activations, weights, shapes, _, _ = kinds(activation_type=q.QUInt8, weight_type=q.QInt8, per_channel=False)
            self.assertEqual(({"uint8"}, {"int8"}, {0}), (activations, weights, shapes))
        activations, _, shapes, _, constants = kinds(
            activation_type=q.QInt8, per_channel=True, extra_options={"ActivationSymmetric": True}, target="generic"
        )
        self.assertEqual(({"int8"}, {1}), (activations, shapes))
        _, _, _, found, constants = kinds(
            activation_type=q.QInt8, extra_options={"ActivationSymmetric": True}, target="generic"
        )
        self.assertEqual({0}, {int(constants[n.input[2]]) for n in found["QuantizeLinear"]})
        _, weights, _, found, constants = kinds(reduce_range=True, weight_type=q.QInt8)
        largest = max(abs(int(c)) for n in found["DequantizeLinear"] if n.input[0] in constants
                      for c in constants[n.input[0]].flat if constants[n.input[0]].dtype == np.int8)  # fmt: skip
        self.assertLessEqual(largest, 64)
        activations, _, _, _, _ = kinds(activation_type=q.QUInt16, weight_type=q.QInt8, target="generic")
        self.assertEqual({"uint16"}, activations)

    def test_what_is_selected(self):
        def quantized(**arguments):
            report = ours.quantize_static(DIGITS, self.out, Reader(), no_guard=True, **arguments)
            return {w["site"].rsplit(".", 1)[0] for w in report["weights"]}

        everything = quantized()
        self.assertIn("stem", everything)
        self.assertEqual({"classifier"}, quantized(op_types_to_quantize=["Gemm"]))
        self.assertEqual({"stem"}, quantized(nodes_to_quantize=["stem"]))
        self.assertEqual(everything - {"stem"}, quantized(nodes_to_exclude=["stem", "not in the model"]))
        self.assertEqual(
            everything - {"classifier"}, quantized(nodes_to_exclude=lambda model, node: node.op_type == "Gemm")
        )
        report = ours.quantize_static(
            ENCODER, self.out, iter_reader(tokens()), no_guard=True, extra_options={"MatMulConstBOnly": True}
        )
        products = {a["tensor"] for a in report["activations"]}
        self.assertNotIn("yt", products)

    def test_methods_of_calibration(self):
        found = []
        for method in (
            ours.CalibrationMethod.MinMax,
            ours.CalibrationMethod.Entropy,
            theirs.CalibrationMethod.Percentile,
        ):
            extra = {"CalibPercentile": 99.0} if method.name == "Percentile" else {}
            report = ours.quantize_static(
                DIGITS, self.out, Reader(), calibrate_method=method, extra_options=extra, no_guard=True
            )
            found.append({a["tensor"]: a["scale"] for a in report["activations"]}["stem_relu_out"])
        self.assertTrue(found[2] < found[1] <= found[0], found)

    def test_the_cache_takes_the_place_of_the_samples(self):
        cache = self.folder / "cache"
        ours.quantize_static(DIGITS, self.out, Reader(), calibration_cache_path=cache)
        first = self.out.read_bytes()
        ours.quantize_static(DIGITS, self.out, None, calibration_cache_path=cache)
        self.assertEqual(first, self.out.read_bytes())

    def test_other_formats(self):
        ours.quantize_static(DIGITS, self.out, Reader(), quant_format=ours.QuantFormat.QOperator)
        self.assertIn("QLinearConv", self.operators()[0])
        ours.quantize_static(DIGITS, self.out, Reader(), extra_options={"AddQDQPairToWeight": True})
        found, constants = self.operators()
        self.assertIn(
            "float32", {constants[n.input[0]].dtype.name for n in found["QuantizeLinear"] if n.input[0] in constants}
        )
        config = ours.get_qdq_config(
            DIGITS, Reader(), activation_type=ours.QuantType.QUInt16, weight_type=ours.QuantType.QInt8
        )
        ours.quantize(DIGITS, self.out, config)
        self.assertGreater(sqnr(DIGITS, self.out, {"image": IMAGES}), 30)
        overrides = {
            "stem_relu_out": [{"rmin": np.float32(0.0), "rmax": np.float32(2.55)}],
            "image": [{"scale": 0.5, "zero_point": 3}],
        }
        ours.quantize_static(
            DIGITS, self.out, Reader(), extra_options={"TensorQuantOverrides": overrides}, no_guard=True
        )
        found, constants = self.operators()
        scales = {
            n.input[0]: (float(constants[n.input[1]]), int(constants[n.input[2]])) for n in found["QuantizeLinear"]
        }
        self.assertEqual((0.5, 3), scales["image"])
        self.assertAlmostEqual(0.01, scales["stem_relu_out"][0], places=6)

    def test_what_has_no_counterpart_is_named(self):
        for part, arguments in {
            "DedicatedQDQPair": dict(extra_options={"DedicatedQDQPair": True}),
            "NoSuchOption": dict(extra_options={"NoSuchOption": 1}),
            "CalibMovingAverage": dict(extra_options={"CalibMovingAverage": True}),
            "calibrate_method": dict(calibrate_method=ours.CalibrationMethod.Distribution),
            "calibration_providers": dict(calibration_providers=["CUDAExecutionProvider"]),
            "TensorQuantOverrides": dict(extra_options={"TensorQuantOverrides": {"stem.weight": [{}, {}]}}),
            "reduce_range": dict(extra_options={"TensorQuantOverrides": {"image": [{"reduce_range": True}]}}),
        }.items():
            with self.subTest(part), self.assertRaisesRegex(UnsupportedOption, part):
                ours.quantize_static(DIGITS, self.out, Reader(), **arguments)
        ours.quantize_static(
            DIGITS, self.out, Reader(), extra_options={"DedicatedQDQPair": False, "CalibStridedMinMax": 4}
        )
        self.assertTrue(issubclass(UnsupportedOption, amax.UsageError) and self.out.exists())


def iter_reader(samples):
    class Samples:
        left = iter(samples)

        def get_next(self):
            return next(self.left, None)

    return Samples()


class Dynamic(Folder):
    def test_products_are_quantized_when_they_run(self):
        ours.quantize_dynamic(ENCODER, self.out, weight_type=ours.QuantType.QInt8)
        found, _ = self.operators()
        self.assertIn("DynamicQuantizeLinear", found)
        feeds = {"x": TOKENS}
        their_out = self.folder / "theirs.onnx"
        theirs.quantize_dynamic(ENCODER, their_out, weight_type=theirs.QuantType.QInt8)
        source = ENCODER.SerializeToString()
        self.assertGreater(sqnr(source, self.out, feeds), sqnr(source, their_out, feeds))
        report = ours.quantize_dynamic(
            ENCODER, self.out, nodes_to_exclude=["/block/fc1"], weight_type=ours.QuantType.QUInt8
        )
        self.assertEqual(["/block/fc2.weight"], [w["site"] for w in report["weights"]])
        self.assertEqual("uint8", report["weights"][0]["dtype"])
        with self.assertRaisesRegex(UnsupportedOption, "NoSuch"):
            ours.quantize_dynamic(ENCODER, self.out, extra_options={"NoSuch": True})


class NBits(Folder):
    def test_weights_in_few_bits(self):
        feeds, source = {"x": TOKENS}, ENCODER.SerializeToString()
        for arguments in (
            dict(bits=4, block_size=32, is_symmetric=True),
            dict(bits=4, block_size=32, is_symmetric=False, accuracy_level=1),
            dict(bits=8, block_size=64),
        ):
            with self.subTest(arguments):
                mine, other = (
                    ours.MatMulNBitsQuantizer(ENCODER, **arguments),
                    TheirNBits(onnx.load_from_string(source), **arguments),
                )
                mine.process()
                other.process()
                mine.model.save_model_to_file(self.out)
                found, _ = self.operators()
                self.assertEqual(2, len(found["MatMulNBits"]))
                (bits,) = {helper.get_node_attr_value(n, "bits") for n in found["MatMulNBits"]}
                self.assertEqual(arguments["bits"], bits)
                got = sqnr(source, self.out, feeds)
                self.assertGreaterEqual(got, sqnr(source, other.model.model.SerializeToString(), feeds) - 0.05)
        for config in (
            ours.HQQWeightOnlyQuantConfig(block_size=32),
            ours.KQuantWeightOnlyQuantConfig(),
            ours.RTNWeightOnlyQuantConfig(),
        ):
            quantizer = ours.MatMulNBitsQuantizer(
                ENCODER, block_size=32, nodes_to_exclude=["/block/fc1"], algo_config=config
            )
            quantizer.process()
            self.assertEqual(1, sum(n.op_type == "MatMulNBits" for n in quantizer.model.model.graph.node), config)
        with self.assertRaisesRegex(UnsupportedOption, "ratios"):
            ours.RTNWeightOnlyQuantConfig(ratios={"MatMul": 0.5})


class ModelOpt(Folder):
    def test_modes(self):
        for mode, method, kinds in (
            ("int8", None, {"int8"}),
            ("int8", "max", {"int8"}),
            ("int8", "entropy", {"int8"}),
            ("fp8", None, {"float8e4m3fn"}),
            ("int4", "rtn_dq", {"int4"}),
            ("int4", "awq_lite", {"int4"}),
        ):
            with self.subTest(mode, method=method):
                onnx.save(ENCODER, self.folder / "in.onnx")
                data = {"x": TOKENS[:16]} if method != "rtn_dq" else None
                report = modelopt.quantize(
                    self.folder / "in.onnx", mode, data, method, output_path=self.out, block_size=32, log_level="INFO"
                )
                self.assertEqual(kinds, {w["dtype"] for w in report["weights"]})
                self.operators()
        report = modelopt.quantize(
            DIGITS, calibration_data={"image": IMAGES}, output_path=self.out, nodes_to_exclude=["st.*", "wide"]
        )
        self.assertFalse({"stem.weight", "wide.weight"} & {w["site"] for w in report["weights"]})
        modelopt.quantize(
            DIGITS, calibration_data=IMAGES, output_path=self.out, dq_only=False, op_types_to_exclude=["Gemm"]
        )
        found, constants = self.operators()
        self.assertEqual(
            4, sum(n.input[0] in constants and constants[n.input[0]].ndim == 4 for n in found["QuantizeLinear"])
        )
        with self.assertRaisesRegex(UnsupportedOption, "int2"):
            modelopt.quantize(DIGITS, "int2", output_path=self.out)
        with self.assertRaisesRegex(amax.UsageError, "trt-plugins"):
            modelopt.quantize(DIGITS, calibration_data=IMAGES, output_path=self.out, trt_plugins=["a.so"])


if __name__ == "__main__":
    unittest.main()
