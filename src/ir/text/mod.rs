//! ONNX's textual syntax (`onnx/docs/Syntax.md`): models printed for people, and small models written by them.
//!
//! [`print()`] and [`parse()`] follow `onnx.printer` and `onnx.parser` of onnx 1.23. `#` starts a comment that ends with
//! its line; there is no other kind. A quoted name may hold any text, `\` before a character means that character.
//!
//! The text carries what a model computes: graphs, bodies, functions, types, tensors, attributes, the model's own
//! header and metadata. It does not carry doc strings and metadata below the model's level (a function's doc string
//! excepted), denotations, quantization annotations, training graphs, device configurations, or which of its storage
//! forms a tensor has. `parse(print(model))` equals the model in everything else.
//!
//! Tensors of more than [`PrintOptions::limit`] elements are elided: `float[64,3,3,3] W = ...`. [`parse()`] refuses
//! such a text; [`parse_with_fill`] accepts it, also spelled `{...}`, and fills in pseudo-random numbers.
//!
//! # Elements
//! As in `onnx.parser`, 16-bit and 8-bit floats are written as their codes: `float16 one = {15360}`. Elements of less
//! than a byte are written one by one, `int4[3] w = {-8, 0, 7}`. `onnx.parser` accepts that text but stores an entry
//! for each element where ONNX packs several into one; [`PrintOptions::portable`] prints the packed bytes instead, and
//! [`parse()`] accepts either, telling them apart by their number.
//!
//! # Extensions
//! What the official grammar cannot express has a syntax that `onnx.parser` refuses rather than misreads, except for
//! lists of messages:
//!
//! - a float literal in a tensor of small floats is a value, not a code: `float16 one = {1.0}`. It is rounded to the
//!   nearest 16-bit float, and must be exact in a smaller format ([`PrintOptions::values`] prints this form);
//! - `hex"00ff"` is a string that is not UTF-8;
//! - `nan(0x7f800001)` is a NaN with those bits; `nan` and `-nan` are the quiet ones;
//! - attribute names, operators, domains, overloads and the names of tensors and graphs in attributes may be quoted;
//! - lists of tensors, graphs and types (`onnx.parser` reads and loses them);
//! - `sparse_tensor(float[9]) w = {float[2] {1, 2}, int64[2] {0, 5}}`: a sparse tensor by values and indices;
//! - the element types `float6e2m3`, `float6e3m2`, and `undefined`; `seq()`, `optional()` and `map(int64)` without
//!   their element's type.

mod attributes;
mod elements;
mod parse;
mod print;
mod tensors;
mod tokens;

use super::{Model, verify};
use crate::error::{Error, Result};

/// Options of [`print_with`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrintOptions {
    /// Tensors with more elements than this are elided. `usize::MAX` elides none.
    pub limit: usize,
    /// Floats of 16 bits and less as values (`1.5`) instead of codes. Only amax reads that.
    pub values: bool,
    /// A syntax that `onnx.parser` reads correctly: elements of less than a byte as the bytes they are packed into, and
    /// no names of tensors in attributes that would need quotes. Overrides `values`. Extensions without an official
    /// spelling stay.
    pub portable: bool,
}

impl Default for PrintOptions {
    /// 16 elements, codes, one by one.
    fn default() -> Self {
        Self { limit: 16, values: false, portable: false }
    }
}

impl PrintOptions {
    /// No elision, in the syntax that `onnx.parser` reads correctly.
    #[must_use]
    pub fn portable() -> Self {
        Self { limit: usize::MAX, values: false, portable: true }
    }
}

/// The model as text, with the default [`PrintOptions`]: one node, initializer or `value_info` entry per line, large
/// tensors elided. The same model gives the same text.
#[must_use]
pub fn print(model: &Model) -> String {
    print_with(model, &PrintOptions::default())
}

/// The model as text. See [`print()`].
#[must_use]
pub fn print_with(model: &Model, options: &PrintOptions) -> String {
    let mut inline = |tensor: &mut crate::onnx::TensorProto, bytes| {
        tensor.data_location = None;
        tensor.external_data.clear();
        tensor.raw_data = Some(bytes);
    };
    print::model(&model.to_proto(&mut inline), options)
}

/// Reads a model from text and verifies it.
///
/// # Errors
/// [`Kind::Model`](crate::error::Kind::Model): text that does not follow the grammar, with line, column and the line
/// itself; elided tensors; tensors whose number of elements does not fit their shape; tensors stored in other files;
/// a model that is not valid.
pub fn parse(text: &str) -> Result<Model> {
    build(text, false)
}

/// As [`parse()`], but tensors that are elided (`...` or `{...}`) get pseudo-random elements, which depend on the
/// tensor's name, type and shape only.
///
/// Floats are uniform in [-1, 1) and rounded to their type; floats of 8 bits and less are any finite code, `float8e8m0`
/// a power of two from 2⁻⁸ to 1; integers of up to 8 bits are any value, wider ones -128 to 127, or 0 to 255 where
/// they have no sign; strings are the decimals 0 to 255.
///
/// # Errors
/// As [`parse()`]; also an elided tensor of more than 2²⁶ elements.
pub fn parse_with_fill(text: &str) -> Result<Model> {
    build(text, true)
}

fn build(text: &str, fill: bool) -> Result<Model> {
    let proto = parse::model(text, fill)?;
    let mut external = |_: &crate::onnx::TensorProto| {
        Err(Error::model("the tensor is stored in another file, which a text cannot refer to")
            .with_hint("write its elements out, or elide them where the reader fills elided tensors"))
    };
    let model = Model::from_proto(proto, &mut external)?;
    verify::verify(&model)?;
    Ok(model)
}
