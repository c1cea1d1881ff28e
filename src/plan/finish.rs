//! From what is asked of each value to the pairs that serve it.

use std::collections::{BTreeMap, BTreeSet};

use petgraph::unionfind::UnionFind;

use super::form::is_bytes;
use super::place::Sum;
use super::planner::{Kindness, Planner, Read, Want};
use super::site::Refusal;
use super::{Activation, Mode, Plan, Readers, SCHEMA, Scheme, Slot, Token, Weight};
use crate::config::rules::{Resolved, Rule};
use crate::config::spec::{Dtype, Field};
use crate::config::{SiteKind, Spec, Tensor as ByHand};
use crate::error::{Error, Kind, Result};
use crate::ir::{NodeId, User, ValueId};
use crate::numerics::{Format, Granularity};
use crate::ops::{self, Channel, Output};
use crate::reason::Reason;

/// The values that share one scale, and what is asked of them together.
struct Group {
    ask: Resolved,
    /// The pair that the scale is named after: that of the first value in the model.
    leader: ValueId,
    /// Where errors point.
    site: String,
    kind: SiteKind,
}

/// Readers of one value that take one pair.
struct Pair<'a> {
    ask: Resolved,
    mode: Mode,
    why: &'a Reason,
    slots: BTreeSet<(NodeId, usize)>,
    site: String,
}

impl Planner<'_> {
    /// Writes the plan.
    ///
    /// `nodes` are those of the main graph, `all` those of its bodies as well.
    pub(super) fn finish(mut self, opset: i64, nodes: &[NodeId], all: &[NodeId]) -> Result<Plan> {
        self.pairs = self.activations()?;
        for (name, pair) in &self.pairs {
            let Readers::Listed(slots) = &pair.readers else { continue };
            for slot in slots {
                self.listed.entry(slot.clone()).or_insert_with(|| name.clone());
            }
        }
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        let mut sums = Vec::new();
        for &node in all {
            if let Some(&kind) = self.quantized.get(&node) {
                let first = weights.len();
                self.constants(node, kind, &mut weights, &mut biases)?;
                if kind == Kindness::Integer {
                    match self.place.sum(&self, node, first, &weights) {
                        Sum::AsItIs => {}
                        Sum::Bias(bias) => biases.push(bias),
                        Sum::Apart(add) => sums.push(add),
                    }
                }
            }
        }
        let weighted: BTreeSet<&str> = weights.iter().map(|w| w.at.node.as_str()).collect();
        let read = |&node: &NodeId| {
            let &(input, eps) = self.tokens.get(&node)?;
            let at = self.slot(node, input);
            weighted.contains(&*at.node).then(|| Token { site: self.site(node, SiteKind::Input), at, eps })
        };
        let tokens: Vec<Token> = all.iter().filter_map(read).collect();
        let splits = super::constants::splits(&weights);
        let skipped = self.skipped(nodes, all, &weights, &biases);
        let corrections = self.corrections(&weights);
        let opset = self.needed(opset, &self.pairs, &weights)?;
        let mut plan = Plan {
            schema: SCHEMA,
            target: self.target.name.clone(),
            opset,
            float32: self.float32,
            simulate: self.target.simulate,
            smoothing: self.knowledge.smoothing.clone(),
            activations: std::mem::take(&mut self.pairs),
            weights,
            corrections,
            biases,
            sums,
            barriers: Vec::new(),
            tokens,
            splits,
            skipped,
        };
        if !plan.simulate {
            plan.barriers = self.place.barriers(&self, nodes, &plan);
            plan.opset = plan.barriers.iter().map(|barrier| barrier.stop.opset()).fold(plan.opset, i64::max);
        }
        self.refuse_idle_rules(all, &plan)?;
        Ok(plan)
    }

    /// The opset that the plan needs.
    fn needed(&self, opset: i64, activations: &BTreeMap<String, Activation>, weights: &[Weight]) -> Result<i64> {
        if activations.is_empty() && weights.is_empty() {
            return Ok(self.model.opset().unwrap_or(0));
        }
        let weights = weights.iter().filter(|w| !is_bytes(self.model, w)).map(Weight::since);
        let needs = activations.values().map(|a| a.quantizer.since()).chain(weights);
        let (needed, name) = needs.map(|(opset, _, name)| (opset, name)).max().unwrap_or((opset, ""));
        if self.target.simulate {
            return Ok(opset);
        }
        if needed > self.target.opset_max {
            return Err(Error::new(
                Kind::Config,
                format!(
                    "{name} needs opset {needed}; target {} loads at most {}",
                    self.target.name, self.target.opset_max
                ),
            )
            .with_hint("choose another format, or another --target"));
        }
        Ok(needed.max(opset))
    }

    fn activations(&self) -> Result<BTreeMap<String, Activation>> {
        let groups = self.groups()?;
        let mut made: BTreeMap<String, Activation> = BTreeMap::new();
        for (&value, want) in &self.wants {
            let group = &groups[&value];
            let tensor = self.name(value);
            let primary = self.primary(value, want, group)?;
            let mut pairs: Vec<(String, Activation)> = Vec::new();
            let Primary { activation, others } = primary;
            let dtype = activation.as_ref().map(|a| a.quantizer.dtype);
            let produced = want.made.is_some();
            if let Some(activation) = activation {
                pairs.push((tensor.clone(), activation));
            }
            for pair in others {
                let (mut quantizer, run_time) =
                    settle(self.reader(&pair.site, SiteKind::Input, &pair.ask).activation())?;
                if pair.mode == Mode::Dynamic && !run_time {
                    quantizer = Scheme::new(Format::Uint8, false, Granularity::PerTensor);
                }
                if pair.mode == Mode::Static {
                    quantizer = self.by_hand(Some(value), quantizer)?;
                }
                let name =
                    if pairs.is_empty() { tensor.clone() } else { self.free_name(&tensor, &pair, &made, &pairs) };
                let activation = Activation {
                    tensor: (name != tensor).then(|| tensor.clone()),
                    quantizer,
                    mode: pair.mode,
                    converts: (produced && dtype.is_some()).then(|| tensor.clone()),
                    scale_of: name.clone(),
                    range: self.fixed_range(value),
                    readers: Readers::Listed(self.slots(&pair.slots)),
                    fence: !produced && self.place.fence(self, value),
                    why: pair.why.clone(),
                };
                pairs.push((name, activation));
            }
            made.extend(pairs);
        }
        Ok(made)
    }

    /// A name for a further pair on one tensor.
    fn free_name(
        &self,
        tensor: &str,
        pair: &Pair<'_>,
        made: &BTreeMap<String, Activation>,
        pairs: &[(String, Activation)],
    ) -> String {
        let format = match pair.mode {
            Mode::Dynamic => "dynamic".to_owned(),
            Mode::Static => pair.ask.spec.dtype.map_or_else(String::new, |d| d.to_string()),
        };
        let base = format!("{tensor}_as_{format}");
        let taken = |name: &str| {
            made.contains_key(name) || pairs.iter().any(|(n, _)| n == name) || self.model.value_named(name).is_some()
        };
        let mut name = base.clone();
        let mut number = 2;
        while taken(&name) {
            name = format!("{base}_{number}");
            number += 1;
        }
        name
    }

    fn slots(&self, slots: &BTreeSet<(NodeId, usize)>) -> Vec<Slot> {
        slots.iter().map(|&(n, i)| self.slot(n, i)).collect()
    }

    fn fixed_range(&self, value: ValueId) -> Option<(f32, f32)> {
        self.model.producer(value).and_then(|p| ops::of(self.model, p)).and_then(|r| match r.output {
            Output::Range(low, high) => Some((low, high)),
            _ => None,
        })
    }

    /// The pair that has the tensor's own name, and the readers that want another one.
    fn primary<'w>(&self, value: ValueId, want: &'w Want, group: &Group) -> Result<Primary<'w>> {
        let dtype = group.ask.spec.dtype;
        let mut others: Vec<Pair<'w>> = Vec::new();
        let mut own = BTreeSet::new();
        let mut first: Option<&Read> = None;
        for ((node, index), read) in &want.reads {
            let fits = read.mode == Mode::Static && (read.adopts || read.ask.spec.dtype == dtype);
            if fits {
                own.insert((*node, *index));
                first.get_or_insert(read);
                continue;
            }
            match others.iter_mut().find(|p| p.mode == read.mode && p.ask.spec.dtype == read.ask.spec.dtype) {
                Some(pair) => {
                    pair.ask.strengthen(&read.ask);
                    pair.slots.insert((*node, *index));
                }
                None => others.push(Pair {
                    ask: read.ask.clone(),
                    mode: read.mode,
                    why: &read.why,
                    slots: BTreeSet::from([(*node, *index)]),
                    site: self.site(*node, SiteKind::Input),
                }),
            }
        }
        let produced = want.made.as_ref();
        if produced.is_none() && own.is_empty() {
            return Ok(Primary { activation: None, others });
        }
        let reader = self.reader(&group.site, group.kind, &group.ask);
        let (quantizer, _) = settle(reader.activation())?;
        let readers = if produced.is_some() { Readers::All } else { Readers::Listed(self.slots(&own)) };
        let why = produced.map(|m| &m.why).or(first.map(|r| &r.why)).cloned().unwrap_or(Reason::NotAsked);
        let activation = Activation {
            tensor: None,
            quantizer: self.by_hand(Some(value), quantizer)?,
            mode: Mode::Static,
            converts: None,
            scale_of: self.name(group.leader),
            range: self.fixed_range(value),
            readers,
            fence: self.place.fence(self, value),
            why,
        };
        Ok(Primary { activation: Some(activation), others })
    }

    /// The group of each wanted value: those that operators which move codes connect.
    fn groups(&self) -> Result<BTreeMap<ValueId, Group>> {
        let mut groups = BTreeMap::new();
        for (source, values) in self.sharing() {
            let want = &self.wants[&source];
            let statics = || want.reads.iter().filter(|(_, r)| r.mode == Mode::Static);
            let first = statics().find(|(_, r)| !r.adopts).or_else(|| statics().next()).or(want.reads.first());
            let (mut ask, node, kind) = if let Some(made) = &want.made {
                (made.ask.clone(), self.model.producer(source), SiteKind::Output)
            } else if let Some(((node, _), read)) = first {
                (read.ask.clone(), Some(*node), SiteKind::Input)
            } else {
                (Resolved::default(), None, SiteKind::Input)
            };
            let dtype = ask.spec.dtype;
            for value in &values {
                let want = &self.wants[value];
                for (_, read) in want.reads.iter().filter(|(_, r)| r.mode == Mode::Static && r.ask.spec.dtype == dtype)
                {
                    ask.strengthen(&read.ask);
                }
                if let Some(made) = want.made.as_ref().filter(|m| m.keeps.is_some() && m.ask.spec.dtype == dtype) {
                    ask.strengthen(&made.ask);
                }
                self.refuse_other_format(*value, want, dtype)?;
            }
            // A pair that serves inputs and an output is one that an output can have.
            ask.spec.dynamic = None;
            ask.spec.enable = None;
            let leader = values.iter().copied().min().unwrap_or(source);
            let site = node.map_or_else(String::new, |n| self.site(n, kind));
            for value in values {
                groups.insert(value, Group { ask: ask.clone(), leader, site: site.clone(), kind });
            }
        }
        Ok(groups)
    }

    /// The values that share a scale, by the one that it comes from.
    fn sharing(&self) -> BTreeMap<ValueId, Vec<ValueId>> {
        let values: Vec<ValueId> = self.wants.keys().copied().collect();
        let kept: Vec<Option<usize>> =
            self.wants.values().map(|want| values.binary_search(&want.made.as_ref()?.keeps?).ok()).collect();
        let mut sets = UnionFind::new(values.len());
        for (at, kept) in kept.iter().enumerate() {
            if let Some(input) = kept {
                sets.union(at, *input);
            }
        }
        let mut members: BTreeMap<usize, (Option<ValueId>, Vec<ValueId>)> = BTreeMap::new();
        for (at, &value) in values.iter().enumerate() {
            let (source, all) = members.entry(sets.find_mut(at)).or_default();
            all.push(value);
            if kept[at].is_none() {
                *source = Some(value);
            }
        }
        members.into_values().filter_map(|(source, all)| Some((source?, all))).collect()
    }

    /// An operator that moves codes has no format of its own.
    fn refuse_other_format(&self, value: ValueId, want: &Want, dtype: Option<Dtype>) -> Result<()> {
        let kept = want
            .made
            .iter()
            .filter(|m| m.keeps.is_some())
            .filter_map(|m| Some((self.model.producer(value)?, &m.ask, "output")));
        let read = want.reads.iter().filter(|(_, r)| r.adopts).map(|((node, _), r)| (*node, &r.ask, "input"));
        for (node, ask, kind) in kept.chain(read) {
            let Some(rule) = self.rules.rule(ask, Field::Dtype).filter(|r| r.is_named()) else { continue };
            if ask.spec.dtype == dtype {
                continue;
            }
            let op = self.model.node(node).op_type();
            let key = format!("{kind}.dtype");
            let has = dtype.map_or_else(String::new, |d| d.to_string());
            let message = format!(
                "{}, {key}: a {op} only moves quantized values; its format is that of its input, {has}",
                rule.label
            );
            return Err(rule
                .origin
                .at(Error::new(Kind::Config, message).at_node(self.model.node_name(node), op), &key)
                .with_hint("set the format where the tensor is computed"));
        }
        Ok(())
    }

    /// A rule about certain sites that nothing follows from is a mistake: none of them is quantized.
    fn refuse_idle_rules(&self, nodes: &[NodeId], plan: &Plan) -> Result<()> {
        if !self.knowledge.vetoes.is_empty() {
            return Ok(());
        }
        if self.knowledge.calibrated {
            self.refuse_idle_numbers(plan)?;
        }
        let planned = self.planned(plan);
        for rule in self.rules.all().iter().filter(|r| r.is_named() && !r.optional) {
            for kind in SiteKind::ALL {
                let Some(spec) = rule.level.spec(kind) else { continue };
                let says = says(spec);
                if kind == SiteKind::Input && says && spec.enable != Some(false) && !rule.any_kind && !rule.preset {
                    self.refuse_tables(nodes, rule)?;
                }
                let needs_samples = matches!(kind, SiteKind::Input | SiteKind::Output | SiteKind::Bias);
                let waits = needs_samples && !self.knowledge.calibrated && spec.dynamic != Some(true);
                if !(says || spec.enable == Some(true)) || spec.enable == Some(false) || waits {
                    continue;
                }
                let about =
                    |n: NodeId, kind| rule.is_about(self.model.node_name(n), self.model.node(n).op_type(), kind);
                let matched = || nodes.iter().copied().filter(|&n| about(n, kind) && !self.ask(n, kind).is_off());
                if matched().any(|n| planned.contains(&(n, kind))) || matched().next().is_none() {
                    continue;
                }
                let served = |kind| nodes.iter().any(|&n| about(n, kind) && planned.contains(&(n, kind)));
                if rule.any_kind && SiteKind::ALL.into_iter().any(served) {
                    break;
                }
                let reason = matched().find_map(|n| Some((n, self.reasons.get(&n).or_else(|| self.notes.get(&n))?)));
                return Err(self.idle(rule, kind, spec, reason));
            }
        }
        Ok(())
    }

    /// A rule that nothing follows from, with the reason of one node that it is about.
    fn idle(&self, rule: &Rule, kind: SiteKind, spec: &Spec, reason: Option<(NodeId, &Reason)>) -> Error {
        let key = kind.name();
        let message = format!("{} sets how {key}s are quantized, but no matching {key} is quantized", rule.label);
        let error = rule.origin.at(Error::new(Kind::Config, message), key);
        let Some((node, why)) = reason else {
            return error.with_hint(format!("add {key}.enable = true to quantize it there, or remove it"));
        };
        let way = match spec.enable {
            Some(true) => "it cannot be done".to_owned(),
            _ => format!("{key}.enable = true asks for it anyway, where that is possible"),
        };
        error.at_node(self.model.node_name(node), self.model.node(node).op_type()).with_hint(format!("{why}; {way}"))
    }

    /// So is a rule about the inputs of embeddings alone: these read rows of a constant by their indices.
    fn refuse_tables(&self, nodes: &[NodeId], rule: &Rule) -> Result<()> {
        let about = |&n: &NodeId| {
            let op = self.model.node(n).op_type();
            rule.is_about(self.model.node_name(n), op, SiteKind::Input)
        };
        let is_table = |n: NodeId| ops::constant_weight(self.model, n, 0) == Some(Channel::Rows);
        let mut matched = nodes.iter().copied().filter(about).peekable();
        let Some(&first) = matched.peek() else { return Ok(()) };
        if !matched.all(is_table) {
            return Ok(());
        }
        let message = format!(
            "{} sets how inputs are quantized, but it matches only embedding lookups, whose inputs are indices",
            rule.label
        );
        let error = rule.origin.at(Error::new(Kind::Config, message), SiteKind::Input.name());
        Err(error
            .at_node(self.model.node_name(first), self.model.node(first).op_type())
            .with_hint("indices stay integers; the table is the weight"))
    }

    /// So is what is said of a tensor that stays float.
    fn refuse_idle_numbers(&self, plan: &Plan) -> Result<()> {
        let says = |t: &ByHand| !t.optional && (t.range.is_some() || t.scale.is_some() || t.spec() != Spec::default());
        let activations = plan.activations.iter().map(|(pair, a)| a.tensor.as_ref().unwrap_or(pair));
        let quantized: BTreeSet<&String> = activations.chain(plan.weights.iter().map(|w| &w.tensor)).collect();
        for (name, by_hand) in self.config.tensor.iter().filter(|(_, t)| says(t)) {
            let used = by_hand.enable != Some(false) && quantized.contains(name);
            if !used {
                let error = self.config.error(
                    &format!("tensor.{name}"),
                    "it sets how a tensor is quantized, but the tensor stays in float",
                );
                return Err(error.at_value(name).with_hint(format!(
                    "remove [tensor.\"{name}\"]; `amax explain MODEL '{name}'` says why it stays float"
                )));
            }
        }
        Ok(())
    }

    /// The sites that the plan quantizes.
    fn planned(&self, plan: &Plan) -> BTreeSet<(NodeId, SiteKind)> {
        let mut planned: BTreeSet<(NodeId, SiteKind)> =
            self.tokens.keys().map(|&node| (node, SiteKind::Input)).collect();
        for (&value, want) in &self.wants {
            for ((node, _), _) in &want.reads {
                planned.insert((*node, SiteKind::Input));
            }
            if want.made.is_some() {
                let mut node = self.model.producer(value);
                // What vanishes into the quantizer, and what is before it.
                while let Some(n) = node {
                    planned.insert((n, SiteKind::Output));
                    let at = self.model.node(n);
                    let absorbed = at.domain().is_empty()
                        && self.target.absorb.has(at.op_type())
                        && !self.quantized.contains_key(&n);
                    node = if absorbed { at.input(0).and_then(|v| self.model.producer(v)) } else { None };
                }
                for &user in self.model.value(value).users() {
                    if let User::Node { node, .. } = user {
                        planned.insert((node, SiteKind::Input));
                    }
                }
            }
        }
        let producer = |slot: &Slot| self.model.producer_named(&slot.node);
        for weight in &plan.weights {
            planned.extend(producer(&weight.at).map(|n| {
                let operand = weight.site == self.site(n, SiteKind::Input);
                (n, if operand { SiteKind::Input } else { SiteKind::Weight })
            }));
        }
        planned
            .extend(plan.biases.iter().filter(|b| !b.float).filter_map(|b| Some((producer(&b.at)?, SiteKind::Bias))));
        planned
    }
}

struct Primary<'w> {
    activation: Option<Activation>,
    others: Vec<Pair<'w>>,
}

/// Whether a rule says how something is quantized, beyond that it is.
fn says(spec: &Spec) -> bool {
    Field::ALL.iter().any(|&f| f != Field::Enable && spec.written(f).is_some())
}

/// A refusal that comes this late is an error.
pub(super) fn settle<T>(outcome: Result<T, Refusal>) -> Result<T> {
    outcome.map_err(|refusal| match refusal {
        Refusal::Wrong(error) => error,
        Refusal::Unfit(why) => Error::new(Kind::Config, why.to_string()),
    })
}
