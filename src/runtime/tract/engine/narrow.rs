//! `Cast` to types that tract does not have. Floats of eight and four bits are float32 tensors that hold only what those can,
//! integers below eight bits are bytes.

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;
use tract_onnx::pb::NodeProto;

use super::native::{Known, Native, call, floats, integers, need};
use super::operators::Built;
use super::tensors::datum_type;
use crate::numerics::Format;
use crate::onnx::DataType;

/// A `Cast` to a type that tract does not have: attributes `to`, `saturate`.
pub(crate) const NARROW: &str = "amax.Narrow";

#[derive(Debug)]
struct Narrow {
    dtype: DataType,
    format: Format,
    saturate: bool,
}

pub(super) fn build(node: &NodeProto) -> Built {
    let dtype = DataType::from_code(node.get_attr::<i64>("to")? as i32);
    let Some((dtype, format)) = dtype.and_then(|d| Some((d, d.format()?))) else { bail!("casts to {dtype:?}") };
    call(node, Narrow { dtype, format, saturate: node.get_attr_opt::<i64>("saturate")?.unwrap_or(1) != 0 })
}

impl Native for Narrow {
    fn name(&self) -> &'static str {
        "Cast"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let dtype = datum_type(self.dtype).with_context(|| format!("casts to {}", self.dtype))?;
        Ok(vec![(dtype, need(inputs, 0)?.shape.clone())])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let input = need(inputs, 0)?;
        let made = if self.format.is_integer() {
            let bits = 32 - self.format.bits() as u32;
            let wrap = |v: i64| {
                let low = (v as i32) << bits;
                if self.format.is_signed() { low >> bits } else { (low as u32 >> bits) as i32 }
            };
            let whole = if input.datum_type().is_float() {
                floats(input)?.into_iter().map(|v| v as i64).collect()
            } else {
                integers(input)?
            };
            let values: Vec<i32> = whole.into_iter().map(wrap).collect();
            let made = Tensor::from_shape(input.shape(), &values)?;
            made.cast_to_dt(if self.format.is_signed() { DatumType::I8 } else { DatumType::U8 })?.into_owned()
        } else {
            let values: Vec<f32> = floats(input)?.into_iter().map(|v| round(v, self.format, self.saturate)).collect();
            Tensor::from_shape(input.shape(), &values)?
        };
        Ok(vec![made])
    }
}

/// The number of a small float format nearest to `x`. Without `saturate`, what is too large becomes infinite, or NaN in
/// formats without infinities; `float4e2m1` has neither and always saturates.
pub(super) fn round(x: f32, format: Format, saturate: bool) -> f32 {
    // Half a step above the largest number: ties go to the even neighbour, which in `float8e4m3fn` is that number.
    let (limit, tie, beyond) = match format {
        Format::Float8e4m3fn => (464., false, f32::NAN),
        Format::Float8e4m3fnuz => (248., true, f32::NAN),
        Format::Float8e5m2 => (61440., true, f32::INFINITY),
        Format::Float8e5m2fnuz => (61440., true, f32::NAN),
        _ => (f32::INFINITY, false, f32::NAN),
    };
    if !saturate && (x.abs() > limit || tie && x.abs() >= limit) {
        return beyond.copysign(x);
    }
    format.decode(format.encode(x))
}
