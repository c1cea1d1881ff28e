//! Algorithms that improve weights and scales beyond rounding.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Kind, Result};

/// A method and its parameters; without parameters, the name alone is enough.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Algorithm {
    /// The method.
    pub method: Method,
    /// Migration strength of smoothquant, from 0 to 1; searched for each input where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Step of the search in `awq_lite` and `awq_full`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha_step: Option<f64>,
    /// Smallest share of the range that `awq_clip` and `awq_full` try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_clip_ratio: Option<f64>,
    /// Step of the shares that `awq_clip` and `awq_full` try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shrink_step: Option<f64>,
    /// Output channels that `awq_clip` and `awq_full` process at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_co_batch_size: Option<u32>,
    /// Share of the mean of the Hessian's diagonal that gptq adds to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damp: Option<f64>,
    /// Columns that gptq processes at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// Whether gptq processes the columns of the largest activations first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act_order: Option<bool>,
    /// Iterations of hqq.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iterations: Option<u32>,
}

/// What an algorithm works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Nothing: ranges and rounding are all there is.
    Nothing,
    /// The values of a weight, group by group.
    Groups,
    /// The inputs of products, channel by channel, before anything is quantized.
    Inputs,
    /// A weight and what samples show of the product's input.
    Samples,
}

macro_rules! methods {
    ($($(#[$about:meta])* $name:ident: $scope:ident;)*) => {
        /// An algorithm for weights and scales.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(rename_all = "snake_case")]
        pub enum Method {
            $($(#[$about])* $name,)*
        }

        impl Method {
            /// What it works on.
            #[must_use]
            pub fn scope(self) -> Scope {
                match self {
                    $(Self::$name => Scope::$scope,)*
                }
            }
        }
    };
}

methods! {
    /// No algorithm.
    #[serde(alias = "null")]
    None: Nothing;
    /// Ranges from the observers, and rounding to nearest.
    Max: Nothing;
    /// Moves scales from activations to weights.
    #[serde(rename = "smoothquant")]
    SmoothQuant: Inputs;
    /// The same by the mean size of activations, for weights of few bits.
    AwqLite: Inputs;
    /// Searches the clipping of weights by what samples show of the product's input.
    AwqClip: Samples;
    /// `awq_lite`, then `awq_clip`.
    #[serde(alias = "awq")]
    AwqFull: Inputs;
    /// Later columns compensate rounding errors.
    Gptq: Samples;
    /// Whatever is best known: with samples `gptq`, then a local search of codes and scales; without, rounding.
    Best: Samples;
    /// Half-quadratic quantization: zero points and scales for many small errors.
    Hqq: Groups;
    /// Scales and zero points by weighted least squares, as in llama.cpp's k-quants.
    Kquant: Groups;
}

/// The two ways to write an [`Algorithm`], for the schema.
#[cfg(feature = "schema")]
#[derive(schemars::JsonSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub(crate) enum Written {
    /// A method with its own defaults.
    Name(Method),
    /// A method and its parameters.
    Full(Algorithm),
}

impl<'de> Deserialize<'de> for Algorithm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameOrTable;

        impl<'de> Visitor<'de> for NameOrTable {
            type Value = Algorithm;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a method, by its name or as a table with the key \"method\"")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Algorithm, E> {
                Method::deserialize(name.into_deserializer()).map(Algorithm::new)
            }

            fn visit_map<M: MapAccess<'de>>(self, table: M) -> Result<Algorithm, M::Error> {
                Algorithm::deserialize(MapAccessDeserializer::new(table))
            }
        }

        deserializer.deserialize_any(NameOrTable)
    }
}

impl Serialize for Algorithm {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl Method {
    /// The name as it is written.
    #[must_use]
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

impl Algorithm {
    /// A method with its own defaults.
    #[must_use]
    pub fn new(method: Method) -> Self {
        Self {
            method,
            alpha: None,
            alpha_step: None,
            min_clip_ratio: None,
            shrink_step: None,
            max_co_batch_size: None,
            damp: None,
            block_size: None,
            act_order: None,
            iterations: None,
        }
    }

    /// What it works on.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.method.scope()
    }

    /// What it asks for the weights themselves.
    #[must_use]
    pub fn for_weights(&self) -> Self {
        match self.method {
            Method::AwqFull => Self { method: Method::AwqClip, alpha_step: None, ..self.clone() },
            _ => self.clone(),
        }
    }

    /// Checks that the method has the parameters that are set, and that they are in range.
    ///
    /// # Errors
    /// The first parameter that is not.
    pub fn validate(&self) -> Result<()> {
        let Self {
            method,
            alpha,
            alpha_step,
            min_clip_ratio,
            shrink_step,
            max_co_batch_size,
            damp,
            block_size,
            act_order,
            iterations,
        } = self;
        let lite = matches!(method, Method::AwqLite | Method::AwqFull);
        let clip = matches!(method, Method::AwqClip | Method::AwqFull);
        let gptq = *method == Method::Gptq;
        let rows: [(&str, bool, bool, bool); 9] = [
            ("alpha", alpha.is_some(), *method == Method::SmoothQuant, alpha.is_none_or(|a| (0.0..=1.0).contains(&a))),
            ("alpha_step", alpha_step.is_some(), lite, alpha_step.is_none_or(|a| a > 0.0 && a <= 1.0)),
            ("min_clip_ratio", min_clip_ratio.is_some(), clip, min_clip_ratio.is_none_or(|a| a > 0.0 && a <= 1.0)),
            ("shrink_step", shrink_step.is_some(), clip, shrink_step.is_none_or(|a| a > 0.0 && a <= 1.0)),
            ("max_co_batch_size", max_co_batch_size.is_some(), clip, *max_co_batch_size != Some(0)),
            ("damp", damp.is_some(), gptq, damp.is_none_or(|d| d > 0.0 && d.is_finite())),
            ("block_size", block_size.is_some(), gptq, *block_size != Some(0)),
            ("act_order", act_order.is_some(), gptq, true),
            ("iterations", iterations.is_some(), *method == Method::Hqq, *iterations != Some(0)),
        ];
        for (key, given, applies, valid) in rows {
            if given && !applies {
                let valid: Vec<&str> = rows.iter().filter(|r| r.2).map(|r| r.0).collect();
                let error =
                    Error::new(Kind::Config, format!("the method \"{}\" has no parameter \"{key}\"", method.name()));
                return Err(if valid.is_empty() {
                    error.with_hint("it has no parameters")
                } else {
                    error.with_hint(format!("it has {}", valid.join(", ")))
                });
            }
            if !valid {
                return Err(Error::new(Kind::Config, format!("{key} is out of range")));
            }
        }
        Ok(())
    }
}
