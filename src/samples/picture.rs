//! Images in files: the size is read at once, pixels on demand.

use std::io::{BufRead, Cursor, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{DynamicImage, ImageReader, Limits};

use super::preprocess::Preprocess;
use super::resample::Pixels;
use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;

/// Extensions of files that are decoded.
pub(super) const EXTENSIONS: &[&str] = &["png", "jpg", "jpeg"];

/// Decoding an image may take this much memory.
const MAX_MEMORY: u64 = 1 << 30;

/// An image and its preprocessing.
#[derive(Debug)]
pub(super) struct Picture {
    path: PathBuf,
    preprocess: Arc<Preprocess>,
    /// The shape of the input's value.
    pub(super) shape: Vec<usize>,
}

fn unreadable(path: &Path, error: impl std::fmt::Display) -> Error {
    let message = format!("the image cannot be decoded: {error}");
    let hint =
        "is the file complete? PNG and JPEG are decoded; convert other images, or take the file out of the folder";
    Error::new(Kind::Samples, message).in_file(path).with_hint(hint)
}

/// A decoder that is chosen by content, not by name, with a limit.
fn limited<R>(reader: std::io::Result<ImageReader<R>>) -> std::io::Result<ImageReader<R>>
where
    R: BufRead + Seek,
{
    let mut reader = reader?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_MEMORY);
    reader.limits(limits);
    Ok(reader)
}

/// Whether these are the first bytes of a JPEG file without its end marker (ITU-T T.81, B.1.1): decoders fill in gray.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    const START: u8 = 0xd8;
    const END: u8 = 0xd9;
    const SCAN: u8 = 0xda;
    if !bytes.starts_with(&[0xff, START]) {
        return false;
    }
    let mut at = 2;
    loop {
        // Fill bytes, and whatever does not belong there.
        while bytes.get(at).is_some_and(|&byte| byte != 0xff) || bytes.get(at + 1) == Some(&0xff) {
            at += 1;
        }
        match bytes.get(at + 1) {
            None => return true,
            Some(&END) => return false,
            // Stuffed bytes of scans, restarts, and markers without a segment.
            Some(0x00 | 0x01 | 0xd0..=START) => at += 2,
            Some(&marker) => {
                let Some(&[high, low]) = bytes.get(at + 2..at + 4).and_then(|length| length.first_chunk()) else {
                    return true;
                };
                let length = usize::from(u16::from_be_bytes([high, low]));
                at += 2 + length.max(2);
                if marker == SCAN && at > bytes.len() {
                    return true;
                }
            }
        }
    }
}

impl Picture {
    /// Reads the header of the image, and checks that the result fits the model.
    pub(super) fn open(path: &Path, preprocess: &Arc<Preprocess>) -> Result<Self> {
        let reader = limited(ImageReader::open(path).and_then(ImageReader::with_guessed_format));
        let reader = reader.map_err(|e| Error::io(Kind::Samples, "read", path, e))?;
        let (width, height) = reader.into_dimensions().map_err(|e| unreadable(path, e))?;
        if width == 0 || height == 0 {
            return Err(Error::new(Kind::Samples, "the image has no pixels").in_file(path));
        }
        let shape = preprocess.shape(height as usize, width as usize).map_err(|e| e.in_file(path))?;
        Ok(Self { path: path.to_owned(), preprocess: preprocess.clone(), shape })
    }

    /// The image, and the document that says what is made of it.
    pub(super) fn files(&self) -> [&PathBuf; 2] {
        [&self.path, &self.preprocess.path]
    }

    /// The value of the input.
    pub(super) fn read(&self) -> Result<Tensor> {
        let bytes = std::fs::read(&self.path).map_err(|e| Error::io(Kind::Samples, "read", &self.path, e))?;
        if is_cut_jpeg(&bytes) {
            return Err(unreadable(&self.path, "it ends before its last pixels"));
        }
        let reader = limited(ImageReader::new(Cursor::new(&bytes)).with_guessed_format());
        let image = reader.map_err(|e| Error::io(Kind::Samples, "read", &self.path, e))?.decode();
        let image = image.map_err(|e| unreadable(&self.path, e))?;
        let tensor =
            self.preprocess.apply(pixels(image, self.preprocess.is_gray())).map_err(|e| e.in_file(&self.path))?;
        if tensor.dims() == self.shape {
            Ok(tensor)
        } else {
            Err(Error::new(Kind::Samples, "the file changed while it was used").in_file(&self.path))
        }
    }
}

/// Red, green and blue, or gray; transparency is ignored, and 16 bits are rounded to 8.
fn pixels(image: DynamicImage, gray: bool) -> Pixels {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let is_gray = !image.color().has_color();
    let (channels, bytes) = match (gray, is_gray) {
        (true, true) => (1, image.into_luma8().into_raw()),
        (true, false) => {
            let colors = image.into_rgb8().into_raw();
            (1, colors.as_chunks::<3>().0.iter().copied().map(luma).collect())
        }
        (false, _) => (3, image.into_rgb8().into_raw()),
    };
    Pixels { width, height, channels, bytes }
}

/// ITU-R 601 in 16 bits, rounded, as Pillow's `convert("L")`.
fn luma([r, g, b]: [u8; 3]) -> u8 {
    ((u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16) as u8
}
