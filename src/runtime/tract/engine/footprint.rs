//! What a model takes in memory, by the shapes of its tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tract_core::internal::{OutletId, TypedFact, TypedModel, TypedNode};
use tract_core::ops::konst::Const;

use super::Plan;

/// Bytes of weights of a model that is about to be compiled. Zero where tract cannot tell the order of its nodes, which
/// running it will say.
pub(crate) fn weights(model: &TypedModel) -> u64 {
    let Ok(order) = model.eval_order() else { return 0 };
    let mut constants = BTreeSet::new();
    // Nodes of constants alone, which are folded: reshaped weights, mostly.
    let mut folded = BTreeSet::new();
    let mut sum = 0;
    for id in order {
        let node = model.node(id);
        if !node.inputs.is_empty() && node.inputs.iter().all(|input| folded.contains(&input.node)) {
            folded.insert(id);
            continue;
        }
        for output in &node.outputs {
            if let (true, Some(value)) = (node.op_is::<Const>(), &output.fact.konst) {
                folded.insert(id);
                if constants.insert(Arc::as_ptr(value).addr()) {
                    sum += bytes(&output.fact);
                }
            }
        }
    }
    sum
}

/// The most bytes of tensors that are alive at once in a run of one sample: operators run in the order of the plan, and
/// each tensor goes after its last use.
pub(crate) fn tensors(plan: &Plan) -> u64 {
    let (model, order) = (plan.model(), plan.order_without_consts());
    // What is only a view keeps alive what it looks at.
    let mut views: BTreeMap<OutletId, OutletId> = BTreeMap::new();
    for &id in order {
        let node = model.node(id);
        if let (true, Some(&input)) = (node.op.name() == "LazyIm2col", node.inputs.first()) {
            views.insert(OutletId::new(id, 0), views.get(&input).copied().unwrap_or(input));
        }
    }
    let seen = |outlet: OutletId| views.get(&outlet).copied().unwrap_or(outlet);
    let mut last: BTreeMap<OutletId, usize> = BTreeMap::new();
    for (time, &id) in order.iter().enumerate() {
        for &input in &model.node(id).inputs {
            last.insert(seen(input), time);
        }
    }
    for &output in &model.outputs {
        last.insert(seen(output), usize::MAX);
    }
    let mut leaving: BTreeMap<usize, u64> = BTreeMap::new();
    let (mut alive, mut most) = (0, 0);
    for (time, &id) in order.iter().enumerate() {
        for (slot, output) in model.node(id).outputs.iter().enumerate() {
            let outlet = OutletId::new(id, slot);
            if views.contains_key(&outlet) {
                continue;
            }
            let size = bytes(&output.fact);
            alive = size.saturating_add(alive);
            let leaves = leaving.entry(*last.get(&outlet).unwrap_or(&time)).or_default();
            *leaves = size.saturating_add(*leaves);
        }
        most = most.max(alive);
        alive = u64::saturating_sub(alive, leaving.remove(&time).unwrap_or(0));
    }
    most
}

/// The first operator that gives the largest tensor, and its bytes, where sizes are known.
pub(crate) fn largest(model: &TypedModel) -> Option<(&str, u64)> {
    let size = |node: &TypedNode| node.outputs.iter().map(|output| bytes(&output.fact)).max();
    model.nodes().iter().rev().filter_map(|node| Some((node.name.as_str(), size(node)?))).max_by_key(|&(_, size)| size)
}

/// As many as there can be where their number passes what a number holds.
fn bytes(fact: &TypedFact) -> u64 {
    let Some(dims) = fact.shape.as_concrete() else { return 0 };
    let dims = dims.iter().try_fold(1u64, |size, &dim| size.checked_mul(dim as u64));
    dims.and_then(|count| count.checked_mul(fact.datum_type.size_of() as u64)).unwrap_or(u64::MAX)
}
