//! What only moves elements.

use super::views::spread;
use super::{Call, element_bytes, product, tensor};
use crate::ir::Tensor;
use crate::ir::view::{Gather, axis_in};
use crate::numerics::permuted;
use crate::onnx::DataType;

/// No runtime takes tensors of more dimensions.
const MAX_RANK: usize = 64;

/// A list that is given twice, or not in integers.
struct Unreadable;

impl Call<'_> {
    /// A list of integers that was an attribute before it became an input; `Ok(None)` if it is left out.
    fn ints(&self, name: &str, index: usize) -> Result<Option<Vec<i64>>, Unreadable> {
        match (self.node.ints(name), self.input(index)) {
            (Some(values), None) => Ok(Some(values.to_vec())),
            (None, Some(tensor)) => tensor.to_i64().map(Some).ok_or(Unreadable),
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(Unreadable),
        }
    }

    pub(super) fn reshape(&self) -> Option<Tensor> {
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

    pub(super) fn squeeze(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let dims = data.dims();
        let shape: Vec<usize> = match self.ints("axes", 1).ok()? {
            None => dims.iter().copied().filter(|&d| d != 1).collect(),
            Some(axes) => {
                let axes = axes.into_iter().map(|a| axis_in(a, dims.len())).collect::<Option<Vec<_>>>()?;
                if axes.iter().any(|&a| dims[a] != 1) {
                    return None;
                }
                dims.iter().enumerate().filter(|(at, _)| !axes.contains(at)).map(|(_, &d)| d).collect()
            }
        };
        reshaped(data, &shape)
    }

    pub(super) fn unsqueeze(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let axes = self.ints("axes", 1).ok()??;
        let rank = data.dims().len() + axes.len();
        if rank > MAX_RANK {
            return None;
        }
        let axes = axes.into_iter().map(|a| axis_in(a, rank)).collect::<Option<Vec<_>>>()?;
        let mut rest = data.dims().into_iter();
        let shape =
            (0..rank).map(|at| if axes.contains(&at) { Some(1) } else { rest.next() }).collect::<Option<Vec<_>>>()?;
        if rest.next().is_some() {
            return None;
        }
        reshaped(data, &shape)
    }

    pub(super) fn flatten(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let dims = data.dims();
        let at = self.node.int("axis").unwrap_or(1);
        let at = usize::try_from(if at < 0 { at + dims.len() as i64 } else { at }).ok()?;
        if at > dims.len() {
            return None;
        }
        reshaped(data, &[product(&dims[..at])?, product(&dims[at..])?])
    }

    pub(super) fn transpose(&self) -> Option<Tensor> {
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

    pub(super) fn gather(&self) -> Option<Tensor> {
        let (data, indices) = (self.input(0)?, self.input(1)?);
        let dims = data.dims();
        let at = axis_in(Gather::of(self.node)?.axis, dims.len())?;
        if !matches!(indices.dtype(), DataType::Int32 | DataType::Int64) {
            return None;
        }
        let picks = indices.to_i64()?.into_iter().map(|i| axis_in(i, dims[at])).collect::<Option<Vec<usize>>>()?;
        let shape = [&dims[..at], indices.dims().as_slice(), &dims[at + 1..]].concat();
        reshaped(&picked(data, at, &picks)?, &shape)
    }

    pub(super) fn slice(&self) -> Option<Tensor> {
        let data = self.input(0)?;
        let dims = data.dims();
        let starts = self.ints("starts", 1).ok()??;
        let ends = self.ints("ends", 2).ok()??;
        let axes = self.ints("axes", 3).ok()?.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = self.input(4).map_or_else(|| Some(vec![1; starts.len()]), Tensor::to_i64)?;
        if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
            return None;
        }
        let mut out = data.clone();
        let mut seen = vec![false; dims.len()];
        for (((start, end), at), step) in starts.into_iter().zip(ends).zip(axes).zip(steps) {
            let at = axis_in(at, dims.len())?;
            if std::mem::replace(&mut seen[at], true) {
                return None;
            }
            out = picked(&out, at, &sliced(dims[at], start, end, step)?)?;
        }
        Some(out)
    }

    pub(super) fn concat(&self) -> Option<Tensor> {
        let parts = self.inputs.iter().map(Option::as_ref).collect::<Option<Vec<&Tensor>>>()?;
        let first = parts.first()?;
        let dims = first.dims();
        let at = axis_in(self.node.int("axis").unwrap_or(1), dims.len())?;
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
        let rows = (0..outer).flat_map(|at| rows.iter().map(move |(raw, row)| &raw[at * row..(at + 1) * row]));
        tensor(first.dtype(), &shape, rows.collect::<Vec<_>>().concat())
    }

    pub(super) fn constant_of_shape(&self) -> Option<Tensor> {
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

    pub(super) fn shape(&self) -> Option<Tensor> {
        let dims: Vec<i64> = self.input(0)?.dims().iter().map(|&d| d as i64).collect();
        let rank = dims.len() as i64;
        let bound = |at: i64| (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize;
        let (start, end) = (bound(self.node.int("start").unwrap_or(0)), bound(self.node.int("end").unwrap_or(rank)));
        let part = dims.get(start..end.max(start))?;
        Some(Tensor::from_i64(&[part.len()], part))
    }

    pub(super) fn expand(&self) -> Option<Tensor> {
        let (data, wanted) = (self.input(0)?, self.input(1)?.to_i64()?);
        let wanted: Vec<usize> = wanted.into_iter().map(|d| usize::try_from(d).ok()).collect::<Option<_>>()?;
        let dims = super::broadcast(&data.dims(), &wanted)?;
        let width = element_bytes(data)?;
        let raw = data.raw();
        let elements: Vec<&[u8]> = raw.chunks_exact(width).collect();
        let parts = spread(&elements, &data.dims(), &dims, |element| Some(*element))?;
        tensor(data.dtype(), &dims, parts.concat())
    }
}

fn reshaped(data: &Tensor, shape: &[usize]) -> Option<Tensor> {
    (product(shape)? == data.len()).then(|| data.clone().reshaped(shape))
}

/// The slices `picks` of an axis; `None` for types whose elements are not whole bytes.
fn picked(data: &Tensor, at: usize, picks: &[usize]) -> Option<Tensor> {
    let mut shape = data.dims();
    let row = product(&shape[at + 1..])?.checked_mul(element_bytes(data)?)?;
    let block = shape[at].checked_mul(row)?;
    let raw = data.raw();
    let blocks = raw.chunks_exact(block.max(1));
    let rows = blocks.flat_map(|block| picks.iter().map(move |pick| &block[pick * row..(pick + 1) * row]));
    shape[at] = picks.len();
    tensor(data.dtype(), &shape, rows.collect::<Vec<_>>().concat())
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
    /// Elements of `N` bytes.
    fn of<const N: usize>(raw: &[u8], dims: &[usize], perm: &[usize]) -> Vec<u8> {
        permuted(raw.as_chunks::<N>().0, dims, perm).into_flattened()
    }
    let width = element_bytes(data)?;
    let dims = data.dims();
    let shape: Vec<usize> = perm.iter().map(|&p| dims[p]).collect();
    let moving = |axes: &mut dyn Iterator<Item = usize>| axes.filter(|&a| dims[a] != 1).collect::<Vec<_>>();
    if data.is_empty() || moving(&mut (0..dims.len())) == moving(&mut perm.iter().copied()) {
        return Some(data.clone().reshaped(&shape));
    }
    let raw = data.raw();
    let out = match width {
        1 => of::<1>(&raw, &dims, perm),
        2 => of::<2>(&raw, &dims, perm),
        4 => of::<4>(&raw, &dims, perm),
        8 => of::<8>(&raw, &dims, perm),
        _ => of::<16>(&raw, &dims, perm),
    };
    tensor(data.dtype(), &shape, out)
}
