//! Decides which operators run quantized, and what that asks of the tensors around them.

use std::collections::{BTreeMap, BTreeSet};

use super::by_hand::given;
use super::kernels;
use super::place::{self, Place};
use super::site::{Reader, Refusal, Shape};
use super::skips::switched_off;
use super::{Activation, Mode, Plan, Scheme, Slot, Smoothing, algorithms};
use crate::config::rules::{Resolved, Rule, Rules};
use crate::config::spec::{Dtype, Field};
use crate::config::{Config, SiteKind, Tensor as ByHand};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NodeId, User, ValueId};
use crate::numerics::Format;
use crate::onnx::DataType;
use crate::ops::{self, Channel, Form, Role};
use crate::reason::{Operand, Reason};
use crate::targets::Target;

/// A site that must not be quantized after all, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Veto {
    /// Why.
    pub why: Reason,
    /// Whether a range found at run time would do.
    pub dynamic: bool,
}

/// What is known beyond the model when the plan is made.
#[derive(Clone, Debug, Default)]
pub struct Knowledge {
    /// Whether there are samples; without, activations stay float unless their range is given or found at run time.
    pub calibrated: bool,
    /// Whether weights are solved with samples at hand.
    pub samples: bool,
    /// Tensors and constant sites (`<node>.weight`) that must not be quantized.
    pub vetoes: BTreeMap<String, Veto>,
    /// What was done to the model before.
    pub smoothing: Vec<Smoothing>,
    /// The tensors that Muls divide for it: these stay float.
    pub divided: BTreeSet<String>,
}

/// Decides.
///
/// # Errors
/// A pattern that matches nothing, a key that does not fit another one or the tensor, a rule that nothing follows from, an
/// algorithm or format that is not implemented, a model newer than the target can load.
pub fn plan(model: &Model, config: &Config, target: &Target, knowledge: &Knowledge) -> Result<Plan> {
    let rules = Rules::new(target, config)?;
    rules.check(model)?;
    algorithms::refuse_without_samples(config, &rules, knowledge)?;
    let opset = model.opset().unwrap_or(0).max(13);
    if opset > target.opset_max {
        return Err(Error::new(
            Kind::Model,
            format!("the model needs opset {opset}; target {} loads at most {}", target.name, target.opset_max),
        )
        .with_hint("export the model at an older opset, or choose another --target"));
    }
    let nodes = model.graph(model.main()).nodes().to_vec();
    let all = model.nodes_outside_functions();
    let sites = all.iter().map(|&node| {
        let (name, op) = (model.node_name(node), model.node(node).op_type());
        let left = ops::constant_weight(model, node, 0) == Some(Channel::Left);
        (node, SiteKind::ALL.map(|kind| rules.site(name, op, kind, left)))
    });
    let mut planner = Planner {
        model,
        target,
        place: place::of(target.placement),
        config,
        knowledge,
        sites: sites.collect(),
        rules,
        given: given(model, config)?,
        types: ops::undeclared_types(model),
        float32: false,
        quantized: BTreeMap::new(),
        notes: BTreeMap::new(),
        reasons: BTreeMap::new(),
        wants: BTreeMap::new(),
        tokens: BTreeMap::new(),
        pairs: BTreeMap::new(),
        listed: BTreeMap::new(),
    };
    planner.validate(&all)?;
    planner.float32 = planner.needs_float32(&all);
    for &node in &all {
        planner.anchor(node)?;
    }
    for &node in &nodes {
        planner.force(node);
    }
    planner.place.spread(&mut planner, &nodes);
    let algorithm = planner.rules.algorithm().cloned();
    let plan = planner.finish(opset, &nodes, &all)?;
    algorithms::refuse_idle(config, algorithm.as_ref(), &plan, knowledge)?;
    Ok(plan)
}

/// What is asked of a value.
#[derive(Clone, Debug, Default)]
pub(super) struct Want {
    /// Its producer's result is quantized: the float tensor does not exist.
    pub(super) made: Option<Made>,
    /// Inputs that want it quantized, in the order in which they were found.
    pub(super) reads: Vec<((NodeId, usize), Read)>,
}

/// A value whose producer runs in codes.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) ask: Resolved,
    /// The value whose scale and format it keeps, behind an operator that moves codes.
    pub(super) keeps: Option<ValueId>,
    pub(super) why: Reason,
}

/// An input that wants its value quantized.
#[derive(Clone, Debug)]
pub(super) struct Read {
    pub(super) ask: Resolved,
    /// It takes whatever format there is.
    pub(super) adopts: bool,
    pub(super) mode: Mode,
    pub(super) why: Reason,
}

pub(super) struct Planner<'a> {
    pub(super) model: &'a Model,
    pub(super) target: &'a Target,
    pub(super) place: &'static dyn Place,
    pub(super) config: &'a Config,
    pub(super) knowledge: &'a Knowledge,
    pub(super) rules: Rules,
    /// What is asked for at each node, in the order of [`SiteKind::ALL`].
    pub(super) sites: BTreeMap<NodeId, [Resolved; 4]>,
    /// Tensors with ranges and scales fixed by the user.
    pub(super) given: BTreeMap<ValueId, &'a ByHand>,
    /// Element types that the model does not declare.
    types: BTreeMap<ValueId, DataType>,
    /// Whether floats of 16 bits become float32.
    pub(super) float32: bool,
    /// Nodes that run in integers, anchors and joins.
    pub(super) quantized: BTreeMap<NodeId, Kindness>,
    /// Why only the weight of a node is quantized.
    pub(super) notes: BTreeMap<NodeId, Reason>,
    /// Why a node that might have been quantized is not.
    pub(super) reasons: BTreeMap<NodeId, Reason>,
    pub(super) wants: BTreeMap<ValueId, Want>,
    /// The input of a node that gets a scale for each token, and the least scale.
    pub(super) tokens: BTreeMap<NodeId, (usize, f32)>,
    /// The pairs that serve them, once these are made.
    pub(super) pairs: BTreeMap<String, Activation>,
    /// The pair that lists an input among its readers.
    pub(super) listed: BTreeMap<Slot, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kindness {
    /// Reads quantized activations and, where it has one, a quantized weight.
    Integer,
    /// Only its weight is quantized.
    WeightOnly,
}

impl Planner<'_> {
    pub(super) fn name(&self, value: ValueId) -> String {
        self.model.value(value).name().to_owned()
    }

    pub(super) fn slot(&self, node: NodeId, input: usize) -> Slot {
        let first = self.model.node(node).outputs().iter().flatten().next();
        Slot { node: first.map(|&v| self.name(v)).unwrap_or_default(), input }
    }

    pub(super) fn refuse(&mut self, node: NodeId, why: Reason) {
        self.reasons.entry(node).or_insert(why);
    }

    /// What came of a question; where it stays float, the reason is noted.
    pub(super) fn or_refuse<T>(&mut self, node: NodeId, outcome: Result<T, Refusal>) -> Result<Option<T>> {
        match outcome {
            Ok(found) => Ok(Some(found)),
            Err(Refusal::Wrong(error)) => Err(error),
            Err(Refusal::Unfit(why)) => {
                self.refuse(node, why);
                Ok(None)
            }
        }
    }

    /// What is asked for at a site.
    pub(super) fn ask(&self, node: NodeId, kind: SiteKind) -> &Resolved {
        let index = SiteKind::ALL.iter().position(|&k| k == kind).unwrap_or(0);
        &self.sites[&node][index]
    }

    /// The same with what is said of the tensor there by its name.
    pub(super) fn ask_of(&self, value: ValueId, ask: &Resolved) -> Resolved {
        let mut ask = ask.clone();
        if let Some(said) = self.rules.tensor(self.model.value(value).name()) {
            ask.strengthen(&said);
        }
        ask
    }

    pub(super) fn reader<'r>(&'r self, site: &'r str, kind: SiteKind, resolved: &'r Resolved) -> Reader<'r> {
        Reader { rules: &self.rules, target: self.target, site, kind, resolved }
    }

    /// `<node>.weight` and the like.
    pub(super) fn site(&self, node: NodeId, kind: SiteKind) -> String {
        format!("{}.{}", self.model.node_name(node), kind.name())
    }

    /// Why a site is switched off, if it is.
    pub(super) fn off(&self, node: NodeId, kind: SiteKind) -> Option<Reason> {
        let ask = self.ask(node, kind);
        ask.is_off().then(|| self.off_by(ask, kind))
    }

    /// Which rule switches a site off.
    pub(super) fn off_by(&self, ask: &Resolved, kind: SiteKind) -> Reason {
        let rule = self.rules.rule(ask, Field::Enable).map_or_else(String::new, |r| r.label.clone());
        Reason::OffBy { what: kind.into(), rule }
    }

    /// Whether a rule about certain nodes wants this site quantized whatever the target would do.
    pub(super) fn is_forced(&self, node: NodeId, kind: SiteKind) -> bool {
        let ask = self.ask(node, kind);
        // What a preset says of operators is for targets that run what they are told.
        let listed = |rule: &Rule| !rule.ops.is_empty() && (!rule.preset || self.place.everywhere());
        let rule = self.rules.rule(ask, Field::Enable).filter(|_| ask.spec.enable == Some(true));
        rule.is_some_and(|rule| rule.is_named() || listed(rule))
    }

    /// Refuses what makes no sense for an activation or a bias, whether or not it gets that far.
    fn validate(&self, nodes: &[NodeId]) -> Result<()> {
        for &node in nodes {
            let Some(row) = ops::of(self.model, node) else { continue };
            for kind in [SiteKind::Input, SiteKind::Output] {
                if !self.ask(node, kind).is_off() && !self.per_token(node, kind) {
                    self.activation(node, kind, self.ask(node, kind)).map(drop).or_else(fit)?;
                }
            }
            if row.inputs.contains(&Role::Bias) {
                let site = self.site(node, SiteKind::Bias);
                self.reader(&site, SiteKind::Bias, self.ask(node, SiteKind::Bias)).bias().map(drop).or_else(fit)?;
            }
        }
        Ok(())
    }

    /// How an activation is quantized at a site, and whether at run time.
    pub(super) fn activation(&self, node: NodeId, kind: SiteKind, ask: &Resolved) -> Result<(Scheme, bool), Refusal> {
        self.reader(&self.site(node, kind), kind, ask).activation()
    }

    /// How the constant at an input is quantized.
    pub(super) fn weight(&self, node: NodeId, index: usize) -> Result<Scheme, Refusal> {
        let Some(tensor) = self.model.constant_input(node, index) else {
            return Err(Refusal::Unfit(kernels::not_constant(self.model, node, index, Operand::Weight)));
        };
        let dims = tensor.dims();
        let Some(mut layout) = ops::weight_layout(self.model, node, index, &dims) else {
            return Err(Refusal::Unfit(Reason::WrongShape { what: Operand::Weight, dims }));
        };
        let mut kernel = self.target.anchor(self.model.node(node).op_type()).is_some();
        // Kernels have one scale for a batch of matrices; a product of floats does not mind one for each column.
        let batch = dims.len() > 2 && ops::constant_weight(self.model, node, index) == Some(Channel::Right);
        if batch && self.off(node, SiteKind::Input).is_some() {
            layout.channel_axis = Some(dims.len() - 1);
            kernel = false;
        }
        let shape = Shape { dims: &dims, layout, kernel };
        let value = self.model.node(node).input(index);
        let ask = self.ask(node, SiteKind::Weight);
        let ask = value.map_or_else(|| ask.clone(), |value| self.ask_of(value, ask));
        let site = self.site(node, SiteKind::Weight);
        let quantizer = self.reader(&site, SiteKind::Weight, &ask).weight(&shape, self.float(tensor.dtype()))?;
        self.by_hand(value, quantizer).map_err(Refusal::Wrong)
    }

    /// The type that a float has in the result.
    pub(super) fn float(&self, dtype: DataType) -> DataType {
        if self.float32 && dtype.is_half() { DataType::Float } else { dtype }
    }

    /// Whether a node is inside an If, Loop or Scan.
    pub(super) fn in_body(&self, node: NodeId) -> bool {
        self.model.node(node).graph() != Some(self.model.main())
    }

    /// Whether floats of 16 bits have to become float32: the target has no kernels for the type, or activations are quantized,
    /// for which there are kernels of float32 only.
    fn needs_float32(&self, nodes: &[NodeId]) -> bool {
        let reads = |&node: &NodeId| self.model.node(node).inputs().iter().flatten().filter_map(|&v| self.dtype(v));
        let halves = || nodes.iter().filter(|node| reads(node).any(DataType::is_half));
        let unknown = |node: &&NodeId| reads(node).any(|d| d.is_half() && !self.target.floats.contains(&d));
        let quantized = |&&node: &&NodeId| {
            let ask = self.ask(node, SiteKind::Input);
            let ranged = self.knowledge.calibrated || ask.spec.dynamic == Some(true);
            let inside = self.in_body(node);
            let asked = !ask.is_off() && ranged && (!inside || self.per_token(node, SiteKind::Input));
            // onnxruntime 1.31 overwrites what float16 operators of a body still read, where a MatMulNBits is among them.
            let overwrites = inside && self.target.forms.contains(&Form::Matmulnbits);
            let weighs = self.may_anchor(node).is_some_and(|row| row.role(0) != Role::Weight(Channel::Rows));
            weighs && (asked || overwrites)
        };
        halves().any(|node| unknown(&node) || quantized(&node))
    }

    /// Why a node may not be touched at all.
    pub(super) fn untouchable(&self, node: NodeId) -> Option<Reason> {
        if SiteKind::ALL.iter().all(|&kind| self.ask(node, kind).is_off()) {
            return Some(switched_off(self.rules.rule(self.ask(node, SiteKind::Input), Field::Enable)));
        }
        let quantized = self.model.node(node).inputs().iter().flatten().any(|&v| {
            self.model
                .producer(v)
                .is_some_and(|p| matches!(self.model.node(p).op_type(), "DequantizeLinear" | "DynamicQuantizeLinear"))
        });
        // A float weight is there to be quantized, whatever is multiplied by it.
        let weight = |index: usize| {
            let constant = ops::constant_weight(self.model, node, index);
            constant.is_some() && self.model.constant_input(node, index).is_some_and(|t| t.dtype().has_quantizers())
        };
        (quantized && !(0..self.model.node(node).inputs().len()).any(weight)).then_some(Reason::QuantizedAlready)
    }

    pub(super) fn veto(&self, value: ValueId) -> Option<&Veto> {
        self.knowledge.vetoes.get(self.model.value(value).name())
    }

    /// Why a value cannot carry a quantizer with a fixed scale.
    pub(super) fn unquantizable(&self, value: ValueId) -> Option<Reason> {
        if let Some(veto) = self.veto(value) {
            return Some(veto.why.clone());
        }
        if let Some(why) = self.unquantized(value) {
            return Some(why);
        }
        let given = self.given.get(&value).is_some_and(|g| g.range.is_some() || g.scale.is_some());
        let known = given || self.dequantized(value).is_some();
        (!self.knowledge.calibrated && !known).then_some(Reason::WithoutSamples)
    }

    /// The element type of a value, where it is declared or operators tell.
    pub(super) fn dtype(&self, value: ValueId) -> Option<DataType> {
        self.model.dtype(value).or_else(|| self.types.get(&value).copied())
    }

    /// Why a value cannot carry a quantizer of any kind.
    pub(super) fn unquantized(&self, value: ValueId) -> Option<Reason> {
        let tensor = self.name(value);
        if self.given.get(&value).is_some_and(|g| g.enable == Some(false)) {
            return Some(Reason::TensorOff { tensor });
        }
        match self.dtype(value) {
            None => None,
            Some(found) if self.float(found) == DataType::Float => None,
            // A weight is dequantized to its own type.
            Some(found) if found.is_half() && self.model.constant(value).is_some() => None,
            Some(found) => Some(Reason::WrongTensorType { tensor, found, wanted: DataType::Float.to_string() }),
        }
    }

    /// The value at which the output of `node` is quantized, after the Relu or Clip that vanishes into the quantizer, and
    /// what is asked for there.
    pub(super) fn output_site(&self, node: NodeId) -> Option<(ValueId, Resolved)> {
        let output = self.model.node(node).output(0)?;
        let ask = self.ask_of(output, self.ask(node, SiteKind::Output));
        let [User::Node { node: next, input: 0 }] = self.model.value(output).users() else {
            return Some((output, ask));
        };
        if self.model.node(*next).graph() != self.model.node(node).graph() {
            return Some((output, ask));
        }
        let mut both = ask.clone();
        both.strengthen(self.ask(*next, SiteKind::Output));
        if let Some(&value) = self.model.node(*next).outputs().iter().flatten().next() {
            both = self.ask_of(value, &both);
        }
        if !self.absorbs(*next, &both) {
            return Some((output, ask));
        }
        Some((self.model.node(*next).output(0)?, both))
    }

    /// Whether a node vanishes into a quantizer behind it: a Relu, or a Clip at a lower bound of zero. Its zero point is
    /// then the lowest code, so that the quantizer clips exactly there.
    fn absorbs(&self, node: NodeId, ask: &Resolved) -> bool {
        let at = self.model.node(node);
        if !at.domain().is_empty() || !self.target.absorb.has(at.op_type()) || self.untouchable(node).is_some() {
            return false;
        }
        let integer = ask.spec.dtype.and_then(Dtype::element).is_some_and(Format::is_integer);
        if ask.spec.symmetric != Some(false) || !integer || ask.is_off() {
            return false;
        }
        ops::clips_at_zero(self.model, node)
    }

    /// Whether a node vanishes into the quantizer of what it makes.
    pub(super) fn vanishes(&self, node: NodeId, output: ValueId) -> bool {
        let want = self.wants.get(&output);
        let asked = want.and_then(|w| w.made.as_ref().map(|m| &m.ask).or_else(|| Some(&w.reads.first()?.1.ask)));
        asked.is_some_and(|ask| self.absorbs(node, ask))
    }
}

impl From<Reason> for Refusal {
    fn from(why: Reason) -> Self {
        Self::Unfit(why)
    }
}

/// Lets what merely stays float pass.
fn fit(refusal: Refusal) -> Result<()> {
    match refusal {
        Refusal::Wrong(error) => Err(error),
        Refusal::Unfit(_) => Ok(()),
    }
}
