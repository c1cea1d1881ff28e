//! Models in segments: the same statistics, within a limit.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use amax::error::Kind;
use amax::ir::{Attr, Model, NewNode, Place, Tensor, ValueId, file, tensor_type};
use amax::observe::calibrate::{Checkpoint, Observation, Site, prepare, sites};
use amax::observe::{Estimate, Memory, Progress, Run};
use amax::onnx::{
    DataType, TensorShapeProto, TypeProto, tensor_shape_proto::Dimension, tensor_shape_proto::dimension, type_proto,
};
use amax::runtime::segments::{cut, weights};
use amax::runtime::{Runtime, TractEvaluate};
use amax::samples::SampleSet;
use amax::statistics::{SiteStatistics, Statistics};

use crate::support::{digits, folder, npy, root};

/// Width of the transformer.
const WIDTH: usize = 32;

/// Remembers what it was told, and interrupts after some parts.
#[derive(Default)]
struct Listen {
    told: Mutex<Vec<Estimate>>,
    ticks: AtomicUsize,
    stop_after: Option<usize>,
    /// Where files without names are looked for, and the most that were open at once.
    watched: Option<PathBuf>,
    open: AtomicUsize,
}

/// How many files in `folder` this process has open; `None` where the system does not tell.
fn open_files(folder: &Path) -> Option<usize> {
    let open = std::fs::read_dir("/proc/self/fd").ok()?;
    let links = open.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    Some(links.filter(|file| file.starts_with(folder)).count())
}

impl Progress for Listen {
    fn start(&self, _step: &str, _total: u64) {}
    fn tick(&self) {
        self.ticks.fetch_add(1, Ordering::SeqCst);
        if let Some(open) = self.watched.as_deref().and_then(open_files) {
            self.open.fetch_max(open, Ordering::SeqCst);
        }
    }
    fn finish(&self) {}
    fn interrupted(&self) -> bool {
        self.stop_after.is_some_and(|after| self.ticks.load(Ordering::SeqCst) >= after)
    }
    fn memory(&self, estimate: &Estimate) {
        self.told.lock().unwrap().push(*estimate);
    }
}

/// Numbers around zero that look random.
pub(super) fn noise(seed: usize, count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed as u64 + 1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Writes nodes one after the other.
struct Writer {
    model: Model,
    made: usize,
}

impl Writer {
    fn node(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<amax::onnx::AttributeProto>) -> ValueId {
        self.made += 1;
        let name = format!("t{}_{op}", self.made);
        let new = NewNode::new(op, format!("n{}", self.made), inputs, &[&name]);
        let new = attrs.into_iter().fold(new, NewNode::with);
        let id = self.model.insert(Place::Last(self.model.main()), new);
        self.model.node(id).output(0).unwrap()
    }

    fn constant(&mut self, tensor: Tensor) -> ValueId {
        self.made += 1;
        self.model.add_initializer(self.model.main(), &format!("c{}", self.made), tensor)
    }

    fn weight(&mut self, dims: &[usize]) -> ValueId {
        let count: usize = dims.iter().product();
        let scale = 1.5 / (dims[0] as f32).sqrt();
        let values: Vec<f32> = noise(self.made, count).into_iter().map(|v| v * scale).collect();
        self.constant(Tensor::from_f32(dims, &values))
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.constant(Tensor::from_i64(&[values.len()], values))
    }
}

/// Blocks of attention and MLP over sequences of any length. The shape of the heads is computed once, and every block
/// reads it.
#[allow(clippy::many_single_char_names, reason = "as papers call them")]
fn transformer(blocks: usize) -> Model {
    let mut model = Model::new("transformer", 8, 17);
    let main = model.main();
    let size = |n: usize| Dimension { value: Some(dimension::Value::DimValue(n as i64)), ..Dimension::default() };
    let length = Dimension { value: Some(dimension::Value::DimParam("length".into())), ..Dimension::default() };
    let shape = TensorShapeProto { dim: vec![size(1), length, size(WIDTH)] };
    let ty = type_proto::Tensor { elem_type: Some(DataType::Float.code()), shape: Some(shape) };
    let ty = TypeProto { value: Some(type_proto::Value::TensorType(ty)), ..TypeProto::default() };
    let mut x = model.add_input(main, "x", ty);
    let mut w = Writer { model, made: 0 };
    let (one, heads, flat) = (w.ints(&[1]), w.ints(&[4, WIDTH as i64 / 4]), w.ints(&[0, 0, WIDTH as i64]));
    let dims = w.node("Shape", &[x], vec![]);
    let length = w.node("Gather", &[dims, one], vec![]);
    let shape = w.node("Concat", &[one, length, heads], vec![Attr::int("axis", 0)]);
    let order = |w: &mut Writer, x: ValueId, perm: [i64; 4]| w.node("Transpose", &[x], vec![Attr::ints("perm", &perm)]);
    for _ in 0..blocks {
        let (scale, bias) = (w.weight(&[WIDTH]), w.weight(&[WIDTH]));
        let normed = w.node("LayerNormalization", &[x, scale, bias], vec![]);
        let [q, k, v] = [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]].map(|perm| {
            let weight = w.weight(&[WIDTH, WIDTH]);
            let made = w.node("MatMul", &[normed, weight], vec![]);
            let split = w.node("Reshape", &[made, shape], vec![]);
            order(&mut w, split, perm)
        });
        let scores = w.node("MatMul", &[q, k], vec![]);
        let soft = w.node("Softmax", &[scores], vec![]);
        let mixed = w.node("MatMul", &[soft, v], vec![]);
        let mixed = order(&mut w, mixed, [0, 2, 1, 3]);
        let mixed = w.node("Reshape", &[mixed, flat], vec![]);
        let weight = w.weight(&[WIDTH, WIDTH]);
        let mixed = w.node("MatMul", &[mixed, weight], vec![]);
        x = w.node("Add", &[x, mixed], vec![]);
        let (up, bias, down) = (w.weight(&[WIDTH, 4 * WIDTH]), w.weight(&[4 * WIDTH]), w.weight(&[4 * WIDTH, WIDTH]));
        let hidden = w.node("MatMul", &[x, up], vec![]);
        let hidden = w.node("Add", &[hidden, bias], vec![]);
        let hidden = w.node("Relu", &[hidden], vec![]);
        let out = w.node("MatMul", &[hidden, down], vec![]);
        x = w.node("Add", &[x, out], vec![]);
    }
    w.model.set_type(x, tensor_type(DataType::Float, None));
    w.model.add_output(main, x);
    w.model
}

/// Sequences of different lengths.
fn sequences(folder: &Path, model: &Model) -> SampleSet {
    for number in 0..9 {
        let length = 3 + number * 5 % 7;
        let values = noise(1000 + number, length * WIDTH);
        std::fs::write(folder.join(format!("{number}.npy")), npy(&[1, length, WIDTH], &values)).unwrap();
    }
    SampleSet::open(folder, model).unwrap()
}

pub(super) struct Case {
    pub(super) model: Model,
    pub(super) samples: SampleSet,
    sites: Vec<Site>,
    pub(super) indices: Vec<usize>,
}

impl Case {
    fn new(model: &Model, samples: SampleSet) -> Self {
        let model = prepare(model, &TractEvaluate, true).unwrap();
        let (sites, indices) = (sites(&model), (0..samples.len()).collect());
        Self { model, samples, sites, indices }
    }

    fn observation<'a>(&'a self, threads: usize, memory: Memory<'a>, progress: &'a dyn Progress) -> Observation<'a> {
        let Self { model, samples, sites, indices } = self;
        let run = Run { samples, indices, runtime: Runtime::Tract, threads, memory, timeout: None, progress };
        Observation { model, sites, run, checkpoint: None }
    }

    /// The bytes of the statistics, and the number of segments they were made in.
    fn run(&self, threads: usize, memory: Memory<'_>) -> (Vec<u8>, usize) {
        let listen = Listen::default();
        let found = self.observation(threads, memory, &listen).run(Statistics::default()).unwrap();
        (found.to_bytes(), listen.told.lock().unwrap()[0].segments)
    }

    pub(super) fn digits() -> Self {
        let (model, samples) = digits();
        Self::new(&model, samples)
    }

    pub(super) fn transformer(blocks: usize) -> Self {
        let (model, folder) = (transformer(blocks), folder());
        let samples = sequences(folder.path(), &model);
        // Files are open only while they are read: those of the set must outlive the test.
        std::mem::forget(folder);
        Self::new(&model, samples)
    }
}

/// The type of a tensor that a segment computes: shapes, and what is made of them, are integers.
fn dtype(model: &Model, name: &str) -> DataType {
    let node = model.producer_named(name).map(|node| model.node(node));
    match node.map(|node| (node.op_type(), node.input(0))) {
        Some(("Shape", _)) => DataType::Int64,
        Some(("Concat" | "Gather" | "Slice" | "Squeeze" | "Unsqueeze", Some(data))) => {
            model.dtype(data).unwrap_or_else(|| dtype(model, model.value(data).name()))
        }
        _ => DataType::Float,
    }
}

#[test]
fn segments_cover_the_model_and_fit() {
    let digits = digits().0;
    for (name, model) in [("digits", digits), ("transformer", transformer(4))] {
        let nodes = model.graph(model.main()).nodes();
        let total = weights(&model);
        let whole = cut(&model, u64::MAX);
        assert_eq!((whole.len(), whole[0].weights), (1, total), "{name}");
        assert!(whole[0].carried.is_empty() && whole[0].live.is_empty(), "{name}");
        for limit in [0, total / 20, total / 7, total / 3, total] {
            let segments = cut(&model, limit);
            let mut at = 0;
            for segment in &segments {
                assert_eq!(segment.nodes.start, at, "{name} {limit}");
                at = segment.nodes.end;
                let heavy = nodes[segment.nodes.clone()]
                    .iter()
                    .filter(|&&n| model.reads(n).iter().any(|&v| model.constant(v).is_some()));
                assert!(segment.weights <= limit || heavy.count() == 1, "{name} {limit}: {segment:?}");
                let types = segment.carried.iter().map(|n| (n.clone(), dtype(&model, n))).collect();
                let part = segment.model(&model, &types).unwrap();
                assert_eq!(part.graph(part.main()).nodes().len(), segment.nodes.len());
            }
            assert_eq!(at, nodes.len(), "{name} {limit}");
        }
        if name == "transformer" {
            // With room for a block, cuts are between blocks: the residual stream and the shape of heads cross.
            let block = total / 4 + 100;
            for segment in &cut(&model, block)[1..] {
                assert_eq!(segment.carried.len(), 2, "{segment:?}");
            }
        }
    }
}

#[test]
fn statistics_in_segments_are_those_of_the_whole_model() {
    for (name, mut case) in [("digits", Case::digits()), ("transformer", Case::transformer(3))] {
        for every in [1, 3] {
            case.sites = sites(&case.model).into_iter().step_by(every).collect();
            let (whole, segments) = case.run(2, Memory::default());
            assert_eq!(segments, 0);
            let total = weights(&case.model);
            for (segment, threads, least) in [(0, 1, 5), (0, 3, 5), (total / 2, 2, 2), (total, 2, 1)] {
                let memory = Memory { segment: Some(segment), ..Memory::default() };
                let (bytes, segments) = case.run(threads, memory);
                assert!(segments >= least, "{name}: {segments} segments");
                assert!(bytes == whole, "{name}, every site of {every}, {segments} segments, {threads} threads");
            }
        }
    }
}

#[test]
fn a_limit_makes_segments_and_leaves_no_files() {
    let case = Case::transformer(12);
    let listen = Listen::default();
    let whole = case.observation(3, Memory::default(), &listen).run(Statistics::default()).unwrap().to_bytes();
    let Estimate { weights: held, sample, state, threads, .. } = listen.told.lock().unwrap()[0];
    assert_eq!(threads, 3);
    // Constants that only shapes depend on are gone once it runs.
    assert!((0..200).contains(&(weights(&case.model) - held)), "weights as the runtime counts them");
    let folder = folder();
    let limited = |limit: u64| Memory { limit: Some(limit), folder: Some(folder.path()), ..Memory::default() };
    let (bytes, segments) = case.run(3, limited(state + held + held / 8 + 3 * sample));
    assert!(segments == 0 && bytes == whole);
    let (bytes, segments) = case.run(3, limited(state + (held + sample) * 3 / 4));
    assert!(segments > 1 && bytes == whole, "{segments} segments");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    for limit in [1000, state, state + held / 50] {
        let error = case.observation(1, limited(limit), &listen).run(Statistics::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{limit}: {error}");
        assert!(error.to_string().contains("too low"), "{error}");
    }
}

#[test]
fn fewer_samples_run_at_once_where_memory_is_short() {
    let case = Case::transformer(3);
    let listen = Listen::default();
    case.observation(4, Memory::default(), &listen).run(Statistics::default()).unwrap();
    let Estimate { weights, sample, state, .. } = listen.told.lock().unwrap()[0];
    for (room, expected) in [(1, 1), (2, 2), (3, 3), (100, 4)] {
        let limit = state + weights + weights / 16 + sample * room + sample / 2;
        let listen = Listen::default();
        let memory = Memory { limit: Some(limit), ..Memory::default() };
        case.observation(4, memory, &listen).run(Statistics::default()).unwrap();
        assert_eq!(listen.told.lock().unwrap()[0].threads, expected, "room for {room}");
    }
}

#[test]
fn an_interrupted_run_in_segments_keeps_what_it_started_from() {
    let case = Case::digits();
    let (whole, _) = case.run(2, Memory::default());
    let part: Vec<usize> = (0..case.samples.len()).step_by(3).collect();
    let silent = Listen::default();
    let whole_run = case.observation(2, Memory::default(), &silent);
    let observation = Observation { run: Run { indices: &part, ..whole_run.run }, ..whole_run };
    let start = observation.run(Statistics::default()).unwrap();
    let saved = AtomicUsize::new(0);
    let save = |_: &Statistics| {
        saved.fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    let memory = Memory { segment: Some(0), ..Memory::default() };
    let listen = Listen { stop_after: Some(70), ..Listen::default() };
    let checkpoint = Some(Checkpoint { every: Duration::ZERO, save: &save });
    let observation = Observation { checkpoint, ..case.observation(2, memory, &listen) };
    assert_eq!(observation.run(start.clone()).unwrap_err().kind(), Kind::Interrupted);
    assert_eq!(saved.load(Ordering::SeqCst), 0, "a state in which samples are half seen is never saved");
    let silent = Listen::default();
    assert!(case.observation(2, memory, &silent).run(start).unwrap().to_bytes() == whole);
}

#[test]
fn tensors_between_segments_go_to_files_that_are_gone_afterwards() {
    let case = Case::transformer(3);
    let (whole, _) = case.run(2, Memory::default());
    let folder = folder();
    let path = folder.path().canonicalize().unwrap();
    let knows = open_files(&path).is_some();
    let left = || (std::fs::read_dir(&path).unwrap().count(), open_files(&path).unwrap_or(0));
    // The residual stream of the longest sequence takes 9 * 32 * 4 bytes.
    for (carried, spills) in [(0, true), (1500, true), (1 << 20, false)] {
        for threads in [1, 3] {
            let memory = Memory { segment: Some(0), carried: Some(carried), folder: Some(&path), limit: None };
            let listen = Listen { watched: Some(path.clone()), ..Listen::default() };
            let found = case.observation(threads, memory, &listen).run(Statistics::default()).unwrap();
            assert!(found.to_bytes() == whole, "{carried} bytes in memory, {threads} threads");
            assert_eq!(listen.open.load(Ordering::SeqCst) > 0, spills && knows, "{carried}");
            assert_eq!(left(), (0, 0), "{carried}");
        }
    }
    let memory = Memory { segment: Some(0), carried: Some(0), folder: Some(&path), limit: None };
    let listen = Listen { watched: Some(path.clone()), stop_after: Some(40), ..Listen::default() };
    let error = case.observation(2, memory, &listen).run(Statistics::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted);
    assert_eq!(listen.open.load(Ordering::SeqCst) > 0, knows);
    assert_eq!(left(), (0, 0), "after an interruption");
    let nowhere = path.join("nowhere");
    let memory = Memory { folder: Some(&nowhere), ..memory };
    let error = case.observation(2, memory, &Listen::default()).run(Statistics::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Output, "{error}");
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[test]
fn a_long_run_in_segments_goes_on_where_it_was_saved() {
    const COUNT: usize = 150;
    let mut case = Case::digits();
    case.samples = SampleSet::random(&case.model, COUNT, 5).unwrap();
    case.indices = (0..COUNT).collect();
    let (whole, _) = case.run(2, Memory::default());
    let memory = Memory { segment: Some(0), ..Memory::default() };
    let listen = Listen::default();
    assert!(case.observation(2, memory, &listen).run(Statistics::default()).unwrap().to_bytes() == whole);
    let rounds = listen.ticks.load(Ordering::SeqCst) / COUNT;
    assert_eq!(listen.ticks.load(Ordering::SeqCst), rounds * COUNT, "each sample once through each segment");
    let saved = Mutex::new(Vec::new());
    let save = |state: &Statistics| {
        saved.lock().unwrap().push(state.to_bytes());
        Ok(())
    };
    let checkpoint = Some(Checkpoint { every: Duration::from_secs(1000), save: &save });
    for (stop, kept) in [(50, None), (100, Some(64)), (140, Some(128))] {
        saved.lock().unwrap().clear();
        let listen = Listen { stop_after: Some(stop * rounds), ..Listen::default() };
        let observation = Observation { checkpoint, ..case.observation(2, memory, &listen) };
        assert_eq!(observation.run(Statistics::default()).unwrap_err().kind(), Kind::Interrupted);
        let state = saved.lock().unwrap().last().map(|bytes| Statistics::from_bytes(bytes).unwrap());
        assert_eq!(state.as_ref().map(|s| s.ran.len()), kept, "stopped after {stop}");
        let listen = Listen::default();
        let found = case.observation(2, memory, &listen).run(state.unwrap_or_default()).unwrap();
        assert!(found.to_bytes() == whole, "stopped after {stop}");
        assert_eq!(listen.ticks.load(Ordering::SeqCst), (COUNT - kept.unwrap_or(0)) * rounds);
    }
}

/// Real models, where they were fetched: convolutions, whose neighbours tract may fuse.
#[test]
#[ignore = "takes minutes; needs AMAX_MODELS, a folder of models with samples beside them, or models/fetched"]
fn real_models_in_segments() {
    let folder = std::env::var_os("AMAX_MODELS").map_or_else(|| root("models/fetched"), PathBuf::from);
    let only = std::env::var("AMAX_ONLY").unwrap_or_default();
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut tried = 0;
    for path in paths.iter().filter(|p| p.extension().is_some_and(|e| e == "onnx")) {
        let samples = path.with_extension("calib.npz");
        if !samples.exists() || !path.to_string_lossy().contains(&only) {
            continue;
        }
        let model = file::load(path).unwrap();
        let samples = SampleSet::open(&samples, &model).unwrap();
        let mut case = Case::new(&model, samples);
        case.indices.truncate(4);
        let (whole, _) = case.run(2, Memory::default());
        let folder = crate::support::folder();
        let memory = Memory {
            segment: Some(weights(&case.model) / 5),
            carried: Some(1 << 20),
            folder: Some(folder.path()),
            limit: None,
        };
        let (bytes, segments) = case.run(2, memory);
        let [a, b] = [&whole, &bytes].map(|bytes| Statistics::from_bytes(bytes).unwrap());
        let mut worst = (0f32, "nothing");
        assert_eq!((&a.unobserved, a.sites.len()), (&b.unobserved, b.sites.len()), "{}", path.display());
        for ((name, x), (other, y)) in a.sites.iter().zip(&b.sites) {
            assert_eq!((name, x.count(), x.nan(), x.inf()), (other, y.count(), y.nan(), y.inf()));
            let ends = |site: &SiteStatistics| site.range().map_or([0.0; 2], |r| [r.min, r.max]);
            for (x, y) in ends(x).into_iter().zip(ends(y)) {
                let moved = (x - y).abs() / a.sites[name].amax().max(1e-6);
                if moved > worst.0 {
                    worst = (moved, name);
                }
            }
        }
        let differ = a.sites.iter().filter(|(name, site)| b.sites.get(*name) != Some(site)).count();
        println!("{}: {segments} segments, {differ} of {} differ, worst {worst:?}", path.display(), a.sites.len());
        // Where a cut keeps tract from rewriting across it, operators may add in another order.
        assert!(segments > 1 && worst.0 < 1e-4, "{}: {segments} segments, {worst:?}", path.display());
        assert_eq!(bytes == whole, differ == 0);
        tried += 1;
    }
    assert!(tried > 0, "no models with samples in {}", folder.display());
}
