//! `amax plan`.

use std::path::{Path, PathBuf};

use amax::error::Result;
use amax::ir::file;
use amax::observe::calibrate::prepare;
use amax::ops::Form;
use amax::plan::{Knowledge, Mode, Plan, Readers, plan};
use amax::reopen::reopen;

use super::inspect::print;
use super::output::stage;
use super::{Console, SampleArgs, bytes, configure, count, set_inputs, table};

/// Arguments of `amax plan`.
#[derive(clap::Args)]
#[command(after_help = "rewrite starts from this plan. The guard may take sites out of it after calibration;
amax rewrite --save-plan FILE writes the final plan.

Examples:
  amax plan model.onnx
  amax plan model.onnx --config amax.toml --no-samples
  amax plan model.onnx -o plan.json
  amax rewrite model.onnx out.onnx --plan plan.json")]
pub(crate) struct Args {
    /// Float model.
    model: PathBuf,
    #[command(flatten)]
    configure: configure::Args,
    /// Plan as rewrite does without samples.
    #[arg(long)]
    no_samples: bool,
    /// Turn an input of the model into a constant, as for rewrite; repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    set_input: Vec<String>,
    /// Write the plan as JSON, to edit and pass to rewrite --plan; - is stdout.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the plan as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let (config, target) = args.configure.load()?;
    let mut model = file::load(&args.model)?;
    if let Some(path) = &args.output {
        let mut read = args.configure.files(&config);
        read.extend(file::inputs(&model).map(|path| ("the model", path.clone())));
        let printed = args.json.then_some(("--json", Path::new(file::STDOUT)));
        let written: Vec<_> = [("the plan", path.as_path())].into_iter().chain(printed).collect();
        file::check_outputs(read, &written)?;
    }
    set_inputs(&mut model, &args.set_input, &SampleArgs::default(), Some(Path::new("none")), &args.model, console)?;
    let mut prepared = prepare(&model, &amax::runtime::TractEvaluate, !args.configure.keeps_inputs())
        .map_err(|e| e.in_file(&args.model))?;
    let knowledge = Knowledge { calibrated: !args.no_samples, samples: !args.no_samples, ..Knowledge::default() };
    reopen(&mut prepared, &config, &target, &knowledge, None)?;
    let made = plan(&prepared, &config, &target, &knowledge)?;
    if let Some(path) = &args.output {
        stage(path, made.to_json()?)?.keep()?;
        console.say(&format!("wrote {}", path.display()));
    }
    if args.json {
        return print(&made.to_json()?);
    }
    if args.output.is_some() { Ok(()) } else { print(&text(&made)) }
}

/// The plan as tables.
fn text(plan: &Plan) -> String {
    let mut out = format!("for {}, opset {}\n", plan.target, plan.opset);
    let cells = |row: &[&str]| row.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    if !plan.activations.is_empty() {
        out += &format!("\nactivations ({})\n", plan.activations.len());
        let rows = plan.activations.iter().map(|(name, a)| {
            let range = match (&a.mode, a.scale_of == *name) {
                (Mode::Dynamic, _) => "range at run time".to_owned(),
                (Mode::Static, true) => String::new(),
                (Mode::Static, false) => format!("scale of {}", a.scale_of),
            };
            let from = a.converts.as_ref().map_or(String::new(), |first| format!("converted from {first}; "));
            let readers = match &a.readers {
                Readers::All => String::new(),
                Readers::Listed(slots) => format!("for {}; ", count(slots.len(), "reader")),
            };
            cells(&[name, &a.quantizer.describe(), &range, &format!("{from}{readers}{}", a.why)])
        });
        out += &table(&rows.collect::<Vec<_>>(), &[]);
    }
    if !plan.weights.is_empty() {
        out += &format!("\nconstants ({})\n", plan.weights.len());
        let rows = plan.weights.iter().map(|w| {
            let pairs = if w.pair_safe.is_some() { "; pair-safe" } else { "" };
            let turned = if w.transpose { "; stored transposed" } else { "" };
            let stored = if w.form == Form::Qdq { String::new() } else { format!(", as {}", w.form) };
            let gave_way = w.gave_way.as_ref().map_or_else(String::new, |why| format!("; {why}"));
            let why = format!("{}{gave_way}{pairs}{turned}", w.why);
            cells(&[&w.site, &w.tensor, &(w.quantizer.describe() + &stored), &why])
        });
        out += &table(&rows.collect::<Vec<_>>(), &[]);
    }
    let biases: Vec<_> = plan.biases.iter().filter(|b| !b.float).collect();
    if !biases.is_empty() {
        out += &format!("\nint32 biases ({})\n", biases.len());
        let rows = biases.into_iter().map(|b| {
            let weight = plan.weights.get(b.weight).map_or("", |w| w.site.as_str());
            cells(&[&b.site, &b.tensor, &format!("at the scales of {} and {weight}", b.activation)])
        });
        out += &table(&rows.collect::<Vec<_>>(), &[]);
    }
    for split in &plan.splits {
        out += &format!("\n\"{}\" is stored {} times: {}\n", split.tensor, split.sites.len(), split.why);
    }
    if !plan.skipped.is_empty() {
        out += &format!("\nfloat ({})\n", plan.skipped.len());
        let rows = plan.skipped.iter().map(|s| {
            let size = if s.bytes > 0 { bytes(s.bytes) } else { String::new() };
            cells(&[&s.node, &s.op, &size, &s.why.to_string()])
        });
        out += &table(&rows.collect::<Vec<_>>(), &[2]);
    }
    out
}
