//! Decides.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use petgraph::unionfind::UnionFind;

use super::{
    Activation, BESIDE_KERNEL, Bias, Mode, Plan, QUANTIZED_ALREADY, Quantizer, Readers, SCHEMA, Skip, Slot, Weight,
};
use crate::config::rules::Rules;
use crate::config::spec::Field;
use crate::config::{Config, SiteKind};
use crate::error::{Error, Kind, Result};
use crate::ir::{Def, Model, NodeId, User, ValueId};
use crate::numerics::{Format, Granularity};
use crate::onnx::DataType;
use crate::ops::{self, Output, Reduction, Role};
use crate::targets::{BiasForm, Placement, Residual, Target};

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
    /// Whether there are samples; without, activations stay float.
    pub calibrated: bool,
    /// Tensors and constant sites (`<node>.weight`) that must not be quantized.
    pub vetoes: BTreeMap<String, Veto>,
}

/// Decides.
///
/// # Errors
/// An exclusion that matches nothing, or a model no newer than the target can load.
pub fn plan(model: &Model, config: &Config, target: &Target, knowledge: &Knowledge) -> Result<Plan> {
    let rules = Rules::new(target, config)?;
    rules.check(model)?;
    let opset = model.opset().unwrap_or(0).max(13);
    if opset > target.opset_max {
        return Err(Error::new(
            Kind::Model,
            format!("the model needs operator set {opset}; target {} loads at most {}", target.name, target.opset_max),
        )
        .with_hint("export the model at an older operator set, or choose another --target"));
    }
    let planner = Planner {
        model,
        target,
        knowledge,
        rules,
        quantized: BTreeMap::new(),
        reasons: BTreeMap::new(),
        wants: BTreeMap::new(),
        unions: Vec::new(),
    };
    Ok(planner.run(opset))
}

/// How a value is quantized, while the plan grows.
#[derive(Clone, Debug)]
struct Want {
    mode: Mode,
    produced: bool,
    readers: BTreeSet<(NodeId, usize)>,
    why: String,
}

struct Planner<'a> {
    model: &'a Model,
    target: &'a Target,
    knowledge: &'a Knowledge,
    rules: Rules,
    /// Nodes that run in integers, anchors and joins.
    quantized: BTreeMap<NodeId, Kindness>,
    /// Why a node that might have been quantized is not.
    reasons: BTreeMap<NodeId, String>,
    wants: BTreeMap<ValueId, Want>,
    unions: Vec<(ValueId, ValueId)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kindness {
    /// Reads quantized activations and, where it has one, a quantized weight.
    Integer,
    /// Only its weight is quantized.
    WeightOnly,
}

impl Planner<'_> {
    fn run(mut self, opset: i64) -> Plan {
        let nodes = self.model.graph(self.model.main()).nodes().to_vec();
        for &node in &nodes {
            self.anchor(node);
        }
        if self.knowledge.calibrated {
            match self.target.placement {
                Placement::Inputs => {
                    if self.target.residual == Residual::Shortcut {
                        let depths = self.depths(&nodes);
                        for &node in &nodes {
                            self.shortcut(node, &depths);
                        }
                    }
                }
                Placement::Fused | Placement::Everywhere => self.spread(&nodes),
            }
        }
        self.finish(opset, &nodes)
    }

    fn name(&self, value: ValueId) -> String {
        self.model.value(value).name().to_owned()
    }

    fn slot(&self, node: NodeId, input: usize) -> Slot {
        let first = self.model.node(node).outputs().iter().flatten().next();
        Slot { node: first.map(|&v| self.name(v)).unwrap_or_default(), input }
    }

    fn refuse(&mut self, node: NodeId, why: impl Into<String>) {
        self.reasons.entry(node).or_insert_with(|| why.into());
    }

    /// Why a node may not be touched at all.
    fn untouchable(&self, node: NodeId) -> Option<String> {
        let name = self.model.node_name(node);
        let op = self.model.node(node).op_type();
        let sites = SiteKind::ALL.map(|kind| self.rules.site(name, op, kind, false));
        if sites.iter().all(|s| s.is_off()) {
            let rule = self.rules.rule(&sites[0], Field::Enable);
            return Some(format!("excluded by {}", rule.map_or("", |r| r.label.as_str())));
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

    /// Why a value cannot carry a quantizer.
    fn unquantizable(&self, value: ValueId) -> Option<String> {
        if let Some(veto) = self.veto(value) {
            return Some(veto.why.clone());
        }
        match self.model.dtype(value) {
            Some(DataType::Float) | None => None,
            Some(other) => Some(format!("\"{}\" is {other}, not float", self.model.value(value).name())),
        }
    }

    /// The value at which the output of `node` is quantized: after the Relu or Clip that vanishes into the quantizer.
    fn output_site(&self, node: NodeId) -> Option<ValueId> {
        let output = self.model.node(node).output(0)?;
        let [User::Node { node: next, input: 0 }] = self.model.value(output).users() else { return Some(output) };
        if self.model.node(*next).graph() != self.model.node(node).graph() || !self.absorbs(*next) {
            return Some(output);
        }
        self.model.node(*next).output(0)
    }

    /// Whether a node vanishes into a quantizer behind it: a Relu, or a Clip at a lower bound of zero. Its zero point is
    /// then the lowest code, so that the quantizer clips exactly there.
    fn absorbs(&self, node: NodeId) -> bool {
        let at = self.model.node(node);
        if !at.domain().is_empty() || !self.target.absorb.has(at.op_type()) || self.untouchable(node).is_some() {
            return false;
        }
        match at.op_type() {
            "Relu" => !self.target.activation.symmetric,
            "Clip" => {
                let low = match at.input(1) {
                    Some(v) => {
                        self.model.constant(v).and_then(crate::ir::Tensor::to_f32).and_then(|v| v.first().copied())
                    }
                    None => at.float("min"),
                };
                let high_known = match at.input(2) {
                    Some(v) => self.model.constant(v).is_some(),
                    None => true,
                };
                !self.target.activation.symmetric && low == Some(0.0) && high_known
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
                let tensor = self.model.constant_input(node, index).expect("just found");
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
            None if has_weight_role && self.target.placement != Placement::Everywhere => {
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
            // An integer Gemm takes an int32 bias or none.
            let strict = self.target.placement == Placement::Fused && self.knowledge.calibrated;
            if let (Some(bias), Some(weight), true) = (at.input(2), weight, strict) {
                if (at.float("alpha").unwrap_or(1.0) - 1.0).abs() > 0.0 {
                    return Err("alpha is not 1 beside a bias".into());
                }
                match self.model.constant(bias) {
                    None => return Err("its bias is not constant".into()),
                    Some(bias) if self.channels(node, weight).is_none_or(|c| !is_row(&bias.dims(), c)) => {
                        return Err("its bias is not one value a column".into());
                    }
                    Some(_) => {}
                }
            }
        }
        Ok((weight, data))
    }

    fn anchor(&mut self, node: NodeId) {
        let at = self.model.node(node);
        if !at.domain().is_empty() {
            return;
        }
        let op = at.op_type().to_owned();
        let Some(row) = ops::find(&op) else { return };
        let anchor = self.target.anchor(&op).cloned();
        let weight_only = !self.knowledge.calibrated;
        // Without samples only weights are quantized, and a weight needs no integer kernel to be stored in 8 bits.
        let known = anchor.is_some() || (weight_only && op == "ConvTranspose");
        if !known || !row.inputs.iter().any(|r| matches!(r, Role::Data | Role::Weight(_))) {
            return;
        }
        if let Some(why) = self.untouchable(node) {
            return self.refuse(node, why);
        }
        let (weight, data) = match self.operands(node) {
            Ok(found) => found,
            Err(why) => return self.refuse(node, why),
        };
        if let Some(why) = weight.and_then(|_| self.knowledge.vetoes.get(&self.weight_site(node))) {
            return self.refuse(node, why.why.clone());
        }
        if weight_only {
            if weight.is_some() {
                self.quantized.insert(node, Kindness::WeightOnly);
            } else {
                self.refuse(node, "it has no constant weight, and without samples activations stay float");
            }
            return;
        }
        let Some(anchor) = anchor else { return };
        let inputs: Vec<(usize, ValueId)> =
            data.iter().map(|&i| (i, self.model.node(node).input(i).expect("operands lists present ones"))).collect();
        let mut modes = Vec::new();
        for &(_, value) in &inputs {
            match self.unquantizable(value) {
                None => modes.push(Mode::Static),
                Some(why) => {
                    let dynamic = anchor.dynamic
                        && self.target.dynamic
                        && weight == Some(1)
                        && !(op == "Gemm" && self.model.node(node).input(2).is_some())
                        && self.veto(value).is_some_and(|v| v.dynamic);
                    if !dynamic {
                        return self.refuse(node, why);
                    }
                    modes.push(Mode::Dynamic);
                }
            }
        }
        let output = if anchor.output {
            let Some(site) = self.output_site(node) else { return };
            if let Some(why) = self.unquantizable(site) {
                return self.refuse(node, format!("{why}; the integer {op} needs a quantized output"));
            }
            Some(site)
        } else {
            None
        };
        self.quantized.insert(node, Kindness::Integer);
        for (&(index, value), mode) in inputs.iter().zip(modes) {
            let why = match mode {
                Mode::Static => format!("input of the {op} \"{}\"", self.model.node_name(node)),
                Mode::Dynamic => self.veto(value).map(|v| v.why.clone()).unwrap_or_default(),
            };
            self.read(value, node, index, mode, &why);
        }
        if let Some(site) = output {
            self.produce(site, format!("output of the {op} \"{}\"", self.model.node_name(node)));
        }
    }

    /// Output channels of the constant weight at `input`.
    fn channels(&self, node: NodeId, input: usize) -> Option<usize> {
        let dims = self.model.constant_input(node, input)?.dims();
        let axis = ops::weight_layout(self.model, node, input, &dims)?.channel_axis?;
        Some(dims[axis])
    }

    fn weight_site(&self, node: NodeId) -> String {
        format!("{}.weight", self.model.node_name(node))
    }

    fn read(&mut self, value: ValueId, node: NodeId, input: usize, mode: Mode, why: &str) {
        let want = self.wants.entry(value).or_insert_with(|| Want {
            mode,
            produced: false,
            readers: BTreeSet::new(),
            why: why.to_owned(),
        });
        want.readers.insert((node, input));
    }

    fn produce(&mut self, value: ValueId, why: String) {
        let want = self.wants.entry(value).or_insert_with(|| Want {
            mode: Mode::Static,
            produced: true,
            readers: BTreeSet::new(),
            why: why.clone(),
        });
        want.produced = true;
        want.why = why;
    }

    fn wanted(&self, value: ValueId) -> bool {
        self.wants.get(&value).is_some_and(|w| w.mode == Mode::Static)
    }

    /// Joins and carriers, until nothing changes.
    fn spread(&mut self, nodes: &[NodeId]) {
        loop {
            let before = (self.wants.len(), self.quantized.len(), self.unions.len());
            // A value is wanted in integers if some chain of carriers and joins leads from it to a wanted one.
            let mut ahead: BTreeSet<ValueId> = self.wants.keys().copied().filter(|&v| self.wanted(v)).collect();
            for &node in nodes.iter().rev() {
                if self.carries(node) {
                    if self.outputs(node).iter().any(|v| ahead.contains(v)) {
                        ahead.extend(self.model.node(node).input(0));
                    }
                } else if self.joins(node)
                    && self.output_site(node).is_some_and(|v| ahead.contains(&v))
                    && let Ok((data, _)) = self.joinable(node)
                {
                    ahead.extend(data.iter().map(|&(_, v)| v));
                }
            }
            // A value is at hand in integers if it is wanted, or carried from one that is.
            let mut behind: BTreeSet<ValueId> = self.wants.keys().copied().filter(|&v| self.wanted(v)).collect();
            let everywhere = self.target.placement == Placement::Everywhere;
            for &node in nodes {
                if self.carries(node) {
                    let Some(input) = self.model.node(node).input(0) else { continue };
                    let outputs = self.outputs(node);
                    let useful = everywhere || outputs.iter().any(|v| ahead.contains(v));
                    if useful && (behind.contains(&input) || everywhere) {
                        self.carry(node, input, &outputs);
                        behind.extend(outputs);
                        behind.insert(input);
                    }
                } else if self.joins(node) {
                    self.join(node, &ahead, &mut behind);
                }
            }
            if before == (self.wants.len(), self.quantized.len(), self.unions.len()) {
                return;
            }
        }
    }

    fn outputs(&self, node: NodeId) -> Vec<ValueId> {
        self.model.node(node).outputs().iter().flatten().copied().collect()
    }

    /// Whether a node moves codes: one scale on both sides, nothing computed.
    fn carries(&self, node: NodeId) -> bool {
        let at = self.model.node(node);
        if !at.domain().is_empty() || !self.target.carry.has(at.op_type()) || self.untouchable(node).is_some() {
            return false;
        }
        let Some(input) = at.input(0) else { return false };
        ops::moves_codes(self.model, node)
            && self.model.constant(input).is_none()
            && self.unquantizable(input).is_none()
            && self.outputs(node).iter().all(|&v| self.unquantizable(v).is_none())
    }

    fn carry(&mut self, node: NodeId, input: ValueId, outputs: &[ValueId]) {
        let op = self.model.node(node).op_type().to_owned();
        let name = self.model.node_name(node).to_owned();
        self.read(input, node, 0, Mode::Static, &format!("input of the {op} \"{name}\""));
        for &output in outputs {
            self.produce(output, format!("output of the {op} \"{name}\", which keeps its input's scale"));
            if !self.unions.contains(&(input, output)) {
                self.unions.push((input, output));
            }
        }
    }

    /// Whether a node runs in integers between quantized neighbours, and is not planned yet.
    fn joins(&self, node: NodeId) -> bool {
        let at = self.model.node(node);
        at.domain().is_empty() && self.target.join.has(at.op_type()) && !self.quantized.contains_key(&node)
    }

    /// The data inputs of a join, and the constant ones; or why it cannot be one.
    #[allow(clippy::type_complexity)]
    fn joinable(&self, node: NodeId) -> Result<(Vec<(usize, ValueId)>, Vec<(usize, ValueId)>), String> {
        if let Some(why) = self.untouchable(node) {
            return Err(why);
        }
        let (Some(output), Some(row)) = (self.output_site(node), ops::of(self.model, node)) else {
            return Err("it has no output".to_owned());
        };
        let inputs = self.model.node(node).inputs().iter().enumerate();
        let (constants, data): (Vec<_>, Vec<_>) = inputs
            .filter(|(i, _)| row.role(*i) == Role::Data)
            .filter_map(|(i, v)| v.map(|v| (i, v)))
            .partition(|&(_, v)| self.model.constant(v).is_some());
        for &(_, value) in data.iter().chain([(0, output)].iter()) {
            if let Some(why) = self.unquantizable(value) {
                return Err(why);
            }
        }
        for tensor in constants.iter().filter_map(|&(_, v)| self.model.constant(v)) {
            if tensor.dtype() != DataType::Float {
                return Err(format!("its constant operand is {}, not float", tensor.dtype()));
            }
        }
        match self.knowledge.vetoes.get(&self.operand_site(node)) {
            Some(veto) => Err(veto.why.clone()),
            None => Ok((data, constants)),
        }
    }

    fn join(&mut self, node: NodeId, ahead: &BTreeSet<ValueId>, behind: &mut BTreeSet<ValueId>) {
        let Some(output) = self.output_site(node) else { return };
        let data = match self.joinable(node) {
            Ok((data, _)) => data,
            Err(why) => return self.refuse(node, why),
        };
        if data.is_empty() {
            return;
        }
        let everywhere = self.target.placement == Placement::Everywhere;
        if !(everywhere || ahead.contains(&output) && data.iter().any(|(_, v)| behind.contains(v))) {
            return;
        }
        for &(_, value) in data.iter().chain([(0, output)].iter()) {
            if everywhere && self.model.dtype(value).is_none() && !behind.contains(&value) {
                return self.refuse(node, format!("the type of \"{}\" is not known", self.name(value)));
            }
        }
        let op = self.model.node(node).op_type().to_owned();
        let name = self.model.node_name(node).to_owned();
        self.quantized.insert(node, Kindness::Integer);
        for (index, value) in data {
            self.read(value, node, index, Mode::Static, &format!("input of the {op} \"{name}\""));
            behind.insert(value);
        }
        self.produce(output, format!("output of the {op} \"{name}\""));
        behind.insert(output);
    }

    fn operand_site(&self, node: NodeId) -> String {
        format!("{}.input", self.model.node_name(node))
    }

    /// Residual sums of a target that fuses the sum into the convolution: only the other input is quantized.
    fn shortcut(&mut self, node: NodeId, depths: &BTreeMap<NodeId, usize>) {
        let at = self.model.node(node);
        if !at.is("Add") || self.untouchable(node).is_some() {
            return;
        }
        let (Some(a), Some(b)) = (at.input(0), at.input(1)) else { return };
        let fused = |value: ValueId| {
            let conv = self.model.producer(value)?;
            let single = self.model.value(value).users().len() == 1;
            (single && self.model.node(conv).is("Conv") && self.quantized.contains_key(&conv)).then_some(conv)
        };
        // Of two convolutions the one with more behind it ends the main branch, wherever the file lists it.
        let other = match (fused(a), fused(b)) {
            (Some(x), Some(y)) if depths[&x] < depths[&y] => (0, a),
            (Some(_), _) => (1, b),
            (None, Some(_)) => (0, a),
            (None, None) => return,
        };
        if self.model.constant(other.1).is_some() || self.unquantizable(other.1).is_some() {
            return;
        }
        let why = format!("shortcut into the residual sum \"{}\"", self.model.node_name(node));
        self.read(other.1, node, other.0, Mode::Static, &why);
    }

    /// For each node of a sorted graph, the length of the longest path that leads to it.
    fn depths(&self, nodes: &[NodeId]) -> BTreeMap<NodeId, usize> {
        let mut depths = BTreeMap::new();
        for &node in nodes {
            let producers = self.model.node(node).inputs().iter().flatten().filter_map(|&v| self.model.producer(v));
            let depth = producers.filter_map(|p| depths.get(&p)).max().map_or(0, |d: &usize| d + 1);
            depths.insert(node, depth);
        }
        depths
    }

    fn finish(mut self, opset: i64, nodes: &[NodeId]) -> Plan {
        let leaders = self.leaders();
        let mut activations = BTreeMap::new();
        for (&value, want) in &self.wants {
            let fixed = self.model.producer(value).and_then(|p| ops::of(self.model, p)).and_then(|r| match r.output {
                Output::Range(low, high) => Some((low, high)),
                _ => None,
            });
            let readers = if want.produced {
                Readers::All
            } else {
                Readers::Listed(want.readers.iter().map(|&(n, i)| self.slot(n, i)).collect())
            };
            let (dtype, symmetric) = match want.mode {
                Mode::Static => (self.target.activation.dtype, self.target.activation.symmetric),
                // DynamicQuantizeLinear knows no other.
                Mode::Dynamic => (Format::Uint8, false),
            };
            let activation = Activation {
                tensor: None,
                quantizer: Quantizer::new(dtype, symmetric, Granularity::PerTensor),
                mode: want.mode,
                converts: None,
                scale_of: self.name(leaders.get(&value).copied().unwrap_or(value)),
                range: fixed,
                readers,
                fence: self.target.placement == Placement::Fused && !want.produced && self.exposed(value),
                why: want.why.clone(),
            };
            activations.insert(self.name(value), activation);
        }
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        let mut sums = Vec::new();
        for &node in nodes {
            if let Some(&kind) = self.quantized.get(&node) {
                self.constants(node, kind, &mut weights, &mut biases);
                if kind == Kindness::Integer && self.target.placement == Placement::Fused {
                    self.sum(node, &weights, &mut biases, &mut sums);
                }
            }
        }
        let skipped = self.skipped(nodes, &weights, &biases);
        Plan {
            schema: SCHEMA,
            target: self.target.name.clone(),
            opset: if activations.is_empty() && weights.is_empty() { self.model.opset().unwrap_or(0) } else { opset },
            activations,
            weights,
            biases,
            sums,
            splits: Vec::new(),
            skipped,
        }
    }

    /// Whether onnxruntime would quantize the weight of the float operator that makes this value by itself.
    fn exposed(&self, value: ValueId) -> bool {
        let Some(node) = self.model.producer(value) else { return false };
        let at = self.model.node(node);
        if !at.domain().is_empty() || self.quantized.get(&node) == Some(&Kindness::Integer) {
            return false;
        }
        let float_product = |v: Option<ValueId>| {
            let product = v.and_then(|v| self.model.producer(v)).filter(|&p| self.model.node(p).is("MatMul"));
            product.is_some_and(|p| {
                let constant = self.model.constant_input(p, 1).is_some();
                constant && !self.quantized.contains_key(&p) && self.dequantized(self.model.node(p).input(0))
            })
        };
        match at.op_type() {
            "Conv" | "ConvTranspose" | "Gemm" => {
                self.model.constant_input(node, 1).is_some() && self.dequantized(at.input(0))
            }
            // A Gemm to be.
            "Add" => float_product(at.input(0)) || float_product(at.input(1)),
            // A quantizer moves up through these.
            op if self.target.absorb.has(op) || self.target.carry.has(op) => {
                at.input(0).is_some_and(|v| self.exposed(v))
            }
            _ => false,
        }
    }

    /// Whether a value comes from a Dequantize, directly or through operators that one moves down through.
    fn dequantized(&self, value: Option<ValueId>) -> bool {
        let Some(value) = value else { return false };
        if self.wants.get(&value).is_some_and(|w| w.produced) {
            return true;
        }
        let Some(node) = self.model.producer(value) else { return false };
        let at = self.model.node(node);
        at.is("DequantizeLinear")
            || (at.domain().is_empty() && self.target.carry.has(at.op_type()) && self.dequantized(at.input(0)))
    }

    /// The sum behind an integer product: a bias at the scale of its accumulator, or a Sum that is not taken for one.
    fn sum(&self, node: NodeId, weights: &[Weight], biases: &mut Vec<Bias>, sums: &mut Vec<String>) {
        let product = self.model.node(node);
        let Some(output) = product.output(0).filter(|v| product.is("MatMul") && !self.wants.contains_key(v)) else {
            return;
        };
        let &[User::Node { node: add, input }] = self.model.value(output).users() else { return };
        let at = self.model.node(add);
        if !at.is("Add") || at.graph() != product.graph() || self.quantized.contains_key(&add) {
            return;
        }
        let Some(other) = at.input(1 - input) else { return };
        let constant = self.model.constant(other);
        let rank = constant.map(|t| t.dims().len()).or_else(|| self.model.shape(other).map(|s| s.len()));
        if rank.is_some_and(|r| r == 0 || r > 2) {
            return;
        }
        let slot = self.slot(node, 1);
        let weight = weights.iter().position(|w| w.at == slot);
        let fixed = product.input(0).is_some_and(|v| self.wanted(v));
        if let (Some(tensor), Some(weight), Some(channels)) = (constant, weight, self.channels(node, 1)) {
            let dims = tensor.dims();
            let keeps_rank = dims.len() == 1 || self.model.shape(output).is_some_and(|s| s.len() >= 2);
            if fixed
                && keeps_rank
                && dims.last() == Some(&channels)
                && is_row(&dims, channels)
                && tensor.dtype() == DataType::Float
                && self.target.bias == BiasForm::Int32
                && self.untouchable(add).is_none()
            {
                biases.push(Bias {
                    site: format!("{}.bias", self.model.node_name(node)),
                    at: self.slot(add, 1 - input),
                    tensor: self.name(other),
                    channels,
                    activation: self.name(product.input(0).unwrap_or(output)),
                    weight,
                });
                return;
            }
        }
        sums.extend(at.output(0).map(|v| self.name(v)));
    }

    /// For each value that shares a scale, the first value of its group in arena order.
    fn leaders(&self) -> HashMap<ValueId, ValueId> {
        let values: Vec<ValueId> = self.wants.keys().copied().collect();
        let at: HashMap<ValueId, usize> = values.iter().enumerate().map(|(i, &v)| (v, i)).collect();
        let mut sets = UnionFind::<usize>::new(values.len());
        for (a, b) in &self.unions {
            if let (Some(&a), Some(&b)) = (at.get(a), at.get(b)) {
                sets.union(a, b);
            }
        }
        let mut first: HashMap<usize, ValueId> = HashMap::new();
        values.iter().enumerate().map(|(i, &v)| (v, *first.entry(sets.find(i)).or_insert(v))).collect()
    }

    fn constants(&self, node: NodeId, kind: Kindness, weights: &mut Vec<Weight>, biases: &mut Vec<Bias>) {
        let at = self.model.node(node);
        let Some(row) = ops::of(self.model, node) else { return };
        let mut main = None;
        for (index, input) in at.inputs().iter().enumerate() {
            let Some(value) = *input else { continue };
            let Some(tensor) = self.model.constant(value) else { continue };
            match row.role(index) {
                Role::Weight(_) => {
                    let dims = tensor.dims();
                    let Some(layout) = ops::weight_layout(self.model, node, index, &dims) else { continue };
                    let left = index == 0 && at.is("MatMul");
                    let slot =
                        if left { self.target.left_weight.unwrap_or(self.target.weight) } else { self.target.weight };
                    let granularity = match layout.channel_axis {
                        Some(axis) if slot.per_channel => Granularity::PerChannel { axis },
                        _ => Granularity::PerTensor,
                    };
                    let saturates = self.target.pair_safe
                        && kind == Kindness::Integer
                        && slot.dtype == Format::Int8
                        && !layout.depthwise;
                    let pair_safe = (saturates && layout.reduction != Reduction::None).then_some(layout.reduction);
                    main = Some(weights.len());
                    weights.push(Weight {
                        site: self.weight_site(node),
                        at: self.slot(node, index),
                        tensor: self.name(value),
                        quantizer: Quantizer::new(slot.dtype, slot.symmetric, granularity),
                        transpose: false,
                        pair_safe,
                        why: match kind {
                            Kindness::Integer => format!("weight of an integer {}", at.op_type()),
                            Kindness::WeightOnly => format!("weight of a float {}", at.op_type()),
                        },
                    });
                }
                Role::Data => weights.push(Weight {
                    site: self.operand_site(node),
                    at: self.slot(node, index),
                    tensor: self.name(value),
                    quantizer: Quantizer::new(
                        self.target.activation.dtype,
                        self.target.activation.symmetric,
                        Granularity::PerTensor,
                    ),
                    transpose: false,
                    pair_safe: None,
                    why: format!("constant operand of an integer {}", at.op_type()),
                }),
                Role::Bias => {
                    if let Some(bias) = self.bias(node, kind, index, value, main, weights) {
                        biases.push(bias);
                    }
                }
                Role::Other => {}
            }
        }
    }

    fn bias(
        &self,
        node: NodeId,
        kind: Kindness,
        index: usize,
        value: ValueId,
        weight: Option<usize>,
        weights: &[Weight],
    ) -> Option<Bias> {
        let at = self.model.node(node);
        let weight = weight?;
        let tensor = self.model.constant(value)?;
        let data = at.input(0)?;
        let dynamic = self.wants.get(&data).is_none_or(|w| w.mode == Mode::Dynamic);
        let dims = tensor.dims();
        let channels = self.channels(node, weights[weight].at.input);
        let channels = channels.or_else(|| dims.first().copied().filter(|_| dims.len() == 1))?;
        let fits = is_row(&dims, channels);
        let plain = (at.float("alpha").unwrap_or(1.0) - 1.0).abs() == 0.0;
        let wanted = kind == Kindness::Integer
            && self.target.bias == BiasForm::Int32
            && tensor.dtype() == DataType::Float
            && !dynamic
            && fits
            && plain;
        wanted.then(|| Bias {
            site: format!("{}.bias", self.model.node_name(node)),
            at: self.slot(node, index),
            tensor: self.name(value),
            channels,
            activation: self.name(data),
            weight,
        })
    }

    fn skipped(&mut self, nodes: &[NodeId], weights: &[Weight], biases: &[Bias]) -> Vec<Skip> {
        let done: BTreeSet<&Slot> = weights.iter().map(|w| &w.at).chain(biases.iter().map(|b| &b.at)).collect();
        let mut skips = Vec::new();
        for &node in nodes {
            let at = self.model.node(node);
            let bytes: u64 = at
                .inputs()
                .iter()
                .enumerate()
                .filter_map(|(i, v)| Some((i, self.model.constant((*v)?)?)))
                .filter(|(i, t)| t.dtype().is_float() && !done.contains(&self.slot(node, *i)))
                .map(|(_, t)| t.byte_len() as u64)
                .sum();
            let carried = self.quantized.contains_key(&node) || self.reads_or_makes_codes(node);
            if carried && bytes == 0 {
                continue;
            }
            let why = match self.reasons.get(&node) {
                Some(why) => why.clone(),
                None if self.quantized.contains_key(&node) => BESIDE_KERNEL.to_owned(),
                None if !at.domain().is_empty() => format!("operators of domain {} are not known", at.domain()),
                None if ops::of(self.model, node).is_none() => "the operator is never quantized".to_owned(),
                None if !self.knowledge.calibrated => "without samples only weights are quantized".to_owned(),
                None if self.target.join.has(at.op_type()) || self.target.carry.has(at.op_type()) => {
                    "not between quantized operators".to_owned()
                }
                None if self.target.absorb.has(at.op_type()) => "not followed by a quantizer".to_owned(),
                None => format!("{} has no integer kernel for it", self.target.name),
            };
            skips.push(Skip { node: self.model.node_name(node).to_owned(), op: at.op_type().to_owned(), bytes, why });
            for body in at.bodies() {
                let inner = self.model.graph(body).nodes().len();
                if inner > 0 {
                    skips.push(Skip {
                        node: self.model.node_name(node).to_owned(),
                        op: format!("{} body", at.op_type()),
                        bytes: self.body_bytes(body),
                        why: format!("{inner} nodes inside a body, which is left as it is"),
                    });
                }
            }
        }
        skips
    }

    fn body_bytes(&self, body: crate::ir::GraphId) -> u64 {
        let graph = self.model.graph(body);
        let own: usize = graph
            .initializers()
            .iter()
            .filter_map(|&v| match self.model.value(v).def() {
                Def::Constant(t) if t.dtype().is_float() => Some(t.byte_len()),
                _ => None,
            })
            .sum();
        let inner: u64 =
            graph.nodes().iter().flat_map(|&n| self.model.node(n).bodies()).map(|b| self.body_bytes(b)).sum();
        own as u64 + inner
    }

    /// Whether a node works on codes: a carrier between quantized values, or a Relu that vanishes.
    fn reads_or_makes_codes(&self, node: NodeId) -> bool {
        let outputs = self.outputs(node);
        outputs.iter().any(|v| self.wants.get(v).is_some_and(|w| w.produced))
    }
}

/// Whether a tensor of this shape is one value a channel, or one for all.
fn is_row(dims: &[usize], channels: usize) -> bool {
    let count: usize = dims.iter().product();
    count == 1 || (count == channels && dims.last() == Some(&channels))
}
