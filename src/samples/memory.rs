//! Arrays in memory, as samples.

use half::{bf16, f16};
use ndarray::{ArrayBase, Data, Dimension};

use crate::ir::Tensor;
use crate::onnx::DataType;

/// An array that samples are made of: an `ndarray` array, or a view of one, of any number of axes.
#[derive(Clone, Debug)]
pub struct Values(pub(super) Tensor);

/// A type of elements that arrays of samples may have.
pub trait Element: Copy + sealed::Bytes {}

mod sealed {
    use crate::onnx::DataType;

    /// How elements lie in a tensor.
    pub trait Bytes {
        /// Their type there.
        const DTYPE: DataType;

        /// Appends one, in little-endian bytes.
        fn push(self, bytes: &mut Vec<u8>);
    }
}

macro_rules! elements {
    ($($element:ty, $dtype:ident, |$value:ident| $bytes:expr;)*) => {$(
        impl Element for $element {}

        impl sealed::Bytes for $element {
            const DTYPE: DataType = DataType::$dtype;

            fn push(self, bytes: &mut Vec<u8>) {
                let $value = self;
                bytes.extend_from_slice(&$bytes);
            }
        }
    )*};
}

elements! {
    f32, Float, |v| v.to_le_bytes();
    f64, Double, |v| v.to_le_bytes();
    f16, Float16, |v| v.to_le_bytes();
    bf16, Bfloat16, |v| v.to_le_bytes();
    i8, Int8, |v| v.to_le_bytes();
    i16, Int16, |v| v.to_le_bytes();
    i32, Int32, |v| v.to_le_bytes();
    i64, Int64, |v| v.to_le_bytes();
    u8, Uint8, |v| [v];
    u16, Uint16, |v| v.to_le_bytes();
    u32, Uint32, |v| v.to_le_bytes();
    u64, Uint64, |v| v.to_le_bytes();
    bool, Bool, |v| [u8::from(v)];
}

impl<A: Element, S: Data<Elem = A>, D: Dimension> From<&ArrayBase<S, D>> for Values {
    fn from(array: &ArrayBase<S, D>) -> Self {
        let mut bytes = Vec::with_capacity(array.len() * size_of::<A>());
        array.iter().for_each(|element| element.push(&mut bytes));
        Self(Tensor::new(A::DTYPE, array.shape(), bytes))
    }
}

impl<A: Element, S: Data<Elem = A>, D: Dimension> From<ArrayBase<S, D>> for Values {
    fn from(array: ArrayBase<S, D>) -> Self {
        Self::from(&array)
    }
}
