//! Typed views of nodes: what an operator's attributes say, each with the default that its schema gives it.
//!
//! `Gemm::of(node)` is `None` where the node is none. Views read attributes alone; what inputs say is the model's to tell.

use super::{Node, canonical_domain};
use crate::onnx::{AttributeProto, DataType, NodeProto};

/// The domain of onnxruntime's own operators.
pub const MICROSOFT: &str = "com.microsoft";

/// What a view reads: a node of a model, or the message of one.
pub trait Operator {
    /// Its domain; empty for the default one, however the file spells that.
    fn domain(&self) -> &str;
    /// Its operator.
    fn op_type(&self) -> &str;
    /// The attribute of this name.
    fn attribute(&self, name: &str) -> Option<&AttributeProto>;
}

impl Operator for Node {
    fn domain(&self) -> &str {
        self.domain()
    }
    fn op_type(&self) -> &str {
        self.op_type()
    }
    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attr(name).map(super::Attr::proto)
    }
}

impl Operator for NodeProto {
    fn domain(&self) -> &str {
        canonical_domain(self.domain.as_deref().unwrap_or(""))
    }
    fn op_type(&self) -> &str {
        self.op_type.as_deref().unwrap_or("")
    }
    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|a| a.name.as_deref() == Some(name))
    }
}

fn is(node: &impl Operator, domain: &str, op: &str) -> bool {
    node.op_type() == op && node.domain() == domain
}

fn int(node: &impl Operator, name: &str) -> Option<i64> {
    node.attribute(name)?.i
}

fn size(node: &impl Operator, name: &str) -> Option<usize> {
    int(node, name).and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)
}

fn flag(node: &impl Operator, name: &str) -> bool {
    int(node, name).unwrap_or(0) != 0
}

fn float(node: &impl Operator, name: &str) -> Option<f32> {
    node.attribute(name)?.f
}

fn dtype(node: &impl Operator, name: &str) -> Option<DataType> {
    int(node, name).and_then(|code| DataType::from_code(i32::try_from(code).ok()?))
}

/// `axis` counted from the front of a tensor of this rank; `None` where it lies outside.
#[must_use]
pub fn axis_in(axis: i64, rank: usize) -> Option<usize> {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|&axis| axis < rank)
}

/// `Gemm`, and onnxruntime's `QGemm`, which has no `beta`. The default is what a `MatMul` of matrices does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gemm {
    /// Whether the left operand is `[K, M]`.
    pub trans_a: bool,
    /// Whether the right operand is `[N, K]`.
    pub trans_b: bool,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what is added.
    pub beta: f32,
}

impl Default for Gemm {
    fn default() -> Self {
        Self { trans_a: false, trans_b: false, alpha: 1.0, beta: 1.0 }
    }
}

impl Gemm {
    /// What the attributes of a `Gemm` or `QGemm` say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        (is(node, "", "Gemm") || is(node, MICROSOFT, "QGemm")).then(|| Self {
            trans_a: flag(node, "transA"),
            trans_b: flag(node, "transB"),
            alpha: float(node, "alpha").unwrap_or(1.0),
            beta: float(node, "beta").unwrap_or(1.0),
        })
    }

    /// Whether it multiplies by no factors: `beta` means nothing without a third operand.
    #[must_use]
    pub fn is_plain(&self, has_bias: bool) -> bool {
        self.alpha.to_bits() == 1.0f32.to_bits() && (!has_bias || self.beta.to_bits() == 1.0f32.to_bits())
    }

    /// The axis of the right operand that has the columns of the product.
    #[must_use]
    pub fn columns(&self) -> usize {
        usize::from(!self.trans_b)
    }
}

/// `Conv` and `ConvTranspose`, and those on quantized values: `ConvInteger`, `QLinearConv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// Into how many parts the channels are divided; at least 1.
    pub group: usize,
}

impl Conv {
    /// What the attributes of a convolution say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        let any = matches!(node.op_type(), "Conv" | "ConvTranspose" | "ConvInteger" | "QLinearConv");
        (any && node.domain().is_empty()).then(|| Self { group: size(node, "group").unwrap_or(1) })
    }
}

/// `Gather`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gather {
    /// The axis that slices are taken along; negative from the back.
    pub axis: i64,
}

impl Gather {
    /// What the attributes of a `Gather` say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        is(node, "", "Gather").then(|| Self { axis: int(node, "axis").unwrap_or(0) })
    }
}

/// `Clip`, whose bounds are attributes before opset 11.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// The lower bound, where it is an attribute.
    pub min: Option<f32>,
    /// The upper bound, where it is an attribute.
    pub max: Option<f32>,
}

impl Clip {
    /// What the attributes of a `Clip` say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        is(node, "", "Clip").then(|| Self { min: float(node, "min"), max: float(node, "max") })
    }
}

/// `QuantizeLinear` and `DequantizeLinear` of any domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantizer {
    /// The axis of the scales, or the one that blocks cut; negative from the back.
    pub axis: i64,
    /// Elements that share a scale along `axis`; 0 where the scales are not in blocks.
    pub block_size: i64,
    /// Type of the result, where it is said.
    pub output_dtype: Option<DataType>,
    /// Whether a `QuantizeLinear` to an 8-bit float clips.
    pub saturate: bool,
}

impl Quantizer {
    /// What the attributes of a `QuantizeLinear` or `DequantizeLinear` say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        matches!(node.op_type(), "QuantizeLinear" | "DequantizeLinear").then(|| Self {
            axis: int(node, "axis").unwrap_or(1),
            block_size: int(node, "block_size").unwrap_or(0),
            output_dtype: dtype(node, "output_dtype"),
            saturate: int(node, "saturate") != Some(0),
        })
    }
}

/// onnxruntime's `MatMulNBits`. What its schema requires is `None` where it is missing or not positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatMulNBits {
    /// Length of the sum.
    pub k: Option<usize>,
    /// Columns of the product.
    pub n: Option<usize>,
    /// Width of a quantized value.
    pub bits: i64,
    /// Elements that share a scale along the sum.
    pub block_size: Option<usize>,
}

impl MatMulNBits {
    /// What the attributes of a `MatMulNBits` say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        is(node, MICROSOFT, "MatMulNBits").then(|| Self {
            k: size(node, "K"),
            n: size(node, "N"),
            bits: int(node, "bits").unwrap_or(4),
            block_size: size(node, "block_size"),
        })
    }
}

/// onnxruntime's `GatherBlockQuantized`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GatherBlockQuantized {
    /// The axis that slices are taken along; negative from the back.
    pub gather_axis: i64,
    /// The axis that blocks cut; negative from the back.
    pub quantize_axis: i64,
    /// Elements that share a scale.
    pub block_size: i64,
    /// Width of a quantized value, where these are packed into bytes.
    pub bits: i64,
}

impl GatherBlockQuantized {
    /// What the attributes of a `GatherBlockQuantized` say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        is(node, MICROSOFT, "GatherBlockQuantized").then(|| Self {
            gather_axis: int(node, "gather_axis").unwrap_or(0),
            quantize_axis: int(node, "quantize_axis").unwrap_or(1),
            block_size: int(node, "block_size").unwrap_or(128),
            bits: int(node, "bits").unwrap_or(4),
        })
    }
}

/// `LSTM`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lstm {
    /// Whether the batch is the first axis of its data.
    pub batch_first: bool,
}

impl Lstm {
    /// What the attributes of an `LSTM` say.
    #[must_use]
    pub fn of(node: &impl Operator) -> Option<Self> {
        is(node, "", "LSTM").then(|| Self { batch_first: flag(node, "layout") })
    }
}
