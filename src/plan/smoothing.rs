//! Which inputs of products could be divided channel by channel.

use std::collections::BTreeMap;

use super::{Activation, Mode, Plan, Readers, Slot};
use crate::ir::Model;
use crate::ir::view::Gemm;
use crate::numerics::Granularity;
use crate::onnx::DataType;

/// A tensor that products with constant matrices read.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub tensor: String,
    /// The inputs that read it.
    pub readers: Vec<Slot>,
    /// The weights of the products, as indices into [`Plan::weights`].
    pub weights: Vec<usize>,
    /// How the products' input is quantized, where it is.
    pub activation: Option<super::Scheme>,
}

/// The inputs whose products read them with one scale that samples tell, by the matrices that they multiply them with. With
/// `float`, those whose products read them as floats.
#[must_use]
pub fn candidates(model: &Model, plan: &Plan, float: bool) -> Vec<Candidate> {
    let mut found: BTreeMap<&str, Candidate> = BTreeMap::new();
    let mut order = Vec::new();
    let mut pairs: BTreeMap<&str, Vec<&Activation>> = BTreeMap::new();
    for (name, activation) in &plan.activations {
        pairs.entry(activation.tensor.as_ref().unwrap_or(name)).or_default().push(activation);
    }
    for (index, weight) in plan.weights.iter().enumerate() {
        let node = model.value_named(&weight.at.node).and_then(|value| model.producer(value));
        let Some(node) = node.filter(|_| weight.at.input == 1 && weight.quantizer.given.is_none()) else { continue };
        if model.node(node).graph() != Some(model.main()) {
            continue;
        }
        let at = model.node(node);
        let product = at.is("MatMul") || Gemm::of(at).is_some_and(|gemm| !gemm.trans_a);
        let matrix = model.constant_input(node, 1).is_some_and(|w| w.dims().len() == 2 && w.dtype() == DataType::Float);
        let Some(input) = at.input(0).filter(|&v| product && matrix && model.constant(v).is_none()) else { continue };
        let name = model.value(input).name();
        let slot = Slot { node: weight.at.node.clone(), input: 0 };
        let reads = |pair: &&Activation| match &pair.readers {
            Readers::All => true,
            Readers::Listed(slots) => slots.contains(&slot),
        };
        let pair = pairs.get(name).and_then(|pairs| pairs.iter().copied().find(reads));
        let token = plan.tokens.iter().any(|token| token.at == slot);
        let activation = match pair {
            None if float && !token => None,
            Some(activation) if !float && is_free(activation) => Some(activation.quantizer.clone()),
            _ => continue,
        };
        let candidate = found.entry(name).or_insert_with(|| {
            order.push(name);
            Candidate {
                tensor: name.to_owned(),
                readers: Vec::new(),
                weights: Vec::new(),
                activation: activation.clone(),
            }
        });
        if candidate.activation == activation {
            candidate.readers.push(slot);
            candidate.weights.push(index);
        }
    }
    order.into_iter().filter_map(|name| found.remove(name)).collect()
}

/// Whether samples alone decide the one scale of an activation.
fn is_free(activation: &Activation) -> bool {
    activation.mode == Mode::Static
        && activation.converts.is_none()
        && activation.range.is_none()
        && activation.quantizer.given.is_none()
        && activation.quantizer.granularity == Granularity::PerTensor
}
