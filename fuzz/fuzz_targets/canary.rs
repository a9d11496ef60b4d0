//! See `kvoyant_fuzz::targets::canary`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::canary::run(bytes));
