//! Operators between Dequantize and Quantize become operators on codes, those of onnxruntime's `QOperator` format: codes,
//! scales and zero points as they were. What only moves codes runs on codes as it is.
//!
//! A Relu or Clip in front of the quantizer goes where the quantizer clips at the same codes. A bias must be int32 in the
//! scale of the sum, which is what these operators take it for. What has no such operator, or not for its types, stays
//! between its quantizers.

use super::forms::MICROSOFT;
use super::nodes::nodes;
use super::qoperator::{Coded, moved, moves, only_reader, rank, rewire};
use super::{Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Attr, GraphId, Model, NodeId, Tensor, ValueId, tensor_type};
use crate::onnx::DataType;

/// See the module.
#[derive(Debug)]
pub struct LowerQoperator;

impl Pass for LowerQoperator {
    fn name(&self) -> &'static str {
        "lower-qoperator"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for node in nodes(model) {
            // What was taken in by an operator is in no graph any more.
            let Some(graph) = model.node(node).graph() else { continue };
            if !reads_codes(model, node) {
                continue;
            }
            let name = model.node_name(node).to_owned();
            match lower(model, graph, node) {
                Ok(text) => outcome.changed(name, text),
                Err(why) => outcome.skipped(name, why),
            }
        }
        let mut all = nodes(model).into_iter();
        if all.any(|n| model.node(n).domain() == MICROSOFT) && model.domain_version(MICROSOFT).is_none() {
            model.set_domain_version(MICROSOFT, 1);
        }
        Ok(outcome)
    }
}

/// Whether an operator reads activations that are dequantized.
fn reads_codes(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    let quantizer = at.is("QuantizeLinear") || at.is("DequantizeLinear");
    let activation = |value: &ValueId| {
        let dequantize = model.producer(*value).filter(|&p| model.node(p).is("DequantizeLinear"));
        dequantize.is_some_and(|p| model.constant_input(p, 0).is_none())
    };
    !quantizer && at.inputs().iter().flatten().any(activation)
}

/// Puts one operator on codes; says as what, or why not.
fn lower(model: &mut Model, graph: GraphId, node: NodeId) -> Result<String, String> {
    if model.node(node).graph().and_then(|g| model.opset_in(g)).unwrap_or(0) < 10 {
        return Err("its operator set has no operators on codes".to_owned());
    }
    let op = model.node(node).op_type().to_owned();
    match (model.node(node).domain(), op.as_str()) {
        ("", _) if moves(model, node) => match keep_moving(model, graph, node) {
            Err(_) if op == "Concat" => concat(model, graph, node),
            other => other,
        },
        ("", "Conv") => conv(model, graph, node),
        ("", "Gemm") => gemm(model, graph, node),
        ("", "MatMul") => product(model, graph, node),
        ("", "Add" | "Mul" | "Where") => several(model, graph, node),
        ("", "AveragePool" | "GlobalAveragePool" | "LeakyRelu" | "Sigmoid" | "Softmax") => single(model, graph, node),
        _ => Err(format!("there is no {op} on codes")),
    }
}

/// What stands in front of an input.
fn operand(model: &Model, node: NodeId, input: usize) -> Result<Coded, String> {
    let value = model.node(node).input(input).ok_or_else(|| format!("it has no input {input}"))?;
    let dequantize = model.producer(value).filter(|&p| model.node(p).is("DequantizeLinear"));
    let dequantize = dequantize.ok_or_else(|| format!("its operand \"{}\" is in floats", model.value(value).name()))?;
    Coded::of(model, dequantize)
}

/// An operand with one scale.
fn activation(model: &Model, node: NodeId, input: usize) -> Result<Coded, String> {
    let coded = operand(model, node, input)?;
    if coded.axis.is_some() {
        return Err(format!("\"{}\" has a scale for each channel", model.value(coded.codes).name()));
    }
    Ok(coded)
}

/// A constant with one scale, or one for each index of `axis`.
fn weight(model: &Model, node: NodeId, input: usize, axis: usize) -> Result<Coded, String> {
    let coded = operand(model, node, input)?;
    let name = model.value(coded.codes).name();
    if model.constant(coded.codes).is_none() {
        return Err(format!("its weight \"{name}\" is not constant"));
    }
    if coded.axis.is_some_and(|a| a != axis) {
        return Err(format!("the scales of \"{name}\" do not run along axis {axis}"));
    }
    Ok(coded)
}

/// The quantizer that reads a result, and what stands in between and goes.
struct Taken {
    result: Coded,
    gone: Vec<NodeId>,
}

fn quantized(model: &Model, node: NodeId) -> Result<Taken, String> {
    let value = model.node(node).output(0).ok_or("it has no output")?;
    quantized_value(model, node, value, Vec::new())
}

fn quantized_value(model: &Model, node: NodeId, value: ValueId, mut gone: Vec<NodeId>) -> Result<Taken, String> {
    let mut reader = only_reader(model, node, value)?;
    let mut clip = None;
    if model.node(reader).is("Relu") || model.node(reader).is("Clip") {
        clip = Some(reader);
        gone.push(reader);
        reader = only_reader(model, node, model.node(reader).output(0).ok_or("a clip has no output")?)?;
    }
    let at = model.node(reader);
    if !at.is("QuantizeLinear") {
        return Err(format!("{} reads its result in floats", at.op_type()));
    }
    let result = Coded::of(model, reader)?;
    if let Some(clip) = clip {
        clips_alike(model, clip, &result)?;
    }
    gone.push(reader);
    Ok(Taken { result, gone })
}

/// Whether numbers beyond the bounds of a Relu or Clip get the outermost codes anyway.
fn clips_alike(model: &Model, clip: NodeId, result: &Coded) -> Result<(), String> {
    let at = model.node(clip);
    let op = at.op_type();
    let bound = |name: &str, input: usize| -> Result<Option<f32>, String> {
        match at.input(input) {
            None => Ok(at.float(name)),
            Some(value) => {
                let number = model.constant(value).and_then(Tensor::to_f32).and_then(|v| v.first().copied());
                number.map(Some).ok_or_else(|| "the bounds of the Clip behind it are not constant".to_owned())
            }
        }
    };
    let (low, high) = if op == "Relu" { (Some(0.0), None) } else { (bound("min", 1)?, bound("max", 2)?) };
    let (least, most) = if result.dtype == DataType::Int8 { (-128.0, 127.0) } else { (0.0, 255.0) };
    let code = |number: f32| f64::from((number / result.scales[0]).round_ties_even()) + result.zeros[0] as f64;
    // Clip takes the upper bound where they cross, which leaves one number.
    let crossed = low.zip(high).is_some_and(|(low, high)| low > high);
    // Comparisons are false for numbers that are none.
    let fine = low.is_none_or(|low| code(low) <= least) && high.is_none_or(|high| code(high) >= most);
    if fine && !crossed { Ok(()) } else { Err(format!("the {op} behind it clips what its quantizer does not")) }
}

/// Lets the readers of the quantizer read the node, under the name that the codes had.
fn finish(model: &mut Model, node: NodeId, taken: &Taken) {
    let Some(output) = model.node(node).output(0) else { return };
    replace(model, output, &taken.result);
    model.remove(&taken.gone);
}

fn replace(model: &mut Model, output: ValueId, result: &Coded) {
    let shape = model.shape(output);
    let ty = model.value(result.codes).ty().cloned();
    let ty = ty.unwrap_or_else(|| tensor_type(result.dtype, shape.as_deref()));
    let fresh = format!("{}_gone", model.value(output).name());
    model.replace_uses(result.codes, output, |_| true);
    model.take_name(result.codes, output, &fresh);
    model.set_type(output, ty);
}

/// Codes, scale and zero point.
fn triple(model: &mut Model, graph: GraphId, coded: &Coded) -> [Option<ValueId>; 3] {
    let [scale, zero] = coded.params(model, graph);
    [Some(coded.codes), Some(scale), Some(zero)]
}

/// Scale and zero point.
fn two(model: &mut Model, graph: GraphId, coded: &Coded) -> [Option<ValueId>; 2] {
    coded.params(model, graph).map(Some)
}

/// Refuses types of the left operand, the right one and the result that no kernel has.
fn kernel(left: &Coded, right: &Coded, result: Option<&Coded>) -> Result<(), String> {
    use DataType::{Int8, Uint8};
    let fine = matches!((left.dtype, right.dtype), (Uint8, Uint8 | Int8) | (Int8, Int8));
    match result {
        _ if !fine => Err(format!("there is no kernel for {} times {}", left.dtype, right.dtype)),
        Some(result) if result.dtype != left.dtype => {
            Err(format!("there is no kernel that makes {} of {}", result.dtype, left.dtype))
        }
        _ => Ok(()),
    }
}

/// The int32 codes of a bias, which must be in the scale of the sum, one for each index of `axis` of the right operand.
fn bias(
    model: &Model,
    (node, input): (NodeId, usize),
    left: &Coded,
    right: &Coded,
    axis: usize,
) -> Result<Option<ValueId>, String> {
    if model.node(node).input(input).is_none() {
        return Ok(None);
    }
    let bias = operand(model, node, input)?;
    let name = model.value(bias.codes).name();
    let tensor = model.constant(bias.codes).ok_or_else(|| format!("its bias \"{name}\" is not constant"))?;
    if bias.dtype != DataType::Int32 || bias.zeros.iter().any(|&z| z != 0) {
        return Err(format!("its bias \"{name}\" is not int32 around zero"));
    }
    let dims = tensor.dims();
    let channels = model.constant(right.codes).and_then(|w| w.dims().get(axis).copied());
    if dims.len() != 1 || channels != Some(dims[0]) {
        return Err(format!("its bias \"{name}\" has shape {dims:?}"));
    }
    let at = |list: &[f32], index: usize| if list.len() == 1 { list[0] } else { list[index] };
    let count = bias.scales.len().max(right.scales.len());
    let fits = |list: &[f32]| list.len() == 1 || list.len() == count;
    let same = fits(&bias.scales) && fits(&right.scales) && {
        let sum = |index: usize| left.scales[0] * at(&right.scales, index);
        (0..count).all(|index| sum(index).to_bits() == at(&bias.scales, index).to_bits())
    };
    if same { Ok(Some(bias.codes)) } else { Err(format!("the scale of its bias \"{name}\" is not that of the sum")) }
}

fn conv(model: &mut Model, graph: GraphId, node: NodeId) -> Result<String, String> {
    let x = activation(model, node, 0)?;
    let w = weight(model, node, 1, 0)?;
    let b = bias(model, (node, 2), &x, &w, 0)?;
    let taken = quantized(model, node)?;
    kernel(&x, &w, Some(&taken.result))?;
    let mut inputs = Vec::with_capacity(9);
    inputs.extend(triple(model, graph, &x));
    inputs.extend(triple(model, graph, &w));
    inputs.extend(two(model, graph, &taken.result));
    if b.is_some() {
        inputs.push(b);
    }
    rewire(model, node, "", "QLinearConv", &inputs);
    finish(model, node, &taken);
    Ok("QLinearConv".to_owned())
}

fn gemm(model: &mut Model, graph: GraphId, node: NodeId) -> Result<String, String> {
    let at = model.node(node);
    if at.int("transA").unwrap_or(0) != 0 {
        return Err("transA is set".to_owned());
    }
    let one = |name: &str| (at.float(name).unwrap_or(1.0) - 1.0).abs() == 0.0;
    if !one("alpha") || (at.input(2).is_some() && !one("beta")) {
        return Err("alpha or beta is not 1".to_owned());
    }
    let axis = usize::from(at.int("transB").unwrap_or(0) == 0);
    let a = activation(model, node, 0)?;
    let b = weight(model, node, 1, axis)?;
    let c = bias(model, (node, 2), &a, &b, axis)?;
    let taken = match quantized(model, node) {
        Ok(taken) => Some(taken),
        // Without a scale of the result, that is floats.
        Err(_) if !is_quantized(model, node) => None,
        Err(why) => return Err(why),
    };
    kernel(&a, &b, taken.as_ref().map(|t| &t.result))?;
    for name in ["alpha", "beta", "transA"] {
        model.remove_attr(node, name);
    }
    qgemm(model, graph, node, &a, &b, c, taken.as_ref());
    Ok(if taken.is_some() { "QGemm" } else { "QGemm with a result in floats" }.to_owned())
}

/// Whether a quantizer reads the result, directly or behind a clip.
fn is_quantized(model: &Model, node: NodeId) -> bool {
    let readers = |node: NodeId| {
        let users = model.node(node).output(0).map(|v| model.value(v).users()).unwrap_or_default();
        users.iter().filter_map(|user| match user {
            crate::ir::User::Node { node, .. } => Some(*node),
            crate::ir::User::Output { .. } => None,
        })
    };
    let quantizer = |n: NodeId| model.node(n).is("QuantizeLinear");
    let clip = |n: NodeId| model.node(n).is("Relu") || model.node(n).is("Clip");
    readers(node).any(|n| quantizer(n) || (clip(n) && readers(n).any(quantizer)))
}

fn qgemm(
    model: &mut Model,
    graph: GraphId,
    node: NodeId,
    a: &Coded,
    b: &Coded,
    c: Option<ValueId>,
    taken: Option<&Taken>,
) {
    let mut inputs = Vec::with_capacity(9);
    inputs.extend(triple(model, graph, a));
    inputs.extend(triple(model, graph, b));
    if c.is_some() || taken.is_some() {
        inputs.push(c);
    }
    if let Some(taken) = taken {
        inputs.extend(two(model, graph, &taken.result));
    }
    rewire(model, node, MICROSOFT, "QGemm", &inputs);
    if let Some(taken) = taken {
        finish(model, node, taken);
    }
}

fn product(model: &mut Model, graph: GraphId, node: NodeId) -> Result<String, String> {
    let a = activation(model, node, 0)?;
    let b = operand(model, node, 1)?;
    let dims = model.constant(b.codes).map(Tensor::dims);
    // A batch of matrices has scales for columns that kernels do not take.
    if b.axis.is_some_and(|axis| dims.as_ref().is_none_or(|d| d.len() != 2 || axis != 1)) {
        return Err(format!("the scales of \"{}\" do not run along columns of a matrix", model.value(b.codes).name()));
    }
    let output = model.node(node).output(0).ok_or("it has no output")?;
    if let Ok(add) = only_reader(model, node, output)
        && model.node(add).is("Add")
        && dims.is_some_and(|d| d.len() == 2)
        && model.node(node).input(0).and_then(|v| rank(model, v)) == Some(2)
    {
        let other = usize::from(model.node(add).input(0) == Some(output));
        if operand(model, add, other).is_ok_and(|bias| bias.dtype == DataType::Int32) {
            let c = bias(model, (add, other), &a, &b, 1)?;
            let sum = model.node(add).output(0).ok_or("an Add has no output")?;
            if is_quantized(model, add) {
                let taken = quantized_value(model, node, sum, vec![add])?;
                kernel(&a, &b, Some(&taken.result))?;
                qgemm(model, graph, node, &a, &b, c, Some(&taken));
                return Ok("QGemm".to_owned());
            }
            kernel(&a, &b, None)?;
            qgemm(model, graph, node, &a, &b, c, None);
            let fresh = format!("{}_gone", model.value(output).name());
            let ty = model.value(sum).ty().cloned();
            model.replace_uses(sum, output, |_| true);
            model.take_name(sum, output, &fresh);
            if let Some(ty) = ty {
                model.set_type(output, ty);
            }
            model.remove(&[add]);
            return Ok("QGemm with a result in floats".to_owned());
        }
    }
    if !is_quantized(model, node) {
        kernel(&a, &b, None)?;
        let ([x, x_scale, x_zero], [y, y_scale, y_zero]) = (triple(model, graph, &a), triple(model, graph, &b));
        rewire(model, node, MICROSOFT, "MatMulIntegerToFloat", &[x, y, x_scale, y_scale, x_zero, y_zero]);
        return Ok("MatMulIntegerToFloat".to_owned());
    }
    let taken = quantized(model, node)?;
    kernel(&a, &b, Some(&taken.result))?;
    let mut inputs = Vec::with_capacity(8);
    inputs.extend(triple(model, graph, &a));
    inputs.extend(triple(model, graph, &b));
    inputs.extend(two(model, graph, &taken.result));
    rewire(model, node, "", "QLinearMatMul", &inputs);
    finish(model, node, &taken);
    Ok("QLinearMatMul".to_owned())
}

/// Refuses types that are not all the same, or not of 8 bits.
fn alike<'a>(mut all: impl Iterator<Item = &'a Coded>, result: &Coded) -> Result<(), String> {
    if !matches!(result.dtype, DataType::Int8 | DataType::Uint8) {
        return Err(format!("there is no kernel for {}", result.dtype));
    }
    match all.find(|coded| coded.dtype != result.dtype) {
        None => Ok(()),
        Some(other) => Err(format!("there is no kernel that makes {} of {}", result.dtype, other.dtype)),
    }
}

fn several(model: &mut Model, graph: GraphId, node: NodeId) -> Result<String, String> {
    let op = format!("QLinear{}", model.node(node).op_type());
    let chosen = op == "QLinearWhere";
    let first = usize::from(chosen);
    let operands = [activation(model, node, first)?, activation(model, node, first + 1)?];
    let taken = quantized(model, node)?;
    alike(operands.iter(), &taken.result)?;
    let mut inputs = if chosen { vec![model.node(node).input(0)] } else { Vec::new() };
    for operand in &operands {
        inputs.extend(triple(model, graph, operand));
    }
    inputs.extend(two(model, graph, &taken.result));
    rewire(model, node, MICROSOFT, &op, &inputs);
    finish(model, node, &taken);
    Ok(op)
}

fn single(model: &mut Model, graph: GraphId, node: NodeId) -> Result<String, String> {
    let at = model.node(node);
    let op = format!("QLinear{}", at.op_type());
    let opset = model.opset_in(graph).unwrap_or(0);
    let axis = at.int("axis").unwrap_or(if opset < 13 { 1 } else { -1 });
    if at.ints("dilations").is_some_and(|d| d.iter().any(|&d| d != 1)) {
        return Err("it is dilated".to_owned());
    }
    let x = activation(model, node, 0)?;
    let taken = quantized(model, node)?;
    alike(std::iter::once(&x), &taken.result)?;
    let mut inputs = Vec::with_capacity(5);
    inputs.extend(triple(model, graph, &x));
    inputs.extend(two(model, graph, &taken.result));
    rewire(model, node, MICROSOFT, &op, &inputs);
    model.remove_attr(node, "dilations");
    if op == "QLinearSoftmax" {
        model.set_attr(node, Attr::int("axis", axis));
        model.set_attr(node, Attr::int("opset", opset));
    }
    finish(model, node, &taken);
    Ok(op)
}

fn concat(model: &mut Model, graph: GraphId, node: NodeId) -> Result<String, String> {
    let count = model.node(node).inputs().len();
    let operands = (0..count).map(|i| activation(model, node, i)).collect::<Result<Vec<_>, _>>()?;
    let taken = quantized(model, node)?;
    alike(operands.iter(), &taken.result)?;
    let mut inputs = two(model, graph, &taken.result).to_vec();
    for operand in &operands {
        inputs.extend(triple(model, graph, operand));
    }
    rewire(model, node, MICROSOFT, "QLinearConcat", &inputs);
    finish(model, node, &taken);
    Ok("QLinearConcat".to_owned())
}

/// Lets what moves codes read codes.
fn keep_moving(model: &mut Model, _: GraphId, node: NodeId) -> Result<String, String> {
    let operands = (0..moved(model, node)).map(|i| activation(model, node, i)).collect::<Result<Vec<_>, _>>()?;
    let outputs: Vec<ValueId> = model.node(node).outputs().iter().flatten().copied().collect();
    let outputs: Vec<ValueId> = outputs.into_iter().filter(|&v| !model.value(v).users().is_empty()).collect();
    let mut taken = Vec::with_capacity(outputs.len());
    for output in outputs {
        let quantize = only_reader(model, node, output)?;
        let at = model.node(quantize);
        if !at.is("QuantizeLinear") {
            return Err(format!("{} reads its result in floats", at.op_type()));
        }
        let result = Coded::of(model, quantize)?;
        if operands.iter().any(|operand| !operand.same(&result)) {
            return Err("its result has another scale or zero point".to_owned());
        }
        alike(operands.iter(), &result)?;
        taken.push((output, quantize, result));
    }
    if taken.is_empty() {
        return Err("nothing reads its result".to_owned());
    }
    for (index, operand) in operands.iter().enumerate() {
        model.set_input(node, index, Some(operand.codes));
    }
    for (output, quantize, result) in taken {
        replace(model, output, &result);
        model.remove(&[quantize]);
    }
    Ok(format!("{} of codes", model.node(node).op_type()))
}
