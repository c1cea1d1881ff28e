//! Why something is as it is: what plans, passes and reports say of a node or tensor, as data.
//!
//! Each variant has typed fields, a sentence for people ([`Display`](std::fmt::Display), a clause in lower case without a
//! full stop), and in documents the shape `{"code": …, fields…, "text": …}`: programs read the code and the fields, people
//! the text, which is ignored when a document is read back.

mod operand;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use operand::Operand;

use crate::error::Error;
use crate::numerics::{Format, Granularity};
use crate::onnx::DataType;
use crate::ops::Form;

/// Operators that read quantized weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kernel {
    /// Products with weights of 2, 4 or 8 bits.
    MatMulNBits,
    /// Lookups in a table of 2, 4 or 8 bits.
    GatherBlockQuantized,
    /// Products of integers.
    MatMulInteger,
    /// Convolutions of integers.
    ConvInteger,
    /// An LSTM that quantizes its input itself.
    DynamicQuantizeLSTM,
}

impl Kernel {
    /// How many scales its weight can have, in words.
    fn scales(self) -> &'static str {
        match self {
            Self::MatMulNBits => "one scale for a weight, one for each column, or one for each block along the sum",
            Self::GatherBlockQuantized => "one scale for a table, one for each row, or one for each block of a row",
            Self::MatMulInteger | Self::ConvInteger => "one scale for a weight, or one for each output channel",
            Self::DynamicQuantizeLSTM => "one scale for a weight, or one for each row",
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// A signal-to-noise ratio in dB. Documents show those that are not finite, which JSON cannot, as `null`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Decibels(pub f64);

impl std::fmt::Display for Decibels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} dB", self.0)
    }
}

impl Serialize for Decibels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.is_finite().then_some(self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Decibels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Option::deserialize(deserializer)?.unwrap_or(f64::NEG_INFINITY)))
    }
}

/// In what two readers of one constant differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// A key of the plan.
    pub key: String,
    /// What each site has there: the site, and the value as text.
    pub values: Vec<(String, String)>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let values: Vec<String> = self.values.iter().map(|(site, value)| format!("{value} for {site}")).collect();
        write!(f, "{} {}", self.key, values.join(", "))
    }
}

/// ` over [-1.0000, 2.0000]`, where a range is known.
fn over(range: Option<&(f32, f32)>) -> String {
    range.map_or_else(String::new, |(low, high)| format!(" over [{low:.4}, {high:.4}]"))
}

/// `: because …`, where there is more to say.
fn more(because: Option<&Reason>) -> String {
    because.map_or_else(String::new, |why| format!(": {why}"))
}

/// `16, 32 or 64`.
fn either(choices: &[impl ToString]) -> String {
    let words: Vec<String> = choices.iter().map(ToString::to_string).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

/// `16, 32 or 64`, or `16, 32, 64 and so on`: sizes that double.
fn powers(least: usize, most: Option<usize>) -> String {
    let sizes = std::iter::successors(Some(least), |size| size.checked_mul(2));
    match most {
        Some(most) => either(&sizes.take_while(|&size| size <= most).collect::<Vec<_>>()),
        None => format!("{} and so on", sizes.take(3).map(|size| size.to_string()).collect::<Vec<_>>().join(", ")),
    }
}

/// `uint8 and int8 to uint8`.
fn types(inputs: &[DataType], output: Option<DataType>) -> String {
    let inputs: Vec<String> = inputs.iter().map(ToString::to_string).collect();
    output.map_or_else(|| inputs.join(" and "), |output| format!("{} to {output}", inputs.join(" and ")))
}

fn joined(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// One table: the variant with its fields, and what people read; expressions behind the text fill its `{}`.
macro_rules! sentences {
    (
        $(#[$about:meta])* $table:ident:
        $($(#[$doc:meta])* $name:ident $({ $($field:ident: $type:ty),* $(,)? })? => $text:literal $(, $part:expr)*;)*
    ) => {
        $(#[$about])*
        #[allow(missing_docs, reason = "the sentence of each variant says what its fields are")]
        #[derive(Clone, Debug, PartialEq, ::serde::Serialize, ::serde::Deserialize)]
        #[serde(tag = "code", rename_all = "kebab-case", remote = "Self")]
        pub enum $table {
            $($(#[$doc])* $name $({ $($field: $type),* })?,)*
        }

        impl $table {
            /// Every variant: its name, which in kebab case is its code, its fields, and its sentence.
            pub const ALL: &'static [(&'static str, &'static [&'static str], &'static str)] =
                &[$((stringify!($name), &[$($(stringify!($field)),*)?], $text),)*];
        }

        impl std::fmt::Display for $table {
            #[allow(unused_variables, reason = "not every field is in the sentence")]
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $(Self::$name $({ $($field),* })? => write!(f, $text $(, $part)*),)*
                }
            }
        }

        impl ::serde::Serialize for $table {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                struct Data<'a>(&'a $table);
                impl ::serde::Serialize for Data<'_> {
                    fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                        $table::serialize(self.0, serializer)
                    }
                }
                #[derive(::serde::Serialize)]
                struct Document<'a> {
                    #[serde(flatten)]
                    data: Data<'a>,
                    text: String,
                }
                Document { data: Data(self), text: self.to_string() }.serialize(serializer)
            }
        }

        impl<'de> ::serde::Deserialize<'de> for $table {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $table::deserialize(deserializer)
            }
        }
    };
}
pub(crate) use sentences;

sentences! {
    /// Why something is as it is.
    Reason:

    // Plans: what the configuration says.

    /// A rule about certain nodes or operators switches everything of it off.
    Excluded { rule: String } => "switched off by {rule}";
    /// A rule about all nodes does.
    SwitchedOff { rule: String } => "switched off by {rule}";
    /// A rule switches one site off.
    OffBy { what: Operand, rule: String } => "its {what} is switched off by {rule}";
    /// A tensor is switched off by its name.
    TensorOff { tensor: String } => "\"{tensor}\" is switched off by [tensor.\"{tensor}\"]";
    /// A key asks for an axis that a weight does not have.
    NoAxis { axis: i64, dims: Vec<usize> } => "a weight of shape {dims:?} has no axis {axis}";
    /// A weight that can be stored in few bits where a rule asks for it.
    WeightNotAsked { op: String, form: Option<Form> } => "no rule asks for quantized {op} weights; {}",
        form.map_or_else(|| format!("--set op_type.{op}.weight.enable=true does"), |form| format!("--set op_type.{op}.weight.form={form} does"));
    /// Nothing asks for a site.
    NotAsked => "nothing asks for it";

    // Plans: what the node is.

    /// It is quantized in the input model.
    QuantizedAlready => "is quantized already; its quantizers are kept";
    /// An operand would have to be known before the model runs.
    NotConstant { what: Operand } => "its {what} is not constant";
    /// It would be one but for callers, who may give another value.
    InputWithDefault { what: Operand, tensor: String } =>
        "its {what} \"{tensor}\" is an input of the model with a default, which callers may replace";
    /// An operand has an element type that cannot be used here.
    WrongType { what: Operand, found: DataType, wanted: String } => "its {what} is {found}, not {wanted}";
    /// A tensor has an element type that cannot be used here.
    WrongTensorType { tensor: String, found: DataType, wanted: String } => "\"{tensor}\" is {found}, not {wanted}";
    /// Where nothing else has a type, it has to be declared.
    UnknownType { tensor: String } => "the type of \"{tensor}\" is not known";
    /// An operand has no elements.
    Empty { what: Operand } => "its {what} is empty";
    /// An operand has a shape that cannot be used here.
    WrongShape { what: Operand, dims: Vec<usize> } => "a {what} of shape {dims:?} is not supported";
    /// A bias that would have to be one value for each channel.
    BiasPerChannel { dims: Vec<usize> } => "its bias is not one value for each column";
    /// An attribute has a value that no kernel has.
    Attribute { name: String, wanted: i64 } => "its {name} is not {wanted}";
    /// A recurrent layer with the batch on its first axis.
    BatchFirst => "its batch comes first";
    /// A table is cut along an axis that it does not have.
    AxisOutside { axis: i64 } => "its axis {axis} is outside the table";
    /// A recurrent layer whose gates would feel the rounding of its input.
    SteepGates { norm: f64 } => "a gate's weights have a norm of {norm:.0}, so that an input rounded to 8 bits moves it far; with \
        samples the outputs are measured instead";
    /// A product whose sums have one term each.
    NoSum => "it only scales each row by the numbers of its weight, which rounding them would make worse";
    /// A product of two constants.
    BothConstant => "both operands are constant";
    /// A product of two activations.
    BothActivations => "both operands are activations; quantizing them costs accuracy and saves no bytes";
    /// Nothing comes out of it.
    NoOutput => "it has no output";
    /// Operators of a domain that is not in the table.
    UnknownDomain { domain: String } => "operators of domain {domain} are not known";
    /// An operator that is not in the table.
    UnknownOperator => "the operator is never quantized";
    /// A target that fuses dequantized weights of products in bodies, and fails to.
    FusedInBody { target: String } => "{target} does not load products of dequantized weights in bodies";
    /// What is inside an If, Loop or Scan.
    InBody => "activations in bodies stay float";
    /// The graph inside an If, Loop or Scan.
    Body { nodes: usize } => "{nodes} node{} inside a body, of which only weights are quantized",
        if *nodes == 1 { "" } else { "s" };

    // Plans: what the target has.

    /// It has no integer kernel for an operator.
    NoKernel { target: String } => "{target} has no integer kernel for it";
    /// It has none for an operand in a format, or with scales for groups.
    NoKernelFor { target: String, what: Operand, format: Format, granularity: Granularity }
        => "{target} has no integer kernel for {format} {what}s{}",
        if matches!(granularity, Granularity::PerGroup { .. }) { " in groups" } else { "" };
    /// It has no kernel that finds the range of its input itself.
    NoKernelAtRunTime { target: String, op: String } => "{target} has no {op} like this whose input is quantized at run time";
    /// Beside integers it reads no weights in this format.
    NotBesideIntegers { target: String, format: Format } => "{target} does not load {format} weights beside integers";
    /// Its kernel has one scale for each index of another axis.
    FixedAxis { target: String, axis: usize } => "{target} takes one scale for each index of axis {axis} and ignores the axis that is given";
    /// Its kernel has one scale.
    OneScale { target: String } => "{target} takes one scale for this operand";
    /// It computes something wrong.
    WrongColumns { target: String, format: Format, multiple: usize }
        => "{target} computes a dequantized {format} weight wrongly unless its columns are a multiple of {multiple}";
    /// It has no such form.
    NoForm { target: String, form: Form } => "{target} has no {form}";
    /// It does without a quantized result.
    OutputNotNeeded { target: String, op: String } => "{target} does not need the result of this {op} quantized";
    /// It takes a float bias.
    FloatBias { target: String } => "{target} takes a float bias here";
    /// Its kernel needs a quantized output, which cannot be had.
    NeedsOutput { op: String, because: Box<Reason> } => "{because}, and the integer {op} needs a quantized output";
    /// An operator that runs in integers between quantized neighbours, which are missing.
    NotBetween => "not between quantized operators";
    /// An operator that vanishes into a quantizer, which is missing.
    NotFollowed => "not followed by a quantizer";
    /// A product with a single row or column.
    ProductWithVector => "it multiplies by a vector, which 8 bits do not make faster";
    /// Only products have inputs whose range is found at run time.
    ProductsAtRunTime => "only inputs of products are quantized at run time";

    // Plans: how constants are stored.

    /// The form that was asked for gave way to another one.
    FormGivesWay { form: Form, because: Box<Reason> } => "form {form} gives way: {because}";
    /// Operators in this form read floats.
    FormReadsFloats { form: Form } => "stored as {form}, it reads floats";
    /// The form is not one for this operator.
    NotItsForm { form: Form, op: String } => "{form} is not a form for {op}";
    /// The form has no scales of this type.
    FormScales { form: Form, scales: DataType } => "{form} has no {scales} scales";
    /// The form is for inputs that are quantized at run time.
    NotAtRunTime => "its input is not quantized at run time";
    /// The form is for operators that read floats.
    RunsOnIntegers { op: String } => "the {op} runs on integers";
    /// A kernel has its weight on the right.
    NotOnTheRight { kernel: Kernel } => "{kernel} takes a weight on the right";
    /// A kernel does not take constants of this shape.
    KernelShape { kernel: Kernel, dims: Vec<usize> } => "{kernel} does not take a constant of shape {dims:?}";
    /// A kernel has other formats.
    KernelFormat { kernel: Kernel, format: Format, has: Vec<Format> } => "{kernel} has {}, not {format}", either(has);
    /// A kernel has float scales.
    KernelScaleType { kernel: Kernel, scales: DataType } => "{kernel} has float scales, not {scales}";
    /// A kernel has scales for other parts of its weight.
    KernelScales { kernel: Kernel, granularity: Granularity } => "{kernel} has {}", kernel.scales();
    /// A kernel has groups of other sizes.
    KernelGroups { kernel: Kernel, size: usize, least: usize, most: Option<usize> }
        => "{kernel} has groups of {}, not of {size}", powers(*least, *most);
    /// A kernel has one zero point.
    OneZeroPoint { kernel: Kernel } => "{kernel} has one zero point for a weight";
    /// A table in bytes has rows of whole bytes.
    WholeBytes { kernel: Kernel, format: Format } => "{kernel} has {format} only in rows of whole bytes, taken along axis 0";
    /// Sums that may overflow.
    LongSum { products: usize } => "sums of {products} products may not fit into int32";
    /// Groups cut the axis that is summed over, which an operand does not have.
    NoGroups => "groups along the sum make no sense for this operand";
    /// Blocks of an activation cut the axis that is summed over.
    BlocksAcross => "blocks of an activation run along its last axis, which only products with a constant sum over";
    /// Blocks of an activation are whole.
    RaggedBlocks { length: usize, size: usize } => "the {length} values it sums over are not whole blocks of {size}";
    /// Block formats have no fixed scales.
    BlocksAtRunTime { dtype: String } => "scales of {dtype} are found at run time, which is done for inputs only";
    /// A layer that computes in float on a fake quantized input.
    PerToken => "its input has a scale for each token, and is computed in float";
    /// Scales for each token of what is no linear layer.
    NoTokens => "its input has no tokens";
    /// An operator that quantizes its input.
    QuantizesItself => "it quantizes its input itself";

    // Plans: what samples say.

    /// Without samples, ranges of activations are not known.
    WithoutSamples => "without samples only weights are quantized";
    /// Without samples, an operator without a weight has nothing to quantize.
    NoWeightWithoutSamples => "it has no constant weight, and without samples activations stay float";
    /// A tensor that running samples did not show; the cause is the runtime's.
    Unobserved { tensor: String, cause: String } => "{cause}";
    /// A tensor that had no elements in any sample.
    NoValues { tensor: String } => "\"{tensor}\" had no values in any sample";
    /// A tensor that was NaN or infinite in all samples.
    NeverFinite { tensor: String } => "\"{tensor}\" was NaN or infinite in every sample";
    /// The guard found a tensor badly served by its scales.
    Guarded { tensor: String, db: Decibels, format: Format, range: Option<(f32, f32)>, limit: f64 }
        => "\"{tensor}\" keeps only {db} in {format}{}, below {limit} dB", over(range.as_ref());
    /// A layer costs too much at the outputs.
    Costly { db: Decibels } => "quantized alone it leaves {db} at the outputs";
    /// Dividing the channels of an input does not lower the error of the products behind it.
    SmoothedInVain { tensor: String, before: Decibels, after: Decibels } =>
        "smoothing \"{tensor}\" is not worth it: on rows that were held out the products behind it keep {before} without it, \
         {after} with it";
    /// What samples are for does not lower the error of the outputs.
    OutputsWorse { before: Decibels, after: Decibels } =>
        "the outputs keep {before} on held-out samples without it, {after} with it";
    /// Rows of an input are too few to search and to prove on.
    TooFewRows { tensor: String, rows: usize, least: usize } =>
        "the samples have {rows} rows of \"{tensor}\" to prove smoothing on, fewer than {least}";
    /// The rows of an input are not shown, or have other channels from sample to sample.
    NoRows { tensor: String } => "the runtime shows no rows of \"{tensor}\"";
    /// Samples would have to show what a weight is multiplied with, and there are none.
    NoSamples => "without samples it is rounded";
    /// A gain cannot be proven on so few samples.
    FewSamples { samples: usize } => "{samples} samples are too few to prove a gain: it takes 8";
    /// Samples show too little of what a weight is multiplied with.
    FewRows { rows: u64 } => "samples show only {rows} rows of its input, or none to prove a gain on";
    /// The input of an operator is not seen as rows.
    NoRowsKnown => "its input is not seen as rows of a matrix";
    /// A runtime shows nothing of an input.
    NotShown { tensor: String } => "\"{tensor}\" is not shown by the runtime";
    /// An input has NaN or infinity.
    NotFinite { tensor: String } => "\"{tensor}\" is NaN or infinite in some sample";
    /// A weight is multiplied with several tensors.
    SharedWeight => "it has several readers, each with an input of its own";
    /// A Hessian cannot be factored.
    NotDefinite => "what samples show of its input does not tell errors apart";
    /// What was solved is not better on samples that were held out.
    NoGain => "on samples that were held out it would be no better than rounding";
    /// A correction does not help on samples that were held out.
    NoCloser => "on samples that were held out its output would be no closer";
    /// A layer is left out to measure the others.
    LeftOut => "left out to measure others";

    // Plans: why something is quantized, and what stays float beside it.

    /// A node that runs in integers reads it.
    InputOf { op: String, node: String } => "input of the {op} \"{node}\"";
    /// The same, where a rule asks for it.
    InputAsAsked { op: String, node: String } => "input of the {op} \"{node}\", as asked for";
    /// A node that runs in integers makes it.
    OutputOf { op: String, node: String } => "output of the {op} \"{node}\"";
    /// The same, where a rule asks for it.
    OutputAsAsked { op: String, node: String } => "output of the {op} \"{node}\", as asked for";
    /// A node that moves quantized values makes it.
    CarriedBy { op: String, node: String } => "output of the {op} \"{node}\", which keeps its input's scale";
    /// A residual sum that is fused into a convolution reads it.
    ShortcutInto { node: String } => "shortcut into the residual sum \"{node}\"";
    /// The weight of a node that runs in integers.
    IntegerWeight { op: String } => "weight of an integer {op}";
    /// The weight of a node that computes in float, and why it does.
    FloatWeight { op: String, because: Option<Box<Reason>> } => "weight of a float {op}{}", more(because.as_deref());
    /// A constant operand of a node that runs in integers.
    IntegerOperand { op: String } => "constant operand of an integer {op}";
    /// A bias in the accumulator of an integer kernel.
    AccumulatorScale => "stored at the scale of the products that it is added to";
    /// Moving a Transpose over it makes it wrong.
    BreaksTransposed { op: String } => "onnxruntime would move a Transpose over this {op}, and run it wrongly or not at all";
    /// Moving quantizers of int8 over it makes them wrong.
    BreaksInt8 { op: String } => "onnxruntime would move the quantizer over this {op}, and refuse it";
    /// No kernel of the target reads the codes of a weight.
    Dequantized { target: String, because: Box<Reason> } => "{because}; {target} dequantizes the weight at every run";
    /// It keeps a product from running on codes.
    KeepsFromFusing { op: String, node: String } => "beside this {op}, onnxruntime would dequantize both operands of \"{node}\" at every run";
    /// Constants of a quantized node that stay float.
    BesideKernel => "kept float beside what is quantized";
    /// Readers of one constant want it in different formats.
    Differs { differences: Vec<Difference> } => "{}", joined(differences);

    // Passes.

    /// Another operator than the one whose attributes are read.
    NotA { op: String } => "it is not a {op}";
    /// An input or output that an operator must have.
    Missing { what: Operand } => "it has no {what}";
    /// The same, by its number.
    MissingInput { input: usize } => "it has no input {input}";
    /// A tensor would have to be known before the model runs.
    TensorNotConstant { tensor: String } => "\"{tensor}\" is not constant";
    /// The shape of an operand has to be known.
    UnknownShape { what: Operand } => "the shape of its {what} is not known";
    /// Constants compute it, by operators that are not evaluated to the last bit.
    NotComputable { what: Operand } => "its {what} cannot be computed exactly";
    /// It would be larger than what it is computed from.
    TooLarge { what: Operand, limit: usize } => "its {what} would be larger than the limit of {limit} bytes";
    /// It has an element type that is none of the quantized formats.
    NotQuantizedType { what: Operand, found: DataType } => "its {what} is {found}, which is not a quantized format";
    /// Values of other bits than 2, 4 or 8.
    Bits { bits: usize } => "quantized values of {bits} bits are not supported";
    /// An attribute that must be a positive number.
    NotPositive { name: String } => "its {name} is missing or not a positive number";
    /// Something that a node can hold or do and that is not supported.
    Unsupported { what: String } => "{what} is not supported";
    /// An axis beyond the rank of a tensor.
    AxisOutOfRange { axis: i64, rank: usize } => "axis {axis} is out of range for rank {rank}";
    /// A number that cannot be used here.
    OutOfRange { what: String, value: f32, wanted: String } => "its {what} is {value}, not {wanted}";
    /// A number beyond what its type holds.
    Overflows { what: String, dtype: DataType } => "its {what} overflows {dtype}";
    /// Quantized values that no format holds.
    NoFormat { low: i64, high: i64 } => "no format holds its quantized values, {low} to {high}";
    /// What quantization parameters and data say does not fit together.
    Invalid { error: String } => "{error}";
    /// The graph returns it.
    IsGraphOutput { what: Operand } => "its {what} is a graph output";
    /// Several nodes read it.
    UsedElsewhere { what: Operand } => "its {what} is used elsewhere as well";
    /// Nothing reads it.
    Unused { what: Operand } => "nothing reads its {what}";
    /// Another operator than the one that is looked for reads it.
    ReadBy { what: Operand, op: String, wanted: String } => "its {what} is read by {op}, not by {wanted}";
    /// A node in another graph is on the other side of it.
    OtherGraph { what: Operand } => "its {what} crosses into another graph";
    /// Another operator than the one that is looked for computes it.
    ComputedBy { what: Operand, by: String, wanted: String } => "its {what} is computed by {by}, not by {wanted}";
    /// None of these operators computes it.
    NotComputedBy { what: Operand, wanted: String } => "its {what} is not computed by {wanted}";
    /// It is not the constant behind a DequantizeLinear.
    NotDequantizedConstant { what: Operand } => "its {what} is not a dequantized constant";
    /// A tensor that no DequantizeLinear makes.
    NotQuantized { tensor: String } => "\"{tensor}\" is not quantized";
    /// Two things that must be the same.
    Mismatch { what: String, from: String } => "its {what} differs from {from}";
    /// The opset has to be newer.
    NeedsOpset { what: String, opset: i64 } => "{what} needs opset {opset}";
    /// The same, and the model cannot be raised to it.
    CannotRaise { what: String, opset: i64, error: String } => "{what} needs opset {opset}, and {error}";
    /// It normalizes by the statistics of each batch, or drops elements.
    Training => "it is in training mode";

    // Scales and zero points.
    /// Scales for other parts of a tensor than a kernel takes.
    WrongScales { tensor: String, wanted: String } => "\"{tensor}\" does not have {wanted}";
    /// A scale with a shape that does not fit its tensor.
    ScaleShape { dims: Vec<usize>, wanted: Vec<usize> } => "its scale has shape {dims:?}, not {wanted:?}";
    /// Scales that neither channels nor groups explain.
    NoGranularity => "its scales are neither one per index of an axis nor one per group";
    /// Zero points, scales or offsets in another number.
    WrongCount { what: String, per: String } => "its {what} are not one per {per}";
    /// A parameter of each channel in another number.
    NotPerChannel { what: Operand, channels: usize } => "its {what} is not one value for each of {channels} channels";
    /// Zero points of packed values that are not packed alike.
    NotPacked => "its zero points are not packed row by row";
    /// Zero points that are no integers.
    FractionalZeroPoints { op: String } => "its zero points are fractional, which {op} does not have";
    /// Zero points that would have to be one.
    ZeroPointsDiffer => "its zero points differ from each other";
    /// A zero point where there must be none.
    NonzeroZeroPoint { what: Operand } => "its {what} has a zero point other than 0";
    /// Groups that do not divide an axis.
    RaggedGroups { length: usize, size: usize } => "an axis of {length} is not a multiple of groups of {size}";

    // Operators on quantized values.
    /// It has no form of an operator.
    NoQuantizedOp { op: String } => "there is no {op} of quantized values";
    /// An operator that computes with quantized values itself.
    ComputesQuantized => "it computes with quantized values";
    /// No kernel has these element types.
    NoKernelOfTypes { inputs: Vec<DataType>, output: Option<DataType> } => "there is no kernel for {}", types(inputs, *output);
    /// A Relu or Clip in front of a quantizer changes results.
    Clips { op: String } => "the {op} behind it clips more than its quantizer";
    /// A Clip of quantized values that is not without effect.
    NarrowRange { dtype: DataType, low: i64, high: i64 } => "it keeps {dtype} values within {low} to {high}";
    /// Sums of integers that something else happens to as well.
    NotScaledBack => "its sums are not multiplied by the two scales alone";
    /// Elements do not saturate.
    NoSaturation => "it does not saturate";

    // Fusion.
    /// A node cannot become part of another one.
    NotFusedInto { node: String, because: Box<Reason> } => "cannot be fused into \"{node}\": {because}";
    /// The same, where it could become part of the next one but for padding.
    NotAcrossPadding { because: Box<Reason> } =>
        "{because}; fusing it into the Conv behind it would change what that pads with";
    /// The scales of a weight are to stay as they are.
    KeepsScales => "it would change the scales of the weight, which are to stay";
    /// The channels of the groups of a convolution share their scales.
    SharedScales => "the groups of its weight share their scales";
    /// A product that computes in floats.
    NotBetweenQuantizers => "it scales channels, and the product is not between quantizers";

    // Fake quantizers.
    /// What operators spell out is not a QuantizeLinear and DequantizeLinear.
    LeftAsOperators { because: Box<Reason> } => "left as operators: {because}";
    /// The last operator does not multiply by a scale.
    NotAProduct => "it is not a product with a scale";
    /// Elements are moved in a way that cannot be followed.
    Moved => "its elements are moved in a way that cannot be followed";
    /// An element would be another one.
    NotExact { element: usize, found: f32, wanted: f32 } =>
        "quantized values would give {found} instead of {wanted} for element {element}";
    /// What is added behind a quantizer is not one float for each scale.
    WrongOffsets => "what is added behind it is not one float per scale";
    /// No scale multiplies to what dividing by its inverse gives.
    NoScale => "it divides by an inverse scale, and no scale multiplies to the same values";
    /// An operator with another tensor or with several numbers.
    NotByOneConstant { op: String } => "{op} is not by one constant number";
    /// Nothing bounds the values that are rounded.
    Unbounded => "its quantized values are not bounded";
    /// It does not undo the division.
    ScalesBackBy { divisor: f32, factor: f32 } => "it divides by {divisor} and multiplies by {factor}";
    /// QuantizeLinear gives other values.
    StepsDiffer { differing: i32, of: i32, at: f32, here: f64, there: f64 } =>
        "QuantizeLinear divides by the scale and has {differing} of {of} steps elsewhere ({at:e} becomes {here} here, {there} there)";
    /// As a float it would be quantized to other values.
    FloatWouldDiffer => "stays int32: as float32 it would be quantized to other values";

    // Conversions of opsets and constants.
    /// An input that has a default and is meant to be given, beside others that look like weights.
    InputBesideWeights =>
        "is an input with a default and not a weight, so weights that are inputs, too, stay inputs; --set-input makes it a \
         constant, and then they become constants as well";
    /// A form that was asked for and that nothing in the model can have.
    NothingToStore { form: String, wanted: String } => "nothing is stored as {form}: there is no {wanted}";
    /// An operator that ONNX does not define.
    NotOnnx { op: String } => "{op} is not an ONNX operator; left as it is";
    /// Graphs for training.
    TrainingGraphs => "its training graphs stay at the old opset";
    /// A Resize that may round otherwise.
    NearestRounding =>
        "the scales are computed at run time: nearest neighbour rounds down, as for enlarging; onnxruntime rounded up where \
         opset 10 shrinks";
    /// A Constant with several attributes, or none.
    NotOneValue => "it does not hold exactly one value";
    /// An Attention of onnxruntime's that does more than three projections and a product.
    AttentionWithMore => "it has a past, a mask, sizes or a rotation that MultiHeadAttention takes otherwise";
    /// A function under another opset.
    OtherOpset { own: i64, outer: i64 } => "the function that it calls has opset {own}, the graph {outer}";
    /// A function with bodies or constants of its own, or that passes an input on, or that reads one that the call leaves out.
    NotInlined => "the function that it calls has bodies or constants of its own, passes an input on, or reads one that is left out";
    /// A function that would become too many nodes, as those do that call others twice.
    LongFunction { most: usize } => "with the function that it calls, calls come to more than {most} nodes";
    /// A Constant of a function's parameter.
    FunctionParameter => "its value is a parameter of a function";
    /// A placeholder of `TensorRT` for quantized values.
    Unexported { found: DataType } =>
        "it dequantizes {found}, which its exporter has yet to quantize: finish the export with ModelOpt's own tools first";
    /// A node of another model has become another operator.
    OtherOperator => "the node is another operator now";
    /// An operand of another model has become another tensor.
    NowIs { dtype: DataType, dims: Vec<usize> } => "it is {dtype} of shape {dims:?} now";
    /// Two quantizers of one tensor.
    TwoPairs => "it has two Q/DQ pairs; the first one was used";
    /// Groups that may have been transposed.
    GroupsOfGemm => "it is quantized in groups and read by a Gemm, so it may have been transposed";
}

impl From<Error> for Reason {
    fn from(error: Error) -> Self {
        Self::Invalid { error: error.message().into() }
    }
}

impl Reason {
    /// Whether samples show nothing of a tensor.
    pub(crate) fn is_unobserved(&self) -> bool {
        matches!(self, Self::Unobserved { .. } | Self::NoValues { .. } | Self::NeverFinite { .. })
    }

    /// An operand has an element type that cannot be used here.
    pub(crate) fn wrong_type(what: Operand, found: DataType, wanted: &str) -> Self {
        Self::WrongType { what, found, wanted: wanted.to_owned() }
    }

    /// Says it of a fusion into a node.
    pub(crate) fn in_fusion(self, node: &str) -> Self {
        Self::NotFusedInto { node: node.to_owned(), because: Box::new(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_have_code_fields_and_text() {
        let reasons = [
            (
                Reason::QuantizedAlready,
                r#"{"code":"quantized-already","text":"is quantized already; its quantizers are kept"}"#,
            ),
            (
                Reason::OffBy { what: Operand::Input, rule: "exclude \"a\"".into() },
                r#"{"code":"off-by","what":"input","rule":"exclude \"a\"","text":"its input is switched off by exclude \"a\""}"#,
            ),
            (
                Reason::FloatWeight { op: "Gemm".into(), because: Some(Box::new(Reason::WithoutSamples)) },
                r#"{"code":"float-weight","op":"Gemm","because":{"code":"without-samples","text":"without samples only weights are quantized"},"text":"weight of a float Gemm: without samples only weights are quantized"}"#,
            ),
            (
                Reason::Costly { db: Decibels(f64::NEG_INFINITY) },
                r#"{"code":"costly","db":null,"text":"quantized alone it leaves -inf dB at the outputs"}"#,
            ),
            (
                Reason::Guarded {
                    tensor: "x".into(),
                    db: Decibels(7.25),
                    format: Format::Uint8,
                    range: Some((-1.0, 2.0)),
                    limit: 16.0,
                },
                r#"{"code":"guarded","tensor":"x","db":7.25,"format":"uint8","range":[-1.0,2.0],"limit":16.0,"text":"\"x\" keeps only 7.2 dB in uint8 over [-1.0000, 2.0000], below 16 dB"}"#,
            ),
        ];
        for (reason, document) in reasons {
            assert_eq!(serde_json::to_string(&reason).ok().as_deref(), Some(document));
            assert_eq!(serde_json::from_str::<Reason>(document).ok(), Some(reason));
        }
    }
}
