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
use amax::onnx::{DataType, ModelProto, StringStringEntryProto, TensorAnnotation, TrainingInfoProto};
use amax::passes::pipeline::{self, parse_pipeline};
use amax::passes::raise_opset::raise;
use amax::passes::recipes::PREPARE;
use amax::passes::support::evaluate::Exact;
use amax::passes::support::operands::{Comparison, compare};
use amax::passes::{Context, Evaluate, Outcome, Pass};
use amax::reason::Reason;
use prost::Message;

/// Runs passes; what each of them said.
fn run(model: &mut Model, passes: &[&dyn Pass], evaluate: &dyn Evaluate) -> Vec<(String, Outcome)> {
    let mut said = Vec::new();
    let _ = pipeline::run(model, passes, &Context::new(evaluate), &mut |_, name, outcome| {
        said.push((name.to_owned(), outcome.clone()));
        Ok(ControlFlow::Continue(()))
    })
    .unwrap_or_else(|e| panic!("{e}"));
    said
}

/// What documents call a change or a reason, and the reason inside it.
fn code(what: &impl serde::Serialize) -> String {
    let codes = |value: &serde_json::Value| value["code"].as_str().map(str::to_owned);
    let value = serde_json::to_value(what).unwrap();
    let mut found: Vec<String> = codes(&value).into_iter().collect();
    let mut at = &value["because"];
    while let Some(code) = codes(at) {
        found.push(code);
        at = &at["because"];
    }
    found.join(" ")
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

/// Reasons of passes that no fixture here makes, with where they are tested, or why nothing can make them.
const ELSEWHERE: &[(&str, &str)] = &[
    ("keeps-scales", "tests/it/qat.rs"),
    ("not-exact", "passes/fold_fake_quant.rs"),
    ("not-onnx", "tests/it/passes.rs"),
    ("training-graphs", "tests/it/passes.rs"),
    ("nearest-rounding", "tests/it/passes.rs"),
    ("other-operator", "tests/it/passes.rs"),
    ("now-is", "tests/it/passes.rs"),
    ("two-pairs", "tests/it/passes.rs"),
    ("groups-of-gemm", "tests/it/passes.rs"),
    ("input-beside-weights", "tests/it/opset.rs"),
    ("nothing-to-store", "tests/it/forms.rs"),
    ("float-would-differ", "a bias of more than 2^24 steps"),
    ("function-parameter", "constants of functions are not lifted"),
    ("not-a", "callers know the operator"),
    ("missing-input", "the verifier refuses such a model"),
    ("not-positive", "the verifier refuses such a model"),
    ("axis-out-of-range", "the verifier refuses such a model"),
    ("invalid", "the verifier refuses such a model"),
    ("scale-shape", "the verifier refuses such a model"),
    ("not-quantized-type", "a quantizer of a type that ONNX does not allow"),
];

/// Every reason of passes is made by a fixture, or named by a test elsewhere.
#[test]
fn every_reason_has_a_case() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let source = read("src/reason/mod.rs");
    let (_, rows) = source.split_once("    // Passes.\n").expect("the table has a part for passes");
    let (rows, _) = rows.split_once("\n}\n").unwrap();
    let variant = |line: &str| {
        let name = line.strip_prefix("    ")?.split([' ', '=']).next()?;
        name.starts_with(|c: char| c.is_ascii_uppercase()).then(|| name.to_owned())
    };
    let variants: Vec<String> = rows.lines().filter_map(variant).collect();
    assert!(variants.len() > 50, "{variants:?}");
    let is_file = |place: &str| place.rsplit('.').next() == Some("rs");
    let mut seen = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(root.join("tests/passes/snapshots")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let codes =
            text.lines().filter_map(|l| l.strip_prefix("  - ")?.strip_suffix(']')?.rsplit_once(" [")).map(|s| s.1);
        seen.extend(codes.flat_map(|c| c.split(' ')).map(str::to_owned));
    }
    for name in variants {
        let kebab = |(at, c): (usize, char)| {
            let dash = if at > 0 && c.is_ascii_uppercase() { "-" } else { "" };
            format!("{dash}{}", c.to_ascii_lowercase())
        };
        let code: String = name.char_indices().map(kebab).collect();
        match ELSEWHERE.iter().find(|(other, _)| *other == code) {
            Some((_, place)) => assert!(
                !seen.contains(&code) && (!is_file(place) || read(place).contains(&format!("Reason::{name}"))),
                "{name}: a fixture makes it, or {place} does not name it"
            ),
            None => assert!(seen.contains(&code), "no fixture in tests/passes is refused for {code}"),
        }
    }
}

#[test]
fn what_raising_an_operator_set_leaves_is_listed() {
    let check = |opset: i64, body: &str, training: bool, wanted: &[Reason]| {
        let text = format!(
            "<ir_version: 5, opset_import: [\"\" : {opset}]> g (float[1, 1, 4, 4] x, float[4] s) => (float y) {{ {body} }}"
        );
        let mut model = parse(&text).unwrap();
        if training {
            let mut proto = ModelProto::decode(file::to_bytes(&model).unwrap().as_slice()).unwrap();
            proto.training_info.push(TrainingInfoProto::default());
            model = file::from_bytes(proto.encode_to_vec()).unwrap();
        }
        let outcome = raise(&mut model, 13).unwrap();
        let found: Vec<Reason> = outcome.skips.into_iter().map(|note| note.what).collect();
        assert_eq!(found, wanted, "{body}");
    };
    check(11, "y = Sparkle (x)", false, &[Reason::NotOnnx { op: "Sparkle".into() }]);
    check(10, "y = Resize (x, s)", false, &[Reason::NearestRounding]);
    check(11, "y = Abs (x)", true, &[Reason::TrainingGraphs]);
    check(11, "y = Abs (x)", false, &[]);
}

#[test]
fn operands_that_cannot_be_compared_have_a_reason() {
    let model = |op: &str, weight: &str| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[2, 2] x) => (float[2, 2] y) <{weight}, float s = {{0.5}}> {{
                d = DequantizeLinear (w, s) y = {op} (x, d) }}"
        );
        parse(&text).unwrap()
    };
    let matrix = "int8[2, 2] w = {1, 2, 3, 4}";
    let check = |op: &str, weight: &str, wanted: Comparison| {
        let found = compare(&model("MatMul", matrix), &model(op, weight));
        assert_eq!(found.into_iter().map(|operand| operand.found).collect::<Vec<_>>(), [wanted], "{op} {weight}");
    };
    check("MatMul", matrix, Comparison::Equal);
    check("MatMul", "int8[2, 2] w = {1, 2, 3, 5}", Comparison::Differing(1));
    check("Gemm", matrix, Comparison::Unknown(Reason::OtherOperator));
    let list = Reason::NowIs { dtype: DataType::Float, dims: vec![2] };
    check("MatMul", "int8[2] w = {1, 2}", Comparison::Unknown(list));
}

#[test]
fn scales_that_are_not_taken_have_a_reason() {
    let check = |body: &str, tensor: &str, wanted: Reason| {
        let text = format!(
            "<ir_version: 10, opset_import: [\"\" : 21]> g (float[2, 4] x) => (float[2, 2] y) <
                float s = {{0.5}}, float t = {{0.25}}, uint8 z = {{128}}, int8[4, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}},
                float[2, 2] groups = {{0.5, 0.25, 0.5, 0.25}}, int8[2, 2] zeros = {{0, 0, 0, 0}}> {{ {body} }}"
        );
        let found = amax::scales::scales(&parse(&text).unwrap());
        assert_eq!(found.skipped.get(tensor), Some(&wanted), "{body}");
    };
    check(
        "a = QuantizeLinear (x, s, z) b = QuantizeLinear (x, t, z) c = DequantizeLinear (a, s, z)
         d = DequantizeLinear (b, t, z) e = Add (c, d) f = DequantizeLinear (w, s) y = MatMul (e, f)",
        "x",
        Reason::TwoPairs,
    );
    check(
        "f = DequantizeLinear <axis = 0, block_size = 2> (w, groups, zeros) y = Gemm (x, f)",
        "w",
        Reason::GroupsOfGemm,
    );
}

const PREPARED: &str = "freeze-inputs,inline-functions,lift-constants,fold-constants,split-embedding,split-attention,unfuse-matmul,fold-gemm,fuse-batchnorm,narrow-floats,drop-dead,name-bodies";

#[test]
fn lists_of_passes_are_read() {
    let names = |passes: &[&dyn Pass]| passes.iter().map(|pass| pass.name()).collect::<Vec<_>>().join(",");
    for list in ["", "drop-dead", PREPARED, "drop-dead,lift-constants,drop-dead"] {
        assert_eq!(names(&parse_pipeline(list).unwrap()), list);
    }
    assert_eq!(names(&parse_pipeline(" drop-dead ,  fold-constants").unwrap()), "drop-dead,fold-constants");
    assert_eq!(names(&PREPARE.passes()), PREPARED);
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
    check("drop-dead,", "there is no pass \"\"", "the passes are freeze-inputs, inline-functions, lift-constants, ");
    check(
        "compress",
        "there is no pass \"compress\"",
        "the passes are freeze-inputs, inline-functions, lift-constants, ",
    );
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
        let context = Context::new(&Exact);
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
    let flow = pipeline::run(&mut model, &PREPARE.passes(), &Context::new(&Exact), &mut |_, name, _| {
        seen.push(name.to_owned());
        Ok(if name == "fold-constants" { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })
    .unwrap();
    assert!(flow.is_break());
    assert_eq!(seen, ["freeze-inputs", "inline-functions", "lift-constants", "fold-constants"]);
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
    check(vec![Tensor::from_i64(&[2], &[2, 7])], "its output is int64, not float");
    check(vec![], "its output cannot be computed exactly");
    let large = Tensor::new(DataType::Float, &[2 << 20], vec![0; 8 << 20]);
    check(vec![large], "its output would be larger than the limit of 4194304 bytes");
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
    run(&mut model, &PREPARE.passes(), &Exact);
    assert_eq!(model.graph(model.main()).nodes().len(), 1000);
}

/// However constants are repeated, folding makes at most 64 MiB of what the model has not.
#[test]
fn folding_makes_a_bounded_number_of_bytes() {
    let check = |what: &str, nodes: &str, last: &str, times: usize| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[1] x) => (float y)\n\
             <int64[1] n = {{262144}}, int64[1] two = {{2}}, int64[2] wide = {{4, 1}}, int64[1] flat = {{-1}}, float[1] s = {{2}}> {{\n\
             t0 = ConstantOfShape <value = float[1] {{1}}> (n)\n{}  r = ReduceSum <keepdims = 0> ({last})\n  y = Add (x, r)\n}}",
            (1..=times)
                .map(|i| nodes.replace("OUT", &format!("t{i}")).replace("IN", &format!("t{}", i - 1)))
                .collect::<String>()
        );
        let mut model = parse(&text).unwrap_or_else(|e| panic!("{what}: {e}"));
        run(&mut model, &PREPARE.passes(), &amax::runtime::TractEvaluate);
        let graph = model.graph(model.main());
        let bytes: usize = graph.initializers().iter().filter_map(|&v| model.constant(v)).map(Tensor::byte_len).sum();
        assert!(bytes <= 66 << 20, "{what}: {bytes} bytes");
    };
    check("Concat", "  OUT = Concat <axis = 0> (IN, IN)\n", "t30", 30);
    check("Concat of many", "  OUT = Concat <axis = 0> (IN, IN, IN, IN, IN, IN, IN, IN)\n", "t9", 9);
    check("Tile", "  OUT = Tile (IN, two)\n", "t30", 30);
    check("Expand", "  eOUT = Expand (IN, wide)\n  OUT = Reshape (eOUT, flat)\n", "t15", 15);
    check(
        "sum of a row and a column",
        "  cOUT = Unsqueeze (IN, flat)\n  aOUT = Add (cOUT, IN)\n  OUT = Reshape (aOUT, flat)\n",
        "t4",
        4,
    );
    check("copies", "  kOUT = Add (t0, s)\n  OUT = Mul (x, kOUT)\n", "t100", 100);
}
