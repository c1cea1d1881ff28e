//! The model as the runtime rewrites it: one flat list of steps that name their tensors.
//!
//! Made from a [`Model`] without copying a weight. Model-local functions are inlined and `Constant` nodes are lifted, so
//! that what follows sees operators and constants only.

use std::collections::{BTreeMap, BTreeSet};

use super::constant::Constant;
use super::functions::Functions;
use super::{quantized, rephrase, support, widen};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::onnx::{AttributeProto, DataType, GraphProto, NodeProto, ValueInfoProto, attribute_type};
use crate::runtime::inputs::{Input, tensor_type};

/// A graph output and its declared element type.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub name: String,
    pub dtype: Option<DataType>,
}

/// One operator call.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub node: NodeProto,
    /// Version of the default opset that `node` was written for.
    pub opset: i64,
    /// What the user calls the node this step came from, and its operator there.
    pub origin: (String, String),
}

/// A model as a list of steps in topological order.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub inputs: Vec<Input>,
    pub constants: BTreeMap<String, Constant>,
    pub steps: Vec<Step>,
    pub outputs: Vec<Output>,
    /// Element types the model declares.
    pub dtypes: BTreeMap<String, DataType>,
    names: BTreeSet<String>,
}

impl Step {
    /// Another step in place of part of this one.
    pub fn derive(&self, node: NodeProto) -> Self {
        Self { node, opset: self.opset, origin: self.origin.clone() }
    }

    /// Operator.
    pub fn op(&self) -> &str {
        self.node.op_type()
    }

    /// Whether it is `op` of the default domain.
    pub fn is(&self, op: &str) -> bool {
        self.op() == op && is_default(self.domain())
    }

    /// Domain as written.
    pub fn domain(&self) -> &str {
        self.node.domain()
    }

    /// Input `index`; `None` where it is left out.
    pub fn input(&self, index: usize) -> Option<&str> {
        self.node.input.get(index).map(String::as_str).filter(|n| !n.is_empty())
    }

    /// Output `index`; `None` where it is left out.
    pub fn output(&self, index: usize) -> Option<&str> {
        self.node.output.get(index).map(String::as_str).filter(|n| !n.is_empty())
    }

    /// The attribute of this name.
    pub fn attr(&self, name: &str) -> Option<&AttributeProto> {
        attr(&self.node, name)
    }

    /// An integer attribute.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.attr(name)?.i
    }

    /// Name and value of what a `Constant` makes; `None` for other operators.
    ///
    /// # Errors
    /// A value of a kind that there are no tensors of, or a damaged one.
    pub fn constant(&self) -> Result<Option<(String, Tensor)>> {
        if !self.is("Constant") {
            return Ok(None);
        }
        let Some(attr) = self.node.attribute.first() else {
            return Err(self.refuse("a Constant has no value"));
        };
        let tensor = match attr.name.as_deref().unwrap_or("") {
            "value" => attr.t.clone().map(|t| Tensor::from_proto(t, None)).transpose()?,
            "value_float" => attr.f.map(|v| Tensor::from_f32(&[], &[v])),
            "value_floats" => Some(Tensor::from_f32(&[attr.floats.len()], &attr.floats)),
            "value_int" => attr.i.map(|v| Tensor::from_i64(&[], &[v])),
            "value_ints" => Some(Tensor::from_i64(&[attr.ints.len()], &attr.ints)),
            _ => None,
        };
        let Some(tensor) = tensor else {
            return Err(self.refuse("a Constant is neither a number tensor nor a list of numbers"));
        };
        Ok(Some((self.output(0).unwrap_or_default().to_owned(), tensor)))
    }

    /// A refusal to run this step.
    pub fn refuse(&self, why: impl std::fmt::Display) -> Error {
        refusal(why).at_node(&self.origin.0, &self.origin.1)
    }
}

/// The error for something the runtime cannot run, with the ways out.
pub(super) fn refusal(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Runtime, format!("the runtime cannot run the model: {why}")).with_hint(
        "pass --runtime ort to run it in onnxruntime, export or simplify the model so that this operator is gone, or pass \
         --calib none to quantize weights only, which needs no runtime",
    )
}

/// The attribute of this name.
pub(super) fn attr<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|a| a.name.as_deref() == Some(name))
}

/// Whether `domain` is the default one.
pub(super) fn is_default(domain: &str) -> bool {
    domain.is_empty() || domain == "ai.onnx"
}

/// A node of `op` (in no domain that a model can name, if it starts with `amax.`).
pub(super) fn node(op: &str, inputs: &[&str], outputs: &[&str], attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: Some(op.to_owned()),
        input: inputs.iter().map(|&n| n.to_owned()).collect(),
        output: outputs.iter().map(|&n| n.to_owned()).collect(),
        attribute,
        ..NodeProto::default()
    }
}

/// A float list attribute.
pub(super) fn floats(name: &str, values: &[f32]) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(attribute_type::FLOATS),
        floats: values.to_vec(),
        ..AttributeProto::default()
    }
}

impl Program {
    /// Takes a model apart: functions inlined, constants lifted.
    ///
    /// # Errors
    /// Sequence or map inputs, sparse weights, functions that call themselves.
    pub fn new(model: &Model) -> Result<Self> {
        let mut proto = model.to_proto(&mut |tensor, bytes| {
            tensor.data_location = None;
            tensor.external_data.clear();
            tensor.raw_data = Some(bytes);
        });
        let graph = proto.graph.take().unwrap_or_default();
        let opset = model.opset().unwrap_or(0);
        let functions = Functions::new(&proto);
        let mut program = Self {
            inputs: Vec::new(),
            constants: BTreeMap::new(),
            steps: Vec::new(),
            outputs: Vec::new(),
            dtypes: BTreeMap::new(),
            names: BTreeSet::new(),
        };
        let GraphProto { node, initializer, sparse_initializer, input, output, value_info, .. } = graph;
        if let Some(sparse) = sparse_initializer.first() {
            let name = sparse.values.as_ref().and_then(|v| v.name.clone()).unwrap_or_default();
            return Err(refusal("it has sparse initializers").at_value(&name));
        }
        let mut defaults = BTreeMap::new();
        let declared: BTreeSet<&str> = input.iter().filter_map(|i| i.name.as_deref()).collect();
        for tensor in initializer {
            let name = tensor.name.clone().unwrap_or_default();
            let tensor = Tensor::from_proto(tensor, None)?;
            if declared.contains(name.as_str()) {
                defaults.insert(name, tensor);
            } else {
                program.names.insert(name.clone());
                program.constants.insert(name, Constant::Plain(tensor));
            }
        }
        for info in &input {
            let name = info.name.clone().unwrap_or_default();
            let default = defaults.remove(&name);
            program.names.insert(name.clone());
            program.inputs.push(Input::new(info, default).map_err(|why| refusal(why).at_value(&name))?);
        }
        for info in &output {
            let name = info.name.clone().unwrap_or_default();
            let dtype = dtype_of(info);
            program.outputs.push(Output { name, dtype });
        }
        for info in value_info.iter().chain(&input).chain(&output) {
            if let (Some(name), Some(dtype)) = (&info.name, dtype_of(info)) {
                program.dtypes.insert(name.clone(), dtype);
            }
        }
        for node in &node {
            program.names.extend(node.output.iter().cloned());
        }
        let mut steps = Vec::with_capacity(node.len());
        for node in node {
            functions.expand(node, opset, &mut program, &mut steps)?;
        }
        // tract looks at optional inputs and outputs that are left out at the end as if they were there.
        for step in &mut steps {
            for names in [&mut step.node.input, &mut step.node.output] {
                while names.last().is_some_and(String::is_empty) {
                    names.pop();
                }
            }
        }
        program.steps = steps;
        program.lift_constants()?;
        Ok(program)
    }

    /// A program of one step.
    pub fn of_step(
        step: Step,
        inputs: Vec<Input>,
        constants: BTreeMap<String, Constant>,
        outputs: Vec<Output>,
    ) -> Self {
        let names = inputs.iter().map(|input| &input.name).chain(constants.keys()).chain(&step.node.output).cloned();
        let names = names.collect();
        Self { inputs, constants, steps: vec![step], outputs, dtypes: BTreeMap::new(), names }
    }

    /// `base`, or `base` with a number: a name that nothing bears yet.
    pub fn fresh(&mut self, base: &str) -> String {
        let mut name = base.to_owned();
        let mut number = 0usize;
        while self.names.contains(&name) {
            number += 1;
            name = format!("{base}@{number}");
        }
        self.names.insert(name.clone());
        name
    }

    /// Adds a constant under a fresh name.
    pub fn add_constant(&mut self, base: &str, constant: Constant) -> String {
        let name = self.fresh(base);
        self.constants.insert(name.clone(), constant);
        name
    }

    /// The tensor of a constant, where it is one that is stored as it is.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        match self.constants.get(name)? {
            Constant::Plain(tensor) => Some(tensor),
            Constant::Dequantized(_) | Constant::Blocks(_) => None,
        }
    }

    /// Turns inputs into constants: those of `values`, and those with a default that are not in `given`.
    pub fn bind(&mut self, given: &BTreeSet<String>, values: &BTreeMap<String, Tensor>) {
        let mut kept = Vec::with_capacity(self.inputs.len());
        for input in std::mem::take(&mut self.inputs) {
            if let Some(value) = values.get(&input.name) {
                self.constants.insert(input.name, Constant::Plain(value.clone()));
            } else if let (Some(default), false) = (&input.default, given.contains(&input.name)) {
                self.constants.insert(input.name, Constant::Plain(default.clone()));
            } else {
                kept.push(input);
            }
        }
        self.inputs = kept;
    }

    /// Makes every step one that the engine runs, and runs right; idempotent.
    ///
    /// # Errors
    /// An operator or attribute that cannot be run.
    pub fn lower(&mut self) -> Result<()> {
        self.lift_constants()?;
        self.forward_constants();
        widen::widen(self);
        rephrase::rephrase(self)?;
        quantized::lower(self)?;
        support::check(self)
    }

    /// Moves the values of `Constant` nodes among the constants.
    fn lift_constants(&mut self) -> Result<()> {
        let mut kept = Vec::with_capacity(self.steps.len());
        for step in std::mem::take(&mut self.steps) {
            match step.constant()? {
                Some((name, tensor)) => {
                    self.constants.insert(name, Constant::Plain(tensor));
                }
                None => kept.push(step),
            }
        }
        self.steps = kept;
        Ok(())
    }

    /// Copies constants through `Identity`, so that scales and weights behind one are seen as what they are.
    fn forward_constants(&mut self) {
        let mut kept = Vec::with_capacity(self.steps.len());
        for step in std::mem::take(&mut self.steps) {
            let source = step.input(0).filter(|_| step.is("Identity")).and_then(|n| self.constants.get(n));
            match (source.cloned(), step.output(0)) {
                (Some(constant), Some(output)) => {
                    self.constants.insert(output.to_owned(), constant);
                }
                _ => kept.push(step),
            }
        }
        self.steps = kept;
    }

    /// The tensors that steps, bodies or graph outputs read.
    pub fn reads(&self) -> BTreeSet<String> {
        let mut reads: BTreeSet<String> = self.outputs.iter().map(|o| o.name.clone()).collect();
        for step in &self.steps {
            visit_reads(&step.node, &mut |name| {
                reads.insert(name.to_owned());
            });
        }
        reads
    }

    /// The program that computes `wanted` alone, with all inputs, and without outputs.
    pub fn part(&self, wanted: &str) -> Self {
        let steps = self.ancestors(wanted);
        let mut names = BTreeSet::from([wanted.to_owned()]);
        for step in &steps {
            names.extend(step.node.output.iter().cloned());
            visit_reads(&step.node, &mut |name| {
                names.insert(name.to_owned());
            });
        }
        names.extend(self.inputs.iter().map(|input| input.name.clone()));
        Self {
            inputs: self.inputs.clone(),
            constants: only(&self.constants, &names),
            steps,
            outputs: Vec::new(),
            dtypes: only(&self.dtypes, &names),
            names,
        }
    }

    /// The steps that `wanted` depends on, in order.
    pub fn ancestors(&self, wanted: &str) -> Vec<Step> {
        let mut needed: BTreeSet<String> = BTreeSet::from([wanted.to_owned()]);
        let mut kept = Vec::new();
        for step in self.steps.iter().rev() {
            if step.node.output.iter().any(|o| !o.is_empty() && needed.contains(o)) {
                visit_reads(&step.node, &mut |name| {
                    needed.insert(name.to_owned());
                });
                kept.push(step.clone());
            }
        }
        kept.reverse();
        kept
    }
}

/// The entries of these names.
fn only<T: Clone>(all: &BTreeMap<String, T>, names: &BTreeSet<String>) -> BTreeMap<String, T> {
    names.iter().filter_map(|name| Some((name.clone(), all.get(name)?.clone()))).collect()
}

/// Steps a program may grow to.
pub(super) const MAX_STEPS: usize = 200_000;

/// Calls `see` with each name that a node or a body in it reads, names defined inside bodies included.
pub(super) fn visit_reads(node: &NodeProto, see: &mut dyn FnMut(&str)) {
    for input in node.input.iter().filter(|n| !n.is_empty()) {
        see(input);
    }
    for body in bodies(node) {
        for output in body.output.iter().filter_map(|o| o.name.as_deref()) {
            see(output);
        }
        for node in &body.node {
            visit_reads(node, see);
        }
    }
}

/// Graphs in the attributes of a node.
pub(super) fn bodies(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs))
}

fn dtype_of(info: &ValueInfoProto) -> Option<DataType> {
    DataType::from_code(tensor_type(info.r#type.as_ref())?.elem_type?)
}
