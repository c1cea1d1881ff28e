//! The constants that operators read, in a model and in what became of it: whether they are the same numbers.

use std::collections::{BTreeMap, HashMap};

use super::channels::Layout;
use super::evaluate::{Constants, same};
use crate::ir::{Model, NodeId, Tensor};
use crate::reason::{self, Reason};

/// What two products of a float32 scale, once and twice rounded, may be apart: a few of half a unit in the last place.
const ROUNDING: f64 = 4.0 / (1u64 << 23) as f64;

/// A constant operand of a node, where either model computes it: codes that are dequantized, a fake quantizer of a weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    /// Node.
    pub node: String,
    /// Which of its inputs.
    pub input: usize,
    /// Elements.
    pub elements: usize,
    /// How the second model's are related to them.
    pub found: Comparison,
}

/// How numbers in two models are related.
#[derive(Clone, Debug, PartialEq)]
pub enum Comparison {
    /// They are the same.
    Equal,
    /// So many are others.
    Differing(usize),
    /// In each channel all are multiplied by the same factor; what multiplied the result before is gone from behind.
    Scaled {
        /// The least factor.
        least: f64,
        /// The largest.
        most: f64,
    },
    /// That is not known, and why.
    Unknown(Reason),
}

/// Compares every operand of the main graph that constants derive, between nodes with the same name of their first output,
/// or of their own where what is behind was fused and left its output's name. Numbers are compared exactly, but for the
/// factor of each channel in the second case; zeros of both signs are the same number.
#[must_use]
pub fn compare(first: &Model, second: &Model) -> Vec<Operand> {
    let by_output = |model: &Model| -> BTreeMap<String, NodeId> {
        let nodes = model.graph(model.main()).nodes();
        let named = |&n: &NodeId| model.node(n).output(0).map(|v| (model.value(v).name().to_owned(), n));
        nodes.iter().filter_map(named).collect()
    };
    let others: HashMap<String, NodeId> = by_output(second).into_iter().collect();
    let mut namesakes: HashMap<&str, Option<NodeId>> = HashMap::new();
    for &node in second.graph(second.main()).nodes() {
        let name = second.node(node).name();
        if !name.is_empty() {
            namesakes.entry(name).and_modify(|twice| *twice = None).or_insert(Some(node));
        }
    }
    let fused = |node: NodeId| {
        let (slot, twin) = (first.node(node), (*namesakes.get(first.node(node).name())?)?);
        (second.node(twin).op_type() == slot.op_type() && second.node(twin).domain() == slot.domain()).then_some(twin)
    };
    let (mut here, mut there) = (Constants::new(first, first.main()), Constants::new(second, second.main()));
    let mut found = Vec::new();
    for &node in first.graph(first.main()).nodes() {
        let slot = first.node(node);
        let Some(output) = slot.output(0).filter(|v| !here.derives(*v)) else { continue };
        let there_still = others.get(first.value(output).name()).copied();
        // What is gone was part of a quantizer that is written another way now.
        let Some(other) = there_still.or_else(|| fused(node)) else { continue };
        if slot.is("CastLike") {
            continue;
        }
        for (index, value) in slot.inputs().iter().enumerate() {
            let Some(value) = value.filter(|v| here.holds(first, *v)) else { continue };
            let twin = second.node(other);
            let alike = twin.op_type() == slot.op_type() && twin.domain() == slot.domain();
            let twin = twin.input(index).filter(|_| alike);
            let plain = !here.derives(value) && twin.is_none_or(|t| !there.derives(t));
            if plain {
                continue;
            }
            let original = here.value(first, value);
            let now = twin.filter(|t| there.holds(second, *t)).map(|t| there.value(second, t));
            let elements = original.as_ref().map_or(0, Tensor::len);
            let found_to_be = match (original, now) {
                (None, _) => Comparison::Unknown(Reason::NotComputable { what: reason::Operand::ConstantOperand }),
                (_, None) => Comparison::Unknown(Reason::OtherOperator),
                (_, Some(None)) => {
                    Comparison::Unknown(Reason::NotComputable { what: reason::Operand::ConstantOperand })
                }
                (Some(original), Some(Some(now))) => {
                    let layout =
                        Layout::of(first, node, &original.dims()).filter(|_| there_still.is_none() && index == 1);
                    relation(&original, &now, layout)
                }
            };
            found.push(Operand { node: first.node_name(node).to_owned(), input: index, elements, found: found_to_be });
            here.forget();
            there.forget();
        }
    }
    found
}

/// How `now` is related to `original`; each channel may have a factor where there is a layout.
fn relation(original: &Tensor, now: &Tensor, channels: Option<Layout>) -> Comparison {
    if now.dims() != original.dims() || now.dtype() != original.dtype() {
        return Comparison::Unknown(Reason::NowIs { dtype: now.dtype(), dims: now.dims() });
    }
    let (Some(a), Some(b)) = (original.to_f32(), now.to_f32()) else {
        let differing = if original.raw() == now.raw() { 0 } else { original.len() };
        return if differing == 0 { Comparison::Equal } else { Comparison::Differing(differing) };
    };
    let differing = a.iter().zip(&b).filter(|&(&a, &b)| !same(a, b)).count();
    match channels.and_then(|layout| factors(&a, &b, layout)) {
        _ if differing == 0 => Comparison::Equal,
        Some((least, most)) => Comparison::Scaled { least, most },
        None => Comparison::Differing(differing),
    }
}

/// The least and the largest of the factors above zero that make `b` of `a`, one for each channel; none if they do not.
fn factors(a: &[f32], b: &[f32], layout: Layout) -> Option<(f64, f64)> {
    // The largest element of a channel tells its factor best.
    let mut largest = vec![(0.0f32, 1.0f64); layout.channels];
    for (i, (&a, &b)) in a.iter().zip(b).enumerate() {
        let (size, factor) = &mut largest[layout.channel(i)];
        if a.abs() > *size {
            (*size, *factor) = (a.abs(), f64::from(b) / f64::from(a));
        }
    }
    let fits = |(i, (&a, &b)): (usize, (&f32, &f32))| {
        let wanted = f64::from(a) * largest[layout.channel(i)].1;
        (wanted - f64::from(b)).abs() <= wanted.abs() * ROUNDING
    };
    let good = a.iter().zip(b).enumerate().all(fits) && largest.iter().all(|&(_, f)| f > 0.0);
    let factors = largest.iter().map(|&(_, factor)| factor);
    good.then(|| factors.fold((f64::INFINITY, 0.0), |(least, most), f| (f.min(least), f.max(most))))
}
