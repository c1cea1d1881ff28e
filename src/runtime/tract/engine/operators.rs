//! tract's ONNX registry, with what it lacks or gets wrong.

use std::cell::Cell;
use std::sync::OnceLock;

use tract_core::ops::element_wise::{ElementWiseMiniOp, ElementWiseOp};
#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;
use tract_hir::ops::matmul::MatMulInference;
use tract_onnx::Onnx;
use tract_onnx::model::{OnnxOpRegister, ParsingContext};
use tract_onnx::ops::rec::common::{CommonRec, WireBody};
use tract_onnx::ops::rec::{gru::GRU, lstm::LSTM, rnn::RNN};
use tract_onnx::pb::NodeProto;

use super::super::kernel::{granularity, qparams, quantized_format};
use super::super::quantized::{FAKE_QUANT, FORMAT};
use super::attention;
use super::divide::{self, DIVIDE};
use super::narrow::{self, NARROW};
use super::native::{floats, integers};
use super::operator::{Compute, Operator, rules};
use super::recurrent::{self, Kind};
use super::structural;
use crate::numerics::{Format, Granularity, QParams, dequantize_serial, fake_quantize_serial, pack, quantize_serial};
use crate::onnx::DataType;

pub(super) type Built = TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

/// tract's front end with our operators.
pub(super) fn framework() -> &'static Onnx {
    static FRAMEWORK: OnceLock<Onnx> = OnceLock::new();
    FRAMEWORK.get_or_init(|| {
        let mut onnx = tract_onnx::onnx().with_ignore_value_info(true).with_ignore_output_types(true);
        let ops = &mut onnx.op_register;
        ops.insert(FAKE_QUANT, build_fake_quant);
        ops.insert("QuantizeLinear", build_quantize);
        ops.insert("DequantizeLinear", build_dequantize);
        ops.insert("FusedMatMul", build_fused_matmul);
        ops.insert("Squeeze", build_squeeze);
        ops.insert("LSTM", build_lstm);
        ops.insert("GRU", build_gru);
        ops.insert("RNN", build_rnn);
        ops.insert("Attention", build_attention);
        ops.insert("Cast", build_cast);
        for op in structural::OPERATORS {
            ops.insert(op, |context, node| structural::build(node, context.onnx_operator_set_version));
        }
        ops.insert(DIVIDE, |_, node| divide::build(node));
        ops.insert(NARROW, |_, node| narrow::build(node));
        onnx
    })
}

/// Whether some operator of this name can be built.
pub(crate) fn knows(op: &str) -> bool {
    framework().op_register.0.contains_key(op)
}

fn stock(context: &ParsingContext, node: &NodeProto) -> Built {
    static STOCK: OnceLock<OnnxOpRegister> = OnceLock::new();
    let stock = STOCK.get_or_init(|| tract_onnx::onnx().op_register);
    let build = stock.0.get(&node.op_type).with_context(|| format!("no stock {}", node.op_type))?;
    build(context, node)
}

/// tract asks for `axes`, which opsets before 13 may leave out.
fn build_squeeze(context: &ParsingContext, node: &NodeProto) -> Built {
    let given = node.input.len() > 1 || node.attribute.iter().any(|a| a.name == "axes");
    if given {
        return stock(context, node);
    }
    Ok((expand(tract_hir::ops::array::Squeeze::new(None)), vec![]))
}

/// `Cast` to int64: tract goes to its type of that width by way of 32 bits.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CastLong;

fn build_cast(context: &ParsingContext, node: &NodeProto) -> Built {
    let long = node.get_attr::<i64>("to")? == i64::from(DataType::Int64.code());
    if long { Ok((expand(CastLong), vec![])) } else { stock(context, node) }
}

impl Expansion for CastLong {
    fn name(&self) -> StaticName {
        "Cast".into()
    }

    rules!(self, s, inputs: 1, outputs: 1 => {
        s.equals(&outputs[0].datum_type, TDim::datum_type())?;
        s.equals(&outputs[0].shape, &inputs[0].shape)
    });

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        if model.outlet_fact(inputs[0])?.datum_type.is_tdim() {
            return model.wire_node(prefix, tract_core::ops::cast::cast(TDim::datum_type()), inputs);
        }
        model.wire_node(prefix, Operator(self.clone()), inputs)
    }
}

impl Compute for CastLong {
    fn name(&self) -> StaticName {
        "Cast".into()
    }

    fn facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(TDim::datum_type().fact(inputs[0].shape.clone())))
    }

    fn compute(&self, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let mut output = Tensor::zero::<TDim>(input.shape())?;
        let mut plain = output.try_as_plain_ram_mut()?;
        for (slot, value) in plain.as_slice_mut::<TDim>()?.iter_mut().zip(integers(&input)?) {
            *slot = value.into();
        }
        Ok(tvec!(output.into_tvalue()))
    }
}

fn build_attention(context: &ParsingContext, node: &NodeProto) -> Built {
    if attention::is_plain(node)? { stock(context, node) } else { attention::build(node) }
}

// --- FusedMatMul

#[derive(Clone, Debug)]
struct FusedMatMul {
    alpha: f32,
    transposed: [bool; 2],
}

fn build_fused_matmul(_context: &ParsingContext, node: &NodeProto) -> Built {
    for name in ["transBatchA", "transBatchB"] {
        ensure!(node.get_attr_opt::<i64>(name)?.unwrap_or(0) == 0, "FusedMatMul with {name}");
    }
    let transposed = |name: &str| -> TractResult<bool> { Ok(node.get_attr_opt::<i64>(name)?.unwrap_or(0) != 0) };
    let op = FusedMatMul {
        alpha: node.get_attr_opt("alpha")?.unwrap_or(1.),
        transposed: [transposed("transA")?, transposed("transB")?],
    };
    Ok((expand(op), vec![]))
}

impl FusedMatMul {
    fn product(&self) -> MatMulInference {
        MatMulInference::default().with_a_trans(self.transposed[0]).with_b_trans(self.transposed[1])
    }
}

impl Expansion for FusedMatMul {
    fn name(&self) -> StaticName {
        "FusedMatMul".into()
    }

    rules!(self, s, inputs: 2, outputs: 1 => {
        s.equals(&inputs[0].datum_type, &inputs[1].datum_type)?;
        s.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
        let [a, b] = self.transposed;
        s.given_2(&inputs[0].shape, &inputs[1].shape, move |s, left, right| {
            let (_, _, _, shape) = tract_hir::ops::matmul::compute_shapes(left, right, a, b, false)?;
            s.equals(&outputs[0].shape, shape)
        })
    });

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let product = self.product().wire(&format!("{prefix}.product"), model, inputs)?;
        let rank = model.outlet_fact(product[0])?.rank();
        let alpha = model.add_const(format!("{prefix}.alpha"), tensor0(self.alpha).broadcast_into_rank(rank)?)?;
        model.wire_node(prefix, tract_core::ops::math::mul(), &[product[0], alpha])
    }
}

// --- Recurrent operators: tract reads `reverse` as forward, and breaks on larger batches without an initial state.

#[derive(Clone, Debug)]
struct Recurrent {
    common: CommonRec,
    reverse: bool,
}

fn build_recurrent(node: &NodeProto, body: Box<dyn WireBody>) -> Built {
    let common = CommonRec::from_node_and_options(node, 3, 0, body)?;
    let reverse = node.get_attr_opt::<String>("direction")?.is_some_and(|d| d == "reverse");
    Ok((expand(Recurrent { common, reverse }), vec![]))
}

fn build_lstm(_context: &ParsingContext, node: &NodeProto) -> Built {
    if recurrent::is_unusual(node, Kind::Lstm)? {
        return recurrent::build(node, Kind::Lstm);
    }
    let tanh = || Box::new(tract_hir::ops::math::tanh());
    build_recurrent(node, Box::new(LSTM { f: Box::new(tract_hir::ops::nn::sigmoid()), g: tanh(), h: tanh() }))
}

fn build_gru(_context: &ParsingContext, node: &NodeProto) -> Built {
    if recurrent::is_unusual(node, Kind::Gru)? {
        return recurrent::build(node, Kind::Gru);
    }
    let linear = node.get_attr_opt::<i64>("linear_before_reset")?.unwrap_or(0) != 0;
    let body = GRU {
        f: Box::new(tract_hir::ops::nn::sigmoid()),
        g: Box::new(tract_hir::ops::math::tanh()),
        linear_before_reset: linear,
    };
    build_recurrent(node, Box::new(body))
}

fn build_rnn(_context: &ParsingContext, node: &NodeProto) -> Built {
    if recurrent::is_unusual(node, Kind::Rnn)? {
        return recurrent::build(node, Kind::Rnn);
    }
    let tanh = || Box::new(tract_hir::ops::math::tanh());
    build_recurrent(node, Box::new(RNN { fore: tanh(), back: tanh() }))
}

impl Expansion for Recurrent {
    fn name(&self) -> StaticName {
        self.common.name()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        self.common.nboutputs()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        self.common.rules(s, inputs, outputs)
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let mut common = self.common.clone();
        let mut inputs: TVec<OutletId> = inputs.into();
        let (time, batch) = if common.batch_first { (1, 0) } else { (0, 1) };
        let x = model.outlet_fact(inputs[0])?.clone();
        let r = model.outlet_fact(inputs[2])?.clone();
        let (batches, directions, hidden) =
            (x.shape[batch].to_usize()?, r.shape[0].to_usize()?, r.shape[2].to_usize()?);
        let shape = if common.batch_first { [batches, directions, hidden] } else { [directions, batches, hidden] };
        let mut zeros = |name: &str, slot: &mut Option<usize>| -> TractResult<()> {
            if slot.is_none() {
                inputs.push(model.wire_node(format!("{prefix}.{name}"), Operator(Zeros(shape)), &[])?[0]);
                *slot = Some(inputs.len() - 1);
            }
            Ok(())
        };
        zeros("zero_h", &mut common.optional_initial_h_input)?;
        if common.body.have_extra_c_state() {
            zeros("zero_c", &mut common.optional_initial_c_input)?;
        }
        if !self.reverse {
            return common.wire(prefix, model, &inputs);
        }
        inputs[0] = model.wire_node(format!("{prefix}.reversed"), Operator(Reverse(time)), &[inputs[0]])?[0];
        let mut outputs = common.wire(&format!("{prefix}.forward"), model, &inputs)?;
        if let Some(y) = common.optional_y_output {
            outputs[y] = model.wire_node(format!("{prefix}.y"), Operator(Reverse(time)), &[outputs[y]])?[0];
        }
        Ok(outputs)
    }
}

/// An initial state of zeros that tract does not see through: it breaks on uniform constants here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Zeros([usize; 3]);

impl Compute for Zeros {
    const FOLDS: bool = false;

    fn name(&self) -> StaticName {
        "Zeros".into()
    }

    fn facts(&self, _inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(f32::fact(self.0)))
    }

    fn compute(&self, _inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        Ok(tvec!(Tensor::zero::<f32>(&self.0)?.into_tvalue()))
    }
}

/// Turns an axis around.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reverse(usize);

impl Compute for Reverse {
    fn name(&self) -> StaticName {
        "Reverse".into()
    }

    fn facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(inputs[0].without_value()))
    }

    fn compute(&self, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let len = input.shape()[self.0];
        let slices = (0..len).rev().map(|at| input.slice(self.0, at, at + 1)).collect::<TractResult<Vec<_>>>()?;
        Ok(tvec!(Tensor::stack_tensors(self.0, &slices)?.into_tvalue()))
    }
}

// --- Fake quant

#[derive(Clone, Debug, PartialEq)]
struct FakeQuant {
    qparams: QParams,
    axis: i64,
    block: i64,
    format: Format,
}

impl Eq for FakeQuant {}

fn build_fake_quant(_context: &ParsingContext, node: &NodeProto) -> Built {
    let format = DataType::from_code(node.get_attr::<i64>("format")? as i32);
    let Some(format) = format.and_then(quantized_format) else { bail!("fake quant to {format:?}") };
    let zero_points = node.get_attr_tvec::<f32>("zero")?.iter().map(|&v| v as i32).collect();
    let qparams = qparams(node.get_attr_tvec("scale")?.to_vec(), zero_points);
    let op = FakeQuant { qparams, axis: node.get_attr("axis")?, block: node.get_attr("block")?, format };
    Ok((expand(op), vec![]))
}

thread_local! {
    static BYPASS: Cell<bool> = const { Cell::new(false) };
}

/// Calls `run` with every fake quant of this thread letting its input through.
pub(crate) fn without_fake_quant<T>(run: impl FnOnce() -> T) -> T {
    let outer = BYPASS.replace(true);
    let result = run();
    BYPASS.set(outer);
    result
}

impl FakeQuant {
    fn apply(&self, array: &mut Tensor) -> TractResult<()> {
        if BYPASS.get() {
            return Ok(());
        }
        let dims = array.shape().to_vec();
        let granularity = spread(&dims, &self.qparams, self.axis, self.block)?;
        let mut plain = array.try_as_plain_ram_mut()?;
        fake_quantize_serial(plain.as_slice_mut::<f32>()?, &dims, &granularity, &self.qparams, self.format)
            .map_err(|e| format_err!("{}", e.message()))
    }
}

fn spread(shape: &[usize], qparams: &QParams, axis: i64, block: i64) -> TractResult<Granularity> {
    granularity(shape, qparams.scales.len(), axis, block).map_err(|e| format_err!("{e}"))
}

impl Expansion for FakeQuant {
    fn name(&self) -> StaticName {
        "FakeQuant".into()
    }

    rules!(self, s, inputs: 1, outputs: 1 => {
        s.equals(&outputs[0].datum_type, f32::datum_type())?;
        s.equals(&inputs[0].datum_type, f32::datum_type())?;
        s.equals(&inputs[0].shape, &outputs[0].shape)
    });

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        // One scale for all is elementwise to tract: any layout will do, and the buffer is reused.
        if self.qparams.scales.len() == 1 {
            return model.wire_node(prefix, ElementWiseOp(Box::new(self.clone()), None), inputs);
        }
        model.wire_node(prefix, Operator(self.clone()), inputs)
    }
}

impl ElementWiseMiniOp for FakeQuant {
    fn name(&self) -> String {
        "FakeQuant".to_owned()
    }

    fn eval_in_place(&self, array: &mut Tensor, _out: Option<DatumType>) -> TractResult<()> {
        self.apply(array)
    }
}

impl Compute for FakeQuant {
    fn name(&self) -> StaticName {
        "FakeQuant".into()
    }

    fn facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(inputs[0].without_value()))
    }

    fn compute(&self, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let mut array = args_1!(inputs).into_tensor();
        self.apply(&mut array)?;
        Ok(tvec!(array.into_tvalue()))
    }
}

// --- Quantize and dequantize apart, with parameters that may be computed at run time

#[derive(Clone, Debug, PartialEq, Eq)]
struct Convert {
    quantize: bool,
    has_zero: bool,
    axis: i64,
    block: i64,
    format: Option<DataType>,
    saturate: bool,
}

fn build_convert(node: &NodeProto, quantize: bool) -> Built {
    let has_zero = node.input.len() > 2 && !node.input[2].is_empty();
    let mut format = node.get_attr_opt::<i64>(FORMAT)?;
    if format.is_none() && quantize && !has_zero {
        format = node.get_attr_opt::<i64>("output_dtype")?.filter(|&c| c != 0).or(Some(DataType::Uint8.code().into()));
    }
    let op = Convert {
        quantize,
        has_zero,
        axis: node.get_attr_opt("axis")?.unwrap_or(1),
        block: node.get_attr_opt("block_size")?.unwrap_or(0),
        format: format.and_then(|code| DataType::from_code(code as i32)),
        saturate: node.get_attr_opt::<i64>("saturate")?.unwrap_or(1) != 0,
    };
    Ok((expand(op), vec![]))
}

fn build_quantize(_context: &ParsingContext, node: &NodeProto) -> Built {
    build_convert(node, true)
}

fn build_dequantize(_context: &ParsingContext, node: &NodeProto) -> Built {
    build_convert(node, false)
}

impl Convert {
    fn output_type(&self, zero: Option<DatumType>) -> TractResult<DatumType> {
        if !self.quantize {
            return Ok(DatumType::F32);
        }
        let format = self.format.and_then(super::tensors::datum_type);
        format.or(zero).with_context(|| "quantizes to a type that is not known")
    }

    fn output_format(&self, output: DatumType) -> TractResult<Format> {
        let format = self.format.and_then(quantized_format).or_else(|| stored(output));
        match format.filter(|&format| format != Format::Int32) {
            Some(format) => Ok(format),
            None => bail!("quantizes to {output:?}"),
        }
    }
}

/// The format of the elements of an array, sub-byte integers being one to a byte.
fn stored(dtype: DatumType) -> Option<Format> {
    Some(match dtype {
        DatumType::U8 => Format::Uint8,
        DatumType::I8 => Format::Int8,
        DatumType::U16 => Format::Uint16,
        DatumType::I16 => Format::Int16,
        DatumType::I32 => Format::Int32,
        _ => return None,
    })
}

/// The scale of each element.
fn scales(shape: &[usize], granularity: &Granularity, qparams: &QParams) -> crate::Result<Vec<f32>> {
    let unscaled = vec![1u8; shape.iter().product()];
    let qparams = QParams { scales: qparams.scales.clone(), zero_points: vec![0; qparams.scales.len()] };
    dequantize_serial(&unscaled, Format::Uint8, shape, granularity, &qparams)
}

impl Expansion for Convert {
    fn name(&self) -> StaticName {
        if self.quantize { "Quantize".into() } else { "Dequantize".into() }
    }

    rules!(self, s, inputs: 2 + usize::from(self.has_zero), outputs: 1 => {
        if !self.quantize || self.format.is_some() {
            s.equals(&outputs[0].datum_type, self.output_type(None)?)?;
        } else if self.has_zero {
            s.equals(&outputs[0].datum_type, &inputs[2].datum_type)?;
        }
        s.equals(&inputs[0].shape, &outputs[0].shape)
    });

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, Operator(self.clone()), inputs)
    }
}

impl Compute for Convert {
    fn name(&self) -> StaticName {
        Expansion::name(self)
    }

    fn facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.output_type(inputs.get(2).map(|f| f.datum_type))?.fact(inputs[0].shape.clone())))
    }

    fn compute(&self, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let zero_points = inputs.get(2).map(|z| floats(z)).transpose()?.unwrap_or_default();
        let qparams = qparams(floats(&inputs[1])?, zero_points.into_iter().map(|v| v as i32).collect());
        let shape = inputs[0].shape();
        let granularity = spread(shape, &qparams, self.axis, self.block)?;
        let refused = |e: crate::Error| format_err!("{}", e.message());
        if !self.quantize {
            let dtype = inputs[0].datum_type();
            if let Some(format) = self.format.and_then(DataType::format).filter(|f| !f.is_integer()) {
                let codes: Vec<u8> = floats(&inputs[0])?.into_iter().map(|v| format.encode(v) as u8).collect();
                let packed = pack::pack_bytes(&codes, format.bits());
                let values = dequantize_serial(&packed, format, shape, &granularity, &qparams).map_err(refused)?;
                return Ok(tvec!(Tensor::from_shape(shape, &values)?.into_tvalue()));
            }
            let format = stored(dtype).with_context(|| format!("dequantizes {dtype:?}"))?;
            let plain = inputs[0].try_as_plain_ram()?;
            let values = dequantize_serial(plain.as_bytes(), format, shape, &granularity, &qparams).map_err(refused)?;
            return Ok(tvec!(Tensor::from_shape(shape, &values)?.into_tvalue()));
        }
        let output = self.output_type(inputs.get(2).map(|z| z.datum_type()))?;
        let format = self.output_format(output)?;
        let values = floats(&inputs[0])?;
        if !self.saturate && !format.is_integer() {
            let scales: Vec<f32> = scales(shape, &granularity, &qparams).map_err(refused)?;
            let quotients = values.iter().zip(&scales).map(|(x, scale)| narrow::round(x / scale, format, false));
            return Ok(tvec!(Tensor::from_shape(shape, &quotients.collect::<Vec<_>>())?.into_tvalue()));
        }
        let codes = quantize_serial(&values, shape, &granularity, &qparams, format).map_err(refused)?;
        if !format.is_integer() {
            let values: Vec<f32> = codes.into_iter().map(|code| format.decode(code)).collect();
            return Ok(tvec!(Tensor::from_shape(shape, &values)?.into_tvalue()));
        }
        let codes = Tensor::from_shape(shape, &codes)?.cast_to_dt(output)?.into_owned();
        Ok(tvec!(codes.into_tvalue()))
    }
}
