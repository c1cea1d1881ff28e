//! Where commands write: to a file, or to stdout, which is called `-`.

use std::io::{IsTerminal, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use amax::error::{Error, Kind, Result};
use amax::ir::Model;
use amax::ir::file::{self, STDOUT, SaveOptions, Staged};
use amax::statistics::Statistics;

use super::inspect::print;

/// Where a model is written: the second argument, or an option.
#[derive(clap::Args)]
pub(crate) struct Destination {
    /// Where to write the model; - is stdout.
    #[arg(value_name = "OUTPUT", required_unless_present = "to")]
    output: Option<PathBuf>,
    /// Where to write the model, instead of the second argument.
    #[arg(id = "to", long = "output", short = 'o', value_name = "FILE", conflicts_with = "output")]
    to: Option<PathBuf>,
}

impl Deref for Destination {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.output.as_deref().or(self.to.as_deref()).unwrap_or(Path::new(STDOUT))
    }
}

/// An output that is complete and has yet to appear.
pub(crate) enum Pending<'a> {
    File(Staged, &'a Path),
    Stdout(String),
}

impl Pending<'_> {
    /// Gives the file its name, or prints the text.
    pub(crate) fn keep(self) -> Result<()> {
        match self {
            Self::File(staged, path) => staged.keep(path),
            Self::Stdout(text) => print(&text),
        }
    }
}

/// Text that is to appear whole or not at all.
pub(crate) fn stage(path: &Path, text: String) -> Result<Pending<'_>> {
    if is_stdout(path) {
        return Ok(Pending::Stdout(text));
    }
    let fail = |e| Error::io(Kind::Output, "write", path, e);
    let staged = Staged::beside(path).map_err(|e| fail(file::without_path(e)))?;
    staged.file().write_all(text.as_bytes()).map_err(fail)?;
    Ok(Pending::File(staged, path))
}

/// Writes a model.
pub(crate) fn save_model(
    model: &Model,
    path: &Path,
    options: &SaveOptions,
    interrupted: &dyn Fn() -> bool,
) -> Result<()> {
    if is_stdout(path) {
        return file::write(model, &mut binary_stdout()?);
    }
    file::save_unless(model, path, options, interrupted)
}

/// Writes statistics.
pub(crate) fn save_statistics(statistics: &Statistics, path: &Path) -> Result<()> {
    if is_stdout(path) {
        let fail = |e| Error::new(Kind::Output, format!("cannot write to stdout: {e}"));
        return binary_stdout()?.write_all(&statistics.to_bytes()).map_err(fail);
    }
    statistics.save(path)
}

/// Whether an output goes to stdout.
pub(crate) fn is_stdout(path: &Path) -> bool {
    path == Path::new(STDOUT)
}

/// The folder for what a run parks on the disk: that of its output.
pub(crate) fn scratch(output: &Path) -> PathBuf {
    if is_stdout(output) {
        return std::env::temp_dir();
    }
    output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

fn binary_stdout() -> Result<impl Write> {
    let stdout = std::io::stdout();
    if stdout.is_terminal() {
        return Err(Error::new(Kind::Output, "stdout is a terminal, and the output is binary")
            .with_hint("redirect it: amax ... - > FILE"));
    }
    Ok(std::io::BufWriter::with_capacity(1 << 18, stdout.lock()))
}
