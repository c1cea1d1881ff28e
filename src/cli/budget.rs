//! The options for a budget, and the command that judges results.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use amax::config::Config;
use amax::error::{Error, Kind, Result};
use amax::ir::{Model, file};
use amax::observe::Progress;
use amax::{Check, Least};
use regex::Regex;

use super::Console;

/// Options that fill in `[budget]`.
#[derive(clap::Args)]
pub(crate) struct Limits {
    /// Choose formats so that the codes of weights have at most so many bits on average, and the outputs lose least.
    #[arg(long, value_name = "BITS", group = "limit", help_heading = "Budget", allow_negative_numbers = true)]
    effective_bits: Option<f64>,
    /// Choose formats so that the result takes at most so much, as 40% or 12MB, and the outputs lose least.
    #[arg(long, value_name = "SIZE", group = "limit", help_heading = "Budget")]
    max_size: Option<String>,
    /// Choose formats so that the worst output keeps so many dB, and the result is smallest.
    #[arg(long, value_name = "DB", group = "limit", help_heading = "Budget", allow_negative_numbers = true)]
    min_sqnr: Option<f64>,
    /// Formats to choose from, separated by commas: int4-g32 (groups of 32), int8, float, presets by name.
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Budget")]
    formats: Vec<String>,
    /// What formats cost, as amax sensitivity wrote it, instead of measuring it.
    #[arg(long, value_name = "FILE", requires = "limit", help_heading = "Budget")]
    pub(crate) sensitivity: Option<PathBuf>,
}

impl Limits {
    /// Puts the options into a configuration, whose own limit gives way.
    pub(crate) fn apply(&self, config: &mut Config) -> Result<()> {
        if !self.formats.is_empty() {
            config.budget.formats.clone_from(&self.formats);
            config.budget.choices().map_err(|(_, e)| e)?;
        }
        if self.effective_bits.is_some() || self.max_size.is_some() || self.min_sqnr.is_some() {
            let budget = &mut config.budget;
            (budget.effective_bits, budget.min_sqnr) = (self.effective_bits, self.min_sqnr);
            budget.max_size.clone_from(&self.max_size);
            budget.goal().map_err(|(_, e)| e)?;
        }
        Ok(())
    }
}

/// Options for a metric of the user's own.
#[derive(clap::Args)]
pub(crate) struct Judged {
    /// Find the smallest result that this command accepts; {} stands for the path of a model. The last number that it prints
    /// is the score, if --at-least or --drop says what that must be; otherwise exit code 0 accepts.
    #[arg(long, value_name = "COMMAND", group = "limit", help_heading = "Budget")]
    check: Option<String>,
    /// The least score.
    #[arg(long, value_name = "SCORE", requires = "check", help_heading = "Budget", allow_negative_numbers = true)]
    at_least: Option<f64>,
    /// How far the score may be below that of the float model: 0.5%, or 0.002.
    #[arg(long, value_name = "DROP", requires = "check", conflicts_with = "at_least", help_heading = "Budget", value_parser = most_lost)]
    drop: Option<Least>,
    /// How often the command may run.
    #[arg(long, value_name = "N", requires = "check", help_heading = "Budget", default_value_t = 10)]
    max_checks: usize,
}

/// Reads the value of `--drop`.
fn most_lost(text: &str) -> Result<Least, String> {
    let found = match text.trim().strip_suffix('%') {
        Some(percent) => percent.trim().parse().map(|percent: f64| Least::Share(percent / 100.0)),
        None => text.trim().parse().map(Least::Below),
    };
    match found {
        Ok(least @ (Least::Share(by) | Least::Below(by))) if by >= 0.0 && by.is_finite() => Ok(least),
        _ => Err("a share or a number of at least 0 is needed, as in 0.5% or 0.002".to_owned()),
    }
}

impl Judged {
    /// Calls `run` with the check that is asked for. Models to judge are written into `folder`.
    pub(crate) fn with<T>(
        &self,
        folder: &Path,
        console: &Console,
        run: impl FnOnce(Option<Check<'_>>) -> Result<T>,
    ) -> Result<T> {
        let Some(command) = &self.check else { return run(None) };
        if !command.contains("{}") {
            let error =
                Error::new(Kind::Usage, format!("--check {command:?} does not say where the path of the model goes"));
            return Err(error.with_hint("write {} there: --check 'python eval.py {}'"));
        }
        let scored = self.at_least.is_some() || self.drop.is_some();
        let count = Cell::new(0);
        let judge = |model: &Model| {
            count.set(count.get() + 1);
            let said = said(command, model, folder)?;
            if console.interrupted() {
                return Err(Error::interrupted());
            }
            let score = if scored { last_number(command, &said)? } else { accepted(command, &said, count.get() == 1)? };
            console.say(&format!(
                "check {}: {}",
                count.get(),
                if scored { score.to_string() } else { word(score).to_owned() }
            ));
            Ok(score)
        };
        let least = self.at_least.map(Least::Score).or(self.drop).unwrap_or(Least::Below(0.0));
        run(Some(Check { judge: &judge, least, most: self.max_checks }))
    }
}

fn word(score: f64) -> &'static str {
    if score > 0.0 { "accepted" } else { "refused" }
}

/// Runs the command on a model.
fn said(command: &str, model: &Model, folder: &Path) -> Result<Output> {
    let fail = |e| Error::io(Kind::Output, "write a model to check into", folder, e);
    // A folder of its own holds external data, too, and goes away with it.
    let own = tempfile::Builder::new().prefix(".amax-check-").tempdir_in(folder).map_err(fail)?;
    let path = own.path().join("model.onnx");
    file::save(model, &path)?;
    let quoted = format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    Command::new("sh")
        .args(["-c", &command.replace("{}", &quoted)])
        .output()
        .map_err(|e| Error::new(Kind::Check, format!("cannot run {command:?}: {e}")))
}

/// What the command failed with.
fn crash(command: &str, said: &Output, what: &str) -> Error {
    let text = [&said.stdout, &said.stderr].map(|bytes| String::from_utf8_lossy(bytes).trim_end().to_owned());
    let text: Vec<String> = text.into_iter().filter(|text| !text.is_empty()).collect();
    let text = if text.is_empty() { "nothing".to_owned() } else { text.join("\n") };
    Error::new(Kind::Check, format!("{command:?} {what} ({}); it printed:\n{text}", said.status))
}

/// The score: the last number on stdout.
fn last_number(command: &str, said: &Output) -> Result<f64> {
    if !said.status.success() {
        return Err(crash(command, said, "failed"));
    }
    let text = String::from_utf8_lossy(&said.stdout);
    let number = Regex::new(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
        .map_err(|e| Error::new(Kind::Internal, format!("a pattern of amax is wrong: {e}")))?;
    let found = number.find_iter(&text).last().and_then(|found| found.as_str().parse().ok());
    found.ok_or_else(|| crash(command, said, "printed no number"))
}

/// 1 where the exit code accepts, 0 where it refuses. It must accept the first model, which is the float model.
fn accepted(command: &str, said: &Output, first: bool) -> Result<f64> {
    match said.status.code() {
        Some(0) => Ok(1.0),
        Some(_) if first => Err(crash(command, said, "refuses the float model")),
        Some(_) => Ok(0.0),
        None => Err(crash(command, said, "was killed")),
    }
}
