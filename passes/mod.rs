//! The rewrites: one file each, listed in run order in [`recipes`].
//!
//! A pass applies what the plan decided, or a rewrite that is always right. It decides nothing and names no target.

pub mod dequantize;
pub mod drop_dead;
pub mod fold_clips;
pub mod fold_constants;
pub mod fold_fake_quant;
pub mod fold_gemm;
pub mod fold_weights;
pub mod forms;
pub mod freeze_inputs;
pub mod fuse_batchnorm;
pub mod fuse_scales;
pub mod inline_functions;
pub mod insert_qdq;
pub mod lift_constants;
pub mod lower_gather;
pub mod lower_lstm;
pub mod lower_matmulinteger;
pub mod lower_matmulnbits;
pub mod lower_qoperator;
pub mod name_bodies;
pub mod name_quantizers;
pub mod narrow_floats;
pub mod per_token;
pub mod pipeline;
pub mod raise_opset;
pub mod raise_qdq;
pub mod raise_qoperator;
pub mod recipes;
pub mod recover_codes;
pub mod settle_quantizers;
pub mod simulate;
pub mod smooth;
pub mod split_attention;
pub mod split_embedding;
pub mod standard_quantizers;
pub mod support;
pub mod switch_quantizers;
pub mod unfold_weights;
pub mod unfuse_matmul;
pub mod widen_floats;

use std::fmt;

use serde::Serialize;

use self::recipes::Conversion;
pub use self::support::change::Change;
use crate::error::Result;
use crate::ir::{Model, NodeId, Tensor};
use crate::plan::Plan;
use crate::reason::Reason;
use crate::solve::Solution;

/// One rewrite of a whole model.
pub trait Pass: Sync {
    /// Kebab-case; what `--passes`, `--print-after`, reports and snapshots call it.
    fn name(&self) -> &'static str;

    /// Rewrites `model`; says what it changed, and what it left alone and why.
    ///
    /// # Errors
    /// The model cannot be rewritten as asked; the message names node and tensor.
    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome>;
}

/// Evaluates a node whose inputs are all known.
pub trait Evaluate: Sync {
    /// The outputs of `node` for `inputs` (`None` where one is left out), to the last bit; `None` if this node cannot be evaluated.
    fn evaluate(&self, model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Vec<Tensor>>;

    /// As [`evaluate`](Self::evaluate), where floats may be rounded as the runtime does it, and `None` also if the outputs would
    /// take more than `limit` bytes.
    fn approximate(
        &self,
        _model: &Model,
        _node: NodeId,
        _inputs: &[Option<Tensor>],
        _limit: usize,
    ) -> Option<Vec<Tensor>> {
        None
    }
}

/// What passes may look at besides the model.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Runs constant nodes.
    pub evaluate: &'a dyn Evaluate,
    /// What was decided and solved; passes that clean up do without.
    pub quantization: Option<(&'a Plan, &'a Solution)>,
    /// What a conversion is asked for; the defaults elsewhere.
    pub conversion: Conversion<'a>,
    /// Whether weights that are graph inputs, too, become constants.
    pub freeze_weights: bool,
}

impl<'a> Context<'a> {
    /// For passes that need no plan.
    pub fn new(evaluate: &'a dyn Evaluate) -> Self {
        Self { evaluate, quantization: None, conversion: Conversion::default(), freeze_weights: false }
    }

    /// For passes that apply a plan.
    pub fn planned(evaluate: &'a dyn Evaluate, plan: &'a Plan, solution: &'a Solution) -> Self {
        Self { quantization: Some((plan, solution)), ..Self::new(evaluate) }
    }
}

/// What a pass did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// What it changed.
    pub changes: Vec<Note<Change>>,
    /// What it left alone that a user might have expected it to change.
    pub skips: Vec<Note<Reason>>,
}

/// One thing done, or left alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Note<T> {
    /// Node or tensor.
    pub at: String,
    /// What was done to it, or why nothing was.
    #[serde(flatten)]
    pub what: T,
}

impl<T: fmt::Display> fmt::Display for Note<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.what)
    }
}

impl Outcome {
    /// Records a change.
    pub fn changed(&mut self, at: impl Into<String>, what: impl Into<Change>) {
        self.changes.push(Note { at: at.into(), what: what.into() });
    }

    /// Records a refusal.
    pub fn skipped(&mut self, at: impl Into<String>, why: impl Into<Reason>) {
        self.skips.push(Note { at: at.into(), what: why.into() });
    }
}
