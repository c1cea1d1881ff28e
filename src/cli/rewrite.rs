//! `amax rewrite`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use amax::Prices;
use amax::config::Config;
use amax::error::{Error, Kind, Result};
use amax::ir::file::{External, SaveOptions};
use amax::ir::{Model, content_hash, file, text};
use amax::observe::Memory;
use amax::onnx::DataType;
use amax::passes::Outcome;
use amax::passes::pipeline::{self, After};
use amax::plan::Plan;
use amax::reason::Reason;
use amax::report::{Report, page, text as summary};
use amax::rewrite::{Rewrite, Rewritten, Verify, split};
use amax::runtime::Runtime;
use amax::samples::SampleSet;
use amax::statistics::Statistics;

use super::calibrate::warn_of_missing;
use super::depfile;
use super::inspect::print;
use super::output::{Destination, Pending, save_model, scratch, stage};
use super::{Console, RunArgs, SampleArgs, budget, configure, float_type, memory_size, set_inputs};

/// What `amax prepare --help` ends with.
pub(crate) const PREPARE_HELP: &str =
    "All decisions and scales are those of rewrite, and amax convert of the result stores
the same integers as rewrite. Until then weights are float initializers followed by a
QuantizeLinear, and scales per token (preset 8da4w) are computed by operators.

Examples:
  amax prepare model.onnx fake.onnx --calib samples.npz
  amax prepare model.onnx fake.onnx --preset 8da4w
  amax prepare model.onnx fake.onnx --disable '/head/*'
  amax convert fake.onnx out.onnx --check";

/// Arguments of `amax rewrite`.
#[derive(clap::Args)]
#[command(after_help = "Samples are real inputs of the model. Without --calib, model.calib.npz beside
model.onnx is used if it exists. Without samples, only weights are quantized.
A .npz has one array per input, by name. An array with one axis more than its
input holds one sample per row: np.savez(path, image=images[:, None]).

Examples:
  amax rewrite model.onnx out.onnx
  amax rewrite model.onnx out.onnx --calib samples.npz --report report.json
  amax rewrite model.onnx out.onnx --calib test_data/ --target tensorrt
  amax rewrite model.onnx out.onnx --exclude '/head/*' --exclude last_conv
  amax rewrite model.onnx out.onnx --effective-bits 4.8
  amax rewrite model.onnx out.onnx --check 'python eval.py {}' --drop 0.5%
  amax rewrite model.onnx out.onnx --calib none
  amax rewrite model.onnx out.onnx --preset nvfp4 --simulate
  amax rewrite silero_vad.onnx out.onnx --set-input sr=16000
  amax rewrite model.onnx out.onnx --stop-after insert-qdq")]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct Args {
    /// Float model.
    input: PathBuf,
    #[command(flatten)]
    output: Destination,
    #[command(flatten)]
    configure: configure::Args,
    #[command(flatten)]
    budget: budget::Limits,
    #[command(flatten)]
    judged: budget::Judged,
    /// Apply this plan instead of computing one; amax plan -o writes it.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Write the plan that was applied, without what the guard took out.
    #[arg(long, value_name = "FILE")]
    save_plan: Option<PathBuf>,
    /// Samples: .npz, .npy or .jsonl; a folder of these or of .png, .jpg or .bin; test_data_set folders; random; none;
    /// - for a stream on stdin.
    #[arg(long, value_name = "PATH")]
    calib: Option<PathBuf>,
    #[command(flatten)]
    sampling: SampleArgs,
    /// Take ranges from these statistics of calibrate or merge; samples then measure the result.
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// Turn an input of the model into a constant; repeatable. VALUE is a number, true, false, or lists: [1, 2].
    #[arg(long, value_name = "NAME=VALUE")]
    set_input: Vec<String>,
    #[command(flatten)]
    run: RunArgs,
    /// Memory limit, such as 2GB: fewer samples run at once, and larger models run in segments.
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    max_memory: Option<u64>,
    /// Write weights to OUTPUT.data beside the model, even if the input has no such file and the model is below 2 GB.
    #[arg(long)]
    external_data: bool,
    /// Store and compute what stays float in float16 or bfloat16, but for norms, softmax and the like. Inputs and outputs keep
    /// their types.
    #[arg(long, value_name = "TYPE", value_parser = float_type)]
    dtype: Option<DataType>,
    /// Write quantizers as float operators with the same results, to study any format on any runtime.
    #[arg(long)]
    simulate: bool,
    /// Write a rule for make or ninja with every file that was read.
    #[arg(long, value_name = "FILE")]
    depfile: Option<PathBuf>,
    /// Fail, and write nothing, if less of the bytes of weights is quantized, such as 90%.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    min_coverage: Option<f64>,
    /// Fail if there are no samples.
    #[arg(long)]
    require_samples: bool,
    /// Write a report as JSON, or as a page to look at if the name ends in .html.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Do not measure the result on held-out samples.
    #[arg(long)]
    no_measure: bool,
    /// Run the result as deployed, in onnxruntime with its optimizer: auto where one is found (in builds with the feature
    /// ort), on, off.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = verify)]
    verify: Verify,
    /// Print the model as text after this pass, or after all.
    #[arg(long, value_name = "PASS", help_heading = "Passes")]
    print_after: Vec<String>,
    /// Stop after this pass and write the model as it is.
    #[arg(long, value_name = "PASS", help_heading = "Passes")]
    stop_after: Option<String>,
    /// Run only these passes, separated by commas.
    #[arg(long, value_name = "LIST", help_heading = "Passes")]
    passes: Option<String>,
}

#[allow(clippy::redundant_closure_for_method_calls, reason = "the method itself is for one lifetime only")]
pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    quantize(args, console, |rewrite| rewrite.run())
}

/// `amax prepare`: the same, but for weights that stay float.
#[allow(clippy::redundant_closure_for_method_calls, reason = "the method itself is for one lifetime only")]
pub(crate) fn run_prepare(args: &Args, console: &Console) -> Result<()> {
    quantize(args, console, |rewrite| rewrite.prepare())
}

fn quantize(args: &Args, console: &Console, finish: fn(&Rewrite<'_>) -> Result<Rewritten>) -> Result<()> {
    let begun = Instant::now();
    for name in args.print_after.iter().filter(|n| *n != "all").chain(&args.stop_after) {
        pipeline::parse_pipeline(name)?;
    }
    let passes = args.passes.as_deref().map(pipeline::parse_pipeline).transpose()?;
    let (mut config, target) = args.configure.load()?;
    args.budget.apply(&mut config)?;
    let prices = args.budget.sensitivity.as_deref().map(Prices::load).transpose()?;
    let target = if args.simulate { target.simulated() } else { target };
    let plan = args.plan.as_deref().map(Plan::load).transpose()?;
    let mut model = file::load(&args.input)?;
    check_paths(args, &model, &config, None)?;
    let scratch = scratch(&args.output);
    model.spill_beside(&scratch.join("model"));
    if args.run.runtime != Runtime::default() {
        args.run.runtime.load()?;
    }
    if args.verify == Verify::On {
        Runtime::Ort.load()?;
    }
    let calib = args.calib.as_deref();
    let samples = set_inputs(&mut model, &args.set_input, &args.sampling, calib, &args.input, console)?;
    if args.require_samples && samples.is_none() {
        let hint = "pass --calib PATH, or put them beside the model: MODEL.calib.npz";
        return Err(Error::new(Kind::Usage, "there are no samples, which --require-samples asks for").with_hint(hint));
    }
    check_paths(args, &model, &config, samples.as_ref())?;
    let statistics = args.stats.as_deref().map(Statistics::load).transpose()?;
    if let (Some(statistics), Some(path)) = (&statistics, &args.stats) {
        statistics.check_model(&content_hash(&model)).map_err(|e| e.in_file(path))?;
        warn_of_missing(statistics, console);
        if let Some(samples) = samples.as_ref().filter(|_| !args.no_measure)
            && samples.content_hash()? == statistics.samples_hash
            && split(samples).1.iter().any(|&i| statistics.ran.contains(&(i as u32)))
        {
            console.say(
                "note: the result is measured on samples that its ranges come from\n      \
                 amax calibrate --hold-out keeps them apart",
            );
        }
    }
    let after = |model: &Model, pass: &str, _: &Outcome| {
        if args.print_after.iter().any(|p| p == "all" || p == pass) {
            print(&format!("// after {pass}\n{}\n", text::print(model)))?;
        }
        let stop = args.stop_after.as_deref() == Some(pass);
        Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    };
    let shown: &After<'_> = &after;
    let rewrite = Rewrite::new(&model)
        .config(&config)
        .target(&target)
        .prices(prices.as_ref())
        .plan(plan.as_ref())
        .samples(samples.as_ref())
        .statistics(statistics.as_ref())
        .runtime(args.run.runtime)
        .threads(args.run.threads())
        .timeout(args.run.timeout)
        .memory(Memory { limit: args.max_memory, folder: Some(&scratch), ..Memory::default() })
        .progress(console)
        .keep_inputs(args.configure.keeps_inputs())
        .dtype(args.dtype)
        .passes(passes.as_deref())
        .after((!args.print_after.is_empty() || args.stop_after.is_some()).then_some(shown))
        .measure(!args.no_measure)
        .verify(args.verify);
    let done = args.judged.with(&scratch, console, |check| finish(&rewrite.check(check)));
    let mut done = done.map_err(|e| in_file(e, args))?;
    if amax::observe::Progress::interrupted(console) {
        return Err(Error::interrupted());
    }
    if let Some(least) = args.min_coverage {
        cover(&done.report, least)?;
    }
    // The report is complete before the model appears, so that either both are there or neither is.
    let report = args.report.as_deref().map(|path| staged(path, &done.report)).transpose()?;
    let saved_plan = match (&args.save_plan, &done.plan) {
        (Some(path), Some(plan)) => Some(stage(path, plan.to_json()?)?),
        _ => None,
    };
    let rule = |path| {
        stage(path, depfile::rule(&args.output, read(args, &model, &config, samples.as_ref()).map(|(_, path)| path)))
    };
    let rule = args.depfile.as_deref().map(rule).transpose()?;
    let writing = Instant::now();
    let external = if args.external_data { External::Always } else { External::Auto };
    let options = SaveOptions { external, ..SaveOptions::default() };
    save_model(&done.model, &args.output, &options, &|| amax::observe::Progress::interrupted(console))?;
    for pending in report.into_iter().chain(saved_plan).chain(rule) {
        pending.keep()?;
    }
    done.report.seconds.push(("write".to_owned(), writing.elapsed().as_secs_f64()));
    if done.stopped {
        console.say(&format!("stopped; wrote {}", args.output.display()));
        return Ok(());
    }
    let waits = |w: &amax::plan::Weight| {
        let Reason::FloatWeight { because: Some(why), .. } = &w.why else { return false };
        let why = if let Reason::Dequantized { because, .. } = &**why { because } else { why };
        **why == Reason::WithoutSamples
    };
    if samples.is_none() && statistics.is_none() && done.plan.iter().flat_map(|p| &p.weights).any(waits) {
        let beside = args.input.with_extension("calib.npz");
        if args.calib.is_some() {
            console.say("note: no samples: weights are quantized, activations stay float");
        } else {
            console.insist(&format!(
                "note: no samples: weights are quantized, activations stay float\n      \
                 pass --calib PATH, or put samples at {}",
                beside.display()
            ));
        }
    }
    let said = summary::text(&done.report, console.verbose, begun.elapsed().as_secs_f64());
    console.say(&format!("{} -> {}\n{}", args.input.display(), args.output.display(), said.trim_end()));
    for warning in summary::warnings(&done.report, console.verbose) {
        console.say(&format!("warning: {warning}"));
    }
    Ok(())
}

/// Reads the value of `--verify`.
fn verify(text: &str) -> Result<Verify, String> {
    match text {
        "auto" => Ok(Verify::Auto),
        "on" => Ok(Verify::On),
        "off" => Ok(Verify::Off),
        _ => Err("auto, on or off is needed".to_owned()),
    }
}

/// Refuses to write over a file that is read, or one file twice, before any work is done.
fn check_paths(args: &Args, model: &Model, config: &Config, samples: Option<&SampleSet>) -> Result<()> {
    let mut written = vec![("the model", &*args.output)];
    written.extend(args.report.iter().map(|path| ("the report", path.as_path())));
    written.extend(args.depfile.iter().map(|path| ("the rule", path.as_path())));
    written.extend(args.save_plan.iter().map(|path| ("the plan", path.as_path())));
    written.extend((!args.print_after.is_empty()).then_some(("--print-after", Path::new(file::STDOUT))));
    file::check_outputs(read(args, model, config, samples), &written)
}

/// Every file that is read, and what it is.
fn read<'a>(
    args: &'a Args,
    model: &'a Model,
    config: &Config,
    samples: Option<&'a SampleSet>,
) -> impl Iterator<Item = (&'static str, PathBuf)> + 'a {
    let configured = args.configure.files(config).into_iter();
    configured
        .chain(args.budget.sensitivity.iter().map(|path| ("the sensitivity", path.clone())))
        .chain(args.plan.iter().map(|path| ("the plan", path.clone())))
        .chain(args.stats.iter().map(|path| ("the statistics", path.clone())))
        .chain(file::inputs(model).map(|path| ("the model", path.clone())))
        .chain(samples.into_iter().flat_map(SampleSet::files).map(|path| ("the samples", path)))
}

/// Fails where too much of the weights stays float.
fn cover(report: &Report, least: f64) -> Result<()> {
    let (left, all) = report.float_bytes;
    let covered = 1.0 - left as f64 / all.max(1) as f64;
    if covered >= least {
        return Ok(());
    }
    let (covered, least) = (covered * 100.0, least * 100.0);
    let message =
        format!("{covered:.1} % of the bytes of weights are quantized, less than the {least:.1} % of --min-coverage");
    Err(Error::new(Kind::Check, message).with_hint("amax plan names what stays float, and why; nothing was written"))
}

/// Reads the value of `--min-coverage`.
fn share(text: &str) -> Result<f64, String> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let share = text.strip_suffix('%').map_or_else(|| number(text), |text| number(text).map(|percent| percent / 100.0));
    share.filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "a share is needed, such as 90% or 0.9".to_owned())
}

/// Names the file that an error is about, where the pipeline itself knows only tensors.
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
    match &args.calib {
        Some(given) => Some(given.clone()).filter(|given| !matches!(given.to_str(), Some("none" | "random" | "-"))),
        None => amax::samples::default_path(&args.input),
    }
}

/// A report that has yet to appear.
fn staged<'a>(path: &'a Path, report: &Report) -> Result<Pending<'a>> {
    let json = serde_json::to_string_pretty(report)
        .map_err(|e| Error::new(Kind::Internal, format!("cannot print the report: {e}")))?;
    let html = path.extension().is_some_and(|e| e == "html");
    stage(path, if html { page::html(&json) } else { json + "\n" })
}
