//! A DequantizeLinear of a constant with a float added to each group: zero points between codes, in standard operators.
//!
//! ```text
//! DequantizeLinear [K, N] -> Reshape [K / g, g, N] -> Add [K / g, 1, N] -> Reshape [K, N]
//! ```
//!
//! Where scales run along an axis, or there is one, the Add stands alone.

use super::qdq::{behind_exchanges, find_dequantized};
use crate::ir::{GraphId, Model, NewNode, NodeId, Place, Tensor, ValueId};
use crate::numerics::Granularity;
use crate::passes::support::granularity::granularity;
use crate::reason::Reason;

/// What is added to a constant, as initializers.
#[derive(Clone, Copy, Debug)]
pub struct Shift {
    offsets: ValueId,
    /// The shape with an axis for groups, and the shape without; where there are groups.
    shapes: Option<[ValueId; 2]>,
}

/// A constant as [`Shift::add`] writes it, or without anything added.
#[derive(Clone, Debug)]
pub struct Shifted {
    /// The DequantizeLinear.
    pub dequantize: NodeId,
    /// Whether a Transpose of a matrix stands behind it.
    pub exchanged: bool,
    /// What is added, one for each scale, in the order of the scales.
    pub offsets: Option<ValueId>,
}

/// The shape of a tensor with the axis of its groups cut in two, and that of a number for each group.
///
/// # Errors
/// Groups that leave a rest.
pub fn shapes(dims: &[usize], granularity: &Granularity) -> Result<[Vec<usize>; 2], Reason> {
    let mut cut = dims.to_vec();
    let mut offsets = vec![1; dims.len()];
    match *granularity {
        Granularity::PerTensor => offsets.clear(),
        Granularity::PerChannel { axis } => offsets[axis] = dims[axis],
        Granularity::PerGroup { axis, size } => {
            if !dims[axis].is_multiple_of(size) {
                return Err(Reason::RaggedGroups { length: dims[axis], size });
            }
            cut.splice(axis..=axis, [dims[axis] / size, size]);
            offsets.clone_from(&cut);
            offsets[axis + 1] = 1;
        }
    }
    Ok([cut, offsets])
}

impl Shift {
    /// Whether there is a way to write it.
    ///
    /// # Errors
    /// Groups that leave a rest.
    pub fn check(dims: &[usize], granularity: &Granularity) -> Result<(), Reason> {
        shapes(dims, granularity).map(drop)
    }

    /// Stores what is to be added: a number for each scale of a constant of shape `dims`.
    ///
    /// # Errors
    /// As [`Shift::check`].
    pub fn store(
        model: &mut Model,
        graph: GraphId,
        name: &str,
        (dims, granularity): (&[usize], &Granularity),
        offsets: &[f32],
    ) -> Result<Self, Reason> {
        let [cut, own] = shapes(dims, granularity)?;
        let offsets = model.add_initializer(graph, &format!("{name}_offset"), Tensor::from_f32(&own, offsets));
        let mut shape = |what: &str, dims: &[usize]| {
            let dims: Vec<i64> = dims.iter().map(|&dim| dim as i64).collect();
            model.add_initializer(graph, &format!("{name}_{what}"), Tensor::from_i64(&[dims.len()], &dims))
        };
        let grouped = matches!(granularity, Granularity::PerGroup { .. });
        let shapes = grouped.then(|| [shape("grouped_shape", &cut), shape("shape", dims)]);
        Ok(Self { offsets, shapes })
    }

    /// Adds it to `value` behind the node that makes it; the result.
    pub fn add(&self, model: &mut Model, name: &str, value: ValueId) -> ValueId {
        let mut at = value;
        let mut place = model.producer(value).map(Place::After);
        let mut node = |model: &mut Model, op: &str, other: ValueId, what: &str| {
            let Some(here) = place else { return };
            let node = NewNode::new(op, format!("{name}_{what}_{op}"), &[at, other], &[&format!("{name}_{what}")]);
            let id = model.insert(here, node);
            place = Some(Place::After(id));
            at = model.node(id).output(0).unwrap_or(at);
        };
        if let Some([cut, _]) = self.shapes {
            node(model, "Reshape", cut, "grouped");
        }
        node(model, "Add", self.offsets, "shifted");
        if let Some([_, whole]) = self.shapes {
            node(model, "Reshape", whole, "shifted_whole");
        }
        at
    }
}

/// The constant behind a value, with what is added to it.
#[must_use]
pub fn find_shifted(model: &Model, value: ValueId) -> Option<Shifted> {
    if let Some((dequantize, exchanged)) = find_dequantized(model, value) {
        return Some(Shifted { dequantize, exchanged, offsets: None });
    }
    let (value, exchanges) = behind_exchanges(model, value);
    let node = model.producer(value)?;
    let at = model.node(node);
    let shape =
        |node: NodeId| model.node(node).is("Reshape").then(|| model.constant_input(node, 1)?.to_i64()).flatten();
    let (add, whole) = match shape(node) {
        Some(whole) => (model.producer(at.input(0)?)?, Some(whole)),
        None => (node, None),
    };
    let sum = model.node(add);
    if !sum.is("Add") {
        return None;
    }
    let (mut inner, offsets) = (sum.input(0)?, sum.input(1)?);
    let cut = model.producer(inner).and_then(shape);
    if cut.is_some() {
        inner = model.node(model.producer(inner)?).input(0)?;
    }
    let (dequantize, false) = find_dequantized(model, inner)? else { return None };
    let dims = model.constant_input(dequantize, 0)?.dims();
    let scales = model.constant_input(dequantize, 1)?;
    let granularity = granularity(model, dequantize, &dims, &scales.dims()).ok()?;
    let [wanted, own] = shapes(&dims, &granularity).ok()?;
    let alike = |shape: Option<Vec<i64>>, dims: &[usize]| {
        let grouped = matches!(granularity, Granularity::PerGroup { .. });
        shape.map_or(!grouped, |shape| grouped && shape.iter().copied().eq(dims.iter().map(|&dim| dim as i64)))
    };
    let turned = exchanges == 0 || dims.len() == 2;
    let fits = turned && alike(whole, &dims) && alike(cut, &wanted) && model.constant(offsets)?.dims() == own;
    fits.then_some(Shifted { dequantize, exchanged: exchanges % 2 == 1, offsets: Some(offsets) })
}
