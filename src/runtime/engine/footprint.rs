//! What a typed model takes in memory, by the shapes of its tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tract_core::internal::{OutletId, TypedFact, TypedModel};
use tract_core::ops::konst::Const;

use super::super::Footprint;

/// Weights, and the most that is alive at once where operators run in order and each tensor goes after its last use.
/// Zero where tract cannot tell the order, which running it will say.
pub(crate) fn footprint(model: &TypedModel) -> Footprint {
    let Ok(order) = model.eval_order_opt_ram() else { return Footprint::default() };
    let mut last: BTreeMap<OutletId, usize> = BTreeMap::new();
    for (time, &id) in order.iter().enumerate() {
        for &input in &model.node(id).inputs {
            last.insert(input, time);
        }
    }
    for &output in &model.outputs {
        last.insert(output, usize::MAX);
    }
    let mut found = Footprint::default();
    let mut constants = BTreeSet::new();
    // Nodes of constants alone, which are folded: reshaped weights, mostly.
    let mut folded = BTreeSet::new();
    let mut leaving: BTreeMap<usize, u64> = BTreeMap::new();
    let mut alive = 0;
    for (time, &id) in order.iter().enumerate() {
        let node = model.node(id);
        if !node.inputs.is_empty() && node.inputs.iter().all(|input| folded.contains(&input.node)) {
            folded.insert(id);
            continue;
        }
        for (slot, output) in node.outputs.iter().enumerate() {
            if let (true, Some(value)) = (node.op_is::<Const>(), &output.fact.konst) {
                folded.insert(id);
                if constants.insert(Arc::as_ptr(value).addr()) {
                    found.weights += bytes(&output.fact);
                }
                continue;
            }
            let size = bytes(&output.fact);
            alive += size;
            *leaving.entry(*last.get(&OutletId::new(id, slot)).unwrap_or(&time)).or_default() += size;
        }
        found.sample = found.sample.max(alive);
        alive -= leaving.remove(&time).unwrap_or(0);
    }
    found
}

fn bytes(fact: &TypedFact) -> u64 {
    let count: usize = fact.shape.as_concrete().map_or(0, |dims| dims.iter().product());
    (count * fact.datum_type.size_of()) as u64
}
