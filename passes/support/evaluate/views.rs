//! Tensors as views: shapes that are broadcast.

use ndarray::{ArrayViewD, IxDyn};

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

/// For each element of a tensor of shape `to`, the position in a tensor of shape `from` that is broadcast to it; none where it
/// cannot be.
pub(crate) fn sources(from: &[usize], to: &[usize]) -> Vec<usize> {
    let positions: Vec<usize> = (0..from.iter().product()).collect();
    spread(&positions, from, to, |position| Some(*position)).unwrap_or_default()
}

/// What `made` makes of each element of a tensor of shape `from` that is broadcast to the shape `to`; `None` where it cannot
/// be, or if one is `None`.
pub(super) fn spread<T, U>(
    values: &[T],
    from: &[usize],
    to: &[usize],
    made: impl FnMut(&T) -> Option<U>,
) -> Option<Vec<U>> {
    let view = ArrayViewD::from_shape(IxDyn(from), values).ok()?;
    view.broadcast(IxDyn(to))?.iter().map(made).collect()
}

/// What `made` makes of each pair of elements of two tensors that are broadcast to the shape `to`.
pub(super) fn zip<T: Copy, U>(
    (a, a_dims): (&[T], &[usize]),
    (b, b_dims): (&[T], &[usize]),
    to: &[usize],
    mut made: impl FnMut(T, T) -> Option<U>,
) -> Option<Vec<U>> {
    let (a, b) = (ArrayViewD::from_shape(IxDyn(a_dims), a).ok()?, ArrayViewD::from_shape(IxDyn(b_dims), b).ok()?);
    let (a, b) = (a.broadcast(IxDyn(to))?, b.broadcast(IxDyn(to))?);
    a.iter().zip(&b).map(|(x, y)| made(*x, *y)).collect()
}
