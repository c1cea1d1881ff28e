//! Fuses what follows a `Conv`, `ConvTranspose` or `Gemm` and scales or shifts each of its channels into its weight and
//! bias: `BatchNormalization` in its inference form, and `Mul`, `Div`, `Add`, `Sub` with a constant for each channel.
//!
//! With `y = W·x + c` and `a·y + b`, the weight becomes `a·W` and the bias `a·c + b`, computed in f64 and rounded once
//! to the weight's type. It is done only where nothing else sees `y`. A weight or bias that other nodes use is copied.
//! The result keeps the name of the fused node's output.
//!
//! A `BatchNormalization` in front of a `Conv` is left alone: with padding, the borders would change.

use super::lift_constants::{allow_plain_initializers, graphs_outside_functions};
use super::{Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Model, NodeId, Tensor, User, ValueId};
use crate::onnx::DataType;

/// See the [module](self).
pub struct FuseBatchnorm;

impl Pass for FuseBatchnorm {
    fn name(&self) -> &'static str {
        "fuse-batchnorm"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for graph in graphs_outside_functions(model) {
            for node in model.graph(graph).nodes().to_vec() {
                let fusion = if model.node(node).is("BatchNormalization") {
                    match batch_normalization(model, node) {
                        Ok(fusion) => fusion,
                        Err(why) => {
                            outcome.skipped(model.node_name(node), why);
                            continue;
                        }
                    }
                } else {
                    let Some(fusion) = arithmetic(model, node) else { continue };
                    fusion
                };
                let name = model.node_name(node).to_owned();
                let op = model.node(node).op_type().to_owned();
                let into = model.node_name(fusion.producer.node).to_owned();
                fuse(model, node, fusion);
                outcome.changed(name, format!("{op} fused into {into}"));
            }
        }
        if !outcome.changes.is_empty() {
            allow_plain_initializers(model, &mut outcome);
        }
        Ok(outcome)
    }
}

/// A node that multiplies each channel of its input by a number and adds another.
struct Fusion {
    producer: Producer,
    /// Which input of the node is the data.
    input: usize,
    /// The scaled weight; `None` if it stays as it is.
    weight: Option<Tensor>,
    bias: Tensor,
}

/// The node that computes the channels.
struct Producer {
    node: NodeId,
    weight: ValueId,
    bias: Option<ValueId>,
    layout: Layout,
}

/// Where the output channels lie in a weight.
#[derive(Clone, Copy)]
struct Layout {
    channels: usize,
    /// Axes of the output; channels are axis 1.
    rank: usize,
    /// The channel of element `i` is `i / stride % columns`, plus `columns` for each whole `block` before it.
    stride: usize,
    columns: usize,
    block: usize,
}

impl Layout {
    fn channel(self, element: usize) -> usize {
        element / self.block * self.columns + element / self.stride % self.columns
    }
}

/// The fusion of a `BatchNormalization`, or why there is none.
fn batch_normalization(model: &Model, id: NodeId) -> Result<Fusion, String> {
    let node = model.node(id);
    let opset = node.graph().and_then(|graph| model.opset_in(graph)).unwrap_or(1);
    let training = if opset >= 14 {
        node.int("training_mode").unwrap_or(0) != 0
    } else {
        node.outputs().iter().skip(1).any(Option::is_some) || (opset < 7 && node.int("is_test").unwrap_or(0) == 0)
    };
    if training {
        return Err("it is in training mode".into());
    }
    if node.int("spatial") == Some(0) {
        return Err("it normalizes each position on its own".into());
    }
    let producer = producer(model, id, 0).map_err(|why| {
        let result = node.output(0).map_or(&[][..], |v| model.value(v).users());
        let feeds_conv = |user: &User| matches!(*user, User::Node { node, .. } if model.node(node).is("Conv"));
        if !result.is_empty() && result.iter().all(feeds_conv) {
            format!("{why}; moving it into the Conv after it would change what that pads with")
        } else {
            why
        }
    })?;
    let mut parameters = [const { Vec::new() }; 4];
    for (slot, (index, what)) in parameters.iter_mut().zip([(1, "scale"), (2, "bias"), (3, "mean"), (4, "variance")]) {
        let tensor = model.constant_input(id, index).ok_or_else(|| format!("its {what} is not constant"))?;
        *slot = tensor.to_f64().filter(|v| v.len() == producer.layout.channels).ok_or_else(|| {
            format!("its {what} is not one number for each of the {} channels", producer.layout.channels)
        })?;
    }
    let [scale, shift, mean, variance] = parameters;
    let epsilon = f64::from(node.float("epsilon").unwrap_or(1e-5));
    let factors: Vec<f64> = scale.iter().zip(&variance).map(|(s, v)| s / (v + epsilon).sqrt()).collect();
    let shifts: Vec<f64> = shift.iter().zip(&mean).zip(&factors).map(|((b, m), a)| b - m * a).collect();
    Fusion::new(model, producer, 0, &factors, &shifts)
}

/// The fusion of an arithmetic node with a constant for each channel.
fn arithmetic(model: &Model, id: NodeId) -> Option<Fusion> {
    let node = model.node(id);
    let op = ["Add", "Sub", "Mul", "Div"].into_iter().find(|op| node.is(op))?;
    // Before opset 7, broadcasting was an attribute with another rule.
    if model.opset_in(node.graph()?)? < 7 {
        return None;
    }
    let (constant, input) = match (model.constant_input(id, 0), model.constant_input(id, 1)) {
        (None, Some(constant)) => (constant, 0),
        (Some(constant), None) => (constant, 1),
        _ => return None,
    };
    let producer = producer(model, id, input).ok()?;
    let values = per_channel(constant, producer.layout)?;
    let all = |value: f64| vec![value; producer.layout.channels];
    let (factors, shifts) = match (op, input) {
        ("Mul", _) => (values, all(0.0)),
        ("Div", 0) => (values.into_iter().map(|v| 1.0 / v).collect(), all(0.0)),
        ("Add", _) => (all(1.0), values),
        ("Sub", 0) => (all(1.0), values.into_iter().map(|v| -v).collect()),
        ("Sub", _) => (all(-1.0), values),
        _ => return None,
    };
    Fusion::new(model, producer, input, &factors, &shifts).ok()
}

/// The node that computes input `input` of node `id`, if weight and bias can be changed for it.
fn producer(model: &Model, id: NodeId, input: usize) -> Result<Producer, String> {
    let data = model.node(id).input(input).ok_or("it has no input")?;
    model.node(id).output(0).ok_or("it has no output")?;
    let Some(node) = model.producer(data) else {
        return Err("its input is not computed by a Conv, ConvTranspose or Gemm".into());
    };
    let slot = model.node(node);
    let name = model.node_name(node);
    let known = ["Conv", "ConvTranspose", "Gemm"].into_iter().find(|op| slot.is(op));
    let Some(op) = known else {
        return Err(match slot.op_type() {
            "MatMul" => format!("its input comes from {name}, a MatMul, which has no bias to take its shift"),
            other => format!("its input comes from {name} ({other}), not from a Conv, ConvTranspose or Gemm"),
        });
    };
    if slot.graph() != model.node(id).graph() {
        return Err(format!("its input comes from {name}, which is in another graph"));
    }
    if model.value(data).users().len() != 1 {
        return Err(format!("the output of {name} is used elsewhere, too"));
    }
    let weight = slot.input(1).ok_or_else(|| format!("{name} has no weight"))?;
    let Some(tensor) = model.constant(weight) else { return Err(format!("the weight of {name} is not constant")) };
    if !tensor.dtype().is_float() {
        return Err(format!("the weight of {name} is of type {}", tensor.dtype()));
    }
    let layout = layout(model, node, op, tensor).ok_or_else(|| format!("the weight of {name} has an odd shape"))?;
    let bias = slot.input(2);
    if let Some(bias) = bias {
        let Some(tensor) = model.constant(bias) else { return Err(format!("the bias of {name} is not constant")) };
        // A convolution's bias is a list; a Gemm's is broadcast like any operand.
        let fits =
            if op == "Gemm" { per_channel(tensor, layout).is_some() } else { tensor.dims() == [layout.channels] };
        if !fits || !tensor.dtype().is_float() {
            return Err(format!("the bias of {name} is not one number for each channel"));
        }
    }
    Ok(Producer { node, weight, bias, layout })
}

fn layout(model: &Model, node: NodeId, op: &str, weight: &Tensor) -> Option<Layout> {
    let node = model.node(node);
    let dims = weight.dims();
    let size = weight.len();
    if size == 0 || dims.len() < 2 {
        return None;
    }
    let rank = dims.len();
    match op {
        "Conv" => Some(Layout { channels: dims[0], rank, stride: size / dims[0], columns: dims[0], block: size }),
        "ConvTranspose" => {
            let groups = usize::try_from(node.int("group").unwrap_or(1)).ok().filter(|&g| g > 0)?;
            if !dims[0].is_multiple_of(groups) {
                return None;
            }
            let stride = size / dims[0] / dims[1];
            Some(Layout { channels: dims[1] * groups, rank, stride, columns: dims[1], block: size / groups })
        }
        _ if rank == 2 => {
            let transposed = node.int("transB").unwrap_or(0) != 0;
            let (channels, stride) = if transposed { (dims[0], dims[1]) } else { (dims[1], 1) };
            Some(Layout { channels, rank, stride, columns: channels, block: size })
        }
        _ => None,
    }
}

impl Fusion {
    /// Scales the producer's channels by `factors`, and then shifts them by `shifts`.
    fn new(model: &Model, producer: Producer, input: usize, factors: &[f64], shifts: &[f64]) -> Result<Self, String> {
        let Producer { node, weight, bias, layout } = &producer;
        let name = model.node_name(*node);
        let weight = model.constant(*weight).ok_or("its weight is not constant")?;
        let beta = if model.node(*node).is("Gemm") { model.node(*node).float("beta").unwrap_or(1.0) } else { 1.0 };
        let old = match bias {
            Some(bias) => model.constant(*bias).and_then(|t| per_channel_bias(t, *layout)),
            None => Some(vec![0.0; layout.channels]),
        }
        .ok_or("its bias is not one number for each channel")?;
        let terms = old.iter().zip(factors).zip(shifts);
        let bias: Vec<f64> = terms.map(|((c, a), b)| f64::from(beta) * c * a + b).collect();
        let dtype = weight.dtype();
        let range = || format!("the fused weight of {name} would not be finite in {dtype}");
        let weight = if factors.iter().all(|a| a.to_bits() == 1f64.to_bits()) {
            None
        } else {
            let values = weight.to_f64().ok_or_else(range)?;
            let scaled = values.iter().enumerate().map(|(i, w)| w * factors[layout.channel(i)]);
            Some(rounded(dtype, &weight.dims(), scaled).ok_or_else(range)?)
        };
        let bias = rounded(dtype, &[layout.channels], bias.into_iter()).ok_or_else(range)?;
        Ok(Self { producer, input, weight, bias })
    }
}

/// Changes the producer, and gives its output the name and the uses of the fused node's.
fn fuse(model: &mut Model, id: NodeId, fusion: Fusion) {
    let Fusion { producer, input, weight, bias } = fusion;
    let (Some(data), Some(result)) = (model.node(id).input(input), model.node(id).output(0)) else { return };
    let weight_name = model.value(producer.weight).name().to_owned();
    if let Some(weight) = weight {
        store(model, producer.node, 1, &format!("{weight_name}_fused"), weight);
    }
    let bias_name = match producer.bias {
        Some(old) => format!("{}_fused", model.value(old).name()),
        None => match weight_name.strip_suffix("weight") {
            Some(stem) => format!("{stem}bias"),
            None => format!("{weight_name}_bias"),
        },
    };
    store(model, producer.node, 2, &bias_name, bias);
    // It has been multiplied in.
    model.remove_attr(producer.node, "beta");
    if let (None, Some(ty)) = (model.value(data).ty(), model.value(result).ty()) {
        let ty = ty.clone();
        model.set_type(data, ty);
    }
    model.set_input(id, input, None);
    let fresh = model.value(data).name().to_owned();
    model.take_name(result, data, &fresh);
    model.replace_uses(result, data, |_| true);
    model.remove(&[id]);
}

/// Puts a tensor at an input: in place of the one there if nothing else uses that, otherwise as a new initializer.
fn store(model: &mut Model, node: NodeId, input: usize, fresh: &str, tensor: Tensor) {
    match model.node(node).input(input) {
        Some(old) if model.value(old).users().len() == 1 => model.set_constant(old, tensor),
        _ => {
            let graph = model.node(node).graph().expect("a producer is in a graph");
            let value = model.add_initializer(graph, fresh, tensor);
            model.set_input(node, input, Some(value));
        }
    }
}

/// One number for each channel, from a tensor that is broadcast against the output: its axes but the channels' are 1.
fn per_channel(tensor: &Tensor, layout: Layout) -> Option<Vec<f64>> {
    let dims = tensor.dims();
    let before = layout.rank.checked_sub(dims.len())?;
    let along = |axis: usize| axis.checked_sub(before).map_or(1, |at| dims[at]);
    if (0..layout.rank).any(|axis| axis != 1 && along(axis) != 1) {
        return None;
    }
    let values = tensor.to_f64()?;
    match values.as_slice() {
        [one] => Some(vec![*one; layout.channels]),
        many if many.len() == layout.channels => Some(values),
        _ => None,
    }
}

/// The numbers of a bias that [`producer`] accepted.
fn per_channel_bias(tensor: &Tensor, layout: Layout) -> Option<Vec<f64>> {
    let values = tensor.to_f64()?;
    match values.as_slice() {
        [one] => Some(vec![*one; layout.channels]),
        many => (many.len() == layout.channels).then(|| many.to_vec()),
    }
}

/// A tensor of the nearest numbers of `dtype`, ties to even; `None` if one of them is not finite.
fn rounded(dtype: DataType, dims: &[usize], values: impl Iterator<Item = f64>) -> Option<Tensor> {
    let tensor = Tensor::from_f64(dtype, dims, values)?;
    tensor.to_f64()?.iter().all(|v| v.is_finite()).then_some(tensor)
}
