//! `amax completions` and `amax man`.

use std::path::PathBuf;

use amax::error::{Error, Kind, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use super::inspect::print;

/// Arguments of `amax completions`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  amax completions bash > ~/.local/share/bash-completion/completions/amax
  amax completions zsh > ~/.zfunc/_amax
  amax completions fish > ~/.config/fish/completions/amax.fish")]
pub(crate) struct Completions {
    /// bash, zsh, fish, elvish or powershell.
    #[arg(value_name = "SHELL", hide_possible_values = true)]
    shell: Shell,
}

/// Arguments of `amax man`.
#[derive(clap::Args)]
pub(crate) struct Man {
    /// Folder for amax.1 and a page for each command.
    folder: PathBuf,
}

pub(crate) fn completions<C: CommandFactory>(args: &Completions) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut C::command(), "amax", &mut script);
    print(&String::from_utf8_lossy(&script))
}

pub(crate) fn man<C: CommandFactory>(args: &Man) -> Result<()> {
    let fail = |e| Error::io(Kind::Output, "write manual pages to", &args.folder, e);
    std::fs::create_dir_all(&args.folder).map_err(fail)?;
    clap_mangen::generate_to(C::command(), &args.folder).map_err(fail)
}
