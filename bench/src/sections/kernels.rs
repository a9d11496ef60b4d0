//! Every kernel against the processor's: by the tests that say so, built beforehand, on this card.

use std::process::{Command, Stdio};

use crate::run::{Figures, Stop};

use super::Setup;

/// The test program, and the variable that gives it a card instead of the driver in software.
const TESTS: &str = "cuda_kernels";
const CARD: &str = "KVOYANT_TEST_CUDA";

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    let program = setup.program(TESTS)?;
    if let Err(none) = kvoyant_cuda::Compiler::find() {
        return Err(Stop::Skipped(none.to_string()));
    }
    let output = Command::new(program)
        .arg("--test-threads=1")
        .env(CARD, setup.ordinal.to_string())
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let count =
        |what: &str| said.lines().filter(|line| line.starts_with("test ") && line.ends_with(what)).count();
    figures.add("kernels and cases that agree with the CPU", count("... ok") as f64, "tests");
    if output.status.success() {
        return Ok(());
    }
    let failed: Vec<&str> =
        said.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED")).collect();
    let reason = if failed.is_empty() { output.status.to_string() } else { failed.join(", ") };
    Err(Stop::Failed(format!("these do not agree: {reason}")))
}
