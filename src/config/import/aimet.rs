//! Encodings of AIMET, which are also QNN's quantization overrides, in the versions 0.6.1, 1.0.0 and 2.0.0.
//!
//! `code = round(x / scale) - offset` with codes from 0: the offset is the negated zero point of an unsigned code. Symmetric
//! ones are signed with a zero point of 0, whatever the offset says.

use std::collections::BTreeMap;

use super::json::{At, Json};
use super::{Imported, finite, of_tensors};
use crate::config::spec::{Dtype, Format, Share};
use crate::config::{Numbers, Tensor};
use crate::error::Result;

pub(super) fn convert(root: &At<'_>) -> Result<Imported> {
    root.only(&[
        "version",
        "activation_encodings",
        "param_encodings",
        "encodings",
        "quantizer_args",
        "excluded_layers",
        "producer",
    ])?;
    let mut tensors = BTreeMap::new();
    let mut floats = 0;
    let mut add = |name: &str, found: Option<Tensor>, at: &At<'_>| {
        floats += usize::from(found.is_none());
        let float = Tensor { optional: true, enable: Some(false), ..Tensor::default() };
        match tensors.insert(name.to_owned(), found.unwrap_or(float)) {
            Some(_) => Err(at.wrong(format!("\"{name}\" appears twice"))),
            None => Ok(()),
        }
    };
    for key in ["activation_encodings", "param_encodings", "encodings"] {
        let Some(group) = root.get(key) else { continue };
        match group.json {
            Json::List(_) => {
                for item in group.items()? {
                    let name = item.get("name").ok_or_else(|| item.wrong("the name is missing"))?.text()?;
                    let found = if item.has("output_dtype") { v2(&item)? } else { v1(&item)? };
                    add(name, found, &item)?;
                }
            }
            _ => {
                for (name, list) in group.entries()? {
                    add(name, v0(&list)?, &list)?;
                }
            }
        }
    }
    let mut notes = vec!["Tensors that are not in the model or stay in float are ignored.".to_owned()];
    if floats > 0 {
        notes.push(format!("{floats} tensors with float encodings stay in float."));
    }
    Ok(of_tensors("file of encodings (AIMET, QNN)", tensors, notes))
}

/// The encoding of a tensor, in any version.
struct Encoding {
    bits: i64,
    symmetric: bool,
    scales: Vec<f32>,
    offsets: Vec<i64>,
    axis: Option<i64>,
    block: Option<i64>,
}

impl Encoding {
    fn tensor(self, at: &At<'_>) -> Result<Tensor> {
        let Self { bits, symmetric, scales, offsets, axis, block } = self;
        let dtype = match (bits, symmetric) {
            (2, true) => Dtype::Element(Format::Int2),
            (2, false) => Dtype::Element(Format::Uint2),
            (4, true) => Dtype::Element(Format::Int4),
            (4, false) => Dtype::Element(Format::Uint4),
            (8, true) => Dtype::Element(Format::Int8),
            (8, false) => Dtype::Element(Format::Uint8),
            (16, true) => Dtype::Element(Format::Int16),
            (16, false) => Dtype::Element(Format::Uint16),
            _ => {
                return Err(at.wrong(format!("there is no {bits}-bit format")).with_hint("use 2, 4, 8 or 16 bits"));
            }
        };
        if let Some(bad) = scales.iter().find(|s| !s.is_normal() || **s < 0.0) {
            return Err(at.wrong(format!("{bad} is not a valid scale")));
        }
        if !symmetric && offsets.len() != scales.len() {
            return Err(at.wrong(format!("{} offsets for {} scales", offsets.len(), scales.len())));
        }
        let last = (1i64 << bits) - 1;
        if let Some(bad) = offsets.iter().find(|o| !(-last..=0).contains(*o)).filter(|_| !symmetric) {
            return Err(at.wrong(format!("the offset {bad} is not in {}..=0", -last)));
        }
        let zero_point = (!symmetric).then(|| Numbers::new(offsets.iter().map(|&o| -o as i32).collect()));
        let granularity = match (block, scales.len()) {
            (Some(_), _) => Some(Share::PerGroup),
            (None, 1) if axis.is_none() => None,
            _ => Some(Share::PerChannel),
        };
        let group_size = match block.map(u32::try_from) {
            None => None,
            Some(Ok(size)) if size > 0 => Some(size),
            Some(_) => return Err(at.wrong("the block size is not a number of elements")),
        };
        Ok(Tensor {
            optional: true,
            dtype: Some(dtype),
            symmetric: Some(symmetric),
            granularity,
            ch_axis: axis,
            group_size,
            scale: Some(Numbers::new(scales)),
            zero_point,
            ..Tensor::default()
        })
    }
}

/// Version 0.6.1: a list of tables, one for each channel; `None` for a float tensor.
fn v0(list: &At<'_>) -> Result<Option<Tensor>> {
    let items = list.items()?;
    let first = items.first().ok_or_else(|| list.wrong("the list is empty"))?;
    let bits = first.get("bitwidth").ok_or_else(|| first.wrong("bitwidth is missing"))?.integer()?;
    if is_float(first)? || bits == 32 {
        return Ok(None);
    }
    let symmetric = match first.get("is_symmetric") {
        None => false,
        // Python's words.
        Some(at) => match at.json {
            Json::Text(_) => at.word(&[("True", true), ("False", false), ("true", true), ("false", false)])?,
            _ => at.bool()?,
        },
    };
    let mut encoding = Encoding { bits, symmetric, scales: Vec::new(), offsets: Vec::new(), axis: None, block: None };
    for item in &items {
        item.only(&["bitwidth", "dtype", "is_symmetric", "max", "min", "offset", "scale"])?;
        let Some(scale) = item.get("scale") else {
            let end = |key: &str| item.get(key).map(|at| finite(&at)).transpose();
            let ([_], Some(low), Some(high)) = (items.as_slice(), end("min")?, end("max")?) else {
                return Err(item.wrong("scale is missing"));
            };
            let dtype = Encoding { scales: vec![1.0], offsets: vec![0], ..encoding }.tensor(item)?;
            return Ok(Some(Tensor { range: Some([low, high]), scale: None, zero_point: None, ..dtype }));
        };
        encoding.scales.push(finite(&scale)?);
        if let Some(offset) = item.get("offset") {
            encoding.offsets.push(offset.integer()?);
        }
    }
    encoding.tensor(list).map(Some)
}

/// Version 1.0.0: lists of scales and offsets.
fn v1(item: &At<'_>) -> Result<Option<Tensor>> {
    item.only(&[
        "name",
        "enc_type",
        "dtype",
        "bw",
        "is_sym",
        "scale",
        "offset",
        "block_size",
        "compressed_bw",
        "per_block_int_scale",
    ])?;
    if is_float(item)? {
        return Ok(None);
    }
    let blocks = [("PER_TENSOR", false), ("PER_CHANNEL", false), ("PER_BLOCK", true)];
    let block = item.get("enc_type").map(|at| at.word(&blocks)).transpose()?.unwrap_or(false);
    let size = if block { item.get("block_size").map(|at| at.integer()).transpose()? } else { None };
    if block && size.is_none() {
        return Err(item.wrong("block_size is missing"));
    }
    let encoding = Encoding {
        bits: item.get("bw").ok_or_else(|| item.wrong("bw is missing"))?.integer()?,
        symmetric: item.get("is_sym").map(|at| at.bool()).transpose()?.unwrap_or(false),
        scales: list(item, "scale", finite)?,
        offsets: list(item, "offset", At::integer)?,
        axis: None,
        block: size,
    };
    encoding.tensor(item).map(Some)
}

/// Version 2.0.0: ONNX's names for the same.
fn v2(item: &At<'_>) -> Result<Option<Tensor>> {
    item.only(&["name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size", "per_block_int_scale"])?;
    let dtype = item.get("output_dtype").ok_or_else(|| item.wrong("output_dtype is missing"))?;
    let (symmetric, bits) = match dtype.text()? {
        "float16" | "float32" | "bfloat16" => return Ok(None),
        text => match (text.strip_prefix("uint"), text.strip_prefix("int")) {
            (Some(bits), _) => (false, bits),
            (None, Some(bits)) => (true, bits),
            _ => return Err(dtype.wrong("this format has no counterpart")),
        },
    };
    let bits = bits.parse().map_err(|_| dtype.wrong("this format has no counterpart"))?;
    let scales = list(item, "y_scale", finite)?;
    let zeros = list(item, "y_zero_point", At::integer)?;
    if symmetric && zeros.iter().any(|&z| z != 0) {
        return Err(item.wrong("signed integers with a zero point have no counterpart here"));
    }
    let offsets = if zeros.is_empty() { vec![0; scales.len()] } else { zeros.iter().map(|z| -z).collect() };
    let number = |key: &str| item.get(key).map(|at| at.integer()).transpose();
    let (axis, block) = (number("axis")?, number("block_size")?);
    Encoding { bits, symmetric, scales, offsets, axis, block }.tensor(item).map(Some)
}

/// A number, or the numbers of a list, however deep.
fn list<'a, T>(item: &At<'a>, key: &str, read: fn(&At<'a>) -> Result<T>) -> Result<Vec<T>> {
    fn collect<'a, T>(at: &At<'a>, read: fn(&At<'a>) -> Result<T>, out: &mut Vec<T>) -> Result<()> {
        if let Json::List(_) = at.json {
            return at.items()?.iter().try_for_each(|at| collect(at, read, out));
        }
        out.push(read(at)?);
        Ok(())
    }
    let mut out = Vec::new();
    if let Some(at) = item.get(key) {
        collect(&at, read, &mut out)?;
    }
    Ok(out)
}

fn is_float(item: &At<'_>) -> Result<bool> {
    let Some(dtype) = item.get("dtype") else { return Ok(false) };
    Ok(dtype.text()?.eq_ignore_ascii_case("float"))
}
