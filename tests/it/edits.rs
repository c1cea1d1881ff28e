//! Edits of models, whatever their order: the model stays valid, and computes what it did.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::fs;

use amax::ir::{Model, NewNode, Place, Tensor, User, ValueId, content_hash, file, text, verify};
use amax::onnx::{DataType, GraphProto, ModelProto};
use proptest::prelude::*;
use proptest::sample::Index;
use prost::Message;

use crate::file::SEEDS;
use crate::support::folder;

/// Every node has the shape of `x`, so any value may take the place of any other; bodies read values from outside.
const NET: &str = r#"<ir_version: 10, opset_import: ["" : 21]>
g (float[2] x, float[2] y) => (float[2] p, float[2] q) <float[2] w = {0.5, -3}, float[2] v = {7, 0.25}, bool yes = {1}> {
  a = Add (x, w)
  b = Mul (a, y)
  c = Neg (b)
  d = If (yes) <
    then_branch = t () => (float[2] t2) { t1 = Sub (a, c) t2 = Max (t1, v) },
    else_branch = e () => (float[2] e1) { e1 = Neg (x) }
  >
  p = Relu (d)
  q = Sub (c, d)
  unused = Mul (q, w)
}"#;

/// The values of float tensors that a node at the end of the main graph may use.
fn visible(model: &Model) -> Vec<ValueId> {
    let graph = model.graph(model.main());
    let outputs = graph.nodes().iter().flat_map(|&n| model.node(n).outputs().iter().flatten().copied());
    let inputs = graph.inputs().chain(graph.initializers().iter().copied());
    let mut values: Vec<_> = inputs.chain(outputs).collect();
    values.sort_unstable();
    values.dedup();
    values
}

/// Whether two values are known to be tensors of one type and shape.
fn alike(model: &Model, a: ValueId, b: ValueId) -> bool {
    let kind = |v| Some((model.dtype(v)?, model.shape(v)?));
    kind(a).is_some() && kind(a) == kind(b)
}

/// Whether the model computes what it did.
fn edit(model: &mut Model, kind: u8, a: Index, b: Index) -> bool {
    let main = model.main();
    let values = visible(model);
    if values.is_empty() {
        return true;
    }
    let value = values[a.index(values.len())];
    let users = model.value(value).users().to_vec();
    let one = users.get(b.index(users.len().max(1))).copied();
    let behind = model.producer(value).map_or(Place::First(main), Place::After);
    let typed = |model: &mut Model, to: ValueId| {
        if let Some(ty) = model.value(value).ty().cloned() {
            model.set_type(to, ty);
        }
    };
    match kind {
        // An identity behind a value, for all of its users or for one.
        0 | 1 => {
            let node = model.insert(behind, NewNode::new("Identity", "edit", &[value], &["edit_out"]));
            let to = model.node(node).output(0).unwrap();
            typed(model, to);
            let own = |user: User| user == User::Node { node, input: 0 };
            model.replace_uses(value, to, |user| !own(user) && (kind == 0 || Some(user) == one));
        }
        2 => {
            model.add_initializer(main, "edit_w", Tensor::from_f32(&[2], &[1.0, 2.0]));
        }
        3 => model.rename(value, "edit_name"),
        4 => {
            let unused = model.graph(main).nodes().iter().copied();
            let unused: Vec<_> = unused
                .filter(|&n| model.node(n).outputs().iter().flatten().all(|&v| model.value(v).users().is_empty()))
                .collect();
            if !unused.is_empty() {
                model.remove(&[unused[a.index(unused.len())]]);
            }
        }
        5 => model.retain_initializers(main, |m, v| !m.value(v).users().is_empty()),
        // One use of another value that is always visible.
        6 => {
            let graph = model.graph(main);
            let mut always: Vec<_> = graph.inputs().chain(graph.initializers().iter().copied()).collect();
            always.retain(|&other| alike(model, value, other));
            if let (Some(user), false) = (one, always.is_empty()) {
                model.set_user(user, always[b.index(always.len())]);
                return false;
            }
        }
        // Negated twice, under the old name.
        7 if model.dtype(value) == Some(DataType::Float) => {
            let first = model.insert(behind, NewNode::new("Neg", "edit", &[value], &["edit_neg"]));
            let between = model.node(first).output(0).unwrap();
            let second = model.insert(Place::After(first), NewNode::new("Neg", "edit", &[between], &["edit_back"]));
            let back = model.node(second).output(0).unwrap();
            typed(model, between);
            typed(model, back);
            model.replace_uses(value, back, |user| user != User::Node { node: first, input: 0 });
            model.take_name(value, back, "edit_was");
        }
        7 => {}
        _ => model.add_output(main, value),
    }
    true
}

type Scope = BTreeMap<String, [f32; 2]>;

/// What a graph gives, read off its file alone; panics at a name that is not there yet, or twice.
fn outputs_of(graph: &GraphProto, mut scope: Scope) -> Vec<[f32; 2]> {
    let define = |scope: &mut Scope, name: &str, value| {
        assert_eq!(scope.insert(name.to_owned(), value), None, "{name} is there twice");
    };
    for tensor in &graph.initializer {
        let bytes = tensor.raw_data.as_deref().unwrap_or_default();
        let raw = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let values: Vec<f32> = if bytes.len() < 8 { tensor.float_data.clone() } else { raw.collect() };
        // The condition is a bool.
        define(
            &mut scope,
            tensor.name(),
            [values.first().copied().unwrap_or(1.0), values.get(1).copied().unwrap_or(1.0)],
        );
    }
    for node in &graph.node {
        let inputs: Vec<[f32; 2]> = node.input.iter().map(|name| scope[name]).collect();
        let one = |f: fn(f32) -> f32| inputs[0].map(f);
        let two = |f: fn(f32, f32) -> f32| [0, 1].map(|i| f(inputs[0][i], inputs[1][i]));
        let value = match node.op_type() {
            "Identity" => inputs[0],
            "Neg" => one(|x| -x),
            "Relu" => one(|x| x.max(0.0)),
            "Add" => two(|x, y| x + y),
            "Sub" => two(|x, y| x - y),
            "Mul" => two(|x, y| x * y),
            "Max" => two(f32::max),
            "If" => outputs_of(node.attribute[0].g.as_ref().unwrap(), scope.clone())[0],
            other => panic!("{other}"),
        };
        define(&mut scope, &node.output[0], value);
    }
    graph.output.iter().map(|output| scope[output.name()]).collect()
}

fn computed(model: &Model) -> Vec<[f32; 2]> {
    let proto = ModelProto::decode(file::to_bytes(model).unwrap().as_slice()).unwrap();
    let graph = proto.graph.unwrap();
    let initialized = |name: &str| graph.initializer.iter().any(|t| t.name() == name);
    let inputs = graph.input.iter().map(amax::onnx::ValueInfoProto::name).filter(|name| !initialized(name));
    let scope = inputs.zip([[1.5, -2.0], [-0.75, 4.0]]).map(|(name, value)| (name.to_owned(), value)).collect();
    outputs_of(&graph, scope)
}

/// What was edited is the same after it was written.
fn check_file(model: &Model) {
    let written = file::to_bytes(model).unwrap();
    assert_eq!(content_hash(&file::from_bytes(written.clone()).unwrap()), content_hash(model));
    let folder = folder();
    let path = folder.path().join("m.onnx");
    file::save(model, &path).unwrap();
    assert!(fs::read(&path).unwrap() == written);
}

fn edits() -> impl Strategy<Value = Vec<(u8, Index, Index)>> {
    prop::collection::vec((0..9u8, any::<Index>(), any::<Index>()), 1..20)
}

proptest! {
    #![proptest_config(crate::random_cases(200))]

    #[test]
    fn edits_keep_any_model_valid(seed in any::<Index>(), edits in edits()) {
        let mut model = file::from_bytes(SEEDS[seed.index(SEEDS.len())].clone()).unwrap();
        if model.opset().is_none() {
            model.set_domain_version("", 21);
        }
        for (kind, a, b) in edits {
            edit(&mut model, kind, a, b);
            prop_assert_eq!(verify::violations(&model), Vec::<String>::new(), "after edit {}", kind);
        }
        check_file(&model);
    }

    #[test]
    fn edits_keep_what_a_model_computes(edits in edits()) {
        let mut model = text::parse(NET).unwrap();
        let mut before = computed(&model);
        prop_assert_eq!(&before, &[[7.0, 0.25], [-5.5, 19.75]]);
        for (kind, a, b) in edits {
            let same = edit(&mut model, kind, a, b);
            prop_assert_eq!(verify::violations(&model), Vec::<String>::new(), "after edit {}", kind);
            let after = computed(&model);
            if same {
                prop_assert_eq!(&after[..before.len()], &before, "after edit {}", kind);
            }
            before = after;
        }
        check_file(&model);
    }
}
