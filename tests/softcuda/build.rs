//! Generates what is a matter of lists: the table of exported symbols, stubs for the calls of the driver that nobody
//! needed yet, and the names of errors. Compiles the kernels, through a shim, for this processor.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src");
    fs::write(out.join("symbols.rs"), symbols(&here.join("src"))).expect("OUT_DIR can be written");
    fs::write(out.join("errors.rs"), errors(&here.join("src/errors.txt"))).expect("OUT_DIR can be written");
    compile_kernels();
}

/// Compiles the shim's files, each of which takes one source of kernels in.
fn compile_kernels() {
    let shim = Path::new("shim");
    let kernels = Path::new("../../kernels/cuda");
    println!("cargo::rerun-if-changed={}", shim.display());
    println!("cargo::rerun-if-changed={}", kernels.display());
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").cpp_link_stdlib(None).opt_level(3).warnings(true).extra_warnings(true);
    // Kernels look at memory through several types, and their products and sums are rounded one by one.
    for flag in
        ["-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden"]
    {
        build.flag(flag);
    }
    build.flag("-Wno-unused-function").flag("-Wno-unused-variable");
    let folder = fs::read_dir(shim).expect("the shim's folder is there");
    for file in folder.flatten().map(|entry| entry.path()) {
        if file.extension().is_some_and(|extension| extension == "cpp") {
            build.file(file);
        }
    }
    build.file("src/guard.cpp");
    build.compile("shim");
}

/// The names that this crate's sources export.
fn implemented(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).expect("the sources").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source");
            let mut lines = text.lines();
            while let Some(line) = lines.next() {
                if line == "#[unsafe(no_mangle)]" {
                    let declared = lines.next().and_then(|line| line.split_once("extern \"C\" fn "));
                    let (_, rest) = declared.expect("an exported function is declared behind its attribute");
                    names.push(rest.split('(').next().expect("a name").to_owned());
                }
            }
        }
    }
    names.sort_unstable();
    names
}

/// Stubs of what is not implemented, and the table of all names.
fn symbols(folder: &Path) -> String {
    let known = fs::read_to_string(folder.join("names.txt")).expect("the driver's names");
    let mut names = implemented(folder);
    let mut text = String::new();
    for name in known.lines().filter(|name| names.iter().all(|done| done != name)) {
        writeln!(
            text,
            "#[unsafe(no_mangle)]\nextern \"C\" fn {name}() -> u32 {{\n    not_implemented({name:?})\n}}"
        )
        .expect("a string");
    }
    names.extend(known.lines().map(ToOwned::to_owned));
    names.retain(|name| name.starts_with("cu"));
    names.sort_unstable();
    names.dedup();
    text.push_str("mod declared {\n    unsafe extern \"C\" {\n");
    for name in &names {
        writeln!(text, "        pub(super) fn {name}();").expect("a string");
    }
    text.push_str("    }\n}\nstatic SYMBOLS: &[(&str, unsafe extern \"C\" fn())] = &[\n");
    for name in &names {
        writeln!(text, "    ({name:?}, declared::{name}),").expect("a string");
    }
    text.push_str("];\n");
    text
}

/// Numbers, names and texts of errors; a text is the name in plain words.
fn errors(list: &Path) -> String {
    let list = fs::read_to_string(list).expect("the driver's errors");
    let mut text = String::from("static ERRORS: &[(u32, &CStr, &CStr)] = &[\n");
    for line in list.lines() {
        let (code, name) = line.split_once(' ').expect("a number and a name");
        let words =
            name.trim_start_matches("CUDA_").trim_start_matches("ERROR_").replace('_', " ").to_lowercase();
        writeln!(text, "    ({code}, c{name:?}, c{words:?}),").expect("a string");
    }
    text.push_str("];\n");
    text
}
