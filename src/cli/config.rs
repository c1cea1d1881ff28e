//! `amax config`.

use std::path::PathBuf;

use amax::Result;
use amax::config::{import, schema};
use amax::error::{Error, Kind};

use super::inspect::print;
use super::{Console, count, staged};

/// Arguments of `amax config`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Print the JSON Schema of the configuration, for editors.
    #[command(after_help = "Editors that check TOML against a schema (Even Better TOML, taplo) take it from a file:
  amax config schema > amax.schema.json
and the first line of amax.toml then is
  #:schema ./amax.schema.json")]
    Schema,
    /// Convert another tool's configuration or scales to TOML: of ModelOpt, Quark, AIMET, QNN, onnxruntime, `TensorRT`.
    #[command(
        after_help = "What has no counterpart is an error with its place; what was decided on the way is said in comments
at the head of the result.

Example:
  amax config import quant_cfg.json -o amax.toml"
    )]
    Import {
        /// ModelOpt's `quant_cfg` as JSON; config.json of a model that Quark exported; encodings of AIMET or QNN;
        /// onnxruntime's calibration.json, calibration.cache, or `TensorQuantOverrides` as JSON; the cache of `TensorRT`.
        file: PathBuf,
        /// Where the result goes; printed where left out.
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
            if path.canonicalize().is_ok_and(|p| file.canonicalize().is_ok_and(|f| f == p)) {
                let message = format!("cannot write {}: the configuration is read from it", path.display());
                return Err(Error::new(Kind::Output, message).with_hint("write to another file"));
            }
            staged(path, &text)?.keep(path)?;
            let notes = count(imported.notes.len(), "note");
            console.say(&format!("converted a {} to {}; {notes} at its head", imported.from, path.display()));
            Ok(())
        }
    }
}
