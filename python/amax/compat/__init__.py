"""The entry points of other tools, with their signatures: one changed import runs amax instead.

What an option asks for is translated; what has no counterpart is an :class:`UnsupportedOption` that names it. What is not
given is amax's own choice, which is not always the other tool's default.
"""

from .._errors import UsageError

__all__ = ["UnsupportedOption"]


class UnsupportedOption(UsageError):
    """An option of another tool that amax has no counterpart for."""

    def __init__(self, name: str, value: object, hint: str | None = None) -> None:
        hint = hint or "leave it out, or call amax.quantize, whose configuration has keys of its own"
        super().__init__(f"the option {name} = {value!r} has no counterpart in amax", hint=hint, exit_code=2)
