//! Folds quantizers over constants: QuantizeLinear of an initializer becomes a packed integer initializer.
//!
//! The codes are those of ONNX QuantizeLinear, bit for bit. The float weight stays until nobody uses it
//! ([`drop_dead`](super::drop_dead) removes it then). A quantizer whose result cannot be stored (an element type newer
//! than the schema, a scale that is not constant) is left as it is.

use super::support::granularity::{granularity, scales};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Quantizer;
use crate::ir::{Model, NodeId, Tensor};
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
        let quantizers: Vec<NodeId> = model
            .all_graphs()
            .into_iter()
            .flat_map(|g| model.graph(g).nodes().to_vec())
            .filter(|&n| model.node(n).is("QuantizeLinear") && model.constant_input(n, 0).is_some())
            .collect();
        for node in quantizers {
            let name = model.node_name(node).to_owned();
            match folded(model, node).map_err(|e| e.at_node(&name, "QuantizeLinear"))? {
                Ok((tensor, scales)) => {
                    let Some(output) = model.node(node).output(0) else { continue };
                    let dtype = tensor.dtype();
                    model.make_constant(output, tensor);
                    model.remove(&[node]);
                    outcome.changed(model.value(output).name(), Change::StoredAs { dtype, scales });
                }
                Err(why) => outcome.skipped(name, why),
            }
        }
        Ok(outcome)
    }
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
