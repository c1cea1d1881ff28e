//! Models that are broken on purpose: whatever a file holds, amax answers with a model or an error that blames the file, never
//! with a panic and never with an error that blames itself.
//!
//! Cases are numbers; each makes the same model everywhere. `AMAX_HOSTILE=1000000 cargo test hostile` runs so many, and
//! `AMAX_HOSTILE=FIRST..LAST` those. What fails is written to `target/hostile`; mended, it moves to `tests/data/hostile`.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use amax::config::presets;
use amax::error::{Kind, Result};
use amax::ir::{Model, content_hash, file, text};
use amax::onnx::{ModelProto, NodeProto, TensorProto, ValueInfoProto, tensor_shape_proto, type_proto};
use amax::passes::recipes::To;
use amax::targets::{self, Target};
use amax::{Convert, Rewrite};
use prost::Message;
use rayon::prelude::*;

use crate::support::{models_below, root};

/// In every run of the tests.
const CASES: u64 = 20_000;

/// Seeds above this size hold more weights than structure.
const LARGEST_SEED: usize = 4096;

/// Sizes, axes, counts and codes that are where arithmetic ends.
const EXTREMES: [i64; 16] = [
    -1,
    0,
    1,
    2,
    3,
    7,
    -2,
    255,
    1 << 20,
    i32::MAX as i64,
    i32::MIN as i64,
    1 << 40,
    1 << 62,
    i64::MAX,
    i64::MIN,
    i64::MIN + 1,
];

/// The generator `SplitMix64`: <https://prng.di.unimi.it/splitmix64.c>.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn one_of<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len()))
    }

    fn extreme(&mut self) -> i64 {
        EXTREMES[self.below(EXTREMES.len())]
    }
}

/// Small models of every kind, as protobuf; without those that failed, so that a new one of them changes no case.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = models_below(&root("tests"))
        .into_iter()
        .filter(|path| !path.starts_with(root("tests/data/hostile")))
        .map(|path| std::fs::read(path).unwrap())
        .filter(|bytes| bytes.len() <= LARGEST_SEED && ModelProto::decode(bytes.as_slice()).is_ok())
        .collect();
    for folder in ["tests/cli/models", "tests/passes"] {
        let mut paths: Vec<_> = walk(&root(folder));
        paths.sort();
        for path in paths {
            let source = std::fs::read_to_string(&path).unwrap_or_default();
            let graph: String = source.lines().filter(|l| !l.starts_with('#')).fold(String::new(), |s, l| s + l + "\n");
            seeds.extend(text::parse_with_fill(&graph).ok().and_then(|model| file::to_bytes(&model).ok()));
        }
    }
    assert!(seeds.len() > 200, "only {} seeds", seeds.len());
    seeds
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

/// The model of a case.
fn mutant(seeds: &[Vec<u8>], case: u64) -> Vec<u8> {
    let mut random = Random(case);
    let seed = random.one_of(seeds).cloned().unwrap_or_default();
    if random.below(8) == 0 {
        return scrambled(seed, &mut random);
    }
    let mut proto = ModelProto::decode(seed.as_slice()).unwrap();
    for _ in 0..=random.below(3) {
        mutate(&mut proto, &mut random, seeds);
    }
    proto.encode_to_vec()
}

fn scrambled(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next() as u8),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = random.next() as u8;
                }
            }
        }
    }
    bytes
}

fn mutate(proto: &mut ModelProto, random: &mut Random, seeds: &[Vec<u8>]) {
    let other = random.one_of(seeds).map(|seed| ModelProto::decode(seed.as_slice()).unwrap()).unwrap_or_default();
    let other = other.graph.unwrap_or_default();
    if random.below(12) == 0 {
        let version = [7, 10, 13, 18, 19, 21, 23, 25][random.below(8)];
        proto.opset_import.iter_mut().for_each(|import| import.version = Some(version));
        return;
    }
    let Some(graph) = &mut proto.graph else { return };
    let names: Vec<String> = graph
        .node
        .iter()
        .flat_map(|n| n.input.iter().chain(&n.output))
        .chain(graph.initializer.iter().filter_map(|i| i.name.as_ref()))
        .chain(graph.input.iter().filter_map(|i| i.name.as_ref()))
        .cloned()
        .collect();
    match random.below(8) {
        0 | 1 => {
            let at = random.below(graph.initializer.len());
            if let Some(tensor) = graph.initializer.get_mut(at) {
                mutate_tensor(tensor, random);
            }
        }
        2 => {
            let lists = [&mut graph.input, &mut graph.output, &mut graph.value_info];
            let infos: Vec<&mut ValueInfoProto> = lists.into_iter().flatten().collect();
            let at = random.below(infos.len());
            if let Some(info) = infos.into_iter().nth(at) {
                mutate_type(info, random);
            }
        }
        3 => {
            // A node of another model, on values of this one.
            let Some(mut node) = random.one_of(&other.node).cloned() else { return };
            for (at, input) in node.input.iter_mut().enumerate() {
                match other.initializer.iter().find(|i| i.name.as_ref() == Some(input)) {
                    Some(tensor) if random.below(4) > 0 => {
                        let name = format!("{input}_{at}_{}", graph.node.len());
                        graph.initializer.push(TensorProto { name: Some(name.clone()), ..tensor.clone() });
                        *input = name;
                    }
                    _ => *input = random.one_of(&names).cloned().unwrap_or_default(),
                }
            }
            let made = format!("made_{}", graph.node.len());
            node.output.iter_mut().enumerate().for_each(|(at, output)| *output = format!("{made}_{at}"));
            // Read where something else was.
            let at = random.below(graph.node.len());
            if let Some(reader) = graph.node.get_mut(at)
                && let Some(input) = reader.input.first_mut()
            {
                *input = format!("{made}_0");
            }
            graph.node.insert(at.min(graph.node.len()), node);
        }
        _ => {
            let at = random.below(graph.node.len());
            let op = random.one_of(&other.node).map(|n| (n.op_type.clone(), n.domain.clone()));
            if let Some(node) = graph.node.get_mut(at) {
                mutate_node(node, random, &names, op);
            }
        }
    }
}

fn mutate_node(
    node: &mut NodeProto,
    random: &mut Random,
    names: &[String],
    op: Option<(Option<String>, Option<String>)>,
) {
    let name = random.one_of(names).cloned().unwrap_or_default();
    let input = random.below(node.input.len());
    let attribute = random.below(node.attribute.len());
    match random.below(9) {
        0 => (node.op_type, node.domain) = op.unwrap_or_default(),
        1 => node.output.push(format!("{name}_more")),
        2 => node.input.push(name),
        3 => node.input.truncate(input),
        4 => {
            if let Some(slot) = node.input.get_mut(input) {
                *slot = if random.below(3) == 0 { String::new() } else { name };
            }
        }
        5 => node.attribute.truncate(attribute),
        6 => {
            if let Some(first) = node.output.first_mut() {
                *first = name;
            }
        }
        _ => {
            let Some(attribute) = node.attribute.get_mut(attribute) else { return };
            if let Some(i) = &mut attribute.i {
                *i = random.extreme();
            } else if !attribute.ints.is_empty() {
                let at = random.below(attribute.ints.len());
                match random.below(3) {
                    0 => attribute.ints.truncate(at),
                    1 => attribute.ints.push(random.extreme()),
                    _ => attribute.ints[at] = random.extreme(),
                }
            } else if let Some(f) = &mut attribute.f {
                *f = [0.0, -1.0, f32::NAN, f32::INFINITY, 1e30][random.below(5)];
            } else if let Some(tensor) = &mut attribute.t {
                mutate_tensor(tensor, random);
            } else if let Some(s) = &mut attribute.s {
                *s = vec![b'x'; random.below(9)].into();
            }
        }
    }
}

fn mutate_tensor(tensor: &mut TensorProto, random: &mut Random) {
    let at = random.below(tensor.dims.len());
    match random.below(8) {
        0 => tensor.data_type = Some(random.extreme() as i32),
        1 => tensor.data_type = Some(random.below(28) as i32),
        2 => tensor.dims.truncate(at),
        3 => tensor.dims.push(1),
        4 => tensor.dims = vec![0, random.extreme(), random.extreme()],
        5 => tensor.dims.reverse(),
        // An empty tensor, or one of other values.
        6 => {
            tensor.dims = vec![0];
            tensor.raw_data = tensor.raw_data.as_ref().map(|_| Vec::new().into());
            tensor.float_data.clear();
            tensor.int64_data.clear();
            tensor.int32_data.clear();
        }
        _ => {
            if let Some(raw) = &mut tensor.raw_data {
                let mut bytes = raw.to_vec();
                let at = random.below(bytes.len());
                let end = (at + 8).min(bytes.len());
                let value = random.extreme().to_le_bytes();
                bytes[at..end].copy_from_slice(&value[..end - at]);
                *raw = bytes.into();
            } else if let Some(value) = tensor.int64_data.get_mut(at) {
                *value = random.extreme();
            }
        }
    }
}

fn mutate_type(info: &mut ValueInfoProto, random: &mut Random) {
    let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_mut().and_then(|t| t.value.as_mut()) else {
        info.r#type = None;
        return;
    };
    match random.below(5) {
        0 => tensor.elem_type = Some(random.extreme() as i32),
        1 => tensor.elem_type = Some(random.below(28) as i32),
        2 => tensor.shape = None,
        _ => {
            let Some(shape) = &mut tensor.shape else { return };
            let at = random.below(shape.dim.len());
            let value = tensor_shape_proto::dimension::Value::DimValue(random.extreme());
            match shape.dim.get_mut(at) {
                Some(dim) if random.below(3) > 0 => dim.value = Some(value),
                _ => shape.dim.truncate(at),
            }
        }
    }
}

/// Everything that reads a model without running it.
fn exercise(bytes: Vec<u8>, random: &mut Random) -> Result<()> {
    let model = file::from_bytes(bytes)?;
    let saved = file::to_bytes(&model)?;
    assert_eq!(file::to_bytes(&file::from_bytes(saved.clone())?)?, saved, "saved again it is another model");
    let described = (content_hash(&model), text::print(&model), amax::inspect(&model), amax::scales(&model));
    drop(described);
    let presets: Vec<&str> = presets::names().collect();
    let targets: Vec<&str> = targets::names().collect();
    let target = Target::load(targets[random.below(targets.len())])?;
    let done = if random.below(8) < 4 {
        let simulate = random.below(4) == 0;
        let target = if simulate { target.simulated() } else { target };
        let config = presets::load(presets[random.below(presets.len())])?;
        let rewrite = Rewrite::new(&model).config(&config).target(&target);
        let done = if random.below(4) == 0 { rewrite.prepare()? } else { rewrite.run()? };
        done.model
    } else {
        let forms: Vec<To> = (0..random.below(3)).map(|_| To::ALL[random.below(To::ALL.len())]).collect();
        Convert::new(&model).to(&forms).simulate(random.below(4) == 0).target(&target).run()?.model
    };
    again(&done)
}

/// A result is a valid model, in memory and as a file.
fn again(model: &Model) -> Result<()> {
    let bytes = file::to_bytes(model)?;
    let loaded = file::from_bytes(bytes.clone()).unwrap_or_else(|e| panic!("the result is refused: {e}"));
    assert_eq!(file::to_bytes(&loaded)?, bytes, "saved again it is another model");
    Ok(())
}

/// What is wrong with the answer to a model, if anything is.
fn fault(bytes: Vec<u8>, random: &mut Random) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(|| exercise(bytes, random))) {
        Ok(Err(error)) if error.kind() == Kind::Internal => Some(format!("blames itself: {error}")),
        Ok(_) => None,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Some(format!("panics: {}", text.unwrap_or_default()))
        }
    }
}

fn range() -> Range<u64> {
    let Ok(asked) = std::env::var("AMAX_HOSTILE") else { return 0..CASES };
    let number = |text: &str| text.trim().parse().expect("AMAX_HOSTILE is a number, or two with .. between them");
    match asked.split_once("..") {
        Some((first, last)) => number(first)..number(last),
        None => 0..number(&asked),
    }
}

#[test]
fn models_are_quantized_or_refused() {
    let seeds = seeds();
    let faults: Vec<String> = range()
        .into_par_iter()
        .filter_map(|case| {
            let bytes = mutant(&seeds, case);
            let fault = fault(bytes.clone(), &mut Random(!case))?;
            let folder = root("target/hostile");
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(format!("{case}.onnx")), bytes).unwrap();
            Some(format!("target/hostile/{case}.onnx {fault}"))
        })
        .collect();
    assert!(faults.is_empty(), "{} of {:?}:\n{}", faults.len(), range(), faults.join("\n"));
}

#[test]
fn models_that_once_failed_do_not_again() {
    let kept = models_below(&root("tests/data/hostile"));
    assert!(!kept.is_empty());
    for path in kept {
        let bytes = std::fs::read(&path).unwrap();
        for seed in 0..100 {
            let fault = fault(bytes.clone(), &mut Random(seed));
            assert_eq!(fault, None, "{} with seed {seed}", path.display());
        }
    }
}
