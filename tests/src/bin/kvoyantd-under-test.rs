//! The daemon, as the tests of this crate start it.

use std::process::ExitCode;

use clap::Parser;

/// The same daemon as `kvoyantd`
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: kvoyant_daemon::Args,
}

fn main() -> ExitCode {
    // A test that is killed takes its daemon with it.
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    kvoyant_daemon::main(&Cli::parse().args)
}
