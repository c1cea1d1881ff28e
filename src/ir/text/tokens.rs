//! Tokens of the text, and errors with their place.

use crate::error::{Error, Result};
use crate::onnx::DataType;

/// Bodies and types may nest this deep; a file may too, as messages nest at most 100 deep.
const MAX_DEPTH: usize = 64;
/// Columns of the offending line that an error shows.
const SHOWN: usize = 100;

/// Whether `name` needs no quotes.
pub(super) fn is_identifier(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Whether `word` starts a type.
pub(super) fn is_type_word(word: &str) -> bool {
    matches!(word, "seq" | "map" | "optional" | "sparse_tensor" | "opaque") || dtype_code(word).is_some()
}

/// Whether `word` is a float.
pub(super) fn is_float_word(word: &str) -> bool {
    ["inf", "infinity", "nan"].iter().any(|f| word.eq_ignore_ascii_case(f))
}

/// The code of an element type; 0 for `undefined`.
pub(super) fn dtype_code(word: &str) -> Option<i32> {
    if word == "undefined" {
        return Some(0);
    }
    DataType::ALL.iter().find(|d| d.name() == word).map(|d| d.code())
}

/// A number or a string as written.
pub(super) enum Literal<'a> {
    Int(&'a str),
    Float(&'a str),
    /// A NaN by its bits.
    Nan(u64),
    Text(Vec<u8>),
}

pub(super) struct Parser<'a> {
    pub(super) text: &'a str,
    pub(super) at: usize,
    depth: usize,
    pub(super) fill: bool,
}

impl<'a> Parser<'a> {
    pub(super) fn new(text: &'a str, fill: bool) -> Self {
        Self { text, at: 0, depth: 0, fill }
    }

    /// An error at byte `at`, with its line.
    pub(super) fn error(&self, at: usize, message: impl AsRef<str>) -> Error {
        let at = at.min(self.text.len());
        let start = self.text[..at].rfind('\n').map_or(0, |n| n + 1);
        let end = self.text[at..].find('\n').map_or(self.text.len(), |n| at + n);
        let number = self.text[..at].bytes().filter(|&b| b == b'\n').count() + 1;
        let column = self.text[start..at].chars().count();
        let skipped = if column >= SHOWN { column - SHOWN / 2 } else { 0 };
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let shown: String = self.text[start..end].chars().skip(skipped).take(SHOWN).map(printable).collect();
        let margin = " ".repeat(number.to_string().len());
        let caret = " ".repeat(column - skipped);
        Error::model(format!(
            "line {number}, column {}: {}\n{number} | {}\n{margin} | {caret}^",
            column + 1,
            message.as_ref(),
            shown.trim_end(),
        ))
    }

    /// An error at the next token.
    pub(super) fn expected<T>(&mut self, what: &str) -> Result<T> {
        self.blank();
        let rest = &self.text[self.at..];
        let word = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let found = match rest.chars().next() {
            None => "the end of the text".to_owned(),
            Some(_) if word > 0 => format!("`{}`", &rest[..word]),
            Some(c) if c.is_control() => format!("`{}`", c.escape_default()),
            Some(c) => format!("`{c}`"),
        };
        Err(self.error(self.at, format!("expected {what}, found {found}")))
    }

    pub(super) fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Skips white space and comments.
    pub(super) fn blank(&mut self) {
        while let Some(byte) = self.byte() {
            match byte {
                b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r' => self.at += 1,
                b'#' => self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at),
                _ => break,
            }
        }
    }

    pub(super) fn peek(&mut self) -> Option<u8> {
        self.blank();
        self.byte()
    }

    pub(super) fn accept(&mut self, token: &str) -> bool {
        self.blank();
        let found = self.text[self.at..].starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    pub(super) fn expect(&mut self, token: &str) -> Result<()> {
        if self.accept(token) { Ok(()) } else { self.expected(&format!("`{token}`")) }
    }

    /// Bytes of the text that satisfy `test`, from here on.
    pub(super) fn run(&mut self, test: impl Fn(u8) -> bool) -> &'a str {
        let from = self.at;
        while self.byte().is_some_and(&test) {
            self.at += 1;
        }
        &self.text[from..self.at]
    }

    /// An identifier; empty where there is none.
    pub(super) fn word(&mut self) -> &'a str {
        match self.peek() {
            Some(b) if b.is_ascii_alphabetic() || b == b'_' => self.run(|b| b.is_ascii_alphanumeric() || b == b'_'),
            _ => "",
        }
    }

    /// What [`Self::word`] would return.
    pub(super) fn peek_word(&mut self) -> &'a str {
        self.blank();
        let from = self.at;
        let word = self.word();
        self.at = from;
        word
    }

    pub(super) fn name(&mut self, what: &str) -> Result<String> {
        if self.peek() == Some(b'"') {
            return self.quoted();
        }
        match self.word() {
            "" => self.expected(what),
            word => Ok(word.to_owned()),
        }
    }

    /// A string, which must be next.
    pub(super) fn quoted(&mut self) -> Result<String> {
        if self.peek() != Some(b'"') {
            return self.expected("a string in double quotes");
        }
        let from = self.at;
        let mut out = String::new();
        let mut chars = self.text[from + 1..].char_indices();
        while let Some((offset, c)) = chars.next() {
            match c {
                '"' => {
                    self.at = from + 1 + offset + 1;
                    return Ok(out);
                }
                '\\' => out.extend(chars.next().map(|(_, c)| c)),
                c => out.push(c),
            }
        }
        Err(self.error(from, "the string has no end"))
    }

    pub(super) fn literal(&mut self) -> Result<Literal<'a>> {
        let Some(first) = self.peek() else { return self.expected("a value") };
        let from = self.at;
        if first == b'"' {
            return Ok(Literal::Text(self.quoted()?.into_bytes()));
        }
        if first == b'-' {
            self.at += 1;
        }
        if self.byte().is_some_and(|b| b.is_ascii_digit()) {
            self.run(|b| b.is_ascii_digit());
            let mut float = false;
            // Not the dots of an elision.
            if self.byte() == Some(b'.') && !self.text[self.at..].starts_with("..") {
                float = true;
                self.at += 1;
                self.run(|b| b.is_ascii_digit());
            }
            if matches!(self.byte(), Some(b'e' | b'E')) {
                float = true;
                self.at += 1;
                if matches!(self.byte(), Some(b'+' | b'-')) {
                    self.at += 1;
                }
                if self.run(|b| b.is_ascii_digit()).is_empty() {
                    return Err(self.error(from, "the exponent has no digits"));
                }
            }
            let text = &self.text[from..self.at];
            return Ok(if float { Literal::Float(text) } else { Literal::Int(text) });
        }
        let word = self.run(|b| b.is_ascii_alphanumeric() || b == b'_');
        if is_float_word(word) {
            if word == "nan" && self.text[self.at..].starts_with("(0x") {
                self.at += 3;
                let digits = self.run(|b| b.is_ascii_hexdigit());
                let Ok(bits) = u64::from_str_radix(digits, 16) else {
                    return Err(self.error(from, "not the bits of a NaN"));
                };
                self.expect(")")?;
                return Ok(Literal::Nan(bits));
            }
            return Ok(Literal::Float(&self.text[from..self.at]));
        }
        if word == "hex" && first != b'-' && self.byte() == Some(b'"') {
            let digits = self.quoted()?;
            return match unhex(&digits) {
                Some(bytes) => Ok(Literal::Text(bytes)),
                None => Err(self.error(from, "not pairs of hexadecimal digits")),
            };
        }
        self.at = from;
        self.expected("a number or a string")
    }

    pub(super) fn int(&mut self) -> Result<i64> {
        self.blank();
        let from = self.at;
        if !self.byte().is_some_and(|b| b == b'-' || b.is_ascii_digit()) {
            return self.expected("an integer");
        }
        match self.literal()? {
            Literal::Int(text) => text.parse().map_err(|_| self.error(from, "the integer does not fit into 64 bits")),
            _ => Err(self.error(from, "expected an integer")),
        }
    }

    pub(super) fn f32(&self, from: usize, text: &str) -> Result<f32> {
        match text.parse::<f32>() {
            Ok(v) if v.is_infinite() && !text.contains(['i', 'I']) => {
                Err(self.error(from, "the number does not fit into 32 bits"))
            }
            Ok(v) => Ok(v),
            Err(_) => Err(self.error(from, "not a number")),
        }
    }

    pub(super) fn f64(&self, from: usize, text: &str) -> Result<f64> {
        match text.parse::<f64>() {
            Ok(v) if v.is_infinite() && !text.contains(['i', 'I']) => {
                Err(self.error(from, "the number does not fit into 64 bits"))
            }
            Ok(v) => Ok(v),
            Err(_) => Err(self.error(from, "not a number")),
        }
    }

    /// Items up to `close`, which is consumed.
    pub(super) fn list(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        if self.accept(close) {
            return Ok(());
        }
        loop {
            item(self)?;
            if self.accept(close) {
                return Ok(());
            }
            if !self.accept(",") {
                return self.expected(&format!("`,` or `{close}`"));
            }
        }
    }

    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(self.at, format!("graphs and types nest more than {MAX_DEPTH} deep")));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }
}

pub(super) fn unhex(digits: &str) -> Option<Vec<u8>> {
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) || !digits.len().is_multiple_of(2) {
        return None;
    }
    (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).ok()).collect()
}
