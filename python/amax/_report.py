"""What a run gives back."""

from __future__ import annotations

import html
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Model:
    """A model that was written: a file, or bytes if no output was named."""

    def __init__(self, path: str | None, content: bytes | None, log: str) -> None:
        #: Where the model was written; None if it is in memory.
        self.path = path
        self._content = content
        #: What the program told, as text.
        self.log = log

    def to_bytes(self) -> bytes:
        """The model as a file would hold it; without external data, if it has some."""
        if self._content is None and self.path is not None:
            return Path(self.path).read_bytes()
        return self._content or b""

    @property
    def model(self) -> Any:
        """The model as an ``onnx.ModelProto``; needs the package onnx."""
        import onnx

        return onnx.load(self.path) if self.path else onnx.load_from_string(self.to_bytes())

    def __repr__(self) -> str:
        return self.log.strip() or f"<{type(self).__name__} {self.path or 'in memory'}>"


class Report(Model, Mapping[str, Any]):
    """What :func:`amax.quantize` did: a mapping, as ``amax rewrite --report`` writes it. Prints as the summary."""

    def __init__(self, path: str | None, content: bytes | None, log: str, document: dict[str, Any]) -> None:
        super().__init__(path, content, log)
        self._document = document

    def __getitem__(self, key: str) -> Any:
        return self._document[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)

    @property
    def sqnr_db(self) -> float | None:
        """The smallest signal-to-noise ratio of an output on held-out samples, in dB; None if none was measured."""
        return min((row["sqnr_db"] for row in self["quality"] if row.get("sqnr_db") is not None), default=None)

    @property
    def warnings(self) -> list[Any]:
        """What the program warned of."""
        return list(self["warnings"])

    def _repr_html_(self) -> str:
        before, after = self["bytes"]
        share = f"{before / 1e3:,.1f} kB → {after / 1e3:,.1f} kB ({after / max(before, 1):.0%})"
        facts = [("target", self["target"]), ("size", share), ("samples", self.get("samples") or "none")]
        operators = [(op, f"{some} of {all_}") for op, (some, all_) in self["operators"].items()]
        tables = [table(("", ""), facts)]
        if operators:
            tables.append(table(("operator", "quantized"), operators))
        if self["quality"]:
            tables.append(quality_table(self["quality"]))
        if self["skipped"]:
            skipped = [(s["op"], s["node"], s["why"]["text"]) for s in self["skipped"]]
            inner = table(("operator", "node", "why"), skipped)
            tables.append(f"<details><summary>{len(skipped)} left in float</summary>{inner}</details>")
        return "".join(tables)


class Comparison(list[dict[str, Any]]):
    """Rows of :func:`amax.compare`: an output or a site each, as ``amax compare --json`` prints them."""

    def _repr_html_(self) -> str:
        return quality_table(self)


class Explanation(list[dict[str, Any]]):
    """Rows of :func:`amax.explain`: a site each, as ``amax explain --json`` prints them."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(json.dumps(list(self), indent=1))}</pre>"


class Statistics(Mapping[str, Any]):
    """What calibration saw: numpy arrays by name, and a header. A path of a file works wherever this does."""

    def __init__(self, content: bytes, path: str | None = None) -> None:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        #: Model, samples and sites, as text that is JSON in most fields.
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.path = path
        self._content = content
        self._places = header
        self._start = 8 + length

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads a file of ``amax calibrate``."""
        with open(path, "rb") as file:
            return cls(file.read(), os.fspath(path))

    def to_bytes(self) -> bytes:
        """The file's content."""
        return self._content

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that ``amax rewrite --stats`` reads."""
        with open(path, "wb") as file:
            file.write(self._content)

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        begin, end = place["data_offsets"]
        view = memoryview(self._content)[self._start + begin : self._start + end]
        return np.frombuffer(view, _TYPES[place["dtype"]]).reshape(place["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<Statistics: {len(self)} arrays, {len(self._content)} bytes>"


_TYPES = {
    "BOOL": "?", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I8": "<i1", "I16": "<i2", "I32": "<i4",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def quality_table(rows: list[dict[str, Any]]) -> str:
    heads = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list)))
    )
    return table(heads, [[_cell(row.get(head)) for head in heads] for row in rows])


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def table(heads: Any, rows: Any) -> str:
    def line(tag: str, cells: Any) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line('th', heads)}</thead>" if any(heads) else ""
    return f"<table>{head}<tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"
