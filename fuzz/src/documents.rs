//! Documents that are broken word by word: TOML, JSON, lines of JSON, and the text of models.

use super::choices::Choose;

/// What stands where something else should.
const ODD: [&str; 28] = [
    "",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "255",
    "1e400",
    "-1e-400",
    "nan",
    "inf",
    "-0.0",
    "0.5",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "18446744073709551616",
    "\"\"",
    "\"*\"",
    "true",
    "null",
    "[]",
    "{}",
    "[[]]",
    "\u{0}",
    "é",
    "\u{feff}",
];

/// A word of a document: a string in quotes, a name or number, a run of blanks, or one character.
fn words(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let named = |c: char| c.is_alphanumeric() || "_-+./".contains(c);
        let end = if first == '"' {
            rest[1..].find(['"', '\n']).map_or(rest.len(), |at| at + 2)
        } else if named(first) {
            rest.find(|c| !named(c)).unwrap_or(rest.len())
        } else if first == ' ' {
            rest.find(|c| c != ' ').unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let (word, after) = rest.split_at(end);
        found.push(word);
        rest = after;
    }
    found
}

/// What kind of word: only words of one kind replace each other, most of the time, so that the result can be read.
fn kind(word: &str) -> u8 {
    match word.chars().next() {
        Some('"') => 0,
        Some(c) if c.is_ascii_digit() || c == '-' => 1,
        Some(c) if c.is_alphanumeric() => 2,
        Some(' ') => 3,
        _ => 4,
    }
}

/// A seed, broken in a few places.
pub fn mutant(seeds: &[String], random: &mut impl Choose) -> String {
    let mut text = random.one_of(seeds).cloned().unwrap_or_default();
    for _ in 0..=random.below(4) {
        let other = random.one_of(seeds).map_or("", String::as_str);
        text = if random.below(3) == 0 { lines(&text, other, random) } else { word(&text, other, random) };
    }
    text
}

fn lines(text: &str, other: &str, random: &mut impl Choose) -> String {
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    let theirs: Vec<&str> = other.split_inclusive('\n').collect();
    let (at, to) = (random.below(lines.len()), random.below(lines.len()));
    if lines.is_empty() {
        return other.to_owned();
    }
    match random.below(6) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(to, lines[at]),
        2 => lines.swap(at, to),
        3 => lines.truncate(at),
        _ => lines.insert(to, random.one_of(&theirs).copied().unwrap_or_default()),
    }
    lines.concat()
}

fn word(text: &str, other: &str, random: &mut impl Choose) -> String {
    let mut ours = words(text);
    let places: Vec<usize> = (0..ours.len()).filter(|&at| kind(ours[at]) != 3).collect();
    let Some(&at) = random.one_of(&places) else { return other.to_owned() };
    let alike: Vec<&str> = words(other).into_iter().filter(|word| kind(word) == kind(ours[at])).collect();
    match random.below(10) {
        0 => drop(ours.remove(at)),
        1 => ours.insert(at, ours[at]),
        2 => ours[at] = random.one_of(&words(other)).copied().unwrap_or_default(),
        3 | 4 => ours[at] = ODD[random.below(ODD.len())],
        _ => ours[at] = random.one_of(&alike).copied().unwrap_or_default(),
    }
    ours.concat()
}
