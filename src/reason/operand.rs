//! What of a node a reason is about.

use serde::{Deserialize, Serialize};

/// What of a node a reason is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operand {
    /// An input that is computed.
    Input,
    /// The first output.
    Output,
    /// The weight.
    Weight,
    /// The bias.
    Bias,
    /// An operand of an element-wise operator that is constant.
    ConstantOperand,
    /// The scale of a quantizer.
    Scale,
    /// The zero point of a quantizer.
    ZeroPoint,
    /// The scale of each token.
    TokenScale,
    /// What a DequantizeLinear, or an operator on quantized values, reads.
    QuantizedData,
    /// The indices of a lookup.
    Indices,
    /// What an operator on quantized values reads.
    Operand,
    /// The mean of a normalization.
    Mean,
    /// The variance of a normalization.
    Variance,
    /// Whether a node is in training mode.
    TrainingMode,
    /// The mask of a Dropout.
    Mask,
    /// The bounds of a Clip.
    Bounds,
    /// The graph of a node.
    Graph,
}

impl std::fmt::Display for Operand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Output => "output",
            Self::Weight => "weight",
            Self::Bias => "bias",
            Self::ConstantOperand => "constant operand",
            Self::Scale => "scale",
            Self::ZeroPoint => "zero point",
            Self::TokenScale => "per-token scale",
            Self::QuantizedData => "quantized data",
            Self::Indices => "input of indices",
            Self::Operand => "operand",
            Self::Mean => "mean",
            Self::Variance => "variance",
            Self::TrainingMode => "training mode",
            Self::Mask => "mask",
            Self::Bounds => "range of bounds",
            Self::Graph => "graph",
        })
    }
}
