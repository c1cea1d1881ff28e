//! Float operators that compute what quantizers do, bit for bit.
//!
//! Only operators that every runtime has, and nothing but exact steps and single roundings: results are those of IEEE f32 as
//! long as no two operators are contracted into one.

use crate::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, ValueId};
use crate::numerics::{ElementRange, Format, MIN_BLOCK_SCALE, MxRounding, TwoLevel};
use crate::onnx::AttributeProto;

/// Adds nodes one after the other.
pub(crate) struct Ops<'a> {
    pub(crate) model: &'a mut Model,
    /// What they are named after.
    name: &'a str,
    /// Where the next one goes.
    place: Place,
    count: usize,
    last: Option<NodeId>,
}

impl<'a> Ops<'a> {
    /// The first one goes to `place`, each other one after the one before.
    pub(crate) fn new(model: &'a mut Model, name: &'a str, place: Place) -> Self {
        Self { model, name, place, count: 0, last: None }
    }

    /// The node that was added last, of which there must be one.
    pub(crate) fn last(&self) -> NodeId {
        self.last.expect("a node was added")
    }

    /// A node with attributes; its result.
    pub(crate) fn node(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<AttributeProto>, output: &str) -> ValueId {
        self.count += 1;
        let (name, count) = (self.name, self.count);
        let node = NewNode::new(op, format!("{name}_{op}_{count}"), inputs, &[&format!("{name}_{output}")]);
        let node = attrs.into_iter().fold(node, NewNode::with);
        let id = self.model.insert(self.place, node);
        self.place = Place::After(id);
        self.last = Some(id);
        self.model.node(id).output(0).expect("just made")
    }

    /// A node without attributes; its result.
    pub(crate) fn op(&mut self, op: &str, inputs: &[ValueId]) -> ValueId {
        let output = format!("{op}_{}", self.count + 1);
        self.node(op, inputs, Vec::new(), &output)
    }

    /// A number.
    pub(crate) fn constant(&mut self, what: &str, value: f32) -> ValueId {
        self.floats(what, &[], &[value])
    }

    /// A tensor of numbers.
    pub(crate) fn floats(&mut self, what: &str, dims: &[usize], values: &[f32]) -> ValueId {
        let graph = self.model.main();
        self.model.add_initializer(graph, &format!("{}_{what}", self.name), Tensor::from_f32(dims, values))
    }

    /// A list of integers.
    pub(crate) fn integers(&mut self, what: &str, values: &[i64]) -> ValueId {
        let graph = self.model.main();
        self.model.add_initializer(graph, &format!("{}_{what}", self.name), Tensor::from_i64(&[values.len()], values))
    }

    /// `op` of a value and a number.
    pub(crate) fn with(&mut self, op: &str, x: ValueId, number: f32) -> ValueId {
        let number = self.constant("number", number);
        self.op(op, &[x, number])
    }

    /// The largest element of each row, as a column, or of all.
    pub(crate) fn largest(&mut self, x: ValueId, rows: bool) -> ValueId {
        let output = if rows { "amax" } else { "tensor_amax" };
        let mut attrs = vec![Attr::int("keepdims", i64::from(rows))];
        let mut inputs = vec![x];
        if rows && self.model.opset().unwrap_or(0) < 18 {
            attrs.push(Attr::ints("axes", &[1]));
        } else if rows {
            inputs.push(self.integers("axes", &[1]));
        }
        self.node("ReduceMax", &inputs, attrs, output)
    }

    /// The largest power of two that is not above |x|, and 0 for 0: Rump's `ufp`, exact for magnitudes below 2^104.
    fn unit_in_the_first_place(&mut self, x: ValueId) -> ValueId {
        let wide = self.with("Mul", x, 8_388_609.0);
        let less = self.with("Mul", wide, 1f32.next_down());
        let difference = self.op("Sub", &[wide, less]);
        self.op("Abs", &[difference])
    }

    /// The least power of two that is not below x, which is not negative.
    fn power_above(&mut self, x: ValueId) -> ValueId {
        // Just below 2: a power of two stays in its binade, all else gets into the next one.
        let raised = self.with("Mul", x, 2f32.next_down());
        self.unit_in_the_first_place(raised)
    }

    /// As [`numerics::e8m0_scale`], but no smaller than a normal number.
    pub(crate) fn power_of_two(&mut self, amax: ValueId, elements: ElementRange, rounding: MxRounding) -> ValueId {
        let power = match rounding {
            MxRounding::Floor => self.unit_in_the_first_place(amax),
            MxRounding::Ceil => self.power_above(amax),
            MxRounding::Even => {
                let first = self.unit_in_the_first_place(amax);
                let half = self.with("Mul", first, (-(elements.mantissa_bits as f32) - 1.0).exp2());
                let rounded = self.op("Add", &[amax, half]);
                self.unit_in_the_first_place(rounded)
            }
            MxRounding::Rceil => {
                let quotient = self.with("Div", amax, elements.max);
                self.power_above(quotient)
            }
        };
        let scale = match rounding {
            MxRounding::Rceil => power,
            _ => self.with("Mul", power, (-elements.exponent as f32).exp2()),
        };
        self.with("Max", scale, f32::MIN_POSITIVE)
    }

    /// As [`TwoLevel`], the scale of the tensor found at run time as well.
    pub(crate) fn two_level(&mut self, amax: ValueId, elements: ElementRange, eps: f32) -> ValueId {
        let least = if eps > 0.0 { eps } else { MIN_BLOCK_SCALE };
        let all = self.largest(amax, false);
        let whole = self.with("Div", all, 448.0 * elements.max);
        let whole = self.with("Max", whole, TwoLevel::tensor_scale(f32::MIN_POSITIVE, elements));
        let unit = self.with("Mul", whole, elements.max);
        let quotient = self.op("Div", &[amax, unit]);
        let scale = self.rounded(quotient, Format::Float8e4m3fn, least);
        self.op("Mul", &[scale, whole])
    }

    /// `x` clamped to `least..=MAX` and rounded to the nearest number of a float format, half to even.
    fn rounded(&mut self, x: ValueId, format: Format, least: f32) -> ValueId {
        let (least, most) = (self.constant("number", least), self.constant("number", format.max_value()));
        let clamped = self.op("Clip", &[x, least, most]);
        self.nearest(clamped, format)
    }

    /// The nearest number of a float format, half to even, for numbers that are not above its largest one.
    pub(crate) fn nearest(&mut self, x: ValueId, format: Format) -> ValueId {
        let Some(float) = format.float() else { return x };
        let first = self.unit_in_the_first_place(x);
        let step = self.with("Mul", first, (-(float.mantissa_bits() as f32)).exp2());
        let step = self.with("Max", step, float.min_positive());
        let steps = self.op("Div", &[x, step]);
        let steps = self.op("Round", &[steps]);
        self.op("Mul", &[steps, step])
    }
}
