//! The Kvoyant daemon.

use std::process::ExitCode;

use clap::Parser;

/// Keeps the KV cache of long-context LLM inference, and has what the next layer needs ready before it asks
#[derive(Debug, Parser)]
#[command(name = "kvoyantd", version)]
struct Cli {
    #[command(flatten)]
    args: kvoyant_daemon::Args,
}

fn main() -> ExitCode {
    kvoyant_daemon::main(&Cli::parse().args)
}
