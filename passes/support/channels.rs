//! Products with channels (`Conv`, `ConvTranspose`, `Gemm`) and what the nodes behind them do to each channel: `y` becomes
//! `a·y + b`, for `BatchNormalization` in its inference form, and `Mul`, `Div`, `Add`, `Sub` with a constant for each channel.

use crate::ir::view::{Conv, Gemm};
use crate::ir::{Model, NodeId, Tensor};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// Operators with channels and a bias.
const PRODUCTS: [&str; 3] = ["Conv", "ConvTranspose", "Gemm"];

/// Whether a node is one of them.
pub(crate) fn has_channels(model: &Model, node: NodeId) -> bool {
    PRODUCTS.iter().any(|op| model.node(node).is(op))
}

/// A node that computes channels.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub node: NodeId,
    pub layout: Layout,
}

/// Where the output channels lie in a weight.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub channels: usize,
    /// The axis of the weight that they lie along.
    pub axis: usize,
    /// Their number along that axis; each group of a convolution has as many.
    pub columns: usize,
    /// Axes of the output; channels are axis 1.
    rank: usize,
    /// The channel of element `i` is `i / stride % columns`, plus `columns` for each whole `block` before it.
    stride: usize,
    block: usize,
}

impl Layout {
    /// The layout of a weight with these dimensions; none for other operators, and for weights that do not fit theirs.
    pub fn of(model: &Model, node: NodeId, dims: &[usize]) -> Option<Self> {
        let node = model.node(node);
        let size: usize = dims.iter().product();
        if size == 0 || dims.len() < 2 {
            return None;
        }
        let rank = dims.len();
        match PRODUCTS.into_iter().find(|op| node.is(op))? {
            "Conv" => {
                let stride = size / dims[0];
                Some(Self { channels: dims[0], axis: 0, columns: dims[0], rank, stride, block: size })
            }
            "ConvTranspose" => {
                let groups = Conv::of(node)?.group;
                if !dims[0].is_multiple_of(groups) {
                    return None;
                }
                let stride = size / dims[0] / dims[1];
                Some(Self { channels: dims[1] * groups, axis: 1, columns: dims[1], rank, stride, block: size / groups })
            }
            _ if rank == 2 => {
                let axis = Gemm::of(node).unwrap_or_default().columns();
                let stride = if axis == 0 { dims[1] } else { 1 };
                Some(Self { channels: dims[axis], axis, columns: dims[axis], rank, stride, block: size })
            }
            _ => None,
        }
    }

    /// The channel that an element of the weight belongs to.
    pub fn channel(self, element: usize) -> usize {
        element / self.block * self.columns + element / self.stride % self.columns
    }
}

impl Product {
    /// A node with a weight of these dimensions, and a bias that is left out or one number for each channel; or why it is
    /// none.
    pub fn of(model: &Model, node: NodeId, weight: &[usize]) -> Result<Self, Reason> {
        let layout = Layout::of(model, node, weight)
            .ok_or_else(|| Reason::WrongShape { what: Operand::Weight, dims: weight.to_vec() })?;
        if let Some(bias) = model.node(node).input(2) {
            let tensor = model.constant(bias).ok_or(Reason::NotConstant { what: Operand::Bias })?;
            // A convolution's bias is a list; a Gemm's is broadcast like any operand.
            let gemm = model.node(node).is("Gemm");
            let fits = if gemm { per_channel(tensor, layout).is_some() } else { tensor.dims() == [layout.channels] };
            if !fits || !tensor.dtype().is_float() {
                return Err(Reason::NotPerChannel { what: Operand::Bias, channels: layout.channels });
            }
        }
        Ok(Self { node, layout })
    }

    /// What it adds to each channel.
    pub fn shifts(&self, model: &Model) -> Vec<f64> {
        let node = model.node(self.node);
        let beta = f64::from(Gemm::of(node).unwrap_or_default().beta);
        let bias = node.input(2).and_then(|bias| model.constant(bias)).and_then(Tensor::to_f64);
        match bias.as_deref() {
            None => vec![0.0; self.layout.channels],
            Some([one]) => vec![beta * one; self.layout.channels],
            Some(many) => many.iter().map(|c| beta * c).collect(),
        }
    }

    /// Makes `bias` what it adds. A new one is named after `weight`.
    pub fn set_bias(&self, model: &mut Model, bias: Tensor, weight: &str) {
        let name = match model.node(self.node).input(2) {
            Some(old) => format!("{}_fused", model.value(old).name()),
            None => match weight.strip_suffix("weight") {
                Some(stem) => format!("{stem}bias"),
                None => format!("{weight}_bias"),
            },
        };
        store(model, self.node, 2, &name, bias);
        // It has been multiplied in.
        model.remove_attr(self.node, "beta");
    }
}

/// Takes out nodes behind a product, each with the input that reads the one before: the product's result gets the name and the
/// uses of the last one's.
pub(crate) fn absorb(model: &mut Model, behind: &[(NodeId, usize)]) {
    for &(id, input) in behind {
        let (Some(data), Some(result)) = (model.node(id).input(input), model.node(id).output(0)) else { continue };
        if let (None, Some(ty)) = (model.value(data).ty(), model.value(result).ty()) {
            let ty = ty.clone();
            model.set_type(data, ty);
        }
        model.set_input(id, input, None);
        let fresh = model.value(data).name().to_owned();
        model.take_name(result, data, &fresh);
        model.replace_uses(result, data, |_| true);
        model.remove(&[id]);
    }
}

/// What happens to each channel: it is multiplied by its factor, and then its shift is added.
#[derive(Clone)]
pub(crate) struct Channels {
    pub factors: Vec<f64>,
    pub shifts: Vec<f64>,
}

impl Channels {
    /// This, and then `next`.
    pub fn then(&self, next: &Self) -> Self {
        let factors = self.factors.iter().zip(&next.factors).map(|(a, b)| a * b).collect();
        let after = next.factors.iter().zip(&next.shifts);
        Self { factors, shifts: self.shifts.iter().zip(after).map(|(c, (a, b))| c * a + b).collect() }
    }
}

/// Whether a `BatchNormalization` has its inference form, or why not.
pub(crate) fn infers(model: &Model, id: NodeId) -> Result<(), Reason> {
    let node = model.node(id);
    let opset = node.graph().and_then(|graph| model.opset_in(graph)).unwrap_or(1);
    let training = if opset >= 14 {
        node.int("training_mode").unwrap_or(0) != 0
    } else {
        node.outputs().iter().skip(1).any(Option::is_some) || (opset < 7 && node.int("is_test").unwrap_or(0) == 0)
    };
    if training {
        return Err(Reason::Training);
    }
    if node.int("spatial") == Some(0) {
        return Err(Reason::Attribute { name: "spatial".into(), wanted: 1 });
    }
    Ok(())
}

/// What a `BatchNormalization` in its inference form does, or why that is not known.
pub(crate) fn batch_normalization(model: &Model, id: NodeId, channels: usize) -> Result<Channels, Reason> {
    let mut parameters = [const { Vec::new() }; 4];
    for (slot, (index, what)) in
        parameters.iter_mut().zip([(1, Operand::Scale), (2, Operand::Bias), (3, Operand::Mean), (4, Operand::Variance)])
    {
        let tensor = model.constant_input(id, index).ok_or(Reason::NotConstant { what })?;
        *slot = tensor.to_f64().filter(|v| v.len() == channels).ok_or(Reason::NotPerChannel { what, channels })?;
    }
    let [scale, shift, mean, variance] = parameters;
    let epsilon = f64::from(model.node(id).float("epsilon").unwrap_or(1e-5));
    let factors: Vec<f64> = scale.iter().zip(&variance).map(|(s, v)| s / (v + epsilon).sqrt()).collect();
    let shifts = shift.iter().zip(&mean).zip(&factors).map(|((b, m), a)| b - m * a).collect();
    Ok(Channels { factors, shifts })
}

/// Which input of an arithmetic node is data, where the other is a constant.
pub(crate) fn data_input(model: &Model, id: NodeId) -> Option<usize> {
    let node = model.node(id);
    // Before opset 7, broadcasting was an attribute with another rule.
    if !["Add", "Sub", "Mul", "Div"].iter().any(|op| node.is(op)) || model.opset_in(node.graph()?)? < 7 {
        return None;
    }
    match (model.constant_input(id, 0), model.constant_input(id, 1)) {
        (None, Some(_)) => Some(0),
        (Some(_), None) => Some(1),
        _ => None,
    }
}

/// What an arithmetic node does to input `input`, where the other is a constant for each channel.
pub(crate) fn arithmetic(model: &Model, id: NodeId, input: usize, layout: Layout) -> Option<Channels> {
    let values = per_channel(model.constant_input(id, 1 - input)?, layout)?;
    let all = |value: f64| vec![value; layout.channels];
    let (factors, shifts) = match (model.node(id).op_type(), input) {
        ("Mul", _) => (values, all(0.0)),
        ("Div", 0) => (values.into_iter().map(|v| 1.0 / v).collect(), all(0.0)),
        ("Add", _) => (all(1.0), values),
        ("Sub", 0) => (all(1.0), values.into_iter().map(|v| -v).collect()),
        ("Sub", _) => (all(-1.0), values),
        _ => return None,
    };
    Some(Channels { factors, shifts })
}

/// Puts a tensor at an input: in place of the one there if nothing else uses that, otherwise as a new initializer.
pub(crate) fn store(model: &mut Model, node: NodeId, input: usize, fresh: &str, tensor: Tensor) {
    match model.node(node).input(input) {
        Some(old) if model.value(old).users().len() == 1 => model.set_constant(old, tensor),
        _ => {
            let graph = model.node(node).graph().expect("a producer is in a graph");
            let value = model.add_initializer(graph, fresh, tensor);
            model.set_input(node, input, Some(value));
        }
    }
}

/// One number for each channel, from a tensor that is broadcast against the output: its axes but the channels' are 1.
fn per_channel(tensor: &Tensor, layout: Layout) -> Option<Vec<f64>> {
    let dims = tensor.dims();
    let before = layout.rank.checked_sub(dims.len())?;
    let along = |axis: usize| axis.checked_sub(before).map_or(1, |at| dims[at]);
    if (0..layout.rank).any(|axis| axis != 1 && along(axis) != 1) {
        return None;
    }
    let values = tensor.to_f64()?;
    match values.as_slice() {
        [one] => Some(vec![*one; layout.channels]),
        many if many.len() == layout.channels => Some(values),
        _ => None,
    }
}

/// A tensor of the nearest numbers of `dtype`, ties to even; `None` if one of them is not finite.
pub(crate) fn rounded(dtype: DataType, dims: &[usize], values: impl Iterator<Item = f64>) -> Option<Tensor> {
    let tensor = Tensor::from_f64(dtype, dims, values)?;
    tensor.to_f64()?.iter().all(|v| v.is_finite()).then_some(tensor)
}
