//! `amax convert`.

use std::ops::ControlFlow;
use std::path::PathBuf;

use amax::convert::{Request, To, convert};
use amax::error::{Error, Kind, Result};
use amax::ir::{Model, file, text};
use amax::passes::Outcome;
use amax::targets::{self, Target};

use super::inspect::print;
use super::{Console, bytes, count};

/// Arguments of `amax convert`.
#[derive(clap::Args)]
#[command(after_help = "Quantizers of constants become codes, whoever put them there: a model of quantization-aware
training gets its integer weights. Codes and scales that are there already are kept.

Examples:
  amax convert trained.onnx out.onnx
  amax convert w4.onnx out.onnx --form matmulnbits,gather-block-quantized
  amax convert nbits.onnx out.onnx --form qdq
  amax convert quantized.onnx out.onnx --simulate")]
pub(crate) struct Args {
    /// Quantized model.
    input: PathBuf,
    /// Where the result goes.
    output: PathBuf,
    /// How quantized constants are stored: `qdq`, `matmulnbits`, `gather-block-quantized`, or `float` (not quantized at all).
    /// Codes and scales stay. Those for products and for tables may be given together, with a comma.
    #[arg(long, value_name = "FORM", value_delimiter = ',', value_parser = form)]
    form: Vec<To>,
    /// `accuracy_level` of new `MatMulNBits`: 4 lets the runtime quantize the other operand to int8, 1 is float32.
    #[arg(long, value_name = "LEVEL", default_value_t = 4, value_parser = clap::value_parser!(u8).range(0..=4))]
    accuracy_level: u8,
    /// Where the result will run: what it would compute wrongly there is a warning.
    #[arg(long, value_name = "NAME", default_value = targets::DEFAULT)]
    target: String,
    /// Write quantizers as float operators with the same results, and quantized constants as floats.
    #[arg(long)]
    simulate: bool,
    /// Print the model as text after this pass, or after `all`.
    #[arg(long, value_name = "PASS")]
    print_after: Vec<String>,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let target = Target::load(&args.target)?;
    let model = file::load(&args.input)?;
    file::check_output(&model, &args.output)?;
    let after = |model: &Model, pass: &str, _: &Outcome| {
        if args.print_after.iter().any(|p| p == "all" || p == pass) {
            print(&format!("// after {pass}\n{}\n", text::print(model)))?;
        }
        Ok(ControlFlow::Continue(()))
    };
    let request = Request {
        into: &args.form,
        accuracy_level: args.accuracy_level,
        simulate: args.simulate,
        target: &target,
        evaluate: &amax::runtime::TractEvaluate,
        after: &after,
    };
    let done = convert(&model, &request).map_err(|e| match e.kind() {
        Kind::Model => e.in_file(&args.input),
        _ => e,
    })?;
    if amax::calibrate::Progress::interrupted(console) {
        return Err(Error::new(Kind::Interrupted, "interrupted; nothing was written"));
    }
    file::save(&done.model, &args.output)?;
    let sizes = (file::estimated_size(&model), file::estimated_size(&done.model));
    let mut said = format!("{} -> {}\n", args.input.display(), args.output.display());
    said += &format!("folded   {}\n", count(done.folded.len(), "constant"));
    let listed = if console.verbose { usize::MAX } else { 10 };
    for note in done.folded.iter().take(listed.min(done.folded.len())) {
        said += &format!("  {}: {}\n", note.at, note.text);
    }
    if done.folded.len() > listed {
        said += &format!("  and {} more (-v lists them)\n", done.folded.len() - listed);
    }
    if args.simulate {
        said += &format!("floats   {}\n", count(done.simulated.len(), "quantizer"));
    }
    if !args.form.is_empty() {
        let names: Vec<&str> = args.form.iter().map(|f| f.name()).collect();
        said += &format!("form     {}: {}\n", names.join(", "), count(done.changed.len(), "change"));
        for note in done.changed.iter().take(listed.min(done.changed.len())) {
            said += &format!("  {}: {}\n", note.at, note.text);
        }
        if done.changed.len() > listed {
            said += &format!("  and {} more (-v lists them)\n", done.changed.len() - listed);
        }
    }
    for note in &done.kept {
        said += &format!("kept     {}: {}\n", note.at, note.text);
    }
    said += &format!("bytes    {} -> {}", bytes(sizes.0), bytes(sizes.1));
    console.say(&said);
    for warning in &done.warnings {
        console.say(&format!("warning: {warning}"));
    }
    Ok(())
}

/// Reads a value of `--form`.
fn form(text: &str) -> Result<To, String> {
    let names = To::ALL.map(To::name);
    To::ALL.into_iter().find(|i| i.name() == text.trim()).ok_or_else(|| format!("forms are {}", names.join(", ")))
}
