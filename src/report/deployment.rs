//! What a quantized model is where it runs, beside the float model.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::QualityRow;
use super::layout::{bytes, decibels, wrap};
use super::text::{WIDTH, quality};
use crate::ir::{Model, file};
use crate::observe::verify::Found;
use crate::runtime::{Kernels, onnxruntime};

/// From how many dB on an output that is worse than computed is warned about.
const WORSE_DB: f64 = 1.0;

/// Two models as onnxruntime runs them by default; of each pair the first is the float model.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Deployment {
    /// The version of onnxruntime.
    pub onnxruntime: String,
    /// Quality of each output.
    pub quality: Vec<QualityRow>,
    /// What the optimizer made of them.
    pub kernels: [Kernels; 2],
    /// Bytes of the whole model.
    pub bytes: [u64; 2],
    /// Median milliseconds of one sample.
    pub milliseconds: [f64; 2],
    /// Runs of each that were timed.
    pub timed: usize,
}

impl Deployment {
    pub(crate) fn new(found: Found, models: [&Model; 2]) -> Self {
        let Found { outputs, kernels, latency, timed } = found;
        Self {
            onnxruntime: onnxruntime().unwrap_or_default(),
            quality: outputs.iter().map(QualityRow::new).collect(),
            kernels,
            bytes: models.map(file::estimated_size),
            milliseconds: latency.map(|time| time.as_secs_f64() * 1e3),
            timed,
        }
    }

    /// Outputs that keep less than was computed, in sentences.
    #[must_use]
    pub fn worse_than(&self, computed: &[QualityRow]) -> Vec<String> {
        let rows = self.quality.iter().filter_map(|row| {
            let promised = computed.iter().find(|c| c.output == row.output && c.into.is_none())?.sqnr_db()?;
            let kept = row.sqnr_db()?;
            // Beyond this the runtimes' own rounding is what differs.
            let apart = promised.min(80.0) - kept.min(80.0);
            (apart > WORSE_DB || kept.is_nan()).then(|| {
                format!(
                    "\"{}\" keeps {} as onnxruntime {} runs the file on this machine, and {} as computed: its kernels \
                     round or saturate otherwise; amax verify shows which those are",
                    row.output,
                    decibels(kept),
                    self.onnxruntime,
                    decibels(promised)
                )
            })
        });
        rows.collect()
    }

    /// What people read.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut out = quality("output", &self.quality, [6, 5]);
        let [before, after] = self.bytes;
        let share = |a: f64, b: f64| format!("{:.0} %", b / a * 100.0);
        let size = share(before.max(1) as f64, after as f64);
        let _ = writeln!(out, "\nbytes     {} -> {} ({size})", bytes(before), bytes(after));
        let _ = writeln!(out, "latency   {}", self.latency());
        let [float, quantized] = &self.kernels;
        for (what, counts) in
            [("integers", &quantized.integer), ("packed", &quantized.packed), ("float", &quantized.float)]
        {
            if !counts.is_empty() {
                let _ = writeln!(out, "{}", wrap(&format!("{what:<10}{}", listed(counts)), 0, 10, WIDTH));
            }
        }
        if !quantized.dequantized.is_empty() {
            let line = format!(
                "unfused   {} dequantized at every run: {}",
                super::layout::count(quantized.dequantized.len(), "constant"),
                quantized.dequantized.join(", ")
            );
            let _ = writeln!(out, "{}", wrap(&line, 0, 10, WIDTH));
        }
        if !float.float.is_empty() {
            let _ = writeln!(out, "{}", wrap(&format!("before    {}", listed(&float.float)), 0, 10, WIDTH));
        }
        out
    }

    /// `1.20 ms -> 0.61 ms (51 %), median of 20 runs`.
    #[must_use]
    pub fn latency(&self) -> String {
        let [before, after] = self.milliseconds;
        let share = after / before.max(1e-9) * 100.0;
        format!("{before:.2} ms -> {after:.2} ms ({share:.0} %), median of {} runs in turn", self.timed)
    }
}

/// `12 Conv, 1 Gemm`.
fn listed(counts: &BTreeMap<String, usize>) -> String {
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|(op, n)| (std::cmp::Reverse(**n), op.as_str()));
    counts.iter().map(|(op, n)| format!("{n} {op}")).collect::<Vec<_>>().join(", ")
}
