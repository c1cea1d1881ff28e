//! What the user asks for: `amax.toml`.

use std::path::Path;

use globset::{Glob, GlobMatcher};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::document;
use crate::error::{Error, Kind, Result};

/// A configuration. Every key may be left out; unknown keys are errors.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Profile of the runtime, by name or by path of a `.toml` file.
    pub target: Option<String>,
    /// Globs on node names: matching nodes stay float. `*` also matches `/`; `re:` begins a regular expression.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// When a tensor is too badly served by its range to be quantized.
    #[serde(default)]
    pub guard: Guard,
}

/// When a tensor is too badly served by its range to be quantized.
///
/// Quality is the tensor's own signal-to-quantization-noise ratio in dB, over the calibration samples.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// Off: every planned site is quantized.
    pub enabled: bool,
    /// Least quality of an activation quantized with one range for all samples.
    pub static_db: f64,
    /// Least quality of an activation whose range is found at run time, where the target can do that.
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

impl Config {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// An unreadable file, a syntax error, an unknown key (with the nearest valid one), a value out of range.
    pub fn load(path: &Path) -> Result<Self> {
        Self::parse(&document::read(path, "config")?).map_err(|e| e.in_file(path))
    }

    /// Parses TOML text.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| document::syntax(text, &e))?;
        config.excluded()?;
        let guard = toml::Table::try_from(config.guard).unwrap_or_default();
        if let Some((key, _)) = guard.iter().find(|(_, value)| value.as_float().is_some_and(f64::is_nan)) {
            return Err(Error::new(Kind::Config, format!("guard.{key} is not a number"))
                .with_hint("give decibels; -inf lets everything pass"));
        }
        Ok(config)
    }

    /// The exclusion globs, ready to match.
    ///
    /// # Errors
    /// A glob that cannot be parsed.
    pub fn excluded(&self) -> Result<Vec<Pattern>> {
        self.exclude.iter().map(|text| Pattern::new(text)).collect()
    }
}

/// A glob, or after `re:` a regular expression, on node names.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    Glob(GlobMatcher),
    Regex(Regex),
}

impl Pattern {
    /// Parses a glob, whose `*` also matches `/`, or `re:` and a regular expression that may match anywhere in a name.
    ///
    /// # Errors
    /// An unbalanced bracket or brace, or what the `regex` crate does not accept.
    pub fn new(text: &str) -> Result<Self> {
        let matcher = if let Some(expression) = text.strip_prefix("re:") {
            Matcher::Regex(
                Regex::new(expression)
                    .map_err(|e| Error::new(Kind::Config, format!("\"{text}\" is not a regular expression: {e}")))?,
            )
        } else {
            let glob = Glob::new(text).map_err(|e| {
                Error::new(Kind::Config, format!("\"{text}\" is not a glob: {}", e.kind()))
                    .with_hint("`*` matches anything, `?` one character, `[ab]` a choice, `{x,y}` alternatives")
            })?;
            Matcher::Glob(glob.compile_matcher())
        };
        Ok(Self { text: text.to_owned(), matcher })
    }

    /// As it was written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it matches a name.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match &self.matcher {
            Matcher::Glob(glob) => self.text == name || glob.is_match(name),
            Matcher::Regex(expression) => expression.is_match(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn patterns_are_globs_or_regular_expressions() {
        let check = |pattern: &str, name: &str, matches: bool| {
            assert_eq!(Pattern::new(pattern).expect("valid").matches(name), matches, "{pattern} on {name}");
        };
        check("/encoder/*", "/encoder/layer.0/MatMul", true);
        check("conv?", "conv1", true);
        check("conv?", "conv12", false);
        check("re:^/encoder/layer\\.[0-5]/", "/encoder/layer.3/MatMul", true);
        check("re:^/encoder/layer\\.[0-5]/", "/encoder/layer.6/MatMul", false);
        check("re:MatMul$", "/a/MatMul", true);
        assert!(Pattern::new("re:(").is_err() && Pattern::new("{a").is_err());
    }
}
