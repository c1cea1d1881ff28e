//! The user's configuration: `amax.toml`.
//!
//! A configuration is a list of levels. Each sets keys for some sites, and the last level that sets a key decides it:
//! the target's defaults, the preset, `[default]`, `[op_type.…]`, `[[layer]]` in order, `[[postprocess]]`, `[tensor.…]`,
//! `exclude`, and what the command line adds. [`rules`] applies them in that order to one site.

pub mod budget;
pub mod import;
mod pattern;
pub mod presets;
pub mod rules;
pub mod spec;
mod validate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use pattern::Pattern;
pub use spec::{Level, SiteKind, Spec};

use crate::document::{self, Lines};
use crate::error::{Error, Kind, Result};
use crate::quant::algorithm::Algorithm;
use budget::Budget;
use rules::Rule;
use spec::Postprocess;

/// A configuration. Every key may be left out; unknown keys are errors.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", schemars(title = "amax configuration"))]
#[non_exhaustive]
pub struct Config {
    /// Profile of the runtime, by name or by path of a `.toml` file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Named configuration to start from; `amax presets` lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Patterns on names of nodes or sites that stay in float. Globs, whose `*` also matches `/`; `re:` begins a
    /// regular expression.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// All nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<Level>,
    /// The nodes of one operator, by its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub op_type: BTreeMap<String, Level>,
    /// Nodes and sites by name; later layers override earlier ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer: Vec<Layer>,
    /// Changes to ranges after they were chosen, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub postprocess: Vec<Adjusted>,
    /// Single tensors, by name: formats, ranges and scales fixed by the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tensor: BTreeMap<String, Tensor>,
    /// An algorithm that improves weights and scales beyond rounding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<crate::quant::algorithm::Written>"))]
    pub algorithm: Option<Algorithm>,
    /// Algorithms that change the float model first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<crate::quant::algorithm::Written>"))]
    pub pre_quant_opt: Vec<Algorithm>,
    /// Limits below which a tensor is not quantized.
    #[serde(default, skip_serializing_if = "Guard::is_default")]
    pub guard: Guard,
    /// What the result may take, or must keep.
    #[serde(default, skip_serializing_if = "Budget::is_default")]
    pub budget: Budget,
    /// Rules of the command line, which come last.
    #[serde(skip)]
    pub overrides: Vec<Rule>,
    /// The places of the keys.
    #[serde(skip)]
    pub source: Source,
}

/// Where a configuration was read from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The file, if it was one.
    pub file: Option<PathBuf>,
    /// The line of each key.
    pub lines: Lines,
    /// The preset, if it was one: keys that the target does not support are dropped.
    pub preset: Option<String>,
}

/// A rule for names.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// A glob on names of nodes (`/encoder/*`) or of sites (`*.weight`, `/head/*.input`); `re:` begins a regular
    /// expression.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Only nodes of these operators; default: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub op_type: Vec<String>,
    /// Whether it may match nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// Whether the matched sites are quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable: Option<bool>,
    /// Activations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Spec>,
    /// Outputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Spec>,
    /// Constant weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Spec>,
    /// Constant biases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias: Option<Spec>,
    /// The algorithm for their weights, instead of that for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<crate::quant::algorithm::Written>"))]
    pub algorithm: Option<Algorithm>,
}

impl Layer {
    /// Its keys, without the pattern.
    #[must_use]
    pub fn level(&self) -> Level {
        let Self { pattern: _, op_type: _, optional: _, enable, input, output, weight, bias, algorithm } = self.clone();
        Level { enable, input, output, weight, bias, algorithm }
    }
}

/// A change to ranges, by name.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Adjusted {
    /// A glob on names of nodes or of sites; `re:` begins a regular expression.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Whether it may match nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// Factor for amax.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Lower limit of amax.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Upper limit of amax.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Whether amax is rounded up to a power of two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub power_of_two: bool,
}

impl Adjusted {
    /// Its keys, without the pattern, for every kind of site that has a range of its own.
    fn level(&self) -> Level {
        let Self { pattern: _, optional: _, scale, min, max, power_of_two } = *self;
        let spec = Spec { postprocess: Some(Postprocess { scale, min, max, power_of_two }), ..Spec::default() };
        Level { input: Some(spec.clone()), output: Some(spec.clone()), weight: Some(spec), ..Level::default() }
    }
}

/// The keys of one tensor.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// Whether the tensor may be missing or stay in float.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// Whether it is quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable: Option<bool>,
    /// Number format of the quantized values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<spec::Dtype>,
    /// Whether the zero point is fixed in the middle of the format's range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<bool>,
    /// How many elements of a constant share a scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<spec::Share>,
    /// The axis of `per-channel` and `per-group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ch_axis: Option<i64>,
    /// Elements in a group of `per-group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u32>,
    /// The smallest and the largest value that are representable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f32; 2]>,
    /// The scale; for a weight, all its scales in row-major order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Numbers<f32>>,
    /// The zero point; with `scale`. Default: the middle of the range of a symmetric tensor, otherwise 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_point: Option<Numbers<i32>>,
}

impl Tensor {
    /// The keys that sites have, too.
    pub(crate) fn spec(&self) -> Spec {
        let Self { dtype, symmetric, granularity, ch_axis, group_size, .. } = *self;
        Spec { dtype, granularity, ch_axis, group_size, symmetric, ..Spec::default() }
    }
}

/// One number, or several.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged, expecting = "expected a number or a list of numbers")]
pub enum Numbers<T> {
    /// The same for all.
    One(T),
    /// One for each.
    Many(Vec<T>),
}

impl<T: Copy> Numbers<T> {
    /// The numbers.
    #[must_use]
    pub fn new(list: Vec<T>) -> Self {
        match list.as_slice() {
            [one] => Self::One(*one),
            _ => Self::Many(list),
        }
    }

    /// The numbers, all to be changed.
    #[must_use]
    pub fn to_vec(&self) -> Vec<T> {
        match self {
            Self::One(number) => vec![*number],
            Self::Many(numbers) => numbers.clone(),
        }
    }
}

/// Limits below which a tensor is not quantized.
///
/// Quality is the tensor's own signal-to-quantization-noise ratio in dB, over the calibration samples. Formats of fewer
/// than 8 bits are not judged by it, nor are activations in small floats: the user asked for them by name.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// Off: every planned site is quantized.
    pub enabled: bool,
    /// Least quality of an activation quantized with one range for all samples.
    pub static_db: f64,
    /// Least quality of an activation whose range is computed at run time, if the target can do that.
    pub dynamic_db: f64,
    /// Least quality of a weight or constant.
    pub weight_db: f64,
    /// Least quality of the model's outputs on held-out samples. Below it, the layers that cost the most are measured
    /// one by one and go back to float.
    pub output_db: f64,
}

impl Default for Guard {
    fn default() -> Self {
        Self { enabled: true, static_db: 28.0, dynamic_db: 20.0, weight_db: 20.0, output_db: 12.0 }
    }
}

impl Guard {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Config {
    /// Reads a TOML or JSON file.
    ///
    /// # Errors
    /// An unreadable file, a syntax error, an unknown key or word (with the nearest valid one), a value out of range.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
        let mut config = Self::parse(&document::read(path, "config")?).map_err(|e| {
            let error = e.in_file(path);
            if yaml { error.with_hint("configurations are TOML, or JSON; YAML is not read") } else { error }
        })?;
        config.source.file = Some(path.to_owned());
        Ok(config)
    }

    /// Parses TOML text, or JSON if it begins with a brace.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str) -> Result<Self> {
        let (mut config, lines): (Self, _) = document::parse(text)?;
        config.source.lines = lines;
        config.validate()?;
        Ok(config)
    }

    /// The configuration as TOML text.
    ///
    /// # Errors
    /// Numbers that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self)
            .map_err(|e| Error::new(Kind::Internal, format!("cannot write the configuration as TOML: {e}")))
    }

    /// An error about a key, with its place.
    pub(crate) fn error(&self, path: &str, message: impl Into<String>) -> Error {
        self.source.at(Error::new(Kind::Config, message), path)
    }

    /// Checks everything that can be checked without a model.
    fn validate(&self) -> Result<()> {
        let guard = toml::Table::try_from(self.guard).unwrap_or_default();
        if let Some((key, _)) = guard.iter().find(|(_, value)| value.as_float().is_some_and(f64::is_nan)) {
            return Err(self
                .error(&format!("guard.{key}"), format!("guard.{key} is not a number"))
                .with_hint("give decibels; -inf accepts everything"));
        }
        if let Some(algorithm) = &self.algorithm {
            algorithm.validate().map_err(|e| self.source.at(e, "algorithm"))?;
        }
        for (index, algorithm) in self.pre_quant_opt.iter().enumerate() {
            algorithm.validate().map_err(|e| self.source.at(e, &format!("pre_quant_opt.{index}")))?;
        }
        if let Some(name) = &self.preset {
            presets::text(name).map_err(|e| self.source.at(e, "preset"))?;
        }
        self.budget.goal().map_err(|(key, e)| self.source.at(e, &format!("budget.{key}")))?;
        self.budget.choices().map_err(|(index, e)| self.source.at(e, &format!("budget.formats.{index}")))?;
        for (name, tensor) in &self.tensor {
            let fail =
                |key: &str, message: &str| Err(self.error(&format!("tensor.{name}.{key}"), message).at_value(name));
            let Tensor { range, scale, zero_point, .. } = tensor;
            match (range, scale, zero_point) {
                (Some(_), Some(_), _) => {
                    return fail("range", "range and scale exclude each other, since one follows from the other");
                }
                (_, None, Some(_)) => return fail("zero_point", "a zero point needs a scale"),
                (Some([low, high]), ..) if !(low.is_finite() && high.is_finite() && low <= high) => {
                    return fail("range", "a range is two finite numbers, the smaller one first");
                }
                (_, Some(scale), _) if scale.to_vec().iter().any(|s| !s.is_normal() || *s < 0.0) => {
                    return fail("scale", "a scale must be a positive number");
                }
                _ => {}
            }
        }
        rules::from_document(self, "").map(drop)
    }
}

/// The JSON Schema of a configuration, as text.
///
/// # Errors
/// [`Kind::Usage`] in a build without the feature `schema`.
#[cfg(feature = "schema")]
pub fn schema() -> Result<String> {
    serde_json::to_string_pretty(&schemars::schema_for!(Config))
        .map_err(|e| Error::new(Kind::Internal, format!("cannot print the schema: {e}")))
}

/// Fails: this build has no schema.
///
/// # Errors
/// Always [`Kind::Usage`].
#[cfg(not(feature = "schema"))]
pub fn schema() -> Result<String> {
    Err(Error::new(Kind::Usage, "amax was built without the schema of configurations")
        .with_hint("build it with the feature \"schema\""))
}

impl Source {
    /// Adds the place of a key to an error.
    #[must_use]
    pub fn at(&self, error: Error, path: &str) -> Error {
        let error = match &self.file {
            Some(file) => error.in_file(file),
            None => error,
        };
        match self.lines.of(path) {
            Some(line) => error.at_line(line),
            None => error,
        }
    }
}
