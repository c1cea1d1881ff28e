//! Patterns for names of nodes and sites.

use globset::{Glob, GlobMatcher};
use regex::Regex;

use crate::error::{Error, Kind, Result};

/// A glob, or after `re:` a regular expression, for names of nodes and sites.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    /// The parts between the stars, if the glob has no other wildcards: most have none, and large models have many names.
    Stars(Vec<String>),
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
            if text.contains(['?', '[', ']', '{', '}', '\\']) || text.contains("**") {
                Matcher::Glob(glob.compile_matcher())
            } else {
                Matcher::Stars(text.split('*').map(str::to_owned).collect())
            }
        };
        Ok(Self { text: text.to_owned(), matcher })
    }

    /// The text as it was written.
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
            Matcher::Stars(parts) => matches_stars(parts, name),
            Matcher::Glob(glob) => self.text == name || glob.is_match(name),
            Matcher::Regex(expression) => expression.is_match(name),
        }
    }
}

/// Whether a name consists of these parts in order, with anything between them.
fn matches_stars(parts: &[String], name: &str) -> bool {
    let [first, middle @ .., last] = parts else { return parts.first().is_some_and(|only| only == name) };
    let inner = name.strip_prefix(first.as_str()).and_then(|rest| rest.strip_suffix(last.as_str()));
    let Some(mut rest) = inner else { return false };
    middle.iter().all(|part| match rest.find(part.as_str()) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use globset::Glob;

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

    /// Every text of up to `length` of these signs.
    fn texts(signs: &str, length: usize) -> Vec<String> {
        let mut all = vec![String::new()];
        let mut begin = 0;
        for _ in 0..length {
            let end = all.len();
            for index in begin..end {
                all.extend(signs.chars().map(|sign| format!("{}{sign}", all[index])).collect::<Vec<_>>());
            }
            begin = end;
        }
        all
    }

    #[test]
    fn stars_match_as_in_globs() {
        let names = texts("ab/", 5);
        for text in texts("ab/*", 4).iter().filter(|text| !text.contains("**")) {
            let (ours, glob) = (Pattern::new(text).expect("valid"), Glob::new(text).expect("valid").compile_matcher());
            for name in &names {
                assert_eq!(ours.matches(name), glob.is_match(name), "{text} on {name}");
            }
        }
    }
}
