//! Which layers cost the most at the outputs, measured.
//!
//! A tensor can be served well by its range and still ruin the result: a logarithm, a division or a gate behind it makes
//! small errors large. So each group of layers is quantized alone, run on held-out samples, and compared with the float
//! model; the noise of groups adds up well enough to choose from.

use std::collections::BTreeMap;

use super::compare;
use super::run::Run;
use crate::error::Result;
use crate::ir::{Model, Tensor};
use crate::numerics::metrics::Metrics;
use crate::onnx::DataType;
use crate::plan::{Plan, Veto};
use crate::reason::{Decibels, Reason};

/// Most groups that are measured, each at the cost of compiling and running the model.
const GROUPS: usize = 16;

/// Most samples that each group is measured on.
pub const SAMPLES: usize = 2;

/// Noise-to-signal ratio at the worst output, of each group of layers quantized alone.
#[derive(Debug)]
pub struct Sensitivity {
    groups: Vec<(Vec<String>, f64)>,
    /// Those that were taken out.
    taken: Vec<(Vec<String>, f64)>,
}

/// Float outputs to compare with.
pub struct Reference<'a> {
    run: Run<'a>,
    outputs: Vec<Vec<(String, Tensor)>>,
}

impl<'a> Reference<'a> {
    /// Runs the float model on the samples.
    ///
    /// # Errors
    /// As [`compare::outputs`].
    pub fn new(model: &Model, run: Run<'a>) -> Result<Self> {
        Ok(Self { outputs: compare::outputs(&compare::with_deciding(model), &run)?, run })
    }

    /// Noise-to-signal ratio of another model at its worst float output.
    ///
    /// # Errors
    /// As [`compare::outputs`].
    pub fn noise(&self, model: &Model) -> Result<f64> {
        let mut total: BTreeMap<&str, Metrics> = BTreeMap::new();
        let outputs = compare::outputs(&compare::with_deciding(model), &self.run)?;
        for (reference, test) in self.outputs.iter().zip(&outputs) {
            for (name, a) in reference {
                if a.dtype() == DataType::Float
                    && let Some((_, b)) = test.iter().find(|(n, b)| n == name && a.dims() == b.dims())
                    && let (Some(x), Some(y)) = (a.to_f32(), b.to_f32())
                {
                    total.entry(name).or_default().feed(&x, &y);
                }
            }
        }
        Ok(total.values().map(|m| 10f64.powf(-m.sqnr_db() / 10.0)).filter(|n| !n.is_nan()).fold(0.0, f64::max))
    }
}

/// Measures. `quantized` makes the model in which just the layers with these weight sites are quantized.
///
/// # Errors
/// As `quantized`, or as [`compare::outputs`].
pub fn measure(
    plan: &Plan,
    reference: &Reference<'_>,
    mut quantized: impl FnMut(&BTreeMap<String, Veto>) -> Result<Model>,
) -> Result<Sensitivity> {
    let sites: Vec<&String> = plan.weights.iter().map(|w| &w.site).filter(|s| s.ends_with(".weight")).collect();
    let size = sites.len().div_ceil(GROUPS).max(1);
    let progress = reference.run.progress;
    progress.start("measure", sites.len().div_ceil(size) as u64);
    let mut groups = Vec::new();
    for group in sites.chunks(size) {
        let others = sites
            .iter()
            .filter(|s| !group.contains(s))
            .map(|s| ((*s).clone(), Veto { why: Reason::LeftOut, dynamic: false }));
        let noise = reference.noise(&quantized(&others.collect())?)?;
        groups.push((group.iter().map(|s| (*s).clone()).collect(), noise));
        progress.tick();
    }
    progress.finish();
    Ok(Sensitivity { groups, taken: Vec::new() })
}

impl Sensitivity {
    /// The layers whose group cost the most.
    #[must_use]
    pub fn worst(mut self) -> Option<Vec<String>> {
        self.taken.append(&mut self.groups);
        self.taken.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(sites, _)| sites)
    }

    /// The fewest groups, noisiest first, without which the rest is predicted to leave `target_db` at the outputs; taken
    /// out of the list. Empty if that is predicted already.
    pub fn take_worst(&mut self, target_db: f64) -> BTreeMap<String, Veto> {
        self.groups.sort_by(|a, b| a.1.total_cmp(&b.1));
        let budget = 10f64.powf(-target_db / 10.0);
        let mut vetoes = BTreeMap::new();
        while self.groups.iter().map(|g| g.1).sum::<f64>() > budget {
            let Some((sites, noise)) = self.groups.pop() else { break };
            let db = Decibels(-10.0 * noise.log10());
            self.taken.push((sites.clone(), noise));
            vetoes.extend(sites.into_iter().map(|site| (site, Veto { why: Reason::Costly { db }, dynamic: false })));
        }
        vetoes
    }
}

#[cfg(test)]
mod tests {
    use super::Sensitivity;

    #[test]
    fn takes_the_noisiest_groups_until_the_rest_fits() {
        let group = |name: &str, db: f64| (vec![name.to_owned()], 10f64.powf(-db / 10.0));
        let check = |target: f64, expected: &[&str]| {
            let mut found =
                Sensitivity { groups: vec![group("a", 30.0), group("b", 8.0), group("c", 13.0)], taken: vec![] };
            assert_eq!(found.take_worst(target).into_keys().collect::<Vec<_>>(), expected);
        };
        check(5.0, &[]);
        check(10.0, &["b"]);
        check(20.0, &["b", "c"]);
        check(40.0, &["a", "b", "c"]);
    }
}
