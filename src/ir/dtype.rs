//! The layout of small floats.

use crate::numerics::Minifloat;
use crate::onnx::DataType;
use crate::quant::Format;

impl DataType {
    /// The layout of a float with a sign and at most 8 bits; `None` for all other types.
    #[must_use]
    pub fn minifloat(self) -> Option<Minifloat> {
        self.format().and_then(Format::float)
    }
}
