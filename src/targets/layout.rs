//! What the graph optimizers of onnxruntime move where it does not belong.
//!
//! Its convolutions on integers have the channels last. Transposes beside them are moved down through what follows, until
//! they meet others. Operators that say which axes they are about are handled wrongly on the way.

use std::collections::HashSet;

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

/// The nodes to which Transposes are moved, from those of which `source` is true. Producers come before consumers in `nodes`.
#[must_use]
pub fn reached(
    model: &Model,
    nodes: impl IntoIterator<Item = NodeId>,
    source: &dyn Fn(NodeId) -> bool,
) -> HashSet<NodeId> {
    let mut found = HashSet::new();
    for node in nodes {
        let mut before = model.node(node).inputs().iter().flatten().filter_map(|&v| model.producer(v));
        let stops = |n| matches!(model.node(n).op_type(), "Conv" | "ConvTranspose" | "Gemm" | "MatMul" | "Trilu");
        if before.any(|n| source(n) || !stops(n) && found.contains(&n)) {
            found.insert(node);
        }
    }
    found
}

/// Whether a DequantizeLinear in front of a node is moved behind it. From opset 21 on the quantizers that this makes of int8
/// are refused.
#[must_use]
pub fn takes_dequantize(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    at.domain().is_empty()
        && matches!(at.op_type(), "MaxPool" | "Reshape" | "Slice" | "Squeeze" | "Transpose" | "Unsqueeze")
}
