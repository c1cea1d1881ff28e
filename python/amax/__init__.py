"""amax quantizes ONNX models.

    >>> import amax
    >>> report = amax.quantize("model.onnx", "model.int8.onnx", data={"image": images})
    >>> report.sqnr_db

Each function is a command of the program ``amax``, which comes with this package and does the work. Every option of a
command is a keyword here, with underscores for dashes: ``exclude=["/head/*"]`` is ``--exclude '/head/*'``,
``no_guard=True`` is ``--no-guard``, and ``set={"default.weight.dtype": "int4"}`` is ``--set default.weight.dtype=int4``.

*Models* are paths, ``bytes``, or ``onnx.ModelProto``.

*Samples* (``data``) are one of

- a dict of arrays by input, whose rows are the samples; an array without axes is the same for all;
- an iterable of samples, read one by one: a list, a generator, a dataset. A sample is a dict of arrays as the model takes
  them, where a first axis of 1 may be left out, or a tuple of them in the order of the inputs. What comes after, or what
  no input is named after, such as labels, is left out;
- a loader with a ``batch_size``, such as torch's ``DataLoader``: rows of its batches are samples where the model's first
  axis is free;
- onnxruntime's ``CalibrationDataReader``, or anything else with ``get_next``;
- an array, for a model with one input;
- the path of a file or folder that ``amax rewrite --calib`` reads, ``"random"``, or ``"none"``.

Without ``data``, ``model.calib.npz`` beside ``model.onnx`` is used if it exists.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata as _metadata
from pathlib import Path
from typing import Any, Union

from . import _program, _samples
from ._errors import (
    AmaxError,
    CheckError,
    ConfigError,
    InternalError,
    ModelError,
    OutputError,
    RunError,
    SamplesError,
    UsageError,
)
from ._report import Comparison, Explanation, Model, Report, Statistics

__all__ = [
    "AmaxError",
    "CheckError",
    "Comparison",
    "ConfigError",
    "Explanation",
    "InternalError",
    "Model",
    "ModelError",
    "OutputError",
    "Report",
    "RunError",
    "SamplesError",
    "Statistics",
    "UsageError",
    "calibrate",
    "compare",
    "convert",
    "explain",
    "plan",
    "quantize",
]

try:
    __version__ = _metadata.version("amax")
except _metadata.PackageNotFoundError:
    __version__ = "unknown"

Path_ = Union[str, "os.PathLike[str]"]


def quantize(
    model: Any,
    out: Path_ | None = None,
    data: Any = None,
    *,
    preset: str | None = None,
    config: Path_ | Mapping[str, Any] | None = None,
    target: str | None = None,
    stats: Path_ | Statistics | None = None,
    verbose: bool = False,
    **options: Any,
) -> Report:
    """Quantizes a model (``amax rewrite``).

    ``out`` is where to write it; without, the model is in memory: ``report.to_bytes()``, ``report.model``.
    ``preset`` and ``target`` are names that ``amax presets`` and ``amax rewrite --help`` list, ``config`` is a file or a
    dict of the same keys, and ``stats`` are what :func:`calibrate` returned. ``verbose`` prints messages as they come.
    """
    with tempfile.TemporaryDirectory(prefix="amax-") as scratch:
        report = Path(options.pop("report", None) or Path(scratch) / "report.json")
        options.update(preset=preset, config=config, target=target, stats=stats, report=report)
        path, content, log = _write(options.pop("_command", "rewrite"), model, out, data, options, scratch, verbose)
        return Report(path, content, log, json.loads(report.read_text()))


def convert(
    model: Any,
    out: Path_ | None = None,
    *,
    form: str | None = None,
    data: Any = None,
    verbose: bool = False,
    **options: Any,
) -> Model:
    """Folds fake quantizers to integers, and changes how a quantized model is stored (``amax convert``).

    ``form`` is a storage format, such as ``"matmulnbits"`` or ``"qoperator"``. ``check=True`` proves the result on
    samples.
    """
    with tempfile.TemporaryDirectory(prefix="amax-") as scratch:
        options["form"] = form
        return Model(*_write("convert", model, out, data, options, scratch, verbose))


def calibrate(
    model: Any,
    out: Path_ | None = None,
    data: Any = None,
    *,
    verbose: bool = False,
    **options: Any,
) -> Statistics:
    """Runs a float model on samples and keeps statistics of its tensors (``amax calibrate``), for ``quantize(stats=…)``."""
    with tempfile.TemporaryDirectory(prefix="amax-") as scratch:
        path = os.fspath(out or Path(scratch) / "statistics.safetensors")
        with _model(model, scratch) as file:
            _run(["calibrate", file, "--output", path], file, data, options, scratch, verbose)
        statistics = Statistics.load(path)
        statistics.path = os.fspath(out) if out else None
        return statistics


def compare(
    reference: Any, test: Any, data: Any = None, *, sites: bool = False, verbose: bool = False, **options: Any
) -> Comparison:
    """Runs two models on the same samples: a row for each output, or, with ``sites``, for each quantized site."""
    options["sites"] = sites
    with tempfile.TemporaryDirectory(prefix="amax-") as scratch:
        with _model(reference, scratch) as a, _model(test, scratch, "test.onnx") as b:
            out = _run(["compare", a, b, "--json"], a, data, options, scratch, verbose)
    return Comparison(json.loads(out.stdout))


def plan(model: Any, *, config: Path_ | Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Every decision about a model, without running it (``amax plan --json``). ``quantize(plan=…)`` takes a file of it."""
    with tempfile.TemporaryDirectory(prefix="amax-") as scratch, _model(model, scratch) as file:
        out = _run(["plan", file, "--json"], file, None, {"config": config, **options}, scratch, False)
    made: dict[str, Any] = json.loads(out.stdout)
    return made


def explain(
    model: Any, pattern: str = "*", *, config: Path_ | Mapping[str, Any] | None = None, **options: Any
) -> Explanation:
    """Which rules apply to the sites that a glob matches, and how they are quantized (``amax explain --json``)."""
    with tempfile.TemporaryDirectory(prefix="amax-") as scratch, _model(model, scratch) as file:
        out = _run(["explain", file, pattern, "--json"], file, None, {"config": config, **options}, scratch, False)
    return Explanation(json.loads(out.stdout))


def _write(
    command: str, model: Any, out: Path_ | None, data: Any, options: dict[str, Any], scratch: str, verbose: bool
) -> tuple[str | None, bytes | None, str]:
    """Runs a command that writes a model: its path or content, and what was told."""
    target = os.fspath(out) if out is not None else "-"
    with _model(model, scratch) as file:
        done = _run([command, file, target], file, data, options, scratch, verbose)
    return (None, done.stdout, done.stderr) if out is None else (target, None, done.stderr)


def _run(
    arguments: list[str], model: str, data: Any, options: dict[str, Any], scratch: str, verbose: bool
) -> _program.Output:
    feed = None
    if data is not None and _samples.is_path(data):
        arguments += ["--calib", os.fspath(data)]
    elif data is not None:
        arguments += ["--calib", "-"]

        def feed(stream: Any) -> None:
            _samples.write(data, lambda: _inputs(model), stream)

    arguments += _arguments(options, scratch)
    return _program.run(arguments, feed, verbose)


def _arguments(options: Mapping[str, Any], scratch: str) -> Iterator[str]:
    """Keywords as options of the command line."""
    for key, value in options.items():
        flag = "--" + key.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        if isinstance(value, Statistics):
            path = Path(scratch) / "given.safetensors"
            value.save(path)
            value = path
        if key in ("config", "plan") and isinstance(value, Mapping):
            path = Path(scratch) / f"{key}.json"
            path.write_text(json.dumps(value))
            value = path
        if value is True:
            yield flag
        elif isinstance(value, Mapping):
            for name, item in value.items():
                yield from (flag, f"{name}={_text(item)}")
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                yield from (flag, _text(item))
        else:
            yield from (flag, _text(value))


def _text(value: Any) -> str:
    return (
        value if isinstance(value, str) else os.fspath(value) if isinstance(value, os.PathLike) else json.dumps(value)
    )


@contextmanager
def _model(model: Any, scratch: str, name: str = "model.onnx") -> Iterator[str]:
    """A file with the model."""
    if _samples.is_path(model):
        yield os.fspath(model)
        return
    path = Path(scratch) / name
    if hasattr(model, "SerializeToString"):
        try:
            path.write_bytes(model.SerializeToString())
        except Exception:
            # Above 2 GB, which is more than protobuf writes.
            import onnx

            onnx.save(model, path, save_as_external_data=True, location=name + ".data")
    elif isinstance(model, Model):
        path.write_bytes(model.to_bytes())
    elif isinstance(model, (bytes, bytearray, memoryview)):
        path.write_bytes(model)
    else:
        raise TypeError(f"a model is a path, bytes or an onnx.ModelProto, not {type(model).__name__}")
    yield os.fspath(path)


def _inputs(model: str) -> list[_samples.Input]:
    found = json.loads(_program.run(["inspect", model, "--json"]).stdout)
    # A type reads `float[batch, 3, 224, 224]`.
    given = [(name, kind) for name, kind in found["inputs"] if name not in found["defaults"]]
    return [_samples.Input(name, re.search(r"\[\D", kind) is not None) for name, kind in given]
