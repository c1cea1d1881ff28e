//! What was chosen for a budget.

use std::collections::BTreeMap;

use serde::Serialize;

use super::layout::{bytes, count, decibels, table, wrap};
use super::text::WIDTH;

/// What was chosen for a budget, and what it costs.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BudgetReport {
    /// What it had to keep.
    pub limit: String,
    /// Bits of the codes of the weights that were chosen for, on average.
    pub effective_bits: f64,
    /// Signal to quantization noise at the worst output as predicted, in dB.
    pub predicted_db: f64,
    /// The same as measured on the held-out samples.
    pub measured_db: f64,
    /// The choice and its neighbours, those of few bits first.
    pub curve: Vec<CurvePoint>,
    /// What the user's metric said of which model, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<CheckRow>,
    /// The weights that were chosen for.
    pub groups: Vec<GroupRow>,
}

/// A choice of formats.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CurvePoint {
    /// Bits of the codes, on average.
    pub effective_bits: f64,
    /// Bytes of the whole model.
    pub bytes: u64,
    /// Quality of the worst output as predicted, in dB.
    pub predicted_db: f64,
    /// The same as measured.
    pub measured_db: f64,
    /// Whether it is the result.
    pub chosen: bool,
}

/// What a metric said of a model.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CheckRow {
    /// Bits of the codes, on average; `None` of the float model.
    pub effective_bits: Option<f64>,
    /// Bytes of the whole model.
    pub bytes: u64,
    /// The score.
    pub score: f64,
    /// Whether it is enough.
    pub passed: bool,
}

/// Weights that have one format.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct GroupRow {
    /// Their sites.
    pub weights: Vec<String>,
    /// The format.
    pub format: String,
    /// What they take.
    pub bytes: u64,
    /// Quality of the worst output with only these quantized, in dB.
    pub noise_db: f64,
    /// The next smaller format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down: Option<Step>,
    /// The next larger format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up: Option<Step>,
}

/// What another format would cost.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Step {
    /// The format.
    pub format: String,
    /// What the weights would take.
    pub bytes: u64,
    /// Quality of the worst output with only these weights quantized, in dB.
    pub noise_db: f64,
}

impl BudgetReport {
    /// As people read it.
    pub(super) fn text(&self, verbose: bool) -> String {
        let mut formats: BTreeMap<&str, usize> = BTreeMap::new();
        for group in &self.groups {
            *formats.entry(&group.format).or_default() += 1;
        }
        let formats: Vec<String> = formats.iter().map(|(format, groups)| format!("{groups} {format}")).collect();
        let line = format!(
            "budget   {}: {} of weights, {}",
            self.limit,
            count(self.groups.len(), "group"),
            formats.join(", ")
        );
        let mut out = format!("\n{}\n", wrap(&line, 0, 9, WIDTH));
        let mut rows = vec![["", "bits", "size", "predicted", "measured"].map(str::to_owned).to_vec()];
        rows.extend(self.curve.iter().map(|point| {
            vec![
                if point.chosen { "chosen".to_owned() } else { String::new() },
                format!("{:.2}", point.effective_bits),
                bytes(point.bytes),
                decibels(point.predicted_db),
                decibels(point.measured_db),
            ]
        }));
        out += &table(&rows, &[1, 2, 3, 4]);
        if !self.checks.is_empty() {
            let mut rows = vec![["checks", "bits", "size", "score"].map(str::to_owned).to_vec()];
            rows.extend(self.checks.iter().map(|row| {
                let said = if row.passed { "enough" } else { "too low" };
                let (said, bits) =
                    row.effective_bits.map_or(("float", String::new()), |bits| (said, format!("{bits:.2}")));
                vec![said.to_owned(), bits, bytes(row.bytes), row.score.to_string()]
            }));
            out += &table(&rows, &[1, 2, 3]);
        }
        if verbose {
            let step = |step: &Option<Step>| {
                step.as_ref().map_or(String::new(), |s| format!("{} {}", s.format, decibels(s.noise_db)))
            };
            let mut rows =
                vec![["weights", "format", "size", "alone", "smaller", "larger"].map(str::to_owned).to_vec()];
            rows.extend(self.groups.iter().map(|group| {
                let weights = group.weights.join(" ");
                let (size, alone) = (bytes(group.bytes), decibels(group.noise_db));
                vec![weights, group.format.clone(), size, alone, step(&group.down), step(&group.up)]
            }));
            out += &table(&rows, &[2, 3]);
        }
        out
    }
}
