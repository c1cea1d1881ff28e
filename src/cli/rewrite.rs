//! `amax rewrite`.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use amax::config::Config;
use amax::error::{Error, Kind, Result};
use amax::ir::{Model, file, text};
use amax::passes::Outcome;
use amax::passes::pipeline;
use amax::report::Report;
use amax::rewrite::{Request, rewrite};
use amax::targets::{self, Target};

use tempfile::NamedTempFile;

use super::inspect::print;
use super::{Console, SampleArgs, summary, thread_count, threads};

/// Arguments of `amax rewrite`.
#[derive(clap::Args)]
#[command(after_help = "Samples are real inputs of the model; without --calib, model.calib.npz beside
model.onnx is used where it exists. Without samples only weights are quantized.
A .npz has an array for each input, by name. An array with one axis more than
its input holds many samples, one a row: np.savez(path, image=images[:, None]).

Examples:
  amax rewrite model.onnx out.onnx
  amax rewrite model.onnx out.onnx --calib samples.npz --report report.json
  amax rewrite model.onnx out.onnx --calib test_data/ --target tensorrt
  amax rewrite model.onnx out.onnx --exclude '/head/*' --exclude last_conv
  amax rewrite model.onnx out.onnx --calib none
  amax rewrite model.onnx out.onnx --stop-after insert-qdq")]
pub(crate) struct Args {
    /// Float model.
    pub(super) input: PathBuf,
    /// Where the quantized model goes.
    pub(super) output: PathBuf,
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the result will run: a name (ort-cpu, ort-cpu-vnni, tensorrt, generic) or a .toml profile.
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Samples: .npz, .npy, .jsonl, a folder of these or of .png, .jpg or .bin, `test_data_set` folders, `random`, `none`.
    #[arg(long, value_name = "PATH")]
    calib: Option<String>,
    #[command(flatten)]
    sampling: SampleArgs,
    /// Leave nodes whose name matches in float; may be repeated; `inspect --nodes` lists names.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Samples that run at once; results do not depend on it.
    #[arg(long, value_name = "N", value_parser = thread_count, allow_negative_numbers = true)]
    threads: Option<usize>,
    /// Write what was done as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Quantize every planned tensor, however badly its range serves it.
    #[arg(long)]
    no_guard: bool,
    /// Do not run the result on held-out samples.
    #[arg(long)]
    no_measure: bool,
    /// Print the model as text after this pass, or after `all`.
    #[arg(long, value_name = "PASS", help_heading = "Passes")]
    print_after: Vec<String>,
    /// Stop after this pass and write the model as it is then.
    #[arg(long, value_name = "PASS", help_heading = "Passes")]
    stop_after: Option<String>,
    /// Run only these passes, separated by commas.
    #[arg(long, value_name = "LIST", help_heading = "Passes")]
    passes: Option<String>,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let begun = Instant::now();
    for name in args.print_after.iter().filter(|n| *n != "all").chain(&args.stop_after) {
        pipeline::parse_pipeline(name)?;
    }
    let passes = args.passes.as_deref().map(pipeline::parse_pipeline).transpose()?;
    let mut config = match &args.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    config.exclude.extend(args.exclude.iter().cloned());
    config.guard.enabled &= !args.no_guard;
    let target = match (&args.target, &config.target, &args.config) {
        (None, Some(name), Some(path)) => Target::load(name).map_err(|e| e.in_file(path))?,
        (Some(name), ..) | (None, Some(name), None) => Target::load(name)?,
        (None, None, _) => Target::load(targets::DEFAULT)?,
    };
    let model = file::load(&args.input)?;
    file::check_output(&model, &args.output)?;
    check_paths(args, &model)?;
    let samples = args.sampling.samples(args.calib.as_deref(), &model, &args.input, console)?;
    if samples.is_none() {
        let beside = args.input.with_extension("calib.npz");
        console.say(&if args.calib.is_some() {
            "note: no samples: weights are quantized, activations stay float".to_owned()
        } else {
            format!(
                "note: no samples: weights are quantized, activations stay float\n      \
                 pass --calib PATH, or put samples at {}",
                beside.display()
            )
        });
    }
    let after = |model: &Model, pass: &str, _: &Outcome| {
        if args.print_after.iter().any(|p| p == "all" || p == pass) {
            print(&format!("// after {pass}\n{}\n", text::print(model)))?;
        }
        let stop = args.stop_after.as_deref() == Some(pass);
        Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    };
    let request = Request {
        config: &config,
        target: &target,
        plan: None,
        samples: samples.as_ref(),
        threads: threads(args.threads),
        progress: console,
        evaluate: &amax::runtime::TractEvaluate,
        passes: passes.as_deref(),
        after: &after,
        measure: !args.no_measure,
    };
    let mut done = rewrite(&model, &request).map_err(|e| in_file(e, args))?;
    if amax::calibrate::Progress::interrupted(console) {
        return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
    }
    done.report.bytes = (file::estimated_size(&model), file::estimated_size(&done.model));
    // The report is complete before the model appears, so that either both are there or neither is.
    let report = args.report.as_deref().map(|path| staged(path, &done.report)).transpose()?;
    let writing = Instant::now();
    file::save(&done.model, &args.output)?;
    if let (Some(report), Some(path)) = (report, &args.report) {
        report.persist(path).map_err(|e| Error::io(Kind::Output, "write", path, e.error))?;
    }
    done.report.seconds.push(("write".to_owned(), writing.elapsed().as_secs_f64()));
    if done.stopped {
        console.say(&format!("stopped; wrote {}", args.output.display()));
        return Ok(());
    }
    console.say(summary::text(args, &done.report, console.verbose, begun).trim_end());
    for warning in summary::warnings(&done.model, &done.report, console.verbose) {
        console.say(&format!("warning: {warning}"));
    }
    Ok(())
}

/// Refuses to write over a file that is read, or one file twice, before any work is done.
fn check_paths(args: &Args, model: &Model) -> Result<()> {
    let mut written = vec![("model", args.output.as_path())];
    if let Some(path) = &args.report {
        file::check_output(model, path)?;
        if place(path) == place(&args.output) {
            return Err(Error::new(Kind::Usage, format!("{} cannot be model and report", path.display()))
                .with_hint("give --report another file"));
        }
        written.push(("report", path));
    }
    for read in [&args.config, &calib(args)].into_iter().flatten().chain(args.sampling.files()) {
        if let Some((what, path)) = written.iter().find(|(_, path)| place(path) == place(read)) {
            let message =
                format!("cannot write the {what} to {}: samples or configuration are read from it", path.display());
            return Err(Error::new(Kind::Output, message).with_hint("write to another file"));
        }
    }
    Ok(())
}

/// Names the file that an error is about, where the line itself knows only tensors.
fn in_file(error: Error, args: &Args) -> Error {
    match error.kind() {
        Kind::Model | Kind::Runtime => error.in_file(&args.input),
        Kind::Samples => match calib(args) {
            Some(path) => error.in_file(&path),
            None => error,
        },
        _ => error,
    }
}

/// Where samples are read from.
fn calib(args: &Args) -> Option<PathBuf> {
    match args.calib.as_deref() {
        Some("none" | "random") => None,
        Some(given) => Some(PathBuf::from(given)),
        None => amax::samples::default_path(&args.input),
    }
}

/// A path without links and detours, whether or not its file is there.
fn place(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    path.canonicalize()
        .or_else(|_| folder.canonicalize().map(|f| f.join(path.file_name().unwrap_or_default())))
        .unwrap_or_else(|_| path.to_owned())
}

/// A report in a temporary file beside its place.
fn staged(path: &Path, report: &Report) -> Result<NamedTempFile> {
    let fail = |e| Error::io(Kind::Output, "write", path, e);
    let json = serde_json::to_string_pretty(report)
        .map_err(|e| Error::new(Kind::Internal, format!("cannot print the report: {e}")))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".amax-report.").suffix(".tmp");
    // The default of temporary files is private; the kernel takes the umask off this.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(|e| fail(file::without_path(e)))?;
    file.write_all((json + "\n").as_bytes()).map_err(fail)?;
    Ok(file)
}
