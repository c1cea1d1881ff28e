//! Evaluation of constant nodes without a runtime: what only moves elements, or computes what every runtime computes
//! to the same bits.
//!
//! Whatever the ONNX standard leaves open (integer overflow, float to integer out of range, division by zero) is not
//! evaluated. Neither are operators in the form they had before opset 7, when broadcasting was an attribute.

use crate::ir::{Model, Node, NodeId, Tensor};
use crate::onnx::DataType;
use crate::passes::Evaluate;

/// No runtime takes tensors of more dimensions.
const MAX_RANK: usize = 64;

/// See the [module](self). Asked before the runtime's evaluator, which knows more operators and is not in every build; alone it
/// serves as [`Context::evaluate`](crate::passes::Context::evaluate).
///
/// The caller bounds the size of the result.
pub struct Exact;

impl Evaluate for Exact {
    fn evaluate(&self, model: &Model, node: NodeId, inputs: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        let slot = model.node(node);
        if !slot.domain().is_empty() {
            return None;
        }
        let call = Call { node: slot, inputs, opset: model.opset_in(slot.graph()?)? };
        Some(vec![call.result()?])
    }
}

/// A list that is given twice, or not in integers.
struct Unreadable;

struct Call<'a> {
    node: &'a Node,
    inputs: &'a [Option<Tensor>],
    opset: i64,
}

impl Call<'_> {
    fn result(&self) -> Option<Tensor> {
        let first = || self.input(0);
        match self.node.op_type() {
            "Identity" => first().cloned(),
            "Cast" => cast(first()?, DataType::from_code(i32::try_from(self.node.int("to")?).ok()?)?),
            "Reshape" => self.reshape(),
            "Squeeze" => self.squeeze(),
            "Unsqueeze" => self.unsqueeze(),
            "Flatten" => self.flatten(),
            "Transpose" => self.transpose(),
            "Gather" => self.gather(),
            "Slice" => self.slice(),
            "Concat" => self.concat(),
            "ConstantOfShape" => self.constant_of_shape(),
            "Add" | "Sub" | "Mul" | "Div" => self.arithmetic(),
            "Equal" => self.equal(),
            "Not" => {
                let bits: Vec<u8> = bool_bytes(first()?)?.iter().map(|&b| u8::from(b == 0)).collect();
                tensor(DataType::Bool, &first()?.dims(), bits)
            }
            _ => None,
        }
    }

    fn input(&self, index: usize) -> Option<&Tensor> {
        self.inputs.get(index)?.as_ref()
    }

    /// A list of integers that was an attribute before it became an input; `Ok(None)` if it is left out.
    fn ints(&self, name: &str, index: usize) -> Result<Option<Vec<i64>>, Unreadable> {
        match (self.node.ints(name), self.input(index)) {
            (Some(values), None) => Ok(Some(values.to_vec())),
            (None, Some(tensor)) => tensor.to_i64().map(Some).ok_or(Unreadable),
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(Unreadable),
        }
    }

    fn reshape(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let wanted = self.input(1)?.to_i64()?;
        let dims = data.dims();
        let keep_zero = self.node.int("allowzero").unwrap_or(0) != 0;
        let mut shape = Vec::with_capacity(wanted.len());
        let mut open = None;
        for (at, &dim) in wanted.iter().enumerate() {
            shape.push(match dim {
                -1 if open.is_none() => {
                    open = Some(at);
                    1
                }
                0 if !keep_zero => *dims.get(at)?,
                dim => usize::try_from(dim).ok()?,
            });
        }
        let known = product(&shape)?;
        if let Some(at) = open {
            if known == 0 || !data.len().is_multiple_of(known) {
                return None;
            }
            shape[at] = data.len() / known;
        }
        reshaped(data, &shape)
    }

    fn squeeze(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let dims = data.dims();
        let shape: Vec<usize> = match self.ints("axes", 1).ok()? {
            None => dims.iter().copied().filter(|&d| d != 1).collect(),
            Some(axes) => {
                let axes = axes.into_iter().map(|a| axis(a, dims.len())).collect::<Option<Vec<_>>>()?;
                if axes.iter().any(|&a| dims[a] != 1) {
                    return None;
                }
                dims.iter().enumerate().filter(|(at, _)| !axes.contains(at)).map(|(_, &d)| d).collect()
            }
        };
        reshaped(data, &shape)
    }

    fn unsqueeze(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let axes = self.ints("axes", 1).ok()??;
        let rank = data.dims().len() + axes.len();
        if rank > MAX_RANK {
            return None;
        }
        let axes = axes.into_iter().map(|a| axis(a, rank)).collect::<Option<Vec<_>>>()?;
        let mut rest = data.dims().into_iter();
        let shape =
            (0..rank).map(|at| if axes.contains(&at) { Some(1) } else { rest.next() }).collect::<Option<Vec<_>>>()?;
        if rest.next().is_some() {
            return None;
        }
        reshaped(data, &shape)
    }

    fn flatten(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let dims = data.dims();
        let at = self.node.int("axis").unwrap_or(1);
        let at = usize::try_from(if at < 0 { at + dims.len() as i64 } else { at }).ok()?;
        if at > dims.len() {
            return None;
        }
        reshaped(data, &[product(&dims[..at])?, product(&dims[at..])?])
    }

    fn transpose(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let rank = data.dims().len();
        let perm = match self.node.ints("perm") {
            Some(perm) => perm.iter().map(|&p| usize::try_from(p).ok()).collect::<Option<Vec<_>>>()?,
            None => (0..rank).rev().collect(),
        };
        let mut sorted = perm.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..rank) {
            return None;
        }
        transposed(data, &perm)
    }

    fn gather(&self) -> Option<Tensor> {
        let (data, indices) = (self.input(0)?, self.input(1)?);
        let dims = data.dims();
        let at = axis(self.node.int("axis").unwrap_or(0), dims.len())?;
        if !matches!(indices.dtype(), DataType::Int32 | DataType::Int64) {
            return None;
        }
        let picks = indices.to_i64()?.into_iter().map(|i| axis(i, dims[at])).collect::<Option<Vec<usize>>>()?;
        let width = element_bytes(data)?;
        let (outer, inner) = (product(&dims[..at])?, product(&dims[at + 1..])?.checked_mul(width)?);
        let raw = data.raw();
        let mut out = Vec::with_capacity(outer.checked_mul(picks.len())?.checked_mul(inner)?);
        for block in 0..outer {
            for pick in &picks {
                let from = (block * dims[at] + pick) * inner;
                out.extend_from_slice(&raw[from..from + inner]);
            }
        }
        let shape = [&dims[..at], indices.dims().as_slice(), &dims[at + 1..]].concat();
        tensor(data.dtype(), &shape, out)
    }

    fn slice(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let dims = data.dims();
        let starts = self.ints("starts", 1).ok()??;
        let ends = self.ints("ends", 2).ok()??;
        let axes = self.ints("axes", 3).ok()?.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = self.input(4).map_or_else(|| Some(vec![1; starts.len()]), Tensor::to_i64)?;
        if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
            return None;
        }
        let mut picks: Vec<Vec<usize>> = dims.iter().map(|&d| (0..d).collect()).collect();
        let mut seen = vec![false; dims.len()];
        for (((start, end), at), step) in starts.into_iter().zip(ends).zip(axes).zip(steps) {
            let at = axis(at, dims.len())?;
            if std::mem::replace(&mut seen[at], true) {
                return None;
            }
            picks[at] = sliced(dims[at], start, end, step)?;
        }
        let shape: Vec<usize> = picks.iter().map(Vec::len).collect();
        if shape.contains(&0) {
            return tensor(data.dtype(), &shape, Vec::new());
        }
        // Trailing axes that are taken whole move as one block.
        let whole = |at: &usize| picks[*at].iter().copied().eq(0..dims[*at]);
        let cut = (0..dims.len()).rev().find(|at| !whole(at)).map_or(0, |at| at + 1);
        let block = product(&dims[cut..])? * element_bytes(data)?;
        let mut offsets = vec![0usize];
        let mut stride = data.byte_len();
        for (dim, picked) in dims.iter().zip(&picks).take(cut) {
            stride /= dim;
            offsets = offsets.iter().flat_map(|o| picked.iter().map(move |p| o + p * stride)).collect();
        }
        let raw = data.raw();
        let mut out = Vec::with_capacity(offsets.len() * block);
        for from in offsets {
            out.extend_from_slice(&raw[from..from + block]);
        }
        tensor(data.dtype(), &shape, out)
    }

    fn concat(&self) -> Option<Tensor> {
        let parts = self.inputs.iter().map(Option::as_ref).collect::<Option<Vec<&Tensor>>>()?;
        let first = parts.first()?;
        let dims = first.dims();
        let at = axis(self.node.int("axis").unwrap_or(1), dims.len())?;
        let width = element_bytes(first)?;
        let mut shape = dims.clone();
        shape[at] = 0;
        let outer = product(&dims[..at])?;
        let mut rows = Vec::with_capacity(parts.len());
        for part in &parts {
            let own = part.dims();
            if part.dtype() != first.dtype()
                || own.len() != dims.len()
                || (0..dims.len()).any(|i| i != at && own[i] != dims[i])
            {
                return None;
            }
            shape[at] += own[at];
            rows.push((part.raw(), product(&own[at..])?.checked_mul(width)?));
        }
        let mut out = Vec::with_capacity(product(&shape)?.checked_mul(width)?);
        for block in 0..outer {
            for (raw, row) in &rows {
                out.extend_from_slice(&raw[block * row..(block + 1) * row]);
            }
        }
        tensor(first.dtype(), &shape, out)
    }

    fn constant_of_shape(&self) -> Option<Tensor> {
        let dims = self.input(0)?.to_i64()?.into_iter().map(|d| usize::try_from(d).ok()).collect::<Option<Vec<_>>>()?;
        let value = match self.node.attr("value") {
            Some(attr) => Tensor::from_proto(attr.proto().t.clone()?, None).ok()?,
            None => Tensor::from_f32(&[1], &[0.0]),
        };
        element_bytes(&value)?;
        if value.len() != 1 {
            return None;
        }
        tensor(value.dtype(), &dims, value.raw().repeat(product(&dims)?))
    }

    fn arithmetic(&self) -> Option<Tensor> {
        let (a, b) = (self.input(0)?, self.input(1)?);
        if self.opset < 7 || a.dtype() != b.dtype() {
            return None;
        }
        let op = self.node.op_type();
        let float = |x: f32, y: f32| match op {
            "Add" => x + y,
            "Sub" => x - y,
            "Mul" => x * y,
            _ => x / y,
        };
        let integer = |x: i64, y: i64| match op {
            "Add" => x.checked_add(y),
            "Sub" => x.checked_sub(y),
            "Mul" => x.checked_mul(y),
            _ => x.checked_div(y),
        };
        let pairs = Pairs::new(&a.dims(), &b.dims())?;
        let data = match a.dtype() {
            DataType::Float => {
                let (x, y) = (a.to_f32()?, b.to_f32()?);
                pairs.bytes(|i, j| Some(float(x[i], y[j]).to_le_bytes()))?
            }
            DataType::Int64 => {
                let (x, y) = (a.to_i64()?, b.to_i64()?);
                pairs.bytes(|i, j| Some(integer(x[i], y[j])?.to_le_bytes()))?
            }
            DataType::Int32 => {
                let (x, y) = (a.to_i64()?, b.to_i64()?);
                pairs.bytes(|i, j| Some(i32::try_from(integer(x[i], y[j])?).ok()?.to_le_bytes()))?
            }
            _ => return None,
        };
        tensor(a.dtype(), &pairs.dims, data)
    }

    fn equal(&self) -> Option<Tensor> {
        let (a, b) = (self.input(0)?, self.input(1)?);
        if self.opset < 7 || a.dtype() != b.dtype() {
            return None;
        }
        let pairs = Pairs::new(&a.dims(), &b.dims())?;
        let (x, y) = (a.to_i64()?, b.to_i64()?);
        let data = pairs.bytes(|i, j| Some([u8::from(x[i] == y[j])]))?;
        tensor(DataType::Bool, &pairs.dims, data)
    }
}

/// Shape of two operands broadcast against each other.
pub(crate) fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let dim = |dims: &[usize], at: usize| (at + dims.len()).checked_sub(rank).map_or(1, |i| dims[i]);
    (0..rank)
        .map(|at| match (dim(a, at), dim(b, at)) {
            (x, y) if x == y || y == 1 => Some(x),
            (1, y) => Some(y),
            _ => None,
        })
        .collect()
}

/// For each element of a tensor of shape `to`, the position in a tensor of shape `from` that is broadcast to it.
pub(crate) fn sources(from: &[usize], to: &[usize]) -> Vec<usize> {
    let mut found = vec![0usize];
    let mut stride: usize = from.iter().product();
    let lead = to.len() - from.len();
    for (at, &dim) in to.iter().enumerate() {
        let own = if at < lead { 1 } else { from[at - lead] };
        if at >= lead {
            stride = stride.checked_div(own).unwrap_or(0);
        }
        let step = if own == 1 { 0 } else { stride };
        found = found.iter().flat_map(|base| (0..dim).map(move |n| base + n * step)).collect();
    }
    found
}

/// The positions in two operands that meet in each element of their broadcast result.
struct Pairs {
    dims: Vec<usize>,
    steps: Vec<(usize, usize)>,
}

impl Pairs {
    fn new(a: &[usize], b: &[usize]) -> Option<Self> {
        let dims = broadcast(a, b)?;
        product(&dims)?;
        let steps = |own: &[usize]| -> Vec<usize> {
            let mut steps = vec![0; dims.len()];
            let mut stride = 1usize;
            for (step, &dim) in steps.iter_mut().rev().zip(own.iter().rev()) {
                *step = if dim == 1 { 0 } else { stride };
                // Overflows only if a dimension is zero, and then no step is taken.
                stride = stride.wrapping_mul(dim);
            }
            steps
        };
        let steps = steps(a).into_iter().zip(steps(b)).collect();
        Some(Self { dims, steps })
    }

    /// What `element` makes of each pair, in row-major order; `None` if one is `None`.
    fn bytes<const N: usize>(&self, mut element: impl FnMut(usize, usize) -> Option<[u8; N]>) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        self.along(0, (0, 0), &mut |i, j| {
            out.extend(element(i, j)?);
            Some(())
        })?;
        Some(out)
    }

    fn along(&self, axis: usize, at: (usize, usize), f: &mut impl FnMut(usize, usize) -> Option<()>) -> Option<()> {
        let Some(&dim) = self.dims.get(axis) else { return f(at.0, at.1) };
        let step = self.steps[axis];
        (0..dim).try_for_each(|n| self.along(axis + 1, (at.0 + n * step.0, at.1 + n * step.1), f))
    }
}

/// A tensor, unless its dimensions overflow (which an empty one can be made to do).
fn tensor(dtype: DataType, dims: &[usize], data: Vec<u8>) -> Option<Tensor> {
    product(dims)?;
    Some(Tensor::new(dtype, dims, data))
}

fn product(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// An axis or index counted from the end where it is negative.
fn axis(at: i64, len: usize) -> Option<usize> {
    let at = usize::try_from(if at < 0 { at.checked_add(len as i64)? } else { at }).ok()?;
    (at < len).then_some(at)
}

fn reshaped(data: &Tensor, shape: &[usize]) -> Option<Tensor> {
    (product(shape)? == data.len()).then(|| data.clone().reshaped(shape))
}

/// Bytes of one element, for types whose elements are whole bytes.
fn element_bytes(tensor: &Tensor) -> Option<usize> {
    let bits = tensor.dtype().bits()?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn bool_bytes(tensor: &Tensor) -> Option<bytes::Bytes> {
    (tensor.dtype() == DataType::Bool).then(|| tensor.raw())
}

/// The indices that `Slice` picks along a dimension of `len` elements.
fn sliced(len: usize, start: i64, end: i64, step: i64) -> Option<Vec<usize>> {
    let size = i64::try_from(len).ok()?;
    if len == 0 {
        return (step != 0).then(Vec::new);
    }
    let absolute = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
    let (low, high) = if step > 0 { (0, size) } else { (-1, size - 1) };
    let (start, end) = (absolute(start).clamp(0, high), absolute(end).clamp(low, high));
    let mut picks = Vec::new();
    let mut at = start;
    while (step > 0 && at < end) || (step < 0 && at > end) {
        picks.push(usize::try_from(at).ok()?);
        at = at.checked_add(step)?;
    }
    (step != 0).then_some(picks)
}

/// The tensor with its axes permuted; `None` for types whose elements are not whole bytes.
pub(crate) fn transposed(data: &Tensor, perm: &[usize]) -> Option<Tensor> {
    let width = element_bytes(data)?;
    let dims = data.dims();
    if data.is_empty() {
        let shape: Vec<usize> = perm.iter().map(|&p| dims[p]).collect();
        return tensor(data.dtype(), &shape, Vec::new());
    }
    let shape: Vec<usize> = perm.iter().map(|&p| dims[p]).collect();
    let moving = |axes: &mut dyn Iterator<Item = usize>| axes.filter(|&a| dims[a] != 1).collect::<Vec<_>>();
    if moving(&mut (0..dims.len())) == moving(&mut perm.iter().copied()) {
        return Some(data.clone().reshaped(&shape));
    }
    let raw = data.raw();
    let out = match width {
        1 => permute::<1>(&raw, &dims, perm),
        2 => permute::<2>(&raw, &dims, perm),
        4 => permute::<4>(&raw, &dims, perm),
        8 => permute::<8>(&raw, &dims, perm),
        _ => permute::<16>(&raw, &dims, perm),
    };
    tensor(data.dtype(), &shape, out)
}

/// Elements of `N` bytes in the order of the permuted axes.
fn permute<const N: usize>(raw: &[u8], dims: &[usize], perm: &[usize]) -> Vec<u8> {
    /// Columns that are written together, so that a cache line that was read is used up before it is dropped.
    const TILE: usize = 16;
    let (source, _) = raw.as_chunks::<N>();
    let mut strides = vec![1; dims.len()];
    for at in (1..dims.len()).rev() {
        strides[at - 1] = strides[at] * dims[at];
    }
    let mut out = vec![[0u8; N]; source.len()];
    let shape: Vec<usize> = perm.iter().map(|&p| dims[p]).collect();
    let steps: Vec<usize> = perm.iter().map(|&p| strides[p]).collect();
    let [outer @ .., rows, columns] = shape.as_slice() else { return raw.to_vec() };
    let [outer_steps @ .., row_step, column_step] = steps.as_slice() else { return raw.to_vec() };
    let mut at = vec![0; outer.len()];
    for block in out.chunks_exact_mut((rows * columns).max(1)) {
        let base: usize = at.iter().zip(outer_steps).map(|(a, s)| a * s).sum();
        for left in (0..*columns).step_by(TILE) {
            for row in 0..*rows {
                for column in left..(left + TILE).min(*columns) {
                    block[row * columns + column] = source[base + row * row_step + column * column_step];
                }
            }
        }
        for (digit, &limit) in at.iter_mut().zip(outer).rev() {
            *digit += 1;
            if *digit < limit {
                break;
            }
            *digit = 0;
        }
    }
    out.into_flattened()
}

/// Converts to another numeric type; `None` where the standard leaves the result open for one of the elements.
fn cast(data: &Tensor, to: DataType) -> Option<Tensor> {
    let from = data.dtype();
    if from == to {
        return Some(data.clone());
    }
    if let Some(values) = data.to_i64() {
        return integers_to(&values, data, to);
    }
    let values = data.to_f64()?;
    match to {
        // Some runtimes go through float32.
        DataType::Float16 | DataType::Bfloat16 if from == DataType::Double => None,
        DataType::Bool => tensor(to, &data.dims(), values.iter().map(|&v| u8::from(v != 0.0)).collect()),
        _ if to.is_float() => Tensor::from_f64(to, &data.dims(), values),
        _ => tensor(to, &data.dims(), integer_bytes(values.into_iter().map(truncated), to)?),
    }
}

fn integers_to(values: &[i64], data: &Tensor, to: DataType) -> Option<Tensor> {
    // An unsigned value beyond the signed range arrives negative.
    if data.dtype() == DataType::Uint64 && values.iter().any(|&v| v < 0) {
        return None;
    }
    // Some runtimes go through float on the way to the 16-bit types: only integers that both hold come out alike.
    let small = |limit: u64| values.iter().all(|v| v.unsigned_abs() <= limit);
    let exact = match to {
        DataType::Float16 => small(2048),
        DataType::Bfloat16 => small(256),
        _ => true,
    };
    let dims = data.dims();
    match to {
        // Straight from the integer: by way of float64 it would be rounded twice.
        DataType::Float => tensor(to, &dims, values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect()),
        _ if to.is_float() && exact => Tensor::from_f64(to, &dims, values.iter().map(|&v| v as f64)),
        _ => tensor(to, &dims, integer_bytes(values.iter().map(|&v| Some(v)), to)?),
    }
}

/// Towards zero, where an i64 holds the result.
fn truncated(value: f64) -> Option<i64> {
    (value.is_finite() && value.abs() < 9.2e18).then_some(value as i64)
}

fn integer_bytes(mut values: impl Iterator<Item = Option<i64>>, to: DataType) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    values.try_for_each(|v| {
        let v = v?;
        match to {
            DataType::Bool => out.push(u8::from(v != 0)),
            DataType::Int8 => out.extend(i8::try_from(v).ok()?.to_le_bytes()),
            DataType::Uint8 => out.push(u8::try_from(v).ok()?),
            DataType::Int16 => out.extend(i16::try_from(v).ok()?.to_le_bytes()),
            DataType::Uint16 => out.extend(u16::try_from(v).ok()?.to_le_bytes()),
            DataType::Int32 => out.extend(i32::try_from(v).ok()?.to_le_bytes()),
            DataType::Uint32 => out.extend(u32::try_from(v).ok()?.to_le_bytes()),
            DataType::Int64 => out.extend(v.to_le_bytes()),
            DataType::Uint64 => out.extend(u64::try_from(v).ok()?.to_le_bytes()),
            _ => return None,
        }
        Some(())
    })?;
    Some(out)
}
