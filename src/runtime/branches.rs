//! Inlining of `If` nodes whose condition is known.

use std::collections::BTreeMap;

use super::constant::Constant;
use super::functions::rename;
use super::program::{Program, Step, attr, node};
use crate::error::Result;
use crate::ir::Tensor;

/// Replaces `If` nodes of the main graph by the branch they take, wherever `known` can tell it. `known` is given the
/// name of a condition; it may evaluate shapes. Returns whether anything changed.
///
/// # Errors
/// A branch with a damaged tensor.
pub(super) fn inline(program: &mut Program, known: &mut dyn FnMut(&Program, &str) -> Option<bool>) -> Result<bool> {
    let mut changed = false;
    let mut at = 0;
    while at < program.steps.len() {
        let step = &program.steps[at];
        let taken = if step.is("If") { step.input(0).and_then(|condition| known(program, condition)) } else { None };
        let Some(taken) = taken else {
            at += 1;
            continue;
        };
        let step = program.steps.remove(at);
        let steps = branch(program, &step, taken)?;
        program.steps.splice(at..at, steps);
        changed = true;
    }
    Ok(changed)
}

fn branch(program: &mut Program, step: &Step, taken: bool) -> Result<Vec<Step>> {
    let which = if taken { "then_branch" } else { "else_branch" };
    let Some(body) = attr(&step.node, which).and_then(|a| a.g.clone()) else {
        return Err(step.refuse(format!("it has no {which}")));
    };
    let mut names = BTreeMap::new();
    let own = body.initializer.iter().filter_map(|i| i.name.clone());
    let made = body.node.iter().flat_map(|n| n.output.iter().filter(|o| !o.is_empty()).cloned());
    for name in own.chain(made) {
        let fresh = program.fresh(&name);
        names.insert(name, fresh);
    }
    for tensor in body.initializer {
        let name = tensor.name.clone().unwrap_or_default();
        program.constants.insert(names[&name].clone(), Constant::Plain(Tensor::from_proto(tensor, None)?));
    }
    let mut steps = Vec::with_capacity(body.node.len() + body.output.len());
    for mut inner in body.node {
        rename(&mut inner, &names);
        let name = match inner.name() {
            "" => inner.output.first().cloned().unwrap_or_default(),
            name => name.to_owned(),
        };
        let origin = (name, inner.op_type().to_owned());
        steps.push(Step { node: inner, opset: step.opset, origin });
    }
    for (index, output) in body.output.iter().enumerate() {
        let (Some(to), Some(from)) = (step.output(index), output.name.as_deref()) else { continue };
        let from = names.get(from).map_or(from, String::as_str);
        steps.push(step.derive(node("Identity", &[from], &[to], Vec::new())));
    }
    Ok(steps)
}
