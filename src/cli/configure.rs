//! The arguments of every command with a configuration.

use std::path::PathBuf;

use amax::config::{Config, presets};
use amax::error::Result;
use amax::targets::{self, Target};
use clap::{ArgMatches, Command, FromArgMatches};

/// The arguments, flattened into those of a command.
///
/// Implemented over [`Given`] by hand, since the order among `--set`, `--enable`, `--disable` and `--exclude` counts, and
/// clap's derived structs do not keep it.
pub(crate) struct Args {
    given: Given,
    changes: Vec<Change>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Configuration")]
struct Given {
    /// Configuration file, TOML or JSON.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the result will run: ort-cpu (default), ort-cpu-vnni, tensorrt, generic, or a .toml profile.
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Named configuration to start from, instead of the file's; amax presets lists them.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Set one key, such as default.weight.dtype=int4, op_type.Conv.enable=false or layer.GLOB.input.dynamic=true;
    /// repeatable. The last of --set, --enable, --disable, --exclude, --form and --algorithm wins.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Quantize nodes or sites whose name matches, whatever earlier rules say; repeatable.
    #[arg(long, value_name = "GLOB")]
    enable: Vec<String>,
    /// Keep nodes or sites whose name matches in float; repeatable.
    #[arg(long, value_name = "GLOB")]
    disable: Vec<String>,
    /// Same as --disable; amax inspect --nodes lists names.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Storage format of quantized weights, where it is possible: qdq, matmulnbits, gather-block-quantized,
    /// matmulinteger or dynamic-quantize-lstm; same as --set default.weight.form=FORM.
    #[arg(long, value_name = "FORM")]
    form: Vec<String>,
    /// What improves on ranges and rounding: none, smoothquant, awq_lite, hqq or kquant; same as --set algorithm=NAME.
    #[arg(long, value_name = "NAME")]
    algorithm: Vec<String>,
    /// Quantize every planned tensor, however inaccurate the result.
    #[arg(long)]
    no_guard: bool,
    /// Leave weights that are inputs of the model, too, as they are, so that callers can still give others.
    #[arg(long)]
    keep_inputs: bool,
}

/// One change to the configuration.
#[derive(Clone, Debug)]
struct Change {
    option: &'static str,
    value: String,
}

/// The options whose order counts.
const ORDERED: [&str; 6] = ["set", "enable", "disable", "exclude", "form", "algorithm"];

impl clap::Args for Args {
    fn augment_args(command: Command) -> Command {
        // The heading is for these arguments only.
        Given::augment_args(command).next_help_heading(None)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Given::augment_args_for_update(command).next_help_heading(None)
    }
}

impl FromArgMatches for Args {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = Given::from_arg_matches(matches)?;
        let mut changes = Vec::new();
        let lists = [&given.set, &given.enable, &given.disable, &given.exclude, &given.form, &given.algorithm];
        for (option, values) in ORDERED.into_iter().zip(lists) {
            let places = matches.indices_of(option).into_iter().flatten();
            changes.extend(places.zip(values).map(|(at, value)| (at, Change { option, value: value.clone() })));
        }
        changes.sort_by_key(|&(at, _)| at);
        Ok(Self { given, changes: changes.into_iter().map(|(_, change)| change).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args {
    /// The configuration and the target that are asked for.
    ///
    /// # Errors
    /// What is wrong with the file, the preset, the target, or one of the changes.
    pub(crate) fn load(&self) -> Result<(Config, Target)> {
        let Given {
            config: file,
            target,
            preset,
            set: _,
            enable: _,
            disable: _,
            exclude: _,
            form: _,
            algorithm: _,
            no_guard,
            keep_inputs: _,
        } = &self.given;
        let mut config = match file {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        };
        if let Some(name) = preset {
            presets::text(name)?;
            config.preset = Some(name.clone());
        }
        let written = config.target.clone();
        for Change { option, value } in &self.changes {
            match *option {
                "set" => config.set(value)?,
                "algorithm" => config.set(&format!("algorithm={value}"))?,
                "form" => config.set(&format!("default.weight.form={value}"))?,
                option => config.switch(&format!("--{option}"), value, option == "enable")?,
            }
        }
        config.guard.enabled &= !no_guard;
        if let Some(name) = target {
            config.target = Some(name.clone());
        }
        let name = config.target.as_deref().unwrap_or(targets::DEFAULT);
        let target = Target::load(name);
        // A name from the file is wrong at its place in the file.
        let from_file = self.given.target.is_none() && written == config.target;
        let target = if from_file { target.map_err(|e| config.source.at(e, "target"))? } else { target? };
        Ok((config, target))
    }

    /// The files that configuration and target are read from.
    pub(crate) fn files(&self, config: &Config) -> Vec<(&'static str, PathBuf)> {
        let profile = config.target.as_ref().map(|name| ("the target profile", PathBuf::from(name)));
        let file = self.given.config.clone().map(|path| ("the configuration", path));
        profile.into_iter().chain(file).collect()
    }

    /// Whether weights that are inputs, too, stay inputs.
    pub(crate) fn keeps_inputs(&self) -> bool {
        self.given.keep_inputs
    }
}
