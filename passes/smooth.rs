//! Divides inputs of products by one number for each channel, and multiplies their weights by it: channels of like ranges are
//! served better by one scale. What the products compute stays the same but for rounding.
//!
//! An input is divided by what makes it where the plan says so, as the constants of a normalization; elsewhere a Mul in front of
//! the products does it.

use super::support::channels::{rounded, store};
use super::support::divide::Division;
use super::support::graphs::allow_plain_initializers;
use super::support::nodes::{named, planned};
use super::{Change, Context, Outcome, Pass};
use crate::error::{Error, Kind, Result};
use crate::ir::view::Gemm;
use crate::ir::{Model, NewNode, NodeId, Place, Tensor, User, ValueId};
use crate::onnx::DataType;
use crate::plan::{Divided, Smoothing};

/// See the [module](self).
#[derive(Debug)]
pub struct Smooth;

impl Pass for Smooth {
    fn name(&self) -> &'static str {
        "smooth"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let Some((plan, solution)) = context.quantization else { return Ok(outcome) };
        for (smoothing, scales) in plan.smoothing.iter().zip(&solution.smoothing) {
            smooth(model, smoothing, scales).map_err(|e| e.at_value(&smoothing.tensor))?;
            outcome.changed(&smoothing.tensor, Change::Smoothed { products: smoothing.readers.len() });
        }
        if !outcome.changes.is_empty() {
            allow_plain_initializers(model, &mut outcome);
        }
        Ok(outcome)
    }
}

/// The tensors that are divided where they are made; `None` where a Mul is needed.
///
/// # Errors
/// The plan is for another model.
pub fn divided(model: &Model, smoothing: &Smoothing) -> Result<Option<Vec<String>>> {
    let (value, readers) = (named(model, &smoothing.tensor)?, readers(model, smoothing)?);
    let channels = channels(model, &readers);
    let users: Vec<User> = readers.iter().map(|&node| User::Node { node, input: 0 }).collect();
    let found = channels.and_then(|channels| Division::of(model, value, &users, channels));
    let name = |&value: &ValueId| model.value(value).name().to_owned();
    Ok(found.map(|division| division.tensors.iter().map(name).collect()))
}

/// The products.
fn readers(model: &Model, smoothing: &Smoothing) -> Result<Vec<NodeId>> {
    let value = named(model, &smoothing.tensor)?;
    let product = |slot: &crate::plan::Slot| {
        let node = planned(model, &slot.node)?;
        let at = model.node(node);
        let reads = slot.input == 0 && at.input(0) == Some(value);
        let matrix = model.constant_input(node, 1).is_some_and(|w| w.dims().len() == 2 && w.dtype() == DataType::Float);
        if reads && matrix && (at.is("MatMul") || Gemm::of(at).is_some_and(|gemm| !gemm.trans_a)) {
            return Ok(node);
        }
        let message = "it is to be smoothed for a node that is no product of it and a constant matrix";
        Err(Error::new(Kind::Config, message).at_node(model.node_name(node), at.op_type()))
    };
    smoothing.readers.iter().map(product).collect()
}

/// The axis of a weight along which the product sums.
fn axis(model: &Model, product: NodeId) -> usize {
    usize::from(Gemm::of(model.node(product)).is_some_and(|gemm| gemm.trans_b))
}

fn channels(model: &Model, products: &[NodeId]) -> Option<usize> {
    let &first = products.first()?;
    model.constant_input(first, 1)?.dims().get(axis(model, first)).copied()
}

fn smooth(model: &mut Model, smoothing: &Smoothing, scales: &[f32]) -> Result<()> {
    let fail = |message: &str| Error::new(Kind::Config, message);
    let (value, products) = (named(model, &smoothing.tensor)?, readers(model, smoothing)?);
    if scales.iter().any(|s| !s.is_finite() || *s <= 0.0) {
        return Err(fail("it is to be divided by numbers that are not positive"));
    }
    let weights = products.iter().map(|&node| weight(model, node, scales)).collect::<Option<Vec<Tensor>>>();
    let weights =
        weights.ok_or_else(|| fail("its channels are not those that its products sum over, or they overflow"))?;
    if smoothing.divided == Divided::Producer {
        let users: Vec<User> = products.iter().map(|&node| User::Node { node, input: 0 }).collect();
        Division::of(model, value, &users, scales.len())
            .and_then(|division| division.apply(model, scales))
            .ok_or_else(|| fail("what makes it cannot divide it"))?;
    } else {
        let inverse = scales.iter().map(|&s| 1.0 / f64::from(s));
        let inverse = rounded(DataType::Float, &[scales.len()], inverse).ok_or_else(|| fail("a scale is too small"))?;
        let name = smoothing.tensor.clone();
        let factor = model.add_initializer(model.main(), &format!("{name}_smooth_factor"), inverse);
        let place = model.producer(value).map_or(Place::First(model.main()), Place::After);
        let mul = NewNode::new("Mul", format!("{name}_smooth"), &[value, factor], &[&format!("{name}_smooth")]);
        let mul = model.insert(place, mul);
        let divided = model.node(mul).output(0);
        if let (Some(divided), Some(ty)) = (divided, model.value(value).ty().cloned()) {
            model.set_type(divided, ty);
        }
        for &node in &products {
            model.set_input(node, 0, divided);
        }
    }
    for (&node, tensor) in products.iter().zip(weights) {
        let name = model.node(node).input(1).map_or_else(String::new, |v| model.value(v).name().to_owned());
        store(model, node, 1, &format!("{name}_smooth"), tensor);
    }
    Ok(())
}

/// The weight of a product, multiplied by scales along the axis that the product sums over.
fn weight(model: &Model, product: NodeId, scales: &[f32]) -> Option<Tensor> {
    let tensor = model.constant_input(product, 1)?;
    let (dims, axis, values) = (tensor.dims(), axis(model, product), tensor.to_f64()?);
    let columns = *dims.get(1)?;
    if dims.get(axis) != Some(&scales.len()) {
        return None;
    }
    let channel = |at: usize| if axis == 0 { at / columns } else { at % columns };
    let scaled = values.iter().enumerate().map(|(at, value)| value * f64::from(scales[channel(at)]));
    rounded(DataType::Float, &dims, scaled)
}
