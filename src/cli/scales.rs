//! `amax scales`.

use std::path::PathBuf;

use amax::Result;
use amax::error::{Error, Kind};
use amax::ir::file;
use amax::scales::scales;

use super::inspect::print;
use super::output::stage;
use super::{Console, count};

/// Arguments of `amax scales`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Quantized model, of amax or any other tool, with QuantizeLinear and DequantizeLinear.
    model: PathBuf,
    /// Where to write the result; default: print it.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let model = file::load(&args.model)?;
    if let Some(path) = &args.output {
        let read = file::inputs(&model).map(|path| ("the model", path.clone()));
        file::check_outputs(read, &[("the scales", path)])?;
    }
    let found = scales(&model);
    for (name, why) in &found.skipped {
        console.say(&format!("warning: \"{name}\": {why}"));
    }
    if found.config.tensor.is_empty() {
        let error = Error::new(Kind::Model, "the model has no quantized tensor").in_file(&args.model);
        return Err(error.with_hint("scales are read from QuantizeLinear and DequantizeLinear"));
    }
    let text = serde_json::to_string_pretty(&found.config)
        .map_err(|e| Error::new(Kind::Internal, format!("cannot write the scales as JSON: {e}")))?;
    let Some(path) = &args.output else { return print(&(text + "\n")) };
    stage(path, text + "\n")?.keep()?;
    console.say(&format!("wrote the scales of {} to {}", count(found.config.tensor.len(), "tensor"), path.display()));
    Ok(())
}
