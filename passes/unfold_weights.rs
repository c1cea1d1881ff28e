//! Puts the float weights back in front of their codes: what was folded becomes a fake quantizer again.
//!
//! A weight becomes a float initializer with a QuantizeLinear behind it, whose codes are exactly the ones that it had. Where
//! plain rounding of the float would give another code (pairs that are kept from saturating, other roundings, codes that
//! an algorithm chose), that one element is replaced by what its code stands for; all others keep their bits. Where zero
//! points are floats, as in torchao's int4 weight-only, the fake quantizer is spelled out in operators. A bias becomes a
//! float again too, behind Div, Round and Mul, which is the fake quantizer of int32 that ONNX can say.

use super::forms::shapes;
use super::support::evaluate::transposed;
use super::support::float_ops::Ops;
use super::support::nodes::planned;
use super::{Change, Context, Outcome, Pass};
use crate::algorithms::tinygemm::{Grid, grid, middle};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NewNode, NodeId, Place, Tensor, User, ValueId};
use crate::numerics::{self, QParams, Round, pack};
use crate::onnx::DataType;
use crate::plan::Weight;
use crate::reason::Reason;

/// See the module.
#[derive(Debug)]
pub struct UnfoldWeights;

impl Pass for UnfoldWeights {
    fn name(&self) -> &'static str {
        "unfold-weights"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let Some((plan, solution)) = context.quantization else {
            return Err(
                Error::new(Kind::Usage, "unfold-weights needs a plan").with_hint("run it through `amax prepare`")
            );
        };
        for (weight, solved) in plan.weights.iter().zip(&solution.weights) {
            let node = planned(model, &weight.at.node)?;
            let Some(dequantize) = dequantizer(model, node, weight.at.input) else { continue };
            if weight.quantizer.float_zero_point {
                spell_out(model, weight, dequantize).map_err(|e| e.at_value(&weight.tensor))?;
                outcome.changed(&weight.site, Change::FloatQuantizer);
                continue;
            }
            let Some(codes) = model.node(dequantize).input(0).filter(|&v| model.constant(v).is_some()) else {
                continue;
            };
            let qparams = solved.tensor().qparams();
            let rounded =
                unfold(model, weight, &qparams, (dequantize, codes)).map_err(|e| e.at_value(&weight.tensor))?;
            outcome.changed(
                &weight.site,
                if rounded == 0 { Change::FloatAgain } else { Change::FloatRounded { elements: rounded } },
            );
        }
        for bias in &plan.biases {
            let node = planned(model, &bias.at.node)?;
            let Some(dequantize) = dequantizer(model, node, bias.at.input) else { continue };
            let float = model.value_named(&bias.tensor).filter(|&v| model.constant(v).is_some());
            match float.map(|float| unfold_bias(model, node, bias.at.input, dequantize, float)) {
                Some(true) => outcome.changed(&bias.site, Change::FloatAgain),
                _ => outcome.skipped(&bias.site, Reason::FloatWouldDiffer),
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
fn unfold(
    model: &mut Model,
    weight: &Weight,
    qparams: &QParams,
    (dequantize, codes): (NodeId, ValueId),
) -> Result<usize> {
    let graph = model.main();
    let missing = || Error::new(Kind::Internal, "the weight of a plan is gone");
    let float = model.value_named(&weight.tensor).ok_or_else(missing)?;
    let own = model.constant(float).ok_or_else(missing)?.clone();
    let own_dtype = own.dtype();
    let tensor = model.constant(codes).ok_or_else(missing)?.clone();
    let (format, dims) = (weight.quantizer.dtype, tensor.dims());
    let granularity = &weight.quantizer.granularity;
    let laid = if weight.transpose { transposed(&own, &[1, 0]) } else { Some(own) };
    let mut values = laid.and_then(|tensor| tensor.to_f32()).ok_or_else(missing)?;
    let wanted = pack::unpack(&tensor.raw(), &format, tensor.len());
    let given = numerics::quantize_codes(&values, &dims, granularity, qparams, format, Round::HalfEven)?;
    let mut replaced = 0;
    if given != wanted {
        let back = numerics::dequantize(&tensor.raw(), format, &dims, granularity, qparams)?;
        for ((value, back), (given, wanted)) in values.iter_mut().zip(back).zip(given.iter().zip(&wanted)) {
            if given != wanted {
                *value = back;
                replaced += 1;
            }
        }
        let given = numerics::quantize_codes(&values, &dims, granularity, qparams, format, Round::HalfEven)?;
        if given != wanted {
            return Err(Error::model("its values are too large to be quantized to these codes"));
        }
    }
    // QuantizeLinear takes both in one type, and a model of 16-bit floats may compute in float32.
    let scale = model.constant_input(dequantize, 1).map(Tensor::dtype);
    let widened = scale.is_some_and(|scale| scale != own_dtype);
    let source = if replaced == 0 && !weight.transpose && !widened {
        float
    } else {
        let turned = replaced == 0 && weight.transpose;
        let name = format!("{}_{}", weight.tensor, if turned { "transposed" } else { "prepared" });
        let stored = Tensor::from_f64(scale.unwrap_or(DataType::Float), &dims, values.iter().map(|&v| f64::from(v)));
        model.add_initializer(graph, &name, stored.unwrap_or_else(|| Tensor::from_f32(&dims, &values)))
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
    // What stands first in the main graph is seen by bodies, too; what a body holds is seen there alone.
    let order = model.graph(graph).nodes();
    let position = |user: &User| match user {
        User::Node { node, .. } => order.iter().position(|n| n == node),
        User::Output { .. } => None,
    };
    let users: Vec<Option<usize>> = model.value(codes).users().iter().map(position).collect();
    let place = match users.iter().flatten().min() {
        None => Place::Before(dequantize),
        Some(_) if users.contains(&None) => Place::First(graph),
        Some(&first) => Place::Before(order[first]),
    };
    let quantize = model.insert(place, node);
    if let Some(output) = model.node(quantize).output(0) {
        model.replace_uses(codes, output, |_| true);
        model.take_name(codes, output, &format!("{name}_folded"));
    }
    Ok(replaced)
}

/// Puts torchao's fake quantizer of float zero points in the place of a Dequantize node: with groups as rows,
/// `(clip(round((w - least) / scale), 0, 15) - 8) * scale + value`.
fn spell_out(model: &mut Model, weight: &Weight, dequantize: NodeId) -> Result<()> {
    let arithmetic = weight.quantizer.arithmetic;
    if !arithmetic.is_between() {
        return Err(Error::new(Kind::Config, "its zero points lie between codes, which QuantizeLinear does not have")
            .with_hint("add form = \"qdq\", with which they are codes"));
    }
    let missing = || Error::new(Kind::Internal, "the weight of a plan is gone");
    let float = model.value_named(&weight.tensor).ok_or_else(missing)?;
    let own = model.constant(float).ok_or_else(missing)?.clone();
    let laid = if weight.transpose { transposed(&own, &[1, 0]).ok_or_else(missing)? } else { own };
    let (dims, granularity) = (laid.dims(), &weight.quantizer.granularity);
    let spec = weight.quantizer.range_spec();
    let mut groups = vec![Vec::new(); granularity.scale_dims(&dims).iter().product()];
    for (value, entry) in laid.to_f32().ok_or_else(missing)?.into_iter().zip(granularity.entries(&dims)?) {
        groups[entry].push(value);
    }
    let grids: Vec<Grid> = groups.iter().map(|values| grid(arithmetic, values, &spec)).collect();
    let output = model.node(dequantize).output(0).ok_or_else(missing)?;
    let [cut, rows] = shapes(&dims, granularity).map_err(|why| Error::new(Kind::Config, why.to_string()))?;
    let mut source = float;
    if weight.transpose {
        source = model.add_initializer(model.main(), &format!("{}_transposed", weight.tensor), laid);
    }
    let mut ops = Ops::new(model, &weight.tensor, Place::Before(dequantize));
    let number = |ops: &mut Ops<'_>, what: &str, pick: fn(&Grid) -> f32| {
        let values: Vec<f32> = grids.iter().map(pick).collect();
        ops.floats(what, &rows, &values)
    };
    let [scale, least, value] = [
        number(&mut ops, "group_scale", |grid| grid.scale),
        number(&mut ops, "group_least", |grid| grid.least),
        number(&mut ops, "group_offset", |grid| grid.value),
    ];
    let (lowest, highest) = spec.codes();
    let [low, high] = [("lowest", lowest), ("highest", highest)].map(|(what, code)| ops.constant(what, code as f32));
    let shape = |dims: &[usize]| -> Vec<i64> { dims.iter().map(|&dim| dim as i64).collect() };
    let mut at = source;
    if cut != dims {
        let cut = ops.integers("grouped_shape", &shape(&cut));
        at = ops.op("Reshape", &[at, cut]);
    }
    at = ops.op("Sub", &[at, least]);
    at = ops.op("Div", &[at, scale]);
    at = ops.op("Round", &[at]);
    at = ops.op("Clip", &[at, low, high]);
    at = ops.with("Sub", at, middle(&spec));
    at = ops.op("Mul", &[at, scale]);
    at = ops.op("Add", &[at, value]);
    if cut != dims {
        let whole = ops.integers("shape", &shape(&dims));
        at = ops.op("Reshape", &[at, whole]);
    }
    if let Some(ty) = model.value(output).ty().cloned() {
        model.set_type(at, ty);
    }
    model.replace_uses(output, at, |_| true);
    model.remove(&[dequantize]);
    Ok(())
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
