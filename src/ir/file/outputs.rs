//! Whether the outputs of a command may be written: none is a file that the command reads, and no two are one file.

use std::path::{Path, PathBuf};

use super::folder_of;
use super::save::{is_data_name, same_file};
use super::staged::resolve;
use crate::error::{Error, Kind, Result};

/// The name of the standard output, where a path is asked for.
pub const STDOUT: &str = "-";

/// Checks what can be known before the work is done. Inputs and outputs are given as what they are (`the model`) and where;
/// links are followed, and an output of [`STDOUT`] is the standard output.
///
/// # Errors
/// [`Kind::Output`]: an output that is read, that is no regular file, or whose folder is missing. [`Kind::Usage`]: two
/// outputs in one place, or an output with the name of another one's data file.
pub fn check_outputs<'a>(read: impl IntoIterator<Item = (&'a str, PathBuf)>, written: &[(&str, &Path)]) -> Result<()> {
    let mut places: Vec<(&str, &Path, PathBuf)> = Vec::new();
    for &(what, path) in written {
        let place = if path == Path::new(STDOUT) { path.to_owned() } else { place(&resolve(path)?) };
        if let Some((other, ..)) = places.iter().find(|(_, _, other)| *other == place || same_file(other, &place)) {
            let (message, hint) = match path.to_str() {
                Some(STDOUT) => {
                    (format!("{other} and {what} cannot both go to stdout"), format!("write {other} to a file"))
                }
                _ => (
                    format!("{} cannot be both {other} and {what}", path.display()),
                    format!("give {what} another file"),
                ),
            };
            return Err(Error::new(Kind::Usage, message).with_hint(hint));
        }
        places.push((what, path, place));
    }
    for (model, _, place) in &places {
        for (what, path, other) in &places {
            let name = other.file_name().and_then(|name| name.to_str());
            if folder_of(place) == folder_of(other) && name.is_some_and(|name| is_data_name(place, name)) {
                let message = format!("{} has the name of a data file of {model}", path.display());
                return Err(Error::new(Kind::Usage, message).with_hint(format!("give {what} another name")));
            }
        }
    }
    // What is not there yet cannot be read.
    places.retain(|(_, path, place)| *path != Path::new(STDOUT) && place.exists());
    if places.is_empty() {
        return Ok(());
    }
    for (input, from) in read {
        if let Some((_, path, _)) = places.iter().find(|(_, _, place)| same_file(&from, place)) {
            let verb = if input.ends_with('s') { "are" } else { "is" };
            let message = format!("cannot write {}: {input} {verb} read from this file", path.display());
            return Err(Error::new(Kind::Output, message).with_hint("write to another file"));
        }
    }
    Ok(())
}

/// A path without links and detours, whether or not its file is there.
fn place(path: &Path) -> PathBuf {
    let folder = folder_of(path).canonicalize();
    folder.map_or_else(|_| path.to_owned(), |folder| folder.join(path.file_name().unwrap_or_default()))
}
