//! What is done with an input of each kind. Each function panics where amax is at fault: it panics itself, blames itself, or
//! gives something that it does not read back.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::LazyLock;

use amax::config::{self, presets};
use amax::error::{Kind, Result};
use amax::ir::{Model, content_hash, file, text};
use amax::passes::recipes::To;
use amax::samples::{Options, SampleSet};
use amax::statistics::{SiteStatistics, Statistics};
use amax::targets::{self, Target};
use amax::{Config, Convert, Plan, Rewrite};
use sha2::{Digest, Sha256};

use super::choices::{Choose, SplitMix};

/// The inputs that models of samples have, as text.
const SAMPLED: [&str; 5] = [
    "float[n,3] x",
    "int64[1,seq] ids, int64[1,seq] mask",
    "float[n,3,h,w] image",
    "uint8[1,6,7,3] image",
    "bool[2] bool, int8[2] int8, float16[2] float16, double[2] double, int64[b,s] input_ids",
];

/// Names of files that samples are read from.
pub const SAMPLE_FILES: [&str; 8] =
    ["s.npz", "s.npy", "s.jsonl", "images/0.png", "images/0.jpg", "s.bin", "input_0.pb", "images/preprocess.toml"];

/// Passes on what amax answered, unless it blames itself.
fn answer<T>(result: Result<T>) -> Option<T> {
    match result {
        Err(error) if error.kind() == Kind::Internal => panic!("blames itself: {error}"),
        result => result.ok(),
    }
}

/// Decisions that follow from an input.
fn decisions(of: &[u8]) -> SplitMix {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    SplitMix(hasher.finish())
}

/// A model in protobuf, through everything that does not run it.
pub fn model(bytes: &[u8]) {
    model_with(bytes, &mut decisions(bytes));
}

/// As [`model`], with these presets, targets and forms.
pub fn model_with(bytes: &[u8], random: &mut impl Choose) {
    answer(exercise(bytes.to_vec(), random));
}

/// Everything that reads a model without running it.
fn exercise(bytes: Vec<u8>, random: &mut impl Choose) -> Result<()> {
    let model = file::from_bytes(bytes)?;
    let saved = file::to_bytes(&model)?;
    assert_eq!(file::to_bytes(&file::from_bytes(saved.clone())?)?, saved, "saved again it is another model");
    let described = (content_hash(&model), text::print(&model), amax::inspect(&model), amax::scales(&model));
    drop(described);
    let presets: Vec<&str> = presets::names().collect();
    let targets: Vec<&str> = targets::names().collect();
    let target = Target::load(targets[random.below(targets.len())])?;
    let done = if random.below(8) < 4 {
        let simulate = random.below(4) == 0;
        let target = if simulate { target.simulated() } else { target };
        let config = presets::load(presets[random.below(presets.len())])?;
        let rewrite = Rewrite::new(&model).config(&config).target(&target);
        let done = if random.below(4) == 0 { rewrite.prepare()? } else { rewrite.run()? };
        done.model
    } else {
        let forms: Vec<To> = (0..random.below(3)).map(|_| To::ALL[random.below(To::ALL.len())]).collect();
        Convert::new(&model).to(&forms).simulate(random.below(4) == 0).target(&target).run()?.model
    };
    again(&done)
}

/// A result is a valid model, in memory and as a file.
fn again(model: &Model) -> Result<()> {
    let bytes = file::to_bytes(model)?;
    let loaded = file::from_bytes(bytes.clone()).unwrap_or_else(|e| panic!("the result is refused: {e}"));
    assert_eq!(file::to_bytes(&loaded)?, bytes, "saved again it is another model");
    Ok(())
}

/// A model in protobuf, calibrated on noise, quantized and compared.
#[cfg(feature = "tract")]
pub fn run(bytes: &[u8]) {
    let ran = || -> Result<()> {
        let model = file::from_bytes(bytes.to_vec())?;
        let samples = SampleSet::random(&model, 2, 0)?;
        let rewrite = Rewrite::new(&model).samples(&samples).threads(1).timeout(std::time::Duration::from_secs(2));
        again(&rewrite.run()?.model)
    };
    answer(ran());
}

/// A small model with Convs and products, and statistics of it.
static SUBJECT: LazyLock<(Model, Statistics)> = LazyLock::new(|| {
    let bytes = include_bytes!("../../models/digits.onnx");
    let model = file::from_bytes(bytes.as_slice()).unwrap_or_else(|e| panic!("{e}"));
    let statistics = observed(&model, &mut |random| (random.below(4001) as f32 - 1500.0) / 500.0);
    (model, statistics)
});

/// Statistics of every tensor that a node of a model makes, of made-up values.
fn observed(model: &Model, sample: &mut dyn FnMut(&mut SplitMix) -> f32) -> Statistics {
    let mut random = SplitMix(7);
    let mut statistics = Statistics::default();
    statistics.model_hash = content_hash(model);
    statistics.samples_hash = "0".repeat(64);
    "every float activation".clone_into(&mut statistics.asked);
    (statistics.sample_count, statistics.sample_total, statistics.ran) = (4, 4, (0..4).collect());
    let graph = model.graph(model.main());
    let made = graph.nodes().iter().flat_map(|&node| model.node(node).outputs()).flatten().copied();
    for value in graph.inputs().chain(made) {
        let mut site = SiteStatistics::new();
        for index in 0..4 {
            let seen: Vec<f32> = (0..64).map(|_| sample(&mut random)).collect();
            site.observe(index, &seen);
        }
        statistics.sites.insert(model.value(value).name().to_owned(), site);
    }
    statistics
}

/// The statistics of the small model, as a file.
pub fn statistics_of_digits() -> Vec<u8> {
    SUBJECT.1.to_bytes()
}

/// The plan of the small model by a preset, for a target.
pub fn plan_of((preset, target): (&str, &str)) -> String {
    let plan = || {
        let (config, target) = (presets::load(preset)?, Target::load(target)?);
        let done = Rewrite::new(&SUBJECT.0).config(&config).target(&target).statistics(&SUBJECT.1).run()?;
        done.plan.as_ref().map_or(Ok(String::new()), Plan::to_json)
    };
    plan().unwrap_or_else(|e| panic!("{e}"))
}

/// Rewrites the small model.
fn rewrite(
    config: Option<&Config>,
    target: Option<&Target>,
    plan: Option<&Plan>,
    statistics: &Statistics,
) -> Result<()> {
    let (model, _) = &*SUBJECT;
    let rewrite = Rewrite::new(model).plan(plan).statistics(statistics);
    let rewrite = if let Some(config) = config { rewrite.config(config) } else { rewrite };
    let rewrite = if let Some(target) = target { rewrite.target(target) } else { rewrite };
    again(&rewrite.run()?.model)
}

/// A model in the text form of ONNX.
pub fn graph_text(source: &str) {
    let Some(model) = answer(text::parse(source)) else { return };
    let printed = text::print(&model);
    if let Ok(again) = text::parse(&printed) {
        assert_eq!(text::print(&again), printed, "printed again it is another text");
    }
    answer(file::to_bytes(&model));
}

/// A configuration.
pub fn configuration(source: &str) {
    let Some(config) = answer(Config::parse(source)) else { return };
    let printed = answer(config.to_toml()).unwrap_or_default();
    let again = Config::parse(&printed).unwrap_or_else(|e| panic!("what is printed is refused: {e}"));
    assert_eq!(again.to_toml().unwrap_or_default(), printed, "printed again it is another configuration");
    answer(rewrite(Some(&config), None, None, &SUBJECT.1));
}

/// A configuration of another tool.
pub fn import(source: &str) {
    if let Some(imported) = answer(config::import::convert(source)) {
        answer(imported.to_toml());
    }
}

/// A profile of a target.
pub fn profile(source: &str) {
    if let Some(target) = answer(Target::parse("profile", source)) {
        answer(rewrite(None, Some(&target), None, &SUBJECT.1));
    }
}

/// A plan, carried out.
pub fn plan(source: &str) {
    let Some(plan) = answer(Plan::parse(source)) else { return };
    let printed = answer(plan.to_json()).unwrap_or_default();
    let again = Plan::parse(&printed).unwrap_or_else(|e| panic!("what is printed is refused: {e}"));
    assert_eq!(again.to_json().unwrap_or_default(), printed, "printed again it is another plan");
    answer(rewrite(None, None, Some(&plan), &SUBJECT.1));
    let generic = Target::load("generic").unwrap_or_else(|e| panic!("{e}"));
    answer(rewrite(None, Some(&generic), Some(&plan), &SUBJECT.1));
}

/// Statistics, whose hash is made right.
pub fn statistics(bytes: &[u8]) {
    let bytes = rehashed(bytes).unwrap_or_else(|| bytes.to_vec());
    let Some(statistics) = answer(Statistics::from_bytes(&bytes)) else { return };
    assert_eq!(statistics.to_bytes(), bytes, "saved again they are other statistics");
    answer(rewrite(None, None, None, &statistics));
}

/// Statistics of values that are anything.
pub fn odd_statistics(random: &mut impl Choose) {
    const ODD: [f32; 12] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        1e-45,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e30,
    ];
    let kept: Vec<f32> = (0..=random.below(3)).map(|_| ODD[random.below(ODD.len())]).collect();
    let found = observed(&SUBJECT.0, &mut |inner| kept[inner.below(kept.len())]);
    let bytes = found.to_bytes();
    let back = Statistics::from_bytes(&bytes).unwrap_or_else(|e| panic!("what is saved is refused: {e}"));
    assert_eq!(back.to_bytes(), bytes, "saved again they are other statistics");
    answer(rewrite(None, None, None, &back));
}

/// Bytes of statistics, whose header says the hash of their data.
fn rehashed(bytes: &[u8]) -> Option<Vec<u8>> {
    let length = usize::try_from(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?)).ok()?;
    let (header, data) = bytes.get(8..)?.split_at_checked(length)?;
    let header = std::str::from_utf8(header).ok()?;
    let at = header.find("\"data_sha256\":\"")? + 15;
    let (before, after) = (header.get(..at)?, header.get(at + 64..)?);
    let header = format!("{before}{:x}{after}", Sha256::digest(data));
    Some([&bytes[..8], header.as_bytes(), data].concat())
}

/// Samples: the bytes of one of [`SAMPLE_FILES`], in `folder`, for one of the models of [`SAMPLED`].
pub fn samples(folder: &Path, name: &str, bytes: &[u8]) {
    let inputs = SAMPLED[decisions(bytes).below(SAMPLED.len())];
    let (first, rest) = inputs.split_once(' ').unwrap_or_default();
    let of = rest.split(',').next().unwrap_or_default();
    let graph =
        format!("<ir_version: 10, opset_import: [\"\" : 21]> g ({inputs}) => ({first} out) {{ out = Identity({of}) }}");
    let model = text::parse(&graph).unwrap_or_else(|e| panic!("{e}"));
    let path = folder.join(name);
    let written = std::fs::create_dir_all(path.parent().unwrap_or(folder)).and_then(|()| std::fs::write(&path, bytes));
    written.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // Of pictures and what belongs to them, the folder is the set.
    let set = if name.contains('/') { folder.join("images") } else { path };
    let mut options = Options::default();
    options.dims.extend([("n".to_owned(), 1), ("seq".to_owned(), 4)]);
    if let Some(set) = answer(SampleSet::open_with(&set, &model, &options)) {
        answer(set.content_hash());
        for index in 0..set.len().min(8) {
            answer(set.get(index));
        }
    }
}
