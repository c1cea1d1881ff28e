//! The conversions, by the opset that made them necessary.

use super::{Raising, facts, scan};
use crate::error::{Error, Result};
use crate::ir::{Attr, NewNode, NodeId, Tensor, ValueId, tensor_type};
use crate::onnx::{AttributeProto, DataType, attribute_type};
use crate::reason::Reason;

/// One changed definition.
pub(super) struct Step {
    /// The opset that changed it.
    pub(super) at: i64,
    pub(super) ops: &'static [&'static str],
    /// Rewrites a node for it; says what was done, or `None` where the node needed nothing.
    pub(super) convert: Convert,
}

type Convert = fn(&mut Raising<'_>, NodeId) -> Result<Option<String>>;

const fn step(at: i64, ops: &'static [&'static str], convert: Convert) -> Step {
    Step { at, ops, convert }
}

/// Every change of meaning or form between opset 7 and 28, by ascending version.
pub(super) const STEPS: &[Step] = &[
    step(9, &["BatchNormalization"], drop_spatial),
    step(9, &["MeanVarianceNormalization"], normalization_axes),
    step(9, &["Scan"], scan::nest_batches),
    step(9, &["Upsample"], upsample_scales),
    step(10, &["Dropout"], dropout_float_mask),
    step(10, &["ImageScaler"], image_scaler),
    step(10, &["Slice"], slice_inputs),
    step(10, &["TopK"], top_k_input),
    step(10, &["Upsample"], upsample_to_resize),
    step(10, EXPERIMENTAL, refuse_experimental),
    step(11, &["Clip"], clip_bounds),
    step(11, &["Pad"], pad_inputs),
    step(11, &["Resize"], resize_coordinates),
    step(11, &["Scatter"], scatter_elements),
    step(12, &["Dropout"], dropout_to_identity),
    step(13, &["MeanVarianceNormalization"], default_axes),
    step(13, &["Squeeze", "Unsqueeze", "ReduceSum"], axes_input),
    step(13, &["Split"], split_input),
    step(13, &["Softmax", "LogSoftmax", "Hardmax"], single_axis),
    step(13, &["Resize"], resize_optional_inputs),
    step(14, &["BatchNormalization"], training_mode),
    step(16, &["RoiAlign"], roi_align_coordinates),
    step(
        18,
        &[
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ],
        axes_input,
    ),
    step(18, &["Split"], split_num_outputs),
    step(20, &["DFT"], dft_axis),
    step(20, &["GridSample"], grid_sample_mode),
    step(21, &["GroupNormalization"], group_norm_per_channel),
];

/// Operators that were never official and that every runtime dropped at opset 10.
const EXPERIMENTAL: &[&str] = &[
    "ATen",
    "Affine",
    "ConstantFill",
    "Crop",
    "DynamicSlice",
    "GRUUnit",
    "GivenTensorFill",
    "ParametricSoftplus",
    "Scale",
    "ScaledTanh",
];

#[allow(clippy::unnecessary_wraps, reason = "the last expression of most steps")]
fn done(what: impl Into<String>) -> Result<Option<String>> {
    Ok(Some(what.into()))
}

/// Moves an integer list attribute to input `slot`; an empty list counts as absent.
fn list_to_input(raising: &mut Raising<'_>, node: NodeId, name: &str, slot: usize) -> Result<bool> {
    let ints = raising.ints(node, name)?;
    raising.model.remove_attr(node, name);
    let Some(ints) = ints else { return Ok(false) };
    let value = raising.constant(node, name, Tensor::from_i64(&[ints.len()], &ints))?;
    raising.model.set_input(node, slot, Some(value));
    Ok(true)
}

fn required(raising: &Raising<'_>, node: NodeId, name: &str) -> Result<()> {
    match raising.model.node(node).attr(name) {
        Some(_) => Ok(()),
        None => Err(Error::model(format!("attribute \"{name}\" is missing"))
            .with_hint("the model does not follow the opset it declares; export it again")),
    }
}

/// A scalar of a float type; `None` where `value` lies outside its finite range or the type is none.
fn float_scalar(dtype: DataType, value: f32) -> Option<Tensor> {
    let half = half::f16::from_f32(value);
    Some(match dtype {
        DataType::Float => Tensor::from_f32(&[], &[value]),
        DataType::Double => Tensor::new(dtype, &[], f64::from(value).to_le_bytes().to_vec()),
        DataType::Float16 if !half.is_infinite() || value.is_infinite() => {
            Tensor::new(dtype, &[], half.to_le_bytes().to_vec())
        }
        _ => return None,
    })
}

/// Element type of an input that may be any float; the operators that ask have no other types at that version.
fn float_type(raising: &Raising<'_>, node: NodeId, index: usize) -> Result<DataType> {
    let value = raising.input(node, index)?;
    let name = raising.model.value(value).name().to_owned();
    match facts::element_type(raising.model, value) {
        Some(dtype @ (DataType::Float | DataType::Double | DataType::Float16)) => Ok(dtype),
        Some(dtype) => Err(Error::model(format!("element type {dtype} is not allowed here")).at_value(&name)),
        None => Err(Error::model("the element type is not declared and does not follow from the graph")
            .at_value(&name)
            .with_hint("add types with onnx.shape_inference.infer_shapes")),
    }
}

fn drop_spatial(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    if raising.int(node, "spatial")? == Some(0) {
        return Err(Error::model("spatial=0 (statistics per element) does not exist from opset 9 on")
            .with_hint("export the model again with spatial=1, or express this node as Sub, Div, Mul and Add"));
    }
    if raising.model.node(node).attr("spatial").is_none() {
        return Ok(None);
    }
    raising.model.remove_attr(node, "spatial");
    done("dropped spatial=1")
}

/// The experimental form of the operator named its axes by a flag.
fn normalization_axes(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    if raising.int(node, "normalize_variance")? == Some(0) {
        return Err(Error::model("normalize_variance=0 does not exist from opset 9 on")
            .with_hint("express this node as ReduceMean and Sub"));
    }
    let across = raising.int(node, "across_channels")?.unwrap_or(0) != 0;
    let axes: &[i64] = if across { &[0, 1, 2, 3] } else { &[0, 2, 3] };
    raising.model.remove_attr(node, "normalize_variance");
    raising.model.remove_attr(node, "across_channels");
    raising.model.set_attr(node, Attr::ints("axes", axes));
    done("made the normalized axes explicit")
}

/// The default is written out because the checker of onnx 1.23 loses it.
fn default_axes(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    if raising.model.node(node).attr("axes").is_some() {
        return Ok(None);
    }
    raising.model.set_attr(node, Attr::ints("axes", &[0, 2, 3]));
    done("made the normalized axes explicit")
}

fn upsample_scales(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    required(raising, node, "scales")?;
    let scales = raising.attr(node, "scales")?.map(|a| a.floats.clone()).unwrap_or_default();
    raising.model.remove_attr(node, "scales");
    let value = raising.constant(node, "scales", Tensor::from_f32(&[scales.len()], &scales))?;
    raising.model.set_input(node, 1, Some(value));
    done("made scales an input")
}

/// A mask of ones in place of the second output of a `Dropout` that drops nothing.
fn replace_mask(raising: &mut Raising<'_>, node: NodeId, dtype: DataType, one: Vec<u8>) -> Result<()> {
    let Some(mask) = raising.model.node(node).output(1) else { return Ok(()) };
    if raising.is_used(mask) {
        let name = raising.model.node_name(node).to_owned();
        let data = raising.input(node, 0)?;
        let (shape_name, ones_name) = (format!("{name}.shape"), format!("{name}.mask"));
        let shape = raising.insert_before(node, NewNode::new("Shape", &shape_name, &[data], &[&shape_name]))?;
        let value = AttributeProto {
            name: Some("value".to_owned()),
            r#type: Some(attribute_type::TENSOR),
            t: Some(Tensor::new(dtype, &[1], one).into_proto().0),
            ..AttributeProto::default()
        };
        let ones = NewNode::new("ConstantOfShape", &ones_name, &[shape], &[&ones_name]).with(value);
        let ones = raising.insert_before(node, ones)?;
        if let Some(ty) = raising.model.value(mask).ty().cloned() {
            raising.model.set_type(ones, ty);
        }
        raising.model.replace_uses(mask, ones, |_| true);
        raising.model.take_name(mask, ones, &format!("{name}.unused"));
    }
    raising.model.truncate_outputs(node, 1);
    Ok(())
}

/// The mask was of the type of the data before opset 10, and is bool since.
fn dropout_float_mask(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let Some(mask) = raising.model.node(node).output(1) else { return Ok(None) };
    if !raising.is_used(mask) {
        raising.model.truncate_outputs(node, 1);
        return done("dropped the unused mask");
    }
    let dtype = float_type(raising, node, 0)?;
    let one = float_scalar(dtype, 1.0).map(|t| t.raw().to_vec()).unwrap_or_default();
    replace_mask(raising, node, dtype, one)?;
    raising.model.remove_attr(node, "ratio");
    raising.model.set_op(node, "", "Identity");
    done("replaced by Identity, its mask by ones")
}

fn dropout_to_identity(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    replace_mask(raising, node, DataType::Bool, vec![1])?;
    raising.model.remove_attr(node, "ratio");
    raising.model.set_op(node, "", "Identity");
    done("replaced by Identity: it does nothing at inference")
}

/// `scale * x + bias` per channel.
fn image_scaler(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let scale = raising.float(node, "scale")?.unwrap_or(1.0);
    let bias = raising.attr(node, "bias")?.map(|a| a.floats.clone()).unwrap_or_default();
    let dtype = float_type(raising, node, 0)?;
    if dtype != DataType::Float {
        return Err(Error::model(format!("element type {dtype} is not supported for this experimental operator"))
            .with_hint("express it as Mul and Add"));
    }
    let name = raising.model.node_name(node).to_owned();
    let data = raising.input(node, 0)?;
    let factor = raising.constant(node, "scale", Tensor::from_f32(&[], &[scale]))?;
    let scaled = format!("{name}.scaled");
    let scaled = raising.insert_before(node, NewNode::new("Mul", &scaled, &[data, factor], &[&scaled]))?;
    let offset = raising.constant(node, "bias", Tensor::from_f32(&[bias.len(), 1, 1], &bias))?;
    raising.model.set_input(node, 0, Some(scaled));
    raising.model.set_input(node, 1, Some(offset));
    raising.model.remove_attr(node, "scale");
    raising.model.remove_attr(node, "bias");
    raising.model.set_op(node, "", "Add");
    done("replaced by Mul and Add")
}

fn refuse_experimental(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let op = raising.model.node(node).op_type();
    Err(Error::model(format!("{op} was experimental and does not exist from opset 10 on"))
        .with_hint("export the model again with a newer exporter"))
}

fn slice_inputs(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    required(raising, node, "starts")?;
    required(raising, node, "ends")?;
    list_to_input(raising, node, "starts", 1)?;
    list_to_input(raising, node, "ends", 2)?;
    list_to_input(raising, node, "axes", 3)?;
    done("made starts, ends and axes inputs")
}

fn top_k_input(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    required(raising, node, "k")?;
    let k = raising.int(node, "k")?.unwrap_or(0);
    raising.model.remove_attr(node, "k");
    let value = raising.constant(node, "k", Tensor::from_i64(&[1], &[k]))?;
    raising.model.set_input(node, 1, Some(value));
    done("made k an input")
}

fn upsample_to_resize(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    raising.model.set_op(node, "", "Resize");
    done("replaced by Resize")
}

fn clip_bounds(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let mut moved = Vec::new();
    for (name, slot, unbounded) in [("min", 1, f32::MIN), ("max", 2, f32::MAX)] {
        let bound = raising.float(node, name)?;
        raising.model.remove_attr(node, name);
        let Some(bound) = bound.filter(|b| b.total_cmp(&unbounded).is_ne()) else { continue };
        let Some(scalar) = float_scalar(float_type(raising, node, 0)?, bound) else { continue };
        let value = raising.constant(node, name, scalar)?;
        raising.model.set_input(node, slot, Some(value));
        moved.push(name);
    }
    if moved.is_empty() { Ok(None) } else { done(format!("made {} an input", moved.join(" and "))) }
}

fn pad_inputs(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    required(raising, node, "pads")?;
    list_to_input(raising, node, "pads", 1)?;
    let constant = raising.string(node, "mode")?.is_none_or(|mode| mode == "constant");
    let value = raising.float(node, "value")?.filter(|v| constant && *v != 0.0);
    raising.model.remove_attr(node, "value");
    if let Some(value) = value {
        let dtype = float_type(raising, node, 0)?;
        let scalar = float_scalar(dtype, value)
            .ok_or_else(|| Error::model(format!("padding value {value} does not fit {dtype}")))?;
        let value = raising.constant(node, "value", scalar)?;
        raising.model.set_input(node, 2, Some(value));
    }
    done("made pads and value inputs")
}

/// The only coordinates `Resize` knew: asymmetric. Its nearest neighbour rounds down where it enlarges, and, in
/// onnxruntime, up where it shrinks.
fn resize_coordinates(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let scales = raising.input(node, 1)?;
    let nearest = raising.string(node, "mode")?.is_none_or(|mode| mode == "nearest");
    let factors = facts::known(raising.model, scales).and_then(|t| t.to_f32());
    let shrinks = factors.as_ref().is_some_and(|f| f.iter().any(|&s| s < 1.0));
    let grows = factors.as_ref().is_some_and(|f| f.iter().any(|&s| s > 1.0));
    let mut scales = scales;
    if nearest && shrinks && grows {
        scales = shrink_first(raising, node, &factors.unwrap_or_default())?;
    } else if nearest && factors.is_none() {
        let name = raising.model.node_name(node).to_owned();
        raising.outcome.skipped(name, Reason::NearestRounding);
    }
    let rounding = if shrinks && !grows { "ceil" } else { "floor" };
    let roi = empty_roi(raising, node)?;
    raising.model.set_input(node, 2, Some(scales));
    raising.model.set_input(node, 1, roi);
    set_coordinates(raising, node, nearest.then_some(rounding));
    done("made its coordinates explicit: asymmetric")
}

fn set_coordinates(raising: &mut Raising<'_>, node: NodeId, rounding: Option<&str>) {
    raising.model.set_attr(node, Attr::string("coordinate_transformation_mode", "asymmetric"));
    if let Some(rounding) = rounding {
        raising.model.set_attr(node, Attr::string("nearest_mode", rounding));
    }
}

/// Opsets 11 and 12 require the input although only one mode reads it.
fn empty_roi(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<ValueId>> {
    if raising.to >= 13 {
        return Ok(None);
    }
    raising.constant(node, "roi", Tensor::from_f32(&[0], &[])).map(Some)
}

/// Puts a `Resize` that only shrinks before `node`, and gives the scales that are left: no single rounding fits both.
fn shrink_first(raising: &mut Raising<'_>, node: NodeId, factors: &[f32]) -> Result<ValueId> {
    let name = format!("{}.shrunk", raising.model.node_name(node));
    let shrink: Vec<f32> = factors.iter().map(|s| s.min(1.0)).collect();
    let grow: Vec<f32> = factors.iter().map(|s| s.max(1.0)).collect();
    let shrink = raising.constant(node, "shrink", Tensor::from_f32(&[shrink.len()], &shrink))?;
    let roi = empty_roi(raising, node)?;
    let data = raising.input(node, 0)?;
    let mut first = NewNode::new("Resize", &name, &[data], &[&name])
        .with(Attr::string("mode", "nearest"))
        .with(Attr::string("coordinate_transformation_mode", "asymmetric"))
        .with(Attr::string("nearest_mode", "ceil"));
    first.inputs.extend([roi, Some(shrink)]);
    let shrunk = raising.insert_before(node, first)?;
    raising.model.set_input(node, 0, Some(shrunk));
    raising.constant(node, "grow", Tensor::from_f32(&[grow.len()], &grow))
}

fn scatter_elements(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    raising.model.set_op(node, "", "ScatterElements");
    done("renamed to ScatterElements")
}

fn axes_input(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    if raising.model.node(node).is("Unsqueeze") && raising.model.node(node).input(1).is_none() {
        required(raising, node, "axes")?;
    }
    if list_to_input(raising, node, "axes", 1)? { done("made axes an input") } else { Ok(None) }
}

fn split_input(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    if list_to_input(raising, node, "split", 1)? { done("made split an input") } else { Ok(None) }
}

fn split_num_outputs(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    if raising.model.node(node).input(1).is_some() {
        return Ok(None);
    }
    let count = raising.model.node(node).outputs().len();
    raising.model.truncate_inputs(node, 1);
    raising.model.set_attr(node, Attr::int("num_outputs", count as i64));
    done(format!("set num_outputs={count}"))
}

/// These operators flattened their input to a matrix at `axis` (default 1); now they work along one axis (default −1).
fn single_axis(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let axis = raising.int(node, "axis")?.unwrap_or(1);
    let data = raising.input(node, 0)?;
    let shape = raising.model.shape(data);
    let rank = facts::rank(raising.model, data);
    let axis_is_last = axis == -1 || rank.is_some_and(|rank| rank as i64 - 1 == axis);
    let same = if axis_is_last { Some(axis) } else { shape.and_then(|dims| only_axis(&dims, axis)) };
    if let Some(axis) = same {
        raising.model.set_attr(node, Attr::int("axis", axis));
        return done(format!("set axis={axis}"));
    }

    let name = raising.model.node_name(node).to_owned();
    let op = raising.model.node(node).op_type().to_owned();
    let (flat, shape, normalized) = (format!("{name}.flat"), format!("{name}.shape"), format!("{name}.normalized"));
    let flatten = NewNode::new("Flatten", &flat, &[data], &[&flat]).with(Attr::int("axis", axis));
    let flat = raising.insert_before(node, flatten)?;
    let shape = raising.insert_before(node, NewNode::new("Shape", &shape, &[data], &[&shape]))?;
    // The old node becomes the Reshape, so that its output keeps name, type and uses.
    let along_rows = NewNode::new(&op, format!("{name}.reshape"), &[flat], &[&normalized]).with(Attr::int("axis", -1));
    let normalized = raising.insert_before(node, along_rows)?;
    // The name stays with the operator that bears it.
    if let Some(inserted) = raising.model.producer(normalized) {
        let made = raising.model.node(inserted).name().to_owned();
        let nodes = &mut raising.model.nodes;
        nodes[inserted.0 as usize].rest.name = nodes[node.0 as usize].rest.name.replace(made);
    }
    if let Some(dtype) = facts::element_type(raising.model, data) {
        let ty = tensor_type(dtype, Some(&[None, None]));
        raising.model.set_type(flat, ty.clone());
        raising.model.set_type(normalized, ty);
    }
    raising.model.set_op(node, "", "Reshape");
    raising.model.remove_attr(node, "axis");
    raising.model.set_input(node, 0, Some(normalized));
    raising.model.set_input(node, 1, Some(shape));
    done(format!("wrapped in Flatten(axis={axis}) and Reshape"))
}

/// The one axis from `axis` on that is longer than 1, if there is at most one.
fn only_axis(dims: &[Option<usize>], axis: i64) -> Option<i64> {
    let rank = dims.len() as i64;
    let first = if axis < 0 { axis + rank } else { axis };
    if !(0..rank).contains(&first) {
        return None;
    }
    let mut longer = (first..rank).filter(|&i| dims[i as usize] != Some(1));
    match (longer.next(), longer.next()) {
        (None, _) => Some(first),
        (Some(axis), None) => Some(axis),
        (Some(_), Some(_)) => None,
    }
}

/// Opsets 11 and 12 required `roi` and `scales`, so files hold empty tensors where neither is meant; and one
/// coordinate mode is gone.
fn resize_optional_inputs(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let mut did = Vec::new();
    let is_empty = |raising: &Raising<'_>, index: usize| {
        let value = raising.model.node(node).input(index);
        value.and_then(|v| facts::known(raising.model, v)).is_some_and(|t| t.is_empty())
    };
    let mode = raising.string(node, "coordinate_transformation_mode")?.unwrap_or_default();
    if let Some(roi) = raising.model.node(node).input(1).filter(|_| mode != "tf_crop_and_resize") {
        raising.model.set_input(node, 1, None);
        drop_if_unused(raising, roi);
        did.push("dropped the unused roi".to_owned());
    }
    let sized = raising.model.node(node).input(3).is_some() && is_empty(raising, 2);
    if let Some(scales) = raising.model.node(node).input(2).filter(|_| sized) {
        raising.model.set_input(node, 2, None);
        drop_if_unused(raising, scales);
        did.push("dropped the empty scales".to_owned());
    }
    if mode == "tf_half_pixel_for_nn" {
        let nearest = raising.string(node, "mode")?.is_none_or(|mode| mode == "nearest");
        let floors = raising.string(node, "nearest_mode")?.is_some_and(|mode| mode == "floor");
        if !nearest || !floors {
            return Err(Error::model(
                "coordinates \"tf_half_pixel_for_nn\" do not exist from opset 13 on, and only nearest \
                 neighbour with nearest_mode \"floor\" has an equal form",
            )
            .with_hint("export the model again with half_pixel coordinates"));
        }
        // floor(y) = round_half_up(y − ½): half_pixel subtracts the half.
        raising.model.set_attr(node, Attr::string("coordinate_transformation_mode", "half_pixel"));
        raising.model.set_attr(node, Attr::string("nearest_mode", "round_prefer_ceil"));
        did.push("replaced tf_half_pixel_for_nn by half_pixel".to_owned());
    }
    if did.is_empty() { Ok(None) } else { done(did.join(", ")) }
}

/// Five outputs meant training, which normalizes by the statistics of the batch; now an attribute and three outputs do.
fn training_mode(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let outputs = raising.model.node(node).outputs().to_vec();
    match outputs.get(1..).unwrap_or_default() {
        [] => Ok(None),
        extra if extra.iter().all(Option::is_none) => {
            raising.model.truncate_outputs(node, 1);
            done("dropped the empty outputs")
        }
        [Some(_), Some(_), saved @ ..] => {
            if let Some(used) = saved.iter().flatten().copied().find(|&v| raising.is_used(v)) {
                let name = raising.model.value(used).name().to_owned();
                return Err(Error::model("saved statistics are no outputs from opset 14 on")
                    .at_value(&name)
                    .with_hint("export the model in inference mode"));
            }
            raising.model.truncate_outputs(node, 3);
            raising.model.set_attr(node, Attr::int("training_mode", 1));
            let name = raising.model.node_name(node).to_owned();
            raising.outcome.skipped(name, Reason::Training);
            done("set training_mode=1")
        }
        _ => Err(Error::model(format!("{} outputs mean neither training nor inference", outputs.len()))
            .with_hint("export the model in inference mode")),
    }
}

fn roi_align_coordinates(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    raising.model.set_attr(node, Attr::string("coordinate_transformation_mode", "output_half_pixel"));
    done("made its coordinates explicit: output_half_pixel")
}

fn dft_axis(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let axis = raising.int(node, "axis")?.unwrap_or(1);
    raising.model.remove_attr(node, "axis");
    let value = raising.constant(node, "axis", Tensor::from_i64(&[], &[axis]))?;
    raising.model.set_input(node, 2, Some(value));
    done("made axis an input")
}

fn grid_sample_mode(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let renamed = match raising.string(node, "mode")?.as_deref() {
        Some("bilinear") => "linear",
        Some("bicubic") => "cubic",
        _ => return Ok(None),
    };
    raising.model.set_attr(node, Attr::string("mode", renamed));
    done(format!("renamed its mode to {renamed}"))
}

/// Scale and bias had one entry a group; now they have one a channel.
fn group_norm_per_channel(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    required(raising, node, "num_groups")?;
    let groups = raising.int(node, "num_groups")?.unwrap_or(0);
    let Some(groups) = usize::try_from(groups).ok().filter(|&g| g > 0) else {
        return Err(Error::model(format!("num_groups={groups} is not a number of groups")));
    };
    let data = raising.input(node, 0)?;
    let channels = raising.model.shape(data).and_then(|s| s.get(1).copied().flatten());
    for (index, suffix) in [(1, "scale"), (2, "bias")] {
        let old = raising.input(node, index)?;
        let fixed = channels.filter(|c| c % groups == 0).zip(facts::known(raising.model, old));
        let value = match fixed.and_then(|(channels, tensor)| repeat_each(&tensor, groups, channels / groups)) {
            Some(tensor) => raising.constant(node, suffix, tensor)?,
            None => repeat_at_run_time(raising, node, old, suffix, groups)?,
        };
        raising.model.set_input(node, index, Some(value));
        drop_if_unused(raising, old);
    }
    done(format!("repeated scale and bias from {groups} groups to channels"))
}

/// Each of `count` elements `times` over; `None` where the tensor is no vector of that length or not of whole bytes.
fn repeat_each(tensor: &Tensor, count: usize, times: usize) -> Option<Tensor> {
    let bits = tensor.dtype().bits().filter(|b| b % 8 == 0)?;
    if tensor.dims() != [count] {
        return None;
    }
    let repeated: Vec<u8> = tensor.raw().chunks_exact(bits / 8).flat_map(|e| e.repeat(times)).collect();
    Some(Tensor::new(tensor.dtype(), &[count * times], repeated))
}

/// `[g] → [g, 1] → [g, c/g] → [c]`, with `c` from the shape of the data.
fn repeat_at_run_time(
    raising: &mut Raising<'_>,
    node: NodeId,
    value: ValueId,
    suffix: &str,
    groups: usize,
) -> Result<ValueId> {
    let base = format!("{}.{suffix}", raising.model.node_name(node));
    let data = raising.input(node, 0)?;
    let add = |raising: &mut Raising<'_>, op: &str, part: &str, inputs: &[ValueId], attrs: &[AttributeProto]| {
        let name = format!("{base}.{part}");
        let new = NewNode::new(op, &name, inputs, &[&name]);
        raising.insert_before(node, attrs.iter().cloned().fold(new, NewNode::with))
    };
    let groups = groups as i64;
    let count = raising.constant(node, &format!("{suffix}.groups"), Tensor::from_i64(&[1], &[groups]))?;
    let column = raising.constant(node, &format!("{suffix}.column"), Tensor::from_i64(&[2], &[groups, 1]))?;
    let flat = raising.constant(node, &format!("{suffix}.flat"), Tensor::from_i64(&[1], &[-1]))?;
    let range = [Attr::int("start", 1), Attr::int("end", 2)];
    let channels = add(raising, "Shape", "channels", &[data], &range)?;
    let times = add(raising, "Div", "times", &[channels, count], &[])?;
    let wide = add(raising, "Concat", "wide", &[count, times], &[Attr::int("axis", 0)])?;
    let value = add(raising, "Reshape", "in_column", &[value, column], &[])?;
    let value = add(raising, "Expand", "repeated", &[value, wide], &[])?;
    add(raising, "Reshape", "per_channel", &[value, flat], &[])
}

/// Drops an initializer that nothing uses any more.
fn drop_if_unused(raising: &mut Raising<'_>, value: ValueId) {
    if raising.is_used(value) || raising.model.constant(value).is_none() {
        return;
    }
    let home = raising.model.all_graphs().into_iter().find(|&g| raising.model.graph(g).initializers().contains(&value));
    if let Some(graph) = home {
        raising.model.retain_initializers(graph, |_, v| v != value);
    }
}

/// Every operator of the default domain that ONNX 1.23 defines in some version.
pub(super) const OPERATORS: &str = "
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike
    CausalConvWithState Ceil Celu CenterCropPad Clip Col2Im Compress Concat ConcatFromSequence Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumProd CumSum DFT DeformConv DepthToSpace
    DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageDecoder
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log
    LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool MaxUnpool Mean
    MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Multinomial Neg NegativeLogLikelihoodLoss
    NonMaxSuppression NonZero Not OneHot Optional OptionalGetElement OptionalHasElement Or PRelu Pad Pow QLinearConv
    QLinearMatMul QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare RegexFullMatch Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT
    Scan Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength SequenceMap Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze StringConcat
    StringNormalizer StringSplit Sub Sum SwiGLU Swish Tan Tanh TensorScatter TfIdfVectorizer ThresholdedRelu Tile TopK
    Transpose Trilu Unique Unsqueeze Upsample Where Xor
";
