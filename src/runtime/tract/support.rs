//! Checks what the engine supports. Operators that it lacks, or silently computes wrongly, are refused here by name.

use super::engine;
use super::program::{Program, Step, attr, bodies, is_default, refusal};
use crate::error::Result;
use crate::onnx::{DataType, NodeProto};

/// Operators of com.microsoft that the engine implements; it looks operators up without their domain.
const MICROSOFT: [&str; 9] = [
    "BiasGelu",
    "FastGelu",
    "FusedMatMul",
    "Gelu",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "QuickGelu",
    "RotaryEmbedding",
    "SkipLayerNormalization",
];

/// Operators that ONNX Runtime serves in com.microsoft and in the default domain alike, and those that only exist there
/// but are written without a domain.
const MICROSOFT_NORMS: [&str; 2] = ["SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"];

/// Operators of ai.onnx.ml that the engine implements.
const ML: [&str; 6] = [
    "ArrayFeatureExtractor",
    "CategoryMapper",
    "LinearClassifier",
    "LinearRegressor",
    "Normalizer",
    "TreeEnsembleClassifier",
];

/// Operators that the engine looks up by names that a file may also use in another domain.
const MICROSOFT_ONLY: [&str; 5] =
    ["FusedMatMul", "GroupQueryAttention", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu"];

/// Checks every step and every node in a body.
///
/// # Errors
/// The first that cannot be run, with the reason.
pub(super) fn check(program: &Program) -> Result<()> {
    for step in &program.steps {
        if let Some(why) = reason(&step.node) {
            return Err(step.refuse(why));
        }
        // Bodies are built with the shapes that they run on.
        if bodies(&step.node).next().is_none() {
            engine::check(step)?;
        }
        check_bodies(step, &step.node)?;
    }
    Ok(())
}

fn check_bodies(step: &Step, node: &NodeProto) -> Result<()> {
    for body in bodies(node) {
        for inner in &body.node {
            let stale = step.opset < 11 && inner.op_type() == "Resize";
            // Rewritten in the main graph only.
            if let Some(why) = if stale { Some("Resize before opset 11".to_owned()) } else { reason(inner) } {
                return Err(refusal(why).at_node(&format!("{} in {}", inner.name(), step.origin.0), inner.op_type()));
            }
            check_bodies(step, inner)?;
        }
    }
    Ok(())
}

/// Why a node cannot be run, if so.
fn reason(node: &NodeProto) -> Option<String> {
    let op = node.op_type();
    let known = match node.domain() {
        domain if is_default(domain) => engine::knows(op) && !MICROSOFT_ONLY.contains(&op) && !ML.contains(&op),
        "com.microsoft" => MICROSOFT.contains(&op) || MICROSOFT_NORMS.contains(&op),
        "ai.onnx.ml" => ML.contains(&op),
        _ => false,
    };
    if !known {
        let domain = if is_default(node.domain()) { "" } else { node.domain() };
        let shown = if domain.is_empty() { op.to_owned() } else { format!("{domain}::{op}") };
        return Some(format!("operator {shown} is not implemented"));
    }
    attribute_reason(node, op)
}

fn attribute_reason(node: &NodeProto, op: &str) -> Option<String> {
    let int = |name: &str| attr(node, name).and_then(|a| a.i).unwrap_or(0);
    let text =
        |name: &str| attr(node, name).and_then(|a| a.s.as_ref()).map(|s| String::from_utf8_lossy(s).into_owned());
    match op {
        "BatchNormalization" | "Dropout" if int("training_mode") != 0 => {
            Some(format!("{op} in training mode is not implemented"))
        }
        "Cast" if i32::try_from(int("to")).ok().and_then(DataType::from_code) == Some(DataType::Float8e8m0) => {
            Some("casting to float8e8m0 is not implemented".to_owned())
        }
        "Celu" => Some("Celu inside a branch or loop is not implemented".to_owned()),
        "SpaceToDepth" if text("mode").is_some_and(|m| m != "DCR") => {
            Some("SpaceToDepth in a mode other than DCR is not implemented".to_owned())
        }
        _ => None,
    }
}
