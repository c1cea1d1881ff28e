//! Which sites their numbers serve too badly.

use std::collections::BTreeMap;

use super::Solution;
use super::activation::{seen, tensor};
use crate::config::Guard;
use crate::numerics::Format;
use crate::plan::{Plan, Veto};
use crate::quant::QParam;
use crate::reason::{Decibels, Reason};
use crate::statistics::Statistics;

/// The sites that their ranges serve too badly, with the reason: activations by the name of the float tensor, weights by that
/// of the site.
#[must_use]
pub fn guard(plan: &Plan, solution: &Solution, statistics: &Statistics, guard: &Guard) -> BTreeMap<String, Veto> {
    let mut vetoes = BTreeMap::new();
    if !guard.enabled {
        return vetoes;
    }
    for (name, activation) in &plan.activations {
        let Some(&QParam { scale, zero_point }) = solution.activations.get(name) else { continue };
        let tensor = tensor(name, activation);
        let format = activation.quantizer.dtype;
        let Some(site) = statistics.sites.get(tensor).filter(|_| is_judged(format) && format.is_integer()) else {
            continue;
        };
        let (low, high) = format.range();
        let quality = site.sqnr_db(scale, zero_point, low, high);
        if quality < guard.static_db {
            let why = Reason::Guarded {
                tensor: tensor.to_owned(),
                db: Decibels(quality),
                format,
                range: Some(seen(site)),
                limit: guard.static_db,
            };
            vetoes.insert(tensor.to_owned(), Veto { why, dynamic: site.dynamic_sqnr_db() >= guard.dynamic_db });
        }
    }
    for (weight, solved) in plan.weights.iter().zip(&solution.weights) {
        let format = weight.quantizer.dtype;
        if is_judged(format) && solved.sqnr_db() < guard.weight_db {
            let why = Reason::Guarded {
                tensor: weight.tensor.clone(),
                db: Decibels(solved.sqnr_db()),
                format,
                range: None,
                limit: guard.weight_db,
            };
            vetoes.insert(weight.site.clone(), Veto { why, dynamic: false });
        }
    }
    vetoes
}

/// Whether a format is held to the thresholds. Fewer than eight bits cannot reach them, and were asked for by name.
fn is_judged(format: Format) -> bool {
    format.bits() >= 8
}
