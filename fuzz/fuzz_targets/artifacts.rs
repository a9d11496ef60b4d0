//! See `kvoyant_fuzz::targets::artifacts`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::artifacts::run(bytes));
