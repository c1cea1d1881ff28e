//! The calibration cache of `TensorRT`.
//!
//! A line that names the version and the calibrator, then one for each tensor: its name, and the scale of int8 as the
//! hexadecimal digits of a float, the highest byte first. Codes are symmetric: amax is 127 scales.

use std::collections::BTreeMap;

use super::{Imported, of_tensors};
use crate::config::spec::{Dtype, Format};
use crate::config::{Numbers, Tensor};
use crate::error::{Error, Kind, Result};

/// Whether a text begins as a cache does.
pub(super) fn is_cache(text: &str) -> bool {
    let first = text.lines().next().unwrap_or_default();
    first.starts_with("TRT-") && first.contains("alibration")
}

pub(super) fn convert(text: &str) -> Result<Imported> {
    let mut tensors = BTreeMap::new();
    let mut unused = 0;
    for (index, line) in text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |message: String| Err(Error::new(Kind::Config, message).at_line(index + 1));
        let Some((name, digits)) = line.rsplit_once(": ") else {
            return wrong("expected a name, a colon and a scale".to_owned());
        };
        let Ok(bits) = u32::from_str_radix(digits.trim(), 16) else {
            return wrong(format!("\"{}\" is not a scale in eight hexadecimal digits", digits.trim()));
        };
        let scale = f32::from_bits(bits);
        if scale.abs() < f32::MIN_POSITIVE {
            // A tensor that was always zero.
            unused += 1;
            continue;
        }
        if !scale.is_normal() || scale < 0.0 {
            return wrong(format!("{scale} is the scale of \"{name}\", which is not a positive number"));
        }
        let tensor = Tensor {
            optional: true,
            dtype: Some(Dtype::Element(Format::Int8)),
            symmetric: Some(true),
            scale: Some(Numbers::One(scale)),
            ..Tensor::default()
        };
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return wrong(format!("\"{name}\" appears twice"));
        }
    }
    let mut notes = vec![
        "The scales are for symmetric int8 activations, as in TensorRT. Tensors that are not in the model or stay in float are ignored."
            .to_owned(),
    ];
    if unused > 0 {
        notes.push(format!("{unused} tensors with a scale of 0 were left out: all their values were zero."));
    }
    Ok(of_tensors("calibration cache of TensorRT", tensors, notes))
}
