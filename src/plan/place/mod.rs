//! Where quantizers go: what each placement adds to the rules that all targets share.
//!
//! A placement is the way in which one kind of runtime finds what it runs on integers. A further one is a file here and an
//! arm in [`of`].

mod barriers;
mod everywhere;
mod fused;
mod inputs;

use super::form::Constant;
use super::planner::Planner;
use super::{Barrier, Bias, Plan, Scheme, Weight};
use crate::ir::{Model, NodeId, ValueId};
use crate::reason::Reason;
use crate::targets::{Placement, Target};

/// The questions that placements answer differently.
pub(super) trait Place: Sync {
    /// Whether activations are quantized wherever the operator table allows it, without an integer kernel as well.
    fn everywhere(&self) -> bool {
        false
    }

    /// Why a weight in this format does not run beside quantized activations.
    fn unfit_weight(&self, _: &Target, _: &Scheme) -> Option<Reason> {
        None
    }

    /// Whether products of two activations run on integers.
    fn multiplies_activations(&self) -> bool {
        false
    }

    /// Why a product of this shape does not run on integers.
    fn unfit_product(&self, _: &Model, _: NodeId) -> Option<Reason> {
        None
    }

    /// Why a node with this weight does not run on integers for its bias.
    fn unfit_bias(&self, _: &Model, _: NodeId, _: usize) -> Option<Reason> {
        None
    }

    /// Whether the transposed weight of a product is stored as the product has it, `[K, N]`.
    fn untransposes(&self, _: &Model, _: NodeId) -> bool {
        false
    }

    /// Whether the runtime would quantize the weight of the float operator that makes this value by itself, unless something
    /// stands in between.
    fn fence(&self, _: &Planner<'_>, _: ValueId) -> bool {
        false
    }

    /// What becomes of the sum behind an integer product, whose own weights begin at this one.
    fn sum(&self, _: &Planner<'_>, _: NodeId, _: usize, _: &[Weight]) -> Sum {
        Sum::AsItIs
    }

    /// Whether the runtime quantizes constant biases itself, asked or not.
    fn quantizes_biases(&self) -> bool {
        false
    }

    /// Whether the runtime has a kernel that reads the codes of a dequantized constant.
    fn fuses(&self, _: &Planner<'_>, _: &Constant<'_>) -> bool {
        true
    }

    /// Whether what follows a product keeps that from becoming such a kernel.
    fn hinders(&self, _: &Planner<'_>, _: NodeId) -> bool {
        false
    }

    /// Inputs that the runtime must not move anything across.
    fn barriers(&self, _: &Planner<'_>, _: &[NodeId], _: &Plan) -> Vec<Barrier> {
        Vec::new()
    }

    /// Quantizes what follows from the anchors.
    fn spread(&self, planner: &mut Planner<'_>, nodes: &[NodeId]);
}

/// What becomes of the sum behind an integer product.
pub(super) enum Sum {
    /// It stays.
    AsItIs,
    /// What is added is a bias at the scale of the accumulator.
    Bias(Bias),
    /// The Add of this name becomes a Sum, which is the same and not taken for part of the product.
    Apart(String),
}

/// How a target places quantizers.
pub(super) fn of(placement: Placement) -> &'static dyn Place {
    match placement {
        Placement::Fused => &fused::Fused,
        Placement::Inputs => &inputs::Inputs,
        Placement::Everywhere => &everywhere::Everywhere,
    }
}
