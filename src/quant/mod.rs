//! The words of quantization: formats, granularities, scales, and how numbers become codes.
//!
//! Nothing here computes with tensors ([`numerics`](crate::numerics) does) and nothing knows a graph. [`Scheme`] says how
//! numbers become codes; [`RangeSpec`] is what of it matters where a range becomes a scale.

pub mod algorithm;
mod arithmetic;
mod format;
mod granularity;
mod observer;
mod range;
mod scheme;
mod tensor;

pub use arithmetic::{Arithmetic, Coding, MxRounding, Precision, Round};
pub use format::{Block, Dtype, Format, ScaleDtype};
pub use granularity::{Granularity, QParam, QParams};
pub use observer::{Observer, ObserverKind, Postprocess};
pub use range::{RangeSpec, ScaleType, Symmetry};
pub use scheme::{Given, Scheme, check_least_scale, check_range};
pub use tensor::{QuantizedTensor, ZeroPoints};
