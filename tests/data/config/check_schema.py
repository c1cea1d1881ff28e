"""Holds the JSON Schema of the configuration against texts: amax's parser and a validator must agree.

    python3 tests/data/config/check_schema.py target/debug/amax      (needs jsonschema)
"""
import json
import pathlib
import subprocess
import sys
import tomllib

import jsonschema

here = pathlib.Path(__file__).parent
amax = sys.argv[1]
schema = json.loads(subprocess.run([amax, "config", "schema"], check=True, capture_output=True).stdout)
validator = jsonschema.Draft202012Validator(schema)
validator.check_schema(schema)


def valid(text):
    data = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    return next(validator.iter_errors(data), None)


good = [path.read_text() for path in sorted(here.glob("examples/*.toml")) + sorted(here.glob("import/*.toml"))]
names = subprocess.run([amax, "presets"], check=True, capture_output=True, text=True).stdout.splitlines()
good += [subprocess.run([amax, "presets", line.split()[0]], check=True, capture_output=True, text=True).stdout for line in names]
readme = (here / "../../../README.md").read_text()
good.append(readme[readme.index("```toml\n") + 8 :].split("```")[0])
for text in good:
    error = valid(text)
    assert error is None, f"{error.message} in\n{text}"

# Unknown keys and words, and wrong types; the schema does not know what depends on several keys, on numbers or on the model.
words = ("unknown key", "unknown word", "invalid type", "missing key")
bad = 0
for block in (here / "mistakes.txt").read_text().split("\n====\n"):
    head, rest = block.split("\n", 1)
    text, said = rest.split("\n----\n")
    if head == "file" and said.startswith(words):
        try:
            error = valid(text)
        except ValueError:
            continue
        assert error is not None, f"the schema accepts what amax refuses ({said.splitlines()[0]}):\n{text}"
        bad += 1
assert len(good) > 15 and bad > 20, (len(good), bad)
print(f"{len(good)} valid, {bad} with mistakes")
