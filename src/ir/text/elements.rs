//! Elements of tensors: raw bytes to codes and back, and what the codes of small floats mean.

use crate::numerics::decode_float8e8m0;
use crate::onnx::DataType;

/// Bits of one entry of a tensor's text: an element, or one half of a complex element.
pub(super) fn entry_bits(dtype: DataType) -> Option<usize> {
    match dtype {
        DataType::Complex64 | DataType::Complex128 => dtype.bits().map(|b| b / 2),
        _ => dtype.bits(),
    }
}

/// Entries of an element.
pub(super) fn entries_per_element(dtype: DataType) -> usize {
    if matches!(dtype, DataType::Complex64 | DataType::Complex128) { 2 } else { 1 }
}

/// `count` codes of `bits` bits each from little-endian bytes, low bits first. Missing bytes read as zero.
pub(super) fn unpack(bits: usize, raw: &[u8], count: usize) -> impl Iterator<Item = u64> + '_ {
    let byte = |at: usize| raw.get(at).copied().map_or(0, u64::from);
    (0..count).map(move |index| {
        if bits >= 8 {
            let width = bits / 8;
            (0..width).fold(0, |code, i| code | byte(index * width + i) << (8 * i))
        } else {
            let (at, shift) = (index * bits / 8, index * bits % 8);
            ((byte(at) | byte(at + 1) << 8) >> shift) & ((1 << bits) - 1)
        }
    })
}

/// The inverse of [`unpack`].
pub(super) fn pack(bits: usize, codes: &[u64]) -> Vec<u8> {
    if bits >= 8 {
        return codes.iter().flat_map(|c| c.to_le_bytes().into_iter().take(bits / 8)).collect();
    }
    let mut raw = vec![0; (codes.len() * bits).div_ceil(8)];
    for (index, &code) in codes.iter().enumerate() {
        let (at, shift) = (index * bits / 8, index * bits % 8);
        let wide = (code & ((1 << bits) - 1)) << shift;
        raw[at] |= wide as u8;
        if wide > 0xff {
            raw[at + 1] |= (wide >> 8) as u8;
        }
    }
    raw
}

/// Whether elements are integers with a sign.
pub(super) fn is_signed(dtype: DataType) -> bool {
    matches!(
        dtype,
        DataType::Int2 | DataType::Int4 | DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64
    )
}

/// Whether elements are floats that are written as codes.
pub(super) fn is_small_float(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float16 | DataType::Bfloat16)
        || dtype == DataType::Float8e8m0
        || dtype.minifloat().is_some()
}

/// The signed integer that the low `bits` bits of `code` are.
pub(super) fn sign_extend(bits: usize, code: u64) -> i64 {
    let shift = 64 - bits as u32;
    ((code << shift) as i64) >> shift
}

/// The value of a code of a small float; every one is exact in f32. `None` for other types.
pub(super) fn decode(dtype: DataType, code: u64) -> Option<f32> {
    match dtype {
        DataType::Float16 => Some(half::f16::from_bits(code as u16).to_f32()),
        DataType::Bfloat16 => Some(half::bf16::from_bits(code as u16).to_f32()),
        DataType::Float8e8m0 => Some(decode_float8e8m0(code as u8)),
        _ => dtype.minifloat().map(|float| float.decode(code as u8)),
    }
}

/// The code of `value`: the nearest one for 16-bit types, ties to even; for smaller types the one that is
/// `value` as an f32, or none.
pub(super) fn encode(dtype: DataType, value: f64) -> Option<u64> {
    match dtype {
        DataType::Float16 => return Some(half::f16::from_f64(value).to_bits().into()),
        DataType::Bfloat16 => return Some(half::bf16::from_f64(value).to_bits().into()),
        _ => {}
    }
    let bits = dtype.bits().filter(|_| is_small_float(dtype))?;
    let find = |fits: &dyn Fn(f32) -> bool| (0..1u64 << bits).find(|&code| decode(dtype, code).is_some_and(fits));
    let single = value as f32;
    if single.is_nan() {
        // A format with one NaN has it for either sign.
        let alike = |v: f32| v.is_nan() && v.is_sign_negative() == single.is_sign_negative();
        return find(&alike).or_else(|| find(&|v| v.is_nan()));
    }
    find(&|v| v.to_bits() == single.to_bits())
}

/// Pseudo-random entries, as codes, for an elided tensor; a function of the arguments alone.
pub(super) fn fill(dtype: DataType, name: &str, dims: &[i64], count: usize) -> Vec<u64> {
    let text = format!("{name} {dtype}{dims:?}");
    // FNV-1a, then splitmix64: both fixed for good, so that fixtures never change.
    let seed = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    (0..count as u64)
        .map(|i| {
            let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            made_up(dtype, z ^ z >> 31)
        })
        .collect()
}

fn made_up(dtype: DataType, random: u64) -> u64 {
    let unit = (random >> 40) as f32 / (1 << 23) as f32 - 1.0;
    match dtype {
        DataType::Float | DataType::Complex64 => unit.to_bits().into(),
        DataType::Double | DataType::Complex128 => ((random >> 11) as f64 / (1u64 << 52) as f64 - 1.0).to_bits(),
        DataType::Float16 => half::f16::from_f32(unit).to_bits().into(),
        DataType::Bfloat16 => half::bf16::from_f32(unit).to_bits().into(),
        DataType::Float8e8m0 => 127 - random % 9,
        DataType::Bool => random & 1,
        DataType::Int16 | DataType::Int32 | DataType::Int64 => ((random & 0xff) as i64 - 128) as u64,
        DataType::Uint16 | DataType::Uint32 | DataType::Uint64 | DataType::String => random & 0xff,
        _ => {
            let code = random & ((1 << dtype.bits().unwrap_or(8)) - 1);
            if decode(dtype, code).is_some_and(|v| !v.is_finite()) { 0 } else { code }
        }
    }
}
