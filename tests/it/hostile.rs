//! Inputs that are broken on purpose: whatever a file holds, amax answers with a result or an error that blames the file, soon,
//! never with a panic and never with an error that blames itself.
//!
//! Cases are numbers; each makes the same input everywhere. `AMAX_HOSTILE=1000000 cargo test hostile::models` runs so many, and
//! `AMAX_HOSTILE=FIRST..LAST` those. What fails is written to `target/hostile`; mended, it moves to `tests/data/hostile`.
//! The inputs, and what is asked of them, are those of the fuzzer in `fuzz/`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use rayon::prelude::*;

use crate::support::{folder, models_below, root};

#[path = "../../fuzz/src/lib.rs"]
mod fuzz;

use fuzz::choices::{Choose, SplitMix};
use fuzz::structure::files_below;
use fuzz::{documents, structure, targets};

/// No input may keep a thread busy for longer.
const LONGEST: Duration = Duration::from_secs(10);

/// How long this thread has been on a processor, where the system tells.
fn busy() -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(told.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default())
}

/// What is wrong with the answer to an input, if anything is.
fn fault(ask: impl FnOnce()) -> Option<String> {
    let start = busy();
    let asked = catch_unwind(AssertUnwindSafe(ask));
    let Err(payload) = asked else {
        let took = busy().saturating_sub(start);
        return (took > LONGEST).then(|| format!("takes {took:?}"));
    };
    let text = payload.downcast_ref::<String>().cloned();
    let text = text.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()));
    Some(text.unwrap_or_default())
}

/// The numbers of the cases, `usual` of them unless it is said otherwise.
fn range(usual: u64) -> Range<u64> {
    let Ok(asked) = std::env::var("AMAX_HOSTILE") else { return 0..usual };
    let number = |text: &str| text.trim().parse().expect("AMAX_HOSTILE is a number, or two with .. between them");
    match asked.split_once("..") {
        Some((first, last)) => number(first)..number(last),
        None => 0..number(&asked),
    }
}

/// Makes the input of each case, asks, and keeps what fails; before that, asks what is kept.
fn check(name: &str, usual: u64, make: impl Fn(&mut SplitMix) -> Vec<u8> + Sync, ask: impl Fn(&[u8]) + Sync) {
    for path in files_below(&root("tests/data/hostile")) {
        if path.to_str().is_some_and(|path| path.ends_with(&format!("_{name}"))) {
            let input = std::fs::read(&path).unwrap();
            assert_eq!(fault(|| ask(&input)), None, "{}", path.display());
        }
    }
    let faults: Vec<String> = range(usual)
        .into_par_iter()
        .filter_map(|case| {
            let input = make(&mut SplitMix(case));
            let fault = fault(|| ask(&input))?;
            let folder = root("target/hostile");
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(format!("{case}_{name}")), input).unwrap();
            Some(format!("target/hostile/{case}_{name} {fault}"))
        })
        .collect();
    assert!(faults.is_empty(), "{} of {:?}:\n{}", faults.len(), range(usual), faults.join("\n"));
}

/// The texts of all files below folders whose names end so.
fn texts(folders: &[&str], ending: &str) -> Vec<String> {
    let paths = folders.iter().flat_map(|folder| files_below(&root(folder)));
    let paths = paths.filter(|path| path.to_str().is_some_and(|path| path.ends_with(ending)));
    let found: Vec<String> = paths.filter_map(|path| std::fs::read_to_string(path).ok()).collect();
    assert!(!found.is_empty(), "no *{ending} in {folders:?}");
    found
}

fn check_documents(name: &str, usual: u64, seeds: &[String], ask: impl Fn(&str) + Sync) {
    let make = |random: &mut SplitMix| documents::mutant(seeds, random).into_bytes();
    check(name, usual, make, |bytes| ask(std::str::from_utf8(bytes).unwrap()));
}

#[test]
fn models_are_quantized_or_refused() {
    let seeds = structure::seeds(&root(""));
    assert!(seeds.len() > 200, "only {} seeds", seeds.len());
    check("model.onnx", 20_000, |random| structure::mutant(&seeds, random), targets::model);
}

#[test]
#[cfg(feature = "tract")]
fn models_are_run_or_refused() {
    let seeds = structure::seeds(&root(""));
    check("run.onnx", 1000, |random| structure::mutant(&seeds, random), targets::run);
}

#[test]
fn models_that_once_failed_do_not_again() {
    let kept = models_below(&root("tests/data/hostile"));
    assert!(!kept.is_empty());
    for path in kept {
        let bytes = std::fs::read(&path).unwrap();
        for seed in 0..100 {
            let fault = fault(|| targets::model_with(&bytes, &mut SplitMix(seed)));
            assert_eq!(fault, None, "{} with seed {seed}", path.display());
        }
    }
}

#[test]
fn texts_are_parsed_or_refused() {
    let mut seeds = texts(&["tests/passes", "tests/cli/models"], "");
    seeds.extend(texts(&["tests/data/text"], ".txt"));
    seeds.retain(|text| text.len() < 4096);
    check_documents("txt", 4000, &seeds, targets::graph_text);
}

#[test]
fn configurations_are_carried_out_or_refused() {
    let mut seeds = texts(&["tests/data/config", "src/config/presets"], ".toml");
    seeds.push(
        "[default]\nweight = { dtype = \"int8\" }\n[[layer]]\nname = \"stem\"\ninput = { enable = false }\n".to_owned(),
    );
    check_documents("config.toml", 1000, &seeds, targets::configuration);
}

#[test]
fn configurations_of_others_are_converted_or_refused() {
    let seeds = texts(&["tests/data/config/import"], "");
    check_documents("json", 4000, &seeds, targets::import);
}

#[test]
fn profiles_are_taken_or_refused() {
    check_documents("profile.toml", 500, &texts(&["src/targets"], ".toml"), targets::profile);
}

#[test]
fn plans_are_carried_out_or_refused() {
    let local = ["int8", "w4", "w8", "int8-dynamic"].map(|preset| (preset, "ort-cpu"));
    let plans = [local.as_slice(), &[("fp8", "generic"), ("nvfp4", "generic"), ("int8", "tensorrt")]].concat();
    let plans: Vec<String> = plans.into_iter().map(targets::plan_of).collect();
    check_documents("plan.json", 1000, &plans, targets::plan);
}

#[test]
fn statistics_are_read_or_refused() {
    let seeds = [targets::statistics_of_digits()];
    let make = |random: &mut SplitMix| {
        let seed = random.one_of(&seeds).cloned().unwrap_or_default();
        structure::scrambled(seed, random)
    };
    check("safetensors", 1000, make, targets::statistics);
}

#[test]
fn statistics_of_any_values_make_a_model() {
    check(
        "values",
        200,
        |random| random.next().to_le_bytes().to_vec(),
        |bytes| {
            targets::odd_statistics(&mut SplitMix(u64::from_le_bytes(bytes.try_into().unwrap())));
        },
    );
}

#[test]
fn samples_are_read_or_refused() {
    let mut seeds: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    for path in files_below(&root("tests/data/samples")) {
        let ending = |of: &Path| of.extension().and_then(|e| e.to_str().map(str::to_owned));
        if let Some(name) = targets::SAMPLE_FILES.iter().find(|name| ending(Path::new(name)) == ending(&path)) {
            seeds.entry(name).or_default().push(std::fs::read(path).unwrap());
        }
    }
    assert_eq!(seeds.len(), targets::SAMPLE_FILES.len(), "each form has samples");
    for (at, (name, seeds)) in seeds.iter().enumerate() {
        let texts: Vec<String> = seeds.iter().filter_map(|bytes| String::from_utf8(bytes.clone()).ok()).collect();
        let make = |random: &mut SplitMix| match random.below(2) {
            0 if name.ends_with("toml") || name.ends_with("jsonl") => documents::mutant(&texts, random).into_bytes(),
            _ => structure::scrambled(random.one_of(seeds).cloned().unwrap_or_default(), random),
        };
        check(&format!("{at}.{}", name.replace('/', ".")), 500, make, |bytes| {
            let folder = folder();
            std::fs::create_dir(folder.path().join("images")).unwrap();
            // A description of pictures needs one, and a picture a description.
            if *name == "images/preprocess.toml" {
                std::fs::copy(root("tests/data/samples/bad/both/10.png"), folder.path().join("images/0.png")).unwrap();
            } else if name.starts_with("images/") {
                let described = root("tests/data/samples/good/pictures/imagenet/preprocess.toml");
                std::fs::copy(described, folder.path().join("images/preprocess.toml")).unwrap();
            }
            targets::samples(folder.path(), name, bytes);
        });
    }
}
