//! Named configurations to start from.

use super::{Config, Source};
use crate::document;
use crate::error::{Error, Kind, Result};
use crate::nearest::nearest;

/// The presets: name and text. The text begins with a description in comments.
const BUILT_IN: &[(&str, &str)] = &[
    ("int8", include_str!("presets/int8.toml")),
    ("int8-smooth", include_str!("presets/int8-smooth.toml")),
    ("int8-dynamic", include_str!("presets/int8-dynamic.toml")),
    ("a16w8", include_str!("presets/a16w8.toml")),
    ("w8", include_str!("presets/w8.toml")),
    ("w4", include_str!("presets/w4.toml")),
    ("w4-gptq", include_str!("presets/w4-gptq.toml")),
    ("w4-best", include_str!("presets/w4-best.toml")),
    ("w4-kquant", include_str!("presets/w4-kquant.toml")),
    ("w4-hqq", include_str!("presets/w4-hqq.toml")),
    ("w4-mlas", include_str!("presets/w4-mlas.toml")),
    ("8da4w", include_str!("presets/8da4w.toml")),
    ("int4-weight-only", include_str!("presets/int4-weight-only.toml")),
    ("fp8", include_str!("presets/fp8.toml")),
    ("nvfp4", include_str!("presets/nvfp4.toml")),
    ("mxfp8", include_str!("presets/mxfp8.toml")),
    ("mxfp6", include_str!("presets/mxfp6.toml")),
    ("mxfp4", include_str!("presets/mxfp4.toml")),
    ("mxint8", include_str!("presets/mxint8.toml")),
    ("INT8_DEFAULT_CFG", include_str!("presets/INT8_DEFAULT_CFG.toml")),
    ("FP8_DEFAULT_CFG", include_str!("presets/FP8_DEFAULT_CFG.toml")),
    ("NVFP4_DEFAULT_CFG", include_str!("presets/NVFP4_DEFAULT_CFG.toml")),
    ("MXFP8_DEFAULT_CFG", include_str!("presets/MXFP8_DEFAULT_CFG.toml")),
    ("MXFP6_DEFAULT_CFG", include_str!("presets/MXFP6_DEFAULT_CFG.toml")),
    ("MXFP4_DEFAULT_CFG", include_str!("presets/MXFP4_DEFAULT_CFG.toml")),
    ("MXINT8_DEFAULT_CFG", include_str!("presets/MXINT8_DEFAULT_CFG.toml")),
    ("W4A8_AWQ_BETA_CFG", include_str!("presets/W4A8_AWQ_BETA_CFG.toml")),
    ("INT4_AWQ_CFG", include_str!("presets/INT4_AWQ_CFG.toml")),
];

/// Names of the presets.
pub fn names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

/// A preset as TOML text.
///
/// # Errors
/// An unknown name, with the nearest one.
pub fn text(name: &str) -> Result<&'static str> {
    if let Some((_, text)) = BUILT_IN.iter().find(|(n, _)| *n == name) {
        return Ok(text);
    }
    let error = Error::new(Kind::Config, format!("there is no preset \"{name}\""));
    if matches!(name.to_lowercase().as_str(), "fp16" | "float16" | "half" | "bf16" | "bfloat16") {
        let dtype = if name.to_lowercase().starts_with('b') { "bfloat16" } else { "float16" };
        return Err(error.with_hint(format!("--dtype {dtype} stores in 16 bits what stays float, beside any preset")));
    }
    Err(match nearest(name, names()) {
        Some(near) => error.with_hint(format!("did you mean \"{near}\"? `amax presets` lists all")),
        None => error.with_hint(format!("presets are {}", names().collect::<Vec<_>>().join(", "))),
    })
}

/// A description of a preset in one line.
///
/// # Errors
/// As [`text`].
pub fn summary(name: &str) -> Result<&'static str> {
    Ok(text(name)?.lines().next().unwrap_or_default().trim_start_matches(['#', ' ']))
}

/// A preset, parsed.
///
/// # Errors
/// As [`text`].
pub fn load(name: &str) -> Result<Config> {
    let (mut config, lines): (Config, _) = document::parse(text(name)?)?;
    config.source = Source { file: Some(format!("preset {name}").into()), lines, preset: Some(name.to_owned()) };
    Ok(config)
}
