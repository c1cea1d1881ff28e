//! ModelOpt's `quant_cfg`, as an ordered list or as a table, and the algorithm beside it.
//!
//! Entries apply in order. A `cfg` replaces every field of an earlier entry, so each one is written in full here;
//! `enable` alone leaves the fields as they are.

use super::json::{At, Json};
use super::{Imported, names};
use crate::config::spec::{Block, Dtype, ObserverKind, Share};
use crate::config::{Config, Layer, Level, SiteKind, Spec};
use crate::error::Result;
use crate::numerics::Format;
use crate::quant::algorithm::{Algorithm, Method};

/// Operators of the modules whose inputs ModelOpt quantizes if no class is named.
const INPUTS: &[&str] = &["AveragePool", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool"];
/// The same for weights.
const WEIGHTS: &[&str] = &["Conv", "ConvTranspose", "Gemm", "MatMul"];
/// The same for weights in groups along the summed axis.
const GROUPED: &[&str] = &["Gemm", "MatMul"];

/// Fields of a `cfg` that do not change what is computed.
const NEUTRAL: &[&str] = &[
    "fake_quant",
    "effective_bits",
    "learn_amax",
    "pass_through_bwd",
    "trt_high_precision_dtype",
    "backend_extra_args",
];

/// Fields that have no counterpart, with the values that mean nothing.
const REFUSED: &[(&str, &[Json])] = &[
    ("unsigned", &[Json::Bool(false)]),
    ("rotate", &[Json::Bool(false)]),
    ("use_constant_amax", &[Json::Bool(false)]),
    ("constant_amax", &[]),
    ("bias", &[]),
    ("backend", &[]),
];

/// One entry, in either form.
struct Entry<'a> {
    at: At<'a>,
    pattern: &'a str,
    class: Option<(&'a str, At<'a>)>,
    cfg: Option<At<'a>>,
    enable: Option<bool>,
}

/// Whether this is a `quant_cfg` without the document around it.
pub(super) fn is_bare(root: &At<'_>) -> bool {
    match root.json {
        Json::List(items) => items.iter().all(|item| matches!(item, Json::Table(_))),
        Json::Table(entries) => !entries.is_empty() && entries.iter().all(|(key, _)| is_key(key)),
        _ => false,
    }
}

/// Whether a key of the table form can be one.
fn is_key(key: &str) -> bool {
    key == "default" || key.starts_with("nn.") || key.contains(['*', '.']) || key.ends_with("quantizer")
}

pub(super) fn convert(root: &At<'_>) -> Result<Imported> {
    let mut out = Out::default();
    let list = match root.get("quant_cfg") {
        Some(list) => {
            root.only(&["quant_cfg", "algorithm", "effective_bits"])?;
            list
        }
        None => root.clone(),
    };
    out.note("Later layers override earlier ones, and each writes out everything that ModelOpt's own defaults would fill in.");
    let entries = entries(&list)?;
    if list.get("default").is_some() {
        out.note(
            "default is applied first, as ModelOpt did when this format was current; later versions apply it in place.",
        );
    }
    let all_off = entries.first().is_some_and(|e| e.pattern == "*" && e.class.is_none() && e.enable == Some(false));
    let bare = |entry: &Entry<'_>| entry.cfg.is_none() && entry.enable == Some(true);
    if !all_off || entries.iter().any(bare) {
        out.modules();
    }
    for entry in &entries {
        out.entry(entry)?;
    }
    if let Some(algorithm) = root.get("algorithm") {
        out.config.algorithm = Some(out.algorithm(&algorithm)?);
    } else if root.has("algorithm") {
        out.config.algorithm = Some(Algorithm::new(Method::None));
    }
    Ok(Imported { config: out.config, from: "quant_cfg of ModelOpt", notes: out.notes })
}

/// The entries of both forms.
fn entries<'a>(list: &At<'a>) -> Result<Vec<Entry<'a>>> {
    let mut found = Vec::new();
    if let Json::List(_) = list.json {
        for item in list.items()? {
            if item.has("quantizer_name") {
                found.push(listed(item)?);
            } else {
                for (key, value) in item.entries()? {
                    keyed(key, value, &mut found)?;
                }
            }
        }
        return Ok(found);
    }
    // While the table form was current, ModelOpt applied `default` first, wherever it stands.
    let mut entries = list.entries()?;
    entries.sort_by_key(|(key, _)| *key != "default");
    for (key, value) in entries {
        keyed(key, value, &mut found)?;
    }
    Ok(found)
}

/// An entry with a `quantizer_name`.
fn listed(item: At<'_>) -> Result<Entry<'_>> {
    item.only(&["quantizer_name", "parent_class", "cfg", "enable"])?;
    let name = item.get("quantizer_name").ok_or_else(|| item.wrong("quantizer_name is a pattern"))?;
    let class = item.get("parent_class").map(|at| at.text().map(|class| (class, at.clone()))).transpose()?;
    let enable = item.get("enable").map(|at| at.bool()).transpose()?;
    let cfg = item.get("cfg").filter(|cfg| !(is_empty(cfg.json) && enable == Some(false)));
    if cfg.is_none() && enable.is_none() {
        return Err(item.wrong("both cfg and enable are missing").with_hint("ModelOpt refuses this, too"));
    }
    Ok(Entry { pattern: name.text()?, class, cfg, enable, at: item })
}

/// Entries under a key of the table form; those of a class are one deeper.
fn keyed<'a>(key: &'a str, value: At<'a>, found: &mut Vec<Entry<'a>>) -> Result<()> {
    if key.starts_with("nn.") {
        for (pattern, inner) in value.entries()? {
            found.push(Entry { class: Some((key, value.clone())), ..plain(pattern, inner)? });
        }
        return Ok(());
    }
    if !is_key(key) {
        return Err(value.wrong("this is not a pattern for quantizers"));
    }
    found.push(plain(if key == "default" { "*" } else { key }, value)?);
    Ok(())
}

fn plain<'a>(pattern: &'a str, value: At<'a>) -> Result<Entry<'a>> {
    let enable = value.get("enable").map(|at| at.bool()).transpose()?;
    let alone = matches!(value.json, Json::Table(entries) if entries.iter().all(|(k, _)| k == "enable"));
    if alone && enable.is_none() {
        return Err(value.wrong("this entry sets nothing").with_hint("give enable, or fields such as num_bits"));
    }
    Ok(Entry { pattern, class: None, cfg: (!alone).then(|| value.clone()), enable, at: value })
}

fn is_empty(json: &Json) -> bool {
    match json {
        Json::Table(entries) => entries.is_empty(),
        Json::List(items) => items.iter().all(is_empty),
        _ => false,
    }
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

    /// What quantizers are before any entry: 8 bits, those of results off.
    fn modules(&mut self) {
        let off = Some(Spec { enable: Some(false), ..Spec::default() });
        self.config.default = Some(Level { input: off.clone(), output: off.clone(), weight: off, ..Level::default() });
        for (kind, share, ops) in [
            (SiteKind::Weight, Share::PerChannel, WEIGHTS),
            (SiteKind::Input, Share::PerTensor, INPUTS),
            (SiteKind::Output, Share::PerTensor, INPUTS),
        ] {
            let mut level = Level::default();
            *level.spec_mut(kind) = Spec {
                enable: Some(kind != SiteKind::Output),
                dtype: Some(Dtype::Element(Format::Int8)),
                granularity: Some(share),
                symmetric: Some(true),
                narrow_range: Some(true),
                dynamic: (kind != SiteKind::Weight).then_some(false),
                ..Spec::default()
            };
            let ops = ops.iter().map(|op| (*op).to_owned()).collect();
            self.push(&format!("*{}_quantizer", kind.name()), ops, level, true);
        }
        self.note("The first layers are the defaults of ModelOpt before any entry.");
    }

    fn entry(&mut self, entry: &Entry<'_>) -> Result<()> {
        let Entry { at, pattern, class, cfg, enable } = entry;
        if let Some(cfg) = cfg {
            if matches!(cfg.json, Json::List(_)) {
                return Err(cfg
                    .wrong("several quantizers in sequence have no counterpart: a site has one format")
                    .with_hint("keep the first of them; INT4 before FP8 is the preset W4A8_AWQ_BETA_CFG"));
            }
            if is_empty(cfg.json) {
                return Err(cfg.wrong("cfg is empty").with_hint("leave it out and set enable"));
            }
        }
        let enable = match cfg.as_ref().and_then(|cfg| cfg.get("enable")) {
            Some(inner) => inner.bool()? && *enable != Some(false),
            None => enable.unwrap_or(true),
        };
        let Some((kinds, kind)) = self.kinds(entry, enable)? else { return Ok(()) };
        let mut ops: Vec<String> = Vec::new();
        if let Some((name, at)) = class {
            let Some(found) = names::operators(name) else {
                return Err(at.wrong(format!("unknown class \"{name}\"")).with_hint(names::CLASSES));
            };
            if found.is_empty() && enable {
                return Err(at.wrong(format!("{name} has nothing to quantize in ONNX")));
            }
            if found.is_empty() {
                self.note(format!("Left out: {} for {name}, which is fused or has nothing to quantize.", at.path()));
                return Ok(());
            }
            if name.contains("Conv") || name.contains("Pool") {
                self.note(format!("{name} became {}, which covers 1, 2 and 3 dimensions in ONNX.", found[0]));
            }
            ops = found.iter().map(|op| (*op).to_owned()).collect();
        }
        let pattern = names::quantizers(pattern, kind);
        if cfg.is_none() && !enable {
            self.push(&pattern, ops, off(&kinds), true);
            return Ok(());
        }
        for kind in kinds {
            let spec = match cfg {
                Some(cfg) => self.spec(cfg, kind, class.as_ref().map(|(name, _)| *name), enable)?,
                None => Spec { enable: Some(enable), ..Spec::default() },
            };
            let mut level = Level::default();
            let ops = if class.is_some() { ops.clone() } else { self.default_ops(&spec, kind, at) };
            *level.spec_mut(kind) = spec;
            self.push(&pattern, ops, level, !enable);
        }
        Ok(())
    }

    /// The kinds of sites that a pattern means, and the one in which it ends; `None` where it means nothing here.
    fn kinds<'a>(&mut self, entry: &Entry<'a>, enable: bool) -> Result<Option<(Vec<SiteKind>, Option<&'a str>)>> {
        let pattern = entry.pattern;
        let data = [SiteKind::Input, SiteKind::Output, SiteKind::Weight];
        if pattern.ends_with('*') && !pattern.contains("quantizer") {
            return Ok(Some((data.to_vec(), None)));
        }
        for kind in data {
            if pattern.ends_with(&format!("{}_quantizer", kind.name())) {
                return Ok(Some((vec![kind], Some(kind.name()))));
            }
        }
        if !enable {
            self.note(format!(
                "Left out: {}, which disables quantizers that amax does not have (\"{pattern}\").",
                entry.at.path()
            ));
            return Ok(None);
        }
        Err(entry.at.wrong(format!("\"{pattern}\" matches quantizers that amax does not have")).with_hint(
            "patterns end in weight_quantizer, input_quantizer, output_quantizer, or in * after the name of a module",
        ))
    }

    /// Operators that have such quantizers in ModelOpt, where an entry names no class.
    fn default_ops(&mut self, spec: &Spec, kind: SiteKind, at: &At<'_>) -> Vec<String> {
        if spec.enable != Some(true) {
            return Vec::new();
        }
        let ops = match kind {
            SiteKind::Weight if spec.granularity == Some(Share::PerGroup) => {
                self.note(format!("{}: groups are for Gemm and MatMul only.", at.path()));
                GROUPED
            }
            SiteKind::Weight => WEIGHTS,
            _ => INPUTS,
        };
        self.note(
            "ModelOpt has quantizers in modules only, so layers that enable something list the operators of modules. Here a product of two activations is a MatMul like any other; in ModelOpt it has quantizers of its own.",
        );
        ops.iter().map(|op| (*op).to_owned()).collect()
    }

    fn push(&mut self, pattern: &str, op_type: Vec<String>, level: Level, optional: bool) {
        let Level { enable, input, output, weight, bias, algorithm } = level;
        self.config.layer.push(Layer {
            pattern: pattern.to_owned(),
            op_type,
            optional,
            enable,
            input,
            output,
            weight,
            bias,
            algorithm,
        });
    }

    /// A `cfg` with every field that ModelOpt would fill in.
    fn spec(&mut self, cfg: &At<'_>, kind: SiteKind, class: Option<&str>, enable: bool) -> Result<Spec> {
        let mut known = vec!["enable", "num_bits", "axis", "block_sizes", "narrow_range", "type", "calibrator"];
        known.extend(NEUTRAL);
        known.extend(REFUSED.iter().map(|(key, _)| *key));
        cfg.only(&known)?;
        for (key, harmless) in REFUSED {
            if let Some(at) = cfg.get(key).filter(|at| !harmless.contains(at.json)) {
                return Err(at.wrong("this has no counterpart"));
            }
        }
        for key in NEUTRAL.iter().filter(|key| cfg.get(key).is_some()) {
            self.note(format!("Left out: {key}, which does not change the result."));
        }
        let mut spec = Spec { enable: Some(enable), ..Spec::default() };
        let blocks = cfg.get("block_sizes");
        spec.dtype = Some(dtype(cfg.get("num_bits").as_ref(), blocks.as_ref())?);
        if let (Some(_), Some(at)) = (cfg.get("axis"), &blocks) {
            return Err(at.wrong("axis is given, too; ModelOpt refuses this"));
        }
        self.share(&mut spec, cfg, blocks.as_ref(), kind, class)?;
        let dynamic = match cfg.get("type") {
            Some(at) => at.word(&[("static", false), ("dynamic", true)])?,
            None => spec.dynamic == Some(true),
        };
        spec.dynamic = (kind != SiteKind::Weight).then_some(dynamic);
        if spec.dtype.and_then(Dtype::element).is_some_and(Format::is_integer) {
            // amax / 127 whatever `narrow_range` says there; quantizers saturate at the lowest code either way.
            spec.symmetric = Some(true);
            spec.narrow_range = Some(true);
            self.note(
                "narrow_range = true: ModelOpt's scale is amax / 127 (amax / 7 for 4 bits) whatever its own narrow_range is.",
            );
        }
        let observer = match cfg.get("calibrator") {
            Some(at) => at.word(&[("max", ObserverKind::Minmax), ("histogram", ObserverKind::Entropy)])?,
            None => ObserverKind::Minmax,
        };
        if observer == ObserverKind::Entropy {
            self.note("calibrator = \"histogram\" became the entropy observer, ModelOpt's default for it.");
        }
        spec.observer = (spec.dynamic != Some(true) || observer != ObserverKind::Minmax).then_some(observer);
        Ok(spec)
    }

    /// Which elements share a scale.
    fn share(
        &mut self,
        spec: &mut Spec,
        cfg: &At<'_>,
        blocks: Option<&At<'_>>,
        kind: SiteKind,
        class: Option<&str>,
    ) -> Result<()> {
        if spec.dtype.is_some_and(|dtype| dtype.block().is_some()) {
            return Ok(());
        }
        if let Some(at) = blocks {
            let size = block_size(at)?;
            match (kind, size) {
                (SiteKind::Weight, Some(size)) => {
                    spec.granularity = Some(Share::PerGroup);
                    spec.group_size = Some(size);
                }
                (SiteKind::Weight, None) => spec.granularity = Some(Share::PerChannel),
                (_, None) => {
                    spec.granularity = Some(Share::PerToken);
                    spec.dynamic = Some(true);
                }
                (_, Some(_)) => {
                    return Err(at.wrong("activations have no groups").with_hint("per token is {\"-1\": null}"));
                }
            }
            return Ok(());
        }
        let Some(at) = cfg.get("axis") else {
            spec.granularity = Some(Share::PerTensor);
            return Ok(());
        };
        if matches!(at.json, Json::List(_)) {
            return Err(at.wrong("scales along several axes have no counterpart"));
        }
        let axis = at.integer()?;
        spec.granularity = Some(Share::PerChannel);
        if kind != SiteKind::Weight {
            spec.ch_axis = Some(axis);
            return Ok(());
        }
        let transposed = class.is_some_and(|class| class.contains("ConvTranspose"));
        if axis != i64::from(transposed) {
            return Err(at
                .wrong("this is not the axis of a weight's output channels in PyTorch; other axes differ in ONNX")
                .with_hint("set granularity = \"per-channel\" and ch_axis yourself"));
        }
        if !transposed {
            self.note(
                "axis = 0 of a weight became per-channel without ch_axis: output channels, on whichever axis ONNX has them.",
            );
        }
        Ok(())
    }

    fn algorithm(&mut self, at: &At<'_>) -> Result<Algorithm> {
        let methods = [
            ("max", Method::Max),
            ("smoothquant", Method::SmoothQuant),
            ("awq_lite", Method::AwqLite),
            ("awq_clip", Method::AwqClip),
            ("awq_full", Method::AwqFull),
            ("awq", Method::AwqFull),
            ("gptq", Method::Gptq),
        ];
        if matches!(at.json, Json::List(_)) {
            return Err(at.wrong("several algorithms have no counterpart").with_hint("keep one of them"));
        }
        let method = match at.json {
            Json::Text(_) => at.word(&methods)?,
            _ => match at.get("method") {
                Some(method) => method.word(&methods)?,
                None if at.has("method") => Method::None,
                None => return Err(at.wrong("method is missing")),
            },
        };
        let lite = matches!(method, Method::AwqLite | Method::AwqFull);
        let clip = matches!(method, Method::AwqClip | Method::AwqFull);
        // ModelOpt's own defaults, which need not be ours.
        let mut found = Algorithm {
            alpha: (method == Method::SmoothQuant).then_some(1.0),
            alpha_step: lite.then_some(0.1),
            min_clip_ratio: clip.then_some(0.5),
            shrink_step: clip.then_some(0.05),
            damp: (method == Method::Gptq).then_some(0.01),
            block_size: (method == Method::Gptq).then_some(128),
            ..Algorithm::new(method)
        };
        let Json::Table(_) = at.json else { return Ok(found) };
        for (key, value) in at.entries()? {
            if *value.json == Json::Null {
                continue;
            }
            let count = || value.integer().map(|n| u32::try_from(n).unwrap_or(0));
            match key {
                "method" => {}
                "alpha" => found.alpha = Some(value.number()?),
                "alpha_step" => found.alpha_step = Some(value.number()?),
                "min_clip_ratio" => found.min_clip_ratio = Some(value.number()?),
                "shrink_step" => found.shrink_step = Some(value.number()?),
                "perc_damp" => found.damp = Some(value.number()?),
                "max_co_batch_size" => found.max_co_batch_size = Some(count()?),
                "block_size" => found.block_size = Some(count()?),
                "debug" | "fused" | "distributed_sync" | "skip_forward_without_activation_calib" => {
                    self.note(format!("Left out: {}, which does not change the result.", value.path()));
                }
                "layerwise" | "use_sequential" => {
                    self.note(format!("Left out: {}, which is about running in PyTorch.", value.path()));
                }
                _ => return Err(value.wrong(format!("this has no counterpart in \"{}\"", method.name()))),
            }
        }
        found.validate().map_err(|e| at.wrong(e.message()))?;
        Ok(found)
    }
}

/// Switches data sites off; without a kind at the end of the pattern, nodes altogether.
fn off(kinds: &[SiteKind]) -> Level {
    let mut level = Level::default();
    for &kind in kinds {
        level.spec_mut(kind).enable = Some(false);
    }
    level
}

/// The number format of `num_bits`.
fn dtype(bits: Option<&At<'_>>, blocks: Option<&At<'_>>) -> Result<Dtype> {
    let scale = blocks.and_then(|b| b.get("scale_bits"));
    let Some(at) = bits else { return Ok(Dtype::Element(Format::Int8)) };
    let refused = || at.wrong("unknown format").with_hint("use 2, 4, 8, 16, [4, 3], [5, 2] or [2, 1]");
    // Integers have a sign and all other bits behind it.
    let pair = match at.json {
        Json::Number(_) => (0, at.integer()?),
        Json::Text(_) => at.word(&[
            ("e4m3", (4, 3)),
            ("e5m2", (5, 2)),
            ("e3m2", (3, 2)),
            ("e2m3", (2, 3)),
            ("e2m1", (2, 1)),
            ("(4, 3)", (4, 3)),
            ("(5, 2)", (5, 2)),
            ("(3, 2)", (3, 2)),
            ("(2, 3)", (2, 3)),
            ("(2, 1)", (2, 1)),
        ])?,
        _ => pair(at)?,
    };
    let Some(scale) = scale else {
        return match pair {
            (0, 2) => Ok(Dtype::Element(Format::Int2)),
            (0, 4) => Ok(Dtype::Element(Format::Int4)),
            (0, 8) => Ok(Dtype::Element(Format::Int8)),
            (0, 16) => Ok(Dtype::Element(Format::Int16)),
            (4, 3) => Ok(Dtype::Element(Format::Float8e4m3fn)),
            (5, 2) => Ok(Dtype::Element(Format::Float8e5m2)),
            (3, 2) => Ok(Dtype::Element(Format::Float6e3m2)),
            (2, 3) => Ok(Dtype::Element(Format::Float6e2m3)),
            (2, 1) => Ok(Dtype::Element(Format::Float4e2m1)),
            _ => Err(refused()),
        };
    };
    let scale_pair = match scale.json {
        Json::Text(_) => scale.word(&[("e4m3", (4, 3)), ("e8m0", (8, 0))])?,
        _ => self::pair(&scale)?,
    };
    let size = match blocks {
        Some(blocks) => block_size(blocks)?,
        None => None,
    };
    match (pair, scale_pair, size) {
        ((2, 1), (4, 3), Some(16)) => Ok(Dtype::Block(Block::Nvfp4)),
        ((2, 1), (8, 0), Some(32)) => Ok(Dtype::Block(Block::Mxfp4)),
        ((2, 3), (8, 0), Some(32)) => Ok(Dtype::Block(Block::Mxfp6e2m3)),
        ((3, 2), (8, 0), Some(32)) => Ok(Dtype::Block(Block::Mxfp6e3m2)),
        ((4, 3), (8, 0), Some(32)) => Ok(Dtype::Block(Block::Mxfp8)),
        ((5, 2), (8, 0), Some(32)) => Ok(Dtype::Block(Block::Mxfp8e5m2)),
        ((0, 8), (8, 0), Some(32)) => Ok(Dtype::Block(Block::Mxint8)),
        _ => Err(scale
            .wrong("this block format has no counterpart")
            .with_hint("use blocks of 16 with e4m3 scales (nvfp4) or of 32 with e8m0 scales (mx)")),
    }
}

fn pair(at: &At<'_>) -> Result<(i64, i64)> {
    match at.items()?.as_slice() {
        [a, b] => Ok((a.integer()?, b.integer()?)),
        _ => Err(at.wrong("expected the bits of exponent and mantissa")),
    }
}

/// The size of the blocks along the last axis; `None` for the whole axis.
fn block_size(at: &At<'_>) -> Result<Option<u32>> {
    if let Some((_, other)) = at.entries()?.into_iter().find(|(key, _)| *key != "-1" && key.parse::<i64>().is_ok()) {
        return Err(other.wrong("only blocks along the last axis have a counterpart").with_hint("the last is \"-1\""));
    }
    at.only(&["-1", "type", "scale_bits", "scale_block_sizes"])?;
    if let Some(twice) = at.get("scale_block_sizes") {
        return Err(twice.wrong("blocks of scales have no counterpart"));
    }
    if !at.has("-1") {
        return Err(at.wrong("the size of the blocks, \"-1\", is missing"));
    }
    let Some(size) = at.get("-1") else { return Ok(None) };
    match u32::try_from(size.integer()?) {
        Ok(n) if n > 0 => Ok(Some(n)),
        _ => Err(size.wrong("a block has at least one element")),
    }
}
