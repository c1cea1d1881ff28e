//! `Div` that divides. tract multiplies by the reciprocal, which gives another last bit, and then quantizers that are spelled
//! out in operators another code.

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;
use tract_onnx::pb::NodeProto;

use super::native::{Known, Native, call, floats, need};
use super::operators::Built;
use crate::passes::support::evaluate::sources;

/// A `Div` of float tensors.
pub(crate) const DIVIDE: &str = "amax.Divide";

#[derive(Debug)]
struct Divide;

pub(super) fn build(node: &NodeProto) -> Built {
    call(node, Divide)
}

impl Native for Divide {
    fn name(&self) -> &'static str {
        "Div"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        let shape = tract_core::broadcast::multi_broadcast(&[&a.shape, &b.shape])?;
        Ok(vec![(a.dtype, shape.to_vec())])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        let shape = tract_core::broadcast::multi_broadcast(&[a.shape(), b.shape()])?;
        // Halves are exact in float32, and so rounded once.
        let (x, y) = (floats(a)?, floats(b)?);
        let quotients: Vec<f32> = if let [divisor] = *y {
            x.iter().map(|x| x / divisor).collect()
        } else {
            let (at, bt) = (sources(a.shape(), &shape), sources(b.shape(), &shape));
            at.iter().zip(&bt).map(|(&i, &j)| x[i] / y[j]).collect()
        };
        let made = Tensor::from_shape(&shape, &quotients)?;
        Ok(vec![made.cast_to_dt(a.datum_type())?.into_owned()])
    }
}
