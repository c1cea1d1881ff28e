//! From what is asked for at a site to a quantizer that can be made, or the reason why there is none.
//!
//! A key that does not fit another one is an error where it was asked for at least as late as that other one. Where it
//! was inherited it gives way: `dtype = "float8e4m3fn"` over a default of `symmetric = false` needs no second key.

use super::Scheme;
use crate::config::rules::{Resolved, Rule, Rules, Scope};
use crate::config::spec::{Arithmetic, Block, Dtype, Field, ObserverKind, ScaleDtype, ScaleType, Share};
use crate::config::{SiteKind, Spec};
use crate::error::{Error, Kind};
use crate::ir::view::axis_in;
use crate::onnx::DataType;
use crate::ops::WeightLayout;
use crate::quant::{Format, Granularity, Observer, Round, check_least_scale};
use crate::reason::Reason;
use crate::targets::Target;

/// Where a format can be had that a target has no kernels for.
const ELSEWHERE: &str =
    "--simulate writes float operators with the same results, and --target generic the format as ONNX defines it";

/// Why a site has no quantizer.
#[derive(Debug)]
pub(super) enum Refusal {
    /// What is asked for makes no sense; nothing is planned.
    Wrong(Error),
    /// It stays float.
    Unfit(Reason),
}

/// A site's constant.
pub(super) struct Shape<'a> {
    pub(super) dims: &'a [usize],
    pub(super) layout: WeightLayout,
    /// Whether the target has a kernel that fixes the axis of the channels.
    pub(super) kernel: bool,
}

/// Reads what is asked for at one site.
pub(super) struct Reader<'a> {
    pub(super) rules: &'a Rules,
    pub(super) target: &'a Target,
    /// Name of the site, for messages.
    pub(super) site: &'a str,
    pub(super) kind: SiteKind,
    pub(super) resolved: &'a Resolved,
}

type Outcome<T> = Result<T, Refusal>;

impl Reader<'_> {
    fn spec(&self) -> &Spec {
        &self.resolved.spec
    }

    fn rule(&self, field: Field) -> Option<&Rule> {
        self.rules.rule(self.resolved, field)
    }

    pub(super) fn error(&self, field: Field, message: impl Into<String>) -> Error {
        let error = Error::new(Kind::Config, message);
        let error = match self.rule(field) {
            Some(rule) => {
                let key = format!("{}.{}", self.kind.name(), field.name());
                let message = format!("{}, {key}: {}", rule.label, error.message());
                rule.origin.at(Error::new(Kind::Config, message), &key)
            }
            None => error,
        };
        error.at_value(self.site)
    }

    fn wrong<T>(&self, field: Field, message: impl Into<String>, hint: &str) -> Outcome<T> {
        Err(Refusal::Wrong(self.error(field, message).with_hint(hint)))
    }

    /// An error where a rule about these nodes said so; a reason to stay float where one about all nodes did.
    pub(super) fn unfit<T>(&self, field: Field, why: Reason, hint: &str) -> Outcome<T> {
        match self.rule(field) {
            Some(rule) if rule.is_named() && !rule.optional => self.wrong(field, why.to_string(), hint),
            _ => Err(Refusal::Unfit(why)),
        }
    }

    /// Whether `field` was asked for at least as late as `other`.
    fn asked(&self, field: Field, other: Field) -> bool {
        self.resolved.from(field).is_some_and(|rule| self.resolved.from(other).is_none_or(|o| rule >= o))
    }

    /// A switch that only makes sense in some cases: an error where it was asked for beside `other`, else off.
    fn only_if(&self, sense: bool, field: Field, on: bool, other: Field, message: &str, hint: &str) -> Outcome<bool> {
        if on && !sense && self.asked(field, other) {
            return self.wrong(field, message, hint);
        }
        Ok(on && sense)
    }

    /// The element format, and that of the blocks, if the dtype is one of blocks.
    fn format(&self) -> Outcome<(Format, Option<Block>)> {
        let Some(dtype) = self.spec().dtype else {
            return self.wrong(Field::Dtype, "no dtype is set", "set it in [default]");
        };
        let block = dtype.block();
        let format = dtype.format();
        if format == Format::Int32 {
            return self.wrong(Field::Dtype, "int32 is for biases", "int16 is the widest that others can have");
        }
        let stored = block.is_none_or(|b| self.target.block_scales.contains(&b.scale()));
        if !(self.target.formats.contains(&format) && stored) {
            let message = format!("{} has no quantizer for {dtype}", self.target.name);
            let list: Vec<&str> = self.target.formats.iter().map(|f| f.name()).collect();
            let hint = format!("it has {}; {ELSEWHERE}", list.join(", "));
            return self.wrong(Field::Dtype, message, &hint);
        }
        Ok((format, block))
    }

    /// The precision of the scales and how they are rounded to it.
    fn scales(&self, quantizer: &mut Scheme, block: Option<Block>) -> Outcome<()> {
        let spec = self.spec();
        let dtype = spec.dtype.map(|d| d.to_string()).unwrap_or_default();
        quantizer.scale_type = spec.scale_type.unwrap_or_default();
        quantizer.scale_dtype = spec.scale_dtype.unwrap_or_default();
        if let Some(block) = block {
            if spec.scale_dtype.is_some_and(|s| s != block.scale()) && self.asked(Field::ScaleDtype, Field::Dtype) {
                let message = format!("{dtype} has {} scales", block.scale().name());
                return self.wrong(Field::ScaleDtype, message, "leave it out: it follows from the format");
            }
            quantizer.scale_dtype = block.scale();
        }
        let powers = quantizer.scale_dtype == ScaleDtype::Float8e8m0;
        match spec.mx_rounding {
            Some(rounding) if powers => quantizer.mx_rounding = rounding,
            Some(_) if [Field::Dtype, Field::ScaleDtype].into_iter().all(|f| self.asked(Field::MxRounding, f)) => {
                let hint = "it is for scale_dtype = \"float8e8m0\" and the mx formats";
                return self.wrong(Field::MxRounding, "only power-of-two scales of blocks are rounded like this", hint);
            }
            _ => {}
        }
        if !quantizer.scale_dtype.is_block() {
            return Ok(());
        }
        let name = quantizer.scale_dtype.name();
        if !self.target.block_scales.contains(&quantizer.scale_dtype) {
            let message = format!("{} has no quantizer with {name} scales", self.target.name);
            return self.wrong(Field::ScaleDtype, message, ELSEWHERE);
        }
        let asked = |field| self.asked(field, Field::Dtype) && self.asked(field, Field::ScaleDtype);
        if spec.symmetric == Some(false) && asked(Field::Symmetric) {
            let message = format!("{name} scales do not allow zero points");
            return self.wrong(Field::Symmetric, message, "leave it out, or set it to true");
        }
        if !quantizer.dtype.is_signed() {
            let message = format!("{} has no sign, and {name} scales do not allow zero points", quantizer.dtype);
            return self.wrong(Field::ScaleDtype, message, "use int2, int4, int8 or a float format");
        }
        if !quantizer.symmetric {
            quantizer.symmetric = true;
            quantizer.narrow_range = spec.narrow_range.unwrap_or(quantizer.dtype.is_integer());
        }
        if quantizer.scale_type == ScaleType::PowerOfTwo && !powers && asked(Field::ScaleType) {
            return self.wrong(Field::ScaleType, format!("{name} scales are not powers of two"), "leave it out");
        }
        // What the scales are says all.
        quantizer.scale_type = ScaleType::Float;
        if powers && spec.eps.is_some_and(|eps| eps > 0.0) && asked(Field::Eps) {
            return self.wrong(Field::Eps, "power-of-two scales reach down to 2^-127 only", "leave it out");
        }
        Ok(())
    }

    /// The parts that activations and constants have in common.
    fn common(&self) -> Outcome<Scheme> {
        let (format, block) = self.format()?;
        let spec = self.spec();
        let float = !format.is_integer();
        let symmetric = spec.symmetric.unwrap_or(float) || float;
        if float && spec.symmetric == Some(false) && self.asked(Field::Symmetric, Field::Dtype) {
            return self.wrong(
                Field::Symmetric,
                format!("{format} has no zero point"),
                "leave it out, or set it to true",
            );
        }
        let symmetric = symmetric || {
            if !self.target.zero_points && self.rule(Field::Symmetric).is_some_and(|rule| !rule.preset) {
                let message = format!("{} takes zero points of 0 only", self.target.name);
                return self.wrong(Field::Symmetric, message, "symmetric = true, or another --target");
            }
            !self.target.zero_points
        };
        let mut quantizer = Scheme::new(format, symmetric, Granularity::PerTensor);
        let none = format!("{format} has no integer range");
        quantizer.narrow_range = match spec.narrow_range {
            Some(on) => self.only_if(!float, Field::NarrowRange, on, Field::Dtype, &none, "leave it out")?,
            None => symmetric && !float,
        };
        let reduce = spec.reduce_range.unwrap_or(false);
        let room = !float && format.bits() > 2;
        quantizer.reduce_range = self.only_if(
            room,
            Field::ReduceRange,
            reduce,
            Field::Dtype,
            "the format has no bit to spare",
            "leave it out",
        )?;
        quantizer.observer = spec.observer.unwrap_or(ObserverKind::Minmax);
        quantizer.percentile =
            self.number_of(Field::Percentile, spec.percentile, ObserverKind::Percentile, Observer::PERCENT)?;
        quantizer.mse_p = self.number_of(Field::MseP, spec.mse_p, ObserverKind::Mse, Observer::POWER)?;
        if let Err((message, hint)) = quantizer.observer().wrong() {
            let field = if quantizer.observer == ObserverKind::Mse { Field::MseP } else { Field::Percentile };
            return self.wrong(field, message, hint);
        }
        self.scales(&mut quantizer, block)?;
        let eps = spec.eps.unwrap_or(0.0);
        if let Err(message) = check_least_scale(eps) {
            return Err(Refusal::Wrong(self.error(Field::Eps, message)));
        }
        quantizer.eps = if quantizer.scale_dtype == ScaleDtype::Float8e8m0 { 0.0 } else { eps as f32 };
        quantizer.postprocess = spec.postprocess;
        quantizer.round = spec.round.unwrap_or_default();
        if float && quantizer.round != Round::HalfEven {
            if self.asked(Field::Round, Field::Dtype) {
                return self.wrong(Field::Round, format!("{format} is rounded half to even"), "leave it out");
            }
            quantizer.round = Round::HalfEven;
        }
        Ok(quantizer)
    }

    /// A number that belongs to one observer.
    fn number_of(
        &self,
        field: Field,
        number: Option<f64>,
        observer: ObserverKind,
        default: f64,
    ) -> Outcome<Option<f64>> {
        let applies = self.spec().observer == Some(observer);
        match number {
            Some(_) if !applies && self.asked(field, Field::Observer) => {
                let name = observer.name();
                let message = format!("only observer = \"{name}\" has a {}", field.name());
                self.wrong(field, message, &format!("add observer = \"{name}\""))
            }
            _ if !applies => Ok(None),
            number => Ok(Some(number.unwrap_or(default))),
        }
    }

    /// How an activation is quantized, and whether at run time.
    pub(super) fn activation(&self) -> Outcome<(Scheme, bool)> {
        let spec = self.spec();
        let block = spec.dtype.and_then(Dtype::block);
        if block.is_some() {
            return self.blocks();
        }
        let dynamic = spec.dynamic == Some(true);
        if dynamic && self.kind != SiteKind::Input {
            return self.wrong(Field::Dynamic, "only inputs are quantized at run time", "set it for input");
        }
        let share = spec.granularity.unwrap_or(Share::PerTensor);
        if share == Share::PerToken {
            return if dynamic {
                self.wrong(Field::Granularity, "only inputs have tokens", "set it for input")
            } else {
                self.wrong(Field::Granularity, "scales per token are computed at run time", "add dynamic = true")
            };
        }
        if matches!(share, Share::PerChannel | Share::PerGroup) {
            let hint = "integer kernels require per-tensor";
            return self.wrong(Field::Granularity, "activations have one scale per tensor", hint);
        }
        for field in [Field::ChAxis, Field::GroupSize] {
            if spec.written(field).is_some() && self.asked(field, Field::Granularity) {
                return self.wrong(field, "one scale for a tensor has no axis and no groups", "leave it out");
            }
        }
        let quantizer = self.common()?;
        if !self.target.activation_formats.contains(&quantizer.dtype) {
            let list: Vec<&str> = self.target.activation_formats.iter().map(|f| f.name()).collect();
            let message = format!("{} does not run {} activations", self.target.name, quantizer.dtype);
            let hint = format!("it runs {}; {}.enable = false leaves them in float", list.join(", "), self.kind.name());
            return self.wrong(Field::Dtype, message, &hint);
        }
        if quantizer.scale_dtype.is_block() {
            let message = "activations have 8-bit scales only in block formats";
            return self.wrong(Field::ScaleDtype, message, "use dtype = \"mxfp8\" or similar");
        }
        if quantizer.round != Round::HalfEven {
            let hint = "other rounding modes are for constants only";
            return self.wrong(Field::Round, "QuantizeLinear rounds half to even", hint);
        }
        let plain = spec.arithmetic.is_none_or(|a| a == Arithmetic::Onnx);
        for (field, on) in [(Field::SignedScale, spec.signed_scale == Some(true)), (Field::Arithmetic, !plain)] {
            if on {
                return self.wrong(field, "it is for weights", "leave it out");
            }
        }
        if dynamic {
            self.at_run_time()?;
            return Ok((Scheme::new(Format::Uint8, false, Granularity::PerTensor), true));
        }
        Ok((quantizer, false))
    }

    /// The least scale of an activation that has one for each token.
    pub(super) fn per_token(&self) -> Outcome<f32> {
        let spec = self.spec();
        if spec.dtype != Some(Dtype::Element(Format::Int8)) {
            return self.wrong(Field::Dtype, "scales per token are for int8", "set dtype = \"int8\"");
        }
        if spec.symmetric != Some(false) {
            let message = "symmetric scales per token are not implemented";
            return self.wrong(Field::Symmetric, message, "set symmetric = false");
        }
        let differs = [
            (Field::Observer, spec.observer.is_some_and(|o| o != ObserverKind::Minmax)),
            (Field::ScaleType, spec.scale_type.is_some_and(|s| s != crate::config::spec::ScaleType::Float)),
            (Field::ScaleDtype, spec.scale_dtype.is_some_and(|s| s != ScaleDtype::Float32)),
            (Field::NarrowRange, spec.narrow_range == Some(true)),
            (Field::ReduceRange, spec.reduce_range == Some(true)),
            (Field::Round, spec.round.is_some_and(|r| r != Round::HalfEven)),
        ];
        for (field, differs) in differs {
            if differs && self.asked(field, Field::Granularity) {
                let message = "a scale per token goes from minimum to maximum, over -128 to 127";
                return self.wrong(field, message, "leave it out");
            }
        }
        let eps = spec.eps.map_or(f32::MIN_POSITIVE, |eps| eps as f32);
        Ok(eps.max(f32::MIN_POSITIVE))
    }

    /// An activation in blocks, whose scales follow from the values at each run. The axis is that of a
    /// matrix with a block a row.
    fn blocks(&self) -> Outcome<(Scheme, bool)> {
        let spec = self.spec();
        let dtype = spec.dtype.map(|d| d.to_string()).unwrap_or_default();
        if self.kind != SiteKind::Input {
            return self.unfit(Field::Dtype, Reason::BlocksAtRunTime { dtype }, "output.enable = false");
        }
        if spec.dynamic == Some(false) && self.asked(Field::Dynamic, Field::Dtype) {
            let message = format!("scales of {dtype} are computed each time the model runs");
            return self.wrong(Field::Dynamic, message, "leave it out");
        }
        let fixed = "leave it out: it follows from the format";
        if spec.granularity.is_some_and(|s| s != Share::PerGroup) && self.asked(Field::Granularity, Field::Dtype) {
            return self.wrong(Field::Granularity, format!("{dtype} has one scale per block"), fixed);
        }
        if spec.ch_axis.is_some() && self.asked(Field::ChAxis, Field::Dtype) {
            return self.wrong(Field::ChAxis, "blocks of an activation run along its last axis", "leave it out");
        }
        let differs = [
            (Field::Observer, spec.observer.is_some_and(|o| o != ObserverKind::Minmax)),
            (Field::Postprocess, spec.postprocess.is_some()),
            (Field::Round, spec.round.is_some_and(|r| r != Round::HalfEven)),
            (Field::NarrowRange, spec.narrow_range == Some(true)),
            (Field::ReduceRange, spec.reduce_range == Some(true)),
            (Field::SignedScale, spec.signed_scale == Some(true)),
            (Field::Arithmetic, spec.arithmetic.is_some_and(|a| a != Arithmetic::Onnx)),
        ];
        for (field, differs) in differs {
            if differs && self.asked(field, Field::Dtype) {
                let message = "dynamic scales are always those of the largest magnitude";
                return self.wrong(field, message, "leave it out");
            }
        }
        let found = self.common()?;
        let Some(block) = spec.dtype.and_then(Dtype::block) else { return Ok((found, true)) };
        if !self.target.activation_formats.contains(&found.dtype) {
            let message = format!("{} does not run {dtype} activations", self.target.name);
            return self.wrong(
                Field::Dtype,
                message,
                &format!("{}.enable = false leaves them in float; {ELSEWHERE}", self.kind.name()),
            );
        }
        self.block_size(block)?;
        let granularity = Granularity::PerGroup { axis: 1, size: block.size() as usize };
        let plain = Scheme::new(found.dtype, true, granularity);
        let Scheme { scale_dtype, mx_rounding, eps, .. } = found;
        Ok((Scheme { narrow_range: false, scale_dtype, mx_rounding, eps, ..plain }, true))
    }

    /// Refuses another size of blocks than the format has.
    fn block_size(&self, block: Block) -> Outcome<()> {
        if self.spec().group_size.is_some_and(|s| s != block.size()) && self.asked(Field::GroupSize, Field::Dtype) {
            let message = format!("the format has blocks of {}", block.size());
            return self.wrong(Field::GroupSize, message, "leave it out: it follows from the format");
        }
        Ok(())
    }

    /// `DynamicQuantizeLinear` makes uint8 with a zero point, from the smallest to the largest value, and nothing else.
    fn at_run_time(&self) -> Outcome<()> {
        let spec = self.spec();
        let differs = [
            (Field::Dtype, spec.dtype.is_some_and(|d| d != Dtype::Element(Format::Uint8))),
            (Field::Symmetric, spec.symmetric == Some(true)),
            (Field::Observer, spec.observer.is_some_and(|o| o != ObserverKind::Minmax)),
            (Field::ScaleType, spec.scale_type.is_some_and(|s| s != ScaleType::Float)),
            (Field::ScaleDtype, spec.scale_dtype.is_some_and(|s| s != ScaleDtype::Float32)),
            (Field::NarrowRange, spec.narrow_range == Some(true)),
            (Field::ReduceRange, spec.reduce_range == Some(true)),
            (Field::Eps, spec.eps.is_some_and(|e| e > 0.0)),
            (Field::Postprocess, spec.postprocess.is_some()),
        ];
        for (field, differs) in differs {
            if differs && self.asked(field, Field::Dynamic) {
                let message = "dynamic ranges are always uint8, asymmetric, from minimum to maximum";
                return self.wrong(field, message, "leave it out, or dynamic = false");
            }
        }
        Ok(())
    }

    /// How a constant weight is quantized.
    pub(super) fn weight(&self, shape: &Shape<'_>, float: DataType) -> Outcome<Scheme> {
        let spec = self.spec();
        if spec.dynamic == Some(true) {
            return self.wrong(Field::Dynamic, "a weight is the same at every run", "set it for input");
        }
        let mut quantizer = self.common()?;
        quantizer.granularity = self.granularity(shape)?;
        if matches!(quantizer.observer, ObserverKind::Mean | ObserverKind::Entropy) {
            let hint = "minmax, percentile and mse look at the values themselves";
            return self.wrong(Field::Observer, "this observer is for activations", hint);
        }
        self.conventions(&mut quantizer)?;
        self.half_scales(float, &mut quantizer)?;
        Ok(quantizer)
    }

    /// Scales beside a float of 16 bits are of its type, unless float32 is asked for.
    fn half_scales(&self, float: DataType, quantizer: &mut Scheme) -> Outcome<()> {
        let (own, found) = (ScaleDtype::of(float), quantizer.scale_dtype);
        let asked = self.resolved.from(Field::ScaleDtype) > Some(0);
        if !float.is_half() || found.is_block() || asked && matches!(found, ScaleDtype::Float32) {
            return Ok(());
        }
        if asked && found != own && self.rule(Field::ScaleDtype).is_some_and(|rule| !rule.preset) {
            let message = format!("scales of a {float} weight are {} or float32", own.name());
            return self.wrong(Field::ScaleDtype, message, "leave it out");
        }
        quantizer.scale_dtype = own;
        Ok(())
    }

    /// Only one form has levels of accuracy.
    pub(super) fn accuracy_level(&self, meant: bool) -> Outcome<()> {
        if self.spec().accuracy_level.is_some() && !meant && self.asked(Field::AccuracyLevel, Field::Form) {
            let message = "only form = \"matmulnbits\" has accuracy levels";
            return self.wrong(Field::AccuracyLevel, message, "add form = \"matmulnbits\"");
        }
        Ok(())
    }

    /// The sign of scales, and whose arithmetic makes them.
    fn conventions(&self, quantizer: &mut Scheme) -> Outcome<()> {
        let spec = self.spec();
        let format = quantizer.dtype;
        let bytes = format.is_integer() && format.bits() <= 8 && !quantizer.scale_dtype.is_block();
        let signed = spec.signed_scale.unwrap_or(false);
        let message = format!("{format} has positive scales only");
        let signed = self.only_if(bytes, Field::SignedScale, signed, Field::Dtype, &message, "leave it out")?;
        let message = "signed scales require a symmetric format";
        let hint = "symmetric = true, or leave it out";
        let signed = self.only_if(quantizer.symmetric, Field::SignedScale, signed, Field::Symmetric, message, hint)?;
        let signed = signed && {
            let by_preset = self.rule(Field::SignedScale).is_none_or(|rule| rule.preset);
            if !self.target.signed_scales && !by_preset {
                let message = format!("{} requires positive scales", self.target.name);
                return self.wrong(Field::SignedScale, message, "leave it out");
            }
            self.target.signed_scales
        };
        if signed {
            let narrow = spec.narrow_range == Some(true);
            if narrow && self.asked(Field::NarrowRange, Field::SignedScale) {
                let message = "signed scales exist to use the lowest integer";
                return self.wrong(Field::NarrowRange, message, "leave it out, or signed_scale = false");
            }
            quantizer.narrow_range = false;
        }
        quantizer.signed_scale = signed;
        let arithmetic = spec.arithmetic.unwrap_or_default();
        let other = arithmetic != Arithmetic::Onnx;
        let message = format!("{format} is computed as ONNX defines it");
        if !self.only_if(bytes, Field::Arithmetic, other, Field::Dtype, &message, "it is for integers of 8 bits")? {
            return Ok(());
        }
        if arithmetic.is_between() {
            self.tinygemm(quantizer)?;
        }
        if quantizer.round != Round::HalfEven {
            if self.asked(Field::Round, Field::Arithmetic) {
                let message = "the chosen arithmetic has its own rounding";
                return self.wrong(Field::Round, message, "leave it out, or arithmetic = \"onnx\"");
            }
            quantizer.round = Round::HalfEven;
        }
        quantizer.arithmetic = arithmetic;
        Ok(())
    }

    /// torchao's arithmetic with fractional zero points leaves nothing else to choose.
    fn tinygemm(&self, quantizer: &Scheme) -> Outcome<()> {
        let message = "fractional zero points require asymmetric uint2 or uint4";
        let wrong = |message: &str| {
            self.wrong(
                Field::Arithmetic,
                message,
                "dtype = \"uint4\" with symmetric = false, or arithmetic = \"torch\"",
            )
        };
        if quantizer.symmetric || !matches!(quantizer.dtype, Format::Uint2 | Format::Uint4) {
            return wrong(message);
        }
        let other = quantizer.observer != ObserverKind::Minmax
            || quantizer.postprocess.is_some()
            || quantizer.scale_type != crate::config::spec::ScaleType::Float
            || quantizer.narrow_range
            || quantizer.reduce_range;
        if other {
            return wrong("this arithmetic always takes its scales from minimum and maximum");
        }
        Ok(())
    }

    fn granularity(&self, shape: &Shape<'_>) -> Outcome<Granularity> {
        let Shape { dims, layout, kernel } = shape;
        let spec = self.spec();
        let block = spec.dtype.and_then(Dtype::block);
        if let Some(block) = block {
            if spec.granularity.is_some_and(|s| s != Share::PerGroup) && self.asked(Field::Granularity, Field::Dtype) {
                let message = "block formats have one scale per block";
                return self.wrong(Field::Granularity, message, "leave it out: it follows from the format");
            }
            self.block_size(block)?;
        }
        let share = if block.is_some() { Share::PerGroup } else { spec.granularity.unwrap_or(Share::PerTensor) };
        if spec.scale_dtype.is_some_and(ScaleDtype::is_block)
            && share != Share::PerGroup
            && (self.asked(Field::ScaleDtype, Field::Granularity) || block.is_none())
        {
            let hint = "add granularity = \"per-group\" and a group_size";
            return self.wrong(Field::ScaleDtype, "8-bit scales require granularity = \"per-group\"", hint);
        }
        if spec.ch_axis.is_some() && share == Share::PerTensor && self.asked(Field::ChAxis, Field::Granularity) {
            return self.wrong(
                Field::ChAxis,
                "one scale for a tensor has no axis",
                "add granularity = \"per-channel\"",
            );
        }
        if spec.group_size.is_some() && share != Share::PerGroup && self.asked(Field::GroupSize, Field::Granularity) {
            let hint = "add granularity = \"per-group\"";
            return self.wrong(Field::GroupSize, "only per-group scales have a group size", hint);
        }
        // An axis given for another granularity says nothing about this one.
        let asked_axis = spec.ch_axis.filter(|_| block.is_some() || self.asked(Field::ChAxis, Field::Granularity));
        let axis = asked_axis.and_then(|axis| axis_in(axis, dims.len()));
        if let (Some(asked), None) = (asked_axis, axis) {
            let why = Reason::NoAxis { axis: asked, dims: dims.to_vec() };
            return self.unfit(Field::ChAxis, why, "leave it out to take the operator's own axis");
        }
        match share {
            Share::PerToken => self.wrong(Field::Granularity, "a weight has no tokens", "per-channel is the nearest"),
            Share::PerTensor => Ok(Granularity::PerTensor),
            Share::PerChannel => match (axis, layout.channel_axis) {
                (Some(axis), Some(own)) if axis != own && *kernel => {
                    let why = Reason::FixedAxis { target: self.target.name.clone(), axis: own };
                    self.unfit(Field::ChAxis, why, &format!("leave it out, or ch_axis = {own}"))
                }
                (Some(axis), Some(_)) | (None, Some(axis)) => Ok(Granularity::PerChannel { axis }),
                // The operator has no axis of its own: one scale for all, unless an axis is asked for and nobody minds.
                (Some(axis), None) if !kernel => Ok(Granularity::PerChannel { axis }),
                (Some(_), None) => {
                    let why = Reason::OneScale { target: self.target.name.clone() };
                    self.unfit(Field::ChAxis, why, "granularity = \"per-tensor\"")
                }
                (None, None) => Ok(Granularity::PerTensor),
            },
            Share::PerGroup => {
                let Some(size) = block.map(Block::size).or(spec.group_size) else {
                    let hint = "32 is usual for 4 bits";
                    return self.wrong(Field::Granularity, "per-group scales need a group_size", hint);
                };
                let Some(axis) = axis.or(layout.group_axis) else {
                    return self.unfit(Field::Granularity, Reason::NoGroups, "per-channel is the nearest");
                };
                let (size, extent) = (size as usize, dims[axis]);
                if size == 0 {
                    return self.wrong(Field::GroupSize, "a group has at least one element", "32 is usual for 4 bits");
                }
                // Rules about all layers or an operator let the last group be shorter, as ONNX does: one of many shapes
                // is no reason to refuse the model.
                let exact = block.is_none()
                    && self.rule(Field::GroupSize).is_some_and(|r| matches!(r.scope, Scope::Name(_)) && r.is_named());
                if exact && !extent.is_multiple_of(size) {
                    let message = format!("groups of {size} do not divide the {extent} values along axis {axis}");
                    let hint = match (8..=256).rev().find(|s| extent.is_multiple_of(*s) && s.is_power_of_two()) {
                        Some(fits) => format!("group_size = {fits} does"),
                        None => "leave the layer in float, or use per-channel scales".to_owned(),
                    };
                    return self.wrong(Field::GroupSize, message, &hint);
                }
                Ok(Granularity::PerGroup { axis, size })
            }
        }
    }

    /// Whether a bias is stored as int32.
    pub(super) fn bias(&self) -> Outcome<bool> {
        let spec = self.spec();
        let others = Field::ALL.iter().filter(|f| !matches!(f, Field::Enable | Field::Dtype));
        for &field in others {
            if spec.written(field).is_some() {
                let message = "the scale of a bias is that of the products that it is added to";
                return self.wrong(field, message, "only enable can be set for a bias");
            }
        }
        if spec.dtype.is_some_and(|d| d != Dtype::Element(Format::Int32)) {
            let message = "a bias is int32, as the products that it is added to";
            return self.wrong(Field::Dtype, message, "leave it out, or enable = false for a float bias");
        }
        Ok(!self.resolved.is_off())
    }
}
