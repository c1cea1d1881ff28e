//! How images become a model's input: a small TOML document.
//!
//! An image is decoded to 8 bits per channel, made red, green and blue or gray (transparency is ignored, 16 bits are divided
//! by 257 and rounded, gray is `(19595 R + 38470 G + 7471 B + 32768) / 65536` rounded down), resized, padded and cut, all in
//! 8 bits. Element `v` of channel `c` then becomes `(v · scale − mean[c]) / std[c]`, computed in f64 and rounded once to
//! the type of the input; integer inputs take `v` itself. The orientation in EXIF is ignored.
//!
//! Where the size follows from the image, its other side is cut to whole pixels; the smaller image inside a letterbox has
//! its sides rounded, halves to even; what is left over around it, and what a crop takes away, is split evenly, with the
//! odd pixel of a letterbox at the right and bottom and that of a crop where halves round to even.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::convert::push_float;
use super::inputs::{Dim, Input, names};
use super::resample::{Filter, Pixels, resize};
use crate::document;
use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;
use crate::nearest::nearest;
use crate::onnx::DataType;

/// The document's name in a folder of images.
pub(super) const FILE: &str = "preprocess.toml";

/// The document as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    input: Option<String>,
    color: Option<Color>,
    resize: Option<Resize>,
    #[serde(default)]
    interpolation: Filter,
    #[serde(default = "yes")]
    antialias: bool,
    crop: Option<Size>,
    scale: Option<Number>,
    mean: Option<Channels>,
    std: Option<Channels>,
    layout: Option<Layout>,
    dtype: Option<Dtype>,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Color {
    Rgb,
    Bgr,
    Gray,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    size: Option<Size>,
    mode: Mode,
    /// What letterbox puts around the image.
    pad: Option<u8>,
    /// Sides are rounded to multiples of this; at least one of them remains.
    multiple: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Exact,
    Shorter,
    Longer,
    Height,
    Letterbox,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged, expecting = "a size is a number of pixels, or [height, width]")]
enum Size {
    Square(u32),
    Sides([u32; 2]),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "a number, or a fraction such as \"1/255\"")]
enum Number {
    Float(f64),
    Integer(i64),
    Text(String),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "a number, or a list with one for each channel")]
enum Channels {
    One(Number),
    Each(Vec<Number>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Layout {
    Nchw,
    Nhwc,
    Chw,
    Hwc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    Float32,
    Uint8,
}

impl Size {
    /// Height and width.
    fn sides(self) -> (usize, usize) {
        match self {
            Self::Square(side) => (side as usize, side as usize),
            Self::Sides([height, width]) => (height as usize, width as usize),
        }
    }
}

impl Number {
    fn value(&self) -> Option<f64> {
        let value = match self {
            Self::Float(value) => *value,
            Self::Integer(value) => *value as f64,
            Self::Text(text) => {
                let (above, below) = text.split_once('/').unwrap_or((text, "1"));
                above.trim().parse::<f64>().ok()? / below.trim().parse::<f64>().ok()?
            }
        };
        value.is_finite().then_some(value)
    }
}

impl Layout {
    fn name(self) -> &'static str {
        match self {
            Self::Nchw => "NCHW",
            Self::Nhwc => "NHWC",
            Self::Chw => "CHW",
            Self::Hwc => "HWC",
        }
    }

    /// The positions of height and width, and whether channels come before them.
    fn axes(self) -> (usize, usize, bool) {
        match self {
            Self::Nchw => (2, 3, true),
            Self::Nhwc => (1, 2, false),
            Self::Chw => (1, 2, true),
            Self::Hwc => (0, 1, false),
        }
    }

    fn rank(self) -> usize {
        if matches!(self, Self::Nchw | Self::Nhwc) { 4 } else { 3 }
    }
}

/// What turns an image into the value of an input.
#[derive(Debug)]
pub(super) struct Preprocess {
    /// The input, by its place among the model's.
    pub(super) input: usize,
    /// The document.
    pub(super) path: PathBuf,
    wanted: Input,
    color: Color,
    resize: Option<(Mode, usize, usize)>,
    multiple: usize,
    pad: u8,
    filter: Filter,
    antialias: bool,
    crop: Option<(usize, usize)>,
    layout: Layout,
    dtype: DataType,
    /// The bytes of each pixel value in each channel.
    table: Vec<Vec<Vec<u8>>>,
}

/// An example document for a model's input, for messages.
pub(super) fn example(input: Option<&Input>) -> String {
    let sized = input.and_then(|i| i.dims.as_deref()).is_some_and(|dims| {
        let fixed = |axis: usize| matches!(dims.get(axis), Some(Dim::Fixed(_)));
        layout(dims).is_some_and(|layout| fixed(layout.axes().0) && fixed(layout.axes().1))
    });
    format!(
        "\n  resize = {{ {}mode = \"exact\" }}\n  scale  = \"1/255\"\n  mean   = [0.485, 0.456, 0.406]\n  \
         std    = [0.229, 0.224, 0.225]",
        if sized { "" } else { "size = 224, " }
    )
}

/// The input that images are most likely for: the only required one with four axes, or else with three.
pub(super) fn image_like(inputs: &[Input]) -> Option<usize> {
    [4, 3].into_iter().find_map(|rank| {
        let fits = |input: &Input| input.required && input.dims.as_ref().is_some_and(|d| d.len() == rank);
        let mut found = (0..inputs.len()).filter(|&i| fits(&inputs[i]));
        found.next().filter(|_| found.next().is_none())
    })
}

impl Preprocess {
    /// Reads the document and takes what it leaves out from the model.
    pub(super) fn load(path: &Path, inputs: &[Input]) -> Result<Self> {
        let text = document::read(path, "preprocessing").map_err(|e| e.in_file(path))?;
        let (document, lines) = document::parse::<Document>(&text).map_err(|e| e.in_file(path))?;
        Self::new(path, document, inputs).map_err(|(key, error)| {
            let error = error.in_file(path);
            match lines.of(key) {
                Some(line) => error.at_line(line),
                None => error,
            }
        })
    }

    fn new(path: &Path, document: Document, inputs: &[Input]) -> Result<Self, (&'static str, Error)> {
        let fail = |key: &'static str, message: String, hint: &str| {
            (key, Error::new(Kind::Config, message).with_hint(hint.to_owned()))
        };
        let input = match &document.input {
            Some(name) => inputs.iter().position(|i| i.name == *name).ok_or_else(|| {
                let hint = match nearest(name, inputs.iter().map(|i| i.name.as_str())) {
                    Some(close) => format!("did you mean \"{close}\"?"),
                    None => format!("the model's inputs are {}", names(inputs.iter())),
                };
                fail("input", format!("the model has no input \"{name}\""), &hint)
            })?,
            None => image_like(inputs).ok_or_else(|| {
                let hint = format!("set input to one of {}", names(inputs.iter()));
                fail("input", "several inputs of the model could take the images".to_owned(), &hint)
            })?,
        };
        let wanted = inputs[input].clone();
        let at = |(key, error): (&'static str, Error)| (key, error.at_value(&wanted.name));
        let dims = wanted.dims.as_deref();
        let layout = match (document.layout, dims) {
            (Some(layout), Some(dims)) if layout.rank() != dims.len() => {
                let message = format!("the layout has {} axes, but the input has {}", layout.rank(), dims.len());
                return Err(at(fail("layout", message, "layouts are NCHW, NHWC, CHW, HWC")));
            }
            (Some(layout), _) => layout,
            (None, Some(dims)) => layout(dims).ok_or_else(|| {
                at(fail("layout", "the model's input does not look like an image".to_owned(), "set input or layout"))
            })?,
            (None, None) => Layout::Nchw,
        };
        let (row, column, first) = layout.axes();
        let channel = if first { row - 1 } else { column + 1 };
        let fixed = |axis: usize| match dims.and_then(|d| d.get(axis)) {
            Some(Dim::Fixed(size)) => Some(*size),
            _ => None,
        };
        let color = match (document.color, fixed(channel)) {
            (None, None | Some(3)) => Color::Rgb,
            (None, Some(1)) | (Some(Color::Gray), None | Some(1)) => Color::Gray,
            (Some(color @ (Color::Rgb | Color::Bgr)), None | Some(3)) => color,
            (_, Some(count)) => {
                let message = format!("the model takes images of {count} channels in layout {}", layout.name());
                return Err(at(fail("color", message, "rgb and bgr have 3 channels, gray has 1; set color or layout")));
            }
        };
        let positive = |key, size: (usize, usize)| {
            if size.0 > 0 && size.1 > 0 && size.0.max(size.1) <= 1 << 16 {
                Ok(size)
            } else {
                Err(at(fail(key, "a size must be 1 to 65536 pixels".to_owned(), "give a number, or [height, width]")))
            }
        };
        let resize = match document.resize {
            None => None,
            Some(Resize { mode, size, .. }) => {
                let model = fixed(row).zip(fixed(column));
                let size = match (size.map(Size::sides), mode, fixed(row)) {
                    (Some(size), ..) => size,
                    (None, Mode::Exact | Mode::Letterbox, _) if model.is_some() => model.unwrap_or_default(),
                    (None, Mode::Height, Some(height)) => (height, height),
                    _ => {
                        let message = "the size to resize to is missing, and the model has no fixed size".to_owned();
                        return Err(at(fail("resize", message, "set size in resize")));
                    }
                };
                let size = positive("resize", size)?;
                if size.0 != size.1 && matches!(mode, Mode::Shorter | Mode::Longer | Mode::Height) {
                    let message = "this mode takes one size; the other follows from the image".to_owned();
                    return Err(at(fail("resize", message, "give size as one number")));
                }
                Some((mode, size.0, size.1))
            }
        };
        let pad = document.resize.and_then(|r| r.pad);
        if pad.is_some() && !resize.is_some_and(|(mode, ..)| mode == Mode::Letterbox) {
            return Err(at(fail("resize.pad", "only letterbox pads".to_owned(), "remove pad")));
        }
        let multiple = document.resize.and_then(|r| r.multiple);
        let sized = resize.is_some_and(|(mode, ..)| matches!(mode, Mode::Exact | Mode::Letterbox));
        if multiple == Some(0) || (multiple.is_some() && sized) {
            let message = "multiple is a number of pixels, for modes whose size follows from the image".to_owned();
            return Err(at(fail("resize.multiple", message, "remove multiple")));
        }
        let crop = document.crop.map(|size| positive("crop", size.sides())).transpose()?;
        let dtype = wanted.dtype.unwrap_or(match document.dtype {
            Some(Dtype::Uint8) => DataType::Uint8,
            _ => DataType::Float,
        });
        let raw = match (document.dtype, dtype) {
            (None | Some(Dtype::Float32), _) if dtype.is_float() => false,
            (None | Some(Dtype::Uint8), DataType::Uint8 | DataType::Int32 | DataType::Int64) => true,
            _ => {
                let message =
                    format!("the input takes {dtype}, which is not the dtype given here, or not a type for images");
                let hint =
                    if dtype.is_float() { "for unscaled pixels as floats set scale = 1" } else { "remove dtype" };
                return Err(at(fail("dtype", message, hint)));
            }
        };
        let count = if color == Color::Gray { 1 } else { 3 };
        let table = if raw {
            for (key, given) in [
                ("scale", document.scale.is_some()),
                ("mean", document.mean.is_some()),
                ("std", document.std.is_some()),
            ] {
                if given {
                    let message = format!("the model takes pixels as they are ({dtype}), without {key}");
                    return Err(at(fail(key, message, "remove this key")));
                }
            }
            let width = dtype.bits().unwrap_or(8) / 8;
            vec![(0..=255u64).map(|v| v.to_le_bytes()[..width].to_vec()).collect(); count]
        } else {
            let channels = |key: &'static str, given: Option<&Channels>, default: f64| {
                let bad = || {
                    let message = format!("{key} is a number, or a list of {count}, in the order of the channels");
                    at(fail(key, message, "fractions are written \"1/255\""))
                };
                let values: Option<Vec<f64>> = match given {
                    None => Some(vec![default; count]),
                    Some(Channels::One(number)) => number.value().map(|v| vec![v; count]),
                    Some(Channels::Each(numbers)) => numbers.iter().map(Number::value).collect(),
                };
                values.filter(|v| v.len() == count).ok_or_else(bad)
            };
            let scale = channels("scale", document.scale.map(Channels::One).as_ref(), 1.0 / 255.0)?;
            let mean = channels("mean", document.mean.as_ref(), 0.0)?;
            let std = channels("std", document.std.as_ref(), 1.0)?;
            if std.contains(&0.0) {
                return Err(at(fail(
                    "std",
                    "std is 0, but values are divided by it".to_owned(),
                    "leave std out to divide by 1",
                )));
            }
            let encoded = |channel: usize, value: u8| {
                let mut bytes = Vec::new();
                push_float((f64::from(value) * scale[channel] - mean[channel]) / std[channel], dtype, &mut bytes);
                bytes
            };
            (0..count).map(|c| (0..=255).map(|v| encoded(c, v)).collect()).collect()
        };
        Ok(Self {
            input,
            path: path.to_owned(),
            wanted: wanted.clone(),
            color,
            resize,
            multiple: multiple.unwrap_or(1),
            pad: pad.unwrap_or(114),
            filter: document.interpolation,
            antialias: document.antialias,
            crop,
            layout,
            dtype,
            table,
        })
    }

    /// Whether images are reduced to one channel.
    pub(super) fn is_gray(&self) -> bool {
        self.color == Color::Gray
    }

    /// Height and width of the image before and after padding.
    fn sides(&self, height: usize, width: usize) -> ((usize, usize), (usize, usize)) {
        let Some((mode, high, wide)) = self.resize else { return ((height, width), (height, width)) };
        // The longer side is cut, not rounded, as torchvision does.
        let scaled = |side: usize, by: usize, from: usize| ((side * by) / from).max(1);
        let to_height = (high, scaled(width, high, height));
        let to_width = (scaled(height, wide, width), wide);
        let step = self.multiple;
        let round = |side: usize| if step == 1 { side } else { ((side + step / 2) / step).max(1) * step };
        let free = |(high, wide): (usize, usize)| ((round(high), round(wide)), (round(high), round(wide)));
        match mode {
            Mode::Exact => ((high, wide), (high, wide)),
            Mode::Shorter if height <= width => free(to_height),
            Mode::Longer if height >= width => free(to_height),
            Mode::Shorter | Mode::Longer => free(to_width),
            Mode::Height => free(to_height),
            Mode::Letterbox => {
                let ratio = (high as f64 / height as f64).min(wide as f64 / width as f64);
                let side =
                    |side: usize, limit: usize| ((side as f64 * ratio).round_ties_even() as usize).clamp(1, limit);
                ((side(height, high), side(width, wide)), (high, wide))
            }
        }
    }

    /// The shape of the input's value for an image of this size, checked against the model.
    pub(super) fn shape(&self, height: usize, width: usize) -> Result<Vec<usize>> {
        let (_, (high, wide)) = self.sides(height, width);
        if high.saturating_mul(wide) > 1 << 28 {
            let message = format!("an image of {height} by {width} pixels would be resized to {high} by {wide}");
            return Err(Error::new(Kind::Samples, message).with_hint("crop it before, or use another mode of resize"));
        }
        let (high, wide) = match self.crop {
            Some((h, w)) if h > high || w > wide => {
                let message = format!("the image is {high} by {wide} pixels, too small for a crop of {h} by {w}");
                let hint = format!("set resize in {}, or a smaller crop", self.path.display());
                return Err(Error::new(Kind::Samples, message).with_hint(hint));
            }
            Some(size) => size,
            None => (high, wide),
        };
        let channels = self.table.len();
        let shape = match self.layout {
            Layout::Nchw => vec![1, channels, high, wide],
            Layout::Nhwc => vec![1, high, wide, channels],
            Layout::Chw => vec![channels, high, wide],
            Layout::Hwc => vec![high, wide, channels],
        };
        if self.wanted.fit(&shape, false).is_ok() {
            return Ok(shape);
        }
        let message = format!("the input takes {}, but preprocessing gives {shape:?}", self.wanted.shape_text(None));
        let hint = match self.wanted.dims.as_ref().and_then(|d| d.first()) {
            Some(Dim::Fixed(count)) if *count > 1 && self.layout.rank() == 4 => {
                "the model takes several images at once: export it with a batch of 1, or stack them in a .npz"
                    .to_owned()
            }
            _ => format!("set resize and crop in {}", self.path.display()),
        };
        Err(Error::new(Kind::Samples, message).at_value(&self.wanted.name).with_hint(hint))
    }

    /// The value of the input: red, green and blue pixels, or gray ones, resized, padded, cut, scaled and laid out.
    pub(super) fn apply(&self, pixels: Pixels) -> Result<Tensor> {
        let shape = self.shape(pixels.height, pixels.width)?;
        let ((high, wide), (outer_high, outer_wide)) = self.sides(pixels.height, pixels.width);
        let mut pixels = resize(pixels, wide, high, self.filter, self.antialias);
        if (high, wide) != (outer_high, outer_wide) {
            pixels = framed(&pixels, outer_high, outer_wide, self.pad);
        }
        let (row, column, channels_first) = self.layout.axes();
        let (high, wide) = (shape[row], shape[column]);
        // Python's rounding, as in torchvision's CenterCrop.
        let start = |from: usize, to: usize| ((from - to) as f64 / 2.0).round_ties_even() as usize;
        let (top, left) = (start(pixels.height, high), start(pixels.width, wide));
        let channels = self.table.len();
        let source = |channel: usize| if self.color == Color::Bgr { 2 - channel } else { channel };
        let pixel = |y: usize, x: usize, channel: usize| {
            let at = ((top + y) * pixels.width + left + x) * channels + source(channel);
            self.table[channel][usize::from(pixels.bytes[at])].as_slice()
        };
        let mut bytes = Vec::with_capacity(high * wide * channels * self.dtype.bits().unwrap_or(8) / 8);
        if channels_first {
            for channel in 0..channels {
                for y in 0..high {
                    (0..wide).for_each(|x| bytes.extend_from_slice(pixel(y, x, channel)));
                }
            }
        } else {
            for y in 0..high {
                for x in 0..wide {
                    (0..channels).for_each(|channel| bytes.extend_from_slice(pixel(y, x, channel)));
                }
            }
        }
        Ok(Tensor::new(self.dtype, &shape, bytes))
    }
}

/// The layout that an input's shape suggests.
fn layout(dims: &[Dim]) -> Option<Layout> {
    let colors = |dim: &Dim| matches!(dim, Dim::Fixed(1 | 3));
    match dims {
        [_, c, _, _] if colors(c) => Some(Layout::Nchw),
        [_, _, _, c] if colors(c) => Some(Layout::Nhwc),
        [_, Dim::Free(_), _, _] => Some(Layout::Nchw),
        [c, _, _] if colors(c) => Some(Layout::Chw),
        [_, _, c] if colors(c) => Some(Layout::Hwc),
        _ => None,
    }
}

/// The image in the middle of a larger one; where the margin is odd, the larger part is at the right and the bottom.
fn framed(image: &Pixels, height: usize, width: usize, pad: u8) -> Pixels {
    let channels = image.channels;
    let mut bytes = vec![pad; height * width * channels];
    let (top, left) = ((height - image.height) / 2, (width - image.width) / 2);
    for (y, row) in image.bytes.chunks_exact(image.width * channels).enumerate() {
        let start = ((top + y) * width + left) * channels;
        bytes[start..start + row.len()].copy_from_slice(row);
    }
    Pixels { width, height, channels, bytes }
}
