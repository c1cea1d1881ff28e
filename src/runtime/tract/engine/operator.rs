//! What tract asks of an operator in three traits, asked in one.

use std::fmt::Debug;

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_core::internal::*;

/// What an operator computes.
pub(super) trait Compute: Clone + Debug + Eq + Send + Sync + 'static {
    /// Whether tract may run it while it compiles, where its inputs are constant.
    const FOLDS: bool = true;

    /// What messages call it.
    fn name(&self) -> StaticName;

    /// Types and shapes of the outputs.
    fn facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>>;

    /// The outputs.
    fn compute(&self, inputs: TVec<TValue>) -> TractResult<TVec<TValue>>;
}

/// A [`Compute`] as a node of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Operator<T>(pub T);

impl<T: Compute> Op for Operator<T> {
    fn name(&self) -> StaticName {
        self.0.name()
    }
    op_as_typed_op!();
}

impl<T: Compute> EvalOp for Operator<T> {
    fn eval_out_of_plan(&self, inputs: TVec<TValue>) -> TractResult<Option<TVec<TValue>>> {
        if T::FOLDS { self.0.compute(inputs).map(Some) } else { Ok(None) }
    }

    fn eval(&self, _context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        self.0.compute(inputs)
    }
}

impl<T: Compute> TypedOp for Operator<T> {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.0.facts(inputs)
    }
    as_op!();
}

/// The method `rules` of tract's `Expansion`: `rules!(self, s, inputs: 2, outputs: 1 => { … })` checks how many inputs and
/// outputs there are, and states of their types and shapes what the body does.
macro_rules! rules {
    ($this:ident, $s:ident, $inputs:ident: $reads:expr, $outputs:ident: $makes:expr => $body:block) => {
        fn rules<'r, 'p: 'r, 's: 'r>(
            &'s $this,
            $s: &mut Solver<'r>,
            $inputs: &'p [TensorProxy],
            $outputs: &'p [TensorProxy],
        ) -> InferenceResult {
            check_input_arity($inputs, $reads)?;
            check_output_arity($outputs, $makes)?;
            $body
        }
    };
}

pub(super) use rules;
