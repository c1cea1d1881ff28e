//! The fuzzer's bytes are the decisions of the mutator, so that it evolves models by their structure.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use amax_fuzz::choices::Choose;
use amax_fuzz::{structure, targets};
use arbitrary::Unstructured;

static SEEDS: LazyLock<Vec<Vec<u8>>> =
    LazyLock::new(|| structure::seeds(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..")));

struct Decisions<'a>(Unstructured<'a>);

impl Choose for Decisions<'_> {
    fn next(&mut self) -> u64 {
        self.0.arbitrary().unwrap_or_default()
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0.choose_index(limit.max(1)).unwrap_or_default()
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut decisions = Decisions(Unstructured::new(data));
    let model = structure::mutant(&SEEDS, &mut decisions);
    targets::model_with(&model, &mut decisions);
});
