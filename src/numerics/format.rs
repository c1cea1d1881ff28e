//! The number formats that a tensor can be quantized to.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number format of a quantized tensor, named as in ONNX, in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// −2…1, four to a byte.
    Int2,
    /// 0…3, four to a byte.
    Uint2,
    /// −8…7, two to a byte.
    Int4,
    /// 0…15, two to a byte.
    Uint4,
    /// −128…127.
    Int8,
    /// 0…255.
    Uint8,
    /// −32768…32767.
    Int16,
    /// 0…65535.
    Uint16,
    /// Biases, whose scale follows from the input's and the weight's.
    Int32,
    /// 4 exponent bits, 3 mantissa bits, no infinities; largest 448.
    Float8e4m3fn,
    /// 4 exponent bits, 3 mantissa bits, no infinities, no negative zero; largest 240.
    Float8e4m3fnuz,
    /// 5 exponent bits, 2 mantissa bits, as IEEE; largest 57344.
    Float8e5m2,
    /// 5 exponent bits, 2 mantissa bits, no infinities, no negative zero; largest 57344.
    Float8e5m2fnuz,
    /// 2 exponent bits, 1 mantissa bit, finite only; largest 6; two to a byte.
    Float4e2m1,
    /// 2 exponent bits, 3 mantissa bits, finite only; largest 7.5; four in three bytes.
    Float6e2m3,
    /// 3 exponent bits, 2 mantissa bits, finite only; largest 28; four in three bytes.
    Float6e3m2,
}

impl Format {
    /// Every format, in declaration order.
    pub const ALL: [Self; 16] = [
        Self::Int2,
        Self::Uint2,
        Self::Int4,
        Self::Uint4,
        Self::Int8,
        Self::Uint8,
        Self::Int16,
        Self::Uint16,
        Self::Int32,
        Self::Float8e4m3fn,
        Self::Float8e4m3fnuz,
        Self::Float8e5m2,
        Self::Float8e5m2fnuz,
        Self::Float4e2m1,
        Self::Float6e2m3,
        Self::Float6e3m2,
    ];

    /// The ONNX type name in lower case: `int8`, `float8e4m3fn`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int2 => "int2",
            Self::Uint2 => "uint2",
            Self::Int4 => "int4",
            Self::Uint4 => "uint4",
            Self::Int8 => "int8",
            Self::Uint8 => "uint8",
            Self::Int16 => "int16",
            Self::Uint16 => "uint16",
            Self::Int32 => "int32",
            Self::Float8e4m3fn => "float8e4m3fn",
            Self::Float8e4m3fnuz => "float8e4m3fnuz",
            Self::Float8e5m2 => "float8e5m2",
            Self::Float8e5m2fnuz => "float8e5m2fnuz",
            Self::Float4e2m1 => "float4e2m1",
            Self::Float6e2m3 => "float6e2m3",
            Self::Float6e3m2 => "float6e3m2",
        }
    }

    /// The format with this [`name`](Self::name).
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Bits of one element when packed: 2, 4, 6, 8, 16 or 32.
    pub fn bits(self) -> usize {
        match self {
            Self::Int2 | Self::Uint2 => 2,
            Self::Int4 | Self::Uint4 | Self::Float4e2m1 => 4,
            Self::Float6e2m3 | Self::Float6e3m2 => 6,
            Self::Int16 | Self::Uint16 => 16,
            Self::Int32 => 32,
            _ => 8,
        }
    }

    /// Whether codes are integers (else they are bit patterns of a small float).
    pub fn is_integer(self) -> bool {
        self.float().is_none()
    }

    /// Whether negative numbers exist: true for every float.
    pub fn is_signed(self) -> bool {
        !matches!(self, Self::Uint2 | Self::Uint4 | Self::Uint8 | Self::Uint16)
    }

    /// Smallest and largest code. A float's codes are its bit patterns, so `(0, 15)`, `(0, 63)` or `(0, 255)`.
    pub fn range(self) -> (i32, i32) {
        if self == Self::Int32 {
            return (i32::MIN, i32::MAX);
        }
        let codes = 1 << self.bits();
        if self.is_integer() && self.is_signed() { (-codes / 2, codes / 2 - 1) } else { (0, codes - 1) }
    }

    /// The largest finite magnitude: 128 for `int8`, 448 for `float8e4m3fn`.
    pub fn max_value(self) -> f32 {
        let (qmin, qmax) = self.range();
        self.float().map_or_else(|| (qmin.unsigned_abs().max(qmax.unsigned_abs())) as f32, |float| float.max)
    }

    /// The code nearest to `x`: for integers `rne(x)` saturated, NaN becoming the smallest code; for floats the bit pattern,
    /// ties to the even mantissa, infinities and whatever is too large saturated to [`max_value`](Self::max_value), NaN
    /// kept where the format has one and otherwise 0.
    ///
    /// As ONNX QuantizeLinear-25 with `saturate = 1` and scale 1.
    pub fn encode(self, x: f32) -> i32 {
        match self.float() {
            Some(float) => float.encode(x),
            None => super::quantize_value(x, 1.0, 0, self, super::Round::HalfEven),
        }
    }

    /// The number that `code` stands for; bits above [`bits`](Self::bits) are ignored for floats.
    pub fn decode(self, code: i32) -> f32 {
        self.float().map_or_else(|| code as f32, |float| float.decode(code as u8))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
