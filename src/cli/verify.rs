//! `amax verify`.

use amax::compare::Compare;
use amax::error::Result;
use amax::runtime::Runtime;

use super::compare::{Models, json};
use super::{Console, inspect::print};

/// Arguments of `amax verify`.
#[derive(clap::Args)]
#[command(
    after_help = "Both models run in an installed onnxruntime as their users have it: with its optimizer, on as many
threads as it takes by itself. Needs a build with the feature ort.

integers  nodes that compute on integers, after the optimizer
packed    nodes that compute in float from weights that they unpack themselves
float     products, convolutions and recurrent layers that compute in float
unfused   constants that are dequantized at every run: no kernel took them
before    what computes in float in the reference model

Examples:
  amax verify model.onnx model.int8.onnx --calib samples.npz
  amax verify model.onnx model.int8.onnx --json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    models: Models,
    /// Print JSON; an SQNR of null means that nothing differs.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    Runtime::Ort.load()?;
    let (reference, test, samples) = args.models.load(console)?;
    let found = Compare::new(&reference, &test).samples(&samples).progress(console).deployed()?;
    if args.json {
        return json(&found);
    }
    print(&format!("onnxruntime {}, {}\n{}", found.onnxruntime, samples.describe(), found.summary()))
}
