//! Time of what works on the structure of a model, at one size and at four times that: what is linear takes four times as long,
//! what is quadratic sixteen times.
//!
//!     cargo bench --profile dev --bench structure [NODES]

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints")]

use std::fmt::Write as _;
use std::time::Instant;

use amax::config::Config;
use amax::config::rules::Rules;
use amax::config::spec::SiteKind;
use amax::ir::{Model, NewNode, NodeId, Place, Tensor, file, text};
use amax::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto};
use amax::passes::recipes::PREPARE;
use amax::passes::support::evaluate::Exact;
use amax::passes::{Context, pipeline};
use amax::targets::Target;
use prost::Message;

const HEAD: &str = "<ir_version: 8, opset_import: [\"\" : 17]>\n";

/// Seconds that work takes on what was made for it; the best of three.
fn seconds<T>(make: impl Fn() -> T, work: impl Fn(T)) -> f64 {
    let once = || {
        let made = make();
        let begun = Instant::now();
        work(made);
        begun.elapsed().as_secs_f64()
    };
    (0..3).map(|_| once()).fold(f64::INFINITY, f64::min)
}

fn report<T>(what: &str, count: usize, make: impl Fn(usize) -> T, work: impl Fn(T)) {
    let [one, four] = [count, 4 * count].map(|count| seconds(|| make(count), &work));
    println!("{what:<28} {:>8.1} ms {:>8.1} ms {:>6.1} times", one * 1e3, four * 1e3, four / one);
}

/// Relus, in the order that `names` gives: each reads what the first name says and makes what the second does.
fn file_of(names: impl Iterator<Item = (String, String)>, output: String) -> Vec<u8> {
    let info = |name: String| ValueInfoProto { name: Some(name), ..ValueInfoProto::default() };
    let node = |(input, output): (String, String)| NodeProto {
        op_type: Some("Relu".to_owned()),
        input: vec![input],
        output: vec![output],
        ..NodeProto::default()
    };
    let graph = GraphProto {
        name: Some("g".to_owned()),
        node: names.map(node).collect(),
        input: vec![info("v0".to_owned())],
        output: vec![info(output)],
        ..GraphProto::default()
    };
    let model = ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(21) }],
        graph: Some(graph),
        ..ModelProto::default()
    };
    model.encode_to_vec()
}

fn link(i: usize) -> (String, String) {
    (format!("v{i}"), format!("v{}", i + 1))
}

fn wide(count: usize) -> Model {
    let names = (1..=count).map(|i| ("v0".to_owned(), format!("v{i}")));
    file::from_bytes(file_of(names, "v1".to_owned())).unwrap()
}

/// Takes uses, and puts in and takes out nodes.
fn edit(mut model: Model) {
    let main = model.main();
    let x = model.value_named("v0").unwrap();
    let other = model.add_initializer(main, "other", Tensor::from_f32(&[1], &[0.0]));
    model.replace_uses(x, other, |_| true);
    let users: Vec<NodeId> = model.graph(main).nodes().to_vec();
    for &node in users.iter().step_by(10) {
        model.insert(Place::Before(node), NewNode::new("Neg", "", &[x], &["n"]));
    }
    model.remove(&users[1..]);
}

/// Products with weights of their own.
fn products(count: usize) -> String {
    let (mut nodes, mut weights) = (String::new(), Vec::new());
    for i in 0..count {
        writeln!(nodes, "[\"/layer.{i}/MatMul\"] v{} = MatMul (v{i}, w{i})", i + 1).unwrap();
        weights.push(format!("float[4,4] w{i} = ..."));
    }
    format!("{HEAD}g (float[4,4] v0) => (float[4,4] v{count}) <{}> {{{nodes}}}", weights.join(","))
}

/// Convolutions, each with its parameters in `Constant` nodes and a `BatchNormalization`: seven nodes each.
fn convolutions(count: usize) -> Model {
    let mut text = format!("{HEAD}g (float[1,2,4] x0) => (float[1,2,4] x{count}) {{\n");
    for i in 0..count {
        writeln!(text, "w{i} = Constant <value = float[2,2,1] {{0, 1, 1, 0}}> ()").unwrap();
        for parameter in ["s", "b", "m", "v"] {
            writeln!(text, "{parameter}{i} = Constant <value = float[2] {{1, 2}}> ()").unwrap();
        }
        writeln!(text, "c{i} = Conv (x{i}, w{i})").unwrap();
        writeln!(text, "x{} = BatchNormalization (c{i}, s{i}, b{i}, m{i}, v{i})", i + 1).unwrap();
    }
    text::parse(&(text + "}")).unwrap()
}

fn prepare(mut model: Model) {
    let context = Context::new(&Exact);
    let mut go_on = |_: &Model, _: &str, _: &_| Ok(std::ops::ControlFlow::Continue(()));
    let _ = pipeline::run(&mut model, &PREPARE.passes(), &context, &mut go_on).unwrap();
}

/// What 30 rules say of each site.
fn resolve(count: usize) {
    let mut text = String::from("preset = \"INT8_DEFAULT_CFG\"\nexclude = [\"*lm_head*\", \"re:/norm/\"]\n");
    for layer in 0..24 {
        writeln!(text, "[[layer]]\nmatch = \"/layers.{layer}/*\"\noptional = true\nweight = {{ eps = {layer}.5 }}")
            .unwrap();
    }
    let config = Config::parse(&text).unwrap();
    let rules = Rules::new(&Target::load("ort-cpu").unwrap(), &config).unwrap();
    for node in 0..count {
        let name = format!("/layers.{}/q_proj_{node}/MatMul", node % 30);
        for kind in SiteKind::ALL {
            std::hint::black_box(rules.site(&name, "MatMul", kind, false));
        }
    }
}

fn main() {
    let count = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(10_000);
    println!("{:<28} {count:>8} n. {:>8} n.", "", 4 * count);
    let load = |bytes: Vec<u8>| drop(std::hint::black_box(file::from_bytes(bytes)));
    report("load a chain", count, |n| file_of((0..n).map(link), format!("v{n}")), load);
    report("load a chain backwards", count, |n| file_of((0..n).rev().map(link), format!("v{n}")), load);
    let around = |n: usize| move |i: usize| if i == 0 { (format!("v{n}"), "v1".to_owned()) } else { link(i) };
    report("find a cycle", count, |n| file_of((0..n).map(around(n)), format!("v{n}")), load);
    report("edit", count, wide, edit);
    report("parse a text", count, products, |text| drop(std::hint::black_box(text::parse_with_fill(&text).unwrap())));
    let model = |n| text::parse_with_fill(&products(n)).unwrap();
    report("print a text", count, model, |model| drop(std::hint::black_box(text::print(&model))));
    report("prepare, 7 nodes a layer", count / 7, convolutions, prepare);
    report("resolve 30 rules", count, |n| n, resolve);
}
