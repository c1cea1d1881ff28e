//! The types and shapes that the model's inputs require of samples.

use std::collections::{BTreeMap, BTreeSet};

use super::convert::{converts, numpy_name};
use super::npy::Element;
use crate::error::{Error, Kind, Result};
use crate::ir::{Def, Model};
use crate::nearest::nearest;
use crate::onnx::{DataType, tensor_shape_proto, type_proto};

/// An input of the main graph.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub(super) name: String,
    /// `None` if the model does not declare it.
    pub(super) dtype: Option<DataType>,
    /// `None` if not even the rank is known.
    pub(super) dims: Option<Vec<Dim>>,
    /// Whether it lacks a default.
    pub(super) required: bool,
}

/// A dimension of an input.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Dim {
    Fixed(usize),
    /// Chosen by each sample; the name is empty if the model gives none.
    Free(String),
}

/// How an array's shape fits an input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fit {
    /// The array is the input's value.
    One,
    /// The array's first axis counts samples.
    Rows(usize),
}

/// The inputs of the main graph, in order.
pub(super) fn inputs(model: &Model) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for id in model.graph(model.main()).inputs() {
        let value = model.value(id);
        let required = !matches!(value.def(), Def::Input { default: Some(_) });
        let dims = match value.ty().and_then(|t| t.value.as_ref()) {
            Some(type_proto::Value::TensorType(tensor)) => {
                tensor.shape.as_ref().map(|s| s.dim.iter().map(dim).collect())
            }
            None => None,
            Some(_) if !required => continue,
            Some(_) => {
                return Err(Error::new(
                    Kind::Samples,
                    "samples can only give tensors, but the model takes something else",
                )
                .at_value(value.name())
                .with_hint("cut the model so that it starts at tensors"));
            }
        };
        inputs.push(Input { name: value.name().to_owned(), dtype: model.dtype(id), dims, required });
    }
    Ok(inputs)
}

fn dim(dim: &tensor_shape_proto::Dimension) -> Dim {
    match &dim.value {
        // Exporters write 0 and -1 for "any".
        Some(tensor_shape_proto::dimension::Value::DimValue(n)) if *n > 0 => Dim::Fixed(*n as usize),
        Some(tensor_shape_proto::dimension::Value::DimParam(name)) => Dim::Free(name.clone()),
        _ => Dim::Free(String::new()),
    }
}

/// Gives free dimensions the sizes of `dims`: by name, or `INPUT.AXIS`.
pub(super) fn bind(inputs: &mut [Input], dims: &BTreeMap<String, usize>) -> Result<()> {
    let mut free: Vec<String> = Vec::new();
    let mut unused: BTreeSet<&String> = dims.keys().collect();
    for input in inputs {
        for (axis, dim) in input.dims.iter_mut().flatten().enumerate() {
            let Dim::Free(name) = dim else { continue };
            let place = format!("{}.{axis}", input.name);
            let keys = [std::mem::take(name), place];
            let given = keys.iter().find_map(|key| Some((key, *dims.get_key_value(key)?.1)));
            if let Some((key, size)) = given {
                unused.remove(key);
                *dim = Dim::Fixed(size);
            } else {
                let [name, place] = keys;
                free.push(if name.is_empty() { place } else { name.clone() });
                *dim = Dim::Free(name);
            }
        }
    }
    let Some(unknown) = unused.first() else { return Ok(()) };
    free.dedup();
    let hint = match nearest(unknown, free.iter().map(String::as_str)) {
        Some(name) => format!("did you mean {name}?"),
        None if free.is_empty() => "all other sizes are fixed".to_owned(),
        None => format!("the free dimensions are {}", free.join(", ")),
    };
    Err(Error::new(Kind::Usage, format!("no input has a free dimension {unknown}")).with_hint(hint))
}

impl Input {
    /// `[batch, 3, 224, 224]`
    pub(super) fn shape_text(&self, first: Option<&str>) -> String {
        let dims = self.dims.iter().flatten().map(|d| match d {
            Dim::Fixed(n) => n.to_string(),
            Dim::Free(name) if name.is_empty() => "?".to_owned(),
            Dim::Free(name) => name.clone(),
        });
        format!("[{}]", first.map(str::to_owned).into_iter().chain(dims).collect::<Vec<_>>().join(", "))
    }

    fn error(&self, message: String) -> Error {
        Error::new(Kind::Samples, message).at_value(&self.name)
    }

    /// Checks a shape. `rows` says whether an array may hold several samples.
    pub(super) fn fit(&self, shape: &[usize], rows: bool) -> Result<Fit> {
        let Some(dims) = &self.dims else { return Ok(Fit::One) };
        let matches = |shape: &[usize]| {
            shape.iter().zip(dims).all(|(have, dim)| match dim {
                Dim::Fixed(want) => have == want,
                Dim::Free(_) => true,
            })
        };
        if shape.len() == dims.len() && matches(shape) {
            return Ok(Fit::One);
        }
        if rows && shape.len() == dims.len() + 1 && matches(&shape[1..]) {
            return Ok(Fit::Rows(shape[0]));
        }
        let hint = if rows && shape.len() == dims.len() && shape.len() > 1 && matches(&[&[1], &shape[1..]].concat()) {
            // Many samples along the batch axis, the most common mistake.
            "these look like many samples; give them an axis of their own: array[:, None]".to_owned()
        } else if let Some(change) = rows.then(|| mended(shape, dims.len(), &matches)).flatten() {
            format!("{change} would fit: rows of shape {} are the samples", self.shape_text(None))
        } else if rows {
            format!("one sample has shape {}, many have {}", self.shape_text(None), self.shape_text(Some("samples")))
        } else {
            format!("the file must hold one sample of shape {}", self.shape_text(None))
        };
        let message = format!("the input takes {}, but the samples give {shape:?}", self.shape_text(None));
        Err(self.error(message).with_hint(hint))
    }

    /// The element type of an array's bytes, if this input accepts it.
    pub(super) fn element(&self, element: Element) -> Result<DataType> {
        let given = match (element, self.dtype) {
            (Element::Type(given), Some(wanted)) if converts(given, wanted) => return Ok(given),
            (Element::Type(given), None) => return Ok(given),
            (Element::Raw(bytes), Some(wanted)) if wanted.bits() == Some(8 * bytes) && !numpy_knows(wanted) => {
                return Ok(wanted);
            }
            (Element::Type(given), _) => numpy_name(given).to_owned(),
            (Element::Raw(bytes), _) => format!("{bytes}-byte elements of unknown type"),
        };
        let wanted = self.dtype.map_or("any type", numpy_name);
        let integers = matches!(element, Element::Type(given) if !given.is_float());
        let hint = match self.dtype {
            Some(dtype) if dtype.is_float() && integers => {
                format!("preprocess the samples as the model expects them, and save them with .astype(numpy.{wanted})")
            }
            Some(dtype) if numpy_knows(dtype) => format!("save the array with .astype(numpy.{wanted})"),
            Some(DataType::String) => "give strings as ONNX tensors, input_0.pb and so on".to_owned(),
            _ => format!("save the array with ml_dtypes' {wanted}, or as ONNX tensors, input_0.pb and so on"),
        };
        Err(self.error(format!("the input takes {wanted}, but the samples give {given}")).with_hint(hint))
    }
}

/// What in numpy makes rows of a shape, or one sample, fit: axes of 1 that are missing, or another order of the axes.
fn mended(shape: &[usize], rank: usize, matches: &dyn Fn(&[usize]) -> bool) -> Option<&'static str> {
    const INDEXED: [(&str, &[usize]); 5] = [
        ("array[:, None]", &[1]),
        ("array[:, None, None]", &[1, 1]),
        ("array[:, :, None]", &[2]),
        ("array[None]", &[0]),
        ("array[None, None]", &[0, 0]),
    ];
    const MOVED: [(&str, usize, usize); 4] = [
        ("numpy.moveaxis(array, -1, 1)", usize::MAX, 1),
        ("numpy.moveaxis(array, -1, 2)", usize::MAX, 2),
        ("numpy.moveaxis(array, 1, -1)", 1, usize::MAX),
        ("numpy.moveaxis(array, 2, -1)", 2, usize::MAX),
    ];
    let fits = |shape: &[usize]| {
        (shape.len() == rank + 1 && matches(&shape[1..])) || (shape.len() == rank && shape[0] == 1 && matches(shape))
    };
    let indexed = INDEXED.into_iter().filter_map(|(text, places)| {
        let mut shape = shape.to_vec();
        for &at in places {
            (at <= shape.len()).then(|| shape.insert(at, 1))?;
        }
        Some((text, shape))
    });
    let moved = MOVED.into_iter().filter_map(|(text, from, to)| {
        let last = shape.len().checked_sub(1)?;
        let (from, to) = (from.min(last), to.min(last));
        let mut shape = shape.to_vec();
        let axis = shape.remove(from);
        shape.insert(to, axis);
        (from != to).then_some((text, shape))
    });
    indexed.chain(moved).find(|(_, shape)| !shape.is_empty() && fits(shape)).map(|(text, _)| text)
}

fn numpy_knows(dtype: DataType) -> bool {
    use DataType::{Bool, Double, Float, Float16, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
    matches!(dtype, Float | Double | Float16 | Bool | Int8 | Int16 | Int32 | Int64 | Uint8 | Uint16 | Uint32 | Uint64)
}

/// The input that a key names.
pub(super) fn find(inputs: &[Input], key: &str) -> Result<usize> {
    if let Some(at) = inputs.iter().position(|i| i.name == key) {
        return Ok(at);
    }
    let required: Vec<usize> = (0..inputs.len()).filter(|&i| inputs[i].required).collect();
    // The key numpy chooses when it is given no name.
    if let ([only], "arr_0") = (required.as_slice(), key) {
        return Ok(*only);
    }
    let hint = match nearest(key, inputs.iter().map(|i| i.name.as_str())) {
        Some(name) => format!("did you mean \"{name}\"?"),
        None => format!("the model's inputs are {}", names(inputs.iter())),
    };
    Err(Error::new(Kind::Samples, format!("the model has no input \"{key}\"")).with_hint(hint))
}

/// `"a", "b"`
pub(super) fn names<'a>(inputs: impl Iterator<Item = &'a Input>) -> String {
    inputs.map(|i| format!("\"{}\"", i.name)).collect::<Vec<_>>().join(", ")
}
