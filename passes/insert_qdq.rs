//! Puts Quantize/Dequantize pairs where the plan says, with the scales that were solved.
//!
//! Weights get a pair too, still float in front: [`fold_weights`](super::fold_weights) makes them integers. Scale and
//! zero point initializers are shared by tensors that share a scale. Each consumer of a weight has a DequantizeLinear of
//! its own, which is what runtimes fuse. Zero points are always written out.

use std::collections::BTreeMap;

use super::{Context, Outcome, Pass};
use crate::error::{Error, Kind, Result};
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, User, ValueId, tensor_type};
use crate::numerics::{Format, Granularity, QParams, pack};
use crate::onnx::DataType;
use crate::plan::{Activation, Mode, Plan, Readers, Slot};
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
        let mut insert =
            Insert { plan, solution, names: Names::new(model), scales: BTreeMap::new(), outcome: Outcome::default() };
        for (name, activation) in &plan.activations {
            match activation.mode {
                Mode::Static => insert.pair(model, name, activation)?,
                Mode::Dynamic => insert.dynamic(model, name, activation)?,
            }
        }
        insert.weights(model)?;
        insert.biases(model)?;
        insert.sums(model)?;
        Ok(insert.outcome)
    }
}

/// Tensors by the name they had when the pass began.
struct Names(BTreeMap<String, ValueId>);

impl Names {
    fn new(model: &Model) -> Self {
        let graph = model.graph(model.main());
        let outputs = graph.nodes().iter().flat_map(|&n| model.node(n).outputs().iter().flatten().copied());
        let all = graph.inputs().chain(graph.initializers().iter().copied()).chain(outputs);
        Self(all.map(|v| (model.value(v).name().to_owned(), v)).collect())
    }

    fn value(&self, name: &str) -> Result<ValueId> {
        self.0.get(name).copied().ok_or_else(|| {
            Error::new(Kind::Config, "the plan names a tensor that the model does not have")
                .at_value(name)
                .with_hint("the plan was made for another model; make it again")
        })
    }

    fn node(&self, model: &Model, slot: &Slot) -> Result<NodeId> {
        model.producer(self.value(&slot.node)?).ok_or_else(|| {
            Error::new(Kind::Config, "the plan names a node that the model does not have").at_value(&slot.node)
        })
    }
}

struct Insert<'a> {
    plan: &'a Plan,
    solution: &'a Solution,
    names: Names,
    /// Scale and zero point initializers, by the tensor they belong to.
    scales: BTreeMap<String, (ValueId, ValueId)>,
    outcome: Outcome,
}

impl Insert<'_> {
    fn qparams(
        &mut self,
        model: &mut Model,
        owner: &str,
        dtype: Format,
        scale: f32,
        zero_point: i32,
    ) -> (ValueId, ValueId) {
        if let Some(&found) = self.scales.get(owner) {
            return found;
        }
        let graph = model.main();
        let scale = model.add_initializer(graph, &format!("{owner}_scale"), Tensor::from_f32(&[], &[scale]));
        let zero = zero_points(dtype, &[], &[zero_point]);
        let zero = model.add_initializer(graph, &format!("{owner}_zero_point"), zero);
        self.scales.insert(owner.to_owned(), (scale, zero));
        (scale, zero)
    }

    fn place(model: &Model, value: ValueId) -> Place {
        model.producer(value).map_or(Place::First(model.main()), Place::After)
    }

    fn pair(&mut self, model: &mut Model, name: &str, activation: &Activation) -> Result<()> {
        let value = self.names.value(name)?;
        let &(scale, zero_point) = self
            .solution
            .activations
            .get(name)
            .ok_or_else(|| Error::new(Kind::Internal, "a planned activation was not solved").at_value(name))?;
        let (scale, zero) = self.qparams(model, &activation.scale_of, activation.quantizer.dtype, scale, zero_point);
        let (source, place) = if activation.fence {
            let fence = NewNode::new("Sum", format!("{name}_Sum"), &[value], &[&format!("{name}_fenced")]);
            let fence = model.insert(Self::place(model, value), fence);
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
        let codes = model.node(q).output(0).expect("just made");
        let back = Self::dequantize(model, Place::After(q), name, codes, scale, zero, None);
        self.readers(model, value, back, q, &activation.readers)?;
        self.outcome.changed(name, format!("{} pair", activation.quantizer.dtype.name()));
        Ok(())
    }

    fn dequantize(
        model: &mut Model,
        place: Place,
        name: &str,
        codes: ValueId,
        scale: ValueId,
        zero: ValueId,
        axis: Option<usize>,
    ) -> ValueId {
        let mut node = NewNode::new(
            "DequantizeLinear",
            format!("{name}_DequantizeLinear"),
            &[codes, scale, zero],
            &[&format!("{name}_dequantized")],
        );
        if let Some(axis) = axis {
            node = node.with(Attr::int("axis", axis as i64));
        }
        let id = model.insert(place, node);
        model.node(id).output(0).expect("just made")
    }

    fn readers(
        &mut self,
        model: &mut Model,
        from: ValueId,
        to: ValueId,
        quantizer: NodeId,
        readers: &Readers,
    ) -> Result<()> {
        if let Some(ty) = model.value(from).ty().cloned() {
            model.set_type(to, ty);
        }
        match readers {
            Readers::All => {
                let outputs = model.value(from).users().iter().any(|u| matches!(u, User::Output { .. }));
                model.replace_uses(from, to, |u| !matches!(u, User::Node { node, .. } if node == quantizer));
                if outputs {
                    let fresh = format!("{}_float", model.value(from).name());
                    model.take_name(from, to, &fresh);
                }
            }
            Readers::Listed(slots) => {
                for slot in slots {
                    let node = self.names.node(model, slot)?;
                    if model.node(node).input(slot.input) != Some(from) {
                        return Err(Error::new(
                            Kind::Config,
                            format!("input {} of the node is not this tensor", slot.input),
                        )
                        .at_node(model.node_name(node), model.node(node).op_type())
                        .at_value(model.value(from).name())
                        .with_hint("the plan was made for another model; make it again"));
                    }
                    model.set_input(node, slot.input, Some(to));
                }
            }
        }
        Ok(())
    }

    fn dynamic(&mut self, model: &mut Model, name: &str, activation: &Activation) -> Result<()> {
        let value = self.names.value(name)?;
        let outputs = [format!("{name}_quantized"), format!("{name}_scale"), format!("{name}_zero_point")];
        let quantize = NewNode::new(
            "DynamicQuantizeLinear",
            format!("{name}_DynamicQuantizeLinear"),
            &[value],
            &outputs.each_ref().map(String::as_str),
        );
        let q = model.insert(Self::place(model, value), quantize);
        let [codes, scale, zero] = [0, 1, 2].map(|i| model.node(q).output(i).expect("just made"));
        let back = Self::dequantize(model, Place::After(q), name, codes, scale, zero, None);
        self.readers(model, value, back, q, &activation.readers)?;
        self.outcome.changed(name, "quantized at run time");
        Ok(())
    }

    fn weights(&mut self, model: &mut Model) -> Result<()> {
        // Consumers of one tensor that agree on its format share the codes.
        let mut made: Vec<(usize, [ValueId; 3])> = Vec::new();
        for (index, (weight, solved)) in self.plan.weights.iter().zip(&self.solution.weights).enumerate() {
            let value = self.names.value(&weight.tensor)?;
            let node = self.names.node(model, &weight.at)?;
            let alike = made.iter().find(|(other, _)| {
                let (a, b) = (&self.plan.weights[*other], weight);
                let same = a.tensor == b.tensor && a.quantizer == b.quantizer;
                same && self.solution.weights[*other].qparams == solved.qparams
                    && self.solution.weights[*other].changed == solved.changed
            });
            let [codes, scale, zero] = if let Some((_, found)) = alike {
                *found
            } else {
                let found = self.quantized_weight(model, value, index)?;
                made.push((index, found));
                found
            };
            let axis = axis(&weight.quantizer.granularity);
            let back = Self::dequantize(model, Place::Before(node), &weight.tensor, codes, scale, zero, axis);
            model.set_type(back, tensor_type(DataType::Float, model.shape(value).as_deref()));
            model.set_input(node, weight.at.input, Some(back));
            self.outcome.changed(&weight.site, format!("{} weight", weight.quantizer.dtype.name()));
        }
        Ok(())
    }

    /// Codes, scale and zero point of a weight; the codes are still a QuantizeLinear of a float constant.
    fn quantized_weight(&mut self, model: &mut Model, value: ValueId, index: usize) -> Result<[ValueId; 3]> {
        let weight = &self.plan.weights[index];
        let solved = &self.solution.weights[index];
        let graph = model.main();
        let name = &weight.tensor;
        let source = match &solved.changed {
            Some(tensor) => model.add_initializer(graph, &format!("{name}_rounded"), tensor.clone()),
            None => value,
        };
        let dims = model.constant(value).map(Tensor::dims).unwrap_or_default();
        let dims = weight.quantizer.granularity.scale_dims(&dims);
        let QParams { scales, zero_points: zeros } = &solved.qparams;
        let scale = model.add_initializer(graph, &format!("{name}_scale"), Tensor::from_f32(&dims, scales));
        let zero = zero_points(weight.quantizer.dtype, &dims, zeros);
        let zero = model.add_initializer(graph, &format!("{name}_zero_point"), zero);
        let mut node = NewNode::new(
            "QuantizeLinear",
            format!("{name}_QuantizeLinear"),
            &[source, scale, zero],
            &[&format!("{name}_quantized")],
        );
        if let Some(axis) = axis(&weight.quantizer.granularity) {
            node = node.with(Attr::int("axis", axis as i64));
        }
        let reader = self.names.node(model, &weight.at)?;
        let q = model.insert(Place::Before(reader), node);
        Ok([model.node(q).output(0).expect("just made"), scale, zero])
    }

    fn sums(&mut self, model: &mut Model) -> Result<()> {
        for name in &self.plan.sums {
            let slot = Slot { node: name.clone(), input: 0 };
            let node = self.names.node(model, &slot)?;
            model.set_op(node, "", "Sum");
            self.outcome.changed(name, "Add written as a Sum of two");
        }
        Ok(())
    }

    fn biases(&mut self, model: &mut Model) -> Result<()> {
        for (bias, solved) in self.plan.biases.iter().zip(&self.solution.biases) {
            let node = self.names.node(model, &bias.at)?;
            let graph = model.main();
            let name = &bias.tensor;
            let dims: &[usize] = if solved.scales.len() == 1 { &[] } else { &[solved.scales.len()] };
            let codes = Tensor::from_i32(&[solved.codes.len()], &solved.codes);
            let codes = model.add_initializer(graph, &format!("{name}_quantized"), codes);
            let scale = model.add_initializer(graph, &format!("{name}_scale"), Tensor::from_f32(dims, &solved.scales));
            let mut dequantize = NewNode::new(
                "DequantizeLinear",
                format!("{name}_DequantizeLinear"),
                &[codes, scale],
                &[&format!("{name}_dequantized")],
            );
            if !dims.is_empty() {
                dequantize = dequantize.with(Attr::int("axis", 0));
            }
            let id = model.insert(Place::Before(node), dequantize);
            let back = model.node(id).output(0);
            model.set_input(node, bias.at.input, back);
            self.outcome.changed(&bias.site, "int32 bias");
        }
        Ok(())
    }
}

fn axis(granularity: &Granularity) -> Option<usize> {
    match *granularity {
        Granularity::PerTensor => None,
        Granularity::PerChannel { axis } | Granularity::PerGroup { axis, .. } => Some(axis),
    }
}

/// A zero point tensor.
fn zero_points(format: Format, dims: &[usize], values: &[i32]) -> Tensor {
    let dtype = DataType::from(format);
    if format.is_integer() {
        Tensor::new(dtype, dims, pack::pack(values, format.bits()))
    } else {
        let count: usize = dims.iter().product();
        Tensor::new(dtype, dims, vec![0u8; (count * format.bits()).div_ceil(8)])
    }
}
