//! Questions: what may run on integers, and if not, why. Nothing here changes anything.

use super::Scheme;
use crate::config::spec::ScaleDtype;
use crate::ir::view::{Gemm, Lstm};
use crate::ir::{Def, Model, NodeId, Tensor, ValueId};
use crate::numerics::{Format, Granularity};
use crate::ops::{self, Channel, Number, Role, Row};
use crate::reason::{Kernel, Operand, Reason};
use crate::targets::Target;

/// The operands of a node that might run on integers, by their index.
pub(super) struct Operands {
    /// The constant weight.
    pub(super) weight: Option<usize>,
    /// What is computed.
    pub(super) data: Vec<usize>,
}

/// Sorts the inputs of a node.
pub(super) fn operands(model: &Model, node: NodeId) -> Result<Operands, Reason> {
    let row = ops::of(model, node).ok_or(Reason::UnknownOperator)?;
    let mut found = Operands { weight: None, data: Vec::new() };
    for (index, input) in model.node(node).inputs().iter().enumerate() {
        let Some(input) = *input else { continue };
        match row.role(index) {
            Role::Weight(_) if model.constant(input).is_some() => {
                if found.weight.replace(index).is_some() {
                    return Err(Reason::BothConstant);
                }
            }
            Role::Weight(_) | Role::Data => found.data.push(index),
            Role::Bias | Role::Other => {}
        }
    }
    Ok(found)
}

/// Whether a constant can be the weight of a node at all.
pub(super) fn weight(model: &Model, node: NodeId, index: usize) -> Result<(), Reason> {
    let what = Operand::Weight;
    let tensor = model.constant_input(node, index).ok_or_else(|| not_constant(model, node, index, what))?;
    float(tensor, what)?;
    if tensor.is_empty() {
        return Err(Reason::Empty { what });
    }
    let dims = tensor.dims();
    match ops::weight_layout(model, node, index, &dims) {
        Some(_) => Ok(()),
        None => Err(Reason::WrongShape { what, dims }),
    }
}

/// Whether a product with a constant adds anything up. Those that do not scale each row by a few numbers, such as positions by
/// frequencies: what rounding the numbers costs grows with the rows, and there are next to no bytes to save.
pub(super) fn sums(model: &Model, node: NodeId, index: usize) -> Result<(), Reason> {
    let depth = model.constant_input(node, index).map(Tensor::dims).and_then(|dims| {
        let axis = ops::weight_layout(model, node, index, &dims)?.group_axis?;
        matches!(ops::constant_weight(model, node, index), Some(Channel::Left | Channel::Right)).then(|| dims[axis])
    });
    if depth == Some(1) { Err(Reason::NoSum) } else { Ok(()) }
}

/// Whether a constant is a float, as all that is quantized.
pub(super) fn float(tensor: &Tensor, what: Operand) -> Result<(), Reason> {
    let found = tensor.dtype();
    if found.has_quantizers() {
        return Ok(());
    }
    Err(Reason::WrongType { what, found, wanted: "float, float16 or bfloat16".to_owned() })
}

/// Why an operand is not a constant.
pub(super) fn not_constant(model: &Model, node: NodeId, index: usize, what: Operand) -> Reason {
    let value = model.node(node).input(index);
    let with_default = |v: &ValueId| matches!(model.value(*v).def(), Def::Input { default: Some(_) });
    match value.filter(with_default) {
        Some(value) => Reason::InputWithDefault { what, tensor: model.value(value).name().to_owned() },
        None => Reason::NotConstant { what },
    }
}

/// Why an operator without a constant weight is not worth quantizing, if others like it have one.
pub(super) fn without_weight(model: &Model, node: NodeId, row: &Row) -> Result<(), Reason> {
    let weight = |index: &usize| matches!(row.role(*index), Role::Weight(_));
    let reasons = (0..row.inputs.len()).filter(weight).map(|i| not_constant(model, node, i, Operand::Weight));
    match reasons.max_by_key(|why| !matches!(why, Reason::NotConstant { .. })) {
        Some(Reason::NotConstant { .. }) if row.role(0) == Role::Weight(Channel::Left) => Err(Reason::BothActivations),
        Some(why) => Err(why),
        None => Ok(()),
    }
}

/// Whether the attributes of a node are those that integer kernels have.
pub(super) fn attributes(model: &Model, node: NodeId) -> Result<(), Reason> {
    ops::unfit_attribute(model, node).map_or(Ok(()), |fixed| {
        let wanted = match fixed.value {
            Number::Int(value) => value,
            Number::Float(value) => value as i64,
            Number::Ones => 1,
        };
        Err(Reason::Attribute { name: fixed.name.to_owned(), wanted })
    })
}

/// Whether nothing multiplies the product of a node.
pub(super) fn unscaled(model: &Model, node: NodeId) -> Result<(), Reason> {
    ops::factor(model, node).map_or(Ok(()), |name| Err(Reason::Attribute { name: name.to_owned(), wanted: 1 }))
}

/// Whether integer kernels take activations and weights like these.
pub(super) fn integer(target: &Target, activation: &Scheme, weight: Option<&Scheme>) -> Result<(), Reason> {
    let eight = |q: &Scheme| matches!(q.dtype, Format::Int8 | Format::Uint8);
    let grouped = |q: &Scheme| matches!(q.granularity, Granularity::PerGroup { .. });
    let no = |what: Operand, q: &Scheme| Reason::NoKernelFor {
        target: target.name.clone(),
        what,
        format: q.dtype,
        granularity: q.granularity,
    };
    match weight {
        _ if !eight(activation) => Err(no(Operand::Input, activation)),
        Some(weight) if !eight(weight) || grouped(weight) => Err(no(Operand::Weight, weight)),
        _ => Ok(()),
    }
}

/// Whether a product with this weight is fused behind a DynamicQuantizeLinear.
pub(super) fn fuses_at_run_time(model: &Model, target: &Target, node: NodeId, weight: &Scheme) -> bool {
    let range = Scheme::new(Format::Uint8, false, Granularity::PerTensor);
    let role = |index| ops::of(model, node).map(|row| row.role(index));
    let product = role(1) == Some(Role::Weight(Channel::Right));
    let biased = product && role(2) == Some(Role::Bias) && model.node(node).input(2).is_some();
    target.dynamic && integer(target, &range, Some(weight)).is_ok() && !biased
}

/// Whether an input can be cut into the blocks of this scheme.
pub(super) fn whole_blocks(model: &Model, node: NodeId, asked: &Scheme) -> Result<(), Reason> {
    let Granularity::PerGroup { size, .. } = asked.granularity else { return Ok(()) };
    let product = ops::constant_weight(model, node, 1) == Some(Channel::Right);
    if !product || Gemm::of(model.node(node)).is_some_and(|gemm| gemm.trans_a) {
        return Err(Reason::BlocksAcross);
    }
    let length = depth(model, node);
    if length.is_some_and(|length| length.is_multiple_of(size)) {
        return Ok(());
    }
    Err(Reason::RaggedBlocks { length: length.unwrap_or(0), size })
}

/// How many products a sum of a product with a constant right operand has.
fn depth(model: &Model, node: NodeId) -> Option<usize> {
    let dims = model.constant_input(node, 1)?.dims();
    let across = ops::is_transposed(model, node);
    if across { dims.last().copied() } else { dims.iter().rev().nth(usize::from(dims.len() > 1)).copied() }
}

/// Whether a weight beside an input that is quantized at run time can be that of a `MatMulInteger` or `ConvInteger`.
pub(super) fn integer_product(model: &Model, node: NodeId, index: usize, scheme: &Scheme) -> Result<(), Reason> {
    let convolution = ops::constant_weight(model, node, index) == Some(Channel::Conv);
    let kernel = if convolution { Kernel::ConvInteger } else { Kernel::MatMulInteger };
    let dims = model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
    let granularity = scheme.granularity;
    if index != 1 {
        return Err(Reason::NotOnTheRight { kernel });
    }
    bytes(kernel, scheme)?;
    let channel = ops::weight_layout(model, node, index, &dims).and_then(|l| l.channel_axis);
    match granularity {
        Granularity::PerTensor => {}
        Granularity::PerChannel { axis } if channel == Some(axis) => {}
        _ => return Err(Reason::KernelScales { kernel, granularity }),
    }
    let products = if convolution {
        integer_convolution(model, node, &dims, scheme)?;
        dims[1..].iter().product()
    } else {
        let across = usize::from(ops::is_transposed(model, node));
        dims.len().checked_sub(2 - across).and_then(|axis| dims.get(axis)).copied().unwrap_or(0)
    };
    if products > 1 << 16 {
        return Err(Reason::LongSum { products });
    }
    unscaled(model, node)
}

/// Whether a `ConvInteger` takes a weight of this shape, and what is added behind it.
fn integer_convolution(model: &Model, node: NodeId, dims: &[usize], scheme: &Scheme) -> Result<(), Reason> {
    let kernel = Kernel::ConvInteger;
    if !scheme.symmetric && scheme.granularity != Granularity::PerTensor {
        return Err(Reason::OneZeroPoint { kernel });
    }
    if !(3..=5).contains(&dims.len()) {
        return Err(Reason::KernelShape { kernel, dims: dims.to_vec() });
    }
    let list = |v| model.constant(v).is_some_and(|t| t.dims().len() == 1 && t.dtype().has_quantizers());
    if model.node(node).input(2).is_some_and(|v| !list(v)) {
        return Err(Reason::NotConstant { what: Operand::Bias });
    }
    Ok(())
}

/// The largest norm of the weights of one gate: rounding an input between -1 and 1 to 8 bits, an error of `2 / 255 / √12` in each
/// element, moves such a gate by 0.1 of its argument. Those of trained layers are at 3 to 12 where inputs fill that range; larger
/// ones tell of inputs that are small most of the time, and lost by the rounding.
const MOST_GATE_NORM: f64 = 44.0;

/// Whether an LSTM with such weights can be a `DynamicQuantizeLSTM`.
pub(super) fn lstm(model: &Model, node: NodeId, scheme: &Scheme) -> Result<(), Reason> {
    let kernel = Kernel::DynamicQuantizeLSTM;
    let granularity = scheme.granularity;
    bytes(kernel, scheme)?;
    if !scheme.symmetric && granularity != Granularity::PerTensor {
        return Err(Reason::OneZeroPoint { kernel });
    }
    if !matches!(granularity, Granularity::PerTensor | Granularity::PerChannel { axis: 1 }) {
        return Err(Reason::KernelScales { kernel, granularity });
    }
    if Lstm::of(model.node(node)).is_some_and(|lstm| lstm.batch_first) {
        return Err(Reason::BatchFirst);
    }
    Ok(())
}

/// Whether the gates of an LSTM bear an input that is rounded to 8 bits when the model runs.
pub(super) fn calm_gates(model: &Model, node: NodeId) -> Result<(), Reason> {
    let Some(weight) = model.constant_input(node, 1) else { return Ok(()) };
    let columns = weight.dims().last().copied().unwrap_or(0).max(1);
    let values = weight.to_f32().unwrap_or_default();
    let square = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
    let norm = values.chunks(columns).map(square).fold(0.0, f64::max).sqrt();
    if norm > MOST_GATE_NORM { Err(Reason::SteepGates { norm }) } else { Ok(()) }
}

/// Whether a kernel of 8-bit weights with float scales takes such ones.
fn bytes(kernel: Kernel, scheme: &Scheme) -> Result<(), Reason> {
    let Scheme { dtype: format, scale_dtype, .. } = *scheme;
    if !matches!(format, Format::Int8 | Format::Uint8) {
        return Err(Reason::KernelFormat { kernel, format, has: vec![Format::Int8, Format::Uint8] });
    }
    if scale_dtype != ScaleDtype::Float32 {
        return Err(Reason::KernelScaleType { kernel, scales: scale_dtype.into() });
    }
    Ok(())
}

/// Whether a tensor of this shape is one value per channel, or one for all.
pub(super) fn one_each(dims: &[usize], channels: usize) -> bool {
    let count: usize = dims.iter().product();
    count == 1 || (count == channels && dims.last() == Some(&channels))
}
