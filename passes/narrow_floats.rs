//! What computes in float32 computes in float16 or bfloat16, where that is asked for.
//!
//! Norms, softmax, powers, exponentials and long sums stay in float32, and what is computed from them alone as well, up to the
//! next product with a weight: positions and angles have more digits than 16 bits hold. So does what the type is not defined
//! for. Constants that are too large for the type become its largest numbers. Casts stand where the two meet.

use std::collections::{BTreeMap, HashSet};

use super::support::retype::{float_types, is_last, retype};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::MICROSOFT;
use crate::ir::{Model, NodeId, ValueId};
use crate::onnx::DataType;
use crate::ops;

/// Operators that need more digits or a larger range than 16 bits have.
const WIDE: &[&str] = &[
    "BatchNormalization",
    "CumSum",
    "Exp",
    "GroupNorm",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "Pow",
    "RMSNormalization",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Softmax",
    "Softplus",
];

/// Operators that have no 16-bit floats.
const UNDEFINED: &[&str] = &[
    "DFT",
    "DynamicQuantizeLinear",
    "MaxRoiPool",
    "MelWeightMatrix",
    "NonMaxSuppression",
    "QuantizeLinear",
    "Range",
    "Resize",
    "STFT",
    "Upsample",
];

/// Those that have bfloat16 since opset 13.
const BFLOAT16: &[&str] = &[
    "Add",
    "Cast",
    "Concat",
    "DequantizeLinear",
    "Div",
    "Expand",
    "Flatten",
    "Gather",
    "GatherBlockQuantized",
    "GatherElements",
    "GatherND",
    "Gemm",
    "Identity",
    "If",
    "Loop",
    "MatMul",
    "MatMulNBits",
    "Mul",
    "Neg",
    "Pad",
    "Relu",
    "Reshape",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Sigmoid",
    "Slice",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tanh",
    "Tile",
    "Transpose",
    "Unsqueeze",
];

/// See the module.
#[derive(Debug)]
pub struct NarrowFloats;

impl Pass for NarrowFloats {
    fn name(&self) -> &'static str {
        "narrow-floats"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let Some(dtype) = context.conversion.dtype else { return Ok(outcome) };
        let types = float_types(model);
        let mut computes = BTreeMap::new();
        let mut wide: HashSet<ValueId> = HashSet::new();
        for node in model.nodes_outside_functions() {
            let at = model.node(node);
            let float = |v: &ValueId| types.contains_key(v);
            let touches = at.inputs().iter().chain(at.outputs()).flatten().any(float) || at.bodies().next().is_some();
            let known = at.domain().is_empty() || at.domain() == MICROSOFT;
            if !touches || !known || at.is("Cast") && at.output(0).is_some_and(|v| is_last(model, v)) {
                continue;
            }
            let computed = || at.inputs().iter().flatten().filter(|&&v| float(&v) && model.constant(v).is_none());
            let behind = computed().next().is_some() && computed().all(|v| wide.contains(v)) && !weighs(model, node);
            let keeps = behind || needs_float32(model, node, dtype, &types);
            if keeps {
                wide.extend(at.outputs().iter().flatten());
            }
            computes.insert(node, if keeps { DataType::Float } else { dtype });
        }
        retype(model, types, &computes);
        outcome.changed("model", Change::ComputesIn { dtype });
        Ok(outcome)
    }
}

/// Whether a node multiplies by a constant that adds something up.
fn weighs(model: &Model, node: NodeId) -> bool {
    let sums = |index: usize| {
        let dims = model.constant_input(node, index).map(crate::ir::Tensor::dims).unwrap_or_default();
        let axis = ops::constant_weight(model, node, index)
            .and_then(|_| ops::weight_layout(model, node, index, &dims)?.group_axis);
        axis.is_some_and(|axis| dims[axis] > 1)
    };
    (0..model.node(node).inputs().len()).any(sums)
}

fn needs_float32(model: &Model, node: NodeId, dtype: DataType, types: &BTreeMap<ValueId, DataType>) -> bool {
    let at = model.node(node);
    let op = at.op_type();
    let stored = ["DequantizeLinear", "GatherBlockQuantized", "MatMulNBits"].contains(&op);
    if op == "DequantizeLinear" {
        // Beside an activation it is one of two quantizers, which kernels have of float32 alone.
        let old = at.graph().and_then(|graph| model.opset_in(graph)).is_none_or(|opset| opset < 19);
        return old || model.constant_input(node, 0).is_none();
    }
    // Integers have more digits: positions do.
    let counted = op == "Cast" && at.input(0).is_some_and(|v| !types.contains_key(&v));
    let lacks = dtype == DataType::Bfloat16 && !BFLOAT16.contains(&op);
    WIDE.contains(&op) || UNDEFINED.contains(&op) || counted || lacks || ops::is_quantized(op) && !stored
}
