//! What can be asked for at one site, field by field.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::numerics::{BlockScale, Format, MxRounding, Round};
pub use crate::ops::Form;

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
    /// The least scale; of two-level scales, the least scale of a block.
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

/// A number format of the configuration: those of [`Format`], and block formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "their names say it")]
pub enum Dtype {
    Int2,
    Uint2,
    Int4,
    Uint4,
    Int8,
    Uint8,
    Int16,
    Uint16,
    /// Biases only.
    Int32,
    Float8e4m3fn,
    Float8e4m3fnuz,
    Float8e5m2,
    Float8e5m2fnuz,
    Float6e2m3,
    Float6e3m2,
    Float4e2m1,
    /// Blocks of 32 float8e4m3fn with a power-of-two scale.
    Mxfp8,
    /// Blocks of 32 float8e5m2 with a power-of-two scale.
    Mxfp8e5m2,
    /// Blocks of 32 float6e2m3 with a power-of-two scale.
    Mxfp6e2m3,
    /// Blocks of 32 float6e3m2 with a power-of-two scale.
    Mxfp6e3m2,
    /// Blocks of 32 float4e2m1 with a power-of-two scale.
    Mxfp4,
    /// Blocks of 32 int8 with a power-of-two scale.
    Mxint8,
    /// Blocks of 16 float4e2m1 with a float8e4m3fn scale, and one float scale for all.
    Nvfp4,
}

impl Dtype {
    /// The element format, unless it is a block format.
    #[must_use]
    pub fn format(self) -> Option<Format> {
        Some(match self {
            Self::Int2 => Format::Int2,
            Self::Uint2 => Format::Uint2,
            Self::Int4 => Format::Int4,
            Self::Uint4 => Format::Uint4,
            Self::Int8 => Format::Int8,
            Self::Uint8 => Format::Uint8,
            Self::Int16 => Format::Int16,
            Self::Uint16 => Format::Uint16,
            Self::Int32 => Format::Int32,
            Self::Float8e4m3fn => Format::Float8e4m3fn,
            Self::Float8e4m3fnuz => Format::Float8e4m3fnuz,
            Self::Float8e5m2 => Format::Float8e5m2,
            Self::Float8e5m2fnuz => Format::Float8e5m2fnuz,
            Self::Float6e2m3 => Format::Float6e2m3,
            Self::Float6e3m2 => Format::Float6e3m2,
            Self::Float4e2m1 => Format::Float4e2m1,
            Self::Mxfp8
            | Self::Mxfp8e5m2
            | Self::Mxfp6e2m3
            | Self::Mxfp6e3m2
            | Self::Mxfp4
            | Self::Mxint8
            | Self::Nvfp4 => return None,
        })
    }

    /// What a block format consists of.
    #[must_use]
    pub fn block(self) -> Option<Block> {
        let mx = |format| Some(Block { format, size: 32, scale: ScaleDtype::Float8e8m0 });
        match self {
            Self::Mxfp8 => mx(Format::Float8e4m3fn),
            Self::Mxfp8e5m2 => mx(Format::Float8e5m2),
            Self::Mxfp6e2m3 => mx(Format::Float6e2m3),
            Self::Mxfp6e3m2 => mx(Format::Float6e3m2),
            Self::Mxfp4 => mx(Format::Float4e2m1),
            Self::Mxint8 => mx(Format::Int8),
            Self::Nvfp4 => Some(Block { format: Format::Float4e2m1, size: 16, scale: ScaleDtype::Float8e4m3fn }),
            _ => None,
        }
    }
}

/// What a block format consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Format of the elements.
    pub format: Format,
    /// Elements with one scale.
    pub size: u32,
    /// Format of the scales.
    pub scale: ScaleDtype,
}

impl From<Format> for Dtype {
    /// The name of a format.
    fn from(format: Format) -> Self {
        match format {
            Format::Int2 => Self::Int2,
            Format::Uint2 => Self::Uint2,
            Format::Int4 => Self::Int4,
            Format::Uint4 => Self::Uint4,
            Format::Int8 => Self::Int8,
            Format::Uint8 => Self::Uint8,
            Format::Int16 => Self::Int16,
            Format::Uint16 => Self::Uint16,
            Format::Int32 => Self::Int32,
            Format::Float8e4m3fn => Self::Float8e4m3fn,
            Format::Float8e4m3fnuz => Self::Float8e4m3fnuz,
            Format::Float8e5m2 => Self::Float8e5m2,
            Format::Float8e5m2fnuz => Self::Float8e5m2fnuz,
            Format::Float4e2m1 => Self::Float4e2m1,
            Format::Float6e2m3 => Self::Float6e2m3,
            Format::Float6e3m2 => Self::Float6e3m2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(word(self).trim_matches('"'))
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

/// How a range is chosen from what was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ObserverKind {
    /// The smallest and the largest value.
    #[default]
    Minmax,
    /// The mean of the samples' smallest and largest values.
    Mean,
    /// The range that holds a given share of the values.
    Percentile,
    /// The range of the least error.
    Mse,
    /// The range of the least Kullback–Leibler divergence.
    Entropy,
}

/// What becomes of amax, the largest magnitude of a range, before its scale is computed: it is multiplied, then clamped, then
/// rounded. Both ends of the range move in proportion. Numbers given by hand stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Postprocess {
    /// What amax is multiplied by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// What it is at least. A range of only 0 becomes that of 0 to `min`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// What it is at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Whether it is rounded up to a power of two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub power_of_two: bool,
}

impl Postprocess {
    /// What is wrong with the numbers, and a way out.
    ///
    /// # Errors
    /// Nothing to do, a factor that is not positive, a clamp that nothing is in.
    pub fn check(&self) -> Result<(), (String, &'static str)> {
        let positive = |n: f64| n > 0.0 && n <= f64::from(f32::MAX);
        let wrong = |message: String, hint| Err((message, hint));
        match *self {
            Self { scale: None, min: None, max: None, power_of_two: false } => {
                wrong("nothing is to be done with amax".into(), "give scale, min, max or power_of_two = true")
            }
            Self { scale: Some(n), .. } if !positive(n) => {
                wrong(format!("amax cannot be multiplied by {n}"), "give a positive number")
            }
            Self { min: Some(n), .. } | Self { max: Some(n), .. } if !positive(n) => {
                wrong(format!("{n} is no bound of amax"), "give a positive number")
            }
            Self { min: Some(min), max: Some(max), .. } if min > max => {
                wrong(format!("amax cannot be at least {min} and at most {max}"), "min is the smaller number")
            }
            _ => Ok(()),
        }
    }

    /// The range that takes the place of `low..=high`.
    #[must_use]
    pub fn apply(&self, (low, high): (f32, f32)) -> (f32, f32) {
        let amax = f64::from(low.abs().max(high.abs()));
        let mut wanted = amax * self.scale.unwrap_or(1.0);
        wanted = wanted.max(self.min.unwrap_or(0.0)).min(self.max.unwrap_or(f64::INFINITY));
        if self.power_of_two && wanted > 0.0 {
            wanted = next_power_of_two(wanted);
        }
        let wanted = wanted.min(f64::from(f32::MAX));
        if amax > 0.0 {
            let factor = wanted / amax;
            ((f64::from(low) * factor) as f32, (f64::from(high) * factor) as f32)
        } else {
            (0.0, wanted as f32)
        }
    }
}

/// The least power of two that is not below a positive number.
fn next_power_of_two(x: f64) -> f64 {
    let floor = 2f64.powi(x.log2().floor() as i32);
    // The logarithm is rounded, so the power may be one off on either side.
    [floor / 2.0, floor, floor * 2.0].into_iter().find(|&power| power >= x).unwrap_or(floor * 4.0)
}

/// Which scales are allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ScaleType {
    /// Any.
    #[default]
    Float,
    /// Powers of two, rounded up, so that nothing is clipped that was in range.
    PowerOfTwo,
}

/// The precision that scales are rounded to, to the nearest, half to even. They are stored in the model's own float type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// 24 significant bits.
    #[default]
    Float32,
    /// 11 significant bits.
    Float16,
    /// 8 significant bits.
    Bfloat16,
    /// 4 significant bits, and one float32 scale for all groups, as NVFP4 has them. Stored as such.
    Float8e4m3fn,
    /// A power of two for each group, as MX formats have them. Stored as such.
    Float8e8m0,
}

impl ScaleDtype {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float8e4m3fn => "float8e4m3fn",
            Self::Float8e8m0 => "float8e8m0",
        }
    }

    /// Whether scales are stored in 8 bits, which only groups have.
    #[must_use]
    pub fn is_block(self) -> bool {
        self.block().is_some()
    }

    /// The same, if it is one that only groups have.
    #[must_use]
    pub fn block(self) -> Option<BlockScale> {
        match self {
            Self::Float8e4m3fn => Some(BlockScale::Float8e4m3fn),
            Self::Float8e8m0 => Some(BlockScale::Float8e8m0),
            Self::Float32 | Self::Float16 | Self::Bfloat16 => None,
        }
    }
}

/// Whose arithmetic makes scales and codes, to the last bit. They differ where a quotient is almost between two codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Arithmetic {
    /// ONNX `QuantizeLinear`: the value divided by the scale. Scales as onnxruntime's tools make them or, with `eps`, torch.
    #[default]
    Onnx,
    /// torchao: scales in float32, the value times the reciprocal of the scale.
    Torch,
    /// onnxruntime's `MatMulNBitsQuantizer` for `MatMulNBits`: the reciprocal, the zero point added before rounding half away.
    Mlas,
    /// The same for DequantizeLinear: the zero point is added after rounding.
    MlasQdq,
    /// torchao's int4 weight-only: groups need not contain zero, and zero points lie between codes, which among forms only
    /// `matmulnbits` has.
    Tinygemm,
    /// The same as torchao's newer kernels have it: `eps` is the least range instead of the least scale.
    Mslk,
}

impl Arithmetic {
    /// Whether zero points lie between codes.
    #[must_use]
    pub fn is_between(self) -> bool {
        matches!(self, Self::Tinygemm | Self::Mslk)
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
