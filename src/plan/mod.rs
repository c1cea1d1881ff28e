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
mod spread;
mod tokens;
mod wants;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use planner::{Knowledge, Veto, plan};

use crate::config::algorithm::Algorithm;
use crate::config::spec::{Arithmetic, Form, ObserverKind, Postprocess, ScaleDtype, ScaleType};
use crate::ir::Model;
use crate::numerics::{Format, Granularity, MxRounding, Round};
use crate::onnx::DataType;
use crate::ops::Reduction;
use crate::reason::Reason;

/// Version of the plan document.
pub const SCHEMA: u32 = 3;

/// Every decision about a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name of the target.
    pub target: String,
    /// Version of the default operator set that the result needs.
    pub opset: i64,
    /// Whether quantizers become float operators in the end, which any runtime has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub simulate: bool,
    /// Quantized activations, by the name of the pair: that of the tensor, or for a second pair on one tensor the tensor's
    /// with the format behind it.
    pub activations: BTreeMap<String, Activation>,
    /// Quantized constants.
    pub weights: Vec<Weight>,
    /// Quantized biases.
    pub biases: Vec<Bias>,
    /// Outputs of Adds behind a product that become a Sum of two, which is the same: onnxruntime makes a Gemm of a MatMul
    /// and an Add before it looks for quantizers, and a Gemm with a float bias does not run in integers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sums: Vec<String>,
    /// Inputs that get a scale for each token, in operators.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<Token>,
    /// Constants that are stored more than once, since their readers want them in different formats.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub splits: Vec<Split>,
    /// What stays float, and why.
    pub skipped: Vec<Skip>,
}

/// How numbers become codes: a spec with nothing left open.
#[allow(clippy::struct_excessive_bools, reason = "the document's own keys")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Element format.
    pub dtype: Format,
    /// Whether the zero point is fixed at the middle code.
    pub symmetric: bool,
    /// How many values share a scale.
    #[serde(default = "per_tensor", skip_serializing_if = "is_per_tensor")]
    pub granularity: Granularity,
    /// Whether the lowest code is left unused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub narrow_range: bool,
    /// Whether one bit of the range is left unused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reduce_range: bool,
    /// How the range is chosen.
    #[serde(default, skip_serializing_if = "is_default")]
    pub observer: ObserverKind,
    /// Percent of the values that the percentile observer keeps in range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percentile: Option<f64>,
    /// The power of the error that the mse observer makes least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mse_p: Option<f64>,
    /// Which scales are allowed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_type: ScaleType,
    /// The precision that scales are rounded to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_dtype: ScaleDtype,
    /// How the power of two of a block follows from its largest magnitude.
    #[serde(default, skip_serializing_if = "is_default")]
    pub mx_rounding: MxRounding,
    /// How quotients become codes; half to even for everything but constants.
    #[serde(default, skip_serializing_if = "is_default")]
    pub round: Round,
    /// The least scale; 0 for none.
    #[serde(default, skip_serializing_if = "is_default")]
    pub eps: f32,
    /// What becomes of the range that the observer chose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postprocess: Option<Postprocess>,
    /// Whether the scale may be negative, for the sake of the lowest code.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub signed_scale: bool,
    /// Whose arithmetic makes scales and codes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub arithmetic: Arithmetic,
    /// Whether zero points may lie between codes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub float_zero_point: bool,
    /// What improves scale and zero point of a weight beyond its range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Box<Algorithm>>,
    /// Numbers given by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<Given>,
}

/// Numbers given by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Given {
    /// The smallest and the largest value.
    Range(f32, f32),
    /// Scales and zero points: one, or as many as the granularity has.
    Scales {
        /// Sizes of a step.
        scales: Vec<f32>,
        /// Codes of zero, as many.
        zero_points: Vec<i32>,
    },
}

/// The names of the tensors of the main graph.
fn tensor_names(model: &Model) -> impl Iterator<Item = &str> {
    let graph = model.graph(model.main());
    let outputs = graph.nodes().iter().flat_map(|&n| model.node(n).outputs().iter().flatten().copied());
    graph.inputs().chain(graph.initializers().iter().copied()).chain(outputs).map(|v| model.value(v).name())
}

fn per_tensor() -> Granularity {
    Granularity::PerTensor
}

fn is_per_tensor(granularity: &Granularity) -> bool {
    *granularity == Granularity::PerTensor
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Scheme {
    /// A quantizer of a format with nothing else asked for; the lowest code is left unused where symmetric.
    #[must_use]
    pub fn new(dtype: Format, symmetric: bool, granularity: Granularity) -> Self {
        Self {
            dtype,
            symmetric,
            granularity,
            narrow_range: symmetric && dtype.is_integer(),
            reduce_range: false,
            observer: ObserverKind::Minmax,
            percentile: None,
            mse_p: None,
            scale_type: ScaleType::Float,
            scale_dtype: ScaleDtype::Float32,
            mx_rounding: MxRounding::default(),
            round: Round::HalfEven,
            eps: 0.0,
            postprocess: None,
            signed_scale: false,
            arithmetic: Arithmetic::Onnx,
            float_zero_point: false,
            algorithm: None,
            given: None,
        }
    }

    /// The operator set and the IR version from which on Quantize and Dequantize have this, and the name of what needs them.
    #[must_use]
    pub fn since(&self) -> (i64, i64, &'static str) {
        let (opset, ir) = DataType::from(self.dtype).quantizers_since().unwrap_or_default();
        let opset = opset.max(13);
        let groups =
            matches!(self.granularity, Granularity::PerGroup { .. }).then_some((21, 10, "a scale for each group"));
        let scale = match self.scale_dtype {
            ScaleDtype::Float8e8m0 => DataType::Float8e8m0.quantizers_since(),
            ScaleDtype::Float8e4m3fn => DataType::Float8e4m3fn.quantizers_since(),
            _ => None,
        };
        let scale = scale.map(|(opset, ir)| (opset, ir, self.scale_dtype.name()));
        [groups, scale]
            .into_iter()
            .flatten()
            .fold((opset, ir, self.dtype.name()), |most, need| if need.0 > most.0 { need } else { most })
    }

    /// In words: `int4, groups of 32 on axis 0`.
    #[must_use]
    pub fn describe(&self) -> String {
        let plain = Self::new(self.dtype, self.symmetric, self.granularity);
        let mut words = vec![self.dtype.name().to_owned()];
        if self.dtype.is_integer() {
            words.push(if self.symmetric { "symmetric" } else { "asymmetric" }.to_owned());
        }
        match self.granularity {
            Granularity::PerTensor => words.push("one scale".to_owned()),
            Granularity::PerChannel { axis } => words.push(format!("a scale for each index of axis {axis}")),
            Granularity::PerGroup { axis, size } => words.push(format!("groups of {size} on axis {axis}")),
        }
        // What is not as usual, under the names that the plan has for it.
        if let (Ok(serde_json::Value::Object(own)), Ok(serde_json::Value::Object(usual))) =
            (serde_json::to_value(self), serde_json::to_value(&plain))
        {
            let differing: BTreeSet<&String> =
                own.keys().chain(usual.keys()).filter(|k| own.get(*k) != usual.get(*k)).collect();
            for key in differing {
                words.push(format!(
                    "{key} {}",
                    own.get(key).map_or("off".to_owned(), |v| v.to_string().replace('"', ""))
                ));
            }
        }
        words.join(", ")
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

/// A bias stored as int32 at the product of the scales of input and weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bias {
    /// `<node>.bias`.
    pub site: String,
    /// Which input of which node reads it.
    pub at: Slot,
    /// The initializer: one value a channel, or one for all.
    pub tensor: String,
    /// Output channels.
    pub channels: usize,
    /// The activation whose scale is a factor.
    pub activation: String,
    /// Index into [`Plan::weights`] of the weight whose scale is the other.
    pub weight: usize,
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
