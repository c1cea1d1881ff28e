//! `amax inspect`.

use std::fmt::Write;
use std::path::PathBuf;

use amax::error::{Error, Kind, Result};
use amax::ir::{file, text};
use amax::report::inspect;

use super::{bytes, table};

/// Arguments of `amax inspect`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Model.
    model: PathBuf,
    /// Print the whole model in ONNX's textual syntax.
    #[arg(long, conflicts_with = "json")]
    text: bool,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
    /// List the nodes of the main graph by name, as --exclude matches them; with --json as pairs of operator and name.
    #[arg(long, conflicts_with = "text")]
    nodes: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let model = file::load(&args.model)?;
    if args.text {
        return print(&text::print(&model));
    }
    if args.nodes {
        let nodes = model.graph(model.main()).nodes();
        let rows: Vec<Vec<String>> =
            nodes.iter().map(|&n| vec![model.node(n).op_type().to_owned(), model.node_name(n).to_owned()]).collect();
        if args.json {
            return json(&rows);
        }
        return print(&table(&rows, &[]));
    }
    let found = inspect(&model);
    if args.json {
        return json(&found);
    }
    let mut out = format!("{}: {}\n", args.model.display(), bytes(file::estimated_size(&model)));
    let opsets: Vec<String> = found.opsets.iter().map(|(d, v)| format!("{d} {v}")).collect();
    let _ = writeln!(out, "IR version {}, opsets {}", found.ir_version, opsets.join(", "));
    if !found.producer.is_empty() {
        let _ = writeln!(out, "made by {}", found.producer);
    }
    for (title, list) in [("inputs", &found.inputs), ("outputs", &found.outputs)] {
        let rows: Vec<Vec<String>> = list.iter().map(|(n, t)| vec![n.clone(), t.clone()]).collect();
        out.extend(["\n", title, "\n", &table(&rows, &[])]);
    }
    let total: usize = found.operators.values().sum();
    let _ = writeln!(out, "\n{total} nodes");
    let mut ops: Vec<_> = found.operators.iter().collect();
    ops.sort_by_key(|(op, n)| (std::cmp::Reverse(**n), op.as_str()));
    out.push_str(&table(&ops.iter().map(|(o, n)| vec![n.to_string(), (*o).clone()]).collect::<Vec<_>>(), &[0]));
    out.push_str("\nconstants\n");
    let mut rows: Vec<_> = found.constants.iter().collect();
    rows.sort_by_key(|(t, (_, b))| (std::cmp::Reverse(*b), **t));
    let rows: Vec<Vec<String>> =
        rows.iter().map(|(t, (n, b))| vec![bytes(*b), n.to_string(), (**t).to_owned()]).collect();
    out.push_str(&table(&rows, &[0, 1]));
    if found.quantizers.is_empty() {
        out.push_str("\nnot quantized\n");
    } else {
        let list: Vec<String> = found.quantizers.iter().map(|(o, n)| format!("{n} {o}")).collect();
        let _ = writeln!(out, "\nquantized already: {}", list.join(", "));
    }
    print(&out)
}

fn json(found: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(found)
        .map_err(|e| Error::new(Kind::Internal, format!("cannot print the summary: {e}")))?;
    print(&(json + "\n"))
}

/// Prints data; a reader that has gone away (`| head`) is not an error.
pub(crate) fn print(data: &str) -> Result<()> {
    use std::io::Write as _;
    match std::io::stdout().write_all(data.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(Kind::Output, format!("cannot write to stdout: {e}")))
        }
        _ => Ok(()),
    }
}
