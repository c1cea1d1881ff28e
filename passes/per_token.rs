//! Fake quantizes activations with a scale and a zero point for each token, in standard operators.
//!
//! As torchao's int8 dynamic activations ("8da4w"): over the last axis, asymmetric, -128 to 127. All of it is float32:
//!
//! ```text
//! low  = min(min(x), 0)          high = max(max(x), 0)
//! s    = max((high - low) / 255, eps)
//! z    = clip(-128 - round(low / s), -128, 127)
//! y    = (clip(round(x * (1 / s)) + z, -128, 127) - z) * s
//! ```
//!
//! Rounding is half to even. `DynamicQuantizeLinear` cannot say this: it has one scale for the whole tensor, and divides.

use std::collections::BTreeMap;

use super::{Change, Context, Outcome, Pass};
use crate::error::{Error, Kind, Result};
use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, ValueId};
use crate::plan::Token;

/// The opset from which the axes of `ReduceMin` and `ReduceMax` are an input.
const AXES_INPUT: i64 = 18;

/// See the module.
#[derive(Debug)]
pub struct PerToken;

impl Pass for PerToken {
    fn name(&self) -> &'static str {
        "per-token"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let Some((plan, _)) = context.quantization else {
            return Err(Error::new(Kind::Usage, "per-token needs a plan").with_hint("run it through `amax rewrite`"));
        };
        let mut made: BTreeMap<(ValueId, u32), ValueId> = BTreeMap::new();
        for Token { site, at, eps } in &plan.tokens {
            let node = super::support::nodes::planned(model, &at.node)?;
            let Some(value) = model.node(node).input(at.input) else { continue };
            let key = (value, eps.to_bits());
            let quantized = *made.entry(key).or_insert_with(|| fake_quantize(model, value, *eps));
            model.set_input(node, at.input, Some(quantized));
            outcome.changed(site, Change::PerToken);
        }
        Ok(outcome)
    }
}

/// Adds the operators behind `value`; what they give. `eps` is the least scale.
pub fn fake_quantize(model: &mut Model, value: ValueId, eps: f32) -> ValueId {
    let name = model.value(value).name().to_owned();
    let graph = model.home(value).unwrap_or(model.main());
    let mut build =
        Build { last: model.producer(value).map_or(Place::First(graph), Place::After), name: format!("{name}_token") };
    let number = |model: &mut Model, what: &str, number: f32| {
        model.add_initializer(graph, &format!("{name}_token_{what}"), Tensor::from_f32(&[], &[number]))
    };
    let zero = number(model, "zero", 0.0);
    let steps = number(model, "steps", 255.0);
    let least = number(model, "least", -128.0);
    let most = number(model, "most", 127.0);
    let eps = number(model, "eps", eps);
    let by_input = model.opset_in(graph).unwrap_or(0) >= AXES_INPUT;
    let axes =
        by_input.then(|| model.add_initializer(graph, &format!("{name}_token_axes"), Tensor::from_i64(&[1], &[-1])));
    let low = build.reduce(model, "ReduceMin", value, axes);
    let low = build.node(model, "Min", &[low, zero], "low");
    let high = build.reduce(model, "ReduceMax", value, axes);
    let high = build.node(model, "Max", &[high, zero], "high");
    let width = build.node(model, "Sub", &[high, low], "width");
    let step = build.node(model, "Div", &[width, steps], "step");
    let scale = build.node(model, "Max", &[step, eps], "scale");
    let offset = build.node(model, "Div", &[low, scale], "offset");
    let offset = build.node(model, "Round", &[offset], "offset_rounded");
    let shifted = build.node(model, "Sub", &[least, offset], "shifted");
    let zero_point = build.node(model, "Clip", &[shifted, least, most], "zero_point");
    let inverse = build.node(model, "Reciprocal", &[scale], "inverse");
    let scaled = build.node(model, "Mul", &[value, inverse], "scaled");
    let rounded = build.node(model, "Round", &[scaled], "rounded");
    let moved = build.node(model, "Add", &[rounded, zero_point], "moved");
    let codes = build.node(model, "Clip", &[moved, least, most], "codes");
    let centred = build.node(model, "Sub", &[codes, zero_point], "centred");
    let result = build.node(model, "Mul", &[centred, scale], "quantized");
    if let Some(ty) = model.value(value).ty().cloned() {
        model.set_type(result, ty);
    }
    result
}

/// Adds nodes one behind the other.
struct Build {
    last: Place,
    name: String,
}

impl Build {
    fn add(&mut self, model: &mut Model, node: NewNode) -> ValueId {
        let id: NodeId = model.insert(self.last, node);
        self.last = Place::After(id);
        model.node(id).output(0).expect("just made")
    }

    fn node(&mut self, model: &mut Model, op: &str, inputs: &[ValueId], what: &str) -> ValueId {
        let name = format!("{}_{what}", self.name);
        self.add(model, NewNode::new(op, format!("{name}_{op}"), inputs, &[&name]))
    }

    fn reduce(&mut self, model: &mut Model, op: &str, value: ValueId, axes: Option<ValueId>) -> ValueId {
        let name = format!("{}_{}", self.name, if op == "ReduceMin" { "min" } else { "max" });
        let inputs: Vec<ValueId> = std::iter::once(value).chain(axes).collect();
        let mut node = NewNode::new(op, format!("{name}_{op}"), &inputs, &[&name]).with(Attr::int("keepdims", 1));
        if axes.is_none() {
            node = node.with(Attr::ints("axes", &[-1]));
        }
        self.add(model, node)
    }
}
