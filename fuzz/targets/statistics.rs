#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| amax_fuzz::targets::statistics(data));
