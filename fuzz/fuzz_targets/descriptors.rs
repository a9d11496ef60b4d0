//! See `kvoyant_fuzz::targets::descriptors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::descriptors::run(bytes));
