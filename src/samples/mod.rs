//! Calibration samples.
//!
//! A set is one of
//! - a `.npz` file whose keys are input names. An array with one axis more than its input holds one sample per row,
//!   and all such arrays must have the same number of rows; an array with as many axes as its input is one sample, or,
//!   beside arrays with rows, shared by all of them;
//! - a `.npy` file, for a model with one input;
//! - a folder of such files, in the order of their names, where each file may have its own shapes;
//! - a folder of ONNX test data (`input_0.pb`, ...), or a folder of those;
//! - a `.jsonl` file with one sample per line, or a folder of those: an object of nested lists by input, or the list of
//!   the only input. A first axis of 1 may be left out. `attention_mask`, `token_type_ids` and `position_ids` that are not
//!   given are ones, zeros, and 0, 1, 2, …;
//! - a folder of images, or a folder of those, with a document that describes how they become an input (`preprocess.toml`);
//! - a `.bin` file of little-endian elements for the only input, with one sample or several in a row; a folder of those; or
//!   a folder with one `<input>.bin` per input, or one such folder per sample. Type and shape are the model's: a free
//!   first axis is 1, and one other free axis is as long as the file.
//!
//! Numbers in names count as numbers: `test_data_set_2` comes before `test_data_set_10`.
//!
//! Opening reads headers and checks every array's type and shape against the model. Samples are read one by one.
//! Integers may be narrower than the input's type, and float64 is rounded to float32; every other type must match.
//! NaN and infinities are accepted: see [`non_finite`].

mod array;
mod convert;
mod folder;
mod inputs;
mod lines;
mod memory;
mod npy;
mod parts;
mod pb;
#[cfg(feature = "images")]
mod picture;
#[cfg(not(feature = "images"))]
#[path = "no_picture.rs"]
mod picture;
#[cfg_attr(not(feature = "images"), allow(dead_code, reason = "it makes inputs of images"))]
mod preprocess;
mod random;
mod raw;
#[cfg_attr(not(feature = "images"), allow(dead_code, reason = "it makes inputs of images"))]
mod resample;
mod stream;
mod zip;

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::ir::{Def, Model, Tensor, ValueId};
use crate::onnx::DataType;
use array::Spill;
use folder::Opening;
use inputs::Input;
pub use memory::{Element, Values};
use parts::{Part, Stored, array_part};

/// A value for each input of the model; inputs that have defaults may be missing.
pub type Sample = BTreeMap<String, Tensor>;

/// The forms a set can have, for messages.
const FORMS: &str = "samples are a .npz file with a key for each input, a .npy file for a model with one input, \
                     a .jsonl file with a sample in each line, a folder of those, a folder of images (.png, .jpg) \
                     or of bare arrays (.bin), or ONNX test data (input_0.pb, ...)";

/// Options for opening samples.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The description of how images become the model's input. Default: `preprocess.toml` in their folder, or
    /// `<stem>.preprocess.toml` beside the model.
    pub preprocess: Option<PathBuf>,
    /// Sizes of dimensions that the model leaves free, by their name, or by input and axis: `x.2`. Files without headers
    /// need them; all other samples must have them.
    pub dims: BTreeMap<String, usize>,
}

/// A set of samples that fit a model.
#[derive(Debug)]
pub struct SampleSet {
    source: Source,
    label: String,
    /// Inputs that were dropped.
    dropped: BTreeSet<String>,
}

#[derive(Debug)]
enum Source {
    Files {
        /// Each holds at least one sample.
        parts: Vec<Part>,
        spill: Spill,
        unread: Vec<PathBuf>,
    },
    Random {
        inputs: Vec<(Input, DataType, Vec<usize>)>,
        count: usize,
        seed: u64,
    },
}

/// The default samples of a model: `<stem>.calib.npz` beside it. `None` if there is no such file.
#[must_use]
pub fn default_path(model: &Path) -> Option<PathBuf> {
    beside(model, ".calib.npz")
}

/// The file beside the model whose name is the model's, its extension replaced.
fn beside(model: &Path, ending: &str) -> Option<PathBuf> {
    let mut name = model.file_stem()?.to_owned();
    name.push(ending);
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
    pub fn open<P: AsRef<Path> + ?Sized>(path: &P, model: &Model) -> Result<Self> {
        Self::open_with(path.as_ref(), model, &Options::default())
    }

    /// As [`SampleSet::open`], with options.
    ///
    /// # Errors
    /// As [`SampleSet::open`]; [`Kind::Config`] for a preprocessing document that is wrong or does not fit the model, and
    /// [`Kind::Usage`] for options that nothing uses.
    pub fn open_with(path: &Path, model: &Model, options: &Options) -> Result<Self> {
        let mut inputs = inputs::inputs(model)?;
        inputs::bind(&mut inputs, &options.dims)?;
        let beside = model.path().and_then(|model| beside(model, ".preprocess.toml"));
        let opening = Opening { inputs: &inputs, named: options.preprocess.as_deref(), beside };
        let parts = opening.open(path)?;
        let label = format!("of {}", path.file_name().unwrap_or(path.as_os_str()).to_string_lossy());
        let read: BTreeSet<&PathBuf> = parts.iter().flat_map(Part::files).collect();
        let unread = folder::others(path, &read)?;
        Ok(Self::of_parts(parts, label, unread))
    }

    /// Samples from a stream: for each array a line with the name of its input and then the array as numpy's `.npy` has
    /// it; an empty line ends a sample. A first axis of 1 may be left out. What is more than 256 MB is kept in an unnamed
    /// file of the system's temporary folder.
    ///
    /// # Errors
    /// As [`SampleSet::open_with`], and a stream that ends within a sample.
    pub fn from_stream(from: &mut impl BufRead, model: &Model, options: &Options) -> Result<Self> {
        let mut inputs = inputs::inputs(model)?;
        inputs::bind(&mut inputs, &options.dims)?;
        if options.preprocess.is_some() {
            return Err(Error::new(Kind::Usage, "preprocessing is for images, but a stream has none"));
        }
        Ok(Self::of_parts(stream::read(from, &inputs)?, "of a stream".to_owned(), Vec::new()))
    }

    fn of_parts(mut parts: Vec<Part>, label: String, unread: Vec<PathBuf>) -> Self {
        let mut first = 0;
        for part in &mut parts {
            part.first = first;
            first += part.count;
        }
        Self { source: Source::Files { parts, spill: Spill::default(), unread }, label, dropped: BTreeSet::new() }
    }

    /// Samples in memory: an array for each input, by name. An array with one axis more than its input holds a sample in
    /// each row, and all such arrays must agree on their number; an array with as many axes as its input is one sample, or,
    /// beside arrays with rows, the same for all of them. Types are converted as those of files are.
    ///
    /// ```
    /// # fn main() -> amax::Result<()> {
    /// let model = amax::load("models/digits.onnx")?;
    /// // 32 samples of the input `[1, 1, 8, 8]`.
    /// let pixels = ndarray::Array5::<f32>::from_elem((32, 1, 1, 8, 8), 0.5);
    /// let samples = amax::SampleSet::from_arrays(&model, [("image", pixels.into())])?;
    /// assert_eq!(samples.len(), 32);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Kind::Samples`] for arrays that no input asks for, inputs that are missing, types and shapes that do not fit, and
    /// no samples at all.
    pub fn from_arrays<'n>(model: &Model, arrays: impl IntoIterator<Item = (&'n str, Values)>) -> Result<Self> {
        let inputs = inputs::inputs(model)?;
        let mut found = Vec::new();
        for (name, Values(tensor)) in arrays {
            found.push((inputs::find(&inputs, name)?, Stored::Memory(Box::new(tensor))));
        }
        let parts = vec![array_part(None, found, &inputs)?];
        Ok(Self::of_parts(parts, "from memory".to_owned(), Vec::new()))
    }

    /// The files that samples are read from, and what says how; sorted, each once.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let Source::Files { parts, .. } = &self.source else { return Vec::new() };
        let files: BTreeSet<&PathBuf> = parts.iter().flat_map(Part::files).collect();
        files.into_iter().cloned().collect()
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
        Ok(Self {
            source: Source::Random { inputs, count, seed },
            label: format!("seed {seed}"),
            dropped: BTreeSet::new(),
        })
    }

    /// Whether samples give inputs of the model that have defaults.
    #[must_use]
    pub fn give_defaults(&self, model: &Model) -> bool {
        let with_default = |value: &ValueId| matches!(model.value(*value).def(), Def::Input { default: Some(_) });
        let names: BTreeSet<&str> =
            model.graph(model.main()).inputs().filter(with_default).map(|v| model.value(v).name()).collect();
        !names.is_empty()
            && (0..self.len()).any(|i| self.shape_key(i).iter().any(|(name, _)| names.contains(name.as_str())))
    }

    /// Whether they are made up, so that nothing can be learned from them.
    #[must_use]
    pub fn is_noise(&self) -> bool {
        matches!(self.source, Source::Random { .. })
    }

    /// Leaves out the inputs of these names, which samples then neither need nor give.
    pub fn drop_inputs(&mut self, names: &BTreeSet<String>) {
        self.dropped.extend(names.iter().cloned());
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

    /// The set in words: `32 samples of calib.npz`, and which inputs have no elements in some of them.
    #[must_use]
    pub fn describe(&self) -> String {
        let plural = if self.len() == 1 { "" } else { "s" };
        match self.source {
            Source::Files { .. } => {
                let shapes = (0..self.len()).flat_map(|index| self.shape_key(index));
                let empty: BTreeSet<String> =
                    shapes.filter(|(_, shape)| shape.contains(&0)).map(|(name, _)| name).collect();
                let more = empty.len().saturating_sub(1);
                let empty = match empty.first() {
                    None => String::new(),
                    Some(only) if more == 0 => format!(", with empty {only}"),
                    Some(first) => format!(", with empty {first} and {more} more like it"),
                };
                format!("{} sample{plural} {}{empty}", self.len(), self.label)
            }
            Source::Random { .. } => format!("{} random sample{plural} ({})", self.len(), self.label),
        }
    }

    /// Reads sample `index`. Threads may do so at the same time.
    ///
    /// # Errors
    /// An index beyond the last sample, and files that cannot be read or have changed since they were opened.
    pub fn get(&self, index: usize) -> Result<Sample> {
        let mut sample = self.read(index)?;
        sample.retain(|name, _| !self.dropped.contains(name));
        Ok(sample)
    }

    fn read(&self, index: usize) -> Result<Sample> {
        match &self.source {
            Source::Random { inputs, count, seed } if index < *count => Ok(inputs
                .iter()
                .enumerate()
                .filter_map(|(i, (input, dtype, shape))| {
                    Some((input.name.clone(), random::tensor(*dtype, shape, *seed, index, i)?))
                })
                .collect()),
            Source::Files { parts, spill, .. } if index < self.len() => {
                let part = part_of(parts, index);
                part.read(index - part.first, spill)
            }
            _ => Err(Error::new(Kind::Internal, format!("sample {index} of {} was asked for", self.len()))),
        }
    }

    /// Number and place of a sample: `3 (line 4 of tokens.jsonl)`.
    #[must_use]
    pub fn place(&self, index: usize) -> String {
        match &self.source {
            Source::Files { parts, .. } if index < self.len() => {
                let part = part_of(parts, index);
                match part.place(index - part.first) {
                    place if place.is_empty() => index.to_string(),
                    place => format!("{index} ({place})"),
                }
            }
            _ => index.to_string(),
        }
    }

    /// Files of the folder that was named which are not samples, sorted.
    #[must_use]
    pub fn unread(&self) -> &[PathBuf] {
        match &self.source {
            Source::Files { unread, .. } => unread,
            Source::Random { .. } => &[],
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
                let part = part_of(parts, index);
                part.shapes(index - part.first)
            }
        };
        key.retain(|(name, _)| !self.dropped.contains(name));
        key.sort();
        key
    }

    /// SHA-256, in hexadecimal, of the samples: names, types, shapes and values in order, after preprocessing, whatever
    /// the file format. Reads every sample once, and verifies the checksums of archives.
    ///
    /// # Errors
    /// As [`Self::get`], and archives that are damaged.
    pub fn content_hash(&self) -> Result<String> {
        if let Source::Files { parts, .. } = &self.source {
            parts.iter().try_for_each(Part::verify)?;
        }
        let hashes =
            (0..self.len()).into_par_iter().map(|i| self.get(i).map(|s| hash(&s))).collect::<Result<Vec<_>>>()?;
        let all = hashes.iter().fold(Sha256::new(), Digest::chain_update);
        Ok(format!("{:x}", all.finalize()))
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
