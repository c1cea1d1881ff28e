//! What is quantized becomes float again, with the numbers that the codes stand for: dequantized constants become float
//! initializers, and Quantize/Dequantize pairs of activations are gone. What is left is what quantizing the constants
//! alone does to the model.
//!
//! `MatMulNBits` and `GatherBlockQuantized` become `MatMul` and `Gather`. Operators that compute in integers stay.

use super::forms::{MICROSOFT, QuantizedTensor};
use super::lower_gather::table_codes;
use super::lower_matmulnbits::base_name;
use super::support::granularity::{granularity, typed_scales};
use super::support::raise;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Quantizer;
use crate::ir::{Model, NodeId, Tensor, ValueId};
use crate::numerics::{self, QParams, pack};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct Dequantize;

impl Pass for Dequantize {
    fn name(&self) -> &'static str {
        "dequantize"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for node in model.nodes_outside_functions() {
            let at = model.node(node);
            let name = model.node_name(node).to_owned();
            let done = match (at.domain(), at.op_type()) {
                ("", "DequantizeLinear") if model.constant_input(node, 0).is_some() => {
                    constant(model, node).inspect(|_| model.remove(&[node]))
                }
                ("", "DequantizeLinear") => activation(model, node),
                (MICROSOFT, "MatMulNBits") => product(model, node),
                (MICROSOFT, "GatherBlockQuantized") => gather(model, node),
                _ => continue,
            };
            match done {
                Ok(change) => outcome.changed(name, change),
                Err(why) => outcome.skipped(name, why),
            }
        }
        Ok(outcome)
    }
}

/// Makes the result of a DequantizeLinear of a constant a constant.
pub(crate) fn constant(model: &mut Model, node: NodeId) -> Result<Change, Reason> {
    let output = model.node(node).output(0).ok_or(Reason::NoOutput)?;
    let tensor = numbers(model, node)?;
    let dtype = tensor.dtype();
    model.make_constant(output, tensor);
    Ok(Change::Dequantized { dtype })
}

/// The numbers of a DequantizeLinear of a constant.
fn numbers(model: &Model, node: NodeId) -> Result<Tensor, Reason> {
    let codes = model.constant_input(node, 0).ok_or(Reason::NotConstant { what: Operand::QuantizedData })?;
    let scale = model.constant_input(node, 1).ok_or(Reason::NotConstant { what: Operand::Scale })?;
    let format = codes
        .dtype()
        .format()
        .ok_or_else(|| Reason::NotQuantizedType { what: Operand::QuantizedData, found: codes.dtype() })?;
    let dims = codes.dims();
    let granularity = granularity(model, node, &dims, &scale.dims())?;
    let (scales, dtype) =
        typed_scales(scale).ok_or_else(|| Reason::wrong_type(Operand::Scale, scale.dtype(), "a float"))?;
    let zero_points = match (model.node(node).input(2), model.constant_input(node, 2)) {
        (Some(_), None) => return Err(Reason::NotConstant { what: Operand::ZeroPoint }),
        (Some(_), Some(zero)) if format.is_integer() => pack::unpack(&zero.raw(), &format, zero.len()),
        _ => vec![0; scales.len()],
    };
    let qparams = QParams { scales, zero_points };
    let values = numerics::dequantize(&codes.raw(), format, &dims, &granularity, &qparams)?;
    let output = Quantizer::of(model.node(node)).and_then(|q| q.output_dtype);
    float(output.unwrap_or(dtype), &dims, &values)
}

fn float(dtype: DataType, dims: &[usize], values: &[f32]) -> Result<Tensor, Reason> {
    if dtype == DataType::Float {
        return Ok(Tensor::from_f32(dims, values));
    }
    let tensor = Tensor::from_f64(dtype, dims, values.iter().map(|&v| f64::from(v)));
    tensor.ok_or_else(|| Reason::wrong_type(Operand::Output, dtype, "a float"))
}

/// A DequantizeLinear behind a quantizer of an activation.
fn activation(model: &mut Model, node: NodeId) -> Result<Change, Reason> {
    let at = model.node(node);
    let (codes, output) =
        (at.input(0).ok_or(Reason::Missing { what: Operand::Input })?, at.output(0).ok_or(Reason::NoOutput)?);
    let quantize = model
        .producer(codes)
        .ok_or_else(|| Reason::NotComputedBy { what: Operand::QuantizedData, wanted: "a quantizer".into() })?;
    let at = model.node(quantize);
    if !at.is("QuantizeLinear") && !at.is("DynamicQuantizeLinear") {
        return Err(Reason::ComputedBy {
            what: Operand::QuantizedData,
            by: at.op_type().into(),
            wanted: "a quantizer".into(),
        });
    }
    let source = at.input(0).ok_or(Reason::Missing { what: Operand::Input })?;
    let (from, to) = (model.dtype(source), model.dtype(output));
    if from.zip(to).is_some_and(|(from, to)| from != to) {
        return Err(Reason::Mismatch { what: "result type".into(), from: "that of its input".into() });
    }
    bypass(model, output, source)?;
    model.remove(&[node]);
    Ok(Change::PairRemoved)
}

/// Lets the readers of `output` read `source`, which takes its name where that is one of the model's outputs.
fn bypass(model: &mut Model, output: ValueId, source: ValueId) -> Result<(), Reason> {
    use super::support::graphs::is_graph_output;
    if is_graph_output(model, output) {
        if model.producer(source).is_none() || is_graph_output(model, source) {
            return Err(Reason::IsGraphOutput { what: Operand::Output });
        }
        let fresh = model.value(source).name().to_owned();
        model.take_name(output, source, &fresh);
    }
    model.replace_uses(output, source, |_| true);
    Ok(())
}

fn product(model: &mut Model, node: NodeId) -> Result<Change, Reason> {
    let weight = QuantizedTensor::from_nbits(model, node)?.transposed()?;
    let name = base_name(model, model.node(node).input(1));
    let value = add(model, node, &name, &weight)?;
    raise::matmul(model, node, value);
    Ok(Change::OnDequantized { op: "MatMul".to_owned() })
}

fn gather(model: &mut Model, node: NodeId) -> Result<Change, Reason> {
    let codes = table_codes(model, node).ok_or(Reason::NotConstant { what: Operand::QuantizedData })?;
    let table = QuantizedTensor::from_gather(model, node, &codes)?;
    let at = model.node(node);
    at.input(1).ok_or(Reason::Missing { what: Operand::Indices })?;
    let name = base_name(model, at.input(0));
    let value = add(model, node, &name, &table)?;
    raise::gather(model, node, value);
    Ok(Change::OnDequantized { op: "Gather".to_owned() })
}

fn add(model: &mut Model, node: NodeId, name: &str, constant: &QuantizedTensor) -> Result<ValueId, Reason> {
    let tensor = float(constant.scale_dtype, &constant.dims, &constant.values()?)?;
    let graph = model.node(node).graph().ok_or(Reason::Missing { what: Operand::Graph })?;
    Ok(model.add_initializer(graph, &format!("{name}_dequantized"), tensor))
}
