//! Takes quantizers out of a model that has them, by the names of their sites; the rest stays as it is.
//!
//! A site is `<node>.input`, `<node>.weight` or `<node>.bias` for a pair that the node reads through, and `<node>.output`
//! for one on what it gives. Without its pair a node reads the float tensor: the float weight, where the model still has
//! it, else the numbers that its codes stand for.

use super::support::evaluate::Constants;
use super::{Change, Context, Outcome, Pass};
use crate::config::Pattern;
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NodeId, ValueId};
use crate::nearest::nearest;
use crate::ops::{self, Role};
use crate::reason::{Operand, Reason};

/// Switches the sites that match on or off.
#[derive(Clone, Debug)]
pub struct Switch {
    /// On names of sites, or of nodes for all of theirs.
    pub pattern: Pattern,
    /// On takes back what an earlier switch took out.
    pub on: bool,
}

/// See the module. Does nothing where a conversion has no switches.
#[derive(Debug)]
pub struct SwitchQuantizers;

impl Pass for SwitchQuantizers {
    fn name(&self) -> &'static str {
        "switch-quantizers"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        switch(model, context.conversion.switches)
    }
}

/// A quantizer that one input of a node reads through.
struct Site {
    names: Vec<String>,
    node: NodeId,
    input: usize,
    pair: NodeId,
}

/// Takes out the pairs of every site that the last switch to match turns off.
///
/// # Errors
/// [`Kind::Usage`] for a switch that matches no quantizer.
fn switch(model: &mut Model, switches: &[Switch]) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    if switches.is_empty() {
        return Ok(outcome);
    }
    let mut constants = Constants::new(model, model.main());
    let sites = sites(model, &constants);
    for switch in switches {
        let matched = sites.iter().any(|s| s.names.iter().any(|n| matches(&switch.pattern, n)));
        if !matched {
            let option = if switch.on { "--enable" } else { "--disable" };
            let message = format!("{option}: \"{}\" matches no quantizer of the model", switch.pattern.text());
            let known = sites.iter().flat_map(|s| &s.names).map(String::as_str);
            return Err(match nearest(switch.pattern.text(), known) {
                Some(near) => Error::new(Kind::Usage, message).with_hint(format!("did you mean \"{near}\"?")),
                None => Error::new(Kind::Usage, message).with_hint(
                    "quantizers are named <node>.weight, .input, .bias and .output; what operators spell out is one once \
                     `amax convert` has folded it",
                ),
            });
        }
    }
    for site in sites {
        let Site { names, node, input, pair } = site;
        let last = switches.iter().rev().find_map(|switch| {
            let name = names.iter().find(|n| matches(&switch.pattern, n))?;
            Some((switch.on, name))
        });
        let Some((false, name)) = last else { continue };
        let change = if let Some(float) = source(model, pair) {
            model.set_input(node, input, Some(float));
            Change::PairRemoved
        } else {
            let Some(result) = model.node(pair).output(0) else { continue };
            let Some(tensor) = constants.value(model, result) else {
                outcome.skipped(name.clone(), Reason::NotComputable { what: Operand::Output });
                continue;
            };
            let name = format!("{}_float", model.value(result).name());
            let dtype = tensor.dtype();
            let float = model.add_initializer(model.main(), &name, tensor);
            model.set_input(node, input, Some(float));
            Change::Dequantized { dtype }
        };
        outcome.changed(name.clone(), change);
    }
    Ok(outcome)
}

/// Whether a pattern means a site: by its name, or by that of its node.
fn matches(pattern: &Pattern, site: &str) -> bool {
    let node = site.rsplit_once('.').map_or(site, |(node, _)| node);
    pattern.matches(site) || (!pattern.names_sites() && pattern.matches(node))
}

/// Every quantizer that a node of the main graph reads through.
fn sites(model: &Model, constants: &Constants) -> Vec<Site> {
    let mut found = Vec::new();
    for &node in model.graph(model.main()).nodes() {
        let slot = model.node(node);
        if slot.is("QuantizeLinear") || slot.is("DequantizeLinear") {
            continue;
        }
        for (input, value) in slot.inputs().iter().enumerate() {
            let Some(pair) = value.and_then(|v| model.producer(v)) else { continue };
            if !model.node(pair).is("DequantizeLinear") {
                continue;
            }
            let constant = value.is_some_and(|v| constants.derives(v));
            let role = ops::of(model, node).map_or(Role::Other, |row| row.role(input));
            let kind = match (constant, role) {
                (true, Role::Bias) => "bias",
                (true, _) => "weight",
                (false, _) => "input",
            };
            let mut names = vec![format!("{}.{kind}", model.node_name(node))];
            if let Some(producer) = source(model, pair).and_then(|v| model.producer(v)).filter(|_| !constant) {
                names.push(format!("{}.output", model.node_name(producer)));
            }
            found.push(Site { names, node, input, pair });
        }
    }
    found
}

/// The float tensor that a Dequantize node's codes were made from.
fn source(model: &Model, dequantize: NodeId) -> Option<ValueId> {
    let mut at = model.producer(model.node(dequantize).input(0)?)?;
    if model.node(at).is("Clip") {
        at = model.producer(model.node(at).input(0)?)?;
    }
    model.node(at).is("QuantizeLinear").then(|| model.node(at).input(0)).flatten()
}
