//! The first byte says in which form the others are samples.
#![no_main]

use amax_fuzz::targets::{SAMPLE_FILES, samples};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&form, bytes)) = data.split_first() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    samples(folder.path(), SAMPLE_FILES[usize::from(form) % SAMPLE_FILES.len()], bytes);
});
