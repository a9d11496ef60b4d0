//! Runs sections, each in a process of its own: what hangs is killed, what crashes takes nothing along, and a context
//! that a section has poisoned ends with it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::report::{Figure, Outcome, Section, Target};
use crate::sections::{Kind, Setup};

/// Why a section ended before its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Stop {
    /// Something is wrong.
    #[error("{0}")]
    Failed(String),
    /// It cannot be tried here.
    #[error("{0}")]
    Skipped(String),
}

macro_rules! fails {
    ($($kind:ty),*) => {
        $(impl From<$kind> for Stop {
            fn from(error: $kind) -> Self {
                Self::Failed(error.to_string())
            }
        })*
    };
}

fails!(
    io::Error,
    nix::Error,
    serde_json::Error,
    kvoyant_client::Error,
    kvoyant_cuda::CudaError,
    kvoyant_cuda::Unavailable,
    kvoyant_daemon::device::cuda::engines::EngineError,
    kvoyant_daemon::device::cuda::trial::TrialError,
    kvoyant_protocol::memory::MemoryError
);

impl From<Stop> for Outcome {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Failed(reason) => Self::Fail(reason),
            Stop::Skipped(reason) => Self::Skipped(reason),
        }
    }
}

/// One line of a section's process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Figure(Figure),
    Outcome(Outcome),
}

/// Where a section puts its figures: they are written at once, so that they outlive it.
#[derive(Debug)]
pub(crate) struct Figures(());

impl Figures {
    pub(crate) fn add(&self, name: impl Into<String>, value: f64, unit: &str) {
        write(&Line::Figure(Figure { name: name.into(), value, unit: unit.into(), target: None }));
    }

    pub(crate) fn aim(&self, name: impl Into<String>, value: f64, unit: &str, target: Target) {
        write(&Line::Figure(Figure { name: name.into(), value, unit: unit.into(), target: Some(target) }));
    }
}

fn write(line: &Line) {
    let text = serde_json::to_string(line).unwrap_or_default();
    let mut out = io::stdout().lock();
    // Whoever reads it is gone: then nobody wants it.
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// The section's process: does it, and writes what came of it.
pub(crate) fn inside(kind: Kind, setup: &Setup) {
    let outcome = kind.run(setup, &Figures(())).map_or_else(Outcome::from, |()| Outcome::Pass);
    write(&Line::Outcome(outcome));
}

/// Runs a section in a process of its own with these further variables, and waits for its end or for too long.
pub(crate) fn outside(kind: Kind, title: &str, setup: &Setup, variables: &[(&str, String)]) -> Section {
    let since = Instant::now();
    let (outcome, figures) = watched(kind, setup, variables)
        .unwrap_or_else(|error| (Outcome::Fail(format!("it could not be run: {error}")), Vec::new()));
    let name = kind.name().to_owned();
    Section { name, title: title.into(), outcome, seconds: since.elapsed().as_secs_f64(), figures }
}

fn watched(kind: Kind, setup: &Setup, variables: &[(&str, String)]) -> io::Result<(Outcome, Vec<Figure>)> {
    let folder = tempfile::tempdir()?;
    let (out_path, err_path) = (folder.path().join("out"), folder.path().join("err"));
    let mut child = Command::new(std::env::current_exe()?)
        .args(setup.arguments())
        .arg("--section")
        .arg(kind.name())
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(File::create(&out_path)?)
        .stderr(File::create(&err_path)?)
        .process_group(0)
        .spawn()?;
    let patience = setup.patience.unwrap_or(kind.patience());
    let until = Instant::now() + patience;
    let status = loop {
        match child.try_wait()? {
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            status => break status,
        }
    };
    // With the processes that it has started.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.wait();
    let text = std::fs::read_to_string(&out_path)?;
    let (mut outcome, mut figures) = (None, Vec::new());
    for line in text.lines().filter_map(|line| serde_json::from_str(line).ok()) {
        match line {
            Line::Figure(figure) => figures.push(figure),
            Line::Outcome(found) => outcome = Some(found),
        }
    }
    let outcome = outcome.unwrap_or_else(|| {
        let said = std::fs::read_to_string(&err_path).unwrap_or_default();
        let said = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned();
        Outcome::Fail(match status {
            None => format!("it did not end within {} s ({said})", patience.as_secs()),
            Some(status) => format!("it ended without an answer, {status} ({said})"),
        })
    });
    Ok((outcome, figures))
}

/// The median of several; 0 of none.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value that this share of several is at most; 0 of none.
pub(crate) fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * share).round() as usize).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let mut values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(median(&mut values), 3.0);
        assert_eq!(quantile(&mut values, 0.99), 5.0);
        assert_eq!(quantile(&mut values, 0.0), 1.0);
        assert_eq!(median(&mut []), 0.0);
    }
}
