//! What is quantized becomes float again, with the numbers that the codes stand for: dequantized constants become float
//! initializers, and Quantize/Dequantize pairs of activations are gone. What is left is what quantizing the constants
//! alone does to the model.
//!
//! `MatMulNBits` and `GatherBlockQuantized` become `MatMul` and `Gather`. Operators that compute in integers stay.

use super::forms::{MICROSOFT, Quantized};
use super::lower_gather::table_codes;
use super::lower_matmulnbits::{add_behind, base_name};
use super::support::granularity::granularity;
use super::support::nodes::nodes;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::{GatherBlockQuantized, Quantizer};
use crate::ir::{Attr, Model, NodeId, Tensor, ValueId};
use crate::numerics::{self, QParams, pack};
use crate::onnx::DataType;

/// See the module.
#[derive(Debug)]
pub struct Dequantize;

impl Pass for Dequantize {
    fn name(&self) -> &'static str {
        "dequantize"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for node in nodes(model) {
            let at = model.node(node);
            let name = model.node_name(node).to_owned();
            let done = match (at.domain(), at.op_type()) {
                ("", "DequantizeLinear") if model.constant_input(node, 0).is_some() => constant(model, node),
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

/// A DequantizeLinear of a constant.
fn constant(model: &mut Model, node: NodeId) -> Result<Change, String> {
    let output = model.node(node).output(0).ok_or("it has no output")?;
    let tensor = numbers(model, node)?;
    let dtype = tensor.dtype();
    model.make_constant(output, tensor);
    model.remove(&[node]);
    Ok(Change::Dequantized { dtype })
}

/// The numbers of a DequantizeLinear of a constant.
fn numbers(model: &Model, node: NodeId) -> Result<Tensor, String> {
    let codes = model.constant_input(node, 0).ok_or("its codes are not constant")?;
    let scale = model.constant_input(node, 1).ok_or("its scale is not constant")?;
    let format = codes.dtype().format().ok_or_else(|| format!("{} is not a quantized format", codes.dtype()))?;
    let dims = codes.dims();
    let granularity = granularity(model, node, &dims, &scale.dims())?;
    let scales = scale.to_f32().ok_or_else(|| format!("its scales are {}", scale.dtype()))?;
    let zero_points = match (model.node(node).input(2), model.constant_input(node, 2)) {
        (Some(_), None) => return Err("its zero point is not constant".to_owned()),
        (Some(_), Some(zero)) if format.is_integer() => pack::unpack(&zero.raw(), &format, zero.len()),
        _ => vec![0; scales.len()],
    };
    let qparams = QParams { scales, zero_points };
    let values = numerics::dequantize(&codes.raw(), format, &dims, &granularity, &qparams);
    let values = values.map_err(|e| e.message().to_owned())?;
    let output = Quantizer::of(model.node(node)).and_then(|q| q.output_dtype);
    float(output.unwrap_or(scale.dtype()), &dims, &values)
}

fn float(dtype: DataType, dims: &[usize], values: &[f32]) -> Result<Tensor, String> {
    if dtype == DataType::Float {
        return Ok(Tensor::from_f32(dims, values));
    }
    let tensor = Tensor::from_f64(dtype, dims, values.iter().map(|&v| f64::from(v)));
    tensor.ok_or_else(|| format!("{dtype} is no float that graphs compute in"))
}

/// A DequantizeLinear behind a quantizer of an activation.
fn activation(model: &mut Model, node: NodeId) -> Result<Change, String> {
    let at = model.node(node);
    let (codes, output) = (at.input(0).ok_or("it has no input")?, at.output(0).ok_or("it has no output")?);
    let quantize = model.producer(codes).ok_or("codes come into the model")?;
    let at = model.node(quantize);
    if !at.is("QuantizeLinear") && !at.is("DynamicQuantizeLinear") {
        return Err(format!("a {} computes its codes", at.op_type()));
    }
    let source = at.input(0).ok_or("its quantizer has no input")?;
    let (from, to) = (model.dtype(source), model.dtype(output));
    if from.zip(to).is_some_and(|(from, to)| from != to) {
        return Err("its pair changes the type".to_owned());
    }
    bypass(model, output, source)?;
    model.remove(&[node]);
    Ok(Change::PairRemoved)
}

/// Lets the readers of `output` read `source`, which takes its name where that is one of the model's outputs.
fn bypass(model: &mut Model, output: ValueId, source: ValueId) -> Result<(), String> {
    use super::support::graphs::is_graph_output;
    if is_graph_output(model, output) {
        if model.producer(source).is_none() || is_graph_output(model, source) {
            return Err("its result is an output of the model".to_owned());
        }
        let fresh = model.value(source).name().to_owned();
        model.take_name(output, source, &fresh);
    }
    model.replace_uses(output, source, |_| true);
    Ok(())
}

fn product(model: &mut Model, node: NodeId) -> Result<Change, String> {
    let weight = Quantized::from_nbits(model, node)?.transposed()?;
    let (name, bias) = (base_name(model, model.node(node).input(1)), model.node(node).input(5));
    let value = add(model, node, &name, &weight)?;
    model.truncate_inputs(node, 1);
    model.set_input(node, 1, Some(value));
    model.set_op(node, "", "MatMul");
    for name in ["K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked"] {
        model.remove_attr(node, name);
    }
    if let Some(bias) = bias {
        add_behind(model, node, bias);
    }
    Ok(Change::OnDequantized { op: "MatMul".to_owned() })
}

fn gather(model: &mut Model, node: NodeId) -> Result<Change, String> {
    let codes = table_codes(model, node).ok_or("its codes are not constant")?;
    let table = Quantized::from_gather(model, node, &codes)?;
    let at = model.node(node);
    let attributes = GatherBlockQuantized::of(at).ok_or("it is no GatherBlockQuantized")?;
    let (axis, indices) = (attributes.gather_axis, at.input(1).ok_or("it has no indices")?);
    let name = base_name(model, at.input(0));
    let value = add(model, node, &name, &table)?;
    model.truncate_inputs(node, 2);
    model.set_input(node, 0, Some(value));
    model.set_input(node, 1, Some(indices));
    model.set_op(node, "", "Gather");
    for name in ["gather_axis", "quantize_axis", "bits", "block_size"] {
        model.remove_attr(node, name);
    }
    if axis != 0 {
        model.set_attr(node, Attr::int("axis", axis));
    }
    Ok(Change::OnDequantized { op: "Gather".to_owned() })
}

fn add(model: &mut Model, node: NodeId, name: &str, constant: &Quantized) -> Result<ValueId, String> {
    let values = constant.values().map_err(|e| e.message().to_owned())?;
    let tensor = float(constant.scale_dtype, &constant.dims, &values)?;
    let graph = model.node(node).graph().ok_or("it is in no graph")?;
    Ok(model.add_initializer(graph, &format!("{name}_dequantized"), tensor))
}
