//! Operators between Dequantize and Quantize become operators on codes, those of onnxruntime's `QOperator` format: codes,
//! scales and zero points as they were. What only moves codes runs on codes as it is.
//!
//! A Relu or Clip in front of the quantizer goes where the quantizer clips at the same codes. Operators take a bias for int32
//! in the scale of the sum: codes must have that scale, and floats become the codes that onnxruntime makes of them when it
//! fuses the pairs itself. What has no such operator, or not for its types, stays between its quantizers.

use super::forms::MICROSOFT;
use super::support::nodes::plain_gemm;
use super::support::qoperator::{Coded, is_quantized, moved, moves, only_reader, rank, rewire};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Gemm;
use crate::ir::{Attr, GraphId, Model, NodeId, Tensor, ValueId, tensor_type};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct LowerQoperator;

impl Pass for LowerQoperator {
    fn name(&self) -> &'static str {
        "lower-qoperator"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for node in model.nodes_outside_functions() {
            // What was taken in by an operator is in no graph any more.
            let Some(graph) = model.node(node).graph() else { continue };
            if !reads_codes(model, node) {
                continue;
            }
            let name = model.node_name(node).to_owned();
            match lower(model, graph, node) {
                Ok(change) => outcome.changed(name, change),
                Err(why) => outcome.skipped(name, why),
            }
        }
        let mut all = model.nodes_outside_functions().into_iter();
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
fn lower(model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
    if model.node(node).graph().and_then(|g| model.opset_in(g)).unwrap_or(0) < 10 {
        return Err(Reason::NeedsOpset { what: "an operator on quantized values".into(), opset: 10 });
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
        _ => Err(Reason::NoQuantizedOp { op }),
    }
}

/// What stands in front of an input.
fn operand(model: &Model, node: NodeId, input: usize) -> Result<Coded, Reason> {
    let value = model.node(node).input(input).ok_or(Reason::MissingInput { input })?;
    let dequantize = model.producer(value).filter(|&p| model.node(p).is("DequantizeLinear"));
    let dequantize = dequantize.ok_or_else(|| Reason::NotQuantized { tensor: model.value(value).name().into() })?;
    Coded::of(model, dequantize)
}

/// An operand with one scale.
fn activation(model: &Model, node: NodeId, input: usize) -> Result<Coded, Reason> {
    let coded = operand(model, node, input)?;
    if coded.axis.is_some() {
        return Err(Reason::WrongScales { tensor: model.value(coded.codes).name().into(), wanted: "one scale".into() });
    }
    Ok(coded)
}

/// A constant with one scale, or one for each index of `axis`.
fn weight(model: &Model, node: NodeId, input: usize, axis: usize) -> Result<Coded, Reason> {
    let coded = operand(model, node, input)?;
    let name = model.value(coded.codes).name();
    if model.constant(coded.codes).is_none() {
        return Err(Reason::TensorNotConstant { tensor: name.into() });
    }
    if coded.axis.is_some_and(|a| a != axis) {
        return Err(Reason::WrongScales { tensor: name.into(), wanted: format!("one scale per index of axis {axis}") });
    }
    Ok(coded)
}

/// The quantizer that reads a result, and what stands in between and goes.
struct Taken {
    result: Coded,
    gone: Vec<NodeId>,
}

fn quantized(model: &Model, node: NodeId) -> Result<Taken, Reason> {
    let value = model.node(node).output(0).ok_or(Reason::NoOutput)?;
    quantized_value(model, node, value, Vec::new())
}

fn quantized_value(model: &Model, node: NodeId, value: ValueId, mut gone: Vec<NodeId>) -> Result<Taken, Reason> {
    let mut reader = only_reader(model, node, value)?;
    let mut clip = None;
    if model.node(reader).is("Relu") || model.node(reader).is("Clip") {
        clip = Some(reader);
        gone.push(reader);
        reader = only_reader(model, node, model.node(reader).output(0).ok_or(Reason::NoOutput)?)?;
    }
    let at = model.node(reader);
    if !at.is("QuantizeLinear") {
        return Err(Reason::ReadBy { what: Operand::Output, op: at.op_type().into(), wanted: "QuantizeLinear".into() });
    }
    let result = Coded::of(model, reader)?;
    if let Some(clip) = clip {
        clips_alike(model, clip, &result)?;
    }
    gone.push(reader);
    Ok(Taken { result, gone })
}

/// Whether numbers beyond the bounds of a Relu or Clip get the outermost codes anyway.
fn clips_alike(model: &Model, clip: NodeId, result: &Coded) -> Result<(), Reason> {
    let at = model.node(clip);
    let op = at.op_type();
    let bound = |name: &str, input: usize| -> Result<Option<f32>, Reason> {
        match at.input(input) {
            None => Ok(at.float(name)),
            Some(value) => {
                let number = model.constant(value).and_then(Tensor::to_f32).and_then(|v| v.first().copied());
                number.map(Some).ok_or(Reason::NotConstant { what: Operand::Bounds })
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
    if fine && !crossed { Ok(()) } else { Err(Reason::Clips { op: op.into() }) }
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
fn kernel(left: &Coded, right: &Coded, result: Option<&Coded>) -> Result<(), Reason> {
    use DataType::{Int8, Uint8};
    let fine = matches!((left.dtype, right.dtype), (Uint8, Uint8 | Int8) | (Int8, Int8));
    match result {
        _ if !fine => Err(Reason::NoKernelOfTypes { inputs: vec![left.dtype, right.dtype], output: None }),
        Some(result) if result.dtype != left.dtype => {
            Err(Reason::NoKernelOfTypes { inputs: vec![left.dtype, right.dtype], output: Some(result.dtype) })
        }
        _ => Ok(()),
    }
}

/// The bias of an operator on codes: int32, in the scale of the sum.
enum Bias {
    /// Codes that are in that scale.
    There(ValueId),
    /// The nearest codes of a constant in floats, and its name.
    Made(String, Vec<i32>),
}

impl Bias {
    /// The value that the operator reads.
    fn put(self, model: &mut Model, graph: GraphId) -> ValueId {
        match self {
            Self::There(codes) => codes,
            Self::Made(name, codes) => {
                model.add_initializer(graph, &format!("{name}_quantized"), Tensor::from_i32(&[codes.len()], &codes))
            }
        }
    }
}

/// Operator's name, and what happened to its bias.
fn said(op: &str, bias: Option<&Bias>) -> Change {
    let (op, made) = (op.to_owned(), matches!(bias, Some(Bias::Made(..))));
    if made { Change::WithInt32Bias { op } } else { Change::WrittenAs { op } }
}

/// The bias at an input, with one number for each index of `axis` of the right operand.
fn bias(
    model: &Model,
    (node, input): (NodeId, usize),
    left: &Coded,
    right: &Coded,
    axis: usize,
) -> Result<Option<Bias>, Reason> {
    let Some(value) = model.node(node).input(input) else { return Ok(None) };
    let channels = model.constant(right.codes).and_then(|w| w.dims().get(axis).copied());
    let shaped = |tensor: &Tensor| match tensor.dims().as_slice() {
        &[length] if channels == Some(length) => Ok(()),
        dims => Err(Reason::WrongShape { what: Operand::Bias, dims: dims.to_vec() }),
    };
    if right.scales.len() != 1 && Some(right.scales.len()) != channels {
        return Err(Reason::WrongScales {
            tensor: model.value(right.codes).name().into(),
            wanted: "one scale per channel".into(),
        });
    }
    let sums = right.scales.iter().map(|scale| left.scales[0] * scale).cycle();
    if let Some(tensor) = model.constant(value).filter(|t| t.dtype() == DataType::Float) {
        let name = model.value(value).name();
        shaped(tensor)?;
        let numbers = tensor.to_f32().unwrap_or_default();
        let codes: Option<Vec<i32>> = numbers.iter().zip(sums).map(|(&b, sum)| bias_code(b, sum)).collect();
        let codes = codes.ok_or_else(|| Reason::Overflows {
            what: format!("bias \"{name}\" at the scale of the products"),
            dtype: DataType::Int32,
        })?;
        return Ok(Some(Bias::Made(name.to_owned(), codes)));
    }
    let bias = operand(model, node, input)?;
    let tensor = model.constant(bias.codes).ok_or(Reason::NotConstant { what: Operand::Bias })?;
    if bias.dtype != DataType::Int32 {
        return Err(Reason::WrongType { what: Operand::Bias, found: bias.dtype, wanted: "int32".into() });
    }
    if bias.zeros.iter().any(|&z| z != 0) {
        return Err(Reason::NonzeroZeroPoint { what: Operand::Bias });
    }
    shaped(tensor)?;
    let count = bias.scales.len();
    let same = (count == 1 || Some(count) == channels)
        && bias
            .scales
            .iter()
            .cycle()
            .zip(sums)
            .take(count.max(right.scales.len()))
            .all(|(a, b)| a.to_bits() == b.to_bits());
    if same {
        Ok(Some(Bias::There(bias.codes)))
    } else {
        Err(Reason::Mismatch { what: "bias scale".into(), from: "that of the products".into() })
    }
}

/// The code of a number in float32 arithmetic, as onnxruntime's when it fuses: one division, rounded half to even. None
/// beyond int32, where that one wraps around.
fn bias_code(number: f32, scale: f32) -> Option<i32> {
    let code = (number / scale).round_ties_even();
    // The bounds are those of int32; the upper one is no int32 itself.
    (-2_147_483_648.0..2_147_483_648.0).contains(&code).then_some(code as i32)
}

fn conv(model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
    let x = activation(model, node, 0)?;
    let w = weight(model, node, 1, 0)?;
    let b = bias(model, (node, 2), &x, &w, 0)?;
    let taken = quantized(model, node)?;
    kernel(&x, &w, Some(&taken.result))?;
    let change = said("QLinearConv", b.as_ref());
    let mut inputs = Vec::with_capacity(9);
    inputs.extend(triple(model, graph, &x));
    inputs.extend(triple(model, graph, &w));
    inputs.extend(two(model, graph, &taken.result));
    inputs.extend(b.map(|b| Some(b.put(model, graph))));
    rewire(model, node, "", "QLinearConv", &inputs);
    finish(model, node, &taken);
    Ok(change)
}

fn gemm(model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
    let at = model.node(node);
    plain_gemm(model, node)?;
    let axis = Gemm::of(at).unwrap_or_default().columns();
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
    Ok(qgemm(model, graph, node, &a, &b, c, taken.as_ref()))
}

fn qgemm(
    model: &mut Model,
    graph: GraphId,
    node: NodeId,
    a: &Coded,
    b: &Coded,
    c: Option<Bias>,
    taken: Option<&Taken>,
) -> Change {
    let change = said("QGemm", c.as_ref());
    let mut inputs = Vec::with_capacity(9);
    inputs.extend(triple(model, graph, a));
    inputs.extend(triple(model, graph, b));
    if c.is_some() || taken.is_some() {
        inputs.push(c.map(|c| c.put(model, graph)));
    }
    if let Some(taken) = taken {
        inputs.extend(two(model, graph, &taken.result));
    }
    rewire(model, node, MICROSOFT, "QGemm", &inputs);
    if let Some(taken) = taken {
        finish(model, node, taken);
    }
    change
}

fn product(model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
    let a = activation(model, node, 0)?;
    let b = operand(model, node, 1)?;
    let dims = model.constant(b.codes).map(Tensor::dims);
    // A batch of matrices has scales for columns that kernels do not take.
    if b.axis.is_some_and(|axis| dims.as_ref().is_none_or(|d| d.len() != 2 || axis != 1)) {
        return Err(Reason::WrongScales {
            tensor: model.value(b.codes).name().into(),
            wanted: "one scale, or one per column of a matrix".into(),
        });
    }
    let output = model.node(node).output(0).ok_or(Reason::NoOutput)?;
    if let Ok(add) = only_reader(model, node, output)
        && model.node(add).is("Add")
        && let Some([_, columns]) = dims.as_deref()
        && model.node(node).input(0).and_then(|v| rank(model, v)) == Some(2)
    {
        let other = usize::from(model.node(add).input(0) == Some(output));
        // Where the sum stays in floats, so does what is added.
        let floats =
            is_quantized(model, add) && model.constant_input(add, other).is_some_and(|t| t.dims() == [*columns]);
        if floats || operand(model, add, other).is_ok_and(|bias| bias.dtype == DataType::Int32) {
            let c = bias(model, (add, other), &a, &b, 1)?;
            let sum = model.node(add).output(0).ok_or(Reason::NoOutput)?;
            if is_quantized(model, add) {
                let taken = quantized_value(model, node, sum, vec![add])?;
                kernel(&a, &b, Some(&taken.result))?;
                return Ok(qgemm(model, graph, node, &a, &b, c, Some(&taken)));
            }
            kernel(&a, &b, None)?;
            let change = qgemm(model, graph, node, &a, &b, c, None);
            let fresh = format!("{}_gone", model.value(output).name());
            let ty = model.value(sum).ty().cloned();
            model.replace_uses(sum, output, |_| true);
            model.take_name(sum, output, &fresh);
            if let Some(ty) = ty {
                model.set_type(output, ty);
            }
            model.remove(&[add]);
            return Ok(change);
        }
    }
    if !is_quantized(model, node) {
        kernel(&a, &b, None)?;
        let ([x, x_scale, x_zero], [y, y_scale, y_zero]) = (triple(model, graph, &a), triple(model, graph, &b));
        rewire(model, node, MICROSOFT, "MatMulIntegerToFloat", &[x, y, x_scale, y_scale, x_zero, y_zero]);
        return Ok(Change::WrittenAs { op: "MatMulIntegerToFloat".to_owned() });
    }
    let taken = quantized(model, node)?;
    kernel(&a, &b, Some(&taken.result))?;
    let mut inputs = Vec::with_capacity(8);
    inputs.extend(triple(model, graph, &a));
    inputs.extend(triple(model, graph, &b));
    inputs.extend(two(model, graph, &taken.result));
    rewire(model, node, "", "QLinearMatMul", &inputs);
    finish(model, node, &taken);
    Ok(Change::WrittenAs { op: "QLinearMatMul".to_owned() })
}

/// Refuses types that are not all the same, or not of 8 bits.
fn alike<'a>(mut all: impl Iterator<Item = &'a Coded>, result: &Coded) -> Result<(), Reason> {
    if !matches!(result.dtype, DataType::Int8 | DataType::Uint8) {
        return Err(Reason::NoKernelOfTypes { inputs: vec![result.dtype], output: None });
    }
    match all.find(|coded| coded.dtype != result.dtype) {
        None => Ok(()),
        Some(other) => Err(Reason::NoKernelOfTypes { inputs: vec![other.dtype], output: Some(result.dtype) }),
    }
}

fn several(model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
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
    Ok(Change::WrittenAs { op })
}

fn single(model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
    let at = model.node(node);
    let op = format!("QLinear{}", at.op_type());
    let opset = model.opset_in(graph).unwrap_or(0);
    let axis = at.int("axis").unwrap_or(if opset < 13 { 1 } else { -1 });
    if at.ints("dilations").is_some_and(|d| d.iter().any(|&d| d != 1)) {
        return Err(Reason::Attribute { name: "dilations".into(), wanted: 1 });
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
    Ok(Change::WrittenAs { op })
}

fn concat(model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
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
    Ok(Change::WrittenAs { op: "QLinearConcat".to_owned() })
}

/// Lets what moves codes read codes.
fn keep_moving(model: &mut Model, _: GraphId, node: NodeId) -> Result<Change, Reason> {
    let operands = (0..moved(model, node)).map(|i| activation(model, node, i)).collect::<Result<Vec<_>, _>>()?;
    let outputs: Vec<ValueId> = model.node(node).outputs().iter().flatten().copied().collect();
    let outputs: Vec<ValueId> = outputs.into_iter().filter(|&v| !model.value(v).users().is_empty()).collect();
    let mut taken = Vec::with_capacity(outputs.len());
    for output in outputs {
        let quantize = only_reader(model, node, output)?;
        let at = model.node(quantize);
        if !at.is("QuantizeLinear") {
            return Err(Reason::ReadBy {
                what: Operand::Output,
                op: at.op_type().into(),
                wanted: "QuantizeLinear".into(),
            });
        }
        let result = Coded::of(model, quantize)?;
        if operands.iter().any(|operand| !operand.same(&result)) {
            return Err(Reason::Mismatch {
                what: "result scale or zero point".into(),
                from: "that of its input".into(),
            });
        }
        alike(operands.iter(), &result)?;
        taken.push((output, quantize, result));
    }
    if taken.is_empty() {
        return Err(Reason::Unused { what: Operand::Output });
    }
    for (index, operand) in operands.iter().enumerate() {
        model.set_input(node, index, Some(operand.codes));
    }
    for (output, quantize, result) in taken {
        replace(model, output, &result);
        model.remove(&[quantize]);
    }
    Ok(Change::OnQuantized { op: model.node(node).op_type().to_owned() })
}
