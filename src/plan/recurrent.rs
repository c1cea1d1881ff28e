//! LSTM and GRU: both of their weights, or neither.

use super::form::{Constant, Runs, fits};
use super::kernels;
use super::planner::{Kindness, Planner};
use super::site::Refusal;
use crate::config::SiteKind;
use crate::config::spec::Form;
use crate::error::Result;
use crate::ir::NodeId;
use crate::reason::{Operand, Reason};

impl Planner<'_> {
    /// Plans the weights of a recurrent layer.
    pub(super) fn gates(&mut self, node: NodeId) -> Result<()> {
        let may = self.gates_may(node);
        if self.or_refuse(node, may)?.is_none() {
            return Ok(());
        }
        let lstm = Form::DynamicQuantizeLstm;
        let inside = self.asks_for(node, lstm) && lstm.serves(self.model.node(node).op_type());
        let dequantized = Reason::NoKernel { target: self.target.name.clone() };
        self.quantized.insert(node, Kindness::WeightOnly);
        self.notes.insert(node, if inside { Reason::QuantizesItself } else { dequantized });
        Ok(())
    }

    /// Why its weights stay float.
    fn gates_may(&self, node: NodeId) -> Result<(), Refusal> {
        if let Some(why) = self.off(node, SiteKind::Weight) {
            return Err(why.into());
        }
        let what = Operand::Weight;
        for index in [1, 2] {
            let value = self.model.node(node).input(index);
            kernels::float(
                self.model
                    .constant_input(node, index)
                    .ok_or_else(|| kernels::not_constant(self.model, node, index, what))?,
                what,
            )?;
            if let Some(why) = value.and_then(|value| self.unquantized(value)) {
                return Err(why.into());
            }
            let scheme = self.weight(node, index)?;
            // What was asked for only where it is run like that.
            let lstm = Form::DynamicQuantizeLstm;
            if self.asks_for(node, lstm) && !self.is_forced(node, SiteKind::Weight) {
                let float = self.float_at(node, index);
                let constant = Constant { node, index, scheme: &scheme, float, runs: Runs::Float, transposed: false };
                fits(self.model, self.target, lstm, &constant)?;
                // With samples the outputs are measured, and what costs most is vetoed.
                if index == 1 && !self.knowledge.calibrated {
                    kernels::calm_gates(self.model, node)?;
                }
            }
        }
        match self.knowledge.vetoes.get(&self.site(node, SiteKind::Weight)) {
            Some(veto) => Err(veto.why.clone().into()),
            None => Ok(()),
        }
    }
}
