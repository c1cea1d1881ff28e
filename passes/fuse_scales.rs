//! Fuses what follows a `Conv`, `ConvTranspose` or `Gemm` of dequantized codes and scales or shifts each of its channels:
//! into the scales of the weight and into the bias, so that a product between quantizers has nothing in floats beside it.
//!
//! Training leaves a `BatchNormalization` there, and PyTorch's also a `Div` by the same factors in front of it. The nodes
//! are taken together, as `y = a·(W·x) + b`, in f64. The bias is rounded once. Codes stay in any case. Where `a` is 1 but
//! for the rounding of float32, the scale keeps its bits too, since it was learned. Another `a` above zero is multiplied
//! into the scale; that is done only between quantizers, where it lets the product run on integers.

use super::support::channels::{self, Channels, Product, absorb, rounded, store};
use super::support::graphs::{allow_plain_initializers, graphs_outside_functions};
use super::support::qoperator::is_quantized;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::{Quantizer, axis_in};
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, User};
use crate::numerics::pack;
use crate::reason::{Operand, Reason};

/// What a factor may be off from 1 by the roundings of a few operations in float32, each of which is half of 2⁻²³.
const ROUNDING: f64 = 8.0 / (1u64 << 23) as f64;

/// See the module.
#[derive(Debug)]
pub struct FuseScales;

impl Pass for FuseScales {
    fn name(&self) -> &'static str {
        "fuse-scales"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for graph in graphs_outside_functions(model) {
            for node in model.graph(graph).nodes().to_vec() {
                let Some(dequantize) = dequantizer(model, node) else { continue };
                let dims = model.constant_input(dequantize, 0).map(Tensor::dims).unwrap_or_default();
                let behind = match Product::of(model, node, &dims) {
                    Ok(product) => Behind::of(model, product, dequantize),
                    Err(why) => {
                        if let Some(next) = next(model, node).filter(|&(n, _)| model.node(n).is("BatchNormalization")) {
                            outcome.skipped(model.node_name(next.0), why.in_fusion(model.node_name(node)));
                        }
                        continue;
                    }
                };
                if let Some((node, why)) = &behind.stopped {
                    outcome.skipped(model.node_name(*node), why.clone());
                }
                let Some(&(first, _)) = behind.nodes.first() else { continue };
                let name = model.node_name(node).to_owned();
                match behind.fusion(model, context.conversion.keep_scales) {
                    Ok(fusion) => outcome.changed(name, behind.fuse(model, fusion)),
                    // Arithmetic in floats is no surprise.
                    Err(why) if behind.normalizes(model) || behind.is_between_quantizers(model) => {
                        outcome.skipped(model.node_name(first), why);
                    }
                    Err(_) => {}
                }
            }
        }
        if !outcome.changes.is_empty() {
            allow_plain_initializers(model, &mut outcome);
        }
        Ok(outcome)
    }
}

/// The node that dequantizes the weight of a product.
fn dequantizer(model: &Model, node: NodeId) -> Option<NodeId> {
    let weight = model.node(node).input(1).filter(|_| channels::has_channels(model, node))?;
    let dequantize = model.producer(weight).filter(|&p| model.node(p).is("DequantizeLinear"))?;
    let codes = model.constant_input(dequantize, 0).is_some() && model.constant_input(dequantize, 1).is_some();
    (codes && model.node(dequantize).graph() == model.node(node).graph()).then_some(dequantize)
}

/// The one reader of a node's result, and which input that is.
fn next(model: &Model, node: NodeId) -> Option<(NodeId, usize)> {
    match *model.value(model.node(node).output(0)?).users() {
        [User::Node { node: reader, input }] if model.node(reader).graph() == model.node(node).graph() => {
            Some((reader, input))
        }
        _ => None,
    }
}

/// What follows a product and works on its channels alone.
struct Behind {
    product: Product,
    dequantize: NodeId,
    /// One behind the other, each with the input that reads the one before.
    nodes: Vec<(NodeId, usize)>,
    /// What they do together.
    channels: Channels,
    /// The node behind them, where it is a `BatchNormalization` that cannot be taken, and why.
    stopped: Option<(NodeId, Reason)>,
}

/// What changes.
struct Fusion {
    /// None where there is none, and none is needed.
    bias: Option<Tensor>,
    scales: Option<Scales>,
}

/// New scales of a weight.
struct Scales {
    scale: Tensor,
    /// Where one number became one for each channel.
    spread: Option<Spread>,
    /// The least and the largest factor.
    factors: (f64, f64),
}

struct Spread {
    axis: usize,
    zero: Option<Tensor>,
}

impl Behind {
    fn of(model: &Model, product: Product, dequantize: NodeId) -> Self {
        let count = product.layout.channels;
        let channels = Channels { factors: vec![1.0; count], shifts: vec![0.0; count] };
        let mut found = Self { product, dequantize, nodes: Vec::new(), channels, stopped: None };
        let mut last = product.node;
        while let Some((node, input)) = next(model, last) {
            let does = if model.node(node).is("BatchNormalization") && input == 0 {
                let does = channels::infers(model, node);
                match does.and_then(|()| channels::batch_normalization(model, node, count)) {
                    Ok(does) => does,
                    Err(why) => {
                        found.stopped = Some((node, why));
                        break;
                    }
                }
            } else {
                let data = channels::data_input(model, node).filter(|&data| data == input);
                let Some(does) = data.and_then(|data| channels::arithmetic(model, node, data, product.layout)) else {
                    break;
                };
                does
            };
            found.channels = found.channels.then(&does);
            found.nodes.push((node, input));
            last = node;
        }
        found
    }

    fn normalizes(&self, model: &Model) -> bool {
        self.nodes.iter().any(|&(node, _)| model.node(node).is("BatchNormalization"))
    }

    fn is_between_quantizers(&self, model: &Model) -> bool {
        let input = model.node(self.product.node).input(0).and_then(|x| model.producer(x));
        input.is_some_and(|x| model.node(x).is("DequantizeLinear"))
            && self.nodes.last().is_some_and(|&(last, _)| is_quantized(model, last))
    }

    /// The new bias and scales, or why there are none.
    fn fusion(&self, model: &Model, keep_scales: bool) -> Result<Fusion, Reason> {
        let Channels { factors, shifts } = &self.channels;
        let near = |a: f64| if (a - 1.0).abs() <= ROUNDING { 1.0 } else { a };
        let factors: Vec<f64> = factors.iter().copied().map(near).collect();
        let terms = self.product.shifts(model).into_iter().zip(&factors).zip(shifts);
        let bias = terms.map(|((c, a), b)| c * a + b);
        let dtype =
            model.constant_input(self.dequantize, 1).ok_or(Reason::NotConstant { what: Operand::Scale })?.dtype();
        let bias = rounded(dtype, &[factors.len()], bias)
            .ok_or_else(|| Reason::Overflows { what: "new bias".into(), dtype })?;
        let plain = model.node(self.product.node).input(2).is_none() && shifts.iter().all(|b| b.abs() == 0.0);
        let bias = (!plain).then_some(bias);
        if factors.iter().all(|&a| (a - 1.0).abs() == 0.0) {
            return Ok(Fusion { bias, scales: None });
        }
        if keep_scales {
            return Err(Reason::KeepsScales);
        }
        if let Some(bad) = factors.iter().find(|&&a| a <= 0.0 || !a.is_finite()) {
            return Err(Reason::OutOfRange {
                what: "factor".into(),
                value: *bad as f32,
                wanted: "a positive number".into(),
            });
        }
        if !self.is_between_quantizers(model) {
            return Err(Reason::NotBetweenQuantizers);
        }
        Ok(Fusion { bias, scales: Some(self.scales(model, &factors)?) })
    }

    /// The scales of the weight, multiplied by factors above zero.
    fn scales(&self, model: &Model, factors: &[f64]) -> Result<Scales, Reason> {
        let (at, layout) = (model.node(self.dequantize), self.product.layout);
        let quantizer = Quantizer::of(at).ok_or(Reason::NotDequantizedConstant { what: Operand::Weight })?;
        if quantizer.block_size != 0 {
            return Err(self.wrong_scales(model));
        }
        let (first, others) = factors.split_at(layout.columns);
        if others.chunks(layout.columns).any(|group| group != first) {
            return Err(Reason::SharedScales);
        }
        let scale = model.constant_input(self.dequantize, 1).ok_or(Reason::NotConstant { what: Operand::Scale })?;
        let rank = model.constant_input(self.dequantize, 0).map_or(0, |codes| codes.dims().len());
        let numbers = scale.to_f64().ok_or_else(|| Reason::wrong_type(Operand::Scale, scale.dtype(), "a float"))?;
        let axis = axis_in(quantizer.axis, rank).unwrap_or(rank);
        let alike = first.iter().all(|a| a.to_bits() == first[0].to_bits());
        let (dims, numbers, spread) = match numbers.as_slice() {
            [one] if alike => (scale.dims(), vec![one * first[0]], None),
            [one] => {
                if at.graph().and_then(|g| model.opset_in(g)).unwrap_or(0) < 13 {
                    return Err(Reason::NeedsOpset { what: "one scale per channel".into(), opset: 13 });
                }
                let zero = at.input(2).map(|_| self.spread_zero(model)).transpose()?;
                let numbers = first.iter().map(|a| one * a).collect();
                (vec![layout.columns], numbers, Some(Spread { axis: layout.axis, zero }))
            }
            many if axis == layout.axis && many.len() == layout.columns => {
                (scale.dims(), many.iter().zip(first).map(|(s, a)| s * a).collect(), None)
            }
            _ => return Err(self.wrong_scales(model)),
        };
        let fits = |tensor: &Tensor| tensor.to_f64().is_some_and(|values| values.iter().all(|&v| v != 0.0));
        let scale_type = scale.dtype();
        let scale = rounded(scale_type, &dims, numbers.into_iter()).filter(fits);
        let scale =
            scale.ok_or_else(|| Reason::Overflows { what: "scale times a factor".into(), dtype: scale_type })?;
        let least = factors.iter().copied().fold(f64::INFINITY, f64::min);
        let most = factors.iter().copied().fold(0.0, f64::max);
        Ok(Scales { scale, spread, factors: (least, most) })
    }

    fn wrong_scales(&self, model: &Model) -> Reason {
        let codes = model.node(self.dequantize).input(0);
        let tensor = codes.map_or("", |v| model.value(v).name()).to_owned();
        Reason::WrongScales { tensor, wanted: "one scale, or one per channel".into() }
    }

    /// The zero point for each channel.
    fn spread_zero(&self, model: &Model) -> Result<Tensor, Reason> {
        let zero = model.constant_input(self.dequantize, 2);
        let number = zero.and_then(|z| Some((z.dtype(), z.to_i64()?)));
        let bits = number.as_ref().and_then(|(dtype, _)| dtype.bits());
        let (Some((dtype, numbers)), Some(bits)) = (number, bits) else {
            return Err(Reason::NotConstant { what: Operand::ZeroPoint });
        };
        let count = self.product.layout.columns;
        let codes = vec![numbers.first().map_or(0, |&n| n as i32); count];
        Ok(Tensor::new(dtype, &[count], pack::pack(&codes, bits)))
    }

    /// Changes the product; says what became of it.
    fn fuse(&self, model: &mut Model, fusion: Fusion) -> Change {
        let Fusion { bias, scales } = fusion;
        let names: Vec<String> = self.nodes.iter().map(|&(n, _)| model.node(n).op_type().to_owned()).collect();
        let codes = model.node(self.dequantize).input(0);
        let weight = codes.map_or_else(String::new, |codes| model.value(codes).name().to_owned());
        let ops = names.join(" and ");
        let change = match &scales {
            None => Change::BiasFused { ops },
            &Some(Scales { factors: (least, most), .. }) => Change::ScalesFused { ops, least, most },
        };
        if let Some(Scales { scale, spread, .. }) = scales {
            let dequantize = self.own_dequantizer(model);
            store(model, dequantize, 1, &format!("{weight}_scale_fused"), scale);
            if let Some(Spread { axis, zero }) = spread {
                model.set_attr(dequantize, Attr::int("axis", axis as i64));
                if let Some(zero) = zero {
                    store(model, dequantize, 2, &format!("{weight}_zero_point_fused"), zero);
                }
            }
        }
        if let Some(bias) = bias {
            self.product.set_bias(model, bias, &weight);
        }
        absorb(model, &self.nodes);
        change
    }

    /// The node that dequantizes the weight for this product alone.
    fn own_dequantizer(&self, model: &mut Model) -> NodeId {
        let at = model.node(self.dequantize);
        let output = at.output(0).map(|v| (v, model.value(v).users().len()));
        let Some((output, 2..)) = output else { return self.dequantize };
        let inputs: Vec<_> = at.inputs().iter().flatten().copied().collect();
        let result = model.value(output).name().to_owned();
        let mut copy = NewNode::new("DequantizeLinear", format!("{result}_DequantizeLinear"), &inputs, &[&result]);
        copy.attrs = at.attrs().iter().map(|a| a.proto().clone()).collect();
        let ty = model.value(output).ty().cloned();
        let copy = model.insert(Place::Before(self.product.node), copy);
        let own = model.node(copy).output(0);
        if let (Some(own), Some(ty)) = (own, ty) {
            model.set_type(own, ty);
        }
        model.set_input(self.product.node, 1, own);
        copy
    }
}
