//! Axes of tensors in another order.

use ndarray::{ArrayViewD, ArrayViewMutD, Axis, IxDyn};

/// Columns that are written together, so that a cache line that was read is used up before it is dropped.
const TILE: usize = 16;

/// The elements of a tensor of shape `dims` in the order of its axes `perm`; as they are, if these are not its axes.
pub(crate) fn permuted<T: Copy>(values: &[T], dims: &[usize], perm: &[usize]) -> Vec<T> {
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    let mut out = values.to_vec();
    let Ok(view) = ArrayViewD::from_shape(IxDyn(dims), values) else { return out };
    if !sorted.into_iter().eq(0..dims.len()) || dims.is_empty() {
        return out;
    }
    let view = view.permuted_axes(IxDyn(perm));
    if let Ok(mut made) = ArrayViewMutD::from_shape(view.raw_dim(), &mut out) {
        let last = Axis(dims.len() - 1);
        for (mut to, from) in made.axis_chunks_iter_mut(last, TILE).zip(view.axis_chunks_iter(last, TILE)) {
            to.assign(&from);
        }
    }
    out
}
