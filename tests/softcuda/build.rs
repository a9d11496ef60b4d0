//! Compiles the kernels, through a shim, for this processor.

use std::path::Path;

fn main() {
    let shim = Path::new("shim");
    let kernels = Path::new("../../kernels/cuda");
    println!("cargo::rerun-if-changed={}", shim.display());
    println!("cargo::rerun-if-changed={}", kernels.display());
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").cpp_link_stdlib(None).opt_level(2).warnings(true).extra_warnings(true);
    // Kernels look at memory through several types, and their products and sums are rounded one by one.
    for flag in
        ["-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden"]
    {
        build.flag(flag);
    }
    build.flag("-Wno-unused-function").flag("-Wno-unused-variable");
    let folder = std::fs::read_dir(shim).expect("the shim's folder is there");
    for file in folder.flatten().map(|entry| entry.path()) {
        if file.extension().is_some_and(|extension| extension == "cpp") {
            build.file(file);
        }
    }
    build.compile("shim");
}
