//! `amax calibrate`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use amax::algorithms::sufficiency::{Choice, Sufficiency, sufficiency};
use amax::calibrate::Calibrate;
use amax::config::Config;
use amax::error::{Error, Kind, Result};
use amax::ir::{Model, file};
use amax::nearest::nearest;
use amax::numerics::RangeSpec;
use amax::observe::Memory;
use amax::observe::calibrate::Checkpoint;
use amax::quant::Observer;
use amax::samples::SampleSet;
use amax::statistics::Statistics;
use amax::targets::Target;

use super::output::{save_statistics, scratch};
use super::{Console, RunArgs, SampleArgs, bytes, configure, count, inspect::print, memory_size, set_inputs, table};

/// Arguments of `amax calibrate`.
#[derive(clap::Args)]
#[command(
    after_help = "The file serves every configuration and target: it holds statistics of every float activation that
any plan might quantize. rewrite --stats takes its ranges from it instead of running the model.

Parts of the samples can run on several machines, each with access to all samples:
  amax calibrate model.onnx --calib samples/ -o a.safetensors --shard 1/2
  amax calibrate model.onnx --calib samples/ -o b.safetensors --shard 2/2
  amax merge a.safetensors b.safetensors -o stats.safetensors
The merged file is what a single run writes, byte for byte."
)]
pub(crate) struct Args {
    /// Float model.
    model: PathBuf,
    /// Where to write the statistics; - is stdout.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Samples, as for rewrite; default: the file beside the model.
    #[arg(long, value_name = "PATH")]
    calib: Option<PathBuf>,
    #[command(flatten)]
    sampling: SampleArgs,
    /// Turn an input of the model into a constant, as for rewrite; repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    set_input: Vec<String>,
    /// Observe only what the plan for --target and --config needs; the guard of rewrite may need more.
    #[arg(long)]
    planned: bool,
    /// For `--planned` and `--report`.
    #[command(flatten)]
    configure: configure::Args,
    /// Run the I-th of N parts of the samples: every N-th sample, from the I-th on.
    #[arg(long, value_name = "I/N", value_parser = shard)]
    shard: Option<(usize, usize)>,
    /// Leave out the samples that rewrite measures its result on.
    #[arg(long)]
    hold_out: bool,
    /// Continue an interrupted run of the same command, if there is one.
    #[arg(long)]
    resume: bool,
    /// Seconds between saves of the progress, beside the output.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    save_every: u64,
    #[command(flatten)]
    run: RunArgs,
    /// Memory limit, such as 2GB: fewer samples run at once, and larger models run in segments.
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    max_memory: Option<u64>,
    #[command(flatten)]
    judge: Judge,
}

/// How statistics are judged.
#[derive(clap::Args)]
pub(super) struct Judge {
    /// Print whether the samples were enough, and which samples each range depends on.
    #[arg(long)]
    pub(super) report: bool,
    /// Print the report as JSON, with every tensor.
    #[arg(long, requires = "report")]
    json: bool,
    /// Observer whose ranges are judged: minmax, mean, percentile[=99.999], mse[=2], entropy.
    #[arg(long, value_name = "NAME", default_value = "minmax", value_parser = observer)]
    observer: Observer,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let begun = Instant::now();
    args.run.runtime.load()?;
    let (config, target) = args.configure.load()?;
    let mut model = file::load(&args.model)?;
    let partial = partial(&args.output);
    check_paths(args, &model, &config, &partial, None)?;
    let calib = args.calib.as_deref();
    let samples = set_inputs(&mut model, &args.set_input, &args.sampling, calib, &args.model, console)?;
    let samples = samples.ok_or_else(|| {
        Error::new(Kind::Usage, "there are no samples to run").with_hint(format!(
            "pass --calib PATH, or put samples at {}",
            args.model.with_extension("calib.npz").display()
        ))
    })?;
    check_paths(args, &model, &config, &partial, Some(&samples))?;
    let state = state(args, &partial, console)?;
    let already = state.as_ref().map_or(0, |state| state.ran.len());
    let kept = AtomicUsize::new(already);
    let save = |state: &Statistics| {
        kept.store(state.ran.len(), Ordering::Relaxed);
        if state.ran.is_empty() { Ok(()) } else { state.save(&partial) }
    };
    let scratch = scratch(&args.output);
    let mut calibration = Calibrate::new(&model, &samples)
        .hold_out(args.hold_out)
        .shard(args.shard)
        .resume(state.as_ref().map(|state| (state, partial.as_path())))
        .checkpoint(Checkpoint { every: Duration::from_secs(args.save_every.max(1)), save: &save })
        .runtime(args.run.runtime)
        .keep_inputs(args.configure.keeps_inputs())
        .threads(args.run.threads())
        .timeout(args.run.timeout)
        .memory(Memory { limit: args.max_memory, folder: Some(&scratch), ..Memory::default() })
        .progress(console);
    if args.planned {
        calibration = calibration.planned(&config, &target);
    }
    let count_all = calibration.indices().len();
    console.tell_memory();
    let statistics = calibration.run().map_err(|e| match e.kind() {
        Kind::Interrupted => interrupted(kept.load(Ordering::Relaxed), count_all, &partial),
        Kind::Model | Kind::Runtime => e.in_file(&args.model),
        _ => e,
    })?;
    save_statistics(&statistics, &args.output)?;
    // Whether it was there or not, nothing is left to continue.
    let _ = std::fs::remove_file(&partial);
    let seconds = begun.elapsed().as_secs_f64();
    let size = std::fs::metadata(&args.output).map_or(0, |m| m.len());
    console.say(&format!(
        "{} in {seconds:.1} s, {}, {} -> {}",
        count(count_all - already, "sample"),
        count(statistics.sites.len(), "tensor"),
        bytes(size),
        args.output.display()
    ));
    for warning in warnings(&statistics) {
        console.say(&format!("warning: {warning}"));
    }
    args.judge.print(&statistics, &target, console.verbose)
}

/// Refuses to write over a file that is read, or one file twice.
fn check_paths(args: &Args, model: &Model, config: &Config, partial: &Path, samples: Option<&SampleSet>) -> Result<()> {
    let mut read = args.configure.files(config);
    read.extend(file::inputs(model).map(|path| ("the model", path.clone())));
    read.extend(samples.iter().flat_map(|set| set.files()).map(|path| ("the samples", path)));
    let mut written = vec![("the statistics", args.output.as_path()), ("the progress", partial)];
    written.extend(args.judge.report.then_some(("--report", Path::new(file::STDOUT))));
    file::check_outputs(read, &written)
}

/// Where the state of an interrupted run is kept.
fn partial(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    output.with_file_name(name)
}

/// What an interrupted run left, if this one goes on from it.
fn state(args: &Args, partial: &Path, console: &Console) -> Result<Option<Statistics>> {
    if !partial.exists() {
        return Ok(None);
    }
    if args.resume {
        let bytes = std::fs::read(partial).map_err(|e| Error::io(Kind::Samples, "read", partial, e))?;
        let state = match Statistics::from_bytes(&bytes) {
            Ok(state) => state,
            Err(damage) => {
                let aside = partial.with_extension("damaged");
                std::fs::rename(partial, &aside).map_err(|e| Error::io(Kind::Output, "rename", partial, e))?;
                console.say(&format!(
                    "warning: {} is damaged, and is {} now; beginning again: {}",
                    partial.display(),
                    aside.display(),
                    damage.message()
                ));
                return Ok(None);
            }
        };
        console.say(&format!("continuing after {}", count(state.ran.len(), "sample")));
        return Ok(Some(state));
    }
    console.say(&format!("note: {} of an interrupted run is not used; --resume would continue it", partial.display()));
    Ok(None)
}

fn interrupted(kept: usize, all: usize, partial: &Path) -> Error {
    Error::new(
        Kind::Interrupted,
        match kept {
            0 => "interrupted before the first sample was done; nothing was written".to_owned(),
            _ => format!(
                "interrupted after {kept} of {}; progress is saved in {}\nhint: the same command with --resume continues",
                count(all, "sample"),
                partial.display()
            ),
        },
    )
}

/// Says so where statistics that should be whole are not.
pub(super) fn warn_of_missing(statistics: &Statistics, console: &Console) {
    let (missing, all) = (statistics.missing(), count(statistics.sample_total as usize, "sample"));
    if missing > 0 {
        console.say(&format!("warning: {missing} of {all} are in none of the parts: was a shard lost?"));
    }
}

/// What users should know about values.
pub(super) fn warnings(statistics: &Statistics) -> Vec<String> {
    let mut found = Vec::new();
    for (name, site) in &statistics.sites {
        if site.nan() + site.inf() > 0 {
            let samples = site.samples().iter().filter(|s| s.non_finite > 0);
            let first = samples.clone().next().map_or(0, |s| s.index);
            found.push(format!(
                "\"{name}\" was NaN {} and infinite {}, in {} (first {first}); its range ignores them",
                count(site.nan() as usize, "time"),
                count(site.inf() as usize, "time"),
                count(samples.count(), "sample"),
            ));
        }
    }
    found
}

impl Judge {
    /// Prints the report, if it was asked for.
    pub(super) fn print(&self, statistics: &Statistics, target: &Target, verbose: bool) -> Result<()> {
        if !self.report {
            return Ok(());
        }
        let spec = RangeSpec::new(target.activation.dtype, target.activation.symmetric);
        let found = sufficiency(statistics, |_, site| Some(Choice::new(site, self.observer, spec)));
        if self.json {
            let json = serde_json::to_string_pretty(&found)
                .map_err(|e| Error::new(Kind::Internal, format!("cannot print the report: {e}")))?;
            return print(&(json + "\n"));
        }
        print(&self.text(&found, verbose))
    }

    fn text(&self, found: &Sufficiency, verbose: bool) -> String {
        const MOST: usize = 10;
        let mut order: Vec<_> = found.sites.iter().collect();
        order.sort_by(|a, b| b.1.moves.total_cmp(&a.1.moves).then_with(|| a.0.cmp(b.0)));
        let heads = ["tensor", "min", "sample", "max", "sample", "narrower without one", "growth", "clipped"];
        let mut lines = vec![heads.map(str::to_owned).to_vec()];
        for (name, site) in order.iter().take(if verbose { usize::MAX } else { MOST }) {
            let percent = |share: f64| format!("{:.2} %", share * 100.0);
            let ends = [site.min, site.max].map(|end| {
                end.map_or_else(|| ["-", "-"].map(str::to_owned), |e| [format!("{:.5}", e.value), e.sample.to_string()])
            });
            let mut line = vec![(*name).clone()];
            line.extend(ends.into_iter().flatten());
            line.extend([site.moves, site.growth, site.clipped].map(percent));
            lines.push(line);
        }
        let mut out = table(&lines, &[1, 2, 3, 4, 5, 6, 7]);
        if order.len() > MOST && !verbose {
            out.push_str(&format!("  and {} more stable ones (--verbose lists them)\n", order.len() - MOST));
        }
        for name in &found.dead {
            out.push_str(&format!("  \"{name}\" is always zero\n"));
        }
        let channels: Vec<_> = order.iter().filter(|(_, s)| !s.dead && !s.dead_channels.is_empty()).collect();
        if !channels.is_empty() {
            let dead: usize = channels.iter().map(|(_, s)| s.dead_channels.len()).sum();
            let all: usize = channels.iter().filter_map(|(_, s)| s.channels).sum();
            let tensors = count(channels.len(), "tensor");
            out.push_str(&format!("  {dead} of {all} channels are always zero, in {tensors}\n"));
            for (name, site) in channels.iter().take(if verbose { usize::MAX } else { 3 }) {
                out.push_str(&format!(
                    "    \"{name}\": {} of {}\n",
                    site.dead_channels.len(),
                    site.channels.unwrap_or(0)
                ));
            }
        }
        for (name, why) in &found.unobserved {
            out.push_str(&format!("  \"{name}\" was not observed: {why}\n"));
        }
        let all =
            if found.samples < found.samples_total { format!(" of {}", found.samples_total) } else { String::new() };
        out.push_str(&format!(
            "{}{all}, {}: {}\n",
            count(found.samples as usize, "sample"),
            self.observer.kind().name(),
            found.verdict
        ));
        out
    }
}

/// Reads the value of `--shard`.
fn shard(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parsed {
        Some((part, parts)) if (1..=parts).contains(&part) => Ok((part, parts)),
        _ => Err("expected I/N with I from 1 to N, such as 1/4".to_owned()),
    }
}

/// Reads the value of `--observer`.
fn observer(text: &str) -> Result<Observer, String> {
    let (name, number) = text.split_once('=').map_or((text, None), |(name, number)| (name, Some(number)));
    let number = |default: f64| match number {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| format!("\"{text}\" is not a number")),
    };
    let observer = match name {
        "percentile" => Observer::Percentile(number(Observer::PERCENT)?),
        "mse" => Observer::Mse(number(Observer::POWER)?),
        "minmax" | "mean" | "entropy" if text != name => return Err(format!("{name} takes no number")),
        "minmax" => Observer::MinMax,
        "mean" => Observer::Mean,
        "entropy" => Observer::Entropy,
        _ => {
            let names = ["minmax", "mean", "percentile", "mse", "entropy"];
            return Err(nearest(name, names).map_or_else(
                || format!("observers are {}", names.join(", ")),
                |near| format!("did you mean {near}?"),
            ));
        }
    };
    observer.check().map_err(|e| e.message().to_owned())?;
    Ok(observer)
}
