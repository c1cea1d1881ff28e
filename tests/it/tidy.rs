//! What no compiler checks: layers, lengths, words.

#![allow(
    clippy::unwrap_used,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "a test that cannot go on has failed"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::support::root;

const LIMIT: usize = 700;

/// Files below a folder of the repository, as paths from its root.
fn below(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(root(folder)) else { return found };
    for entry in entries {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        // In a linked work tree `.git` is a file.
        if ["target", ".git", ".venv", "fetched", "__pycache__"].contains(&name.as_str()) {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            found.extend(below(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn rust(folder: &str) -> Vec<String> {
    below(folder).into_iter().filter(|p| p.ends_with(".rs")).collect()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root(path)).unwrap()
}

/// The top module that a source file belongs to.
fn module(path: &str) -> &str {
    if path.starts_with("passes/") {
        return "passes";
    }
    let inner = path.strip_prefix("src/").unwrap();
    inner.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The layer of each module, as the table in ARCHITECTURE.md has it.
fn layers() -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for line in read("ARCHITECTURE.md").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, number, places, _, _] = cells[..] else { continue };
        let Ok(number) = number.parse() else { continue };
        for path in places.split('`').filter(|p| p.starts_with("src/") || p.starts_with("passes/")) {
            assert!(root(path).exists(), "ARCHITECTURE.md names {path}, which does not exist");
            assert_eq!(found.insert(module(path).to_owned(), number), None, "ARCHITECTURE.md names {path} twice");
        }
    }
    found
}

/// The modules of this crate that a source text names, with the line, its unit tests left out.
fn used(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim() == "#[cfg(test)]" {
            break;
        }
        let code = line.split("//").next().unwrap_or_default();
        for prefix in ["crate::", "amax::"] {
            for part in code.split(prefix).skip(1) {
                let names = part.strip_prefix('{').map_or(part, |list| list.split('}').next().unwrap_or(list));
                let first = names.split([':', ';', ',', '<', '(', ')', ' ', '>', '?', '&', '[', ']', '|']).next();
                let name = first.unwrap_or_default();
                if name.starts_with(|c: char| c.is_ascii_lowercase()) {
                    found.push((number + 1, name.to_owned()));
                }
            }
        }
    }
    found
}

#[test]
fn layers_use_only_what_is_below() {
    let layers = layers();
    let mut wrong = Vec::new();
    let mut links = 0;
    for path in rust("src").into_iter().chain(rust("passes")) {
        let own = module(&path);
        let Some(&height) = layers.get(own) else {
            wrong.push(format!("{path}: module {own} is in no layer"));
            continue;
        };
        for (line, name) in used(&read(&path)) {
            // Paths inside macros and `amax::Result` are not modules.
            let Some(&depth) = layers.get(&name) else { continue };
            links += 1;
            if depth > height {
                wrong.push(format!("{path}:{line}: {own} (layer {height}) uses {name} (layer {depth})"));
            }
        }
    }
    assert!(links > 100, "only {links} uses were found: does this test still read the code right?");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_check_of_layers_sees_a_wrong_use() {
    let found =
        used("use crate::ir::Model;\nlet x = crate::plan::plan(); // crate::cli\n#[cfg(test)]\nuse crate::cli;\n");
    assert_eq!(found, [(1, "ir".to_owned()), (2, "plan".to_owned())]);
    let layers = layers();
    assert!(layers["plan"] > layers["ir"] && layers[module("passes/a.rs")] < layers[module("src/cli/mod.rs")]);
}

#[test]
fn files_are_short() {
    let all = rust("src").into_iter().chain(rust("passes"));
    let long: Vec<_> = all.filter(|path| read(path).lines().count() > LIMIT).collect();
    assert!(long.is_empty(), "over {LIMIT} lines: {long:?}; split them");
}

/// Passes that need a plan have no text fixtures; these tests run them.
const PLANNED: &[(&str, &str)] = &[
    ("insert-qdq", "tests/it/pipeline.rs"),
    ("fold-weights", "tests/it/pipeline.rs"),
    ("raise-opset", "tests/it/opset.rs"),
    ("freeze-inputs", "tests/passes"),
    ("standard-quantizers", "tests/it/qat.rs"),
    ("fold-fake-quant", "tests/it/qat.rs"),
    ("settle-quantizers", "tests/it/qat.rs"),
    ("fold-clips", "tests/it/qat.rs"),
    ("name-quantizers", "tests/it/qat.rs"),
    ("recover-codes", "tests/it/qat.rs"),
    ("switch-quantizers", "tests/it/qat.rs"),
    ("unfold-weights", "tests/it/qat.rs"),
    ("widen-floats", "tests/it/halves.rs"),
    ("narrow-floats", "tests/it/halves.rs"),
    ("per-token", "tests/it/qat.rs"),
    ("smooth", "tests/it/smooth.rs"),
];

/// What lies in `passes/` and is not a pass.
const SHARED: &[&str] = &["mod", "pipeline", "recipes", "forms", "support"];

#[test]
fn every_pass_is_declared_listed_and_tested() {
    let modules = read("passes/mod.rs");
    let listed: Vec<&str> = amax::passes::recipes::all().iter().map(|p| p.name()).collect();
    let fixtures: Vec<String> = below("tests/passes").into_iter().filter(|p| p.ends_with(".onnxtxt")).collect();
    let first = |path: &String| read(path).lines().next().unwrap_or_default().to_owned();
    let heads: Vec<String> = fixtures.iter().map(first).collect();
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(root("passes")).unwrap() {
        let name = PathBuf::from(entry.unwrap().file_name());
        files.insert(name.file_stem().unwrap().to_str().unwrap().to_owned());
    }
    for file in files.iter().filter(|f| !SHARED.contains(&f.as_str())) {
        assert!(modules.contains(&format!("mod {file};")), "passes/mod.rs does not declare {file}");
        let name = file.replace('_', "-");
        assert!(listed.contains(&name.as_str()), "{name} is in no pipeline");
        let covered = heads.iter().any(|h| h.contains(&name)) || PLANNED.iter().any(|(pass, _)| *pass == name);
        assert!(covered, "{name} has no fixture in tests/passes and no test that is listed here");
    }
    for name in &listed {
        assert!(files.contains(&name.replace('-', "_")), "{name} has no file of its own in passes/");
    }
    for (_, test) in PLANNED {
        assert!(root(test).exists(), "{test} is gone");
    }
}

/// Every snapshot belongs to something that makes it.
#[test]
fn no_snapshot_is_left_over() {
    for path in below("tests/passes/snapshots") {
        let fixture = path.replace("snapshots/", "").replace(".txt", ".onnxtxt");
        assert!(root(&fixture).exists(), "{path} has no {fixture}");
    }
    let session = read("tests/it/cli.rs");
    for path in below("tests/cli").into_iter().filter(|p| p.ends_with(".txt")) {
        let name = path.rsplit('/').next().unwrap();
        assert!(session.contains(&format!("\"{name}\"")), "no test runs {path}");
    }
}
