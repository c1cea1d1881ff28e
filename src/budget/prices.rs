//! What each format costs each group of weights, as a document.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::budget::Choice;
use crate::document;
use crate::error::{Error, Kind, Result};

/// The version that this program reads and writes.
pub const SCHEMA: u32 = 1;

/// What each format costs each group of weights at the outputs. It holds for one model and one configuration, and for every
/// budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Prices {
    /// Version of the document.
    pub schema: u32,
    /// The content hash of the model.
    pub model: String,
    /// The target.
    pub target: String,
    /// The samples that noise was measured on.
    pub samples: String,
    /// How many of them.
    pub sample_count: usize,
    /// The groups, in the order of the graph.
    pub groups: Vec<PricedGroup>,
}

/// Weights that have one format: those of products that read one tensor, and those that are one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PricedGroup {
    /// The sites.
    pub weights: Vec<String>,
    /// The operators that read them, each once.
    pub operators: Vec<String>,
    /// Elements of all of them.
    pub elements: u64,
    /// What each format costs, those of few bits first.
    pub prices: Vec<Price>,
}

/// What a format costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Price {
    /// The format.
    pub format: String,
    /// Bits of a code.
    pub bits: usize,
    /// Bytes of codes, scales and zero points of the whole group.
    pub bytes: u64,
    /// Noise-to-signal ratio at the worst output with only this group quantized.
    pub noise: f64,
    /// Whether that was measured; otherwise it follows from what was, by the ratio of the errors of the weights.
    pub measured: bool,
}

impl Prices {
    /// The document as JSON.
    ///
    /// # Errors
    /// Numbers that JSON cannot hold.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::new(Kind::Internal, format!("cannot print the prices: {e}")))?;
        Ok(text + "\n")
    }

    /// Reads a document.
    ///
    /// # Errors
    /// An unreadable file, another document, another version.
    pub fn load(path: &Path) -> Result<Self> {
        let (prices, _): (Self, _) =
            document::parse_json(&document::read(path, "sensitivity")?).map_err(|e| e.in_file(path))?;
        if prices.schema != SCHEMA {
            let message = format!("this is version {} of the document; amax reads version {SCHEMA}", prices.schema);
            return Err(Error::new(Kind::Config, message).in_file(path).with_hint("run amax sensitivity again"));
        }
        Ok(prices)
    }

    /// Refuses prices of something else than these groups and formats.
    pub(super) fn check(&self, model: &str, groups: &[Vec<String>], choices: &[Choice]) -> Result<()> {
        let stale = |message: String| {
            Err(Error::new(Kind::Config, message)
                .with_hint("run amax sensitivity again, with the same options as rewrite"))
        };
        if self.model != model {
            return stale("the sensitivity was measured on another model".to_owned());
        }
        let own: Vec<&Vec<String>> = self.groups.iter().map(|group| &group.weights).collect();
        if own.len() != groups.len() || own.iter().zip(groups).any(|(own, asked)| *own != asked) {
            return stale("the sensitivity is that of other weights".to_owned());
        }
        let odd = |price: &Price| !price.noise.is_finite() || price.noise < 0.0;
        if self.groups.iter().any(|group| group.prices.is_empty() || group.prices.iter().any(odd)) {
            return stale("the sensitivity has groups without prices, or prices that are none".to_owned());
        }
        let lacks = |choice: &&Choice| {
            self.groups.iter().all(|group| group.prices.iter().all(|price| price.format != choice.name))
        };
        match choices.iter().find(lacks) {
            Some(choice) => stale(format!("the sensitivity was not measured for {}", choice.name)),
            None => Ok(()),
        }
    }
}

impl Price {
    /// The noise in dB.
    #[must_use]
    pub fn db(&self) -> f64 {
        decibels(self.noise)
    }
}

/// A noise-to-signal ratio as a signal-to-noise ratio in dB.
pub(super) fn decibels(noise: f64) -> f64 {
    -10.0 * noise.log10()
}
