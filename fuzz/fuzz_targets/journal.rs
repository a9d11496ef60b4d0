//! See `kvoyant_fuzz::targets::journal`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::journal::run(bytes));
