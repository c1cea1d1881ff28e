"""Samples in the forms that Python has them in, as the stream that the program reads from its stdin.

A sample is a value for each input. On the stream each array is a line with the input's name and then the array as
``numpy.save`` writes it; an empty line ends a sample. One sample is in memory at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

Sample = dict[str, np.ndarray]


class Input(NamedTuple):
    """An input of the model."""

    name: str
    #: Whether the first axis may have any size.
    free: bool


def is_path(data: Any) -> bool:
    """Whether the program opens these samples itself; ``"random"`` and ``"none"`` are words it knows."""
    return isinstance(data, (str, os.PathLike))


def write(data: Any, inputs: Callable[[], list[Input]], stream: IO[bytes]) -> None:
    """Writes every sample of ``data``."""
    for sample in samples(data, inputs()):
        for name, array in sample.items():
            if "\n" in name:
                raise ValueError(f"the name of an input has a line break: {name!r}")
            stream.write(name.encode() + b"\n")
            array = np.asarray(array, order="C")
            # numpy.save would ask the pipe for its position.
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_2_0(stream, header)
            stream.write(array.tobytes())
        stream.write(b"\n")
    stream.flush()


def samples(data: Any, inputs: Sequence[Input]) -> Iterator[Sample]:
    """The samples of anything that holds some; see :func:`amax.quantize` for what that may be."""
    known = {i.name for i in inputs}
    if hasattr(data, "get_next"):
        # onnxruntime's CalibrationDataReader: what it gives is what the model is run on.
        yield from (_named(item, inputs, known) for item in iter(data.get_next, None))
    elif isinstance(data, Mapping):
        yield from rows({name: _array(value) for name, value in data.items()})
    elif _is_array(data):
        yield from rows(_named(data, inputs, known))
    elif isinstance(data, Iterable):
        batches = getattr(data, "batch_size", None) is not None
        for item in data:
            sample = _named(item, inputs, known)
            yield from _split(sample, inputs) if batches else [sample]
    else:
        raise TypeError(
            f"samples cannot be of type {type(data).__name__}: give a dict of arrays, an iterable of samples, "
            "a reader with get_next, or a path"
        )


def rows(arrays: Sample) -> Iterator[Sample]:
    """A sample for each row; arrays without axes are the same for all of them."""
    counts = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(counts.values())) > 1:
        raise ValueError(f"arrays have different numbers of rows, which are the samples: {counts}")
    for row in range(next(iter(counts.values()), 1)):
        yield {name: array[row] if array.ndim else array for name, array in arrays.items()}


def _split(batch: Sample, inputs: Sequence[Input]) -> Iterator[Sample]:
    """The rows of a loader's batch where the model takes any number, as samples of one row."""
    sizes = {array.shape[:1] for array in batch.values()}
    free = all(i.free for i in inputs if i.name in batch)
    if len(sizes) == 1 and sizes != {()} and free:
        for row in range(sizes.pop()[0]):
            yield {name: array[row : row + 1] for name, array in batch.items()}
    else:
        yield batch


def _named(item: Any, inputs: Sequence[Input], known: set[str]) -> Sample:
    """The arrays of an item by input, without what belongs to no input, such as labels."""
    if isinstance(item, Mapping):
        others = [name for name in item if name not in known]
        if others and known.issubset(item):
            _say_once(f"samples also hold {', '.join(map(str, others))}, which the model has no input for")
            return {name: _array(item[name]) for name in item if name in known}
        return {str(name): _array(value) for name, value in item.items()}
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(values) < len(inputs):
        names = ", ".join(i.name for i in inputs)
        raise ValueError(f"a sample has {len(values)} values, but the inputs are {names}: give a dict by input")
    return {i.name: _array(value) for i, value in zip(inputs, values, strict=False)}


def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _array(value: Any) -> np.ndarray:
    # Tensors of torch that are on a device, or part of a graph.
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError("a sample holds Python objects, or rows of different lengths, instead of numbers")
    return array
