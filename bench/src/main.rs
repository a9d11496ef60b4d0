//! `gpu-check`: what a machine with a GPU does, checked and measured with programs that were built elsewhere.
//!
//! Each section runs in a process of its own ([`run`]) and, where it takes two, tells a further one what to do
//! ([`agent`]). It ends with a table and, if asked for, a JSON file. Under the driver in software it runs as far as that
//! goes, so that it is known to work before a machine with a GPU is at hand.

mod agent;
mod burn;
mod mover;
mod mps;
mod pages;
mod report;
mod run;
mod sections;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;

use crate::report::{Gpu, Machine, Report};
use crate::run::Stop;
use crate::sections::{Kind, Setup};

/// Checks and measures what Kvoyant does on a GPU
#[derive(Debug, Parser)]
#[command(name = "gpu-check", version)]
struct Cli {
    /// The GPU's number
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: u32,
    /// Write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The demo's model: a file, a folder or `tiny`; without it, the usual one if it can be fetched
    #[arg(long, value_name = "FILE|DIR|tiny")]
    model: Option<PathBuf>,
    /// Only these sections
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<Kind>,
    /// Folder of the other programs; by default, that of this one
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// How long a section may take, in seconds, instead of what suits each
    #[arg(long, value_name = "SECONDS")]
    patience: Option<u64>,
    /// Be the process of one section
    #[arg(long, hide = true)]
    section: Option<Kind>,
    /// Be the other process of a section
    #[arg(long, hide = true)]
    agent: bool,
}

/// As the first argument: be a daemon, with the rest.
pub(crate) const DAEMON: &str = "--daemon";

/// The same as `kvoyantd`.
#[derive(Debug, Parser)]
struct DaemonCli {
    #[command(flatten)]
    args: kvoyant_daemon::Args,
}

fn main() -> ExitCode {
    // The daemon of a section ends with it; what a killed parent leaves behind helps nobody.
    let mut arguments = std::env::args_os().peekable();
    let program = arguments.next().unwrap_or_default();
    if arguments.next_if(|argument| argument == DAEMON).is_some() {
        let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
        return kvoyant_daemon::main(&DaemonCli::parse_from(std::iter::once(program).chain(arguments)).args);
    }
    match work(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu-check: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is well.
fn work(cli: &Cli) -> Result<bool, Stop> {
    if cli.agent || cli.section.is_some() {
        let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    }
    if cli.agent {
        return agent::serve(cli.device).map(|()| true);
    }
    let driver = kvoyant_cuda::driver()?;
    let gpu = Gpu::of(driver, &driver.device(cli.device)?);
    let programs = match &cli.programs {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?.parent().map(PathBuf::from).unwrap_or_default(),
    };
    let software = gpu.is_software();
    let patience = cli.patience.map(Duration::from_secs);
    let setup = Setup { ordinal: cli.device, programs, model: cli.model.clone(), software, patience };
    if let Some(kind) = cli.section {
        run::inside(kind, &setup);
        return Ok(true);
    }
    let mut report = Report::new(Machine::this(), gpu, now());
    for kind in Kind::ALL.into_iter().filter(|kind| cli.only.is_empty() || cli.only.contains(kind)) {
        eprintln!("{} …", kind.title());
        report.sections.push(run::outside(kind, kind.title(), &setup, &[]));
        if kind == Kind::Overlap {
            report.sections.extend(mps::overlap(&setup));
        }
    }
    print!("{}", report.table());
    if let Some(path) = &cli.out {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(report.passed())
}

/// The date as `date` gives it: every machine has it, and no dependency is needed.
fn now() -> String {
    Command::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%SZ"])
        .output()
        .map_or_else(|_| "unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, ValueEnum};

    #[test]
    fn the_command_line_is_consistent_and_names_every_section() {
        Cli::command().debug_assert();
        for kind in Kind::ALL {
            let value = kind.to_possible_value().map(|value| value.get_name().to_owned());
            assert_eq!(value.as_deref(), Some(kind.name()));
        }
    }
}
