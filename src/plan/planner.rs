//! Decides which operators run quantized, and what that asks of the tensors around them.

use std::collections::BTreeMap;

use super::by_hand::given;
use super::site::{Reader, Refusal, Shape};
use super::{Activation, Mode, Plan, QUANTIZED_ALREADY, Scheme, Slot, algorithms};
use crate::config::rules::{Resolved, Rule, Rules};
use crate::config::spec::{Dtype, Field, Form};
use crate::config::{Config, SiteKind, Tensor as ByHand};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, NodeId, Tensor, User, ValueId};
use crate::onnx::DataType;
use crate::ops::{self, Role};
use crate::targets::{Anchor, Placement, Residual, Target};

/// A site that must not be quantized after all, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Veto {
    /// A clause for people.
    pub why: String,
    /// Whether a range found at run time would do.
    pub dynamic: bool,
}

/// What is known beyond the model when the plan is made.
#[derive(Clone, Debug, Default)]
pub struct Knowledge {
    /// Whether there are samples; without, activations stay float unless their range is given or found at run time.
    pub calibrated: bool,
    /// Tensors and constant sites (`<node>.weight`) that must not be quantized.
    pub vetoes: BTreeMap<String, Veto>,
}

/// Decides.
///
/// # Errors
/// A pattern that matches nothing, a key that does not fit another one or the tensor, a rule that nothing follows from, an
/// algorithm or format that is not implemented, a model newer than the target can load.
pub fn plan(model: &Model, config: &Config, target: &Target, knowledge: &Knowledge) -> Result<Plan> {
    let rules = Rules::new(target, config)?;
    rules.check(model)?;
    algorithms::refuse_missing(config, &rules)?;
    let opset = model.opset().unwrap_or(0).max(13);
    if opset > target.opset_max {
        return Err(Error::new(
            Kind::Model,
            format!("the model needs operator set {opset}; target {} loads at most {}", target.name, target.opset_max),
        )
        .with_hint("export the model at an older operator set, or choose another --target"));
    }
    let nodes = model.graph(model.main()).nodes().to_vec();
    let sites = nodes.iter().map(|&node| {
        let (name, op) = (model.node_name(node), model.node(node).op_type());
        let left = op == "MatMul" && model.constant_input(node, 0).is_some();
        (node, SiteKind::ALL.map(|kind| rules.site(name, op, kind, left)))
    });
    let mut planner = Planner {
        model,
        target,
        config,
        knowledge,
        sites: sites.collect(),
        rules,
        given: given(model, config)?,
        quantized: BTreeMap::new(),
        notes: BTreeMap::new(),
        reasons: BTreeMap::new(),
        wants: BTreeMap::new(),
        tokens: BTreeMap::new(),
        pairs: BTreeMap::new(),
        listed: BTreeMap::new(),
    };
    planner.validate(&nodes)?;
    for &node in &nodes {
        planner.anchor(node)?;
    }
    for &node in &nodes {
        planner.force(node);
    }
    match target.placement {
        Placement::Inputs => {
            if target.residual == Residual::Shortcut {
                let depths = planner.depths(&nodes);
                for &node in &nodes {
                    planner.shortcut(node, &depths);
                }
            }
        }
        Placement::Fused | Placement::Everywhere => planner.spread(&nodes),
    }
    let algorithm = planner.rules.algorithm().cloned();
    let plan = planner.finish(opset, &nodes)?;
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
    pub(super) why: String,
}

/// An input that wants its value quantized.
#[derive(Clone, Debug)]
pub(super) struct Read {
    pub(super) ask: Resolved,
    /// It takes whatever format there is.
    pub(super) adopts: bool,
    pub(super) mode: Mode,
    pub(super) why: String,
}

pub(super) struct Planner<'a> {
    pub(super) model: &'a Model,
    pub(super) target: &'a Target,
    pub(super) config: &'a Config,
    pub(super) knowledge: &'a Knowledge,
    pub(super) rules: Rules,
    /// What is asked for at each node, in the order of [`SiteKind::ALL`].
    pub(super) sites: BTreeMap<NodeId, [Resolved; 4]>,
    /// Tensors with numbers given by hand.
    pub(super) given: BTreeMap<ValueId, &'a ByHand>,
    /// Nodes that run in integers, anchors and joins.
    pub(super) quantized: BTreeMap<NodeId, Kindness>,
    /// Why only the weight of a node is quantized.
    pub(super) notes: BTreeMap<NodeId, String>,
    /// Why a node that might have been quantized is not.
    pub(super) reasons: BTreeMap<NodeId, String>,
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

    pub(super) fn refuse(&mut self, node: NodeId, why: impl Into<String>) {
        self.reasons.entry(node).or_insert_with(|| why.into());
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

    /// "its input is switched off by …"
    pub(super) fn off(&self, node: NodeId, kind: SiteKind) -> Option<String> {
        let ask = self.ask(node, kind);
        ask.is_off().then(|| {
            let by = self.rules.rule(ask, Field::Enable).map_or("", |r| r.label.as_str());
            format!("its {} is switched off by {by}", kind.name())
        })
    }

    /// Whether a rule about certain nodes wants this site quantized whatever the target would do.
    pub(super) fn is_forced(&self, node: NodeId, kind: SiteKind) -> bool {
        let ask = self.ask(node, kind);
        ask.spec.enable == Some(true) && self.rules.rule(ask, Field::Enable).is_some_and(Rule::is_named)
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
            return Err(Refusal::Unfit("its weight is not constant".into()));
        };
        let dims = tensor.dims();
        let Some(layout) = ops::weight_layout(self.model, node, index, &dims) else {
            return Err(Refusal::Unfit(format!("a weight of shape {dims:?} is not supported")));
        };
        let kernel = self.target.anchor(self.model.node(node).op_type()).is_some();
        let shape = Shape { dims: &dims, layout, kernel: kernel && self.target.placement != Placement::Everywhere };
        let value = self.model.node(node).input(index);
        let ask = self.ask(node, SiteKind::Weight);
        let ask = value.map_or_else(|| ask.clone(), |value| self.ask_of(value, ask));
        let quantizer = self.reader(&self.site(node, SiteKind::Weight), SiteKind::Weight, &ask).weight(&shape)?;
        self.by_hand(value, quantizer).map_err(Refusal::Wrong)
    }

    /// Why a node may not be touched at all.
    pub(super) fn untouchable(&self, node: NodeId) -> Option<String> {
        if SiteKind::ALL.iter().all(|&kind| self.ask(node, kind).is_off()) {
            let rule = self.rules.rule(self.ask(node, SiteKind::Input), Field::Enable);
            return Some(format!("switched off by {}", rule.map_or("", |r| r.label.as_str())));
        }
        let quantized = self.model.node(node).inputs().iter().flatten().any(|&v| {
            self.model
                .producer(v)
                .is_some_and(|p| matches!(self.model.node(p).op_type(), "DequantizeLinear" | "DynamicQuantizeLinear"))
        });
        quantized.then(|| QUANTIZED_ALREADY.to_owned())
    }

    fn veto(&self, value: ValueId) -> Option<&Veto> {
        self.knowledge.vetoes.get(self.model.value(value).name())
    }

    /// Why a value cannot carry a quantizer with a fixed scale.
    pub(super) fn unquantizable(&self, value: ValueId) -> Option<String> {
        if let Some(veto) = self.veto(value) {
            return Some(veto.why.clone());
        }
        if let Some(why) = self.unquantized(value) {
            return Some(why);
        }
        let known = self.given.get(&value).is_some_and(|g| g.range.is_some() || g.scale.is_some());
        (!self.knowledge.calibrated && !known).then(|| super::WITHOUT_SAMPLES.to_owned())
    }

    /// Why a value cannot carry a quantizer of any kind.
    pub(super) fn unquantized(&self, value: ValueId) -> Option<String> {
        let name = self.model.value(value).name();
        if self.given.get(&value).is_some_and(|g| g.enable == Some(false)) {
            return Some(format!("\"{name}\" is switched off by [tensor.\"{name}\"]"));
        }
        match self.model.dtype(value) {
            Some(DataType::Float) | None => None,
            Some(other) => Some(format!("\"{name}\" is {other}, not float")),
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
        let integer = ask.spec.dtype.and_then(Dtype::element).is_some_and(crate::numerics::Format::is_integer);
        if ask.spec.symmetric != Some(false) || !integer || ask.is_off() {
            return false;
        }
        match at.op_type() {
            "Relu" => true,
            "Clip" => {
                let low = match at.input(1) {
                    Some(v) => self.model.constant(v).and_then(Tensor::to_f32).and_then(|v| v.first().copied()),
                    None => at.float("min"),
                };
                let high_known = match at.input(2) {
                    Some(v) => self.model.constant(v).is_some(),
                    None => true,
                };
                low == Some(0.0) && high_known
            }
            _ => false,
        }
    }

    /// The constant weight input of an anchor, its data inputs, or why it cannot be quantized.
    fn operands(&self, node: NodeId) -> Result<(Option<usize>, Vec<usize>), String> {
        let row = ops::of(self.model, node).ok_or("the operator table has no row for it")?;
        let at = self.model.node(node);
        let mut weight = None;
        let mut data = Vec::new();
        for (index, input) in at.inputs().iter().enumerate() {
            let Some(input) = *input else { continue };
            match row.role(index) {
                Role::Weight(_) if self.model.constant(input).is_some() => {
                    if weight.replace(index).is_some() {
                        return Err("both operands are constant".into());
                    }
                }
                Role::Weight(_) | Role::Data => data.push(index),
                Role::Bias | Role::Other => {}
            }
        }
        let has_weight_role = row.inputs.iter().any(|r| matches!(r, Role::Weight(_)));
        match weight {
            Some(index) => {
                let tensor = self.model.constant_input(node, index).ok_or("its weight is not constant")?;
                if tensor.dtype() != DataType::Float {
                    return Err(format!("its weight is {}, not float", tensor.dtype()));
                }
                if tensor.is_empty() {
                    return Err("its weight is empty".into());
                }
                if ops::weight_layout(self.model, node, index, &tensor.dims()).is_none() {
                    return Err(format!("a weight of shape {:?} is not supported", tensor.dims()));
                }
            }
            None if has_weight_role
                && self.target.placement != Placement::Everywhere
                && !self.is_forced(node, SiteKind::Input) =>
            {
                return Err(if row.op == "MatMul" {
                    "both operands are activations; quantizing them costs accuracy and saves no bytes".into()
                } else {
                    "its weight is not constant".into()
                });
            }
            None => {}
        }
        if at.is("Gemm") {
            if at.int("transA").unwrap_or(0) != 0 {
                return Err("transA is set".into());
            }
            if at.input(2).is_some() && (at.float("beta").unwrap_or(1.0) - 1.0).abs() > 0.0 {
                return Err("beta is not 1".into());
            }
        }
        Ok((weight, data))
    }

    /// Plans a Conv, a product and the like.
    fn anchor(&mut self, node: NodeId) -> Result<()> {
        let at = self.model.node(node);
        if !at.domain().is_empty() {
            return Ok(());
        }
        let op = at.op_type().to_owned();
        let Some(row) = ops::find(&op) else { return Ok(()) };
        let anchor = self.target.anchor(&op).cloned();
        // A weight needs no integer kernel to be stored in few bits. A table would be dequantized as a whole at every run
        // where the target has no form for it.
        let rows = self.ask(node, SiteKind::Weight).spec.form == Some(Form::GatherBlockQuantized);
        let floats = self.model.constant_input(node, 0).is_some_and(|t| t.dtype() == DataType::Float);
        let table = op == "Gather" && rows && floats && !self.is_forced(node, SiteKind::Weight);
        let gates = self.ask(node, SiteKind::Weight).spec.form == Some(Form::DynamicQuantizeLstm)
            && op == "LSTM"
            && self.target.forms.contains(&Form::DynamicQuantizeLstm);
        let stored = (op == "ConvTranspose" && !self.knowledge.calibrated) || table || gates;
        let known = anchor.is_some() || stored || self.is_forced(node, SiteKind::Weight);
        if !known || !row.inputs.iter().any(|r| matches!(r, Role::Data | Role::Weight(_))) {
            return Ok(());
        }
        if let Some(why) = self.untouchable(node) {
            self.refuse(node, why);
            return Ok(());
        }
        if row.inputs.get(1) == Some(&Role::Weight(ops::Channel::Gates)) {
            return self.gates(node, &op);
        }
        let (weight, data) = match self.operands(node) {
            Ok(found) => found,
            Err(why) => {
                self.refuse(node, why);
                return Ok(());
            }
        };
        let quantizer = match weight.map(|index| self.weight(node, index)).transpose() {
            Ok(quantizer) => quantizer,
            Err(Refusal::Wrong(error)) => return Err(error),
            Err(Refusal::Unfit(why)) => {
                self.refuse(node, why);
                return Ok(());
            }
        };
        if let Some(why) = weight.and_then(|_| self.knowledge.vetoes.get(&self.site(node, SiteKind::Weight))) {
            self.refuse(node, why.why.clone());
            return Ok(());
        }
        if let (true, Some(index), Some(quantizer)) = (table, weight, &quantizer)
            && let Err(why) = self.fits(Form::GatherBlockQuantized, node, index, false, quantizer, false)
        {
            self.refuse(node, why);
            return Ok(());
        }
        let weight_value = weight.and_then(|index| self.model.node(node).input(index));
        let weight_off = self.off(node, SiteKind::Weight).or_else(|| weight_value.and_then(|v| self.unquantized(v)));
        let everywhere = self.target.placement == Placement::Everywhere || self.is_forced(node, SiteKind::Input);
        if let Some(why) = weight_off.filter(|_| weight.is_some() && !everywhere) {
            self.refuse(node, why);
            return Ok(());
        }
        match self.integer(node, anchor.as_ref(), weight, quantizer.as_ref(), &data)? {
            Ok(()) => {}
            Err(NotInteger::WeightOnly(why)) if weight.is_some() && self.off(node, SiteKind::Weight).is_none() => {
                self.quantized.insert(node, Kindness::WeightOnly);
                self.notes.insert(node, why);
            }
            Err(NotInteger::Float(why) | NotInteger::WeightOnly(why)) => self.refuse(node, why),
        }
        Ok(())
    }

    /// Plans the activations of an anchor, or says why they stay float.
    fn integer(
        &mut self,
        node: NodeId,
        anchor: Option<&Anchor>,
        weight: Option<usize>,
        quantizer: Option<&Scheme>,
        data: &[usize],
    ) -> Result<Result<(), NotInteger>> {
        let op = self.model.node(node).op_type().to_owned();
        let no = |why: String| Ok(Err(NotInteger::WeightOnly(why)));
        let Some(anchor) = anchor else {
            return no(format!("{} has no integer kernel for it", self.target.name));
        };
        if let Some(why) = self.off(node, SiteKind::Input) {
            return no(why);
        }
        if self.per_token(node, SiteKind::Input) {
            return self.token(node, data, weight).map(|why| Err(NotInteger::WeightOnly(why)));
        }
        let ask = self.ask(node, SiteKind::Input).clone();
        let stored = self.ask(node, SiteKind::Weight).spec.form.filter(|&f| f != Form::Qdq && f.serves(&op));
        let stored = stored.filter(|f| weight.is_some() && self.target.forms.contains(f));
        let lowered = stored == Some(Form::Matmulinteger);
        if let Some(form) = stored.filter(|_| !lowered) {
            return no(format!("stored as {form}, it reads floats"));
        }
        let (asked, run_time) = match self.activation(node, SiteKind::Input, &ask) {
            Ok(found) => found,
            Err(Refusal::Wrong(error)) => return Err(error),
            Err(Refusal::Unfit(why)) => return no(why),
        };
        let fused = self.target.placement == Placement::Fused && !self.target.simulate;
        if let Some(weight) = quantizer.filter(|q| !q.dtype.is_integer() && fused) {
            return no(format!("{} does not load {} weights beside codes", self.target.name, weight.dtype));
        }
        let blocks = asked.scale_dtype.is_block();
        if let Some(why) = self.unfit_blocks(node, &asked) {
            return no(why);
        }
        let kernel = integer_kernel(&asked, quantizer);
        let forced = self.is_forced(node, SiteKind::Input) || self.target.placement == Placement::Everywhere;
        let named = [Field::Dtype, Field::Dynamic].iter().any(|&f| ask.from(f) > Some(0));
        if !kernel && !forced && !named {
            return no(match quantizer {
                Some(q) => format!("{} has no integer kernel for {} weights like these", self.target.name, q.dtype),
                None => format!("{} has no integer kernel for {}", self.target.name, asked.dtype),
            });
        }
        let lowered = lowered
            && run_time
            && weight.zip(quantizer).is_some_and(|(index, q)| self.integer_product(node, index, q).is_ok());
        let dynamic_fits = lowered
            || anchor.dynamic
                && self.target.dynamic
                && weight == Some(1)
                && integer_kernel(
                    &Scheme::new(crate::numerics::Format::Uint8, false, crate::numerics::Granularity::PerTensor),
                    quantizer,
                )
                && !(op == "Gemm" && self.model.node(node).input(2).is_some());
        if run_time && !dynamic_fits && !blocks {
            let why = format!("{} has no {op} like this whose input is quantized at run time", self.target.name);
            return match self.rules.rule(&ask, Field::Dynamic) {
                Some(rule) if rule.is_named() && !rule.optional => {
                    let error = Error::new(Kind::Config, format!("{}, input.dynamic: {why}", rule.label));
                    let error = error.at_node(self.model.node_name(node), &op);
                    Err(rule.origin.at(error, "input.dynamic").with_hint("leave it out for this operator"))
                }
                _ => no(why),
            };
        }
        let output = match self.output_site(node) {
            Some(_) if blocks => None,
            Some((site, ask)) if (anchor.output && !lowered) || self.is_forced(node, SiteKind::Output) => {
                if let Some(why) = ask.is_off().then(|| self.off_by(&ask, "output")) {
                    return no(format!("{why}, and the integer {op} needs a quantized output"));
                }
                Some((site, ask))
            }
            Some(_) => None,
            None => return Ok(Ok(())),
        };
        let inputs: Vec<(usize, ValueId)> =
            data.iter().filter_map(|&i| Some((i, self.model.node(node).input(i)?))).collect();
        let mut modes = Vec::new();
        for &(_, value) in &inputs {
            if run_time {
                match self.unquantized(value).or_else(|| self.veto(value).filter(|v| !v.dynamic).map(|v| v.why.clone()))
                {
                    Some(why) => return Ok(Err(NotInteger::Float(why))),
                    None => modes.push(Mode::Dynamic),
                }
                continue;
            }
            match self.unquantizable(value) {
                None => modes.push(Mode::Static),
                Some(_) if !self.knowledge.calibrated && self.veto(value).is_none() => {
                    return no(if weight.is_some() {
                        super::WITHOUT_SAMPLES.to_owned()
                    } else {
                        "it has no constant weight, and without samples activations stay float".to_owned()
                    });
                }
                Some(why) => {
                    if !(dynamic_fits && self.veto(value).is_some_and(|v| v.dynamic)) {
                        return Ok(Err(NotInteger::Float(why)));
                    }
                    modes.push(Mode::Dynamic);
                }
            }
        }
        if let Some(why) = self.unfit_bias(node, weight).filter(|_| !lowered) {
            return Ok(Err(NotInteger::Float(why)));
        }
        if let Some(why) = output.as_ref().and_then(|(site, _)| self.unquantizable(*site)) {
            let why = format!("{why}; the integer {op} needs a quantized output");
            return if self.knowledge.calibrated { Ok(Err(NotInteger::Float(why))) } else { no(why) };
        }
        self.quantized.insert(node, Kindness::Integer);
        for (&(index, value), mode) in inputs.iter().zip(modes) {
            let why = match (mode, self.veto(value)) {
                (Mode::Dynamic, Some(veto)) => veto.why.clone(),
                _ => format!("input of the {op} \"{}\"", self.model.node_name(node)),
            };
            self.read(value, (node, index), Read { ask: ask.clone(), adopts: false, mode, why });
        }
        if let Some((site, ask)) = output {
            let why = format!("output of the {op} \"{}\"", self.model.node_name(node));
            self.make(site, Made { ask, keeps: None, why });
        }
        Ok(Ok(()))
    }

    pub(super) fn off_by(&self, ask: &Resolved, what: &str) -> String {
        let by = self.rules.rule(ask, Field::Enable).map_or("", |r| r.label.as_str());
        format!("its {what} is switched off by {by}")
    }

    /// Quantizes what a rule about this very node or operator asks for, where the target would not.
    fn force(&mut self, node: NodeId) {
        let Some(row) = ops::of(self.model, node) else { return };
        if self.quantized.get(&node) == Some(&Kindness::Integer) || self.untouchable(node).is_some() {
            return;
        }
        let op = self.model.node(node).op_type().to_owned();
        let name = self.model.node_name(node).to_owned();
        if self.is_forced(node, SiteKind::Input) && !self.per_token(node, SiteKind::Input) {
            let inputs = self.model.node(node).inputs().iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?)));
            let data: Vec<(usize, ValueId)> = inputs
                .filter(|&(i, v)| {
                    matches!(row.role(i), Role::Data | Role::Weight(_)) && self.model.constant(v).is_none()
                })
                .collect();
            for (index, value) in data {
                let ask = self.ask(node, SiteKind::Input).clone();
                let blocks = ask.spec.dtype.is_some_and(|d| d.block().is_some());
                if self.unquantizable(value).is_none() && !blocks {
                    let why = format!("input of the {op} \"{name}\", as asked for");
                    self.read(value, (node, index), Read { ask, adopts: false, mode: Mode::Static, why });
                }
            }
        }
        if self.is_forced(node, SiteKind::Output)
            && let Some((site, ask)) = self.output_site(node)
            && self.unquantizable(site).is_none()
        {
            self.make(site, Made { ask, keeps: None, why: format!("output of the {op} \"{name}\", as asked for") });
        }
    }
}

/// Why an anchor does not run in integers, and what becomes of its weight.
enum NotInteger {
    Float(String),
    WeightOnly(String),
}

/// Whether integer kernels take activations and weights like these.
fn integer_kernel(activation: &Scheme, weight: Option<&Scheme>) -> bool {
    use crate::numerics::{Format, Granularity};
    let eight = |q: &Scheme| matches!(q.dtype, Format::Int8 | Format::Uint8);
    let grouped = |q: &Scheme| matches!(q.granularity, Granularity::PerGroup { .. });
    eight(activation) && weight.is_none_or(|w| eight(w) && !grouped(w))
}

/// Lets what merely stays float pass.
fn fit(refusal: Refusal) -> Result<()> {
    match refusal {
        Refusal::Wrong(error) => Err(error),
        Refusal::Unfit(_) => Ok(()),
    }
}
