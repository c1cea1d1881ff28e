//! `QuantizeLinear` and `DequantizeLinear`.

use super::Call;
use crate::ir::Tensor;
use crate::ir::view::Quantizer;
use crate::numerics::{self, QParams, Round, pack};
use crate::onnx::DataType;
use crate::passes::support::granularity::{granularity, scale_values};

/// Format, granularity and parameters of a Quantize or Dequantize node whose inputs are these.
struct Parameters {
    dtype: DataType,
    granularity: numerics::Granularity,
    qparams: QParams,
}

fn parameters(call: &Call<'_>, dtype: Option<DataType>) -> Option<Parameters> {
    let (x, scale, zero) = (call.input(0)?, call.input(1)?, call.input(2));
    let declared = Quantizer::of(call.node).and_then(|q| q.output_dtype);
    let dtype = dtype.or(zero.map(Tensor::dtype)).or(declared).unwrap_or(DataType::Uint8);
    let format = dtype.format()?;
    if !matches!(scale.dtype(), DataType::Float | DataType::Float8e8m0) {
        return None;
    }
    let scales = scale_values(scale)?;
    let zero_points = match zero {
        Some(zero) if format.is_integer() => pack::unpack(&zero.raw(), &format, zero.len()),
        _ => vec![0; scales.len()],
    };
    let granularity = granularity(call.model, call.id, &x.dims(), &scale.dims()).ok()?;
    Some(Parameters { dtype, granularity, qparams: QParams { scales, zero_points } })
}

pub(super) fn quantize(call: &Call<'_>) -> Option<Tensor> {
    let x = call.input(0).filter(|x| x.dtype() == DataType::Float)?;
    let Parameters { dtype, granularity, qparams } = parameters(call, None)?;
    let (values, format) = (x.to_f32()?, dtype.format()?);
    let raw = numerics::quantize(&values, &x.dims(), &granularity, &qparams, format, Round::HalfEven).ok()?;
    Some(Tensor::new(dtype, &x.dims(), raw))
}

pub(super) fn dequantize(call: &Call<'_>) -> Option<Tensor> {
    let x = call.input(0)?;
    let Parameters { dtype, granularity, qparams } = parameters(call, Some(x.dtype()))?;
    let values = numerics::dequantize(&x.raw(), dtype.format()?, &x.dims(), &granularity, &qparams).ok()?;
    Some(Tensor::from_f32(&x.dims(), &values))
}
