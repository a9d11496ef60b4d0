//! A CUDA driver in software, for Kvoyant's tests.
//!
//! Built as `libsoftcuda.so` and linked as `libcuda.so.1` (and `libnvrtc.so.12`) in a folder on a test's library path,
//! it runs the code that drives a card without one. Device memory is memory of files that live in memory alone, mapped
//! by every process that opens a handle; streams are threads; kernels are the CUDA sources themselves, compiled as C++.
//! It checks what a card would not forgive, and fails on request. `README.md` has the switches.

#![allow(non_snake_case, reason = "the exported functions have the driver's names")]

mod contexts;
mod copies;
mod devices;
mod driver;
mod errors;
mod events;
mod faults;
mod ffi;
mod graphs;
mod ipc;
mod links;
mod machine;
mod memops;
mod memory;
mod modules;
mod nvrtc;
mod options;
mod os;
mod space;
mod streams;
mod symbols;
mod violations;
mod vmm;
mod work;

/// Says something on standard error, which may be closed: a driver does not end its process over that.
fn say(text: &str) {
    use std::io::Write;
    let _ = write!(std::io::stderr(), "softcuda: {text}");
}
