//! Compiles every kernel source for the cards named on the command line: `compile_kernels [--into FOLDER] sm_80 sm_90 …`
//!
//! Needs NVRTC and no GPU. With `--into` the folder is filled as a kernel cache, for a machine without a compiler.

use std::process::ExitCode;

use kvoyant_cuda::{Compiler, KernelCache};
use kvoyant_kernels::cuda::{MARKER, SOURCES};

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: Vec<String>) -> Result<(), String> {
    let into = match arguments.iter().position(|argument| argument == "--into") {
        Some(at) if at + 1 < arguments.len() => arguments.drain(at..at + 2).next_back(),
        Some(_) => return Err("--into wants a folder".to_owned()),
        None => None,
    };
    if arguments.is_empty() {
        return Err("name the cards to compile for, as in sm_80 sm_90 sm_100".to_owned());
    }
    let archs: Vec<(u32, u32)> = arguments.iter().map(|text| arch(text)).collect::<Result<_, _>>()?;
    let compiler = Compiler::find().map_err(|error| error.to_string())?;
    let cache = into.map(KernelCache::new);
    let (major, minor) = compiler.version();
    println!("NVRTC {major}.{minor} of {}", compiler.place());
    let mut failures = Vec::new();
    for (arch, source) in archs.into_iter().flat_map(|arch| SOURCES.iter().map(move |source| (arch, source)))
    {
        let (name, card) = (source.name(), format!("sm_{}{}", arch.0, arch.1));
        let image = match &cache {
            Some(cache) => cache.cubin(source, arch).map_err(|error| error.to_string()),
            None => compiler.compile(&source.compile_text(), name, arch).map_err(|error| error.to_string()),
        };
        match image {
            Ok(cubin) if has_marker(&cubin, &source.hash()) => {
                println!("{name:<12} {card:<7} {:>9} bytes", cubin.len());
            }
            Ok(_) => failures.push(format!("{name} for {card}: the marker is not in the image")),
            Err(message) => failures.push(message),
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// Compute capability of a name such as `sm_90`: the last digit is the minor number.
fn arch(text: &str) -> Result<(u32, u32), String> {
    text.strip_prefix("sm_")
        .and_then(|number| number.parse::<u32>().ok())
        .filter(|number| *number >= 10)
        .map(|number| (number / 10, number % 10))
        .ok_or_else(|| format!("{text} is no card's architecture: it looks like sm_90"))
}

/// Whether an image carries the line by which a kernel is known again.
fn has_marker(image: &[u8], hash: &str) -> bool {
    let marker = format!("{MARKER}{hash}");
    image.windows(marker.len()).any(|window| window == marker.as_bytes())
}
