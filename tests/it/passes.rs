//! Passes, as text in and text out: `tests/passes/*.onnxtxt`.
//!
//! The first line of a fixture names the passes. Its snapshot holds what each pass said, `+` for a change and `-` for a
//! refusal, and the model after the last one. `tests/passes/equivalence.py` runs both in onnxruntime.

use std::fmt::Write as _;
use std::ops::ControlFlow;

use amax::error::{Error, Kind, Result};
use amax::ir::text::{PrintOptions, parse, print_with};
use amax::ir::{Model, NodeId, Tensor};
use amax::onnx::DataType;
use amax::passes::pipeline::{self, parse_pipeline, print_pipeline};
use amax::passes::{Context, Evaluate, Outcome, Pass};

/// A runtime that can run nothing.
struct NoRuntime;

impl Evaluate for NoRuntime {
    fn evaluate(&self, _: &Model, _: NodeId, _: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        None
    }
}

/// Runs passes; what each of them said.
fn run(model: &mut Model, passes: &[&dyn Pass], evaluate: &dyn Evaluate) -> Vec<(String, Outcome)> {
    let mut said = Vec::new();
    pipeline::run(model, passes, &Context { evaluate }, &mut |_, name, outcome| {
        said.push((name.to_owned(), outcome.clone()));
        Ok(ControlFlow::Continue(()))
    })
    .unwrap_or_else(|e| panic!("{e}"));
    said
}

/// What the passes said, and the model they left.
fn report(said: &[(String, Outcome)], model: &Model) -> String {
    let mut text = String::new();
    for (name, Outcome { changes, skips }) in said {
        writeln!(text, "{name}").unwrap();
        changes.iter().for_each(|n| writeln!(text, "  + {}: {}", n.at, n.text).unwrap());
        skips.iter().for_each(|n| writeln!(text, "  - {}: {}", n.at, n.text).unwrap());
    }
    text + "\n" + &print_with(model, &PrintOptions::portable())
}

#[test]
fn fixtures_give_their_snapshots_and_a_second_run_changes_nothing() {
    insta::glob!("../passes", "*.onnxtxt", |path| {
        let text = std::fs::read_to_string(path).unwrap();
        let names = text.lines().next().and_then(|l| l.strip_prefix("# passes: ")).expect("names its passes");
        let passes = parse_pipeline(names).unwrap();
        let graph: String = text.lines().filter(|l| !l.starts_with('#')).fold(String::new(), |s, l| s + l + "\n");
        let mut model = parse(&graph).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let said = run(&mut model, &passes, &NoRuntime);
        let settings = {
            let mut settings = insta::Settings::clone_current();
            settings.set_snapshot_path("../passes/snapshots");
            settings.set_prepend_module_to_snapshot(false);
            settings.set_omit_expression(true);
            settings.remove_input_file();
            settings
        };
        settings.bind(|| insta::assert_snapshot!("pass", report(&said, &model)));

        let before = print_with(&model, &PrintOptions::portable());
        let refusals: Vec<_> = said.iter().flat_map(|(_, outcome)| &outcome.skips).collect();
        for (name, outcome) in run(&mut model, &passes, &NoRuntime) {
            assert_eq!(outcome.changes, [], "{}: {name} has more to do", path.display());
            assert!(outcome.skips.iter().all(|skip| refusals.contains(&skip)), "{}: {name}", path.display());
        }
        assert_eq!(before, print_with(&model, &PrintOptions::portable()), "{}", path.display());
    });
}
