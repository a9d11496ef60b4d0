//! See `kvoyant_fuzz::targets::images`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::images::run(bytes));
