//! How numbers are computed: whose arithmetic, in which precision, rounded how.

use serde::{Deserialize, Serialize};

/// Whose arithmetic makes scales and codes, to the last bit. They differ where a quotient is almost between two codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Arithmetic {
    /// ONNX `QuantizeLinear`: the value divided by the scale. Scales as onnxruntime's tools make them or, with `eps`, torch.
    #[default]
    Onnx,
    /// torchao: scales in float32, the value times the reciprocal of the scale.
    Torch,
    /// onnxruntime's `MatMulNBitsQuantizer` for `MatMulNBits`: the reciprocal, the zero point added before rounding half away.
    Mlas,
    /// The same for DequantizeLinear: the zero point is added after rounding.
    MlasQdq,
    /// torchao's int4 weight-only: groups need not contain zero, and zero points lie between codes, which among forms only
    /// `matmulnbits` has.
    Tinygemm,
    /// The same as torchao's newer kernels have it: `eps` is the least range instead of the least scale.
    Mslk,
}

/// The precision in which scale and zero point are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Precision {
    /// f64, and the scale rounded last: onnxruntime's.
    Double,
    /// f32, every step of it: torch's. Scales of asymmetric ranges may differ in the last bit.
    Single,
    /// As `Single`, zero points rounded half away from zero; a range without width has the scale 0, or −0 where its sign is
    /// free: that of MLAS, which onnxruntime quantizes `MatMulNBits` with.
    Mlas,
}

/// How a value becomes a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Coding {
    /// `round(x / s) + z`: ONNX.
    Divided(Round),
    /// `rne(x · (1 / s)) + z`: torch.
    Reciprocal,
    /// `away(x · (1 / s) + z)`: MLAS, packing for `MatMulNBits`. Half goes away from zero, and zero is the lowest code of the
    /// format.
    MlasSum,
    /// `away(x · (1 / s)) + z`: MLAS, packing for `DequantizeLinear`.
    MlasQuotient,
}

impl Arithmetic {
    /// Whether zero points lie between codes.
    #[must_use]
    pub fn is_between(self) -> bool {
        matches!(self, Self::Tinygemm | Self::Mslk)
    }

    /// How scales are computed. With a least scale, which torch always has, ONNX's are torch's too.
    #[must_use]
    pub fn precision(self, eps: f32) -> Precision {
        match self {
            Self::Onnx if eps > 0.0 => Precision::Single,
            Self::Onnx => Precision::Double,
            Self::Torch | Self::Tinygemm | Self::Mslk => Precision::Single,
            Self::Mlas | Self::MlasQdq => Precision::Mlas,
        }
    }

    /// How values become codes; only ONNX's has a choice of roundings.
    #[must_use]
    pub fn coding(self, round: Round) -> Coding {
        match self {
            Self::Onnx | Self::Tinygemm | Self::Mslk => Coding::Divided(round),
            Self::Torch => Coding::Reciprocal,
            Self::Mlas => Coding::MlasSum,
            Self::MlasQdq => Coding::MlasQuotient,
        }
    }
}

/// How a quotient becomes an integer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Round {
    /// To the nearest, half to even: what ONNX `QuantizeLinear` does.
    #[default]
    HalfEven,
    /// To the nearest, half away from zero.
    HalfAway,
    /// Towards −∞.
    Floor,
}

/// How the power of two of a block follows from its largest magnitude, amax.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum MxRounding {
    /// 2^(⌊log2 amax⌋ − emax), as OCP MX 1.0 section 6.3; what is then above the largest element saturates.
    Floor,
    /// The least power of two at which amax does not saturate: 2^⌈log2(amax / MAX)⌉.
    #[default]
    Rceil,
    /// 2^(⌈log2 amax⌉ − emax).
    Ceil,
    /// As `floor`, of amax rounded to the precision of the elements.
    Even,
}

impl MxRounding {
    /// Every way, in declaration order.
    pub const ALL: [Self; 4] = [Self::Floor, Self::Rceil, Self::Ceil, Self::Even];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Rceil => "rceil",
            Self::Ceil => "ceil",
            Self::Even => "even",
        }
    }
}
