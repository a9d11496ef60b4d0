//! See `kvoyant_fuzz::targets::prefixes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::prefixes::run(bytes));
