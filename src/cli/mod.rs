//! What the commands share: the console, and how samples are found.

pub(crate) mod budget;
pub(crate) mod calibrate;
pub(crate) mod compare;
pub(crate) mod config;
pub(crate) mod configure;
pub(crate) mod convert;
pub(crate) mod depfile;
pub(crate) mod diff;
pub(crate) mod explain;
pub(crate) mod inspect;
pub(crate) mod merge;
pub(crate) mod output;
pub(crate) mod plan;
pub(crate) mod presets;
pub(crate) mod rewrite;
pub(crate) mod scales;
pub(crate) mod sensitivity;
pub(crate) mod shell;
pub(crate) mod verify;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::panic::PanicHookInfo;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use amax::Result;
use amax::error::{Error, Kind};
use amax::ir::{Model, Tensor};
use amax::observe::{Estimate, Progress};
use amax::onnx::DataType;
use amax::passes::freeze_inputs::set_input;
pub(crate) use amax::report::layout::{bytes, count, decibels, table, wrap};
use amax::runtime::Runtime;
use amax::samples::{self, SampleSet};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether errors are JSON.
static JSON: AtomicBool = AtomicBool::new(false);

static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// How often progress is told where no bar can be drawn.
const SILENCE: Duration = Duration::from_secs(30);

/// Messages on stderr; data goes to stdout elsewhere.
pub(crate) struct Console {
    quiet: bool,
    pub(crate) verbose: bool,
    /// Whether what a run takes in memory is said even where it is little.
    tells_memory: AtomicBool,
    step: Mutex<Option<Step>>,
}

struct Step {
    name: String,
    total: u64,
    done: u64,
    since: Instant,
    said: Instant,
    bar: Option<ProgressBar>,
}

impl Step {
    /// How fast it goes, and how long it will take.
    fn pace(&self) -> String {
        let seconds = self.since.elapsed().as_secs_f64();
        let left = seconds / self.done as f64 * self.total.saturating_sub(self.done) as f64;
        format!("{:.1} a second, {left:.0} s to go", self.done as f64 / seconds)
    }
}

impl Console {
    /// Listens to Ctrl-C and SIGTERM: the first one asks the running step to stop, the second one ends the process.
    pub(crate) fn new(quiet: bool, verbose: bool) -> Self {
        // Without handlers Ctrl-C still ends the process; outputs appear by renaming, so nothing partial is left.
        // A file that passes the user's limit is an error of the write then, and not the end of the process.
        #[cfg(unix)]
        let _ = flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
        #[cfg(unix)]
        end_at_cut_files();
        for signal in [SIGINT, SIGTERM] {
            let _ = flag::register_conditional_shutdown(signal, 130, INTERRUPTED.clone());
            let _ = flag::register(signal, INTERRUPTED.clone());
        }
        Self { quiet, verbose, tells_memory: AtomicBool::new(verbose), step: Mutex::new(None) }
    }

    /// Prints a message.
    pub(crate) fn say(&self, message: &str) {
        if !self.quiet {
            print_error(message);
        }
    }

    /// Prints what even those have to know who want to hear of errors only.
    pub(crate) fn insist(&self, message: &str) {
        self.clear();
        print_error(message);
    }

    /// Has the runs that start from here on say what they take in memory.
    pub(crate) fn tell_memory(&self) {
        self.tells_memory.store(true, Ordering::Relaxed);
    }

    /// Removes a progress bar that an error left standing.
    pub(crate) fn clear(&self) {
        self.finish();
    }
}

/// Writes to stderr, where nobody may be listening any more.
fn print_error(message: &str) {
    let _ = writeln!(std::io::stderr(), "{message}");
}

/// Prints an error; where an interruption was noticed says nothing to the user.
pub(crate) fn complain(error: &Error) {
    match error.kind() {
        _ if JSON.load(Ordering::Relaxed) => print_error(&error.to_json()),
        Kind::Interrupted => print_error(error.message()),
        _ => print_error(&format!("error: {error}")),
    }
}

/// How errors are printed.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub(crate) enum ErrorFormat {
    Text,
    Json,
}

impl ErrorFormat {
    /// Prints errors in this form from now on.
    pub(crate) fn set(self) {
        JSON.store(self == Self::Json, Ordering::Relaxed);
    }
}

/// Prints what is wrong with a command line, or the help that it asks for.
pub(crate) fn refuse(error: &clap::Error) -> ExitCode {
    let mut words = std::env::args_os().skip_while(|word| !word.to_string_lossy().starts_with("--error-format"));
    let json = match words.next() {
        Some(word) if word == "--error-format" => words.next().is_some_and(|form| form == "json"),
        word => word.is_some_and(|word| word == "--error-format=json"),
    };
    let model = error.kind() == clap::error::ErrorKind::InvalidSubcommand
        && std::env::args_os().nth(1).is_some_and(|word| Path::new(&word).extension().is_some_and(|e| e == "onnx"));
    if model && !json {
        print_error(
            "error: a command is missing\nhint: amax rewrite MODEL OUTPUT quantizes a model, amax inspect MODEL describes it",
        );
    } else if json && error.use_stderr() {
        let text = error.render().to_string();
        print_error(&Error::new(Kind::Usage, text.trim_start_matches("error: ").trim_end()).to_json());
    } else {
        let _ = error.print();
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Kind::Usage.exit_code()))
}

/// Says that a panic is not the user's mistake.
pub(crate) fn admit(panic: &PanicHookInfo<'_>) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref().copied());
    let place = panic.location().map(|l| format!("\n  at {}:{}", l.file(), l.line())).unwrap_or_default();
    let message = format!("a bug in amax: {}{place}", text.unwrap_or("panic"));
    complain(&Error::new(Kind::Internal, message).with_hint("please report it with the command line and the model"));
    if std::env::var_os("RUST_BACKTRACE").is_some_and(|v| v != "0") {
        print_error(&std::backtrace::Backtrace::force_capture().to_string());
    }
}

/// A file that is cut while it is mapped ends the process, with a word and the exit code of models.
#[cfg(unix)]
fn end_at_cut_files() {
    extern "C" fn say(_signal: libc::c_int) {
        const WORDS: &[u8] = b"error: a file was cut while it was read, or the disk is full\n\
            hint: let whatever writes the model or its data end first, and run the command again\n";
        // SAFETY: these two functions may be called from a handler, and the bytes are constant.
        #[allow(unsafe_code, reason = "a signal handler")]
        unsafe {
            libc::write(libc::STDERR_FILENO, WORDS.as_ptr().cast(), WORDS.len());
            libc::_exit(i32::from(Kind::Model.exit_code()));
        }
    }
    // SAFETY: the handler calls only what a handler may.
    #[allow(unsafe_code, reason = "no crate registers handlers of SIGBUS, as returning from one is never right")]
    unsafe {
        libc::signal(libc::SIGBUS, say as extern "C" fn(libc::c_int) as libc::sighandler_t);
    }
}

impl Progress for Console {
    fn start(&self, step: &str, total: u64) {
        let now = Instant::now();
        let fresh = Step { name: step.to_owned(), total, done: 0, since: now, said: now, bar: None };
        *self.step.lock().expect("no panic while held") = Some(fresh);
    }

    fn tick(&self) {
        let mut slot = self.step.lock().expect("no panic while held");
        let Some(step) = slot.as_mut() else { return };
        step.done += 1;
        if step.said.elapsed() > SILENCE && !std::io::stderr().is_terminal() {
            step.said = Instant::now();
            self.say(&format!("{} {}/{}, {}", step.name, step.done, step.total, step.pace()));
        }
        let long = step.since.elapsed() > Duration::from_secs(1);
        if step.bar.is_none() && long && !self.quiet && std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(step.total);
            let style = ProgressStyle::with_template("{prefix:10} [{bar:30}] {pos}/{len}, {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar.set_prefix(step.name.clone());
            step.bar = Some(bar);
        }
        if let Some(bar) = &step.bar {
            bar.set_message(step.pace());
            bar.set_position(step.done);
        }
    }

    fn finish(&self) {
        let step = self.step.lock().expect("no panic while held").take();
        if let Some(bar) = step.and_then(|s| s.bar) {
            bar.finish_and_clear();
        }
    }

    fn interrupted(&self) -> bool {
        INTERRUPTED.load(Ordering::SeqCst)
    }

    fn stuck(&self, error: &Error) {
        self.clear();
        complain(error);
        // Outputs appear whole when they are complete, so there is nothing to clean up.
        std::process::exit(i32::from(error.kind().exit_code()));
    }

    fn memory(&self, estimate: &Estimate) {
        // Who has set no limit wants to know of much only.
        const MUCH: u64 = 1_000_000_000;
        if self.tells_memory.load(Ordering::Relaxed) || estimate.limit.is_some() || estimate.total() > MUCH {
            self.say(&memory(estimate));
        }
    }
}

/// The samples that `--calib` names: a path, `random`, `none`, or the file beside the model.
fn samples(
    calib: Option<&Path>,
    model: &Model,
    path: &Path,
    options: &samples::Options,
    console: &Console,
) -> Result<Option<SampleSet>> {
    let given = match calib.map(|path| (path, path.to_str())) {
        Some((_, Some("random"))) => {
            console.say(
                "warning: the samples are random noise: ranges and figures will be wrong for real data\n         \
                 use this only to try things out",
            );
            return SampleSet::random(model, 16, 0).map(Some);
        }
        Some((_, Some("none"))) => None,
        Some((_, Some("-"))) => return SampleSet::from_stream(&mut std::io::stdin().lock(), model, options).map(Some),
        Some((given, _)) => Some(given.to_owned()),
        None => samples::default_path(path),
    };
    let Some(given) = given else { return Ok(None) };
    let set = SampleSet::open_with(&given, model, options)?;
    let unread: Vec<_> = set.unread().iter().map(|p| p.file_name().unwrap_or_default().to_string_lossy()).collect();
    if let [first, others @ ..] = unread.as_slice() {
        let what = match others.len() {
            0 => format!("{first} in {} is", given.display()),
            more => format!("{first} and {} in {} are", count(more, "other file"), given.display()),
        };
        console.say(&format!("warning: {what} not read: samples here are of another kind"));
    }
    Ok(Some(set))
}

/// Makes constants of the inputs that `--set-input` names, and opens the samples, which need not give those inputs.
pub(crate) fn set_inputs(
    model: &mut Model,
    assignments: &[String],
    sampling: &SampleArgs,
    calib: Option<&Path>,
    path: &Path,
    console: &Console,
) -> Result<Option<SampleSet>> {
    if assignments.is_empty() {
        return sampling.samples(calib, model, path, console);
    }
    let main = model.main();
    let mut values = BTreeMap::new();
    for assignment in assignments {
        let (value, tensor) = set_input(model, assignment)?;
        if values.insert(value, tensor).is_some() {
            return Err(Error::new(Kind::Usage, "an input is set twice").at_value(model.value(value).name()));
        }
    }
    let mut optional = model.clone();
    let mut given = BTreeMap::new();
    for (value, tensor) in values {
        optional.set_default(main, value, tensor.clone());
        given.insert(model.value(value).name().to_owned(), tensor.clone());
        model.bind_input(main, value, tensor);
    }
    let mut set = sampling.samples(calib, &optional, path, console)?;
    if let Some(set) = &mut set {
        if calib != Some(Path::new("random")) {
            warn_of_others(set, &given, console)?;
        }
        set.drop_inputs(&given.into_keys().collect());
    }
    Ok(set)
}

/// Says so where samples hold another value of an input than the one that it was set to.
fn warn_of_others(set: &SampleSet, given: &BTreeMap<String, Tensor>, console: &Console) -> Result<()> {
    let mut others: BTreeMap<&str, usize> = BTreeMap::new();
    for index in 0..set.len() {
        let sample = set.get(index)?;
        for (name, tensor) in given {
            let same = |s: &Tensor| s.len() == tensor.len() && s.raw() == tensor.raw();
            if sample.get(name).is_some_and(|s| !same(s)) {
                *others.entry(name).or_default() += 1;
            }
        }
    }
    for (name, number) in others {
        console.say(&format!(
            "warning: {number} of {} samples give \"{name}\" another value than --set-input, which is used",
            set.len()
        ));
    }
    Ok(())
}

/// Options on how samples run.
#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// Runtime for the samples: tract, or ort, an installed onnxruntime (in builds with that feature).
    #[arg(long, value_name = "NAME", default_value = Runtime::default().name(), value_parser = runtime)]
    runtime: Runtime,
    /// Samples that run at once; does not change the result.
    #[arg(long, value_name = "N", value_parser = thread_count, allow_negative_numbers = true)]
    threads: Option<usize>,
    /// Seconds that one sample may run; default: as long as it takes.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    timeout: Option<Duration>,
}

impl RunArgs {
    /// As many threads as asked for, or as there are processors.
    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(amax::machine::processors)
    }
}

/// Options on how samples are read.
#[derive(clap::Args, Default)]
pub(crate) struct SampleArgs {
    /// How images become the model's input (TOML); default: preprocess.toml among them, or beside the model.
    #[arg(long, value_name = "FILE")]
    preprocess: Option<PathBuf>,
    /// Size of a dimension that the model leaves free, for .bin files; repeatable.
    #[arg(long, value_name = "NAME=SIZE", value_parser = dimension)]
    dim: Vec<(String, usize)>,
}

impl SampleArgs {
    /// As [`samples`], with these options.
    pub(crate) fn samples(
        &self,
        calib: Option<&Path>,
        model: &Model,
        path: &Path,
        console: &Console,
    ) -> Result<Option<SampleSet>> {
        let read = match calib {
            Some(given) => !matches!(given.to_str(), Some("random" | "none")),
            None => samples::default_path(path).is_some(),
        };
        if !read && (self.preprocess.is_some() || !self.dim.is_empty()) {
            return Err(Error::new(Kind::Usage, "--preprocess and --dim describe samples, but there are none")
                .with_hint("name the samples with --calib PATH"));
        }
        let dims = self.dim.iter().cloned().collect();
        let options = samples::Options { preprocess: self.preprocess.clone(), dims };
        samples(calib, model, path, &options, console)
    }
}

/// Reads the value of `--dim`.
fn dimension(text: &str) -> Result<(String, usize), String> {
    match text.rsplit_once('=').map(|(name, size)| (name.trim(), size.trim().parse())) {
        Some((name, Ok(size @ 1..))) if !name.is_empty() => Ok((name.to_owned(), size)),
        _ => Err("a name and a size are needed, such as batch=1".to_owned()),
    }
}

/// Reads the value of `--runtime`.
pub(crate) fn runtime(text: &str) -> Result<Runtime, String> {
    let names = Runtime::ALL.map(Runtime::name);
    Runtime::ALL.into_iter().find(|r| r.name() == text).ok_or_else(|| format!("runtimes are {}", names.join(" and ")))
}

/// Reads the value of `--dtype`.
pub(crate) fn float_type(text: &str) -> Result<DataType, String> {
    let types = [DataType::Float16, DataType::Bfloat16];
    types.into_iter().find(|t| t.name() == text).ok_or_else(|| "types are float16 and bfloat16".to_owned())
}

/// Reads the value of `--threads`.
fn thread_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err("a number from 1 to 1024 is needed".to_owned()),
    }
}

/// Reads the value of `--timeout`.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.strip_suffix('s').unwrap_or(text).trim().parse::<f64>().ok();
    let found = seconds.filter(|seconds| *seconds > 0.0).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    found.ok_or_else(|| "a number of seconds above 0 is needed".to_owned())
}

/// Reads the value of `--max-memory`.
pub(crate) fn memory_size(text: &str) -> Result<u64, String> {
    amax::config::budget::bytes(text).ok_or_else(|| "a size is needed, as in 2GB, 1.5GiB or 800MB".to_owned())
}

/// What a run will take, in a line.
fn memory(estimate: &Estimate) -> String {
    let Estimate { weights, sample, threads, segments, limit, .. } = *estimate;
    let at_once = count(threads, "sample");
    if segments > 0 {
        let limit = bytes(limit.unwrap_or_default());
        return format!(
            "memory: up to {limit}: {} of up to {} of weights, one after the other, up to {at_once} at once",
            count(segments, "segment"),
            bytes(weights)
        );
    }
    format!(
        "memory: about {}: {} of weights, {at_once} at once of {}, {} for the rest",
        bytes(estimate.total()),
        bytes(weights),
        bytes(sample),
        bytes(estimate.state)
    )
}
