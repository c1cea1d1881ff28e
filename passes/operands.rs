//! The constants that operators read, in a model and in what became of it: whether they are the same numbers.

use std::collections::{BTreeMap, HashMap};

use super::arithmetic::{Constants, same};
use crate::ir::{Model, NodeId};

/// A constant operand of a node, where either model computes it: codes that are dequantized, a fake quantizer of a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Node.
    pub node: String,
    /// Which of its inputs.
    pub input: usize,
    /// Elements.
    pub elements: usize,
    /// Elements that are another number in the second model; `Err` says why that is not known.
    pub differing: Result<usize, String>,
}

/// Compares every operand of the main graph that constants derive, between nodes with the same name of their first output.
/// Numbers are compared exactly; zeros of both signs are the same number.
#[must_use]
pub fn compare(first: &Model, second: &Model) -> Vec<Operand> {
    let by_output = |model: &Model| -> BTreeMap<String, NodeId> {
        let nodes = model.graph(model.main()).nodes();
        let named = |&n: &NodeId| model.node(n).output(0).map(|v| (model.value(v).name().to_owned(), n));
        nodes.iter().filter_map(named).collect()
    };
    let others: HashMap<String, NodeId> = by_output(second).into_iter().collect();
    let (mut here, mut there) = (Constants::new(first, first.main()), Constants::new(second, second.main()));
    let mut found = Vec::new();
    for &node in first.graph(first.main()).nodes() {
        let slot = first.node(node);
        let Some(output) = slot.output(0).filter(|v| !here.derives(*v)) else { continue };
        // What is gone was part of a quantizer that is written another way now.
        let Some(&other) = others.get(first.value(output).name()) else { continue };
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
            let Some(original) = here.value(first, value) else {
                found.push(Operand {
                    node: first.node_name(node).to_owned(),
                    input: index,
                    elements: 0,
                    differing: Err("it cannot be computed exactly".to_owned()),
                });
                continue;
            };
            let differing = match twin.filter(|t| there.holds(second, *t)).map(|t| there.value(second, t)) {
                None => Err("the node has another form".to_owned()),
                Some(None) => Err("it cannot be computed exactly any more".to_owned()),
                Some(Some(now)) if now.dims() != original.dims() || now.dtype() != original.dtype() => {
                    Err(format!("it is a {} of shape {:?} now", now.dtype(), now.dims()))
                }
                Some(Some(now)) => Ok(match (original.to_f32(), now.to_f32()) {
                    (Some(a), Some(b)) => a.iter().zip(&b).filter(|&(&a, &b)| !same(a, b)).count(),
                    _ if original.raw() == now.raw() => 0,
                    _ => original.len(),
                }),
            };
            let node = first.node_name(node).to_owned();
            found.push(Operand { node, input: index, elements: original.len(), differing });
            here.forget();
            there.forget();
        }
    }
    found
}
