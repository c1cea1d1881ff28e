//! `amax sensitivity`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use amax::error::{Error, Kind, Result};
use amax::ir::file;
use amax::observe::Memory;
use amax::report::layout::{bytes, decibels};
use amax::rewrite::Rewrite;
use amax::runtime::Runtime;
use amax::{Price, PricedGroup, Prices};

use super::inspect::print;
use super::output::{scratch, stage};
use super::{Console, RunArgs, SampleArgs, budget, configure, count, memory_size, set_inputs, table};

/// Arguments of `amax sensitivity`.
#[derive(clap::Args)]
#[command(after_help = "For each group of weights that share a format, and each format: the quality of the
worst output with only that group quantized. Formats with a star are measured, the others
follow from the errors that they make in the weights.

Examples:
  amax sensitivity model.onnx --calib samples.npz
  amax sensitivity model.onnx --formats int2-g32,int4-g32,int8 -o prices.json
  amax sensitivity model.onnx --effective-bits 4.5 --suggest > amax.toml
  amax rewrite model.onnx out.onnx --effective-bits 4.5 --sensitivity prices.json")]
pub(crate) struct Args {
    /// Float model.
    model: PathBuf,
    #[command(flatten)]
    configure: configure::Args,
    #[command(flatten)]
    budget: budget::Limits,
    /// Samples, as for rewrite; default: the file beside the model.
    #[arg(long, value_name = "PATH")]
    calib: Option<PathBuf>,
    #[command(flatten)]
    sampling: SampleArgs,
    /// Turn an input of the model into a constant, as for rewrite; repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    set_input: Vec<String>,
    #[command(flatten)]
    run: RunArgs,
    /// Memory limit, such as 2GB: fewer samples run at once.
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    max_memory: Option<u64>,
    /// Print the [[layer]] rules that it suggests for a limit: --effective-bits, --max-size or --min-sqnr.
    #[arg(long, requires = "limit")]
    suggest: bool,
    /// What to print: table, csv or json.
    #[arg(long, value_name = "NAME", default_value = "table", value_parser = ["table", "csv", "json"])]
    format: String,
    /// Write the document for rewrite --sensitivity; - is stdout.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    let (mut config, target) = args.configure.load()?;
    args.budget.apply(&mut config)?;
    let known = args.budget.sensitivity.as_deref().map(Prices::load).transpose()?;
    let mut model = file::load(&args.model)?;
    if args.run.runtime != Runtime::default() {
        args.run.runtime.load()?;
    }
    let calib = args.calib.as_deref();
    let samples = set_inputs(&mut model, &args.set_input, &args.sampling, calib, &args.model, console)?;
    if let Some(path) = &args.output {
        let mut read = args.configure.files(&config);
        read.extend(file::inputs(&model).map(|path| ("the model", path.clone())));
        read.extend(samples.iter().flat_map(amax::SampleSet::files).map(|path| ("the samples", path)));
        file::check_outputs(read, &[("the sensitivity", path.as_path())])?;
    }
    let folder = scratch(args.output.as_deref().unwrap_or(Path::new(file::STDOUT)));
    let rewrite = Rewrite::new(&model)
        .config(&config)
        .target(&target)
        .samples(samples.as_ref())
        .runtime(args.run.runtime)
        .threads(args.run.threads())
        .timeout(args.run.timeout)
        .memory(Memory { limit: args.max_memory, folder: Some(&folder), ..Memory::default() })
        .progress(console)
        .prices(known.as_ref())
        .keep_inputs(args.configure.keeps_inputs());
    let in_file = |e: Error| if matches!(e.kind(), Kind::Model | Kind::Runtime) { e.in_file(&args.model) } else { e };
    let found = rewrite.sensitivity().map_err(in_file)?;
    if let Some(path) = &args.output {
        stage(path, found.to_json()?)?.keep()?;
        console.say(&format!("wrote {}", path.display()));
        if args.format == "table" && !args.suggest {
            return Ok(());
        }
    }
    if args.suggest {
        return print(&rewrite.prices(&found).suggestion().map_err(in_file)?.to_toml()?);
    }
    match args.format.as_str() {
        "json" => print(&found.to_json()?),
        "csv" => print(&csv(&found)?),
        _ => print(&text(&found)),
    }
}

/// The groups as a table, the most sensitive first.
fn text(prices: &Prices) -> String {
    let mut names: Vec<(usize, &str)> = Vec::new();
    for price in prices.groups.iter().flat_map(|group| &group.prices) {
        if price.format != "float" && names.iter().all(|(_, name)| *name != price.format) {
            names.push((price.bits, &price.format));
        }
    }
    names.sort_by_key(|(bits, _)| *bits);
    let mut groups: Vec<&PricedGroup> = prices.groups.iter().collect();
    let worst = |group: &PricedGroup| group.prices.iter().map(|price| price.noise).fold(0.0, f64::max);
    groups.sort_by(|a, b| worst(b).total_cmp(&worst(a)));
    let mut rows = vec![["weights", "operator", "float"].map(str::to_owned).to_vec()];
    rows[0].extend(names.iter().map(|(_, name)| (*name).to_owned()));
    for group in groups {
        let float = group.prices.iter().find(|price| price.format == "float");
        let more = group.weights.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        let mut row = vec![
            format!("{}{more}", group.weights[0]),
            group.operators.join(" "),
            bytes(float.map_or(group.elements * 4, |price| price.bytes)),
        ];
        row.extend(names.iter().map(|(_, name)| {
            let price = group.prices.iter().find(|price| price.format == *name);
            let cell = |price: &Price| format!("{}{}", decibels(price.db()), if price.measured { " *" } else { "" });
            price.map_or_else(|| "not allowed".to_owned(), cell)
        }));
        rows.push(row);
    }
    let mut out = format!("{}, {} of them run\n", prices.samples, count(prices.sample_count, "sample"));
    out += &table(&rows, &[2]);
    out
}

/// A row for each group and format.
fn csv(prices: &Prices) -> Result<String> {
    let mut out = "weights,operators,elements,format,bits,bytes,noise_db,measured\n".to_owned();
    for group in &prices.groups {
        for price in &group.prices {
            let quoted = |list: &[String]| format!("\"{}\"", list.join(" ").replace('"', "\"\""));
            let Price { format, bits, bytes, measured, .. } = price;
            let (weights, operators, elements) = (quoted(&group.weights), quoted(&group.operators), group.elements);
            let db = price.db();
            writeln!(out, "{weights},{operators},{elements},{format},{bits},{bytes},{db:.4},{measured}")
                .map_err(|_| Error::new(Kind::Internal, "cannot print the prices"))?;
        }
    }
    Ok(out)
}
