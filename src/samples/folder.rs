//! Finds the samples at a path: a file, or a folder of files of one kind.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::inputs::{self, Input};
use super::lines::Lines;
use super::parts::{Part, Stored, array_part, picture_part, proto_part, raw_part};
use super::picture::{EXTENSIONS, Picture};
use super::preprocess::{self, Preprocess};
use super::{FORMS, array, pb};
use crate::error::{Error, Kind, Result};

/// Folders of images may lie this deep below the one that is named.
const MAX_DEPTH: usize = 8;

/// What samples are opened for.
pub(super) struct Opening<'a> {
    pub(super) inputs: &'a [Input],
    /// The preprocessing that the user names.
    pub(super) named: Option<&'a Path>,
    /// That beside the model, where it is there.
    pub(super) beside: Option<PathBuf>,
}

impl Opening<'_> {
    /// The samples at a path.
    pub(super) fn open(&self, path: &Path) -> Result<Vec<Part>> {
        let kind = std::fs::metadata(path)
            .map_err(|e| Error::io(Kind::Samples, "read samples from", path, e).with_hint(FORMS))?;
        let images = if kind.is_dir() {
            let entries = list(path)?;
            match self.files(path, &entries)? {
                Some(parts) => return self.without_images(path, parts),
                None => pictures(path, &entries)?,
            }
        } else if EXTENSIONS.contains(&extension(path).as_str()) {
            vec![path.to_owned()]
        } else {
            return self.without_images(path, vec![self.file(path)?]);
        };
        if images.is_empty() {
            return Err(Error::new(Kind::Samples, "the folder holds no samples").in_file(path).with_hint(hint(path)));
        }
        self.images(path, &images)
    }

    fn without_images(&self, path: &Path, parts: Vec<Part>) -> Result<Vec<Part>> {
        match self.named {
            None => Ok(parts),
            Some(_) => Err(Error::new(Kind::Usage, "preprocessing is for images, but there are none")
                .in_file(path)
                .with_hint("leave --preprocess out: samples of other kinds are fed as they are")),
        }
    }

    fn images(&self, path: &Path, images: &[PathBuf]) -> Result<Vec<Part>> {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let inside = folder.join(preprocess::FILE);
        let document = match (self.named, inside.is_file(), &self.beside) {
            (Some(named), ..) => named,
            (None, true, _) => &inside,
            (None, false, Some(beside)) => beside,
            (None, false, None) => {
                let input = preprocess::image_like(self.inputs).map(|i| &self.inputs[i]);
                let message = "there are images, but no description of how they become the model's input";
                let hint = format!(
                    "write {}, or pass --preprocess FILE; for example:{}",
                    inside.display(),
                    preprocess::example(input)
                );
                return Err(Error::new(Kind::Samples, message).in_file(path).with_hint(hint));
            }
        };
        let preprocess = Arc::new(Preprocess::load(document, self.inputs)?);
        let input = &self.inputs[preprocess.input];
        if let Some(other) = self.inputs.iter().find(|i| i.required && i.name != input.name) {
            let message = format!("images only give \"{}\", but the model needs another input", input.name);
            return Err(Error::new(Kind::Samples, message)
                .at_value(&other.name)
                .in_file(path)
                .with_hint("run your preprocessing and save its results with numpy.savez"));
        }
        // All of them are opened before the first error is reported, so that it is always the same.
        let opened: Vec<_> = images.par_iter().map(|image| Picture::open(image, &preprocess)).collect();
        opened.into_iter().map(|picture| Ok(picture_part(picture?, input))).collect()
    }

    fn file(&self, path: &Path) -> Result<Part> {
        let inputs = self.inputs;
        match extension(path).as_str() {
            "npz" => {
                let arrays = array::open_npz(path)?;
                if arrays.is_empty() {
                    return Err(Error::new(Kind::Samples, "the archive holds no arrays")
                        .in_file(path)
                        .with_hint(FORMS));
                }
                let mut feeds = Vec::new();
                for (key, array) in arrays {
                    let at = inputs::find(inputs, &key).map_err(|e| e.in_file(path))?;
                    feeds.push((at, Stored::File(array)));
                }
                array_part(Some(path), feeds, inputs)
            }
            "npy" => {
                let at = only_input(path, inputs)?;
                array_part(Some(path), vec![(at, Stored::File(array::open_npy(path)?))], inputs)
            }
            "jsonl" => Lines::open(path, inputs).map(Part::of_lines),
            "bin" => raw_part(path, &[(only_input(path, inputs)?, path.to_owned())], inputs),
            "pb" => {
                only_input(path, inputs)?;
                proto_part(path, &[(0, path.to_owned())], inputs)
            }
            _ => Err(Error::new(Kind::Samples, "the file is not of a kind that holds samples")
                .in_file(path)
                .with_hint(FORMS)),
        }
    }

    /// What the files of a folder hold, images aside; `None` if there are none of another kind.
    fn files(&self, path: &Path, entries: &[PathBuf]) -> Result<Option<Vec<Part>>> {
        let is = |kinds: &[&str]| entries.iter().filter(|e| kinds.contains(&extension(e).as_str())).collect::<Vec<_>>();
        let (arrays, lines, raw, images) = (is(&["npz", "npy"]), is(&["jsonl"]), is(&["bin"]), is(EXTENSIONS));
        let protos = input_files(entries);
        let kinds = [
            (arrays.len(), "numpy"),
            (lines.len(), ".jsonl"),
            (raw.len(), ".bin"),
            (images.len(), "image"),
            (protos.len(), "ONNX"),
        ];
        let mut found = kinds.iter().filter(|(count, _)| *count > 0).map(|(_, name)| *name);
        if let (Some(one), Some(other)) = (found.next(), found.next()) {
            return Err(Error::new(Kind::Samples, format!("the folder holds both {one} and {other} samples"))
                .in_file(path)
                .with_hint("put them in separate folders"));
        }
        if !images.is_empty() {
            return Ok(None);
        }
        if !raw.is_empty() {
            return self.raw(path, &raw).map(Some);
        }
        if !protos.is_empty() {
            return Ok(Some(vec![proto_part(path, &protos, self.inputs)?]));
        }
        if !arrays.is_empty() || !lines.is_empty() {
            return arrays.into_iter().chain(lines).map(|file| self.file(file)).collect::<Result<_>>().map(Some);
        }
        let mut parts = Vec::new();
        for folder in entries.iter().filter(|e| e.is_dir()) {
            let inner = list(folder)?;
            let protos = input_files(&inner);
            let raw: Vec<&PathBuf> = inner.iter().filter(|e| extension(e) == "bin").collect();
            if !protos.is_empty() {
                parts.push(proto_part(folder, &protos, self.inputs)?);
            } else if !raw.is_empty() {
                parts.extend(self.raw(folder, &raw)?);
            }
        }
        Ok(Some(parts).filter(|p| !p.is_empty()))
    }

    /// Files of bare elements in one folder: one for each input, by name, or one after the other for the only input.
    fn raw(&self, path: &Path, files: &[&PathBuf]) -> Result<Vec<Part>> {
        let stem = |file: &Path| file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let named = |file: &Path| {
            let stem = stem(file);
            self.inputs.iter().position(|i| i.name == stem || i.name.replace(['/', ':', '\\'], "_") == stem)
        };
        let matched: Option<Vec<(usize, PathBuf)>> = files.iter().map(|f| Some((named(f)?, (*f).clone()))).collect();
        if let Some(files) = matched {
            return Ok(vec![raw_part(path, &files, self.inputs)?]);
        }
        let only = only_input(path, self.inputs).map_err(|_| {
            let required = self.inputs.iter().filter(|i| i.required);
            let wanted: Vec<String> = required.map(|i| format!("{}.bin", i.name)).collect();
            let message = "the model has several inputs, but the files are not named after them";
            let hint = format!("name them {}, in one folder per sample", wanted.join(", "));
            Error::new(Kind::Samples, message).in_file(path).with_hint(hint)
        })?;
        files.iter().map(|f| raw_part(f, &[(only, (*f).clone())], self.inputs)).collect()
    }
}

/// What to do about a folder without samples.
fn hint(path: &Path) -> String {
    let others = ["bmp", "webp", "gif", "tif", "tiff", "heic", "wav", "mp3", "flac", "txt", "csv", "json"];
    let entries = list(path).unwrap_or_default();
    match entries.iter().map(|e| extension(e)).find(|e| others.contains(&e.as_str())) {
        Some(kind) => format!(
            "amax does not decode {kind} files: run your preprocessing on them and save its results with numpy.savez"
        ),
        None => FORMS.to_owned(),
    }
}

/// Files in a folder that are not among those that are read, and are not what tests expect of a model.
pub(super) fn others(path: &Path, read: &BTreeSet<&PathBuf>) -> Result<Vec<PathBuf>> {
    let mut entries = if path.is_dir() { list(path)? } else { Vec::new() };
    let is_output = |name: &str| name.starts_with("output_") && Path::new(name).extension().is_some_and(|e| e == "pb");
    let expected = |name: &str| is_output(name) || name == preprocess::FILE;
    entries.retain(|entry| {
        let name = entry.file_name().unwrap_or_default().to_string_lossy();
        !entry.is_dir() && !read.contains(entry) && !expected(&name)
    });
    Ok(entries)
}

/// The images in a folder, or below it, in the order of their paths.
fn pictures(path: &Path, entries: &[PathBuf]) -> Result<Vec<PathBuf>> {
    fn collect(entries: &[PathBuf], depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
        for entry in entries {
            if entry.is_dir() {
                if depth < MAX_DEPTH {
                    collect(&list(entry)?, depth + 1, found)?;
                }
            } else if EXTENSIONS.contains(&extension(entry).as_str()) {
                found.push(entry.clone());
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    collect(entries, 0, &mut found).map_err(|e| e.in_file(path))?;
    Ok(found)
}

/// The input that a file without keys is for.
fn only_input(path: &Path, inputs: &[Input]) -> Result<usize> {
    let mut required = (0..inputs.len()).filter(|&i| inputs[i].required);
    if let (Some(only), None) = (required.next(), required.next()) {
        return Ok(only);
    }
    let required: Vec<&Input> = inputs.iter().filter(|i| i.required).collect();
    let message = format!("the file holds one array, but the model has {} inputs", required.len());
    let hint = format!("write a .npz file with the keys {}", inputs::names(required.into_iter()));
    Err(Error::new(Kind::Samples, message).in_file(path).with_hint(hint))
}

fn input_files(entries: &[PathBuf]) -> Vec<(usize, PathBuf)> {
    let files = entries.iter().filter_map(|e| Some((pb::position(e.file_name()?.to_str()?)?, e.clone())));
    files.collect()
}

/// The entries of a folder without hidden files, in the order of names.
fn list(path: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io(Kind::Samples, "list", path, e);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            entries.push(entry.path());
        }
    }
    entries.sort_by(|a, b| natural(&a.to_string_lossy(), &b.to_string_lossy()).then_with(|| a.cmp(b)));
    Ok(entries)
}

/// Compares names, runs of digits by their value.
fn natural(mut a: &str, mut b: &str) -> Ordering {
    loop {
        let digits = |s: &str| s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
        let (in_a, in_b) = (digits(a), digits(b));
        let order = if in_a > 0 && in_b > 0 {
            let (x, y) = (a[..in_a].trim_start_matches('0'), b[..in_b].trim_start_matches('0'));
            (a, b) = (&a[in_a..], &b[in_b..]);
            x.len().cmp(&y.len()).then_with(|| x.cmp(y))
        } else {
            let (mut x, mut y) = (a.chars(), b.chars());
            let order = x.next().cmp(&y.next());
            (a, b) = (x.as_str(), y.as_str());
            order
        };
        if order.is_ne() || (a.is_empty() && b.is_empty()) {
            return order;
        }
    }
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}
