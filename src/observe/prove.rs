//! Whether a converted model computes what the original does: its constants exactly, its outputs on samples.

use std::fmt;

use super::compare::outputs;
use super::pool::Progress;
use super::run::Run;
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::numerics::metrics::Metrics;
use crate::onnx::DataType;
use crate::passes::recipes::READ;
use crate::passes::support::operands::{self, Comparison, Operand};
use crate::passes::{Context, Evaluate, pipeline};
use crate::runtime::Runtime;
use crate::samples::SampleSet;

/// Outputs that differ by more than the order of float operations explains: a sum in another order moves last bits, and
/// these may move a few codes of a quantizer behind it.
const ASSOCIATION_DB: f64 = 50.0;

/// What was compared.
#[derive(Clone, Debug)]
pub struct Proof {
    /// Operands that constants derive, by node.
    pub operands: Vec<Operand>,
    /// Outputs over all samples; empty without samples.
    pub outputs: Vec<Output>,
    /// Samples that ran.
    pub samples: usize,
}

/// One output of both models.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// Elements, over all samples.
    pub elements: usize,
    /// Elements whose bits differ (zeros of both signs are the same).
    pub differing: usize,
    /// The largest distance of two elements, in units in the last place of float32.
    pub ulps: u64,
    /// Signal to noise of the converted model's output, in dB; infinite where nothing differs.
    pub sqnr_db: f64,
}

impl Proof {
    /// Whether the models are the same but for the order of float operations.
    ///
    /// # Errors
    /// [`Kind::Check`], with the first difference.
    pub fn verdict(&self) -> Result<()> {
        for Operand { node, input, elements, found } in &self.operands {
            if let Comparison::Differing(count) = found {
                let message =
                    format!("{count} of {elements} elements of input {input} differ from the fake quantizer's");
                return Err(Error::new(Kind::Check, message).at_node(node, ""));
            }
        }
        match self.outputs.iter().find(|o| o.sqnr_db < ASSOCIATION_DB || o.sqnr_db.is_nan()) {
            None => Ok(()),
            Some(output) => Err(Error::new(
                Kind::Check,
                format!(
                    "the output differs in {} of {} elements, at {:.1} dB: more than the order of float operations explains",
                    output.differing, output.elements, output.sqnr_db
                ),
            )
            .at_value(&output.name)),
        }
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let same = self.operands.iter().filter(|o| o.found == Comparison::Equal);
        let elements: usize = same.clone().map(|o| o.elements).sum();
        match same.count() {
            0 => write!(f, "check    no constant operand was compared number by number")?,
            1 => write!(f, "check    1 constant operand is equal, in all of {elements} elements")?,
            count => write!(f, "check    {count} constant operands are equal, in all of {elements} elements")?,
        }
        for Operand { node, input, elements, found } in &self.operands {
            match found {
                Comparison::Equal => {}
                Comparison::Differing(count) => {
                    write!(f, "\n  {node}: {count} of {elements} elements of input {input} differ")?;
                }
                Comparison::Scaled { least, most } => write!(
                    f,
                    "\n  {node}: input {input} is the same but for what was fused into it, a factor a channel, {least:.6} to {most:.6}"
                )?,
                Comparison::Unknown(why) => write!(f, "\n  {node}: input {input} was not compared: {why}")?,
            }
        }
        for Output { name, elements, differing, ulps, sqnr_db } in &self.outputs {
            let number = self.samples;
            let samples = format!("on {number} sample{}", if number == 1 { "" } else { "s" });
            if *differing == 0 {
                write!(f, "\n  {name}: the same bits {samples} ({elements} elements)")?;
            } else {
                write!(
                    f,
                    "\n  {name}: {differing} of {elements} elements differ {samples}, by {ulps} units in the last place at \
                     most ({sqnr_db:.1} dB)"
                )?;
            }
        }
        Ok(())
    }
}

/// Compares two models: every constant operand, and outputs on the samples where there are some.
///
/// Operators of `TensorRT`'s in `original` are taken for the standard ones that they mean.
///
/// # Errors
/// The runtime cannot run one of the models, or they have other outputs.
pub fn prove(
    original: &Model,
    converted: &Model,
    samples: Option<&SampleSet>,
    evaluate: &dyn Evaluate,
    runtime: Runtime,
    progress: &dyn Progress,
) -> Result<Proof> {
    let mut original = original.clone();
    let context = Context::new(evaluate);
    for step in READ.steps(&context.conversion) {
        pipeline::apply(&mut original, step.pass, &context)?;
    }
    let operands = operands::compare(&original, converted);
    let mut proof = Proof { operands, outputs: Vec::new(), samples: 0 };
    let Some(samples) = samples else { return Ok(proof) };
    let indices: Vec<usize> = (0..samples.len()).collect();
    let run = Run { runtime, progress, ..Run::new(samples, &indices) };
    let (reference, test) = (outputs(&original, &run)?, outputs(converted, &run)?);
    proof.samples = indices.len();
    let mut sums: Vec<(Output, Metrics)> = Vec::new();
    for (reference, test) in reference.iter().zip(&test) {
        for (name, a) in reference {
            let Some((_, b)) = test.iter().find(|(n, _)| n == name) else {
                return Err(Error::model("the converted model has no such output").at_value(name));
            };
            let (x, y) = (numbers(a), numbers(b));
            let (Some(x), Some(y)) = (x, y) else { continue };
            if x.len() != y.len() {
                return Err(
                    Error::new(Kind::Check, format!("shapes differ: {:?} and {:?}", a.dims(), b.dims())).at_value(name)
                );
            }
            let at = sums.iter().position(|(o, _)| o.name == *name).unwrap_or_else(|| {
                let sqnr_db = f64::INFINITY;
                let fresh = Output { name: name.clone(), elements: 0, differing: 0, ulps: 0, sqnr_db };
                sums.push((fresh, Metrics::default()));
                sums.len() - 1
            });
            let (output, metrics) = &mut sums[at];
            output.elements += x.len();
            for (a, b) in x.iter().zip(&y) {
                let same = a.to_bits() == b.to_bits() || (*a == 0.0 && *b == 0.0) || (a.is_nan() && b.is_nan());
                if !same {
                    output.differing += 1;
                    output.ulps = output.ulps.max(place(*a).abs_diff(place(*b)));
                }
            }
            metrics.feed(&x, &y);
        }
    }
    for (mut output, metrics) in sums {
        if output.differing > 0 {
            output.sqnr_db = metrics.sqnr_db();
        }
        proof.outputs.push(output);
    }
    Ok(proof)
}

fn numbers(tensor: &Tensor) -> Option<Vec<f32>> {
    let integers = || Some(tensor.to_i64()?.into_iter().map(|v| v as f32).collect());
    if tensor.dtype() == DataType::String { None } else { tensor.to_f32().or_else(integers) }
}

/// The place of a float32 among all of them, in order.
fn place(x: f32) -> i64 {
    let bits = i64::from(x.to_bits() & 0x7fff_ffff);
    if x.is_sign_negative() { -bits } else { bits }
}
