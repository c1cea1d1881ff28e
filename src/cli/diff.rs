//! `amax diff`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use amax::error::{Error, Kind, Result};
use amax::ir::file;
use amax::report::inspect;
use amax::scales::scales;
use serde_json::{Map, Value};

use super::inspect::print;
use super::{bytes, compare, table};

/// Arguments of `amax diff`.
#[derive(clap::Args)]
#[command(after_help = "Tensors are matched by name, and compared by format, granularity, scale and zero point.

Examples:
  amax diff yesterday.onnx today.onnx
  amax diff a.onnx b.onnx --json
  amax diff a.onnx b.onnx --exit-code")]
pub(crate) struct Args {
    /// Quantized model.
    before: PathBuf,
    /// Quantized model to compare with it.
    after: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// End with code 7 if anything differs.
    #[arg(long)]
    exit_code: bool,
}

/// What of a model is compared.
struct Seen {
    size: u64,
    operators: BTreeMap<String, usize>,
    tensors: BTreeMap<String, Map<String, Value>>,
}

#[derive(serde::Serialize)]
struct Found {
    /// Bytes of the models.
    bytes: [u64; 2],
    /// Operators whose number differs.
    operators: BTreeMap<String, [usize; 2]>,
    /// Keys of quantized tensors that differ, by tensor; a tensor that is not quantized has none.
    tensors: BTreeMap<String, BTreeMap<String, [Value; 2]>>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (before, after) = (see(&args.before)?, see(&args.after)?);
    let found = Found {
        bytes: [before.size, after.size],
        operators: pairs(&before.operators, &after.operators)
            .map(|(name, a, b)| (name, [a.copied().unwrap_or(0), b.copied().unwrap_or(0)]))
            .filter(|(_, [a, b])| a != b)
            .collect(),
        tensors: pairs(&before.tensors, &after.tensors)
            .map(|(name, a, b)| (name, changes(a, b)))
            .filter(|(_, changes)| !changes.is_empty())
            .collect(),
    };
    if args.json {
        compare::json(&found)?;
    } else {
        print(&text(&found))?;
    }
    if args.exit_code && !(found.operators.is_empty() && found.tensors.is_empty()) {
        return Err(Error::new(Kind::Check, "the models are quantized differently"));
    }
    Ok(())
}

fn see(path: &Path) -> Result<Seen> {
    let model = file::load(path)?;
    let document = |tensor| match serde_json::to_value(tensor) {
        Ok(Value::Object(mut keys)) => {
            keys.remove("optional");
            Ok(keys)
        }
        _ => Err(Error::new(Kind::Internal, "a tensor is not an object")),
    };
    let tensors = scales(&model).config.tensor;
    let tensors = tensors.into_iter().map(|(name, tensor)| Ok((name, document(tensor)?))).collect::<Result<_>>()?;
    Ok(Seen { size: file::estimated_size(&model), operators: inspect(&model).operators, tensors })
}

/// What has a name in either map, with what it is in both.
fn pairs<'a, T>(
    before: &'a BTreeMap<String, T>,
    after: &'a BTreeMap<String, T>,
) -> impl Iterator<Item = (String, Option<&'a T>, Option<&'a T>)> {
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    names.into_iter().map(|name| (name.clone(), before.get(name), after.get(name)))
}

fn changes(before: Option<&Map<String, Value>>, after: Option<&Map<String, Value>>) -> BTreeMap<String, [Value; 2]> {
    let empty = Map::new();
    let (before, after) = (before.unwrap_or(&empty), after.unwrap_or(&empty));
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let value = |of: &Map<String, Value>, key: &String| of.get(key).cloned().unwrap_or(Value::Null);
    let both = keys.into_iter().map(|key| (key.clone(), [value(before, key), value(after, key)]));
    both.filter(|(_, [a, b])| a != b).collect()
}

fn text(found: &Found) -> String {
    let [before, after] = found.bytes;
    let mut out = format!("bytes  {} -> {}\n", bytes(before), bytes(after));
    if found.operators.is_empty() && found.tensors.is_empty() {
        return out + "the same operators, formats, scales and zero points\n";
    }
    let operators: Vec<Vec<String>> =
        found.operators.iter().map(|(op, [a, b])| vec![op.clone(), format!("{a} -> {b}")]).collect();
    let tensors: Vec<Vec<String>> = found
        .tensors
        .iter()
        .map(|(name, changes)| {
            let changes: Vec<String> = changes.iter().map(|(key, [a, b])| change(key, a, b)).collect();
            vec![name.clone(), changes.join(", ")]
        })
        .collect();
    for (title, rows) in [("nodes", operators), ("quantized tensors", tensors)] {
        if !rows.is_empty() {
            out.extend(["\n", title, "\n", &table(&rows, &[])]);
        }
    }
    out
}

/// One key in both models, in a few words.
fn change(key: &str, before: &Value, after: &Value) -> String {
    let word = |value: &Value| match value {
        Value::Null => "none".to_owned(),
        Value::String(word) => word.clone(),
        Value::Array(list) => format!("{} values", list.len()),
        other => other.to_string(),
    };
    if let (Some(a), Some(b)) = (before.as_array(), after.as_array())
        && a.len() == b.len()
    {
        let differ = a.iter().zip(b).filter(|(a, b)| a != b).count();
        return format!("{key}: {differ} of {} differ", a.len());
    }
    format!("{key} {} -> {}", word(before), word(after))
}
