//! `--depfile`: what a build system has to watch.

use std::path::{Path, PathBuf};

/// A rule of make, which ninja reads, too: the output, and the files that it was made from.
pub(crate) fn rule(output: &Path, read: impl IntoIterator<Item = PathBuf>) -> String {
    let mut read: Vec<String> = read.into_iter().filter(|path| path.is_file()).map(|path| escaped(&path)).collect();
    read.sort();
    read.dedup();
    format!("{}: {}\n", escaped(output), read.join(" \\\n  "))
}

fn escaped(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.replace('\\', "\\\\").replace(' ', "\\ ").replace('#', "\\#").replace('$', "$$")
}
