//! What the graph optimizers of onnxruntime move where it does not belong.
//!
//! Its convolutions on integers have the channels last. Transposes beside them are moved down through what follows, until
//! they meet others. Operators that say which axes they are about are handled wrongly on the way.

use std::collections::BTreeSet;

use crate::ir::{Model, NodeId};

/// Whether a node is wrong or refused once a Transpose was moved over it.
#[must_use]
pub fn breaks(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    if !at.domain().is_empty() {
        return false;
    }
    match at.op_type() {
        "Pad" => at.input(3).is_some(),
        // The cubic kernel has the channels first only.
        "Resize" => at.ints("axes").is_some() || at.string("mode") == Some("cubic"),
        // Becomes a Pad with axes.
        "CenterCropPad" => true,
        _ => false,
    }
}

/// Whether Transposes are moved to a node, from the first nodes before it of which `source` is true.
#[must_use]
pub fn reached(model: &Model, node: NodeId, source: &dyn Fn(NodeId) -> bool) -> bool {
    let mut seen = BTreeSet::new();
    let mut ahead = vec![node];
    while let Some(node) = ahead.pop() {
        for before in model.node(node).inputs().iter().flatten().filter_map(|&v| model.producer(v)) {
            if source(before) {
                return true;
            }
            let stops = matches!(model.node(before).op_type(), "Conv" | "ConvTranspose" | "Gemm" | "MatMul" | "Trilu");
            if !stops && seen.insert(before) {
                ahead.push(before);
            }
        }
    }
    false
}

/// Whether a DequantizeLinear in front of a node is moved behind it. From opset 21 on the quantizers that this makes of int8
/// are refused.
#[must_use]
pub fn takes_dequantize(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    at.domain().is_empty()
        && matches!(at.op_type(), "MaxPool" | "Reshape" | "Slice" | "Squeeze" | "Transpose" | "Unsqueeze")
}
