//! Operators that are computed here: one function from tensors to tensors, which tract neither fuses nor looks into.

use std::fmt::Debug;
use std::sync::Arc;

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;
use tract_onnx::pb::NodeProto;

use super::operator::{Compute, Operator, rules};
use super::operators::Built;

/// What is known of an input before the model runs.
pub(super) struct Known {
    pub dtype: DatumType,
    pub shape: Vec<usize>,
    /// Its value, for inputs that [`Native::shaping`] names.
    pub value: Option<Arc<Tensor>>,
}

/// An operator of the graph. Inputs and outputs are those of the ONNX node, `None` where one is left out.
pub(super) trait Native: Debug + Send + Sync + 'static {
    /// What messages call it.
    fn name(&self) -> &'static str;

    /// Inputs whose value decides the shape of an output: they must be constants of the plan.
    fn shaping(&self) -> &[usize] {
        &[]
    }

    /// Types and shapes of the outputs, those that the node leaves out included.
    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>>;

    /// The outputs.
    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>>;
}

/// Builds the call of `native` that `node` is.
#[allow(clippy::unnecessary_wraps, reason = "what builders return")]
pub(super) fn call(node: &NodeProto, native: impl Native) -> Built {
    let there = |names: &[String]| names.iter().map(|n| !n.is_empty()).collect();
    Ok((expand(Call::new(native, there(&node.input), there(&node.output))), vec![]))
}

/// A [`Native`] in a graph.
#[derive(Clone, Debug)]
pub(super) struct Call {
    native: Arc<dyn Native>,
    /// Which inputs of the ONNX node are there.
    inputs: Vec<bool>,
    outputs: Vec<bool>,
}

impl PartialEq for Call {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.native, &other.native)
    }
}

impl Eq for Call {}

impl Call {
    /// A call with these of the operator's inputs and outputs.
    pub fn new(native: impl Native, inputs: Vec<bool>, outputs: Vec<bool>) -> Self {
        Self { native: Arc::new(native), inputs, outputs }
    }

    /// Spreads what tract gives over the inputs of the ONNX node.
    fn spread<T>(&self, given: impl IntoIterator<Item = T>) -> Vec<Option<T>> {
        let mut given = given.into_iter();
        self.inputs.iter().map(|&there| if there { given.next() } else { None }).collect()
    }

    /// Slots that tract has for the inputs of [`Native::shaping`].
    fn shaping(&self) -> Vec<usize> {
        let there = |&&index: &&usize| self.inputs.get(index).copied().unwrap_or(false);
        let slot = |&index: &usize| self.inputs[..index].iter().filter(|there| **there).count();
        self.native.shaping().iter().filter(there).map(slot).collect()
    }

    fn outputs_of(&self, known: Vec<Known>) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let all = self.native.outputs(&self.spread(known))?;
        ensure!(all.len() >= self.outputs.len(), "{} has only {} outputs", self.native.name(), all.len());
        Ok(all.into_iter().zip(&self.outputs).filter(|(_, there)| **there).map(|(fact, _)| fact).collect())
    }
}

/// How many of an operator's inputs or outputs are there.
pub(super) fn present(slots: &[bool]) -> usize {
    slots.iter().filter(|there| **there).count()
}

/// tract reckons shapes in a type of its own.
fn plain_type(dtype: DatumType) -> DatumType {
    if dtype.is_tdim() { DatumType::I64 } else { dtype }
}

impl Expansion for Call {
    fn name(&self) -> StaticName {
        self.native.name().into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(present(&self.outputs))
    }

    rules!(self, s, inputs: present(&self.inputs), outputs: present(&self.outputs) => {
        infer(s, inputs, outputs, self.shaping(), move |known| self.outputs_of(known))
    });

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let mut inputs: TVec<OutletId> = inputs.into();
        for (slot, input) in inputs.iter_mut().enumerate() {
            if model.outlet_fact(*input)?.datum_type.is_tdim() {
                let cast = tract_core::ops::cast::cast(DatumType::I64);
                *input = model.wire_node(format!("{prefix}.plain_{slot}"), cast, &[*input])?[0];
            }
        }
        model.wire_node(prefix, Operator(self.clone()), &inputs)
    }
}

/// States what `facts` says of the outputs, once types and shapes of all inputs are known, and the values of those in the
/// slots `shaping`.
pub(super) fn infer<'r, 'p: 'r, F>(
    s: &mut Solver<'r>,
    inputs: &'p [TensorProxy],
    outputs: &'p [TensorProxy],
    shaping: Vec<usize>,
    facts: F,
) -> InferenceResult
where
    F: Fn(Vec<Known>) -> TractResult<Vec<(DatumType, Vec<usize>)>> + Clone + 'r,
{
    let settle =
        move |s: &mut Solver<'r>, types: &[DatumType], shapes: &[TVec<TDim>], values: &[(usize, Arc<Tensor>)]| {
            let known = types.iter().zip(shapes).enumerate().map(|(slot, (dtype, shape))| {
                let shape = shape.iter().map(|d| Ok(d.to_usize()?)).collect::<TractResult<Vec<_>>>()?;
                let value = values.iter().find(|(at, _)| *at == slot).map(|(_, value)| value.clone());
                Ok(Known { dtype: plain_type(*dtype), shape, value })
            });
            // A dimension that only the run will tell.
            let Ok(known) = known.collect::<TractResult<Vec<_>>>() else { return Ok(()) };
            for (output, (dtype, shape)) in outputs.iter().zip(facts(known)?) {
                s.equals(&output.datum_type, dtype)?;
                let shape: TVec<TDim> = shape.into_iter().map(TDim::from).collect();
                s.equals(&output.shape, shape)?;
            }
            Ok(())
        };
    s.given_all(inputs.iter().map(|i| &i.datum_type), move |s, types| {
        let (shaping, settle) = (shaping.clone(), settle.clone());
        s.given_all(inputs.iter().map(|i| &i.shape), move |s, shapes| {
            if shaping.is_empty() {
                return settle(s, &types, &shapes, &[]);
            }
            let (types, slots, settle) = (types.clone(), shaping.clone(), settle.clone());
            s.given_all(shaping.iter().map(|&slot| &inputs[slot].value), move |s, values| {
                let values: Vec<_> = slots.iter().copied().zip(values).collect();
                settle(s, &types, &shapes, &values)
            })
        })
    })
}

impl Compute for Call {
    fn name(&self) -> StaticName {
        self.native.name().into()
    }

    fn facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let known = inputs.iter().map(|fact| {
            let shape = fact.shape.as_concrete().with_context(|| "a dimension is not known")?.to_vec();
            Ok(Known { dtype: plain_type(fact.datum_type), shape, value: fact.konst.clone() })
        });
        let facts = self.outputs_of(known.collect::<TractResult<Vec<_>>>()?)?;
        Ok(facts.into_iter().map(|(dtype, shape)| dtype.fact(&*shape)).collect())
    }

    fn compute(&self, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let inputs = self.spread(inputs.iter().map(|value| &**value));
        let all = self.native.eval(&inputs)?;
        Ok(all.into_iter().zip(&self.outputs).filter(|(_, there)| **there).map(|(t, _)| t.into_tvalue()).collect())
    }
}

/// Input `index`, which the operator cannot do without.
pub(super) fn need<T>(inputs: &[Option<T>], index: usize) -> TractResult<&T> {
    inputs.get(index).and_then(Option::as_ref).with_context(|| format!("input {index} is missing"))
}

/// The elements as float32.
pub(super) fn floats(array: &Tensor) -> TractResult<Vec<f32>> {
    let array = array.cast_to::<f32>()?;
    Ok(array.try_as_plain_ram()?.as_slice::<f32>()?.to_vec())
}

/// The elements as int64.
pub(super) fn integers(array: &Tensor) -> TractResult<Vec<i64>> {
    let array = array.cast_to::<i64>()?;
    Ok(array.try_as_plain_ram()?.as_slice::<i64>()?.to_vec())
}
