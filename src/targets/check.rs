//! Proves a finished model against a target.
//!
//! These rules are checked because a runtime would otherwise silently compute something else:
//!
//! 1. The target loads the opset and IR version, and they are new enough for every element type used.
//! 2. Scales are finite, positive and normal.
//! 3. A weight with one scale per channel has it on the axis that the integer kernel assumes.
//! 4. The scale of an int32 bias is exactly the product of the scales of input and weight.
//! 5. An operator that only moves quantized values has the same scale and zero point on both sides.
//! 6. A product with a dequantized 2-bit weight has a number of columns that its fusion can read.
//! 7. If the target adds products in pairs in 16 bits, no pair of weights can saturate.
//! 8. Where the target fuses, its optimizers leave nothing that it then refuses or runs wrongly: what [`layout`] says, an
//!    operator between quantizers with an attribute that its kernel lacks, a float bias that the kernel's int32 does not hold.
//! 9. Zero points are 0 if the target takes no others.

use std::collections::BTreeSet;

use crate::ir::view::{Gemm, Quantizer};
use crate::ir::{Def, Model, NodeId, Tensor, User, ValueId};
use crate::numerics::pair_safe;
use crate::onnx::DataType;
use crate::ops::{self, Role, reduction_rows};

use super::{Placement, Target, layout};

/// Everything about `model` that `target` would refuse or compute wrongly, as sentences.
#[must_use]
pub fn violations(model: &Model, target: &Target) -> Vec<String> {
    let mut check = Check { model, target, found: Vec::new() };
    check.versions();
    if target.placement == Placement::Fused {
        check.transposes();
    }
    for graph in model.all_graphs() {
        for &node in model.graph(graph).nodes() {
            if target.placement == Placement::Fused {
                check.optimized(node);
            }
            match model.node(node).op_type() {
                "DequantizeLinear" | "QuantizeLinear" if model.node(node).domain().is_empty() => check.quantizer(node),
                "MatMulInteger" => check.integer(node, 1, Some(0)),
                "DynamicQuantizeLSTM" => {
                    check.integer(node, 1, None);
                    check.integer(node, 2, None);
                }
                op if target.carry.has(op) && ops::moves_codes(model, node) => check.carrier(node),
                _ => {}
            }
        }
    }
    check.found
}

/// A DequantizeLinear over an initializer.
struct Dequantized<'a> {
    node: NodeId,
    codes: &'a Tensor,
    scale: &'a Tensor,
}

struct Check<'a> {
    model: &'a Model,
    target: &'a Target,
    found: Vec<String>,
}

impl<'a> Check<'a> {
    fn versions(&mut self) {
        let opset = self.model.opset().unwrap_or(0);
        let ir = self.model.ir_version();
        let Target { name, opset_max, ir_max, .. } = self.target;
        if opset > *opset_max {
            self.found.push(format!("opset {opset} is newer than the {opset_max} that {name} loads"));
        }
        if ir > *ir_max {
            self.found.push(format!("IR version {ir} is newer than the {ir_max} that {name} loads"));
        }
        let mut seen = BTreeSet::new();
        for graph in self.model.all_graphs() {
            for &value in self.model.graph(graph).initializers() {
                let Def::Constant(tensor) = self.model.value(value).def() else { continue };
                let dtype = tensor.dtype();
                // Of these only quantizers came late; every other operator may read them.
                if matches!(dtype, DataType::Int16 | DataType::Uint16) {
                    continue;
                }
                let Some((need_opset, need_ir)) = dtype.quantizers_since() else { continue };
                if (opset < need_opset || ir < need_ir) && seen.insert(dtype) {
                    let name = self.model.value(value).name();
                    self.found.push(format!(
                        "\"{name}\" is {dtype}, which needs opset {need_opset} and IR version {need_ir}"
                    ));
                }
            }
        }
    }

    fn label(&self, node: NodeId) -> String {
        format!("\"{}\" ({})", self.model.node_name(node), self.model.node(node).op_type())
    }

    /// 16-bit types and scales per group need newer versions than the operators.
    fn quantizer_versions(&mut self, node: NodeId) {
        let (opset, ir) = (self.model.opset().unwrap_or(0), self.model.ir_version());
        let wide = [0, 2].into_iter().filter_map(|i| self.model.constant_input(node, i)).map(Tensor::dtype);
        let wide =
            wide.filter(|d| matches!(d, DataType::Int16 | DataType::Uint16)).filter_map(DataType::quantizers_since);
        let groups = Quantizer::of(self.model.node(node)).is_some_and(|q| q.block_size > 0);
        if let Some((need_opset, need_ir)) = wide.chain(groups.then_some((21, 10))).max()
            && (opset < need_opset || ir < need_ir)
        {
            let label = self.label(node);
            self.found.push(format!("{label} needs opset {need_opset} and IR version {need_ir}"));
        }
    }

    fn quantizer(&mut self, node: NodeId) {
        self.quantizer_versions(node);
        if let Some(scale) = self.model.constant_input(node, 1).and_then(Tensor::to_f32) {
            // What only multiplies codes that are stored may do so with a number of either sign, and groups of zeros with zero.
            let stored = self.model.node(node).is("DequantizeLinear") && self.model.constant_input(node, 0).is_some();
            let fits = |s: f32| (s.is_normal() && s > 0.0) || (stored && (s.is_normal() || s == 0.0));
            if let Some(bad) = scale.iter().find(|s| !fits(**s)) {
                self.found.push(format!("{} has the scale {bad}", self.label(node)));
            }
        }
        let zero = self.model.constant_input(node, 2).filter(|_| !self.target.zero_points);
        if zero.is_some_and(|zero| zero.raw().iter().any(|&byte| byte != 0)) {
            self.found.push(format!("{} has a zero point other than 0", self.label(node)));
        }
        let Some(weight) = self.dequantized(node) else { return };
        let Some(output) = self.model.node(node).output(0) else { return };
        for &user in self.model.value(output).users() {
            let User::Node { node: reader, input } = user else { continue };
            match ops::of(self.model, reader).map(|r| r.role(input)) {
                Some(Role::Weight(_)) => self.weight(&weight, reader, input),
                Some(Role::Bias) => self.bias(&weight, reader, reader),
                _ if input < 2 && self.model.node(reader).is("Add") => {
                    let other = self.model.node(reader).input(1 - input).and_then(|v| self.model.producer(v));
                    if let Some(product) = other.filter(|&p| self.model.node(p).is("MatMul")) {
                        self.bias(&weight, product, reader);
                    }
                }
                _ => {}
            }
        }
    }

    fn dequantized(&self, node: NodeId) -> Option<Dequantized<'a>> {
        if !self.model.node(node).is("DequantizeLinear") {
            return None;
        }
        let codes = self.model.constant_input(node, 0)?;
        let scale = self.model.constant_input(node, 1)?;
        Some(Dequantized { node, codes, scale })
    }

    fn producer_dq(&self, value: Option<ValueId>) -> Option<NodeId> {
        let node = self.model.producer(value?)?;
        self.model.node(node).is("DequantizeLinear").then_some(node)
    }

    fn weight(&mut self, weight: &Dequantized<'_>, reader: NodeId, input: usize) {
        let dims = weight.codes.dims();
        let Some(layout) = ops::weight_layout(self.model, reader, input, &dims) else { return };
        let Some(quantizer) = Quantizer::of(self.model.node(weight.node)) else { return };
        let blocked = quantizer.block_size > 0;
        let has_kernel = self.target.anchor(self.model.node(reader).op_type()).is_some();
        let data = usize::from(input == 0);
        let computed = self.producer_dq(self.model.node(reader).input(data));
        // A batch of matrices beside floats is dequantized as a whole, on whatever axis.
        let batch = dims.len() > 2 && self.model.node(reader).is("MatMul") && computed.is_none();
        if weight.scale.len() > 1 && !blocked && has_kernel && !batch {
            let axis = quantizer.axis;
            let axis = if axis < 0 { axis + dims.len() as i64 } else { axis };
            if layout.channel_axis.map(|a| a as i64) != Some(axis) {
                self.found.push(format!(
                    "the weight of {} has its scales on axis {axis}, but the kernel requires axis {}",
                    self.label(reader),
                    layout.channel_axis.map_or("none".to_owned(), |a| a.to_string())
                ));
            }
        }
        let at = self.model.node(reader);
        let columns = dims.last().copied().unwrap_or(0);
        let multiple = self.target.two_bit_columns.max(1);
        let block = quantizer.block_size;
        let fused = block == 0 || [16, 32, 64, 128, 256].contains(&block);
        if (at.is("MatMul") || at.is("Gemm"))
            && Gemm::of(at).is_none_or(|gemm| !gemm.trans_b)
            && input == 1
            && fused
            && weight.codes.dtype().bits() == Some(2)
            && !columns.is_multiple_of(multiple)
        {
            let dtype = weight.codes.dtype();
            self.found.push(format!(
                "the {dtype} weight of {} has {columns} columns, and only multiples of {multiple} are computed correctly",
                self.label(reader)
            ));
        }
        let unsigned = computed.is_some_and(|dq| self.unsigned_codes(dq));
        let hazardous = self.target.pair_safe
            && !blocked
            && weight.codes.dtype() == DataType::Int8
            && !layout.depthwise
            && !matches!(self.model.node(reader).op_type(), "LSTM" | "GRU")
            && unsigned;
        if hazardous {
            let codes: Vec<i8> = weight.codes.raw().iter().map(|&b| b as i8).collect();
            weight.codes.release();
            let rows = reduction_rows(&dims, layout.reduction);
            if (0..rows.count()).any(|row| !pair_safe::is_safe(&rows.gather(row, &codes))) {
                self.found.push(format!("the weight of {} can saturate 16-bit pair sums", self.label(reader)));
            }
        }
    }

    /// Codes that an integer product sums up along the last axis but one, beside unsigned codes: those at `data`, or those that
    /// it makes itself.
    fn integer(&mut self, node: NodeId, weight: usize, data: Option<usize>) {
        let at = self.model.node(node);
        let unsigned = data.is_none_or(|input| {
            let made = at.input(input).and_then(|v| self.model.producer(v));
            made.is_some_and(|q| {
                let zero = self.model.constant_input(q, 2).is_some_and(|z| z.dtype() == DataType::Uint8);
                self.model.node(q).is("DynamicQuantizeLinear") || zero
            })
        });
        let Some(codes) = self.model.constant_input(node, weight).filter(|t| t.dtype() == DataType::Int8) else {
            return;
        };
        let dims = codes.dims();
        if !self.target.pair_safe || !unsigned || dims.len() < 2 {
            return;
        }
        let raw = codes.raw();
        let rows = reduction_rows(&dims, ops::Reduction::Along(dims.len() - 2));
        let raw: Vec<i8> = raw.iter().map(|&b| b.cast_signed()).collect();
        if (0..rows.count()).any(|row| !pair_safe::is_safe(&rows.gather(row, &raw))) {
            self.found.push(format!("the weight of {} can saturate 16-bit pair sums", self.label(node)));
        }
        codes.release();
    }

    /// Whether a DequantizeLinear reads unsigned 8-bit activations.
    fn unsigned_codes(&self, dq: NodeId) -> bool {
        let Some(codes) = self.model.node(dq).input(0) else { return false };
        let quantizer = self.model.producer(codes);
        quantizer.is_some_and(|q| {
            self.model.node(q).is("DynamicQuantizeLinear")
                || self.model.constant_input(q, 2).is_some_and(|z| z.dtype() == DataType::Uint8)
        })
    }

    fn scale_of(&self, value: Option<ValueId>) -> Option<Vec<f32>> {
        let dq = self.producer_dq(value)?;
        self.model.constant_input(dq, 1)?.to_f32()
    }

    /// `product` accumulates what `reader` adds the bias to; often they are one.
    fn bias(&mut self, bias: &Dequantized<'_>, product: NodeId, reader: NodeId) {
        if bias.codes.dtype() != DataType::Int32 {
            return;
        }
        let node = self.model.node(product);
        let (Some(input), Some(weight)) = (self.scale_of(node.input(0)), self.scale_of(node.input(1))) else {
            self.found.push(format!("{} has an int32 bias beside a float input", self.label(reader)));
            return;
        };
        let scales = bias.scale.to_f32().unwrap_or_default();
        let exact = input.len() == 1
            && Gemm::of(node).is_none_or(|gemm| gemm.is_plain(false))
            && scales.len() == weight.len()
            && scales.iter().zip(&weight).all(|(b, w)| b.to_bits() == (w * input[0]).to_bits());
        if !exact {
            self.found.push(format!(
                "the scale of the bias of {} is not the product of the scales of input and weight",
                self.label(reader)
            ));
        }
    }

    /// Where Transposes are moved that come with convolutions on integers.
    fn transposes(&mut self) {
        let model = self.model;
        let nodes: Vec<NodeId> = model.all_graphs().into_iter().flat_map(|g| model.graph(g).nodes()).copied().collect();
        let integer = |n: NodeId| {
            let conv = model.node(n);
            let both = [0, 1].iter().all(|&i| self.producer_dq(conv.input(i)).is_some());
            conv.is("Conv") && both && conv.output(0).is_some_and(|v| self.is_quantized(v))
        };
        let reached = layout::reached(model, nodes.iter().copied(), &integer);
        for &node in nodes.iter().filter(|node| layout::breaks(model, **node) && reached.contains(node)) {
            self.found.push(format!("Transposes are moved over {}, which breaks it", self.label(node)));
        }
    }

    /// What the optimizers of a target that fuses make of a node.
    fn optimized(&mut self, node: NodeId) {
        let model = self.model;
        let at = model.node(node);
        let Some(before) = self.producer_dq(at.input(0)) else { return };
        let int8 = || model.constant_input(before, 2).is_some_and(|zero| zero.dtype() == DataType::Int8);
        let quantized = at.outputs().iter().flatten().all(|&v| self.is_quantized(v));
        let moved = model.opset() >= Some(21) && layout::takes_dequantize(model, node) && !quantized;
        if moved && model.constant_input(before, 0).is_none() && int8() {
            self.found.push(format!("quantizers are moved over {}, and then refused", self.label(node)));
        }
        if quantized
            && self.target.join.has(at.op_type())
            && let Some(fixed) = ops::unfit_attribute(model, node)
        {
            self.found.push(format!("the kernel of {} has no {}", self.label(node), fixed.name));
        }
        if quantized && self.bias_overflows(node) {
            self.found.push(format!("the bias of {} does not fit int32 at the scale of its kernel", self.label(node)));
        }
    }

    /// Whether a constant float bias beside quantized operands, which the kernel has in int32, does not fit it.
    fn bias_overflows(&self, node: NodeId) -> bool {
        let at = self.model.node(node);
        let bias = at.input(2).filter(|_| ops::of(self.model, node).is_some_and(|row| row.role(2) == Role::Bias));
        let Some(bias) = bias.and_then(|v| self.model.constant(v)).and_then(Tensor::to_f32) else { return false };
        let (Some(input), Some(weight)) = (self.scale_of(at.input(0)), self.scale_of(at.input(1))) else {
            return false;
        };
        let one = |list: &[f32], i: usize| if list.len() == 1 { list.first() } else { list.get(i) }.copied();
        let codes = |i: usize| Some(f64::from(one(&bias, i)?) / f64::from(one(&weight, i)? * input.first()?));
        (0..bias.len().max(weight.len())).filter_map(codes).any(|code| code.abs() > f64::from(i32::MAX))
    }

    /// Whether all that reads a value, after a Relu or Clip, is a `QuantizeLinear`.
    fn is_quantized(&self, value: ValueId) -> bool {
        let users = self.model.value(value).users();
        let quantizer =
            |user: &User| matches!(user, User::Node { node, input: 0 } if self.model.node(*node).is("QuantizeLinear"));
        match users {
            [User::Node { node, input: 0 }] if self.target.absorb.has(self.model.node(*node).op_type()) => {
                self.model.node(*node).output(0).is_some_and(|v| self.is_quantized(v))
            }
            _ => !users.is_empty() && users.iter().all(quantizer),
        }
    }

    fn carrier(&mut self, node: NodeId) {
        let Some(before) = self.producer_dq(self.model.node(node).input(0)) else { return };
        for output in self.model.node(node).outputs().iter().flatten() {
            let [User::Node { node: after, input: 0 }] = self.model.value(*output).users() else { continue };
            if !self.model.node(*after).is("QuantizeLinear") {
                continue;
            }
            let same = [1, 2].iter().all(|&i| {
                let (a, b) = (self.model.constant_input(before, i), self.model.constant_input(*after, i));
                a.map(Tensor::raw) == b.map(Tensor::raw)
            });
            if !same {
                self.found.push(format!("{} has different scales on its two sides", self.label(node)));
            }
        }
    }
}
