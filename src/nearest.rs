//! "Did you mean".

/// The candidate closest to `word`, where one is close enough to be what was meant; the first of several.
///
/// Case aside, up to two edits are close, and in longer words one for every three bytes of the shorter one.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(&lower, &c.to_lowercase()), c))
        .filter(|&(distance, c)| distance <= 2.max(word.len().min(c.len()) / 3))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, c)| c)
}
