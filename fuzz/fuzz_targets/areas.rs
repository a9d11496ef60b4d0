//! See `kvoyant_fuzz::targets::areas`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::areas::run(bytes));
