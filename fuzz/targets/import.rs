#![no_main]

libfuzzer_sys::fuzz_target!(|data: &str| amax_fuzz::targets::import(data));
