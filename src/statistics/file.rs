//! Statistics on disk: a safetensors file.
//!
//! The file is eight bytes with the length of a JSON header, the header, then the tensors one after another. For a
//! site NAME they are, all little-endian:
//!
//! - `totals:NAME`, U64 `[4]`: values seen, NaN, infinite, zeros;
//! - `samples:NAME`, F64 `[n, 7]`: one row per sample: its index, number of values, number that are not finite, smallest
//!   and largest finite value (NaN if there is none), their sum, the sum of their squares;
//! - `octaves:NAME`, U16 `[k]`: the octaves of the histogram: 256 for negative values, plus the exponent as floats store it;
//! - `histogram:NAME`, U32 or, if a count needs it, U64 `[bins]`: the counts of these octaves one after another; each
//!   has as many bins as [`Histogram`] says;
//! - `channels:NAME`, F32 `[channels, 2]`, if ranges of channels are kept: smallest and largest value, NaN if there is
//!   none; and `axis:NAME`, I64 `[2]`: their axis, and whether tensors differed in their number (1) or not (0).
//!
//! `__metadata__` has the other fields of [`Statistics`] and the SHA-256 of the tensors. The same statistics give the same
//! bytes, and reading checks that writing would give the bytes again.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::histogram::{self, Histogram};
use super::{Channels, Range, SampleRecord, SiteStatistics, Statistics};
use crate::error::{Error, Kind, Result};
use crate::ir::file::{Staged, without_path};

const FORMAT: &str = "amax statistics";
const SCHEMA: &str = "1";
/// No header that is written comes near it.
const LARGEST_HEADER: u64 = 1 << 30;
const COLUMNS: usize = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Dtype {
    F64,
    I64,
    U64,
    F32,
    U32,
    U16,
}

impl Dtype {
    fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::U32 => 4,
            Self::U16 => 2,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    asked: String,
    data_sha256: String,
    format: String,
    model_sha256: String,
    /// The indices of the samples that were run: `0-55,57`.
    samples_run: String,
    samples_sha256: String,
    /// How many samples the set holds.
    samples_total: String,
    schema: String,
    /// Tensors that cannot be observed, with the reason, as JSON.
    unobserved: String,
}

#[derive(Serialize, Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: Metadata,
    #[serde(flatten)]
    tensors: BTreeMap<String, Entry>,
}

/// A tensor to write.
struct Blob {
    kind: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Statistics {
    /// The bytes of the file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let written = self.write(&mut bytes);
        debug_assert!(written.is_ok(), "memory can be written to");
        bytes
    }

    /// Writes tensor by tensor: the file is as large as the statistics themselves, which may be in memory once only.
    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let blobs = |name: &'_ str| -> Vec<Blob> {
            KINDS
                .iter()
                .filter_map(|&kind| Some(Blob { bytes: Vec::new(), ..blob(kind, self.sites.get(name)?)? }))
                .collect()
        };
        let mut places: Vec<(&str, Blob)> =
            self.sites.keys().flat_map(|name| blobs(name).into_iter().map(move |blob| (name.as_str(), blob))).collect();
        // The widest first, so that each tensor is aligned.
        let key = |blob: &Blob| (std::cmp::Reverse(blob.dtype.size()), format!("{}:", blob.kind));
        places.sort_by(|(a, x), (b, y)| key(x).cmp(&key(y)).then_with(|| a.cmp(b)));
        let contents = || places.iter().filter_map(|(name, place)| blob(place.kind, self.sites.get(*name)?));
        let mut tensors = BTreeMap::new();
        let (mut at, mut hash) = (0, Sha256::new());
        for ((name, _), Blob { kind, dtype, shape, bytes }) in places.iter().zip(contents()) {
            hash.update(&bytes);
            let data_offsets = (at, at + bytes.len());
            at = data_offsets.1;
            tensors.insert(format!("{kind}:{name}"), Entry { dtype, shape, data_offsets });
        }
        let header = header(self.metadata(format!("{:x}", hash.finalize())), tensors);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        contents().try_for_each(|blob| out.write_all(&blob.bytes))
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// [`Kind::Samples`] for bytes that [`Self::to_bytes`] does not produce: other files, and files that are truncated,
    /// changed or of another version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (header, data) = split(bytes)?;
        let Header { metadata, tensors } = parse(header)?;
        let mut order: Vec<(&String, &Entry)> = tensors.iter().collect();
        order.sort_by(|a, b| b.1.dtype.size().cmp(&a.1.dtype.size()).then_with(|| a.0.cmp(b.0)));
        let mut at = 0usize;
        let mut arrays: BTreeMap<&str, Array<'_>> = BTreeMap::new();
        for (name, entry) in order {
            let size = entry.shape.iter().try_fold(entry.dtype.size(), |size, &dim| size.checked_mul(dim));
            let end = size.and_then(|size| at.checked_add(size));
            if end.is_none_or(|end| entry.data_offsets != (at, end)) {
                return Err(damaged(format!("its tensor \"{name}\" is not where it should be")));
            }
            let Some(bytes) = data.get(entry.data_offsets.0..entry.data_offsets.1) else {
                return Err(cut_short());
            };
            at = entry.data_offsets.1;
            arrays.insert(name, Array { name, dtype: entry.dtype, shape: &entry.shape, bytes });
        }
        if at != data.len() {
            return Err(damaged(format!("{} bytes follow its last tensor", data.len() - at)));
        }
        if format!("{:x}", Sha256::digest(data)) != metadata.data_sha256 {
            return Err(damaged("its content does not match its hash"));
        }
        let ran = parse_ran(&metadata.samples_run)?;
        let names: BTreeSet<String> =
            arrays.keys().filter_map(|name| name.strip_prefix("totals:")).map(str::to_owned).collect();
        let mut sites = BTreeMap::new();
        for name in names {
            let site = site(&name, &mut arrays).map_err(|e| e.at_value(&name))?;
            if let Some(record) = site.samples.iter().find(|r| ran.binary_search(&r.index).is_err()) {
                let message = format!("it has values of sample {}, which was not run", record.index);
                return Err(damaged(message).at_value(&name));
            }
            sites.insert(name, site);
        }
        if let Some(name) = arrays.keys().next() {
            return Err(damaged(format!("its tensor \"{name}\" does not belong to any site")));
        }
        let number = |text: &str| text.parse().map_err(|_| damaged(format!("\"{text}\" is not a number of samples")));
        let statistics = Self {
            model_hash: metadata.model_sha256.clone(),
            samples_hash: metadata.samples_sha256.clone(),
            asked: metadata.asked.clone(),
            sample_count: ran.len() as u64,
            sample_total: number(&metadata.samples_total)?,
            ran,
            unobserved: serde_json::from_str(&metadata.unobserved)
                .map_err(|e| damaged(format!("its list of unobserved tensors cannot be read: {e}")))?,
            sites,
        };
        // Whatever is left of freedom in the header: the same statistics have one form only.
        if self::header(statistics.metadata(metadata.data_sha256.clone()), tensors) != header {
            return Err(damaged("its header is not written as amax writes it"));
        }
        Ok(statistics)
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// [`Kind::Output`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let fail = |e| Error::io(Kind::Output, "write", path, e);
        let staged = Staged::beside(path).map_err(|e| fail(without_path(e)))?;
        self.write(&mut staged.file()).map_err(fail)?;
        staged.keep(path)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Kind::Samples`] for files that cannot be read, and as [`Self::from_bytes`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::io(Kind::Samples, "read", path, e))?;
        Self::from_bytes(&bytes).map_err(|e| e.in_file(path))
    }

    fn metadata(&self, data_sha256: String) -> Metadata {
        Metadata {
            asked: self.asked.clone(),
            data_sha256,
            format: FORMAT.to_owned(),
            model_sha256: self.model_hash.clone(),
            samples_run: print_ran(&self.ran),
            samples_sha256: self.samples_hash.clone(),
            samples_total: self.sample_total.to_string(),
            schema: SCHEMA.to_owned(),
            unobserved: serde_json::json!(self.unobserved).to_string(),
        }
    }
}

fn header(metadata: Metadata, tensors: BTreeMap<String, Entry>) -> Vec<u8> {
    let json = serde_json::json!(Header { metadata, tensors }).to_string();
    let mut bytes = json.into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}

fn damaged(message: impl AsRef<str>) -> Error {
    Error::new(Kind::Samples, format!("these statistics are damaged: {}", message.as_ref()))
        .with_hint("calibrate again")
}

fn cut_short() -> Error {
    damaged("the file ends before its last tensor")
}

/// Header and tensors.
fn split(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let foreign = || {
        Error::new(Kind::Samples, "this is not a statistics file")
            .with_hint("`amax calibrate` and `amax merge` write them")
    };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else { return Err(foreign()) };
    let length = u64::from_le_bytes(*length);
    if length > LARGEST_HEADER || rest.first() != Some(&b'{') {
        return Err(foreign());
    }
    rest.split_at_checked(length as usize).ok_or_else(cut_short)
}

fn parse(header: &[u8]) -> Result<Header> {
    #[derive(Deserialize)]
    struct Any {
        #[serde(rename = "__metadata__", default)]
        metadata: BTreeMap<String, String>,
    }
    let any: Any = serde_json::from_slice(header).map_err(|e| damaged(format!("its header cannot be read: {e}")))?;
    if any.metadata.get("format").is_none_or(|f| f != FORMAT) {
        return Err(Error::new(Kind::Samples, "this safetensors file does not hold statistics")
            .with_hint("`amax calibrate` and `amax merge` write them"));
    }
    match any.metadata.get("schema") {
        Some(schema) if schema == SCHEMA => {}
        other => {
            let message = format!("statistics of version {} cannot be read", other.map_or("?", String::as_str));
            return Err(Error::new(Kind::Samples, message).with_hint("calibrate again with this version of amax"));
        }
    }
    serde_json::from_slice(header).map_err(|e| damaged(format!("its header cannot be read: {e}")))
}

/// The kinds of tensors that a site can have.
const KINDS: [&str; 6] = ["axis", "channels", "histogram", "octaves", "samples", "totals"];

/// The tensor of a kind, if the site has one.
fn blob(kind: &'static str, site: &SiteStatistics) -> Option<Blob> {
    let SiteStatistics { count, nan, inf, range: _, histogram, samples, channels } = site;
    let wide = |values: &[u64]| joined(values.iter().map(|v| v.to_le_bytes()));
    let (dtype, shape, bytes) = match kind {
        "totals" => (Dtype::U64, vec![4], wide(&[*count, *nan, *inf, histogram.zeros()])),
        "samples" => {
            let rows = samples.iter().flat_map(|record| {
                let SampleRecord { index, count, non_finite, sum, sum_squares, .. } = *record;
                let (min, max) = record.range().map_or((f64::NAN, f64::NAN), |r| (f64::from(r.min), f64::from(r.max)));
                [f64::from(index), count as f64, f64::from(non_finite), min, max, sum, sum_squares]
            });
            (Dtype::F64, vec![samples.len(), COLUMNS], joined(rows.map(f64::to_le_bytes)))
        }
        "octaves" => {
            let prefixes = histogram.parts().0;
            (Dtype::U16, vec![prefixes.len()], joined(prefixes.iter().map(|p| p.to_le_bytes())))
        }
        "histogram" => {
            let counts = histogram.parts().1;
            match counts.iter().map(|&c| u32::try_from(c)).collect::<Result<Vec<u32>, _>>() {
                Ok(narrow) => (Dtype::U32, vec![counts.len()], joined(narrow.iter().map(|c| c.to_le_bytes()))),
                Err(_) => (Dtype::U64, vec![counts.len()], wide(&counts)),
            }
        }
        "axis" => {
            let Channels { axis, ragged, ranges: _ } = channels.as_ref()?;
            let axis = [*axis as i64, i64::from(*ragged)];
            (Dtype::I64, vec![2], joined(axis.iter().map(|v| v.to_le_bytes())))
        }
        _ => {
            let Channels { axis: _, ragged: _, ranges } = channels.as_ref()?;
            let ends = ranges.iter().flat_map(|r| r.map_or([f32::NAN; 2], |r| [r.min, r.max]));
            (Dtype::F32, vec![ranges.len(), 2], joined(ends.map(f32::to_le_bytes)))
        }
    };
    Some(Blob { kind, dtype, shape, bytes })
}

/// The bytes of numbers one after the other.
fn joined<const N: usize>(numbers: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(numbers.size_hint().0 * N);
    numbers.for_each(|number| bytes.extend_from_slice(&number));
    bytes
}

/// A tensor that was read.
struct Array<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl Array<'_> {
    /// The elements, if type and rank are these.
    fn read<const N: usize, T>(&self, dtype: Dtype, tail: &[usize], from: fn([u8; N]) -> T) -> Result<Vec<T>> {
        if self.dtype != dtype || self.shape.get(1..) != Some(tail) {
            return Err(damaged(format!("its tensor \"{}\" has another type or shape", self.name)));
        }
        Ok(self.bytes.as_chunks::<N>().0.iter().map(|b| from(*b)).collect())
    }
}

fn site(name: &str, arrays: &mut BTreeMap<&str, Array<'_>>) -> Result<SiteStatistics> {
    let mut optional = |kind: &str| arrays.remove(format!("{kind}:{name}").as_str());
    let (axis, channels) = (optional("axis"), optional("channels"));
    let mut take =
        |kind: &str| optional(kind).ok_or_else(|| damaged(format!("its tensor \"{kind}:{name}\" is missing")));
    let totals = take("totals")?.read(Dtype::U64, &[], u64::from_le_bytes)?;
    let rows = take("samples")?.read(Dtype::F64, &[COLUMNS], f64::from_le_bytes)?;
    let octaves = take("octaves")?.read(Dtype::U16, &[], u16::from_le_bytes)?;
    let counts = take("histogram")?;
    let counts: Vec<u64> = if counts.dtype == Dtype::U64 {
        let wide = counts.read(Dtype::U64, &[], u64::from_le_bytes)?;
        if wide.iter().all(|&c| u32::try_from(c).is_ok()) {
            return Err(damaged("counts are written wider than needed"));
        }
        wide
    } else {
        counts.read(Dtype::U32, &[], u32::from_le_bytes)?.into_iter().map(u64::from).collect()
    };
    let [count, nan, inf, zeros] = totals[..] else {
        return Err(damaged("it does not have four totals"));
    };
    let histogram = Histogram::from_parts(zeros, &octaves, &counts).map_err(damaged)?;
    let samples = rows.as_chunks::<COLUMNS>().0.iter().map(record).collect::<Result<Vec<_>>>()?;
    if !samples.is_sorted_by(|a, b| a.index < b.index) {
        return Err(damaged("its samples are not in order"));
    }
    let sum = |part: fn(&SampleRecord) -> u64| samples.iter().map(part).try_fold(0, u64::checked_add);
    let bad = nan.checked_add(inf);
    let uncounted = samples.iter().any(|r| r.non_finite == u32::MAX);
    let whole = bad.and_then(|bad| bad.checked_add(histogram::total(&counts, zeros)?));
    if whole != Some(count) || sum(|r| r.count) != Some(count) || !uncounted && sum(|r| r.non_finite.into()) != bad {
        return Err(damaged("its counts do not add up"));
    }
    let range = samples.iter().map(SampleRecord::range).fold(None, super::union);
    let channels = match (axis, channels) {
        (Some(axis), Some(channels)) => Some(read_channels(&axis, &channels)?),
        (None, None) => None,
        _ => return Err(damaged("it has ranges of channels without an axis, or an axis without ranges")),
    };
    Ok(SiteStatistics { count, nan, inf, range, histogram, samples, channels })
}

fn record(row: &[f64; COLUMNS]) -> Result<SampleRecord> {
    let &[index, count, non_finite, min, max, sum, sum_squares] = row;
    let whole = |value: f64, limit: f64| {
        let fits = value >= 0.0 && value <= limit && value.fract() == 0.0;
        if fits { Ok(value as u64) } else { Err(damaged(format!("{value} is not a count"))) }
    };
    let (count, non_finite) = (whole(count, 2f64.powi(53))?, whole(non_finite, f64::from(u32::MAX))? as u32);
    let range = range(min, max)?;
    if u64::from(non_finite) > count
        || range.is_none() != (u64::from(non_finite) == count)
        || !sum.is_finite()
        || sum_squares.is_nan()
    {
        return Err(damaged(format!("the record of sample {index} contradicts itself")));
    }
    let index = whole(index, f64::from(u32::MAX))? as u32;
    let mut record = SampleRecord { count, sum, sum_squares, non_finite, ..SampleRecord::new(index) };
    record.set_range(range);
    Ok(record)
}

/// A range, as its two ends were written.
#[allow(clippy::float_cmp, reason = "doubles that were floats are floats")]
fn range(min: f64, max: f64) -> Result<Option<Range>> {
    let nothing = f64::NAN.to_bits();
    if min.to_bits() == nothing && max.to_bits() == nothing {
        return Ok(None);
    }
    let zero = |v: f64| v == 0.0 && v.is_sign_negative();
    let float = |v: f64| v.is_finite() && f64::from(v as f32) == v && !zero(v);
    if !(float(min) && float(max) && min <= max) {
        return Err(damaged(format!("{min} to {max} is no range")));
    }
    Ok(Some(Range { min: min as f32, max: max as f32 }))
}

fn read_channels(axis: &Array<'_>, channels: &Array<'_>) -> Result<Channels> {
    let axis = axis.read(Dtype::I64, &[], i64::from_le_bytes)?;
    let ends = channels.read(Dtype::F32, &[2], f32::from_le_bytes)?;
    let ranges = ends.as_chunks::<2>().0.iter().map(|&[min, max]| {
        // Widening keeps no NaN's bits that matter here: both ends must be the one that is written.
        let written = |v: f32| if v.to_bits() == f32::NAN.to_bits() { f64::NAN } else { f64::from(v) };
        range(written(min), written(max))
    });
    let ranges = ranges.collect::<Result<Vec<_>>>()?;
    match axis[..] {
        [axis, ragged @ (0 | 1)] if ragged == 0 || ranges.is_empty() => {
            let axis = isize::try_from(axis).map_err(|_| damaged(format!("{axis} is no axis")))?;
            Ok(Channels { axis, ragged: ragged == 1, ranges })
        }
        _ => Err(damaged("an axis of channels cannot be read")),
    }
}

/// Ascending numbers as ranges: `0-55,57`.
fn print_ran(ran: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for &index in ran {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(index) => *last = index,
            _ => parts.push((index, index)),
        }
    }
    let part = |&(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

fn parse_ran(text: &str) -> Result<Vec<u32>> {
    /// More than would fit into memory with what is kept of each.
    const MOST: u32 = 1 << 28;
    let mut ran: Vec<u32> = Vec::new();
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let ends = first.parse::<u32>().ok().zip(last.parse::<u32>().ok());
        let Some((first, last)) = ends.filter(|&(first, last)| first <= last && last - first < MOST) else {
            return Err(damaged(format!("\"{part}\" does not name samples")));
        };
        if ran.last().is_some_and(|&before| before >= first) || ran.len() > MOST as usize {
            return Err(damaged("its samples are not in order"));
        }
        ran.extend(first..=last);
    }
    Ok(ran)
}
