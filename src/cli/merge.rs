//! `amax merge`.

use std::path::{Path, PathBuf};

use amax::error::{Error, Kind, Result};
use amax::ir::file;
use amax::statistics::Statistics;
use amax::targets::{self, Target};

use super::calibrate::{Judge, warn_of_missing, warnings};
use super::output::save_statistics;
use super::{Console, count};

/// Arguments of `amax merge`.
#[derive(clap::Args)]
#[command(after_help = "Parts may be given in any order: the result is what one run over all their samples writes,
byte for byte.

Examples:
  amax merge a.safetensors b.safetensors -o stats.safetensors
  amax merge stats.safetensors --report")]
pub(crate) struct Args {
    /// Statistics of parts of one set of samples.
    #[arg(required = true)]
    parts: Vec<PathBuf>,
    /// Where to write the merged statistics.
    #[arg(long, short, value_name = "FILE", required_unless_present = "report")]
    output: Option<PathBuf>,
    /// Where the result will run, for --report.
    #[arg(long, value_name = "NAME", default_value = targets::DEFAULT)]
    target: String,
    #[command(flatten)]
    judge: Judge,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let target = Target::load(&args.target)?;
    if let Some(path) = &args.output {
        let parts = args.parts.iter().map(|path| ("a part", path.clone()));
        let profile = ("the target profile", PathBuf::from(&args.target));
        let printed = args.judge.report.then_some(("--report", Path::new(file::STDOUT)));
        let written: Vec<_> = [("the statistics", path.as_path())].into_iter().chain(printed).collect();
        file::check_outputs(parts.chain([profile]), &written)?;
    }
    let Some((first, others)) = args.parts.split_first() else {
        return Err(Error::new(Kind::Usage, "there is nothing to merge"));
    };
    let mut all = Statistics::load(first)?;
    for path in others {
        all.merge(&Statistics::load(path)?).map_err(|e| e.in_file(path))?;
    }
    if let Some(output) = &args.output {
        save_statistics(&all, output)?;
        console.say(&format!(
            "{} of {} -> {}",
            all.ran.len(),
            count(all.sample_total as usize, "sample"),
            output.display()
        ));
    }
    warn_of_missing(&all, console);
    for warning in warnings(&all) {
        console.say(&format!("warning: {warning}"));
    }
    args.judge.print(&all, &target, console.verbose)
}
