//! Formats for a budget: what is chosen against every choice that there is, limits that are kept or refused.

use std::path::Path;

use amax::algorithms::knapsack::{Item, choose, lightest};
use amax::{Config, Kind, Model, Prices, Result, Rewrite, Rewritten, SampleSet};
use serde_json::Value;

use super::support::{folder, names_in, parsed, program, root, vectors};

#[test]
fn choices_are_those_that_trying_all_of_them_finds() {
    let number = |value: &Value| value.as_f64().unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    for (at, case) in vectors("budget.json").as_array().unwrap().iter().enumerate() {
        let (sizes, bits) = (list(&case["sizes"]), list(&case["bits"]));
        let class = |(size, errors): (&Value, &Value)| -> Vec<Item> {
            let items = list(errors).into_iter().zip(&bits);
            items.map(|(error, bits)| Item { value: number(&error), weight: number(size) * number(bits) }).collect()
        };
        let errors = list(&case["errors"]);
        let classes: Vec<Vec<Item>> = sizes.iter().zip(&errors).map(class).collect();
        let found = choose(&classes, number(&case["budget"]));
        if case["choice"].is_null() {
            assert!(found.is_none(), "case {at}");
            assert!((lightest(&classes) - number(&case["least_cost"])).abs() < 1e-9, "case {at}");
            continue;
        }
        let found = found.unwrap();
        let expected: Vec<usize> = list(&case["choice"]).iter().map(|item| item.as_u64().unwrap() as usize).collect();
        assert_eq!(found.items, expected, "case {at}");
        assert!((found.value / number(&case["error"]) - 1.0).abs() < 1e-12, "case {at}");
        assert!((found.weight - number(&case["cost"])).abs() < 1e-6, "case {at}");
    }
}

fn digits() -> (Model, SampleSet) {
    let model = amax::load(root("models/digits.onnx")).unwrap();
    let samples = SampleSet::open(Path::new(&root("models/digits.calib.npz")), &model).unwrap();
    (model, samples)
}

fn run(budget: &str) -> Result<Rewritten> {
    let (model, samples) = digits();
    Rewrite::new(&model).samples(&samples).config(&Config::parse(budget)?).run()
}

/// The quality of the outputs as the report has it.
fn db(done: &Rewritten) -> f64 {
    done.report.quality.iter().filter_map(amax::QualityRow::sqnr_db).fold(f64::INFINITY, f64::min)
}

#[test]
fn limits_are_kept() {
    let formats = "formats = [\"int2\", \"int4\", \"int8\", \"float\"]";
    let check = |limit: &str, kept: &dyn Fn(&Rewritten) -> bool| {
        let done = run(&format!("[budget]\n{formats}\n{limit}\n")).unwrap();
        let budget = done.report.budget.as_ref().unwrap();
        assert!(kept(&done), "{limit}: {budget:?}");
        assert_eq!(budget.groups.len(), 5, "{limit}");
        assert!((budget.measured_db - db(&done)).abs() < 1e-9);
        let chosen: Vec<_> = budget.curve.iter().filter(|point| point.chosen).collect();
        assert!(chosen.len() == 1 && chosen[0].bytes == done.report.bytes.1);
        done
    };
    let bits = |done: &Rewritten| done.report.budget.as_ref().unwrap().effective_bits;
    let four = check("effective_bits = 4.0", &|done| bits(done) <= 4.0);
    let six = check("effective_bits = 6", &|done| bits(done) > 4.0 && bits(done) <= 6.0);
    assert!(db(&six) > db(&four) + 3.0);
    check("max_size = \"60%\"", &|done| done.report.bytes.1 as f64 <= 0.6 * done.report.bytes.0 as f64);
    check("max_size = \"14kB\"", &|done| done.report.bytes.1 <= 14_000);
    let good = check("min_sqnr = 30", &|done| db(done) >= 30.0);
    let fair = check("min_sqnr = 20", &|done| db(done) >= 20.0);
    assert!(fair.report.bytes.1 < good.report.bytes.1);
    // At equal bits no worse than one format for all.
    let (model, samples) = digits();
    let uniform = "preset = \"w8\"\n[default.weight]\ndtype = \"int4\"\n[guard]\noutput_db = -inf\n";
    let uniform = Rewrite::new(&model).samples(&samples).config(&Config::parse(uniform).unwrap()).run().unwrap();
    assert!(db(&four) >= db(&uniform), "{} against {}", db(&four), db(&uniform));
}

#[test]
fn limits_that_nothing_keeps_name_the_least() {
    let check = |budget: &str, kind: Kind, part: &str| {
        let error = run(&format!("[budget]\n{budget}\n")).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(part), "{budget}: {error}");
    };
    check("effective_bits = 3.5", Kind::Check, "the least is 4.00 bits");
    check("max_size = \"10%\"", Kind::Check, "of it not chosen for");
    check("formats = [\"int2\"]\nmin_sqnr = 40", Kind::Check, "the best keeps");
    check("formats = [\"mxfp4\"]\neffective_bits = 5", Kind::Config, "no quantizer for mxfp4");
    check("formats = [\"int9\"]\nmin_sqnr = 40", Kind::Config, "did you mean");
    check("formats = [\"int8\"]", Kind::Config, "no limit to choose them for");
    let error = run("[default]\nweight.enable = false\n[budget]\nmin_sqnr = 40\n").unwrap_err();
    assert!(error.to_string().contains("no weight whose format a budget could choose"), "{error}");
    let (model, _) = digits();
    let error = Rewrite::new(&model).config(&Config::parse("budget.effective_bits = 4").unwrap()).run().unwrap_err();
    assert!(error.kind() == Kind::Samples && error.to_string().contains("--calib"), "{error}");
}

#[test]
fn what_rules_decide_is_not_chosen_for() {
    let rule = "[[layer]]\nmatch = \"wide\"\nweight.dtype = \"int8\"\n[op_type.Gemm.weight]\nenable = false\n";
    let done = run(&format!("{rule}[budget]\nformats = [\"int4\"]\neffective_bits = 4\n")).unwrap();
    let budget = done.report.budget.unwrap();
    assert_eq!(budget.groups.len(), 3);
    let format = |site: &str| done.report.weights.iter().find(|row| row.site == site).map(|row| row.dtype);
    assert_eq!(format("wide.weight"), Some("int8"));
    assert_eq!(format("stem.weight"), Some("int4"));
    assert_eq!(done.report.weights.len(), 4);
}

#[test]
fn prices_serve_every_budget_and_become_rules() {
    let (model, samples) = digits();
    let config = Config::parse("[budget]\nformats = [\"int4\", \"int8\"]\neffective_bits = 6\n").unwrap();
    let rewrite = Rewrite::new(&model).samples(&samples).config(&config);
    let prices = rewrite.sensitivity().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), prices.to_json().unwrap()).unwrap();
    let prices = Prices::load(file.path()).unwrap();
    let (measured, given) = (rewrite.run().unwrap(), rewrite.prices(&prices).threads(1).run().unwrap());
    let bytes = |model: &Model| amax::ir::file::to_bytes(model).unwrap();
    assert_eq!(bytes(&measured.model), bytes(&given.model));
    let rules = rewrite.prices(&prices).suggestion().unwrap();
    let again = Config::parse(&rules.to_toml().unwrap()).unwrap();
    let again = Rewrite::new(&model).samples(&samples).config(&again).run().unwrap();
    assert_eq!(bytes(&measured.model), bytes(&again.model));
    let check = |config: &str, part: &str| {
        let config = Config::parse(config).unwrap();
        let error = Rewrite::new(&model).samples(&samples).config(&config).prices(&prices).run().unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    };
    check("[budget]\nformats = [\"int4\", \"int2\"]\neffective_bits = 6\n", "not measured for int2");
    check("exclude = [\"wide\"]\n[budget]\neffective_bits = 6\n", "other weights");
}

#[test]
fn weights_that_must_agree_are_one_group() {
    let numbers = |seed: usize| (0..256).map(|i| ((i * 7 + seed) % 13).to_string()).collect::<Vec<_>>().join(",");
    let model = parsed(&format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>
        g (float[4,16] x) => (float[4,16] y)
        <float[16,16] wq = {{{}}}, float[16,16] wk = {{{}}}, float[16,16] shared = {{{}}}, float[16,16] last = {{{}}}> {{
          [q] a = MatMul (x, wq)
          [k] b = MatMul (x, wk)
          [sum] c = Add (a, b)
          [first] d = MatMul (c, shared)
          [act] e = Relu (d)
          [second] f = MatMul (e, shared)
          [act2] h = Relu (f)
          [head] y = MatMul (h, last)
        }}",
        numbers(0),
        numbers(3),
        numbers(5),
        numbers(8)
    ));
    let samples = SampleSet::random(&model, 8, 0).unwrap();
    let config = Config::parse("[budget]\nformats = [\"int4\", \"int8\"]\n").unwrap();
    let prices = Rewrite::new(&model).samples(&samples).config(&config).sensitivity().unwrap();
    let groups: Vec<Vec<String>> = prices.groups.into_iter().map(|group| group.weights).collect();
    let expected: [&[&str]; 3] = [&["q.weight", "k.weight"], &["first.weight", "second.weight"], &["head.weight"]];
    assert_eq!(groups, expected);
}

/// The command judges by the size of the file, so that the smallest result it accepts is known.
#[test]
fn a_command_decides_what_is_good_enough() {
    let folder = folder();
    let at = folder.path();
    for name in ["digits.onnx", "digits.calib.npz"] {
        std::fs::copy(root("models").join(name), at.join(name)).unwrap();
    }
    std::fs::write(at.join("judge.sh"), "echo asked >> asked; echo bytes $(wc -c < \"$1\")\n").unwrap();
    let run = |check: &str, more: &[&str]| {
        let words = ["-q", "rewrite", "digits.onnx", "out.onnx", "--check", check, "--formats", "int4,int8"];
        let done = program(at).args(words).args(more).output().unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    let asked = || std::fs::read_to_string(at.join("asked")).unwrap_or_default().lines().count();
    assert_eq!(run("sh judge.sh {}", &["--at-least", "8000", "--max-checks", "4"]), (Some(0), String::new()));
    assert!(std::fs::metadata(at.join("out.onnx")).unwrap().len() >= 8000);
    assert!((1..=4).contains(&asked()), "{} calls", asked());
    std::fs::remove_file(at.join("out.onnx")).unwrap();
    let refused = [
        ("sh judge.sh {}", "9000000", Some(7), "no choice of formats reached it"),
        ("echo broken {}; exit 3", "1", None, "broken"),
        ("sh judge.sh", "1", Some(2), "does not say where the path of the model goes"),
    ];
    for (check, least, code, part) in refused {
        let (found, said) = run(check, &["--at-least", least]);
        assert!(found != Some(0) && code.is_none_or(|code| found == Some(code)), "{check}: {found:?}");
        assert!(said.contains(part), "{check}: {said}");
        assert!(!at.join("out.onnx").exists(), "{check}");
    }
    let left = names_in(at).into_iter().filter(|name| name.starts_with('.')).count();
    assert_eq!(left, 0, "candidates are left");
}
