//! Models that do not come to an end, or take longer than they may.
#![cfg(feature = "tract")]

use std::time::Duration;

use amax::compare::Compare;
use amax::error::{Error, Kind};
use amax::ir::Model;
use amax::reason::Reason;
use amax::rewrite::Rewrite;
use amax::samples::SampleSet;

use crate::support::parsed;

fn outcome(model: &Model, timeout: Option<Duration>) -> Result<(), Error> {
    let samples = SampleSet::random(model, 2, 0).unwrap();
    Compare::new(model, model).samples(&samples).timeout(timeout).outputs().map(|_| ())
}

#[test]
fn what_has_no_end_is_refused() {
    let check = |text: &str, words: &str| {
        let error = outcome(&parsed(text), None).unwrap_err();
        assert_eq!(error.kind(), Kind::Runtime);
        assert!(error.to_string().contains(words), "{error}");
    };
    let turns = |count: &str, condition: &str, next: &str| {
        format!(
            r#"<ir_version: 8, opset_import: ["" : 17]>
loop (float[2] x) => (float[n] y) <int64 n = {{{count}}}, bool t = {{1}}> {{
  y = Loop ({condition}) <body = turn (int64 i, bool on, float[m] a) => (bool again, float[k] b) {{
    again = Identity (on)
    b = {next}
  }}>
}}"#
        )
    };
    check(&turns("1099511627776", "n, , x", "Neg (a)"), "more than 10000 rounds");
    check(&turns("1", ", t, x", "Neg (a)"), "more than 10000 rounds");
    check(&turns("60", "n, , x", "Concat <axis = 0> (a, a)"), "memory");
    check(&doubling(), "more than 200000 nodes");
}

/// Forty functions that call the next one twice.
fn doubling() -> String {
    let twice = |at: usize| {
        let body =
            if at == 39 { "c = Relu (a)".to_owned() } else { format!("b = f.f{0} (a)\n  c = f.f{0} (b)", at + 1) };
        format!("<domain: \"f\", opset_import: [\"\" : 17, \"f\" : 1]>\nf{at} (a) => (c) {{\n  {body}\n}}\n")
    };
    let functions: String = (0..40).map(twice).collect();
    let main = r#"<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
main (float[2] x) => (float[2] y) {
  y = f.f0 (x)
}
"#;
    format!("{main}{functions}")
}

#[test]
fn functions_that_multiply_stay_calls() {
    let done = Rewrite::new(&parsed(&doubling())).run().unwrap();
    let row = done.report.passes.iter().find(|row| row.pass == "inline-functions").unwrap();
    assert_eq!(row.changes, 0);
    assert!(matches!(&row.skips[..], [skip] if matches!(skip.what, Reason::LongFunction { .. })), "{:?}", row.skips);
}

#[test]
fn a_sample_may_take_its_time_and_no_longer() {
    let products: Vec<String> = (1..400).map(|i| format!("  t{} = MatMul (t{i}, t{i})\n", i + 1)).collect();
    let products = products.concat();
    let model = parsed(&format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\nlong (float[300,300] x) => (float[300,300] y) {{
  t1 = Identity (x)\n{products}  y = Relu (t400)\n}}"
    ));
    let error = outcome(&model, Some(Duration::from_millis(1))).unwrap_err();
    assert_eq!(error.kind(), Kind::Runtime);
    let said = error.to_string();
    assert!(["longer than 0.001 s", "in sample 0", "--timeout"].iter().all(|words| said.contains(words)), "{said}");
    outcome(&model, Some(Duration::from_hours(1))).unwrap();
}
