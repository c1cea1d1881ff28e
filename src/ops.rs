//! What amax knows about operators: one row each.
//!
//! A row says which inputs carry data, a weight or a bias, on which axis the weight has one scale a channel, and how the
//! range of the output follows from that of the inputs. An operator without a row is never quantized. What a runtime
//! executes in integers is not said here but in [`targets`](crate::targets).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ir::{Def, GraphId, Model, NodeId, Tensor, User, ValueId, view};
use crate::numerics::pair_safe;
use crate::onnx::DataType;

/// What an input is to its operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Activations.
    Data,
    /// A weight where it is constant; otherwise activations.
    Weight(Channel),
    /// Added to the accumulator; scale is that of input 0 times that of input 1.
    Bias,
    /// Shapes, axes, indices, thresholds: never quantized.
    Other,
}

/// Where a weight keeps its output channels, and how its reduction runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// `[M, C/group, k…]`, channel axis 0 (Conv).
    Conv,
    /// `[C, M/group, k…]`, channel axis 1 (ConvTranspose).
    ConvTranspose,
    /// The right operand of a product, `[…, K, N]`: channel axis last. `transB` makes it `[N, K]`.
    Right,
    /// The left operand of a product, `[…, M, K]`: channel axis last but one.
    Left,
    /// A table of rows (Gather).
    Rows,
    /// Gates stacked on axis 1, directions on axis 0 (LSTM, GRU).
    Gates,
}

/// How the range of the output is found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    /// It has a range of its own.
    Own,
    /// Its values are values of this input (or convex combinations of them): it can share that input's scale.
    SameAs(usize),
    /// Whatever the data, values lie in this interval.
    Range(f32, f32),
    /// Not quantizable.
    Float,
}

/// One operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Operator of the default domain.
    pub op: &'static str,
    /// Roles of the inputs; the last repeats for variadic operators.
    pub inputs: &'static [Role],
    /// Whether the last role repeats.
    pub variadic: bool,
    /// The output.
    pub output: Output,
    /// Attributes that integer kernels have one value of.
    pub fixed: &'static [Fixed],
    /// The attribute that multiplies the product.
    pub factor: Option<&'static str>,
    /// What becomes of low values, where nothing else is computed.
    pub floor: Option<Floor>,
}

/// An attribute that integer kernels have one value of, its default.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fixed {
    /// Attribute.
    pub name: &'static str,
    /// Its value.
    pub value: Number,
    /// It says something about the bias, and nothing without one.
    pub of_bias: bool,
}

/// The value of an attribute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f32),
    /// A list of nothing else.
    Ones,
}

/// What an operator that only clips does to low values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// They become zero (Relu).
    Zero,
    /// They become the bound in input 1 or the attribute `min`; high ones that in input 2 (Clip).
    Bounds,
}

use Channel::{Conv, ConvTranspose, Gates, Left, Right, Rows};
use Role::{Bias, Data, Other, Weight};

const fn row(op: &'static str, inputs: &'static [Role], output: Output) -> Row {
    Row { op, inputs, variadic: false, output, fixed: &[], factor: None, floor: None }
}

const fn variadic(op: &'static str, inputs: &'static [Role], output: Output) -> Row {
    Row { variadic: true, ..row(op, inputs, output) }
}

const fn clip(op: &'static str, inputs: &'static [Role], floor: Floor) -> Row {
    Row { floor: Some(floor), ..row(op, inputs, Output::Own) }
}

const GEMM: Row = Row {
    fixed: &[
        Fixed { name: "transA", value: Number::Int(0), of_bias: false },
        Fixed { name: "beta", value: Number::Float(1.0), of_bias: true },
    ],
    factor: Some("alpha"),
    ..row("Gemm", &[Data, Weight(Right), Bias], Output::Own)
};

const AVERAGE_POOL: Row = Row {
    fixed: &[Fixed { name: "dilations", value: Number::Ones, of_bias: false }],
    ..row("AveragePool", &[Data], Output::Own)
};

/// The table, by operator name.
pub const TABLE: &[Row] = &[
    row("Add", &[Data, Data], Output::Own),
    AVERAGE_POOL,
    clip("Clip", &[Data, Other, Other], Floor::Bounds),
    variadic("Concat", &[Data], Output::Own),
    row("Conv", &[Data, Weight(Conv), Bias], Output::Own),
    row("ConvTranspose", &[Data, Weight(ConvTranspose), Bias], Output::Own),
    row("DepthToSpace", &[Data], Output::SameAs(0)),
    row("Div", &[Data, Data], Output::Own),
    row("Erf", &[Data], Output::Range(-1.0, 1.0)),
    row("Flatten", &[Data], Output::SameAs(0)),
    row("GRU", &[Data, Weight(Gates), Weight(Gates), Other, Other, Other], Output::Float),
    row("Gather", &[Weight(Rows), Other], Output::SameAs(0)),
    row("Gelu", &[Data], Output::Own),
    GEMM,
    row("GlobalAveragePool", &[Data], Output::Own),
    row("HardSigmoid", &[Data], Output::Range(0.0, 1.0)),
    row("HardSwish", &[Data], Output::Own),
    row("LSTM", &[Data, Weight(Gates), Weight(Gates), Other, Other, Other, Other, Other], Output::Float),
    row("LayerNormalization", &[Data, Other, Other], Output::Own),
    row("LeakyRelu", &[Data], Output::Own),
    row("MatMul", &[Weight(Left), Weight(Right)], Output::Own),
    row("MaxPool", &[Data], Output::SameAs(0)),
    row("Mul", &[Data, Data], Output::Own),
    row("Pad", &[Data, Other, Other, Other], Output::Own),
    row("ReduceMean", &[Data, Other], Output::Own),
    clip("Relu", &[Data], Floor::Zero),
    row("Reshape", &[Data, Other], Output::SameAs(0)),
    row("Resize", &[Data, Other, Other, Other], Output::SameAs(0)),
    row("Sigmoid", &[Data], Output::Range(0.0, 1.0)),
    row("Slice", &[Data, Other, Other, Other, Other], Output::SameAs(0)),
    row("Softmax", &[Data], Output::Range(0.0, 1.0)),
    row("Split", &[Data, Other], Output::SameAs(0)),
    row("Squeeze", &[Data, Other], Output::SameAs(0)),
    row("Sub", &[Data, Data], Output::Own),
    row("Tanh", &[Data], Output::Range(-1.0, 1.0)),
    row("Transpose", &[Data], Output::SameAs(0)),
    row("Unsqueeze", &[Data, Other], Output::SameAs(0)),
    row("Where", &[Other, Data, Data], Output::Own),
];

/// The row of an operator of the default domain.
#[must_use]
pub fn find(op: &str) -> Option<&'static Row> {
    TABLE.binary_search_by(|r| r.op.cmp(op)).ok().map(|i| &TABLE[i])
}

/// The row of a node.
#[must_use]
pub fn of(model: &Model, node: NodeId) -> Option<&'static Row> {
    let node = model.node(node);
    if node.domain().is_empty() { find(node.op_type()) } else { None }
}

/// Operators of any domain that read or make quantized values, beside the quantizers and the `QLinear…`.
const QUANTIZED: &[&str] = &[
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QAttention",
    "QGemm",
];

/// Whether an operator reads or makes quantized values.
#[must_use]
pub fn is_quantized(op: &str) -> bool {
    let quantizer = op.ends_with("QuantizeLinear") || op.ends_with("DequantizeLinear");
    quantizer || op.starts_with("QLinear") || QUANTIZED.contains(&op)
}

/// Whether a node only clips, at a lower bound of zero, with bounds that are known.
#[must_use]
pub fn clips_at_zero(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    match of(model, node).and_then(|row| row.floor) {
        None => false,
        Some(Floor::Zero) => true,
        Some(Floor::Bounds) => {
            let low = match at.input(1) {
                Some(v) => model.constant(v).and_then(Tensor::to_f32).and_then(|v| v.first().copied()),
                None => at.float("min"),
            };
            low == Some(0.0) && at.input(2).is_none_or(|v| model.constant(v).is_some())
        }
    }
}

/// The first attribute that integer kernels have another value of.
#[must_use]
pub fn unfit_attribute(model: &Model, node: NodeId) -> Option<&'static Fixed> {
    let at = model.node(node);
    let row = of(model, node)?;
    let bias = (0..at.inputs().len()).any(|i| row.role(i) == Bias && at.input(i).is_some());
    let differs = |fixed: &Fixed| match fixed.value {
        Number::Int(value) => at.int(fixed.name).unwrap_or(value) != value,
        Number::Float(value) => (at.float(fixed.name).unwrap_or(value) - value).abs() > 0.0,
        Number::Ones => at.ints(fixed.name).is_some_and(|list| list.iter().any(|&i| i != 1)),
    };
    row.fixed.iter().find(|fixed| (bias || !fixed.of_bias) && differs(fixed))
}

/// The attribute that multiplies the product of a node by something.
#[must_use]
pub fn factor(model: &Model, node: NodeId) -> Option<&'static str> {
    let name = of(model, node)?.factor?;
    ((model.node(node).float(name).unwrap_or(1.0) - 1.0).abs() > 0.0).then_some(name)
}

/// Whether the right operand of a product is stored as `[N, K]`.
#[must_use]
pub fn is_transposed(model: &Model, node: NodeId) -> bool {
    view::Gemm::of(model.node(node)).is_some_and(|gemm| gemm.trans_b)
}

/// How the constant at an input is laid out, if it is a weight.
#[must_use]
pub fn constant_weight(model: &Model, node: NodeId, index: usize) -> Option<Channel> {
    let Weight(channel) = of(model, node)?.role(index) else { return None };
    model.constant_input(node, index).map(|_| channel)
}

/// Output channels of the constant weight at `index`.
#[must_use]
pub fn channels(model: &Model, node: NodeId, index: usize) -> Option<usize> {
    let dims = model.constant_input(node, index)?.dims();
    let axis = weight_layout(model, node, index, &dims)?.channel_axis?;
    Some(dims[axis])
}

impl Row {
    /// Whether an input is a weight where it is constant.
    #[must_use]
    pub fn has_weight(&self) -> bool {
        self.inputs.iter().any(|role| matches!(role, Weight(_)))
    }

    /// Role of input `index`.
    ///
    /// # Panics
    /// Never: rows of variadic operators have a role.
    #[must_use]
    pub fn role(&self, index: usize) -> Role {
        match self.inputs.get(index) {
            Some(&role) => role,
            None if self.variadic => self.inputs.last().copied().unwrap_or(Other),
            None => Other,
        }
    }
}

/// Operators whose first output has another type than their first input.
const OTHER_TYPE: &[&str] = &[
    "And",
    "ArgMax",
    "ArgMin",
    "Bernoulli",
    "CastLike",
    "ConstantOfShape",
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "Equal",
    "EyeLike",
    "Greater",
    "GreaterOrEqual",
    "ImageDecoder",
    "IsInf",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "MatMulInteger",
    "MelWeightMatrix",
    "Multinomial",
    "NonMaxSuppression",
    "NonZero",
    "Not",
    "OneHot",
    "Or",
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
    "RandomNormalLike",
    "RandomUniformLike",
    "RegexFullMatch",
    "SequenceAt",
    "Shape",
    "Size",
    "StringNormalizer",
    "StringSplit",
    "TfIdfVectorizer",
    "Where",
    "Xor",
];

/// Integers that operators make beside what they compute, by operator and output.
const INDICES: &[(&str, usize)] =
    &[("Dropout", 1), ("MaxPool", 1), ("TopK", 1), ("Unique", 1), ("Unique", 2), ("Unique", 3)];

/// The element types of what nodes make, in every graph, where the model does not declare them and operators tell.
#[must_use]
pub fn undeclared_types(model: &Model) -> BTreeMap<ValueId, DataType> {
    let mut found = BTreeMap::new();
    types_in(model, model.main(), &mut found);
    found
}

fn types_in(model: &Model, graph: GraphId, found: &mut BTreeMap<ValueId, DataType>) {
    for &node in model.graph(graph).nodes() {
        let at = model.node(node);
        let known = |v: ValueId, found: &BTreeMap<ValueId, DataType>| model.dtype(v).or_else(|| found.get(&v).copied());
        // What a Loop or Scan carries keeps its type; a Loop has a count and a condition in front.
        for body in at.bodies() {
            for (index, input) in model.graph(body).inputs().enumerate() {
                let outer = at.input(index).filter(|_| model.dtype(input).is_none());
                found.extend(outer.and_then(|v| known(v, found)).map(|dtype| (input, dtype)));
            }
            types_in(model, body, found);
        }
        let of = |index: usize, found: &_| at.input(index).and_then(|v| known(v, found));
        for (index, output) in at.outputs().iter().enumerate() {
            let Some(output) = output.filter(|&v| model.dtype(v).is_none()) else { continue };
            let dtype = match at.op_type() {
                _ if at.bodies().next().is_some() => {
                    let skip = usize::from(at.is("Loop"));
                    at.bodies().find_map(|body| known(model.graph(body).outputs().nth(index + skip)?, found))
                }
                "Cast" => at.int("to").and_then(|code| DataType::from_code(i32::try_from(code).ok()?)),
                "RandomNormalLike" | "RandomUniformLike" | "EyeLike" | "Bernoulli" if at.int("dtype").is_none() => {
                    of(0, found)
                }
                "RandomNormal" | "RandomUniform" | "RandomNormalLike" | "RandomUniformLike" | "EyeLike"
                | "Bernoulli" => {
                    let code = at.int("dtype").unwrap_or(i64::from(DataType::Float.code()));
                    i32::try_from(code).ok().and_then(DataType::from_code)
                }
                "ConstantOfShape" | "Constant" => match at.attr("value") {
                    Some(value) => value.proto().t.as_ref().and_then(|t| DataType::from_code(t.data_type?)),
                    None => at.is("ConstantOfShape").then_some(DataType::Float),
                },
                "DequantizeLinear" | "CastLike" => of(1, found),
                "GatherBlockQuantized" | "EmbedLayerNormalization" | "OneHot" => of(2, found).filter(|_| index == 0),
                "QAttention" => of(3, found),
                "Where" => of(1, found).or_else(|| of(2, found)),
                op if OTHER_TYPE.contains(&op) || INDICES.contains(&(op, index)) => None,
                // Data and weights have one type.
                op if find(op).is_some_and(Row::has_weight) => of(0, found).or_else(|| of(1, found)),
                _ => of(0, found),
            };
            found.extend(dtype.map(|dtype| (output, dtype)));
        }
    }
}

/// Operators without a row whose inputs behind the first are parameters.
const PARAMETERS: &[&str] = &[
    "BatchNormalization",
    "CumSum",
    "DequantizeLinear",
    "Dropout",
    "Expand",
    "GroupNormalization",
    "InstanceNormalization",
    "OneHot",
    "PRelu",
    "QuantizeLinear",
    "ReduceL1",
    "ReduceL2",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Tile",
    "TopK",
    "Trilu",
    "Upsample",
];

/// The inputs of the main graph that have a default: those that are, as far as can be told, weights, which nobody gives
/// another value, and the others.
///
/// A weight has a fixed shape and no reader for which it is the state of a loop or of a recurrent layer. A single number is
/// one only where operators have parameters: `x * alpha` may be meant to be called with another `alpha`.
#[must_use]
pub fn inputs_with_defaults(model: &Model) -> (Vec<ValueId>, Vec<ValueId>) {
    let weight = |value: ValueId, default: &Tensor| {
        let fixed = model.shape(value).is_none_or(|shape| shape.iter().all(Option::is_some));
        fixed
            && model.value(value).users().iter().all(|user| match *user {
                User::Node { node, input } => is_parameter(model, node, input, default.len()),
                User::Output { .. } => false,
            })
    };
    let inputs = model.graph(model.main()).inputs().filter_map(|value| match model.value(value).def() {
        Def::Input { default: Some(default) } => Some((value, weight(value, default))),
        _ => None,
    });
    let (weights, others): (Vec<_>, Vec<_>) = inputs.partition(|(_, weight)| *weight);
    let values = |list: Vec<(ValueId, bool)>| list.into_iter().map(|(value, _)| value).collect();
    (values(weights), values(others))
}

/// Whether a tensor of so many elements at an input is what a model learned, or an operator is told once and for all.
fn is_parameter(model: &Model, node: NodeId, input: usize, elements: usize) -> bool {
    let at = model.node(node);
    if at.bodies().next().is_some() || (matches!(at.op_type(), "LSTM" | "GRU" | "RNN") && (4..7).contains(&input)) {
        return false;
    }
    let place = match of(model, node) {
        Some(row) => row.role(input) != Data,
        None => at.domain().is_empty() && input > 0 && PARAMETERS.contains(&at.op_type()),
    };
    place || elements > 1
}

/// How a quantized constant is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Codes in front of a DequantizeLinear.
    #[default]
    Qdq,
    /// The weight of a `MatMulNBits` of onnxruntime.
    Matmulnbits,
    /// The table of a `GatherBlockQuantized` of onnxruntime.
    GatherBlockQuantized,
    /// The weight of a `MatMulInteger` or `ConvInteger`, whose input is quantized at run time.
    Matmulinteger,
    /// The weights of a `DynamicQuantizeLSTM` of onnxruntime.
    DynamicQuantizeLstm,
}

impl Form {
    /// Every form.
    pub const ALL: [Self; 5] =
        [Self::Qdq, Self::Matmulnbits, Self::GatherBlockQuantized, Self::Matmulinteger, Self::DynamicQuantizeLstm];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qdq => "qdq",
            Self::Matmulnbits => "matmulnbits",
            Self::GatherBlockQuantized => "gather-block-quantized",
            Self::Matmulinteger => "matmulinteger",
            Self::DynamicQuantizeLstm => "dynamic-quantize-lstm",
        }
    }

    /// Whether it is one for weights of this operator.
    #[must_use]
    pub fn serves(self, op: &str) -> bool {
        match self {
            Self::Qdq => true,
            Self::Matmulnbits => matches!(op, "MatMul" | "Gemm"),
            Self::GatherBlockQuantized => op == "Gather",
            Self::Matmulinteger => matches!(op, "MatMul" | "Gemm" | "Conv"),
            Self::DynamicQuantizeLstm => op == "LSTM",
        }
    }
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How a constant weight of some shape is laid out for its operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightLayout {
    /// Axis of the output channels; `None` where one scale serves all.
    pub channel_axis: Option<usize>,
    /// The axis that one output is summed over, which groups cut; `None` where groups make no sense.
    pub group_axis: Option<usize>,
    /// Order of the reduction inside a channel.
    pub reduction: Reduction,
    /// Whether each output channel reads just one input channel and feeds none else (a depthwise convolution).
    pub depthwise: bool,
}

/// In which order an integer kernel walks the weights of one output channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Along this axis of a matrix.
    Along(usize),
    /// Kernel positions first, input channels of the group innermost (`O, H, W, I`).
    Spatial,
    /// Not a reduction that this table describes.
    None,
}

/// The layout of the constant weight at input `index` of `node`, with shape `dims`; `None` if that is not a weight or
/// its rank does not fit the operator.
#[must_use]
pub fn weight_layout(model: &Model, node: NodeId, index: usize, dims: &[usize]) -> Option<WeightLayout> {
    let Weight(channel) = of(model, node)?.role(index) else { return None };
    let rank = dims.len();
    let node = model.node(node);
    let group = view::Conv::of(node).map_or(1, |conv| conv.group);
    let layout =
        |channel_axis, group_axis, reduction| WeightLayout { channel_axis, group_axis, reduction, depthwise: false };
    Some(match channel {
        Conv if rank >= 3 => WeightLayout {
            channel_axis: Some(0),
            group_axis: Some(1),
            reduction: Reduction::Spatial,
            depthwise: dims[1] == 1 && group > 1 && dims[0] == group,
        },
        ConvTranspose if rank >= 3 && group == 1 => layout(Some(1), Some(0), Reduction::None),
        ConvTranspose if rank >= 3 => layout(None, Some(0), Reduction::None),
        Right if view::Gemm::of(node).is_some_and(|gemm| gemm.trans_b) && rank == 2 => {
            layout(Some(0), Some(1), Reduction::Along(1))
        }
        Right if rank == 2 => layout(Some(1), Some(0), Reduction::Along(0)),
        // A batch of matrices has one scale for all: kernels take one scale a column of a single matrix only.
        Right if rank > 2 => layout(None, Some(rank - 2), Reduction::Along(rank - 2)),
        Left if rank >= 2 => layout(None, Some(rank - 1), Reduction::Along(rank - 1)),
        Rows if rank >= 1 => {
            let rows = rank >= 2 && view::Gather::of(node).is_some_and(|gather| gather.axis == 0);
            layout(rows.then_some(0), Some(rank - 1), Reduction::None)
        }
        Gates if rank == 3 => layout(Some(1), Some(2), Reduction::Along(2)),
        _ => return None,
    })
}

/// Whether every output of a node holds values of its first input, so that codes can be moved in their place.
///
/// A Resize that interpolates computes new values, and the second output of a `MaxPool` holds indices.
#[must_use]
pub fn moves_codes(model: &Model, node: NodeId) -> bool {
    let at = model.node(node);
    let nearest = !at.is("Resize") || at.string("mode").unwrap_or("nearest") == "nearest";
    let single = !at.is("MaxPool") || at.output(1).is_none();
    nearest && single && of(model, node).is_some_and(|r| r.output == Output::SameAs(0))
}

/// Where the weights of each output channel lie, in the order in which the kernel reduces them.
#[must_use]
pub fn reduction_rows(dims: &[usize], reduction: Reduction) -> pair_safe::Rows {
    match reduction {
        Reduction::None => pair_safe::Rows::default(),
        Reduction::Spatial => pair_safe::Rows::conv(dims),
        Reduction::Along(axis) => pair_safe::Rows::along(dims, axis),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn table_is_sorted_so_that_it_can_be_searched() {
        assert!(super::TABLE.windows(2).all(|w| w[0].op < w[1].op));
    }
}
