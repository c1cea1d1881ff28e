//! What a pass did, as data; why it left something alone is a [`Reason`](crate::reason::Reason).

use crate::numerics::{Format, Granularity};
use crate::onnx::DataType;
use crate::reason::sentences;

sentences! {
    /// What a pass did to a node, a tensor or the model.
    Change:

    // Versions.
    /// The IR version of the model.
    IrVersion { from: i64, to: i64 } => "IR version {from} raised to {to}";
    /// The opset of the model, or of a function.
    Opset { from: i64, to: i64 } => "opset {from} raised to {to}";
    /// A node means in the newer opset what it meant in the older one.
    Raised { op: String, what: String, opset: i64 } => "{op}: {what} (opset {opset})";

    /// Nodes compute in another type than before.
    ComputesIn { dtype: DataType } => "computes in {dtype}";

    // Clean-up.
    /// A graph input with an initializer.
    Frozen => "no longer a graph input, only an initializer";
    /// A constant that a node held.
    BecameInitializer => "became an initializer";
    /// A node whose result is known.
    BecameConstant { op: String, of: String } => "{op} of {of} became a constant";
    /// What a quantizer reads, where constants derive it.
    ComputedFromConstants => "computed from constants";
    /// An If.
    BecameBranch => "became the branch that its constant condition takes";
    /// A call of a function of the model.
    Inlined { function: String } => "became the nodes of the function {function}";
    /// A tensor of a body whose name others bear as well.
    Renamed { name: String } => "called \"{name}\" here";
    /// A node that gives what it reads.
    Bypassed { op: String } => "bypassed: {op} only copies its input";
    /// Nothing depends on it.
    Unused { what: String } => "removed: nothing uses this {what}";
    /// A declaration about a tensor that is gone.
    StaleAnnotation => "removed the quantization annotation of a tensor that is gone";
    /// Declarations of types that do not hold any more.
    StaleTypes { count: usize } => "removed {count} stale type declarations";

    // Fusion.
    /// A number that an operator multiplies by.
    FactorFolded { attribute: String } => "its {attribute} is part of its constant operand now";
    /// A left operand that was read transposed.
    LeftTransposed => "its left operand is transposed by a node in front of it";
    /// A node that the node before it computes as well now.
    FusedInto { op: String, node: String } => "{op} fused into {node}";
    /// Nodes behind a product with a quantized weight, whose bias takes them.
    BiasFused { ops: String } => "{ops} fused into it: quantized values and scales of its weight stay";
    /// Nodes behind a product with a quantized weight, whose scales take them, multiplied by these factors.
    ScalesFused { ops: String, least: f64, most: f64 } =>
        "{ops} fused into it: quantized values of its weight stay, its scales are multiplied by {least:.6} to {most:.6}";

    // What products read.
    /// An input whose channels are divided by numbers that weights are multiplied by.
    Smoothed { products: usize } => "divided channel by channel by what the weights of its {products} readers are multiplied by";

    // Quantized constants.
    /// Floats and their quantizer.
    StoredAs { dtype: DataType, scales: Granularity } => "stored as {dtype}, {scales}";
    /// Floats and their quantizer, which adds a float to each group.
    StoredWithOffsets { dtype: DataType, scales: Granularity } => "stored as {dtype}, {scales}, with a float offset for each";
    /// Floats that a quantizer has rounded before.
    Recovered { dtype: DataType, scales: Granularity } => "lies on a grid: stored as {dtype}, {scales}";
    /// Floats whose quantized values another quantizer has stored.
    SharesCodes { tensor: String } => "shares the stored values \"{tensor}\"";
    /// Scales of nothing but zeros.
    DeadScales { count: usize } => "{count} scales of 0 became 1: all values there are 0";
    /// Quantized values within bounds.
    Clipped { dtype: DataType } => "stored as {dtype} within the bounds of its Clip";
    /// Quantized values.
    Dequantized { dtype: DataType } => "dequantized to {dtype}";
    /// A weight whose quantizer stays.
    FloatAgain => "float again";
    /// The same, where some elements had to become what their quantized values stand for.
    FloatRounded { elements: usize } => "float again; {elements} elements are what their quantized values stand for";
    /// A weight whose quantizer is arithmetic in floats.
    FloatQuantizer => "float again, quantized by float operators";
    /// A table with the bytes of a product's weight.
    Tied { node: String } => "shares the stored weight of \"{node}\"";

    // Quantizers.
    /// A Quantize/Dequantize pair on an activation.
    Pair { format: Format } => "a Q/DQ pair of {format}";
    /// A quantizer of an activation with scales of the moment.
    AtRunTime => "quantized at run time";
    /// A quantizer of an activation with a scale for each token, as float operators.
    PerToken => "quantized to int8 per token, by operators";
    /// A weight behind a DequantizeLinear.
    Weight { format: Format } => "{format} weight";
    /// A bias behind a DequantizeLinear.
    Bias => "int32 bias";
    /// A quantizer that is gone.
    PairRemoved => "its quantizer was removed";
    /// A DequantizeLinear that several nodes read.
    Divided { readers: usize } => "one for each of its {readers} readers";

    // Other operators.
    /// A node, or several, as another operator.
    WrittenAs { op: String } => "written as {op}";
    /// An operator that changes nothing in front of an input.
    Barrier { op: String } => "{op} in front, across which nothing is moved";
    /// A product whose weight is packed.
    WrittenAsNbits { bits: usize, block: usize } => "written as MatMulNBits of {bits} bits in blocks of {block}";
    /// The same, where float offsets of groups became zero points.
    OffsetsAsZeroPoints { bits: usize, block: usize } =>
        "written as MatMulNBits of {bits} bits in blocks of {block}; float offsets became zero points, to the nearest float";
    /// An operator on quantized values whose float bias became int32.
    WithInt32Bias { op: String } => "written as {op}, with its bias quantized to int32";
    /// A node that moves elements.
    OnQuantized { op: String } => "{op} of quantized values";
    /// The float operator that an operator on quantized values stands for.
    OnDequantized { op: String } => "{op} of dequantized values";
}

impl Change {
    /// Whether floats are stored as quantized values now.
    #[must_use]
    pub fn stores(&self) -> bool {
        matches!(self, Self::StoredAs { .. } | Self::StoredWithOffsets { .. } | Self::Recovered { .. })
    }
}
