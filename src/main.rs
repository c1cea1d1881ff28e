//! The command line. Nothing else prints or exits.

#![allow(clippy::doc_markdown, reason = "clap prints these comments as they are")]

mod cli;

use std::process::ExitCode;

use amax::error::Kind;
use clap::{Parser, Subcommand};

/// Compiles a float ONNX model into one that runs on integers.
#[derive(Parser)]
#[command(
    name = "amax",
    version,
    arg_required_else_help = true,
    after_help = "Examples:
  amax rewrite model.onnx model.int8.onnx --calib samples.npz
  amax rewrite model.onnx model.int8.onnx --exclude '/head/*' --report r.json
  amax inspect model.onnx
  amax compare model.onnx model.int8.onnx --calib samples.npz
  amax calibrate model.onnx --calib samples.npz -o stats.safetensors --report
  amax rewrite model.onnx model.int8.onnx --stats stats.safetensors

Exit codes:
  0  done                               5  the runtime cannot run the model
  1  a bug in amax                      6  the output cannot be written
  2  command line or configuration      7  a check failed
  3  model                            130  interrupted
  4  samples"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print errors only.
    #[arg(long, short, global = true, display_order = 998)]
    quiet: bool,
    /// Read external data also from hard links, which may be files of elsewhere.
    #[arg(long, global = true, display_order = 998)]
    allow_hard_links: bool,
    /// Form of errors: text, or json, one line each.
    #[arg(
        long,
        global = true,
        display_order = 998,
        value_name = "FORM",
        default_value = "text",
        hide_default_value = true,
        hide_possible_values = true
    )]
    error_format: cli::ErrorFormat,
    /// Print every decision, not only a summary.
    #[arg(long, short, global = true, display_order = 998)]
    verbose: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Quantize a model: plan, calibrate, insert Q/DQ, fold weights, check, write.
    #[command(visible_alias = "quantize")]
    Rewrite(Box<cli::rewrite::Args>),
    /// Insert fake-quantization (Q/DQ) nodes where rewrite would quantize; weights stay float.
    #[command(after_help = cli::rewrite::PREPARE_HELP)]
    Prepare(Box<cli::rewrite::Args>),
    /// Fold fake-quantized weights to integers, and change how a quantized model is stored.
    #[command(alias = "fold")]
    Convert(cli::convert::Args),
    /// Summarize a model, or print it as text.
    Inspect(cli::inspect::Args),
    /// Show every decision about a model without running it, or write them as a plan to edit.
    Plan(cli::plan::Args),
    /// Show for each site which rules apply and how it is quantized.
    Explain(cli::explain::Args),
    /// Run a model on samples and save statistics of its tensors, for rewrite --stats.
    Calibrate(cli::calibrate::Args),
    /// Merge calibration statistics of several shards.
    Merge(cli::merge::Args),
    /// Run two models on the same samples and compare their outputs.
    Compare(cli::compare::Args),
    /// Measure what each format of each weight costs at the outputs.
    Sensitivity(cli::sensitivity::Args),
    /// Run two models in onnxruntime as deployed: error, kernels, latency, size.
    Verify(cli::verify::Args),
    /// Say in what two quantized models differ: operators, formats, scales.
    Diff(cli::diff::Args),
    /// List the named configurations, or print one as TOML to start from.
    Presets(cli::presets::Args),
    /// Extract scales and zero points from a quantized model, as a configuration.
    #[command(after_help = "Examples:
  amax scales model.int8.onnx --output scales.json
  amax rewrite finetuned.onnx finetuned.int8.onnx --config scales.json")]
    Scales(cli::scales::Args),
    /// Print completions for a shell.
    Completions(cli::shell::Completions),
    /// Write manual pages.
    Man(cli::shell::Man),
    /// Print the configuration's JSON Schema, or convert another tool's configuration.
    Config(cli::config::Args),
}

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(cli::admit));
    // The hook has told the user; what is left to do is to leave with the exit code that says so.
    std::panic::catch_unwind(run).unwrap_or(ExitCode::from(Kind::Internal.exit_code()))
}

fn run() -> ExitCode {
    let Cli { command, quiet, verbose, allow_hard_links, error_format } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return cli::refuse(&error),
    };
    error_format.set();
    if allow_hard_links {
        amax::ir::file::allow_hard_links();
    }
    let console = cli::Console::new(quiet, verbose);
    // Where the system has no more threads, this one does the work.
    let threads = rayon::ThreadPoolBuilder::new();
    if threads.build_global().is_err() {
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
        let _ = alone.build_global();
    }
    let result = match command {
        Command::Rewrite(args) => cli::rewrite::run(&args, &console),
        Command::Prepare(args) => cli::rewrite::run_prepare(&args, &console),
        Command::Convert(args) => cli::convert::run(&args, &console),
        Command::Inspect(args) => cli::inspect::run(&args),
        Command::Plan(args) => cli::plan::run(&args, &console),
        Command::Explain(args) => cli::explain::run(&args, &console),
        Command::Calibrate(args) => cli::calibrate::run(&args, &console),
        Command::Merge(args) => cli::merge::run(&args, &console),
        Command::Compare(args) => cli::compare::run(&args, &console),
        Command::Sensitivity(args) => cli::sensitivity::run(&args, &console),
        Command::Verify(args) => cli::verify::run(&args, &console),
        Command::Diff(args) => cli::diff::run(&args),
        Command::Presets(args) => cli::presets::run(&args),
        Command::Scales(args) => cli::scales::run(&args, &console),
        Command::Completions(args) => cli::shell::completions::<Cli>(&args),
        Command::Man(args) => cli::shell::man::<Cli>(&args),
        Command::Config(args) => cli::config::run(&args, &console),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console.clear();
            cli::complain(&error);
            ExitCode::from(error.kind().exit_code())
        }
    }
}
