//! Smoothing: the search against numpy, divided models against the float ones, and from samples to the file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fmt::Write as _;
use std::sync::Arc;

use amax::config::Config;
use amax::ir::{Model, Tensor, file};
use amax::observe::Run;
use amax::observe::rows::rows;
use amax::passes::smooth::{Smooth, divided};
use amax::plan::smoothing::candidates;
use amax::plan::{Divided, Knowledge, Plan, Slot, Smoothing, plan};
use amax::quant::algorithm::{Algorithm, Method};
use amax::reason::Reason;
use amax::rewrite::{Rewrite, Rewritten};
use amax::runtime::{Observe, Session};
use amax::samples::SampleSet;
use amax::solve::Solution;
use amax::solve::smoothing::{Seen, search};
use amax::statistics::Range;
use amax::targets::Target;
use ndarray::{Array2, Array3, Array4, Axis};
use serde_json::json;

use crate::segments::noise;
use crate::support::{numbers, parsed, pass, vectors};

const AWQ: &str = "default.input.enable=false default.weight.dtype=int4 default.weight.symmetric=true \
                   default.weight.narrow_range=true default.weight.granularity=per-group";

fn config(words: &str) -> Config {
    let mut config = Config::default();
    words.split_whitespace().for_each(|word| config.set(word).unwrap());
    config
}

/// What rows show, all of them for the search and for its proof.
fn seen(rows: &Array2<f32>) -> Seen {
    let range = |column: ndarray::ArrayView1<'_, f32>| {
        column
            .iter()
            .fold(Range { min: f32::INFINITY, max: f32::NEG_INFINITY }, |all, &x| all.union(Range { min: x, max: x }))
    };
    let mean = |column: ndarray::ArrayView1<'_, f32>| {
        column.iter().map(|&x| f64::from(x.abs())).sum::<f64>() / column.len() as f64
    };
    Seen {
        rows: rows.clone(),
        held_out: rows.clone(),
        ranges: rows.axis_iter(Axis(1)).map(range).collect(),
        means: rows.axis_iter(Axis(1)).map(mean).collect(),
    }
}

#[test]
fn curves_and_divisors_are_those_of_the_definitions() {
    for case in vectors("smooth.json").as_array().unwrap() {
        let count = |key: &str| usize::try_from(case[key].as_u64().unwrap()).unwrap();
        let (columns, outputs, name) = (count("columns"), count("outputs"), &case["name"]);
        let rows = numbers(&case["rows"]);
        let rows = Array2::from_shape_vec((rows.len() / columns, columns), rows).unwrap();
        let model = parsed(&format!(
            "<ir_version: 8, opset_import: [\"\" : 21]>\n\
             g (float[n, {columns}] x) => (float[n, {outputs}] y) <{}> {{\n\
             y = Gemm <transB = 1> (x, w)\n}}",
            written("w", &[outputs, columns], &numbers(&case["weight"]))
        ));
        let float = case["method"] == "awq_lite";
        let (method, config) = match case["group"].as_u64() {
            None => (Method::SmoothQuant, Config::default()),
            Some(group) => (Method::AwqLite, config(&format!("{AWQ} default.weight.group_size={group}"))),
        };
        let target = Target::load(if float { "generic" } else { "ort-cpu-vnni" }).unwrap();
        let knowledge = Knowledge { calibrated: true, ..Knowledge::default() };
        let plan = plan(&model, &config, &target, &knowledge).unwrap();
        let found = candidates(&model, &plan, float);
        let [candidate] = found.as_slice() else { panic!("{name}: {found:?}") };
        let algorithm = Algorithm { alpha_step: float.then_some(0.1), ..Algorithm::new(method) };
        let found = search(&model, &plan.weights, candidate, &seen(&rows), &algorithm, true).unwrap().unwrap();
        let wanted = case["curve"].as_array().unwrap();
        assert_eq!(found.curve.len(), wanted.len(), "{name}");
        for ((alpha, error), wanted) in found.curve.iter().zip(wanted) {
            let wanted = wanted.as_f64().unwrap();
            // In float32 a few values fall to the other side of a tie.
            assert!((error - wanted).abs() < 5e-3 * wanted, "{name}: {error} instead of {wanted} at {alpha}");
        }
        assert!((found.alpha - case["alpha"].as_f64().unwrap()).abs() < 1e-9, "{name}: {}", found.alpha);
        for (divisor, wanted) in found.scales.iter().zip(numbers(&case["divisors"])) {
            assert!((divisor - wanted).abs() <= 1e-5 * wanted, "{name}: {divisor} instead of {wanted}");
        }
        let gain =
            10.0 * (case["plain"].as_f64().unwrap() / found.curve.iter().map(|c| c.1).fold(f64::MAX, f64::min)).log10();
        assert!((found.after_db - found.before_db - gain).abs() < 0.05, "{name}: {found:?}");
    }
}

/// An initializer of numbers that look random, as text.
fn constant(name: &str, dims: &[usize], seed: usize) -> String {
    written(name, dims, &noise(seed, dims.iter().product()))
}

/// An initializer as text.
fn written(name: &str, dims: &[usize], values: &[f32]) -> String {
    let [dims, values] = [format!("{dims:?}"), format!("{values:?}")];
    let inner = |list: &str| list[1..list.len() - 1].to_owned();
    format!("float[{}] {name} = {{{}}}", inner(&dims), inner(&values))
}

/// What a model makes of one sample.
fn outputs(model: &Model, x: &[f32], dims: &[usize]) -> Vec<f32> {
    struct Blind;
    impl Observe for Blind {
        fn see(&self, _: usize, _: &[f32], _: &[usize]) {}
    }
    let session = Session::new(model, &[]).unwrap();
    let blind: Arc<dyn Observe> = Arc::new(Blind);
    let made = session.run(&[("x".to_owned(), Tensor::from_f32(dims, x))].into(), &blind).unwrap();
    made.iter().flat_map(|(_, tensor)| tensor.to_f32().unwrap()).collect()
}

/// Divides `t` by numbers from a tenth to 20 for its readers, and compares what the models compute. `Some(n)`: it is divided
/// where it is made, with so many tensors in between and itself; `None`: by a Mul.
#[track_caller]
fn check(name: &str, nodes: &str, constants: &[(&str, &[usize])], readers: &[&str], wanted: Option<usize>) {
    let mut text = "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[2, 3, 4] x) => (".to_owned();
    let outputs_of = nodes.split_whitespace().filter(|word| word.starts_with("out")).collect::<Vec<_>>();
    let ports: Vec<String> = outputs_of.iter().map(|name| format!("float[2, 3, n_{name}] {name}")).collect();
    let initializers = constants.iter().enumerate().map(|(at, (name, dims))| constant(name, dims, at));
    let initializers = initializers.collect::<Vec<_>>().join(", ");
    let _ = write!(text, "{}) <{initializers}> {{\n{nodes}\n}}", ports.join(", "));
    let model = parsed(&text);
    let readers: Vec<Slot> = readers.iter().map(|node| Slot { node: (*node).to_owned(), input: 0 }).collect();
    let (tensor, method) = ("t".to_owned(), Method::SmoothQuant);
    let mut smoothing = Smoothing { tensor, readers, method, alpha: 0.5, divided: Divided::Producer };
    let found = divided(&model, &smoothing).unwrap();
    assert_eq!(found.as_ref().map(Vec::len), wanted, "{name}: {found:?}");
    let x = noise(99, 24);
    let before = outputs(&model, &x, &[2, 3, 4]);
    let columns = constants.iter().find(|(name, _)| *name == "w").map_or(4, |(_, dims)| dims[0]);
    let scales: Vec<f32> = (0..columns).map(|at| [0.1, 20.0, 1.0, 3.5][at % 4]).collect();
    for place in wanted.map_or(vec![Divided::Mul], |_| vec![Divided::Producer, Divided::Mul]) {
        smoothing.divided = place;
        let plan = json!({
            "schema": amax::plan::SCHEMA, "target": "ort-cpu", "opset": 17, "smoothing": [smoothing],
            "activations": {}, "weights": [], "biases": [], "skipped": [],
        });
        let plan: Plan = serde_json::from_value(plan).unwrap();
        let solution = Solution { smoothing: vec![scales.clone()], ..Solution::default() };
        let mut changed = model.clone();
        pass(&mut changed, &[&Smooth], Some((&plan, &solution))).unwrap();
        let count = |model: &Model| model.graph(model.main()).nodes().len();
        assert_eq!(count(&changed) - count(&model), usize::from(place == Divided::Mul), "{name}");
        let after = outputs(&changed, &x, &[2, 3, 4]);
        let largest = before.iter().fold(0f32, |most, y| most.max(y.abs()));
        assert!(largest > 0.0 && before.len() == after.len(), "{name}");
        let off = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(off <= 1e-5 * largest, "{name}, {place:?}: {off} of {largest}");
        let t = outputs(&observing(&changed, "t"), &x, &[2, 3, 4]);
        let t_before = outputs(&observing(&model, "t"), &x, &[2, 3, 4]);
        assert_eq!(t != t_before, place == Divided::Producer, "{name}");
    }
}

/// The model with a tensor as its one output.
fn observing(model: &Model, tensor: &str) -> Model {
    let mut model = model.clone();
    let (main, value) = (model.main(), model.value_named(tensor).unwrap());
    let copy = amax::ir::NewNode::new("Identity", "", &[value], &["copy"]);
    let copy = model.insert(amax::ir::Place::Last(main), copy);
    let copy = model.node(copy).output(0).unwrap();
    for index in 0..model.graph(main).outputs().count() {
        model.set_user(amax::ir::User::Output { graph: main, index }, copy);
    }
    model
}

#[test]
fn divided_models_compute_the_same() {
    let norm = "t = LayerNormalization (x, g, b)\n";
    let product = "outy = MatMul (t, w)";
    let with = |front: &str| front.to_owned() + product;
    let w: (&str, &[usize]) = ("w", &[4, 5]);
    let g: (&str, &[usize]) = ("g", &[4]);
    let b: (&str, &[usize]) = ("b", &[4]);
    check("a normalization", &with(norm), &[w, g, b], &["outy"], Some(1));
    check("without a shift", &with("t = LayerNormalization (x, g)\n"), &[w, g], &["outy"], Some(1));
    check(
        "a normalization that something else reads",
        &(with(norm) + "\noutz = Relu (t)"),
        &[w, g, b],
        &["outy"],
        None,
    );
    check("of which the output is one", &(with(norm) + "\noutz = Identity (t)"), &[w, g, b], &["outy"], None);
    let two = with(norm) + "\noutz = MatMul (t, v)";
    check("two products", &two, &[w, g, b, ("v", &[4, 3])], &["outy", "outz"], Some(1));
    check("one of two products", &two, &[w, g, b, ("v", &[4, 3])], &["outy"], None);
    let shared = with(norm) + "\noutz = MatMul (t, w)";
    check("one weight twice", &shared, &[w, g, b], &["outy", "outz"], Some(1));
    let decomposed = "c = Sub (x, m)\nd = Mul (c, g)\nt = Add (d, b)\n";
    check("a shift and a factor", &with(decomposed), &[w, g, b, ("m", &[1])], &["outy"], Some(2));
    check("a number for all", &with("t = Mul (m, x)\n"), &[w, ("m", &[1])], &["outy"], Some(1));
    check("a divisor", &with("t = Div (x, g)\n"), &[w, g], &["outy"], Some(1));
    check("a sum alone", &with("t = Add (x, b)\n"), &[w, b], &["outy"], None);
    let v: (&str, &[usize]) = ("v", &[4, 4]);
    check("a product", &with("t = MatMul (x, v)\n"), &[w, v], &["outy"], Some(1));
    let linear = "a = MatMul (x, v)\nc = Add (a, b)\nt = Relu (c)\n";
    check("a layer", &with(linear), &[w, v, b], &["outy"], Some(3));
    let shared = "a = MatMul (x, v)\nt = Relu (a)\nd = MatMul (x, v)\noutz = Sigmoid (d)\n";
    check("a layer whose weight another one has", &with(shared), &[w, v], &["outy"], Some(2));
    check("what is no multiple", &with("a = MatMul (x, v)\nt = Sigmoid (a)\n"), &[w, v], &["outy"], None);
    let gated = "a = MatMul (x, v)\ns = Sigmoid (a)\nu = MatMul (x, v2)\nt = Mul (s, u)\n";
    check("a gate", &with(gated), &[w, v, ("v2", &[4, 4])], &["outy"], Some(2));
    let turned = "a = MatMul (x, v)\ns = Sigmoid (a)\nu = MatMul (x, v2)\nt = Mul (u, s)\n";
    check("a gate on the right", &with(turned), &[w, v, ("v2", &[4, 4])], &["outy"], Some(2));
    check("an input", "t = Identity (x)\nouty = MatMul (t, w)", &[w], &["outy"], None);
}

/// Two layers: the first input is made by a normalization for it alone, the second is read by a sum as well.
fn two_layers() -> Model {
    let mut gains = vec![1.0; 32];
    (gains[3], gains[7], gains[20]) = (60.0, -40.0, 15.0);
    let constants = [
        written("g1", &[32], &gains),
        written("g2", &[32], &gains),
        constant("w1", &[32, 32], 1),
        constant("w2", &[32, 48], 2),
        constant("w3", &[48, 32], 3),
    ];
    parsed(&format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[1, s, 32] x) => (float[1, s, 32] y) <{}> {{\n\
         t1 = LayerNormalization (x, g1)\nh = MatMul (t1, w1)\nr = Add (h, x)\nt2 = LayerNormalization (r, g2)\n\
         k = MatMul (t2, w2)\ns = Sigmoid (k)\nm = MatMul (s, w3)\ny = Add (m, t2)\n}}",
        constants.join(", ")
    ))
}

/// One product of the input, which makes little of one channel.
fn one_product() -> Model {
    let mut weight = noise(1, 32 * 24);
    weight[3 * 24..4 * 24].iter_mut().for_each(|w| *w /= 300.0);
    parsed(&format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[1, s, 32] x) => (float[1, s, 24] y) <{}> {{\n\
         y = MatMul (x, w)\n}}",
        written("w", &[32, 24], &weight)
    ))
}

fn samples(model: &Model, count: usize, change: impl Fn(&mut [f32])) -> SampleSet {
    let mut values = noise(7, count * 12 * 32);
    change(&mut values);
    let values = Array4::from_shape_vec((count, 1, 12, 32), values).unwrap();
    SampleSet::from_arrays(model, [("x", values.into())]).unwrap()
}

fn rewrite(model: &Model, samples: &SampleSet, words: &str, threads: usize) -> Rewritten {
    let config = config(words);
    Rewrite::new(model).config(&config).samples(samples).threads(threads).run().unwrap_or_else(|e| panic!("{e}"))
}

fn bytes(done: &Rewritten) -> Vec<u8> {
    file::to_bytes(&done.model).unwrap()
}

fn worst(done: &Rewritten) -> f64 {
    done.report.quality.iter().filter_map(amax::report::QualityRow::sqnr_db).fold(f64::INFINITY, f64::min)
}

#[test]
fn inputs_are_divided_where_they_are_made_or_by_a_mul() {
    let model = two_layers();
    let samples = samples(&model, 32, |_| ());
    let plain = rewrite(&model, &samples, "algorithm=none guard.enabled=false", 2);
    let done = rewrite(&model, &samples, "preset=int8-smooth guard.enabled=false", 2);
    let rows: Vec<_> = done.report.smoothing.iter().map(|row| (row.tensor.as_str(), row.done.as_ref())).collect();
    let found = |tensor: &str| rows.iter().find(|(name, _)| *name == tensor).and_then(|(_, done)| *done).unwrap();
    assert_eq!(found("t1").divided, Divided::Producer, "{rows:?}");
    assert_eq!(found("t2").divided, Divided::Mul, "{rows:?}");
    for done in [found("t1"), found("t2")] {
        assert!(done.after_db.unwrap() > done.before_db.unwrap() + 3.0, "{done:?}");
    }
    assert!(worst(&done) > worst(&plain) + 3.0, "{} beside {}", worst(&done), worst(&plain));
    let count = |done: &Rewritten, op: &str| {
        let graph = done.model.graph(done.model.main());
        graph.nodes().iter().filter(|&&node| done.model.node(node).is(op)).count()
    };
    assert_eq!((count(&done, "Mul"), count(&plain, "Mul")), (1, 0));

    assert_eq!(bytes(&done), bytes(&rewrite(&model, &samples, "preset=int8-smooth guard.enabled=false", 1)));
    let plan = done.plan.clone().unwrap();
    assert_eq!(Plan::parse(&plan.to_json().unwrap()).unwrap(), plan);
    let config = config("guard.enabled=false");
    let again = Rewrite::new(&model).config(&config).samples(&samples).plan(&plan).run().unwrap();
    assert_eq!(bytes(&done), bytes(&again));
    let prepared = Rewrite::new(&model).config(&config).samples(&samples).plan(&plan).prepare().unwrap();
    assert_eq!(count(&prepared, "Mul"), 1);
    let error = Rewrite::new(&model).config(&config).plan(&plan).run().unwrap_err();
    assert!(error.to_string().contains("smooths inputs"), "{error}");
}

/// A row of each sample in which one channel is large: the range of all serves the others badly.
fn rare(values: &mut [f32]) {
    values.chunks_exact_mut(32).step_by(10).for_each(|row| row[3] *= 300.0);
}

#[test]
fn by_default_inputs_are_divided_that_a_range_serves_badly() {
    let model = one_product();
    let samples = samples(&model, 32, rare);
    let done = rewrite(&model, &samples, "", 2);
    let [row] = done.report.smoothing.as_slice() else { panic!("{:?}", done.report.smoothing) };
    assert!(row.done.is_some(), "{row:?}");
    assert!(done.report.activations.iter().all(|a| a.mode == "static"), "{:?}", done.report.activations);
    let off = rewrite(&model, &samples, "algorithm=none", 2);
    assert!(off.report.smoothing.is_empty() && off.report.activations.iter().all(|a| a.mode != "static"));
    assert_eq!(bytes(&done), bytes(&rewrite(&model, &samples, "algorithm=smoothquant", 1)));
}

/// Samples that cannot tell, or that have nothing to gain from: the file is the one without smoothing.
#[test]
fn what_does_not_gain_is_left_alone() {
    let model = one_product();
    let check = |count: usize, change: fn(&mut [f32]), why: fn(&Reason) -> bool| {
        let samples = samples(&model, count, change);
        let done = rewrite(&model, &samples, "algorithm=smoothquant", 2);
        let off = rewrite(&model, &samples, "algorithm=none", 2);
        assert_eq!(bytes(&done), bytes(&off), "{:?}", done.report.smoothing);
        let refused = done.report.smoothing.iter().any(|row| row.done.is_none() && row.why.as_ref().is_some_and(why));
        let warned = done.report.warnings.iter().any(|warning| warning.contains("nothing is smoothed"));
        assert!(refused || warned, "{:?}", done.report.smoothing);
    };
    check(1, rare, |why| matches!(why, Reason::TooFewRows { rows: 3, .. }));
    check(24, |_| (), |why| matches!(why, Reason::SmoothedInVain { .. }));
    check(24, |values| values.fill(0.0), |why| matches!(why, Reason::SmoothedInVain { .. }));
    check(24, |values| values[5000] = f32::NAN, |_| false);

    let samples = samples(&model, 24, rare);
    let without = Rewrite::new(&model).config(&config("algorithm=smoothquant")).run().unwrap();
    assert!(
        without.report.warnings.iter().any(|w| w.contains("smoothquant needs samples")),
        "{:?}",
        without.report.warnings
    );
    assert_eq!(bytes(&without), bytes(&Rewrite::new(&model).run().unwrap()));
    let fixed = rewrite(&model, &samples, "algorithm.method=smoothquant algorithm.alpha=0.65", 2);
    let [row] = fixed.report.smoothing.as_slice() else { panic!("{:?}", fixed.report.smoothing) };
    assert!(row.done.as_ref().is_some_and(|done| (done.alpha - 0.65).abs() < 1e-9), "{row:?}");
}

/// What gains at a product on the samples that it was searched with, and loses at the outputs on those that were held out.
#[test]
fn what_makes_outputs_worse_is_undone() {
    let model = one_product();
    let samples = samples(&model, 32, |values| {
        rare(values);
        // Every eighth sample is held out; in these the other channels fill the range that channel 3 asks for.
        for sample in values.chunks_exact_mut(12 * 32).skip(7).step_by(8) {
            for row in sample.chunks_exact_mut(32) {
                for x in row.iter_mut() {
                    *x *= 50.0;
                }
                row[3] = 0.0;
            }
        }
    });
    let done = rewrite(&model, &samples, "guard.enabled=false algorithm=smoothquant", 2);
    let off = rewrite(&model, &samples, "guard.enabled=false algorithm=none", 2);
    assert_eq!(bytes(&done), bytes(&off));
    let [row] = done.report.smoothing.as_slice() else { panic!("{:?}", done.report.smoothing) };
    assert!(matches!(row.why, Some(Reason::OutputsWorse { .. })), "{row:?}");
    assert!(done.report.warnings.iter().any(|w| w.contains("nothing is smoothed")), "{:?}", done.report.warnings);
}

#[test]
fn awq_lite_divides_inputs_of_float_products() {
    let model = two_layers();
    let samples = samples(&model, 32, |_| ());
    let words = "preset=INT4_AWQ_CFG layer.*weight_quantizer.weight.group_size=16";
    let plain = rewrite(&model, &samples, &format!("{words} algorithm=max"), 2);
    let done = rewrite(&model, &samples, words, 2);
    assert!(done.report.smoothing.iter().any(|row| row.done.is_some()), "{:?}", done.report.smoothing);
    assert!(worst(&done) > worst(&plain), "{} beside {}", worst(&done), worst(&plain));
    assert!(done.report.activations.is_empty());
    let full = rewrite(&model, &samples, &format!("{words} algorithm=awq_full"), 2);
    assert!(full.report.smoothing.iter().any(|row| row.done.is_some()), "{:?}", full.report.smoothing);
    let clipped = full.report.weights.iter().filter_map(|w| w.learned.as_ref());
    let clipped: Vec<_> = clipped.filter(|l| l.method == Method::AwqClip && l.fell_back.is_none()).collect();
    assert!(!clipped.is_empty(), "{:?}", full.report.weights);
    assert!(worst(&full) > worst(&plain), "{} beside {}", worst(&full), worst(&plain));
}

/// Rows that a mask takes out are not seen, whatever they hold.
#[test]
fn padding_is_not_seen() {
    let model = parsed(&format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\n\
         g (float[1, s, 32] x, int64[1, s] attention_mask) => (float[1, s, 24] y, int64[1, s] z) <{}> {{\n\
         y = MatMul (x, w)\nz = Identity (attention_mask)\n}}",
        constant("w", &[32, 24], 1)
    ));
    let make = |padding: f32| {
        let mut values = noise(7, 9 * 12 * 32);
        values.chunks_exact_mut(12 * 32).for_each(|sample| sample[7 * 32..].fill(padding));
        let x = Array4::from_shape_vec((9, 1, 12, 32), values).unwrap();
        let mask = Array3::from_shape_fn((9, 1, 12), |(_, _, at)| i64::from(at < 7));
        SampleSet::from_arrays(&model, [("x", x.into()), ("attention_mask", mask.into())]).unwrap()
    };
    let see = |padding: f32, threads: usize, indices: &[usize]| {
        let samples = make(padding);
        let run = Run { threads, ..Run::new(&samples, indices) };
        rows(&model, &["x".to_owned()], run).unwrap().remove("x").unwrap()
    };
    let all: Vec<usize> = (0..9).collect();
    let seen = see(0.0, 1, &all);
    assert_eq!((seen.rows.nrows(), seen.held_out.nrows()), (7 * 7, 2 * 7));
    assert!(seen.ranges.iter().all(|range| range.max < 1.0 && range.min < 0.0));
    for (padding, threads, order) in [(1e9, 1, all.clone()), (f32::NAN, 2, all.iter().rev().copied().collect())] {
        let other = see(padding, threads, &order);
        assert_eq!((&seen.rows, &seen.held_out, &seen.means), (&other.rows, &other.held_out, &other.means));
        assert_eq!(seen.ranges, other.ranges);
    }
}
