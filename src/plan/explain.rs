//! Why each site is what it is: the rules in order, what each changed, and what the plan made of it.

use serde::Serialize;

use super::skips::switched_off;
use super::{Activation, Mode, Plan, Readers, Scheme, Slot};
use crate::config::rules::Rules;
use crate::config::spec::Field;
use crate::config::{Config, Pattern, SiteKind};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NodeId, ValueId};
use crate::nearest::nearest;
use crate::ops::Form;
use crate::ops::{self, Channel, Role};
use crate::reason::Reason;
use crate::targets::Target;

/// One site and its story.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// `<node>.weight` and the like.
    pub site: String,
    /// Operator.
    pub op: String,
    /// The tensor there.
    pub tensor: String,
    /// What each rule said, the first one weakest.
    pub rules: Vec<Said>,
    /// What became of it.
    pub outcome: Outcome,
    /// Why.
    pub why: Reason,
}

/// What one rule said about a site.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Said {
    /// The rule: `[[layer]] "/head/*"`.
    pub rule: String,
    /// Each key that it set.
    pub changes: Vec<Change>,
}

/// A key that a rule set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Key.
    pub key: &'static str,
    /// What earlier rules said, as TOML writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// What this one says.
    pub to: String,
    /// File and line; empty for what is not in a file.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub at: String,
}

/// What became of a site.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It stays float.
    Float,
    /// It has a pair of its own or shares one.
    Quantized {
        /// How.
        quantizer: Box<Scheme>,
        /// Whether the scale is found at run time.
        dynamic: bool,
        /// The pair or constant whose scale it has, where that is another one.
        #[serde(skip_serializing_if = "Option::is_none")]
        scale_of: Option<String>,
        /// How a constant is stored.
        #[serde(skip_serializing_if = "Option::is_none")]
        form: Option<Form>,
        /// Why it is not stored in the form that was asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        gave_way: Option<Reason>,
    },
    /// It is an int32 bias at the product of two scales.
    Bias {
        /// The activation.
        activation: String,
        /// The weight's site.
        weight: String,
    },
}

/// Explains the sites that a pattern matches by the name of the node, the site or the tensor.
///
/// `plan` is the plan of the same model, configuration and target.
///
/// # Errors
/// What is wrong with the configuration, or a pattern that matches nothing.
pub fn explain(
    model: &Model,
    config: &Config,
    target: &Target,
    plan: &Plan,
    pattern: &Pattern,
) -> Result<Vec<Explanation>> {
    let rules = Rules::new(target, config)?;
    let explainer = Explainer { model, target, rules, plan };
    let nodes = model.nodes_outside_functions();
    let found: Vec<Explanation> = nodes.iter().flat_map(|&node| explainer.node(node, pattern)).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let error = Error::new(Kind::Usage, format!("\"{}\" matches no node, site or tensor with a site", pattern.text()));
    Err(match nearest(pattern.text(), nodes.iter().map(|&n| model.node_name(n))) {
        Some(name) => error.with_hint(format!("did you mean \"{name}\"? `amax inspect --nodes` lists names")),
        None => error.with_hint("`amax inspect --nodes` lists names"),
    })
}

struct Explainer<'a> {
    model: &'a Model,
    target: &'a Target,
    rules: Rules,
    plan: &'a Plan,
}

impl Explainer<'_> {
    fn node(&self, node: NodeId, pattern: &Pattern) -> Vec<Explanation> {
        let Some(row) = ops::of(self.model, node) else { return Vec::new() };
        let at = self.model.node(node);
        let name = self.model.node_name(node);
        let mut found = Vec::new();
        let mut add = |kind: SiteKind, value: ValueId, input: Option<usize>| {
            let site = format!("{name}.{}", kind.name());
            let tensor = self.model.value(value).name();
            if pattern.matches(name) || pattern.matches(&site) || pattern.matches(tensor) {
                found.push(self.site(node, kind, value, input));
            }
        };
        for (index, input) in at.inputs().iter().enumerate() {
            let Some(value) = *input else { continue };
            let constant = self.model.constant(value).is_some();
            match row.role(index) {
                Role::Weight(_) if constant => add(SiteKind::Weight, value, Some(index)),
                Role::Data | Role::Weight(_) => add(SiteKind::Input, value, Some(index)),
                Role::Bias if constant => add(SiteKind::Bias, value, Some(index)),
                Role::Bias | Role::Other => {}
            }
        }
        if let Some(output) = at.output(0) {
            add(SiteKind::Output, output, None);
        }
        found
    }

    fn site(&self, node: NodeId, kind: SiteKind, value: ValueId, input: Option<usize>) -> Explanation {
        let (name, op) = (self.model.node_name(node), self.model.node(node).op_type());
        let left = ops::constant_weight(self.model, node, 0) == Some(Channel::Left);
        let steps = self.rules.chain(name, op, kind, left, self.model.value(value).name());
        let rules = steps.into_iter().map(|step| {
            let rule = &self.rules.all()[step.rule];
            let changes = step.changes.into_iter().map(|(field, from, to)| Change {
                key: field.name(),
                from,
                to,
                at: rule.origin.place(&format!("{}.{}", kind.name(), field.name())),
            });
            Said { rule: rule.label.clone(), changes: changes.collect() }
        });
        let (outcome, why) = self.outcome(node, kind, value, input);
        Explanation {
            site: format!("{name}.{}", kind.name()),
            op: op.to_owned(),
            tensor: self.model.value(value).name().to_owned(),
            rules: rules.collect(),
            outcome,
            why,
        }
    }

    fn outcome(&self, node: NodeId, kind: SiteKind, value: ValueId, input: Option<usize>) -> (Outcome, Reason) {
        let first = self.model.node(node).outputs().iter().flatten().next();
        let producer = first.map(|&v| self.model.value(v).name().to_owned()).unwrap_or_default();
        let slot = input.map(|input| Slot { node: producer, input });
        let tensor = self.model.value(value).name();
        if let Some(weight) = self.plan.weights.iter().find(|w| Some(&w.at) == slot.as_ref()) {
            let outcome = Outcome::Quantized {
                quantizer: Box::new(weight.quantizer.clone()),
                dynamic: false,
                scale_of: None,
                form: Some(weight.form),
                gave_way: weight.gave_way.clone(),
            };
            return (outcome, weight.why.clone());
        }
        if let Some(bias) = self.plan.biases.iter().find(|b| Some(&b.at) == slot.as_ref() && !b.float) {
            let weight = self.plan.weights.get(bias.weight).map(|w| w.site.clone()).unwrap_or_default();
            return (Outcome::Bias { activation: bias.activation.clone(), weight }, Reason::AccumulatorScale);
        }
        let pair = match (kind, &slot) {
            (SiteKind::Input, Some(slot)) => self.read(tensor, slot),
            (SiteKind::Output, _) => self.made(node, value),
            _ => None,
        };
        match pair {
            Some((name, pair)) => {
                let outcome = Outcome::Quantized {
                    quantizer: Box::new(pair.quantizer.clone()),
                    dynamic: pair.mode == Mode::Dynamic,
                    scale_of: (pair.scale_of != name).then(|| pair.scale_of.clone()),
                    form: None,
                    gave_way: None,
                };
                (outcome, pair.why.clone())
            }
            None => (Outcome::Float, self.reason(node, kind)),
        }
    }

    /// The pair that an input reads.
    fn read(&self, tensor: &str, slot: &Slot) -> Option<(&str, &Activation)> {
        let listed = |a: &Activation| matches!(&a.readers, Readers::Listed(slots) if slots.contains(slot));
        let pairs = || self.plan.activations.iter().map(|(name, a)| (name.as_str(), a));
        pairs()
            .find(|(_, a)| listed(a))
            .or_else(|| pairs().find(|(name, a)| *name == tensor && a.readers == Readers::All))
    }

    /// The pair at the output of a node, or behind the operator that vanishes into it.
    fn made(&self, node: NodeId, output: ValueId) -> Option<(&str, &Activation)> {
        let own = |value: ValueId| {
            let pair = self.plan.activations.get_key_value(self.model.value(value).name())?;
            (pair.1.readers == Readers::All).then_some((pair.0.as_str(), pair.1))
        };
        own(output).or_else(|| {
            let integer = ops::of(self.model, node).is_some_and(|r| !self.target.absorb.has(r.op));
            let [crate::ir::User::Node { node: next, input: 0 }] = self.model.value(output).users() else {
                return None;
            };
            let vanishes = integer && self.target.absorb.has(self.model.node(*next).op_type());
            own(self.model.node(*next).output(0).filter(|_| vanishes)?)
        })
    }

    /// Why a site stays float.
    fn reason(&self, node: NodeId, kind: SiteKind) -> Reason {
        let (name, op) = (self.model.node_name(node), self.model.node(node).op_type());
        let asked = self.rules.site(name, op, kind, false);
        if asked.is_off() {
            return switched_off(self.rules.rule(&asked, Field::Enable));
        }
        // The weight of a node whose activations stay float says why they do.
        let site = format!("{name}.weight");
        let weight = self.plan.weights.iter().find(|w| w.site == site);
        if let Some(Reason::FloatWeight { because: Some(why), .. }) = weight.map(|w| &w.why) {
            return (**why).clone();
        }
        if let Some(skip) = self.plan.skipped.iter().find(|s| s.node == name && s.op == op) {
            return skip.why.clone();
        }
        let target = self.plan.target.clone();
        match kind {
            SiteKind::Output => Reason::OutputNotNeeded { target, op: op.to_owned() },
            SiteKind::Bias => Reason::FloatBias { target },
            SiteKind::Input | SiteKind::Weight => Reason::NotAsked,
        }
    }
}
