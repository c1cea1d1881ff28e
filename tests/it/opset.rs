//! Raising the opset.
//!
//! `tests/data/opset/*.onnx` are small models, one case each; `expected.txt` says what each becomes. The script
//! `tests/data/opset/make.py` makes the models and checks in onnxruntime that raised models compute the same;
//! `AMAX_BLESS=1 cargo test --test it opset` writes `expected.txt`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::support::{models_below, root};
use amax::error::Error;
use amax::ir::{Def, GraphId, Model, Tensor, ValueId, file, verify};
use amax::passes::freeze_inputs::FreezeInputs;
use amax::passes::raise_opset::{MIN_OPSET, ir_version_for, raise};
use amax::reason::Reason;

const TARGETS: [i64; 3] = [13, 18, 21];

fn folder() -> PathBuf {
    root("tests/data/opset")
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|s| s.to_str()).expect("a UTF-8 name")
}

fn raised(path: &Path, to: i64) -> Result<Model, Error> {
    let mut model = file::load(path)?;
    raise(&mut model, to)?;
    verify::verify(&model)?;
    Ok(model)
}

/// Every node, constant and attribute, in order.
fn print(model: &Model) -> String {
    let mut out = format!("ir {} opset {}\n", model.ir_version(), model.opset().unwrap_or(0));
    print_graph(model, model.main(), "main", "", &mut out);
    for function in model.functions() {
        let opset = model.opset_in(function.graph).unwrap_or(0);
        let title = format!("function {} opset {opset}", model.graph(function.graph).name());
        print_graph(model, function.graph, &title, "", &mut out);
    }
    out
}

fn print_graph(model: &Model, id: GraphId, title: &str, indent: &str, out: &mut String) {
    let graph = model.graph(id);
    let name = |v: Option<ValueId>| v.map_or("_", |v| model.value(v).name()).to_owned();
    let list = |values: Vec<Option<ValueId>>| values.into_iter().map(name).collect::<Vec<_>>().join(", ");
    let inputs = list(graph.inputs().map(Some).collect());
    let outputs = list(graph.outputs().map(Some).collect());
    let _ = writeln!(out, "{indent}{title} ({inputs}) -> ({outputs})");
    for &value in graph.initializers() {
        if let Def::Constant(tensor) | Def::Input { default: Some(tensor) } = model.value(value).def() {
            let _ = writeln!(out, "{indent}  {} = {}", model.value(value).name(), print_tensor(tensor));
        }
    }
    for &id in graph.nodes() {
        let node = model.node(id);
        let (outputs, inputs) = (list(node.outputs().to_vec()), list(node.inputs().to_vec()));
        let _ = write!(out, "{indent}  [{}] {outputs} = {}({inputs})", node.name(), node.op_type());
        for attr in node.attrs() {
            let proto = attr.proto();
            let _ = write!(out, " {}=", attr.name());
            let _ = match (proto.i, proto.f, &proto.s, &proto.t) {
                (Some(i), ..) => write!(out, "{i}"),
                (_, Some(f), ..) => write!(out, "{f}"),
                (_, _, Some(s), _) => write!(out, "{}", String::from_utf8_lossy(s)),
                (.., Some(t)) => {
                    let tensor = Tensor::from_proto(t.clone(), None).expect("a valid tensor");
                    write!(out, "{}", print_tensor(&tensor))
                }
                _ if !attr.graphs().is_empty() => write!(out, "<graph>"),
                _ if !proto.floats.is_empty() => write!(out, "{:?}", proto.floats),
                _ if proto.ref_attr_name.is_some() => write!(out, "@{}", proto.ref_attr_name.as_deref().unwrap_or("")),
                _ => write!(out, "{:?}", proto.ints),
            };
        }
        out.push('\n');
        for attr in node.attrs() {
            for &body in attr.graphs() {
                print_graph(model, body, attr.name(), &format!("{indent}    "), out);
            }
        }
    }
}

fn print_tensor(tensor: &Tensor) -> String {
    let dims = tensor.dims();
    let values = match (tensor.to_i64(), tensor.to_f32()) {
        _ if tensor.len() > 16 => "…".to_owned(),
        (Some(ints), _) => format!("{ints:?}"),
        (_, Some(floats)) => format!("{floats:?}"),
        _ => "?".to_owned(),
    };
    format!("{}{dims:?} {values}", tensor.dtype())
}

#[test]
fn converts_as_checked_in_onnxruntime() {
    let mut actual = String::new();
    for path in models_below(&folder()) {
        let mut last = String::new();
        for to in TARGETS {
            let text = match raised(&path, to) {
                Ok(model) => print(&model),
                Err(error) => format!("error: {}\n", error.to_string().replace('\n', "\n  ")),
            };
            let body = text.split_once('\n').map_or("", |(_, body)| body).to_owned();
            if body != last || to == TARGETS[0] {
                let _ = write!(actual, "== {} to {to}\n{text}\n", stem(&path));
                last = body;
            }
        }
    }
    let root = root("").display().to_string();
    crate::snapshot::check("data/opset/expected.txt", &actual.replace(&root, ""));
}

#[test]
fn raises_the_ir_version_along() {
    // onnx.helper.OP_SET_ID_VERSION_MAP of onnx 1.23.
    let table = [3, 3, 4, 5, 6, 7, 7, 7, 8, 8, 8, 8, 9, 9, 10, 10, 11, 12, 13, 13, 13, 14];
    for (opset, ir_version) in (7..=28).zip(table) {
        assert_eq!(ir_version_for(opset), ir_version, "{opset}");
    }
    for to in TARGETS {
        let model = raised(&folder().join("clip_9.onnx"), to).expect("raised");
        assert_eq!((model.opset(), model.ir_version()), (Some(to), ir_version_for(to)));
    }
}

#[test]
fn never_lowers_and_is_idempotent() {
    for path in models_below(&folder()) {
        let Ok(mut model) = raised(&path, 21) else { continue };
        let before = print(&model);
        for to in [7, 13, 21] {
            let outcome = raise(&mut model, to).expect("nothing to do");
            assert_eq!(outcome, amax::passes::Outcome::default(), "{} to {to}", stem(&path));
        }
        assert_eq!(print(&model), before, "{}", stem(&path));
    }
}

#[test]
fn one_step_at_a_time_is_the_same() {
    for path in models_below(&folder()) {
        let Ok(at_once) = raised(&path, 21) else { continue };
        let mut model = file::load(&path).expect("loads");
        for to in MIN_OPSET..=21 {
            raise(&mut model, to).expect("raised before");
        }
        assert_eq!(print(&model), print(&at_once), "{}", stem(&path));
    }
}

#[test]
fn refuses_unknown_operator_sets() {
    let mut model = file::load(&folder().join("clip_9.onnx")).expect("loads");
    let error = raise(&mut model, 29).expect_err("29 does not exist");
    assert_eq!(error.message(), "opset 29 is not known");
    assert_eq!(model.opset(), Some(9));
}

#[test]
fn frees_weights_of_old_ir_versions() {
    let mut model = file::load(&folder().join("initializers_as_inputs_8.onnx")).expect("loads");
    let names = |m: &Model| m.graph(m.main()).inputs().map(|v| m.value(v).name().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&model), ["x", "w", "b", "s", "m", "v"]);
    let outcome = freeze(&mut model);
    assert_eq!(outcome.changes.len(), 6);
    assert_eq!(names(&model), ["x"]);
    assert_eq!(model.ir_version(), 4);
    let weight = model.value_named("w").expect("still there");
    assert!(model.constant(weight).is_some());
    verify::verify(&model).expect("valid");

    // From IR version 4 on, an initializer that is also an input may be meant to be overridden.
    let mut model = raised(&folder().join("initializers_as_inputs_8.onnx"), 13).expect("raised");
    assert_eq!(freeze(&mut model), amax::passes::Outcome::default());
    assert_eq!(names(&model).len(), 6);
}

#[test]
#[ignore = "tool: raises AMAX_OPSET_CASES/*.onnx to each of AMAX_OPSET_TO, for make.py"]
fn raise_folder() {
    let folder = PathBuf::from(std::env::var_os("AMAX_OPSET_CASES").expect("AMAX_OPSET_CASES is set"));
    let targets = std::env::var("AMAX_OPSET_TO").expect("AMAX_OPSET_TO is set");
    for path in models_below(&folder).into_iter().filter(|p| !stem(p).contains(".to")) {
        for to in targets.split(',') {
            let target = folder.join(format!("{}.to{to}.onnx", stem(&path)));
            let result = raised(&path, to.parse().expect("a number")).and_then(|m| file::save(&m, &target));
            let refusal = target.with_extension("err");
            let _ = std::fs::remove_file(if result.is_ok() { &refusal } else { &target });
            if let Err(error) = result {
                std::fs::write(refusal, error.to_string()).expect("writable");
            }
        }
    }
}

/// Where a rewrite asks for it, inputs with defaults become constants if all of them are weights, and else none does.
#[test]
fn frees_weights_where_all_inputs_with_defaults_are_weights() {
    let check = |inputs: &str, tensors: &str, nodes: &str, other: Option<&str>| {
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[2, 2] x, {inputs}) => (float y) <{tensors}> {{ {nodes} }}"
        );
        let mut model = crate::support::parsed(&text);
        let before = model.graph(model.main()).inputs().len();
        let exact = amax::passes::support::evaluate::Exact;
        let context = amax::passes::Context { freeze_weights: true, ..amax::passes::Context::new(&exact) };
        let outcome = amax::passes::Pass::run(&FreezeInputs, &mut model, &context).unwrap();
        let said: Vec<_> = outcome.skips.iter().map(|note| (note.at.as_str(), note.what.clone())).collect();
        assert_eq!(said, Vec::from_iter(other.map(|name| (name, Reason::InputBesideWeights))), "{inputs}");
        let left = model.graph(model.main()).inputs().len();
        let frozen = other.is_none() && before > 1 && !outcome.changes.is_empty();
        assert_eq!(left, if frozen { 1 } else { before }, "{inputs}");
    };
    let (weight, of_weight) = ("float[2, 2] w", "float[2, 2] w = {1, 2, 3, 4}");
    let beside = |input: &str, tensor: &str, nodes: &str, other: Option<&str>| {
        check(&format!("{weight}, {input}"), &format!("{of_weight}, {tensor}"), nodes, other);
    };
    check(weight, of_weight, "y = MatMul (x, w)", None);
    check(weight, of_weight, "t = Transpose (w) y = MatMul (t, x)", None);
    beside("float[2] b", "float[2] b = {1, 2}", "m = MatMul (x, w) y = Add (m, b)", None);
    beside("int64[2] s", "int64[2] s = {4, 1}", "m = MatMul (x, w) y = Reshape (m, s)", None);
    beside("float f", "float f = {6}", "m = MatMul (x, w) y = Clip (m, f)", None);
    beside("int64[1] a", "int64[1] a = {0}", "m = MatMul (x, w) y = ReduceSum (m, a)", None);
    // A number that may be meant to be given, a size that may vary, what a body starts from, what is returned.
    beside("float f", "float f = {6}", "m = MatMul (x, w) y = Mul (m, f)", Some("f"));
    beside("float[1] f", "float[1] f = {6}", "m = MatMul (x, w) y = Div (m, f)", Some("f"));
    beside("float[N] f", "float[2] f = {6, 7}", "m = MatMul (x, w) y = Add (m, f)", Some("f"));
    let state = ("float[1, 2, 2] s", "float[1, 2, 2] s = {1, 2, 3, 4}");
    beside(state.0, state.1, "y, h = LSTM <hidden_size = 2> (x, w, w, , , s)", Some("s"));
    // Nothing of a weight among them: there is nothing to say.
    check("float f", "float f = {6}", "y = Mul (x, f)", None);
}

fn freeze(model: &mut Model) -> amax::passes::Outcome {
    let context = amax::passes::Context::new(&amax::passes::support::evaluate::Exact);
    amax::passes::Pass::run(&FreezeInputs, model, &context).unwrap()
}
