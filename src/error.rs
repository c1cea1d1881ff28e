//! The one error type: a kind, a sentence, where it happened, and what to do about it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// What amax functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Which part of the work failed. Decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Kind {
    /// A command line that makes no sense.
    Usage,
    /// A configuration, target or plan document.
    Config,
    /// A model file that cannot be read, or whose content is not a valid model.
    Model,
    /// Calibration samples that cannot be read or do not fit the model.
    Samples,
    /// The runtime cannot run this model.
    Runtime,
    /// A file that cannot be written.
    Output,
    /// The result did not pass a check that was asked for.
    Check,
    /// Interrupted by the user.
    Interrupted,
    /// A mistake in amax itself.
    Internal,
}

impl Kind {
    /// The process exit code: 1 internal, 2 usage or configuration, 3 model, 4 samples, 5 runtime, 6 output, 7 check,
    /// 130 interrupted.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Usage | Self::Config => 2,
            Self::Model => 3,
            Self::Samples => 4,
            Self::Runtime => 5,
            Self::Output => 6,
            Self::Check => 7,
            Self::Interrupted => 130,
        }
    }
}

/// Where an error happened; every part is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct At {
    /// The file that was read or written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The line of a text file, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// The pass that was running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<String>,
    /// The graph, where it is not the main one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graph: Option<String>,
    /// The node, with its operator: `"conv1" (Conv)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The tensor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The sample, by number and place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
}

/// A failure: what, where, why, and a way out. `{:?}` prints the same as `{}`, so that a `main` may return it.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    message: String,
    at: At,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure of `kind`; `message` is a clause in lower case without a final stop.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let inner = Inner { kind, message: message.into(), at: At::default(), hint: None, source: None };
        Self { inner: Box::new(inner) }
    }

    /// The user asked to stop before anything was written.
    #[must_use]
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted; nothing was written")
    }

    /// Shorthand for [`Kind::Model`].
    #[must_use]
    pub fn model(message: impl Into<String>) -> Self {
        Self::new(Kind::Model, message)
    }

    /// A system call on `path` that failed while doing `action` ("read", "write").
    #[must_use]
    pub fn io(kind: Kind, action: &str, path: &Path, source: std::io::Error) -> Self {
        let reason = match source.kind() {
            std::io::ErrorKind::NotFound => "there is no such file or folder".to_owned(),
            std::io::ErrorKind::IsADirectory => "it is a folder".to_owned(),
            std::io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            std::io::ErrorKind::StorageFull => "the disk is full".to_owned(),
            _ => source.to_string(),
        };
        Self::new(kind, format!("cannot {action} {}: {reason}", path.display())).with_source(source)
    }

    /// Which part failed.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// The sentence, without location and hint.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// Where it happened.
    #[must_use]
    pub fn at(&self) -> &At {
        &self.inner.at
    }

    /// The way out, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.inner.hint.as_deref()
    }

    /// One JSON object: `kind`, `exit_code`, `message`, `at` with the parts that are known, and `hint` or null.
    #[must_use]
    pub fn to_json(&self) -> String {
        let Inner { kind, message, at, hint, source: _ } = &*self.inner;
        let code = kind.exit_code();
        serde_json::json!({ "kind": kind, "exit_code": code, "message": message, "at": at, "hint": hint }).to_string()
    }

    /// Adds the file, unless one is named already.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Self {
        self.inner.at.file.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Adds the line of a text file, counted from 1.
    #[must_use]
    pub fn at_line(mut self, line: usize) -> Self {
        self.inner.at.line.get_or_insert(line);
        self
    }

    /// Adds the pass, unless one is named already.
    #[must_use]
    pub fn in_pass(mut self, pass: &str) -> Self {
        self.inner.at.pass.get_or_insert_with(|| pass.to_owned());
        self
    }

    /// Adds the node by name and operator, unless one is named already.
    #[must_use]
    pub fn at_node(mut self, name: &str, op: &str) -> Self {
        self.inner.at.node.get_or_insert_with(|| format!("\"{name}\" ({op})"));
        self
    }

    /// Adds the tensor, unless one is named already.
    #[must_use]
    pub fn at_value(mut self, name: &str) -> Self {
        self.inner.at.value.get_or_insert_with(|| name.to_owned());
        self
    }

    /// Adds the sample, unless one is named already.
    #[must_use]
    pub fn at_sample(mut self, sample: &str) -> Self {
        self.inner.at.sample.get_or_insert_with(|| sample.to_owned());
        self
    }

    /// Adds the graph, unless one is named already.
    #[must_use]
    pub fn in_graph(mut self, name: &str) -> Self {
        self.inner.at.graph.get_or_insert_with(|| name.to_owned());
        self
    }

    /// Says what the user can do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Keeps the error this one was made from.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind: _, message, at, hint, source: _ } = &*self.inner;
        f.write_str(message)?;
        let mut parts = Vec::new();
        let At { file, line, pass, graph, node, value, sample } = at;
        if let Some(node) = node {
            parts.push(format!("at node {node}"));
        }
        if let Some(value) = value {
            parts.push(format!("tensor \"{value}\""));
        }
        if let Some(sample) = sample {
            parts.push(format!("in sample {sample}"));
        }
        if let Some(graph) = graph {
            parts.push(format!("in graph \"{graph}\""));
        }
        if let Some(pass) = pass {
            parts.push(format!("in pass {pass}"));
        }
        if let Some(file) = file {
            parts.push(format!("in file {}", file.display()));
        }
        if let Some(line) = line {
            parts.push(format!("line {line}"));
        }
        if !parts.is_empty() {
            write!(f, "\n  {}", parts.join(", "))?;
        }
        if let Some(hint) = hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().map(|s| s as &(dyn std::error::Error + 'static))
    }
}
