//! Puts Quantize/Dequantize pairs where the plan says, with the scales that were solved.
//!
//! Weights become the codes that were solved, behind a DequantizeLinear; the float tensor stays until nobody uses it
//! ([`drop_dead`](super::drop_dead) removes it then). Scale and zero point initializers are shared by tensors that share a
//! scale. Each consumer of a weight has a DequantizeLinear of
//! its own, which is what runtimes fuse. Zero points are always written out.
//!
//! Every pair is made before any reader is moved, and readers that are listed are moved before those that are not, so that
//! several pairs on one tensor give the same graph in whichever order they come.
//!
//! Where formats are used that the model's IR version does not have, it is raised to the one that has them; the operator
//! set must be new enough already ([`raise_opset`](super::raise_opset)).

use std::collections::{BTreeMap, BTreeSet};

use super::forms::Pair;
use super::support::granularity::along;
use super::support::insert_blocks;
use super::support::nodes::{named, planned};
use super::{Change, Context, Outcome, Pass};
use crate::config::spec::Form;
use crate::error::{Error, Kind, Result};
use crate::ir::view::Gemm;
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, User, ValueId, tensor_type};
use crate::numerics::pack;
use crate::plan::form::is_bytes;
use crate::plan::{Activation, Barrier, Mode, Plan, Readers, Slot, Stop, Weight};
use crate::quant::{Format, Granularity, QParam};
use crate::solve::Solution;

/// See the module.
#[derive(Debug)]
pub struct InsertQdq;

impl Pass for InsertQdq {
    fn name(&self) -> &'static str {
        "insert-qdq"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let Some((plan, solution)) = context.quantization else {
            return Err(Error::new(Kind::Usage, "insert-qdq needs a plan").with_hint("run it through `amax rewrite`"));
        };
        let mut insert = Insert {
            plan,
            solution,
            scales: BTreeMap::new(),
            made: BTreeMap::new(),
            quantizers: BTreeSet::new(),
            coded: Vec::new(),
            outcome: Outcome::default(),
        };
        if !plan.simulate {
            insert.versions(model)?;
        }
        let barriers = insert.barriers(model)?;
        insert.pairs(model)?;
        insert.readers(model)?;
        insert.weights(model)?;
        insert.biases(model)?;
        insert.sums(model)?;
        insert.stop(model, &barriers);
        insert.codes(model);
        Ok(insert.outcome)
    }
}

pub(super) struct Insert<'a> {
    plan: &'a Plan,
    solution: &'a Solution,
    /// Scale and zero point initializers, by the pair they belong to.
    scales: BTreeMap<String, [ValueId; 2]>,
    /// The dequantized result of each pair.
    made: BTreeMap<String, ValueId>,
    /// Nodes that read a float tensor in order to quantize it.
    quantizers: BTreeSet<NodeId>,
    /// Nodes that dequantize a weight, with the weight whose codes they read.
    coded: Vec<(NodeId, usize)>,
    outcome: Outcome,
}

impl<'a> Insert<'a> {
    /// Checks that the opset has every format, and raises the IR version to one that does.
    fn versions(&mut self, model: &mut Model) -> Result<()> {
        let activations = self.plan.activations.iter().map(|(name, a)| (name, a.quantizer.since()));
        let typed: Vec<&Weight> = self.plan.weights.iter().filter(|w| !is_bytes(model, w)).collect();
        let weights = typed.into_iter().map(|w| (&w.tensor, w.since()));
        let mut ir = model.ir_version();
        for (name, (need_opset, need_ir, what)) in activations.chain(weights) {
            let opset = model.opset().unwrap_or(0);
            if opset < need_opset {
                return Err(Error::new(
                    Kind::Config,
                    format!("the plan asks for {what}, which needs opset {need_opset}; it says {opset}"),
                )
                .at_value(name)
                .with_hint("raise \"opset\" in the plan"));
            }
            ir = ir.max(need_ir);
        }
        if ir > model.ir_version() {
            self.outcome.changed("model", Change::IrVersion { from: model.ir_version(), to: ir });
            model.set_ir_version(ir);
        }
        Ok(())
    }

    /// Makes every pair, each after the one it converts.
    fn pairs(&mut self, model: &mut Model) -> Result<()> {
        let mut waiting: Vec<(&'a String, &'a Activation)> = self.plan.activations.iter().collect();
        while !waiting.is_empty() {
            let before = waiting.len();
            let mut later = Vec::new();
            for (name, activation) in waiting {
                let source = match &activation.converts {
                    None => Some(named(model, activation.tensor.as_ref().unwrap_or(name))?),
                    Some(first) => self.made.get(first).copied(),
                };
                let Some(source) = source else {
                    later.push((name, activation));
                    continue;
                };
                let back = match activation.mode {
                    Mode::Static => self.pair(model, name, activation, source)?,
                    Mode::Dynamic if activation.quantizer.scale_dtype.is_block() => {
                        let made = insert_blocks::activation(model, name, &activation.quantizer, source)?;
                        self.quantizers.extend(made.readers);
                        self.outcome.changed(name, Change::AtRunTime);
                        made.back
                    }
                    Mode::Dynamic => self.dynamic(model, name, source),
                };
                self.made.insert(name.clone(), back);
            }
            waiting = later;
            if let Some((name, activation)) = waiting.first().filter(|_| waiting.len() == before) {
                let first = activation.converts.as_deref().unwrap_or_default();
                return Err(Error::new(
                    Kind::Config,
                    format!("the plan converts the pair \"{first}\", which it does not have or converts in a circle"),
                )
                .at_value(name.as_str()));
            }
        }
        Ok(())
    }

    /// Moves the readers of float tensors to the pairs that they are to read.
    fn readers(&mut self, model: &mut Model) -> Result<()> {
        let mut all: BTreeMap<ValueId, &String> = BTreeMap::new();
        for (name, activation) in &self.plan.activations {
            let from = named(model, activation.tensor.as_ref().unwrap_or(name))?;
            let to = self.made[name];
            if let Some(ty) = model.value(from).ty().cloned() {
                model.set_type(to, ty);
            }
            match &activation.readers {
                Readers::Listed(slots) => Self::listed(model, from, to, slots)?,
                Readers::All => {
                    if let Some(other) = all.insert(from, name) {
                        return Err(Error::new(
                            Kind::Config,
                            format!("the plan lets every reader have the pair \"{other}\" and this one"),
                        )
                        .at_value(name));
                    }
                }
            }
        }
        for (from, name) in all {
            let to = self.made[name];
            let outputs = model.value(from).users().iter().any(|u| matches!(u, User::Output { .. }));
            let quantizers = &self.quantizers;
            model.replace_uses(from, to, |u| !matches!(u, User::Node { node, .. } if quantizers.contains(&node)));
            if outputs {
                let fresh = format!("{}_float", model.value(from).name());
                model.take_name(from, to, &fresh);
            }
        }
        Ok(())
    }

    fn listed(model: &mut Model, from: ValueId, to: ValueId, slots: &[Slot]) -> Result<()> {
        for slot in slots {
            let node = planned(model, &slot.node)?;
            if model.node(node).input(slot.input) != Some(from) {
                return Err(Error::new(Kind::Config, format!("input {} of the node is not this tensor", slot.input))
                    .at_node(model.node_name(node), model.node(node).op_type())
                    .at_value(model.value(from).name())
                    .with_hint("the plan was made for another model; make it again"));
            }
            model.set_input(node, slot.input, Some(to));
        }
        Ok(())
    }

    /// The scale and zero point initializers of all pairs with the scale of `owner`.
    fn qparams(&mut self, model: &mut Model, owner: &str, dtype: Format, solved: QParam) -> [ValueId; 2] {
        if let Some(&found) = self.scales.get(owner) {
            return found;
        }
        let zero = pack::pack(&[solved.zero_point], dtype.bits());
        let tensors = [Tensor::from_f32(&[], &[solved.scale]), Tensor::new(dtype.into(), &[], zero)];
        let made = initializers(model, owner, ["scale", "zero_point"], tensors);
        self.scales.insert(owner.to_owned(), made);
        made
    }

    pub(super) fn place(model: &Model, value: ValueId) -> Place {
        model.producer(value).map_or(Place::First(model.main()), Place::After)
    }

    /// A Quantize/Dequantize pair that reads `value`; its result.
    fn pair(&mut self, model: &mut Model, name: &str, activation: &Activation, value: ValueId) -> Result<ValueId> {
        let &solved = self
            .solution
            .activations
            .get(name)
            .ok_or_else(|| Error::new(Kind::Internal, "a planned activation was not solved").at_value(name))?;
        let format = activation.quantizer.dtype;
        let codes = dequantized_from(model, value, format, solved);
        let [scale, zero] = self.qparams(model, &activation.scale_of, format, solved);
        if let Some((codes, dequantize)) = codes {
            let place = Place::After(dequantize);
            return Ok(Self::dequantize(model, place, name, &[codes, scale, zero], &Granularity::PerTensor));
        }
        let (source, place) = if activation.fence {
            let fence = NewNode::new("Sum", format!("{name}_Sum"), &[value], &[&format!("{name}_fenced")]);
            let fence = model.insert(Self::place(model, value), fence);
            self.quantizers.insert(fence);
            let source = model.node(fence).output(0).expect("just made");
            if let Some(ty) = model.value(value).ty().cloned() {
                model.set_type(source, ty);
            }
            (source, Place::After(fence))
        } else {
            (value, Self::place(model, value))
        };
        let quantize = NewNode::new(
            "QuantizeLinear",
            format!("{name}_QuantizeLinear"),
            &[source, scale, zero],
            &[&format!("{name}_quantized")],
        );
        let q = model.insert(place, quantize);
        self.quantizers.insert(q);
        let codes = model.node(q).output(0).expect("just made");
        self.outcome.changed(name, Change::Pair { format });
        Ok(Self::dequantize(model, Place::After(q), name, &[codes, scale, zero], &Granularity::PerTensor))
    }

    fn dequantize(
        model: &mut Model,
        place: Place,
        name: &str,
        inputs: &[ValueId],
        granularity: &Granularity,
    ) -> ValueId {
        let output = format!("{name}_dequantized");
        let node = NewNode::new("DequantizeLinear", format!("{name}_DequantizeLinear"), inputs, &[&output]);
        let id = model.insert(place, along(node, granularity));
        model.node(id).output(0).expect("just made")
    }

    fn dynamic(&mut self, model: &mut Model, name: &str, value: ValueId) -> ValueId {
        let outputs = [format!("{name}_quantized"), format!("{name}_scale"), format!("{name}_zero_point")];
        let quantize = NewNode::new(
            "DynamicQuantizeLinear",
            format!("{name}_DynamicQuantizeLinear"),
            &[value],
            &outputs.each_ref().map(String::as_str),
        );
        let q = model.insert(Self::place(model, value), quantize);
        self.quantizers.insert(q);
        let [codes, scale, zero] = [0, 1, 2].map(|i| model.node(q).output(i).expect("just made"));
        self.outcome.changed(name, Change::AtRunTime);
        Self::dequantize(model, Place::After(q), name, &[codes, scale, zero], &Granularity::PerTensor)
    }

    fn weights(&mut self, model: &mut Model) -> Result<()> {
        // Consumers of one tensor that agree on its format share the codes.
        let mut made: BTreeMap<&str, Vec<(usize, [ValueId; 2])>> = BTreeMap::new();
        for (index, (weight, solved)) in self.plan.weights.iter().zip(&self.solution.weights).enumerate() {
            if weight.quantizer.float_zero_point && weight.form != Form::Matmulnbits {
                let message =
                    format!("its zero points lie between codes, which the form {} does not have", weight.form);
                return Err(Error::new(Kind::Config, message).at_value(&weight.tensor));
            }
            let value = named(model, &weight.tensor)?;
            let node = planned(model, &weight.at.node)?;
            let made = made.entry(&weight.tensor).or_default();
            let alike = made.iter().find(|(other, _)| {
                let (a, b) = (&self.plan.weights[*other], weight);
                let same = a.quantizer == b.quantizer && a.transpose == b.transpose;
                same && self.solution.weights[*other] == *solved
            });
            let (first, [scale, zero]) = if let Some(&(other, found)) = alike {
                (other, found)
            } else {
                let found = if weight.quantizer.scale_dtype.is_block() {
                    insert_blocks::scales(model, weight, solved)?
                } else {
                    let Pair { scale, zero_point, .. } = Pair::from(&*solved.tensor());
                    initializers(model, &weight.tensor, ["scale", "zero_point"], [scale, zero_point])
                };
                made.push((index, found));
                (index, found)
            };
            // The codes are not there yet: the float tensor stands for them.
            let back = if weight.quantizer.scale_dtype.is_block() {
                insert_blocks::dequantize(model, node, weight, [value, scale, zero])
            } else {
                let granularity = &weight.quantizer.granularity;
                Self::dequantize(model, Place::Before(node), &weight.tensor, &[value, scale, zero], granularity)
            };
            self.coded.extend(model.producer(back).map(|node| (node, first)));
            if let Some(node) = model.producer(back).filter(|_| weight.has_float_scales()) {
                model.set_attr(node, Attr::int("output_dtype", weight.float.code().into()));
            }
            let shape: Vec<Option<usize>> = solved.dims().iter().copied().map(Some).collect();
            model.set_type(back, tensor_type(weight.float, Some(&shape)));
            model.set_input(node, weight.at.input, Some(back));
            if weight.transpose {
                Self::untranspose(model, node, weight)?;
            }
            self.outcome.changed(&weight.site, Change::Weight { format: weight.quantizer.dtype });
        }
        Ok(())
    }

    /// Stores the codes of weights, behind all that is small.
    fn codes(&mut self, model: &mut Model) {
        let mut stored: BTreeMap<usize, ValueId> = BTreeMap::new();
        let graph = model.main();
        for &(node, index) in &self.coded {
            let codes = *stored.entry(index).or_insert_with(|| {
                let name = format!("{}_quantized", self.plan.weights[index].tensor);
                model.add_initializer(graph, &name, self.solution.weights[index].codes())
            });
            model.set_input(node, 0, Some(codes));
        }
    }

    /// Makes a Gemm read its right operand as it is stored now.
    fn untranspose(model: &mut Model, node: NodeId, weight: &Weight) -> Result<()> {
        if weight.at.input == 1 && Gemm::of(model.node(node)).is_some_and(|gemm| gemm.trans_b) {
            model.remove_attr(node, "transB");
            return Ok(());
        }
        Err(Error::new(
            Kind::Config,
            "the plan transposes a weight that is not the right operand of a Gemm with transB",
        )
        .at_node(model.node_name(node), model.node(node).op_type())
        .at_value(&weight.tensor))
    }

    fn sums(&mut self, model: &mut Model) -> Result<()> {
        for name in &self.plan.sums {
            let node = planned(model, name)?;
            model.set_op(node, "", "Sum");
            self.outcome.changed(name, Change::WrittenAs { op: "Sum".to_owned() });
        }
        Ok(())
    }

    /// The inputs that barriers stand in front of, found while tensors have their own names.
    fn barriers(&self, model: &Model) -> Result<Vec<(NodeId, usize, Stop)>> {
        let found = |barrier: &Barrier| Ok((planned(model, &barrier.at.node)?, barrier.at.input, barrier.stop));
        self.plan.barriers.iter().map(found).collect()
    }

    /// Puts operators that change nothing in front of inputs.
    fn stop(&mut self, model: &mut Model, barriers: &[(NodeId, usize, Stop)]) {
        for &(node, input, stop) in barriers {
            let Some(value) = model.node(node).input(input) else { continue };
            let name = model.value(value).name().to_owned();
            let (op, inputs) = match stop {
                Stop::Quantizers => ("Sum", vec![value]),
                Stop::Transposes => {
                    // Far below the diagonal, nothing is left out.
                    let lowest = Tensor::from_i64(&[], &[i64::from(i32::MIN)]);
                    ("Trilu", vec![value, model.add_initializer(model.main(), &format!("{name}_lowest"), lowest)])
                }
            };
            let new = NewNode::new(op, format!("{name}_{op}"), &inputs, &[&format!("{name}_kept")]);
            let barrier = model.insert(Place::Before(node), new);
            let Some(kept) = model.node(barrier).output(0) else { continue };
            if let Some(ty) = model.value(value).ty().cloned() {
                model.set_type(kept, ty);
            }
            model.set_input(node, input, Some(kept));
            self.outcome.changed(model.node_name(node), Change::Barrier { op: op.to_owned() });
        }
    }

    fn biases(&mut self, model: &mut Model) -> Result<()> {
        for (bias, solved) in self.plan.biases.iter().zip(&self.solution.biases).filter(|(bias, _)| !bias.float) {
            let node = planned(model, &bias.at.node)?;
            let Pair { codes, scale, granularity, .. } = Pair::from(solved);
            let inputs = initializers(model, &bias.tensor, ["quantized", "scale"], [codes, scale]);
            let back = Self::dequantize(model, Place::Before(node), &bias.tensor, &inputs, &granularity);
            model.set_input(node, bias.at.input, Some(back));
            self.outcome.changed(&bias.site, Change::Bias);
        }
        Ok(())
    }
}

/// Adds constants named after the tensor that they belong to.
fn initializers(model: &mut Model, name: &str, what: [&str; 2], tensors: [Tensor; 2]) -> [ValueId; 2] {
    let graph = model.main();
    let [first, second] = tensors;
    [(what[0], first), (what[1], second)]
        .map(|(what, tensor)| model.add_initializer(graph, &format!("{name}_{what}"), tensor))
}

/// What a value is dequantized from with just these parameters, and where.
fn dequantized_from(model: &Model, value: ValueId, format: Format, solved: QParam) -> Option<(ValueId, NodeId)> {
    let node = model.producer(value).filter(|&node| model.node(node).is("DequantizeLinear"))?;
    let codes = model.node(node).input(0)?;
    let [own] = model.constant_input(node, 1)?.to_f32()?[..] else { return None };
    let zero = match model.node(node).input(2) {
        Some(_) => *model.constant_input(node, 2)?.to_i64()?.first()?,
        None => 0,
    };
    let alike = model.dtype(codes)?.format()? == format
        && own.to_bits() == solved.scale.to_bits()
        && zero == i64::from(solved.zero_point);
    alike.then_some((codes, node))
}
