//! The quantized sites of a model, and the float model with each of them quantized alone beside it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Kind, Site};
use crate::error::Result;
use crate::ir::view::{Clip, Quantizer};
use crate::ir::{Def, Model, NewNode, NodeId, Place, Tensor, User, ValueId};
use crate::onnx::DataType;
use crate::passes::raise_opset::raise;

/// Nodes that may stand between two tensors that both models have.
const MAX_BETWEEN: usize = 32;

/// Suffixes of tensors that stand beside an original in a quantized model: amax's, and those of onnxruntime's quantizer.
pub(crate) const SUFFIXES: &[&str] = &["_float", "_QuantizeLinear_Input", "_QuantizeInput", "_quant_input"];

pub(super) struct Found {
    /// The float model and the sites alone.
    pub(super) float: Model,
    /// Tensors of `float` to look at.
    pub(super) shown: Vec<String>,
    /// Tensors of the quantized model to look at.
    pub(super) tested: Vec<String>,
    /// Sites that can be compared.
    pub(super) planned: Vec<Planned>,
    pub(super) sites: Vec<Site>,
}

/// Where the tensors of a site are shown.
pub(super) struct Planned {
    /// Index of the site.
    pub(super) site: usize,
    /// The float tensor, in `shown`.
    pub(super) reference: usize,
    /// The site alone, in `shown`.
    pub(super) twin: Option<usize>,
    /// The tensor of the quantized model, in `tested`.
    pub(super) test: Option<usize>,
}

/// Lists the sites of `test` in order of its nodes.
pub(super) fn find(reference: &Model, test: &Model) -> Result<Found> {
    let mut float = reference.clone();
    if let (Some(have), Some(want)) = (float.opset(), test.opset())
        && have < want
    {
        raise(&mut float, want)?;
    }
    for import in &test.header().opset_import {
        let domain = import.domain.as_deref().unwrap_or("");
        if !matches!(domain, "" | "ai.onnx") && float.domain_version(domain).is_none() {
            float.set_domain_version(domain, import.version.unwrap_or(1));
        }
    }
    let mut finder = Finder {
        test,
        float,
        made: BTreeSet::new(),
        derived: derived(test),
        copies: BTreeMap::new(),
        shown: Names::default(),
        tested: Names::default(),
    };
    let (mut sites, mut planned) = (Vec::new(), Vec::new());
    for &node in test.graph(test.main()).nodes() {
        for (site, value, root) in finder.sites(node) {
            let at = sites.len();
            let (plan, why) = finder.plan(at, value, root);
            planned.extend(plan);
            sites.push(Site { why, ..site });
        }
    }
    let Finder { float, shown, tested, .. } = finder;
    Ok(Found { float, shown: shown.list, tested: tested.list, planned, sites })
}

/// What nodes of the main graph make of constants alone.
fn derived(model: &Model) -> BTreeSet<ValueId> {
    let mut found = BTreeSet::new();
    for &node in model.graph(model.main()).nodes() {
        let node = model.node(node);
        let mut inputs = node.inputs().iter().flatten();
        let given = !node.inputs().is_empty() && node.bodies().next().is_none();
        if (node.is("Constant") || given) && inputs.all(|v| model.constant(*v).is_some() || found.contains(v)) {
            found.extend(node.outputs().iter().flatten().copied());
        }
    }
    found
}

/// A list without repetitions.
#[derive(Default)]
struct Names {
    list: Vec<String>,
    places: BTreeMap<String, usize>,
}

impl Names {
    fn place(&mut self, name: &str) -> usize {
        if let Some(&place) = self.places.get(name) {
            return place;
        }
        self.list.push(name.to_owned());
        self.places.insert(name.to_owned(), self.list.len() - 1);
        self.list.len() - 1
    }
}

struct Finder<'a> {
    test: &'a Model,
    float: Model,
    /// Tensors of the quantized model that constants alone make: they are weights of who reads them, and have no sites.
    derived: BTreeSet<ValueId>,
    /// What was copied from the quantized model into the float one.
    copies: BTreeMap<ValueId, ValueId>,
    /// The copies: no tensor of the quantized model stands for them.
    made: BTreeSet<ValueId>,
    shown: Names,
    tested: Names,
}

/// Whether an operator's data outputs are codes.
fn makes_codes(op: &str) -> bool {
    matches!(op, "QuantizeLinear" | "DynamicQuantizeLinear" | "QGemm")
        || op.starts_with("QLinear")
        || op.ends_with("Integer")
}

/// Whether a node makes zero of everything below, and changes nothing else there.
fn clips_at_zero(model: &Model, id: NodeId) -> bool {
    let node = model.node(id);
    let bound = || match node.input(1) {
        Some(low) => model.constant(low).and_then(Tensor::to_f32)?.first().copied(),
        None => Clip::of(node).and_then(|clip| clip.min),
    };
    node.is("Relu") || (node.is("Clip") && bound().is_some_and(|low| low.abs() == 0.0))
}

impl Finder<'_> {
    /// The sites at a node, each with the tensor that it quantizes in the quantized model and the tensor to compare.
    fn sites(&self, id: NodeId) -> Vec<(Site, ValueId, ValueId)> {
        let node = self.test.node(id);
        if node.op_type() == "QuantizeLinear" || node.op_type() == "DynamicQuantizeLinear" {
            return self.activation(id).into_iter().collect();
        }
        if node.op_type() == "DequantizeLinear" || node.output(0).is_some_and(|v| self.derived.contains(&v)) {
            return Vec::new();
        }
        let Some(output) = node.output(0).map(|output| self.known_behind(output)) else { return Vec::new() };
        let weights = (0..node.inputs().len()).filter_map(|i| self.weight(id, i));
        let Some((_, format, granularity)) = weights.max_by_key(|(size, ..)| *size) else { return Vec::new() };
        let site = Site {
            site: format!("{}.weight", self.test.node_name(id)),
            kind: Kind::Weight,
            node: self.test.node_name(id).to_owned(),
            op: node.op_type().to_owned(),
            tensor: self.test.value(output).name().to_owned(),
            format,
            granularity,
            own: None,
            accumulated: None,
            why: None,
        };
        vec![(site, output, output)]
    }

    fn activation(&self, id: NodeId) -> Option<(Site, ValueId, ValueId)> {
        let node = self.test.node(id);
        let (input, codes) = (node.input(0)?, node.output(0)?);
        if self.is_constant(input) {
            return None;
        }
        // Codes that integer operators read have no tensor of their own to compare.
        let output = self.result_of_reader(codes, "DequantizeLinear")?;
        let (site, at) = if let Some(producer) = self.test.producer(input) {
            (format!("{}.output", self.test.node_name(producer)), producer)
        } else {
            let reader = self.test.value(output).users().iter().find_map(|user| match user {
                User::Node { node, .. } => Some(*node),
                User::Output { .. } => None,
            });
            let reader = reader.unwrap_or(id);
            (format!("{}.input", self.test.node_name(reader)), reader)
        };
        let dynamic = node.op_type() == "DynamicQuantizeLinear";
        let zero = node.input(2).and_then(|z| self.test.dtype(z));
        let asked = Quantizer::of(node).and_then(|q| q.output_dtype);
        let format = if dynamic { DataType::Uint8 } else { zero.or(asked).unwrap_or(DataType::Uint8) };
        let site = Site {
            site,
            kind: Kind::Activation,
            node: self.test.node_name(at).to_owned(),
            op: self.test.node(at).op_type().to_owned(),
            tensor: self.test.value(output).name().to_owned(),
            format: format.name().to_owned(),
            granularity: if dynamic { "tensor, at run time".to_owned() } else { self.granularity(id) },
            own: None,
            accumulated: None,
            why: None,
        };
        Some((site, input, output))
    }

    /// What the first such node that has a value for its data makes of it.
    fn result_of_reader(&self, value: ValueId, op: &str) -> Option<ValueId> {
        self.test.value(value).users().iter().find_map(|user| match *user {
            User::Node { node, input: 0 } if self.test.node(node).op_type() == op => self.test.node(node).output(0),
            _ => None,
        })
    }

    /// How many scales a `QuantizeLinear` or `DequantizeLinear` has.
    fn granularity(&self, id: NodeId) -> String {
        let node = self.test.node(id);
        let scales = node.input(1).and_then(|s| self.test.shape(s));
        let count: usize = scales.iter().flatten().map(|d| d.unwrap_or(2)).product();
        match Quantizer::of(node) {
            Some(Quantizer { block_size, .. }) if block_size > 0 => format!("group of {block_size}"),
            _ if count > 1 => "channel".to_owned(),
            _ => "tensor".to_owned(),
        }
    }

    fn is_constant(&self, value: ValueId) -> bool {
        match self.test.producer(value) {
            Some(node) => self.test.node(node).is("Constant"),
            None => self.test.constant(value).is_some(),
        }
    }

    /// Elements, format and granularity of the quantized constant at an input, if there is one.
    fn weight(&self, id: NodeId, input: usize) -> Option<(usize, String, String)> {
        let node = self.test.node(id);
        let mut value = node.input(input)?;
        if matches!(
            node.op_type(),
            "MatMulNBits"
                | "GatherBlockQuantized"
                | "DynamicQuantizeLSTM"
                | "MatMulInteger"
                | "ConvInteger"
                | "DynamicQuantizeMatMul"
                | "MatMulIntegerToFloat"
        ) {
            let constant = self.test.constant(value).filter(|t| !t.dtype().is_float() && t.dims().len() >= 2)?;
            let (bits, block) = (node.int("bits"), node.int("block_size"));
            let format = bits.map_or_else(|| constant.dtype().name().to_owned(), |bits| format!("{bits} bits"));
            return Some((constant.len(), format, block.map_or("tensor".to_owned(), |n| format!("group of {n}"))));
        }
        let mut dequantized = None;
        for _ in 0..MAX_BETWEEN {
            if self.is_constant(value) {
                let dq = dequantized?;
                let codes = self.test.node(dq).input(0)?;
                let made =
                    self.test.producer(codes).map(|n| self.test.node(n)).filter(|n| n.op_type() == "QuantizeLinear");
                let zero = made.and_then(|q| q.input(2)).or_else(|| self.test.node(dq).input(2));
                let tensor = self.test.constant(value);
                let format = match (made, tensor) {
                    (None, Some(tensor)) => Some(tensor.dtype()),
                    _ => zero.and_then(|z| self.test.dtype(z)),
                };
                // A vector of 32 bits is a bias: it goes with the weight beside it.
                let size = tensor.map_or(1, Tensor::len);
                return (format != Some(DataType::Int32)).then(|| {
                    (size, format.map_or_else(|| "uint8".to_owned(), |f| f.name().to_owned()), self.granularity(dq))
                });
            }
            let producer = self.test.producer(value)?;
            let node = self.test.node(producer);
            match node.op_type() {
                "DequantizeLinear" => dequantized = dequantized.or(Some(producer)),
                "QuantizeLinear" | "Transpose" | "Reshape" | "Squeeze" | "Unsqueeze" | "Identity" | "Cast"
                | "Flatten" => {}
                "Add" if self.derived.contains(&value) => {}
                _ => return None,
            }
            value = node.input(0)?;
        }
        None
    }

    /// Puts the site alone beside the float model, and says what is to be looked at; or why the site is not compared.
    fn plan(&mut self, site: usize, value: ValueId, output: ValueId) -> (Option<Planned>, Option<String>) {
        let name = self.test.value(output).name().to_owned();
        let Some(reference) = self.float_of(value).or_else(|| self.float_of(output)) else {
            return (None, Some(format!("the float model has no tensor \"{}\"", self.test.value(value).name())));
        };
        let reference =
            if value == output { self.unclipped(output, reference) } else { self.clipped(output, reference) };
        let (twin, why) = match self.alone(output) {
            Ok(twin) => (Some(twin), None),
            Err(why) => (None, Some(why)),
        };
        let reference = self.float.value(reference).name().to_owned();
        let reference = self.shown.place(&reference);
        let twin = twin.map(|twin| {
            let name = self.float.value(twin).name().to_owned();
            self.shown.place(&name)
        });
        let test = Some(self.tested.place(&name));
        (Some(Planned { site, reference, twin, test }), why)
    }

    /// The float tensor that a tensor of the quantized model stands for.
    fn float_of(&self, value: ValueId) -> Option<ValueId> {
        if self.test.producer(value).is_some_and(|node| makes_codes(self.test.node(node).op_type())) {
            return None;
        }
        if let Some(found) = self.namesake(value) {
            return Some(self.clipped(value, found));
        }
        let node = self.test.node(self.test.producer(value)?);
        if node.op_type() == "DequantizeLinear" {
            let quantize = self.test.node(self.test.producer(node.input(0)?)?);
            return match quantize.op_type() {
                "QuantizeLinear" | "DynamicQuantizeLinear" => self.float_of(quantize.input(0)?),
                _ => None,
            };
        }
        // The pair behind it may have the name.
        let codes = self.result_of_reader(value, "QuantizeLinear")?;
        let found = self.namesake(self.result_of_reader(codes, "DequantizeLinear")?)?;
        Some(self.clipped(value, found))
    }

    /// The float tensor with the name of a tensor of the quantized model, among those that are computed or given.
    fn namesake(&self, value: ValueId) -> Option<ValueId> {
        let name = self.test.value(value).name();
        let stripped = SUFFIXES.iter().filter_map(|suffix| name.strip_suffix(suffix));
        std::iter::once(name).chain(stripped).find_map(|name| {
            let own = |v: &ValueId| match self.float.value(*v).def() {
                Def::Input { default: None } => true,
                Def::Output { .. } => !self.made.contains(v),
                _ => false,
            };
            self.float.value_named(name).filter(own)
        })
    }

    /// What a node's output stands for where a quantizer has taken over the Relu or Clip behind the node: onnxruntime's
    /// gives the node the name that the clipped tensor had.
    fn unclipped(&self, output: ValueId, reference: ValueId) -> ValueId {
        let op = |model: &Model, value| model.producer(value).map(|node| model.node(node).op_type().to_owned());
        let before = |value| self.float.node(self.float.producer(value)?).input(0);
        match (op(self.test, output), op(&self.float, reference), before(reference)) {
            (Some(own), Some(clip), Some(input))
                if matches!(clip.as_str(), "Relu" | "Clip")
                    && own != clip
                    && op(&self.float, input).as_ref() == Some(&own) =>
            {
                input
            }
            _ => reference,
        }
    }

    /// What a tensor of the quantized model stands for where nothing below zero is left of it, though its float namesake is
    /// in front of a Relu or Clip: onnxruntime drops that node for a quantizer, which takes the name in front of it.
    fn clipped(&self, value: ValueId, namesake: ValueId) -> ValueId {
        let before = self.float.producer(namesake).is_some_and(|node| clips_at_zero(&self.float, node));
        match *self.float.value(namesake).users() {
            [User::Node { node, input: 0 }]
                if !before && clips_at_zero(&self.float, node) && self.is_clipped(value) =>
            {
                self.float.node(node).output(0).unwrap_or(namesake)
            }
            _ => namesake,
        }
    }

    /// Whether nothing below zero is left of a tensor: a Relu or Clip gives it, or codes whose least stands for zero.
    fn is_clipped(&self, value: ValueId) -> bool {
        let Some(id) = self.test.producer(value) else { return false };
        let node = self.test.node(id);
        if node.op_type() != "DequantizeLinear" {
            return clips_at_zero(self.test, id);
        }
        let zero = self.test.constant_input(id, 2);
        let dtype = zero.map(Tensor::dtype).or_else(|| self.test.dtype(node.input(0)?));
        let Some(format) = dtype.and_then(DataType::format).filter(|format| format.is_integer()) else { return false };
        let least = i64::from(format.range().0);
        zero.map_or(Some(vec![0]), Tensor::to_i64).is_some_and(|zeros| zeros.iter().all(|&zero| zero == least))
    }

    /// The tensor itself or, behind integer operators, the first one that the float model has.
    fn known_behind(&self, value: ValueId) -> ValueId {
        let mut at = value;
        for _ in 0..MAX_BETWEEN {
            if self.float_of(at).is_some() {
                return at;
            }
            let mut readers = self.test.value(at).users().iter();
            let (Some(User::Node { node, .. }), None) = (readers.next(), readers.next()) else { return value };
            match self.test.node(*node).output(0) {
                Some(output) => at = output,
                None => return value,
            }
        }
        value
    }

    /// Copies the nodes between the float model's tensors and a tensor of the quantized model into the float model.
    fn alone(&mut self, root: ValueId) -> Result<ValueId, String> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        self.collect(root, root, &mut seen, &mut order)?;
        for id in order {
            let node = self.test.node(id);
            if node.output(0).is_some_and(|v| self.copies.contains_key(&v)) {
                continue;
            }
            let (op_type, domain) = (node.op_type().to_owned(), node.domain().to_owned());
            let attrs = node.attrs().iter().map(|a| a.proto().clone()).collect();
            let name = format!("{}/alone", self.test.node_name(id));
            let sources: Vec<Option<ValueId>> = node.inputs().to_vec();
            let results: Vec<Option<ValueId>> = node.outputs().to_vec();
            let inputs =
                sources.into_iter().map(|v| v.map(|v| self.source(v)).transpose()).collect::<Result<_, _>>()?;
            let named =
                |v: &Option<ValueId>| v.map_or(String::new(), |v| format!("{}/alone", self.test.value(v).name()));
            let outputs = results.iter().map(named).collect();
            let main = self.float.main();
            let made = self.float.insert(Place::Last(main), NewNode { op_type, domain, name, inputs, outputs, attrs });
            for (at, value) in results.iter().enumerate() {
                if let (Some(value), Some(copy)) = (value, self.float.node(made).output(at)) {
                    self.copies.insert(*value, copy);
                    self.made.insert(copy);
                }
            }
        }
        self.copies.get(&root).copied().ok_or_else(|| "no quantized node computes it".to_owned())
    }

    /// Where a copied node reads what `value` is in the quantized model.
    fn source(&mut self, value: ValueId) -> Result<ValueId, String> {
        if let Some(float) = self.float_of(value) {
            return Ok(float);
        }
        if let Some(&copy) = self.copies.get(&value) {
            return Ok(copy);
        }
        if let Some(tensor) = self.test.constant(value) {
            let name = format!("{}/alone", self.test.value(value).name());
            let main = self.float.main();
            let copy = self.float.add_initializer(main, &name, tensor.clone());
            self.copies.insert(value, copy);
            return Ok(copy);
        }
        Err(format!("the float model has no tensor \"{}\"", self.test.value(value).name()))
    }

    /// The nodes between `root` and tensors of the float model, in order.
    fn collect(
        &self,
        root: ValueId,
        value: ValueId,
        seen: &mut BTreeSet<NodeId>,
        order: &mut Vec<NodeId>,
    ) -> Result<(), String> {
        let constant = self.test.constant(value).is_some();
        if constant || (value != root && self.float_of(value).is_some()) {
            return Ok(());
        }
        let Some(id) = self.test.producer(value) else {
            return Err(format!("the float model has no tensor \"{}\"", self.test.value(value).name()));
        };
        if !seen.insert(id) {
            return Ok(());
        }
        let node = self.test.node(id);
        if node.bodies().next().is_some() || seen.len() > MAX_BETWEEN {
            return Err(format!(
                "too many operators lie between \"{}\" and the tensors of the float model",
                self.test.value(root).name()
            ));
        }
        for input in node.inputs().iter().flatten() {
            self.collect(root, *input, seen, order)?;
        }
        order.push(id);
        Ok(())
    }
}
