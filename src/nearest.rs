//! "Did you mean".

/// What others call things, and what they are here; the first that is a candidate is meant.
const WORDS: &[(&str, &[&str])] = &[
    ("4bit", &["w4", "int4"]),
    ("8bit", &["int8", "w8"]),
    ("awq", &["awq_lite"]),
    ("channel", &["per-channel"]),
    ("cpu", &["ort-cpu"]),
    ("dynamic", &["int8-dynamic"]),
    ("group", &["per-group"]),
    ("int4", &["int4", "w4"]),
    ("int4-weight", &["w4"]),
    ("int8-weight", &["w8"]),
    ("max", &["max", "minmax"]),
    ("onnxruntime", &["ort-cpu", "ort"]),
    ("ort", &["ort", "ort-cpu"]),
    ("q4", &["w4", "int4"]),
    ("q8", &["w8", "int8"]),
    ("rtn", &["none"]),
    ("smooth", &["int8-smooth", "smoothquant"]),
    ("smoothquant", &["smoothquant", "int8-smooth"]),
    ("static", &["int8"]),
    ("tensor", &["per-tensor"]),
    ("token", &["per-token"]),
    ("trt", &["tensorrt"]),
    ("vnni", &["ort-cpu-vnni"]),
    ("w4a16", &["w4"]),
    ("w8a16", &["w8"]),
    ("w8a8", &["int8"]),
];

/// The candidate closest to `word`, where one is close enough to be what was meant; the first of several. A word of the
/// field comes before one of similar letters.
///
/// Case aside, up to two edits are close, and in longer words one for every three bytes of the shorter one.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    let candidates: Vec<&str> = candidates.into_iter().collect();
    let spelt = lower.replace(['_', ' '], "-");
    let meant = WORDS.iter().filter(|(theirs, _)| *theirs == spelt).flat_map(|(_, ours)| *ours);
    if let Some(found) = meant.copied().find_map(|ours| candidates.iter().find(|c| **c == ours)) {
        return Some(found);
    }
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(&lower, &c.to_lowercase()), c))
        .filter(|&(distance, c)| distance <= 2.max(word.len().min(c.len()) / 3))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, c)| c)
}
