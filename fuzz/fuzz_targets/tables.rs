//! See `kvoyant_fuzz::targets::tables`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::tables::run(bytes));
