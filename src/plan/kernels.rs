//! What the integer kernels of products, convolutions and recurrent layers do not take.

use super::Scheme;
use super::constants::one_each;
use super::planner::{Kindness, Planner};
use super::site::Refusal;
use crate::config::SiteKind;
use crate::config::spec::{Form, ScaleDtype};
use crate::error::Result;
use crate::ir::{NodeId, Tensor};
use crate::numerics::{Format, Granularity};
use crate::onnx::DataType;
use crate::ops;
use crate::reason::{Kernel, Operand, Reason};
use crate::targets::Placement;

impl Planner<'_> {
    /// Why a Gemm does not run in integers for its bias: an integer Gemm takes an int32 bias or none.
    pub(super) fn unfit_bias(&self, node: NodeId, weight: Option<usize>) -> Option<Reason> {
        let at = self.model.node(node);
        let (Some(bias), Some(weight), Placement::Fused, true) =
            (at.input(2), weight, self.target.placement, at.is("Gemm"))
        else {
            return None;
        };
        if (at.float("alpha").unwrap_or(1.0) - 1.0).abs() > 0.0 {
            return Some(Reason::Attribute { name: "alpha".to_owned(), wanted: 1 });
        }
        match self.model.constant(bias) {
            None => Some(Reason::NotConstant { what: Operand::Bias }),
            Some(bias) if self.channels(node, weight).is_none_or(|c| !one_each(&bias.dims(), c)) => {
                Some(Reason::BiasPerChannel { dims: bias.dims() })
            }
            Some(_) => None,
        }
    }

    /// Plans the weights of an LSTM or GRU: both, or neither.
    pub(super) fn gates(&mut self, node: NodeId, op: &str) -> Result<()> {
        if let Some(why) = self.off(node, SiteKind::Weight) {
            self.refuse(node, why);
            return Ok(());
        }
        for index in [1, 2] {
            let value = self.model.node(node).input(index);
            let refused = match self.model.constant_input(node, index).map(Tensor::dtype) {
                None => Some(Reason::NotConstant { what: Operand::Weight }),
                Some(DataType::Float) => value.and_then(|value| self.unquantized(value)),
                Some(found) => {
                    Some(Reason::WrongType { what: Operand::Weight, found, wanted: DataType::Float.to_string() })
                }
            };
            let quantizer = match refused {
                Some(why) => Err(Refusal::Unfit(why)),
                None => self.weight(node, index),
            };
            match quantizer {
                Ok(quantizer) => {
                    // What was asked for only where it is run like that.
                    let lstm = Form::DynamicQuantizeLstm;
                    let asked = self.ask(node, SiteKind::Weight).spec.form == Some(lstm);
                    if asked
                        && !self.is_forced(node, SiteKind::Weight)
                        && let Err(why) = self.fits(lstm, node, index, false, &quantizer, false)
                    {
                        self.refuse(node, why);
                        return Ok(());
                    }
                }
                Err(Refusal::Wrong(error)) => return Err(error),
                Err(Refusal::Unfit(why)) => {
                    self.refuse(node, why);
                    return Ok(());
                }
            }
        }
        if let Some(veto) = self.knowledge.vetoes.get(&self.site(node, SiteKind::Weight)) {
            self.refuse(node, veto.why.clone());
            return Ok(());
        }
        self.quantized.insert(node, Kindness::WeightOnly);
        let inside = self.ask(node, SiteKind::Weight).spec.form == Some(Form::DynamicQuantizeLstm) && op == "LSTM";
        let dequantized = Reason::NoKernel { target: self.target.name.clone() };
        self.notes.insert(node, if inside { Reason::QuantizesItself } else { dequantized });
        Ok(())
    }

    /// Why the weight of a node whose input is quantized at run time cannot be that of a `MatMulInteger` or `ConvInteger`.
    pub(super) fn integer_product(&self, node: NodeId, index: usize, quantizer: &Scheme) -> Result<(), Reason> {
        let at = self.model.node(node);
        let kernel = if at.is("Conv") { Kernel::ConvInteger } else { Kernel::MatMulInteger };
        let dims = self.model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
        let Scheme { dtype: format, granularity, scale_dtype, .. } = *quantizer;
        if index != 1 {
            return Err(Reason::NotOnTheRight { kernel });
        }
        if !matches!(format, Format::Int8 | Format::Uint8) {
            return Err(Reason::KernelFormat { kernel, format, has: vec![Format::Int8, Format::Uint8] });
        }
        if scale_dtype != ScaleDtype::Float32 {
            return Err(Reason::KernelScaleType { kernel, scales: scale_dtype.into() });
        }
        let channel = ops::weight_layout(self.model, node, index, &dims).and_then(|l| l.channel_axis);
        match granularity {
            Granularity::PerTensor => {}
            Granularity::PerChannel { axis } if channel == Some(axis) => {}
            _ => return Err(Reason::KernelScales { kernel, granularity }),
        }
        if kernel == Kernel::ConvInteger {
            if !quantizer.symmetric && granularity != Granularity::PerTensor {
                return Err(Reason::OneZeroPoint { kernel });
            }
            if !(3..=5).contains(&dims.len()) {
                return Err(Reason::KernelShape { kernel, dims });
            }
            let list = |v| self.model.constant(v).is_some_and(|t| t.dims().len() == 1 && t.dtype() == DataType::Float);
            if at.input(2).is_some_and(|v| !list(v)) {
                return Err(Reason::NotConstant { what: Operand::Bias });
            }
        }
        let products: usize = if kernel == Kernel::ConvInteger {
            dims[1..].iter().product()
        } else {
            let across = usize::from(at.int("transB").unwrap_or(0) != 0);
            dims.len().checked_sub(2 - across).and_then(|axis| dims.get(axis)).copied().unwrap_or(0)
        };
        if products > 1 << 16 {
            return Err(Reason::LongSum { products });
        }
        if at.is("Gemm") && (at.float("alpha").unwrap_or(1.0) - 1.0).abs() > 0.0 {
            return Err(Reason::Attribute { name: "alpha".to_owned(), wanted: 1 });
        }
        Ok(())
    }
}
