//! `MatMul`, `Gemm` and `Conv` with a dequantized constant of 8 bits, whose input is quantized at run time, become
//! `MatMulInteger` and `ConvInteger`.
//!
//! ```text
//! codes, scale, zero = DynamicQuantizeLinear(x)
//! y = Cast(MatMulInteger(codes, w, zero, w_zero)) * (scale * w_scale) + bias
//! ```
//!
//! The sum is exact, where the product of dequantized numbers rounds at every addition, so the two differ by that alone. It is
//! standard ONNX, and what onnxruntime makes `DynamicQuantizeMatMul` of. With a plan, the weights that it gives that form;
//! without one, all that can have it. Codes, scales and zero points are as they were.

use super::forms::{QuantizedTensor, ZeroPoints, find_dequantized};
use super::lower_matmulnbits::{add_behind, base_name};
use super::support::nodes::{carry_out, plain_gemm};
use super::{Change, Context, Outcome, Pass};
use crate::config::spec::Form;
use crate::error::Result;
use crate::ir::view::Gemm;
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, Tensor, User, ValueId, tensor_type};
use crate::numerics::{Granularity, pack};
use crate::onnx::DataType;
use crate::reason::{Kernel, Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct LowerMatmulinteger;

impl Pass for LowerMatmulinteger {
    fn name(&self) -> &'static str {
        "lower-matmulinteger"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if let Some((plan, _)) = context.quantization {
            carry_out(model, plan, Form::Matmulinteger, |model, node, _| lower(model, node, &mut outcome))?;
            return Ok(outcome);
        }
        let mut candidates = model.nodes_outside_functions();
        candidates.retain(|&n| {
            let at = model.node(n);
            let constant = at.input(1).and_then(|v| find_dequantized(model, v)).is_some();
            constant && (at.is("MatMul") || at.is("Gemm") || at.is("Conv")) && at_run_time(model, n).is_some()
        });
        for node in candidates {
            if let Err(why) = lower(model, node, &mut outcome) {
                outcome.skipped(model.node_name(node), why);
            }
        }
        Ok(outcome)
    }
}

/// Codes, scale and zero point of the first input of a node, where a DynamicQuantizeLinear makes them.
fn at_run_time(model: &Model, node: NodeId) -> Option<[ValueId; 3]> {
    let dequantize = model.node(node).input(0).and_then(|v| model.producer(v))?;
    if !model.node(dequantize).is("DequantizeLinear") {
        return None;
    }
    let quantize = model.node(dequantize).input(0).and_then(|v| model.producer(v))?;
    let at = model.node(quantize);
    let made = [at.output(0)?, at.output(1)?, at.output(2)?];
    let read = [0, 1, 2].map(|i| model.node(dequantize).input(i));
    (at.is("DynamicQuantizeLinear") && read == made.map(Some)).then_some(made)
}

/// The largest sum of products of two bytes that int32 holds whatever the codes are.
const LONGEST_SUM: usize = 1 << 16;

/// What a constant becomes.
struct Stored {
    codes: ValueId,
    scale: ValueId,
    zero_point: ValueId,
}

fn lower(model: &mut Model, node: NodeId, outcome: &mut Outcome) -> Result<(), Reason> {
    let [codes, scale, zero_point] = at_run_time(model, node).ok_or(Reason::NotAtRunTime)?;
    let at = model.node(node);
    let graph = at.graph().ok_or(Reason::Missing { what: Operand::Graph })?;
    let (gemm, conv) = (at.is("Gemm"), at.is("Conv"));
    if !gemm && !conv && !at.is("MatMul") {
        return Err(Reason::NotItsForm { form: Form::Matmulinteger, op: at.op_type().into() });
    }
    plain_gemm(model, node)?;
    let found = at.input(1).and_then(|v| find_dequantized(model, v));
    let (dequantize, exchanged) = found.ok_or(Reason::NotDequantizedConstant { what: Operand::Weight })?;
    let turned = exchanged != Gemm::of(at).unwrap_or_default().trans_b;
    let bias = match at.input(2) {
        Some(bias) if conv => Some(channels(model, graph, bias, at_rank(model, dequantize)?)?),
        bias => bias.filter(|_| gemm),
    };
    let stored = if conv {
        convolution(model, graph, dequantize, exchanged)?
    } else {
        product(model, graph, dequantize, turned)?
    };
    let at = model.node(node);
    let output = at.output(0).ok_or(Reason::NoOutput)?;
    let op = if conv { "ConvInteger" } else { "MatMulInteger" };
    let name = model.value(output).name().to_owned();
    let label = model.node_name(node).to_owned();
    model.truncate_inputs(node, 0);
    for (index, value) in [codes, stored.codes, zero_point, stored.zero_point].into_iter().enumerate() {
        model.set_input(node, index, Some(value));
    }
    for name in ["alpha", "beta", "transA", "transB"] {
        model.remove_attr(node, name);
    }
    model.set_op(node, "", op);
    let both = NewNode::new("Mul", format!("{label}_scale_Mul"), &[scale, stored.scale], &[&format!("{name}_scale")]);
    let both = model.insert(Place::Before(node), both);
    let cast = NewNode::new("Cast", format!("{label}_Cast"), &[output], &[&format!("{name}_cast")])
        .with(Attr::int("to", DataType::Float.code().into()));
    let cast = model.insert(Place::After(node), cast);
    let factors = [cast, both].map(|n| model.node(n).output(0).expect("just made"));
    let mul = NewNode::new("Mul", format!("{label}_Mul"), &factors, &[&format!("{name}_scaled")]);
    let mul = model.insert(Place::After(cast), mul);
    let scaled = model.node(mul).output(0).expect("just made");
    if let Some(ty) = model.value(output).ty().cloned() {
        model.set_type(scaled, ty);
    }
    let shape = model.shape(output);
    model.set_type(output, tensor_type(DataType::Int32, shape.as_deref()));
    model.replace_uses(output, scaled, |user| !matches!(user, User::Node { node, .. } if node == cast));
    model.take_name(output, scaled, &format!("{name}_sum"));
    match bias {
        Some(bias) => add_behind(model, mul, bias),
        None => plain_sum(model, scaled),
    }
    outcome.changed(label, Change::WrittenAs { op: op.to_owned() });
    Ok(())
}

/// A sum of two was written as Sum lest a runtime take it for the bias of a float product; here it may be one.
fn plain_sum(model: &mut Model, product: ValueId) {
    let &[User::Node { node, .. }] = model.value(product).users() else { return };
    if model.node(node).is("Sum") && model.node(node).inputs().len() == 2 {
        model.set_op(node, "", "Add");
    }
}

fn at_rank(model: &Model, dequantize: NodeId) -> Result<usize, Reason> {
    Ok(model.constant_input(dequantize, 0).ok_or(Reason::NotConstant { what: Operand::Weight })?.dims().len())
}

/// The constants of a product, `[K, N]` or a batch of those.
fn product(model: &mut Model, graph: GraphId, dequantize: NodeId, turned: bool) -> Result<Stored, Reason> {
    let constant = eight_bits(model, dequantize)?;
    let constant = if turned { constant.transposed()? } else { constant };
    let last = constant
        .dims
        .len()
        .checked_sub(1)
        .filter(|&last| last > 0)
        .ok_or_else(|| Reason::WrongShape { what: Operand::Weight, dims: constant.dims.clone() })?;
    match constant.granularity {
        Granularity::PerTensor => {}
        Granularity::PerChannel { axis } if axis == last && last == 1 => {}
        _ => return Err(Reason::KernelScales { kernel: Kernel::MatMulInteger, granularity: constant.granularity }),
    }
    if constant.dims[last - 1] > LONGEST_SUM {
        return Err(Reason::LongSum { products: constant.dims[last - 1] });
    }
    let inputs = [0, 1, 2].map(|i| model.node(dequantize).input(i));
    let codes = match inputs[0] {
        Some(codes) if !turned => codes,
        codes => {
            let name = format!("{}_integer", base_name(model, codes));
            let dtype = DataType::from(constant.format);
            model.add_initializer(graph, &name, Tensor::new(dtype, &constant.dims, constant.codes.clone()))
        }
    };
    let scale = inputs[1].ok_or(Reason::Missing { what: Operand::Scale })?;
    let zero_point = match inputs[2] {
        Some(zero) => zero,
        None => zeros(model, graph, inputs[0], &constant, &constant.granularity.scale_dims(&constant.dims)),
    };
    Ok(Stored { codes, scale, zero_point })
}

/// The constants of a convolution, `[M, C/group, …]`.
fn convolution(model: &mut Model, graph: GraphId, dequantize: NodeId, turned: bool) -> Result<Stored, Reason> {
    let constant = eight_bits(model, dequantize)?;
    let rank = constant.dims.len();
    if turned || !(3..=5).contains(&rank) {
        return Err(Reason::KernelShape { kernel: Kernel::ConvInteger, dims: constant.dims });
    }
    if !matches!(constant.granularity, Granularity::PerTensor | Granularity::PerChannel { axis: 0 }) {
        return Err(Reason::KernelScales { kernel: Kernel::ConvInteger, granularity: constant.granularity });
    }
    let products = constant.dims[1..].iter().product();
    if products > LONGEST_SUM {
        return Err(Reason::LongSum { products });
    }
    let ZeroPoints::Integers(found) = &constant.zero_points else {
        return Err(Reason::FractionalZeroPoints { op: "ConvInteger".into() });
    };
    if found.windows(2).any(|two| two[0] != two[1]) {
        return Err(Reason::OneZeroPoint { kernel: Kernel::ConvInteger });
    }
    let inputs = [0, 1].map(|i| model.node(dequantize).input(i));
    let (Some(codes), Some(scale)) = (inputs[0], inputs[1]) else {
        return Err(Reason::Missing { what: Operand::QuantizedData });
    };
    let zero_point = zeros(model, graph, inputs[0], &constant, &[]);
    let scale = if constant.scales.len() == 1 && constant.granularity == Granularity::PerTensor {
        scale
    } else {
        channels(model, graph, scale, rank)?
    };
    Ok(Stored { codes, scale, zero_point })
}

fn eight_bits(model: &Model, dequantize: NodeId) -> Result<QuantizedTensor, Reason> {
    let constant = QuantizedTensor::from_qdq(model, dequantize)?;
    if constant.format.bits() != 8 {
        return Err(Reason::wrong_type(Operand::Weight, constant.format.into(), "int8 or uint8"));
    }
    if constant.scale_dtype != DataType::Float {
        return Err(Reason::wrong_type(Operand::Scale, constant.scale_dtype, "float"));
    }
    Ok(constant)
}

/// Zero points of this shape, all alike where it has but one.
fn zeros(
    model: &mut Model,
    graph: GraphId,
    codes: Option<ValueId>,
    constant: &QuantizedTensor,
    dims: &[usize],
) -> ValueId {
    let zeros: &[i32] = match &constant.zero_points {
        ZeroPoints::Integers(zeros) => zeros,
        ZeroPoints::Floats(_) => &[],
    };
    let count: usize = dims.iter().product();
    let raw = pack::pack(&zeros[..count.min(zeros.len())], 8);
    let name = format!("{}_integer_zero_point", base_name(model, codes));
    model.add_initializer(graph, &name, Tensor::new(DataType::from(constant.format), dims, raw))
}

/// A constant list of one number a channel, in a shape that is stretched over a tensor of this rank.
fn channels(model: &mut Model, graph: GraphId, list: ValueId, rank: usize) -> Result<ValueId, Reason> {
    let tensor = model.constant(list).ok_or(Reason::NotConstant { what: Operand::Bias })?;
    let [channels] = tensor.dims()[..] else {
        return Err(Reason::WrongShape { what: Operand::Bias, dims: tensor.dims() });
    };
    if tensor.dtype() != DataType::Float {
        return Err(Reason::wrong_type(Operand::Bias, tensor.dtype(), "float"));
    }
    let mut dims = vec![1; rank - 1];
    dims[0] = channels;
    let stretched = tensor.clone().reshaped(&dims);
    let name = format!("{}_channels", model.value(list).name());
    Ok(model.add_initializer(graph, &name, stretched))
}
