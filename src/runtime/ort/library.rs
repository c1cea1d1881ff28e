//! Where onnxruntime's shared library is, and loading it.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::logging::LogLevel;

use crate::error::{Error, Kind, Result};

/// The variable that names the library.
const VARIABLE: &str = "ORT_DYLIB_PATH";

/// The version of the library that was loaded; there is one for the process.
static LOADED: Mutex<Option<String>> = Mutex::new(None);

/// Loads the library, once for the process: the one that `ORT_DYLIB_PATH` names, or that of an onnxruntime which is
/// installed for Python. Gives its version.
///
/// # Errors
/// [`Kind::Runtime`] where there is none that can be used, with everything that was looked at.
pub(in super::super) fn load() -> Result<String> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(version) = &*loaded {
        return Ok(version.clone());
    }
    let (path, version) = find(&|name| std::env::var_os(name))?;
    let commit = || -> ort::Result<()> {
        ort::init_from(&path).with_telemetry(false).commit()?;
        // What goes wrong comes back as an error; a logger of one's own crashes in this version of the binding.
        ort::environment::get_environment()?.set_log_level(LogLevel::Fatal);
        Ok(())
    };
    commit().map_err(|e| {
        Error::new(Kind::Runtime, format!("onnxruntime's library {path} cannot be used: {}", e.message()))
    })?;
    *loaded = Some(version.clone());
    Ok(version)
}

/// The library to load, and its version. `variable` reads the environment.
fn find(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<(String, String)> {
    let usable = |path: &Path| -> Result<(String, String), String> {
        let text = path.to_str().ok_or("its path is not UTF-8")?.to_owned();
        Ok((text, check(path)?))
    };
    if let Some(given) = variable(VARIABLE).filter(|v| !v.is_empty()) {
        let given = PathBuf::from(given);
        // Relative paths would be looked for beside the program.
        let path = std::path::absolute(&given).unwrap_or(given);
        return usable(&path).map_err(|why| {
            Error::new(Kind::Runtime, format!("{VARIABLE} names {}, which cannot be used: {why}", path.display()))
                .with_hint(help())
        });
    }
    let mut looked = Vec::new();
    for folder in packages(variable) {
        let folder = folder.join("onnxruntime").join("capi");
        let libraries = libraries(&folder);
        if libraries.is_empty() {
            looked.push(format!("{}: nothing there", folder.display()));
        }
        for path in libraries {
            match usable(&path) {
                Ok(found) => return Ok(found),
                Err(why) => looked.push(format!("{}: {why}", path.display())),
            }
        }
    }
    let mut message = format!("onnxruntime's shared library was not found: {VARIABLE} is not set, and there is no ");
    if looked.is_empty() {
        message.push_str("Python to look in");
    } else {
        message.push_str("installed Python onnxruntime that can be used; looked at");
        for line in &looked {
            message.push_str(&format!("\n  {line}"));
        }
    }
    Err(Error::new(Kind::Runtime, message).with_hint(help()))
}

fn help() -> String {
    format!(
        "run pip install onnxruntime in the Python environment that is active, or set {VARIABLE} to the library \
         (libonnxruntime.so, libonnxruntime.dylib, onnxruntime.dll) of version 1.{} or later",
        ort::MINOR_VERSION
    )
}

/// Folders of Python packages, those of the active environment first.
fn packages(variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = Vec::new();
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        prefixes.extend(variable(name).filter(|v| !v.is_empty()).map(PathBuf::from));
    }
    let mut users: Vec<PathBuf> = Vec::new();
    users.extend(variable("HOME").filter(|v| !v.is_empty()).map(|home| Path::new(&home).join(".local")));
    let mut pythons = Vec::new();
    for folder in std::env::split_paths(&variable("PATH").unwrap_or_default()) {
        let python = ["python3", "python.exe"].iter().map(|name| folder.join(name)).find(|path| path.is_file());
        let Some(python) = python else { continue };
        // In an environment the interpreter is a link, and the packages of both places are seen.
        let linked = python.canonicalize().unwrap_or_else(|_| python.clone());
        for python in [python, linked] {
            let Some(folder) = python.parent() else { continue };
            // Windows keeps the interpreter beside its library.
            pythons.extend(folder.parent().map(Path::to_owned));
            pythons.push(folder.to_owned());
        }
    }
    let mut seen = BTreeSet::new();
    prefixes
        .into_iter()
        .chain(users)
        .chain(pythons)
        .flat_map(|prefix| below(&prefix))
        .filter(|f| seen.insert(f.clone()))
        .collect()
}

/// Folders of packages of one installation of Python, the newest version's first.
fn below(prefix: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for library in ["lib", "lib64", "local/lib"] {
        let Ok(entries) = std::fs::read_dir(prefix.join(library)) else { continue };
        let mut versions: Vec<(Vec<u32>, PathBuf)> = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(version) = name.to_str().and_then(|n| n.strip_prefix("python")) else { continue };
            versions.push((version.split('.').filter_map(|part| part.parse().ok()).collect(), entry.path()));
        }
        versions.sort_by(|a, b| b.cmp(a));
        for (_, path) in versions {
            found.extend(["site-packages", "dist-packages"].iter().map(|name| path.join(name)));
        }
    }
    found.push(prefix.join("Lib").join("site-packages"));
    found.retain(|folder| folder.is_dir());
    found
}

/// The libraries in the folder of the Python package, in the order of their names.
fn libraries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let is_library = |name: &str| {
        name.starts_with("libonnxruntime.so")
            || name == "onnxruntime.dll"
            // libonnxruntime.1.22.0.dylib
            || name.strip_suffix(".dylib").is_some_and(|stem| stem.starts_with("libonnxruntime"))
    };
    let mut found: Vec<PathBuf> =
        entries.flatten().filter(|e| e.file_name().to_str().is_some_and(is_library)).map(|e| e.path()).collect();
    found.sort();
    found
}

/// The version of an onnxruntime that the binding works with. Asked before the binding, which would panic.
///
/// # Errors
/// Why it does not.
fn check(path: &Path) -> Result<String, String> {
    if !path.is_file() {
        return Err("there is no such file".to_owned());
    }
    // SAFETY: loading runs what the library runs when it is loaded; the user named it, or installed it as onnxruntime.
    #[allow(unsafe_code, reason = "a shared library is loaded")]
    let library = unsafe { libloading::Library::new(path) }.map_err(|e| e.to_string())?;
    // SAFETY: this is the type of the function of this name in every version of onnxruntime, and of no other library.
    #[allow(unsafe_code, reason = "a function of a shared library")]
    let base = unsafe {
        let get = library.get::<unsafe extern "system" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase\0");
        get.map_err(|_| "it is not onnxruntime")?().as_ref().ok_or("it has no interface")?
    };
    // SAFETY: `base` is the interface that the library gave, which stays loaded until the end of this function, and the
    // version is a string of its own that ends in a zero byte.
    #[allow(unsafe_code, reason = "functions of a shared library")]
    let (version, serves) = unsafe {
        let version = CStr::from_ptr((base.GetVersionString)()).to_string_lossy().into_owned();
        (version, !(base.GetApi)(ort::sys::ORT_API_VERSION).is_null())
    };
    let mut numbers = version.split('.').map_while(|n| n.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(1), Some(minor)) if minor >= ort::MINOR_VERSION && serves => Ok(version),
        _ => Err(format!("it is version {version}, and 1.{} or later is needed", ort::MINOR_VERSION)),
    }
}
