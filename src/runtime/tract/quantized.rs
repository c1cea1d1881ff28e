//! Quantized operators become float operators between quantize and dequantize steps.
//!
//! - `QLinear…`, `…Integer` and the com.microsoft forms: inputs dequantized, the float operator, the output quantized.
//!   Accumulation is in f32, so sums above 2^24 round where the integer operator would be exact.
//! - `DequantizeLinear` of a constant becomes a packed constant.
//! - A `DequantizeLinear` that undoes a `QuantizeLinear` becomes one fake quant, and no integer tensor exists.

use std::collections::{BTreeMap, BTreeSet};

use super::constant::{Blocks, Constant, Dequantized};
use super::engine::NARROW;
use super::kernel::quantized_format;
use super::program::{Program, Step, floats, is_default, node};
use super::widen::is_narrow;
use crate::error::Result;
use crate::ir::view::{GatherBlockQuantized, Gemm, MatMulNBits, Quantizer};
use crate::ir::{Attr, Tensor};
use crate::numerics::{Format, bias_scale};
use crate::onnx::{AttributeProto, DataType};

/// The operator that quantizes and dequantizes in one: attributes `scale`, `zero`, `axis`, `block`, `format`.
pub(super) const FAKE_QUANT: &str = "amax.FakeQuant";
/// Attribute of a `QuantizeLinear` step that holds its format.
pub(super) const FORMAT: &str = "amax.format";

/// Lowers every step of the main graph.
///
/// # Errors
/// Quantized operators in a form that has no float equivalent here.
pub(super) fn lower(program: &mut Program) -> Result<()> {
    narrow_types(program);
    let mut out = Vec::with_capacity(program.steps.len());
    for step in std::mem::take(&mut program.steps) {
        let mut emit = Emit { program, step: &step, out: &mut out };
        if !emit.lower()? {
            out.push(step);
        }
    }
    program.steps = out;
    decode_constants(program);
    fuse_pairs(program);
    name_formats(program)
}

struct Emit<'a> {
    program: &'a mut Program,
    step: &'a Step,
    out: &'a mut Vec<Step>,
}

/// A quantized operand: names of data, scale and zero point.
#[derive(Clone, Copy)]
struct Operand<'a> {
    data: &'a str,
    scale: &'a str,
    zero: Option<&'a str>,
}

impl<'a> Emit<'a> {
    /// Whether the step was one to lower.
    fn lower(&mut self) -> Result<bool> {
        let step = self.step;
        let ms = step.domain() == "com.microsoft";
        if !ms && !is_default(step.domain()) {
            return Ok(false);
        }
        match (ms, step.op()) {
            (_, "QLinearConv") => self.conv()?,
            (_, "QLinearMatMul") => self.matmul()?,
            (_, "ConvInteger") => self.integer("Conv", [1, 0])?,
            (_, "MatMulInteger") => self.integer("MatMul", [-2, -1])?,
            (true, "QuantizeLinear" | "DequantizeLinear") => {
                let mut same = step.clone();
                same.node.domain = None;
                self.out.push(same);
            }
            (true, "QLinearAdd") => self.binary("Add")?,
            (true, "QLinearMul") => self.binary("Mul")?,
            (true, "QLinearSigmoid") => self.unary("Sigmoid", &[])?,
            (true, "QLinearLeakyRelu") => self.unary("LeakyRelu", &["alpha"])?,
            (true, "QLinearSoftmax") => {
                // What `axis` means changed with opset 13; the node says which one it follows.
                let opset = step.int("opset").unwrap_or(step.opset);
                Emit { program: self.program, step: &Step { opset, ..step.clone() }, out: self.out }
                    .unary("Softmax", &["axis"])?;
            }
            (true, "QLinearGlobalAveragePool" | "QLinearAveragePool") => self.pool()?,
            (true, "QLinearConcat") => self.concat()?,
            (true, "QGemm") => self.gemm()?,
            (true, "MatMulIntegerToFloat") => self.matmul_to_float()?,
            (true, "DynamicQuantizeMatMul") => self.dynamic_matmul()?,
            (true, "MatMulNBits") => return self.blocks(),
            (true, "DynamicQuantizeLSTM") => self.lstm()?,
            (true, "GatherBlockQuantized") => return self.gather(),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn need(&self, index: usize) -> Result<&'a str> {
        self.step.input(index).ok_or_else(|| self.step.refuse(format!("input {index} is missing")))
    }

    fn operand(&self, data: usize, scale: usize, zero: usize) -> Result<Operand<'a>> {
        Ok(Operand { data: self.need(data)?, scale: self.need(scale)?, zero: self.step.input(zero) })
    }

    fn push(&mut self, op: &str, inputs: &[&str], outputs: &[&str], attrs: Vec<AttributeProto>) {
        self.out.push(self.step.derive(node(op, inputs, outputs, attrs)));
    }

    /// Runs `op` into a fresh tensor named after the step's output.
    fn make(&mut self, op: &str, inputs: &[&str], attrs: Vec<AttributeProto>) -> String {
        let name = self.program.fresh(&format!("{}/{op}", self.step.output(0).unwrap_or("")));
        self.push(op, inputs, &[&name], attrs);
        name
    }

    fn dequantize(&mut self, x: Operand<'_>, axis: i64) -> String {
        let attrs = vec![Attr::int("axis", axis)];
        match x.zero {
            Some(zero) => self.make("DequantizeLinear", &[x.data, x.scale, zero], attrs),
            None => self.make("DequantizeLinear", &[x.data, x.scale], attrs),
        }
    }

    /// Quantizes into the step's output.
    fn quantize(&mut self, x: &str, scale: &str, zero: Option<&str>) {
        let output = self.step.output(0).unwrap_or_default();
        let inputs: Vec<&str> = [Some(x), Some(scale), zero].into_iter().flatten().collect();
        self.push("QuantizeLinear", &inputs, &[output], Vec::new());
    }

    fn attrs(&self, dropped: &[&str]) -> Vec<AttributeProto> {
        let keep = |a: &&AttributeProto| !dropped.contains(&a.name.as_deref().unwrap_or(""));
        self.step.node.attribute.iter().filter(keep).cloned().collect()
    }

    fn only(&self, kept: &[&str]) -> Vec<AttributeProto> {
        let keep = |a: &&AttributeProto| kept.contains(&a.name.as_deref().unwrap_or(""));
        self.step.node.attribute.iter().filter(keep).cloned().collect()
    }

    /// A 32-bit bias, scaled by the product of the scales of what is multiplied.
    fn bias(&mut self, bias: &str, input: &str, weight: &str) -> Result<String> {
        let fail = || self.step.refuse("its bias or the scales that give the bias its scale are not constant");
        let data = self.program.tensor(bias).cloned().ok_or_else(fail)?;
        let scale = |name: &str| self.program.constants.get(name).and_then(|c| c.values().ok());
        let (input, weight) = (scale(input).ok_or_else(fail)?, scale(weight).ok_or_else(fail)?);
        let &[input] = input.as_slice() else { return Err(fail()) };
        let scale: Vec<f32> = weight.iter().map(|&w| bias_scale(input, w)).collect();
        let packed = Dequantized {
            data,
            scale: Constant::Plain(Tensor::from_f32(&[scale.len()], &scale)),
            zero: None,
            default_zero: 0,
            axis: 0,
            block: 0,
        };
        Ok(self.program.add_constant(&format!("{bias}/float"), Constant::Dequantized(Box::new(packed))))
    }

    fn conv(&mut self) -> Result<()> {
        let (x, w) = (self.operand(0, 1, 2)?, self.operand(3, 4, 5)?);
        let mut inputs = vec![self.dequantize(x, 1), self.dequantize(w, 0)];
        if let Some(bias) = self.step.input(8) {
            inputs.push(self.bias(bias, x.scale, w.scale)?);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let y = self.make("Conv", &inputs, self.attrs(&[]));
        let (scale, zero) = (self.need(6)?, self.step.input(7));
        self.quantize(&y, scale, zero);
        Ok(())
    }

    fn matmul(&mut self) -> Result<()> {
        let (a, b) = (self.operand(0, 1, 2)?, self.operand(3, 4, 5)?);
        let (a, b) = (self.dequantize(a, -2), self.dequantize(b, -1));
        let y = self.make("MatMul", &[&a, &b], Vec::new());
        let (scale, zero) = (self.need(6)?, self.step.input(7));
        self.quantize(&y, scale, zero);
        Ok(())
    }

    /// `ConvInteger`, `MatMulInteger`: unit scales, and a 32-bit result.
    fn integer(&mut self, op: &str, axes: [i64; 2]) -> Result<()> {
        let one = self.program.add_constant("one", Constant::Plain(Tensor::from_f32(&[], &[1.])));
        let mut inputs = Vec::new();
        for (index, axis) in axes.into_iter().enumerate() {
            let x = Operand { data: self.need(index)?, scale: &one, zero: self.step.input(index + 2) };
            inputs.push(self.dequantize(x, axis));
        }
        let y = self.make(op, &[&inputs[0], &inputs[1]], self.attrs(&[]));
        let output = self.step.output(0).unwrap_or_default();
        self.push("Cast", &[&y], &[output], vec![Attr::int("to", DataType::Int32.code().into())]);
        Ok(())
    }

    fn binary(&mut self, op: &str) -> Result<()> {
        let (a, b) = (self.operand(0, 1, 2)?, self.operand(3, 4, 5)?);
        let (a, b) = (self.dequantize(a, 1), self.dequantize(b, 1));
        let y = self.make(op, &[&a, &b], Vec::new());
        let (scale, zero) = (self.need(6)?, self.step.input(7));
        self.quantize(&y, scale, zero);
        Ok(())
    }

    fn unary(&mut self, op: &str, kept: &[&str]) -> Result<()> {
        let x = self.operand(0, 1, 2)?;
        let x = self.dequantize(x, 1);
        let y = self.make(op, &[&x], self.only(kept));
        let (scale, zero) = (self.need(3)?, self.step.input(4));
        self.quantize(&y, scale, zero);
        Ok(())
    }

    fn pool(&mut self) -> Result<()> {
        if self.step.int("channels_last").unwrap_or(0) != 0 {
            return Err(self.step.refuse("pooling with channels last"));
        }
        let x = self.operand(0, 1, 2)?;
        let x = self.dequantize(x, 1);
        let op = self.step.op().trim_start_matches("QLinear").to_owned();
        let y = self.make(&op, &[&x], self.attrs(&["channels_last"]));
        let (scale, zero) = (self.need(3)?, self.step.input(4));
        self.quantize(&y, scale, zero);
        Ok(())
    }

    fn concat(&mut self) -> Result<()> {
        let mut inputs = Vec::new();
        for at in (2..self.step.node.input.len()).step_by(3) {
            let x = self.operand(at, at + 1, at + 2)?;
            inputs.push(self.dequantize(x, 1));
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let y = self.make("Concat", &inputs, self.attrs(&[]));
        let (scale, zero) = (self.need(0)?, self.step.input(1));
        self.quantize(&y, scale, zero);
        Ok(())
    }

    fn gemm(&mut self) -> Result<()> {
        let (a, b) = (self.operand(0, 1, 2)?, self.operand(3, 4, 5)?);
        let column = i64::from(Gemm::of(&self.step.node).is_none_or(|gemm| !gemm.trans_b));
        let alpha = Gemm::of(&self.step.node).unwrap_or_default().alpha;
        let (fa, fb) = (self.dequantize(a, 0), self.dequantize(b, column));
        let mut inputs = vec![fa, fb];
        if let Some(bias) = self.step.input(6) {
            if (alpha - 1.).abs() > 0. {
                return Err(self.step.refuse("a bias together with alpha other than 1"));
            }
            inputs.push(self.bias(bias, a.scale, b.scale)?);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attrs = self.only(&["alpha", "transA", "transB"]);
        if let Some(scale) = self.step.input(7) {
            let y = self.make("Gemm", &inputs, attrs);
            self.quantize(&y, scale, self.step.input(8));
        } else {
            self.push("Gemm", &inputs, &[self.step.output(0).unwrap_or_default()], attrs);
        }
        Ok(())
    }

    fn matmul_to_float(&mut self) -> Result<()> {
        let (a, b) = (self.operand(0, 2, 4)?, self.operand(1, 3, 5)?);
        let (a, b) = (self.dequantize(a, -2), self.dequantize(b, -1));
        self.matmul_with_bias(&a, &b, self.step.input(6));
        Ok(())
    }

    fn dynamic_matmul(&mut self) -> Result<()> {
        let base = self.step.output(0).unwrap_or_default().to_owned();
        let names: Vec<String> =
            ["data", "scale", "zero"].iter().map(|n| self.program.fresh(&format!("{base}/{n}"))).collect();
        let [data, scale, zero] = [&names[0], &names[1], &names[2]].map(String::as_str);
        self.push("DynamicQuantizeLinear", &[self.need(0)?], &[data, scale, zero], Vec::new());
        let a = self.dequantize(Operand { data, scale, zero: Some(zero) }, 1);
        let b = self.operand(1, 2, 3)?;
        let b = self.dequantize(b, -1);
        self.matmul_with_bias(&a, &b, self.step.input(4));
        Ok(())
    }

    /// An LSTM of dequantized weights and input. The kernel quantizes its hidden state too, which is not done here.
    fn lstm(&mut self) -> Result<()> {
        let base = self.step.output(0).or(self.step.output(1)).unwrap_or_default().to_owned();
        let names: Vec<String> =
            ["data", "scale", "zero"].iter().map(|n| self.program.fresh(&format!("{base}/{n}"))).collect();
        let [data, scale, zero] = [&names[0], &names[1], &names[2]].map(String::as_str);
        self.push("DynamicQuantizeLinear", &[self.need(0)?], &[data, scale, zero], Vec::new());
        let x = self.dequantize(Operand { data, scale, zero: Some(zero) }, 1);
        let weights = [self.gates(1, 8)?, self.gates(2, 10)?];
        let others = (3..8).map(|index| self.step.input(index).unwrap_or(""));
        let inputs: Vec<&str> = [x.as_str(), &weights[0], &weights[1]].into_iter().chain(others).collect();
        let outputs: Vec<&str> = self.step.node.output.iter().map(String::as_str).collect();
        self.push("LSTM", &inputs, &outputs, self.attrs(&[]));
        Ok(())
    }

    /// A weight of a `DynamicQuantizeLSTM` as an LSTM has it.
    fn gates(&mut self, codes: usize, scales: usize) -> Result<String> {
        let name = self.need(codes)?;
        let constant = |index: usize| self.step.input(index).and_then(|n| self.program.tensor(n)).cloned();
        let refuse = || self.step.refuse("its weights, their scales or zero points are not constant, or do not fit");
        let (Some(data), Some(scale)) = (constant(codes), constant(scales)) else { return Err(refuse()) };
        let zeros = match (self.step.input(scales + 1), constant(scales + 1)) {
            (None, _) => None,
            (Some(_), Some(zero)) => Some(zero.raw().to_vec()),
            (Some(_), None) => return Err(refuse()),
        };
        let (dims, steps) = (data.dims(), scale.to_f32().ok_or_else(refuse)?);
        let &[directions, columns, rows] = dims.as_slice() else { return Err(refuse()) };
        let each = steps.len() / directions.max(1);
        let fits = (each == 1 || each == rows) && steps.len() == each * directions;
        if !fits || zeros.as_ref().is_some_and(|z| z.len() != steps.len()) {
            return Err(refuse());
        }
        let signed = data.dtype() == DataType::Int8;
        let number = |byte: u8| if signed { f32::from(byte as i8) } else { f32::from(byte) };
        let raw = data.raw();
        let mut values = Vec::with_capacity(raw.len());
        for direction in 0..directions {
            for row in 0..rows {
                let entry = direction * each + if each == 1 { 0 } else { row };
                let zero = zeros.as_ref().map_or(0.0, |z| number(z[entry]));
                let at = |column: usize| (direction * columns + column) * rows + row;
                values.extend((0..columns).map(|column| (number(raw[at(column)]) - zero) * steps[entry]));
            }
        }
        let tensor = Tensor::from_f32(&[directions, rows, columns], &values);
        Ok(self.program.add_constant(&format!("{name}/float"), Constant::Plain(tensor)))
    }

    fn matmul_with_bias(&mut self, a: &str, b: &str, bias: Option<&str>) {
        let output = self.step.output(0).unwrap_or_default();
        if let Some(bias) = bias {
            let y = self.make("MatMul", &[a, b], Vec::new());
            self.push("Add", &[&y, bias], &[output], Vec::new());
        } else {
            self.push("MatMul", &[a, b], &[output], Vec::new());
        }
    }

    fn blocks(&mut self) -> Result<bool> {
        let Some(MatMulNBits { k: Some(depth), n: Some(rows), bits, block_size: Some(block) }) =
            MatMulNBits::of(&self.step.node)
        else {
            return Err(self.step.refuse("K, N or block_size is missing or not positive"));
        };
        if !matches!(bits, 2 | 4 | 8) || self.step.input(4).is_some() {
            return Err(self.step.refuse(format!("{bits}-bit blocks of {block}, or reordered groups")));
        }
        let constant = |index: usize| self.step.input(index).and_then(|n| self.program.tensor(n)).cloned();
        let (Some(data), Some(scale)) = (constant(1), constant(2)) else {
            return Err(self.step.refuse("its weight is not constant"));
        };
        let zero = constant(3);
        if self.step.input(3).is_some() && zero.is_none() {
            return Err(self.step.refuse("its zero points are not constant"));
        }
        let blocks = Blocks { data, scale, zero, shape: [depth, rows], block, bits: bits as usize };
        let name = format!("{}/float", self.need(1)?);
        let weight = self.program.add_constant(&name, Constant::Blocks(Box::new(blocks)));
        self.matmul_with_bias(self.need(0)?, &weight, self.step.input(5));
        Ok(true)
    }

    fn gather(&mut self) -> Result<bool> {
        let constant = |index: usize| self.step.input(index).and_then(|n| self.program.tensor(n)).cloned();
        let (Some(mut data), Some(scale)) = (constant(0), constant(2)) else {
            return Err(self.step.refuse("its data is not constant"));
        };
        let mut zero = constant(3);
        if self.step.input(3).is_some() && zero.is_none() {
            return Err(self.step.refuse("its zero points are not constant"));
        }
        let Some(GatherBlockQuantized { gather_axis, quantize_axis, block_size, bits }) =
            GatherBlockQuantized::of(&self.step.node)
        else {
            return Ok(false);
        };
        let mut default_zero = 0;
        if data.dtype() == DataType::Uint8 {
            default_zero = if bits == 4 { 8 } else { 128 };
            if bits == 4 {
                // Bytes hold pairs along the last axis, which is what a uint4 tensor of twice the width is.
                let wide = |tensor: &Tensor| {
                    let mut dims = tensor.dims();
                    if let Some(last) = dims.last_mut() {
                        *last *= 2;
                    }
                    Tensor::new(DataType::Uint4, &dims, tensor.raw())
                };
                zero = zero.as_ref().map(wide);
                data = wide(&data);
            }
        }
        let scale = Constant::Plain(scale);
        let packed = Dequantized { data, scale, zero, default_zero, axis: quantize_axis, block: block_size };
        let name = format!("{}/float", self.need(0)?);
        let table = self.program.add_constant(&name, Constant::Dequantized(Box::new(packed)));
        let axis = Attr::int("axis", gather_axis);
        self.push("Gather", &[&table, self.need(1)?], &[self.step.output(0).unwrap_or_default()], vec![axis]);
        Ok(true)
    }
}

/// Operators whose outputs have the type of their first input.
const CARRIERS: [&str; 18] = [
    "Concat",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "Identity",
    "Pad",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "amax.Reverse",
];

/// Notes the types of tensors that tract is given in another type, and casts to the type of such a tensor.
fn narrow_types(program: &mut Program) {
    let mut types: BTreeMap<String, DataType> =
        program.dtypes.iter().filter(|(_, d)| is_narrow(**d)).map(|(n, d)| (n.clone(), *d)).collect();
    types.extend(program.constants.iter().filter_map(|(name, constant)| match constant {
        Constant::Plain(tensor) if is_narrow(tensor.dtype()) => Some((name.clone(), tensor.dtype())),
        _ => None,
    }));
    for step in &mut program.steps {
        let named = |code: Option<i64>| DataType::from_code(i32::try_from(code?).ok()?).filter(|&d| is_narrow(d));
        let of = |index: usize| step.input(index).and_then(|name| types.get(name)).copied();
        let ty = match step.op() {
            NARROW => named(step.int("to")),
            "CastLike" if step.is("CastLike") => of(1),
            "QuantizeLinear" => of(2).or_else(|| named(step.int("output_dtype"))),
            op if CARRIERS.contains(&op) => of(0),
            _ => None,
        };
        let Some(ty) = ty else { continue };
        if step.is("CastLike") {
            step.node.op_type = Some(NARROW.to_owned());
            step.node.input.truncate(1);
            step.node.attribute.push(Attr::int("to", ty.code().into()));
        }
        types.extend(step.node.output.iter().map(|name| (name.clone(), ty)));
    }
    program.dtypes.extend(types);
}

/// Turns `DequantizeLinear` of constants into packed constants.
fn decode_constants(program: &mut Program) {
    let mut kept = Vec::with_capacity(program.steps.len());
    for step in std::mem::take(&mut program.steps) {
        match packed(program, &step) {
            Some((output, constant)) => {
                program.constants.insert(output, constant);
            }
            None => kept.push(step),
        }
    }
    program.steps = kept;
}

fn packed(program: &Program, step: &Step) -> Option<(String, Constant)> {
    if !step.is("DequantizeLinear") {
        return None;
    }
    let data = program.tensor(step.input(0)?)?.clone();
    let scale = program.constants.get(step.input(1)?)?.clone();
    let zero = match step.input(2) {
        Some(name) => Some(program.tensor(name)?.clone()),
        None => None,
    };
    let Quantizer { axis, block_size: block, .. } = Quantizer::of(&step.node)?;
    let packed = Dequantized { data, scale, zero, default_zero: 0, axis, block };
    Some((step.output(0)?.to_owned(), Constant::Dequantized(Box::new(packed))))
}

/// What a `QuantizeLinear` or `DequantizeLinear` with constant parameters does.
#[derive(PartialEq)]
struct Scheme {
    scale: Vec<f32>,
    zero: Vec<f32>,
    axis: i64,
    block: i64,
    format: Option<DataType>,
}

fn scheme(program: &Program, step: &Step) -> Option<Scheme> {
    let scale = program.constants.get(step.input(1)?)?.values().ok()?;
    let (zero, format) = match step.input(2) {
        Some(name) => {
            let zero = program.tensor(name)?;
            (Constant::Plain(zero.clone()).values().ok()?, Some(zero.dtype()))
        }
        None => (Vec::new(), None),
    };
    let zero = if zero.iter().all(|&z| z == 0.) { Vec::new() } else { zero };
    // The axis means nothing where there is one scale for all.
    let one = scale.len() == 1 && zero.len() <= 1;
    let Quantizer { axis, block_size: block, .. } = Quantizer::of(&step.node)?;
    let (axis, block) = if one { (1, 0) } else { (axis, block) };
    Some(Scheme { scale, zero, axis, block, format })
}

/// Format that a `QuantizeLinear` writes: its zero point's, or its `output_dtype`, or uint8. `None` if that is not known
/// before run time.
fn format(program: &Program, step: &Step) -> Option<DataType> {
    if let Some(name) = step.input(2) {
        return program.tensor(name).map(Tensor::dtype).or_else(|| program.dtypes.get(name).copied());
    }
    match step.int("output_dtype") {
        None | Some(0) => Some(DataType::Uint8),
        Some(code) => i32::try_from(code).ok().and_then(DataType::from_code),
    }
}

fn fuse_pairs(program: &mut Program) {
    let quantizes: BTreeMap<String, usize> = program
        .steps
        .iter()
        .enumerate()
        .filter(|(_, s)| s.is("QuantizeLinear"))
        .filter_map(|(at, s)| Some((s.output(0)?.to_owned(), at)))
        .collect();
    let mut made: BTreeMap<usize, String> = BTreeMap::new();
    for at in 0..program.steps.len() {
        let step = &program.steps[at];
        if !step.is("DequantizeLinear") {
            continue;
        }
        let (Some(source), Some(output)) = (step.input(0).and_then(|n| quantizes.get(n)), step.output(0)) else {
            continue;
        };
        let quantize = &program.steps[*source];
        let (Some(x), Some(q), Some(dq)) = (quantize.input(0), scheme(program, quantize), scheme(program, step)) else {
            continue;
        };
        let same = q.scale == dq.scale && q.zero == dq.zero && q.axis == dq.axis && q.block == dq.block;
        let saturates = Quantizer::of(&quantize.node).is_some_and(|q| q.saturate);
        let known = format(program, quantize).filter(|&f| same && quantized_format(f).is_some());
        let Some(format) = known.filter(|f| saturates || f.format().is_some_and(Format::is_integer)) else {
            continue;
        };
        let fused = if let Some(first) = made.get(source) {
            node("Identity", &[first], &[output], Vec::new())
        } else {
            let attrs = vec![
                floats("scale", &q.scale),
                floats("zero", &q.zero),
                Attr::int("axis", q.axis),
                Attr::int("block", q.block),
                Attr::int("format", format.code().into()),
            ];
            node(FAKE_QUANT, &[x], &[output], attrs)
        };
        if fused.op_type() == FAKE_QUANT {
            made.insert(*source, output.to_owned());
        }
        program.steps[at].node = fused;
    }
    let reads = program.reads();
    let dead: BTreeSet<usize> =
        quantizes.iter().filter(|(name, _)| !reads.contains(name.as_str())).map(|(_, &at)| at).collect();
    let mut at = 0;
    program.steps.retain(|_| {
        at += 1;
        !dead.contains(&(at - 1))
    });
}

/// Writes down the format of each `QuantizeLinear` that is left, and of the data of each `DequantizeLinear`.
fn name_formats(program: &mut Program) -> Result<()> {
    for at in 0..program.steps.len() {
        let step = &program.steps[at];
        if step.attr(FORMAT).is_some() {
            continue;
        }
        let format = if step.is("QuantizeLinear") {
            format(program, step)
        } else if step.is("DequantizeLinear") {
            step.input(0).and_then(|name| program.dtypes.get(name)).copied().filter(|&d| is_narrow(d))
        } else {
            None
        };
        let Some(format) = format else { continue };
        if quantized_format(format).is_none() {
            return Err(step.refuse(format!("quantizing to {format} is not implemented")));
        }
        program.steps[at].node.attribute.push(Attr::int(FORMAT, format.code().into()));
    }
    Ok(())
}
