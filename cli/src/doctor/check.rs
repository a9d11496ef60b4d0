//! What a check found, and how it is said: one line each, or JSON.

use std::fmt::{self, Write};

use kvoyant_cuda::CudaError;
use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Pass,
    /// It works, and would work better otherwise; or the device in question is not the one that was named.
    Warn,
    /// The named device cannot work like this.
    Fail,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        })
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What was looked at.
    pub(crate) name: &'static str,
    /// How it ended.
    pub(crate) level: Level,
    /// What was found.
    pub(crate) found: String,
    /// The command or setting that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fix: Option<String>,
}

/// All of them.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The device that failures are counted for.
    pub(crate) device: String,
    /// Whether it can be the daemon's device.
    pub(crate) usable: bool,
    /// In the order in which they were made.
    pub(crate) checks: Vec<Check>,
}

impl Report {
    pub(crate) fn new(device: String) -> Self {
        Self { device, usable: true, checks: Vec::new() }
    }

    pub(crate) fn pass(&mut self, name: &'static str, found: impl Into<String>) {
        self.add(name, Level::Pass, found.into(), None);
    }

    pub(crate) fn warn(&mut self, name: &'static str, found: impl Into<String>, fix: impl Into<String>) {
        self.add(name, Level::Warn, found.into(), Some(fix.into()));
    }

    pub(crate) fn add(&mut self, name: &'static str, level: Level, found: String, fix: Option<String>) {
        self.usable &= level != Level::Fail;
        self.checks.push(Check { name, level, found, fix: fix.filter(|fix| !fix.is_empty()) });
    }

    /// A driver's refusal, with what to do about it.
    pub(crate) fn refused(&mut self, name: &'static str, level: Level, what: &str, error: &CudaError) {
        let found = format!("{what}: {} gave {} ({})", error.call, error.name, error.code);
        self.add(name, level, found, Some(error.advice().into()));
    }

    /// For people: a line each, and the sum of them.
    pub(crate) fn words(&self) -> String {
        let mut out = String::new();
        for Check { name, level, found, fix } in &self.checks {
            let _ = write!(out, "{level}  {name:<18} {found}");
            let _ = match fix {
                Some(fix) => writeln!(out, " → {fix}"),
                None => writeln!(out),
            };
        }
        let count = |level| self.checks.iter().filter(|check| check.level == level).count();
        let (warn, fail) = (count(Level::Warn), count(Level::Fail));
        let verdict = if self.usable { "can be used" } else { "cannot be used like this" };
        let _ = writeln!(out, "\n{} {verdict}: {fail} failed, {warn} to look at", self.device);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_is_one_line_that_ends_with_what_mends_it() {
        let mut report = Report::new("cuda:0".into());
        report.pass("driver", "CUDA 12.8");
        report.warn("huge-pages", "none", "sysctl vm.nr_hugepages=32");
        assert!(report.usable);
        report.add("device", Level::Fail, "there is no cuda:0".into(), None);
        assert!(!report.usable);
        let words = report.words();
        let lines: Vec<&str> = words.lines().collect();
        assert_eq!(lines[0], "pass  driver             CUDA 12.8");
        assert_eq!(lines[1], "warn  huge-pages         none → sysctl vm.nr_hugepages=32");
        assert_eq!(lines[2], "FAIL  device             there is no cuda:0");
        assert_eq!(lines[4], "cuda:0 cannot be used like this: 1 failed, 1 to look at");
    }
}
