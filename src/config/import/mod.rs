//! Configurations of other tools, converted to ours.
//!
//! Anything without a counterpart that would change the result is an error with its place. Comments above the result say
//! what was decided, and what was left out because nothing depends on it.

mod aimet;
mod json;
mod modelopt;
mod names;
mod onnxruntime;
mod quark;
mod tensorrt;

use std::collections::BTreeMap;
use std::path::Path;

use super::{Config, Tensor};
use crate::document;
use crate::error::{Error, Kind, Result};
use json::{At, Json};

/// A configuration that was converted.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The configuration.
    pub config: Config,
    /// Where it came from.
    pub from: &'static str,
    /// What was decided or left out, one sentence each.
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

/// Converts a file: ModelOpt's `quant_cfg`, Quark's exported configuration, encodings of AIMET or QNN, onnxruntime's
/// calibration tables and `TensorQuantOverrides`, or the calibration cache of `TensorRT`.
///
/// # Errors
/// An unreadable file, a syntax error, none of these, or something in it that has no counterpart; with its place.
pub fn load(path: &Path) -> Result<Imported> {
    convert(&document::read(path, "configuration")?).map_err(|e| e.in_file(path))
}

/// Converts text, as [`load`] does.
///
/// # Errors
/// As [`load`].
pub fn convert(text: &str) -> Result<Imported> {
    let imported = if tensorrt::is_cache(text) {
        tensorrt::convert(text)?
    } else if onnxruntime::is_table(text) {
        onnxruntime::table(text)?
    } else {
        from_json(text)?
    };
    // What was converted must be what it says when it is read again.
    Config::parse(&imported.config.to_toml()?)?;
    Ok(imported)
}

fn from_json(text: &str) -> Result<Imported> {
    let (json, lines): (Json, _) = document::parse_json(text).map_err(|e| {
        let hint = "amax can convert JSON and the calibration tables of TensorRT and onnxruntime";
        if text.trim_start().starts_with('{') { e } else { e.with_hint(hint) }
    })?;
    let root = At::root(&json, &lines);
    // Checkpoints have it inside their own config.json.
    let root = root.get("quantization_config").unwrap_or(root);
    if root.has("global_quant_config") {
        quark::convert(&root)
    } else if root.has("activation_encodings") || root.has("param_encodings") || root.has("encodings") {
        aimet::convert(&root)
    } else if onnxruntime::is_calibration(&root) {
        onnxruntime::calibration(&root)
    } else if onnxruntime::are_overrides(&root) {
        onnxruntime::overrides(&root)
    } else if root.has("quant_cfg") || modelopt::is_bare(&root) {
        modelopt::convert(&root)
    } else {
        let hint = "it reads configurations with the key \"quant_cfg\" (ModelOpt) or \"global_quant_config\" (Quark), and encodings with \"activation_encodings\" (AIMET, QNN)";
        Err(Error::new(Kind::Config, "amax cannot convert this file").with_hint(hint))
    }
}

/// The tensors of a configuration that only has those.
fn of_tensors(from: &'static str, tensor: BTreeMap<String, Tensor>, notes: Vec<String>) -> Imported {
    Imported { config: Config { tensor, ..Config::default() }, from, notes }
}

/// A number as f32, if it is one there.
fn finite(at: &At<'_>) -> Result<f32> {
    let value = at.number()? as f32;
    if value.is_finite() { Ok(value) } else { Err(at.wrong("this number is too large")) }
}
