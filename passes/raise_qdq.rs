//! `MatMulNBits` and `GatherBlockQuantized` become standard operators behind a DequantizeLinear, codes and scales as they
//! were; the operator set is raised as far as the codes need it.
//!
//! Each reader of a constant has a DequantizeLinear of its own, over shared initializers: that is what runtimes fuse, and
//! one that several products read in the input is divided. A product's weight is `[K, N]`, in blocks along K.

use std::collections::BTreeMap;

use super::forms::{MICROSOFT, Pair, Quantized, find_dequantized};
use super::lower_gather::table_codes;
use super::lower_matmulnbits::{add_behind, base_name, in_function};
use super::raise_opset::raise;
use super::{Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, User, ValueId};

/// See the module.
#[derive(Debug)]
pub struct RaiseQdq;

impl Pass for RaiseQdq {
    fn name(&self) -> &'static str {
        "raise-qdq"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let graphs: Vec<GraphId> = model.all_graphs().into_iter().filter(|&g| !in_function(model, g)).collect();
        let nodes: Vec<NodeId> = graphs.iter().flat_map(|&g| model.graph(g).nodes().to_vec()).collect();
        let mut made = BTreeMap::new();
        let mut since = (0, 0);
        for &node in &nodes {
            let at = model.node(node);
            let name = model.node_name(node).to_owned();
            let done = match (at.domain(), at.op_type()) {
                (MICROSOFT, "MatMulNBits") => product(model, node, &mut made, &mut since),
                (MICROSOFT, "GatherBlockQuantized") => gather(model, node, &mut made, &mut since),
                _ => continue,
            };
            match done {
                Ok(text) => outcome.changed(name, text),
                Err(why) => outcome.skipped(name, why),
            }
        }
        for node in nodes {
            divide(model, node, &mut outcome);
        }
        let (opset, ir) = since;
        if model.opset().is_some_and(|has| has < opset) {
            let raised = raise(model, opset)?;
            outcome.changed("model", format!("operator set raised to {opset}"));
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

fn product(model: &mut Model, node: NodeId, cache: &mut Cache, since: &mut (i64, i64)) -> Result<String, String> {
    let at = model.node(node);
    let graph = at.graph().ok_or("it is in no graph")?;
    let sizes = ["N", "K", "bits", "block_size"].map(|name| at.int(name)).to_vec();
    let key = (graph, [1, 2, 3].map(|i| at.input(i)), sizes);
    let name = base_name(model, at.input(1));
    let made = if let Some(found) = cache.get(&key) {
        found.clone()
    } else {
        let pair = Quantized::from_nbits(model, node)?.transposed()?.to_qdq()?;
        let made = store(model, graph, &name, &pair, since);
        cache.insert(key, made.clone());
        made
    };
    let bias = model.node(node).input(5);
    let weight = dequantize(model, node, &name, &made).ok_or("a DequantizeLinear has an output")?;
    model.truncate_inputs(node, 1);
    model.set_input(node, 1, Some(weight));
    model.set_op(node, "", "MatMul");
    for name in ["K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked"] {
        model.remove_attr(node, name);
    }
    if let Some(bias) = bias {
        add_behind(model, node, bias);
    }
    Ok(format!("MatMul of dequantized {}", made.pair.codes.dtype()))
}

fn gather(model: &mut Model, node: NodeId, cache: &mut Cache, since: &mut (i64, i64)) -> Result<String, String> {
    let at = model.node(node);
    let graph = at.graph().ok_or("it is in no graph")?;
    let sizes = ["quantize_axis", "bits", "block_size"].map(|name| at.int(name)).to_vec();
    let key = (graph, [0, 2, 3].map(|i| at.input(i)), sizes);
    let name = base_name(model, at.input(0));
    let axis = at.int("gather_axis").unwrap_or(0);
    let indices = at.input(1).ok_or("it has no indices")?;
    let made = if let Some(found) = cache.get(&key) {
        found.clone()
    } else {
        let codes = table_codes(model, node).ok_or("its codes are not constant")?;
        let pair = Quantized::from_gather(model, node, &codes)?.to_qdq()?;
        let made = store(model, graph, &name, &pair, since);
        cache.insert(key, made.clone());
        made
    };
    let table = dequantize(model, node, &name, &made).ok_or("a DequantizeLinear has an output")?;
    model.truncate_inputs(node, 2);
    model.set_input(node, 0, Some(table));
    model.set_input(node, 1, Some(indices));
    model.set_op(node, "", "Gather");
    for name in ["gather_axis", "quantize_axis", "bits", "block_size"] {
        model.remove_attr(node, name);
    }
    if axis != 0 {
        model.set_attr(node, Attr::int("axis", axis));
    }
    Ok(format!("Gather of dequantized {}", made.pair.codes.dtype()))
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
        outcome.changed(name, format!("one for each of its {} readers", divided + 1));
    }
}
