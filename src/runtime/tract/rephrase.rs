//! Operators that others express exactly, or that tract computes wrongly.

use std::collections::BTreeMap;

use super::constant::Constant;
use super::engine::DIVIDE;
use super::program::{Program, Step, is_default, node};
use crate::error::Result;
use crate::ir::{Attr, Tensor};
use crate::onnx::{AttributeProto, DataType};

/// Rewrites every step of the main graph.
///
/// # Errors
/// Forms of these operators that have no equivalent.
pub(super) fn rephrase(program: &mut Program) -> Result<()> {
    let mut readers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let quotients = program.steps.iter().filter(|s| s.op() == "Div").filter_map(|s| s.output(0).map(str::to_owned));
    readers.extend(quotients.map(|name| (name, Vec::new())));
    for step in &program.steps {
        for name in &step.node.input {
            if let Some(ops) = readers.get_mut(name) {
                ops.push(step.op().to_owned());
            }
        }
    }
    let mut out = Vec::with_capacity(program.steps.len());
    for step in std::mem::take(&mut program.steps) {
        let mut emit = Emit { program, step: &step, out: &mut out, readers: &readers };
        if !emit.rephrase()? {
            out.push(step);
        }
    }
    program.steps = out;
    Ok(())
}

struct Emit<'a> {
    program: &'a mut Program,
    step: &'a Step,
    out: &'a mut Vec<Step>,
    /// The operators that read the results of divisions.
    readers: &'a BTreeMap<String, Vec<String>>,
}

impl Emit<'_> {
    /// Whether the step was one to rewrite.
    fn rephrase(&mut self) -> Result<bool> {
        let step = self.step;
        let ms = step.domain() == "com.microsoft";
        if !ms && !is_default(step.domain()) {
            return Ok(false);
        }
        match (ms, step.op()) {
            (false, "Celu") => self.celu()?,
            (false, "Div") => return Ok(self.divide()),
            (false, "Upsample") => self.resize(1)?,
            (false, "Resize") if step.opset < 11 => self.resize(1)?,
            (false, "Resize") => return self.resize_to_whole_size(),
            (false, "RoiAlign") if step.opset < 16 && step.attr("coordinate_transformation_mode").is_none() => {
                let mut same = step.clone();
                same.node.attribute.push(Attr::string("coordinate_transformation_mode", "output_half_pixel"));
                self.out.push(same);
            }
            (false, "BitShift") => return self.bit_shift(),
            (false, "GlobalLpPool") => self.global_lp_pool()?,
            (false, "ReduceLogSumExp") => self.log_sum_exp()?,
            (false, "Softplus") => self.softplus()?,
            (false, "Pad") => return self.pad(),
            (false, "Range") => return self.range(),
            (false, "TopK") if step.opset < 10 => self.top_k()?,
            (false, "SwiGLU") => self.swiglu()?,
            (false, "Compress") => self.compress()?,
            (false, "MaxUnpool") => self.max_unpool()?,
            (false, "LpPool") => self.lp_pool()?,
            (true, "FusedConv") => self.fused_conv()?,
            (true, "FusedGemm") => self.fused_gemm()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// A division that decides about codes is made one; see [`DIVIDE`].
    fn divide(&mut self) -> bool {
        let float = |name: &str| self.program.tensor(name).is_some_and(|t| t.dtype() == DataType::Float);
        let constant = self.step.input(1).is_some_and(float);
        let decides = |op: &str| op == "Round" || (constant && matches!(op, "Add" | "Clip" | "Max" | "Min"));
        if !self.step.output(0).is_some_and(|v| self.readers.get(v).is_some_and(|ops| ops.iter().any(|op| decides(op))))
        {
            return false;
        }
        let mut same = self.step.clone();
        same.node.op_type = Some(DIVIDE.to_owned());
        self.out.push(same);
        true
    }

    fn need(&self, index: usize) -> Result<String> {
        let found = self.step.input(index).map(str::to_owned);
        found.ok_or_else(|| self.step.refuse(format!("input {index} is missing")))
    }

    fn float(&self, name: &str) -> Option<f32> {
        self.step.attr(name)?.f
    }

    fn output(&self) -> String {
        self.step.output(0).unwrap_or_default().to_owned()
    }

    fn scalar(&mut self, value: f32) -> String {
        self.program.add_constant("scalar", Constant::Plain(Tensor::from_f32(&[], &[value])))
    }

    fn push(&mut self, op: &str, inputs: &[&str], output: &str, attrs: Vec<AttributeProto>) {
        self.out.push(self.step.derive(node(op, inputs, &[output], attrs)));
    }

    fn make(&mut self, op: &str, inputs: &[&str], attrs: Vec<AttributeProto>) -> String {
        let name = self.program.fresh(&format!("{}/{op}", self.output()));
        self.push(op, inputs, &name, attrs);
        name
    }

    fn without(&self, dropped: &[&str]) -> Vec<AttributeProto> {
        let keep = |a: &&AttributeProto| !dropped.contains(&a.name.as_deref().unwrap_or(""));
        self.step.node.attribute.iter().filter(keep).cloned().collect()
    }

    /// `alpha · Elu(x / alpha)`: tract forgets the factor.
    fn celu(&mut self) -> Result<()> {
        let (x, alpha) = (self.need(0)?, self.float("alpha").unwrap_or(1.));
        let factor = self.scalar(alpha);
        let scaled = self.make("Div", &[&x, &factor], Vec::new());
        let elu = self.make("Elu", &[&scaled], vec![Attr::float("alpha", 1.)]);
        let output = self.output();
        self.push("Mul", &[&elu, &factor], &output, Vec::new());
        Ok(())
    }

    fn integers(&mut self, values: &[i64]) -> String {
        self.program.add_constant("integers", Constant::Plain(Tensor::from_i64(&[values.len()], values)))
    }

    /// Shifts by more than a number has bits are left to no processor's whim.
    fn bit_shift(&self) -> Result<bool> {
        let (x, by) = (self.need(0)?, self.need(1)?);
        let dtype = self.program.tensor(&x).map(Tensor::dtype).or_else(|| self.program.dtypes.get(&x).copied());
        let bits = dtype.and_then(DataType::bits).unwrap_or(64) as i64;
        match self.program.tensor(&by).and_then(Tensor::to_i64) {
            Some(by) if by.iter().any(|by| !(0..bits).contains(by)) => {
                Err(self.step.refuse(format!("it shifts numbers of {bits} bits by fewer than none or by all of them")))
            }
            _ => Ok(false),
        }
    }

    /// `max(x, 0) + ln(1 + exp(−|x|))`: tract's overflows.
    fn softplus(&mut self) -> Result<()> {
        let x = self.need(0)?;
        let positive = self.make("Relu", &[&x], Vec::new());
        let magnitude = self.make("Abs", &[&x], Vec::new());
        let negative = self.make("Neg", &[&magnitude], Vec::new());
        let power = self.make("Exp", &[&negative], Vec::new());
        let one = self.scalar(1.);
        let sum = self.make("Add", &[&power, &one], Vec::new());
        let log = self.make("Log", &[&sum], Vec::new());
        let output = self.output();
        self.push("Add", &[&positive, &log], &output, Vec::new());
        Ok(())
    }

    /// `ln Σ exp(x − max) + max`: tract's overflows.
    fn log_sum_exp(&mut self) -> Result<()> {
        let mut inputs = self.step.node.input.clone();
        let opset = if inputs.len() > 1 { 18 } else { 11 };
        let mut kept = self.without(&["keepdims"]);
        kept.push(Attr::int("keepdims", 1));
        let reduce = |emit: &mut Self, op: &str, inputs: &[String], attrs: Vec<AttributeProto>| {
            let name = emit.program.fresh(&format!("{}/{op}", emit.output()));
            let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
            emit.out.push(Step { opset, ..emit.step.derive(node(op, &inputs, &[&name], attrs)) });
            name
        };
        let max = reduce(self, "ReduceMax", &inputs, kept);
        let offset = reduce(self, "ReduceMax", &inputs, self.without(&[]));
        let shifted = self.make("Sub", &[&self.need(0)?, &max], Vec::new());
        inputs[0] = self.make("Exp", &[&shifted], Vec::new());
        let sum = reduce(self, "ReduceSum", &inputs, self.without(&[]));
        let log = self.make("Log", &[&sum], Vec::new());
        let output = self.output();
        self.push("Add", &[&log, &offset], &output, Vec::new());
        Ok(())
    }

    /// The p-th root of the sum over all but batch and channels: tract's is of something else.
    fn global_lp_pool(&mut self) -> Result<()> {
        let x = self.need(0)?;
        let p = self.step.int("p").unwrap_or(2) as f32;
        let (power, root) = (self.scalar(p), self.scalar(1. / p));
        let magnitudes = self.make("Abs", &[&x], Vec::new());
        let powers = self.make("Pow", &[&magnitudes, &power], Vec::new());
        let flat = self.integers(&[0, 0, -1]);
        let rows = self.make("Reshape", &[&powers, &flat], Vec::new());
        let axes = self.integers(&[2]);
        let sum = self.program.fresh(&format!("{}/sum", self.output()));
        let reduce = node("ReduceSum", &[&rows, &axes], &[&sum], vec![Attr::int("keepdims", 1)]);
        self.out.push(Step { opset: 13, ..self.step.derive(reduce) });
        let roots = self.make("Pow", &[&sum, &root], Vec::new());
        let pooled = self.make("GlobalAveragePool", &[&x], Vec::new());
        let shape = self.make("Shape", &[&pooled], Vec::new());
        let output = self.output();
        self.push("Reshape", &[&roots, &shape], &output, Vec::new());
        Ok(())
    }

    /// Padding by less than nothing cuts off.
    fn pad(&mut self) -> Result<bool> {
        let step = self.step;
        let old = step.attr("pads").or_else(|| step.attr("paddings")).map(|a| a.ints.clone());
        let given = step.input(1).and_then(|name| self.program.tensor(name)).and_then(Tensor::to_i64);
        let Some(pads) = old.clone().or(given) else { return Ok(false) };
        if pads.iter().all(|&pad| pad >= 0) {
            return Ok(false);
        }
        let mode = self.text("mode").unwrap_or_default();
        if !mode.is_empty() && mode != "constant" || old.is_some() {
            return Err(step.refuse("Pad by a negative number of elements"));
        }
        let axes = match step.input(3) {
            Some(name) => match self.program.tensor(name).and_then(Tensor::to_i64) {
                Some(axes) => axes,
                None => return Err(step.refuse("Pad by a negative number of elements")),
            },
            None => (0..pads.len() as i64 / 2).collect(),
        };
        let rank = axes.len();
        if pads.len() != 2 * rank {
            return Err(step.refuse(format!("{} pads for {rank} axes", pads.len())));
        }
        let starts: Vec<i64> = pads[..rank].iter().map(|&pad| (-pad).max(0)).collect();
        let ends: Vec<i64> = pads[rank..].iter().map(|&pad| if pad < 0 { pad } else { i64::MAX }).collect();
        let [starts, ends, axes] = [starts, ends, axes].map(|values| self.integers(&values));
        let x = self.need(0)?;
        let cut = self.make("Slice", &[&x, &starts, &ends, &axes], Vec::new());
        let rest: Vec<i64> = pads.iter().map(|&pad| pad.max(0)).collect();
        let mut padded = step.clone();
        padded.node.input[0] = cut;
        padded.node.input[1] = self.integers(&rest);
        self.out.push(padded);
        Ok(true)
    }

    /// tract divides the bounds as integers.
    fn range(&mut self) -> Result<bool> {
        let names = [self.need(0)?, self.need(1)?, self.need(2)?];
        let bounds = [0, 1, 2].map(|i| self.program.tensor(&names[i]));
        if let [Some(start), Some(limit), Some(delta)] = bounds
            && let (Some(start), Some(limit), Some(delta)) = (number(start), number(limit), number(delta))
        {
            let count = ((limit - start) / delta).ceil().max(0.);
            if !count.is_finite() || count > 1e7 {
                return Err(self.step.refuse(format!("Range from {start} to {limit} by {delta}")));
            }
            let dtype = bounds[0].map_or(DataType::Float, Tensor::dtype);
            let dims = [count as usize];
            let values = (0..count as usize).map(|i| start + i as f64 * delta);
            let made = match dtype {
                DataType::Int64 => Some(Tensor::from_i64(&dims, &values.map(|v| v as i64).collect::<Vec<_>>())),
                DataType::Int32 => Some(Tensor::from_i32(&dims, &values.map(|v| v as i32).collect::<Vec<_>>())),
                _ => Tensor::from_f64(dtype, &dims, values),
            };
            let Some(made) = made else { return Ok(false) };
            self.program.constants.insert(self.output(), Constant::Plain(made));
            return Ok(true);
        }
        let float = |name: &String| {
            let known = self.program.tensor(name).map(Tensor::dtype).or_else(|| self.program.dtypes.get(name).copied());
            known.is_some_and(DataType::is_float)
        };
        if names.iter().any(float) {
            return Err(self.step.refuse("Range of floats that are not constant"));
        }
        Ok(false)
    }

    fn top_k(&mut self) -> Result<()> {
        let x = self.need(0)?;
        let k = self.integers(&[self.step.int("k").unwrap_or(1)]);
        let outputs = self.step.node.output.clone();
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let attrs = self.without(&["k"]);
        self.out.push(Step { opset: 11, ..self.step.derive(node("TopK", &[&x, &k], &outputs, attrs)) });
        Ok(())
    }

    fn swiglu(&mut self) -> Result<()> {
        let (a, b) = (self.need(0)?, self.need(1)?);
        let alpha = self.scalar(self.float("alpha").unwrap_or(1.));
        let scaled = self.make("Mul", &[&a, &alpha], Vec::new());
        let gate = self.make("Sigmoid", &[&scaled], Vec::new());
        let swish = self.make("Mul", &[&a, &gate], Vec::new());
        let output = self.output();
        self.push("Mul", &[&swish, &b], &output, Vec::new());
        Ok(())
    }

    /// `Gather` of what the condition keeps.
    fn compress(&mut self) -> Result<()> {
        let (x, condition) = (self.need(0)?, self.need(1)?);
        let indices = if let Some(kept) = self.program.tensor(&condition).and_then(Tensor::to_i64) {
            let kept: Vec<i64> = (0..).zip(kept).filter(|(_, keep)| *keep != 0).map(|(at, _)| at).collect();
            self.program.add_constant("kept", Constant::Plain(Tensor::from_i64(&[kept.len()], &kept)))
        } else {
            let rows = self.make("NonZero", &[&condition], Vec::new());
            let first = self.program.add_constant("first", Constant::Plain(Tensor::from_i64(&[], &[0])));
            self.make("Gather", &[&rows, &first], vec![Attr::int("axis", 0)])
        };
        let (x, axis) = if let Some(axis) = self.step.int("axis") {
            (x, axis)
        } else {
            let flat = self.program.add_constant("flat", Constant::Plain(Tensor::from_i64(&[1], &[-1])));
            (self.make("Reshape", &[&x, &flat], Vec::new()), 0)
        };
        let output = self.output();
        self.push("Gather", &[&x, &indices], &output, vec![Attr::int("axis", axis)]);
        Ok(())
    }

    /// Zeros, with each element where its index, counted over the whole result, says.
    fn max_unpool(&mut self) -> Result<()> {
        let (x, indices) = (self.need(0)?, self.need(1)?);
        let list = |name: &str| self.step.attr(name).map(|a| a.ints.clone());
        let kernel = list("kernel_shape").ok_or_else(|| self.step.refuse("it has no kernel_shape"))?;
        let rank = kernel.len();
        let strides = list("strides").unwrap_or_else(|| vec![1; rank]);
        let pads = list("pads").unwrap_or_else(|| vec![0; 2 * rank]);
        if strides.len() != rank || pads.len() != 2 * rank {
            return Err(self.step.refuse("its strides or pads are not those of its kernel"));
        }
        let shape = if let Some(given) = self.step.input(2).map(str::to_owned) {
            given
        } else {
            // (size - 1) * stride + kernel - pads, and batch and channels as they are.
            let steps = self.integers(&[vec![1; 2], strides.clone()].concat());
            let more = (0..rank).map(|i| kernel[i] - strides[i] - pads[i] - pads[rank + i]);
            let more = self.integers(&[vec![0; 2], more.collect()].concat());
            let own = self.make("Shape", &[&x], Vec::new());
            let apart = self.make("Mul", &[&own, &steps], Vec::new());
            self.make("Add", &[&apart, &more], Vec::new())
        };
        let flat = self.integers(&[-1]);
        let count = self.make("ReduceProd", &[&shape], vec![Attr::int("keepdims", 1)]);
        let zero = self.scalar(0.);
        let zeros = self.make("Expand", &[&zero, &count], Vec::new());
        let values = self.make("Reshape", &[&x, &flat], Vec::new());
        let places = self.make("Reshape", &[&indices, &flat], Vec::new());
        let spread = self.make("ScatterElements", &[&zeros, &places, &values], vec![Attr::int("axis", 0)]);
        let output = self.output();
        self.push("Reshape", &[&spread, &shape], &output, Vec::new());
        Ok(())
    }

    /// What opsets before 11 mean by enlarging, in today's words.
    fn resize(&mut self, index: usize) -> Result<()> {
        let x = self.need(0)?;
        let scales = match self.step.attr("scales") {
            Some(attr) => {
                let scales = Tensor::from_f32(&[attr.floats.len()], &attr.floats);
                self.program.add_constant("scales", Constant::Plain(scales))
            }
            None => self.need(index)?,
        };
        let mode = self.step.attr("mode").and_then(|a| a.s.as_ref());
        let mode = mode.map_or_else(|| "nearest".to_owned(), |s| String::from_utf8_lossy(s).into_owned());
        let values = self.program.constants.get(&scales).and_then(|c| c.values().ok());
        let enlarges = values.is_some_and(|v| v.iter().all(|&s| s >= 1.));
        if mode == "nearest" && !enlarges {
            return Err(self.step.refuse("making an image smaller by its nearest pixels, before opset 11"));
        }
        let attrs = vec![
            Attr::string("mode", if mode == "bilinear" { "linear" } else { &mode }),
            Attr::string("coordinate_transformation_mode", "asymmetric"),
            Attr::string("nearest_mode", "floor"),
        ];
        let output = self.output();
        let mut step = self.step.derive(node("Resize", &[&x, "", &scales], &[&output], attrs));
        step.opset = 13;
        self.out.push(step);
        Ok(())
    }

    /// Frames that depend on the length of the result take the one that it has, as the standard's text and onnxruntime do,
    /// where the reference implementation and tract take the product of length and scale, whole or not.
    fn resize_to_whole_size(&mut self) -> Result<bool> {
        let step = self.step;
        let frame = self.text("coordinate_transformation_mode").unwrap_or_default();
        let Some(scales) = step.input(2).filter(|_| matches!(&*frame, "align_corners" | "tf_crop_and_resize")) else {
            return Ok(false);
        };
        let known = self.program.tensor(scales).and_then(Tensor::to_f32);
        // Sizes instead of scales may be what an empty tensor says.
        if step.input(3).is_some() || known.is_some_and(|scales| scales.iter().all(|scale| scale.fract() == 0.)) {
            return Ok(false);
        }
        let (x, scales) = (self.need(0)?, scales.to_owned());
        let mut shape = self.make("Shape", &[&x], Vec::new());
        if let Some(axes) = step.attr("axes").map(|a| a.ints.clone()) {
            let axes = self.integers(&axes);
            shape = self.make("Gather", &[&shape, &axes], Vec::new());
        }
        let to = |dtype: DataType| vec![Attr::int("to", dtype.code().into())];
        let lengths = self.make("Cast", &[&shape], to(DataType::Float));
        let product = self.make("Mul", &[&lengths, &scales], Vec::new());
        let whole = self.make("Floor", &[&product], Vec::new());
        let sizes = self.make("Cast", &[&whole], to(DataType::Int64));
        let mut same = step.clone();
        same.node.input.resize(4, String::new());
        same.node.input[2].clear();
        same.node.input[3] = sizes;
        // The first in which scales may be left out.
        same.opset = step.opset.max(13);
        self.out.push(same);
        Ok(true)
    }

    /// `(n · mean(|x|^p))^(1/p)` over windows of n elements.
    fn lp_pool(&mut self) -> Result<()> {
        let x = self.need(0)?;
        if self.step.int("ceil_mode").unwrap_or(0) != 0 {
            return Err(self.step.refuse("LpPool with ceil_mode is not implemented"));
        }
        let p = self.step.int("p").unwrap_or(2) as f32;
        let window = self.step.attr("kernel_shape").map_or(1, |a| a.ints.iter().product::<i64>());
        let (power, root, count) = (self.scalar(p), self.scalar(1. / p), self.scalar(window as f32));
        let magnitudes = self.make("Abs", &[&x], Vec::new());
        let powers = self.make("Pow", &[&magnitudes, &power], Vec::new());
        let mut attrs = self.without(&["p", "ceil_mode"]);
        attrs.push(Attr::int("count_include_pad", 1));
        let mean = self.make("AveragePool", &[&powers], attrs);
        let sum = self.make("Mul", &[&mean, &count], Vec::new());
        let output = self.output();
        self.push("Pow", &[&sum, &root], &output, Vec::new());
        Ok(())
    }

    /// The activation that onnxruntime fuses into an operator; `parameters` are those it takes, in order.
    fn activate(&mut self, x: &str, name: &str, parameters: &[f32]) -> Result<()> {
        let output = self.output();
        let at = |index: usize| parameters.get(index).copied();
        let attrs = match (name, at(0), at(1)) {
            ("Relu" | "Tanh" | "Sigmoid" | "Softplus" | "Softsign", ..) => Vec::new(),
            ("LeakyRelu" | "Elu" | "ThresholdedRelu", Some(alpha), _) => vec![Attr::float("alpha", alpha)],
            ("HardSigmoid", Some(alpha), Some(beta)) => vec![Attr::float("alpha", alpha), Attr::float("beta", beta)],
            ("Clip", Some(min), Some(max)) => {
                let (min, max) = (self.scalar(min), self.scalar(max));
                let mut step = self.step.derive(node("Clip", &[x, &min, &max], &[&output], Vec::new()));
                step.opset = 13;
                self.out.push(step);
                return Ok(());
            }
            _ => return Err(self.step.refuse(format!("fused with {name} it is not implemented"))),
        };
        self.push(name, &[x], &output, attrs);
        Ok(())
    }

    fn text(&self, name: &str) -> Option<String> {
        Some(String::from_utf8_lossy(self.step.attr(name)?.s.as_ref()?).into_owned())
    }

    fn fused_conv(&mut self) -> Result<()> {
        let (x, w) = (self.need(0)?, self.need(1)?);
        let bias = self.step.input(2).map(str::to_owned);
        let inputs: Vec<&str> = [Some(x.as_str()), Some(&w), bias.as_deref()].into_iter().flatten().collect();
        let attrs = self.without(&["activation", "activation_params"]);
        let mut y = self.make("Conv", &inputs, attrs);
        if let Some(sum) = self.step.input(3).map(str::to_owned) {
            y = self.make("Add", &[&y, &sum], Vec::new());
        }
        let parameters = self.step.attr("activation_params").map_or_else(Vec::new, |a| a.floats.clone());
        match self.text("activation") {
            Some(name) if !name.is_empty() => self.activate(&y, &name, &parameters),
            _ => {
                let output = self.output();
                self.push("Identity", &[&y], &output, Vec::new());
                Ok(())
            }
        }
    }

    fn fused_gemm(&mut self) -> Result<()> {
        let inputs = self.step.node.input.clone();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attrs = self.without(&["activation", "activation_alpha", "activation_beta", "activation_gamma"]);
        let y = self.make("Gemm", &inputs, attrs);
        let parameters: Vec<f32> =
            ["activation_alpha", "activation_beta"].iter().map_while(|name| self.float(name)).collect();
        let name = self.text("activation").unwrap_or_default();
        self.activate(&y, &name, &parameters)
    }
}

/// The number of a tensor of one element, where f64 holds it.
fn number(tensor: &Tensor) -> Option<f64> {
    let exact = |v: i64| (v.unsigned_abs() < 1 << 52).then_some(v as f64);
    match (tensor.to_f64(), tensor.to_i64()) {
        (Some(values), _) if values.len() == 1 => values.first().copied(),
        (_, Some(values)) if values.len() == 1 => values.first().copied().and_then(exact),
        _ => None,
    }
}
