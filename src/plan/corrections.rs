//! Biases that make up for what quantization does to means.

use super::planner::Planner;
use super::{Correction, Weight};
use crate::config::SiteKind;
use crate::ir::{NodeId, User, ValueId};
use crate::ops::{self, Channel};
use crate::quant::algorithm::Method;

impl Planner<'_> {
    /// The biases of products whose weights are quantized, where samples can show how far means move: rounding errors of a
    /// weight have a mean that its inputs carry to every output. What other tools' algorithms are asked for goes without.
    pub(super) fn corrections(&self, weights: &[Weight]) -> Vec<Correction> {
        if !self.knowledge.samples {
            return Vec::new();
        }
        let found = |weight: &Weight| {
            let node = self.model.producer_named(&weight.at.node)?;
            let asked = self.rules.algorithm_at(self.model.node_name(node), self.model.node(node).op_type());
            let channel = ops::constant_weight(self.model, node, weight.at.input)?;
            let product = matches!(channel, Channel::Right | Channel::Conv | Channel::ConvTranspose);
            if !(product && asked.is_none_or(|a| matches!(a.method, Method::Best | Method::SmoothQuant))) {
                return None;
            }
            let channels = ops::channels(self.model, node, weight.at.input)?;
            let (reader, index, value) = self.bias_of(node, channels)?;
            let single = self.model.value(value).users().len() == 1;
            single.then(|| Correction {
                site: self.site(node, SiteKind::Bias),
                at: self.slot(reader, index),
                product: weight.at.node.clone(),
                tensor: self.name(value),
            })
        };
        let mut all: Vec<Correction> = Vec::new();
        for correction in weights.iter().filter_map(found) {
            if all.iter().all(|other| other.tensor != correction.tensor) {
                all.push(correction);
            }
        }
        all
    }

    /// The constant with a value for each channel that is added to a product: who reads it, and where.
    fn bias_of(&self, node: NodeId, channels: usize) -> Option<(NodeId, usize, ValueId)> {
        let fits = |value: ValueId, axes: bool| {
            let tensor = self.model.constant(value)?;
            let dims = tensor.dims();
            let last = dims.last() == Some(&channels) && dims.iter().product::<usize>() == channels;
            (tensor.dtype().is_float() && last && (axes || dims.len() == 1)).then_some(value)
        };
        let at = self.model.node(node);
        if at.inputs().len() > 2 {
            ops::factor(self.model, node).is_none().then_some(())?;
            return Some((node, 2, fits(at.input(2)?, false)?));
        }
        if !at.is("MatMul") {
            return None;
        }
        let &[User::Node { node: reader, .. }] = self.model.value(at.output(0)?).users() else { return None };
        let add = self.model.node(reader);
        let (0 | 1) = add.inputs().iter().position(|&v| v == at.output(0))? else { return None };
        let other = usize::from(add.input(0) == at.output(0));
        (add.is("Add") && add.inputs().len() == 2).then_some(())?;
        Some((reader, other, fits(add.input(other)?, true)?))
    }
}
