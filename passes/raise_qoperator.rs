//! Operators on codes (onnxruntime's `QOperator` format) become operators between Dequantize and Quantize, codes, scales
//! and zero points as they were; the opset is raised as far as scales of channels need it.
//!
//! What moves codes, and codes alone, gets quantizers as well, with the parameters of the codes that it reads. Where the
//! least code of a result stands for zero and the result could be below, a Relu goes in front of the quantizer: it changes
//! no code, and one that was there has been left to the quantizer, which may be taken out.

use std::collections::BTreeMap;

use super::forms::MICROSOFT;
use super::lower_matmulnbits::add_behind;
use super::raise_opset::raise;
use super::support::qoperator::{Coded, moved, moves, rank, rewire, zero_like};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Gemm;
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, Tensor, User, ValueId, tensor_type};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct RaiseQoperator;

impl Pass for RaiseQoperator {
    fn name(&self) -> &'static str {
        "raise-qoperator"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut work = Raise::default();
        if model.opset().is_some_and(|has| has < 13)
            && model.nodes_outside_functions().into_iter().any(|n| has_channels(model, n))
        {
            let from = model.opset().unwrap_or(0);
            let raised = raise(model, 13)?;
            outcome.changed("model", Change::Opset { from, to: 13 });
            outcome.skips.extend(raised.skips);
        }
        for node in model.nodes_outside_functions() {
            let at = model.node(node);
            let Some(graph) = at.graph() else { continue };
            let name = model.node_name(node).to_owned();
            let done = match (at.domain(), at.op_type()) {
                ("", "QuantizeLinear") => {
                    work.quantizer(model, graph, node);
                    continue;
                }
                ("" | MICROSOFT, op) if LAYOUTS.iter().any(|layout| layout.op == op) => work.node(model, graph, node),
                (MICROSOFT, "QLinearConcat") => work.concat(model, graph, node),
                (MICROSOFT, "MatMulIntegerToFloat") => work.float_product(model, graph, node),
                ("", _) if moves(model, node) && work.knows(model, node) => work.moving(model, graph, node),
                _ => continue,
            };
            match done {
                Ok(change) => outcome.changed(name, change),
                Err(why) => outcome.skipped(name, why),
            }
        }
        Ok(outcome)
    }
}

/// Where an operator on codes has its operands. Each is followed by its scale and its zero point.
struct Layout {
    op: &'static str,
    float: &'static str,
    /// Inputs that are no codes and come first.
    first: usize,
    /// How many operands there are.
    operands: usize,
    /// The scale of the result; its zero point is the next.
    result: usize,
    bias: Option<usize>,
}

const fn layout(op: &'static str, float: &'static str, operands: usize) -> Layout {
    Layout { op, float, first: 0, operands, result: operands * 3, bias: None }
}

const LAYOUTS: &[Layout] = &[
    Layout { bias: Some(8), ..layout("QLinearConv", "Conv", 2) },
    layout("QLinearMatMul", "MatMul", 2),
    Layout { bias: Some(6), result: 7, ..layout("QGemm", "Gemm", 2) },
    layout("QLinearAdd", "Add", 2),
    layout("QLinearMul", "Mul", 2),
    Layout { first: 1, result: 7, ..layout("QLinearWhere", "Where", 2) },
    layout("QLinearAveragePool", "AveragePool", 1),
    layout("QLinearGlobalAveragePool", "GlobalAveragePool", 1),
    layout("QLinearLeakyRelu", "LeakyRelu", 1),
    layout("QLinearSigmoid", "Sigmoid", 1),
    layout("QLinearSoftmax", "Softmax", 1),
];

/// A scale, a zero point, and the type of codes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Params {
    scale: ValueId,
    zero: ValueId,
    dtype: DataType,
}

/// Codes, their scale and their zero point, which may be left out.
type Triple = (ValueId, ValueId, Option<ValueId>);

#[derive(Default)]
struct Raise {
    /// What codes stand for, where one scale is known.
    known: BTreeMap<ValueId, Params>,
    /// The numbers that activations stand for.
    made: BTreeMap<(GraphId, Triple), ValueId>,
}

impl Raise {
    fn quantizer(&mut self, model: &mut Model, graph: GraphId, node: NodeId) {
        let Ok(coded) = Coded::of(model, node) else { return };
        if coded.axis.is_none() && matches!(coded.dtype, DataType::Int8 | DataType::Uint8) {
            // A zero point is made only for what moves these codes.
            let moved = |user: &User| matches!(user, User::Node { node, .. } if moves(model, *node));
            if coded.zero.is_some() || model.value(coded.codes).users().iter().any(moved) {
                let zero = coded.zero(model, graph);
                self.known.insert(coded.codes, Params { scale: coded.scale, zero, dtype: coded.dtype });
            }
        }
    }

    /// Whether all data that a node moves are codes with the same parameters.
    fn knows(&self, model: &Model, node: NodeId) -> bool {
        let found: Vec<_> =
            (0..moved(model, node)).map(|i| model.node(node).input(i).and_then(|v| self.known.get(&v))).collect();
        found.first().is_some_and(|first| first.is_some() && found.iter().all(|other| other == first))
    }

    fn moving(&mut self, model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
        let count = moved(model, node);
        let inputs: Vec<ValueId> = (0..count).filter_map(|i| model.node(node).input(i)).collect();
        let params = inputs
            .first()
            .and_then(|v| self.known.get(v))
            .copied()
            .ok_or_else(|| Reason::NotComputedBy { what: Operand::QuantizedData, wanted: "a quantizer".into() })?;
        for (index, &value) in inputs.iter().enumerate() {
            let float = self.dequantize(model, graph, node, (value, params.scale, Some(params.zero)), None)?;
            model.set_input(node, index, Some(float));
        }
        let outputs: Vec<ValueId> = model.node(node).outputs().iter().flatten().copied().collect();
        for output in outputs {
            self.quantize(model, node, output, params, false);
        }
        Ok(Change::OnDequantized { op: model.node(node).op_type().to_owned() })
    }

    fn node(&mut self, model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
        let at = model.node(node);
        let layout = LAYOUTS
            .iter()
            .find(|l| l.op == at.op_type())
            .ok_or_else(|| Reason::NotA { op: "operator on quantized values".into() })?;
        if at.int("channels_last").unwrap_or(0) != 0 {
            return Err(Reason::Attribute { name: "channels_last".into(), wanted: 0 });
        }
        if layout.float == "Softmax" {
            let opset = model.opset_in(graph).unwrap_or(0);
            let axis = at.int("axis").unwrap_or(-1);
            let last = at.input(0).and_then(|v| rank(model, v)).is_some_and(|rank| axis + 1 == rank as i64);
            // Before 13 all axes from this one on are summed over.
            if (at.int("opset").unwrap_or(opset) < 13) != (opset < 13) && axis != -1 && !last {
                return Err(Reason::Mismatch { what: "axis".into(), from: "that of a Softmax of this opset".into() });
            }
            model.set_attr(node, Attr::int("axis", axis));
        }
        let operands = (0..layout.operands).map(|i| triple(model, node, layout.first + 3 * i)).collect::<Vec<_>>();
        let operands = operands.into_iter().collect::<Result<Vec<_>, _>>()?;
        let axes = axes(model, node, layout, &operands)?;
        let bias = layout.bias.and_then(|i| model.node(node).input(i));
        let bias = match bias {
            Some(codes) => Some((codes, bias_scale(model, node, &operands)?)),
            None => None,
        };
        let params = result(model, graph, node, layout.result, operands[0])?;
        let mut inputs: Vec<Option<ValueId>> = (0..layout.first).map(|i| model.node(node).input(i)).collect();
        for (&operand, axis) in operands.iter().zip(axes) {
            inputs.push(Some(self.dequantize(model, graph, node, operand, axis)?));
        }
        if let Some((codes, scales)) = bias {
            let name = model.value(codes).name();
            let name = format!("{}_scale", name.strip_suffix("_quantized").unwrap_or(name));
            let channels = scales.len() > 1;
            let dims = if channels { vec![scales.len()] } else { vec![] };
            let scale = model.add_initializer(graph, &name, Tensor::from_f32(&dims, &scales));
            inputs.push(Some(self.dequantize(model, graph, node, (codes, scale, None), channels.then_some(0))?));
        }
        rewire(model, node, "", layout.float, &inputs);
        for name in ["channels_last", "opset"] {
            model.remove_attr(node, name);
        }
        let output = model.node(node).output(0).ok_or(Reason::NoOutput)?;
        if let Some(params) = params {
            let below = match layout.float {
                "Conv" | "Gemm" | "MatMul" => true,
                "Sigmoid" | "Softmax" => false,
                _ => operands.iter().any(|&(codes, _, zero)| !is_positive(model, codes, zero)),
            };
            self.quantize(model, node, output, params, below);
        }
        Ok(Change::OnDequantized { op: layout.float.to_owned() })
    }

    fn concat(&mut self, model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
        let count = model.node(node).inputs().len();
        if count < 5 || !(count - 2).is_multiple_of(3) {
            return Err(Reason::Missing { what: Operand::Operand });
        }
        let operands = (2..count).step_by(3).map(|i| triple(model, node, i)).collect::<Result<Vec<_>, _>>()?;
        for &operand in &operands {
            if scale_count(model, operand.1)? != 1 {
                return Err(Reason::WrongCount { what: "scales".into(), per: "operand".into() });
            }
        }
        let params = result(model, graph, node, 0, operands[0])?.ok_or(Reason::Missing { what: Operand::Scale })?;
        let below = operands.iter().any(|&(codes, _, zero)| !is_positive(model, codes, zero));
        let mut inputs = Vec::with_capacity(operands.len());
        for operand in operands {
            inputs.push(Some(self.dequantize(model, graph, node, operand, None)?));
        }
        rewire(model, node, "", "Concat", &inputs);
        let output = model.node(node).output(0).ok_or(Reason::NoOutput)?;
        self.quantize(model, node, output, params, below);
        Ok(Change::OnDequantized { op: "Concat".to_owned() })
    }

    /// `MatMulIntegerToFloat`, whose operands come before their scales and zero points.
    fn float_product(&mut self, model: &mut Model, graph: GraphId, node: NodeId) -> Result<Change, Reason> {
        let at = model.node(node);
        let given = |index: usize| at.input(index).ok_or(Reason::MissingInput { input: index });
        let a = (given(0)?, given(2)?, at.input(4));
        let b = (given(1)?, given(3)?, at.input(5));
        let bias = at.input(6);
        let rank = model.constant(b.0).map(|w| w.dims().len() as i64);
        let columns = scale_count(model, b.1)? != 1;
        if scale_count(model, a.1)? != 1 || (columns && rank != Some(2)) {
            return Err(Reason::WrongCount { what: "scales".into(), per: "operand or column of a matrix".into() });
        }
        let left = self.dequantize(model, graph, node, a, None)?;
        let right = self.dequantize(model, graph, node, b, columns.then_some(1))?;
        rewire(model, node, "", "MatMul", &[Some(left), Some(right)]);
        if let Some(bias) = bias {
            add_behind(model, node, bias);
        }
        Ok(Change::OnDequantized { op: "MatMul".to_owned() })
    }

    /// The numbers of codes, in front of a node.
    fn dequantize(
        &mut self,
        model: &mut Model,
        graph: GraphId,
        node: NodeId,
        (codes, scale, zero): Triple,
        axis: Option<i64>,
    ) -> Result<ValueId, Reason> {
        let zero = match zero {
            Some(zero) if axis.is_some() => Some(spread(model, graph, scale, zero)?),
            other => other,
        };
        let constant = model.constant(codes).is_some();
        let key = (graph, (codes, scale, zero));
        if let Some(&value) = self.made.get(&key).filter(|_| !constant) {
            return Ok(value);
        }
        let name = model.value(codes).name();
        let base = name.strip_suffix("_quantized").filter(|b| !b.is_empty()).unwrap_or(name).to_owned();
        let inputs: Vec<ValueId> = [Some(codes), Some(scale), zero].into_iter().flatten().collect();
        let output = format!("{base}_dequantized");
        let mut new = NewNode::new("DequantizeLinear", format!("{base}_DequantizeLinear"), &inputs, &[&output]);
        if let Some(axis) = axis {
            new = new.with(Attr::int("axis", axis));
        }
        let made = model.insert(Place::Before(node), new);
        let value = model.node(made).output(0).ok_or(Reason::NoOutput)?;
        if let Some(shape) = model.shape(codes) {
            model.set_type(value, tensor_type(DataType::Float, Some(&shape)));
        }
        self.made.insert(key, value);
        Ok(value)
    }

    /// Quantizes an output of a node, which may be `below` zero; its readers read these codes, which have its name.
    fn quantize(&mut self, model: &mut Model, node: NodeId, output: ValueId, params: Params, below: bool) {
        let name = model.value(output).name().to_owned();
        let base = name.strip_suffix("_quantized").filter(|b| !b.is_empty());
        let base = base.map_or_else(|| format!("{name}_float"), str::to_owned);
        let shape = model.shape(output);
        let typed = model.value(output).ty().is_some();
        let float = tensor_type(DataType::Float, shape.as_deref());
        let (mut last, mut source, mut fresh) = (node, output, base.clone());
        if below && is_positive(model, output, Some(params.zero)) {
            let new = NewNode::new("Relu", format!("{base}_Relu"), &[output], &[&base]);
            last = model.insert(Place::After(node), new);
            let Some(positive) = model.node(last).output(0) else { return };
            if typed {
                model.set_type(positive, float.clone());
            }
            (source, fresh) = (positive, format!("{base}_signed"));
        }
        let label = format!("{base}_QuantizeLinear");
        let inputs = [source, params.scale, params.zero];
        let new = NewNode::new("QuantizeLinear", label, &inputs, &[&format!("{name}_codes")]);
        let quantize = model.insert(Place::After(last), new);
        let Some(codes) = model.node(quantize).output(0) else { return };
        let own = |user: User| matches!(user, User::Node { node, .. } if node == quantize || (node == last && source != output));
        model.replace_uses(output, codes, |user| !own(user));
        model.take_name(output, codes, &fresh);
        if typed {
            model.set_type(output, float);
            model.set_type(codes, tensor_type(params.dtype, shape.as_deref()));
        }
        self.known.insert(codes, params);
    }
}

/// Whether the least code stands for zero.
fn is_positive(model: &Model, codes: ValueId, zero: Option<ValueId>) -> bool {
    let Some(zero) = zero else { return model.dtype(codes) == Some(DataType::Uint8) };
    let Some(zero) = model.constant(zero) else { return false };
    let least = if zero.dtype() == DataType::Int8 { -128 } else { 0 };
    matches!(zero.to_i64().as_deref(), Some([number]) if *number == least)
}

/// Whether an operator on codes has scales of channels, which a DequantizeLinear has from opset 13 on.
fn has_channels(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    let index = match at.op_type() {
        "QLinearConv" | "QLinearMatMul" | "QGemm" => 4,
        "MatMulIntegerToFloat" => 3,
        _ => return false,
    };
    model.constant_input(node, index).is_some_and(|scale| scale.len() > 1)
}

/// The axis of the scales of each operand, where there are several.
fn axes(model: &Model, node: NodeId, layout: &Layout, operands: &[Triple]) -> Result<Vec<Option<i64>>, Reason> {
    let mut axes = vec![None; operands.len()];
    for (index, &(codes, scale, _)) in operands.iter().enumerate() {
        if scale_count(model, scale)? == 1 {
            continue;
        }
        let rank = model.constant(codes).map(|w| w.dims().len() as i64);
        let listed = model.constant(scale).is_some_and(|s| s.dims().len() == 1);
        axes[index] = match layout.float {
            _ if index == 0 || !listed => None,
            "Conv" => Some(0),
            "Gemm" => Gemm::of(model.node(node)).map(|gemm| gemm.columns() as i64),
            "MatMul" if rank == Some(2) => Some(1),
            _ => None,
        };
        if axes[index].is_none() {
            return Err(Reason::WrongScales {
                tensor: model.value(codes).name().into(),
                wanted: "one scale per channel".into(),
            });
        }
    }
    Ok(axes)
}

fn triple(model: &Model, node: NodeId, input: usize) -> Result<Triple, Reason> {
    let at = model.node(node);
    let given = |index: usize| at.input(index).ok_or(Reason::MissingInput { input: index });
    Ok((given(input)?, given(input + 1)?, at.input(input + 2)))
}

fn scale_count(model: &Model, scale: ValueId) -> Result<usize, Reason> {
    let count = model.constant(scale).filter(|s| s.dtype() == DataType::Float).map(Tensor::len);
    count.ok_or_else(|| scale_is_no_float(model, scale))
}

/// Why a value cannot be read as scales.
fn scale_is_no_float(model: &Model, scale: ValueId) -> Reason {
    let tensor = model.value(scale).name().into();
    match model.constant(scale) {
        Some(found) => Reason::WrongTensorType { tensor, found: found.dtype(), wanted: "float".into() },
        None => Reason::TensorNotConstant { tensor },
    }
}

/// The parameters of a result, whose scale is input `at`; none where it is in floats.
fn result(
    model: &mut Model,
    graph: GraphId,
    node: NodeId,
    at: usize,
    operand: Triple,
) -> Result<Option<Params>, Reason> {
    let Some(scale) = model.node(node).input(at) else { return Ok(None) };
    if scale_count(model, scale)? != 1 {
        return Err(Reason::WrongCount { what: "scales".into(), per: "result".into() });
    }
    // Without a zero point the result has the type of the operand.
    let given = model.node(node).input(at + 1);
    let typed = given.or(operand.2);
    let dtype = typed.and_then(|z| model.constant(z).map(Tensor::dtype).or_else(|| model.dtype(z)));
    let dtype = dtype
        .or_else(|| model.dtype(operand.0))
        .ok_or_else(|| Reason::UnknownType { tensor: model.value(operand.0).name().into() })?;
    let zero = match given {
        Some(zero) => zero,
        None => zero_like(model, graph, scale, dtype),
    };
    Ok(Some(Params { scale, zero, dtype }))
}

/// The scale of the sum, times `alpha`.
fn bias_scale(model: &Model, node: NodeId, operands: &[Triple]) -> Result<Vec<f32>, Reason> {
    let numbers = |value: ValueId| {
        let found = model.constant(value).and_then(Tensor::to_f32);
        found.ok_or_else(|| scale_is_no_float(model, value))
    };
    let [a, b] = operands else { return Err(Reason::Missing { what: Operand::Operand }) };
    let left = numbers(a.1)?.first().copied().ok_or(Reason::Missing { what: Operand::Scale })?;
    let alpha = Gemm::of(model.node(node)).unwrap_or_default().alpha;
    Ok(numbers(b.1)?.into_iter().map(|right| alpha * (left * right)).collect())
}

/// A zero point for each scale, where one is for all.
fn spread(model: &mut Model, graph: GraphId, scale: ValueId, zero: ValueId) -> Result<ValueId, Reason> {
    let count = scale_count(model, scale)?;
    let tensor = model.constant(zero).ok_or(Reason::NotConstant { what: Operand::ZeroPoint })?;
    match tensor.len() {
        len if len == count && tensor.dims().len() == 1 => Ok(zero),
        1 => {
            let byte = tensor.raw().first().copied().ok_or(Reason::Empty { what: Operand::ZeroPoint })?;
            let (dtype, name) = (tensor.dtype(), model.value(zero).name().to_owned());
            if dtype.bits() != Some(8) {
                return Err(Reason::WrongType {
                    what: Operand::ZeroPoint,
                    found: dtype,
                    wanted: "int8 or uint8".into(),
                });
            }
            Ok(model.add_initializer(graph, &name, Tensor::new(dtype, &[count], vec![byte; count])))
        }
        _ => Err(Reason::WrongCount { what: "zero points".into(), per: "scale".into() }),
    }
}
