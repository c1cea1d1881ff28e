//! Plans as files: read, written, and checked against the model that they are for.

use std::path::Path;

use super::{Activation, Bias, Mode, Plan, Readers, SCHEMA, Scheme, Slot, Token, Weight, tensor_names};
use crate::document;
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NodeId, ValueId};
use crate::nearest::nearest;
use crate::numerics::Granularity;
use crate::onnx::DataType;
use crate::targets::Target;

impl Plan {
    /// Reads a plan in JSON.
    ///
    /// # Errors
    /// A file that cannot be read, unknown keys and words, another version of the document.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = document::read(path, "plan")?;
        Self::parse(&text).map_err(|e| e.in_file(path))
    }

    /// Parses a plan in JSON.
    ///
    /// # Errors
    /// As [`Plan::load`].
    pub fn parse(text: &str) -> Result<Self> {
        let version = serde_json::from_str::<serde_json::Value>(text).ok();
        if let Some(other) = version.as_ref().and_then(|v| v.get("schema")).filter(|&v| *v != SCHEMA) {
            return Err(Error::new(
                Kind::Config,
                format!("this plan is of version {other}, amax reads version {SCHEMA}"),
            )
            .with_hint("make it again with `amax plan`"));
        }
        Ok(document::parse(text)?.0)
    }

    /// The plan in JSON, with a newline at its end.
    ///
    /// # Errors
    /// Numbers that JSON does not have.
    pub fn to_json(&self) -> Result<String> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|e| Error::new(Kind::Internal, format!("cannot print the plan: {e}")))?;
        Ok(json + "\n")
    }

    /// Checks that a plan, perhaps edited, is one for this model and target.
    ///
    /// # Errors
    /// The first name, shape, format or number that does not fit.
    pub fn check(&self, model: &Model, target: &Target) -> Result<()> {
        let Self {
            schema: _,
            float32: _,
            target: name,
            opset,
            // `smooth` refuses what is not there, before the other names mean anything.
            smoothing: _,
            activations,
            weights,
            biases,
            corrections,
            sums,
            barriers,
            tokens,
            splits: _,
            skipped: _,
            simulate,
        } = self;
        if *name != target.name {
            return Err(wrong(format!("the plan was made for target {name}, not for {}", target.name))
                .with_hint(format!("give --target {name}, or make the plan again")));
        }
        if *simulate != target.simulate {
            let with = |on: bool| if on { "with" } else { "without" };
            return Err(wrong(format!(
                "the plan was made {} --simulate, this run is {} it",
                with(*simulate),
                with(!simulate)
            ))
            .with_hint("use --simulate for both or neither"));
        }
        if *opset < model.opset().unwrap_or(0) || *opset > target.opset_max {
            return Err(wrong(format!(
                "opset {opset} is not between the model's {} and the {} that {name} loads",
                model.opset().unwrap_or(0),
                target.opset_max
            )));
        }
        let check = Check { model, target, plan: self };
        for (name, activation) in activations {
            check.activation(name, activation).map_err(|e| e.at_value(name))?;
        }
        for weight in weights {
            check.weight(weight).map_err(|e| e.at_value(&weight.tensor))?;
        }
        for bias in biases {
            check.bias(bias).map_err(|e| e.at_value(&bias.tensor))?;
        }
        for super::Correction { product, at, tensor, .. } in corrections {
            let (node, _) = (check.node(&at.node)?, check.node(product)?);
            if model.node(node).input(at.input) != Some(check.value(tensor)?) {
                let message = format!("input {} of \"{}\" is not this tensor", at.input, at.node);
                return Err(wrong(message).at_value(tensor));
            }
        }
        for token in tokens {
            check.token(token)?;
        }
        for barrier in barriers {
            let node = check.node(&barrier.at.node)?;
            if model.node(node).input(barrier.at.input).is_none() || *opset < barrier.stop.opset() {
                let message = format!("no barrier can be at input {} at opset {opset}", barrier.at.input);
                return Err(wrong(message).at_value(&barrier.at.node));
            }
        }
        for sum in sums {
            let node = check.node(sum)?;
            if !model.node(node).is("Add") {
                return Err(wrong("only an Add becomes a Sum").at_value(sum));
            }
        }
        Ok(())
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(Kind::Config, message)
}

struct Check<'a> {
    model: &'a Model,
    target: &'a Target,
    plan: &'a Plan,
}

impl Check<'_> {
    fn value(&self, name: &str) -> Result<ValueId> {
        self.model.value_named(name).ok_or_else(|| {
            let error = wrong("the plan names a tensor that the model does not have").at_value(name);
            match nearest(name, tensor_names(self.model)) {
                Some(near) => {
                    error.with_hint(format!("did you mean \"{near}\"? or was the plan made for another model?"))
                }
                None => error.with_hint("the plan was made for another model; make it again"),
            }
        })
    }

    fn node(&self, output: &str) -> Result<NodeId> {
        self.model.producer(self.value(output)?).ok_or_else(|| {
            wrong("no node makes this tensor; a plan names nodes by their first output").at_value(output)
        })
    }

    fn reads(&self, slot: &Slot, tensor: &str) -> Result<()> {
        let node = self.node(&slot.node)?;
        let at = |e: Error| e.at_node(self.model.node_name(node), self.model.node(node).op_type());
        let found = self.model.node(node).input(slot.input);
        match found {
            Some(value) if self.model.value(value).name() == tensor => Ok(()),
            Some(value) => Err(at(wrong(format!(
                "input {} of the node is \"{}\", not \"{tensor}\"",
                slot.input,
                self.model.value(value).name()
            )))),
            None => Err(at(wrong(format!("the node has no input {}", slot.input)))),
        }
    }

    fn quantizer(&self, quantizer: &Scheme, dims: Option<&[usize]>) -> Result<()> {
        let dtype = quantizer.dtype;
        let formats = if dims.is_some() { &self.target.formats } else { &self.target.activation_formats };
        if !formats.contains(&dtype) {
            let what = if dims.is_some() { "constants" } else { "activations" };
            return Err(wrong(format!("{} does not run {dtype} {what}", self.target.name)));
        }
        if let Some(dims) = dims {
            quantizer.granularity.check(dims).map_err(|e| wrong(e.message().to_owned()))?;
        } else if quantizer.granularity != Granularity::PerTensor && !quantizer.scale_dtype.is_block() {
            return Err(wrong("activations have one scale per tensor"));
        }
        let scales = quantizer.scale_dtype;
        if scales.is_block() && !self.target.block_scales.contains(&scales) {
            return Err(wrong(format!("{} has no quantizer with {} scales", self.target.name, scales.name())));
        }
        quantizer.check()
    }

    fn activation(&self, name: &str, activation: &Activation) -> Result<()> {
        let tensor = activation.tensor.as_deref().unwrap_or(name);
        let value = self.value(tensor)?;
        if self.model.constant(value).is_some() {
            return Err(wrong("the tensor is constant; constants are planned under weights"));
        }
        if self.model.dtype(value).is_some_and(|d| d != DataType::Float && !(self.plan.float32 && d.is_half())) {
            return Err(wrong("only float tensors are quantized"));
        }
        self.quantizer(&activation.quantizer, None)?;
        let blocks = activation.quantizer.scale_dtype.is_block();
        if blocks
            && (activation.mode != Mode::Dynamic
                || !matches!(activation.quantizer.granularity, Granularity::PerGroup { axis: 1, .. }))
        {
            return Err(wrong("8-bit scales of activations require a dynamic range and groups along axis 1"));
        }
        if let Readers::Listed(slots) = &activation.readers {
            slots.iter().try_for_each(|slot| self.reads(slot, tensor))?;
        }
        let other = |what: &str, name: &str| {
            self.plan
                .activations
                .get(name)
                .ok_or_else(|| wrong(format!("{what} names no activation of the plan: \"{name}\"")))
        };
        let owner = other("scale_of", &activation.scale_of)?;
        let same = owner.scale_of == activation.scale_of
            && owner.mode == activation.mode
            && owner.quantizer.dtype == activation.quantizer.dtype
            && owner.quantizer.symmetric == activation.quantizer.symmetric;
        if !same {
            return Err(wrong(format!(
                "it cannot have the scale of \"{}\", which differs in format or has another one's scale itself",
                activation.scale_of
            )));
        }
        if let Some(first) = &activation.converts {
            let first_pair = other("converts", first)?;
            if first_pair.tensor.as_deref().unwrap_or(first) != tensor || first_pair.converts.is_some() {
                return Err(wrong(format!(
                    "it cannot convert \"{first}\", which is not a first pair of the same tensor"
                )));
            }
        }
        Ok(())
    }

    fn weight(&self, weight: &Weight) -> Result<()> {
        let value = self.value(&weight.tensor)?;
        let Some(tensor) = self.model.constant(value) else {
            return Err(wrong("the tensor is not constant"));
        };
        self.reads(&weight.at, &weight.tensor)?;
        let mut dims = tensor.dims();
        if weight.transpose {
            if dims.len() != 2 {
                return Err(wrong("only matrices are stored transposed"));
            }
            dims.reverse();
        }
        self.quantizer(&weight.quantizer, Some(&dims))
    }

    fn token(&self, token: &Token) -> Result<()> {
        let node = self.node(&token.at.node)?;
        if self.model.node(node).input(token.at.input).is_none() {
            return Err(wrong("the node has no such input").at_value(&token.at.node));
        }
        if !(token.eps.is_normal() && token.eps > 0.0) {
            let message = format!("the least scale is {}, which is not a positive number", token.eps);
            return Err(wrong(message).at_value(&token.at.node));
        }
        Ok(())
    }

    fn bias(&self, bias: &Bias) -> Result<()> {
        self.reads(&bias.at, &bias.tensor)?;
        let weights = self.plan.weights.len();
        if bias.weight >= weights {
            return Err(wrong(format!("the plan has no weight {}; it has {weights}", bias.weight)));
        }
        match self.plan.activations.get(&bias.activation) {
            Some(activation) if activation.mode == Mode::Static => Ok(()),
            _ => Err(wrong(format!("\"{}\" has no fixed scale for the bias", bias.activation))),
        }
    }
}
