//! What the inputs of a block's products show, as matrices.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use ndarray::{Array2, ArrayD, Axis, IxDyn, concatenate};

use super::blocks::Block;
use super::matrices::{MatrixSite, Rows as How};
use super::pool::lock;
use crate::error::{Error, Kind, Result};
use crate::runtime::Sample;
use crate::statistics::MatrixStatistics;

/// What is asked of a block.
pub struct Asked<'a> {
    /// The inputs of products.
    pub sites: Vec<MatrixSite>,
    /// So many rows of a sample count at most.
    pub most: usize,
    /// Whether the rows of the float model are seen beside those of the changed one, where they differ.
    pub paired: bool,
    /// Samples with statistics of their own.
    pub held_out: &'a BTreeSet<usize>,
    /// Rows of samples whose inputs have so many elements together, but of no more than 64, are added at once, which is
    /// faster; with 0, shards of the samples add up to the same bytes as all of them.
    pub together: usize,
    /// What becomes of the tensor in the changed model before it is multiplied.
    pub quantize: &'a (dyn Fn(&MatrixSite, &mut ArrayD<f32>) + Sync),
}

/// What samples show of a site.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shown {
    /// Those that weights are solved with.
    pub own: Option<MatrixStatistics>,
    /// Those that are held out.
    pub held_out: Option<MatrixStatistics>,
}

/// Most samples whose rows are added at once.
const MOST: usize = 64;

/// Samples whose rows are added at once.
struct Group {
    samples: BTreeSet<usize>,
    held_out: bool,
}

/// Rows of a sample, and those of the float model beside them.
type Rows = (Array2<f32>, Option<Array2<f32>>);

/// Which tokens of a sample are none, but fill it up to its length.
struct Mask {
    dims: Vec<usize>,
    tokens: Vec<bool>,
}

impl Mask {
    /// The mask that a sample has, by the name that everybody gives it.
    fn of(sample: &Sample) -> Option<Self> {
        let mask = sample.get("attention_mask")?;
        let tokens: Vec<bool> = mask.to_f64()?.into_iter().map(|on| on != 0.0).collect();
        (mask.dims().len() == 2 && tokens.contains(&false)).then(|| Self { dims: mask.dims(), tokens })
    }

    /// The rows of a tensor that belong to tokens, if it has one for each.
    fn kept(&self, site: &MatrixSite, tensor: &ArrayD<f32>) -> Option<ArrayD<f32>> {
        let (&width, outer) = tensor.shape().split_last()?;
        let each = outer == self.dims || outer == [self.tokens.len()];
        if site.rows != How::Axis(-1) || !each {
            return None;
        }
        let rows = tensor.as_standard_layout();
        let rows = rows.as_slice()?.chunks(width.max(1)).zip(&self.tokens).filter(|(_, on)| **on);
        let kept: Vec<f32> = rows.flat_map(|(row, _)| row.iter().copied()).collect();
        ArrayD::from_shape_vec(IxDyn(&[kept.len() / width.max(1), width]), kept).ok()
    }
}

/// What is known of a site so far.
struct State {
    shown: Result<Shown>,
    /// Rows that wait for others of their group.
    waiting: BTreeMap<usize, BTreeMap<usize, Rows>>,
}

impl Block<'_> {
    /// What the inputs of the block's products show: in the model as changed so far, and where that is asked for beside it
    /// in the float model. Tokens that an input `attention_mask` takes out do not count. The error of a site is a row with NaN
    /// or infinity, with its sample or those that it was added with. Of a tensor that is not shown nothing is known.
    ///
    /// # Errors
    /// As [`observe`](Self::observe).
    pub fn matrices(&self, asked: &Asked<'_>) -> Result<Vec<Result<Shown>>> {
        let groups = self.groups(asked);
        let group_of: BTreeMap<usize, usize> =
            groups.iter().enumerate().flat_map(|(at, group)| group.samples.iter().map(move |&s| (s, at))).collect();
        let tensors: Vec<String> = asked.sites.iter().map(|site| site.tensor.clone()).collect();
        let empty = || Mutex::new(State { shown: Ok(Shown::default()), waiting: BTreeMap::new() });
        let states: Vec<Mutex<State>> = asked.sites.iter().map(|_| empty()).collect();
        self.observe(None, &tensors, &|seen| {
            let mask = Mask::of(&self.run.samples.get(seen.sample)?);
            for (at, (site, state)) in asked.sites.iter().zip(&states).enumerate() {
                let (Some(float), Some(&group)) = (&seen.float[at], group_of.get(&seen.sample)) else { continue };
                let here = |e: Error| e.at_value(&site.tensor);
                let changed = seen.changed.and_then(|changed| changed[at].as_ref());
                let mut rows = changed.unwrap_or(float).clone();
                (asked.quantize)(site, &mut rows);
                let differs = asked.paired && changed.is_some();
                let matrix = |of: &ArrayD<f32>| match mask.as_ref().and_then(|mask| mask.kept(site, of)) {
                    Some(kept) => site.rows.matrix(&kept.view(), asked.most),
                    None => site.rows.matrix(&of.view(), asked.most),
                };
                let rows = matrix(&rows).map_err(here)?;
                let beside = differs.then(|| matrix(float)).transpose().map_err(here)?;
                let complete = {
                    let mut state = lock(state);
                    let waiting = state.waiting.entry(group).or_default();
                    waiting.insert(seen.sample, (rows, beside));
                    let complete = waiting.len() == groups[group].samples.len();
                    if complete { state.waiting.remove(&group) } else { None }
                };
                if let Some(rows) = complete {
                    add(state, site, groups[group].held_out, rows)?;
                }
            }
            Ok(())
        })?;
        // A tensor that is not computed in every sample leaves groups that wait.
        for (site, state) in asked.sites.iter().zip(&states) {
            let waiting = std::mem::take(&mut lock(state).waiting);
            for (group, rows) in waiting {
                add(state, site, groups[group].held_out, rows)?;
            }
        }
        Ok(states
            .into_iter()
            .map(|state| state.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).shown)
            .collect())
    }

    /// The samples in the order in which they run, cut where there are enough of them.
    fn groups(&self, asked: &Asked<'_>) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for held_out in [false, true] {
            let mut elements = usize::MAX;
            for &sample in self.order.iter().filter(|sample| asked.held_out.contains(sample) == held_out) {
                let shapes = self.run.samples.shape_key(sample);
                let own: usize = shapes.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
                elements = elements.saturating_add(own);
                match groups.last_mut() {
                    Some(group) if elements <= asked.together && group.samples.len() < MOST => {
                        group.samples.insert(sample);
                    }
                    _ => {
                        elements = own;
                        groups.push(Group { samples: BTreeSet::from([sample]), held_out });
                    }
                }
            }
        }
        groups
    }
}

/// Adds the rows of a group.
fn add(state: &Mutex<State>, site: &MatrixSite, held_out: bool, rows: BTreeMap<usize, Rows>) -> Result<()> {
    let samples = rows.keys().map(|&sample| sample as u32).collect();
    let (rows, beside): (Vec<_>, Vec<_>) = rows.into_values().unzip();
    let joined = |parts: &[Array2<f32>]| {
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        concatenate(Axis(0), &views)
            .map_err(|_| Error::new(Kind::Model, "a tensor has rows of different lengths").at_value(&site.tensor))
    };
    let rows = joined(&rows)?;
    let beside: Option<Vec<Array2<f32>>> = beside.into_iter().collect();
    let beside = beside.map(|beside| joined(&beside)).transpose()?;
    let beside = beside.as_ref().map(|beside| beside.view());
    let own = MatrixStatistics::of_samples(samples, site.rows.blocks(), rows.view(), beside);
    let own = own.map_err(|e| e.at_value(&site.tensor));
    let mut state = lock(state);
    let State { shown, .. } = &mut *state;
    let own = match (own, &shown) {
        (Ok(own), _) => own,
        (Err(e), _) if e.kind() == Kind::Samples => {
            *shown = Err(e);
            return Ok(());
        }
        (Err(e), _) => return Err(e),
    };
    let Ok(Shown { own: first, held_out: second }) = shown else { return Ok(()) };
    let slot = if held_out { second } else { first };
    match slot {
        Some(all) => all.merge(&own).map_err(|e| e.at_value(&site.tensor)),
        none => {
            *none = Some(own);
            Ok(())
        }
    }
}
