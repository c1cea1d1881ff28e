//! The header of numpy's array format, versions 1 to 3.

use std::io::Read;

use crate::error::{Error, Kind, Result};
use crate::onnx::DataType;

/// Headers describe one array; no real one is longer.
const MAX_HEADER: usize = 1 << 20;

/// The type, shape and layout of an array in a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) element: Element,
    pub(super) big_endian: bool,
    /// Whether the first axis changes fastest.
    pub(super) fortran: bool,
    pub(super) shape: Vec<usize>,
    /// Bytes before the first element.
    pub(super) offset: u64,
}

/// The type of an element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Element {
    /// A type that numpy and ONNX share.
    Type(DataType),
    /// This many bytes of a type numpy does not know, such as bfloat16.
    Raw(usize),
}

impl Element {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Type(dtype) => dtype.bits().unwrap_or(0) / 8,
            Self::Raw(bytes) => bytes,
        }
    }
}

fn fail(message: impl Into<String>) -> Error {
    Error::new(Kind::Samples, message)
}

/// Reads a header.
pub(super) fn read_header(from: &mut impl Read) -> Result<Header> {
    let cut = |_| fail("the array is truncated in its header").with_hint(super::array::INTERRUPTED);
    let mut magic = [0; 8];
    from.read_exact(&mut magic).map_err(cut)?;
    if &magic[..6] != b"\x93NUMPY" {
        return Err(fail("not an array in numpy's format"));
    }
    let length_bytes = match magic[6] {
        1 => 2,
        2 | 3 => 4,
        version => return Err(fail(format!("version {version} of numpy's array format is unknown"))),
    };
    let mut length = [0; 4];
    from.read_exact(&mut length[..length_bytes]).map_err(cut)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_HEADER {
        return Err(fail(format!("the array claims a header of {length} bytes")));
    }
    let mut text = vec![0; length];
    from.read_exact(&mut text).map_err(cut)?;
    let text = String::from_utf8_lossy(&text);
    let (descr, fortran, shape) = parse(&text)?;
    let (element, big_endian) = element(&descr)?;
    Ok(Header { element, big_endian, fortran, shape, offset: (8 + length_bytes + length) as u64 })
}

/// The three entries of the header's dictionary.
fn parse(text: &str) -> Result<(String, bool, Vec<usize>)> {
    let bad = || fail("the array has a header that numpy does not write");
    let mut rest = Rest(text.trim());
    let (mut descr, mut fortran, mut shape) = (None, None, None);
    rest.eat("{").ok_or_else(bad)?;
    while rest.eat("}").is_none() {
        let key = rest.string().ok_or_else(bad)?;
        rest.eat(":").ok_or_else(bad)?;
        match key {
            "descr" if rest.eat("[").is_some() => {
                return Err(fail("the array is structured, but model inputs hold plain elements")
                    .with_hint("save each field as a separate array"));
            }
            "descr" => descr = Some(rest.string().ok_or_else(bad)?.to_owned()),
            "fortran_order" if rest.eat("True").is_some() => fortran = Some(true),
            "fortran_order" if rest.eat("False").is_some() => fortran = Some(false),
            "shape" => shape = Some(rest.tuple().ok_or_else(bad)?),
            _ => return Err(bad()),
        }
        let _ = rest.eat(",");
    }
    match (descr, fortran, shape) {
        (Some(descr), Some(fortran), Some(shape)) => Ok((descr, fortran, shape)),
        _ => Err(bad()),
    }
}

/// What is left to parse; never starts with a space.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn eat(&mut self, token: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(token)?.trim_start();
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let quote = self.0.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let (string, rest) = self.0[1..].split_once(quote)?;
        self.0 = rest.trim_start();
        Some(string)
    }

    fn tuple(&mut self) -> Option<Vec<usize>> {
        self.eat("(")?;
        let mut items = Vec::new();
        while self.eat(")").is_none() {
            let digits = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
            items.push(self.0[..digits].parse().ok()?);
            self.0 = self.0[digits..].trim_start();
            // Python 2 wrote its long integers so.
            let _ = self.eat("L");
            let _ = self.eat(",");
        }
        Some(items)
    }
}

/// The element type of a numpy type string such as `<f4`, and whether it is big-endian.
fn element(descr: &str) -> Result<(Element, bool)> {
    let unknown = || fail(format!("the array holds elements of type \"{descr}\", which no model input takes"));
    let (big_endian, code) = match descr.split_at_checked(1).ok_or_else(unknown)? {
        (">", code) => (true, code),
        ("<" | "|" | "=", code) => (false, code),
        _ => (false, descr),
    };
    let dtype = match code {
        "b1" | "?" => DataType::Bool,
        "i1" => DataType::Int8,
        "i2" => DataType::Int16,
        "i4" => DataType::Int32,
        "i8" => DataType::Int64,
        "u1" => DataType::Uint8,
        "u2" => DataType::Uint16,
        "u4" => DataType::Uint32,
        "u8" => DataType::Uint64,
        "f2" => DataType::Float16,
        "f4" => DataType::Float,
        "f8" => DataType::Double,
        _ if code.starts_with('O') => {
            return Err(fail("the array holds Python objects").with_hint(
                "save arrays of one element type and shape; samples of different shapes go into separate files",
            ));
        }
        _ if code.starts_with(['U', 'S']) => {
            return Err(fail("the array holds strings").with_hint("give strings as ONNX tensors: input_0.pb and so on"));
        }
        _ => {
            let bytes = code.strip_prefix('V').and_then(|n| n.parse().ok()).filter(|n| (1..=2).contains(n));
            return Ok((Element::Raw(bytes.ok_or_else(unknown)?), big_endian));
        }
    };
    Ok((Element::Type(dtype), big_endian))
}
