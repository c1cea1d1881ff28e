//! A model prepared for running over samples in tract.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use bytes::Bytes;
use tract_core::internal::TypedModel;

use super::branches;
use super::constant::Constant;
use super::engine::{self, Arrays, Blueprint, Feed, Listener, Origins, Plan, Rung};
use super::program::{Program, Step, visit_reads};
use crate::error::{Error, Kind, Result};
use crate::ir::view::axis_in;
use crate::ir::{Model, Tensor};
use crate::machine;
use crate::onnx::DataType;
use crate::runtime::inputs::{self, Input};
use crate::runtime::{Footprint, Observe, Options, Sample};

/// Bound inputs larger than this are not taken for shapes or switches.
const MAX_BOUND: usize = 16;

/// One model prepared for running in tract.
///
/// `Session` is [`Sync`]: threads share the compiled plan, and each run has its own state. A plan is compiled for each
/// distinct set of input shapes; [`Options::plans`] of them are kept.
pub struct Session {
    observed: Vec<String>,
    options: Options,
    /// The model with functions inlined and nothing lowered: lowering needs to know which defaults hold.
    program: Program,
    /// Inputs whose value belongs to the plan.
    switches: BTreeSet<String>,
    /// Inputs that are row numbers of a table, with the table and its length.
    rows: BTreeMap<String, (String, usize)>,
    plans: Mutex<VecDeque<(Key, Arc<Slot>)>>,
    /// What plans share.
    arrays: Arrays,
    rung: AtomicU8,
    checked: Mutex<bool>,
    silent: Mutex<BTreeMap<String, String>>,
}

/// What a plan is compiled for: name, type, shape, and the value where it is bound, of each input that was given.
type Key = Vec<(String, DataType, Vec<usize>, Option<Bytes>)>;

/// A plan being made or made; the lock keeps other threads from making it too.
#[derive(Default)]
struct Slot(Mutex<Option<Ready>>);

#[derive(Clone)]
struct Ready {
    plan: Plan,
    rung: Rung,
    origins: Origins,
    footprint: Footprint,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("observed", &self.observed.len())
            .field("method", &self.method())
            .finish_non_exhaustive()
    }
}

/// A sample that was found to fit.
struct Bound {
    key: Key,
    given: BTreeSet<String>,
    values: BTreeMap<String, Tensor>,
    /// Inputs that are fed, by name.
    arrays: BTreeMap<String, Arc<tract_core::internal::Tensor>>,
}

impl Session {
    /// Prepares `model`; the tensors of the main graph named in `observed` will be shown to the observer of each run.
    /// Names that have no float tensor to show are reported by [`Session::unobserved`].
    ///
    /// # Errors
    /// [`Kind::Runtime`] for operators and attributes that cannot be run, naming node, operator and reason.
    pub fn with_options(model: &Model, observed: &[String], options: Options) -> Result<Self> {
        keep_memory_low();
        let program = Program::new(model)?;
        // Refusals should not wait for the first sample. Branches that are not taken are not refused here.
        let mut trial = program.clone();
        trial.bind(&BTreeSet::new(), &BTreeMap::new());
        if !branches::has_control_flow(&trial) {
            trial.lower()?;
        }
        Ok(Self {
            observed: observed.to_vec(),
            options,
            switches: switches(&program),
            rows: rows(&program),
            program,
            plans: Mutex::default(),
            arrays: Arrays::default(),
            rung: AtomicU8::new(Rung::Optimized as u8),
            checked: Mutex::new(!options.check),
            silent: Mutex::default(),
        })
    }

    /// Runs one sample and gives back the graph outputs, in graph order. Observed tensors go to `observe` as they are
    /// computed. Outputs declared half or bfloat16 come back as float32, which is what they were computed in.
    ///
    /// # Errors
    /// [`Kind::Samples`] for inputs that are missing, unknown, or of the wrong type or shape; [`Kind::Runtime`] where tract
    /// fails. After an error the observer may have seen part of the sample.
    pub fn run(&self, sample: &Sample, observe: &Arc<dyn Observe>) -> Result<Vec<(String, Tensor)>> {
        let bound = self.bind(sample)?;
        self.check_once(&bound)?;
        let mut listener = Listener::new(observe.clone(), self.observed.len());
        loop {
            let (ready, feed) = self.ready(&bound)?;
            let (result, after) = engine::watch(listener, || engine::run(&ready.plan, &feed));
            listener = after;
            match result {
                Ok(arrays) => return self.outputs(&arrays),
                Err(message) => self.descend(&ready, &message)?,
            }
        }
    }

    /// What the plan for a sample of these shapes takes in memory; compiles it, and checks it where it is the first.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn footprint(&self, sample: &Sample) -> Result<Footprint> {
        let bound = self.bind(sample)?;
        self.check_once(&bound)?;
        Ok(self.ready(&bound)?.0.footprint)
    }

    /// Observed names that produce nothing, with the reason. Complete once a sample has run.
    #[must_use]
    pub fn unobserved(&self) -> Vec<(String, String)> {
        lock(&self.silent).iter().map(|(name, why)| (name.clone(), why.clone())).collect()
    }

    /// How far tract optimises the plans in use: "optimized", "codegen only" or "raw".
    #[must_use]
    pub fn method(&self) -> &'static str {
        self.rung().name()
    }

    fn rung(&self) -> Rung {
        match self.rung.load(Ordering::SeqCst) {
            0 => Rung::Optimized,
            1 => Rung::Codegen,
            _ => Rung::Raw,
        }
    }

    /// Goes one rung down from that of `from`, or fails where there is none.
    fn descend(&self, from: &Ready, message: &str) -> Result<()> {
        let Some(below) = from.rung.below() else {
            return Err(engine::locate(&from.origins, message));
        };
        self.rung.fetch_max(below as u8, Ordering::SeqCst);
        lock(&self.plans).clear();
        Ok(())
    }

    /// Checks a sample against the inputs of the model.
    fn bind(&self, sample: &Sample) -> Result<Bound> {
        let mut bound =
            Bound { key: Vec::new(), given: BTreeSet::new(), values: BTreeMap::new(), arrays: BTreeMap::new() };
        for (input, tensor) in inputs::bind(&self.program.inputs, sample)? {
            if let Some((table, count)) = self.rows.get(&input.name) {
                check_rows(tensor, table, *count).map_err(|e| e.at_value(&input.name))?;
            }
            bound.given.insert(input.name.clone());
            let value = self.switches.contains(&input.name) && tensor.len() <= MAX_BOUND;
            let bytes = value.then(|| tensor.raw());
            bound.key.push((input.name.clone(), tensor.dtype(), tensor.dims(), bytes));
            if value {
                bound.values.insert(input.name.clone(), tensor.clone());
            } else {
                let array = engine::to_array(&Constant::Plain(tensor.clone()))
                    .map_err(|e| Error::new(Kind::Samples, e).at_value(&input.name))?;
                bound.arrays.insert(input.name.clone(), Arc::new(array));
            }
        }
        Ok(bound)
    }

    /// The plan for a sample, and its inputs in the plan's order.
    fn ready(&self, bound: &Bound) -> Result<(Ready, Feed)> {
        let feed = self.feed(bound);
        let slot = {
            let mut plans = lock(&self.plans);
            let found = plans.iter().position(|(key, _)| *key == bound.key);
            let entry = match found.and_then(|at| plans.remove(at)) {
                Some(entry) => entry,
                None => (bound.key.clone(), Arc::default()),
            };
            let slot = entry.1.clone();
            plans.push_front(entry);
            plans.truncate(self.options.plans.max(1));
            slot
        };
        let mut ready = lock(&slot.0);
        if let Some(ready) = &*ready {
            return Ok((ready.clone(), feed));
        }
        let (program, feed) = self.program_for(bound)?;
        loop {
            let Blueprint { model, silent, origins } = engine::build(&program, &feed, &self.observed, &self.arrays)?;
            check_size(&model, &origins)?;
            *lock(&self.silent) = silent;
            let rung = self.rung();
            let weights = engine::weights(&model);
            match engine::compile(model, rung) {
                Ok(plan) => {
                    let footprint = Footprint { weights, sample: engine::tensors(&plan) };
                    self.arrays.settle();
                    give_back();
                    let made = Ready { plan, rung, origins, footprint };
                    *ready = Some(made.clone());
                    return Ok((made, feed));
                }
                Err(message) => {
                    let Some(below) = rung.below() else {
                        return Err(engine::locate(&origins, &message));
                    };
                    self.rung.fetch_max(below as u8, Ordering::SeqCst);
                }
            }
        }
    }

    /// The arrays of a sample in the order of the inputs that stay inputs.
    fn feed(&self, bound: &Bound) -> Feed {
        self.program.inputs.iter().filter_map(|i| bound.arrays.get(&i.name).cloned()).collect()
    }

    /// The program with what the sample decides decided: absent inputs, switches, branches.
    fn program_for(&self, bound: &Bound) -> Result<(Program, Feed)> {
        let mut program = self.program.clone();
        program.bind(&bound.given, &bound.values);
        let feed = self.feed(bound);
        let mut known = |program: &Program, name: &str| -> Option<Vec<i64>> {
            if let Some(tensor) = program.tensor(name) {
                return tensor.to_i64();
            }
            let mut program = program.part(name);
            program.lower().ok()?;
            let array = match program.tensor(name) {
                Some(tensor) => return tensor.to_i64(),
                None => engine::evaluate_constant(&program, name, &feed)?,
            };
            engine::from_array(&array, None).ok()?.to_i64()
        };
        branches::inline(&mut program, &mut known)?;
        program.lower()?;
        Ok((program, feed))
    }

    fn outputs(&self, arrays: &[tract_core::internal::TValue]) -> Result<Vec<(String, Tensor)>> {
        let outputs = self.program.outputs.iter().zip(arrays);
        outputs
            .map(|(output, array)| {
                let tensor = engine::from_array(array, output.dtype)
                    .map_err(|e| Error::new(Kind::Runtime, e).at_value(&output.name))?;
                Ok((output.name.clone(), tensor))
            })
            .collect()
    }

    /// For the first sample of the session, compares the plan in use with the one that tract does not rewrite, and goes
    /// down the ladder until they agree.
    fn check_once(&self, bound: &Bound) -> Result<()> {
        let mut checked = lock(&self.checked);
        if *checked {
            return Ok(());
        }
        let (program, feed) = self.program_for(bound)?;
        if program.steps.iter().any(is_random) {
            *checked = true;
            return Ok(());
        }
        let Blueprint { model, silent: _, origins } = engine::build(&program, &feed, &self.observed, &self.arrays)?;
        check_size(&model, &origins)?;
        let raw = engine::compile(model, Rung::Raw).map_err(|e| engine::locate(&origins, &e))?;
        let want = trace(&raw, &feed, self.observed.len()).map_err(|e| engine::locate(&origins, &e))?;
        drop(raw);
        loop {
            let (ready, feed) = self.ready(bound)?;
            if ready.rung == Rung::Raw {
                break;
            }
            match trace(&ready.plan, &feed, self.observed.len()) {
                Ok(got) if got.agrees(&want) => break,
                Ok(_) => self.descend(&ready, "results differ")?,
                Err(message) => self.descend(&ready, &message)?,
            }
        }
        *checked = true;
        Ok(())
    }
}

/// Integer inputs whose value decides a branch or a shape: they are constants of the plan.
fn switches(program: &Program) -> BTreeSet<String> {
    let mut needed: BTreeSet<String> = BTreeSet::new();
    for step in program.steps.iter().rev() {
        let decides = step.node.output.iter().any(|o| needed.contains(o));
        if decides && !matches!(step.op(), "Shape" | "Size") {
            visit_reads(&step.node, &mut |name| {
                needed.insert(name.to_owned());
            });
        }
        needed.extend(deciding_inputs(step).map(str::to_owned));
    }
    let integer = |dtype| matches!(dtype, DataType::Int64 | DataType::Int32 | DataType::Bool);
    let flat = |input: &Input| input.dims.as_ref().is_none_or(|d| d.len() <= 1);
    let wanted = program.inputs.iter().filter(|i| integer(i.dtype) && flat(i) && needed.contains(&i.name));
    wanted.map(|i| i.name.clone()).collect()
}

/// Inputs that a Gather takes for row numbers of a constant, perhaps behind a Cast.
fn rows(program: &Program) -> BTreeMap<String, (String, usize)> {
    let inputs: BTreeSet<&str> = program.inputs.iter().map(|input| input.name.as_str()).collect();
    let casts = program.steps.iter().filter(|step| step.is("Cast"));
    let casts: BTreeMap<&str, &str> = casts.filter_map(|step| Some((step.output(0)?, step.input(0)?))).collect();
    let source = |name| Some(*casts.get(name).unwrap_or(&name)).filter(|name| inputs.contains(name)).map(str::to_owned);
    let mut found: BTreeMap<String, (String, usize)> = BTreeMap::new();
    for step in program.steps.iter().filter(|step| step.is("Gather")) {
        let (Some(table), Some(index)) = (step.input(0), step.input(1).and_then(source)) else { continue };
        let dims = program.constants.get(table).map(Constant::dims).unwrap_or_default();
        let Some(&count) = axis_in(step.int("axis").unwrap_or(0), dims.len()).and_then(|axis| dims.get(axis)) else {
            continue;
        };
        let shortest = found.entry(index).or_insert_with(|| (table.to_owned(), count));
        if count < shortest.1 {
            *shortest = (table.to_owned(), count);
        }
    }
    found
}

/// Whether all of these are row numbers of a table: from minus its length to its length, without that.
fn check_rows(numbers: &Tensor, table: &str, count: usize) -> Result<()> {
    let count = i64::try_from(count).unwrap_or(i64::MAX);
    let outside = numbers.to_i64().and_then(|all| all.into_iter().find(|&row| row < -count || row >= count));
    outside.map_or(Ok(()), |row| {
        Err(Error::new(Kind::Samples, format!("the index {row} is out of range: \"{table}\" has {count} rows"))
            .with_hint("were these token ids made with the tokenizer of this model?"))
    })
}

/// Inputs of a step that tract must know the value of.
fn deciding_inputs(step: &Step) -> impl Iterator<Item = &str> {
    let range = match step.op() {
        "If" | "ConstantOfShape" => 0..1,
        "Loop" => 0..2,
        "SequenceAt" | "SequenceErase" | "SplitToSequence" => 1..2,
        "SequenceInsert" => 2..3,
        "Range" => 0..3,
        op if op.starts_with("Reduce") => 1..2,
        "CumSum" | "Reshape" | "Expand" | "Tile" | "Pad" | "Unsqueeze" | "Squeeze" | "TopK" | "OneHot" | "Trilu"
        | "CenterCropPad" | "Split" | "AffineGrid" | "Compress" => 1..2,
        "Col2Im" => 1..3,
        "Slice" => 1..5,
        "Resize" => 1..4,
        _ => 0..0,
    };
    range.filter_map(|i| step.input(i))
}

fn is_random(step: &Step) -> bool {
    step.op().starts_with("Random") || matches!(step.op(), "Multinomial" | "Bernoulli")
}

/// What a run produced, briefly.
struct Trace {
    outputs: Vec<tract_core::internal::TValue>,
    sites: Vec<Option<Extent>>,
}

/// Count and extrema of a tensor, NaN left out.
#[derive(Clone, Copy, Debug)]
struct Extent {
    count: usize,
    min: f32,
    max: f32,
}

struct Extents(Mutex<Vec<Option<Extent>>>);

impl Observe for Extents {
    fn see(&self, site: usize, values: &[f32], _shape: &[usize]) {
        let (min, max) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v)));
        lock(&self.0)[site] = Some(Extent { count: values.len(), min, max });
    }
}

fn trace(plan: &Plan, feed: &Feed, sites: usize) -> Result<Trace, String> {
    let extents = Arc::new(Extents(Mutex::new(vec![None; sites])));
    let listener = Listener::new(extents.clone(), sites);
    // One rounding difference moves a fake quant by a step, and the steps after it by more: without them, two runs of the
    // same operators agree closely.
    let (outputs, _) = engine::without_fake_quant(|| engine::watch(listener, || engine::run(plan, feed)));
    let sites = lock(&extents.0).clone();
    Ok(Trace { outputs: outputs?, sites })
}

impl Trace {
    /// Whether two runs of one model agree as far as another summation order allows: extrema to 2 % of the largest
    /// magnitude, outputs to 2 % of their norm. A wrong layout or a lost operator moves everything by more.
    #[allow(clippy::float_cmp, reason = "infinities are equal or they are not")]
    fn agrees(&self, other: &Self) -> bool {
        const TOLERANCE: f32 = 0.02;
        let near = |a: f32, b: f32, magnitude: f32| a == b || (a - b).abs() <= TOLERANCE * magnitude + 1e-6;
        let sites = self.sites.iter().zip(&other.sites).all(|pair| match pair {
            (None, None) => true,
            (Some(a), Some(b)) => {
                let magnitude = b.min.abs().max(b.max.abs());
                a.count == b.count && near(a.min, b.min, magnitude) && near(a.max, b.max, magnitude)
            }
            _ => false,
        });
        let outputs = self.outputs.iter().zip(&other.outputs).all(|(a, b)| {
            let read = |t| engine::from_array(t, None).ok().and_then(|t| t.to_f32().map(|v| (t.dims(), v)));
            match (read(a), read(b)) {
                (Some(a), Some(b)) => a.0 == b.0 && distance(&a.1, &b.1) <= f64::from(TOLERANCE),
                _ => a.shape() == b.shape(),
            }
        });
        sites && outputs
    }
}

/// Norm of the difference over the norm of `b`; elements that are not finite must be so in both.
#[allow(clippy::float_cmp, reason = "infinities are equal or they are not")]
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let (mut error, mut norm) = (0f64, 0f64);
    for (&a, &b) in a.iter().zip(b) {
        if !a.is_finite() || !b.is_finite() {
            if a.is_nan() != b.is_nan() || (!a.is_nan() && a != b) {
                return f64::INFINITY;
            }
            continue;
        }
        error += (f64::from(a) - f64::from(b)).powi(2);
        norm += f64::from(b).powi(2);
    }
    if error == 0. { 0. } else { (error / norm.max(1e-12)).sqrt() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has glibc map large blocks one by one, so that weights freed after packing go back to the system: without it the process
/// keeps a second copy of every weight. And has it keep one pool for all threads, since what one of them freed is of
/// no use to the others otherwise.
fn keep_memory_low() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: mallopt takes two integers each time and only changes how later allocations are served.
            #[allow(unsafe_code, reason = "malloc tuning")]
            unsafe {
                libc::mallopt(libc::M_MMAP_THRESHOLD, 256 * 1024);
                libc::mallopt(libc::M_ARENA_MAX, 1);
            }
        });
    }
}

/// Has glibc give back what compiling a plan left free between what it kept.
fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes an integer and changes only free memory.
    #[allow(unsafe_code, reason = "malloc tuning")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Refuses a model with a tensor that is larger than all memory, before an allocation fails and ends the process.
fn check_size(model: &TypedModel, origins: &Origins) -> Result<()> {
    let too_large = |&(_, size): &(&str, u64)| size >= machine::memory();
    let Some((name, size)) = engine::largest(model).filter(too_large) else { return Ok(()) };
    let message = format!("a tensor of {} GB does not fit into memory", size.div_ceil(1_000_000_000));
    let error = Error::new(Kind::Runtime, message)
        .with_hint("give smaller samples, or pass --calib none to quantize weights only");
    Err(match engine::origin(origins, &format!("\"{name}\"")) {
        Some((name, op)) => error.at_node(name, op),
        None => error,
    })
}
