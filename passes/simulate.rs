//! Writes quantizers as float operators, so that a model computes the numbers of a format on a runtime that does not have it.
//!
//! | before | after |
//! |---|---|
//! | DequantizeLinear of a constant | a float constant |
//! | QuantizeLinear, then DequantizeLinear | Div, Clip, Round, Mul; for small floats with the step of each number's binade |
//! | DynamicQuantizeLinear, then DequantizeLinear | the same, behind `ReduceMin` and `ReduceMax` |
//!
//! Results are bit-identical to the quantizers', but for the sign of zero in formats that have no negative one. What else is
//! quantized (operators on codes) is left and said.

use std::collections::BTreeMap;

use super::dequantize::constant;
use super::support::float_ops::Ops;
use super::support::granularity::typed_scales;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Quantizer;
use crate::ir::{Model, NodeId, Place, Tensor, User, ValueId};
use crate::numerics::{Format, Granularity, pack};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct Simulate;

impl Pass for Simulate {
    fn name(&self) -> &'static str {
        "simulate"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if context.quantization.is_some_and(|(plan, _)| !plan.simulate) {
            return Ok(outcome);
        }
        let nodes: Vec<NodeId> = model.all_graphs().into_iter().flat_map(|g| model.graph(g).nodes().to_vec()).collect();
        let mut lowered: BTreeMap<ValueId, Codes> = BTreeMap::new();
        let mut spent = Vec::new();
        for node in nodes {
            let at = model.node(node);
            if !matches!(at.domain(), "" | "com.microsoft") {
                continue;
            }
            let op = at.op_type().to_owned();
            let name = model.node_name(node).to_owned();
            let done = match op.as_str() {
                "DequantizeLinear" if model.constant_input(node, 0).is_some() => constant(model, node),
                "DequantizeLinear" => dequantize(model, node, &lowered),
                "QuantizeLinear" => quantize(model, node, &mut lowered),
                "DynamicQuantizeLinear" => dynamic(model, node, &mut lowered),
                _ if op.starts_with("QLinear") || op.ends_with("Integer") || op == "MatMulNBits" => {
                    Err(Reason::ComputesQuantized)
                }
                _ => continue,
            };
            match done {
                Ok(change) => {
                    if matches!(op.as_str(), "QuantizeLinear" | "DynamicQuantizeLinear")
                        || matches!(change, Change::Dequantized { .. })
                    {
                        spent.push(node);
                    }
                    outcome.changed(name, change);
                }
                Err(why) => outcome.skipped(name, why),
            }
        }
        spent.retain(|&node| model.node(node).outputs().iter().flatten().all(|&v| model.value(v).users().is_empty()));
        model.remove(&spent);
        Ok(outcome)
    }
}

/// A tensor of codes as floats, their zero point taken off.
#[derive(Clone, Copy)]
struct Codes {
    steps: ValueId,
    /// What the steps are multiplied by, already in the shape that does so.
    scale: ValueId,
    /// The scale as the quantizer has it.
    source: ValueId,
}

/// A scale in the shape that divides its tensor by broadcasting, if there is one.
fn spread(model: &mut Model, node: NodeId, scale: ValueId) -> Result<ValueId, Reason> {
    let at = model.node(node);
    let Quantizer { axis, block_size: block, .. } =
        Quantizer::of(at).ok_or_else(|| Reason::NotA { op: "quantizer".into() })?;
    let shape = at.input(0).and_then(|x| model.shape(x));
    let positive = |rank: usize| if axis < 0 { axis + rank as i64 } else { axis } as usize;
    let Some(tensor) = model.constant(scale) else {
        // One block a row, or one scale.
        let dims = model.shape(scale);
        let known = shape.as_ref().and_then(|s| s.get(positive(s.len())).copied().flatten());
        let reshape = at.input(0).and_then(|x| model.producer(x)).filter(|&p| model.node(p).is("Reshape"));
        let made = reshape.and_then(|p| model.constant_input(p, 1)).and_then(Tensor::to_i64).unwrap_or_default();
        let extent = known.map(|extent| extent as i64).or_else(|| made.get(positive(made.len())).copied());
        let whole = block > 0 && extent == Some(block);
        return if whole || block == 0 && dims.is_some_and(|d| d.is_empty()) {
            Ok(scale)
        } else {
            Err(Reason::NotConstant { what: Operand::Scale })
        };
    };
    let name = model.value(scale).name().to_owned();
    let (dims, count) = (tensor.dims(), tensor.len());
    let (values, dtype) =
        typed_scales(tensor).ok_or_else(|| Reason::wrong_type(Operand::Scale, tensor.dtype(), "a float"))?;
    if dtype != DataType::Float {
        return Err(Reason::wrong_type(Operand::Scale, dtype, "float"));
    }
    let graph = model.main();
    if block > 0 {
        let known: Option<Vec<usize>> = shape.and_then(|s| s.into_iter().collect());
        let known = known.ok_or(Reason::UnknownShape { what: Operand::Input })?;
        let group = Granularity::PerGroup { axis: positive(known.len()), size: block as usize };
        let misfit = || Reason::WrongShape { what: Operand::Scale, dims: dims.clone() };
        let one = |entry: usize| values.get(entry).copied().ok_or_else(misfit);
        let each = group.entries(&known)?.into_iter().map(one).collect::<Result<Vec<f32>, _>>()?;
        return Ok(model.add_initializer(graph, &format!("{name}_each"), Tensor::from_f32(&known, &each)));
    }
    if count == 1 && tensor.dtype() == DataType::Float {
        return Ok(if dims.len() <= 1 {
            scale
        } else {
            model.add_initializer(graph, &name, Tensor::from_f32(&[], &values))
        });
    }
    let rank = shape.map(|s| s.len());
    let behind = if axis < 0 { Some(-axis - 1) } else { rank.map(|r| r as i64 - axis - 1) };
    let behind = behind.filter(|&b| b >= 0).ok_or(Reason::UnknownShape { what: Operand::Input })?;
    let dims: Vec<usize> = std::iter::once(count).chain(vec![1; behind as usize]).collect();
    Ok(model.add_initializer(graph, &format!("{name}_each"), Tensor::from_f32(&dims, &values)))
}

/// Float steps in place of codes.
fn quantize(model: &mut Model, node: NodeId, lowered: &mut BTreeMap<ValueId, Codes>) -> Result<Change, Reason> {
    let at = model.node(node);
    let (Some(x), Some(source), Some(output)) = (at.input(0), at.input(1), at.output(0)) else {
        return Err(Reason::Missing { what: Operand::Input });
    };
    let zero = at.input(2);
    let quantizer = Quantizer::of(at).ok_or_else(|| Reason::NotA { op: "quantizer".into() })?;
    let declared = quantizer.output_dtype;
    let zero_tensor = zero.and_then(|z| model.constant(z)).cloned();
    if zero.is_some() && zero_tensor.is_none() {
        return Err(Reason::NotConstant { what: Operand::ZeroPoint });
    }
    let dtype = zero_tensor.as_ref().map(Tensor::dtype).or(declared).unwrap_or(DataType::Uint8);
    let format = dtype.format().ok_or(Reason::NotQuantizedType { what: Operand::Output, found: dtype })?;
    if !quantizer.saturate && !format.is_integer() {
        return Err(Reason::NoSaturation);
    }
    if let Some(found) = model.dtype(x).filter(|&d| d != DataType::Float) {
        return Err(Reason::wrong_type(Operand::Input, found, "float"));
    }
    check_opset(model)?;
    readers(model, output, source, zero, format)?;
    let zeros = match &zero_tensor {
        Some(tensor) if format.is_integer() => pack::unpack(&tensor.raw(), &format, tensor.len()),
        _ => vec![0],
    };
    let first = zeros.first().copied().unwrap_or(0);
    if zeros.iter().any(|&z| z != first) {
        return Err(Reason::ZeroPointsDiffer);
    }
    let scale = spread(model, node, source)?;
    let name = model.value(output).name().to_owned();
    let mut ops = Ops::new(model, &name, Place::Before(node));
    let quotient = ops.op("Div", &[x, scale]);
    let (low, high) = if format.is_integer() {
        let (low, high) = format.range();
        let from_zero = |code: i32| (i64::from(code) - i64::from(first)) as f32;
        (from_zero(low), from_zero(high))
    } else {
        (-format.max_value(), format.max_value())
    };
    let (low, high) = (ops.constant("number", low), ops.constant("number", high));
    let clamped = ops.op("Clip", &[quotient, low, high]);
    let steps = if format.is_integer() { ops.op("Round", &[clamped]) } else { ops.nearest(clamped, format) };
    lowered.insert(output, Codes { steps, scale, source });
    Ok(Change::WrittenAs { op: "float operators".to_owned() })
}

/// `DynamicQuantizeLinear` as ONNX specifies it.
fn dynamic(model: &mut Model, node: NodeId, lowered: &mut BTreeMap<ValueId, Codes>) -> Result<Change, Reason> {
    let at = model.node(node);
    let (Some(x), Some(output), Some(source), Some(zero)) = (at.input(0), at.output(0), at.output(1), at.output(2))
    else {
        return Err(Reason::NoOutput);
    };
    check_opset(model)?;
    readers(model, output, source, Some(zero), Format::Uint8)?;
    let name = model.value(output).name().to_owned();
    let mut ops = Ops::new(model, &name, Place::Before(node));
    let nothing = ops.constant("number", 0.0);
    let keep = || vec![crate::ir::Attr::int("keepdims", 0)];
    let least = ops.node("ReduceMin", &[x], keep(), "least");
    let least = ops.op("Min", &[least, nothing]);
    let most = ops.node("ReduceMax", &[x], keep(), "most");
    let most = ops.op("Max", &[most, nothing]);
    let width = ops.op("Sub", &[most, least]);
    let scale = ops.with("Div", width, 255.0);
    // A tensor of zeros: any scale gives zeros back.
    let scale = ops.with("Max", scale, f32::MIN_POSITIVE);
    let ratio = ops.op("Div", &[least, scale]);
    let ratio = ops.op("Neg", &[ratio]);
    let high = ops.constant("number", 255.0);
    let ratio = ops.op("Clip", &[ratio, nothing, high]);
    let middle = ops.op("Round", &[ratio]);
    let quotient = ops.op("Div", &[x, scale]);
    let rounded = ops.op("Round", &[quotient]);
    let codes = ops.op("Add", &[rounded, middle]);
    let codes = ops.op("Clip", &[codes, nothing, high]);
    let steps = ops.op("Sub", &[codes, middle]);
    lowered.insert(output, Codes { steps, scale, source });
    Ok(Change::WrittenAs { op: "float operators".to_owned() })
}

/// Multiplies steps by the scale, in place of a DequantizeLinear.
fn dequantize(model: &mut Model, node: NodeId, lowered: &BTreeMap<ValueId, Codes>) -> Result<Change, Reason> {
    let at = model.node(node);
    let (Some(x), Some(source)) = (at.input(0), at.input(1)) else {
        return Err(Reason::Missing { what: Operand::Input });
    };
    let codes = *lowered.get(&x).ok_or_else(|| Reason::NotComputedBy {
        what: Operand::QuantizedData,
        wanted: "a quantizer that was lowered".into(),
    })?;
    let scale = if source == codes.source { codes.scale } else { spread(model, node, source)? };
    model.set_op(node, "", "Mul");
    model.truncate_inputs(node, 2);
    model.set_input(node, 0, Some(codes.steps));
    model.set_input(node, 1, Some(scale));
    for attr in ["axis", "block_size", "output_dtype"] {
        model.remove_attr(node, attr);
    }
    Ok(Change::WrittenAs { op: "Mul".to_owned() })
}

/// Codes must be read by nothing but DequantizeLinear with the same zero point.
fn readers(model: &Model, codes: ValueId, scale: ValueId, zero: Option<ValueId>, format: Format) -> Result<(), Reason> {
    for &user in model.value(codes).users() {
        let User::Node { node, input } = user else {
            return Err(Reason::IsGraphOutput { what: Operand::QuantizedData });
        };
        let at = model.node(node);
        if input != 0 || at.op_type() != "DequantizeLinear" {
            return Err(Reason::ReadBy {
                what: Operand::QuantizedData,
                op: at.op_type().into(),
                wanted: "DequantizeLinear".into(),
            });
        }
        if format.is_integer() && !same_zero(model, zero, at.input(2)) {
            return Err(Reason::Mismatch {
                what: "zero point".into(),
                from: "that of the DequantizeLinear behind it".into(),
            });
        }
        let declared = Quantizer::of(at).and_then(|q| q.output_dtype);
        if let Some(found) = declared.filter(|&dtype| dtype != DataType::Float) {
            return Err(Reason::wrong_type(Operand::Output, found, "float"));
        }
        if at.input(1).is_none_or(|s| s != scale && model.constant(s).is_none()) {
            return Err(Reason::Mismatch {
                what: "scale".into(),
                from: "that of the DequantizeLinear behind it".into(),
            });
        }
    }
    Ok(())
}

fn same_zero(model: &Model, a: Option<ValueId>, b: Option<ValueId>) -> bool {
    match (a, b) {
        _ if a == b => true,
        (Some(a), Some(b)) => match (model.constant(a), model.constant(b)) {
            (Some(a), Some(b)) => a.raw() == b.raw(),
            _ => false,
        },
        (Some(z), None) | (None, Some(z)) => model.constant(z).is_some_and(|t| t.raw().iter().all(|&byte| byte == 0)),
        (None, None) => true,
    }
}

fn check_opset(model: &Model) -> Result<(), Reason> {
    match model.opset() {
        Some(opset) if opset < 13 => Err(Reason::NeedsOpset { what: "this".into(), opset: 13 }),
        _ => Ok(()),
    }
}
