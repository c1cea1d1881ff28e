//! Float operators in place of those that read packed weights.

use crate::ir::view::GatherBlockQuantized;
use crate::ir::{Attr, Model, NodeId, ValueId};
use crate::passes::lower_matmulnbits::add_behind;

/// Makes a MatMul with `weight` of a `MatMulNBits`.
pub(crate) fn matmul(model: &mut Model, node: NodeId, weight: ValueId) {
    let bias = model.node(node).input(5);
    model.truncate_inputs(node, 1);
    model.set_input(node, 1, Some(weight));
    model.set_op(node, "", "MatMul");
    for name in ["K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked"] {
        model.remove_attr(node, name);
    }
    if let Some(bias) = bias {
        add_behind(model, node, bias);
    }
}

/// Makes a Gather from `table` of a `GatherBlockQuantized`.
pub(crate) fn gather(model: &mut Model, node: NodeId, table: ValueId) {
    let axis = GatherBlockQuantized::of(model.node(node)).map_or(0, |gather| gather.gather_axis);
    model.truncate_inputs(node, 2);
    model.set_input(node, 0, Some(table));
    model.set_op(node, "", "Gather");
    for name in ["gather_axis", "quantize_axis", "bits", "block_size"] {
        model.remove_attr(node, name);
    }
    if axis != 0 {
        model.set_attr(node, Attr::int("axis", axis));
    }
}
