#!/usr/bin/env python3
"""Kills a rewrite at a random moment, again and again: always the older or the newer output is there, whole.

    python3 tests/kills.py [AMAX] [--kills N]

The output is a model with its weights in a second file, and an older output of the same names is in its place. After each
kill -9 the model must be one of the two, byte by byte, and the file that it names must be its own. Half of the kills fall into
the last tenth of a run, where it writes. What killed runs leave behind is gone after the next whole one. Closes with the line
"N kills: A older, B newer".
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pair(folder):
    """The bytes of the model, and of each file of data that it names."""
    model = (folder / "out.onnx").read_bytes()
    return model, {name: (folder / name.decode()).read_bytes() for name in set(re.findall(rb"out[\w.-]*\.data", model))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("amax", nargs="?", default=ROOT / "target/debug/amax")
    parser.add_argument("--kills", type=int, default=1000)
    args = parser.parse_args()
    program = str(Path(args.amax).resolve())
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "outputs"

        def command(preset):
            source = str(ROOT / "models/digits.onnx")
            return [program, "-q", "rewrite", source, "out.onnx", "--preset", preset, "--calib", "none", "--external-data"]

        known = {}
        for preset in ("w4", "w8"):
            folder.mkdir(exist_ok=True)
            start = time.monotonic()
            subprocess.run(command(preset), cwd=folder, check=True)
            seconds = time.monotonic() - start
            known[preset] = pair(folder)
            assert known[preset][1], "there is no second file"
        names = {path.name for path in folder.iterdir()}
        older, found = "w8", {"older": 0, "newer": 0}
        for kill in range(args.kills):
            newer = "w4" if older == "w8" else "w8"
            child = subprocess.Popen(command(newer), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(choose.uniform(0, seconds) if kill % 2 else choose.uniform(0.9 * seconds, 1.05 * seconds))
            child.kill()
            child.wait()
            now = next((preset for preset, kept in known.items() if pair(folder) == kept), None)
            if now is None:
                shutil.copytree(folder, ROOT / "target/kills", dirs_exist_ok=True)
                sys.exit(f"error: kill {kill} left neither output; see target/kills")
            found["newer" if now == newer else "older"] += 1
            older = now
        subprocess.run(command(older), cwd=folder, check=True)
        left = {path.name for path in folder.iterdir()}
        if left != {path for path in left if path == "out.onnx" or path.encode() in known[older][1]} or len(left) != len(names):
            sys.exit(f"error: killed runs left {sorted(left)}")
    print(f"{args.kills} kills: {found['older']} older, {found['newer']} newer")


main()
