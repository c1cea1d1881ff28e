//! Constants: weights, constant operands, and biases.

use std::collections::{BTreeMap, BTreeSet};

use super::finish::settle;
use super::form::{Constant, Runs};
use super::kernels::one_each;
use super::planner::{Kindness, Planner, Read};
use super::{Bias, Mode, Scheme, Split, Weight};
use crate::config::SiteKind;
use crate::config::spec::{Arithmetic, Dtype, Field, Form};
use crate::error::Result;
use crate::ir::{NodeId, Tensor, ValueId};
use crate::numerics::{Format, Granularity};
use crate::onnx::DataType;
use crate::ops::{self, Channel, Reduction, Role, WeightLayout};
use crate::quant::algorithm::{Algorithm, Method, Scope};
use crate::reason::{Difference, Reason};

impl Planner<'_> {
    /// The constants of a node that is quantized.
    pub(super) fn constants(
        &self,
        node: NodeId,
        kind: Kindness,
        weights: &mut Vec<Weight>,
        biases: &mut Vec<Bias>,
    ) -> Result<()> {
        let at = self.model.node(node);
        let Some(row) = ops::of(self.model, node) else { return Ok(()) };
        let mut main = None;
        for (index, input) in at.inputs().iter().enumerate() {
            let Some(value) = input.filter(|&v| self.model.constant(v).is_some()) else { continue };
            match row.role(index) {
                Role::Weight(_) => {
                    if let Some(weight) = self.constant_weight(node, kind, index, value)? {
                        main = Some(weights.len());
                        weights.push(weight);
                    }
                }
                Role::Data if kind == Kindness::WeightOnly => {}
                Role::Data => weights.push(self.constant_operand(node, index, value)?),
                Role::Bias => {
                    if let Some(bias) = self.bias(node, kind, index, value, main, weights) {
                        biases.push(bias);
                    }
                }
                Role::Other => {}
            }
        }
        Ok(())
    }

    /// The weight at an input, unless it is switched off.
    fn constant_weight(&self, node: NodeId, kind: Kindness, index: usize, value: ValueId) -> Result<Option<Weight>> {
        if self.ask(node, SiteKind::Weight).is_off() || self.is_off_by_hand(value) {
            return Ok(None);
        }
        let dims = self.model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
        let Some(layout) = ops::weight_layout(self.model, node, index, &dims) else { return Ok(None) };
        let mut quantizer = settle(self.weight(node, index))?;
        let grouped = matches!(quantizer.granularity, Granularity::PerGroup { .. });
        let narrow = quantizer.dtype.is_integer() && quantizer.dtype.bits() <= 8;
        let transpose = (grouped || (kind == Kindness::WeightOnly && narrow))
            && !quantizer.scale_dtype.is_block()
            && self.place.untransposes(self.model, node);
        if transpose {
            quantizer.granularity = turned(quantizer.granularity);
        }
        let runs = self.runs(node, kind);
        let chosen = settle(self.form(&Constant {
            node,
            index,
            scheme: &quantizer,
            float: self.float_at(node, index),
            runs,
            transposed: transpose,
        }))?;
        let pair_safe = self.pair_safe(node, index, &layout, &quantizer, chosen.form);
        self.complete(node, kind, &mut quantizer)?;
        self.zero_points(node, chosen.form, &mut quantizer)?;
        let op = self.model.node(node).op_type().to_owned();
        let mut because = self.notes.get(&node).cloned();
        if chosen.dequantized {
            because =
                because.map(|why| Reason::Dequantized { target: self.target.name.clone(), because: Box::new(why) });
        }
        Ok(Some(Weight {
            site: self.site(node, SiteKind::Weight),
            at: self.slot(node, index),
            tensor: self.name(value),
            quantizer,
            float: self.float_at(node, index),
            transpose,
            pair_safe,
            form: chosen.form,
            accuracy_level: chosen.accuracy_level,
            why: match kind {
                Kindness::Integer => Reason::IntegerWeight { op },
                Kindness::WeightOnly => Reason::FloatWeight { op, because: because.map(Box::new) },
            },
            gave_way: chosen.gave_way,
        }))
    }

    /// How a node runs that is quantized.
    fn runs(&self, node: NodeId, kind: Kindness) -> Runs {
        let at_run_time = |(slot, read): &((NodeId, usize), Read)| *slot == (node, 0) && read.mode == Mode::Dynamic;
        let data = self.model.node(node).input(0).and_then(|v| self.wants.get(&v));
        match kind {
            Kindness::WeightOnly => Runs::Float,
            Kindness::Integer if data.is_some_and(|want| want.reads.iter().any(at_run_time)) => Runs::AtRunTime,
            Kindness::Integer => Runs::Integer,
        }
    }

    /// The order in which a kernel that saturates sums adjacent pairs of a weight, where it does.
    fn pair_safe(
        &self,
        node: NodeId,
        index: usize,
        layout: &WeightLayout,
        quantizer: &Scheme,
        form: Form,
    ) -> Option<Reduction> {
        // The kernel of ConvInteger has its weight on the other side, where nothing saturates.
        let convolution = ops::constant_weight(self.model, node, index) == Some(Channel::Conv);
        let bytes = match form {
            Form::DynamicQuantizeLstm => true,
            Form::Matmulinteger if convolution => false,
            _ => self.reads_bytes(node, 1 - index.min(1)),
        };
        let saturates = self.target.pair_safe
            && bytes
            && quantizer.dtype == Format::Int8
            && !matches!(quantizer.granularity, Granularity::PerGroup { .. })
            && !quantizer.reduce_range
            && !layout.depthwise;
        (saturates && layout.reduction != Reduction::None).then_some(layout.reduction)
    }

    /// A constant operand of a node that runs on integers.
    fn constant_operand(&self, node: NodeId, index: usize, value: ValueId) -> Result<Weight> {
        let ask = self.ask_of(value, self.ask(node, SiteKind::Input));
        let (quantizer, _) = settle(self.activation(node, SiteKind::Input, &ask))?;
        Ok(Weight {
            site: self.site(node, SiteKind::Input),
            at: self.slot(node, index),
            tensor: self.name(value),
            quantizer: self.by_hand(Some(value), quantizer)?,
            float: self.float_at(node, index),
            transpose: false,
            pair_safe: None,
            form: Form::Qdq,
            accuracy_level: None,
            why: Reason::IntegerOperand { op: self.model.node(node).op_type().to_owned() },
            gave_way: None,
        })
    }

    /// What follows for a weight from what becomes of its node, and from the algorithm for all.
    fn complete(&self, node: NodeId, kind: Kindness, quantizer: &mut Scheme) -> Result<()> {
        let bytes = quantizer.dtype.is_integer() && quantizer.dtype.bits() <= 8;
        let ask = self.ask(node, SiteKind::Weight);
        if quantizer.signed_scale && kind == Kindness::Integer {
            let site = self.site(node, SiteKind::Weight);
            if self.rules.rule(ask, Field::SignedScale).is_some_and(|rule| rule.preset) {
                quantizer.signed_scale = false;
                quantizer.narrow_range = ask.spec.narrow_range.unwrap_or(true);
                return Ok(());
            }
            let error = self
                .reader(&site, SiteKind::Weight, ask)
                .error(Field::SignedScale, "integer kernels require positive scales");
            return Err(error.with_hint("leave it out, or input.enable = false for a float product"));
        }
        // Integer kernels may ask for pairs that do not saturate, and for a scale that fits the bias.
        let plain = quantizer.given.is_none() && !quantizer.scale_dtype.is_block();
        let free = kind == Kindness::WeightOnly && bytes && plain;
        // What samples say of a weight goes into the codes that any format and any kernel has.
        let product = matches!(ops::constant_weight(self.model, node, 1), Some(Channel::Right | Channel::Conv));
        let between = quantizer.arithmetic.is_between();
        let plain = quantizer.given.is_none() && quantizer.dtype.bits() <= 8 && !between;
        let learned = self.knowledge.samples && product && plain;
        let applies = |a: &Algorithm| match a.scope() {
            Scope::Groups => free,
            // What reproduces another tool's codes keeps them.
            Scope::Samples => learned && (a.method != Method::Best || quantizer.arithmetic == Arithmetic::Onnx),
            Scope::Nothing | Scope::Inputs => false,
        };
        let asked = self.rules.algorithm_at(self.model.node_name(node), self.model.node(node).op_type());
        quantizer.algorithm = asked.map(Algorithm::for_weights).filter(applies).map(Box::new);
        let groups = quantizer.algorithm.as_ref().filter(|a| a.scope() == Scope::Groups);
        if let (Some(algorithm), Some(_)) = (groups, quantizer.postprocess) {
            let site = self.site(node, SiteKind::Weight);
            let message =
                format!("\"{}\" chooses scales itself, so there are no ranges to change", algorithm.method.name());
            let error = self.reader(&site, SiteKind::Weight, ask).error(Field::Postprocess, message);
            return Err(error.with_hint("exclude weights from it, as in \"*.{input,output}\""));
        }
        Ok(())
    }

    /// Whether zero points are fractional: where the form has such, what asks for them gets them.
    fn zero_points(&self, node: NodeId, form: Form, quantizer: &mut Scheme) -> Result<()> {
        if quantizer.given.is_some() && quantizer.arithmetic.is_between() {
            quantizer.arithmetic = Arithmetic::Onnx;
        }
        let tinygemm = quantizer.arithmetic.is_between();
        let site = self.site(node, SiteKind::Weight);
        let reader = self.reader(&site, SiteKind::Weight, self.ask(node, SiteKind::Weight));
        let wrong = |message: &str| reader.error(Field::Arithmetic, message);
        if tinygemm && quantizer.algorithm.is_some() {
            let error = wrong("an algorithm chooses scales and zero points itself");
            return Err(error.with_hint("leave one of the two out"));
        }
        if tinygemm && form != Form::Matmulnbits {
            let error = wrong(&format!("its zero points are fractional, which the form {form} cannot store"));
            let hint =
                "add form = \"matmulnbits\" (--form matmulnbits), or arithmetic = \"onnx\" for integer zero points";
            return Err(error.with_hint(hint));
        }
        let narrow = matches!(quantizer.dtype, Format::Uint2 | Format::Uint4) && !quantizer.symmetric;
        let hqq = quantizer.algorithm.as_ref().is_some_and(|a| a.method == Method::Hqq);
        quantizer.float_zero_point = form == Form::Matmulnbits && narrow && (tinygemm || hqq);
        Ok(())
    }

    /// The float type that the constant at an input has in the result.
    pub(super) fn float_at(&self, node: NodeId, index: usize) -> DataType {
        self.model.constant_input(node, index).map_or(DataType::Float, |tensor| self.float(tensor.dtype()))
    }

    fn is_off_by_hand(&self, value: ValueId) -> bool {
        self.given.get(&value).is_some_and(|g| g.enable == Some(false))
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
        let fixed = self.is_fixed(node, data);
        let dims = tensor.dims();
        let channels = ops::channels(self.model, node, weights[weight].at.input);
        let channels = channels.or_else(|| dims.first().copied().filter(|_| dims.len() == 1))?;
        let fits = one_each(&dims, channels);
        let plain = ops::factor(self.model, node).is_none();
        let asked = kind == Kindness::Integer && !self.ask(node, SiteKind::Bias).is_off();
        let wanted = (asked || self.place.quantizes_biases() && !self.target.simulate)
            && self.float(tensor.dtype()) == DataType::Float
            && fixed
            && accumulates(&weights[weight])
            && fits
            && plain;
        wanted.then(|| Bias {
            site: self.site(node, SiteKind::Bias),
            at: self.slot(node, index),
            tensor: self.name(value),
            channels,
            activation: self.pair_read(node, data),
            weight,
            float: !asked,
        })
    }

    /// The pair that a node reads at its first input.
    pub(super) fn pair_read(&self, node: NodeId, value: ValueId) -> String {
        self.listed.get(&self.slot(node, 0)).cloned().unwrap_or_else(|| self.name(value))
    }

    /// Whether a node reads 8-bit codes there, which is what integer kernels take.
    fn reads_bytes(&self, node: NodeId, index: usize) -> bool {
        let Some(want) = self.model.node(node).input(index).and_then(|v| self.wants.get(&v)) else { return false };
        let byte = |dtype| matches!(dtype, Some(Dtype::Element(Format::Uint8 | Format::Int8)));
        match want.reads.iter().find(|((n, i), _)| *n == node && *i == index) {
            Some((_, read)) => read.mode == Mode::Dynamic || byte(read.ask.spec.dtype),
            None => want.made.as_ref().is_some_and(|m| byte(m.ask.spec.dtype)),
        }
    }

    /// Whether a node reads the value at a fixed scale.
    pub(super) fn is_fixed(&self, node: NodeId, value: ValueId) -> bool {
        let Some(want) = self.wants.get(&value) else { return false };
        let read = want.reads.iter().find(|((n, i), _)| *n == node && *i == 0).map(|(_, r)| r);
        let integer = |dtype: Option<Dtype>| dtype.and_then(Dtype::element).is_some_and(Format::is_integer);
        match (read, &want.made) {
            (Some(read), _) => read.mode == Mode::Static && integer(read.ask.spec.dtype),
            (None, Some(made)) => integer(made.ask.spec.dtype),
            (None, None) => false,
        }
    }
}

/// Whether products with a weight add up to integers that a bias can join.
pub(super) fn accumulates(weight: &Weight) -> bool {
    weight.quantizer.dtype.is_integer() && !matches!(weight.quantizer.granularity, Granularity::PerGroup { .. })
}

/// The constants that are stored more than once.
pub(super) fn splits(weights: &[Weight]) -> Vec<Split> {
    let mut by_tensor: BTreeMap<&str, Vec<&Weight>> = BTreeMap::new();
    for weight in weights {
        by_tensor.entry(&weight.tensor).or_default().push(weight);
    }
    let mut splits = Vec::new();
    for (tensor, weights) in by_tensor {
        let mut kinds: Vec<(&Weight, Vec<String>)> = Vec::new();
        for weight in weights {
            let same = |other: &Weight| {
                let alike = other.quantizer == weight.quantizer && other.transpose == weight.transpose;
                let stored = alike && other.form == weight.form && other.pair_safe == weight.pair_safe;
                stored || tied(other, weight)
            };
            match kinds.iter_mut().find(|(other, _)| same(other)) {
                Some((_, sites)) => sites.push(weight.site.clone()),
                None => kinds.push((weight, vec![weight.site.clone()])),
            }
        }
        if kinds.len() > 1 {
            let why = Reason::Differs { differences: differences(&kinds) };
            let sites = kinds.into_iter().map(|(_, sites)| sites).collect();
            splits.push(Split { tensor: tensor.to_owned(), sites, why });
        }
    }
    splits
}

/// The granularity of the transpose of a matrix.
fn turned(granularity: Granularity) -> Granularity {
    match granularity {
        Granularity::PerTensor => Granularity::PerTensor,
        Granularity::PerChannel { axis } => Granularity::PerChannel { axis: 1 - axis.min(1) },
        Granularity::PerGroup { axis, size } => Granularity::PerGroup { axis: 1 - axis.min(1), size },
    }
}

/// Whether two readers of a constant find the same bytes in it, one as rows of a table and one as blocks along its sum.
fn tied(a: &Weight, b: &Weight) -> bool {
    let blocks = |w: &Weight| {
        let own = w.quantizer.granularity;
        let granularity = if w.transpose { turned(own) } else { own };
        let rows = matches!(granularity, Granularity::PerGroup { axis: 1, .. } | Granularity::PerChannel { axis: 0 });
        (w.form != Form::Qdq && rows).then(|| Scheme { granularity, ..w.quantizer.clone() })
    };
    a.form != b.form && blocks(a).is_some() && blocks(a) == blocks(b)
}

/// In what the readers of a constant differ.
fn differences(kinds: &[(&Weight, Vec<String>)]) -> Vec<Difference> {
    let written = |weight: &Weight| {
        let mut keys: BTreeMap<String, String> = BTreeMap::new();
        if let Ok(serde_json::Value::Object(object)) = serde_json::to_value(&weight.quantizer) {
            keys.extend(object.into_iter().map(|(key, value)| (key, value.to_string().replace('"', ""))));
        }
        keys.insert("transpose".to_owned(), weight.transpose.to_string());
        keys.insert("form".to_owned(), weight.form.to_string());
        keys.insert("pair_safe".to_owned(), weight.pair_safe.is_some().to_string());
        keys
    };
    let all: Vec<(BTreeMap<String, String>, &str)> =
        kinds.iter().map(|(weight, sites)| (written(weight), sites.first().map_or("", String::as_str))).collect();
    let keys: BTreeSet<&String> = all.iter().flat_map(|(keys, _)| keys.keys()).collect();
    let differing = keys.into_iter().filter_map(|key| {
        let value = |keys: &BTreeMap<String, String>| keys.get(key).map_or("default", String::as_str).to_owned();
        let values: Vec<(String, String)> = all.iter().map(|(keys, site)| ((*site).to_owned(), value(keys))).collect();
        let differ = values.iter().any(|(_, value)| *value != values[0].1);
        differ.then(|| Difference { key: key.clone(), values })
    });
    differing.collect()
}
