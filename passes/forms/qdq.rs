//! DequantizeLinear of a constant.

use super::{QuantizedTensor, ZeroPoints, packed};
use crate::ir::view::Quantizer;
use crate::ir::{Model, NewNode, NodeId, Tensor, ValueId};
use crate::numerics::{Granularity, pack};
use crate::onnx::DataType;
use crate::passes::support::granularity::along;
use crate::passes::support::granularity::granularity;
use crate::reason::{Operand, Reason};

/// The initializers of a DequantizeLinear, and where its scales run.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Packed codes.
    pub codes: Tensor,
    /// Scales.
    pub scale: Tensor,
    /// Zero points, always written out.
    pub zero_point: Tensor,
    /// Which codes share a scale.
    pub granularity: Granularity,
}

impl Pair {
    /// The opset that has such a DequantizeLinear, and the IR version that has its types.
    #[must_use]
    pub fn since(&self) -> (i64, i64) {
        let groups = matches!(self.granularity, Granularity::PerGroup { .. }).then_some((21, 10));
        let channels = matches!(self.granularity, Granularity::PerChannel { .. }).then_some((13, 7));
        let narrow = (self.scale.dtype() != DataType::Float).then_some((19, 9));
        let dtype = self.codes.dtype().quantizers_since();
        [groups, channels, narrow, dtype].into_iter().flatten().max().unwrap_or((10, 5))
    }

    /// Says at a DequantizeLinear where the scales run.
    #[must_use]
    pub fn describe(&self, node: NewNode) -> NewNode {
        along(node, &self.granularity)
    }
}

/// The DequantizeLinear of a constant behind a value, and whether a Transpose of a matrix stands in between.
#[must_use]
pub fn find_dequantized(model: &Model, value: ValueId) -> Option<(NodeId, bool)> {
    let (value, exchanges) = behind_exchanges(model, value);
    let node = model.producer(value).filter(|&n| model.node(n).is("DequantizeLinear"))?;
    let codes = model.constant_input(node, 0)?;
    (exchanges == 0 || codes.dims().len() == 2).then_some((node, exchanges % 2 == 1))
}

/// The value behind Transposes that exchange the axes of a matrix, and how many they are.
pub(super) fn behind_exchanges(model: &Model, mut value: ValueId) -> (ValueId, usize) {
    let mut count = 0;
    while let Some(node) = model.producer(value).map(|n| model.node(n)) {
        // Without `perm` the axes are reversed, which for a matrix is the same.
        let exchanges = node.is("Transpose") && node.ints("perm").is_none_or(|perm| perm == [1, 0]);
        let Some(input) = node.input(0).filter(|_| exchanges) else { break };
        (value, count) = (input, count + 1);
    }
    (value, count)
}

impl QuantizedTensor {
    /// Reads a DequantizeLinear of a constant, or says why that is not possible.
    ///
    /// # Errors
    /// Codes of other formats than integers of 2, 4 or 8 bits, parameters that are not constant or do not fit.
    pub fn from_qdq(model: &Model, node: NodeId) -> Result<Self, Reason> {
        let codes = model.constant_input(node, 0).ok_or(Reason::NotConstant { what: Operand::QuantizedData })?;
        let scale = model.constant_input(node, 1).ok_or(Reason::NotConstant { what: Operand::Scale })?;
        let dtype = codes.dtype();
        let format = dtype.format().filter(|f| f.is_integer() && f.bits() <= 8);
        let format =
            format.ok_or_else(|| Reason::wrong_type(Operand::QuantizedData, dtype, "an integer of 2, 4 or 8 bits"))?;
        let dims = codes.dims();
        let granularity = granularity(model, node, &dims, &scale.dims())?;
        let scales = scale.to_f32().filter(|_| scale.dtype() != DataType::Double);
        let scales =
            scales.ok_or_else(|| Reason::wrong_type(Operand::Scale, scale.dtype(), "float, float16 or bfloat16"))?;
        let output = Quantizer::of(model.node(node)).and_then(|q| q.output_dtype);
        if output.is_some_and(|output| output != scale.dtype()) {
            return Err(Reason::Mismatch { what: "result type".into(), from: "that of its scale".into() });
        }
        let zeros = match (model.node(node).input(2), model.constant_input(node, 2)) {
            (None, _) => vec![0; scales.len()],
            (Some(_), Some(zero)) if zero.dtype() == dtype && zero.len() == scales.len() => {
                pack::unpack(&zero.raw(), &format, zero.len())
            }
            (Some(_), Some(_)) => return Err(Reason::WrongCount { what: "zero points".into(), per: "scale".into() }),
            (Some(_), None) => return Err(Reason::NotConstant { what: Operand::ZeroPoint }),
        };
        Ok(Self {
            format,
            granularity,
            scales,
            scale_dtype: scale.dtype(),
            tensor_scale: None,
            zero_points: ZeroPoints::Integers(zeros),
            codes: packed(codes.raw(), format.bits(), codes.len()),
            dims,
        })
    }

    /// The initializers of a DequantizeLinear.
    ///
    /// # Errors
    /// Zero points between codes, which it does not have.
    pub fn to_qdq(&self) -> Result<Pair, Reason> {
        match self.zero_points {
            ZeroPoints::Integers(_) => Ok(Pair::from(self)),
            ZeroPoints::Floats(_) => Err(Reason::FractionalZeroPoints { op: "DequantizeLinear".into() }),
        }
    }
}

impl From<&QuantizedTensor> for Pair {
    /// Zero points between codes become the nearest codes.
    fn from(tensor: &QuantizedTensor) -> Self {
        let QuantizedTensor { format, granularity, .. } = *tensor;
        let (dtype, dims) = (DataType::from(format), granularity.scale_dims(&tensor.dims));
        Self {
            codes: Tensor::new(dtype, &tensor.dims, tensor.codes.clone()),
            scale: tensor.scale_tensor(&dims, &tensor.scales),
            zero_point: Tensor::new(dtype, &dims, pack::pack(&tensor.zero_points.nearest(format), format.bits())),
            granularity,
        }
    }
}
