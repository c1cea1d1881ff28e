//! Folds fake quantizers of constants, however they are spelled: a float weight that is rounded to codes and scaled back
//! by operators becomes packed codes and a DequantizeLinear.
//!
//! What training frameworks export is `Mul(Sub(Clip(Add(Round(Mul(w, 1/s)), z), …), z), s)` with reshapes around it for
//! groups, or a Quantize/Dequantize pair between reshapes; the scale is a constant that was learned, or is computed in the
//! graph from the weight itself. None of that is matched operator by operator. The whole expression is computed to the
//! bit; its last product tells the scales, and what is multiplied by them are whole numbers, or it is no quantizer. Where
//! each scale applies is followed through the moves behind the product, which gives axis and group size.
//!
//! Where a float is added to each group behind that product, as zero points that are no codes are, an Add stays behind the
//! DequantizeLinear.
//!
//! A fold is made only if dequantizing the codes gives every element of the expression exactly (but for the sign of a
//! zero, which codes do not have). Scales keep their bits. What is not folded is listed with the reason.
//!
//! Codes take the narrowest format that holds the range of the Clip, or of the codes where nothing clips. Formats and
//! groups that need opset 21 raise the model to it.

use std::collections::BTreeSet;

use super::forms::Shift;
use super::raise_opset::raise;
use super::support::evaluate::{Constants, broadcast, evaluate, same, sources};
use super::support::granularity::along;
use super::support::graphs::graphs_outside_functions;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Clip;
use crate::ir::{GraphId, Model, NewNode, NodeId, Place, Tensor, User, ValueId, tensor_type};
use crate::numerics::{self, Format, Granularity, QParams, pack};
use crate::onnx::DataType;
use crate::reason::{Operand, Reason};

/// Operators that only move elements.
const MOVES: [&str; 7] = ["Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice"];

/// See the module.
#[derive(Debug)]
pub struct FoldFakeQuant;

impl Pass for FoldFakeQuant {
    fn name(&self) -> &'static str {
        "fold-fake-quant"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut found = find(model, &mut outcome);
        if found.iter().any(|f| f.folded.needs_21()) && model.opset().is_some_and(|v| v < 21) {
            // On a copy: a model that cannot be raised is left as it is.
            let mut raised = model.clone();
            match raise(&mut raised, 21) {
                Ok(_) => {
                    outcome.changed("model", Change::Opset { from: model.opset().unwrap_or(0), to: 21 });
                    *model = raised;
                    outcome.skips.clear();
                    found = find(model, &mut outcome);
                }
                Err(why) => {
                    for Found { value, folded, .. } in &mut found {
                        if !folded.widen() {
                            let why = Reason::CannotRaise {
                                what: "its granularity".into(),
                                opset: 21,
                                error: why.message().into(),
                            };
                            outcome.skipped(model.value(*value).name(), why);
                        }
                    }
                    found.retain(|f| !f.folded.needs_21());
                }
            }
        }
        for Found { graph, value, users, folded } in found {
            folded.write(model, graph, value, &users, &mut outcome);
        }
        Ok(outcome)
    }
}

/// A fake quantizer that can be folded.
struct Found {
    graph: GraphId,
    /// The last value of the expression.
    value: ValueId,
    /// The uses that are to read the folded value.
    users: Vec<User>,
    folded: Folded,
}

/// Every fake quantizer of a constant; those that cannot be folded are listed with the reason.
fn find(model: &Model, outcome: &mut Outcome) -> Vec<Found> {
    let mut found = Vec::new();
    for graph in graphs_outside_functions(model) {
        let mut constants = Constants::new(model, graph);
        for (value, users) in roots(model, graph, &constants) {
            match Folded::of(model, &mut constants, value) {
                Ok(folded) => found.push(Found { graph, value, users, folded }),
                Err(why) => outcome.skipped(model.value(value).name(), why),
            }
            constants.forget();
        }
    }
    found
}

/// Float values that are computed from constants alone by something that rounds, and are read by what is not; with the
/// uses that are to read the folded value.
fn roots(model: &Model, graph: GraphId, constants: &Constants) -> Vec<(ValueId, Vec<User>)> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for &node in model.graph(graph).nodes() {
        for &value in model.node(node).outputs().iter().flatten() {
            if !constants.derives(value) || !seen.insert(value) {
                continue;
            }
            let users: Vec<User> = model
                .value(value)
                .users()
                .iter()
                .copied()
                .filter(|user| match user {
                    User::Node { node, .. } => {
                        !model.node(*node).outputs().iter().flatten().any(|&v| constants.derives(v))
                    }
                    User::Output { .. } => true,
                })
                .collect();
            if !users.is_empty() && is_quantizer(model, constants, value) {
                found.push((value, users));
            }
        }
    }
    found
}

/// Whether an expression ends as quantizers do, and rounds: a Dequantize node right behind codes is one already.
fn is_quantizer(model: &Model, constants: &Constants, value: ValueId) -> bool {
    let (scaled, moves) = behind_moves(model, value);
    let Some(node) = model.producer(scaled).map(|n| model.node(n)) else { return false };
    let ends = ["Mul", "Div", "DequantizeLinear", "Add"].iter().any(|op| node.is(op));
    if !ends || (moves.is_empty() && node.is("DequantizeLinear")) {
        return false;
    }
    let Some(slice) = constants.slice(model, scaled) else { return false };
    slice.iter().any(|&n| model.node(n).is("Round") || model.node(n).is("QuantizeLinear"))
}

/// The value behind operators that only move elements, and these, those that run first last.
fn behind_moves(model: &Model, mut value: ValueId) -> (ValueId, Vec<NodeId>) {
    let mut moves = Vec::new();
    while let Some(node) = model.producer(value) {
        let slot = model.node(node);
        let (true, Some(input)) = (MOVES.iter().any(|op| slot.is(op)), slot.input(0)) else { break };
        moves.push(node);
        value = input;
    }
    (value, moves)
}

/// A fake quantizer as codes.
#[derive(Debug)]
pub(super) struct Folded {
    /// The float tensor it quantizes, by name.
    name: String,
    dims: Vec<usize>,
    codes: Vec<i32>,
    format: Format,
    granularity: Granularity,
    qparams: QParams,
    /// The initializer that has the scales, where there is one.
    scale: Option<ValueId>,
    /// What is added behind the product, one for each scale; empty where nothing is.
    offsets: Vec<f32>,
}

/// The last product of a fake quantizer.
struct Product {
    /// Codes, before the moves.
    codes: Vec<i64>,
    dims: Vec<usize>,
    scales: Vec<f32>,
    /// The initializer that has them.
    source: Option<ValueId>,
    /// The scale of each number.
    entry: Vec<usize>,
    /// The zero point at each scale.
    zero_points: Vec<i32>,
    /// The type in which the file has the codes, where it has them.
    stored: Option<DataType>,
    /// The bounds that the codes are clipped to, where they are.
    bounds: Option<(f32, f32)>,
    /// What is added at each scale; empty where nothing is.
    offsets: Vec<f32>,
}

impl Folded {
    /// Reads the expression that gives `value`; `Err` says why it is no quantizer that can be folded.
    fn of(model: &Model, constants: &mut Constants, value: ValueId) -> Result<Self, Reason> {
        let (scaled, moves) = behind_moves(model, value);
        let result = constants.value(model, value).ok_or(Reason::NotComputable { what: Operand::Output })?;
        if result.dtype() != DataType::Float {
            return Err(Reason::wrong_type(Operand::Output, result.dtype(), "float"));
        }
        let product = Product::of(model, constants, scaled)?;
        let operands: Vec<Vec<Option<Tensor>>> = moves
            .iter()
            .map(|&node| {
                let rest = model.node(node).inputs().iter().skip(1);
                rest.map(|v| v.and_then(|v| constants.value(model, v))).collect()
            })
            .collect();
        let moved = |values: &[i64]| -> Option<Tensor> {
            let mut each = moves.iter().zip(&operands).rev();
            each.try_fold(Tensor::from_i64(&product.dims, values), |tensor, (&node, operands)| {
                let inputs: Vec<Option<Tensor>> =
                    std::iter::once(Some(tensor)).chain(operands.iter().cloned()).collect();
                evaluate(model, node, &inputs)
            })
        };
        let unmoved = || Reason::Moved;
        let entries: Vec<i64> = product.entry.iter().map(|&e| e as i64).collect();
        let codes = moved(&product.codes).ok_or_else(unmoved)?;
        let entries = moved(&entries).and_then(|t| t.to_i64()).ok_or_else(unmoved)?;
        let dims = codes.dims();
        let codes = codes.to_i64().ok_or_else(unmoved)?;
        let granularity = granularity(&dims, &entries, product.scales.len()).ok_or(Reason::NoGranularity)?;
        let format = product.format(&codes, &dims)?;
        let codes: Vec<i32> =
            codes.iter().map(|&c| i32::try_from(c).map_err(|_| unmoved())).collect::<Result<_, _>>()?;
        let mut picked = vec![0; granularity.scale_dims(&dims).iter().product()];
        for (own, &entry) in granularity.entries(&dims)?.into_iter().zip(&entries) {
            picked[own] = entry as usize;
        }
        let qparams = QParams {
            scales: picked.iter().map(|&e| product.scales[e]).collect(),
            zero_points: picked.iter().map(|&e| product.zero_points[e]).collect(),
        };
        let offsets: Vec<f32> = picked.iter().filter_map(|&e| product.offsets.get(e).copied()).collect();
        if !offsets.is_empty() {
            Shift::check(&dims, &granularity)?;
        }
        let folded = Self {
            name: source_name(model, constants, value),
            dims,
            codes,
            format,
            granularity,
            qparams,
            scale: product.source,
            offsets,
        };
        folded.prove(&result)?;
        Ok(folded)
    }

    /// Whether dequantizing the codes gives exactly what the expression does.
    fn prove(&self, result: &Tensor) -> Result<(), Reason> {
        let raw = pack::pack(&self.codes, self.format.bits());
        let mut back = numerics::dequantize(&raw, self.format, &self.dims, &self.granularity, &self.qparams)?;
        if !self.offsets.is_empty() {
            for (value, entry) in back.iter_mut().zip(self.granularity.entries(&self.dims)?) {
                *value += self.offsets[entry];
            }
        }
        let values = result.to_f32().unwrap_or_default();
        if values.len() != back.len() {
            return Err(Reason::WrongShape { what: Operand::QuantizedData, dims: self.dims.clone() });
        }
        match values.iter().zip(&back).position(|(&a, &b)| !same(a, b)) {
            None => Ok(()),
            Some(at) => Err(Reason::NotExact { element: at, found: back[at], wanted: values[at] }),
        }
    }

    fn needs_21(&self) -> bool {
        matches!(self.granularity, Granularity::PerGroup { .. }) || matches!(self.format.bits(), 4 | 16)
    }

    /// Takes 8 bits for less, which old opsets have; whether that is enough for them.
    fn widen(&mut self) -> bool {
        if self.format.bits() == 4 {
            self.format = if self.format.is_signed() { Format::Int8 } else { Format::Uint8 };
        }
        !self.needs_21()
    }

    /// Puts codes and a Dequantize node for each use in the place of the expression.
    fn write(self, model: &mut Model, graph: GraphId, value: ValueId, users: &[User], outcome: &mut Outcome) {
        let Self { name, dims, codes, format, granularity, qparams, scale: source, offsets } = self;
        let dtype = DataType::from(format);
        if users.iter().any(|u| matches!(u, User::Output { .. })) {
            outcome.skipped(model.value(value).name(), Reason::IsGraphOutput { what: Operand::Output });
            return;
        }
        let scale_dims = granularity.scale_dims(&dims);
        let codes = Tensor::new(dtype, &dims, pack::pack(&codes, format.bits()));
        let codes = model.add_initializer(graph, &format!("{name}_quantized"), codes);
        let scale = Tensor::from_f32(&scale_dims, &qparams.scales);
        let there = source.filter(|&v| {
            let here = model.graph(graph).initializers().contains(&v);
            here && model.constant(v).is_some_and(|t| t.dims() == scale_dims && t.raw() == scale.raw())
        });
        let scale = there.unwrap_or_else(|| model.add_initializer(graph, &format!("{name}_scale"), scale));
        let mut inputs = vec![codes, scale];
        if format != Format::Int32 {
            let zero = Tensor::new(dtype, &scale_dims, pack::pack(&qparams.zero_points, format.bits()));
            inputs.push(model.add_initializer(graph, &format!("{name}_zero_point"), zero));
        }
        let shift = (!offsets.is_empty()).then(|| Shift::store(model, graph, &name, (&dims, &granularity), &offsets));
        let shift = match shift.transpose() {
            Ok(shift) => shift,
            Err(why) => return outcome.skipped(name, why),
        };
        let shape: Vec<Option<usize>> = dims.iter().copied().map(Some).collect();
        for &user in users {
            let User::Node { node, .. } = user else { continue };
            let node = model.ancestor_in(graph, node).unwrap_or(node);
            let back = NewNode::new(
                "DequantizeLinear",
                format!("{name}_DequantizeLinear"),
                &inputs,
                &[&format!("{name}_dequantized")],
            );
            let back = model.insert(Place::Before(node), along(back, &granularity));
            let Some(back) = model.node(back).output(0) else { continue };
            model.set_type(back, tensor_type(DataType::Float, Some(&shape)));
            let back = shift.map_or(back, |shift| shift.add(model, &name, back));
            model.set_user(user, back);
        }
        let ir = dtype.quantizers_since().map_or(0, |(_, ir)| ir);
        if ir > model.ir_version() {
            model.set_ir_version(ir);
        }
        let scales = granularity;
        outcome.changed(
            name,
            if offsets.is_empty() {
                Change::StoredAs { dtype, scales }
            } else {
                Change::StoredWithOffsets { dtype, scales }
            },
        );
    }
}

/// The name of the largest float constant behind a value: the weight, where the rest are scales.
fn source_name(model: &Model, constants: &Constants, value: ValueId) -> String {
    let slice = constants.slice(model, value).unwrap_or_default();
    let inputs = slice.iter().flat_map(|&n| model.node(n).inputs().iter().flatten().copied());
    let floats = inputs.filter_map(|v| model.constant(v).filter(|t| t.dtype().is_float()).map(|t| (t.len(), v)));
    let largest = floats.max_by_key(|&(len, v)| (len, std::cmp::Reverse(v)));
    model.value(largest.map_or(value, |(_, v)| v)).name().to_owned()
}

impl Product {
    /// Reads the product at the end of a quantizer.
    fn of(model: &Model, constants: &mut Constants, value: ValueId) -> Result<Self, Reason> {
        let node = model.producer(value).ok_or(Reason::NotAProduct)?;
        let slot = model.node(node);
        let input = |index: usize| slot.input(index);
        let unknown = || Reason::NotComputable { what: Operand::Output };
        let mut get = |v: Option<ValueId>| v.and_then(|v| constants.value(model, v));
        let result = get(Some(value)).ok_or_else(unknown)?;
        let dims = result.dims();
        if slot.is("Add") {
            return Self::of_sum(model, constants, node);
        }
        if slot.is("DequantizeLinear") {
            return Self::of_dequantizer(model, node, &mut get);
        }
        let (first, second) = (get(input(0)).ok_or_else(unknown)?, get(input(1)).ok_or_else(unknown)?);
        if let Some(other) = [&first, &second].into_iter().find(|t| t.dtype() != DataType::Float) {
            return Err(Reason::wrong_type(Operand::Operand, other.dtype(), "float"));
        }
        let divides = slot.is("Div");
        // The scales are the smaller tensor; the other way round only where both are as large.
        let swap = !divides && first.len() < second.len();
        let (at, numbers, scales) = if swap { (1, second, first) } else { (0, first, second) };
        let mut scales_read = scales.to_f32().ok_or_else(unknown)?;
        let numbers_value = input(at).ok_or_else(unknown)?;
        let entry = sources(&scales.dims(), &dims);
        let spread = sources(&numbers.dims(), &dims);
        let values = numbers.to_f32().ok_or_else(unknown)?;
        let numbers: Vec<f32> = spread.iter().map(|&i| values[i]).collect();
        if divides {
            scales_read = inverted(&numbers, &scales_read, &entry)?;
        }
        if let Some(bad) = scales_read.iter().find(|s| !(s.is_normal() && **s > 0.0)) {
            return Err(Reason::OutOfRange {
                what: "scale".into(),
                value: *bad,
                wanted: "a positive normal number".into(),
            });
        }
        let mut zero_points = vec![0; scales_read.len()];
        let mut offset = false;
        if let Some(sub) = model.producer(numbers_value).filter(|&n| model.node(n).is("Sub"))
            && let Some(zero) = get(model.node(sub).input(1)).and_then(|t| t.to_f32().map(|v| (t.dims(), v)))
            && let Some(found) = zero_points_of(&zero.0, &zero.1, &dims, &entry, scales_read.len())
        {
            zero_points = found;
            offset = true;
        }
        let bounds = bounds(model, constants, numbers_value, offset);
        let mut codes = Vec::with_capacity(numbers.len());
        for (&number, &entry) in numbers.iter().zip(&entry) {
            if number.fract() != 0.0 || number.abs() > 2_147_483_520.0 {
                return Err(Reason::OutOfRange {
                    what: "value before scaling".into(),
                    value: number,
                    wanted: "a whole number".into(),
                });
            }
            codes.push(number as i64 + i64::from(zero_points[entry]));
        }
        let source = input(1 - at).filter(|&v| !divides && model.constant(v).is_some());
        Ok(Self {
            codes,
            dims,
            scales: scales_read,
            source,
            entry,
            zero_points,
            stored: None,
            bounds,
            offsets: Vec::new(),
        })
    }

    /// A product to which a float is added, the same one wherever the scale is the same.
    fn of_sum(model: &Model, constants: &mut Constants, node: NodeId) -> Result<Self, Reason> {
        let slot = model.node(node);
        let ends = |value: ValueId| {
            let node = model.producer(value).map(|n| model.node(n));
            node.is_some_and(|n| n.is("Mul") || n.is("Div") || n.is("DequantizeLinear"))
        };
        let (Some(a), Some(b)) = (slot.input(0), slot.input(1)) else { return Err(Reason::NotAProduct) };
        let mut refused = Reason::NotAProduct;
        for (scaled, offset) in [(a, b), (b, a)] {
            if !ends(scaled) {
                continue;
            }
            match Self::of(model, constants, scaled) {
                Ok(product) => {
                    let offset =
                        constants.value(model, offset).ok_or(Reason::NotComputable { what: Operand::Output })?;
                    return product.shifted(&offset);
                }
                Err(why) => refused = why,
            }
        }
        Err(refused)
    }

    /// The same with a float added to what the codes stand for.
    fn shifted(self, offset: &Tensor) -> Result<Self, Reason> {
        let dims = offset.dims();
        let fits = broadcast(&dims, &self.dims).is_some_and(|sum| sum == self.dims);
        let values = offset.to_f32().filter(|_| fits && offset.dtype() == DataType::Float);
        let values = values.ok_or(Reason::WrongOffsets)?;
        let mut found: Vec<Option<f32>> = vec![None; self.scales.len()];
        for (&entry, from) in self.entry.iter().zip(sources(&dims, &self.dims)) {
            if !same(*found[entry].get_or_insert(values[from]), values[from]) {
                return Err(Reason::WrongOffsets);
            }
        }
        let offsets: Vec<f32> = found.into_iter().map(Option::unwrap_or_default).collect();
        let nothing = offsets.iter().all(|&offset| offset == 0.0);
        Ok(Self { offsets: if nothing { Vec::new() } else { offsets }, ..self })
    }

    fn of_dequantizer(
        model: &Model,
        node: NodeId,
        get: &mut impl FnMut(Option<ValueId>) -> Option<Tensor>,
    ) -> Result<Self, Reason> {
        let slot = model.node(node);
        let unknown = || Reason::NotComputable { what: Operand::Output };
        let codes = get(slot.input(0)).ok_or_else(unknown)?;
        let scale = get(slot.input(1)).ok_or_else(unknown)?;
        let source = slot.input(1).filter(|&v| model.constant(v).is_some());
        let zero = slot.input(2).and_then(|v| get(Some(v)));
        let dims = codes.dims();
        let format = codes
            .dtype()
            .format()
            .ok_or_else(|| Reason::NotQuantizedType { what: Operand::QuantizedData, found: codes.dtype() })?;
        if scale.dtype() != DataType::Float {
            return Err(Reason::wrong_type(Operand::Scale, scale.dtype(), "float"));
        }
        let granularity = super::support::granularity::granularity(model, node, &dims, &scale.dims())?;
        let scales = scale.to_f32().ok_or_else(unknown)?;
        let zero_points = zero.map_or_else(|| vec![0; scales.len()], |z| pack::unpack(&z.raw(), &format, z.len()));
        if zero_points.len() != scales.len() {
            return Err(Reason::WrongCount { what: "zero points".into(), per: "scale".into() });
        }
        let entry = granularity.entries(&dims)?;
        let codes = pack::unpack(&codes.raw(), &format, codes.len()).into_iter().map(i64::from).collect();
        let stored = Some(DataType::from(format));
        Ok(Self { codes, dims, scales, source, entry, zero_points, stored, bounds: None, offsets: Vec::new() })
    }

    /// The narrowest format that holds what can occur.
    fn format(&self, codes: &[i64], dims: &[usize]) -> Result<Format, Reason> {
        let zeros = self.zero_points.iter().map(|&z| i64::from(z));
        let (low, high) = codes.iter().copied().chain(zeros).fold((0, 0), |(l, h), c| (l.min(c), h.max(c)));
        if let Some(stored) = self.stored.and_then(DataType::format) {
            return Ok(stored);
        }
        let declared = self.bounds.filter(|&(l, h)| l <= low as f32 && h >= high as f32);
        let (low, high) = declared.map_or((low, high), |(l, h)| (l as i64, h as i64));
        let formats = [Format::Int4, Format::Uint4, Format::Int8, Format::Uint8, Format::Int16, Format::Uint16];
        let holds = |f: &Format| {
            let (l, h) = f.range();
            i64::from(l) <= low && high <= i64::from(h)
        };
        // Without a Clip nothing says that the codes are few: eight bits are what quantizers have. Kernels of convolutions
        // have none for less.
        let wide = |f: &Format| f.bits() >= 8 || (declared.is_some() && dims.len() == 2);
        let fitting = formats.into_iter().find(|f| holds(f) && wide(f));
        let zero = self.zero_points.iter().all(|&z| z == 0);
        // A bias, whose codes nothing bounds.
        let sums = declared.is_none() && dims.len() == 1 && zero;
        match fitting.filter(|_| !sums) {
            Some(format) => Ok(format),
            None if zero && low >= i64::from(i32::MIN) && high <= i64::from(i32::MAX) => Ok(Format::Int32),
            None => Err(Reason::NoFormat { low, high }),
        }
    }
}

/// Scales that multiply to what division by `divisors` gives for every number.
fn inverted(numbers: &[f32], divisors: &[f32], entry: &[usize]) -> Result<Vec<f32>, Reason> {
    let fits = |scale: f32, e: usize| {
        let divisor = divisors[e];
        numbers.iter().zip(entry).filter(|&(_, &at)| at == e).all(|(n, _)| same(n / divisor, n * scale))
    };
    let one = |(e, divisor): (usize, &f32)| {
        let near = 1.0 / divisor;
        let around = [near, near.next_down(), near.next_up()];
        around.into_iter().find(|&s| s.is_normal() && fits(s, e))
    };
    let found: Option<Vec<f32>> = divisors.iter().enumerate().map(one).collect();
    found.ok_or(Reason::NoScale)
}

/// The zero point at each scale, if it is a whole number and there is one for each scale.
fn zero_points_of(own: &[usize], values: &[f32], dims: &[usize], entry: &[usize], scales: usize) -> Option<Vec<i32>> {
    if own.len() > dims.len() {
        return None;
    }
    let mut found: Vec<Option<i32>> = vec![None; scales];
    for (&e, from) in entry.iter().zip(sources(own, dims)) {
        let value = *values.get(from)?;
        if value.fract() != 0.0 || value.abs() > 65535.0 {
            return None;
        }
        let value = value as i32;
        if *found[e].get_or_insert(value) != value {
            return None;
        }
    }
    found.into_iter().map(|z| Some(z.unwrap_or(0))).collect()
}

/// The bounds of the Clip, or Min and Max, between the rounding and `value`, where nothing moves the codes in between but
/// the zero point that is taken off last.
fn bounds(model: &Model, constants: &mut Constants, value: ValueId, offset: bool) -> Option<(f32, f32)> {
    let mut at = value;
    let mut pending = offset;
    let (mut low, mut high) = (None, None);
    loop {
        let node = model.producer(at)?;
        let slot = model.node(node);
        let scalar = |constants: &mut Constants, v: Option<ValueId>| -> Option<f32> {
            let tensor = constants.value(model, v?).filter(|t| t.len() == 1)?;
            tensor
                .to_f32()
                .or_else(|| tensor.to_i64().map(|v| v.into_iter().map(|v| v as f32).collect()))?
                .first()
                .copied()
        };
        match slot.op_type() {
            "Sub" if pending => pending = false,
            "Cast" | "CastLike" | "Reshape" | "Identity" | "Transpose" => {}
            "Clip" if !pending => {
                low = low.or(Clip::of(slot).and_then(|clip| clip.min)).or_else(|| scalar(constants, slot.input(1)));
                high = high.or(Clip::of(slot).and_then(|clip| clip.max)).or_else(|| scalar(constants, slot.input(2)));
            }
            "Min" if !pending => high = high.or_else(|| scalar(constants, slot.input(1))),
            "Max" if !pending => low = low.or_else(|| scalar(constants, slot.input(1))),
            _ => return None,
        }
        if let (Some(low), Some(high)) = (low, high) {
            return (f32::fract(low) == 0.0 && f32::fract(high) == 0.0).then_some((low, high));
        }
        at = slot.input(0)?;
    }
}

/// The granularity in which each element has the entry that `entries` says, of `count` entries.
fn granularity(dims: &[usize], entries: &[i64], count: usize) -> Option<Granularity> {
    if count == 1 {
        return Some(Granularity::PerTensor);
    }
    let distinct = entries.iter().collect::<BTreeSet<_>>().len();
    let fits = |granularity: &Granularity| {
        let own: usize = granularity.scale_dims(dims).iter().product();
        if own != distinct {
            return false;
        }
        let mut to: Vec<Option<i64>> = vec![None; own];
        let own = granularity.entries(dims);
        own.is_ok_and(|own| own.iter().zip(entries).all(|(&own, &given)| *to[own].get_or_insert(given) == given))
    };
    let channels = (0..dims.len()).filter(|&a| dims[a] == count).map(|axis| Granularity::PerChannel { axis });
    // Groups along an axis: as many elements as share an entry, or fewer where a group was cut.
    let first = *entries.first()?;
    let groups = (0..dims.len()).rev().filter_map(|axis| {
        let inner: usize = dims[axis + 1..].iter().product();
        let size = (0..dims[axis]).take_while(|n| entries.get(n * inner) == Some(&first)).count();
        (size > 0).then_some(Granularity::PerGroup { axis, size })
    });
    channels.chain(groups).find(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is read of an expression, a fold that would not give back every element is refused.
    #[test]
    fn a_fold_gives_back_every_element() {
        let check = |codes: [i32; 3], offsets: &[f32], result: [f32; 3], wanted: Result<(), Reason>| {
            let folded = Folded {
                name: "w".to_owned(),
                dims: vec![3],
                codes: codes.to_vec(),
                format: Format::Int8,
                granularity: Granularity::PerTensor,
                qparams: QParams { scales: vec![0.5], zero_points: vec![1] },
                scale: None,
                offsets: offsets.to_vec(),
            };
            assert_eq!(folded.prove(&Tensor::from_f32(&[3], &result)), wanted, "{codes:?} {offsets:?}");
        };
        let other = |element, found, wanted| Err(Reason::NotExact { element, found, wanted });
        check([1, 2, -3], &[], [0.0, 0.5, -2.0], Ok(()));
        check([1, 2, -3], &[], [-0.0, 0.5, -2.0], Ok(()));
        check([1, 2, -2], &[], [0.0, 0.5, -2.0], other(2, -1.5, -2.0));
        check([1, 2, -3], &[], [0.0, 0.5f32.next_up(), -2.0], other(1, 0.5, 0.5f32.next_up()));
        check([1, 2, -3], &[0.25], [0.25, 0.75, -1.75], Ok(()));
        check([1, 2, -3], &[0.25], [0.0, 0.75, -1.75], other(0, 0.25, 0.0));
    }
}
