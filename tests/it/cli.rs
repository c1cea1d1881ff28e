//! The program as users run it: `tests/cli/*.txt` hold command lines and, below each, what the program must answer.
//!
//! A line that begins with `$` is run in a folder of its own with the models and samples that [`folder`] makes. The
//! answer is everything that is printed, then the exit code and the files that appeared, which are removed again.
//! Figures that depend on how a processor rounds are masked. `AMAX_BLESS=1 cargo test` writes the answers anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use amax::ir::{Tensor, file, text};
use amax::onnx::{ModelProto, NodeProto, TensorProto};
use prost::Message;
use regex::Regex;

use crate::snapshot;
use crate::support::{amax, fail, noise, npy, program, root, succeed};

/// A folder with everything that the command lines name.
fn folder() -> tempfile::TempDir {
    let folder = crate::support::folder();
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    let digits = std::fs::read(root("models/digits.onnx")).unwrap();
    put("digits.onnx", &digits);
    put("digits.calib.npz", &std::fs::read(root("models/digits.calib.npz")).unwrap());
    put("alone.onnx", &digits);
    put("cut.onnx", &digits[..12_345]);
    put("empty.onnx", b"");
    put("text.onnx", b"this is text\n");
    std::fs::create_dir(folder.path().join("folder")).unwrap();
    for entry in std::fs::read_dir(root("tests/cli/models")).unwrap() {
        let path = entry.unwrap().path();
        let model = text::parse_with_fill(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let name = format!("{}.onnx", path.file_stem().unwrap().to_str().unwrap());
        file::save(&model, &folder.path().join(name)).unwrap();
    }
    let mlp = std::fs::read(folder.path().join("mlp.onnx")).unwrap();
    let broken = |name: &str, edit: &dyn Fn(&mut ModelProto)| {
        let mut proto = ModelProto::decode(mlp.as_slice()).unwrap();
        edit(&mut proto);
        put(name, &proto.encode_to_vec());
    };
    let nodes =
        |proto: &mut ModelProto, edit: &dyn Fn(&mut Vec<NodeProto>)| edit(&mut proto.graph.as_mut().unwrap().node);
    broken("cycle.onnx", &|m| nodes(m, &|n| "y".clone_into(&mut n[0].input[0])));
    broken("dangling.onnx", &|m| nodes(m, &|n| "nowhere".clone_into(&mut n[0].input[0])));
    broken("twice.onnx", &|m| nodes(m, &|n| "m".clone_into(&mut n[1].output[0])));
    broken("unknown.onnx", &|m| nodes(m, &|n| n[0].op_type = Some("MatMull".to_owned())));
    broken("nan.onnx", &|m| {
        let weight: &mut TensorProto = &mut m.graph.as_mut().unwrap().initializer[0];
        let mut raw = weight.raw_data.clone().unwrap().to_vec();
        raw[20..24].copy_from_slice(&f32::NAN.to_le_bytes());
        weight.raw_data = Some(raw.into());
    });

    put("mlp.npy", &npy(&[20, 1, 16], &noise(320)));
    std::fs::create_dir(folder.path().join("set")).unwrap();
    put("set/mlp.npy", &npy(&[20, 1, 16], &noise(320)));
    put("profile.toml", &std::fs::read(root("src/targets/generic.toml")).unwrap());
    put("ids.jsonl", b"{\"ids\": [1, -8]}\n\n{\"ids\": [7, 8]}\n");
    put("set/notes.txt", b"");
    put("one.npy", &npy(&[1, 16], &noise(16)));
    put("bare.npy", &npy(&[20, 1, 4], &noise(80)));
    put("attention.npy", &npy(&[10, 1, 4, 16], &noise(640)));
    put("rank.npy", &npy(&[320], &noise(320)));
    put("width.npy", &npy(&[20, 1, 15], &noise(300)));
    put("norows.npy", &npy(&[0, 1, 16], &[]));
    put("nan.npy", &npy(&[20, 1, 16], &[f32::NAN; 320]));
    put("zeros.npy", &npy(&[20, 1, 16], &[0.0; 320]));
    put("empty.npz", b"");
    put("text.npz", b"this is text\n");
    put("cut.npz", &std::fs::read(root("models/digits.calib.npz")).unwrap()[..1000]);
    std::fs::create_dir(folder.path().join("rates")).unwrap();
    let sample = [Tensor::from_f32(&[1, 16], &noise(16)), Tensor::from_i64(&[1], &[8000])];
    for (index, tensor) in sample.into_iter().enumerate() {
        put(&format!("rates/input_{index}.pb"), &tensor.into_proto().0.encode_to_vec());
    }
    put("key.toml", b"exclude = [\"stem\"]\nexclud = [\"wide\"]\n");
    put("guard.toml", b"[guard]\nenabled = true\nstatic_bd = 3\n");
    put("type.toml", b"target = 3\n");
    put("open.toml", b"exclude = [\n");
    put("glob.toml", b"exclude = [\"[a\"]\n");
    put("target.toml", b"target = \"ortcpu\"\n");
    put("nan.toml", b"[guard]\nstatic_db = nan\n");
    put("dead.toml", b"[[layer]]\nmatch = \"wide2\"\nenable = false\n");
    put("spec.json", b"{\"default\": {\n\"weight\": {\"dtype\": \"int8\", \"group_sizes\": 32}}}\n");
    put("quant_cfg.json", &std::fs::read(root("tests/data/config/import/modelopt_int4_awq_dict.json")).unwrap());
    put("list.json", b"{\"quant_cfg\": [\n{\"quantizer_name\": \"*weight_quantizer\",\n\"cfg\": [{\"num_bits\": 4}, {\"num_bits\": [4, 3]}]}]}\n");
    put(
        "old.json",
        b"{\"schema\": 2, \"skipped\": [{\"node\": \"a\", \"op\": \"Abs\", \"bytes\": 0, \"why\": \"a sentence\"}]}\n",
    );
    put("conf.yaml", b"default:\n  weight:\n    dtype: int4\n");
    put("good.toml", b"target = \"tensorrt\"\nexclude = [\"stem\"]\n");
    folder
}

/// Every file below a folder, with its content.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            found.insert(name, std::fs::read(&path).unwrap());
        }
    }
    found
}

/// Without what differs between machines and runs.
fn masked(text: &str) -> String {
    let seconds = Regex::new(r"(?m)^seconds  .*(\n {9}.*)*$").unwrap();
    let figures = Regex::new(r"-?\d+\.\d+ dB|-?\d+\.\d{4,}|\d+\.\d to \d+\.\d").unwrap();
    let digit = Regex::new(r"\d").unwrap();
    let text = seconds.replace_all(text, "seconds  …");
    // It depends on the processors that there are.
    let memory = Regex::new(r"memory: about [^\n]*").unwrap();
    let text = memory.replace_all(&text, "memory: …");
    figures
        .replace_all(&text, |found: &regex::Captures<'_>| digit.replace_all(&found[0], "0").into_owned())
        .into_owned()
}

/// Runs every command of `tests/cli/<name>` and compares.
fn session(name: &str) {
    let path = format!("cli/{name}");
    let folder = folder();
    let before = files(folder.path());
    let mut out = String::new();
    for line in std::fs::read_to_string(root("tests").join(&path)).unwrap().lines() {
        if line.starts_with('#') {
            out.push_str(line);
            out.push('\n');
        }
        let Some(args) = line.strip_prefix("$ amax") else { continue };
        let answer = amax(folder.path(), args);
        let code = answer.status.code().expect("ends by itself");
        let printed = String::from_utf8(answer.stdout).unwrap() + &String::from_utf8(answer.stderr).unwrap();
        assert!(!printed.contains("panicked") && !printed.contains("stack backtrace"), "{args}\n{printed}");
        let after = files(folder.path());
        let gone: Vec<_> = before.keys().filter(|name| !after.contains_key(*name)).collect();
        let changed: Vec<_> =
            before.keys().filter(|name| after.get(*name).is_some_and(|b| *b != before[*name])).collect();
        assert!(gone.is_empty() && changed.is_empty(), "{args}: removed {gone:?}, changed {changed:?}");
        let new: Vec<&String> = after.keys().filter(|name| !before.contains_key(*name)).collect();
        for name in &new {
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        let wrote = if new.is_empty() {
            "nothing".to_owned()
        } else {
            new.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ")
        };
        if code != 0 {
            assert!(new.is_empty(), "{args} failed and left {wrote}");
        }
        out.extend(["\n$ amax", args, "\n", &masked(&printed), &format!("[exit {code}, wrote {wrote}]\n")]);
    }
    snapshot::check(&path, &out);
}

#[test]
fn help() {
    session("help.txt");
}

#[test]
fn mistakes_on_the_command_line_and_in_documents() {
    session("usage.txt");
}

#[test]
fn words_of_other_tools() {
    session("newcomer.txt");
}

/// A build system reads what a rule says: every file that was read, and nothing else.
#[test]
fn rules_for_make() {
    let folder = folder();
    let rule = |words: &str| {
        succeed(folder.path(), &format!("rewrite digits.onnx -o out.onnx --depfile out.d -q {words}"));
        std::fs::read_to_string(folder.path().join("out.d")).unwrap()
    };
    assert_eq!(rule(""), "out.onnx: digits.calib.npz \\\n  digits.onnx\n");
    assert_eq!(rule("--calib none --config good.toml"), "out.onnx: digits.onnx \\\n  good.toml\n");
    std::fs::write(folder.path().join("a b#c$.toml"), "").unwrap();
    let odd = [
        "rewrite",
        "digits.onnx",
        "out.onnx",
        "--calib",
        "none",
        "--config",
        "a b#c$.toml",
        "--depfile",
        "out.d",
        "-q",
    ];
    assert!(program(folder.path()).args(odd).status().unwrap().success());
    let text = std::fs::read_to_string(folder.path().join("out.d")).unwrap();
    assert_eq!(text, "out.onnx: a\\ b\\#c$$.toml \\\n  digits.onnx\n");
    fail(folder.path(), "rewrite digits.onnx out.onnx --depfile out.onnx", 2, "cannot be both");
}

/// A report whose name ends in .html is one page around the same document, and loads nothing.
#[test]
fn reports_to_look_at() {
    let folder = folder();
    succeed(folder.path(), "rewrite digits.onnx out.onnx --report r.html -q --exclude wide");
    let page = std::fs::read_to_string(folder.path().join("r.html")).unwrap();
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let shown: serde_json::Value = serde_json::from_str(data).unwrap();
    let printed = succeed(folder.path(), "rewrite digits.onnx out.onnx --report - -q --exclude wide");
    let report: serde_json::Value = serde_json::from_str(&printed).unwrap();
    for part in ["target", "bytes", "operators", "activations", "weights", "skipped", "quality", "passes"] {
        assert!(shown[part] == report[part] && !shown[part].is_null(), "{part}");
    }
    assert!(!page.contains("src=") && !page.contains("<link") && !page.contains("@import"), "the page loads something");
}

#[test]
fn differences_of_two_models() {
    let folder = folder();
    for (name, options) in
        [("a", ""), ("b", "--exclude wide"), ("c", "--set tensor.image.scale=0.5"), ("d", "--threads 1")]
    {
        succeed(folder.path(), &format!("rewrite digits.onnx {name}.onnx -q --no-guard --no-measure {options}"));
    }
    let diff = |words: &str| -> serde_json::Value {
        serde_json::from_str(&succeed(folder.path(), &format!("diff {words} --json"))).unwrap()
    };
    let same = diff("a.onnx d.onnx --exit-code");
    assert!(
        same["operators"].as_object().unwrap().is_empty() && same["tensors"].as_object().unwrap().is_empty(),
        "{same}"
    );
    let wide = diff("a.onnx b.onnx");
    let keys: Vec<&String> = wide["tensors"].as_object().unwrap().keys().collect();
    assert!(keys.iter().any(|k| *k == "wide.weight") && !keys.iter().any(|k| *k == "stem.weight"), "{wide}");
    assert_eq!(wide["tensors"]["wide.weight"]["dtype"], serde_json::json!(["int8", null]));
    assert!(wide["operators"]["DequantizeLinear"][0].as_u64() > wide["operators"]["DequantizeLinear"][1].as_u64());
    let scaled = diff("a.onnx c.onnx");
    assert_eq!(scaled["tensors"]["image"]["scale"][1], 0.5);
    assert!(succeed(folder.path(), "diff a.onnx c.onnx").contains("scale 0.00392"));
    fail(folder.path(), "diff a.onnx c.onnx --exit-code", 7, "quantized differently");
}

/// Completions and manual pages know every command.
#[test]
fn what_shells_and_man_read() {
    let folder = folder();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = succeed(folder.path(), &format!("completions {shell}"));
        assert!(script.contains("rewrite") && script.contains("min-coverage"), "{shell}");
    }
    succeed(folder.path(), "man pages");
    for (page, word) in
        [("amax.1", "calibrate"), ("amax-rewrite.1", "min\\-coverage"), ("amax-config-import.1", "Quark")]
    {
        let text = std::fs::read_to_string(folder.path().join("pages").join(page)).unwrap();
        assert!(text.contains(word), "{page}: {text}");
    }
}

#[test]
fn configurations() {
    session("config.txt");
}

#[test]
fn models_that_cannot_be_read() {
    session("models.txt");
}

#[test]
fn samples_that_do_not_fit() {
    session("samples.txt");
}

#[test]
fn outputs_that_cannot_be_written() {
    session("outputs.txt");
}

#[test]
fn inputs_that_are_set() {
    session("inputs.txt");
}

#[test]
fn summaries() {
    session("summaries.txt");
}

#[test]
fn limits_that_are_missed() {
    session("guard.txt");
}

#[test]
fn formats_for_a_budget() {
    session("budget.txt");
}

#[test]
fn sites_that_are_explained() {
    session("explain.txt");
}

#[test]
fn quiet_says_nothing_and_errors_all_the_same() {
    let folder = folder();
    let answer = amax(folder.path(), "rewrite digits.onnx out.onnx --quiet --report report.json");
    assert!(answer.status.success() && answer.stderr.is_empty() && answer.stdout.is_empty());
    assert!(folder.path().join("out.onnx").exists() && folder.path().join("report.json").exists());
    let answer = amax(folder.path(), "-q rewrite nowhere.onnx out.onnx");
    assert_eq!(answer.status.code(), Some(3));
    assert!(String::from_utf8(answer.stderr).unwrap().starts_with("error: nowhere.onnx does not exist"));
}

/// With `--error-format json` the last line of stderr says what the text says.
#[test]
fn errors_are_json_on_request() {
    let folder = folder();
    std::fs::write(folder.path().join("wrong.toml"), "# one\n[default.weight]\ndtype = \"int9\"\n").unwrap();
    for (words, kind, at) in [
        ("rewrite nowhere.onnx out.onnx", "model", ""),
        ("rewrite digits.onnx out.onnx --config wrong.toml", "config", "line"),
        ("rewrite digits.onnx out.onnx --preset int9", "config", ""),
        ("rewrite digits.onnx out.onnx --calib nowhere.npz", "samples", ""),
        ("rewrite digits.onnx nowhere/out.onnx", "output", ""),
        ("rewrite digits.onnx --no-such-option", "usage", ""),
        ("rewrite digits.onnx out.onnx --threads none", "usage", ""),
        ("no-such-command", "usage", ""),
    ] {
        let text = amax(folder.path(), words);
        for words in [format!("{words} --error-format json"), format!("--error-format=json {words}")] {
            let answer = amax(folder.path(), &words);
            assert_eq!(answer.status.code(), text.status.code(), "{words}");
            let said = String::from_utf8(answer.stderr).unwrap();
            let error: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
            assert_eq!(
                (error["kind"].as_str(), error["exit_code"].as_i64()),
                (Some(kind), text.status.code().map(i64::from))
            );
            assert!(at.is_empty() || error["at"][at].is_u64(), "{error}");
            let message = error["message"].as_str().unwrap();
            assert!(String::from_utf8_lossy(&text.stderr).starts_with(&format!("error: {message}")), "{error}");
            let hint = error["hint"].as_str().unwrap_or_default();
            assert!(String::from_utf8_lossy(&text.stderr).contains(hint), "{error}");
        }
    }
    assert!(amax(folder.path(), "--help --error-format json").status.success());
}

/// What a command writes to a file, it writes to stdout where that is called `-`; what else it says goes to stderr.
#[test]
fn a_dash_is_stdout() {
    let folder = folder();
    let before = files(folder.path());
    let check = |before: &BTreeMap<String, Vec<u8>>, words: &str| {
        let answer = amax(folder.path(), &words.replace("OUT", "-"));
        let said = String::from_utf8_lossy(&answer.stderr);
        assert!(answer.status.success(), "{words}: {said}");
        assert_eq!(&files(folder.path()), before, "{words}");
        succeed(folder.path(), &words.replace("OUT", "out"));
        let written = std::fs::read(folder.path().join("out")).unwrap();
        std::fs::remove_file(folder.path().join("out")).unwrap();
        assert!(answer.stdout == written && !written.is_empty(), "{words}");
    };
    check(&before, "rewrite digits.onnx OUT");
    check(&before, "prepare digits.onnx OUT");
    check(&before, "convert digits.onnx OUT");
    check(&before, "calibrate digits.onnx -o OUT");
    check(&before, "plan digits.onnx -o OUT");
    check(&before, "config import quant_cfg.json -o OUT");
    let printed = succeed(folder.path(), "rewrite digits.onnx quantized.onnx --report - --no-measure");
    let report: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert!(report["schema"].is_u64());
    succeed(folder.path(), "calibrate digits.onnx -o part.stats");
    let before = files(folder.path());
    check(&before, "scales quantized.onnx -o OUT");
    check(&before, "merge part.stats -o OUT");
}

/// A reader that goes away, of data or of messages, is nobody's mistake.
#[test]
#[cfg(unix)]
fn closed_pipes_are_not_errors() {
    let folder = folder();
    for args in [
        ["inspect", "digits.onnx", "--text"].as_slice(),
        &["rewrite", "digits.onnx", "out.onnx", "--print-after", "all"],
        &["rewrite", "digits.onnx", "out.onnx", "-v"],
    ] {
        let mut command = program(folder.path());
        let mut child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        drop(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{args:?}");
    }
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    if let Ok(full) = full {
        let answer = program(folder.path()).args(["inspect", "digits.onnx"]).stdout(full).output().unwrap();
        assert_eq!(answer.status.code(), Some(6));
        assert!(String::from_utf8(answer.stderr).unwrap().starts_with("error: cannot write to stdout"));
    }
}

/// The signal comes while samples run: there are so many of them that it cannot come too late.
#[test]
#[cfg(unix)]
fn an_interrupted_run_leaves_nothing() {
    for signal in ["INT", "TERM"] {
        let folder = folder();
        let count = 300_000;
        std::fs::write(folder.path().join("many.npy"), npy(&[count, 1, 16], &noise(count * 16))).unwrap();
        let before: Vec<String> = files(folder.path()).into_keys().collect();
        let words = "rewrite mlp.onnx out.onnx --calib many.npy --report report.json --threads 1";
        let mut command = program(folder.path());
        let mut child = command.args(words.split(' ')).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(600));
        let sent = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
        assert_eq!(said, "interrupted; nothing was written\n");
        let after: Vec<String> = files(folder.path()).into_keys().collect();
        assert_eq!(after, before);
    }
}

#[test]
fn a_report_is_json_whatever_the_numbers() {
    let folder = folder();
    for args in [
        "-q rewrite digits.onnx out.onnx --report report.json",
        "-q rewrite bare.onnx out.onnx --calib bare.npy --report report.json",
        "-q rewrite mlp.onnx out.onnx --calib zeros.npy --report report.json",
    ] {
        let answer = amax(folder.path(), args);
        assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        let text = std::fs::read_to_string(folder.path().join("report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["schema"], 2);
        assert!(!text.contains("NaN") && !text.contains("Infinity"));
    }
    let answer = amax(folder.path(), "compare digits.onnx digits.onnx --json");
    let rows: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap();
    assert!(rows[0]["sqnr_db"].is_null());
    assert_eq!(rows[0]["max_abs_error"], 0.0);
    assert_eq!(rows[0]["output"], "logits");
}
