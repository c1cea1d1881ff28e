//! Algorithms that a configuration asks for and that have nothing to work on.

use super::{Knowledge, Plan};
use crate::config::Config;
use crate::config::rules::Rules;
use crate::error::{Error, Kind, Result};
use crate::quant::algorithm::{Algorithm, Method, Scope};

/// Refuses an algorithm for weights that has none to work on.
pub(super) fn refuse_idle(
    config: &Config,
    algorithm: Option<&Algorithm>,
    plan: &Plan,
    knowledge: &Knowledge,
) -> Result<()> {
    let asks = |a: &&Algorithm| match a.scope() {
        Scope::Groups => true,
        Scope::Samples => a.method != Method::Best,
        Scope::Nothing | Scope::Inputs => false,
    };
    let Some(algorithm) = algorithm.filter(asks) else { return Ok(()) };
    let idle = plan.weights.iter().all(|w| w.quantizer.algorithm.is_none());
    if plan.weights.is_empty() || !idle || !knowledge.vetoes.is_empty() {
        return Ok(());
    }
    let name = algorithm.method.name();
    let of = if algorithm.scope() == Scope::Groups {
        "integer weights of products whose activations stay float"
    } else {
        "weights of products and convolutions"
    };
    Err(config
        .error("algorithm", format!("\"{name}\" is for {of}, and there are none"))
        .with_hint("preset = \"w4\" has such weights; algorithm = \"max\" needs none"))
}

/// Refuses algorithms that lack samples.
pub(super) fn refuse_without_samples(config: &Config, rules: &Rules, knowledge: &Knowledge) -> Result<()> {
    if let Some(algorithm) = rules.algorithm() {
        let own = config.algorithm.is_some();
        needs_samples(algorithm, knowledge).map_err(|e| if own { config.source.at(e, "algorithm") } else { e })?;
    }
    for rule in rules.all() {
        let Some(algorithm) = &rule.level.algorithm else { continue };
        needs_samples(algorithm, knowledge).map_err(|e| rule.origin.at(e, "algorithm"))?;
    }
    Ok(())
}

/// Refuses an algorithm that can do nothing without samples where there are none.
fn needs_samples(algorithm: &Algorithm, knowledge: &Knowledge) -> Result<()> {
    if knowledge.samples || algorithm.scope() != Scope::Samples || algorithm.method == Method::Best {
        return Ok(());
    }
    let message = format!("\"{}\" needs samples of the model's inputs", algorithm.method.name());
    Err(Error::new(Kind::Samples, message)
        .with_hint("give --calib PATH, or use \"best\", which takes samples where there are some, or \"max\""))
}
