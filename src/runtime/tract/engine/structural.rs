//! Operators of the default domain that tract does not have, or computes with less care.

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;
use tract_onnx::pb::NodeProto;

use super::images::{AffineGrid, CenterCropPad, Col2Im, DeformConv, RoiAlign};
use super::native::{Known, Native, call, floats, integers, need};
use super::operators::Built;

/// Names of the operators of this file.
pub(super) const OPERATORS: [&str; 10] = [
    "AffineGrid",
    "CenterCropPad",
    "Col2Im",
    "CumProd",
    "DeformConv",
    "DynamicQuantizeLinear",
    "LogSoftmax",
    "ReverseSequence",
    "RoiAlign",
    "TensorScatter",
];

/// Builds one of [`OPERATORS`], as opset `opset` has it.
pub(super) fn build(node: &NodeProto, opset: i64) -> Built {
    let int = |name: &str, default: i64| -> TractResult<i64> { Ok(node.get_attr_opt(name)?.unwrap_or(default)) };
    let size = |name: &str, default: usize| -> TractResult<usize> { Ok(usize::try_from(int(name, default as i64)?)?) };
    let text = |name: &str, default: &str| -> TractResult<String> {
        Ok(node.get_attr_opt(name)?.unwrap_or_else(|| default.to_owned()))
    };
    match node.op_type.as_str() {
        "AffineGrid" => call(node, AffineGrid { align_corners: int("align_corners", 0)? != 0 }),
        "CenterCropPad" => call(node, CenterCropPad { axes: ints(node, "axes") }),
        "Col2Im" => call(
            node,
            Col2Im { dilations: ints(node, "dilations"), pads: ints(node, "pads"), strides: ints(node, "strides") },
        ),
        "CumProd" => call(node, CumProd { exclusive: int("exclusive", 0)? != 0, reverse: int("reverse", 0)? != 0 }),
        "DeformConv" => call(
            node,
            DeformConv {
                dilations: ints(node, "dilations").unwrap_or_else(|| vec![1, 1]),
                pads: ints(node, "pads").unwrap_or_else(|| vec![0; 4]),
                strides: ints(node, "strides").unwrap_or_else(|| vec![1, 1]),
                groups: size("group", 1)?.max(1),
                offset_groups: size("offset_group", 1)?.max(1),
            },
        ),
        "DynamicQuantizeLinear" => call(node, DynamicQuantize),
        "LogSoftmax" => {
            let joined = opset < 13;
            call(node, LogSoftmax { axis: int("axis", if joined { 1 } else { -1 })?, joined })
        }
        "ReverseSequence" => call(node, ReverseSequence { batch: size("batch_axis", 1)?, time: size("time_axis", 0)? }),
        "RoiAlign" => {
            // Opset 16 changed the default.
            let mode = text("coordinate_transformation_mode", "half_pixel")?;
            let op = RoiAlign {
                half_pixel: match mode.as_str() {
                    "half_pixel" => true,
                    "output_half_pixel" => false,
                    other => bail!("RoiAlign with coordinates {other}"),
                },
                max: match text("mode", "avg")?.as_str() {
                    "avg" => false,
                    "max" => true,
                    other => bail!("RoiAlign with mode {other}"),
                },
                size: [size("output_height", 1)?, size("output_width", 1)?],
                samples: size("sampling_ratio", 0)?,
                scale: node.get_attr_opt("spatial_scale")?.unwrap_or(1.),
            };
            call(node, op)
        }
        "TensorScatter" => {
            let circular = match text("mode", "linear")?.as_str() {
                "linear" => false,
                "circular" => true,
                other => bail!("TensorScatter with mode {other}"),
            };
            call(node, TensorScatter { axis: int("axis", -2)?, circular })
        }
        other => bail!("operator {other} is not implemented"),
    }
}

fn ints(node: &NodeProto, name: &str) -> Option<Vec<i64>> {
    node.attribute.iter().find(|a| a.name == name).map(|a| a.ints.clone())
}

pub(super) fn axis_of(axis: i64, rank: usize) -> TractResult<usize> {
    let at = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(at).ok().filter(|&at| at < rank).with_context(|| format!("axis {axis} of {rank}"))
}

pub(super) fn is_float(known: &Known, name: &str) -> TractResult<()> {
    ensure!(known.dtype == DatumType::F32, "{name} of {:?} is not implemented", known.dtype);
    Ok(())
}

/// The sizes that an input gives.
pub(super) fn sizes_of(known: &Known) -> TractResult<Vec<usize>> {
    let value = known.value.as_ref().with_context(|| "a size is not known before the run")?;
    Ok(integers(value)?.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>()?)
}

// --- Sequences in time

#[derive(Debug)]
struct ReverseSequence {
    batch: usize,
    time: usize,
}

impl Native for ReverseSequence {
    fn name(&self) -> &'static str {
        "ReverseSequence"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let x = need(inputs, 0)?;
        ensure!(self.batch != self.time && self.batch.max(self.time) < x.shape.len(), "axes of {:?}", x.shape);
        Ok(vec![(x.dtype, x.shape.clone())])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (x, lengths) = (need(inputs, 0)?, integers(need(inputs, 1)?)?);
        let (batch, steps) = (x.shape()[self.batch], x.shape()[self.time]);
        ensure!(lengths.len() == batch, "{} lengths for {batch} sequences", lengths.len());
        let mut rows = Vec::with_capacity(batch);
        for (row, length) in lengths.into_iter().enumerate() {
            let length = usize::try_from(length).ok().filter(|&l| l <= steps);
            let length = length.with_context(|| format!("a length beyond {steps}"))?;
            let row = x.slice(self.batch, row, row + 1)?;
            let mut parts =
                (0..length).rev().map(|at| row.slice(self.time, at, at + 1)).collect::<TractResult<Vec<_>>>()?;
            if length < steps {
                parts.push(row.slice(self.time, length, steps)?);
            }
            rows.push(Tensor::stack_tensors(self.time, &parts)?);
        }
        Ok(vec![if rows.is_empty() { x.deep_clone() } else { Tensor::stack_tensors(self.batch, &rows)? }])
    }
}

#[derive(Debug)]
struct TensorScatter {
    axis: i64,
    circular: bool,
}

impl Native for TensorScatter {
    fn name(&self) -> &'static str {
        "TensorScatter"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let (cache, update) = (need(inputs, 0)?, need(inputs, 1)?);
        let axis = axis_of(self.axis, cache.shape.len())?;
        let fits = cache.shape.len() == update.shape.len()
            && cache
                .shape
                .iter()
                .zip(&update.shape)
                .enumerate()
                .all(|(i, (c, u))| if i == axis { c >= u } else { c == u });
        ensure!(axis > 0 && fits, "{:?} is written into {:?}", update.shape, cache.shape);
        Ok(vec![(cache.dtype, cache.shape.clone())])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (cache, update) = (need(inputs, 0)?, need(inputs, 1)?);
        let axis = axis_of(self.axis, cache.rank())?;
        let (batch, steps, new) = (cache.shape()[0], cache.shape()[axis], update.shape()[axis]);
        let starts = match inputs.get(2).copied().flatten() {
            Some(starts) => integers(starts)?,
            None => vec![0; batch],
        };
        ensure!(starts.len() == batch, "{} positions for {batch} sequences", starts.len());
        let mut rows = Vec::with_capacity(batch);
        for (row, start) in starts.into_iter().enumerate() {
            let start = usize::try_from(start).with_context(|| "a negative position")?;
            let from = update.slice(0, row, row + 1)?;
            let mut to = cache.slice(0, row, row + 1)?;
            for at in 0..new {
                let place = if self.circular { (start + at) % steps } else { start + at };
                ensure!(place < steps, "position {place} of {steps}");
                to.assign_slice(place..=place, &from, at..=at, axis)?;
            }
            rows.push(to);
        }
        Ok(vec![if rows.is_empty() { cache.deep_clone() } else { Tensor::stack_tensors(0, &rows)? }])
    }
}

#[derive(Debug)]
struct CumProd {
    exclusive: bool,
    reverse: bool,
}

impl CumProd {
    fn run<T: Datum + Copy + std::ops::Mul<Output = T>>(&self, x: &Tensor, axis: usize, one: T) -> TractResult<Tensor> {
        let shape = x.shape();
        let (len, inner) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
        let plain = x.try_as_plain_ram()?;
        let values = plain.as_slice::<T>()?;
        let mut out = values.to_vec();
        for start in (0..values.len()).step_by((len * inner).max(1)) {
            for lane in 0..inner {
                let mut product = one;
                for step in 0..len {
                    let step = if self.reverse { len - 1 - step } else { step };
                    let at = start + step * inner + lane;
                    let next = product * values[at];
                    out[at] = if self.exclusive { product } else { next };
                    product = next;
                }
            }
        }
        Tensor::from_shape(shape, &out)
    }
}

impl Native for CumProd {
    fn name(&self) -> &'static str {
        "CumProd"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let x = need(inputs, 0)?;
        Ok(vec![(x.dtype, x.shape.clone())])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (x, axis) = (need(inputs, 0)?, integers(need(inputs, 1)?)?);
        let axis = axis_of(axis.first().copied().unwrap_or(0), x.rank())?;
        Ok(vec![match x.datum_type() {
            DatumType::F32 => self.run(x, axis, 1f32)?,
            DatumType::F64 => self.run(x, axis, 1f64)?,
            DatumType::I32 => self.run(x, axis, 1i32)?,
            DatumType::I64 => self.run(x, axis, 1i64)?,
            other => bail!("CumProd of {other:?} is not implemented"),
        }])
    }
}

// --- Numbers

/// Normalizes along one axis, or along all from one on where opsets before 13 join them.
#[derive(Debug)]
struct LogSoftmax {
    axis: i64,
    joined: bool,
}

impl Native for LogSoftmax {
    fn name(&self) -> &'static str {
        "LogSoftmax"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let x = need(inputs, 0)?;
        is_float(x, "LogSoftmax")?;
        Ok(vec![(x.dtype, x.shape.clone())])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let x = need(inputs, 0)?;
        let shape = x.shape();
        let axis = axis_of(self.axis, shape.len())?;
        let split = if self.joined { shape.len() } else { axis + 1 };
        let (len, inner) = (shape[axis..split].iter().product::<usize>(), shape[split..].iter().product::<usize>());
        let values = floats(x)?;
        let mut out = vec![0f32; values.len()];
        for start in (0..values.len()).step_by((len * inner).max(1)) {
            for lane in start..start + inner {
                let row = || (0..len).map(|i| lane + i * inner);
                let max = row().map(|at| values[at]).fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = row().map(|at| (values[at] - max).exp()).sum();
                let log = sum.ln();
                for at in row() {
                    out[at] = values[at] - max - log;
                }
            }
        }
        Ok(vec![Tensor::from_shape(shape, &out)?])
    }
}

/// As onnxruntime: a scale of 1 where there is nothing but zeros, for which the standard's formula has none.
#[derive(Debug)]
struct DynamicQuantize;

impl Native for DynamicQuantize {
    fn name(&self) -> &'static str {
        "DynamicQuantizeLinear"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let x = need(inputs, 0)?;
        is_float(x, "DynamicQuantizeLinear")?;
        Ok(vec![(DatumType::U8, x.shape.clone()), (DatumType::F32, Vec::new()), (DatumType::U8, Vec::new())])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let x = need(inputs, 0)?;
        let values = floats(x)?;
        let (min, max) = values.iter().fold((0f32, 0f32), |(min, max), &v| (min.min(v), max.max(v)));
        let scale = if max > min { (max - min) / 255. } else { 1. };
        let zero = (-min / scale).clamp(0., 255.).round_ties_even();
        let quantized = values.iter().map(|v| ((v / scale).round_ties_even() + zero).clamp(0., 255.) as u8);
        let codes = Tensor::from_shape(x.shape(), &quantized.collect::<Vec<u8>>())?;
        Ok(vec![codes, tensor0(scale), tensor0(zero as u8)])
    }
}
