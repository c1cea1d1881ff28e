//! `amax compare`.

use std::path::PathBuf;

use amax::calibrate::compare;
use amax::error::{Error, Kind, Result};
use amax::ir::file;
use amax::passes::freeze_inputs::set_input;
use amax::report::QualityRow;
use amax::runtime::Runtime;

use super::{Console, decibels, inspect::print, runtime, set_inputs, table, thread_count, threads};

/// Arguments of `amax compare`.
#[derive(clap::Args)]
#[command(
    after_help = "Integer kernels are simulated: quantizers run as they are defined, everything between them in float.
What a processor's integer kernels do on top (saturation, rounding) is not in these figures."
)]
pub(crate) struct Args {
    /// Reference model.
    reference: PathBuf,
    /// Model to judge.
    test: PathBuf,
    /// Samples: as for `rewrite`; without, the file beside the reference model.
    #[arg(long, value_name = "PATH")]
    calib: Option<String>,
    /// Make a constant of an input, in both models, as for `rewrite`; may be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    set_input: Vec<String>,
    /// What runs the samples: tract, or an installed onnxruntime (in builds with the feature `ort`).
    #[arg(long, value_name = "NAME", default_value = Runtime::default().name(), value_parser = runtime)]
    runtime: Runtime,
    /// Samples that run at once.
    #[arg(long, value_name = "N", value_parser = thread_count, allow_negative_numbers = true)]
    threads: Option<usize>,
    /// Print JSON; an SQNR of null means that nothing differs.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> Result<()> {
    args.runtime.load()?;
    let mut reference = file::load(&args.reference)?;
    let mut test = file::load(&args.test)?;
    let samples = set_inputs(&mut reference, &args.set_input, args.calib.as_deref(), &args.reference, console)?;
    // The other model may have it as a constant already.
    for assignment in &args.set_input {
        if let Ok((value, tensor)) = set_input(&test, assignment) {
            let main = test.main();
            test.bind_input(main, value, tensor);
        }
    }
    let samples = samples.ok_or_else(|| {
        Error::new(Kind::Usage, "there are no samples to compare on").with_hint(format!(
            "pass --calib PATH, or put {} there",
            args.reference.with_extension("calib.npz").display()
        ))
    })?;
    let indices: Vec<usize> = (0..samples.len()).collect();
    let found = compare(&reference, &test, &samples, &indices, args.runtime, threads(args.threads), console)?;
    let rows: Vec<QualityRow> = found.iter().map(|(name, m)| QualityRow::new(name, m)).collect();
    if args.json {
        let json = serde_json::to_string_pretty(&rows)
            .map_err(|e| Error::new(Kind::Internal, format!("cannot print the comparison: {e}")))?;
        return print(&(json + "\n"));
    }
    let mut lines = vec![["output", "SQNR", "cosine", "largest error"].map(str::to_owned).to_vec()];
    for row in &rows {
        lines.push(vec![
            row.output.clone(),
            decibels(row.sqnr_db),
            format!("{:.6}", row.cosine),
            format!("{:.5}", row.max_abs_error),
        ]);
    }
    print(&format!("{}\n{}", samples.describe(), table(&lines, &[1, 2, 3])))
}
