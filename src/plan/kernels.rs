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
use crate::targets::Placement;

impl Planner<'_> {
    /// Why a Gemm does not run in integers for its bias: an integer Gemm takes an int32 bias or none.
    pub(super) fn unfit_bias(&self, node: NodeId, weight: Option<usize>) -> Option<String> {
        let at = self.model.node(node);
        let (Some(bias), Some(weight), Placement::Fused, true) =
            (at.input(2), weight, self.target.placement, at.is("Gemm"))
        else {
            return None;
        };
        if (at.float("alpha").unwrap_or(1.0) - 1.0).abs() > 0.0 {
            return Some("alpha is not 1 beside a bias".into());
        }
        match self.model.constant(bias) {
            None => Some("its bias is not constant".into()),
            Some(bias) if self.channels(node, weight).is_none_or(|c| !one_each(&bias.dims(), c)) => {
                Some("its bias is not one value a column".into())
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
            let float = self.model.constant_input(node, index).is_some_and(|t| t.dtype() == DataType::Float);
            let refused = match value.filter(|_| float) {
                None => Some("its weights are not constant floats".to_owned()),
                Some(value) => self.unquantized(value),
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
        let dequantized = format!("{} has no {op} that reads codes", self.target.name);
        self.notes.insert(node, if inside { "it quantizes its input itself".to_owned() } else { dequantized });
        Ok(())
    }

    /// Why the weight of a node whose input is quantized at run time cannot be that of a `MatMulInteger` or `ConvInteger`.
    pub(super) fn integer_product(&self, node: NodeId, index: usize, quantizer: &Scheme) -> Result<(), String> {
        let at = self.model.node(node);
        let dims = self.model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
        if index != 1 {
            return Err("MatMulInteger takes a weight on the right".to_owned());
        }
        if !matches!(quantizer.dtype, Format::Int8 | Format::Uint8) {
            return Err(format!("MatMulInteger has int8 and uint8, not {}", quantizer.dtype));
        }
        if quantizer.scale_dtype != ScaleDtype::Float32 {
            return Err("MatMulInteger has float scales here".to_owned());
        }
        let channel = ops::weight_layout(self.model, node, index, &dims).and_then(|l| l.channel_axis);
        match quantizer.granularity {
            Granularity::PerTensor => {}
            Granularity::PerChannel { axis } if channel == Some(axis) => {}
            _ => return Err("MatMulInteger has one scale for a weight, or one for each output channel".to_owned()),
        }
        if at.is("Conv") {
            if !quantizer.symmetric && quantizer.granularity != Granularity::PerTensor {
                return Err("ConvInteger has one zero point for a weight".to_owned());
            }
            if !(3..=5).contains(&dims.len()) {
                return Err(format!("ConvInteger has no weight of shape {dims:?}"));
            }
            let list = |v| self.model.constant(v).is_some_and(|t| t.dims().len() == 1 && t.dtype() == DataType::Float);
            if at.input(2).is_some_and(|v| !list(v)) {
                return Err("its bias is not constant".to_owned());
            }
        }
        let sum: usize = if at.is("Conv") {
            dims[1..].iter().product()
        } else {
            let across = usize::from(at.int("transB").unwrap_or(0) != 0);
            dims.len().checked_sub(2 - across).and_then(|axis| dims.get(axis)).copied().unwrap_or(0)
        };
        if sum > 1 << 16 {
            return Err(format!("sums of {sum} products may not fit into int32"));
        }
        if at.is("Gemm") && (at.float("alpha").unwrap_or(1.0) - 1.0).abs() > 0.0 {
            return Err("alpha is not 1".to_owned());
        }
        Ok(())
    }
}
