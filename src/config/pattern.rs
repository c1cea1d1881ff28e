//! Names and patterns on them.

use globset::{Glob, GlobMatcher};
use regex::Regex;

use crate::error::{Error, Kind, Result};

/// A glob, or after `re:` a regular expression, on names of nodes and sites.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    Glob(GlobMatcher),
    Regex(Regex),
}

impl Pattern {
    /// Parses a glob, whose `*` also matches `/`, or `re:` and a regular expression that may match anywhere in a name.
    ///
    /// # Errors
    /// An unbalanced bracket or brace, or what the `regex` crate does not accept.
    pub fn new(text: &str) -> Result<Self> {
        let matcher = if let Some(expression) = text.strip_prefix("re:") {
            Matcher::Regex(Regex::new(expression).map_err(|e| {
                let message = e.to_string();
                // The lines before draw the expression and a mark below it.
                let why = message.lines().last().unwrap_or_default().trim_start_matches("error: ");
                Error::new(Kind::Config, format!("\"{text}\" is not a regular expression: {why}"))
            })?)
        } else {
            let glob = Glob::new(text).map_err(|e| {
                Error::new(Kind::Config, format!("\"{text}\" is not a glob: {}", e.kind()))
                    .with_hint("`*` matches anything, `?` one character, `[ab]` a choice, `{x,y}` alternatives")
            })?;
            Matcher::Glob(glob.compile_matcher())
        };
        Ok(Self { text: text.to_owned(), matcher })
    }

    /// As it was written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it is written for names of sites: it has `.input`, `.output`, `.weight` or `.bias` in it, as such or as an
    /// alternative, or one of these before `_quantizer`. Other patterns are for names of nodes, so that `*output*` does
    /// not mean every output.
    #[must_use]
    pub fn names_sites(&self) -> bool {
        ["input", "output", "weight", "bias"].iter().any(|kind| {
            self.text.match_indices(kind).any(|(at, _)| {
                let before = self.text[..at].chars().next_back();
                before.is_some_and(|c| ".{,|(".contains(c)) || self.text[at + kind.len()..].starts_with("_quantizer")
            })
        })
    }

    /// The pattern without the kind of site at its end, and that end: `/head/fc` and `.weight`.
    #[must_use]
    pub fn parts(&self) -> (&str, &str) {
        let ends = ["input", "output", "weight", "bias"].map(|kind| format!(".{kind}"));
        let bare = self.text.strip_suffix("_quantizer").unwrap_or(&self.text);
        let node = ends.iter().find_map(|end| bare.strip_suffix(end.as_str())).unwrap_or(&self.text);
        self.text.split_at(node.len())
    }

    /// Whether it matches a name.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match &self.matcher {
            Matcher::Glob(glob) => self.text == name || glob.is_match(name),
            Matcher::Regex(expression) => expression.is_match(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn patterns_are_globs_or_regular_expressions() {
        let check = |pattern: &str, name: &str, matches: bool| {
            assert_eq!(Pattern::new(pattern).expect("valid").matches(name), matches, "{pattern} on {name}");
        };
        check("/encoder/*", "/encoder/layer.0/MatMul", true);
        check("conv?", "conv1", true);
        check("conv?", "conv12", false);
        check("re:^/encoder/layer\\.[0-5]/", "/encoder/layer.3/MatMul", true);
        check("re:^/encoder/layer\\.[0-5]/", "/encoder/layer.6/MatMul", false);
        check("re:MatMul$", "/a/MatMul", true);
        let sites =
            ["*.weight", "*{.input,.bias}", "*.{input,weight}", "*lm_head*weight_quantizer", "re:\\.(input|output)$"];
        assert!(sites.iter().all(|p| Pattern::new(p).expect("valid").names_sites()));
        let nodes = ["*", "*output*", "/input_layer/*", "*weight"];
        assert!(nodes.iter().all(|p| !Pattern::new(p).expect("valid").names_sites()));
        assert!(Pattern::new("re:(").is_err() && Pattern::new("{a").is_err());
    }
}
