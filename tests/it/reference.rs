//! The reference of the documentation says what the program does: its pages are made from the code.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fmt::Write;

use amax::ops::{Output, Role, TABLE};
use amax::reason::Reason;
use serde_json::Value;

use crate::snapshot;
use crate::support::{folder, root, succeed};

#[track_caller]
fn check(page: &str, title: &str, about: &str, text: &str) {
    let note = "<!-- Made by tests/it/reference.rs. -->";
    snapshot::check(&format!("../docs/src/reference/{page}.md"), &format!("# {title}\n\n{note}\n\n{about}\n\n{text}"));
}

fn run(words: &str) -> String {
    succeed(folder().path(), words)
}

/// The commands that a help text lists.
fn commands(help: &str) -> Vec<String> {
    let list = help.split("Commands:\n").nth(1).unwrap_or_default().split("\n\n").next().unwrap_or_default();
    let names = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn the_command_line() {
    fn describe(words: &str, out: &mut String) {
        let help = run(format!("{words} --help").trim_start());
        let _ = write!(out, "## amax {words}\n\n```text\n{}\n```\n\n", help.trim_end());
        for name in commands(&help) {
            describe(format!("{words} {name}").trim_start(), out);
        }
    }
    let mut out = String::new();
    describe("", &mut out);
    assert!(out.matches("\n## ").count() > 14, "{out}");
    let out = out.replace("## amax \n", "## amax\n");
    check("cli", "Command line", "What `amax COMMAND --help` prints.", out.trim_end());
}

/// A text of the schema in one line.
fn line(value: &Value) -> String {
    value.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The words that a key takes, if it takes words.
fn words(schema: &Value, key: &Value) -> Vec<String> {
    let options = [key.get("anyOf"), key.get("oneOf")].into_iter().flatten().flat_map(|list| list.as_array().unwrap());
    let one = |value: &Value| value.get("const").and_then(Value::as_str).map(|word| vec![format!("`\"{word}\"`")]);
    let mut found: Vec<String> = options.flat_map(|option| words(schema, option)).collect();
    found.extend(one(key).unwrap_or_default());
    let listed = key.get("enum").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    found.extend(listed.map(|word| format!("`\"{word}\"`")));
    if let Some(name) = key.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix("#/$defs/")) {
        found.extend(words(schema, &schema["$defs"][name]));
    }
    found
}

#[test]
fn keys_of_configurations() {
    let schema: Value = serde_json::from_str(&run("config schema")).unwrap();
    let mut out = String::new();
    let mut section = |title: &str, object: &Value| {
        let _ = write!(out, "## {title}\n\n{}\n\n", line(&object["description"]));
        for (name, key) in object["properties"].as_object().unwrap() {
            let words = words(&schema, key);
            let words = if words.is_empty() { String::new() } else { format!(" One of {}.", words.join(", ")) };
            let _ = writeln!(out, "- `{name}`: {}{words}", line(&key["description"]));
        }
        out.push('\n');
    };
    section("The file", &schema);
    for (title, name) in [
        ("`[default]`, `[op_type.NAME]`", "Level"),
        ("`[[layer]]`", "Layer"),
        ("`input`, `weight`, `bias`, `output`", "Spec"),
        ("`[tensor.\"NAME\"]`", "Tensor"),
        ("`[[postprocess]]`", "Adjusted"),
        ("`[algorithm]`", "Algorithm"),
        ("`[guard]`", "Guard"),
    ] {
        section(title, &schema["$defs"][name]);
    }
    assert!(out.matches("\n- ").count() > 60, "{out}");
    check(
        "config",
        "Configuration",
        "Keys of TOML and JSON files, from the schema that `amax config schema` prints.",
        &out,
    );
}

#[test]
fn presets() {
    let list = run("presets");
    let mut out = format!("```text\n{}\n```\n", list.trim_end());
    for name in list.lines().filter_map(|line| line.split_whitespace().next()) {
        let _ = write!(out, "\n## {name}\n\n```toml\n{}\n```\n", run(&format!("presets {name}")).trim_end());
    }
    check("presets", "Presets", "What `amax presets` lists, and `amax presets NAME` prints.", &out);
}

#[test]
fn targets() {
    let mut out = String::new();
    for name in amax::targets::names() {
        let profile = std::fs::read_to_string(root(&format!("src/targets/{name}.toml"))).unwrap();
        let _ = write!(out, "## {name}\n\n```toml\n{}\n```\n\n", profile.trim_end());
    }
    let about = "The built-in profiles of runtimes. A profile of your own has the same keys: `--target FILE.toml`.";
    check("targets", "Targets", about, &out);
}

#[test]
fn operators() {
    let mut out = "| operator | inputs | output |\n|---|---|---|\n".to_owned();
    for row in TABLE {
        let inputs = row.inputs.iter().map(|role| match role {
            Role::Data => "activation",
            Role::Weight(_) => "weight, or activation",
            Role::Bias => "bias",
            Role::Other => "not quantized",
        });
        let more = if row.variadic { ", …" } else { "" };
        let output = match row.output {
            Output::Own => "scale of its own".to_owned(),
            Output::SameAs(input) => format!("scale of input {input}"),
            Output::Range(low, high) => format!("scale for {low} to {high}"),
            Output::Float => "float".to_owned(),
        };
        let _ = writeln!(out, "| {} | {}{more} | {output} |", row.op, inputs.collect::<Vec<_>>().join("; "));
    }
    let about = "Operators of the default domain that can be quantized. Which of them are depends on the target; all others stay \
                 in float.";
    check("operators", "Operators", about, &out);
}

#[test]
fn exit_codes() {
    let help = run("--help");
    let list = help.split("Exit codes:\n").nth(1).unwrap();
    let mut codes: Vec<(u8, &str)> = Vec::new();
    for cell in list.lines().flat_map(|line| line.split("   ")).map(str::trim).filter(|cell| !cell.is_empty()) {
        let (code, meaning) = cell.split_once(' ').unwrap();
        codes.push((code.parse().unwrap(), meaning.trim()));
    }
    codes.sort_unstable();
    let mut out = "| code | meaning |\n|---|---|\n".to_owned();
    for (code, meaning) in &codes {
        let _ = writeln!(out, "| {code} | {meaning} |");
    }
    assert_eq!(codes.iter().map(|(code, _)| *code).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7, 130]);
    let about = "The output appears complete or not at all. `--error-format json` prints an error as one line of JSON, the last one on \
                 stderr, with `kind`, `exit_code`, `message`, `at` and `hint`.";
    check("exit-codes", "Exit codes", about, &out);
}

#[test]
fn codes_of_reasons() {
    let mut out = "| code | fields | sentence |\n|---|---|---|\n".to_owned();
    for (name, fields, sentence) in Reason::ALL {
        let mut code = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !code.is_empty() {
                code.push('-');
            }
            code.extend(letter.to_lowercase());
        }
        let _ = writeln!(out, "| `{code}` | {} | {} |", fields.join(", "), sentence.replace('|', "\\|"));
    }
    assert!(Reason::ALL.len() > 20);
    let about = "Why something is quantized as it is, or not at all: reports, plans and the JSON of `amax explain` have a `code`, fields, \
                 and a `text` for people. Braces stand for fields, and for what is made of them.";
    check("reasons", "Reasons", about, &out);
}

/// Every page is listed, every listed page exists, and so does what pages link to.
#[test]
fn the_book_is_whole() {
    let source = root("docs/src");
    let summary = std::fs::read_to_string(source.join("SUMMARY.md")).unwrap();
    let mut links = 0;
    let mut folders = vec![source.clone()];
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
            assert!(name == "SUMMARY.md" || summary.contains(&format!("({name})")), "SUMMARY.md does not list {name}");
            let text = std::fs::read_to_string(&path).unwrap();
            for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                if target.contains("://") {
                    continue;
                }
                let linked = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
                let Ok(page) = std::fs::read_to_string(&linked) else { panic!("{name} links to {target}") };
                let headings = page.lines().filter(|line| line.starts_with('#')).map(slug);
                assert!(anchor.is_empty() || headings.into_iter().any(|h| h == anchor), "{name} links to {target}");
                links += 1;
            }
        }
    }
    assert!(links > 20, "only {links} links were found");
}

/// What mdBook calls a heading.
fn slug(heading: &str) -> String {
    let words = heading.trim_start_matches(['#', ' ']).to_lowercase();
    words
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}
