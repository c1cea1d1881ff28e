//! The outputs of models on samples, and how far those of two models are apart.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::pool::{Blind, by_shape, run};
use super::run::Run;
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::numerics::metrics::Metrics;
use crate::runtime::{Observe, Options, Session};

/// How close the outputs of two models are, by output name.
///
/// # Errors
/// Outputs that do not match, a model that the runtime cannot run, a sample that does not fit, or an interruption.
pub fn compare(reference: &Model, test: &Model, how: &Run<'_>) -> Result<Vec<(String, Metrics)>> {
    let Run { samples, indices, runtime, threads, progress, .. } = *how;
    let names =
        |m: &Model| -> Vec<String> { m.graph(m.main()).outputs().map(|v| m.value(v).name().to_owned()).collect() };
    let (outputs, others) = (names(reference), names(test));
    let lacking = outputs.iter().find(|o| !others.contains(o)).map(|o| (o, "second", &others));
    if let Some((output, which, has)) =
        lacking.or_else(|| others.iter().find(|o| !outputs.contains(o)).map(|o| (o, "first", &outputs)))
    {
        return Err(Error::model(format!("the {which} model has no such output"))
            .at_value(output)
            .with_hint(format!("its outputs are {}: are these the same model?", has.join(", "))));
    }
    let session = |model| Session::with_options(model, &[], Options { runtime, ..Options::default() });
    let (first, second) = (session(reference)?, session(test)?);
    let order = by_shape(samples, indices);
    progress.start("compare", order.len() as u64);
    let found: Mutex<BTreeMap<usize, Vec<(String, Metrics)>>> = Mutex::new(BTreeMap::new());
    run(
        samples,
        &order,
        threads,
        progress,
        |(), index| {
            let sample = samples.get(index)?;
            let nothing: Arc<dyn Observe> = Arc::new(Blind);
            let (a, b) = (first.run(&sample, &nothing)?, second.run(&sample, &nothing)?);
            let mut row = Vec::new();
            for (name, a) in &a {
                let Some((_, b)) = b.iter().find(|(n, _)| n == name) else { continue };
                let (Some(x), Some(y)) = (a.to_f32().or_else(|| integers(a)), b.to_f32().or_else(|| integers(b)))
                else {
                    continue;
                };
                if x.len() != y.len() {
                    return Err(Error::new(Kind::Model, format!("shapes differ: {:?} and {:?}", a.dims(), b.dims()))
                        .at_value(name));
                }
                row.push((name.clone(), Metrics::of(&x, &y)));
            }
            found.lock().unwrap_or_else(PoisonError::into_inner).insert(index, row);
            Ok(())
        },
        || (),
    )?;
    progress.finish();
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut total: Vec<(String, Metrics)> = Vec::new();
    for row in found.into_values() {
        for (name, metrics) in row {
            match total.iter_mut().find(|(n, _)| *n == name) {
                Some((_, sum)) => sum.merge(&metrics),
                None => total.push((name, metrics)),
            }
        }
    }
    Ok(total)
}

/// The outputs of a model for each sample, in the order of the indices.
///
/// # Errors
/// As [`compare`].
pub fn outputs(model: &Model, how: &Run<'_>) -> Result<Vec<Vec<(String, Tensor)>>> {
    let Run { samples, indices, runtime, progress, .. } = *how;
    // The float model was checked against the plain plan already; what is compared here differs in its quantizers only.
    let session = Session::with_options(model, &[], Options { runtime, check: false, ..Options::default() })?;
    let nothing: Arc<dyn Observe> = Arc::new(Blind);
    indices
        .iter()
        .map(|&index| {
            if progress.interrupted() {
                return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
            }
            session.run(&samples.get(index)?, &nothing)
        })
        .collect()
}

fn integers(tensor: &Tensor) -> Option<Vec<f32>> {
    Some(tensor.to_i64()?.into_iter().map(|v| v as f32).collect())
}
