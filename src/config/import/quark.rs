//! Quark's exported configuration.
//!
//! Excluded names first, then layers by name, then by type, then the global configuration. A tensor that a level leaves out
//! (`null`) is inherited from the level above, as Quark documents it; its newer code takes the first configuration that
//! matches whole instead.

use super::json::{At, Json};
use super::{Imported, names};
use crate::config::spec::{Block, Dtype, Format, ObserverKind, ScaleDtype, ScaleType, Share};
use crate::config::{Config, Layer, Level, SiteKind, Spec};
use crate::error::Result;
use crate::numerics::{MxRounding, Round};
use crate::quant::algorithm::{Algorithm, Method};

/// Quark's names of the kinds of sites.
const KINDS: [(&str, SiteKind); 4] = [
    ("input_tensors", SiteKind::Input),
    ("output_tensors", SiteKind::Output),
    ("weight", SiteKind::Weight),
    ("bias", SiteKind::Bias),
];

/// Operators of the layers that the global configuration is for.
const GLOBAL: [&str; 4] = ["Conv", "ConvTranspose", "Gemm", "MatMul"];

/// Operators of the modules that can be named.
const LAYERS: [&str; 5] = ["Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"];

/// Keys about how the document was made or stored, not about what is computed.
const NEUTRAL: &[&str] = &[
    "quant_method",
    "quant_mode",
    "version",
    "export",
    "log_severity_level",
    "kv_cache_post_rope",
    "kv_cache_group",
    "min_kv_scale",
    "pack_method",
    "shared_scale_groups",
    "sync_moe_expert_input_amax",
    "keep_prequantized_layers",
];

pub(super) fn convert(root: &At<'_>) -> Result<Imported> {
    let mut known = vec![
        "global_quant_config",
        "layer_type_quant_config",
        "layer_quant_config",
        "exclude",
        "algo_config",
        "pre_quant_opt_config",
        "kv_cache_quant_config",
        "softmax_quant_spec",
    ];
    known.extend(NEUTRAL);
    root.only(&known)?;
    let mut out = Out::default();
    out.note(
        "Where a level of Quark leaves a tensor out (null), it is inherited from the level above, as its documentation says: \
         layer, then layer type, then global. Newer Quark takes the first level that matches whole instead; there, a tensor \
         that is null in it stays float. To have that, add enable = false for it.",
    );
    out.note("Biases that Quark does not mention are stored as the target needs them.");
    let global = root.get("global_quant_config").ok_or_else(|| root.wrong("global_quant_config is missing"))?;
    out.types(&global, root.get("layer_type_quant_config"))?;
    if let Some(layers) = root.get("layer_quant_config") {
        out.layers(&layers)?;
    }
    if let Some(list) = root.get("exclude") {
        for name in list.items()? {
            let name = name.text()?;
            let pattern = match name.strip_suffix(".*") {
                Some(module) => names::nodes(module, true),
                None => names::nodes(name, false),
            };
            out.config.exclude.push(pattern);
        }
        out.note("Excluded names that match nothing are errors here; Quark only counts them.");
    }
    for key in ["algo_config", "pre_quant_opt_config"] {
        let Some(at) = root.get(key) else { continue };
        let list = if matches!(at.json, Json::List(_)) { at.items()? } else { vec![at] };
        for item in list {
            out.algorithm(&item)?;
        }
    }
    if let Some(at) = root.get("softmax_quant_spec") {
        let spec = out.spec(&at, SiteKind::Output)?;
        *out.config.op_type.entry("Softmax".to_owned()).or_default().spec_mut(SiteKind::Output) = spec;
    }
    if let Some(at) = root.get("kv_cache_quant_config").filter(|at| !matches!(at.json, Json::Table(t) if t.is_empty()))
    {
        return Err(at
            .wrong("key and value caches have no counterpart")
            .with_hint("remove it; it is about the runtime's cache, not the graph"));
    }
    for key in NEUTRAL.iter().filter(|key| root.get(key).is_some()) {
        if !["quant_method", "version"].contains(key) {
            out.note(format!("Left out: {key}, which is about how the model was made or stored."));
        }
    }
    Ok(Imported { config: out.config, from: "configuration of Quark", notes: out.notes })
}

#[derive(Default)]
struct Out {
    config: Config,
    notes: Vec<String>,
}

impl Out {
    fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// The levels of everything, and of the operators that Quark quantizes.
    fn types(&mut self, global: &At<'_>, types: Option<At<'_>>) -> Result<()> {
        let off = Some(Spec { enable: Some(false), ..Spec::default() });
        self.config.default = Some(Level { input: off.clone(), output: off.clone(), weight: off, ..Level::default() });
        let global = self.level(global)?;
        for op in GLOBAL {
            self.config.op_type.insert(op.to_owned(), global.clone());
        }
        self.note(
            "Quark's global configuration is for linear layers and convolutions, so it is set for those operators here.",
        );
        let mut seen: Vec<(&str, String)> = Vec::new();
        for (class, at) in types.map(|types| types.entries()).transpose()?.unwrap_or_default() {
            let Some(ops) = names::operators(class) else {
                return Err(at.wrong(format!("unknown layer type \"{class}\"")).with_hint(names::CLASSES));
            };
            if ops.is_empty() {
                return Err(at.wrong(format!("{class} has nothing to quantize in ONNX")));
            }
            if class.contains("Conv") || class.contains("Pool") {
                self.note(format!("{class} became {}, which covers 1, 2 and 3 dimensions in ONNX.", ops[0]));
            }
            let level = self.level(&at)?;
            for op in ops {
                if let Some((_, other)) = seen.iter().find(|(seen, _)| seen == op) {
                    return Err(at.wrong(format!("{class} and {other} are the same operator in ONNX, {op}")));
                }
                seen.push((op, class.to_owned()));
                // Where a type says something about a tensor, the global specification has no part in it.
                let target = self.config.op_type.entry((*op).to_owned()).or_default();
                for (_, kind) in KINDS {
                    if let Some(spec) = level.spec(kind) {
                        *target.spec_mut(kind) = spec.clone();
                    }
                }
            }
        }
        self.config.op_type.retain(|_, level| *level != Level::default());
        Ok(())
    }

    /// Layers by name. In Quark an exact name comes first, then the first matching pattern; here the last one wins.
    fn layers(&mut self, layers: &At<'_>) -> Result<()> {
        let is_pattern = |name: &str| name.contains(['*', '?', '[']);
        let mut entries = layers.entries()?;
        entries.reverse();
        entries.sort_by_key(|(name, _)| !is_pattern(name));
        if entries.iter().filter(|(name, _)| is_pattern(name)).count() > 1 {
            self.note(
                "Quark takes the first layer pattern that matches; here the last one counts, so their order is reversed. A key that a layer leaves out is set again in a separate layer if a weaker one would set something else.",
            );
        }
        for (name, at) in entries {
            let level = self.level(&at)?;
            if level == Level::default() {
                self.note(format!("Left out: {}, which is empty.", at.path()));
                continue;
            }
            let pattern = names::nodes(name, false);
            self.inherit(&pattern, &level);
            self.layer(&pattern, &LAYERS, level);
        }
        Ok(())
    }

    /// Repeats the keys of types that a layer inherits, if a weaker layer that may match the same nodes does not.
    fn inherit(&mut self, pattern: &str, level: &Level) {
        for (_, kind) in KINDS {
            if level.spec(kind).is_some() || !self.config.layer.iter().any(|weaker| weaker.level().spec(kind).is_some())
            {
                continue;
            }
            let mut rest: Vec<&str> = LAYERS.to_vec();
            while let Some(&op) = rest.first() {
                let said = |op: &str| self.config.op_type.get(op).and_then(|level| level.spec(kind)).cloned();
                let spec = said(op);
                let (same, others): (Vec<&str>, Vec<&str>) = rest.iter().partition(|other| said(other) == spec);
                rest = others;
                let mut level = Level::default();
                *level.spec_mut(kind) = spec.unwrap_or(Spec { enable: Some(false), ..Spec::default() });
                self.layer(pattern, &same, level);
                if let Some(layer) = self.config.layer.last_mut() {
                    layer.optional = true;
                }
            }
        }
    }

    fn layer(&mut self, pattern: &str, ops: &[&str], level: Level) {
        let Level { enable, input, output, weight, bias, algorithm } = level;
        self.config.layer.push(Layer {
            pattern: pattern.to_owned(),
            op_type: ops.iter().map(|op| (*op).to_owned()).collect(),
            optional: false,
            enable,
            input,
            output,
            weight,
            bias,
            algorithm,
        });
    }

    fn level(&mut self, at: &At<'_>) -> Result<Level> {
        at.only(&["input_tensors", "output_tensors", "weight", "bias", "target_device"])?;
        if let Some(device) = at.get("target_device") {
            self.note(format!("Left out: {}; name the runtime with target.", device.path()));
        }
        let mut level = Level::default();
        for (key, kind) in KINDS {
            if let Some(at) = at.get(key) {
                *level.spec_mut(kind) = self.spec(&at, kind)?;
            }
        }
        Ok(level)
    }

    fn spec(&mut self, at: &At<'_>, kind: SiteKind) -> Result<Spec> {
        if let Json::List(_) = at.json {
            return Err(at
                .wrong("several specifications in sequence have no counterpart: a site has one format")
                .with_hint("keep the first of them"));
        }
        at.only(&[
            "dtype",
            "is_dynamic",
            "dynamic",
            "qscheme",
            "ch_axis",
            "axis",
            "group_size",
            "block_size",
            "symmetric",
            "round_method",
            "scale_type",
            "scale_format",
            "scale_calculation_mode",
            "mx_element_dtype",
            "observer_cls",
            "is_scale_quant",
            "is_mx_scale_constraint",
            "zero_point_type",
            "qat_spec",
            "enable_buffer_reuse",
            "max_input_numel",
        ])?;
        for (key, harmless) in [
            ("block_size", Json::Null),
            ("is_scale_quant", Json::Bool(false)),
            ("is_mx_scale_constraint", Json::Bool(false)),
            ("zero_point_type", Json::Text("int32".to_owned())),
            ("qat_spec", Json::Null),
        ] {
            if let Some(value) = at.get(key).filter(|value| *value.json != harmless) {
                return Err(value.wrong("this has no counterpart"));
            }
        }
        let dtype = dtype(at)?;
        let mut spec = Spec { enable: Some(true), dtype: Some(dtype), ..Spec::default() };
        let dynamic = at.get("is_dynamic").or_else(|| at.get("dynamic")).map(|at| at.bool()).transpose()?;
        if kind == SiteKind::Output && dynamic == Some(true) {
            return Err(at.wrong("only inputs are quantized at run time").with_hint("is_dynamic = false"));
        }
        spec.dynamic = (kind == SiteKind::Input).then_some(dynamic == Some(true));
        if dtype.block().is_some() {
            // Quark's own default.
            spec.mx_rounding = Some(MxRounding::Even);
            if let Some(mode) = at.get("scale_calculation_mode") {
                spec.mx_rounding = Some(mode.word(&MX_ROUNDING)?);
            }
            if dynamic.is_none() {
                spec.dynamic = None;
            }
            return Ok(spec);
        }
        self.share(&mut spec, at, kind)?;
        spec.symmetric = at.get("symmetric").map(|at| at.bool()).transpose()?;
        if !dtype.format().is_integer() {
            spec.symmetric = None;
        }
        // Everything is said, as a specification replaces that of another level whole.
        spec.round = Some(Round::HalfEven);
        if let Some(at) = at.get("round_method") {
            spec.round = Some(at.word(&[
                ("half_even", Round::HalfEven),
                ("round", Round::HalfAway),
                ("floor", Round::Floor),
            ])?);
            if spec.round == Some(Round::HalfAway) {
                self.note("round_method = \"round\" became half-away.");
            }
        }
        let scales = [
            ("float", (ScaleType::Float, ScaleDtype::Float32)),
            ("pof2", (ScaleType::PowerOfTwo, ScaleDtype::Float32)),
            ("float32", (ScaleType::Float, ScaleDtype::Float32)),
            ("float16", (ScaleType::Float, ScaleDtype::Float16)),
            ("bfloat16", (ScaleType::Float, ScaleDtype::Bfloat16)),
        ];
        spec.scale_type = Some(ScaleType::Float);
        spec.scale_dtype = Some(ScaleDtype::Float32);
        if let Some(at) = at.get("scale_type") {
            let (scale_type, scale_dtype) = at.word(&scales)?;
            spec.scale_type = Some(scale_type);
            spec.scale_dtype = Some(scale_dtype);
        }
        if let Some(at) = at.get("scale_format") {
            spec.scale_dtype = Some(at.word(&[
                ("float32", ScaleDtype::Float32),
                ("fp32", ScaleDtype::Float32),
                ("float16", ScaleDtype::Float16),
                ("fp16", ScaleDtype::Float16),
                ("bfloat16", ScaleDtype::Bfloat16),
                ("bf16", ScaleDtype::Bfloat16),
            ])?);
        }
        spec.observer = (spec.dynamic != Some(true)).then_some(ObserverKind::Minmax);
        if let Some(at) = at.get("observer_cls") {
            self.observer(&mut spec, &at)?;
        }
        Ok(spec)
    }

    fn share(&mut self, spec: &mut Spec, at: &At<'_>, kind: SiteKind) -> Result<()> {
        let Some(scheme) = at.get("qscheme") else { return Ok(()) };
        let words =
            [("per_tensor", Share::PerTensor), ("per_channel", Share::PerChannel), ("per_group", Share::PerGroup)];
        let share = scheme.word(&words)?;
        spec.granularity = Some(share);
        if share == Share::PerTensor {
            return Ok(());
        }
        let axis = at.get("ch_axis").or_else(|| at.get("axis"));
        let Some(axis_at) = axis else { return Err(at.wrong("ch_axis is missing")) };
        let axis = axis_at.integer()?;
        if kind != SiteKind::Weight {
            if share == Share::PerChannel && spec.dynamic == Some(true) && axis != 0 {
                spec.granularity = Some(Share::PerToken);
                self.note(format!("{}: channels of dynamic quantization became tokens.", at.path()));
            } else if share == Share::PerGroup {
                return Err(scheme.wrong("activations have no groups"));
            } else {
                spec.ch_axis = Some(axis);
            }
            return Ok(());
        }
        let (own, name) = if share == Share::PerChannel { ([0, 0], "output") } else { ([1, -1], "input") };
        if !own.contains(&axis) {
            return Err(axis_at
                .wrong(format!(
                    "this is not the axis of a weight's {name} channels in PyTorch; other axes differ in ONNX"
                ))
                .with_hint("set ch_axis yourself"));
        }
        self.note("ch_axis of weights is left out: it is the operator's own axis in ONNX.");
        if share == Share::PerGroup {
            let Some(size) = at.get("group_size") else { return Err(at.wrong("group_size is missing")) };
            match size.integer()? {
                -1 => {
                    spec.granularity = Some(Share::PerChannel);
                    self.note("group_size = -1 became per-channel: one group is the whole axis.");
                }
                given => match u32::try_from(given) {
                    Ok(given) if given > 0 => spec.group_size = Some(given),
                    _ => return Err(size.wrong("a group has at least one element")),
                },
            }
        }
        Ok(())
    }

    fn observer(&mut self, spec: &mut Spec, at: &At<'_>) -> Result<()> {
        let minmax = ObserverKind::Minmax;
        let (observer, pof2) = at.word(&[
            ("PlaceholderObserver", (None, false)),
            ("PerTensorMinMaxObserver", (Some(minmax), false)),
            ("PerChannelMinMaxObserver", (Some(minmax), false)),
            ("PerGroupMinMaxObserver", (Some(minmax), false)),
            ("PerTensorPercentileObserver", (Some(ObserverKind::Percentile), false)),
            ("PerTensorMSEObserver", (Some(ObserverKind::Mse), false)),
            ("PerTensorPowOf2MinMaxObserver", (Some(minmax), true)),
            ("PerChannelPowOf2MinMaxObserver", (Some(minmax), true)),
            ("PerTensorPowOf2MinMSEObserver", (Some(ObserverKind::Mse), true)),
            ("PerChannelPowOf2MinMSEObserver", (Some(ObserverKind::Mse), true)),
        ])?;
        if observer == Some(ObserverKind::Percentile) {
            self.note("Quark does not export the percentile; set percentile if it is not the default.");
        }
        if pof2 {
            spec.scale_type = Some(ScaleType::PowerOfTwo);
        }
        // At run time a tensor has the range of its own minimum and maximum, and nothing is to be said about it.
        if let Some(observer) = observer.filter(|&o| spec.dynamic != Some(true) || o != minmax) {
            spec.observer = Some(observer);
        }
        Ok(())
    }

    fn algorithm(&mut self, at: &At<'_>) -> Result<()> {
        let Some(name) = at.get("name") else { return Err(at.wrong("name is missing")) };
        let method = name.word(&[("smooth", Method::SmoothQuant), ("awq", Method::AwqFull), ("gptq", Method::Gptq)])?;
        let mut found = Algorithm::new(method);
        for (key, value) in at.entries()? {
            if *value.json == Json::Null {
                continue;
            }
            match (key, method) {
                ("name", _) => {}
                ("alpha", Method::SmoothQuant) => found.alpha = Some(value.number()?),
                ("damp_percent", Method::Gptq) => found.damp = Some(value.number()?),
                ("desc_act", Method::Gptq) => found.act_order = Some(value.bool()?),
                ("block_size", Method::Gptq) => {
                    found.block_size =
                        Some(u32::try_from(value.integer()?).map_err(|_| value.wrong("this is not a size"))?);
                }
                ("static_groups", Method::Gptq) if *value.json == Json::Bool(false) => {}
                ("scale_clamp_min", Method::SmoothQuant) => {
                    self.note(format!("Left out: {}.", value.path()));
                }
                ("scaling_layers" | "model_decoder_layers" | "inside_layer_modules" | "embedding_layers", _) => {
                    self.note(format!("Left out: {}, which follows from the graph.", value.path()));
                }
                _ => return Err(value.wrong(format!("this has no counterpart in \"{}\"", method.name()))),
            }
        }
        found.validate().map_err(|e| at.wrong(e.message()))?;
        if method == Method::AwqFull {
            self.note("awq became awq_full: Quark searches scales, then clips.");
        }
        if method == Method::SmoothQuant {
            self.config.pre_quant_opt.push(found);
        } else if self.config.algorithm.is_some() {
            return Err(at.wrong("several algorithms have no counterpart").with_hint("keep one of them"));
        } else {
            self.config.algorithm = Some(found);
        }
        Ok(())
    }
}

/// Elements of blocks of 32 with power-of-two scales.
const MX: [(&str, Dtype); 6] = [
    ("fp8_e4m3", Dtype::Block(Block::Mxfp8)),
    ("fp8_e5m2", Dtype::Block(Block::Mxfp8e5m2)),
    ("fp6_e2m3", Dtype::Block(Block::Mxfp6e2m3)),
    ("fp6_e3m2", Dtype::Block(Block::Mxfp6e3m2)),
    ("fp4", Dtype::Block(Block::Mxfp4)),
    ("int8", Dtype::Block(Block::Mxint8)),
];

/// How Quark rounds their scales.
const MX_ROUNDING: [(&str, MxRounding); 3] =
    [("even", MxRounding::Even), ("floor", MxRounding::Floor), ("ceil", MxRounding::Ceil)];

/// The number format, blocks included.
fn dtype(at: &At<'_>) -> Result<Dtype> {
    let Some(name) = at.get("dtype") else { return Err(at.wrong("dtype is missing")) };
    let e8m0 = at.get("scale_format").is_some_and(|format| matches!(format.json, Json::Text(t) if t == "e8m0"));
    let size = at.get("group_size").map(|size| size.integer()).transpose()?;
    let block = |name: &At<'_>, words: &[(&str, Dtype)]| -> Result<Dtype> {
        if size != Some(32) {
            return Err(at.wrong("block formats have blocks of 32").with_hint("group_size = 32"));
        }
        name.word(words)
    };
    let text = name.text()?;
    if text == "mx" {
        let Some(element) = at.get("mx_element_dtype") else { return Err(at.wrong("mx_element_dtype is missing")) };
        return block(&element, &MX);
    }
    if e8m0 {
        return block(&name, &MX);
    }
    name.word(&[
        ("int2", Dtype::Element(Format::Int2)),
        ("int4", Dtype::Element(Format::Int4)),
        ("uint4", Dtype::Element(Format::Uint4)),
        ("int8", Dtype::Element(Format::Int8)),
        ("uint8", Dtype::Element(Format::Uint8)),
        ("int16", Dtype::Element(Format::Int16)),
        ("uint16", Dtype::Element(Format::Uint16)),
        ("int32", Dtype::Element(Format::Int32)),
        ("fp8_e4m3", Dtype::Element(Format::Float8e4m3fn)),
        ("fp8_e5m2", Dtype::Element(Format::Float8e5m2)),
        ("fp6_e2m3", Dtype::Element(Format::Float6e2m3)),
        ("fp6_e3m2", Dtype::Element(Format::Float6e3m2)),
        ("fp4", Dtype::Element(Format::Float4e2m1)),
    ])
}
