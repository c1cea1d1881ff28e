//! What the schemas of operators demand of a node: how many inputs and outputs it has, of which types, and whether the
//! scales of a quantizer fit its data.
//!
//! Only what holds in every opset that amax reads, and only where types and shapes are known.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::super::view::{GatherBlockQuantized, MICROSOFT, MatMulNBits, Quantizer, axis_in};
use super::super::{Model, NodeId, ValueId};
use crate::onnx::DataType;

/// The least and the largest number.
type Range = (usize, usize);

/// What an operator takes and gives.
struct Signature {
    domain: &'static str,
    op: &'static str,
    inputs: Range,
    outputs: Range,
    /// Those of the least number that may be left out all the same.
    optional: &'static [usize],
    types: Types,
}

/// What is known of the types of inputs.
enum Types {
    Any,
    /// These inputs have one type.
    Same(&'static [usize]),
    /// All inputs have one type.
    AllSame,
    /// This input is `int32` or `int64`.
    Index(usize),
    /// `bool`, and two of one type.
    Select,
    /// Integer values at these inputs, each with its zero point at the other, which has its type.
    Zeros(&'static [(usize, usize)]),
    /// As [`Zeros`](Self::Zeros), with floats at these inputs.
    Scaled(&'static [(usize, usize)], &'static [usize]),
}

use Types::{AllSame, Any, Index, Same, Scaled, Select, Zeros};

const MANY: usize = usize::MAX;

const FLOATS: [DataType; 3] = [DataType::Float, DataType::Float16, DataType::Bfloat16];

const fn onnx(op: &'static str, inputs: Range, types: Types) -> Signature {
    Signature { domain: "", op, inputs, outputs: (1, 1), optional: &[], types }
}

const fn ort(op: &'static str, inputs: Range, optional: &'static [usize], types: Types) -> Signature {
    Signature { domain: MICROSOFT, op, inputs, outputs: (1, 1), optional, types }
}

const fn giving(outputs: Range, signature: Signature) -> Signature {
    Signature { outputs, ..signature }
}

/// By domain and operator.
const SIGNATURES: &[Signature] = &[
    onnx("Add", (2, 2), AllSame),
    onnx("AveragePool", (1, 1), Any),
    onnx("Clip", (1, 3), AllSame),
    onnx("Concat", (1, MANY), AllSame),
    onnx("Conv", (2, 3), AllSame),
    onnx("ConvInteger", (2, 4), Zeros(&[(0, 2), (1, 3)])),
    onnx("ConvTranspose", (2, 3), AllSame),
    onnx("DepthToSpace", (1, 1), Any),
    onnx("DequantizeLinear", (2, 3), Any),
    onnx("Div", (2, 2), AllSame),
    giving((3, 3), onnx("DynamicQuantizeLinear", (1, 1), Scaled(&[], &[0]))),
    onnx("Erf", (1, 1), Any),
    onnx("Flatten", (1, 1), Any),
    giving((0, 2), onnx("GRU", (3, 6), Same(&[0, 1, 2, 3]))),
    onnx("Gather", (2, 2), Index(1)),
    onnx("Gelu", (1, 1), Any),
    onnx("Gemm", (2, 3), AllSame),
    onnx("GlobalAveragePool", (1, 1), Any),
    onnx("HardSigmoid", (1, 1), Any),
    onnx("HardSwish", (1, 1), Any),
    giving((0, 3), onnx("LSTM", (3, 8), Same(&[0, 1, 2, 3]))),
    giving((1, 3), onnx("LayerNormalization", (2, 3), Any)),
    onnx("LeakyRelu", (1, 1), Any),
    onnx("MatMul", (2, 2), AllSame),
    onnx("MatMulInteger", (2, 4), Zeros(&[(0, 2), (1, 3)])),
    giving((1, 2), onnx("MaxPool", (1, 1), Any)),
    onnx("Mul", (2, 2), AllSame),
    onnx("Pad", (1, 4), Any),
    onnx("QLinearConv", (8, 9), Scaled(&[(0, 2), (3, 5)], &[1, 4, 6])),
    onnx("QLinearMatMul", (8, 8), Zeros(&[(0, 2), (3, 5)])),
    onnx("QuantizeLinear", (2, 3), Any),
    onnx("ReduceMean", (1, 2), Any),
    onnx("Relu", (1, 1), Any),
    onnx("Reshape", (2, 2), Index(1)),
    onnx("Resize", (1, 4), Any),
    onnx("Sigmoid", (1, 1), Any),
    onnx("Slice", (1, 5), Any),
    onnx("Softmax", (1, 1), Any),
    giving((1, MANY), onnx("Split", (1, 2), Any)),
    onnx("Squeeze", (1, 2), Any),
    onnx("Sub", (2, 2), AllSame),
    onnx("Tanh", (1, 1), Any),
    onnx("Transpose", (1, 1), Any),
    onnx("Unsqueeze", (1, 2), Any),
    onnx("Where", (3, 3), Select),
    ort("DequantizeLinear", (2, 3), &[], Any),
    giving((0, 3), ort("DynamicQuantizeLSTM", (12, 12), &[3, 4, 5, 6, 7], Scaled(&[(1, 9), (2, 11)], &[0, 8, 10]))),
    ort("DynamicQuantizeMatMul", (3, 5), &[], Scaled(&[(1, 3)], &[0, 2])),
    ort("GatherBlockQuantized", (3, 4), &[], Index(1)),
    ort("MatMulIntegerToFloat", (4, 7), &[], Scaled(&[(0, 4), (1, 5)], &[2, 3])),
    ort("MatMulNBits", (3, 6), &[], Any),
    ort("QGemm", (6, 9), &[], Scaled(&[(0, 2), (3, 5)], &[1, 4])),
    ort("QLinearAdd", (7, 8), &[2, 5], Scaled(&[(0, 2), (3, 5)], &[1, 4, 6])),
    ort("QLinearAveragePool", (4, 5), &[2], Scaled(&[(0, 2)], &[1, 3])),
    ort("QLinearConcat", (3, MANY), &[1], Any),
    ort("QLinearGlobalAveragePool", (5, 5), &[], Scaled(&[(0, 2)], &[1, 3])),
    ort("QLinearLeakyRelu", (4, 5), &[2], Scaled(&[(0, 2)], &[1, 3])),
    ort("QLinearMul", (7, 8), &[2, 5], Scaled(&[(0, 2), (3, 5)], &[1, 4, 6])),
    ort("QLinearSigmoid", (4, 5), &[2], Scaled(&[(0, 2)], &[1, 3])),
    ort("QLinearSoftmax", (5, 5), &[2], Scaled(&[(0, 2)], &[1, 3])),
    ort("QLinearWhere", (9, 9), &[], Scaled(&[(1, 3), (4, 6)], &[2, 5, 7])),
    ort("QuantizeLinear", (2, 3), &[], Any),
];

/// How many inputs and outputs the other operators of the standard have, by name.
#[rustfmt::skip]
const COUNTS: &[(Range, Range, &str)] = &[
    ((0, 0), (1, 1), "Constant RandomNormal RandomUniform SequenceEmpty"),
    ((0, 1), (1, 1), "Optional OptionalHasElement"),
    ((1, 1), (1, 1), "Abs Acos Acosh ArgMax ArgMin Asin Asinh Atan Atanh Bernoulli BitCast BitwiseNot BlackmanWindow Cast \
         Ceil Celu ConcatFromSequence ConstantOfShape Cos Cosh Det Elu Exp EyeLike Floor GlobalLpPool \
         GlobalMaxPool HammingWindow HannWindow Hardmax Identity ImageDecoder IsInf IsNaN LRN Log LogSoftmax \
         LpNormalization LpPool MeanVarianceNormalization Mish Multinomial Neg NonZero Not OptionalGetElement \
         RandomNormalLike RandomUniformLike Reciprocal RegexFullMatch Round Selu SequenceLength Shape Shrink \
         Sign Sin Sinh Size Softplus Softsign SpaceToDepth Sqrt StringNormalizer Swish Tan TfIdfVectorizer \
         ThresholdedRelu"),
    ((1, 1), (1, 4), "Unique"),
    ((1, 1), (1, MANY), "If"),
    ((1, 1), (2, 2), "StringSplit"),
    ((1, 2), (1, 1), "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMin ReduceProd ReduceSum \
         ReduceSumSquare SequenceErase SplitToSequence Trilu Upsample"),
    ((1, 2), (2, 2), "TopK"),
    ((1, 3), (1, 1), "DFT"),
    ((1, 3), (1, 2), "Dropout"),
    ((1, MANY), (1, 1), "Einsum Max Mean Min SequenceConstruct Sum"),
    ((1, MANY), (1, MANY), "Scan SequenceMap"),
    ((2, 2), (1, 1), "AffineGrid And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike CenterCropPad Compress CumProd \
         CumSum Equal Expand GatherElements GatherND Greater GreaterOrEqual GridSample Less LessOrEqual \
         MaxRoiPool Mod Or PRelu Pow RMSNormalization ReverseSequence SequenceAt StringConcat SwiGLU Tile Xor"),
    ((2, 3), (1, 1), "MaxUnpool NegativeLogLikelihoodLoss SequenceInsert TensorScatter"),
    ((2, 3), (1, 2), "SoftmaxCrossEntropyLoss"),
    ((2, 4), (1, 1), "STFT"),
    ((2, 4), (2, 2), "CausalConvWithState"),
    ((2, 5), (1, 1), "NonMaxSuppression"),
    ((2, MANY), (1, MANY), "Loop"),
    ((3, 3), (1, 1), "Col2Im GroupNormalization InstanceNormalization OneHot Range RoiAlign Scatter ScatterElements \
         ScatterND"),
    ((3, 4), (1, 1), "RotaryEmbedding"),
    ((3, 5), (1, 1), "DeformConv"),
    ((3, 6), (0, 2), "RNN"),
    ((3, 6), (2, 2), "LinearAttention"),
    ((3, 7), (1, 4), "Attention"),
    ((5, 5), (1, 1), "MelWeightMatrix"),
    ((5, 5), (1, 5), "BatchNormalization"),
];

static COUNTED: LazyLock<HashMap<&str, (Range, Range)>> = LazyLock::new(|| {
    let named = |&(inputs, outputs, names): &(Range, Range, &'static str)| {
        names.split_whitespace().map(move |name| (name, (inputs, outputs)))
    };
    COUNTS.iter().flat_map(named).collect()
});

/// What is wrong with a node, as clauses.
pub(super) fn violations(model: &Model, id: NodeId) -> Vec<String> {
    let node = model.node(id);
    let key = (node.domain(), node.op_type());
    let mut check = Check { model, id, found: Vec::new() };
    let Ok(at) = SIGNATURES.binary_search_by(|s| (s.domain, s.op).cmp(&key)) else {
        if let Some(&(inputs, outputs)) = COUNTED.get(node.op_type()).filter(|_| node.domain().is_empty()) {
            check.counts(inputs, outputs);
        }
        return check.found;
    };
    let Signature { inputs, outputs, optional, .. } = SIGNATURES[at];
    if check.counts(inputs, outputs) && check.has_all(inputs.0, optional) {
        check.types(&SIGNATURES[at].types);
        match node.op_type() {
            "QuantizeLinear" | "DequantizeLinear" => check.quantizer(),
            "MatMulNBits" => check.nbits(),
            "GatherBlockQuantized" => check.gather(),
            _ => {}
        }
    }
    check.found
}

struct Check<'a> {
    model: &'a Model,
    id: NodeId,
    found: Vec<String>,
}

/// "1 input", "2 to 3 inputs", "at least 2 inputs".
fn counted((least, most): Range, what: &str) -> String {
    let plural = |n: usize| if n == 1 { "" } else { "s" };
    match most {
        MANY => format!("at least {least} {what}{}", plural(least)),
        _ if least == most => format!("{least} {what}{}", plural(least)),
        _ => format!("{least} to {most} {what}s"),
    }
}

impl Check<'_> {
    fn input(&self, index: usize) -> Option<ValueId> {
        self.model.node(self.id).input(index)
    }

    fn dtype(&self, index: usize) -> Option<DataType> {
        self.model.dtype(self.input(index)?)
    }

    fn name(&self, index: usize) -> &str {
        self.input(index).map_or("", |v| self.model.value(v).name())
    }

    fn say(&mut self, clause: String) {
        self.found.push(clause);
    }

    /// Whether the node has as many inputs and outputs as its operator.
    fn counts(&mut self, inputs: Range, outputs: Range) -> bool {
        let node = self.model.node(self.id);
        // Inputs left out at the end count neither way.
        let listed = node.inputs().iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        if listed > inputs.1 || node.inputs().len() < inputs.0 {
            let (count, takes) = (listed.min(node.inputs().len()), counted(inputs, "input"));
            self.say(format!("has {}, but takes {takes}", counted((count, count), "input")));
        }
        let count = node.outputs().len();
        if count < outputs.0 || count > outputs.1 {
            self.say(format!("has {}, but gives {}", counted((count, count), "output"), counted(outputs, "output")));
        }
        self.found.is_empty()
    }

    /// Whether none of the first inputs is left out, but for those that may be.
    fn has_all(&mut self, first: usize, optional: &[usize]) -> bool {
        let missing = (0..first).find(|at| self.input(*at).is_none() && !optional.contains(at));
        if let Some(missing) = missing {
            self.say(format!("lacks its input {missing}"));
        }
        missing.is_none()
    }

    fn types(&mut self, types: &Types) {
        let all = self.model.node(self.id).inputs().len();
        match *types {
            Any => {}
            Same(inputs) => self.same(inputs.iter().copied()),
            AllSame => self.same(0..all),
            Index(at) => self.one_of(at, &[DataType::Int32, DataType::Int64], "an index is int32 or int64"),
            Select => {
                self.one_of(0, &[DataType::Bool], "a condition is bool");
                self.same(1..3);
            }
            Zeros(pairs) => self.zeros(pairs),
            Scaled(pairs, floats) => {
                self.zeros(pairs);
                for &at in floats {
                    self.one_of(at, &FLOATS, "it takes a float there");
                }
            }
        }
    }

    fn same(&mut self, inputs: impl Iterator<Item = usize>) {
        let typed: Vec<(usize, DataType)> = inputs.filter_map(|at| Some((at, self.dtype(at)?))).collect();
        let Some(&(first, dtype)) = typed.first() else { return };
        if let Some(&(at, other)) = typed.iter().find(|(_, other)| *other != dtype) {
            let (a, b) = (self.name(first), self.name(at));
            self.say(format!("reads \"{a}\" of {dtype} beside \"{b}\" of {other}: they have one type"));
        }
    }

    fn one_of(&mut self, at: usize, allowed: &[DataType], why: &str) {
        if let Some(dtype) = self.dtype(at).filter(|dtype| !allowed.contains(dtype)) {
            self.say(format!("reads \"{}\" of {dtype} at input {at}: {why}", self.name(at)));
        }
    }

    fn zeros(&mut self, pairs: &[(usize, usize)]) {
        for &(at, zero) in pairs {
            if let Some(dtype) = self.dtype(at).filter(|dtype| dtype.format().is_none()) {
                self.say(format!("reads \"{}\" of {dtype} at input {at}: it takes quantized values", self.name(at)));
            } else {
                self.zero(at, zero);
            }
        }
    }

    fn zero(&mut self, at: usize, zero: usize) {
        let shape = self.input(zero).and_then(|zero| self.model.shape(zero));
        if shape.is_some_and(|shape| shape.contains(&Some(0))) {
            self.say(format!("has the zero point \"{}\", which is empty", self.name(zero)));
        }
        if let (Some(dtype), Some(other)) = (self.dtype(at), self.dtype(zero))
            && dtype != other
        {
            let (a, b) = (self.name(at), self.name(zero));
            self.say(format!("has the zero point \"{b}\" of {other} for \"{a}\" of {dtype}: they have one type"));
        }
    }

    /// Types, scales and zero points of a `QuantizeLinear` or `DequantizeLinear`.
    fn quantizer(&mut self) {
        let node = self.model.node(self.id);
        let quantizes = node.op_type() == "QuantizeLinear";
        let Some(quantizer) = Quantizer::of(node) else { return };
        let before = self.found.len();
        let float = |dtype: DataType| matches!(dtype, DataType::Float | DataType::Float16 | DataType::Bfloat16);
        if let Some(dtype) = self.dtype(1).filter(|&d| !float(d) && d != DataType::Float8e8m0) {
            self.say(format!("has the scale \"{}\" of {dtype}, which is not one of floats", self.name(1)));
        }
        let coded = |dtype: DataType| dtype.format().is_some();
        match self.dtype(0) {
            Some(dtype) if quantizes && !float(dtype) && dtype != DataType::Int32 => {
                self.say(format!("quantizes \"{}\" of {dtype}, which is not float", self.name(0)));
            }
            Some(dtype) if !quantizes && !coded(dtype) && dtype != DataType::Int32 => {
                self.say(format!("dequantizes \"{}\" of {dtype}, which is not quantized", self.name(0)));
            }
            _ => {}
        }
        if let Some(zero) = self.dtype(2) {
            if quantizes && !coded(zero) {
                self.say(format!("has the zero point \"{}\" of {zero}, which is not quantized", self.name(2)));
            } else if quantizes && quantizer.output_dtype.is_some_and(|asked| asked != zero) {
                let zero = format!("\"{}\" of {zero}", self.name(2));
                self.say(format!("has an output_dtype that is not that of its zero point {zero}"));
            } else if !quantizes {
                self.zero(0, 2);
            }
        }
        if self.found.len() == before {
            self.scales(quantizer);
        }
    }

    fn scales(&mut self, quantizer: Quantizer) {
        let shape = |at: usize| self.model.shape(self.input(at)?);
        let whole = |dims: &Option<Vec<Option<usize>>>| {
            dims.as_ref()?.iter().try_fold(1, |all: usize, &dim| all.checked_mul(dim?))
        };
        let (data, scale, zero) = (shape(0), shape(1), shape(2));
        let scales = whole(&scale);
        if let (Some(scales), Some(zeros)) = (scales, whole(&zero))
            && scales != zeros
        {
            let (scale, zero) = (self.name(1), self.name(2));
            return self.say(format!("has {scales} scales in \"{scale}\" and {zeros} zero points in \"{zero}\""));
        }
        let (Some(data), Some(scale)) = (data, scale) else { return };
        let named = format!("\"{}\" of shape {}", self.name(1), written(&scale));
        let axis = axis_in(quantizer.axis, data.len());
        if quantizer.block_size > 0 {
            let block = quantizer.block_size as usize;
            let blocks = |(at, dim): (usize, &Option<usize>)| {
                if Some(at) == axis { dim.map(|dim| dim.div_ceil(block)) } else { *dim }
            };
            let wanted: Vec<Option<usize>> = data.iter().enumerate().map(blocks).collect();
            let fits = wanted.len() == scale.len()
                && wanted.iter().zip(&scale).all(|(a, b)| a.zip(*b).is_none_or(|(a, b)| a == b));
            if axis.is_none() {
                let rank = data.len();
                self.say(format!("has its blocks along axis {} of a tensor of rank {rank}", quantizer.axis));
            } else if !fits {
                self.say(format!("has the scales {named} where blocks of {block} need {}", written(&wanted)));
            }
        } else if scale.len() == 1 && scales.is_some_and(|scales| scales > 1) {
            match axis {
                None => {
                    let rank = data.len();
                    self.say(format!("has its scales along axis {} of a tensor of rank {rank}", quantizer.axis));
                }
                Some(axis) => {
                    if let Some(length) = data[axis].filter(|&length| Some(length) != scales) {
                        self.say(format!("has the scales {named} for axis {axis}, which has length {length}"));
                    }
                }
            }
        }
    }

    fn nbits(&mut self) {
        let Some(view) = MatMulNBits::of(self.model.node(self.id)) else { return };
        for (name, size) in [("K", view.k), ("N", view.n), ("block_size", view.block_size)] {
            if size.is_none() {
                self.say(format!("has no attribute {name} above 0"));
            }
        }
        self.one_of(0, &FLOATS, "it takes a float there");
        self.one_of(1, &[DataType::Uint8, DataType::Int32], "its weight is packed into bytes");
        self.scales_are_float(2);
    }

    fn gather(&mut self) {
        let Some(view) = GatherBlockQuantized::of(self.model.node(self.id)) else { return };
        if view.block_size <= 0 {
            self.say("has no attribute block_size above 0".to_owned());
        }
        self.one_of(0, &[DataType::Uint8, DataType::Int4, DataType::Uint4], "its table is uint8, int4 or uint4");
        self.scales_are_float(2);
        self.zero(0, 3);
    }

    fn scales_are_float(&mut self, at: usize) {
        self.one_of(at, &FLOATS, "scales are floats");
    }
}

/// `[4, ?]`.
fn written(dims: &[Option<usize>]) -> String {
    let dims: Vec<String> = dims.iter().map(|d| d.map_or("?".to_owned(), |d| d.to_string())).collect();
    format!("[{}]", dims.join(", "))
}

#[cfg(test)]
mod tests {
    use super::SIGNATURES;
    use crate::ops;

    #[test]
    fn table_is_sorted_so_that_it_can_be_searched() {
        assert!(SIGNATURES.windows(2).all(|w| (w[0].domain, w[0].op) < (w[1].domain, w[1].op)));
    }

    #[test]
    fn operators_with_a_row_have_a_signature() {
        for row in ops::TABLE {
            let found = SIGNATURES.iter().find(|s| s.domain.is_empty() && s.op == row.op);
            let most = found.map(|s| s.inputs.1);
            assert_eq!(most, Some(if row.variadic { super::MANY } else { row.inputs.len() }), "{}", row.op);
        }
    }
}
