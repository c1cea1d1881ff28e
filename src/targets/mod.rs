//! What each runtime executes quantized: one TOML profile per target.
//!
//! A profile is used in two places only: the planner chooses within it, and [`check`] proves the finished model against
//! it. Passes do not know the target.

pub mod check;
pub mod layout;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::document;
use crate::error::{Error, Kind, Result};
use crate::nearest::nearest;
use crate::onnx::DataType;
use crate::ops::Form;
use crate::quant::{Format, ScaleDtype};

/// Profiles that come with amax, by name.
const BUILT_IN: &[(&str, &str)] = &[
    ("ort-cpu", include_str!("ort-cpu.toml")),
    ("ort-cpu-vnni", include_str!("ort-cpu-vnni.toml")),
    ("tensorrt", include_str!("tensorrt.toml")),
    ("generic", include_str!("generic.toml")),
];

/// The default profile.
pub const DEFAULT: &str = "ort-cpu";

/// A runtime's profile.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools, reason = "they are keys of a document, each on its own")]
#[non_exhaustive]
pub struct Target {
    /// Name, from the name of the file.
    #[serde(default)]
    pub name: String,
    /// One line for people.
    pub summary: String,
    /// The versions of the runtime that these claims were executed on; empty where none was.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub executed: String,
    /// Newest opset that it loads.
    pub opset_max: i64,
    /// Newest IR version that it loads.
    pub ir_max: i64,
    /// Element types that it quantizes to and dequantizes from.
    pub formats: Vec<Format>,
    /// Those of them that activations may have around any operator.
    pub activation_formats: Vec<Format>,
    /// Float types in which it computes with quantized weights; models of others become float32.
    #[serde(default = "float")]
    pub floats: Vec<DataType>,
    /// 8-bit scale types that groups may have.
    #[serde(default)]
    pub block_scales: Vec<ScaleDtype>,
    /// Whether quantizers are written as float operators, so that every format can be had.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub simulate: bool,
    /// Storage formats of quantized constants; the first that fits an operator is the default.
    #[serde(default = "qdq")]
    pub forms: Vec<Form>,
    /// A product with a dequantized 2-bit weight is correct only if the number of columns is a multiple of this.
    #[serde(default = "one")]
    pub two_bit_columns: usize,
    /// Whether scales of weights may be negative where they only multiply quantized values.
    #[serde(default)]
    pub signed_scales: bool,
    /// Where Q/DQ pairs go.
    pub placement: Placement,
    /// How biases are stored.
    pub bias: BiasForm,
    /// Whether zero points may be other than 0.
    #[serde(default = "yes")]
    pub zero_points: bool,
    /// Whether DynamicQuantizeLinear in front of a product is fused.
    #[serde(default)]
    pub dynamic: bool,
    /// Whether int8 weights must keep adjacent pairs from saturating 16 bits.
    #[serde(default)]
    pub pair_safe: bool,
    /// Which inputs of a residual sum are quantized.
    #[serde(default)]
    pub residual: Residual,
    /// Activations.
    pub activation: Slot,
    /// Weights.
    pub weight: Slot,
    /// Weights that are the left operand of a product; default: as `weight`.
    pub left_weight: Option<Slot>,
    /// Operators that run in integers if their inputs are quantized.
    #[serde(default)]
    pub anchor: Vec<Anchor>,
    /// Operators that run in integers between quantized neighbours.
    #[serde(default)]
    pub join: Ops,
    /// Operators that only move quantized values, with one scale on both sides.
    #[serde(default)]
    pub carry: Ops,
    /// Operators that vanish into the quantizer after them.
    #[serde(default)]
    pub absorb: Ops,
}

fn float() -> Vec<DataType> {
    vec![DataType::Float]
}

fn one() -> usize {
    1
}

fn yes() -> bool {
    true
}

fn qdq() -> Vec<Form> {
    vec![Form::Qdq]
}

/// Where Q/DQ pairs go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Around what the target fuses.
    Fused,
    /// At the inputs of anchors only.
    Inputs,
    /// Around every operator of the table.
    Everywhere,
}

/// How biases are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BiasForm {
    /// int32 at exactly the product of input and weight scale.
    Int32,
    /// Unchanged, in float.
    Float,
}

/// Which inputs of a residual sum are quantized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Residual {
    /// Those that the placement chooses.
    #[default]
    Both,
    /// Only the input that does not come from the fused convolution.
    Shortcut,
}

/// The format of one kind of tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Element format.
    pub dtype: Format,
    /// Whether the zero point is fixed.
    pub symmetric: bool,
    /// One scale per output channel instead of one per tensor.
    #[serde(default)]
    pub per_channel: bool,
}

/// An operator that runs in integers if its inputs are quantized.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor {
    /// Operator of the default domain.
    pub op: String,
    /// Runs in integers only if its output is quantized too.
    #[serde(default)]
    pub output: bool,
    /// Its data input may be quantized at run time.
    #[serde(default)]
    pub dynamic: bool,
}

/// A list of operators.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ops {
    /// Operators of the default domain.
    pub ops: Vec<String>,
}

impl Ops {
    /// Whether `op` is listed.
    #[must_use]
    pub fn has(&self, op: &str) -> bool {
        self.ops.iter().any(|o| o == op)
    }
}

/// Runtimes and devices without a profile, by the names that users know them by.
const ELSEWHERE: &[&str] =
    &["coreml", "cuda", "directml", "dml", "gpu", "hailo", "npu", "openvino", "qnn", "rknn", "rocm", "vitis"];

impl Target {
    /// Whether onnxruntime is what runs models of this target, on a CPU.
    #[must_use]
    pub fn is_onnxruntime(&self) -> bool {
        self.executed.starts_with("onnxruntime ")
    }

    /// The anchor row of an operator.
    #[must_use]
    pub fn anchor(&self, op: &str) -> Option<&Anchor> {
        self.anchor.iter().find(|a| a.op == op)
    }

    /// The same runtime with quantizers written as float operators: every format is possible at every opset.
    #[must_use]
    pub fn simulated(mut self) -> Self {
        self.formats = Format::ALL.into_iter().filter(|&f| f != Format::Int32).collect();
        self.activation_formats.clone_from(&self.formats);
        self.block_scales = ScaleDtype::BLOCKS.to_vec();
        self.forms = vec![Form::Qdq];
        self.floats = float();
        self.simulate = true;
        self.zero_points = true;
        self
    }

    /// A built-in profile by name, or the profile in a TOML file.
    ///
    /// # Errors
    /// Neither a built-in name nor a readable file, or a file that is not a profile.
    pub fn load(name: &str) -> Result<Self> {
        if let Some((name, text)) = BUILT_IN.iter().find(|(n, _)| *n == name) {
            return Self::parse(name, text);
        }
        let path = Path::new(name);
        if path.extension().is_some_and(|e| e == "toml") {
            let text = document::read(path, "target")?;
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            return Self::parse(&stem, &text).map_err(|e| e.in_file(path));
        }
        let names: Vec<&str> = names().collect();
        let error = Error::new(Kind::Config, format!("there is no target \"{name}\""));
        let list = format!("targets are {}, or the path of a .toml profile", names.join(", "));
        Err(match nearest(name, names) {
            Some(near) => error.with_hint(format!("did you mean \"{near}\"? {list}")),
            None if ELSEWHERE.contains(&name.to_lowercase().as_str()) => error.with_hint(format!(
                "nothing here knows its kernels: generic puts quantizers wherever the operators allow; {list}"
            )),
            None => error.with_hint(list),
        })
    }

    /// The profile in a text, under a name.
    ///
    /// # Errors
    /// A text that is not a profile.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut target: Self = toml::from_str(text).map_err(|e| document::syntax(text, &e))?;
        name.clone_into(&mut target.name);
        for op in target.anchor.iter().map(|a| &a.op).chain(&target.join.ops).chain(&target.carry.ops) {
            if crate::ops::find(op).is_none() {
                return Err(Error::new(Kind::Config, format!("the operator table has no row for \"{op}\"")));
            }
        }
        if let Some(other) = target.block_scales.iter().find(|scale| !scale.is_block()) {
            let message = format!("block_scales: scales of blocks have 8 bits, {} has more", other.name());
            return Err(Error::new(Kind::Config, message).with_hint("float8e4m3fn and float8e8m0 are there"));
        }
        Ok(target)
    }
}

/// Names of the built-in profiles.
pub fn names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(n, _)| *n)
}
