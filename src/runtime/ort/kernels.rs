//! What the optimizer made of a model, read off what it writes.

use std::collections::BTreeSet;

use crate::onnx::{GraphProto, ModelProto};
use crate::ops;
use crate::runtime::Kernels;

/// Products and recurrent layers, as the optimizer calls those that compute in float.
const FLOAT: [&str; 14] = [
    "Attention",
    "Conv",
    "ConvTranspose",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "GRU",
    "Gemm",
    "LSTM",
    "MatMul",
    "MoE",
    "NhwcFusedConv",
    "RNN",
];

/// Operators that unpack their weights themselves and compute in float.
const PACKED: [&str; 4] = ["GatherBlockQuantized", "MatMulBnb4", "MatMulNBits", "QMoE"];

impl Kernels {
    /// Counts the nodes of a model that the optimizer wrote, those of bodies among them.
    pub(super) fn of(model: &ModelProto) -> Self {
        let mut found = Self::default();
        if let Some(graph) = &model.graph {
            found.count(graph);
        }
        found.dequantized.sort();
        found.dequantized.dedup();
        found
    }

    fn count(&mut self, graph: &GraphProto) {
        let mut constants: BTreeSet<&str> = graph.initializer.iter().filter_map(|t| t.name.as_deref()).collect();
        for node in &graph.node {
            let op = node.op_type();
            if op == "Constant" {
                constants.extend(node.output.iter().map(String::as_str));
            }
            let first = node.input.first().map_or("", String::as_str);
            if op.ends_with("DequantizeLinear") && constants.contains(first) {
                self.dequantized.push(first.to_owned());
            }
            let counts = match op {
                _ if op.ends_with("QuantizeLinear") || op.ends_with("DequantizeLinear") => None,
                _ if PACKED.contains(&op) => Some(&mut self.packed),
                _ if ops::is_quantized(op) => Some(&mut self.integer),
                _ => FLOAT.contains(&op).then_some(&mut self.float),
            };
            if let Some(counts) = counts {
                *counts.entry(op.to_owned()).or_default() += 1;
            }
            for attribute in &node.attribute {
                attribute.g.iter().chain(&attribute.graphs).for_each(|body| self.count(body));
            }
        }
    }
}
