//! See `kvoyant_fuzz::targets::admin`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvoyant_fuzz::targets::admin::run(bytes));
