//! `amax rewrite`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use amax::config::Config;
use amax::error::{Error, Kind, Result};
use amax::ir::{Model, file, text};
use amax::passes::Outcome;
use amax::passes::pipeline;
use amax::plan::Skip;
use amax::report::Report;
use amax::rewrite::{Request, rewrite};
use amax::targets::{self, Target};

use super::{Console, bytes, decibels, samples, table, threads};

/// Arguments of `amax rewrite`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  amax rewrite model.onnx model.int8.onnx                        samples from model.calib.npz, if that is there
  amax rewrite model.onnx model.int8.onnx --calib samples.npz    arrays keyed by input; one more axis than the input: a sample a row
  amax rewrite model.onnx model.int8.onnx --calib test_data/     a folder of .npz, or ONNX test_data_set_* folders
  amax rewrite model.onnx out.onnx --exclude '/head/*' --target tensorrt
  amax rewrite model.onnx out.onnx --print-after insert-qdq --stop-after insert-qdq")]
pub(crate) struct Args {
    /// Float model.
    input: PathBuf,
    /// Where the quantized model goes.
    output: PathBuf,
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the result will run: a name (ort-cpu, ort-cpu-vnni, tensorrt, generic) or a .toml profile.
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Samples: .npz, .npy, a folder of .npz, test_data_set folders, or `random`.
    #[arg(long, value_name = "PATH")]
    calib: Option<String>,
    /// Leave nodes whose name matches this glob in float; may be repeated.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Samples that run at once; results do not depend on it.
    #[arg(long, value_name = "N")]
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
    let target = Target::load(args.target.as_deref().or(config.target.as_deref()).unwrap_or(targets::DEFAULT))?;
    let model = file::load(&args.input)?;
    file::check_output(&model, &args.output)?;
    let samples = samples(args.calib.as_deref(), &model, &args.input, console)?;
    if samples.is_none() {
        let beside = args.input.with_extension("calib.npz");
        console.say(&format!(
            "note: no samples, so weights are quantized and activations stay float; pass --calib PATH, or put {} there",
            beside.display()
        ));
    }
    let after = |model: &Model, pass: &str, _: &Outcome| {
        if args.print_after.iter().any(|p| p == "all" || p == pass) {
            println!("// after {pass}\n{}", text::print(model));
        }
        let stop = args.stop_after.as_deref() == Some(pass);
        Ok(if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    };
    let request = Request {
        config: &config,
        target: &target,
        samples: samples.as_ref(),
        threads: threads(args.threads),
        progress: console,
        evaluate: &amax::runtime::TractEvaluate,
        passes: passes.as_deref(),
        after: &after,
        measure: !args.no_measure,
    };
    let mut done = rewrite(&model, &request)?;
    if amax::calibrate::Progress::interrupted(console) {
        return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
    }
    let writing = Instant::now();
    file::save(&done.model, &args.output)?;
    done.report.bytes = (file::estimated_size(&model), file::estimated_size(&done.model));
    done.report.seconds.push(("write".to_owned(), writing.elapsed().as_secs_f64()));
    if let Some(path) = &args.report {
        let json = serde_json::to_string_pretty(&done.report)
            .map_err(|e| Error::new(Kind::Internal, format!("cannot write the report: {e}")))?;
        std::fs::write(path, json + "\n").map_err(|e| Error::io(Kind::Output, "write", path, e))?;
    }
    for warning in &done.report.warnings {
        console.say(&format!("warning: {warning}"));
    }
    if done.stopped {
        console.say(&format!("stopped; wrote {}", args.output.display()));
    } else {
        console.say(summary(args, &done.report, console.verbose, begun).trim_end());
    }
    Ok(())
}

/// The table that a user reads.
fn summary(args: &Args, report: &Report, verbose: bool, begun: Instant) -> String {
    let mut out = format!(
        "{} -> {}\ntarget {}, operator set {}\n",
        args.input.display(),
        args.output.display(),
        report.target,
        if report.opset.0 == report.opset.1 {
            report.opset.0.to_string()
        } else {
            format!("{} -> {}", report.opset.0, report.opset.1)
        }
    );
    out.push_str("\nquantized\n");
    let mut rows = Vec::new();
    for (op, (some, all)) in &report.operators {
        rows.push(vec![format!("{some}/{all}"), op.clone()]);
    }
    if rows.is_empty() {
        rows.push(vec!["nothing".to_owned()]);
    }
    out.push_str(&table(&rows, &[0]));
    let dynamic = report.activations.iter().filter(|a| a.mode == "dynamic").count();
    let weight_bytes: usize = report.weights.len();
    out.push_str(&format!(
        "  {} activation tensors{}, {} constants\n",
        report.activations.len(),
        if dynamic > 0 { format!(" ({dynamic} ranged at run time)") } else { String::new() },
        weight_bytes
    ));
    if !report.skipped.is_empty() {
        out.push_str("\nleft float\n");
        out.push_str(&skips(&report.skipped, verbose));
    }
    if verbose {
        out.push_str(&details(report));
    }
    let (before, after) = report.bytes;
    out.push_str(&format!(
        "\nbytes    {} -> {} ({:.0} %)\n",
        bytes(before),
        bytes(after),
        after as f64 / before.max(1) as f64 * 100.0
    ));
    if let Some(samples) = &report.samples {
        let (used, held) = report.sample_counts;
        out.push_str(&format!("samples  {samples}: {used} for ranges, {held} held out\n"));
    }
    for (i, row) in report.quality.iter().enumerate() {
        let head = if i == 0 { "quality" } else { "" };
        out.push_str(&format!(
            "{head:8} {}: SQNR {}, cosine {:.5}, largest error {:.4}\n",
            row.output,
            decibels(row.sqnr_db),
            row.cosine,
            row.max_abs_error
        ));
    }
    let stages: Vec<String> = report.seconds.iter().map(|(s, t)| format!("{s} {t:.2}")).collect();
    out.push_str(&format!("seconds  {:.2} ({})\n", begun.elapsed().as_secs_f64(), stages.join(", ")));
    out
}

/// Skips, those of one operator and reason in one line.
fn skips(skipped: &[Skip], verbose: bool) -> String {
    let mut groups: BTreeMap<(&str, &str), (usize, u64, Vec<&str>)> = BTreeMap::new();
    for skip in skipped {
        let group = groups.entry((&skip.op, &skip.why)).or_default();
        group.0 += 1;
        group.1 += skip.bytes;
        group.2.push(&skip.node);
    }
    let mut lines: Vec<_> = groups.into_iter().collect();
    lines.sort_by_key(|((op, why), (_, bytes, _))| (std::cmp::Reverse(*bytes), *op, *why));
    let limit = if verbose { usize::MAX } else { 16 };
    let rest = lines.len().saturating_sub(limit);
    let rows: Vec<Vec<String>> = lines
        .into_iter()
        .take(limit)
        .map(|((op, why), (count, size, nodes))| {
            let names = if verbose && !nodes.is_empty() { format!(": {}", nodes.join(", ")) } else { String::new() };
            let size = if size > 0 { bytes(size) } else { String::new() };
            vec![count.to_string(), op.to_owned(), size, format!("{why}{names}")]
        })
        .collect();
    let mut out = table(&rows, &[0, 2]);
    if rest > 0 {
        out.push_str(&format!("  … and {rest} more lines; -v or --report shows them\n"));
    }
    out
}

/// Every quantized tensor.
fn details(report: &Report) -> String {
    let mut rows = Vec::new();
    for a in &report.activations {
        let range = a.range.map_or_else(|| "at run time".to_owned(), |(l, h)| format!("[{l:.4}, {h:.4}]"));
        let quality = a.sqnr_db.map(decibels).unwrap_or_default();
        rows.push(vec![a.tensor.clone(), a.dtype.to_owned(), range, quality, a.why.clone()]);
    }
    for w in &report.weights {
        let scales = format!("{} scale{}", w.scales, if w.scales == 1 { "" } else { "s" });
        let safe = if w.pair_safe { "pair-safe" } else { "" };
        rows.push(vec![w.site.clone(), w.dtype.to_owned(), scales, decibels(w.sqnr_db), safe.to_owned()]);
    }
    format!("\ntensors\n{}", table(&rows, &[3]))
}
