"""``onnxruntime.quantization``, run by amax.

    from amax.compat.onnxruntime import CalibrationDataReader, QuantType, quantize_static

Differences: a parameter that is not given is amax's own choice for the target (uint8 activations, int8 weights with one
scale per channel, changed where 16-bit sums of processors without VNNI could saturate), and amax leaves in float what
it measures to be too inaccurate, unless ``no_guard=True`` is given. Functions return the report, and every option of
:func:`amax.quantize`, such as ``target`` or ``verbose``, is a keyword here, too. Enumerations of onnxruntime are accepted
as well as those of this module.
"""

from __future__ import annotations

import abc
import enum
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import Report, calibrate, convert, plan
from .. import quantize as _quantize
from . import UnsupportedOption
from ._nodes import Nodes, left_out

__all__ = [
    "CalibrationDataReader",
    "CalibrationMethod",
    "DefaultWeightOnlyQuantConfig",
    "DynamicQuantConfig",
    "GPTQWeightOnlyQuantConfig",
    "HQQWeightOnlyQuantConfig",
    "KQuantWeightOnlyQuantConfig",
    "MatMulNBitsQuantizer",
    "QuantFormat",
    "QuantType",
    "RTNWeightOnlyQuantConfig",
    "StaticQuantConfig",
    "get_qdq_config",
    "quant_pre_process",
    "quantize",
    "quantize_dynamic",
    "quantize_static",
]


class QuantType(enum.Enum):
    """Element types."""

    QInt8 = 0
    QUInt8 = 1
    QFLOAT8E4M3FN = 2
    QInt16 = 3
    QUInt16 = 4
    QInt4 = 5
    QUInt4 = 6


class QuantFormat(enum.Enum):
    """How quantized operators are written."""

    QOperator = 0
    QDQ = 1


class CalibrationMethod(enum.Enum):
    """How ranges are chosen."""

    MinMax = 0
    Entropy = 1
    Percentile = 2
    Distribution = 3


class CalibrationDataReader(abc.ABC):
    """Gives samples: a dict of arrays each time, then None."""

    @abc.abstractmethod
    def get_next(self) -> dict[str, Any] | None:
        """The next sample."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_next, None)


_TYPES = {t: t[1:].lower() for t in ("QInt8", "QUInt8", "QInt16", "QUInt16", "QInt4", "QUInt4")}
_TYPES["QFLOAT8E4M3FN"] = "float8e4m3fn"
_OBSERVERS = {"MinMax": "minmax", "Entropy": "entropy", "Percentile": "percentile"}
#: Codes of a type, less one: what a range is divided by.
_STEPS = {"int8": 255, "uint8": 255, "int16": 65535, "uint16": 65535, "int4": 15, "uint4": 15}


def _name(value: Any) -> str:
    """The name of a member of an enumeration, of this module or of onnxruntime's."""
    return getattr(value, "name", str(value))


def _dtype(value: Any) -> str:
    try:
        return _TYPES[_name(value)]
    except KeyError:
        raise UnsupportedOption("quant_type", value) from None


class _Extra:
    """``extra_options``: each is taken once, and what nobody took is an error."""

    #: What holds anyway: the same results with less memory, or the default of onnxruntime itself.
    NEUTRAL = {
        "CalibStridedMinMax": None,
        "CalibMaxIntermediateOutputs": None,
        "CalibMovingAverageConstant": None,
        "QDQDisableWeightAdjustForInt32Bias": (False,),
        "DedicatedQDQPair": (False,),
        "UseQDQContribOps": (False,),
        "ForceQuantizeNoInputCheck": (False,),
        "QDQKeepRemovableActivations": (False,),
        "ActivationRestrictedAsymmetric": (False,),
        "CalibTensorRangeSymmetric": (False,),
        "CalibMovingAverage": (False,),
        "EnableSubgraph": (False,),
        "SmoothQuantFolding": (True,),
        "extra.Sigmoid.nnapi": (False,),
        "Sigmoid.nnapi": (False,),
    }

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        self._left = {key: value for key, value in (options or {}).items() if value is not None}

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def finish(self) -> None:
        for key, value in self._left.items():
            allowed = self.NEUTRAL.get(key, ())
            if allowed is not None and value not in allowed:
                raise UnsupportedOption(f'extra_options["{key}"]', value)


def quantize_static(
    model_input: Any,
    model_output: str | os.PathLike[str],
    calibration_data_reader: Any = None,
    quant_format: Any = QuantFormat.QDQ,
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool | None = None,
    reduce_range: bool = False,
    activation_type: Any = None,
    weight_type: Any = None,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | Callable[[Any, Any], bool] | None = None,
    use_external_data_format: bool = False,
    calibrate_method: Any = None,
    calibration_providers: Sequence[str] | None = None,
    extra_options: Mapping[str, Any] | None = None,
    calibration_cache_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Report:
    """Quantizes weights and activations; ranges come from samples.

    ``op_types_to_quantize`` and ``nodes_to_quantize`` are filters: among these, amax decides as it does otherwise.
    ``calibration_cache_path`` is a file of statistics, as ``amax calibrate`` writes it: used if it exists, else made.
    """
    _only_cpu(calibration_providers)
    extra = _Extra(extra_options)
    nodes = Nodes(model_input)
    activation = _activation(activation_type, calibrate_method, extra)
    weight = _weight(weight_type, per_channel, reduce_range, extra)
    config: dict[str, Any] = {
        "default": {"input": activation, "output": dict(activation), "weight": weight},
    }
    left = nodes.all_but(op_types_to_quantize, nodes_to_quantize, nodes_to_exclude)
    operators: dict[str, dict[str, Any]] = {}
    if minimum := extra.take("MinimumRealRange"):
        for spec, default in ((activation, "uint8"), (config["default"]["output"], "uint8"), (weight, "int8")):
            spec["eps"] = minimum / _STEPS[spec.get("dtype", default)]
    if not extra.take("QuantizeBias", True):
        config["default"]["bias"] = {"enable": False}
    for operator in extra.take("OpTypesToExcludeOutputQuantization", ()):
        if operator in nodes.types:
            operators.setdefault(operator, {})["output"] = {"enable": False}
    for operator, axis in extra.take("QDQOpTypePerChannelSupportToAxis", {}).items():
        if per_channel and operator in nodes.types:
            operators.setdefault(operator, {})["weight"] = {"ch_axis": axis}
    if extra.take("MatMulConstBOnly", False):
        left |= _products_of_activations(model_input, nodes)
    config["layer"] = left_out(left)
    if extra.take("SmoothQuant", False):
        config["algorithm"] = {"method": "smoothquant", "alpha": extra.take("SmoothQuantAlpha", 0.5)}
    extra.take("SmoothQuantAlpha")
    if tensors := _overrides(extra.take("TensorQuantOverrides", {})):
        config["tensor"] = tensors
    pairs = extra.take("AddQDQPairToWeight", False)
    extra.finish()
    if operators:
        config["op_type"] = operators

    data: Any = "none" if calibration_data_reader is None else calibration_data_reader
    if calibration_cache_path is not None:
        if not os.path.exists(calibration_cache_path):
            calibrate(model_input, calibration_cache_path, data)
        options["stats"], data = calibration_cache_path, "none"
    options.update(config=config, data=data, external_data=use_external_data_format)
    if pairs:
        options["_command"] = "prepare"
    if _name(quant_format) == "QDQ":
        return _quantize(model_input, model_output, **options)
    if pairs:
        raise UnsupportedOption(
            'extra_options["AddQDQPairToWeight"]', True, "QOperator has no pairs; use QuantFormat.QDQ"
        )
    with tempfile.TemporaryDirectory(prefix="amax-") as scratch:
        between = Path(scratch) / "qdq.onnx"
        report = _quantize(model_input, between, **options)
        convert(between, model_output, form="qoperator")
    report.path = os.fspath(model_output)
    return report


def quantize_dynamic(
    model_input: Any,
    model_output: str | os.PathLike[str],
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool | None = None,
    reduce_range: bool = False,
    weight_type: Any = None,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | Callable[[Any, Any], bool] | None = None,
    use_external_data_format: bool = False,
    extra_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Quantizes weights, and activations with ranges that are computed each time the model runs."""
    extra = _Extra(extra_options)
    # Only weights are constants of products here, and those in bodies of If, Loop and Scan are quantized, too.
    extra.take("MatMulConstBOnly")
    extra.take("EnableSubgraph")
    config: dict[str, Any] = {
        "preset": options.pop("preset", "int8-dynamic"),
        "default": {"weight": _weight(weight_type, per_channel, reduce_range, extra)},
        "layer": left_out(Nodes(model_input).all_but(op_types_to_quantize, nodes_to_quantize, nodes_to_exclude)),
    }
    if symmetric := extra.take("ActivationSymmetric"):
        config["default"]["input"] = {"symmetric": symmetric}
    extra.finish()
    options = {"data": "none", "external_data": use_external_data_format, **options, "config": config}
    return _quantize(model_input, model_output, **options)


class StaticQuantConfig:
    """The arguments of :func:`quantize_static`, for :func:`quantize`."""

    def __init__(self, calibration_data_reader: Any, **arguments: Any) -> None:
        self.arguments = {"calibration_data_reader": calibration_data_reader, **arguments}


class DynamicQuantConfig:
    """The arguments of :func:`quantize_dynamic`, for :func:`quantize`."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


def quantize(
    model_input: Any, model_output: str | os.PathLike[str], quant_config: StaticQuantConfig | DynamicQuantConfig
) -> Report:
    """Quantizes as a configuration says."""
    run = quantize_static if isinstance(quant_config, StaticQuantConfig) else quantize_dynamic
    return run(model_input, model_output, **quant_config.arguments)


def get_qdq_config(
    model_input: Any,
    calibration_data_reader: Any,
    calibrate_method: Any = None,
    calibrate_args: Mapping[str, Any] | None = None,
    activation_type: Any = None,
    weight_type: Any = None,
    activation_symmetric: bool = False,
    weight_symmetric: bool | None = None,
    per_channel: bool | None = None,
    reduce_range: bool = False,
    keep_removable_activations: bool = False,
    min_real_range: float | None = None,
    tensor_quant_overrides: Mapping[str, Any] | None = None,
    calibration_providers: Sequence[str] | None = None,
    op_types_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | Callable[[Any, Any], bool] | None = None,
    extra_options: Mapping[str, Any] | None = None,
) -> StaticQuantConfig:
    """The configuration of a QDQ model, for :func:`quantize`."""
    names = {
        "symmetric": "CalibTensorRangeSymmetric",
        "moving_average": "CalibMovingAverage",
        "averaging_constant": "CalibMovingAverageConstant",
        "max_intermediate_outputs": "CalibMaxIntermediateOutputs",
        "percentile": "CalibPercentile",
    }
    extra = {
        "ActivationSymmetric": activation_symmetric,
        "WeightSymmetric": weight_symmetric,
        "MinimumRealRange": min_real_range,
        "QDQKeepRemovableActivations": keep_removable_activations,
        "TensorQuantOverrides": tensor_quant_overrides,
    }
    for key, value in (calibrate_args or {}).items():
        if key not in names:
            raise UnsupportedOption(f'calibrate_args["{key}"]', value)
        extra[names[key]] = value
    return StaticQuantConfig(
        calibration_data_reader,
        calibrate_method=calibrate_method,
        quant_format=QuantFormat.QDQ,
        activation_type=activation_type,
        weight_type=weight_type,
        op_types_to_quantize=op_types_to_quantize,
        nodes_to_exclude=nodes_to_exclude,
        per_channel=per_channel,
        reduce_range=reduce_range,
        calibration_providers=calibration_providers,
        extra_options={**extra, **(extra_options or {})},
    )


def quant_pre_process(
    input_model: Any = None,
    output_model_path: str | os.PathLike[str] | None = None,
    skip_optimization: bool = False,
    skip_onnx_shape: bool = False,
    skip_symbolic_shape: bool = False,
    auto_merge: bool = False,
    int_max: int = 2**31 - 1,
    guess_output_rank: bool = False,
    verbose: int = 0,
    save_as_external_data: bool = False,
    all_tensors_to_one_file: bool = False,
    external_data_location: str | None = None,
    external_data_size_threshold: int = 1024,
) -> None:
    """Folds constants and fuses batch normalizations.

    amax does this by itself, and infers shapes from samples, so models need no such step: it is here for scripts that
    have one.
    """
    if external_data_location is not None:
        raise UnsupportedOption("external_data_location", external_data_location)
    passes = "lift-constants" if skip_optimization else "lift-constants,fold-constants,fuse-batchnorm"
    _quantize(input_model, output_model_path, "none", passes=passes, external_data=save_as_external_data)


class _WeightOnly:
    """How :class:`MatMulNBitsQuantizer` chooses codes."""

    def __init__(self, method: str | None, **given: Any) -> None:
        self.method = method
        self.given = {key: value for key, value in given.items() if value is not None}


class DefaultWeightOnlyQuantConfig(_WeightOnly):
    """Rounds to the nearest code."""

    def __init__(
        self,
        block_size: int = 128,
        is_symmetric: bool = False,
        accuracy_level: int | None = None,
        quant_format: Any = QuantFormat.QOperator,
        op_types_to_quantize: Sequence[str] | None = None,
        quant_axes: Any = None,
        bits: int = 4,
        channel_wised_quantize: bool = False,
    ) -> None:
        super().__init__(
            None,
            block_size=block_size,
            is_symmetric=is_symmetric,
            accuracy_level=accuracy_level,
            quant_format=quant_format,
            op_types_to_quantize=op_types_to_quantize,
            quant_axes=quant_axes,
            bits=bits,
            channel_wised_quantize=channel_wised_quantize,
        )


class _Rounding(_WeightOnly):
    """Rounding, by the method of the class."""

    _method: str | None = None

    def __init__(
        self,
        ratios: Any = None,
        quant_format: Any = QuantFormat.QOperator,
        op_types_to_quantize: Sequence[str] | None = None,
        customized_weight_config: Any = None,
    ) -> None:
        _refuse(ratios=ratios, customized_weight_config=customized_weight_config)
        super().__init__(self._method, quant_format=quant_format, op_types_to_quantize=op_types_to_quantize)


class RTNWeightOnlyQuantConfig(_Rounding):
    """Rounds to the nearest code."""


class KQuantWeightOnlyQuantConfig(_Rounding):
    """Searches scales as llama.cpp's K-quants do."""

    _method = "kquant"


class HQQWeightOnlyQuantConfig(_WeightOnly):
    """Half-quadratic quantization."""

    def __init__(
        self,
        block_size: int = 128,
        bits: int = 4,
        axis: int = 1,
        quant_format: Any = QuantFormat.QOperator,
        op_types_to_quantize: Sequence[str] | None = None,
        quant_axes: Any = None,
    ) -> None:
        if axis != 1:
            raise UnsupportedOption("axis", axis, "groups lie along the axis that is summed over")
        super().__init__(
            "hqq",
            block_size=block_size,
            bits=bits,
            quant_format=quant_format,
            op_types_to_quantize=op_types_to_quantize,
            quant_axes=quant_axes,
        )


class GPTQWeightOnlyQuantConfig(_WeightOnly):
    """Solves codes for what samples show of the inputs."""

    def __init__(
        self,
        calibration_data_reader: Any = None,
        percdamp: float = 0.01,
        block_size: int = 128,
        actorder: bool = False,
        mse: bool = False,
        perchannel: bool = True,
        quant_format: Any = QuantFormat.QOperator,
        op_types_to_quantize: Sequence[str] | None = None,
    ) -> None:
        defaults = {"percdamp": (percdamp, 0.01), "mse": (mse, False), "perchannel": (perchannel, True)}
        _refuse(**{name: value for name, (value, default) in defaults.items() if value != default})
        # The order is amax's own choice, and block_size only how many columns are solved at once.
        super().__init__("gptq", quant_format=quant_format, op_types_to_quantize=op_types_to_quantize)
        self.data = calibration_data_reader


class _Quantized:
    """The model of a quantizer that ran, with the methods that scripts call."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.model = report.model

    def save_model_to_file(self, path: str | os.PathLike[str], use_external_data_format: bool = False) -> None:
        """Writes the model."""
        import onnx

        if use_external_data_format:
            location = os.path.basename(path) + ".data"
            onnx.save(self.model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=location)
        else:
            onnx.save(self.model, path)


class MatMulNBitsQuantizer:
    """Stores weights of products in few bits: ``process()``, then ``model``."""

    def __init__(
        self,
        model: Any,
        bits: int = 4,
        block_size: int = 128,
        is_symmetric: bool = False,
        accuracy_level: int | None = None,
        nodes_to_exclude: Sequence[str] | None = None,
        nodes_to_include: Sequence[str] | None = None,
        quant_format: Any = QuantFormat.QOperator,
        op_types_to_quantize: Sequence[str] | None = None,
        quant_axes: Any = None,
        channel_wised_quantize: bool = False,
        algo_config: _WeightOnly | None = None,
        **options: Any,
    ) -> None:
        given = {
            "bits": bits,
            "block_size": block_size,
            "is_symmetric": is_symmetric,
            "accuracy_level": accuracy_level,
            "quant_format": quant_format,
            "op_types_to_quantize": op_types_to_quantize,
            "quant_axes": quant_axes,
            "channel_wised_quantize": channel_wised_quantize,
            **(algo_config.given if algo_config else {}),
        }
        if dict(given["quant_axes"] or {}) not in ({}, {"MatMul": 0}, {"Gather": 1}, {"MatMul": 0, "Gather": 1}):
            raise UnsupportedOption("quant_axes", given["quant_axes"])
        self._input = model
        qdq = _name(given["quant_format"]) == "QDQ"
        weight = {
            "enable": True,
            "dtype": f"{'int' if given['is_symmetric'] else 'uint'}{given['bits']}",
            "symmetric": bool(given["is_symmetric"]),
        }
        if given["channel_wised_quantize"]:
            weight["granularity"] = "per-channel"
        else:
            weight.update(granularity="per-group", group_size=given["block_size"])
        if given["is_symmetric"]:
            weight["signed_scale"] = True
        off = {"enable": False}
        types = given["op_types_to_quantize"] or ("MatMul",)
        nodes = Nodes(model)
        config: dict[str, Any] = {
            "default": {"input": off, "output": off, "weight": off},
            "op_type": {},
            "layer": left_out(nodes.all_but(types, nodes_to_include, nodes_to_exclude)),
        }
        for operator in types:
            form = "gather-block-quantized" if operator == "Gather" else "matmulnbits"
            spec = {**weight, "form": "qdq" if qdq else form}
            if operator != "Gather" and not qdq:
                spec["accuracy_level"] = given["accuracy_level"] or 0
            if operator in nodes.types:
                config["op_type"][operator] = {"weight": spec}
        if algo_config and algo_config.method:
            config["algorithm"] = {"method": algo_config.method}
        data = getattr(algo_config, "data", None)
        self._options = {"data": "none" if data is None else data, **options, "config": config}
        self.model: Any = None

    def process(self) -> None:
        """Quantizes; the result is in ``model``."""
        self.model = _Quantized(_quantize(self._input, **self._options))


def _activation(dtype: Any, method: Any, extra: _Extra) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    symmetric = extra.take("ActivationSymmetric")
    if dtype is not None:
        spec["dtype"] = _dtype(dtype)
        symmetric = bool(symmetric)
    if symmetric is not None and not spec.get("dtype", "").startswith("float"):
        spec["symmetric"] = symmetric
    percentile = extra.take("CalibPercentile")
    if method is not None:
        if _name(method) not in _OBSERVERS:
            raise UnsupportedOption("calibrate_method", method)
        spec["observer"] = _OBSERVERS[_name(method)]
        if spec["observer"] == "percentile":
            spec["percentile"] = 99.999 if percentile is None else percentile
    return spec


def _weight(dtype: Any, per_channel: bool | None, reduce_range: bool, extra: _Extra) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    symmetric = extra.take("WeightSymmetric")
    if dtype is not None:
        spec["dtype"] = _dtype(dtype)
        if symmetric is None:
            symmetric = not spec["dtype"].startswith("u")
    if symmetric is not None and not spec.get("dtype", "").startswith("float"):
        spec["symmetric"] = symmetric
    if per_channel is not None:
        spec["granularity"] = "per-channel" if per_channel else "per-tensor"
    if reduce_range:
        spec["reduce_range"] = True
    return spec


def _overrides(tensors: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """``TensorQuantOverrides``, of whole tensors."""
    found = {}
    for tensor, channels in tensors.items():
        if len(channels) != 1 or "axis" in channels[0]:
            raise UnsupportedOption(
                f'TensorQuantOverrides["{tensor}"]', channels, "one dict, for the whole tensor, can be given"
            )
        given = dict(channels[0])
        spec: dict[str, Any] = {"optional": True}
        if "quant_type" in given:
            spec["dtype"] = _dtype(given.pop("quant_type"))
        for key in ("scale", "zero_point", "symmetric"):
            if key in given:
                value = given.pop(key)
                spec[key] = value if isinstance(value, bool) else value.item() if hasattr(value, "item") else value
        if "rmin" in given and "rmax" in given:
            spec["range"] = [float(given.pop("rmin")), float(given.pop("rmax"))]
        for key, value in given.items():
            raise UnsupportedOption(f'TensorQuantOverrides["{tensor}"]["{key}"]', value)
        found[tensor] = spec
    return found


def _products_of_activations(model: Any, nodes: Nodes) -> set[str]:
    """The MatMuls without a weight."""
    weights = {row["site"].rsplit(".", 1)[0] for row in plan(model, preset="w8", no_samples=True)["weights"]}
    return {n for n, operator in nodes.operators.items() if operator == "MatMul" and n not in weights}


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise UnsupportedOption(name, value)


def _only_cpu(providers: Sequence[str] | None) -> None:
    if any(p != "CPUExecutionProvider" for p in providers or ()):
        raise UnsupportedOption("calibration_providers", providers, "samples run on the CPU; leave it out")
