"""What goes wrong, one class for each exit code of the program."""

from __future__ import annotations

from typing import Any


class AmaxError(Exception):
    """What the program refused or could not do.

    ``kind`` is a word ("config", "model", …), ``message`` a sentence, ``at`` says where it happened (``file``, ``line``,
    ``node``, ``value``, ``sample``, …; only what is known), and ``hint`` what to do about it, if there is something.
    """

    kind = "internal"

    def __init__(
        self, message: str, *, at: dict[str, Any] | None = None, hint: str | None = None, exit_code: int = 1
    ) -> None:
        self.message = message
        self.at = at or {}
        self.hint = hint
        self.exit_code = exit_code
        place = ", ".join(f"{part} {name}" for part, name in self.at.items())
        lines = [message, f"  at {place}" if place else "", f"hint: {hint}" if hint else ""]
        super().__init__("\n".join(line for line in lines if line))


class UsageError(AmaxError, ValueError):
    """Arguments that make no sense."""

    kind = "usage"


class ConfigError(AmaxError, ValueError):
    """A configuration, target or plan."""

    kind = "config"


class ModelError(AmaxError):
    """A model that cannot be read, is not valid, or is not supported."""

    kind = "model"


class SamplesError(AmaxError):
    """Samples that cannot be read or do not fit the model."""

    kind = "samples"


class RunError(AmaxError):
    """The runtime cannot run the model."""

    kind = "runtime"


class OutputError(AmaxError, OSError):
    """A file that cannot be written."""

    kind = "output"


class CheckError(AmaxError):
    """The result did not pass a check that was asked for."""

    kind = "check"


class InternalError(AmaxError):
    """A mistake in amax itself."""


_KINDS = {c.kind: c for c in (UsageError, ConfigError, ModelError, SamplesError, RunError, OutputError, CheckError)}


def error_of(document: dict[str, Any]) -> BaseException:
    """The exception for what ``--error-format json`` printed."""
    if document["kind"] == "interrupted":
        return KeyboardInterrupt(document["message"])
    make = _KINDS.get(document["kind"], InternalError)
    return make(document["message"], at=document["at"], hint=document["hint"], exit_code=document["exit_code"])
