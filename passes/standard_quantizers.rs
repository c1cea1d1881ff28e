//! Writes quantizers that exporters declare in domains of their own as the standard operators that they mean.
//!
//! `ModelOpt` exports float8 and int8 quantizers for `TensorRT` as `trt::TRT_FP8QuantizeLinear` and kin, whose codes are
//! float8e4m3fn (or int8) although the file declares them as uint8. They become QuantizeLinear and DequantizeLinear with
//! the same scale and a zero point that names the type; the opset is raised to 19 for float8, to 21 for int4.
//! Quantizers of blocks that are scaled at run time have no standard operator: they are left, and listed.

use super::raise_opset::raise;
use super::support::graphs::graphs_outside_functions;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Model, NodeId, Tensor, tensor_type};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct StandardQuantizers;

impl Pass for StandardQuantizers {
    fn name(&self) -> &'static str {
        "standard-quantizers"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut found: Vec<(NodeId, &'static str, DataType)> = Vec::new();
        for graph in graphs_outside_functions(model) {
            for &node in model.graph(graph).nodes() {
                if model.node(node).domain() != "trt" {
                    continue;
                }
                match meaning(model, node) {
                    Ok((op, dtype)) => found.push((node, op, dtype)),
                    Err(why) => outcome.skipped(model.node_name(node), why),
                }
            }
        }
        let need = found.iter().filter_map(|(.., dtype)| dtype.quantizers_since()).max();
        if let Some((opset, ir)) = need {
            if model.opset().is_some_and(|v| v < opset) {
                outcome.changed("model", Change::Opset { from: model.opset().unwrap_or(0), to: opset });
                raise(model, opset)?;
            }
            model.set_ir_version(model.ir_version().max(ir));
        }
        for (node, op, dtype) in found {
            model.set_op(node, "", op);
            model.remove_attr(node, "trt_high_precision_dtype");
            if let Some(codes) = model.node(node).output(0).filter(|_| op == "QuantizeLinear") {
                let shape = model.shape(codes);
                model.set_type(codes, tensor_type(dtype, shape.as_deref()));
            }
            if model.node(node).input(2).is_none() {
                let dims = model.constant_input(node, 1).map(Tensor::dims).unwrap_or_default();
                let count: usize = dims.iter().product();
                let bytes = dtype.bits().map_or(0, |bits| (count * bits).div_ceil(8));
                let zero = Tensor::new(dtype, &dims, vec![0u8; bytes]);
                let Some(graph) = model.node(node).graph() else { continue };
                let name = format!("{}_zero_point", model.node_name(node));
                let zero = model.add_initializer(graph, &name, zero);
                model.set_input(node, 2, Some(zero));
            }
            outcome.changed(model.node_name(node), Change::WrittenAs { op: op.to_owned() });
        }
        Ok(outcome)
    }
}

/// The standard operator that a node of `TensorRT` means, and the type of its codes.
fn meaning(model: &Model, node: NodeId) -> Result<(&'static str, DataType), Reason> {
    let slot = model.node(node);
    let op = slot.op_type();
    let (standard, dtype) = match op {
        "TRT_FP8QuantizeLinear" => ("QuantizeLinear", DataType::Float8e4m3fn),
        "TRT_FP8DequantizeLinear" => ("DequantizeLinear", DataType::Float8e4m3fn),
        "TRT_INT8QuantizeLinear" => ("QuantizeLinear", DataType::Int8),
        "TRT_INT8DequantizeLinear" => ("DequantizeLinear", DataType::Int8),
        "DequantizeLinear" | "TRT_INT4DequantizeLinear" => {
            let codes = slot.input(0).and_then(|v| model.dtype(v));
            match codes {
                Some(dtype @ (DataType::Int4 | DataType::Int8 | DataType::Uint4)) => ("DequantizeLinear", dtype),
                Some(dtype) => {
                    return Err(Reason::Unexported { found: dtype });
                }
                None => {
                    let tensor = slot.input(0).map_or("", |v| model.value(v).name()).to_owned();
                    return Err(Reason::UnknownType { tensor });
                }
            }
        }
        _ => return Err(Reason::Unsupported { what: format!("trt::{op}") }),
    };
    let scale = slot.input(1).ok_or(Reason::Missing { what: Operand::Scale })?;
    if model.constant(scale).is_none() {
        return Err(Reason::NotConstant { what: Operand::Scale });
    }
    Ok((standard, dtype))
}
