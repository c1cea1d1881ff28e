//! Around what onnxruntime fuses. What it does with quantizers was seen in its optimized graphs (`tests/differential/fusion.py`).

use super::{Place, Sum, barriers};
use crate::config::SiteKind;
use crate::ir::{Model, NodeId, User, ValueId};
use crate::numerics::Granularity;
use crate::onnx::DataType;
use crate::ops::{self, Form};
use crate::plan::constants::accumulates;
use crate::plan::form::{Constant, Runs, fits};
use crate::plan::kernels::one_each;
use crate::plan::planner::{Kindness, Planner};
use crate::plan::{Barrier, Bias, Plan, Scheme, Weight};
use crate::reason::{Operand, Reason};
use crate::targets::Target;

pub(super) struct Fused;

impl Place for Fused {
    fn unfit_weight(&self, target: &Target, weight: &Scheme) -> Option<Reason> {
        (!weight.dtype.is_integer() && !target.simulate)
            .then(|| Reason::NotBesideIntegers { target: target.name.clone(), format: weight.dtype })
    }

    /// An integer Gemm takes an int32 bias or none.
    fn unfit_bias(&self, model: &Model, node: NodeId, weight: usize) -> Option<Reason> {
        let at = model.node(node);
        let bias = at.input(2).filter(|_| at.is("Gemm"))?;
        if let Some(name) = ops::factor(model, node) {
            return Some(Reason::Attribute { name: name.to_owned(), wanted: 1 });
        }
        match model.constant(bias) {
            None => Some(Reason::NotConstant { what: Operand::Bias }),
            Some(bias) if ops::channels(model, node, weight).is_none_or(|c| !one_each(&bias.dims(), c)) => {
                Some(Reason::BiasPerChannel { dims: bias.dims() })
            }
            Some(_) => None,
        }
    }

    /// Only `[K, N]` is fused to a `MatMulNBits`.
    fn untransposes(&self, model: &Model, node: NodeId) -> bool {
        model.node(node).is("Gemm") && ops::is_transposed(model, node)
    }

    /// Between a Dequantize and a Quantize, onnxruntime quantizes weights of float operators with one scale for all channels.
    fn fence(&self, planner: &Planner<'_>, value: ValueId) -> bool {
        exposed(planner, value)
    }

    /// onnxruntime makes a Gemm of a MatMul and the Add behind it before it looks for quantizers, and a Gemm with a float bias
    /// does not run on integers.
    fn sum(&self, planner: &Planner<'_>, node: NodeId, first: usize, weights: &[Weight]) -> Sum {
        let Some((add, operand)) = added(planner, node) else { return Sum::AsItIs };
        if let Some(bias) = joins(planner, (node, first), (add, operand), weights) {
            return Sum::Bias(bias);
        }
        let name = planner.model.node(add).output(0).map(|v| planner.name(v));
        name.map_or(Sum::AsItIs, Sum::Apart)
    }

    /// It quantizes the constant bias of a product between quantizers itself, with no regard to what int32 holds.
    fn quantizes_biases(&self) -> bool {
        true
    }

    fn fuses(&self, planner: &Planner<'_>, constant: &Constant<'_>) -> bool {
        let &Constant { node, index, scheme, runs, .. } = constant;
        // Dequantized twice, the same codes become one tensor that is then read as floats.
        let shared = || {
            let value = planner.model.node(node).input(index);
            let reads = |user: &User| matches!(user, User::Node { node, input: 1 } if Form::Matmulnbits.serves(planner.model.node(*node).op_type()));
            value.is_some_and(|value| planner.model.value(value).users().iter().filter(|user| reads(user)).count() > 1)
        };
        let kernel = || fits(planner.model, planner.target, Form::Matmulnbits, constant).is_ok();
        // In a body it does not find the codes of weights from outside, and refuses the model.
        runs != Runs::Float
            || !planner.in_body(node) && kernel() && scheme.granularity != Granularity::PerTensor && !shared()
    }

    /// A clip is taken for a part of the pattern that is looked for, and a computed tensor for the third operand of a Gemm.
    fn hinders(&self, planner: &Planner<'_>, node: NodeId) -> bool {
        let sum = added(planner, node).map(|(add, operand)| (add, planner.model.node(add).input(operand)));
        let computed = sum.is_some_and(|(_, other)| other.is_none_or(|v| planner.model.constant(v).is_none()));
        let ends = [Some(node), sum.map(|(add, _)| add)];
        let clipped = ends.into_iter().flatten().any(|end| barriers::clip(planner, end).is_some());
        (computed || clipped) && !planner.tokens.contains_key(&node)
    }

    fn barriers(&self, planner: &Planner<'_>, nodes: &[NodeId], plan: &Plan) -> Vec<Barrier> {
        barriers::of(planner, nodes, plan)
    }

    fn spread(&self, planner: &mut Planner<'_>, nodes: &[NodeId]) {
        planner.spread(nodes);
    }
}

/// The Add behind a MatMul that makes a Gemm of it, and the operand that is added.
fn added(planner: &Planner<'_>, node: NodeId) -> Option<(NodeId, usize)> {
    let product = planner.model.node(node);
    let output = product.output(0).filter(|v| product.is("MatMul") && !planner.wants.contains_key(v))?;
    let &[User::Node { node: add, input }] = planner.model.value(output).users() else { return None };
    let at = planner.model.node(add);
    if !at.is("Add") || at.graph() != product.graph() || planner.quantized.contains_key(&add) {
        return None;
    }
    let other = at.input(1 - input)?;
    let constant = planner.model.constant(other).map(|t| t.dims().len());
    let rank = constant.or_else(|| planner.model.shape(other).map(|s| s.len()));
    rank.is_none_or(|r| r == 1 || r == 2).then_some((add, 1 - input))
}

/// The bias that is added behind a product, if it can be in its accumulator.
fn joins(
    planner: &Planner<'_>,
    (node, first): (NodeId, usize),
    (add, operand): (NodeId, usize),
    weights: &[Weight],
) -> Option<Bias> {
    let model = planner.model;
    let (data, output) = (model.node(node).input(0)?, model.node(node).output(0)?);
    let other = model.node(add).input(operand)?;
    let tensor = model.constant(other)?;
    let slot = planner.slot(node, 1);
    let weight = first + weights[first..].iter().position(|w| w.at == slot && accumulates(w))?;
    let channels = ops::channels(model, node, 1)?;
    let dims = tensor.dims();
    let keeps_rank = dims.len() == 1 || model.shape(output).is_some_and(|s| s.len() >= 2);
    let fits = planner.is_fixed(node, data)
        && keeps_rank
        && dims.last() == Some(&channels)
        && one_each(&dims, channels)
        && planner.float(tensor.dtype()) == DataType::Float
        && !planner.ask(node, SiteKind::Bias).is_off()
        && planner.untouchable(add).is_none();
    fits.then(|| Bias {
        site: planner.site(node, SiteKind::Bias),
        at: planner.slot(add, operand),
        tensor: planner.name(other),
        channels,
        activation: planner.pair_read(node, data),
        weight,
        float: false,
    })
}

/// Whether the float operator that makes this value has a weight, or what becomes one, and reads a dequantized tensor.
fn exposed(planner: &Planner<'_>, value: ValueId) -> bool {
    let model = planner.model;
    let Some(node) = model.producer(value) else { return false };
    let at = model.node(node);
    if !at.domain().is_empty() || planner.quantized.get(&node) == Some(&Kindness::Integer) {
        return false;
    }
    let float_product = |v: Option<ValueId>| {
        let product = v.and_then(|v| model.producer(v)).filter(|&p| model.node(p).is("MatMul"));
        product.is_some_and(|p| {
            let constant = model.constant_input(p, 1).is_some();
            constant && !planner.quantized.contains_key(&p) && dequantized(planner, model.node(p).input(0))
        })
    };
    match at.op_type() {
        "Conv" | "ConvTranspose" | "Gemm" => {
            model.constant_input(node, 1).is_some() && dequantized(planner, at.input(0))
        }
        // A Gemm to be.
        "Add" => float_product(at.input(0)) || float_product(at.input(1)),
        // Run on integers in spite of an attribute that their kernels lack, or of two scales.
        op if planner.target.join.has(op) => {
            ops::unfit_attribute(model, node).is_some() && dequantized(planner, at.input(0))
        }
        op if planner.target.carry.has(op) && ops::moves_codes(model, node) && reads_codes(planner, node) => {
            planner.wants.get(&value).and_then(|w| w.made.as_ref()).is_none_or(|made| made.keeps.is_none())
        }
        // A quantizer moves up through these.
        op if planner.target.absorb.has(op) || planner.target.carry.has(op) => {
            at.input(0).is_some_and(|v| exposed(planner, v))
        }
        _ => false,
    }
}

/// Whether a node reads a dequantized tensor, if only because a rule about this node asked for it.
fn reads_codes(planner: &Planner<'_>, node: NodeId) -> bool {
    let value = planner.model.node(node).input(0);
    let asked =
        |value: ValueId| planner.wants.get(&value).is_some_and(|w| w.reads.iter().any(|(at, _)| *at == (node, 0)));
    dequantized(planner, value) || value.is_some_and(asked)
}

/// Whether a value comes from a Dequantize, directly or through operators that one moves down through.
fn dequantized(planner: &Planner<'_>, value: Option<ValueId>) -> bool {
    let Some(value) = value else { return false };
    if planner.wants.get(&value).is_some_and(|w| w.made.is_some()) {
        return true;
    }
    let Some(node) = planner.model.producer(value) else { return false };
    let at = planner.model.node(node);
    at.is("DequantizeLinear")
        || (at.domain().is_empty() && planner.target.carry.has(at.op_type()) && dequantized(planner, at.input(0)))
}
