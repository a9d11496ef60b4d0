//! See `kvoyant_fuzz::targets::models`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::models::run(bytes));
