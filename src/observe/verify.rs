//! Two models as deployed: how close onnxruntime's own kernels come, which those are, and how long they take.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::compare::{Closeness, Pairs};
use super::pool::by_shape;
use super::run::Run;
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::runtime::{Deployed, Kernels};

/// Runs of each model that are timed, unless that takes longer than [`LONG`].
const TIMED: usize = 20;

/// How long samples are run again only to time them.
const LONG: Duration = Duration::from_secs(2);

/// What running two models as deployed shows.
#[derive(Clone, Debug)]
pub struct Found {
    /// How close each output is, over all samples.
    pub outputs: Vec<Closeness>,
    /// What the optimizer made of the reference and of the other model.
    pub kernels: [Kernels; 2],
    /// The median time of a sample in each, of `timed` runs in turn.
    pub latency: [Duration; 2],
    /// How many runs of each were timed.
    pub timed: usize,
}

/// Runs both models on the samples, in turn and one at a time, with everything that onnxruntime does by default. Times are
/// those of the runs alone; the first run of each model, and of each new shape of inputs, does not count.
///
/// # Errors
/// Outputs that do not match, a model or a sample that onnxruntime does not run, no samples, an interruption.
pub fn verify(reference: &Model, test: &Model, how: &Run<'_>) -> Result<Found> {
    let Run { samples, indices, progress, .. } = *how;
    let pairs = Pairs::of(reference, test, BTreeMap::new())?;
    let (first, second) = (Deployed::new(reference)?, Deployed::new(test)?);
    let kernels = [first.kernels()?, second.kernels()?];
    let order = by_shape(samples, indices);
    progress.start("verify", order.len() as u64);
    let mut rows = Vec::new();
    let mut times: [Vec<Duration>; 2] = Default::default();
    let mut warm = None;
    let begun = Instant::now();
    for (at, &index) in order.iter().cycle().enumerate() {
        let again = at >= order.len();
        if again && (times[0].len() >= TIMED || begun.elapsed() >= LONG) {
            break;
        }
        if progress.interrupted() {
            return Err(Error::interrupted());
        }
        let sample = samples.get(index)?;
        let run = |deployed: &Deployed| deployed.run(&sample).map_err(|e| e.at_sample(&samples.place(index)));
        let shape = samples.shape_key(index);
        if warm.as_ref() != Some(&shape) {
            run(&first)?;
            run(&second)?;
            warm = Some(shape);
        }
        let ((a, one), (b, other)) = (run(&first)?, run(&second)?);
        times[0].push(one);
        times[1].push(other);
        if !again {
            rows.extend(pairs.rows(&sample, &a, &b));
            progress.tick();
        }
    }
    progress.finish();
    let timed = times[0].len();
    if timed == 0 {
        return Err(Error::new(Kind::Samples, "there are no samples to run"));
    }
    let latency = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    });
    Ok(Found { outputs: pairs.total(rows), kernels, latency, timed })
}
