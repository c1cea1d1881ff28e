//! The rows that products read, as matrices: what they are of a tensor, and which tensors of a model have some.
//!
//! Products that read one tensor in one way share its statistics: query, key and value of an attention, gate and up of an MLP.

use ndarray::{Array2, ArrayViewD, Axis};

use crate::error::{Error, Kind, Result};
use crate::ir::view::{Conv, Gemm, axis_in};
use crate::ir::{Model, NodeId, ValueId};

/// An input of products with constants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixSite {
    /// The tensor.
    pub tensor: String,
    /// How the products read it.
    pub rows: Rows,
    /// Columns of the weights, all blocks together.
    pub columns: usize,
    /// The products, in the order of the graph.
    pub nodes: Vec<String>,
}

/// How a product reads a tensor row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// The columns lie along this axis, negative from the last; all other axes number rows, in row-major order.
    Axis(isize),
    /// A row is what a convolution sees at one position.
    Windows(Windows),
}

/// The windows of a convolution. Axes are those behind batch and channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Elements of the kernel along each axis.
    pub kernel: Vec<usize>,
    /// Distance of two positions.
    pub strides: Vec<usize>,
    /// Distance of two elements of the kernel.
    pub dilations: Vec<usize>,
    /// Zeros around the tensor.
    pub padding: Padding,
    /// Groups of channels that have weights of their own: blocks of columns.
    pub groups: usize,
}

/// Zeros around a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Padding {
    /// So many in front of each axis, and behind it.
    Given(Vec<usize>, Vec<usize>),
    /// So many that there are as many positions as a stride fits, the odd one in front (`SAME_LOWER`) or behind.
    Same {
        /// Whether the odd one is in front.
        lower: bool,
    },
}

/// The inputs of `model`'s main graph that a MatMul, Gemm or Conv multiplies with a constant, in the order of the graph.
#[must_use]
pub fn matrix_sites(model: &Model) -> Vec<MatrixSite> {
    let mut found: Vec<MatrixSite> = Vec::new();
    for &node in model.graph(model.main()).nodes() {
        let Some((value, rows, columns)) = product(model, node) else { continue };
        let (tensor, name) = (model.value(value).name(), model.node(node).name());
        let same = |site: &&mut MatrixSite| site.tensor == tensor && site.rows == rows && site.columns == columns;
        if let Some(site) = found.iter_mut().find(same) {
            site.nodes.push(name.to_owned());
        } else {
            let (tensor, nodes) = (tensor.to_owned(), vec![name.to_owned()]);
            found.push(MatrixSite { tensor, rows, columns, nodes });
        }
    }
    found
}

/// What a product with a constant reads, how, and how many columns its weight has.
#[must_use]
pub fn product(model: &Model, node: NodeId) -> Option<(ValueId, Rows, usize)> {
    let of = model.node(node);
    let value = of.input(0).filter(|&value| model.constant(value).is_none())?;
    let dims = model.constant(of.input(1)?)?.dims();
    let (rows, columns) = match (of.domain(), of.op_type(), dims.as_slice()) {
        ("", "MatMul", &[columns, _]) => (Rows::Axis(-1), columns),
        ("", "Gemm", &[first, second]) => {
            let gemm = Gemm::of(of)?;
            (Rows::Axis(if gemm.trans_a { 0 } else { -1 }), if gemm.trans_b { second } else { first })
        }
        ("", "Conv", [_, channels, kernel @ ..]) => {
            let windows = Windows::of(model, node, kernel)?;
            let columns = windows.groups * channels * kernel.iter().product::<usize>();
            (Rows::Windows(windows), columns)
        }
        _ => return None,
    };
    Some((value, rows, columns))
}

impl Rows {
    /// Blocks of columns, which have nothing to do with each other.
    #[must_use]
    pub fn blocks(&self) -> usize {
        match self {
            Self::Axis(_) => 1,
            Self::Windows(windows) => windows.groups,
        }
    }

    /// The rows of a tensor; of more than `most`, so many at even distances.
    ///
    /// # Errors
    /// A tensor of another rank, or with fewer channels or smaller than the windows.
    pub fn matrix(&self, tensor: &ArrayViewD<'_, f32>, most: usize) -> Result<Array2<f32>> {
        match self {
            Self::Axis(axis) => {
                let at = axis_in(*axis as i64, tensor.ndim()).ok_or_else(|| unfit(tensor.shape()))?;
                let lanes = tensor.lanes(Axis(at));
                let width = tensor.len_of(Axis(at));
                let count =
                    tensor.shape().iter().enumerate().filter(|&(i, _)| i != at).map(|(_, d)| d).product::<usize>();
                let mut picks = picks(count, most).peekable();
                let mut values = Vec::with_capacity(picks.len() * width);
                for (row, lane) in lanes.into_iter().enumerate() {
                    if picks.next_if_eq(&row).is_some() {
                        values.extend(lane);
                    }
                }
                let rows = values.len().checked_div(width).unwrap_or(0);
                Array2::from_shape_vec((rows, width), values).map_err(|_| unfit(tensor.shape()))
            }
            Self::Windows(windows) => windows.matrix(tensor, most),
        }
    }
}

/// `most` of `count` numbers from 0 on, at even distances.
fn picks(count: usize, most: usize) -> impl ExactSizeIterator<Item = usize> {
    let taken = count.min(most);
    (0..taken).map(move |at| (at as u128 * count as u128 / taken as u128) as usize)
}

fn unfit(shape: &[usize]) -> Error {
    Error::new(Kind::Model, format!("a product cannot read a tensor of shape {shape:?} in rows"))
}

impl Windows {
    /// The windows of a Conv whose kernel has these dimensions.
    fn of(model: &Model, node: NodeId, kernel: &[usize]) -> Option<Self> {
        let of = model.node(node);
        let list = |name: &str, default: usize, len: usize| -> Option<Vec<usize>> {
            let Some(given) = of.ints(name) else { return Some(vec![default; len]) };
            let given: Vec<usize> = given.iter().map(|&v| usize::try_from(v).ok()).collect::<Option<_>>()?;
            (given.len() == len).then_some(given)
        };
        let rank = kernel.len();
        let padding = match of.string("auto_pad").unwrap_or("NOTSET") {
            "SAME_UPPER" => Padding::Same { lower: false },
            "SAME_LOWER" => Padding::Same { lower: true },
            "VALID" => Padding::Given(vec![0; rank], vec![0; rank]),
            _ => {
                let mut before = list("pads", 0, 2 * rank)?;
                let behind = before.split_off(rank);
                Padding::Given(before, behind)
            }
        };
        Some(Self {
            kernel: kernel.to_vec(),
            strides: list("strides", 1, rank)?,
            dilations: list("dilations", 1, rank)?,
            padding,
            groups: Conv::of(of)?.group,
        })
    }

    /// For each axis, zeros in front of it and the number of positions.
    fn positions(&self, size: &[usize]) -> Option<Vec<(usize, usize)>> {
        let along = |axis: usize| {
            let (size, stride) = (size[axis], self.strides[axis]);
            let reach = self.dilations[axis] * self.kernel[axis].checked_sub(1)? + 1;
            if stride == 0 {
                return None;
            }
            match &self.padding {
                Padding::Given(before, behind) => {
                    let left = (size + before[axis] + behind[axis]).checked_sub(reach)?;
                    Some((before[axis], left / stride + 1))
                }
                Padding::Same { lower } => {
                    let count = size.div_ceil(stride);
                    let all = (count.saturating_sub(1) * stride + reach).saturating_sub(size);
                    Some((if *lower { all.div_ceil(2) } else { all / 2 }, count))
                }
            }
        };
        (0..size.len()).map(along).collect()
    }

    fn matrix(&self, tensor: &ArrayViewD<'_, f32>, most: usize) -> Result<Array2<f32>> {
        let unfit = || unfit(tensor.shape());
        let &[batch, channels, ref size @ ..] = tensor.shape() else { return Err(unfit()) };
        if size.len() != self.kernel.len() || !channels.is_multiple_of(self.groups) {
            return Err(unfit());
        }
        let positions = self.positions(size).ok_or_else(unfit)?;
        let each: usize = positions.iter().map(|(_, count)| count).product();
        let (cells, area) = (self.kernel.iter().product::<usize>(), size.iter().product::<usize>());
        let data = tensor.as_standard_layout();
        let data = data.as_slice().ok_or_else(unfit)?;
        let counts: Vec<usize> = positions.iter().map(|(_, count)| *count).collect();
        let offsets: Vec<Vec<usize>> = (0..cells).map(|cell| unravel(cell, &self.kernel)).collect();
        let picks = picks(batch * each, most);
        let mut made = Array2::zeros((picks.len(), channels * cells));
        for (pick, mut row) in picks.zip(made.rows_mut()) {
            let (image, position) = (pick / each, unravel(pick % each, &counts));
            for (cell, offset) in offsets.iter().enumerate() {
                let mut at = Some(0);
                for axis in 0..size.len() {
                    let padded = position[axis] * self.strides[axis] + offset[axis] * self.dilations[axis];
                    let inside = padded.checked_sub(positions[axis].0).filter(|&i| i < size[axis]);
                    at = at.zip(inside).map(|(at, inside)| at * size[axis] + inside);
                }
                let Some(at) = at else { continue };
                for channel in 0..channels {
                    row[channel * cells + cell] = data[(image * channels + channel) * area + at];
                }
            }
        }
        Ok(made)
    }
}

/// The coordinates of a position in row-major order.
fn unravel(mut at: usize, dims: &[usize]) -> Vec<usize> {
    let mut found = vec![0; dims.len()];
    for (slot, &dim) in found.iter_mut().zip(dims).rev() {
        *slot = at % dim.max(1);
        at /= dim.max(1);
    }
    found
}
