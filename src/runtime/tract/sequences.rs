//! Sequences whose length is known: lists of tensor names.

use std::collections::BTreeMap;

use super::branches::{Known, stack, unsqueeze};
use super::constant::Constant;
use super::program::{Program, Step, node};
use crate::error::Result;
use crate::ir::Tensor;
use crate::onnx::DataType;

/// Operators that make or take sequences and optionals.
const OPERATORS: [&str; 11] = [
    "ConcatFromSequence",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SplitToSequence",
];

/// Tensors a sequence may have.
const MAX_LENGTH: usize = 10_000;

/// The sequences met so far, by name.
#[derive(Default)]
pub(super) struct Sequences(BTreeMap<String, Vec<String>>);

impl Sequences {
    /// Whether a step is one of those that [`resolve`](Self::resolve) knows.
    pub fn concerns(step: &Step) -> bool {
        OPERATORS.iter().any(|op| step.is(op))
    }

    /// The steps that take the place of step `at`: none where it only makes a list. `None` if it has nothing to do with
    /// sequences.
    ///
    /// # Errors
    /// Positions and lengths that are not known or do not exist.
    pub fn resolve(&mut self, program: &mut Program, at: usize, known: &mut Known<'_>) -> Result<Option<Vec<Step>>> {
        let step = &program.steps[at];
        if !Self::concerns(step) {
            let list = step.input(0).filter(|_| step.is("Identity")).and_then(|name| self.0.get(name)).cloned();
            return Ok(match (list, step.output(0)) {
                (Some(list), Some(to)) => {
                    self.0.insert(to.to_owned(), list);
                    Some(Vec::new())
                }
                _ => None,
            });
        }
        let step = step.clone();
        let Some(to) = step.output(0) else { return Ok(Some(Vec::new())) };
        let mut number = |program: &Program, index: usize| -> Result<Option<i64>> {
            let Some(name) = step.input(index) else { return Ok(None) };
            let value = known(program, name).and_then(|v| v.first().copied());
            value.map(Some).ok_or_else(|| step.refuse("a position in a sequence depends on the data"))
        };
        let identity = |from: &str| step.derive(node("Identity", &[from], &[to], Vec::new()));
        let made = match step.op() {
            "SequenceEmpty" => Vec::new(),
            "SequenceConstruct" => step.node.input.clone(),
            "SequenceInsert" => {
                let mut list = self.list(&step)?;
                let at = number(program, 2)?.unwrap_or(list.len() as i64);
                let at = position(&step, at, list.len(), true)?;
                let Some(new) = step.input(1) else { return Err(step.refuse("it inserts nothing")) };
                list.insert(at, new.to_owned());
                list
            }
            "SequenceErase" => {
                let mut list = self.list(&step)?;
                let at = number(program, 1)?.unwrap_or(list.len() as i64 - 1);
                list.remove(position(&step, at, list.len(), false)?);
                list
            }
            "SplitToSequence" => return self.split(program, &step, to, known).map(Some),
            "SequenceAt" => {
                let list = self.list(&step)?;
                let at = number(program, 1)?.unwrap_or(0);
                return Ok(Some(vec![identity(&list[position(&step, at, list.len(), false)?])]));
            }
            "SequenceLength" => {
                let length = Tensor::from_i64(&[], &[self.list(&step)?.len() as i64]);
                program.constants.insert(to.to_owned(), Constant::Plain(length));
                return Ok(Some(Vec::new()));
            }
            "ConcatFromSequence" => {
                let list = self.list(&step)?;
                if list.is_empty() {
                    return Err(step.refuse("it concatenates an empty sequence"));
                }
                let new = step.int("new_axis").unwrap_or(0) != 0;
                return Ok(Some(stack(program, &step, &list, to, step.int("axis").unwrap_or(0), new)));
            }
            "OptionalHasElement" => {
                let has = step.input(0).is_some();
                let has = Tensor::new(DataType::Bool, &[], vec![u8::from(has)]);
                program.constants.insert(to.to_owned(), Constant::Plain(has));
                return Ok(Some(Vec::new()));
            }
            // An optional that has something is that thing.
            _ => match step.input(0) {
                Some(from) => match self.0.get(from) {
                    Some(list) => list.clone(),
                    None => return Ok(Some(vec![identity(from)])),
                },
                None => return Err(step.refuse("it makes an optional that has nothing")),
            },
        };
        if made.len() > MAX_LENGTH {
            return Err(step.refuse(format!("a sequence of more than {MAX_LENGTH} tensors")));
        }
        self.0.insert(to.to_owned(), made);
        Ok(Some(Vec::new()))
    }

    fn list(&self, step: &Step) -> Result<Vec<String>> {
        let list = step.input(0).and_then(|name| self.0.get(name)).cloned();
        list.ok_or_else(|| step.refuse("it takes a sequence whose length depends on the data"))
    }

    fn split(&mut self, program: &mut Program, step: &Step, to: &str, known: &mut Known<'_>) -> Result<Vec<Step>> {
        let Some(from) = step.input(0) else { return Err(step.refuse("it splits nothing")) };
        let shape = program.fresh(&format!("{from}/shape"));
        let mut asked = program.clone();
        asked.steps.push(step.derive(node("Shape", &[from], &[&shape], Vec::new())));
        let Some(shape) = known(&asked, &shape) else {
            return Err(step.refuse("the shape of what it splits depends on the data"));
        };
        let axis = step.int("axis").unwrap_or(0);
        let axis = if axis < 0 { axis.saturating_add(shape.len() as i64) } else { axis };
        let Some(&size) = usize::try_from(axis).ok().and_then(|at| shape.get(at)) else {
            return Err(step.refuse(format!("it splits axis {axis} of {shape:?}")));
        };
        let whole = step.input(1).is_none();
        let mut sizes = match step.input(1) {
            None => vec![1],
            Some(name) => known(program, name).ok_or_else(|| step.refuse("how it splits depends on the data"))?,
        };
        let scalar = match step.input(1).and_then(|name| program.tensor(name)) {
            Some(tensor) => tensor.dims().is_empty(),
            None => whole,
        };
        if scalar || sizes.len() == 1 && sizes[0] != size {
            let part = sizes.first().copied().unwrap_or(0);
            if part <= 0 || size / part > MAX_LENGTH as i64 {
                return Err(step.refuse(format!("it splits {size} into parts of {part}")));
            }
            sizes = (0..size).step_by(part as usize).map(|start| part.min(size - start)).collect();
        }
        if sizes.is_empty() || sizes.iter().any(|&s| s < 0) || sizes.iter().sum::<i64>() != size {
            return Err(step.refuse(format!("it splits {size} into {sizes:?}")));
        }
        let squeezed = whole && step.int("keepdims").unwrap_or(1) == 0;
        let mut steps = Vec::new();
        let mut list = Vec::new();
        let mut start = 0;
        for part in sizes {
            let name = program.fresh(&format!("{to}/part"));
            let bound = |program: &mut Program, value: i64| {
                program.add_constant("bound", Constant::Plain(Tensor::from_i64(&[1], &[value])))
            };
            if step.opset < 10 {
                return Err(step.refuse("sequences before opset 11"));
            }
            let bounds = [start, start + part, axis].map(|value| bound(program, value));
            steps.push(step.derive(node("Slice", &[from, &bounds[0], &bounds[1], &bounds[2]], &[&name], Vec::new())));
            start += part;
            if squeezed {
                let flat = program.fresh(&format!("{to}/part"));
                steps.push(unsqueeze(program, step, "Squeeze", &name, &flat, axis));
                list.push(flat);
            } else {
                list.push(name);
            }
        }
        self.0.insert(to.to_owned(), list);
        Ok(steps)
    }

    /// That no sequence is left where only tensors can be.
    ///
    /// # Errors
    /// A graph output or an operator's input that is a sequence.
    pub fn check(&self, program: &Program) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        for step in &program.steps {
            if let Some(name) = step.node.input.iter().find(|name| self.0.contains_key(*name)) {
                return Err(step.refuse("sequences as inputs of it are not implemented").at_value(name));
            }
        }
        match program.outputs.iter().find(|o| self.0.contains_key(&o.name)) {
            Some(output) => Err(super::program::refusal("an output is a sequence").at_value(&output.name)),
            None => Ok(()),
        }
    }
}

/// A position that may be counted from the end; `end` allows the one behind the last.
fn position(step: &Step, at: i64, len: usize, end: bool) -> Result<usize> {
    let from_start = if at < 0 { at.saturating_add(len as i64) } else { at };
    let limit = len + usize::from(end);
    let found = usize::try_from(from_start).ok().filter(|&at| at < limit);
    found.ok_or_else(|| step.refuse(format!("position {at} of a sequence of {len}")))
}
