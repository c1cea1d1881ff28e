//! The levels of a configuration in order, and the result for one site.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Config, Level, Pattern, SiteKind, Source, Spec, presets};
use crate::document;
use crate::error::{Error, Kind, Result};
use crate::ir::Model;
use crate::nearest::nearest;
use crate::ops;
use crate::quant::algorithm::Algorithm;
use crate::targets::{BiasForm, Slot, Target};

use super::spec::{Dtype, Field, Form, Format, ObserverKind, ScaleDtype, ScaleType, Share};

/// One level: its keys, and the sites that they apply to.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Its label: `[[layer]] "/head/*"`.
    pub label: String,
    /// Where it was written.
    pub origin: Origin,
    /// The sites that it applies to.
    pub scope: Scope,
    /// Among these, only the nodes of these operators; all if empty.
    pub ops: Vec<String>,
    /// Whether it may match nothing.
    pub optional: bool,
    /// Whether it comes from a preset: keys that the target does not support are dropped.
    pub preset: bool,
    /// Whether it is for any kind of site that matches; a kind without a match is not an error.
    pub any_kind: bool,
    /// Its keys.
    pub level: Level,
}

/// Where a rule was written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Origin {
    source: Arc<Source>,
    path: String,
}

impl Origin {
    /// `amax.toml:12`, for the rule or one of its keys; empty if there is no file.
    #[must_use]
    pub fn place(&self, key: &str) -> String {
        let line = self.source.lines.of(&format!("{}.{key}", self.path));
        match (&self.source.file, line) {
            (Some(file), Some(line)) => format!("{}:{line}", file.display()),
            (Some(file), None) => file.display().to_string(),
            _ => String::new(),
        }
    }

    /// Adds the place of a key to an error.
    #[must_use]
    pub fn at(&self, error: Error, key: &str) -> Error {
        self.source.at(error, &format!("{}.{key}", self.path))
    }
}

impl Rule {
    /// Whether it applies to certain nodes or operators, rather than all.
    #[must_use]
    pub fn is_named(&self) -> bool {
        match &self.scope {
            Scope::All => false,
            Scope::Op(_) => true,
            Scope::Tensor(_) => !self.optional,
            Scope::Name(pattern) => {
                let text = pattern.text().trim_end_matches("_quantizer");
                let kinds = SiteKind::ALL.map(SiteKind::name);
                let node = kinds.iter().find_map(|kind| text.strip_suffix(kind)).unwrap_or(text).trim_end_matches('.');
                !node.chars().all(|c| c == '*')
            }
        }
    }

    /// Whether it applies to a site.
    #[must_use]
    pub fn is_about(&self, node: &str, op: &str, kind: SiteKind) -> bool {
        self.applies(&Names::new(node, kind), op)
    }
}

/// The sites that a rule applies to.
#[derive(Clone, Debug)]
pub enum Scope {
    /// Every node.
    All,
    /// The nodes of one operator.
    Op(String),
    /// Nodes and sites by name.
    Name(Pattern),
    /// All sites of one tensor.
    Tensor(String),
}

impl PartialEq for Scope {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::All, Self::All) => true,
            (Self::Op(a), Self::Op(b)) | (Self::Tensor(a), Self::Tensor(b)) => a == b,
            (Self::Name(a), Self::Name(b)) => a.text() == b.text(),
            _ => false,
        }
    }
}

/// The names of a site: that of its node, and its own in two spellings, `<node>.weight` and, as ModelOpt has it,
/// `<node>.weight_quantizer`.
struct Names<'a> {
    node: &'a str,
    site: String,
    quantizer: String,
}

impl<'a> Names<'a> {
    fn new(node: &'a str, kind: SiteKind) -> Self {
        let site = format!("{node}.{}", kind.name());
        Self { node, quantizer: format!("{site}_quantizer"), site }
    }

    fn matched_by(&self, pattern: &Pattern) -> bool {
        pattern.matches(self.node)
            || pattern.names_sites() && (pattern.matches(&self.site) || pattern.matches(&self.quantizer))
    }
}

impl Rule {
    fn applies(&self, names: &Names<'_>, op: &str) -> bool {
        let meant = match &self.scope {
            Scope::All => true,
            Scope::Op(name) => name == op,
            Scope::Name(pattern) => names.matched_by(pattern),
            // Sites do not know their tensors: see [`Rules::tensor`].
            Scope::Tensor(_) => false,
        };
        meant && (self.ops.is_empty() || self.ops.iter().any(|name| name == op))
    }
}

/// The keys of one site, and the rules that decided them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resolved {
    /// The keys that rules set.
    pub spec: Spec,
    /// For each key in the order of [`Field::ALL`], the index of the rule that decided it.
    from: Vec<Option<usize>>,
}

impl Resolved {
    /// Index of the rule that decided a key.
    #[must_use]
    pub fn from(&self, field: Field) -> Option<usize> {
        self.from.get(field as usize).copied().flatten()
    }

    /// Whether the site must stay float.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.spec.enable == Some(false)
    }

    /// For each key, takes the value of the other site if a later rule set it there.
    pub fn strengthen(&mut self, other: &Self) {
        self.from.resize(Field::ALL.len(), None);
        for (index, &field) in Field::ALL.iter().enumerate() {
            if other.from(field) > self.from(field) {
                self.spec.take(&other.spec, field);
                self.from[index] = other.from(field);
            }
        }
    }

    fn overlay(&mut self, spec: &Spec, rule: usize) {
        self.spec.overlay(spec);
        self.from.resize(Field::ALL.len(), None);
        for (&field, slot) in Field::ALL.iter().zip(&mut self.from) {
            if spec.written(field).is_some() {
                *slot = Some(rule);
            }
        }
    }
}

/// What one rule changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Index of the rule.
    pub rule: usize,
    /// Keys with the value before and after.
    pub changes: Vec<(Field, Option<String>, String)>,
}

/// All levels, the weakest first.
#[derive(Clone, Debug)]
pub struct Rules {
    all: Vec<Rule>,
    /// What [`Rules::site`] overlays: a rule's own spec with its `enable`.
    specs: Vec<[Option<Spec>; 4]>,
    /// The rules for single tensors.
    tensors: BTreeMap<String, usize>,
    left_weight: Spec,
    algorithm: Option<Algorithm>,
    pre_quant_opt: Vec<Algorithm>,
}

/// The rules of a preset, of which those that do not apply are no mistake.
fn from_preset(preset: &Config, name: &str) -> Result<Vec<Rule>> {
    let mut rules = from_document(preset, &format!("preset {name}: "))?;
    for rule in &mut rules {
        (rule.optional, rule.preset) = (true, true);
    }
    Ok(rules)
}

impl Rules {
    /// The levels of a configuration on a target.
    ///
    /// # Errors
    /// An unknown preset or operator, or a pattern that cannot be parsed.
    pub fn new(target: &Target, config: &Config) -> Result<Self> {
        let mut rules = vec![defaults(target)];
        let (mut algorithm, mut pre_quant_opt) = (config.algorithm.clone(), config.pre_quant_opt.clone());
        if let Some(name) = &config.preset {
            let preset = presets::load(name).map_err(|e| config.source.at(e, "preset"))?;
            rules.extend(from_preset(&preset, name)?);
            algorithm = algorithm.or(preset.algorithm);
            pre_quant_opt = if pre_quant_opt.is_empty() { preset.pre_quant_opt } else { pre_quant_opt };
        }
        rules.extend(match &config.source.preset {
            Some(name) => from_preset(config, name)?,
            None => from_document(config, "")?,
        });
        rules.extend(config.overrides.iter().cloned());
        let specs = rules.iter().map(|rule| SiteKind::ALL.map(|kind| effective(&rule.level, kind))).collect();
        let left_weight = weight_spec(target.left_weight.unwrap_or(target.weight));
        let tensor = |(index, rule): (usize, &Rule)| match &rule.scope {
            Scope::Tensor(name) => Some((name.clone(), index)),
            _ => None,
        };
        let tensors = rules.iter().enumerate().filter_map(tensor).collect();
        Ok(Self { all: rules, specs, tensors, left_weight, algorithm, pre_quant_opt })
    }

    /// The algorithm of the configuration, or of its preset.
    #[must_use]
    pub fn algorithm(&self) -> Option<&Algorithm> {
        self.algorithm.as_ref()
    }

    /// The algorithm for the weights of a node: that of the last rule which names one, or the one for all.
    #[must_use]
    pub fn algorithm_at(&self, node: &str, op: &str) -> Option<&Algorithm> {
        let names = Names::new(node, SiteKind::Weight);
        let rules = self.all.iter().rev().filter(|rule| rule.level.algorithm.is_some());
        let own = rules.into_iter().find(|rule| rule.applies(&names, op));
        own.and_then(|rule| rule.level.algorithm.as_ref()).or(self.algorithm.as_ref())
    }

    /// The algorithms for the float model, of the configuration or of its preset.
    #[must_use]
    pub fn pre_quant_opt(&self) -> &[Algorithm] {
        &self.pre_quant_opt
    }

    /// The rules, weakest first.
    #[must_use]
    pub fn all(&self) -> &[Rule] {
        &self.all
    }

    /// The rule that decided a key of a site.
    #[must_use]
    pub fn rule(&self, resolved: &Resolved, field: Field) -> Option<&Rule> {
        resolved.from(field).and_then(|index| self.all.get(index))
    }

    /// The keys of a site of a node. `left`: the weight is the left operand of a product.
    #[must_use]
    pub fn site(&self, node: &str, op: &str, kind: SiteKind, left: bool) -> Resolved {
        let mut resolved = Resolved::default();
        self.each(node, op, kind, left, |index, spec| resolved.overlay(spec, index));
        resolved
    }

    /// The keys of a tensor by its name, to overlay those of its sites.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<Resolved> {
        let index = *self.tensors.get(name)?;
        let mut resolved = Resolved::default();
        resolved.overlay(self.all[index].level.weight.as_ref()?, index);
        Some(resolved)
    }

    /// How a site came to its spec: each rule that changed something.
    #[must_use]
    pub fn chain(&self, node: &str, op: &str, kind: SiteKind, left: bool, tensor: &str) -> Vec<Step> {
        let mut spec = Spec::default();
        let mut steps = Vec::new();
        let mut step = |rule: usize, later: &Spec| {
            let said = Field::ALL.iter().filter_map(|&f| Some((f, later.written(f)?)));
            let changes: Vec<_> = said.map(|(f, new)| (f, spec.written(f), new)).collect();
            spec.overlay(later);
            if !changes.is_empty() {
                steps.push(Step { rule, changes });
            }
        };
        let mut by_name = self.tensors.get(tensor).copied();
        self.each(node, op, kind, left, |rule, later| {
            if let Some(index) = by_name.filter(|&index| index < rule).and_then(|_| by_name.take()) {
                step(index, self.all[index].level.weight.as_ref().unwrap_or(&Spec::default()));
            }
            step(rule, later);
        });
        if let Some(index) = by_name {
            step(index, self.all[index].level.weight.as_ref().unwrap_or(&Spec::default()));
        }
        steps
    }

    fn each(&self, node: &str, op: &str, kind: SiteKind, left: bool, mut found: impl FnMut(usize, &Spec)) {
        let slot = SiteKind::ALL.iter().position(|&k| k == kind).unwrap_or(0);
        let names = Names::new(node, kind);
        for (index, (rule, specs)) in self.all.iter().zip(&self.specs).enumerate() {
            let spec = if index == 0 && left && kind == SiteKind::Weight {
                Some(&self.left_weight)
            } else {
                specs[slot].as_ref()
            };
            let Some(spec) = spec.filter(|_| rule.applies(&names, op)) else { continue };
            // What is said of everything is meant for the operators that it can be meant for.
            let form = spec.form.filter(|f| f.serves(op));
            let level = spec.accuracy_level.filter(|_| Form::Matmulnbits.serves(op));
            if rule.is_named() || (form, level) == (spec.form, spec.accuracy_level) {
                found(index, spec);
            } else {
                found(index, &Spec { form, accuracy_level: level, ..spec.clone() });
            }
        }
    }

    /// Refuses patterns that match no node and no site of a model, and keys for kinds of sites that the pattern does
    /// not match.
    ///
    /// # Errors
    /// The first of them, with the nearest name.
    pub fn check(&self, model: &Model) -> Result<()> {
        let all = model.nodes_outside_functions();
        let nodes = || all.iter().map(|&n| (model.node_name(n), model.node(n).op_type()));
        for rule in self.all.iter().filter(|r| !r.optional) {
            let Scope::Name(pattern) = &rule.scope else { continue };
            let matches = |kind: SiteKind| nodes().any(|(node, op)| rule.applies(&Names::new(node, kind), op));
            if !SiteKind::ALL.into_iter().any(matches) {
                return Err(unmatched(rule, pattern, nodes().map(|(node, _)| node)));
            }
            let said = SiteKind::ALL.into_iter().filter(|&kind| rule.level.spec(kind).is_some());
            if let Some(kind) = said.into_iter().find(|&kind| !rule.any_kind && !matches(kind)) {
                let kind = kind.name();
                let message = format!("{} sets {kind} keys but matches no {kind}", rule.label);
                let hint =
                    "a pattern that ends in .weight matches weights only; the name of a node matches all its sites";
                return Err(rule.origin.at(Error::new(Kind::Config, message), kind).with_hint(hint));
            }
        }
        Ok(())
    }
}

fn unmatched<'a>(rule: &Rule, pattern: &Pattern, nodes: impl Iterator<Item = &'a str> + Clone) -> Error {
    let error = |message: String| rule.origin.at(Error::new(Kind::Config, message), "match");
    let sites = |node: &'a str| SiteKind::ALL.map(|kind| Names::new(node, kind));
    if !rule.ops.is_empty() && nodes.clone().any(|node| sites(node).iter().any(|names| names.matched_by(pattern))) {
        let ops = rule.ops.join(" or ");
        return error(format!("{} matches no {ops}", rule.label))
            .with_hint("it matches nodes of other operators: leave op_type out, or name those");
    }
    let error = error(format!("{} matches no node and no site", rule.label));
    let (node, site) = pattern.parts();
    if ops::find(node).is_some() && site.is_empty() {
        return error.with_hint(format!(
            "{node} is an operator: --set op_type.{node}.enable=false leaves all of its nodes in float"
        ));
    }
    match nearest(node, nodes) {
        Some(name) => error.with_hint(format!("did you mean \"{name}{site}\"? `amax inspect --nodes` lists them")),
        None => error.with_hint("`amax inspect --nodes` lists them"),
    }
}

/// A level's spec for one kind of site, with the level's `enable` if the spec has none.
fn effective(level: &Level, kind: SiteKind) -> Option<Spec> {
    let mut spec = level.spec(kind).cloned();
    if level.enable.is_some() {
        let spec = spec.get_or_insert_default();
        spec.enable = spec.enable.or(level.enable);
    }
    spec
}

fn activation_spec(slot: Slot) -> Spec {
    Spec {
        dtype: Some(slot.dtype.into()),
        granularity: Some(Share::PerTensor),
        symmetric: Some(slot.symmetric),
        dynamic: Some(false),
        observer: Some(ObserverKind::Minmax),
        scale_type: Some(ScaleType::Float),
        scale_dtype: Some(ScaleDtype::Float32),
        round: Some(crate::numerics::Round::HalfEven),
        reduce_range: Some(false),
        ..Spec::default()
    }
}

fn weight_spec(slot: Slot) -> Spec {
    let granularity = if slot.per_channel { Share::PerChannel } else { Share::PerTensor };
    Spec { granularity: Some(granularity), dynamic: None, ..activation_spec(slot) }
}

/// The target's defaults.
fn defaults(target: &Target) -> Rule {
    let bias = match target.bias {
        BiasForm::Int32 => Spec { dtype: Some(Dtype::Element(Format::Int32)), ..Spec::default() },
        BiasForm::Float => Spec { enable: Some(false), dtype: Some(Dtype::Element(Format::Int32)), ..Spec::default() },
    };
    Rule {
        label: format!("target {}", target.name),
        origin: Origin::default(),
        scope: Scope::All,
        ops: Vec::new(),
        optional: true,
        preset: false,
        any_kind: false,
        level: Level {
            enable: None,
            algorithm: None,
            input: Some(activation_spec(target.activation)),
            output: Some(activation_spec(target.activation)),
            weight: Some(weight_spec(target.weight)),
            bias: Some(bias),
        },
    }
}

/// The rules that a document contains, weakest first.
///
/// # Errors
/// An unknown operator, a pattern that cannot be parsed, a level that sets no key or contradicts itself.
pub(super) fn from_document(config: &Config, prefix: &str) -> Result<Vec<Rule>> {
    let source = Arc::new(config.source.clone());
    let rule = |path: String, label: String, scope: Scope, level: Level| -> Result<Rule> {
        let origin = Origin { source: source.clone(), path };
        level.validate().map_err(|(key, error)| origin.at(error, &key))?;
        let label = format!("{prefix}{label}");
        Ok(Rule { label, origin, scope, ops: Vec::new(), optional: true, preset: false, any_kind: false, level })
    };
    let mut rules = Vec::new();
    if let Some(level) = &config.default {
        rules.push(rule("default".into(), "[default]".into(), Scope::All, level.clone())?);
    }
    for (op, level) in &config.op_type {
        let path = format!("op_type.{op}");
        known_op(op).map_err(|e| config.source.at(e, &path))?;
        let rule = rule(path, format!("[op_type.{op}]"), Scope::Op(op.clone()), level.clone())?;
        rules.push(Rule { optional: false, ..rule });
    }
    for (index, layer) in config.layer.iter().enumerate() {
        let path = format!("layer.{index}");
        let at = |error: Error, key: &str| config.source.at(error, &format!("{path}.{key}"));
        let pattern = Pattern::new(&layer.pattern).map_err(|e| at(e, "match"))?;
        for (index, op) in layer.op_type.iter().enumerate() {
            known_op(op).map_err(|e| at(e, &format!("op_type.{index}")))?;
        }
        let label = format!("[[layer]] \"{}\"", layer.pattern);
        if layer.level() == Level::default() {
            return Err(at(Error::new(Kind::Config, format!("{label} sets no key")), "match")
                .with_hint("add enable = false, or weight.dtype = \"int4\", for example"));
        }
        let rule = rule(path.clone(), label, Scope::Name(pattern), layer.level())?;
        rules.push(Rule { ops: layer.op_type.clone(), optional: layer.optional, ..rule });
    }
    for (index, adjusted) in config.postprocess.iter().enumerate() {
        let path = format!("postprocess.{index}");
        let pattern = Pattern::new(&adjusted.pattern).map_err(|e| config.source.at(e, &format!("{path}.match")))?;
        let label = format!("[[postprocess]] \"{}\"", adjusted.pattern);
        let level = adjusted.level();
        // Any of its specs says what is wrong with all of them.
        if let Some(Err((message, hint))) = level.weight.as_ref().and_then(|w| w.postprocess).map(|p| p.check()) {
            let error = Error::new(Kind::Config, format!("{label}: {message}")).with_hint(hint);
            return Err(config.source.at(error, &path));
        }
        let rule = rule(path, label, Scope::Name(pattern), level)?;
        rules.push(Rule { optional: adjusted.optional, any_kind: true, ..rule });
    }
    for (name, tensor) in &config.tensor {
        let spec = tensor.spec();
        if spec != Spec::default() {
            // Weights have every key that any tensor has.
            let level = Level { weight: Some(spec), ..Level::default() };
            let scope = Scope::Tensor(name.clone());
            let rule = rule(format!("tensor.{name}"), format!("[tensor.\"{name}\"]"), scope, level)?;
            rules.push(Rule { optional: tensor.optional, ..rule });
        }
    }
    for (index, text) in config.exclude.iter().enumerate() {
        let path = format!("exclude.{index}");
        let pattern = Pattern::new(text).map_err(|e| config.source.at(e, &path))?;
        let level = Level { enable: Some(false), ..Level::default() };
        let rule = rule(path, format!("exclude \"{text}\""), Scope::Name(pattern), level)?;
        rules.push(Rule { optional: false, ..rule });
    }
    Ok(rules)
}

fn known_op(op: &str) -> Result<()> {
    if ops::find(op).is_some() {
        return Ok(());
    }
    let error = Error::new(Kind::Config, format!("amax's operator table has no \"{op}\""));
    Err(match nearest(op, ops::TABLE.iter().map(|row| row.op)) {
        Some(name) => error.with_hint(format!("did you mean \"{name}\"?")),
        None => error.with_hint("operators that are not in the table are never quantized"),
    })
}

impl Config {
    /// Switches sites on or off by name, as `--enable`, `--disable` and `--exclude` do, after everything else.
    ///
    /// # Errors
    /// A pattern that cannot be parsed.
    pub fn switch(&mut self, option: &str, pattern: &str, enable: bool) -> Result<()> {
        let level = Level { enable: Some(enable), ..Level::default() };
        let scope = Scope::Name(Pattern::new(pattern)?);
        let label = format!("{option} \"{pattern}\"");
        self.push(label, scope, level);
        Ok(())
    }

    /// Adds a rule of the command line.
    fn push(&mut self, label: String, scope: Scope, level: Level) {
        let (origin, ops) = (Origin::default(), Vec::new());
        self.overrides.push(Rule { label, origin, scope, ops, optional: false, preset: false, any_kind: false, level });
    }

    /// Sets one key, as `--set` does: `default.weight.dtype=int4`, `op_type.Conv.enable=false`,
    /// `layer.PATTERN.input.symmetric=true`, `tensor.NAME.range=[0, 1]`, `guard.weight_db=15`, `algorithm.method=max`,
    /// `preset=w4`, `target=generic`. Levels set this way come after all others.
    ///
    /// # Errors
    /// Text of another form, and anything that is an error in a file.
    pub fn set(&mut self, text: &str) -> Result<()> {
        self.set_key(text).map_err(|error| {
            let shown = Error::new(Kind::Config, format!("--set {text}: {}", error.message()));
            match error.hint() {
                Some(hint) => shown.with_hint(hint.to_owned()),
                None => shown,
            }
        })
    }

    fn set_key(&mut self, text: &str) -> Result<()> {
        let form =
            "write it as level.kind.key=value, for example default.weight.dtype=int4 or layer.PATTERN.enable=false";
        let Some((key, value)) = text.split_once('=') else {
            return Err(Error::new(Kind::Config, "there is no \"=\"").with_hint(form));
        };
        let (key, value) = (key.trim(), toml_value(value.trim()));
        let (section, rest) = key.split_once('.').unwrap_or((key, ""));
        match section {
            "enable" | "input" | "output" | "weight" | "bias" => {
                Err(Error::new(Kind::Config, "the key does not say for which nodes").with_hint(format!(
                    "default.{key} is for all nodes, op_type.OPERATOR.{key} and layer.PATTERN.{key} are for some"
                )))
            }
            "default" | "op_type" | "layer" => {
                let (name, key) = level_key(section, rest).ok_or_else(|| {
                    Error::new(Kind::Config, format!("\"{key}\" is not a key of a level")).with_hint(form)
                })?;
                let (level, _) = document::parse::<Level>(&format!("{key} = {value}"))?;
                let scope = match section {
                    "default" => Scope::All,
                    "op_type" => known_op(name).map(|()| Scope::Op(name.to_owned()))?,
                    _ => Scope::Name(Pattern::new(name)?),
                };
                level.validate().map_err(|(_, error)| error)?;
                self.push(format!("--set {text}"), scope, level);
                Ok(())
            }
            _ => {
                let mut table = toml::Table::try_from(&*self)
                    .map_err(|e| Error::new(Kind::Internal, format!("cannot write the configuration: {e}")))?;
                let (value, _) = document::parse::<toml::Table>(&format!("value = {value}"))?;
                let value = value.get("value").cloned().unwrap_or(toml::Value::Boolean(true));
                let (name, key) = match rest.rsplit_once('.') {
                    Some((name, key)) if section == "tensor" => (Some(name), key),
                    _ => (None, rest),
                };
                let mut at = &mut table;
                let mut path: Vec<&str> = vec![section];
                path.extend(name);
                path.extend((!key.is_empty()).then_some(key));
                let last = path.pop().unwrap_or(section);
                for step in path {
                    let slot = at.entry(step).or_insert_with(|| toml::Table::new().into());
                    at = slot
                        .as_table_mut()
                        .ok_or_else(|| Error::new(Kind::Config, format!("\"{step}\" has no keys")))?;
                }
                at.insert(last.to_owned(), value);
                let changed: Self = document::parse(&table.to_string())?.0;
                changed.validate()?;
                let (overrides, source) = (std::mem::take(&mut self.overrides), std::mem::take(&mut self.source));
                *self = Self { overrides, source, ..changed };
                Ok(())
            }
        }
    }
}

/// A word is a string without quotes.
fn toml_value(text: &str) -> String {
    if toml::from_str::<toml::Table>(&format!("value = {text}")).is_ok() {
        text.to_owned()
    } else {
        toml::Value::String(text.to_owned()).to_string()
    }
}

/// Splits `PATTERN.weight.dtype` into the pattern and `weight.dtype`; `default` has no pattern.
fn level_key<'a>(section: &str, rest: &'a str) -> Option<(&'a str, &'a str)> {
    let is_kind = |word: &str| SiteKind::ALL.iter().any(|k| k.name() == word);
    let dot = rest.rfind('.');
    let key_at = match dot {
        Some(dot)
            if !matches!(&rest[dot + 1..], "enable" | "algorithm")
                || rest[..dot].rsplit('.').next().is_some_and(is_kind) =>
        {
            rest[..dot].rfind('.').map_or(0, |d| d + 1)
        }
        Some(dot) => dot + 1,
        None => 0,
    };
    let (name, key) = (rest[..key_at].trim_end_matches('.'), &rest[key_at..]);
    let valid = !key.is_empty() && (section == "default") == name.is_empty();
    valid.then_some((name, key))
}
