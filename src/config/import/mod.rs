//! Configurations of other tools, converted to ours.
//!
//! What has no counterpart and would change what is computed is an error with its place. What is decided on the way, and
//! what is left out because nothing depends on it, is said in comments above the result.

mod json;
mod modelopt;
mod names;
mod quark;

use std::path::Path;

use super::Config;
use crate::document;
use crate::error::{Error, Kind, Result};
use json::{At, Json};

/// A configuration that was converted.
#[derive(Clone, Debug)]
pub struct Imported {
    /// What it says.
    pub config: Config,
    /// Whose it was.
    pub from: &'static str,
    /// What was decided or left out, a sentence each.
    pub notes: Vec<String>,
}

impl Imported {
    /// TOML text, with the notes as comments at its head.
    ///
    /// # Errors
    /// Numbers that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        let mut text = format!("# Converted from a {}.\n", self.from);
        for note in &self.notes {
            text.push_str("#\n");
            let mut line = String::from("#");
            for word in note.split(' ') {
                if line.chars().count() + 1 + word.chars().count() > 118 {
                    text.push_str(&line);
                    text.push('\n');
                    "#".clone_into(&mut line);
                }
                line.push(' ');
                line.push_str(word);
            }
            text.push_str(&line);
            text.push('\n');
        }
        Ok(format!("{text}\n{}", self.config.to_toml()?))
    }
}

/// Converts a file: ModelOpt's `quant_cfg` or Quark's exported configuration, both as JSON.
///
/// # Errors
/// An unreadable file, a syntax error, neither of the two, or something in it that has no counterpart; with its place.
pub fn load(path: &Path) -> Result<Imported> {
    convert(&document::read(path, "configuration")?).map_err(|e| e.in_file(path))
}

/// Converts JSON text, as [`load`] does.
///
/// # Errors
/// As [`load`].
pub fn convert(text: &str) -> Result<Imported> {
    let (json, lines): (Json, _) = document::parse_json(text).map_err(|e| {
        let hint = "configurations of ModelOpt and Quark are converted from JSON";
        if text.trim_start().starts_with('{') { e } else { e.with_hint(hint) }
    })?;
    let root = At::root(&json, &lines);
    // Checkpoints have it inside their own config.json.
    let root = root.get("quantization_config").unwrap_or(root);
    let imported = if root.has("global_quant_config") {
        quark::convert(&root)?
    } else if root.has("quant_cfg") || modelopt::is_bare(&root) {
        modelopt::convert(&root)?
    } else {
        let hint = "it has a key \"quant_cfg\" (ModelOpt) or \"global_quant_config\" (Quark)";
        return Err(Error::new(Kind::Config, "this is no configuration that can be converted").with_hint(hint));
    };
    // What was converted must be what it says when it is read again.
    Config::parse(&imported.config.to_toml()?)?;
    Ok(imported)
}
