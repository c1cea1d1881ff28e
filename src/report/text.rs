//! What a user reads after a rewrite.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::layout::{bytes, count, decibels, table, wrap};
use crate::solve::{Corrected, Learned};

use super::{AlgorithmRow, FloatQuality, LogitsQuality, QualityRow, Report, Unlike, WeightRow};
use crate::algorithms::sufficiency::{FEW, Sufficiency};
use crate::plan::{Divided, Skip};
use crate::reason::Reason;
use crate::reopen;

pub(super) const WIDTH: usize = 80;

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
    let mut out = format!("target {}, opset {opset}\n", report.target);
    if report.frozen_inputs > 0 {
        let line = format!(
            "{} of the model made constant: weights with defaults; --keep-inputs leaves them",
            count(report.frozen_inputs, "input")
        );
        let _ = writeln!(out, "{}", wrap(&line, 0, 0, WIDTH));
    }
    let opened: usize = report.passes.iter().filter(|row| row.pass == reopen::PASS).map(|row| row.changes).sum();
    if opened > 0 {
        let line = format!("{} in 8 bits quantized again, with their inputs", count(opened, "weight"));
        let _ = writeln!(out, "{}", wrap(&line, 0, 0, WIDTH));
    }
    out.push_str(&floats(report));
    out.push_str(&quantized(report, verbose));
    out.push_str(&only_weights(report, verbose));
    let (already, left): (Vec<&Skip>, Vec<&Skip>) = report
        .skipped
        .iter()
        .filter(|s| s.why != Reason::BesideKernel)
        .partition(|s| s.why == Reason::QuantizedAlready);
    out.push_str(&kept(&already));
    out.push_str(&left_float(&left, verbose));
    if verbose {
        out.push_str(&details(report));
    }
    if let Some(budget) = &report.budget {
        out.push_str(&budget.text(verbose));
    }
    out.push_str(&figures(report, verbose, total));
    out
}

/// How much of the weights stays float, and why most of it does.
fn floats(report: &Report) -> String {
    let (left, all) = report.float_bytes;
    if left.saturating_mul(200) < all.max(1) {
        return String::new();
    }
    let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
    for skip in report.skipped.iter().filter(|s| s.bytes > 0) {
        *reasons.entry(kind(&skip.why).0.replace(SPAN, "little")).or_default() += skip.bytes;
    }
    let most = reasons
        .into_iter()
        .max_by_key(|(_, bytes)| *bytes)
        .map_or_else(String::new, |(why, _)| format!(", most of it because: {why}"));
    let share = left as f64 / all as f64 * 100.0;
    let line = format!("weights  {} of {} stay float ({share:.0} %){most}", bytes(left), bytes(all));
    wrap(&line, 0, 9, WIDTH) + "\n"
}

/// What runs on integers.
fn quantized(report: &Report, verbose: bool) -> String {
    let mut operators: Vec<_> = report.operators.iter().collect();
    operators.sort_by_key(|(op, (some, _))| (std::cmp::Reverse(*some), op.as_str()));
    let rows: Vec<Vec<String>> =
        operators.iter().map(|(op, (some, all))| vec![format!("{some}/{all}"), (*op).clone()]).collect();
    let dynamic = report.activations.iter().filter(|a| a.mode == "dynamic").count();
    let ranged = if dynamic > 0 { format!(" ({dynamic} ranged at run time)") } else { String::new() };
    let constants = report.weights.iter().filter(|w| !w.is_alone()).count();
    let tensors = report.activations.len();
    let mut counts = Vec::new();
    counts.extend((tensors > 0).then(|| count(tensors, "activation tensor") + &ranged));
    counts.extend((constants > 0).then(|| count(constants, "constant")));
    let smoothed = report.smoothing.iter().filter(|row| row.done.is_some()).count();
    counts.extend((smoothed > 0).then(|| count(smoothed, "input") + " smoothed"));
    if rows.is_empty() && counts.is_empty() {
        let nothing = report.weights.is_empty();
        return if nothing { "\nquantized\n  nothing\n".to_owned() } else { String::new() };
    }
    let alone = alone(report);
    let floats = float_constants(report, &|node| !alone.contains(node), verbose);
    format!("\nquantized\n{}  {}{floats}\n", table(&rows, &[0]), counts.join(", "))
}

/// Nodes that compute in float on quantized weights.
fn only_weights(report: &Report, verbose: bool) -> String {
    let weights = || report.weights.iter().filter(|w| w.is_alone());
    // Both weights of a recurrent layer have one site.
    let sites: BTreeMap<&str, &WeightRow> = weights().map(|w| (w.site.as_str(), w)).collect();
    if sites.is_empty() {
        return String::new();
    }
    let mut found = Grouped::default();
    for weight in sites.into_values() {
        if let Reason::FloatWeight { op, because } = &weight.why {
            found.add(op, weight.node(), 0, because.as_deref(), verbose);
        }
    }
    let mut groups: Vec<_> = found.0.iter().collect();
    groups.sort_by_key(|((op, _), g)| (std::cmp::Reverse(g.nodes.len()), *op));
    let alone = alone(report);
    let floats = float_constants(report, &|node| alone.contains(node), verbose);
    format!(
        "\nonly weights quantized\n{}  {}{floats}\n",
        listed(&groups, verbose),
        count(weights().count(), "constant")
    )
}

/// The nodes of which only the weights are quantized.
fn alone(report: &Report) -> BTreeSet<&str> {
    report.weights.iter().filter(|w| w.is_alone()).map(WeightRow::node).collect()
}

/// `; 320 B of other constants stay float`: those of certain quantized nodes.
fn float_constants(report: &Report, of: &dyn Fn(&str) -> bool, verbose: bool) -> String {
    let beside = report.skipped.iter().filter(|s| s.why == Reason::BesideKernel && of(&s.node));
    let beside: Vec<&Skip> = beside.collect();
    let size: u64 = beside.iter().map(|s| s.bytes).sum();
    if size == 0 {
        return String::new();
    }
    let names: BTreeSet<&str> = beside.iter().map(|s| s.node.as_str()).collect();
    let names = if verbose { format!(": {}", names.into_iter().collect::<Vec<_>>().join(", ")) } else { String::new() };
    format!("; {} of other constants stay float{names}", bytes(size))
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
    if let Some(gains) = gains(report) {
        let _ = writeln!(out, "{}", wrap(&format!("gains    {gains}"), 0, 9, WIDTH));
    }
    if let Some(found) = &report.sufficiency {
        let line = format!("ranges   {}", ranges(found));
        let _ = writeln!(out, "{}", wrap(&line, 0, 9, WIDTH));
    }
    if !report.quality.is_empty() {
        for line in quality("quality", &report.quality, [5, 4]).lines() {
            out.extend([line.strip_prefix("  ").unwrap_or(line), "\n"]);
        }
    }
    if let Some(found) = &report.deployed {
        let db = found.quality.iter().filter_map(QualityRow::sqnr_db).min_by(f64::total_cmp);
        let db = db.map_or_else(String::new, |db| format!(": {}", decibels(db)));
        let line = format!("deployed onnxruntime {}{db}, {}", found.onnxruntime, found.latency());
        let _ = writeln!(out, "{}", wrap(&line, 0, 9, WIDTH));
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

/// The table of outputs under a heading, and what there is to say of some of them; `places` are those of cosine and error.
#[must_use]
pub fn quality(heading: &str, rows: &[QualityRow], places: [usize; 2]) -> String {
    let [first, second] = places;
    let mut cells = vec![[heading, "SQNR", "cosine", "largest error"].map(str::to_owned).to_vec()];
    let mut notes = String::new();
    for row in rows {
        let name = row.into.as_ref().map_or_else(|| row.output.clone(), |op| format!("{} (into {op})", row.output));
        let mut figures = [String::new(), String::new(), String::new()];
        if let Some(found) = &row.floats {
            let FloatQuality { sqnr_db, median_channel_db, cosine, max_abs_error } = found;
            figures = [decibels(*sqnr_db), format!("{cosine:.first$}"), format!("{max_abs_error:.second$}")];
            if let Some(median) = median_channel_db {
                let _ = writeln!(notes, "  {name}: {} in the median of its channels", decibels(*median));
            }
        }
        if let Some(LogitsQuality { kl, top1, perplexity }) = &row.logits {
            let perplexity = perplexity.map_or_else(String::new, |[a, b]| format!(", perplexity {a:.3} -> {b:.3}"));
            let _ = writeln!(
                notes,
                "  {name}: KL divergence {kl:.5} nats, top-1 agreement {:.1} %{perplexity}",
                top1 * 100.0
            );
        }
        if let Some(agreement) = row.agreement {
            figures[0] = format!("{:.1} % equal", agreement * 100.0);
        }
        if let Some(Unlike { samples, shapes: [a, b] }) = &row.unlike {
            "not comparable".clone_into(&mut figures[0]);
            let times = count(*samples, "sample");
            let _ = writeln!(notes, "  {name}: its size depends on values, and differs in {times} ({a:?} and {b:?})");
        }
        cells.push([vec![name], figures.to_vec()].concat());
    }
    table(&cells, &[1, 2, 3]) + &notes
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
    let mut out: Vec<String> = report.warnings.iter().map(|warning| wrap(warning, 9, 9, WIDTH)).collect();
    if out.len() > limit {
        let more = count(out.len() - limit, "warning");
        out.truncate(limit);
        out.push(format!("{more} more; -v or --report shows them"));
    }
    // Fake quantizers leave weights in float, as asked.
    let floats = report.passes.iter().any(|p| p.pass == "unfold-weights" || (p.pass == "simulate" && p.changes > 0));
    if report.bytes.1 > report.bytes.0 && !report.weights.is_empty() && !floats {
        out.push("the result is larger than the input: few of its bytes are quantized weights".to_owned());
    }
    let floats = report.quality.iter().filter_map(|q| Some((q, q.sqnr_db()?)));
    let worst = floats.min_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((worst, db)) = worst.filter(|(_, db)| db.is_nan() || *db < LOW) {
        out.push(format!(
            "\"{}\" keeps only {} of the float model's signal\n         \
             look at the tensors of -v or --report, --exclude the worst nodes, or give\n         \
             more samples, and more typical ones",
            worst.output,
            decibels(db)
        ));
    }
    out
}

/// What was quantized before.
fn kept(already: &[&Skip]) -> String {
    if already.is_empty() {
        return String::new();
    }
    let nodes = already.iter().map(|s| (s.op.as_str(), s.node.as_str()));
    format!("\nquantized already, and kept\n  {}\n", wrap(&operators(nodes, usize::MAX), 2, 2, WIDTH))
}

/// `4 Conv, 1 Gemm`, at most `limit` of them.
fn operators<'a>(nodes: impl Iterator<Item = (&'a str, &'a str)>, limit: usize) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    // A node may be listed for itself and for its bodies.
    let nodes: BTreeSet<(&str, &str)> = nodes.collect();
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

/// Nodes of one operator and kind of reason.
#[derive(Default)]
struct Group<'a> {
    bytes: u64,
    nodes: Vec<&'a str>,
    /// Qualities that reasons speak of.
    decibels: Vec<f64>,
    /// The user asked for just these.
    asked: bool,
}

/// Groups by operator and what their reasons have in common.
#[derive(Default)]
struct Grouped<'a>(BTreeMap<(&'a str, String), Group<'a>>);

impl<'a> Grouped<'a> {
    fn add(&mut self, op: &'a str, node: &'a str, bytes: u64, why: Option<&'a Reason>, verbose: bool) {
        let (text, decibels) = match why {
            Some(why) if verbose => (why.to_string(), None),
            Some(why) => kind(why),
            None => (String::new(), None),
        };
        let group = self.0.entry((op, text)).or_default();
        group.bytes += bytes;
        group.nodes.push(node);
        group.decibels.extend(decibels);
        group.asked |= matches!(why, Some(Reason::Excluded { .. } | Reason::TensorOff { .. }));
    }
}

/// A line for each group: how many nodes, of which operator, what they weigh, and why.
fn listed(groups: &[(&(&str, String), &Group<'_>)], verbose: bool) -> String {
    let size = |g: &Group<'_>| if g.bytes > 0 { bytes(g.bytes) } else { String::new() };
    let rows: Vec<[String; 3]> =
        groups.iter().map(|((op, _), g)| [g.nodes.len().to_string(), (*op).to_owned(), size(g)]).collect();
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut out = String::new();
    for ([number, op, size], ((_, why), group)) in rows.iter().zip(groups) {
        let mut head = format!("  {number:>0$}  {op:<1$}  ", widths[0], widths[1]);
        if widths[2] > 0 {
            let _ = write!(head, "{size:>0$}  ", widths[2]);
        }
        let mut reason = why.replace(SPAN, &span(&group.decibels));
        if verbose {
            let names: BTreeSet<&str> = group.nodes.iter().copied().filter(|n| !n.is_empty()).collect();
            if !names.is_empty() {
                let _ = write!(reason, ": {}", names.into_iter().collect::<Vec<_>>().join(", "));
            }
        }
        let indent = head.chars().count();
        let reason = if verbose { reason } else { wrap(&reason, indent, indent, WIDTH.max(indent + 30)) };
        let _ = writeln!(out, "{head}{reason}");
    }
    out
}

/// What stays float: nodes that matter in a line for each operator and kind of reason, the others counted.
fn left_float(left: &[&Skip], verbose: bool) -> String {
    if left.is_empty() {
        return String::new();
    }
    let mut found = Grouped::default();
    for skip in left {
        found.add(&skip.op, &skip.node, skip.bytes, Some(&skip.why), verbose);
    }
    let mut groups: Vec<_> = found.0.iter().collect();
    groups.sort_by_key(|((op, why), g)| (std::cmp::Reverse(g.bytes), *op, why));
    let total: u64 = groups.iter().map(|(_, g)| g.bytes).sum();
    let few = groups.len() <= 4;
    let matters =
        |op: &str, g: &Group<'_>| verbose || few || g.asked || g.bytes >= (total / 200).max(1) || HEAVY.contains(&op);
    let (shown, rest): (Vec<_>, Vec<_>) = groups.iter().partition(|((op, _), g)| matters(op, g));
    let mut out = format!("\nleft float\n{}", listed(&shown, verbose));
    if !rest.is_empty() {
        let number = rest.iter().map(|(_, g)| g.nodes.len()).sum();
        let nodes = rest.iter().flat_map(|((op, _), g)| g.nodes.iter().map(|&node| (*op, node)));
        let and = if shown.is_empty() { "" } else { "and " };
        let line = format!("{and}{}: {}", count(number, "smaller node"), operators(nodes, 6));
        let _ = writeln!(out, "  {}", wrap(&line, 2, 2, WIDTH));
    }
    let guarded = shown.iter().any(|(_, g)| !g.decibels.is_empty());
    if !verbose && (guarded || !rest.is_empty()) {
        let how = if guarded { "; --no-guard quantizes what loses accuracy too" } else { "" };
        let _ = writeln!(out, "  -v or --report names them{how}");
    }
    out
}

/// What reasons of one kind have in common, whatever the tensor, and the quality that this one speaks of.
fn kind(why: &Reason) -> (String, Option<f64>) {
    let text = match why {
        Reason::Guarded { db, limit, .. } => {
            return (format!("a tensor keeps only {SPAN} dB, below {limit} dB"), Some(db.0));
        }
        Reason::Costly { db } => return (format!("quantized alone it leaves {SPAN} dB at the outputs"), Some(db.0)),
        Reason::NeedsOutput { op, because } => {
            let (because, decibels) = kind(because);
            return (format!("{because}, and the integer {op} needs a quantized output"), decibels);
        }
        Reason::WrongTensorType { found, wanted, .. } => format!("a tensor is {found}, not {wanted}"),
        Reason::UnknownType { .. } => "the type of a tensor is not known".to_owned(),
        Reason::NoValues { .. } => "a tensor had no values in any sample".to_owned(),
        Reason::NeverFinite { .. } => "a tensor was NaN or infinite in every sample".to_owned(),
        Reason::Unobserved { tensor, cause } => cause.replace(&format!("\"{tensor}\""), "a tensor"),
        other => other.to_string(),
    };
    (text, None)
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

/// What samples made of weights and biases, all together.
fn gains(report: &Report) -> Option<String> {
    let learned: Vec<&Learned> = report.weights.iter().filter_map(|w| w.learned.as_ref()).collect();
    let solved = learned.iter().filter(|l| l.fell_back.is_none());
    let by: Vec<f64> = solved.map(|l| l.held_out_db - l.held_out_rounding_db).collect();
    let rounded = learned.len() - by.len();
    let corrected = report.corrections.iter().filter(|c| c.fell_back.is_none()).count();
    let mut parts = Vec::new();
    if !by.is_empty() {
        parts.push(format!("{} solved with samples, outputs {} dB closer", count(by.len(), "weight"), span(&by)));
    }
    if rounded > 0 {
        parts.push(format!("{} rounded, since samples do not help", count(rounded, "weight")));
    }
    if corrected > 0 {
        parts.push(format!("{} with a corrected bias", count(corrected, "product")));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// What samples made of a weight.
fn improved(learned: &Learned) -> String {
    let Learned { method, rows, columns, damp, held_out_rounding_db, held_out_db, fell_back, .. } = learned;
    let method = method.name();
    let (from, to) = (decibels(*held_out_rounding_db), decibels(*held_out_db));
    match fell_back {
        Some(why) => format!("{method}: {why}"),
        None => format!("{method}: output {to}, {from} by rounding ({rows} rows, {columns} columns, damp {damp:.3})"),
    }
}

/// Every quantized tensor.
fn details(report: &Report) -> String {
    let mut rows = Vec::new();
    for a in &report.activations {
        let range = a.range.map_or_else(|| "at run time".to_owned(), |(l, h)| format!("[{l:.4}, {h:.4}]"));
        let quality = a.sqnr_db.map(decibels).unwrap_or_default();
        rows.push(vec![a.tensor.clone(), a.dtype.to_owned(), range, quality, a.why.to_string()]);
    }
    for w in &report.weights {
        let how = match (&w.learned, &w.algorithm) {
            (Some(learned), _) => improved(learned),
            (None, Some(AlgorithmRow { method, fit })) => {
                let kept = match fit.fell_back {
                    0 => String::new(),
                    some => format!(", which {some} of {} groups keep", fit.groups),
                };
                format!("{method}: {} by rounding{kept}", decibels(fit.rounding_db))
            }
            (None, None) if w.pair_safe => "pair-safe".to_owned(),
            (None, None) => String::new(),
        };
        let scales = count(w.scales, "scale");
        rows.push(vec![w.site.clone(), w.dtype.to_owned(), scales, decibels(w.sqnr_db), how]);
    }
    for Corrected { site, before_db, after_db, fell_back, .. } in &report.corrections {
        let (quality, how) = match fell_back {
            Some(why) => (String::new(), format!("not corrected: {why}")),
            None => {
                (decibels(*after_db), format!("corrected: output {} before, on held out samples", decibels(*before_db)))
            }
        };
        rows.push(vec![site.clone(), "bias".to_owned(), String::new(), quality, how]);
    }
    let tensors = if rows.is_empty() { String::new() } else { format!("\ntensors\n{}", table(&rows, &[3])) };
    let smoothed = report.smoothing.iter().map(|row| {
        let Some(done) = &row.done else {
            return vec![
                row.tensor.clone(),
                String::new(),
                row.why.as_ref().map(Reason::to_string).unwrap_or_default(),
            ];
        };
        let by = match done.divided {
            Divided::Producer => "divided by what makes it",
            Divided::Mul => "divided by a Mul",
        };
        let measured = done.before_db.zip(done.after_db);
        let gain = measured.map(|(before, after)| format!(": {} instead of {}", decibels(after), decibels(before)));
        vec![row.tensor.clone(), format!("alpha {:.2}", done.alpha), format!("{by}{}", gain.unwrap_or_default())]
    });
    let smoothed: Vec<_> = smoothed.collect();
    let smoothed = if smoothed.is_empty() { String::new() } else { format!("\nsmoothed\n{}", table(&smoothed, &[])) };
    smoothed + &tensors
}
