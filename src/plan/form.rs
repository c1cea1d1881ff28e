//! How a quantized constant is stored: which forms an operator, a format and a granularity can have, and which is chosen.

use super::planner::{Planner, Read};
use super::site::Refusal;
use super::{Mode, Scheme, Weight};
use crate::config::SiteKind;
use crate::config::spec::{Field, Form, ScaleDtype};
use crate::ir::{Model, NodeId, Tensor};
use crate::numerics::{Format, Granularity};
use crate::reason::{Kernel, Reason};

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
            Err(Reason::KernelGroups { kernel, size, has: vec![16, 32, 64, 128, 256] })
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
        Granularity::PerGroup { size, .. } => {
            Err(Reason::KernelGroups { kernel, size, has: vec![16, 32, 64, 128, 256] })
        }
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

/// Whether the codes of a weight are stored as bytes, whatever its format: no operator set need know that format.
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

/// The form of a weight.
pub(super) struct Chosen {
    pub(super) form: Form,
    pub(super) accuracy_level: Option<u8>,
    /// Why what was asked for gave way.
    pub(super) gave_way: Option<Reason>,
}

impl Planner<'_> {
    /// How the quantized constant at an input is stored. `transposed` is said of a weight that is stored as `[K, N]` though
    /// its operator has `transB`; the quantizer's axes are those of what is stored.
    pub(super) fn form(
        &self,
        node: NodeId,
        index: usize,
        integer: bool,
        quantizer: &Scheme,
        transposed: bool,
    ) -> Result<Chosen, Refusal> {
        let ask = self.ask(node, SiteKind::Weight);
        let site = self.site(node, SiteKind::Weight);
        let reader = self.reader(&site, SiteKind::Weight, ask);
        let mut gave_way = None;
        let mut found = None;
        if let Some(form) = ask.spec.form {
            match self.fits(form, node, index, integer, quantizer, transposed) {
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
        let first = || {
            let fits = |f: &&Form| self.fits(**f, node, index, integer, quantizer, transposed).is_ok();
            self.target.forms.iter().find(fits).copied().unwrap_or_default()
        };
        let form = found.unwrap_or_else(first);
        let products = self.target.forms.iter().find(|f| f.serves("MatMul"));
        let meant = ask.spec.form.or(products.copied()) == Some(Form::Matmulnbits);
        reader.accuracy_level(meant)?;
        let accuracy_level = ask.spec.accuracy_level.filter(|_| form == Form::Matmulnbits);
        Ok(Chosen { form, accuracy_level, gave_way })
    }

    /// Why a weight cannot have a form.
    pub(super) fn fits(
        &self,
        form: Form,
        node: NodeId,
        index: usize,
        integer: bool,
        quantizer: &Scheme,
        transposed: bool,
    ) -> Result<(), Reason> {
        let at = self.model.node(node);
        let op = at.op_type();
        let dims = self.model.constant_input(node, index).map(Tensor::dims).unwrap_or_default();
        let Scheme { dtype, granularity, .. } = quantizer;
        // Whether the operator has the columns of the stored matrix last.
        let across = at.int("transB").unwrap_or(0) != 0 && !transposed;
        if form == Form::Qdq {
            let product = Form::Matmulnbits.serves(op) && index == 1 && dtype.bits() == 2 && !across;
            let columns = if transposed { dims.first() } else { dims.last() };
            let odd = columns.is_some_and(|c| !c.is_multiple_of(self.target.two_bit_columns.max(1)));
            if product && odd && nbits_fits(*dtype, &dims, granularity, 0).is_ok() {
                let multiple = self.target.two_bit_columns;
                return Err(Reason::WrongColumns { target: self.target.name.clone(), format: *dtype, multiple });
            }
            return Ok(());
        }
        if quantizer.scale_dtype.is_block() {
            return Err(Reason::FormScales { form, scales: quantizer.scale_dtype.into() });
        }
        if !self.target.forms.contains(&form) {
            return Err(Reason::NoForm { target: self.target.name.clone(), form });
        }
        if !form.serves(op) {
            return Err(Reason::NotItsForm { form, op: op.to_owned() });
        }
        if form == Form::Matmulinteger {
            let at_run_time = |(slot, read): &((NodeId, usize), Read)| *slot == (node, 0) && read.mode == Mode::Dynamic;
            let data = at.input(0).and_then(|v| self.wants.get(&v));
            if !integer || !data.is_some_and(|want| want.reads.iter().any(at_run_time)) {
                return Err(Reason::NotAtRunTime);
            }
            return self.integer_product(node, index, quantizer);
        }
        if form == Form::DynamicQuantizeLstm {
            return self.lstm(node, quantizer);
        }
        if integer {
            return Err(Reason::RunsOnIntegers { op: op.to_owned() });
        }
        if form == Form::GatherBlockQuantized {
            let axis = at.int("axis").unwrap_or(0);
            let axis = if axis < 0 { axis + dims.len() as i64 } else { axis };
            let axis = usize::try_from(axis).map_err(|_| Reason::AxisOutside { axis })?;
            return gather_fits(*dtype, &dims, granularity, axis).map(drop);
        }
        if index != 1 {
            return Err(Reason::NotOnTheRight { kernel: Kernel::MatMulNBits });
        }
        if at.is("Gemm") && (at.float("alpha").unwrap_or(1.0) - 1.0).abs() > 0.0 {
            return Err(Reason::Attribute { name: "alpha".to_owned(), wanted: 1 });
        }
        nbits_fits(*dtype, &dims, granularity, usize::from(across))
    }

    /// Why an LSTM cannot be a `DynamicQuantizeLSTM`.
    fn lstm(&self, node: NodeId, quantizer: &Scheme) -> Result<(), Reason> {
        let kernel = Kernel::DynamicQuantizeLSTM;
        let Scheme { dtype: format, granularity, scale_dtype, .. } = *quantizer;
        if !matches!(format, Format::Int8 | Format::Uint8) {
            return Err(Reason::KernelFormat { kernel, format, has: vec![Format::Int8, Format::Uint8] });
        }
        if scale_dtype != ScaleDtype::Float32 {
            return Err(Reason::KernelScaleType { kernel, scales: scale_dtype.into() });
        }
        if !quantizer.symmetric && granularity != Granularity::PerTensor {
            return Err(Reason::OneZeroPoint { kernel });
        }
        if !matches!(granularity, Granularity::PerTensor | Granularity::PerChannel { axis: 1 }) {
            return Err(Reason::KernelScales { kernel, granularity });
        }
        if self.model.node(node).int("layout").unwrap_or(0) != 0 {
            return Err(Reason::BatchFirst);
        }
        Ok(())
    }
}
