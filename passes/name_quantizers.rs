//! Writes fake quantizers of activations that are spelled out in operators as a QuantizeLinear and a DequantizeLinear.
//!
//! `Mul(Sub(Clip(Add(Round(Div(x, s)), z), …), z), s)` with constant scales is what a Quantize/Dequantize pair computes,
//! if it is. Some exporters multiply by the reciprocal instead, or add the zero point before they round, which moves some
//! values that lie between two codes to the other one. Both sides are steps that only rise, so it is decided rather than
//! guessed: for each code, the least float32 that gets it is found by bisection, and QuantizeLinear must have the same one.
//! Where it has not, the operators stay, and the first value that would differ is named. (NaN, which the operators hand
//! on, becomes a code.)
//!
//! Quantizers whose scale is found at run time, for each token, are recognized, left as they are, and listed.

use super::support::evaluate::Constants;
use super::support::graphs::{graphs_outside_functions, is_graph_output};
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::{Attr, GraphId, Model, NewNode, NodeId, Place, Tensor, User, ValueId};
use crate::numerics::{Format, Round, pack, quantize_value};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// Nodes that are looked at for the statistics behind a scale.
const BEHIND: usize = 64;

/// See the module.
#[derive(Debug)]
pub struct NameQuantizers;

impl Pass for NameQuantizers {
    fn name(&self) -> &'static str {
        "name-quantizers"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for graph in graphs_outside_functions(model) {
            let mut constants = Constants::new(model, graph);
            for node in model.graph(graph).nodes().to_vec() {
                if !model.node(node).is("Round")
                    || model.node(node).outputs().iter().flatten().any(|&v| constants.derives(v))
                {
                    continue;
                }
                let Some(chain) = Chain::around(model, &mut constants, node) else { continue };
                let name = model.value(chain.result).name().to_owned();
                match chain.named(model) {
                    Ok(pair) => pair.write(model, graph, &chain, &mut outcome),
                    Err(why) => outcome.skipped(name, left(why)),
                }
            }
        }
        Ok(outcome)
    }
}

/// One step of a quantizer, on single numbers.
#[derive(Clone, Copy, Debug)]
enum Step {
    Add(f32),
    Clip(f32, f32),
    Round,
}

/// How the numbers are scaled at first.
enum Scaling {
    /// Divided by the scale.
    Divide(Tensor),
    /// Multiplied by its reciprocal.
    Multiply(Tensor),
    /// By something that is computed from the tensor itself.
    Dynamic,
}

/// A rounding with what is done before and after it.
struct Chain {
    source: ValueId,
    scaling: Scaling,
    steps: Vec<Step>,
    /// The scale at the end; `None` where it is no constant.
    scale: Option<Tensor>,
    result: ValueId,
    /// A step that could not be read.
    unclear: Option<Reason>,
}

impl Chain {
    /// The quantizer around a Round; `None` if what is around it does not scale there and back.
    fn around(model: &Model, constants: &mut Constants, round: NodeId) -> Option<Self> {
        let mut steps = vec![Step::Round];
        let mut unclear = None;
        // Backwards to the scaling.
        let mut at = model.node(round).input(0)?;
        let (source, scaling) = loop {
            let slot = model.node(model.producer(at)?);
            match slot.op_type() {
                "Add" | "Clip" | "Min" | "Max" => match step(model, constants, model.producer(at)?) {
                    Some((value, step)) => {
                        steps.insert(0, step);
                        at = value;
                    }
                    None => return None,
                },
                "Div" => {
                    let (x, scale) = (slot.input(0)?, slot.input(1)?);
                    let constant = constants.value(model, scale);
                    break (x, constant.map_or(Scaling::Dynamic, Scaling::Divide));
                }
                "Mul" => {
                    let (a, b) = (slot.input(0)?, slot.input(1)?);
                    let (x, scale) = if constants.holds(model, a) { (b, a) } else { (a, b) };
                    let constant = constants.value(model, scale);
                    break (x, constant.map_or(Scaling::Dynamic, Scaling::Multiply));
                }
                _ => return None,
            }
        };
        // Forwards to the product.
        let mut at = model.node(round).output(0)?;
        loop {
            // Constants may be cast to the type of a tensor, which does not read it.
            let reads = |user: &&User| match user {
                User::Node { node, .. } => !model.node(*node).outputs().iter().flatten().any(|&v| constants.derives(v)),
                User::Output { .. } => true,
            };
            let mut users = model.value(at).users().iter().filter(reads);
            let (Some(&User::Node { node, .. }), None) = (users.next(), users.next()) else { return None };
            let slot = model.node(node);
            let next = slot.output(0)?;
            match slot.op_type() {
                "Mul" => {
                    let other = slot.inputs().iter().flatten().copied().find(|&v| v != at)?;
                    let scale = constants.value(model, other);
                    return Some(Self { source, scaling, steps, scale, result: next, unclear });
                }
                "Cast" | "CastLike" | "Identity" | "Reshape" => {
                    if slot.is("Reshape") && !matches!(scaling, Scaling::Dynamic) {
                        unclear = Some(Reason::Moved);
                    }
                }
                "Add" | "Sub" | "Clip" | "Min" | "Max" => match step(model, constants, node) {
                    Some((value, step)) if value == at => steps.push(step),
                    _ if matches!(scaling, Scaling::Dynamic) => {}
                    _ => unclear = Some(Reason::NotByOneConstant { op: slot.op_type().into() }),
                },
                _ => return None,
            }
            at = next;
        }
    }

    /// The Quantize/Dequantize pair that is the same, or why there is none.
    fn named(&self, model: &Model) -> Result<Pair, Reason> {
        if let Some(why) = &self.unclear {
            return Err(why.clone());
        }
        let (first, divides) = match &self.scaling {
            Scaling::Divide(t) => (t, true),
            Scaling::Multiply(t) => (t, false),
            Scaling::Dynamic => return Err(dynamic(model, self.source, self.result)),
        };
        let scale = self.scale.as_ref().ok_or(Reason::NotConstant { what: Operand::Scale })?;
        let (Some(factors), Some(scales)) = (first.to_f32(), scale.to_f32()) else {
            return Err(Reason::WrongType { what: Operand::Scale, found: scale.dtype(), wanted: "float".into() });
        };
        if first.dtype() != DataType::Float || scale.dtype() != DataType::Float || factors.len() != scales.len() {
            return Err(Reason::Mismatch { what: "last scale".into(), from: "its first".into() });
        }
        let axis = axis(model, self.source, &scale.dims(), &first.dims())?;
        let (format, zero_point, clip) = self.codes(&factors, divides)?;
        for (&factor, &scale) in factors.iter().zip(&scales) {
            if !(scale.is_normal() && scale > 0.0 && factor.is_normal() && factor > 0.0) {
                return Err(Reason::OutOfRange {
                    what: "scale".into(),
                    value: scale,
                    wanted: "a positive normal number".into(),
                });
            }
            if divides && factor.to_bits() != scale.to_bits() {
                return Err(Reason::ScalesBackBy { divisor: factor, factor: scale });
            }
            self.prove(factor, divides, scale, format, zero_point)?;
        }
        Ok(Pair { scales, axis, format, zero_point, clip })
    }

    /// The whole number that a value becomes.
    fn number(&self, x: f32, factor: f32, divides: bool) -> f32 {
        let scaled = if divides { x / factor } else { x * factor };
        self.steps.iter().fold(scaled, |value, step| match *step {
            Step::Add(term) => value + term,
            Step::Clip(low, high) => value.max(low).min(high),
            Step::Round => value.round_ties_even(),
        })
    }

    /// Format, zero point, and bounds of codes where not all of the format's are used.
    #[allow(clippy::type_complexity, reason = "three numbers that are taken apart at once")]
    fn codes(&self, factors: &[f32], divides: bool) -> Result<(Format, i32, Option<(i32, i32)>), Reason> {
        let factor = factors.first().copied().unwrap_or(1.0);
        let (low, high) = (self.number(f32::MIN, factor, divides), self.number(f32::MAX, factor, divides));
        let whole = |v: f32| v.fract() == 0.0 && v.abs() <= 65536.0;
        if !whole(low) || !whole(high) || low >= high {
            return Err(Reason::Unbounded);
        }
        let (low, high) = (low as i32, high as i32);
        let after = self.steps.iter().rev().take_while(|s| matches!(s, Step::Add(_)));
        let offset: f32 = after.map(|s| if let Step::Add(term) = s { *term } else { 0.0 }).sum();
        let zero = if whole(offset) { -offset as i32 } else { 0 };
        let fits = |f: &Format, z: i32| {
            let (least, most) = f.range();
            (least..=most).contains(&z) && least <= low + z && high + z <= most
        };
        let full = |f: &Format, z: i32| f.range() == (low + z, high + z);
        let formats = [Format::Uint8, Format::Int8, Format::Uint16, Format::Int16];
        // The zero point that is taken off at the end; a symmetric one may hide in the bounds.
        let shifted = |f: &Format| f.range().0 - low;
        let exact = formats.iter().find(|f| full(f, zero) && fits(f, zero)).map(|f| (*f, zero));
        let moved = || formats.iter().find(|f| full(f, shifted(f)) && fits(f, shifted(f))).map(|f| (*f, shifted(f)));
        if let Some((format, zero)) = exact.or_else(moved) {
            return Ok((format, zero, None));
        }
        let format = [Format::Int8, Format::Uint8].into_iter().find(|f| fits(f, zero));
        match format {
            Some(format) => Ok((format, zero, Some((low + zero, high + zero)))),
            None => Err(Reason::NoFormat { low: (low + zero).into(), high: (high + zero).into() }),
        }
    }

    /// Compares where the steps lie, for every code.
    fn prove(&self, factor: f32, divides: bool, scale: f32, format: Format, zero_point: i32) -> Result<(), Reason> {
        let own = |x: f32| f64::from(self.number(x, factor, divides));
        let (low, high) = (own(f32::MIN) as i32, own(f32::MAX) as i32);
        let other = |x: f32| {
            let code = quantize_value(x, scale, zero_point, format, Round::HalfEven);
            f64::from((code - zero_point).clamp(low, high))
        };
        let mut differing = 0;
        let mut example = None;
        for code in low + 1..=high {
            let at = least(|x| own(x) >= f64::from(code));
            if other(at) < f64::from(code) || other(below(at)) >= f64::from(code) {
                differing += 1;
                let seen = if other(at) < f64::from(code) { at } else { below(at) };
                example.get_or_insert((seen, own(seen), other(seen)));
            }
        }
        match example {
            None => Ok(()),
            Some((at, here, there)) => Err(Reason::StepsDiffer { differing, of: high - low, at, here, there }),
        }
    }
}

/// The number that a node adds, or the bounds it clips to, and the value it does so to.
fn step(model: &Model, constants: &mut Constants, node: NodeId) -> Option<(ValueId, Step)> {
    let slot = model.node(node);
    let mut one = |v: Option<ValueId>| -> Option<f32> {
        let tensor = constants.value(model, v?).filter(|t| t.len() == 1)?;
        tensor.to_f32().or_else(|| Some(tensor.to_i64()?.into_iter().map(|v| v as f32).collect()))?.first().copied()
    };
    let (a, b) = (slot.input(0), slot.input(1));
    Some(match slot.op_type() {
        "Add" | "Min" | "Max" => {
            if slot.inputs().len() != 2 {
                return None;
            }
            let (value, number) = match (one(a), one(b)) {
                (None, Some(number)) => (a?, number),
                (Some(number), None) => (b?, number),
                _ => return None,
            };
            let step = match slot.op_type() {
                "Add" => Step::Add(number),
                "Min" => Step::Clip(f32::NEG_INFINITY, number),
                _ => Step::Clip(number, f32::INFINITY),
            };
            (value, step)
        }
        "Sub" => (a?, Step::Add(-one(b)?)),
        "Clip" => {
            let mut bound = |index: usize, name: &str, open: f32| match slot.input(index) {
                Some(v) => one(Some(v)),
                None => Some(slot.float(name).unwrap_or(open)),
            };
            let low = bound(1, "min", f32::NEG_INFINITY)?;
            (a?, Step::Clip(low, bound(2, "max", f32::INFINITY)?))
        }
        _ => return None,
    })
}

/// Why a quantizer with a scale that is found at run time stays.
fn dynamic(model: &Model, source: ValueId, result: ValueId) -> Reason {
    let mut seen = Vec::new();
    let mut queue = vec![result];
    while let Some(value) = queue.pop().filter(|_| seen.len() < BEHIND) {
        if value == source || seen.contains(&value) {
            continue;
        }
        seen.push(value);
        let Some(node) = model.producer(value).map(|n| model.node(n)) else { continue };
        if (node.is("ReduceMin") || node.is("ReduceMax")) && node.input(0).is_some() {
            return Reason::NotConstant { what: Operand::TokenScale };
        }
        queue.extend(node.inputs().iter().flatten());
    }
    Reason::NotConstant { what: Operand::Scale }
}

/// The axis, counted from the last, along which a tensor has a scale each; `None` for one scale.
fn axis(model: &Model, source: ValueId, dims: &[usize], others: &[usize]) -> Result<Option<i64>, Reason> {
    let count: usize = dims.iter().product();
    let rank = model.shape(source).map(|s| s.len());
    let deep = dims.len().max(others.len());
    if deep > 0 && !(deep == 1 && count == 1) && rank.is_none_or(|r| r < deep) {
        return Err(Reason::UnknownShape { what: Operand::Input });
    }
    if count == 1 {
        return Ok(None);
    }
    if dims != others {
        return Err(Reason::Mismatch { what: "last scale".into(), from: "its first".into() });
    }
    match dims.iter().position(|&d| d == count) {
        Some(at) => Ok(Some(at as i64 - dims.len() as i64)),
        None => Err(Reason::NoGranularity),
    }
}

/// A Quantize/Dequantize pair.
struct Pair {
    scales: Vec<f32>,
    axis: Option<i64>,
    format: Format,
    zero_point: i32,
    clip: Option<(i32, i32)>,
}

/// Says that a quantizer stays as its operators.
fn left(because: Reason) -> Reason {
    Reason::LeftAsOperators { because: Box::new(because) }
}

impl Pair {
    fn write(self, model: &mut Model, graph: GraphId, chain: &Chain, outcome: &mut Outcome) {
        let Self { scales, axis, format, zero_point, clip } = self;
        let dtype = DataType::from(format);
        let Chain { source, result, .. } = *chain;
        if let Some((opset, ir)) = dtype.quantizers_since() {
            if model.opset().is_none_or(|v| v < opset) {
                let why = left(Reason::NeedsOpset { what: format.to_string(), opset });
                return outcome.skipped(model.value(result).name(), why);
            }
            model.set_ir_version(model.ir_version().max(ir));
        }
        let opset = model.opset().unwrap_or(0);
        if opset < 10 || (axis.is_some() && opset < 13) || (clip.is_some() && opset < 12) {
            let why = left(Reason::NeedsOpset { what: "one scale per channel".into(), opset: 13 });
            return outcome.skipped(model.value(result).name(), why);
        }
        let name = model.value(source).name().to_owned();
        let dims: &[usize] = if axis.is_some() { &[scales.len()] } else { &[] };
        let zeros = vec![zero_point; scales.len()];
        let zero = Tensor::new(dtype, dims, pack::pack(&zeros, format.bits()));
        let scale = model.add_initializer(graph, &format!("{name}_scale"), Tensor::from_f32(dims, &scales));
        let zero = model.add_initializer(graph, &format!("{name}_zero_point"), zero);
        let along = |node: NewNode| match axis {
            Some(axis) => node.with(Attr::int("axis", axis)),
            None => node,
        };
        let output = |model: &Model, node: NodeId| model.node(node).output(0).expect("just made");
        let place = model.producer(source).map_or(Place::First(graph), Place::After);
        let quantize = NewNode::new(
            "QuantizeLinear",
            format!("{name}_QuantizeLinear"),
            &[source, scale, zero],
            &[&format!("{name}_quantized")],
        );
        let mut last = model.insert(place, along(quantize));
        if let Some((low, high)) = clip {
            let bound = |v: i32| Tensor::new(dtype, &[], pack::pack(&[v], format.bits()));
            let low = model.add_initializer(graph, &format!("{name}_least"), bound(low));
            let high = model.add_initializer(graph, &format!("{name}_most"), bound(high));
            let inputs = [output(model, last), low, high];
            let node = NewNode::new("Clip", format!("{name}_Clip"), &inputs, &[&format!("{name}_clipped")]);
            last = model.insert(Place::After(last), node);
        }
        let dequantize = NewNode::new(
            "DequantizeLinear",
            format!("{name}_DequantizeLinear"),
            &[output(model, last), scale, zero],
            &[&format!("{name}_dequantized")],
        );
        last = model.insert(Place::After(last), along(dequantize));
        let back = output(model, last);
        if let Some(ty) = model.value(result).ty().cloned() {
            model.set_type(back, ty);
        }
        let returned = is_graph_output(model, result);
        model.replace_uses(result, back, |_| true);
        let old = model.value(result).name().to_owned();
        if returned {
            model.take_name(result, back, &format!("{old}_operators"));
        }
        outcome.changed(old, Change::Pair { format });
    }
}

/// The least float32 for which `holds`, which holds for all above it; the largest one if it holds for none.
fn least(holds: impl Fn(f32) -> bool) -> f32 {
    let (mut low, mut high) = (index(f32::MIN), index(f32::MAX));
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(value(middle)) { high = middle } else { low = middle + 1 }
    }
    value(low)
}

/// The float32 right below.
fn below(x: f32) -> f32 {
    value(index(x) - 1)
}

/// The place of a float32 among all of them, in order; zeros of both signs share one.
fn index(x: f32) -> i64 {
    let bits = i64::from(x.to_bits() & 0x7fff_ffff);
    if x.is_sign_negative() { -bits } else { bits }
}

fn value(index: i64) -> f32 {
    let magnitude = f32::from_bits(index.unsigned_abs() as u32);
    if index < 0 { -magnitude } else { magnitude }
}
