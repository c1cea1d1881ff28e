//! onnxruntime's calibration tables and `TensorQuantOverrides`.

use std::collections::BTreeMap;

use super::json::{At, Json};
use super::{Imported, finite, of_tensors};
use crate::config::spec::{Dtype, Format, Share};
use crate::config::{Numbers, Tensor};
use crate::error::{Error, Kind, Result};

const SKIPPED: &str = "Tensors that are not in the model or stay in float are ignored.";

/// Whether a text is a `calibration.cache`: in each line a name, a blank, and a number.
pub(super) fn is_table(text: &str) -> bool {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty()).peekable();
    lines.peek().is_some()
        && !text.trim_start().starts_with(['{', '['])
        && lines.all(|line| line.rsplit_once(' ').is_some_and(|(_, number)| number.trim().parse::<f32>().is_ok()))
}

/// `calibration.cache`: the largest value of each tensor.
pub(super) fn table(text: &str) -> Result<Imported> {
    let mut tensors = BTreeMap::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |message: String| Error::new(Kind::Config, message).at_line(index + 1);
        let parsed = line.rsplit_once(' ').and_then(|(name, number)| Some((name, number.trim().parse::<f32>().ok()?)));
        let (name, amax) = parsed.ok_or_else(|| wrong("expected a name and a number".to_owned()))?;
        if !amax.is_finite() {
            return Err(wrong(format!("{amax} is not a valid range of \"{name}\"")));
        }
        let range = Some([-amax.abs(), amax.abs()]);
        if tensors.insert(name.to_owned(), Tensor { optional: true, range, ..Tensor::default() }).is_some() {
            return Err(wrong(format!("\"{name}\" appears twice")));
        }
    }
    let notes = vec![
        "The table has one number per tensor, the larger end of its range, which is used for both ends; calibration.json has both."
            .to_owned(),
        SKIPPED.to_owned(),
    ];
    Ok(of_tensors("calibration table of onnxruntime", tensors, notes))
}

/// Whether this is a `calibration.json`.
pub(super) fn is_calibration(root: &At<'_>) -> bool {
    let class = |at: &At<'_>, name: &str| at.get("CLS").is_some_and(|c| *c.json == Json::Text(name.to_owned()));
    class(root, "TensorsData")
        || root.entries().is_ok_and(|all| !all.is_empty() && all.iter().all(|(_, at)| class(at, "TensorData")))
}

/// `calibration.json`: the range that the calibrator chose for each tensor.
pub(super) fn calibration(root: &At<'_>) -> Result<Imported> {
    let data = root.get("data").unwrap_or_else(|| root.clone());
    let mut tensors = BTreeMap::new();
    for (name, at) in data.entries()? {
        let end = |key: &str| -> Result<f32> {
            let value = at.get(key).ok_or_else(|| at.wrong(format!("{key} is missing")))?;
            let value = value.get("data").unwrap_or(value);
            match value.json {
                Json::List(_) => match value.items()?.as_slice() {
                    [one] => finite(one),
                    _ => Err(value.wrong("expected one number: ranges per channel have no counterpart")),
                },
                _ => finite(&value),
            }
        };
        let range = Some([end("lowest")?, end("highest")?]);
        tensors.insert(name.to_owned(), Tensor { optional: true, range, ..Tensor::default() });
    }
    Ok(of_tensors("calibration of onnxruntime", tensors, vec![SKIPPED.to_owned()]))
}

/// Whether this is a `TensorQuantOverrides`: a list of tables for each tensor.
pub(super) fn are_overrides(root: &At<'_>) -> bool {
    let keys = ["quant_type", "axis", "scale", "zero_point", "rmin", "rmax", "symmetric", "reduce_range", "convert"];
    let is_one = |at: &At<'_>| at.entries().is_ok_and(|all| all.iter().all(|(key, _)| keys.contains(key)));
    root.entries().is_ok_and(|all| {
        !all.is_empty()
            && all.iter().all(|(_, at)| at.items().is_ok_and(|list| !list.is_empty() && list.iter().all(is_one)))
    })
}

/// `TensorQuantOverrides`, as JSON.
pub(super) fn overrides(root: &At<'_>) -> Result<Imported> {
    let mut tensors = BTreeMap::new();
    for (name, at) in root.entries()? {
        tensors.insert(name.to_owned(), override_of(&at)?);
    }
    Ok(of_tensors("TensorQuantOverrides of onnxruntime", tensors, Vec::new()))
}

fn override_of(at: &At<'_>) -> Result<Tensor> {
    let list = at.items()?;
    let first = list.first().ok_or_else(|| at.wrong("the list is empty"))?;
    for key in ["convert", "reduce_range"] {
        if let Some(value) = first.get(key).filter(|v| *v.json != Json::Bool(false)) {
            let hint = match key {
                "convert" => "amax converts by itself if a [[layer]] gives readers another input.dtype",
                _ => "set it in a [[layer]] for the nodes around the tensor",
            };
            return Err(value.wrong("this has no counterpart for a single tensor").with_hint(hint));
        }
    }
    let mut tensor = Tensor {
        dtype: first.get("quant_type").map(|v| quant_type(&v)).transpose()?,
        symmetric: first.get("symmetric").map(|v| v.bool()).transpose()?,
        ch_axis: first.get("axis").map(|v| v.integer()).transpose()?,
        ..Tensor::default()
    };
    let number = |at: &At<'_>, key: &str| -> Result<Option<f32>> {
        let Some(value) = at.get(key) else { return Ok(None) };
        match value.json {
            Json::List(_) => match value.items()?.as_slice() {
                [one] => finite(one).map(Some),
                _ => Err(value.wrong("expected one number")),
            },
            _ => finite(&value).map(Some),
        }
    };
    let each = |key: &str| list.iter().map(|at| number(at, key)).collect::<Result<Option<Vec<f32>>>>();
    let per_channel = list.len() > 1 || tensor.ch_axis.is_some();
    tensor.granularity = per_channel.then_some(Share::PerChannel);
    match (each("scale")?, each("zero_point")?, each("rmin")?, each("rmax")?) {
        (Some(scales), zeros, _, _) => {
            tensor.scale = Some(Numbers::new(scales));
            tensor.zero_point = zeros.map(|z| Numbers::new(z.into_iter().map(|z| z as i32).collect()));
        }
        (None, Some(_), ..) => return Err(first.wrong("a zero point needs a scale")),
        (None, None, Some(low), Some(high)) => match (low.as_slice(), high.as_slice()) {
            ([low], [high]) => tensor.range = Some([*low, *high]),
            _ => return Err(first.wrong("ranges per channel have no counterpart").with_hint("give scales instead")),
        },
        (None, None, None, None) => {}
        (None, None, ..) => return Err(first.wrong("every entry needs both rmin and rmax, or neither")),
    }
    if tensor == Tensor::default() {
        return Err(first.wrong("the entry for this tensor is empty"));
    }
    Ok(tensor)
}

fn quant_type(at: &At<'_>) -> Result<Dtype> {
    const NAMES: &[(&str, Dtype)] = &[
        ("QInt2", Dtype::Element(Format::Int2)),
        ("QUInt2", Dtype::Element(Format::Uint2)),
        ("QInt4", Dtype::Element(Format::Int4)),
        ("QUInt4", Dtype::Element(Format::Uint4)),
        ("QInt8", Dtype::Element(Format::Int8)),
        ("QUInt8", Dtype::Element(Format::Uint8)),
        ("QInt16", Dtype::Element(Format::Int16)),
        ("QUInt16", Dtype::Element(Format::Uint16)),
        ("QFLOAT8E4M3FN", Dtype::Element(Format::Float8e4m3fn)),
    ];
    // The name of the enumeration is there or not, by how the file was written.
    let bare = at.text()?.trim_start_matches("QuantType.");
    match NAMES.iter().find(|(name, _)| *name == bare) {
        Some((_, dtype)) => Ok(*dtype),
        None => at.word(NAMES),
    }
}
