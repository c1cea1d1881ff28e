//! Codes to bytes and back, in the layout of ONNX `raw_data`.
//!
//! Elements follow each other in row-major order without padding between rows, the first in the low bits; the unused high
//! bits of the last byte are zero. Wider elements are little-endian.

use super::Format;

/// Bytes of `count` elements of `bits` each.
pub fn packed_len(count: usize, bits: usize) -> usize {
    match bits {
        2 => count.div_ceil(4),
        4 => count.div_ceil(2),
        6 => (count * 3).div_ceil(4),
        _ => count * (bits / 8),
    }
}

/// Packs the low `bits` bits of each code; `bits` is 2, 4, 6, 8, 16 or 32.
pub fn pack(codes: &[i32], bits: usize) -> Vec<u8> {
    match bits {
        16 => codes.iter().flat_map(|&code| (code as u16).to_le_bytes()).collect(),
        32 => codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
        _ => {
            let bytes: Vec<u8> = codes.iter().map(|&code| code as u8).collect();
            pack_bytes(&bytes, bits)
        }
    }
}

/// Packs the low `bits` bits (2, 4, 6 or 8) of each byte.
pub fn pack_bytes(codes: &[u8], bits: usize) -> Vec<u8> {
    let mut out = vec![0; packed_len(codes.len(), bits)];
    pack_bytes_into(codes, bits, &mut out);
    out
}

/// Packs the low `bits` bits (2, 4, 6 or 8) of each byte into `out`, which has exactly the packed length.
pub(super) fn pack_bytes_into(codes: &[u8], bits: usize, out: &mut [u8]) {
    match bits {
        2 => {
            for (out, four) in out.iter_mut().zip(codes.chunks(4)) {
                *out = four.iter().rev().fold(0, |byte, code| byte << 2 | code & 3);
            }
        }
        4 => {
            let (pairs, last) = codes.as_chunks::<2>();
            for (out, &pair) in out.iter_mut().zip(pairs) {
                let pair = u16::from_le_bytes(pair);
                *out = (pair & 0x0f | pair >> 4 & 0xf0) as u8;
            }
            if let ([code], Some(out)) = (last, out.last_mut()) {
                *out = code & 0x0f;
            }
        }
        6 => {
            for (out, four) in out.chunks_mut(3).zip(codes.chunks(4)) {
                let wide = four.iter().rev().fold(0, |wide, &code| wide << 6 | u32::from(code & 0x3f));
                out.iter_mut().zip(wide.to_le_bytes()).for_each(|(out, byte)| *out = byte);
            }
        }
        _ => out.copy_from_slice(codes),
    }
}

/// The first `count` codes of `raw`, sign-extended for signed integers and as bit patterns for floats; fewer if `raw` is too
/// short.
pub fn unpack(raw: &[u8], format: &Format, count: usize) -> Vec<i32> {
    let available = match format.bits() {
        bits @ (2 | 4) => raw.len().saturating_mul(8 / bits),
        6 => raw.len().saturating_mul(4) / 3,
        bits => raw.len() / (bits / 8),
    };
    let mut codes = vec![0; count.min(available)];
    unpack_into(raw, *format, &mut codes);
    codes
}

/// The first `count` codes of `bits` (2, 4 or 8) bits, one per byte, their high bits zero; fewer if `raw` is too short.
pub fn unpack_bytes(raw: &[u8], bits: usize, count: usize) -> Vec<u8> {
    let mut out: Vec<u8> = match bits {
        2 => raw.iter().flat_map(|b| [b & 3, b >> 2 & 3, b >> 4 & 3, b >> 6]).collect(),
        4 => raw.iter().flat_map(|b| [b & 15, b >> 4]).collect(),
        _ => raw.to_vec(),
    };
    out.truncate(count);
    out
}

/// Unpacks `codes.len()` elements, which `raw` must hold, from its start.
pub(super) fn unpack_into(raw: &[u8], format: Format, codes: &mut [i32]) {
    let bits = format.bits();
    let signed = format.is_integer() && format.is_signed();
    match bits {
        2 => unpack_small::<4>(raw, signed, codes),
        4 => unpack_small::<2>(raw, signed, codes),
        6 => {
            for (codes, three) in codes.chunks_mut(4).zip(raw.chunks(3)) {
                let wide = three.iter().rev().fold(0, |wide, &byte| wide << 8 | i32::from(byte));
                codes.iter_mut().enumerate().for_each(|(idx, code)| *code = wide >> (6 * idx) & 0x3f);
            }
        }
        8 => {
            for (code, &byte) in codes.iter_mut().zip(raw) {
                *code = if signed { i32::from(byte as i8) } else { i32::from(byte) };
            }
        }
        16 => {
            for (code, &bytes) in codes.iter_mut().zip(raw.as_chunks::<2>().0) {
                let value = u16::from_le_bytes(bytes);
                *code = if signed { i32::from(value as i16) } else { i32::from(value) };
            }
        }
        _ => {
            for (code, &bytes) in codes.iter_mut().zip(raw.as_chunks::<4>().0) {
                *code = i32::from_le_bytes(bytes);
            }
        }
    }
}

/// Unpacks `N` elements from each byte.
fn unpack_small<const N: usize>(raw: &[u8], signed: bool, codes: &mut [i32]) {
    let bits = 8 / N;
    // Flipping the sign bit makes a signed code an offset from the smallest one.
    let (mask, sign) = ((1 << bits) - 1, if signed { 1 << (bits - 1) } else { 0 });
    let at = |byte: u8, idx: usize| ((i32::from(byte) >> (idx * bits) & mask) ^ sign).wrapping_sub(sign);
    let (whole, rest) = codes.as_chunks_mut::<N>();
    for (codes, &byte) in whole.iter_mut().zip(raw) {
        for (idx, code) in codes.iter_mut().enumerate() {
            *code = at(byte, idx);
        }
    }
    if let Some(&byte) = raw.get(whole.len()) {
        for (idx, code) in rest.iter_mut().enumerate() {
            *code = at(byte, idx);
        }
    }
}
