"""What the documentation shows: Python that runs, and options that commands have."""

import ast
import importlib
import io
import os
import re
import shutil
import subprocess
import tempfile
import types
import unittest
from pathlib import Path

import numpy as np
import onnx

from amax import _program

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/src").glob("*.md"))]
IMAGES = np.load(ROOT / "models/digits.calib.npz")["image"].reshape(64, 1, 8, 8)


def blocks(page, *languages):
    """The code blocks of a page in one of these languages."""
    found = re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def reader():
    left = iter([{"image": row[None]} for row in IMAGES])
    return types.SimpleNamespace(get_next=lambda: next(left, None))


class Python(unittest.TestCase):
    def test_what_is_imported_exists(self):
        count = 0
        for page in PAGES:
            for text in blocks(page, "python"):
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.ImportFrom) and node.module.startswith("amax"):
                        module = importlib.import_module(node.module)
                        for name in node.names:
                            self.assertTrue(
                                hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"
                            )
                            count += 1
        self.assertGreater(count, 5)

    def test_the_pages_of_python_run(self):
        home = os.getcwd()
        self.addCleanup(os.chdir, home)
        for name in ("README.md", "docs/src/python.md", "docs/src/moving.md"):
            with tempfile.TemporaryDirectory() as folder, self.subTest(name):
                shutil.copy(ROOT / "models/digits.onnx", Path(folder) / "model.onnx")
                os.chdir(folder)
                scope = {
                    "images": IMAGES,
                    "loader": [(row[None], 0) for row in IMAGES],
                    "proto": onnx.load("model.onnx"),
                }
                for text in blocks(ROOT / name, "python"):
                    exec(
                        compile(text, name, "exec"), {**scope, "reader": reader(), "print": lambda *words: None}, scope
                    )
                os.chdir(home)

    def test_the_stream_of_the_page_on_samples_is_read(self):
        (text,) = (text for text in blocks(ROOT / "docs/src/samples.md", "python") if "def send" in text)
        scope = {}
        exec(text, scope)
        stream = io.BytesIO()
        for row in IMAGES:
            scope["send"]({"image": row}, stream)
        command = [_program.find(), "rewrite", ROOT / "models/digits.onnx", "-", "--calib", "-", "-q"]
        done = subprocess.run(command, input=stream.getvalue(), capture_output=True, check=True)
        onnx.checker.check_model(onnx.load_from_string(done.stdout))


class Commands(unittest.TestCase):
    def test_commands_and_options_exist(self):
        helps = {}

        def help_of(*words):
            if words not in helps:
                done = subprocess.run([_program.find(), *words, "--help"], capture_output=True, text=True)
                helps[words] = done.stdout if done.returncode == 0 else ""
            return helps[words]

        count = 0
        for page in PAGES:
            lines = "\n".join(blocks(page, "sh", "text", "make", "ninja", "cmake")).replace("\\\n", " ").splitlines()
            for line in lines:
                found = re.search(r"(?:^|\$ |\| |\t|= |COMMAND )amax ([a-z]+)( [a-z]+)?(.*)", line)
                if not found or "->" in line:
                    continue
                command = (found[1], found[2].strip()) if found[1] == "config" and found[2] else (found[1],)
                text = help_of(*command)
                self.assertTrue(text, f"{page.name}: {line}")
                options = found[3].split("|")[0].split(" #")[0]
                for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", options):
                    self.assertIn(flag, text, f"{page.name}: {line}")
                    count += 1
        self.assertGreater(count, 30)


if __name__ == "__main__":
    unittest.main()
