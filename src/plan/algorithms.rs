//! Algorithms that a configuration asks for and that cannot be had.

use super::{Knowledge, Plan};
use crate::config::Config;
use crate::config::rules::Rules;
use crate::error::{Error, Result};
use crate::quant::algorithm::{Algorithm, Scope};

/// Refuses an algorithm for weights that has none to work on.
pub(super) fn refuse_idle(
    config: &Config,
    algorithm: Option<&Algorithm>,
    plan: &Plan,
    knowledge: &Knowledge,
) -> Result<()> {
    let Some(algorithm) = algorithm.filter(|a| a.scope() == Scope::Groups) else { return Ok(()) };
    let idle = plan.weights.iter().all(|w| w.quantizer.algorithm.is_none());
    if plan.weights.is_empty() || !idle || !knowledge.vetoes.is_empty() {
        return Ok(());
    }
    let name = algorithm.method.name();
    let message =
        format!("\"{name}\" is for integer weights of products whose activations stay float, and there are none");
    Err(config
        .error("algorithm", message)
        .with_hint("preset = \"w4\" has such weights; algorithm = \"max\" needs none"))
}

/// Refuses algorithms that do not exist yet.
pub(super) fn refuse_missing(config: &Config, rules: &Rules) -> Result<()> {
    let place = |error: Error, own: bool, path: &str| {
        if own {
            return config.source.at(error, path);
        }
        let preset = config.preset.as_deref().unwrap_or_default();
        Error::new(error.kind(), format!("preset {preset}: {}", error.message()))
            .with_hint("--set algorithm.method=max uses its formats without the algorithm")
    };
    if let Some(algorithm) = rules.algorithm() {
        algorithm.refuse().map_err(|e| place(e, config.algorithm.is_some(), "algorithm"))?;
    }
    for (index, algorithm) in rules.pre_quant_opt().iter().enumerate() {
        let own = !config.pre_quant_opt.is_empty();
        algorithm.refuse().map_err(|e| place(e, own, &format!("pre_quant_opt.{index}")))?;
    }
    Ok(())
}
