//! Puts the float weights back in front of their codes: what was folded becomes a fake quantizer again.
//!
//! A weight becomes a float initializer with a QuantizeLinear behind it, whose codes are exactly the ones that it had. Where
//! plain rounding of the float would give another code (pairs that are kept from saturating, other roundings, codes that
//! an algorithm chose), that one element is replaced by what its code stands for; all others keep their bits. A bias
//! becomes a float again too, behind Div, Round and Mul, which is the fake quantizer of int32 that ONNX can say.

use super::nodes::planned;
use super::{Context, Outcome, Pass};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NewNode, NodeId, Place, Tensor, ValueId};
use crate::numerics::{self, Round, pack};
use crate::onnx::DataType;
use crate::plan::Weight;

/// See the module.
#[derive(Debug)]
pub struct UnfoldWeights;

impl Pass for UnfoldWeights {
    fn name(&self) -> &'static str {
        "unfold-weights"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let Some((plan, _)) = context.quantization else {
            return Err(
                Error::new(Kind::Usage, "unfold-weights needs a plan").with_hint("run it through `amax prepare`")
            );
        };
        for weight in &plan.weights {
            let node = planned(model, &weight.at.node)?;
            if weight.quantizer.float_zero_point {
                let message = "its zero points lie between codes, which QuantizeLinear does not have";
                let error = Error::new(Kind::Config, message).at_value(&weight.tensor);
                return Err(
                    error.with_hint("add form = \"qdq\" and arithmetic = \"onnx\" for zero points that are codes")
                );
            }
            let Some(dequantize) = dequantizer(model, node, weight.at.input) else { continue };
            let Some(codes) = model.node(dequantize).input(0).filter(|&v| model.constant(v).is_some()) else {
                continue;
            };
            let replaced = unfold(model, weight, dequantize, codes).map_err(|e| e.at_value(&weight.tensor))?;
            let text = match replaced {
                0 => "float again".to_owned(),
                count => format!("float again; {count} elements are what their codes stand for"),
            };
            outcome.changed(&weight.site, text);
        }
        for bias in &plan.biases {
            let node = planned(model, &bias.at.node)?;
            let Some(dequantize) = dequantizer(model, node, bias.at.input) else { continue };
            let float = model.value_named(&bias.tensor).filter(|&v| model.constant(v).is_some());
            match float.map(|float| unfold_bias(model, node, bias.at.input, dequantize, float)) {
                Some(true) => outcome.changed(&bias.site, "float again"),
                _ => outcome.skipped(&bias.site, "stays int32: float32 division would give other codes"),
            }
        }
        Ok(outcome)
    }
}

/// The Dequantize node that an input reads.
fn dequantizer(model: &Model, node: NodeId, input: usize) -> Option<NodeId> {
    let producer = model.producer(model.node(node).input(input)?)?;
    model.node(producer).is("DequantizeLinear").then_some(producer)
}

/// Replaces codes by a quantized float; how many elements are not the weight's own.
fn unfold(model: &mut Model, weight: &Weight, dequantize: NodeId, codes: ValueId) -> Result<usize> {
    let graph = model.main();
    let missing = || Error::new(Kind::Internal, "the weight of a plan is gone");
    let float = model.value_named(&weight.tensor).ok_or_else(missing)?;
    let own = model.constant(float).ok_or_else(missing)?.clone();
    let tensor = model.constant(codes).ok_or_else(missing)?.clone();
    let (format, dims) = (weight.quantizer.dtype, tensor.dims());
    let scale = model.constant_input(dequantize, 1).ok_or_else(missing)?.clone();
    let scales = scale.to_f32().ok_or_else(missing)?;
    let zero_points = match model.constant_input(dequantize, 2).filter(|_| format.is_integer()) {
        Some(zero) => pack::unpack(&zero.raw(), &format, zero.len()),
        None => vec![0; scales.len()],
    };
    let qparams = numerics::QParams { scales, zero_points };
    let granularity =
        super::fold_weights::granularity(model, dequantize, &dims, &scale.dims()).map_err(Error::model)?;
    let laid = if weight.transpose { super::exact::transposed(&own, &[1, 0]) } else { Some(own) };
    let mut values = laid.and_then(|tensor| tensor.to_f32()).ok_or_else(missing)?;
    let wanted = pack::unpack(&tensor.raw(), &format, tensor.len());
    let given = numerics::quantize_codes(&values, &dims, &granularity, &qparams, format, Round::HalfEven)?;
    let mut replaced = 0;
    if given != wanted {
        let back = numerics::dequantize(&tensor.raw(), format, &dims, &granularity, &qparams)?;
        for ((value, back), (given, wanted)) in values.iter_mut().zip(back).zip(given.iter().zip(&wanted)) {
            if given != wanted {
                *value = back;
                replaced += 1;
            }
        }
        let given = numerics::quantize_codes(&values, &dims, &granularity, &qparams, format, Round::HalfEven)?;
        if given != wanted {
            return Err(Error::model("its values are too large to be quantized to these codes"));
        }
    }
    let source = if replaced == 0 && !weight.transpose {
        float
    } else {
        let name = format!("{}_{}", weight.tensor, if replaced == 0 { "transposed" } else { "prepared" });
        model.add_initializer(graph, &name, Tensor::from_f32(&dims, &values))
    };
    // The node takes over everything that is said about the codes.
    let name = model.value(codes).name().to_owned();
    let mut inputs = vec![source];
    inputs.extend(model.node(dequantize).inputs().iter().skip(1).flatten());
    let mut node = NewNode::new(
        "QuantizeLinear",
        format!("{}_QuantizeLinear", weight.tensor),
        &inputs,
        &[&format!("{name}_again")],
    );
    for attr in ["axis", "block_size"] {
        if let Some(value) = model.node(dequantize).int(attr) {
            node = node.with(crate::ir::Attr::int(attr, value));
        }
    }
    if inputs.len() < 3 {
        node = node.with(crate::ir::Attr::int("output_dtype", i64::from(DataType::from(format).code())));
    }
    let first = model.value(codes).users().iter().filter_map(|u| match u {
        crate::ir::User::Node { node, .. } => Some(*node),
        crate::ir::User::Output { .. } => None,
    });
    let order = model.graph(graph).nodes().to_vec();
    let first = first.min_by_key(|n| order.iter().position(|o| o == n)).unwrap_or(dequantize);
    let quantize = model.insert(Place::Before(first), node);
    if let Some(output) = model.node(quantize).output(0) {
        model.replace_uses(codes, output, |_| true);
        model.take_name(codes, output, &format!("{name}_folded"));
    }
    Ok(replaced)
}

/// Replaces the codes of a bias by a float and the operators of its fake quantizer, if these give the same codes.
fn unfold_bias(model: &mut Model, node: NodeId, input: usize, dequantize: NodeId, float: ValueId) -> bool {
    let (Some(codes), Some(scale)) = (model.node(dequantize).input(0), model.node(dequantize).input(1)) else {
        return false;
    };
    let read = |v: ValueId| model.constant(v).cloned();
    let (Some(codes), Some(scales), Some(own)) = (read(codes), read(scale), read(float)) else { return false };
    let (Some(wanted), Some(scales), Some(values)) = (codes.to_i64(), scales.to_f32(), own.to_f32()) else {
        return false;
    };
    let at = |list: &[f32], i: usize| list.get(if list.len() == 1 { 0 } else { i }).copied();
    let same = wanted.iter().enumerate().all(|(i, &code)| match (at(&values, i), at(&scales, i)) {
        (Some(value), Some(scale)) => {
            let rounded = (value / scale).round_ties_even();
            rounded.abs() < 16_777_216.0 && rounded as i64 == code
        }
        _ => false,
    });
    if !same || own.dims() != codes.dims() {
        return false;
    }
    let name = model.value(float).name().to_owned();
    let mut place = Place::Before(node);
    let mut add = |model: &mut Model, op: &str, inputs: &[ValueId], what: &str| {
        let id = model.insert(place, NewNode::new(op, format!("{name}_{op}"), inputs, &[&format!("{name}_{what}")]));
        place = Place::After(id);
        model.node(id).output(0)
    };
    let back = add(model, "Div", &[float, scale], "scaled")
        .and_then(|v| add(model, "Round", &[v], "rounded"))
        .and_then(|v| add(model, "Mul", &[v, scale], "fake_quantized"));
    if let Some(back) = back {
        model.set_input(node, input, Some(back));
    }
    back.is_some()
}
