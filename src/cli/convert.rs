//! `amax convert`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use amax::compare::Compare;
use amax::config::Pattern;
use amax::convert::{Convert, Converted};
use amax::error::{Error, Kind, Result};
use amax::ir::file::SaveOptions;
use amax::ir::{Model, file, text};
use amax::observe::prove::Proof;
use amax::onnx::DataType;
use amax::passes::Outcome;
use amax::passes::pipeline::After;
use amax::passes::recipes::To;
use amax::passes::switch_quantizers::Switch;
use amax::runtime::Runtime;
use amax::samples::SampleSet;
use amax::targets::{self, Target};

use super::inspect::print;
use super::output::{Destination, save_model};
use super::{Console, SampleArgs, bytes, count, float_type, runtime};

/// Made-up samples that `--check` runs where there are none.
const RANDOM: usize = 4;

/// Arguments of `amax convert`.
#[derive(clap::Args)]
#[command(after_help = "Constants followed by a quantizer become integers, whichever tool put it there: a model of
quantization-aware training gets integer weights. Integers and scales that exist already are kept.

Examples:
  amax convert trained.onnx out.onnx
  amax convert w4.onnx out.onnx --form matmulnbits,gather-block-quantized
  amax convert nbits.onnx out.onnx --form qdq
  amax convert qdq.onnx out.onnx --form qoperator
  amax convert trained.onnx out.onnx --check --calib samples.npz
  amax convert prepared.onnx out.onnx --disable 'head.*'
  amax convert quantized.onnx out.onnx --simulate")]
pub(crate) struct Args {
    /// Quantized model.
    input: PathBuf,
    #[command(flatten)]
    output: Destination,
    /// Storage format: qdq, matmulnbits, gather-block-quantized, matmulinteger, dynamic-quantize-lstm, qoperator
    /// (operators on integers, such as QLinearConv), or float (not quantized). Integers and scales stay the same. All
    /// but qdq and float may be combined, with commas.
    #[arg(long, value_name = "FORM", value_delimiter = ',', value_parser = form)]
    form: Vec<To>,
    /// accuracy_level of new MatMulNBits: 4 lets the runtime quantize the other operand to int8, 1 is float32.
    #[arg(long, value_name = "LEVEL", default_value_t = 4, value_parser = clap::value_parser!(u8).range(0..=4))]
    accuracy_level: u8,
    /// Where the result will run; warns of what would be computed wrongly there.
    #[arg(long, value_name = "NAME", default_value = targets::DEFAULT)]
    target: String,
    /// Remove the quantizers of sites or nodes whose name matches, before anything is folded; repeatable.
    #[arg(long, value_name = "GLOB")]
    disable: Vec<String>,
    /// Keep quantizers that --disable also matches; repeatable.
    #[arg(long, value_name = "GLOB")]
    enable: Vec<String>,
    /// Prove that the result is the same: every folded constant exactly, and the outputs on samples.
    #[arg(long)]
    check: bool,
    /// Samples for --check, as for rewrite; default: the file beside the model, or random ones.
    #[arg(long, value_name = "PATH", requires = "check")]
    calib: Option<PathBuf>,
    #[command(flatten)]
    sampling: SampleArgs,
    /// Runtime for the samples: tract, or ort, an installed onnxruntime (in builds with that feature).
    #[arg(long, value_name = "NAME", default_value = Runtime::default().name(), value_parser = runtime)]
    runtime: Runtime,
    /// Keep the scales of weights, even if a following BatchNormalization could be multiplied into them.
    #[arg(long)]
    keep_scales: bool,
    /// Store and compute what is float32 in float16 or bfloat16, but for norms, softmax and the like. Inputs and outputs keep
    /// their types.
    #[arg(long, value_name = "TYPE", value_parser = float_type)]
    dtype: Option<DataType>,
    /// Write quantizers as float operators with the same results, and quantized constants as floats.
    #[arg(long)]
    simulate: bool,
    /// Print the model as text after this pass, or after all.
    #[arg(long, value_name = "PASS")]
    print_after: Vec<String>,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let target = Target::load(&args.target)?;
    let model = file::load(&args.input)?;
    check_paths(args, &model, None)?;
    let samples = if args.check { samples(args, &model, console)? } else { None };
    check_paths(args, &model, samples.as_ref())?;
    let after = |model: &Model, pass: &str, _: &Outcome| {
        if args.print_after.iter().any(|p| p == "all" || p == pass) {
            print(&format!("// after {pass}\n{}\n", text::print(model)))?;
        }
        Ok(ControlFlow::Continue(()))
    };
    let switches = switches(args)?;
    let shown: &After<'_> = &after;
    let conversion = Convert::new(&model)
        .to(&args.form)
        .keep_scales(args.keep_scales)
        .accuracy_level(args.accuracy_level)
        .switches(&switches)
        .dtype(args.dtype)
        .simulate(args.simulate)
        .target(&target)
        .after(shown);
    let done = conversion.run().map_err(|e| match e.kind() {
        Kind::Model => e.in_file(&args.input),
        _ => e,
    })?;
    if amax::observe::Progress::interrupted(console) {
        return Err(Error::interrupted());
    }
    let proof = args.check.then(|| check(args, &model, &done, samples.as_ref(), console)).transpose()?;
    if let Some(proof) = &proof
        && let Err(error) = proof.verdict()
    {
        console.say(&proof.to_string());
        return Err(error.in_file(&args.input));
    }
    let interrupted = || amax::observe::Progress::interrupted(console);
    save_model(&done.model, &args.output, &SaveOptions::default(), &interrupted)?;
    let sizes = (file::estimated_size(&model), file::estimated_size(&done.model));
    let mut said = format!("{} -> {}\n", args.input.display(), args.output.display());
    if !done.folded.is_empty() || args.form.is_empty() {
        said += &format!("folded   {}\n", count(done.folded.len(), "constant"));
    }
    let listed = if console.verbose { usize::MAX } else { 10 };
    for note in done.folded.iter().take(listed.min(done.folded.len())) {
        said += &format!("  {note}\n");
    }
    if done.folded.len() > listed {
        said += &format!("  and {} more (-v lists them)\n", done.folded.len() - listed);
    }
    if args.simulate {
        said += &format!("floats   {}\n", count(done.simulated.len(), "quantizer"));
    }
    if !args.form.is_empty() || !done.changed.is_empty() {
        let names: Vec<&str> = args.form.iter().map(|f| f.name()).collect();
        let what = if names.is_empty() { "changed ".to_owned() } else { format!("form     {}:", names.join(", ")) };
        said += &format!("{what} {}\n", count(done.changed.len(), "change"));
        for note in done.changed.iter().take(listed.min(done.changed.len())) {
            said += &format!("  {note}\n");
        }
        if done.changed.len() > listed {
            said += &format!("  and {} more (-v lists them)\n", done.changed.len() - listed);
        }
    }
    for note in &done.kept {
        said += &format!("kept     {note}\n");
    }
    if let Some(proof) = &proof {
        said += &format!("{proof}\n");
    }
    said += &format!("bytes    {} -> {}", bytes(sizes.0), bytes(sizes.1));
    console.say(&said);
    for warning in &done.warnings {
        console.say(&format!("warning: {warning}"));
    }
    Ok(())
}

/// What `--disable` and `--enable` ask for; the latter have the last word.
fn switches(args: &Args) -> Result<Vec<Switch>> {
    let disable = args.disable.iter().map(|text| (text, false));
    let all = disable.chain(args.enable.iter().map(|text| (text, true)));
    all.map(|(text, on)| Ok(Switch { pattern: Pattern::new(text)?, on })).collect()
}

/// Refuses to write over a file that is read.
fn check_paths(args: &Args, model: &Model, samples: Option<&SampleSet>) -> Result<()> {
    let mut read = vec![("the target profile", PathBuf::from(&args.target))];
    read.extend(file::inputs(model).map(|path| ("the model", path.clone())));
    read.extend(samples.iter().flat_map(|set| set.files()).map(|path| ("the samples", path)));
    let printed = (!args.print_after.is_empty()).then_some(("--print-after", Path::new(file::STDOUT)));
    let written: Vec<_> = [("the model", &*args.output)].into_iter().chain(printed).collect();
    file::check_outputs(read, &written)
}

/// The samples for `--check`; random ones where there are none, unless the user wants none.
fn samples(args: &Args, model: &Model, console: &Console) -> Result<Option<SampleSet>> {
    let given = args.calib.as_deref();
    let found = match given.and_then(Path::to_str) {
        Some("random") => None,
        _ => args.sampling.samples(given, model, &args.input, console)?,
    };
    match found {
        None if given != Some(Path::new("none")) => SampleSet::random(model, RANDOM, 0).map(Some),
        found => Ok(found),
    }
}

/// Compares the result with the model, on samples where it can be run.
fn check(
    args: &Args,
    model: &Model,
    done: &Converted,
    samples: Option<&SampleSet>,
    console: &Console,
) -> Result<Proof> {
    args.runtime.load()?;
    let original = done.reference.as_ref().unwrap_or(model);
    let prove = |samples: Option<&SampleSet>| {
        Compare::new(original, &done.model).samples(samples).runtime(args.runtime).progress(console).prove()
    };
    match prove(samples) {
        Err(error) if error.kind() == Kind::Runtime && samples.is_some() => {
            console.say(&format!("warning: only constants were compared, not outputs: {error}"));
            prove(None)
        }
        other => other,
    }
}

/// Reads a value of `--form`.
fn form(text: &str) -> Result<To, String> {
    let names = To::ALL.map(To::name);
    To::ALL.into_iter().find(|i| i.name() == text.trim()).ok_or_else(|| format!("forms are {}", names.join(", ")))
}
