//! Half and bfloat16 become float32: tract emulates the one and lacks the other. Casts to smaller types become operators of
//! our own.
//!
//! Constants are widened when they are handed to the engine; here it is the attributes that name or hold a type.

use bytes::Bytes;

use super::engine::NARROW;
use super::program::{Program, attr, is_default};
use crate::ir::Tensor;
use crate::onnx::{DataType, GraphProto, NodeProto, TensorProto, TypeProto, type_proto};

/// Attributes that name an element type.
const TYPE_ATTRIBUTES: [&str; 6] =
    ["to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"];

/// Rewrites every step.
pub(super) fn widen(program: &mut Program) {
    for step in &mut program.steps {
        widen_node(&mut step.node);
    }
}

fn is_half(code: i32) -> bool {
    code == DataType::Float16.code() || code == DataType::Bfloat16.code()
}

/// Whether tract lacks the type, and tensors of it are kept in another.
pub(super) fn is_narrow(dtype: DataType) -> bool {
    dtype.format().is_some_and(|format| format.bits() < 8 || !format.is_integer())
}

fn widen_node(node: &mut NodeProto) {
    let to = attr(node, "to").and_then(|a| a.i).and_then(|code| DataType::from_code(i32::try_from(code).ok()?));
    if node.op_type() == "Cast" && is_default(node.domain()) && to.is_some_and(is_narrow) {
        node.op_type = Some(NARROW.to_owned());
    }
    for attribute in &mut node.attribute {
        let names_type = TYPE_ATTRIBUTES.contains(&attribute.name.as_deref().unwrap_or(""));
        if names_type && attribute.i.is_some_and(|code| i32::try_from(code).is_ok_and(is_half)) {
            attribute.i = Some(DataType::Float.code().into());
        }
        attribute.t.iter_mut().chain(&mut attribute.tensors).for_each(widen_tensor);
        attribute.g.iter_mut().chain(&mut attribute.graphs).for_each(widen_graph);
    }
}

fn widen_graph(graph: &mut GraphProto) {
    graph.node.iter_mut().for_each(widen_node);
    graph.initializer.iter_mut().for_each(widen_tensor);
    for info in graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info) {
        if let Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) = &mut info.r#type
            && tensor.elem_type.is_some_and(is_half)
        {
            tensor.elem_type = Some(DataType::Float.code());
        }
    }
}

/// Widens a tensor in an attribute or a body; damaged ones are left for the engine to refuse.
fn widen_tensor(proto: &mut TensorProto) {
    if !proto.data_type.is_some_and(is_half) {
        return;
    }
    let Ok(tensor) = Tensor::from_proto(proto.clone(), None) else { return };
    let Some(values) = tensor.to_f32() else { return };
    proto.int32_data.clear();
    proto.data_type = Some(DataType::Float.code());
    proto.raw_data = Some(Bytes::from(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()));
}
