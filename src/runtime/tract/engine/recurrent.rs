//! LSTM, GRU and RNN in the forms that tract lacks: clipping, other activations, coupled gates, sequences of unequal length.
//!
//! As in onnxruntime, clipping is of the gates, and not of the cell state that the output is made of.

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;
use tract_onnx::pb::NodeProto;

use super::native::{Known, Native, call, floats, integers, need};
use super::operators::Built;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Lstm,
    Gru,
    Rnn,
}

impl Kind {
    fn gates(self) -> usize {
        match self {
            Self::Lstm => 4,
            Self::Gru => 3,
            Self::Rnn => 1,
        }
    }

    fn default_activations(self) -> &'static [&'static str] {
        match self {
            Self::Lstm => &["Sigmoid", "Tanh", "Tanh"],
            Self::Gru => &["Sigmoid", "Tanh"],
            Self::Rnn => &["Tanh"],
        }
    }
}

/// An activation of a gate, with its parameters.
#[derive(Clone, Copy, Debug)]
enum Activation {
    Relu,
    Tanh,
    Sigmoid,
    Softsign,
    Softplus,
    LeakyRelu(f32),
    ThresholdedRelu(f32),
    Elu(f32),
    Affine(f32, f32),
    ScaledTanh(f32, f32),
    HardSigmoid(f32, f32),
}

impl Activation {
    /// By its name in any case; takes the parameters it has from the front of the lists.
    fn parse(name: &str, alphas: &mut &[f32], betas: &mut &[f32]) -> Option<Self> {
        fn next(list: &mut &[f32]) -> Option<f32> {
            let (&first, rest) = list.split_first()?;
            *list = rest;
            Some(first)
        }
        Some(match name.to_ascii_lowercase().as_str() {
            "relu" => Self::Relu,
            "tanh" => Self::Tanh,
            "sigmoid" => Self::Sigmoid,
            "softsign" => Self::Softsign,
            "softplus" => Self::Softplus,
            "leakyrelu" => Self::LeakyRelu(next(alphas).unwrap_or(0.01)),
            "thresholdedrelu" => Self::ThresholdedRelu(next(alphas).unwrap_or(1.)),
            "elu" => Self::Elu(next(alphas).unwrap_or(1.)),
            // The standard gives these no defaults.
            "affine" => Self::Affine(next(alphas)?, next(betas)?),
            "scaledtanh" => Self::ScaledTanh(next(alphas)?, next(betas)?),
            "hardsigmoid" => Self::HardSigmoid(next(alphas).unwrap_or(0.2), next(betas).unwrap_or(0.5)),
            _ => return None,
        })
    }

    fn apply(self, x: f32) -> f32 {
        match self {
            Self::Relu => x.max(0.),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => 1. / (1. + (-x).exp()),
            Self::Softsign => x / (1. + x.abs()),
            Self::Softplus => x.max(0.) + (-x.abs()).exp().ln_1p(),
            Self::LeakyRelu(alpha) => {
                if x >= 0. {
                    x
                } else {
                    alpha * x
                }
            }
            Self::ThresholdedRelu(alpha) => {
                if x > alpha {
                    x
                } else {
                    0.
                }
            }
            Self::Elu(alpha) => {
                if x >= 0. {
                    x
                } else {
                    alpha * x.exp_m1()
                }
            }
            Self::Affine(alpha, beta) => alpha * x + beta,
            Self::ScaledTanh(alpha, beta) => alpha * (beta * x).tanh(),
            Self::HardSigmoid(alpha, beta) => (alpha * x + beta).clamp(0., 1.),
        }
    }
}

#[derive(Debug)]
struct Recurrent {
    kind: Kind,
    /// One set for each direction.
    activations: Vec<Vec<Activation>>,
    /// Which directions run from the end.
    reverse: Vec<bool>,
    clip: Option<f32>,
    input_forget: bool,
    linear_before_reset: bool,
    batch_first: bool,
}

/// Whether tract's own operator computes something else than this node.
pub(super) fn is_unusual(node: &NodeProto, kind: Kind) -> TractResult<bool> {
    let usual = kind.default_activations();
    let names = strings(node, "activations");
    let others = names.iter().enumerate().any(|(i, name)| !name.eq_ignore_ascii_case(usual[i % usual.len()]));
    let lengths = node.input.get(4).is_some_and(|name| !name.is_empty());
    let coupled = node.get_attr_opt::<i64>("input_forget")?.unwrap_or(0) != 0;
    Ok(others || lengths || coupled || node.get_attr_opt::<f32>("clip")?.is_some())
}

fn strings(node: &NodeProto, name: &str) -> Vec<String> {
    let found = node.attribute.iter().find(|a| a.name == name);
    found.map_or_else(Vec::new, |a| a.strings.iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect())
}

fn numbers(node: &NodeProto, name: &str) -> Vec<f32> {
    node.attribute.iter().find(|a| a.name == name).map_or_else(Vec::new, |a| a.floats.clone())
}

pub(super) fn build(node: &NodeProto, kind: Kind) -> Built {
    let reverse = match node.get_attr_opt::<String>("direction")?.as_deref() {
        None | Some("forward") => vec![false],
        Some("reverse") => vec![true],
        Some("bidirectional") => vec![false, true],
        Some(other) => bail!("direction {other}"),
    };
    let each = kind.default_activations().len();
    let mut names = strings(node, "activations");
    if names.is_empty() {
        names = (0..reverse.len()).flat_map(|_| kind.default_activations()).map(|&name| name.to_owned()).collect();
    }
    ensure!(names.len() == each * reverse.len(), "{} activations for {} directions", names.len(), reverse.len());
    let (alphas, betas) = (numbers(node, "activation_alpha"), numbers(node, "activation_beta"));
    let (mut alphas, mut betas) = (alphas.as_slice(), betas.as_slice());
    let parsed = names.iter().map(|name| {
        Activation::parse(name, &mut alphas, &mut betas)
            .with_context(|| format!("activation {name} is not implemented"))
    });
    let parsed = parsed.collect::<TractResult<Vec<_>>>()?;
    let op = Recurrent {
        kind,
        activations: parsed.chunks(each).map(<[Activation]>::to_vec).collect(),
        reverse,
        clip: node.get_attr_opt::<f32>("clip")?.filter(|&clip| clip > 0.),
        input_forget: node.get_attr_opt::<i64>("input_forget")?.unwrap_or(0) != 0,
        linear_before_reset: node.get_attr_opt::<i64>("linear_before_reset")?.unwrap_or(0) != 0,
        batch_first: node.get_attr_opt::<i64>("layout")?.unwrap_or(0) != 0,
    };
    call(node, op)
}

/// Sizes of one call.
struct Sizes {
    steps: usize,
    batch: usize,
    width: usize,
    hidden: usize,
}

/// What one direction reads.
struct Direction<'a> {
    /// Width × gates·hidden: the input weights transposed, so that rows are summed.
    w: Vec<f32>,
    /// hidden × gates·hidden.
    r: Vec<f32>,
    wb: &'a [f32],
    rb: &'a [f32],
    peephole: &'a [f32],
    activations: &'a [Activation],
}

impl Recurrent {
    fn sizes(&self, x: &[usize], r: &[usize]) -> TractResult<Sizes> {
        ensure!(x.len() == 3 && r.len() == 3, "inputs of shapes {x:?} and {r:?}");
        ensure!(r[0] == self.reverse.len(), "{} directions with weights for {}", self.reverse.len(), r[0]);
        let (steps, batch) = if self.batch_first { (x[1], x[0]) } else { (x[0], x[1]) };
        Ok(Sizes { steps, batch, width: x[2], hidden: r[2] })
    }

    fn clip(&self, x: f32) -> f32 {
        self.clip.map_or(x, |clip| x.clamp(-clip, clip))
    }

    /// One step for one row of the batch: `x` holds what the input and both biases contribute to each gate.
    #[allow(clippy::many_single_char_names, reason = "the letters of the standard's formulas")]
    fn step(&self, d: &Direction<'_>, x: &[f32], h: &mut [f32], c: &mut [f32]) {
        let n = h.len();
        match self.kind {
            Kind::Rnn => {
                let mut sums = x.to_vec();
                add_product(&mut sums, h, &d.r);
                for (h, sum) in h.iter_mut().zip(sums) {
                    *h = d.activations[0].apply(self.clip(sum));
                }
            }
            Kind::Gru => {
                let (f, g) = (d.activations[0], d.activations[1]);
                let mut recurrent = vec![0.; 3 * n];
                add_product(&mut recurrent, h, &d.r);
                let gate = |at: usize| f.apply(self.clip(x[at] + recurrent[at] + d.rb[at]));
                let z: Vec<f32> = (0..n).map(gate).collect();
                let reset: Vec<f32> = (n..2 * n).map(gate).collect();
                let hidden: Vec<f32> = if self.linear_before_reset {
                    (0..n).map(|k| reset[k] * (recurrent[2 * n + k] + d.rb[2 * n + k])).collect()
                } else {
                    let kept: Vec<f32> = reset.iter().zip(&*h).map(|(r, h)| r * h).collect();
                    let mut all = vec![0.; 3 * n];
                    add_product(&mut all, &kept, &d.r);
                    (0..n).map(|k| all[2 * n + k] + d.rb[2 * n + k]).collect()
                };
                for k in 0..n {
                    let candidate = g.apply(self.clip(x[2 * n + k] + hidden[k]));
                    h[k] = (1. - z[k]) * candidate + z[k] * h[k];
                }
            }
            Kind::Lstm => {
                let &[f, g, o] = d.activations else { return };
                let mut sums = x.to_vec();
                add_product(&mut sums, h, &d.r);
                for k in 0..n {
                    // Gates are stored as input, output, forget, cell; peepholes as input, output, forget.
                    let input = f.apply(self.clip(sums[k] + d.peephole[k] * c[k]));
                    let forget = if self.input_forget {
                        1. - input
                    } else {
                        f.apply(self.clip(sums[2 * n + k] + d.peephole[2 * n + k] * c[k]))
                    };
                    c[k] = forget * c[k] + input * g.apply(self.clip(sums[3 * n + k]));
                    let output = f.apply(self.clip(sums[n + k] + d.peephole[n + k] * c[k]));
                    h[k] = output * o.apply(c[k]);
                }
            }
        }
    }
}

/// `sums += x · rows`, with a row of `sums.len()` for each element of `x`.
fn add_product(sums: &mut [f32], x: &[f32], rows: &[f32]) {
    for (x, row) in x.iter().zip(rows.chunks_exact(sums.len())) {
        for (sum, weight) in sums.iter_mut().zip(row) {
            *sum += x * weight;
        }
    }
}

fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| matrix.iter().skip(c).step_by(columns).copied()).collect()
}

impl Native for Recurrent {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Lstm => "LSTM",
            Kind::Gru => "GRU",
            Kind::Rnn => "RNN",
        }
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let (x, r) = (need(inputs, 0)?, need(inputs, 2)?);
        ensure!(x.dtype == DatumType::F32, "{} of {:?} is not implemented", self.name(), x.dtype);
        let Sizes { steps, batch, hidden, .. } = self.sizes(&x.shape, &r.shape)?;
        let d = self.reverse.len();
        let (all, last) = if self.batch_first {
            (vec![batch, steps, d, hidden], vec![batch, d, hidden])
        } else {
            (vec![steps, d, batch, hidden], vec![d, batch, hidden])
        };
        let mut outputs = vec![(DatumType::F32, all), (DatumType::F32, last.clone())];
        if self.kind == Kind::Lstm {
            outputs.push((DatumType::F32, last));
        }
        Ok(outputs)
    }

    #[allow(clippy::many_single_char_names, reason = "the letters of the standard's formulas")]
    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (x, w, r) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        let Sizes { steps, batch, width, hidden } = self.sizes(x.shape(), r.shape())?;
        let (directions, rows) = (self.reverse.len(), self.kind.gates() * hidden);
        let optional = |index: usize| inputs.get(index).copied().flatten();
        let (x, w, r) = (floats(x)?, floats(w)?, floats(r)?);
        ensure!(
            x.len() == steps * batch * width
                && w.len() == directions * rows * width
                && r.len() == directions * rows * hidden,
            "weights do not fit the input"
        );
        let padded = |index: usize, len: usize| -> TractResult<Vec<f32>> {
            let values = optional(index).map(floats).transpose()?.unwrap_or_else(|| vec![0.; len]);
            ensure!(values.len() == len, "input {index} has {} elements instead of {len}", values.len());
            Ok(values)
        };
        let bias = padded(3, directions * 2 * rows)?;
        let lengths = optional(4).map(integers).transpose()?.unwrap_or_else(|| vec![steps as i64; batch]);
        let fit = |&len: &i64| usize::try_from(len).ok().filter(|&len| len <= steps);
        let Some(lengths) = lengths.iter().map(fit).collect::<Option<Vec<_>>>().filter(|l| l.len() == batch) else {
            bail!("sequence lengths {lengths:?} for {batch} sequences of {steps} steps");
        };
        let mut h = padded(5, directions * batch * hidden)?;
        let lstm = self.kind == Kind::Lstm;
        let mut c = if lstm { padded(6, directions * batch * hidden)? } else { vec![0.; h.len()] };
        let peephole = if lstm { padded(7, directions * 3 * hidden)? } else { Vec::new() };
        let mut y = vec![0f32; steps * directions * batch * hidden];
        for direction in 0..directions {
            let of = |values: &[f32], columns: usize| {
                transposed(&values[direction * rows * columns..(direction + 1) * rows * columns], columns)
            };
            let (wb, rb) = bias[direction * 2 * rows..(direction + 1) * 2 * rows].split_at(rows);
            let d = Direction {
                w: of(&w, width),
                r: of(&r, hidden),
                wb,
                rb,
                peephole: if lstm { &peephole[direction * 3 * hidden..(direction + 1) * 3 * hidden] } else { &[] },
                activations: &self.activations[direction],
            };
            for (row, &len) in lengths.iter().enumerate() {
                let state = if self.batch_first { row * directions + direction } else { direction * batch + row };
                let state = state * hidden..(state + 1) * hidden;
                for step in 0..len {
                    let step = if self.reverse[direction] { len - 1 - step } else { step };
                    let at = if self.batch_first { row * steps + step } else { step * batch + row };
                    let mut sums = d.wb.to_vec();
                    // What a reset gate multiplies includes the recurrent bias, so GRU adds it later.
                    if self.kind != Kind::Gru {
                        sums.iter_mut().zip(d.rb).for_each(|(sum, bias)| *sum += bias);
                    }
                    add_product(&mut sums, &x[at * width..(at + 1) * width], &d.w);
                    self.step(&d, &sums, &mut h[state.clone()], &mut c[state.clone()]);
                    let out = if self.batch_first {
                        (row * steps + step) * directions + direction
                    } else {
                        (step * directions + direction) * batch + row
                    };
                    y[out * hidden..(out + 1) * hidden].copy_from_slice(&h[state.clone()]);
                }
            }
        }
        let (all, last) = if self.batch_first {
            ([batch, steps, directions, hidden], [batch, directions, hidden])
        } else {
            ([steps, directions, batch, hidden], [directions, batch, hidden])
        };
        let mut outputs = vec![Tensor::from_shape(&all, &y)?, Tensor::from_shape(&last, &h)?];
        if lstm {
            outputs.push(Tensor::from_shape(&last, &c)?);
        }
        Ok(outputs)
    }
}
