//! Calibration samples: what the model is run on.
//!
//! A set is one of
//! - a `.npz` file whose keys are input names. An array with one axis more than its input holds a sample in each row,
//!   and all such arrays must agree on their number; an array with as many axes as its input is one sample, or, beside
//!   arrays with rows, the same for all of them;
//! - a `.npy` file, for a model with one input;
//! - a folder of such files, in the order of their names, where each file may have its own shapes;
//! - a folder of ONNX test data (`input_0.pb`, ...), or a folder of those.
//!
//! Numbers in names count as numbers: `test_data_set_2` comes before `test_data_set_10`.
//!
//! Opening reads headers and checks every array's type and shape against the model. Samples are read one by one.
//! Integers may be narrower than the input wants, and float64 is rounded to float32; every other type must match.
//! NaN and infinities are let through: see [`non_finite`].

mod array;
mod convert;
mod inputs;
mod npy;
mod pb;
mod random;
mod zip;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::onnx::DataType;
use array::{Array, Spill};
use inputs::{Fit, Input};

/// A value for each input of the model; inputs that have defaults may be missing.
pub type Sample = BTreeMap<String, Tensor>;

/// The forms a set can have, for messages.
const FORMS: &str = "samples are a .npz file with a key for each input, a .npy file for a model with one input, \
                     a folder of those, or ONNX test data (input_0.pb, ...)";

/// A set of samples that fit a model.
#[derive(Debug)]
pub struct SampleSet {
    source: Source,
    label: String,
}

#[derive(Debug)]
enum Source {
    Files {
        /// Each holds at least one sample.
        parts: Vec<Part>,
        spill: Spill,
    },
    Random {
        inputs: Vec<(Input, DataType, Vec<usize>)>,
        count: usize,
        seed: u64,
    },
}

/// A file, or a folder of one sample.
#[derive(Debug)]
struct Part {
    /// Samples in the parts before this one.
    first: usize,
    count: usize,
    feeds: Vec<Feed>,
}

/// An array, and the input it is for.
#[derive(Debug)]
struct Feed {
    name: String,
    wanted: Option<DataType>,
    fit: Fit,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Numpy { array: Array, given: DataType },
    Proto { path: PathBuf, dims: Vec<usize> },
}

/// Where samples of a model are looked for when none are named: `<stem>.calib.npz` beside it. `None` if there is no
/// such file.
#[must_use]
pub fn default_path(model: &Path) -> Option<PathBuf> {
    let mut name = model.file_stem()?.to_owned();
    name.push(".calib.npz");
    Some(model.with_file_name(name)).filter(|path| path.is_file())
}

/// How many values of each input are NaN or infinite; inputs without any are left out.
#[must_use]
pub fn non_finite(sample: &Sample) -> BTreeMap<String, u64> {
    let count = |tensor: &Tensor| {
        let values = tensor.to_f32().unwrap_or_default();
        values.iter().filter(|v| !v.is_finite()).count() as u64
    };
    sample.iter().map(|(name, tensor)| (name.clone(), count(tensor))).filter(|(_, count)| *count > 0).collect()
}

impl SampleSet {
    /// Opens a set in any of its forms and checks it against the inputs of the model's main graph.
    ///
    /// # Errors
    /// [`Kind::Samples`] for a path that does not exist, files that are damaged or of another kind, arrays that no
    /// input asks for, inputs that are missing, types and shapes that do not fit, and a set without samples.
    pub fn open(path: &Path, model: &Model) -> Result<Self> {
        let inputs = inputs::inputs(model)?;
        let kind = std::fs::metadata(path)
            .map_err(|e| Error::io(Kind::Samples, "read samples from", path, e).with_hint(FORMS))?;
        let mut parts = if kind.is_dir() { open_folder(path, &inputs)? } else { vec![open_file(path, &inputs)?] };
        let mut first = 0;
        for part in &mut parts {
            part.first = first;
            first += part.count;
        }
        let label = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Self { source: Source::Files { parts, spill: Spill::default() }, label })
    }

    /// `count` made-up samples. Floats are close to normal with mean 0 and variance 1, integers are 0 to 7, booleans
    /// either. A free dimension is 1 if it is an input's first, 64 if it is beyond the second of a float input with
    /// four axes or more, else 8; dimensions of one name have one size. The same seed gives the same bytes everywhere.
    ///
    /// # Errors
    /// An input whose type or rank is not known, or whose type has no such values; no samples at all.
    pub fn random(model: &Model, count: usize, seed: u64) -> Result<Self> {
        if count == 0 {
            return Err(Error::new(Kind::Samples, "a set needs at least one sample"));
        }
        let inputs = random::shapes(&inputs::inputs(model)?)?;
        Ok(Self { source: Source::Random { inputs, count, seed }, label: format!("seed {seed}") })
    }

    /// Leaves out the inputs of these names, which samples then neither need nor give.
    pub fn drop_inputs(&mut self, names: &BTreeSet<String>) {
        match &mut self.source {
            Source::Files { parts, .. } => parts.iter_mut().for_each(|p| p.feeds.retain(|f| !names.contains(&f.name))),
            Source::Random { inputs, .. } => inputs.retain(|(input, ..)| !names.contains(&input.name)),
        }
    }

    /// How many samples there are; at least one.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a set is never empty")]
    pub fn len(&self) -> usize {
        match &self.source {
            Source::Files { parts, .. } => parts.last().map_or(0, |p| p.first + p.count),
            Source::Random { count, .. } => *count,
        }
    }

    /// The set in words: `32 samples of calib.npz`.
    #[must_use]
    pub fn describe(&self) -> String {
        let plural = if self.len() == 1 { "" } else { "s" };
        match self.source {
            Source::Files { .. } => format!("{} sample{plural} of {}", self.len(), self.label),
            Source::Random { .. } => format!("{} random sample{plural} ({})", self.len(), self.label),
        }
    }

    /// Reads sample `index`. Threads may do so at the same time.
    ///
    /// # Errors
    /// An index beyond the last sample, and files that cannot be read or have changed since they were opened.
    pub fn get(&self, index: usize) -> Result<Sample> {
        match &self.source {
            Source::Random { inputs, count, seed } if index < *count => Ok(inputs
                .iter()
                .enumerate()
                .filter_map(|(i, (input, dtype, shape))| {
                    Some((input.name.clone(), random::tensor(*dtype, shape, *seed, index, i)?))
                })
                .collect()),
            Source::Files { parts, spill } if index < self.len() => {
                let part = part_of(parts, index);
                let row = index - part.first;
                part.feeds.iter().map(|feed| Ok((feed.name.clone(), feed.read(row, spill)?))).collect()
            }
            _ => Err(Error::new(Kind::Internal, format!("sample {index} of {} was asked for", self.len()))),
        }
    }

    /// The shape of each input in sample `index`, by name, without reading the sample. Samples of equal keys can share
    /// a compiled plan. Empty beyond the last sample.
    #[must_use]
    pub fn shape_key(&self, index: usize) -> Vec<(String, Vec<usize>)> {
        let mut key: Vec<_> = match &self.source {
            _ if index >= self.len() => Vec::new(),
            Source::Random { inputs, .. } => {
                inputs.iter().map(|(i, _, shape)| (i.name.clone(), shape.clone())).collect()
            }
            Source::Files { parts, .. } => {
                part_of(parts, index).feeds.iter().map(|f| (f.name.clone(), f.shape().to_vec())).collect()
            }
        };
        key.sort();
        key
    }

    /// SHA-256, in hexadecimal, of what the samples hold: names, types, shapes and values in order. The form they are
    /// stored in does not enter. Reads every sample once, and compares archives with their checksums.
    ///
    /// # Errors
    /// As [`Self::get`], and archives that are damaged.
    pub fn content_hash(&self) -> Result<String> {
        if let Source::Files { parts, .. } = &self.source {
            for feed in parts.iter().flat_map(|p| &p.feeds) {
                if let Content::Numpy { array, .. } = &feed.content {
                    array.verify()?;
                }
            }
        }
        let hashes =
            (0..self.len()).into_par_iter().map(|i| self.get(i).map(|s| hash(&s))).collect::<Result<Vec<_>>>()?;
        let all = hashes.iter().fold(Sha256::new(), Digest::chain_update);
        Ok(format!("{:x}", all.finalize()))
    }

    /// Indices to calibrate on and indices to hold out for judging the result: of each `every` samples in a row the
    /// last one is held out. None are where `every` is less than 2 or there are fewer samples.
    #[must_use]
    pub fn split_held_out(&self, every: usize) -> (Vec<usize>, Vec<usize>) {
        (0..self.len()).partition(|i| every < 2 || i % every != every - 1)
    }
}

impl Feed {
    /// The shape of the input's value.
    fn shape(&self) -> &[usize] {
        match (&self.content, self.fit) {
            (Content::Numpy { array, .. }, Fit::Rows(_)) => &array.header.shape[1..],
            (Content::Numpy { array, .. }, Fit::One) => &array.header.shape,
            (Content::Proto { dims, .. }, _) => dims,
        }
    }

    fn read(&self, row: usize, spill: &Spill) -> Result<Tensor> {
        match &self.content {
            Content::Proto { path, .. } => pb::load(path, self.wanted),
            Content::Numpy { array, given } => {
                let shape = self.shape();
                let count = shape.iter().product::<usize>();
                let first = if matches!(self.fit, Fit::Rows(_)) { row * count } else { 0 };
                let bytes = array.read(first, count, spill)?;
                let wanted = self.wanted.unwrap_or(*given);
                let bytes = convert::convert(bytes, *given, wanted)
                    .ok_or_else(|| Error::new(Kind::Internal, "a type was not checked").at_value(&self.name))?;
                Ok(Tensor::new(wanted, shape, bytes))
            }
        }
    }
}

fn part_of(parts: &[Part], index: usize) -> &Part {
    &parts[parts.partition_point(|p| p.first <= index) - 1]
}

fn hash(sample: &Sample) -> [u8; 32] {
    let mut hash = Sha256::new();
    let number = |hash: &mut Sha256, n: usize| hash.update((n as u64).to_le_bytes());
    number(&mut hash, sample.len());
    for (name, tensor) in sample {
        number(&mut hash, name.len());
        hash.update(name);
        number(&mut hash, tensor.dtype().code() as usize);
        number(&mut hash, tensor.dims().len());
        for dim in tensor.dims() {
            number(&mut hash, dim);
        }
        hash.update(tensor.raw());
        for string in tensor.strings().iter() {
            number(&mut hash, string.len());
            hash.update(string);
        }
    }
    hash.finalize().into()
}

fn open_file(path: &Path, inputs: &[Input]) -> Result<Part> {
    match extension(path).as_str() {
        "npz" => {
            let arrays = array::open_npz(path)?;
            if arrays.is_empty() {
                return Err(Error::new(Kind::Samples, "the archive holds no arrays").in_file(path).with_hint(FORMS));
            }
            let mut feeds = Vec::new();
            for (key, array) in arrays {
                let at = inputs::find(inputs, &key).map_err(|e| e.in_file(path))?;
                feeds.push((at, array));
            }
            numpy_part(path, feeds, inputs)
        }
        "npy" => {
            let at = only_input(path, inputs)?;
            numpy_part(path, vec![(at, array::open_npy(path)?)], inputs)
        }
        "pb" => {
            only_input(path, inputs)?;
            proto_part(path, &[(0, path.to_owned())], inputs)
        }
        _ => Err(Error::new(Kind::Samples, "the file is not of a kind that holds samples")
            .in_file(path)
            .with_hint(FORMS)),
    }
}

/// The input that a file without keys is for.
fn only_input(path: &Path, inputs: &[Input]) -> Result<usize> {
    let mut required = (0..inputs.len()).filter(|&i| inputs[i].required);
    if let (Some(only), None) = (required.next(), required.next()) {
        return Ok(only);
    }
    let required: Vec<&Input> = inputs.iter().filter(|i| i.required).collect();
    let message = format!("the file holds one array, and the model has {} inputs", required.len());
    let hint = format!("write a .npz file with the keys {}", inputs::names(required.into_iter()));
    Err(Error::new(Kind::Samples, message).in_file(path).with_hint(hint))
}

fn numpy_part(path: &Path, arrays: Vec<(usize, Array)>, inputs: &[Input]) -> Result<Part> {
    let fail = |message: String| Error::new(Kind::Samples, message).in_file(path);
    let mut feeds: Vec<Feed> = Vec::new();
    for (at, array) in arrays {
        let input = &inputs[at];
        if feeds.iter().any(|f| f.name == input.name) {
            return Err(fail("two arrays are for one input".to_owned()).at_value(&input.name));
        }
        let given = input.element(array.header.element).map_err(|e| e.in_file(path))?;
        let fit = input.fit(&array.header.shape, true).map_err(|e| e.in_file(path))?;
        let content = Content::Numpy { array, given };
        feeds.push(Feed { name: input.name.clone(), wanted: input.dtype, fit, content });
    }
    complete(&feeds, inputs).map_err(|e| e.in_file(path))?;
    let mut rows = feeds.iter().filter_map(|f| match f.fit {
        Fit::Rows(count) => Some((count, f.name.clone())),
        Fit::One => None,
    });
    let first = rows.next();
    if let (Some((a, one)), Some((b, other))) = (&first, rows.find(|r| first.as_ref().is_some_and(|f| f.0 != r.0))) {
        let message = format!("\"{one}\" holds {a} samples, and \"{other}\" holds {b}");
        return Err(fail(message).with_hint("each array must hold a row for each sample"));
    }
    drop(rows);
    let count = first.map_or(1, |(count, _)| count);
    if count == 0 {
        return Err(fail("the file holds no samples: its arrays have no rows".to_owned()));
    }
    // Inputs of unknown rank go by the number of rows that the others have.
    for feed in &mut feeds {
        let ranked = inputs.iter().any(|i| i.name == feed.name && i.dims.is_some());
        if let (false, true, Content::Numpy { array, .. }) = (ranked, count > 1, &feed.content)
            && array.header.shape.first() == Some(&count)
        {
            feed.fit = Fit::Rows(count);
        }
    }
    Ok(Part { first: 0, count, feeds })
}

fn proto_part(path: &Path, files: &[(usize, PathBuf)], inputs: &[Input]) -> Result<Part> {
    let mut feeds: Vec<Feed> = Vec::new();
    for (position, file) in files {
        let (at, dims) = pb::open(file, *position, inputs)?;
        let Input { name, dtype, .. } = &inputs[at];
        if feeds.iter().any(|f| f.name == *name) {
            return Err(Error::new(Kind::Samples, "two files are for one input").at_value(name).in_file(file));
        }
        let content = Content::Proto { path: file.clone(), dims };
        feeds.push(Feed { name: name.clone(), wanted: *dtype, fit: Fit::One, content });
    }
    complete(&feeds, inputs).map_err(|e| e.in_file(path))?;
    Ok(Part { first: 0, count: 1, feeds })
}

/// Checks that every input without a default has a value.
fn complete(feeds: &[Feed], inputs: &[Input]) -> Result<()> {
    match inputs.iter().find(|i| i.required && feeds.iter().all(|f| f.name != i.name)) {
        None => Ok(()),
        Some(missing) => Err(Error::new(Kind::Samples, "the samples have no array for this input")
            .at_value(&missing.name)
            .with_hint(format!("the model needs {}", inputs::names(inputs.iter().filter(|i| i.required))))),
    }
}

fn open_folder(path: &Path, inputs: &[Input]) -> Result<Vec<Part>> {
    let entries = list(path)?;
    let is = |kinds: &[&str]| entries.iter().filter(|e| kinds.contains(&extension(e).as_str())).collect::<Vec<_>>();
    let arrays = is(&["npz", "npy"]);
    let protos = input_files(&entries);
    let fail = |message: &str| Error::new(Kind::Samples, message).in_file(path);
    if !arrays.is_empty() {
        if !protos.is_empty() {
            return Err(
                fail("the folder holds both numpy and ONNX samples").with_hint("put them in folders of their own")
            );
        }
        return arrays.into_iter().map(|file| open_file(file, inputs)).collect();
    }
    if !protos.is_empty() {
        return Ok(vec![proto_part(path, &protos, inputs)?]);
    }
    let mut parts = Vec::new();
    for folder in entries.iter().filter(|e| e.is_dir()) {
        let protos = input_files(&list(folder)?);
        if !protos.is_empty() {
            parts.push(proto_part(folder, &protos, inputs)?);
        }
    }
    if parts.is_empty() {
        let images = is(&["png", "jpg", "jpeg", "bmp", "webp", "wav", "txt"]);
        let hint = match images.first() {
            Some(file) => format!(
                "amax does not decode {} files: run your preprocessing on them and save its results with numpy.savez",
                extension(file)
            ),
            None => FORMS.to_owned(),
        };
        return Err(fail("the folder holds no samples").with_hint(hint));
    }
    Ok(parts)
}

fn input_files(entries: &[PathBuf]) -> Vec<(usize, PathBuf)> {
    let files = entries.iter().filter_map(|e| Some((pb::position(e.file_name()?.to_str()?)?, e.clone())));
    files.collect()
}

/// What a folder holds, hidden files left out, in the order of names.
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
