//! What the bytes are: formats, rounding, scales, packing, error measures.
//!
//! Everything here sees slices, extents and [`Format`]s; nothing knows a model. All arithmetic is IEEE f32 unless said
//! otherwise, `rne` rounds half to even, and results never depend on the number of threads.
//!
//! | step | formula | where |
//! |---|---|---|
//! | quantize to integers | `q = rne(clamp(x / s, qmin − z, qmax − z)) + z`, the division as written, never `x · (1/s)` | [`quantize`] |
//! | quantize to floats | `q = cast_rne(clamp(x / s, −MAX, MAX))`, `z = 0` | [`quantize`], [`Format::encode`] |
//! | dequantize | `y = f32(q − z) · s`, the subtraction exact | [`dequantize`] |
//! | asymmetric parameters | `s = (max − min) / (qmax − qmin)` in f64, `z = clamp(rne(qmin − min / s))`, 0 in the range | [`qparams_from_range`] |
//! | symmetric parameters | `s = amax / ((qmax − qmin) / 2)`, `z = 0` signed, the middle code unsigned | [`qparams_from_range`] |
//! | codes used | all, or without the lowest (`narrow`), or half of them (`reduce`) | [`RangeSpec::codes`] |
//! | scales used | all, or powers of two, or those of float16 or bfloat16 | [`RangeSpec`] |
//! | searched ranges | of the least `Σ \|x − y\|^p`, or around a share of the values | [`mse_ranges`], [`percentile_ranges`] |
//! | float parameters | `s = amax / MAX` | [`qparams_from_range`] |
//! | power-of-two scales of blocks | `2^(⌊log2 amax⌋ − emax)` and three more | [`e8m0_scale`] |
//! | two-level scales of blocks | `s = g · e4m3(amax / (MAX · g))`, `g = amax of all / (448 · MAX)` | [`TwoLevel`] |
//! | bias | `q = clamp(rne(f64(b) / f64(s)))`, `s = s_x · s_w` | [`quantize_bias`] |
//! | pair-safe weights | `\|q[2p] + q[2p+1]\| ≤ 128`, so that `255 · (q[2p] + q[2p+1])` fits 16 bits | [`pair_safe`] |
//! | SQNR | `10 log10(Σ r² / Σ (r − t)²)` | [`metrics`] |
//!
//! Quantize, dequantize and packing are bit exact with ONNX QuantizeLinear-25, DequantizeLinear-25 and `raw_data`, in
//! the ranges below. Floats saturate (`saturate = 1`): infinities become the largest finite value.
//!
//! | format | codes | largest | notes |
//! |---|---|---|---|
//! | int2, uint2 | −2…1, 0…3 | | four to a byte, low bits first |
//! | int4, uint4 | −8…7, 0…15 | | two to a byte, low nibble first |
//! | int8, uint8 | −128…127, 0…255 | | |
//! | int16, uint16 | −32768…32767, 0…65535 | | little-endian |
//! | int32 | all | | biases; little-endian |
//! | float8e4m3fn | sign, 4, 3 | 448 | no infinities |
//! | float8e4m3fnuz | sign, 4, 3 | 240 | no infinities, no negative zero |
//! | float8e5m2 | sign, 5, 2 | 57344 | as IEEE |
//! | float8e5m2fnuz | sign, 5, 2 | 57344 | no infinities, no negative zero |
//! | float4e2m1 | sign, 2, 1 | 6 | finite only; two to a byte, low nibble first |
//! | float6e2m3 | sign, 2, 3 | 7.5 | finite only; four in three bytes, low bits first |
//! | float6e3m2 | sign, 3, 2 | 28 | finite only; four in three bytes, low bits first |

mod affine;
mod bias;
mod block_scale;
pub mod blocks;
mod fake;
mod format;
mod grid;
mod kernels;
pub mod logits;
pub mod metrics;
mod minifloat;
pub mod pack;
pub mod pair_safe;
mod permute;
mod range;
mod search;
mod wide;

pub use affine::{
    dequantize, dequantize_serial, quantize, quantize_codes, quantize_serial, quantize_value, quantize_within,
};
pub use bias::{bias_scale, quantize_bias, weight_scale_floor};
pub use block_scale::{ElementRange, MIN_BLOCK_SCALE, TwoLevel, amax, e8m0_scale, encode_float8e8m0};
pub use fake::{fake_quantize, fake_quantize_nd, fake_quantize_serial};
pub use minifloat::{Minifloat, decode_float8e8m0};
pub(crate) use permute::permuted;
pub use range::{MinMax, channel_ranges, min_max, qparams_from_range};
pub use search::{mse_ranges, percentile_ranges, squared_errors};

pub use crate::quant::{
    Coding, Format, Granularity, MxRounding, Precision, QParam, QParams, RangeSpec, Round, ScaleDtype, Symmetry,
};
