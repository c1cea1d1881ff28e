//! Passes, as text in and text out: `tests/passes/*.onnxtxt`.
//!
//! The first line of a fixture names the passes. Its snapshot holds what each pass said, `+` for a change and `-` for a
//! refusal, each with its code, and the model after the last one. `tests/passes/equivalence.py` runs both in onnxruntime.

use std::fmt::Write as _;
use std::ops::ControlFlow;

use crate::snapshot;
use crate::support::{folder, parsed, root};
use amax::error::{Error, Kind, Result};
use amax::ir::text::{PrintOptions, parse, print_with};
use amax::ir::{Model, NodeId, Tensor, file};
use amax::onnx::{DataType, ModelProto, StringStringEntryProto, TensorAnnotation};
use amax::passes::pipeline::{self, parse_pipeline, print_pipeline};
use amax::passes::support::exact::Exact;
use amax::passes::{Context, Evaluate, Outcome, Pass};
use prost::Message;

/// Runs passes; what each of them said.
fn run(model: &mut Model, passes: &[&dyn Pass], evaluate: &dyn Evaluate) -> Vec<(String, Outcome)> {
    let mut said = Vec::new();
    pipeline::run(model, passes, &Context { evaluate, quantization: None }, &mut |_, name, outcome| {
        said.push((name.to_owned(), outcome.clone()));
        Ok(ControlFlow::Continue(()))
    })
    .unwrap_or_else(|e| panic!("{e}"));
    said
}

/// What documents call a change or a reason.
fn code(what: &impl serde::Serialize) -> String {
    serde_json::to_value(what).unwrap()["code"].as_str().unwrap().to_owned()
}

/// What the passes said, and the model they left.
fn report(said: &[(String, Outcome)], model: &Model) -> String {
    let mut text = String::new();
    for (name, Outcome { changes, skips }) in said {
        text.extend([name.as_str(), "\n"]);
        text.extend(changes.iter().map(|n| format!("  + {n} [{}]\n", code(&n.what))));
        text.extend(skips.iter().map(|n| format!("  - {n} [{}]\n", code(&n.what))));
    }
    text + "\n" + &print_with(model, &PrintOptions::portable())
}

#[test]
fn fixtures_give_their_snapshots_and_a_second_run_changes_nothing() {
    let folder = root("tests/passes");
    let mut names: Vec<String> = std::fs::read_dir(folder.join("snapshots")).unwrap().map(name_of).collect();
    let mut fixtures: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    fixtures.retain(|path| path.extension().is_some_and(|e| e == "onnxtxt"));
    fixtures.sort();
    for path in &fixtures {
        let text = std::fs::read_to_string(path).unwrap();
        let list = text.lines().next().and_then(|l| l.strip_prefix("# passes: ")).expect("names its passes");
        let passes = parse_pipeline(list).unwrap();
        let mut model = parsed(&text);
        let said = run(&mut model, &passes, &Exact);
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        snapshot::check(&format!("passes/snapshots/{name}.txt"), &report(&said, &model));
        names.retain(|n| *n != name);

        let before = print_with(&model, &PrintOptions::portable());
        let refusals: Vec<_> = said.iter().flat_map(|(_, outcome)| &outcome.skips).collect();
        for (name, outcome) in run(&mut model, &passes, &Exact) {
            assert_eq!(outcome.changes, [], "{}: {name} has more to do", path.display());
            assert!(outcome.skips.iter().all(|skip| refusals.contains(&skip)), "{}: {name}", path.display());
        }
        assert_eq!(before, print_with(&model, &PrintOptions::portable()), "{}", path.display());
    }
    assert!(names.is_empty(), "snapshots without a fixture: {names:?}");
}

fn name_of(entry: std::io::Result<std::fs::DirEntry>) -> String {
    entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned()
}

const PREPARED: &str = "freeze-inputs,lift-constants,fold-constants,fuse-batchnorm,drop-dead";

#[test]
fn pipelines_are_read_and_printed_alike() {
    for list in ["", "drop-dead", PREPARED, "drop-dead,lift-constants,drop-dead"] {
        assert_eq!(print_pipeline(&parse_pipeline(list).unwrap()), list);
    }
    assert_eq!(print_pipeline(&parse_pipeline(" drop-dead ,  fold-constants").unwrap()), "drop-dead,fold-constants");
    assert_eq!(print_pipeline(pipeline::PREPARE), PREPARED);
}

#[test]
fn a_name_that_is_no_pass_gets_the_nearest_that_is() {
    let check = |list: &str, message: &str, hint: &str| {
        let error = parse_pipeline(list).err().unwrap();
        assert_eq!(error.kind(), Kind::Usage);
        assert_eq!(error.message(), message);
        assert!(error.hint().unwrap().starts_with(hint), "{error}");
    };
    check("fold-constant", "there is no pass \"fold-constant\"", "did you mean \"fold-constants\"?");
    check("drop-dead,fuse_batchnorm", "there is no pass \"fuse_batchnorm\"", "did you mean \"fuse-batchnorm\"?");
    check("drop-dead,", "there is no pass \"\"", "the passes are freeze-inputs, lift-constants, ");
    check("compress", "there is no pass \"compress\"", "the passes are freeze-inputs, lift-constants, ");
}

/// A pass made of a function.
struct Act(fn(&mut Model) -> Result<()>);

impl Pass for Act {
    fn name(&self) -> &'static str {
        "act"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        (self.0)(model).map(|()| Outcome::default())
    }
}

const CHAIN: &str = r#"<ir_version: 8, opset_import: ["" : 17]>
chain (float[2] x) => (float[2] y) {
  a = Relu (x)
  b = Neg (a)
  y = Abs (b)
}"#;

#[test]
fn errors_name_the_pass() {
    let check = |act: fn(&mut Model) -> Result<()>, kind: Kind, message: &str| {
        let mut after = 0;
        let mut model = parse(CHAIN).unwrap();
        let context = Context { evaluate: &Exact, quantization: None };
        let error = pipeline::run(&mut model, &[&Act(|_| Ok(())), &Act(act)], &context, &mut |_, _, _| {
            after += 1;
            Ok(ControlFlow::Continue(()))
        })
        .unwrap_err();
        assert_eq!((error.kind(), error.at().pass.as_deref(), after), (kind, Some("act"), 1));
        assert!(error.message().contains(message), "{error}");
    };
    check(|_| Err(Error::model("no weight")), Kind::Model, "no weight");
    let backwards = |model: &mut Model| {
        let order = model.graph(model.main()).nodes().iter().rev().copied().collect();
        model.reorder(model.main(), order);
        Ok(())
    };
    check(backwards, Kind::Internal, "comes before a producer of its inputs");
}

#[test]
fn a_run_stops_when_it_is_told_to() {
    let mut seen = Vec::new();
    let mut model = parse(CHAIN).unwrap();
    pipeline::run(
        &mut model,
        pipeline::PREPARE,
        &Context { evaluate: &Exact, quantization: None },
        &mut |_, name, _| {
            seen.push(name.to_owned());
            Ok(if name == "fold-constants" { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        },
    )
    .unwrap();
    assert_eq!(seen, ["freeze-inputs", "lift-constants", "fold-constants"]);
}

/// A runtime that answers everything with the same tensors.
struct Answer(Vec<Tensor>);

impl Evaluate for Answer {
    fn evaluate(&self, _: &Model, _: NodeId, _: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        Some(self.0.clone())
    }
}

#[test]
fn results_of_a_runtime_are_checked() {
    let check = |answer: Vec<Tensor>, said: &str| {
        let text = r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] e> {
  e = Exp (w)
  y = Add (x, e)
}"#;
        let mut model = parse(text).unwrap();
        let outcome = run(&mut model, &parse_pipeline("fold-constants").unwrap(), &Answer(answer)).remove(0).1;
        let changes = outcome.changes.iter().map(|n| n.what.to_string());
        let notes: Vec<String> = changes.chain(outcome.skips.iter().map(|n| n.what.to_string())).collect();
        assert_eq!(notes, [said]);
        assert_eq!(outcome.changes.len(), 2 - model.graph(model.main()).nodes().len());
    };
    check(vec![Tensor::from_f32(&[2], &[2.5, 7.5])], "Exp of constants became a constant");
    check(vec![Tensor::from_i64(&[2], &[2, 7])], "its result is not of the declared type");
    check(vec![], "its inputs are constant, but not all of its outputs could be evaluated");
    let large = Tensor::new(DataType::Float, &[2 << 20], vec![0; 8 << 20]);
    check(vec![large], "its result would take more than its inputs and more than 4 MiB");
}

#[test]
fn annotations_go_with_their_tensors_and_keep_their_parameters() {
    let text = r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x) => (float[2] y) <float kept_scale = {0.5}, float gone_scale = {0.25}> {
  a = Relu (x)
  dead = Neg (x)
  y = Abs (a)
}"#;
    let folder = folder();
    let path = folder.path().join("m.onnx");
    file::save(&parse(text).unwrap(), &path).unwrap();
    let mut proto = ModelProto::decode(std::fs::read(&path).unwrap().as_slice()).unwrap();
    let annotation = |tensor: &str, scale: &str| TensorAnnotation {
        tensor_name: Some(tensor.to_owned()),
        quant_parameter_tensor_names: vec![StringStringEntryProto {
            key: Some("SCALE_TENSOR".to_owned()),
            value: Some(scale.to_owned()),
        }],
    };
    let graph = proto.graph.as_mut().unwrap();
    graph.quantization_annotation = vec![annotation("a", "kept_scale"), annotation("dead", "gone_scale")];
    std::fs::write(&path, proto.encode_to_vec()).unwrap();

    let mut model = file::load(&path).unwrap();
    run(&mut model, &parse_pipeline("drop-dead").unwrap(), &Exact);
    let graph = model.graph(model.main());
    assert_eq!(graph.annotations(), [annotation("a", "kept_scale")]);
    let names: Vec<_> = graph.initializers().iter().map(|&v| model.value(v).name()).collect();
    assert_eq!(names, ["kept_scale"]);
}

/// Convolutions, each with its parameters in `Constant` nodes and a `BatchNormalization`. `benches/structure.rs` takes the time.
#[test]
fn thousands_of_nodes_are_prepared() {
    let mut text =
        String::from("<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[1,2,4] x0) => (float[1,2,4] x1000) {\n");
    for i in 0..1000 {
        let (next, list) = (i + 1, "{1, 2}");
        writeln!(text, "w{i} = Constant <value = float[2,2,1] {{0, 1, 1, 0}}> ()").unwrap();
        for parameter in ["s", "b", "m", "v"] {
            writeln!(text, "{parameter}{i} = Constant <value = float[2] {list}> ()").unwrap();
        }
        writeln!(text, "c{i} = Conv (x{i}, w{i})").unwrap();
        writeln!(text, "x{next} = BatchNormalization (c{i}, s{i}, b{i}, m{i}, v{i})").unwrap();
    }
    let mut model = parse(&(text + "}")).unwrap();
    run(&mut model, pipeline::PREPARE, &Exact);
    assert_eq!(model.graph(model.main()).nodes().len(), 1000);
}
