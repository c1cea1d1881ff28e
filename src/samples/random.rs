//! Random samples from a seed: enough to try a pipeline, not to measure accuracy.

use std::collections::BTreeMap;

use super::inputs::{Dim, Input};
use crate::error::{Error, Kind, Result};
use crate::ir::Tensor;
use crate::machine;
use crate::onnx::DataType;

/// Size of a free dimension that is not a batch.
const FREE: usize = 8;
/// Size of a free dimension of an image.
const FREE_IMAGE: usize = 64;

/// The shape of each input that has no default; see [`super::SampleSet::random`].
pub(super) fn shapes(inputs: &[Input]) -> Result<Vec<(Input, DataType, Vec<usize>)>> {
    let mut sizes: BTreeMap<String, usize> = BTreeMap::new();
    let mut shapes = Vec::new();
    for input in inputs.iter().filter(|i| i.required) {
        let fail = |message: &str| {
            Err(Error::new(Kind::Samples, message).at_value(&input.name).with_hint("give real samples with --calib"))
        };
        let Some(dtype) = input.dtype else { return fail("the model does not declare the type of this input") };
        if generate(dtype, 0, &mut Random::new(0, 0, 0)).is_none() {
            return fail(&format!("cannot make up values of type {dtype}"));
        }
        let Some(dims) = &input.dims else { return fail("the model does not declare how many axes this input has") };
        let mut shape = Vec::new();
        for (axis, dim) in dims.iter().enumerate() {
            let guess = match axis {
                0 => 1,
                2.. if dims.len() >= 4 && dtype.is_float() => FREE_IMAGE,
                _ => FREE,
            };
            shape.push(match dim {
                Dim::Fixed(size) => *size,
                Dim::Free(name) if name.is_empty() => guess,
                Dim::Free(name) => *sizes.entry(name.clone()).or_insert(guess),
            });
        }
        let bytes = shape.iter().try_fold(8u64, |n, &d| n.checked_mul(d as u64)).unwrap_or(u64::MAX);
        if bytes >= machine::memory() {
            return fail(&format!("a sample of shape {shape:?} does not fit into memory"));
        }
        shapes.push((input.clone(), dtype, shape));
    }
    Ok(shapes)
}

/// The value of input number `input` in sample `index`.
pub(super) fn tensor(dtype: DataType, shape: &[usize], seed: u64, index: usize, input: usize) -> Option<Tensor> {
    let bytes = generate(dtype, shape.iter().product(), &mut Random::new(seed, index as u64, input as u64))?;
    Some(Tensor::new(dtype, shape, bytes))
}

fn generate(dtype: DataType, count: usize, random: &mut Random) -> Option<Vec<u8>> {
    use DataType::{Bfloat16, Bool, Double, Float, Float16, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
    let numbers = 0..count;
    Some(match dtype {
        Float => numbers.flat_map(|_| (random.normal() as f32).to_le_bytes()).collect(),
        Double => numbers.flat_map(|_| random.normal().to_le_bytes()).collect(),
        Float16 => numbers.flat_map(|_| half::f16::from_f64(random.normal()).to_le_bytes()).collect(),
        Bfloat16 => numbers.flat_map(|_| half::bf16::from_f64(random.normal()).to_le_bytes()).collect(),
        Bool => numbers.map(|_| (random.next() >> 63) as u8).collect(),
        Int8 | Uint8 | Int16 | Uint16 | Int32 | Uint32 | Int64 | Uint64 => {
            let width = dtype.bits()? / 8;
            numbers.flat_map(|_| (random.next() >> 61).to_le_bytes().into_iter().take(width)).collect()
        }
        _ => return None,
    })
}

/// `SplitMix64` (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn new(seed: u64, sample: u64, input: u64) -> Self {
        let mut random = Self(seed);
        for part in [sample, input] {
            random.0 = random.next() ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The sum of twelve uniform numbers less six: mean 0, variance 1, almost normal, and free of `ln` and `cos`,
    /// whose last bits differ between systems.
    fn normal(&mut self) -> f64 {
        let halves = (0..6).map(|_| {
            let bits = self.next();
            (bits >> 32) + (bits & 0xffff_ffff)
        });
        halves.sum::<u64>() as f64 / (1u64 << 32) as f64 - 6.0
    }
}
