//! Dividing the channels of a tensor by what makes it: the constants of a normalization, the rows of a product, a factor.

use crate::ir::view::Gemm;
use crate::ir::{Model, NodeId, Tensor, User, ValueId};
use crate::onnx::DataType;

use super::channels::{rounded, store};

/// Normalizations: operator, and the inputs that are one number for each channel and scale or shift the result.
const NORMALIZATIONS: [(&str, &str, &[usize]); 5] = [
    ("", "LayerNormalization", &[1, 2]),
    ("", "RMSNormalization", &[1]),
    ("", "SimplifiedLayerNormalization", &[1]),
    ("com.microsoft", "SkipLayerNormalization", &[2, 3]),
    ("com.microsoft", "SkipSimplifiedLayerNormalization", &[2]),
];

/// Operators that give a multiple of the result for a positive multiple of the input.
const HOMOGENEOUS: [&str; 3] = ["Relu", "LeakyRelu", "Identity"];

/// How the channels of a tensor are divided without a node for it.
#[derive(Debug, Default)]
pub(crate) struct Division {
    /// Constants that change.
    constants: Vec<Constant>,
    /// The tensors that are divided: the one that was asked for, and those between it and the constants.
    pub(crate) tensors: Vec<ValueId>,
}

/// One constant operand, and what becomes of it.
#[derive(Debug)]
struct Constant {
    node: NodeId,
    input: usize,
    /// The axis of the channels; one number for all becomes one for each.
    axis: isize,
    /// Multiplied instead: it is a divisor.
    inverse: bool,
}

impl Division {
    /// How the last axis of `value`, with `channels` elements, is divided, where nothing but `readers` reads it; `None` where a
    /// node is needed.
    pub(crate) fn of(model: &Model, value: ValueId, readers: &[User], channels: usize) -> Option<Self> {
        let mut found = Self::default();
        found.reach(model, value, readers, channels).then_some(found)
    }

    fn reach(&mut self, model: &Model, value: ValueId, readers: &[User], channels: usize) -> bool {
        let Some(node) = model.producer(value) else { return false };
        let at = model.node(node);
        let own = model.value(value).users().iter().all(|user| readers.contains(user));
        let main = at.graph() == Some(model.main());
        if !own || !main || at.output(0) != Some(value) || model.opset().unwrap_or(0) < 7 {
            return false;
        }
        self.tensors.push(value);
        let through = |found: &mut Self, input: usize| {
            let inner = at.input(input);
            inner.is_some_and(|inner| found.reach(model, inner, &[User::Node { node, input }], channels))
        };
        let constant = |input: usize| model.constant_input(node, input).is_some();
        for (domain, op, inputs) in NORMALIZATIONS {
            if (at.domain(), at.op_type()) == (domain, op) {
                return inputs.iter().all(|&input| {
                    at.input(input).is_none() || self.constant(model, (node, input), -1, channels, false)
                });
            }
        }
        if !at.domain().is_empty() {
            return false;
        }
        match at.op_type() {
            "Mul" => match (constant(0), constant(1)) {
                (true, true) => false,
                (true, false) => self.constant(model, (node, 0), -1, channels, false),
                (false, true) => self.constant(model, (node, 1), -1, channels, false),
                (false, false) => [1, 0].into_iter().any(|input| {
                    let (before, tensors) = (self.constants.len(), self.tensors.len());
                    let done = through(self, input);
                    if !done {
                        self.constants.truncate(before);
                        self.tensors.truncate(tensors);
                    }
                    done
                }),
            },
            "Div" if constant(1) => self.constant(model, (node, 1), -1, channels, true),
            "Div" => through(self, 0),
            "Add" | "Sub" if constant(0) != constant(1) => {
                let fixed = usize::from(constant(1));
                self.constant(model, (node, fixed), -1, channels, false) && through(self, 1 - fixed)
            }
            "MatMul" if constant(1) && !constant(0) => self.constant(model, (node, 1), -1, channels, false),
            "Gemm" if constant(1) && !constant(0) => {
                let axis = if Gemm::of(at).is_some_and(|gemm| gemm.trans_b) { 0 } else { -1 };
                self.constant(model, (node, 1), axis, channels, false)
                    && (at.input(2).is_none() || self.constant(model, (node, 2), -1, channels, false))
            }
            op if HOMOGENEOUS.contains(&op) => through(self, 0),
            _ => false,
        }
    }

    /// Notes a constant, if it has channels or one number for all.
    fn constant(
        &mut self,
        model: &Model,
        (node, input): (NodeId, usize),
        axis: isize,
        channels: usize,
        inverse: bool,
    ) -> bool {
        let Some(tensor) = model.constant_input(node, input) else { return false };
        let dims = tensor.dims();
        let along = if axis < 0 { dims.last() } else { dims.first() };
        let product = input == 1 && (model.node(node).is("MatMul") || model.node(node).is("Gemm"));
        let fits = along == Some(&channels) || tensor.len() == 1 && !product;
        if !fits || tensor.dtype() != DataType::Float || product && dims.len() != 2 {
            return false;
        }
        self.constants.push(Constant { node, input, axis, inverse });
        true
    }

    /// Divides. Constants that other nodes read as well stay for those; `None` where a number would overflow, and nothing is
    /// changed then.
    pub(crate) fn apply(&self, model: &mut Model, divisors: &[f32]) -> Option<()> {
        let changed = self.constants.iter().map(|c| c.changed(model, divisors)).collect::<Option<Vec<Tensor>>>()?;
        for (constant, tensor) in self.constants.iter().zip(changed) {
            let (node, input) = (constant.node, constant.input);
            let name = model.node(node).input(input).map_or_else(String::new, |v| model.value(v).name().to_owned());
            store(model, node, input, &format!("{name}_smooth"), tensor);
        }
        Some(())
    }
}

impl Constant {
    fn changed(&self, model: &Model, divisors: &[f32]) -> Option<Tensor> {
        let tensor = model.constant_input(self.node, self.input)?;
        let (values, mut dims) = (tensor.to_f64()?, tensor.dims());
        let factor = |channel: usize| {
            let divisor = f64::from(divisors[channel]);
            if self.inverse { divisor } else { 1.0 / divisor }
        };
        if values.len() == 1 && divisors.len() > 1 {
            dims = vec![divisors.len()];
            return rounded(DataType::Float, &dims, (0..divisors.len()).map(|channel| values[0] * factor(channel)));
        }
        let stride = if self.axis < 0 { 1 } else { dims.get(1).copied().unwrap_or(1) };
        let channel = |at: usize| if self.axis < 0 { at % divisors.len() } else { at / stride };
        rounded(DataType::Float, &dims, values.iter().enumerate().map(|(at, value)| value * factor(channel(at))))
    }
}
