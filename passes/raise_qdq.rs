//! `MatMulNBits`, `GatherBlockQuantized`, `DynamicQuantizeLSTM`, `MatMulInteger` and `ConvInteger` become float operators behind a DequantizeLinear, codes and scales as they
//! were; the opset is raised as far as the codes need it.
//!
//! Each reader of a constant has a DequantizeLinear of its own, over shared initializers: that is what runtimes fuse, and
//! one that several products read in the input is divided. A product's weight is `[K, N]`, in blocks along K.

use std::collections::BTreeMap;

use super::forms::{MICROSOFT, Pair, QuantizedTensor, ZeroPoints, find_dequantized};
use super::lower_gather::table_codes;
use super::lower_matmulnbits::base_name;
use super::raise_opset;
use super::support::raise;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::GatherBlockQuantized;
use crate::ir::{GraphId, Model, NewNode, NodeId, Place, User, ValueId};
use crate::numerics::{Granularity, pack};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct RaiseQdq;

impl Pass for RaiseQdq {
    fn name(&self) -> &'static str {
        "raise-qdq"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let nodes = model.nodes_outside_functions();
        let mut made = BTreeMap::new();
        let mut activations = BTreeMap::new();
        let mut since = (0, 0);
        for &node in &nodes {
            let at = model.node(node);
            let name = model.node_name(node).to_owned();
            let done = match (at.domain(), at.op_type()) {
                (MICROSOFT, "MatMulNBits") => product(model, node, &mut made, &mut since),
                (MICROSOFT, "GatherBlockQuantized") => gather(model, node, &mut made, &mut since),
                (MICROSOFT, "DynamicQuantizeLSTM") => lstm(model, node, &mut since),
                ("", "MatMulInteger" | "ConvInteger") => integer(model, node, &mut made, &mut activations, &mut since),
                _ => continue,
            };
            match done {
                Ok(change) => outcome.changed(name, change),
                Err(why) => outcome.skipped(name, why),
            }
        }
        for node in nodes {
            divide(model, node, &mut outcome);
        }
        let (opset, ir) = since;
        if model.opset().is_some_and(|has| has < opset) {
            let from = model.opset().unwrap_or(0);
            let raised = raise_opset::raise(model, opset)?;
            outcome.changed("model", Change::Opset { from, to: opset });
            outcome.skips.extend(raised.skips);
        }
        if model.ir_version() < ir {
            model.set_ir_version(ir);
        }
        Ok(outcome)
    }
}

/// The initializers of a DequantizeLinear, and how its scales run.
#[derive(Clone)]
struct Made {
    inputs: [ValueId; 3],
    pair: Pair,
}

/// Pairs by the graph, the inputs and the sizes of the nodes that they were made of.
type Cache = BTreeMap<(GraphId, [Option<ValueId>; 3], Vec<Option<i64>>), Made>;

/// Puts a DequantizeLinear before a node; its result.
fn dequantize(model: &mut Model, node: NodeId, name: &str, made: &Made) -> Option<ValueId> {
    let new = NewNode::new(
        "DequantizeLinear",
        format!("{name}_DequantizeLinear"),
        &made.inputs,
        &[&format!("{name}_dequantized")],
    );
    let id = model.insert(Place::Before(node), made.pair.describe(new));
    model.node(id).output(0)
}

fn store(model: &mut Model, graph: GraphId, name: &str, pair: &Pair, since: &mut (i64, i64)) -> Made {
    *since = pair.since().max(*since);
    let codes = model.add_initializer(graph, &format!("{name}_quantized"), pair.codes.clone());
    let scale = model.add_initializer(graph, &format!("{name}_scale"), pair.scale.clone());
    let zero = model.add_initializer(graph, &format!("{name}_zero_point"), pair.zero_point.clone());
    Made { inputs: [codes, scale, zero], pair: pair.clone() }
}

fn product(model: &mut Model, node: NodeId, cache: &mut Cache, since: &mut (i64, i64)) -> Result<Change, Reason> {
    let at = model.node(node);
    let graph = at.graph().ok_or(Reason::Missing { what: Operand::Graph })?;
    let sizes = ["N", "K", "bits", "block_size"].map(|name| at.int(name)).to_vec();
    let key = (graph, [1, 2, 3].map(|i| at.input(i)), sizes);
    let name = base_name(model, at.input(1));
    let made = if let Some(found) = cache.get(&key) {
        found.clone()
    } else {
        let pair = QuantizedTensor::from_nbits(model, node)?.transposed()?.to_qdq()?;
        let made = store(model, graph, &name, &pair, since);
        cache.insert(key, made.clone());
        made
    };
    let weight = dequantize(model, node, &name, &made).ok_or(Reason::NoOutput)?;
    raise::matmul(model, node, weight);
    Ok(Change::OnDequantized { op: "MatMul".to_owned() })
}

fn gather(model: &mut Model, node: NodeId, cache: &mut Cache, since: &mut (i64, i64)) -> Result<Change, Reason> {
    let at = model.node(node);
    let graph = at.graph().ok_or(Reason::Missing { what: Operand::Graph })?;
    let attributes = GatherBlockQuantized::of(at).ok_or_else(|| Reason::NotA { op: "GatherBlockQuantized".into() })?;
    let sizes = [attributes.quantize_axis, attributes.bits, attributes.block_size].map(Some).to_vec();
    let key = (graph, [0, 2, 3].map(|i| at.input(i)), sizes);
    let name = base_name(model, at.input(0));
    at.input(1).ok_or(Reason::Missing { what: Operand::Indices })?;
    let made = if let Some(found) = cache.get(&key) {
        found.clone()
    } else {
        let codes = table_codes(model, node).ok_or(Reason::NotConstant { what: Operand::QuantizedData })?;
        let pair = QuantizedTensor::from_gather(model, node, &codes)?.to_qdq()?;
        let made = store(model, graph, &name, &pair, since);
        cache.insert(key, made.clone());
        made
    };
    let table = dequantize(model, node, &name, &made).ok_or(Reason::NoOutput)?;
    raise::gather(model, node, table);
    Ok(Change::OnDequantized { op: "Gather".to_owned() })
}

fn lstm(model: &mut Model, node: NodeId, since: &mut (i64, i64)) -> Result<Change, Reason> {
    let graph = model.node(node).graph().ok_or(Reason::Missing { what: Operand::Graph })?;
    let read =
        [(1, 8), (2, 10)].map(|(codes, scales)| QuantizedTensor::from_lstm(model, node, codes, scales)?.to_qdq());
    let [input, recurrent] = read;
    let pairs = [input?, recurrent?];
    for (index, pair) in pairs.iter().enumerate() {
        let name = base_name(model, model.node(node).input(1 + index));
        let made = store(model, graph, &name, pair, since);
        let weight = dequantize(model, node, &name, &made).ok_or(Reason::NoOutput)?;
        model.set_input(node, 1 + index, Some(weight));
    }
    model.truncate_inputs(node, 8);
    model.set_op(node, "", "LSTM");
    Ok(Change::OnDequantized { op: "LSTM".to_owned() })
}

/// Undoes [`lower_matmulinteger`](super::lower_matmulinteger), for the same operators whoever wrote them.
fn integer(
    model: &mut Model,
    node: NodeId,
    cache: &mut Cache,
    activations: &mut BTreeMap<NodeId, ValueId>,
    since: &mut (i64, i64),
) -> Result<Change, Reason> {
    let at = model.node(node);
    let graph = at.graph().ok_or(Reason::Missing { what: Operand::Graph })?;
    let conv = at.is("ConvInteger");
    let quantize = at.input(0).and_then(|v| model.producer(v));
    let quantize = quantize.filter(|&q| model.node(q).is("DynamicQuantizeLinear"));
    let quantize = quantize.ok_or(Reason::NotAtRunTime)?;
    let made = [0, 1, 2].map(|i| model.node(quantize).output(i));
    let [Some(codes), Some(scale), Some(zero_point)] = made else {
        return Err(Reason::Missing { what: Operand::Scale });
    };
    if at.input(0) != Some(codes) || at.input(2) != Some(zero_point) {
        return Err(Reason::Mismatch { what: "zero point".into(), from: "that of its input".into() });
    }
    let sum = at.output(0).ok_or(Reason::NoOutput)?;
    let only = |value: ValueId, op: &str| match model.value(value).users() {
        &[User::Node { node, input }] if model.node(node).is(op) && model.node(node).graph() == Some(graph) => {
            Some((node, input))
        }
        _ => None,
    };
    let unscaled = || Reason::NotScaledBack;
    let (cast, _) = only(sum, "Cast").ok_or_else(unscaled)?;
    let number = model.node(cast).output(0).ok_or_else(unscaled)?;
    let (mul, side) = only(number, "Mul").ok_or_else(unscaled)?;
    let both = model.node(mul).input(1 - side.min(1)).and_then(|v| model.producer(v)).ok_or_else(unscaled)?;
    let factors = [0, 1].map(|i| model.node(both).input(i));
    let weight_scale = match factors {
        [Some(a), Some(b)] if model.node(both).is("Mul") && a == scale => b,
        [Some(a), Some(b)] if model.node(both).is("Mul") && b == scale => a,
        _ => return Err(unscaled()),
    };
    let product = model.node(mul).output(0).ok_or_else(unscaled)?;
    let name = base_name(model, model.node(node).input(1));
    let at = model.node(node);
    let key = (graph, [at.input(1), Some(weight_scale), at.input(3)], vec![Some(i64::from(conv))]);
    let stored = if let Some(found) = cache.get(&key) {
        found.clone()
    } else {
        let pair = integer_weight(model, node, weight_scale, conv)?;
        let stored = store(model, graph, &name, &pair, since);
        cache.insert(key, stored.clone());
        stored
    };
    let weight = dequantize(model, node, &name, &stored).ok_or(Reason::NoOutput)?;
    let data = if let Some(&data) = activations.get(&quantize) {
        data
    } else {
        let read = model.node(quantize).input(0).map_or("", |v| model.value(v).name()).to_owned();
        let new = NewNode::new(
            "DequantizeLinear",
            format!("{read}_DequantizeLinear"),
            &[codes, scale, zero_point],
            &[&format!("{read}_dequantized")],
        );
        let id = model.insert(Place::After(quantize), new);
        let data = model.node(id).output(0).ok_or(Reason::NoOutput)?;
        activations.insert(quantize, data);
        data
    };
    model.truncate_inputs(node, 0);
    model.set_input(node, 0, Some(data));
    model.set_input(node, 1, Some(weight));
    let op = if conv { "Conv" } else { "MatMul" };
    model.set_op(node, "", op);
    if let Some(ty) = model.value(product).ty().cloned() {
        model.set_type(sum, ty);
    }
    model.replace_uses(product, sum, |_| true);
    model.take_name(product, sum, &format!("{name}_scaled"));
    model.remove(&[mul, cast]);
    if model.node(both).output(0).is_some_and(|v| model.value(v).users().is_empty()) {
        model.remove(&[both]);
    }
    // As a bias it would keep onnxruntime from seeing the product.
    if let &[User::Node { node: add, .. }] = model.value(sum).users()
        && !conv
        && model.node(add).is("Add")
    {
        model.set_op(add, "", "Sum");
    }
    Ok(Change::OnDequantized { op: op.to_owned() })
}

/// The constant of a `MatMulInteger` or `ConvInteger` with the numbers that its sums are multiplied by.
fn integer_weight(model: &Model, node: NodeId, scale: ValueId, conv: bool) -> Result<Pair, Reason> {
    let codes = model.constant_input(node, 1).ok_or(Reason::NotConstant { what: Operand::Weight })?;
    let scale = model.constant(scale).ok_or(Reason::NotConstant { what: Operand::Scale })?;
    let format = codes.dtype().format().filter(|f| f.is_integer() && f.bits() == 8);
    let format = format.ok_or_else(|| Reason::wrong_type(Operand::Weight, codes.dtype(), "int8 or uint8"))?;
    let dims = codes.dims();
    let axis = if conv { 0 } else { dims.len().saturating_sub(1) };
    let channels =
        dims.get(axis).copied().ok_or_else(|| Reason::WrongShape { what: Operand::Weight, dims: dims.clone() })?;
    let scales = scale.to_f32().filter(|_| scale.dtype() == DataType::Float);
    let scales = scales.ok_or_else(|| Reason::wrong_type(Operand::Scale, scale.dtype(), "float"))?;
    // Where the channels are in the output; what is stretched over another axis is no scale of channels.
    let place = scale.dims().iter().rposition(|&d| d != 1);
    let from_end = place.map(|p| scale.dims().len() - 1 - p);
    let expected = if conv { dims.len().saturating_sub(2) } else { 0 };
    let granularity = match scales.len() {
        1 => Granularity::PerTensor,
        n if n == channels && from_end == Some(expected) && (conv || dims.len() == 2) => {
            Granularity::PerChannel { axis }
        }
        _ => return Err(Reason::WrongCount { what: "scales".into(), per: "weight or channel".into() }),
    };
    let mut zeros = match (model.node(node).input(3), model.constant_input(node, 3)) {
        (None, _) => vec![0],
        (Some(_), Some(zero)) if zero.dtype() == codes.dtype() => pack::unpack(&zero.raw(), &format, zero.len()),
        (Some(_), _) => return Err(Reason::NotConstant { what: Operand::ZeroPoint }),
    };
    if zeros.len() == 1 {
        zeros = vec![zeros[0]; scales.len()];
    }
    if zeros.len() != scales.len() {
        return Err(Reason::WrongCount { what: "zero points".into(), per: "scale".into() });
    }
    let codes = codes.raw();
    let zero_points = ZeroPoints::Integers(zeros);
    let (scale_dtype, tensor_scale) = (DataType::Float, None);
    QuantizedTensor { format, dims, granularity, scales, scale_dtype, tensor_scale, zero_points, codes }.to_qdq()
}

/// Gives each reader of a dequantized constant one of its own.
fn divide(model: &mut Model, node: NodeId, outcome: &mut Outcome) {
    let at = model.node(node);
    let (Some(output), true) = (at.output(0), at.is("DequantizeLinear")) else { return };
    if find_dequantized(model, output).is_none() {
        return;
    }
    let inputs: Vec<ValueId> = model.node(node).inputs().iter().flatten().copied().collect();
    let attrs: Vec<_> = model.node(node).attrs().iter().map(|a| a.proto().clone()).collect();
    let others: Vec<User> = model.value(output).users().iter().skip(1).copied().collect();
    let name = model.node_name(node).to_owned();
    let mut divided = 0;
    for user in others {
        let User::Node { node: reader, input } = user else { continue };
        if model.node(reader).graph() != model.node(node).graph() {
            continue;
        }
        let mut new = NewNode::new("DequantizeLinear", name.clone(), &inputs, &[model.value(output).name()]);
        new.attrs.clone_from(&attrs);
        let copy = model.insert(Place::Before(reader), new);
        let Some(result) = model.node(copy).output(0) else { continue };
        if let Some(ty) = model.value(output).ty().cloned() {
            model.set_type(result, ty);
        }
        model.set_input(reader, input, Some(result));
        divided += 1;
    }
    if divided > 0 {
        outcome.changed(name, Change::Divided { readers: divided + 1 });
    }
}
