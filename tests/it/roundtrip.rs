//! Load → save is byte-identical: over the models in `tests/data/roundtrip`, and over any folder that
//! `AMAX_ROUNDTRIP_DIR` names (`tests/data/make_roundtrip.py --all` fills one with every model that onnx can make).

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot go on has failed; one reports counts")]

use std::path::Path;

use amax::ir::file;

use crate::support::{models_below, root};

/// What differs, if anything.
fn check(path: &Path, scratch: &Path) -> Result<(), String> {
    let model = file::load(path).map_err(|e| e.to_string())?;
    let before = std::fs::read(path).unwrap();
    let copy = scratch.join("copy.onnx");
    file::save(&model, &copy).map_err(|e| e.to_string())?;
    let after = std::fs::read(&copy).unwrap();
    if before != after {
        let at = before.iter().zip(&after).position(|(a, b)| a != b);
        return Err(format!("{} bytes became {}, first difference at {at:?}", before.len(), after.len()));
    }
    if file::estimated_size(&model) != before.len() as u64 {
        return Err(format!("estimated {} bytes, has {}", file::estimated_size(&model), before.len()));
    }
    // The streamed form against that of prost.
    if file::to_bytes(&model).map_err(|e| e.to_string())? != before {
        return Err("to_bytes differs".into());
    }
    Ok(())
}

#[test]
fn committed_models_come_back_byte_for_byte() {
    let scratch = crate::support::folder();
    let models = models_below(&root("tests/data/roundtrip"));
    assert!(models.len() >= 40, "{}", models.len());
    let failed: Vec<_> = models.iter().filter_map(|m| Some((m, check(m, scratch.path()).err()?))).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn models_of_a_folder_come_back_byte_for_byte() {
    let Some(folder) = std::env::var_os("AMAX_ROUNDTRIP_DIR") else { return };
    let scratch = crate::support::folder();
    let models = models_below(Path::new(&folder));
    let mut refused = Vec::new();
    let mut failed = Vec::new();
    for model in &models {
        match check(model, scratch.path()) {
            Ok(()) => {}
            Err(e) if e.contains("is not supported") => refused.push((model, e)),
            Err(e) => failed.push((model, e)),
        }
    }
    for (model, why) in &refused {
        println!("{}: {}", model.display(), why.lines().next().unwrap_or_default());
    }
    println!("{} models, {} refused for their version, {} failed", models.len(), refused.len(), failed.len());
    assert!(!models.is_empty() && failed.is_empty(), "{failed:#?}");
}
