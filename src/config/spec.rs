//! What can be asked for at one site, field by field.

use serde::{Deserialize, Serialize};

pub use crate::ops::Form;
use crate::quant::algorithm::Algorithm;
pub use crate::quant::{
    Arithmetic, Block, Dtype, Format, MxRounding, ObserverKind, Postprocess, Round, ScaleDtype, ScaleType,
};
use crate::reason::Operand;

/// Declares [`Spec`], and one [`Field`] for each of its keys, so that no key can be forgotten in an overlay or a trace.
macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident / $variant:ident: $type:ty,)*) => {
        /// What is asked for at one kind of site. A key that is left out says nothing: an earlier level decides.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(deny_unknown_fields)]
        pub struct Spec {
            $($(#[$doc])* #[serde(default, skip_serializing_if = "Option::is_none")] pub $name: Option<$type>,)*
        }

        /// A key of [`Spec`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Field {
            $($(#[$doc])* $variant,)*
        }

        impl Field {
            /// Every key, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The key as it is written.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($name),)*
                }
            }
        }

        impl Spec {
            /// Takes every key that `later` has.
            pub fn overlay(&mut self, later: &Self) {
                $(if let Some(value) = &later.$name {
                    self.$name = Some(value.clone());
                })*
            }

            /// Takes one key of another spec.
            pub fn take(&mut self, other: &Self, field: Field) {
                match field {
                    $(Field::$variant => self.$name.clone_from(&other.$name),)*
                }
            }

            /// The value of a key, as it is written in TOML.
            #[must_use]
            pub fn written(&self, field: Field) -> Option<String> {
                match field {
                    $(Field::$variant => self.$name.as_ref().map(word),)*
                }
            }
        }
    };
}

fields! {
    /// Whether these sites are quantized. `true` takes back an earlier `false`; unset, the target decides.
    enable / Enable: bool,
    /// Number format of the codes.
    dtype / Dtype: Dtype,
    /// How many elements share a scale.
    granularity / Granularity: Share,
    /// The axis of `per-channel`, or the one that `per-group` cuts into groups; negative from the end. Unset: the output
    /// channels of the operator, and the axis it sums over.
    ch_axis / ChAxis: i64,
    /// Elements in a group of `per-group`.
    group_size / GroupSize: u32,
    /// Whether the zero point is fixed at the middle code.
    symmetric / Symmetric: bool,
    /// Whether the scale is found each time the model runs.
    dynamic / Dynamic: bool,
    /// How a range is chosen from what was seen.
    observer / Observer: ObserverKind,
    /// Share of the values that `observer = "percentile"` keeps in range, in percent.
    percentile / Percentile: f64,
    /// The power of the error that `observer = "mse"` makes least.
    mse_p / MseP: f64,
    /// Which scales are allowed.
    scale_type / ScaleType: ScaleType,
    /// The precision that scales are rounded to.
    scale_dtype / ScaleDtype: ScaleDtype,
    /// How the power of two of a block follows from its largest magnitude, where scales are `float8e8m0`.
    mx_rounding / MxRounding: MxRounding,
    /// How quotients become codes; activations are always rounded half to even.
    round / Round: Round,
    /// Whether the lowest code is left unused, as -128 of int8. Unset: where symmetric. A symmetric scale is
    /// amax / 127 with it and amax / 127.5 without.
    narrow_range / NarrowRange: bool,
    /// Whether one bit of the range is left unused: -64..64 of int8, 0..127 of uint8.
    reduce_range / ReduceRange: bool,
    /// The least scale, 0 for none; of two-level scales the least scale of a block, with `arithmetic = "mslk"` the least
    /// range. Above 0, scales are computed in float32 as torch does, whose scales always have a least one, which can move
    /// the last bit of asymmetric scales; weights whose neighbours must not saturate get plain scales, not searched ones.
    eps / Eps: f64,
    /// What becomes of the range that was chosen.
    postprocess / Postprocess: Postprocess,
    /// How a quantized constant is stored. Unset: the first of the target's forms that the operator and the format have.
    form / Form: Form,
    /// How exactly `form = "matmulnbits"` computes: 4 lets the runtime quantize the other operand to int8, 1 is float32, 0
    /// leaves it to the runtime.
    accuracy_level / AccuracyLevel: u8,
    /// Whether scales of weights may be negative, so that the value of largest magnitude always has the lowest code, of
    /// which there is one more: -8 of int4. Symmetric integers only.
    signed_scale / SignedScale: bool,
    /// Whose arithmetic makes scales and codes of weights, to the last bit.
    arithmetic / Arithmetic: Arithmetic,
}

/// A value as TOML writes it.
fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::Object(_)) => toml::Value::try_from(value).map(|v| v.to_string()).unwrap_or_default(),
        Ok(plain) => plain.to_string(),
        Err(_) => String::new(),
    }
}

/// How many elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Share {
    /// All.
    PerTensor,
    /// Those of one index along an axis.
    PerChannel,
    /// Runs of some length along an axis.
    PerGroup,
    /// Those of one position in all but the last axis; found at run time.
    PerToken,
}

impl Share {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PerTensor => "per-tensor",
            Self::PerChannel => "per-channel",
            Self::PerGroup => "per-group",
            Self::PerToken => "per-token",
        }
    }
}

/// What is asked for at the sites of some nodes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// Whether any of their sites is quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable: Option<bool>,
    /// Their activations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Spec>,
    /// Their results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Spec>,
    /// Their constant weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Spec>,
    /// Their constant biases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias: Option<Spec>,
    /// The algorithm for their weights, instead of that for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<crate::quant::algorithm::Written>"))]
    pub algorithm: Option<Algorithm>,
}

/// A kind of site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SiteKind {
    /// Data inputs of a node.
    Input,
    /// Outputs of a node.
    Output,
    /// A constant weight.
    Weight,
    /// A constant bias.
    Bias,
}

impl From<SiteKind> for Operand {
    fn from(kind: SiteKind) -> Self {
        match kind {
            SiteKind::Input => Self::Input,
            SiteKind::Output => Self::Output,
            SiteKind::Weight => Self::Weight,
            SiteKind::Bias => Self::Bias,
        }
    }
}

impl SiteKind {
    /// Every kind, in the order in which data flows.
    pub const ALL: [Self; 4] = [Self::Input, Self::Weight, Self::Bias, Self::Output];

    /// As it stands at the end of a site's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Output => "output",
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }
}

impl Level {
    /// What is asked for at one kind of site.
    #[must_use]
    pub fn spec(&self, kind: SiteKind) -> Option<&Spec> {
        match kind {
            SiteKind::Input => self.input.as_ref(),
            SiteKind::Output => self.output.as_ref(),
            SiteKind::Weight => self.weight.as_ref(),
            SiteKind::Bias => self.bias.as_ref(),
        }
    }

    /// The same, to be written.
    pub fn spec_mut(&mut self, kind: SiteKind) -> &mut Spec {
        let slot = match kind {
            SiteKind::Input => &mut self.input,
            SiteKind::Output => &mut self.output,
            SiteKind::Weight => &mut self.weight,
            SiteKind::Bias => &mut self.bias,
        };
        slot.get_or_insert_default()
    }
}
