//! `amax explain`.

use std::path::{Path, PathBuf};

use amax::config::Pattern;
use amax::error::{Error, Kind, Result};
use amax::ir::file;
use amax::observe::calibrate::prepare;
use amax::ops::Form;
use amax::plan::explain::{Change, Explanation, Outcome, explain};
use amax::plan::{Knowledge, plan};
use amax::reopen::reopen;

use super::inspect::print;
use super::{Console, SampleArgs, configure, set_inputs, wrap};

/// Arguments of `amax explain`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  amax explain model.onnx '/encoder/*' --config amax.toml
  amax explain model.onnx '*.weight' --preset w4
  amax explain model.onnx fc1.weight --json")]
pub(crate) struct Args {
    /// Float model.
    model: PathBuf,
    /// Glob on names of nodes, sites (fc1.weight) or tensors; re: begins a regular expression.
    pattern: String,
    #[command(flatten)]
    configure: configure::Args,
    /// Turn an input of the model into a constant, as for rewrite; repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    set_input: Vec<String>,
    /// Explain what rewrite does without samples.
    #[arg(long)]
    no_samples: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let (config, target) = args.configure.load()?;
    let pattern = Pattern::new(&args.pattern)?;
    let mut model = file::load(&args.model)?;
    set_inputs(&mut model, &args.set_input, &SampleArgs::default(), Some(Path::new("none")), &args.model, console)?;
    let mut prepared = prepare(&model, &amax::runtime::TractEvaluate, !args.configure.keeps_inputs())
        .map_err(|e| e.in_file(&args.model))?;
    let knowledge = Knowledge { calibrated: !args.no_samples, samples: !args.no_samples, ..Knowledge::default() };
    reopen(&mut prepared, &config, &target, &knowledge, None)?;
    let made = plan(&prepared, &config, &target, &knowledge)?;
    let found = explain(&prepared, &config, &target, &made, &pattern)?;
    if args.json {
        let json = serde_json::to_string_pretty(&found)
            .map_err(|e| Error::new(Kind::Internal, format!("cannot print the explanation: {e}")))?;
        return print(&(json + "\n"));
    }
    print(&found.iter().map(text).collect::<Vec<_>>().join("\n"))
}

fn text(site: &Explanation) -> String {
    let Explanation { site, op, tensor, rules, outcome, why } = site;
    let mut out = format!("{site} ({op}), tensor \"{tensor}\"\n");
    let became = match outcome {
        Outcome::Float => "float".to_owned(),
        Outcome::Quantized { quantizer, dynamic, scale_of, .. } => {
            let when = if *dynamic { ", range at run time" } else { "" };
            let shared = scale_of.as_ref().map_or(String::new(), |other| format!(", at the scale of \"{other}\""));
            format!("{}{when}{shared}", quantizer.describe())
        }
        Outcome::Bias { activation, weight } => format!("int32, at the scales of \"{activation}\" and {weight}"),
    };
    out += &format!("  = {}\n", wrap(&format!("{became}: {why}{}", stored(outcome)), 4, 4, 110));
    for said in rules {
        out += &format!("  {}\n", said.rule);
        // Keys of one line together.
        let mut rest = said.changes.as_slice();
        while let Some(first) = rest.first() {
            let len = rest.iter().take_while(|c| c.at == first.at).count();
            let (now, later) = rest.split_at(len);
            rest = later;
            let place = if first.at.is_empty() { String::new() } else { format!("{}: ", first.at) };
            let words: Vec<String> = now.iter().map(change).collect();
            out += &format!("    {}\n", wrap(&format!("{place}{}", words.join(", ")), 4, 6, 110));
        }
    }
    out
}

/// In which form a constant is stored, and which other one was asked for.
fn stored(outcome: &Outcome) -> String {
    let Outcome::Quantized { form, gave_way, .. } = outcome else { return String::new() };
    let gave_way = gave_way.as_ref().map_or_else(String::new, |why| format!("; {why}"));
    let form = form.filter(|&form| form != Form::Qdq).map_or_else(String::new, |form| format!("; stored as {form}"));
    gave_way + &form
}

fn change(change: &Change) -> String {
    let Change { key, from, to, at: _ } = change;
    match from {
        Some(from) if from == to => format!("{key} = {to} as before"),
        Some(from) => format!("{key} = {to} instead of {from}"),
        None => format!("{key} = {to}"),
    }
}
