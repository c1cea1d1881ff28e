//! `Constant` nodes become initializers, so that every later step finds weights in one place.
//!
//! Tensors keep their names and bytes. Bodies of `If`, `Loop` and `Scan` are lifted into their own initializers.
//! Functions are left alone, since they cannot hold initializers, and so is a `Constant` that is an output of its graph:
//! not every runtime returns an initializer. Sparse constants stay nodes.

use super::support::graphs::{allow_plain_initializers, graphs_outside_functions, is_graph_output};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Model, Node, NodeId, Tensor, ValueId};
use crate::onnx::{DATA_LOCATION_EXTERNAL, DataType, TensorProto};
use crate::reason::{Operand, Reason};

/// See the [module](self).
pub struct LiftConstants;

impl Pass for LiftConstants {
    fn name(&self) -> &'static str {
        "lift-constants"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut lifted = Vec::new();
        for graph in graphs_outside_functions(model) {
            for node in model.graph(graph).nodes().to_vec() {
                if !model.node(node).is("Constant") {
                    continue;
                }
                let name = model.node_name(node).to_owned();
                match lift(model, node)? {
                    Ok(value) => {
                        outcome.changed(model.value(value).name(), Change::BecameInitializer);
                        lifted.push(node);
                    }
                    Err(why) => outcome.skipped(name, why),
                }
            }
        }
        model.remove(&lifted);
        if !lifted.is_empty() {
            allow_plain_initializers(model, &mut outcome);
        }
        Ok(outcome)
    }
}

/// Makes the output of a `Constant` node an initializer; the caller removes the node. `Ok(Err(why))` if it must stay.
///
/// # Errors
/// The node holds a damaged tensor.
pub(super) fn lift(model: &mut Model, node: NodeId) -> Result<Result<ValueId, Reason>> {
    let Some(value) = model.node(node).output(0) else { return Ok(Err(Reason::NoOutput)) };
    if is_graph_output(model, value) {
        return Ok(Err(Reason::IsGraphOutput { what: Operand::Output }));
    }
    let found = tensor(model.node(node)).map_err(|e| e.at_node(model.node_name(node), "Constant"))?;
    Ok(found.map(|tensor| {
        model.make_constant(value, tensor);
        value
    }))
}

/// The tensor that a `Constant` node holds, in whichever attribute.
fn tensor(node: &Node) -> Result<Result<Tensor, Reason>> {
    let [attr] = node.attrs() else { return Ok(Err(Reason::NotOneValue)) };
    let proto = attr.proto();
    if proto.ref_attr_name.as_deref().is_some_and(|name| !name.is_empty()) {
        return Ok(Err(Reason::FunctionParameter));
    }
    let ints = |dims: Vec<i64>, values: &[i64]| typed(dims, DataType::Int64, |t| t.int64_data = values.to_vec());
    let floats = |dims: Vec<i64>, values: &[f32]| typed(dims, DataType::Float, |t| t.float_data = values.to_vec());
    let tensor = match attr.name() {
        "value" => proto.t.clone(),
        "value_int" => proto.i.map(|value| ints(vec![], &[value])),
        "value_ints" => Some(ints(vec![proto.ints.len() as i64], &proto.ints)),
        "value_float" => proto.f.map(|value| floats(vec![], &[value])),
        "value_floats" => Some(floats(vec![proto.floats.len() as i64], &proto.floats)),
        "value_string" => proto.s.clone().map(|s| typed(vec![], DataType::String, |t| t.string_data = vec![s])),
        "value_strings" => {
            let strings = proto.strings.clone();
            Some(typed(vec![strings.len() as i64], DataType::String, |t| t.string_data = strings))
        }
        "sparse_value" => return Ok(Err(Reason::Unsupported { what: "a sparse value".into() })),
        _ => None,
    };
    let Some(tensor) = tensor else { return Ok(Err(Reason::NotOneValue)) };
    if tensor.data_location == Some(DATA_LOCATION_EXTERNAL) {
        return Ok(Err(Reason::Unsupported { what: "a Constant with its data in another file".into() }));
    }
    Tensor::from_proto(tensor, None).map(Ok)
}

fn typed(dims: Vec<i64>, dtype: DataType, fill: impl FnOnce(&mut TensorProto)) -> TensorProto {
    let mut proto = TensorProto { dims, data_type: Some(dtype.code()), ..TensorProto::default() };
    fill(&mut proto);
    proto
}
