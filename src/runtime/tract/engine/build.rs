//! A program as a typed tract model with taps.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use prost::Message;
#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_core::internal::*;
use tract_hir::internal::{InferenceFact, InferenceModel, InferenceModelExt, InferenceOp};
use tract_onnx::model::ParsingContext;
use tract_onnx::pb;

use super::super::program::{Program, Step, refusal, visit_reads};
use super::arrays::Arrays;
use super::operator::Operator;
use super::operators::framework;
use super::tap::Tap;
use crate::error::{Error, Result};

/// Inputs of a run, in the order of the program's inputs.
pub(crate) type Feed = Vec<Arc<Tensor>>;

/// What the user calls the node that each step came from, and its operator.
pub(crate) type Origins = Arc<[(String, String)]>;

/// A typed model: its outputs are those of the program, then the taps.
pub(crate) struct Blueprint {
    pub model: TypedModel,
    /// Observed names that have no tap, and why.
    pub silent: BTreeMap<String, String>,
    pub origins: Origins,
}

/// Builds `program` for inputs of the shapes and types of `feed`, with a tap at each of `observed` that is a float
/// tensor and not constant.
///
/// # Errors
/// What tract says, at the node it says it of.
pub(crate) fn build(program: &Program, feed: &Feed, observed: &[String], arrays: &Arrays) -> Result<Blueprint> {
    let mut silent = BTreeMap::new();
    let mut wanted: Vec<String> = program.outputs.iter().map(|o| o.name.clone()).collect();
    let mut inference = inference_model(program, &program.steps, feed, arrays)?;
    let mut sites = Vec::new();
    for (site, name) in observed.iter().enumerate() {
        if program.constants.contains_key(name) {
            silent.insert(name.clone(), "it is constant".to_owned());
        } else if inference.outlets.contains_key(name) {
            sites.push(site);
            wanted.push(name.clone());
        } else {
            silent.insert(name.clone(), "it is not a float tensor of the main graph that is computed".to_owned());
        }
    }
    inference.select(&wanted)?;
    let origins: Origins = program.steps.iter().map(|s| s.origin.clone()).collect();
    let Inference { model, .. } = inference;
    let mut typed = super::guarded(move || model.into_typed()).map_err(|e| locate(&origins, &e))?;
    let outlets = typed.outputs.clone();
    let count = program.outputs.len();
    let mut outputs = outlets[..count].to_vec();
    for (&site, &outlet) in sites.iter().zip(&outlets[count..]) {
        let fact = typed.outlet_fact(outlet).map_err(|e| locate(&origins, &format!("{e:#}")))?;
        let why = if !fact.datum_type.is_float() {
            Some("it is not a float tensor")
        } else if fact.konst.is_some() {
            Some("it is constant")
        } else {
            None
        };
        if let Some(why) = why {
            silent.insert(observed[site].clone(), why.to_owned());
            continue;
        }
        let tap = typed.wire_node(format!("tap {site}"), Operator(Tap(site)), &[outlet]);
        outputs.push(tap.map_err(|e| locate(&origins, &format!("{e:#}")))?[0]);
    }
    typed.outputs = outputs;
    Ok(Blueprint { model: typed, silent, origins })
}

/// The value of `name` for the given shapes, where tract can tell it without running the model.
pub(crate) fn evaluate_constant(program: &Program, name: &str, feed: &Feed) -> Option<Arc<Tensor>> {
    let steps = program.ancestors(name);
    let mut inference = inference_model(program, &steps, feed, &Arrays::default()).ok()?;
    inference.select(&[name.to_owned()]).ok()?;
    super::guarded(move || {
        let mut typed = inference.model.into_typed()?;
        if typed.outlet_fact(typed.outputs[0])?.konst.is_none() {
            typed.declutter()?;
        }
        Ok(typed.outlet_fact(typed.outputs[0])?.konst.clone())
    })
    .ok()?
}

struct Inference {
    model: InferenceModel,
    outlets: HashMap<String, OutletId>,
}

impl Inference {
    fn select(&mut self, names: &[String]) -> Result<()> {
        let outlet = |name: &String| {
            self.outlets.get(name).copied().ok_or_else(|| refusal("an output is not computed").at_value(name))
        };
        let outlets = names.iter().map(outlet).collect::<Result<Vec<_>>>()?;
        self.model.select_output_outlets(&outlets).map_err(|e| refusal(format!("{e:#}")))
    }
}

fn inference_model(program: &Program, steps: &[Step], feed: &Feed, arrays: &Arrays) -> Result<Inference> {
    let mut model = InferenceModel::default();
    let mut outlets: HashMap<String, OutletId> = HashMap::new();
    for (input, array) in program.inputs.iter().zip(feed) {
        let fact = InferenceFact::dt_shape(array.datum_type(), array.shape());
        let outlet = model.add_source(format!("input {}", input.name), fact).map_err(|e| refusal(format!("{e:#}")))?;
        outlets.insert(input.name.clone(), outlet);
    }
    let proto = pb::ModelProto::default();
    for (index, step) in steps.iter().enumerate() {
        wire(program, step, index, &proto, arrays, &mut model, &mut outlets)?;
    }
    for output in &program.outputs {
        constant(program, &output.name, arrays, &mut model, &mut outlets)?;
    }
    Ok(Inference { model, outlets })
}

/// Whether the operator of a step can be built, which looks at its attributes and not at shapes.
///
/// # Errors
/// Why it cannot.
pub(crate) fn check(step: &Step) -> Result<()> {
    operator(step, &pb::ModelProto::default(), &InferenceModel::default()).map(|_| ())
}

/// The operator of a step, and the outer tensors that bodies in it read.
fn operator(
    step: &Step,
    proto: &pb::ModelProto,
    model: &InferenceModel,
) -> Result<(pb::NodeProto, Box<dyn InferenceOp>, Vec<String>)> {
    let node = pb::NodeProto::decode(step.node.encode_to_vec().as_slice())
        .map_err(|e| step.refuse(format!("it cannot be handed over ({e})")))?;
    let template = InferenceModel { symbols: model.symbols.clone(), ..InferenceModel::default() };
    let context = ParsingContext {
        onnx_operator_set_version: step.opset,
        framework: framework(),
        model: proto,
        parent_graphs: Vec::new(),
        model_dir: None,
        template,
    };
    let Some(builder) = framework().op_register.0.get(&node.op_type) else {
        return Err(step.refuse(format!("operator {} is not implemented", node.op_type)));
    };
    let (op, closures) = super::guarded(|| builder(&context, &node)).map_err(|e| step.refuse(brief(&e)))?;
    Ok((node, op, closures))
}

fn wire(
    program: &Program,
    step: &Step,
    index: usize,
    proto: &pb::ModelProto,
    arrays: &Arrays,
    model: &mut InferenceModel,
    outlets: &mut HashMap<String, OutletId>,
) -> Result<()> {
    let mut missing = None;
    let mut reads = Vec::new();
    visit_reads(&step.node, &mut |name| reads.push(name.to_owned()));
    for name in &reads {
        constant(program, name, arrays, model, outlets)?;
    }
    let (node, op, closures) = operator(step, proto, model)?;
    let wired = super::guarded(|| {
        let facts = node.output.iter().filter(|o| !o.is_empty()).map(|_| InferenceFact::default()).collect();
        let id = model.add_node(format!("step {index}"), op, facts)?;
        for (slot, output) in node.output.iter().filter(|o| !o.is_empty()).enumerate() {
            outlets.insert(output.clone(), OutletId::new(id, slot));
        }
        let sources = node.input.iter().filter(|n| !n.is_empty()).chain(&closures);
        for (slot, name) in sources.enumerate() {
            match outlets.get(name) {
                Some(&outlet) => model.add_edge(outlet, InletId::new(id, slot))?,
                None => missing = Some(name.clone()),
            }
        }
        Ok(())
    });
    wired.map_err(|e| step.refuse(brief(&e)))?;
    match missing {
        Some(name) => Err(step.refuse("an input is not computed before it").at_value(&name)),
        None => Ok(()),
    }
}

/// Adds a constant the first time that it is used.
fn constant(
    program: &Program,
    name: &str,
    arrays: &Arrays,
    model: &mut InferenceModel,
    outlets: &mut HashMap<String, OutletId>,
) -> Result<()> {
    if outlets.contains_key(name) {
        return Ok(());
    }
    let Some(constant) = program.constants.get(name) else { return Ok(()) };
    let array = arrays.get(constant).map_err(|e| refusal(e).at_value(name))?;
    let outlet = model.add_const(format!("constant {name}"), array).map_err(|e| refusal(format!("{e:#}")))?;
    outlets.insert(name.to_owned(), outlet);
    Ok(())
}

/// The node that a message of tract speaks of, by the name that steps are built under.
pub(crate) fn locate(origins: &Origins, message: &str) -> Error {
    let error = refusal(brief(message));
    match origin(origins, message) {
        Some((name, op)) => error.at_node(name, op),
        None => error,
    }
}

/// Name and operator of the node that a message names as a step, in quotes.
pub(crate) fn origin<'a>(origins: &'a Origins, message: &str) -> Option<&'a (String, String)> {
    let index = message.split('"').find_map(|part| {
        let number = part.strip_prefix("step ")?;
        number.split(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok()
    });
    origins.get(index?)
}

/// The last and most specific part of an error chain.
fn brief(message: &str) -> String {
    let message = message.trim().replace('\n', " ");
    let parts: Vec<&str> = message.split(": ").collect();
    let tail = parts[parts.len().saturating_sub(3)..].join(": ");
    tail.chars().take(400).collect()
}
