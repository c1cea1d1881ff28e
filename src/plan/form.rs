//! How a quantized constant is stored: which forms an operator, a format and a granularity can have, and which is chosen.

use super::planner::Planner;
use super::site::Refusal;
use super::{Scheme, Weight, kernels};
use crate::config::SiteKind;
use crate::config::spec::{Field, Form};
use crate::ir::view::{Gather, axis_in};
use crate::ir::{Model, NodeId, Tensor};
use crate::numerics::{Format, Granularity};
use crate::onnx::DataType;
use crate::ops;
use crate::quant::ScaleDtype;
use crate::reason::{Kernel, Reason};
use crate::targets::Target;

/// Why a matrix whose sums run along `sum_axis` cannot be the weight of a `MatMulNBits`; `Ok` where it can.
///
/// onnxruntime 1.31 has kernels for codes of 2, 4 and 8 bits and blocks of 16, 32, 64, 128 and 256 along the sum.
///
/// # Errors
/// What does not fit.
pub fn nbits_fits(format: Format, dims: &[usize], granularity: &Granularity, sum_axis: usize) -> Result<(), Reason> {
    let kernel = Kernel::MatMulNBits;
    if dims.len() != 2 {
        return Err(Reason::KernelShape { kernel, dims: dims.to_vec() });
    }
    narrow(kernel, format)?;
    match *granularity {
        Granularity::PerTensor => Ok(()),
        Granularity::PerChannel { axis } if axis != sum_axis => Ok(()),
        Granularity::PerGroup { axis, size } if axis == sum_axis => {
            if size.is_power_of_two() && (16..=256).contains(&size) {
                return Ok(());
            }
            Err(Reason::KernelGroups { kernel, size, least: 16, most: Some(256) })
        }
        Granularity::PerChannel { .. } | Granularity::PerGroup { .. } => {
            Err(Reason::KernelScales { kernel, granularity: *granularity })
        }
    }
}

/// Refuses formats that are not integers of 2, 4 or 8 bits.
fn narrow(kernel: Kernel, format: Format) -> Result<(), Reason> {
    let fits = |format: &Format| format.is_integer() && format.bits() <= 8;
    if fits(&format) {
        return Ok(());
    }
    Err(Reason::KernelFormat { kernel, format, has: Format::ALL.into_iter().filter(fits).collect() })
}

/// The axis that the blocks of a `GatherBlockQuantized` cut, and their length, for a table of this shape.
///
/// # Errors
/// Why a table like this has none.
pub fn gather_blocks(dims: &[usize], granularity: &Granularity) -> Result<(usize, usize), Reason> {
    let kernel = Kernel::GatherBlockQuantized;
    let Some(last) = dims.len().checked_sub(1).filter(|&last| last > 0) else {
        return Err(Reason::KernelShape { kernel, dims: dims.to_vec() });
    };
    let row = dims[last].next_power_of_two().max(16);
    match *granularity {
        Granularity::PerTensor => Ok((last, row)),
        Granularity::PerChannel { axis: 0 } if last == 1 => Ok((last, row)),
        Granularity::PerChannel { .. } => Err(Reason::KernelScales { kernel, granularity: *granularity }),
        Granularity::PerGroup { axis, size } if size.is_power_of_two() && size >= 16 => Ok((axis, size)),
        Granularity::PerGroup { size, .. } => Err(Reason::KernelGroups { kernel, size, least: 16, most: None }),
    }
}

/// Whether the codes of a `GatherBlockQuantized` are stored as bytes: `Ok(true)`; as `int4` or `uint4`: `Ok(false)`.
///
/// # Errors
/// Why a table like this, of which slices along `gather_axis` are taken, has no such form.
pub fn gather_fits(
    format: Format,
    dims: &[usize],
    granularity: &Granularity,
    gather_axis: usize,
) -> Result<bool, Reason> {
    let kernel = Kernel::GatherBlockQuantized;
    narrow(kernel, format)?;
    let (axis, _) = gather_blocks(dims, granularity)?;
    let last = dims.len() - 1;
    let whole = (dims[last] * format.bits()).is_multiple_of(8);
    if axis == last && gather_axis == 0 && whole {
        return Ok(true);
    }
    if format.bits() == 4 {
        return Ok(false);
    }
    Err(Reason::WholeBytes { kernel, format })
}

/// Whether the codes of a weight are stored as bytes, whatever its format: no opset need know that format.
#[must_use]
pub fn is_bytes(model: &Model, weight: &Weight) -> bool {
    match weight.form {
        Form::Qdq | Form::Matmulinteger | Form::DynamicQuantizeLstm => false,
        Form::Matmulnbits => true,
        Form::GatherBlockQuantized => {
            let table = model.value_named(&weight.tensor).and_then(|v| model.constant(v));
            let Scheme { dtype, granularity, .. } = &weight.quantizer;
            table.is_some_and(|t| gather_fits(*dtype, &t.dims(), granularity, 0) == Ok(true))
        }
    }
}

/// A quantized constant, of which it is asked in which forms it can be stored.
pub(super) struct Constant<'a> {
    pub(super) node: NodeId,
    /// Which input it is.
    pub(super) index: usize,
    pub(super) scheme: &'a Scheme,
    /// The float type that it has in the result.
    pub(super) float: DataType,
    pub(super) runs: Runs,
    /// It is stored as `[K, N]` though its operator has `transB`; the scheme's axes are those of what is stored.
    pub(super) transposed: bool,
}

/// How the operator of a constant runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Runs {
    /// In float.
    Float,
    /// On integers.
    Integer,
    /// On integers, with an input whose range is found at run time.
    AtRunTime,
}

/// Whether a constant can have a form.
pub(super) fn fits(model: &Model, target: &Target, form: Form, constant: &Constant<'_>) -> Result<(), Reason> {
    let &Constant { node, index, scheme, runs, .. } = constant;
    let op = model.node(node).op_type();
    if form == Form::Qdq {
        return columns_fit(model, target, constant);
    }
    let other = constant.float.is_half() && scheme.scale_dtype == ScaleDtype::Float32;
    if scheme.scale_dtype.is_block() || other {
        return Err(Reason::FormScales { form, scales: scheme.scale_dtype.into() });
    }
    if !target.forms.contains(&form) {
        return Err(Reason::NoForm { target: target.name.clone(), form });
    }
    if !form.serves(op) {
        return Err(Reason::NotItsForm { form, op: op.to_owned() });
    }
    match form {
        Form::Qdq => Ok(()),
        Form::Matmulinteger if runs != Runs::AtRunTime => Err(Reason::NotAtRunTime),
        Form::Matmulinteger => kernels::integer_product(model, node, index, scheme),
        Form::DynamicQuantizeLstm => kernels::lstm(model, node, scheme),
        _ if runs != Runs::Float => Err(Reason::RunsOnIntegers { op: op.to_owned() }),
        Form::GatherBlockQuantized => table_fits(model, constant),
        Form::Matmulnbits => product_fits(model, constant),
    }
}

/// Whether a target computes with a dequantized matrix as it should, where it fuses a Dequantize: in bodies, and with the columns of
/// 2 bits.
fn columns_fit(model: &Model, target: &Target, constant: &Constant<'_>) -> Result<(), Reason> {
    let inside = model.node(constant.node).graph() != Some(model.main());
    let form = Form::Matmulnbits;
    if inside && fits(model, target, form, constant).is_ok() {
        return Err(Reason::FusedInBody { target: target.name.clone() });
    }
    let &Constant { node, index, scheme, transposed, .. } = constant;
    let (format, multiple) = (scheme.dtype, target.two_bit_columns);
    let across = ops::is_transposed(model, node) && !transposed;
    let dims = model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
    let columns = if transposed { dims.first() } else { dims.last() };
    let product = Form::Matmulnbits.serves(model.node(node).op_type()) && index == 1 && format.bits() == 2 && !across;
    let odd = columns.is_some_and(|c| !c.is_multiple_of(multiple.max(1)));
    if product && odd && nbits_fits(format, &dims, &scheme.granularity, 0).is_ok() {
        return Err(Reason::WrongColumns { target: target.name.clone(), format, multiple });
    }
    Ok(())
}

/// Whether a table can be that of a `GatherBlockQuantized`.
fn table_fits(model: &Model, constant: &Constant<'_>) -> Result<(), Reason> {
    let &Constant { node, index, scheme, .. } = constant;
    let dims = model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
    let axis = Gather::of(model.node(node)).map_or(0, |gather| gather.axis);
    let axis = axis_in(axis, dims.len()).ok_or(Reason::AxisOutside { axis })?;
    gather_fits(scheme.dtype, &dims, &scheme.granularity, axis).map(drop)
}

/// Whether a matrix can be that of a `MatMulNBits`.
fn product_fits(model: &Model, constant: &Constant<'_>) -> Result<(), Reason> {
    let &Constant { node, index, scheme, transposed, .. } = constant;
    if index != 1 {
        return Err(Reason::NotOnTheRight { kernel: Kernel::MatMulNBits });
    }
    kernels::unscaled(model, node)?;
    let dims = model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
    let across = ops::is_transposed(model, node) && !transposed;
    nbits_fits(scheme.dtype, &dims, &scheme.granularity, usize::from(across))
}

/// The form of a weight.
pub(super) struct Chosen {
    pub(super) form: Form,
    pub(super) accuracy_level: Option<u8>,
    /// No kernel reads it in this form.
    pub(super) dequantized: bool,
    /// Why what was asked for gave way.
    pub(super) gave_way: Option<Reason>,
}

impl Planner<'_> {
    /// How a quantized constant is stored.
    pub(super) fn form(&self, constant: &Constant<'_>) -> Result<Chosen, Refusal> {
        let ask = self.ask(constant.node, SiteKind::Weight);
        let site = self.site(constant.node, SiteKind::Weight);
        let reader = self.reader(&site, SiteKind::Weight, ask);
        let fits = |form: Form| fits(self.model, self.target, form, constant);
        let mut gave_way = None;
        let mut found = None;
        if let Some(form) = ask.spec.form {
            match fits(form) {
                Ok(()) => found = Some(form),
                Err(why) => match reader.unfit::<()>(Field::Form, why, "leave it out to take one that fits") {
                    Err(Refusal::Unfit(why)) => {
                        gave_way = Some(Reason::FormGivesWay { form, because: Box::new(why) });
                    }
                    Err(wrong) => return Err(wrong),
                    Ok(()) => {}
                },
            }
        }
        // What no form serves well is stored as it always was.
        let product = Form::Matmulnbits.serves(self.model.node(constant.node).op_type());
        let fused = self.target.simulate || self.place.fuses(self, constant);
        let hindered = || constant.runs != Runs::Integer && self.place.hinders(self, constant.node);
        let quick = |form: Form| form != Form::Qdq || !product || fused && !hindered();
        let fitting = || self.target.forms.iter().copied().filter(|&form| fits(form).is_ok());
        let first = || fitting().find(|&form| quick(form)).or_else(|| fitting().next()).unwrap_or_default();
        let form = found.unwrap_or_else(first);
        let dequantized = form == Form::Qdq && !fused;
        let products = self.target.forms.iter().find(|f| f.serves("MatMul"));
        let meant = ask.spec.form.or(products.copied()) == Some(Form::Matmulnbits);
        reader.accuracy_level(meant)?;
        let accuracy_level = ask.spec.accuracy_level.filter(|_| form == Form::Matmulnbits);
        Ok(Chosen { form, accuracy_level, dequantized, gave_way })
    }
}
