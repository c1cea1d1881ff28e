//! What samples buy for weights: layer after layer, each solved for what reaches it through those that were solved before.
//!
//! One pass of the float model and one of the model as quantized so far go side by side, block by block; a block begins where
//! a weight meets its input. What a weight gains is proven on samples that it was not solved with, and one that gains nothing
//! is rounded as if there were no samples. Biases then take up what is left of the means.

mod biases;
mod replace;

use std::collections::BTreeSet;

use ndarray::ArrayD;

use crate::error::{Kind, Result};
use crate::ir::{Model, NodeId};
use crate::numerics::fake_quantize;
use crate::observe::blocks::{Block, Blocks, Cut};
use crate::observe::gather::{Asked, Shown};
use crate::observe::matrices::{MatrixSite, Rows, product};
use crate::plan::{Activation, Mode, Plan, Readers, Slot, Weight};
use crate::quant::algorithm::{Algorithm, Scope};
use crate::reason::Reason;
use crate::rewrite::{Job, split};
use crate::solve::{Evidence, Learned, Solution, learn, solve_biases};

/// Samples without which no gain can be proven.
const ENOUGH: usize = 8;

/// Samples that are enough to know means by.
const MEANS: usize = 32;

/// Elements of inputs whose rows are added at once.
const TOGETHER: usize = 4096;

/// Rows for each column of a weight that are enough, and the least number of a sample's rows that count.
const ROWS: (usize, usize) = (32, 256);

/// Whether a plan has weights that samples say something of, or biases.
pub(crate) fn is_asked(plan: &Plan) -> bool {
    !plan.corrections.is_empty() || plan.weights.iter().any(is_learned)
}

fn is_learned(weight: &Weight) -> bool {
    weight.quantizer.algorithm.as_ref().is_some_and(|a| a.scope() == Scope::Samples)
}

/// Solves the weights of a plan whose algorithm looks at samples, and puts what it finds into the solution.
///
/// # Errors
/// A block that the runtime cannot run, a memory limit that cannot be kept to, an interruption.
pub(crate) fn improve(job: &Job<'_>, model: &Model, plan: &Plan, solution: &mut Solution) -> Result<()> {
    let wanted: Vec<usize> = (0..plan.weights.len()).filter(|&at| is_learned(&plan.weights[at])).collect();
    let mut walk = Walk { job, model, plan, solution, layers: Vec::new() };
    let samples = match job.rewrite.samples {
        Some(samples) if samples.len() >= ENOUGH => samples,
        few => {
            let why = few.map_or(Reason::NoSamples, |few| Reason::FewSamples { samples: few.len() });
            walk.leave(&wanted, &why);
            walk.leave_biases(&why);
            return Ok(());
        }
    };
    for at in wanted {
        match walk.layer(at) {
            Ok(layer) => walk.layers.push(layer),
            Err(why) => walk.leave(&[at], &why),
        }
    }
    let bounds: Vec<usize> = walk.bounds();
    if bounds.is_empty() {
        return Ok(());
    }
    let (mut own, held_out) = split(samples);
    if walk.layers.is_empty() {
        let step = own.len().div_ceil(MEANS);
        own = own.into_iter().step_by(step).collect();
    }
    let apart: BTreeSet<usize> = held_out.iter().copied().collect();
    let all: Vec<usize> = own.iter().chain(&held_out).copied().collect();
    let blocks = Blocks { model, cut: Cut::Before(&bounds), run: job.rewrite.run.over(samples, &all) };
    blocks.parts(|block| {
        walk.solve(block, own.len(), &apart)?;
        walk.correct(block, &apart)?;
        walk.quantized(&block.model, &[]).map(Some)
    })?;
    solve_biases(model, plan, solution)
}

struct Walk<'a> {
    job: &'a Job<'a>,
    model: &'a Model,
    plan: &'a Plan,
    solution: &'a mut Solution,
    layers: Vec<Layer<'a>>,
}

/// A weight that is to be solved.
struct Layer<'a> {
    /// Its place in the plan.
    at: usize,
    weight: &'a Weight,
    algorithm: &'a Algorithm,
    /// Its place among the nodes of the model, and that of the first product that reads the same rows.
    position: usize,
}

impl<'a> Walk<'a> {
    /// What of a weight is needed, or why it is rounded.
    fn layer(&self, at: usize) -> std::result::Result<Layer<'a>, Reason> {
        let weight = &self.plan.weights[at];
        let algorithm = weight.quantizer.algorithm.as_deref().ok_or(Reason::NoSamples)?;
        let node = self.model.producer_named(&weight.at.node).ok_or(Reason::NoRowsKnown)?;
        let nodes = self.model.graph(self.model.main()).nodes();
        let position = nodes.iter().position(|&n| n == node).ok_or(Reason::NoRowsKnown)?;
        if weight.at.input != 1 || product(self.model, node).is_none() {
            return Err(Reason::NoRowsKnown);
        }
        let readers = self.model.value_named(&weight.tensor).map_or(0, |value| self.model.value(value).users().len());
        let planned = self.plan.weights.iter().filter(|other| other.tensor == weight.tensor).count();
        if readers != 1 || planned != 1 {
            return Err(Reason::SharedWeight);
        }
        Ok(Layer { at, weight, algorithm, position })
    }

    /// Leaves weights as they are.
    fn leave(&mut self, which: &[usize], why: &Reason) {
        for &at in which {
            if let Some(algorithm) = &self.plan.weights[at].quantizer.algorithm {
                self.solution.learned.insert(at, Learned::new(algorithm.method, 0, 0).unchanged(why.clone()));
            }
        }
    }

    /// Where blocks begin: at the first product that reads certain rows.
    fn bounds(&self) -> Vec<usize> {
        let nodes = self.model.graph(self.model.main()).nodes();
        let products: BTreeSet<NodeId> =
            self.plan.corrections.iter().filter_map(|c| self.model.producer_named(&c.product)).collect();
        let corrected = (0..nodes.len()).filter(|&at| products.contains(&nodes[at]));
        let all: BTreeSet<usize> = self.layers.iter().map(|layer| layer.position).chain(corrected).collect();
        let mut known: Vec<MatrixSite> = Vec::new();
        let mut all: Vec<usize> = all.into_iter().collect();
        all.retain(|&position| match site(self.model, nodes[position]) {
            Some(site) if known.iter().any(|other| same(other, &site)) => false,
            Some(site) => {
                known.push(site);
                true
            }
            None => true,
        });
        all
    }

    /// Solves the weights whose products are in a block.
    fn solve(&mut self, block: &Block<'_>, samples: usize, held_out: &BTreeSet<usize>) -> Result<()> {
        let mut sites: Vec<(MatrixSite, Vec<usize>)> = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let Some(found) = block.model.producer_named(&layer.weight.at.node) else { continue };
            let Some(found) = site(&block.model, found) else { continue };
            match sites.iter_mut().find(|(other, _)| same(other, &found)) {
                Some((_, layers)) => layers.push(number),
                None => sites.push((found, vec![number])),
            }
        }
        let columns = sites.iter().map(|(site, _)| site.columns / site.rows.blocks().max(1)).max().unwrap_or(0);
        let plan = self.plan;
        let slots: Vec<Slot> =
            sites.iter().map(|(_, layers)| Slot { input: 0, ..self.layers[layers[0]].weight.at.clone() }).collect();
        let (solution, found) = (&*self.solution, sites.iter().map(|(site, _)| site.clone()).collect::<Vec<_>>());
        let quantize = |of: &MatrixSite, values: &mut ArrayD<f32>| {
            let slot = found.iter().position(|site| same(site, of)).and_then(|at| slots.get(at));
            let pair = slot.and_then(|slot| pair_at(plan, &of.tensor, slot));
            let solved = pair.and_then(|(name, activation)| Some((solution.activations.get(name)?, activation)));
            if let (Some((at, activation)), Some(values)) = (solved, values.as_slice_mut()) {
                fake_quantize(values, at.scale, at.zero_point, activation.quantizer.dtype);
            }
        };
        let most = (ROWS.0 * columns / samples.max(1)).max(ROWS.1);
        let (paired, together) = (false, TOGETHER);
        let asked = Asked { sites: found.clone(), most, paired, held_out, together, quantize: &quantize };
        let shown = if found.is_empty() { Vec::new() } else { block.matrices(&asked)? };
        for ((site, layers), shown) in sites.iter().zip(shown) {
            let shown = match shown {
                Ok(Shown { own: Some(own), held_out: Some(held_out) }) => Ok((own, held_out)),
                Ok(_) => Err(Reason::NotShown { tensor: site.tensor.clone() }),
                Err(e) if e.kind() == Kind::Samples => Err(Reason::NotFinite { tensor: site.tensor.clone() }),
                Err(e) => return Err(e),
            };
            for &number in layers {
                let Layer { at, weight, algorithm, .. } = self.layers[number];
                let (own, held_out) = match &shown {
                    Ok((own, held_out)) => (own, held_out),
                    Err(why) => {
                        self.leave(&[at], why);
                        continue;
                    }
                };
                let fixed = self.plan.biases.iter().any(|bias| bias.weight == at);
                let free_bias = self.plan.corrections.iter().any(|c| c.product == weight.at.node);
                let evidence = Evidence { own, held_out, free_bias };
                let (solved, learned) =
                    learn(self.model, weight, &self.solution.weights[at], algorithm, evidence, fixed)?;
                if let Some(solved) = solved {
                    self.solution.weights[at] = solved;
                }
                self.solution.learned.insert(at, learned);
            }
        }
        Ok(())
    }
}

/// What a product reads.
fn site(model: &Model, node: NodeId) -> Option<MatrixSite> {
    let (value, rows, columns) = product(model, node)?;
    Some(MatrixSite { tensor: model.value(value).name().to_owned(), rows, columns, nodes: Vec::new() })
}

fn same(one: &MatrixSite, other: &MatrixSite) -> bool {
    let rows = |of: &MatrixSite| -> (String, Rows, usize) { (of.tensor.clone(), of.rows.clone(), of.columns) };
    rows(one) == rows(other)
}

/// The quantizer of fixed scale that a node reads a tensor through.
fn pair_at<'p>(plan: &'p Plan, tensor: &str, slot: &Slot) -> Option<(&'p String, &'p Activation)> {
    let of = |(name, activation): &(&'p String, &'p Activation)| {
        activation.mode == Mode::Static && activation.tensor.as_ref().unwrap_or(name) == tensor
    };
    let listed =
        |activation: &Activation| matches!(&activation.readers, Readers::Listed(slots) if slots.contains(slot));
    let all = |activation: &Activation| activation.readers == Readers::All;
    let pairs = || plan.activations.iter().filter(of);
    pairs().find(|(_, a)| listed(a)).or_else(|| pairs().find(|(_, a)| all(a)))
}
