//! Text documents that people write: TOML files, and the words in them.

use std::path::Path;

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
            .with_hint(format!("name the {what}, a .toml file"))
    })
}

/// What is wrong with a TOML document, and where.
pub fn syntax(text: &str, error: &toml::de::Error) -> Error {
    let at_line = |message: String| {
        let error_at = Error::new(Kind::Config, message);
        match error.span() {
            Some(span) => error_at.at_line(text.bytes().take(span.start).filter(|&b| b == b'\n').count() + 1),
            None => error_at,
        }
    };
    let Some((key, valid)) = unknown_key(error.message()) else {
        return at_line(error.message().trim_end().replace('\n', ", ").replace('`', "\""));
    };
    let what = if error.message().starts_with("unknown field") { "key" } else { "word" };
    let unknown = at_line(format!("unknown {what} \"{key}\": what can stand here is {}", valid.join(", ")));
    match nearest(key, valid) {
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
