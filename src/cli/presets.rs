//! `amax presets`.

use amax::Result;
use amax::config::presets;

use super::inspect::print;
use super::table;

/// Arguments of `amax presets`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  amax presets
  amax presets int8 > amax.toml
  amax rewrite model.onnx out.onnx --preset w4")]
pub(crate) struct Args {
    /// Preset to print as TOML; default: list all.
    name: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(name) = &args.name {
        return print(presets::text(name)?);
    }
    let row = |name: &str| Ok(vec![name.to_owned(), presets::summary(name)?.to_owned()]);
    let rows = presets::names().map(row).collect::<Result<Vec<_>>>()?;
    print(&table(&rows, &[]))
}
