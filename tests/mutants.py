#!/usr/bin/env python3
"""Mutation testing: breaks the code in one place at a time, and sees whether a test fails.

    cargo install cargo-mutants
    python3 -m venv target/mutants/venv
    target/mutants/venv/bin/pip install tree-sitter tree-sitter-rust
    target/mutants/venv/bin/python tests/mutants.py              # 300 mutants, the same ones every time
    target/mutants/venv/bin/python tests/mutants.py --all        # every mutant, an hour or two
    target/mutants/venv/bin/python tests/mutants.py --file 'src/rewrite*' --all

cargo-mutants says what can be broken. Compiling each mutant would take a minute, so all of them are put into one copy of the
sources (target/mutants/copy), each behind a switch in the environment, and those that do not compile are taken out. The
copy is compiled once. Every test runs once to see which mutants it reaches; then each mutant runs the tests that reach
it, the quickest first, until one fails. Figures are by file; survivors are listed, and fewer than 85 % killed is a failure. A
mutant that no test can kill because it computes the same belongs in EQUIVALENT, with its reason.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import tree_sitter
import tree_sitter_rust

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target/mutants"
COPY = WORK / "copy"

# What decides, solves, refuses and converts. Numerics, files and runtimes have oracles of their own.
FILES = ["src/rewrite*", "src/decide*", "src/convert*", "src/plan/**", "src/solve/**", "src/targets/**", "**/fold_fake_quant.rs"]
# Regular expressions on what cargo-mutants calls a mutant, and why no test can kill it.
EQUIVALENT = {
    r"impl (Debug|Display|std::fmt::Display|fmt::Display) for": "words for people, which golden files hold",
    r"Log::lap": "seconds in a report",
    r"in (Job<'_>::verify|windows)$": "runs in an onnxruntime, in builds that these tests are not; pieces, which give the same as the whole",
    r"> with >= in (Product::of|Check<'_>::token|Check<'a>::quantizer)$": "zero is no normal number, which is asked as well",
}
LEAST = 85
# So many mutants are tried at the same time, and so many seconds of tests run before it is seen whether one failed.
LANES = 2
GROUP = 4.0

SWITCH = """//! The mutant that is on.
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static ON: OnceLock<usize> = OnceLock::new();
static REACHED: [AtomicBool; COUNT] = [const { AtomicBool::new(false) }; COUNT];

/// Whether this mutant is on; without any, it is written to `MUTANTS_REACHED` that it could be.
pub fn on(n: usize) -> bool {
    let on = *ON.get_or_init(|| std::env::var("MUTANT").map_or(0, |n| n.parse().unwrap()));
    if on == 0
        && !REACHED[n].swap(true, Ordering::Relaxed)
        && let Some(path) = std::env::var_os("MUTANTS_REACHED")
    {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
        file.write_all(format!("{n}\\n").as_bytes()).unwrap();
    }
    on == n
}
"""


def listed(files):
    """What cargo-mutants would try, numbered from 1."""
    words = ["cargo", "mutants", "--list", "--json"]
    for file in files:
        words += ["--file", file]
    for pattern in EQUIVALENT:
        words += ["--exclude-re", pattern]
    found = json.loads(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    for number, mutant in enumerate(found, 1):
        mutant["number"] = number
        mutant["file"] = os.path.normpath(mutant["file"])
    return found


class Source:
    """A file with all its mutants behind switches."""

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_rust.language()))

    def __init__(self, path, mutants):
        self.bytes = (ROOT / path).read_bytes()
        self.lines = self.bytes.decode().split("\n")
        self.at = collections.defaultdict(list)
        self.placed = set()
        tree = self.parser.parse(self.bytes)
        for mutant in mutants:
            start, end = (self.offset(mutant["span"][side]) for side in ("start", "end"))
            if mutant["genre"] == "FnValue":
                node = tree.root_node.descendant_for_byte_range(start, start + 1)
                while not (node.type == "block" and node.parent.type == "function_item"):
                    node = node.parent
                start = node.start_byte
            self.at[mutant["genre"], start].append(mutant)
        marked = self.render(tree.root_node)
        # The marks around each mutant become ranges of bytes, which errors of the compiler are looked up in.
        self.text, self.ranges, open_marks, at = "", [], [], 0
        for mark in re.finditer("\1(/?)(\\d+)\2", marked):
            self.text += marked[at : mark.start()]
            at = mark.end()
            here = len(self.text.encode())
            if mark[1]:
                self.ranges.append((open_marks.pop(), here, int(mark[2])))
            else:
                open_marks.append(here)
        self.text += marked[at:]

    def offset(self, place):
        before = self.lines[: place["line"] - 1]
        return sum(len(line.encode()) + 1 for line in before) + len(self.lines[place["line"] - 1][: place["column"] - 1].encode())

    def code(self, node):
        return self.bytes[node.start_byte : node.end_byte].decode()

    def matched(self, at):
        """The mutants in the match whose value stands there in the copy."""
        node = self.parser.parse(self.text.encode()).root_node.descendant_for_byte_range(at, at)
        while node.type != "match_expression":
            node = node.parent
        return {int(number) for number in re.findall(r"mutants::on\((\d+)\)", node.text.decode())}

    def when(self, mutant, code="", before="if "):
        """Code for when a mutant is on, or the question alone, between the marks of the mutant."""
        number = mutant["number"]
        self.placed.add(number)
        return f"\1{number}\2{before}crate::mutants::on({number}){code}\1/{number}\2"

    def inside(self, node, start=None):
        """The code of a node from `start`, with the mutants in it."""
        at, out = node.start_byte if start is None else start, ""
        for child in node.children:
            if child.start_byte >= at:
                out += self.bytes[at : child.start_byte].decode() + self.render(child)
                at = child.end_byte
        return out + self.bytes[at : node.end_byte].decode()

    def render(self, node):
        """The code of a node, with its mutants and those in it."""
        code = self.render_unguarded(node)
        if node.parent and node.parent.type == "match_pattern" and node == node.parent.child_by_field_name("condition"):
            for m in self.at["MatchArmGuard", node.start_byte]:
                on = self.when(m, before="")
                code = f"({on} || {code})" if m["replacement"] == "true" else f"(!{on} && ({code}))"
        return code

    def render_unguarded(self, node):
        kind, start, inside = node.type, node.start_byte, self.inside
        if kind in ("binary_expression", "compound_assignment_expr"):
            left, operator, right = map(node.child_by_field_name, ("left", "operator", "right"))
            if mutants := self.at["BinaryOperator", operator.start_byte]:
                each = (self.when(m, f" {{ {self.code(left)} {m['replacement']} {self.code(right)} }} else ") for m in mutants)
                return f"({''.join(each)}{{ {inside(node)} }})"
        if kind == "unary_expression" and (mutants := self.at["UnaryOperator", start]):
            return f"({self.when(mutants[0], f' {{ {self.code(node.children[-1])} }} else ')}{{ {inside(node)} }})"
        if kind == "block" and (mutants := self.at["FnValue", start]):
            return "{" + "".join(self.when(m, f" {{ return {m['replacement']}; }}") for m in mutants) + inside(node)[1:]
        if kind == "match_arm" and (mutants := self.at["MatchArm", start]):
            pattern = node.child_by_field_name("pattern")
            guard = pattern.child_by_field_name("condition")
            head = self.bytes[start : guard.start_byte if guard else pattern.end_byte].decode()
            rest = f" && ({self.render(guard)})" if guard else ""
            return f"{head}{'' if guard else ' if '}{self.when(mutants[0], before='!')}{rest}{inside(node, pattern.end_byte)}"
        if kind in ("field_initializer", "shorthand_field_initializer") and (mutants := self.at["StructField", start]):
            base = next(self.code(c)[2:] for c in node.parent.children if c.type == "base_field_initializer")
            name, value = self.code(node.children[0]), self.render(node.children[-1])
            return f"{name}: {self.when(mutants[0], f' {{ ({base}).{name} }} else ')}{{ {value} }}"
        return inside(node)


def place(mutants, left_out):
    """Writes the mutants into the copy; the sources by file."""
    by_file = collections.defaultdict(list)
    for mutant in mutants:
        by_file[mutant["file"]] += [mutant] if mutant["number"] not in left_out else []
    sources = {file: Source(file, each) for file, each in by_file.items()}
    texts = {file: source.text for file, source in sources.items()}
    library = (ROOT / "src/lib.rs").read_text()
    texts["src/lib.rs"] = library.replace("mod decide;", "mod decide;\n#[doc(hidden)]\npub mod mutants;", 1)
    texts["src/mutants.rs"] = SWITCH.replace("COUNT", str(len(mutants) + 1))
    for file, text in texts.items():
        path = COPY / file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return sources


def errors():
    """The errors of the compiler in the copy."""
    words = ["cargo", "check", "--lib", "--message-format=json", "--quiet"]
    lines = subprocess.run(words, cwd=COPY, capture_output=True, text=True).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [f["message"] for f in found if f["reason"] == "compiler-message" and f["message"]["level"] == "error"]


def compiling(mutants):
    """The numbers of the mutants that compile, which are in the copy then."""
    left_out = {m["number"] for m in mutants if m["genre"] == "FnValue" and "impl " in m["function"]["return_type"]}
    while True:
        sources = place(mutants, left_out)
        found = errors()
        if not found:
            return sorted(number for source in sources.values() for number in source.placed)
        before = len(left_out)
        for error in found:
            for span in error["spans"]:
                source = sources.get(os.path.normpath(span["file_name"]))
                ranges = source.ranges if source else []
                left_out |= {n for start, end, n in ranges if start <= span["byte_start"] <= end}
            if "non-exhaustive" in error["message"]:
                arms = {m["number"] for m in mutants if m["genre"] == "MatchArm"}
                for span in filter(lambda span: span["is_primary"], error["spans"]):
                    left_out |= arms & sources[os.path.normpath(span["file_name"])].matched(span["byte_start"])
        if len(left_out) == before:
            sys.exit(f"the copy does not compile: {found[0]['rendered']}")


class Tests:
    """The tests of the copy, and which mutants each of them reaches."""

    def __init__(self):
        words = ["cargo", "test", "--no-run", "--lib", "--test", "it", "--message-format=json", "--quiet"]
        lines = subprocess.run(words, cwd=COPY, check=True, capture_output=True, text=True).stdout.splitlines()
        made = [found for found in map(json.loads, lines) if found.get("executable") and found["profile"]["test"]]
        self.program = {}
        for program in [found["executable"] for found in made]:
            listed = subprocess.run([program, "--list"], cwd=COPY, check=True, capture_output=True, text=True).stdout
            self.program |= {name: program for name in re.findall(r"(?m)^(.*): test$", listed)}
        names = list(self.program)
        self.seconds, self.reaching = {}, collections.defaultdict(list)
        with concurrent.futures.ThreadPoolExecutor(LANES) as lanes:
            for name, (passed, seconds, reached) in zip(names, lanes.map(self.reach, names)):
                if not passed:
                    print(f"  fails without any mutant, and is left out: {name}")
                    continue
                self.seconds[name] = seconds
                for number in reached:
                    self.reaching[number].append(name)

    def reach(self, name):
        path = WORK / "reached" / name.replace("::", ".")
        path.unlink(missing_ok=True)
        start = time.monotonic()
        passed = self.run([name], 900, MUTANTS_REACHED=str(path))
        reached = set(map(int, path.read_text().split())) if path.exists() else set()
        return passed, time.monotonic() - start, reached

    def run(self, names, seconds, **environment):
        """Whether these tests pass within so many seconds."""
        environment = {**os.environ, "RUST_MIN_STACK": "33554432", **environment}
        environment.pop("AMAX_BLESS", None)
        words = [self.program[names[0]], "--exact", *names]
        process = subprocess.Popen(
            words, cwd=COPY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False

    def kill(self, number):
        """Whether a test fails with this mutant."""
        groups, room = [], 0.0
        for name in sorted(self.reaching[number], key=self.seconds.get):
            room -= self.seconds[name]
            if room < 0 or self.program[groups[-1][0]] != self.program[name]:
                groups.append([])
                room = GROUP - self.seconds[name]
            groups[-1].append(name)
        # A mutant may well loop.
        return any(not self.run(names, 30 + 6 * sum(map(self.seconds.get, names)), MUTANT=str(number)) for names in groups)


def copy():
    """The sources as they are, beside compiled dependencies: tract would take longer than all mutants."""
    (WORK / "reached").mkdir(parents=True, exist_ok=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for file in filter(None, files.split("\0")):
        source, target = ROOT / file, COPY / file
        if source.is_file() and (not target.exists() or source.read_bytes() != target.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if not (COPY / "target").exists():
        for folder in ("deps", "build", ".fingerprint"):
            shutil.copytree(ROOT / "target/debug" / folder, COPY / "target/debug" / folder, symlinks=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", action="append", help="other files")
    parser.add_argument("--sample", type=int, default=300, help="so many mutants, the same ones every time")
    parser.add_argument("--all", action="store_true", help="every mutant")
    arguments = parser.parse_args()
    os.environ |= {"CARGO_PROFILE_DEV_OPT_LEVEL": "0", "CARGO_PROFILE_DEV_DEBUG": "false"}
    copy()
    mutants = listed(arguments.file or FILES)
    names = {m["number"]: m["name"] for m in mutants}
    files = {m["number"]: m["file"] for m in mutants}
    numbers = compiling(mutants)
    print(f"{len(mutants)} mutants, of which {len(numbers)} compile")
    if not arguments.all:
        numbers = sorted(random.Random(0).sample(numbers, min(arguments.sample, len(numbers))))
    tests = Tests()
    score = collections.defaultdict(lambda: [0, 0])
    with concurrent.futures.ThreadPoolExecutor(LANES) as lanes:
        for number, killed in zip(numbers, lanes.map(tests.kill, numbers)):
            score[files[number]][not killed] += 1
            if not killed:
                print(f"  survived {len(tests.reaching[number])} tests: {names[number]}", flush=True)
    for file, (killed, survived) in sorted(score.items()):
        print(f"{killed:5} killed, {survived:3} survived  {file}")
    killed, survived = map(sum, zip(*score.values()))
    print(f"{killed} of {killed + survived} killed")
    if killed * 100 < (killed + survived) * LEAST:
        sys.exit(f"error: fewer than {LEAST} % were killed")


main()
