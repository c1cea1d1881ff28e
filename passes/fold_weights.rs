//! Folds quantizers over constants: QuantizeLinear of an initializer becomes a packed integer initializer.
//!
//! The codes are those of ONNX QuantizeLinear, bit for bit. The float weight stays until nobody uses it
//! ([`drop_dead`](super::drop_dead) removes it then). A quantizer whose result cannot be stored (an element type newer
//! than the schema, a scale that is not constant) is left as it is. Quantizers with the same operands share their codes, also
//! those in the branches of an `If`.

use std::collections::HashMap;

use super::support::granularity::{granularity, scales};
use super::support::graphs::is_graph_output;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Quantizer;
use crate::ir::{GraphId, Model, NodeId, Tensor, User, ValueId};
use crate::numerics::{self, Format, Granularity, QParams, Round, pack};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct FoldWeights;

impl Pass for FoldWeights {
    fn name(&self) -> &'static str {
        "fold-weights"
    }

    fn run(&self, model: &mut Model, _context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let homes: HashMap<ValueId, GraphId> = model
            .all_graphs()
            .into_iter()
            .flat_map(|graph| model.graph(graph).initializers().iter().map(move |&value| (value, graph)))
            .collect();
        let mut made = HashMap::new();
        let quantizers: Vec<NodeId> = model
            .all_graphs()
            .into_iter()
            .flat_map(|g| model.graph(g).nodes().to_vec())
            .filter(|&n| model.node(n).is("QuantizeLinear") && model.constant_input(n, 0).is_some())
            .collect();
        for node in quantizers {
            let name = model.node_name(node).to_owned();
            let Some(output) = model.node(node).output(0) else { continue };
            let key = key(model, node);
            if let Some(&codes) = made.get(&key).filter(|_| !is_graph_output(model, output)) {
                model.replace_uses(output, codes, |_| true);
                model.remove(&[node]);
                outcome.changed(name, Change::SharesCodes { tensor: model.value(codes).name().to_owned() });
                continue;
            }
            let dead = revive(model, node);
            match folded(model, node).map_err(|e| e.at_node(&name, "QuantizeLinear").with_hint(HINT))? {
                Ok((tensor, scales)) => {
                    let dtype = tensor.dtype();
                    // Beside the float tensor every graph that reads it finds the codes.
                    let home = model.node(node).input(0).and_then(|v| homes.get(&v).copied());
                    let codes = match home.filter(|&home| model.node(node).graph() != Some(home)) {
                        Some(home) if !is_graph_output(model, output) => {
                            let codes =
                                model.add_initializer(home, model.value(output).name().to_owned().as_str(), tensor);
                            model.replace_uses(output, codes, |_| true);
                            codes
                        }
                        _ => {
                            model.make_constant(output, tensor);
                            output
                        }
                    };
                    model.remove(&[node]);
                    made.insert(key, codes);
                    outcome.changed(model.value(codes).name(), Change::StoredAs { dtype, scales });
                    if dead > 0 {
                        outcome.changed(name, Change::DeadScales { count: dead });
                    }
                }
                Err(why) => outcome.skipped(name, why),
            }
        }
        Ok(outcome)
    }
}

const HINT: &str = "a scale of 0 can only be that of zeros; quantize the model again, or --disable this quantizer";

/// What two quantizers have in common whose codes are the same.
type Key = ([Option<ValueId>; 3], Option<[i64; 2]>, Option<DataType>);

fn key(model: &Model, node: NodeId) -> Key {
    let at = model.node(node);
    let attributes = Quantizer::of(at);
    (
        [0, 1, 2].map(|i| at.input(i)),
        attributes.as_ref().map(|q| [q.axis, q.block_size]),
        attributes.and_then(|q| q.output_dtype),
    )
}

/// Gives zeros whose scale is 0, as training leaves it of a dead channel, the scale 1, here and where they are dequantized; how
/// many scales that are.
fn revive(model: &mut Model, node: NodeId) -> usize {
    let Some(mut found) = scales(model, node).map(|(scales, _)| scales) else { return 0 };
    let zeros: Vec<usize> = (0..found.len()).filter(|&i| found[i] == 0.0).collect();
    let (Some(input), Some(scale)) = (model.constant_input(node, 0), model.node(node).input(1)) else { return 0 };
    if zeros.is_empty() || model.constant(scale).is_none_or(|t| t.dtype() != DataType::Float) {
        return 0;
    }
    let (dims, scale_dims) = (input.dims(), model.constant(scale).map(Tensor::dims).unwrap_or_default());
    let (Some(values), Ok(granularity)) = (input.to_f32(), granularity(model, node, &dims, &scale_dims)) else {
        return 0;
    };
    let dead = |at: usize| granularity.entry(&dims, at).is_ok_and(|entry| found.get(entry) == Some(&0.0));
    if values.iter().enumerate().any(|(at, value)| *value != 0.0 && dead(at)) {
        return 0;
    }
    for &i in &zeros {
        found[i] = 1.0;
    }
    let Some(graph) = model.node(node).graph() else { return 0 };
    let name = format!("{}_alive", model.value(scale).name());
    let alive = model.add_initializer(graph, &name, Tensor::from_f32(&scale_dims, &found));
    let readers = model.node(node).output(0).map(|v| model.value(v).users().to_vec()).unwrap_or_default();
    model.set_input(node, 1, Some(alive));
    for user in readers {
        if let User::Node { node: reader, input: 0 } = user
            && model.node(reader).is("DequantizeLinear")
            && model.node(reader).input(1) == Some(scale)
        {
            model.set_input(reader, 1, Some(alive));
        }
    }
    zeros.len()
}

/// The codes of a quantizer over a constant, or why there are none.
fn folded(model: &Model, node: NodeId) -> Result<Result<(Tensor, Granularity), Reason>> {
    let Some(input) = model.constant_input(node, 0) else {
        return Ok(Err(Reason::NotConstant { what: Operand::Input }));
    };
    let Some((scales, scale_dims)) = scales(model, node) else {
        return Ok(Err(Reason::NotConstant { what: Operand::Scale }));
    };
    let zero = match model.node(node).input(2) {
        Some(_) => match model.constant_input(node, 2) {
            Some(zero) => Some(zero),
            None => return Ok(Err(Reason::NotConstant { what: Operand::ZeroPoint })),
        },
        None => None,
    };
    let declared = Quantizer::of(model.node(node)).and_then(|q| q.output_dtype);
    let dtype = zero.map(Tensor::dtype).or(declared).unwrap_or(DataType::Uint8);
    let Some(format) = dtype.format() else {
        return Ok(Err(Reason::NotQuantizedType { what: Operand::Output, found: dtype }));
    };
    let Some(values) = input.to_f32() else {
        return Ok(Err(Reason::wrong_type(Operand::Input, input.dtype(), "a float")));
    };
    let dims = input.dims();
    let granularity = match granularity(model, node, &dims, &scale_dims) {
        Ok(found) => found,
        Err(why) => return Ok(Err(why)),
    };
    let zero_points = match zero {
        Some(zero) if format.is_integer() => codes(zero, format),
        _ => vec![0; scales.len()],
    };
    let qparams = QParams { scales, zero_points };
    for read in [Some(input), model.constant_input(node, 1), zero].into_iter().flatten() {
        read.release();
    }
    let raw = numerics::quantize(&values, &dims, &granularity, &qparams, format, Round::HalfEven)?;
    Ok(Ok((Tensor::new(dtype, &dims, raw), granularity)))
}

/// The integer codes of a tensor in a quantized format.
fn codes(tensor: &Tensor, format: Format) -> Vec<i32> {
    pack::unpack(&tensor.raw(), &format, tensor.len())
}
