//! What a user reads after a rewrite.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::layout::{bytes, count, decibels, table, wrap};
use super::{AlgorithmRow, QualityRow, Report};
use crate::algorithms::sufficiency::{FEW, Sufficiency};
use crate::plan::{QUANTIZED_ALREADY, Skip};

const WIDTH: usize = 80;

/// Outputs with less than this many dB are warned about.
const LOW: f64 = 10.0;

/// Stands for the qualities of a group in the reason it shares.
const SPAN: &str = "{}";

/// Left float without many bytes, these are still worth a line of their own.
const HEAVY: &[&str] = &["Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Attention"];

/// The whole summary; `total` are the seconds that everything took.
#[must_use]
pub fn text(report: &Report, verbose: bool, total: f64) -> String {
    let (before, after) = report.opset;
    let opset = if before == after { after.to_string() } else { format!("{before} -> {after}") };
    let mut out = format!("target {}, operator set {opset}\n\nquantized\n", report.target);
    let mut operators: Vec<_> = report.operators.iter().collect();
    operators.sort_by_key(|(op, (some, _))| (std::cmp::Reverse(*some), op.as_str()));
    let rows: Vec<Vec<String>> =
        operators.iter().map(|(op, (some, all))| vec![format!("{some}/{all}"), (*op).clone()]).collect();
    out.push_str(&table(&rows, &[0]));
    let dynamic = report.activations.iter().filter(|a| a.mode == "dynamic").count();
    let ranged = if dynamic > 0 { format!(" ({dynamic} ranged at run time)") } else { String::new() };
    let numbers = match (report.activations.len(), report.weights.len()) {
        (0, 0) => "  nothing\n".to_owned(),
        (0, weights) => format!("  {}; activations stay float\n", count(weights, "constant")),
        (tensors, weights) => {
            format!("  {}{ranged}, {}\n", count(tensors, "activation tensor"), count(weights, "constant"))
        }
    };
    out.push_str(&numbers);
    let (already, left): (Vec<&Skip>, Vec<&Skip>) = report.skipped.iter().partition(|s| is_quantized(s));
    out.push_str(&kept(&already));
    out.push_str(&left_float(&left, verbose));
    if verbose {
        out.push_str(&details(report));
    }
    out.push_str(&figures(report, verbose, total));
    out
}

/// Sizes, samples, quality, time.
fn figures(report: &Report, verbose: bool, total: f64) -> String {
    let (before, after) = report.bytes;
    let percent = after as f64 / before.max(1) as f64 * 100.0;
    let mut out = format!("\nbytes    {} -> {} ({percent:.0} %)\n", bytes(before), bytes(after));
    if let Some(samples) = &report.samples {
        let (used, held) = report.sample_counts;
        let _ = match split(report) {
            Split::Shared => writeln!(out, "samples  {samples}, for ranges and quality: too few to hold any out"),
            Split::Apart => writeln!(out, "samples  {samples}: {used} for ranges, {held} held out"),
        };
    }
    if let Some(found) = &report.sufficiency {
        let line = format!("ranges   {}", ranges(found));
        let _ = writeln!(out, "{}", wrap(&line, 0, 9, WIDTH));
    }
    if !report.quality.is_empty() {
        let mut rows = vec![["quality", "SQNR", "cosine", "largest error"].map(str::to_owned).to_vec()];
        rows.extend(report.quality.iter().map(quality));
        for line in table(&rows, &[1, 2, 3]).lines() {
            out.extend([line.strip_prefix("  ").unwrap_or(line), "\n"]);
        }
    }
    let stages: Vec<String> = report
        .seconds
        .iter()
        .filter(|(_, seconds)| verbose || (total >= 1.0 && *seconds >= total / 20.0))
        .map(|(stage, seconds)| format!("{stage} {seconds:.2}"))
        .collect();
    let stages = if stages.is_empty() { String::new() } else { format!(" ({})", stages.join(", ")) };
    let line = format!("seconds  {total:.2}{stages}");
    let _ = writeln!(out, "{}", wrap(&line, 0, 9, WIDTH));
    out
}

/// How far the ranges can be relied on.
fn ranges(found: &Sufficiency) -> String {
    if found.samples < FEW as u64 {
        return "too few samples to tell whether more would change them".to_owned();
    }
    let all = found.sites.len();
    let steady = all - found.unsteady.len();
    let worst = found.unsteady.first().and_then(|name| Some((name, found.sites.get(name)?.moved_by?)));
    let rest = worst.map(|(name, sample)| format!("; \"{name}\" depends on sample {sample}")).unwrap_or_default();
    format!("{steady} of {all} independent of any single sample{rest}")
}

/// A row of the table of outputs.
fn quality(row: &QualityRow) -> Vec<String> {
    vec![row.output.clone(), decibels(row.sqnr_db), format!("{:.5}", row.cosine), format!("{:.4}", row.max_abs_error)]
}

enum Split {
    Apart,
    Shared,
}

/// Whether quality was measured on samples that gave the ranges.
fn split(report: &Report) -> Split {
    match report.sample_counts {
        (used, held) if used == held && used < 8 => Split::Shared,
        _ => Split::Apart,
    }
}

/// What the user should know, most of it with a way out.
#[must_use]
pub fn warnings(report: &Report, verbose: bool) -> Vec<String> {
    let limit = if verbose { usize::MAX } else { 5 };
    let already = report.skipped.iter().any(is_quantized);
    let mut out: Vec<String> = Vec::new();
    for warning in &report.warnings {
        out.push(match warning.strip_prefix("nothing was quantized") {
            Some(_) if already => "nothing was quantized: the model is quantized already".to_owned(),
            _ => wrap(warning, 9, 9, WIDTH),
        });
    }
    if out.len() > limit {
        let more = count(out.len() - limit, "warning");
        out.truncate(limit);
        out.push(format!("{more} more; -v or --report shows them"));
    }
    // Fake quantizers leave weights in floats, as asked.
    let floats = report.passes.iter().any(|p| p.pass == "unfold-weights" || (p.pass == "simulate" && p.changes > 0));
    if report.bytes.1 > report.bytes.0 && !report.weights.is_empty() && !floats {
        out.push("the result is larger than the input: few of its bytes are quantized weights".to_owned());
    }
    let worst = report.quality.iter().filter(|q| q.float).min_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
    if let Some(worst) = worst.filter(|q| q.sqnr_db.is_nan() || q.sqnr_db < LOW) {
        out.push(format!(
            "\"{}\" keeps only {} of the float model's signal\n         \
             look at the tensors of -v or --report, --exclude the worst nodes, or give\n         \
             more samples, and more typical ones",
            worst.output,
            decibels(worst.sqnr_db)
        ));
    }
    out
}

/// Whether a node works on codes in the input model.
fn is_quantized(skip: &Skip) -> bool {
    let op = skip.op.as_str();
    skip.why == QUANTIZED_ALREADY
        || op.contains("uantizeLinear")
        || op.starts_with("QLinear")
        || op.ends_with("Integer")
        || op.ends_with("NBits")
        || op == "QGemm"
}

/// What was quantized before.
fn kept(already: &[&Skip]) -> String {
    if already.is_empty() {
        return String::new();
    }
    format!("\nquantized already, and kept\n  {}\n", wrap(&operators(already.iter().copied(), usize::MAX), 2, 2, WIDTH))
}

/// `4 Conv, 1 Gemm`, at most `limit` of them.
fn operators<'a>(skips: impl Iterator<Item = &'a Skip>, limit: usize) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    // A node may be listed for itself and for its bodies.
    let nodes: BTreeSet<(&str, &str)> = skips.map(|s| (s.op.as_str(), s.node.as_str())).collect();
    for (op, _) in nodes {
        *counts.entry(op).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(op, n)| (std::cmp::Reverse(*n), *op));
    let more = counts.len() > limit;
    let mut words: Vec<String> = counts.iter().take(limit).map(|(op, n)| format!("{n} {op}")).collect();
    words.extend(more.then(|| "…".to_owned()));
    words.join(", ")
}

/// Skips of one operator and kind of reason.
#[derive(Default)]
struct Group<'a> {
    bytes: u64,
    skips: Vec<&'a Skip>,
    /// Qualities that reasons speak of.
    decibels: Vec<f64>,
}

/// What stays float: nodes that matter in a line for each operator and kind of reason, the others counted.
fn left_float(left: &[&Skip], verbose: bool) -> String {
    if left.is_empty() {
        return String::new();
    }
    let mut groups: BTreeMap<(&str, String), Group<'_>> = BTreeMap::new();
    for skip in left {
        let (kind, decibels) = if verbose { (skip.why.clone(), None) } else { kind(&skip.why) };
        let group = groups.entry((&skip.op, kind)).or_default();
        group.bytes += skip.bytes;
        group.skips.push(skip);
        group.decibels.extend(decibels);
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|((op, why), g)| (std::cmp::Reverse(g.bytes), *op, why.clone()));
    let total: u64 = groups.iter().map(|(_, g)| g.bytes).sum();
    let few = groups.len() <= 4;
    let matters = |op: &str, why: &str, g: &Group<'_>| {
        verbose || few || g.bytes >= (total / 200).max(1) || HEAVY.contains(&op) || why.starts_with("excluded")
    };
    let (shown, rest): (Vec<_>, Vec<_>) = groups.iter().partition(|((op, why), g)| matters(op, why, g));
    let rows: Vec<[String; 3]> = shown
        .iter()
        .map(|((op, _), g)| {
            [g.skips.len().to_string(), (*op).to_owned(), if g.bytes > 0 { bytes(g.bytes) } else { String::new() }]
        })
        .collect();
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut out = String::from("\nleft float\n");
    for ([number, op, size], ((_, why), group)) in rows.iter().zip(&shown) {
        let head = format!("  {number:>0$}  {op:<1$}  {size:>2$}  ", widths[0], widths[1], widths[2]);
        let mut reason = why.replace(SPAN, &span(&group.decibels));
        if verbose {
            let names: BTreeSet<&str> = group.skips.iter().map(|s| s.node.as_str()).filter(|n| !n.is_empty()).collect();
            if !names.is_empty() {
                let _ = write!(reason, ": {}", names.into_iter().collect::<Vec<_>>().join(", "));
            }
        }
        let indent = head.chars().count();
        let reason = if verbose { reason } else { wrap(&reason, indent, indent, WIDTH.max(indent + 30)) };
        let _ = writeln!(out, "{head}{reason}");
    }
    if !rest.is_empty() {
        let number = rest.iter().map(|(_, g)| g.skips.len()).sum();
        let list = operators(rest.iter().flat_map(|(_, g)| g.skips.iter().copied()), 6);
        let line = format!("and {}: {list}", count(number, "smaller node"));
        let _ = writeln!(out, "  {}", wrap(&line, 2, 2, WIDTH));
    }
    let guarded = shown.iter().any(|(_, g)| !g.decibels.is_empty());
    if !verbose && (guarded || !rest.is_empty()) {
        let how = if guarded { "; --no-guard quantizes what loses accuracy too" } else { "" };
        let _ = writeln!(out, "  -v or --report names them{how}");
    }
    out
}

/// The kind of a reason, and the quality it speaks of: what the guard says of single tensors is brought to one form.
fn kind(why: &str) -> (String, Option<f64>) {
    let number = |text: &str| text.split(' ').next().and_then(|n| n.parse().ok());
    if let Some((_, rest)) = why.split_once("\" keeps only ") {
        let limit = rest.split("below ").nth(1).and_then(|l| l.split(" dB").next());
        let kind =
            format!("a tensor keeps only {SPAN} dB{}", limit.map_or_else(String::new, |l| format!(", below {l} dB")));
        return (kind, number(rest));
    }
    if let Some((_, rest)) = why.split_once("alone it leaves ") {
        return (format!("alone it leaves only {SPAN} dB at the outputs"), number(rest));
    }
    // Names of tensors differ from node to node.
    let mut parts = why.split('"');
    let mut out = parts.next().unwrap_or_default().to_owned();
    if why.contains("switched off by") {
        return (why.to_owned(), None);
    }
    while let (Some(_), Some(after)) = (parts.next(), parts.next()) {
        out.push_str("a tensor");
        out.push_str(after);
    }
    (out, None)
}

/// `20.6 to 27.1`.
fn span(decibels: &[f64]) -> String {
    let low = decibels.iter().copied().fold(f64::INFINITY, f64::min);
    let high = decibels.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match decibels.len() {
        0 => String::new(),
        _ if format!("{low:.1}") == format!("{high:.1}") => format!("{low:.1}"),
        _ => format!("{low:.1} to {high:.1}"),
    }
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
        let how = match &w.algorithm {
            Some(AlgorithmRow { method, fit }) => {
                let kept = match fit.fell_back {
                    0 => String::new(),
                    some => format!(", which {some} of {} groups keep", fit.groups),
                };
                format!("{method}: {} by rounding{kept}", decibels(fit.rounding_db))
            }
            None if w.pair_safe => "pair-safe".to_owned(),
            None => String::new(),
        };
        let scales = count(w.scales, "scale");
        rows.push(vec![w.site.clone(), w.dtype.to_owned(), scales, decibels(w.sqnr_db), how]);
    }
    if rows.is_empty() { String::new() } else { format!("\ntensors\n{}", table(&rows, &[3])) }
}
