//! Runs passes and verifies what each leaves; reads lists of their names.

use std::ops::ControlFlow;

use super::recipes::all;
use super::{Context, Outcome, Pass};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Scratch, verify};
use crate::nearest::nearest;

/// What is called after each pass, with the model, the name of the pass and what it did; may stop what runs.
pub type After<'a> = dyn Fn(&Model, &str, &Outcome) -> Result<ControlFlow<()>> + 'a;

/// The same for those who keep what they are told.
pub type AfterMut<'a> = &'a mut dyn FnMut(&Model, &str, &Outcome) -> Result<ControlFlow<()>>;

/// Runs one pass and verifies the model.
///
/// # Errors
/// The pass fails, leaves an invalid model ([`Kind::Internal`]), or shows that the model was invalid ([`Kind::Model`]). The pass is named, unless the command line is wrong.
pub fn apply(model: &mut Model, pass: &dyn Pass, context: &Context<'_>) -> Result<Outcome> {
    let name = pass.name();
    let named = |e: Error| if e.kind() == Kind::Usage { e } else { e.in_pass(name) };
    let undeclared = verify::undeclared(model);
    let outcome = pass.run(model, context).map_err(named)?;
    model.scratch().map_or(Ok(()), Scratch::check)?;
    verify::verify_change(model, &undeclared).map_err(|e| e.in_pass(name))?;
    Ok(outcome)
}

/// Runs `passes` in turn, and hands the model to `after` behind each, with the pass's name and outcome; `after` may stop the
/// run.
///
/// # Errors
/// As [`apply`], or `after` fails. The pass is named.
pub fn run(
    model: &mut Model,
    passes: &[&dyn Pass],
    context: &Context<'_>,
    after: AfterMut<'_>,
) -> Result<ControlFlow<()>> {
    for pass in passes {
        let outcome = apply(model, *pass, context)?;
        if after(model, pass.name(), &outcome).map_err(|e| e.in_pass(pass.name()))?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Reads a comma-separated list of pass names; blanks around names are ignored, and an empty list is no pass.
///
/// # Errors
/// [`Kind::Usage`] for a name that is no pass, with the nearest that is.
pub fn parse_pipeline(text: &str) -> Result<Vec<&'static dyn Pass>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let known = all();
    text.split(',').map(str::trim).map(|name| find(&known, name)).collect()
}

fn find(known: &[&'static dyn Pass], name: &str) -> Result<&'static dyn Pass> {
    if let Some(&pass) = known.iter().find(|pass| pass.name() == name) {
        return Ok(pass);
    }
    let names: Vec<&str> = known.iter().map(|pass| pass.name()).collect();
    let error = Error::new(Kind::Usage, format!("there is no pass \"{name}\""));
    Err(match nearest(name, names.iter().copied()) {
        Some(meant) => error.with_hint(format!("did you mean \"{meant}\"?")),
        None => error.with_hint(format!("the passes are {}", names.join(", "))),
    })
}
