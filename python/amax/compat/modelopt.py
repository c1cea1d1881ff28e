"""``modelopt.onnx.quantization``, run by amax.

    from amax.compat.modelopt import quantize

The target is ``tensorrt`` unless another is given. A parameter that is not given is amax's own choice: ranges are
``"max"``, weights are stored as integers (``dq_only``), and what stays float keeps its type. Functions return the report,
and every option of :func:`amax.quantize` is a keyword here, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import Report
from .. import quantize as _quantize
from . import UnsupportedOption
from ._nodes import Nodes, left_out

__all__ = ["quantize", "quantize_int4"]

_OBSERVERS = {"max": "minmax", "minmax": "minmax", "entropy": "entropy"}
_ALGORITHMS = {
    "rtn": None,
    "rtn_dq": None,
    "awq_lite": "awq_lite",
    "awq_clip": "awq_clip",
    "awq": "awq_full",
    "awq_full": "awq_full",
}
_FLOATS = {None: None, "fp32": None, "fp16": "float16", "bf16": "bfloat16"}

#: Options that concern logs and files beside the result, of which there are none here.
_NEUTRAL = {"log_level", "log_file", "keep_intermediate_files"}


def quantize(
    onnx_path: str | os.PathLike[str],
    quantize_mode: str = "int8",
    calibration_data: Any = None,
    calibration_method: str | None = None,
    calibration_cache_path: str | os.PathLike[str] | None = None,
    calibration_data_reader: Any = None,
    calibration_eps: Sequence[str] | None = None,
    op_types_to_quantize: Sequence[str] | None = None,
    op_types_to_exclude: Sequence[str] | None = None,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    output_path: str | os.PathLike[str] | None = None,
    high_precision_dtype: str | None = None,
    dq_only: bool | None = None,
    block_size: int | None = None,
    use_zero_point: bool = False,
    gather_block_size: int | None = None,
    gather_quantize_axis: int | None = None,
    **options: Any,
) -> Report:
    """Quantizes a model in mode ``"int8"``, ``"fp8"`` or ``"int4"``.

    Nodes are regular expressions that match from the beginning of a name. Rows of ``calibration_data`` are samples;
    ``calibration_cache_path`` is a file of statistics of ``amax calibrate``. Without an ``output_path`` the result is
    ``MODEL.quant.onnx``.
    """
    for name in _NEUTRAL & set(options):
        del options[name]
    if any(eps not in ("cpu", "cuda:0", "trt") for eps in calibration_eps or ()):
        raise UnsupportedOption("calibration_eps", calibration_eps)
    if high_precision_dtype not in _FLOATS:
        raise UnsupportedOption("high_precision_dtype", high_precision_dtype)
    nodes = Nodes(onnx_path)
    config = _config(
        quantize_mode, calibration_method, block_size, use_zero_point, gather_block_size, gather_quantize_axis, nodes
    )
    types = nodes.types if op_types_to_quantize is None else set(op_types_to_quantize)
    left = nodes.all_but(types - set(op_types_to_exclude or ()) or {""})
    for name in nodes.operators:
        asked = not nodes_to_quantize or any(re.match(pattern, name) for pattern in nodes_to_quantize)
        if not asked or any(re.match(pattern, name) for pattern in nodes_to_exclude or ()):
            left.add(name)
    config["layer"] = left_out(left)
    data = calibration_data if calibration_data_reader is None else calibration_data_reader
    if calibration_cache_path is not None:
        options["stats"] = calibration_cache_path
    if data is None and quantize_mode == "int4":
        data = "none"
    if dq_only is False:
        options["_command"] = "prepare"
    out = output_path or Path(onnx_path).with_suffix(".quant.onnx")
    options = {"target": "generic" if quantize_mode == "int4" else "tensorrt", **options}
    dtype = _FLOATS[high_precision_dtype]
    return _quantize(
        onnx_path, out, data, config=config, dtype=dtype, external_data=use_external_data_format, **options
    )


def quantize_int4(
    onnx_path: str | os.PathLike[str],
    calibration_method: str = "awq_lite",
    calibration_data_reader: Any = None,
    use_external_data_format: bool = True,
    use_zero_point: bool = False,
    block_size: int | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    gather_block_size: int | None = None,
    gather_quantize_axis: int | None = None,
    **options: Any,
) -> Any:
    """The model as an ``onnx.ModelProto``, its products in 4 bits."""
    out = options.pop("output_path", None)
    return quantize(
        onnx_path,
        "int4",
        calibration_method=calibration_method,
        calibration_data_reader=calibration_data_reader,
        nodes_to_exclude=nodes_to_exclude,
        use_external_data_format=use_external_data_format,
        use_zero_point=use_zero_point,
        block_size=block_size,
        gather_block_size=gather_block_size,
        gather_quantize_axis=gather_quantize_axis,
        output_path=out,
        **options,
    ).model


def _config(
    mode: str,
    method: str | None,
    block_size: int | None,
    zero_point: bool,
    gather_block_size: int | None,
    gather_axis: int | None,
    nodes: Nodes,
) -> dict[str, Any]:
    if mode == "int4":
        if method is not None and method not in _ALGORITHMS:
            raise UnsupportedOption("calibration_method", method)
        weight = {
            "enable": True,
            "dtype": "uint4" if zero_point else "int4",
            "granularity": "per-group",
            "group_size": block_size or 128,
            "symmetric": not zero_point,
            "form": "qdq",
        }
        off = {"enable": False}
        operators: dict[str, Mapping[str, Any]] = {
            t: {"weight": weight} for t in ("MatMul", "Gemm") if t in nodes.types
        }
        if gather_block_size and "Gather" in nodes.types:
            axis = {} if gather_axis is None else {"ch_axis": gather_axis}
            operators["Gather"] = {"weight": {**weight, "group_size": gather_block_size, **axis}}
        config = {"default": {"input": off, "output": off, "weight": off}, "op_type": operators}
        if method is not None and _ALGORITHMS[method]:
            config["algorithm"] = {"method": _ALGORITHMS[method]}
        return config
    if mode not in ("int8", "fp8"):
        raise UnsupportedOption(
            "quantize_mode", mode, "modes are int8, fp8 and int4; amax.quantize has many more presets"
        )
    if method is not None and method not in _OBSERVERS:
        raise UnsupportedOption("calibration_method", method)
    observer = {} if method is None else {"observer": _OBSERVERS[method]}
    return {"preset": mode, "default": {"input": observer, "output": dict(observer)}}
