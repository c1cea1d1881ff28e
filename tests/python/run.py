#!/usr/bin/env python3
"""Tests the Python package with the program that is $AMAX, else target/debug/amax.

The environment is that of the differential tests.

python3 tests/python/run.py [NAME...]
"""

import os
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/differential")]

import run  # noqa: E402

run.enter_environment()
os.environ.setdefault("AMAX_BIN", os.path.abspath(os.environ.get("AMAX", ROOT / "target/debug/amax")))
os.environ["PYTHONPATH"] = str(ROOT / "python")
os.chdir(ROOT)
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests/python")]
names = sys.argv[1:] or sorted(path.stem for path in (ROOT / "tests/python").glob("test_*.py"))
done = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromNames(names))
sys.exit(not done.wasSuccessful())
