//! A file of samples, or a folder with one sample: which inputs it gives, and how they are read.

use std::path::{Path, PathBuf};

use super::array::{Array, Spill};
use super::inputs::{self, Fit, Input};
use super::lines::Lines;
use super::npy::Element;
use super::picture::Picture;
use super::raw::Raw;
use super::stream::Streamed;
use super::{Sample, convert, pb};
use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;
use crate::onnx::DataType;

/// A file, or a folder of one sample.
#[derive(Debug)]
pub(super) struct Part {
    /// Samples in the parts before this one.
    pub(super) first: usize,
    pub(super) count: usize,
    content: Rows,
}

#[derive(Debug)]
enum Rows {
    /// Each input has a feed of its own.
    Feeds(Vec<Feed>),
    /// Each line gives all inputs.
    Lines(Lines),
}

/// An array, and the input it is for.
#[derive(Debug)]
pub(super) struct Feed {
    name: String,
    wanted: Option<DataType>,
    fit: Fit,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Array { array: Stored, given: DataType },
    Proto { path: PathBuf, dims: Vec<usize> },
    Raw(Raw),
    Picture(Picture),
}

/// An array, in a file, in memory or from a stream.
#[derive(Debug)]
pub(super) enum Stored {
    File(Array),
    Memory(Box<Tensor>),
    Stream(Streamed),
}

impl Stored {
    fn element(&self) -> Element {
        match self {
            Self::File(array) => array.header.element,
            Self::Memory(tensor) => Element::Type(tensor.dtype()),
            Self::Stream(array) => array.header.element,
        }
    }

    fn shape(&self) -> Vec<usize> {
        match self {
            Self::File(array) => array.header.shape.clone(),
            Self::Memory(tensor) => tensor.dims(),
            Self::Stream(array) => array.header.shape.clone(),
        }
    }

    /// The bytes of `count` elements from the one at `first` on.
    fn read(&self, first: usize, count: usize, spill: &Spill) -> Result<Vec<u8>> {
        match self {
            Self::File(array) => array.read(first, count, spill),
            Self::Memory(tensor) => {
                let width = self.element().bytes();
                Ok(tensor.raw()[first * width..(first + count) * width].to_vec())
            }
            Self::Stream(array) => array.read(first, count),
        }
    }
}

impl Part {
    fn of_feeds(count: usize, feeds: Vec<Feed>) -> Self {
        Self { first: 0, count, content: Rows::Feeds(feeds) }
    }

    /// A file of lines.
    pub(super) fn of_lines(lines: Lines) -> Self {
        Self { first: 0, count: lines.len(), content: Rows::Lines(lines) }
    }

    /// Reads one of its samples.
    pub(super) fn read(&self, row: usize, spill: &Spill) -> Result<Sample> {
        match &self.content {
            Rows::Lines(lines) => lines.read(row),
            Rows::Feeds(feeds) => feeds.iter().map(|feed| Ok((feed.name.clone(), feed.read(row, spill)?))).collect(),
        }
    }

    /// The shape of each input in one of its samples, by name.
    pub(super) fn shapes(&self, row: usize) -> Vec<(String, Vec<usize>)> {
        match &self.content {
            Rows::Lines(lines) => lines.shapes(row).to_vec(),
            Rows::Feeds(feeds) => feeds.iter().map(|f| (f.name.clone(), f.shape())).collect(),
        }
    }

    /// The files that are read.
    pub(super) fn files(&self) -> Vec<&PathBuf> {
        let feeds = match &self.content {
            Rows::Lines(lines) => return vec![&lines.path],
            Rows::Feeds(feeds) => feeds,
        };
        let mut found = Vec::new();
        for feed in feeds {
            match &feed.content {
                Content::Array { array: Stored::Memory(_) | Stored::Stream(_), .. } => {}
                Content::Array { array: Stored::File(array), .. } => found.push(&array.path),
                Content::Proto { path, .. } => found.push(path),
                Content::Raw(raw) => found.push(&raw.path),
                Content::Picture(picture) => found.extend(picture.files()),
            }
        }
        found
    }

    /// Where one of its samples is; empty if it is the only one, and in no file.
    pub(super) fn place(&self, row: usize) -> String {
        let line = match &self.content {
            Rows::Lines(lines) => Some(lines.number(row)),
            Rows::Feeds(_) => None,
        };
        let files = self.files();
        let file = files.first().map(|path| path.display().to_string());
        match (line, file) {
            (Some(line), Some(file)) => format!("line {line} of {file}"),
            (None, Some(file)) if self.count > 1 => format!("row {row} of {file}"),
            (None, Some(file)) => file,
            (_, None) if self.count > 1 => format!("row {row}"),
            (_, None) => String::new(),
        }
    }

    /// Verifies the checksums of archives.
    pub(super) fn verify(&self) -> Result<()> {
        let Rows::Feeds(feeds) = &self.content else { return Ok(()) };
        feeds.iter().try_for_each(|feed| match &feed.content {
            Content::Array { array: Stored::File(array), .. } => array.verify(),
            _ => Ok(()),
        })
    }
}

impl Feed {
    /// The shape of the input's value.
    fn shape(&self) -> Vec<usize> {
        match (&self.content, self.fit) {
            (Content::Array { array, .. }, Fit::Rows(_)) => array.shape().split_off(1),
            (Content::Array { array, .. }, Fit::One) => array.shape(),
            (Content::Proto { dims, .. }, _) => dims.clone(),
            (Content::Raw(raw), _) => raw.shape.clone(),
            (Content::Picture(picture), _) => picture.shape.clone(),
        }
    }

    fn read(&self, row: usize, spill: &Spill) -> Result<Tensor> {
        match &self.content {
            Content::Proto { path, .. } => pb::load(path, self.wanted),
            Content::Picture(picture) => picture.read(),
            Content::Raw(raw) => {
                let row = if matches!(self.fit, Fit::Rows(_)) { row } else { 0 };
                Ok(Tensor::new(raw.dtype, &raw.shape, raw.read(row)?))
            }
            Content::Array { array, given } => {
                let shape = self.shape();
                let count = shape.iter().product::<usize>();
                let first = if matches!(self.fit, Fit::Rows(_)) { row * count } else { 0 };
                let bytes = array.read(first, count, spill)?;
                let wanted = self.wanted.unwrap_or(*given);
                let bytes = convert::convert(bytes, *given, wanted)
                    .ok_or_else(|| Error::new(Kind::Internal, "a type was not checked").at_value(&self.name))?;
                Ok(Tensor::new(wanted, &shape, bytes))
            }
        }
    }
}

/// Names the file that an error is about, if there is one.
fn named(error: Error, path: Option<&Path>) -> Error {
    match path {
        Some(path) => error.in_file(path),
        None => error,
    }
}

/// Arrays of a file or in memory, with the input that each is for.
pub(super) fn array_part(path: Option<&Path>, arrays: Vec<(usize, Stored)>, inputs: &[Input]) -> Result<Part> {
    let fail = |message: String| named(Error::new(Kind::Samples, message), path);
    let mut feeds: Vec<Feed> = Vec::new();
    for (at, array) in arrays {
        let input = &inputs[at];
        if feeds.iter().any(|f| f.name == input.name) {
            return Err(fail("two arrays are for one input".to_owned()).at_value(&input.name));
        }
        let given = input.element(array.element()).map_err(|e| named(e, path))?;
        let fit = input.fit(&array.shape(), true).map_err(|e| named(e, path))?;
        let content = Content::Array { array, given };
        feeds.push(Feed { name: input.name.clone(), wanted: input.dtype, fit, content });
    }
    let count = rows(path, &feeds, inputs)?;
    // Inputs of unknown rank go by the number of rows that the others have.
    for feed in &mut feeds {
        let ranked = inputs.iter().any(|i| i.name == feed.name && i.dims.is_some());
        if let (false, true, Content::Array { array, .. }) = (ranked, count > 1, &feed.content)
            && array.shape().first() == Some(&count)
        {
            feed.fit = Fit::Rows(count);
        }
    }
    Ok(Part::of_feeds(count, feeds))
}

/// How many samples the feeds of a part hold: the same number each, or one shared by all.
fn rows(path: Option<&Path>, feeds: &[Feed], inputs: &[Input]) -> Result<usize> {
    let fail = |message: String| named(Error::new(Kind::Samples, message), path);
    complete(feeds, inputs).map_err(|e| named(e, path))?;
    let mut rows = feeds.iter().filter_map(|f| match f.fit {
        Fit::Rows(count) => Some((count, f.name.clone())),
        Fit::One => None,
    });
    let first = rows.next();
    if let (Some((a, one)), Some((b, other))) = (&first, rows.find(|r| first.as_ref().is_some_and(|f| f.0 != r.0))) {
        let message = format!("\"{one}\" holds {a} samples, but \"{other}\" holds {b}");
        return Err(fail(message).with_hint("each array must hold one row per sample"));
    }
    drop(rows);
    let count = first.map_or(1, |(count, _)| count);
    if count == 0 {
        let what = if path.is_some() { "the file holds no samples: its" } else { "there are no samples: the" };
        return Err(fail(format!("{what} arrays have no rows")));
    }
    Ok(count)
}

/// Files of bare elements, with the input that each is for.
pub(super) fn raw_part(path: &Path, files: &[(usize, PathBuf)], inputs: &[Input]) -> Result<Part> {
    let mut feeds: Vec<Feed> = Vec::new();
    for (at, file) in files {
        let input = &inputs[*at];
        let raw = Raw::open(file, input)?;
        let fit = if raw.count == 1 { Fit::One } else { Fit::Rows(raw.count) };
        feeds.push(Feed { name: input.name.clone(), wanted: input.dtype, fit, content: Content::Raw(raw) });
    }
    let count = rows(Some(path), &feeds, inputs)?;
    Ok(Part::of_feeds(count, feeds))
}

/// An image.
pub(super) fn picture_part(picture: Picture, input: &Input) -> Part {
    let content = Content::Picture(picture);
    Part::of_feeds(1, vec![Feed { name: input.name.clone(), wanted: input.dtype, fit: Fit::One, content }])
}

/// ONNX tensors of one sample, with their numbers.
pub(super) fn proto_part(path: &Path, files: &[(usize, PathBuf)], inputs: &[Input]) -> Result<Part> {
    let mut feeds: Vec<Feed> = Vec::new();
    for (position, file) in files {
        let (at, dims) = pb::open(file, *position, inputs)?;
        let Input { name, dtype, .. } = &inputs[at];
        if feeds.iter().any(|f| f.name == *name) {
            return Err(Error::new(Kind::Samples, "two files are for one input").at_value(name).in_file(file));
        }
        let content = Content::Proto { path: file.clone(), dims };
        feeds.push(Feed { name: name.clone(), wanted: *dtype, fit: Fit::One, content });
    }
    complete(&feeds, inputs).map_err(|e| e.in_file(path))?;
    Ok(Part::of_feeds(1, feeds))
}

/// Checks that every input without a default has a value.
fn complete(feeds: &[Feed], inputs: &[Input]) -> Result<()> {
    match inputs.iter().find(|i| i.required && feeds.iter().all(|f| f.name != i.name)) {
        None => Ok(()),
        Some(missing) => Err(Error::new(Kind::Samples, "the samples have no array for this input")
            .at_value(&missing.name)
            .with_hint(format!("the model needs {}", inputs::names(inputs.iter().filter(|i| i.required))))),
    }
}
