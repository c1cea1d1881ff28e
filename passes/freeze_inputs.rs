//! Turns graph inputs that carry defaults into constants.
//!
//! - IR versions below 4 required every initializer to be listed as an input too. Such models are raised to 4.
//! - Later versions require it no more, but exporters went on (`keep_initializers_as_inputs`). Where a rewrite asks for it
//!   ([`Context::freeze_weights`]), these inputs are frozen if all of them are weights; one that may be meant to be given,
//!   and all stay.
//!
//! [`set_input`] freezes an input that the user names, to a value that the user gives.

use serde_json::Value;

use super::{Change, Context, Outcome, Pass};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor, ValueId};
use crate::nearest::nearest;
use crate::onnx::DataType;
use crate::ops;
use crate::reason::Reason;

/// See the module.
#[derive(Debug)]
pub struct FreezeInputs;

impl Pass for FreezeInputs {
    fn name(&self) -> &'static str {
        "freeze-inputs"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let old = model.ir_version() < 4;
        if !old {
            let (weights, others) = ops::inputs_with_defaults(model);
            if weights.is_empty() || !context.freeze_weights {
                return Ok(outcome);
            }
            if let Some(&other) = others.first() {
                outcome.skipped(model.value(other).name(), Reason::InputBesideWeights);
                return Ok(outcome);
            }
        }
        let main = model.main();
        for value in model.freeze_inputs(main) {
            outcome.changed(model.value(value).name(), Change::Frozen);
        }
        if old {
            outcome.changed("model", Change::IrVersion { from: model.ir_version(), to: 4 });
            model.set_ir_version(4);
        }
        Ok(outcome)
    }
}

/// Reads `NAME=VALUE`: an input of the main graph, and the constant that it is to be.
///
/// VALUE is JSON: a number, `true` or `false`, or nested lists of them in the input's shape. A single number fills an input
/// whose shape is fixed. Lists also tell the sizes of dimensions that the model leaves open.
///
/// # Errors
/// [`Kind::Usage`]: no input of this name, an input that is not a tensor of numbers, a value that is not JSON, or one that
/// does not fit the input's type or shape.
pub fn set_input(model: &Model, assignment: &str) -> Result<(ValueId, Tensor)> {
    let inputs: Vec<ValueId> = model.graph(model.main()).inputs().collect();
    let name = |v: &ValueId| model.value(*v).name();
    // Names may contain the sign themselves.
    let given = assignment.match_indices('=').map(|(at, _)| (&assignment[..at], &assignment[at + 1..]));
    let found = given.clone().find_map(|(n, text)| Some((*inputs.iter().find(|v| name(v) == n)?, text)));
    let Some((value, text)) = found else {
        let Some((wanted, _)) = given.clone().next() else {
            return Err(Error::new(Kind::Usage, format!("\"{assignment}\" is not of the form NAME=VALUE"))
                .with_hint("for example sr=16000"));
        };
        let names: Vec<&str> = inputs.iter().map(name).collect();
        let error = Error::new(Kind::Usage, format!("the model has no input \"{wanted}\""));
        return Err(match nearest(wanted, names.iter().copied()) {
            Some(near) => error.with_hint(format!("did you mean {near}?")),
            None => error.with_hint(format!("its inputs are: {}", names.join(", "))),
        });
    };
    let fail = |message: String| Error::new(Kind::Usage, message).at_value(name(&value));
    let Some(dtype) = model.dtype(value) else {
        return Err(fail("only inputs that are tensors can be set, and this one has no element type".to_owned()));
    };
    let parsed: Value = serde_json::from_str(text).map_err(|_| {
        fail(format!("\"{text}\" is not a value"))
            .with_hint("a value is a number, true, false, or lists of these in brackets")
    })?;
    let mut dims = Vec::new();
    let mut elements = Vec::new();
    flatten(&parsed, 0, &mut dims, &mut elements).map_err(fail)?;
    let declared = model.shape(value);
    let shape = || {
        let dim = |d: &Option<usize>| d.map_or("?".to_owned(), |n| n.to_string());
        declared
            .as_ref()
            .map_or("unknown".to_owned(), |d| format!("[{}]", d.iter().map(dim).collect::<Vec<_>>().join(", ")))
    };
    if let Some(declared) = &declared {
        let fits = declared.len() == dims.len() && declared.iter().zip(&dims).all(|(d, n)| d.is_none_or(|d| d == *n));
        let filled = declared.iter().copied().collect::<Option<Vec<usize>>>().filter(|_| dims.is_empty());
        match filled {
            Some(filled) => {
                let count = filled.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= MAX_FILL);
                let Some(count) = count else {
                    return Err(fail(format!("its shape {} is too large to be filled", shape())));
                };
                elements = vec![elements[0].clone(); count];
                dims = filled;
            }
            None if fits => {}
            None if dims.is_empty() => {
                return Err(fail(format!("one number cannot fill an input whose shape, {}, is not fixed", shape()))
                    .with_hint("write all values, in brackets: [0, 0, 0]"));
            }
            None => return Err(fail(format!("the value has shape {dims:?}, the input {}", shape()))),
        }
    }
    let bytes = elements.iter().map(|element| encode(element, dtype)).collect::<Result<Vec<_>, String>>();
    let bytes: Vec<u8> = bytes.map_err(fail)?.concat();
    Ok((value, Tensor::new(dtype, &dims, bytes)))
}

/// Elements that one number may stand for.
const MAX_FILL: usize = 1 << 26;

/// The elements of nested lists in row-major order, and the sizes of the lists.
fn flatten(value: &Value, depth: usize, dims: &mut Vec<usize>, out: &mut Vec<Value>) -> Result<(), String> {
    let Value::Array(items) = value else {
        if depth != dims.len() {
            return Err("lists and numbers are mixed".to_owned());
        }
        out.push(value.clone());
        return Ok(());
    };
    if depth == dims.len() {
        if !out.is_empty() {
            return Err("lists and numbers are mixed".to_owned());
        }
        dims.push(items.len());
    } else if dims[depth] != items.len() {
        return Err(format!("lists side by side have {} and {} elements", dims[depth], items.len()));
    }
    items.iter().try_for_each(|item| flatten(item, depth + 1, dims, out))
}

/// One element in the bytes of `dtype`; integers must fit, other numbers are rounded to nearest even.
fn encode(value: &Value, dtype: DataType) -> Result<Vec<u8>, String> {
    let unfit = || format!("{value} is not a value of type {dtype}");
    if dtype.is_float() {
        let number = value.as_f64().ok_or_else(unfit)?;
        let tensor = Tensor::from_f64(dtype, &[], [number]).ok_or_else(unfit)?;
        let finite = tensor.to_f64().is_some_and(|v| v.iter().all(|v| v.is_finite()));
        return if finite { Ok(tensor.raw().to_vec()) } else { Err(unfit()) };
    }
    let number = match value {
        Value::Bool(flag) if dtype == DataType::Bool => i128::from(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(integer), ..) => i128::from(integer),
            (_, Some(integer), _) => i128::from(integer),
            (.., Some(float)) if float.fract() == 0. && float.abs() < 2f64.powi(53) => float as i128,
            _ => return Err(unfit()),
        },
        _ => return Err(unfit()),
    };
    let (low, high) = match dtype {
        DataType::Bool => (0, 1),
        DataType::Int8 => (i8::MIN.into(), i8::MAX.into()),
        DataType::Uint8 => (0, u8::MAX.into()),
        DataType::Int16 => (i16::MIN.into(), i16::MAX.into()),
        DataType::Uint16 => (0, u16::MAX.into()),
        DataType::Int32 => (i32::MIN.into(), i32::MAX.into()),
        DataType::Uint32 => (0, u32::MAX.into()),
        DataType::Int64 => (i64::MIN.into(), i64::MAX.into()),
        DataType::Uint64 => (0, u64::MAX.into()),
        _ => return Err(format!("inputs of type {dtype} cannot be set")),
    };
    if !(low..=high).contains(&number) {
        return Err(unfit());
    }
    Ok(number.to_le_bytes()[..dtype.bits().unwrap_or(8) / 8].to_vec())
}
