//! Attention of the default domain in the forms that tract lacks: masks, caches, windows, soft caps, scores as an output.
//!
//! The two products are tract's; what happens between them is one function.

use tract_core::ops::array::TypedConcat;
use tract_core::ops::change_axes::AxisOp;
use tract_core::ops::einsum::EinSum;
#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;
use tract_onnx::pb::NodeProto;

use super::native::{Call, Known, Native, floats, infer, integers, need, present};
use super::operator::rules;
use super::operators::Built;

/// Inputs and outputs of the ONNX operator by position.
const MASK: usize = 3;
const PAST_KEY: usize = 4;
const PAST_VALUE: usize = 5;
const LENGTHS: usize = 6;

#[derive(Clone, Debug)]
struct Attention {
    /// Which inputs and outputs are there.
    inputs: Vec<bool>,
    outputs: Vec<bool>,
    heads: [Option<usize>; 2],
    scale: Option<f32>,
    weights: Weights,
}

/// What lies between the two products.
#[derive(Clone, Debug)]
struct Weights {
    scale: f32,
    softcap: f32,
    causal: bool,
    /// Keys before and after the query's own position that it sees.
    window: [Option<i64>; 2],
    /// Position of the first query among the keys, where there are no lengths to tell it.
    offset: i64,
    mode: Mode,
    has_mask: bool,
    has_lengths: bool,
}

/// Which scores are an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Raw,
    Capped,
    Biased,
    Softmax,
}

/// Whether tract's own operator computes what this node says.
pub(super) fn is_plain(node: &NodeProto) -> TractResult<bool> {
    let given = |index: usize| node.input.get(index).is_some_and(|name| !name.is_empty());
    let causal = node.get_attr_opt::<i64>("is_causal")?.unwrap_or(0) != 0;
    let window = ["left_window_size", "right_window_size"];
    let bounded = window.iter().map(|name| node.get_attr_opt::<i64>(name)).collect::<TractResult<Vec<_>>>()?;
    let softcap = node.get_attr_opt::<f32>("softcap")?.unwrap_or(0.);
    let hides = given(MASK) || given(LENGTHS) || causal && given(PAST_KEY);
    let bounded = bounded.iter().any(|size| size.unwrap_or(-1) >= 0);
    Ok(!hides && !bounded && softcap == 0. && node.output.len() < 4)
}

pub(super) fn build(node: &NodeProto) -> Built {
    let present = |names: &[String]| -> Vec<bool> { names.iter().map(|n| !n.is_empty()).collect() };
    let (inputs, outputs) = (present(&node.input), present(&node.output));
    let given = |index: usize| inputs.get(index).copied().unwrap_or(false);
    ensure!(given(0) && given(1) && given(2), "Attention without query, key or value");
    ensure!(given(PAST_KEY) == given(PAST_VALUE), "Attention with only half of a cache");
    ensure!(!(given(PAST_KEY) && given(LENGTHS)), "Attention with two kinds of cache");
    let heads = |name: &str| -> TractResult<Option<usize>> {
        node.get_attr_opt::<i64>(name)?.filter(|&n| n != 0).map(|n| Ok(usize::try_from(n)?)).transpose()
    };
    let window =
        |name: &str| -> TractResult<Option<i64>> { Ok(node.get_attr_opt(name)?.filter(|&size: &i64| size >= 0)) };
    let softcap = node.get_attr_opt::<f32>("softcap")?.unwrap_or(0.);
    let mode = match node.get_attr_opt::<i64>("qk_matmul_output_mode")?.unwrap_or(0) {
        0 => Mode::Raw,
        1 => Mode::Capped,
        2 => Mode::Biased,
        3 => Mode::Softmax,
        other => bail!("Attention with qk_matmul_output_mode {other}"),
    };
    ensure!(
        softcap == 0. || mode != Mode::Raw || outputs.len() < 4,
        "Attention with softcap that outputs scores without it is not implemented"
    );
    let weights = Weights {
        scale: 0.,
        softcap,
        causal: node.get_attr_opt::<i64>("is_causal")?.unwrap_or(0) != 0,
        window: [window("left_window_size")?, window("right_window_size")?],
        offset: 0,
        mode,
        has_mask: given(MASK),
        has_lengths: given(LENGTHS),
    };
    let op = Attention {
        heads: [heads("q_num_heads")?, heads("kv_num_heads")?],
        scale: node.get_attr_opt("scale")?,
        inputs,
        outputs,
        weights,
    };
    Ok((expand(op), vec![]))
}

/// Extents of one call.
struct Extents {
    batch: usize,
    heads: usize,
    queries: usize,
    key_heads: usize,
    /// Keys that are new, and keys with the cache.
    new_keys: usize,
    keys: usize,
    size: usize,
    value_size: usize,
}

impl Attention {
    fn slot(&self, input: usize) -> Option<usize> {
        let there = self.inputs.get(input).copied().unwrap_or(false);
        there.then(|| self.inputs[..input].iter().filter(|there| **there).count())
    }

    fn extents(&self, shape: impl Fn(usize) -> Vec<usize>) -> TractResult<Extents> {
        let (q, k, v) = (shape(0), shape(1), shape(2));
        let past = self.slot(PAST_KEY).map_or(0, |_| shape(PAST_KEY).get(2).copied().unwrap_or(0));
        let extents = match (q.len(), k.len(), v.len()) {
            (4, 4, 4) => Extents {
                batch: q[0],
                heads: q[1],
                queries: q[2],
                key_heads: k[1],
                new_keys: k[2],
                keys: k[2] + past,
                size: q[3],
                value_size: v[3],
            },
            (3, 3, 3) => {
                let [Some(heads), Some(key_heads)] = self.heads else { bail!("Attention without numbers of heads") };
                ensure!(
                    q[2] % heads == 0 && k[2] % key_heads == 0 && v[2] % key_heads == 0,
                    "widths {}, {}, {} do not divide into {heads} and {key_heads} heads",
                    q[2],
                    k[2],
                    v[2]
                );
                Extents {
                    batch: q[0],
                    heads,
                    queries: q[1],
                    key_heads,
                    new_keys: k[1],
                    keys: k[1] + past,
                    size: q[2] / heads,
                    value_size: v[2] / key_heads,
                }
            }
            _ => bail!("Attention of ranks {}, {}, {}", q.len(), k.len(), v.len()),
        };
        let Extents { heads, key_heads, .. } = extents;
        ensure!(key_heads > 0 && heads.is_multiple_of(key_heads), "{heads} heads share {key_heads} heads of keys");
        Ok(extents)
    }

    fn facts(&self, known: &[Known]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let of = |input: usize| self.slot(input).and_then(|slot| known.get(slot));
        let shape = |input: usize| of(input).map_or_else(Vec::new, |known| known.shape.clone());
        let Extents { batch, heads, queries, key_heads, keys, size, value_size, .. } = self.extents(shape)?;
        ensure!(
            [0, 1, 2].iter().all(|&input| of(input).is_none_or(|k| k.dtype == DatumType::F32)),
            "Attention of types other than float is not implemented"
        );
        let output = if shape(0).len() == 3 {
            vec![batch, queries, heads * value_size]
        } else {
            vec![batch, heads, queries, value_size]
        };
        let all = [
            output,
            vec![batch, key_heads, keys, size],
            vec![batch, key_heads, keys, value_size],
            vec![batch, heads, queries, keys],
        ];
        Ok(all.into_iter().zip(&self.outputs).filter(|(_, there)| **there).map(|(s, _)| (DatumType::F32, s)).collect())
    }
}

impl Expansion for Attention {
    fn name(&self) -> StaticName {
        "Attention".into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(present(&self.outputs))
    }

    rules!(self, s, inputs: present(&self.inputs), outputs: present(&self.outputs) => {
        infer(s, inputs, outputs, Vec::new(), move |known| self.facts(&known))
    });

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let shapes = inputs
            .iter()
            .map(|&input| {
                Ok(model.outlet_fact(input)?.shape.as_concrete().with_context(|| "unknown dimension")?.to_vec())
            })
            .collect::<TractResult<Vec<_>>>()?;
        let of = |input: usize| self.slot(input).map(|slot| inputs[slot]);
        let shape = |input: usize| self.slot(input).map_or_else(Vec::new, |slot| shapes[slot].clone());
        let e = self.extents(shape)?;
        let flat = shapes[0].len() == 3;
        let split =
            |model: &mut TypedModel, name: &str, x: OutletId, heads: usize, size: usize| -> TractResult<OutletId> {
                if !flat {
                    return Ok(x);
                }
                let reshape = AxisOp::Reshape(2, tvec![(heads * size).to_dim()], tvec![heads.to_dim(), size.to_dim()]);
                let x = model.wire_node(format!("{prefix}.{name}_heads"), reshape, &[x])?[0];
                Ok(model.wire_node(format!("{prefix}.{name}_moved"), AxisOp::Move(2, 1), &[x])?[0])
            };
        let q = split(model, "q", inputs[0], e.heads, e.size)?;
        let mut cache = Vec::new();
        for (name, input, past, size) in [("k", 1, PAST_KEY, e.size), ("v", 2, PAST_VALUE, e.value_size)] {
            let mut x = split(model, name, inputs[input], e.key_heads, size)?;
            if let Some(past) = of(past) {
                x = model.wire_node(format!("{prefix}.{name}_all"), TypedConcat::new(2), &[past, x])?[0];
            }
            cache.push(x);
        }
        // Heads that share keys are an axis of their own in the products.
        let groups = e.heads / e.key_heads;
        let grouped = |model: &mut TypedModel, name: &str, x: OutletId| {
            let (whole, parts) = (e.heads.to_dim(), tvec![e.key_heads.to_dim(), groups.to_dim()]);
            model.wire_node(format!("{prefix}.{name}_grouped"), AxisOp::Reshape(1, tvec![whole], parts), &[x])
        };
        let ungrouped = |model: &mut TypedModel, name: &str, x: OutletId| {
            let (whole, parts) = (e.heads.to_dim(), tvec![e.key_heads.to_dim(), groups.to_dim()]);
            model.wire_node(format!("{prefix}.{name}_joined"), AxisOp::Reshape(1, parts, tvec![whole]), &[x])
        };
        let product = |axes: &str| -> TractResult<EinSum> { Ok(EinSum::new(axes.parse()?, DatumType::F32)) };
        let q = grouped(model, "q", q)?[0];
        let scores = model.wire_node(format!("{prefix}.scores"), product("abgmk,abnk->abgmn")?, &[q, cache[0]])?[0];
        let scores = ungrouped(model, "scores", scores)?[0];
        let weights = Weights {
            scale: self.scale.unwrap_or(1. / (e.size as f32).sqrt()),
            offset: (e.keys - e.new_keys) as i64,
            ..self.weights.clone()
        };
        let mut between = tvec![scores];
        between.extend([MASK, LENGTHS].into_iter().filter_map(of));
        let exposed = self.outputs.get(3).copied().unwrap_or(false);
        let op = Call::new(weights, vec![true, self.weights.has_mask, self.weights.has_lengths], vec![true, exposed]);
        let weights = op.wire(&format!("{prefix}.weights"), model, &between)?;
        let grouped_weights = grouped(model, "weights", weights[0])?[0];
        let values = product("abgmn,abnk->abgmk")?;
        let y = model.wire_node(format!("{prefix}.values"), values, &[grouped_weights, cache[1]])?[0];
        let mut y = ungrouped(model, "values", y)?[0];
        if flat {
            y = model.wire_node(format!("{prefix}.y_moved"), AxisOp::Move(1, 2), &[y])?[0];
            let parts = tvec![e.heads.to_dim(), e.value_size.to_dim()];
            let reshape = AxisOp::Reshape(2, parts, tvec![(e.heads * e.value_size).to_dim()]);
            y = model.wire_node(format!("{prefix}.y_joined"), reshape, &[y])?[0];
        }
        let all = [Some(y), Some(cache[0]), Some(cache[1]), weights.get(1).copied()];
        Ok(all.into_iter().zip(&self.outputs).filter(|(_, there)| **there).filter_map(|(outlet, _)| outlet).collect())
    }
}

impl Weights {
    /// Whether query `i` sees key `j`, of which there are `length` where that is told.
    fn sees(&self, i: i64, j: i64, length: Option<i64>, queries: i64) -> bool {
        let position = i + length.map_or(self.offset, |length| length - queries);
        length.is_none_or(|length| j < length)
            && (!self.causal || j <= position)
            && self.window[0].is_none_or(|left| position - j <= left)
            && self.window[1].is_none_or(|right| j - position <= right)
    }
}

impl Native for Weights {
    fn name(&self) -> &'static str {
        "Attention"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let scores = need(inputs, 0)?.shape.clone();
        Ok(vec![(DatumType::F32, scores.clone()), (DatumType::F32, scores)])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let scores = need(inputs, 0)?;
        let &[batch, heads, queries, keys] = scores.shape() else { bail!("scores of shape {:?}", scores.shape()) };
        let mask = match inputs.get(1).copied().flatten() {
            Some(mask) => Some(Mask::new(mask, [batch, heads, queries, keys])?),
            None => None,
        };
        let lengths = inputs.get(2).copied().flatten().map(integers).transpose()?;
        ensure!(lengths.as_ref().is_none_or(|l| l.len() == batch), "lengths of {batch} sequences are needed");
        let mut weights = floats(scores)?;
        let mut exposed = if self.mode == Mode::Softmax { Vec::new() } else { vec![0f32; weights.len()] };
        let mut bias = vec![0f32; keys];
        for (at, row) in weights.chunks_exact_mut(keys.max(1)).enumerate() {
            let (b, h, i) = (at / (heads * queries), at / queries % heads, at % queries);
            let length = lengths.as_ref().map(|lengths| lengths[b]);
            let mut any = false;
            for (j, bias) in bias.iter_mut().enumerate() {
                let added = mask.as_ref().map_or(0., |mask| mask.at(b, h, i, j));
                let sees = self.sees(i as i64, j as i64, length, queries as i64);
                *bias = if sees { added } else { f32::NEG_INFINITY };
                any |= *bias != f32::NEG_INFINITY;
            }
            for (j, x) in row.iter_mut().enumerate() {
                *x *= self.scale;
                let mut kept = *x;
                if self.softcap > 0. {
                    *x = (*x / self.softcap).tanh() * self.softcap;
                }
                if self.mode == Mode::Capped {
                    kept = *x;
                }
                *x += bias[j];
                if self.mode == Mode::Biased {
                    kept = *x;
                }
                if let Some(slot) = exposed.get_mut(at * keys + j) {
                    *slot = kept;
                }
            }
            softmax(row, any);
        }
        if self.mode == Mode::Softmax {
            exposed.clone_from(&weights);
        }
        Ok(vec![Tensor::from_shape(scores.shape(), &weights)?, Tensor::from_shape(scores.shape(), &exposed)?])
    }
}

/// In place; a query that sees no key weighs all of them with 0.
fn softmax(row: &mut [f32], any: bool) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !any || max == f32::NEG_INFINITY {
        row.fill(0.);
        return;
    }
    let mut sum = 0f32;
    for x in row.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    for x in row.iter_mut() {
        *x /= sum;
    }
}

/// A mask as numbers to add, spread over batch, heads, queries and keys.
struct Mask {
    values: Vec<f32>,
    strides: [usize; 4],
    /// Keys it speaks of; the others are hidden.
    keys: usize,
}

impl Mask {
    fn new(mask: &Tensor, full: [usize; 4]) -> TractResult<Self> {
        let boolean = mask.datum_type() == DatumType::Bool;
        let mut values = floats(mask)?;
        if boolean {
            for value in &mut values {
                *value = if *value == 0. { f32::NEG_INFINITY } else { 0. };
            }
        }
        let shape = mask.shape();
        ensure!((1..=4).contains(&shape.len()), "a mask of shape {shape:?}");
        let mut dims = [1; 4];
        dims[4 - shape.len()..].copy_from_slice(shape);
        let mut strides = [0; 4];
        let mut stride = 1;
        for axis in (0..4).rev() {
            let fits = dims[axis] == full[axis] || dims[axis] == 1 || axis == 3 && dims[axis] < full[axis];
            ensure!(fits, "a mask of shape {shape:?} for scores of shape {full:?}");
            // One key does not stand for all of them: the mask of a longer row is padded.
            strides[axis] = if dims[axis] == 1 && axis < 3 { 0 } else { stride };
            stride *= dims[axis];
        }
        Ok(Self { values, strides, keys: dims[3] })
    }

    fn at(&self, b: usize, h: usize, i: usize, j: usize) -> f32 {
        if j >= self.keys {
            return f32::NEG_INFINITY;
        }
        let [sb, sh, si, sj] = self.strides;
        self.values[b * sb + h * sh + i * si + j * sj]
    }
}
