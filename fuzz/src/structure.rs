//! Models that are broken by their structure: a node of another model, an extreme size, an input too few.

use std::path::{Path, PathBuf};

use amax::ir::{file, text};
use amax::onnx::{ModelProto, NodeProto, TensorProto, ValueInfoProto, tensor_shape_proto, type_proto};
use prost::Message;

use super::choices::Choose;

/// Seeds above this size hold more weights than structure.
const LARGEST_SEED: usize = 4096;

/// The files below a folder, sorted by path.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    let mut found: Vec<_> =
        entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect();
    found.sort();
    found
}

/// Small models of every kind in the tests of the repository at `root`, as protobuf; without those that failed once, so that
/// a new one of them changes no case.
pub fn seeds(root: &Path) -> Vec<Vec<u8>> {
    let tests = root.join("tests");
    let mut seeds: Vec<Vec<u8>> = files_below(&tests)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "onnx") && !path.starts_with(tests.join("data/hostile")))
        .filter_map(|path| std::fs::read(path).ok())
        .filter(|bytes| bytes.len() <= LARGEST_SEED && ModelProto::decode(bytes.as_slice()).is_ok())
        .collect();
    for path in ["cli/models", "passes"].iter().flat_map(|folder| files_below(&tests.join(folder))) {
        let source = std::fs::read_to_string(&path).unwrap_or_default();
        let graph: String = source.lines().filter(|l| !l.starts_with('#')).fold(String::new(), |s, l| s + l + "\n");
        seeds.extend(text::parse_with_fill(&graph).ok().and_then(|model| file::to_bytes(&model).ok()));
    }
    seeds
}

/// A seed, broken: one of eight byte by byte.
pub fn mutant(seeds: &[Vec<u8>], random: &mut impl Choose) -> Vec<u8> {
    let seed = random.one_of(seeds).cloned().unwrap_or_default();
    if random.below(8) == 0 {
        return scrambled(seed, random);
    }
    let mut proto = ModelProto::decode(seed.as_slice()).unwrap_or_default();
    for _ in 0..=random.below(3) {
        mutate(&mut proto, random, seeds);
    }
    proto.encode_to_vec()
}

/// Bytes, some of them others.
pub fn scrambled(mut bytes: Vec<u8>, random: &mut impl Choose) -> Vec<u8> {
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

fn mutate(proto: &mut ModelProto, random: &mut impl Choose, seeds: &[Vec<u8>]) {
    let other =
        random.one_of(seeds).map(|seed| ModelProto::decode(seed.as_slice()).unwrap_or_default()).unwrap_or_default();
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
    random: &mut impl Choose,
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

fn mutate_tensor(tensor: &mut TensorProto, random: &mut impl Choose) {
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

fn mutate_type(info: &mut ValueInfoProto, random: &mut impl Choose) {
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
