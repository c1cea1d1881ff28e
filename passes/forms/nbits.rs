//! `com.microsoft::MatMulNBits`: `[N, K]` in blocks along K, every block padded to whole bytes.
//!
//! Codes are unsigned; without zero points the middle one stands for zero, so a signed format without zero points becomes
//! an unsigned one without, and back. A zero point that is written makes the format unsigned on the way back.

use super::{QuantizedTensor, ZeroPoints, float_tensor, integer, pack_rows, unpack_rows};
use crate::ir::view::MatMulNBits;
use crate::ir::{Model, NodeId, Tensor};
use crate::numerics::{Granularity, pack};
use crate::onnx::DataType;
use crate::plan::form::nbits_fits;
use crate::reason::{Operand, Reason};

/// Elements in a block of a row that has one scale: what onnxruntime itself takes where it fuses such a weight.
const ROW_BLOCK: usize = 32;

/// The initializers and attributes of a `MatMulNBits`.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// Columns of the product.
    pub n: usize,
    /// Elements that one product is summed over.
    pub k: usize,
    /// Bits of a code.
    pub bits: usize,
    /// Elements in a block.
    pub block: usize,
    /// Codes, `uint8[N, blocks, bytes of a block]`.
    pub codes: Tensor,
    /// Scales, `[N, blocks]`.
    pub scales: Tensor,
    /// Zero points: packed, `uint8[N, bytes]`, or floats, `[N, blocks]`; none where the middle code stands for zero.
    pub zero_points: Option<Tensor>,
}

/// Elements in a block of a matrix `[N, K]` with this granularity; where the scales of a row are alike, onnxruntime's choice.
#[must_use]
pub fn block_of(granularity: &Granularity) -> usize {
    match *granularity {
        Granularity::PerGroup { size, .. } => size,
        Granularity::PerTensor | Granularity::PerChannel { .. } => ROW_BLOCK,
    }
}

impl QuantizedTensor {
    /// Reads the weight of a `MatMulNBits` as `[N, K]`, or says why that is not possible.
    ///
    /// # Errors
    /// Inputs that are not constant or do not fit the attributes, and a permutation of K (`g_idx`).
    pub fn from_nbits(model: &Model, node: NodeId) -> Result<Self, Reason> {
        let at = model.node(node);
        let attributes = MatMulNBits::of(at).ok_or_else(|| Reason::NotA { op: "MatMulNBits".into() })?;
        let size = |name: &str, value: Option<usize>| value.ok_or_else(|| Reason::NotPositive { name: name.into() });
        let (n, k) = (size("N", attributes.n)?, size("K", attributes.k)?);
        let block = size("block_size", attributes.block_size)?;
        let bits = usize::try_from(attributes.bits).unwrap_or(0);
        if at.input(4).is_some() {
            return Err(Reason::Unsupported { what: "a permutation of its rows (g_idx)".into() });
        }
        let codes = model.constant_input(node, 1).ok_or(Reason::NotConstant { what: Operand::QuantizedData })?;
        let scale = model.constant_input(node, 2).ok_or(Reason::NotConstant { what: Operand::Scale })?;
        let signed = at.input(3).is_none();
        let format = integer(bits, signed).ok_or(Reason::Bits { bits })?;
        let blocks = k.div_ceil(block);
        let blob = block.checked_mul(bits).map_or(usize::MAX, |bits| bits.div_ceil(8));
        let raw = codes.raw();
        if codes.dtype() != DataType::Uint8
            || n.checked_mul(blocks).and_then(|all| all.checked_mul(blob)) != Some(raw.len())
        {
            return Err(Reason::WrongShape { what: Operand::QuantizedData, dims: codes.dims() });
        }
        let scales = scale.to_f32().filter(|s| s.len() == n * blocks && scale.dtype() != DataType::Double);
        let scales = scales.ok_or_else(|| Reason::WrongCount { what: "scales".into(), per: "block".into() })?;
        let zero_points = if signed {
            ZeroPoints::Integers(vec![0; scales.len()])
        } else {
            let zero = model.constant_input(node, 3).ok_or(Reason::NotConstant { what: Operand::ZeroPoint })?;
            zero_points(zero, n, blocks, bits)?
        };
        let all = unpack_rows(&raw, block, bits, blob);
        let all: Vec<u8> = all.chunks(block * blocks).flat_map(|row| &row[..k]).copied().collect();
        let mut weight = Self {
            format,
            dims: vec![n, k],
            granularity: Granularity::PerGroup { axis: 1, size: block },
            scales,
            scale_dtype: scale.dtype(),
            tensor_scale: None,
            zero_points,
            codes: pack::pack_bytes(&all, bits).into(),
        };
        weight.codes = weight.unsigned();
        Ok(weight.merged())
    }

    /// One scale a row where all blocks of each row have the same one, and there are several or none is needed.
    fn merged(self) -> Self {
        let Granularity::PerGroup { axis: 1, size } = self.granularity else { return self };
        let blocks = self.dims[1].div_ceil(size);
        let first = |at: usize| at / blocks * blocks;
        let same = (0..self.scales.len()).all(|at| self.scales[at].to_bits() == self.scales[first(at)].to_bits());
        let ZeroPoints::Integers(zeros) = &self.zero_points else { return self };
        let alike = same && (0..zeros.len()).all(|at| zeros[at] == zeros[first(at)]);
        if !alike || (blocks == 1 && self.format.bits() < 8) {
            return self;
        }
        Self {
            granularity: Granularity::PerChannel { axis: 0 },
            scales: self.scales.iter().step_by(blocks).copied().collect(),
            zero_points: ZeroPoints::Integers(zeros.iter().step_by(blocks).copied().collect()),
            ..self
        }
    }

    /// The initializers of a `MatMulNBits` whose weight is this `[N, K]`.
    ///
    /// # Errors
    /// What [`nbits_fits`] refuses, and 8-bit codes with zero points between codes, with which onnxruntime 1.31 fails when it
    /// runs.
    pub fn to_nbits(&self) -> Result<Blocks, Reason> {
        nbits_fits(self.format, &self.dims, &self.granularity, 1)?;
        if let Some(grouped) = self.in_groups(block_of(&self.granularity)) {
            return grouped.to_nbits();
        }
        let &[n, k] = self.dims.as_slice() else {
            return Err(Reason::WrongShape { what: Operand::Weight, dims: self.dims.clone() });
        };
        let bits = self.format.bits();
        let block = block_of(&self.granularity);
        let blocks = k.div_ceil(block);
        let blob = block * bits / 8;
        let codes = if k.is_multiple_of(block) {
            self.unsigned()
        } else {
            let codes = pack::unpack_bytes(&self.unsigned(), bits, self.len());
            pack_rows(&codes, k, bits, blocks * blob).into()
        };
        let zero_points = match (&self.zero_points, self.unsigned_zeros()) {
            _ if self.is_centred() => None,
            (_, Some(zeros)) => {
                let bytes = (blocks * bits).div_ceil(8);
                Some(Tensor::new(DataType::Uint8, &[n, bytes], pack_rows(&zeros, blocks, bits, bytes)))
            }
            (ZeroPoints::Floats(_), _) if bits == 8 => {
                return Err(Reason::FractionalZeroPoints { op: "MatMulNBits of 8 bits".into() });
            }
            (ZeroPoints::Floats(zeros), _) => Some(float_tensor(self.scale_dtype, &[n, blocks], zeros)),
            (ZeroPoints::Integers(_), None) => return Err(Reason::FractionalZeroPoints { op: "MatMulNBits".into() }),
        };
        Ok(Blocks {
            n,
            k,
            bits,
            block,
            codes: Tensor::new(DataType::Uint8, &[n, blocks, blob], codes),
            scales: self.scale_tensor(&[n, blocks], &self.scales),
            zero_points,
        })
    }
}

/// Zero points of a `MatMulNBits`: packed along each row, or one float a block.
fn zero_points(zero: &Tensor, n: usize, blocks: usize, bits: usize) -> Result<ZeroPoints, Reason> {
    let bytes = (blocks * bits).div_ceil(8);
    if zero.dtype() == DataType::Uint8 {
        if zero.len() != n * bytes {
            return Err(Reason::NotPacked);
        }
        let zeros = unpack_rows(&zero.raw(), blocks, bits, bytes);
        return Ok(ZeroPoints::Integers(zeros.into_iter().map(i32::from).collect()));
    }
    let zeros = zero.to_f32().filter(|z| z.len() == n * blocks);
    zeros.map(ZeroPoints::Floats).ok_or_else(|| Reason::WrongCount { what: "zero points".into(), per: "block".into() })
}
