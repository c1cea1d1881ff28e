"""Which nodes of a model are quantized, as configurations of amax say it: by names that are left out."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from .. import _model, _program

_SPECIAL = re.compile(r"([\\.^$*+?{}\[\]|()#&~-])")

#: Names in one pattern.
_AT_ONCE = 256


def left_out(names: Iterable[str]) -> list[dict[str, Any]]:
    """Levels of a configuration that leave these nodes in float. Some may be gone when it is read: fused, or folded."""
    escaped = [_SPECIAL.sub(r"\\\1", name) for name in sorted(names)]
    parts = (escaped[at : at + _AT_ONCE] for at in range(0, len(escaped), _AT_ONCE))
    return [{"match": f"re:^({'|'.join(part)})$", "optional": True, "enable": False} for part in parts]


class Nodes:
    """The nodes of a model's main graph."""

    def __init__(self, model: Any) -> None:
        self._model = model
        with tempfile.TemporaryDirectory(prefix="amax-") as scratch, _model(model, scratch) as path:
            listed = json.loads(_program.run(["inspect", path, "--nodes", "--json"]).stdout)
        self.operators: dict[str, str] = {name: operator for operator, name in listed}

    @property
    def types(self) -> set[str]:
        """The operators that the model has."""
        return set(self.operators.values())

    def all_but(
        self,
        types: Iterable[str] | None = None,
        names: Iterable[str] | None = None,
        without: Iterable[str] | Callable[[Any, Any], bool] | None = None,
    ) -> set[str]:
        """What is left out where only these operators and these nodes are quantized, but for some."""
        left = set()
        if types:
            left |= {name for name, operator in self.operators.items() if operator not in set(types)}
        if names:
            left |= set(self.operators) - set(names)
        if callable(without):
            left |= self._matching(without)
        elif without:
            left |= set(self.operators) & set(without)
        return left

    def _matching(self, predicate: Callable[[Any, Any], bool]) -> set[str]:
        import onnx

        model = self._model
        if isinstance(model, (str, os.PathLike)):
            model = onnx.load(model, load_external_data=False)
        return {node.name for node in model.graph.node if predicate(model, node)}
