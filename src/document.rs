//! Text documents that people write: TOML and JSON files, the words in them, and where these stand.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use crate::error::{Error, Kind, Result};
use crate::nearest::nearest;

/// Reads a document of the kind `what`.
///
/// # Errors
/// A file that cannot be read or is not text.
pub fn read(path: &Path, what: &str) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(Kind::Config, &format!("read {what}"), path, e))?;
    String::from_utf8(bytes).map_err(|_| {
        Error::new(Kind::Config, "this is not a text file")
            .in_file(path)
            .with_hint(format!("name the {what}, a .toml or .json file"))
    })
}

/// The line of each key of a document, counted from 1, by its path: `layer.2.weight.dtype`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines(BTreeMap<String, usize>);

impl Lines {
    /// The line of a key, or of the nearest one around it.
    #[must_use]
    pub fn of(&self, path: &str) -> Option<usize> {
        let mut path = path;
        loop {
            if let Some(&line) = self.0.get(path) {
                return Some(line);
            }
            path = &path[..path.rfind('.')?];
        }
    }

    fn toml(text: &str) -> Self {
        let mut lines = Self::default();
        if let Ok(table) = DeTable::parse(text) {
            lines.table(text, "", table.get_ref());
        }
        lines
    }

    fn table(&mut self, text: &str, prefix: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            let path = join(prefix, key.get_ref());
            self.0.insert(path.clone(), line(text, key.span().start));
            self.value(text, &path, value.get_ref());
        }
    }

    fn value(&mut self, text: &str, path: &str, value: &DeValue<'_>) {
        match value {
            DeValue::Table(table) => self.table(text, path, table),
            DeValue::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    let path = join(path, &index.to_string());
                    self.0.insert(path.clone(), line(text, item.span().start));
                    self.value(text, &path, item.get_ref());
                }
            }
            _ => {}
        }
    }
}

/// The line of a byte, counted from 1.
fn line(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&b| b == b'\n').count() + 1
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

/// Finds the lines of the keys of a JSON text that is known to be valid.
struct JsonLines<'a> {
    rest: &'a [u8],
    line: usize,
    lines: Lines,
}

impl JsonLines<'_> {
    fn scan(text: &str) -> Lines {
        let mut scanner = JsonLines { rest: text.as_bytes(), line: 1, lines: Lines::default() };
        scanner.value("");
        scanner.lines
    }

    fn peek(&mut self) -> u8 {
        while let Some((&byte, rest)) = self.rest.split_first() {
            if !byte.is_ascii_whitespace() {
                return byte;
            }
            self.line += usize::from(byte == b'\n');
            self.rest = rest;
        }
        0
    }

    fn skip(&mut self) {
        self.rest = self.rest.split_first().map_or(&[], |(_, rest)| rest);
    }

    fn string(&mut self) -> String {
        let begun = self.rest;
        self.skip();
        while let Some(&byte) = self.rest.first() {
            self.skip();
            match byte {
                b'\\' => self.skip(),
                b'"' => break,
                _ => {}
            }
        }
        let quoted = &begun[..begun.len() - self.rest.len()];
        serde_json::from_slice(quoted).unwrap_or_default()
    }

    fn value(&mut self, path: &str) {
        match self.peek() {
            b'{' => {
                self.skip();
                while self.peek() == b'"' {
                    let at = self.line;
                    let path = join(path, &self.string());
                    self.lines.0.insert(path.clone(), at);
                    self.peek();
                    self.skip();
                    self.value(&path);
                    if self.peek() == b',' {
                        self.skip();
                    }
                }
                self.skip();
            }
            b'[' => {
                self.skip();
                let mut index = 0;
                while !matches!(self.peek(), b']' | 0) {
                    let path = join(path, &index.to_string());
                    self.lines.0.insert(path.clone(), self.line);
                    self.value(&path);
                    if self.peek() == b',' {
                        self.skip();
                    }
                    index += 1;
                }
                self.skip();
            }
            b'"' => drop(self.string()),
            _ => {
                while !matches!(self.rest.first(), None | Some(b',' | b']' | b'}')) && self.peek() != 0 {
                    if matches!(self.rest.first(), Some(b',' | b']' | b'}')) {
                        break;
                    }
                    self.skip();
                }
            }
        }
    }
}

/// Parses TOML, or JSON where the text begins with a brace.
///
/// # Errors
/// A syntax error, an unknown key or word (with the nearest valid one), a value of the wrong type; with its line.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<(T, Lines)> {
    if text.trim_start().starts_with('{') {
        return parse_json(text);
    }
    let value = toml::from_str(text).map_err(|e| syntax(text, &e))?;
    Ok((value, Lines::toml(text)))
}

/// Parses JSON.
///
/// # Errors
/// As [`parse`].
pub fn parse_json<T: DeserializeOwned>(text: &str) -> Result<(T, Lines)> {
    let value = serde_json::from_str(text).map_err(|e| {
        let message = e.to_string();
        let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(m, _)| m);
        said(message).at_line(e.line())
    })?;
    Ok((value, JsonLines::scan(text)))
}

/// What is wrong with a TOML document, and where.
pub fn syntax(text: &str, error: &toml::de::Error) -> Error {
    let found = said(error.message());
    match error.span() {
        Some(span) => found.at_line(line(text, span.start)),
        None => found,
    }
}

/// Types of Rust and serde, and what they are to people.
const TYPES: &[(&str, &str)] = &[
    ("invalid type: map", "invalid type: a table"),
    ("invalid type: sequence", "invalid type: a list"),
    ("a sequence", "a list"),
    ("a map", "a table"),
    ("struct Guard", "a table"),
    ("struct Tensor", "a table"),
    ("struct Level", "a table"),
    ("struct Spec", "a table"),
    ("struct Layer", "a table"),
    ("struct Algorithm", "a table"),
    ("a boolean", "true or false"),
    ("u32", "a whole number from 0"),
    ("i64", "a whole number"),
    ("i32", "a whole number"),
    ("f64", "a number"),
    ("f32", "a number"),
    ("missing field", "missing key"),
];

/// Words of other tools, and ours.
const SYNONYMS: &[(&str, &str)] = &[
    ("fp8", "float8e4m3fn"),
    ("e4m3", "float8e4m3fn"),
    ("fp8_e4m3", "float8e4m3fn"),
    ("float8_e4m3fn", "float8e4m3fn"),
    ("e5m2", "float8e5m2"),
    ("fp8_e5m2", "float8e5m2"),
    ("fp4", "float4e2m1"),
    ("e2m1", "float4e2m1"),
    ("fp32", "float32"),
    ("fp16", "float16"),
    ("bf16", "bfloat16"),
    ("e8m0", "float8e8m0"),
    ("pof2", "power-of-two"),
    ("max", "minmax"),
    ("histogram", "entropy"),
    ("kl", "entropy"),
    ("per-row", "per-channel"),
    ("per-axis", "per-channel"),
    ("per-block", "per-group"),
    ("round", "half-away"),
    ("smooth", "smoothquant"),
];

/// A parser's message in our words.
fn said(message: &str) -> Error {
    let Some((key, valid)) = unknown_key(message) else {
        let message = message.trim_end().replace('\n', ", ").replace('`', "\"");
        // What the document says stands before the comma, and stays as it is.
        let (found, expected) = message.rsplit_once(", expected ").unwrap_or((&message, ""));
        let plain = |text: &str| TYPES.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
        let found = if found.contains('"') && !found.starts_with("missing") { found.to_owned() } else { plain(found) };
        let expected = if expected.is_empty() { String::new() } else { format!(", expected {}", plain(expected)) };
        return Error::new(Kind::Config, found + &expected);
    };
    let what = if message.starts_with("unknown field") { "key" } else { "word" };
    let unknown = Error::new(Kind::Config, format!("unknown {what} \"{key}\"; valid {what}s are {}", valid.join(", ")));
    let lower = key.to_lowercase();
    let bits = lower.trim_start_matches('u').strip_prefix("int").filter(|_| valid.contains(&"int4"));
    if let Some(bits) =
        bits.and_then(|bits| bits.parse::<u8>().ok()).filter(|bits| (3..16).contains(bits) && ![4, 8].contains(bits))
    {
        return unknown.with_hint(format!("ONNX has no {bits}-bit integers, only 2, 4, 8 and 16 bits"));
    }
    let meant = SYNONYMS.iter().find(|(word, ours)| *word == lower && valid.contains(ours)).map(|(_, ours)| *ours);
    match meant.or_else(|| nearest(key, valid)) {
        Some(word) => unknown.with_hint(format!("did you mean \"{word}\"?")),
        None => unknown,
    }
}

/// Splits serde's "unknown field `a`, expected one of `b`, `c`" into `a` and the rest.
fn unknown_key(message: &str) -> Option<(&str, Vec<&str>)> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !message.starts_with("unknown") {
        return None;
    }
    let key = quoted.next()?;
    Some((key, quoted.collect()))
}

#[cfg(test)]
mod tests {
    use super::{JsonLines, Lines};

    #[test]
    fn every_key_has_its_line() {
        let toml = "a = 1\n[b]\nc = { d = 2 }\n\n[[e]]\nf = [1,\n2]\n[[e]]\nf = 3\n[g.\"x.y\"]\nh = 1\n";
        let json = "{\"a\": 1,\n\"b\":\n{\"c\": {\"d\": -2.5e3}},\n\n\"e\": [\n{\"f\": [1,\n2]},\n\n{\"f\":\"]}\\\"\"}],\n\"g\": {\"x.y\": {\n\"h\": null}}}";
        let check = |lines: &Lines, expected: &[(&str, usize)]| {
            for &(path, line) in expected {
                assert_eq!(lines.of(path), Some(line), "{path} in {lines:?}");
            }
            assert_eq!(lines.of("z"), None);
        };
        let expected = [("a", 1), ("b", 2), ("b.c.d", 3), ("e.0.f", 6), ("e.0.f.1", 7), ("e.1.f", 9), ("g.x.y.h", 11)];
        check(&Lines::toml(toml), &expected);
        check(&JsonLines::scan(json), &expected);
        // A key that is not there is looked for where its table begins.
        check(&Lines::toml(toml), &[("e.0.g", 5), ("e.1.g", 8), ("b.d", 2)]);
        check(&JsonLines::scan(json), &[("e.0.g", 6), ("e.1.g", 9), ("b.d", 2)]);
    }
}
