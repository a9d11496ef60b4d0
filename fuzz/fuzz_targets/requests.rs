//! See `kvoyant_fuzz::targets::requests`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::requests::run(bytes));
