"""The Python package against the program's own files: the same bytes, whatever form samples have."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from pathlib import Path

import amax
import numpy as np
import onnx
from amax import _program, _samples

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "models/digits.onnx"
IMAGES = np.load(ROOT / "models/digits.calib.npz")["image"].reshape(64, 1, 8, 8)


class Reader:
    """As onnxruntime's CalibrationDataReader."""

    def __init__(self):
        self.left = [{"image": row[None]} for row in IMAGES]

    def get_next(self):
        return self.left.pop(0) if self.left else None


class Tensor:
    """As torch's, for what is asked of it: an array behind detach and cpu."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def detach(self):
        return self

    def cpu(self):
        return self.array

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of a device")


class Loader:
    """As torch's DataLoader: batches of inputs and labels."""

    batch_size = 16

    def __iter__(self):
        return ((Tensor(IMAGES[i : i + 16]), Tensor(np.arange(16))) for i in range(0, 64, 16))


FORMS = {
    "rows": {"image": IMAGES},
    "rows with a batch axis": {"image": IMAGES[:, None]},
    "an array": IMAGES,
    "list of dicts": [{"image": row[None]} for row in IMAGES],
    "list of dicts without the batch axis": [{"image": row} for row in IMAGES],
    "labels beside": [{"image": row[None], "label": 3} for row in IMAGES],
    "big-endian, Fortran order": [{"image": np.asfortranarray(row[None].astype(">f4"))} for row in IMAGES],
    "tuples": [(row[None], 7) for row in IMAGES],
    "generator": (row[None] for row in IMAGES),
    "reader": Reader(),
    "loader": Loader(),
    "path": ROOT / "models/digits.calib.npz",
    "beside the model": None,
}


class Quantize(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.onnx"
            subprocess.run([_program.find(), "rewrite", DIGITS, out, "-q"], check=True)
            cls.expected = out.read_bytes()

    def test_every_form_of_samples_gives_the_bytes_of_the_program(self):
        for name, data in FORMS.items():
            with self.subTest(name), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                report = amax.quantize(DIGITS, data=data)
                self.assertEqual(report.to_bytes(), self.expected)
                self.assertEqual([56, 8], report["sample_counts"])
                self.assertEqual(name == "labels beside", bool(said), [str(w.message) for w in said])

    def test_every_form_of_models(self):
        proto = onnx.load(DIGITS)
        for model in (DIGITS, str(DIGITS), DIGITS.read_bytes(), proto):
            with self.subTest(type(model).__name__):
                report = amax.quantize(model, data=FORMS["rows"], no_measure=True)
                onnx.checker.check_model(report.model, full_check=True)
                self.assertEqual(
                    {n.op_type for n in report.model.graph.node},
                    {n.op_type for n in onnx.load_from_string(self.expected).graph.node},
                )

    def test_a_report(self):
        report = amax.quantize(DIGITS)
        self.assertGreater(report.sqnr_db, 25)
        self.assertEqual("ort-cpu", report["target"])
        self.assertIn("4/4  Conv", str(report))
        self.assertIn("<td>logits</td>", report._repr_html_())

    def test_options_are_those_of_the_program(self):
        def weights(**options):
            return {w["site"]: w["dtype"] for w in amax.quantize(DIGITS, **options)["weights"] if "weight" in w["site"]}

        everything = weights(data="none")
        w4 = weights(data="none", preset="w4")
        self.assertEqual("int4", w4["classifier.weight"])
        self.assertEqual(w4, weights(data="none", config={"preset": "w4"}))
        w8 = weights(data="none", preset="w4", set={"op_type.Gemm.weight.dtype": "int8"})
        self.assertEqual("int8", w8["classifier.weight"])
        self.assertEqual(set(everything) - {"stem.weight"}, set(weights(data="none", exclude=["stem"])))
        self.assertNotEqual(
            amax.quantize(DIGITS, target="tensorrt").to_bytes(), self.expected, "another target gives another model"
        )

    def test_the_other_commands(self):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.onnx"
            amax.quantize(DIGITS, out, data={"image": IMAGES})
            self.assertEqual(out.read_bytes(), self.expected)
            (row,) = amax.compare(DIGITS, out, data={"image": IMAGES})
            self.assertGreater(row["sqnr_db"], 25)
            self.assertEqual(14, len(amax.compare(DIGITS, out, sites=True)))
            operators = {n.op_type for n in amax.convert(out, form="qoperator").model.graph.node}
            self.assertIn("QLinearConv", operators)
            statistics = amax.calibrate(DIGITS, data={"image": IMAGES}, hold_out=True)
            self.assertEqual(amax.quantize(DIGITS, stats=statistics).to_bytes(), self.expected)
            self.assertTrue(all(isinstance(array, np.ndarray) for array in statistics.values()))
            saved = Path(folder) / "s.safetensors"
            again = amax.calibrate(DIGITS, saved, data={"image": IMAGES}, hold_out=True)
            self.assertEqual(saved.read_bytes(), statistics.to_bytes())
            self.assertEqual(os.fspath(saved), again.path)
            plan = amax.plan(DIGITS)
            self.assertEqual(amax.quantize(DIGITS, plan=plan)["target"], "ort-cpu")
            self.assertEqual(["stem.weight"], [site["site"] for site in amax.explain(DIGITS, "stem.weight")])


class Errors(unittest.TestCase):
    def test_kinds_places_and_hints(self):
        rows = {"image": IMAGES}
        cases = [
            (amax.ConfigError, "preset", lambda: amax.quantize(DIGITS, preset="int9")),
            (amax.UsageError, "--no-such", lambda: amax.quantize(DIGITS, no_such=True)),
            (amax.ModelError, "", lambda: amax.quantize(b"not a model")),
            (amax.ModelError, "does not exist", lambda: amax.quantize("no-such.onnx", data=rows)),
            (amax.SamplesError, 'no input "imgae"', lambda: amax.quantize(DIGITS, data=[{"imgae": IMAGES[0]}])),
            (amax.SamplesError, "holds no samples", lambda: amax.quantize(DIGITS, data=[])),
            (amax.SamplesError, "takes [N, 1, 8, 8]", lambda: amax.quantize(DIGITS, data={"image": IMAGES[:, :, :4]})),
            (amax.SamplesError, "takes float32", lambda: amax.quantize(DIGITS, data=IMAGES.astype(np.int32))),
            (amax.OutputError, "no-such-folder", lambda: amax.quantize(DIGITS, "/no-such-folder/out.onnx")),
            (TypeError, "type int", lambda: amax.quantize(DIGITS, data=3)),
            (TypeError, "not int", lambda: amax.quantize(3)),
            (TypeError, "Python objects", lambda: amax.quantize(DIGITS, data=[{"image": object()}])),
            (ValueError, "numbers of rows", lambda: amax.quantize(DIGITS, data={"image": IMAGES, "b": IMAGES[:3]})),
        ]
        for kind, part, call in cases:
            with self.subTest(part), self.assertRaises(kind) as caught:
                call()
            self.assertIn(part, str(caught.exception))
        with self.assertRaises(amax.SamplesError) as caught:
            amax.quantize(DIGITS, data=[{"image": IMAGES[0]}, {"imgae": IMAGES[0]}])
        error = caught.exception
        self.assertEqual(("samples", 4, "1"), (error.kind, error.exit_code, error.at["sample"]))
        self.assertEqual('did you mean "image"?', error.hint)

    def test_an_error_of_the_samples_ends_the_program_and_is_raised(self):
        def broken():
            yield {"image": IMAGES[0]}
            raise ZeroDivisionError("in the data")

        with tempfile.TemporaryDirectory() as folder, self.assertRaisesRegex(ZeroDivisionError, "in the data"):
            amax.quantize(DIGITS, Path(folder) / "out.onnx", data=broken())

    @unittest.skipUnless(hasattr(signal, "pthread_kill"), "signals of POSIX")
    def test_ctrl_c_stops_the_program(self):
        def slow():
            yield {"image": IMAGES[0]}
            threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
            time.sleep(30)

        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaises(KeyboardInterrupt):
                amax.quantize(DIGITS, Path(folder) / "out.onnx", data=slow())
            self.assertEqual([], os.listdir(folder))
        self.assertLess(time.monotonic() - begun, 10)

    def test_samples_are_read_one_by_one(self):
        alive = [0, 0]

        class Counted(np.ndarray):
            def __del__(self):
                alive[0] -= 1

        def many():
            for row in IMAGES:
                alive[0] += 1
                alive[1] = max(alive)
                yield row[None].copy().view(Counted)

        with open(os.devnull, "wb") as nowhere:
            _samples.write(many(), lambda: [_samples.Input("image", True)], nowhere)
        self.assertLessEqual(alive[1], 3)


class Program(unittest.TestCase):
    def test_python_m_amax_is_the_program(self):
        done = subprocess.run([sys.executable, "-m", "amax", "--version"], capture_output=True, text=True, check=True)
        self.assertTrue(done.stdout.startswith("amax "), done.stdout)

    def test_streams_from_the_shell(self):
        script = (
            "import io, numpy, sys\n"
            "for row in numpy.load('models/digits.calib.npz')['image']:\n"
            "    array = io.BytesIO()\n"
            "    numpy.save(array, row)\n"
            "    sys.stdout.buffer.write(b'image\\n' + array.getvalue() + b'\\n')\n"
        )
        stream = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True).stdout

        def rewrite(stream):
            command = [_program.find(), "rewrite", DIGITS, "-", "--calib", "-", "-q"]
            return subprocess.run(command, input=stream, capture_output=True)

        self.assertEqual(amax.quantize(DIGITS).to_bytes(), rewrite(stream).stdout)
        for cut in (stream[:-1], stream[:100], b"image", b"PK\x03\x04", b""):
            with self.subTest(cut[:20]):
                self.assertEqual(4, rewrite(cut).returncode)


if __name__ == "__main__":
    unittest.main()
