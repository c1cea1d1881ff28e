//! The weights whose format is to be chosen, and what each format costs.

use std::collections::{BTreeMap, BTreeSet};

use petgraph::unionfind::UnionFind;

use super::prices::{Price, PricedGroup, Prices, SCHEMA};
use crate::config::budget::Choice;
use crate::config::rules::Rules;
use crate::config::spec::Field;
use crate::config::{Config, SiteKind};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor, content_hash};
use crate::observe::calibrate::prepare;
use crate::observe::sensitivity::Reference;
use crate::ops::{self, Channel, Form};
use crate::plan::{Knowledge, Plan, Weight, plan};
use crate::rewrite::{Rewrite, split};
use crate::samples::SampleSet;
use crate::solve::{StoredWeight, solve_weight};
use crate::targets::Target;

/// Most samples that noise is measured on.
const SAMPLES: usize = 32;

/// The least share of all noise that a group has among others.
const LEAST: f64 = 1e-6;

/// What a budget chooses from.
pub(super) struct Study<'a> {
    rewrite: &'a Rewrite<'a>,
    /// Without a budget.
    config: Config,
    target: &'a Target,
    /// What plans are made for.
    model: Model,
    pub(super) choices: Vec<Choice>,
    pub(super) groups: Vec<Choosable>,
}

/// Weights that have one format.
pub(super) struct Choosable {
    members: Vec<Member>,
    /// Bytes of the constants as they are.
    pub(super) bytes: u64,
    elements: u64,
    /// For each format the weights in it, each tensor once; `None` where the target or the guard does not allow it.
    formats: Vec<Option<Vec<(Weight, StoredWeight)>>>,
}

struct Member {
    site: String,
    op: String,
    tensor: String,
}

fn constant<'m>(model: &'m Model, tensor: &str) -> Option<&'m Tensor> {
    model.constant(model.value_named(tensor)?)
}

impl Choosable {
    /// The sites of its weights.
    pub(super) fn weights(&self) -> Vec<String> {
        self.members.iter().map(|member| member.site.clone()).collect()
    }

    fn tensors(&self) -> BTreeSet<&str> {
        self.members.iter().map(|member| member.tensor.as_str()).collect()
    }

    /// Relative errors of its weights in a format, summed.
    fn error(&self, format: usize) -> Option<f64> {
        let weights = self.formats[format].as_ref()?;
        Some(weights.iter().map(|(_, solved)| 10f64.powf(-solved.sqnr_db() / 10.0)).sum())
    }
}

impl<'a> Study<'a> {
    /// Finds the weights that nothing else decides, and solves them in every format.
    ///
    /// # Errors
    /// What is wrong with the configuration, the model or a weight; no weight to choose a format for.
    pub(super) fn new(rewrite: &'a Rewrite<'a>, config: &Config, target: &'a Target) -> Result<Self> {
        let choices = config.budget.choices().map_err(|(_, e)| e)?;
        let config = base(config);
        let model = prepare(rewrite.model, rewrite.evaluate, rewrite.freezes())?;
        let mut study = Self { rewrite, config, target, model, choices, groups: Vec::new() };
        study.groups = study.find()?;
        if study.groups.is_empty() {
            return Err(Error::new(Kind::Config, "there is no weight whose format a budget could choose")
                .with_hint("amax explain MODEL '*.weight' shows which rules decide them"));
        }
        for at in 0..study.choices.len() {
            study.solve(at)?;
        }
        match study.groups.iter().find(|group| group.formats.iter().all(Option::is_none)) {
            Some(group) => {
                Err(Error::new(Kind::Config, "neither target nor guard allows a format of the budget for it")
                    .at_value(&group.members[0].site)
                    .with_hint("add \"float\" to the formats, or decide it in a [[layer]]"))
            }
            None => Ok(study),
        }
    }

    /// The groups, without formats.
    fn find(&self) -> Result<Vec<Choosable>> {
        let rules = Rules::new(self.target, &self.config)?;
        let planned = self.plan(&self.config)?;
        let mut members = Vec::new();
        // What joins members: each key, with the first that has it.
        let mut joins: Vec<(usize, usize)> = Vec::new();
        let mut first: BTreeMap<String, usize> = BTreeMap::new();
        for weight in planned.weights.iter().filter(|weight| weight.site.ends_with(".weight")) {
            let Some(node) = self.model.producer_named(&weight.at.node) else { continue };
            let (name, op) = (self.model.node_name(node), self.model.node(node).op_type());
            let site = rules.site(name, op, SiteKind::Weight, false);
            let decided = [Field::Enable, Field::Dtype, Field::Granularity, Field::GroupSize];
            let decided = decided.into_iter().filter_map(|field| rules.rule(&site, field));
            if decided.into_iter().any(|rule| rule.is_named() && !rule.preset) {
                continue;
            }
            let sibling = ops::constant_weight(&self.model, node, weight.at.input) == Some(Channel::Right);
            let input = self.model.node(node).input(0).filter(|_| sibling);
            let input = input.map(|value| format!("input {}", self.model.value(value).name()));
            for key in [format!("weight {}", weight.tensor)].into_iter().chain(input) {
                joins.push((members.len(), *first.entry(key).or_insert(members.len())));
            }
            members.push(Member { site: weight.site.clone(), op: op.to_owned(), tensor: weight.tensor.clone() });
        }
        let mut sets = UnionFind::new(members.len());
        for (member, other) in joins {
            sets.union(member, other);
        }
        let mut places: BTreeMap<usize, usize> = BTreeMap::new();
        let mut groups: Vec<Vec<Member>> = Vec::new();
        for (at, member) in members.into_iter().enumerate() {
            let place = *places.entry(sets.find(at)).or_insert(groups.len());
            match groups.get_mut(place) {
                Some(group) => group.push(member),
                None => groups.push(vec![member]),
            }
        }
        Ok(groups.into_iter().map(|members| self.choosable(members)).collect())
    }

    /// A group, without formats.
    fn choosable(&self, members: Vec<Member>) -> Choosable {
        let mut group = Choosable { members, bytes: 0, elements: 0, formats: Vec::new() };
        for constant in
            group.tensors().into_iter().filter_map(|tensor| constant(&self.model, tensor)).collect::<Vec<_>>()
        {
            group.bytes += constant.byte_len() as u64;
            group.elements += constant.len() as u64;
        }
        group
    }

    /// The configuration in which each group has a format.
    pub(super) fn config(&self, formats: &[usize]) -> Config {
        let mut config = self.config.clone();
        for (group, &format) in self.groups.iter().zip(formats) {
            let layer =
                |member: &Member| self.choices[format].layer(&member.site, &member.op, self.target.signed_scales);
            config.layer.extend(group.members.iter().map(layer));
        }
        config
    }

    fn plan(&self, config: &Config) -> Result<Plan> {
        // Activations do not matter here: noise is that of the weights alone.
        let knowledge = Knowledge { samples: true, ..Knowledge::default() };
        plan(&self.model, config, self.target, &knowledge)
    }

    /// Solves all groups in a format.
    fn solve(&mut self, at: usize) -> Result<()> {
        let choice = &self.choices[at];
        let guard = self.config.guard;
        let mut found: Vec<Option<Vec<(Weight, StoredWeight)>>> = Vec::with_capacity(self.groups.len());
        if choice.is_float() {
            found.resize_with(self.groups.len(), || Some(Vec::new()));
        } else {
            let planned = self.plan(&self.config(&vec![at; self.groups.len()]))?;
            let by_site: BTreeMap<(&str, &str), &Weight> =
                planned.weights.iter().rev().map(|w| ((w.site.as_str(), w.tensor.as_str()), w)).collect();
            for group in &self.groups {
                self.rewrite.run.progress.interrupted().then(Error::interrupted).map_or(Ok(()), Err)?;
                let mut weights: Vec<(Weight, StoredWeight)> = Vec::new();
                let mut all = true;
                for member in &group.members {
                    let weight = by_site.get(&(member.site.as_str(), member.tensor.as_str()));
                    let weight = weight.filter(|w| w.quantizer.dtype.bits() == choice.bits);
                    let Some(weight) = weight else {
                        all = false;
                        break;
                    };
                    if weights.iter().any(|(other, _)| other.tensor == weight.tensor) {
                        continue;
                    }
                    let solved = solve_weight(&self.model, weight)?;
                    all &= !(guard.enabled && choice.bits >= 8 && solved.sqnr_db() < guard.weight_db);
                    weights.push(((*weight).clone(), solved));
                }
                found.push(all.then_some(weights));
            }
        }
        for (group, found) in self.groups.iter_mut().zip(found) {
            group.formats.push(found);
        }
        Ok(())
    }

    /// The float model with the weights of some groups as they are read back.
    fn replaced(&self, formats: &[Option<usize>]) -> Result<Model> {
        let mut made = self.model.clone();
        for (group, format) in self.groups.iter().zip(formats) {
            let weights = format.and_then(|format| group.formats[format].as_ref());
            for (weight, solved) in weights.into_iter().flatten() {
                let Some(value) = made.value_named(&weight.tensor) else { continue };
                let Some(constant) = made.constant(value) else { continue };
                if let Some(tensor) = solved.read_back(weight, constant)? {
                    made.set_constant(value, tensor);
                }
            }
        }
        Ok(made)
    }

    /// The samples that noise is measured on: not those by which the result is judged.
    fn indices(samples: &SampleSet) -> Vec<usize> {
        let mut indices = split(samples).0;
        indices.truncate(SAMPLES);
        indices
    }

    /// Measures what each format costs each group, by runs with this group alone quantized: in the middle format and in those
    /// of fewer bits. In the others it is less, and follows by the ratio of the errors of the weights.
    ///
    /// # Errors
    /// A model or a sample that the runtime cannot run, an interruption.
    pub(super) fn measure(&self, samples: &SampleSet) -> Result<Prices> {
        let indices = Self::indices(samples);
        let reference = Reference::new(&self.model, self.rewrite.run.over(samples, &indices))?;
        let progress = self.rewrite.run.progress;
        progress.start("sensitivity", self.groups.len() as u64);
        let mut groups = Vec::with_capacity(self.groups.len());
        for (number, group) in self.groups.iter().enumerate() {
            let noise = |format: usize| {
                let mut formats = vec![None; self.groups.len()];
                formats[number] = Some(format);
                reference.noise(&self.replaced(&formats)?)
            };
            groups.push(self.priced(group, noise)?);
            progress.tick();
        }
        progress.finish();
        Ok(Prices {
            schema: SCHEMA,
            model: content_hash(self.rewrite.model),
            target: self.target.name.clone(),
            samples: samples.describe(),
            sample_count: indices.len(),
            groups,
        })
    }

    /// The noise-to-signal ratio at the worst output with each group in its format.
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub(super) fn noise(&self, samples: &SampleSet, formats: &[usize]) -> Result<f64> {
        let indices = Self::indices(samples);
        let reference = Reference::new(&self.model, self.rewrite.run.over(samples, &indices))?;
        reference.noise(&self.replaced(&formats.iter().copied().map(Some).collect::<Vec<_>>())?)
    }

    /// What each group costs among others in these formats: what the noise of all is less without it.
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub(super) fn in_place(&self, samples: &SampleSet, formats: &[usize]) -> Result<Vec<f64>> {
        let indices = Self::indices(samples);
        let reference = Reference::new(&self.model, self.rewrite.run.over(samples, &indices))?;
        let mut formats: Vec<Option<usize>> = formats.iter().copied().map(Some).collect();
        let all = reference.noise(&self.replaced(&formats)?)?;
        let mut found = Vec::with_capacity(formats.len());
        for at in 0..formats.len() {
            let own = formats[at].take();
            // What others make up for costs something all the same.
            found.push((all - reference.noise(&self.replaced(&formats)?)?).max(all * LEAST));
            formats[at] = own;
        }
        Ok(found)
    }

    /// The prices of a group, with what measures one of its formats.
    fn priced(&self, group: &Choosable, noise: impl Fn(usize) -> Result<f64>) -> Result<PricedGroup> {
        let allowed: Vec<usize> = (0..self.choices.len()).filter(|&at| group.formats[at].is_some()).collect();
        let quantized: Vec<usize> = allowed.iter().copied().filter(|&at| !self.choices[at].is_float()).collect();
        let middle = quantized.get(quantized.len().saturating_sub(1) / 2).copied();
        let base = match middle {
            Some(middle) => Some((middle, noise(middle)?, group.error(middle).unwrap_or(0.0))),
            None => None,
        };
        let mut prices: Vec<Price> = Vec::new();
        for &at in &allowed {
            let choice = &self.choices[at];
            let (found, measured) = match (base, group.error(at)) {
                _ if choice.is_float() => (0.0, true),
                (Some((middle, noise, _)), _) if middle == at => (noise, true),
                (Some((middle, noise, error)), Some(own)) if error > 0.0 && middle < at => (noise * own / error, false),
                _ => (noise(at)?, true),
            };
            let bytes = group.formats[at].iter().flatten().map(|(weight, solved)| stored_bytes(weight, solved)).sum();
            let bytes = if choice.is_float() { group.bytes } else { bytes };
            prices.push(Price { format: choice.name.clone(), bits: choice.bits, bytes, noise: found, measured });
        }
        // What more bits cost fewer cost, too.
        for at in (0..prices.len()).rev() {
            let more = prices.iter().filter(|other| other.bits > prices[at].bits).map(|other| other.noise);
            prices[at].noise = more.fold(prices[at].noise, f64::max);
        }
        let mut operators: Vec<String> = Vec::new();
        for member in &group.members {
            if !operators.contains(&member.op) {
                operators.push(member.op.clone());
            }
        }
        Ok(PricedGroup { weights: group.weights(), operators, elements: group.elements, prices })
    }
}

/// What a weight takes in the file.
fn stored_bytes(weight: &Weight, solved: &StoredWeight) -> u64 {
    let tensor = solved.tensor();
    let scale = weight.quantizer.scale_dtype.stored().unwrap_or(tensor.scale_dtype).bits().unwrap_or(32);
    // Forms of the runtime need no zero points in the middle.
    let zeros = weight.form == Form::Qdq || !tensor.zero_points.all_zero();
    let zero = if zeros { tensor.format.bits() } else { 0 };
    (tensor.codes.len() + (tensor.scales.len() * (scale + zero)).div_ceil(8)) as u64
}

/// The configuration without its budget. Where it does not say what becomes of activations, they stay float.
fn base(config: &Config) -> Config {
    let mut base = Config { budget: crate::config::budget::Budget::default(), ..config.clone() };
    let silent = |config: &Config| config.preset.is_none() && config.default.is_none();
    if silent(config) {
        base.preset = Some("w8".to_owned());
    }
    // The budget decides what the outputs keep.
    base.guard.output_db = f64::NEG_INFINITY;
    base
}
