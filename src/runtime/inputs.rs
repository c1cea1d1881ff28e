//! The inputs of a model, and checks of samples against them.

use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;
use crate::onnx::{
    DataType, TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto::dimension::Value as Dim, type_proto,
};

use super::Sample;

/// A graph input.
#[derive(Clone, Debug)]
pub(in crate::runtime) struct Input {
    pub name: String,
    pub dtype: DataType,
    /// Declared dimensions; `None` if the rank is unknown.
    pub dims: Option<Vec<Axis>>,
    /// The value if a sample does not give one.
    pub default: Option<Tensor>,
}

/// A declared dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::runtime) enum Axis {
    Fixed(usize),
    Named(String),
    Unknown,
}

impl Input {
    /// Reads a declaration.
    ///
    /// # Errors
    /// Inputs that are not tensors, or have no element type.
    pub fn new(info: &ValueInfoProto, default: Option<Tensor>) -> Result<Self, &'static str> {
        let tensor = tensor_type(info.r#type.as_ref()).ok_or("an input is not a tensor")?;
        let dtype = DataType::from_code(tensor.elem_type.unwrap_or(0)).ok_or("an input has no element type")?;
        let dims = tensor.shape.as_ref().map(axes);
        Ok(Self { name: info.name.clone().unwrap_or_default(), dtype, dims, default })
    }
}

/// The inputs that a sample gives, in the order of the model.
///
/// # Errors
/// [`Kind::Samples`] for inputs that are missing, unknown, or of the wrong type or shape.
pub(in crate::runtime) fn bind<'a>(inputs: &'a [Input], sample: &'a Sample) -> Result<Vec<(&'a Input, &'a Tensor)>> {
    if let Some(name) = sample.keys().find(|n| !inputs.iter().any(|i| i.name == **n)) {
        let known: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
        return Err(Error::new(Kind::Samples, "the sample has an input that the model does not have")
            .at_value(name)
            .with_hint(format!("the inputs are: {}", known.join(", "))));
    }
    let mut bound = Vec::with_capacity(inputs.len());
    for input in inputs {
        match sample.get(&input.name) {
            Some(tensor) => {
                fits(input, tensor)?;
                bound.push((input, tensor));
            }
            None if input.default.is_some() => {}
            None => {
                return Err(Error::new(Kind::Samples, "the sample lacks an input")
                    .at_value(&input.name)
                    .with_hint(format!("give it a tensor of type {} and shape {}", input.dtype, shape_text(input))));
            }
        }
    }
    Ok(bound)
}

/// The type of a tensor; `None` for everything else.
pub(in crate::runtime) fn tensor_type(ty: Option<&TypeProto>) -> Option<&type_proto::Tensor> {
    match ty?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor),
        _ => None,
    }
}

fn axes(shape: &TensorShapeProto) -> Vec<Axis> {
    let axis = |value: &Option<Dim>| match value {
        Some(Dim::DimValue(n)) => usize::try_from(*n).map_or(Axis::Unknown, Axis::Fixed),
        Some(Dim::DimParam(name)) if !name.is_empty() => Axis::Named(name.clone()),
        _ => Axis::Unknown,
    };
    shape.dim.iter().map(|d| axis(&d.value)).collect()
}

fn fits(input: &Input, tensor: &Tensor) -> Result<()> {
    let fail = |what: &str, expected: String, given: String| {
        Err(Error::new(Kind::Samples, format!("the sample's {what} is {given}, the model expects {expected}"))
            .at_value(&input.name))
    };
    if tensor.dtype() != input.dtype {
        return fail("type", input.dtype.to_string(), tensor.dtype().to_string());
    }
    let dims = tensor.dims();
    let Some(axes) = &input.dims else { return Ok(()) };
    let fit = axes.len() == dims.len()
        && axes.iter().zip(&dims).all(|(axis, dim)| !matches!(axis, Axis::Fixed(n) if n != dim));
    if fit { Ok(()) } else { fail("shape", shape_text(input), format!("{dims:?}")) }
}

fn shape_text(input: &Input) -> String {
    let Some(axes) = &input.dims else { return "unknown".to_owned() };
    let axis = |axis: &Axis| match axis {
        Axis::Fixed(n) => n.to_string(),
        Axis::Named(name) => name.clone(),
        Axis::Unknown => "?".to_owned(),
    };
    format!("[{}]", axes.iter().map(axis).collect::<Vec<_>>().join(", "))
}
