//! Block after block: what the driver shows is what the models compute, and what it puts together is what was asked for.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use amax::config::Config;
use amax::error::{Error, Kind};
use amax::ir::text::{PrintOptions, parse, print_with};
use amax::ir::{Model, Tensor};
use amax::observe::blocks::{Block, Blocks, Cut};
use amax::observe::gather::Asked;
use amax::observe::matrices::{MatrixSite, matrix_sites};
use amax::observe::{Memory, Run};
use amax::runtime::segments::{cut, weights};
use amax::runtime::{Observe, Session};
use amax::statistics::MatrixStatistics;

use super::pipeline;
use super::segments::Case;

/// Bits of tensors, by sample and name.
type Bits = BTreeMap<(usize, String), Vec<u32>>;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn cases() -> [(&'static str, Case); 2] {
    let mut cases = [("digits", Case::digits()), ("transformer", Case::transformer(3))];
    // Each block is compiled for each length: a few of them are enough.
    for (_, case) in &mut cases {
        case.indices.truncate(5);
    }
    cases
}

fn run(case: &Case, threads: usize) -> Run<'_> {
    Run { threads, ..Run::new(&case.samples, &case.indices) }
}

/// What a model computes at these tensors, when it runs as a whole.
fn computed(model: &Model, case: &Case, names: &[String]) -> Bits {
    struct Keep(Mutex<Vec<Option<Vec<u32>>>>);
    impl Observe for Keep {
        fn see(&self, site: usize, values: &[f32], _: &[usize]) {
            self.0.lock().unwrap()[site] = Some(bits(values));
        }
    }
    let session = Session::new(model, names).unwrap();
    let mut found = Bits::new();
    for &index in &case.indices {
        let keep = Arc::new(Keep(Mutex::new(vec![None; names.len()])));
        let observe: Arc<dyn Observe> = keep.clone();
        session.run(&case.samples.get(index).unwrap(), &observe).unwrap();
        let kept = std::mem::take(&mut *keep.0.lock().unwrap());
        found.extend(names.iter().zip(kept).filter_map(|(name, bits)| Some(((index, name.clone()), bits?))));
    }
    found
}

/// The float tensors that go into and out of a block.
fn ports(block: &Block<'_>) -> Vec<String> {
    let graph = block.model.graph(block.model.main());
    graph.inputs().chain(graph.outputs()).map(|v| block.model.value(v).name().to_owned()).collect()
}

/// What both streams have at the ports of each block, while `change` changes blocks; and the model that comes of it.
fn walk(blocks: &Blocks<'_>, change: impl Fn(&Block<'_>) -> Option<Model>) -> Result<(Bits, Bits, Model), Error> {
    let (float, changed) = (Mutex::new(Bits::new()), Mutex::new(Bits::new()));
    let model = blocks.walk(|block| {
        let names = ports(block);
        let made = change(block);
        block.observe(made.as_ref(), &names, &|seen| {
            let keep = |into: &Mutex<Bits>, shown: &[Option<ndarray::ArrayD<f32>>]| {
                for (name, array) in names.iter().zip(shown) {
                    let Some(array) = array else { continue };
                    let bits = bits(&array.iter().copied().collect::<Vec<_>>());
                    // A tensor that crosses is seen behind one block and in front of others: the same one.
                    let old = into.lock().unwrap().insert((seen.sample, name.clone()), bits.clone());
                    assert!(old.is_none_or(|old| old == bits), "{name} changed on its way");
                }
            };
            keep(&float, seen.float);
            keep(&changed, seen.changed.unwrap_or(seen.float));
            Ok(())
        })?;
        Ok(made)
    })?;
    Ok((float.into_inner().unwrap(), changed.into_inner().unwrap(), model))
}

fn text(model: &Model) -> String {
    print_with(model, &PrintOptions::portable())
}

/// Those of `shown` that a model computes are what it computes, and its outputs are among them.
fn agree(shown: &Bits, model: &Model, case: &Case, what: &str) {
    let names: Vec<String> = {
        let mut names: Vec<String> = shown.keys().map(|(_, name)| name.clone()).collect();
        names.sort();
        names.dedup();
        names
    };
    let whole = computed(model, case, &names);
    let graph = model.graph(model.main());
    for output in graph.outputs().map(|v| model.value(v).name().to_owned()) {
        assert!(case.indices.iter().all(|&index| shown.contains_key(&(index, output.clone()))), "{what}: {output}");
    }
    for (at, bits) in &whole {
        assert!(shown.get(at) == Some(bits), "{what}: {at:?}");
    }
    assert!(whole.len() >= case.indices.len(), "{what}");
}

#[test]
fn blocks_that_nobody_changes_compute_what_the_model_does() {
    for (name, case) in cases() {
        let total = weights(&case.model);
        for (limit, threads, least) in [(0, 2, 5), (total / 2, 3, 2), (u64::MAX, 1, 1)] {
            let blocks = Blocks { model: &case.model, cut: Cut::Weights(limit), run: run(&case, threads) };
            let what = format!("{name}, blocks of {limit} bytes, {threads} threads");
            assert!(cut(&case.model, limit).len() >= least, "{what}");
            let (float, changed, model) = walk(&blocks, |_| None).unwrap();
            assert!(float == changed, "{what}");
            agree(&float, &case.model, &case, &what);
            assert_eq!(text(&model), text(&case.model), "{what}");
            // Replaced by itself, a block runs in the stream of the changed model.
            let (float, changed, model) = walk(&blocks, |block| Some(block.model.clone())).unwrap();
            assert!(float == changed, "{what}");
            agree(&changed, &case.model, &case, &what);
            assert_eq!(text(&model), text(&case.model), "{what}");
        }
    }
}

#[test]
fn weights_quantized_block_by_block_are_those_of_the_whole_model() {
    // Which other form a product gets depends on what follows it, also in another block.
    let config = Config::parse("default.weight.form = \"qdq\"").unwrap();
    for (name, case) in cases() {
        let quantized = |model: &Model| pipeline::run(model, None, &config, "ort-cpu", 1).model;
        let whole = quantized(&case.model);
        let constants = |model: &Model| -> BTreeMap<String, Tensor> {
            let values = model.graph(model.main()).initializers().iter();
            values.map(|&v| (model.value(v).name().to_owned(), model.constant(v).unwrap().clone())).collect()
        };
        let nodes = |model: &Model| {
            let mut lines: Vec<String> = text(model).lines().map(|line| line.trim().to_owned()).collect();
            lines.retain(|line| line.contains(" = ") && line.contains('('));
            lines.sort();
            lines
        };
        for limit in [0, weights(&case.model) / 3, u64::MAX] {
            let blocks = Blocks { model: &case.model, cut: Cut::Weights(limit), run: run(&case, 2) };
            let (float, changed, model) = walk(&blocks, |block| Some(quantized(&block.model))).unwrap();
            let what = format!("{name}, blocks of {limit} bytes");
            assert_eq!(constants(&model).keys().collect::<Vec<_>>(), constants(&whole).keys().collect::<Vec<_>>());
            for (tensor, wanted) in constants(&whole) {
                let found = &constants(&model)[&tensor];
                assert!((found.dims(), found.raw()) == (wanted.dims(), wanted.raw()), "{what}: {tensor}");
            }
            assert_eq!(nodes(&model), nodes(&whole), "{what}");
            agree(&float, &case.model, &case, &what);
            agree(&changed, &whole, &case, &what);
            assert!(float != changed, "{what}");
        }
    }
}

/// A model whose first matrix with more than one row is twice as large.
fn doubled(model: &Model) -> Option<Model> {
    let mut made = model.clone();
    let values = made.graph(made.main()).initializers().to_vec();
    let of = |v| made.constant(v).filter(|t| t.dims().len() > 1 && t.dtype().is_float());
    let (value, tensor) = values.into_iter().find_map(|v| Some((v, of(v)?.clone())))?;
    let twice: Vec<f32> = tensor.to_f32()?.into_iter().map(|v| v * 2.0).collect();
    made.set_constant(value, Tensor::from_f32(&tensor.dims(), &twice));
    Some(made)
}

/// Doubles the first matrix of one of the blocks that have some.
struct Nth {
    nth: usize,
    passed: AtomicUsize,
}

impl Nth {
    fn new(nth: usize) -> Self {
        Self { nth, passed: AtomicUsize::new(0) }
    }

    fn change(&self, block: &Block<'_>) -> Option<Model> {
        let made = doubled(&block.model)?;
        (self.passed.fetch_add(1, Ordering::Relaxed) == self.nth).then_some(made)
    }
}

#[test]
fn a_block_sees_what_the_blocks_before_it_became() {
    for (name, case) in cases() {
        for at in [0, 1, 3] {
            let blocks = Blocks { model: &case.model, cut: Cut::Weights(0), run: run(&case, 2) };
            let apart = Mutex::new(Vec::new());
            let (only, changes) = (Nth::new(at), Mutex::new(None));
            let change = |block: &Block<'_>| {
                block
                    .observe(None, &ports(block), &|seen| {
                        apart.lock().unwrap().push((block.number, seen.changed.is_some()));
                        Ok(())
                    })
                    .unwrap();
                let made = only.change(block)?;
                assert!(changes.lock().unwrap().replace(block.number).is_none());
                Some(made)
            };
            let (float, changed, model) = walk(&blocks, change).unwrap();
            let what = format!("{name}, matrix {at}");
            agree(&float, &case.model, &case, &what);
            agree(&changed, &model, &case, &what);
            assert!(text(&model) != text(&case.model) && float != changed, "{what}");
            // Up to the change there is one stream, from the next block on there are two.
            let (apart, changes) = (apart.into_inner().unwrap(), changes.into_inner().unwrap().unwrap());
            assert!(apart.iter().all(|(number, two)| !two || *number > changes), "{what}");
            assert!(apart.iter().any(|(number, two)| *two && *number > changes), "{what}");
        }
        // Where it is cut is up to the caller, too.
        let cuts = [3, 1, 7, 1, 10_000];
        let blocks = Blocks { model: &case.model, cut: Cut::Before(&cuts), run: run(&case, 1) };
        let sizes = Mutex::new(Vec::new());
        let (_, changed, model) = walk(&blocks, |block| {
            sizes.lock().unwrap().push(block.model.graph(block.model.main()).nodes().len());
            doubled(&block.model)
        })
        .unwrap();
        let nodes = case.model.graph(case.model.main()).nodes().len();
        assert_eq!(*sizes.lock().unwrap(), [1, 2, 4, nodes - 7], "{name}");
        agree(&changed, &model, &case, name);
    }
}

type Matrices = BTreeMap<String, (MatrixSite, MatrixStatistics)>;

/// The matrices of all products in a model whose blocks `change` changes.
fn matrices(case: &Case, blocks: &Blocks<'_>, change: impl Fn(&Block<'_>) -> Option<Model>) -> Matrices {
    let mut all = Matrices::new();
    blocks
        .walk(|block| {
            let asked = Asked {
                sites: matrix_sites(&block.model),
                most: 100,
                paired: true,
                held_out: &BTreeSet::new(),
                together: 0,
                quantize: &|_, _| {},
            };
            for (site, found) in asked.sites.iter().zip(block.matrices(&asked)?) {
                let of = site.nodes.join(" ");
                if let Some(found) = found?.own {
                    assert!(all.insert(of, (site.clone(), found)).is_none());
                }
            }
            Ok(change(block))
        })
        .unwrap();
    let rows = |found: &MatrixStatistics| found.rows() > 0 && found.samples().len() == blocks.run.indices.len();
    assert!(!all.is_empty() && all.values().all(|(_, found)| rows(found)), "{}", case.indices.len());
    all
}

#[test]
fn matrices_depend_on_neither_threads_nor_shards_nor_segments() {
    for (name, case) in cases() {
        let nothing = |_: &Block<'_>| None;
        let whole = {
            let blocks = Blocks { model: &case.model, cut: Cut::Weights(u64::MAX), run: run(&case, 1) };
            matrices(&case, &blocks, nothing)
        };
        if name == "transformer" {
            let shared = whole.values().filter(|(site, _)| site.nodes.len() == 3).count();
            assert_eq!((shared, whole.len()), (3, 12), "query, key and value share one");
        }
        assert!(whole.values().all(|(_, found)| !found.is_paired()), "{name}");
        let total = weights(&case.model);
        for (limit, threads) in [(0, 1), (0, 3), (total / 2, 2), (u64::MAX, 3)] {
            let folder = tempfile::tempdir().unwrap();
            let memory = Memory { carried: Some(0), folder: Some(folder.path()), ..Memory::default() };
            let run = Run { memory, ..run(&case, threads) };
            let blocks = Blocks { model: &case.model, cut: Cut::Weights(limit), run };
            let found = matrices(&case, &blocks, nothing);
            // Cuts between q, k and v take products of one tensor apart.
            for (site, statistics) in found.values() {
                let (_, wanted) = whole.values().find(|(of, _)| of.tensor == site.tensor).unwrap();
                assert!(statistics == wanted, "{name}, {}, {limit} bytes, {threads} threads", site.tensor);
            }
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
        // Shards, of the model as it is and of one that changes.
        for (what, cut, paired) in [("float", Cut::Weights(u64::MAX), false), ("changed", Cut::Weights(0), true)] {
            let of = |indices: &[usize], threads: usize| {
                let run = Run { indices, threads, ..Run::new(&case.samples, &[]) };
                let (blocks, first) = (Blocks { model: &case.model, cut, run }, Nth::new(0));
                matrices(&case, &blocks, |block: &Block<'_>| if paired { first.change(block) } else { None })
            };
            let whole = of(&case.indices, 2);
            assert_eq!(whole.values().any(|(_, found)| found.is_paired()), paired, "{name}, {what}");
            for shards in [2, 3] {
                let mut sum: Option<Matrices> = None;
                for shard in (0..shards).rev() {
                    let own: Vec<usize> = case.indices.iter().copied().skip(shard).step_by(shards).collect();
                    let found = of(&own, 1 + shard);
                    match &mut sum {
                        None => sum = Some(found),
                        Some(sum) => sum.iter_mut().for_each(|(of, (_, all))| all.merge(&found[of].1).unwrap()),
                    }
                }
                assert!(sum.unwrap() == whole, "{name}, {what}, {shards} shards");
            }
        }
    }
}

#[test]
fn what_cannot_be_walked_is_refused() {
    let case = Case::digits();
    let walk = |run: Run<'_>, change: &dyn Fn(&Block<'_>) -> Result<Option<Model>, Error>| {
        Blocks { model: &case.model, cut: Cut::Weights(0), run }.walk(|block| change(block)).unwrap_err()
    };
    let nothing = |_: &Block<'_>| Ok(None);
    let check = |error: &Error, kind: Kind, text: &str| {
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    };
    check(&walk(Run::new(&case.samples, &[]), &nothing), Kind::Samples, "takes samples");
    let low = Memory { limit: Some(50 << 20), ..Memory::default() };
    let fits = Blocks { model: &case.model, cut: Cut::Weights(0), run: Run { memory: low, ..run(&case, 2) } };
    fits.walk(nothing).unwrap();
    for (limit, text) in [(1000, "too low"), ((40 << 20) + 1000, "the weights of one block")] {
        let memory = Memory { limit: Some(limit), ..Memory::default() };
        check(&walk(Run { memory, ..run(&case, 2) }, &nothing), Kind::Usage, text);
    }
    let stranger =
        parse("<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[1] x) => (float[1] y) { y = Relu (x) }").unwrap();
    check(&walk(run(&case, 1), &|_| Ok(Some(stranger.clone()))), Kind::Internal, "other inputs or outputs");
    let failed = walk(run(&case, 1), &|block| {
        block.observe(None, &ports(block), &|seen| {
            if seen.sample == 9 { Err(Error::new(Kind::Samples, "seen enough")) } else { Ok(()) }
        })?;
        Ok(None)
    });
    check(&failed, Kind::Samples, "seen enough");
}

#[test]
fn parts_go_back_into_their_places() {
    let model = parse(
        "<ir_version: 8, opset_import: [\"\" : 17]>\n\
         g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2,2] v = {5, 6, 7, 8}, float[2] s = {1, 1}>\n\
         {\n[first] a = MatMul (x, w)\n[second] b = MatMul (a, v)\n[third] c = Add (b, s)\n[fourth] y = MatMul (c, w)\n}",
    )
    .unwrap();
    let part = |name: &str| {
        let blocks = amax::runtime::segments::cut_before(&model, &[1, 2, 3]);
        let at = ["first", "second", "third", "fourth"].iter().position(|n| *n == name).unwrap();
        let types = blocks[at].carried.iter().map(|n| (n.clone(), amax::onnx::DataType::Float)).collect();
        (blocks[at].nodes.clone(), blocks[at].model(&model, &types).unwrap())
    };
    let check = |parts: Vec<(std::ops::Range<usize>, Model)>, lines: &[&str], gone: &[&str]| {
        let made = text(&model.with_parts(parts).unwrap());
        for line in lines {
            assert!(made.contains(line), "{line} in\n{made}");
        }
        for line in gone {
            assert!(!made.contains(line), "no {line} in\n{made}");
        }
    };
    let set = |(nodes, mut part): (std::ops::Range<usize>, Model), name: &str, values: &[f32]| {
        let value = part.value_named(name).unwrap();
        part.set_constant(value, Tensor::from_f32(&[2, 2], values));
        (nodes, part)
    };
    // As they were.
    let all = ["first", "second", "third", "fourth"].map(part);
    assert_eq!(text(&model.with_parts(all.to_vec()).unwrap()), text(&model));
    assert_eq!(text(&model.with_parts(Vec::new()).unwrap()), text(&model));
    // A weight that is read here alone is replaced; one that is read elsewhere too is there twice.
    check(vec![set(part("second"), "v", &[0.5; 4])], &["MatMul (a, v)", "v = {0.5"], &["v = {5", "v_1"]);
    let tied = vec![set(part("first"), "w", &[0.5; 4])];
    check(tied, &["MatMul (x, w_1)", "MatMul (c, w)", "w = {1", "w_1 = {0.5"], &[]);
    let both = vec![set(part("fourth"), "w", &[0.25; 4]), set(part("first"), "w", &[0.5; 4])];
    check(both, &["MatMul (x, w_1)", "MatMul (c, w_2)", "w_1 = {0.5", "w_2 = {0.25"], &["w = {1"]);
    // New names that the model has elsewhere give way; what nobody reads any more is gone.
    let other = parse(
        "<ir_version: 8, opset_import: [\"\" : 17]>\n\
         g (float[2,2] a) => (float[2,2] b) <float[2,2] s = {9, 9, 9, 9}>\n\
         {\n[third] c = Mul (a, s)\n[second] b = Relu (c)\n}",
    )
    .unwrap();
    let (nodes, _) = part("second");
    check(
        vec![(nodes, other)],
        &["c_1 = Mul (a, s_1)", "b = Relu (c_1)", "c = Add (b, s)", "third_1", "s_1 = {9"],
        &["v = {5"],
    );
    // Opsets that differ are not mixed; new domains come along.
    let own = |imports: &str| {
        let header = format!("<ir_version: 8, opset_import: [{imports}]>\n");
        parse(&(header + "g (float[2,2] a) => (float[2,2] b) { b = com.microsoft.Gelu (a) }")).unwrap()
    };
    let parts = |model| vec![(part("second").0, model)];
    check(parts(own("\"\" : 17, \"com.microsoft\" : 1")), &["com.microsoft", "b = com.microsoft.Gelu (a)"], &["v ="]);
    let error = model.with_parts(parts(own("\"\" : 21, \"com.microsoft\" : 1"))).unwrap_err();
    assert!(error.to_string().contains("opset 21, and the model has 17"), "{error}");
}
