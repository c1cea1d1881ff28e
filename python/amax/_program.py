"""Finds the program and runs it: samples go in through its stdin, errors come back as JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from ._errors import InternalError, error_of


class Output(NamedTuple):
    """What a run printed."""

    stdout: bytes
    stderr: str


def find() -> str:
    """The path of the program: ``AMAX_BIN``, that of this environment, or the first on the ``PATH``."""
    name = "amax" + (sysconfig.get_config_var("EXE") or "")
    folders = [
        sysconfig.get_path("scripts"),
        sysconfig.get_path("scripts", scheme=sysconfig.get_preferred_scheme("user")),
    ]
    # `pip install --target DIR` puts programs into DIR/bin.
    folders.append(str(Path(__file__).resolve().parents[1] / "bin"))
    candidates = [os.environ.get("AMAX_BIN"), *(os.path.join(folder, name) for folder in folders), shutil.which(name)]
    for path in candidates:
        if path and os.path.isfile(path):
            return path
    raise FileNotFoundError(f"the program {name} is neither in {folders[0]} nor on the PATH; set AMAX_BIN to its path")


def run(arguments: Sequence[str], feed: Callable[[IO[bytes]], None] | None = None, echo: bool = False) -> Output:
    """Runs the program to its end; raises its error if there is one.

    ``feed`` writes to its stdin. ``echo`` prints its messages to ``sys.stderr`` as they come. An exception of ``feed``,
    and Ctrl-C, stop the program before they are raised.
    """
    command = [find(), *arguments, "--error-format", "json"]
    stdin = subprocess.PIPE if feed else subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr, "they are pipes"
    out, messages = process.stdout, process.stderr
    stdout: list[bytes] = []
    lines: list[str] = []
    readers = [
        threading.Thread(target=lambda: stdout.append(out.read()), daemon=True),
        threading.Thread(target=lambda: _collect(messages, lines, echo), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        if feed and process.stdin:
            _feed(process.stdin, feed)
        process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        for reader in readers:
            reader.join()
        out.close()
        messages.close()
    if process.returncode:
        raise _failure(process.returncode, lines)
    return Output(b"".join(stdout), "".join(lines))


def _collect(stream: IO[bytes], lines: list[str], echo: bool) -> None:
    for line in stream:
        text = line.decode(errors="replace")
        lines.append(text)
        if echo and not text.startswith("{"):
            sys.stderr.write(text)
            sys.stderr.flush()


def _feed(stdin: IO[bytes], feed: Callable[[IO[bytes]], None]) -> None:
    try:
        feed(stdin)
        stdin.close()
    except BrokenPipeError:
        # The program has ended, and its exit code says why. Closing would write once more what it did not take.
        with suppress(BrokenPipeError):
            stdin.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the program to end, and makes it if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
    if process.stdin:
        with suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failure(code: int, lines: list[str]) -> BaseException:
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return error_of(json.loads(line))
            except json.JSONDecodeError:
                break
    if code == 130 or code == -signal.SIGINT:
        return KeyboardInterrupt()
    tail = "".join(lines[-5:]).strip()
    return InternalError(f"the program ended with code {code}" + (f": {tail}" if tail else ""), exit_code=code)
