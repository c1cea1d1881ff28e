//! How a quantized constant is stored: which forms an operator, a format and a granularity can have, and which is chosen.

use super::planner::{Planner, Read};
use super::site::Refusal;
use super::{Mode, Scheme, Weight};
use crate::config::SiteKind;
use crate::config::spec::{Field, Form, ScaleDtype};
use crate::ir::{Model, NodeId, Tensor};
use crate::numerics::{Format, Granularity};

/// Why a matrix whose sums run along `sum_axis` cannot be the weight of a `MatMulNBits`; `Ok` where it can.
///
/// onnxruntime 1.31 has kernels for codes of 2, 4 and 8 bits and blocks of 16, 32, 64, 128 and 256 along the sum.
///
/// # Errors
/// What does not fit, as a clause.
pub fn nbits_fits(format: Format, dims: &[usize], granularity: &Granularity, sum_axis: usize) -> Result<(), String> {
    if dims.len() != 2 {
        return Err(format!("MatMulNBits takes a matrix, not a constant of shape {dims:?}"));
    }
    if !format.is_integer() || format.bits() > 8 {
        return Err(format!("MatMulNBits has integer codes of 2, 4 or 8 bits, not {format}"));
    }
    match *granularity {
        Granularity::PerTensor => Ok(()),
        Granularity::PerChannel { axis } if axis != sum_axis => Ok(()),
        Granularity::PerGroup { axis, size } if axis == sum_axis => {
            if size.is_power_of_two() && (16..=256).contains(&size) {
                return Ok(());
            }
            Err(format!("MatMulNBits has groups of 16, 32, 64, 128 or 256, not of {size}"))
        }
        Granularity::PerChannel { .. } | Granularity::PerGroup { .. } => {
            Err("MatMulNBits has its scales along the sum, not across".to_owned())
        }
    }
}

/// The axis that the blocks of a `GatherBlockQuantized` cut, and their length, for a table of this shape.
///
/// # Errors
/// Why a table like this has none, as a clause.
pub fn gather_blocks(dims: &[usize], granularity: &Granularity) -> Result<(usize, usize), String> {
    let Some(last) = dims.len().checked_sub(1).filter(|&last| last > 0) else {
        return Err(format!("GatherBlockQuantized takes a table of rows, not a constant of shape {dims:?}"));
    };
    let row = dims[last].next_power_of_two().max(16);
    match *granularity {
        Granularity::PerTensor => Ok((last, row)),
        Granularity::PerChannel { axis: 0 } if last == 1 => Ok((last, row)),
        Granularity::PerChannel { .. } => {
            Err("GatherBlockQuantized has a scale for each row or for blocks of one".to_owned())
        }
        Granularity::PerGroup { axis, size } if size.is_power_of_two() && size >= 16 => Ok((axis, size)),
        Granularity::PerGroup { size, .. } => {
            Err(format!("GatherBlockQuantized has groups of 16, 32, 64 and so on, not of {size}"))
        }
    }
}

/// Whether the codes of a `GatherBlockQuantized` are stored as bytes: `Ok(true)`; as `int4` or `uint4`: `Ok(false)`.
///
/// # Errors
/// Why a table like this, of which slices along `gather_axis` are taken, has no such form, as a clause.
pub fn gather_fits(
    format: Format,
    dims: &[usize],
    granularity: &Granularity,
    gather_axis: usize,
) -> Result<bool, String> {
    if !format.is_integer() || format.bits() > 8 {
        return Err(format!("GatherBlockQuantized has integer codes of 2, 4 or 8 bits, not {format}"));
    }
    let (axis, _) = gather_blocks(dims, granularity)?;
    let last = dims.len() - 1;
    let whole = (dims[last] * format.bits()).is_multiple_of(8);
    if axis == last && gather_axis == 0 && whole {
        return Ok(true);
    }
    if format.bits() == 4 {
        return Ok(false);
    }
    Err(format!("GatherBlockQuantized has {format} only in rows of whole bytes, taken along axis 0"))
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
    /// What was asked for and gave way, and why.
    pub(super) note: Option<String>,
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
        let mut note = None;
        let mut found = None;
        if let Some(form) = ask.spec.form {
            match self.fits(form, node, index, integer, quantizer, transposed) {
                Ok(()) => found = Some(form),
                Err(why) => match reader.unfit::<()>(Field::Form, why, "leave it out to take one that fits") {
                    Err(Refusal::Unfit(why)) => note = Some(format!("form {form} gives way: {why}")),
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
        Ok(Chosen { form, accuracy_level, note })
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
    ) -> Result<(), String> {
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
                return Err(format!(
                    "{} computes a dequantized {dtype} weight wrongly unless its columns are a multiple of {multiple}",
                    self.target.name
                ));
            }
            return Ok(());
        }
        if quantizer.scale_dtype.is_block() {
            return Err(format!("{form} has no {} scales", quantizer.scale_dtype.name()));
        }
        if !self.target.forms.contains(&form) {
            return Err(format!("{} has no {form}", self.target.name));
        }
        if !form.serves(op) {
            return Err(format!("a {op} has no such form"));
        }
        if form == Form::Matmulinteger {
            let at_run_time = |(slot, read): &((NodeId, usize), Read)| *slot == (node, 0) && read.mode == Mode::Dynamic;
            let data = at.input(0).and_then(|v| self.wants.get(&v));
            if !integer || !data.is_some_and(|want| want.reads.iter().any(at_run_time)) {
                return Err("its input is not quantized at run time".to_owned());
            }
            return self.integer_product(node, index, quantizer);
        }
        if form == Form::DynamicQuantizeLstm {
            return self.lstm(node, quantizer);
        }
        if integer {
            return Err(format!("the {op} runs on integers"));
        }
        if form == Form::GatherBlockQuantized {
            let axis = at.int("axis").unwrap_or(0);
            let axis = if axis < 0 { axis + dims.len() as i64 } else { axis };
            let axis = usize::try_from(axis).map_err(|_| "its axis is outside the table".to_owned())?;
            return gather_fits(*dtype, &dims, granularity, axis).map(drop);
        }
        if index != 1 {
            return Err("MatMulNBits has its weight on the right".to_owned());
        }
        if at.is("Gemm") && (at.float("alpha").unwrap_or(1.0) - 1.0).abs() > 0.0 {
            return Err("alpha is not 1".to_owned());
        }
        nbits_fits(*dtype, &dims, granularity, usize::from(across))
    }

    /// Why an LSTM cannot be a `DynamicQuantizeLSTM`.
    fn lstm(&self, node: NodeId, quantizer: &Scheme) -> Result<(), String> {
        let Scheme { dtype, granularity, .. } = quantizer;
        if !matches!(dtype, Format::Int8 | Format::Uint8) || quantizer.scale_dtype != ScaleDtype::Float32 {
            return Err(format!("DynamicQuantizeLSTM has int8 and uint8 with float scales, not {dtype}"));
        }
        if !quantizer.symmetric && *granularity != Granularity::PerTensor {
            return Err("DynamicQuantizeLSTM has one zero point for a weight".to_owned());
        }
        if !matches!(granularity, Granularity::PerTensor | Granularity::PerChannel { axis: 1 }) {
            return Err("DynamicQuantizeLSTM has one scale for a weight, or one for each row".to_owned());
        }
        if self.model.node(node).int("layout").unwrap_or(0) != 0 {
            return Err("its batch comes first".to_owned());
        }
        Ok(())
    }
}
