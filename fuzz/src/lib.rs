//! What amax is broken with, and what it is asked then: for the fuzzer in this folder, and for `tests/it/hostile.rs`.

pub mod choices;
pub mod documents;
pub mod structure;
pub mod targets;
