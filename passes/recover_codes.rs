//! Finds the codes of weights whose fake quantizer an exporter folded to plain floats.
//!
//! PyTorch's exporter computes whatever is constant, and a fake quantized weight is. What it leaves is a float matrix whose
//! values all lie on a grid: in each group along the reduced axis they are few multiples of one scale. Where that is so
//! exactly, for every element, the matrix is stored as int4 (or int8) codes and those scales. The scale that the model was
//! trained with is not in the file any more, but any that gives the same floats computes the same.
//!
//! Only the right operands of MatMul and Gemm and the weights of Conv are looked at, and only where there is enough of them
//! that a grid is no coincidence.

use rayon::prelude::*;

use super::raise_opset::raise;
use super::support::granularity::along;
use super::{Change, Context, Outcome, Pass};
use crate::error::Result;
use crate::ir::view::Gemm;
use crate::ir::{Model, NewNode, NodeId, Place, Tensor, User, ValueId, tensor_type};
use crate::numerics::{Format, Granularity, pack};
use crate::onnx::DataType;
use crate::reason::Reason;

/// Sizes of groups that are tried, largest first; then whole channels.
const GROUPS: [usize; 5] = [256, 128, 64, 32, 16];

/// Elements that a weight must have.
const ENOUGH: usize = 128;

/// Of the largest code of a format, the part that no group may stay below: a grid that is far finer than the values is
/// one that any values lie on.
const USED: i32 = 2;

/// See the module.
#[derive(Debug)]
pub struct RecoverCodes;

impl Pass for RecoverCodes {
    fn name(&self) -> &'static str {
        "recover-codes"
    }

    fn run(&self, model: &mut Model, _: &Context<'_>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let candidates = candidates(model);
        let found: Vec<(ValueId, Vec<User>, Grid)> = candidates
            .into_par_iter()
            .filter_map(|(value, users, axis)| Some((value, users, Grid::of(model.constant(value)?, axis)?)))
            .collect();
        let need = found.iter().filter_map(|(.., c)| c.needs()).max();
        if need.is_some_and(|need| model.opset().is_some_and(|v| v < need)) {
            // On a copy: a model that cannot be raised keeps its floats.
            let mut raised = model.clone();
            if let Err(why) = raise(&mut raised, need.unwrap_or(0)) {
                for (value, ..) in &found {
                    outcome.skipped(
                        model.value(*value).name(),
                        Reason::CannotRaise {
                            what: "storing its grid".into(),
                            opset: need.unwrap_or(0),
                            error: why.message().into(),
                        },
                    );
                }
                return Ok(outcome);
            }
            let from = model.opset().unwrap_or(0);
            outcome.changed("model", Change::Opset { from, to: need.unwrap_or(0) });
            let users: Vec<_> = candidates_of(&raised, &found);
            *model = raised;
            for ((value, _, codes), users) in found.into_iter().zip(users) {
                codes.write(model, value, &users, &mut outcome);
            }
            return Ok(outcome);
        }
        for (value, users, codes) in found {
            codes.write(model, value, &users, &mut outcome);
        }
        Ok(outcome)
    }
}

/// The uses of weights as operands, in a model whose nodes may have been replaced.
fn candidates_of(model: &Model, found: &[(ValueId, Vec<User>, Grid)]) -> Vec<Vec<User>> {
    let now = candidates(model);
    let users = |value: ValueId| now.iter().find(|(v, ..)| *v == value).map(|(_, users, _)| users.clone());
    found.iter().map(|(value, ..)| users(*value).unwrap_or_default()).collect()
}

/// Float constants that are weights everywhere they are read, with the axis that is summed over.
fn candidates(model: &Model) -> Vec<(ValueId, Vec<User>, usize)> {
    let main = model.main();
    let mut found = Vec::new();
    for &value in model.graph(main).initializers() {
        let Some(tensor) = model.constant(value) else { continue };
        if tensor.dtype() != DataType::Float || tensor.len() < ENOUGH {
            continue;
        }
        let users = model.value(value).users().to_vec();
        let axes: Option<Vec<usize>> = users
            .iter()
            .map(|user| match *user {
                User::Node { node, input: 1 } if model.node(node).graph() == Some(main) => reduced(model, node, tensor),
                _ => None,
            })
            .collect();
        if let Some(axes) = axes
            && let Some(&axis) = axes.first()
            && axes.iter().all(|&a| a == axis)
        {
            found.push((value, users, axis));
        }
    }
    found
}

/// The axis of the weight of a node that is summed over.
fn reduced(model: &Model, node: NodeId, weight: &Tensor) -> Option<usize> {
    let (slot, rank) = (model.node(node), weight.dims().len());
    match slot.op_type() {
        _ if !slot.domain().is_empty() => None,
        "MatMul" if rank == 2 => Some(0),
        "Gemm" if rank == 2 => Some(usize::from(Gemm::of(slot).is_some_and(|gemm| gemm.trans_b))),
        "Conv" if rank >= 3 => Some(1),
        _ => None,
    }
}

/// Codes and scales that give a float tensor exactly.
struct Grid {
    dims: Vec<usize>,
    codes: Vec<i32>,
    scales: Vec<f32>,
    format: Format,
    granularity: Granularity,
}

impl Grid {
    fn of(tensor: &Tensor, axis: usize) -> Option<Self> {
        let (dims, values) = (tensor.dims(), tensor.to_f32()?);
        if values.iter().any(|v| !v.is_finite()) {
            return None;
        }
        let matrix = dims.len() == 2;
        let groups = GROUPS.into_iter().filter(|&g| matrix && dims[axis].is_multiple_of(g) && dims[axis] > g);
        let whole = Granularity::PerChannel { axis: if matrix { 1 - axis } else { 0 } };
        let shares: Vec<Granularity> =
            std::iter::once(whole).chain(groups.map(|size| Granularity::PerGroup { axis, size })).collect();
        for format in [Format::Int4, Format::Int8] {
            if format == Format::Int4 && !matrix {
                continue;
            }
            for granularity in &shares {
                if let Some((codes, scales)) = on_grid(&values, &dims, granularity, format) {
                    return Some(Self { dims, codes, scales, format, granularity: *granularity });
                }
            }
        }
        None
    }

    fn needs(&self) -> Option<i64> {
        let groups = matches!(self.granularity, Granularity::PerGroup { .. }).then_some(21);
        groups.or(DataType::from(self.format).quantizers_since().map(|(opset, _)| opset)).or(Some(13))
    }

    fn write(self, model: &mut Model, value: ValueId, users: &[User], outcome: &mut Outcome) {
        let Self { dims, codes, scales, format, granularity } = self;
        let (graph, dtype) = (model.main(), DataType::from(format));
        let name = model.value(value).name().to_owned();
        let scale_dims = granularity.scale_dims(&dims);
        let codes = Tensor::new(dtype, &dims, pack::pack(&codes, format.bits()));
        let zero = pack::pack(&vec![0; scales.len()], format.bits());
        let inputs = [
            model.add_initializer(graph, &format!("{name}_quantized"), codes),
            model.add_initializer(graph, &format!("{name}_scale"), Tensor::from_f32(&scale_dims, &scales)),
            model.add_initializer(graph, &format!("{name}_zero_point"), Tensor::new(dtype, &scale_dims, zero)),
        ];
        let shape: Vec<Option<usize>> = dims.iter().copied().map(Some).collect();
        for &user in users {
            let User::Node { node, .. } = user else { continue };
            let output = format!("{name}_dequantized");
            let back = NewNode::new("DequantizeLinear", format!("{name}_DequantizeLinear"), &inputs, &[&output]);
            let back = model.insert(Place::Before(node), along(back, &granularity));
            let Some(back) = model.node(back).output(0) else { continue };
            model.set_type(back, tensor_type(DataType::Float, Some(&shape)));
            model.set_user(user, back);
        }
        if let Some((_, ir)) = dtype.quantizers_since() {
            model.set_ir_version(model.ir_version().max(ir));
        }
        outcome.changed(name, Change::Recovered { dtype, scales: granularity });
    }
}

/// Codes and scales, if every value is a code times its scale, to the bit.
fn on_grid(values: &[f32], dims: &[usize], granularity: &Granularity, format: Format) -> Option<(Vec<i32>, Vec<f32>)> {
    let entries = granularity.entries(dims).ok()?;
    let count: usize = granularity.scale_dims(dims).iter().product();
    let mut members: Vec<Vec<f32>> = vec![Vec::new(); count];
    for (&value, &entry) in values.iter().zip(&entries) {
        members[entry].push(value);
    }
    let mut scales = Vec::with_capacity(count);
    for members in &members {
        scales.push(step(members, format)?);
    }
    // A tensor of zeros, or one that hardly uses its codes, was not quantized by anybody.
    let mut codes = Vec::with_capacity(values.len());
    for (value, &entry) in values.iter().zip(&entries) {
        codes.push((value / scales[entry]).round_ties_even() as i32);
    }
    let largest = codes.iter().map(|c| c.abs()).max().unwrap_or(0);
    (largest > format.range().1 / USED).then_some((codes, scales))
}

/// The largest scale of which all values are multiples by codes of the format.
fn step(values: &[f32], format: Format) -> Option<f32> {
    let (low, high) = format.range();
    let largest = values.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(0.0);
    if largest == 0.0 {
        return Some(1.0);
    }
    let fits = |scale: f32| {
        scale.is_normal()
            && values.iter().all(|&value| {
                let code = (value / scale).round_ties_even();
                code >= low as f32 && code <= high as f32 && super::support::evaluate::same(code * scale, value)
            })
    };
    let most = if largest < 0.0 { -low } else { high };
    (1..=most).find_map(|code| {
        let near = largest.abs() / code as f32;
        let mut around = vec![near];
        let (mut down, mut up) = (near, near);
        for _ in 0..2 {
            (down, up) = (down.next_down(), up.next_up());
            around.extend([down, up]);
        }
        around.into_iter().find(|&scale| fits(scale))
    })
}
