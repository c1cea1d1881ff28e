//! ONNX's own test data: a folder with a tensor in each of `input_0.pb`, `input_1.pb` and so on.

use std::path::Path;

use prost::Message;

use super::convert::convert;
use super::inputs::Input;
use super::npy::Element;
use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;
use crate::onnx::{DATA_LOCATION_EXTERNAL, DataType, TensorProto};

/// The number in a file's name, if it is that of an input.
pub(super) fn position(file: &str) -> Option<usize> {
    file.strip_prefix("input_")?.strip_suffix(".pb")?.parse().ok()
}

/// Which input the file gives, and its shape. The tensor's own name decides, then the file's number.
pub(super) fn open(path: &Path, position: usize, inputs: &[Input]) -> Result<(usize, Vec<usize>)> {
    let tensor = read(path)?;
    let name = tensor.proto().name.as_deref().unwrap_or("");
    let ordered = inputs.iter().enumerate().filter(|(_, i)| i.required);
    let ordered = ordered.chain(inputs.iter().enumerate().filter(|(_, i)| !i.required));
    let Some(at) = inputs.iter().position(|i| i.name == name).or_else(|| ordered.map(|(at, _)| at).nth(position))
    else {
        return Err(Error::new(Kind::Samples, format!("the model has no input number {position}"))
            .in_file(path)
            .with_hint("inputs are counted from 0"));
    };
    let input = &inputs[at];
    if tensor.dtype() == DataType::String {
        if input.dtype != Some(DataType::String) {
            return Err(Error::new(Kind::Samples, "the samples give strings, but the input takes numbers")
                .at_value(&input.name)
                .in_file(path));
        }
    } else if input.dtype != Some(tensor.dtype()) {
        input.element(Element::Type(tensor.dtype())).map_err(|e| e.in_file(path))?;
    }
    let dims = tensor.dims();
    input.fit(&dims, false).map_err(|e| e.in_file(path))?;
    Ok((at, dims))
}

/// The tensor in a file, in the element type `wanted` where there is one.
pub(super) fn load(path: &Path, wanted: Option<DataType>) -> Result<Tensor> {
    let tensor = read(path)?;
    let given = tensor.dtype();
    let dims = tensor.dims();
    if given == DataType::String {
        return Ok(tensor);
    }
    let wanted = wanted.unwrap_or(given);
    match convert(tensor.raw().into(), given, wanted) {
        Some(bytes) => Ok(Tensor::new(wanted, &dims, bytes)),
        None => Err(Error::new(Kind::Samples, "the file changed while it was used").in_file(path)),
    }
}

fn read(path: &Path) -> Result<Tensor> {
    let fail = |message: String| Error::new(Kind::Samples, message).in_file(path);
    let bytes = std::fs::read(path).map_err(|e| Error::io(Kind::Samples, "read", path, e))?;
    let proto = TensorProto::decode(bytes::Bytes::from(bytes)).map_err(|e| {
        fail(format!("not an ONNX tensor: {e}")).with_hint("is the file complete? sequences and maps are not supported")
    })?;
    if proto.data_location == Some(DATA_LOCATION_EXTERNAL) {
        return Err(fail("the tensor has its data in another file".to_owned()).with_hint("save it with its data"));
    }
    Tensor::from_proto(proto, None).map_err(|e| fail(e.message().to_owned()))
}
