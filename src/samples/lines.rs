//! Samples as lines of JSON: each line is an object with a nested list per input, or the list of the only input.
//!
//! Inputs that a line leaves out are filled if their name says how: `attention_mask` and `input_mask` with
//! ones, `token_type_ids` and `segment_ids` with zeros, `position_ids` with 0, 1, 2, … along its last axis. They take the
//! shape of the tokens, the first integer input that the line gives. Caches, floats of rank 3 or more with `past` or `cache` in
//! their name, are empty: as many rows as tokens have, and 0 along the other axes that the model leaves open.
//! `use_cache_branch` is false.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Sample;
use super::convert::push_float;
use super::inputs::{Dim, Fit, Input, find, names};
use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;
use crate::onnx::DataType;

/// A file of samples: where each line is, and which shapes it gives.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) path: PathBuf,
    inputs: Vec<Input>,
    rows: Vec<Line>,
    /// The shapes of each input by name, each set once.
    shapes: Vec<Vec<(String, Vec<usize>)>>,
}

#[derive(Clone, Copy, Debug)]
struct Line {
    /// Counted from 1.
    number: usize,
    offset: u64,
    length: usize,
    shapes: usize,
}

/// What fills an input that a line leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Ones,
    Zeros,
    Count,
    Empty,
    False,
}

fn rule(input: &Input) -> Option<Rule> {
    let name = input.name.rsplit(['/', '.']).next().unwrap_or_default();
    match name.strip_suffix(":0").unwrap_or(name) {
        "attention_mask" | "input_mask" => Some(Rule::Ones),
        "token_type_ids" | "segment_ids" => Some(Rule::Zeros),
        "position_ids" => Some(Rule::Count),
        "use_cache_branch" => Some(Rule::False),
        _ => is_cache(input).then_some(Rule::Empty),
    }
}

/// Whether an input is what a decoder remembers of tokens before.
fn is_cache(input: &Input) -> bool {
    let name = input.name.to_lowercase();
    let float = input.dtype.is_some_and(DataType::is_float);
    float
        && input.dims.as_ref().is_some_and(|dims| dims.len() >= 3)
        && (name.contains("past") || name.contains("cache"))
}

/// A tensor of zeros of the size that a cache has before the first token, with a row for each of the tokens.
fn empty(input: &Input, tokens: Option<&[usize]>) -> Result<Tensor> {
    let rows = tokens.and_then(|dims| dims.first()).copied().unwrap_or(1);
    let dims = input.dims.iter().flatten().enumerate();
    let shape: Vec<usize> = dims
        .map(|(axis, dim)| match dim {
            Dim::Fixed(size) => *size,
            Dim::Free(_) if axis == 0 => rows,
            Dim::Free(_) => 0,
        })
        .collect();
    let dtype = input.dtype.unwrap_or(DataType::Float);
    let count: usize = shape.iter().product();
    let zeros = std::iter::repeat_n(0.0, count);
    Tensor::from_f64(dtype, &shape, zeros)
        .ok_or_else(|| Error::new(Kind::Samples, "a cache is of no float type").at_value(&input.name))
}

impl Lines {
    /// The line that a sample is in, counted from 1.
    pub(super) fn number(&self, row: usize) -> usize {
        self.rows.get(row).map_or(0, |line| line.number)
    }

    /// Reads the file once, and checks every line against the model.
    pub(super) fn open(path: &Path, inputs: &[Input]) -> Result<Self> {
        let io = |e| Error::io(Kind::Samples, "read", path, e);
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let mut rows = Vec::new();
        let mut known: BTreeMap<Vec<(String, Vec<usize>)>, usize> = BTreeMap::new();
        let (mut text, mut offset, mut number) = (Vec::new(), 0u64, 0);
        loop {
            text.clear();
            let length = file.read_until(b'\n', &mut text).map_err(io)?;
            if length == 0 {
                break;
            }
            number += 1;
            if !blank(&text) {
                let sample = parse(&text, inputs).map_err(|e| e.in_file(path).at_line(number))?;
                let shapes: Vec<_> = sample.iter().map(|(name, tensor)| (name.clone(), tensor.dims())).collect();
                let next = known.len();
                let shapes = *known.entry(shapes).or_insert(next);
                rows.push(Line { number, offset, length, shapes });
            }
            offset += length as u64;
        }
        if rows.is_empty() {
            let hint = "write one JSON object per line, such as {\"input_ids\": [101, 2023, 102]}";
            return Err(Error::new(Kind::Samples, "the file holds no samples").in_file(path).with_hint(hint));
        }
        let mut shapes = vec![Vec::new(); known.len()];
        for (set, at) in known {
            shapes[at] = set;
        }
        Ok(Self { path: path.to_owned(), inputs: inputs.to_vec(), rows, shapes })
    }

    /// How many samples there are.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The shape of each input, by name.
    pub(super) fn shapes(&self, row: usize) -> &[(String, Vec<usize>)] {
        &self.shapes[self.rows[row].shapes]
    }

    /// Reads one sample.
    pub(super) fn read(&self, row: usize) -> Result<Sample> {
        let Line { number, offset, length, shapes } = self.rows[row];
        let mut text = vec![0; length];
        let mut file = File::open(&self.path).map_err(|e| Error::io(Kind::Samples, "read", &self.path, e))?;
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.read_exact(&mut text))
            .map_err(|e| Error::io(Kind::Samples, "read", &self.path, e))?;
        let sample = parse(&text, &self.inputs).map_err(|e| e.in_file(&self.path).at_line(number))?;
        let same = sample
            .iter()
            .map(|(name, tensor)| (name, tensor.dims()))
            .eq(self.shapes[shapes].iter().map(|(name, dims)| (name, dims.clone())));
        if same {
            Ok(sample)
        } else {
            Err(Error::new(Kind::Samples, "the file changed while it was used").in_file(&self.path).at_line(number))
        }
    }
}

fn blank(text: &[u8]) -> bool {
    text.iter().all(u8::is_ascii_whitespace)
}

fn parse(text: &[u8], inputs: &[Input]) -> Result<Sample> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let value: Value = serde_json::from_slice(text).map_err(|e| {
        let (message, column) = (e.to_string(), e.column());
        let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(m, _)| m).to_owned();
        Error::new(Kind::Samples, format!("the line is not JSON: {message}, at column {column}"))
            .with_hint("each line holds one sample: an object, or a list for a model with one input")
    })?;
    let mut given: Vec<(usize, Value)> = Vec::new();
    match value {
        Value::Object(entries) => {
            for (key, value) in entries {
                given.push((find(inputs, &key)?, value));
            }
        }
        list @ Value::Array(_) => given.push((alone(inputs)?, list)),
        other => {
            let message = format!("the line holds {}, but samples are objects or lists", kind(&other));
            return Err(Error::new(Kind::Samples, message).with_hint(format!(
                "write {{\"{}\": [1, 2, 3]}}",
                inputs.first().map_or("input", |i| i.name.as_str())
            )));
        }
    }
    let mut sample = Sample::new();
    for (at, value) in &given {
        sample.insert(inputs[*at].name.clone(), tensor(&inputs[*at], value)?);
    }
    let present: BTreeSet<usize> = given.iter().map(|(at, _)| *at).collect();
    let tokens = inputs.iter().filter(|i| rule(i).is_none()).find_map(|input| {
        let tensor = sample.get(&input.name)?;
        (!tensor.dtype().is_float() && !tensor.dims().is_empty()).then(|| tensor.dims())
    });
    for (at, input) in inputs.iter().enumerate() {
        if present.contains(&at) || !input.required {
            continue;
        }
        let Some(rule) = rule(input) else {
            return Err(Error::new(Kind::Samples, "the line has no value for this input")
                .at_value(&input.name)
                .with_hint(format!("the model needs {}", names(inputs.iter().filter(|i| i.required)))));
        };
        let value = match rule {
            Rule::Empty => empty(input, tokens.as_deref())?,
            Rule::False => Tensor::new(DataType::Bool, &vec![1; input.dims.as_ref().map_or(0, Vec::len)], vec![0]),
            _ => filled(input, rule, tokens.as_deref())?,
        };
        sample.insert(input.name.clone(), value);
    }
    Ok(sample)
}

/// The input that a line without names is for.
fn alone(inputs: &[Input]) -> Result<usize> {
    let mut needed = (0..inputs.len()).filter(|&i| inputs[i].required && rule(&inputs[i]).is_none());
    match (needed.next(), needed.next()) {
        (Some(only), None) => Ok(only),
        _ => Err(Error::new(Kind::Samples, "the line holds a list, but the model has several inputs")
            .with_hint(format!("write an object with the keys {}", names(inputs.iter().filter(|i| i.required))))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A nested list as the value of an input; a missing leading axis of 1 is added.
fn tensor(input: &Input, value: &Value) -> Result<Tensor> {
    let fail = |message: String, hint: &str| {
        Err(Error::new(Kind::Samples, message).at_value(&input.name).with_hint(hint.to_owned()))
    };
    let mut shape = Vec::new();
    let mut inner = value;
    while let Value::Array(items) = inner {
        shape.push(items.len());
        let Some(first) = items.first() else {
            return fail("the list is empty".to_owned(), "leave the line out");
        };
        inner = first;
    }
    let dtype = input.dtype.unwrap_or(if inner.is_f64() { DataType::Float } else { DataType::Int64 });
    let mut bytes = Vec::new();
    flatten(value, &shape, dtype, &mut bytes).map_err(|e| e.at_value(&input.name))?;
    if let Some(dims) = &input.dims
        && dims.len() == shape.len() + 1
        && matches!(dims.first(), Some(Dim::Free(_) | Dim::Fixed(1)))
    {
        shape.insert(0, 1);
    }
    match input.fit(&shape, false) {
        Ok(Fit::One) => Ok(Tensor::new(dtype, &shape, bytes)),
        _ => fail(
            format!("the input takes {}, but the line gives {shape:?}", input.shape_text(None)),
            "give lists as long as the model's axes; a first axis of 1 may be left out; pad sequences of fixed length",
        ),
    }
}

fn flatten(value: &Value, shape: &[usize], dtype: DataType, out: &mut Vec<u8>) -> Result<()> {
    match (value, shape) {
        (Value::Array(items), [length, inner @ ..]) => {
            if items.len() != *length {
                let message = format!("lists at the same level have {length} and {} elements", items.len());
                return Err(
                    Error::new(Kind::Samples, message).with_hint("give lists of equal length, or separate lines")
                );
            }
            items.iter().try_for_each(|item| flatten(item, inner, dtype, out))
        }
        (Value::Array(_), []) | (_, [_, ..]) => {
            Err(Error::new(Kind::Samples, "lists at the same level are nested to different depths"))
        }
        (value, []) => encode(value, dtype, out),
    }
}

/// Appends one element. Integers must be in range; floats are rounded to the type.
fn encode(value: &Value, dtype: DataType, out: &mut Vec<u8>) -> Result<()> {
    use DataType::{Bool, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
    let refuse = || {
        let message = format!("{value} cannot be an element of type {dtype}");
        Err(Error::new(Kind::Samples, message).with_hint("give numbers that the type can hold"))
    };
    match dtype {
        Bool => match (value.as_bool(), value.as_i64()) {
            (Some(bit), _) => out.push(u8::from(bit)),
            (None, Some(bit @ (0 | 1))) => out.push(bit as u8),
            _ => return refuse(),
        },
        Int8 | Int16 | Int32 | Int64 | Uint8 | Uint16 | Uint32 | Uint64 => {
            let bits = dtype.bits().unwrap_or(64) as u32;
            let signed = matches!(dtype, Int8 | Int16 | Int32 | Int64);
            let (low, high) =
                if signed { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) };
            let number = match value {
                Value::Bool(bit) => Some(i128::from(*bit)),
                Value::Number(n) => n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from)),
                _ => None,
            };
            match number.filter(|n| (low..=high).contains(n)) {
                Some(number) => out.extend_from_slice(&number.to_le_bytes()[..bits as usize / 8]),
                None => return refuse(),
            }
        }
        _ => match value.as_f64() {
            Some(number) if push_float(number, dtype, out) => {}
            _ => return refuse(),
        },
    }
    Ok(())
}

/// The filled-in value, in the shape of the tokens.
fn filled(input: &Input, rule: Rule, tokens: Option<&[usize]>) -> Result<Tensor> {
    let fail = |message: &str| {
        let hint = format!("give \"{}\" in each line", input.name);
        Error::new(Kind::Samples, message).at_value(&input.name).with_hint(hint)
    };
    let tokens = tokens.ok_or_else(|| fail("the line has no tokens to take the shape of this input from"))?;
    let rank = input.dims.as_ref().map_or(tokens.len(), Vec::len);
    // Positions without a batch axis serve every row.
    let shape = if rank < tokens.len() { &tokens[tokens.len() - rank..] } else { tokens };
    input.fit(shape, false).map_err(|_| {
        fail(&format!("the input takes {}, but the tokens have the shape {tokens:?}", input.shape_text(None)))
    })?;
    let length = shape.last().copied().unwrap_or(1).max(1);
    let count: usize = shape.iter().product();
    let value = |i: usize| match rule {
        Rule::Ones => 1,
        Rule::Zeros | Rule::Empty | Rule::False => 0,
        Rule::Count => i % length,
    };
    let dtype = input.dtype.unwrap_or(DataType::Int64);
    let mut bytes = Vec::new();
    for i in 0..count {
        encode(&Value::from(value(i)), dtype, &mut bytes).map_err(|e| e.at_value(&input.name))?;
    }
    Ok(Tensor::new(dtype, shape, bytes))
}
