//! Resizing images with 8 bits per channel, bit for bit as Pillow does.
//!
//! Columns first, then rows, each rounded to 8 bits; a direction whose size stays is skipped. Output element `o` of `n`
//! made from `m` is centred at `c = (o + ½) · m / n`. Its weights are those of the filter at `(i + ½ − c) / s` for the
//! elements `i` within `s` times the filter's support, where `s = max(m / n, 1)`, or 1 without antialiasing. They are
//! divided by their sum in f64, so that what lies outside the image does not count, and rounded to 22 bits behind the
//! point, halves away from zero. The sum of products plus one half is shifted down and clipped to 0…255.
//!
//! `nearest` takes the element that contains `c`, where `c` is reached by adding `m / n` in f64 from element to element.

use std::f64::consts::PI;

use serde::Deserialize;

/// Bits behind the point of a weight.
const PRECISION: u32 = 32 - 8 - 2;

/// The interpolation filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Filter {
    Nearest,
    /// All elements that an output element covers, equally.
    Box,
    /// A triangle of support 1.
    #[default]
    Bilinear,
    /// Keys' cubic with a = −½, support 2.
    Bicubic,
    /// `sinc(x) sinc(x / 3)`, support 3.
    Lanczos,
}

/// Rows of interleaved pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pixels {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) channels: usize,
    /// `height` × `width` × `channels`.
    pub(super) bytes: Vec<u8>,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let distance = x.abs();
        match self {
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - distance).max(0.0),
            Self::Bicubic if distance < 1.0 => ((A + 2.0) * distance - (A + 3.0)) * distance * distance + 1.0,
            Self::Bicubic if distance < 2.0 => (((distance - 5.0) * distance + 8.0) * distance - 4.0) * A,
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Nearest | Self::Bicubic | Self::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}

/// Where the elements that make up an output element begin, and their weights.
struct Tap {
    first: usize,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Filter, antialias: bool) -> Vec<Tap> {
    let step = from as f64 / to as f64;
    if filter == Filter::Nearest {
        let mut at = step * 0.5;
        let mut taps = Vec::with_capacity(to);
        for _ in 0..to {
            taps.push(Tap { first: (at as usize).min(from - 1), weights: vec![1 << PRECISION] });
            at += step;
        }
        return taps;
    }
    let scale = if antialias { step.max(1.0) } else { 1.0 };
    let (support, inverse) = (filter.support() * scale, 1.0 / scale);
    let tap = |element: usize| {
        let centre = (element as f64 + 0.5) * step;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let last = ((centre + support + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..last)
            .map(|i| filter.weight(((i - first) as f64 + first as f64 - centre + 0.5) * inverse))
            .collect();
        let sum: f64 = weights.iter().fold(0.0, |sum, w| sum + w);
        let fixed = |weight: &f64| {
            let weight = if sum == 0.0 { *weight } else { weight / sum };
            (weight * f64::from(1 << PRECISION) + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
        };
        Tap { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(tap).collect()
}

fn clipped(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// The image at another size; neither size may be zero.
pub(super) fn resize(image: Pixels, width: usize, height: usize, filter: Filter, antialias: bool) -> Pixels {
    let image = if width == image.width { image } else { columns(&image, width, filter, antialias) };
    if height == image.height { image } else { rows(&image, height, filter, antialias) }
}

fn columns(image: &Pixels, width: usize, filter: Filter, antialias: bool) -> Pixels {
    let channels = image.channels;
    let taps = taps(image.width, width, filter, antialias);
    let mut bytes = Vec::with_capacity(image.height * width * channels);
    for row in image.bytes.chunks_exact(image.width * channels) {
        for tap in &taps {
            for channel in 0..channels {
                let elements = row[tap.first * channels + channel..].iter().step_by(channels);
                let sum = elements.zip(&tap.weights).fold(1 << (PRECISION - 1), |s, (&v, w)| s + i32::from(v) * w);
                bytes.push(clipped(sum));
            }
        }
    }
    Pixels { width, bytes, ..*image }
}

fn rows(image: &Pixels, height: usize, filter: Filter, antialias: bool) -> Pixels {
    let length = image.width * image.channels;
    let mut bytes = Vec::with_capacity(height * length);
    let mut sums = vec![0i32; length];
    for tap in taps(image.height, height, filter, antialias) {
        sums.fill(1 << (PRECISION - 1));
        for (row, weight) in image.bytes[tap.first * length..].chunks_exact(length).zip(&tap.weights) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += i32::from(value) * weight;
            }
        }
        bytes.extend(sums.iter().map(|&sum| clipped(sum)));
    }
    Pixels { height, bytes, ..*image }
}
