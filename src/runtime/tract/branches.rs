//! Control flow that is known before the run: `If` becomes the branch it takes, `Loop` its iterations one after another,
//! and sequences the tensors they consist of.

use std::collections::BTreeMap;

use super::constant::Constant;
use super::functions::rename;
use super::program::{MAX_STEPS, Program, Step, attr, node};
use super::sequences::Sequences;
use crate::error::Result;
use crate::ir::{Attr, Tensor};
use crate::onnx::{DataType, GraphProto, NodeProto, ValueInfoProto};
use crate::runtime::stop::is_stopped;

/// Returns the integers or booleans of a tensor, if that is possible without running the model. It may evaluate shapes.
pub(super) type Known<'a> = dyn FnMut(&Program, &str) -> Option<Vec<i64>> + 'a;

/// Rounds a loop may have.
const MAX_ROUNDS: usize = 10_000;
/// Attribute of a `Loop` that some rounds of were already taken out of.
const PEELED: &str = "amax.rounds";

/// Whether [`inline`] has anything to do in a program.
pub(super) fn has_control_flow(program: &Program) -> bool {
    program.steps.iter().any(|s| s.is("If") || s.is("Loop") || Sequences::concerns(s))
}

/// Takes control flow out of the main graph, wherever `known` can tell how it goes.
///
/// # Errors
/// Bodies with damaged tensors, loops that go on for too long or whose number of rounds is not known, and sequences that
/// are indexed by what only the run tells.
pub(super) fn inline(program: &mut Program, known: &mut Known<'_>) -> Result<()> {
    if !has_control_flow(program) {
        return Ok(());
    }
    let mut sequences = Sequences::default();
    let mut rounds: Vec<Rounds> = Vec::new();
    let mut at = 0;
    while at < program.steps.len() {
        let step = &program.steps[at];
        if step.is("If")
            && let Some(condition) = step.input(0)
            && let Some(taken) = known(program, condition).and_then(|v| Some(*v.first()? != 0))
        {
            let step = program.steps.remove(at);
            let steps = branch(program, &step, taken)?;
            program.steps.splice(at..at, steps);
        } else if step.is("Loop") {
            if is_stopped() {
                return Err(step.refuse("stopped"));
            }
            let step = step.clone();
            let steps = peel(program, &step, &mut rounds, known)?;
            program.steps.splice(at..=at, steps);
            if program.steps.len() > MAX_STEPS {
                return Err(step.refuse("unrolled it is too long"));
            }
        } else if let Some(steps) = sequences.resolve(program, at, known)? {
            program.steps.splice(at..=at, steps);
        } else {
            at += 1;
        }
    }
    sequences.check(program)
}

/// A body in place of the node it belongs to.
struct Inlined {
    steps: Vec<Step>,
    /// Names of its outputs.
    outputs: Vec<String>,
}

/// Puts fresh names into a body, except for those in `given`, which its inputs get.
fn instantiate(
    program: &mut Program,
    step: &Step,
    body: GraphProto,
    given: BTreeMap<String, String>,
) -> Result<Inlined> {
    let mut names = given;
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
    let mut steps = Vec::with_capacity(body.node.len());
    for mut inner in body.node {
        rename(&mut inner, &names);
        let name = match inner.name() {
            "" => inner.output.first().cloned().unwrap_or_default(),
            name => name.to_owned(),
        };
        let origin = (name, inner.op_type().to_owned());
        let inner = Step { node: inner, opset: step.opset, origin };
        match inner.constant()? {
            Some((name, tensor)) => {
                program.constants.insert(name, Constant::Plain(tensor));
            }
            None => steps.push(inner),
        }
    }
    let outputs = body.output.iter().map(|o| o.name.clone().unwrap_or_default());
    let outputs = outputs.map(|name| names.get(&name).cloned().unwrap_or(name)).collect();
    Ok(Inlined { steps, outputs })
}

fn body(step: &Step, name: &str) -> Result<GraphProto> {
    attr(&step.node, name).and_then(|a| a.g.clone()).ok_or_else(|| step.refuse(format!("it has no {name}")))
}

fn branch(program: &mut Program, step: &Step, taken: bool) -> Result<Vec<Step>> {
    let body = body(step, if taken { "then_branch" } else { "else_branch" })?;
    let Inlined { mut steps, outputs } = instantiate(program, step, body, BTreeMap::new())?;
    for (index, from) in outputs.iter().enumerate() {
        let Some(to) = step.output(index) else { continue };
        steps.push(step.derive(node("Identity", &[from], &[to], Vec::new())));
    }
    Ok(steps)
}

/// What the rounds of a loop that are already taken out of it leave behind.
struct Rounds {
    done: usize,
    /// For each scan output, the tensors of the rounds.
    scans: Vec<Vec<String>>,
}

/// Whether the condition that a body of a loop gives is the one that it gets.
fn passes_condition_on(body: &GraphProto) -> bool {
    let name = |info: &ValueInfoProto| info.name.clone().unwrap_or_default();
    let (Some(given), Some(mut result)) = (body.input.get(1).map(name), body.output.first().map(name)) else {
        return false;
    };
    while result != given {
        let maker = body.node.iter().find(|node| node.output.first() == Some(&result));
        let Some(node) = maker.filter(|node| node.op_type() == "Identity") else { return false };
        let Some(source) = node.input.first().filter(|source| **source != result) else { return false };
        result = source.clone();
    }
    true
}

/// The first round of a loop followed by a loop of the others, or what follows its last round.
fn peel(program: &mut Program, step: &Step, rounds: &mut Vec<Rounds>, known: &mut Known<'_>) -> Result<Vec<Step>> {
    let body = body(step, "body")?;
    let carried = step.node.input.len().saturating_sub(2);
    let Some(scans) = body.output.len().checked_sub(1 + carried) else {
        return Err(step.refuse("its body has fewer outputs than it carries values"));
    };
    if body.input.len() != 2 + carried {
        return Err(step.refuse("its body has another number of inputs than it carries values"));
    }
    let id = step.int(PEELED).and_then(|id| usize::try_from(id).ok()).filter(|&id| id < rounds.len());
    let id = id.unwrap_or_else(|| {
        rounds.push(Rounds { done: 0, scans: vec![Vec::new(); scans] });
        rounds.len() - 1
    });
    let done = rounds[id].done;
    let mut tell = |index: usize| -> Result<Option<i64>> {
        let Some(name) = step.input(index) else { return Ok(None) };
        let value = known(program, name).and_then(|v| v.first().copied());
        value.map(Some).ok_or_else(|| step.refuse("how many rounds it has depends on the data"))
    };
    let limit = tell(0)?;
    if limit.is_some_and(|limit| done as i64 >= limit) || tell(1)? == Some(0) {
        return finish(program, step, &rounds[id].scans, carried);
    }
    // Said before the rounds are unrolled, where no round can be the last one early.
    let endless = done == 0 && limit.is_none_or(|limit| limit > MAX_ROUNDS as i64) && passes_condition_on(&body);
    if endless || done >= MAX_ROUNDS {
        return Err(step.refuse(format!("it has more than {MAX_ROUNDS} rounds")));
    }
    let round = program.add_constant("round", Constant::Plain(Tensor::from_i64(&[], &[done as i64])));
    let yes = program.add_constant("round", Constant::Plain(Tensor::new(DataType::Bool, &[], vec![1])));
    let inputs = [round, yes].into_iter().chain(step.node.input.iter().skip(2).cloned());
    let given = body.input.iter().map(|i| i.name.clone().unwrap_or_default()).zip(inputs).collect();
    let Inlined { mut steps, mut outputs } = instantiate(program, step, body, given)?;
    let rounds = &mut rounds[id];
    rounds.done += 1;
    for (scan, name) in rounds.scans.iter_mut().zip(outputs.split_off(1 + carried)) {
        scan.push(name);
    }
    let mut rest = step.clone();
    rest.node.input.resize(1, String::new());
    rest.node.input.extend(outputs);
    rest.node.attribute.retain(|a| a.name.as_deref() != Some(PEELED));
    rest.node.attribute.push(Attr::int(PEELED, id as i64));
    steps.push(rest);
    Ok(steps)
}

/// What the outputs of a loop are after its last round.
fn finish(program: &mut Program, step: &Step, scans: &[Vec<String>], carried: usize) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for index in 0..carried {
        let (Some(to), Some(from)) = (step.output(index), step.input(2 + index)) else { continue };
        steps.push(step.derive(node("Identity", &[from], &[to], Vec::new())));
    }
    for (index, scan) in scans.iter().enumerate() {
        let Some(to) = step.output(carried + index) else { continue };
        if scan.is_empty() {
            return Err(step.refuse("it has no rounds, and an output that collects them"));
        }
        steps.extend(stack(program, step, scan, to, 0, true));
    }
    Ok(steps)
}

/// Concatenates tensors along an axis, along a new one if `new` says so.
pub(super) fn stack(program: &mut Program, step: &Step, parts: &[String], to: &str, axis: i64, new: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut parts = parts.to_vec();
    if new {
        for part in &mut parts {
            let name = program.fresh(&format!("{part}/unsqueezed"));
            steps.push(unsqueeze(program, step, "Unsqueeze", part, &name, axis));
            *part = name;
        }
    }
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    steps.push(step.derive(node("Concat", &parts, &[to], vec![Attr::int("axis", axis)])));
    steps
}

/// `Squeeze` or `Unsqueeze` of one axis, in the form of the step's opset.
pub(super) fn unsqueeze(program: &mut Program, step: &Step, op: &str, from: &str, to: &str, axis: i64) -> Step {
    let call: NodeProto = if step.opset < 13 {
        node(op, &[from], &[to], vec![Attr::ints("axes", &[axis])])
    } else {
        let axes = program.add_constant("axes", Constant::Plain(Tensor::from_i64(&[1], &[axis])));
        node(op, &[from, &axes], &[to], Vec::new())
    };
    step.derive(call)
}
