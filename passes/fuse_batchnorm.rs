//! Fuses what follows a `Conv`, `ConvTranspose` or `Gemm` and scales or shifts each of its channels into its weight and
//! bias: `BatchNormalization` in its inference form, and `Mul`, `Div`, `Add`, `Sub` with a constant for each channel.
//!
//! With `y = W·x + c` and `a·y + b`, the weight becomes `a·W` and the bias `a·c + b`, computed in f64 and rounded once
//! to the weight's type. It is done only where nothing else sees `y`. A weight or bias that other nodes use is copied.
//! The result keeps the name of the fused node's output.
//!
//! A `BatchNormalization` in front of a `Conv` is left alone: with padding, the borders would change.

use super::support::channels::{self, Channels, Product, absorb, rounded, store};
use super::support::graphs::{allow_plain_initializers, graphs_outside_functions};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Model, NodeId, Tensor, User};
use crate::reason::{Operand, Reason};

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
                let into = model.node_name(fusion.product.node).to_owned();
                fuse(model, node, fusion);
                outcome.changed(name, Change::FusedInto { op, node: into });
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
    product: Product,
    /// Which input of the node is the data.
    input: usize,
    /// The scaled weight; `None` if it stays as it is.
    weight: Option<Tensor>,
    bias: Tensor,
}

/// The fusion of a `BatchNormalization`, or why there is none.
fn batch_normalization(model: &Model, id: NodeId) -> Result<Fusion, Reason> {
    channels::infers(model, id)?;
    let product = producer(model, id, 0).map_err(|why| {
        let result = model.node(id).output(0).map_or(&[][..], |v| model.value(v).users());
        let feeds_conv = |user: &User| matches!(*user, User::Node { node, .. } if model.node(node).is("Conv"));
        if !result.is_empty() && result.iter().all(feeds_conv) {
            Reason::NotAcrossPadding { because: Box::new(why) }
        } else {
            why
        }
    })?;
    let channels = channels::batch_normalization(model, id, product.layout.channels)?;
    Fusion::new(model, product, 0, &channels)
}

/// The fusion of an arithmetic node with a constant for each channel.
fn arithmetic(model: &Model, id: NodeId) -> Option<Fusion> {
    let input = channels::data_input(model, id)?;
    let product = producer(model, id, input).ok()?;
    let channels = channels::arithmetic(model, id, input, product.layout)?;
    Fusion::new(model, product, input, &channels).ok()
}

/// What a node with channels and a bias is.
const WANTED: &str = "a Conv, ConvTranspose or Gemm";

/// The node that computes input `input` of node `id`, if weight and bias can be changed for it.
fn producer(model: &Model, id: NodeId, input: usize) -> Result<Product, Reason> {
    let data = model.node(id).input(input).ok_or(Reason::Missing { what: Operand::Input })?;
    model.node(id).output(0).ok_or(Reason::NoOutput)?;
    let Some(node) = model.producer(data) else {
        return Err(Reason::NotComputedBy { what: Operand::Input, wanted: WANTED.into() });
    };
    let slot = model.node(node);
    let name = model.node_name(node);
    if !channels::has_channels(model, node) {
        let by = format!("{name} ({})", slot.op_type());
        return Err(Reason::ComputedBy { what: Operand::Input, by, wanted: WANTED.into() });
    }
    if slot.graph() != model.node(id).graph() {
        return Err(Reason::OtherGraph { what: Operand::Input });
    }
    if model.value(data).users().len() != 1 {
        return Err(Reason::UsedElsewhere { what: Operand::Output }.in_fusion(name));
    }
    let weight = slot.input(1).ok_or(Reason::Missing { what: Operand::Weight })?;
    let Some(tensor) = model.constant(weight) else {
        return Err(Reason::NotConstant { what: Operand::Weight }.in_fusion(name));
    };
    if !tensor.dtype().is_float() {
        return Err(Reason::wrong_type(Operand::Weight, tensor.dtype(), "a float").in_fusion(name));
    }
    Product::of(model, node, &tensor.dims()).map_err(|why| why.in_fusion(name))
}

impl Fusion {
    fn new(model: &Model, product: Product, input: usize, channels: &Channels) -> Result<Self, Reason> {
        let Channels { factors, shifts } = channels;
        let layout = product.layout;
        let weight = model.constant_input(product.node, 1).ok_or(Reason::NotConstant { what: Operand::Weight })?;
        let terms = product.shifts(model).into_iter().zip(factors).zip(shifts);
        let bias: Vec<f64> = terms.map(|((c, a), b)| c * a + b).collect();
        let dtype = weight.dtype();
        let range = || {
            Reason::Overflows { what: "fused weight or bias".into(), dtype }.in_fusion(model.node_name(product.node))
        };
        let weight = if factors.iter().all(|a| a.to_bits() == 1f64.to_bits()) {
            None
        } else {
            let values = weight.to_f64().ok_or_else(range)?;
            let scaled = values.iter().enumerate().map(|(i, w)| w * factors[layout.channel(i)]);
            Some(rounded(dtype, &weight.dims(), scaled).ok_or_else(range)?)
        };
        let bias = rounded(dtype, &[layout.channels], bias.into_iter()).ok_or_else(range)?;
        Ok(Self { product, input, weight, bias })
    }
}

/// Changes the producer, and gives its output the name and the uses of the fused node's.
fn fuse(model: &mut Model, id: NodeId, fusion: Fusion) {
    let Fusion { product, input, weight, bias } = fusion;
    let Some(value) = model.node(product.node).input(1) else { return };
    let name = model.value(value).name().to_owned();
    if let Some(weight) = weight {
        store(model, product.node, 1, &format!("{name}_fused"), weight);
    }
    product.set_bias(model, bias, &name);
    absorb(model, &[(id, input)]);
}
