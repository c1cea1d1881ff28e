//! What a rewrite did, for people and for machines.

mod budget;
mod deployment;
#[doc(hidden)]
pub mod layout;
#[doc(hidden)]
pub mod page;
#[doc(hidden)]
pub mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;

use crate::algorithms::sufficiency::Sufficiency;
use crate::ir::{Def, Model};
use crate::observe::compare::Closeness;
use crate::ops::{self, Form};
use crate::passes::{Note, Outcome};
use crate::plan::{Divided, Mode, Plan, Skip, Split};
use crate::reason::Reason;
use crate::solve::{Corrected, Fit, Learned, Solution};
use crate::statistics::{SiteStatistics, Statistics};

pub use budget::{BudgetReport, CheckRow, CurvePoint, GroupRow, Step};
pub use deployment::Deployment;

/// Version of the report document.
pub const SCHEMA: u32 = 2;

/// What a rewrite did.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Target.
    pub target: String,
    /// Operator set before and after.
    pub opset: (i64, i64),
    /// Bytes of the whole model before and after.
    pub bytes: (u64, u64),
    /// Weights that were inputs of the model, too, and are constants now; IR versions below 4 do not count.
    #[serde(skip_serializing_if = "is_zero")]
    pub frozen_inputs: usize,
    /// Bytes of float constants that stay float, of all that the model has.
    pub float_bytes: (u64, u64),
    /// Operators: how many nodes run on integers, of how many.
    pub operators: BTreeMap<String, (usize, usize)>,
    /// Quantized activations.
    pub activations: Vec<ActivationRow>,
    /// Quantized constants.
    pub weights: Vec<WeightRow>,
    /// Inputs of products whose channels were to be divided.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub smoothing: Vec<SmoothingRow>,
    /// Biases that take up what quantization moved means by.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub corrections: Vec<Corrected>,
    /// Constants that are stored more than once, and why.
    pub splits: Vec<Split>,
    /// What stays float, and why.
    pub skipped: Vec<Skip>,
    /// What the clean-up passes did and would not do.
    pub passes: Vec<PassRow>,
    /// Where the samples came from; `None` without samples.
    pub samples: Option<String>,
    /// How many samples were run for statistics, and how many were held out to measure quality.
    pub sample_counts: (usize, usize),
    /// Whether the samples were enough for the static ranges; `None` without samples or statistics.
    pub sufficiency: Option<Sufficiency>,
    /// Tensors that vetoes kept float, with the reason.
    pub guarded: BTreeMap<String, Reason>,
    /// Quality of each output on the held-out samples.
    pub quality: Vec<QualityRow>,
    /// What the result is as onnxruntime runs it, on the same samples; `None` where that was not asked for or is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deployed: Option<Deployment>,
    /// What was chosen for a budget, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetReport>,
    /// Seconds by stage, in order.
    pub seconds: Vec<(String, f64)>,
    /// How long it took to solve weights with samples, by their sites.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub weight_seconds: BTreeMap<String, f64>,
    /// Things the user should know.
    pub warnings: Vec<String>,
    /// The files that were read: the model with its external data, samples, a configuration. Not part of the document.
    #[serde(skip)]
    pub files: Vec<PathBuf>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// A quantized activation.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ActivationRow {
    /// Tensor.
    pub tensor: String,
    /// Element format.
    pub dtype: &'static str,
    /// `static` or `dynamic`.
    pub mode: &'static str,
    /// Scale; absent for dynamic ones.
    pub scale: Option<f32>,
    /// Zero point; absent for dynamic ones.
    pub zero_point: Option<i32>,
    /// Smallest and largest value seen.
    pub range: Option<(f32, f32)>,
    /// Its own signal to quantization noise over the samples, in integers.
    pub sqnr_db: Option<f64>,
    /// Why it is quantized.
    pub why: Reason,
}

/// An input of products whose channels were to be divided, so that one scale serves them.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SmoothingRow {
    /// Tensor.
    pub tensor: String,
    /// The products that read it, by their first output.
    pub products: Vec<String>,
    /// How the divisors follow from ranges.
    pub method: String,
    /// What was done.
    #[serde(flatten)]
    pub done: Option<Smoothed>,
    /// Why nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<Reason>,
}

/// How an input was divided.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Smoothed {
    /// The exponent of its range.
    pub alpha: f64,
    /// What divides it.
    pub divided: Divided,
    /// Signal to quantization noise of the products on rows that were held out, as it would be without, in dB; absent where
    /// it was not measured, since a plan asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before_db: Option<f64>,
    /// The same with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after_db: Option<f64>,
}

/// A quantized constant.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct WeightRow {
    /// Site.
    pub site: String,
    /// Initializer.
    pub tensor: String,
    /// Element format.
    pub dtype: &'static str,
    /// Number of scales.
    pub scales: usize,
    /// Signal to quantization noise over the tensor.
    pub sqnr_db: f64,
    /// Whether adjacent pairs were kept from saturating.
    pub pair_safe: bool,
    /// How it is stored.
    pub form: Form,
    /// Why it is quantized this way.
    pub why: Reason,
    /// What an algorithm made of it, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<AlgorithmRow>,
    /// What samples made of it, where an algorithm that looks at them was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learned: Option<Learned>,
}

/// What an algorithm made of a constant.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct AlgorithmRow {
    /// Its method.
    pub method: String,
    /// How it compares with plain rounding.
    #[serde(flatten)]
    pub fit: Fit,
}

/// What one pass did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct PassRow {
    /// Name of the pass.
    pub pass: String,
    /// Number of changes.
    pub changes: usize,
    /// What it left alone, and why.
    pub skips: Vec<Note<Reason>>,
}

impl PassRow {
    /// Reads what a pass did.
    #[must_use]
    pub fn new(pass: &str, outcome: &Outcome) -> Self {
        Self { pass: pass.to_owned(), changes: outcome.changes.len(), skips: outcome.skips.clone() }
    }
}

/// Quality of one output.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct QualityRow {
    /// Output, or a tensor that decides how large one is.
    pub output: String,
    /// The operator that it goes into, where it is no output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub into: Option<String>,
    /// How far floats are apart; `None` where they cannot be compared.
    #[serde(flatten)]
    pub floats: Option<FloatQuality>,
    /// The share of elements that are the same, of outputs that are no floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// How far logits of a language model are apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<LogitsQuality>,
    /// Why it cannot be compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unlike: Option<Unlike>,
}

/// How far floats are apart.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct FloatQuality {
    /// Signal to quantization noise, in dB; infinite when equal, which JSON shows as `null`.
    pub sqnr_db: f64,
    /// The same of the channel in the middle, where that is more than 6 dB away: few channels carry the signal, or the noise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub median_channel_db: Option<f64>,
    /// Cosine similarity.
    pub cosine: f64,
    /// Largest absolute difference.
    pub max_abs_error: f32,
}

/// How far logits of a language model are apart: those of outputs whose last axis is as long as the table that the tokens of an
/// input are looked up in.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct LogitsQuality {
    /// Kullback–Leibler divergence of the quantized model's distribution from the float one's, the mean over positions, in nats.
    pub kl: f64,
    /// The share of positions at which both go on with the same token.
    pub top1: f64,
    /// Perplexity of the float and of the quantized model on the samples' own tokens, where outputs have a row for each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<[f64; 2]>,
}

/// Shapes that differ, since they follow from values.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Unlike {
    /// In how many samples.
    pub samples: usize,
    /// The shapes in the float and in the quantized model, in the first of these samples.
    pub shapes: [Vec<usize>; 2],
}

/// From how many dB on the median of the channels is worth saying.
const APART_DB: f64 = 6.0;

impl QualityRow {
    /// Reads what a comparison found.
    #[must_use]
    pub fn new(found: &Closeness) -> Self {
        let Closeness { name, into, metrics, float, equal, unlike, .. } = found;
        let row = Self { output: name.clone(), into: into.clone(), ..Self::default() };
        if let Some((samples, shapes)) = unlike {
            return Self { unlike: Some(Unlike { samples: *samples, shapes: shapes.clone() }), ..row };
        }
        if !float {
            let agreement = if metrics.count == 0 { 1.0 } else { *equal as f64 / metrics.count as f64 };
            return Self { agreement: Some(agreement), ..row };
        }
        let sqnr_db = metrics.sqnr_db();
        let floats = FloatQuality {
            sqnr_db,
            median_channel_db: found.median_channel_db().filter(|db| (db - sqnr_db).abs() > APART_DB),
            cosine: metrics.cosine(),
            max_abs_error: metrics.max_abs_error(),
        };
        let logits = found.logits.filter(|logits| logits.positions > 0).map(|logits| LogitsQuality {
            kl: logits.kl(),
            top1: logits.top1(),
            perplexity: logits.perplexity(),
        });
        Self { floats: Some(floats), logits, ..row }
    }

    /// The SQNR of floats, where they can be compared.
    #[must_use]
    pub fn sqnr_db(&self) -> Option<f64> {
        self.floats.as_ref().map(|floats| floats.sqnr_db)
    }
}

impl Report {
    /// What people read: what was quantized, what was left float and why, sizes, quality, time, and warnings.
    #[must_use]
    pub fn summary(&self) -> String {
        let total = self.seconds.iter().map(|(_, seconds)| seconds).sum();
        let mut out = text::text(self, false, total);
        out.extend(text::warnings(self, false).iter().map(|warning| format!("warning: {warning}\n")));
        out
    }

    /// An input is not divided after all.
    pub(crate) fn unsmooth(&mut self, tensor: &str, why: &Reason) {
        for row in self.smoothing.iter_mut().filter(|row| row.tensor == tensor) {
            (row.done, row.why) = (None, Some(why.clone()));
        }
    }

    /// Fills in what the plan for a prepared model and its solution say.
    pub fn describe(&mut self, model: &Model, plan: &Plan, solution: &Solution, statistics: Option<&Statistics>) {
        self.float_bytes = float_bytes(model, plan);
        self.activations = plan
            .activations
            .iter()
            .map(|(name, activation)| {
                let solved = solution.activations.get(name).copied();
                let tensor = activation.tensor.as_ref().unwrap_or(name);
                let seen = statistics.and_then(|s| s.sites.get(tensor));
                let (low, high) = activation.quantizer.dtype.range();
                ActivationRow {
                    tensor: name.clone(),
                    dtype: activation.quantizer.dtype.name(),
                    mode: match activation.mode {
                        Mode::Static => "static",
                        Mode::Dynamic => "dynamic",
                    },
                    scale: solved.map(|solved| solved.scale),
                    zero_point: solved.map(|solved| solved.zero_point),
                    range: seen.and_then(SiteStatistics::range).map(|r| (r.min, r.max)),
                    sqnr_db: solved
                        .filter(|_| activation.quantizer.dtype.is_integer())
                        .zip(seen)
                        .map(|(solved, site)| site.sqnr_db(solved.scale, solved.zero_point, low, high)),
                    why: activation.why.clone(),
                }
            })
            .collect();
        self.weights = plan
            .weights
            .iter()
            .zip(&solution.weights)
            .enumerate()
            .map(|(at, (weight, solved))| WeightRow {
                site: weight.site.clone(),
                tensor: weight.tensor.clone(),
                dtype: weight.quantizer.dtype.name(),
                scales: solved.scale_count(),
                sqnr_db: solved.sqnr_db(),
                pair_safe: weight.pair_safe.is_some(),
                algorithm: solved
                    .fit()
                    .zip(weight.quantizer.algorithm.as_ref())
                    .map(|(fit, algorithm)| AlgorithmRow { method: algorithm.method.name(), fit }),
                learned: solution.learned.get(&at).cloned(),
                form: weight.form,
                why: weight.why.clone(),
            })
            .collect();
        let times = solution.learned.iter().filter(|(_, learned)| learned.fell_back.is_none());
        self.weight_seconds = times.map(|(&at, learned)| (plan.weights[at].site.clone(), learned.seconds)).collect();
        self.corrections.clone_from(&solution.corrected);
        self.splits.clone_from(&plan.splits);
        self.skipped.clone_from(&plan.skipped);
        let mut constant = self.activations.iter().filter(|a| a.range.is_some_and(|(low, high)| low >= high));
        if let Some(first) = constant.next() {
            let more = constant.count();
            let others = if more == 0 { String::new() } else { format!(" (and {more} more)") };
            self.warnings
                .push(format!("\"{}\"{others} had one value only in all samples: is this real data?", first.tensor));
        }
    }

    /// Counts, by operator, the nodes of the finished model that run on integers, of all nodes of that operator.
    /// Nodes that are listed as left float, of which only the weight is quantized, or that the input model had quantized
    /// already do not count.
    pub fn count_operators(&mut self, model: &Model) {
        let graph = model.graph(model.main());
        let left = self.skipped.iter().filter(|s| s.why != Reason::BesideKernel);
        let left: BTreeSet<(&str, &str)> = left.map(|s| (s.node.as_str(), s.op.as_str())).collect();
        let floats: BTreeSet<&str> = self.weights.iter().filter(|w| w.is_alone()).map(WeightRow::node).collect();
        let is = |value, op: &str| model.producer(value).is_some_and(|p| model.node(p).is(op));
        for &node in graph.nodes() {
            let (at, name) = (model.node(node), model.node_name(node));
            let op = at.op_type();
            if matches!(op, "QuantizeLinear" | "DequantizeLinear" | "DynamicQuantizeLinear") {
                continue;
            }
            let reads = ops::is_quantized(op) || at.inputs().iter().flatten().any(|&v| is(v, "DequantizeLinear"));
            let row = self.operators.entry(op.to_owned()).or_default();
            row.1 += 1;
            row.0 += usize::from(reads && !left.contains(&(name, op)) && !floats.contains(name));
        }
        self.operators.retain(|_, row| row.0 > 0);
    }
}

impl WeightRow {
    /// The node that reads it.
    #[must_use]
    pub fn node(&self) -> &str {
        self.site.rsplit_once('.').map_or(&self.site, |(node, _)| node)
    }

    /// Whether the node that reads it computes in float.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        matches!(self.why, Reason::FloatWeight { .. })
    }
}

/// Bytes of the float constants that a plan leaves, and of all.
fn float_bytes(model: &Model, plan: &Plan) -> (u64, u64) {
    let weights = plan.weights.iter().map(|w| w.tensor.as_str());
    let quantized: BTreeSet<&str> = weights.chain(plan.biases.iter().map(|b| b.tensor.as_str())).collect();
    let (mut left, mut all) = (0, 0);
    for &value in model.all_graphs().into_iter().flat_map(|graph| model.graph(graph).initializers()) {
        let (Def::Constant(tensor) | Def::Input { default: Some(tensor) }) = model.value(value).def() else { continue };
        if tensor.dtype().is_float() {
            all += tensor.byte_len() as u64;
            left += if quantized.contains(model.value(value).name()) { 0 } else { tensor.byte_len() as u64 };
        }
    }
    (left, all)
}

/// A summary of a model.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Inspection {
    /// Operator sets by domain.
    pub opsets: BTreeMap<String, i64>,
    /// IR version.
    pub ir_version: i64,
    /// Producer and its version.
    pub producer: String,
    /// Inputs: name, element type, shape.
    pub inputs: Vec<(String, String)>,
    /// The inputs that have a default.
    pub defaults: Vec<String>,
    /// Outputs: name, element type, shape.
    pub outputs: Vec<(String, String)>,
    /// Nodes by operator, bodies and functions included.
    pub operators: BTreeMap<String, usize>,
    /// Constants by element type: tensors, bytes.
    pub constants: BTreeMap<&'static str, (usize, u64)>,
    /// Quantize, Dequantize and integer operators that are there already.
    pub quantizers: BTreeMap<String, usize>,
}

/// Summarizes a model.
#[must_use]
pub fn inspect(model: &Model) -> Inspection {
    let header = model.header();
    let mut found = Inspection {
        opsets: header
            .opset_import
            .iter()
            .map(|o| {
                let domain = o.domain.clone().filter(|d| !d.is_empty()).unwrap_or_else(|| "ai.onnx".to_owned());
                (domain, o.version.unwrap_or(0))
            })
            .collect(),
        ir_version: model.ir_version(),
        producer: [&header.producer_name, &header.producer_version]
            .into_iter()
            .flatten()
            .filter(|s| !s.is_empty())
            .cloned()
            .collect::<Vec<_>>()
            .join(" "),
        inputs: model.graph(model.main()).inputs().map(|v| described(model, v)).collect(),
        defaults: model
            .graph(model.main())
            .inputs()
            .filter(|&v| matches!(model.value(v).def(), Def::Input { default: Some(_) }))
            .map(|v| model.value(v).name().to_owned())
            .collect(),
        outputs: model.graph(model.main()).outputs().map(|v| described(model, v)).collect(),
        operators: BTreeMap::new(),
        constants: BTreeMap::new(),
        quantizers: BTreeMap::new(),
    };
    for graph in model.all_graphs() {
        for &node in model.graph(graph).nodes() {
            let at = model.node(node);
            let op = if at.domain().is_empty() {
                at.op_type().to_owned()
            } else {
                format!("{}.{}", at.domain(), at.op_type())
            };
            if ops::is_quantized(at.op_type()) {
                *found.quantizers.entry(op.clone()).or_default() += 1;
            }
            *found.operators.entry(op).or_default() += 1;
            for attr in at.attrs() {
                if let Some(tensor) = &attr.proto().t
                    && let Ok(tensor) = crate::ir::Tensor::from_proto(tensor.clone(), None)
                {
                    let row = found.constants.entry(tensor.dtype().name()).or_default();
                    *row = (row.0 + 1, row.1 + tensor.byte_len() as u64);
                }
            }
        }
        for &value in model.graph(graph).initializers() {
            if let Def::Constant(tensor) | Def::Input { default: Some(tensor) } = model.value(value).def() {
                let row = found.constants.entry(tensor.dtype().name()).or_default();
                *row = (row.0 + 1, row.1 + tensor.byte_len() as u64);
            }
        }
    }
    found
}

fn described(model: &Model, value: crate::ir::ValueId) -> (String, String) {
    use crate::onnx::tensor_shape_proto::dimension::Value;
    let slot = model.value(value);
    let dtype = model.dtype(value).map_or("?", crate::onnx::DataType::name);
    let dims = slot.shape_proto().map(|shape| {
        let dims: Vec<String> = shape
            .dim
            .iter()
            .map(|d| match &d.value {
                Some(Value::DimValue(n)) => n.to_string(),
                Some(Value::DimParam(name)) => name.clone(),
                None => "?".to_owned(),
            })
            .collect();
        format!("[{}]", dims.join(", "))
    });
    (slot.name().to_owned(), format!("{dtype}{}", dims.unwrap_or_default()))
}
