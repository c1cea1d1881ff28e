//! Raises the default opset of a model, converting every node whose definition changed on the way.
//!
//! The conversion walks one opset at a time: `steps::STEPS` lists, by the version that brought the change, what
//! has to be done to a node so that it means the same afterwards. Operators without a row only gained attributes
//! with harmless defaults, or types. All graphs are covered: the main one, `If`/`Loop`/`Scan` bodies, and model-local
//! functions, which import their own opsets.
//!
//! Where a definition leaves room, what onnxruntime computes for the old version is kept (`Resize` of opset 10
//! that shrinks by nearest neighbour rounds up, for one).
//!
//! New constants are initializers named after the node and the attribute they come from (`conv1.axes`); in functions,
//! which have no initializers, they are `Constant` nodes.

mod facts;
mod scan;
mod steps;

use std::collections::BTreeSet;

use super::{Change, Context, Outcome, Pass};
use crate::error::{Error, Result};
use crate::ir::{GraphId, Model, NewNode, NodeId, Owner, Place, Tensor, ValueId, canonical_domain};
use crate::onnx::{AttributeProto, MAX_OPSET, OperatorSetIdProto, attribute_type};
use crate::reason::Reason;

pub use crate::ir::file::MIN_OPSET;

/// The pass: raises the default opset to what the plan needs.
#[derive(Debug)]
pub struct RaiseOpset;

impl Pass for RaiseOpset {
    fn name(&self) -> &'static str {
        "raise-opset"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        match context.quantization {
            Some((plan, _)) => raise(model, plan.opset),
            None => Ok(Outcome::default()),
        }
    }
}

/// Raises the default opset of `model` to version `to`, and its IR version to what goes with that.
///
/// Model-local functions whose own import of the default opset is lower are raised as well; a part that is at
/// `to` or above is left alone. Imports of other domains stay. When the IR version passes 4, graph inputs that carry
/// defaults keep them, but runtimes stop treating them as constants: see [`freeze_inputs`](super::freeze_inputs).
///
/// Nodes of the default domain that ONNX does not define are left as they are and listed in [`Outcome::skips`].
///
/// # Errors
/// A source version below [`MIN_OPSET`], a target beyond what ONNX 1.23 defines, or a node that cannot be expressed in
/// the target version; the node is named. The model is then partly converted and must be dropped.
pub fn raise(model: &mut Model, to: i64) -> Result<Outcome> {
    if to > MAX_OPSET {
        return Err(Error::model(format!("opset {to} is not known"))
            .with_hint(format!("the newest one amax knows is {MAX_OPSET}")));
    }
    let scopes = scopes(model, to)?;
    let mut raising = Raising { model, to, outcome: Outcome::default() };
    let Some(lowest) = scopes.iter().map(|s| s.from).min() else { return Ok(raising.outcome) };
    raising.report_foreign(&scopes);
    for version in lowest + 1..=to {
        raising.step(&scopes, version)?;
    }
    let Raising { model, to: _, mut outcome } = raising;
    finish(model, &scopes, to, &mut outcome);
    Ok(outcome)
}

/// The lowest IR version in which a model of this default opset is usually written: onnx's own release table.
#[must_use]
pub fn ir_version_for(opset: i64) -> i64 {
    match opset {
        ..=8 => 3,
        9 => 4,
        10 => 5,
        11 => 6,
        12..=14 => 7,
        15..=18 => 8,
        19..=20 => 9,
        21..=22 => 10,
        23 => 11,
        24 => 12,
        25..=27 => 13,
        _ => 14,
    }
}

/// A graph to convert, with the version it is at.
struct Scope {
    graph: GraphId,
    from: i64,
}

/// Every graph below version `to`.
fn scopes(model: &Model, to: i64) -> Result<Vec<Scope>> {
    let mut found = Vec::new();
    for graph in model.all_graphs() {
        let Some(from) = model.opset_in(graph) else { continue };
        if from >= to {
            continue;
        }
        if from < MIN_OPSET {
            let error = Error::model(format!("opset {from} is too old to be converted"));
            let error = if graph == model.main() { error } else { error.in_graph(model.graph(graph).name()) };
            return Err(error.with_hint(format!(
                "export the model again with opset {MIN_OPSET} or above, or raise it first with \
                 onnx.version_converter"
            )));
        }
        found.push(Scope { graph, from });
    }
    Ok(found)
}

/// Writes the new versions into the imports.
fn finish(model: &mut Model, scopes: &[Scope], to: i64, outcome: &mut Outcome) {
    let raised = |owner: Owner, model: &Model| scopes.iter().find(|s| model.graph(s.graph).owner() == owner);
    let default_domain =
        |import: &&mut OperatorSetIdProto| canonical_domain(import.domain.as_deref().unwrap_or("")).is_empty();
    if let Some(scope) = raised(Owner::Main, model) {
        model.rest.opset_import.iter_mut().filter(default_domain).for_each(|i| i.version = Some(to));
        outcome.changed("model", Change::Opset { from: scope.from, to });
        if !model.rest.training_info.is_empty() {
            outcome.skipped("model", Reason::TrainingGraphs);
        }
    }
    for index in 0..model.functions.len() {
        if let Some(scope) = raised(Owner::Function(index), model) {
            let imports = &mut model.functions[index].rest.opset_import;
            imports.iter_mut().filter(default_domain).for_each(|i| i.version = Some(to));
            let name = model.graph(scope.graph).name().to_owned();
            outcome.changed(name, Change::Opset { from: scope.from, to });
        }
    }
    let ir_version = ir_version_for(to);
    if model.ir_version() < ir_version {
        outcome.changed("model", Change::IrVersion { from: model.ir_version(), to: ir_version });
        model.set_ir_version(ir_version);
    }
}

/// A conversion in progress.
struct Raising<'m> {
    model: &'m mut Model,
    /// The version to be reached, which is beyond that of most steps.
    to: i64,
    outcome: Outcome,
}

impl Raising<'_> {
    /// Converts from `version - 1` to `version`.
    fn step(&mut self, scopes: &[Scope], version: i64) -> Result<()> {
        let rows: Vec<_> = steps::STEPS.iter().filter(|row| row.at == version).collect();
        if rows.is_empty() {
            return Ok(());
        }
        for scope in scopes.iter().filter(|s| s.from < version) {
            for node in self.model.graph(scope.graph).nodes().to_vec() {
                let matching = rows.iter().find(|row| row.ops.iter().any(|op| self.model.node(node).is(op)));
                let Some(row) = matching else { continue };
                let name = self.model.node_name(node).to_owned();
                let op = self.model.node(node).op_type().to_owned();
                let graph = self.model.graph(scope.graph).name().to_owned();
                if let Some(what) = (row.convert)(self, node).map_err(|e| e.at_node(&name, &op).in_graph(&graph))? {
                    self.outcome.changed(name, Change::Raised { op, what, opset: version });
                }
            }
        }
        Ok(())
    }

    /// Lists default-domain operators that ONNX does not define: whether they mean the same at `to` cannot be known.
    fn report_foreign(&mut self, scopes: &[Scope]) {
        let mut reported = BTreeSet::new();
        for scope in scopes {
            for &id in self.model.graph(scope.graph).nodes() {
                let node = self.model.node(id);
                let known =
                    !node.domain().is_empty() || steps::OPERATORS.split_whitespace().any(|op| op == node.op_type());
                if !known && reported.insert(node.op_type().to_owned()) {
                    let why = Reason::NotOnnx { op: node.op_type().to_owned() };
                    self.outcome.skipped(self.model.node_name(id).to_owned(), why);
                }
            }
        }
    }

    /// The attribute `name` of `node`, if it is there and its value is known.
    ///
    /// # Errors
    /// Its value is that of an attribute of the enclosing function.
    fn attr(&self, node: NodeId, name: &str) -> Result<Option<&AttributeProto>> {
        let Some(attr) = self.model.node(node).attr(name) else { return Ok(None) };
        match attr.proto().ref_attr_name.as_deref() {
            Some(outer) if !outer.is_empty() => Err(Error::model(format!(
                "attribute \"{name}\" takes its value from attribute \"{outer}\" of the function and has to become an \
                 input or another value in opset {}",
                self.to
            ))
            .with_hint("inline the function before (onnx.inliner.inline_local_functions)")),
            _ => Ok(Some(attr.proto())),
        }
    }

    /// The integers of an attribute; `None` where it is absent or empty.
    fn ints(&self, node: NodeId, name: &str) -> Result<Option<Vec<i64>>> {
        Ok(self.attr(node, name)?.map(|a| a.ints.clone()).filter(|ints| !ints.is_empty()))
    }

    fn int(&self, node: NodeId, name: &str) -> Result<Option<i64>> {
        Ok(self.attr(node, name)?.and_then(|a| a.i))
    }

    fn float(&self, node: NodeId, name: &str) -> Result<Option<f32>> {
        Ok(self.attr(node, name)?.and_then(|a| a.f))
    }

    fn string(&self, node: NodeId, name: &str) -> Result<Option<String>> {
        let value = self.attr(node, name)?.and_then(|a| a.s.as_ref());
        Ok(value.map(|s| String::from_utf8_lossy(s).into_owned()))
    }

    /// A constant for `node`, called `<node>.<suffix>`.
    fn constant(&mut self, node: NodeId, suffix: &str, tensor: Tensor) -> Result<ValueId> {
        let graph = self.graph_of(node)?;
        let name = format!("{}.{suffix}", self.model.node_name(node));
        if !matches!(self.model.graph(graph).owner(), Owner::Function(_)) {
            return Ok(self.model.add_initializer(graph, &name, tensor));
        }
        let value = AttributeProto {
            name: Some("value".to_owned()),
            r#type: Some(attribute_type::TENSOR),
            t: Some(tensor.into_proto().0),
            ..AttributeProto::default()
        };
        self.insert_before(node, NewNode::new("Constant", &name, &[], &[&name]).with(value))
    }

    /// Inserts a node of one output before `node` and gives that output.
    fn insert_before(&mut self, node: NodeId, new: NewNode) -> Result<ValueId> {
        let inserted = self.model.insert(Place::Before(node), new);
        self.output(inserted, 0)
    }

    fn graph_of(&self, node: NodeId) -> Result<GraphId> {
        self.model.node(node).graph().ok_or_else(|| Error::model("the node is in no graph"))
    }

    fn input(&self, node: NodeId, index: usize) -> Result<ValueId> {
        self.model.node(node).input(index).ok_or_else(|| Error::model(format!("required input {index} is missing")))
    }

    fn output(&self, node: NodeId, index: usize) -> Result<ValueId> {
        self.model.node(node).output(index).ok_or_else(|| Error::model(format!("required output {index} is missing")))
    }

    fn is_used(&self, value: ValueId) -> bool {
        !self.model.value(value).users().is_empty()
    }
}
