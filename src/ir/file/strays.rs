//! What runs that were killed left beside an output: data files that no model refers to, temporary files that nobody writes.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use super::folder_of;
use super::save::is_data_name;
use super::staged::is_temporary;

/// How long a run waits for others to name their files; renaming takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Models up to this size are searched for names of data files: with external data they hold little but their structure.
const LARGEST_STRUCTURE: u64 = 64 << 20;

/// Keeps other runs from naming files in the folder until it is dropped. `None` where the system has no such locks, or
/// somebody keeps one for long.
pub(super) fn lock(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(std::fs::TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(_) => return None,
        }
    }
}

/// Removes what earlier runs left beside the model at `path`, whose data file is `own`: data files of its name that no
/// model of the folder refers to, and temporary files that nobody holds. What cannot be removed stays.
pub(super) fn remove(path: &Path, own: Option<&Path>) {
    let folder = folder_of(path);
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut former = Vec::new();
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if is_temporary(&name) {
            let free = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
            if free {
                let _ = std::fs::remove_file(entry.path());
            }
        } else if is_data_name(path, &name) && own != Some(&*entry.path()) {
            former.push(name);
        }
    }
    former.retain(|name| !is_referred_to(folder, name));
    for name in former {
        let _ = std::fs::remove_file(folder.join(name));
    }
}

/// Whether a model of the folder has this name in it: a copy of an older output keeps its data.
fn is_referred_to(folder: &Path, name: &str) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return true };
    entries.flatten().any(|entry| {
        let path = entry.path();
        let model = path.extension().is_some_and(|ending| ending == "onnx");
        let small = || entry.metadata().is_ok_and(|m| m.is_file() && m.len() <= LARGEST_STRUCTURE);
        model && small() && std::fs::read(&path).is_ok_and(|bytes| holds(&bytes, name.as_bytes()))
    })
}

fn holds(bytes: &[u8], name: &[u8]) -> bool {
    bytes.windows(name.len()).any(|window| window == name)
}
