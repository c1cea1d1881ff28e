//! `amax compare`.

use std::path::PathBuf;

use amax::compare::Compare;
use amax::error::{Error, Kind, Result};
use amax::ir::{Model, file};
use amax::observe::sites::{Kind as SiteKind, Quality, Site};
use amax::passes::freeze_inputs::set_input;
use amax::report::QualityRow;
use amax::report::text::quality;
use amax::samples::SampleSet;

use super::{Console, RunArgs, SampleArgs, decibels, inspect::print, set_inputs, table};

/// Arguments of `amax compare`.
#[derive(clap::Args)]
#[command(
    after_help = "Integer kernels are simulated: quantizers run as defined, everything between them in float. Errors
that a processor's integer kernels add (saturation, rounding) are not included.

Logits of a language model (an output whose last axis is as long as the table that the tokens of an
input are looked up in) are compared as distributions, too: the mean KL divergence of a position, how
often the most likely token is the same, and the perplexity on the samples' own tokens. Positions that
an input attention_mask leaves out do not count.

With --sites, each quantized activation and each node with a quantized weight is listed with two
errors. Own: what this site alone adds to the float model. Accumulated: the error of the quantized
model up to here.

Examples:
  amax compare model.onnx model.int8.onnx --calib samples.npz
  amax compare model.onnx model.int8.onnx --sites --top 10
  amax compare model.onnx model.int8.onnx --sites --csv > sites.csv"
)]
pub(crate) struct Args {
    #[command(flatten)]
    models: Models,
    #[command(flatten)]
    run: RunArgs,
    /// Compare each quantized site instead of the outputs, worst first.
    #[arg(long)]
    sites: bool,
    /// Only the N worst sites.
    #[arg(long, value_name = "N", requires = "sites")]
    top: Option<usize>,
    /// Print JSON; an SQNR of null means that nothing differs.
    #[arg(long)]
    json: bool,
    /// Print CSV; an SQNR of inf means that nothing differs, an empty field that it is unknown.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
}

/// Two models, and what they run on.
#[derive(clap::Args)]
pub(super) struct Models {
    /// Reference model.
    reference: PathBuf,
    /// Model to judge.
    test: PathBuf,
    /// Samples, as for rewrite; default: the file beside the reference model.
    #[arg(long, value_name = "PATH")]
    calib: Option<PathBuf>,
    #[command(flatten)]
    sampling: SampleArgs,
    /// Turn an input of both models into a constant, as for rewrite; repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    set_input: Vec<String>,
}

impl Models {
    /// Loads both models and opens the samples.
    pub(super) fn load(&self, console: &Console) -> Result<(Model, Model, SampleSet)> {
        let mut reference = file::load(&self.reference)?;
        let mut test = file::load(&self.test)?;
        let calib = self.calib.as_deref();
        let samples = set_inputs(&mut reference, &self.set_input, &self.sampling, calib, &self.reference, console)?;
        // The other model may have it as a constant already.
        for assignment in &self.set_input {
            if let Ok((value, tensor)) = set_input(&test, assignment) {
                let main = test.main();
                test.bind_input(main, value, tensor);
            }
        }
        let samples = samples.ok_or_else(|| {
            Error::new(Kind::Usage, "there are no samples to compare on").with_hint(format!(
                "pass --calib PATH, or put {} there",
                self.reference.with_extension("calib.npz").display()
            ))
        })?;
        Ok((reference, test, samples))
    }
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    args.run.runtime.load()?;
    let (reference, test, samples) = args.models.load(console)?;
    let comparison = Compare::new(&reference, &test)
        .samples(&samples)
        .runtime(args.run.runtime)
        .threads(args.run.threads())
        .timeout(args.run.timeout)
        .progress(console);
    if args.sites {
        let mut found = comparison.sites()?;
        let total = found.len();
        found.truncate(args.top.unwrap_or(total));
        return match (args.json, args.csv) {
            (true, _) => json(&found),
            (_, true) => print(&csv(&SITE_COLUMNS, &found.iter().map(site_fields).collect::<Vec<_>>())),
            _ => print(&format!("{}\n{}", samples.describe(), site_text(&found, total))),
        };
    }
    let rows = comparison.outputs()?;
    if args.json {
        return json(&rows);
    }
    if args.csv {
        return print(&csv(&OUTPUT_COLUMNS, &rows.iter().map(output_fields).collect::<Vec<_>>()));
    }
    print(&format!("{}\n{}", samples.describe(), quality("output", &rows, [6, 5])))
}

const OUTPUT_COLUMNS: [&str; 12] = [
    "output",
    "sqnr_db",
    "cosine",
    "max_abs_error",
    "median_channel_db",
    "agreement",
    "unlike_samples",
    "into",
    "kl",
    "top1",
    "perplexity_reference",
    "perplexity",
];

fn output_fields(row: &QualityRow) -> [String; 12] {
    let number = |figure: Option<f64>| figure.map_or_else(String::new, |figure| figure.to_string());
    let (floats, logits) = (row.floats.as_ref(), row.logits.as_ref());
    let perplexity = |model: usize| number(logits.and_then(|l| l.perplexity).map(|both| both[model]));
    [
        row.output.clone(),
        number(row.sqnr_db()),
        number(floats.map(|f| f.cosine)),
        floats.map_or_else(String::new, |f| f.max_abs_error.to_string()),
        number(floats.and_then(|f| f.median_channel_db)),
        number(row.agreement),
        row.unlike.as_ref().map_or_else(String::new, |unlike| unlike.samples.to_string()),
        row.into.clone().unwrap_or_default(),
        number(logits.map(|l| l.kl)),
        number(logits.map(|l| l.top1)),
        perplexity(0),
        perplexity(1),
    ]
}

pub(super) fn json(rows: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(rows)
        .map_err(|e| Error::new(Kind::Internal, format!("cannot print the comparison: {e}")))?;
    print(&(json + "\n"))
}

fn site_text(sites: &[Site], total: usize) -> String {
    let heads = ["site", "operator", "format", "granularity", "own", "accumulated"];
    let mut lines = vec![heads.map(str::to_owned).to_vec()];
    let shown = |quality: &Option<Quality>| quality.as_ref().map_or("?".to_owned(), |q| decibels(q.sqnr_db));
    for Site { site, op, format, granularity, own, accumulated, .. } in sites {
        let cells = [site, op, format, granularity].map(Clone::clone);
        lines.push(cells.into_iter().chain([shown(own), shown(accumulated)]).collect());
    }
    let mut out = if sites.is_empty() { "no quantized sites\n".to_owned() } else { table(&lines, &[4, 5]) };
    for site in sites {
        if let Some(why) = &site.why {
            out.push_str(&format!("  {}: {why}\n", site.site));
        }
    }
    if sites.len() < total {
        out.push_str(&format!("  and {} more\n", total - sites.len()));
    }
    out
}

const SITE_COLUMNS: [&str; 14] = [
    "site",
    "kind",
    "node",
    "op",
    "tensor",
    "format",
    "granularity",
    "own_sqnr_db",
    "own_cosine",
    "own_max_abs_error",
    "accumulated_sqnr_db",
    "accumulated_cosine",
    "accumulated_max_abs_error",
    "why",
];

fn site_fields(row: &Site) -> [String; 14] {
    let Site { site, kind, node, op, tensor, format, granularity, own, accumulated, why } = row;
    let kind = match kind {
        SiteKind::Activation => "activation",
        SiteKind::Weight => "weight",
    };
    let figures = |quality: &Option<Quality>| match quality {
        Some(Quality { sqnr_db, cosine, max_abs_error }) => {
            [sqnr_db.to_string(), cosine.to_string(), max_abs_error.to_string()]
        }
        None => Default::default(),
    };
    let [own_sqnr, own_cosine, own_max] = figures(own);
    let [sqnr, cosine, max] = figures(accumulated);
    let text = |text: &String| text.clone();
    [
        text(site),
        kind.to_owned(),
        text(node),
        text(op),
        text(tensor),
        text(format),
        text(granularity),
        own_sqnr,
        own_cosine,
        own_max,
        sqnr,
        cosine,
        max,
        why.clone().unwrap_or_default(),
    ]
}

/// Comma-separated values, as RFC 4180 but for lines that end in a newline alone.
fn csv<const N: usize>(heads: &[&str; N], rows: &[[String; N]]) -> String {
    let quoted = |field: &str| {
        if field.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", field.replace('"', "\"\""))
        } else {
            field.to_owned()
        }
    };
    let mut out = heads.join(",") + "\n";
    for row in rows {
        out += &row.iter().map(|field| quoted(field)).collect::<Vec<_>>().join(",");
        out.push('\n');
    }
    out
}
