//! `amax config`.

use std::path::PathBuf;

use amax::Result;
use amax::config::{import, schema};
use amax::ir;

use super::inspect::print;
use super::output::stage;
use super::{Console, count};

/// Arguments of `amax config`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Print the JSON Schema of the configuration, for editors.
    #[command(after_help = "For editors that check TOML against a schema (Even Better TOML, taplo):
  amax config schema > amax.schema.json
and begin amax.toml with
  #:schema ./amax.schema.json")]
    Schema,
    /// Convert a configuration or scales of ModelOpt, Quark, AIMET, QNN, onnxruntime or TensorRT to TOML.
    #[command(
        after_help = "Anything without a counterpart is an error with its place. Comments at the head of the result say
what was decided on the way.

Example:
  amax config import quant_cfg.json -o amax.toml"
    )]
    Import {
        /// ModelOpt's quant_cfg as JSON; config.json of a model that Quark exported; encodings of AIMET or QNN;
        /// onnxruntime's calibration.json, calibration.cache, or TensorQuantOverrides as JSON; TensorRT's calibration cache.
        file: PathBuf,
        /// Where to write the result; default: print it.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    match &args.command {
        Command::Schema => print(&(schema()? + "\n")),
        Command::Import { file, output } => {
            let imported = import::load(file)?;
            let text = imported.to_toml()?;
            let Some(path) = output else { return print(&text) };
            ir::file::check_outputs([("the configuration", file.clone())], &[("the result", path)])?;
            stage(path, text)?.keep()?;
            let notes = count(imported.notes.len(), "note");
            console.say(&format!("converted a {} to {}; {notes} at its head", imported.from, path.display()));
            Ok(())
        }
    }
}
