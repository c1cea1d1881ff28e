//! Ranges and scales fixed by the user for single tensors.

use std::collections::BTreeMap;

use super::planner::Planner;
use super::{Given, Scheme, tensor_names};
use crate::config::{Config, Numbers, Tensor as ByHand};
use crate::error::Result;
use crate::ir::{Model, ValueId};
use crate::nearest::nearest;
use crate::numerics::Format;

/// The tensors with a range or scale fixed by the user.
pub(super) fn given<'a>(model: &Model, config: &'a Config) -> Result<BTreeMap<ValueId, &'a ByHand>> {
    let mut found = BTreeMap::new();
    for (name, by_hand) in &config.tensor {
        let Some(value) = model.value_named(name) else {
            if by_hand.optional {
                continue;
            }
            let path = format!("tensor.{name}");
            let error = config.error(&path, format!("the model has no tensor \"{name}\""));
            return Err(match nearest(name, tensor_names(model)) {
                Some(near) => error.with_hint(format!("did you mean \"{near}\"?")),
                None => error.with_hint("`amax inspect --nodes` lists them"),
            });
        };
        found.insert(value, by_hand);
    }
    Ok(found)
}

impl Planner<'_> {
    /// Scale, zero point and format of a value that the model dequantizes, where it has one scale.
    pub(super) fn dequantized(&self, value: ValueId) -> Option<(f32, i32, Format)> {
        let node = self.model.producer(value).filter(|&node| self.model.node(node).is("DequantizeLinear"))?;
        let format = self.model.dtype(self.model.node(node).input(0)?)?.format().filter(|f| f.is_integer())?;
        let [scale] = self.model.constant_input(node, 1)?.to_f32()?[..] else { return None };
        let zero_point = match self.model.node(node).input(2) {
            Some(_) => i32::try_from(*self.model.constant_input(node, 2)?.to_i64()?.first()?).ok()?,
            None => 0,
        };
        Some((scale, zero_point, format))
    }

    /// A quantizer with the range or scale fixed by the user for a tensor.
    pub(super) fn by_hand(&self, value: Option<ValueId>, mut quantizer: Scheme) -> Result<Scheme> {
        let Some(value) = value else { return Ok(quantizer) };
        let Some(by_hand) = self.given.get(&value) else {
            if let Some((scale, zero_point, format)) = self.dequantized(value)
                && format == quantizer.dtype
                && (zero_point == 0 || !quantizer.symmetric)
            {
                quantizer.given = Some(Given::Scales { scales: vec![scale], zero_points: vec![zero_point] });
            }
            return Ok(quantizer);
        };
        let ByHand { range, scale, zero_point, .. } = by_hand;
        if let Some([low, high]) = *range {
            quantizer.given = Some(Given::Range(low, high));
        }
        let Some(scale) = scale else { return Ok(quantizer) };
        let scales = scale.to_vec();
        let name = self.model.value(value).name();
        let fail = |key: &str, message: String| {
            Err(self.config.error(&format!("tensor.{name}.{key}"), message).at_value(name))
        };
        let dtype = quantizer.dtype;
        let middle = if quantizer.symmetric && !dtype.is_signed() { 1 << (dtype.bits() - 1) } else { 0 };
        let zero_points = zero_point.as_ref().map_or_else(|| vec![middle], Numbers::to_vec);
        if !self.target.zero_points && zero_points.iter().any(|&zero| zero != 0) {
            return fail("zero_point", format!("{} takes zero points of 0 only", self.target.name));
        }
        let (low, high) = if dtype.is_integer() { dtype.range() } else { (0, 0) };
        if let Some(bad) = zero_points.iter().find(|z| !(low..=high).contains(*z)) {
            return fail("zero_point", format!("the zero point {bad} is not in {low}..={high}, the range of {dtype}"));
        }
        if zero_points.len() != 1 && zero_points.len() != scales.len() {
            return fail("zero_point", format!("{} zero points for {} scales", zero_points.len(), scales.len()));
        }
        let zero_points = if zero_points.len() == 1 { vec![zero_points[0]; scales.len()] } else { zero_points };
        quantizer.given = Some(Given::Scales { scales, zero_points });
        Ok(quantizer)
    }
}
