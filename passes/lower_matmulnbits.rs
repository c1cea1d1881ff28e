//! `MatMul` and `Gemm` with a dequantized constant become onnxruntime's `MatMulNBits`, codes and scales as they were.
//!
//! With a plan, the products whose weight it gives that form; without one, all that can have it. The constant may be
//! behind a Transpose, and one that several products read is stored once for all of them. A product whose other operand
//! is dequantized too runs on integers and is left alone. The bias of a Gemm becomes that of `MatMulNBits`; one that is
//! not a list of constants is added behind it.

use std::collections::BTreeMap;

use super::forms::{Blocks, MICROSOFT, QuantizedTensor, Shifted, ZeroPoints, find_shifted};
use super::support::nodes::{carry_out, plain_gemm};
use super::{Change, Context, Outcome, Pass};
use crate::config::spec::Form;
use crate::error::Result;
use crate::ir::view::{Gemm, Quantizer};
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, Tensor, User, ValueId};
use crate::reason::{Operand, Reason};

/// See the module.
#[derive(Debug)]
pub struct LowerMatmulnbits;

/// What onnxruntime itself chooses where it fuses a dequantized weight.
pub const ACCURACY_LEVEL: u8 = 4;

impl Pass for LowerMatmulnbits {
    fn name(&self) -> &'static str {
        "lower-matmulnbits"
    }

    fn run(&self, model: &mut Model, context: &Context<'_>) -> Result<Outcome> {
        let initializers = model
            .all_graphs()
            .into_iter()
            .flat_map(|graph| model.graph(graph).initializers().iter().map(move |&value| (value, graph)));
        let mut lower = Lower { homes: initializers.collect(), ..Lower::default() };
        if let Some((plan, solution)) = context.quantization {
            carry_out(model, plan, Form::Matmulnbits, |model, node, index| {
                let level = plan.weights[index].accuracy_level.unwrap_or(context.conversion.accuracy_level);
                let weight = plan.weights[index].quantizer.float_zero_point.then(|| solution.weights[index].tensor());
                let zeros = weight.as_ref().and_then(|weight| weight.float_zero_points());
                lower.node(model, node, i64::from(level), zeros)
            })?;
            return Ok(lower.outcome);
        }
        for node in products(model) {
            if let Err(why) = lower.node(model, node, i64::from(context.conversion.accuracy_level), None) {
                lower.outcome.skipped(model.node_name(node), why);
            }
        }
        Ok(lower.outcome)
    }
}

/// The products of a model that read a dequantized constant.
fn products(model: &Model) -> Vec<NodeId> {
    let mut found = model.nodes_outside_functions();
    found.retain(|&n| {
        let at = model.node(n);
        let constant = at.input(1).and_then(|v| find_shifted(model, v)).is_some();
        constant && (at.is("MatMul") || at.is("Gemm")) && !runs_on_integers(model, n)
    });
    found
}

/// Whether the other operand is dequantized as well.
fn runs_on_integers(model: &Model, node: NodeId) -> bool {
    let producer = model.node(node).input(0).and_then(|v| model.producer(v));
    producer.is_some_and(|p| model.node(p).is("DequantizeLinear"))
}

/// The initializers of a weight: codes, scales, zero points; and N, K, bits and block size.
#[derive(Clone, Copy)]
struct Stored {
    codes: ValueId,
    scales: ValueId,
    zero_points: Option<ValueId>,
    attributes: [usize; 4],
}

/// A DequantizeLinear by its graph, inputs, what is added behind it, and attributes, and whether its result is transposed.
type Key = (GraphId, [Option<ValueId>; 4], Option<[i64; 2]>, bool);

#[derive(Default)]
struct Lower {
    /// What became of a DequantizeLinear.
    made: BTreeMap<Key, Stored>,
    /// The graph of each initializer.
    homes: BTreeMap<ValueId, GraphId>,
    outcome: Outcome,
}

impl Lower {
    /// Makes a `MatMulNBits` of one product, or says why not; `zeros` are its zero points where they lie between codes.
    fn node(
        &mut self,
        model: &mut Model,
        node: NodeId,
        accuracy_level: i64,
        zeros: Option<&[f32]>,
    ) -> Result<(), Reason> {
        let at = model.node(node);
        let gemm = at.is("Gemm");
        let Some(graph) = at.graph() else { return Err(Reason::Missing { what: Operand::Graph }) };
        if !gemm && !at.is("MatMul") {
            return Err(Reason::NotItsForm { form: Form::Matmulnbits, op: at.op_type().into() });
        }
        let attributes = Gemm::of(at).unwrap_or_default();
        if gemm {
            plain_gemm(model, node)?;
        }
        let found = at.input(1).and_then(|v| find_shifted(model, v));
        let found = found.ok_or(Reason::NotDequantizedConstant { what: Operand::Weight })?;
        // Without either, the matrix is [K, N]; MatMulNBits has [N, K].
        let transpose = found.exchanged == attributes.trans_b;
        let shifted = found.offsets.is_some();
        let stored = self.stored(model, graph, (&found, transpose), zeros)?;
        let [n, k, bits, block] = stored.attributes;
        let name = model.node_name(node).to_owned();
        let bias = if gemm { bias(model, node, n) } else { Bias::None };
        model.truncate_inputs(node, 1);
        for name in ["alpha", "beta", "transA", "transB"] {
            model.remove_attr(node, name);
        }
        model.set_op(node, MICROSOFT, "MatMulNBits");
        model.set_input(node, 1, Some(stored.codes));
        model.set_input(node, 2, Some(stored.scales));
        if let Some(zero_points) = stored.zero_points {
            model.set_input(node, 3, Some(zero_points));
        }
        let sizes = [("K", k), ("N", n), ("bits", bits), ("block_size", block)];
        for (name, size) in sizes {
            model.set_attr(node, Attr::int(name, size as i64));
        }
        model.set_attr(node, Attr::int("accuracy_level", accuracy_level));
        match bias {
            Bias::None => {}
            Bias::List(value) => model.set_input(node, 5, Some(value)),
            Bias::Other(value) => add_behind(model, node, value),
        }
        if model.domain_version(MICROSOFT).is_none() {
            model.set_domain_version(MICROSOFT, 1);
        }
        self.outcome.changed(
            name,
            if shifted { Change::OffsetsAsZeroPoints { bits, block } } else { Change::WrittenAsNbits { bits, block } },
        );
        Ok(())
    }

    fn stored(
        &mut self,
        model: &mut Model,
        graph: GraphId,
        (found, transpose): (&Shifted, bool),
        zeros: Option<&[f32]>,
    ) -> Result<Stored, Reason> {
        let at = model.node(found.dequantize);
        let inputs = [at.input(0), at.input(1), at.input(2), found.offsets];
        // Where the quantized values are, every graph that reads them finds what becomes of them.
        let graph = inputs[0].and_then(|codes| self.homes.get(&codes).copied()).unwrap_or(graph);
        let key = (graph, inputs, Quantizer::of(at).map(|q| [q.axis, q.block_size]), transpose);
        if let Some(found) = self.made.get(&key) {
            return Ok(*found);
        }
        let mut constant = QuantizedTensor::from_qdq(model, found.dequantize)?;
        if let Some(offsets) = found.offsets.and_then(|v| model.constant(v)?.to_f32()) {
            constant.zero_points = ZeroPoints::Floats(constant.zero_points_with(&offsets)?);
        }
        if let Some(zeros) = zeros {
            if zeros.len() != constant.scales.len() {
                return Err(Reason::WrongCount { what: "zero points".into(), per: "scale".into() });
            }
            constant.zero_points = ZeroPoints::Floats(zeros.to_vec());
        }
        let constant = if transpose { constant.transposed()? } else { constant };
        let Blocks { n, k, bits, block, codes, scales, zero_points } = constant.to_nbits()?;
        let name = base_name(model, inputs[0]);
        let mut add = |suffix: &str, tensor: Tensor| model.add_initializer(graph, &format!("{name}{suffix}"), tensor);
        let stored = Stored {
            codes: add("_nbits", codes),
            scales: add("_nbits_scale", scales),
            zero_points: zero_points.map(|zeros| add("_nbits_zero_point", zeros)),
            attributes: [n, k, bits, block],
        };
        self.made.insert(key, stored);
        Ok(stored)
    }
}

/// The name of the constant whose codes these are.
pub(super) fn base_name(model: &Model, codes: Option<ValueId>) -> String {
    let name = codes.map_or("", |v| model.value(v).name());
    let base = ["_quantized", "_nbits", "_blocks", "_integer", "_lstm"]
        .into_iter()
        .find_map(|suffix| name.strip_suffix(suffix));
    base.filter(|base| !base.is_empty()).unwrap_or(name).to_owned()
}

/// What a Gemm adds.
enum Bias {
    None,
    /// One constant a column.
    List(ValueId),
    /// Anything else.
    Other(ValueId),
}

fn bias(model: &mut Model, node: NodeId, columns: usize) -> Bias {
    let Some(value) = model.node(node).input(2) else { return Bias::None };
    let Some(tensor) = model.constant(value) else { return Bias::Other(value) };
    let dims = tensor.dims();
    if dims == [columns] {
        return Bias::List(value);
    }
    if dims == [1, columns] {
        let (flat, graph) = (tensor.clone().reshaped(&[columns]), model.node(node).graph());
        let name = format!("{}_flat", model.value(value).name());
        return graph.map_or(Bias::Other(value), |g| Bias::List(model.add_initializer(g, &name, flat)));
    }
    Bias::Other(value)
}

/// Adds `value` to the output of `node`, under the name that this had.
pub(super) fn add_behind(model: &mut Model, node: NodeId, value: ValueId) {
    let Some(output) = model.node(node).output(0) else { return };
    let name = model.value(output).name().to_owned();
    let label = model.node_name(node).to_owned();
    let new = NewNode::new("Add", format!("{label}_Add"), &[output, value], &[&format!("{name}_sum")]);
    let add = model.insert(Place::After(node), new);
    let Some(sum) = model.node(add).output(0) else { return };
    if let Some(ty) = model.value(output).ty().cloned() {
        model.set_type(sum, ty);
    }
    model.replace_uses(output, sum, |user| !matches!(user, User::Node { node, .. } if node == add));
    model.take_name(output, sum, &format!("{name}_product"));
}
