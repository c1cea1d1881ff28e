//! Names of PyTorch modules and classes, translated to ONNX.
//!
//! A module `model.layers.0.mlp.fc1` becomes nodes `/model/layers.0/mlp/fc1/MatMul` and the like: dots become slashes
//! (those before the index of a list stay), and the operators of a module are named below it. Patterns on modules are
//! therefore made to match either separator, with or without one at the front, and the operator behind.

use std::fmt::Write as _;

/// Operators that a PyTorch class becomes; none if it has nothing to quantize, `None` if the class is unknown.
pub(super) fn operators(class: &str) -> Option<&'static [&'static str]> {
    let class = class.rsplit('.').next().unwrap_or(class);
    let class = class.strip_prefix("Quant").unwrap_or(class);
    Some(match class {
        "Linear" => &["Gemm", "MatMul"],
        "Conv1d" | "Conv2d" | "Conv3d" => &["Conv"],
        "ConvTranspose1d" | "ConvTranspose2d" | "ConvTranspose3d" => &["ConvTranspose"],
        "Embedding" | "EmbeddingBag" => &["Gather"],
        "LSTM" => &["LSTM"],
        "GRU" => &["GRU"],
        "LayerNorm" => &["LayerNormalization"],
        "LeakyReLU" => &["LeakyRelu"],
        "ReLU" => &["Relu"],
        "ReLU6" | "Hardtanh" => &["Clip"],
        "GELU" => &["Gelu"],
        "Sigmoid" => &["Sigmoid"],
        "Tanh" => &["Tanh"],
        "Softmax" => &["Softmax"],
        "Hardsigmoid" => &["HardSigmoid"],
        "Hardswish" => &["HardSwish"],
        "MaxPool1d" | "MaxPool2d" | "MaxPool3d" => &["MaxPool"],
        "AvgPool1d" | "AvgPool2d" | "AvgPool3d" => &["AveragePool"],
        "AdaptiveAvgPool1d" | "AdaptiveAvgPool2d" | "AdaptiveAvgPool3d" => &["AveragePool", "GlobalAveragePool"],
        "BatchNorm1d" | "BatchNorm2d" | "BatchNorm3d" | "InstanceNorm1d" | "InstanceNorm2d" | "InstanceNorm3d"
        | "GroupNorm" | "Dropout" | "Identity" => &[],
        _ => return None,
    })
}

/// The classes that [`operators`] knows and that have a weight, for hints.
pub(super) const CLASSES: &str = "known classes include Linear, Conv2d, ConvTranspose2d, Embedding, LSTM and GRU";

/// A pattern on nodes for a shell pattern on modules: the operators directly below the modules that it matches, or with
/// `children` all below them.
pub(super) fn nodes(module: &str, children: bool) -> String {
    if module == "*" {
        return "*".to_owned();
    }
    let (start, body) = expression(module);
    let end = if children { "([./]|$)" } else { "(/[^/]+)?$" };
    format!("re:{start}{body}{end}")
}

/// A pattern on sites or nodes for a shell pattern on quantizers, whose names are those of their modules with `.KIND_quantizer`
/// behind; `kind` is what the pattern ends in, if it says a kind.
pub(super) fn quantizers(pattern: &str, kind: Option<&str>) -> String {
    let Some(kind) = kind else {
        // It ends in `*`, which stands for at least the name of the quantizer.
        let stem = pattern.trim_end_matches('*');
        if stem.trim_start_matches('*').chars().all(plain) {
            return pattern.to_owned();
        }
        let Some(module) = stem.strip_suffix('.') else {
            let (start, body) = expression(stem);
            return format!("re:{start}{body}");
        };
        return nodes(module, true);
    };
    let tail = format!("{kind}_quantizer");
    let head = pattern.strip_suffix(tail.as_str()).unwrap_or(pattern);
    if head.ends_with('*') && head.chars().all(|c| c == '*' || plain(c)) && head.starts_with('*') {
        return pattern.to_owned();
    }
    let (module, operator) = match head.strip_suffix('.') {
        Some(module) => (module, "(/[^/]+)?[.]"),
        None => (head, ""),
    };
    let (start, body) = expression(module);
    format!("re:{start}{body}{operator}{tail}$")
}

/// Characters that mean themselves in globs and are the same in names of modules and nodes.
fn plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// A shell pattern as a regular expression, with what anchors its start.
fn expression(pattern: &str) -> (&'static str, String) {
    let (start, pattern) = match pattern.strip_prefix('*') {
        Some(rest) => ("", rest),
        None => ("^/?", pattern),
    };
    let mut body = String::new();
    let mut rest = pattern.chars();
    while let Some(c) = rest.next() {
        match c {
            '*' => body.push_str(".*"),
            '?' => body.push('.'),
            '.' => body.push_str("[./]"),
            '[' => {
                // As in Python's fnmatch: a bracket closes at the first `]` that is not its first character.
                let class: String = rest.as_str().to_owned();
                let from = usize::from(class.starts_with('!')) + 1;
                match class.get(from..).and_then(|tail| tail.find(']')).map(|at| at + from) {
                    Some(end) => {
                        let inner = &class[..end];
                        let (not, inner) = inner.strip_prefix('!').map_or(("", inner), |inner| ("^", inner));
                        let inner = inner.replace('\\', "\\\\").replace('[', "\\[").replace('^', "\\^");
                        let _ = write!(body, "[{not}{}]", inner.replace("&&", "&\\&"));
                        rest = rest.as_str()[end + 1..].chars();
                    }
                    None => body.push_str("\\["),
                }
            }
            c => body.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    (start, body)
}
