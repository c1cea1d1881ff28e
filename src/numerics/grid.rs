//! Which scale belongs to which element.

use super::{Format, Granularity, QParams};
use crate::error::{Error, Result};

impl Granularity {
    /// The entry of the scale tensor, in row-major order, that element `at` of a tensor of shape `dims` uses.
    ///
    /// # Errors
    /// As [`check`](Self::check), or a shape with more elements than can be addressed.
    pub fn entry(&self, dims: &[usize], at: usize) -> Result<usize> {
        Ok(match Grid::new(dims, self)?.run_at(at) {
            Run::Same { len: _, entry } => entry,
            Run::Each { len: _, first } => first,
        })
    }

    /// The [entry](Self::entry) of each element.
    ///
    /// # Errors
    /// As [`entry`](Self::entry).
    pub fn entries(&self, dims: &[usize]) -> Result<Vec<usize>> {
        let grid = Grid::new(dims, self)?;
        let mut all = Vec::with_capacity(grid.len);
        for run in grid.runs(0, grid.len) {
            match run {
                Run::Same { len, entry } => all.resize(all.len() + len, entry),
                Run::Each { len, first } => all.extend(first..first + len),
            }
        }
        Ok(all)
    }
}

/// A maximal run of consecutive elements whose parameters follow one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Run {
    /// All use the same entry of the scale tensor.
    Same { len: usize, entry: usize },
    /// Each uses its own, consecutive, entry.
    Each { len: usize, first: usize },
}

impl Run {
    pub(super) fn len(self) -> usize {
        match self {
            Self::Same { len, entry: _ } | Self::Each { len, first: _ } => len,
        }
    }

    fn truncated(self, max: usize) -> Self {
        match self {
            Self::Same { len, entry } => Self::Same { len: len.min(max), entry },
            Self::Each { len, first } => Self::Each { len: len.min(max), first },
        }
    }
}

/// How many scales a tensor without elements may have.
pub(super) const MAX_EMPTY_ENTRIES: usize = 1 << 20;

/// A shape and granularity, ready to answer which parameters an element uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Elements.
    pub(super) len: usize,
    /// Entries of the scale tensor.
    pub(super) entries: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Tensor,
    Channel { channels: usize, inner: usize },
    Group { extent: usize, inner: usize, size: usize, groups: usize },
}

impl Grid {
    pub(super) fn new(dims: &[usize], granularity: &Granularity) -> Result<Self> {
        granularity.check(dims)?;
        let product = |dims: &[usize]| {
            dims.iter().try_fold(1_usize, |product, &extent| product.checked_mul(extent)).ok_or_else(|| {
                Error::model(format!("a tensor of shape {dims:?} has more elements than can be addressed"))
            })
        };
        let len = product(dims)?;
        let entries = product(&granularity.scale_dims(dims))?;
        // A tensor with elements has at least as many as scales; one without could ask for any number of them.
        if entries > len.max(MAX_EMPTY_ENTRIES) {
            return Err(Error::model(format!("a tensor of shape {dims:?} has no elements but {entries} scales")));
        }
        let kind = match *granularity {
            Granularity::PerTensor => Kind::Tensor,
            Granularity::PerChannel { axis } => {
                Kind::Channel { channels: dims[axis], inner: product(&dims[axis + 1..])? }
            }
            Granularity::PerGroup { axis, size } => {
                let inner = product(&dims[axis + 1..])?;
                Kind::Group { extent: dims[axis], inner, size, groups: dims[axis].div_ceil(size) }
            }
        };
        Ok(Self { len, entries, kind })
    }

    /// Checks that data and parameters have the sizes that this grid says.
    pub(super) fn check(&self, elements: usize, dims: &[usize], format: Format, qparams: &QParams) -> Result<()> {
        let QParams { scales, zero_points } = qparams;
        if elements != self.len {
            return Err(Error::model(format!("{elements} elements do not fill a tensor of shape {dims:?}")));
        }
        if scales.len() != self.entries || zero_points.len() != self.entries {
            return Err(Error::model(format!(
                "{} scales and {} zero points where a tensor of shape {dims:?} needs {} each",
                scales.len(),
                zero_points.len(),
                self.entries
            )));
        }
        let (qmin, qmax) = if format.is_integer() { format.range() } else { (0, 0) };
        match zero_points.iter().find(|&&zero_point| zero_point < qmin || zero_point > qmax) {
            Some(zero_point) => {
                Err(Error::model(format!("zero point {zero_point} is not in {qmin}..={qmax}, the range of {format}")))
            }
            None => Ok(()),
        }
    }

    /// The runs of elements `start..start + len`, in order.
    pub(super) fn runs(&self, start: usize, len: usize) -> impl Iterator<Item = Run> {
        let end = start + len;
        let mut at = start;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let run = self.run_at(at).truncated(end - at);
            at += run.len();
            Some(run)
        })
    }

    fn run_at(&self, at: usize) -> Run {
        match self.kind {
            Kind::Tensor => Run::Same { len: self.len - at, entry: 0 },
            Kind::Channel { channels, inner: 1 } => {
                let channel = at % channels;
                Run::Each { len: channels - channel, first: channel }
            }
            Kind::Channel { channels, inner } => Run::Same { len: inner - at % inner, entry: at / inner % channels },
            Kind::Group { extent, inner: 1, size, groups } => {
                let (outer, position) = (at / extent, at % extent);
                let len = (size - position % size).min(extent - position);
                Run::Same { len, entry: outer * groups + position / size }
            }
            Kind::Group { extent, inner, size, groups } => {
                let (row, column) = (at / inner, at % inner);
                let group = row / extent * groups + row % extent / size;
                Run::Each { len: inner - column, first: group * inner + column }
            }
        }
    }
}
