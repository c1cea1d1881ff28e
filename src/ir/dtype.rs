//! Which quantized format an ONNX element type stores.

use crate::numerics::{Format, Minifloat};
use crate::onnx::DataType;

impl DataType {
    /// The format stored in this type, if it is one that quantizers produce.
    #[must_use]
    pub fn format(self) -> Option<Format> {
        Format::ALL.into_iter().find(|&format| Self::from(format) == self)
    }

    /// The layout of a float with a sign and at most 8 bits; `None` for all other types.
    #[must_use]
    pub fn minifloat(self) -> Option<Minifloat> {
        self.format().and_then(Format::float)
    }
}

impl From<Format> for DataType {
    /// The ONNX element type that stores a format.
    fn from(format: Format) -> Self {
        match format {
            Format::Int2 => Self::Int2,
            Format::Uint2 => Self::Uint2,
            Format::Int4 => Self::Int4,
            Format::Uint4 => Self::Uint4,
            Format::Int8 => Self::Int8,
            Format::Uint8 => Self::Uint8,
            Format::Int16 => Self::Int16,
            Format::Uint16 => Self::Uint16,
            Format::Int32 => Self::Int32,
            Format::Float8e4m3fn => Self::Float8e4m3fn,
            Format::Float8e4m3fnuz => Self::Float8e4m3fnuz,
            Format::Float8e5m2 => Self::Float8e5m2,
            Format::Float8e5m2fnuz => Self::Float8e5m2fnuz,
            Format::Float4e2m1 => Self::Float4e2m1,
            Format::Float6e2m3 => Self::Float6e2m3,
            Format::Float6e3m2 => Self::Float6e3m2,
        }
    }
}
