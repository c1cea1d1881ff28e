//! Biases that take up what quantization moves the mean of each output channel by.
//!
//! Rounding errors of a weight have a mean that its inputs, which are seldom centred, carry to every output; and what clipping
//! takes away has one as well. The next layer sees the sum of all before it, so layers are corrected in their order.

use std::collections::BTreeSet;
use std::sync::Mutex;

use ndarray::{ArrayD, Axis};

use super::Walk;
use crate::error::Result;
use crate::ir::Tensor;
use crate::numerics::metrics::Metrics;
use crate::observe::blocks::{Block, Seen};
use crate::plan::Correction;
use crate::reason::Reason;
use crate::solve::Corrected;
use crate::statistics::Sums;

/// How far two outputs are apart, over some samples.
#[derive(Clone, Default)]
struct Apart {
    /// By channel, of the differences.
    sums: Option<Sums>,
    /// Of the squares of the float model's values, of those of the differences, and how many there are in a channel.
    scalars: Option<Sums>,
}

impl Apart {
    fn add(&mut self, other: &Self) {
        for (own, other) in [(&mut self.sums, &other.sums), (&mut self.scalars, &other.scalars)] {
            match (own, other) {
                (Some(own), Some(other)) if own.len() == other.len() => own.merge(other),
                (own @ None, Some(other)) => *own = Some(other.clone()),
                _ => {}
            }
        }
    }

    /// What one sample shows; nothing where that is not finite, or of another shape.
    fn of(float: &ArrayD<f32>, changed: &ArrayD<f32>, axis: usize) -> Option<Self> {
        if float.shape() != changed.shape() || axis >= float.ndim() {
            return None;
        }
        let channels = float.len_of(Axis(axis));
        let mut sums = vec![0f64; channels];
        let mut scalars = [0f64; 3];
        for (channel, sum) in sums.iter_mut().enumerate() {
            let (float, changed) = (float.index_axis(Axis(axis), channel), changed.index_axis(Axis(axis), channel));
            for (&x, &y) in float.iter().zip(&changed) {
                let (x, off) = (f64::from(x), f64::from(x) - f64::from(y));
                *sum += off;
                scalars[0] += x * x;
                scalars[1] += off * off;
            }
        }
        scalars[2] = float.len() as f64 / channels.max(1) as f64;
        let finite = sums.iter().chain(&scalars).all(|v| v.is_finite());
        finite.then(|| Self { sums: Some(Sums::of(&sums)), scalars: Some(Sums::of(&scalars)) })
    }

    /// By channel, the mean difference.
    fn means(&self) -> Option<Vec<f64>> {
        let count = self.scalars.as_ref()?.value(2);
        let sums = self.sums.as_ref().filter(|_| count > 0.0)?;
        Some((0..sums.len()).map(|at| sums.value(at) / count).collect())
    }

    /// The quality as it is, and with these numbers added to the channels, in dB.
    fn quality(&self, added: &[f64]) -> Option<(f64, f64)> {
        let scalars = self.scalars.as_ref()?;
        let [signal, noise, count] = [0, 1, 2].map(|at| scalars.value(at));
        let means = self.means().filter(|means| means.len() == added.len())?;
        let less: f64 = means.iter().zip(added).map(|(mean, by)| count * by * (2.0 * mean - by)).sum();
        let db = |noise: f64| Metrics { signal, noise, ..Metrics::default() }.sqnr_db();
        Some((db(noise), db((noise - less).max(0.0))))
    }
}

impl Walk<'_> {
    /// Corrects the biases of the products in a block, where that helps on samples that were held out.
    pub(super) fn correct(&mut self, block: &Block<'_>, held_out: &BTreeSet<usize>) -> Result<()> {
        let here: Vec<(&Correction, usize)> = self
            .plan
            .corrections
            .iter()
            .filter_map(|correction| {
                let node = block.model.producer_named(&correction.product)?;
                Some((
                    correction,
                    usize::from(!block.model.node(node).is("MatMul") && !block.model.node(node).is("Gemm")),
                ))
            })
            .collect();
        if here.is_empty() {
            return Ok(());
        }
        let tensors: Vec<String> = here.iter().map(|(correction, _)| correction.product.clone()).collect();
        let test = self.quantized(&block.model, &tensors)?;
        let seen: Vec<Mutex<[Apart; 2]>> = here.iter().map(|_| Mutex::default()).collect();
        block.observe(Some(&test), &tensors, &|Seen { sample, float, changed }| {
            for (at, ((_, convolution), seen)) in here.iter().zip(&seen).enumerate() {
                let (Some(float), Some(changed)) = (&float[at], changed.and_then(|changed| changed[at].as_ref()))
                else {
                    continue;
                };
                let axis = if *convolution == 1 { 1 } else { float.ndim().saturating_sub(1) };
                if let Some(own) = Apart::of(float, changed, axis) {
                    let mut seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    seen[usize::from(held_out.contains(sample))].add(&own);
                }
            }
            Ok(())
        })?;
        for ((correction, _), seen) in here.into_iter().zip(seen) {
            let [own, held_out] = seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Some((means, quality)) = own.means().and_then(|means| {
                let quality = held_out.quality(&means)?;
                Some((means, quality))
            }) else {
                let why = Reason::NotShown { tensor: correction.product.clone() };
                self.solution.corrected.push(Corrected::new(correction.site.clone(), (f64::NAN, f64::NAN), Some(why)));
                continue;
            };
            let why = (quality.1.is_nan() || quality.1 <= quality.0).then_some(Reason::NoCloser);
            if why.is_none() {
                self.move_bias(&correction.tensor, &means);
            }
            self.solution.corrected.push(Corrected::new(correction.site.clone(), quality, why));
        }
        Ok(())
    }

    /// Leaves biases as they are.
    pub(super) fn leave_biases(&mut self, why: &Reason) {
        let left = |one: &Correction| Corrected::new(one.site.clone(), (f64::NAN, f64::NAN), Some(why.clone()));
        self.solution.corrected.extend(self.plan.corrections.iter().map(left));
    }

    /// Adds to a bias.
    fn move_bias(&mut self, tensor: &str, by: &[f64]) {
        let found = self.model.value_named(tensor).and_then(|value| self.model.constant(value));
        let Some((old, values)) = found.and_then(|old| Some((old, old.to_f64()?))) else { return };
        let moved = values.iter().zip(by).map(|(value, by)| value + by);
        if let Some(new) = Tensor::from_f64(old.dtype(), &old.dims(), moved) {
            self.solution.constants.insert(tensor.to_owned(), new);
        }
    }
}
