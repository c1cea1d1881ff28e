//! A model cut into parts that run one after the other, so that the weights of one part are in memory at a time.
//!
//! Each part runs over all samples before the next one is made. What crosses a cut is [`Carried`](super::Carried);
//! inputs of the model are not, since samples can be read again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NodeId, Tensor, User, ValueId, tensor_type};
use crate::onnx::DataType;

/// A run of nodes of the main graph, and what goes in and out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Positions of its nodes in the main graph.
    pub nodes: Range<usize>,
    /// Bytes of its weights as the runtime holds them.
    pub weights: u64,
    /// Inputs of the model that it reads, and those that nobody reads, which the first segment has.
    pub inputs: Vec<String>,
    /// Tensors of earlier segments that it reads.
    pub carried: Vec<String>,
    /// Tensors it makes that later segments read, and outputs of the model that it makes.
    pub outputs: Vec<String>,
    /// Tensors of this segment or earlier ones that later ones read.
    pub live: BTreeSet<String>,
}

/// Bytes of a model's weights as the runtime holds them: floats as float32, packed ones decoded.
#[must_use]
pub fn weights(model: &Model) -> u64 {
    let nodes = model.graph(model.main()).nodes();
    constants(model, nodes).values().sum()
}

/// Cuts a model into segments whose weights take up to `limit` bytes each; a node that reads more is one by itself. Within
/// that limit the cuts are where the fewest tensors cross, and the smallest of those. Nodes must be sorted.
#[must_use]
pub fn cut(model: &Model, limit: u64) -> Vec<Segment> {
    let nodes = model.graph(model.main()).nodes();
    let mut bounds = vec![0];
    let crossing = crossings(model, nodes);
    let mut start = 0;
    let mut held: BTreeMap<ValueId, u64> = BTreeMap::new();
    let mut sums = vec![0];
    let mut at = 0;
    while at < nodes.len() {
        let own = constants(model, &nodes[at..=at]);
        let more: u64 = own.iter().filter(|(v, _)| !held.contains_key(v)).map(|(_, size)| size).sum();
        let sum = sums.last().copied().unwrap_or(0);
        if sum > 0 && sum + more > limit {
            // A cut takes the fuller half of what fits, so that good places do not make many small segments.
            let full = (start + 1..=at).filter(|&end| sums[end - start] * 2 >= sum);
            let end = full.min_by_key(|&end| (crossing[end], std::cmp::Reverse(end))).unwrap_or(at);
            bounds.push(end);
            (start, at) = (end, end);
            held.clear();
            sums = vec![0];
            continue;
        }
        held.extend(own);
        sums.push(sum + more);
        at += 1;
    }
    bounds.push(nodes.len());
    bounds.dedup();
    describe(model, &bounds)
}

/// Cuts a model in front of the nodes at these positions of the main graph. Nodes must be sorted.
#[must_use]
pub fn cut_before(model: &Model, positions: &[usize]) -> Vec<Segment> {
    let end = model.graph(model.main()).nodes().len();
    let inside = positions.iter().copied().filter(|&at| at < end);
    let bounds: BTreeSet<usize> = [0, end].into_iter().chain(inside).collect();
    describe(model, &bounds.into_iter().collect::<Vec<_>>())
}

/// Weights that these nodes read, with their sizes.
fn constants(model: &Model, nodes: &[NodeId]) -> BTreeMap<ValueId, u64> {
    let mut found = BTreeMap::new();
    for value in nodes.iter().flat_map(|&n| model.reads(n)) {
        if let Some(tensor) = model.constant(value) {
            found.insert(value, held_size(model, value, tensor));
        }
    }
    found
}

/// Bytes of a weight in the runtime.
fn held_size(model: &Model, value: ValueId, tensor: &Tensor) -> u64 {
    let count = tensor.len() as u64;
    let decoded = model.value(value).users().iter().filter_map(|user| match user {
        User::Node { node, input } => Some((model.node(*node).op_type(), *input)),
        User::Output { .. } => None,
    });
    let decoded = decoded.map(|(op, input)| match (op, input) {
        ("DequantizeLinear", 0) => 4 * count,
        // Packed into bytes; four bits are the common width.
        ("MatMulNBits", 1) => 8 * count,
        _ => 0,
    });
    let plain = match tensor.dtype() {
        DataType::Double => 8 * count,
        dtype if dtype.is_float() => 4 * count,
        _ => (tensor.byte_len() as u64).max(count),
    };
    decoded.max().unwrap_or(0).max(plain)
}

/// For each position between nodes, what is computed before it and read after it: how many tensors, and how many
/// elements where that is known.
fn crossings(model: &Model, nodes: &[NodeId]) -> Vec<(usize, u64)> {
    let mut last: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (at, &node) in nodes.iter().enumerate() {
        for value in model.reads(node) {
            last.insert(value, at);
        }
    }
    // What begins to cross at each position, and what ceases to.
    let mut begins = vec![(0, 0); nodes.len() + 1];
    let mut ends = vec![(0, 0); nodes.len() + 1];
    for (at, &node) in nodes.iter().enumerate() {
        for value in model.node(node).outputs().iter().flatten() {
            let Some(&end) = last.get(value) else { continue };
            let dims = model.shape(*value).unwrap_or_default();
            let size: usize = dims.iter().map(|d| d.unwrap_or(1)).product();
            for (count, elements) in [&mut begins[at + 1], &mut ends[end + 1]] {
                *count += 1;
                *elements += size as u64;
            }
        }
    }
    let mut crossing = (0, 0);
    let mut step = |(begin, end): (&(usize, u64), &(usize, u64))| {
        crossing = (crossing.0 + begin.0 - end.0, crossing.1 + begin.1 - end.1);
        crossing
    };
    begins.iter().zip(&ends).map(&mut step).collect()
}

fn describe(model: &Model, bounds: &[usize]) -> Vec<Segment> {
    let main = model.graph(model.main());
    let nodes = main.nodes();
    let name = |value: &ValueId| model.value(*value).name().to_owned();
    let inputs: BTreeSet<ValueId> = main.inputs().collect();
    let outputs: BTreeSet<ValueId> = main.outputs().collect();
    let mut unread: BTreeSet<ValueId> = inputs.clone();
    let mut made: BTreeSet<ValueId> = BTreeSet::new();
    let ranges: Vec<Range<usize>> = bounds.windows(2).map(|pair| pair[0]..pair[1]).collect();
    let reads: Vec<BTreeSet<ValueId>> =
        ranges.iter().map(|r| nodes[r.clone()].iter().flat_map(|&n| model.reads(n)).collect()).collect();
    let mut later: Vec<BTreeSet<ValueId>> = vec![BTreeSet::new()];
    for reads in reads.iter().skip(1).rev() {
        let mut all = reads.clone();
        all.extend(&later[later.len() - 1]);
        later.push(all);
    }
    later.reverse();
    let mut found = Vec::new();
    for ((range, reads), later) in ranges.into_iter().zip(&reads).zip(&later) {
        let own = &nodes[range.clone()];
        let carried: Vec<String> = reads.intersection(&made).map(name).collect();
        let makes = own.iter().flat_map(|&n| model.node(n).outputs().iter().flatten().copied());
        let makes: Vec<ValueId> = makes.collect();
        made.extend(&makes);
        unread.retain(|value| !reads.contains(value));
        found.push(Segment {
            weights: constants(model, own).values().sum(),
            nodes: range,
            inputs: main.inputs().filter(|v| reads.contains(v)).map(|v| name(&v)).collect(),
            carried,
            outputs: makes.iter().filter(|v| later.contains(v) || outputs.contains(v)).map(name).collect(),
            live: made.intersection(later).map(name).collect(),
        });
    }
    if let Some(first) = found.first_mut() {
        first.inputs.extend(main.inputs().filter(|v| unread.contains(v)).map(|v| name(&v)));
    }
    found
}

impl Segment {
    /// The segment of `whole` as a model. `types` has the element type of each carried tensor, as the runtime gave it.
    ///
    /// # Errors
    /// A carried tensor without a type, an input of the model without one.
    pub fn model(&self, whole: &Model, types: &BTreeMap<String, DataType>) -> Result<Model> {
        let main = whole.graph(whole.main());
        let mut inputs = Vec::new();
        for value in main.inputs().filter(|&v| self.inputs.iter().any(|n| n == whole.value(v).name())) {
            let value = whole.value(value);
            let ty = value
                .ty()
                .cloned()
                .ok_or_else(|| Error::new(Kind::Runtime, "an input has no element type").at_value(value.name()))?;
            inputs.push((value.name().to_owned(), ty));
        }
        for name in &self.carried {
            let dtype = types.get(name).ok_or_else(|| {
                Error::new(Kind::Internal, "a tensor between two segments was not computed").at_value(name)
            })?;
            inputs.push((name.clone(), tensor_type(*dtype, None)));
        }
        whole.extract(self.nodes.clone(), &inputs, &self.outputs)
    }
}
