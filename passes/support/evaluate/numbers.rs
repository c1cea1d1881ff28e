//! Arithmetic, comparisons and conversions.

use super::views::{broadcast, sources, zip};
use super::{Call, product, tensor};
use crate::ir::Tensor;
use crate::ir::view::axis_in;
use crate::numerics::pack;
use crate::onnx::DataType;

impl Call<'_> {
    pub(super) fn arithmetic(&self) -> Option<Tensor> {
        let (a, b) = (self.input(0)?, self.input(1)?);
        if self.opset < 7 || a.dtype() != b.dtype() {
            return None;
        }
        let op = self.node.op_type();
        let float = |x: f32, y: f32| match op {
            "Add" => x + y,
            "Sub" => x - y,
            "Mul" => x * y,
            _ => x / y,
        };
        let integer = |x: i64, y: i64| match op {
            "Add" => x.checked_add(y),
            "Sub" => x.checked_sub(y),
            "Mul" => x.checked_mul(y),
            _ => x.checked_div(y),
        };
        let (own, other) = (a.dims(), b.dims());
        let dims = broadcast(&own, &other)?;
        product(&dims)?;
        let data = match a.dtype() {
            DataType::Float => {
                let (x, y) = (a.to_f32()?, b.to_f32()?);
                zip((&x, &own), (&y, &other), &dims, |x, y| Some(float(x, y).to_le_bytes()))?.into_flattened()
            }
            DataType::Int64 => {
                let (x, y) = (a.to_i64()?, b.to_i64()?);
                zip((&x, &own), (&y, &other), &dims, |x, y| Some(integer(x, y)?.to_le_bytes()))?.into_flattened()
            }
            DataType::Int32 => {
                let (x, y) = (a.to_i64()?, b.to_i64()?);
                let narrow = |x, y| Some(i32::try_from(integer(x, y)?).ok()?.to_le_bytes());
                zip((&x, &own), (&y, &other), &dims, narrow)?.into_flattened()
            }
            _ => return None,
        };
        tensor(a.dtype(), &dims, data)
    }

    pub(super) fn equal(&self) -> Option<Tensor> {
        let (a, b) = (self.input(0)?, self.input(1)?);
        if self.opset < 7 || a.dtype() != b.dtype() {
            return None;
        }
        let (own, other) = (a.dims(), b.dims());
        let dims = broadcast(&own, &other)?;
        let (x, y) = (a.to_i64()?, b.to_i64()?);
        let data = zip((&x, &own), (&y, &other), &dims, |x, y| Some(u8::from(x == y)))?;
        tensor(DataType::Bool, &dims, data)
    }

    pub(super) fn not(&self) -> Option<Tensor> {
        let data = self.input(0).filter(|data| data.dtype() == DataType::Bool)?;
        tensor(DataType::Bool, &data.dims(), data.raw().iter().map(|&b| u8::from(b == 0)).collect())
    }

    /// A `Cast` whose result no standard leaves open.
    pub(super) fn cast(&self) -> Option<Tensor> {
        cast(self.input(0)?, self.cast_type()?)
    }

    /// The type that a `Cast` names.
    pub(super) fn cast_type(&self) -> Option<DataType> {
        DataType::from_code(i32::try_from(self.node.int("to")?).ok()?)
    }

    /// What `f` makes of each float; nothing where that is NaN.
    pub(super) fn each(&self, f: impl Fn(f32) -> f32) -> Option<Tensor> {
        let x = self.input(0).filter(|x| x.dtype() == DataType::Float)?;
        let values: Vec<f32> = x.to_f32()?.into_iter().map(f).collect();
        values.iter().all(|v| !v.is_nan()).then(|| Tensor::from_f32(&x.dims(), &values))
    }

    /// `Min` and `Max`.
    pub(super) fn extremes(&self, least: bool) -> Option<Tensor> {
        let mut result = self.input(0)?.clone();
        for input in self.inputs.get(1..)? {
            result = extreme(&result, input.as_ref()?, least)?;
        }
        Some(result)
    }

    pub(super) fn clip(&self) -> Option<Tensor> {
        let mut result = self.input(0)?.clone();
        for (index, name, least) in [(1, "min", false), (2, "max", true)] {
            let bound = match self.inputs.get(index) {
                Some(Some(bound)) if bound.len() == 1 => Some(bound.clone().reshaped(&[])),
                Some(Some(_)) => return None,
                _ => self.node.float(name).map(|value| Tensor::from_f32(&[], &[value])),
            };
            if let Some(bound) = bound {
                result = extreme(&result, &bound, least)?;
            }
        }
        Some(result)
    }

    /// `ReduceMin` and `ReduceMax`.
    pub(super) fn reduce(&self, least: bool) -> Option<Tensor> {
        let x = self.input(0)?;
        if x.dtype() != DataType::Float || self.opset < 7 {
            return None;
        }
        let dims = x.dims();
        let given = match self.input(1) {
            Some(tensor) => Some(tensor.to_i64()?),
            None => self.node.ints("axes").map(<[i64]>::to_vec),
        };
        let reduced: Vec<usize> = match given {
            Some(axes) if !axes.is_empty() => {
                axes.into_iter().map(|axis| axis_in(axis, dims.len())).collect::<Option<_>>()?
            }
            _ if self.node.int("noop_with_empty_axes").unwrap_or(0) != 0 => return Some(x.clone()),
            _ => (0..dims.len()).collect(),
        };
        let kept: Vec<usize> =
            dims.iter().enumerate().map(|(at, &d)| if reduced.contains(&at) { 1 } else { d }).collect();
        let values = x.to_f32()?;
        if values.is_empty() || values.iter().any(|v| v.is_nan()) {
            return None;
        }
        let mut out = vec![if least { f32::INFINITY } else { f32::NEG_INFINITY }; kept.iter().product()];
        for (value, to) in values.iter().zip(sources(&kept, &dims)) {
            out[to] = if least { out[to].min(*value) } else { out[to].max(*value) };
        }
        let keep = self.node.int("keepdims").unwrap_or(1) != 0;
        let shape: Vec<usize> = if keep {
            kept
        } else {
            dims.iter().enumerate().filter(|(at, _)| !reduced.contains(at)).map(|(_, &d)| d).collect()
        };
        Some(Tensor::from_f32(&shape, &out))
    }
}

/// Converts to another numeric type; `None` where the standard leaves the result open for one of the elements.
fn cast(data: &Tensor, to: DataType) -> Option<Tensor> {
    let from = data.dtype();
    if from == to {
        return Some(data.clone());
    }
    if let Some(values) = data.to_i64() {
        return integers_to(&values, data, to);
    }
    let values = data.to_f64()?;
    match to {
        // Some runtimes go through float32.
        DataType::Float16 | DataType::Bfloat16 if from == DataType::Double => None,
        DataType::Bool => tensor(to, &data.dims(), values.iter().map(|&v| u8::from(v != 0.0)).collect()),
        _ if to.is_float() => Tensor::from_f64(to, &data.dims(), values),
        _ => tensor(to, &data.dims(), integer_bytes(values.into_iter().map(truncated), to)?),
    }
}

fn integers_to(values: &[i64], data: &Tensor, to: DataType) -> Option<Tensor> {
    // An unsigned value beyond the signed range arrives negative.
    if data.dtype() == DataType::Uint64 && values.iter().any(|&v| v < 0) {
        return None;
    }
    // Some runtimes go through float on the way to the 16-bit types: only integers that both hold come out alike.
    let small = |limit: u64| values.iter().all(|v| v.unsigned_abs() <= limit);
    let exact = match to {
        DataType::Float16 => small(2048),
        DataType::Bfloat16 => small(256),
        _ => true,
    };
    let dims = data.dims();
    match to {
        // Straight from the integer: by way of float64 it would be rounded twice.
        DataType::Float => tensor(to, &dims, values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect()),
        _ if to.is_float() && exact => Tensor::from_f64(to, &dims, values.iter().map(|&v| v as f64)),
        _ => tensor(to, &dims, integer_bytes(values.iter().map(|&v| Some(v)), to)?),
    }
}

/// Towards zero, where an i64 holds the result.
fn truncated(value: f64) -> Option<i64> {
    (value.is_finite() && value.abs() < 9.2e18).then_some(value as i64)
}

fn integer_bytes(mut values: impl Iterator<Item = Option<i64>>, to: DataType) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    values.try_for_each(|v| {
        let v = v?;
        match to {
            DataType::Bool => out.push(u8::from(v != 0)),
            DataType::Int8 => out.extend(i8::try_from(v).ok()?.to_le_bytes()),
            DataType::Uint8 => out.push(u8::try_from(v).ok()?),
            DataType::Int16 => out.extend(i16::try_from(v).ok()?.to_le_bytes()),
            DataType::Uint16 => out.extend(u16::try_from(v).ok()?.to_le_bytes()),
            DataType::Int32 => out.extend(i32::try_from(v).ok()?.to_le_bytes()),
            DataType::Uint32 => out.extend(u32::try_from(v).ok()?.to_le_bytes()),
            DataType::Int64 => out.extend(v.to_le_bytes()),
            DataType::Uint64 => out.extend(u64::try_from(v).ok()?.to_le_bytes()),
            _ => return None,
        }
        Some(())
    })?;
    Some(out)
}

/// Converts what a quantizer rounded: whole numbers, also to integers of four bits.
pub(super) fn cast_rounded(x: &Tensor, to: DataType) -> Option<Tensor> {
    if x.dtype() == to {
        return Some(x.clone());
    }
    let dims = x.dims();
    if let Some(values) = x.to_i64() {
        return match to {
            // Every integer that a quantizer has is exact in f32.
            DataType::Float => {
                let exact = values.iter().all(|v| v.unsigned_abs() <= 1 << 24);
                exact.then(|| Tensor::from_f32(&dims, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()))
            }
            _ => integers(to, &dims, &values),
        };
    }
    if x.dtype() != DataType::Float {
        return None;
    }
    let values = x.to_f32()?;
    // Beyond these the standard leaves the result open.
    if values.iter().any(|v| v.abs() > 2e9 || v.is_nan()) {
        return None;
    }
    integers(to, &dims, &values.iter().map(|&v| v as i64).collect::<Vec<_>>())
}

/// A tensor of an integer type; `None` where it cannot hold the values.
fn integers(dtype: DataType, dims: &[usize], values: &[i64]) -> Option<Tensor> {
    if !matches!(dtype, DataType::Int4 | DataType::Uint4) {
        return tensor(dtype, dims, integer_bytes(values.iter().map(|&v| Some(v)), dtype)?);
    }
    let format = dtype.format()?;
    let (low, high) = format.range();
    let codes: Vec<i32> = values.iter().map(|&v| i32::try_from(v).ok()).collect::<Option<_>>()?;
    let fit = codes.iter().all(|code| (low..=high).contains(code));
    fit.then(|| Tensor::new(dtype, dims, pack::pack(&codes, format.bits())))
}

fn extreme(a: &Tensor, b: &Tensor, least: bool) -> Option<Tensor> {
    if a.dtype() != b.dtype() {
        return None;
    }
    let (own, other) = (a.dims(), b.dims());
    let dims = broadcast(&own, &other)?;
    if a.dtype() == DataType::Float {
        let pick = |x: f32, y: f32| {
            let known = !x.is_nan() && !y.is_nan();
            known.then(|| if least { x.min(y) } else { x.max(y) })
        };
        let values = zip((&a.to_f32()?, &own), (&b.to_f32()?, &other), &dims, pick)?;
        return Some(Tensor::from_f32(&dims, &values));
    }
    let pick = |x: i64, y: i64| Some(if least { x.min(y) } else { x.max(y) });
    integers(a.dtype(), &dims, &zip((&a.to_i64()?, &own), (&b.to_i64()?, &other), &dims, pick)?)
}
