//! See `kvoyant_fuzz::targets::control`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::control::run(bytes));
