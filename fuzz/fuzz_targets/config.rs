//! See `kvoyant_fuzz::targets::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::config::run(bytes));
