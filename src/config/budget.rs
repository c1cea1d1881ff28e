//! `[budget]`: what the result may take, or must keep, and the formats that weights may have for it.

use serde::{Deserialize, Serialize};

use super::presets;
use super::spec::{Dtype, Format, Share, Spec};
use super::{Config, Layer};
use crate::error::{Error, Kind, Result};
use crate::nearest::nearest;
use crate::onnx::DataType;
use crate::quant::Block;
use crate::quant::algorithm::Algorithm;

/// Formats that are chosen from where none are given.
const FORMATS: [&str; 3] = ["int4-g32", "int8", "float"];

/// The word for weights that are not quantized.
const FLOAT: &str = "float";

/// Operators whose weights can be cut into groups; weights of others have a scale for each channel instead.
const GROUPED: [&str; 3] = ["Gather", "Gemm", "MatMul"];

/// What the result may take, or must keep. Weights that no `[[layer]]`, `[op_type]` or `exclude` decides get the formats for
/// which the outputs lose least, or that are smallest. At most one of the limits may be given.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Formats to choose from: those of elements, with groups (`int4-g32`) or a scale for each channel (`int8`), `float`, and
    /// presets by name. Default: `int4-g32`, `int8` and `float`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub formats: Vec<String>,
    /// Most bits that the code of a weight has on average; scales come on top.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effective_bits: Option<f64>,
    /// Most bytes of the result: `40%` of the model, or `12MB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_size: Option<String>,
    /// Least signal-to-quantization-noise ratio of the worst output, in dB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_sqnr: Option<f64>,
}

/// What a budget limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Bits of the codes, on average.
    Bits(f64),
    /// Bytes, as a share of the model.
    Share(f64),
    /// Bytes.
    Bytes(u64),
    /// The quality of the outputs in dB, from below.
    Sqnr(f64),
}

impl Budget {
    /// Whether it says nothing.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// What it limits, if anything.
    ///
    /// # Errors
    /// The key that is wrong, and why: a number out of range, or a second limit.
    pub fn goal(&self) -> std::result::Result<Option<Goal>, (&'static str, Error)> {
        let wrong = |key, message: &str, hint: &str| Err((key, Error::new(Kind::Config, message).with_hint(hint)));
        let mut goals = Vec::new();
        if let Some(bits) = self.effective_bits {
            if !(bits > 0.0 && bits <= 32.0) {
                return wrong("effective_bits", "effective_bits is between 0 and 32", "4.8, for example");
            }
            goals.push(("effective_bits", Goal::Bits(bits)));
        }
        if let Some(text) = &self.max_size {
            let share = text.trim().strip_suffix('%').map(|share| share.trim().parse::<f64>().unwrap_or(f64::NAN));
            let goal = match share {
                Some(share) if share > 0.0 && share <= 100.0 => Some(Goal::Share(share / 100.0)),
                Some(_) => None,
                None => bytes(text).map(Goal::Bytes),
            };
            let Some(goal) = goal else {
                return wrong("max_size", &format!("\"{text}\" is not a size"), "40%, 12MB or 1.5GiB, for example");
            };
            goals.push(("max_size", goal));
        }
        if let Some(db) = self.min_sqnr {
            if !db.is_finite() {
                return wrong("min_sqnr", "min_sqnr is a number of decibels", "30, for example");
            }
            goals.push(("min_sqnr", Goal::Sqnr(db)));
        }
        match goals.as_slice() {
            [] => Ok(None),
            [(_, goal)] => Ok(Some(*goal)),
            [(first, _), (second, _), ..] => {
                let message = format!("{first} and {second} are two limits, of which a budget has one");
                wrong(second, &message, "keep one of them; the report shows what the other becomes")
            }
        }
    }

    /// The formats, those of few bits first.
    ///
    /// # Errors
    /// The index of a word that is no format, and why.
    pub fn choices(&self) -> std::result::Result<Vec<Choice>, (usize, Error)> {
        let defaults = FORMATS.map(str::to_owned);
        let words = if self.formats.is_empty() { defaults.as_slice() } else { self.formats.as_slice() };
        let mut choices: Vec<Choice> = Vec::new();
        for (index, word) in words.iter().enumerate() {
            if choices.iter().any(|choice| choice.name == *word) {
                return Err((index, Error::new(Kind::Config, format!("\"{word}\" is listed twice"))));
            }
            choices.push(Choice::parse(word).map_err(|error| (index, error))?);
        }
        choices.sort_by_key(|choice| choice.bits);
        Ok(choices)
    }
}

/// A size with its unit.
#[must_use]
pub fn bytes(text: &str) -> Option<u64> {
    const UNITS: [(&str, f64); 10] = [
        ("kib", 1024.0),
        ("mib", 1_048_576.0),
        ("gib", 1_073_741_824.0),
        ("tib", 1_099_511_627_776.0),
        ("kb", 1e3),
        ("mb", 1e6),
        ("gb", 1e9),
        ("tb", 1e12),
        ("b", 1.0),
        ("", 1.0),
    ];
    let lower = text.trim().to_ascii_lowercase();
    let parsed = UNITS.iter().find_map(|(unit, factor)| {
        let number: f64 = lower.strip_suffix(unit)?.trim_end().parse().ok()?;
        Some(number * factor).filter(|bytes| (1.0..1e18).contains(bytes))
    });
    parsed.map(|bytes| bytes as u64)
}

/// A format that weights may have.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// As it is written.
    pub name: String,
    /// Bits of a code; of float the bits of a float32.
    pub bits: usize,
    kind: Is,
}

#[derive(Clone, Debug, PartialEq)]
enum Is {
    Float,
    Elements { dtype: Dtype, group: Option<u32> },
    Preset(Box<Config>),
}

impl Choice {
    fn parse(word: &str) -> Result<Self> {
        let choice = |bits, kind| Ok(Self { name: word.to_owned(), bits, kind });
        if word == FLOAT {
            return choice(32, Is::Float);
        }
        if let Some(half) = [DataType::Float16, DataType::Bfloat16].map(DataType::name).into_iter().find(|n| *n == word)
        {
            return Err(Error::new(Kind::Config, format!("{half} is not a format of single weights"))
                .with_hint(format!("--dtype {half} stores all that \"{FLOAT}\" leaves in 16 bits")));
        }
        let (name, group) = match word.rsplit_once("-g").map(|(name, size)| (name, size.parse())) {
            Some((name, Ok(size))) => (name, Some(size)),
            _ => (word, None),
        };
        let block = Block::ALL.into_iter().find(|block| block.name() == word).map(Dtype::Block);
        let element = Format::parse(name).filter(|format| format.bits() <= 16).map(Dtype::Element);
        if let Some(dtype) = block.or(element) {
            if group == Some(0) {
                return Err(Error::new(Kind::Config, format!("\"{word}\": a group has at least one element")));
            }
            return choice(dtype.format().bits(), Is::Elements { dtype, group });
        }
        if presets::names().any(|preset| preset == word) {
            let preset = presets::load(word)?;
            let own = |op: &str| preset.op_type.get(op).and_then(|level| level.weight.as_ref()?.dtype);
            let all = preset.default.as_ref().and_then(|level| level.weight.as_ref()?.dtype);
            let bits = own("MatMul").or(all).map_or(8, |dtype| dtype.format().bits());
            return choice(bits, Is::Preset(Box::new(preset)));
        }
        let words = || Format::ALL.into_iter().map(Format::name).chain(Block::ALL.into_iter().map(Block::name));
        let error = Error::new(Kind::Config, format!("\"{word}\" is neither a format nor a preset"));
        let near = nearest(name, words().chain([FLOAT]).chain(presets::names()));
        let near = near.map_or_else(String::new, |near| format!("did you mean \"{near}\"? "));
        Err(error.with_hint(format!("{near}int4-g32, int8 and float are formats; `amax presets` lists presets")))
    }

    /// Whether weights stay as they are.
    #[must_use]
    pub fn is_float(&self) -> bool {
        self.kind == Is::Float
    }

    /// The rule that gives the weight of a site this format.
    #[must_use]
    pub fn layer(&self, site: &str, op: &str, signed_scales: bool) -> Layer {
        let (weight, algorithm) = match &self.kind {
            Is::Float => (Spec { enable: Some(false), ..Spec::default() }, None),
            Is::Elements { dtype, group } => {
                (elements(*dtype, group.filter(|_| GROUPED.contains(&op)), signed_scales), None)
            }
            Is::Preset(preset) => of_preset(preset, op),
        };
        Layer { pattern: exactly(site), weight: Some(weight), algorithm, ..Layer::default() }
    }
}

fn elements(dtype: Dtype, group: Option<u32>, signed_scales: bool) -> Spec {
    let format = dtype.format();
    let spec = Spec { enable: Some(true), dtype: Some(dtype), ..Spec::default() };
    if dtype.block().is_some() {
        return spec;
    }
    let symmetric = format.is_signed();
    let signed = signed_scales && symmetric && format.is_integer() && format.bits() < 8 && group.is_some();
    Spec {
        granularity: Some(if group.is_some() { Share::PerGroup } else { Share::PerChannel }),
        group_size: group,
        symmetric: Some(symmetric),
        signed_scale: Some(signed),
        ..spec
    }
}

/// What a preset says of weights of an operator.
fn of_preset(preset: &Config, op: &str) -> (Spec, Option<Algorithm>) {
    let mut spec = Spec { enable: Some(true), ..Spec::default() };
    for level in preset.default.iter().chain(preset.op_type.get(op)) {
        spec.enable = level.enable.or(spec.enable);
        if let Some(weight) = &level.weight {
            spec.overlay(weight);
        }
    }
    (spec, preset.algorithm.clone())
}

/// The pattern that matches this name alone.
fn exactly(name: &str) -> String {
    if name.starts_with("re:") || name.contains(['*', '?', '[', ']', '{', '}', '\\']) {
        format!("re:^{}$", regex::escape(name))
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::{Budget, Goal, exactly};
    use crate::config::Pattern;

    #[test]
    fn words_are_formats_presets_or_errors() {
        let check = |word: &str, expected: Result<usize, &str>| {
            let found = Budget { formats: vec![word.to_owned()], ..Budget::default() }.choices();
            match (found, expected) {
                (Ok(found), Ok(bits)) => assert_eq!(found[0].bits, bits, "{word}"),
                (Err((0, e)), Err(part)) => assert!(e.to_string().contains(part), "{word}: {e}"),
                (found, _) => panic!("{word}: {found:?}"),
            }
        };
        check("float", Ok(32));
        check("int4-g32", Ok(4));
        check("uint4-g128", Ok(4));
        check("int2", Ok(2));
        check("mxfp4", Ok(4));
        check("w4-hqq", Ok(4));
        check("int8", Ok(8));
        check("int8-g0", Err("at least one element"));
        check("int5", Err("did you mean"));
        check("float16", Err("--dtype float16"));
        check("int32", Err("neither a format nor a preset"));
    }

    #[test]
    fn one_limit_is_a_goal() {
        let check = |text: &str, expected: Result<Option<Goal>, &str>| {
            let budget: Budget = toml::from_str(text).expect("it parses");
            match (budget.goal(), expected) {
                (Ok(found), Ok(goal)) => assert_eq!(found, goal, "{text}"),
                (Err((_, e)), Err(part)) => assert!(e.to_string().contains(part), "{text}: {e}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        };
        check("", Ok(None));
        check("effective_bits = 4.8", Ok(Some(Goal::Bits(4.8))));
        check("max_size = \"40%\"", Ok(Some(Goal::Share(0.4))));
        check("max_size = \"1.5 MB\"", Ok(Some(Goal::Bytes(1_500_000))));
        check("min_sqnr = 30", Ok(Some(Goal::Sqnr(30.0))));
        check("effective_bits = 0", Err("between 0 and 32"));
        check("max_size = \"140%\"", Err("is not a size"));
        check("max_size = \"much\"", Err("is not a size"));
        check("min_sqnr = nan", Err("number of decibels"));
        check("effective_bits = 4\nmin_sqnr = 30", Err("two limits"));
    }

    #[test]
    fn a_name_is_matched_exactly() {
        for name in ["/a/b.weight", "a*b.weight", "a[0]{x}.weight", "re:x.weight", "a\\b?.weight"] {
            let pattern = Pattern::new(&exactly(name)).expect("valid");
            assert!(pattern.matches(name) && !pattern.matches("aXb.weight") && !pattern.matches(&format!("{name}x")));
            assert!(pattern.names_sites(), "{name}");
        }
    }
}
