//! Every decision, before any number is known.
//!
//! [`plan`] reads the structure of the model, the configuration and the target, and says which tensors get a
//! Quantize/Dequantize pair, in which format, which of them share one scale, which weights and biases are folded, and
//! why everything else is left alone. It reads no tensor data and no samples. What calibration finds out later (a site
//! that no range serves well) comes back as a [`Veto`], and the plan is made again.
//!
//! Placement for `fused` targets:
//!
//! 1. *Anchors* (Conv, Gemm, MatMul with a constant operand) want their data input quantized; a Conv also its output.
//! 2. The output of an operator is taken after a Relu or Clip that vanishes into the quantizer.
//! 3. *Joins* (Add, Mul, Concat, …) run in integers where one input already is and the output is wanted so.
//! 4. *Carriers* (Reshape, MaxPool, …) between two such values share one scale on both sides.
//!
//! Tensors are named, not numbered: a plan outlives the process. A node is named by its first output, which is unique.

mod algorithms;
mod anchor;
mod by_hand;
mod constants;
mod corrections;
mod document;
pub mod explain;
mod finish;
pub mod form;
mod kernels;
mod place;
mod planner;
mod recurrent;
mod site;
mod skips;
pub mod smoothing;
mod spread;
mod tokens;
mod wants;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use planner::{Knowledge, Veto, plan};

use crate::ir::Model;
use crate::onnx::DataType;
use crate::ops::{Form, Reduction};
use crate::quant::ScaleDtype;
use crate::quant::algorithm::Method;
pub use crate::quant::{Given, Scheme};
use crate::reason::Reason;

/// Version of the plan document.
pub const SCHEMA: u32 = 3;

/// Every decision about a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Plan {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name of the target.
    pub target: String,
    /// Version of the default opset that the result needs.
    pub opset: i64,
    /// Whether floats of 16 bits become float32 first: the target computes with no others where it quantizes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub float32: bool,
    /// Whether quantizers become float operators in the end, which any runtime has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub simulate: bool,
    /// Inputs that are divided channel by channel before anything is quantized. All other names are those of the model after
    /// that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub smoothing: Vec<Smoothing>,
    /// Quantized activations, by the name of the pair: that of the tensor, or for a second pair on one tensor the tensor's
    /// with the format behind it.
    pub activations: BTreeMap<String, Activation>,
    /// Quantized constants.
    pub weights: Vec<Weight>,
    /// Quantized biases.
    pub biases: Vec<Bias>,
    /// Biases that take up what quantization moves the mean of each output channel by, as samples show it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub corrections: Vec<Correction>,
    /// Outputs of Adds behind a product that become a Sum of two, which is the same: onnxruntime makes a Gemm of a MatMul
    /// and an Add before it looks for quantizers, and a Gemm with a float bias does not run in integers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sums: Vec<String>,
    /// Inputs with an operator in front that changes nothing and that the runtime moves nothing across.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub barriers: Vec<Barrier>,
    /// Inputs that get a scale for each token, in operators.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<Token>,
    /// Constants that are stored more than once, since their readers want them in different formats.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub splits: Vec<Split>,
    /// What stays float, and why.
    pub skipped: Vec<Skip>,
}

impl Plan {
    /// The same plan, for nothing.
    pub(crate) fn without_sites(&self) -> Self {
        Self {
            schema: self.schema,
            target: self.target.clone(),
            opset: self.opset,
            float32: self.float32,
            simulate: self.simulate,
            smoothing: Vec::new(),
            activations: BTreeMap::new(),
            weights: Vec::new(),
            biases: Vec::new(),
            corrections: Vec::new(),
            sums: Vec::new(),
            barriers: Vec::new(),
            tokens: Vec::new(),
            splits: Vec::new(),
            skipped: Vec::new(),
        }
    }
}

/// The names of the tensors of the main graph.
fn tensor_names(model: &Model) -> impl Iterator<Item = &str> {
    let graph = model.graph(model.main());
    let outputs = graph.nodes().iter().flat_map(|&n| model.node(n).outputs().iter().flatten().copied());
    graph.inputs().chain(graph.initializers().iter().copied()).chain(outputs).map(|v| model.value(v).name())
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// An input of products that is divided by one number for each channel, by which their weights are multiplied: channels of
/// like ranges are served better by one scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Smoothing {
    /// The tensor.
    pub tensor: String,
    /// The inputs of products that read it.
    pub readers: Vec<Slot>,
    /// How the numbers follow from ranges.
    pub method: Method,
    /// The exponent in them, from 0 to 1: how much of the range moves to the weights.
    pub alpha: f64,
    /// What divides.
    pub divided: Divided,
}

/// What divides an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Divided {
    /// What makes it, by its constants: it costs nothing when the model runs.
    Producer,
    /// A Mul in front of the products.
    Mul,
}

/// An input with an operator in front that changes nothing and that the runtime moves nothing across.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Barrier {
    /// Which input of which node.
    pub at: Slot,
    /// What is stopped.
    pub stop: Stop,
    /// Why.
    pub why: Reason,
}

/// What a barrier stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// Quantizers, and fusion: a Sum of one.
    Quantizers,
    /// Transposes as well: a Trilu that keeps everything.
    Transposes,
}

impl Stop {
    /// The opset that it needs.
    #[must_use]
    pub fn opset(self) -> i64 {
        match self {
            Self::Quantizers => 13,
            Self::Transposes => 14,
        }
    }
}

/// An input that is fake quantized to int8, asymmetric, with a scale for each token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// `<node>.input`.
    pub site: String,
    /// Which input of which node.
    pub at: Slot,
    /// The least scale.
    pub eps: f32,
}

/// A constant that is stored more than once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// The initializer.
    pub tensor: String,
    /// Sites that read it, by what they want.
    pub sites: Vec<Vec<String>>,
    /// In what they differ.
    pub why: Reason,
}

/// A Quantize/Dequantize pair on an activation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activation {
    /// The float tensor, where the pair is not named after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// How it is quantized.
    pub quantizer: Scheme,
    /// Where the scale comes from.
    pub mode: Mode,
    /// The pair whose dequantized result this one reads, where formats meet; otherwise it reads the float tensor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub converts: Option<String>,
    /// The pair whose scale and zero point this one has; itself, unless it shares.
    pub scale_of: String,
    /// Values lie in this interval whatever the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<(f32, f32)>,
    /// Who reads the dequantized tensor.
    pub readers: Readers,
    /// A Sum of one stands in front of the quantizer: onnxruntime would quantize the weight of a float Conv,
    /// ConvTranspose or Gemm between a Dequantize and a Quantize by itself, with one scale for all channels.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fence: bool,
    /// Why it is quantized.
    pub why: Reason,
}

/// Where a scale comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Calibration.
    Static,
    /// The tensor itself, each time the model runs.
    Dynamic,
}

/// Who reads a dequantized tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readers {
    /// Every user: the producer runs in integers, the float tensor does not exist.
    All,
    /// These inputs; others read the float tensor.
    Listed(Vec<Slot>),
}

/// One input of one node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// First output of the node.
    pub node: String,
    /// Index of the input.
    pub input: usize,
}

/// A quantized constant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// `<node>.weight`, or `<node>.input` for a constant operand of an element-wise operator.
    pub site: String,
    /// Which input of which node reads it.
    pub at: Slot,
    /// The initializer.
    pub tensor: String,
    /// How it is quantized.
    pub quantizer: Scheme,
    /// The float type that it has in the graph.
    #[serde(default = "float", skip_serializing_if = "is_float")]
    pub float: DataType,
    /// It is the right operand of a Gemm with `transB`, and stored as `[K, N]`: the operator loses `transB`, so that
    /// groups run along axis 0. The quantizer's axes are those of `[K, N]`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transpose: bool,
    /// The order of the reduction whose adjacent pairs must not saturate 16 bits, where that matters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pair_safe: Option<Reduction>,
    /// How it is stored.
    #[serde(default, skip_serializing_if = "is_default")]
    pub form: Form,
    /// `accuracy_level` of a `MatMulNBits`; 4 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_level: Option<u8>,
    /// Why it is quantized this way.
    pub why: Reason,
    /// Why it is not stored in the form that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gave_way: Option<Reason>,
}

impl Weight {
    /// The opset and the IR version that have a DequantizeLinear of it, and the name of what needs them.
    #[must_use]
    pub fn since(&self) -> (i64, i64, &'static str) {
        let need = self.quantizer.since();
        let own = if !self.float.is_half() {
            need
        } else if self.has_float_scales() || self.quantizer.scale_dtype.is_block() {
            (23, 11, "scales of another type than its result")
        } else {
            (19, 9, self.float.name())
        };
        if own.0 > need.0 { own } else { need }
    }

    /// Whether it has float32 scales beside a float of 16 bits.
    #[must_use]
    pub fn has_float_scales(&self) -> bool {
        self.float.is_half() && self.quantizer.scale_dtype == ScaleDtype::Float32
    }
}

fn float() -> DataType {
    DataType::Float
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_float(dtype: &DataType) -> bool {
    *dtype == DataType::Float
}

/// A bias stored as int32 at the product of the scales of input and weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bias {
    /// `<node>.bias`.
    pub site: String,
    /// Which input of which node reads it.
    pub at: Slot,
    /// The initializer: one value per channel, or one for all.
    pub tensor: String,
    /// Output channels.
    pub channels: usize,
    /// The activation whose scale is a factor.
    pub activation: String,
    /// Index into [`Plan::weights`] of the weight whose scale is the other.
    pub weight: usize,
    /// It is stored as it is, and the runtime quantizes it: the scale of the weight alone makes sure that it fits.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub float: bool,
}

/// A bias that takes up what quantization moves means by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Correction {
    /// `<node>.bias`, of the product.
    pub site: String,
    /// Which input of which node reads the bias: of the product, or of the Add behind it.
    pub at: Slot,
    /// First output of the product.
    pub product: String,
    /// The bias, one value for each output channel.
    pub tensor: String,
}

/// Something that stays float.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skip {
    /// Node.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Bytes of constants it reads that stay as they are.
    pub bytes: u64,
    /// Why.
    pub why: Reason,
}
